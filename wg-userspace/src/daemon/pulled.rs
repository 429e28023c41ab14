//! What control remembers of pulled peers: when each may go, and which timestamps a source is to keep.
//!
//! Decisions only: `now` is an argument, and nothing here asks or removes anybody.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use wg_common::time::Now;

use crate::device::Tai64N;
use crate::key::PublicKey;

/// A pulled peer goes when its last keypair has been dead for so long.
pub const IDLE_TIME: Duration = Duration::from_secs(300);
/// Time between two timestamps of one peer. A peer in use makes a handshake every two minutes.
pub const TIMESTAMP_INTERVAL: Duration = Duration::from_secs(5);

/// When each pulled peer is looked at, to see whether it is idle.
///
/// A peer costs nothing between: it is looked at when it could have been idle for long enough.
#[derive(Debug)]
pub struct IdleWatch {
    idle_time: Duration,
    /// When a peer is looked at next.
    peers: HashMap<PublicKey, Now>,
    /// With entries of peers that have gone or were put off.
    queue: BinaryHeap<Reverse<(Now, PublicKey)>>,
}

impl IdleWatch {
    /// Watches nobody yet.
    pub fn new(idle_time: Duration) -> Self {
        Self { idle_time, peers: HashMap::new(), queue: BinaryHeap::new() }
    }

    /// Watches a peer that was busy until `busy_until`, or will be.
    pub fn watch(&mut self, key: PublicKey, busy_until: Now) {
        let at = busy_until + self.idle_time;
        self.peers.insert(key, at);
        self.queue.push(Reverse((at, key)));
    }

    /// Watches a peer no longer; says whether it did.
    pub fn forget(&mut self, key: &PublicKey) -> bool {
        self.peers.remove(key).is_some()
    }

    /// The next peer to be looked at by `now`, if there is one: it is to be watched again, or
    /// forgotten, before the next call.
    pub fn due(&mut self, now: Now) -> Option<PublicKey> {
        while let Some(&Reverse((at, key))) = self.queue.peek() {
            if at > now {
                return None;
            }
            self.queue.pop();
            if self.peers.get(&key) == Some(&at) {
                return Some(key);
            }
        }
        None
    }

    /// Whether a peer that was busy until `busy_until` has been idle for long enough at `now`.
    pub fn is_idle(&self, busy_until: Now, now: Now) -> bool {
        busy_until + self.idle_time <= now
    }

    /// Number of peers that are watched.
    pub fn count(&self) -> usize {
        self.peers.len()
    }
}

/// Which timestamps a source has kept, and which it is to keep.
///
/// At most one per peer is under way, and the next one is not sent before [`TIMESTAMP_INTERVAL`] has
/// passed. One that fails is not repeated, for the next handshake brings a greater one, except when the
/// peer leaves: then there is no next.
#[derive(Debug, Default)]
pub struct TimestampKeeper {
    peers: HashMap<PublicKey, Kept>,
    /// When a greater one may be sent.
    later: BinaryHeap<Reverse<(Now, PublicKey)>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    /// The greatest that the source was told, or that it told us.
    told: Tai64N,
    /// The greatest there is.
    greatest: Tai64N,
    under_way: bool,
    /// The last one that was sent was not kept.
    failed: bool,
    /// When the last one was sent.
    sent: Option<Now>,
    is_in_later: bool,
    /// The peer has gone; this record goes when nothing is under way.
    left: bool,
}

impl TimestampKeeper {
    /// Begins with a peer whose timestamp the source keeps already. Gives the greatest one that is
    /// known of it: one that is under way may be greater than what the source has just said.
    pub fn begin(&mut self, key: PublicKey, told: Tai64N) -> Tai64N {
        let kept = self.peers.entry(key).or_default();
        kept.left = false;
        kept.told = kept.told.max(told);
        kept.greatest = kept.greatest.max(told);
        kept.greatest
    }

    /// Takes note of a timestamp. Gives what is to be sent to the source now, if anything is.
    pub fn seen(&mut self, key: &PublicKey, timestamp: Tai64N, now: Now) -> Option<Tai64N> {
        let kept = self.peers.get_mut(key)?;
        kept.greatest = kept.greatest.max(timestamp);
        self.next(key, now)
    }

    /// The peer goes; what is not kept yet is to be sent now, without regard to the interval.
    pub fn leave(&mut self, key: &PublicKey, timestamp: Tai64N, now: Now) -> Option<Tai64N> {
        let kept = self.peers.get_mut(key)?;
        kept.greatest = kept.greatest.max(timestamp);
        kept.left = true;
        if kept.failed {
            kept.told = Tai64N::default();
        }
        let next = self.next(key, now);
        self.tidy(key);
        next
    }

    /// The source is no longer told of this peer.
    pub fn forget(&mut self, key: &PublicKey) {
        self.peers.remove(key);
    }

    /// What was under way has failed; [`ended`](Self::ended) is to be called next.
    pub fn failed(&mut self, key: &PublicKey) {
        if let Some(kept) = self.peers.get_mut(key) {
            kept.failed = true;
        }
    }

    /// What was under way has ended, well or not. Gives what is to be sent now, if anything is.
    pub fn ended(&mut self, key: &PublicKey, now: Now) -> Option<Tai64N> {
        let kept = self.peers.get_mut(key)?;
        kept.under_way = false;
        let next = self.next(key, now);
        self.tidy(key);
        next
    }

    /// A timestamp that had to wait for its time, and whose it is.
    pub fn due(&mut self, now: Now) -> Option<(PublicKey, Tai64N)> {
        while let Some(&Reverse((at, key))) = self.later.peek() {
            if at > now {
                return None;
            }
            self.later.pop();
            if let Some(kept) = self.peers.get_mut(&key) {
                kept.is_in_later = false;
            }
            if let Some(timestamp) = self.next(&key, now) {
                return Some((key, timestamp));
            }
        }
        None
    }

    /// What is to be sent now; has it come back later if it is too early.
    fn next(&mut self, key: &PublicKey, now: Now) -> Option<Tai64N> {
        let kept = self.peers.get_mut(key)?;
        if kept.under_way || kept.greatest <= kept.told {
            return None;
        }
        let at = kept.sent.map(|sent| sent + TIMESTAMP_INTERVAL);
        if let Some(at) = at.filter(|&at| at > now && !kept.left) {
            if !kept.is_in_later {
                kept.is_in_later = true;
                self.later.push(Reverse((at, *key)));
            }
            return None;
        }
        (kept.under_way, kept.sent, kept.told) = (true, Some(now), kept.greatest);
        kept.failed = false;
        Some(kept.greatest)
    }

    fn tidy(&mut self, key: &PublicKey) {
        if let Entry::Occupied(entry) = self.peers.entry(*key)
            && entry.get().left
            && !entry.get().under_way
        {
            entry.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: Now = Now::from_boot_ns(1_000_000_000_000);
    const SECOND: Duration = Duration::from_secs(1);

    fn key(seed: u8) -> PublicKey {
        PublicKey::from_bytes([seed; 32])
    }

    fn stamp(number: u8) -> Tai64N {
        [number; 12]
    }

    #[test]
    fn a_peer_is_looked_at_when_it_could_be_idle() {
        let mut watch = IdleWatch::new(IDLE_TIME);
        watch.watch(key(1), START);
        watch.watch(key(2), START + SECOND);
        assert_eq!(watch.due(START + (IDLE_TIME - Duration::from_nanos(1))), None);
        assert_eq!(watch.due(START + IDLE_TIME), Some(key(1)));
        // It was busy in the meantime.
        watch.watch(key(1), START + SECOND * 10);
        assert_eq!(watch.due(START + IDLE_TIME + SECOND), Some(key(2)));
        assert!(watch.forget(&key(2)) && !watch.forget(&key(2)));
        assert_eq!(watch.due(START + IDLE_TIME + SECOND * 9), None);
        assert_eq!(watch.due(START + IDLE_TIME + SECOND * 10), Some(key(1)));
    }

    #[test]
    fn who_came_back_is_looked_at_once() {
        let mut watch = IdleWatch::new(IDLE_TIME);
        watch.watch(key(1), START);
        watch.forget(&key(1));
        watch.watch(key(1), START + SECOND);
        assert_eq!(watch.due(START + IDLE_TIME), None);
        assert_eq!(watch.due(START + IDLE_TIME + SECOND), Some(key(1)));
        watch.forget(&key(1));
        assert_eq!(watch.due(START + IDLE_TIME * 9), None);
        assert_eq!(watch.count(), 0);
    }

    #[test]
    fn one_timestamp_is_under_way_and_the_next_waits_for_its_time() {
        let mut keeper = TimestampKeeper::default();
        keeper.begin(key(1), stamp(1));
        assert_eq!(keeper.seen(&key(1), stamp(1), START), None, "kept already");
        assert_eq!(keeper.seen(&key(1), stamp(2), START), Some(stamp(2)));
        assert_eq!(keeper.seen(&key(1), stamp(3), START + SECOND * 9), None, "one is under way");
        assert_eq!(keeper.ended(&key(1), START + SECOND * 9), Some(stamp(3)));
        assert_eq!(keeper.ended(&key(1), START + SECOND * 10), None);
        for number in 4..8 {
            let early = keeper.seen(&key(1), stamp(number), START + SECOND * 10);
            assert_eq!(early, None);
        }
        assert_eq!(keeper.due(START + SECOND * 13), None);
        assert_eq!(keeper.due(START + SECOND * 14), Some((key(1), stamp(7))));
        assert_eq!(keeper.due(START + SECOND * 99), None);
    }

    #[test]
    fn what_the_source_failed_to_keep_is_sent_once_more_when_the_peer_leaves() {
        let mut keeper = TimestampKeeper::default();
        keeper.begin(key(1), stamp(1));
        assert_eq!(keeper.seen(&key(1), stamp(2), START), Some(stamp(2)));
        keeper.failed(&key(1));
        assert_eq!(keeper.ended(&key(1), START), None, "not now");
        let later = START + TIMESTAMP_INTERVAL * 100;
        assert_eq!(keeper.due(later), None, "nor by itself");
        assert_eq!(keeper.leave(&key(1), stamp(2), later), Some(stamp(2)));
        keeper.failed(&key(1));
        assert_eq!(keeper.ended(&key(1), later), None, "once");
        assert!(keeper.peers.is_empty());
    }

    #[test]
    fn what_is_not_kept_goes_with_the_peer() {
        let mut keeper = TimestampKeeper::default();
        keeper.begin(key(1), stamp(1));
        assert_eq!(keeper.seen(&key(1), stamp(2), START), Some(stamp(2)));
        assert_eq!(keeper.leave(&key(1), stamp(3), START), None, "one is under way");
        // Who looks the peer up meanwhile may not have been told yet.
        assert_eq!(keeper.begin(key(1), stamp(1)), stamp(3));
        assert_eq!(keeper.leave(&key(1), stamp(3), START), None);
        assert_eq!(keeper.ended(&key(1), START), Some(stamp(3)));
        assert_eq!(keeper.ended(&key(1), START), None);
        assert!(keeper.peers.is_empty());
        assert_eq!(keeper.due(START + SECOND * 99), None);

        keeper.begin(key(2), stamp(1));
        assert_eq!(keeper.leave(&key(2), stamp(1), START), None, "kept already");
        assert!(keeper.peers.is_empty());
    }

    proptest! {
        /// What is sent grows, is never early, never twice at once, and the greatest is sent in the end.
        #[test]
        fn the_greatest_timestamp_is_sent_in_the_end(
            steps in prop::collection::vec((0_u8..3, any::<u8>(), 0_u32..4), 1..80),
        ) {
            let mut keeper = TimestampKeeper::default();
            keeper.begin(key(1), stamp(0));
            let (mut now, mut sent, mut under_way) = (START, Vec::<(Now, Tai64N)>::new(), false);
            let mut greatest = stamp(0);
            let mut note = |now, what: Option<Tai64N>, under_way: &mut bool| {
                if let Some(timestamp) = what {
                    assert!(!*under_way);
                    *under_way = true;
                    if let Some(&(at, last)) = sent.last() {
                        assert!(timestamp > last && at + TIMESTAMP_INTERVAL <= now);
                    }
                    sent.push((now, timestamp));
                }
            };
            for (what, number, wait) in steps {
                now = now + SECOND * wait;
                match what {
                    0 => {
                        greatest = greatest.max(stamp(number));
                        note(now, keeper.seen(&key(1), stamp(number), now), &mut under_way);
                    }
                    1 if under_way => {
                        under_way = false;
                        note(now, keeper.ended(&key(1), now), &mut under_way);
                    }
                    _ => note(now, keeper.due(now).map(|due| due.1), &mut under_way),
                }
            }
            for _ in 0..2 {
                now = now + TIMESTAMP_INTERVAL;
                if std::mem::take(&mut under_way) {
                    note(now, keeper.ended(&key(1), now), &mut under_way);
                }
                note(now, keeper.due(now).map(|due| due.1), &mut under_way);
            }
            prop_assert_eq!(sent.last().map_or(stamp(0), |last| last.1), greatest);
        }
    }
}
