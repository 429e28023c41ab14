//! A file's text, changed where a device is not what the file says any more, and nowhere else.
//!
//! Values are replaced where they stand, in the way in which the rest of their line is written.
//! Comments, `#!` lines, order, spacing and line ends stay. A peer that is gone takes its section
//! along, with the comments in it and those right above it; a new one comes last.

mod peers;

use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::net::SocketAddr;
use std::ops::Range;

use ipnet::IpNet;
use zeroize::Zeroizing;

pub use self::peers::{NewPeer, add_peer, remove_peer};
use super::keys::{Directive, Key, Section};
use super::lines::{Line, lines};
use super::{Config, ConfigErrors, Endpoint, PeerConfig, Spanned, parse};
use crate::key::{PresharedKey, PrivateKey, PublicKey};

/// What a file is to say. What is `None` stays as the file has it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Wanted {
    /// `PrivateKey`
    pub private_key: Option<PrivateKey>,
    /// `ListenPort`
    pub listen_port: Option<u16>,
    /// `FwMark`; 0: off.
    pub fwmark: Option<u32>,
    /// `Address`, host bits included, in any order.
    pub addresses: Option<Vec<IpNet>>,
    /// `DNS`, in any order.
    pub dns: Option<Vec<String>>,
    /// `MTU`; written only if the file has one.
    pub mtu: Option<u16>,
    /// The peers, each once. Those that the file does not have are added in this order.
    pub peers: Vec<WantedPeer>,
}

/// What a file is to say of a peer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct WantedPeer {
    /// `PublicKey`
    pub public_key: PublicKey,
    /// `PresharedKey`; zero means none.
    pub preshared_key: PresharedKey,
    /// `AllowedIPs`, in any order.
    pub allowed_ips: Vec<IpNet>,
    /// `Endpoint`; `None`: as the file has it.
    pub endpoint: Option<SocketAddr>,
    /// `PersistentKeepalive`, in seconds; 0: off.
    pub persistent_keepalive: u16,
}

/// The text of a file that says what is wanted; the same text if it says so already.
///
/// # Errors
/// Everything that is wrong with the text; `name` is what errors call the file.
pub fn edit(name: &str, text: &str, wanted: &Wanted) -> Result<Zeroizing<String>, ConfigErrors> {
    let config = parse(name, text)?;
    // Whoever edits needs not care whether the last line has an end.
    let mut whole = Zeroizing::new(String::with_capacity(text.len() + 2));
    whole.push_str(text);
    let is_open = !text.is_empty() && !text.ends_with('\n');
    let line_end = if text.contains("\r\n") { "\r\n" } else { "\n" };
    if is_open {
        whole.push_str(line_end);
    }
    let mut editor = Editor {
        text: &whole,
        line_end,
        layout: Layout::of(&whole),
        edits: Vec::new(),
        new_lines: HashMap::new(),
    };
    editor.interface(&config, wanted);
    editor.peers(&config, wanted);
    let is_end_kept = editor.is_end_kept();
    let mut edited = editor.finish();
    if is_open && is_end_kept {
        let len = edited.len() - line_end.len();
        edited.truncate(len);
    }
    Ok(edited)
}

/// The lines and sections of a text.
struct Layout {
    lines: Vec<LineAt>,
    sections: Vec<SectionAt>,
}

struct LineAt {
    /// With its line break.
    range: Range<usize>,
    kind: Kind,
}

#[derive(Debug, Eq, PartialEq)]
enum Kind {
    Blank,
    /// A comment that says nothing to us.
    Comment,
    Header(Option<Section>),
    Entry {
        key: Option<Key>,
        value: Range<usize>,
    },
    /// A comment that belongs to the section in which it stands.
    Directive,
    Other,
}

struct SectionAt {
    section: Option<Section>,
    /// Index of its header's line.
    header: usize,
    /// Index of its first line, which may be a comment above the header.
    first: usize,
}

impl Layout {
    fn of(text: &str) -> Layout {
        let mut start = 0;
        let mut all = Vec::new();
        for line in text.split_inclusive('\n') {
            let range = start..start + line.len();
            all.push(LineAt { kind: kind(line, start), range });
            start += line.len();
        }
        let mut sections = Vec::new();
        for (index, line) in all.iter().enumerate() {
            if let Kind::Header(section) = line.kind {
                let first = first_line(&all[..index]);
                sections.push(SectionAt { section, header: index, first });
            }
        }
        Layout { lines: all, sections }
    }

    /// Indexes of the lines of a section, from its header on.
    fn body(&self, section: usize) -> Range<usize> {
        let end = self.sections.get(section + 1).map_or(self.lines.len(), |next| next.first);
        self.sections[section].header..end
    }

    fn sections(&self, wanted: Section) -> impl Iterator<Item = usize> {
        let all = self.sections.iter().enumerate();
        all.filter(move |(_, at)| at.section == Some(wanted)).map(|(index, _)| index)
    }

    /// Indexes of the lines of these sections with this key, and where their values stand.
    fn values(&self, sections: &[usize], wanted: Key) -> Vec<(usize, Range<usize>)> {
        let indexes = sections.iter().flat_map(|&section| self.body(section));
        indexes
            .filter_map(|index| match &self.lines[index].kind {
                Kind::Entry { key: Some(key), value } if *key == wanted => {
                    Some((index, value.clone()))
                }
                _ => None,
            })
            .collect()
    }

    /// Where a new line of a section goes: behind the last one that says something.
    fn end_of(&self, section: usize) -> usize {
        let says = |kind: &Kind| {
            matches!(kind, Kind::Entry { .. } | Kind::Directive | Kind::Header(_) | Kind::Other)
        };
        let last = self.body(section).rev().find(|&index| says(&self.lines[index].kind));
        self.lines[last.unwrap_or(self.sections[section].header)].range.end
    }
}

fn kind(text: &str, start: usize) -> Kind {
    let value_at = |span: super::Span| start + span.offset()..start + span.offset() + span.len();
    match lines(text, text).next() {
        Some(Line::Section { name }) => Kind::Header(Section::find(name.raw)),
        Some(Line::Entry { key, value }) => {
            Kind::Entry { key: Key::find(key.raw), value: value_at(value.span()) }
        }
        // Prose behind `#!` is a comment; see `Parser::directive`.
        Some(Line::Directive { key, .. }) if Directive::find(key.raw).is_none() => Kind::Comment,
        Some(Line::Directive { .. } | Line::FriendlyName(_)) => Kind::Directive,
        Some(Line::BrokenSection(_) | Line::Stray(_)) => Kind::Other,
        None if text.trim_start_matches('\u{feff}').trim().is_empty() => Kind::Blank,
        None => Kind::Comment,
    }
}

/// The first of the comments that stand above a section, apart from what is above them; the number of
/// `above` if there are none.
fn first_line(above: &[LineAt]) -> usize {
    let comments = above.iter().rev().take_while(|line| line.kind == Kind::Comment).count();
    let first = above.len() - comments;
    let is_apart = first == 0 || above[first - 1].kind == Kind::Blank;
    if is_apart { first } else { above.len() }
}

struct Editor<'a> {
    text: &'a str,
    line_end: &'static str,
    layout: Layout,
    /// What stands there instead. No two of them overlap.
    edits: Vec<(Range<usize>, Zeroizing<String>)>,
    /// New lines of sections, by the section's index.
    new_lines: HashMap<usize, Zeroizing<String>>,
}

/// An item of a list that stands in the file.
struct Item<'a, T> {
    value: &'a T,
    range: Range<usize>,
}

fn items<T>(values: &[Spanned<T>]) -> Vec<Item<'_, T>> {
    let range = |span: super::Span| span.offset()..span.offset() + span.len();
    values.iter().map(|item| Item { value: &item.value, range: range(item.span) }).collect()
}

impl<'a> Editor<'a> {
    fn interface(&mut self, config: &Config, wanted: &Wanted) {
        let sections: Vec<usize> = self.layout.sections(Section::Interface).collect();
        let file = &config.interface;
        if let Some(key) = &wanted.private_key
            && file.private_key.value != *key
        {
            self.set(&sections, Key::PrivateKey, Some(&key.to_base64()));
        }
        if let Some(port) = wanted.listen_port
            && file.listen_port.as_deref() != Some(&port)
        {
            self.set(&sections, Key::ListenPort, Some(&port.to_string()));
        }
        if let Some(mark) = wanted.fwmark
            && file.fwmark.as_deref().copied().unwrap_or(0) != mark
        {
            let text = format!("{mark:#x}");
            self.set(&sections, Key::FwMark, (mark != 0).then_some(&text));
        }
        if let (Some(mtu), Some(in_file)) = (wanted.mtu, &file.mtu)
            && in_file.value != mtu
        {
            self.set(&sections, Key::MTU, Some(&mtu.to_string()));
        }
        if let Some(addresses) = &wanted.addresses {
            self.list(&sections, Key::Address, &items(&file.addresses), addresses);
        }
        if let Some(dns) = &wanted.dns {
            self.list(&sections, Key::DNS, &items(&file.dns), dns);
        }
    }

    fn peers(&mut self, config: &Config, wanted: &Wanted) {
        let mut in_wanted: HashMap<PublicKey, &WantedPeer> =
            wanted.peers.iter().map(|peer| (peer.public_key, peer)).collect();
        // Each [Peer] of a file that makes sense is one peer.
        let sections: Vec<usize> = self.layout.sections(Section::Peer).collect();
        assert_eq!(sections.len(), config.peers.len());
        for (&section, peer) in sections.iter().zip(&config.peers) {
            match in_wanted.remove(&peer.public_key.value) {
                Some(wanted) => self.peer(section, peer, wanted),
                None => self.remove(section),
            }
        }
        let new = wanted.peers.iter().filter(|peer| in_wanted.contains_key(&peer.public_key));
        for peer in new {
            self.append(peer);
        }
    }

    fn peer(&mut self, section: usize, file: &PeerConfig, wanted: &WantedPeer) {
        let section = &[section];
        let preshared_key = file.preshared_key.as_deref().cloned().unwrap_or_default();
        if preshared_key != wanted.preshared_key {
            let text = wanted.preshared_key.to_base64();
            let is_there = !wanted.preshared_key.is_zero();
            self.set(section, Key::PresharedKey, is_there.then_some(text.as_str()));
        }
        self.list(section, Key::AllowedIPs, &items(&file.allowed_ips), &wanted.allowed_ips);
        if let Some(endpoint) = wanted.endpoint
            && file.endpoint.as_deref() != Some(&Endpoint::Address(endpoint))
        {
            self.set(section, Key::Endpoint, Some(&endpoint.to_string()));
        }
        let seconds = wanted.persistent_keepalive;
        if file.persistent_keepalive.as_deref().copied().unwrap_or(0) != seconds {
            let text = seconds.to_string();
            self.set(section, Key::PersistentKeepalive, (seconds != 0).then_some(&text));
        }
    }

    /// Sets the value of a key that stands once at most; `None` removes its line.
    fn set(&mut self, sections: &[usize], key: Key, value: Option<&str>) {
        match (self.layout.values(sections, key).pop(), value) {
            (Some((_, at)), Some(value)) => self.replace(at, value),
            (Some((line, _)), None) => self.replace(self.layout.lines[line].range.clone(), ""),
            (None, Some(value)) => self.add_line(sections[0], key, value),
            (None, None) => {}
        }
    }

    /// Makes a list that may stand in several lines one of the wanted items, in any order.
    fn list<T: Clone + Eq + std::hash::Hash + ToString>(
        &mut self,
        sections: &[usize],
        key: Key,
        file: &[Item<'_, T>],
        wanted: &[T],
    ) {
        let in_file: HashSet<&T> = file.iter().map(|item| item.value).collect();
        let in_wanted: HashSet<&T> = wanted.iter().collect();
        if in_file == in_wanted {
            return;
        }
        let mut seen = HashSet::new();
        let new: Vec<String> = wanted
            .iter()
            .filter(|item| !in_file.contains(item) && seen.insert(*item))
            .map(T::to_string)
            .collect();
        let values = self.layout.values(sections, key);
        let last = values.len().checked_sub(1);
        for (index, (line, at)) in values.into_iter().enumerate() {
            let here: Vec<_> = file
                .iter()
                .filter(|item| at.start <= item.range.start && item.range.end <= at.end)
                .collect();
            let kept = here.iter().filter(|item| in_wanted.contains(item.value));
            let mut words: Vec<&str> = kept.map(|item| &self.text[item.range.clone()]).collect();
            if words.len() == here.len() && (Some(index) != last || new.is_empty()) {
                continue;
            }
            if Some(index) == last {
                words.extend(new.iter().map(String::as_str));
            }
            if words.is_empty() {
                self.replace(self.layout.lines[line].range.clone(), "");
            } else {
                self.replace(at, &words.join(", "));
            }
        }
        if last.is_none() && !new.is_empty() {
            self.add_line(sections[0], key, &new.join(", "));
        }
    }

    fn replace(&mut self, at: Range<usize>, by: &str) {
        // Where nothing stood, `=` stands before.
        let blank = if at.is_empty() && !by.is_empty() { " " } else { "" };
        self.edits.push((at, Zeroizing::new([blank, by].concat())));
    }

    fn add_line(&mut self, section: usize, key: Key, value: &str) {
        let lines = self.new_lines.entry(section).or_default();
        // Not by growing, which would leave copies of keys behind.
        *lines = Zeroizing::new([lines, key.name(), " = ", value, self.line_end].concat());
    }

    /// Removes a section with its comments.
    fn remove(&mut self, section: usize) {
        let at = &self.layout.sections[section];
        let lines = &self.layout.lines[at.first..self.layout.body(section).end];
        if let (Some(first), Some(last)) = (lines.first(), lines.last()) {
            self.edits.push((first.range.start..last.range.end, Zeroizing::default()));
        }
    }

    /// Adds a section at the end.
    fn append(&mut self, peer: &WantedPeer) {
        let end = self.text.len();
        let line_end = self.line_end;
        let mut text = Zeroizing::new(String::with_capacity(512 + 64 * peer.allowed_ips.len()));
        let mut line = |key: Key, value: &str| {
            write!(text, "{} = {value}{line_end}", key.name()).expect("a string takes everything");
        };
        line(Key::PublicKey, &peer.public_key.to_string());
        if !peer.preshared_key.is_zero() {
            line(Key::PresharedKey, &peer.preshared_key.to_base64());
        }
        if !peer.allowed_ips.is_empty() {
            let nets: Vec<_> = peer.allowed_ips.iter().map(IpNet::to_string).collect();
            line(Key::AllowedIPs, &nets.join(", "));
        }
        if let Some(endpoint) = peer.endpoint {
            line(Key::Endpoint, &endpoint.to_string());
        }
        if peer.persistent_keepalive != 0 {
            line(Key::PersistentKeepalive, &peer.persistent_keepalive.to_string());
        }
        let gap = format!("{line_end}[Peer]{line_end}");
        self.edits.push((end..end, Zeroizing::new([&gap, text.as_str()].concat())));
    }

    /// Whether the end of the text stays what it is.
    fn is_end_kept(&self) -> bool {
        let end = self.text.len();
        let mut new = self.new_lines.keys().map(|&section| self.layout.end_of(section));
        self.edits.iter().all(|(at, _)| at.end != end) && new.all(|at| at != end)
    }

    fn finish(mut self) -> Zeroizing<String> {
        for (section, lines) in std::mem::take(&mut self.new_lines) {
            let at = self.layout.end_of(section);
            // Before what is appended, and before a section that is removed.
            self.edits.insert(0, (at..at, lines));
        }
        self.edits.sort_by_key(|(at, _)| (at.start, at.end));
        let new: usize = self.edits.iter().map(|(_, by)| by.len()).sum();
        let mut edited = Zeroizing::new(String::with_capacity(self.text.len() + new));
        let mut done = 0;
        for (at, by) in &self.edits {
            edited.push_str(&self.text[done..at.start]);
            edited.push_str(by);
            done = at.end;
        }
        edited.push_str(&self.text[done..]);
        edited
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::{btree_set, vec};
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    const PRIVATE: &str = "SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=";
    const FILE: &str = "\
        # The office.\n\
        [Interface]\n\
        PrivateKey = SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg= # ours\n\
        Address = 10.9.0.1/24, fd09::1/64   # both\n\
        #! Xdp = eth0\n\
        PostUp = iptables -A FORWARD -i %i -j ACCEPT\n\
        \n\
        # Anna, since May\n\
        [Peer]\n\
        #! Name = laptop\n\
        PublicKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\
        allowedips=10.9.0.2/32 ,10.1.0.0/16\n\
        Endpoint = laptop.example:7\n\
        # AllowedIPs = 10.9.0.9/32\n\
        \n\
        # Bert\n\
        # (telephone 12)\n\
        [Peer]\n\
        PublicKey = AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n\
        AllowedIPs = 10.9.0.3/32";

    fn key(seed: u8) -> PublicKey {
        PublicKey::from_bytes([seed; 32])
    }

    /// What a file says.
    fn said(text: &str) -> Wanted {
        let config = parse("wg0.conf", text).unwrap_or_else(|errors| panic!("{errors}:\n{text}"));
        let interface = config.interface;
        let peer = |peer: &PeerConfig| WantedPeer {
            public_key: peer.public_key.value,
            preshared_key: peer.preshared_key.as_deref().cloned().unwrap_or_default(),
            allowed_ips: peer.allowed_ips.iter().map(|net| net.value).collect(),
            endpoint: peer.endpoint.as_deref().and_then(|endpoint| match endpoint {
                Endpoint::Address(address) => Some(*address),
                Endpoint::Host { .. } => None,
            }),
            persistent_keepalive: peer.persistent_keepalive.as_deref().copied().unwrap_or(0),
        };
        let mut said = Wanted {
            private_key: Some(interface.private_key.value),
            listen_port: interface.listen_port.as_deref().copied(),
            fwmark: Some(interface.fwmark.as_deref().copied().unwrap_or(0)),
            addresses: Some(interface.addresses.iter().map(|net| net.value).collect()),
            dns: Some(interface.dns.iter().map(|word| word.value.clone()).collect()),
            mtu: interface.mtu.as_deref().copied(),
            peers: config.peers.iter().map(peer).collect(),
        };
        sort(&mut said);
        said
    }

    /// Puts what may be in any order in one.
    fn sort(wanted: &mut Wanted) {
        wanted.addresses.as_mut().unwrap().sort();
        wanted.dns.as_mut().unwrap().sort();
        wanted.peers.sort_by_key(|peer| peer.public_key);
        wanted.peers.iter_mut().for_each(|peer| peer.allowed_ips.sort());
    }

    fn edited(text: &str, wanted: &Wanted) -> String {
        edit("wg0.conf", text, wanted).unwrap().to_string()
    }

    /// The file after a change of what it says.
    fn changed(change: impl FnOnce(&mut Wanted)) -> String {
        let mut wanted = said(FILE);
        change(&mut wanted);
        edited(FILE, &wanted)
    }

    #[test]
    fn what_is_as_wanted_is_not_touched() {
        assert_eq!(changed(|_| {}), FILE);
        assert_eq!(changed(|wanted| wanted.mtu = Some(1400)), FILE, "it has no MTU");
        // The other order is the same.
        assert_eq!(changed(|wanted| wanted.addresses.as_mut().unwrap().reverse()), FILE);
    }

    #[test]
    fn a_value_is_replaced_where_it_stands() {
        let new = PrivateKey::from_bytes([0x40; 32]);
        let expected = FILE.replace(PRIVATE, &new.to_base64());
        assert_eq!(changed(|wanted| wanted.private_key = Some(new)), expected);
        let endpoint = Some("[fd00::7]:8".parse().unwrap());
        let expected = FILE.replace("laptop.example:7", "[fd00::7]:8");
        assert_eq!(changed(|wanted| wanted.peers[0].endpoint = endpoint), expected);
        let expected =
            FILE.replace("10.9.0.1/24, fd09::1/64   # both", "fd09::1/64, 10.0.0.1/8   # both");
        let addresses = ["fd09::1/64", "10.0.0.1/8"].map(|net| net.parse().unwrap()).to_vec();
        assert_eq!(changed(|wanted| wanted.addresses = Some(addresses)), expected);
        let expected =
            FILE.replace("allowedips=10.9.0.2/32 ,10.1.0.0/16", "allowedips=10.1.0.0/16");
        let allowed_ips = vec!["10.1.0.0/16".parse().unwrap()];
        assert_eq!(changed(|wanted| wanted.peers[0].allowed_ips = allowed_ips), expected);
    }

    #[test]
    fn a_new_line_comes_behind_the_last_of_its_section() {
        let expected = FILE.replace("-j ACCEPT\n", "-j ACCEPT\nListenPort = 7\nFwMark = 0x10\n");
        let listening = |wanted: &mut Wanted| {
            (wanted.listen_port, wanted.fwmark) = (Some(7), Some(16));
        };
        assert_eq!(changed(listening), expected);
        let expected = FILE.replace("example:7\n", "example:7\nPersistentKeepalive = 25\n");
        assert_eq!(changed(|wanted| wanted.peers[0].persistent_keepalive = 25), expected);
        // Also where the file ends without a line break.
        let expected = format!("{FILE}\nPersistentKeepalive = 25\n");
        assert_eq!(changed(|wanted| wanted.peers[1].persistent_keepalive = 25), expected);
    }

    #[test]
    fn a_peer_goes_with_its_comments_and_comes_last() {
        let at = FILE.find("# Bert").unwrap();
        assert_eq!(changed(|wanted| wanted.peers.truncate(1)), FILE[..at]);
        let from = FILE.find("# Anna").unwrap();
        let expected = [&FILE[..from], &FILE[at..]].concat();
        assert_eq!(changed(|wanted| drop(wanted.peers.remove(0))), expected);
        let new = WantedPeer {
            public_key: key(3),
            preshared_key: PresharedKey::from_bytes([4; 32]),
            allowed_ips: ["10.9.0.4/32", "fd09::4/128"].map(|net| net.parse().unwrap()).to_vec(),
            endpoint: Some("192.0.2.4:4".parse().unwrap()),
            persistent_keepalive: 9,
        };
        let expected = format!(
            "{FILE}\n\n[Peer]\nPublicKey = AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=\n\
             PresharedKey = BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ=\n\
             AllowedIPs = 10.9.0.4/32, fd09::4/128\nEndpoint = 192.0.2.4:4\n\
             PersistentKeepalive = 9\n"
        );
        assert_eq!(changed(|wanted| wanted.peers.push(new)), expected);
    }

    #[test]
    fn comments_right_below_an_entry_stay_with_it() {
        let text = FILE.replace("10.9.0.9/32\n\n# Bert", "10.9.0.9/32\n# Bert");
        let mut wanted = said(&text);
        wanted.peers.truncate(1);
        assert!(edited(&text, &wanted).ends_with("# (telephone 12)\n"));
    }

    #[test]
    fn what_tidegate_is_told_stays_byte_for_byte() {
        let ours = "#!  nat = MASQUERADE  out=eth0 # why\n#! Forward=tcp eth0:1->[fd00::1]:2\n\
             #! Allow = 10.9.0.7/24  -> 0.0.0.0/0 TCP 22, 80-90\n#!Metrics = [::1]:9\n\
             #! Xdp = eth0 ,eth1 queues=2 mode=zerocopy\n#!workers=2\n";
        let of_peer = "#! LIMIT = 1.5 gbit\n#!Name=a laptop # old\n";
        let text = FILE.replace("#! Xdp = eth0\n", "").replace("#! Name = laptop\n", "");
        let text = text.replacen("[Peer]\n", &format!("[Peer]\n{of_peer}"), 1);
        let text = text.replacen("[Interface]\n", &format!("[Interface]\n{ours}"), 1);
        assert!(text.contains(ours) && text.contains(of_peer), "{text}");
        let mut wanted = said(&text);
        assert_eq!(edited(&text, &wanted), text);
        wanted.listen_port = Some(7);
        wanted.peers[0].allowed_ips.clear();
        wanted.peers.push(WantedPeer { public_key: key(9), ..wanted.peers[0].clone() });
        let edited = edited(&text, &wanted);
        assert!(edited != text && edited.contains(ours) && edited.contains(of_peer), "{edited}");
    }

    #[test]
    fn line_ends_are_those_of_the_file() {
        let text = FILE.replace('\n', "\r\n");
        let mut wanted = said(&text);
        wanted.listen_port = Some(7);
        wanted.peers.remove(0);
        wanted.peers.push(WantedPeer { public_key: key(9), ..wanted.peers[0].clone() });
        let edited = edited(&text, &wanted);
        assert_eq!(edited.matches('\n').count(), edited.matches("\r\n").count());
    }

    #[test]
    fn a_file_with_errors_is_not_edited() {
        assert!(edit("wg0.conf", "[Interface]\n", &Wanted::default()).is_err());
    }

    fn nets() -> impl Strategy<Value = Vec<IpNet>> {
        const NETS: [&str; 6] =
            ["10.0.0.0/8", "10.9.0.2/32", "fd09::/64", "0.0.0.0/0", "fd09::2/128", "192.0.2.0/24"];
        btree_set(0..NETS.len(), 0..4)
            .prop_map(|set| set.into_iter().map(|index| NETS[index].parse().unwrap()).collect())
    }

    prop_compose! {
        fn peer()(
            psk in 0u8..3,
            allowed_ips in nets(),
            port in option::of(1u16..4),
            persistent_keepalive in 0u16..3,
        ) -> WantedPeer {
            WantedPeer {
                public_key: key(0),
                preshared_key: PresharedKey::from_bytes([psk; 32]),
                allowed_ips,
                endpoint: port.map(|port| SocketAddr::from(([192, 0, 2, 1], port))),
                persistent_keepalive,
            }
        }
    }

    prop_compose! {
        /// All that can be wanted; peers are told by numbers from 1 on.
        fn wanted()(
            private in 0u8..3,
            listen_port in option::of(0u16..3),
            fwmark in 0u32..3,
            addresses in nets(),
            dns in btree_set("[a-c]", 0..3),
            mtu in option::of(1280u16..1283),
            keys in btree_set(1u8..7, 0..5),
            peers in vec(peer(), 5),
        ) -> Wanted {
            let peers = keys.into_iter().zip(peers);
            let peers = peers.map(|(seed, peer)| WantedPeer { public_key: key(seed), ..peer });
            let mut wanted = Wanted {
                private_key: Some(PrivateKey::from_bytes([private + 0x48; 32])),
                listen_port,
                fwmark: Some(fwmark),
                addresses: Some(addresses),
                dns: Some(dns.into_iter().collect()),
                mtu,
                peers: peers.collect(),
            };
            sort(&mut wanted);
            wanted
        }
    }

    /// A line of a file: of which peer, with which key, if it has one, and its text.
    type Written = (Option<PublicKey>, Option<Key>, String);

    /// A file that says this, written by somebody with ways of his own.
    fn written(wanted: &Wanted, style: &[u8]) -> Vec<Written> {
        let mut style = style.iter().copied().cycle();
        let mut pick = move |count: u8| style.next().unwrap() % count;
        let mut lines: Vec<Written> = Vec::new();
        let mut number = 0;
        let mut write = |peer: Option<PublicKey>, key: Option<Key>, values: &[String]| {
            for values in values.chunks(1 + usize::from(pick(3))) {
                let name = key.map_or("", Key::name);
                let name = if pick(2) == 0 { name.to_owned() } else { name.to_lowercase() };
                let between = [", ", ",", " , "][usize::from(pick(3))];
                let equals = ["=", " = ", "\t=  "][usize::from(pick(3))];
                let indent = [" ", "", ""][usize::from(pick(3))];
                number += 1;
                let comment = if pick(3) == 0 { format!(" # c{number}") } else { String::new() };
                let text = match key {
                    Some(_) => format!("{indent}{name}{equals}{}{comment}", values.join(between)),
                    None => format!("{}{comment}", values.concat()),
                };
                lines.push((peer, key, text));
                match pick(6) {
                    0 => lines.push((peer, None, format!("# comment {number}"))),
                    1 => lines.push((peer, None, String::new())),
                    2 => lines.push((peer, None, "#! prose, not more".to_owned())),
                    _ => {}
                }
            }
        };
        let texts = |nets: &[IpNet]| nets.iter().map(IpNet::to_string).collect::<Vec<_>>();
        let one = |text: String| vec![text];
        write(None, None, &one("[Interface]".to_owned()));
        let private = wanted.private_key.as_ref().unwrap();
        write(None, Some(Key::PrivateKey), &one(private.to_base64().to_string()));
        write(None, Some(Key::Address), &texts(wanted.addresses.as_ref().unwrap()));
        write(None, Some(Key::DNS), wanted.dns.as_ref().unwrap());
        write(None, Some(Key::PostUp), &one("echo a, b = c".to_owned()));
        for (key, value) in [
            (Key::ListenPort, wanted.listen_port.map(|port| port.to_string())),
            (Key::FwMark, wanted.fwmark.filter(|&mark| mark != 0).map(|mark| mark.to_string())),
            (Key::MTU, wanted.mtu.map(|mtu| mtu.to_string())),
        ] {
            write(None, Some(key), &Vec::from_iter(value));
        }
        for peer in &wanted.peers {
            let of = Some(peer.public_key);
            write(of, None, &one("[Peer]".to_owned()));
            write(of, Some(Key::PublicKey), &one(peer.public_key.to_string()));
            write(of, Some(Key::AllowedIPs), &texts(&peer.allowed_ips));
            let psk = (!peer.preshared_key.is_zero()).then(|| peer.preshared_key.to_base64());
            let psk = psk.map(|text| text.to_string());
            write(of, Some(Key::PresharedKey), &Vec::from_iter(psk));
            write(of, Some(Key::Endpoint), &Vec::from_iter(peer.endpoint.map(|at| at.to_string())));
            let seconds = peer.persistent_keepalive;
            let seconds = (seconds != 0).then(|| seconds.to_string());
            write(of, Some(Key::PersistentKeepalive), &Vec::from_iter(seconds));
        }
        lines
    }

    /// The keys whose values differ, by peer.
    fn differing(before: &Wanted, after: &Wanted) -> BTreeSet<(Option<PublicKey>, &'static str)> {
        let mut keys = BTreeSet::new();
        let mut differ = |peer, key: Key, differs: bool| {
            if differs {
                keys.insert((peer, key.name()));
            }
        };
        differ(None, Key::PrivateKey, before.private_key != after.private_key);
        differ(None, Key::ListenPort, before.listen_port != after.listen_port);
        differ(None, Key::FwMark, before.fwmark != after.fwmark);
        differ(None, Key::Address, before.addresses != after.addresses);
        differ(None, Key::DNS, before.dns != after.dns);
        differ(None, Key::MTU, before.mtu != after.mtu);
        for one in &before.peers {
            let of = Some(one.public_key);
            let Some(other) = after.peers.iter().find(|peer| peer.public_key == one.public_key)
            else {
                continue;
            };
            differ(of, Key::AllowedIPs, one.allowed_ips != other.allowed_ips);
            differ(of, Key::PresharedKey, one.preshared_key != other.preshared_key);
            differ(of, Key::Endpoint, one.endpoint != other.endpoint);
            let seconds = |peer: &WantedPeer| peer.persistent_keepalive;
            differ(of, Key::PersistentKeepalive, seconds(one) != seconds(other));
        }
        keys
    }

    proptest! {
        #[test]
        fn an_edited_file_says_what_is_wanted_and_else_what_it_said(
            before in wanted(),
            mut after in wanted(),
            style in vec(any::<u8>(), 7..60),
            is_open in any::<bool>(),
            line_end in prop_oneof!["\n", "\r\n"],
        ) {
            let lines = written(&before, &style);
            let texts: Vec<&str> = lines.iter().map(|(_, _, text)| text.as_str()).collect();
            let mut text = texts.join(&line_end);
            if !is_open {
                text.push_str(&line_end);
            }
            prop_assert_eq!(&said(&text), &before);
            prop_assert_eq!(&edited(&text, &before), &text);

            // What cannot be wanted stays.
            after.listen_port = after.listen_port.or(before.listen_port);
            after.mtu = before.mtu.and(after.mtu.or(before.mtu));
            for peer in &mut after.peers {
                let known = before.peers.iter().find(|known| known.public_key == peer.public_key);
                peer.endpoint = peer.endpoint.or(known.and_then(|known| known.endpoint));
            }
            let once = edited(&text, &after);
            prop_assert_eq!(&said(&once), &after);
            prop_assert_eq!(&edited(&once, &after), &once);

            // Every other line is there, in the same order.
            let differing = differing(&before, &after);
            let mut left = once.split_inclusive('\n');
            for (peer, key, line) in &lines {
                let is_gone = peer.is_some_and(|peer| {
                    after.peers.iter().all(|kept| kept.public_key != peer)
                });
                // Blank lines and comments above a section that goes may go with it.
                let is_loose = key.is_none() && !line.starts_with('[');
                if is_gone || is_loose
                    || key.is_some_and(|key| differing.contains(&(*peer, key.name())))
                {
                    continue;
                }
                prop_assert!(
                    left.any(|found| found.trim_end_matches(['\r', '\n']) == line),
                    "`{}` of\n{}\nis not in\n{}", line, text, once
                );
            }
            // So is every comment if no peer goes.
            let is_kept = |peer: &WantedPeer| {
                after.peers.iter().any(|kept| kept.public_key == peer.public_key)
            };
            if before.peers.iter().all(is_kept) {
                let mut left = once.split_inclusive('\n');
                for line in texts.iter().filter(|line| line.starts_with('#')) {
                    let same = left.by_ref();
                    prop_assert!(same.any(|found| found.trim_end_matches(['\r', '\n']) == *line));
                }
            }
        }
    }
}
