use proptest::prelude::*;

use super::*;

fn private(seed: u8) -> PrivateKey {
    PrivateKey::from_bytes([seed; 32])
}

/// A key that nobody has the private one of.
fn public(seed: u8) -> PublicKey {
    PublicKey::from_bytes([seed; 32])
}

fn preshared(seed: u8) -> PresharedKey {
    PresharedKey::from_bytes([seed; 32])
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn change(seed: u8, nets: &[&str]) -> PeerChange {
    PeerChange {
        allowed_ips: nets.iter().map(|text| AllowedIpChange::Add(net(text))).collect(),
        ..PeerChange::new(public(seed))
    }
}

fn set(peers: Vec<PeerChange>) -> SetRequest {
    SetRequest { peers, ..SetRequest::default() }
}

fn keys(device: &Device) -> Vec<PublicKey> {
    device.peers().map(|(_, peer)| peer.public_key).collect()
}

fn nets_of(device: &Device, seed: u8) -> Vec<String> {
    let id = device.find(&public(seed)).unwrap();
    device.allowed_ips().of_peer(id).map(|net| net.to_string()).collect()
}

#[test]
fn each_change_is_told_once() {
    let mut device = Device::default();
    let addr = "198.51.100.1:51820".parse().unwrap();
    let request = SetRequest {
        private_key: Some(Some(private(1))),
        listen_port: Some(51820),
        fwmark: Some(7),
        mss_clamp: Some(true),
        copy_dscp: Some(true),
        replace_peers: true,
        peers: vec![PeerChange {
            preshared_key: Some(preshared(3)),
            endpoint: Some(addr),
            persistent_keepalive: Some(25),
            replace_allowed_ips: true,
            ..change(2, &["10.0.0.1/24"])
        }],
    };
    let id = PeerId(0);
    assert_eq!(
        device.apply(request.clone()),
        [
            Effect::FwMark(7),
            Effect::ListenPort(51820),
            Effect::PacketRules(PacketRules { mss_clamp: true, copy_dscp: true }),
            Effect::PrivateKey(Some(private(1))),
            Effect::PeerAdded { id, public_key: public(2) },
            Effect::Preshared { id, key: preshared(3) },
            Effect::Endpoint { id, addr },
            Effect::PersistentKeepalive { id, seconds: 25 },
            Effect::RoutingChanged,
        ]
    );
    assert_eq!(device.public_key(), Some(private(1).public_key()));
    assert_eq!(nets_of(&device, 2), ["10.0.0.0/24"]);
    let again = SetRequest { replace_peers: false, ..request };
    assert_eq!(device.apply(again), [Effect::Endpoint { id, addr }]);
}

#[test]
fn zero_and_off_are_told_as_changes() {
    let mut device = Device::default();
    let on = PeerChange {
        preshared_key: Some(preshared(3)),
        persistent_keepalive: Some(25),
        ..change(2, &[])
    };
    device.apply(SetRequest {
        private_key: Some(Some(private(1))),
        fwmark: Some(1),
        ..set(vec![on])
    });
    let off = PeerChange {
        preshared_key: Some(PresharedKey::default()),
        persistent_keepalive: Some(0),
        update_only: true,
        ..change(2, &[])
    };
    let effects =
        device.apply(SetRequest { private_key: Some(None), fwmark: Some(0), ..set(vec![off]) });
    let id = PeerId(0);
    assert_eq!(
        effects,
        [
            Effect::FwMark(0),
            Effect::PrivateKey(None),
            Effect::Preshared { id, key: PresharedKey::default() },
            Effect::PersistentKeepalive { id, seconds: 0 },
        ]
    );
    assert_eq!(device.public_key(), None);
}

#[test]
fn who_is_not_there_is_neither_updated_nor_removed() {
    let mut device = Device::default();
    let update = PeerChange { update_only: true, ..change(2, &["10.0.0.0/8"]) };
    let remove = PeerChange { remove: true, ..change(2, &["10.0.0.0/8"]) };
    assert_eq!(device.apply(set(vec![update, remove])), []);
    assert_eq!(device.peer_count(), 0);
}

#[test]
fn nobody_is_a_peer_of_himself() {
    let mut device = Device::default();
    let own = PeerChange::new(private(1).public_key());
    let with_key = SetRequest { private_key: Some(Some(private(1))), ..set(vec![own.clone()]) };
    assert_eq!(device.apply(with_key), [Effect::PrivateKey(Some(private(1)))]);

    device.apply(SetRequest { private_key: Some(Some(private(5))), ..set(vec![own]) });
    let effects =
        device.apply(SetRequest { private_key: Some(Some(private(1))), ..SetRequest::default() });
    assert_eq!(
        effects,
        [
            Effect::PeerRemoved { id: PeerId(0), public_key: private(1).public_key() },
            Effect::PrivateKey(Some(private(1))),
        ]
    );
}

#[test]
fn a_prefix_moves_to_the_peer_that_gets_it_last() {
    let mut device = Device::default();
    device.apply(set(vec![change(1, &["10.0.0.0/8", "fd00::/64"]), change(2, &[])]));
    let moved = change(2, &["10.1.2.3/8"]);
    assert_eq!(device.apply(set(vec![moved.clone()])), [Effect::RoutingChanged]);
    assert_eq!(nets_of(&device, 1), ["fd00::/64"]);
    assert_eq!(nets_of(&device, 2), ["10.0.0.0/8"]);
    assert_eq!(device.apply(set(vec![moved])), []);
}

#[test]
fn a_prefix_is_taken_away_only_from_its_owner() {
    let mut device = Device::default();
    device.apply(set(vec![change(1, &["10.0.0.0/8"]), change(2, &["10.0.0.0/9"])]));
    let without = |seed| PeerChange {
        allowed_ips: vec![AllowedIpChange::Remove(net("10.0.0.0/8"))],
        ..change(seed, &[])
    };
    assert_eq!(device.apply(set(vec![without(2)])), []);
    assert_eq!(device.apply(set(vec![without(1)])), [Effect::RoutingChanged]);
    assert_eq!(nets_of(&device, 1), [""; 0]);
}

#[test]
fn replacing_with_the_same_prefixes_changes_nothing() {
    let mut device = Device::default();
    let replace =
        |nets: &[&str]| set(vec![PeerChange { replace_allowed_ips: true, ..change(1, nets) }]);
    assert_eq!(device.apply(replace(&["10.0.0.0/8", "fd00::/8"])).len(), 2);
    assert_eq!(device.apply(replace(&["10.0.0.0/8", "fd00::/8"])), []);
    assert_eq!(device.apply(replace(&["10.0.0.0/8"])), [Effect::RoutingChanged]);
    assert_eq!(nets_of(&device, 1), ["10.0.0.0/8"]);
    assert_eq!(device.apply(replace(&[])), [Effect::RoutingChanged]);
    assert_eq!(device.apply(replace(&[])), []);
}

#[test]
fn peers_are_listed_in_the_order_in_which_they_were_added() {
    let mut device = Device::default();
    device.apply(set(vec![change(1, &[]), change(2, &[]), change(3, &[])]));
    let remove = PeerChange { remove: true, ..change(1, &[]) };
    device.apply(set(vec![remove]));
    device.apply(set(vec![change(4, &[])]));
    assert_eq!(keys(&device), [public(2), public(3), public(4)]);
    assert_eq!(device.find(&public(4)), Some(PeerId(0)), "the slot is used again");
    assert_eq!(device.find(&public(3)), Some(PeerId(2)), "the others stay where they are");
}

#[test]
fn a_slot_is_not_freed_and_used_in_one_request() {
    let mut device = Device::default();
    device.apply(set(vec![change(1, &["10.0.0.0/8"])]));
    let effects =
        device.apply(SetRequest { replace_peers: true, ..set(vec![change(2, &["10.0.0.0/8"])]) });
    assert_eq!(
        effects,
        [
            Effect::PeerRemoved { id: PeerId(0), public_key: public(1) },
            Effect::PeerAdded { id: PeerId(1), public_key: public(2) },
            Effect::RoutingChanged,
        ]
    );
}

#[test]
fn a_file_says_all_that_a_device_is() {
    let text = format!(
        "[Interface]\nPrivateKey = {}\nFwMark = 9\n[Peer]\nPublicKey = {}\nEndpoint = a.example:5\n\
         AllowedIPs = 10.0.0.1/8\n#! Name = laptop\n[Peer]\nPublicKey = {}\n\
         PersistentKeepalive = 3\n",
        private(1).to_base64().as_str(),
        public(2),
        public(3)
    );
    let config = crate::config::parse("wg0.conf", &text).unwrap();
    let addr: SocketAddr = "192.0.2.1:5".parse().unwrap();
    let request = SetRequest::replacing(&config, |_| Some(addr));
    let mut device = Device::default();
    device.apply(SetRequest { listen_port: Some(1), ..set(vec![change(9, &[])]) });
    device.apply(request);
    assert_eq!(keys(&device), [public(2), public(3)]);
    assert_eq!((device.listen_port(), device.fwmark()), (0, 9));
    let peers: Vec<_> = device.peers().map(|(_, peer)| peer.clone()).collect();
    assert_eq!((&*peers[0].name, &*peers[1].name), ("laptop", ""));
    assert_eq!((peers[0].endpoint, peers[0].persistent_keepalive), (Some(addr), 0));
    assert_eq!((peers[1].endpoint, peers[1].persistent_keepalive), (None, 3));
    assert_eq!(nets_of(&device, 2), ["10.0.0.0/8"]);
}

/// Requests about few keys and few prefixes, so that they meet.
fn any_request() -> impl Strategy<Value = SetRequest> {
    let net = (0..3_u8, 8..11_u8)
        .prop_map(|(octet, len)| IpNet::new([10, octet, 0, 0].into(), len).unwrap().trunc());
    let allowed_ip = (any::<bool>(), net).prop_map(|(adds, net)| {
        if adds { AllowedIpChange::Add(net) } else { AllowedIpChange::Remove(net) }
    });
    let flags = any::<[bool; 3]>();
    let peer = (0..5_u8, 0..4_u8, flags, prop::collection::vec(allowed_ip, 0..4)).prop_map(
        |(seed, dice, [update_only, replace_allowed_ips, own], allowed_ips)| PeerChange {
            public_key: if own { private(seed).public_key() } else { public(seed) },
            remove: dice == 0,
            update_only,
            preshared_key: Some(preshared(dice)),
            endpoint: None,
            persistent_keepalive: Some(dice.into()),
            name: ["", "a", "b"].get(usize::from(dice)).map(|&name| name.to_owned()),
            replace_allowed_ips,
            allowed_ips,
            pulled: false,
        },
    );
    let private_key = prop::option::of(prop::option::of((0..5_u8).prop_map(private)));
    (private_key, 0..4_u8, prop::collection::vec(peer, 0..5)).prop_map(
        |(private_key, dice, peers)| SetRequest {
            private_key,
            listen_port: Some(dice.into()),
            fwmark: Some(dice.into()),
            mss_clamp: [None, Some(true), Some(false)].get(usize::from(dice)).copied().flatten(),
            copy_dscp: [Some(true), Some(false)].get(usize::from(dice)).copied().flatten(),
            replace_peers: dice == 0,
            peers,
        },
    )
}

/// Another device, known only by effects: who hears all of them knows all.
#[derive(Default)]
struct Follower {
    private_key: Option<PrivateKey>,
    listen_port: u16,
    fwmark: u32,
    rules: PacketRules,
    peers: BTreeMap<PeerId, Peer>,
}

impl Follower {
    fn hear(&mut self, effect: Effect) {
        match effect {
            Effect::PrivateKey(key) => self.private_key = key,
            Effect::ListenPort(port) => self.listen_port = port,
            Effect::FwMark(mark) => self.fwmark = mark,
            Effect::PacketRules(rules) => self.rules = rules,
            Effect::PeerAdded { id, public_key } => {
                let preshared_key = PresharedKey::default();
                let peer = Peer {
                    public_key,
                    preshared_key,
                    endpoint: None,
                    persistent_keepalive: 0,
                    name: String::new(),
                    pulled: false,
                };
                assert!(self.peers.insert(id, peer).is_none(), "slot {id} is in use");
            }
            Effect::PeerRemoved { id, public_key } => {
                assert_eq!(self.peers.remove(&id).unwrap().public_key, public_key);
            }
            Effect::Endpoint { id, addr } => {
                self.peers.get_mut(&id).unwrap().endpoint = Some(addr);
            }
            Effect::Preshared { id, key } => self.peers.get_mut(&id).unwrap().preshared_key = key,
            Effect::PersistentKeepalive { id, seconds } => {
                self.peers.get_mut(&id).unwrap().persistent_keepalive = seconds;
            }
            Effect::Name { id, name } => self.peers.get_mut(&id).unwrap().name = name,
            Effect::RoutingChanged => {}
        }
    }
}

proptest! {
    #[test]
    fn who_hears_the_effects_knows_the_device(
        requests in prop::collection::vec(any_request(), 1..8)
    ) {
        let mut device = Device::default();
        let mut follower = Follower::default();
        for request in requests {
            let nets = |device: &Device| -> BTreeMap<PeerId, Vec<IpNet>> {
                device.peers().map(|(id, _)| (id, device.allowed_ips().of_peer(id).collect())).collect()
            };
            let before = (nets(&device), device.allowed_ips().len());
            let effects = device.apply(request);

            let mut freed = Vec::new();
            for effect in &effects {
                match effect {
                    Effect::PeerRemoved { id, .. } => freed.push(*id),
                    Effect::PeerAdded { id, .. } => prop_assert!(!freed.contains(id)),
                    _ => {}
                }
            }
            if !effects.contains(&Effect::RoutingChanged) {
                let mut expected = before.0.clone();
                expected.retain(|_, nets| !nets.is_empty());
                let mut found = nets(&device);
                found.retain(|_, nets| !nets.is_empty());
                let sorted = |mut all: BTreeMap<PeerId, Vec<IpNet>>| {
                    all.values_mut().for_each(|nets| nets.sort());
                    all
                };
                prop_assert_eq!(sorted(expected), sorted(found));
                prop_assert_eq!(before.1, device.allowed_ips().len());
            }

            effects.into_iter().for_each(|effect| follower.hear(effect));
            prop_assert_eq!(&follower.private_key, &device.private_key);
            prop_assert_eq!(follower.rules, device.packet_rules());
            prop_assert_eq!((follower.listen_port, follower.fwmark), (device.listen_port, device.fwmark));
            let peers: BTreeMap<_, _> = device.peers().map(|(id, peer)| (id, peer.clone())).collect();
            prop_assert_eq!(&follower.peers, &peers);
            prop_assert_eq!(device.peer_count(), peers.len());
            prop_assert!(device.public_key().is_none_or(|key| device.find(&key).is_none()));
            let owned: usize = nets(&device).values().map(Vec::len).sum();
            prop_assert_eq!(owned, device.allowed_ips().len(), "no prefix is left behind");
        }
    }
}

#[test]
fn a_million_peers_have_room() {
    assert!(size_of::<Option<Slot>>() <= 136, "{} bytes", size_of::<Option<Slot>>());
}

#[test]
fn who_removes_the_last_peer_gives_its_memory_back() {
    let mut device = Device::default();
    for round in 0..3 {
        let peers = (0..50).map(|number| PeerChange::new(PublicKey::from_bytes([number; 32])));
        let effects = device.apply(SetRequest { peers: peers.collect(), ..SetRequest::default() });
        assert_eq!(effects.len(), 50);
        assert_eq!((device.slot_count(), device.peer_count()), (50, 50), "round {round}");
        device.apply(SetRequest { replace_peers: true, ..SetRequest::default() });
        assert_eq!((device.slot_count(), device.peers.by_key.capacity()), (0, 0));
        assert_eq!(device.find(&PublicKey::from_bytes([7; 32])), None);
    }
}
