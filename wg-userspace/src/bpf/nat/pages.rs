//! What reads the tables of NAT as a whole: the sweeper, a page at a time, and `show`, in a process of its own.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use aya::maps::{IterableMap as _, Map, MapData, MapInfo, PerCpuArray};
use serde::{Deserialize, Serialize};
use wg_common::map::{AddressKey, OWNERS_V4, OWNERS_V6};
use wg_common::nat::map::{
    ALLOW_COUNTERS, FLOWS, FREE_PORTS, Flow, FlowKey, MAPPINGS, Mapping, MappingKey, NAT_COUNTERS,
    PORT_RINGS, PORTS_LEN, RULES, SLOTS, TcpWindow, slot_index,
};

use super::{BpfError, Nat, NatCounters, sum_of};
use crate::sys::bpf_pages::HashPages;

/// The kernel's numbers of the maps of NAT, by which another process of root's opens them.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NatIds {
    pub(super) flows: u32,
    pub(super) counters: u32,
    pub(super) allowed: u32,
    pub(super) mappings: u32,
    pub(super) slots: u32,
    pub(super) owners_v4: u32,
    pub(super) owners_v6: u32,
    #[serde(flatten)]
    pub(super) early: EarlyIds,
}

/// The numbers of maps of which no handle is kept that tells them.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct EarlyIds {
    pub(super) rules: u32,
    pub(super) free_ports: u32,
    pub(super) port_rings: u32,
}

/// A walk through the flows.
pub struct FlowPages(HashPages);

/// A walk through the mappings.
pub struct MappingPages(HashPages);

/// The maps of NAT that another process has, to be read.
pub struct NatView {
    flows: FlowPages,
    counters: PerCpuArray<MapData, u64>,
    allowed: PerCpuArray<MapData, u64>,
}

impl Nat {
    /// The numbers of the maps that [`NatView`] reads.
    ///
    /// # Errors
    /// If the kernel does not tell them.
    pub fn ids(&self) -> Result<NatIds, BpfError> {
        Ok(NatIds {
            flows: map_id(self.flows.map(), FLOWS)?,
            counters: map_id(self.counters.map(), NAT_COUNTERS)?,
            allowed: map_id(self.allow_counters.map(), ALLOW_COUNTERS)?,
            mappings: map_id(self.mappings.map(), MAPPINGS)?,
            slots: map_id(self.slots.map(), SLOTS)?,
            owners_v4: map_id(self.owners_v4.map(), OWNERS_V4)?,
            owners_v6: map_id(self.owners_v6.map(), OWNERS_V6)?,
            early: self.early_ids,
        })
    }

    /// A walk through the flows, from the first on.
    ///
    /// # Errors
    /// When descriptors are exhausted.
    pub fn flow_pages(&self) -> io::Result<FlowPages> {
        use std::os::fd::AsFd as _;
        FlowPages::new(self.flows.map().fd().as_fd())
    }

    /// A walk through the mappings, from the first on.
    ///
    /// # Errors
    /// When descriptors are exhausted.
    pub fn mapping_pages(&self) -> io::Result<MappingPages> {
        use std::os::fd::AsFd as _;
        let map = self.mappings.map().fd().as_fd();
        HashPages::new(map, size_of::<MappingKey>(), size_of::<Mapping>()).map(MappingPages)
    }

    /// All flows, in no order. What comes or goes meanwhile may be there or not, and some may come twice.
    pub fn flows(&self) -> impl Iterator<Item = Result<(FlowKey, Flow), BpfError>> + '_ {
        let mut pages = self.flow_pages();
        let entries = each(move |into| match &mut pages {
            Ok(pages) => pages.next(PAGE, into),
            Err(error) => Err(error.kind().into()),
        });
        entries.map(|entry| entry.map_err(|error| BpfError::map(FLOWS, io_error(error))))
    }

    /// All mappings, as [`Nat::flows`].
    pub fn mappings(&self) -> impl Iterator<Item = Result<(MappingKey, Mapping), BpfError>> + '_ {
        let mut pages = self.mapping_pages();
        let entries = each(move |into| match &mut pages {
            Ok(pages) => pages.next(PAGE, into),
            Err(error) => Err(error.kind().into()),
        });
        entries.map(|entry| entry.map_err(|error| BpfError::map(MAPPINGS, io_error(error))))
    }

    /// What a flow is now, if it is there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn flow(&self, key: &FlowKey) -> Result<Option<Flow>, BpfError> {
        absent(self.flows.get(key, 0)).map_err(|error| BpfError::map(FLOWS, error))
    }

    /// What a mapping is now, if it is there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn mapping(&self, key: &MappingKey) -> Result<Option<Mapping>, BpfError> {
        absent(self.mappings.get(key, 0)).map_err(|error| BpfError::map(MAPPINGS, error))
    }

    /// How many ports were taken out of a ring so far, and put into it.
    ///
    /// # Panics
    /// If there is no such ring.
    pub fn ring_ends(&self, ring: u32) -> (u64, u64) {
        let [head, tail] = self.ring(ring);
        // What a head has passed is read behind it.
        (head.load(Ordering::Acquire), tail.load(Ordering::Relaxed))
    }

    /// The port at a position of a ring, as [`Nat::free_port`] put it there.
    ///
    /// # Panics
    /// If there is no such ring.
    pub fn port_at(&self, ring: u32, position: u64) -> u32 {
        let word = slot_index(ring, (position % u64::from(PORTS_LEN)) as u32);
        self.free_ports[word as usize].load(Ordering::Relaxed) as u32
    }
}

impl EarlyIds {
    pub(super) fn of(
        rules: &Map,
        free_ports: &OwnedFd,
        port_rings: &OwnedFd,
    ) -> Result<Self, BpfError> {
        let Map::ArrayOfMaps(rules) = rules else { return Err(BpfError::Stale(RULES)) };
        let id = |fd: &OwnedFd, name| {
            let again = fd.try_clone().map_err(|error| BpfError::map(name, io_error(error)))?;
            let map = MapData::from_fd(again).map_err(|error| BpfError::map(name, error))?;
            map_id(&map, name)
        };
        Ok(Self {
            rules: map_id(rules, RULES)?,
            free_ports: id(free_ports, FREE_PORTS)?,
            port_rings: id(port_rings, PORT_RINGS)?,
        })
    }
}

/// The kernel's number of a map.
pub(super) fn map_id(map: &MapData, name: &'static str) -> Result<u32, BpfError> {
    map.info().map(|info: MapInfo| info.id()).map_err(|error| BpfError::map(name, error))
}

pub(super) fn absent<T>(
    outcome: Result<T, aya::maps::MapError>,
) -> Result<Option<T>, aya::maps::MapError> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(aya::maps::MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Entries that are read at a time.
const PAGE: usize = 4096;

/// The entries that `next_page` gives, one by one, until it says that there are no more, or fails.
fn each<T>(
    mut next_page: impl FnMut(&mut Vec<T>) -> io::Result<bool>,
) -> impl Iterator<Item = io::Result<T>> {
    let (mut page, mut has_more) = (Vec::new(), true);
    std::iter::from_fn(move || {
        while page.is_empty() && has_more {
            match next_page(&mut page) {
                Ok(is_more) => has_more = is_more,
                Err(error) => {
                    has_more = false;
                    return Some(Err(error));
                }
            }
        }
        page.pop().map(Ok)
    })
}

impl FlowPages {
    fn new(map: std::os::fd::BorrowedFd<'_>) -> io::Result<Self> {
        HashPages::new(map, size_of::<FlowKey>(), size_of::<Flow>()).map(Self)
    }

    /// Most flows that there may be.
    pub fn room(&self) -> usize {
        self.0.entry_count_max()
    }

    /// Begins with the first one again.
    pub fn rewind(&mut self) {
        self.0.rewind();
    }

    /// All flows, from the first one on, each at least once; what comes and goes meanwhile may be there or not.
    pub fn each(&mut self) -> impl Iterator<Item = io::Result<(FlowKey, Flow)>> + '_ {
        self.rewind();
        each(|into| self.next(PAGE, into))
    }

    /// Adds up to `count` further flows, and at least 64 if there are; false if these were the last.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn next(&mut self, count: usize, into: &mut Vec<(FlowKey, Flow)>) -> io::Result<bool> {
        self.0.next(count, |key, flow| {
            into.extend(flow_key(&mut Words(key)).zip(flow_value(&mut Words(flow))));
        })
    }
}

impl MappingPages {
    /// Most mappings that there may be.
    pub fn room(&self) -> usize {
        self.0.entry_count_max()
    }

    /// Begins with the first one again.
    pub fn rewind(&mut self) {
        self.0.rewind();
    }

    /// As [`FlowPages::next`].
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn next(
        &mut self,
        count: usize,
        into: &mut Vec<(MappingKey, Mapping)>,
    ) -> io::Result<bool> {
        self.0.next(count, |key, mapping| {
            into.extend(mapping_key(&mut Words(key)).zip(mapping_value(&mut Words(mapping))));
        })
    }
}

impl NatView {
    /// Opens the maps that another process has.
    ///
    /// # Errors
    /// If they are not there any more, or this process may not.
    pub fn open(ids: NatIds) -> Result<Self, BpfError> {
        use std::os::fd::AsFd as _;
        let map = |id, name| MapData::from_id(id).map_err(|error| BpfError::map(name, error));
        let per_cpu = |id, name| -> Result<PerCpuArray<MapData, u64>, BpfError> {
            let map = Map::PerCpuArray(map(id, name)?);
            map.try_into().map_err(|error| BpfError::map(name, error))
        };
        let flows = map(ids.flows, FLOWS)?;
        let pages = FlowPages::new(flows.fd().as_fd())
            .map_err(|error| BpfError::map(FLOWS, io_error(error)))?;
        Ok(Self {
            flows: pages,
            counters: per_cpu(ids.counters, NAT_COUNTERS)?,
            allowed: per_cpu(ids.allowed, ALLOW_COUNTERS)?,
        })
    }

    /// The flows, each at least once; what comes and goes meanwhile may be there or not.
    pub fn flows(&mut self) -> &mut FlowPages {
        &mut self.flows
    }

    /// As [`Nat::counters`].
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn counters(&self) -> Result<NatCounters, BpfError> {
        NatCounters::of(&self.counters)
    }

    /// As [`Nat::allowed`].
    ///
    /// # Errors
    /// If there is no such counter, or the kernel refuses.
    pub fn allowed(&self, counter: u32) -> Result<u64, BpfError> {
        sum_of(&self.allowed, ALLOW_COUNTERS, counter)
    }
}

pub(super) fn io_error(error: io::Error) -> aya::maps::MapError {
    aya::sys::SyscallError { call: "bpf_map_lookup_batch", io_error: error }.into()
}

/// A map's value, from its first byte on.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_ne_bytes)
    }

    fn address(&mut self) -> Option<AddressKey> {
        Some(AddressKey([self.u32()?, self.u32()?, self.u32()?, self.u32()?]))
    }

    fn window(&mut self) -> Option<TcpWindow> {
        Some(TcpWindow {
            end: self.u32()?,
            end_max: self.u32()?,
            window_max: self.u32()?,
            scale: self.u32()?,
            acked: self.u32()?,
        })
    }
}

// Fields of a literal are read in the order in which they are written, which is that of their places.

fn flow_key(words: &mut Words<'_>) -> Option<FlowKey> {
    Some(FlowKey {
        inner: words.address()?,
        remote: words.address()?,
        inner_port: words.u16()?,
        remote_port: words.u16()?,
        protocol: words.u8()?,
        padding: words.take()?,
    })
}

fn flow_value(words: &mut Words<'_>) -> Option<Flow> {
    Some(Flow {
        last_seen_ns: words.u64()?,
        created_ns: words.u64()?,
        packets: [words.u64()?, words.u64()?],
        bytes: [words.u64()?, words.u64()?],
        external: words.address()?,
        slot: words.u32()?,
        generation: words.u32()?,
        version: words.u32()?,
        rule: words.u32()?,
        external_port: words.u16()?,
        kind: words.u8()?,
        state: words.u8()?,
        nic: words.u32()?,
        windows: [words.window()?, words.window()?],
    })
}

fn mapping_key(words: &mut Words<'_>) -> Option<MappingKey> {
    Some(MappingKey {
        inner: words.address()?,
        inner_port: words.u16()?,
        protocol: words.u8()?,
        padding: words.u8()?,
        nic: words.u32()?,
    })
}

fn mapping_value(words: &mut Words<'_>) -> Option<Mapping> {
    Some(Mapping { slot: words.u32()?, generation: words.u32()? })
}
