//! The half of a peer that workers read.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};

use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use wg_common::endpoint::Endpoint;
use wg_common::id::{DeviceId, PeerId};
use wg_common::time::Now;

use super::{Activity, InnerMtu, Keypair, Keypairs, LinkWay, PeerNotes};
use crate::key::PublicKey;

/// What workers know of a peer. Read and moved by atomics; nobody ever waits for anybody.
#[derive(Debug)]
pub struct HotPeer {
    /// The peer's slot in its device.
    pub id: PeerId,
    /// The device it belongs to.
    pub device: DeviceId,
    /// Who the peer is.
    pub public_key: PublicKey,
    /// What seals and opens.
    pub keypairs: SharedKeypairs,
    /// Where its datagrams go. Configured by control; moved by the home worker of a keypair, to where
    /// authentic transport data came from.
    pub endpoint: ArcSwapOption<Endpoint>,
    /// How large packets may be on the way there. Control finds out.
    pub inner_mtu: InnerMtu,
    /// How to send past the kernel on that way. Nothing until control has looked.
    pub way: ArcSwapOption<LinkWay>,
    /// The identification of the next IPv4 datagram that is sent past the kernel.
    pub datagram_id: AtomicU32,
    /// What timers run on.
    pub activity: Activity,
    /// Bytes of `wg show`.
    pub transfer: Transfer,
    /// Packets that wait for a keypair, at all workers.
    pub staged: AtomicU32,
    /// How many handshakes were given up: what was staged before the latest of them is to be dropped.
    pub give_up_count: AtomicU32,
    /// Set by a worker that asks control for a handshake; cleared by control when it wants to be
    /// asked again.
    pub handshake_wanted: AtomicBool,
    /// What people call it, for logs; nothing if nobody has said.
    name: ArcSwapOption<String>,
    /// Number of the worker at which the last authentic packet arrived; [`HotPeer::NO_WORKER`] before
    /// the first.
    pub last_worker: AtomicU16,
    /// Something was noted of the peer: whoever asks for troubles looks at those for whom this is set.
    pub in_trouble: AtomicBool,
    notes: ArcSwapOption<PeerNotes>,
}

impl HotPeer {
    /// No worker has this number.
    pub const NO_WORKER: u16 = u16::MAX;

    /// A peer without keypairs and endpoint.
    pub fn new(id: PeerId, device: DeviceId, public_key: PublicKey) -> Self {
        Self {
            id,
            device,
            public_key,
            keypairs: SharedKeypairs::default(),
            endpoint: ArcSwapOption::empty(),
            inner_mtu: InnerMtu::default(),
            way: ArcSwapOption::empty(),
            datagram_id: AtomicU32::new(0),
            activity: Activity::default(),
            transfer: Transfer::default(),
            staged: AtomicU32::new(0),
            give_up_count: AtomicU32::new(0),
            handshake_wanted: AtomicBool::new(false),
            name: ArcSwapOption::empty(),
            last_worker: AtomicU16::new(Self::NO_WORKER),
            in_trouble: AtomicBool::new(false),
            notes: ArcSwapOption::empty(),
        }
    }

    /// To be called by the home worker after `keypair` has opened a packet: the first one makes it
    /// the current keypair. Says whether it was that one; then staged packets can go.
    pub fn confirm(&self, keypair: &Arc<Keypair>) -> bool {
        let is_next = |keypairs: &Keypairs| {
            keypairs.next.as_ref().is_some_and(|next| Arc::ptr_eq(next, keypair))
        };
        if !is_next(&self.keypairs.load()) {
            return false;
        }
        let before = self.keypairs.update(|keypairs| keypairs.confirmed(keypair.local_index()));
        is_next(&before)
    }

    /// What logs call it: its name, if it has one, and the beginning of its public key.
    pub fn label(&self) -> impl fmt::Display {
        Label { name: self.name.load_full(), public_key: self.public_key }
    }

    /// Says what people call it; nothing if that is empty.
    pub fn set_name(&self, name: String) {
        self.name.store((!name.is_empty()).then(|| Arc::new(name)));
    }

    /// What workers have noted, if anything.
    pub fn notes(&self) -> Option<Arc<PeerNotes>> {
        self.notes.load_full()
    }

    /// Forgets what was found out of the way to its endpoint: that is another one, or routes are.
    pub fn forget_way(&self) {
        if self.way.load().is_some() {
            self.way.store(None);
        }
        self.inner_mtu.forget();
    }

    /// Whether it was found out how to send to `endpoint`, even if that is by the socket.
    pub fn knows_way_to(&self, endpoint: &Endpoint) -> bool {
        self.way.load().as_ref().is_some_and(|way| way.is_for(endpoint))
    }

    /// A packet for the peer is dropped, since no endpoint is known.
    #[cold]
    pub fn note_no_endpoint(&self, now: Now) {
        self.note(|notes| notes.no_endpoint.note((), now));
    }

    /// The kernel did not take a datagram to the peer.
    #[cold]
    pub fn note_unsent(&self, to: SocketAddr, now: Now) {
        self.note(|notes| notes.unsent.note(to, now));
    }

    /// The peer has sent a packet, and does not own its source.
    #[cold]
    pub fn note_refused(&self, source: IpAddr, now: Now) {
        self.note(|notes| notes.refused.note(source, now));
    }

    fn note(&self, note: impl FnOnce(&PeerNotes)) {
        let notes = self.notes.load_full().unwrap_or_else(|| {
            let new = Arc::new(PeerNotes::default());
            let none: Option<Arc<PeerNotes>> = None;
            let before = self.notes.compare_and_swap(&none, Some(Arc::clone(&new)));
            before.clone().unwrap_or(new)
        });
        note(&notes);
        self.in_trouble.store(true, Relaxed);
    }

    /// Lets the routing table choose anew which address of ours the next datagram leaves from.
    pub fn forget_local_source(&self) {
        self.endpoint.rcu(|endpoint| match endpoint {
            Some(known) if known.local.is_some() => {
                Some(Arc::new(Endpoint::configured(known.remote)))
            }
            _ => endpoint.clone(),
        });
    }
}

struct Label {
    name: Option<Arc<String>>,
    public_key: PublicKey,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.public_key.short();
        match &self.name {
            Some(name) => write!(f, "{name} ({key})"),
            None => write!(f, "{key}"),
        }
    }
}

/// A peer's [`Keypairs`], shared between workers and control.
///
/// Whoever changes them makes the new value from the newest old one, so that no change is lost. All peers
/// that have none share one value, since of many peers most have none.
#[derive(Debug)]
pub struct SharedKeypairs(ArcSwap<Keypairs>);

impl Default for SharedKeypairs {
    fn default() -> Self {
        Self(ArcSwap::new(Self::none()))
    }
}

impl SharedKeypairs {
    fn none() -> Arc<Keypairs> {
        static NONE: LazyLock<Arc<Keypairs>> = LazyLock::new(Arc::default);
        Arc::clone(&NONE)
    }

    /// What they are now.
    pub fn load(&self) -> Guard<Arc<Keypairs>> {
        self.0.load()
    }

    /// Replaces them by what `change` makes of them; calls it again if another thread was faster.
    /// Gives back what was replaced.
    pub fn update(&self, change: impl Fn(&Keypairs) -> Keypairs) -> Arc<Keypairs> {
        self.0.rcu(|keypairs| {
            let changed = change(keypairs);
            if changed.iter().next().is_some() { Arc::new(changed) } else { Self::none() }
        })
    }
}

/// Bytes of whole messages, handshakes included, as the kernel counts them.
#[derive(Debug, Default)]
pub struct Transfer {
    rx_bytes: AtomicU64,
    tx_bytes: AtomicU64,
}

impl Transfer {
    /// Counts received bytes.
    pub fn received(&self, bytes: u64) {
        self.rx_bytes.fetch_add(bytes, Relaxed);
    }

    /// Counts sent bytes.
    pub fn sent(&self, bytes: u64) {
        self.tx_bytes.fetch_add(bytes, Relaxed);
    }

    /// Goes on from where another process left; does nothing where these counts are greater.
    pub(super) fn restore(&self, rx_bytes: u64, tx_bytes: u64) {
        self.rx_bytes.fetch_max(rx_bytes, Relaxed);
        self.tx_bytes.fetch_max(tx_bytes, Relaxed);
    }

    /// Bytes received.
    pub fn rx_bytes(&self) -> u64 {
        self.rx_bytes.load(Relaxed)
    }

    /// Bytes sent.
    pub fn tx_bytes(&self) -> u64 {
        self.tx_bytes.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use wg_common::endpoint::LocalSource;

    use super::*;
    use crate::noise::Role;
    use crate::session::keypair::tests::{START, keypair};

    #[test]
    fn a_label_has_the_name_and_a_part_of_the_key() {
        let peer = peer();
        let key = peer.public_key.to_string();
        let short = format!("{}…", &key[..8]);
        assert_eq!(peer.label().to_string(), short);
        peer.set_name("a laptop".to_owned());
        assert_eq!(peer.label().to_string(), format!("a laptop ({short})"));
        peer.set_name(String::new());
        assert_eq!(peer.label().to_string(), short);
    }

    fn peer() -> HotPeer {
        HotPeer::new(PeerId(0), DeviceId(0), PublicKey::from_bytes([0; 32]))
    }

    #[test]
    fn a_keypair_is_confirmed_once() {
        let peer = peer();
        let [new, other] = [1, 2].map(|slot| Arc::new(keypair(slot, Role::Responder, START)));
        peer.keypairs.update(|keypairs| keypairs.installed_by_responder(Arc::clone(&new)));
        assert!(!peer.confirm(&other));
        assert!(peer.keypairs.load().current.is_none());
        assert!(peer.confirm(&new));
        assert!(!peer.confirm(&new));
        assert!(Arc::ptr_eq(peer.keypairs.load().current.as_ref().unwrap(), &new));
    }

    #[test]
    fn installing_and_confirming_at_once_lose_no_keypair() {
        for round in 0..200 {
            let peer = peer();
            let [first, second] =
                [1, 2].map(|slot| Arc::new(keypair(slot, Role::Responder, START)));
            peer.keypairs.update(|keypairs| keypairs.installed_by_responder(Arc::clone(&first)));
            let confirmed = std::thread::scope(|scope| {
                let worker = scope.spawn(|| peer.confirm(&first));
                peer.keypairs.update(|k| k.installed_by_responder(Arc::clone(&second)));
                worker.join().unwrap()
            });
            let keypairs = peer.keypairs.load();
            assert!(Arc::ptr_eq(keypairs.next.as_ref().unwrap(), &second), "round {round}");
            assert_eq!(keypairs.current.is_some(), confirmed);
            assert_eq!(keypairs.contains(&first), confirmed);
        }
    }

    #[test]
    fn forgetting_the_local_source_keeps_the_remote_address() {
        let peer = peer();
        peer.forget_local_source();
        assert!(peer.endpoint.load().is_none());
        let remote: SocketAddr = "192.0.2.1:51820".parse().unwrap();
        let local = Some(LocalSource { addr: "192.0.2.2".parse().unwrap(), ifindex: 3 });
        peer.endpoint.store(Some(Arc::new(Endpoint { remote, local })));
        peer.forget_local_source();
        assert_eq!(**peer.endpoint.load().as_ref().unwrap(), Endpoint::configured(remote));
    }
}
