//! Keys that protect nothing, or with which no handshake succeeds.

use std::collections::HashMap;

use super::{Page, Rule, Severity};
use crate::check::Finding;
use crate::config::Span;
use crate::key::{PrivateKey, PublicKey};

const KEY_LEN: usize = 32;

/// Points of low order on Curve25519 and its twist (RFC 7748, section 6.1), in all the ways in which
/// bytes with the highest bit clear name them: a shared secret with any of them is zero.
const OF_LOW_ORDER: [[u8; KEY_LEN]; 7] = [
    [0; KEY_LEN],
    small(1),
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4,
        0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49,
        0xb8, 0x00,
    ],
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef,
        0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f,
        0x11, 0x57,
    ],
    near_prime(0xec),
    near_prime(0xed),
    near_prime(0xee),
];

const fn small(number: u8) -> [u8; KEY_LEN] {
    let mut bytes = [0; KEY_LEN];
    bytes[0] = number;
    bytes
}

/// 2²⁵⁵ − 256 and `low`.
const fn near_prime(low: u8) -> [u8; KEY_LEN] {
    let mut bytes = [0xff; KEY_LEN];
    bytes[0] = low;
    bytes[KEY_LEN - 1] = 0x7f;
    bytes
}

fn is_of_low_order(key: &PublicKey) -> bool {
    let mut bytes = *key.as_bytes();
    bytes[KEY_LEN - 1] &= 0x7f;
    OF_LOW_ORDER.contains(&bytes)
}

pub fn find(page: &Page<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    let interface = &page.config.interface;
    let private_key = &interface.private_key;
    if private_key.value == PrivateKey::from_bytes([0; KEY_LEN]) {
        found.push(
            page.found(
                (Severity::Error, Rule::PrivateKeyZero),
                "the private key is zero: wg(8) takes that for no key, and everybody knows it",
                private_key.span,
                "nothing but zeros",
            )
            .help("write a key of `tidegate genkey`"),
        );
    } else if !interface.is_private_key_clamped {
        found.push(
            page.found(
                (Severity::Warning, Rule::PrivateKeyUnclamped),
                "`PrivateKey` does not look like one: a public or a preshared key may stand here",
                private_key.span,
                "some of its bits are never so in a key of genkey",
            )
            .help(
                "compare what `tidegate pubkey` makes of it with the PublicKey at the other side; \
                 `tidegate genkey` makes a private key",
            ),
        );
    }

    let mut public_keys: HashMap<PublicKey, Span> =
        page.config.peers.iter().map(|peer| (*peer.public_key, peer.public_key.span)).collect();
    public_keys.insert(private_key.public_key(), private_key.span);
    for peer in &page.config.peers {
        let label = page.label(peer);
        if is_of_low_order(&peer.public_key) {
            found.push(
                page.found(
                    (Severity::Error, Rule::PublicKeyOfLowOrder),
                    format!("no handshake with {label} can succeed: its PublicKey is no real key"),
                    peer.public_key.span,
                    "a point of low order, which every implementation refuses",
                )
                .help("write what `tidegate pubkey` makes of the other side's private key"),
            );
        }
        let Some(preshared_key) = &peer.preshared_key else { continue };
        const REUSED: (Severity, Rule) = (Severity::Warning, Rule::PresharedKeyReused);
        if preshared_key.is_zero() {
            found.push(
                page.found(
                    (Severity::Warning, Rule::PresharedKeyZero),
                    format!("there is no preshared key with {label}: zero means none"),
                    preshared_key.span,
                    "nothing but zeros",
                )
                .help("write a key of `tidegate genpsk` at both sides, or remove the line"),
            );
        } else if PrivateKey::from_bytes(*preshared_key.expose()) == private_key.value {
            found.push(
                page.found(
                    REUSED,
                    format!("{label} gets to know this interface's private key as preshared key"),
                    preshared_key.span,
                    "the same as `PrivateKey`",
                )
                .at(page.file, private_key.span, "here")
                .help("write a key of `tidegate genpsk` at both sides, and make a new private key"),
            );
        } else if let Some(&span) = public_keys.get(&PublicKey::from_bytes(*preshared_key.expose()))
        {
            let what =
                if span == private_key.span { "belongs to this" } else { "the same as this" };
            found.push(
                page.found(
                    REUSED,
                    format!("the preshared key with {label} is a public key, and so no secret"),
                    preshared_key.span,
                    "a public key",
                )
                .at(page.file, span, what)
                .help("write a key of `tidegate genpsk` at both sides"),
            );
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::tests::{PEERS, PRIVATE, file, findings, rules};
    use super::*;

    #[test]
    fn points_of_low_order_give_a_secret_of_zeros() {
        for point in OF_LOW_ORDER {
            let secret = x25519_dalek::x25519([7; KEY_LEN], point);
            assert_eq!(secret, [0; KEY_LEN], "{point:02x?}");
            let mut high = point;
            high[KEY_LEN - 1] |= 0x80;
            assert!(is_of_low_order(&PublicKey::from_bytes(high)));
        }
        assert!(!is_of_low_order(&PublicKey::from_bytes(small(9))));
    }

    #[test]
    fn keys_that_are_none_are_found() {
        let zero = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        let only = |text: &str| {
            let found = findings(text);
            assert_eq!(found.len(), 1, "{found:#?}");
            (found[0].severity, found[0].rule)
        };
        let good = file("", "");
        let expected = (Severity::Error, Rule::PrivateKeyZero);
        assert_eq!(only(&good.replace(PRIVATE, zero)), expected);
        let expected = (Severity::Warning, Rule::PrivateKeyUnclamped);
        assert_eq!(only(&good.replace(PRIVATE, PEERS[1])), expected);
        let expected = (Severity::Error, Rule::PublicKeyOfLowOrder);
        assert_eq!(only(&good.replace(PEERS[0], zero)), expected);
        let psk = |key: &str| rules("", &format!("PresharedKey = {key}"));
        assert_eq!(psk(zero), [Rule::PresharedKeyZero]);
        assert_eq!(psk(PRIVATE), [Rule::PresharedKeyReused]);
        assert_eq!(psk(PEERS[0]), [Rule::PresharedKeyReused]);
        assert_eq!(psk(PEERS[1]), []);
    }
}
