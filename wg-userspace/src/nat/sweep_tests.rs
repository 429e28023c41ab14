//! The sweeper against programs that do what they like, and against what must hold whatever they do.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;

use super::*;

const RINGS: u32 = PROTOCOLS_LEN;
const PORT_FIRST: u32 = 4096;
const PORTS: u32 = 256;

/// Tables as the kernel has them, and programs that use them.
struct World {
    flows: BTreeMap<[u64; 5], (FlowKey, Flow)>,
    mappings: HashMap<MappingKey, Mapping>,
    slots: HashMap<u32, Slot>,
    /// Ports, and how many were taken.
    rings: Vec<(Vec<u32>, usize)>,
    flow_cursor: Option<[u64; 5]>,
    mapping_keys: Vec<MappingKey>,
    now_ns: u64,
    seed: u64,
}

fn order(key: &FlowKey) -> [u64; 5] {
    let word = |address: AddressKey| u64::from(u32::from_be(address.0[3]));
    let ports = u64::from(key.inner_port) << 16 | u64::from(key.remote_port);
    [word(key.inner), word(key.remote), ports, key.protocol.into(), 0]
}

fn free_slot() -> Slot {
    let inner = AddressKey([0; 4]);
    Slot { last_seen_ns: 0, inner, generation: 0, inner_port: 0, padding: 0 }
}

impl Tables for World {
    type Error = Infallible;

    fn next_flows(
        &mut self,
        count: usize,
        into: &mut Vec<(FlowKey, Flow)>,
    ) -> Result<bool, Infallible> {
        let from = self.flow_cursor.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let range = self.flows.range((from, std::ops::Bound::Unbounded)).take(count);
        into.extend(range.map(|(_, entry)| *entry));
        let Some((key, _)) = into.last() else { return Ok(false) };
        self.flow_cursor = Some(order(key));
        Ok(into.len() == count)
    }

    fn rewind_flows(&mut self) {
        self.flow_cursor = None;
    }

    fn remove_flow(&mut self, key: &FlowKey, was: &Flow) -> Result<(), Infallible> {
        if self.flows.get(&order(key)).is_some_and(|(_, is)| is == was) {
            self.flows.remove(&order(key));
        }
        Ok(())
    }

    fn next_mappings(
        &mut self,
        count: usize,
        into: &mut Vec<(MappingKey, Mapping)>,
    ) -> Result<bool, Infallible> {
        for _ in 0..count {
            let Some(key) = self.mapping_keys.pop() else { return Ok(false) };
            into.extend(self.mappings.get(&key).map(|mapping| (key, *mapping)));
        }
        Ok(true)
    }

    fn rewind_mappings(&mut self) {
        self.mapping_keys = self.mappings.keys().copied().collect();
    }

    fn remove_mapping(&mut self, key: &MappingKey, was: &Mapping) -> Result<(), Infallible> {
        if self.mappings.get(key) == Some(was) {
            self.mappings.remove(key);
        }
        Ok(())
    }

    fn slot(&mut self, index: u32) -> Result<Slot, Infallible> {
        Ok(*self.slots.entry(index).or_insert_with(free_slot))
    }

    fn end_slot(&mut self, index: u32) -> Result<(), Infallible> {
        let slot = self.slots.get_mut(&index).expect("somebody had it");
        assert!(!slot.generation.is_multiple_of(2), "it was in use");
        slot.generation += 1;
        Ok(())
    }

    fn ring(&self, ring: u32) -> (u32, u32) {
        let (ports, head) = &self.rings[ring as usize];
        (*head as u32, ports.len() as u32)
    }

    fn port_at(&self, ring: u32, position: u32) -> u32 {
        self.rings[ring as usize].0[position as usize]
    }

    fn put(&mut self, ring: u32, port: u32) {
        let generation = self.slots.get(&slot_index(ring, port)).map_or(0, |slot| slot.generation);
        assert!(generation.is_multiple_of(2), "nobody has what is free");
        let (ports, head) = &mut self.rings[ring as usize];
        assert!(!ports[*head..].contains(&port), "a port is free once");
        ports.push(port);
    }
}

fn address(last: u32) -> AddressKey {
    AddressKey::v4((0x0a09_0000 + last).to_be_bytes())
}

const EXTERNAL: AddressKey = AddressKey::v4([192, 0, 2, 1]);
const TIMEOUT_NS: u64 = 30 * SECOND_NS;
const PERMIT_NS: u64 = 120 * SECOND_NS;
const ROUND_EVERY_NS: u64 = 5 * SECOND_NS;
const UDP_MAPPING_NS: u64 = 60 * SECOND_NS;
const CLOSED: u8 = 7;

const LIFE: Life = Life {
    timeout_ns: |_, _| TIMEOUT_NS,
    is_closed: |_, flow| flow.state == CLOSED,
    mapping_ns: |protocol| if protocol == PROTOCOL_UDP { UDP_MAPPING_NS } else { 0 },
    permit_ns: PERMIT_NS,
    round_every_ns: ROUND_EVERY_NS,
};

impl World {
    fn new(seed: u64) -> Self {
        Self {
            flows: BTreeMap::new(),
            mappings: HashMap::new(),
            slots: HashMap::new(),
            rings: vec![(Vec::new(), 0); RINGS as usize],
            flow_cursor: None,
            mapping_keys: Vec::new(),
            now_ns: 1000 * SECOND_NS,
            seed,
        }
    }

    fn dice(&mut self, below: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % below
    }

    /// A packet from inside, as the programs treat it; false if there is no port for it.
    fn send(&mut self, ring: u32, inner: u32, port: u16, remote: u32) -> bool {
        let protocol = [PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_ICMP][ring as usize];
        let now_ns = self.now_ns;
        let (inner, inner_port) = (address(inner), port.to_be());
        let remote_port = if ring == 2 { 0 } else { 80u16.to_be() };
        let key = FlowKey {
            inner,
            remote: address(remote),
            inner_port,
            remote_port,
            protocol,
            padding: [0; 3],
        };
        if let Some((_, flow)) = self.flows.get_mut(&order(&key)) {
            let slot = self.slots[&flow.slot];
            if slot.generation == flow.generation {
                flow.last_seen_ns = now_ns;
                return true;
            }
        }
        let of = MappingKey { inner, inner_port, protocol, padding: 0, nic: 3 };
        let living = self.mappings.get(&of).copied().filter(|mapping| {
            self.slots.get(&mapping.slot).is_some_and(|slot| slot.generation == mapping.generation)
        });
        let mapping = match living {
            Some(mapping) => mapping,
            None => {
                let (ports, head) = &mut self.rings[ring as usize];
                let Some(&offset) = ports.get(*head) else { return false };
                *head += 1;
                let index = slot_index(ring, offset);
                let slot = self.slots.entry(index).or_insert_with(free_slot);
                slot.generation += 1;
                (slot.inner, slot.inner_port) = (inner, inner_port);
                let mapping = Mapping { slot: index, generation: slot.generation };
                self.mappings.insert(of, mapping);
                mapping
            }
        };
        self.slots.get_mut(&mapping.slot).unwrap().last_seen_ns = now_ns;
        let flow = Flow {
            last_seen_ns: now_ns,
            created_ns: now_ns,
            packets: [1, 0],
            bytes: [60, 0],
            external: EXTERNAL,
            slot: mapping.slot,
            generation: mapping.generation,
            version: 1,
            rule: 0,
            external_port: 0,
            kind: 1,
            state: 0,
            nic: 3,
            windows: Default::default(),
        };
        self.flows.insert(order(&key), (key, flow));
        if ring != 2 {
            let permit = FlowKey { remote_port: 0, ..key };
            self.flows.insert(order(&permit), (permit, flow));
        }
        true
    }

    /// What must hold, whatever happened.
    fn check(&self, sweeper: &Sweeper) {
        for ring in 0..RINGS {
            let (ports, head) = &self.rings[ring as usize];
            let free: HashSet<u32> = ports[*head..].iter().copied().collect();
            assert_eq!(free.len(), ports.len() - head, "a port is free once");
            let odd = |port: &u32| {
                let slot = self.slots.get(&slot_index(ring, *port));
                slot.is_some_and(|slot| !slot.generation.is_multiple_of(2))
            };
            assert!(!free.iter().any(odd), "what is in use is not free");
            let all = (0..PORTS).filter(|port| free.contains(port) || odd(port)).count();
            assert_eq!(all, PORTS as usize, "no port is lost");
        }
        assert!(sweeper.held_count() <= (RINGS * PORTS) as usize);
    }

    /// Whole rounds, with nothing else going on.
    fn rounds(&mut self, sweeper: &mut Sweeper, count: u32) {
        for _ in 0..count {
            self.now_ns += ROUND_EVERY_NS;
            let now_ns = self.now_ns;
            while sweeper.step(self, 50, now_ns).unwrap_or_else(|never| match never {})
                != Next::Later
                && sweeper.began_ns + ROUND_LEAST_NS > now_ns
                && !(sweeper.phase == Phase::Rest && sweeper.began_ns == now_ns)
            {}
        }
    }
}

fn begin(world: &mut World, room: Room) -> Sweeper {
    let mut sweeper = Sweeper::new(LIFE, room, RINGS, PORT_FIRST);
    let mut outsides = [Outside::default(); EXTERNALS_LEN];
    outsides[0] = Outside { address: Some(EXTERNAL), nic: 3 };
    sweeper.set_outsides(outsides);
    for ring in 0..RINGS {
        let first = PORT_FIRST as u16;
        sweeper.lend(world, ring, first..first + PORTS as u16);
    }
    sweeper
}

const ROOM: Room = Room { flows: 4096, mappings: 4096 };

#[test]
fn whatever_programs_do_no_port_is_lost_and_no_living_flow_ends() {
    for seed in 1..4 {
        let mut world = World::new(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed));
        let mut sweeper = begin(&mut world, ROOM);
        for turn in 0..2000 {
            world.now_ns += world.dice(200) * 1_000_000;
            for _ in 0..world.dice(4) {
                let (ring, inner) = (world.dice(3) as u32, world.dice(4) as u32);
                let (port, remote) = (1000 + world.dice(20) as u16, 100 + world.dice(3) as u32);
                // So few that nothing is scarce.
                assert!(world.send(ring, inner, port, remote), "there are ports enough");
            }
            let before: Vec<(FlowKey, Flow)> = world.flows.values().copied().collect();
            let now_ns = world.now_ns;
            let budget = 1 + world.dice(30) as usize;
            sweeper.step(&mut world, budget, now_ns).unwrap();
            if turn % 16 == 0 {
                world.check(&sweeper);
            }
            for (key, flow) in before {
                let lives = now_ns - flow.last_seen_ns <= TIMEOUT_NS;
                let is_valid = world.slots[&flow.slot].generation == flow.generation;
                let is_there = world.flows.contains_key(&order(&key));
                assert!(!lives || (is_there && is_valid), "seed {seed}: {key:?} ended early");
            }
        }
        world.rounds(&mut sweeper, 60);
        assert!(world.flows.is_empty(), "what is over goes");
        assert!(world.mappings.is_empty(), "and so do mappings");
        assert_eq!(sweeper.held_count(), 0);
        for ring in 0..RINGS {
            let (head, tail) = world.ring(ring);
            assert_eq!(tail - head, PORTS, "all ports are free again");
        }
    }
}

#[test]
fn a_mapping_of_udp_outlives_its_flows() {
    let mut world = World::new(7);
    let mut sweeper = begin(&mut world, ROOM);
    assert!(world.send(0, 1, 1000, 100) && world.send(1, 1, 1000, 100));
    world.rounds(&mut sweeper, 9);
    let protocols: Vec<u8> = world.mappings.keys().map(|key| key.protocol).collect();
    assert_eq!(protocols, [PROTOCOL_UDP]);
    world.rounds(&mut sweeper, 8);
    assert!(world.mappings.is_empty());
}

#[test]
fn a_permit_lives_as_long_as_a_flow_to_its_address() {
    let mut world = World::new(7);
    let mut sweeper = begin(&mut world, ROOM);
    world.send(1, 1, 1000, 100);
    world.send(1, 2, 1000, 100);
    // One of them goes on.
    for _ in 0..PERMIT_NS / ROUND_EVERY_NS + 4 {
        world.send(1, 1, 1000, 100);
        world.rounds(&mut sweeper, 1);
    }
    let left: Vec<AddressKey> =
        world.flows.values().filter(|(key, _)| is_permit(key)).map(|(key, _)| key.inner).collect();
    assert_eq!(left, [address(1)]);
}

#[test]
fn under_pressure_the_closed_go_first_and_then_the_oldest() {
    let mut world = World::new(7);
    let mut sweeper = begin(&mut world, ROOM);
    // 0..: the oldest first. Some of the youngest are closed.
    for number in 0..PORTS {
        assert!(world.send(0, number / 8, 1000 + (number % 8) as u16, 100));
        world.now_ns += 20_000_000;
    }
    assert!(!world.send(0, 1000, 1, 100), "no port is free");
    let closed = |key: &FlowKey| u32::from_be(key.inner.0[3]) & 0xffff >= 30;
    for (key, flow) in world.flows.values_mut() {
        flow.state = if closed(key) { CLOSED } else { 0 };
    }
    world.now_ns += IDLE_LEAST_NS;
    world.rounds(&mut sweeper, 2);
    let lives = |world: &World, number: u32| {
        let index = slot_index(0, number);
        !world.slots[&index].generation.is_multiple_of(2)
    };
    let gone: Vec<u32> = (0..PORTS).filter(|number| !lives(&world, *number)).collect();
    let expected: Vec<u32> = (0..16).chain(240..256).collect();
    assert_eq!(gone, expected, "16 are closed, and 16 more are needed for an eighth");
    assert!(world.send(0, 1000, 1, 100));
    world.check(&sweeper);
}

#[test]
fn a_full_table_of_flows_loses_its_oldest() {
    let mut world = World::new(7);
    let room = Room { flows: 400, mappings: 4096 };
    let mut sweeper = begin(&mut world, room);
    for number in 0..190 {
        // With its permit each takes two places.
        assert!(world.send(0, number, 1000, 100));
        world.now_ns += 1_000_000;
    }
    world.rounds(&mut sweeper, 2);
    assert!(world.flows.len() <= 352, "an eighth is free: {}", world.flows.len());
    assert!(world.flows.values().any(|(key, _)| key.inner == address(189)));
    assert!(!world.flows.values().any(|(key, _)| key.inner == address(0)));
}

#[test]
fn another_address_ends_flows_and_none_does_not() {
    let mut world = World::new(7);
    let mut sweeper = begin(&mut world, ROOM);
    assert!(world.send(0, 1, 1000, 100));
    let mut outsides = [Outside::default(); EXTERNALS_LEN];
    outsides[0].nic = 3;
    sweeper.set_outsides(outsides);
    world.rounds(&mut sweeper, 3);
    assert_eq!(world.flows.len(), 2, "it may come back");
    outsides[0].address = Some(address(77));
    sweeper.set_outsides(outsides);
    world.rounds(&mut sweeper, 1);
    assert!(world.flows.is_empty());
}

#[test]
fn a_port_that_is_forwarded_is_given_to_nobody() {
    let mut world = World::new(7);
    let mut sweeper = begin(&mut world, ROOM);
    assert!(world.send(0, 1, 1000, 100), "it takes the first port");
    let first = PORT_FIRST as u16;
    sweeper.keep_ports(&mut world, [(Protocol::Tcp, first)]);
    world.rounds(&mut sweeper, 3);
    assert!(!world.rings[0].0[world.rings[0].1..].contains(&0), "it is free, and not in the ring");
    assert!(world.slots[&slot_index(0, 0)].generation.is_multiple_of(2));
    sweeper.keep_ports(&mut world, []);
    assert!(world.rings[0].0[world.rings[0].1..].contains(&0), "no line forwards it any more");
}

#[test]
fn a_port_that_a_program_did_not_want_comes_back() {
    let mut world = World::new(7);
    let mut sweeper = begin(&mut world, ROOM);
    world.rings[0].1 += 1;
    world.rounds(&mut sweeper, 3);
    let (head, tail) = world.ring(0);
    assert_eq!(tail - head, PORTS);
}

/// A millisecond of a sweeper that is called as often as it asks to be.
fn for_a_millisecond(world: &mut World, sweeper: &mut Sweeper, budget: usize) -> Next {
    world.now_ns += 1_000_000;
    let now_ns = world.now_ns;
    sweeper.step(world, budget, now_ns).unwrap_or_else(|never| match never {})
}

#[test]
fn ports_of_closed_flows_come_back_as_fast_as_they_are_taken() {
    const EACH_MS: u32 = 3;

    let mut world = World::new(7);
    let mut sweeper = begin(&mut world, ROOM);
    // One that lives, and is idle for long.
    assert!(world.send(0, 70_000, 1, 100));
    world.now_ns += IDLE_LEAST_NS;
    let mut wait_ms = 0u32;
    for ms in 0..4000 {
        for number in ms * EACH_MS..(ms + 1) * EACH_MS {
            assert!(world.send(0, number % 60_000 + 1, 1000, 100), "no port in millisecond {ms}");
        }
        let of_now = world.now_ns;
        for (key, flow) in world.flows.values_mut().filter(|(_, flow)| flow.created_ns == of_now) {
            flow.state = if key.inner == address(70_000) { 0 } else { CLOSED };
        }
        wait_ms = wait_ms.saturating_sub(1);
        if wait_ms > 0 {
            world.now_ns += 1_000_000;
            continue;
        }
        // As long as the keeper waits.
        wait_ms = match for_a_millisecond(&mut world, &mut sweeper, 2048) {
            Next::AtOnce => 1,
            Next::Soon => 20,
            Next::Later => 100,
        };
    }
    let idle: Vec<&Flow> = world
        .flows
        .values()
        .filter(|(key, _)| key.inner == address(70_000))
        .map(|(_, flow)| flow)
        .collect();
    let slot = idle.first().expect("it is there").slot;
    assert!(!world.slots[&slot].generation.is_multiple_of(2), "it keeps its port");
    assert!(world.flows.len() < 4 * PORTS as usize, "{} flows", world.flows.len());
    world.check(&sweeper);
}

#[test]
fn rounds_that_give_nothing_back_become_rare() {
    let mut world = World::new(7);
    let mut sweeper = begin(&mut world, ROOM);
    for number in 0..PORTS {
        assert!(world.send(0, number, 1000, 100));
    }
    let before = sweeper.round;
    for _ in 0..4000 {
        for_a_millisecond(&mut world, &mut sweeper, 2048);
    }
    let rounds = sweeper.round - before;
    assert!((8..20).contains(&rounds), "{rounds} rounds of 4 s, in which all flows are young");
    assert!(sweeper.scarce().ports);
    // They are idle long enough now.
    for _ in 0..2000 {
        for_a_millisecond(&mut world, &mut sweeper, 2048);
    }
    assert!(!sweeper.scarce().ports);
    assert!(world.send(0, 1000, 1, 100));
}

#[test]
fn no_step_does_more_than_it_may() {
    const BUDGET: usize = 16;

    let mut world = World::new(7);
    let mut sweeper = begin(&mut world, Room { flows: 400, mappings: 4096 });
    for number in 0..PORTS {
        assert!(world.send(0, number, 1000, 100));
    }
    for (_, flow) in world.flows.values_mut() {
        flow.state = CLOSED;
    }
    world.now_ns += IDLE_LEAST_NS;
    for _ in 0..2000 {
        let before = (world.flows.len(), sweeper.held_count());
        for_a_millisecond(&mut world, &mut sweeper, BUDGET);
        let after = (world.flows.len(), sweeper.held_count());
        assert!(before.0 - after.0 <= BUDGET && before.1.saturating_sub(after.1) <= BUDGET);
    }
    assert!(world.flows.len() <= 352 && sweeper.held_count() < PORTS as usize);
}
