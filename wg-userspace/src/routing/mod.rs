//! Allowed IPs: which peer owns an address.
//!
//! [`AllowedIps`] is what control writes: prefixes with their owners, each in one place, moved
//! between peers as `wg set` wants it. [`RoutingTable`] is what workers read: inbound, the owner of
//! an inner source must be the peer that sent it; outbound, the owner of the destination gets the
//! packet. The longest prefix names the owner, for the whole device and not peer by peer: otherwise
//! a peer with a short prefix could speak for an address inside another peer's longer one.
//!
//! The writer's table *is* the next snapshot: [`AllowedIps::snapshot`] clones one `Arc`. A later
//! change copies the part that it touches if a published snapshot still shares it, and shares the
//! rest. So a snapshot never changes, and one prefix among a million copies some hundred kilobytes.
//!
//! In both families a table is the function "address → longest prefix around it", written out flat:
//! each place holds the owner *and the length* of the prefix that won it. A prefix wins what no longer
//! one won inside its range: inserting it writes its owner there, removing it writes the owner of the
//! prefix around it. No tree of prefixes is walked, by writer or reader.
//! - IPv4 ([`v4`]): DIR-16-8-8, at most three loads.
//! - IPv6 ([`v6`]): a sorted list of ranges in leaves of 128, two binary searches.
//!
//! This room knows nothing of keys, endpoints or packets. Its snapshots go to `datapath`, its
//! changes come from `device`.

mod prefixes;
#[cfg(test)]
mod tests;
mod v4;
mod v6;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hashbrown::HashSet;
use ipnet::IpNet;
use wg_common::id::PeerId;

/// The allowed IPs of a device's peers, as control keeps and changes them.
#[derive(Debug, Default)]
pub struct AllowedIps {
    prefixes: prefixes::Prefixes,
    table: Arc<RoutingTable>,
    /// Prefixes whose owners may be others than whoever keeps a second table knows, if there is one.
    changed: Option<HashSet<IpNet>>,
}

/// Which peer owns an address: a snapshot of [`AllowedIps`], shared by all workers.
#[derive(Clone, Debug, Default)]
pub struct RoutingTable {
    v4: v4::Table,
    v6: v6::Table,
}

/// A prefix that won an address: its owner and its length.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Route {
    peer: PeerId,
    len: u8,
}

impl AllowedIps {
    /// Greatest [`PeerId`] that may own a prefix: 33 million peers, since a slot of the IPv4 table
    /// holds a prefix length and a flag beside the owner.
    pub const PEER_MAX: PeerId = PeerId(v4::PEER_MAX);

    /// Gives a prefix to `peer` and says who owned that very prefix before (maybe `peer` itself).
    ///
    /// Host bits of `net` are ignored. Whether new or not, the prefix is now the last one of
    /// [`AllowedIps::of_peer`].
    ///
    /// # Panics
    /// If `peer` is greater than [`AllowedIps::PEER_MAX`].
    pub fn insert(&mut self, net: IpNet, peer: PeerId) -> Option<PeerId> {
        assert!(peer <= Self::PEER_MAX, "peer {peer} is beyond the greatest that can be routed to");
        let net = net.trunc();
        let previous = self.prefixes.insert(net, peer);
        if previous != Some(peer) {
            self.note(net);
            let table = Arc::make_mut(&mut self.table);
            match net {
                IpNet::V4(net) => table.v4.insert(net, peer),
                IpNet::V6(net) => table.v6.insert(net, peer),
            }
        }
        previous
    }

    /// Takes a prefix away from `peer`; false, and no change, if that very prefix is not its own.
    ///
    /// Host bits of `net` are ignored.
    pub fn remove(&mut self, net: IpNet, peer: PeerId) -> bool {
        let net = net.trunc();
        if self.prefixes.owner(net) != Some(peer) {
            return false;
        }
        self.prefixes.remove(net);
        self.note(net);
        let around = self.prefixes.around(net);
        let table = Arc::make_mut(&mut self.table);
        match net {
            IpNet::V4(net) => table.v4.remove(net, around),
            IpNet::V6(net) => table.v6.remove(net, around),
        }
        true
    }

    /// Takes all its prefixes away from `peer`.
    pub fn remove_peer(&mut self, peer: PeerId) {
        for net in self.of_peer(peer).collect::<Vec<_>>() {
            self.remove(net, peer);
        }
    }

    /// Who owns this very prefix. Host bits of `net` are ignored.
    pub fn owner(&self, net: IpNet) -> Option<PeerId> {
        self.prefixes.owner(net.trunc())
    }

    /// The prefixes of `peer`, in the order in which it got them (as the kernel lists them).
    pub fn of_peer(&self, peer: PeerId) -> impl Iterator<Item = IpNet> {
        self.prefixes.of_peer(peer)
    }

    /// Number of prefixes of all peers.
    pub fn len(&self) -> usize {
        self.prefixes.len()
    }

    /// Whether no peer owns anything.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// From now on takes note of changes, for [`AllowedIps::take_changes`]. There must be no prefixes yet.
    pub fn note_changes(&mut self) {
        debug_assert!(self.is_empty(), "what is there already is not noted");
        self.changed.get_or_insert_default();
    }

    /// As [`AllowedIps::note_changes`], at any time: what is there already is noted, too.
    pub fn note_all(&mut self) {
        self.changed.get_or_insert_default().extend(self.prefixes.nets());
    }

    fn note(&mut self, net: IpNet) {
        if let Some(changed) = &mut self.changed {
            changed.insert(net);
        }
    }

    /// At most so many prefixes that may have changed hands since they were given here the last time, each
    /// with its owner as it is now, if it has one. Whoever applies all of them, in any order, has the owners
    /// of every prefix.
    pub fn take_changes(&mut self, max: usize) -> Vec<(IpNet, Option<PeerId>)> {
        let Some(changed) = &mut self.changed else { return Vec::new() };
        let taken: Vec<IpNet> = changed.extract_if(|_| true).take(max).collect();
        if changed.is_empty() {
            // What a million prefixes needed once is not kept for ever.
            changed.shrink_to_fit();
        }
        taken.into_iter().map(|net| (net, self.prefixes.owner(net))).collect()
    }

    /// Whether [`AllowedIps::take_changes`] has something to give.
    pub fn has_changes(&self) -> bool {
        self.changed.as_ref().is_some_and(|changed| !changed.is_empty())
    }

    /// The table as it is now; it will not change.
    ///
    /// Costs one reference count. The next change after it copies what it touches, as long as the
    /// snapshot lives; who lets go of the last reference frees what only that snapshot held.
    pub fn snapshot(&self) -> Arc<RoutingTable> {
        Arc::clone(&self.table)
    }
}

impl RoutingTable {
    /// The peer that owns `addr`.
    ///
    /// An IPv4-mapped IPv6 address is an IPv6 address here.
    #[inline]
    pub fn lookup(&self, addr: IpAddr) -> Option<PeerId> {
        match addr {
            IpAddr::V4(addr) => self.lookup_v4(addr),
            IpAddr::V6(addr) => self.lookup_v6(addr),
        }
    }

    /// The peer that owns an IPv4 address.
    #[inline]
    pub fn lookup_v4(&self, addr: Ipv4Addr) -> Option<PeerId> {
        self.v4.lookup(addr)
    }

    /// The peer that owns an IPv6 address.
    #[inline]
    pub fn lookup_v6(&self, addr: Ipv6Addr) -> Option<PeerId> {
        self.v6.lookup(addr)
    }
}
