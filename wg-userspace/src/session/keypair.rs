//! What one handshake yields: two keys, a sending counter, a replay window.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use wg_common::id::{ReceiverIndex, ShardId};
use wg_common::protocol::{
    KEEPALIVE_TIMEOUT, REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES,
    REKEY_AFTER_TIME, REKEY_TIMEOUT,
};
use wg_common::time::Now;

use super::{HotPeer, ReplayWindow};
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
    home: ShardId,
    peer: Weak<HotPeer>,
    seal_key: AeadKey,
    open_key: AeadKey,
    /// The next counter to seal with; moved by whoever sends.
    sent: CacheLine<AtomicU64>,
    /// Moved by the home worker.
    window: CacheLine<ReplayWindow>,
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
            home,
            peer,
            seal_key: AeadKey::new(&established.keys.send),
            open_key: AeadKey::new(&established.keys.receive),
            sent: CacheLine(AtomicU64::new(0)),
            window: CacheLine(ReplayWindow::new()),
        }
    }

    /// By which the peer addresses us.
    pub fn local_index(&self) -> ReceiverIndex {
        self.local_index
    }

    /// By which we address the peer.
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
    pub fn seal_key(&self) -> &AeadKey {
        &self.seal_key
    }

    /// Opens what we receive.
    pub fn open_key(&self) -> &AeadKey {
        &self.open_key
    }

    /// Which counters have come. For the home worker only.
    pub fn window(&self) -> &ReplayWindow {
        &self.window.0
    }

    /// Number of counters that have been reserved.
    pub fn sent(&self) -> u64 {
        self.sent.0.load(Relaxed)
    }

    /// Reserves up to `n` counters to seal with: fewer if the limit is near, `None` if it is reached
    /// (or if `n` is 0). Any thread may seal with what it has reserved.
    pub fn reserve(&self, n: u64) -> Option<Reserved> {
        self.reserve_below(REJECT_AFTER_MESSAGES, n)
    }

    fn reserve_below(&self, limit: u64, n: u64) -> Option<Reserved> {
        // Not `fetch_add`: threads that find the limit reached would push the counter on, in the
        // end around to 0. Relaxed, since the counter guards no other memory, and changes of one
        // atomic have one order for all threads.
        let mut first = self.sent.0.load(Relaxed);
        loop {
            let count = n.min(limit.saturating_sub(first));
            if count == 0 {
                return None;
            }
            match self.sent.0.compare_exchange_weak(first, first + count, Relaxed, Relaxed) {
                Ok(_) => return Some(Reserved { first, count }),
                Err(moved) => first = moved,
            }
        }
    }

    /// Whether it is young enough, and has counters left, to seal.
    pub fn can_seal(&self, now: Now) -> bool {
        !self.is_expired(now) && self.sent() < REJECT_AFTER_MESSAGES
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
    /// by number of messages (§6.2; so does the kernel).
    pub fn wants_rekey_to_send(&self, now: Now) -> bool {
        self.sent() > REKEY_AFTER_MESSAGES
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

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

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

    fn at_counter(sent: u64) -> Keypair {
        let keypair = keypair(0, Role::Responder, START);
        keypair.sent.0.store(sent, Relaxed);
        keypair
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
            let keypair = keypair(0, role, START);
            keypair.sent.0.store(REKEY_AFTER_MESSAGES, Relaxed);
            assert!(!keypair.wants_rekey_to_send(START));
            keypair.reserve(1);
            assert!(keypair.wants_rekey_to_send(START));
        }
    }
}
