//! The same traffic with each back end of the AEAD: what goes out and what is let in is the same to the
//! byte.

use super::*;
use crate::aead::BatchAead;
use crate::aead::choice::back_ends;
use crate::datapath::BATCH_LEN;

const PEER_2: [u8; 4] = [10, 0, 0, 7];

fn gateway(aead: &'static dyn BatchAead) -> Gateway {
    let gateway = Gateway::with(aead);
    gateway.give_keypair(1, Role::Initiator);
    gateway.give_keypair(2, Role::Initiator);
    gateway
}

/// Packets between two addresses of all kinds of lengths: more than some batches.
fn packets(source: [u8; 4], destination: [u8; 4]) -> Vec<Vec<u8>> {
    (0..150).map(|i| packet(source, destination, 20 + i * 197 % 1_401)).collect()
}

/// What two peers are sent, their packets mixed.
fn sent_with(aead: &'static dyn BatchAead) -> Vec<Vec<u8>> {
    let mut gateway = gateway(aead);
    let pairs = packets(US, PEER_1).into_iter().zip(packets(US, PEER_2));
    let mixed: Vec<_> = pairs.flat_map(|(one, other)| [one, other]).collect();
    gateway.send(&mixed, START);
    gateway.sent()
}

#[test]
fn every_back_end_sends_the_same_datagrams() {
    let by_ring = sent_with(&AEAD);
    assert_eq!(by_ring.len(), 300);
    for aead in back_ends() {
        assert!(sent_with(aead) == by_ring, "{}", aead.name());
    }
}

/// What comes of datagrams of two peers, some of which were changed on their way: the packets, and how
/// many were dropped for their tags.
fn received_with(aead: &'static dyn BatchAead) -> (Vec<Vec<u8>>, u64) {
    let mut sender = gateway(&AEAD);
    let of_1 = datagrams_of(&mut sender, 1, &packets(PEER_1, US));
    let of_2 = datagrams_of(&mut sender, 2, &packets(PEER_2, US));
    let mut datagrams: Vec<_> = of_1.into_iter().zip(of_2).flat_map(|(a, b)| [a, b]).collect();
    for (place, datagram) in datagrams.iter_mut().enumerate().filter(|(place, _)| place % 7 == 3) {
        // Behind the header: in the packet, or in its tag.
        let at = 16 + place * 31 % (datagram.len() - 16);
        datagram[at] ^= 1 << (place % 8);
    }
    let mut gateway = gateway(aead);
    for batch in datagrams.chunks_mut(BATCH_LEN) {
        let (from, worker) = (endpoint("192.0.2.1:1000"), WorkerId(0));
        let arrivals = batch.iter_mut();
        let mut arrivals: Vec<_> = arrivals
            .map(|bytes| Arrival { bytes, from, path: Path::Socket, worker, tos: 0 })
            .collect();
        gateway.inbound[0].process(&mut arrivals, &gateway.tun, START);
    }
    (gateway.written(), gateway.dropped(0, DropReason::BadTag))
}

#[test]
fn every_back_end_lets_the_same_packets_in() {
    let by_ring = received_with(&AEAD);
    assert_eq!((by_ring.0.len(), by_ring.1), (257, 43));
    for aead in back_ends() {
        assert!(received_with(aead) == by_ring, "{}", aead.name());
    }
}
