//! What workers note for people, beside what they count.

use super::*;

/// A wire that is cut.
struct Cut;

impl DatagramSink for Cut {
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
        Unsent { failed: datagrams.len(), ..Unsent::default() }
    }
}

#[test]
fn a_source_that_is_refused_is_noted_with_its_sender() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(2, Role::Initiator);
    let packets =
        [packet(PEER_1, US, 40), packet([10, 0, 0, 3], US, 40), packet([9, 9, 9, 9], US, 40)];
    for datagram in datagrams_of(&mut gateway, 2, &packets) {
        gateway.receive(0, &datagram, START);
    }
    let (spell, source) = gateway.peer(2).notes().unwrap().refused.get(START).unwrap();
    assert_eq!((spell.count(), source), (2, IpAddr::from([9, 9, 9, 9])));
    assert!(gateway.peer(2).in_trouble.load(Ordering::Relaxed));
    assert!(
        gateway.peer(1).notes().is_none() && !gateway.peer(1).in_trouble.load(Ordering::Relaxed)
    );
}

#[test]
fn what_cannot_be_opened_is_noted_with_nobody() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagram = datagrams_of(&mut gateway, 1, &[packet([9, 9, 9, 9], US, 40)]).remove(0);
    for byte in 0..datagram.len() {
        let mut bad = datagram.clone();
        bad[byte] ^= 1;
        gateway.receive(0, &bad, START);
    }
    let peer = gateway.peer(1);
    assert!(peer.notes().is_none() && !peer.in_trouble.load(Ordering::Relaxed));
    gateway.receive(0, &datagram, START);
    assert!(peer.notes().unwrap().refused.get(START).is_some());
    // A replay is not authentic either.
    gateway.receive(0, &datagram, START);
    assert_eq!(peer.notes().unwrap().refused.get(START).unwrap().0.count(), 1);
}

#[test]
fn packets_for_a_peer_that_is_nowhere_are_noted() {
    let mut gateway = Gateway::new();
    gateway.peer(1).endpoint.store(None);
    gateway.send(&[packet(US, PEER_1, 40), packet(US, PEER_1, 40)], START);
    let notes = gateway.peer(1).notes().unwrap();
    assert_eq!(notes.no_endpoint.get(START).unwrap().0.count(), 2);
    assert!(gateway.peer(2).notes().is_none());
}

#[test]
fn packets_for_nobody_are_noted_but_not_what_systems_send_of_their_own_accord() {
    let mut gateway = Gateway::new();
    for to in [[224, 0, 0, 251], [255, 255, 255, 255], [169, 254, 1, 1]] {
        gateway.send(&[packet(US, to, 40)], START);
    }
    assert_eq!(gateway.shared.no_peer.get(START), None);
    gateway.send(&[packet(US, [9, 9, 9, 9], 40)], START);
    let (spell, to) = gateway.shared.no_peer.get(START).unwrap();
    assert_eq!((spell.count(), to), (1, IpAddr::from([9, 9, 9, 9])));
}

#[test]
fn datagrams_that_the_kernel_does_not_take_are_noted() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    gateway.tun.to_read.borrow_mut().push_back(packet(US, PEER_1, 40));
    gateway.outbound.process(&gateway.tun, &Cut, START).unwrap();
    let (spell, to) = gateway.peer(1).notes().unwrap().unsent.get(START).unwrap();
    assert_eq!((spell.count(), to), (1, "192.0.2.1:1000".parse().unwrap()));
}
