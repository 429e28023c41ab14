//! `cargo xtask layers`: the rules between the daemon's rooms, as ARCHITECTURE.md states them.
//!
//! Reads the table of rooms there and every source file of `wg-userspace`, and finds paths that
//! lead into a room which the table does not allow, impure words in pure rooms, and `unsafe`
//! outside the rooms that may have it. Comments, strings and items behind `#[cfg(test)]` do not
//! count for paths.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use crate::workspace::root;

/// The heading row of the table.
const HEADING: [&str; 3] = ["room", "what lives there", "may use"];
/// The row after which pure rooms stand, until the next row of its kind.
const PURE: &str = "**pure**";
/// Words that only impure code has a use for. Time and chance are arguments of pure rooms.
const IMPURE: &[&str] = &["Instant", "SystemTime", "File", "getrandom", "libc", "rustix", "tokio"];
/// Rooms that may contain `unsafe`: they share memory with the kernel, or call it.
const UNSAFE_ROOMS: &[&str] = &["sys", "xsk"];
/// Folders of `aead` that hold a vector back end, and so may contain `unsafe`.
const AEAD_VECTOR: &[&str] = &["avx512"];
/// The files of `wg-common` that mark the map types as plain old data.
const COMMON_UNSAFE: [&str; 2] = ["map.rs", "nat/map.rs"];

/// Checks the workspace.
///
/// # Errors
/// If a rule is broken: every place is named.
pub fn check() -> Result<()> {
    let path = root().join("ARCHITECTURE.md");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let rooms = Rooms::parse(&text).context("the table of rooms in ARCHITECTURE.md")?;
    let mut broken = Vec::new();
    let source = root().join("wg-userspace/src");
    for path in rust_files(&source)? {
        let file = path.strip_prefix(&source).expect("it was found below");
        broken.extend(rooms.check(file, &fs::read_to_string(&path)?));
    }
    let common = root().join("wg-common/src");
    for path in rust_files(&common)? {
        let file = path.strip_prefix(&common).expect("it was found below");
        if !COMMON_UNSAFE.iter().any(|name| file == Path::new(name)) {
            broken.extend(unsafe_lines(&path, &tokens(&fs::read_to_string(&path)?)));
        }
    }
    ensure!(
        broken.is_empty(),
        "{} broken rules between rooms:\n{}",
        broken.len(),
        broken.join("\n")
    );
    println!("layers: {} rooms keep their rules", rooms.may_use.len());
    Ok(())
}

fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("in {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// What the table says.
struct Rooms {
    /// The rooms that a room may use; `None` for all.
    may_use: BTreeMap<String, Option<BTreeSet<String>>>,
    pure: BTreeSet<String>,
}

impl Rooms {
    fn parse(text: &str) -> Result<Rooms> {
        let mut rooms = Rooms { may_use: BTreeMap::new(), pure: BTreeSet::new() };
        let mut rows = text
            .lines()
            .skip_while(|line| cells(line) != HEADING)
            .skip(2)
            .take_while(|line| line.starts_with('|'));
        let mut in_pure = false;
        for row in &mut rows {
            let cells = cells(row);
            let [room, _, may_use] = cells[..] else { bail!("three cells, not `{row}`") };
            if room.starts_with("**") {
                in_pure = room == PURE;
                continue;
            }
            let uses = match may_use.split(['(', ';']).next().unwrap_or_default().trim() {
                "all" => None,
                names => Some(code_words(names)),
            };
            for name in code_words(room) {
                if in_pure {
                    rooms.pure.insert(name.clone());
                }
                rooms.may_use.insert(name, uses.clone());
            }
        }
        ensure!(!rooms.may_use.is_empty(), "no table with the heading {HEADING:?}");
        for used in rooms.may_use.values().flatten().flatten() {
            ensure!(rooms.may_use.contains_key(used), "`{used}` is used but is no room");
        }
        Ok(rooms)
    }

    /// The broken rules of one file, by its path below `src`.
    fn check(&self, file: &Path, text: &str) -> Vec<String> {
        let mut parts = file.iter().map(|part| part.to_string_lossy());
        let first = parts.next().unwrap_or_default();
        let room = first.trim_end_matches(".rs").to_owned();
        if room == "lib" {
            return Vec::new();
        }
        // `main.rs` stands in the table under its name.
        let Some(may_use) = self.may_use.get(&room) else {
            return vec![format!("{}: `{room}` is no room of the table", file.display())];
        };
        let all = tokens(text);
        let mut broken = Vec::new();
        if !may_have_unsafe(&room, file) {
            broken.extend(unsafe_lines(file, &all));
        }
        if is_test_file(file) {
            return broken;
        }
        let tokens = without_tests(&all);
        if self.pure.contains(&room) {
            for token in tokens.iter().filter(|token| IMPURE.contains(&token.text.as_str())) {
                broken.push(format!(
                    "{}:{}: `{}` in the pure room `{room}`",
                    file.display(),
                    token.line,
                    token.text
                ));
            }
        }
        // How many `super` lead from this file's module to the root.
        let depth = match file.iter().count() {
            1 => 1,
            parts if file.ends_with("mod.rs") => parts - 1,
            parts => parts,
        };
        for (target, line) in paths_from_root(&tokens, depth) {
            let at = format!("{}:{line}", file.display());
            if !self.may_use.contains_key(&target) {
                broken.push(format!("{at}: `{target}` is no room of the table"));
            } else if target != room
                && may_use.as_ref().is_some_and(|allowed| !allowed.contains(&target))
            {
                broken.push(format!("{at}: `{room}` must not use `{target}`"));
            }
        }
        broken
    }
}

fn cells(row: &str) -> Vec<&str> {
    let row = row.trim().trim_start_matches('|').trim_end_matches('|');
    row.split('|').map(str::trim).collect()
}

/// The words in backquotes, without a folder's slash or a file's extension.
fn code_words(text: &str) -> BTreeSet<String> {
    let words = text.split('`').skip(1).step_by(2);
    words.map(|word| word.trim_end_matches('/').trim_end_matches(".rs").to_owned()).collect()
}

fn may_have_unsafe(room: &str, file: &Path) -> bool {
    UNSAFE_ROOMS.contains(&room)
        || room == "aead" && file.iter().any(|part| AEAD_VECTOR.iter().any(|name| part == *name))
}

/// A module that is declared behind `#[cfg(test)]` by its folder's `mod.rs`.
fn is_test_file(file: &Path) -> bool {
    let named = file.file_stem().is_some_and(|stem| stem == "tests" || stem == "testing");
    named || file.iter().any(|part| part == "tests")
}

fn unsafe_lines(file: &Path, tokens: &[Token]) -> Vec<String> {
    let lines = tokens.iter().filter(|token| token.text == "unsafe").map(|token| token.line);
    lines.map(|line| format!("{}:{line}: `unsafe` does not belong here", file.display())).collect()
}

/// A word or a punctuation character of Rust; `::` is one.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Token {
    text: String,
    line: usize,
}

/// Words and punctuation, without comments, strings, characters and lifetimes.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let (mut at, mut line) = (0, 1);
    let starts = |at: usize, what: &str| {
        what.chars().enumerate().all(|(i, c)| chars.get(at + i) == Some(&c))
    };
    while let Some(&c) = chars.get(at) {
        let start = at;
        if starts(at, "//") {
            at += chars[at..].iter().take_while(|&&c| c != '\n').count();
        } else if starts(at, "/*") {
            at = end_of_comment(&chars, at);
        } else if let Some(end) = end_of_string(&chars, at) {
            at = end;
        } else if c == '\'' {
            at = end_of_char_or_lifetime(&chars, at);
        } else if c.is_alphanumeric() || c == '_' {
            at += chars[at..].iter().take_while(|&&c| c.is_alphanumeric() || c == '_').count();
            tokens.push(Token { text: chars[start..at].iter().collect(), line });
        } else {
            at += if starts(at, "::") { 2 } else { 1 };
            if !c.is_whitespace() {
                tokens.push(Token { text: chars[start..at].iter().collect(), line });
            }
        }
        line += chars[start..at.min(chars.len())].iter().filter(|&&c| c == '\n').count();
    }
    tokens
}

fn end_of_comment(chars: &[char], start: usize) -> usize {
    let (mut at, mut open) = (start, 0);
    while at < chars.len() {
        match chars[at..] {
            ['/', '*', ..] => (at, open) = (at + 2, open + 1),
            ['*', '/', ..] => (at, open) = (at + 2, open - 1),
            _ => at += 1,
        }
        if open == 0 {
            break;
        }
    }
    at
}

/// The end of a string literal of any kind that starts here.
fn end_of_string(chars: &[char], start: usize) -> Option<usize> {
    let word = |at: usize| chars.get(at).is_some_and(|c| c.is_alphanumeric() || *c == '_');
    if start > 0 && word(start - 1) {
        return None;
    }
    let prefix = chars[start..].iter().take_while(|c| matches!(c, 'b' | 'c' | 'r')).count();
    let is_raw = chars[start..start + prefix].contains(&'r');
    let mut at = start + prefix;
    let hashes = chars[at..].iter().take_while(|&&c| c == '#').count();
    if prefix > 2 || hashes > 0 && !is_raw {
        return None;
    }
    at += hashes;
    if chars.get(at) != Some(&'"') {
        return None;
    }
    at += 1;
    while at < chars.len() {
        match chars[at] {
            '\\' if !is_raw => at += 2,
            '"' if chars[at + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes => {
                return Some(at + 1 + hashes);
            }
            _ => at += 1,
        }
    }
    Some(chars.len())
}

fn end_of_char_or_lifetime(chars: &[char], start: usize) -> usize {
    match chars[start + 1..] {
        ['\\', _, ..] => {
            let rest = chars[start + 3..].iter().take_while(|&&c| c != '\'').count();
            start + 3 + rest + 1
        }
        [_, '\'', ..] => start + 3,
        // A lifetime; its name is a word of no interest.
        _ => start + 1,
    }
}

/// The tokens without the items that stand behind `#[cfg(test)]`.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    const TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let is_test = TEST
            .iter()
            .enumerate()
            .all(|(i, &text)| tokens.get(at + i).is_some_and(|token| token.text == text));
        if !is_test {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        // To the end of the item: a `;` or a closed block outside of everything else.
        at += TEST.len();
        let mut open = 0;
        while let Some(token) = tokens.get(at) {
            at += 1;
            match token.text.as_str() {
                "{" | "(" | "[" => open += 1,
                ")" | "]" => open -= 1,
                "}" => {
                    open -= 1;
                    if open == 0 {
                        break;
                    }
                }
                ";" if open == 0 => break,
                _ => {}
            }
        }
    }
    kept
}

/// The rooms to which paths of a file lead, with their lines. `depth` is the number of `super`
/// that lead from the file's module to the root.
fn paths_from_root(tokens: &[Token], depth: usize) -> Vec<(String, usize)> {
    let text = |at: usize| tokens.get(at).map_or("", |token| token.text.as_str());
    let mut found = Vec::new();
    // Blocks that are open, and which of them are modules.
    let mut blocks = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        match text(at) {
            "{" => blocks.push(at >= 2 && text(at - 2) == "mod"),
            "}" => drop(blocks.pop()),
            _ => {}
        }
        let supers = (0..)
            .take_while(|i| text(at + 2 * i) == "super" && text(at + 2 * i + 1) == "::")
            .count();
        let continues = at > 0 && text(at - 1) == "::";
        let modules = blocks.iter().filter(|&&is_module| is_module).count();
        let root_len = match text(at) {
            _ if continues => 0,
            "crate" | "wg_userspace" if text(at + 1) == "::" => 2,
            "super" if supers > 0 && supers == depth + modules => 2 * supers,
            _ => 0,
        };
        if root_len > 0 {
            found.extend(first_words(tokens, at + root_len));
        }
        at += root_len.max(1);
        // Skipped tokens hold no braces: they are words and `::`.
    }
    found
}

/// The first word of a path's rest, or those of a group in braces.
fn first_words(tokens: &[Token], at: usize) -> Vec<(String, usize)> {
    let Some(first) = tokens.get(at) else { return Vec::new() };
    if first.text != "{" {
        return vec![(first.text.clone(), first.line)];
    }
    let mut words = Vec::new();
    let (mut open, mut expected) = (0, false);
    for token in &tokens[at..] {
        match token.text.as_str() {
            "{" => open += 1,
            "}" => open -= 1,
            "," => {}
            _ if expected => words.push((token.text.clone(), token.line)),
            _ => {}
        }
        if open == 0 {
            break;
        }
        expected = open == 1 && matches!(token.text.as_str(), "{" | ",");
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "
text
| room | what lives there | may use |
| --- | --- | --- |
| **pure** | *no clock* | |
| `key.rs` | keys | – |
| `noise/` | handshake | `key` |
| **edges** | | |
| `sys/` | clock | – |
| `xsk/` | rings | `sys` |
| **control** | | |
| `daemon/` | everything | all |
| `cli/`, `main.rs` | arguments | `daemon`, `key` |

after
";

    fn broken(file: &str, text: &str) -> Vec<String> {
        Rooms::parse(TABLE).unwrap().check(Path::new(file), text)
    }

    #[test]
    fn an_arrow_that_the_table_does_not_name_is_found() {
        assert_eq!(
            broken("noise/mod.rs", "use crate::key::PublicKey;\n\nuse crate::sys::clock;\n"),
            ["noise/mod.rs:3: `noise` must not use `sys`"]
        );
        assert_eq!(broken("noise/cookie.rs", "fn f() { crate::daemon::run() }").len(), 1);
        assert_eq!(broken("key.rs", "pub(crate) fn f(k: crate::noise::Identity) {}").len(), 1);
    }

    #[test]
    fn groups_and_super_are_followed() {
        let group = "use crate::{\n    key::{PublicKey, sys},\n    xsk,\n    sys::clock,\n};";
        assert_eq!(
            broken("noise/mod.rs", group),
            [
                "noise/mod.rs:3: `noise` must not use `xsk`",
                "noise/mod.rs:4: `noise` must not use `sys`"
            ]
        );
        assert_eq!(broken("noise/mod.rs", "use super::sys::clock;").len(), 1);
        assert_eq!(broken("noise/cookie.rs", "use super::super::sys::clock;").len(), 1);
        assert_eq!(broken("noise/mod.rs", "mod a { use super::super::xsk; }").len(), 1);
        assert!(broken("noise/cookie.rs", "use super::sys;").is_empty());
        assert!(broken("noise/mod.rs", "mod a { use super::xsk; }").is_empty());
    }

    #[test]
    fn allowed_arrows_tests_and_comments_are_not_found() {
        for (file, text) in [
            ("daemon/mod.rs", "use crate::{sys, xsk, noise};"),
            ("cli/run.rs", "use crate::daemon;"),
            ("main.rs", "fn main() { wg_userspace::daemon::run(); }"),
            ("noise/mod.rs", "#[cfg(test)]\nmod tests { use crate::sys::clock; fn f() {} }"),
            ("noise/mod.rs", "#[cfg(test)]\nuse crate::sys;\nuse crate::key;"),
            ("noise/tests.rs", "use crate::sys::clock;"),
            ("noise/mod.rs", "/// [`crate::sys`] /* */\n// crate::sys\n/* crate::sys::x */"),
            ("noise/mod.rs", "const A: &str = \"crate::sys\"; const B: &str = r#\"crate::sys\"#;"),
            (
                "noise/mod.rs",
                "fn f<'a>(c: char) -> &'a str { if c == '\"' { \"\" } else { \"\" } }",
            ),
        ] {
            assert_eq!(broken(file, text), [""; 0], "{text}");
        }
        let after = "#[cfg(test)]\nmod tests { fn f() {} }\nuse crate::sys;";
        assert_eq!(broken("noise/mod.rs", after).len(), 1);
    }

    #[test]
    fn impure_words_and_unsafe_are_found() {
        assert_eq!(
            broken("noise/mod.rs", "use std::time::Instant;"),
            ["noise/mod.rs:1: `Instant` in the pure room `noise`"]
        );
        assert!(broken("sys/clock.rs", "use std::time::Instant; unsafe { f() }").is_empty());
        assert_eq!(
            broken("daemon/mod.rs", "fn f() {\n    unsafe { g() }\n}"),
            ["daemon/mod.rs:2: `unsafe` does not belong here"]
        );
        assert!(broken("xsk/mod.rs", "unsafe impl Send for X {}").is_empty());
    }

    #[test]
    fn a_room_that_is_not_in_the_table_is_found() {
        assert_eq!(broken("misc/mod.rs", ""), ["misc/mod.rs: `misc` is no room of the table"]);
        assert_eq!(
            broken("cli/mod.rs", "use crate::helpers;"),
            ["cli/mod.rs:1: `helpers` is no room of the table"]
        );
    }

    #[test]
    fn a_table_that_names_an_unknown_room_is_refused() {
        assert!(Rooms::parse(&TABLE.replace("`sys` |", "`system` |")).is_err());
        assert!(Rooms::parse("no table").is_err());
    }
}
