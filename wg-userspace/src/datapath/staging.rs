//! Packets that wait for a keypair with their peer, in order, bounded for each peer and in all.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hashbrown::HashMap;
use wg_common::id::PeerId;
use wg_common::outcome::DropReason;
use wg_common::protocol::{REKEY_ATTEMPT_TIME, STAGED_PACKETS_MAX};
use wg_common::time::Now;

use crate::counters::Counters;
use crate::session::HotPeer;

/// Bytes that one worker keeps staged for all peers together.
const STAGED_BYTES_MAX: usize = 16 << 20;

/// One worker's staged packets.
#[derive(Default)]
pub struct Staging {
    peers: HashMap<PeerId, Staged>,
    bytes: usize,
}

struct Staged {
    peer: Arc<HotPeer>,
    packets: VecDeque<Box<[u8]>>,
    since: Now,
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
        let staged = self.peers.entry(peer.id).or_insert_with(|| Staged {
            peer: Arc::clone(peer),
            packets: VecDeque::new(),
            since: now,
        });
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

    /// A peer whose packets can go now, if there is one.
    pub fn ready(&self, now: Now) -> Option<Arc<HotPeer>> {
        let staged = self
            .peers
            .values()
            .find(|staged| staged.peer.keypairs.load().seals_with(now).is_some())?;
        Some(Arc::clone(&staged.peer))
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

    /// Drops all that waits for a peer whose first packet has waited for longer than a handshake is
    /// tried, and what no peer waits for any
    /// more (`is_peer` says which still exist).
    pub fn expire(
        &mut self,
        counters: &Counters,
        is_peer: impl Fn(&Arc<HotPeer>) -> bool,
        now: Now,
    ) {
        self.peers.retain(|_, staged| {
            let reason = if !is_peer(&staged.peer) {
                DropReason::NoPeer
            } else if now.since(staged.since) > REKEY_ATTEMPT_TIME {
                DropReason::HandshakeFailed
            } else {
                return true;
            };
            let count = staged.packets.len();
            counters.drop(reason, count as u64);
            staged.peer.staged.fetch_sub(count as u32, Ordering::Relaxed);
            self.bytes -= staged.packets.iter().map(|packet| packet.len()).sum::<usize>();
            false
        });
    }
}
