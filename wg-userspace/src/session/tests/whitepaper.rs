//! Rules of the whitepaper that no other test is named after.

use super::*;

#[test]
fn a_repeated_initiation_has_an_ephemeral_key_and_a_timestamp_of_its_own() {
    let mut side = lonely();
    let bob = Identity::new(key(2));
    let alice_of_bob = RemoteStatic::new(&bob, *side.identity.public_key(), psk());
    side.initiate(START);
    side.run_alone(START + SECOND * 30);
    let mut timestamps = Vec::new();
    let mut ephemeral_keys = BTreeSet::new();
    for (message, _) in &side.outbox {
        let opened = open_initiation(&bob, message[..].first_chunk().unwrap()).unwrap();
        timestamps.push(opened.authenticate(&alice_of_bob).unwrap().timestamp());
        assert!(ephemeral_keys.insert(message[8..40].to_vec()), "§6.4: new random ephemeral keys");
    }
    assert!(timestamps.len() >= 5);
    assert!(timestamps.is_sorted_by(|a, b| a < b), "§5.1: a responder takes only greater ones");
}

/// §5.4.5: who holds neither key of the handshake's ephemerals cannot open what was recorded.
#[test]
fn a_finished_handshake_leaves_nothing_that_could_finish_it_again() {
    let mut pair = Pair::new();
    let now = pair.now;
    let initiation = initiation(&mut pair, now);
    let from = pair.sides[A].address;
    pair.sides[B].receive(&initiation, from, now).unwrap();
    let (response, _) = pair.sides[B].outbox.pop().unwrap();
    let from = pair.sides[B].address;
    pair.sides[A].receive(&response, from, now).unwrap();
    assert_eq!(pair.sides[A].session.pending_index(), None, "the ephemeral key is gone");
    assert_eq!(pair.sides[A].receive(&response, from, now), Err(DropReason::UnknownIndex));
}

/// §6.3: the one before the previous is discarded, with its keys, when a new one comes.
#[test]
fn two_keypairs_at_most_are_left_of_a_tunnel_that_rekeys() {
    let mut pair = Pair::connected();
    let mut gone = Vec::new();
    for _ in 0..3 {
        for side in &pair.sides {
            let first = side.indexes.table.values().next().unwrap();
            gone.push(Arc::downgrade(first));
        }
        // Silence for as long as the initiator rekeys after the next packet.
        pair.run(REKEY_AFTER_TIME);
        pair.send(A, b"x");
        pair.run(SECOND * 6);
        pair.send(B, b"y");
        pair.run(SECOND);
    }
    for side in &pair.sides {
        assert!(side.peer().keypairs.load().iter().count() <= 2);
    }
    let alive = gone.iter().filter(|keypair| keypair.strong_count() > 0).count();
    assert!(alive <= 2 * 2, "{alive} of {} keypairs are still held", gone.len());
    assert_eq!(gone[0].strong_count() + gone[1].strong_count(), 0, "the first ones are wiped");
}
