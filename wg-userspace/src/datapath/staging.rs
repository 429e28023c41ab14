//! Packets that wait for a keypair with their peer, in order, bounded for each peer and in all.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use wg_common::id::PeerId;
use wg_common::outcome::DropReason;
use wg_common::protocol::{REKEY_ATTEMPT_TIME, REKEY_TIMEOUT, STAGED_PACKETS_MAX};
use wg_common::time::Now;

use crate::counters::Counters;
use crate::session::HotPeer;

/// Bytes that all workers of a process keep staged, for all peers of all devices together.
const STAGED_BYTES_MAX: usize = 32 << 20;
/// What a staged packet costs beside its own bytes: its place in the queue, and the allocator's.
const PACKET_COST: usize = 64;

/// A handshake that was last asked for this long ago was given up, or never begun: its newest packet
/// asks for one until the first repetition, which is when the last Rekey-Attempt-Time can begin, and
/// the last repetition waits for Rekey-Timeout too.
const WAIT_MAX: Duration = REKEY_ATTEMPT_TIME.saturating_add(REKEY_TIMEOUT.saturating_mul(3));

/// The bytes that may be staged, from which all workers take. Without a lock.
#[derive(Debug)]
pub struct Budget {
    left: AtomicUsize,
}

impl Default for Budget {
    fn default() -> Self {
        Self::of(STAGED_BYTES_MAX)
    }
}

impl Budget {
    fn of(bytes: usize) -> Self {
        Self { left: AtomicUsize::new(bytes) }
    }

    /// Takes as much as a packet of `len` bytes costs, if that much is left.
    fn take(&self, len: usize) -> bool {
        let cost = len + PACKET_COST;
        let left_after = |left: usize| left.checked_sub(cost);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left_after).is_ok()
    }

    /// Gives back what was taken for a packet of `len` bytes.
    fn give_back(&self, len: usize) {
        self.left.fetch_add(len + PACKET_COST, Ordering::Relaxed);
    }
}

/// One worker's staged packets.
pub struct Staging {
    /// In order of their ids, so that the same input is always answered in the same order.
    peers: BTreeMap<PeerId, Staged>,
    budget: Arc<Budget>,
}

struct Staged {
    peer: Arc<HotPeer>,
    packets: VecDeque<Box<[u8]>>,
    /// When the newest of them came.
    newest: Now,
    /// The peer's `give_up_count` when the first of them came.
    give_up_count: u32,
}

impl Staged {
    /// Whether the handshake that the packets wait for was given up.
    fn is_given_up(&self) -> bool {
        self.peer.give_up_count.load(Ordering::Relaxed) != self.give_up_count
    }
}

impl Staging {
    /// Nothing yet; what comes is taken from `budget`.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self { peers: BTreeMap::new(), budget }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// Whether packets wait for a keypair with `peer`.
    pub fn holds(&self, peer: &Arc<HotPeer>) -> bool {
        self.peers.get(&peer.id).is_some_and(|staged| Arc::ptr_eq(&staged.peer, peer))
    }

    /// Stages a packet behind the peer's others. The oldest makes room for the newest.
    pub fn push(&mut self, peer: &Arc<HotPeer>, packet: &[u8], counters: &Counters, now: Now) {
        if self.peers.contains_key(&peer.id) && !self.holds(peer) {
            // Its id was that of a peer which is gone.
            while self.pop(peer.id).is_some() {
                counters.drop(DropReason::NoPeer, 1);
            }
        }
        if self.peers.get(&peer.id).is_some_and(Staged::is_given_up) {
            self.drop_given_up(counters);
        }
        if self.peers.get(&peer.id).is_some_and(|staged| staged.packets.len() == STAGED_PACKETS_MAX)
        {
            self.pop(peer.id);
            counters.drop(DropReason::StagedFull, 1);
        }
        if !self.budget.take(packet.len()) {
            counters.drop(DropReason::StagedFull, 1);
            return;
        }
        let staged = self.peers.entry(peer.id).or_insert_with(|| Staged {
            peer: Arc::clone(peer),
            packets: VecDeque::new(),
            newest: now,
            give_up_count: peer.give_up_count.load(Ordering::Relaxed),
        });
        staged.newest = now;
        staged.packets.push_back(packet.into());
        staged.peer.staged.fetch_add(1, Ordering::Relaxed);
    }

    /// A peer that has a keypair, so that its packets can go now, if there is one.
    pub fn ready(&self, has_keypair: impl Fn(&HotPeer) -> bool) -> Option<Arc<HotPeer>> {
        let staged = self.peers.values().find(|staged| has_keypair(&staged.peer))?;
        Some(Arc::clone(&staged.peer))
    }

    /// Drops what waits for a handshake that was given up (§6.4).
    pub fn drop_given_up(&mut self, counters: &Counters) {
        self.drop_for(counters, |staged| {
            staged.is_given_up().then_some(DropReason::HandshakeFailed)
        });
    }

    /// Drops everything.
    pub fn clear(&mut self, counters: &Counters, reason: DropReason) {
        self.drop_for(counters, |_| Some(reason));
    }

    fn drop_for(&mut self, counters: &Counters, reason: impl Fn(&Staged) -> Option<DropReason>) {
        self.peers.retain(|_, staged| {
            let Some(reason) = reason(staged) else { return true };
            let count = staged.packets.len();
            counters.drop(reason, count as u64);
            staged.peer.staged.fetch_sub(count as u32, Ordering::Relaxed);
            staged.packets.iter().for_each(|packet| self.budget.give_back(packet.len()));
            false
        });
    }

    /// Takes the oldest packet of `peer`.
    pub fn pop(&mut self, peer: PeerId) -> Option<Box<[u8]>> {
        let staged = self.peers.get_mut(&peer)?;
        let packet = staged.packets.pop_front();
        if let Some(packet) = &packet {
            self.budget.give_back(packet.len());
            staged.peer.staged.fetch_sub(1, Ordering::Relaxed);
        }
        if staged.packets.is_empty() {
            self.peers.remove(&peer);
        }
        packet
    }

    /// Drops all that waits for longer than any handshake is tried, and what no peer waits for any more
    /// (`is_peer` says which still exist).
    pub fn expire(
        &mut self,
        counters: &Counters,
        is_peer: impl Fn(&Arc<HotPeer>) -> bool,
        now: Now,
    ) {
        self.drop_for(counters, |staged| {
            if !is_peer(&staged.peer) {
                Some(DropReason::NoPeer)
            } else if now.since(staged.newest) > WAIT_MAX {
                Some(DropReason::HandshakeFailed)
            } else {
                None
            }
        });
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Other devices may use it.
        let packets = self.peers.values().flat_map(|staged| &staged.packets);
        packets.for_each(|packet| self.budget.give_back(packet.len()));
    }
}

#[cfg(test)]
mod tests {
    use wg_common::id::DeviceId;

    use super::*;
    use crate::counters::Totals;
    use crate::key::PublicKey;

    const START: Now = Now::from_boot_ns(1_000_000_000);

    fn peer(id: u32) -> Arc<HotPeer> {
        Arc::new(HotPeer::new(PeerId(id), DeviceId(0), PublicKey::from_bytes([id as u8; 32])))
    }

    fn left(budget: &Budget) -> usize {
        budget.left.load(Ordering::Relaxed)
    }

    fn full(counters: &Counters) -> u64 {
        Totals::sum([counters]).dropped(DropReason::StagedFull)
    }

    #[test]
    fn workers_share_one_budget_and_every_way_out_gives_back() {
        const LEN: usize = 1000;
        let budget = Arc::new(Budget::of(5 * (LEN + PACKET_COST)));
        let counters = Counters::default();
        let mut workers = [0, 1].map(|_| Staging::new(Arc::clone(&budget)));
        let peers = [peer(1), peer(2)];
        let push = |staging: &mut Staging, peer: &Arc<HotPeer>| {
            staging.push(peer, &[0; LEN], &counters, START);
        };
        for _ in 0..3 {
            push(&mut workers[0], &peers[0]);
            push(&mut workers[1], &peers[1]);
        }
        assert_eq!((left(&budget), full(&counters)), (0, 1), "the other worker took the last part");
        assert!(!workers[1].peers.is_empty());

        assert_eq!(workers[0].pop(PeerId(1)).unwrap().len(), LEN);
        assert_eq!(left(&budget), LEN + PACKET_COST);
        push(&mut workers[1], &peers[1]);
        assert_eq!((left(&budget), full(&counters)), (0, 1));

        workers[0].clear(&counters, DropReason::InterfaceDown);
        assert_eq!(left(&budget), 2 * (LEN + PACKET_COST));
        drop(workers);
        assert_eq!(left(&budget), 5 * (LEN + PACKET_COST));
    }

    #[test]
    fn who_finds_no_room_leaves_nothing_behind() {
        let budget = Arc::new(Budget::of(100));
        let counters = Counters::default();
        let mut staging = Staging::new(Arc::clone(&budget));
        staging.push(&peer(1), &[0; 60], &counters, START);
        assert!(staging.is_empty());
        assert_eq!((left(&budget), full(&counters)), (100, 1));
    }

    #[test]
    fn the_oldest_makes_room_for_the_newest_in_a_budget_that_is_used_up() {
        let budget = Arc::new(Budget::of(STAGED_PACKETS_MAX * (1 + PACKET_COST)));
        let counters = Counters::default();
        let (mut staging, peer) = (Staging::new(Arc::clone(&budget)), peer(1));
        for number in 0..=STAGED_PACKETS_MAX {
            staging.push(&peer, &[number as u8], &counters, START);
        }
        assert_eq!((left(&budget), full(&counters)), (0, 1));
        assert_eq!(peer.staged.load(Ordering::Relaxed) as usize, STAGED_PACKETS_MAX);
        assert_eq!(staging.pop(peer.id).unwrap()[..], [1]);
    }

    #[test]
    fn threads_never_take_more_than_there_is() {
        let budget = Budget::of(100 * (10 + PACKET_COST));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        let taken = (0..40).filter(|_| budget.take(10)).count();
                        (0..taken).for_each(|_| budget.give_back(10));
                    }
                });
            }
        });
        assert_eq!((0..101).filter(|_| budget.take(10)).count(), 100);
    }
}
