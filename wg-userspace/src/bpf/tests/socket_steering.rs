//! The program that chooses sockets, with real sockets and datagrams: the kernel does not run programs of this
//! kind for a test.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Command;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use wg_common::endpoint::Endpoint;
use wg_common::id::{ReceiverIndex, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::map::index_worker_entry;

use crate::bpf::{BpfError, SocketSteering};
use crate::require_root;
use crate::sys::SharedWords;
use crate::sys::netns::{in_new_netns, report_skipped};
use crate::sys::socket::Family;
use crate::sys::wait::{PollFd, PollFlags, poll};
use crate::udp::{Outgoing, ReceiveBatch, UdpSocket, UdpSockets, bind_group};

const WORKERS: usize = 3;
const INDEXES: IndexPermutation = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
/// Of two devices, the second.
const SLOTS: Range<u32> = 1 << 19..1 << 20;

/// Sockets of three workers on a port of loopback, and the program.
struct Lab {
    steering: SocketSteering,
    words: SharedWords,
    port: u16,
    group: Vec<UdpSockets>,
}

/// A new group on any port.
fn group() -> (u16, Vec<UdpSockets>) {
    bind_group(0, WORKERS, 0).unwrap()
}

fn steer(steering: &mut SocketSteering, group: &[UdpSockets]) -> Result<(), BpfError> {
    let v4: Vec<BorrowedFd<'_>> = group.iter().map(|sockets| sockets.v4.as_fd()).collect();
    let v6: Vec<BorrowedFd<'_>> =
        group.iter().filter_map(|sockets| sockets.v6.as_ref()).map(AsFd::as_fd).collect();
    steering.steer(&v4, &v6)
}

impl Lab {
    /// `None`, after saying so, where the process may not load programs.
    fn new(test: &str) -> Option<Self> {
        let status = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(status.success());
        let steering = match SocketSteering::load(INDEXES, SLOTS) {
            Ok(steering) => steering,
            Err(error @ BpfError::NotPermitted) => {
                report_skipped(test, &error.to_string());
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let words = SharedWords::map(steering.index_workers_fd(), SLOTS.len()).unwrap();
        let (port, group) = group();
        Some(Self { steering, words, port, group })
    }

    fn steer(&mut self) {
        steer(&mut self.steering, &self.group).unwrap();
    }

    /// Says where the keypair with this index is at home.
    fn at_home(&self, index: ReceiverIndex, worker: u16) {
        let at = INDEXES.slot_of(index).unwrap() - SLOTS.start;
        self.words[at as usize].store(index_worker_entry(index, WorkerId(worker)), Relaxed);
    }

    /// Says that no keypair has it any more.
    fn gone(&self, index: ReceiverIndex) {
        let at = INDEXES.slot_of(index).unwrap() - SLOTS.start;
        self.words[at as usize].store(0, Relaxed);
    }

    /// The worker whose socket gets this from `from`, and nobody else's.
    #[track_caller]
    fn comes_to(&self, from: &UdpSocket, bytes: &[u8]) -> usize {
        comes_to(&self.group, self.port, from, &[bytes])
    }
}

/// The worker whose socket gets these from `from`, all of them and in their order.
#[track_caller]
fn comes_to(group: &[UdpSockets], port: u16, from: &UdpSocket, datagrams: &[&[u8]]) -> usize {
    let addr: SocketAddr = match from.family() {
        Family::V4 => (Ipv4Addr::LOCALHOST, port).into(),
        Family::V6 => (Ipv6Addr::LOCALHOST, port).into(),
    };
    let endpoint = Endpoint::configured(addr);
    let outgoing: Vec<_> =
        datagrams.iter().map(|bytes| Outgoing { bytes, endpoint: &endpoint, tos: 0 }).collect();
    assert_eq!(from.send(&outgoing).failed, 0);
    let of_worker = |sockets: &UdpSockets| match from.family() {
        Family::V4 => sockets.v4.as_fd().try_clone_to_owned().unwrap(),
        Family::V6 => sockets.v6.as_ref().unwrap().as_fd().try_clone_to_owned().unwrap(),
    };
    let fds: Vec<_> = group.iter().map(of_worker).collect();
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    assert_eq!(poll(&mut polled, Duration::from_secs(10)).unwrap(), 1, "it comes to one");
    let worker = polled.iter().position(|fd| !fd.revents().is_empty()).unwrap();
    let socket = UdpSocket::from_fd(fds[worker].try_clone().unwrap()).unwrap();
    let mut batch = ReceiveBatch::new().unwrap();
    let mut got = Vec::new();
    while socket.receive(&mut batch).unwrap() > 0 {
        got.extend(batch.datagrams().map(|datagram| datagram.bytes.to_vec()));
    }
    assert_eq!(got, datagrams);
    worker
}

fn senders(family: Family, count: usize) -> Vec<UdpSocket> {
    let one = || {
        let sockets = bind_group(0, 1, 0).unwrap().1.pop().unwrap();
        match family {
            Family::V4 => sockets.v4,
            Family::V6 => sockets.v6.unwrap(),
        }
    };
    (0..count).map(|_| one()).collect()
}

fn index(slot: u32, epoch: u32) -> ReceiverIndex {
    INDEXES.own_index(slot, epoch)
}

/// A message of this length with its first bytes right.
fn transport(index: ReceiverIndex, len: usize) -> Vec<u8> {
    let mut message = vec![0xa5; len];
    message[..4].copy_from_slice(&[4, 0, 0, 0]);
    message[4..8].copy_from_slice(&index.to_wire());
    message
}

#[test]
fn transport_data_comes_to_the_home_of_its_keypair_whoever_sends_it() {
    require_root!();
    in_new_netns(|| {
        let test = "transport_data_comes_to_the_home_of_its_keypair_whoever_sends_it";
        let Some(mut lab) = Lab::new(test) else { return };
        lab.steer();
        let (first, last) = (index(SLOTS.start, 7), index(SLOTS.end - 1, 9));
        for family in [Family::V4, Family::V6] {
            let senders = senders(family, 8);
            for homes in [[0, 1], [2, 0], [1, 1]] {
                lab.at_home(first, homes[0]);
                lab.at_home(last, homes[1]);
                for from in &senders {
                    for len in [8, 32, 1452, 9000] {
                        let came = [first, last].map(|at| lab.comes_to(from, &transport(at, len)));
                        assert_eq!(came, homes.map(usize::from), "{family:?} {len}");
                    }
                }
            }
        }
    });
}

#[test]
fn everything_else_comes_where_the_kernel_would_have_it() {
    require_root!();
    in_new_netns(|| {
        let test = "everything_else_comes_where_the_kernel_would_have_it";
        let Some(mut lab) = Lab::new(test) else { return };
        let known = index(SLOTS.start + 5, 7);
        lab.at_home(known, 1);
        let retired = index(SLOTS.start + 6, 7);
        lab.at_home(retired, 1);
        lab.gone(retired);
        let beyond = index(SLOTS.start + 8, 1);
        lab.at_home(beyond, 63);
        let far_beyond = index(SLOTS.start + 9, 1);
        lab.at_home(far_beyond, u16::MAX);
        let mut reserved = transport(known, 64);
        reserved[2] = 1;
        let of_kind = |kind: u8| [&[kind][..], &transport(known, 148)[1..]].concat();
        let others = [
            Vec::new(),
            vec![4],
            transport(known, 32)[..7].to_vec(),
            reserved,
            of_kind(1),
            of_kind(2),
            of_kind(3),
            of_kind(0),
            transport(index(SLOTS.start + 5, 8), 64),
            transport(index(SLOTS.start + 7, 7), 64),
            transport(index(0, 7), 64),
            transport(retired, 64),
            transport(beyond, 64),
            transport(far_beyond, 64),
        ];
        for family in [Family::V4, Family::V6] {
            let senders = senders(family, 12);
            let come = |lab: &Lab| -> Vec<Vec<usize>> {
                let of = |from| others.iter().map(|bytes| lab.comes_to(from, bytes)).collect();
                senders.iter().map(of).collect()
            };
            // A new group, which has no program yet.
            (lab.port, lab.group) = group();
            let by_the_kernel = come(&lab);
            let workers: BTreeSet<&usize> = by_the_kernel.iter().flatten().collect();
            assert!(workers.len() > 1, "senders are spread: {by_the_kernel:?}");
            lab.steer();
            assert_eq!(come(&lab), by_the_kernel, "{family:?}");
            assert!(senders.iter().all(|from| lab.comes_to(from, &transport(known, 64)) == 1));
            lab.steering.forget_keypairs();
            let forgotten = |from| lab.comes_to(from, &transport(known, 64));
            let forgotten: Vec<usize> = senders.iter().map(forgotten).collect();
            let hashed: Vec<usize> = by_the_kernel.iter().map(|of_sender| of_sender[0]).collect();
            assert_eq!(forgotten, hashed);
            lab.at_home(known, 1);
            lab.at_home(beyond, 63);
            lab.at_home(far_beyond, u16::MAX);
        }
    });
}

/// What the kernel has joined (or never cut) is chosen for as one, by its first datagram.
#[test]
fn a_run_comes_whole_and_in_order() {
    require_root!();
    in_new_netns(|| {
        let Some(mut lab) = Lab::new("a_run_comes_whole_and_in_order") else { return };
        lab.steer();
        let (here, there) = (index(SLOTS.start, 7), index(SLOTS.start + 1, 7));
        lab.at_home(here, 2);
        lab.at_home(there, 0);
        let run = |at: ReceiverIndex, count: u8| -> Vec<Vec<u8>> {
            let numbered = |number: u8| {
                let mut message = transport(at, 1200);
                message[8] = number;
                message
            };
            (0..count).map(numbered).collect()
        };
        for family in [Family::V4, Family::V6] {
            for from in senders(family, 4) {
                let datagrams = [run(here, 20), run(there, 10)].concat();
                let datagrams: Vec<&[u8]> = datagrams.iter().map(Vec::as_slice).collect();
                // One rekey in the midst of a run: those behind it come along, and are handed on.
                assert_eq!(comes_to(&lab.group, lab.port, &from, &datagrams), 2, "{family:?}");
                assert_eq!(comes_to(&lab.group, lab.port, &from, &datagrams[20..]), 0);
            }
        }
    });
}

#[test]
fn the_program_follows_to_another_port_and_back() {
    require_root!();
    in_new_netns(|| {
        let test = "the_program_follows_to_another_port_and_back";
        let Some(mut lab) = Lab::new(test) else { return };
        let (other_port, other) = group();
        let known = index(SLOTS.start + 5, 7);
        let message = transport(known, 64);
        for home in [0, 1, 2, 0] {
            lab.at_home(known, home);
            for (port, sockets, former_port, former) in [
                (lab.port, &lab.group, other_port, &other),
                (other_port, &other, lab.port, &lab.group),
            ] {
                steer(&mut lab.steering, sockets).unwrap();
                for family in [Family::V4, Family::V6] {
                    let mut at_former = BTreeSet::new();
                    for from in senders(family, 12) {
                        assert_eq!(comes_to(sockets, port, &from, &[&message]), usize::from(home));
                        at_former.insert(comes_to(former, former_port, &from, &[&message]));
                    }
                    assert!(
                        at_former.len() > 1,
                        "its former sockets are the kernel's to choose from"
                    );
                }
            }
        }
        // A socket that is closed leaves the choice to the kernel, and loses nothing.
        drop(other);
        steer(&mut lab.steering, &lab.group).unwrap();
        lab.at_home(known, 2);
        lab.group.truncate(2);
        for from in senders(Family::V4, 6) {
            assert!(lab.comes_to(&from, &message) < 2);
        }
    });
}

#[test]
fn a_group_keeps_its_program_when_the_handle_is_gone() {
    require_root!();
    in_new_netns(|| {
        let test = "a_group_keeps_its_program_when_the_handle_is_gone";
        let Some(mut lab) = Lab::new(test) else { return };
        lab.steer();
        let known = index(SLOTS.start + 5, 7);
        let Lab { steering, words, port, group } = lab;
        drop(steering);
        for home in [1, 2] {
            let at = INDEXES.slot_of(known).unwrap() - SLOTS.start;
            words[at as usize].store(index_worker_entry(known, WorkerId(home)), Relaxed);
            for from in senders(Family::V4, 6) {
                let came = comes_to(&group, port, &from, &[&transport(known, 64)]);
                assert_eq!(came, usize::from(home));
            }
        }
    });
}

#[test]
fn what_cannot_be_steered_is_refused() {
    require_root!();
    in_new_netns(|| {
        let Some(mut lab) = Lab::new("what_cannot_be_steered_is_refused") else { return };
        let file = tempfile::tempfile().unwrap();
        assert!(lab.steering.steer(&[file.as_fd()], &[]).is_err());
        // One socket alone shares its port with nobody.
        let (_, alone) = bind_group(0, 1, 0).unwrap();
        assert!(steer(&mut lab.steering, &alone).is_err());
        lab.steer();
    });
}
