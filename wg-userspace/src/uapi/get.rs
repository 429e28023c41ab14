//! What a device is, in the words of the protocol.

use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use wg_common::id::PeerId;
use zeroize::Zeroizing;

use crate::device::Device;

/// What is known of a peer beside its configuration.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PeerStatus {
    /// Where it is now; if that is not known, where it was configured to be is shown.
    pub endpoint: Option<SocketAddr>,
    /// When a handshake with it succeeded last, by the wall clock.
    pub last_handshake: Option<SystemTime>,
    /// Bytes of messages from it.
    pub rx_bytes: u64,
    /// Bytes of messages to it.
    pub tx_bytes: u64,
}

/// The lines that answer `get=1`, without `errno`.
///
/// `listen_port` is the port in use, which may not be the one configured (0 is any). The text holds
/// the device's keys: it is wiped on drop, and never moves while it grows.
pub fn format_get(
    device: &Device,
    listen_port: u16,
    live: &dyn Fn(PeerId) -> PeerStatus,
) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(len_max(device)));
    write_all(&mut text, device, listen_port, live).expect("a string takes everything");
    text
}

fn write_all(
    text: &mut String,
    device: &Device,
    listen_port: u16,
    live: &dyn Fn(PeerId) -> PeerStatus,
) -> fmt::Result {
    if let Some(key) = device.private_key() {
        writeln!(text, "private_key={}", key.to_hex().as_str())?;
    }
    writeln!(text, "listen_port={listen_port}")?;
    if device.fwmark() != 0 {
        writeln!(text, "fwmark={}", device.fwmark())?;
    }
    for (id, peer) in device.peers() {
        let live = live(id);
        writeln!(text, "public_key={}", peer.public_key.to_hex())?;
        writeln!(text, "preshared_key={}", peer.preshared_key.to_hex().as_str())?;
        writeln!(text, "protocol_version=1")?;
        if let Some(endpoint) = live.endpoint.or(peer.endpoint) {
            writeln!(text, "endpoint={endpoint}")?;
        }
        let handshake = live.last_handshake.and_then(|when| when.duration_since(UNIX_EPOCH).ok());
        let handshake = handshake.unwrap_or_default();
        writeln!(text, "last_handshake_time_sec={}", handshake.as_secs())?;
        writeln!(text, "last_handshake_time_nsec={}", handshake.subsec_nanos())?;
        writeln!(text, "tx_bytes={}", live.tx_bytes)?;
        writeln!(text, "rx_bytes={}", live.rx_bytes)?;
        writeln!(text, "persistent_keepalive_interval={}", peer.persistent_keepalive)?;
        for net in device.allowed_ips().of_peer(id) {
            writeln!(text, "allowed_ip={net}")?;
        }
    }
    Ok(())
}

/// No answer about `device` is longer, in bytes.
fn len_max(device: &Device) -> usize {
    /// `private_key=`, `listen_port=` and `fwmark=` with their values.
    const DEVICE: usize = (12 + 64 + 1) + (12 + 5 + 1) + (7 + 10 + 1);
    /// All lines of a peer but its allowed IPs, with the longest values.
    const PEER: usize = (11 + 64 + 1)
        + (14 + 64 + 1)
        + (18 + 1)
        + (9 + "[1111:1111:1111:1111:1111:1111:255.255.255.255%4294967295]:65535".len() + 1)
        + (24 + 20 + 1)
        + (25 + 9 + 1)
        + 2 * (9 + 20 + 1)
        + (30 + 5 + 1);
    const ALLOWED_IP: usize = 11 + "1111:1111:1111:1111:1111:1111:255.255.255.255/128".len() + 1;
    DEVICE + device.peer_count() * PEER + device.allowed_ips().len() * ALLOWED_IP
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::device::{AllowedIpChange, PeerChange, SetRequest};
    use crate::key::{PresharedKey, PrivateKey, PublicKey};

    #[test]
    fn every_field_is_written_and_the_text_does_not_move() {
        let key = [0x48; 32];
        let mut device = Device::default();
        let peer = PeerChange {
            preshared_key: Some(PresharedKey::from_bytes([0xff; 32])),
            endpoint: Some("192.0.2.1:1".parse().unwrap()),
            persistent_keepalive: Some(u16::MAX),
            allowed_ips: ["10.0.0.0/8", "1111:1111:1111:1111:1111:1111:255.255.255.255/128"]
                .map(|net| AllowedIpChange::Add(net.parse().unwrap()))
                .to_vec(),
            ..PeerChange::new(PublicKey::from_bytes([2; 32]))
        };
        device.apply(SetRequest {
            private_key: Some(Some(PrivateKey::from_bytes(key))),
            fwmark: Some(u32::MAX),
            peers: vec![peer, PeerChange::new(PublicKey::from_bytes([3; 32]))],
            ..SetRequest::default()
        });
        let status = |id| match id {
            PeerId(0) => PeerStatus {
                endpoint: Some(
                    "[1111:1111:1111:1111:1111:1111:ffff:ffff%4294967295]:65535".parse().unwrap(),
                ),
                last_handshake: Some(UNIX_EPOCH + Duration::new(1_700_000_000, 999_999_999)),
                rx_bytes: u64::MAX,
                tx_bytes: u64::MAX,
            },
            _ => PeerStatus::default(),
        };
        let text = format_get(&device, 51820, &status);
        let hex = |byte: &str| byte.repeat(32);
        let expected = format!(
            "private_key={}\nlisten_port=51820\nfwmark=4294967295\n\
             public_key={}\npreshared_key={}\nprotocol_version=1\n\
             endpoint=[1111:1111:1111:1111:1111:1111:ffff:ffff%4294967295]:65535\n\
             last_handshake_time_sec=1700000000\nlast_handshake_time_nsec=999999999\n\
             tx_bytes=18446744073709551615\nrx_bytes=18446744073709551615\n\
             persistent_keepalive_interval=65535\nallowed_ip=10.0.0.0/8\n\
             allowed_ip=1111:1111:1111:1111:1111:1111:ffff:ffff/128\n\
             public_key={}\npreshared_key={}\nprotocol_version=1\n\
             last_handshake_time_sec=0\nlast_handshake_time_nsec=0\ntx_bytes=0\nrx_bytes=0\n\
             persistent_keepalive_interval=0\n",
            hex("48"),
            hex("02"),
            hex("ff"),
            hex("03"),
            hex("00")
        );
        assert_eq!(text.as_str(), expected);
        assert!(text.len() <= len_max(&device));
        assert_eq!(
            format_get(&Device::default(), 7, &|_| PeerStatus::default()).as_str(),
            "listen_port=7\n"
        );
    }
}
