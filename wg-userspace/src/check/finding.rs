//! One thing that is worth knowing about a file or several, and the places that show it.

use std::borrow::Cow;

use serde::Serialize;

use crate::config::Span;

/// How bad it is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing is wrong with it; it may not be what was meant.
    Note,
    /// It works, but not as most people would want it.
    Warning,
    /// Packets will be dropped, or the file cannot be used.
    Error,
}

/// Which rule found it: a word for scripts, and for tests. Its name in JSON is in kebab case.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Rule {
    /// The file cannot be read as a `wg0.conf`.
    Syntax,
}

/// Bytes of one of the files.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Place {
    /// Index of the file among those that are checked.
    pub file: usize,
    /// Where in it.
    pub span: Span,
    /// What is to be seen there.
    pub label: String,
}

/// One thing that is worth knowing. Never shows a secret key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What found it.
    pub rule: Rule,
    /// A sentence that stands alone: who drops what, and why.
    pub message: String,
    /// What shows it: the place to change first. At least one.
    pub places: Vec<Place>,
    /// What to do about it.
    pub help: Option<Cow<'static, str>>,
}

impl Finding {
    /// A finding without places yet.
    pub fn new(severity: Severity, rule: Rule, message: impl Into<String>) -> Self {
        Self { severity, rule, message: message.into(), places: Vec::new(), help: None }
    }

    /// Adds a place; the first one is the finding's own.
    #[must_use]
    pub fn at(mut self, file: usize, span: Span, label: impl Into<String>) -> Self {
        self.places.push(Place { file, span, label: label.into() });
        self
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<Cow<'static, str>>) -> Self {
        self.help = Some(help.into());
        self
    }
}
