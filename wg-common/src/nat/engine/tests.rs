//! The engine over tables of the standard library, and packets in memory.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use super::*;
use crate::headers::Checksum;
use crate::nat::map::Prefix;
use crate::nat::packet::Buffer;

const TUN: u32 = 7;
const NIC: u32 = 3;
const PORT_FIRST: u32 = 20_000;

fn key(text: &str) -> AddressKey {
    AddressKey::from(text.parse::<IpAddr>().unwrap())
}

/// Addresses of 10.9.0.0/24 are owned and lie behind the TUN device, 192.0.2.1 is this host's, all else lies behind
/// the NIC.
struct Model {
    flows: HashMap<FlowKey, Flow>,
    found: Option<FlowKey>,
    mappings: HashMap<MappingKey, Mapping>,
    slots: HashMap<u32, Slot>,
    free: HashMap<u32, VecDeque<u32>>,
    fragments: HashMap<FragmentKey, FragmentEntry>,
    sockets: Vec<u16>,
    ifindex: u32,
    now_ns: u64,
    rule: u32,
    mtu: u32,
    flows_max: usize,
    events: Vec<NatEvent>,
    allowed: Vec<u32>,
}

impl Model {
    fn new() -> Self {
        let free = (0..PROTOCOLS).map(|ring| (ring, (0..4).collect())).collect();
        Self {
            flows: HashMap::new(),
            found: None,
            mappings: HashMap::new(),
            slots: HashMap::new(),
            free,
            fragments: HashMap::new(),
            sockets: Vec::new(),
            ifindex: TUN,
            now_ns: 1,
            rule: NO_RULE,
            mtu: 1420,
            flows_max: usize::MAX,
            events: Vec::new(),
            allowed: Vec::new(),
        }
    }
}

const PROTOCOLS: u32 = crate::nat::map::PROTOCOLS_LEN;

impl Tables for Model {
    fn now_ns(&self) -> u64 {
        self.now_ns
    }
    fn find_flow(&mut self, key: &FlowKey) -> bool {
        self.found = self.flows.contains_key(key).then_some(*key);
        self.found.is_some()
    }
    fn found<R>(&mut self, change: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        self.flows.get_mut(&self.found?).map(change)
    }
    fn put_flow(&mut self, key: &FlowKey, flow: &Flow) -> bool {
        let fits = self.flows.contains_key(key) || self.flows.len() < self.flows_max;
        if fits {
            self.flows.insert(*key, *flow);
            self.found = Some(*key);
        }
        fits
    }
    fn remove_flow(&mut self, key: &FlowKey) {
        self.found = None;
        self.flows.remove(key);
    }
    fn mapping(&mut self, key: &MappingKey) -> Option<Mapping> {
        self.mappings.get(key).copied()
    }
    fn put_mapping(&mut self, key: &MappingKey, mapping: &Mapping) -> bool {
        self.mappings.insert(*key, *mapping);
        true
    }
    fn slot(&mut self, index: u32) -> Option<Slot> {
        let empty = Slot {
            last_seen_ns: 0,
            inner: AddressKey([0; 4]),
            generation: 0,
            inner_port: 0,
            padding: 0,
        };
        Some(self.slots.get(&index).copied().unwrap_or(empty))
    }
    fn take_slot(&mut self, index: u32, inner: &AddressKey, inner_port: u16) -> Option<u32> {
        let before = self.slot(index)?;
        let generation = before.generation + 1;
        let slot = Slot { inner: *inner, inner_port, generation, ..before };
        self.slots.insert(index, slot);
        Some(generation)
    }
    fn touch_slot(&mut self, _: u32) {}
    fn take_port(&mut self, ring: u32) -> Option<u32> {
        self.free.get_mut(&ring)?.pop_front()
    }
    fn is_owned(&mut self, address: &AddressKey) -> bool {
        Prefix::new(key("10.9.0.0"), 96 + 24).distance(address) == 0
    }
    fn has_socket(&mut self, _: &Tuple, _: &AddressKey, port: u16) -> bool {
        self.sockets.contains(&u16::from_be(port))
    }
    fn route(&mut self, tuple: &Tuple, len: u32) -> Route {
        if tuple.destination == key("192.0.2.1") {
            Route::Local
        } else if self.is_owned(&tuple.destination) {
            Route::Out(TUN)
        } else if len > 1500 {
            Route::TooBig
        } else {
            Route::Out(NIC)
        }
    }
    fn rule(&mut self) -> &mut u32 {
        &mut self.rule
    }
    fn refresh_next_hop(&mut self) {}
    fn tunnel_mtu_below(&mut self, len: u32) -> Option<u32> {
        (len > self.mtu).then_some(self.mtu)
    }
    fn fragments(&mut self, key: &FragmentKey) -> Option<FragmentEntry> {
        self.fragments.get(key).copied()
    }
    fn put_fragments(&mut self, key: &FragmentKey, entry: &FragmentEntry) {
        self.fragments.insert(*key, *entry);
    }
    fn ifindex(&self) -> u32 {
        self.ifindex
    }
    fn segments(&self) -> Segments {
        Segments { len: 0, count: 1 }
    }
    fn count(&mut self, event: NatEvent) {
        self.events.push(event);
    }
    fn count_allowed(&mut self, counter: u32) {
        self.allowed.push(counter);
    }
}

/// What is said where no rule is set.
fn no_rules() -> Box<RuleSet> {
    let nowhere = Prefix::new(AddressKey([0; 4]), 128);
    let none = AddressKey([0; 4]);
    Box::new(RuleSet {
        version: 1,
        tun: TUN,
        mark: 0,
        port_first: PORT_FIRST,
        flags: 0,
        nat_count: 0,
        forward_count: 0,
        allow_count: 0,
        external_count: 0,
        nat: [NatRule { from: nowhere, out: 0, external_first: 0, external_count: 0 };
            NAT_RULES_LEN],
        forward: [ForwardRule {
            external: none,
            to: none,
            nic: 0,
            port: 0,
            to_port: 0,
            protocol: 0,
        }; FORWARD_RULES_LEN],
        allow: [AllowRule {
            from: nowhere,
            to: nowhere,
            protocol: 0,
            port_first: 0,
            port_last: 0,
            counter: 0,
        }; ALLOW_RULES_LEN],
        externals: [External { address: none, nic: 0, generation: 0 }; EXTERNALS_LEN],
    })
}

fn masquerade() -> Box<RuleSet> {
    let mut rules = no_rules();
    rules.externals[0] = External { address: key("192.0.2.1"), nic: NIC, generation: 0 };
    rules.external_count = 1;
    let from = Prefix::new(key("0.0.0.0"), 96);
    rules.nat[0] = NatRule { from, out: NIC, external_first: 0, external_count: 1 };
    rules.nat_count = 1;
    rules
}

/// A UDP datagram with right checksums.
fn udp(from: (&str, u16), to: (&str, u16)) -> Vec<u8> {
    packet(from, to, 17, 20)
}

fn packet(from: (&str, u16), to: (&str, u16), protocol: u8, payload_len: usize) -> Vec<u8> {
    let mut upper = vec![0; 8 + payload_len];
    upper[..2].copy_from_slice(&from.1.to_be_bytes());
    upper[2..4].copy_from_slice(&to.1.to_be_bytes());
    let len = upper.len() as u16;
    upper[4..6].copy_from_slice(&len.to_be_bytes());
    let octets = |text: &str| text.parse::<std::net::Ipv4Addr>().unwrap();
    let sum = Checksum::pseudo(octets(from.0).into(), octets(to.0).into(), 17, len.into());
    let sum = sum.bytes(&upper).finish();
    upper[6..8].copy_from_slice(&sum.to_be_bytes());
    let mut ip = vec![0x45, 0, 0, 0, 0, 9, 0, 0, 64, protocol, 0, 0];
    ip[2..4].copy_from_slice(&(20 + len).to_be_bytes());
    ip.extend(octets(from.0).octets());
    ip.extend(octets(to.0).octets());
    let sum = Checksum::default().bytes(&ip).finish();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend(upper);
    ip
}

struct Lab {
    model: Model,
    rules: Box<RuleSet>,
}

impl Lab {
    fn new(rules: Box<RuleSet>) -> Self {
        Self { model: Model::new(), rules }
    }

    fn out(&mut self, packet: &[u8]) -> (Verdict, Vec<u8>) {
        let (mut bytes, mut work) = (packet.to_vec(), Work::EMPTY);
        self.model.ifindex = TUN;
        let mut buffer = Buffer::finished(&mut bytes);
        let verdict = from_tunnel(&mut buffer, &mut self.model, &self.rules, &mut work);
        (verdict, bytes)
    }

    fn in_by_nic(&mut self, packet: &[u8]) -> (Verdict, Vec<u8>) {
        let (mut bytes, mut work) = (packet.to_vec(), Work::EMPTY);
        self.model.ifindex = NIC;
        let mut buffer = Buffer::finished(&mut bytes);
        let verdict = from_nic(&mut buffer, &mut self.model, &self.rules, &mut work);
        (verdict, bytes)
    }
}

/// The same packet one router on.
fn routed(mut packet: Vec<u8>) -> Vec<u8> {
    packet[8] -= 1;
    packet[10..12].fill(0);
    let sum = Checksum::default().bytes(&packet[..20]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

const INNER: (&str, u16) = ("10.9.0.2", 4000);
const REMOTE: (&str, u16) = ("198.51.100.7", 53);
const OUTER: (&str, u16) = ("192.0.2.1", 20_000);

#[test]
fn a_packet_goes_out_translated_and_its_answer_comes_back() {
    let mut lab = Lab::new(masquerade());
    let (verdict, packet) = lab.out(&udp(INNER, REMOTE));
    assert_eq!(verdict, Verdict::Out);
    assert_eq!(packet, routed(udp(OUTER, REMOTE)));
    let (verdict, packet) = lab.in_by_nic(&udp(REMOTE, OUTER));
    assert_eq!(verdict, Verdict::In);
    assert_eq!(packet, routed(udp(REMOTE, INNER)));
}

#[test]
fn a_mapping_is_the_same_for_all_remotes_and_filters_by_address() {
    let mut lab = Lab::new(masquerade());
    lab.out(&udp(INNER, REMOTE));
    let other = ("203.0.113.9", 53);
    let (verdict, _) = lab.in_by_nic(&udp(other, OUTER));
    assert_eq!(verdict, Verdict::Drop(DropReason::Unsolicited));
    assert_eq!(lab.out(&udp(INNER, other)).1, routed(udp(OUTER, other)));
    // Another port of an address that was sent to.
    let (verdict, packet) = lab.in_by_nic(&udp((other.0, 9), OUTER));
    assert_eq!((verdict, packet), (Verdict::In, routed(udp((other.0, 9), INNER))));
    // Another inner port has another external one.
    let second = lab.out(&udp((INNER.0, 4001), REMOTE)).1;
    assert_eq!(second, routed(udp((OUTER.0, 20_001), REMOTE)));
}

#[test]
fn ports_are_used_up_and_those_of_sockets_left_alone() {
    let mut lab = Lab::new(masquerade());
    lab.model.sockets = vec![20_000];
    let from = |port| udp((INNER.0, port), REMOTE);
    assert_eq!(lab.out(&from(1)).1, routed(udp((OUTER.0, 20_001), REMOTE)));
    assert_eq!(lab.model.events, [NatEvent::PortInUse]);
    assert_eq!(lab.out(&from(2)).0, Verdict::Out);
    assert_eq!(lab.out(&from(3)).0, Verdict::Out);
    assert_eq!(lab.out(&from(4)).0, Verdict::Drop(DropReason::NoPort));
    assert_eq!(lab.out(&from(1)).0, Verdict::Out, "who has one keeps it");
    lab.model.flows_max = lab.model.flows.len();
    let full = lab.out(&udp((INNER.0, 1), ("203.0.113.9", 53))).0;
    assert_eq!(full, Verdict::Drop(DropReason::FlowsFull));
}

#[test]
fn a_slot_that_was_taken_back_ends_flow_and_mapping() {
    let mut lab = Lab::new(masquerade());
    lab.out(&udp(INNER, REMOTE));
    let slot = slot_index(ring(0, Protocol::Udp), 0);
    lab.model.slots.get_mut(&slot).unwrap().generation += 1;
    assert_eq!(lab.in_by_nic(&udp(REMOTE, OUTER)).0, FOREIGN_VERDICT);
    let (verdict, packet) = lab.out(&udp(INNER, REMOTE));
    assert_eq!((verdict, packet), (Verdict::Out, routed(udp((OUTER.0, 20_001), REMOTE))));
}

const FOREIGN_VERDICT: Verdict = Verdict::Pass(NatEvent::PassedForeign);

#[test]
fn what_is_covered_is_never_passed_on() {
    let mut lab = Lab::new(masquerade());
    let mut options = udp(INNER, REMOTE);
    options[0] = 0x46;
    assert_eq!(lab.out(&options).0, Verdict::Drop(DropReason::Untranslatable));
    let gre = packet(INNER, REMOTE, 47, 20);
    assert_eq!(lab.out(&gre).0, Verdict::Drop(DropReason::Untranslatable));
    let mut fragment = udp(INNER, REMOTE);
    fragment[7] = 100;
    assert_eq!(lab.out(&fragment).0, Verdict::Drop(DropReason::FragmentUnknown));
    let spoofed = udp(("10.8.0.2", 1), REMOTE);
    assert_eq!(lab.out(&spoofed).0, Verdict::Drop(DropReason::SourceUnowned));
    assert_eq!(lab.out(&udp((INNER.0, 0), REMOTE)).0, Verdict::Drop(DropReason::Untranslatable));
    // The host's own, and what goes to another peer, is not covered.
    assert_eq!(lab.out(&udp(INNER, ("192.0.2.1", 22))).0, FOREIGN_VERDICT);
    assert_eq!(lab.out(&udp(INNER, ("10.9.0.3", 22))).0, FOREIGN_VERDICT);
}

#[test]
fn later_fragments_follow_the_first() {
    let mut lab = Lab::new(masquerade());
    let mut first = udp(INNER, REMOTE);
    first[6] = 0x20;
    assert_eq!(lab.out(&first).0, Verdict::Out);
    let mut later = udp(INNER, REMOTE);
    later[7] = 100;
    let (verdict, packet) = lab.out(&later);
    assert_eq!((verdict, &packet[12..16]), (Verdict::Out, &[192, 0, 2, 1][..]));
    assert_eq!(packet[20..], later[20..]);
}

#[test]
fn a_forwarded_port_is_reached_from_outside_and_from_inside() {
    let mut rules = masquerade();
    rules.forward[0] = ForwardRule {
        external: key(OUTER.0),
        to: key("10.9.0.3"),
        nic: NIC,
        port: 8080_u16.to_be(),
        to_port: 80_u16.to_be(),
        protocol: Protocol::Udp as u32,
    };
    rules.forward_count = 1;
    let mut lab = Lab::new(rules);
    let (outside, server) = ((OUTER.0, 8080), ("10.9.0.3", 80));
    for (from, back) in [(REMOTE, Verdict::Out), (INNER, Verdict::In)] {
        let there = udp(from, outside);
        let is_inside = from == INNER;
        let came = if is_inside { lab.out(&there) } else { lab.in_by_nic(&there) };
        assert_eq!(came, (Verdict::In, routed(udp(from, server))));
        assert_eq!(lab.out(&udp(server, from)), (back, routed(udp(outside, from))));
    }
}

#[test]
fn what_no_allow_rule_names_is_denied_and_answers_pass() {
    let mut rules = no_rules();
    rules.flags = rule_flags::DENY;
    rules.allow[0] = AllowRule {
        from: Prefix::new(key("10.9.0.0"), 96 + 24),
        to: Prefix::new(key(REMOTE.0), 128),
        protocol: 17,
        port_first: 50,
        port_last: 53,
        counter: 5,
    };
    rules.allow_count = 1;
    let mut lab = Lab::new(rules);
    let passed = Verdict::Pass(NatEvent::PassedAllowed);
    let denied = Verdict::Drop(DropReason::NotAllowed);
    assert_eq!(lab.in_by_nic(&udp(REMOTE, INNER)).0, denied, "it answers nothing yet");
    let there = udp(INNER, REMOTE);
    assert_eq!(lab.out(&there), (passed, there.clone()));
    assert_eq!(lab.model.allowed, [5]);
    assert_eq!(lab.in_by_nic(&udp(REMOTE, INNER)).0, passed);
    assert_eq!(lab.out(&udp(INNER, (REMOTE.0, 54))).0, denied);
    assert_eq!(lab.out(&udp(INNER, (REMOTE.0, 49))).0, denied);
    assert_eq!(lab.out(&udp(INNER, ("10.9.0.3", 53))).0, denied, "to another peer");
    assert_eq!(lab.in_by_nic(&udp(REMOTE, ("192.0.2.1", 22))).0, FOREIGN_VERDICT, "the host's");
    let mut options = udp(INNER, REMOTE);
    options[0] = 0x46;
    assert_eq!(lab.out(&options).0, Verdict::Drop(DropReason::Untranslatable));

    // Other rules end what they do not want, both ways.
    lab.rules.version = 2;
    lab.rules.allow[0].port_last = 52;
    assert_eq!(lab.in_by_nic(&udp(REMOTE, INNER)).0, denied);
    assert_eq!(lab.out(&there).0, denied);
    assert!(lab.model.flows.is_empty());
}

#[test]
fn flows_that_new_rules_want_go_on() {
    let mut lab = Lab::new(masquerade());
    lab.out(&udp(INNER, REMOTE));
    lab.rules.version = 2;
    assert_eq!(lab.in_by_nic(&udp(REMOTE, OUTER)).0, Verdict::In);
    lab.rules.version = 3;
    lab.rules.nat[0].from = Prefix::new(key("10.9.0.3"), 128);
    assert_eq!(lab.in_by_nic(&udp(REMOTE, OUTER)).0, Verdict::Drop(DropReason::Unsolicited));
    assert_eq!(lab.out(&udp(INNER, REMOTE)).0, FOREIGN_VERDICT);
}

#[test]
fn what_is_too_large_or_too_old_is_refused() {
    let mut lab = Lab::new(masquerade());
    lab.out(&udp(INNER, REMOTE));
    let mut large = packet(INNER, REMOTE, 17, 1600);
    assert_eq!(lab.out(&large).0, Verdict::Drop(DropReason::TooLarge));
    large[6] = 0x40;
    assert_eq!(lab.out(&large).0, Verdict::Pass(NatEvent::PassedToRefuse));
    let large = packet(REMOTE, OUTER, 17, 1400);
    assert_eq!(lab.in_by_nic(&large).0, Verdict::Answer(Error::TooBig(1420)));
    let mut old = udp(INNER, REMOTE);
    old[8] = 1;
    assert_eq!(lab.out(&old).0, Verdict::Pass(NatEvent::PassedToRefuse));
    let mut old = udp(REMOTE, OUTER);
    old[8] = 1;
    assert_eq!(lab.in_by_nic(&old).0, Verdict::Answer(Error::TimeExceeded));
}
