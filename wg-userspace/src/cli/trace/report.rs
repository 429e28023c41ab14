//! What is said of a packet: as a value for `--json`, and as text, a line for each step.

use std::fmt::{self, Write as _};
use std::net::IpAddr;

use serde::Serialize;
use wg_common::nat::error::Error;
use wg_common::outcome::DropReason;

use super::super::nat::FlowReport;
use super::super::text::{Paint, bytes, plural};

/// What `tidegate trace --json` prints. Steps to which a packet does not come are `null`.
#[derive(Debug, Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TraceReport {
    /// The interface whose tunnel is asked about.
    pub interface: String,
    /// The packet.
    pub packet: PacketReport,
    /// How it comes in: `out_of_tunnel`, `by_link`, or `from_host` if it is the host's own.
    pub comes: Comes,
    /// The interface by which it comes in.
    pub comes_by: Option<String>,
    /// Of what comes out of the tunnel: who owns its source.
    pub from_peer: Option<PeerReport>,
    /// The worker that opens or seals it.
    pub worker: Option<WorkerReport>,
    /// Which way the kernel sends it.
    pub route: Option<RouteReport>,
    /// What NAT does with it.
    pub nat: Option<NatReport>,
    /// The `Allow` line that lets it begin a flow.
    pub rule: Option<RuleReport>,
    /// Its ends when they have been translated.
    pub becomes: Option<EndsReport>,
    /// Of what goes into the tunnel: who owns its destination then.
    pub to_peer: Option<PeerReport>,
    /// How it leaves this host.
    pub egress: Option<EgressReport>,
    /// What becomes of it.
    pub verdict: VerdictReport,
}

/// A packet.
#[derive(Debug, Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PacketReport {
    /// `tcp`, `udp` or `icmp` (echoes).
    pub protocol: &'static str,
    /// From whom, to whom.
    pub ends: EndsReport,
    /// The source port, or an echo's identifier, is one of those that nobody asked for.
    pub is_port_assumed: bool,
    /// Bytes, the IP header included.
    pub len: usize,
}

/// From whom, to whom.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct EndsReport {
    /// From whom.
    pub source: IpAddr,
    /// From which port; of an echo its identifier.
    pub source_port: u16,
    /// To whom.
    pub destination: IpAddr,
    /// To which port; nothing of an echo.
    pub destination_port: Option<u16>,
}

impl Default for EndsReport {
    fn default() -> Self {
        let none = IpAddr::from([0, 0, 0, 0]);
        Self { source: none, source_port: 0, destination: none, destination_port: None }
    }
}

impl fmt::Display for EndsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, source_port, destination, destination_port } = self;
        match destination_port {
            Some(port) => {
                let end = |ip: &IpAddr, port: u16| std::net::SocketAddr::new(*ip, port);
                write!(f, "{} -> {}", end(source, *source_port), end(destination, *port))
            }
            None => write!(f, "{source} -> {destination} (identifier {source_port})"),
        }
    }
}

/// How a packet comes in.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Comes {
    /// From a peer.
    #[default]
    OutOfTunnel,
    /// From another host.
    ByLink,
    /// From this host.
    FromHost,
}

/// A peer.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PeerReport {
    /// What it is called.
    pub name: Option<String>,
    /// Its public key.
    pub public_key: String,
    /// The prefix by which it owns the address.
    pub prefix: String,
    /// Where it is now.
    pub endpoint: Option<String>,
}

impl PeerReport {
    /// What people call it, or else its key.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.public_key)
    }
}

/// A worker.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct WorkerReport {
    /// Which one; nothing if that is not settled.
    pub number: Option<u16>,
    /// Why this one.
    pub why: String,
}

/// A route.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct RouteReport {
    /// Why there is none, if there is none: `no_route`, `unreachable`, `prohibited`, `blackhole_or_bad_source`,
    /// `reverse_path`.
    pub missing: Option<&'static str>,
    /// Whether it leads to this host.
    pub is_local: bool,
    /// The interface.
    pub link: Option<String>,
    /// The router, if there is one.
    pub router: Option<IpAddr>,
    /// The address that the host's own packets get there.
    pub own_source: Option<IpAddr>,
    /// The table that has it.
    pub table: Option<u32>,
}

/// What NAT does.
#[derive(Debug, Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct NatReport {
    /// `no_lines`: the interface has none; `no_program`: none where the packet comes in; `none`: no line is about it;
    /// `drops`: it is dropped before it has a flow; `flow`: it is of a flow that is there; `new_flow`: it begins one.
    pub state: NatState,
    /// The flow, if it is there.
    pub flow: Option<FlowReport>,
    /// The `Nat` or `Forward` line.
    pub line: Option<String>,
    /// The address that stands for the inner one.
    pub external: Option<IpAddr>,
    /// The port there, if that is settled; of an echo the identifier.
    pub external_port: Option<u16>,
    /// Else it is chosen at the first packet: the next one that is free now.
    pub next_port: Option<u16>,
    /// What counts it if it is not dropped.
    pub event: Option<&'static str>,
}

/// How far NAT is concerned.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum NatState {
    /// The interface has no lines.
    #[default]
    NoLines,
    /// No program looks at what comes in there.
    NoProgram,
    /// No line is about it.
    None,
    /// It is dropped before it has a flow.
    Drops,
    /// It is of a flow that is there.
    Flow,
    /// It begins one.
    NewFlow,
}

/// An `Allow` line.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct RuleReport {
    /// As in the file.
    pub line: String,
    /// How many flows it let begin so far.
    pub flows: u64,
}

/// A way out of this host.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct EgressReport {
    /// The interface.
    pub interface: String,
    /// Who gets it there; nothing in a tunnel.
    pub next_hop: Option<IpAddr>,
    /// That one's link address, if the kernel knows it.
    pub link_address: Option<String>,
    /// Most bytes of a packet there.
    pub mtu: u32,
    /// Whether the packet has no more.
    pub fits: bool,
}

/// What becomes of a packet.
#[derive(Debug, Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct VerdictReport {
    /// What.
    pub fate: Fate,
    /// Who drops it: `nat`, `tunnel` (the data path) or `kernel`.
    pub dropped_by: Option<&'static str>,
    /// Why: the name of the counter, if it is not the kernel that drops it.
    pub reason: Option<&'static str>,
    /// What its sender is told by ICMP, as often as that is allowed: `time_exceeded`, `too_big`.
    pub told: Option<&'static str>,
    /// How many bytes of a packet would fit, if its sender is told `too_big`.
    pub told_mtu: Option<u32>,
}

impl VerdictReport {
    /// It is dropped.
    pub const fn dropped(by: &'static str, reason: &'static str) -> Self {
        let fate = Fate::Dropped;
        Self { fate, dropped_by: Some(by), reason: Some(reason), told: None, told_mtu: None }
    }

    /// It is dropped by NAT, which tells its sender why.
    pub const fn told(error: Error) -> Self {
        let (reason, told, told_mtu) = match error {
            Error::TimeExceeded => (DropReason::HopLimit, "time_exceeded", None),
            Error::TooBig(mtu) => (DropReason::TooLarge, "too_big", Some(mtu)),
        };
        Self { told: Some(told), told_mtu, ..Self::dropped("nat", reason.name()) }
    }

    /// What its sender is told, as the end of a sentence.
    fn told_text(&self) -> String {
        match (self.told, self.told_mtu) {
            (Some("too_big"), Some(mtu)) => format!("; its sender is told that {mtu} bytes fit"),
            (Some(told), _) => format!("; its sender is told: {}", told.replace('_', " ")),
            (None, _) => String::new(),
        }
    }
}

/// In a word, what becomes of a packet.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Fate {
    /// It is translated and sent.
    Translated,
    /// It is sent as it is.
    Passes,
    /// This host takes it.
    Delivered,
    /// It is dropped.
    #[default]
    Dropped,
}

impl TraceReport {
    /// As text.
    pub fn text(&self, paint: Paint) -> String {
        let mut out = String::new();
        self.write(&mut out, paint).expect("a text takes everything");
        out
    }

    fn write(&self, out: &mut String, paint: Paint) -> fmt::Result {
        let Self { interface, packet, comes_by, .. } = self;
        let by = comes_by.as_deref().unwrap_or(interface);
        let comes = match self.comes {
            Comes::OutOfTunnel => format!("out of the tunnel {interface}"),
            Comes::ByLink => format!("in by {by}"),
            Comes::FromHost => "from this host".to_owned(),
        };
        write!(out, "{} {}", packet.protocol, packet.ends)?;
        if packet.is_port_assumed {
            let what =
                if packet.ends.destination_port.is_some() { "source port" } else { "identifier" };
            write!(out, ", {what} assumed")?;
        }
        writeln!(out, ", {} bytes, comes {comes}", packet.len)?;
        let mut line = |word: &str, value: &str| writeln!(out, "{}", step(paint, word, value));
        if let Some(peer) = &self.from_peer {
            line(
                "peer",
                &format!("{} owns {} by {}", peer.label(), packet.ends.source, peer.prefix),
            )?;
        } else if self.comes == Comes::OutOfTunnel {
            line("peer", &format!("nobody owns {}", packet.ends.source))?;
        }
        if self.comes == Comes::OutOfTunnel {
            self.worker.iter().try_for_each(|worker| line("worker", &worker.to_string()))?;
        }
        if let Some(route) = &self.route {
            line("route", &route.to_string())?;
        }
        if let Some(nat) = &self.nat {
            line("nat", &nat.text(self.comes, paint))?;
        }
        if let Some(rule) = &self.rule {
            let begun = plural(rule.flows, "flow");
            line("rule", &format!("`{}`, which let {begun} begin so far", rule.line))?;
        }
        if self.verdict.reason == Some("not_allowed") {
            line("rule", "no `#! Allow` line names it")?;
        }
        if let Some(ends) = &self.becomes {
            line("becomes", &ends.to_string())?;
        }
        if self.verdict.reason == Some("no_peer") {
            let to = self.becomes.as_ref().unwrap_or(&packet.ends).destination;
            line("peer", &format!("nobody owns {to}"))?;
        }
        if let Some(peer) = &self.to_peer {
            let to = self.becomes.as_ref().unwrap_or(&packet.ends).destination;
            line("peer", &format!("{} owns {to} by {}", peer.label(), peer.prefix))?;
        }
        if self.comes != Comes::OutOfTunnel {
            self.worker.iter().try_for_each(|worker| line("worker", &worker.to_string()))?;
        }
        if let Some(egress) = &self.egress {
            line("egress", &egress.text(packet.len))?;
        }
        let verdict = self.verdict.text(self);
        line("verdict", &verdict)
    }
}

/// Columns of what stands before a step's text.
const WORD_LEN: usize = 9;

fn step(paint: Paint, word: &str, value: &str) -> String {
    let space = " ".repeat(WORD_LEN.saturating_sub(word.len() + 1));
    format!("  {}:{space} {value}", paint.bold(word))
}

impl fmt::Display for WorkerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            Some(number) => write!(f, "{number}, {}", self.why),
            None => f.write_str(&self.why),
        }
    }
}

impl fmt::Display for RouteReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = self.missing {
            return write!(f, "none ({why})");
        }
        match (self.is_local, &self.link) {
            (true, _) => write!(f, "to this host")?,
            (false, Some(link)) => write!(f, "by {link}")?,
            (false, None) => write!(f, "to several")?,
        }
        if let Some(router) = self.router {
            write!(f, ", router {router}")?;
        }
        if let Some(source) = self.own_source {
            write!(f, ", own address {source}")?;
        }
        match self.table {
            None => Ok(()),
            Some(253) => write!(f, ", table default"),
            Some(254) => write!(f, ", table main"),
            Some(255) => write!(f, ", table local"),
            Some(table) => write!(f, ", table {table}"),
        }
    }
}

impl NatReport {
    fn text(&self, comes: Comes, paint: Paint) -> String {
        let line = self.line.as_ref().map_or(String::new(), |line| format!(" by `{line}`"));
        let mut text = match (self.state, &self.flow) {
            (NatState::NoLines, _) => return "no NAT here: the kernel's way".to_owned(),
            (NatState::NoProgram, _) if comes == Comes::FromHost => {
                return "not asked about what this host itself sends: the kernel's way".to_owned();
            }
            (NatState::NoProgram, _) => {
                return "no program looks at what comes in there: the kernel's way".to_owned();
            }
            (NatState::None, _) => return "no line is about it: the kernel's way".to_owned(),
            (NatState::Drops, _) => return "drops it".to_owned(),
            (NatState::NewFlow, _) => format!("a new flow{line}"),
            (NatState::Flow, None) => format!("a flow that is there{line}"),
            (NatState::Flow, Some(flow)) => {
                let (sent, received) = (bytes(flow.bytes_out, paint), bytes(flow.bytes_in, paint));
                let FlowReport { state, age_s, idle_s, .. } = flow;
                format!(
                    "a flow that is there{line}: {state}, {sent} out, {received} in, {age_s} s old, idle for \
                     {idle_s} s"
                )
            }
        };
        if let Some(external) = self.external {
            let stands = match (self.external_port, self.next_port) {
                (Some(port), _) => format!("; as {}", std::net::SocketAddr::new(external, port)),
                (None, Some(next)) => {
                    format!("; as {external}, port chosen at the first packet ({next} is next)")
                }
                (None, None) => format!("; as {external}, port chosen at the first packet"),
            };
            text += &stands;
        }
        text
    }
}

impl EgressReport {
    fn text(&self, len: usize) -> String {
        let Self { interface, next_hop, link_address, mtu, fits } = self;
        let mut text = interface.clone();
        if let Some(next_hop) = next_hop {
            let _ = match link_address {
                Some(address) => write!(text, " to {next_hop} ({address})"),
                None => write!(text, " to {next_hop} (its link address is not known yet)"),
            };
        }
        let fits = if *fits { "fits" } else { "does not fit" };
        let _ = write!(text, ", MTU {mtu}: a packet of {len} bytes {fits}");
        text
    }
}

impl VerdictReport {
    fn text(&self, report: &TraceReport) -> String {
        let goes = match &report.egress {
            Some(egress) if egress.interface == report.interface => "into the tunnel".to_owned(),
            Some(egress) => format!("out of {}", egress.interface),
            None => "on".to_owned(),
        };
        match (self.fate, self.dropped_by) {
            (Fate::Translated, _) => format!("translated, and sent {goes}"),
            (Fate::Passes, _) => {
                format!("passes, and goes {goes} as far as the kernel's firewall lets it")
            }
            (Fate::Delivered, _) => "for this host, as far as its firewall lets it in".to_owned(),
            (Fate::Dropped, by) => {
                let reason = self.reason.unwrap_or("unknown");
                let interface = &report.interface;
                match by {
                    Some("nat") => {
                        format!(
                            "dropped by NAT: {reason} (counted in `tidegate show {interface} nat`){}",
                            self.told_text()
                        )
                    }
                    Some("tunnel") => {
                        format!(
                            "dropped by the tunnel: {reason} (counted in `tidegate show {interface} --json`)"
                        )
                    }
                    _ => format!("dropped by the kernel: {reason}"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Paint = Paint { is_on: false };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    impl TraceReport {
        /// One with every step.
        pub fn full() -> Self {
            let peer = PeerReport {
                name: Some("laptop".to_owned()),
                public_key: "Dxb2eCff3wMzKu1p6E3nSAuuVwHtZ+tfrfHK1wXNl00=".to_owned(),
                prefix: "10.9.0.2/32".to_owned(),
                endpoint: Some("192.0.2.9:51820".to_owned()),
            };
            let ends = |source, source_port| EndsReport {
                source,
                source_port,
                destination: ip("198.51.100.7"),
                destination_port: Some(443),
            };
            TraceReport {
                interface: "wg0".to_owned(),
                packet: PacketReport {
                    protocol: "tcp",
                    ends: ends(ip("10.9.0.2"), 49152),
                    is_port_assumed: true,
                    len: 40,
                },
                comes: Comes::OutOfTunnel,
                comes_by: Some("wg0".to_owned()),
                from_peer: Some(peer.clone()),
                worker: Some(WorkerReport {
                    number: Some(1),
                    why: "where laptop is at home".to_owned(),
                }),
                route: Some(RouteReport {
                    missing: None,
                    is_local: false,
                    link: Some("eth0".to_owned()),
                    router: Some(ip("203.0.113.1")),
                    own_source: None,
                    table: Some(254),
                }),
                nat: Some(NatReport {
                    state: NatState::NewFlow,
                    line: Some("#! Nat = masquerade out=eth0".to_owned()),
                    external: Some(ip("203.0.113.9")),
                    next_port: Some(30000),
                    event: Some("translated_out"),
                    ..NatReport::default()
                }),
                rule: Some(RuleReport {
                    line: "#! Allow = 10.9.0.0/24 -> 0.0.0.0/0".to_owned(),
                    flows: 1,
                }),
                becomes: Some(ends(ip("203.0.113.9"), 30000)),
                to_peer: None,
                egress: Some(EgressReport {
                    interface: "eth0".to_owned(),
                    next_hop: Some(ip("203.0.113.1")),
                    link_address: Some("02:00:00:00:00:01".to_owned()),
                    mtu: 1500,
                    fits: true,
                }),
                verdict: VerdictReport { fate: Fate::Translated, ..VerdictReport::default() },
            }
        }
    }

    #[test]
    fn each_step_has_a_line() {
        insta::assert_snapshot!(TraceReport::full().text(PLAIN), @r"
        tcp 10.9.0.2:49152 -> 198.51.100.7:443, source port assumed, 40 bytes, comes out of the tunnel wg0
          peer:     laptop owns 10.9.0.2 by 10.9.0.2/32
          worker:   1, where laptop is at home
          route:    by eth0, router 203.0.113.1, table main
          nat:      a new flow by `#! Nat = masquerade out=eth0`; as 203.0.113.9, port chosen at the first packet (30000 is next)
          rule:     `#! Allow = 10.9.0.0/24 -> 0.0.0.0/0`, which let 1 flow begin so far
          becomes:  203.0.113.9:30000 -> 198.51.100.7:443
          egress:   eth0 to 203.0.113.1 (02:00:00:00:00:01), MTU 1500: a packet of 40 bytes fits
          verdict:  translated, and sent out of eth0
        ");
    }

    #[test]
    fn what_is_dropped_says_where_that_is_counted() {
        let mut report = TraceReport::full();
        report.comes = Comes::OutOfTunnel;
        (report.from_peer, report.worker, report.route, report.nat) = (None, None, None, None);
        (report.rule, report.becomes, report.egress) = (None, None, None);
        report.verdict = VerdictReport::dropped("tunnel", "source_not_allowed");
        insta::assert_snapshot!(report.text(PLAIN), @r"
        tcp 10.9.0.2:49152 -> 198.51.100.7:443, source port assumed, 40 bytes, comes out of the tunnel wg0
          peer:     nobody owns 10.9.0.2
          verdict:  dropped by the tunnel: source_not_allowed (counted in `tidegate show wg0 --json`)
        ");
    }

    #[test]
    fn who_is_told_why_is_said() {
        let told = |error| {
            let report = TraceReport { verdict: VerdictReport::told(error), ..TraceReport::full() };
            report.verdict.text(&report)
        };
        assert_eq!(
            told(Error::TooBig(1400)),
            "dropped by NAT: too_large (counted in `tidegate show wg0 nat`); its sender is told that 1400 bytes fit"
        );
        assert_eq!(
            told(Error::TimeExceeded),
            "dropped by NAT: hop_limit (counted in `tidegate show wg0 nat`); its sender is told: time exceeded"
        );
    }

    #[test]
    fn what_goes_into_the_tunnel_says_who_gets_it() {
        let mut report = TraceReport::full();
        report.comes = Comes::ByLink;
        report.comes_by = Some("eth0".to_owned());
        report.packet.protocol = "icmp";
        report.packet.ends = EndsReport {
            source: ip("2001:db8::1"),
            source_port: 7,
            destination: ip("fd09::2"),
            destination_port: None,
        };
        report.nat = Some(NatReport::default());
        (report.rule, report.becomes, report.route) = (None, None, None);
        report.to_peer = report.from_peer.take();
        report.egress = Some(EgressReport {
            interface: "wg0".to_owned(),
            next_hop: None,
            link_address: None,
            mtu: 1420,
            fits: true,
        });
        report.verdict = VerdictReport { fate: Fate::Passes, ..VerdictReport::default() };
        insta::assert_snapshot!(report.text(PLAIN), @r"
        icmp 2001:db8::1 -> fd09::2 (identifier 7), identifier assumed, 40 bytes, comes in by eth0
          nat:      no NAT here: the kernel's way
          peer:     laptop owns fd09::2 by 10.9.0.2/32
          worker:   1, where laptop is at home
          egress:   wg0, MTU 1420: a packet of 40 bytes fits
          verdict:  passes, and goes into the tunnel as far as the kernel's firewall lets it
        ");
    }
}
