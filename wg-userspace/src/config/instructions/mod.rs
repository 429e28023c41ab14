//! `#!` lines: what they ask for, as values, each of which prints as the text that it is read from.
//!
//! [`read`](self::read) makes them of text. Who carries them out is not known here.

pub(super) mod read;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::{Directive, Interface, Mode, PeerConfig, Spanned, Xdp};
use crate::key::PublicKey;

/// `#! Nat`: packets that go out of a NIC get another source address.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Nat {
    /// Which address they get.
    pub source: NatSource,
    /// The NIC.
    pub out: Spanned<String>,
    /// Whose packets, without host bits; `None`: whatever comes out of the tunnel.
    pub from: Option<Spanned<IpNet>>,
    /// Rules of the firewall that these packets go round may be without effect.
    pub bypass_firewall: bool,
}

/// The source address that packets get.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NatSource {
    /// The NIC's own.
    Masquerade,
    /// One of these, of the packet's family; at least one, none of them twice.
    Snat(Vec<Spanned<IpAddr>>),
}

/// `#! Forward`: what comes to a port of a NIC goes to somebody else.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Forward {
    /// The protocol.
    pub transport: Spanned<Transport>,
    /// The NIC.
    pub interface: Spanned<String>,
    /// The port there, not 0.
    pub port: Spanned<u16>,
    /// Where it goes; the port is not 0.
    pub to: Spanned<SocketAddr>,
    /// Rules of the firewall that these packets go round may be without effect.
    pub bypass_firewall: bool,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    /// TCP
    Tcp,
    /// UDP
    Udp,
}

/// `#! Allow`: who may send what to whom through the tunnel. Any such line denies all else.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Allow {
    /// Who, without host bits.
    pub from: Spanned<IpNet>,
    /// To whom, without host bits; of the same family.
    pub to: Spanned<IpNet>,
    /// What.
    pub traffic: Traffic,
}

/// What an [`Allow`] lets pass.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Traffic {
    /// Everything.
    All,
    /// To these ports; to all if there are none.
    To(Spanned<Transport>, Vec<Spanned<PortRange>>),
    /// ICMP; for IPv6 ICMPv6.
    Icmp,
}

/// Ports from the first to the last, which may be the same; not 0.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PortRange {
    /// The first one.
    pub first: u16,
    /// The last one, not below.
    pub last: u16,
}

/// `#! Limit`: the most that a peer may send, and be sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limit {
    /// Bits per second: 1000 to 10¹².
    pub bits_per_s: u64,
}

/// The word that lets packets go round the firewall.
const BYPASS_FIREWALL: &str = "bypass-firewall";
/// The word that has threads ask NICs for packets.
pub(super) const BUSY_POLL: &str = "busy-poll";

/// What a switch says.
const ON: &str = "on";
const OFF: &str = "off";

/// Most characters of a peer's name.
pub const NAME_CHARS_MAX: usize = 63;
/// Most bytes of a peer's name.
pub const NAME_LEN_MAX: usize = NAME_CHARS_MAX * 4;

/// What keeps a text from being a peer's name, if anything does: it must stand in a line of a file and
/// in one of a terminal, and not be taken for a key.
pub fn name_problem(text: &str) -> Option<&'static str> {
    let turns_text = |c: char| matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
    if text.is_empty() || text.chars().count() > NAME_CHARS_MAX {
        Some("a name has 1 to 63 characters")
    } else if text.contains(|c: char| c.is_control() || turns_text(c)) {
        Some("a name has no control characters")
    } else if text.trim() != text {
        Some("a name neither begins nor ends with a blank")
    } else if text.contains('#') {
        Some("a name has no `#`, which begins a comment")
    } else if PublicKey::from_base64(text).is_ok() {
        Some("this is a key, and no name")
    } else {
        None
    }
}

impl Interface {
    /// Its `#!` lines, as text that says the same, in the order of the file.
    pub fn instructions(&self) -> Vec<Spanned<String>> {
        let mut all = Vec::new();
        let endpoint = self.endpoint.as_ref();
        all.extend(endpoint.map(|endpoint| line(Directive::Endpoint, endpoint)));
        all.extend(self.xdp.as_ref().map(|xdp| line(Directive::Xdp, xdp)));
        all.extend(self.workers.as_ref().map(|workers| line(Directive::Workers, workers)));
        let switches =
            [(Directive::MssClamp, &self.mss_clamp), (Directive::CopyDscp, &self.copy_dscp)];
        for (directive, switch) in switches {
            let switch = switch.as_ref();
            let word = switch.map(|is| Spanned::new(if is.value { ON } else { OFF }, is.span));
            all.extend(word.map(|word| line(directive, &word)));
        }
        all.extend(self.nat.iter().map(|nat| line(Directive::Nat, nat)));
        all.extend(self.forward.iter().map(|forward| line(Directive::Forward, forward)));
        all.extend(self.allow.iter().map(|allow| line(Directive::Allow, allow)));
        all.extend(self.metrics.as_ref().map(|metrics| line(Directive::Metrics, metrics)));
        all.sort_by_key(|line| line.span.offset());
        all
    }
}

impl PeerConfig {
    /// Its `#!` lines, as text that says the same, in the order of the file.
    pub fn instructions(&self) -> Vec<Spanned<String>> {
        let mut all = Vec::new();
        all.extend(self.name.as_ref().map(|name| line(Directive::Name, name)));
        all.extend(self.limit.as_ref().map(|limit| line(Directive::Limit, limit)));
        all.sort_by_key(|line| line.span.offset());
        all
    }
}

fn line<T: fmt::Display>(directive: Directive, value: &Spanned<T>) -> Spanned<String> {
    Spanned::new(format!("#! {} = {}", directive.name(), value.value), value.span)
}

/// With this between them.
fn joined<T: fmt::Display>(values: &[Spanned<T>], between: &str) -> String {
    let texts: Vec<String> = values.iter().map(|value| value.value.to_string()).collect();
    texts.join(between)
}

impl Nat {
    /// Whether it is for packets of IPv4, or else of IPv6. A NIC's own address stands for IPv6 only where
    /// somebody asks for that.
    pub fn is_for(&self, is_ipv4: bool) -> bool {
        match (&self.from, &self.source) {
            (Some(from), _) => from.addr().is_ipv4() == is_ipv4,
            (None, NatSource::Masquerade) => is_ipv4,
            (None, NatSource::Snat(to)) => to.iter().any(|ip| ip.is_ipv4() == is_ipv4),
        }
    }
}

fn write_bypass(f: &mut fmt::Formatter<'_>, is_set: bool) -> fmt::Result {
    if is_set { write!(f, " {BYPASS_FIREWALL}") } else { Ok(()) }
}

impl fmt::Display for Nat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let out = &self.out.value;
        match &self.source {
            NatSource::Masquerade => write!(f, "masquerade out={out}")?,
            NatSource::Snat(to) => write!(f, "snat out={out} to={}", joined(to, ","))?,
        }
        if let Some(from) = &self.from {
            write!(f, " from={}", from.value)?;
        }
        write_bypass(f, self.bypass_firewall)
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { transport, interface, port, to, bypass_firewall } = self;
        let (transport, interface) = (transport.value, &interface.value);
        write!(f, "{transport} {interface}:{} -> {}", port.value, to.value)?;
        write_bypass(f, *bypass_firewall)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for Allow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.from.value, self.to.value)?;
        match &self.traffic {
            Traffic::All => Ok(()),
            Traffic::To(transport, ports) if ports.is_empty() => write!(f, " {}", transport.value),
            Traffic::To(transport, ports) => {
                write!(f, " {} {}", transport.value, joined(ports, ","))
            }
            Traffic::Icmp => f.write_str(" icmp"),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last } = self;
        if first == last { write!(f, "{first}") } else { write!(f, "{first}-{last}") }
    }
}

/// Units of a [`Limit`], the largest first.
const UNITS: [(&str, u64); 3] = [("gbit", 1_000_000_000), ("mbit", 1_000_000), ("kbit", 1000)];

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.bits_per_s;
        match UNITS.iter().find(|(_, factor)| bits.is_multiple_of(*factor)) {
            Some((unit, factor)) => write!(f, "{}{unit}", bits / factor),
            None => {
                let decimals = format!("{:03}", bits % 1000);
                write!(f, "{}.{}kbit", bits / 1000, decimals.trim_end_matches('0'))
            }
        }
    }
}

impl fmt::Display for Xdp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&joined(&self.interfaces, ","))?;
        if let Some(mode) = &self.mode {
            write!(f, " mode={}", mode.value)?;
        }
        if let Some(queues) = &self.queues {
            write!(f, " queues={}", queues.value)?;
        }
        if self.busy_poll {
            write!(f, " {BUSY_POLL}")?;
        }
        write_bypass(f, self.bypass_firewall)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::ZeroCopy => "zerocopy",
            Self::Native => "native",
            Self::Udp => "udp",
        })
    }
}
