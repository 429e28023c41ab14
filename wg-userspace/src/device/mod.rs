//! What the device *is*: its key, its port, its mark, its peers and their allowed IPs.
//!
//! A change comes as a [`SetRequest`], which `uapi` makes of what wg(8) writes, or
//! [`SetRequest::replacing`] of a configuration file. [`Device::apply`] changes the device, which
//! cannot fail, and says what changed as [`Effect`]s; `daemon` carries them to the workers, the
//! sockets and the sessions. What can fail, such as opening another port, is done before.
//!
//! This room knows nothing of sessions, sockets or where a peer really is: an endpoint here is what
//! was configured last.
//!
//! It follows the kernel's `wg_set_device` and `set_peer` (drivers/net/wireguard/netlink.c) but for
//! one thing: what is set to the value that it has is not a change, so that a configuration that is
//! applied again disturbs nobody.

mod source;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::hash::BuildHasher as _;
use std::mem;
use std::net::SocketAddr;
use std::ops::Range;
use std::vec;

use hashbrown::{DefaultHashBuilder, HashTable};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use wg_common::id::PeerId;

use crate::config::{Config, Endpoint};
use crate::key::{PresharedKey, PrivateKey, PublicKey};
use crate::routing::AllowedIps;

pub use source::{KnownPeer, Lookup, PeerSource, PullError, Tai64N};

/// One WireGuard device. New, it has no key, no port and no peers.
#[derive(Debug, Default)]
pub struct Device {
    private_key: Option<PrivateKey>,
    public_key: Option<PublicKey>,
    listen_port: u16,
    fwmark: u32,
    rules: PacketRules,
    peers: Peers,
    allowed_ips: AllowedIps,
}

/// What is done to packets beside what the protocol says.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PacketRules {
    /// The segment size that a SYN offers is lowered to what the tunnel carries, in both directions.
    pub mss_clamp: bool,
    /// Outer headers get the DSCP of the packet in them; else they have none. No inner DSCP is ever changed.
    pub copy_dscp: bool,
}

impl PacketRules {
    /// What a file says of them, where it says anything.
    pub fn of(mss_clamp: Option<&bool>, copy_dscp: Option<&bool>) -> Self {
        let usual = Self::default();
        Self {
            mss_clamp: mss_clamp.copied().unwrap_or(usual.mss_clamp),
            copy_dscp: copy_dscp.copied().unwrap_or(usual.copy_dscp),
        }
    }
}

impl Default for PacketRules {
    fn default() -> Self {
        Self { mss_clamp: true, copy_dscp: false }
    }
}

/// A peer of a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Peer {
    /// Its name in the protocol; no other peer of the device has it.
    pub public_key: PublicKey,
    /// Zero means none.
    pub preshared_key: PresharedKey,
    /// As it was configured last; the peer may be elsewhere by now.
    pub endpoint: Option<SocketAddr>,
    /// In seconds; 0: off.
    pub persistent_keepalive: u16,
    /// What people call it; empty if nobody has said. Peers may have one name.
    pub name: String,
    /// It came from a [`PeerSource`], and no request has named it since: it may go when it is idle.
    pub pulled: bool,
}

/// What is to change on a device. What is `None` stays.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SetRequest {
    /// The new private key; `Some(None)` removes the key.
    pub private_key: Option<Option<PrivateKey>>,
    /// The new port; 0: any.
    pub listen_port: Option<u16>,
    /// The new mark; 0: none.
    pub fwmark: Option<u32>,
    /// [`PacketRules::mss_clamp`] from now on.
    pub mss_clamp: Option<bool>,
    /// [`PacketRules::copy_dscp`] from now on.
    pub copy_dscp: Option<bool>,
    /// Removes all peers before anything is done to peers.
    pub replace_peers: bool,
    /// In this order; a peer may come more than once.
    pub peers: Vec<PeerChange>,
}

/// What is to change on a peer. What is `None` stays.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerChange {
    /// The peer. If the device has none of this key, it gets one.
    pub public_key: PublicKey,
    /// Removes the peer; nothing else is looked at then.
    pub remove: bool,
    /// Changes nothing if the device has no such peer.
    pub update_only: bool,
    /// Zero removes it.
    pub preshared_key: Option<PresharedKey>,
    /// Where the peer is now.
    pub endpoint: Option<SocketAddr>,
    /// In seconds; 0: off.
    pub persistent_keepalive: Option<u16>,
    /// What people call it; empty removes the name.
    pub name: Option<String>,
    /// Takes all allowed IPs away before `allowed_ips`.
    pub replace_allowed_ips: bool,
    /// In this order.
    pub allowed_ips: Vec<AllowedIpChange>,
    /// A new peer is marked as pulled. Any other change takes the mark away.
    pub pulled: bool,
}

/// One prefix more or less for a peer. Host bits are ignored.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AllowedIpChange {
    /// The peer owns it from now on, and whoever did does not.
    Add(IpNet),
    /// The peer does not own it any more; no change if it does not own that very prefix.
    Remove(IpNet),
}

/// What changed, to be carried out in the order given.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Effect {
    /// The private key; all sessions and all that was computed from the former key are void.
    PrivateKey(Option<PrivateKey>),
    /// The port to listen on; 0: any.
    ListenPort(u16),
    /// The mark of outer datagrams; 0: none.
    FwMark(u32),
    /// What is done to packets.
    PacketRules(PacketRules),
    /// A new peer: without preshared key, endpoint and keepalives, until other effects tell.
    PeerAdded {
        /// Its slot. It is free, and was not freed by an effect of the same request.
        id: PeerId,
        /// Its public key.
        public_key: PublicKey,
    },
    /// The peer is gone with all that belonged to it.
    PeerRemoved {
        /// Its former slot.
        id: PeerId,
        /// Its public key.
        public_key: PublicKey,
    },
    /// Where the peer is now. Said even if the device knew, since the peer may have moved since.
    Endpoint {
        /// The peer.
        id: PeerId,
        /// Its outer address and port.
        addr: SocketAddr,
    },
    /// The preshared key for the next handshake; sessions stay.
    Preshared {
        /// The peer.
        id: PeerId,
        /// Zero means none.
        key: PresharedKey,
    },
    /// The interval of persistent keepalives. Who switches them on sends one at once.
    PersistentKeepalive {
        /// The peer.
        id: PeerId,
        /// 0: off.
        seconds: u16,
    },
    /// What people call a peer. Nothing but logs depends on it.
    Name {
        /// The peer.
        id: PeerId,
        /// Empty: nobody has said.
        name: String,
    },
    /// The allowed IPs of some peers; comes once, and last.
    RoutingChanged,
}

impl SetRequest {
    /// The request that makes a device what `config` says, whatever it was before (as `wg setconf`).
    ///
    /// `resolved` is asked for the address of every endpoint; for `None` the peer gets none.
    pub fn replacing(config: &Config, resolved: impl Fn(&Endpoint) -> Option<SocketAddr>) -> Self {
        let interface = &config.interface;
        let rules = PacketRules::of(interface.mss_clamp.as_deref(), interface.copy_dscp.as_deref());
        let peers = config.peers.iter().map(|peer| PeerChange {
            preshared_key: Some(peer.preshared_key.as_deref().cloned().unwrap_or_default()),
            endpoint: peer.endpoint.as_deref().and_then(&resolved),
            persistent_keepalive: Some(peer.persistent_keepalive.as_deref().copied().unwrap_or(0)),
            name: Some(peer.name.as_deref().cloned().unwrap_or_default()),
            replace_allowed_ips: true,
            allowed_ips: peer.allowed_ips.iter().map(|net| AllowedIpChange::Add(**net)).collect(),
            ..PeerChange::new(*peer.public_key)
        });
        Self {
            private_key: Some(Some(interface.private_key.value.clone())),
            listen_port: Some(interface.listen_port.as_deref().copied().unwrap_or(0)),
            fwmark: Some(interface.fwmark.as_deref().copied().unwrap_or(0)),
            mss_clamp: Some(rules.mss_clamp),
            copy_dscp: Some(rules.copy_dscp),
            replace_peers: true,
            peers: peers.collect(),
        }
    }
}

impl PeerChange {
    /// A change of nothing but that the device has the peer.
    pub const fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: None,
            name: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
            pulled: false,
        }
    }
}

impl AllowedIpChange {
    /// The prefix, without host bits.
    pub fn net(self) -> IpNet {
        match self {
            Self::Add(net) | Self::Remove(net) => net.trunc(),
        }
    }
}

impl Device {
    /// The private key, if there is one.
    pub const fn private_key(&self) -> Option<&PrivateKey> {
        self.private_key.as_ref()
    }

    /// The public key, if there is a private one.
    pub const fn public_key(&self) -> Option<PublicKey> {
        self.public_key
    }

    /// The port as it was configured; 0: any.
    pub const fn listen_port(&self) -> u16 {
        self.listen_port
    }

    /// The mark of outer datagrams; 0: none.
    pub const fn fwmark(&self) -> u32 {
        self.fwmark
    }

    /// What is done to packets.
    pub const fn packet_rules(&self) -> PacketRules {
        self.rules
    }

    /// The peer in a slot.
    pub fn peer(&self, id: PeerId) -> Option<&Peer> {
        self.peers.slots.get(id.0 as usize)?.as_ref().map(|slot| &slot.peer)
    }

    /// The slot of the peer with this key.
    pub fn find(&self, public_key: &PublicKey) -> Option<PeerId> {
        self.peers.find(public_key)
    }

    /// The peers in the order in which they were added.
    pub fn peers(&self) -> impl Iterator<Item = (PeerId, &Peer)> {
        self.peers.by_age.values().map(|&id| (id, &self.peers.slot(id).peer))
    }

    /// The peers that were added when so many others had been, in that order, each with its number.
    pub fn peers_added(&self, numbers: Range<u64>) -> impl Iterator<Item = (u64, PeerId, &Peer)> {
        let ids = self.peers.by_age.range(numbers);
        ids.map(|(&age, &id)| (age, id, &self.peers.slot(id).peer))
    }

    /// How many peers were ever added. Who is added next has this number.
    pub const fn added_count(&self) -> u64 {
        self.peers.added_count
    }

    /// Number of peers.
    pub fn peer_count(&self) -> usize {
        self.peers.by_key.len()
    }

    /// Number of slots: the ids of all peers are below.
    pub fn slot_count(&self) -> usize {
        self.peers.slots.len()
    }

    /// Which peer owns which prefix.
    pub const fn allowed_ips(&self) -> &AllowedIps {
        &self.allowed_ips
    }

    /// As [`AllowedIps::note_changes`], of a device that has no peers yet.
    pub fn note_owner_changes(&mut self) {
        self.allowed_ips.note_changes();
    }

    /// As [`AllowedIps::note_all`].
    pub fn note_all_owners(&mut self) {
        self.allowed_ips.note_all();
    }

    /// As [`AllowedIps::take_changes`].
    pub fn take_owner_changes(&mut self, max: usize) -> Vec<(IpNet, Option<PeerId>)> {
        self.allowed_ips.take_changes(max)
    }

    /// Changes the device, and says what changed.
    pub fn apply(&mut self, request: SetRequest) -> Vec<Effect> {
        let mut applying = self.begin(request);
        while self.go_on(&mut applying, usize::MAX) {}
        self.finish(applying)
    }

    /// Begins to apply a request that is so large that something else must be done meanwhile: to be
    /// gone on with until it is done, and finished. Nothing of the device may be used or shown before.
    pub fn begin(&mut self, request: SetRequest) -> Applying {
        let mut applying = Applying {
            removals: Vec::new().into_iter(),
            private_key: request.private_key,
            peers: request.peers.into_iter(),
            effects: Vec::new(),
            routing_changed: false,
        };
        let mut change = Change { device: self, to: &mut applying };
        if let Some(fwmark) = request.fwmark {
            change.set_fwmark(fwmark);
        }
        if let Some(port) = request.listen_port {
            change.set_listen_port(port);
        }
        change.set_packet_rules(request.mss_clamp, request.copy_dscp);
        let leaving_count = if request.replace_peers { self.peer_count() } else { 0 };
        self.peers.reserve(applying.peers.len().saturating_sub(leaving_count));
        if request.replace_peers {
            let all: Vec<_> = self.peers.by_age.values().copied().collect();
            applying.removals = all.into_iter();
        }
        applying
    }

    /// Applies the next part, of at most so many peers. Says whether there is more.
    pub fn go_on(&mut self, applying: &mut Applying, peer_count: usize) -> bool {
        let mut change = Change { device: self, to: applying };
        for _ in 0..peer_count {
            // As in the kernel: replacing comes before the key, however the request is ordered.
            if let Some(id) = change.to.removals.next() {
                change.remove(id);
                continue;
            }
            if let Some(private_key) = change.to.private_key.take() {
                change.set_private_key(private_key);
            }
            let Some(peer) = change.to.peers.next() else { return false };
            change.change_peer(peer);
        }
        true
    }

    /// Says what changed.
    ///
    /// # Panics
    /// If the request is not done.
    pub fn finish(&mut self, applying: Applying) -> Vec<Effect> {
        let Applying { removals, private_key, peers, mut effects, routing_changed } = applying;
        let rest = (removals.len(), private_key.is_some(), peers.len());
        assert_eq!(rest, (0, false, 0), "the request is done");
        if routing_changed {
            effects.push(Effect::RoutingChanged);
        }
        self.peers.release_slots();
        effects
    }
}

/// A request that a device is made to follow part by part.
#[derive(Debug)]
pub struct Applying {
    removals: vec::IntoIter<PeerId>,
    private_key: Option<Option<PrivateKey>>,
    peers: vec::IntoIter<PeerChange>,
    effects: Vec<Effect>,
    routing_changed: bool,
}

/// A request while it is applied.
struct Change<'a> {
    device: &'a mut Device,
    to: &'a mut Applying,
}

impl Change<'_> {
    fn set_fwmark(&mut self, fwmark: u32) {
        if mem::replace(&mut self.device.fwmark, fwmark) != fwmark {
            self.to.effects.push(Effect::FwMark(fwmark));
        }
    }

    fn set_listen_port(&mut self, port: u16) {
        if mem::replace(&mut self.device.listen_port, port) != port {
            self.to.effects.push(Effect::ListenPort(port));
        }
    }

    fn set_packet_rules(&mut self, mss_clamp: Option<bool>, copy_dscp: Option<bool>) {
        let before = self.device.rules;
        let rules = PacketRules {
            mss_clamp: mss_clamp.unwrap_or(before.mss_clamp),
            copy_dscp: copy_dscp.unwrap_or(before.copy_dscp),
        };
        if mem::replace(&mut self.device.rules, rules) != rules {
            self.to.effects.push(Effect::PacketRules(rules));
        }
    }

    fn set_private_key(&mut self, private_key: Option<PrivateKey>) {
        if self.device.private_key == private_key {
            return;
        }
        let public_key = private_key.as_ref().map(PrivateKey::public_key);
        // Nobody is a peer of himself. The peer goes before it could meet its own key.
        if let Some(id) = public_key.and_then(|key| self.device.find(&key)) {
            self.remove(id);
        }
        self.device.private_key.clone_from(&private_key);
        self.device.public_key = public_key;
        self.to.effects.push(Effect::PrivateKey(private_key));
    }

    fn change_peer(&mut self, change: PeerChange) {
        // Silently, so that one list of peers can be given to all of them.
        if self.device.public_key == Some(change.public_key) {
            return;
        }
        let (id, is_new) = match self.device.find(&change.public_key) {
            Some(id) if change.remove => return self.remove(id),
            Some(id) => (id, false),
            None if change.remove || change.update_only => return,
            None => (self.add(change.public_key), true),
        };
        let peer = self.device.peers.get_mut(id);
        peer.pulled = change.pulled && (is_new || peer.pulled);
        if let Some(key) = change.preshared_key
            && peer.preshared_key != key
        {
            peer.preshared_key = key.clone();
            self.to.effects.push(Effect::Preshared { id, key });
        }
        if let Some(addr) = change.endpoint {
            peer.endpoint = Some(addr);
            self.to.effects.push(Effect::Endpoint { id, addr });
        }
        if let Some(seconds) = change.persistent_keepalive
            && mem::replace(&mut peer.persistent_keepalive, seconds) != seconds
        {
            self.to.effects.push(Effect::PersistentKeepalive { id, seconds });
        }
        if let Some(name) = change.name
            && peer.name != name
        {
            peer.name.clone_from(&name);
            self.to.effects.push(Effect::Name { id, name });
        }
        let replaces = change.replace_allowed_ips && !is_new;
        self.change_allowed_ips(id, replaces, &change.allowed_ips);
    }

    fn change_allowed_ips(&mut self, id: PeerId, replaces: bool, changes: &[AllowedIpChange]) {
        let allowed_ips = &mut self.device.allowed_ips;
        if replaces {
            let only_adds = changes.iter().all(|change| matches!(change, AllowedIpChange::Add(_)));
            let nets = changes.iter().map(|change| change.net());
            if only_adds && allowed_ips.of_peer(id).eq(nets) {
                return;
            }
            self.to.routing_changed |= allowed_ips.of_peer(id).next().is_some();
            allowed_ips.remove_peer(id);
        }
        for &change in changes {
            self.to.routing_changed |= match change {
                AllowedIpChange::Add(net) => allowed_ips.insert(net, id) != Some(id),
                AllowedIpChange::Remove(net) => allowed_ips.remove(net, id),
            };
        }
    }

    fn add(&mut self, public_key: PublicKey) -> PeerId {
        let id = self.device.peers.insert(public_key);
        self.to.effects.push(Effect::PeerAdded { id, public_key });
        id
    }

    fn remove(&mut self, id: PeerId) {
        self.to.routing_changed |= self.device.allowed_ips.of_peer(id).next().is_some();
        self.device.allowed_ips.remove_peer(id);
        let public_key = self.device.peers.remove(id);
        self.to.effects.push(Effect::PeerRemoved { id, public_key });
    }
}

/// The peers in their slots.
///
/// A slot that becomes free is not used again in the same request: until its effects are carried
/// out, workers route by a snapshot in which the slot is still the former peer's, and would seal
/// that peer's packets for the new one.
#[derive(Debug, Default)]
struct Peers {
    slots: Vec<Option<Slot>>,
    /// By the keys, which stand in the slots only: of a million peers each table counts.
    by_key: HashTable<PeerId>,
    hasher: DefaultHashBuilder,
    /// By the number of peers that were added before.
    by_age: BTreeMap<u64, PeerId>,
    added_count: u64,
    free: Vec<PeerId>,
    /// Free from the next request on.
    resting: Vec<PeerId>,
}

#[derive(Debug)]
struct Slot {
    age: u64,
    peer: Peer,
}

impl Peers {
    fn find(&self, public_key: &PublicKey) -> Option<PeerId> {
        let hash = self.hasher.hash_one(public_key);
        self.by_key.find(hash, |&id| self.slot(id).peer.public_key == *public_key).copied()
    }

    /// Makes room for so many more at once.
    fn reserve(&mut self, count: usize) {
        let Self { slots, by_key, hasher, .. } = self;
        by_key.reserve(count, |&id| hasher.hash_one(key_in(slots, id)));
    }

    fn insert(&mut self, public_key: PublicKey) -> PeerId {
        let peer = Peer {
            public_key,
            preshared_key: PresharedKey::default(),
            endpoint: None,
            persistent_keepalive: 0,
            name: String::new(),
            pulled: false,
        };
        let age = self.added_count;
        self.added_count += 1;
        let slot = Some(Slot { age, peer });
        let id = match self.free.pop() {
            Some(id) => {
                self.slots[id.0 as usize] = slot;
                id
            }
            None => {
                let id = u32::try_from(self.slots.len()).expect("memory ends before the numbers");
                self.slots.push(slot);
                PeerId(id)
            }
        };
        self.by_age.insert(age, id);
        let Self { slots, by_key, hasher, .. } = self;
        let hash = hasher.hash_one(public_key);
        by_key.insert_unique(hash, id, |&id| hasher.hash_one(key_in(slots, id)));
        id
    }

    fn remove(&mut self, id: PeerId) -> PublicKey {
        let Slot { age, peer } =
            self.slots[id.0 as usize].take().expect("only ids of peers are removed");
        let hash = self.hasher.hash_one(peer.public_key);
        if let Ok(entry) = self.by_key.find_entry(hash, |&other| other == id) {
            entry.remove();
        }
        self.by_age.remove(&age);
        self.resting.push(id);
        peer.public_key
    }

    fn release_slots(&mut self) {
        self.free.append(&mut self.resting);
        if self.by_key.is_empty() {
            // What a million needed once is not kept for ever.
            (self.slots, self.free, self.by_key) = Default::default();
            self.resting = Vec::new();
        }
    }

    fn slot(&self, id: PeerId) -> &Slot {
        self.slots[id.0 as usize].as_ref().expect("the indexes name slots in use")
    }

    fn get_mut(&mut self, id: PeerId) -> &mut Peer {
        let slot = self.slots[id.0 as usize].as_mut();
        &mut slot.expect("ids come from the index, which names slots in use").peer
    }
}

/// The key of a peer that is in `by_key`, and so in its slot.
fn key_in(slots: &[Option<Slot>], id: PeerId) -> &PublicKey {
    &slots[id.0 as usize].as_ref().expect("the indexes name slots in use").peer.public_key
}
