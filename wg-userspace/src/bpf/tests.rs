//! The steer program as a table: packets and map states in, verdicts and counters out. The kernel
//! runs the very program that is attached to NICs.

mod nat;
mod socket_steering;
mod tun_steering;

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use wg_common::headers::{ETHERTYPE_QINQ, ETHERTYPE_VLAN, OuterHeaders, parse_frame};
use wg_common::id::{DeviceId, ReceiverIndex, WorkerId};
use wg_common::index::{IndexLayout, IndexParts, IndexPermutation};
use wg_common::map::{
    HEARTBEAT_STALE_NS, HEARTBEATS_LEN, LOCAL_ADDRESSES_LEN, QueueEntry, QueueKey, index_entry,
};
use wg_common::message::{Message, classify};
use wg_common::outcome::{DropReason, SteerEvent};
use wg_common::protocol::{COOKIE_REPLY_LEN, INITIATION_LEN, RESPONSE_LEN};

use super::*;
use crate::require_root;
use crate::sys::netns::{in_new_netns, report_skipped};
use crate::sys::{clock, netns};

/// What the program is expected to do: a verdict, and the one counter that moves.
type Outcome = (XdpVerdict, Counter);

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Counter {
    Drop(DropReason),
    Event(SteerEvent),
}

const STEERED: Outcome = (XdpVerdict::Redirect, Counter::Event(SteerEvent::Steered));
const FOREIGN: Outcome = (XdpVerdict::Pass, Counter::Event(SteerEvent::PassedForeign));
const NO_XSK: Outcome = (XdpVerdict::Pass, Counter::Event(SteerEvent::PassedNoXsk));
const STALE: Outcome = (XdpVerdict::Pass, Counter::Event(SteerEvent::PassedStale));
const TOO_LONG: Outcome = (XdpVerdict::Pass, Counter::Event(SteerEvent::PassedTooLong));
const fn dropped(reason: DropReason) -> Outcome {
    (XdpVerdict::Drop, Counter::Drop(reason))
}

const PORT: u16 = 51820;
const OTHER_PORT: u16 = 53;
const LOCAL_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
const LOCAL_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));
const REMOTE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const REMOTE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

const INDEX_COUNT: u32 = 1024;
const INDEXES: IndexPermutation = IndexPermutation::new(
    [0xb7e1_5162, 0x8aed_2a6a, 0xbf71_5880, 0x9cf4_f3c7],
    IndexLayout::DEFAULT,
);
const SLOT: u32 = 5;
const LIVE: ReceiverIndex = INDEXES.own_index(SLOT, 3);
const DEAD: ReceiverIndex = INDEXES.own_index(SLOT + 1, 3);
const BYGONE: ReceiverIndex = INDEXES.own_index(SLOT, 2);
const BEYOND: ReceiverIndex = INDEXES.own_index(INDEX_COUNT, 3);

/// Where a test run's packets come from: the loopback device.
const QUEUE: QueueKey = QueueKey { ifindex: 1, queue: 0 };
const WORKER: WorkerId = WorkerId(2);
/// More than any packet here but those that are to be too long.
const FRAME_LEN_MAX: u32 = 2048;
const ENTRY: QueueEntry = QueueEntry::new(7, WORKER, FRAME_LEN_MAX);

/// The program with one port, two addresses, one live index and one served queue.
struct Lab {
    steer: Steer,
    xsk: OwnedFd,
}

impl Lab {
    /// `None`, after saying so, where the process may not load programs.
    fn new(test: &str) -> Option<Self> {
        let live_indexes = Some(INDEX_COUNT);
        Self::with(test, SteerOptions { live_indexes, ..SteerOptions::new(INDEXES) })
    }

    fn with(test: &str, options: SteerOptions) -> Option<Self> {
        let steer = match Steer::load(options) {
            Ok(steer) => steer,
            Err(error @ BpfError::NotPermitted) => {
                report_skipped(test, &error.to_string());
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let xsk =
            socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None).unwrap();
        let mut lab = Self { steer, xsk };
        lab.steer.set_port(PORT, Some(DeviceId(0)));
        lab.steer.add_address(LOCAL_V4).unwrap();
        lab.steer.add_address(LOCAL_V6).unwrap();
        lab.let_live(SLOT, index_entry(options.indexes.own_index(SLOT, 3)));
        lab.serve(ENTRY);
        lab.heartbeat(0);
        Some(lab)
    }

    fn let_live(&self, slot: u32, entry: u64) {
        self.steer.live_indexes()[slot as usize].store(entry, Ordering::Relaxed);
    }

    fn serve(&mut self, entry: QueueEntry) {
        self.steer.set_queue(QUEUE, entry, self.xsk.as_fd()).unwrap();
    }

    /// The worker's heartbeat was `age_ns` ago.
    fn heartbeat(&mut self, age_ns: i64) {
        let at = clock::boot_now().boot_ns().saturating_add_signed(-age_ns);
        self.steer.heartbeats()[usize::from(WORKER.0)].store(at, Ordering::Relaxed);
    }

    /// Runs the program with a fresh heartbeat.
    fn run(&mut self, packet: &[u8]) -> Outcome {
        self.heartbeat(0);
        self.run_as_it_is(packet)
    }

    fn run_as_it_is(&self, packet: &[u8]) -> Outcome {
        let before = self.steer.counters().unwrap();
        let verdict = self.steer.test_run(packet).unwrap();
        let after = self.steer.counters().unwrap();
        let drops = DropReason::ALL.iter().map(|reason| {
            (Counter::Drop(*reason), after.dropped(*reason) - before.dropped(*reason))
        });
        let events = SteerEvent::ALL
            .iter()
            .map(|event| (Counter::Event(*event), after.event(*event) - before.event(*event)));
        let moved: Vec<_> = drops.chain(events).filter(|(_, by)| *by != 0).collect();
        let [(counter, 1)] = moved[..] else { panic!("one packet moved {moved:?}") };
        (verdict, counter)
    }
}

fn to(dst: SocketAddr) -> OuterHeaders {
    let src = if dst.is_ipv4() { REMOTE_V4 } else { REMOTE_V6 };
    OuterHeaders {
        dst_mac: [2, 0, 0, 0, 0, 2],
        src_mac: [2, 0, 0, 0, 0, 1],
        tags: [None, None],
        src: SocketAddr::new(src, 4444),
        dst,
        tos: 0,
        ttl: 64,
        id: 0,
    }
}

fn frame(headers: OuterHeaders, message: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; headers.len()];
    frame.extend_from_slice(message);
    headers.write(&mut frame).unwrap();
    frame
}

/// In an IPv4 frame to our port: Ethernet, IPv4, UDP, message.
fn v4(message: &[u8]) -> Vec<u8> {
    frame(to(SocketAddr::new(LOCAL_V4, PORT)), message)
}

fn v6(message: &[u8]) -> Vec<u8> {
    frame(to(SocketAddr::new(LOCAL_V6, PORT)), message)
}

/// The frame with tags put in front of those it has.
fn tagged(ethertypes: &[u16], mut frame: Vec<u8>) -> Vec<u8> {
    for ethertype in ethertypes.iter().rev() {
        let [high, low] = ethertype.to_be_bytes();
        frame.splice(12..12, [high, low, 0, 5]);
    }
    frame
}

fn changed(mut frame: Vec<u8>, changes: &[(usize, u8)]) -> Vec<u8> {
    for (at, value) in changes {
        frame[*at] = *value;
    }
    frame
}

fn message(kind: u8, len: usize) -> Vec<u8> {
    let mut message = vec![0xa5; len];
    for (to, byte) in message.iter_mut().zip([kind, 0, 0, 0]) {
        *to = byte;
    }
    message
}

fn with_index(mut message: Vec<u8>, at: usize, index: ReceiverIndex) -> Vec<u8> {
    message[at..at + 4].copy_from_slice(&index.to_wire());
    message
}

fn initiation() -> Vec<u8> {
    message(1, INITIATION_LEN)
}

fn response(receiver: ReceiverIndex) -> Vec<u8> {
    with_index(message(2, RESPONSE_LEN), 8, receiver)
}

fn cookie_reply(receiver: ReceiverIndex) -> Vec<u8> {
    with_index(message(3, COOKIE_REPLY_LEN), 4, receiver)
}

fn transport(receiver: ReceiverIndex, len: usize) -> Vec<u8> {
    with_index(message(4, len), 4, receiver)
}

/// One of each message that reaches the XSK.
fn good_messages() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("initiation", initiation()),
        ("response", response(LIVE)),
        ("cookie reply", cookie_reply(LIVE)),
        ("keepalive", transport(LIVE, 32)),
        ("transport of 128", transport(LIVE, 128)),
        ("transport, not padded", transport(LIVE, 133)),
        ("transport, padding clamped to the MTU", transport(LIVE, 1452)),
    ]
}

/// The good messages in every frame that is understood.
fn good_packets() -> Vec<(String, Vec<u8>)> {
    let tags: [(&str, &[u16]); 4] = [
        ("untagged", &[]),
        ("802.1Q", &[ETHERTYPE_VLAN]),
        ("802.1ad", &[ETHERTYPE_QINQ, ETHERTYPE_VLAN]),
        ("802.1Q twice", &[ETHERTYPE_VLAN, ETHERTYPE_VLAN]),
    ];
    let mut packets = Vec::new();
    for (name, message) in good_messages() {
        for (tags_name, tags) in tags {
            packets.push((format!("{name}, IPv4, {tags_name}"), tagged(tags, v4(&message))));
            packets.push((format!("{name}, IPv6, {tags_name}"), tagged(tags, v6(&message))));
        }
    }
    packets
}

#[test]
fn good_messages_are_steered_in_every_frame() {
    let Some(mut lab) = Lab::new("good_messages_are_steered_in_every_frame") else { return };
    for (name, packet) in good_packets() {
        assert_eq!(lab.run(&packet), STEERED, "{name}");
    }
}

#[test]
fn packets_meet_their_verdicts() {
    use DropReason::{BadLength, BadReserved, BadType, UnknownIndex};

    let Some(mut lab) = Lab::new("packets_meet_their_verdicts") else { return };
    let good = || transport(LIVE, 128);
    let mapped = Ipv4Addr::new(192, 0, 2, 2).to_ipv6_mapped();
    let two = [ETHERTYPE_QINQ, ETHERTYPE_VLAN];
    let three = [ETHERTYPE_QINQ, ETHERTYPE_VLAN, ETHERTYPE_VLAN];
    let padded = |mut frame: Vec<u8>, len| {
        frame.resize(frame.len() + len, 0xff);
        frame
    };
    // Offsets into an untagged frame: 14 IPv4 or IPv6, 34 or 54 UDP, 42 or 62 the message.
    #[rustfmt::skip]
    let rows: Vec<(&str, Vec<u8>, Outcome)> = vec![
        // Not ours.
        ("ARP", changed(v4(&good()), &[(12, 0x08), (13, 0x06)]), FOREIGN),
        ("Ethernet header only", v4(&good())[..14].to_vec(), FOREIGN),
        ("three tags", tagged(&three, v4(&good())), FOREIGN),
        ("IPv4 with options", changed(v4(&good()), &[(14, 0x46)]), FOREIGN),
        ("IPv4 with a short header", changed(v4(&good()), &[(14, 0x44)]), FOREIGN),
        ("IPv4 that says version 6", changed(v4(&good()), &[(14, 0x65)]), FOREIGN),
        ("first IPv4 fragment", changed(v4(&good()), &[(20, 0x20)]), FOREIGN),
        ("later IPv4 fragment", changed(v4(&good()), &[(21, 0x10)]), FOREIGN),
        ("IPv4 don't fragment", changed(v4(&good()), &[(20, 0x40)]), STEERED),
        ("TCP over IPv4", changed(v4(&good()), &[(23, 6)]), FOREIGN),
        ("TCP over IPv6", changed(v6(&good()), &[(20, 6)]), FOREIGN),
        ("IPv6 hop-by-hop options", changed(v6(&good()), &[(20, 0)]), FOREIGN),
        ("IPv6 fragment", changed(v6(&good()), &[(20, 44)]), FOREIGN),
        ("IPv6 that says version 4", changed(v6(&good()), &[(14, 0x45)]), FOREIGN),
        ("IPv4 longer than its frame", changed(v4(&good()), &[(16, 0x01)]), FOREIGN),
        ("IPv4 shorter than its header", changed(v4(&good()), &[(16, 0), (17, 19)]), FOREIGN),
        ("IPv6 longer than its frame", changed(v6(&good()), &[(18, 0x01)]), FOREIGN),
        ("UDP longer than IPv4", changed(v4(&good()), &[(38, 0), (39, 137)]), FOREIGN),
        ("UDP longer than IPv6", changed(v6(&good()), &[(58, 0), (59, 137)]), FOREIGN),
        ("UDP shorter than its header", changed(v4(&good()), &[(38, 0), (39, 7)]), FOREIGN),
        ("UDP of length 0", changed(v6(&good()), &[(58, 0), (59, 0)]), FOREIGN),
        ("other port, IPv4", frame(to(SocketAddr::new(LOCAL_V4, OTHER_PORT)), &good()), FOREIGN),
        ("other port, IPv6", frame(to(SocketAddr::new(LOCAL_V6, OTHER_PORT)), &good()), FOREIGN),
        ("from our port", changed(frame(to(SocketAddr::new(LOCAL_V4, OTHER_PORT)), &good()), &[(34, 0xca), (35, 0x6c)]), FOREIGN),
        ("transit, IPv4", frame(to(SocketAddr::new([203, 0, 113, 9].into(), PORT)), &good()), FOREIGN),
        ("transit, IPv6", frame(to(SocketAddr::new(REMOTE_V6, PORT)), &good()), FOREIGN),
        ("transit that would be no message", frame(to(SocketAddr::new([203, 0, 113, 9].into(), PORT)), &[9; 3]), FOREIGN),
        ("an IPv4 address of ours in IPv6", frame(to(SocketAddr::new(mapped.into(), PORT)), &good()), FOREIGN),

        // Ours, and impossible.
        ("type 0", v4(&message(0, 128)), dropped(BadType)),
        ("type 5", v4(&message(5, 128)), dropped(BadType)),
        ("type 255", tagged(&two, v6(&message(255, 148))), dropped(BadType)),
        ("first reserved byte", v4(&changed(good(), &[(1, 1)])), dropped(BadReserved)),
        ("second reserved byte", v6(&changed(initiation(), &[(2, 1)])), dropped(BadReserved)),
        ("third reserved byte", v4(&changed(response(LIVE), &[(3, 0x80)])), dropped(BadReserved)),
        ("nothing", v4(&[]), dropped(BadLength)),
        ("seven bytes", v6(&message(4, 7)), dropped(BadLength)),
        ("initiation of 147", v4(&message(1, 147)), dropped(BadLength)),
        ("initiation of 149", v4(&message(1, 149)), dropped(BadLength)),
        ("response of 91", v4(&message(2, 91)), dropped(BadLength)),
        ("response of 93", v4(&message(2, 93)), dropped(BadLength)),
        ("response of 8", v4(&message(2, 8)), dropped(BadLength)),
        ("cookie reply of 63", v6(&message(3, 63)), dropped(BadLength)),
        ("cookie reply of 65", v6(&message(3, 65)), dropped(BadLength)),
        ("transport of 31", v4(&transport(LIVE, 31)), dropped(BadLength)),
        ("transport of 31, IPv6", v6(&transport(LIVE, 31)), dropped(BadLength)),

        // Ours, for nobody.
        ("transport, dead slot", v4(&transport(DEAD, 128)), dropped(UnknownIndex)),
        ("transport, earlier user of the slot", v4(&transport(BYGONE, 128)), dropped(UnknownIndex)),
        ("transport, IPv6", v6(&transport(DEAD, 32)), dropped(UnknownIndex)),
        ("response, dead slot", v4(&response(DEAD)), dropped(UnknownIndex)),
        ("response, live sender index only", v4(&with_index(response(DEAD), 4, LIVE)), dropped(UnknownIndex)),
        ("cookie reply, dead slot", v6(&cookie_reply(BYGONE)), dropped(UnknownIndex)),
        ("transport, slot beyond the map", v4(&transport(BEYOND, 128)), STEERED),
        ("response, slot beyond the map", v6(&response(BEYOND)), STEERED),

        // Bytes behind the datagram do not count.
        ("keepalive, Ethernet padding", padded(v4(&transport(LIVE, 32)), 30), STEERED),
        ("cookie reply, Ethernet padding", padded(v6(&cookie_reply(LIVE)), 4), STEERED),
        ("transport of 31, Ethernet padding", padded(v4(&transport(LIVE, 31)), 30), dropped(BadLength)),
        ("nothing, Ethernet padding", padded(v4(&[]), 18), dropped(BadLength)),
        ("UDP shorter than IPv4", changed(v4(&transport(LIVE, 40)), &[(39, 8 + 32)]), STEERED),
        ("UDP too short in IPv4", changed(v4(&transport(LIVE, 40)), &[(39, 8 + 31)]), dropped(BadLength)),
    ];
    for (name, packet, expected) in rows {
        assert_eq!(lab.run(&packet), expected, "{name}");
    }
}

/// What a row does to the maps before its packet comes.
type Change = dyn Fn(&mut Lab);

#[test]
fn map_states_decide_where_a_good_message_goes() {
    let test = "map_states_decide_where_a_good_message_goes";
    const STALE_NS: i64 = HEARTBEAT_STALE_NS as i64;
    const NOBODY: QueueEntry = QueueEntry { worker: HEARTBEATS_LEN, ..ENTRY };
    const FRAME_LEN: usize = 14 + 20 + 8 + 128;
    const ENTRY_OF_LEN: [QueueEntry; 3] = [
        QueueEntry { frame_len_max: FRAME_LEN as u32, ..ENTRY },
        QueueEntry { frame_len_max: FRAME_LEN as u32 - 1, ..ENTRY },
        QueueEntry { frame_len_max: 0, ..ENTRY },
    ];
    let rows: [(&str, &Change, Outcome); 18] = [
        ("as it is", &|_| (), STEERED),
        ("port given up", &|lab| lab.steer.set_port(PORT, None), FOREIGN),
        ("port of another device", &|lab| lab.steer.set_port(PORT, Some(DeviceId(9))), STEERED),
        ("address gone", &|lab| lab.steer.remove_address(LOCAL_V4).unwrap(), FOREIGN),
        ("other address gone", &|lab| lab.steer.remove_address(LOCAL_V6).unwrap(), STEERED),
        ("index gone", &|lab| lab.let_live(SLOT, 0), dropped(DropReason::UnknownIndex)),
        (
            "slot has a new user",
            &|lab| lab.let_live(SLOT, index_entry(BYGONE)),
            dropped(DropReason::UnknownIndex),
        ),
        ("queue not served", &|lab| lab.steer.unset_queue(QUEUE).unwrap(), NO_XSK),
        ("XSK gone", &|lab| lab.steer.xsks.unset(ENTRY.xsk).unwrap(), NO_XSK),
        ("heartbeat young", &|lab| lab.heartbeat(STALE_NS / 5), STEERED),
        ("heartbeat ahead of the clock", &|lab| lab.heartbeat(-1_000_000_000), STEERED),
        ("heartbeat old", &|lab| lab.heartbeat(STALE_NS), STALE),
        ("heartbeat very old", &|lab| lab.heartbeat(STALE_NS * 100), STALE),
        (
            "no heartbeat ever",
            &|lab| lab.steer.heartbeats()[usize::from(WORKER.0)].store(0, Ordering::Relaxed),
            STALE,
        ),
        ("worker beyond the map", &|lab| lab.serve(NOBODY), STALE),
        ("as long as the XSK takes", &|lab| lab.serve(ENTRY_OF_LEN[0]), STEERED),
        ("longer than the XSK takes", &|lab| lab.serve(ENTRY_OF_LEN[1]), TOO_LONG),
        ("an entry of an XSK that takes nothing", &|lab| lab.serve(ENTRY_OF_LEN[2]), TOO_LONG),
    ];
    let packet = v4(&transport(LIVE, 128));
    assert_eq!(packet.len(), FRAME_LEN);
    for (name, change, expected) in rows {
        let Some(mut lab) = Lab::new(test) else { return };
        lab.heartbeat(0);
        change(&mut lab);
        assert_eq!(lab.run_as_it_is(&packet), expected, "{name}");
    }
}

#[test]
fn a_queue_given_back_leaves_no_socket_behind() {
    let Some(mut lab) = Lab::new("a_queue_given_back_leaves_no_socket_behind") else { return };
    lab.steer.unset_queue(QUEUE).unwrap();
    lab.steer.unset_queue(QUEUE).unwrap();
    lab.steer.queues.insert(QUEUE, ENTRY, 0).unwrap();
    assert_eq!(lab.run(&v4(&transport(LIVE, 32))), NO_XSK);
}

#[test]
fn the_socket_under_an_old_number_is_forgotten() {
    let Some(mut lab) = Lab::new("the_socket_under_an_old_number_is_forgotten") else { return };
    lab.serve(QueueEntry::new(8, WORKER, FRAME_LEN_MAX));
    assert_eq!(lab.run(&v4(&transport(LIVE, 32))), STEERED);
    lab.steer.queues.insert(QUEUE, ENTRY, 0).unwrap();
    assert_eq!(lab.run(&v4(&transport(LIVE, 32))), NO_XSK);
}

#[test]
fn a_packet_truncated_anywhere_is_never_steered() {
    let Some(mut lab) = Lab::new("a_packet_truncated_anywhere_is_never_steered") else { return };
    lab.heartbeat(-60_000_000_000);
    for (name, packet) in good_packets() {
        // The kernel runs no program on less than an Ethernet header.
        for len in 14..packet.len() {
            let verdict = lab.steer.test_run(&packet[..len]).unwrap();
            assert_eq!(verdict, XdpVerdict::Pass, "{name}, cut to {len}");
        }
    }
}

#[test]
fn a_message_cut_anywhere_is_dropped_for_its_length() {
    let test = "a_message_cut_anywhere_is_dropped_for_its_length";
    let Some(mut lab) = Lab::new(test) else { return };
    for (name, message) in good_messages() {
        let shortest = if message[0] == 4 { 32 } else { message.len() };
        for len in 0..shortest {
            let expected = dropped(DropReason::BadLength);
            assert_eq!(lab.run(&v4(&message[..len])), expected, "{name}, IPv4, cut to {len}");
            assert_eq!(lab.run(&v6(&message[..len])), expected, "{name}, IPv6, cut to {len}");
        }
    }
}

/// What the program must do with the packet, by the daemon's own parsers.
fn expected(packet: &[u8]) -> Outcome {
    let Some(datagram) = parse_frame(packet) else { return FOREIGN };
    let is_local = [LOCAL_V4, LOCAL_V6].contains(&datagram.dst.ip());
    if !is_local || datagram.dst.port() != PORT {
        return FOREIGN;
    }
    match classify(&packet[datagram.payload]) {
        Err(reason) => dropped(reason),
        Ok(Message::Initiation) => STEERED,
        Ok(Message::Response(index) | Message::CookieReply(index) | Message::Transport(index)) => {
            let slot = INDEXES.slot_of(index).unwrap();
            if index == LIVE || slot >= INDEX_COUNT {
                STEERED
            } else {
                dropped(DropReason::UnknownIndex)
            }
        }
    }
}

/// Packets near what is ours, with bytes changed, cut off or added.
fn packets() -> impl Strategy<Value = Vec<u8>> {
    let addresses = vec![LOCAL_V4, LOCAL_V6, REMOTE_V6, [203, 0, 113, 9].into()];
    let dst = (select(addresses), select(vec![PORT, PORT, PORT, OTHER_PORT]));
    let tag = prop_oneof![Just(ETHERTYPE_VLAN), Just(ETHERTYPE_QINQ)];
    let tags = prop_oneof![
        4 => prop::collection::vec(tag.clone(), 0..=2),
        1 => prop::collection::vec(tag, 3..=4),
    ];
    let len = prop_oneof![
        select(vec![INITIATION_LEN, RESPONSE_LEN, COOKIE_REPLY_LEN, 31, 32, 33, 1452]),
        0usize..1500,
    ];
    let good = select(good_messages()).prop_map(|(_, message)| message);
    let index = select(vec![LIVE, DEAD, BYGONE, BEYOND]);
    let other = (0u8..7, len, index).prop_map(|(kind, len, index)| {
        let mut message = message(kind, len);
        for at in [4, 8] {
            if len >= at + 4 {
                message = with_index(message, at, index);
            }
        }
        message
    });
    let message = prop_oneof![good, other];
    let changes = prop_oneof![
        2 => Just(vec![]),
        2 => prop::collection::vec((0usize..80, any::<u8>()), 1..4),
        1 => prop::collection::vec((0usize..80, select(vec![0, 1, 4, 6, 17, 0x45, 0x60])), 1..3),
    ];
    let end = prop_oneof![3 => Just(0isize), 1 => -80isize..0, 1 => 1isize..64];
    let near = (dst, tags, message, changes, end).prop_map(
        |((address, port), tags, message, changes, end)| {
            let mut packet = tagged(&tags, frame(to(SocketAddr::new(address, port)), &message));
            let whole = packet.len();
            packet.resize(whole.saturating_add_signed(end).max(14), 0);
            for (at, value) in changes {
                if let Some(byte) = packet.get_mut(at) {
                    *byte = value;
                }
            }
            packet
        },
    );
    prop_oneof![9 => near, 1 => prop::collection::vec(any::<u8>(), 14..200)]
}

#[test]
fn the_program_and_the_daemon_agree_on_every_packet() {
    let test = "the_program_and_the_daemon_agree_on_every_packet";
    let Some(mut lab) = Lab::new(test) else { return };
    // Far ahead, so that a slow machine does not make it stale.
    lab.heartbeat(-3_600_000_000_000);
    let config = Config { cases: 4096, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&packets(), |packet| {
            prop_assert_eq!(lab.run_as_it_is(&packet), expected(&packet));
            Ok(())
        })
        .unwrap();
}

#[test]
fn an_index_is_taken_apart_under_the_key_and_layout_that_were_loaded() {
    let test = "an_index_is_taken_apart_under_the_key_and_layout_that_were_loaded";
    let keys = [[0; 4], [u32::MAX; 4], [0x0123_4567, 0x89ab_cdef, 0xfedc_ba98, 0x7654_3210]];
    // Bits of node and slot, our node.
    let layouts = [(0, 3, 0), (0, 20, 0), (0, 24, 0), (4, 16, 9), (8, 20, 255), (1, 10, 0)];
    for key in keys {
        for (node_bits, slot_bits, node) in layouts {
            let layout = IndexLayout::new(node_bits, slot_bits).unwrap();
            let indexes = IndexPermutation::new(key, layout).at_node(node);
            let Some(mut lab) = Lab::with(test, SteerOptions::new(indexes)) else { return };
            let slots = lab.steer.live_indexes().len() as u32;
            assert_eq!(slots, layout.slot_count().min(LIVE_INDEXES_LEN));
            for slot in [0, 1, slots / 2, slots - 1] {
                let index = indexes.own_index(slot, 1);
                lab.let_live(slot, index_entry(index));
                assert_eq!(lab.run(&v4(&transport(index, 128))), STEERED, "{indexes:?}, {slot}");
                assert_eq!(lab.run(&v6(&response(index))), STEERED, "{indexes:?}, {slot}");
                let unknown = dropped(DropReason::UnknownIndex);
                let later = indexes.own_index(slot, 2);
                assert_eq!(lab.run(&v4(&transport(later, 128))), unknown, "{indexes:?}, {slot}");
                lab.let_live(slot, 0);
                assert_eq!(lab.run(&v4(&transport(index, 128))), unknown, "{indexes:?}, {slot}");
            }
        }
    }
}

#[test]
fn an_index_made_under_another_key_is_unknown() {
    let test = "an_index_made_under_another_key_is_unknown";
    let Some(mut lab) = Lab::with(test, SteerOptions::new(INDEXES)) else { return };
    assert_eq!(lab.run(&v4(&transport(LIVE, 128))), STEERED);
    for word in 0..4 {
        let mut key = [0xb7e1_5162, 0x8aed_2a6a, 0xbf71_5880, 0x9cf4_f3c7];
        key[word] ^= 1;
        let other = IndexPermutation::new(key, IndexLayout::DEFAULT).own_index(SLOT, 3);
        let unknown = dropped(DropReason::UnknownIndex);
        assert_eq!(lab.run(&v4(&transport(other, 128))), unknown, "word {word}");
    }
}

#[test]
fn what_strangers_guess_is_dropped() {
    let test = "what_strangers_guess_is_dropped";
    let Some(mut lab) = Lab::with(test, SteerOptions::new(INDEXES)) else { return };
    for guess in (0..2000_u32).map(|n| n.wrapping_mul(0x9e37_79b9)) {
        let index = ReceiverIndex::from_wire(guess.to_le_bytes());
        assert_ne!(index, LIVE);
        let unknown = dropped(DropReason::UnknownIndex);
        assert_eq!(lab.run(&v4(&transport(index, 128))), unknown, "{index}");
    }
}

#[test]
fn an_index_of_another_node_is_unknown_even_beyond_the_map() {
    let test = "an_index_of_another_node_is_unknown_even_beyond_the_map";
    let layout = IndexLayout::new(4, 16).unwrap();
    let indexes = IndexPermutation::new([1, 2, 3, 4], layout).at_node(9);
    let options = SteerOptions { live_indexes: Some(INDEX_COUNT), ..SteerOptions::new(indexes) };
    let Some(mut lab) = Lab::with(test, options) else { return };
    for node in 0..layout.node_count() {
        for slot in [SLOT, INDEX_COUNT, layout.slot_count() - 1] {
            let index = indexes.index_of(IndexParts { node, slot, epoch: 3 });
            let expected = if node == 9 { STEERED } else { dropped(DropReason::UnknownIndex) };
            assert_eq!(lab.run(&v4(&transport(index, 128))), expected, "{node}, {slot}");
        }
    }
}

#[test]
fn the_address_map_can_be_full() {
    let Some(mut lab) = Lab::new("the_address_map_can_be_full") else { return };
    let refused = (0..=LOCAL_ADDRESSES_LEN)
        .map(|n| lab.steer.add_address(Ipv4Addr::from(0x0a00_0000 + n).into()))
        .find_map(Result::err);
    assert!(matches!(refused, Some(BpfError::Full(_))), "{refused:?}");
    assert_eq!(lab.run(&v4(&transport(LIVE, 32))), STEERED);
    let refused_address = frame(to(SocketAddr::new([10, 0, 16, 0].into(), PORT)), &initiation());
    assert_eq!(lab.run(&refused_address), FOREIGN);
}

#[test]
fn addresses_may_be_told_twice() {
    let Some(mut lab) = Lab::new("addresses_may_be_told_twice") else { return };
    lab.steer.add_address(LOCAL_V4).unwrap();
    lab.steer.remove_address(LOCAL_V4).unwrap();
    lab.steer.remove_address(LOCAL_V4).unwrap();
}

#[test]
fn what_is_no_xsk_is_refused() {
    let Some(mut lab) = Lab::new("what_is_no_xsk_is_refused") else { return };
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert!(lab.steer.set_queue(QUEUE, ENTRY, udp.as_fd()).is_err());
    let beyond = QueueEntry { xsk: u32::MAX, ..ENTRY };
    let xsk = lab.xsk.try_clone().unwrap();
    assert!(lab.steer.set_queue(QUEUE, beyond, xsk.as_fd()).is_err());
    assert_eq!(lab.run(&v4(&transport(LIVE, 32))), STEERED);
}

/// Collects what `tracing` prints.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What the log says after one good message without an XSK and one bad one.
fn logged(lab: &mut Lab) -> Option<String> {
    lab.steer.unset_queue(QUEUE).unwrap();
    lab.run(&v4(&transport(LIVE, 32)));
    lab.run(&v4(&message(9, 32)));
    let mut reader = lab.steer.log_reader()?;
    assert!(lab.steer.log_reader().is_none(), "there is one reader");
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || reader.flush());
    Some(String::from_utf8(lines.0.lock().unwrap().clone()).unwrap())
}

#[test]
fn log_lines_reach_tracing() {
    let options = SteerOptions { log: true, ..SteerOptions::new(INDEXES) };
    let Some(mut lab) = Lab::with("log_lines_reach_tracing", options) else { return };
    let logged = logged(&mut lab).unwrap();
    let (passed, dropped) = (SteerEvent::PassedNoXsk as u8, DropReason::BadType as u8);
    assert!(logged.contains(&format!("passed: event {passed},")), "{logged}");
    assert!(logged.contains(&format!("dropped: reason {dropped},")), "{logged}");
}

#[test]
fn the_program_is_silent_by_default() {
    let Some(mut lab) = Lab::new("the_program_is_silent_by_default") else { return };
    assert_eq!(logged(&mut lab), None);
}

/// The object with a program that reads a register before it was written.
fn unverifiable_object() -> Vec<u8> {
    let mut object = OBJECT.to_vec();
    let u64_at = |at: usize| u64::from_le_bytes(*object[at..].first_chunk().unwrap()) as usize;
    let u32_at = |at: usize| u32::from_le_bytes(*object[at..].first_chunk().unwrap()) as usize;
    let u16_at = |at: usize| u16::from_le_bytes(*object[at..].first_chunk().unwrap()) as usize;
    // ELF64: section headers of 64 bytes at e_shoff; the last field of interest is the name table.
    let header = |index: usize| u64_at(0x28) + index * 64;
    let names = u64_at(header(u16_at(0x3e)) + 0x18);
    let program = (0..u16_at(0x3c))
        .map(header)
        .find(|section| object[names + u32_at(*section)..].starts_with(b"xdp\0"))
        .map(|section| u64_at(section + 0x18))
        .unwrap();
    // r0 = r5
    object[program..program + 8].copy_from_slice(&[0xbf, 0x50, 0, 0, 0, 0, 0, 0]);
    object
}

#[test]
fn a_refused_program_shows_the_verifiers_log() {
    if Lab::new("a_refused_program_shows_the_verifiers_log").is_none() {
        return;
    }
    let refused = Steer::load_object(&unverifiable_object(), SteerOptions::new(INDEXES)).err();
    let text = refused.unwrap().to_string();
    assert!(text.contains("refuses tidegate_steer"), "{text}");
    assert!(text.contains("R5 !read_ok"), "{text}");
}

#[test]
fn the_object_is_what_this_source_expects() {
    let missing = Steer::load_object(b"", SteerOptions::new(INDEXES)).err().unwrap();
    assert!(matches!(missing, BpfError::Object(_)), "{missing}");
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// Two ends of a wire, in a network namespace of their own.
fn with_veth(body: impl FnOnce() + Send) {
    in_new_netns(|| {
        ip("link add outer0 type veth peer name outer1");
        ip("link set outer0 up");
        ip("link set outer1 up");
        body();
    });
}

fn loaded() -> Steer {
    Steer::load(SteerOptions::new(INDEXES)).unwrap()
}

#[test]
fn attaches_natively_and_leaves_nothing_behind() {
    require_root!();
    with_veth(|| {
        let ifindex = link::index("outer0").unwrap();
        let mut steer = loaded();
        steer.attach("outer0").unwrap();
        steer.attach("outer0").unwrap();
        let name = attached::program_on(ifindex).unwrap().name.unwrap();
        assert_eq!(name, STEER_PROGRAM);
        steer.detach("outer0");
        steer.detach("outer0");
        assert_eq!(attached::program_on(ifindex), None);

        steer.attach("outer0").unwrap();
        drop(steer);
        assert_eq!(attached::program_on(ifindex), None);
    });
}

#[test]
fn a_foreign_program_is_never_replaced() {
    require_root!();
    with_veth(|| {
        let ifindex = link::index("outer0").unwrap();
        let mut foreign = loaded();
        foreign.attach("outer0").unwrap();
        let before = attached::program_on(ifindex).unwrap();

        let refused = loaded().attach("outer0").unwrap_err();
        let AttachError::ForeignProgram { foreign: named, .. } = &refused else {
            panic!("{refused}")
        };
        assert_eq!(named, &before);
        assert_eq!(attached::program_on(ifindex), Some(before));
        assert!(refused.to_string().contains("tidegate_steer (id "), "{refused}");
    });
}

#[test]
fn an_interface_without_native_xdp_is_left_alone() {
    require_root!();
    in_new_netns(|| {
        let mut steer = loaded();
        let refused = steer.attach("lo").unwrap_err();
        assert!(matches!(refused, AttachError::NoNativeXdp(_)), "{refused}");
        assert_eq!(attached::program_on(1), None);
        let refused = steer.attach("no-such-link").unwrap_err();
        assert!(matches!(refused, AttachError::UnknownInterface(_)), "{refused}");
    });
}

#[test]
fn on_a_wire_what_passes_reaches_the_socket_and_what_drops_does_not() {
    require_root!();
    let (ours, theirs) = (netns::NetNs::new().unwrap(), netns::NetNs::new().unwrap());
    ours.run(|| {
        ip(&format!("link add outer0 type veth peer name outer1 netns {}", theirs.path()));
        ip("addr add 192.0.2.2/24 dev outer0");
        ip("link set outer0 up");
    });
    theirs.run(|| {
        ip("addr add 192.0.2.1/24 dev outer1");
        ip("link set outer1 up");
    });
    let mut steer = loaded();
    steer.set_port(PORT, Some(DeviceId(0)));
    steer.add_address(LOCAL_V4).unwrap();
    let socket = ours.run(|| {
        steer.attach("outer0").unwrap();
        UdpSocket::bind((LOCAL_V4, PORT)).unwrap()
    });
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    theirs.run(|| {
        let sender = UdpSocket::bind((REMOTE_V4, 0)).unwrap();
        for message in [message(9, 148), transport(DEAD, 32), initiation()] {
            sender.send_to(&message, (LOCAL_V4, PORT)).unwrap();
        }
    });
    let mut bytes = [0; 200];
    assert_eq!(socket.recv(&mut bytes).unwrap(), INITIATION_LEN);
    let counters = steer.counters().unwrap();
    assert_eq!(counters.dropped(DropReason::BadType), 1);
    assert_eq!(counters.dropped(DropReason::UnknownIndex), 1);
    assert_eq!(counters.event(SteerEvent::PassedNoXsk), 1);
}
