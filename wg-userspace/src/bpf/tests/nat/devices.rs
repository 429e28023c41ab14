//! The programs where they are attached: what a test run cannot have is an unfinished checksum, as stacks leave it to
//! devices, and super-packets that are more than a page.
//!
//! ```text
//!  tunnel ── gateway: tun ─ nic ═══ veth ═══ nic :far ─ tun ── host
//! ```

use std::io::IoSlice;
use std::net::IpAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use wg_common::nat::map::{External, NatRule};
use wg_common::outcome::NatEvent;

use super::lab::ip;
use super::life::{PORT_FIRST, no_rules};
use super::memory::{Place, key, prefix};
use super::packets::{Checksum, Content, Packet, ends, right};
use crate::bpf::{Nat, NatHook, NatOptions};
use crate::require_root;
use crate::segments::vnet::{PartialChecksum, Segments};
use crate::segments::{SegmentKind, VnetHeader};
use crate::sys::netns::NetNs;
use crate::sys::{link, tuntap};
use crate::tun::{Tun, TunQueue};

const LIMIT: Duration = Duration::from_secs(10);
const SEGMENT_LEN: u16 = 1_300;

fn tun() -> TunQueue {
    for knob in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{knob}"), "1").unwrap();
    }
    Tun::open("tun", 1).unwrap().into_queues().pop().unwrap()
}

/// Waits for the kernel to let packets through a link that has just come up.
fn wait_for_link() {
    let begun = Instant::now();
    loop {
        let shown = Command::new("ip").args(["link", "show", "nic"]).output().unwrap();
        if String::from_utf8_lossy(&shown.stdout).contains("state UP") {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "{shown:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The namespaces of the gateway, which has its programs, and of the host, and the TUN devices there.
fn site() -> ([NetNs; 2], [TunQueue; 2], Nat) {
    let [gateway, host] = [NetNs::new().unwrap(), NetNs::new().unwrap()];
    let path = host.path();
    let (tunnel, nat) = gateway.run(|| {
        let tun = tun();
        ip(&format!("link add nic type veth peer name nic netns {path}"));
        for line in [
            "link set nic address 02:00:00:00:00:01 up",
            "link set tun up",
            "addr add 192.0.2.1/24 dev nic",
            "addr add 2001:db8::1/64 dev nic nodad",
            "route add 10.9.0.0/24 dev tun",
            "route add fd09::/64 dev tun",
            "route add 203.0.113.0/24 via 192.0.2.2",
            "route add 2001:db8:9::/48 via 2001:db8::2",
            "neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev nic nud permanent",
            "neigh replace 2001:db8::2 lladdr 02:00:00:00:00:02 dev nic nud permanent",
        ] {
            ip(line);
        }
        let place =
            Place { tun: link::index("tun").unwrap(), nics: [link::index("nic").unwrap(); 2] };
        let mut nat = Nat::load(NatOptions { externals: 2, ..NatOptions::default() }).unwrap();
        let mut rules = no_rules(place, 1);
        for (number, (external, from, len)) in
            [("192.0.2.1", "0.0.0.0", 0), ("2001:db8::1", "fd09::", 64)].into_iter().enumerate()
        {
            let (nic, external_first) = (place.nics[0], number as u32);
            rules.externals[number] = External { address: key(external), nic, generation: 0 };
            let from = prefix(from, len);
            rules.nat[number] = NatRule { from, out: nic, external_first, external_count: 1 };
        }
        (rules.external_count, rules.nat_count) = (2, 2);
        nat.swap_rules(&rules).unwrap();
        for (owned, len) in super::memory::OWNED {
            nat.set_owned(owned.parse().unwrap(), len, true).unwrap();
        }
        (0..6).for_each(|ring| assert!(nat.free_port(ring, 0)));
        nat.attach("tun", NatHook::Tun, place.tun).unwrap();
        nat.attach("nic", NatHook::Nic, place.tun).unwrap();
        (tun, nat)
    });
    let far = host.run(|| {
        let tun = tun();
        for line in [
            "link set nic address 02:00:00:00:00:02 up",
            "link set tun up",
            "addr add 192.0.2.2/24 dev nic",
            "addr add 2001:db8::2/64 dev nic nodad",
            "route add 203.0.113.0/24 dev tun",
            "route add 2001:db8:9::/48 dev tun",
            "neigh replace 192.0.2.1 lladdr 02:00:00:00:00:01 dev nic nud permanent",
            "neigh replace 2001:db8::1 lladdr 02:00:00:00:00:01 dev nic nud permanent",
        ] {
            ip(line);
        }
        wait_for_link();
        tun
    });
    gateway.run(wait_for_link);
    ([gateway, host], [tunnel, far], nat)
}

/// The packet with the pseudo-header's sum alone where its checksum is, and what says so; of many segments if it is
/// long.
fn unfinished(packet: &Packet) -> (VnetHeader, Vec<u8>) {
    let mut bytes = packet.bytes();
    let start = if bytes[0] >> 4 == 4 { 20 } else { 40 };
    let (offset, headers_len, kind) = match (&packet.content, start) {
        (Content::Tcp { .. }, 20) => (16, 20, SegmentKind::TcpV4),
        (Content::Tcp { .. }, _) => (16, 20, SegmentKind::TcpV6),
        _ => (6, 8, SegmentKind::Udp),
    };
    // What is finished is the inverted sum of all: without what is behind the pseudo-header, it is that one's.
    let field = start + offset;
    let finished = u16::from_be_bytes([bytes[field], bytes[field + 1]]);
    bytes[field..field + 2].fill(0);
    let words = [!finished, !super::packets::sum(&[&bytes[start..]])];
    let pseudo = super::packets::sum(&[&words.map(u16::to_be_bytes).concat()]);
    bytes[field..field + 2].copy_from_slice(&pseudo.to_be_bytes());
    let checksum = Some(PartialChecksum { start: start as u16, offset: offset as u16 });
    let is_super = bytes.len() > 1_400;
    let segments = is_super.then_some(Segments {
        kind,
        has_cwr: false,
        headers_len: (start + headers_len) as u16,
        payload_len: SEGMENT_LEN,
    });
    (VnetHeader { checksum, segments }, bytes)
}

/// Finishes the checksum, if that is still to be done, as a device would.
fn finished(header: VnetHeader, mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(PartialChecksum { start, offset }) = header.checksum {
        let (start, field) = (usize::from(start), usize::from(start + offset));
        let checksum = !super::packets::sum(&[&bytes[start..]]);
        bytes[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    bytes
}

/// What comes out there with these ends.
fn cross(
    from: &TunQueue,
    to: &TunQueue,
    header: VnetHeader,
    packet: &[u8],
    at: [IpAddr; 2],
) -> (VnetHeader, Vec<u8>) {
    let before = header.to_bytes();
    tuntap::write_parts(from, &[IoSlice::new(&before), IoSlice::new(packet)]).unwrap();
    let (mut bytes, begun) = (vec![0; 1 << 16], Instant::now());
    loop {
        assert!(begun.elapsed() < LIMIT, "{at:?} did not arrive");
        let Some((header, len)) = to.read(&mut bytes).unwrap() else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        // Systems speak of their own accord, too.
        if ends(&bytes[..len]) == Some(at) {
            return (header, bytes[..len].to_vec());
        }
    }
}

#[test]
fn unfinished_checksums_and_super_packets_are_translated_as_they_are() {
    require_root!();
    let (_namespaces, [tunnel, far], nat) = site();
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    let mut count = 0;
    for (inner, external, remote) in
        [("10.9.0.2", "192.0.2.1", "203.0.113.9"), ("fd09::2", "2001:db8::1", "2001:db8:9::9")]
    {
        let [inner, external, remote] = [inner, external, remote].map(address);
        for is_tcp in [true, false] {
            for len in [0, 1, 1_000, 44 * usize::from(SEGMENT_LEN) + 7] {
                let packet = |from, to, ports| {
                    let data: Vec<u8> = (0..len).map(|at| (at * 7 + at / 256) as u8).collect();
                    let content = if is_tcp {
                        Content::Tcp { ports, flags: super::packets::ACK, data }
                    } else {
                        Content::Udp { ports, has_checksum: true, data }
                    };
                    Packet { dont_fragment: true, ..Packet::new(from, to, content) }
                };
                let there =
                    [packet(inner, remote, [4000, 53]), packet(external, remote, [PORT_FIRST, 53])];
                let back =
                    [packet(remote, external, [53, PORT_FIRST]), packet(remote, inner, [53, 4000])];
                for ([sent, expected], from, to) in [(there, &tunnel, &far), (back, &far, &tunnel)]
                {
                    let name = format!("{} to {}, TCP {is_tcp}, {len} bytes", sent.from, sent.to);
                    let (header, bytes) = unfinished(&sent);
                    let at = [expected.from, expected.to];
                    let (left_header, left) = cross(from, to, header, &bytes, at);
                    assert_eq!(left_header.segments, header.segments, "{name}");
                    let left = finished(left_header, left);
                    let found = right(&left);
                    assert!(found.contains(&Checksum::Upper), "{name}: {found:?}");
                    // Two hosts forwarded it.
                    let expected = Packet { ttl: 62, ..expected }.bytes();
                    assert!(left == expected, "{name}: {:02x?}", &left[..60.min(left.len())]);
                    count += 1;
                }
            }
        }
    }
    let counters = nat.counters().unwrap();
    let translated =
        [NatEvent::TranslatedOut, NatEvent::TranslatedIn].map(|event| counters.event(event));
    assert_eq!(translated.iter().sum::<u64>(), count);
    for (key, flow) in nat.flows().map(Result::unwrap).filter(|(key, _)| key.remote_port != 0) {
        // Three packets and the segments of a super-packet.
        assert_eq!(flow.packets, [3 + 45; 2], "{key:?}");
    }
}
