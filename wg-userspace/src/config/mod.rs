//! The text of `wg0.conf`, as wg(8) and wg-quick(8) read it, and our `#!` lines in it.
//!
//! [`parse`] makes a [`Config`] in which every value knows where it stands, or says everything that
//! is wrong with the file at once. The layers, from text to meaning: `lines` (sections, entries, and
//! what may be shown of them), `keys` (names), `values` and `instructions` (of `#!` lines), and
//! `sections`, as wholes.
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
mod sections;
#[cfg(test)]
mod tests;
mod values;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use miette::NamedSource;
use serde::{Deserialize, Serialize};

pub use self::instructions::{
    Allow, Forward, Limit, NAME_LEN_MAX, Nat, NatSource, PortRange, Traffic, Transport,
    name_problem,
};
use self::keys::{Directive, Key};
use self::lines::{Line, Text, lines};
pub use self::problem::{ConfigErrors, Problem, Span};
use self::problem::{Mistake, Source};
use self::sections::{InterfaceDraft, Parser};
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
    pub endpoint: Option<Spanned<OwnEndpoint>>,
    /// `#! Xdp`
    pub xdp: Option<Spanned<Xdp>>,
    /// `#! Workers`, at least 1.
    pub workers: Option<Spanned<usize>>,
    /// `#! MssClamp`: whether the segment size that a SYN offers is lowered to what the tunnel carries; it is,
    /// unless this says otherwise.
    pub mss_clamp: Option<Spanned<bool>>,
    /// `#! CopyDscp`: whether outer headers get the DSCP of the packets in them; they do not, unless this says
    /// otherwise.
    pub copy_dscp: Option<Spanned<bool>>,
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

/// Where peers reach a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OwnEndpoint {
    /// The port in it says nothing.
    host: Endpoint,
    port: Option<u16>,
}

impl OwnEndpoint {
    /// At the host of `endpoint`, and at the port on which the device listens.
    pub const fn at_listen_port(endpoint: Endpoint) -> Self {
        Self { host: endpoint, port: None }
    }

    /// The port, if it is said: a router may forward it to the `ListenPort`. Not 0.
    pub const fn port(&self) -> Option<u16> {
        self.port
    }

    /// The same for a peer of a device that listens on `listen_port`.
    pub fn endpoint(&self, listen_port: u16) -> Endpoint {
        let port = self.port.unwrap_or(listen_port);
        match &self.host {
            Endpoint::Address(address) => Endpoint::Address(SocketAddr::new(address.ip(), port)),
            Endpoint::Host { host, .. } => Endpoint::Host { host: host.clone(), port },
        }
    }

    /// Its host, if it is an address.
    pub const fn address(&self) -> Option<IpAddr> {
        match &self.host {
            Endpoint::Address(address) => Some(address.ip()),
            Endpoint::Host { .. } => None,
        }
    }
}

impl FromStr for OwnEndpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        values::own_endpoint(Text::whole(text).trim())
            .map_err(|mistake| EndpointError(mistake.in_a_line()))
    }
}

impl fmt::Display for OwnEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(port) = self.port {
            return self.endpoint(port).fmt(f);
        }
        match &self.host {
            Endpoint::Address(address) if address.is_ipv4() => address.ip().fmt(f),
            Endpoint::Address(address) => write!(f, "[{}]", address.ip()),
            Endpoint::Host { host, .. } if host.contains(':') => write!(f, "[{host}]"),
            Endpoint::Host { host, .. } => host.fmt(f),
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
    /// Whether threads ask the NICs for packets themselves while they have work.
    pub busy_poll: bool,
    /// Whether rules of the host's firewall that XDP goes round may stay without effect.
    pub bypass_firewall: bool,
}

impl Xdp {
    /// What this version does not follow.
    fn later(&self) -> impl Iterator<Item = (Span, String)> {
        let queues = self.queues.as_ref();
        queues.map(|queues| (queues.span, "`queues=` of `Xdp`".to_owned())).into_iter()
    }
}

/// How datagrams come in.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Mode {
    /// The best that works.
    #[default]
    Auto,
    /// Native XDP in zero-copy mode.
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

    /// A value of no file.
    pub fn nowhere(value: T) -> Self {
        Self { value, span: Span::new(0.into(), 0) }
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
    /// `#! MssClamp`
    pub mss_clamp: Option<Spanned<bool>>,
    /// `#! CopyDscp`
    pub copy_dscp: Option<Spanned<bool>>,
    /// `#! Nat`, in the order of the file.
    pub nat: Vec<Spanned<Nat>>,
    /// `#! Forward`, in the order of the file.
    pub forward: Vec<Spanned<Forward>>,
    /// `#! Allow`, in the order of the file.
    pub allow: Vec<Spanned<Allow>>,
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
    let InterfaceDraft { xdp, workers, mss_clamp, copy_dscp, nat, forward, allow, .. } = interface;
    (Directives { xdp, workers, mss_clamp, copy_dscp, nat, forward, allow }, problems)
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

    /// Something that keeps the file from being followed: the places that show it, with what is to be said of
    /// each, and what to do about it.
    pub fn problem(
        &self,
        message: impl Into<String>,
        places: impl IntoIterator<Item = (Span, String)>,
        help: String,
    ) -> Problem {
        let mistake = Mistake::new(message).help(help);
        let mistake =
            places.into_iter().fold(mistake, |mistake, (span, text)| mistake.at(span, text));
        mistake.into_problem(&self.source)
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
