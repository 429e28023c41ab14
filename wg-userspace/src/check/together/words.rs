//! Words of sentences: lists, short keys, spans of what is not there.

use std::fmt::Display;

use super::super::Subject;
use crate::config::{Config, PeerConfig, Span};

/// How many things a sentence names before it counts the rest.
const NAMED_MAX: usize = 4;

/// "a", "a and b", "a, b and c", "a, b, c, d and 5 more".
pub fn list(items: impl IntoIterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    let (named, rest) = items.split_at(items.len().min(NAMED_MAX));
    match (named, rest.len()) {
        ([], _) => String::new(),
        ([one], 0) => one.clone(),
        ([first @ .., last], 0) => format!("{} and {last}", first.join(", ")),
        // One more is named as well: it is no longer than its number.
        (named, 1) => format!("{} and {}", named.join(", "), rest[0]),
        (named, count) => format!("{} and {count} more", named.join(", ")),
    }
}

/// Items with commas, as they stand in a file; nothing if they are too many to be written again.
pub fn line(items: impl IntoIterator<Item = impl Display>) -> Option<String> {
    const ITEMS_MAX: usize = 6;
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    (items.len() <= ITEMS_MAX).then(|| items.join(", "))
}

/// The end of a verb or noun: `one` for one thing, `many` for several.
pub fn number<'a>(count: usize, one: &'a str, many: &'a str) -> &'a str {
    if count == 1 { one } else { many }
}

/// Bytes of a file as they may be shown: no secrets, no control characters, not too long.
pub fn shown(config: &Config, span: Span) -> String {
    const LEN_MAX: usize = 63;
    let text = config.source().inner().get(span.offset()..span.offset() + span.len());
    text.unwrap_or_default().chars().take(LEN_MAX).collect()
}

/// What a file calls a peer.
pub fn peer_name(config: &Config, peer: &PeerConfig) -> Option<String> {
    peer.name.as_ref().map(|name| shown(config, name.span))
}

/// A peer by its name, or else by the beginning of its key.
pub fn peer_label(config: &Config, peer: &PeerConfig) -> String {
    const KEY_CHARS: usize = 8;
    peer_name(config, peer).unwrap_or_else(|| {
        let key = peer.public_key.to_string();
        format!("peer {}…", &key[..KEY_CHARS])
    })
}

/// The header of a file's `[Interface]`: where to say what is missing there.
pub fn interface_span(subject: &Subject<'_>) -> Span {
    let text = subject.config.source().inner();
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let word = line.trim_start_matches('\u{feff}').trim_start();
        if word.starts_with('[') {
            let start = at + line.len() - word.len();
            let len = word.find(']').map_or(1, |end| end + 1);
            let name = &word[1..len.max(2) - 1];
            if name.trim().eq_ignore_ascii_case("interface") {
                return Span::new(start.into(), len);
            }
        }
        at += line.len();
    }
    subject.config.interface.private_key.span
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_name_a_few_and_count_the_rest() {
        let abc = |count: usize| list(('a'..='z').take(count));
        assert_eq!(abc(0), "");
        assert_eq!(abc(1), "a");
        assert_eq!(abc(2), "a and b");
        assert_eq!(abc(4), "a, b, c and d");
        assert_eq!(abc(5), "a, b, c, d and e");
        assert_eq!(abc(7), "a, b, c, d and 3 more");
    }
}
