//! The tables of NAT in memory, on a host whose routes are these:
//!
//! ```text
//! 10.9.0.0/24      fd09::/64         TUN device, MTU 1420
//! 172.31.0.0/16    2001:db8:31::/48  the second NIC
//! 198.51.100.0/24  2001:db8:51::/48  the first NIC, by a next hop whose link address is not known
//! 100.64.0.0/10    2001:db8:64::/48  unreachable
//! all else                           the first NIC, MTU 1500, by a next hop whose link address is known
//! ```
//!
//! Its own addresses are 10.9.0.1, 192.0.2.1, 192.0.2.9, 172.31.0.1, fd09::1 and 2001:db8::1.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use wg_common::headers::{Bytes, PROTOCOL_TCP, PROTOCOL_UDP};
use wg_common::map::AddressKey;
use wg_common::nat::engine::{Route, Segments, Tables};
use wg_common::nat::map::{
    Flow, FlowKey, FragmentEntry, FragmentKey, Mapping, MappingKey, NO_RULE, Prefix, Slot,
};
use wg_common::nat::packet::{Buffer, Difference, Room, Skb, Summed};
use wg_common::nat::tuple::Tuple;
use wg_common::outcome::NatEvent;

pub const TUN_MTU: u32 = 1420;
pub const NIC_MTU: u32 = 1500;
pub const OWN: [&str; 6] =
    ["10.9.0.1", "192.0.2.1", "192.0.2.9", "172.31.0.1", "fd09::1", "2001:db8::1"];
/// What peers own.
pub const OWNED: [(&str, u8); 2] = [("10.9.0.0", 24), ("fd09::", 64)];
/// A port on which sockets of TCP and of UDP listen.
pub const LISTENED: u16 = 20_001;

pub fn key(address: &str) -> AddressKey {
    AddressKey::from(address.parse::<IpAddr>().expect("an address"))
}

pub fn prefix(address: &str, len: u8) -> Prefix {
    let more = if address.contains(':') { 0 } else { 96 };
    Prefix::new(key(address), u32::from(len) + more)
}

/// Indexes of the devices.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place {
    pub tun: u32,
    pub nics: [u32; 2],
}

impl Place {
    fn route(&self, tuple: &Tuple) -> Route {
        let to = &tuple.destination;
        let is_in = |address, len| prefix(address, len).distance(to) == 0;
        if !tuple.is_v4 {
            let needs_link = |address: &AddressKey| {
                let is_in = |text, len| prefix(text, len).distance(address) == 0;
                is_in("fe80::", 10) || is_in("ff00::", 8) || is_in("::1", 128)
            };
            if needs_link(to) || needs_link(&tuple.source) {
                return Route::Local;
            }
        }
        // What looks like IPv4 in an IPv6 packet is an address of IPv6.
        let is_mapped = to.is_v4() != tuple.is_v4;
        if is_mapped {
            return Route::Out(self.nics[0]);
        }
        if OWN.iter().any(|own| key(own) == *to) || is_in("127.0.0.0", 8) {
            Route::Local
        } else if OWNED.iter().any(|(address, len)| is_in(address, *len)) {
            Route::Out(self.tun)
        } else if is_in("172.31.0.0", 16) || is_in("2001:db8:31::", 48) {
            Route::Out(self.nics[1])
        } else if is_in("100.64.0.0", 10) || is_in("2001:db8:64::", 48) {
            Route::Refused
        } else {
            Route::Out(self.nics[0])
        }
    }
}

/// The tables.
pub struct Memory {
    place: Place,
    pub flows: HashMap<FlowKey, Flow>,
    found: Option<FlowKey>,
    pub mappings: HashMap<MappingKey, Mapping>,
    pub slots: HashMap<u32, Slot>,
    pub free: HashMap<u32, VecDeque<u32>>,
    pub fragments: HashMap<FragmentKey, FragmentEntry>,
    pub ifindex: u32,
    pub segments: Segments,
    pub now_ns: u64,
    /// Whether there is a token for one more ICMP error.
    pub answers: bool,
    rule: u32,
    /// Events, and numbers of `Allow` rules, since they were taken last.
    pub events: Vec<NatEvent>,
    pub allowed: Vec<u32>,
}

impl Memory {
    pub fn new(place: Place) -> Self {
        Self {
            place,
            flows: HashMap::new(),
            found: None,
            mappings: HashMap::new(),
            slots: HashMap::new(),
            free: HashMap::new(),
            fragments: HashMap::new(),
            ifindex: 0,
            segments: Segments { len: 0, count: 0 },
            now_ns: 1,
            answers: true,
            rule: NO_RULE,
            events: Vec::new(),
            allowed: Vec::new(),
        }
    }

    /// Takes a slot back from who has it, as control does; says whether somebody had it.
    pub fn end_slot(&mut self, index: u32) -> bool {
        let Some(slot) = self.slots.get_mut(&index).filter(|slot| slot.generation % 2 == 1) else {
            return false;
        };
        slot.generation += 1;
        true
    }

    /// Puts a port at the end of a ring.
    pub fn free_port(&mut self, ring: u32, port: u32) {
        self.free.entry(ring).or_default().push_back(port);
    }
}

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
        self.flows.insert(*key, *flow);
        self.found = Some(*key);
        true
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
        const EMPTY: Slot = Slot {
            last_seen_ns: 0,
            inner: AddressKey([0; 4]),
            generation: 0,
            inner_port: 0,
            padding: 0,
        };
        Some(self.slots.get(&index).copied().unwrap_or(EMPTY))
    }
    fn take_slot(&mut self, index: u32, inner: &AddressKey, inner_port: u16) -> Option<u32> {
        let before = self.slot(index)?;
        let generation = (before.generation + 1) | 1;
        self.slots.insert(index, Slot { inner: *inner, inner_port, generation, ..before });
        Some(generation)
    }
    fn touch_slot(&mut self, _: u32) {}
    fn take_port(&mut self, ring: u32) -> Option<u32> {
        self.free.get_mut(&ring)?.pop_front()
    }
    fn is_owned(&mut self, address: &AddressKey) -> bool {
        OWNED.iter().any(|(owned, len)| prefix(owned, *len).distance(address) == 0)
    }
    fn has_socket(&mut self, tuple: &Tuple, _: &AddressKey, port: u16) -> bool {
        let protocol = tuple.protocol;
        port == LISTENED.to_be() && (protocol == PROTOCOL_TCP || protocol == PROTOCOL_UDP)
    }
    fn route(&mut self, tuple: &Tuple, len: u32) -> Route {
        let route = self.place.route(tuple);
        let mtu = if route == Route::Out(self.place.tun) { TUN_MTU } else { NIC_MTU };
        match route {
            Route::Out(_) if len > mtu => Route::TooBig,
            route => route,
        }
    }
    fn refresh_next_hop(&mut self) {}
    fn rule(&mut self) -> &mut u32 {
        &mut self.rule
    }
    fn tunnel_mtu_below(&mut self, len: u32) -> Option<u32> {
        (len > TUN_MTU).then_some(TUN_MTU)
    }
    fn fragments(&mut self, key: &FragmentKey) -> Option<FragmentEntry> {
        self.fragments.get(key).copied()
    }
    fn put_fragments(&mut self, key: &FragmentKey, entry: &FragmentEntry) {
        self.fragments.insert(*key, *entry);
    }
    fn may_answer(&mut self, _: &AddressKey, _: u32) -> bool {
        self.answers
    }
    fn ifindex(&self) -> u32 {
        self.ifindex
    }
    fn segments(&self) -> Segments {
        self.segments
    }
    fn count(&mut self, event: NatEvent) {
        self.events.push(event);
    }
    fn count_allowed(&mut self, counter: u32) {
        self.allowed.push(counter);
    }
}

/// A packet that can become another one.
pub struct Owned(pub Vec<u8>);

impl Bytes for Owned {
    fn len(&self) -> usize {
        self.0.len()
    }
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.read(offset)
    }
}

impl Skb for Owned {
    fn store<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        Buffer::finished(&mut self.0).store(offset, bytes)
    }
    fn store_uncovered<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        Buffer::finished(&mut self.0).store_uncovered(offset, bytes)
    }
    fn replace_l3(&mut self, offset: usize, difference: Difference) -> Option<()> {
        Buffer::finished(&mut self.0).replace_l3(offset, difference)
    }
    fn replace_l4(
        &mut self,
        offset: usize,
        difference: Difference,
        summed: Summed,
        zero_is_none: bool,
    ) -> Option<()> {
        Buffer::finished(&mut self.0).replace_l4(offset, difference, summed, zero_is_none)
    }
}

impl Room for Owned {
    fn put_before<const N: usize>(&mut self, head: &[u8; N], len: u32) -> Option<()> {
        self.0.truncate(len as usize);
        self.0.splice(..0, *head);
        Some(())
    }
}
