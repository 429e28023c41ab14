//! The lines of a file: sections, entries, directives. Knows no value, but which may be secret.

use std::collections::HashSet;
use std::ops::Range;

use super::keys::{Key, Section};
use super::problem::Span;

/// A part of the file: its text, the same bytes as they may be shown, and where they stand.
///
/// It has no `Debug`, since `raw` may be a key.
#[derive(Clone, Copy)]
pub(super) struct Text<'a> {
    pub raw: &'a str,
    shown: &'a str,
    at: usize,
}

impl<'a> Text<'a> {
    /// `shown` has the length and the character boundaries of `raw`.
    fn new(raw: &'a str, shown: &'a str) -> Self {
        assert_eq!(raw.len(), shown.len());
        Self { raw, shown, at: 0 }
    }

    /// A text that stands alone and holds no secret.
    pub fn whole(text: &'a str) -> Self {
        Self::new(text, text)
    }

    pub fn span(self) -> Span {
        Span::new(self.at.into(), self.raw.len())
    }

    pub fn is_empty(self) -> bool {
        self.raw.is_empty()
    }

    /// As it may stand in a message: no secrets, no control characters, not endlessly long.
    pub fn quoted(self) -> String {
        const LEN_MAX: usize = 60;
        match self.shown.char_indices().nth(LEN_MAX) {
            None => self.shown.to_owned(),
            Some((end, _)) => format!("{}…", &self.shown[..end]),
        }
    }

    pub fn slice(self, range: Range<usize>) -> Self {
        Self {
            raw: &self.raw[range.clone()],
            shown: &self.shown[range.clone()],
            at: self.at + range.start,
        }
    }

    pub fn from(self, start: usize) -> Self {
        self.slice(start..self.raw.len())
    }

    /// The empty text behind it.
    pub fn at_end(self) -> Self {
        self.from(self.raw.len())
    }

    /// The rest of it from where a part of it begins.
    pub fn since(self, part: Self) -> Self {
        self.from(part.at - self.at)
    }

    pub fn trim(self) -> Self {
        let start = self.raw.len() - self.raw.trim_start().len();
        let end = start + self.raw.trim().len();
        self.slice(start..end)
    }

    /// What stands before the first `mark`, or all.
    pub fn before(self, mark: char) -> Self {
        self.slice(0..self.raw.find(mark).unwrap_or(self.raw.len()))
    }

    /// What stands on either side of the first `mark`, trimmed.
    pub fn split_once(self, mark: char) -> Option<(Self, Self)> {
        let at = self.raw.find(mark)?;
        Some((self.slice(0..at).trim(), self.from(at + mark.len_utf8()).trim()))
    }

    /// The parts between separators, trimmed.
    pub fn split(self, separator: impl Fn(char) -> bool) -> impl Iterator<Item = Self> {
        let mut start = 0;
        let ends = self
            .raw
            .match_indices(separator)
            .map(|(at, mark)| (at, at + mark.len()))
            .chain([(self.raw.len(), self.raw.len())]);
        ends.map(move |(end, next)| self.slice(std::mem::replace(&mut start, next)..end).trim())
    }
}

/// One line. Comments and empty lines are left out.
pub(super) enum Line<'a> {
    /// `[Name]`
    Section { name: Text<'a> },
    /// Begins with `[`, but is no section.
    BrokenSection(Text<'a>),
    /// `Key = value`
    Entry { key: Text<'a>, value: Text<'a> },
    /// `#! Key = value`; `value` is missing where `=` is.
    Directive { key: Text<'a>, value: Option<Text<'a>> },
    /// `# friendly_name = laptop`, which is the way of prometheus_wireguard_exporter.
    FriendlyName(Text<'a>),
    /// Anything else.
    Stray(Text<'a>),
}

/// The lines of `raw`, to be shown as `shown` has them.
pub(super) fn lines<'a>(raw: &'a str, shown: &'a str) -> impl Iterator<Item = Line<'a>> {
    // Windows editors begin a file with this mark.
    let start = if raw.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 };
    Text::new(raw, shown).from(start).split(|c| c == '\n').filter_map(line)
}

fn line(text: Text<'_>) -> Option<Line<'_>> {
    if let Some(comment) = text.raw.strip_prefix('#') {
        if comment.starts_with('!') {
            let body = text.from(2).before('#').trim();
            let (key, value) = match body.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (body, None),
            };
            return Some(Line::Directive { key, value });
        }
        let (key, value) = text.from(1).split_once('=')?;
        return (key.raw.eq_ignore_ascii_case("friendly_name") && !value.is_empty())
            .then_some(Line::FriendlyName(value));
    }
    // wg(8) and wg-quick(8) cut here inside quotes, too.
    let text = text.before('#').trim();
    if text.is_empty() {
        None
    } else if text.raw.starts_with('[') {
        Some(match text.raw.strip_suffix(']') {
            Some(open) => Line::Section { name: text.slice(1..open.len().max(1)).trim() },
            None => Line::BrokenSection(text),
        })
    } else {
        Some(match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Line::Entry { key, value },
            _ => Line::Stray(text),
        })
    }
}

/// The file as it may be shown: whatever may be a secret key is starred out, and control characters,
/// which could steer a terminal, are replaced. Length and character boundaries stay.
pub(super) fn redact(raw: &str) -> String {
    /// As long as this, base64 may be a key, if a truncated one, wherever it stands.
    const KEY_LIKE: usize = 32;
    /// The same where nobody knows what the text is meant to be.
    const KEY_LIKE_IN_UNKNOWN: usize = 16;
    /// Characters of a public key. In what is longer, a secret one may hide.
    const PUBLIC_KEY_LEN: usize = 44;

    let mut secrets = Vec::new();
    let mut shown = Vec::new();
    let mut keys_like = Vec::new();
    for line in lines(raw, raw) {
        match line {
            Line::Entry { key, value } => match Key::find(key.raw) {
                Some(key) if key.is_secret() => secrets.push(value),
                Some(Key::PublicKey) if value.raw.len() <= PUBLIC_KEY_LEN => shown.push(value),
                Some(_) => {}
                None => keys_like.extend([key, value]),
            },
            Line::Stray(text) => keys_like.push(text),
            _ => {}
        }
    }
    // Who gives a private key as a public one should not see it printed, either.
    let known: HashSet<_> = secrets.iter().map(|secret| secret.raw).collect();
    shown.retain(|value| !known.contains(value.raw));

    let mut bytes = raw.as_bytes().to_vec();
    let mut shown = shown.iter().peekable();
    for (start, len) in base64_runs(raw) {
        while shown.next_if(|value| value.at + value.raw.len() <= start).is_some() {}
        let is_shown = shown.peek().is_some_and(|value| value.at <= start);
        if len >= KEY_LIKE && !is_shown {
            bytes[start..start + len].fill(b'*');
        }
    }
    for text in keys_like {
        for (start, len) in base64_runs(text.raw) {
            let run = &text.raw[start..start + len];
            // A long name is none, be it misspelt.
            if len >= KEY_LIKE_IN_UNKNOWN && Key::nearest(run, Section::Peer).is_none() {
                bytes[text.at + start..text.at + start + len].fill(b'*');
            }
        }
    }
    for secret in secrets {
        bytes[secret.at..secret.at + secret.raw.len()].fill(b'*');
    }
    for (at, character) in raw.char_indices() {
        match character {
            '\n' | '\t' => {}
            '\r' => bytes[at] = b' ',
            _ if character.is_control() => bytes[at..at + character.len_utf8()].fill(b'?'),
            _ => {}
        }
    }
    String::from_utf8(bytes).expect("whole characters were replaced by ASCII")
}

/// Start and length of the runs of base64 characters.
fn base64_runs(text: &str) -> impl Iterator<Item = (usize, usize)> {
    let is_base64 = |c: &u8| c.is_ascii_alphanumeric() || matches!(c, b'+' | b'/' | b'=');
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = &text.as_bytes()[at..];
        let start = at + rest.iter().position(is_base64)?;
        let rest = &text.as_bytes()[start..];
        let len = rest.iter().position(|c| !is_base64(c)).unwrap_or(rest.len());
        at = start + len;
        Some((start, len))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redaction_stars_out_keys_wherever_they_stand() {
        let key = "uKpxgD9TVRikgNF5/WUE0mCQ2B2D6zqkzCbdxw/q5X4=";
        let public = "QvCsZshTVi18QoGbGp/YHUDbluTfDLwlkuWhCpQN3Vw=";
        for secret in [
            format!("private key={key}"),
            format!("PresharedKey = {key} # comment"),
            format!("PrivatKey = {key}"),
            format!("PrivateKey: {key}"),
            format!("# PrivateKey = {key}"),
            format!("#! Name = {key}"),
            format!("[{key}]"),
            format!("Endpoint = {key}:1"),
            format!("PrivateKey={key}\nPublicKey={key}"),
            format!("PrivateKey={key}\nPublicKey=PrivateKey={key}"),
            key.to_owned(),
            format!("={key}"),
        ] {
            let text = format!("{secret}\nPublicKey = {public}\n");
            let shown = redact(&text);
            assert_eq!(shown.len(), text.len());
            assert!(!shown.contains(&key[..20]), "{shown}");
            assert!(shown.contains(public), "{shown}");
        }
        assert_eq!(redact("PrivateKey = tooshort # x"), "PrivateKey = ******** # x");
        assert_eq!(redact("PrivatKey = uKpxgD9TVRikgNF5/W"), "PrivatKey = ******************");
        assert_eq!(redact("PersistantKeepalive = 25"), "PersistantKeepalive = 25");
        assert_eq!(redact("PersistentKeepalive 25"), "PersistentKeepalive 25");
        assert_eq!(redact("MTU = 1\u{1b}[2J\u{9b}ä\r\n"), "MTU = 1?[2J??ä \n");
    }

    #[test]
    fn texts_know_where_they_stand() {
        let text = " a = b , ç,, d # e";
        let text = Text::new(text, text);
        let (key, value) = text.before('#').split_once('=').unwrap();
        assert_eq!((key.raw, key.at), ("a", 1));
        let parts: Vec<_> = value.split(|c| c == ',').map(|part| (part.raw, part.at)).collect();
        assert_eq!(parts, [("b", 5), ("ç", 9), ("", 12), ("d", 14)]);
    }
}
