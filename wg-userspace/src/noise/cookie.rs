//! Cookies and the reply that carries one (§5.4.7).

use std::net::{IpAddr, SocketAddr};

use chacha20poly1305::{AeadInOut, KeyInit, XChaCha20Poly1305};
use rand_core::CryptoRng;
use wg_common::id::ReceiverIndex;
use wg_common::protocol::{
    COOKIE_REPLY_LEN, KEY_LEN, LABEL_COOKIE, MAC_LEN, TAG_LEN, TYPE_COOKIE_REPLY,
};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::symmetric::{hash, mac};
use super::{HandshakeError, Identity, RemoteStatic, mac1_of};
use crate::key::PublicKey;

/// Bytes of a cookie.
const COOKIE_LEN: usize = 16;
/// Bytes of the nonce of XChaCha20-Poly1305.
const NONCE_LEN: usize = 24;

/// Where the sender index of a handshake initiation or response stands.
const SENDER: usize = 4;

// Where the fields of a cookie reply stand.
const RECEIVER: usize = 4;
const NONCE: usize = RECEIVER + 4;
const COOKIE: usize = NONCE + NONCE_LEN;
const TAG: usize = COOKIE + COOKIE_LEN;
const _: () = assert!(TAG + TAG_LEN == COOKIE_REPLY_LEN);

/// What a responder under load gives to an address, and wants to see in mac2 of messages from there.
/// Wiped on drop.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Cookie([u8; COOKIE_LEN]);

impl Cookie {
    /// The cookie of these bytes.
    pub const fn from_bytes(bytes: [u8; COOKIE_LEN]) -> Self {
        Self(bytes)
    }

    /// The secret bytes.
    pub const fn expose(&self) -> &[u8; COOKIE_LEN] {
        &self.0
    }

    /// Makes the reply that tells this cookie to the sender of a handshake message with the sender
    /// index `receiver` and this mac1 (see [`super::mac1_of`]).
    pub fn reply(
        &self,
        identity: &Identity,
        receiver: ReceiverIndex,
        mac1: &[u8; MAC_LEN],
        rng: &mut (impl CryptoRng + ?Sized),
    ) -> [u8; COOKIE_REPLY_LEN] {
        let mut nonce = [0; NONCE_LEN];
        rng.fill_bytes(&mut nonce);
        let mut reply = [0; COOKIE_REPLY_LEN];
        reply[0] = TYPE_COOKIE_REPLY;
        reply[RECEIVER..NONCE].copy_from_slice(&receiver.to_wire());
        reply[NONCE..COOKIE].copy_from_slice(&nonce);
        reply[COOKIE..TAG].copy_from_slice(&self.0);
        let tag = XChaCha20Poly1305::new(&identity.cookie_key.into())
            .encrypt_inout_detached(&nonce.into(), mac1, (&mut reply[COOKIE..TAG]).into())
            .expect("far shorter than the cipher's limit");
        reply[TAG..].copy_from_slice(&tag);
        reply
    }

    /// As [`reply`](Self::reply), to whoever sent `message`; `None` if that is neither a handshake
    /// initiation nor a response.
    pub fn reply_to(
        &self,
        identity: &Identity,
        message: &[u8],
        rng: &mut (impl CryptoRng + ?Sized),
    ) -> Option<[u8; COOKIE_REPLY_LEN]> {
        let mac1 = mac1_of(message)?;
        let sender = ReceiverIndex::from_wire(*message[SENDER..].first_chunk()?);
        Some(self.reply(identity, sender, &mac1, rng))
    }

    /// Opens a reply to the message that we sent to `remote` with the sender index `sent` and this
    /// mac1 (see [`super::mac1_of`]).
    ///
    /// # Errors
    /// [`HandshakeError::WrongIndex`] if it answers another message by its index,
    /// [`HandshakeError::Decrypt`] if it does by its tag, or is not from `remote`.
    pub fn open_reply(
        reply: &[u8; COOKIE_REPLY_LEN],
        remote: &RemoteStatic,
        sent: ReceiverIndex,
        mac1: &[u8; MAC_LEN],
    ) -> Result<Self, HandshakeError> {
        let receiver = *reply[RECEIVER..].first_chunk().expect("fixed length");
        if ReceiverIndex::from_wire(receiver) != sent {
            return Err(HandshakeError::WrongIndex);
        }
        let nonce: [u8; NONCE_LEN] = *reply[NONCE..].first_chunk().expect("fixed length");
        let tag: [u8; TAG_LEN] = *reply[TAG..].first_chunk().expect("fixed length");
        let mut cookie = Self(*reply[COOKIE..].first_chunk().expect("fixed length"));
        XChaCha20Poly1305::new(&cookie_key(remote.public_key()).into())
            .decrypt_inout_detached(
                &nonce.into(),
                mac1,
                cookie.0.as_mut_slice().into(),
                &tag.into(),
            )
            .map_err(|_| HandshakeError::Decrypt)?;
        Ok(cookie)
    }
}

impl std::fmt::Debug for Cookie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cookie(…)")
    }
}

/// Of what a responder makes its cookies: without it, nobody can tell the cookie of an address.
/// Wiped on drop.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct CookieSecret([u8; KEY_LEN]);

impl CookieSecret {
    /// A fresh secret.
    pub fn generate(rng: &mut (impl CryptoRng + ?Sized)) -> Self {
        let mut secret = Self([0; KEY_LEN]);
        rng.fill_bytes(&mut secret.0);
        secret
    }

    /// The cookie of an address and port.
    ///
    /// The whitepaper's §5.4.7 and the kernel bind it to both: behind one NAT, or on one host, none
    /// can use another's.
    pub fn cookie(&self, from: SocketAddr) -> Cookie {
        let port = from.port().to_be_bytes();
        Cookie(match from.ip() {
            IpAddr::V4(ip) => {
                let [a, b, c, d] = ip.octets();
                mac(&self.0, &[a, b, c, d, port[0], port[1]])
            }
            IpAddr::V6(ip) => {
                let mut bytes = [0; 18];
                bytes[..16].copy_from_slice(&ip.octets());
                bytes[16..].copy_from_slice(&port);
                mac(&self.0, &bytes)
            }
        })
    }
}

impl std::fmt::Debug for CookieSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CookieSecret(…)")
    }
}

/// The key of cookie replies from the holder of `public_key`.
pub(super) fn cookie_key(public_key: &PublicKey) -> [u8; KEY_LEN] {
    hash(&[LABEL_COOKIE, public_key.as_bytes()])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::fixture::*;
    use super::super::{check_mac2, initiate, mac1_of};
    use super::*;

    #[test]
    fn cookie_is_told_and_shown() {
        let [alice, bob] = parties(1, &preshared(7));
        let cookie = Cookie::from_bytes([9; COOKIE_LEN]);
        let (_, initiation) = alice.initiate(ALICE_INDEX, 1);
        assert!(!check_mac2(&cookie, &initiation));
        let mac1 = mac1_of(&initiation).unwrap();
        let reply = cookie.reply(&bob.identity, ALICE_INDEX, &mac1, &mut rng(2));

        let told = Cookie::open_reply(&reply, &alice.remote, ALICE_INDEX, &mac1).unwrap();
        assert_eq!(told.expose(), cookie.expose());
        let (_, initiation) = initiate(
            &alice.identity,
            &alice.remote,
            ALICE_INDEX,
            timestamp(2),
            Some(&told),
            &mut rng(3),
        )
        .unwrap();
        assert!(check_mac2(&cookie, &initiation));
    }

    #[test]
    fn each_flipped_bit_of_a_reply_is_refused() {
        let [alice, bob] = parties(1, &preshared(7));
        let cookie = Cookie::from_bytes([9; COOKIE_LEN]);
        let mac1 = [4; MAC_LEN];
        let reply = cookie.reply(&bob.identity, ALICE_INDEX, &mac1, &mut rng(2));
        let open =
            |reply: &_, mac1: &_| Cookie::open_reply(reply, &alice.remote, ALICE_INDEX, mac1).err();
        assert_eq!(open(&reply, &mac1), None);
        for bit in 8 * RECEIVER..8 * COOKIE_REPLY_LEN {
            let mut altered = reply;
            altered[bit / 8] ^= 1 << (bit % 8);
            let error =
                if bit / 8 < NONCE { HandshakeError::WrongIndex } else { HandshakeError::Decrypt };
            assert_eq!(open(&altered, &mac1), Some(error), "bit {bit}");
        }
        assert_eq!(open(&reply, &[5; MAC_LEN]), Some(HandshakeError::Decrypt));
        // A reply of somebody else's.
        let reply = cookie.reply(&alice.identity, ALICE_INDEX, &mac1, &mut rng(2));
        assert_eq!(open(&reply, &mac1), Some(HandshakeError::Decrypt));
    }

    #[test]
    fn a_reply_goes_to_the_sender_of_either_handshake_message_and_to_none_other() {
        let [alice, bob] = parties(1, &preshared(7));
        let cookie = Cookie::from_bytes([9; COOKIE_LEN]);
        let (_, initiation) = alice.initiate(ALICE_INDEX, 1);
        let (_, response) = bob.respond(&initiation, BOB_INDEX, 1).unwrap();

        let reply = cookie.reply_to(&bob.identity, &initiation, &mut rng(2)).unwrap();
        let mac1 = mac1_of(&initiation).unwrap();
        assert!(Cookie::open_reply(&reply, &alice.remote, ALICE_INDEX, &mac1).is_ok());
        let reply = cookie.reply_to(&alice.identity, &response, &mut rng(2)).unwrap();
        let mac1 = mac1_of(&response).unwrap();
        assert!(Cookie::open_reply(&reply, &bob.remote, BOB_INDEX, &mac1).is_ok());

        for other in [&reply[..], &initiation[..147], &[4; 32], &[]] {
            assert!(cookie.reply_to(&bob.identity, other, &mut rng(2)).is_none());
        }
    }

    #[test]
    fn a_cookie_is_bound_to_address_port_and_secret() {
        let [one, other] = [1, 2].map(|seed| CookieSecret::generate(&mut rng(seed)));
        let cookie =
            |secret: &CookieSecret, from: &str| *secret.cookie(from.parse().unwrap()).expose();
        let addresses = [
            "192.0.2.1:1000",
            "192.0.2.1:1001",
            "192.0.2.2:1000",
            "[2001:db8::1]:1000",
            "[2001:db8::1]:1001",
            "[2001:db8::2]:1000",
            "[::ffff:192.0.2.1]:1000",
        ];
        let cookies: std::collections::BTreeSet<_> =
            addresses.iter().flat_map(|from| [cookie(&one, from), cookie(&other, from)]).collect();
        assert_eq!(cookies.len(), 2 * addresses.len());
        assert_eq!(cookie(&one, addresses[0]), cookie(&one, addresses[0]));
        // A zone and a flow label are no part of an address on the wire.
        assert_eq!(cookie(&one, "[fe80::1%3]:1000"), cookie(&one, "[fe80::1]:1000"));
    }

    proptest! {
        #[test]
        fn any_reply_is_refused_without_panic(parts: [[u8; 32]; 2], mac1: [u8; MAC_LEN]) {
            let [alice, _] = parties(1, &preshared(7));
            let mut reply: [u8; COOKIE_REPLY_LEN] = parts.concat().try_into().unwrap();
            prop_assert!(Cookie::open_reply(&reply, &alice.remote, ALICE_INDEX, &mac1).is_err());
            reply[RECEIVER..NONCE].copy_from_slice(&ALICE_INDEX.to_wire());
            prop_assert!(Cookie::open_reply(&reply, &alice.remote, ALICE_INDEX, &mac1).is_err());
        }
    }
}
