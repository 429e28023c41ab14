//! Config files that cannot be read: why, and what to do.

use std::{fs, io, path::Path};

use super::{Code, Failure};

/// Most files that a hint names.
const NAMED_MAX: usize = 4;

/// Why a file cannot be read, and what to do.
pub fn unreadable(path: &Path, error: &io::Error) -> Failure {
    let (code, line) = problem(path, error);
    let failure = Failure::new(code, line);
    match hint(path, error) {
        Some(hint) => failure.and(hint),
        None => failure,
    }
}

/// Why a file cannot be read.
pub fn problem(path: &Path, error: &io::Error) -> (Code, String) {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::NotFound => (Code::Existence, format!("there is no {path}")),
        io::ErrorKind::InvalidData => (Code::Config, format!("{path} is not UTF-8 text")),
        io::ErrorKind::PermissionDenied => (Code::Privilege, format!("reading {path}: {error}")),
        _ => (Code::Runtime, format!("reading {path}: {error}")),
    }
}

/// What to do about it, if that is known.
pub fn hint(path: &Path, error: &io::Error) -> Option<String> {
    match error.kind() {
        io::ErrorKind::NotFound => Some(instead_of(path)),
        io::ErrorKind::InvalidData => {
            Some(format!("`tidegate check {}` shows where", path.display()))
        }
        io::ErrorKind::PermissionDenied => {
            Some("run it as root, or as the file's owner".to_owned())
        }
        io::ErrorKind::IsADirectory => Some("name a file in it".to_owned()),
        _ => None,
    }
}

/// What could be meant by a file that is not there.
fn instead_of(path: &Path) -> String {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".conf")).collect();
    names.sort();
    let rest = names.len().saturating_sub(NAMED_MAX);
    names.truncate(NAMED_MAX);
    match (names.join(", "), rest) {
        (names, _) if names.is_empty() => "`tidegate init` writes config files".to_owned(),
        (names, 0) => format!("{} has {names}", folder.display()),
        (names, rest) => format!("{} has {names} and {rest} more", folder.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_there_are_named_for_one_that_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wg0.conf");
        assert_eq!(instead_of(&path), "`tidegate init` writes config files");
        for name in ["wg2.conf", "wg1.conf", "notes.txt"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let shown = folder.path().display();
        assert_eq!(instead_of(&path), format!("{shown} has wg1.conf, wg2.conf"));
        for number in 3..9 {
            fs::write(folder.path().join(format!("wg{number}.conf")), "").unwrap();
        }
        let expected = format!("{shown} has wg1.conf, wg2.conf, wg3.conf, wg4.conf and 4 more");
        assert_eq!(instead_of(&path), expected);
    }
}
