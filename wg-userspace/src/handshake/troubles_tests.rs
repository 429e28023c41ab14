//! What is told of peers and strangers, and when it is over.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use wg_common::endpoint::Endpoint;
use wg_common::id::{DeviceId, PeerId};
use wg_common::protocol::REKEY_ATTEMPT_TIME;

use super::Trouble;
use super::timers_tests::{Host, SECOND, START, addr, pair, shake_hands};
use crate::datapath::handoff::Work;
use crate::device::{AllowedIpChange, Device, PeerChange, SetRequest};
use crate::key::{PresharedKey, PublicKey};
use crate::session::{TROUBLE_FADES_AFTER, TroubleKind};

fn told(host: &Host) -> (Vec<Trouble>, usize, Vec<Trouble>) {
    host.handshakes.troubles(64, host.now)
}

/// The kinds of troubles with peers, and of the device.
fn kinds(host: &Host) -> (Vec<TroubleKind>, Vec<TroubleKind>) {
    let (of_peers, _, of_device) = told(host);
    let kinds = |troubles: Vec<Trouble>| troubles.iter().map(|trouble| trouble.kind).collect();
    (kinds(of_peers), kinds(of_device))
}

fn peers(host: &Host) -> Vec<TroubleKind> {
    let (of_peers, of_device) = kinds(host);
    assert_eq!(of_device, []);
    of_peers
}

/// A second of both, in which they get what the other one sends.
fn second(a: &mut Host, b: &mut Host) {
    let until = a.now + SECOND;
    b.set_now(a.now);
    a.run(SECOND);
    b.run(SECOND);
    shake_hands(a, b);
    assert!(a.now == until && b.now == until);
}

#[test]
fn initiations_that_nobody_answers_are_told_until_one_is() {
    let (mut a, mut b) = pair();
    assert_eq!(peers(&a), []);
    a.initiate(0);
    assert_eq!(peers(&a), [], "there is time for an answer");
    a.run(SECOND * 41);
    let (troubles, more, _) = told(&a);
    let [trouble] = troubles.as_slice() else { panic!("{troubles:?}") };
    assert_eq!((trouble.kind, more), (TroubleKind::InitiationsUnanswered, 0));
    assert_eq!(trouble.peer, Some(b.key.public_key()));
    assert_eq!(trouble.address, Some(addr(2).to_string()));
    // Every five seconds and a little, of which the first is not yet missed.
    assert!((7..=8).contains(&trouble.spell.count()), "{trouble:?}");
    assert!((40..=42).contains(&trouble.spell.since_s_ago(a.now)), "{trouble:?}");
    assert_eq!(told(&a).0, troubles, "who asks takes nothing away");

    a.take_sent();
    b.set_now(a.now);
    for _ in 0..6 {
        second(&mut a, &mut b);
    }
    assert_eq!(peers(&a), [], "it was answered");
}

#[test]
fn a_handshake_that_was_given_up_is_told_for_a_while() {
    let (mut a, _) = pair();
    a.initiate(0);
    a.run(REKEY_ATTEMPT_TIME + SECOND * 7);
    assert_eq!(peers(&a), [TroubleKind::HandshakeGivenUp]);
    a.run(TROUBLE_FADES_AFTER - SECOND * 20);
    assert_eq!(peers(&a), [TroubleKind::HandshakeGivenUp]);
    a.run(SECOND * 20);
    assert_eq!(peers(&a), []);
}

#[test]
fn another_preshared_key_is_told_at_both_ends() {
    let (mut a, mut b) = pair();
    b.handshakes.set_preshared_key(PeerId(0), PresharedKey::from_bytes([7; 32]));
    a.initiate(0);
    for _ in 0..12 {
        second(&mut a, &mut b);
    }
    let (troubles, ..) = told(&a);
    let [trouble] = troubles.as_slice() else { panic!("{troubles:?}") };
    assert_eq!(trouble.kind, TroubleKind::ResponsesUnreadable, "rather than that they do not come");
    assert_eq!(trouble.spell.count(), 3);
    assert_eq!(peers(&b), [TroubleKind::ResponsesUnconfirmed]);

    a.handshakes.set_preshared_key(PeerId(0), PresharedKey::from_bytes([7; 32]));
    b.handshakes.set_preshared_key(PeerId(0), PresharedKey::from_bytes([7; 32]));
    assert_eq!(peers(&b), [], "it is another story");
    for _ in 0..6 {
        second(&mut a, &mut b);
    }
    assert_eq!(peers(&a), []);
}

#[test]
fn answers_that_nobody_confirms_are_told_until_one_is() {
    let (mut a, mut b) = pair();
    a.initiate(0);
    for _ in 0..12 {
        let until = a.now + SECOND;
        b.set_now(a.now);
        a.run(SECOND);
        b.run(SECOND);
        for (_, message, _) in a.take_sent() {
            b.receive(&message, addr(1));
        }
        // The way back is closed.
        b.take_sent();
        assert!(a.now == until);
    }
    assert_eq!(peers(&a), [TroubleKind::InitiationsUnanswered]);
    let (troubles, ..) = told(&b);
    assert_eq!(troubles[0].kind, TroubleKind::ResponsesUnconfirmed);
    assert_eq!(troubles[0].spell.count(), 3);

    let hot = b.hot(0);
    let next = hot.keypairs.load().next.clone().unwrap();
    assert!(hot.confirm(&next), "its first packet has come");
    b.handshakes.work(&Work::Confirmed(PeerId(0)), b.now);
    assert_eq!(peers(&b), []);
}

#[test]
fn an_answer_that_was_just_given_is_no_trouble() {
    let (a, b) = pair();
    a.initiate(0);
    for (_, message, _) in a.take_sent() {
        b.receive(&message, addr(1));
    }
    assert_eq!(peers(&b), []);
}

#[test]
fn a_clock_that_went_back_is_told_once_nothing_holds() {
    let (a, mut b) = pair();
    a.initiate(0);
    shake_hands(&a, &b);
    // Its clock is an hour back.
    let late = Host::new(1);
    late.add(0, b.key.public_key(), Some(addr(2)));
    late.world.wall_ns.store(0, Ordering::Relaxed);
    late.initiate(0);
    for (_, message, _) in late.take_sent() {
        b.receive(&message, addr(1));
    }
    assert_eq!(peers(&b), [], "there is a keypair: the network may have sent something twice");
    b.run(SECOND * 200);
    assert!(peers(&b).contains(&TroubleKind::TimestampsOld), "{:?}", peers(&b));

    let mut anew = Host::new(1);
    anew.add(0, b.key.public_key(), Some(addr(2)));
    anew.set_now(b.now);
    anew.initiate(0);
    shake_hands(&anew, &b);
    assert!(!peers(&b).contains(&TroubleKind::TimestampsOld));
}

#[test]
fn what_the_kernel_does_not_send_is_told_and_not_that_nobody_answers() {
    let (mut a, mut b) = pair();
    a.world.is_cut.store(true, Ordering::Relaxed);
    a.initiate(0);
    a.run(SECOND * 12);
    let (troubles, ..) = told(&a);
    let [trouble] = troubles.as_slice() else { panic!("{troubles:?}") };
    assert_eq!(trouble.kind, TroubleKind::DatagramsUnsent);
    assert_eq!((trouble.spell.count(), trouble.address.clone()), (3, Some(addr(2).to_string())));
    a.world.is_cut.store(false, Ordering::Relaxed);
    b.set_now(a.now);
    for _ in 0..6 {
        second(&mut a, &mut b);
    }
    assert_eq!(peers(&a), [], "something has come since");
}

#[test]
fn who_is_no_peer_is_told_with_its_key_until_it_is_one() {
    let (_, b) = pair();
    let stranger = Host::new(3);
    stranger.add(0, b.key.public_key(), Some(addr(2)));
    stranger.initiate(0);
    for (_, message, _) in stranger.take_sent() {
        b.receive(&message, addr(9));
    }
    let (of_peers, _, of_device) = told(&b);
    assert_eq!(of_peers, []);
    let [trouble] = of_device.as_slice() else { panic!("{of_device:?}") };
    assert_eq!(trouble.kind, TroubleKind::UnknownKeys);
    assert_eq!(trouble.address, Some(addr(9).to_string()));
    assert_eq!(trouble.public_key, Some(stranger.key.public_key()));
    b.add(7, stranger.key.public_key(), None);
    assert_eq!(kinds(&b), (vec![], vec![]));
}

#[test]
fn an_initiation_for_another_public_key_is_told() {
    let (_, b) = pair();
    let mistaken = Host::new(3);
    mistaken.add(0, Host::new(4).key.public_key(), Some(addr(2)));
    mistaken.initiate(0);
    for (_, message, _) in mistaken.take_sent() {
        b.receive(&message, addr(9));
    }
    let (_, _, of_device) = told(&b);
    assert_eq!(of_device[0].kind, TroubleKind::OtherKey);
    assert_eq!(of_device[0].address, Some(addr(9).to_string()));
    assert_eq!(of_device[0].public_key, None, "nobody can read who it was");
}

/// Gives the first peer and the second these prefixes.
fn allow(host: &Host, prefixes: [&[&str]; 2]) {
    let mut device = Device::default();
    let change = |(id, prefixes): (u32, &[&str])| PeerChange {
        allowed_ips: prefixes
            .iter()
            .map(|prefix| AllowedIpChange::Add(prefix.parse().unwrap()))
            .collect(),
        ..PeerChange::new(host.hot(id).public_key)
    };
    let peers = (0..).zip(prefixes).map(change).collect();
    device.apply(SetRequest { peers, ..SetRequest::default() });
    host.shared.routing.store(device.allowed_ips().snapshot());
}

#[test]
fn what_workers_note_is_told_until_it_is_mended() {
    let (mut a, _) = pair();
    let other = a.add(1, PublicKey::from_bytes([5; 32]), None);
    let hot = a.hot(0);
    for _ in 0..3 {
        hot.note_refused("10.9.0.7".parse().unwrap(), a.now);
        other.note_no_endpoint(a.now);
    }
    a.shared.no_peer.note("10.1.0.1".parse().unwrap(), a.now);
    let (of_peers, _, of_device) = told(&a);
    let [nowhere, refused] = of_peers.as_slice() else { panic!("{of_peers:?}") };
    assert_eq!((nowhere.kind, nowhere.spell.count()), (TroubleKind::NoEndpoint, 3));
    assert_eq!((refused.kind, refused.spell.count()), (TroubleKind::SourceNotAllowed, 3));
    assert_eq!((refused.address.as_deref(), refused.public_key), (Some("10.9.0.7"), None));
    assert_eq!(of_device[0].kind, TroubleKind::NoPeer);
    assert_eq!(of_device[0].address.as_deref(), Some("10.1.0.1"));

    // Somebody else has it.
    allow(&a, [&[], &["10.0.0.0/8"]]);
    let (of_peers, _, of_device) = told(&a);
    assert_eq!(of_peers[1].public_key, Some(other.public_key));
    assert_eq!(of_device, []);

    allow(&a, [&["10.9.0.7/32"], &["10.0.0.0/8"]]);
    other.endpoint.store(Some(Arc::new(Endpoint::configured(addr(7)))));
    assert_eq!(peers(&a), []);
    allow(&a, [&[], &[]]);
    assert_eq!(kinds(&a).0, [TroubleKind::SourceNotAllowed], "and if it is taken away again");
    a.run(TROUBLE_FADES_AFTER + SECOND);
    assert_eq!(peers(&a), []);
    assert!(!hot.in_trouble.load(Ordering::Relaxed), "nobody looks at it any more");
}

#[test]
fn the_most_urgent_are_told_first_and_no_more_than_fit() {
    let host = Host::new(1);
    for id in 0..1000 {
        let mut key = [9; 32];
        key[..4].copy_from_slice(&u32::to_be_bytes(id));
        let hot = host.add(id, PublicKey::from_bytes(key), None);
        match id {
            0..900 => hot.note_refused(addr(1).ip(), START),
            _ => hot.note_no_endpoint(START),
        }
    }
    host.add(5000, PublicKey::from_bytes([1; 32]), None);
    for _ in 0..2 {
        let (troubles, more, _) = host.handshakes.troubles(64, START);
        assert_eq!((troubles.len(), more), (64, 936));
        assert!(troubles.iter().all(|trouble| trouble.kind == TroubleKind::NoEndpoint));
        assert!(troubles.is_sorted_by_key(|trouble| trouble.peer.map(|key| *key.as_bytes())));
    }
}

#[test]
fn strangers_leave_nothing_with_peers_and_a_flood_of_them_one_note() {
    let (a, mut b) = pair();
    a.initiate(0);
    let message = a.take_sent().remove(0).1;
    let before = b.handshakes.index_count();
    for round in 0..10_000_u32 {
        let mut bytes = message.clone();
        // mac2 at its end counts under load alone.
        let at = 4 + round as usize % (bytes.len() - 4 - 16);
        bytes[at] ^= 1 << (round % 8);
        b.receive(&bytes, addr(round as u8));
        b.set_now(b.now + Duration::from_micros(10));
    }
    let hot = b.hot(0);
    assert!(!hot.in_trouble.load(Ordering::Relaxed) && hot.notes().is_none());
    assert_eq!(b.handshakes.index_count(), before);
    let (of_peers, _, of_device) = told(&b);
    assert_eq!((of_peers.len(), of_device.len()), (0, 1), "{of_device:?}");
    assert_eq!(hot.device, DeviceId(0));
}
