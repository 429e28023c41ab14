//! The maps of [`wg_common::map`], and what the programs ask of them.
#![expect(
    unsafe_code,
    reason = "map values are shared with the user side and other CPUs; globals are found by name"
)]

use aya_ebpf::Global;
use aya_ebpf::bindings::xdp_action::XDP_PASS;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::cty::c_long;
use aya_ebpf::helpers::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray, ReusePortSockArray, XskMap};
use aya_ebpf::programs::SkReuseportContext;
use wg_common::headers::AddressBytes;
use wg_common::id::{PeerId, ReceiverIndex, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::map::{
    AddressKey, HEARTBEATS_LEN, INDEX_WORKERS_LEN, LISTEN_PORTS_LEN, LIVE_INDEXES_LEN,
    LOCAL_ADDRESSES_LEN, OWNERS_LEN, PEER_WORKERS_LEN, QUEUES_LEN, QueueEntry, QueueKey,
    SOCKETS_LEN, TRANSPORT_HEAD_LEN, peer_word, peer_worker,
};
use wg_common::outcome::{DropReason, STEER_COUNTER_COUNT, SteerEvent};

#[map]
static LISTEN_PORTS: Array<u64> = Array::with_max_entries(LISTEN_PORTS_LEN, BPF_F_MMAPABLE);

// Without preallocation an element that is removed is not reused while a program may still look
// at it.
#[map]
static LOCAL_ADDRESSES: HashMap<AddressKey, u32> =
    HashMap::with_max_entries(LOCAL_ADDRESSES_LEN, BPF_F_NO_PREALLOC);

#[map]
static LIVE_INDEXES: Array<u64> = Array::with_max_entries(LIVE_INDEXES_LEN, BPF_F_MMAPABLE);

#[map]
static QUEUES: HashMap<QueueKey, QueueEntry> =
    HashMap::with_max_entries(QUEUES_LEN, BPF_F_NO_PREALLOC);

#[map]
static XSKS: XskMap = XskMap::with_max_entries(QUEUES_LEN, 0);

#[map]
static HEARTBEATS: Array<u64> = Array::with_max_entries(HEARTBEATS_LEN, BPF_F_MMAPABLE);

#[map]
static STEER_COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(STEER_COUNTER_COUNT as u32, 0);

#[map]
static OWNERS_V4: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(OWNERS_LEN, 0);

#[map]
static OWNERS_V6: LpmTrie<[u8; 16], u32> = LpmTrie::with_max_entries(OWNERS_LEN, 0);

#[map]
static PEER_WORKERS: Array<u64> = Array::with_max_entries(PEER_WORKERS_LEN, BPF_F_MMAPABLE);

#[map]
static INDEX_WORKERS: Array<u64> = Array::with_max_entries(INDEX_WORKERS_LEN, BPF_F_MMAPABLE);

#[map]
static SOCKETS: ReusePortSockArray = ReusePortSockArray::with_max_entries(SOCKETS_LEN, 0);

/// The first of a device's slots; the loader puts it in.
#[unsafe(no_mangle)]
static FIRST_SLOT: Global<u32> = Global::new(0);

/// What takes receiver indexes apart; the loader puts the key and the layout in. They are constants to
/// the kernel's verifier.
#[unsafe(no_mangle)]
static INDEXES: Global<IndexPermutation> =
    Global::new(IndexPermutation::new([0; 4], IndexLayout::DEFAULT));

/// Whether a device of ours listens on this UDP port.
#[inline(always)]
pub fn is_listen_port(port: u16) -> bool {
    read(&LISTEN_PORTS, u32::from(port)).is_some_and(|entry| entry != 0)
}

/// Whether this is an address of this host.
#[inline(always)]
pub fn is_local(address: &AddressKey) -> bool {
    LOCAL_ADDRESSES.get_ptr(address).is_some()
}

/// Whether a handshake or keypair may have this index.
#[inline(always)]
pub fn may_live(index: ReceiverIndex) -> bool {
    wg_common::map::may_live(&INDEXES.load(), index, |slot| read(&LIVE_INDEXES, slot))
}

/// Who serves this queue.
#[inline(always)]
pub fn queue_entry(queue: &QueueKey) -> Option<QueueEntry> {
    let entry = QUEUES.get_ptr(queue)?;
    // SAFETY: the kernel keeps the element until this run of the program is over. The user side may
    // replace the whole entry, which makes a new element; it never writes into this one.
    Some(unsafe { *entry })
}

/// Nanoseconds since the worker last said that it moves; `None` if there is no such worker.
#[inline(always)]
pub fn heartbeat_age_ns(worker: u32) -> Option<u64> {
    let last = read(&HEARTBEATS, worker)?;
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    // A heartbeat written on another CPU may be a little ahead of us.
    Some(now.saturating_sub(last))
}

/// Who owns an address.
#[inline(always)]
pub fn owner(address: &AddressBytes) -> Option<PeerId> {
    let owner = match *address {
        AddressBytes::V4(address) => OWNERS_V4.get(Key::new(u32::BITS, address)),
        AddressBytes::V6(address) => OWNERS_V6.get(Key::new(u128::BITS, address)),
    };
    owner.copied().map(PeerId)
}

/// Whether somebody owns an address.
#[inline(always)]
pub fn owns(address: &AddressKey) -> bool {
    let [a, b, c, d] = address.0;
    if address.is_v4() {
        return OWNERS_V4.get(Key::new(u32::BITS, d.to_ne_bytes())).is_some();
    }
    let mut octets = [0; 16];
    octets[..4].copy_from_slice(&a.to_ne_bytes());
    octets[4..8].copy_from_slice(&b.to_ne_bytes());
    octets[8..12].copy_from_slice(&c.to_ne_bytes());
    octets[12..].copy_from_slice(&d.to_ne_bytes());
    OWNERS_V6.get(Key::new(u128::BITS, octets)).is_some()
}

/// The worker at which a peer is at home.
#[inline(always)]
pub fn home(peer: PeerId) -> Option<WorkerId> {
    peer_worker(read(&PEER_WORKERS, peer_word(peer))?, peer)
}

/// The worker for a datagram with these first bytes.
#[inline(always)]
pub fn datagram_worker(head: [u8; TRANSPORT_HEAD_LEN]) -> Option<WorkerId> {
    let first_slot = FIRST_SLOT.load();
    wg_common::map::datagram_worker(&INDEXES.load(), first_slot, head, |slot| {
        read(&INDEX_WORKERS, slot)
    })
}

/// Has the datagram come to this socket.
#[inline(always)]
pub fn select(ctx: &SkReuseportContext, socket: u32) -> Result<(), c_long> {
    SOCKETS.select_reuseport(ctx, socket)
}

/// Hands the packet to this XSK: the verdict for it, or, if there is none, the verdict to pass.
#[inline(always)]
pub fn redirect(xsk: u32) -> Result<u32, u32> {
    XSKS.redirect(xsk, u64::from(XDP_PASS))
}

/// Counts a dropped packet.
#[inline(always)]
pub fn count_drop(reason: DropReason) {
    count(reason as u32);
}

/// Counts what else became of a packet.
#[inline(always)]
pub fn count_event(event: SteerEvent) {
    count(DropReason::COUNT as u32 + event as u32);
}

#[inline(always)]
fn count(counter: u32) {
    if let Some(count) = STEER_COUNTERS.get_ptr_mut(counter) {
        // SAFETY: this CPU's own copy of the value; XDP programs do not interrupt each other on a
        // CPU, and the user side only reads it.
        unsafe { *count += 1 };
    }
}

/// A word of a mapped array.
#[inline(always)]
fn read(array: &Array<u64>, index: u32) -> Option<u64> {
    let word = array.get_ptr(index)?;
    // SAFETY: the array outlives the program and its words are aligned. The user side may write the
    // word meanwhile: volatile, so that it is read once, in one piece.
    Some(unsafe { word.read_volatile() })
}
