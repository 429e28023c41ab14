use std::collections::HashMap;

use wg_common::map::AddressKey;
use wg_common::nat::map::{NO_SLOT, Protocol as Slots, TcpWindow, ring, slot_index};

use super::*;
use crate::nat::rules::{Facts, Nic, RuleBook};

const TUN: u32 = 9;
const LAN: u32 = 2;
const FIRST: u32 = 30_000;

/// Tables in memory, and a kernel with two links.
#[derive(Default)]
struct Memory {
    flows: HashMap<FlowKey, Flow>,
    mappings: HashMap<MappingKey, Mapping>,
    slots: HashMap<u32, Slot>,
    sockets: Vec<u16>,
    has_no_route: bool,
    fails: bool,
}

impl World for Memory {
    fn now_ns(&self) -> u64 {
        1 << 40
    }

    fn flow(&mut self, key: &FlowKey) -> anyhow::Result<Option<Flow>> {
        anyhow::ensure!(!self.fails, "the table is gone");
        Ok(self.flows.get(key).copied())
    }

    fn mapping(&mut self, key: &MappingKey) -> anyhow::Result<Option<Mapping>> {
        Ok(self.mappings.get(key).copied())
    }

    fn slot(&mut self, index: u32) -> anyhow::Result<Option<Slot>> {
        let free = Slot {
            last_seen_ns: 0,
            inner: AddressKey([0; 4]),
            generation: 0,
            inner_port: 0,
            padding: 0,
        };
        Ok(Some(self.slots.get(&index).copied().unwrap_or(free)))
    }

    fn free_port(&mut self, _: u32, before: u32) -> anyhow::Result<Option<u32>> {
        Ok((before < 3).then_some(before))
    }

    fn is_owned(&mut self, of: IpAddr) -> anyhow::Result<bool> {
        Ok(of == ip("10.9.0.2"))
    }

    fn has_socket(&mut self, is_tcp: bool, own: SocketAddr, _: SocketAddr) -> bool {
        is_tcp && self.sockets.contains(&own.port())
    }

    fn route(&mut self, asked: &AskedRoute) -> anyhow::Result<Result<FoundRoute, NoWay>> {
        assert!(asked.link_in == TUN || asked.link_in == LAN, "as the packet came");
        let to = match asked.destination {
            _ if self.has_no_route => return Ok(Err(NoWay::None)),
            to if to == ip("192.168.77.1") => RouteTo::Local,
            IpAddr::V4(to) if to.octets()[0] == 10 => RouteTo::Link(TUN),
            _ => RouteTo::Link(LAN),
        };
        Ok(Ok(FoundRoute { to, router: None, own_source: None, table: 254, mtu: None }))
    }

    fn mtu(&mut self, link: u32) -> anyhow::Result<Option<u32>> {
        Ok(Some(if link == TUN { 1420 } else { 1500 }))
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn lines(text: &str) -> Lines {
    let (directives, problems) = config::directives("lines", &format!("[Interface]\n{text}\n"));
    assert!(problems.is_empty(), "{problems:?}");
    Lines::of_directives(&directives)
}

fn rules(text: &str) -> Box<RuleSet> {
    let nic = Nic { name: "lan".to_owned(), index: LAN, addresses: vec![ip("192.168.77.1")] };
    let facts = Facts { tun: TUN, nics: vec![nic], port_first: FIRST };
    RuleBook::default().rule_set(&lines(text), &facts).unwrap()
}

const MASQUERADE: &str = "#! Nat = masquerade out=lan";

fn sent(protocol: Protocol, source: &str, destination: &str) -> Sent {
    let (source, destination): (SocketAddr, SocketAddr) =
        (source.parse().unwrap(), destination.parse().unwrap());
    let len = Sent::len_min(protocol, destination.ip());
    Sent { protocol, source, destination, form: Form::First, len }
}

fn syn() -> Sent {
    sent(Protocol::Tcp, "10.9.0.2:40000", "192.168.77.2:443")
}

fn out(world: &mut Memory, lines: &str, sent: Sent) -> Judged {
    judge(world, &rules(lines), Hook::Tunnel, sent.bytes(), false).unwrap()
}

fn ends_of(judged: &Judged) -> (SocketAddr, SocketAddr) {
    packet::ends(&judged.packet).unwrap()
}

/// What the engine would leave in the tables.
fn begun(world: &mut Memory) -> Judged {
    let judged = out(world, MASQUERADE, syn());
    let (key, flow) = judged.flow.unwrap();
    world.flows.insert(key, flow);
    let slot = Slot {
        last_seen_ns: 0,
        inner: key.inner,
        generation: flow.generation,
        inner_port: key.inner_port,
        padding: 0,
    };
    world.slots.insert(flow.slot, slot);
    judged
}

#[test]
fn a_new_flow_takes_a_slot_in_thought_alone() {
    let mut world = Memory::default();
    for _ in 0..2 {
        let judged = out(&mut world, MASQUERADE, syn());
        assert_eq!(judged.verdict, Verdict::Out);
        assert!(!judged.is_known && !judged.has_slot);
        let (source, destination) = ends_of(&judged);
        assert_eq!(source, format!("192.168.77.1:{FIRST}").parse().unwrap());
        assert_eq!(destination, "192.168.77.2:443".parse().unwrap());
        assert!(world.flows.is_empty() && world.mappings.is_empty() && world.slots.is_empty());
    }
}

#[test]
fn a_port_that_a_socket_has_is_passed_over() {
    let mut world = Memory { sockets: vec![FIRST as u16], ..Memory::default() };
    let (source, _) = ends_of(&out(&mut world, MASQUERADE, syn()));
    assert_eq!(source.port(), FIRST as u16 + 1);
    world.sockets = (0..4).map(|port| FIRST as u16 + port).collect();
    let judged = out(&mut world, MASQUERADE, syn());
    assert_eq!(judged.verdict, Verdict::Drop(DropReason::NoPort));
}

#[test]
fn a_flow_that_is_there_is_found_and_can_be_passed_over() {
    let mut world = Memory::default();
    begun(&mut world);
    let judged = out(&mut world, MASQUERADE, syn());
    assert!(judged.is_known && judged.verdict == Verdict::Out);
    assert_eq!(ends_of(&judged).0.port(), FIRST as u16);
    let anew = judge(&mut world, &rules(MASQUERADE), Hook::Tunnel, syn().bytes(), true).unwrap();
    assert!(!anew.is_known && anew.verdict == Verdict::Out);
}

#[test]
fn a_source_that_has_a_slot_keeps_it() {
    let mut world = Memory::default();
    let (key, flow) = begun(&mut world).flow.unwrap();
    world.flows.clear();
    let of = MappingKey {
        inner: key.inner,
        inner_port: key.inner_port,
        protocol: key.protocol,
        padding: 0,
        nic: LAN,
    };
    world.mappings.insert(of, Mapping { slot: flow.slot, generation: flow.generation });
    let judged = out(&mut world, MASQUERADE, syn());
    assert!(!judged.is_known && judged.has_slot);
    assert_eq!(ends_of(&judged).0.port(), FIRST as u16);
}

#[test]
fn what_no_line_allows_is_dropped_and_what_one_does_names_it() {
    let lines = format!(
        "{MASQUERADE}\n#! Allow = 10.9.0.0/24 -> 192.168.77.0/24 udp\n\
         #! Allow = 10.9.0.0/24 -> 192.168.77.0/24 tcp 80,443"
    );
    let mut world = Memory::default();
    let judged = out(&mut world, &lines, syn());
    assert_eq!((judged.verdict, judged.allowed), (Verdict::Out, Some(1)));
    let ping = sent(Protocol::Icmp, "10.9.0.2:7", "192.168.77.2:7");
    let judged = out(&mut world, &lines, ping);
    assert_eq!(judged.verdict, Verdict::Drop(DropReason::NotAllowed));
}

#[test]
fn what_cannot_go_says_why() {
    let mut world = Memory::default();
    let stranger = sent(Protocol::Udp, "10.9.0.7:7", "192.168.77.2:7");
    let judged = out(&mut world, MASQUERADE, stranger);
    assert_eq!(judged.verdict, Verdict::Drop(DropReason::SourceUnowned));
    let long = Sent { len: 1501, ..syn() };
    let judged = out(&mut world, MASQUERADE, long);
    assert_eq!(judged.verdict, Verdict::Pass(NatEvent::PassedToRefuse));
    world.has_no_route = true;
    let judged = out(&mut world, MASQUERADE, syn());
    assert_eq!(judged.verdict, Verdict::Pass(NatEvent::PassedForeign));
    assert_eq!(judged.route, Some(Err(NoWay::None)));
    world.fails = true;
    let rules = rules(MASQUERADE);
    let error = judge(&mut world, &rules, Hook::Tunnel, syn().bytes(), false).unwrap_err();
    assert_eq!(error.to_string(), "the table is gone");
}

#[test]
fn a_forwarded_port_leads_inside() {
    let rules = rules("#! Forward = tcp lan:8080 -> 10.9.0.2:80");
    let mut world = Memory::default();
    let sent = sent(Protocol::Tcp, "192.168.77.2:40000", "192.168.77.1:8080");
    let judged = judge(&mut world, &rules, Hook::Nic(LAN), sent.bytes(), false).unwrap();
    assert_eq!(judged.verdict, Verdict::In);
    assert_eq!(ends_of(&judged).1, "10.9.0.2:80".parse().unwrap());
    let (_, flow) = judged.flow.unwrap();
    assert_eq!((flow.kind, flow.slot), (FlowKind::Forward as u8, NO_SLOT));
}

#[test]
fn flows_are_found_from_both_sides() {
    let mut world = Memory::default();
    let (key, mut flow) = begun(&mut world).flow.unwrap();
    let window = |end| TcpWindow { end, ..TcpWindow::default() };
    flow.windows = [window(7), window(9)];
    let of = |source: &str, destination: &str, is_outward| {
        let (source, destination) =
            (packet::source(source).unwrap(), packet::destination(destination).unwrap());
        of_flow(&key, &flow, &source, &destination, is_outward)
            .map(|known| (known.ports, known.form))
    };
    let inside = ((40000, 443), Form::Acknowledges { next: 7, wanted: 9 });
    let outside = ((443, FIRST as u16), Form::Acknowledges { next: 9, wanted: 7 });
    for to in ["192.168.77.2", "192.168.77.2/tcp", "192.168.77.2:443/tcp"] {
        assert_eq!(of("10.9.0.2", to, true), Some(inside), "{to}");
    }
    assert_eq!(of("192.168.77.2", "192.168.77.1", false), Some(outside));
    assert_eq!(of("192.168.77.2:443", "192.168.77.1:30000/tcp", false), Some(outside));
    for (from, to, is_outward) in [
        ("10.9.0.2:1", "192.168.77.2", true),
        ("10.9.0.2", "192.168.77.2:444/tcp", true),
        ("10.9.0.2", "192.168.77.2/udp", true),
        ("10.9.0.3", "192.168.77.2", true),
        ("192.168.77.2", "10.9.0.2", false),
    ] {
        assert_eq!(of(from, to, is_outward), None, "{from} {to}");
    }
}

#[test]
fn echoes_are_answered_by_who_did_not_begin() {
    let key = |kind| {
        let flow = Flow { kind: kind as u8, ..begun(&mut Memory::default()).flow.unwrap().1 };
        let key = FlowKey {
            inner: ip("10.9.0.2").into(),
            remote: ip("192.168.77.2").into(),
            inner_port: 7u16.to_be(),
            remote_port: 0,
            protocol: 1,
            padding: [0; 3],
        };
        (key, flow)
    };
    let of = |kind, source: &str, destination: &str, is_outward| {
        let (key, flow) = key(kind);
        let (source, destination) =
            (packet::source(source).unwrap(), packet::destination(destination).unwrap());
        let known = of_flow(&key, &flow, &source, &destination, is_outward).unwrap();
        (known.ports.0, known.form)
    };
    let (inner, remote, outer) = ("10.9.0.2", "192.168.77.2", "192.168.77.1");
    assert_eq!(of(FlowKind::Source, inner, remote, true), (7, Form::First));
    assert_eq!(of(FlowKind::Source, remote, outer, false), (FIRST as u16, Form::Reply));
    assert_eq!(of(FlowKind::PlainInbound, remote, inner, false), (7, Form::First));
    assert_eq!(of(FlowKind::PlainInbound, inner, remote, true), (7, Form::Reply));
    assert_eq!(of(FlowKind::Plain, remote, inner, true), (7, Form::Reply));
}

#[test]
fn sockets_are_read_with_both_ends() {
    let text = "  sl  local_address rem_address   st tx_queue\n   \
                0: 0100007F:1F90 00000000:0000 0A 00000000\n   \
                1: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A\n   \
                2: 0000000000000000FFFF00000200090A:0050 0000000000000000FFFF0000024DA8C0:01BB 01\n";
    let at = |text: &str| -> SocketAddr { text.parse().unwrap() };
    let expected = [
        (at("127.0.0.1:8080"), at("0.0.0.0:0")),
        (at("[::]:22"), at("[::]:0")),
        (at("10.9.0.2:80"), at("192.168.77.2:443")),
    ];
    if cfg!(target_endian = "little") {
        assert_eq!(sockets(text), expected);
    }
    assert!(sockets("").is_empty());
}

#[test]
fn prefixes_are_as_they_were_written() {
    for text in ["10.9.0.0/24", "0.0.0.0/0", "192.0.2.1/32", "fd09::/64", "::/0", "fd09::1/128"] {
        let net: IpNet = text.parse().unwrap();
        let before = if net.addr().is_ipv4() { 96 } else { 0 };
        let len = u32::from(net.prefix_len()) + before;
        let of = wg_common::nat::map::Prefix::new(net.addr().into(), len);
        assert_eq!(prefix(&of), Some(net));
    }
}

#[test]
fn a_slot_is_that_of_its_ring() {
    let (_, flow) = begun(&mut Memory::default()).flow.unwrap();
    assert_eq!(flow.slot, slot_index(ring(0, Slots::Tcp), 0));
}
