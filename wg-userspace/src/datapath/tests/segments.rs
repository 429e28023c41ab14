//! Super-packets from the TUN device: cut, sealed and sent in order.

use std::net::SocketAddr;

use wg_common::headers::{Checksum, PROTOCOL_TCP};

use super::*;
use crate::aead::{AeadKey, BatchAead as _, Job};
use crate::datapath::BATCH_LEN;
use crate::segments::Cut;
use crate::segments::vnet::{PartialChecksum, SegmentKind, Segments};

/// A socket that keeps what it is given, and how.
#[derive(Default)]
pub(super) struct Post {
    sent: RefCell<Vec<(Vec<u8>, SocketAddr, u8)>>,
    /// Datagrams of each call.
    calls: RefCell<Vec<usize>>,
}

impl DatagramSink for Post {
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
        let copy = |d: &Outgoing<'_>| (d.bytes.to_vec(), d.endpoint.remote, d.tos);
        self.sent.borrow_mut().extend(datagrams.iter().map(copy));
        self.calls.borrow_mut().push(datagrams.len());
        Unsent::default()
    }
}

impl Post {
    /// What was sent, opened with the key of `id`. Counters follow each other.
    pub(super) fn opened(&self, id: u8) -> Vec<Vec<u8>> {
        let key = AeadKey::new(&[id; 32]);
        let sent = self.sent.take();
        let open = |(place, (mut bytes, ..)): (usize, (Vec<u8>, SocketAddr, u8))| {
            let counter = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
            assert_eq!(counter, place as u64);
            let mut jobs = [Job::new(&key, counter, &mut bytes[16..])];
            AEAD.open(&mut jobs);
            assert!(jobs[0].ok);
            bytes.truncate(bytes.len() - 16);
            bytes.split_off(16)
        };
        sent.into_iter().enumerate().map(open).collect()
    }
}

/// A TCP packet of `payload_len` bytes to 10.0.0.*last*, its checksum left unfinished.
pub(super) fn tcp(last: u8, payload_len: usize) -> Vec<u8> {
    let mut bytes = packet(US, [10, 0, 0, last], 40 + payload_len);
    (bytes[1], bytes[9]) = (1, PROTOCOL_TCP);
    bytes[32..34].copy_from_slice(&[0x50, 0x18]);
    let (source, destination) = (US.into(), [10, 0, 0, last].into());
    let sum = Checksum::pseudo(source, destination, PROTOCOL_TCP, 20 + payload_len as u32).finish();
    bytes[36..38].copy_from_slice(&(!sum).to_be_bytes());
    for (place, byte) in bytes[40..].iter_mut().enumerate() {
        *byte = (place / 251) as u8 ^ place as u8;
    }
    bytes
}

const PLACE: PartialChecksum = PartialChecksum { start: 20, offset: 16 };

pub(super) fn header(payload_len: u16) -> VnetHeader {
    let kind = SegmentKind::TcpV4;
    let segments = Segments { kind, has_cwr: false, headers_len: 40, payload_len };
    VnetHeader { checksum: Some(PLACE), segments: Some(segments) }
}

/// The segments of a super-packet, padded as they are sealed.
pub(super) fn segments_of(header: VnetHeader, bytes: &[u8]) -> Vec<Vec<u8>> {
    let cut = Cut::new(header.segments.unwrap(), header.checksum, bytes).unwrap();
    let segment = |index| {
        let mut segment = vec![0; cut.segment_len(index)];
        cut.write(bytes, index, &mut segment);
        segment.resize(super::super::encap::padded_len(segment.len(), 1420), 0);
        segment
    };
    (0..cut.count()).map(segment).collect()
}

fn give(gateway: &Gateway, header: VnetHeader, bytes: &[u8]) {
    gateway.tun.unfinished.borrow_mut().push_back((header, bytes.to_vec()));
}

fn process(gateway: &mut Gateway, post: &Post) -> bool {
    gateway.outbound.process(&gateway.tun, post, START).unwrap()
}

#[test]
fn a_full_super_packet_becomes_45_messages_in_order() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let post = Post::default();
    let bytes = tcp(2, 65_495);
    for round in 0..3 {
        give(&gateway, header(1460), &bytes);
        process(&mut gateway, &post);
        assert_eq!(post.sent.borrow().len(), 45 * (round + 1));
    }
    assert_eq!(*post.calls.borrow(), [45; 3], "each is sent at once");
    assert!(post.sent.borrow().iter().all(|sent| sent.2 == 1), "ECN goes outside");
    let expected = segments_of(header(1460), &bytes);
    assert_eq!(post.opened(1), [&expected[..]; 3].concat());
    let tx = gateway.peer(1).transfer.tx_bytes();
    assert_eq!(tx as usize, 3 * expected.iter().map(|segment| segment.len() + 32).sum::<usize>());
}

#[test]
fn many_tiny_segments_go_in_order_and_bounded_batches() {
    for (payload_len, mss) in [(20_000u16, 8u16), (65_495, 48), (64 * 100, 100), (65 * 100, 100)] {
        let (mut gateway, post) = (Gateway::new(), Post::default());
        gateway.give_keypair(1, Role::Initiator);
        let bytes = tcp(2, payload_len.into());
        give(&gateway, header(mss), &bytes);
        // What comes behind does not overtake.
        gateway.tun.to_read.borrow_mut().push_back(packet(US, PEER_1, 48));
        let mut turns = 0;
        while process(&mut gateway, &post) {
            turns += 1;
            assert!(post.sent.borrow().len() <= turns * BATCH_LEN, "a turn is bounded");
        }
        assert!(post.calls.borrow().iter().all(|count| *count <= BATCH_LEN));
        let mut expected = segments_of(header(mss), &bytes);
        expected.push(packet(US, PEER_1, 48));
        assert_eq!(post.opened(1), expected, "{payload_len} in {mss}");
    }
}

#[test]
fn packets_and_super_packets_share_batches() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let post = Post::default();
    let mut expected = Vec::new();
    for count in [1usize, 5, 64, 2, 30, 63, 1, 1, 90] {
        let bytes = tcp(2, count * 500 - 7);
        give(&gateway, header(500), &bytes);
        expected.extend(segments_of(header(500), &bytes));
        give(&gateway, VnetHeader::PLAIN, &packet(US, PEER_1, 80));
        expected.push(packet(US, PEER_1, 80));
    }
    while process(&mut gateway, &post) {}
    assert_eq!(post.opened(1), expected);
}

#[test]
fn datagrams_of_one_peer_stand_next_to_each_other() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    gateway.give_keypair(2, Role::Initiator);
    gateway.peer(2).endpoint.store(Some(Arc::new(endpoint("192.0.2.2:2000"))));
    let post = Post::default();
    for place in 0..20 {
        gateway.tun.to_read.borrow_mut().push_back(packet(US, [10, 0, 0, 2 + place % 2], 60));
    }
    process(&mut gateway, &post);
    let sent = post.sent.take();
    assert_eq!(sent.len(), 20);
    for (number, sent) in sent.chunks(10).enumerate() {
        let port = if number == 0 { 1000 } else { 2000 };
        assert!(sent.iter().all(|sent| sent.1.port() == port));
        let counters = sent.iter().map(|sent| u64::from(sent.0[8]));
        assert!(counters.eq(0..10), "each peer's in their order");
    }
}

#[test]
fn a_checksum_is_finished_before_a_packet_is_sealed() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let post = Post::default();
    let bytes = tcp(2, 40);
    give(&gateway, VnetHeader { checksum: Some(PLACE), segments: None }, &bytes);
    process(&mut gateway, &post);
    let opened = post.opened(1).remove(0);
    let sum = Checksum::pseudo(US.into(), PEER_1.into(), PROTOCOL_TCP, 60);
    assert_eq!(sum.bytes(&opened[20..80]).finish(), 0);
}

#[test]
fn what_cannot_be_done_is_counted_and_keeps_nothing_back() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let post = Post::default();
    let mut fragment = tcp(2, 3000);
    fragment[6] = 0x20;
    give(&gateway, header(1000), &fragment);
    let beyond = PartialChecksum { start: 20, offset: 39 };
    give(&gateway, VnetHeader { checksum: Some(beyond), segments: None }, &tcp(2, 20));
    give(&gateway, VnetHeader::PLAIN, &packet(US, PEER_1, 65_520));
    give(&gateway, header(u16::MAX), &tcp(2, 65_495));
    give(&gateway, header(1000), &tcp(2, 1500));
    process(&mut gateway, &post);
    assert_eq!(gateway.dropped(0, DropReason::BadOffload), 2);
    assert_eq!(gateway.dropped(0, DropReason::TooLarge), 2);
    assert_eq!(post.opened(1), segments_of(header(1000), &tcp(2, 1500)));
}

#[test]
fn a_super_packet_without_a_peer_is_answered_once_and_counted_whole() {
    let mut gateway = Gateway::new();
    let mut bytes = tcp(2, 3000);
    bytes[16..20].copy_from_slice(&[10, 77, 0, 1]);
    give(&gateway, header(1000), &bytes);
    process(&mut gateway, &Post::default());
    assert_eq!(gateway.tun.answers.take().len(), 1);
    assert_eq!(gateway.dropped(0, DropReason::NoPeer), 3);
}

#[test]
fn segments_wait_for_a_keypair_in_order() {
    let mut gateway = Gateway::new();
    let post = Post::default();
    let bytes = tcp(2, 65_495);
    give(&gateway, header(1460), &bytes);
    while process(&mut gateway, &post) {}
    assert!(post.sent.borrow().is_empty());
    gateway.give_keypair(1, Role::Initiator);
    while gateway.outbound.flush_staged(&post, START) {}
    assert_eq!(post.opened(1), segments_of(header(1460), &bytes));
}

#[test]
fn a_flush_leaves_a_super_packet_alone_that_is_under_way() {
    let mut gateway = Gateway::new();
    let post = Post::default();
    let staged: Vec<_> = (0..20).map(|n| packet(US, PEER_1, 1400 + n)).collect();
    gateway.send(&staged, START);
    gateway.give_keypair(2, Role::Initiator);
    let bytes = tcp(3, 65_495);
    give(&gateway, header(100), &bytes);
    assert!(process(&mut gateway, &post), "it is under way");
    gateway.give_keypair(1, Role::Initiator);
    let flushed = Post::default();
    while gateway.outbound.flush_staged(&flushed, START) {}
    assert_eq!(flushed.opened(1).len(), 20);
    while process(&mut gateway, &post) {}
    assert_eq!(post.opened(2), segments_of(header(100), &bytes));
}

#[test]
fn what_is_under_way_when_the_interface_goes_down_is_dropped_and_counted() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let post = Post::default();
    give(&gateway, header(100), &tcp(2, 50_000));
    process(&mut gateway, &post);
    let sent = post.sent.borrow().len();
    gateway.shared.up.store(false, Ordering::Relaxed);
    while process(&mut gateway, &post) {}
    assert_eq!(gateway.dropped(0, DropReason::InterfaceDown) as usize, 500 - sent);
}
