//! A run that never was, and the reports that are drawn of it.

use std::{env, fs, path::Path};

/// The run: two modes of ours, three rivals and the baseline, three rounds; with failures, texts that are
/// hostile to both formats, and rows of which nobody measured anything.
pub const RAW: &str = include_str!("golden/raw.json");

/// Compares with a file beside the run; with `TIDEGATE_GOLDEN=write` writes it instead, to be looked at.
pub fn compare(name: &str, drawn: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bench/golden").join(name);
    if env::var("TIDEGATE_GOLDEN").as_deref() == Ok("write") {
        return fs::write(path, drawn).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap();
    let differs = expected.lines().zip(drawn.lines()).position(|(one, other)| one != other);
    let line = differs.unwrap_or_else(|| expected.lines().count().min(drawn.lines().count()));
    assert!(
        expected == drawn,
        "{} differs from line {} on; expected {:?}, drawn {:?}",
        path.display(),
        line + 1,
        expected.lines().nth(line),
        drawn.lines().nth(line)
    );
}
