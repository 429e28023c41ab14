//! What was found, for programs: one JSON object, a [`Report`].

use std::borrow::Cow;

use anyhow::Context;
use serde::Serialize;

use super::{Failure, Outcome, files::File};
use crate::check::{Place, Rule, Severity};

/// All that `tidegate check --json` prints. New fields may come; those that are here stay.
#[derive(Serialize)]
struct Report<'a> {
    /// The files, in the order in which they were named.
    files: Vec<FileReport<'a>>,
    /// What was found: that of each file in its order, and then what shows of files together.
    findings: Vec<FindingReport<'a>>,
    /// How much was found.
    counts: Counts,
}

#[derive(Serialize)]
struct FileReport<'a> {
    /// The path.
    path: Cow<'a, str>,
    /// What findings call this end.
    name: &'a str,
    /// Whether it can be read as a `wg0.conf`. If not, it was not compared with the others.
    is_readable: bool,
    /// What `tidegate up` would do, a command for each step; empty if it would refuse the file.
    plan: &'a [String],
}

#[derive(Serialize)]
struct FindingReport<'a> {
    /// `error`, `warning` or `note`.
    severity: Severity,
    /// A word for the rule that found it, such as `allowed-ips-same`.
    rule: Rule,
    /// A sentence that says what is wrong.
    message: &'a str,
    /// What to do about it, or null.
    help: Option<&'a str>,
    /// What shows it, at least one place; the first is the one to change.
    places: Vec<PlaceReport<'a>>,
}

#[derive(Serialize)]
struct PlaceReport<'a> {
    /// Path of the file, as in `files`.
    file: Cow<'a, str>,
    /// Counted from 1.
    line: usize,
    /// In characters, counted from 1.
    column: usize,
    /// In characters, to the end of the line at most.
    len: usize,
    /// What is to be seen there.
    label: &'a str,
}

#[derive(Serialize)]
struct Counts {
    files: usize,
    errors: usize,
    warnings: usize,
    notes: usize,
}

/// The report, with a line end.
pub fn shown(outcome: &Outcome) -> Result<String, Failure> {
    let lines: Vec<Lines<'_>> = outcome.files.iter().map(Lines::of).collect();
    let findings = outcome.findings.iter().map(|finding| FindingReport {
        severity: finding.severity,
        rule: finding.rule,
        message: &finding.message,
        help: finding.help.as_deref(),
        places: finding.places.iter().map(|place| lines[place.file].place(place)).collect(),
    });
    let files = outcome.files.iter().map(|file| FileReport {
        path: file.path.to_string_lossy(),
        name: &file.name,
        is_readable: file.config.is_some(),
        plan: &file.plan,
    });
    let report = Report {
        files: files.collect(),
        findings: findings.collect(),
        counts: Counts {
            files: outcome.files.len(),
            errors: outcome.count(Severity::Error),
            warnings: outcome.count(Severity::Warning),
            notes: outcome.count(Severity::Note),
        },
    };
    let json = serde_json::to_string_pretty(&report).context("writing JSON")?;
    Ok(json + "\n")
}

/// Where the lines of a file begin.
struct Lines<'a> {
    file: &'a File,
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    fn of(file: &'a File) -> Self {
        let text = file.source.inner();
        let ends = text.bytes().enumerate().filter(|&(_, byte)| byte == b'\n');
        Self { file, text, starts: [0].into_iter().chain(ends.map(|(at, _)| at + 1)).collect() }
    }

    fn place(&self, place: &'a Place) -> PlaceReport<'a> {
        let start = place.span.offset().min(self.text.len());
        let line = self.starts.partition_point(|&at| at <= start);
        let before = &self.text[self.starts[line - 1]..start];
        let end = (start + place.span.len()).min(self.text.len());
        let shown = self.text[start..end].split('\n').next().unwrap_or_default();
        PlaceReport {
            file: self.file.path.to_string_lossy(),
            line,
            column: before.chars().count() + 1,
            len: shown.chars().count(),
            label: &place.label,
        }
    }
}
