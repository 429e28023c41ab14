//! What is wrong with a file, and where: for people, shown by `miette`.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode};

/// Bytes of a file: where they start, and how many.
pub type Span = miette::SourceSpan;

/// The file that a [`Problem`] points into, with its secrets starred out.
pub(super) type Source = Arc<NamedSource<String>>;

/// What is wrong, the places that show it, and what to do about it.
#[derive(Debug)]
pub(super) struct Mistake {
    message: String,
    labels: Vec<LabeledSpan>,
    help: Option<Cow<'static, str>>,
}

impl Mistake {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), labels: Vec::new(), help: None }
    }

    /// The first label is the place that the header names.
    pub fn at(mut self, span: Span, text: impl Into<String>) -> Self {
        let label = if self.labels.is_empty() {
            LabeledSpan::new_primary_with_span(Some(text.into()), span)
        } else {
            LabeledSpan::new_with_span(Some(text.into()), span)
        };
        self.labels.push(label);
        self
    }

    pub fn help(mut self, help: impl Into<Cow<'static, str>>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Replaces what to do about it.
    pub fn set_help(&mut self, help: &'static str) {
        self.help = Some(help.into());
    }

    /// What is wrong and why, without a place.
    pub fn in_a_line(&self) -> String {
        let why = self.labels.first().and_then(LabeledSpan::label);
        let why = why.map(|why| format!(": {why}")).unwrap_or_default();
        let help = self.help.as_ref().map(|help| format!("; {help}")).unwrap_or_default();
        format!("{}{why}{help}", self.message)
    }

    /// Where its first label starts; its place in the order of the file.
    pub fn offset(&self) -> usize {
        self.labels.first().map_or(0, LabeledSpan::offset)
    }

    pub fn into_problem(self, source: &Source) -> Problem {
        Problem { mistake: self, source: Arc::clone(source) }
    }
}

/// One thing that is wrong with a file. Says what, where, and what to do; never shows a secret key.
#[derive(Debug)]
pub struct Problem {
    mistake: Mistake,
    source: Source,
}

impl Problem {
    /// The bytes of the file that show it; at least one span.
    pub fn spans(&self) -> impl Iterator<Item = Span> {
        self.mistake.labels.iter().map(|label| *label.inner())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.mistake.message)
    }
}

impl std::error::Error for Problem {}

impl Diagnostic for Problem {
    fn help(&self) -> Option<Box<dyn fmt::Display + '_>> {
        self.mistake.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        Some(&self.source)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        Some(Box::new(self.mistake.labels.iter().cloned()))
    }
}

/// Everything that is wrong with a file, in its order; at least one [`Problem`].
#[derive(Debug)]
pub struct ConfigErrors {
    problems: Vec<Problem>,
}

impl ConfigErrors {
    /// None if there are no problems.
    pub fn new(problems: Vec<Problem>) -> Option<Self> {
        (!problems.is_empty()).then_some(Self { problems })
    }

    /// In the order of the file.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    fn only(&self) -> Option<&Problem> {
        match &self.problems[..] {
            [problem] => Some(problem),
            _ => None,
        }
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.problems[..] {
            [problem] => problem.fmt(f),
            [first, ..] => {
                write!(f, "{} errors in {}", self.problems.len(), first.source.name())
            }
            [] => unreachable!("made only of problems"),
        }
    }
}

impl std::error::Error for ConfigErrors {}

/// One problem stands for itself; several are related to a line that counts them.
impl Diagnostic for ConfigErrors {
    fn help(&self) -> Option<Box<dyn fmt::Display + '_>> {
        self.only()?.help()
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.only()?.source_code()
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        self.only()?.labels()
    }

    fn related(&self) -> Option<Box<dyn Iterator<Item = &dyn Diagnostic> + '_>> {
        if self.only().is_some() {
            return None;
        }
        Some(Box::new(self.problems.iter().map(|problem| problem as &dyn Diagnostic)))
    }
}
