//! Workers' two halves against each other, without a kernel: what goes to the TUN device and to the
//! sockets is written down instead.

mod back_ends;
mod devices;
mod fan_out;
mod fan_out_sim;
mod link;
mod segments;
mod size;
mod troubles;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ipnet::IpNet;
use wg_common::endpoint::{Endpoint, LocalSource};
use wg_common::headers::Checksum;
use wg_common::id::{DeviceId, PeerId, ReceiverIndex, ShardId, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::outcome::DropReason;
use wg_common::protocol::{
    REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME, REKEY_ATTEMPT_TIME, STAGED_PACKETS_MAX,
};
use wg_common::time::{Now, Reading};

mod joining;
mod whitepaper;

use super::WorkQueue;
use super::handoff::{Mesh, Parcel, ParcelReceiver, Work};
use super::inbound::{Arrival, Inbound, PacketSink};
use super::outbound::{DatagramSink, Outbound, Outgoing, PacketSource, Unsent};
use super::shared::{Shared, SocketGroup};
use crate::aead::{BatchAead, RingAead};
use crate::counters::Path;
use crate::key::PublicKey;
use crate::noise::{Established, Role, TransportKeys};
use crate::routing::AllowedIps;
use crate::segments::{Run, VnetHeader};
use crate::session::{Continuity, HotPeer, Keypair};

const START: Now = Now::from_boot_ns(1_000_000_000);
static AEAD: RingAead = RingAead;

/// A TUN device whose far end is the test.
#[derive(Default)]
struct Tun {
    to_read: RefCell<VecDeque<Vec<u8>>>,
    /// Super-packets, and others on which something is left to do: read before those.
    unfinished: RefCell<VecDeque<(VnetHeader, Vec<u8>)>>,
    written: RefCell<Vec<Vec<u8>>>,
    answers: RefCell<Vec<Vec<u8>>>,
}

impl PacketSource for Tun {
    fn read(&self, buffer: &mut [u8]) -> io::Result<Option<(VnetHeader, usize)>> {
        let unfinished = self.unfinished.borrow_mut().pop_front();
        let plain = || Some((VnetHeader::PLAIN, self.to_read.borrow_mut().pop_front()?));
        let Some((header, packet)) = unfinished.or_else(plain) else { return Ok(None) };
        buffer[..packet.len()].copy_from_slice(&packet);
        Ok(Some((header, packet.len())))
    }

    fn answer(&self, packet: &[u8]) {
        self.answers.borrow_mut().push(packet.to_vec());
    }
}

impl PacketSink for Tun {
    fn write(&self, run: &Run<'_>) -> io::Result<()> {
        self.written.borrow_mut().extend(run.packets().map(<[u8]>::to_vec));
        Ok(())
    }
}

/// A socket that keeps what it is given.
#[derive(Default)]
struct Wire(RefCell<Vec<Vec<u8>>>);

impl DatagramSink for Wire {
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
        self.0.borrow_mut().extend(datagrams.iter().map(|datagram| datagram.bytes.to_vec()));
        Unsent::default()
    }
}

/// A gateway of two workers with two peers, each with a keypair; peer 1 owns 10.0.0.2/32, peer 2
/// 10.0.0.0/24.
struct Gateway {
    shared: Arc<Shared>,
    work: Arc<WorkQueue>,
    inbound: Vec<Inbound>,
    from: Vec<Vec<Option<ParcelReceiver>>>,
    outbound: Outbound,
    tun: Tun,
    wire: Wire,
}

const INDEXES: IndexPermutation = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);

fn index(slot: usize) -> ReceiverIndex {
    INDEXES.own_index(slot as u32, 7)
}

fn keypair(
    peer: &Arc<HotPeer>,
    slot: usize,
    keys: (u8, u8),
    role: Role,
    home: ShardId,
) -> Arc<Keypair> {
    let established = Established {
        keys: TransportKeys { send: [keys.0; 32], receive: [keys.1; 32] },
        local_index: index(slot),
        remote_index: index(slot),
        role,
    };
    Arc::new(Keypair::new(&established, Arc::downgrade(peer), home, START))
}

fn peer(id: u32) -> Arc<HotPeer> {
    let peer = HotPeer::new(PeerId(id), DeviceId(0), PublicKey::from_bytes([id as u8; 32]));
    peer.endpoint.store(Some(Arc::new(endpoint("192.0.2.1:1000"))));
    Arc::new(peer)
}

fn endpoint(remote: &str) -> Endpoint {
    Endpoint::configured(remote.parse().unwrap())
}

impl Gateway {
    fn new() -> Self {
        Self::with(&AEAD)
    }

    fn with(aead: &'static dyn BatchAead) -> Self {
        let sockets = SocketGroup { port: 51820, of_worker: Vec::new() };
        let (shared, work) =
            Shared::new(DeviceId(0), 2, Vec::new(), sockets, None, INDEXES).unwrap();
        let mut allowed_ips = AllowedIps::default();
        allowed_ips.insert("10.0.0.2/32".parse::<IpNet>().unwrap(), PeerId(1));
        allowed_ips.insert("10.0.0.0/24".parse::<IpNet>().unwrap(), PeerId(2));
        shared.routing.store(allowed_ips.snapshot());
        for id in 1..=2 {
            shared.peers.set(id as usize, peer(id));
        }
        for worker in 0..2 {
            shared.beat(WorkerId(worker), START);
        }
        let (mut inbound, mut from) = (Vec::new(), Vec::new());
        for (id, mesh) in Mesh::between(2, 16).into_iter().enumerate() {
            let id = WorkerId(id as u16);
            inbound.push(Inbound::new(id, Arc::clone(&shared), aead, mesh.to));
            from.push(mesh.from);
        }
        let outbound = Outbound::new(WorkerId(0), Arc::clone(&shared), aead);
        Self { shared, work, inbound, from, outbound, tun: Tun::default(), wire: Wire::default() }
    }

    fn peer(&self, id: u32) -> Arc<HotPeer> {
        self.shared.peers.get(id as usize).unwrap()
    }

    /// Gives a peer a keypair with the same key for both directions, at home at worker 0.
    fn give_keypair(&self, id: u32, role: Role) -> Arc<Keypair> {
        let peer = self.peer(id);
        let key = id as u8;
        let keypair = keypair(&peer, id as usize, (key, key), role, ShardId::new(0));
        self.shared.publish(&keypair);
        peer.keypairs.update(|keypairs| match role {
            Role::Initiator => keypairs.installed_by_initiator(Arc::clone(&keypair)),
            Role::Responder => keypairs.installed_by_responder(Arc::clone(&keypair)),
        });
        keypair
    }

    fn receive(&mut self, worker: usize, datagram: &[u8], now: Now) {
        self.receive_from(worker, datagram, endpoint("192.0.2.1:1000"), now);
    }

    fn receive_from(&mut self, worker: usize, datagram: &[u8], from: Endpoint, now: Now) {
        self.receive_with(worker, datagram, (from, 0), now);
    }

    /// With this outer TOS.
    fn receive_with(
        &mut self,
        worker: usize,
        datagram: &[u8],
        (from, tos): (Endpoint, u8),
        now: Now,
    ) {
        let mut bytes = datagram.to_vec();
        let (id, path) = (WorkerId(worker as u16), Path::Socket);
        let mut arrivals = [Arrival { bytes: &mut bytes, from, tos, path, worker: id }];
        self.inbound[worker].process(&mut arrivals, &self.tun, now);
    }

    /// Has worker `home` take what the other one sent it.
    fn deliver_parcels(&mut self, home: usize, now: Now) -> usize {
        let mut count = 0;
        while let Some(mut parcel) = self.from[home][1 - home].as_mut().unwrap().pop() {
            let Parcel { from, tos, path, origin, .. } = parcel;
            let bytes = parcel.datagram();
            let mut arrivals = [Arrival { bytes, from, tos, path, worker: origin }];
            self.inbound[home].process(&mut arrivals, &self.tun, now);
            self.from[home][1 - home].as_mut().unwrap().give_back(parcel.buffer);
            count += 1;
        }
        count
    }

    fn send(&mut self, packets: &[Vec<u8>], now: Now) {
        self.tun.to_read.borrow_mut().extend(packets.iter().cloned());
        while self.outbound.process(&self.tun, &self.wire, now).unwrap() {}
    }

    fn sent(&self) -> Vec<Vec<u8>> {
        self.wire.0.take()
    }

    fn written(&self) -> Vec<Vec<u8>> {
        self.tun.written.take()
    }

    fn dropped(&self, worker: usize, reason: DropReason) -> u64 {
        crate::counters::Totals::sum([&self.shared.workers[worker].counters]).dropped(reason)
    }
}

/// An IPv4 packet of `len` bytes.
fn packet(source: [u8; 4], destination: [u8; 4], len: usize) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..len).map(|i| i as u8).collect();
    packet[..12].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0]);
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    packet[12..16].copy_from_slice(&source);
    packet[16..20].copy_from_slice(&destination);
    packet
}

const US: [u8; 4] = [10, 1, 0, 1];
const PEER_1: [u8; 4] = [10, 0, 0, 2];

/// Datagrams that open under the keypair of `id`, as that peer would seal them: each direction has
/// the same key here, so our own outbound half makes them.
fn datagrams_of(gateway: &mut Gateway, id: u32, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let routing = gateway.shared.routing.load_full();
    let mut all_to_peer = AllowedIps::default();
    all_to_peer.insert("0.0.0.0/0".parse::<IpNet>().unwrap(), PeerId(id));
    gateway.shared.routing.store(all_to_peer.snapshot());
    gateway.send(packets, START);
    gateway.shared.routing.store(routing);
    gateway.sent()
}

/// A socket that keeps the TOS of what it is given.
#[derive(Default)]
struct Marks(RefCell<Vec<u8>>);

impl DatagramSink for Marks {
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
        self.0.borrow_mut().extend(datagrams.iter().map(|datagram| datagram.tos));
        Unsent::default()
    }
}

#[test]
fn the_dscp_goes_outside_where_that_is_wanted_and_none_comes_in() {
    let marked = |tos: u8| {
        let mut packet = packet(US, PEER_1, 60);
        packet[1] = tos;
        packet
    };
    let outer = |gateway: &mut Gateway| -> Vec<u8> {
        let marks = Marks::default();
        gateway.tun.to_read.borrow_mut().extend([0xb8, 0x2b, 0].map(marked));
        gateway.outbound.process(&gateway.tun, &marks, START).unwrap();
        marks.0.take()
    };
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    assert_eq!(outer(&mut gateway), [0, 2, 0]);
    gateway.shared.copy_dscp.store(true, Ordering::Relaxed);
    assert_eq!(outer(&mut gateway), [0xb8, 0x2a, 0]);
    let datagrams = datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 60)]);
    gateway.receive_with(0, &datagrams[0], (endpoint("192.0.2.1:1000"), 0xfc), START);
    assert_eq!(gateway.written()[0][1], 0, "the inner DSCP is its sender's");
}

#[test]
fn a_packet_goes_out_sealed_and_padded_and_comes_back_as_it_was() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    for len in [20, 21, 129, 1408, 1419, 1420] {
        let original = packet(PEER_1, US, len);
        let datagrams = datagrams_of(&mut gateway, 1, std::slice::from_ref(&original));
        let padded = len.next_multiple_of(16).min(1420);
        assert_eq!(datagrams[0].len(), 16 + padded + 16, "inner length {len}");
        gateway.receive(0, &datagrams[0], START);
        assert_eq!(gateway.written(), [original]);
    }
}

#[test]
fn a_mark_of_the_outer_header_reaches_the_packet_at_whichever_worker_it_came() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let from = endpoint("192.0.2.1:1000");
    for (inner_ecn, outer_tos, expected_ecn) in
        [(0, 0x03, 0), (1, 0x03, 3), (2, 0x03, 3), (2, 0x88, 2), (2, 0x8b, 3), (3, 0x00, 3)]
    {
        let with_ecn = |ecn: u8| {
            let mut packet = packet(PEER_1, US, 60);
            packet[1] = 0x28 | ecn;
            let checksum = Checksum::default().bytes(&packet[..20]).finish();
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
            packet
        };
        let packets = vec![with_ecn(inner_ecn); 2];
        let datagrams = datagrams_of(&mut gateway, 1, &packets);
        gateway.receive_with(0, &datagrams[0], (from, outer_tos), START);
        gateway.receive_with(1, &datagrams[1], (from, outer_tos), START);
        assert_eq!(gateway.deliver_parcels(0, START), 1);
        let written = gateway.written();
        assert_eq!(written, vec![with_ecn(expected_ecn); 2], "{inner_ecn} {outer_tos:#x}");
        assert_eq!(Checksum::default().bytes(&written[0][..20]).finish(), 0);
    }
}

#[test]
fn a_changed_bit_is_a_bad_tag_and_moves_nothing() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagram = datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 40)]).remove(0);
    let before = gateway.peer(1).endpoint.load_full();
    for byte in 16..datagram.len() {
        let mut bad = datagram.clone();
        bad[byte] ^= 1;
        gateway.receive_from(0, &bad, endpoint("203.0.113.9:9"), START);
    }
    let tried = (datagram.len() - 16) as u64;
    assert_eq!(gateway.dropped(0, DropReason::BadTag), tried);
    assert!(gateway.written().is_empty());
    assert_eq!(gateway.peer(1).endpoint.load_full(), before);
    assert_eq!(gateway.peer(1).transfer.rx_bytes(), 0);
    gateway.receive(0, &datagram, START);
    assert_eq!(gateway.written().len(), 1, "the window did not move either");
}

#[test]
fn a_capture_is_refused_wherever_it_is_replayed() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagram = datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 40)]).remove(0);
    gateway.receive(0, &datagram, START);
    assert_eq!(gateway.written().len(), 1);
    // The same worker, then another one: that has to ask the home, whose window knows it.
    gateway.receive(0, &datagram, START);
    gateway.receive(1, &datagram, START);
    assert_eq!(gateway.deliver_parcels(0, START), 1);
    assert!(gateway.written().is_empty());
    assert_eq!(gateway.dropped(0, DropReason::Replay), 2);
}

#[test]
fn a_packet_that_arrives_elsewhere_is_opened_at_home() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let original = packet(PEER_1, US, 100);
    let datagram = datagrams_of(&mut gateway, 1, std::slice::from_ref(&original)).remove(0);
    gateway.receive(1, &datagram, START);
    assert!(gateway.written().is_empty());
    assert_eq!(gateway.deliver_parcels(0, START), 1);
    assert_eq!(gateway.written(), [original]);
    // The next keypair is at home where packets arrive.
    assert_eq!(gateway.peer(1).last_worker.load(Ordering::Relaxed), 1);
}

#[test]
fn a_stuck_home_costs_its_packets_and_says_so() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagram = datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 100)]).remove(0);
    let later = START + Duration::from_millis(251);
    gateway.shared.beat(WorkerId(1), later);
    gateway.receive(1, &datagram, later);
    assert_eq!(gateway.dropped(1, DropReason::HomeStuck), 1);
    assert_eq!(gateway.deliver_parcels(0, later), 0);
    let home = gateway.shared.home_for(PeerId(1), WorkerId(0), later);
    assert_eq!(gateway.shared.worker_of(home), WorkerId(1), "new keypairs go where it moves");
}

#[test]
fn a_full_ring_drops_and_counts() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let packets: Vec<_> = (0..20).map(|_| packet(PEER_1, US, 100)).collect();
    for datagram in datagrams_of(&mut gateway, 1, &packets) {
        gateway.receive(1, &datagram, START);
    }
    assert_eq!(gateway.dropped(1, DropReason::QueueFull), 4);
    assert_eq!(gateway.deliver_parcels(0, START), 16);
}

#[test]
fn a_source_that_its_sender_does_not_own_is_dropped() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(2, Role::Initiator);
    // Peer 2 owns 10.0.0.0/24, but 10.0.0.2 in it belongs to peer 1.
    let packets =
        [packet(PEER_1, US, 40), packet([10, 0, 0, 3], US, 40), packet([9, 9, 9, 9], US, 40)];
    for datagram in datagrams_of(&mut gateway, 2, &packets) {
        gateway.receive(0, &datagram, START);
    }
    assert_eq!(gateway.written(), [packets[1].clone()]);
    assert_eq!(gateway.dropped(0, DropReason::SourceNotAllowed), 2);
}

#[test]
fn the_endpoint_follows_authenticated_packets() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagram = datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 40)]).remove(0);
    let local = LocalSource { addr: "198.51.100.7".parse().unwrap(), ifindex: 3 };
    let moved = Endpoint { remote: "203.0.113.9:9".parse().unwrap(), local: Some(local) };
    gateway.receive_from(0, &datagram, moved, START);
    assert_eq!(gateway.peer(1).endpoint.load_full().as_deref(), Some(&moved));
    // A replay from elsewhere does not move it.
    gateway.receive_from(0, &datagram, endpoint("203.0.113.66:6"), START);
    assert_eq!(gateway.peer(1).endpoint.load_full().as_deref(), Some(&moved));
}

#[test]
fn a_dead_keypair_opens_and_seals_nothing() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagram = datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 40)]).remove(0);
    let late = START + REJECT_AFTER_TIME;
    gateway.receive(0, &datagram, late);
    assert_eq!(gateway.dropped(0, DropReason::KeyExpired), 1);
    gateway.send(&[packet(US, PEER_1, 40)], late);
    assert!(gateway.sent().is_empty());
}

#[test]
fn a_keypair_that_was_replaced_opens_nothing_though_it_is_still_published() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagrams =
        datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 40), packet(PEER_1, US, 40)]);
    let peer = gateway.peer(1);
    let replace = |slot| {
        let new = keypair(&peer, slot, (9, 9), Role::Initiator, ShardId::new(0));
        peer.keypairs.update(|keypairs| keypairs.installed_by_initiator(Arc::clone(&new)));
    };
    replace(11);
    gateway.receive(0, &datagrams[0], START);
    assert_eq!(gateway.written().len(), 1, "the previous one opens");
    replace(12);
    gateway.receive(0, &datagrams[1], START);
    assert!(gateway.written().is_empty());
    assert_eq!(gateway.dropped(0, DropReason::UnknownIndex), 1);
}

#[test]
fn an_index_of_another_epoch_of_its_slot_is_unknown() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagram = datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 40)]).remove(0);
    for epoch in [6, 8] {
        let mut other = datagram.clone();
        other[4..8].copy_from_slice(&INDEXES.own_index(1, epoch).to_wire());
        gateway.receive(0, &other, START);
    }
    assert_eq!(gateway.dropped(0, DropReason::UnknownIndex), 2);
    gateway.receive(0, &datagram, START);
    assert_eq!(gateway.written().len(), 1);
}

#[test]
fn a_responder_sends_only_after_it_received() {
    let mut gateway = Gateway::new();
    let keypair = gateway.give_keypair(1, Role::Responder);
    gateway.send(&[packet(US, PEER_1, 40)], START);
    assert!(gateway.sent().is_empty(), "staged");
    // The peer confirms the keypair; then what was staged goes out.
    let keepalive = {
        let mut message = [0; 32];
        let header = super::encap::transport_header(keypair.local_index(), 0);
        message[..16].copy_from_slice(&header);
        let key = crate::aead::AeadKey::new(&[1; 32]);
        let mut jobs = [crate::aead::Job::new(&key, 0, &mut message[16..])];
        AEAD.seal(&mut jobs);
        message
    };
    gateway.receive(0, &keepalive, START);
    assert!(gateway.written().is_empty(), "a keepalive carries no packet");
    while gateway.outbound.flush_staged(&gateway.wire, START) {}
    assert_eq!(gateway.sent().len(), 1);
}

#[test]
fn staged_packets_go_first_and_in_order() {
    let mut gateway = Gateway::new();
    let numbered = |n: u8| {
        let mut packet = packet(US, PEER_1, 60);
        packet[40] = n;
        packet
    };
    gateway.send(&[numbered(1), numbered(2)], START);
    gateway.send(&[numbered(3)], START);
    assert!(matches!(gateway.work.take(), Some(Work::Initiate(_, PeerId(1)))));
    assert!(gateway.work.take().is_none(), "one handshake is asked for, not three");
    assert_eq!(gateway.peer(1).staged.load(Ordering::Relaxed), 3);
    gateway.give_keypair(1, Role::Initiator);
    // A packet that comes before the flush does not overtake those that wait.
    gateway.send(&[numbered(4)], START);
    assert!(gateway.sent().is_empty());
    while gateway.outbound.flush_staged(&gateway.wire, START) {}
    gateway.send(&[numbered(5)], START);
    let mut opened = Vec::new();
    for datagram in gateway.sent() {
        // Each direction has the same key here, so the inbound half reads what we sent.
        let mut all = AllowedIps::default();
        all.insert("0.0.0.0/0".parse::<IpNet>().unwrap(), PeerId(1));
        gateway.shared.routing.store(all.snapshot());
        gateway.receive(0, &datagram, START);
        opened.extend(gateway.written());
    }
    let order: Vec<u8> = opened.iter().map(|packet| packet[40]).collect();
    assert_eq!(order, [1, 2, 3, 4, 5]);
    assert_eq!(gateway.peer(1).staged.load(Ordering::Relaxed), 0);
}

#[test]
fn more_staged_packets_than_a_batch_go_in_order() {
    let mut gateway = Gateway::new();
    let packets: Vec<_> = (0..100)
        .map(|n| {
            let mut packet = packet(US, PEER_1, 60);
            packet[40] = n;
            packet
        })
        .collect();
    gateway.send(&packets, START);
    gateway.give_keypair(1, Role::Initiator);
    let flushes = (0..10).take_while(|_| gateway.outbound.flush_staged(&gateway.wire, START));
    assert!(flushes.count() < 10, "it comes to an end");
    let mut all = AllowedIps::default();
    all.insert("0.0.0.0/0".parse::<IpNet>().unwrap(), PeerId(1));
    gateway.shared.routing.store(all.snapshot());
    for datagram in gateway.sent() {
        gateway.receive(0, &datagram, START);
    }
    assert_eq!(gateway.written(), packets);
}

#[test]
fn staging_is_bounded_and_the_oldest_makes_room() {
    let mut gateway = Gateway::new();
    let packets: Vec<_> = (0..STAGED_PACKETS_MAX + 3).map(|_| packet(US, PEER_1, 60)).collect();
    gateway.send(&packets, START);
    assert_eq!(gateway.dropped(0, DropReason::StagedFull), 3);
    assert_eq!(gateway.peer(1).staged.load(Ordering::Relaxed) as usize, STAGED_PACKETS_MAX);
}

#[test]
fn staged_packets_are_dropped_when_the_handshake_is_given_up_and_not_before() {
    let mut gateway = Gateway::new();
    gateway.send(&[packet(US, PEER_1, 60), packet(US, PEER_1, 60)], START);
    // The attempt was renewed: it lasts for longer than the first packet would have waited.
    let late = START + (REKEY_ATTEMPT_TIME - Duration::from_secs(1));
    gateway.send(&[packet(US, PEER_1, 60)], late);
    let later = START + REKEY_ATTEMPT_TIME + Duration::from_secs(20);
    assert!(!gateway.outbound.flush_staged(&gateway.wire, later));
    assert_eq!(gateway.peer(1).staged.load(Ordering::Relaxed), 3);
    gateway.peer(1).give_up_count.fetch_add(1, Ordering::Relaxed);
    // What comes after waits for the next one.
    gateway.send(&[packet(US, PEER_1, 60)], later);
    assert_eq!(gateway.dropped(0, DropReason::HandshakeFailed), 3);
    assert_eq!(gateway.peer(1).staged.load(Ordering::Relaxed), 1);
    gateway.peer(1).give_up_count.fetch_add(1, Ordering::Relaxed);
    assert!(!gateway.outbound.flush_staged(&gateway.wire, later));
    assert_eq!(gateway.dropped(0, DropReason::HandshakeFailed), 4);
    assert_eq!(gateway.peer(1).staged.load(Ordering::Relaxed), 0);
}

#[test]
fn staged_packets_that_nobody_gives_up_do_not_stay_for_ever() {
    let mut gateway = Gateway::new();
    gateway.send(&[packet(US, PEER_1, 60)], START);
    let late = START + REKEY_ATTEMPT_TIME + Duration::from_secs(16);
    assert!(!gateway.outbound.flush_staged(&gateway.wire, late));
    assert_eq!(gateway.dropped(0, DropReason::HandshakeFailed), 1);
    assert_eq!(gateway.peer(1).staged.load(Ordering::Relaxed), 0);
}

#[test]
fn counters_end_at_reject_after_messages() {
    let mut gateway = Gateway::new();
    let keypair = gateway.give_keypair(1, Role::Initiator);
    let seal = |counter: u64| {
        let mut message = vec![0; 32];
        let header = super::encap::transport_header(keypair.local_index(), counter);
        message[..16].copy_from_slice(&header);
        let key = crate::aead::AeadKey::new(&[1; 32]);
        let mut jobs = [crate::aead::Job::new(&key, counter, &mut message[16..])];
        AEAD.seal(&mut jobs);
        message
    };
    gateway.receive(0, &seal(REJECT_AFTER_MESSAGES), START);
    gateway.receive(0, &seal(u64::MAX), START);
    assert_eq!(gateway.dropped(0, DropReason::KeyExpired), 2);
    gateway.receive(0, &seal(REJECT_AFTER_MESSAGES - 1), START);
    assert_eq!(gateway.peer(1).transfer.rx_bytes(), 32);
    assert_eq!(gateway.dropped(0, DropReason::KeyExpired), 2);
}

#[test]
fn the_first_packet_tells_control_that_the_keypair_is_confirmed() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagrams =
        datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 40), packet(PEER_1, US, 40)]);
    gateway.peer(1).keypairs.update(|keypairs| {
        let next = keypairs.current.clone().unwrap();
        keypairs.cleared().installed_by_responder(next)
    });
    gateway.receive(0, &datagrams[0], START);
    assert!(matches!(gateway.work.take(), Some(Work::Confirmed(PeerId(1)))));
    gateway.receive(0, &datagrams[1], START);
    assert!(gateway.work.take().is_none(), "once");
}

/// What a worker reads at `now` if its host has slept for `slept` in all, and its real time was set
/// forward by `set`.
fn reading(now: Now, slept: Duration, set: Duration) -> Reading {
    let [slept, set] = [slept, set].map(|time| time.as_nanos() as u64);
    let real_ns = 1_700_000_000_000_000_000 + now.boot_ns() + set;
    Reading { before: now, monotonic_ns: now.boot_ns() - slept, real_ns, after: now }
}

fn after_a_break(slept: Duration, set: Duration) {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagrams =
        datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 40), packet(PEER_1, US, 40)]);
    let mut continuity = Continuity::default();
    let zero = Duration::ZERO;
    let now = gateway.shared.now_of(&mut continuity, &reading(START, zero, zero));
    gateway.receive(0, &datagrams[0], now);
    gateway.send(&[packet(US, PEER_1, 40)], now);
    assert_eq!((gateway.written().len(), gateway.sent().len()), (1, 1));
    // The next turn of the same worker, before control has looked at anything.
    let later = START + slept + Duration::from_millis(1);
    let now = gateway.shared.now_of(&mut continuity, &reading(later, slept, set));
    gateway.receive(0, &datagrams[1], now);
    gateway.send(&[packet(US, PEER_1, 40)], now);
    assert_eq!((gateway.written().len(), gateway.sent().len()), (0, 0));
    assert_eq!(gateway.dropped(0, DropReason::KeyExpired), 1);
    assert!(matches!(gateway.work.take(), Some(Work::Initiate(_, PeerId(1)))));
    assert_eq!(gateway.peer(1).staged.load(Ordering::Relaxed), 1);
}

#[test]
fn after_a_sleep_the_first_turn_neither_seals_nor_opens_with_what_was_before() {
    after_a_break(Duration::from_secs(5), Duration::ZERO);
}

#[test]
fn after_a_clone_whose_clock_was_set_nothing_of_before_is_used() {
    after_a_break(Duration::ZERO, Duration::from_secs(5));
}

#[test]
fn a_clock_that_leaps_back_to_where_it_was_has_leapt_anew() {
    let gateway = Gateway::new();
    let mut clocks = Continuity::default();
    let ended = |clocks: &mut Continuity, second: u64, set_ms: u64| {
        let (now, set) = (START + Duration::from_secs(second), Duration::from_millis(set_ms));
        gateway.shared.now_of(clocks, &reading(now, Duration::ZERO, set));
        gateway.shared.keys_not_before() == now
    };
    assert!(!ended(&mut clocks, 1, 0));
    assert!(ended(&mut clocks, 2, 5000));
    // Steps that are too small to be a leap.
    assert!(!ended(&mut clocks, 3, 4100) && !ended(&mut clocks, 4, 3200));
    assert!(ended(&mut clocks, 5, 5000));
}

#[test]
fn a_quiesced_device_drops_and_counts_everything() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagram = datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 40)]).remove(0);
    gateway.send(&[packet(US, [10, 0, 0, 9], 40)], START);
    assert_eq!(gateway.peer(2).staged.load(Ordering::Relaxed), 1);
    while gateway.work.take().is_some() {}

    gateway.shared.set_quiesced_until(START + Duration::from_secs(9));
    let mut initiation = vec![0; 148];
    initiation[0] = 1;
    gateway.receive(0, &datagram, START);
    gateway.receive(0, &initiation, START);
    gateway.send(&[packet(US, PEER_1, 40), packet(US, PEER_1, 40)], START);
    assert!(!gateway.outbound.flush_staged(&gateway.wire, START));
    assert_eq!(gateway.dropped(0, DropReason::Quiesced), 1 + 1 + 2 + 1);
    assert_eq!(gateway.peer(2).staged.load(Ordering::Relaxed), 0);
    assert!(gateway.written().is_empty() && gateway.sent().is_empty());
    assert!(gateway.work.take().is_none(), "and control has nothing to do");
    // Garbage is still what it is.
    gateway.receive(0, &[4, 0, 0], START);
    assert_eq!(gateway.dropped(0, DropReason::BadLength), 1);

    let over = START + Duration::from_secs(9);
    gateway.receive(0, &datagram, over);
    assert_eq!(gateway.written().len(), 1);
}

#[test]
fn packets_for_nobody_are_counted_by_why() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    gateway.peer(1).endpoint.store(None);
    gateway.send(
        &[packet(US, [172, 16, 0, 1], 40), packet(US, PEER_1, 40), vec![0x75; 40], vec![0x45; 3]],
        START,
    );
    assert!(gateway.sent().is_empty());
    assert_eq!(gateway.dropped(0, DropReason::NoPeer), 1);
    assert_eq!(gateway.dropped(0, DropReason::NoEndpoint), 1);
    assert_eq!(gateway.dropped(0, DropReason::BadInnerVersion), 1);
    assert_eq!(gateway.dropped(0, DropReason::BadInnerLength), 1);
}

#[test]
fn handshake_messages_go_to_the_pool_and_garbage_nowhere() {
    let mut gateway = Gateway::new();
    let mut initiation = vec![0; 148];
    initiation[0] = 1;
    gateway.receive(1, &initiation, START);
    let Some(Work::Datagram(datagram)) = gateway.work.take() else { panic!("nothing came") };
    assert_eq!(datagram.message(), initiation);
    assert_eq!(datagram.worker, WorkerId(1));
    for (garbage, reason) in [
        (vec![1; 148], DropReason::BadReserved),
        (vec![9; 64], DropReason::BadType),
        (vec![4, 0, 0], DropReason::BadLength),
        (Vec::new(), DropReason::BadLength),
    ] {
        let before = gateway.dropped(1, reason);
        gateway.receive(1, &garbage, START);
        assert_eq!(gateway.dropped(1, reason), before + 1, "{garbage:?}");
    }
    let mut unknown = vec![0; 32];
    unknown[0] = 4;
    gateway.receive(1, &unknown, START);
    assert_eq!(gateway.dropped(1, DropReason::UnknownIndex), 1);
    assert!(gateway.work.take().is_none());
}

#[test]
fn random_bytes_harm_nothing() {
    use proptest::prelude::*;
    let gateway = RefCell::new(Gateway::new());
    gateway.borrow().give_keypair(1, Role::Initiator);
    let head = prop_oneof![
        Just(Vec::new()),
        Just(vec![4, 0, 0, 0]),
        Just([vec![4, 0, 0, 0], index(1).to_wire().to_vec()].concat()),
    ];
    let datagram = (head, proptest::collection::vec(any::<u8>(), 0..200));
    proptest!(|((head, tail) in datagram)| {
        let bytes = [head, tail].concat();
        let mut gateway = gateway.borrow_mut();
        gateway.receive(0, &bytes, START);
        prop_assert!(gateway.written().is_empty());
        gateway.send(&[bytes], START);
    });
}

#[test]
fn a_keypair_that_was_handed_over_neither_opens_nor_seals() {
    let mut gateway = Gateway::new();
    let keypair = gateway.give_keypair(1, Role::Initiator);
    let datagrams =
        datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 100), packet(PEER_1, US, 101)]);
    gateway.receive(0, &datagrams[0], START);
    assert_eq!(gateway.written().len(), 1);
    let frozen = keypair.freeze().unwrap();
    assert!(frozen.is_settled(), "no batch is under way");
    gateway.receive(0, &datagrams[1], START);
    assert!(gateway.written().is_empty());
    assert_eq!(gateway.dropped(0, DropReason::HandedOver), 1);
    gateway.send(&[packet(US, PEER_1, 100)], START);
    assert!(gateway.sent().is_empty(), "staged");
}

#[test]
fn a_turn_has_passed_when_every_worker_began_a_new_one() {
    let gateway = Gateway::new();
    let (tick, shared) = (Duration::from_nanos(1), &gateway.shared);
    assert!(!shared.crew.all_turned_since(START), "a turn that began then may have begun before");
    shared.beat(WorkerId(0), START + tick);
    assert!(!shared.crew.all_turned_since(START), "the other worker is at its old turn yet");
    shared.beat(WorkerId(1), START + tick);
    assert!(shared.crew.all_turned_since(START) && !shared.crew.all_turned_since(START + tick));
}
