//! Peers that are not configured but pulled: looked up at a source when they knock.
//!
//! A [`PeerSource`] is asked for the sender of an initiation that nobody here knows. The device
//! itself, with its configured peers, is the first one. What another source knows of a peer,
//! [`Device::pull`] makes a peer of the device, marked as pulled. It stops being one as soon as a
//! request names it.

use std::net::SocketAddr;

use ipnet::IpNet;
use wg_common::id::PeerId;
use wg_common::protocol::TIMESTAMP_LEN;

use super::{AllowedIpChange, Device, Effect, PeerChange, SetRequest};
use crate::key::{PresharedKey, PublicKey};

/// A moment as initiations tell it: the bytes of a TAI64N label. Greater ones are later.
pub type Tai64N = [u8; TIMESTAMP_LEN];

/// Somebody who knows peers by their public keys.
pub trait PeerSource {
    /// What is known of a peer.
    type Peer;

    /// Looks for a peer. Never waits: a source that has to ask elsewhere says [`Lookup::Pending`] and
    /// answers by a way of its own.
    fn lookup(&self, public_key: &PublicKey) -> Lookup<Self::Peer>;

    /// Has the source keep the greatest timestamp of a peer's initiations, so that they are replays
    /// even for whoever looks the peer up next. Never waits; false if the source keeps nothing.
    fn keep_timestamp(&self, _public_key: &PublicKey, _timestamp: Tai64N) -> bool {
        false
    }
}

/// What a [`PeerSource`] says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Lookup<P> {
    /// It knows the peer.
    Known(P),
    /// It does not.
    Unknown,
    /// It will say later.
    Pending,
}

/// A peer as a source describes it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KnownPeer {
    /// Its name in the protocol.
    pub public_key: PublicKey,
    /// Zero means none.
    pub preshared_key: PresharedKey,
    /// Where it is, as far as the source knows; nothing is sent there before it knocks.
    pub endpoint: Option<SocketAddr>,
    /// In seconds; 0: off.
    pub persistent_keepalive: u16,
    /// Host bits are ignored.
    pub allowed_ips: Vec<IpNet>,
    /// The greatest timestamp of its initiations that the source has kept; zero if none.
    pub greatest_timestamp: Tai64N,
}

/// Why a peer that a source knows is not pulled.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PullError {
    /// What an operator has configured is not changed by what a source says.
    #[error("{net} belongs to the configured peer {owner}")]
    Taken {
        /// The prefix.
        net: IpNet,
        /// Whose it is.
        owner: PublicKey,
    },
}

impl PeerSource for Device {
    type Peer = PeerId;

    fn lookup(&self, public_key: &PublicKey) -> Lookup<PeerId> {
        self.find(public_key).map_or(Lookup::Unknown, Lookup::Known)
    }
}

impl Device {
    /// Makes a peer of what a source knows; a peer that the device has already stays as it is.
    ///
    /// A prefix that another pulled peer owns moves, as it does between configured peers: the source's
    /// latest word counts. One that is part of a configured peer's larger prefix is taken as well, as
    /// from a configuration.
    ///
    /// # Errors
    /// If it would take a prefix away from a configured peer. Nothing has changed then.
    pub fn pull(&mut self, known: KnownPeer) -> Result<Vec<Effect>, PullError> {
        if self.find(&known.public_key).is_some() {
            return Ok(Vec::new());
        }
        for &net in &known.allowed_ips {
            let owner = self.allowed_ips.owner(net).and_then(|owner| self.peer(owner));
            if let Some(owner) = owner.filter(|owner| !owner.pulled) {
                return Err(PullError::Taken { net, owner: owner.public_key });
            }
        }
        let change = PeerChange {
            pulled: true,
            preshared_key: Some(known.preshared_key),
            endpoint: known.endpoint,
            persistent_keepalive: Some(known.persistent_keepalive),
            allowed_ips: known.allowed_ips.into_iter().map(AllowedIpChange::Add).collect(),
            ..PeerChange::new(known.public_key)
        };
        Ok(self.apply(SetRequest { peers: vec![change], ..SetRequest::default() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> PublicKey {
        PublicKey::from_bytes([seed; 32])
    }

    fn known(seed: u8, nets: &[&str]) -> KnownPeer {
        KnownPeer {
            public_key: key(seed),
            preshared_key: PresharedKey::from_bytes([seed; 32]),
            endpoint: None,
            persistent_keepalive: 0,
            allowed_ips: nets.iter().map(|net| net.parse().unwrap()).collect(),
            greatest_timestamp: [0; TIMESTAMP_LEN],
        }
    }

    fn configured(seed: u8, nets: &[&str]) -> SetRequest {
        let nets = nets.iter().map(|net| AllowedIpChange::Add(net.parse().unwrap()));
        let peer = PeerChange { allowed_ips: nets.collect(), ..PeerChange::new(key(seed)) };
        SetRequest { peers: vec![peer], ..SetRequest::default() }
    }

    #[test]
    fn a_pulled_peer_is_a_peer_with_a_mark() {
        let mut device = Device::default();
        assert_eq!(device.lookup(&key(1)), Lookup::Unknown);
        let effects = device.pull(known(1, &["10.0.0.1/32", "fd00::/64"])).unwrap();
        let id = device.find(&key(1)).unwrap();
        assert_eq!(device.lookup(&key(1)), Lookup::Known(id));
        let preshared = PresharedKey::from_bytes([1; 32]);
        let expected = [
            Effect::PeerAdded { id, public_key: key(1) },
            Effect::Preshared { id, key: preshared },
            Effect::RoutingChanged,
        ];
        assert_eq!(effects, expected);
        assert!(device.peer(id).unwrap().pulled);
        assert_eq!(device.allowed_ips().of_peer(id).count(), 2);
    }

    #[test]
    fn a_request_that_names_a_pulled_peer_makes_it_a_configured_one() {
        for request in [
            configured(1, &[]),
            SetRequest {
                peers: vec![PeerChange { update_only: true, ..PeerChange::new(key(1)) }],
                ..SetRequest::default()
            },
        ] {
            let mut device = Device::default();
            device.pull(known(1, &["10.0.0.1/32"])).unwrap();
            let id = device.find(&key(1)).unwrap();
            assert_eq!(device.apply(configured(2, &[])).len(), 1);
            assert!(device.peer(id).unwrap().pulled, "a request about another says nothing of it");
            assert_eq!(device.apply(request), []);
            assert!(!device.peer(id).unwrap().pulled);
        }
    }

    #[test]
    fn a_configured_peer_stays_as_it_is() {
        let mut device = Device::default();
        device.apply(configured(1, &["10.0.0.1/32"]));
        assert_eq!(device.pull(known(1, &["10.0.0.9/32"])), Ok(Vec::new()));
        let id = device.find(&key(1)).unwrap();
        assert!(!device.peer(id).unwrap().pulled);
        assert_eq!(device.allowed_ips().of_peer(id).count(), 1);
    }

    #[test]
    fn a_source_takes_no_prefix_from_a_configured_peer() {
        let mut device = Device::default();
        device.apply(configured(1, &["10.0.0.1/32", "10.1.0.0/16"]));
        let net = "10.0.0.1/32".parse().unwrap();
        let refused = device.pull(known(2, &["10.0.0.2/32", "10.0.0.1/32"]));
        assert_eq!(refused, Err(PullError::Taken { net, owner: key(1) }));
        assert_eq!(device.find(&key(2)), None);
        assert_eq!(device.allowed_ips().len(), 2);
        // Host bits hide nothing, and a part of a larger prefix may be given away.
        assert!(device.pull(known(2, &["10.1.2.3/16"])).is_err());
        device.pull(known(2, &["10.1.2.3/32"])).unwrap();
    }

    #[test]
    fn a_prefix_moves_from_one_pulled_peer_to_the_next() {
        let mut device = Device::default();
        device.pull(known(1, &["10.0.0.1/32"])).unwrap();
        device.pull(known(2, &["10.0.0.1/32"])).unwrap();
        let [first, second] = [1, 2].map(|seed| device.find(&key(seed)).unwrap());
        assert_eq!(device.allowed_ips().of_peer(first).count(), 0);
        assert_eq!(device.allowed_ips().of_peer(second).count(), 1);
    }
}
