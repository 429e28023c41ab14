//! The report as a page of its own: plots and the table, without scripts, and nothing from elsewhere.

use std::fmt::Write as _;

use super::{
    raw::Kind,
    report::{Report, Shown},
    rows::{Better, Plot},
    statistics::{Cell, Line},
    svg::{self, Bar, Group},
};

/// Colours of bars: two for ours, three for rivals, one for the baseline, then from the beginning.
const STYLE: &str = include_str!("report.css");
/// How many colours for bars there are in it.
const COLOUR_COUNT: usize = 8;

/// Draws it.
pub fn draw(report: &Report<'_>) -> String {
    let mut page = String::new();
    let mut say = |line: &str| writeln!(page, "{line}").expect("a string takes everything");
    say("<!doctype html>");
    say("<html lang=\"en\">");
    say("<head>");
    say("<meta charset=\"utf-8\">");
    // Whatever got in here all the same would not be run or loaded.
    say(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
    );
    say("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">");
    say("<title>Tidegate beside others</title>");
    say(&format!("<style>\n{}</style>", STYLE));
    say("</head>\n<body>\n<h1>Tidegate beside others</h1>");
    say(&format!("<p>{}</p>", code_or_text(&report.occasion())));
    say(&format!("<p>{}</p>", escape(&report.machine())));
    if report.noise.is_noisy() {
        let sentence = escape(&report.noise.sentence());
        say(&format!(
            "<p class=\"warning\"><strong>This machine is noisy.</strong> {sentence}</p>"
        ));
    }
    say("<p class=\"legend\">");
    for (index, heading) in report.headings().iter().enumerate() {
        say(&format!("<span><i class=\"{}\"></i>{}</span>", class(index), escape(heading)));
    }
    say("</p>");
    for plot in Plot::ALL {
        plots(report, plot, &mut say);
    }
    say("<h2>Medians</h2>");
    table(report, report.lines.iter().zip(&report.shown), &mut say, &|shown| {
        let mut cell = escape(&shown.text);
        if shown.is_best {
            cell = format!("<strong>{cell}</strong>");
        }
        if let Some(ratio) = &shown.ratio {
            cell += &format!(" <small>({})</small>", escape(ratio));
        }
        if let Some(footnote) = shown.footnote {
            cell += &format!(" <sup><a href=\"#note{footnote}\">{footnote}</a></sup>");
        }
        cell
    });
    say(&format!("<p>{}</p>", escape(&report.legend())));
    if !report.footnotes.is_empty() {
        say("<ol>");
        for (index, footnote) in report.footnotes.iter().enumerate() {
            say(&format!("<li id=\"note{}\">{}</li>", index + 1, escape(footnote)));
        }
        say("</ol>");
    }
    say("<h2>Spread</h2>\n<p>Least and greatest sample, and how many there were.</p>");
    table(report, report.measured(), &mut say, &|shown| escape(&shown.spread));
    say("<h2>How it was taken</h2>\n<ul>");
    let quiet = (!report.noise.is_noisy()).then(|| report.noise.sentence());
    for sentence in report.method().iter().chain(&quiet).chain(&report.raw.notes) {
        say(&format!("<li>{}</li>", code_or_text(sentence)));
    }
    say("</ul>\n</body>\n</html>");
    page
}

/// The plots of a kind: one for each unit and direction.
fn plots(report: &Report<'_>, plot: Plot, say: &mut impl FnMut(&str)) {
    let mut units: Vec<(&str, Better)> = Vec::new();
    for line in report.lines.iter().filter(|line| line.row.plot == plot) {
        let unit = (line.row.unit.as_str(), line.row.better);
        if !units.contains(&unit) {
            units.push(unit);
        }
    }
    for (unit, better) in units {
        let lines = report.lines.iter().zip(&report.shown).filter(|(line, _)| {
            line.row.plot == plot && (line.row.unit.as_str(), line.row.better) == (unit, better)
        });
        let groups: Vec<_> = lines
            .map(|(line, shown)| Group {
                title: line.row.title.clone(),
                bars: bars(report, &line.cells, shown, unit),
            })
            .filter(|group| !group.bars.is_empty())
            .collect();
        if groups.is_empty() {
            continue;
        }
        let better = match better {
            Better::Higher => "more is better",
            Better::Lower => "less is better",
        };
        let title = plot.title();
        say(&format!("<h2>{}</h2>\n<p>{}, {better}.</p>", escape(title), escape(unit)));
        say(&svg::bars(title, unit, &groups));
    }
}

fn bars(report: &Report<'_>, cells: &[Cell], shown: &[Shown], unit: &str) -> Vec<Bar> {
    let columns = report.raw.columns.iter().zip(cells).zip(shown).enumerate();
    let bars = columns.filter_map(|(index, ((column, cell), shown))| {
        let Cell::Measured { summary, .. } = cell else { return None };
        Some(Bar {
            title: format!("{}: {} {unit}, {}", column.heading(), shown.text, shown.spread),
            class: class(index),
            value: summary.median,
            spread: (summary.min, summary.max),
            label: match &shown.ratio {
                Some(ratio) => format!("{} ({ratio})", shown.text),
                None => shown.text.clone(),
            },
            // Without a tunnel everything is so much faster that nothing else would be seen.
            counts: column.kind != Kind::Baseline,
        })
    });
    bars.collect()
}

fn class(index: usize) -> String {
    format!("c{}", index % COLOUR_COUNT)
}

fn table<'a>(
    report: &'a Report<'_>,
    lines: impl Iterator<Item = (&'a Line<'a>, &'a Vec<Shown>)>,
    say: &mut impl FnMut(&str),
    cell: &dyn Fn(&Shown) -> String,
) {
    say("<div class=\"wide\"><table>");
    let headings = report.headings();
    let cells: String = headings
        .iter()
        .map(|heading| format!("<th scope=\"col\">{}</th>", escape(heading)))
        .collect();
    say(&format!("<thead><tr><th></th><th scope=\"col\">unit</th>{cells}</tr></thead>\n<tbody>"));
    let mut plot = None;
    for (line, shown) in lines {
        if plot.replace(line.row.plot) != Some(line.row.plot) {
            let (span, title) = (headings.len() + 2, escape(line.row.plot.title()));
            say(&format!("<tr><th scope=\"rowgroup\" colspan=\"{span}\">{title}</th></tr>"));
        }
        let cells: String = shown.iter().map(|shown| format!("<td>{}</td>", cell(shown))).collect();
        let (title, unit) = (escape(&line.row.title), escape(&report.unit(line)));
        say(&format!("<tr><th scope=\"row\">{title}</th><td>{unit}</td>{cells}</tr>"));
    }
    say("</tbody></table></div>");
}

/// Text of ours, in which backquotes mean code.
fn code_or_text(text: &str) -> String {
    let parts: Vec<_> = text.split('`').collect();
    if parts.len() % 2 == 0 {
        return escape(text);
    }
    let parts = parts.iter().enumerate().map(|(index, part)| match index % 2 {
        1 => format!("<code>{}</code>", escape(part)),
        _ => escape(part),
    });
    parts.collect()
}

/// Text that means nothing to HTML, in an element or between quotes, whoever wrote it.
pub fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            _ if character.is_control() => escaped.push(' '),
            _ => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{golden, raw::Raw};

    fn page(raw: &Raw) -> String {
        draw(&Report::of(raw))
    }

    #[test]
    fn it_is_drawn_as_in_the_file() {
        golden::compare("report.html", &page(&Raw::parse(golden::RAW).unwrap()));
    }

    #[test]
    fn no_text_of_a_run_becomes_a_tag() {
        const HOSTILE: &str = "</title><script>alert('x')</script>\" onload=\"x";
        let mut value: serde_json::Value = serde_json::from_str(golden::RAW).unwrap();
        /// Makes every text hostile but those that are words of the format.
        fn spoil(value: &mut serde_json::Value, key: &str) {
            use serde_json::Value;
            const WORDS: [&str; 6] = ["id", "name", "column", "kind", "better", "plot"];
            match value {
                Value::String(text) if !WORDS.contains(&key) => text.push_str(HOSTILE),
                Value::Array(all) => all.iter_mut().for_each(|value| spoil(value, key)),
                Value::Object(all) => all.iter_mut().for_each(|(key, value)| spoil(value, key)),
                _ => {}
            }
        }
        spoil(&mut value, "");
        let page = page(&Raw::parse(&value.to_string()).unwrap());
        assert!(page.contains("alert(&#39;x&#39;)"), "nothing was spoiled");
        for tag in ["<script", "\" onload", "</title><"] {
            assert!(!page.contains(tag), "{tag}");
        }
        assert_eq!(page.matches("</title>\n<style>").count(), 1);
    }

    #[test]
    fn it_refers_to_nothing_but_itself() {
        let page = page(&Raw::parse(golden::RAW).unwrap());
        for word in ["http:", "https:", "src=", "url(", "@import", "<script"] {
            assert!(!page.contains(word), "{word}");
        }
        let links = page.split("href=\"").skip(1);
        assert!(links.clone().count() > 0 && links.clone().all(|link| link.starts_with("#note")));
    }

    #[test]
    fn tags_are_closed() {
        let page = page(&Raw::parse(golden::RAW).unwrap());
        for tag in [
            "p", "ol", "ul", "li", "table", "tr", "td", "th", "svg", "g", "text", "h2", "div",
            "title",
        ] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }

    #[test]
    fn there_are_as_many_colours_as_are_used() {
        for index in 0..COLOUR_COUNT {
            assert!(STYLE.contains(&format!(".{} {{", class(index))), "{index}");
        }
        assert!(!STYLE.contains(&format!(".c{COLOUR_COUNT} ")));
    }
}
