//! `trace`: what would become of a packet, step by step.
//!
//! Nothing of it is thought out here a second time: the kernel is asked for its routes, and NAT's own
//! [`engine`](wg_common::nat::engine) judges a packet that is made up, over the tables that its programs have
//! ([`imagined`]). Nothing is written, and nothing is sent.

mod imagined;
mod packet;
mod report;

use std::cell::OnceCell;
use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Context as _;
use ipnet::IpNet;
use tokio::runtime::Runtime;
use wg_common::nat::engine::Verdict;
use wg_common::nat::map::{
    Flow, FlowKey, FlowKind, Mapping, MappingKey, NO_RULE, RuleSet, Slot, rule_flags,
};
use wg_common::outcome::{DropReason, NatEvent};

pub use packet::{Destination, Source, destination, source};
#[cfg(test)]
pub use report::TraceReport;

use self::imagined::{Hook, Judged, World, judge};
use self::packet::{Form, Protocol, Sent, Wanted};
use self::report::{
    Comes, EgressReport, EndsReport, Fate, NatReport, NatState, PacketReport, PeerReport,
    RouteReport, RuleReport, TraceReport as Report, VerdictReport, WorkerReport,
};
use super::{
    Code, Failure,
    args::Trace,
    down::runtime,
    nat::{self, FlowReport},
    print,
    report::Interface,
    show,
    socket::Socket,
    text::Paint,
};
use crate::bpf::{NatTables, NatView};
use crate::config;
use crate::host::{AskedRoute, FoundRoute, Host, HostError, Link, NoWay, RouteTo};
use crate::keeper::nat::State;
use crate::nat::{Lines, address, sweep::is_permit};
use crate::sys::clock;

/// The source port of a packet of which nobody says another: one that systems give by themselves.
const PORT: u16 = 49152;
/// As [`PORT`], the identifier of an echo.
const IDENTIFIER: u16 = 1;

pub fn trace(arguments: &Trace) -> Result<Code, Failure> {
    let interface = &arguments.interface;
    let (from, to) = (arguments.source.ip, arguments.destination.ip);
    if from.is_ipv4() != to.is_ipv4() {
        let line =
            format_args!("{from} and {to} are of different versions of IP; write two of one");
        return Err(Failure::new(Code::Usage, line));
    }
    if !rustix::process::geteuid().is_root() {
        let line = "only root may read the tables that say what becomes of packets; run it as root";
        return Err(Failure::new(Code::Privilege, line));
    }
    let socket = Socket::find(interface)?.ok_or_else(|| show::not_found(interface))?;
    let device = show::ask(interface, &socket, false)?;
    let state = nat::state(interface)?.unwrap_or_default();
    let runtime = runtime()?;
    let report = Tracer::new(&runtime, device, state)
        .and_then(|mut tracer| tracer.trace(arguments))
        .map_err(|failure| failure.within(interface))?;
    if arguments.json {
        let json = serde_json::to_string_pretty(&report).context("writing JSON")?;
        print(&format!("{json}\n"))?;
    } else {
        print(&report.text(Paint { is_on: show::wants_colour() }))?;
    }
    Ok(if report.verdict.fate == Fate::Dropped { Code::Dropped } else { Code::Ok })
}

/// What the answers come from.
struct Tracer<'a> {
    device: Interface,
    /// Prefixes, who owns them by their places in the list of peers.
    owners: Vec<(IpNet, usize)>,
    tun: Link,
    kernel: Kernel<'a>,
    nat: Option<Nat>,
}

/// NAT of the device.
struct Nat {
    state: State,
    lines: Lines,
    tables: NatTables,
    view: NatView,
}

/// The kernel's networking.
struct Kernel<'a> {
    runtime: &'a Runtime,
    host: Host,
    links: HashMap<u32, Option<Link>>,
}

impl Kernel<'_> {
    fn route(&self, asked: &AskedRoute) -> Result<Result<FoundRoute, NoWay>, HostError> {
        self.runtime.block_on(self.host.ask_route(asked))
    }

    fn link(&mut self, index: u32) -> Result<Option<&Link>, HostError> {
        if let std::collections::hash_map::Entry::Vacant(place) = self.links.entry(index) {
            place.insert(self.runtime.block_on(self.host.link_by_index(index))?);
        }
        Ok(self.links[&index].as_ref())
    }

    fn name(&mut self, index: u32) -> Result<String, HostError> {
        Ok(self.link(index)?.map_or_else(|| format!("#{index}"), |link| link.name.clone()))
    }
}

/// How a packet comes in, and the index of the link by which; 0: it is the host's own.
type Origin = (Comes, u32);

impl<'a> Tracer<'a> {
    fn new(runtime: &'a Runtime, device: Interface, state: State) -> Result<Self, Failure> {
        let host = runtime.block_on(async { Host::new() })?;
        let found = runtime.block_on(host.link(&device.name))?;
        let tun = found.ok_or_else(|| HostError::NoLink(device.name.clone()))?;
        let mut owners = Vec::new();
        for (place, peer) in device.peers.iter().enumerate() {
            let prefixes = peer.allowed_ips.iter().filter_map(|text| text.parse().ok());
            owners.extend(prefixes.map(|prefix: IpNet| (prefix, place)));
        }
        let kernel = Kernel { runtime, host, links: HashMap::new() };
        Ok(Self { device, owners, tun, kernel, nat: Nat::open(state)? })
    }

    fn trace(&mut self, arguments: &Trace) -> Result<Report, Failure> {
        let origin = self.origin(arguments)?;
        let (sent, is_port_assumed) = self.packet(arguments, origin)?;
        let mut report = Report {
            interface: self.device.name.clone(),
            packet: PacketReport {
                protocol: sent.protocol.name(),
                ends: EndsReport::new(sent.protocol, (sent.source, sent.destination)),
                is_port_assumed,
                len: sent.len,
            },
            comes: origin.0,
            comes_by: match origin.1 {
                0 => None,
                index => Some(self.kernel.name(index)?),
            },
            ..Report::default()
        };
        if origin.0 == Comes::OutOfTunnel {
            let Some((peer, worker)) = self.peer(sent.source.ip()) else {
                let reason = DropReason::SourceNotAllowed.name();
                report.verdict = VerdictReport::dropped("tunnel", reason);
                return Ok(report);
            };
            report.worker = Some(self.worker_of_opened(&peer, worker));
            report.from_peer = Some(peer);
        }
        self.pass_nat(&mut report, origin, sent)?;
        Ok(report)
    }

    /// Who owns an address, and at which worker that one is at home.
    fn peer(&self, of: IpAddr) -> Option<(PeerReport, Option<u16>)> {
        let (prefix, place) = self.owner(of)?;
        let peer = &self.device.peers[place];
        let report = PeerReport {
            name: peer.name.clone(),
            public_key: peer.public_key.0.to_string(),
            prefix: prefix.to_string(),
            endpoint: peer.endpoint.clone(),
        };
        Some((report, peer.worker))
    }

    fn owner(&self, of: IpAddr) -> Option<(IpNet, usize)> {
        let owners = self.owners.iter().filter(|(prefix, _)| prefix.contains(&of));
        owners.max_by_key(|(prefix, _)| prefix.prefix_len()).copied()
    }

    /// The worker that opens what comes from a peer.
    fn worker_of_opened(&self, peer: &PeerReport, home: Option<u16>) -> WorkerReport {
        let label = peer.label();
        let (number, why) = match (home, &self.device.data_path) {
            (Some(home), _) => (Some(home), format!("where {label} is at home")),
            (None, Some(path)) if path.workers == 1 => (Some(0), "the only one".to_owned()),
            (None, Some(_)) => {
                (None, format!("{label} is at home nowhere, since it has no keys yet"))
            }
            (None, None) => (None, "not known: its daemon is another implementation's".to_owned()),
        };
        WorkerReport { number, why }
    }

    /// The worker that seals what goes to a peer.
    fn worker_of_sealed(&self, peer: &PeerReport, home: Option<u16>) -> WorkerReport {
        let label = peer.label();
        let Some(path) = &self.device.data_path else { return self.worker_of_opened(peer, home) };
        let steering = path.tun_steering.clone().unwrap_or_default();
        let (number, why) = match home {
            _ if path.workers == 1 => (Some(0), "the only one".to_owned()),
            Some(home) if steering.is_on => {
                (Some(home), format!("where {label} is at home: its TUN queue is chosen by that"))
            }
            None if steering.is_on => {
                (None, format!("any: {label} is at home nowhere, since it has no keys yet"))
            }
            _ => {
                let reason = steering.reason.map_or(String::new(), |reason| format!(" ({reason})"));
                (None, format!("any: the kernel chooses the TUN queue by itself{reason}"))
            }
        };
        WorkerReport { number, why }
    }

    /// How the packet comes in: as is said, or as this host would reach its source.
    fn origin(&self, arguments: &Trace) -> Result<Origin, Failure> {
        let kernel = &self.kernel;
        let from = arguments.source.ip;
        if let Some(by) = &arguments.by {
            let index = kernel.runtime.block_on(kernel.host.link_index(by))?;
            let comes = if index == self.tun.index { Comes::OutOfTunnel } else { Comes::ByLink };
            return Ok((comes, index));
        }
        let addresses = kernel.runtime.block_on(kernel.host.addresses())?;
        if from.is_loopback() || addresses.iter().any(|own| own.net.addr() == from) {
            return Ok((Comes::FromHost, 0));
        }
        let back = AskedRoute {
            source: None,
            destination: from,
            link_in: 0,
            mark: 0,
            protocol: 0,
            ports: None,
        };
        let owner = self.owner(from);
        let by_tunnel = (Comes::OutOfTunnel, self.tun.index);
        match kernel.route(&back)? {
            Ok(FoundRoute { to: RouteTo::Link(index), .. }) if index == self.tun.index => {
                Ok(by_tunnel)
            }
            Ok(FoundRoute { to: RouteTo::Link(index), .. }) => {
                // A peer that owns just this is nearer than a route to everything.
                let matched = kernel.host.prefix_len_of_route(&back);
                let matched = kernel.runtime.block_on(matched)?.unwrap_or(0);
                let is_nearer = owner.is_some_and(|(prefix, _)| prefix.prefix_len() > matched);
                Ok(if is_nearer { by_tunnel } else { (Comes::ByLink, index) })
            }
            _ if owner.is_some() => Ok(by_tunnel),
            _ => {
                let line = format_args!(
                    "no route leads to {from}, and no peer owns it; say by which interface it comes, such as \
                     `--by {}`",
                    self.device.name
                );
                Err(Failure::new(Code::Usage, line))
            }
        }
    }

    /// The packet that is meant, and whether its source port is a guess.
    fn packet(&mut self, arguments: &Trace, origin: Origin) -> Result<(Sent, bool), Failure> {
        let Trace { source, destination, .. } = arguments;
        let latest = match &mut self.nat {
            Some(nat) if origin.0 != Comes::FromHost => {
                nat.latest(source, destination, origin.0 == Comes::OutOfTunnel)?
            }
            _ => None,
        };
        let (protocol, ports, form) = match (latest, destination.wanted) {
            (Some(known), _) => (known.protocol, known.ports, known.form),
            (None, Some(Wanted { protocol: Protocol::Icmp, .. }) | None) => {
                let identifier = source.port.unwrap_or(IDENTIFIER);
                (Protocol::Icmp, (identifier, identifier), Form::First)
            }
            (None, Some(Wanted { protocol, port: Some(port) })) => {
                (protocol, (source.port.unwrap_or(PORT), port), Form::First)
            }
            (None, Some(Wanted { protocol, port: None })) => {
                let (word, from, to) = (protocol.name(), source.ip, destination.ip);
                let hint = SocketAddr::new(to, 443);
                let line = format_args!(
                    "there is no flow of {word} from {from} to {to}; write a port, such as {hint}/{word}"
                );
                return Err(Failure::new(Code::Usage, line));
            }
        };
        let len_min = Sent::len_min(protocol, destination.ip);
        let len = arguments.len.map_or(len_min, usize::from);
        if len < len_min {
            let line = format_args!(
                "a packet of {} from {} has at least {len_min} bytes; write `--len {len_min}` or more",
                protocol.name(),
                source.ip
            );
            return Err(Failure::new(Code::Usage, line));
        }
        let sent = Sent {
            protocol,
            source: SocketAddr::new(source.ip, ports.0),
            destination: SocketAddr::new(destination.ip, ports.1),
            form,
            len,
        };
        Ok((sent, latest.is_none() && source.port.is_none()))
    }

    /// Has NAT judge the packet, where a program looks at it, and follows it from there.
    fn pass_nat(&mut self, report: &mut Report, origin: Origin, sent: Sent) -> Result<(), Failure> {
        let ends = (sent.source, sent.destination);
        let Some(nat) = &self.nat else {
            report.nat = Some(NatReport::default());
            return self.kernels_way(report, origin, sent.protocol, ends, Fate::Passes);
        };
        let by = report.comes_by.clone().unwrap_or_default();
        let hook = match origin {
            (Comes::OutOfTunnel, _) => Some(Hook::Tunnel),
            (Comes::ByLink, link) if nat.state.attached.iter().any(|(name, _)| *name == by) => {
                Some(Hook::Nic(link))
            }
            _ => None,
        };
        let Some(hook) = hook else {
            report.nat = Some(NatReport { state: NatState::NoProgram, ..NatReport::default() });
            return self.kernels_way(report, origin, sent.protocol, ends, Fate::Passes);
        };
        let mut world = KernelWorld {
            tables: &nat.tables,
            kernel: &mut self.kernel,
            now_ns: clock::boot_now().boot_ns(),
            sockets: [const { OnceCell::new() }; 2],
        };
        let rules = nat.tables.rules();
        let judged = judge(&mut world, rules, hook, sent.bytes(), false)?;
        let mut allowed = nat.allowed(&judged);
        let is_translated =
            |kind: FlowKind| judged.flow.is_some_and(|(_, flow)| flow.kind == kind as u8);
        if allowed.is_none()
            && judged.is_known
            && is_translated(FlowKind::Source)
            && rules.flags & rule_flags::DENY != 0
        {
            // A flow does not say which line let it begin: it would be the one that lets it begin now.
            allowed = judge(&mut world, rules, hook, sent.bytes(), true)?.allowed;
        }
        let now_ns = world.now_ns;
        report.rule = allowed.map(|counter| nat.rule(counter)).transpose()?;
        let (shown, event) =
            (nat.report(&judged, &mut self.kernel, now_ns)?, event(judged.verdict));
        report.nat = Some(NatReport { event: event.map(NatEvent::name), ..shown });
        if let Some(route) = &judged.route {
            report.route = Some(route_report(&mut self.kernel, route)?);
        }
        let translated = packet::ends(&judged.packet).unwrap_or(ends);
        match judged.verdict {
            Verdict::Drop(reason) => report.verdict = VerdictReport::dropped("nat", reason.name()),
            Verdict::Answer(error) => report.verdict = VerdictReport::told(error),
            Verdict::Pass(_) => {
                self.kernels_way(report, origin, sent.protocol, ends, Fate::Passes)?;
            }
            Verdict::In => {
                report.becomes = Some(EndsReport::new(sent.protocol, translated));
                self.enter_tunnel(report, translated.1.ip(), Fate::Translated);
            }
            Verdict::Out => {
                report.becomes = Some(EndsReport::new(sent.protocol, translated));
                report.verdict.fate = Fate::Translated;
                if let Some(Ok(route)) = &judged.route {
                    self.leave(report, route, translated.1.ip())?;
                }
            }
        }
        Ok(())
    }

    /// Follows a packet that the kernel forwards, sends or takes.
    fn kernels_way(
        &mut self,
        report: &mut Report,
        (comes, link_in): Origin,
        protocol: Protocol,
        (from, to): (SocketAddr, SocketAddr),
        fate: Fate,
    ) -> Result<(), Failure> {
        let asked = AskedRoute {
            source: Some(from.ip()),
            destination: to.ip(),
            link_in: if comes == Comes::FromHost { 0 } else { link_in },
            mark: 0,
            protocol: protocol.number(to.ip()),
            ports: (protocol != Protocol::Icmp).then_some((from.port(), to.port())),
        };
        let found = self.kernel.route(&asked)?;
        report.route = Some(route_report(&mut self.kernel, &found)?);
        report.verdict.fate = fate;
        match found {
            Err(why) => report.verdict = VerdictReport::dropped("kernel", why.name()),
            Ok(FoundRoute { to: RouteTo::Local | RouteTo::Several, .. }) => {
                report.verdict.fate = Fate::Delivered;
            }
            Ok(FoundRoute { to: RouteTo::Link(link), .. }) if link == self.tun.index => {
                self.enter_tunnel(report, to.ip(), fate);
            }
            Ok(route) => {
                self.leave(report, &route, to.ip())?;
            }
        }
        let fits = report.egress.as_ref().is_none_or(|egress| egress.fits);
        if !fits && report.verdict.fate != Fate::Dropped {
            report.verdict = VerdictReport::dropped("kernel", DropReason::TooLarge.name());
        }
        Ok(())
    }

    /// Follows a packet into the tunnel.
    fn enter_tunnel(&self, report: &mut Report, to: IpAddr, fate: Fate) {
        report.verdict.fate = fate;
        let mtu = self.tun.mtu;
        report.egress = Some(EgressReport {
            interface: self.device.name.clone(),
            next_hop: None,
            link_address: None,
            mtu,
            fits: report.packet.len <= mtu as usize,
        });
        let Some((peer, worker)) = self.peer(to) else {
            report.verdict = VerdictReport::dropped("tunnel", DropReason::NoPeer.name());
            return;
        };
        report.worker = Some(self.worker_of_sealed(&peer, worker));
        if peer.endpoint.is_none() {
            report.verdict = VerdictReport::dropped("tunnel", DropReason::NoEndpoint.name());
        }
        report.to_peer = Some(peer);
    }

    /// Says how a packet to `to` leaves by a link that is not ours.
    fn leave(
        &mut self,
        report: &mut Report,
        route: &FoundRoute,
        to: IpAddr,
    ) -> Result<(), Failure> {
        let RouteTo::Link(index) = route.to else { return Ok(()) };
        let Some(link) = self.kernel.link(index)?.cloned() else { return Ok(()) };
        let next_hop = route.router.unwrap_or(to);
        let neighbours = self.kernel.runtime.block_on(self.kernel.host.neighbours())?;
        let link_address = neighbours
            .get(&(index, next_hop))
            .map(|neighbour| neighbour.mac.map(|byte| format!("{byte:02x}")).join(":"));
        report.egress = Some(EgressReport {
            interface: link.name,
            next_hop: Some(next_hop),
            link_address,
            mtu: link.mtu,
            fits: report.packet.len <= link.mtu as usize,
        });
        Ok(())
    }
}

fn event(verdict: Verdict) -> Option<NatEvent> {
    match verdict {
        Verdict::Pass(event) => Some(event),
        Verdict::Out => Some(NatEvent::TranslatedOut),
        Verdict::In => Some(NatEvent::TranslatedIn),
        Verdict::Answer(_) => Some(NatEvent::Answered),
        Verdict::Drop(_) => None,
    }
}

fn route_report(
    kernel: &mut Kernel<'_>,
    route: &Result<FoundRoute, NoWay>,
) -> Result<RouteReport, HostError> {
    Ok(match route {
        Err(why) => RouteReport {
            missing: Some(why.name()),
            is_local: false,
            link: None,
            router: None,
            own_source: None,
            table: None,
        },
        Ok(found) => RouteReport {
            missing: None,
            is_local: found.to == RouteTo::Local,
            link: match found.to {
                RouteTo::Link(index) => Some(kernel.name(index)?),
                RouteTo::Local | RouteTo::Several => None,
            },
            router: found.router,
            own_source: found.own_source,
            table: Some(found.table),
        },
    })
}

impl EndsReport {
    fn new(protocol: Protocol, (from, to): (SocketAddr, SocketAddr)) -> Self {
        Self {
            source: from.ip(),
            source_port: from.port(),
            destination: to.ip(),
            destination_port: (protocol != Protocol::Icmp).then_some(to.port()),
        }
    }
}

/// A flow that fits what was asked, seen from who sends.
#[derive(Clone, Copy)]
struct Known {
    protocol: Protocol,
    ports: (u16, u16),
    form: Form,
}

impl Nat {
    /// Opens the maps, if there are lines.
    fn open(state: State) -> Result<Option<Self>, Failure> {
        let Some(ids) = state.ids else { return Ok(None) };
        let text = format!("[Interface]\n{}", state.lines);
        let (directives, _) = config::directives("the lines", &text);
        let lines = Lines::of_directives(&directives);
        let doing = "opening the maps of NAT, which only root may";
        let tables = NatTables::open(ids).map_err(anyhow::Error::new).context(doing)?;
        let view = NatView::open(ids).map_err(anyhow::Error::new).context(doing)?;
        Ok(Some(Self { state, lines, tables, view }))
    }

    /// The flow with the latest packet of those that are meant.
    fn latest(
        &mut self,
        source: &Source,
        destination: &Destination,
        is_outward: bool,
    ) -> Result<Option<Known>, Failure> {
        let mut latest: Option<(u64, Known)> = None;
        for entry in self.view.flows().each() {
            let (key, flow) = entry.context("reading the flows of NAT")?;
            let known = of_flow(&key, &flow, source, destination, is_outward);
            if let Some(known) = known
                && latest.is_none_or(|(seen_ns, _)| seen_ns < flow.last_seen_ns)
            {
                latest = Some((flow.last_seen_ns, known));
            }
        }
        Ok(latest.map(|(_, known)| known))
    }

    /// The counter of the `Allow` line by which a packet passes, as far as its flow says it.
    fn allowed(&self, judged: &Judged) -> Option<u32> {
        let of_flow = judged.flow.filter(|(_, flow)| {
            let is_plain = [FlowKind::Plain as u8, FlowKind::PlainInbound as u8];
            is_plain.contains(&flow.kind) && flow.rule != NO_RULE
        });
        let rule = of_flow.and_then(|(_, flow)| self.tables.rules().allow.get(flow.rule as usize));
        judged.allowed.or(rule.map(|rule| rule.counter))
    }

    fn rule(&self, counter: u32) -> Result<RuleReport, Failure> {
        let flows = self.tables.allowed(counter).map_err(anyhow::Error::new)?;
        let line = self.lines.allow.get(counter as usize);
        let line = line.map_or_else(String::new, |line| format!("#! Allow = {line}"));
        Ok(RuleReport { line, flows })
    }

    /// What it does with a packet, but what counts that.
    fn report(
        &self,
        judged: &Judged,
        kernel: &mut Kernel<'_>,
        now_ns: u64,
    ) -> Result<NatReport, Failure> {
        let rules = self.tables.rules();
        let Some((key, flow)) = judged.flow else {
            let is_dropped = matches!(judged.verdict, Verdict::Drop(_) | Verdict::Answer(_));
            let state = if is_dropped { NatState::Drops } else { NatState::None };
            return Ok(NatReport { state, ..NatReport::default() });
        };
        let is_translated = [FlowKind::Source as u8, FlowKind::Forward as u8].contains(&flow.kind);
        let mut report = NatReport {
            state: if judged.is_known { NatState::Flow } else { NatState::NewFlow },
            line: self.line(rules, &flow, kernel)?,
            ..NatReport::default()
        };
        if judged.is_known {
            // As it is, and not as it would be after this packet.
            let is = self.tables.flow(&key).map_err(anyhow::Error::new)?;
            report.flow = is.map(|is| FlowReport::new(&key, &is, now_ns));
        }
        if is_translated {
            report.external = Some(address(flow.external));
            let port = Some(u16::from_be(flow.external_port));
            let is_settled =
                judged.is_known || judged.has_slot || flow.kind == FlowKind::Forward as u8;
            if is_settled {
                report.external_port = port;
            } else {
                report.next_port = port;
            }
        }
        Ok(report)
    }

    /// The line that a flow follows, if it is translated.
    fn line(
        &self,
        rules: &RuleSet,
        flow: &Flow,
        kernel: &mut Kernel<'_>,
    ) -> Result<Option<String>, Failure> {
        let index = flow.rule as usize;
        if flow.kind == FlowKind::Source as u8
            && let Some(rule) = rules.nat.get(index)
        {
            let nic = kernel.name(rule.out)?;
            let from = prefix(&rule.from);
            let line = self.lines.nat.iter().find(|line| {
                let is_from = line.from.as_ref().map_or_else(
                    || from.is_some_and(|from| from.prefix_len() == 0),
                    |is| Some(is.value) == from,
                );
                line.out.value == nic && is_from
            });
            return Ok(line.map(|line| format!("#! Nat = {line}")));
        }
        if flow.kind == FlowKind::Forward as u8
            && let Some(rule) = rules.forward.get(index)
        {
            let nic = kernel.name(rule.nic)?;
            let to = SocketAddr::new(address(rule.to), u16::from_be(rule.to_port));
            let line = self.lines.forward.iter().find(|line| {
                line.interface.value == nic
                    && line.to.value == to
                    && line.port.value == u16::from_be(rule.port)
            });
            return Ok(line.map(|line| format!("#! Forward = {line}")));
        }
        Ok(None)
    }
}

/// A prefix of the rules as it is written.
fn prefix(of: &wg_common::nat::map::Prefix) -> Option<IpNet> {
    let len: u32 = of.mask.0.iter().map(|word| word.count_ones()).sum();
    match address(of.address) {
        IpAddr::V4(ip) => IpNet::new(ip.into(), u8::try_from(len.checked_sub(96)?).ok()?).ok(),
        IpAddr::V6(ip) => IpNet::new(ip.into(), u8::try_from(len).ok()?).ok(),
    }
}

/// Whether a packet that was asked about may be one of a flow: which one it is then.
fn of_flow(
    key: &FlowKey,
    flow: &Flow,
    source: &Source,
    destination: &Destination,
    is_outward: bool,
) -> Option<Known> {
    let protocol = Protocol::of_number(key.protocol)?;
    if is_permit(key) || destination.wanted.is_some_and(|wanted| wanted.protocol != protocol) {
        return None;
    }
    let is_plain = [FlowKind::Plain as u8, FlowKind::PlainInbound as u8].contains(&flow.kind);
    let end = |ip, port: u16| (address(ip), u16::from_be(port));
    let (inner, remote) = (end(key.inner, key.inner_port), end(key.remote, key.remote_port));
    let outer = if is_plain { inner } else { end(flow.external, flow.external_port) };
    // Between two peers both come out of the tunnel.
    let is_answer = is_outward && is_plain && remote.0 == source.ip;
    let (from, to) = if is_outward && !is_answer { (inner, remote) } else { (remote, outer) };
    // An echo's identifier stands in the inner end's place.
    let is_echo = protocol == Protocol::Icmp;
    let identifier = if is_outward { inner.1 } else { outer.1 };
    let ports = if is_echo { (identifier, identifier) } else { (from.1, to.1) };
    let is_meant = (from.0, to.0) == (source.ip, destination.ip)
        && source.port.is_none_or(|port| port == ports.0)
        && destination.wanted.and_then(|wanted| wanted.port).is_none_or(|port| port == ports.1);
    if !is_meant {
        return None;
    }
    let has_begun_inside = [FlowKind::Plain as u8, FlowKind::Source as u8].contains(&flow.kind);
    let is_inner = from == inner;
    let form = match protocol {
        Protocol::Icmp if is_inner == has_begun_inside => Form::First,
        Protocol::Icmp => Form::Reply,
        Protocol::Udp => Form::First,
        Protocol::Tcp => {
            let [of_inner, of_remote] = flow.windows;
            let (own, other) = if is_inner { (of_inner, of_remote) } else { (of_remote, of_inner) };
            Form::Acknowledges { next: own.end, wanted: other.end }
        }
    };
    Some(Known { protocol, ports, form })
}

/// The tables and the kernel as they are.
struct KernelWorld<'a, 'k> {
    tables: &'a NatTables,
    kernel: &'a mut Kernel<'k>,
    now_ns: u64,
    /// Ends of sockets of TCP and of UDP: their own, and the other one.
    sockets: [OnceCell<Vec<(SocketAddr, SocketAddr)>>; 2],
}

impl World for KernelWorld<'_, '_> {
    fn now_ns(&self) -> u64 {
        self.now_ns
    }

    fn flow(&mut self, key: &FlowKey) -> anyhow::Result<Option<Flow>> {
        Ok(self.tables.flow(key)?)
    }

    fn mapping(&mut self, key: &MappingKey) -> anyhow::Result<Option<Mapping>> {
        Ok(self.tables.mapping(key)?)
    }

    fn slot(&mut self, index: u32) -> anyhow::Result<Option<Slot>> {
        Ok(self.tables.slot(index)?)
    }

    fn free_port(&mut self, ring: u32, before: u32) -> anyhow::Result<Option<u32>> {
        Ok(self.tables.free_port(ring, before)?)
    }

    fn is_owned(&mut self, of: IpAddr) -> anyhow::Result<bool> {
        Ok(self.tables.is_owned(of)?)
    }

    fn has_socket(&mut self, is_tcp: bool, own: SocketAddr, from: SocketAddr) -> bool {
        let names = if is_tcp { ["tcp", "tcp6"] } else { ["udp", "udp6"] };
        let sockets = self.sockets[usize::from(is_tcp)].get_or_init(|| {
            let read = |name| fs::read_to_string(format!("/proc/thread-self/net/{name}"));
            names
                .into_iter()
                .filter_map(|name| read(name).ok())
                .flat_map(|text| sockets(&text))
                .collect()
        });
        sockets.iter().any(|(local, remote)| {
            let is_at = |bound: IpAddr, at: IpAddr| bound.is_unspecified() || bound == at;
            local.port() == own.port()
                && is_at(local.ip(), own.ip())
                && (remote.port() == 0 || *remote == from)
        })
    }

    fn route(&mut self, asked: &AskedRoute) -> anyhow::Result<Result<FoundRoute, NoWay>> {
        Ok(self.kernel.route(asked)?)
    }

    fn mtu(&mut self, link: u32) -> anyhow::Result<Option<u32>> {
        Ok(self.kernel.link(link)?.map(|link| link.mtu))
    }
}

/// The sockets that `/proc/net/tcp`, `udp` and their like list: both ends of each.
fn sockets(text: &str) -> Vec<(SocketAddr, SocketAddr)> {
    fn end(text: &str) -> Option<SocketAddr> {
        let (ip, port) = text.split_once(':')?;
        // Words as this host reads them.
        let words = ip.as_bytes().chunks(8).map(|word| {
            let word = str::from_utf8(word).ok().filter(|word| word.len() == 8)?;
            Some(u32::from_str_radix(word, 16).ok()?.to_ne_bytes())
        });
        let octets = words.collect::<Option<Vec<_>>>()?.concat();
        let ip = match octets.len() {
            4 => Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?).into(),
            16 => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?)).to_canonical(),
            _ => return None,
        };
        Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
    }
    let both = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(1);
        Some((end(words.next()?)?, end(words.next()?)?))
    };
    text.lines().filter_map(both).collect()
}

#[cfg(test)]
mod tests;
