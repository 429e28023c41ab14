//! What does it cost to translate a packet in BPF, and by iptables, on top of the kernel's forwarding?
//!
//! In namespaces that the benchmark makes, a gateway stands between a tunnel and a host:
//!
//! ```text
//!  tunnel ── gateway: tun ─ nic ═══ veth ═══ nic :far ─ tun ── host
//! ```
//!
//! `out`: a packet is written into the gateway's TUN device, and read from the host's; `back`: the other way. So
//! there is in each time a `writev`, a `readv`, forwarding by two namespaces and a veth pair: what a way costs is its
//! difference from `forwarded`, which has no NAT. `iptables`: `-t nat -j MASQUERADE`; `bpf`: the programs of
//! `#! Nat = masquerade`. One flow that is known; UDP of 64 and 1,400 bytes, and a super-packet of TCP of 44 segments
//! with an unfinished checksum, of which the rate counts all segments. Needs root, and for `iptables` that program.

use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use wg_common::headers::{Checksum, PROTOCOL_TCP, PROTOCOL_UDP};
use wg_common::map::AddressKey;
use wg_common::nat::map::{External, NatRule, PORTS_LEN, PROTOCOLS_LEN, Prefix};
use wg_userspace::bpf::{Nat, NatHook, NatOptions};
use wg_userspace::nat::rules::empty;
use wg_userspace::segments::vnet::{PartialChecksum, Segments};
use wg_userspace::segments::{SegmentKind, VnetHeader};
use wg_userspace::sys::netns::{NetNs, may_make_netns};
use wg_userspace::sys::{link, tuntap};
use wg_userspace::tun::{Tun, TunQueue};

const INNER: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 9, 0, 2), 4000);
const HOST: (Ipv4Addr, u16) = (Ipv4Addr::new(198, 51, 100, 7), 53);
const EXTERNAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PORT_FIRST: u16 = 20_000;
const SEGMENT_LEN: usize = 1400;
const SEGMENTS: usize = 44;
const LIMIT: Duration = Duration::from_secs(10);

/// How packets get out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    Forwarded,
    Iptables,
    Bpf,
}

/// What is sent.
#[derive(Clone, Copy)]
struct Size {
    name: &'static str,
    len: usize,
    segments: usize,
}

const SIZES: [Size; 3] = [
    Size { name: "64", len: 64, segments: 1 },
    Size { name: "1400", len: 1400, segments: 1 },
    Size { name: "44x1400", len: 40 + SEGMENTS * SEGMENT_LEN, segments: SEGMENTS },
];

type At = (Ipv4Addr, u16);

impl Size {
    fn header(self) -> VnetHeader {
        if self.segments == 1 {
            return VnetHeader::PLAIN;
        }
        VnetHeader {
            checksum: Some(PartialChecksum { start: 20, offset: 16 }),
            segments: Some(Segments {
                kind: SegmentKind::TcpV4,
                has_cwr: false,
                headers_len: 40,
                payload_len: SEGMENT_LEN as u16,
            }),
        }
    }

    /// A packet of one end to the other, with its virtio header.
    fn packet(self, from: At, to: At) -> Vec<u8> {
        let protocol = if self.segments == 1 { PROTOCOL_UDP } else { PROTOCOL_TCP };
        let mut packet = vec![0x5a; self.len];
        packet[..12].copy_from_slice(&[0x45, 0, 0, 0, 0, 9, 0x40, 0, 64, protocol, 0, 0]);
        packet[2..4].copy_from_slice(&(self.len as u16).to_be_bytes());
        packet[12..16].copy_from_slice(&from.0.octets());
        packet[16..20].copy_from_slice(&to.0.octets());
        let sum = Checksum::default().bytes(&packet[..20]).finish();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet[20..22].copy_from_slice(&from.1.to_be_bytes());
        packet[22..24].copy_from_slice(&to.1.to_be_bytes());
        let upper_len = self.len - 20;
        let pseudo = Checksum::pseudo(from.0.into(), to.0.into(), protocol, upper_len as u32);
        if protocol == PROTOCOL_UDP {
            packet[24..26].copy_from_slice(&(upper_len as u16).to_be_bytes());
            packet[26..28].fill(0);
            let sum = pseudo.bytes(&packet[20..]).finish();
            packet[26..28].copy_from_slice(&sum.to_be_bytes());
        } else {
            // Acknowledged all of it, and nothing besides.
            packet[24..36].copy_from_slice(&[0, 0, 0, 9, 0, 0, 0, 7, 0x50, 0x10, 0xff, 0xff]);
            packet[36..40].fill(0);
            packet[36..38].copy_from_slice(&(!pseudo.finish()).to_be_bytes());
        }
        [&self.header().to_bytes()[..], &packet].concat()
    }
}

/// The gateway and the host, each with its TUN device.
struct Site {
    _gateway: NetNs,
    _host: NetNs,
    tunnel: TunQueue,
    far: TunQueue,
    _nat: Option<Nat>,
}

fn run(program: &str, arguments: &str) -> Result<(), String> {
    let output = Command::new(program).args(arguments.split_whitespace()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{program} {arguments}: {errors}")) }
}

fn ip(lines: &[&str]) {
    for line in lines {
        run("ip", line).expect("the benchmark's own namespace takes it");
    }
}

/// Waits for the kernel to let packets through a link that has just come up.
fn wait_for_link() {
    let begun = Instant::now();
    loop {
        let shown = Command::new("ip").args(["link", "show", "nic"]).output();
        let shown = shown.expect("it ran before").stdout;
        if String::from_utf8_lossy(&shown).contains("state UP") {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "the link does not come up");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn tun() -> TunQueue {
    let mut queues = Tun::open("tun", 1).expect("who makes namespaces makes devices").into_queues();
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("it is this namespace's");
    queues.pop().expect("it has one")
}

impl Site {
    fn new(way: Way) -> Result<Self, String> {
        let gateway = NetNs::new().map_err(|error| error.to_string())?;
        let host = NetNs::new().map_err(|error| error.to_string())?;
        let path = host.path();
        let tunnel = gateway.run(|| {
            let tun = tun();
            ip(&[
                &format!("link add nic type veth peer name nic netns {path}"),
                "link set nic address 02:00:00:00:00:01 up",
                "link set tun up",
                "addr add 192.0.2.1/24 dev nic",
                "route add 10.9.0.0/24 dev tun",
                "route add 198.51.100.0/24 via 192.0.2.2",
                "neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev nic nud permanent",
            ]);
            tun
        });
        let far = host.run(|| {
            let tun = tun();
            ip(&[
                "link set nic address 02:00:00:00:00:02 up",
                "link set tun up",
                "addr add 192.0.2.2/24 dev nic",
                "route add 198.51.100.0/24 dev tun",
                "route add 10.9.0.0/24 via 192.0.2.1",
                "neigh replace 192.0.2.1 lladdr 02:00:00:00:00:01 dev nic nud permanent",
            ]);
            tun
        });
        gateway.run(wait_for_link);
        host.run(wait_for_link);
        let nat = match way {
            Way::Forwarded => None,
            Way::Iptables => {
                let line = "-t nat -A POSTROUTING -s 10.9.0.0/24 -o nic -j MASQUERADE";
                gateway.run(|| run("iptables", line))?;
                None
            }
            Way::Bpf => Some(gateway.run(programs)?),
        };
        Ok(Self { _gateway: gateway, _host: host, tunnel, far, _nat: nat })
    }

    /// Writes a packet at one end and takes it at the other.
    fn cross(&self, packet: &[u8], goes_out: bool, into: &mut [u8]) -> usize {
        let (from, to) =
            if goes_out { (&self.tunnel, &self.far) } else { (&self.far, &self.tunnel) };
        tuntap::write_parts(from, &[IoSlice::new(packet)]).expect("the device is up");
        let mut begun = None;
        loop {
            if let Some((_, len)) = to.read(into).expect("what comes was asked for") {
                return len;
            }
            // Another CPU may have it.
            let begun = *begun.get_or_insert_with(Instant::now);
            assert!(begun.elapsed() < LIMIT, "a packet was lost");
        }
    }
}

/// Loads and attaches what `#! Nat = masquerade` does, with one external address.
fn programs() -> Result<Nat, String> {
    let mut nat = Nat::load(NatOptions::default()).map_err(|error| error.to_string())?;
    let index = |name| link::index(name).expect("it was just made");
    let mut rules = empty();
    (rules.version, rules.tun, rules.port_first) = (1, index("tun"), PORT_FIRST.into());
    let address = AddressKey::from(IpAddr::from(EXTERNAL));
    rules.externals[0] = External { address, nic: index("nic"), generation: 0 };
    let from = Prefix::new(AddressKey::v4([0; 4]), 96);
    rules.nat[0] = NatRule { from, out: index("nic"), external_first: 0, external_count: 1 };
    (rules.external_count, rules.nat_count) = (1, 1);
    nat.swap_rules(&rules).map_err(|error| error.to_string())?;
    nat.set_owned(IpAddr::from([10, 9, 0, 0]), 24, true).map_err(|error| error.to_string())?;
    for ring in 0..PROTOCOLS_LEN {
        for port in 0..PORTS_LEN / 2 {
            nat.free_port(ring, port);
        }
    }
    for (name, hook) in [("tun", NatHook::Tun), ("nic", NatHook::Nic)] {
        nat.attach(name, hook, index("tun")).map_err(|error| error.to_string())?;
    }
    Ok(nat)
}

/// Who the host saw.
fn source(packet: &[u8]) -> At {
    let port = u16::from_be_bytes([packet[20], packet[21]]);
    (Ipv4Addr::new(packet[12], packet[13], packet[14], packet[15]), port)
}

fn nat(c: &mut Criterion) {
    if !may_make_netns() {
        eprintln!("SKIPPED nat: needs CAP_NET_ADMIN and CAP_SYS_ADMIN");
        return;
    }
    let mut buffer = vec![0; 1 << 16];
    for way in [Way::Forwarded, Way::Iptables, Way::Bpf] {
        let name = format!("{way:?}").to_lowercase();
        let site = match Site::new(way) {
            Ok(site) => site,
            Err(reason) => {
                eprintln!("SKIPPED nat/{name}: {reason}");
                continue;
            }
        };
        for size in SIZES {
            let packet = size.packet(INNER, HOST);
            let len = site.cross(&packet, true, &mut buffer);
            let seen = source(&buffer[..len]);
            let expected = if way == Way::Forwarded { INNER.0 } else { EXTERNAL };
            assert_eq!((len, seen.0), (size.len, expected), "{name}/{}", size.name);
            let answer = size.packet(HOST, seen);
            let len = site.cross(&answer, false, &mut buffer);
            let to: [u8; 4] = buffer[16..20].try_into().expect("an IPv4 header");
            assert_eq!((len, Ipv4Addr::from(to)), (size.len, INNER.0), "{name}/{}", size.name);
            for (direction, packet, goes_out) in [("out", &packet, true), ("back", &answer, false)]
            {
                let mut group = c.benchmark_group(format!("nat/{direction}"));
                group.throughput(Throughput::Elements(size.segments as u64));
                group.bench_function(BenchmarkId::new(&name, size.name), |b| {
                    b.iter(|| site.cross(packet, goes_out, &mut buffer));
                });
                group.finish();
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = nat
}
criterion_main!(benches);
