//! Both roles of the handshake: initiation (§5.4.2), response (§5.4.3), transport keys (§5.4.5).

use rand_core::CryptoRng;
use wg_common::id::ReceiverIndex;
use wg_common::protocol::{
    INITIATION_LEN, KEY_LEN, MAC_LEN, RESPONSE_LEN, TAG_LEN, TIMESTAMP_LEN, TYPE_INITIATION,
    TYPE_RESPONSE,
};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::symmetric::Transcript;
use super::{Cookie, Curve, HandshakeError, Identity, RemoteStatic, Timestamp, X25519};
use super::{check_mac1, dh, mac};
use crate::key::{PrivateKey, PublicKey};

/// Where the fields of a handshake initiation stand.
mod initiation {
    use super::*;

    pub const SENDER: usize = 4;
    pub const EPHEMERAL: usize = SENDER + 4;
    pub const STATIC: usize = EPHEMERAL + KEY_LEN;
    pub const TIMESTAMP: usize = STATIC + KEY_LEN + TAG_LEN;
    pub const MAC1: usize = TIMESTAMP + TIMESTAMP_LEN + TAG_LEN;
    const _: () = assert!(MAC1 + 2 * MAC_LEN == INITIATION_LEN);
}

/// Where the fields of a handshake response stand.
mod response {
    use super::*;

    pub const SENDER: usize = 4;
    pub const RECEIVER: usize = SENDER + 4;
    pub const EPHEMERAL: usize = RECEIVER + 4;
    pub const NOTHING: usize = EPHEMERAL + KEY_LEN;
    pub const MAC1: usize = NOTHING + TAG_LEN;
    const _: () = assert!(MAC1 + 2 * MAC_LEN == RESPONSE_LEN);
}

/// Which part one plays in a handshake.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Role {
    /// Sent the initiation; sends transport data first.
    Initiator,
    /// Sent the response; must not send transport data before it has received some.
    Responder,
}

/// The two keys that a handshake yields; wiped on drop.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct TransportKeys {
    /// Seals what we send.
    pub send: [u8; KEY_LEN],
    /// Opens what we receive.
    pub receive: [u8; KEY_LEN],
}

/// A finished handshake.
#[derive(Debug)]
pub struct Established {
    /// The transport keys.
    pub keys: TransportKeys,
    /// By which the peer addresses us.
    pub local_index: ReceiverIndex,
    /// By which we address the peer.
    pub remote_index: ReceiverIndex,
    /// Our role.
    pub role: Role,
}

/// A handshake that we have begun and that waits for its response.
pub struct Initiator {
    transcript: Transcript,
    ephemeral: dh::Prepared,
    local_index: ReceiverIndex,
}

/// An initiation whose sender is told but not proven: whoever knows our public key can make one.
pub struct OpenedInitiation {
    transcript: Transcript,
    sender: PublicKey,
    ephemeral: PublicKey,
    remote_index: ReceiverIndex,
    /// The sealed timestamp.
    timestamp: [u8; TIMESTAMP_LEN + TAG_LEN],
}

/// An initiation that the holder of the sender's private key has made: now, or some time ago.
pub struct AuthenticInitiation {
    transcript: Transcript,
    sender: PublicKey,
    ephemeral: PublicKey,
    remote_index: ReceiverIndex,
    timestamp: Timestamp,
}

/// Begins a handshake with `remote`: gives the initiation to send, and what its response needs.
///
/// `local` must be live already. With a `cookie` of the peer's, mac2 is written.
///
/// # Errors
/// [`HandshakeError::LowOrderPoint`] if that is what the peer's public key is.
pub fn initiate(
    identity: &Identity,
    remote: &RemoteStatic,
    local: ReceiverIndex,
    timestamp: Timestamp,
    cookie: Option<&Cookie>,
    rng: &mut (impl CryptoRng + ?Sized),
) -> Result<(Initiator, [u8; INITIATION_LEN]), HandshakeError> {
    use initiation::{EPHEMERAL, MAC1, SENDER, STATIC, TIMESTAMP};

    let static_static = remote.static_static()?;
    let mut message = [0; INITIATION_LEN];
    message[0] = TYPE_INITIATION;
    message[SENDER..EPHEMERAL].copy_from_slice(&local.to_wire());

    let mut transcript = Transcript::new(remote.public_key());
    let ephemeral = Curve::prepare(&PrivateKey::generate(rng));
    let ephemeral_public = Curve::public_key(&ephemeral);
    message[EPHEMERAL..STATIC].copy_from_slice(ephemeral_public.as_bytes());
    transcript.mix_ephemeral(&ephemeral_public);

    let key = transcript.mix_secret_for_key(&*dh::agree(&ephemeral, remote.public_key())?);
    message[STATIC..][..KEY_LEN].copy_from_slice(identity.public_key().as_bytes());
    transcript.seal(&key, &mut message[STATIC..TIMESTAMP]);

    let key = transcript.mix_secret_for_key(static_static);
    message[TIMESTAMP..][..TIMESTAMP_LEN].copy_from_slice(timestamp.as_bytes());
    transcript.seal(&key, &mut message[TIMESTAMP..MAC1]);

    mac::write_macs(&mut message, remote, cookie);
    Ok((Initiator { transcript, ephemeral, local_index: local }, message))
}

impl Initiator {
    /// The index that the response bears.
    pub const fn local_index(&self) -> ReceiverIndex {
        self.local_index
    }

    /// Finishes the handshake with its response.
    ///
    /// A response that is refused changes nothing: the right one may still come.
    ///
    /// # Errors
    /// [`HandshakeError::WrongIndex`] or [`HandshakeError::BadMac1`] before any costly step, then
    /// [`HandshakeError::LowOrderPoint`], [`HandshakeError::Decrypt`].
    pub fn finish(
        &self,
        identity: &Identity,
        remote: &RemoteStatic,
        message: &[u8; RESPONSE_LEN],
    ) -> Result<Established, HandshakeError> {
        use response::{EPHEMERAL, MAC1, NOTHING, RECEIVER, SENDER};

        if ReceiverIndex::from_wire(field(message, RECEIVER)) != self.local_index {
            return Err(HandshakeError::WrongIndex);
        }
        if !check_mac1(identity, message) {
            return Err(HandshakeError::BadMac1);
        }
        let mut transcript = self.transcript.clone();
        let ephemeral = PublicKey::from_bytes(field(message, EPHEMERAL));
        transcript.mix_ephemeral(&ephemeral);
        transcript.mix_secret(&*dh::agree(&self.ephemeral, &ephemeral)?);
        transcript.mix_secret(&*dh::agree(&identity.prepared, &ephemeral)?);
        let key = transcript.mix_preshared_key(remote.preshared_key.expose());
        let [] = transcript.open(&key, &message[NOTHING..MAC1])?;

        let [initiator, responder] = transcript.split();
        Ok(Established {
            keys: TransportKeys { send: *initiator, receive: *responder },
            local_index: self.local_index,
            remote_index: ReceiverIndex::from_wire(field(message, SENDER)),
            role: Role::Initiator,
        })
    }
}

/// Opens as much of an initiation as tells who claims to have sent it.
///
/// # Errors
/// [`HandshakeError::BadMac1`] before any costly step, then [`HandshakeError::LowOrderPoint`],
/// [`HandshakeError::Decrypt`].
pub fn open_initiation(
    identity: &Identity,
    message: &[u8; INITIATION_LEN],
) -> Result<OpenedInitiation, HandshakeError> {
    use initiation::{EPHEMERAL, SENDER, STATIC, TIMESTAMP};

    if !check_mac1(identity, message) {
        return Err(HandshakeError::BadMac1);
    }
    let mut transcript = Transcript::new(identity.public_key());
    let ephemeral = PublicKey::from_bytes(field(message, EPHEMERAL));
    transcript.mix_ephemeral(&ephemeral);
    let key = transcript.mix_secret_for_key(&*dh::agree(&identity.prepared, &ephemeral)?);
    let sender = PublicKey::from_bytes(transcript.open(&key, &message[STATIC..TIMESTAMP])?);
    Ok(OpenedInitiation {
        transcript,
        sender,
        ephemeral,
        remote_index: ReceiverIndex::from_wire(field(message, SENDER)),
        timestamp: field(message, TIMESTAMP),
    })
}

impl OpenedInitiation {
    /// Who claims to have sent it.
    pub const fn sender(&self) -> PublicKey {
        self.sender
    }

    /// Proves that `remote` made it.
    ///
    /// # Errors
    /// [`HandshakeError::UnknownSender`] if somebody else claims to have sent it,
    /// [`HandshakeError::LowOrderPoint`] if that is what the peer's public key is,
    /// [`HandshakeError::Decrypt`] if the claim is false.
    pub fn authenticate(
        self,
        remote: &RemoteStatic,
    ) -> Result<AuthenticInitiation, HandshakeError> {
        let Self { mut transcript, sender, ephemeral, remote_index, timestamp } = self;
        if sender != *remote.public_key() {
            return Err(HandshakeError::UnknownSender);
        }
        let key = transcript.mix_secret_for_key(remote.static_static()?);
        let timestamp = Timestamp::from_bytes(transcript.open(&key, &timestamp)?);
        Ok(AuthenticInitiation { transcript, sender, ephemeral, remote_index, timestamp })
    }
}

impl AuthenticInitiation {
    /// Who made it.
    pub const fn sender(&self) -> PublicKey {
        self.sender
    }

    /// When it was made, by the sender's clock. Whoever answers an initiation whose timestamp is
    /// not greater than all before of this peer answers a replay.
    pub const fn timestamp(&self) -> Timestamp {
        self.timestamp
    }

    /// Answers it: gives the finished handshake and the response to send.
    ///
    /// `local` must be live already. With a `cookie` of the peer's, mac2 is written.
    ///
    /// # Errors
    /// [`HandshakeError::UnknownSender`] if `remote` is not who made it,
    /// [`HandshakeError::LowOrderPoint`] if one of its public keys is of that kind.
    pub fn respond(
        self,
        remote: &RemoteStatic,
        local: ReceiverIndex,
        cookie: Option<&Cookie>,
        rng: &mut (impl CryptoRng + ?Sized),
    ) -> Result<(Established, [u8; RESPONSE_LEN]), HandshakeError> {
        use response::{EPHEMERAL, MAC1, NOTHING, RECEIVER, SENDER};

        let Self { mut transcript, sender, ephemeral: remote_ephemeral, remote_index, .. } = self;
        if sender != *remote.public_key() {
            return Err(HandshakeError::UnknownSender);
        }
        let mut message = [0; RESPONSE_LEN];
        message[0] = TYPE_RESPONSE;
        message[SENDER..RECEIVER].copy_from_slice(&local.to_wire());
        message[RECEIVER..EPHEMERAL].copy_from_slice(&remote_index.to_wire());

        let ephemeral = Curve::prepare(&PrivateKey::generate(rng));
        let ephemeral_public = Curve::public_key(&ephemeral);
        message[EPHEMERAL..NOTHING].copy_from_slice(ephemeral_public.as_bytes());
        transcript.mix_ephemeral(&ephemeral_public);
        transcript.mix_secret(&*dh::agree(&ephemeral, &remote_ephemeral)?);
        transcript.mix_secret(&*dh::agree(&ephemeral, remote.public_key())?);
        let key = transcript.mix_preshared_key(remote.preshared_key.expose());
        transcript.seal(&key, &mut message[NOTHING..MAC1]);

        mac::write_macs(&mut message, remote, cookie);
        let [initiator, responder] = transcript.split();
        let established = Established {
            keys: TransportKeys { send: *responder, receive: *initiator },
            local_index: local,
            remote_index,
            role: Role::Responder,
        };
        Ok((established, message))
    }
}

/// The N bytes of a message from `at` on.
fn field<const N: usize>(message: &[u8], at: usize) -> [u8; N] {
    *message[at..].first_chunk().expect("the layout of the message")
}

/// Debug forms that show no secret.
macro_rules! opaque {
    ($($name:ident { $($field:ident),* })*) => {$(
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name))$(.field(stringify!($field), &self.$field))*
                    .finish_non_exhaustive()
            }
        }
    )*};
}

opaque! {
    TransportKeys {}
    Initiator { local_index }
    OpenedInitiation { sender, remote_index }
    AuthenticInitiation { sender, remote_index, timestamp }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::dh::low_order_points;
    use super::super::fixture::*;
    use super::super::{mac1_of, open_initiation};
    use super::*;
    use crate::key::PresharedKey;

    fn assert_agree(initiator: &Established, responder: &Established) {
        assert_eq!(initiator.keys.send, responder.keys.receive);
        assert_eq!(initiator.keys.receive, responder.keys.send);
        assert_ne!(initiator.keys.send, initiator.keys.receive);
        assert_eq!(initiator.local_index, responder.remote_index);
        assert_eq!(initiator.remote_index, responder.local_index);
        assert_eq!((initiator.role, responder.role), (Role::Initiator, Role::Responder));
    }

    #[test]
    fn both_sides_agree() {
        for preshared_key in [PresharedKey::default(), preshared(7)] {
            let [alice, bob] = parties(1, &preshared_key);
            let (initiator, initiation) = alice.initiate(ALICE_INDEX, 1);
            assert_eq!(initiator.local_index(), ALICE_INDEX);
            let opened = open_initiation(&bob.identity, &initiation).unwrap();
            assert_eq!(opened.sender(), *alice.identity.public_key());
            let authentic = opened.authenticate(&bob.remote).unwrap();
            assert_eq!(authentic.sender(), *alice.identity.public_key());
            assert_eq!(authentic.timestamp(), timestamp(1));
            let (of_bob, response) =
                authentic.respond(&bob.remote, BOB_INDEX, None, &mut rng(2)).unwrap();
            let of_alice = alice.finish(&initiator, &response).unwrap();
            assert_agree(&of_alice, &of_bob);
            assert_eq!(of_bob.local_index, BOB_INDEX);
        }
    }

    #[test]
    fn each_handshake_has_keys_of_its_own() {
        let [alice, bob] = parties(1, &preshared(7));
        let (_, initiation) = alice.initiate(ALICE_INDEX, 1);
        // Even two answers to one initiation.
        let (first, _) = bob.respond(&initiation, BOB_INDEX, 1).unwrap();
        let (second, _) = bob.respond(&initiation, BOB_INDEX, 2).unwrap();
        assert_ne!(first.keys.send, second.keys.send);
        assert_ne!(first.keys.receive, second.keys.receive);
        assert_ne!(alice.initiate(ALICE_INDEX, 2).1[8..], initiation[8..]);
    }

    #[test]
    fn each_flipped_bit_of_an_initiation_is_refused() {
        let [alice, bob] = parties(3, &preshared(7));
        let cookie = Cookie::from_bytes([3; 16]);
        let (_, initiation) = initiate(
            &alice.identity,
            &alice.remote,
            ALICE_INDEX,
            timestamp(1),
            Some(&cookie),
            &mut rng(1),
        )
        .unwrap();
        assert!(bob.authenticate(&initiation).is_ok());
        assert!(mac::check_mac2(&cookie, &initiation));
        for bit in 0..8 * INITIATION_LEN {
            let mut altered = initiation;
            altered[bit / 8] ^= 1 << (bit % 8);
            assert!(!mac::check_mac2(&cookie, &altered), "bit {bit}");
            if bit / 8 < INITIATION_LEN - MAC_LEN {
                assert!(!check_mac1(&bob.identity, &altered), "bit {bit}");
                assert_eq!(bob.authenticate(&altered).err(), Some(HandshakeError::BadMac1));
            }
            // mac1 proves nothing: anybody may write a right one.
            if (initiation::EPHEMERAL..initiation::MAC1).contains(&(bit / 8)) {
                alice.mend(&mut altered);
                assert!(check_mac1(&bob.identity, &altered));
                assert_eq!(
                    bob.authenticate(&altered).err(),
                    Some(HandshakeError::Decrypt),
                    "bit {bit}"
                );
            }
        }
    }

    #[test]
    fn each_flipped_bit_of_a_response_is_refused() {
        let [alice, bob] = parties(3, &preshared(7));
        let cookie = Cookie::from_bytes([3; 16]);
        let (initiator, initiation) = alice.initiate(ALICE_INDEX, 1);
        let (_, response) = bob
            .authenticate(&initiation)
            .unwrap()
            .respond(&bob.remote, BOB_INDEX, Some(&cookie), &mut rng(1))
            .unwrap();
        assert!(mac::check_mac2(&cookie, &response));
        for bit in 0..8 * RESPONSE_LEN {
            let mut altered = response;
            altered[bit / 8] ^= 1 << (bit % 8);
            assert!(!mac::check_mac2(&cookie, &altered), "bit {bit}");
            let index = (response::RECEIVER..response::EPHEMERAL).contains(&(bit / 8));
            if bit / 8 < RESPONSE_LEN - MAC_LEN {
                assert!(!check_mac1(&alice.identity, &altered), "bit {bit}");
                let error =
                    if index { HandshakeError::WrongIndex } else { HandshakeError::BadMac1 };
                assert_eq!(alice.finish(&initiator, &altered).err(), Some(error));
            }
            if (response::RECEIVER..response::MAC1).contains(&(bit / 8)) {
                bob.mend(&mut altered);
                let error =
                    if index { HandshakeError::WrongIndex } else { HandshakeError::Decrypt };
                assert_eq!(alice.finish(&initiator, &altered).err(), Some(error), "bit {bit}");
            }
        }
        // All of that did not spoil the handshake.
        assert!(alice.finish(&initiator, &response).is_ok());
    }

    #[test]
    fn type_and_reserved_bytes_count_even_with_a_right_mac1() {
        let [alice, bob] = parties(3, &preshared(7));
        let (initiator, initiation) = alice.initiate(ALICE_INDEX, 1);
        let (_, response) = bob.respond(&initiation, BOB_INDEX, 1).unwrap();
        for (at, value) in [(0, 0), (0, 2), (0, 3), (0, 4), (0, 255), (1, 1), (2, 1), (3, 1)] {
            let mut altered = initiation;
            altered[at] = value;
            alice.mend(&mut altered);
            assert_eq!(bob.authenticate(&altered).err(), Some(HandshakeError::BadMac1));
            let mut altered = response;
            altered[at] = if value == 2 { 1 } else { value };
            bob.mend(&mut altered);
            assert_eq!(alice.finish(&initiator, &altered).err(), Some(HandshakeError::BadMac1));
        }
    }

    #[test]
    fn another_preshared_key_is_refused() {
        let [alice, mut bob] = parties(4, &preshared(7));
        let (initiator, initiation) = alice.initiate(ALICE_INDEX, 1);
        for wrong in [preshared(8), PresharedKey::default()] {
            bob.remote.set_preshared_key(wrong);
            let (_, response) = bob.respond(&initiation, BOB_INDEX, 1).unwrap();
            assert_eq!(alice.finish(&initiator, &response).err(), Some(HandshakeError::Decrypt));
        }
        bob.remote.set_preshared_key(preshared(7));
        let (_, response) = bob.respond(&initiation, BOB_INDEX, 1).unwrap();
        assert!(alice.finish(&initiator, &response).is_ok());
    }

    #[test]
    fn another_remote_is_refused() {
        let [alice, bob] = parties(5, &preshared(7));
        let [mallory, _] = parties(6, &preshared(7));
        let mallory_key = *mallory.identity.public_key();
        let mallory_of_bob = RemoteStatic::new(&bob.identity, mallory_key, preshared(7));
        let (initiator, initiation) = alice.initiate(ALICE_INDEX, 1);

        // Made for Bob, come to Mallory.
        assert_eq!(
            open_initiation(&mallory.identity, &initiation).err(),
            Some(HandshakeError::BadMac1)
        );
        // Checked against somebody else than its sender.
        let opened = open_initiation(&bob.identity, &initiation).unwrap();
        assert_eq!(opened.authenticate(&mallory_of_bob).err(), Some(HandshakeError::UnknownSender));
        let authentic = bob.authenticate(&initiation).unwrap();
        assert_eq!(
            authentic.respond(&mallory_of_bob, BOB_INDEX, None, &mut rng(1)).err(),
            Some(HandshakeError::UnknownSender)
        );
        // Answered by Mallory, who can do all but what takes Bob's private key.
        let mallory_as_bob =
            Identity { public_key: *bob.identity.public_key(), ..mallory.identity };
        let mut response = [0; RESPONSE_LEN];
        response[0] = TYPE_RESPONSE;
        response[response::RECEIVER..response::EPHEMERAL].copy_from_slice(&ALICE_INDEX.to_wire());
        response[response::EPHEMERAL..response::NOTHING]
            .copy_from_slice(mallory_as_bob.private_key.public_key().as_bytes());
        bob.mend(&mut response);
        assert_eq!(alice.finish(&initiator, &response).err(), Some(HandshakeError::Decrypt));
        // Sent by Mallory in Alice's name: her public key, but not her private one.
        let alice_by_mallory =
            Identity::claiming(mallory_as_bob.private_key.clone(), *alice.identity.public_key());
        let bob_of_mallory =
            RemoteStatic::new(&alice_by_mallory, *bob.identity.public_key(), preshared(7));
        let (_, initiation) = initiate(
            &alice_by_mallory,
            &bob_of_mallory,
            ALICE_INDEX,
            timestamp(2),
            None,
            &mut rng(2),
        )
        .unwrap();
        let opened = open_initiation(&bob.identity, &initiation).unwrap();
        assert_eq!(opened.sender(), *alice.identity.public_key());
        assert_eq!(opened.authenticate(&bob.remote).err(), Some(HandshakeError::Decrypt));
    }

    #[test]
    fn response_to_another_handshake_is_refused() {
        let [alice, bob] = parties(7, &preshared(7));
        let (first, initiation) = alice.initiate(ALICE_INDEX, 1);
        let (second, _) = alice.initiate(BOB_INDEX, 2);
        let (third, _) = alice.initiate(ALICE_INDEX, 3);
        let (_, response) = bob.respond(&initiation, BOB_INDEX, 1).unwrap();
        assert_eq!(alice.finish(&second, &response).err(), Some(HandshakeError::WrongIndex));
        // The index alone does not make it fit.
        assert_eq!(alice.finish(&third, &response).err(), Some(HandshakeError::Decrypt));
        assert!(alice.finish(&first, &response).is_ok());
    }

    /// An initiation of Alice's to Bob in which the secrets and public keys are as given.
    fn forged_initiation(
        alice: &Party,
        ephemeral: &PublicKey,
        ephemeral_static: &[u8; KEY_LEN],
        sender: &PublicKey,
        static_static: &[u8; KEY_LEN],
    ) -> [u8; INITIATION_LEN] {
        use initiation::{EPHEMERAL, MAC1, STATIC, TIMESTAMP};
        let mut message = [0; INITIATION_LEN];
        message[0] = TYPE_INITIATION;
        message[EPHEMERAL..STATIC].copy_from_slice(ephemeral.as_bytes());
        let mut transcript = Transcript::new(alice.remote.public_key());
        transcript.mix_ephemeral(ephemeral);
        let key = transcript.mix_secret_for_key(ephemeral_static);
        message[STATIC..][..KEY_LEN].copy_from_slice(sender.as_bytes());
        transcript.seal(&key, &mut message[STATIC..TIMESTAMP]);
        let key = transcript.mix_secret_for_key(static_static);
        message[TIMESTAMP..][..TIMESTAMP_LEN].copy_from_slice(timestamp(1).as_bytes());
        transcript.seal(&key, &mut message[TIMESTAMP..MAC1]);
        alice.mend(&mut message);
        message
    }

    #[test]
    fn initiation_with_a_point_of_low_order_is_refused() {
        let [alice, bob] = parties(8, &preshared(7));
        let (bob_key, alice_key) = (alice.remote.public_key(), alice.identity.public_key());
        let ephemeral = Curve::prepare(&PrivateKey::generate(&mut rng(8)));
        let ephemeral_key = Curve::public_key(&ephemeral);
        let ephemeral_static = dh::agree(&ephemeral, bob_key).unwrap();
        let static_static = alice.remote.static_static().unwrap();
        let zero = [0; KEY_LEN];

        // What `forged_initiation` makes is right, but for what it is told to make wrong.
        let fair =
            forged_initiation(&alice, &ephemeral_key, &ephemeral_static, alice_key, static_static);
        assert!(bob.authenticate(&fair).is_ok());

        for point in low_order_points() {
            // es
            let forged = forged_initiation(&alice, &point, &zero, alice_key, static_static);
            assert_eq!(
                open_initiation(&bob.identity, &forged).err(),
                Some(HandshakeError::LowOrderPoint)
            );
            // ss
            let forged =
                forged_initiation(&alice, &ephemeral_key, &ephemeral_static, &point, &zero);
            let opened = open_initiation(&bob.identity, &forged).unwrap();
            assert_eq!(opened.sender(), point);
            let remote = RemoteStatic::new(&bob.identity, point, preshared(7));
            assert_eq!(opened.authenticate(&remote).err(), Some(HandshakeError::LowOrderPoint));
        }
    }

    #[test]
    fn static_with_static_is_agreed_once_and_only_when_it_is_needed() {
        let [alice, bob] = parties(12, &preshared(7));
        let cost = |act: &dyn Fn()| {
            let before = dh::agreement_count();
            act();
            dh::agreement_count() - before
        };
        let begin = |remote: &RemoteStatic| {
            let _ = initiate(&alice.identity, remote, ALICE_INDEX, timestamp(1), None, &mut rng(1));
        };
        assert_eq!(cost(&|| drop(parties(13, &preshared(7)))), 0);
        assert_eq!([(); 2].map(|()| cost(&|| begin(&alice.remote))), [2, 1]);
        let (_, initiation) = alice.initiate(ALICE_INDEX, 1);
        let authenticate = || assert!(bob.authenticate(&initiation).is_ok());
        assert_eq!([(); 2].map(|()| cost(&authenticate)), [2, 1]);
        // That there is none is remembered too.
        let point = low_order_points().next().unwrap();
        let nobody = RemoteStatic::new(&alice.identity, point, preshared(7));
        assert_eq!([(); 2].map(|()| cost(&|| begin(&nobody))), [1, 0]);
    }

    /// Else a message that was opened just before the private key changed would spoil what is kept of
    /// its sender for the new one.
    #[test]
    fn static_with_static_is_of_the_identity_for_which_the_remote_was_made() {
        let [alice, bob] = parties(14, &preshared(7));
        let (_, old) = alice.initiate(ALICE_INDEX, 1);
        let other = Identity::new(PrivateKey::generate(&mut rng(15)));
        let of_other = RemoteStatic::new(&other, *alice.identity.public_key(), preshared(7));
        let opened = open_initiation(&bob.identity, &old).unwrap();
        assert_eq!(opened.authenticate(&of_other).err(), Some(HandshakeError::Decrypt));

        let to_other = RemoteStatic::new(&alice.identity, *other.public_key(), preshared(7));
        let alice = Party { remote: to_other, ..alice };
        let (_, new) = alice.initiate(ALICE_INDEX, 2);
        assert!(open_initiation(&other, &new).unwrap().authenticate(&of_other).is_ok());
    }

    #[test]
    fn nothing_is_sent_to_a_point_of_low_order() {
        let [alice, bob] = parties(8, &preshared(7));
        let authentic = |sender: PublicKey, ephemeral: PublicKey| AuthenticInitiation {
            transcript: Transcript::new(bob.identity.public_key()),
            sender,
            ephemeral,
            remote_index: ALICE_INDEX,
            timestamp: timestamp(1),
        };
        let alice_key = *alice.identity.public_key();
        for point in low_order_points() {
            let remote = RemoteStatic::new(&alice.identity, point, preshared(7));
            let refused = Some(HandshakeError::LowOrderPoint);
            let begun =
                initiate(&alice.identity, &remote, ALICE_INDEX, timestamp(1), None, &mut rng(1));
            assert_eq!(begun.err(), refused);
            // ee, se
            let answered =
                authentic(alice_key, point).respond(&bob.remote, BOB_INDEX, None, &mut rng(1));
            assert_eq!(answered.err(), refused);
            let answered =
                authentic(point, alice_key).respond(&remote, BOB_INDEX, None, &mut rng(1));
            assert_eq!(answered.err(), refused);
        }
    }

    #[test]
    fn response_with_a_point_of_low_order_is_refused() {
        let [alice, bob] = parties(9, &preshared(7));
        let (initiator, _) = alice.initiate(ALICE_INDEX, 1);
        let forge = |ephemeral: &PublicKey, secrets: [&[u8; KEY_LEN]; 2]| {
            use response::{EPHEMERAL, MAC1, NOTHING, RECEIVER};
            let mut message = [0; RESPONSE_LEN];
            message[0] = TYPE_RESPONSE;
            message[RECEIVER..EPHEMERAL].copy_from_slice(&ALICE_INDEX.to_wire());
            message[EPHEMERAL..NOTHING].copy_from_slice(ephemeral.as_bytes());
            let mut transcript = initiator.transcript.clone();
            transcript.mix_ephemeral(ephemeral);
            secrets.iter().for_each(|secret| transcript.mix_secret(secret));
            let key = transcript.mix_preshared_key(preshared(7).expose());
            transcript.seal(&key, &mut message[NOTHING..MAC1]);
            bob.mend(&mut message);
            message
        };
        let ephemeral = Curve::prepare(&PrivateKey::generate(&mut rng(9)));
        let ephemeral_ephemeral =
            dh::agree(&ephemeral, &Curve::public_key(&initiator.ephemeral)).unwrap();
        let static_ephemeral = dh::agree(&ephemeral, bob.remote.public_key()).unwrap();
        let fair = forge(&Curve::public_key(&ephemeral), [&ephemeral_ephemeral, &static_ephemeral]);
        assert!(alice.finish(&initiator, &fair).is_ok());
        for point in low_order_points() {
            let forged = forge(&point, [&[0; KEY_LEN]; 2]);
            assert_eq!(
                alice.finish(&initiator, &forged).err(),
                Some(HandshakeError::LowOrderPoint)
            );
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let [alice, bob] = parties(10, &preshared(7));
        let (initiator, initiation) = alice.initiate(ALICE_INDEX, 1);
        let opened = open_initiation(&bob.identity, &initiation).unwrap();
        let printed = format!("{:?} {:?} {initiator:?} {opened:?}", alice.identity, alice.remote);
        let authentic = opened.authenticate(&bob.remote).unwrap();
        let printed = format!("{printed} {authentic:?}");
        let (established, _) =
            authentic.respond(&bob.remote, BOB_INDEX, None, &mut rng(1)).unwrap();
        let printed = format!("{printed} {established:?} {:?}", Cookie::from_bytes([7; 16]));
        assert!(printed.contains("TransportKeys { .. }") && printed.contains("Cookie(…)"));
        // The preshared key and the cookie are sevens; here as a slice and as hex.
        assert!(!printed.contains("7, 7, 7") && !printed.contains("070707"), "{printed}");
        let private = format!("{:?}", &alice.identity.private_key.expose()[..4]);
        assert!(!printed.contains(private.trim_matches(['[', ']'])), "{printed}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_two_parties_agree(
            keys in any::<[[u8; KEY_LEN]; 2]>(),
            preshared_key: [u8; KEY_LEN],
            indexes: [[u8; 4]; 2],
            seed: u64,
        ) {
            let [alice, bob] = keys.map(|key| Identity::new(PrivateKey::from_bytes(key)));
            let [alice_index, bob_index] = indexes.map(ReceiverIndex::from_wire);
            let preshared_key = PresharedKey::from_bytes(preshared_key);
            let to_bob = RemoteStatic::new(&alice, *bob.public_key(), preshared_key.clone());
            let to_alice = RemoteStatic::new(&bob, *alice.public_key(), preshared_key);
            let alice = Party { identity: alice, remote: to_bob };
            let bob = Party { identity: bob, remote: to_alice };
            let (initiator, initiation) = alice.initiate(alice_index, seed >> 1);
            let (of_bob, response) = bob.respond(&initiation, bob_index, seed).unwrap();
            assert_agree(&alice.finish(&initiator, &response).unwrap(), &of_bob);
        }

        #[test]
        fn bytes_from_the_network_never_panic(
            mut initiation in any::<[[u8; 37]; 4]>().prop_map(|parts| -> [u8; INITIATION_LEN] {
                parts.concat().try_into().unwrap()
            }),
            mut response in any::<[[u8; 23]; 4]>().prop_map(|parts| -> [u8; RESPONSE_LEN] {
                parts.concat().try_into().unwrap()
            }),
            any_bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let [alice, bob] = parties(11, &preshared(7));
            let (initiator, _) = alice.initiate(ALICE_INDEX, 1);
            for _ in 0..2 {
                prop_assert!(bob.authenticate(&initiation).is_err());
                prop_assert!(alice.finish(&initiator, &response).is_err());
                // Once more, far enough to reach the costly steps.
                initiation[..4].copy_from_slice(&[TYPE_INITIATION, 0, 0, 0]);
                response[..4].copy_from_slice(&[TYPE_RESPONSE, 0, 0, 0]);
                response[response::RECEIVER..response::EPHEMERAL]
                    .copy_from_slice(&ALICE_INDEX.to_wire());
                alice.mend(&mut initiation);
                bob.mend(&mut response);
                prop_assert!(check_mac1(&bob.identity, &initiation));
                prop_assert!(check_mac1(&alice.identity, &response));
            }
            prop_assert!(!check_mac1(&bob.identity, &any_bytes));
            prop_assert!(!mac::check_mac2(&Cookie::from_bytes([1; 16]), &any_bytes));
            let _ = mac1_of(&any_bytes);
        }
    }
}
