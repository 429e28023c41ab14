//! What a device is, in the words of the protocol.

use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};
use std::vec;

use ipnet::IpNet;
use wg_common::id::{PeerId, WorkerId};
use zeroize::Zeroizing;

use crate::config::NAME_LEN_MAX;
use crate::device::{Device, PacketRules, Peer};

/// What is known of a peer beside its configuration.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PeerStatus {
    /// Where it is now; if that is not known, where it was configured to be is shown.
    pub endpoint: Option<SocketAddr>,
    /// It is there because its name was looked up, since the device was configured.
    pub is_by_name: bool,
    /// When a handshake with it succeeded last, by the wall clock.
    pub last_handshake: Option<SystemTime>,
    /// Bytes of messages from it.
    pub rx_bytes: u64,
    /// Bytes of messages to it.
    pub tx_bytes: u64,
    /// The worker at which it is at home, if it has a keypair.
    pub worker: Option<WorkerId>,
}

/// Most bytes of an answer that are made at once.
pub const PART_LEN_MAX: usize = 64 * 1024;

/// How far an answer has got. New, it stands before the first line.
///
/// It remembers no peers but numbers, so that peers may come and go between two parts: who is there
/// from the first part to the last is in the answer, who comes later is not, and nobody is in it twice.
#[derive(Debug, Default)]
pub struct GetCursor {
    /// Peers that are to come, by the number of those that were added before; `None` at the start.
    numbers: Option<Range<u64>>,
    /// What is left of the allowed IPs of the peer that the last part ended with.
    nets: vec::IntoIter<IpNet>,
}

/// The next lines that answer `get=1`, without `errno`: whole ones, at most [`PART_LEN_MAX`] bytes.
/// `None` after the last.
///
/// `listen_port` is the port in use, which may not be the one configured (0 is any). The text holds
/// the device's keys: it is wiped on drop, and never moves while it grows.
pub fn format_get_part(
    cursor: &mut GetCursor,
    device: &Device,
    listen_port: u16,
    live: &dyn Fn(PeerId) -> PeerStatus,
) -> Option<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(PART_LEN_MAX));
    let numbers = cursor.numbers.get_or_insert_with(|| {
        write_device(&mut text, device, listen_port).expect("a string takes everything");
        0..device.added_count()
    });
    let has_room = |text: &str, len: usize| text.len() + len <= PART_LEN_MAX;
    while has_room(&text, ALLOWED_IP_LEN_MAX)
        && let Some(net) = cursor.nets.next()
    {
        write_net(&mut text, net).expect("a string takes everything");
    }
    if cursor.nets.len() > 0 {
        return Some(text);
    }
    for (number, id, peer) in device.peers_added(numbers.clone()) {
        if !has_room(&text, PEER_LEN_MAX) {
            return Some(text);
        }
        numbers.start = number + 1;
        write_peer(&mut text, peer, &live(id)).expect("a string takes everything");
        let mut nets = device.allowed_ips().of_peer(id);
        loop {
            if !has_room(&text, ALLOWED_IP_LEN_MAX) {
                // As they are now: a peer is shown as it was at one moment.
                cursor.nets = nets.collect::<Vec<_>>().into_iter();
                return Some(text);
            }
            let Some(net) = nets.next() else { break };
            write_net(&mut text, net).expect("a string takes everything");
        }
    }
    numbers.start = numbers.end;
    (!text.is_empty()).then_some(text)
}

/// All lines that answer `get=1`, without `errno`: as long as the device is large.
pub fn format_get(
    device: &Device,
    listen_port: u16,
    live: &dyn Fn(PeerId) -> PeerStatus,
) -> Zeroizing<String> {
    let nets_len_max = device.allowed_ips().len() * ALLOWED_IP_LEN_MAX;
    let len_max = DEVICE_LEN_MAX + device.peer_count() * PEER_LEN_MAX + nets_len_max;
    let mut text = Zeroizing::new(String::with_capacity(len_max));
    let mut cursor = GetCursor::default();
    while let Some(part) = format_get_part(&mut cursor, device, listen_port, live) {
        text.push_str(&part);
    }
    text
}

fn write_device(text: &mut String, device: &Device, listen_port: u16) -> fmt::Result {
    if let Some(key) = device.private_key() {
        writeln!(text, "private_key={}", key.to_hex().as_str())?;
    }
    writeln!(text, "listen_port={listen_port}")?;
    if device.fwmark() != 0 {
        writeln!(text, "fwmark={}", device.fwmark())?;
    }
    // Ours alone: wg(8) passes over what it does not know.
    let PacketRules { mss_clamp, copy_dscp } = device.packet_rules();
    if !mss_clamp {
        writeln!(text, "tidegate_mss_clamp=false")?;
    }
    if copy_dscp {
        writeln!(text, "tidegate_copy_dscp=true")?;
    }
    Ok(())
}

fn write_peer(text: &mut String, peer: &Peer, live: &PeerStatus) -> fmt::Result {
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
    // Ours alone: wg(8) passes over what it does not know.
    if !peer.name.is_empty() {
        writeln!(text, "tidegate_name={}", peer.name)?;
    }
    if peer.pulled {
        writeln!(text, "tidegate_pulled=true")?;
    }
    if live.is_by_name {
        writeln!(text, "tidegate_by_name=true")?;
    }
    if let Some(worker) = live.worker {
        writeln!(text, "tidegate_worker={}", worker.0)?;
    }
    Ok(())
}

fn write_net(text: &mut String, net: IpNet) -> fmt::Result {
    writeln!(text, "allowed_ip={net}")
}

/// All lines of a device, with their longest values.
const DEVICE_LEN_MAX: usize = (12 + 64 + 1)
    + (12 + 5 + 1)
    + (7 + 10 + 1)
    + "tidegate_mss_clamp=false\n".len()
    + "tidegate_copy_dscp=true\n".len();
/// All lines of a peer but its allowed IPs, with the longest values.
const PEER_LEN_MAX: usize = (11 + 64 + 1)
    + (14 + 64 + 1)
    + (18 + 1)
    + (9 + "[1111:1111:1111:1111:1111:1111:255.255.255.255%4294967295]:65535".len() + 1)
    + (24 + 20 + 1)
    + (25 + 9 + 1)
    + 2 * (9 + 20 + 1)
    + (30 + 5 + 1)
    + "tidegate_name=\n".len()
    + NAME_LEN_MAX
    + "tidegate_pulled=true\n".len()
    + "tidegate_by_name=true\n".len()
    + "tidegate_worker=65535\n".len();
const ALLOWED_IP_LEN_MAX: usize =
    11 + "1111:1111:1111:1111:1111:1111:255.255.255.255/128".len() + 1;
const _: () = assert!(DEVICE_LEN_MAX + PEER_LEN_MAX + ALLOWED_IP_LEN_MAX <= PART_LEN_MAX);

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
            name: Some("\u{1f4bb}".repeat(63)),
            allowed_ips: ["10.0.0.0/8", "1111:1111:1111:1111:1111:1111:255.255.255.255/128"]
                .map(|net| AllowedIpChange::Add(net.parse().unwrap()))
                .to_vec(),
            ..PeerChange::new(PublicKey::from_bytes([2; 32]))
        };
        device.apply(SetRequest {
            private_key: Some(Some(PrivateKey::from_bytes(key))),
            fwmark: Some(u32::MAX),
            mss_clamp: Some(false),
            copy_dscp: Some(true),
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
                is_by_name: true,
                worker: Some(WorkerId(u16::MAX)),
            },
            _ => PeerStatus::default(),
        };
        let text = format_get(&device, 51820, &status);
        let hex = |byte: &str| byte.repeat(32);
        let expected = format!(
            "private_key={}\nlisten_port=51820\nfwmark=4294967295\n\
             tidegate_mss_clamp=false\ntidegate_copy_dscp=true\n\
             public_key={}\npreshared_key={}\nprotocol_version=1\n\
             endpoint=[1111:1111:1111:1111:1111:1111:ffff:ffff%4294967295]:65535\n\
             last_handshake_time_sec=1700000000\nlast_handshake_time_nsec=999999999\n\
             tx_bytes=18446744073709551615\nrx_bytes=18446744073709551615\n\
             persistent_keepalive_interval=65535\ntidegate_name={}\ntidegate_by_name=true\n\
             tidegate_worker=65535\n\
             allowed_ip=10.0.0.0/8\n\
             allowed_ip=1111:1111:1111:1111:1111:1111:ffff:ffff/128\n\
             public_key={}\npreshared_key={}\nprotocol_version=1\n\
             last_handshake_time_sec=0\nlast_handshake_time_nsec=0\ntx_bytes=0\nrx_bytes=0\n\
             persistent_keepalive_interval=0\n",
            hex("48"),
            hex("02"),
            hex("ff"),
            "\u{1f4bb}".repeat(63),
            hex("03"),
            hex("00")
        );
        assert_eq!(text.as_str(), expected);
        let nets_len_max = 2 * ALLOWED_IP_LEN_MAX;
        assert!(text.len() <= DEVICE_LEN_MAX + 2 * PEER_LEN_MAX + nets_len_max);
        assert_eq!(
            format_get(&Device::default(), 7, &|_| PeerStatus::default()).as_str(),
            "listen_port=7\n"
        );
    }

    fn peer(number: u32, net_count: u32) -> PeerChange {
        let addr = |n| std::net::Ipv4Addr::from_bits(number << 16 | n);
        let net = |n| AllowedIpChange::Add(IpNet::from(std::net::IpAddr::from(addr(n))));
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_be_bytes());
        PeerChange {
            allowed_ips: (0..net_count).map(net).collect(),
            ..PeerChange::new(PublicKey::from_bytes(key))
        }
    }

    fn change(device: &mut Device, peers: Vec<PeerChange>) {
        device.apply(SetRequest { peers, ..SetRequest::default() });
    }

    fn next(cursor: &mut GetCursor, device: &Device) -> Option<String> {
        let part = format_get_part(cursor, device, 7, &|_| PeerStatus::default())?;
        assert!(part.len() <= PART_LEN_MAX && part.ends_with('\n') && !part.is_empty());
        assert_eq!(part.capacity(), PART_LEN_MAX, "it did not grow");
        Some(part.to_string())
    }

    fn all(device: &Device) -> String {
        let mut cursor = GetCursor::default();
        std::iter::from_fn(|| next(&mut cursor, device)).collect()
    }

    #[test]
    fn parts_make_the_whole_however_many_allowed_ips_a_peer_has() {
        for (peer_count, net_count) in [(1, 0), (400, 0), (3, 5000), (1, 20_000), (300, 7)] {
            let mut device = Device::default();
            change(&mut device, (1..=peer_count).map(|number| peer(number, net_count)).collect());
            let text = all(&device);
            assert_eq!(text, *format_get(&device, 7, &|_| PeerStatus::default()));
            assert_eq!(text.matches("public_key=").count(), peer_count as usize);
            assert_eq!(text.matches("allowed_ip=").count(), (peer_count * net_count) as usize);
        }
    }

    #[test]
    fn a_part_comes_when_the_last_one_was_full_to_the_brim() {
        // Whatever is left in a part at its end, the next begins where it ended.
        for net_count in 1600..2600 {
            let mut device = Device::default();
            change(&mut device, vec![peer(1, net_count), peer(2, 1)]);
            assert_eq!(all(&device).matches("allowed_ip=").count(), net_count as usize + 1);
        }
    }

    #[test]
    fn peers_that_come_and_go_meanwhile_are_whole_and_nobody_comes_twice() {
        let mut device = Device::default();
        change(&mut device, (0..1000).map(|number| peer(number, 3)).collect());
        let mut cursor = GetCursor::default();
        let mut text = String::new();
        let mut turn = 0;
        while let Some(part) = next(&mut cursor, &device) {
            text += &part;
            turn += 1;
            // The even ones stay; the odd ones go, and some of them come back at once.
            let gone = (0..1000).filter(|n| n % 2 == 1 && n % 7 == turn);
            let gone = gone.map(|number| PeerChange { remove: true, ..peer(number, 0) });
            change(&mut device, gone.collect());
            let back = (0..1000).filter(|n| n % 2 == 1 && n % 7 == turn && n % 3 == 0);
            change(&mut device, back.map(|number| peer(number, 3)).collect());
            change(&mut device, vec![peer(2000 + turn, 3)]);
        }
        assert!(turn > 3, "it took several parts");
        let mut shown = std::collections::HashSet::new();
        for lines in text.split("public_key=").skip(1) {
            assert!(shown.insert(&lines[..8]), "{} comes twice", &lines[..8]);
            assert_eq!(lines.matches("allowed_ip=").count(), 3, "{lines}");
        }
        for number in (0..1000_u32).step_by(2) {
            assert!(shown.contains(&*format!("{number:08x}")), "{number} was there all the time");
        }
        assert!(shown.iter().all(|key| u32::from_str_radix(key, 16).unwrap() < 1000));
    }

    #[test]
    fn a_peer_is_shown_as_it_was_at_one_moment() {
        let mut device = Device::default();
        change(&mut device, vec![peer(1, 6000), peer(2, 1)]);
        let mut cursor = GetCursor::default();
        let mut text = next(&mut cursor, &device).unwrap();
        change(&mut device, vec![PeerChange { remove: true, ..peer(1, 0) }]);
        text.extend(std::iter::from_fn(|| next(&mut cursor, &device)));
        assert_eq!(text.matches("allowed_ip=0.1.").count(), 6000);
        assert_eq!(text.matches("public_key=").count(), 2);
    }
}
