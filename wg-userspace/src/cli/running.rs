//! What a device that runs is: the answer to `get=1`, with its keys.

use std::net::SocketAddr;

use ipnet::IpNet;

use super::{Code, Failure, name::InterfaceName, socket::Socket};
use crate::device::PacketRules;
use crate::key::{PresharedKey, PrivateKey, PublicKey};

/// A device as it is now.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Running {
    /// Its key, if it has one.
    pub private_key: Option<PrivateKey>,
    /// The port on which it listens; 0 if it listens on none.
    pub listen_port: u16,
    /// The mark of its datagrams; 0: none.
    pub fwmark: u32,
    /// What it does to packets.
    pub rules: PacketRules,
    /// Its peers, in the order in which they were added.
    pub peers: Vec<RunningPeer>,
}

/// A peer as it is now.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RunningPeer {
    /// The public key.
    pub public_key: PublicKey,
    /// Zero means none.
    pub preshared_key: PresharedKey,
    /// Where it is now.
    pub endpoint: Option<SocketAddr>,
    /// It is there because the daemon has looked up its name.
    pub is_by_name: bool,
    /// In seconds; 0: off.
    pub persistent_keepalive: u16,
    /// What people call it; empty if nobody has said.
    pub name: String,
    /// The prefixes that it owns, without host bits.
    pub allowed_ips: Vec<IpNet>,
    /// It came from a source of peers, and nobody has configured it.
    pub is_pulled: bool,
}

impl Running {
    /// Asks the daemon of an interface.
    ///
    /// # Errors
    /// If it does not answer, or not with a device.
    pub fn ask(interface: &InterfaceName, socket: &Socket) -> Result<Running, Failure> {
        let answer = socket.request("get=1\n")?;
        if let Some(error) = answer.error() {
            let doing = format!("asking the daemon of {interface}");
            return Err(anyhow::Error::new(error).context(doing).into());
        }
        Running::parse(answer.lines()).map_err(|key| {
            let line = format_args!("the daemon sent a `{key}` that makes no sense");
            Failure::new(Code::Runtime, line)
        })
    }

    /// Reads the lines of an answer; unknown ones are skipped, as by wg(8).
    ///
    /// # Errors
    /// The key of a line that makes no sense. Its value may be a key.
    pub fn parse<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Running, String> {
        let mut running = Running::default();
        for line in lines {
            let (key, value) = line.split_once('=').unwrap_or((line, ""));
            running.set(key, value).ok_or_else(|| key.to_owned())?;
        }
        Ok(running)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        if key == "public_key" {
            let public_key = PublicKey::from_hex(value).ok()?;
            self.peers.push(RunningPeer {
                public_key,
                preshared_key: PresharedKey::default(),
                endpoint: None,
                is_by_name: false,
                persistent_keepalive: 0,
                name: String::new(),
                allowed_ips: Vec::new(),
                is_pulled: false,
            });
            return Some(());
        }
        let Some(peer) = self.peers.last_mut() else {
            match key {
                "private_key" => self.private_key = Some(PrivateKey::from_hex(value).ok()?),
                "listen_port" => self.listen_port = value.parse().ok()?,
                "fwmark" => self.fwmark = value.parse().ok()?,
                "tidegate_mss_clamp" => self.rules.mss_clamp = value.parse().ok()?,
                "tidegate_copy_dscp" => self.rules.copy_dscp = value.parse().ok()?,
                _ => {}
            }
            return Some(());
        };
        match key {
            "preshared_key" => peer.preshared_key = PresharedKey::from_hex(value).ok()?,
            "endpoint" => peer.endpoint = Some(value.parse().ok()?),
            "persistent_keepalive_interval" => peer.persistent_keepalive = value.parse().ok()?,
            "allowed_ip" => peer.allowed_ips.push(value.parse::<IpNet>().ok()?.trunc()),
            "tidegate_name" => value.clone_into(&mut peer.name),
            "tidegate_by_name" => peer.is_by_name = value == "true",
            "tidegate_pulled" => peer.is_pulled = value == "true",
            _ => {}
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{AllowedIpChange, Device, KnownPeer, PeerChange, SetRequest},
        uapi::{self, PeerStatus},
    };

    #[test]
    fn an_answer_is_read_as_it_was_meant() {
        let mut device = Device::default();
        let nets = ["10.0.0.0/8", "fd00::/64"].map(|net| net.parse::<IpNet>().unwrap());
        device.apply(SetRequest {
            private_key: Some(Some(PrivateKey::from_bytes([0x48; 32]))),
            fwmark: Some(16),
            mss_clamp: Some(false),
            copy_dscp: Some(true),
            peers: vec![PeerChange {
                preshared_key: Some(PresharedKey::from_bytes([2; 32])),
                endpoint: Some("[fe80::1%3]:7".parse().unwrap()),
                persistent_keepalive: Some(25),
                name: Some("a laptop".to_owned()),
                allowed_ips: nets.map(AllowedIpChange::Add).to_vec(),
                ..PeerChange::new(PublicKey::from_bytes([1; 32]))
            }],
            ..SetRequest::default()
        });
        let pulled = KnownPeer {
            public_key: PublicKey::from_bytes([3; 32]),
            preshared_key: PresharedKey::default(),
            endpoint: None,
            persistent_keepalive: 0,
            allowed_ips: Vec::new(),
            greatest_timestamp: [0; 12],
        };
        device.pull(pulled).unwrap();
        let moved = device.find(&PublicKey::from_bytes([1; 32])).unwrap();
        let status = |id| PeerStatus { is_by_name: id == moved, ..PeerStatus::default() };
        let text = uapi::format_get(&device, 51820, &status);
        let running = Running::parse(text.lines()).unwrap();
        assert_eq!(running.private_key.as_ref(), device.private_key());
        assert_eq!((running.listen_port, running.fwmark), (51820, 16));
        assert_eq!(running.rules, device.packet_rules());
        assert_eq!(Running::default().rules, Device::default().packet_rules());
        let [configured, pulled] = running.peers.as_slice() else { panic!("{running:?}") };
        assert_eq!(configured.preshared_key, PresharedKey::from_bytes([2; 32]));
        assert_eq!(configured.endpoint, Some("[fe80::1%3]:7".parse().unwrap()));
        assert_eq!(configured.allowed_ips, nets);
        assert_eq!(configured.persistent_keepalive, 25);
        assert_eq!((&*configured.name, &*pulled.name), ("a laptop", ""));
        assert!(!configured.is_pulled && pulled.is_pulled);
        assert!(configured.is_by_name && !pulled.is_by_name);
    }

    #[test]
    fn nonsense_is_named_but_not_shown() {
        let lines = ["public_key=00", "private_key=zz", "listen_port=-1"];
        for (line, key) in lines.into_iter().zip(["public_key", "private_key", "listen_port"]) {
            assert_eq!(Running::parse([line].into_iter()).unwrap_err(), key);
        }
    }
}
