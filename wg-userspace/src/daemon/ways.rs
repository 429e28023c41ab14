//! Finds out by which links peers are reached: from which address of ours, and how large packets may be.
//!
//! This process may not ask the kernel for routes; the keeper does. It is asked for all peers that are
//! awake when routes or links change, and for one alone when a worker has packets for it and does not
//! know, or its endpoint has moved.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use wg_common::endpoint::Endpoint;
use wg_common::time::Now;

use super::control::Control;
use crate::host::Towards;
use crate::keeper::Keeper;
use crate::keeper::protocol::{LINKS_MAX, LinkTowards};
use crate::session::HotPeer;

/// Peers that move all the time are looked for no more often than this.
const LOOK_EVERY: Duration = Duration::from_millis(100);

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
        if !self.shared.has_unknown_ways() || now.since(self.ways_looked.get()) < LOOK_EVERY {
            return;
        }
        self.ways_looked.set(now);
        let peers = std::iter::from_fn(|| self.shared.take_unknown_way());
        let peers: Vec<_> = peers.take(LINKS_MAX).collect();
        self.look_at_ways(keeper, &peers);
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
        let towards = asked.iter().map(|(_, endpoint)| towards(endpoint)).collect();
        let links = match keeper.links_towards(self.fwmark.get(), towards) {
            Ok(links) => links,
            Err(error) => {
                tracing::warn!(%error, "routes are not known: peers keep the address that they dialled");
                // Until routes change, it would be asked in vain again.
                for (peer, endpoint) in asked {
                    if peer.inner_mtu.is_unknown() {
                        peer.inner_mtu.set(None, endpoint.remote.is_ipv6());
                    }
                }
                return false;
            }
        };
        for ((peer, endpoint), link) in asked.into_iter().zip(links) {
            follow(peer, &endpoint, link);
        }
        true
    }
}

fn towards(endpoint: &Endpoint) -> Towards {
    let link = match endpoint.remote {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(remote) => remote.scope_id(),
    };
    let source = endpoint.local.map(|local| local.addr);
    Towards { remote: endpoint.remote.ip(), source, link }
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
        let asked = towards(&endpoint("192.0.2.1:7", Some(("192.0.2.9", 4))));
        assert_eq!(asked.source, Some("192.0.2.9".parse().unwrap()));
        assert_eq!(asked.link, 0, "the route is asked for, and may be another now");
        assert_eq!(towards(&endpoint("[fe80::1%5]:7", None)).link, 5);
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
            follow(&peer, &endpoint, found.map(|(link, mtu)| LinkTowards { link, mtu }));
            assert_eq!(peer.endpoint.load().as_ref().unwrap().local.is_some(), keeps, "{remote}");
            assert_eq!(peer.inner_mtu.mtu(true, 1420), mtu, "{remote}");
        }
    }
}
