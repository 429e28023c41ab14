//! The report as Markdown: a table that can be pasted elsewhere, and below it what one has to know of it.

use std::fmt::Write as _;

use super::{
    report::{Report, Shown},
    statistics::Line,
};

/// Draws it.
pub fn draw(report: &Report<'_>) -> String {
    let mut text = String::from("# Tidegate beside others\n\n");
    let mut say = |line: &str| writeln!(text, "{line}").expect("a string takes everything");
    say(&format!("{}\n", code_or_text(&report.occasion())));
    say(&format!("{}\n", escape(&report.machine())));
    if report.noise.is_noisy() {
        say(&format!("> **This machine is noisy.** {}\n", escape(&report.noise.sentence())));
    }
    table(report, report.lines.iter().zip(&report.shown), &mut say, &|shown| {
        let mut cell = escape(&shown.text);
        if shown.is_best {
            cell = format!("**{cell}**");
        }
        if let Some(ratio) = &shown.ratio {
            cell += &format!(" ({})", escape(ratio));
        }
        if let Some(footnote) = shown.footnote {
            cell += &format!(" [{footnote}]");
        }
        cell
    });
    say(&format!("\n{}", escape(&report.legend())));
    if !report.footnotes.is_empty() {
        say("");
    }
    for (index, footnote) in report.footnotes.iter().enumerate() {
        say(&format!("{}. {}", index + 1, escape(footnote)));
    }
    say("\n## Spread\n\nLeast and greatest sample, and how many there were.\n");
    table(report, report.measured(), &mut say, &|shown| escape(&shown.spread));
    say("\n## How it was taken\n");
    for sentence in report.method() {
        say(&format!("- {}", code_or_text(&sentence)));
    }
    if !report.noise.is_noisy() {
        say(&format!("- {}", escape(&report.noise.sentence())));
    }
    for note in &report.raw.notes {
        say(&format!("- {}", code_or_text(note)));
    }
    text
}

fn table<'a>(
    report: &'a Report<'_>,
    lines: impl Iterator<Item = (&'a Line<'a>, &'a Vec<Shown>)>,
    say: &mut impl FnMut(&str),
    cell: &dyn Fn(&Shown) -> String,
) {
    let headings: Vec<_> = report.headings().iter().map(|heading| escape(heading)).collect();
    say(&format!("| | unit | {} |", headings.join(" | ")));
    say(&format!("| --- | --- |{}", " ---: |".repeat(headings.len())));
    let mut plot = None;
    for (line, shown) in lines {
        if plot.replace(line.row.plot) != Some(line.row.plot) {
            let title = escape(line.row.plot.title());
            say(&format!("| *{title}* | |{}", " |".repeat(headings.len())));
        }
        let cells: Vec<_> = shown.iter().map(cell).collect();
        let (title, unit) = (escape(&line.row.title), escape(&report.unit(line)));
        say(&format!("| {title} | {unit} | {} |", cells.join(" | ")));
    }
}

/// Text of ours, in which backquotes mean code. What is in them is left alone, but for what would end a
/// line or a cell.
fn code_or_text(text: &str) -> String {
    let parts = text.split('`').enumerate();
    let parts: Vec<_> = parts
        .map(|(index, part)| if index % 2 == 1 { one_line(part) } else { escape(part) })
        .collect();
    // A backquote without its other would make code of all that follows.
    if parts.len() % 2 == 1 { parts.join("`") } else { escape(text) }
}

/// Text that means nothing to Markdown, whoever wrote it.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for character in one_line(text).chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' => {
                escaped.push('\\');
                escaped.push(character);
            }
            _ => escaped.push(character),
        }
    }
    escaped
}

fn one_line(text: &str) -> String {
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(visible).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{golden, raw::Raw};

    #[test]
    fn it_is_drawn_as_in_the_file() {
        let raw = Raw::parse(golden::RAW).unwrap();
        golden::compare("report.md", &draw(&Report::of(&raw)));
    }

    #[test]
    fn what_others_wrote_is_text() {
        assert_eq!(escape("a|b\n*c* <d> `e` [f]\\"), r"a\|b \*c\* &lt;d> \`e\` \[f\]\\");
        assert_eq!(code_or_text("run `a_b *c` as is_root"), r"run `a_b *c` as is\_root");
        assert_eq!(code_or_text("one ` alone"), r"one \` alone");
    }

    #[test]
    fn all_lines_of_a_table_have_as_many_cells() {
        let mut raw = Raw::parse(golden::RAW).unwrap();
        raw.columns[0].title = "a|b\n|c".to_owned();
        raw.rows[0].title = "|".to_owned();
        let text = draw(&Report::of(&raw));
        let bars = |line: &str| line.replace(r"\|", "").matches('|').count();
        let lines: Vec<_> = text.lines().filter(|line| line.starts_with('|')).collect();
        assert!(lines.len() > 2 * (raw.rows.len() + 2), "{lines:#?}");
        assert!(lines.iter().all(|line| bars(line) == raw.columns.len() + 3), "{lines:#?}");
    }
}
