//! The engine over maps in memory: whole flows, as RFC 4787, 5382 and 5508 ask for them, and the rule that what is
//! covered is translated or dropped.

use std::collections::HashMap;

use proptest::prelude::*;

use super::engine::{self, Route, Segments, Tables, Verdict, Work, from_nic, from_tunnel};
use super::limit;
use super::map::*;
use super::model::{self, Content, Finish, Packet, key, sum};
use super::packet::{Buffer, Difference, Room, Skb, Summed, Sums};
use super::tuple::Tuple;
use crate::headers::Bytes;
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
    events: Vec<NatEvent>,
    rule: u32,
    /// What was asked of the last way.
    way: Option<Tuple>,
    /// How many answers may still be sent, and those that were asked about.
    answers: usize,
    asked: Vec<(AddressKey, u32)>,
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
        self.way = Some(*tuple);
        let [first, second, ..] = if tuple.is_v4 {
            tuple.destination.0[3].to_ne_bytes()
        } else {
            tuple.destination.0[0].to_ne_bytes()
        };
        match (tuple.is_v4, first, second) {
            (true, 203, _) | (true, 224.., _) | (false, 0xff, _) => Route::Local,
            _ if self.mtu != 0 && len > self.mtu => Route::TooBig,
            (true, 10, 9) | (false, 0xfd, _) => Route::Out(TUN),
            (true, 172, _) => Route::Out(OTHER_NIC),
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

    fn may_answer(&mut self, to: &AddressKey, kind: u32) -> bool {
        self.asked.push((*to, kind));
        self.asked.len() <= self.answers
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn segments(&self) -> Segments {
        self.segments.unwrap_or(Segments { len: 0, count: 1 })
    }

    fn count(&mut self, event: NatEvent) {
        self.events.push(event);
    }

    fn count_allowed(&mut self, counter: u32) {
        self.allowed.push(counter);
    }
}

/// A packet that can grow, as the kernel's can.
struct Owned {
    bytes: Vec<u8>,
    sums: Sums,
}

impl Owned {
    fn change<R>(&mut self, change: impl FnOnce(&mut Buffer<'_>) -> R) -> R {
        let mut buffer = Buffer { bytes: &mut self.bytes, sums: self.sums };
        let result = change(&mut buffer);
        self.sums = buffer.sums;
        result
    }
}

impl Bytes for Owned {
    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.read(offset)
    }
}

impl Skb for Owned {
    fn store<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        self.change(|buffer| buffer.store(offset, bytes))
    }

    fn store_uncovered<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        self.change(|buffer| buffer.store_uncovered(offset, bytes))
    }

    fn replace_l3(&mut self, offset: usize, difference: Difference) -> Option<()> {
        self.change(|buffer| buffer.replace_l3(offset, difference))
    }

    fn replace_l4(
        &mut self,
        offset: usize,
        difference: Difference,
        summed: Summed,
        zero_is_none: bool,
    ) -> Option<()> {
        self.change(|buffer| buffer.replace_l4(offset, difference, summed, zero_is_none))
    }
}

impl Room for Owned {
    fn put_before<const N: usize>(&mut self, head: &[u8; N], len: u32) -> Option<()> {
        assert!(len as usize <= self.bytes.len(), "it becomes shorter");
        self.bytes.truncate(len as usize);
        self.bytes.splice(..0, *head);
        Some(())
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
        let memory = Memory { now_ns: 1, flows_max: 1000, answers: 1000, ..Memory::default() };
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

    fn judge(&mut self, ifindex: u32, bytes: &[u8], answers: bool) -> Outcome {
        self.memory.ifindex = ifindex;
        let mut packet = Owned { bytes: bytes.to_vec(), sums: Sums::Finished };
        let mut work = Work::EMPTY;
        let (memory, rules) = (&mut self.memory, &self.rules);
        let verdict = match ifindex {
            TUN => from_tunnel(&mut packet, memory, rules, &mut work),
            _ => from_nic(&mut packet, memory, rules, &mut work),
        };
        let verdict = match verdict {
            Verdict::Answer(error) if answers => {
                assert_eq!(packet.bytes, bytes, "it is unchanged");
                engine::answer(&mut packet, memory, rules, &mut work, error)
            }
            verdict => verdict,
        };
        (verdict, packet.bytes)
    }

    fn tunnel(&mut self, bytes: &[u8]) -> Outcome {
        self.judge(TUN, bytes, false)
    }

    fn nic(&mut self, bytes: &[u8]) -> Outcome {
        self.judge(NIC, bytes, false)
    }

    /// As [`World::tunnel`], whole and right packets.
    fn out(&mut self, packet: &Packet) -> Outcome {
        self.tunnel(&packet.bytes(Finish::Full))
    }

    /// As [`World::nic`].
    fn back(&mut self, packet: &Packet) -> Outcome {
        self.nic(&packet.bytes(Finish::Full))
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

#[test]
fn errors_go_to_who_sent_the_packet_and_to_nobody_else() {
    let mut world = World::masquerade();
    let sent = world.sent(&udp((ANNE, 5000), (REMOTE, 53)));
    // Bert would reach a stranger by what Anne has with the remote; and somebody outside the host itself.
    let back = world.delivered(&answer(&sent));
    let (verdict, _) = world.out(&about(ANNE, STRANGER, &back));
    assert_eq!(verdict, Verdict::Drop(DropReason::UnrelatedError));
    let astray = about(STRANGER, BERT, &sent).bytes(Finish::Full);
    assert_eq!(world.nic(&astray), (Verdict::Pass(NatEvent::PassedForeign), astray.clone()));
}

#[test]
fn who_has_another_address_does_not_show_his_own_by_an_error_about_somebody_elses_flow() {
    // Bert is translated, and Anne is not.
    let mut world = World::masquerade().allowing();
    world.rules.nat[0].from = Prefix::new(key(&BERT), 128);
    let sent = udp((ANNE, 5000), (REMOTE, 53));
    assert_eq!(world.out(&sent).0, Verdict::Pass(NatEvent::PassedAllowed));
    let back = answer(&sent);
    assert_eq!(world.back(&back).0, Verdict::Pass(NatEvent::PassedAllowed));
    assert_eq!(world.out(&about(ANNE, REMOTE, &back)).0, Verdict::Pass(NatEvent::PassedAllowed));
    let (verdict, _) = world.out(&about(BERT, REMOTE, &back));
    assert_eq!(verdict, Verdict::Drop(DropReason::UnrelatedError));
}

#[test]
fn a_rule_for_all_of_ipv6_is_none_for_ipv4() {
    let all_of_v6 = Prefix::new(AddressKey([0; 4]), 0);
    let mut world = World::masquerade();
    // As `snat out=NIC to=` an address of IPv6 alone.
    world.rules.nat[0] =
        NatRule { from: all_of_v6, out: NIC, external_first: 1, external_count: 1 };
    world.rules.nat_count = 1;
    let packet = udp((ANNE, 5000), (REMOTE, 53));
    assert_eq!(world.out(&packet).0, Verdict::Pass(NatEvent::PassedForeign));
    let mut world = World::empty().allowing();
    (world.rules.allow[0].from, world.rules.allow[0].to) = (all_of_v6, all_of_v6);
    assert_eq!(world.out(&packet).0, Verdict::Drop(DropReason::NotAllowed));
}

#[test]
fn segments_that_nobody_has_counted_are_counted() {
    let mut world = World::masquerade();
    world.memory.segments = Some(Segments { len: 1000, count: 0 });
    for (len, count) in [(3000, 3), (3001, 4), (1, 1)] {
        let data = vec![7; usize::from(len)];
        let content = Content::Udp { ports: [5000, len], has_checksum: true, data };
        world.sent(&packet(ANNE, REMOTE, content));
        let flow = world.memory.flows.iter().find(|(key, _)| key.remote_port == len.to_be());
        assert_eq!(flow.expect("it began").1.packets, [count, 0], "{len} bytes");
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

/// RFC 4787 REQ-9: with external address and port of who sent it; and REQ-8, filtering by address.
#[test]
fn a_mapping_is_reached_from_inside_by_who_was_sent_something() {
    for is_tcp in [false, true] {
        let first = |from, to| {
            if is_tcp { tcp(from, to, 2, 1, 0) } else { udp(from, to) }
        };
        let mut world = World::masquerade();
        let port = |sent: Packet| sent.ports()[0];
        let anne = port(world.sent(&first((ANNE, 5000), (REMOTE, 53))));
        let bert = port(world.sent(&first((BERT, 6000), (REMOTE, 53))));
        let there = first((ANNE, 5000), (GATEWAY, bert));
        let unsolicited = Verdict::Drop(DropReason::Unsolicited);
        assert_eq!(world.out(&there), (unsolicited, there.bytes(Finish::Full)));
        // Now Anne has sent something to the external address: what comes from there may pass.
        let back = first((BERT, 6000), (GATEWAY, anne));
        let came = first((GATEWAY, bert), (ANNE, 5000));
        assert_eq!(world.out(&back), (Verdict::In, routed(&came)));
        let came = first((GATEWAY, anne), (BERT, 6000));
        for _ in 0..2 {
            assert_eq!(world.out(&there), (Verdict::In, routed(&came)));
        }
        // Both flows know of both directions.
        let key = |packet: &Packet| {
            Tuple::of(&packet.bytes(Finish::Full)[..]).unwrap().flow_from_inside()
        };
        assert_eq!(world.memory.flows[&key(&there)].packets, [3, 1]);
        assert_eq!(world.memory.flows[&key(&back)].packets, [1, 2]);

        // Too old, too large: told in the name of the external address.
        let old = Packet { ttl: 1, ..there.clone() };
        let told = world.judge(TUN, &old.bytes(Finish::Full), true);
        let expected = error_about(&old, Error::TimeExceeded).bytes(Finish::Full);
        assert_eq!(told, (Verdict::In, expected));
        world.memory.mtu = 100;
        let large = long(there.clone(), 101);
        let told = world.judge(TUN, &large.bytes(Finish::Full), true);
        assert!(
            matches!(told.0, Verdict::In | Verdict::Pass(NatEvent::PassedToRefuse)),
            "{told:?}"
        );
        world.memory.mtu = 0;

        // A port that nobody has is the host's, and so is one for who is not translated himself.
        assert_eq!(world.out(&first((ANNE, 5000), (GATEWAY, 22))).0, FOREIGN);
        assert_eq!(world.out(&first((ANNE, 5001), (GATEWAY, anne + 9))).0, FOREIGN);
        world.rules.version += 1;
        world.rules.nat[0].from = Prefix::new(model::key(&ANNE), 128);
        assert_eq!(world.out(&back).0, FOREIGN);
    }
    let mut world = World::masquerade();
    let id = world.sent(&echo(BERT, REMOTE, true, 5000)).ports()[0];
    assert_eq!(world.out(&echo(ANNE, GATEWAY, true, id)).0, FOREIGN, "the host answers itself");
}

#[test]
fn fragments_reach_a_mapping_from_inside() {
    let mut world = World::masquerade();
    let bert = world.sent(&udp((BERT, 6000), (REMOTE, 53))).ports()[0];
    let anne = world.sent(&udp((ANNE, 5000), (REMOTE, 53))).ports()[0];
    world.out(&udp((BERT, 6000), (GATEWAY, anne)));
    let first = Packet { fragment: Some((0, true)), ..udp((ANNE, 5000), (GATEWAY, bert)) };
    let came = first.clone().with(0, &GATEWAY, anne).with(1, &BERT, 6000);
    assert_eq!(world.out(&first), (Verdict::In, routed(&came)));
    let later = Content::Later { protocol: 17, data: vec![9; 30] };
    let later = Packet { fragment: Some((2, false)), ..packet(ANNE, GATEWAY, later) };
    let came = later.clone().with(0, &GATEWAY, 0).with(1, &BERT, 0);
    assert_eq!(world.out(&later), (Verdict::In, routed(&came)));
}

/// `Allow` is asked by the address to which it was sent.
#[test]
fn what_nobody_allows_does_not_reach_a_mapping_from_inside() {
    let mut world = World::masquerade().allowing();
    world.sent(&udp((ANNE, 5000), (REMOTE, 53)));
    let denied = Verdict::Drop(DropReason::NotAllowed);
    assert_eq!(world.out(&udp((BERT, 6000), (GATEWAY, OUTER.1))).0, denied);
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

/// The same packet one router on.
fn routed(packet: &Packet) -> Vec<u8> {
    Packet { ttl: packet.ttl - 1, ..packet.clone() }.bytes(Finish::Full)
}

const INNER: ([u8; 4], u16) = (ANNE, 4000);
const SERVER: ([u8; 4], u16) = (REMOTE, 53);
const OUTER: ([u8; 4], u16) = (GATEWAY, PORT_FIRST as u16);
const FOREIGN: Verdict = Verdict::Pass(NatEvent::PassedForeign);

#[test]
fn a_packet_goes_out_translated_and_its_answer_comes_back() {
    let mut world = World::masquerade();
    assert_eq!(world.out(&udp(INNER, SERVER)), (Verdict::Out, routed(&udp(OUTER, SERVER))));
    assert_eq!(world.back(&udp(SERVER, OUTER)), (Verdict::In, routed(&udp(SERVER, INNER))));
}

#[test]
fn a_mapping_is_the_same_for_all_remotes_and_filters_by_address() {
    let mut world = World::masquerade();
    world.out(&udp(INNER, SERVER));
    let other = (STRANGER, 53);
    assert_eq!(world.back(&udp(other, OUTER)).0, Verdict::Drop(DropReason::Unsolicited));
    assert_eq!(world.out(&udp(INNER, other)).1, routed(&udp(OUTER, other)));
    // Another port of an address that was sent to.
    let other = (other.0, 9);
    assert_eq!(world.back(&udp(other, OUTER)), (Verdict::In, routed(&udp(other, INNER))));
    // Another inner port has another external one.
    let second = world.out(&udp((INNER.0, 4001), SERVER)).1;
    assert_eq!(second, routed(&udp((OUTER.0, OUTER.1 + 1), SERVER)));
}

#[test]
fn ports_are_used_up_and_those_of_sockets_left_alone() {
    let mut world = World::masquerade();
    world.memory.sockets = vec![OUTER.1];
    let from = |port| udp((INNER.0, port), SERVER);
    assert_eq!(world.out(&from(1)).1, routed(&udp((OUTER.0, OUTER.1 + 1), SERVER)));
    assert_eq!(world.memory.events, [NatEvent::PortInUse]);
    assert_eq!(world.out(&from(2)).0, Verdict::Out);
    assert_eq!(world.out(&from(3)).0, Verdict::Drop(DropReason::NoPort));
    assert_eq!(world.out(&from(1)).0, Verdict::Out, "who has one keeps it");
    world.memory.flows_max = world.memory.flows.len();
    let full = world.out(&udp((INNER.0, 1), (STRANGER, 53))).0;
    assert_eq!(full, Verdict::Drop(DropReason::FlowsFull));
}

#[test]
fn a_slot_that_was_taken_back_ends_flow_and_mapping() {
    let mut world = World::masquerade();
    world.out(&udp(INNER, SERVER));
    let slot = slot_index(ring(0, Protocol::Udp), 0);
    world.memory.slots.get_mut(&slot).unwrap().generation += 1;
    assert_eq!(world.back(&udp(SERVER, OUTER)).0, FOREIGN);
    let sent = udp((OUTER.0, OUTER.1 + 1), SERVER);
    assert_eq!(world.out(&udp(INNER, SERVER)), (Verdict::Out, routed(&sent)));
}

#[test]
fn what_is_covered_is_never_passed_on() {
    let mut world = World::masquerade();
    let mut options = udp(INNER, SERVER).bytes(Finish::Full);
    options[0] = 0x46;
    assert_eq!(world.tunnel(&options).0, Verdict::Drop(DropReason::Untranslatable));
    let gre = packet(ANNE, REMOTE, Content::Later { protocol: 47, data: vec![1; 20] });
    assert_eq!(world.out(&gre).0, Verdict::Drop(DropReason::Untranslatable));
    let mut fragment = udp(INNER, SERVER).bytes(Finish::Full);
    fragment[7] = 100;
    assert_eq!(world.tunnel(&fragment).0, Verdict::Drop(DropReason::FragmentUnknown));
    let spoofed = udp(([10, 8, 0, 2], 1), SERVER);
    assert_eq!(world.out(&spoofed).0, Verdict::Drop(DropReason::SourceUnowned));
    assert_eq!(world.out(&udp((ANNE, 0), SERVER)).0, Verdict::Drop(DropReason::Untranslatable));
    // The host's own, and what goes to another peer, is not covered.
    assert_eq!(world.out(&udp(INNER, (GATEWAY, 22))).0, FOREIGN);
    assert_eq!(world.out(&udp(INNER, (BERT, 22))).0, FOREIGN);
}

#[test]
fn later_fragments_keep_what_they_carry() {
    let mut world = World::masquerade();
    let first = Packet { fragment: Some((0, true)), ..udp(INNER, SERVER) };
    assert_eq!(world.out(&first).0, Verdict::Out);
    let later = Content::Later { protocol: 17, data: vec![3; 28] };
    let later = Packet { fragment: Some((100, false)), ..packet(ANNE, REMOTE, later) };
    let sent = later.clone().with(0, &GATEWAY, 0);
    assert_eq!(world.out(&later), (Verdict::Out, routed(&sent)));
}

#[test]
fn a_forwarded_port_is_reached_from_outside_and_from_inside() {
    let mut world = World::forwarding();
    let (outside, server) = ((GATEWAY, 80), (ANNE, 8080));
    for (from, back) in [((REMOTE, 53), Verdict::Out), ((BERT, 53), Verdict::In)] {
        let there = udp(from, outside);
        let came = if from.0 == BERT { world.out(&there) } else { world.back(&there) };
        assert_eq!(came, (Verdict::In, routed(&udp(from, server))));
        assert_eq!(world.out(&udp(server, from)), (back, routed(&udp(outside, from))));
    }
}

#[test]
fn what_no_allow_rule_names_is_denied_and_answers_pass() {
    let mut world = World::empty();
    world.rules.flags = rule_flags::DENY;
    world.rules.allow[0] = AllowRule {
        from: Prefix::new(key(&ANNE), 96 + 24),
        to: Prefix::new(key(&REMOTE), 128),
        protocol: 17,
        port_first: 50,
        port_last: 53,
        counter: 5,
    };
    world.rules.allow_count = 1;
    let passed = Verdict::Pass(NatEvent::PassedAllowed);
    let denied = Verdict::Drop(DropReason::NotAllowed);
    assert_eq!(world.back(&udp(SERVER, INNER)).0, denied, "it answers nothing yet");
    let there = udp(INNER, SERVER);
    assert_eq!(world.out(&there), (passed, there.bytes(Finish::Full)));
    assert_eq!(world.memory.allowed, [5]);
    assert_eq!(world.back(&udp(SERVER, INNER)).0, passed);
    assert_eq!(world.out(&udp(INNER, (REMOTE, 54))).0, denied);
    assert_eq!(world.out(&udp(INNER, (REMOTE, 49))).0, denied);
    assert_eq!(world.out(&udp(INNER, (BERT, 53))).0, denied, "to another peer");
    assert_eq!(world.back(&udp(SERVER, (GATEWAY, 22))).0, FOREIGN, "the host's");
    let mut options = udp(INNER, SERVER).bytes(Finish::Full);
    options[0] = 0x46;
    assert_eq!(world.tunnel(&options).0, Verdict::Drop(DropReason::Untranslatable));

    // Other rules end what they do not want, both ways.
    world.rules.version = 2;
    world.rules.allow[0].port_last = 52;
    assert_eq!(world.back(&udp(SERVER, INNER)).0, denied);
    assert_eq!(world.out(&there).0, denied);
    assert!(world.memory.flows.is_empty());
}

#[test]
fn flows_that_new_rules_want_go_on() {
    let mut world = World::masquerade();
    world.out(&udp(INNER, SERVER));
    world.rules.version = 2;
    assert_eq!(world.back(&udp(SERVER, OUTER)).0, Verdict::In);
    world.rules.version = 3;
    world.rules.nat[0].from = Prefix::new(key(&BERT), 128);
    assert_eq!(world.back(&udp(SERVER, OUTER)).0, Verdict::Drop(DropReason::Unsolicited));
    assert_eq!(world.out(&udp(INNER, SERVER)).0, FOREIGN);
}

/// With this many bytes behind its header.
fn long(mut packet: Packet, len: usize) -> Packet {
    if let Content::Tcp { rest: data, .. }
    | Content::Udp { data, .. }
    | Content::Echo { data, .. } = &mut packet.content
    {
        *data = (0..len).map(|i| i as u8).collect();
    }
    packet
}

#[test]
fn what_is_too_large_or_too_old_is_refused() {
    let mut world = World::masquerade();
    world.out(&udp(INNER, SERVER));
    world.memory.mtu = 1500;
    let large = long(udp(INNER, SERVER), 1600);
    assert_eq!(world.out(&large).0, Verdict::Drop(DropReason::TooLarge));
    let refused = Verdict::Pass(NatEvent::PassedToRefuse);
    assert_eq!(world.out(&Packet { dont_fragment: true, ..large }).0, refused);
    world.memory.mtu = 1420;
    let large = long(udp(SERVER, OUTER), 1400);
    assert_eq!(world.back(&large).0, Verdict::Answer(Error::TooBig(1420)));
    assert_eq!(world.out(&Packet { ttl: 1, ..udp(INNER, SERVER) }).0, refused);
    let old = Packet { ttl: 1, ..udp(SERVER, OUTER) };
    assert_eq!(world.back(&old).0, Verdict::Answer(Error::TimeExceeded));
}

/// The error that the gateway should write about a packet.
fn error_about(packet: &Packet, error: Error) -> Packet {
    let is_v4 = packet.is_v4();
    let (kind, code, rest) = match error {
        Error::TimeExceeded => (if is_v4 { 11 } else { 3 }, 0, 0),
        Error::TooBig(mtu) if is_v4 => (3, 4, mtu),
        Error::TooBig(mtu) => (2, 0, mtu),
    };
    let most = if is_v4 { 576 - 28 } else { 1280 - 48 };
    let quoted_len = packet.bytes(Finish::Full).len().min(most) & !3;
    let content = Content::Error {
        kind,
        code,
        rest: rest.to_be_bytes(),
        quoted: Box::new(packet.clone()),
        quoted_len,
    };
    Packet {
        addresses: [packet.addresses[1].clone(), packet.addresses[0].clone()],
        tos: if is_v4 { 0xc0 } else { 0 },
        ttl: 64,
        id: 0,
        fragment: None,
        dont_fragment: is_v4,
        content,
    }
}

/// RFC 4787 REQ-13, RFC 5508 REQ-9: the quoted packet is the one that its sender sent, and nobody hears of an
/// address inside.
#[test]
fn senders_outside_are_told_that_a_packet_is_too_large_or_too_old() {
    let (inner_v6, remote_v6) = ([&[0xfd][..], &[0; 14], &[2]].concat(), [0x2a; 16].to_vec());
    for first in [
        udp((ANNE, 5000), (REMOTE, 53)),
        tcp((ANNE, 5000), (REMOTE, 443), 2, 1, 0),
        echo(ANNE, REMOTE, true, 5000),
    ] {
        for is_v4 in [true, false] {
            let mut first = first.clone();
            if !is_v4 {
                first.addresses = [inner_v6.clone(), remote_v6.clone()];
            }
            let mut world = World::masquerade();
            let (verdict, sent) = world.out(&first);
            assert_eq!(verdict, Verdict::Out);
            let back = answer(&expect_one_hop(&first, &sent, 0));
            for len in [1, 400, 1234, 1401] {
                let back = long(back.clone(), len);
                let old = Packet { ttl: 1, ..back.clone() };
                let told = world.judge(NIC, &old.bytes(Finish::Full), true);
                let expected = error_about(&old, Error::TimeExceeded);
                assert_eq!(told, (Verdict::Out, expected.bytes(Finish::Full)), "{len}");
                let way = world.memory.way.unwrap();
                assert_eq!((way.source, way.destination), (old.key(1), old.key(0)));
                assert_eq!((way.tos, way.protocol), (expected.tos, expected.protocol()));

                world.memory.mtu = back.bytes(Finish::Full).len() as u32 - 1;
                let error = Error::TooBig(world.memory.mtu);
                let told = world.judge(NIC, &back.bytes(Finish::Full), true);
                let expected = error_about(&back, error).bytes(Finish::Full);
                assert_eq!(told, (Verdict::Out, expected), "{len}");
                world.memory.mtu = 0;
            }
            let asked = [limit::TIME_EXCEEDED, limit::TOO_BIG];
            let asked = asked.map(|kind| (back.key(0), kind)).repeat(4);
            assert_eq!(world.memory.asked, asked);
        }
    }
}

#[test]
fn senders_inside_are_told_in_the_name_of_the_forwarded_address() {
    let mut world = World::forwarding();
    let there = Packet { ttl: 1, ..udp((BERT, 6000), (GATEWAY, 80)) };
    let told = world.judge(TUN, &there.bytes(Finish::Full), true);
    let expected = error_about(&there, Error::TimeExceeded).bytes(Finish::Full);
    assert_eq!(told, (Verdict::In, expected));
    let there = long(udp((BERT, 6000), (GATEWAY, 80)), 200);
    world.memory.mtu = 100;
    let told = world.judge(TUN, &there.bytes(Finish::Full), true);
    let expected = error_about(&there, Error::TooBig(100)).bytes(Finish::Full);
    assert_eq!(told, (Verdict::In, expected));
}

#[test]
fn answers_are_limited_and_what_may_not_be_answered_takes_none() {
    let mut world = World::forwarding();
    world.memory.answers = 1;
    let there = Packet { ttl: 1, ..udp((REMOTE, 6000), (GATEWAY, 80)) };
    let bytes = there.bytes(Finish::Full);
    for source in [[224, 0, 0, 1], [255; 4], [127, 0, 0, 1], [0; 4]] {
        let from_group = there.clone().with(0, &source, 6000).bytes(Finish::Full);
        let dropped = Verdict::Drop(DropReason::HopLimit);
        assert_eq!(world.judge(NIC, &from_group, true), (dropped, from_group));
    }
    assert_eq!(world.judge(NIC, &bytes, true).0, Verdict::Out);
    let limited = Verdict::Drop(DropReason::AnswerLimited);
    assert_eq!(world.judge(NIC, &bytes, true), (limited, bytes.clone()));
    assert_eq!(world.memory.asked.len(), 2);
    // No way leads to the sender.
    world.memory.answers = 9;
    let lost = there.with(0, &[203, 0, 113, 77], 6000).bytes(Finish::Full);
    let dropped = Verdict::Drop(DropReason::NoRoute);
    assert_eq!(world.judge(NIC, &lost, true), (dropped, lost));
}

#[test]
fn what_cannot_begin_a_flow_takes_no_port() {
    const FIN: u8 = 1;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;

    let of = |flags| tcp((ANNE, 5000), (REMOTE, 443), flags, 7, 9);
    let mut world = World::masquerade();
    let flags = [0, RST, RST | ACK, SYN | ACK, FIN, FIN | ACK, SYN | FIN, SYN | RST];
    for stray in flags.map(of).into_iter().chain([echo(ANNE, REMOTE, false, 5000)]) {
        let bytes = stray.bytes(Finish::Full);
        assert_eq!(world.tunnel(&bytes), (Verdict::Drop(DropReason::BeginsNothing), bytes));
    }
    assert!(world.memory.flows.is_empty() && world.memory.mappings.is_empty());
    assert!(world.memory.slots.is_empty() && world.memory.rings.is_empty());
    // Where no line covers them they are the kernel's.
    let foreign = echo(ANNE, [172, 16, 0, 1], false, 5000);
    assert_eq!(world.out(&foreign).0, FOREIGN);

    // From the midst of a connection: what is known of it may have been lost.
    let sent = world.sent(&of(ACK));
    assert_eq!(sent.addresses[0], GATEWAY);
    // A flow that is there has its end.
    assert_eq!(world.sent(&of(FIN | ACK)).ports(), sent.ports());
    assert_eq!(world.sent(&of(RST)).ports(), sent.ports());

    // What was allowed is counted if it begins something.
    let mut world = World::masquerade().allowing();
    world.rules.allow[0].protocol = 0;
    let stray = tcp((ANNE, 5000), (REMOTE, 53), RST, 7, 9);
    assert_eq!(world.out(&stray).0, Verdict::Drop(DropReason::BeginsNothing));
    assert!(world.memory.allowed.is_empty());
    world.sent(&tcp((ANNE, 5000), (REMOTE, 53), SYN, 7, 0));
    assert_eq!(world.memory.allowed, [4]);
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

    /// Whatever is answered: what the error says is what a plain writer would say.
    #[test]
    fn answers_are_written_as_others_would_write_them(
        packet in any::<bool>().prop_flat_map(model::packet), more in 0_usize..1500, too_old in any::<bool>(),
    ) {
        let mut world = World::forwarding();
        let gateway = gateway(packet.is_v4());
        for rule in &mut world.rules.forward[..2] {
            rule.external = key(&gateway);
            if !packet.is_v4() {
                rule.to = key(&[&[0xfd][..], &[0; 14], &[2]].concat());
            }
        }
        let from = if packet.is_v4() { REMOTE.to_vec() } else { [0x2a; 16].to_vec() };
        let mut packet = packet.with(0, &from, 6000).with(1, &gateway, 80);
        if let Content::Echo { .. } = packet.content {
            packet.content = Content::Udp { ports: [6000, 80], has_checksum: false, data: Vec::new() };
        }
        if let Content::Tcp { rest: data, .. } | Content::Udp { data, .. } = &mut packet.content {
            data.resize(data.len() + more, 0xa5);
        }
        // Headers that hold together.
        if let Content::Tcp { middle, .. } = &mut packet.content {
            middle[8] = 0x50;
        }
        packet.ttl = if too_old { 1 } else { 9 };
        let bytes = packet.bytes(Finish::Full);
        let error = if too_old { Error::TimeExceeded } else { Error::TooBig(bytes.len() as u32 - 1) };
        if let Error::TooBig(mtu) = error {
            world.memory.mtu = mtu;
        }
        let told = world.judge(NIC, &bytes, true);
        prop_assert_eq!(told, (Verdict::Out, error_about(&packet, error).bytes(Finish::Full)));
    }

    #[test]
    fn any_bytes_are_judged_without_harm(
        mut bytes in prop::collection::vec(any::<u8>(), 1..120), v4 in any::<bool>(), tunnel in any::<bool>(),
    ) {
        bytes[0] = if v4 { 0x45 } else { 0x60 };
        let mut world = World::forwarding().allowing();
        let _ = world.judge(if tunnel { TUN } else { NIC }, &bytes, true);
    }
}
