//! What reads the tables of NAT as a whole: the sweeper, a page at a time, and `show`, in a process of its own.

use std::io;
use std::sync::atomic::Ordering;

use aya::maps::{IterableMap as _, Map, MapData, MapInfo, PerCpuArray};
use serde::{Deserialize, Serialize};
use wg_common::map::AddressKey;
use wg_common::nat::map::{
    ALLOW_COUNTERS, FLOWS, Flow, FlowKey, MAPPINGS, Mapping, MappingKey, NAT_COUNTERS, PORTS_LEN,
    TcpWindow, slot_index,
};

use super::{BpfError, Nat, NatCounters, sum_of};
use crate::sys::bpf_pages::HashPages;

/// The kernel's numbers of the maps of NAT, by which another process of root's opens them.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NatIds {
    flows: u32,
    counters: u32,
    allowed: u32,
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
        let id = |map: &MapData, name| {
            map.info().map(|info: MapInfo| info.id()).map_err(|error| BpfError::map(name, error))
        };
        Ok(NatIds {
            flows: id(self.flows.map(), FLOWS)?,
            counters: id(self.counters.map(), NAT_COUNTERS)?,
            allowed: id(self.allow_counters.map(), ALLOW_COUNTERS)?,
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

fn absent<T>(outcome: Result<T, aya::maps::MapError>) -> Result<Option<T>, aya::maps::MapError> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(aya::maps::MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
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

fn io_error(error: io::Error) -> aya::maps::MapError {
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
