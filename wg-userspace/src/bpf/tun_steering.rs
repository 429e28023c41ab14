//! The program that chooses the queue of a TUN device for a packet, with its maps: who owns which prefix,
//! and where owners are at home. Each device has a program of its own.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, BorrowedFd};

use aya::maps::lpm_trie::Key;
use aya::maps::{Array, IterableMap as _, LpmTrie, MapData};
use aya::programs::{SocketFilter, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use wg_common::id::PeerId;
use wg_common::map::{
    HEARTBEATS, INDEX_WORKERS, LISTEN_PORTS, LIVE_INDEXES, LOCAL_ADDRESSES, OWNERS_V4, OWNERS_V6,
    PEER_WORKERS, QUEUE_PROGRAM, QUEUES, XSKS,
};

use super::{BpfError, OBJECT, absent_is_fine, take};

/// Maps that other programs use, and the least number of entries.
const NOT_OURS: [&str; 7] =
    [LISTEN_PORTS, LOCAL_ADDRESSES, LIVE_INDEXES, INDEX_WORKERS, QUEUES, XSKS, HEARTBEATS];

/// The program that chooses a TUN device's queues, with its maps. Once attached (with
/// `TunQueue::set_steering`), the kernel keeps both for as long as the
/// device has them.
pub struct TunSteering {
    ebpf: Ebpf,
    owners_v4: LpmTrie<MapData, [u8; 4], u32>,
    owners_v6: LpmTrie<MapData, [u8; 16], u32>,
    peer_workers: Array<MapData, u64>,
}

impl TunSteering {
    /// Loads the program and makes its maps. Nobody owns anything yet, or is at home anywhere.
    ///
    /// # Errors
    /// As those of [`Steer::load`](super::Steer::load).
    pub fn load() -> Result<Self, BpfError> {
        let mut loader = EbpfLoader::new();
        for map in NOT_OURS {
            loader.map_max_entries(map, 1);
        }
        let mut ebpf = loader.load(OBJECT).map_err(BpfError::object)?;
        let program = ebpf.program_mut(QUEUE_PROGRAM).ok_or(BpfError::Missing(QUEUE_PROGRAM))?;
        let program: &mut SocketFilter =
            program.try_into().map_err(|error| BpfError::program(QUEUE_PROGRAM, error))?;
        program.load().map_err(|error| BpfError::program(QUEUE_PROGRAM, error))?;
        let steering = Self {
            owners_v4: take(&mut ebpf, OWNERS_V4)?,
            owners_v6: take(&mut ebpf, OWNERS_V6)?,
            peer_workers: take(&mut ebpf, PEER_WORKERS)?,
            ebpf,
        };
        Ok(steering.without_others_maps())
    }

    /// Devices are many, and each descriptor counts.
    fn without_others_maps(mut self) -> Self {
        let names: Vec<String> = self.ebpf.maps().map(|(name, _)| name.to_owned()).collect();
        for name in names {
            drop(self.ebpf.take_map(&name));
        }
        self
    }

    fn program(&self) -> Result<&SocketFilter, BpfError> {
        let program = self.ebpf.program(QUEUE_PROGRAM).ok_or(BpfError::Missing(QUEUE_PROGRAM))?;
        program.try_into().map_err(|error| BpfError::program(QUEUE_PROGRAM, error))
    }

    /// The program, to be attached.
    ///
    /// # Errors
    /// If it is not loaded.
    pub fn program_fd(&self) -> Result<BorrowedFd<'_>, BpfError> {
        let fd = self.program()?.fd().map_err(|error| BpfError::program(QUEUE_PROGRAM, error))?;
        Ok(fd.as_fd())
    }

    /// Says who owns this very prefix, or that nobody does; host bits are ignored.
    ///
    /// # Errors
    /// [`BpfError::Full`] if there are too many prefixes: packets to this one leave by any queue.
    ///
    /// # Panics
    /// If `len` is beyond the address's bits.
    pub fn set_owner(
        &mut self,
        addr: IpAddr,
        len: u8,
        owner: Option<PeerId>,
    ) -> Result<(), BpfError> {
        let (name, outcome) = match addr {
            IpAddr::V4(addr) => {
                assert!(u32::from(len) <= u32::BITS, "a prefix of IPv4");
                (OWNERS_V4, set(&mut self.owners_v4, &Key::new(len.into(), addr.octets()), owner))
            }
            IpAddr::V6(addr) => {
                assert!(u32::from(len) <= u128::BITS, "a prefix of IPv6");
                (OWNERS_V6, set(&mut self.owners_v6, &Key::new(len.into(), addr.octets()), owner))
            }
        };
        outcome.map_err(|error| BpfError::map(name, error))
    }

    /// The map of where peers are at home, [`PEER_WORKERS_LEN`](wg_common::map::PEER_WORKERS_LEN) words, for
    /// a process that maps it.
    pub fn peer_workers_fd(&self) -> BorrowedFd<'_> {
        self.peer_workers.map().fd().as_fd()
    }

    /// The trie of IPv4.
    #[cfg(test)]
    pub(super) fn owners_v4_fd(&self) -> BorrowedFd<'_> {
        self.owners_v4.map().fd().as_fd()
    }

    /// How many prefixes have owners.
    #[cfg(test)]
    pub(super) fn prefix_count(&self) -> usize {
        self.owners_v4.keys().count() + self.owners_v6.keys().count()
    }

    /// Runs the program on an IP packet: the queue, before the kernel takes it modulo their number.
    ///
    /// # Errors
    /// If the kernel refuses the packet, such as one of more than a page.
    pub fn test_run(&self, packet: &[u8]) -> Result<u32, BpfError> {
        let refused = |error| BpfError::program(QUEUE_PROGRAM, error);
        // The kernel takes an Ethernet header off a test's packet, and gives the program the rest.
        let mut frame = vec![0; ETHERNET_LEN];
        frame.extend_from_slice(packet);
        let mut options = TestRunOptions::new();
        options.data_in = Some(&frame);
        Ok(self.program()?.test_run(options).map_err(refused)?.return_value)
    }
}

const ETHERNET_LEN: usize = 14;

fn set<const N: usize>(
    owners: &mut LpmTrie<MapData, [u8; N], u32>,
    prefix: &Key<[u8; N]>,
    owner: Option<PeerId>,
) -> Result<(), aya::maps::MapError>
where
    [u8; N]: aya::Pod,
{
    match owner {
        Some(owner) => owners.insert(prefix, owner.0, 0),
        None => absent_is_fine(owners.remove(prefix)),
    }
}
