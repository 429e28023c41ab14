//! What SECURITY.md claims is shown by tests: every file and every test that its tables name exists.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};

use crate::workspace::root;

/// Where a file of the tables may lie.
const FOLDERS: [&str; 4] = ["wg-userspace/src", "wg-userspace", "wg-common/src", "."];

/// Checks the last column of every table with the heading `shown by`: names of files, each followed by
/// names of tests in it, all in backquotes; and that the files of the column before exist.
///
/// # Errors
/// If something named does not exist: everything is listed.
pub fn check() -> Result<()> {
    let path = root().join("SECURITY.md");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let (test_count, missing) = look(&text, |file| {
        let path = FOLDERS.iter().map(|folder| root().join(folder).join(file));
        path.into_iter().find(|path: &PathBuf| path.is_file()).map(fs::read_to_string)?.ok()
    });
    ensure!(missing.is_empty(), "SECURITY.md names what is not there:\n{}", missing.join("\n"));
    ensure!(test_count > 0, "SECURITY.md has no table of tests");
    println!("claims: {test_count} tests are there");
    Ok(())
}

/// The number of tests named, and what is not there.
fn look(text: &str, read: impl Fn(&str) -> Option<String>) -> (usize, Vec<String>) {
    let (mut count, mut missing) = (0, Vec::new());
    let mut in_table = false;
    for line in text.lines() {
        let cells: Vec<&str> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
        if !line.starts_with('|') {
            in_table = false;
        } else if cells.last() == Some(&"shown by") {
            in_table = true;
        } else if in_table && let [.., code, tests] = cells[..] {
            for file in words(code).filter(|word| word.ends_with(".rs")) {
                if read(file).is_none() {
                    missing.push(format!("{file}: no such file"));
                }
            }
            let mut source = None;
            for word in words(tests) {
                if word.ends_with(".rs") {
                    source = read(word).map(|text| (word, text));
                    if source.is_none() {
                        missing.push(format!("{word}: no such file"));
                    }
                } else if let Some((file, text)) = &source {
                    count += 1;
                    if !has_test(text, word) {
                        missing.push(format!("{file}: no test `{word}`"));
                    }
                }
            }
        }
    }
    (count, missing)
}

/// The words in backquotes.
fn words(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// Whether there is a test of this name: a function behind `#[test]`, or a name that a macro gets.
fn has_test(source: &str, name: &str) -> bool {
    let function = format!("fn {name}(");
    let is_test = |at: usize| {
        let before = source[..at].trim_end();
        before.ends_with(']') && before.lines().rev().take(3).any(|line| line.trim() == "#[test]")
    };
    let is_word = |line: &str| line.trim().trim_end_matches(',').split(": ").last() == Some(name);
    source.match_indices(&function).any(|(at, _)| is_test(at))
        || source.contains("macro_rules! tests") && source.lines().any(is_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_security_md_names_is_there() {
        check().unwrap();
    }

    #[test]
    fn what_is_not_there_is_named() {
        let source =
            "#[test]\nfn one() {}\n\n    #[test]\n    #[ignore]\n    fn two(x: u8) {}\nfn no() {}";
        let read = |file: &str| (file == "a.rs").then(|| source.to_owned());
        let table = "
| rule | code | shown by |
| --- | --- | --- |
| x | `a.rs` | `a.rs` `one`, `two` |
| y | `b.rs`, a `word` | `a.rs` `no` `three`; `c.rs` `four` |

| another | table |
| `d.rs` | `d.rs` |
";
        let (count, missing) = look(table, read);
        assert_eq!(count, 4);
        assert_eq!(
            missing,
            [
                "b.rs: no such file",
                "a.rs: no test `no`",
                "a.rs: no test `three`",
                "c.rs: no such file"
            ]
        );
    }
}
