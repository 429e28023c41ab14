//! mac1 and mac2 (§5.4.4): the last 32 bytes of both handshake messages.

use subtle::ConstantTimeEq;
use wg_common::message::{Message, classify};
use wg_common::protocol::{KEY_LEN, LABEL_MAC1, MAC_LEN};

use super::symmetric::{hash, mac};
use super::{Cookie, Identity, RemoteStatic};
use crate::key::PublicKey;

/// The key of mac1 in messages to the holder of `public_key`.
pub(super) fn mac1_key(public_key: &PublicKey) -> [u8; KEY_LEN] {
    hash(&[LABEL_MAC1, public_key.as_bytes()])
}

/// Whether `message` is a handshake initiation or response that was made for our public key.
///
/// Says nothing about who made it: our public key is no secret. [`super::open_initiation`] and
/// [`super::Initiator::finish`] look too; this is for who wants to know before spending more.
pub fn check_mac1(identity: &Identity, message: &[u8]) -> bool {
    let Some((body, mac1, _)) = split(message) else { return false };
    mac(&identity.mac1_key, body).ct_eq(mac1).into()
}

/// Whether `message` is a handshake initiation or response whose sender knows `cookie`.
pub fn check_mac2(cookie: &Cookie, message: &[u8]) -> bool {
    let Some((_, _, mac2)) = split(message) else { return false };
    mac(cookie.expose(), &message[..message.len() - MAC_LEN]).ct_eq(mac2).into()
}

/// mac1 of a handshake initiation or response; a cookie reply to the message is bound to it.
pub fn mac1_of(message: &[u8]) -> Option<[u8; MAC_LEN]> {
    split(message).map(|(_, mac1, _)| *mac1)
}

/// Writes mac1, and with a cookie mac2, at the end of an otherwise finished message to `remote`.
/// Without a cookie mac2 is left as it is: zero.
pub(super) fn write_macs(message: &mut [u8], remote: &RemoteStatic, cookie: Option<&Cookie>) {
    let (rest, mac2) = message.split_last_chunk_mut::<MAC_LEN>().expect("as long as two macs");
    let (body, mac1) = rest.split_last_chunk_mut::<MAC_LEN>().expect("as long as two macs");
    *mac1 = mac(&remote.mac1_key, body);
    if let Some(cookie) = cookie {
        *mac2 = mac(cookie.expose(), rest);
    }
}

/// The parts of a handshake initiation or response: what mac1 covers, mac1, mac2.
fn split(message: &[u8]) -> Option<(&[u8], &[u8; MAC_LEN], &[u8; MAC_LEN])> {
    let (Message::Initiation | Message::Response(_)) = classify(message).ok()? else {
        return None;
    };
    let (rest, mac2) = message.split_last_chunk()?;
    let (body, mac1) = rest.split_last_chunk()?;
    Some((body, mac1, mac2))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::*;
    use super::super::initiate;
    use super::*;

    #[test]
    fn macs_are_only_those_of_handshake_messages() {
        let [alice, bob] = parties(1, &preshared(7));
        let cookie = Cookie::from_bytes([5; 16]);
        let (_, initiation) = initiate(
            &alice.identity,
            &alice.remote,
            ALICE_INDEX,
            timestamp(1),
            Some(&cookie),
            &mut rng(1),
        )
        .unwrap();
        assert!(check_mac1(&bob.identity, &initiation) && check_mac2(&cookie, &initiation));
        assert!(!check_mac1(&alice.identity, &initiation));
        assert!(!check_mac2(&Cookie::from_bytes([6; 16]), &initiation));
        assert_eq!(mac1_of(&initiation).unwrap(), initiation[116..132]);

        // Every other length, and every other message, has none.
        for len in (0..initiation.len()).chain([149, 300]) {
            let mut message = initiation.to_vec();
            message.resize(len, 0);
            if len >= 2 * MAC_LEN {
                write_macs(&mut message, &alice.remote, Some(&cookie));
            }
            assert!(!check_mac1(&bob.identity, &message) && !check_mac2(&cookie, &message));
            assert_eq!(mac1_of(&message), None);
        }
        for kind in [0, 2, 3, 4, 5, 255] {
            let mut message = initiation;
            message[0] = kind;
            write_macs(&mut message, &alice.remote, Some(&cookie));
            assert!(!check_mac1(&bob.identity, &message) && !check_mac2(&cookie, &message));
        }
    }

    #[test]
    fn mac2_is_zero_without_a_cookie() {
        let [alice, bob] = parties(1, &preshared(7));
        let (_, initiation) = alice.initiate(ALICE_INDEX, 1);
        let (_, response) = bob.respond(&initiation, BOB_INDEX, 1).unwrap();
        assert_eq!(initiation[132..], [0; MAC_LEN]);
        assert_eq!(response[76..], [0; MAC_LEN]);
        assert!(check_mac1(&alice.identity, &response));
        assert_eq!(mac1_of(&response).unwrap(), response[60..76]);
    }
}
