//! The tables of NAT that another process has, looked up as its programs do: for who asks what would become of a
//! packet. Nothing is written.

use std::net::IpAddr;

use aya::maps::lpm_trie::Key;
use aya::maps::{Array, ArrayOfMaps, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray};
use wg_common::map::{OWNERS_V4, OWNERS_V6};
use wg_common::nat::map::{
    ALLOW_COUNTERS, FLOWS, FREE_PORTS, Flow, FlowKey, MAPPINGS, Mapping, MappingKey, PORT_RINGS,
    PORTS_LEN, RING_TAIL, RING_WORDS, RULES, RuleSet, SLOTS, Slot, slot_index,
};

use super::pages::{NatIds, absent};
use super::{BpfError, sum_of};

/// The tables, to be looked up.
pub struct NatTables {
    rules: Box<RuleSet>,
    flows: HashMap<MapData, FlowKey, Flow>,
    mappings: HashMap<MapData, MappingKey, Mapping>,
    slots: Array<MapData, Slot>,
    free_ports: Array<MapData, u64>,
    port_rings: Array<MapData, u64>,
    owners_v4: LpmTrie<MapData, [u8; 4], u32>,
    owners_v6: LpmTrie<MapData, [u8; 16], u32>,
    allowed: PerCpuArray<MapData, u64>,
}

impl NatTables {
    /// Opens the maps, and reads the rules that hold now.
    ///
    /// # Errors
    /// If they are not there any more, or this process may not.
    pub fn open(ids: NatIds) -> Result<Self, BpfError> {
        let rules: ArrayOfMaps<MapData, Array<MapData, RuleSet>> =
            open(ids.early.rules, RULES, Map::ArrayOfMaps)?;
        let of_rules = |error| BpfError::map(RULES, error);
        // Its number may be that of a set that has just been swapped for another one, and is gone.
        let present = rules.get(&0, 0).or_else(|_| rules.get(&0, 0)).map_err(of_rules)?;
        Ok(Self {
            rules: Box::new(present.get(&0, 0).map_err(of_rules)?),
            flows: open(ids.flows, FLOWS, Map::HashMap)?,
            mappings: open(ids.mappings, MAPPINGS, Map::HashMap)?,
            slots: open(ids.slots, SLOTS, Map::Array)?,
            free_ports: open(ids.early.free_ports, FREE_PORTS, Map::Array)?,
            port_rings: open(ids.early.port_rings, PORT_RINGS, Map::Array)?,
            owners_v4: open(ids.owners_v4, OWNERS_V4, Map::LpmTrie)?,
            owners_v6: open(ids.owners_v6, OWNERS_V6, Map::LpmTrie)?,
            allowed: open(ids.allowed, ALLOW_COUNTERS, Map::PerCpuArray)?,
        })
    }

    /// The rules that held when the tables were opened.
    pub const fn rules(&self) -> &RuleSet {
        &self.rules
    }

    /// A flow, if it is there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn flow(&self, key: &FlowKey) -> Result<Option<Flow>, BpfError> {
        absent(self.flows.get(key, 0)).map_err(|error| BpfError::map(FLOWS, error))
    }

    /// A mapping, if it is there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn mapping(&self, key: &MappingKey) -> Result<Option<Mapping>, BpfError> {
        absent(self.mappings.get(key, 0)).map_err(|error| BpfError::map(MAPPINGS, error))
    }

    /// What stands in a slot; nothing beyond the last one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn slot(&self, index: u32) -> Result<Option<Slot>, BpfError> {
        if index >= self.slots.len() {
            return Ok(None);
        }
        self.slots.get(&index, 0).map(Some).map_err(|error| BpfError::map(SLOTS, error))
    }

    /// The port that is taken from a ring after `before` others, counted from [`RuleSet::port_first`]; nothing if
    /// it has no more.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn free_port(&self, ring: u32, before: u32) -> Result<Option<u32>, BpfError> {
        let word =
            |at: u32| self.port_rings.get(&at, 0).map_err(|error| BpfError::map(PORT_RINGS, error));
        let first = ring.saturating_mul(RING_WORDS);
        if first + RING_TAIL >= self.port_rings.len() {
            return Ok(None);
        }
        let (head, tail) = (word(first)?, word(first + RING_TAIL)?);
        if tail.wrapping_sub(head) > u64::from(PORTS_LEN) || u64::from(before) >= tail - head {
            return Ok(None);
        }
        let position = (head + u64::from(before)) % u64::from(PORTS_LEN);
        let port = self.free_ports.get(&slot_index(ring, position as u32), 0);
        port.map(|port| Some(port as u32)).map_err(|error| BpfError::map(FREE_PORTS, error))
    }

    /// Whether some peer owns an address.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn is_owned(&self, address: IpAddr) -> Result<bool, BpfError> {
        let (name, owner) = match address {
            IpAddr::V4(ip) => (OWNERS_V4, self.owners_v4.get(&Key::new(32, ip.octets()), 0)),
            IpAddr::V6(ip) => (OWNERS_V6, self.owners_v6.get(&Key::new(128, ip.octets()), 0)),
        };
        absent(owner).map(|found| found.is_some()).map_err(|error| BpfError::map(name, error))
    }

    /// As [`Nat::allowed`](super::Nat::allowed).
    ///
    /// # Errors
    /// If there is no such counter, or the kernel refuses.
    pub fn allowed(&self, counter: u32) -> Result<u64, BpfError> {
        sum_of(&self.allowed, ALLOW_COUNTERS, counter)
    }
}

fn open<M: TryFrom<Map, Error = MapError>>(
    id: u32,
    name: &'static str,
    kind: impl FnOnce(MapData) -> Map,
) -> Result<M, BpfError> {
    let map = MapData::from_id(id).map_err(|error| BpfError::map(name, error))?;
    M::try_from(kind(map)).map_err(|error| BpfError::map(name, error))
}
