//! The files: found, read and parsed, whatever bytes are in them.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use miette::{Diagnostic, NamedSource};
use zeroize::{Zeroize, Zeroizing};

use super::super::{Failure, files as config_files, name::ConfigFile};
use crate::{
    check::{Finding, Rule, Severity},
    config::{self, Config, Problem, Span},
};

/// One file.
pub struct File {
    /// As it was named.
    pub path: PathBuf,
    /// What stands before `.conf`: the interface's name, if it can be one.
    pub interface: String,
    /// What sentences call this end: the interface's name, or what tells it from the others.
    pub name: String,
    /// The text as it may be shown.
    pub source: Arc<NamedSource<String>>,
    /// What it says, if it can be read.
    pub config: Option<Config>,
    /// What `up` would do, a line for each step; nothing if it would refuse the file.
    pub plan: Vec<String>,
    /// What is found while it is read.
    pub findings: Vec<Finding>,
}

/// Reads the files, or those of `/etc/wireguard` that interfaces' names stand for; each once.
///
/// # Errors
/// If one of them cannot be read at all; all of those are named.
pub fn read(words: &[String], exists: impl Fn(&Path) -> bool) -> Result<Vec<File>, Failure> {
    let mut files = Vec::new();
    let mut seen = HashSet::new();
    let mut failure: Option<Failure> = None;
    let mut hint = None;
    for word in words {
        // Here any file will do, whatever it is called.
        let path = ConfigFile::which(word, &exists).map_or_else(|_| word.into(), |file| file.path);
        if !seen.insert(path.canonicalize().unwrap_or_else(|_| path.clone())) {
            continue;
        }
        match fs::read(&path) {
            Ok(bytes) => files.push(File::of(path, files.len(), Zeroizing::new(bytes))),
            Err(error) => {
                let (code, line) = config_files::problem(&path, &error);
                hint = hint.or_else(|| config_files::hint(&path, &error));
                failure = Some(match failure {
                    None => Failure::new(code, line),
                    Some(failure) => failure.and(line),
                });
            }
        }
    }
    match (failure, hint) {
        (Some(failure), Some(hint)) => Err(failure.and(hint)),
        (Some(failure), None) => Err(failure),
        (None, _) => {
            name(&mut files);
            Ok(files)
        }
    }
}

/// Gives files whose names are the same (`server/wg0.conf`, `laptop/wg0.conf`) names that tell them
/// apart.
fn name(files: &mut [File]) {
    let count = |names: Vec<String>| {
        let mut counts: HashMap<String, usize> = HashMap::new();
        names.into_iter().for_each(|name| *counts.entry(name).or_default() += 1);
        counts
    };
    let folder = |file: &File| {
        let folder = file.path.parent()?.file_name()?;
        Some(folder.to_string_lossy().into_owned())
    };
    let stems = count(files.iter().map(|file| file.interface.clone()).collect());
    let folders = count(files.iter().filter_map(folder).collect());
    for file in files {
        file.name = match folder(file) {
            _ if stems[&file.interface] == 1 => file.interface.clone(),
            Some(folder) if folders[&folder] == 1 && !stems.contains_key(&folder) => folder,
            Some(folder) => format!("{folder}/{}", file.interface),
            None => file.path.display().to_string(),
        };
    }
}

impl File {
    fn of(path: PathBuf, index: usize, bytes: Zeroizing<Vec<u8>>) -> File {
        let shown_name = path.display().to_string();
        let stem = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let interface = stem.strip_suffix(".conf").unwrap_or(&stem).to_owned();
        let mut file = File {
            path,
            name: interface.clone(),
            interface,
            source: Arc::new(NamedSource::new(&shown_name, String::new())),
            config: None,
            plan: Vec::new(),
            findings: Vec::new(),
        };
        match std::str::from_utf8(&bytes) {
            _ if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) => {
                let message = "the file is not UTF-8 text, but UTF-16";
                let finding = Finding::new(Severity::Error, Rule::Syntax, message);
                let help = "save it as UTF-8, without a byte order mark";
                let finding = finding.at(index, Span::new(0.into(), 0), "in this file").help(help);
                file.findings.push(finding);
            }
            Ok(text) => {
                match config::parse(&shown_name, text) {
                    Ok(config) => {
                        file.source = Arc::clone(config.source());
                        file.config = Some(config);
                    }
                    Err(errors) => {
                        let source = NamedSource::new(&shown_name, config::shown(text));
                        file.source = Arc::new(source);
                        let problems = errors.problems().iter();
                        let kind = (Severity::Error, Rule::Syntax);
                        file.findings
                            .extend(problems.map(|problem| of_problem(problem, kind, index)));
                    }
                }
                file.findings.extend(format(text, index));
            }
            Err(error) => {
                let mut text = String::from_utf8_lossy(&bytes).into_owned();
                file.source = Arc::new(NamedSource::new(&shown_name, config::shown(&text)));
                text.zeroize();
                // Up to there nothing was replaced.
                let at = error.valid_up_to();
                let message = "the file is not UTF-8 text";
                let finding = Finding::new(Severity::Error, Rule::Syntax, message);
                let label = format!("the byte {:#04x} is no part of it", bytes[at]);
                let len = char::REPLACEMENT_CHARACTER.len_utf8();
                let help = "save the file as UTF-8; in Latin-1 even a comment may have such bytes";
                file.findings.push(finding.at(index, Span::new(at.into(), len), label).help(help));
            }
        }
        file
    }

    /// Whether `up` takes the file, as far as these findings tell.
    pub fn is_good(&self, findings: &[Finding]) -> bool {
        let refuses = |finding: &Finding| {
            finding.severity == Severity::Error || finding.rule == Rule::Unsupported
        };
        self.config.is_some() && !findings.iter().any(refuses)
    }
}

/// What the file asks for and this version cannot do.
pub fn unsupported(config: &Config, index: usize) -> Vec<Finding> {
    let kind = (Severity::Warning, Rule::Unsupported);
    let problems = config.unsupported();
    let findings = problems.iter().map(|problem| {
        let mut finding = of_problem(problem, kind, index);
        finding.message += ": `up` refuses the file";
        finding
    });
    findings.collect()
}

fn of_problem(problem: &Problem, (severity, rule): (Severity, Rule), index: usize) -> Finding {
    let mut finding = Finding::new(severity, rule, problem.to_string());
    for label in problem.labels().into_iter().flatten() {
        finding = finding.at(index, *label.inner(), label.label().unwrap_or_default());
    }
    match problem.help() {
        Some(help) => finding.help(help.to_string()),
        None => finding,
    }
}

/// What we read and others do not.
fn format(text: &str, index: usize) -> Option<Finding> {
    let mark = text.starts_with('\u{feff}').then_some('\u{feff}')?;
    let message = "the file begins with a byte order mark: we read it, wg(8) does not";
    let finding = Finding::new(Severity::Note, Rule::FileFormat, message);
    let finding = finding.at(index, Span::new(0.into(), mark.len_utf8()), "it stands before this");
    Some(finding.help("save the file as UTF-8 without that mark"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(paths: &[&str]) -> Vec<String> {
        let file = |path: &&str| File::of(path.into(), 0, Zeroizing::new(Vec::new()));
        let mut files: Vec<File> = paths.iter().map(file).collect();
        name(&mut files);
        files.into_iter().map(|file| file.name).collect()
    }

    #[test]
    fn ends_are_called_by_what_tells_them_apart() {
        assert_eq!(names(&["a/server.conf", "a/laptop.conf"]), ["server", "laptop"]);
        assert_eq!(names(&["x/server/wg0.conf", "x/laptop/wg0.conf"]), ["server", "laptop"]);
        assert_eq!(names(&["x/a/wg0.conf", "y/a/wg0.conf", "a/b.conf"]), ["a/wg0", "a/wg0", "b"]);
        assert_eq!(names(&["wg0", "wg0.conf"]), ["wg0", "wg0.conf"]);
    }

    #[test]
    fn bytes_that_are_no_text_have_a_place() {
        let file = |bytes: &[u8]| File::of("x.conf".into(), 0, Zeroizing::new(bytes.to_vec()));
        let latin = file(b"[Interface]\n# Caf\xe9\n");
        assert!(latin.config.is_none());
        let [finding] = &latin.findings[..] else { panic!("{:?}", latin.findings) };
        assert_eq!(finding.places[0].span, Span::new(17.into(), 3));
        assert!(finding.places[0].label.contains("0xe9"), "{finding:?}");
        let utf16 = file(b"\xff\xfe[\0I\0");
        assert!(utf16.findings[0].message.contains("UTF-16"));
    }

    #[test]
    fn what_is_not_there_is_named_all_of_it() {
        let words = ["/no/such.conf".to_owned(), "/no/other.conf".to_owned()];
        let (code, line) = read(&words, |_| false).err().unwrap().into_line();
        assert_eq!(
            (code, line.as_str()),
            (
                5,
                "there is no /no/such.conf; there is no /no/other.conf; `tidegate init` writes config \
                 files"
            )
        );
    }
}
