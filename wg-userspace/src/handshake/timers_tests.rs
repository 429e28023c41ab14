//! Whole sessions in their cells: who is called when, and what is left of whom.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use wg_common::endpoint::Endpoint;
use wg_common::id::{DeviceId, PeerId, ReceiverIndex, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::outcome::DropReason;
use wg_common::protocol::{
    KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT,
    REKEY_TIMEOUT_JITTER_MAX, TYPE_INITIATION,
};
use wg_common::time::{Now, Reading};

use super::pool::turn_at;
use super::*;
use crate::aead::RingAead;
use crate::counters::Totals;
use crate::datapath::SocketGroup;
use crate::datapath::handoff::HandshakeDatagram;
use crate::noise::{RemoteStatic, Timestamp};
use crate::session::{Continuity, TICK};

pub(super) const START: Now = Now::from_boot_ns(1_000_000_000_000);
pub(super) const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);

/// A world that writes down what is sent, and when by the wall clock.
#[derive(Default)]
pub(super) struct World {
    seed: AtomicU64,
    pub(super) wall_ns: AtomicU64,
    /// Nothing can be sent.
    pub(super) is_cut: AtomicBool,
    sent: Mutex<Vec<(Now, Vec<u8>, SocketAddr)>>,
}

impl Outside for Arc<World> {
    type Rng = StdRng;

    fn rng(&self) -> StdRng {
        StdRng::seed_from_u64(self.seed.fetch_add(1, Ordering::Relaxed))
    }

    fn wall(&self) -> Timestamp {
        let ns = self.wall_ns.load(Ordering::Relaxed);
        Timestamp::from_unix(1_700_000_000 + ns / 1_000_000_000, (ns % 1_000_000_000) as u32)
    }

    fn send(&self, _: WorkerId, message: &[u8], to: &Endpoint, _: u8) -> bool {
        if self.is_cut.load(Ordering::Relaxed) {
            return false;
        }
        let at = Now::from_boot_ns(self.wall_ns.load(Ordering::Relaxed));
        self.sent.lock().unwrap().push((at, message.to_vec(), to.remote));
        true
    }
}

/// A device without workers.
pub(super) struct Host {
    pub(super) handshakes: Handshakes<Arc<World>>,
    pub(super) shared: Arc<Shared>,
    queue: Arc<WorkQueue>,
    pub(super) world: Arc<World>,
    pub(super) key: PrivateKey,
    pub(super) now: Now,
    calls: usize,
}

impl Host {
    pub(super) fn new(number: u8) -> Self {
        let sockets = SocketGroup { port: 51820, of_worker: Vec::new() };
        let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
        let (shared, queue) =
            Shared::new(DeviceId(0), 1, Vec::new(), sockets, None, indexes).unwrap();
        let world = Arc::new(World::default());
        world.seed.store(u64::from(number) << 32, Ordering::Relaxed);
        let handshakes = Handshakes::new(Arc::clone(&shared), Arc::clone(&world), &RingAead, None);
        let key = PrivateKey::from_bytes([number; 32]);
        let mut host = Self { handshakes, shared, queue, world, key, now: START, calls: 0 };
        host.set_now(START);
        host.handshakes.set_private_key(Some(host.key.clone()), START);
        host
    }

    pub(super) fn set_now(&mut self, now: Now) {
        self.now = now;
        self.world.wall_ns.store(now.boot_ns(), Ordering::Relaxed);
        self.shared.beat(WorkerId(0), now);
    }

    pub(super) fn add(
        &self,
        id: u32,
        key: PublicKey,
        endpoint: Option<SocketAddr>,
    ) -> Arc<HotPeer> {
        let hot = Arc::new(HotPeer::new(PeerId(id), DeviceId(0), key));
        hot.endpoint.store(endpoint.map(|addr| Arc::new(Endpoint::configured(addr))));
        self.handshakes.add_peer(Arc::clone(&hot));
        hot
    }

    /// Adds a peer without endpoint, for little time.
    fn add_unreachable(&self, id: u32) {
        let hot = Arc::new(HotPeer::new(PeerId(id), DeviceId(0), public_key(id)));
        let remote = RemoteStatic::unreachable(hot.public_key);
        let psk = PresharedKey::default();
        self.handshakes.add_cell(hot, Some(remote.into()), psk, Timestamp::default());
    }

    /// Lets time pass, and calls what wants to be called.
    pub(super) fn run(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(next) = self.handshakes.next_timeout().filter(|next| *next <= until) {
            self.set_now(next.max(self.now));
            self.calls += self.handshakes.tick(self.now);
        }
        self.set_now(until);
        self.calls += self.handshakes.tick(until);
    }

    fn take_unanswered(&self) -> Vec<PeerId> {
        self.handshakes.take_unanswered()
    }

    pub(super) fn take_sent(&self) -> Vec<(Now, Vec<u8>, SocketAddr)> {
        std::mem::take(&mut *self.world.sent.lock().unwrap())
    }

    pub(super) fn receive(&self, message: &[u8], from: SocketAddr) {
        let from = Endpoint::configured(from);
        let datagram = HandshakeDatagram::new(DeviceId(0), message, from, WorkerId(0)).unwrap();
        self.handshakes.work(&Work::Datagram(datagram), self.now);
    }

    pub(super) fn initiate(&self, id: u32) {
        self.handshakes.work(&Work::Initiate(DeviceId(0), PeerId(id)), self.now);
    }

    pub(super) fn hot(&self, id: u32) -> Arc<HotPeer> {
        self.shared.peers.get(id as usize).unwrap()
    }

    fn seals(&self, id: u32) -> bool {
        self.shared.sealing_keypair(&self.hot(id), self.now).is_some()
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        Totals::sum([self.handshakes.drops()]).dropped(reason)
    }
}

pub(super) fn addr(host: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, host], 51820))
}

fn public_key(number: u32) -> PublicKey {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&(number + 1).to_le_bytes());
    bytes[8] = 9;
    PublicKey::from_bytes(bytes)
}

/// Two hosts that are peer 0 of each other.
pub(super) fn pair() -> (Host, Host) {
    let (a, b) = (Host::new(1), Host::new(2));
    a.add(0, b.key.public_key(), Some(addr(2)));
    b.add(0, a.key.public_key(), None);
    (a, b)
}

/// Carries a handshake from `a` to `b` and back; `a` has begun it.
pub(super) fn shake_hands(a: &Host, b: &Host) {
    for (_, message, _) in a.take_sent() {
        b.receive(&message, addr(1));
    }
    for (_, message, _) in b.take_sent() {
        a.receive(&message, addr(2));
    }
}

fn connected() -> (Host, Host) {
    let (a, b) = pair();
    a.initiate(0);
    shake_hands(&a, &b);
    assert!(a.seals(0));
    a.take_sent(); // the keepalive, which no worker of b's is there to take
    (a, b)
}

#[test]
fn idle_peers_are_never_called() {
    const IDLE_COUNT: u32 = 100_000;
    let mut host = Host::new(1);
    for id in 0..IDLE_COUNT {
        host.add_unreachable(id);
    }
    assert_eq!(host.handshakes.awake_count(), 0);
    assert_eq!(host.handshakes.next_timeout(), None);
    let busy = PeerId(77);
    host.handshakes.set_persistent_keepalive(busy, Some(SECOND * 25), START);
    host.run(SECOND * 3600);
    assert_eq!(host.handshakes.awake_count(), 1);
    let intervals = 3600 / 25;
    assert!((intervals - 1..=intervals + 1).contains(&host.calls), "{} calls", host.calls);
}

#[test]
fn ten_thousand_peers_with_keepalives_are_called_when_they_are_due() {
    const COUNT: u32 = 10_000;
    const INTERVAL: Duration = Duration::from_secs(25);
    let mut host = Host::new(1);
    for id in 0..COUNT {
        // A few are somewhere, so that their calls can be seen.
        if id % 1000 == 0 {
            host.add(id, public_key(id), Some(addr((id / 1000) as u8)));
        } else {
            host.add_unreachable(id);
        }
        host.handshakes.set_persistent_keepalive(PeerId(id), Some(INTERVAL), START);
    }
    assert_eq!(host.handshakes.awake_count(), COUNT as usize);
    // The first come one after the other: peer n after n ms.
    host.run(MS * 9_001 + TICK);
    let first = host.take_sent();
    for id in (0..COUNT).step_by(1000) {
        let at = first.iter().find(|(_, _, to)| *to == addr((id / 1000) as u8)).unwrap().0;
        let due = START + MS * id;
        assert!(at >= due && at < due + TICK, "{id}: {:?}", at - due);
    }
    host.run(SECOND);
    // Each is called once in each interval from then on, but for those whose handshakes are repeated.
    let few = (COUNT / 1000) as usize;
    let before = host.calls;
    host.run(INTERVAL);
    let calls = host.calls - before;
    let repetitions = few * (INTERVAL.as_secs() / REKEY_TIMEOUT.as_secs()) as usize;
    let all = COUNT as usize;
    assert!((all..=all + repetitions).contains(&calls), "{calls}");
}

#[test]
fn who_is_awake_is_known_without_a_look_at_who_rests() {
    assert!(size_of::<Cell>() <= 72, "{} bytes", size_of::<Cell>());
    let (mut a, b) = connected();
    for id in 10..1000 {
        a.add_unreachable(id);
    }
    let ids = |host: &Host| -> Vec<_> {
        host.handshakes.awake_peers().into_iter().map(|hot| hot.id).collect()
    };
    assert_eq!((ids(&a), ids(&b)), (vec![PeerId(0)], vec![PeerId(0)]));
    assert_eq!(a.handshakes.waiting_peers(), [PeerId(0)]);
    a.run(REJECT_AFTER_TIME * 2);
    assert_eq!((ids(&a), a.handshakes.waiting_peers()), (vec![], vec![]));
}

#[test]
fn cells_are_found_by_key_and_by_id_until_they_leave() {
    let host = Host::new(1);
    for id in 0..500 {
        host.add(id, public_key(id), None);
    }
    let find = |id: u32| host.handshakes.cell_by_key(&public_key(id)).map(|cell| cell.hot.id);
    for id in (0..500).step_by(3) {
        host.handshakes.remove_peer(PeerId(id), START);
    }
    for id in 0..500 {
        let is_there = id % 3 != 0;
        assert_eq!(find(id), is_there.then_some(PeerId(id)));
        assert_eq!(host.handshakes.cell(PeerId(id)).is_some(), is_there);
    }
    // Another peer in a slot that became free.
    host.add(0, public_key(900), None);
    assert_eq!(find(900), Some(PeerId(0)));
    assert_eq!(host.handshakes.cell_count(), 334);
    (0..500).for_each(|id| host.handshakes.remove_peer(PeerId(id), START));
    assert_eq!((host.handshakes.cell_count(), find(900)), (0, None));
    assert_eq!(host.handshakes.cells().slots.capacity(), 0, "nothing is kept");
}

#[test]
fn a_first_keepalive_is_sent_at_once_if_it_is_alone() {
    let mut host = Host::new(1);
    host.add(0, public_key(0), Some(addr(2)));
    host.handshakes.set_persistent_keepalive(PeerId(0), Some(SECOND * 25), START);
    host.run(TICK);
    assert_eq!(host.take_sent().len(), 1);
}

#[test]
fn a_removed_peer_leaves_the_wheel_for_good() {
    let mut host = Host::new(1);
    host.add(0, public_key(0), Some(addr(2)));
    host.handshakes.set_persistent_keepalive(PeerId(0), Some(SECOND * 25), START);
    host.initiate(0);
    assert_eq!(host.handshakes.awake_count(), 1);
    let cell = host.handshakes.cell(PeerId(0)).unwrap();
    host.handshakes.remove_peer(PeerId(0), START);
    assert_eq!(host.handshakes.awake_count(), 0);
    // Who has found the cell before it was removed calls it yet.
    host.handshakes.initiate(&cell, START);
    host.handshakes.handle_timeout(&cell, START);
    assert_eq!(host.handshakes.awake_count(), 0);
    assert_eq!(Arc::strong_count(&cell), 1, "nobody else holds it");
    host.run(SECOND * 100);
    assert_eq!(host.calls, 0);
}

#[test]
fn a_cell_is_on_the_wheel_once_however_often_it_is_called() {
    let mut host = Host::new(1);
    host.add(0, public_key(0), Some(addr(2)));
    for _ in 0..50 {
        host.initiate(0);
        host.handshakes.set_persistent_keepalive(PeerId(0), Some(SECOND * 25), START);
    }
    assert_eq!(host.handshakes.awake_count(), 1);
    host.run(REKEY_TIMEOUT + REKEY_TIMEOUT_JITTER_MAX);
    assert_eq!(host.take_sent().len(), 2, "the initiation and its repetition");
}

#[test]
fn a_device_without_key_does_nothing_and_goes_on_with_one() {
    let mut host = Host::new(1);
    host.add(0, public_key(0), Some(addr(2)));
    host.handshakes.set_persistent_keepalive(PeerId(0), Some(SECOND * 25), START);
    host.handshakes.set_private_key(None, START);
    host.run(SECOND * 60);
    assert_eq!(host.calls, 0);
    host.handshakes.set_private_key(Some(host.key.clone()), host.now);
    host.run(TICK);
    assert_eq!(host.take_sent().len(), 1);
}

#[test]
fn timers_that_workers_arm_are_noticed() {
    let (mut a, _b) = connected();
    let received = a.now + SECOND * 3;
    a.run(SECOND * 3);
    a.hot(0).activity.data_received(received);
    a.run(KEEPALIVE_TIMEOUT - SECOND);
    assert!(a.take_sent().is_empty());
    a.run(SECOND + TICK);
    let sent = a.take_sent();
    assert_eq!(sent.len(), 1);
    assert!(sent[0].0 - received < KEEPALIVE_TIMEOUT + TICK);
}

#[test]
fn a_peer_goes_to_sleep_with_its_keypair() {
    let (mut a, _b) = connected();
    assert_eq!(a.handshakes.awake_count(), 1);
    a.run(REJECT_AFTER_TIME + SECOND);
    assert_eq!(a.handshakes.awake_count(), 0);
    assert!(a.calls <= 20, "{}", a.calls);
}

#[test]
fn a_told_confirmation_is_noted_at_once() {
    let (a, b) = connected();
    let cell = b.handshakes.cell(PeerId(0)).unwrap();
    assert!(cell.last_handshake().is_none());
    let next = b.hot(0).keypairs.load().next.clone().unwrap();
    assert!(b.hot(0).confirm(&next));
    b.handshakes.work(&Work::Confirmed(PeerId(0)), b.now);
    assert!(cell.last_handshake().is_some());
    // And without a word, by the next question.
    drop(a);
    let (_a, mut b) = connected();
    let next = b.hot(0).keypairs.load().next.clone().unwrap();
    assert!(b.hot(0).confirm(&next));
    b.run(KEEPALIVE_TIMEOUT + TICK);
    assert!(b.handshakes.cell(PeerId(0)).unwrap().last_handshake().is_some());
}

#[test]
fn giving_up_tells_the_workers_to_drop_what_is_staged() {
    let mut host = Host::new(1);
    let hot = host.add(0, public_key(0), Some(addr(2)));
    host.initiate(0);
    host.run(REKEY_ATTEMPT_TIME - SECOND);
    assert_eq!(hot.give_up_count.load(Ordering::Relaxed), 0);
    host.run(SECOND + REKEY_TIMEOUT + REKEY_TIMEOUT_JITTER_MAX);
    assert_eq!(hot.give_up_count.load(Ordering::Relaxed), 1);
    assert_eq!(host.handshakes.awake_count(), 0);
}

#[test]
fn who_sleeps_is_woken_by_what_comes_sooner() {
    let host = Host::new(1);
    host.add(0, public_key(0), Some(addr(2)));
    let is_woken = |host: &Host| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            tokio::time::timeout(Duration::ZERO, host.handshakes.sooner()).await.is_ok()
        })
    };
    assert_eq!(host.handshakes.next_timeout(), None);
    host.initiate(0);
    assert!(is_woken(&host), "there was no timer, now there is");
    assert!(host.handshakes.next_timeout().is_some());
    host.add(1, public_key(1), None);
    host.handshakes.set_persistent_keepalive(PeerId(1), Some(SECOND * 9), host.now + SECOND * 9);
    assert!(!is_woken(&host), "that is later");
}

// ---------------------------------------------------------------------------------------------
// Sleep, clones, pauses
// ---------------------------------------------------------------------------------------------

fn reading(now: Now, slept: Duration) -> Reading {
    let wall = Duration::from_secs(1_700_000_000).as_nanos() as u64;
    let monotonic_ns = now.boot_ns() - slept.as_nanos() as u64;
    Reading { before: now, monotonic_ns, real_ns: wall + now.boot_ns(), after: now }
}

/// The host sleeps, and the first thread that looks notices it.
fn sleep(host: &mut Host, continuity: &mut Continuity, time: Duration) {
    assert_eq!(host.shared.now_of(continuity, &reading(host.now, Duration::ZERO)), host.now);
    host.set_now(host.now + time);
    host.shared.now_of(continuity, &reading(host.now, time));
}

#[test]
fn after_a_sleep_nothing_of_before_seals_and_control_need_not_have_looked() {
    let (mut a, _b) = connected();
    sleep(&mut a, &mut Continuity::default(), SECOND * 2);
    assert!(a.hot(0).keypairs.load().current.is_some(), "nobody has cleared it yet");
    assert!(!a.seals(0));
    a.handshakes.send_keepalive(&a.hot(0), WorkerId(0), a.now);
    assert!(a.take_sent().is_empty());
    a.handshakes.clear_sessions(a.now);
    assert!(a.hot(0).keypairs.load().current.is_none());
    assert_eq!(a.handshakes.awake_count(), 0, "nobody wants to be reached");
}

#[test]
fn a_pool_that_wakes_first_after_a_sleep_seals_no_keepalive() {
    let (_a, mut b) = connected();
    let mut continuity = Continuity::default();
    turn_at(&b.handshakes, &b.queue, &mut continuity, &reading(b.now, Duration::ZERO));
    // The first packet confirms the keypair, and something is owed.
    let hot = b.hot(0);
    let next = hot.keypairs.load().next.clone().unwrap();
    hot.confirm(&next);
    hot.endpoint.store(Some(Arc::new(Endpoint::configured(addr(1)))));
    assert!(b.seals(0));
    hot.activity.data_received(b.now);
    b.set_now(b.now + SECOND * 11);
    assert!(b.shared.hand_off(Work::Confirmed(PeerId(0))));
    turn_at(&b.handshakes, &b.queue, &mut continuity, &reading(b.now, SECOND));
    assert_eq!(b.take_sent().len(), 0, "no worker has looked at the clocks yet");
    assert!(!b.seals(0));
}

#[test]
fn a_handshake_that_was_in_flight_makes_no_keypair() {
    let (mut a, mut b) = pair();
    a.initiate(0);
    for (_, message, _) in a.take_sent() {
        b.receive(&message, addr(1));
    }
    sleep(&mut a, &mut Continuity::default(), SECOND);
    // Its response comes before control has cleared anything.
    for (_, message, _) in b.take_sent() {
        a.receive(&message, addr(2));
    }
    let keypair = a.hot(0).keypairs.load().current.clone().unwrap();
    assert!(keypair.created() >= a.shared.keys_not_before(), "it is finished after the sleep");
    assert!(!a.shared.may_use(&keypair) && !a.seals(0), "but was begun before");
    assert!(a.take_sent().is_empty(), "not even a keepalive");
    a.handshakes.clear_sessions(a.now);
    a.initiate(0);
    b.set_now(a.now);
    shake_hands(&a, &b);
    assert!(a.seals(0));
}

#[test]
fn a_handshake_after_a_sleep_outlives_control_that_looks_later() {
    for answers in [false, true] {
        let (mut a, mut b) = connected();
        let old = a.hot(0).keypairs.load().current.clone().unwrap();
        sleep(&mut a, &mut Continuity::default(), SECOND * 10);
        b.set_now(a.now);
        let (initiator, responder) = if answers { (&b, &a) } else { (&a, &b) };
        let to = initiator.hot(0);
        to.endpoint.store(Some(Arc::new(Endpoint::configured(addr(9)))));
        initiator.initiate(0);
        for (_, message, _) in initiator.take_sent() {
            responder.receive(&message, addr(9));
        }
        // Control looks now: while a response is under way, or the first packet.
        let not_before = a.shared.keys_not_before();
        a.set_now(a.now + MS * 50);
        a.handshakes.clear_older_sessions(not_before, a.now);
        assert!(a.shared.keypair(old.local_index()).is_none(), "what was before is gone");
        let (initiator, responder) = if answers { (&b, &a) } else { (&a, &b) };
        for (_, message, _) in responder.take_sent() {
            initiator.receive(&message, addr(9));
        }
        assert!(initiator.seals(0));
        let new = responder.hot(0).keypairs.load().next.clone().expect("it waits for its packet");
        assert!(responder.shared.keypair(new.local_index()).is_some(), "and a packet finds it");
        assert!(responder.shared.may_use(&new));
        a.handshakes.clear_older_sessions(not_before, a.now);
        assert!(initiator.seals(0) && responder.hot(0).keypairs.load().next.is_some());
    }
}

#[test]
fn a_handshake_from_before_a_sleep_ends_beside_one_from_after_it() {
    let (mut a, mut b) = connected();
    a.set_now(a.now + REKEY_TIMEOUT);
    a.initiate(0);
    a.take_sent();
    sleep(&mut a, &mut Continuity::default(), SECOND * 10);
    b.set_now(a.now);
    b.hot(0).endpoint.store(Some(Arc::new(Endpoint::configured(addr(1)))));
    b.initiate(0);
    for (_, message, _) in b.take_sent() {
        a.receive(&message, addr(2));
    }
    let indexes = a.handshakes.index_count();
    a.handshakes.clear_older_sessions(a.shared.keys_not_before(), a.now);
    let keypairs = a.hot(0).keypairs.load();
    assert!(keypairs.current.is_none() && keypairs.next.is_some());
    assert_eq!(
        (indexes, a.handshakes.index_count()),
        (3, 1),
        "but the new keypair's, all are free"
    );
    a.take_sent();
    a.run(REKEY_TIMEOUT * 2);
    assert!(a.take_sent().is_empty(), "nothing is repeated");
}

#[test]
fn a_sleep_that_many_threads_see_ends_keypairs_once() {
    let (mut a, mut b) = connected();
    let (mut first, mut late) = (Continuity::default(), Continuity::default());
    a.shared.now_of(&mut late, &reading(a.now, Duration::ZERO));
    sleep(&mut a, &mut first, SECOND * 60);
    let not_before = a.shared.keys_not_before();
    a.handshakes.clear_sessions(a.now);
    a.initiate(0);
    b.set_now(a.now);
    shake_hands(&a, &b);
    assert!(a.seals(0));
    a.set_now(a.now + MS * 100);
    a.shared.now_of(&mut late, &reading(a.now, SECOND * 60));
    assert_eq!(a.shared.keys_not_before(), not_before);
    assert!(a.seals(0), "the late one spares what is new");
    // The next sleep is another one.
    a.set_now(a.now + SECOND);
    a.shared.now_of(&mut late, &reading(a.now, SECOND * 61));
    assert!(!a.seals(0));
}

#[test]
fn after_clearing_who_is_wanted_is_reached_again() {
    let (mut a, b) = connected();
    for id in 1..4 {
        a.add(id, public_key(id), Some(addr(10 + id as u8)));
    }
    a.handshakes.set_persistent_keepalive(PeerId(1), Some(SECOND * 25), a.now);
    a.hot(2).staged.store(1, Ordering::Relaxed);
    a.hot(0).activity.data_received(a.now);
    a.hot(0).activity.data_sent(a.now);
    a.run(TICK);
    a.take_sent();
    a.shared.end_keypairs(a.now);
    a.handshakes.clear_sessions(a.now);
    a.run(MS * 10);
    let mut to: Vec<_> = a.take_sent().into_iter().map(|(_, m, to)| (m[0], to)).collect();
    to.sort_unstable();
    assert_eq!(to, [(TYPE_INITIATION, addr(11)), (TYPE_INITIATION, addr(12))]);
    drop(b);
}

#[test]
fn all_peers_with_keepalives_do_not_come_back_in_one_instant() {
    let mut host = Host::new(1);
    for id in 0..500 {
        host.add(id, public_key(id), Some(addr(2)));
        host.handshakes.set_persistent_keepalive(PeerId(id), Some(SECOND * 25), START);
    }
    host.run(MS);
    host.take_sent();
    host.handshakes.clear_sessions(host.now);
    host.run(SECOND * 2);
    let mut by_tick: HashMap<u64, u32> = HashMap::new();
    for (at, message, _) in host.take_sent() {
        assert_eq!(message[0], TYPE_INITIATION);
        *by_tick.entry(at.boot_ns()).or_default() += 1;
    }
    assert_eq!(by_tick.values().sum::<u32>(), 500);
    assert!(by_tick.values().all(|&count| count <= 2), "{:?}", by_tick.values().max());
}

fn quiesce(host: &Host, until: Now) {
    host.shared.set_quiesced_until(until);
    host.shared.end_keypairs(host.now);
    host.handshakes.clear_sessions(host.now);
}

#[test]
fn a_quiesced_device_neither_begins_nor_answers_and_counts() {
    let (mut a, mut b) = connected();
    a.add(1, public_key(1), Some(addr(3)));
    a.handshakes.set_persistent_keepalive(PeerId(1), Some(SECOND * 25), a.now);
    a.hot(0).staged.store(1, Ordering::Relaxed);
    let end = a.now + SECOND * 600;
    quiesce(&a, end);
    assert!(a.hot(0).keypairs.load().iter().next().is_none());
    assert_eq!(a.handshakes.awake_count(), 0);
    a.initiate(0);
    assert!(!a.hot(0).handshake_wanted.load(Ordering::Relaxed), "workers may ask again later");
    b.hot(0).endpoint.store(Some(Arc::new(Endpoint::configured(addr(1)))));
    b.set_now(b.now + REKEY_TIMEOUT);
    b.initiate(0);
    for (_, message, _) in b.take_sent() {
        a.receive(&message, addr(2));
    }
    a.run(SECOND * 300);
    assert!(a.take_sent().is_empty());
    assert_eq!((a.calls, a.dropped(DropReason::Quiesced)), (0, 1));
    // When its time is over.
    a.set_now(end);
    a.handshakes.resume(a.now);
    a.run(TICK);
    let mut to: Vec<_> = a.take_sent().into_iter().map(|(_, _, to)| to).collect();
    to.sort_unstable();
    assert_eq!(to, [addr(2), addr(3)]);
}

#[test]
fn a_pause_frees_every_index() {
    let (a, _b) = connected();
    let index = a.hot(0).keypairs.load().current.as_ref().unwrap().local_index();
    let has_owner = |index: ReceiverIndex| lock(&a.handshakes.indexes).owner(index).is_some();
    assert!(has_owner(index));
    quiesce(&a, a.now + SECOND);
    assert!(!has_owner(index));
    assert!(a.shared.keypair(index).is_none());
}

#[test]
fn a_second_unanswered_initiation_is_told_of_peers_with_names() {
    let mut host = Host::new(1);
    let nowhere = Some("192.0.2.1:1".parse().unwrap());
    for id in [1, 2] {
        host.add(id, public_key(id), nowhere);
    }
    host.handshakes.set_named(PeerId(1));
    host.initiate(1);
    host.initiate(2);
    let retry = REKEY_TIMEOUT + REKEY_TIMEOUT_JITTER_MAX + TICK * 2;
    host.run(retry);
    assert_eq!(host.take_unanswered(), [], "one may have been lost");
    host.run(retry);
    assert_eq!(host.take_unanswered(), [PeerId(1)]);
    host.run(REKEY_ATTEMPT_TIME);
    assert!(host.take_unanswered().len() > 10, "and again, until it is given up");
    host.run(REKEY_ATTEMPT_TIME);
    assert_eq!(host.take_unanswered(), []);
    host.initiate(1);
    host.run(retry);
    assert_eq!(host.take_unanswered(), [PeerId(1)], "nothing has come since");
}
