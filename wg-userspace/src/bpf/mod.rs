//! Loads, attaches and detaches the kernel side, with one typed handle per map.
//!
//! The only room that knows `aya`. It knows neither peers nor keys: `daemon` tells it what the
//! steer program must know (ports, addresses, live indexes, queues and their sockets), workers
//! store their heartbeats straight into the mapped array. Of each TUN device, [`TunSteering`] is told who
//! owns which prefix, and workers store where peers are at home; of each listen port, [`SocketSteering`] is told
//! the sockets, and control stores where keypairs are. [`Nat`] has the rules, ports and flows of a device that
//! translates or filters. What the maps mean stands in [`wg_common::map`] and [`wg_common::nat::map`].

mod attached;
mod error;
mod log;
mod nat;
mod socket_steering;
#[cfg(test)]
mod tests;
mod tun_steering;

use std::collections::HashMap as StdHashMap;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use aya::maps::{Array, HashMap, IterableMap as _, Map, MapData, MapError, PerCpuArray, XskMap};
use aya::programs::links::FdLink;
use aya::programs::{TestRun, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use wg_common::id::DeviceId;
use wg_common::index::IndexPermutation;
use wg_common::map::{
    AddressKey, HEARTBEATS, INDEX_WORKERS, INDEXES_GLOBAL, LISTEN_PORTS, LIVE_INDEXES,
    LIVE_INDEXES_LEN, LOCAL_ADDRESSES, LOG_GLOBAL, PEER_WORKERS, QUEUES, QueueEntry, QueueKey,
    STEER_COUNTERS, STEER_PROGRAM, XSKS, port_entry,
};
use wg_common::outcome::{DropReason, STEER_COUNTER_COUNT, SteerEvent};

pub use self::error::{AttachError, BpfError, NatAttachError};
pub use self::log::LogReader;
pub use self::nat::{
    Attachment, FlowPages, MappingPages, Nat, NatCounters, NatHook, NatIds, NatOptions, NatRun,
    NatTables, NatVerdict, NatView, remove_left_overs,
};
pub use self::socket_steering::SocketSteering;
pub use self::tun_steering::TunSteering;
use crate::sys::{SharedWords, link};

/// The programs, as `cargo xtask build-ebpf` made them.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("TIDEGATE_BPF_OBJECT_PATH"));

/// Maps that the programs of NAT do not use: the least number of entries for them.
const NOT_OF_NAT: [&str; 7] =
    [LISTEN_PORTS, LOCAL_ADDRESSES, LIVE_INDEXES, INDEX_WORKERS, QUEUES, HEARTBEATS, PEER_WORKERS];

/// What can be chosen when the steer program is loaded.
#[derive(Clone, Copy, Debug)]
pub struct SteerOptions {
    /// What takes receiver indexes apart: the one they are made with.
    pub indexes: IndexPermutation,
    /// Whether the program writes log lines, for [`Steer::log_reader`].
    pub log: bool,
    /// Slots of the live-index map, at most [`LIVE_INDEXES_LEN`]; if `None`, as many as there are, up
    /// to that. Indexes with slots beyond it pass unchecked.
    pub live_indexes: Option<u32>,
}

impl SteerOptions {
    /// No log lines, and a live-index map of the usual length.
    pub fn new(indexes: IndexPermutation) -> Self {
        Self { indexes, log: false, live_indexes: None }
    }
}

/// The steer program in the kernel, with its maps.
///
/// Dropping it detaches the program everywhere; the kernel then gets every packet.
pub struct Steer {
    ebpf: Ebpf,
    /// Interface index → the link that keeps the program attached there.
    links: StdHashMap<u32, FdLink>,
    listen_ports: Words,
    live_indexes: Words,
    heartbeats: Words,
    local_addresses: HashMap<MapData, AddressKey, u32>,
    queues: HashMap<MapData, QueueKey, QueueEntry>,
    xsks: XskMap<MapData>,
    counters: PerCpuArray<MapData, u64>,
    log_reader: Option<LogReader>,
}

impl Steer {
    /// Loads the program and creates its maps. Nothing is attached yet, and no port is ours.
    ///
    /// # Errors
    /// [`BpfError::NotPermitted`] without the capabilities; [`BpfError::Verifier`], with the
    /// kernel's log, if it refuses the program; otherwise whatever map could not be made.
    pub fn load(options: SteerOptions) -> Result<Self, BpfError> {
        Self::load_object(OBJECT, options)
    }

    fn load_object(object: &[u8], options: SteerOptions) -> Result<Self, BpfError> {
        let log = u8::from(options.log);
        let index_count = options
            .live_indexes
            .unwrap_or(options.indexes.layout().slot_count())
            .clamp(1, LIVE_INDEXES_LEN);
        let mut ebpf = EbpfLoader::new()
            .override_global(LOG_GLOBAL, &log, true)
            .override_global(INDEXES_GLOBAL, &options.indexes, true)
            .map_max_entries(LIVE_INDEXES, index_count)
            // Each device has them of its own, with programs that this is not.
            .map_max_entries(PEER_WORKERS, 1)
            .map_max_entries(INDEX_WORKERS, 1)
            .load(object)
            .map_err(BpfError::object)?;
        program(&mut ebpf)?.load().map_err(|error| BpfError::program(STEER_PROGRAM, error))?;
        let counters: PerCpuArray<MapData, u64> = take(&mut ebpf, STEER_COUNTERS)?;
        if counters.len() as usize != STEER_COUNTER_COUNT {
            return Err(BpfError::Stale(STEER_COUNTERS));
        }
        Ok(Self {
            links: StdHashMap::new(),
            listen_ports: words(&mut ebpf, LISTEN_PORTS)?,
            live_indexes: words(&mut ebpf, LIVE_INDEXES)?,
            heartbeats: words(&mut ebpf, HEARTBEATS)?,
            local_addresses: take(&mut ebpf, LOCAL_ADDRESSES)?,
            queues: take(&mut ebpf, QUEUES)?,
            xsks: take(&mut ebpf, XSKS)?,
            counters,
            log_reader: if options.log { Some(LogReader::new(&mut ebpf)?) } else { None },
            ebpf,
        })
    }

    /// Attaches the program to the interface in native mode; does nothing where it is attached.
    ///
    /// A program of someone else's is never replaced, and generic mode never used: it would drop
    /// every super-packet.
    ///
    /// # Errors
    /// Why it is not attached; everything is as before then.
    pub fn attach(&mut self, interface: &str) -> Result<(), AttachError> {
        let ifindex = link::index(interface)
            .map_err(|_| AttachError::UnknownInterface(interface.to_owned()))?;
        if self.links.contains_key(&ifindex) {
            return Ok(());
        }
        // The kernel's link would refuse as well, but not say whose program it is.
        if let Some(foreign) = attached::program_on(ifindex) {
            return Err(AttachError::ForeignProgram { interface: interface.to_owned(), foreign });
        }
        let program = program(&mut self.ebpf).map_err(AttachError::Bpf)?;
        let id = program
            .attach_to_if_index(ifindex, XdpMode::Driver)
            .map_err(|error| AttachError::new(interface, error))?;
        let link = program.take_link(id).map_err(|error| AttachError::new(interface, error))?;
        // Where the kernel refuses a link, `aya` attaches without one, which a crash would leave
        // behind. That is undone by dropping it.
        let link = FdLink::try_from(link)
            .map_err(|_| AttachError::refused(interface, "the kernel gives no link for it"))?;
        self.links.insert(ifindex, link);
        Ok(())
    }

    /// Detaches the program from the interface; does nothing where it is not attached.
    pub fn detach(&mut self, interface: &str) {
        // The link of an interface that is gone is gone as well, but for our descriptor of it.
        if let Ok(ifindex) = link::index(interface) {
            self.links.remove(&ifindex);
        }
    }

    /// As [`Steer::detach`], of the interface with this index, whether it is there or gone.
    pub fn detach_index(&mut self, ifindex: u32) {
        self.links.remove(&ifindex);
    }

    /// Whether the program is attached to the interface with this index, as far as we did that.
    pub fn is_attached(&self, ifindex: u32) -> bool {
        self.links.contains_key(&ifindex)
    }

    /// The kernel's number of the program, if it tells.
    pub fn program_id(&self) -> Option<u32> {
        let program: &Xdp = self.ebpf.program(STEER_PROGRAM)?.try_into().ok()?;
        program.info().ok().map(|info| info.id())
    }

    /// Says whose UDP port this is: from now on its datagrams are looked at, or pass.
    pub fn set_port(&self, port: u16, device: Option<DeviceId>) {
        let entry = device.map_or(0, port_entry);
        self.listen_ports.words[usize::from(port)].store(entry, Ordering::Release);
    }

    /// The live-index map: a slot's entry is [`wg_common::map::index_entry`], or 0.
    pub fn live_indexes(&self) -> Arc<SharedWords> {
        Arc::clone(&self.live_indexes.words)
    }

    /// The live-index map, for a process that maps it.
    pub fn live_indexes_fd(&self) -> BorrowedFd<'_> {
        self.live_indexes.fd.as_fd()
    }

    /// The heartbeats, indexed by worker, in nanoseconds of boot time.
    pub fn heartbeats(&self) -> Arc<SharedWords> {
        Arc::clone(&self.heartbeats.words)
    }

    /// The map of heartbeats, for a process that maps it.
    pub fn heartbeats_fd(&self) -> BorrowedFd<'_> {
        self.heartbeats.fd.as_fd()
    }

    /// Adds an address of this host.
    ///
    /// # Errors
    /// [`BpfError::Full`] if there are too many: datagrams to this one go to the socket.
    pub fn add_address(&mut self, address: IpAddr) -> Result<(), BpfError> {
        self.local_addresses
            .insert(AddressKey::from(address), 1, 0)
            .map_err(|error| BpfError::map(LOCAL_ADDRESSES, error))
    }

    /// Removes an address of this host; one that is not there is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_address(&mut self, address: IpAddr) -> Result<(), BpfError> {
        absent_is_fine(self.local_addresses.remove(&AddressKey::from(address)))
            .map_err(|error| BpfError::map(LOCAL_ADDRESSES, error))
    }

    /// Says which XSK (`socket`, under the number `entry.xsk`) and which worker serve a queue.
    ///
    /// # Errors
    /// If the kernel refuses: `socket` is no XSK, or the numbers lie beyond the maps.
    pub fn set_queue(
        &mut self,
        queue: QueueKey,
        entry: QueueEntry,
        socket: BorrowedFd<'_>,
    ) -> Result<(), BpfError> {
        let before = self.entry(queue)?;
        // First the socket, so that no packet is sent to an entry without one.
        self.xsks
            .set(entry.xsk, socket.as_raw_fd(), 0)
            .map_err(|error| BpfError::map(XSKS, error))?;
        self.queues.insert(queue, entry, 0).map_err(|error| BpfError::map(QUEUES, error))?;
        match before {
            Some(before) if before.xsk != entry.xsk => self.unset_xsk(before.xsk),
            _ => Ok(()),
        }
    }

    /// Gives a queue's datagrams back to the kernel; a queue that is not served is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn unset_queue(&mut self, queue: QueueKey) -> Result<(), BpfError> {
        let Some(entry) = self.entry(queue)? else { return Ok(()) };
        absent_is_fine(self.queues.remove(&queue)).map_err(|error| BpfError::map(QUEUES, error))?;
        self.unset_xsk(entry.xsk)
    }

    fn entry(&self, queue: QueueKey) -> Result<Option<QueueEntry>, BpfError> {
        match self.queues.get(&queue, 0) {
            Ok(entry) => Ok(Some(entry)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(BpfError::map(QUEUES, error)),
        }
    }

    fn unset_xsk(&mut self, xsk: u32) -> Result<(), BpfError> {
        absent_is_fine(self.xsks.unset(xsk)).map_err(|error| BpfError::map(XSKS, error))
    }

    /// What the program counted since it was loaded, summed over all CPUs.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn counters(&self) -> Result<SteerCounters, BpfError> {
        let mut counters = SteerCounters::default();
        for (counter, sum) in (0..).zip(&mut counters.0) {
            let per_cpu = self
                .counters
                .get(&counter, 0)
                .map_err(|error| BpfError::map(STEER_COUNTERS, error))?;
            *sum = per_cpu.iter().sum();
        }
        Ok(counters)
    }

    /// The program's log lines, once, if it was loaded with [`SteerOptions::log`].
    pub fn log_reader(&mut self) -> Option<LogReader> {
        self.log_reader.take()
    }

    /// Runs the program on `packet`, as if it had come on queue 0 of the loopback device of the
    /// calling thread's network namespace. Nothing is delivered.
    ///
    /// # Errors
    /// If the kernel refuses the packet: it has less than an Ethernet header or more than a page.
    pub fn test_run(&self, packet: &[u8]) -> Result<XdpVerdict, BpfError> {
        self.run(packet, 1).map(|(verdict, _)| verdict)
    }

    /// The mean time of `repeat` runs of the program on `packet`, for benchmarks.
    ///
    /// # Errors
    /// As [`Steer::test_run`].
    pub fn time_run(&self, packet: &[u8], repeat: u32) -> Result<Duration, BpfError> {
        self.run(packet, repeat).map(|(_, mean)| mean)
    }

    fn run(&self, packet: &[u8], repeat: u32) -> Result<(XdpVerdict, Duration), BpfError> {
        let refused = |error| BpfError::program(STEER_PROGRAM, error);
        let program: &Xdp = self
            .ebpf
            .program(STEER_PROGRAM)
            .ok_or(BpfError::Missing(STEER_PROGRAM))?
            .try_into()
            .map_err(refused)?;
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.repeat = repeat;
        let result = program.test_run(options).map_err(refused)?;
        Ok((XdpVerdict::from_value(result.return_value), result.duration))
    }
}

/// What an XDP program tells the kernel to do with a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum XdpVerdict {
    /// The program failed; the packet is dropped.
    Aborted,
    /// Dropped.
    Drop,
    /// Goes on through the kernel's stack.
    Pass,
    /// Goes back out of the same interface.
    Tx,
    /// Goes where the program said, for us: to an XSK.
    Redirect,
}

impl XdpVerdict {
    fn from_value(value: u32) -> Self {
        match value {
            1 => Self::Drop,
            2 => Self::Pass,
            3 => Self::Tx,
            4 => Self::Redirect,
            _ => Self::Aborted,
        }
    }
}

/// What the steer program counted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SteerCounters([u64; STEER_COUNTER_COUNT]);

impl SteerCounters {
    /// Packets dropped for this reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Packets to which this happened.
    pub fn event(&self, event: SteerEvent) -> u64 {
        self.0[DropReason::COUNT + event as usize]
    }

    /// The counts in the kernel side's order, for [`SteerCounters::from_counts`] of another process.
    pub fn to_counts(&self) -> Vec<u64> {
        self.0.to_vec()
    }

    /// The counters with these counts; nothing if they are not as many.
    pub fn from_counts(counts: &[u64]) -> Option<Self> {
        counts.try_into().ok().map(Self)
    }

    /// All reasons with their counts.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|reason| (*reason, self.dropped(*reason)))
    }

    /// All events with their counts.
    pub fn events(&self) -> impl Iterator<Item = (SteerEvent, u64)> + '_ {
        SteerEvent::ALL.iter().map(|event| (*event, self.event(*event)))
    }
}

impl Default for SteerCounters {
    fn default() -> Self {
        Self([0; STEER_COUNTER_COUNT])
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, BpfError> {
    let program = ebpf.program_mut(STEER_PROGRAM).ok_or(BpfError::Missing(STEER_PROGRAM))?;
    program.try_into().map_err(|error| BpfError::program(STEER_PROGRAM, error))
}

/// A map's handle.
fn take<M: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<M, BpfError> {
    let map = ebpf.take_map(name).ok_or(BpfError::Missing(name))?;
    M::try_from(map).map_err(|error| BpfError::map(name, error))
}

/// A whole array, mapped into our memory, and its descriptor.
struct Words {
    words: Arc<SharedWords>,
    fd: OwnedFd,
}

fn words(ebpf: &mut Ebpf, name: &'static str) -> Result<Words, BpfError> {
    let failed = |error| BpfError::map(name, MapError::IoError(error));
    let array: Array<MapData, u64> = take(ebpf, name)?;
    let fd = array.map().fd().as_fd().try_clone_to_owned().map_err(failed)?;
    let words = SharedWords::map(&fd, array.len() as usize).map_err(failed)?;
    Ok(Words { words: Arc::new(words), fd })
}

fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        result => result,
    }
}
