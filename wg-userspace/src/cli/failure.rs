//! How a command ends: the exit code, and what is printed on standard error.

use std::{error::Error, fmt, io, process::ExitCode};

use miette::{Diagnostic, Report};

use crate::{daemon, host::HostError};

/// Exit codes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Code {
    /// It worked.
    Ok = 0,
    /// It failed while it ran.
    Runtime = 1,
    /// The arguments make no sense.
    Usage = 2,
    /// The config file has errors; nothing was started or changed.
    Config = 3,
    /// A privilege is missing.
    Privilege = 4,
    /// What was named does not exist, what was to be made does already, or another process is at work
    /// on it.
    Existence = 5,
    /// It works, but not as well as was asked for.
    Degraded = 6,
    /// The packet that was asked about would be dropped.
    Dropped = 7,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> ExitCode {
        ExitCode::from(code as u8)
    }
}

/// A command that did not work.
pub struct Failure {
    code: u8,
    shown: Shown,
}

enum Shown {
    Line(String),
    /// What comes behind it may be empty.
    Report(Report, String),
    /// The process that failed has said so already. What goes before anything else that is said.
    Nothing(String),
}

impl Failure {
    /// One line of text.
    pub fn new(code: Code, line: impl fmt::Display) -> Self {
        Self { code: code as u8, shown: Shown::Line(line.to_string()) }
    }

    /// Errors in a config file.
    pub fn config(errors: impl Diagnostic + Send + Sync + 'static) -> Self {
        Self { code: Code::Config as u8, shown: Shown::Report(Report::new(errors), String::new()) }
    }

    /// This host keeps a config file from being followed.
    pub fn of_host(errors: impl Diagnostic + Send + Sync + 'static) -> Self {
        Self { code: Code::Runtime as u8, ..Self::config(errors) }
    }

    /// A child process ended with this code, and printed why.
    pub fn of_child(code: u8) -> Self {
        Self { code, shown: Shown::Nothing(String::new()) }
    }

    /// The exit code.
    pub fn code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }

    /// The line that will be printed, if it is one.
    pub fn line(&self) -> String {
        match &self.shown {
            Shown::Line(line) => line.clone(),
            Shown::Report(report, _) => report.to_string(),
            Shown::Nothing(_) => String::new(),
        }
    }

    /// Puts `what` before the line that will be printed, if it does not begin so already.
    pub fn within(mut self, what: impl fmt::Display) -> Self {
        let what = what.to_string();
        match &mut self.shown {
            Shown::Line(line) => {
                if !line.strip_prefix(&what).is_some_and(|rest| rest.starts_with(':')) {
                    *line = format!("{what}: {line}");
                }
            }
            Shown::Nothing(before) => *before = what,
            Shown::Report(..) => {}
        }
        self
    }

    /// Puts `what` behind the line that will be printed.
    pub fn and(mut self, what: impl fmt::Display) -> Self {
        match &mut self.shown {
            Shown::Line(line) => *line = format!("{line}; {what}"),
            Shown::Report(_, rest) if rest.is_empty() => *rest = what.to_string(),
            Shown::Report(_, rest) => *rest = format!("{rest}; {what}"),
            Shown::Nothing(before) if before.is_empty() => {
                self.shown = Shown::Line(what.to_string());
            }
            Shown::Nothing(before) => self.shown = Shown::Line(format!("{before}: {what}")),
        }
        self
    }

    /// Prints it on standard error.
    pub fn print(&self) {
        match &self.shown {
            Shown::Line(line) => eprintln!("tidegate: {line}"),
            // Its `Debug` is miette's report for people, as the terminal can show it.
            Shown::Report(report, rest) => {
                eprintln!("{report:?}");
                if !rest.is_empty() {
                    eprintln!("tidegate: {rest}");
                }
            }
            Shown::Nothing(_) => {}
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        // An error that is the context of another one does not show itself in the chain.
        let daemon = error.downcast_ref::<daemon::Error>().map(code_of_daemon);
        let code = daemon.or_else(|| error.chain().find_map(code_of)).unwrap_or(Code::Runtime);
        let failure = Self::new(code, line(&error));
        let is_refused = |cause: &(dyn Error + 'static)| {
            let cause = cause.downcast_ref::<io::Error>();
            cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
        };
        if error.chain().any(is_refused) && !rustix::process::geteuid().is_root() {
            return failure.and("run it as root");
        }
        failure
    }
}

/// What was being done and why it failed, without saying the same twice.
fn line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.ends_with(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        anyhow::Error::new(error).into()
    }
}

/// The exit code that one error of a chain asks for.
fn code_of(error: &(dyn Error + 'static)) -> Option<Code> {
    if let Some(error) = error.downcast_ref::<daemon::Error>() {
        return Some(code_of_daemon(error));
    }
    if let Some(error) = error.downcast_ref::<HostError>() {
        return match error {
            HostError::Privilege { .. } => Some(Code::Privilege),
            HostError::NoLink(_) => Some(Code::Existence),
            _ => None,
        };
    }
    match error.downcast_ref::<io::Error>()?.kind() {
        io::ErrorKind::PermissionDenied => Some(Code::Privilege),
        _ => None,
    }
}

fn code_of_daemon(error: &daemon::Error) -> Code {
    match error {
        daemon::Error::Privilege(_) => Code::Privilege,
        daemon::Error::AlreadyExists(_) => Code::Existence,
        daemon::Error::NoZeroCopy(_) => Code::Runtime,
    }
}

#[cfg(test)]
impl Failure {
    /// The code and the line.
    pub fn into_line(self) -> (u8, String) {
        let Shown::Line(line) = self.shown else { panic!("it is shown as a line") };
        (self.code, line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(error: impl Into<anyhow::Error>) -> (u8, String) {
        Failure::from(error.into().context("starting wg0")).into_line()
    }

    #[test]
    fn errors_have_their_codes_however_deep_they_lie() {
        let privilege = daemon::Error::Privilege("opening /dev/net/tun".to_owned());
        assert_eq!(failure(privilege), (4, "starting wg0: opening /dev/net/tun".to_owned()));
        let exists = daemon::Error::AlreadyExists("there is a wg0".to_owned());
        assert_eq!(failure(exists).0, 5);
        let context = anyhow::anyhow!("EPERM").context(daemon::Error::Privilege("no".to_owned()));
        assert_eq!(failure(context), (4, "starting wg0: no: EPERM".to_owned()));
        let link = HostError::NoLink("eth9".to_owned());
        assert_eq!(
            failure(link),
            (
                5,
                "starting wg0: there is no network interface eth9; `ip link` lists them".to_owned()
            )
        );
        assert_eq!(failure(HostError::Privilege { doing: "x".to_owned() }).0, 4);
        assert_eq!(failure(io::Error::from(io::ErrorKind::PermissionDenied)).0, 4);
        assert_eq!(failure(io::Error::from(io::ErrorKind::TimedOut)).0, 1);
        assert_eq!(failure(anyhow::anyhow!("no luck")), (1, "starting wg0: no luck".to_owned()));
    }

    #[test]
    fn nothing_is_said_twice() {
        let error = anyhow::anyhow!("no such device").context("opening eth9: no such device");
        assert_eq!(failure(error).1, "starting wg0: opening eth9: no such device");
    }

    #[test]
    fn what_stands_before_is_said_once() {
        let failure = Failure::new(Code::Runtime, "wg0.conf:7: no luck").within("wg0.conf");
        assert_eq!(failure.into_line().1, "wg0.conf:7: no luck");
        let failure = Failure::new(Code::Runtime, "wg0.conf:7: no luck").within("wg0");
        assert_eq!(failure.into_line().1, "wg0: wg0.conf:7: no luck");
        let failure = Failure::of_child(1).within("wg0").and("everything was undone");
        assert_eq!(failure.into_line(), (1, "wg0: everything was undone".to_owned()));
    }

    #[test]
    fn lines_grow_at_both_ends() {
        let failure = Failure::new(Code::Runtime, "no luck").within("wg0").and("rolled back");
        assert_eq!(failure.into_line(), (1, "wg0: no luck; rolled back".to_owned()));
    }

    #[test]
    fn what_comes_behind_a_report_does_not_hide_it() {
        let errors = crate::config::parse("wg0.conf", "[Pear]\n").unwrap_err();
        let failure = Failure::config(errors).and("the file was left").and("nothing was done");
        assert_eq!(failure.code, 3);
        let Shown::Report(report, rest) = failure.shown else { panic!("it is shown as a report") };
        assert!(format!("{report:?}").contains("did you mean [Peer]?"), "{report:?}");
        assert_eq!(rest, "the file was left; nothing was done");
    }
}
