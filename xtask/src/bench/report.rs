//! What both reports say: the texts of cells, their footnotes, and what was found about the machine.

use super::{
    noise::Noise,
    raw::{Kind, Raw},
    rows::Better,
    statistics::{Cell, Line, lines},
};

/// Why a cell is empty, or has fewer numbers than others; named by its number, from 1.
pub type Footnote = usize;

/// A cell as it is shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shown {
    /// The median, or a word in its place.
    pub text: String,
    /// By the best rival's, if it is ours.
    pub ratio: Option<String>,
    /// Least and greatest sample, and how many there were.
    pub spread: String,
    /// What is to be known of it.
    pub footnote: Option<Footnote>,
    /// Whether no implementation has a better median.
    pub is_best: bool,
}

/// A run, as it is told.
pub struct Report<'a> {
    /// The run.
    pub raw: &'a Raw,
    /// Its rows.
    pub lines: Vec<Line<'a>>,
    /// As `lines`, with a cell for each column.
    pub shown: Vec<Vec<Shown>>,
    /// By their numbers.
    pub footnotes: Vec<String>,
    /// How quiet the machine was.
    pub noise: Noise,
}

impl<'a> Report<'a> {
    /// Of a run.
    pub fn of(raw: &'a Raw) -> Report<'a> {
        let lines = lines(raw);
        let mut footnotes = Footnotes::default();
        let shown = lines.iter().map(|line| show(line, raw, &mut footnotes)).collect();
        Report { raw, lines, shown, footnotes: footnotes.texts, noise: Noise::of(raw) }
    }

    /// The columns' headings.
    pub fn headings(&self) -> Vec<String> {
        self.raw.columns.iter().map(super::raw::Column::heading).collect()
    }

    /// The lines with their cells, of which somebody has a number.
    pub fn measured(&self) -> impl Iterator<Item = (&Line<'a>, &Vec<Shown>)> {
        let lines = self.lines.iter().zip(&self.shown);
        lines.filter(|(line, _)| line.cells.iter().any(|cell| cell.median().is_some()))
    }

    /// The unit of a line, with the direction that is the better one.
    pub fn unit(&self, line: &Line<'_>) -> String {
        let arrow = match line.row.better {
            Better::Higher => "↑",
            Better::Lower => "↓",
        };
        format!("{} {arrow}", line.row.unit)
    }

    /// How to read the table.
    pub fn legend(&self) -> String {
        let mut text =
            "Medians of all rounds; ↑ more is better, ↓ less is better; the best of a row is bold."
                .to_owned();
        if self.raw.columns.iter().any(|column| column.kind == Kind::Rival) {
            text += " In parentheses: that median by the best rival's.";
        }
        text
    }

    /// What was done, a sentence each.
    pub fn method(&self) -> Vec<String> {
        let Raw { setup, columns, .. } = self.raw;
        let commands = columns.iter().filter(|column| !column.command.is_empty());
        let commands =
            commands.map(|column| format!("{}: `{}`", column.heading(), column.command.join(" ")));
        setup.iter().cloned().chain(commands).chain(self.limits()).collect()
    }

    /// Where figures say more of the sender than of the gateway.
    fn limits(&self) -> Option<String> {
        let mut limited: Vec<String> = Vec::new();
        for turn in self.raw.rounds.iter().flat_map(|round| &round.turns) {
            let column = self.raw.columns.iter().find(|column| column.name == turn.column);
            for (measurement, details) in &turn.details {
                let text =
                    format!("{} ({measurement})", column.map_or("?", |column| &column.title));
                if details["limited_by_sender"] == true && !limited.contains(&text) {
                    limited.push(text);
                }
            }
        }
        let who = limited.join(", ");
        (!limited.is_empty()).then(|| {
            format!("The sender, not the gateway, held the rate down in a round or more: {who}.")
        })
    }

    /// The machine, on one line.
    pub fn machine(&self) -> String {
        let machine = &self.raw.machine;
        let governor = machine.governor.as_ref();
        format!(
            "{}, {} {}{}, {}, Linux {}{}",
            machine.cpu,
            machine.core_count,
            if machine.core_count == 1 { "core" } else { "cores" },
            if machine.is_virtual { " of a virtual machine" } else { "" },
            machine.system,
            machine.kernel,
            governor.map_or_else(String::new, |governor| format!(", governor {governor}")),
        )
    }

    /// What was run, when, and of which commit.
    pub fn occasion(&self) -> String {
        let Raw { date, command, commit, .. } = self.raw;
        let commit =
            commit.as_ref().map_or_else(String::new, |commit| format!(", commit {commit}"));
        format!("`{command}`, {date}{commit}")
    }
}

/// Texts without repetition.
#[derive(Default)]
struct Footnotes {
    texts: Vec<String>,
}

impl Footnotes {
    fn add(&mut self, text: String) -> Footnote {
        let known = self.texts.iter().position(|known| *known == text);
        known.unwrap_or_else(|| {
            self.texts.push(text);
            self.texts.len() - 1
        }) + 1
    }
}

fn show(line: &Line<'_>, raw: &Raw, footnotes: &mut Footnotes) -> Vec<Shown> {
    let decimals = line.row.decimals;
    let cells = line.cells.iter().enumerate().map(|(index, cell)| match cell {
        Cell::Measured { summary, failed } => Shown {
            text: number(summary.median, decimals),
            ratio: line.ratios[index].map(|ratio| format!("{}×", number(ratio, 2))),
            spread: format!(
                "{}–{} ({})",
                number(summary.min, decimals),
                number(summary.max, decimals),
                summary.count
            ),
            footnote: failed.as_ref().map(|(count, why)| {
                let column = raw.columns[index].heading();
                let rounds = count + summary.count;
                footnotes.add(format!("{column} failed in {count} of {rounds} rounds: {why}"))
            }),
            is_best: line.best == Some(index),
        },
        Cell::Failed(why) => {
            let column = raw.columns[index].heading();
            let footnote = Some(footnotes.add(format!("{column} failed: {why}")));
            Shown { text: "failed".to_owned(), footnote, ..Shown::default() }
        }
        Cell::NotMeasured(Some(why)) => {
            let footnote = Some(footnotes.add(format!("not measured: {why}")));
            Shown { text: "–".to_owned(), footnote, ..Shown::default() }
        }
        Cell::NotMeasured(None) => Shown { text: "–".to_owned(), ..Shown::default() },
    });
    cells.collect()
}

/// A number for people: with a comma before each three digits of a long one.
pub fn number(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    let (whole, rest) = match text.find('.') {
        Some(point) => text.split_at(point),
        None => (text.as_str(), ""),
    };
    if whole.len() < 5 || !whole.bytes().all(|byte| byte.is_ascii_digit()) {
        return text;
    }
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_numbers_have_commas() {
        for (value, decimals, text) in [
            (0.0, 2, "0.00"),
            (1.745, 1, "1.7"),
            (9999.0, 0, "9999"),
            (12345.6, 0, "12,346"),
            (1_234_567.25, 2, "1,234,567.25"),
            (100_000.0, 0, "100,000"),
            (-12345.0, 0, "-12345"),
        ] {
            assert_eq!(number(value, decimals), text);
        }
    }

    #[test]
    fn one_reason_is_one_footnote() {
        let raw = Raw::parse(include_str!("golden/raw.json")).unwrap();
        let report = Report::of(&raw);
        let mut texts = report.footnotes.clone();
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), report.footnotes.len());
        let named = report.shown.iter().flatten().filter_map(|shown| shown.footnote);
        let named: std::collections::BTreeSet<_> = named.collect();
        assert_eq!(named.into_iter().collect::<Vec<_>>(), (1..=texts.len()).collect::<Vec<_>>());
    }
}
