//! The program that chooses the socket for a datagram among those on a listen port, with its maps: at which
//! worker the keypair with an index is at home, and which socket is that worker's. Each device has a program
//! of its own.

use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::Ordering;

use aya::maps::{MapData, ReusePortSockArray};
use aya::programs::SkReuseport;
use aya::{Ebpf, EbpfLoader};
use wg_common::headers::IpVersion;
use wg_common::id::WorkerId;
use wg_common::index::IndexPermutation;
use wg_common::map::{
    FIRST_SLOT_GLOBAL, HEARTBEATS, INDEX_WORKERS, INDEX_WORKERS_LEN, INDEXES_GLOBAL, LISTEN_PORTS,
    LIVE_INDEXES, LOCAL_ADDRESSES, PEER_WORKERS, QUEUES, SOCKET_PROGRAM, SOCKETS, XSKS,
    socket_number,
};

use super::{BpfError, OBJECT, Words, absent_is_fine, take, words};

/// Maps that other programs use, and the least number of entries.
const NOT_OURS: [&str; 7] =
    [LISTEN_PORTS, LOCAL_ADDRESSES, LIVE_INDEXES, QUEUES, XSKS, HEARTBEATS, PEER_WORKERS];

/// The program that chooses a device's sockets, with its maps.
///
/// Dropping it leaves the program with the sockets that it was attached to.
pub struct SocketSteering {
    ebpf: Ebpf,
    sockets: ReusePortSockArray<MapData>,
    index_workers: Words,
}

impl SocketSteering {
    /// Loads the program for a device that lends the indexes of `slots`, and makes its maps. No keypair is at
    /// home anywhere yet.
    ///
    /// # Errors
    /// As those of [`Steer::load`](super::Steer::load).
    pub fn load(indexes: IndexPermutation, slots: Range<u32>) -> Result<Self, BpfError> {
        let count = (slots.len() as u32).clamp(1, INDEX_WORKERS_LEN);
        let mut loader = EbpfLoader::new();
        for map in NOT_OURS {
            loader.map_max_entries(map, 1);
        }
        let mut ebpf = loader
            .map_max_entries(INDEX_WORKERS, count)
            .override_global(INDEXES_GLOBAL, &indexes, true)
            .override_global(FIRST_SLOT_GLOBAL, &slots.start, true)
            .load(OBJECT)
            .map_err(BpfError::object)?;
        let program = ebpf.program_mut(SOCKET_PROGRAM).ok_or(BpfError::Missing(SOCKET_PROGRAM))?;
        let program: &mut SkReuseport =
            program.try_into().map_err(|error| BpfError::program(SOCKET_PROGRAM, error))?;
        program.load().map_err(|error| BpfError::program(SOCKET_PROGRAM, error))?;
        let steering = Self {
            sockets: take(&mut ebpf, SOCKETS)?,
            index_workers: words(&mut ebpf, INDEX_WORKERS)?,
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

    /// Has the program choose among these sockets from now on, which share a port, and no more among those
    /// before: socket *w* is worker *w*'s. There may be none of a version.
    ///
    /// # Errors
    /// If the kernel refuses. It chooses by itself, at least of one version, then.
    pub fn steer(&mut self, v4: &[BorrowedFd<'_>], v6: &[BorrowedFd<'_>]) -> Result<(), BpfError> {
        for (version, sockets) in [(IpVersion::V4, v4), (IpVersion::V6, v6)] {
            let numbers = (0..).map_while(|worker| socket_number(version, WorkerId(worker)));
            for (at, number) in numbers.enumerate() {
                // A socket that stays is taken out as well: none may stand in the array twice.
                absent_is_fine(self.sockets.clear_index(&number))
                    .map_err(|error| BpfError::map(SOCKETS, error))?;
                let Some(socket) = sockets.get(at) else { continue };
                let set = self.sockets.set(number, socket, 0);
                set.map_err(|error| BpfError::map(SOCKETS, error))?;
            }
            if let Some(socket) = sockets.first() {
                let attached = self.program()?.attach(socket);
                attached.map_err(|error| BpfError::program(SOCKET_PROGRAM, error))?;
            }
        }
        Ok(())
    }

    fn program(&self) -> Result<&SkReuseport, BpfError> {
        let program = self.ebpf.program(SOCKET_PROGRAM).ok_or(BpfError::Missing(SOCKET_PROGRAM))?;
        program.try_into().map_err(|error| BpfError::program(SOCKET_PROGRAM, error))
    }

    /// The map of where keypairs are at home, a word for each slot of the device, for a process that maps it.
    pub fn index_workers_fd(&self) -> BorrowedFd<'_> {
        self.index_workers.fd.as_fd()
    }

    /// Forgets where keypairs are at home: the process that had them is gone.
    pub fn forget_keypairs(&self) {
        for word in self.index_workers.words.iter() {
            // Most were never touched; writing them would make pages of them all.
            if word.load(Ordering::Relaxed) != 0 {
                word.store(0, Ordering::Relaxed);
            }
        }
    }
}
