//! What a run of the benchmark leaves: `raw.json`, with every sample, from which reports are drawn.
//!
//! The file describes itself: the rows and columns that it speaks of are in it, so that a report can be
//! drawn from one that an older or a newer build has written.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    machine::Machine,
    noise::{Spin, Steal},
    rows::Row,
};

/// What [`Raw::format`] is in files of this build.
pub const FORMAT: u32 = 1;

/// A run of the benchmark.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Raw {
    /// Which meaning the fields have.
    pub format: u32,
    /// When it began: `2026-11-24T03:45:12Z`.
    pub date: String,
    /// The command line that repeats it.
    pub command: String,
    /// The commit that was built, with `-dirty` if there was more.
    pub commit: Option<String>,
    /// Where it ran.
    pub machine: Machine,
    /// How it was set up, as sentences for people.
    pub setup: Vec<String>,
    /// What was measured, in the order of the report.
    pub rows: Vec<Row>,
    /// Who took part, in the order of the report.
    pub columns: Vec<Column>,
    /// How the machine was before the first round.
    pub before: Spin,
    /// Each implementation had its turn once in each of them.
    pub rounds: Vec<Round>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// Who takes part.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Column {
    /// The word on the command line.
    pub name: String,
    /// The heading.
    pub title: String,
    /// Whose it is.
    pub kind: Kind,
    /// The version, if it has one.
    pub version: Option<String>,
    /// How the gateway is started; empty if there is none.
    pub command: Vec<String>,
}

impl Column {
    /// The title and the version.
    pub fn heading(&self) -> String {
        match &self.version {
            Some(version) => format!("{} {version}", self.title),
            None => self.title.clone(),
        }
    }
}

/// Whose an implementation is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Tidegate, in some mode.
    Ours,
    /// Somebody else's.
    Rival,
    /// Plain forwarding, without a tunnel.
    Baseline,
}

/// A turn of each implementation.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Round {
    /// In the order in which they had it.
    pub turns: Vec<Turn>,
}

/// An implementation's turn.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Turn {
    /// The name of its column.
    pub column: String,
    /// How the machine was right before.
    pub before: Spin,
    /// What was taken from the machine meanwhile.
    pub steal: Steal,
    /// How long all of it took.
    pub seconds: f64,
    /// By the id of the row.
    pub samples: BTreeMap<String, Sample>,
    /// What else the tools said, by the name of the measurement.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, serde_json::Value>,
}

/// What one measurement gave for one row.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sample {
    /// A number, in the row's unit.
    Value(f64),
    /// It went wrong; how.
    Failed(String),
    /// It was not tried; why.
    NotMeasured(String),
}

impl Raw {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, or is of another format.
    pub fn read(path: &Path) -> Result<Raw> {
        let text =
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Raw::parse(&text).with_context(|| format!("reading {}", path.display()))
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// If it is none, or of another format.
    pub fn parse(text: &str) -> Result<Raw> {
        /// What tells formats apart, whatever else there is.
        #[derive(Deserialize)]
        struct Header {
            format: u32,
        }
        let Header { format } = serde_json::from_str(text)?;
        ensure!(format == FORMAT, "its format is {format}, this build reads {FORMAT}");
        Ok(serde_json::from_str(text)?)
    }

    /// The text of a file.
    ///
    /// # Errors
    /// If a number is none; samples are checked when they are taken.
    pub fn text(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// What was measured for a row and a column, round by round.
    pub fn samples<'a>(
        &'a self,
        row: &'a str,
        column: &'a str,
    ) -> impl Iterator<Item = &'a Sample> {
        let turns = self.rounds.iter().flat_map(|round| &round.turns);
        turns.filter(move |turn| turn.column == column).filter_map(|turn| turn.samples.get(row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = include_str!("golden/raw.json");

    #[test]
    fn what_is_written_is_read_again() {
        let raw = Raw::parse(GOLDEN).unwrap();
        let again = Raw::parse(&raw.text().unwrap()).unwrap();
        assert_eq!(again, raw);
        // Nothing of the file is lost either.
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(value(&raw.text().unwrap()), value(GOLDEN));
    }

    #[test]
    fn another_format_is_refused_by_its_number() {
        let error = Raw::parse(r#"{"format": 99, "planets": 8}"#).unwrap_err();
        assert_eq!(error.to_string(), "its format is 99, this build reads 1");
        assert!(Raw::parse("[]").is_err());
        assert!(Raw::parse(&GOLDEN.replace("\"columns\"", "\"pillars\"")).is_err());
    }

    #[test]
    fn samples_are_found_round_by_round() {
        let raw = Raw::parse(GOLDEN).unwrap();
        let all: Vec<_> = raw.samples("tcp_up_1", "tidegate").collect();
        assert_eq!(all.len(), raw.rounds.len());
        assert_eq!(raw.samples("tcp_up_1", "nobody").count(), 0);
    }
}
