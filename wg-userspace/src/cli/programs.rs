//! Programs of the host that are run.

use std::{
    fmt,
    io::{self, Write},
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::Path,
    process::{Command, ExitStatus, Stdio},
};

use anyhow::Context;

use super::{Code, Failure};

/// A program, its arguments, and what it reads.
#[derive(Debug, Eq, PartialEq)]
pub struct Program {
    name: &'static str,
    arguments: Vec<String>,
    input: String,
}

impl Program {
    /// Reads nothing.
    pub fn new<'a>(name: &'static str, arguments: impl IntoIterator<Item = &'a str>) -> Program {
        let arguments = arguments.into_iter().map(str::to_owned).collect();
        Program { name, arguments, input: String::new() }
    }

    /// Reads this.
    pub fn with_input(mut self, input: String) -> Program {
        self.input = input;
        self
    }

    /// What it reads.
    #[cfg(test)]
    pub fn input(&self) -> &str {
        &self.input
    }

    /// Runs it to its end. What it prints is our error output.
    ///
    /// # Errors
    /// If it cannot be run, or ends with another code than 0.
    pub fn run(&self) -> Result<(), Failure> {
        self.start(Stdio::from(io::stderr())).map(drop)
    }

    /// Runs it to its end and gives what it prints.
    ///
    /// # Errors
    /// If it cannot be run, or ends with another code than 0.
    pub fn output(&self) -> Result<String, Failure> {
        self.start(Stdio::piped())
    }

    fn start(&self, stdout: Stdio) -> Result<String, Failure> {
        let doing = || format!("running `{self}`");
        let mut child = Command::new(self.name)
            .args(&self.arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(stdout)
            .spawn()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => {
                    let line = format!("running `{self}`: there is no `{}`; install it", self.name);
                    Failure::new(Code::Runtime, line)
                }
                _ => anyhow::Error::new(error).context(doing()).into(),
            })?;
        let mut stdin = child.stdin.take().expect("it is piped");
        // Who does not read it says by its exit code whether that was right.
        let _ = stdin.write_all(self.input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().with_context(doing)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Failure::new(Code::Runtime, format_args!("`{self}` {}", ended(output.status))))
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        self.arguments.iter().try_for_each(|argument| write!(f, " {argument}"))
    }
}

/// How a process ended, as the end of a sentence.
pub fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, signal) => format!("was killed by signal {}", signal.unwrap_or(0)),
    }
}

/// Whether there is a program of this name.
pub fn is_there(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_program = |path: &Path| {
        path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(&path).any(|folder| is_program(&folder.join(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_and_their_failures_are_told() {
        assert!(is_there("sh") && !is_there("no-such-program"));
        let echo = Program::new("cat", []).with_input("words\n".to_owned());
        assert_eq!(echo.output().unwrap_or_else(|_| panic!("it works")), "words\n");
        let (code, line) = Program::new("sh", ["-c", "exit 3"]).run().err().unwrap().into_line();
        assert_eq!((code, line.as_str()), (1, "`sh -c exit 3` ended with exit code 3"));
        let (code, line) = Program::new("no-such-program", ["x"]).run().err().unwrap().into_line();
        let expected = "running `no-such-program x`: there is no `no-such-program`; install it";
        assert_eq!((code, line.as_str()), (1, expected));
    }
}
