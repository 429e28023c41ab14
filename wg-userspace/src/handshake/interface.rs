//! What an interface that goes down or up, and another socket, mean to the sessions.

use std::sync::Arc;

use wg_common::time::Now;

use super::{Handshakes, Outside};
use crate::session::HotPeer;

impl<O: Outside> Handshakes<O> {
    /// Ends all keypairs and handshakes, as the kernel does when an interface goes down. To be called
    /// when workers and pool know that it is down.
    pub fn go_down(&self, now: Now) {
        self.clear_sessions(now);
        self.shared.wake_all();
    }

    /// Starts persistent keepalives. To be called when workers and pool know that the interface is up.
    pub fn go_up(&self, now: Now) {
        self.resume(now);
        // Packets wait in their queues.
        self.shared.wake_all();
    }

    /// Lets the routing table choose anew which address of ours each peer is sent to from. The kernel
    /// does the same when port or mark change.
    pub fn forget_local_sources(&self) {
        self.cells().iter().for_each(|cell| cell.hot.forget_local_source());
    }

    /// The peers that have keypairs. Costs nothing for those that rest.
    pub fn awake_peers(&self) -> Vec<Arc<HotPeer>> {
        // Who has a keypair wants to be called when that ends.
        let mut waiting = self.waiting_peers();
        // The same input is always answered in the same order.
        waiting.sort_unstable();
        let cells = self.cells();
        let awake = waiting.into_iter().filter_map(|peer| cells.get(peer));
        awake.filter(|cell| is_awake(&cell.hot)).map(|cell| Arc::clone(&cell.hot)).collect()
    }

    /// Has workers ask anew how large packets to each peer may be: a mark may lead to other routes.
    pub fn forget_ways(&self) {
        self.cells().iter().for_each(|cell| cell.hot.forget_way());
    }

    /// The same for peers that have no keypairs.
    pub fn forget_ways_of_sleepers(&self) {
        for cell in self.cells().iter().filter(|cell| !is_awake(&cell.hot)) {
            cell.hot.forget_way();
        }
    }
}

fn is_awake(peer: &HotPeer) -> bool {
    peer.keypairs.load().iter().next().is_some()
}
