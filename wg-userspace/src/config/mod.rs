//! The text of `wg0.conf`, as wg(8) and wg-quick(8) read it, and our `#!` lines in it.
//!
//! [`parse`] makes a [`Config`] in which every value knows where it stands, or says everything that
//! is wrong with the file at once. The layers, from text to meaning: `lines` (sections, entries, and
//! what may be shown of them), `keys` (names), `values` and `instructions` (of `#!` lines), and here
//! the sections as wholes.
//!
//! This room opens no file, resolves no name and knows nothing of what runs. What it makes goes to
//! `device` (keys and peers) and to `cli` and `daemon` (all else).
//!
//! What differs from wg(8) and wg-quick(8), on purpose:
//! - A key that may stand once and stands twice is an error; there the last one counts.
//! - A file without `PrivateKey`, two peers with one key, and the own key as a peer are errors.
//! - Ports are numbers, never names of services.
//! - Lines that begin with `#!` are instructions to us. To wg(8) they are comments.
//! - `# friendly_name =` names a peer that has no `#! Name`. It is another program's: if it cannot be a
//!   name, or is another peer's already, it is a comment.

pub mod edit;
mod instructions;
mod keys;
mod lines;
mod problem;
#[cfg(test)]
mod tests;
mod values;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::net::SocketAddr;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use miette::NamedSource;
use serde::{Deserialize, Serialize};

use self::instructions::read;
pub use self::instructions::{
    Allow, Forward, Limit, NAME_LEN_MAX, Nat, NatSource, PortRange, Traffic, Transport,
    name_problem,
};
use self::keys::{Directive, Key, Section};
use self::lines::{Line, Text, lines};
pub use self::problem::{ConfigErrors, Problem, Span};
use self::problem::{Mistake, Source};
use crate::key::{PresharedKey, PrivateKey, PublicKey};

/// A file that makes sense. Values know where they stand.
#[derive(Debug)]
pub struct Config {
    /// The device itself.
    pub interface: Interface,
    /// In the order of the file.
    pub peers: Vec<PeerConfig>,
    source: Source,
}

/// What the file says of the device: its `[Interface]`.
#[derive(Debug)]
pub struct Interface {
    /// `PrivateKey`
    pub private_key: Spanned<PrivateKey>,
    /// Whether it stands in the file clamped, as every tool makes it.
    pub is_private_key_clamped: bool,
    /// `ListenPort`; 0: any.
    pub listen_port: Option<Spanned<u16>>,
    /// `FwMark`; 0: off.
    pub fwmark: Option<Spanned<u32>>,
    /// `Address`, host bits included.
    pub addresses: Vec<Spanned<IpNet>>,
    /// `DNS`: servers and search domains.
    pub dns: Vec<Spanned<String>>,
    /// `MTU`, in bytes.
    pub mtu: Option<Spanned<u16>>,
    /// `Table`
    pub table: Option<Spanned<Table>>,
    /// `PreUp`, `PostUp`, `PreDown` and `PostDown`, in the order of the file.
    pub hooks: Vec<Spanned<Hook>>,
    /// `SaveConfig`
    pub save_config: Option<Spanned<bool>>,
    /// `#! Endpoint`: where peers reach this device, for files that are written for them.
    pub endpoint: Option<Spanned<Endpoint>>,
    /// `#! Xdp`
    pub xdp: Option<Spanned<Xdp>>,
    /// `#! Workers`, at least 1.
    pub workers: Option<Spanned<usize>>,
    /// `#! Nat`, in the order of the file.
    pub nat: Vec<Spanned<Nat>>,
    /// `#! Forward`, in the order of the file.
    pub forward: Vec<Spanned<Forward>>,
    /// `#! Allow`, in the order of the file.
    pub allow: Vec<Spanned<Allow>>,
    /// `#! Metrics`: an address and a port, not 0.
    pub metrics: Option<Spanned<SocketAddr>>,
    /// What this version does not follow, where its names stand.
    later: Vec<Spanned<Directive>>,
}

/// What the file says of a peer: a `[Peer]`.
#[derive(Debug)]
pub struct PeerConfig {
    /// `PublicKey`
    pub public_key: Spanned<PublicKey>,
    /// `PresharedKey`; zero means none.
    pub preshared_key: Option<Spanned<PresharedKey>>,
    /// `AllowedIPs`, without host bits.
    pub allowed_ips: Vec<Spanned<IpNet>>,
    /// `Endpoint`
    pub endpoint: Option<Spanned<Endpoint>>,
    /// `PersistentKeepalive`, in seconds; 0: off.
    pub persistent_keepalive: Option<Spanned<u16>>,
    /// `#! Name`, or else `# friendly_name`. No other peer has it, and it [can be one](name_problem).
    pub name: Option<Spanned<String>>,
    /// `#! Limit`
    pub limit: Option<Spanned<Limit>>,
    later: Vec<Spanned<Directive>>,
}

/// Where a peer is first looked for.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Endpoint {
    /// An address and a port.
    Address(SocketAddr),
    /// A name to resolve, or an IPv6 address with a scope that is a name (`fe80::1%eth0`).
    Host {
        /// The name.
        host: String,
        /// The port, which is not 0.
        port: u16,
    },
}

/// Why a text is no endpoint.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct EndpointError(String);

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        values::endpoint(Text::whole(text).trim())
            .map_err(|mistake| EndpointError(mistake.in_a_line()))
    }
}

impl Endpoint {
    /// The port, which is not 0.
    pub const fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Host { port, .. } => *port,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Host { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// Which routing table gets the routes of allowed IPs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Table {
    /// The main table, and one of its own for /0.
    Auto,
    /// No routes.
    Off,
    /// A number, or a name of `rt_tables`.
    Of(String),
}

/// A command that wg-quick(8) runs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Hook {
    /// When it runs.
    pub event: HookEvent,
    /// What the shell gets, with `%i` in it.
    pub command: String,
}

/// When a [`Hook`] runs.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum HookEvent {
    /// Before the interface is up.
    PreUp,
    /// After the interface is up.
    PostUp,
    /// Before the interface is taken down.
    PreDown,
    /// After the interface was taken down.
    PostDown,
}

/// NICs that hand datagrams over by XDP.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Xdp {
    /// Names of NICs; at least one.
    pub interfaces: Vec<Spanned<String>>,
    /// How.
    pub mode: Option<Spanned<Mode>>,
    /// How many queues of each NIC, at least 1; `None`: all. This version does not follow it.
    pub queues: Option<Spanned<u32>>,
    /// Whether rules of the host's firewall that XDP goes round may stay without effect.
    pub bypass_firewall: bool,
}

impl Xdp {
    /// What this version does not follow.
    fn later(&self) -> impl Iterator<Item = (Span, String)> {
        let mode = self.mode.as_ref().filter(|mode| mode.value == Mode::ZeroCopy);
        let mode = mode.map(|mode| (mode.span, "`mode=zerocopy` of `Xdp`".to_owned()));
        let queues = self.queues.as_ref();
        let queues = queues.map(|queues| (queues.span, "`queues=` of `Xdp`".to_owned()));
        mode.into_iter().chain(queues)
    }
}

/// How datagrams come in.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Mode {
    /// The best that works.
    #[default]
    Auto,
    /// Native XDP in zero-copy mode. This version does not follow it.
    ZeroCopy,
    /// Native XDP in copy mode.
    Native,
    /// Ordinary UDP sockets only.
    Udp,
}

/// A value and where it stands in the file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Spanned<T> {
    /// The value.
    pub value: T,
    /// Where it stands.
    pub span: Span,
}

impl<T> Spanned<T> {
    /// A value that stands at `span`.
    pub const fn new(value: T, span: Span) -> Self {
        Self { value, span }
    }
}

impl<T> Deref for Spanned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// Reads a file; `name` is what errors call it.
///
/// # Errors
/// Everything that is wrong with it. No error shows a secret key, and neither does its `Debug`.
pub fn parse(name: &str, text: &str) -> Result<Config, ConfigErrors> {
    let shown = lines::redact(text);
    let mut parser = Parser::default();
    for line in lines(text, &shown) {
        parser.line(line);
    }
    parser.end_peer();
    if let Some(at) = text.find('\0') {
        // Whatever else is wrong with the line comes from this.
        let start = text[..at].rfind('\n').map_or(0, |end| end + 1);
        let end = text[at..].find('\n').map_or(text.len(), |len| at + len);
        parser.mistakes.retain(|mistake| !(start..end).contains(&mistake.offset()));
        parser.mistakes.push(
            Mistake::new("the file has a byte that is zero")
                .at(Span::new(at.into(), 1), "here")
                .help("for wg(8) the line ends here: write the line anew"),
        );
    }
    let source = Arc::new(NamedSource::new(name, shown));
    parser.finish(&source)
}

/// The text of a file as it may be shown: secrets are starred out, and control characters replaced.
/// Its length, its lines and the boundaries of its characters stay.
pub fn shown(text: &str) -> String {
    lines::redact(text)
}

/// What the `#!` lines of a file say of the device.
#[derive(Debug, Default)]
pub struct Directives {
    /// `#! Xdp`
    pub xdp: Option<Spanned<Xdp>>,
    /// `#! Workers`, at least 1.
    pub workers: Option<Spanned<usize>>,
}

/// Reads only what the `#!` lines of a file say of the device, for who leaves all else to wg-quick(8):
/// other lines may be wrong. `name` is what problems call the file.
///
/// A line that is wrong, or that this version cannot follow, is a problem and has no effect.
pub fn directives(name: &str, text: &str) -> (Directives, Vec<Problem>) {
    let shown = lines::redact(text);
    let mut parser = Parser::default();
    for line in lines(text, &shown) {
        match line {
            Line::Directive { .. } => parser.line(line),
            Line::Section { .. } | Line::BrokenSection(_) => {
                let mistake_count = parser.mistakes.len();
                parser.line(line);
                parser.mistakes.truncate(mistake_count);
            }
            Line::Entry { .. } | Line::FriendlyName(_) | Line::Stray(_) => {}
        }
    }
    let Parser { mut mistakes, interface, .. } = parser;
    let options = interface.xdp.iter().flat_map(|xdp| xdp.later());
    let later = interface.later.iter();
    let later = later.map(|directive| (directive.span, format!("`#! {}`", directive.name())));
    mistakes.extend(options.chain(later).map(|(span, what)| {
        Mistake::new(format!("{what} is not supported yet")).at(span, "not supported yet")
    }));
    mistakes.sort_by_key(Mistake::offset);
    let source = Arc::new(NamedSource::new(name, shown));
    let problems = mistakes.into_iter().map(|mistake| mistake.into_problem(&source)).collect();
    (Directives { xdp: interface.xdp, workers: interface.workers }, problems)
}

impl Config {
    /// The file's name and its text, with secrets starred out: what reports of it show.
    pub fn source(&self) -> &Arc<NamedSource<String>> {
        &self.source
    }

    /// Where something stands, for people: `file:line`.
    pub fn place(&self, span: Span) -> String {
        let text = self.source.inner().as_bytes();
        let before = &text[..span.offset().min(text.len())];
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        format!("{}:{line}", self.source.name())
    }

    /// What the file asks for and this version cannot do, in the order of the file.
    ///
    /// Who would act on the file has to refuse it if there is anything: a tunnel without its filter
    /// or its routes is not what was asked for.
    pub fn unsupported(&self) -> Vec<Problem> {
        const REMOVE: &str = "remove the line";

        let interface = &self.interface;
        let mut found: Vec<(Span, String, &str)> = Vec::new();
        for (span, what) in interface.xdp.iter().flat_map(|xdp| xdp.later()) {
            found.push((span, what, "remove the option"));
        }
        let later = self.peers.iter().flat_map(|peer| &peer.later);
        for directive in interface.later.iter().chain(later) {
            found.push((directive.span, format!("`#! {}`", directive.name()), REMOVE));
        }
        found.sort_by_key(|(span, ..)| span.offset());
        found
            .into_iter()
            .map(|(span, what, help)| {
                Mistake::new(format!("{what} is not supported yet"))
                    .at(span, "not supported yet")
                    .help(help)
                    .into_problem(&self.source)
            })
            .collect()
    }
}

impl HookEvent {
    /// Its key in the file.
    pub const fn name(self) -> &'static str {
        self.key().name()
    }

    const fn key(self) -> Key {
        match self {
            Self::PreUp => Key::PreUp,
            Self::PostUp => Key::PostUp,
            Self::PreDown => Key::PreDown,
            Self::PostDown => Key::PostDown,
        }
    }
}

/// The sections as far as they are read.
#[derive(Default)]
struct Parser {
    mistakes: Vec<Mistake>,
    current: Current,
    interface: InterfaceDraft,
    peers: Vec<PeerConfig>,
    /// Of peers without a name of ours, by their indexes.
    friendly_names: Vec<(usize, Spanned<String>)>,
    /// Where each public key stands first.
    public_keys: HashMap<PublicKey, Span>,
}

/// The section to which the next entry belongs.
#[derive(Default)]
enum Current {
    /// None so far.
    #[default]
    Start,
    Interface,
    Peer(Box<PeerDraft>),
    /// One that does not exist; what stands in it is passed over, since one error is enough.
    Unknown,
}

#[derive(Default)]
struct InterfaceDraft {
    /// Where its first header stands.
    header: Option<Span>,
    seen: Seen,
    private_key: Option<Spanned<PrivateKey>>,
    is_private_key_clamped: bool,
    listen_port: Option<Spanned<u16>>,
    fwmark: Option<Spanned<u32>>,
    addresses: Vec<Spanned<IpNet>>,
    dns: Vec<Spanned<String>>,
    mtu: Option<Spanned<u16>>,
    table: Option<Spanned<Table>>,
    hooks: Vec<Spanned<Hook>>,
    save_config: Option<Spanned<bool>>,
    endpoint: Option<Spanned<Endpoint>>,
    xdp: Option<Spanned<Xdp>>,
    workers: Option<Spanned<usize>>,
    nat: Vec<Spanned<Nat>>,
    forward: Vec<Spanned<Forward>>,
    allow: Vec<Spanned<Allow>>,
    metrics: Option<Spanned<SocketAddr>>,
    later: Vec<Spanned<Directive>>,
}

struct PeerDraft {
    header: Span,
    seen: Seen,
    public_key: Option<Spanned<PublicKey>>,
    preshared_key: Option<Spanned<PresharedKey>>,
    allowed_ips: Vec<Spanned<IpNet>>,
    endpoint: Option<Spanned<Endpoint>>,
    persistent_keepalive: Option<Spanned<u16>>,
    name: Option<Spanned<String>>,
    friendly_name: Option<Spanned<String>>,
    limit: Option<Spanned<Limit>>,
    later: Vec<Spanned<Directive>>,
}

impl PeerDraft {
    fn new(header: Span) -> Self {
        Self {
            header,
            seen: Seen::default(),
            public_key: None,
            preshared_key: None,
            allowed_ips: Vec::new(),
            endpoint: None,
            persistent_keepalive: None,
            name: None,
            friendly_name: None,
            limit: None,
            later: Vec::new(),
        }
    }
}

/// Which names a section has had, and where, even if their values were wrong.
#[derive(Default)]
struct Seen {
    keys: Vec<(Key, Span)>,
    directives: Vec<(Directive, Span)>,
}

/// Notes a name, or says where it stood before.
fn note<T: Copy + PartialEq>(seen: &mut Vec<(T, Span)>, name: T, at: Span) -> Result<(), Span> {
    match seen.iter().find(|(known, _)| *known == name) {
        Some(&(_, first)) => Err(first),
        None => {
            seen.push((name, at));
            Ok(())
        }
    }
}

/// A name that stands in a section once too often.
fn twice(name: &str, first: Span, again: Span) -> Mistake {
    Mistake::new(format!("`{name}` is set twice"))
        .at(again, "again here")
        .at(first, "first here")
        .help("keep one of the two lines")
}

/// A name in a section where it has no meaning.
fn misplaced(name: &str, at: Span, section: Section) -> Mistake {
    let article = match section {
        Section::Interface => "the",
        Section::Peer => "a",
    };
    Mistake::new(format!("`{name}` does not belong here"))
        .at(at, format!("`{name}` belongs into [{}]", section.name()))
        .help(format!("move the line below {article} [{}] header", section.name()))
}

impl Parser {
    fn line(&mut self, line: Line<'_>) {
        let outcome = match line {
            Line::Section { name } => self.section(name),
            Line::BrokenSection(text) => {
                self.end_peer();
                self.current = Current::Unknown;
                Err(Mistake::new(format!("`{}` is not a section", text.quoted()))
                    .at(text.span(), "a section is a name in brackets, alone in its line")
                    .help("sections are [Interface] and [Peer]"))
            }
            Line::Entry { key, value } => self.entry(key, value),
            Line::Directive { key, value } => self.directive(key, value),
            Line::FriendlyName(name) => {
                if let Current::Peer(peer) = &mut self.current {
                    peer.friendly_name = Some(Spanned::new(name.raw.to_owned(), name.span()));
                }
                Ok(())
            }
            Line::Stray(text) => Err(stray(text)),
        };
        self.mistakes.extend(outcome.err());
    }

    fn section(&mut self, name: Text<'_>) -> Result<(), Mistake> {
        self.end_peer();
        match Section::find(name.raw) {
            Some(Section::Interface) => {
                // A second [Interface] continues the first one, as for wg(8).
                self.interface.header.get_or_insert(name.span());
                self.current = Current::Interface;
            }
            Some(Section::Peer) => {
                self.current = Current::Peer(Box::new(PeerDraft::new(name.span())));
            }
            None => {
                self.current = Current::Unknown;
                let networkd = ["NetDev", "WireGuard", "WireGuardPeer", "Match", "Network"];
                let is_networkd = networkd.iter().any(|known| name.raw.eq_ignore_ascii_case(known));
                return Err(Mistake::new(format!("unknown section [{}]", name.quoted()))
                    .at(name.span(), "not a section of wg(8)")
                    .help(match Section::nearest(name.raw) {
                        _ if is_networkd => "files of systemd-networkd are not read: sections \
                                             are [Interface] and [Peer]"
                            .to_owned(),
                        Some(section) => format!("did you mean [{}]?", section.name()),
                        None => "sections are [Interface] and [Peer]".to_owned(),
                    }));
            }
        }
        Ok(())
    }

    fn entry(&mut self, name: Text<'_>, value: Text<'_>) -> Result<(), Mistake> {
        let (section, seen) = match &mut self.current {
            Current::Unknown => return Ok(()),
            Current::Start => {
                return Err(Mistake::new(format!("`{}` stands in no section", name.quoted()))
                    .at(name.span(), "there is no section above this line")
                    .help(match Key::find(name.raw) {
                        Some(key) => format!("write [{}] above it", key.section().name()),
                        None => "write [Interface] or [Peer] above it".to_owned(),
                    }));
            }
            Current::Interface => (Section::Interface, &mut self.interface.seen),
            Current::Peer(peer) => (Section::Peer, &mut peer.seen),
        };
        let Some(key) = Key::find(name.raw) else { return Err(unknown_key(name, section)) };
        if key.section() != section {
            return Err(misplaced(key.name(), name.span(), key.section()));
        }
        if !key.repeats()
            && let Err(first) = note(&mut seen.keys, key, name.span())
        {
            return Err(twice(key.name(), first, name.span()));
        }
        if value.is_empty() && !key.may_be_empty() {
            return Err(Mistake::new(format!("`{}` has no value", key.name()))
                .at(name.span(), "nothing stands after `=`")
                .help("write a value, or remove the line"));
        }
        let mistake_count = self.mistakes.len();
        match &mut self.current {
            Current::Interface => {
                self.interface.entry(key, value, &mut self.mistakes);
            }
            Current::Peer(peer) => peer.entry(key, value, &mut self.mistakes),
            Current::Start | Current::Unknown => unreachable!("handled above"),
        }
        let is_quote = |c: char| matches!(c, '"' | '\'' | '`' | '‘'..='‟' | '«' | '»');
        if value.raw.starts_with(is_quote) || value.raw.ends_with(is_quote) {
            for mistake in &mut self.mistakes[mistake_count..] {
                mistake.set_help("write the value without quotation marks");
            }
        }
        Ok(())
    }

    fn directive(&mut self, name: Text<'_>, value: Option<Text<'_>>) -> Result<(), Mistake> {
        let (section, seen) = match &mut self.current {
            Current::Unknown => return Ok(()),
            Current::Start => (None, None),
            Current::Interface => (Some(Section::Interface), Some(&mut self.interface.seen)),
            Current::Peer(peer) => (Some(Section::Peer), Some(&mut peer.seen)),
        };
        let word = name.before(' ');
        let Some(directive) = Directive::find(name.raw).or_else(|| Directive::find(word.raw))
        else {
            // Only what looks like `word = value` is a mistake; prose and `#!/bin/sh` are comments.
            let is_word = !name.is_empty() && name.raw.chars().all(|c| c.is_ascii_alphanumeric());
            return if is_word && value.is_some() {
                Err(unknown_directive(name, section.unwrap_or(Section::Interface)))
            } else {
                Ok(())
            };
        };
        let (Some(section), Some(seen)) = (section, seen) else {
            return Err(Mistake::new(format!("`#! {}` stands in no section", directive.name()))
                .at(name.span(), "there is no section above this line")
                .help(format!("move the line below [{}]", directive.section().name())));
        };
        if directive.section() != section {
            return Err(misplaced(directive.name(), name.span(), directive.section()));
        }
        if !directive.repeats()
            && let Err(first) = note(&mut seen.directives, directive, name.span())
        {
            return Err(twice(directive.name(), first, name.span()));
        }
        let value = match value {
            Some(value) if !value.is_empty() && Directive::find(name.raw).is_some() => value,
            _ => {
                return Err(Mistake::new(format!("`#! {}` has no value", directive.name()))
                    .at(name.span(), format!("expected `#! {} = value`", directive.name()))
                    .help(
                        "`#!` lines are instructions to Tidegate; a plain comment begins with `#`",
                    ));
            }
        };
        let later = (!directive.is_built()).then(|| Spanned::new(directive, name.span()));
        match &mut self.current {
            Current::Peer(peer) => {
                peer.directive(directive, value)?;
                peer.later.extend(later);
            }
            _ => {
                self.interface.directive(directive, value)?;
                self.interface.later.extend(later);
            }
        }
        Ok(())
    }

    /// Completes the [Peer] that is being read, if any.
    fn end_peer(&mut self) {
        let Current::Peer(peer) = std::mem::take(&mut self.current) else { return };
        let Some(public_key) = peer.public_key else {
            if !peer.seen.keys.iter().any(|(key, _)| *key == Key::PublicKey) {
                self.mistakes.push(
                    Mistake::new("a peer has no `PublicKey`")
                        .at(peer.header, "this peer")
                        .help("write `PublicKey = ` and the peer's public key below it"),
                );
            }
            return;
        };
        match self.public_keys.entry(public_key.value) {
            Entry::Vacant(entry) => {
                entry.insert(public_key.span);
            }
            Entry::Occupied(entry) => {
                self.mistakes.push(
                    Mistake::new("two peers have the same `PublicKey`")
                        .at(public_key.span, "again here")
                        .at(*entry.get(), "first here")
                        .help("make one [Peer] of the two, or correct one of the keys"),
                );
            }
        }
        if let (None, Some(name)) = (&peer.name, peer.friendly_name) {
            self.friendly_names.push((self.peers.len(), name));
        }
        self.peers.push(PeerConfig {
            public_key,
            preshared_key: peer.preshared_key,
            allowed_ips: peer.allowed_ips,
            endpoint: peer.endpoint,
            persistent_keepalive: peer.persistent_keepalive,
            name: peer.name,
            limit: peer.limit,
            later: peer.later,
        });
    }

    /// Sees to it that no two peers have the same name.
    fn end_names(&mut self) {
        let mut names: HashMap<String, Span> = HashMap::new();
        for name in self.peers.iter().filter_map(|peer| peer.name.as_ref()) {
            match names.entry(name.value.clone()) {
                Entry::Vacant(entry) => {
                    entry.insert(name.span);
                }
                Entry::Occupied(entry) => self.mistakes.push(
                    Mistake::new("two peers have the same name")
                        .at(name.span, "again here")
                        .at(*entry.get(), "first here")
                        .help("give one of the two peers another `#! Name`"),
                ),
            }
        }
        for (index, name) in std::mem::take(&mut self.friendly_names) {
            if name_problem(&name.value).is_none()
                && let Entry::Vacant(entry) = names.entry(name.value.clone())
            {
                entry.insert(name.span);
                self.peers[index].name = Some(name);
            }
        }
    }

    fn finish(mut self, source: &Source) -> Result<Config, ConfigErrors> {
        self.end_names();
        let draft = self.interface;
        if let Some(private_key) = &draft.private_key {
            self.mistakes.extend(own_key_as_peer(private_key, &self.public_keys));
        } else if !draft.seen.keys.iter().any(|(key, _)| *key == Key::PrivateKey) {
            let help = "write `PrivateKey = ` and a key of `tidegate genkey` below [Interface]";
            self.mistakes.push(match draft.header {
                Some(header) => Mistake::new("the interface has no `PrivateKey`")
                    .at(header, "this interface")
                    .help(help),
                None => Mistake::new("the file has no [Interface]")
                    .at(Span::new(0.into(), 0), "in this file")
                    .help(help),
            });
        }
        self.mistakes.sort_by_key(Mistake::offset);
        let problems = self.mistakes.into_iter().map(|mistake| mistake.into_problem(source));
        if let Some(errors) = ConfigErrors::new(problems.collect()) {
            return Err(errors);
        }
        let interface = Interface {
            private_key: draft.private_key.expect("without one there was a mistake"),
            is_private_key_clamped: draft.is_private_key_clamped,
            listen_port: draft.listen_port,
            fwmark: draft.fwmark,
            addresses: draft.addresses,
            dns: draft.dns,
            mtu: draft.mtu,
            table: draft.table,
            hooks: draft.hooks,
            save_config: draft.save_config,
            endpoint: draft.endpoint,
            xdp: draft.xdp,
            workers: draft.workers,
            nat: draft.nat,
            forward: draft.forward,
            allow: draft.allow,
            metrics: draft.metrics,
            later: draft.later,
        };
        Ok(Config { interface, peers: self.peers, source: Arc::clone(source) })
    }
}

/// Puts a value in its place, or its mistake among the others.
fn put<T>(
    place: &mut Option<Spanned<T>>,
    value: Text<'_>,
    outcome: Result<T, Mistake>,
    mistakes: &mut Vec<Mistake>,
) {
    match outcome {
        Ok(parsed) => *place = Some(Spanned::new(parsed, value.span())),
        Err(mistake) => mistakes.push(mistake),
    }
}

impl InterfaceDraft {
    /// Takes the value of a key of this section.
    fn entry(&mut self, key: Key, value: Text<'_>, mistakes: &mut Vec<Mistake>) {
        let hook = |event| Hook { event, command: value.raw.to_owned() };
        let hook = match key {
            Key::PrivateKey => {
                let parsed = values::key(key, value, PrivateKey::from_base64);
                self.is_private_key_clamped = values::is_clamped(value);
                return put(&mut self.private_key, value, parsed, mistakes);
            }
            Key::ListenPort => {
                return put(&mut self.listen_port, value, values::listen_port(value), mistakes);
            }
            Key::FwMark => return put(&mut self.fwmark, value, values::fwmark(value), mistakes),
            Key::MTU => return put(&mut self.mtu, value, values::mtu(value), mistakes),
            Key::Table => return put(&mut self.table, value, values::table(value), mistakes),
            Key::SaveConfig => {
                return put(&mut self.save_config, value, values::save_config(value), mistakes);
            }
            Key::Address => {
                for word in values::words(value) {
                    match values::network(word) {
                        Ok(address) => self.addresses.push(Spanned::new(address, word.span())),
                        Err(mistake) => mistakes.push(mistake),
                    }
                }
                return;
            }
            Key::DNS => {
                let owned = |word: Text<'_>| Spanned::new(word.raw.to_owned(), word.span());
                return self.dns.extend(values::words(value).map(owned));
            }
            Key::PreUp => hook(HookEvent::PreUp),
            Key::PostUp => hook(HookEvent::PostUp),
            Key::PreDown => hook(HookEvent::PreDown),
            Key::PostDown => hook(HookEvent::PostDown),
            Key::PublicKey
            | Key::PresharedKey
            | Key::AllowedIPs
            | Key::Endpoint
            | Key::PersistentKeepalive => unreachable!("keys of other sections are refused before"),
        };
        if !value.is_empty() {
            self.hooks.push(Spanned::new(hook, value.span()));
        }
    }

    /// Takes the value of an instruction of this section.
    fn directive(&mut self, directive: Directive, value: Text<'_>) -> Result<(), Mistake> {
        let span = value.span();
        match directive {
            Directive::Endpoint => {
                self.endpoint = Some(Spanned::new(values::endpoint(value)?, span));
            }
            Directive::Xdp => self.xdp = Some(Spanned::new(values::xdp(value)?, span)),
            Directive::Workers => self.workers = Some(Spanned::new(values::workers(value)?, span)),
            Directive::Nat => self.nat.push(Spanned::new(read::nat(value)?, span)),
            Directive::Forward => self.forward.push(Spanned::new(read::forward(value)?, span)),
            Directive::Allow => self.allow.push(Spanned::new(read::allow(value)?, span)),
            Directive::Metrics => self.metrics = Some(Spanned::new(read::metrics(value)?, span)),
            Directive::Dashboard => {}
            Directive::Name | Directive::Limit => {
                unreachable!("instructions of other sections are refused before")
            }
        }
        Ok(())
    }
}

impl PeerDraft {
    /// Takes the value of a key of this section.
    fn entry(&mut self, key: Key, value: Text<'_>, mistakes: &mut Vec<Mistake>) {
        match key {
            Key::PublicKey => {
                let parsed = values::key(key, value, PublicKey::from_base64);
                put(&mut self.public_key, value, parsed, mistakes);
            }
            Key::PresharedKey => {
                let parsed = values::key(key, value, PresharedKey::from_base64);
                put(&mut self.preshared_key, value, parsed, mistakes);
            }
            Key::Endpoint => put(&mut self.endpoint, value, values::endpoint(value), mistakes),
            Key::PersistentKeepalive => {
                let parsed = values::persistent_keepalive(value);
                put(&mut self.persistent_keepalive, value, parsed, mistakes);
            }
            Key::AllowedIPs => {
                for item in values::networks(value) {
                    match item {
                        Ok(net) => {
                            self.allowed_ips.push(Spanned::new(net.value.trunc(), net.span));
                        }
                        Err(mistake) => mistakes.push(mistake),
                    }
                }
            }
            _ => unreachable!("keys of other sections are refused before"),
        }
    }
}

impl PeerDraft {
    /// Takes the value of an instruction of this section.
    fn directive(&mut self, directive: Directive, value: Text<'_>) -> Result<(), Mistake> {
        let span = value.span();
        match directive {
            Directive::Name => self.name = Some(Spanned::new(read::name(value)?, span)),
            Directive::Limit => self.limit = Some(Spanned::new(read::limit(value)?, span)),
            _ => unreachable!("instructions of other sections are refused before"),
        }
        Ok(())
    }
}

/// A line that is nothing.
fn stray(text: Text<'_>) -> Mistake {
    let word = text.before(' ').before('\t').before(':').trim();
    let mistake = Mistake::new("this line is neither a section nor `Key = value`")
        .at(text.span(), "expected `Key = value`");
    match Key::find(word.raw) {
        Some(key) => mistake.help(format!("write `{} = ` and the value", key.name())),
        None => mistake.help("a comment begins with `#`"),
    }
}

fn unknown_key(name: Text<'_>, section: Section) -> Mistake {
    let mistake = Mistake::new(format!("unknown key `{}`", name.quoted()))
        .at(name.span(), format!("not a key of [{}]", section.name()));
    if let Some(directive) = Directive::find(name.raw) {
        let name = directive.name();
        return mistake.help(format!("keys of Tidegate stand behind `#!`: write `#! {name} = …`"));
    }
    const OF_AMNEZIA: [&str; 9] = ["Jc", "Jmin", "Jmax", "S1", "S2", "H1", "H2", "H3", "H4"];
    if OF_AMNEZIA.iter().any(|known| name.raw.eq_ignore_ascii_case(known)) {
        return mistake.help(
            "AmneziaWG has this key; it speaks another protocol, which WireGuard does not understand",
        );
    }
    match Key::nearest(name.raw, section) {
        Some(key) if key.section() == section => {
            mistake.help(format!("did you mean `{}`?", key.name()))
        }
        Some(key) => {
            let other = key.section().name();
            mistake.help(format!("did you mean `{}`, which belongs into [{other}]?", key.name()))
        }
        None => {
            let own = Key::ALL.iter().filter(|key| key.section() == section);
            let names: Vec<_> = own.map(|key| key.name()).collect();
            mistake.help(format!("keys of [{}]: {}", section.name(), names.join(", ")))
        }
    }
}

fn unknown_directive(name: Text<'_>, section: Section) -> Mistake {
    let mistake = Mistake::new(format!("unknown instruction `#! {}`", name.quoted()))
        .at(name.span(), "not an instruction to Tidegate");
    match Directive::nearest(name.raw, section) {
        Some(directive) => mistake.help(format!("did you mean `#! {}`?", directive.name())),
        None => mistake.help("to make it a comment, begin the line with `# `"),
    }
}

/// The mistakes of naming oneself as a peer, or of giving a peer one's private key.
fn own_key_as_peer(
    private_key: &Spanned<PrivateKey>,
    public_keys: &HashMap<PublicKey, Span>,
) -> Vec<Mistake> {
    let mut mistakes = Vec::new();
    if let Some(&span) = public_keys.get(&private_key.public_key()) {
        mistakes.push(
            Mistake::new("a peer has the key of this interface")
                .at(span, "this is the public key of the interface itself")
                .at(private_key.span, "it belongs to this key")
                .help("write the public key of the other side, or remove the peer"),
        );
    }
    if let Some(&span) = public_keys.get(&PublicKey::from_bytes(*private_key.expose())) {
        mistakes.push(
            Mistake::new("a peer's `PublicKey` is the private key of this interface")
                .at(span, "a secret does not belong here")
                .at(private_key.span, "the same as here")
                .help("write the peer's public key; make a new private key if this one got about"),
        );
    }
    mistakes
}
