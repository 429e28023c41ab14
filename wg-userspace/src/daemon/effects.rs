//! Carries a change of the device to sessions and workers: the part of it that needs no host.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use wg_common::endpoint::Endpoint;
use wg_common::id::PeerId;
use wg_common::time::Now;

use crate::datapath::Shared;
use crate::device::{Device, Effect};
use crate::handshake::{Handshakes, Outside};
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
        Effect::PeerAdded { id, public_key } => {
            handshakes.add_peer(Arc::new(HotPeer::new(id, shared.device, public_key)));
        }
        Effect::PeerRemoved { id, .. } => handshakes.remove_peer(id, now),
        Effect::Endpoint { id, addr } => set_endpoint(handshakes, id, addr),
        Effect::Preshared { id, key } => handshakes.set_preshared_key(id, key),
        Effect::PersistentKeepalive { id, seconds } => {
            let interval = (seconds > 0).then(|| Duration::from_secs(seconds.into()));
            handshakes.set_persistent_keepalive(id, interval, now);
        }
        Effect::RoutingChanged => shared.routing.store(device.allowed_ips().snapshot()),
    }
}

fn set_endpoint<O: Outside>(handshakes: &Handshakes<O>, peer: PeerId, addr: SocketAddr) {
    if let Some(cell) = handshakes.cell(peer) {
        cell.hot.endpoint.store(Some(Arc::new(Endpoint::configured(addr))));
    }
}
