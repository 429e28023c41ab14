//! Who takes part: tidegate in its modes, the rivals that are in PATH, and no tunnel at all.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::raw::{Column, Kind};
use crate::lab::{OUTER, find_program};

/// What stands for the interface's name in commands that are shown.
const INTERFACE: &str = "IF";
/// Names of ours, and of the baseline.
const SOCKETS: &str = "tidegate";
const XDP: &str = "tidegate-xdp";
const BASELINE: &str = "none";

/// Somebody else's program, and how it is told to stay in the foreground.
struct Rival {
    program: &'static str,
    title: &'static str,
    arguments: &'static [&'static str],
    /// Where it comes from, for who has not got it.
    comes_by: &'static str,
}

const RIVALS: [Rival; 3] = [
    Rival {
        program: "gotatun",
        title: "gotatun",
        arguments: &["-f", "--disable-drop-privileges"],
        comes_by: "cargo install gotatun-cli",
    },
    Rival {
        program: "wireguard-go",
        title: "wireguard-go",
        arguments: &["-f"],
        comes_by: "apt install wireguard-go",
    },
    Rival {
        program: "boringtun-cli",
        title: "boringtun",
        arguments: &["-f", "--disable-drop-privileges"],
        comes_by: "cargo install boringtun-cli",
    },
];

/// Somebody who takes part.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Implementation {
    /// What reports say of it.
    pub column: Column,
    /// What makes an interface; nothing for the baseline.
    pub device: Option<Device>,
}

/// A program that makes an interface, and stays in the foreground.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Device {
    /// Where it is.
    pub program: PathBuf,
    /// What it is told, before the interface's name.
    pub arguments: Vec<String>,
    /// Whether it attaches XDP to the outer link.
    pub is_xdp: bool,
}

impl Implementation {
    fn ours(program: &Path, is_xdp: bool) -> Implementation {
        let (name, title, mode): (_, _, &[&str]) = match is_xdp {
            false => (SOCKETS, "tidegate (sockets)", &["--mode", "udp"]),
            true => (XDP, "tidegate (XDP)", &["--xdp", OUTER, "--mode", "native"]),
        };
        let arguments = [&["run", "--foreground"][..], mode].concat();
        Implementation::new(name, title, Kind::Ours, program, &arguments, is_xdp)
    }

    fn new(
        name: &str,
        title: &str,
        kind: Kind,
        program: &Path,
        arguments: &[&str],
        is_xdp: bool,
    ) -> Implementation {
        let arguments: Vec<_> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let file_name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let shown = [file_name].into_iter().chain(arguments.clone()).chain([INTERFACE.to_owned()]);
        Implementation {
            column: Column {
                name: name.to_owned(),
                title: title.to_owned(),
                kind,
                version: version(program),
                command: shown.collect(),
            },
            device: Some(Device { program: program.to_owned(), arguments, is_xdp }),
        }
    }

    fn baseline() -> Implementation {
        let column = Column {
            name: BASELINE.to_owned(),
            title: "no tunnel".to_owned(),
            kind: Kind::Baseline,
            version: None,
            command: Vec::new(),
        };
        Implementation { column, device: None }
    }

    /// Tidegate with sockets: the client's end, whatever the gateway is.
    pub fn client(tidegate: &Path) -> Device {
        Implementation::ours(tidegate, false).device.expect("ours has a program")
    }
}

/// Those that are named, or all that there are, in the order of the report; and what is to be said of those
/// that are not there.
///
/// # Errors
/// If somebody is named who is not known, or is not in PATH.
pub fn find(tidegate: &Path, names: &[String]) -> Result<(Vec<Implementation>, Vec<String>)> {
    choose(tidegate, names, find_program)
}

fn choose(
    tidegate: &Path,
    names: &[String],
    find_program: impl Fn(&str) -> Option<PathBuf>,
) -> Result<(Vec<Implementation>, Vec<String>)> {
    let known = || [SOCKETS, XDP].into_iter().chain(RIVALS.iter().map(|rival| rival.program));
    for name in names {
        if !known().chain([BASELINE]).any(|known| known == name) {
            let known: Vec<_> = known().chain([BASELINE]).collect();
            bail!("nobody is called `{name}`; there are {}", known.join(", "));
        }
    }
    let is_meant = |name: &str| names.is_empty() || names.iter().any(|meant| meant == name);
    let (mut found, mut notes) = (Vec::new(), Vec::new());
    for (name, is_xdp) in [(SOCKETS, false), (XDP, true)] {
        if is_meant(name) {
            found.push(Implementation::ours(tidegate, is_xdp));
        }
    }
    for Rival { program, title, arguments, comes_by } in &RIVALS {
        match find_program(program) {
            _ if !is_meant(program) => {}
            Some(path) => {
                let kind = Kind::Rival;
                found.push(Implementation::new(program, title, kind, &path, arguments, false));
            }
            None if names.is_empty() => {
                notes.push(format!("{program} is not in PATH (`{comes_by}`)."));
            }
            None => bail!("{program} is not in PATH; `{comes_by}`"),
        }
    }
    if is_meant(BASELINE) {
        found.push(Implementation::baseline());
    }
    Ok((found, notes))
}

/// What a program says of its version.
fn version(program: &Path) -> Option<String> {
    let mut command = Command::new(program);
    let output = command.arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    parse_version(&String::from_utf8_lossy(&text))
}

/// The first word of a line that begins with a number and a dot, with or without a `v`.
fn parse_version(text: &str) -> Option<String> {
    let is_version = |word: &str| {
        let (number, rest) = word.split_once('.').unwrap_or_default();
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "._+-".contains(c);
        !number.is_empty()
            && number.bytes().all(|byte| byte.is_ascii_digit())
            && rest.starts_with(|c: char| c.is_ascii_digit())
            && rest.chars().all(is_plain)
            && word.len() <= 40
    };
    let words = text.split_whitespace().map(|word| word.strip_prefix('v').unwrap_or(word));
    words.map(|word| word.trim_end_matches(',')).find(|word| is_version(word)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        for (text, version) in [
            (
                "wireguard-go v0.0.20220316\n\nUserspace WireGuard daemon for linux-amd64.\n",
                "0.0.20220316",
            ),
            ("boringtun 0.7.1\n", "0.7.1"),
            ("gotatun-cli 0.10.2\n", "0.10.2"),
            ("tidegate 0.1.0-dev+abc\n", "0.1.0-dev+abc"),
            ("x, version 1.2, of 2026", "1.2"),
        ] {
            assert_eq!(parse_version(text).as_deref(), Some(version), "{text}");
        }
        for text in
            ["", "error: unknown flag", "a.b", "v.1", "5", "1.x", "1.2<script>", "e.g. this"]
        {
            assert_eq!(parse_version(text), None, "{text}");
        }
        assert_eq!(parse_version(&format!("1.{}", "2".repeat(99))), None);
    }

    fn names(wanted: &[&str], in_path: &[&str]) -> Result<(Vec<String>, Vec<String>)> {
        let wanted: Vec<_> = wanted.iter().map(|&name| name.to_owned()).collect();
        // Not there, so that nobody is asked for a version.
        let path = |name: &str| in_path.contains(&name).then(|| Path::new("/nowhere").join(name));
        let (found, notes) = choose(Path::new("/nowhere/tidegate"), &wanted, path)?;
        Ok((found.into_iter().map(|one| one.column.name).collect(), notes))
    }

    #[test]
    fn rivals_take_part_that_are_in_path() {
        let (found, notes) = names(&[], &["wireguard-go"]).unwrap();
        assert_eq!(found, ["tidegate", "tidegate-xdp", "wireguard-go", "none"]);
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert!(notes[0].contains("cargo install gotatun-cli"), "{notes:?}");
    }

    #[test]
    fn who_is_named_must_be_there() {
        let (found, notes) = names(&["none", "tidegate"], &["gotatun"]).unwrap();
        assert_eq!((found.len(), notes.len()), (2, 0));
        let missing = names(&["gotatun"], &[]).unwrap_err().to_string();
        assert!(missing.contains("gotatun is not in PATH; `cargo install"), "{missing}");
        let unknown = names(&["tide"], &[]).unwrap_err().to_string();
        assert!(unknown.starts_with("nobody is called `tide`; there are tidegate, "), "{unknown}");
    }

    #[test]
    fn commands_are_shown_as_they_are_run() {
        let tidegate = Implementation::ours(Path::new("/nowhere/tidegate"), true);
        let shown = tidegate.column.command.join(" ");
        assert_eq!(shown, "tidegate run --foreground --xdp outer --mode native IF");
        assert_eq!(tidegate.device.unwrap().arguments.last().unwrap(), "native");
    }
}
