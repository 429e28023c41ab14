//! Packets that wait for a keypair with their peer, in order, bounded for each peer and in all.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use wg_common::id::PeerId;
use wg_common::outcome::DropReason;
use wg_common::protocol::{REKEY_ATTEMPT_TIME, REKEY_TIMEOUT, STAGED_PACKETS_MAX};
use wg_common::time::Now;

use crate::counters::Counters;
use crate::session::HotPeer;

/// Bytes that one worker keeps staged for all peers together.
const STAGED_BYTES_MAX: usize = 16 << 20;

/// A handshake that was last asked for this long ago was given up, or never begun: its newest packet
/// asks for one until the first repetition, which is when the last Rekey-Attempt-Time can begin, and
/// the last repetition waits for Rekey-Timeout too.
const WAIT_MAX: Duration = REKEY_ATTEMPT_TIME.saturating_add(REKEY_TIMEOUT.saturating_mul(3));

/// One worker's staged packets.
#[derive(Default)]
pub struct Staging {
    /// In order of their ids, so that the same input is always answered in the same order.
    peers: BTreeMap<PeerId, Staged>,
    bytes: usize,
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
        if self.bytes + packet.len() > STAGED_BYTES_MAX {
            counters.drop(DropReason::StagedFull, 1);
            return;
        }
        if self.peers.contains_key(&peer.id) && !self.holds(peer) {
            // Its id was that of a peer which is gone.
            while self.pop(peer.id).is_some() {
                counters.drop(DropReason::NoPeer, 1);
            }
        }
        if self.peers.get(&peer.id).is_some_and(Staged::is_given_up) {
            self.drop_given_up(counters);
        }
        let staged = self.peers.entry(peer.id).or_insert_with(|| Staged {
            peer: Arc::clone(peer),
            packets: VecDeque::new(),
            newest: now,
            give_up_count: peer.give_up_count.load(Ordering::Relaxed),
        });
        staged.newest = now;
        if staged.packets.len() == STAGED_PACKETS_MAX {
            let oldest = staged.packets.pop_front().expect("it is full");
            self.bytes -= oldest.len();
            staged.peer.staged.fetch_sub(1, Ordering::Relaxed);
            counters.drop(DropReason::StagedFull, 1);
        }
        self.bytes += packet.len();
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
            self.bytes -= staged.packets.iter().map(|packet| packet.len()).sum::<usize>();
            false
        });
    }

    /// Takes the oldest packet of `peer`.
    pub fn pop(&mut self, peer: PeerId) -> Option<Box<[u8]>> {
        let staged = self.peers.get_mut(&peer)?;
        let packet = staged.packets.pop_front();
        if let Some(packet) = &packet {
            self.bytes -= packet.len();
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
