//! Rules of the whitepaper that no other test is named after.

use super::*;
use crate::aead::{AeadKey, BatchAead, Job};

/// The content of a message sealed with the key of peer 1.
fn opened(datagram: &[u8]) -> Vec<u8> {
    let counter = super::super::encap::transport_counter(datagram).unwrap();
    let mut buffer = datagram[16..].to_vec();
    let key = AeadKey::new(&[1; 32]);
    let mut jobs = [Job::new(&key, counter.0, &mut buffer)];
    AEAD.open(&mut jobs);
    assert!(jobs[0].ok);
    buffer.truncate(buffer.len() - 16);
    buffer
}

/// §5.4.6: padding is of zeros, and never what stood in the buffer before.
#[test]
fn padding_shows_nothing_of_the_packet_before() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    gateway.send(&[packet(US, PEER_1, 400)], START);
    gateway.send(&[packet(US, PEER_1, 129), packet(US, PEER_1, 1411)], START);
    let sent = gateway.sent();
    let lens: Vec<_> = sent.iter().map(|datagram| opened(datagram).len()).collect();
    assert_eq!(lens, [400, 144, 1420]);
    assert_eq!(opened(&sent[1])[129..], [0; 15]);
    assert_eq!(opened(&sent[2])[1411..], [0; 9]);
}

/// §5.4.6: counters begin at 0 and grow by one, whatever is sealed.
#[test]
fn counters_on_the_wire_begin_at_zero_and_leave_none_out() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    for len in [20, 1420, 60] {
        gateway.send(&[packet(US, PEER_1, len), packet(US, PEER_1, len)], START);
    }
    let counter = |datagram: &Vec<u8>| super::super::encap::transport_counter(datagram).unwrap().0;
    assert!(gateway.sent().iter().map(counter).eq(0..6));
}

/// As the kernel counts: whole messages, without outer headers.
#[test]
fn transfer_counts_whole_messages_with_padding_and_keepalives() {
    let mut gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    let datagrams = datagrams_of(&mut gateway, 1, &[packet(PEER_1, US, 84)]);
    assert_eq!(gateway.peer(1).transfer.tx_bytes(), 128);
    gateway.receive(0, &datagrams[0], START);
    assert_eq!(gateway.peer(1).transfer.rx_bytes(), 128);
    gateway.receive(0, &datagrams[0], START);
    assert_eq!(gateway.peer(1).transfer.rx_bytes(), 128, "a replay is not the peer's");
}

/// §2: in a batch, each packet is judged by the peer whose key opened it.
#[test]
fn peers_in_one_batch_do_not_lend_each_other_their_addresses() {
    let mut gateway = Gateway::new();
    for id in 1..=2 {
        gateway.give_keypair(id, Role::Initiator);
    }
    let of_1 = packet([10, 0, 0, 9], US, 40);
    let of_2 = packet(PEER_1, US, 40);
    let right = packet(PEER_1, US, 60);
    let first = datagrams_of(&mut gateway, 1, &[of_1, right.clone()]);
    let second = datagrams_of(&mut gateway, 2, &[of_2]);
    let mut batch = [first[0].clone(), second[0].clone(), first[1].clone()];
    let mut arrivals: Vec<_> = batch
        .iter_mut()
        .map(|bytes| Arrival {
            bytes,
            from: endpoint("192.0.2.1:1000"),
            tos: 0,
            path: Path::Socket,
            worker: WorkerId(0),
        })
        .collect();
    gateway.inbound[0].process(&mut arrivals, &gateway.tun, START);
    assert_eq!(gateway.written(), [right]);
    assert_eq!(gateway.dropped(0, DropReason::SourceNotAllowed), 2);
}
