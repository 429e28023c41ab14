//! Handshake messages and cookie replies: right ones, altered ones, and bytes that never were one.
//!
//! The first byte says what comes and whether mac1 is made right afterwards, as anybody can who knows
//! a public key: only so do altered messages get past the first check. The rest is laid over a right
//! message, or stands alone. What is altered where a tag covers it must be refused, by the error that
//! names the first check which it fails; what is not must be accepted.

use std::sync::LazyLock;

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use rand::SeedableRng;
use rand::rngs::StdRng;
use wg_common::id::ReceiverIndex;
use wg_common::protocol::{COOKIE_REPLY_LEN, INITIATION_LEN, LABEL_MAC1, MAC_LEN, RESPONSE_LEN};
use wg_userspace::key::{PresharedKey, PrivateKey, PublicKey};
use wg_userspace::noise::{
    Cookie, HandshakeError, Identity, Initiator, RemoteStatic, Timestamp, check_mac1, check_mac2,
    initiate, mac1_of, open_initiation,
};

use super::Input;

const ALICE: ReceiverIndex = ReceiverIndex::from_wire(*b"alic");
const BOB: ReceiverIndex = ReceiverIndex::from_wire(*b"bobs");
const COOKIE: Cookie = Cookie::from_bytes([9; 16]);

/// Alice initiates, Bob responds; what they send.
struct Parties {
    alice: Identity,
    bob: Identity,
    of_alice: RemoteStatic,
    of_bob: RemoteStatic,
    initiator: Initiator,
    initiation: [u8; INITIATION_LEN],
    response: [u8; RESPONSE_LEN],
    reply: [u8; COOKIE_REPLY_LEN],
}

static PARTIES: LazyLock<Parties> = LazyLock::new(|| {
    let mut rng = StdRng::seed_from_u64(1);
    let preshared_key = PresharedKey::from_bytes([7; 32]);
    let [alice, bob] = std::array::from_fn(|_| Identity::new(PrivateKey::generate(&mut rng)));
    let of_alice = RemoteStatic::new(&alice, *bob.public_key(), preshared_key.clone());
    let of_bob = RemoteStatic::new(&bob, *alice.public_key(), preshared_key);
    let (initiator, initiation) =
        initiate(&alice, &of_alice, ALICE, timestamp(), Some(&COOKIE), &mut rng).unwrap();
    let authentic = open_initiation(&bob, &initiation).unwrap().authenticate(&of_bob).unwrap();
    let (_, response) = authentic.respond(&of_bob, BOB, Some(&COOKIE), &mut rng).unwrap();
    let reply = COOKIE.reply(&bob, ALICE, &mac1_of(&initiation).unwrap(), &mut rng);
    Parties { alice, bob, of_alice, of_bob, initiator, initiation, response, reply }
});

fn timestamp() -> Timestamp {
    Timestamp::from_unix(1_800_000_000, 5)
}

/// A message that starts as a right one, or as nothing, and the input laid over it.
fn message<const N: usize>(right: &[u8; N], alone: bool, input: &mut Input<'_>) -> [u8; N] {
    let mut message = if alone { [0; N] } else { *right };
    let over = input.bytes(N);
    message.iter_mut().zip(over).for_each(|(byte, over)| *byte ^= over);
    message
}

fn mac1_slowly(receiver: &PublicKey, message: &[u8]) -> [u8; MAC_LEN] {
    let mut hash = Blake2s256::new();
    Update::update(&mut hash, LABEL_MAC1);
    Update::update(&mut hash, receiver.as_bytes());
    let mut mac = Blake2sMac::<U16>::new_from_slice(&hash.finalize()).unwrap();
    Update::update(&mut mac, &message[..message.len() - 2 * MAC_LEN]);
    mac.finalize_fixed().into()
}

fn mend(message: &mut [u8], receiver: &PublicKey) {
    let mac1 = mac1_slowly(receiver, message);
    let at = message.len() - 2 * MAC_LEN;
    message[at..at + MAC_LEN].copy_from_slice(&mac1);
}

/// Whether type, reserved bytes and mac1 are those of a message of this kind to `receiver`.
fn passes(message: &[u8], kind: u8, receiver: &Identity) -> bool {
    let at = message.len() - 2 * MAC_LEN;
    let passes = message[..4] == [kind, 0, 0, 0]
        && message[at..at + MAC_LEN] == mac1_slowly(receiver.public_key(), message);
    assert_eq!(check_mac1(receiver, message), passes);
    passes
}

/// A message, altered and mended or not.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.byte();
    let (alone, mended) = (choice & 4 != 0, choice & 8 != 0);
    match choice % 4 {
        0 => initiation(alone, mended, &mut input),
        1 => response(alone, mended, &mut input),
        2 => cookie_reply(alone, &mut input),
        _ => {
            let _ = (check_mac1(&PARTIES.bob, input.0), mac1_of(input.0));
            assert!(!check_mac2(&COOKIE, input.0) || input.0.len() >= RESPONSE_LEN);
        }
    }
}

fn initiation(alone: bool, mended: bool, input: &mut Input<'_>) {
    let Parties { bob, of_bob, initiation: right, .. } = &*PARTIES;
    let mut message = message(right, alone, input);
    if mended {
        mend(&mut message, bob.public_key());
    }
    let passes = passes(&message, 1, bob);
    assert_eq!(check_mac2(&COOKIE, &message), message == *right, "mac2 covers everything");
    let authentic = match open_initiation(bob, &message).and_then(|m| m.authenticate(of_bob)) {
        Ok(authentic) => authentic,
        Err(error) => {
            assert_eq!(error == HandshakeError::BadMac1, !passes);
            assert!(!passes || message[8..116] != right[8..116], "refused: {error}");
            return;
        }
    };
    assert!(passes && message[8..116] == right[8..116], "a forgery was accepted");
    assert_eq!(authentic.timestamp(), timestamp());
    let mut rng = StdRng::seed_from_u64(2);
    let (established, response) = authentic.respond(of_bob, BOB, None, &mut rng).unwrap();
    assert_eq!(established.remote_index.to_wire(), message[4..8]);
    assert_eq!(response[8..12], message[4..8]);
}

fn response(alone: bool, mended: bool, input: &mut Input<'_>) {
    let Parties { alice, of_alice, initiator, response: right, .. } = &*PARTIES;
    let mut message = message(right, alone, input);
    if mended {
        mend(&mut message, alice.public_key());
    }
    let passes = passes(&message, 2, alice);
    assert_eq!(check_mac2(&COOKIE, &message), message == *right);
    let is_ours = message[8..12] == ALICE.to_wire();
    match initiator.finish(alice, of_alice, &message) {
        Ok(established) => {
            assert!(passes && message[8..60] == right[8..60], "a forgery was accepted");
            assert_eq!(established.remote_index.to_wire(), message[4..8]);
        }
        Err(HandshakeError::WrongIndex) => assert!(!is_ours),
        Err(HandshakeError::BadMac1) => assert!(is_ours && !passes),
        Err(error) => assert!(passes && is_ours && message[12..60] != right[12..60], "{error}"),
    }
}

fn cookie_reply(alone: bool, input: &mut Input<'_>) {
    let Parties { of_alice, initiation, reply: right, .. } = &*PARTIES;
    let message = message(right, alone, input);
    let mac1 = mac1_of(initiation).unwrap();
    match Cookie::open_reply(&message, of_alice, ALICE, &mac1) {
        Ok(cookie) => {
            assert_eq!(message[4..], right[4..], "a forgery was accepted");
            assert_eq!(cookie.expose(), COOKIE.expose());
        }
        Err(HandshakeError::WrongIndex) => assert_ne!(message[4..8], ALICE.to_wire()),
        Err(error) => assert_ne!(message[8..], right[8..], "refused: {error}"),
    }
    let other = [0; MAC_LEN];
    assert!(Cookie::open_reply(&message, of_alice, ALICE, &other).is_err(), "of another message");
}

/// Each message as it is, with an altered byte in each of its fields, and with points of low order.
pub fn seeds() -> Vec<Vec<u8>> {
    let alter = |choice: u8, at: usize| {
        let mut seed = vec![0; at + 2];
        (seed[0], seed[at + 1]) = (choice, 1);
        seed
    };
    let mut seeds = vec![vec![0], vec![1], vec![2], vec![3]];
    for (kind, fields) in [
        (0, &[0, 2, 4, 8, 40, 88, 116, 132][..]),
        (1, &[0, 1, 4, 8, 12, 44, 60, 76]),
        (2, &[0, 4, 8, 32, 48]),
    ] {
        seeds.extend(fields.iter().flat_map(|&at| [alter(kind, at), alter(kind | 8, at)]));
    }
    // Alone and mended: an ephemeral key of zeros, and one of one.
    for one in [0, 1] {
        let mut initiation = vec![12, 1, 0, 0, 0, 1, 2, 3, 4, one];
        initiation.resize(149, 0);
        let mut response = [&[13, 2, 0, 0, 0, 1, 2, 3, 4][..], &ALICE.to_wire(), &[one]].concat();
        response.resize(93, 0);
        seeds.extend([initiation, response, [&[7][..], &PARTIES.initiation].concat()]);
    }
    seeds
}
