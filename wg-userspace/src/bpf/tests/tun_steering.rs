//! The program that chooses TUN queues: as a table, against the workers' routing table, and on a device.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::process::Command;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use wg_common::headers::destination_bytes;
use wg_common::id::{PeerId, WorkerId};
use wg_common::map::{
    OWNERS_LEN, OWNERS_V4, PEER_WORKERS_LEN, PEERS_PER_WORD, peer_word, peer_worker, tun_queue,
    with_peer_worker,
};

use crate::bpf::{BpfError, TunSteering};
use crate::require_root;
use crate::routing::AllowedIps;
use crate::sys::netns::{in_new_netns, report_skipped};
use crate::sys::wait::{PollFd, PollFlags, poll};
use crate::sys::{SharedWords, link};
use crate::tun::{Tun, TunQueue};

/// The program, and what the data process writes for it.
struct Lab {
    steering: TunSteering,
    workers: SharedWords,
}

impl Lab {
    /// `None`, after saying so, where the process may not load programs.
    fn new(test: &str) -> Option<Self> {
        let steering = match TunSteering::load() {
            Ok(steering) => steering,
            Err(error @ BpfError::NotPermitted) => {
                report_skipped(test, &error.to_string());
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let count = PEER_WORKERS_LEN as usize;
        let workers = SharedWords::map(steering.peer_workers_fd(), count).unwrap();
        Some(Self { steering, workers })
    }

    fn owns(&mut self, net: &str, peer: PeerId) {
        let net: IpNet = net.parse().unwrap();
        self.steering.set_owner(net.addr(), net.prefix_len(), Some(peer)).unwrap();
    }

    fn at_home(&self, peer: PeerId, worker: Option<WorkerId>) {
        let word = &self.workers[peer_word(peer) as usize];
        word.store(with_peer_worker(word.load(Relaxed), peer, worker), Relaxed);
    }

    fn home(&self, peer: PeerId) -> Option<WorkerId> {
        peer_worker(self.workers[peer_word(peer) as usize].load(Relaxed), peer)
    }

    #[track_caller]
    fn queue(&self, packet: &[u8]) -> u32 {
        self.steering.test_run(packet).unwrap()
    }
}

/// A packet of as many bytes as its header, and some.
fn to(addr: IpAddr) -> Vec<u8> {
    let mut packet = vec![0xa5; 60];
    match addr {
        IpAddr::V4(addr) => {
            packet[0] = 0x45;
            packet[16..20].copy_from_slice(&addr.octets());
        }
        IpAddr::V6(addr) => {
            packet[0] = 0x60;
            packet[24..40].copy_from_slice(&addr.octets());
        }
    }
    packet
}

fn packet_to(addr: &str) -> Vec<u8> {
    to(addr.parse().unwrap())
}

const A: PeerId = PeerId(3);
const B: PeerId = PeerId(4);
const LAST: PeerId = PeerId(PEER_WORKERS_LEN * PEERS_PER_WORD - 1);

#[test]
fn a_packet_goes_to_the_queue_where_the_owner_of_its_destination_is_at_home() {
    let Some(mut lab) = Lab::new("a_packet_goes_to_the_queue_where_the_owner_is_at_home") else {
        return;
    };
    lab.owns("10.0.0.0/8", A);
    lab.owns("10.1.0.0/16", B);
    lab.owns("10.1.2.3/32", LAST);
    lab.owns("fd00::/8", A);
    lab.owns("fd01::/16", B);
    lab.owns("fd01::1/128", LAST);
    lab.at_home(A, Some(WorkerId(5)));
    lab.at_home(B, Some(WorkerId(0)));
    lab.at_home(LAST, Some(WorkerId(63)));
    let table = [
        ("10.0.0.0", 5),
        ("10.255.255.255", 5),
        ("10.1.0.0", 0),
        ("10.1.2.2", 0),
        ("10.1.2.3", 63),
        ("fd00::1", 5),
        ("fd01::", 0),
        ("fd01::1", 63),
        // Nobody's: the last bytes.
        ("11.0.1.2", 0x102),
        ("fe80::1:2", 2),
        // An IPv4 address in an IPv6 packet is an IPv6 address.
        ("::ffff:10.0.0.1", 1),
    ];
    for (addr, queue) in table {
        assert_eq!(lab.queue(&packet_to(addr)), queue, "{addr}");
    }

    lab.at_home(A, Some(WorkerId(9)));
    lab.at_home(B, None);
    assert_eq!(lab.queue(&packet_to("10.0.0.1")), 9, "a peer moves");
    assert_eq!(lab.queue(&packet_to("fd00::1")), 9);
    assert_eq!(lab.queue(&packet_to("10.1.0.1")), B.0, "a peer without home");
    assert_eq!(lab.queue(&packet_to("10.1.2.3")), 63, "others stay");

    lab.steering.set_owner("10.1.2.3".parse().unwrap(), 32, None).unwrap();
    lab.steering.set_owner("10.1.2.3".parse().unwrap(), 32, None).unwrap();
    assert_eq!(lab.queue(&packet_to("10.1.2.3")), B.0, "the prefix around it is left");
    lab.owns("0.0.0.0/0", LAST);
    lab.owns("::/0", LAST);
    assert_eq!(lab.queue(&packet_to("11.0.1.2")), 63);
    assert_eq!(lab.queue(&packet_to("::ffff:10.0.0.1")), 63);
}

#[test]
fn what_is_no_ip_packet_goes_to_the_first_queue() {
    let Some(mut lab) = Lab::new("what_is_no_ip_packet_goes_to_the_first_queue") else { return };
    lab.owns("0.0.0.0/0", A);
    lab.owns("::/0", A);
    lab.at_home(A, Some(WorkerId(5)));
    for (addr, header_len) in [("10.0.0.1", 20), ("fd00::1", 40)] {
        let packet = packet_to(addr);
        assert_eq!(lab.queue(&packet[..header_len]), 5);
        for len in 1..header_len {
            // The kernel's own test refuses the shortest.
            if let Ok(queue) = lab.steering.test_run(&packet[..len]) {
                assert_eq!(queue, 0, "{addr}: {len} bytes");
            }
        }
        for version in (0..16).filter(|&version| version != 4 && version != 6) {
            let mut odd = packet.clone();
            odd[0] = version << 4;
            assert_eq!(lab.queue(&odd), 0, "version {version}");
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Insert(IpNet, PeerId),
    Remove(IpNet, PeerId),
    RemovePeer(PeerId),
    Rekey(PeerId, Option<WorkerId>),
    /// Some changes are carried over.
    Carry(usize),
}

fn peer() -> impl Strategy<Value = PeerId> {
    select(vec![0, 1, 7, 8, 9, LAST.0]).prop_map(PeerId)
}

/// Few bytes, so that prefixes are around each other.
fn addr() -> impl Strategy<Value = IpAddr> {
    let bytes = || proptest::collection::vec(select(vec![0u8, 1, 0x7f, 0x80, 0xff]), 16);
    (any::<bool>(), bytes()).prop_map(|(is_v4, bytes)| {
        let bytes: [u8; 16] = bytes.try_into().unwrap();
        if is_v4 {
            Ipv4Addr::from(*bytes.first_chunk::<4>().unwrap()).into()
        } else {
            Ipv6Addr::from(bytes).into()
        }
    })
}

fn net() -> impl Strategy<Value = IpNet> {
    (addr(), 0u8..=128, any::<bool>()).prop_map(|(addr, len, is_host)| match addr {
        IpAddr::V4(addr) => {
            IpNet::V4(Ipv4Net::new(addr, if is_host { 32 } else { len / 4 }).unwrap())
        }
        IpAddr::V6(addr) => IpNet::V6(Ipv6Net::new(addr, if is_host { 128 } else { len }).unwrap()),
    })
}

fn step() -> impl Strategy<Value = Step> {
    let worker = proptest::option::of((0u16..64).prop_map(WorkerId));
    prop_oneof![
        8 => (net(), peer()).prop_map(|(net, peer)| Step::Insert(net, peer)),
        3 => (net(), peer()).prop_map(|(net, peer)| Step::Remove(net, peer)),
        1 => peer().prop_map(Step::RemovePeer),
        4 => (peer(), worker).prop_map(|(peer, worker)| Step::Rekey(peer, worker)),
        4 => (0usize..4).prop_map(Step::Carry),
    ]
}

fn carry(lab: &mut Lab, allowed: &mut AllowedIps, max: usize) {
    for (net, owner) in allowed.take_changes(max) {
        lab.steering.set_owner(net.addr(), net.prefix_len(), owner).unwrap();
    }
}

#[test]
fn the_kernel_side_finds_the_owners_that_workers_find() {
    let Some(mut lab) = Lab::new("the_kernel_side_finds_the_owners_that_workers_find") else {
        return;
    };
    let steps = proptest::collection::vec(step(), 0..60);
    let probes = proptest::collection::vec(addr(), 30);
    let mut runner = TestRunner::new(Config::with_cases(200));
    let lab = std::cell::RefCell::new(&mut lab);
    let outcome = runner.run(&(steps, probes), |(steps, probes)| {
        let mut lab = lab.borrow_mut();
        let mut allowed = AllowedIps::default();
        allowed.note_changes();
        let mut probes = probes;
        for step in steps {
            match step {
                Step::Insert(net, peer) => {
                    probes.extend([net.network(), net.broadcast()]);
                    allowed.insert(net, peer);
                }
                Step::Remove(net, peer) => drop(allowed.remove(net, peer)),
                Step::RemovePeer(peer) => allowed.remove_peer(peer),
                Step::Rekey(peer, worker) => lab.at_home(peer, worker),
                Step::Carry(max) => carry(&mut lab, &mut allowed, max),
            }
        }
        while allowed.has_changes() {
            carry(&mut lab, &mut allowed, 7);
        }
        let table = allowed.snapshot();
        for addr in probes {
            let packet = to(addr);
            let bytes = destination_bytes(&packet[..]).unwrap();
            let queue = tun_queue(&bytes, |_| table.lookup(addr), |peer| lab.home(peer));
            prop_assert_eq!(lab.queue(&packet), queue, "{}", addr);
        }
        // And nothing is left for the next one.
        for peer in [0, 1, 7, 8, 9, LAST.0].map(PeerId) {
            allowed.remove_peer(peer);
            lab.at_home(peer, None);
        }
        carry(&mut lab, &mut allowed, usize::MAX);
        prop_assert_eq!(lab.steering.prefix_count(), 0);
        Ok(())
    });
    outcome.unwrap();
}

/// Bytes that the kernel counts for a map.
fn memory_len(map: BorrowedFd<'_>) -> usize {
    let info = format!("/proc/self/fdinfo/{}", map.as_raw_fd());
    let info = std::fs::read_to_string(info).unwrap();
    let line = info.lines().find_map(|line| line.strip_prefix("memlock:")).unwrap();
    line.trim().parse().unwrap()
}

#[test]
fn a_million_prefixes_have_owners_and_one_more_is_refused_by_name() {
    let test = "a_million_prefixes_have_owners_and_one_more_is_refused_by_name";
    let Some(mut lab) = Lab::new(test) else { return };
    let addr = |number: u32| Ipv4Addr::from_bits(0x0a00_0000 + number);
    let begun = Instant::now();
    for number in 0..OWNERS_LEN {
        let owner = Some(PeerId(number % LAST.0));
        lab.steering.set_owner(addr(number).into(), 32, owner).unwrap();
    }
    let took = begun.elapsed();
    let memory_mib = memory_len(lab.steering.owners_v4_fd()) >> 20;
    println!("{test}: {OWNERS_LEN} prefixes took {took:?} and {memory_mib} MiB");
    let one_more = lab.steering.set_owner(addr(OWNERS_LEN).into(), 32, Some(A)).unwrap_err();
    assert!(matches!(one_more, BpfError::Full(OWNERS_V4)), "{one_more}");
    assert!(one_more.to_string().contains("OWNERS_V4 is full"), "{one_more}");
    // It is nobody's; the others are whose they were, and there is room where one goes.
    lab.at_home(A, Some(WorkerId(9)));
    assert_eq!(lab.queue(&to(addr(A.0).into())), 9);
    assert_eq!(lab.queue(&to(addr(OWNERS_LEN).into())), 0);
    lab.steering.set_owner(addr(7).into(), 32, None).unwrap();
    lab.steering.set_owner(addr(OWNERS_LEN).into(), 32, Some(A)).unwrap();
    assert_eq!(lab.queue(&to(addr(OWNERS_LEN).into())), 9);
    // Of the other version there is room.
    lab.owns("fd00::/8", A);
    assert_eq!(lab.queue(&packet_to("fd00::1")), 9);
}

/// A TUN device that is up and routes 10.0.0.0/8 and fd00::/8.
fn tun(number: u32, queue_count: usize) -> Vec<TunQueue> {
    let name = format!("tg{}s{number}", std::process::id());
    let tun = Tun::open(&name, queue_count).unwrap();
    assert_eq!(link::index(&name).unwrap(), tun.ifindex());
    for arguments in [
        format!("addr add 10.0.0.1/8 dev {name}"),
        format!("link set {name} up"),
        format!("addr add fd00::1/8 dev {name} nodad"),
    ] {
        let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}");
    }
    tun.into_queues()
}

/// Sends datagrams of many flows to `to`, and says how many came out of each queue.
fn send(queues: &[TunQueue], to: &str) -> Vec<usize> {
    const COUNT: usize = 20;
    let to: IpAddr = to.parse().unwrap();
    let from: IpAddr = if to.is_ipv4() { [10, 0, 0, 1].into() } else { "fd00::1".parse().unwrap() };
    for _ in 0..COUNT {
        UdpSocket::bind((from, 0)).unwrap().send_to(b"x", (to, 9)).unwrap();
    }
    let mut counts = vec![0; queues.len()];
    while counts.iter().sum::<usize>() < COUNT {
        let mut fds: Vec<_> =
            queues.iter().map(|queue| PollFd::new(queue, PollFlags::IN)).collect();
        assert!(poll(&mut fds, Duration::from_secs(10)).unwrap() > 0, "lost: {counts:?}");
        for (queue, count) in queues.iter().zip(&mut counts) {
            let mut packet = [0; 2048];
            while let Some((_, len)) = queue.read(&mut packet).unwrap() {
                // Systems speak of their own accord, too.
                let is_ours = destination_bytes(&packet[..len])
                    .is_some_and(|bytes| destination_bytes(&self::to(to)[..]) == Some(bytes));
                *count += usize::from(is_ours);
            }
        }
    }
    counts
}

#[test]
fn packets_leave_by_the_queue_of_their_peers_worker() {
    require_root!();
    in_new_netns(|| {
        let Some(mut lab) = Lab::new("packets_leave_by_the_queue_of_their_peers_worker") else {
            return;
        };
        let queues = tun(0, 2);
        queues[0].set_steering(lab.steering.program_fd().unwrap()).unwrap();
        lab.owns("10.1.0.0/16", A);
        lab.owns("fd01::/16", A);
        lab.owns("10.2.0.0/16", B);
        lab.owns("fd02::/16", B);
        for [a, b] in [[0, 1], [1, 0], [1, 1]] {
            lab.at_home(A, Some(WorkerId(a)));
            lab.at_home(B, Some(WorkerId(b)));
            for (to, worker) in [("10.1.0.9", a), ("fd01::9", a), ("10.2.0.9", b), ("fd02::9", b)] {
                let mut all = vec![0, 0];
                all[usize::from(worker)] = 20;
                assert_eq!(send(&queues, to), all, "{to} of worker {worker}");
            }
        }
        // A prefix that moves to the other peer.
        lab.at_home(A, Some(WorkerId(0)));
        lab.at_home(B, Some(WorkerId(1)));
        lab.owns("10.1.0.9/32", B);
        assert_eq!(send(&queues, "10.1.0.9"), [0, 20]);
        assert_eq!(send(&queues, "10.1.0.8"), [20, 0]);
        // Nobody's, a peer without home, and a worker that has no queue: none is lost.
        assert_eq!(send(&queues, "10.3.0.9"), [0, 20]);
        assert_eq!(send(&queues, "fd03::8"), [20, 0]);
        lab.at_home(B, None);
        assert_eq!(send(&queues, "10.2.0.9"), [20, 0]);
        lab.at_home(B, Some(WorkerId(63)));
        assert_eq!(send(&queues, "10.2.0.9"), [0, 20]);
    });
}

#[test]
fn a_device_keeps_its_program_and_takes_another_in_its_place() {
    require_root!();
    in_new_netns(|| {
        let test = "a_device_keeps_its_program_and_takes_another_in_its_place";
        let Some(mut lab) = Lab::new(test) else { return };
        let queues = tun(1, 3);
        queues[2].set_steering(lab.steering.program_fd().unwrap()).unwrap();
        lab.owns("10.1.0.0/16", A);
        lab.at_home(A, Some(WorkerId(2)));
        assert_eq!(send(&queues, "10.1.0.9"), [0, 0, 20]);
        let Lab { steering, workers } = lab;
        drop(steering);
        assert_eq!(send(&queues, "10.1.0.9"), [0, 0, 20]);
        // Its maps are there, too.
        let word = with_peer_worker(0, A, Some(WorkerId(1)));
        workers[peer_word(A) as usize].store(word, Relaxed);
        assert_eq!(send(&queues, "10.1.0.9"), [0, 20, 0]);
        let fresh = Lab::new(test).unwrap();
        queues[0].set_steering(fresh.steering.program_fd().unwrap()).unwrap();
        assert_eq!(send(&queues, "10.1.0.9"), [20, 0, 0], "it knows nobody");
    });
}

#[test]
fn what_is_no_program_is_refused() {
    require_root!();
    in_new_netns(|| {
        let queues = tun(2, 2);
        let Some(lab) = Lab::new("what_is_no_program_is_refused") else { return };
        assert!(queues[0].set_steering(lab.steering.peer_workers_fd()).is_err());
        let file = tempfile::tempfile().unwrap();
        assert!(queues[0].set_steering(std::os::fd::AsFd::as_fd(&file)).is_err());
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(other);
        let program = lab.steering.program_fd().unwrap();
        assert!(crate::sys::tuntap::set_steering(one, program).is_err(), "no TUN device");
    });
}
