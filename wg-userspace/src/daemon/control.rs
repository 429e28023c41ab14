//! Answers wg(8) and carries each change of the device to the rooms that it concerns.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use wg_common::endpoint::Endpoint;
use wg_common::id::{PeerId, WorkerId};
use zeroize::Zeroizing;

use super::mode::ModeInUse;
use super::pull::Pulling;
use super::status::{Nic, Status};
use super::watchdog::Watchdog;
use crate::bpf::Steer;
use crate::counters::{Path, Totals};
use crate::datapath::shared::PEER_COUNT_MAX;
use crate::datapath::{Shared, SocketGroup};
use crate::device::{Device, Effect, SetRequest};
use crate::handshake::Handshakes;
use crate::host::{AddressChange, LinkChange};
use crate::key::PublicKey;
use crate::session::HotPeer;
use crate::sys::clock;
use crate::uapi::{self, Errno, PeerStatus};
use crate::udp::{self, UdpError};

/// The control plane of one device.
pub struct Control {
    /// What it shares with the workers.
    pub shared: Arc<Shared>,
    pub(super) device: RefCell<Device>,
    pub(super) handshakes: Arc<Handshakes>,
    /// A source of peers that are not configured, if there is one.
    pub(super) pulling: Option<Pulling>,
    steer: RefCell<Option<Steer>>,
    mode: ModeInUse,
    nics: Vec<Nic>,
    aead: &'static str,
    fwmark: Cell<u32>,
    watchdog: RefCell<Watchdog>,
}

impl Control {
    /// Control of a device that has no key and no peers yet.
    pub fn new(
        shared: Arc<Shared>,
        handshakes: Arc<Handshakes>,
        steer: Option<Steer>,
        mode: ModeInUse,
        nics: Vec<Nic>,
        aead: &'static str,
    ) -> Self {
        let watchdog = RefCell::new(Watchdog::new(shared.workers.len()));
        let control = Self {
            watchdog,
            shared,
            device: RefCell::default(),
            handshakes,
            pulling: None,
            steer: RefCell::new(steer),
            mode,
            nics,
            aead,
            fwmark: Cell::new(0),
        };
        control.steer_port(None, control.shared.sockets.load().port);
        control
    }

    /// Has peers that nobody configured pulled from a source when they knock.
    #[must_use]
    pub fn with_pulling(self, pulling: Option<Pulling>) -> Self {
        Self { pulling, ..self }
    }

    /// The back end in use.
    pub fn mode(&self) -> &ModeInUse {
        &self.mode
    }

    /// Runs what is due. To be called several times a second.
    pub fn tick(&self) {
        let now = clock::boot_now();
        self.watchdog.borrow_mut().look(&self.shared, &self.handshakes, now);
        self.handshakes.tick(now);
        self.pull_tick(now);
    }

    /// Follows a change of the host's addresses.
    pub fn address_changed(&self, change: AddressChange) {
        let mut steer = self.steer.borrow_mut();
        let Some(steer) = steer.as_mut() else { return };
        let (what, outcome) = match change {
            AddressChange::Added(address) => (address, steer.add_address(address)),
            AddressChange::Removed(address) => (address, steer.remove_address(address)),
        };
        if let Err(error) = outcome {
            // Its datagrams pass to the socket: slower, but nothing is lost.
            tracing::warn!(address = %what, %error, "the kernel side does not know this address");
        }
    }

    /// Follows a change of the TUN device.
    pub fn link_changed(&self, change: LinkChange) {
        match change {
            LinkChange::Mtu(mtu) => self.shared.mtu.store(mtu as usize, Ordering::Relaxed),
            // A device that went to another namespace is gone only from ours.
            LinkChange::Gone if self.shared.tun_queues[0].device().is_ok() => {}
            LinkChange::Gone => self.shared.report_tun_gone(),
        }
    }

    /// Takes the kernel side off the NICs.
    pub fn detach(&self) {
        drop(self.steer.borrow_mut().take());
    }

    /// Opens sockets on another port. Nothing is changed if that fails.
    fn open_port(&self, port: u16, fwmark: u32) -> Result<(), Errno> {
        let worker_count = self.shared.workers.len();
        let (port, of_worker) = udp::bind_group(port, worker_count, fwmark).map_err(refused)?;
        let before = self.shared.sockets.load().port;
        self.shared.sockets.store(Arc::new(SocketGroup { port, of_worker }));
        self.shared.wake_all();
        self.steer_port(Some(before), port);
        Ok(())
    }

    fn steer_port(&self, before: Option<u16>, port: u16) {
        if let Some(steer) = self.steer.borrow_mut().as_mut() {
            if let Some(before) = before {
                steer.set_port(before, None);
            }
            steer.set_port(port, Some(self.shared.device));
        }
    }

    pub(super) fn carry_out(&self, effect: Effect) {
        let now = clock::boot_now();
        match effect {
            Effect::PrivateKey(key) => self.handshakes.set_private_key(key, now),
            // The sockets were opened and marked before anything was changed.
            Effect::ListenPort(_) | Effect::FwMark(_) => {}
            Effect::PeerAdded { id, public_key } => {
                self.handshakes.add_peer(self.hot_peer(id, public_key));
            }
            Effect::PeerRemoved { id, public_key } => {
                self.peer_leaves(id, &public_key, now);
                self.handshakes.remove_peer(id, now);
            }
            Effect::Endpoint { id, addr } => self.set_endpoint(id, addr),
            Effect::Preshared { id, key } => self.handshakes.set_preshared_key(id, key),
            Effect::PersistentKeepalive { id, seconds } => {
                let interval = (seconds > 0).then(|| Duration::from_secs(seconds.into()));
                self.handshakes.set_persistent_keepalive(id, interval, now);
            }
            Effect::RoutingChanged => {
                self.shared.routing.store(self.device.borrow().allowed_ips().snapshot());
            }
        }
    }

    pub(super) fn hot_peer(&self, id: PeerId, public_key: PublicKey) -> Arc<HotPeer> {
        Arc::new(HotPeer::new(id, self.shared.device, public_key))
    }

    fn set_endpoint(&self, peer: PeerId, addr: SocketAddr) {
        if let Some(cell) = self.handshakes.cell(peer) {
            cell.hot.endpoint.store(Some(Arc::new(Endpoint::configured(addr))));
        }
    }
}

/// What a request is answered with if sockets cannot be had, or be marked.
fn refused(error: UdpError) -> Errno {
    tracing::warn!(%error, "a request is refused");
    match error {
        UdpError::InUse { .. } => Errno::EADDRINUSE,
        UdpError::NotPermitted { .. } => Errno::EACCES,
        UdpError::Io { source, .. } => Errno::from(&source),
        UdpError::NotUdp => Errno::EIO,
    }
}

impl uapi::Handler for Control {
    fn get(&self) -> Zeroizing<String> {
        let device = self.device.borrow();
        let port = self.shared.sockets.load().port;
        uapi::format_get(&device, port, &|peer| {
            let Some(cell) = self.handshakes.cell(peer) else { return PeerStatus::default() };
            PeerStatus {
                endpoint: cell.hot.endpoint.load().as_ref().map(|endpoint| endpoint.remote),
                last_handshake: cell.last_handshake(),
                rx_bytes: cell.hot.transfer.rx_bytes(),
                tx_bytes: cell.hot.transfer.tx_bytes(),
            }
        })
    }

    fn set(&self, request: SetRequest) -> Result<(), Errno> {
        // What can fail comes first: then nothing is changed.
        {
            let device = self.device.borrow();
            let kept = if request.replace_peers { 0 } else { device.peer_count() };
            let named = request.peers.iter().filter(|peer| !peer.remove);
            let new = named.filter(|p| kept == 0 || device.find(&p.public_key).is_none()).count();
            if kept + new > PEER_COUNT_MAX {
                return Err(Errno::ENOSPC);
            }
        }
        let mark = request.fwmark.unwrap_or(self.fwmark.get());
        let sockets = self.shared.sockets.load_full();
        match request.listen_port {
            Some(port) if port == 0 || port != sockets.port => self.open_port(port, mark)?,
            _ if mark != self.fwmark.get() => {
                sockets.of_worker.iter().try_for_each(|s| s.set_fwmark(mark)).map_err(refused)?;
            }
            _ => {}
        }
        self.fwmark.set(mark);
        let named: Vec<_> = request.peers.iter().map(|peer| peer.public_key).collect();
        let effects = self.device.borrow_mut().apply(request);
        for effect in effects {
            self.carry_out(effect);
        }
        self.peers_configured(&named);
        Ok(())
    }

    fn status(&self) -> serde_json::Value {
        let now = clock::boot_now();
        let workers = self.shared.workers.iter().map(|worker| &worker.counters);
        let totals = Totals::sum(workers.chain([self.handshakes.drops()]));
        let steer = self.steer.borrow();
        let counted = steer.as_ref().and_then(|steer| {
            let counted = steer.counters();
            counted
                .inspect_err(|error| tracing::warn!(%error, "no counters of the kernel side"))
                .ok()
        });
        let count = self.shared.workers.len();
        let status = Status {
            mode: self.mode.name().to_owned(),
            reason: self.mode.reason.clone(),
            nics: self.nics.clone(),
            workers: count,
            stuck_workers: (0..count)
                .filter(|&w| !self.shared.moves(WorkerId(w as u16), now))
                .count(),
            under_load: self.handshakes.is_under_load(now),
            aead: self.aead.to_owned(),
            paths: Path::ALL.iter().map(|&path| (path.name(), totals.received(path))).collect(),
            drops: totals.drops().map(|(reason, count)| (reason.name(), count)).collect(),
            peer_source: self.pulling.as_ref().map(Pulling::status).unwrap_or_default(),
            steer: counted
                .map(|counted| {
                    let events = counted.events().map(|(event, count)| (event.name(), count));
                    let drops = counted.drops().map(|(reason, count)| (reason.name(), count));
                    events.chain(drops.filter(|&(_, count)| count > 0)).collect()
                })
                .unwrap_or_default(),
        };
        serde_json::to_value(status).expect("a status is plain data")
    }
}
