//! Medians, spreads, percentiles, and how far one is ahead of another.

use super::{
    raw::{Column, Kind, Raw, Sample},
    rows::{Better, Row},
};

/// Samples of one row and one column, summed up.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// How many there were.
    pub count: usize,
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Summary {
    /// Of some samples; none of no samples.
    pub fn of(samples: &[f64]) -> Option<Summary> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        };
        Some(Summary { count: sorted.len(), median, min, max })
    }
}

/// A cell of the report.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// Numbers, in those rounds in which there were some.
    Measured {
        /// Of the numbers.
        summary: Summary,
        /// In how many rounds it went wrong, and how at first.
        failed: Option<(usize, String)>,
    },
    /// It went wrong in all rounds; how in the first.
    Failed(String),
    /// It was not tried; why, if anybody said.
    NotMeasured(Option<String>),
}

impl Cell {
    /// Of a row and a column.
    pub fn of(raw: &Raw, row: &Row, column: &Column) -> Cell {
        let (mut values, mut failures, mut reasons) = (Vec::new(), Vec::new(), Vec::new());
        for sample in raw.samples(&row.id, &column.name) {
            match sample {
                Sample::Value(value) => values.push(*value),
                Sample::Failed(why) => failures.push(why),
                Sample::NotMeasured(why) => reasons.push(why),
            }
        }
        let first_failure = failures.first().map(|&why| why.clone());
        match (Summary::of(&values), first_failure) {
            (Some(summary), why) => {
                Cell::Measured { summary, failed: why.map(|why| (failures.len(), why)) }
            }
            (None, Some(why)) => Cell::Failed(why),
            (None, None) => Cell::NotMeasured(reasons.first().map(|&why| why.clone())),
        }
    }

    /// The median, if there is one.
    pub fn median(&self) -> Option<f64> {
        match self {
            Cell::Measured { summary, .. } => Some(summary.median),
            _ => None,
        }
    }
}

/// A row of the report with its cells.
#[derive(Clone, Debug, PartialEq)]
pub struct Line<'a> {
    /// What it is about.
    pub row: &'a Row,
    /// In the order of the columns.
    pub cells: Vec<Cell>,
    /// For each of our columns: its median by the best rival's.
    pub ratios: Vec<Option<f64>>,
    /// The columns with the best median, the baseline aside; the first if several have it.
    pub best: Option<usize>,
}

/// The rows of a run, summed up, with those of a plot together. A row of which nobody measured anything
/// stays, with the reasons.
pub fn lines(raw: &Raw) -> Vec<Line<'_>> {
    let mut lines: Vec<_> = raw.rows.iter().map(|row| line(raw, row)).collect();
    lines.sort_by_key(|line| line.row.plot);
    lines
}

fn line<'a>(raw: &'a Raw, row: &'a Row) -> Line<'a> {
    let cells: Vec<_> = raw.columns.iter().map(|column| Cell::of(raw, row, column)).collect();
    let best_of = |is_meant: &dyn Fn(Kind) -> bool| {
        let mut best: Option<(usize, f64)> = None;
        for (index, (column, cell)) in raw.columns.iter().zip(&cells).enumerate() {
            let Some(median) = cell.median().filter(|_| is_meant(column.kind)) else { continue };
            if best.is_none_or(|(_, so_far)| is_better(row.better, median, so_far)) {
                best = Some((index, median));
            }
        }
        best
    };
    let rival = best_of(&|kind| kind == Kind::Rival);
    let ratios = raw.columns.iter().zip(&cells).map(|(column, cell)| {
        let (ours, (_, theirs)) = (cell.median()?, rival?);
        (column.kind == Kind::Ours && theirs > 0.0).then_some(ours / theirs)
    });
    let ratios = ratios.collect();
    let best = best_of(&|kind| kind != Kind::Baseline).map(|(index, _)| index);
    Line { row, cells, ratios, best }
}

fn is_better(better: Better, one: f64, other: f64) -> bool {
    match better {
        Better::Higher => one > other,
        Better::Lower => one < other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        let summary = |samples: &[f64]| Summary::of(samples);
        assert_eq!(summary(&[]), None);
        let one = Summary { count: 1, median: 3.0, min: 3.0, max: 3.0 };
        assert_eq!(summary(&[3.0]), Some(one));
        let odd = Summary { count: 3, median: 2.0, min: 1.0, max: 90.0 };
        assert_eq!(summary(&[90.0, 1.0, 2.0]), Some(odd));
        let even = Summary { count: 4, median: 2.5, min: 1.0, max: 9.0 };
        assert_eq!(summary(&[9.0, 3.0, 1.0, 2.0]), Some(even));
    }

    fn golden() -> Raw {
        Raw::parse(include_str!("golden/raw.json")).unwrap()
    }

    fn with_samples(row: &str, samples: &[(&str, Sample)]) -> Raw {
        let mut raw = golden();
        raw.rounds.truncate(1);
        for turn in &mut raw.rounds[0].turns {
            turn.samples.clear();
            for (column, sample) in samples {
                if turn.column == *column {
                    turn.samples.insert(row.to_owned(), sample.clone());
                }
            }
        }
        raw
    }

    fn line_of<'a>(raw: &'a Raw, row: &str) -> Line<'a> {
        line(raw, raw.rows.iter().find(|known| known.id == row).unwrap())
    }

    #[test]
    fn ratios_are_to_the_best_rival_and_the_baseline_is_none() {
        let value = Sample::Value;
        let raw = with_samples(
            "tcp_up_1",
            &[
                ("tidegate", value(3.0)),
                ("wireguard-go", value(1.0)),
                ("gotatun", value(1.5)),
                ("none", value(20.0)),
            ],
        );
        let line = line_of(&raw, "tcp_up_1");
        let column = |name: &str| raw.columns.iter().position(|c| c.name == name).unwrap();
        assert_eq!(line.ratios[column("tidegate")], Some(2.0));
        assert_eq!(line.ratios.iter().flatten().count(), 1, "{line:?}");
        assert_eq!(line.best, Some(column("tidegate")));
        // Where less is better, the best rival is the one with the least.
        let samples =
            [("tidegate", value(3.0)), ("wireguard-go", value(2.0)), ("gotatun", value(4.0))];
        let raw = with_samples("tcp_up_1_core", &samples);
        let line = line_of(&raw, "tcp_up_1_core");
        assert_eq!(line.ratios[column("tidegate")], Some(1.5));
        assert_eq!(line.best, Some(column("wireguard-go")));
    }

    #[test]
    fn without_a_rival_or_a_number_there_is_no_ratio() {
        let raw = with_samples("tcp_up_1", &[("tidegate", Sample::Value(3.0))]);
        assert!(line_of(&raw, "tcp_up_1").ratios.iter().all(Option::is_none));
        let zero = [("tidegate", Sample::Value(3.0)), ("gotatun", Sample::Value(0.0))];
        let raw = with_samples("tcp_up_1", &zero);
        assert!(line_of(&raw, "tcp_up_1").ratios.iter().all(Option::is_none));
    }

    #[test]
    fn what_failed_now_and_then_still_has_numbers() {
        let mut raw = golden();
        raw.rounds.truncate(2);
        let samples = [Sample::Failed("it ended".to_owned()), Sample::Value(2.0)];
        for (round, sample) in raw.rounds.iter_mut().zip(samples) {
            for turn in &mut round.turns {
                turn.samples.insert("tcp_up_1".to_owned(), sample.clone());
            }
        }
        let cell = &line_of(&raw, "tcp_up_1").cells[0];
        let Cell::Measured { summary, failed } = cell else { panic!("{cell:?}") };
        assert_eq!((summary.count, summary.median), (1, 2.0));
        assert_eq!(failed, &Some((1, "it ended".to_owned())));
        let why = Sample::NotMeasured("no such tool".to_owned());
        let raw = with_samples("tcp_up_1", &[("tidegate", why)]);
        let cells = line_of(&raw, "tcp_up_1").cells;
        assert_eq!(cells[0], Cell::NotMeasured(Some("no such tool".to_owned())));
        assert_eq!(cells[1], Cell::NotMeasured(None));
    }
}
