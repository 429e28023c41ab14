//! The text that wg(8) sends: read, written and read again, and carried out on a device.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ipnet::IpNet;
use wg_common::id::PeerId;
use wg_userspace::device::{AllowedIpChange, Device, Effect, PacketRules, PeerChange, SetRequest};
use wg_userspace::key::{PresharedKey, PrivateKey, PublicKey};
use wg_userspace::uapi::{PeerStatus, SetProblem, format_get, format_set, parse_set};

/// Requests, an empty line between each two, to one device.
pub fn run(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let (mut device, mut model, mut mirror) = <(Device, Model, Mirror)>::default();
    for lines in text.split("\n\n").take(8) {
        let request = match parse_set(lines) {
            Ok(request) => request,
            Err(error) => {
                assert!((1..=lines.lines().count().max(1)).contains(&error.line));
                assert_shows_no_key(lines, &error.problem);
                continue;
            }
        };
        let written = format_set(&request);
        let rest = written.strip_prefix("set=1\n").expect("its first line");
        assert_eq!(parse_set(rest).as_ref(), Ok(&request), "what is written is read");

        model.apply(&request);
        let effects = device.apply(request.clone());
        mirror.hear(effects);
        assert_eq!(Model::of(&device), model);
        mirror.check(&device);
        // What is shown makes the same device elsewhere.
        let shown = show(&device);
        let mut copy = Device::default();
        copy.apply(parse_set(&settable(&shown)).expect("what is shown is taken"));
        assert_eq!(show(&copy), shown);
    }
}

/// Lines as long as a key in hexadecimal are in no error.
fn assert_shows_no_key(lines: &str, problem: &SetProblem) {
    let said = problem.to_string();
    let is_key = |word: &&str| word.len() >= 64 && word.bytes().all(|b| b.is_ascii_hexdigit());
    for key in lines.split(['\n', '=']).filter(is_key) {
        assert!(!said.contains(&key[..48]), "{said}");
    }
}

fn show(device: &Device) -> String {
    format_get(device, device.listen_port(), &|_| PeerStatus::default()).to_string()
}

/// The lines of an answer that are also those of a request.
fn settable(shown: &str) -> String {
    const STATUS: [&str; 3] = ["last_handshake_time", "rx_bytes=", "tx_bytes="];
    let is_setting = |line: &&str| !STATUS.iter().any(|status| line.starts_with(status));
    shown.lines().filter(is_setting).map(|line| format!("{line}\n")).collect()
}

/// A device as plain lists.
#[derive(Debug, Default, PartialEq)]
struct Model {
    private_key: Option<PrivateKey>,
    listen_port: u16,
    fwmark: u32,
    peers: Vec<ModelPeer>,
}

#[derive(Debug, PartialEq)]
struct ModelPeer {
    public_key: PublicKey,
    preshared_key: PresharedKey,
    endpoint: Option<SocketAddr>,
    persistent_keepalive: u16,
    name: String,
    nets: Vec<IpNet>,
}

impl Model {
    fn of(device: &Device) -> Self {
        let peers = device.peers().map(|(id, peer)| ModelPeer {
            public_key: peer.public_key,
            preshared_key: peer.preshared_key.clone(),
            endpoint: peer.endpoint,
            persistent_keepalive: peer.persistent_keepalive,
            name: peer.name.clone(),
            nets: device.allowed_ips().of_peer(id).collect(),
        });
        Self {
            private_key: device.private_key().cloned(),
            listen_port: device.listen_port(),
            fwmark: device.fwmark(),
            peers: peers.collect(),
        }
    }

    fn own_key(&self) -> Option<PublicKey> {
        self.private_key.as_ref().map(PrivateKey::public_key)
    }

    fn apply(&mut self, request: &SetRequest) {
        self.fwmark = request.fwmark.unwrap_or(self.fwmark);
        self.listen_port = request.listen_port.unwrap_or(self.listen_port);
        if request.replace_peers {
            self.peers.clear();
        }
        if let Some(key) = &request.private_key {
            self.private_key.clone_from(key);
            let own_key = self.own_key();
            self.peers.retain(|peer| Some(peer.public_key) != own_key);
        }
        for change in &request.peers {
            self.change(change);
        }
    }

    fn change(&mut self, change: &PeerChange) {
        let known = self.peers.iter().position(|peer| peer.public_key == change.public_key);
        if self.own_key() == Some(change.public_key)
            || known.is_none() && (change.remove || change.update_only)
        {
            return;
        }
        if change.remove {
            self.peers.remove(known.expect("looked for above"));
            return;
        }
        let at = known.unwrap_or_else(|| {
            self.peers.push(ModelPeer {
                public_key: change.public_key,
                preshared_key: PresharedKey::default(),
                endpoint: None,
                persistent_keepalive: 0,
                name: String::new(),
                nets: Vec::new(),
            });
            self.peers.len() - 1
        });
        let peer = &mut self.peers[at];
        if let Some(key) = &change.preshared_key {
            peer.preshared_key = key.clone();
        }
        peer.endpoint = change.endpoint.or(peer.endpoint);
        peer.persistent_keepalive =
            change.persistent_keepalive.unwrap_or(peer.persistent_keepalive);
        if let Some(name) = &change.name {
            peer.name.clone_from(name);
        }
        if change.replace_allowed_ips {
            peer.nets.clear();
        }
        for change in &change.allowed_ips {
            match change {
                AllowedIpChange::Add(net) => {
                    let net = net.trunc();
                    self.peers.iter_mut().for_each(|peer| peer.nets.retain(|own| *own != net));
                    self.peers[at].nets.push(net);
                }
                AllowedIpChange::Remove(net) => {
                    self.peers[at].nets.retain(|own| *own != net.trunc());
                }
            }
        }
    }
}

/// What somebody knows of a device who hears its effects and nothing else.
#[derive(Default)]
struct Mirror {
    key: Option<PrivateKey>,
    port: u16,
    fwmark: u32,
    rules: PacketRules,
    peers: BTreeMap<u32, MirrorPeer>,
}

struct MirrorPeer {
    public_key: PublicKey,
    preshared_key: PresharedKey,
    endpoint: Option<SocketAddr>,
    persistent_keepalive: u16,
    name: String,
}

impl Mirror {
    fn hear(&mut self, effects: Vec<Effect>) {
        let mut freed = Vec::new();
        for effect in effects {
            match effect {
                Effect::PrivateKey(key) => self.key = key,
                Effect::ListenPort(port) => self.port = port,
                Effect::FwMark(mark) => self.fwmark = mark,
                Effect::PacketRules(rules) => self.rules = rules,
                Effect::PeerAdded { id, public_key } => {
                    assert!(!freed.contains(&id), "a slot is not freed and used in one request");
                    let peer = MirrorPeer {
                        public_key,
                        preshared_key: PresharedKey::default(),
                        endpoint: None,
                        persistent_keepalive: 0,
                        name: String::new(),
                    };
                    assert!(self.peers.insert(id.0, peer).is_none(), "the slot is free");
                }
                Effect::PeerRemoved { id, public_key } => {
                    let peer = self.peers.remove(&id.0).expect("it was added");
                    assert_eq!(peer.public_key, public_key);
                    freed.push(id);
                }
                Effect::Endpoint { id, addr } => self.peer(id).endpoint = Some(addr),
                Effect::Preshared { id, key } => self.peer(id).preshared_key = key,
                Effect::PersistentKeepalive { id, seconds } => {
                    self.peer(id).persistent_keepalive = seconds;
                }
                Effect::Name { id, name } => self.peer(id).name = name,
                Effect::RoutingChanged => {}
            }
        }
    }

    fn peer(&mut self, id: PeerId) -> &mut MirrorPeer {
        self.peers.get_mut(&id.0).expect("an effect names a peer that is there")
    }

    fn check(&self, device: &Device) {
        assert_eq!(self.key.as_ref(), device.private_key());
        assert_eq!((self.port, self.fwmark), (device.listen_port(), device.fwmark()));
        assert_eq!(self.rules, device.packet_rules());
        assert_eq!(self.peers.len(), device.peer_count());
        for (id, peer) in device.peers() {
            let known = &self.peers[&id.0];
            assert_eq!(known.public_key, peer.public_key);
            assert_eq!(known.preshared_key, peer.preshared_key);
            assert_eq!(known.endpoint, peer.endpoint);
            assert_eq!(known.persistent_keepalive, peer.persistent_keepalive);
            assert_eq!(known.name, peer.name);
            assert_eq!(device.find(&peer.public_key), Some(id));
        }
    }
}

/// A whole device, then changes of every kind; and what is nearly right.
pub fn seeds() -> Vec<Vec<u8>> {
    let key = |byte: u8| format!("{byte:02x}").repeat(32);
    let [a, b] = [key(2), key(3)];
    let own = PrivateKey::from_bytes([0x48; 32]).public_key().to_hex();
    let whole = format!(
        "private_key={}\nlisten_port=51820\nfwmark=31\ntidegate_mss_clamp=false\ntidegate_copy_dscp=true\nreplace_peers=true\n\
         public_key={a}\npreshared_key={b}\nprotocol_version=1\nendpoint=192.0.2.1:7\n\
         persistent_keepalive_interval=25\ntidegate_name=a laptop\nreplace_allowed_ips=true\nallowed_ip=10.0.0.0/8\n\
         allowed_ip=fd00::/8\npublic_key={b}\nendpoint=[fd00::1]:5\nallowed_ip=10.1.0.0/16\n",
        key(0x48)
    );
    let changes = format!(
        "\npublic_key={b}\nallowed_ip=10.0.0.0/8\nallowed_ip=-10.1.0.0/16\n\
         public_key={a}\nupdate_only=true\npublic_key={own}\nallowed_ip=::/0\n\n\
         private_key={}\npublic_key={a}\nremove=true\npublic_key={a}\n\
         tidegate_name=\n",
        key(0)
    );
    let nearly =
        format!("public_key={own}\n\nprivate_key={}\n\nendpoint={a}\n\n{a}={b}", key(0x48));
    [whole.clone(), whole + &changes, nearly, "fwmark=0x1\n\nlisten_port=65536".to_owned()]
        .map(String::into_bytes)
        .to_vec()
}
