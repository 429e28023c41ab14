//! What was found, for people: each finding with the lines that show it, the plan, and a summary.

use std::{collections::HashMap, fmt};

use miette::{
    Diagnostic, GraphicalReportHandler, GraphicalTheme, LabeledSpan, NamedSource, SourceCode,
};

use super::{
    super::text::{Paint, plural},
    Outcome,
    files::File,
};
use crate::check::{Finding, Place, Rule, Severity};

/// Columns of messages and helps.
const WIDTH: usize = 100;
/// Findings of one rule that are shown.
const SHOWN_MAX: usize = 50;
/// Steps of the plan of a file that are shown.
const STEPS_SHOWN_MAX: usize = 40;

/// The whole report. Notes are shown if there is anything else, or if `is_verbose`.
pub fn shown(outcome: &Outcome, paint: Paint, is_verbose: bool) -> String {
    let theme = match paint.is_on {
        true => GraphicalTheme::unicode(),
        false => GraphicalTheme::unicode_nocolor(),
    };
    let handler = GraphicalReportHandler::new_themed(theme).with_width(WIDTH).with_links(false);
    let with_notes = is_verbose || outcome.worst() > Some(Severity::Note);
    let mut text = String::new();
    let mut counts: HashMap<Rule, usize> = HashMap::new();
    let is_shown = |finding: &&Finding| with_notes || finding.severity > Severity::Note;
    for each in outcome.findings.iter().filter(is_shown) {
        let count = counts.entry(each.rule).or_default();
        *count += 1;
        if *count <= SHOWN_MAX {
            text += &finding(each, &outcome.files, &handler);
            text.push('\n');
        }
    }
    let mut many: Vec<_> = counts.into_iter().filter(|&(_, count)| count > SHOWN_MAX).collect();
    many.sort();
    for (rule, count) in many {
        text +=
            &format!("… and {} more of {} (`--json` has all)\n\n", count - SHOWN_MAX, rule.name());
    }
    for file in outcome.files.iter().filter(|file| file.config.is_none() && outcome.is_together) {
        let path = file.path.display();
        text += &format!("{path} was not compared with the others, for it cannot be read\n\n");
    }
    text += &plans(&outcome.files);
    text += &summary(outcome, with_notes);
    text
}

fn finding(finding: &Finding, files: &[File], handler: &GraphicalReportHandler) -> String {
    let mut text = String::new();
    for places in groups(&finding.places, files) {
        let is_first = text.is_empty();
        let label = |(number, place): (usize, &&Place)| {
            let label = Some(place.label.clone());
            match number {
                0 => LabeledSpan::new_primary_with_span(label, place.span),
                _ => LabeledSpan::new_with_span(label, place.span),
            }
        };
        let shown = Shown {
            message: if is_first { &finding.message } else { "" },
            severity: finding.severity,
            labels: places.iter().enumerate().map(label).collect(),
            help: None,
            source: Some(&*files[places[0].file].source),
        };
        let rendered = render(&shown, handler);
        text += if is_first { &rendered } else { behind_first_line(&rendered) };
    }
    if let Some(help) = &finding.help {
        let (message, severity) = ("", finding.severity);
        let shown = Shown { message, severity, labels: Vec::new(), help: Some(help), source: None };
        text += behind_first_line(&render(&shown, handler));
    }
    text
}

/// Places that are shown in one frame: the first with those near it, and then the others of each file.
fn groups<'a>(places: &'a [Place], files: &[File]) -> Vec<Vec<&'a Place>> {
    /// Lines between places that are shown with what stands between them.
    const NEAR: usize = 8;
    let Some((first, others)) = places.split_first() else { return Vec::new() };
    let is_near = |place: &Place| {
        let text = files[first.file].source.inner().as_bytes();
        let (start, end) = (first.span.offset(), place.span.offset());
        let between = text.get(start.min(end)..start.max(end)).unwrap_or_default();
        place.file == first.file && between.iter().filter(|&&byte| byte == b'\n').count() <= NEAR
    };
    let (near, far): (Vec<&Place>, Vec<&Place>) = others.iter().partition(|place| is_near(place));
    let mut groups = vec![[vec![first], near].concat()];
    for place in far {
        match groups[1..].iter_mut().find(|group| group[0].file == place.file) {
            Some(group) => group.push(place),
            None => groups.push(vec![place]),
        }
    }
    groups
}

fn render(shown: &Shown<'_>, handler: &GraphicalReportHandler) -> String {
    let mut text = String::new();
    handler.render_report(&mut text, shown).expect("a string takes everything");
    text
}

/// Without the line that has the message.
fn behind_first_line(text: &str) -> &str {
    text.split_once('\n').map_or("", |(_, rest)| rest)
}

/// A part of a finding, as miette takes it: it knows findings in one file only.
#[derive(Debug)]
struct Shown<'a> {
    message: &'a str,
    severity: Severity,
    labels: Vec<LabeledSpan>,
    help: Option<&'a str>,
    source: Option<&'a NamedSource<String>>,
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message)
    }
}

impl std::error::Error for Shown<'_> {}

impl Diagnostic for Shown<'_> {
    fn severity(&self) -> Option<miette::Severity> {
        Some(match self.severity {
            Severity::Error => miette::Severity::Error,
            Severity::Warning => miette::Severity::Warning,
            Severity::Note => miette::Severity::Advice,
        })
    }

    fn help(&self) -> Option<Box<dyn fmt::Display + '_>> {
        self.help.map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        (!self.labels.is_empty()).then(|| Box::new(self.labels.iter().cloned()) as Box<_>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.source.map(|source| source as &dyn SourceCode)
    }
}

/// What `up` would do: all of it for one file, a line each for several.
fn plans(files: &[File]) -> String {
    let planned: Vec<&File> = files.iter().filter(|file| !file.plan.is_empty()).collect();
    let [file] = &planned[..] else {
        let line = |file: &&File| format!("{}: {}\n", file.path.display(), compact(file));
        let lines: String = planned.iter().map(line).collect();
        return if lines.is_empty() { lines } else { lines + "\n" };
    };
    if files.len() > 1 {
        return format!("{}: {}\n\n", file.path.display(), compact(file));
    }
    let mut text = format!("`tidegate up {}` would do this:\n", file.path.display());
    for line in file.plan.iter().take(STEPS_SHOWN_MAX) {
        text += &format!("[#] {line}\n");
    }
    if file.plan.len() > STEPS_SHOWN_MAX {
        text += &format!("… and {} steps more\n", file.plan.len() - STEPS_SHOWN_MAX);
    }
    text + "\n"
}

/// What an interface will be, in a line.
fn compact(file: &File) -> String {
    let Some(config) = &file.config else { return String::new() };
    let interface = &config.interface;
    let mut facts: Vec<String> =
        interface.addresses.iter().map(|address| address.value.to_string()).collect();
    match interface.listen_port.as_deref() {
        None | Some(0) => facts.push("any port".to_owned()),
        Some(port) => facts.push(format!("port {port}")),
    }
    facts.extend(interface.mtu.as_ref().map(|mtu| format!("MTU {}", mtu.value)));
    facts.push(plural(config.peers.len() as u64, "peer"));
    let routes = file.plan.iter().filter(|line| line.contains(" route add ")).count();
    facts.extend((routes > 0).then(|| plural(routes as u64, "route")));
    let hooks = interface.hooks.len();
    facts.extend((hooks > 0).then(|| plural(hooks as u64, "hook")));
    format!("{} with {}", file.interface, facts.join(" · "))
}

fn summary(outcome: &Outcome, with_notes: bool) -> String {
    let [errors, warnings, notes] = [Severity::Error, Severity::Warning, Severity::Note]
        .map(|severity| outcome.count(severity) as u64);
    let mut parts = Vec::new();
    if errors > 0 {
        parts.push(plural(errors, "error"));
    }
    if warnings > 0 {
        parts.push(plural(warnings, "warning"));
    }
    if parts.is_empty() {
        parts.push("nothing wrong".to_owned());
    }
    if notes > 0 {
        let hidden = if with_notes { "" } else { " (shown with -v)" };
        parts.push(format!("{}{hidden}", plural(notes, "note")));
    }
    format!("{} in {}\n", parts.join(", "), plural(outcome.files.len() as u64, "file"))
}
