//! Finds out by which links peers are reached: from which address of ours, how large packets may be, and what
//! stands before them if an XSK sends.
//!
//! This process may not ask the kernel for routes; the keeper does. It is asked for all peers that are
//! awake when routes or links change, and for one alone when a worker has packets for it and does not
//! know, or its endpoint has moved.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand_core::Rng as _;
use wg_common::endpoint::Endpoint;
use wg_common::headers::OuterHeaders;
use wg_common::time::Now;

use super::control::Control;
use crate::host::{NeighbourOf, Towards};
use crate::keeper::Keeper;
use crate::keeper::protocol::{HopTowards, LINKS_MAX, LinkTowards};
use crate::session::{Hop, HotPeer, LinkWay};
use crate::sys::random;

/// Peers that move all the time are looked for no more often than this.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Ways by which XSKs send are looked at this often, if nothing has changed: sooner than the kernel lets go
/// of a neighbour that nobody uses.
const REFRESH_EVERY: Duration = Duration::from_secs(10);

impl Control {
    /// Looks anew at the way to each peer that is awake, since routes or links have changed.
    ///
    /// Peers are sent to from another address of ours where the route to them now leaves by another link
    /// than the one on which they dialled. IPv4 alone, as in the kernel's WireGuard.
    pub async fn routes_changed(&self) {
        let Some(keeper) = &self.keeper else { return };
        self.handshakes.forget_ways_of_sleepers();
        for some in self.handshakes.awake_peers().chunks(LINKS_MAX) {
            if !self.look_at_ways(keeper, some) {
                return;
            }
            // There may be more to do than this.
            tokio::task::yield_now().await;
        }
    }

    /// Looks at the ways to peers that workers have asked for.
    pub(super) fn ways_tick(&self, now: Now) {
        let Some(keeper) = &self.keeper else { return };
        if now.since(self.ways_looked.get()) < LOOK_EVERY {
            return;
        }
        self.ways_looked.set(now);
        self.gather_ways_in_use(now);
        let mut in_use = self.ways_in_use.borrow_mut();
        let unknown = std::iter::from_fn(|| self.shared.take_unknown_way());
        let peers = unknown.chain(std::iter::from_fn(|| in_use.pop()));
        let peers: Vec<_> = peers.take(LINKS_MAX).collect();
        drop(in_use);
        if !peers.is_empty() {
            self.look_at_ways(keeper, &peers);
        }
    }

    /// Has the ways by which XSKs send looked at now and then. What they send the kernel does not see: it
    /// would not ask whether a neighbour is still there, and does not tell when it learns that a path is
    /// narrower.
    fn gather_ways_in_use(&self, now: Now) {
        if !self.shared.crew.transmits() || now.since(self.ways_gathered.get()) < REFRESH_EVERY {
            return;
        }
        self.ways_gathered.set(now);
        let mut peers = self.handshakes.awake_peers();
        peers.retain(|peer| peer.way.load().as_ref().is_some_and(|way| way.take_used()));
        *self.ways_in_use.borrow_mut() = peers;
    }

    /// Has XSKs send to where neighbours are now; nothing is sent by one to those that are gone.
    pub fn neighbours_moved(&self, moved: &HashMap<NeighbourOf, Option<[u8; 6]>>) {
        for peer in self.handshakes.awake_peers() {
            let way = peer.way.load_full();
            let Some((way, hop)) = way.as_ref().and_then(|way| Some((way, way.hop()?))) else {
                continue;
            };
            if let Some(&mac) = moved.get(&(hop.link, hop.neighbour)) {
                tracing::debug!(peer = %peer.label(), neighbour = %hop.neighbour, "the neighbour moved");
                peer.way.store(Some(Arc::new(way.with_neighbour_at(mac))));
            }
        }
    }

    /// At most [`LINKS_MAX`] of them. Says whether the kernel told.
    fn look_at_ways(&self, keeper: &Keeper, peers: &[Arc<HotPeer>]) -> bool {
        let mut asked = Vec::with_capacity(peers.len());
        for peer in peers {
            peer.inner_mtu.begin_look();
            if let Some(endpoint) = peer.endpoint.load_full() {
                asked.push((peer, endpoint));
            }
        }
        let port = self.shared.sockets.load().port;
        let towards = asked.iter().map(|(_, endpoint)| towards(endpoint, port)).collect();
        let with_hops = self.shared.crew.transmits();
        let links = match keeper.links_towards(self.fwmark.get(), with_hops, towards) {
            Ok(links) => links,
            Err(error) => {
                tracing::warn!(%error, "routes are not known: peers keep the address that they dialled");
                // Until routes change, it would be asked in vain again.
                for (peer, endpoint) in asked {
                    peer.way.store(Some(Arc::new(LinkWay::new(&endpoint, None))));
                    if peer.inner_mtu.is_unknown() {
                        peer.inner_mtu.set(None, endpoint.remote.is_ipv6());
                    }
                }
                return false;
            }
        };
        let addresses = self.shared.host_addresses.load();
        for ((peer, endpoint), link) in asked.into_iter().zip(links) {
            follow(peer, &endpoint, link);
            if with_hops {
                let hop = link.and_then(|link| hop_by(&endpoint, link));
                // The kernel does not always say if the address that a peer dialled is gone.
                let hop = hop.filter(|hop| addresses.contains(&hop.headers.src.ip()));
                publish(peer, &endpoint, hop);
            }
        }
        true
    }
}

/// The first hop towards `endpoint`.
fn hop_by(endpoint: &Endpoint, by: LinkTowards) -> Option<Hop> {
    let LinkTowards { link, hop, .. } = by;
    let HopTowards { neighbour, source, hop_limit, mtu, src_mac, dst_mac } = hop?;
    let (is_resolved, dst_mac) = (dst_mac.is_some(), dst_mac.unwrap_or_default());
    let (src, dst) = (SocketAddr::new(source, 0), SocketAddr::new(endpoint.remote.ip(), 0));
    if src.is_ipv4() != dst.is_ipv4() {
        return None;
    }
    let tags = [None, None];
    let headers = OuterHeaders { dst_mac, src_mac, tags, src, dst, tos: 0, ttl: hop_limit, id: 0 };
    Some(Hop { link, neighbour, mtu: mtu as usize, headers, is_resolved })
}

/// Lets workers send to `endpoint` by `hop`, or by the socket if that is nothing.
fn publish(peer: &HotPeer, endpoint: &Endpoint, hop: Option<Hop>) {
    if peer.way.load().is_none() {
        // Not where an earlier process, or another peer at this address, has begun.
        peer.datagram_id.store(random::Rng.next_u32(), Ordering::Relaxed);
    }
    peer.way.store(Some(Arc::new(LinkWay::new(endpoint, hop))));
}

fn towards(endpoint: &Endpoint, port: u16) -> Towards {
    let link = match endpoint.remote {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(remote) => remote.scope_id(),
    };
    let source = endpoint.local.map(|local| local.addr);
    let ports = Some((port, endpoint.remote.port()));
    Towards { remote: endpoint.remote.ip(), source, link, ports }
}

/// Takes over what leads to `endpoint`, the peer's.
fn follow(peer: &HotPeer, endpoint: &Endpoint, found: Option<LinkTowards>) {
    let is_v6 = endpoint.remote.is_ipv6();
    peer.inner_mtu.set(found.map(|found| found.mtu), is_v6);
    let Some(local) = endpoint.local.filter(|local| local.ifindex != 0) else { return };
    let dialled_v4 = matches!(local.addr, IpAddr::V4(_)) && !is_v6;
    if dialled_v4 && found.is_some_and(|found| found.link != local.ifindex) {
        tracing::debug!(peer = %peer.label(), "another link leads to it now");
        peer.forget_local_source();
    }
}

#[cfg(test)]
mod tests {
    use wg_common::endpoint::LocalSource;
    use wg_common::id::{DeviceId, PeerId};

    use super::*;
    use crate::key::PublicKey;

    fn endpoint(remote: &str, local: Option<(&str, u32)>) -> Endpoint {
        let local =
            local.map(|(addr, ifindex)| LocalSource { addr: addr.parse().unwrap(), ifindex });
        Endpoint { remote: remote.parse().unwrap(), local }
    }

    #[test]
    fn what_is_settled_of_a_way_is_asked_with_it() {
        let asked = towards(&endpoint("192.0.2.1:7", Some(("192.0.2.9", 4))), 51820);
        assert_eq!(asked.ports, Some((51820, 7)));
        assert_eq!(asked.source, Some("192.0.2.9".parse().unwrap()));
        assert_eq!(asked.link, 0, "the route is asked for, and may be another now");
        assert_eq!(towards(&endpoint("[fe80::1%5]:7", None), 1).link, 5);
    }

    #[test]
    fn a_way_by_another_link_has_another_source_and_another_mtu() {
        let cases = [
            ("192.0.2.1:7", "192.0.2.9", 4, Some((4, 1400)), true, 1340),
            ("192.0.2.1:7", "192.0.2.9", 4, Some((5, 1400)), false, 1340),
            ("192.0.2.1:7", "192.0.2.9", 0, Some((5, 1400)), true, 1340),
            ("192.0.2.1:7", "192.0.2.9", 4, None, true, 1420),
            ("[fd00::1]:7", "fd00::9", 4, Some((5, 1400)), true, 1320),
        ];
        for (remote, source, ifindex, found, keeps, mtu) in cases {
            let peer = HotPeer::new(PeerId(0), DeviceId(0), PublicKey::from_bytes([0; 32]));
            let endpoint = endpoint(remote, Some((source, ifindex)));
            peer.endpoint.store(Some(Arc::new(endpoint)));
            follow(&peer, &endpoint, found.map(|(link, mtu)| LinkTowards { link, mtu, hop: None }));
            assert_eq!(peer.endpoint.load().as_ref().unwrap().local.is_some(), keeps, "{remote}");
            assert_eq!(peer.inner_mtu.mtu(true, 1420), mtu, "{remote}");
        }
    }
}
