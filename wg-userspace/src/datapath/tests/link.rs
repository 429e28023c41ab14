//! What the halves of a worker do with packets that cannot go, must not go, or have no interface.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use wg_common::headers::inner_packet;
use wg_common::outcome::DropReason;

use super::{Gateway, PEER_1, START, US, Work, datagrams_of, endpoint, packet};
use crate::noise::Role;

const NOBODY: [u8; 4] = [172, 16, 0, 1];

#[test]
fn senders_are_told_that_nobody_is_there_or_nobody_knows_where() {
    let mut gateway = Gateway::new();
    gateway.peer(1).endpoint.store(None);
    let packets = [packet(US, NOBODY, 60), packet(US, PEER_1, 60)];
    gateway.send(&packets, START);
    assert!(gateway.sent().is_empty());
    let answers = gateway.tun.answers.take();
    assert_eq!(answers.len(), 2);
    for (answer, about) in answers.iter().zip(&packets) {
        let it = inner_packet(answer).unwrap();
        assert_eq!((it.dst.to_string(), answer[20], answer[21]), ("10.1.0.1".to_owned(), 3, 1));
        assert_eq!(&answer[28..], about);
    }
    assert_eq!(gateway.dropped(0, DropReason::NoPeer), 1);
    assert_eq!(gateway.dropped(0, DropReason::NoEndpoint), 1);
}

#[test]
fn other_drops_are_not_answered() {
    let mut gateway = Gateway::new();
    gateway.send(&[vec![0x75; 40], packet(US, PEER_1, 60), packet(US, [224, 0, 0, 1], 60)], START);
    assert!(gateway.tun.answers.take().is_empty());
    gateway.shared.up.store(false, Ordering::Relaxed);
    gateway.send(&[packet(US, NOBODY, 60)], START);
    assert!(gateway.tun.answers.take().is_empty());
}

#[test]
fn answers_are_bounded_and_every_packet_is_counted() {
    let mut gateway = Gateway::new();
    let packets = vec![packet(US, NOBODY, 60); 500];
    gateway.send(&packets, START);
    assert_eq!(gateway.tun.answers.take().len(), 50);
    assert_eq!(gateway.dropped(0, DropReason::NoPeer), 500);
}

#[test]
fn nothing_goes_in_or_out_while_the_interface_is_down() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagram = datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 40)]).remove(0);
    let mut initiation = vec![0; 148];
    initiation[0] = 1;
    gateway.shared.up.store(false, Ordering::Relaxed);
    gateway.receive(0, &datagram, START);
    gateway.receive(0, &initiation, START);
    gateway.send(&[packet(US, PEER_1, 40)], START);
    assert!(gateway.written().is_empty() && gateway.sent().is_empty());
    assert!(gateway.work.take().is_none());
    assert_eq!(gateway.dropped(0, DropReason::InterfaceDown), 3);
    assert_eq!(gateway.peer(1).transfer.rx_bytes(), 0);
    gateway.shared.up.store(true, Ordering::Relaxed);
    gateway.receive(0, &datagram, START);
    assert_eq!(gateway.written().len(), 1, "its window did not move either");
}

#[test]
fn staged_packets_are_dropped_when_the_interface_goes_down() {
    let mut gateway = Gateway::new();
    gateway.send(&[packet(US, PEER_1, 40), packet(US, PEER_1, 40)], START);
    assert!(matches!(gateway.work.take(), Some(Work::Initiate(..))));
    gateway.shared.up.store(false, Ordering::Relaxed);
    assert!(!gateway.outbound.flush_staged(&gateway.wire, START));
    assert_eq!(gateway.dropped(0, DropReason::InterfaceDown), 2);
    assert_eq!(gateway.peer(1).staged.load(Ordering::Relaxed), 0);
    gateway.shared.up.store(true, Ordering::Relaxed);
    gateway.give_keypair(1, Role::Initiator);
    assert!(!gateway.outbound.flush_staged(&gateway.wire, START));
    assert!(gateway.sent().is_empty());
}

/// An inner UDP packet between these ports.
fn udp(source: [u8; 4], ports: (u16, u16), destination: [u8; 4], id: u16, word: u16) -> Vec<u8> {
    let mut packet = packet(source, destination, 60);
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    packet[6..8].copy_from_slice(&word.to_be_bytes());
    packet[20..22].copy_from_slice(&ports.0.to_be_bytes());
    packet[22..24].copy_from_slice(&ports.1.to_be_bytes());
    packet
}

#[test]
fn our_own_datagrams_are_not_sent_once_more() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    gateway.peer(1).endpoint.store(Some(endpoint("10.0.0.2:1000").into()));
    gateway
        .shared
        .host_addresses
        .store([US.into()].into_iter().collect::<hashbrown::HashSet<_>>().into());
    let other = [10, 1, 0, 9];
    let ours = (51820, 1000);
    let cases = [
        ("ours", udp(US, ours, PEER_1, 1, 0), false),
        ("a forwarded host's, with the same ports", udp(other, ours, PEER_1, 1, 0), true),
        ("from another port", udp(US, (51821, 1000), PEER_1, 1, 0), true),
        ("to another port", udp(US, (51820, 1001), PEER_1, 1, 0), true),
        ("to another host of the peer's", udp(US, ours, [10, 0, 0, 3], 1, 0), true),
        ("ours, its first part", udp(US, ours, PEER_1, 7, 0x2000), false),
        ("ours, a later part", udp(US, (0, 0), PEER_1, 7, 0x2005), false),
        ("ours, the last part", udp(US, (0, 0), PEER_1, 7, 0x000a), false),
        ("a later part of another", udp(US, (0, 0), PEER_1, 8, 0x0005), true),
        ("a later part of another host's", udp(other, (0, 0), PEER_1, 7, 0x0005), true),
    ];
    gateway.give_keypair(2, Role::Initiator);
    for (name, packet, goes) in cases {
        let before = gateway.dropped(0, DropReason::RoutingLoop);
        gateway.send(&[packet], START);
        assert_eq!(gateway.sent().len() == 1, goes, "{name}");
        assert_eq!(
            gateway.dropped(0, DropReason::RoutingLoop) - before,
            u64::from(!goes),
            "{name}"
        );
    }
    assert!(gateway.tun.answers.take().is_empty());
}

#[test]
fn a_loop_of_ipv6_datagrams_is_noticed_as_well() {
    use ipnet::IpNet;
    use wg_common::id::PeerId;
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    gateway.peer(1).endpoint.store(Some(endpoint("[fd00::2]:1000").into()));
    let mut allowed_ips = crate::routing::AllowedIps::default();
    allowed_ips.insert("::/0".parse::<IpNet>().unwrap(), PeerId(1));
    gateway.shared.routing.store(allowed_ips.snapshot());
    let addresses: hashbrown::HashSet<_> = ["fd00::1".parse().unwrap()].into_iter().collect();
    gateway.shared.host_addresses.store(addresses.into());
    let packet = |extension: &[u8], from: &str| {
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        packet[6] = if extension.is_empty() { 17 } else { 44 };
        packet[8..24].copy_from_slice(&from.parse::<std::net::Ipv6Addr>().unwrap().octets());
        packet[24..40].copy_from_slice(&"fd00::2".parse::<std::net::Ipv6Addr>().unwrap().octets());
        packet.extend_from_slice(extension);
        packet.extend([0xca, 0x6c, 0x03, 0xe8, 0, 8, 0, 0]);
        packet[5] = (packet.len() - 40) as u8;
        packet
    };
    let first = [17, 0, 0, 1, 0, 0, 0, 9];
    let later = [17, 0, 0, 9, 0, 0, 0, 9];
    for (packet, goes) in [
        (packet(&[], "fd00::1"), false),
        (packet(&[], "fd00::3"), true),
        (packet(&later, "fd00::1"), true),
        (packet(&first, "fd00::1"), false),
        (packet(&later, "fd00::1"), false),
    ] {
        gateway.send(&[packet], START);
        assert_eq!(gateway.sent().len() == 1, goes);
    }
}

#[test]
fn every_datagram_that_comes_leaves_exactly_one_trace() {
    // A batch of many kinds, each counted once, whether the interface is up or not.
    for up in [true, false] {
        let mut gateway = Gateway::new();
        gateway.shared.up.store(up, Ordering::Relaxed);
        let lens: BTreeSet<usize> = (0..200).chain([1452, 9000, 65_507]).collect();
        for &len in &lens {
            gateway.receive(0, &vec![4; len], START);
        }
        let counted: u64 = DropReason::ALL.iter().map(|&reason| gateway.dropped(0, reason)).sum();
        assert_eq!(counted, lens.len() as u64);
    }
}
