//! How large packets may be: what a SYN says of it, and what their senders are told.

use std::sync::atomic::Ordering;

use wg_common::headers::Checksum;
use wg_common::outcome::DropReason;
use wg_common::protocol::TRANSPORT_OVERHEAD;

use super::{Gateway, PEER_1, START, US, datagrams_of, endpoint, packet};
use crate::noise::Role;

/// A SYN that offers segments of 1460 bytes.
fn syn(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut packet = packet(source, destination, 44);
    packet[9] = 6;
    packet[20..].fill(0);
    (packet[32], packet[33]) = (6 << 4, 2);
    packet[40..].copy_from_slice(&[2, 4, 0x05, 0xb4]);
    let sum = tcp_sum(&packet);
    packet[36..38].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Zero if the checksum is right.
fn tcp_sum(packet: &[u8]) -> u16 {
    let [source, destination]: [[u8; 4]; 2] =
        [packet[12..16].try_into().unwrap(), packet[16..20].try_into().unwrap()];
    let len = packet.len() as u32 - 20;
    Checksum::pseudo(source.into(), destination.into(), 6, len).bytes(&packet[20..]).finish()
}

fn mss(packet: &[u8]) -> u16 {
    u16::from_be_bytes([packet[42], packet[43]])
}

/// What the peer of a gateway with this MTU gets of a SYN, and what comes of one that the peer sends.
fn offers(mtu: usize) -> [Vec<u8>; 2] {
    let mut peer = Gateway::new();
    let mut gateway = Gateway::new();
    for side in [&peer, &gateway] {
        side.give_keypair(1, Role::Initiator);
        side.shared.mtu.store(9000, Ordering::Relaxed);
    }
    gateway.shared.mtu.store(mtu, Ordering::Relaxed);
    gateway.send(&[syn(US, PEER_1)], START);
    let outbound = gateway.sent().remove(0);
    // It takes what anybody offers.
    peer.shared.routing.store(all_to_peer_1());
    peer.receive(0, &outbound, START);
    let datagram = datagrams_of(&mut peer, 1, &[syn(PEER_1, US)]).remove(0);
    gateway.receive(0, &datagram, START);
    [peer.written().remove(0), gateway.written().remove(0)]
}

fn all_to_peer_1() -> std::sync::Arc<crate::routing::RoutingTable> {
    let mut all = crate::routing::AllowedIps::default();
    all.insert("0.0.0.0/0".parse().unwrap(), wg_common::id::PeerId(1));
    all.snapshot()
}

#[test]
fn a_syn_offers_what_fits_into_the_tunnel_in_both_directions() {
    for (mtu, offered) in [(1500, 1460), (1420, 1380), (1280, 1240)] {
        for packet in offers(mtu) {
            assert_eq!((mss(&packet), tcp_sum(&packet)), (offered, 0), "{mtu}");
        }
    }
}

#[test]
fn a_syn_offers_what_fits_into_the_peers_link_where_that_is_narrower() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    // Sealed by the gateway itself, while it knows nothing of the link: as it is.
    gateway.shared.mtu.store(9000, Ordering::Relaxed);
    let offer = datagrams_of(&mut gateway, 1, &[syn(PEER_1, US)]).remove(0);
    gateway.shared.mtu.store(1420, Ordering::Relaxed);
    gateway.peer(1).inner_mtu.set(Some(1400), false);
    gateway.receive(0, &offer, START);
    assert_eq!(mss(&gateway.written().remove(0)), 1300);
}

#[test]
fn a_syn_stays_as_it_is_where_that_is_wanted() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    gateway.shared.mss_clamp.store(false, Ordering::Relaxed);
    gateway.shared.mtu.store(1300, Ordering::Relaxed);
    gateway.shared.routing.store(all_to_peer_1());
    let offer = syn(US, PEER_1);
    gateway.send(std::slice::from_ref(&offer), START);
    let datagram = gateway.sent().remove(0);
    gateway.receive(0, &datagram, START);
    assert_eq!(gateway.written(), [offer]);
}

fn with_flags(mut packet: Vec<u8>, flags: u8) -> Vec<u8> {
    packet[6] = flags;
    packet
}

#[test]
fn who_sends_more_than_the_peers_link_carries_is_told_how_much_it_does() {
    const DONT_FRAGMENT: u8 = 0x40;
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    gateway.give_keypair(2, Role::Initiator);
    gateway.peer(1).inner_mtu.set(Some(1400), false);
    let other = [10, 0, 0, 9];
    let packets = [
        with_flags(packet(US, PEER_1, 1341), DONT_FRAGMENT),
        with_flags(packet(US, PEER_1, 1340), DONT_FRAGMENT),
        packet(US, PEER_1, 1420),
        with_flags(packet(US, other, 1420), DONT_FRAGMENT),
    ];
    gateway.send(&packets, START);
    assert_eq!(gateway.sent().len(), 3, "what fits, what may be fragmented, what goes elsewhere");
    assert_eq!(gateway.dropped(0, DropReason::TooLarge), 1);
    let answers = gateway.tun.answers.take();
    assert_eq!(answers.len(), 1);
    assert_eq!((answers[0][20], answers[0][21]), (3, 4));
    assert_eq!(answers[0][26..28], 1340_u16.to_be_bytes());
    assert_eq!((&answers[0][12..16], &answers[0][16..20]), (&PEER_1[..], &US[..]));
    assert_eq!(answers[0][28..], packets[0][..548]);
}

#[test]
fn drops_are_counted_also_where_nobody_is_told() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    gateway.peer(1).inner_mtu.set(Some(1400), false);
    // About an ICMP error nobody is told anything.
    let mut error = with_flags(packet(US, PEER_1, 1400), 0x40);
    (error[9], error[20]) = (1, 3);
    gateway.send(&[error], START);
    assert!(gateway.sent().is_empty() && gateway.tun.answers.take().is_empty());
    assert_eq!(gateway.dropped(0, DropReason::TooLarge), 1);
}

#[test]
fn padding_does_not_outgrow_the_peers_link() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    gateway.peer(1).inner_mtu.set(Some(1400), false);
    for (len, padded) in [(1340, 1340), (1330, 1340), (1320, 1328), (1341, 1341)] {
        gateway.send(&[packet(US, PEER_1, len)], START);
        assert_eq!(gateway.sent()[0].len(), padded + TRANSPORT_OVERHEAD, "{len}");
    }
}

#[test]
fn control_is_asked_about_a_peer_until_it_has_looked() {
    let mut gateway = Gateway::new();
    let asked = |gateway: &Gateway| gateway.shared.take_unknown_way().map(|peer| peer.id.0);
    gateway.give_keypair(1, Role::Initiator);
    assert_eq!(asked(&gateway), None);
    gateway.send(&vec![packet(US, PEER_1, 60); 3], START);
    gateway.send(&[packet(US, PEER_1, 60)], START);
    assert_eq!((asked(&gateway), asked(&gateway)), (Some(1), None), "once");
    let peer = gateway.peer(1);
    peer.inner_mtu.begin_look();
    peer.inner_mtu.set(Some(1400), false);
    gateway.send(&[packet(US, PEER_1, 60)], START);
    assert_eq!(asked(&gateway), None);

    let datagrams = datagrams_of(&mut gateway, 1, &vec![packet(PEER_1, US, 60); 3]);
    gateway.receive(0, &datagrams[0], START);
    assert_eq!(asked(&gateway), None, "it is where it was");
    gateway.receive_from(0, &datagrams[1], endpoint("192.0.2.77:1000"), START);
    assert_eq!((asked(&gateway), asked(&gateway)), (Some(1), None), "it has moved");
    assert!(peer.inner_mtu.is_unknown());
    // It moves while control looks: what that finds is of the former endpoint.
    peer.inner_mtu.begin_look();
    gateway.receive_from(0, &datagrams[2], endpoint("192.0.2.78:1000"), START);
    peer.inner_mtu.set(Some(1400), false);
    assert_eq!(asked(&gateway), Some(1));
}
