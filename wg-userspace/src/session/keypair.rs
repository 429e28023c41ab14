//! What one handshake yields: two keys, a sending counter, a replay window.

use std::ops::{Deref, Range};
use std::sync::{Arc, Weak};

use wg_common::id::{Counter, ReceiverIndex, ShardId};
use wg_common::protocol::{KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME, REKEY_AFTER_TIME, REKEY_TIMEOUT};
use wg_common::time::Now;

use super::gates::{ReceiveGate, SendCounter};
use super::handover::{KeypairExport, Slot};
use super::{Generation, HotPeer, ReplayWindow};
use crate::aead::AeadKey;
use crate::noise::{Established, Role};

/// Two keys, one for each direction, and what their use has come to. Wiped when the last holder
/// lets go.
#[derive(Debug)]
pub struct Keypair {
    local_index: ReceiverIndex,
    remote_index: ReceiverIndex,
    role: Role,
    created: Now,
    begun: Now,
    home: ShardId,
    peer: Weak<HotPeer>,
    /// Whose counters we seal with.
    generation: Generation,
    seal_key: AeadKey,
    open_key: AeadKey,
    /// Moved by whoever sends.
    sent: CacheLine<SendCounter>,
    /// Moved by the home worker.
    received: CacheLine<Received>,
}

/// Which counters have come, and whether any may.
#[derive(Debug)]
struct Received {
    gate: ReceiveGate,
    /// Belongs to who is inside the gate; to who has shut it when nobody is.
    window: ReplayWindow,
}

/// Keeps what one thread writes apart from what others read. Two lines, as processors fetch pairs.
#[derive(Debug)]
#[repr(align(128))]
struct CacheLine<T>(T);

/// A run of counters that nobody else has got or will get.
///
/// It cannot be copied, since a counter seals one packet.
#[derive(Debug, Eq, PartialEq)]
pub struct Reserved {
    /// The first counter.
    pub first: u64,
    /// How many there are; at least one.
    pub count: u64,
}

impl Reserved {
    /// The counters.
    pub fn into_counters(self) -> Range<u64> {
        self.first..self.first + self.count
    }
}

impl Keypair {
    /// The keypair of a handshake with `peer` that was finished at `now`; at home in `home` for good.
    pub fn new(established: &Established, peer: Weak<HotPeer>, home: ShardId, now: Now) -> Self {
        Self {
            local_index: established.local_index,
            remote_index: established.remote_index,
            role: established.role,
            created: now,
            begun: now,
            home,
            peer,
            generation: Generation::default(),
            seal_key: AeadKey::new(&established.keys.send),
            open_key: AeadKey::new(&established.keys.receive),
            sent: CacheLine(SendCounter::new(Generation::default().counters().start)),
            received: CacheLine(Received { gate: ReceiveGate::new(), window: ReplayWindow::new() }),
        }
    }

    /// Takes a keypair over from who exported it, as the next generation; `None` if that was the last.
    pub(super) fn import(
        export: KeypairExport,
        peer: Weak<HotPeer>,
        home: ShardId,
    ) -> Option<Self> {
        let generation = export.generation.successor()?;
        Some(Self {
            local_index: export.local_index,
            remote_index: export.remote_index,
            role: export.role,
            created: export.created,
            begun: export.begun,
            home,
            peer,
            generation,
            seal_key: AeadKey::new(&export.seal_key),
            open_key: AeadKey::new(&export.open_key),
            sent: CacheLine(SendCounter::new(generation.counters().start)),
            received: CacheLine(Received { gate: ReceiveGate::new(), window: export.window }),
        })
    }

    /// The same keypair, but its handshake had begun before it was finished.
    #[must_use]
    pub fn begun_at(self, begun: Now) -> Self {
        Self { begun: begun.min(self.created), ..self }
    }

    /// When our part of the handshake began: nothing that is secret in this keypair is older.
    pub fn begun(&self) -> Now {
        self.begun
    }

    /// By which the peer addresses us.
    pub fn local_index(&self) -> ReceiverIndex {
        self.local_index
    }

    /// By which we address the peer.
    #[inline]
    pub fn remote_index(&self) -> ReceiverIndex {
        self.remote_index
    }

    /// Our role in the handshake.
    pub fn role(&self) -> Role {
        self.role
    }

    /// When the handshake was finished.
    pub fn created(&self) -> Now {
        self.created
    }

    /// When it dies.
    pub fn expires(&self) -> Now {
        self.created + REJECT_AFTER_TIME
    }

    /// The shard whose worker runs the replay window.
    pub fn home(&self) -> ShardId {
        self.home
    }

    /// The peer, unless it has been removed.
    pub fn peer(&self) -> Option<Arc<HotPeer>> {
        self.peer.upgrade()
    }

    /// Seals what we send, under counters from [`reserve`](Self::reserve) only.
    #[inline]
    pub fn seal_key(&self) -> &AeadKey {
        &self.seal_key
    }

    /// Opens what we receive.
    #[inline]
    pub fn open_key(&self) -> &AeadKey {
        &self.open_key
    }

    /// The number of its holder: 0, unless it was handed over.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Receives with it, for as long as the result is held: a batch. For the home worker only; nobody
    /// else has it then. `None` once it has been frozen.
    pub fn receive(self: Arc<Self>) -> Option<Receiving> {
        if self.received.0.gate.enter() {
            return Some(Receiving(self));
        }
        debug_assert!(self.is_frozen(), "only the home worker receives");
        None
    }

    /// The next counter to seal with: in the first generation, the number of counters that have been
    /// reserved. `u64::MAX` once it has been frozen.
    pub fn sent(&self) -> u64 {
        self.sent.0.next()
    }

    /// Reserves up to `n` counters to seal with: fewer if the end of its generation's is near, `None` if
    /// it is reached, if the keypair has been frozen, or if `n` is 0. Any thread may seal with what it
    /// has reserved.
    pub fn reserve(&self, n: u64) -> Option<Reserved> {
        let (first, count) = self.sent.0.take(self.generation.counters().end, n)?;
        Some(Reserved { first, count })
    }

    /// Ends sealing and receiving for good, here and in this process, to hand the keypair over: nothing is
    /// reserved after this, and nobody begins to receive. What was reserved before may yet be sealed and
    /// sent; who receives now finishes its batch.
    ///
    /// `None` for all callers but the first: there is at most one export of a keypair.
    pub fn freeze(self: &Arc<Self>) -> Option<Frozen> {
        let next = self.sent.0.stop();
        self.received.0.gate.shut();
        Some(Frozen { keypair: Arc::clone(self), next: next? })
    }

    /// Whether it was frozen.
    pub fn is_frozen(&self) -> bool {
        self.received.0.gate.is_shut()
    }

    /// Whether it is young enough, and has counters left, to seal.
    pub fn can_seal(&self, now: Now) -> bool {
        !self.is_expired(now) && self.sent() < self.generation.counters().end
    }

    /// Whether it is young enough to open. Counters are the window's matter.
    pub fn can_open(&self, now: Now) -> bool {
        !self.is_expired(now)
    }

    /// Whether it is dead.
    pub fn is_expired(&self, now: Now) -> bool {
        now.since(self.created) >= REJECT_AFTER_TIME
    }

    /// Whether who has just sealed with it should ask for a new handshake: the initiator by age, both
    /// by number of messages (§6.2; so does the kernel), or when their generation's counters near their
    /// end.
    pub fn wants_rekey_to_send(&self, now: Now) -> bool {
        self.sent() > self.generation.rekey_after()
            || (self.role == Role::Initiator && now.since(self.created) >= REKEY_AFTER_TIME)
    }

    /// Whether who has just opened with it should ask for a new handshake: only the initiator, when
    /// so little life is left that a keepalive and a handshake just fit in (§6.2).
    pub fn wants_rekey_on_receive(&self, now: Now) -> bool {
        const AGE: std::time::Duration =
            REJECT_AFTER_TIME.saturating_sub(KEEPALIVE_TIMEOUT).saturating_sub(REKEY_TIMEOUT);
        self.role == Role::Initiator && now.since(self.created) >= AGE
    }
}

/// The right to receive with a keypair, which it dereferences to. One at a time.
#[derive(Debug)]
pub struct Receiving(Arc<Keypair>);

impl Receiving {
    /// Whether a counter is new, as [`ReplayWindow::would_accept`].
    #[inline]
    pub fn would_accept(&self, counter: Counter) -> bool {
        self.0.received.0.window.would_accept(counter)
    }

    /// Takes note of a counter and says whether it is new, as [`ReplayWindow::accept`].
    #[inline]
    pub fn accept(&mut self, counter: Counter) -> bool {
        self.0.received.0.window.accept(counter)
    }

    /// The keypair.
    pub fn keypair(&self) -> &Arc<Keypair> {
        &self.0
    }
}

impl Deref for Receiving {
    type Target = Keypair;

    fn deref(&self) -> &Keypair {
        &self.0
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.0.received.0.gate.leave();
    }
}

/// A keypair that seals and opens no more here, and can be exported once.
#[derive(Debug)]
pub struct Frozen {
    keypair: Arc<Keypair>,
    /// Where its sending counter stood.
    next: u64,
}

impl Frozen {
    /// The keypair.
    pub fn keypair(&self) -> &Arc<Keypair> {
        &self.keypair
    }

    /// Whether nobody receives any more, so that the window will not move again.
    pub fn is_settled(&self) -> bool {
        self.keypair.received.0.gate.is_settled()
    }

    /// All there is to know of the keypair, whose place was `slot`. `None` if somebody still receives: then
    /// nobody will ever have it.
    pub(super) fn export(self, slot: Slot, now: Now) -> Option<KeypairExport> {
        if !self.is_settled() {
            return None;
        }
        let Self { keypair, next } = self;
        Some(KeypairExport {
            slot,
            role: keypair.role,
            generation: keypair.generation,
            next,
            local_index: keypair.local_index,
            remote_index: keypair.remote_index,
            // Clocks of threads differ by a little; an export is not older than what is in it.
            begun: keypair.begun.min(now),
            created: keypair.created.min(now),
            seal_key: keypair.seal_key.expose().clone(),
            open_key: keypair.open_key.expose().clone(),
            window: keypair.received.0.window.copy(),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use wg_common::protocol::{REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES};

    use super::*;
    use crate::noise::TransportKeys;

    pub const START: Now = Now::from_boot_ns(1_000_000_000);
    const TICK: Duration = Duration::from_nanos(1);

    /// A keypair without a peer, with this index for both sides and keys of zeros.
    pub fn keypair(index: u32, role: Role, created: Now) -> Keypair {
        let index = ReceiverIndex::from_wire(index.to_le_bytes());
        let keys = TransportKeys { send: [0; 32], receive: [0; 32] };
        let established = Established { keys, local_index: index, remote_index: index, role };
        Keypair::new(&established, Weak::new(), ShardId::new(0), created)
    }

    /// A keypair of the generation that has this counter, which is the next.
    fn at_counter(next: u64) -> Keypair {
        let generation = Generation::new((next >> 40) as u32).unwrap();
        let sent = CacheLine(SendCounter::new(next));
        Keypair { generation, sent, ..keypair(0, Role::Responder, START) }
    }

    #[test]
    fn reserved_counters_follow_each_other() {
        let keypair = at_counter(0);
        assert_eq!(keypair.reserve(3), Some(Reserved { first: 0, count: 3 }));
        assert_eq!(keypair.reserve(1), Some(Reserved { first: 3, count: 1 }));
        assert_eq!(keypair.reserve(0), None);
        assert_eq!(keypair.reserve(64).unwrap().into_counters(), 4..68);
        assert_eq!(keypair.sent(), 68);
    }

    #[test]
    fn reserve_never_passes_reject_after_messages() {
        let keypair = at_counter(REJECT_AFTER_MESSAGES - 5);
        assert_eq!(keypair.reserve(3).unwrap().count, 3);
        assert!(keypair.can_seal(START));
        assert_eq!(
            keypair.reserve(u64::MAX),
            Some(Reserved { first: REJECT_AFTER_MESSAGES - 2, count: 2 })
        );
        assert!(!keypair.can_seal(START));
        assert_eq!(keypair.reserve(1), None);
        assert_eq!(keypair.sent(), REJECT_AFTER_MESSAGES);
        assert!(keypair.can_open(START), "receiving has its own counter");
    }

    #[test]
    fn reserve_never_leaves_its_generation() {
        for number in [0, 1, 77] {
            let Range { start, end } = Generation::new(number).unwrap().counters();
            let keypair = at_counter(end - 5);
            assert!(keypair.can_seal(START) && keypair.wants_rekey_to_send(START));
            assert_eq!(keypair.reserve(64), Some(Reserved { first: end - 5, count: 5 }));
            assert!(keypair.reserve(1).is_none() && !keypair.can_seal(START));
            assert!(keypair.can_open(START), "receiving has its own counter");
            assert!(!at_counter(start).wants_rekey_to_send(START));
        }
    }

    #[test]
    fn a_frozen_keypair_neither_seals_nor_receives() {
        let keypair = Arc::new(at_counter(5));
        let frozen = keypair.freeze().unwrap();
        assert!(keypair.is_frozen() && frozen.is_settled() && frozen.next == 5);
        assert!(!keypair.can_seal(START) && keypair.reserve(1).is_none());
        assert!(keypair.clone().receive().is_none());
        assert!(keypair.freeze().is_none());
    }

    proptest! {
        #[test]
        fn no_counter_is_handed_out_twice(
            start in prop_oneof![Just(0), REJECT_AFTER_MESSAGES - 3000..REJECT_AFTER_MESSAGES],
            sizes in prop::collection::vec(0_u64..200, 0..40),
        ) {
            let keypair = at_counter(start);
            let mut expected = start;
            for n in sizes {
                let counters = keypair.reserve(n).map_or(expected..expected, Reserved::into_counters);
                prop_assert_eq!(counters.start, expected);
                prop_assert_eq!(counters.end, (expected + n).min(REJECT_AFTER_MESSAGES));
                expected = counters.end;
            }
        }
    }

    #[test]
    fn threads_that_race_for_the_last_counters_get_each_once() {
        const THREADS: u64 = 4;
        const COUNT: u64 = 40_000;
        let keypair = at_counter(REJECT_AFTER_MESSAGES - COUNT);
        let mut all: Vec<u64> = std::thread::scope(|scope| {
            let take = |step: u64| {
                let keypair = &keypair;
                scope.spawn(move || {
                    let runs = std::iter::from_fn(|| keypair.reserve(step));
                    runs.flat_map(Reserved::into_counters).collect::<Vec<_>>()
                })
            };
            let threads: Vec<_> = (1..=THREADS).map(|step| take(step * 3)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        all.sort_unstable();
        assert!(all.into_iter().eq(REJECT_AFTER_MESSAGES - COUNT..REJECT_AFTER_MESSAGES));
        assert_eq!(keypair.reserve(1), None);
    }

    #[test]
    fn keys_are_dead_after_reject_after_time() {
        for role in [Role::Initiator, Role::Responder] {
            let keypair = keypair(0, role, START);
            let last = START + (REJECT_AFTER_TIME - TICK);
            assert!(keypair.can_seal(last) && keypair.can_open(last));
            assert_eq!(keypair.expires(), START + REJECT_AFTER_TIME);
            assert!(!keypair.can_seal(keypair.expires()) && !keypair.can_open(keypair.expires()));
        }
    }

    #[test]
    fn a_clock_behind_the_keypair_makes_it_young() {
        let keypair = keypair(0, Role::Initiator, START + Duration::from_secs(500));
        assert!(keypair.can_seal(START) && keypair.can_open(START));
        assert!(!keypair.wants_rekey_to_send(START) && !keypair.wants_rekey_on_receive(START));
    }

    #[test]
    fn only_the_initiator_rekeys_by_age() {
        let (initiator, responder) =
            (keypair(0, Role::Initiator, START), keypair(0, Role::Responder, START));
        for (age, to_send, on_receive) in [
            (REKEY_AFTER_TIME - TICK, false, false),
            (REKEY_AFTER_TIME, true, false),
            (Duration::from_secs(165) - TICK, true, false),
            (Duration::from_secs(165), true, true),
        ] {
            assert_eq!(initiator.wants_rekey_to_send(START + age), to_send);
            assert_eq!(initiator.wants_rekey_on_receive(START + age), on_receive);
            assert!(!responder.wants_rekey_to_send(START + age));
            assert!(!responder.wants_rekey_on_receive(START + age));
        }
    }

    #[test]
    fn both_roles_rekey_after_rekey_after_messages() {
        for role in [Role::Initiator, Role::Responder] {
            let keypair = Keypair { role, ..at_counter(REKEY_AFTER_MESSAGES) };
            assert!(!keypair.wants_rekey_to_send(START));
            keypair.reserve(1);
            assert!(keypair.wants_rekey_to_send(START));
        }
    }
}
