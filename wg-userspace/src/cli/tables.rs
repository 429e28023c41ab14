//! Names of routing tables, as ip-route(8) knows them.

use std::{fs, path::PathBuf};

use super::{Code, Failure};
use crate::host::MAIN_TABLE;

/// Folders with `rt_tables`; the first goes before the second.
const FOLDERS: [&str; 2] = ["/etc/iproute2", "/usr/share/iproute2"];

/// The number of a table, which is given as one or as a name.
///
/// # Errors
/// If nobody has given the name a number.
pub fn number_of(table: &str) -> Result<u32, Failure> {
    if let Some(number) = number(table).or_else(|| known(table)) {
        return Ok(number);
    }
    let in_files = FOLDERS
        .iter()
        .flat_map(|folder| files(folder))
        .find_map(|path| find(&fs::read_to_string(path).ok()?, table));
    in_files.ok_or_else(|| {
        let line = format_args!(
            "there is no routing table `{table}`; give it a number in {}/rt_tables, or write the number",
            FOLDERS[0]
        );
        Failure::new(Code::Config, line)
    })
}

/// Names that need no file.
fn known(table: &str) -> Option<u32> {
    match table {
        "default" => Some(253),
        "main" => Some(MAIN_TABLE),
        "local" => Some(255),
        _ => None,
    }
}

/// `rt_tables`, and then the files of `rt_tables.d`.
fn files(folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(format!("{folder}/rt_tables.d")).into_iter().flatten();
    let mut more: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "conf"))
        .collect();
    more.sort();
    let mut files = vec![PathBuf::from(format!("{folder}/rt_tables"))];
    files.append(&mut more);
    files
}

fn find(rt_tables: &str, table: &str) -> Option<u32> {
    rt_tables.lines().find_map(|line| {
        let mut words = line.split('#').next()?.split_ascii_whitespace();
        let number = number(words.next()?)?;
        (words.next() == Some(table)).then_some(number)
    })
}

/// A number as strtoul(3) reads one.
fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_numbers_or_names() {
        for (table, expected) in [("51820", 51820), ("0x10", 16), ("main", 254), ("local", 255)] {
            assert_eq!(number_of(table).unwrap_or_else(|_| panic!("{table}")), expected);
        }
        let (code, line) = number_of("no-such-table").err().unwrap().into_line();
        assert!(code == 3 && line.contains("no routing table `no-such-table`"), "{line}");
    }

    #[test]
    fn names_stand_behind_their_numbers() {
        let text = "#\n# reserved values\n255\tlocal\n 0x64  vpn # ours\n#200 off\n";
        assert_eq!(find(text, "vpn"), Some(100));
        assert_eq!(find(text, "off"), None);
        assert_eq!(find(text, "ours"), None);
    }
}
