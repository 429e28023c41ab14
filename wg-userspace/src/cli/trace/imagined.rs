//! The tables as [`engine`](wg_common::nat::engine) wants them, of which nothing is written: what it would write is
//! noted beside them, so that what is said of a packet is what the programs would do with it.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use wg_common::headers::{PROTOCOL_TCP, PROTOCOL_UDP};
use wg_common::map::AddressKey;
use wg_common::nat::engine::{self, Route, Segments, Tables, Verdict, Work};
use wg_common::nat::map::{
    Flow, FlowKey, FragmentEntry, FragmentKey, Mapping, MappingKey, RuleSet, Slot,
};
use wg_common::nat::packet::Buffer;
use wg_common::nat::tuple::Tuple;
use wg_common::outcome::NatEvent;

use crate::host::{AskedRoute, FoundRoute, NoWay, RouteTo};
use crate::nat::address;

/// What the tables and the kernel say, without being changed by that.
pub trait World {
    /// Boot time in nanoseconds.
    fn now_ns(&self) -> u64;
    /// A flow, if it is there.
    fn flow(&mut self, key: &FlowKey) -> anyhow::Result<Option<Flow>>;
    /// A mapping, if it is there.
    fn mapping(&mut self, key: &MappingKey) -> anyhow::Result<Option<Mapping>>;
    /// What stands in a slot, if there is one.
    fn slot(&mut self, index: u32) -> anyhow::Result<Option<Slot>>;
    /// The port that a ring would give after `before` others.
    fn free_port(&mut self, ring: u32, before: u32) -> anyhow::Result<Option<u32>>;
    /// Whether some peer owns an address, as the programs know it.
    fn is_owned(&mut self, of: IpAddr) -> anyhow::Result<bool>;
    /// Whether a socket of this host has this address and port, and gets what comes from there.
    fn has_socket(&mut self, is_tcp: bool, own: SocketAddr, from: SocketAddr) -> bool;
    /// Which way the kernel would send a packet.
    fn route(&mut self, asked: &AskedRoute) -> anyhow::Result<Result<FoundRoute, NoWay>>;
    /// The MTU of a link, if it is there.
    fn mtu(&mut self, link: u32) -> anyhow::Result<Option<u32>>;
}

/// The programs' two places.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Hook {
    /// Where packets come out of the tunnel.
    Tunnel,
    /// Where they come in by the NIC with this index.
    Nic(u32),
}

/// What became of a packet.
#[derive(Debug)]
pub struct Judged {
    /// What the program would do.
    pub verdict: Verdict,
    /// The packet, as it would be then.
    pub packet: Vec<u8>,
    /// The flow by which it was judged, as it would be then.
    pub flow: Option<(FlowKey, Flow)>,
    /// Whether that is one that is there.
    pub is_known: bool,
    /// Whether the slot that a new flow has is one that its source has already.
    pub has_slot: bool,
    /// The counter of the `Allow` line by which a flow would begin.
    pub allowed: Option<u32>,
    /// The way that the kernel told last.
    pub route: Option<Result<FoundRoute, NoWay>>,
}

/// Has the engine judge a packet. With `anew`, as if no flow were there.
///
/// # Errors
/// If a table cannot be read, or the kernel does not answer.
pub fn judge(
    world: &mut impl World,
    rules: &RuleSet,
    hook: Hook,
    mut packet: Vec<u8>,
    anew: bool,
) -> anyhow::Result<Judged> {
    let link_in = match hook {
        Hook::Tunnel => rules.tun,
        Hook::Nic(index) => index,
    };
    let mut tables = Imagined {
        world,
        tun: rules.tun,
        link_in,
        anew,
        flows: HashMap::new(),
        found: None,
        known: HashSet::new(),
        mappings: HashMap::new(),
        slots: HashMap::new(),
        taken: HashMap::new(),
        rule: 0,
        route: None,
        allowed: None,
        failed: None,
    };
    let mut work = Work::EMPTY;
    let mut buffer = Buffer::finished(&mut packet);
    let verdict = match hook {
        Hook::Tunnel => engine::from_tunnel(&mut buffer, &mut tables, rules, &mut work),
        Hook::Nic(_) => engine::from_nic(&mut buffer, &mut tables, rules, &mut work),
    };
    if let Some(error) = tables.failed {
        return Err(error);
    }
    let flow = tables.found.and_then(|key| Some((key, (*tables.flows.get(&key)?)?)));
    let is_known = tables.found.is_some_and(|key| tables.known.contains(&key));
    let has_slot = flow.is_some_and(|(_, flow)| !tables.slots.contains_key(&flow.slot));
    let (route, allowed) = (tables.route, tables.allowed);
    Ok(Judged { verdict, packet, flow, is_known, has_slot, allowed, route })
}

struct Imagined<'a, W> {
    world: &'a mut W,
    tun: u32,
    link_in: u32,
    /// No flow of the world's is seen.
    anew: bool,
    /// Flows that were looked at or changed; nothing in the place of those that are not there any more.
    flows: HashMap<FlowKey, Option<Flow>>,
    found: Option<FlowKey>,
    /// Flows of the world's that were found.
    known: HashSet<FlowKey>,
    mappings: HashMap<MappingKey, Mapping>,
    slots: HashMap<u32, Slot>,
    /// How many ports were taken, by their rings.
    taken: HashMap<u32, u32>,
    rule: u32,
    route: Option<Result<FoundRoute, NoWay>>,
    allowed: Option<u32>,
    /// Why what is said is not to be believed.
    failed: Option<anyhow::Error>,
}

impl<W: World> Imagined<'_, W> {
    /// What was read; nothing if that failed, which is kept.
    fn keep<T>(&mut self, outcome: anyhow::Result<Option<T>>) -> Option<T> {
        outcome.unwrap_or_else(|error| {
            self.failed.get_or_insert(error);
            None
        })
    }

    fn is_longer(&mut self, link: u32, len: u32) -> Option<u32> {
        let mtu = self.world.mtu(link);
        self.keep(mtu).filter(|mtu| len > *mtu)
    }

    fn ask(&mut self, asked: &AskedRoute) -> Option<Result<FoundRoute, NoWay>> {
        let answer = self.world.route(asked).map(Some);
        self.keep(answer)
    }
}

impl<W: World> Tables for Imagined<'_, W> {
    fn now_ns(&self) -> u64 {
        self.world.now_ns()
    }

    fn may_answer(&mut self, _: &AddressKey, _: u32) -> bool {
        true
    }

    fn find_flow(&mut self, key: &FlowKey) -> bool {
        if !self.flows.contains_key(key) {
            let read = if self.anew { Ok(None) } else { self.world.flow(key) };
            let flow = self.keep(read);
            if flow.is_some() {
                self.known.insert(*key);
            }
            self.flows.insert(*key, flow);
        }
        self.found = self.flows[key].is_some().then_some(*key);
        self.found.is_some()
    }

    fn found<R>(&mut self, change: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        self.flows.get_mut(&self.found?)?.as_mut().map(change)
    }

    fn put_flow(&mut self, key: &FlowKey, flow: &Flow) -> bool {
        self.known.remove(key);
        self.flows.insert(*key, Some(*flow));
        self.found = Some(*key);
        true
    }

    fn remove_flow(&mut self, key: &FlowKey) {
        self.found = None;
        self.known.remove(key);
        self.flows.insert(*key, None);
    }

    fn mapping(&mut self, key: &MappingKey) -> Option<Mapping> {
        if let Some(mapping) = self.mappings.get(key) {
            return Some(*mapping);
        }
        let read = self.world.mapping(key);
        self.keep(read)
    }

    fn put_mapping(&mut self, key: &MappingKey, mapping: &Mapping) -> bool {
        self.mappings.insert(*key, *mapping);
        true
    }

    fn slot(&mut self, index: u32) -> Option<Slot> {
        if let Some(slot) = self.slots.get(&index) {
            return Some(*slot);
        }
        let read = self.world.slot(index);
        self.keep(read)
    }

    fn take_slot(&mut self, index: u32, inner: &AddressKey, inner_port: u16) -> Option<u32> {
        let slot = self.slot(index)?;
        let generation = slot.generation.wrapping_add(1) | 1;
        let last_seen_ns = self.now_ns();
        let taken = Slot { last_seen_ns, inner: *inner, generation, inner_port, padding: 0 };
        self.slots.insert(index, taken);
        Some(generation)
    }

    fn touch_slot(&mut self, _: u32) {}

    fn take_port(&mut self, ring: u32) -> Option<u32> {
        let before = self.taken.get(&ring).copied().unwrap_or(0);
        let read = self.world.free_port(ring, before);
        let port = self.keep(read);
        if port.is_some() {
            self.taken.insert(ring, before + 1);
        }
        port
    }

    fn is_owned(&mut self, of: &AddressKey) -> bool {
        let read = self.world.is_owned(address(*of)).map(Some);
        self.keep(read).unwrap_or(false)
    }

    fn has_socket(&mut self, tuple: &Tuple, own: &AddressKey, port: u16) -> bool {
        let is_tcp = match tuple.protocol {
            PROTOCOL_TCP => true,
            PROTOCOL_UDP => false,
            _ => return false,
        };
        let end = |of, port: u16| SocketAddr::new(address(of), u16::from_be(port));
        let from = end(tuple.destination, tuple.destination_port);
        self.world.has_socket(is_tcp, end(*own, port), from)
    }

    fn route(&mut self, tuple: &Tuple, len: u32) -> Route {
        let asked = AskedRoute {
            source: Some(address(tuple.source)),
            destination: address(tuple.destination),
            link_in: self.link_in,
            mark: 0,
            protocol: tuple.protocol,
            ports: (tuple.protocol == PROTOCOL_TCP || tuple.protocol == PROTOCOL_UDP)
                .then(|| (u16::from_be(tuple.source_port), u16::from_be(tuple.destination_port))),
        };
        let Some(mut answer) = self.ask(&asked) else { return Route::Unknown };
        if let Err(NoWay::Source | NoWay::Invalid) = answer {
            // The programs' look-up does not ask whether the source may come by that link.
            let of_host = AskedRoute { source: None, link_in: 0, ..asked };
            let Some(other) = self.ask(&of_host) else { return Route::Unknown };
            answer = other;
        }
        let to = answer.as_ref().map(|found| found.to).map_err(|no_way| *no_way);
        self.route = Some(answer);
        match to {
            Ok(RouteTo::Link(link)) if self.is_longer(link, len).is_some() => Route::TooBig,
            Ok(RouteTo::Link(link)) => Route::Out(link),
            Ok(RouteTo::Local | RouteTo::Several) | Err(NoWay::None) => Route::Local,
            Err(_) => Route::Refused,
        }
    }

    fn refresh_next_hop(&mut self) {}

    fn rule(&mut self) -> &mut u32 {
        &mut self.rule
    }

    fn tunnel_mtu_below(&mut self, len: u32) -> Option<u32> {
        self.is_longer(self.tun, len)
    }

    fn fragments(&mut self, _: &FragmentKey) -> Option<FragmentEntry> {
        None
    }

    fn put_fragments(&mut self, _: &FragmentKey, _: &FragmentEntry) {}

    fn ifindex(&self) -> u32 {
        self.link_in
    }

    fn segments(&self) -> Segments {
        Segments { len: 0, count: 0 }
    }

    fn count(&mut self, _: NatEvent) {}

    fn count_allowed(&mut self, counter: u32) {
        self.allowed = Some(counter);
    }
}
