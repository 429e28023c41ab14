//! What `show` knows: the answers of daemons, as values.

use std::{collections::BTreeMap, str::FromStr};

use serde::{Deserialize, Serialize, Serializer};

use super::{peer_names, troubles::Trouble};
use crate::{
    key::{PresharedKey, PrivateKey, PublicKey},
    sandbox,
};

/// What `tidegate show --json` prints.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Report {
    /// Sorted by name.
    pub interfaces: Vec<Interface>,
}

/// A device and its peers. Keys are base64; fields that have no value are `null`.
#[derive(Debug, Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Interface {
    /// The name.
    pub name: String,
    /// The public key; nothing if the device has no private key.
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub public_key: Option<PublicKeyText>,
    /// The private key; left out unless `WG_HIDE_KEYS=never`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub private_key: Option<SecretText>,
    /// The UDP port.
    pub listen_port: u16,
    /// The mark of outer packets; 0 = none.
    pub fwmark: u32,
    /// The peer with the latest handshake first.
    pub peers: Vec<Peer>,
    /// The data path; nothing if the daemon is not Tidegate's.
    pub data_path: Option<DataPath>,
    /// What is wrong with the interface, but not with a peer of it.
    pub troubles: Vec<Trouble>,
    /// Troubles with peers that are not listed with them, since there are too many.
    pub more_troubles: usize,
}

/// A peer of a device.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Peer {
    /// The public key.
    #[cfg_attr(test, schemars(with = "String"))]
    pub public_key: PublicKeyText,
    /// Its name, if the daemon or a config file has one.
    pub name: Option<String>,
    /// Whether there is a preshared key.
    pub has_preshared_key: bool,
    /// The preshared key; left out unless `WG_HIDE_KEYS=never`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub preshared_key: Option<SecretText>,
    /// The current outer address and port.
    pub endpoint: Option<String>,
    /// Prefixes that the peer owns.
    pub allowed_ips: Vec<String>,
    /// The latest handshake, in seconds since 1970 (UTC).
    pub latest_handshake_unix_s: Option<u64>,
    /// Bytes received from the peer, whole messages counted.
    pub rx_bytes: u64,
    /// Bytes sent to the peer, whole messages counted.
    pub tx_bytes: u64,
    /// Seconds between persistent keepalives.
    pub persistent_keepalive_s: Option<u16>,
    /// The worker at which it is at home, if it has keys and the daemon is Tidegate's.
    pub worker: Option<u16>,
    /// What is wrong with it, the most urgent first.
    pub troubles: Vec<Trouble>,
}

/// The data path that a daemon of ours uses: its answer to `tidegate=status`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DataPath {
    /// How datagrams come in at best: `zerocopy`, `native` or `udp`.
    pub mode: String,
    /// Why this mode.
    pub reason: Option<String>,
    /// NICs that were named for XDP.
    pub nics: Vec<Nic>,
    /// Number of workers.
    pub workers: usize,
    /// Whether packets out of the TUN device come to the worker that their peer belongs to; nothing if the
    /// daemon did not say.
    pub tun_steering: Option<Steering>,
    /// Whether transport data on the listen port comes to the worker that its peer belongs to; nothing if the
    /// daemon did not say.
    pub socket_steering: Option<Steering>,
    /// Tunnel packets that came to another worker, and were handed on to it.
    pub handed_on: u64,
    /// Batches of this device's workers that others sealed or opened, since one thread was saturated.
    pub fanned_out: u64,
    /// Whether the segment size that a SYN offers is lowered to what the tunnel carries; nothing if the daemon
    /// did not say.
    pub mss_clamp: Option<bool>,
    /// Whether outer headers get the DSCP of the packets in them; nothing if the daemon did not say.
    pub copy_dscp: Option<bool>,
    /// What the process that opens packets may still do; nothing if it did not say.
    pub privileges: Option<sandbox::Report>,
    /// Workers that do not move at present.
    pub stuck_workers: usize,
    /// Whether handshakes come faster than the daemon would do them: it demands cookies.
    pub under_load: bool,
    /// Back end that seals and opens.
    pub aead: String,
    /// Whether, and for how long, the device makes no keys.
    pub quiesced: Option<Quiesced>,
    /// How often all sessions were cleared, by why.
    pub sessions_cleared: BTreeMap<String, u64>,
    /// Dropped packets by reason.
    pub drops: BTreeMap<String, u64>,
    /// What the source of pulled peers said, and what came of it; empty if there is none.
    pub peer_source: BTreeMap<String, u64>,
    /// What the steer program did with datagrams: events, and drops by reason.
    pub steer: BTreeMap<String, u64>,
    /// Tunnel packets received, by the path that they came: `xsk` or `socket`.
    pub paths: BTreeMap<String, u64>,
    /// Tunnel packets sent, by the path that they left: `xsk` or `socket`.
    pub sent: BTreeMap<String, u64>,
}

/// Whether the kernel hands packets to the worker that their peer belongs to.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Steering {
    /// Whether it does.
    pub is_on: bool,
    /// Why not, or which ones it does not.
    pub reason: Option<String>,
}

/// A pause without keys.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Quiesced {
    /// Seconds that are left of it; nothing if it lasts until somebody resumes.
    pub seconds_left: Option<u64>,
}

/// A NIC that was named for XDP.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Nic {
    /// Its name.
    pub name: String,
    /// Receive queues with an XSK.
    pub queues: u32,
    /// Whether the kernel hands packets over without copying them.
    pub zero_copy: bool,
    /// How packets come in: `zero-copy` or `copy` by AF_XDP, or `socket`.
    pub receive: String,
    /// How they leave, in the same words.
    pub transmit: String,
    /// Why it is so.
    pub reason: String,
}

/// A public key that is written as base64.
#[derive(Clone, Copy, Debug)]
pub struct PublicKeyText(pub PublicKey);

impl Serialize for PublicKeyText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// A secret key that is written as base64; only ever made when the user wants to see it.
pub struct SecretText(zeroize::Zeroizing<String>);

impl SecretText {
    /// The base64.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for SecretText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(hidden)")
    }
}

impl Serialize for SecretText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// A line of an answer that makes no sense. The value is not shown: it could be a key.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("the daemon sent a `{0}` that makes no sense")]
pub struct LineError(String);

impl Interface {
    /// Reads the lines of an answer to `get=1`. Unknown lines are skipped, as wg(8) does.
    /// Secret keys are kept only if `show_keys`.
    pub fn parse<'a>(
        name: &str,
        lines: impl Iterator<Item = &'a str>,
        show_keys: bool,
    ) -> Result<Self, LineError> {
        let mut interface = Self { name: name.to_owned(), ..Self::default() };
        for line in lines {
            let (key, value) = line.split_once('=').ok_or_else(|| LineError(String::new()))?;
            let wrong = || LineError(key.to_owned());
            if key == "public_key" {
                let public_key = PublicKey::from_hex(value).map_err(|_| wrong())?;
                interface.peers.push(Peer::new(public_key));
            } else if let Some(peer) = interface.peers.last_mut() {
                peer.set(key, value, show_keys).ok_or_else(wrong)?;
            } else {
                interface.set(key, value, show_keys).ok_or_else(wrong)?;
            }
        }
        // Stable: peers without a handshake keep the daemon's order, as in wg(8).
        interface.peers.sort_by_key(|peer| std::cmp::Reverse(peer.latest_handshake_unix_s));
        Ok(interface)
    }

    fn set(&mut self, key: &str, value: &str, show_keys: bool) -> Option<()> {
        match key {
            "private_key" => {
                let private = PrivateKey::from_hex(value).ok()?;
                self.public_key = Some(PublicKeyText(private.public_key()));
                self.private_key = show_keys.then(|| SecretText(private.to_base64()));
            }
            "listen_port" => self.listen_port = value.parse().ok()?,
            "fwmark" => self.fwmark = value.parse().ok()?,
            _ => {}
        }
        Some(())
    }
}

impl Peer {
    fn new(public_key: PublicKey) -> Self {
        Self {
            public_key: PublicKeyText(public_key),
            name: None,
            has_preshared_key: false,
            preshared_key: None,
            endpoint: None,
            allowed_ips: Vec::new(),
            latest_handshake_unix_s: None,
            rx_bytes: 0,
            tx_bytes: 0,
            persistent_keepalive_s: None,
            worker: None,
            troubles: Vec::new(),
        }
    }

    fn set(&mut self, key: &str, value: &str, show_keys: bool) -> Option<()> {
        match key {
            "preshared_key" => {
                let preshared = PresharedKey::from_hex(value).ok()?;
                self.has_preshared_key = !preshared.is_zero();
                let show = show_keys && self.has_preshared_key;
                self.preshared_key = show.then(|| SecretText(preshared.to_base64()));
            }
            "tidegate_name" => self.name = peer_names::printable(value),
            "endpoint" => self.endpoint = Some(value.to_owned()),
            "allowed_ip" => self.allowed_ips.push(value.to_owned()),
            "last_handshake_time_sec" => self.latest_handshake_unix_s = nonzero(value)?,
            "rx_bytes" => self.rx_bytes = value.parse().ok()?,
            "tx_bytes" => self.tx_bytes = value.parse().ok()?,
            "persistent_keepalive_interval" => self.persistent_keepalive_s = nonzero(value)?,
            "tidegate_worker" => self.worker = Some(value.parse().ok()?),
            _ => {}
        }
        Some(())
    }
}

/// A number, or nothing for 0; `None` outside if it is no number.
fn nonzero<N: FromStr + Default + PartialEq>(text: &str) -> Option<Option<N>> {
    let number: N = text.parse().ok()?;
    Some((number != N::default()).then_some(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Interface, LineError> {
        Interface::parse("wg0", text.lines(), false)
    }

    #[test]
    fn a_new_device_is_almost_empty() {
        let interface = parse("listen_port=0\nfwmark=0\n").unwrap();
        assert!(interface.public_key.is_none() && interface.peers.is_empty());
    }

    #[test]
    fn peers_come_by_their_latest_handshake() {
        let peer = |byte: u8, time: u64| {
            format!(
                "public_key={}\nlast_handshake_time_sec={time}\n",
                format!("{byte:02x}").repeat(32)
            )
        };
        let text = [peer(1, 0), peer(2, 5), peer(3, 9), peer(4, 0)].concat();
        let order: Vec<u8> = parse(&text)
            .unwrap()
            .peers
            .iter()
            .map(|peer| peer.public_key.0.as_bytes()[0])
            .collect();
        assert_eq!(order, [3, 2, 1, 4]);
    }

    #[test]
    fn secrets_are_kept_only_when_wanted() {
        let text = format!(
            "private_key={}\npublic_key={}\npreshared_key={}\n",
            "48".repeat(32),
            "01".repeat(32),
            "22".repeat(32)
        );
        let hidden = parse(&text).unwrap();
        let json = serde_json::to_string(&hidden).unwrap();
        assert!(hidden.private_key.is_none() && hidden.peers[0].preshared_key.is_none());
        assert!(json.contains(r#""has_preshared_key":true"#) && !json.contains("private_key"));
        let shown = Interface::parse("wg0", text.lines(), true).unwrap();
        let json = serde_json::to_string(&shown).unwrap();
        assert!(json.contains("SEhISEhI") && json.contains("IiIiIiIi"));
        assert!(!format!("{shown:?}").contains("SEhISEhI"));
    }

    #[test]
    fn nonsense_is_named_but_not_shown() {
        for (line, key) in [
            ("private_key=zz", "private_key"),
            ("listen_port=65536", "listen_port"),
            ("public_key=00", "public_key"),
            ("fwmark=-1", "fwmark"),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.to_string(), format!("the daemon sent a `{key}` that makes no sense"));
        }
        assert!(parse("no equals sign").is_err());
    }

    #[test]
    fn a_data_path_may_say_more_or_less_than_we_know() {
        let json = r#"{"mode":"native","nics":[{"name":"eth0"}],"workers":2,
            "drops":{"replay":3},"new":1}"#;
        let data_path: DataPath = serde_json::from_str(json).unwrap();
        assert_eq!(data_path.workers, 2);
        assert_eq!(data_path.nics[0].name, "eth0");
        assert_eq!(data_path.drops["replay"], 3);
        assert!(data_path.paths.is_empty() && data_path.reason.is_none());
    }
}
