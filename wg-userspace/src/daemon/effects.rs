//! Carries a change of the device to sessions and workers: the part of it that needs no host.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use wg_common::endpoint::Endpoint;
use wg_common::id::PeerId;
use wg_common::time::Now;

use crate::datapath::Shared;
use crate::device::{Device, Effect, PacketRules};
use crate::handshake::{Handshakes, Outside};
use crate::key::PresharedKey;
use crate::noise::Timestamp;
use crate::session::HotPeer;

/// Does what `effect` says. `device` is as it is after all effects of the request.
///
/// Sockets are not its matter: they were opened and marked before anything was changed.
pub fn carry_out<O: Outside>(
    effect: Effect,
    device: &Device,
    handshakes: &Handshakes<O>,
    shared: &Shared,
    now: Now,
) {
    match effect {
        Effect::PrivateKey(key) => handshakes.set_private_key(key, now),
        Effect::ListenPort(_) | Effect::FwMark(_) => {}
        Effect::PacketRules(PacketRules { mss_clamp, copy_dscp }) => {
            shared.mss_clamp.store(mss_clamp, Ordering::Relaxed);
            shared.copy_dscp.store(copy_dscp, Ordering::Relaxed);
        }
        Effect::PeerAdded { id, public_key } => {
            let hot = Arc::new(HotPeer::new(id, shared.device, public_key));
            let psk = preshared_key_of(device, id);
            handshakes.add_known_peer(hot, psk, Timestamp::default());
        }
        Effect::PeerRemoved { id, .. } => handshakes.remove_peer(id, now),
        Effect::Endpoint { id, addr } => set_endpoint(handshakes, id, addr),
        Effect::Preshared { id, key } => handshakes.set_preshared_key(id, key),
        Effect::PersistentKeepalive { id, seconds } => {
            let interval = (seconds > 0).then(|| Duration::from_secs(seconds.into()));
            handshakes.set_persistent_keepalive(id, interval, now);
        }
        Effect::Name { id, name } => {
            if let Some(cell) = handshakes.cell(id) {
                cell.hot.set_name(name);
            }
        }
        Effect::RoutingChanged => shared.routing.store(device.allowed_ips().snapshot()),
    }
}

/// The preshared key of a peer that is about to be added. It is not left to the effect that tells it,
/// for an initiation may come before that, and must not be answered without it.
pub(super) fn preshared_key_of(device: &Device, id: PeerId) -> PresharedKey {
    device.peer(id).map(|peer| peer.preshared_key.clone()).unwrap_or_default()
}

fn set_endpoint<O: Outside>(handshakes: &Handshakes<O>, peer: PeerId, addr: SocketAddr) {
    if let Some(cell) = handshakes.cell(peer) {
        cell.hot.endpoint.store(Some(Arc::new(Endpoint::configured(addr))));
        cell.hot.forget_way();
    }
}

#[cfg(test)]
mod tests {
    use wg_common::id::DeviceId;
    use wg_common::index::{IndexLayout, IndexPermutation};

    use super::*;
    use crate::aead::RingAead;
    use crate::datapath::SocketGroup;
    use crate::device::{PeerChange, SetRequest};
    use crate::handshake::Os;
    use crate::key::PrivateKey;

    #[test]
    fn a_new_peer_has_its_preshared_key_before_an_initiation_can_come() {
        let sockets = SocketGroup { port: 1, of_worker: Vec::new() };
        let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
        let (shared, _) = Shared::new(DeviceId(0), 1, Vec::new(), sockets, None, indexes).unwrap();
        let os = Os::new(Arc::clone(&shared));
        let handshakes = Handshakes::new(Arc::clone(&shared), os, &RingAead, None);
        let mut device = Device::default();
        let psk = PresharedKey::from_bytes([7; 32]);
        let public_key = PrivateKey::from_bytes([2; 32]).public_key();
        for private_key in [None, Some(PrivateKey::from_bytes([1; 32]))] {
            let peer =
                PeerChange { preshared_key: Some(psk.clone()), ..PeerChange::new(public_key) };
            let effects = device.apply(SetRequest {
                private_key: Some(private_key),
                replace_peers: true,
                peers: vec![peer],
                ..SetRequest::default()
            });
            for effect in effects {
                let added = match &effect {
                    Effect::PeerAdded { id, .. } => Some(*id),
                    _ => None,
                };
                carry_out(effect, &device, &handshakes, &shared, Now::default());
                if let Some(id) = added {
                    assert_eq!(handshakes.cell(id).unwrap().preshared_key(), psk);
                }
            }
        }
    }
}
