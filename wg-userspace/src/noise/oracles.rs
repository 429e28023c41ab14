//! Two other implementations as judges of ours: boringtun for whole messages and the keys by what
//! they open, snow for the transcript and the keys themselves; each in both roles.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use rand_core::{TryCryptoRng, TryRng};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use wg_common::id::ReceiverIndex;
use wg_common::protocol::{
    COOKIE_REPLY_LEN, IDENTIFIER, INITIATION_LEN, RESPONSE_LEN, TIMESTAMP_LEN, TYPE_TRANSPORT,
};

use super::fixture::*;
use super::*;

/// boringtun in Bob's place. With `limit` it is under load from that many handshakes a second on.
fn boringtun(bob: &Party, preshared_key: &PresharedKey, limit: Option<u64>) -> Tunn {
    let limiter = limit.map(|limit| {
        let public_key = x25519::PublicKey::from(*bob.identity.public_key().as_bytes());
        Arc::new(RateLimiter::new(&public_key, limit))
    });
    Tunn::new(
        x25519::StaticSecret::from(*bob.identity.private_key().expose()),
        x25519::PublicKey::from(*bob.remote.public_key().as_bytes()),
        (!preshared_key.is_zero()).then(|| *preshared_key.expose()),
        None,
        0x1234,
        limiter,
    )
}

/// The message that boringtun wants to send.
fn sent(result: TunnResult<'_>) -> Vec<u8> {
    match result {
        TunnResult::WriteToNetwork(message) => message.to_vec(),
        other => panic!("boringtun sends nothing: {other:?}"),
    }
}

fn aead(key: &[u8; KEY_LEN]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).unwrap())
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

fn open_transport(established: &Established, message: &[u8]) -> Vec<u8> {
    assert_eq!(message[..4], [TYPE_TRANSPORT, 0, 0, 0]);
    assert_eq!(message[4..8], established.local_index.to_wire());
    let counter = u64::from_le_bytes(*message[8..].first_chunk().unwrap());
    let mut text = message[16..].to_vec();
    aead(&established.keys.receive)
        .open_in_place(nonce(counter), Aad::empty(), &mut text)
        .expect("what boringtun sealed")
        .to_vec()
}

fn seal_transport(established: &Established, counter: u64, packet: &[u8]) -> Vec<u8> {
    let mut text = packet.to_vec();
    text.resize(packet.len().next_multiple_of(16), 0);
    aead(&established.keys.send)
        .seal_in_place_append_tag(nonce(counter), Aad::empty(), &mut text)
        .unwrap();
    [
        &[TYPE_TRANSPORT, 0, 0, 0],
        &established.remote_index.to_wire(),
        &counter.to_le_bytes()[..],
        &text,
    ]
    .concat()
}

/// An IPv4 packet of `len` bytes.
fn packet(len: u16) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..len).map(|i| i as u8).collect();
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet
}

/// Packets go both ways over `established`; boringtun has sealed and seen none but a keepalive.
fn exchange_packets(established: &Established, tunn: &mut Tunn) {
    let mut buffer = [0; 2048];
    for (counter, len) in (0..).zip([20, 64, 576, 1419, 1420]) {
        let packet = packet(len);
        match tunn.decapsulate(None, &seal_transport(established, counter, &packet), &mut buffer) {
            TunnResult::WriteToTunnelV4(opened, _) => assert_eq!(opened, packet),
            other => panic!("boringtun does not open what we sealed: {other:?}"),
        }
        let sealed = sent(tunn.encapsulate(&packet, &mut buffer));
        assert_eq!(open_transport(established, &sealed), packet);
    }
}

#[test]
fn boringtun_answers_us() {
    for preshared_key in [PresharedKey::default(), preshared(7)] {
        let [alice, bob] = parties(1, &preshared_key);
        let mut tunn = boringtun(&bob, &preshared_key, None);
        let mut buffer = [0; 2048];
        let (initiator, initiation) = alice.initiate(ALICE_INDEX, 1);
        let response = sent(tunn.decapsulate(None, &initiation, &mut buffer));
        let response: [u8; RESPONSE_LEN] = response.try_into().unwrap();
        let established = alice.finish(&initiator, &response).unwrap();
        assert_eq!(established.remote_index.value() >> 8, 0x1234);
        exchange_packets(&established, &mut tunn);

        // It knows a replay by its timestamp, and takes a later one.
        let replay = tunn.decapsulate(None, &initiation, &mut buffer);
        assert!(matches!(replay, TunnResult::Err(WireGuardError::WrongTai64nTimestamp)));
        let (_, initiation) = alice.initiate(ALICE_INDEX, 2);
        sent(tunn.decapsulate(None, &initiation, &mut buffer));
    }
}

#[test]
fn we_answer_boringtun() {
    for preshared_key in [PresharedKey::default(), preshared(7)] {
        let [alice, bob] = parties(2, &preshared_key);
        let mut tunn = boringtun(&bob, &preshared_key, None);
        let mut buffer = [0; 2048];
        let staged = packet(1000);
        let initiation = sent(tunn.encapsulate(&staged, &mut buffer));
        let initiation: [u8; INITIATION_LEN] = initiation.try_into().unwrap();
        let opened = open_initiation(&alice.identity, &initiation).unwrap();
        assert_eq!(opened.sender(), *bob.identity.public_key());
        let authentic = opened.authenticate(&alice.remote).unwrap();
        assert!(authentic.timestamp() > Timestamp::from_unix(1_700_000_000, 0));
        let (established, response) =
            authentic.respond(&alice.remote, ALICE_INDEX, None, &mut rng(3)).unwrap();

        let keepalive = sent(tunn.decapsulate(None, &response, &mut buffer));
        assert_eq!(open_transport(&established, &keepalive), [0_u8; 0]);
        // An empty datagram asks for what it holds back.
        let flushed = sent(tunn.decapsulate(None, &[], &mut buffer));
        assert_eq!(open_transport(&established, &flushed), staged);
        exchange_packets(&established, &mut tunn);
    }
}

#[test]
fn boringtun_refuses_another_preshared_key_and_so_do_we() {
    let [mut alice, bob] = parties(3, &preshared(7));
    let mut tunn = boringtun(&bob, &preshared(7), None);
    let mut buffer = [0; 2048];
    let initiation = sent(tunn.format_handshake_initiation(&mut buffer, false));
    let initiation: [u8; INITIATION_LEN] = initiation.try_into().unwrap();
    alice.remote.set_preshared_key(preshared(8));
    let (_, wrong) = alice.respond(&initiation, ALICE_INDEX, 1).unwrap();
    assert!(matches!(
        tunn.decapsulate(None, &wrong, &mut buffer),
        TunnResult::Err(WireGuardError::InvalidAeadTag)
    ));
    let (initiator, initiation) = alice.initiate(ALICE_INDEX, 1);
    let response = sent(tunn.decapsulate(None, &initiation, &mut buffer));
    assert_eq!(
        alice.finish(&initiator, &response.try_into().unwrap()).err(),
        Some(HandshakeError::Decrypt)
    );
}

#[test]
fn we_show_boringtun_the_cookie_it_told_us() {
    let [alice, bob] = parties(4, &preshared(7));
    let mut tunn = boringtun(&bob, &preshared(7), Some(0));
    let source: Option<IpAddr> = Some(IpAddr::from([127, 0, 0, 1]));
    let mut buffer = [0; 2048];
    let (_, initiation) = alice.initiate(ALICE_INDEX, 1);
    let reply = sent(tunn.decapsulate(source, &initiation, &mut buffer));
    let reply: [u8; COOKIE_REPLY_LEN] = reply.try_into().unwrap();
    let mac1 = mac1_of(&initiation).unwrap();
    let cookie = Cookie::open_reply(&reply, &alice.remote, ALICE_INDEX, &mac1).unwrap();

    let (initiator, initiation) = initiate(
        &alice.identity,
        &alice.remote,
        ALICE_INDEX,
        timestamp(2),
        Some(&cookie),
        &mut rng(2),
    )
    .unwrap();
    let response = sent(tunn.decapsulate(source, &initiation, &mut buffer));
    assert!(alice.finish(&initiator, &response.try_into().unwrap()).is_ok());
}

#[test]
fn boringtun_shows_us_the_cookie_we_told_it() {
    let [alice, bob] = parties(5, &preshared(7));
    let mut tunn = boringtun(&bob, &preshared(7), None);
    let mut buffer = [0; 2048];
    let cookie = Cookie::from_bytes([9; 16]);
    let initiation = sent(tunn.format_handshake_initiation(&mut buffer, false));
    assert!(check_mac1(&alice.identity, &initiation) && !check_mac2(&cookie, &initiation));
    let sender = ReceiverIndex::from_wire(*initiation[4..].first_chunk().unwrap());
    let mac1 = mac1_of(&initiation).unwrap();
    let reply = cookie.reply(&alice.identity, sender, &mac1, &mut rng(1));
    assert!(matches!(tunn.decapsulate(None, &reply, &mut buffer), TunnResult::Done));

    let initiation = sent(tunn.format_handshake_initiation(&mut buffer, true));
    assert!(check_mac1(&alice.identity, &initiation) && check_mac2(&cookie, &initiation));
}

/// Gives the same 32 bytes again and again.
struct Fixed([u8; KEY_LEN]);

impl TryRng for Fixed {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        unreachable!("handshakes take bytes")
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        unreachable!("handshakes take bytes")
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        bytes.copy_from_slice(&self.0);
        Ok(())
    }
}

impl TryCryptoRng for Fixed {}

/// snow in Bob's place, with an ephemeral key of our choice.
fn snow<'a>(
    bob: &'a Party,
    preshared_key: &'a PresharedKey,
    ephemeral: &'a [u8; KEY_LEN],
) -> snow::Builder<'a> {
    snow::Builder::new("Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s".parse().unwrap())
        .prologue(IDENTIFIER)
        .unwrap()
        .local_private_key(bob.identity.private_key().expose())
        .unwrap()
        .psk(2, preshared_key.expose())
        .unwrap()
        .fixed_ephemeral_key_for_testing_only(ephemeral)
}

#[test]
fn snow_answers_us_with_the_same_keys() {
    for preshared_key in [PresharedKey::default(), preshared(7)] {
        let [alice, bob] = parties(6, &preshared_key);
        let mut snow = snow(&bob, &preshared_key, &[6; KEY_LEN]).build_responder().unwrap();
        let (initiator, initiation) = alice.initiate(ALICE_INDEX, 1);
        let mut payload = [0; TIMESTAMP_LEN];
        assert_eq!(snow.read_message(&initiation[8..116], &mut payload), Ok(TIMESTAMP_LEN));
        assert_eq!(Timestamp::from_bytes(payload), timestamp(1));
        assert_eq!(snow.get_remote_static().unwrap(), alice.identity.public_key().as_bytes());

        let mut response = [0; RESPONSE_LEN];
        response[0] = 2;
        response[4..8].copy_from_slice(&BOB_INDEX.to_wire());
        response[8..12].copy_from_slice(&ALICE_INDEX.to_wire());
        assert_eq!(snow.write_message(&[], &mut response[12..60]), Ok(48));
        bob.mend(&mut response);
        let of_alice = alice.finish(&initiator, &response).unwrap();
        assert_eq!(snow.dangerously_get_raw_split(), (of_alice.keys.send, of_alice.keys.receive));

        // In its place we write the same response, byte for byte, and have the same keys.
        let authentic = bob.authenticate(&initiation).unwrap();
        let (of_bob, ours) =
            authentic.respond(&bob.remote, BOB_INDEX, None, &mut Fixed([6; KEY_LEN])).unwrap();
        assert_eq!(ours, response);
        assert_eq!(snow.dangerously_get_raw_split(), (of_bob.keys.receive, of_bob.keys.send));
    }
}

#[test]
fn we_answer_snow_with_the_same_keys() {
    for preshared_key in [PresharedKey::default(), preshared(7)] {
        let [alice, bob] = parties(7, &preshared_key);
        let mut snow = snow(&bob, &preshared_key, &[5; KEY_LEN])
            .remote_public_key(alice.identity.public_key().as_bytes())
            .unwrap()
            .build_initiator()
            .unwrap();
        let mut initiation = [0; INITIATION_LEN];
        initiation[0] = 1;
        initiation[4..8].copy_from_slice(&BOB_INDEX.to_wire());
        assert_eq!(snow.write_message(timestamp(1).as_bytes(), &mut initiation[8..116]), Ok(108));
        bob.mend(&mut initiation);
        let authentic = alice.authenticate(&initiation).unwrap();
        assert_eq!(authentic.timestamp(), timestamp(1));
        let (of_alice, response) =
            authentic.respond(&alice.remote, ALICE_INDEX, None, &mut rng(1)).unwrap();
        assert_eq!(snow.read_message(&response[12..60], &mut []), Ok(0));
        assert_eq!(snow.dangerously_get_raw_split(), (of_alice.keys.receive, of_alice.keys.send));

        // In its place we write the same initiation, byte for byte, and have the same keys.
        let (initiator, ours) = initiate(
            &bob.identity,
            &bob.remote,
            BOB_INDEX,
            timestamp(1),
            None,
            &mut Fixed([5; KEY_LEN]),
        )
        .unwrap();
        assert_eq!(ours, initiation);
        let of_bob = bob.finish(&initiator, &response).unwrap();
        assert_eq!(snow.dangerously_get_raw_split(), (of_bob.keys.send, of_bob.keys.receive));
    }
}
