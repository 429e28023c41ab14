//! The kernel's TCP through two TUN devices, whose super-packets are cut here. What the kernel makes of the very
//! same ones is the oracle, to the byte.
//!
//! ```text
//! sender 10.9.0.1 ─ near ─ (cut) ─ far ─ 10.9.0.2 receiver        each in a namespace of its own
//!                     └ (whole) ─ into ─ kernel: forwards, cuts ─ out of ─ (compared)
//! ```

use std::io::{IoSlice, Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use socket2::SockRef;
use wg_common::ecn;
use wg_common::headers::{Checksum, IPV4_LEN, PROTOCOL_TCP, inner_packet};
use wg_common::upper::upper;

use crate::require_root;
use crate::segments::{Cut, VnetHeader, finish_checksum};
use crate::sys::netns::NetNs;
use crate::sys::tuntap;
use crate::sys::wait::{PollFd, PollFlags, poll};
use crate::tun::{Tun, TunQueue};

const LIMIT: Duration = Duration::from_secs(10);
const SENT_LEN: usize = 4 << 20;
/// One packet in so many gets a router's mark, which TCP answers.
const MARK_EVERY: usize = 97;

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// A TUN device that is up, with these addresses.
fn tun(name: &str, addresses: &[&str]) -> TunQueue {
    let name = format!("tg{}{name}", std::process::id());
    let queue = Tun::open(&name, 1).unwrap().into_queues().remove(0);
    for address in addresses {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        ip(&format!("addr add {address} dev {name}{nodad}"));
    }
    ip(&format!("link set {name} up"));
    queue
}

fn sysctl(key: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
}

/// What forwards from one device to another that takes no super-packets.
struct Oracle {
    into: TunQueue,
    out_of: TunQueue,
}

impl Oracle {
    fn new() -> Self {
        let into = tun("oi", &[]);
        let out_of = tun("oo", &[]);
        tuntap::switch_offloads_off(&out_of).unwrap();
        let (near, far) =
            (format!("tg{}oi", std::process::id()), format!("tg{}oo", std::process::id()));
        for key in ["all", "default", &near, &far] {
            sysctl(&format!("ipv4/conf/{key}/rp_filter"), "0");
        }
        sysctl("ipv4/ip_forward", "1");
        sysctl("ipv6/conf/all/forwarding", "1");
        for (address, link) in [
            ("10.9.0.1/32", &near),
            ("10.9.0.2/32", &far),
            ("fd09::1/128", &near),
            ("fd09::2/128", &far),
        ] {
            let version = if address.contains(':') { "-6 " } else { "" };
            ip(&format!("{version}route add {address} dev {link}"));
        }
        Self { into, out_of }
    }

    /// The kernel's segments of a super-packet: as many as there should be.
    fn segments(&self, header: VnetHeader, packet: &[u8], count: usize) -> Vec<Vec<u8>> {
        let header = header.to_bytes();
        tuntap::write_parts(&self.into, &[IoSlice::new(&header), IoSlice::new(packet)]).unwrap();
        let src = inner_packet(packet).unwrap().src;
        let mut segments = Vec::new();
        while segments.len() < count {
            let mut fds = [PollFd::new(&self.out_of, PollFlags::IN)];
            assert_eq!(poll(&mut fds, LIMIT).unwrap(), 1, "{} of {count}", segments.len());
            let mut segment = vec![0; 2048];
            let (header, len) = self.out_of.read(&mut segment).unwrap().unwrap();
            assert_eq!(header, VnetHeader::PLAIN);
            segment.truncate(len);
            // The kernel speaks of its own accord, too.
            if inner_packet(&segment).is_ok_and(|inner| inner.src == src) {
                segments.push(segment);
            }
        }
        assert!(self.out_of.read(&mut [0; 2048]).unwrap().is_none(), "no more than {count}");
        segments
    }
}

/// A segment as it is behind a router. All its checksums must be right.
fn forwarded(segment: &[u8]) -> Vec<u8> {
    assert!(verifies(segment));
    let mut segment = segment.to_vec();
    if segment[0] >> 4 == 6 {
        segment[7] -= 1;
        return segment;
    }
    segment[8] -= 1;
    segment[10..12].fill(0);
    let sum = Checksum::default().bytes(&segment[..IPV4_LEN]).finish();
    segment[10..12].copy_from_slice(&sum.to_be_bytes());
    segment
}

fn verifies(packet: &[u8]) -> bool {
    let (inner, behind) = (inner_packet(packet).unwrap(), upper(packet).unwrap());
    let rest = &packet[behind.offset..];
    let pseudo = Checksum::pseudo(inner.src, inner.dst, behind.protocol, rest.len() as u32);
    let header_sum = match inner.src {
        IpAddr::V4(_) => Checksum::default().bytes(&packet[..IPV4_LEN]).finish(),
        IpAddr::V6(_) => 0,
    };
    (inner.len, header_sum, pseudo.bytes(rest).finish()) == (packet.len(), 0, 0)
}

/// The packets that wait in a queue, cut and finished; those of super-packets are compared with the
/// oracle's. `most` becomes the number of segments of the largest.
fn read_all(queue: &TunQueue, oracle: Option<&Oracle>, most: &mut usize) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    let mut bytes = vec![0; 65_575];
    while let Some((header, len)) = queue.read(&mut bytes).unwrap() {
        let bytes = &mut bytes[..len];
        let Some(segments) = header.segments else {
            if let Some(checksum) = header.checksum {
                finish_checksum(checksum, bytes).unwrap();
            }
            packets.push(bytes.to_vec());
            continue;
        };
        let cut = Cut::new(segments, header.checksum, bytes).unwrap();
        let segment = |index| {
            let mut segment = vec![0; cut.segment_len(index)];
            cut.write(bytes, index, &mut segment);
            segment
        };
        let ours: Vec<Vec<u8>> = (0..cut.count()).map(segment).collect();
        *most = ours.len().max(*most);
        if let Some(oracle) = oracle {
            let theirs = oracle.segments(header, bytes, ours.len());
            let ours: Vec<_> = ours.iter().map(|segment| forwarded(segment)).collect();
            assert_eq!(ours, theirs);
        }
        packets.extend(ours);
    }
    packets
}

#[test]
fn the_kernels_super_packets_of_tcp_are_cut_as_the_kernel_cuts_them() {
    require_root!();
    let [sending, receiving, between] = [(), (), ()].map(|()| NetNs::new().unwrap());
    let near = sending.run(|| {
        sysctl("ipv4/tcp_ecn", "1");
        tun("n", &["10.9.0.1/24", "fd09::1/64"])
    });
    let far = receiving.run(|| {
        sysctl("ipv4/tcp_ecn", "1");
        tun("f", &["10.9.0.2/24", "fd09::2/64"])
    });
    let oracle = between.run(Oracle::new);
    let payload: Vec<u8> = (0..SENT_LEN as u32).map(|at| (at ^ at >> 9) as u8).collect();
    for to in ["10.9.0.2", "fd09::2"] {
        let to: IpAddr = to.parse().unwrap();
        let listener = receiving.run(|| TcpListener::bind((to, 7000)).unwrap());
        // Should something be wrong, nobody waits for ever.
        SockRef::from(&listener).set_read_timeout(Some(LIMIT)).unwrap();
        let (done, mut most, mut count) = (AtomicBool::new(false), 0, 0_usize);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let connect = || TcpStream::connect_timeout(&(to, 7000).into(), LIMIT);
                let mut stream = sending.run(connect).unwrap();
                stream.set_write_timeout(Some(LIMIT)).unwrap();
                stream.write_all(&payload).unwrap();
            });
            scope.spawn(|| {
                let accepted = listener.accept();
                let Ok((mut stream, _)) = accepted else {
                    done.store(true, Ordering::Relaxed);
                    panic!("{accepted:?}");
                };
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                let mut received = Vec::new();
                let outcome = stream.read_to_end(&mut received);
                // Whatever came of it, nobody waits for more.
                done.store(true, Ordering::Relaxed);
                outcome.unwrap();
                assert!(received == payload, "{} bytes came", received.len());
            });
            while !done.load(Ordering::Relaxed) {
                let mut fds = [&near, &far].map(|queue| PollFd::new(queue, PollFlags::IN));
                poll(&mut fds, Duration::from_millis(50)).unwrap();
                for mut packet in read_all(&near, Some(&oracle), &mut most) {
                    count += 1;
                    if count.is_multiple_of(MARK_EVERY) {
                        ecn::decapsulate(&mut packet, ecn::CE);
                    }
                    assert!(upper(&packet).unwrap().protocol != PROTOCOL_TCP || verifies(&packet));
                    far.write(&packet).unwrap();
                }
                for packet in read_all(&far, None, &mut 0) {
                    near.write(&packet).unwrap();
                }
            }
        });
        assert!(most > 8, "the kernel sent super-packets: {most}");
        println!("{to}: {count} packets, at most {most} of a super-packet");
    }
}
