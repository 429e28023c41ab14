//! Which flows are over, and which ports are free again.
//!
//! Programs make flows, mappings and slots; only this removes them. A round marks and sweeps: it looks at each
//! flow, removes those that are over, and notes of the others which slots they use. A slot that none uses goes
//! back to its ring of free ports, and its mapping goes with it. A round is cut into steps of bounded work.
//!
//! Programs go on meanwhile. What they have done since a round began is never judged by it:
//!
//! - A slot counts only from the round on that follows the one in which it was seen to be taken; if a flow began
//!   there after the round did, it stays; and it must be without flows in two rounds in a row, for a walk through
//!   a hash that changes may miss an entry.
//! - A flow or mapping goes only if it is still what was judged.
//! - Where ports are wanted faster than they come back by themselves, those of closed flows go first, as many as are
//!   wanted. Flows that live are ended only where next to no port is left, and only those that were idle for a while;
//!   if one wakes between being judged and being ended, an answer may find nobody.
//! - A slot's generation is raised when it is given back, so that flows that were made at that moment are over.
//!   They know another generation, and the next round removes them.

use std::collections::{BinaryHeap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use wg_common::headers::{PROTOCOL_TCP, PROTOCOL_UDP};
use wg_common::map::AddressKey;
use wg_common::nat::map::{
    EXTERNALS_LEN, Flow, FlowKey, Mapping, MappingKey, NO_SLOT, PORTS_LEN, PROTOCOLS_LEN, Protocol,
    SLOTS_PER_EXTERNAL, Slot, slot_index,
};
use wg_common::upper::{PROTOCOL_ICMP, PROTOCOL_ICMPV6};

const SECOND_NS: u64 = 1_000_000_000;
/// Least time between the begins of two rounds.
const ROUND_LEAST_NS: u64 = SECOND_NS / 100;
/// Two waits of who is told to look again [soon](Next::Soon).
const SOON_NS: u64 = SECOND_NS / 25;
/// Rounds that give nothing back, though something is scarce, are repeated no sooner than this, then twice as long, and
/// so on, up to eight times as long.
const FRUITLESS_NS: u64 = SECOND_NS / 20;
const FRUITLESS_MAX: u32 = 3;
/// Over so long it is counted how fast ports are taken.
const PACE_NS: u64 = SECOND_NS / 10;
/// A round is taken to last no longer than this, however long the latest one did: who is behind only takes more then.
const ROUND_LONGEST_NS: u64 = 2 * SECOND_NS;
/// All mappings are looked at in one round out of so many: they go with their slots but for rare races.
const ROUNDS_PER_MAPPINGS: u64 = 12;
/// Rounds in which a slot was without flows, before it goes.
const MISSES: u8 = 2;
/// What was idle for less is not taken from its owner because others want it, unless it is closed.
const IDLE_LEAST_NS: u64 = 5 * SECOND_NS;

/// The tables, as far as the sweeper needs them.
pub trait Tables {
    /// Why they cannot be reached.
    type Error;

    /// Puts up to `count` flows into `into`, which is empty, that were not given since
    /// [`rewind_flows`](Self::rewind_flows); false if these were the last.
    fn next_flows(
        &mut self,
        count: usize,
        into: &mut Vec<(FlowKey, Flow)>,
    ) -> Result<bool, Self::Error>;
    /// Begins with the first flow again.
    fn rewind_flows(&mut self);
    /// Removes a flow, unless it is not there or has changed since it was read as `was`.
    fn remove_flow(&mut self, key: &FlowKey, was: &Flow) -> Result<(), Self::Error>;

    /// As [`next_flows`](Self::next_flows), of mappings.
    fn next_mappings(
        &mut self,
        count: usize,
        into: &mut Vec<(MappingKey, Mapping)>,
    ) -> Result<bool, Self::Error>;
    /// Begins with the first mapping again.
    fn rewind_mappings(&mut self);
    /// Removes a mapping, unless it is not there or is another one than `was`.
    fn remove_mapping(&mut self, key: &MappingKey, was: &Mapping) -> Result<(), Self::Error>;

    /// A slot.
    fn slot(&mut self, index: u32) -> Result<Slot, Self::Error>;
    /// Takes a slot from who has it: its generation becomes even.
    fn end_slot(&mut self, index: u32) -> Result<(), Self::Error>;

    /// How many ports were taken out of a ring so far, and put into it.
    fn ring(&self, ring: u32) -> (u32, u32);
    /// The port at a position of a ring, counted from the first of its slots. It stays there until [`PORTS_LEN`] others were put in behind it.
    fn port_at(&self, ring: u32, position: u32) -> u32;
    /// Puts a port, counted as above, at the tail of a ring.
    fn put(&mut self, ring: u32, port: u32);
}

/// How long flows live.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// How long a flow lives without packets, in nanoseconds.
    pub timeout_ns: fn(&FlowKey, &Flow) -> u64,
    /// Whether both sides have said that it is over: it only waits for stray packets.
    pub is_closed: fn(&FlowKey, &Flow) -> bool,
    /// How long a mapping of this IP protocol lives after its last packet in any case, in nanoseconds.
    pub mapping_ns: fn(u8) -> u64,
    /// How long a permit lives by itself, in nanoseconds; it lives as long as there is a flow to its address.
    pub permit_ns: u64,
    /// How often rounds begin while nothing is scarce, in nanoseconds.
    pub round_every_ns: u64,
}

/// How much there is room for.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Flows.
    pub flows: usize,
    /// Mappings.
    pub mappings: usize,
}

/// An external address, as the sweeper needs it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Outside {
    /// The address; `None`: there is none at present.
    pub address: Option<AddressKey>,
    /// Index of its NIC.
    pub nic: u32,
}

/// What has become scarce, to be told.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Scarce {
    /// Ports of some protocol at some address: nearly all are in use.
    pub ports: bool,
    /// Ports will soon be, at the pace at which they are taken.
    pub ports_soon: bool,
    /// Room for flows.
    pub flows: bool,
    /// Room for mappings.
    pub mappings: bool,
}

/// What a step has left to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// More, at once: something is scarce.
    AtOnce,
    /// More, soon; or ports are being taken.
    Soon,
    /// Nothing until the next round.
    Later,
}

/// A slot that a program has taken.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// The round before which it was taken.
    since: u64,
    /// The latest round in which it had a flow.
    marked: u64,
    /// Rounds in a row without a flow.
    misses: u8,
    /// When the latest of its flows had a packet.
    last_seen_ns: u64,
    /// Whether all its flows are closed.
    is_closed: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Rest,
    Flows,
    Permits,
    Oldest,
    Slots,
    Relief,
    Mappings,
}

/// How fast ports are taken out of a ring.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    /// Since it was last looked at.
    taken: u32,
    per_s: u32,
}

impl Pace {
    /// `passed_ns` after the last such look. What was fast is taken to go on for a while.
    fn turn(&mut self, passed_ns: u64) {
        let per_s = u64::from(self.taken) * SECOND_NS / passed_ns.max(1);
        self.per_s = u32::try_from(per_s).unwrap_or(u32::MAX).max(self.per_s / 2);
        self.taken = 0;
    }

    /// How many will be taken in that time.
    fn within(&self, ns: u64) -> u32 {
        let now_per_s = u64::from(self.taken) * (SECOND_NS / PACE_NS);
        let count = now_per_s.max(self.per_s.into()).saturating_mul(ns) / SECOND_NS;
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

/// How many ports a ring is to get back.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    /// Even if flows end that could still be used.
    of_living: u32,
    /// From flows that are closed, and mappings that have none; at least as many.
    of_closed: u32,
}

/// A flow that would go if room were scarce; the greatest goes last.
type Candidate = (bool, u64, Ranked);

/// A flow, in an order that means nothing.
#[derive(Clone, Copy)]
struct Ranked(FlowKey, Flow);

impl PartialEq for Ranked {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for Ranked {}
impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Ranked {
    fn cmp(&self, _: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

/// Looks at the tables, a step at a time.
pub struct Sweeper {
    life: Life,
    room: Room,
    port_first: u32,
    outsides: [Outside; EXTERNALS_LEN],
    /// Ports that are not to be given, by protocol.
    kept: HashSet<(u32, u32)>,
    /// Ports, with their rings, that are not in the rings for that reason.
    withheld: Vec<(u32, u32)>,
    /// How far each ring was seen.
    heads: Vec<u32>,
    /// How many ports each ring was given.
    lent: Vec<u32>,
    paces: Vec<Pace>,
    /// Since when ports are counted in `paces`.
    paces_since_ns: u64,
    held: HashMap<u32, Held>,
    phase: Phase,
    round: u64,
    began_ns: u64,
    /// How long the latest whole round took.
    round_ns: u64,
    /// What this round gave back because it was scarce.
    relieved: usize,
    /// Rounds in a row that should have, and gave back nothing.
    fruitless: u32,
    /// Permits that live only if a flow does.
    permits: Vec<(FlowKey, Flow)>,
    /// Hashes of who has flows to whom. Two that are the same only keep a permit.
    living: HashSet<u64>,
    flow_count: usize,
    /// Those of the latest whole round.
    flow_count_before: usize,
    /// The flows that would go first, the last of them on top.
    oldest: BinaryHeap<Candidate>,
    /// Those that go, at the end of a round.
    ending: Vec<Candidate>,
    /// Slots that are still to be looked at in this round; then those that are to be given back.
    slots: Vec<u32>,
    flows: Vec<(FlowKey, Flow)>,
    mappings: Vec<(MappingKey, Mapping)>,
    scarce: Scarce,
}

impl Sweeper {
    /// Begins, with empty tables. `ring_count`: rings of the tables; `port_first`: as in the rule set.
    pub fn new(life: Life, room: Room, ring_count: u32, port_first: u32) -> Self {
        let zeros = || vec![0; ring_count as usize];
        Self {
            life,
            room,
            port_first,
            outsides: [Outside::default(); EXTERNALS_LEN],
            kept: HashSet::new(),
            withheld: Vec::new(),
            heads: zeros(),
            lent: zeros(),
            paces: vec![Pace::default(); ring_count as usize],
            paces_since_ns: 0,
            held: HashMap::new(),
            phase: Phase::Rest,
            round: 1,
            began_ns: 0,
            round_ns: 0,
            relieved: 0,
            fruitless: 0,
            permits: Vec::new(),
            living: HashSet::new(),
            flow_count: 0,
            flow_count_before: 0,
            oldest: BinaryHeap::new(),
            ending: Vec::new(),
            slots: Vec::new(),
            flows: Vec::new(),
            mappings: Vec::new(),
            scarce: Scarce::default(),
        }
    }

    /// Which external addresses there are from now on. Flows of one that has another in its place are over; one
    /// that is only away finds its flows again, if it comes back.
    pub fn set_outsides(&mut self, outsides: [Outside; EXTERNALS_LEN]) {
        for (now, outside) in self.outsides.iter_mut().zip(outsides) {
            // What was there before keeps its flows until another one comes.
            *now = Outside { address: outside.address.or(now.address), nic: outside.nic };
        }
    }

    /// Which ports are not to be given from now on, each with its protocol: they are forwarded.
    pub fn keep_ports<T: Tables>(
        &mut self,
        tables: &mut T,
        kept: impl IntoIterator<Item = (Protocol, u16)>,
    ) {
        self.kept =
            kept.into_iter().map(|(protocol, port)| (protocol as u32, u32::from(port))).collect();
        for (ring, port) in std::mem::take(&mut self.withheld) {
            self.put(tables, ring, port);
        }
    }

    /// Puts ports into a ring that never were in it.
    pub fn lend<T: Tables>(&mut self, tables: &mut T, ring: u32, ports: impl Iterator<Item = u16>) {
        for port in ports.map(u32::from) {
            self.put(tables, ring, port);
            self.lent[ring as usize] += 1;
        }
    }

    fn put<T: Tables>(&mut self, tables: &mut T, ring: u32, port: u32) {
        if self.is_kept(ring, port) {
            self.withheld.push((ring, port));
        } else {
            tables.put(ring, port.wrapping_sub(self.port_first));
        }
    }

    /// How many ports a ring was given.
    pub fn lent(&self, ring: u32) -> u32 {
        self.lent[ring as usize]
    }

    /// Slots in use.
    pub fn held_count(&self) -> usize {
        self.held.len()
    }

    /// What was scarce at the latest step.
    pub fn scarce(&self) -> Scarce {
        self.scarce
    }

    /// How long the latest whole round took, in nanoseconds, and how many flows it found.
    pub fn latest_round(&self) -> (u64, usize) {
        (self.round_ns, self.flow_count_before)
    }

    /// Does a part of a round: looks at up to `budget` entries. `now_ns`: boot time.
    ///
    /// # Errors
    /// If the tables cannot be reached. The round begins anew then.
    pub fn step<T: Tables>(
        &mut self,
        tables: &mut T,
        budget: usize,
        now_ns: u64,
    ) -> Result<Next, T::Error> {
        let outcome = self.try_step(tables, budget, now_ns);
        if outcome.is_err() {
            self.phase = Phase::Rest;
        }
        outcome
    }

    fn try_step<T: Tables>(
        &mut self,
        tables: &mut T,
        budget: usize,
        now_ns: u64,
    ) -> Result<Next, T::Error> {
        self.notice_taken(tables, now_ns);
        let is_scarce = self.look_for_scarce(tables);
        match self.phase {
            Phase::Rest => {
                let wait_ns = match self.fruitless {
                    _ if !is_scarce => self.life.round_every_ns,
                    0 => ROUND_LEAST_NS,
                    times => FRUITLESS_NS << (times - 1).min(FRUITLESS_MAX),
                };
                if now_ns.saturating_sub(self.began_ns) < wait_ns {
                    return Ok(match self.urgency(tables) {
                        Next::AtOnce if is_scarce && self.fruitless > 0 => Next::Soon,
                        urgency => urgency,
                    });
                }
                self.begin(tables, now_ns);
            }
            _ => self.go_on(tables, budget, now_ns)?,
        }
        Ok(if is_scarce { Next::AtOnce } else { Next::Soon })
    }

    /// Does phase after phase of a round until the budget is spent, or the round is over: that of few flows is one step.
    fn go_on<T: Tables>(
        &mut self,
        tables: &mut T,
        budget: usize,
        now_ns: u64,
    ) -> Result<(), T::Error> {
        let mut left = budget;
        while left > 0 {
            let spent = match self.phase {
                Phase::Rest => break,
                Phase::Flows => self.mark(tables, left, now_ns)?,
                Phase::Permits => self.end_permits(tables, left)?,
                Phase::Oldest => self.end_oldest(tables, left)?,
                Phase::Slots => self.sweep_slots(tables, left, now_ns)?,
                Phase::Relief => self.relieve(tables, left, now_ns)?,
                Phase::Mappings => self.sweep_mappings(tables, left)?,
            };
            left = left.saturating_sub(spent);
        }
        Ok(())
    }

    /// When to look again, between two rounds.
    fn urgency<T: Tables>(&self, tables: &T) -> Next {
        let rings = 0..self.heads.len() as u32;
        if rings.clone().any(|ring| self.wanted_within(tables, ring, SOON_NS).of_closed > 0) {
            Next::AtOnce
        } else if self.paces.iter().all(|pace| pace.taken == 0 && pace.per_s == 0) {
            Next::Later
        } else {
            Next::Soon
        }
    }

    fn begin<T: Tables>(&mut self, tables: &mut T, now_ns: u64) {
        self.round += 1;
        self.began_ns = now_ns;
        self.living.clear();
        self.permits.clear();
        self.oldest.clear();
        self.ending.clear();
        self.relieved = 0;
        self.flow_count = 0;
        tables.rewind_flows();
        self.phase = Phase::Flows;
    }

    /// Notes the slots that programs have taken.
    fn notice_taken<T: Tables>(&mut self, tables: &T, now_ns: u64) {
        for ring in 0..self.heads.len() as u32 {
            let seen = &mut self.heads[ring as usize];
            let (head, _) = tables.ring(ring);
            // More cannot be in it: if it says so, somebody else writes there.
            let count = head.wrapping_sub(*seen).min(PORTS_LEN);
            for position in 0..count {
                let port = tables.port_at(ring, seen.wrapping_add(position));
                if port >= PORTS_LEN {
                    continue;
                }
                let held = Held {
                    since: self.round,
                    marked: self.round,
                    misses: 0,
                    last_seen_ns: 0,
                    is_closed: false,
                };
                self.held.insert(slot_index(ring, port), held);
            }
            *seen = head;
            let pace = &mut self.paces[ring as usize];
            pace.taken = pace.taken.saturating_add(count);
        }
        let passed_ns = now_ns.saturating_sub(self.paces_since_ns);
        if passed_ns >= PACE_NS {
            self.paces.iter_mut().for_each(|pace| pace.turn(passed_ns));
            self.paces_since_ns = now_ns;
        }
    }

    /// Whether something is about to run out.
    fn look_for_scarce<T: Tables>(&mut self, tables: &T) -> bool {
        let rings = 0..self.heads.len() as u32;
        let wants = |wanted: fn(&Wanted) -> u32| {
            rings.clone().any(|ring| wanted(&self.wanted(tables, ring)) > 0)
        };
        self.scarce = Scarce {
            ports: wants(|wanted| wanted.of_living),
            ports_soon: wants(|wanted| wanted.of_closed),
            flows: self.flow_count_before.max(self.flow_count) > self.room.flows / 8 * 7,
            mappings: self.held.len() > self.room.mappings / 8 * 7,
        };
        self.scarce != Scarce::default()
    }

    /// How many ports are to be given back to a ring. From those who need them no more: as many as will be taken until
    /// the next round is over, and as many again, but no more than leave half of the ports to those who have them. From
    /// others: a sixteenth is to be free at least, and an eighth after a round.
    fn wanted<T: Tables>(&self, tables: &T, ring: u32) -> Wanted {
        self.wanted_within(tables, ring, 0)
    }

    /// As above, in a while, if ports are taken at the present pace.
    fn wanted_within<T: Tables>(&self, tables: &T, ring: u32, ns: u64) -> Wanted {
        let lent = self.lent[ring as usize];
        let (head, tail) = tables.ring(ring);
        let free = tail.wrapping_sub(head);
        if free > PORTS_LEN {
            return Wanted::default();
        }
        let free = free.saturating_sub(self.paces[ring as usize].within(ns));
        let least = lent / 16;
        let ahead_ns = PACE_NS + 2 * self.round_ns.min(ROUND_LONGEST_NS);
        let soon = self.paces[ring as usize].within(ahead_ns).min(lent / 4).max(least);
        let below = |least: u32| if free < least { 2 * least - free } else { 0 };
        Wanted { of_living: below(least), of_closed: below(soon) }
    }

    fn mark<T: Tables>(
        &mut self,
        tables: &mut T,
        budget: usize,
        now_ns: u64,
    ) -> Result<usize, T::Error> {
        let mut flows = std::mem::take(&mut self.flows);
        flows.clear();
        let more = tables.next_flows(budget, &mut flows)?;
        for (key, flow) in &flows {
            self.judge(tables, key, flow, now_ns)?;
        }
        let spent = flows.len() + 1;
        self.flows = flows;
        if !more {
            self.flow_count_before = self.flow_count;
            self.phase = Phase::Permits;
        }
        Ok(spent)
    }

    /// Removes a flow that is over, or marks its slot.
    fn judge<T: Tables>(
        &mut self,
        tables: &mut T,
        key: &FlowKey,
        flow: &Flow,
        now_ns: u64,
    ) -> Result<(), T::Error> {
        if flow.slot != NO_SLOT && !self.has_its_slot(tables, flow)? {
            return tables.remove_flow(key, flow);
        }
        let idle_ns = now_ns.saturating_sub(flow.last_seen_ns);
        let is_permit = is_permit(key);
        let timeout_ns =
            if is_permit { self.life.permit_ns } else { (self.life.timeout_ns)(key, flow) };
        if idle_ns > timeout_ns {
            if is_permit {
                self.permits.push((*key, *flow));
                self.flow_count += 1;
                return Ok(());
            }
            return tables.remove_flow(key, flow);
        }
        self.flow_count += 1;
        let is_closed = !is_permit && (self.life.is_closed)(key, flow);
        self.note_oldest(is_closed, key, flow);
        if is_permit {
            // It ends with its slot, which is there for flows.
            return Ok(());
        }
        self.living.insert(whom(key));
        let round = self.round;
        if flow.slot != NO_SLOT
            && let Some(held) = self.held.get_mut(&flow.slot)
        {
            if held.marked != round {
                (held.marked, held.misses) = (round, 0);
                (held.last_seen_ns, held.is_closed) = (0, true);
            }
            held.last_seen_ns = held.last_seen_ns.max(flow.last_seen_ns);
            held.is_closed &= is_closed;
        }
        Ok(())
    }

    /// Whether a flow's slot is still its own, and stands for the address that it has.
    fn has_its_slot<T: Tables>(&self, tables: &mut T, flow: &Flow) -> Result<bool, T::Error> {
        if flow.slot >= self.heads.len() as u32 * PORTS_LEN {
            return Ok(false);
        }
        let outside = self.outsides[(flow.slot / SLOTS_PER_EXTERNAL) as usize];
        if outside.address.is_some_and(|address| address != flow.external) {
            return Ok(false);
        }
        Ok(tables.slot(flow.slot)?.generation == flow.generation)
    }

    /// Keeps the flows that would go first, if room for flows may be scarce at the end of this round.
    fn note_oldest(&mut self, is_closed: bool, key: &FlowKey, flow: &Flow) {
        if self.flow_count_before <= self.room.flows / 4 * 3 {
            return;
        }
        let candidate = (!is_closed, flow.last_seen_ns, Ranked(*key, *flow));
        if self.oldest.len() < self.room.flows / 8 {
            self.oldest.push(candidate);
        } else if self.oldest.peek().is_some_and(|last| candidate < *last) {
            self.oldest.pop();
            self.oldest.push(candidate);
        }
    }

    /// Removes permits whose mapping has no flow to their address.
    fn end_permits<T: Tables>(&mut self, tables: &mut T, budget: usize) -> Result<usize, T::Error> {
        for spent in 1..=budget {
            let Some((key, flow)) = self.permits.pop() else {
                let max = self.room.flows / 8 * 7;
                if self.flow_count > max {
                    self.ending = std::mem::take(&mut self.oldest).into_sorted_vec();
                    self.ending.truncate(self.flow_count - max);
                }
                self.phase = Phase::Oldest;
                return Ok(spent);
            };
            if !self.living.contains(&whom(&key)) {
                tables.remove_flow(&key, &flow)?;
            }
        }
        Ok(budget)
    }

    /// Removes the oldest flows, so that an eighth of the room is free.
    fn end_oldest<T: Tables>(&mut self, tables: &mut T, budget: usize) -> Result<usize, T::Error> {
        for spent in 1..=budget {
            let Some((_, _, Ranked(key, flow))) = self.ending.pop() else {
                self.slots.clear();
                self.slots.extend(self.held.keys());
                self.phase = Phase::Slots;
                return Ok(spent);
            };
            tables.remove_flow(&key, &flow)?;
            self.relieved += 1;
        }
        Ok(budget)
    }

    fn sweep_slots<T: Tables>(
        &mut self,
        tables: &mut T,
        budget: usize,
        now_ns: u64,
    ) -> Result<usize, T::Error> {
        for spent in 1..=budget {
            let Some(index) = self.slots.pop() else {
                self.slots = self.needed_least(tables, now_ns);
                self.phase = Phase::Relief;
                return Ok(spent);
            };
            self.sweep_slot(tables, index)?;
        }
        Ok(budget)
    }

    fn sweep_slot<T: Tables>(&mut self, tables: &mut T, index: u32) -> Result<(), T::Error> {
        let (round, began_ns) = (self.round, self.began_ns);
        let is_kept = self.is_kept(index / PORTS_LEN, index % PORTS_LEN + self.port_first);
        let Some(held) = self.held.get_mut(&index) else { return Ok(()) };
        if is_kept && held.since < round {
            // It was free when the line came, and is forwarded now.
            let slot = tables.slot(index)?;
            if !slot.generation.is_multiple_of(2) {
                return self.release(tables, index, slot);
            }
        }
        if held.marked == round || held.since >= round {
            return Ok(());
        }
        let slot = tables.slot(index)?;
        if slot.generation.is_multiple_of(2) {
            // A program took the port and did not want it: somebody on this host listens there.
            self.give_back(tables, index);
        } else if slot.last_seen_ns < began_ns {
            let protocol = protocol_of(index, &slot);
            let lived_ns = (self.life.mapping_ns)(protocol);
            if slot.last_seen_ns.max(held.last_seen_ns) + lived_ns > began_ns {
                return Ok(());
            }
            held.misses += 1;
            if held.misses >= MISSES {
                self.release(tables, index, slot)?;
            }
        }
        Ok(())
    }

    /// Takes ports from those who need them least, where others want some, and ends the round.
    fn relieve<T: Tables>(
        &mut self,
        tables: &mut T,
        budget: usize,
        now_ns: u64,
    ) -> Result<usize, T::Error> {
        for spent in 1..=budget {
            let Some(index) = self.slots.pop() else {
                self.end(tables, now_ns);
                return Ok(spent);
            };
            let slot = tables.slot(index)?;
            // A flow that began since then may have made it important.
            if !slot.generation.is_multiple_of(2) && slot.last_seen_ns < self.began_ns {
                self.release(tables, index, slot)?;
                self.relieved += 1;
            }
        }
        Ok(budget)
    }

    fn end<T: Tables>(&mut self, tables: &mut T, now_ns: u64) {
        self.round_ns = now_ns.saturating_sub(self.began_ns);
        let was_in_vain = self.scarce != Scarce::default() && self.relieved == 0;
        self.fruitless = if was_in_vain { self.fruitless.saturating_add(1) } else { 0 };
        self.phase = Phase::Rest;
        if self.round.is_multiple_of(ROUNDS_PER_MAPPINGS) {
            tables.rewind_mappings();
            self.phase = Phase::Mappings;
        }
    }

    /// The slots whose ports are wanted by others, that which goes first last: those that are over, then those that were
    /// idle for longest.
    fn needed_least<T: Tables>(&self, tables: &T, now_ns: u64) -> Vec<u32> {
        let rings = self.heads.len();
        let mut wanted: Vec<Wanted> =
            (0..rings as u32).map(|ring| self.wanted(tables, ring)).collect();
        let room = self.held.len().saturating_sub(self.room.mappings / 8 * 7);
        if room == 0 && wanted.iter().all(|wanted| wanted.of_closed == 0) {
            return Vec::new();
        }
        // One that had no flow in two rounds is kept for others who may send to it.
        let is_over = |held: &Held| {
            held.is_closed && held.marked == self.round || held.marked + 1 < self.round
        };
        let may_go = |held: &Held| {
            let idle_ns = now_ns.saturating_sub(held.last_seen_ns);
            held.since < self.round && (is_over(held) || idle_ns >= IDLE_LEAST_NS)
        };
        let is_wanted = |index: u32| room > 0 || wanted[(index / PORTS_LEN) as usize].of_closed > 0;
        let mut slots: Vec<(bool, u64, u32)> = self
            .held
            .iter()
            .filter(|(index, held)| is_wanted(**index) && may_go(held))
            .map(|(&index, held)| (!is_over(held), held.last_seen_ns, index))
            .collect();
        slots.sort_unstable();
        let (mut first, mut room) = (Vec::new(), room);
        for (lives, _, index) in slots {
            let Wanted { of_living, of_closed } = &mut wanted[(index / PORTS_LEN) as usize];
            if room > 0 || *of_living > 0 || !lives && *of_closed > 0 {
                first.push(index);
                (*of_living, *of_closed) =
                    (of_living.saturating_sub(1), of_closed.saturating_sub(1));
                room = room.saturating_sub(1);
            }
        }
        first.reverse();
        first
    }

    /// Ends a slot's mapping and with it its flows, and gives the port back.
    fn release<T: Tables>(
        &mut self,
        tables: &mut T,
        index: u32,
        slot: Slot,
    ) -> Result<(), T::Error> {
        // First: who finds none takes another slot. Later a mapping might be a new one.
        let mapping = Mapping { slot: index, generation: slot.generation };
        tables.remove_mapping(&self.mapping_key(index, &slot), &mapping)?;
        tables.end_slot(index)?;
        self.give_back(tables, index);
        Ok(())
    }

    fn mapping_key(&self, index: u32, slot: &Slot) -> MappingKey {
        let protocol = protocol_of(index, slot);
        let nic = self.outsides[(index / SLOTS_PER_EXTERNAL) as usize].nic;
        let (inner, inner_port) = (slot.inner, slot.inner_port);
        MappingKey { inner, inner_port, protocol, padding: 0, nic }
    }

    /// Puts a port back into its ring.
    fn give_back<T: Tables>(&mut self, tables: &mut T, index: u32) {
        self.held.remove(&index);
        self.put(tables, index / PORTS_LEN, index % PORTS_LEN + self.port_first);
    }

    fn is_kept(&self, ring: u32, port: u32) -> bool {
        self.kept.contains(&(ring % PROTOCOLS_LEN, port))
    }

    fn sweep_mappings<T: Tables>(
        &mut self,
        tables: &mut T,
        budget: usize,
    ) -> Result<usize, T::Error> {
        let mut mappings = std::mem::take(&mut self.mappings);
        mappings.clear();
        let more = tables.next_mappings(budget, &mut mappings)?;
        for (key, mapping) in &mappings {
            let is_of_a_ring = mapping.slot < self.heads.len() as u32 * PORTS_LEN;
            if !is_of_a_ring || tables.slot(mapping.slot)?.generation != mapping.generation {
                tables.remove_mapping(key, mapping)?;
            }
        }
        let spent = mappings.len() + 1;
        self.mappings = mappings;
        if !more {
            self.phase = Phase::Rest;
        }
        Ok(spent)
    }
}

/// The IP protocol number of a slot that somebody has.
fn protocol_of(index: u32, slot: &Slot) -> u8 {
    match index / PORTS_LEN % PROTOCOLS_LEN {
        0 => PROTOCOL_TCP,
        1 => PROTOCOL_UDP,
        _ if slot.inner.is_v4() => PROTOCOL_ICMP,
        _ => PROTOCOL_ICMPV6,
    }
}

/// Whether this is no flow, but that a mapping has sent to this address.
pub fn is_permit(key: &FlowKey) -> bool {
    key.remote_port == 0 && matches!(key.protocol, PROTOCOL_TCP | PROTOCOL_UDP)
}

/// Who has flows to whom.
fn whom(key: &FlowKey) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key.inner, key.inner_port, key.protocol, key.remote).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
#[path = "sweep_tests.rs"]
mod tests;
