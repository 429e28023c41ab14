//! One peer more in a file, or one less; everything else stays byte for byte.
//!
//! A new peer comes last, but for blank lines at the end. Who is added and removed again leaves nothing.

use std::ops::Range;

use ipnet::IpNet;
use zeroize::Zeroizing;

use super::super::keys::{Directive, Key, Section};
use super::super::{ConfigErrors, parse};
use super::{Kind, Layout};
use crate::key::{PresharedKey, PublicKey};

/// What a file gets to know of a peer.
#[derive(Clone, Copy, Debug)]
pub struct NewPeer<'a> {
    /// `#! Name`
    pub name: &'a str,
    /// `PublicKey`
    pub public_key: PublicKey,
    /// `PresharedKey`
    pub preshared_key: Option<&'a PresharedKey>,
    /// `AllowedIPs`
    pub allowed_ips: &'a [IpNet],
}

impl NewPeer<'_> {
    /// Its section, with a break after each line.
    pub fn section(&self, line_end: &str) -> Zeroizing<String> {
        let preshared_key = self.preshared_key.map(PresharedKey::to_base64);
        let allowed_ips: Vec<_> = self.allowed_ips.iter().map(IpNet::to_string).collect();
        let (public_key, allowed_ips) = (self.public_key.to_string(), allowed_ips.join(", "));
        let mut parts = vec!["[Peer]", line_end, "#! ", Directive::Name.name(), " = ", self.name];
        let mut line = |key: Key, value| {
            parts.extend([line_end, key.name(), " = ", value]);
        };
        line(Key::PublicKey, &public_key);
        if let Some(key) = &preshared_key {
            line(Key::PresharedKey, key);
        }
        if !allowed_ips.is_empty() {
            line(Key::AllowedIPs, &allowed_ips);
        }
        parts.push(line_end);
        // At once, for a text that grows leaves copies of keys behind.
        Zeroizing::new(parts.concat())
    }
}

/// A file's text with a peer more.
///
/// # Errors
/// Everything that is wrong with the text; `name` is what errors call the file.
pub fn add_peer(
    name: &str,
    text: &str,
    peer: &NewPeer<'_>,
) -> Result<Zeroizing<String>, ConfigErrors> {
    parse(name, text)?;
    let layout = Layout::of(text);
    let line_end = line_end(text);
    let (said, blank) = text.split_at(end_of_said(&layout, layout.lines.len()));
    let section = peer.section(line_end);
    let is_open = !said.ends_with('\n');
    // The last line has an end if it had one.
    let section = if is_open { &section[..section.len() - line_end.len()] } else { &section };
    let gap = if is_open { [line_end, line_end].concat() } else { line_end.to_owned() };
    Ok(Zeroizing::new([said, &gap, section, blank].concat()))
}

/// A file's text without a peer: without its section, the comments in it and those right above it.
/// Comments below it that stand apart stay. Nothing if the file has no such peer.
///
/// # Errors
/// Everything that is wrong with the text; `name` is what errors call the file.
pub fn remove_peer(
    name: &str,
    text: &str,
    public_key: &PublicKey,
) -> Result<Option<Zeroizing<String>>, ConfigErrors> {
    let config = parse(name, text)?;
    let layout = Layout::of(text);
    // Each [Peer] of a file that makes sense is one peer.
    let mut sections = layout.sections(Section::Peer).zip(&config.peers);
    let found = sections.find(|(_, peer)| *peer.public_key == *public_key);
    let Some((section, _)) = found else { return Ok(None) };
    let lines = lines_of(&layout, section);
    let range = |lines: Range<usize>| match lines.is_empty() {
        true => 0..0,
        false => layout.lines[lines.start].range.start..layout.lines[lines.end - 1].range.end,
    };
    let gone = range(lines);
    let (mut before, after) = (&text[..gone.start], &text[gone.end..]);
    if after.is_empty() && !text.ends_with('\n') {
        before = before.strip_suffix(line_end(text)).unwrap_or(before);
    }
    Ok(Some(Zeroizing::new([before, after].concat())))
}

fn line_end(text: &str) -> &'static str {
    if text.contains("\r\n") { "\r\n" } else { "\n" }
}

/// Where the last of these lines ends that is not blank.
fn end_of_said(layout: &Layout, line_count: usize) -> usize {
    let lines = &layout.lines[..line_count];
    lines.iter().rev().find(|line| line.kind != Kind::Blank).map_or(0, |line| line.range.end)
}

/// The lines that go with a section, and the blank ones that keep it apart: those below it, or one above
/// it if nothing follows.
fn lines_of(layout: &Layout, section: usize) -> Range<usize> {
    let is_blank = |index: usize| layout.lines[index].kind == Kind::Blank;
    let body = layout.body(section);
    let says = |index: &usize| !matches!(layout.lines[*index].kind, Kind::Blank | Kind::Comment);
    let last = body.clone().rev().find(says).unwrap_or(body.start);
    // Comments right below an entry stay with it.
    let end = (last + 1..body.end).find(|&index| is_blank(index)).unwrap_or(body.end);
    let first = layout.sections[section].first;
    let next = (end..layout.lines.len()).find(|&index| !is_blank(index));
    match next {
        Some(next) => first..next,
        None if first > 0 && is_blank(first - 1) => first - 1..end,
        None => first..end,
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const FILE: &str = "\
        [Interface]\n\
        PrivateKey = SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg= # ours\n\
        \n\
        # Anna, since May\n\
        [Peer]\n\
        PublicKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\
        # no more than this\n\
        \n\
        # Below: guests.\n\
        \n\
        [Peer]\n\
        PublicKey = AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n";

    fn key(seed: u8) -> PublicKey {
        PublicKey::from_bytes([seed; 32])
    }

    fn added(text: &str, seed: u8) -> String {
        let allowed_ips = ["10.9.0.4/32", "fd09::4/128"].map(|net| net.parse().unwrap());
        let psk = PresharedKey::from_bytes([4; 32]);
        let preshared_key = Some(&psk);
        let peer = NewPeer {
            name: &format!("Anna's phone {seed}"),
            public_key: key(seed),
            preshared_key,
            allowed_ips: &allowed_ips,
        };
        add_peer("wg0.conf", text, &peer).unwrap_or_else(|errors| panic!("{errors}")).to_string()
    }

    fn removed(text: &str, seed: u8) -> String {
        let outcome = remove_peer("wg0.conf", text, &key(seed));
        outcome.unwrap_or_else(|errors| panic!("{errors}")).expect("it is there").to_string()
    }

    #[test]
    fn a_new_peer_comes_last_with_its_name() {
        let section = "\n[Peer]\n#! Name = Anna's phone 3\n\
            PublicKey = AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=\n\
            PresharedKey = BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ=\n\
            AllowedIPs = 10.9.0.4/32, fd09::4/128\n";
        assert_eq!(added(FILE, 3), format!("{FILE}{section}"));
        assert_eq!(added(&format!("{FILE}\n \n"), 3), format!("{FILE}{section}\n \n"));
        let open = FILE.trim_end();
        assert_eq!(added(open, 3), format!("{open}\n{}", section.trim_end()));
        let config = parse("wg0.conf", &added(FILE, 3)).unwrap();
        assert_eq!(config.peers[2].name.as_ref().unwrap().value, "Anna's phone 3");
    }

    #[test]
    fn a_peer_goes_with_its_own_comments_only() {
        let anna = FILE.find("# Anna").unwrap()..FILE.find("# Below").unwrap();
        let without = [&FILE[..anna.start], &FILE[anna.end..]].concat();
        assert_eq!(removed(FILE, 1), without);
        let end = FILE.find("\n[Peer]\nPublicKey = AgI").unwrap();
        assert_eq!(removed(FILE, 2), FILE[..end]);
        assert_eq!(
            removed(&format!("{FILE}\n# The end.\n"), 2),
            format!("{}\n# The end.\n", &FILE[..end])
        );
        assert!(remove_peer("wg0.conf", FILE, &key(7)).unwrap().is_none());
        assert!(remove_peer("wg0.conf", "[Interface]\n", &key(7)).is_err());
    }

    fn line(words: &'static [&'static str]) -> impl Strategy<Value = String> {
        let word = proptest::sample::select(words).prop_map(str::to_owned);
        prop_oneof![word, "", " {1,2}", "# [a-z!]{0,4}", "#! [a-z]{0,4}"]
    }

    proptest! {
        #[test]
        fn who_is_added_and_removed_leaves_nothing(
            lines in vec(line(&["[Interface]", "PostUp = echo [Peer] # x", "DNS = 10.0.0.1"]), 0..12),
            peers in vec((vec(line(&["AllowedIPs = 10.0.0.0/8"]), 0..5), any::<bool>()), 0..4),
            line_end in prop_oneof!["\n", "\r\n"],
            is_open in any::<bool>(),
        ) {
            let mut all = vec!["[Interface]".to_owned()];
            all.push("PrivateKey = SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=".to_owned());
            all.extend(lines);
            for (number, (lines, is_apart)) in (1..).zip(peers) {
                all.extend(is_apart.then(String::new));
                all.push("[Peer]".to_owned());
                all.push(format!("PublicKey = {}", key(number)));
                all.extend(lines);
            }
            let mut text = all.join(&line_end);
            if !is_open {
                text.push_str(&line_end);
            }
            let once = added(&text, 9);
            prop_assert_eq!(&removed(&once, 9), &text);
            // Others that are added meanwhile do not matter.
            let twice = added(&once, 10);
            prop_assert_eq!(&removed(&removed(&twice, 10), 9), &text);
            prop_assert_eq!(&removed(&removed(&twice, 9), 10), &text);
            // What was there is there.
            let said = text.trim_end_matches(['\r', '\n', ' ']);
            prop_assert!(once.starts_with(said));
        }
    }
}
