//! What workers and control share: published snapshots, tables, queues, signs of life.

use std::net::IpAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwap, ArcSwapOption};
use crossbeam_queue::ArrayQueue;
use hashbrown::HashSet;
use wg_common::headers::inner_destination;
use wg_common::id::{DeviceId, PeerId, ReceiverIndex, ShardId, WorkerId};
use wg_common::index::IndexPermutation;
use wg_common::map::{
    PEER_WORKERS_LEN, PEERS_PER_WORD, index_worker_entry, peer_word, with_peer_worker,
};
use wg_common::outcome::DropReason;
use wg_common::protocol::{DEFAULT_MTU, HANDSHAKE_QUEUE_LEN};
use wg_common::time::{Now, Reading};

use super::crew::Crew;
use super::handoff::Work;
use super::{BATCH_LEN, WorkQueue};
use crate::counters::Counters;
use crate::routing::RoutingTable;
use crate::session::{Break, Continuity, HotPeer, Keypair, Noted, SlotTable};
use crate::sys::SharedWords;
use crate::tun::TunQueue;
use crate::udp::UdpSockets;

/// Most peers of one device, as in the kernel.
pub const PEER_COUNT_MAX: usize = 1 << 20;
/// A request may need slots for new peers beside those that it frees.
const PEER_SLOT_COUNT: usize = 2 * PEER_COUNT_MAX;
const _: () = assert!(PEER_SLOT_COUNT == PEER_WORKERS_LEN as usize * PEERS_PER_WORD as usize);
/// Needs of our own peers that wait for the handshake pool.
const NEED_QUEUE_LEN: usize = 1024;
/// Parcels that one worker may have under way to another: eight batches, more than a millisecond at 300,000 a
/// second. Half of that loses several in a thousand where the host takes a core away now and then; twice as many
/// lose hardly fewer, and wait longer (`benches/README.md`).
pub const PARCEL_RING_LEN: usize = 8 * BATCH_LEN;
/// Largest datagram: what UDP can carry.
pub const DATAGRAM_LEN_MAX: usize = 65_535;

/// What the workers of one device and its control plane share.
pub struct Shared {
    /// The device.
    pub device: DeviceId,
    /// Makes local indexes and takes them apart.
    pub indexes: IndexPermutation,
    /// The slots whose indexes this device lends. Other devices of the process have others.
    pub slots: Range<u32>,
    /// The threads that its workers run on, with those of the process's other devices.
    pub crew: Arc<Crew>,
    /// Keypairs by the slot of their local index. Control writes.
    keypairs: SlotTable<Keypair>,
    /// Peers by id. Control writes.
    pub peers: SlotTable<HotPeer>,
    /// Who owns which address. Control publishes.
    pub routing: ArcSwap<RoutingTable>,
    /// The sockets on the listen port. Control publishes.
    pub sockets: ArcSwap<SocketGroup>,
    /// Queue `w` of the TUN device is worker `w`'s; another reads it while `w` is stuck.
    pub tun_queues: Vec<TunQueue>,
    /// Where peers are at home, for the program that chooses TUN queues. Nothing if there is none.
    peer_workers: OnceLock<SharedWords>,
    /// Where keypairs are at home, for the program that chooses sockets. Nothing if there is none.
    index_workers: OnceLock<SharedWords>,
    /// MTU of the TUN device. Control writes.
    pub mtu: AtomicUsize,
    /// Whether the segment size that a SYN offers is lowered to what the tunnel carries. Control writes.
    pub mss_clamp: AtomicBool,
    /// Whether outer headers get the DSCP of the packets in them. Control writes.
    pub copy_dscp: AtomicBool,
    /// Whether the TUN device is up: nothing is sent or answered while it is down. Control writes.
    /// New, it is set: what has no TUN device has none that could be down.
    pub up: AtomicBool,
    /// Addresses of this host, to know our own datagrams by. Control publishes.
    pub host_addresses: ArcSwap<HashSet<IpAddr>>,
    /// One for each worker.
    pub workers: Vec<WorkerShared>,
    /// Bytes of the longest datagram that goes from worker to worker.
    pub(super) parcel_len: usize,
    /// The device's workers stop at their next turn once this is set.
    pub stopping: AtomicBool,
    /// The TUN device is gone.
    pub tun_gone: AtomicBool,
    /// Boot time in nanoseconds: keypairs whose handshake began before neither seal nor open. Only
    /// grows.
    keys_not_before: AtomicU64,
    /// The latest break of time that was seen, and in boot time in nanoseconds when.
    latest_break: ArcSwapOption<Break>,
    break_seen: AtomicU64,
    /// Boot time in nanoseconds until which there are to be no keypairs; 0 if there may be.
    quiesced_until: AtomicU64,
    /// Packets to addresses that no peer owns, with the last of those.
    pub no_peer: Noted<IpAddr>,
    /// Peers of whom control is to find out how large packets to them may be.
    unknown_ways: ArrayQueue<PeerId>,
    work: Arc<WorkQueue>,
}

/// What one worker shares with everyone else.
pub struct WorkerShared {
    /// What it counted.
    pub counters: Counters,
}

/// The sockets on one listen port: one pair for each worker.
pub struct SocketGroup {
    /// The listen port, in host byte order.
    pub port: u16,
    /// Sockets of worker `w`.
    pub of_worker: Vec<UdpSockets>,
}

impl Shared {
    /// The shared state of the only device of its process, with `worker_count` workers, and the work that
    /// they leave to the handshake pool. Workers that run need as many TUN queues and pairs of sockets.
    ///
    /// # Errors
    /// If the kernel gives no event descriptor.
    pub fn new(
        device: DeviceId,
        worker_count: usize,
        tun_queues: Vec<TunQueue>,
        sockets: SocketGroup,
        kernel_heartbeats: Option<Arc<SharedWords>>,
        indexes: IndexPermutation,
    ) -> std::io::Result<(Arc<Self>, Arc<WorkQueue>)> {
        let parcel_len = DATAGRAM_LEN_MAX;
        let crew = Crew::new(worker_count, kernel_heartbeats)?;
        let slots = indexes.layout().share(0, 1);
        Self::in_crew(crew, (device, slots), tun_queues, sockets, indexes, parcel_len)
    }

    /// As [`Shared::new`], for a device that has its workers on the threads of `crew` and lends the indexes
    /// of these slots. No datagram that goes from worker to worker is longer than `parcel_len`.
    ///
    /// # Errors
    /// If the kernel gives no event descriptor.
    pub fn in_crew(
        crew: Arc<Crew>,
        (device, slots): (DeviceId, Range<u32>),
        tun_queues: Vec<TunQueue>,
        sockets: SocketGroup,
        indexes: IndexPermutation,
        parcel_len: usize,
    ) -> std::io::Result<(Arc<Self>, Arc<WorkQueue>)> {
        let worker_count = crew.thread_count();
        let work = Arc::new(WorkQueue::new(HANDSHAKE_QUEUE_LEN, NEED_QUEUE_LEN)?);
        let workers =
            (0..worker_count).map(|_| WorkerShared { counters: Counters::default() }).collect();
        let shared = Self {
            device,
            indexes,
            slots,
            crew,
            keypairs: SlotTable::with_capacity(indexes.layout().slot_count() as usize),
            peers: SlotTable::with_capacity(PEER_SLOT_COUNT),
            routing: ArcSwap::default(),
            sockets: ArcSwap::from_pointee(sockets),
            tun_queues,
            peer_workers: OnceLock::new(),
            index_workers: OnceLock::new(),
            mtu: AtomicUsize::new(DEFAULT_MTU),
            mss_clamp: AtomicBool::new(true),
            copy_dscp: AtomicBool::new(false),
            up: AtomicBool::new(true),
            host_addresses: ArcSwap::default(),
            workers,
            parcel_len,
            stopping: AtomicBool::new(false),
            tun_gone: AtomicBool::new(false),
            keys_not_before: AtomicU64::new(0),
            latest_break: ArcSwapOption::empty(),
            break_seen: AtomicU64::new(0),
            quiesced_until: AtomicU64::new(0),
            no_peer: Noted::default(),
            unknown_ways: ArrayQueue::new(NEED_QUEUE_LEN),
            work: Arc::clone(&work),
        };
        Ok((Arc::new(shared), work))
    }

    /// The keypair with this local index.
    pub fn keypair(&self, index: ReceiverIndex) -> Option<Arc<Keypair>> {
        let slot = self.indexes.slot_of(index)?;
        // The slot's keypair may be another: of an earlier or a later epoch.
        self.keypairs.get(slot as usize).filter(|keypair| keypair.local_index() == index)
    }

    /// Lets workers find the keypair by its local index; they do when this returns.
    ///
    /// # Panics
    /// If the index is not ours.
    pub fn publish(&self, keypair: &Arc<Keypair>) {
        let index = keypair.local_index();
        let slot = self.indexes.slot_of(index).expect("the index is ours");
        if let Some(word) = self.index_home(slot) {
            let entry = index_worker_entry(index, self.worker_of(keypair.home()));
            word.store(entry, Ordering::Relaxed);
        }
        self.keypairs.set(slot as usize, Arc::clone(keypair));
    }

    /// Lets workers find the keypair no longer.
    pub fn retire(&self, keypair: &Arc<Keypair>) {
        if let Some(slot) = self.indexes.slot_of(keypair.local_index()) {
            if let Some(word) = self.index_home(slot) {
                word.store(0, Ordering::Relaxed);
            }
            self.keypairs.clear(slot as usize);
        }
    }

    /// Whether the TUN device is up.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Why nothing is sent, taken or answered at `now`, if it is so: the interface is down, or the
    /// device quiesced.
    pub fn pause(&self, now: Now) -> Option<DropReason> {
        if !self.is_up() {
            Some(DropReason::InterfaceDown)
        } else if self.is_quiesced(now) {
            Some(DropReason::Quiesced)
        } else {
            None
        }
    }

    /// The worker at which `shard` is at home.
    pub fn worker_of(&self, shard: ShardId) -> WorkerId {
        WorkerId((shard.index() % self.workers.len()) as u16)
    }

    /// A shard for a new keypair with `peer`: one of `preferred`'s if that worker moves, else one of
    /// another that does.
    ///
    /// Shards of one worker are spread over its peers, so that moving a shard moves a part of them.
    pub fn home_for(&self, peer: PeerId, preferred: WorkerId, now: Now) -> ShardId {
        let count = self.workers.len();
        let worker = (0..count)
            .map(|i| (usize::from(preferred.0) + i) % count)
            .find(|&w| self.moves(WorkerId(w as u16), now))
            .unwrap_or(usize::from(preferred.0) % count);
        let shards = ShardId::COUNT.saturating_sub(worker).div_ceil(count).max(1);
        ShardId::new(worker + count * (peer.0 as usize % shards))
    }

    /// From now on writes there where peers are at home ([`wg_common::map::PEER_WORKERS`]). To be called once,
    /// before there are any.
    pub fn write_homes_to(&self, words: SharedWords) {
        let is_first = self.peer_workers.set(words).is_ok();
        debug_assert!(is_first, "a device has one TUN device");
    }

    /// From now on writes there where keypairs are at home ([`wg_common::map::INDEX_WORKERS`]), a word for each of
    /// our slots. To be called once, before there are any.
    pub fn write_index_homes_to(&self, words: SharedWords) {
        let is_first = self.index_workers.set(words).is_ok();
        debug_assert!(is_first, "a device has one table of homes");
    }

    fn index_home(&self, slot: u32) -> Option<&AtomicU64> {
        let at = slot.checked_sub(self.slots.start)?;
        self.index_workers.get()?.get(at as usize)
    }

    /// Has packets that leave for `peer` come to the worker at which its present keypair is at home. To be
    /// called whenever that keypair is a new one.
    pub fn follow_home(&self, peer: &HotPeer) {
        let Some(words) = self.peer_workers.get() else { return };
        let home = || peer.keypairs.load().current.as_ref().map(|keypair| keypair.home());
        let mut seen = None;
        // Another thread may install a newer one meanwhile: who stores last has looked last.
        while let Some(home) = home().filter(|&home| seen != Some(home)) {
            seen = Some(home);
            store_home(words, peer.id, Some(self.worker_of(home)));
        }
    }

    /// Has packets that leave for the peer in this slot, which is a new one, come to any worker.
    pub fn forget_home(&self, peer: PeerId) {
        if let Some(words) = self.peer_workers.get() {
            store_home(words, peer, None);
        }
    }

    /// Says that `worker` moves. One of the same thread says it for the workers of all devices.
    pub fn beat(&self, worker: WorkerId, now: Now) {
        self.crew.beat(worker, now);
    }

    /// Whether `worker` moved lately.
    pub fn moves(&self, worker: WorkerId, now: Now) -> bool {
        self.crew.moves(worker, now)
    }

    /// Leaves work to the handshake pool; `false` if it is not taken.
    pub fn hand_off(&self, work: Work) -> bool {
        self.work.push(work)
    }

    /// Asks for a handshake with `peer`, unless one is asked for already.
    pub fn want_handshake(&self, peer: &HotPeer) {
        if peer.handshake_wanted.swap(true, Ordering::Relaxed) {
            return;
        }
        if !self.hand_off(Work::Initiate(self.device, peer.id)) {
            // The next packet asks again.
            peer.handshake_wanted.store(false, Ordering::Relaxed);
        }
    }

    /// The present moment, of a reading that no earlier turn of this thread has made. If it shows that
    /// the host slept or is not the one that it was, no keypair from before seals or opens any more
    /// when this returns.
    pub fn now_of(&self, continuity: &mut Continuity, reading: &Reading) -> Now {
        let last = continuity.observed();
        if let Some(broken) = continuity.observe(reading)
            && !self.has_seen(&broken, last)
        {
            self.end_keypairs(reading.after);
            self.break_seen.fetch_max(reading.after.boot_ns(), Ordering::SeqCst);
            self.latest_break.store(Some(Arc::new(broken)));
            self.wake_all();
        }
        reading.after
    }

    /// Whether another thread has ended keypairs for this break, which a thread sees that looked `last`
    /// before it. Every thread sees it, and the others may be late: there may be new keypairs by then.
    fn has_seen(&self, broken: &Break, last: Option<Now>) -> bool {
        let latest = self.latest_break.load();
        // A clock that leaps back to where a leap had brought it before has leapt anew.
        latest.as_ref().is_some_and(|latest| latest.is_same(broken))
            && last.is_none_or(|last| self.break_seen.load(Ordering::SeqCst) >= last.boot_ns())
    }

    /// The latest break of time that a thread has seen, if there was one.
    pub fn latest_break(&self) -> Option<Arc<Break>> {
        self.latest_break.load_full()
    }

    /// From the next turn of each worker on, no keypair whose handshake began before `now` seals or
    /// opens.
    pub fn end_keypairs(&self, now: Now) {
        self.keys_not_before.fetch_max(now.boot_ns(), Ordering::SeqCst);
    }

    /// The moment before which no handshake may have begun whose keypair is used.
    pub fn keys_not_before(&self) -> Now {
        Now::from_boot_ns(self.keys_not_before.load(Ordering::SeqCst))
    }

    /// Whether a keypair may be used, as far as it is not too old.
    pub fn may_use(&self, keypair: &Keypair) -> bool {
        keypair.begun() >= self.keys_not_before()
    }

    /// Asks control how large packets to `peer` may be.
    pub fn want_inner_mtu(&self, peer: &HotPeer) {
        if peer.inner_mtu.becomes_due() && self.unknown_ways.push(peer.id).is_err() {
            // The next packet asks again.
            peer.inner_mtu.begin_look();
        }
    }

    /// Whether control is asked.
    pub fn has_unknown_ways(&self) -> bool {
        !self.unknown_ways.is_empty()
    }

    /// One of the peers that control is asked for, whose turn it is.
    pub fn take_unknown_way(&self) -> Option<Arc<HotPeer>> {
        // Slots of peers that were removed meanwhile are empty, or another's that may be looked at as well.
        std::iter::from_fn(|| self.unknown_ways.pop()).find_map(|id| self.peers.get(id.0 as usize))
    }

    /// What seals for `peer` now, if anything does.
    pub fn sealing_keypair(&self, peer: &HotPeer, now: Now) -> Option<Arc<Keypair>> {
        let keypairs = peer.keypairs.load();
        keypairs.seals_with(now).filter(|keypair| self.may_use(keypair)).cloned()
    }

    /// Lets there be no keypairs until then, or for longer if that was said before.
    pub fn quiesce_until(&self, until: Now) {
        self.quiesced_until.fetch_max(until.boot_ns(), Ordering::SeqCst);
    }

    /// Lets there be no keypairs until then; the beginning of time lets there be some again.
    pub fn set_quiesced_until(&self, until: Now) {
        self.quiesced_until.store(until.boot_ns(), Ordering::SeqCst);
    }

    /// Until when there are to be no keypairs; the beginning of time if there may be.
    pub fn quiesced_until(&self) -> Now {
        Now::from_boot_ns(self.quiesced_until.load(Ordering::SeqCst))
    }

    /// Whether there are to be no keypairs.
    pub fn is_quiesced(&self, now: Now) -> bool {
        now < self.quiesced_until()
    }

    /// Takes note of a packet of this host that is for no peer. What goes to a group or stays on a link is
    /// none: systems send that to each interface of their own accord.
    #[cold]
    pub fn note_no_peer(&self, packet: &[u8], now: Now) {
        let Ok(destination) = inner_destination(packet) else { return };
        let is_of_link = match destination {
            IpAddr::V4(to) => to.is_multicast() || to.is_broadcast() || to.is_link_local(),
            IpAddr::V6(to) => to.is_multicast() || to.is_unicast_link_local(),
        };
        if !is_of_link {
            self.no_peer.note(destination, now);
        }
    }

    /// Wakes every worker: something it must look at has changed.
    pub fn wake_all(&self) {
        self.crew.wake_all();
    }

    /// Whether the device's workers are to let go of it: it is being stopped, or its TUN device is gone.
    pub fn is_over(&self) -> bool {
        self.stopping.load(Ordering::Relaxed) || self.tun_gone.load(Ordering::Relaxed)
    }

    /// Says that the TUN device is gone.
    pub fn report_tun_gone(&self) {
        self.tun_gone.store(true, Ordering::Relaxed);
    }
}

/// Eight peers share a word, and several threads write.
fn store_home(words: &SharedWords, peer: PeerId, worker: Option<WorkerId>) {
    let Some(word) = words.get(peer_word(peer) as usize) else { return };
    let change = |before| {
        let after = with_peer_worker(before, peer, worker);
        (after != before).then_some(after)
    };
    // An error says that it is so already.
    let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use wg_common::index::IndexLayout;
    use wg_common::map::peer_worker;

    use super::*;
    use crate::key::PublicKey;
    use crate::noise::{Established, Role, TransportKeys};
    use crate::session::Keypairs;

    const WORKERS: usize = 3;

    fn shared() -> Arc<Shared> {
        let sockets = SocketGroup { port: 0, of_worker: Vec::new() };
        let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
        let shared = Shared::new(DeviceId(0), WORKERS, Vec::new(), sockets, None, indexes);
        let shared = shared.unwrap().0;
        shared.write_homes_to(SharedWords::private(PEER_WORKERS_LEN as usize).unwrap());
        shared
    }

    fn peer(id: u32) -> HotPeer {
        HotPeer::new(PeerId(id), DeviceId(0), PublicKey::from_bytes([0; 32]))
    }

    fn written(shared: &Shared, peer: &HotPeer) -> Option<WorkerId> {
        let word = &shared.peer_workers.get().unwrap()[peer_word(peer.id) as usize];
        peer_worker(word.load(Ordering::Relaxed), peer.id)
    }

    fn keypair_at(home: usize) -> Arc<Keypair> {
        let index = ReceiverIndex::from_wire([0; 4]);
        let keys = TransportKeys { send: [0; 32], receive: [0; 32] };
        let role = Role::Initiator;
        let established = Established { keys, local_index: index, remote_index: index, role };
        let made = Now::from_boot_ns(1);
        Arc::new(Keypair::new(&established, Weak::new(), ShardId::new(home), made))
    }

    fn install(peer: &HotPeer, home: usize) {
        let new = keypair_at(home);
        peer.keypairs.update(|keypairs| keypairs.installed_by_initiator(Arc::clone(&new)));
    }

    #[test]
    fn the_home_of_the_present_keypair_is_written() {
        let shared = shared();
        let (a, b) = (peer(8), peer(9));
        shared.follow_home(&a);
        assert_eq!(written(&shared, &a), None, "there is no keypair yet");
        install(&a, 5);
        shared.follow_home(&a);
        install(&b, 3);
        shared.follow_home(&b);
        assert_eq!(written(&shared, &a), Some(WorkerId(2)));
        assert_eq!(written(&shared, &b), Some(WorkerId(0)));
        install(&a, 4);
        shared.follow_home(&a);
        assert_eq!(written(&shared, &a), Some(WorkerId(1)));
        let next = keypair_at(0);
        a.keypairs.update(|keypairs| keypairs.installed_by_responder(Arc::clone(&next)));
        shared.follow_home(&a);
        assert_eq!(written(&shared, &a), Some(WorkerId(1)), "it seals only when it is confirmed");
        a.keypairs.update(Keypairs::cleared);
        shared.follow_home(&a);
        assert_eq!(written(&shared, &a), Some(WorkerId(1)), "the next home is likely the same");
        shared.forget_home(a.id);
        assert_eq!(written(&shared, &a), None);
        assert_eq!(written(&shared, &b), Some(WorkerId(0)));
    }

    #[test]
    fn of_two_who_install_at_once_the_later_keypair_counts() {
        let shared = shared();
        for round in 0..200 {
            let peer = peer(17);
            let install = |home| {
                install(&peer, home);
                shared.follow_home(&peer);
            };
            std::thread::scope(|scope| {
                scope.spawn(|| install(1));
                install(2);
            });
            let current = peer.keypairs.load().current.as_ref().unwrap().home();
            assert_eq!(written(&shared, &peer), Some(shared.worker_of(current)), "round {round}");
        }
    }

    #[test]
    fn peers_of_one_word_do_not_disturb_each_other() {
        let shared = shared();
        let peers: Vec<HotPeer> = (16..24).map(peer).collect();
        std::thread::scope(|scope| {
            for (number, peer) in peers.iter().enumerate() {
                let shared = &shared;
                scope.spawn(move || {
                    for home in 0..100 {
                        install(peer, home + number);
                        shared.follow_home(peer);
                    }
                });
            }
        });
        for (number, peer) in peers.iter().enumerate() {
            let worker = shared.worker_of(ShardId::new(99 + number));
            assert_eq!(written(&shared, peer), Some(worker));
        }
    }
}
