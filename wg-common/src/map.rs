//! The BPF maps: names, keys, values. This is the ABI between the kernel side and the user side.
//!
//! Arrays that the user side writes often are mapped into its memory; their values are `u64`, since
//! the kernel spaces the values of an array by multiples of eight bytes.

use crate::headers::{AddressBytes, IpVersion};
use crate::id::{DeviceId, PeerId, ReceiverIndex, WorkerId};
use crate::index::{IndexLayout, IndexPermutation};
use crate::protocol::TYPE_TRANSPORT;

/// Array, mapped, indexed by UDP port in host byte order: a [`port_entry`], or 0 if the port is not ours.
pub const LISTEN_PORTS: &str = "LISTEN_PORTS";
/// Entries of [`LISTEN_PORTS`].
pub const LISTEN_PORTS_LEN: u32 = 1 << 16;

/// Hash: [`AddressKey`] → 1 for each address of this host. Full: the address's datagrams pass.
pub const LOCAL_ADDRESSES: &str = "LOCAL_ADDRESSES";
/// Greatest number of entries of [`LOCAL_ADDRESSES`].
pub const LOCAL_ADDRESSES_LEN: u32 = 4096;

/// Array, mapped, indexed by slot of a receiver index of ours: an [`index_entry`], or 0 if nothing
/// lives there. [`may_live`] says what follows from it.
pub const LIVE_INDEXES: &str = "LIVE_INDEXES";
/// Entries of [`LIVE_INDEXES`], 8 MiB of them, unless the loader chooses fewer. One for each slot of
/// the usual layout: an index that a stranger guesses names any slot, and those beyond would pass.
pub const LIVE_INDEXES_LEN: u32 = IndexLayout::DEFAULT.slot_count();

/// Hash: [`QueueKey`] → [`QueueEntry`] for each NIC queue with an XSK.
pub const QUEUES: &str = "QUEUES";
/// XSK map, indexed by [`QueueEntry::xsk`].
pub const XSKS: &str = "XSKS";
/// Greatest number of queues, and of XSKs.
pub const QUEUES_LEN: u32 = 512;

/// Array, mapped, indexed by worker: boot time in nanoseconds at which the worker last said it moves.
pub const HEARTBEATS: &str = "HEARTBEATS";
/// Entries of [`HEARTBEATS`].
pub const HEARTBEATS_LEN: u32 = 256;
/// Age of a heartbeat from which a worker counts as stuck and its queues' datagrams pass.
pub const HEARTBEAT_STALE_NS: u64 = 250_000_000;

/// Per-CPU array of `u64`: drop reasons, then steer events (see [`crate::outcome`]).
pub const STEER_COUNTERS: &str = "STEER_COUNTERS";

/// LPM trie: a prefix of IPv4 → the number of the peer that owns it, `u32`. Each TUN device has its own.
pub const OWNERS_V4: &str = "OWNERS_V4";
/// As [`OWNERS_V4`], of IPv6.
pub const OWNERS_V6: &str = "OWNERS_V6";
/// Most prefixes in each of [`OWNERS_V4`] and [`OWNERS_V6`]. Full: to the program nobody owns the others.
pub const OWNERS_LEN: u32 = 1 << 20;

/// Array, mapped: the workers at which peers are at home, [`PEERS_PER_WORD`] of them in a word (see
/// [`peer_worker`]). Each TUN device has its own.
pub const PEER_WORKERS: &str = "PEER_WORKERS";
/// Entries of [`PEER_WORKERS`], 2 MiB of them: twice the peers of a device, which is how many slots they have.
pub const PEER_WORKERS_LEN: u32 = (1 << 21) / PEERS_PER_WORD;
/// Peers in an entry of [`PEER_WORKERS`].
pub const PEERS_PER_WORD: u32 = 8;
/// Greatest number of a worker that an entry of [`PEER_WORKERS`] can hold.
pub const PEER_WORKER_MAX: WorkerId = WorkerId(254);

/// Array, mapped, indexed by slot of a receiver index of ours, less [`FIRST_SLOT_GLOBAL`]: an
/// [`index_worker_entry`], or 0 if no keypair has such an index. Each device has its own, of its own slots.
pub const INDEX_WORKERS: &str = "INDEX_WORKERS";
/// Most entries of [`INDEX_WORKERS`], 8 MiB of them; devices of one process share them out.
pub const INDEX_WORKERS_LEN: u32 = IndexLayout::DEFAULT.slot_count();

/// Array of the sockets on a device's listen port, indexed by [`socket_number`].
pub const SOCKETS: &str = "SOCKETS";
/// Sockets of one IP version in [`SOCKETS`].
pub const SOCKETS_PER_VERSION: u32 = 64;
/// Entries of [`SOCKETS`].
pub const SOCKETS_LEN: u32 = 2 * SOCKETS_PER_VERSION;

/// Name of the program that chooses the socket for a datagram.
pub const SOCKET_PROGRAM: &str = "tidegate_socket";
/// Name of the global with the first of a device's slots (`u32`).
pub const FIRST_SLOT_GLOBAL: &str = "FIRST_SLOT";

/// Name of the program that chooses the TUN queue by which a packet leaves.
pub const QUEUE_PROGRAM: &str = "tidegate_queue";
/// Name of the steer program in the object.
pub const STEER_PROGRAM: &str = "tidegate_steer";
/// Name of the global that switches the steer program's log lines on (`u8`, 0 or 1).
pub const LOG_GLOBAL: &str = "LOG";
/// Name of the global that takes receiver indexes apart (an [`IndexPermutation`]).
pub const INDEXES_GLOBAL: &str = "INDEXES";

/// The entry of [`LISTEN_PORTS`] for a port of `device`; never 0.
pub const fn port_entry(device: DeviceId) -> u64 {
    device.0 as u64 + 1
}

/// The entry of [`LIVE_INDEXES`] for a live `index`; never 0.
pub const fn index_entry(index: ReceiverIndex) -> u64 {
    1 << 32 | index.value() as u64
}

/// The entry of [`PEER_WORKERS`] in which a peer's worker stands.
pub const fn peer_word(peer: PeerId) -> u32 {
    peer.0 / PEERS_PER_WORD
}

/// The worker at which `peer` is at home, if its entry of [`PEER_WORKERS`] says so.
#[inline(always)]
pub const fn peer_worker(entry: u64, peer: PeerId) -> Option<WorkerId> {
    match (entry >> peer_shift(peer)) as u8 {
        0 => None,
        worker => Some(WorkerId(worker as u16 - 1)),
    }
}

/// The entry of [`PEER_WORKERS`] that says of `peer` that its home is there, and of others what it said. A
/// worker beyond [`PEER_WORKER_MAX`] is as good as none.
#[must_use]
pub const fn with_peer_worker(entry: u64, peer: PeerId, worker: Option<WorkerId>) -> u64 {
    let byte = match worker {
        Some(worker) if worker.0 <= PEER_WORKER_MAX.0 => worker.0 as u64 + 1,
        _ => 0,
    };
    entry & !(0xff << peer_shift(peer)) | byte << peer_shift(peer)
}

const fn peer_shift(peer: PeerId) -> u32 {
    peer.0 % PEERS_PER_WORD * u8::BITS
}

/// The entry of [`INDEX_WORKERS`] for a keypair's local index, by the worker at which it is at home; never 0.
pub const fn index_worker_entry(index: ReceiverIndex, worker: WorkerId) -> u64 {
    (worker.0 as u64 + 1) << 32 | index.value() as u64
}

/// The worker at which the keypair with this index is at home, if its slot's entry of [`INDEX_WORKERS`] is
/// about that very index.
#[inline(always)]
pub const fn index_worker(entry: u64, index: ReceiverIndex) -> Option<WorkerId> {
    let worker = entry >> 32;
    if worker == 0 || worker > 1 << 16 || entry as u32 != index.value() {
        return None;
    }
    Some(WorkerId((worker - 1) as u16))
}

/// The number in [`SOCKETS`] of a worker's socket; `None` if there is no room for so many workers.
#[inline(always)]
pub const fn socket_number(version: IpVersion, worker: WorkerId) -> Option<u32> {
    let worker = worker.0 as u32;
    if worker >= SOCKETS_PER_VERSION {
        return None;
    }
    match version {
        IpVersion::V4 => Some(worker),
        IpVersion::V6 => Some(SOCKETS_PER_VERSION + worker),
    }
}

/// First bytes of a transport data message: type, three reserved ones, receiver index.
pub const TRANSPORT_HEAD_LEN: usize = 8;

/// The worker for a datagram with these first bytes: if it is transport data under a receiver index of ours,
/// the one at which its keypair is at home. `entry` reads [`INDEX_WORKERS`], whose first entry is that of
/// slot `first_slot`.
///
/// `None` for all others, which may come to any worker. No packet is judged here: whatever the answer, it
/// is opened by its keypair, or dropped, wherever it comes.
#[inline(always)]
pub fn datagram_worker(
    indexes: &IndexPermutation,
    first_slot: u32,
    head: [u8; TRANSPORT_HEAD_LEN],
    entry: impl FnOnce(u32) -> Option<u64>,
) -> Option<WorkerId> {
    let [kind, 0, 0, 0, index @ ..] = head else { return None };
    if kind != TYPE_TRANSPORT {
        return None;
    }
    let index = ReceiverIndex::from_wire(index);
    let slot = indexes.slot_of(index)?.checked_sub(first_slot)?;
    index_worker(entry(slot)?, index)
}

/// The TUN queue for a packet to an address: that of the worker at which its owner is at home, which
/// `owner` and `worker` tell. Where there is no owner, or no home, all packets to an address, or to a peer,
/// have the same queue.
///
/// The kernel takes the 16 low bits, modulo the number of queues: no packet is lost for want of a queue.
#[inline(always)]
pub fn tun_queue(
    to: &AddressBytes,
    owner: impl FnOnce(&AddressBytes) -> Option<PeerId>,
    worker: impl FnOnce(PeerId) -> Option<WorkerId>,
) -> u32 {
    match owner(to) {
        Some(peer) => worker(peer).map_or(peer.0, |worker| worker.0 as u32),
        // Nobody will seal it. The last bytes tell most addresses apart.
        None => match *to {
            AddressBytes::V4([.., c, d]) => u16::from_be_bytes([c, d]) as u32,
            AddressBytes::V6([.., c, d]) => u16::from_be_bytes([c, d]) as u32,
        },
    }
}

/// Whether a handshake or keypair may have this index, where `entry` reads [`LIVE_INDEXES`]: its slot
/// says so, or lies beyond the array.
///
/// Another node's index lives nowhere here. (Without bits for nodes there are no other nodes.)
#[inline(always)]
pub fn may_live(
    indexes: &IndexPermutation,
    index: ReceiverIndex,
    entry: impl FnOnce(u32) -> Option<u64>,
) -> bool {
    match indexes.slot_of(index).map(entry) {
        Some(Some(entry)) => entry == index_entry(index),
        Some(None) => true,
        None => false,
    }
}

/// An address of this host: IPv6 in network byte order, IPv4 as `::ffff:a.b.c.d`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct AddressKey(pub [u32; 4]);

impl AddressKey {
    /// From an IPv4 address as its four bytes stand in the packet.
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self([0, 0, 0xffff_u32.to_be(), u32::from_ne_bytes(octets)])
    }

    /// From an IPv6 address as its sixteen bytes stand in the packet.
    pub const fn v6(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// Whether this is the key of an IPv4 address.
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0xffff_u32.to_be()
    }
}

impl From<core::net::IpAddr> for AddressKey {
    fn from(addr: core::net::IpAddr) -> Self {
        match addr {
            core::net::IpAddr::V4(a) => Self::v4(a.octets()),
            core::net::IpAddr::V6(a) => Self::v6(a.octets()),
        }
    }
}

/// A receive queue of a NIC.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct QueueKey {
    /// Interface index.
    pub ifindex: u32,
    /// Receive queue, from 0.
    pub queue: u32,
}

/// Who serves a receive queue.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct QueueEntry {
    /// Index in [`XSKS`].
    pub xsk: u32,
    /// Index in [`HEARTBEATS`].
    pub worker: u32,
    /// Longest frame in bytes, link header included, that the XSK's chunks take. The kernel would drop
    /// longer ones there.
    pub frame_len_max: u32,
}

impl QueueEntry {
    /// Queue served by `worker` through entry `xsk` of [`XSKS`], for frames of up to `frame_len_max` bytes.
    pub const fn new(xsk: u32, worker: WorkerId, frame_len_max: u32) -> Self {
        Self { xsk, worker: worker.0 as u32, frame_len_max }
    }
}

const _: () = {
    assert!(size_of::<AddressKey>() == 16);
    assert!(size_of::<QueueKey>() == 8);
    assert!(size_of::<QueueEntry>() == 12);
    assert!(size_of::<IndexLayout>() == 8);
    assert!(size_of::<IndexPermutation>() == 28);
};

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "`Pod` says that a map value may be copied as bytes")]
mod pod {
    // SAFETY: `repr(C)` structs of `u32` fields only, without padding (sizes asserted above).
    unsafe impl aya::Pod for super::AddressKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::QueueKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::QueueEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::IndexPermutation {}
}

#[cfg(test)]
mod tests {
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn entries_are_never_empty(device in any::<u16>(), index in any::<[u8; 4]>()) {
            prop_assert_ne!(port_entry(DeviceId(device)), 0);
            prop_assert_ne!(index_entry(ReceiverIndex::from_wire(index)), 0);
        }

        #[test]
        fn entries_tell_indexes_apart(a in any::<[u8; 4]>(), b in any::<[u8; 4]>()) {
            let entry = |bytes| index_entry(ReceiverIndex::from_wire(bytes));
            prop_assert_eq!(entry(a) == entry(b), a == b);
        }

        #[test]
        fn a_word_holds_the_workers_of_eight_peers(
            first in 0u32..1 << 18, changes in proptest::collection::vec((0u32..8, proptest::option::of(0u16..300)), 0..40),
        ) {
            let peer = |i| PeerId(first * PEERS_PER_WORD + i);
            let mut workers = [None; 8];
            let mut word = 0;
            for (i, worker) in changes {
                let worker = worker.map(WorkerId);
                word = with_peer_worker(word, peer(i), worker);
                workers[i as usize] = worker.filter(|worker| *worker <= PEER_WORKER_MAX);
            }
            for i in 0..8 {
                prop_assert_eq!(peer_word(peer(i)), first);
                prop_assert_eq!(peer_worker(word, peer(i)), workers[i as usize]);
            }
        }

        #[test]
        fn a_datagram_goes_where_its_keypair_is_at_home(
            key in any::<[u32; 4]>(), node_bits in 0u32..=8, node in 0u32..256,
            index in any::<[u8; 4]>(), other in any::<[u8; 4]>(), worker in any::<u16>(),
            begin in any::<u32>(), kind in any::<[u8; 4]>(), is_transport in any::<bool>(),
        ) {
            let layout = IndexLayout::new(node_bits, 20).unwrap();
            let indexes = IndexPermutation::new(key, layout).at_node(node);
            let kind = if is_transport { [TYPE_TRANSPORT, 0, 0, 0] } else { kind };
            let head: [u8; 8] = core::array::from_fn(|at| if at < 4 { kind[at] } else { index[at - 4] });
            let of = |bytes| ReceiverIndex::from_wire(bytes);
            let first_slot = begin % layout.slot_count();
            let parts = indexes.parts_of(of(index));
            let is_ours = parts.node == indexes.node() && parts.slot >= first_slot;
            let chosen = |entry: Option<u64>| datagram_worker(&indexes, first_slot, head, |at| {
                assert_eq!(at + first_slot, parts.slot);
                entry
            });
            let is_known = kind == [TYPE_TRANSPORT, 0, 0, 0] && is_ours;
            let home = WorkerId(worker);
            prop_assert_eq!(chosen(Some(index_worker_entry(of(index), home))), is_known.then_some(home));
            prop_assert_eq!(chosen(None), None);
            prop_assert_eq!(chosen(Some(0)), None);
            let another = chosen(Some(index_worker_entry(of(other), home)));
            prop_assert_eq!(another, (is_known && other == index).then_some(home));
        }

        #[test]
        fn sockets_of_workers_and_versions_have_numbers_of_their_own(a in 0u16..64, b in 0u16..64) {
            let of = |version, worker| socket_number(version, WorkerId(worker)).unwrap();
            prop_assert_eq!(of(IpVersion::V4, a) == of(IpVersion::V4, b), a == b);
            prop_assert_eq!(of(IpVersion::V6, a) == of(IpVersion::V6, b), a == b);
            prop_assert_ne!(of(IpVersion::V4, a), of(IpVersion::V6, b));
            prop_assert!(of(IpVersion::V6, a) < SOCKETS_LEN);
            prop_assert_eq!(socket_number(IpVersion::V4, WorkerId(a + 64)), None);
        }

        #[test]
        fn an_index_lives_where_its_slot_holds_it(
            key in any::<[u32; 4]>(), node_bits in 0u32..=8, node in 0u32..256,
            bytes in any::<[u8; 4]>(), other in any::<[u8; 4]>(),
        ) {
            let layout = IndexLayout::new(node_bits, 20).unwrap();
            let indexes = IndexPermutation::new(key, layout).at_node(node);
            let index = ReceiverIndex::from_wire(bytes);
            let is_own = indexes.parts_of(index).node == indexes.node();
            let lives = |entry: Option<u64>| may_live(&indexes, index, |slot| {
                assert_eq!(Some(slot), indexes.slot_of(index));
                entry
            });
            prop_assert_eq!(lives(Some(index_entry(index))), is_own);
            prop_assert!(!lives(Some(0)));
            let entry = Some(index_entry(ReceiverIndex::from_wire(other)));
            prop_assert_eq!(lives(entry), is_own && other == bytes);
            prop_assert_eq!(lives(None), is_own);
        }

        #[test]
        fn an_ipv4_address_has_the_key_of_its_mapped_form(octets in any::<[u8; 4]>()) {
            let mapped = Ipv4Addr::from(octets).to_ipv6_mapped();
            prop_assert_eq!(AddressKey::v4(octets), AddressKey::v6(mapped.octets()));
            prop_assert!(AddressKey::from(IpAddr::from(octets)).is_v4());
        }

        #[test]
        fn a_key_holds_the_bytes_of_the_packet(octets in any::<[u8; 16]>()) {
            let key = AddressKey::from(IpAddr::from(octets));
            let bytes: Vec<u8> = key.0.iter().flat_map(|word| word.to_ne_bytes()).collect();
            prop_assert_eq!(&bytes[..], &octets[..]);
            prop_assert_eq!(key.is_v4(), Ipv6Addr::from(octets).to_ipv4_mapped().is_some());
        }
    }
}
