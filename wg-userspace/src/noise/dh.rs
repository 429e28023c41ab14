//! Diffie–Hellman on Curve25519 (X25519, RFC 7748), behind a trait.

use subtle::ConstantTimeEq;
use wg_common::protocol::KEY_LEN;
use zeroize::Zeroizing;

use super::{Curve, HandshakeError};
use crate::key::{PrivateKey, PublicKey};

/// What two private keys share; wiped on drop.
pub type SharedSecret = Zeroizing<[u8; KEY_LEN]>;

/// An implementation of X25519. Its functions take the same time for every private key.
pub trait X25519 {
    /// A private key as this implementation computes with it; wiped on drop.
    type Prepared: Send + Sync;

    /// Prepares `private_key`, at the cost of one multiplication at most: whoever needs a key more
    /// than once keeps what comes of it.
    fn prepare(private_key: &PrivateKey) -> Self::Prepared;

    /// The public key of `private_key`.
    fn public_key(private_key: &Self::Prepared) -> PublicKey;

    /// The secret that `private_key` shares with the holder of `public_key`: all zero if
    /// `public_key` has low order.
    fn shared_secret(private_key: &Self::Prepared, public_key: &PublicKey) -> SharedSecret;
}

/// X25519 by `x25519-dalek`.
#[derive(Clone, Copy, Debug)]
pub struct Dalek;

impl X25519 for Dalek {
    type Prepared = x25519_dalek::StaticSecret;

    fn prepare(private_key: &PrivateKey) -> Self::Prepared {
        (*private_key.expose()).into()
    }

    fn public_key(private_key: &Self::Prepared) -> PublicKey {
        PublicKey::from_bytes(x25519_dalek::PublicKey::from(private_key).to_bytes())
    }

    fn shared_secret(private_key: &Self::Prepared, public_key: &PublicKey) -> SharedSecret {
        let public = x25519_dalek::PublicKey::from(*public_key.as_bytes());
        Zeroizing::new(private_key.diffie_hellman(&public).to_bytes())
    }
}

/// X25519 by AWS-LC: about twice as fast, but its C has to be built.
#[cfg(feature = "aws-lc")]
#[derive(Clone, Copy, Debug)]
pub struct AwsLc;

#[cfg(feature = "aws-lc")]
impl X25519 for AwsLc {
    /// Has the public key, too. Lies in memory of AWS-LC, whose `free` wipes.
    type Prepared = aws_lc_rs::agreement::PrivateKey;

    fn prepare(private_key: &PrivateKey) -> Self::Prepared {
        Self::Prepared::from_private_key(&aws_lc_rs::agreement::X25519, private_key.expose())
            .expect("any 32 bytes are a private key")
    }

    fn public_key(private_key: &Self::Prepared) -> PublicKey {
        let public = private_key.compute_public_key().expect("every private key has a public one");
        PublicKey::from_bytes(public.as_ref().try_into().expect("a point has 32 bytes"))
    }

    fn shared_secret(private_key: &Self::Prepared, public_key: &PublicKey) -> SharedSecret {
        use aws_lc_rs::agreement;
        let public = agreement::UnparsedPublicKey::new(&agreement::X25519, public_key.as_bytes());
        let mut secret = SharedSecret::default();
        // It refuses points of low order itself: then nothing is copied.
        let _ = agreement::agree(private_key, public, (), |bytes| {
            secret.copy_from_slice(bytes);
            Ok(())
        });
        secret
    }
}

/// The implementation that handshakes use.
#[cfg(not(feature = "aws-lc"))]
pub(super) type Chosen = Dalek;
/// The implementation that handshakes use.
#[cfg(feature = "aws-lc")]
pub(super) type Chosen = AwsLc;

/// A private key as handshakes compute with it.
pub(super) type Prepared = <Curve as X25519>::Prepared;

#[cfg(test)]
thread_local! {
    static AGREEMENTS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// How often this thread has made a shared secret.
#[cfg(test)]
pub(crate) fn agreement_count() -> u64 {
    AGREEMENTS.get()
}

/// X25519 that counts what it does: the costly steps of a handshake.
#[cfg(test)]
pub(super) struct Counted<C>(std::marker::PhantomData<C>);

#[cfg(test)]
impl<C: X25519> X25519 for Counted<C> {
    type Prepared = C::Prepared;

    fn prepare(private_key: &PrivateKey) -> Self::Prepared {
        C::prepare(private_key)
    }

    fn public_key(private_key: &Self::Prepared) -> PublicKey {
        C::public_key(private_key)
    }

    fn shared_secret(private_key: &Self::Prepared, public_key: &PublicKey) -> SharedSecret {
        AGREEMENTS.set(AGREEMENTS.get() + 1);
        C::shared_secret(private_key, public_key)
    }
}

/// The shared secret of a Diffie–Hellman step: all steps of a handshake come through here.
///
/// # Errors
/// [`HandshakeError::LowOrderPoint`] if it is zero. The whitepaper leaves that out; the kernel
/// refuses it too. Who sends such a point would make the step's secret known to everybody.
pub(super) fn agree(
    private_key: &Prepared,
    public_key: &PublicKey,
) -> Result<SharedSecret, HandshakeError> {
    let secret = Curve::shared_secret(private_key, public_key);
    if secret.ct_eq(&[0; KEY_LEN]).into() {
        return Err(HandshakeError::LowOrderPoint);
    }
    Ok(secret)
}

/// All 32 bytes that name a point of low order: the five of them, with the two that are not
/// reduced modulo 2^255 − 19, each with and without the bit that X25519 ignores.
#[cfg(test)]
pub(super) fn low_order_points() -> impl Iterator<Item = PublicKey> {
    let reduced = [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ];
    reduced.into_iter().flat_map(|hex| {
        let mut bytes = *PublicKey::from_hex(hex).unwrap().as_bytes();
        let point = PublicKey::from_bytes(bytes);
        bytes[KEY_LEN - 1] |= 0x80;
        [point, PublicKey::from_bytes(bytes)]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7748, section 6.1.
    #[test]
    fn shared_secret_is_that_of_the_rfc() {
        let bob = PrivateKey::from_hex(
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        )
        .unwrap();
        let bob_public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f";
        let alice_public =
            PublicKey::from_hex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
                .unwrap();
        let shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742";
        let bob = Curve::prepare(&bob);
        assert_eq!(Curve::public_key(&bob).to_hex(), bob_public);
        let secret = agree(&bob, &alice_public).unwrap();
        assert_eq!(PublicKey::from_bytes(*secret).to_hex(), shared);
    }

    /// Of Wycheproof; see `vectors/README.md`.
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Vector {
        tc_id: u32,
        public: String,
        private: String,
        shared: String,
    }

    /// Those that Wycheproof calls acceptable, too: low order, and numbers that are not reduced.
    fn agrees_with_wycheproof<C: X25519>() {
        let lines = include_str!("../../vectors/x25519.jsonl").lines();
        let mut count = 0;
        for line in lines {
            let Vector { tc_id, public, private, shared } = serde_json::from_str(line).unwrap();
            let private = C::prepare(&PrivateKey::from_hex(&private).unwrap());
            let secret = C::shared_secret(&private, &PublicKey::from_hex(&public).unwrap());
            assert_eq!(PublicKey::from_bytes(*secret).to_hex(), shared, "{tc_id}");
            count += 1;
        }
        assert_eq!(count, 518);
    }

    #[test]
    fn dalek_agrees_with_wycheproof() {
        agrees_with_wycheproof::<Dalek>();
    }

    #[cfg(feature = "aws-lc")]
    #[test]
    fn aws_lc_agrees_with_wycheproof() {
        agrees_with_wycheproof::<AwsLc>();
    }

    #[cfg(feature = "aws-lc")]
    #[test]
    fn aws_lc_agrees_with_dalek() {
        use rand::{RngExt, SeedableRng};
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        for _ in 0..500 {
            let private_key = PrivateKey::from_bytes(rng.random());
            let public_key = PublicKey::from_bytes(rng.random());
            let (aws_lc, dalek) = (AwsLc::prepare(&private_key), Dalek::prepare(&private_key));
            assert_eq!(AwsLc::public_key(&aws_lc), Dalek::public_key(&dalek));
            // As often as one likes.
            for public_key in [public_key, PublicKey::from_bytes(rng.random())] {
                assert_eq!(
                    AwsLc::shared_secret(&aws_lc, &public_key),
                    Dalek::shared_secret(&dalek, &public_key)
                );
            }
        }
        for point in low_order_points() {
            let private_key = AwsLc::prepare(&PrivateKey::from_bytes(rng.random()));
            assert_eq!(*AwsLc::shared_secret(&private_key, &point), [0; KEY_LEN], "{point}");
        }
    }

    #[test]
    fn points_of_low_order_are_refused() {
        for point in low_order_points() {
            for byte in [0, 1, 0x42, 0xff] {
                let private_key = Curve::prepare(&PrivateKey::from_bytes([byte; KEY_LEN]));
                assert_eq!(*Curve::shared_secret(&private_key, &point), [0; KEY_LEN], "{point}");
                assert_eq!(agree(&private_key, &point), Err(HandshakeError::LowOrderPoint));
            }
        }
    }
}
