//! The engine over maps in memory: whole flows, as RFC 4787, 5382 and 5508 ask for them, and the rule that what is
//! covered is translated or dropped.

use std::collections::HashMap;

use proptest::prelude::*;

use super::engine::{Route, Segments, Tables, Verdict, Work, from_nic, from_tunnel};
use super::map::*;
use super::model::{self, Content, Finish, Packet, key, sum};
use super::packet::{Buffer, Sums};
use super::tuple::Tuple;
use crate::map::AddressKey;
use crate::nat::error::Error;
use crate::outcome::{DropReason, NatEvent};

const TUN: u32 = 9;
const NIC: u32 = 2;
/// Not named by any rule.
const OTHER_NIC: u32 = 3;
const PORT_FIRST: u32 = 30_000;
/// Ports that are free at first, of each protocol and address.
const FREE: u32 = 3;

const ANNE: [u8; 4] = [10, 9, 0, 2];
const BERT: [u8; 4] = [10, 9, 0, 3];
const GATEWAY: [u8; 4] = [203, 0, 113, 9];
const REMOTE: [u8; 4] = [192, 0, 2, 1];
const STRANGER: [u8; 4] = [192, 0, 2, 66];

/// The maps, and a kernel that knows few ways.
#[derive(Default)]
struct Memory {
    now_ns: u64,
    flows: HashMap<FlowKey, Flow>,
    found: Option<FlowKey>,
    mappings: HashMap<MappingKey, Mapping>,
    slots: HashMap<u32, Slot>,
    rings: HashMap<u32, Vec<u32>>,
    fragments: HashMap<FragmentKey, FragmentEntry>,
    sockets: Vec<u16>,
    ifindex: u32,
    mtu: u32,
    flows_max: usize,
    segments: Option<Segments>,
    allowed: Vec<u32>,
    rule: u32,
}

const NO_SLOT_YET: Slot =
    Slot { last_seen_ns: 0, inner: AddressKey([0; 4]), generation: 0, inner_port: 0, padding: 0 };

impl Tables for Memory {
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
        if self.flows.len() >= self.flows_max && !self.flows.contains_key(key) {
            return false;
        }
        self.flows.insert(*key, *flow);
        self.find_flow(key)
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
        Some(self.slots.get(&index).copied().unwrap_or(NO_SLOT_YET))
    }

    fn take_slot(&mut self, index: u32, inner: &AddressKey, inner_port: u16) -> Option<u32> {
        let slot = self.slots.entry(index).or_insert(NO_SLOT_YET);
        assert_eq!(slot.generation % 2, 0, "a slot that somebody has");
        let generation = slot.generation + 1;
        *slot =
            Slot { last_seen_ns: self.now_ns, inner: *inner, generation, inner_port, padding: 0 };
        Some(generation)
    }

    fn touch_slot(&mut self, index: u32) {
        if let Some(slot) = self.slots.get_mut(&index) {
            slot.last_seen_ns = self.now_ns;
        }
    }

    fn take_port(&mut self, ring: u32) -> Option<u32> {
        self.rings.entry(ring).or_insert_with(|| (0..FREE).rev().collect()).pop()
    }

    fn is_owned(&mut self, address: &AddressKey) -> bool {
        *address == key(&ANNE) || *address == key(&BERT) || address.0[0].to_ne_bytes()[0] == 0xfd
    }

    fn has_socket(&mut self, _: &Tuple, _: &AddressKey, port: u16) -> bool {
        self.sockets.contains(&u16::from_be(port))
    }

    fn route(&mut self, tuple: &Tuple, len: u32) -> Route {
        if self.mtu != 0 && len > self.mtu {
            return Route::TooBig;
        }
        let [first, second, ..] = if tuple.is_v4 {
            tuple.destination.0[3].to_ne_bytes()
        } else {
            tuple.destination.0[0].to_ne_bytes()
        };
        match (tuple.is_v4, first, second) {
            (true, 10, 9) | (false, 0xfd, _) => Route::Out(TUN),
            (true, 172, _) => Route::Out(OTHER_NIC),
            (true, 203, _) | (true, 224.., _) | (false, 0xff, _) => Route::Local,
            _ => Route::Out(NIC),
        }
    }

    fn refresh_next_hop(&mut self) {}

    fn rule(&mut self) -> &mut u32 {
        &mut self.rule
    }

    fn tunnel_mtu_below(&mut self, len: u32) -> Option<u32> {
        (self.mtu != 0 && len > self.mtu).then_some(self.mtu)
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
        self.segments.unwrap_or(Segments { len: 0, count: 1 })
    }

    fn count(&mut self, _: NatEvent) {}

    fn count_allowed(&mut self, counter: u32) {
        self.allowed.push(counter);
    }
}

/// A gateway: its maps and its rules.
struct World {
    memory: Memory,
    rules: Box<RuleSet>,
}

/// What became of a packet, and its bytes.
type Outcome = (Verdict, Vec<u8>);

impl World {
    /// Without any rule.
    fn empty() -> Self {
        let prefix = Prefix::new(AddressKey([0; 4]), 0);
        let rules = RuleSet {
            version: 1,
            tun: TUN,
            mark: 0,
            port_first: PORT_FIRST,
            flags: 0,
            nat_count: 0,
            forward_count: 0,
            allow_count: 0,
            external_count: 0,
            nat: [NatRule { from: prefix, out: 0, external_first: 0, external_count: 0 };
                NAT_RULES_LEN],
            forward: [ForwardRule {
                external: AddressKey([0; 4]),
                to: AddressKey([0; 4]),
                nic: 0,
                port: 0,
                to_port: 0,
                protocol: 0,
            }; FORWARD_RULES_LEN],
            allow: [AllowRule {
                from: prefix,
                to: prefix,
                protocol: 0,
                port_first: 0,
                port_last: 0,
                counter: 0,
            }; ALLOW_RULES_LEN],
            externals: [External { address: AddressKey([0; 4]), nic: 0, generation: 0 };
                EXTERNALS_LEN],
        };
        let memory = Memory { now_ns: 1, flows_max: 1000, ..Memory::default() };
        Self { memory, rules: Box::new(rules) }
    }

    /// `masquerade out=NIC`, of both versions.
    fn masquerade() -> Self {
        let mut world = Self::empty();
        let gateway_v6 = gateway(false);
        world.rules.externals[0] = External { address: key(&GATEWAY), nic: NIC, generation: 1 };
        world.rules.externals[1] = External { address: key(&gateway_v6), nic: NIC, generation: 1 };
        world.rules.external_count = 2;
        let v4 = Prefix::new(key(&[0; 4]), 96);
        let v6 = Prefix::new(key(&[[0xfd; 1].as_slice(), &[0; 15]].concat()), 8);
        for (i, from) in [v4, v6].into_iter().enumerate() {
            world.rules.nat[i] =
                NatRule { from, out: NIC, external_first: i as u32, external_count: 1 };
        }
        world.rules.nat_count = 2;
        world
    }

    /// And `Forward = udp|tcp NIC:80 -> ANNE:8080`.
    fn forwarding() -> Self {
        let mut world = Self::masquerade();
        for (i, protocol) in [Protocol::Tcp, Protocol::Udp].into_iter().enumerate() {
            world.rules.forward[i] = ForwardRule {
                external: key(&GATEWAY),
                to: key(&ANNE),
                nic: NIC,
                port: 80_u16.to_be(),
                to_port: 8080_u16.to_be(),
                protocol: protocol as u32,
            };
        }
        world.rules.forward_count = 2;
        world
    }

    /// `Allow = ANNE -> 192.0.2.0/24 udp 53`, besides what there is.
    fn allowing(mut self) -> Self {
        self.rules.allow[0] = AllowRule {
            from: Prefix::new(key(&ANNE), 128),
            to: Prefix::new(key(&REMOTE), 96 + 24),
            protocol: 17,
            port_first: 53,
            port_last: 53,
            counter: 4,
        };
        self.rules.allow_count = 1;
        self.rules.flags = rule_flags::DENY;
        self
    }

    fn tunnel(&mut self, bytes: &[u8]) -> Outcome {
        self.memory.ifindex = TUN;
        let mut bytes = bytes.to_vec();
        let mut work = Work::EMPTY;
        let mut buffer = Buffer { bytes: &mut bytes, sums: Sums::Finished };
        let verdict = from_tunnel(&mut buffer, &mut self.memory, &self.rules, &mut work);
        (verdict, bytes)
    }

    fn nic(&mut self, bytes: &[u8]) -> Outcome {
        self.memory.ifindex = NIC;
        let mut bytes = bytes.to_vec();
        let mut work = Work::EMPTY;
        let mut buffer = Buffer { bytes: &mut bytes, sums: Sums::Finished };
        let verdict = from_nic(&mut buffer, &mut self.memory, &self.rules, &mut work);
        (verdict, bytes)
    }

    /// A packet that must go out, translated: as whom it goes.
    fn sent(&mut self, packet: &Packet) -> Packet {
        let (verdict, bytes) = self.tunnel(&packet.bytes(Finish::Full));
        assert_eq!(verdict, Verdict::Out, "{packet:?}");
        expect_one_hop(packet, &bytes, 0)
    }

    /// A packet that must come in, translated: to whom.
    fn delivered(&mut self, packet: &Packet) -> Packet {
        let (verdict, bytes) = self.nic(&packet.bytes(Finish::Full));
        assert_eq!(verdict, Verdict::In, "{packet:?}");
        expect_one_hop(packet, &bytes, 1)
    }
}

/// What `packet` became, if it differs by its TTL and by one end only, and its checksums are right.
fn expect_one_hop(packet: &Packet, bytes: &[u8], end: usize) -> Packet {
    let tuple = Tuple::of(bytes).unwrap();
    let address = match (tuple.is_v4, end) {
        (true, end) => &bytes[12 + 4 * end..][..4],
        (false, end) => &bytes[8 + 16 * end..][..16],
    };
    let port = u16::from_be(if end == 0 { tuple.source_port } else { tuple.destination_port });
    let mut expected = packet.clone().with(end, address, port);
    expected.ttl -= 1;
    assert_eq!(bytes, expected.bytes(Finish::Full), "of {packet:?}");
    expected
}

fn gateway(is_v4: bool) -> Vec<u8> {
    if is_v4 { GATEWAY.to_vec() } else { [&[0x20, 1, 0xd, 0xb8][..], &[0; 11], &[9]].concat() }
}

fn packet(from: [u8; 4], to: [u8; 4], content: Content) -> Packet {
    Packet {
        addresses: [from.to_vec(), to.to_vec()],
        tos: 0,
        ttl: 64,
        id: 77,
        fragment: None,
        dont_fragment: false,
        content,
    }
}

fn udp(from: ([u8; 4], u16), to: ([u8; 4], u16)) -> Packet {
    let content =
        Content::Udp { ports: [from.1, to.1], has_checksum: true, data: vec![1, 2, 3, 4, 5] };
    packet(from.0, to.0, content)
}

fn tcp(from: ([u8; 4], u16), to: ([u8; 4], u16), flags: u8, seq: u32, ack: u32) -> Packet {
    let [seq, ack] = [seq, ack].map(u32::to_be_bytes);
    let middle = [&seq[..], &ack, &[0x50, flags, 2, 0]].concat().try_into().unwrap();
    packet(from.0, to.0, Content::Tcp { ports: [from.1, to.1], middle, rest: Vec::new() })
}

fn echo(from: [u8; 4], to: [u8; 4], is_request: bool, id: u16) -> Packet {
    packet(from, to, Content::Echo { is_request, id, data: vec![7; 20] })
}

fn about(from: [u8; 4], to: [u8; 4], quoted: &Packet) -> Packet {
    let quoted_len = quoted.bytes(Finish::Full).len().min(28);
    let quoted = Box::new(quoted.clone());
    packet(from, to, Content::Error { kind: 3, code: 3, rest: [0; 4], quoted, quoted_len })
}

/// The answer to a packet: both ends exchanged.
fn answer(sent: &Packet) -> Packet {
    let mut answer = sent.clone();
    answer.addresses.reverse();
    answer.ttl = 60;
    match &mut answer.content {
        Content::Tcp { ports, .. } | Content::Udp { ports, .. } => ports.reverse(),
        Content::Echo { is_request, .. } => *is_request = false,
        _ => {}
    }
    answer
}

#[test]
fn a_flow_goes_out_and_its_answers_come_back() {
    for first in [
        udp((ANNE, 5000), (REMOTE, 53)),
        tcp((ANNE, 5000), (REMOTE, 443), 2, 1, 0),
        echo(ANNE, REMOTE, true, 5000),
    ] {
        let mut world = World::masquerade();
        let sent = world.sent(&first);
        assert_eq!(sent.addresses[0], GATEWAY);
        assert!(u32::from(sent.ports()[0]) >= PORT_FIRST);
        let back = world.delivered(&answer(&sent));
        assert_eq!((&back.addresses[1][..], back.ports()[1]), (&ANNE[..], 5000));
        assert_eq!(world.sent(&first).ports(), sent.ports(), "it stays so");
        let flow = world.memory.flows
            [&Tuple::of(&first.bytes(Finish::Full)[..]).unwrap().flow_from_inside()];
        assert_eq!(flow.packets, [2, 1]);
    }
}

/// RFC 4787 REQ-1, RFC 5382 REQ-1, RFC 5508 REQ-1.
#[test]
fn a_mapping_is_the_same_whoever_it_speaks_with() {
    let mut world = World::masquerade();
    let first = world.sent(&udp((ANNE, 5000), (REMOTE, 53))).ports()[0];
    assert_eq!(world.sent(&udp((ANNE, 5000), (REMOTE, 54))).ports()[0], first);
    assert_eq!(world.sent(&udp((ANNE, 5000), (STRANGER, 53))).ports()[0], first);
    assert_ne!(world.sent(&udp((ANNE, 5001), (REMOTE, 53))).ports()[0], first);
    assert_ne!(world.sent(&udp((BERT, 5000), (REMOTE, 53))).ports()[0], first);
    // Protocols have ports of their own.
    let syn = |port| tcp((ANNE, 5000), (REMOTE, port), 2, 1, 0);
    assert_eq!(world.sent(&syn(80)).ports()[0], world.sent(&syn(81)).ports()[0]);
    let id = world.sent(&echo(ANNE, REMOTE, true, 5000)).ports()[0];
    assert_eq!(world.sent(&echo(ANNE, STRANGER, true, 5000)).ports()[0], id);
}

/// RFC 4787 REQ-8: filtering by address.
#[test]
fn only_who_was_sent_something_may_answer() {
    let mut world = World::masquerade();
    let sent = world.sent(&udp((ANNE, 5000), (REMOTE, 53)));
    let port = sent.ports()[0];
    let other_port = udp((REMOTE, 9999), (GATEWAY, port));
    assert_eq!(world.delivered(&other_port).addresses[1], ANNE);
    let stranger = udp((STRANGER, 53), (GATEWAY, port)).bytes(Finish::Full);
    assert_eq!(world.nic(&stranger), (Verdict::Drop(DropReason::Unsolicited), stranger.clone()));
    world.sent(&udp((ANNE, 5000), (STRANGER, 1)));
    assert_eq!(world.nic(&stranger).0, Verdict::In, "now it was");
    // Nobody has this port: it is the host's.
    let host = udp((REMOTE, 53), (GATEWAY, port + 1)).bytes(Finish::Full);
    assert_eq!(world.nic(&host).0, Verdict::Pass(NatEvent::PassedForeign));
}

#[test]
fn echo_requests_from_outside_are_the_hosts() {
    let mut world = World::masquerade();
    let id = world.sent(&echo(ANNE, REMOTE, true, 5000)).ports()[0];
    let request = echo(REMOTE, GATEWAY, true, id).bytes(Finish::Full);
    assert_eq!(world.nic(&request), (Verdict::Pass(NatEvent::PassedForeign), request));
}

#[test]
fn sources_that_nobody_owns_are_dropped() {
    let mut world = World::masquerade();
    for first in [udp(([10, 9, 7, 7], 1), (REMOTE, 53)), echo([8, 8, 8, 8], REMOTE, true, 1)] {
        let dropped = Verdict::Drop(DropReason::SourceUnowned);
        assert_eq!(world.tunnel(&first.bytes(Finish::Full)).0, dropped);
    }
}

/// RFC 5508 REQ-4, REQ-5 and RFC 4787 REQ-11.
#[test]
fn errors_come_to_who_sent_the_packet() {
    for first in [
        udp((ANNE, 5000), (REMOTE, 53)),
        tcp((ANNE, 5000), (REMOTE, 443), 2, 1, 0),
        echo(ANNE, REMOTE, true, 5000),
    ] {
        let mut world = World::masquerade();
        let sent = world.sent(&first);
        let flows = world.memory.flows.clone();
        let router = [198, 51, 100, 1];
        let error = about(router, GATEWAY, &sent);
        let (verdict, bytes) = world.nic(&error.bytes(Finish::Full));
        assert_eq!(verdict, Verdict::In);
        let quoted = Packet { ttl: sent.ttl, ..first.clone() };
        let expected = Packet { ttl: 63, ..about(router, ANNE, &quoted) };
        assert_eq!(bytes, expected.bytes(Finish::Full));
        assert_eq!(world.memory.flows, flows, "an error keeps no flow alive, and ends none");

        // About what came back, from a router inside.
        let back = world.delivered(&answer(&sent));
        let (verdict, bytes) = world.tunnel(&about(BERT, REMOTE, &back).bytes(Finish::Full));
        assert_eq!(verdict, Verdict::Out);
        let quoted = Packet { ttl: back.ttl, ..answer(&sent) };
        let expected = Packet { ttl: 63, ..about(GATEWAY, REMOTE, &quoted) };
        assert_eq!(bytes, expected.bytes(Finish::Full));

        // About nothing that was ever sent.
        let unrelated = about(router, GATEWAY, &udp((GATEWAY, 1), (REMOTE, 2)));
        let (verdict, _) = world.nic(&unrelated.bytes(Finish::Full));
        assert_eq!(verdict, Verdict::Pass(NatEvent::PassedForeign), "the host's, perhaps");
        let unrelated = about(BERT, REMOTE, &udp((REMOTE, 1), (BERT, 2)));
        let (verdict, _) = world.tunnel(&unrelated.bytes(Finish::Full));
        assert_eq!(verdict, Verdict::Drop(DropReason::UnrelatedError));
    }
}

/// RFC 4787 REQ-14.
#[test]
fn fragments_follow_the_first_one() {
    let mut world = World::masquerade();
    let first = Packet { fragment: Some((0, true)), ..udp((ANNE, 5000), (REMOTE, 53)) };
    let later = Content::Later { protocol: 17, data: vec![9; 30] };
    let later = Packet { fragment: Some((2, false)), ..packet(ANNE, REMOTE, later) };
    let early = world.tunnel(&later.bytes(Finish::Full)).0;
    assert_eq!(early, Verdict::Drop(DropReason::FragmentUnknown), "before the first");
    let sent = world.sent(&first);
    assert_eq!(world.sent(&later).addresses[0], GATEWAY);
    let another = Packet { id: 78, ..later.clone() };
    let dropped = Verdict::Drop(DropReason::FragmentUnknown);
    assert_eq!(world.tunnel(&another.bytes(Finish::Full)).0, dropped);

    world.delivered(&answer(&sent));
    let back = Packet { addresses: [REMOTE.to_vec(), GATEWAY.to_vec()], ..later };
    assert_eq!(world.delivered(&back).addresses[1], ANNE);
}

#[test]
fn a_forwarded_port_leads_inside_and_back_out() {
    let mut world = World::forwarding();
    for first in [udp((REMOTE, 6000), (GATEWAY, 80)), tcp((REMOTE, 6000), (GATEWAY, 80), 2, 1, 0)] {
        let inner = world.delivered(&first);
        assert_eq!((&inner.addresses[1][..], inner.ports()[1]), (&ANNE[..], 8080));
        let back = world.sent(&answer(&inner));
        assert_eq!((&back.addresses[0][..], back.ports()[0]), (&GATEWAY[..], 80));
        let error = about(ANNE, REMOTE, &inner);
        let (verdict, bytes) = world.tunnel(&error.bytes(Finish::Full));
        assert_eq!(verdict, Verdict::Out);
        let quoted = Packet { ttl: inner.ttl, ..first.clone() };
        assert_eq!(
            bytes,
            Packet { ttl: 63, ..about(GATEWAY, REMOTE, &quoted) }.bytes(Finish::Full)
        );
    }
    let other = udp((REMOTE, 6000), (GATEWAY, 81)).bytes(Finish::Full);
    assert_eq!(world.nic(&other).0, Verdict::Pass(NatEvent::PassedForeign));
}

#[test]
fn a_forwarded_port_is_reached_from_inside_too() {
    let mut world = World::forwarding();
    let (verdict, bytes) = world.tunnel(&udp((BERT, 6000), (GATEWAY, 80)).bytes(Finish::Full));
    assert_eq!(verdict, Verdict::In);
    let inner = expect_one_hop(&udp((BERT, 6000), (GATEWAY, 80)), &bytes, 1);
    assert_eq!((&inner.addresses[1][..], inner.ports()[1]), (&ANNE[..], 8080));
    let back = answer(&inner);
    let (verdict, bytes) = world.tunnel(&back.bytes(Finish::Full));
    assert_eq!(verdict, Verdict::In);
    let back = expect_one_hop(&back, &bytes, 0);
    assert_eq!((&back.addresses[0][..], back.ports()[0]), (&GATEWAY[..], 80));
}

#[test]
fn what_is_not_allowed_is_denied_and_answers_pass() {
    for mut world in [World::empty().allowing(), World::masquerade().allowing()] {
        let is_translated = world.rules.nat_count != 0;
        let allowed = udp((ANNE, 5000), (REMOTE, 53));
        let denied = Verdict::Drop(DropReason::NotAllowed);
        for first in [
            udp((ANNE, 5000), (REMOTE, 54)),
            udp((BERT, 5000), (REMOTE, 53)),
            udp((ANNE, 5000), ([192, 0, 3, 1], 53)),
            udp((ANNE, 5000), (BERT, 53)),
            tcp((ANNE, 5000), (REMOTE, 53), 2, 1, 0),
            echo(ANNE, REMOTE, true, 1),
        ] {
            assert_eq!(world.tunnel(&first.bytes(Finish::Full)).0, denied, "{first:?}");
        }
        let (verdict, bytes) = world.tunnel(&allowed.bytes(Finish::Full));
        assert_eq!(world.memory.allowed, [4]);
        let mut back = udp((REMOTE, 53), (ANNE, 5000));
        if is_translated {
            assert_eq!(verdict, Verdict::Out);
            back = answer(&expect_one_hop(&allowed, &bytes, 0));
            assert_eq!(world.delivered(&back).addresses[1], ANNE);
        } else {
            assert_eq!(verdict, Verdict::Pass(NatEvent::PassedAllowed));
            assert_eq!(bytes, allowed.bytes(Finish::Full));
            let (verdict, _) = world.nic(&back.bytes(Finish::Full));
            assert_eq!(verdict, Verdict::Pass(NatEvent::PassedAllowed));
        }
        // What nobody asked for.
        let unasked = udp((REMOTE, 53), (ANNE, 5001)).bytes(Finish::Full);
        assert_eq!(world.nic(&unasked).0, denied);
        let to_host = udp((ANNE, 5000), (GATEWAY, 22)).bytes(Finish::Full);
        assert_eq!(world.tunnel(&to_host).0, Verdict::Pass(NatEvent::PassedForeign));
    }
}

#[test]
fn a_slot_that_was_taken_back_ends_its_flows() {
    let mut world = World::masquerade();
    let first = udp((ANNE, 5000), (REMOTE, 53));
    let sent = world.sent(&first);
    let index = *world.memory.slots.keys().next().unwrap();
    world.memory.slots.get_mut(&index).unwrap().generation += 1;
    let (verdict, _) = world.nic(&answer(&sent).bytes(Finish::Full));
    assert_eq!(verdict, Verdict::Pass(NatEvent::PassedForeign), "the port is nobody's");
    let again = world.sent(&first);
    assert_ne!(again.ports()[0], sent.ports()[0], "another slot");
    // Somebody else gets the first one: answers to the one before do not reach him.
    world.memory.rings.get_mut(&1).unwrap().push(index % PORTS_LEN);
    let other = world.sent(&udp((BERT, 7000), (STRANGER, 53)));
    assert_eq!(other.ports()[0], sent.ports()[0]);
    let (verdict, _) = world.nic(&answer(&sent).bytes(Finish::Full));
    assert_eq!(verdict, Verdict::Drop(DropReason::Unsolicited));
}

#[test]
fn full_tables_and_used_ports_are_reasons() {
    let mut world = World::masquerade();
    world.memory.sockets = vec![PORT_FIRST as u16];
    let first = world.sent(&udp((ANNE, 1), (REMOTE, 53))).ports()[0];
    assert_eq!(u32::from(first), PORT_FIRST + 1, "the first is a socket's");
    world.sent(&udp((ANNE, 2), (REMOTE, 53)));
    let more =
        |world: &mut World| world.tunnel(&udp((ANNE, 3), (REMOTE, 53)).bytes(Finish::Full)).0;
    assert_eq!(more(&mut world), Verdict::Drop(DropReason::NoPort));
    world.sent(&udp((ANNE, 1), (STRANGER, 53)));

    let mut world = World::masquerade();
    world.memory.flows_max = 1;
    assert_eq!(more(&mut world), Verdict::Drop(DropReason::FlowsFull));
    let mut world = World::masquerade();
    world.rules.externals[0].address = AddressKey([0; 4]);
    assert_eq!(more(&mut world), Verdict::Drop(DropReason::NoExternal));
}

#[test]
fn other_rules_end_what_they_do_not_want() {
    let first = udp((ANNE, 5000), (REMOTE, 53));
    let mut world = World::masquerade();
    let sent = world.sent(&first);
    world.rules.version += 1;
    assert_eq!(world.sent(&first).ports(), sent.ports(), "they still want it");
    let back = answer(&sent);
    world.delivered(&back);
    world.rules.version += 1;
    world.rules.externals[0].address = key(&[203, 0, 113, 10]);
    assert_eq!(world.sent(&first).addresses[0], [203, 0, 113, 10]);
    let (verdict, _) = world.nic(&back.bytes(Finish::Full));
    assert_eq!(verdict, Verdict::Pass(NatEvent::PassedForeign), "to an address that is no more");
    let mut world = World::masquerade();
    world.sent(&first);
    world.rules = World::masquerade().allowing().rules;
    world.rules.version = 2;
    world.rules.allow[0].port_first = 54;
    let (verdict, _) = world.tunnel(&first.bytes(Finish::Full));
    assert_eq!(verdict, Verdict::Drop(DropReason::NotAllowed));
}

#[test]
fn what_is_too_large_or_too_old_does_not_get_through() {
    let mut world = World::masquerade();
    let first = Packet { dont_fragment: true, ..udp((ANNE, 5000), (REMOTE, 53)) };
    let back = answer(&world.sent(&first)).bytes(Finish::Full);
    let old = Packet { ttl: 1, ..first.clone() }.bytes(Finish::Full);
    let refused = Verdict::Pass(NatEvent::PassedToRefuse);
    assert_eq!(world.tunnel(&old), (refused, old.clone()), "the kernel drops it, and says so");
    let mut old = back.clone();
    (old[8], old[10], old[11]) = (1, 0, 0);
    let checksum = !sum(&[&old[..20]]);
    old[10..12].copy_from_slice(&checksum.to_be_bytes());
    assert_eq!(world.nic(&old), (Verdict::Answer(Error::TimeExceeded), old.clone()));

    world.memory.mtu = 30;
    assert_eq!(world.nic(&back), (Verdict::Answer(Error::TooBig(30)), back.clone()));
    let (verdict, bytes) = world.tunnel(&first.bytes(Finish::Full));
    let is_refused = verdict == refused || matches!(verdict, Verdict::Answer(Error::TooBig(_)));
    assert!(is_refused && bytes == first.bytes(Finish::Full), "{verdict:?}");
    let may_be_cut = Packet { dont_fragment: false, ..first }.bytes(Finish::Full);
    assert_eq!(world.tunnel(&may_be_cut).0, Verdict::Drop(DropReason::TooLarge));
    // Of a super-packet, a segment counts.
    world.memory.mtu = 33;
    world.memory.segments = Some(Segments { len: 5, count: 9 });
    assert_eq!(world.nic(&back).0, Verdict::In);
    world.memory.segments = Some(Segments { len: 6, count: 9 });
    assert_eq!(world.nic(&back).0, Verdict::Answer(Error::TooBig(33)));
}

/// A connection's state follows both sides, and a forger does not change it.
#[test]
fn a_connection_is_followed() {
    use super::tcp::State;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;

    let mut world = World::masquerade();
    let (inside, outside) = ((ANNE, 5000), (REMOTE, 443));
    let syn = tcp(inside, outside, SYN, 100, 0);
    let port = world.sent(&syn).ports()[0];
    let key = Tuple::of(&syn.bytes(Finish::Full)[..]).unwrap().flow_from_inside();
    let state = |world: &World| State::of(world.memory.flows[&key].state);
    assert_eq!(state(&world), State::SynSent);
    let us = (GATEWAY, port);
    world.delivered(&tcp(outside, us, SYN | ACK, 900, 101));
    assert_eq!(state(&world), State::SynReceived);
    world.sent(&tcp(inside, outside, ACK, 101, 901));
    assert_eq!(state(&world), State::Established);
    world.delivered(&tcp(outside, us, RST, 902, 0));
    assert_eq!(state(&world), State::Established);
    world.delivered(&tcp(outside, us, RST, 901, 0));
    assert_eq!(state(&world), State::Closed);
}

/// Packets from an inner host to a remote one, of any form, also damaged.
fn outward() -> impl Strategy<Value = Vec<u8>> {
    let forms = any::<bool>().prop_flat_map(
        |v4| prop_oneof![2 => model::packet(v4), 1 => model::later(v4), 1 => model::error(v4)],
    );
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    (forms, damage, 0_u8..3).prop_map(|(mut packet, damage, ttl)| {
        let v4 = packet.is_v4();
        let inner = [&[0xfd][..], &[0; 14], &[2]].concat();
        let remote = [&[0x2a][..], &[0; 14], &[1]].concat();
        packet.addresses = if v4 { [ANNE.to_vec(), REMOTE.to_vec()] } else { [inner, remote] };
        packet.ttl = [1, 2, 64][usize::from(ttl)];
        let mut bytes = packet.bytes(Finish::Full);
        let addresses = if v4 { 12..20 } else { 8..40 };
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            // It keeps its version and addresses: so that it is covered.
            if at != 0 && !addresses.contains(&at) {
                bytes[at] = byte;
            } else if at == 0 && v4 {
                bytes[0] = 0x40 | byte & 0xf;
            }
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// The rule above all: in whatever form it comes, what is covered is translated or dropped.
    #[test]
    fn what_is_covered_never_passes(packets in prop::collection::vec(outward(), 1..8), mtu in 0_u32..60) {
        let mut world = World::masquerade();
        world.memory.mtu = mtu.saturating_sub(20);
        for bytes in packets {
            let tuple = Tuple::of(&bytes[..]).unwrap();
            let (verdict, after) = world.tunnel(&bytes);
            match verdict {
                Verdict::Out => {
                    let sent = Tuple::of(&after[..]).unwrap();
                    prop_assert_eq!(sent.source, key(&gateway(tuple.is_v4)));
                    prop_assert_eq!(sent.destination, tuple.destination);
                    prop_assert_eq!(sent.ttl, tuple.ttl - 1);
                    if tuple.is_v4 {
                        prop_assert_eq!(sum(&[&after[..20]]) % 0xffff, sum(&[&bytes[..20]]) % 0xffff);
                    }
                }
                Verdict::Drop(_) | Verdict::Answer(_) => {}
                Verdict::Pass(NatEvent::PassedToRefuse) => {
                    // The kernel drops it, and tells its sender.
                    let is_large = world.memory.mtu != 0 && tuple.len > world.memory.mtu;
                    prop_assert!(tuple.ttl <= 1 || (is_large && tuple.dont_fragment));
                    prop_assert_eq!(after, bytes);
                }
                other => prop_assert!(false, "{other:?} of {tuple:?}"),
            }
        }
    }

    /// With an `Allow` line that names none of them, nothing passes; nor does anything from outside.
    #[test]
    fn what_nobody_allows_never_passes(packets in prop::collection::vec(outward(), 1..8), turned in any::<bool>()) {
        let mut world = World::empty().allowing();
        world.rules.allow[0].from = Prefix::new(key(&BERT), 128);
        for mut bytes in packets {
            if turned {
                let (addresses, len) = if bytes[0] >> 4 == 4 { (12..20, 4) } else { (8..40, 16) };
                bytes[addresses].rotate_left(len);
            }
            let (verdict, _) = if turned { world.nic(&bytes) } else { world.tunnel(&bytes) };
            prop_assert!(matches!(verdict, Verdict::Drop(_)), "{verdict:?}");
        }
        prop_assert!(world.memory.flows.is_empty());
    }

    /// No two inner ports have one external port at once, and what comes back finds the one that has it.
    #[test]
    fn mappings_are_one_to_one(
        flows in prop::collection::vec((any::<bool>(), 1_u16..6, any::<bool>(), 50_u16..53, 0_u8..3), 1..40),
    ) {
        let mut world = World::masquerade();
        let mut inner_of = HashMap::new();
        for (is_anne, port, is_remote, remote_port, protocol) in flows {
            let from = (if is_anne { ANNE } else { BERT }, port);
            let to = (if is_remote { REMOTE } else { STRANGER }, remote_port);
            let first = match protocol {
                0 => udp(from, to),
                1 => tcp(from, to, 2, 1, 0),
                _ => echo(from.0, to.0, true, port),
            };
            let (verdict, bytes) = world.tunnel(&first.bytes(Finish::Full));
            if verdict == Verdict::Drop(DropReason::NoPort) {
                prop_assert!(inner_of.len() >= FREE as usize);
                continue;
            }
            prop_assert_eq!(verdict, Verdict::Out);
            let sent = expect_one_hop(&first, &bytes, 0);
            let inner = *inner_of.entry((protocol, sent.ports()[0])).or_insert(from);
            prop_assert_eq!(inner, from);
            let back = world.delivered(&answer(&sent));
            prop_assert_eq!((&back.addresses[1][..], back.ports()[1]), (&from.0[..], from.1));
        }
        prop_assert!(inner_of.len() <= 3 * FREE as usize);
    }

    #[test]
    fn any_bytes_are_judged_without_harm(
        mut bytes in prop::collection::vec(any::<u8>(), 1..120), v4 in any::<bool>(), tunnel in any::<bool>(),
    ) {
        bytes[0] = if v4 { 0x45 } else { 0x60 };
        let mut world = World::forwarding().allowing();
        let _ = if tunnel { world.tunnel(&bytes) } else { world.nic(&bytes) };
    }
}
