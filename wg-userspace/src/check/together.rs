//! Findings about files that are meant to meet.

use super::{Finding, Subject};

/// What is worth knowing about `subjects` as ends of the same tunnels.
pub fn together(subjects: &[Subject<'_>]) -> Vec<Finding> {
    let _ = subjects;
    Vec::new()
}
