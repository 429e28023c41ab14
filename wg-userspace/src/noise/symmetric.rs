//! The symmetric half of Noise: BLAKE2s, its HMAC and HKDF, the AEAD, and the transcript they make.

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::{AeadInOut, ChaCha20Poly1305};
use wg_common::protocol::{CONSTRUCTION, IDENTIFIER, KEY_LEN, MAC_LEN, TAG_LEN};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::{HandshakeError, Secret};
use crate::key::PublicKey;

/// Bytes of a BLAKE2s block.
const BLOCK_LEN: usize = 64;

/// Hash (§5.4): BLAKE2s of the parts one after the other.
pub(super) fn hash(parts: &[&[u8]]) -> [u8; KEY_LEN] {
    let mut hash = Blake2s256::new();
    for part in parts {
        Update::update(&mut hash, part);
    }
    hash.finalize().into()
}

/// Mac (§5.4): keyed BLAKE2s with 16 bytes of output.
pub fn mac<const KEY: usize>(key: &[u8; KEY], message: &[u8]) -> [u8; MAC_LEN] {
    const { assert!(KEY <= KEY_LEN) };
    let mut mac = Blake2sMac::<U16>::new_from_slice(key).expect("asserted above");
    mac.update(message);
    mac.finalize_fixed().into()
}

/// Hmac (§5.4): RFC 2104 with BLAKE2s; not the keyed hash that [`mac`] is.
fn hmac(key: &[u8; KEY_LEN], parts: &[&[u8]]) -> Secret {
    let pad = |with: u8| {
        let mut block = Zeroizing::new([with; BLOCK_LEN]);
        block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
        block
    };
    let mut inner = Blake2s256::new();
    Update::update(&mut inner, pad(0x36).as_slice());
    for part in parts {
        Update::update(&mut inner, part);
    }
    let inner = Zeroizing::new(<[u8; KEY_LEN]>::from(inner.finalize()));
    Zeroizing::new(hash(&[pad(0x5c).as_slice(), inner.as_slice()]))
}

/// Kdf (§5.4): N secrets of a chaining key and an input.
fn kdf<const N: usize>(chaining_key: &[u8; KEY_LEN], input: &[u8]) -> [Secret; N] {
    let key = hmac(chaining_key, &[input]);
    let mut out: [Secret; N] = std::array::from_fn(|_| Secret::default());
    for i in 0..N {
        let previous: &[u8] = if i == 0 { &[] } else { out[i - 1].as_slice() };
        out[i] = hmac(&key, &[previous, &[i as u8 + 1]]);
    }
    out
}

/// What both sides have said and agreed on so far: the chaining key and the hash (§5.4).
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub(super) struct Transcript {
    chaining_key: [u8; KEY_LEN],
    hash: [u8; KEY_LEN],
}

impl Transcript {
    /// The beginning of every handshake with `responder`.
    pub(super) fn new(responder: &PublicKey) -> Self {
        let chaining_key = hash(&[CONSTRUCTION]);
        let prologue = hash(&[&chaining_key, IDENTIFIER]);
        Self { chaining_key, hash: hash(&[&prologue, responder.as_bytes()]) }
    }

    /// Takes in a secret.
    pub(super) fn mix_secret(&mut self, secret: &[u8; KEY_LEN]) {
        let [chaining_key] = kdf(&self.chaining_key, secret);
        self.chaining_key = *chaining_key;
    }

    /// Takes in a secret; gives the key for the next part of the message.
    pub(super) fn mix_secret_for_key(&mut self, secret: &[u8; KEY_LEN]) -> Secret {
        let [chaining_key, key] = kdf(&self.chaining_key, secret);
        self.chaining_key = *chaining_key;
        key
    }

    /// Takes in the preshared key; gives the key for the next part of the message.
    pub(super) fn mix_preshared_key(&mut self, preshared_key: &[u8; KEY_LEN]) -> Secret {
        let [chaining_key, bound, key] = kdf(&self.chaining_key, preshared_key);
        self.chaining_key = *chaining_key;
        self.mix_hash(bound.as_slice());
        key
    }

    /// Takes in an ephemeral public key, by hash and by chaining key as patterns with a preshared
    /// key want it.
    pub(super) fn mix_ephemeral(&mut self, ephemeral: &PublicKey) {
        self.mix_hash(ephemeral.as_bytes());
        self.mix_secret(ephemeral.as_bytes());
    }

    /// Seals all but the last 16 bytes of `part`, writes the tag there, and takes the whole in.
    pub(super) fn seal(&mut self, key: &Secret, part: &mut [u8]) {
        let (text, tag) = part.split_last_chunk_mut::<TAG_LEN>().expect("holds a tag");
        *tag = ChaCha20Poly1305::new(key.as_slice().try_into().expect("32 bytes"))
            // Each key of a handshake seals one part: the nonce is zero.
            .encrypt_inout_detached(&[0; 12].into(), &self.hash, text.into())
            .expect("far shorter than the cipher's limit")
            .into();
        self.mix_hash(part);
    }

    /// Opens `part`, which is N bytes and a tag, and takes it in.
    ///
    /// # Errors
    /// [`HandshakeError::Decrypt`] if the tag does not verify; the transcript is as before then.
    pub(super) fn open<const N: usize>(
        &mut self,
        key: &Secret,
        part: &[u8],
    ) -> Result<[u8; N], HandshakeError> {
        let (text, tag) = part.split_last_chunk::<TAG_LEN>().expect("holds a tag");
        let mut opened: [u8; N] = text.try_into().expect("the layout of the message");
        ChaCha20Poly1305::new(key.as_slice().try_into().expect("32 bytes"))
            .decrypt_inout_detached(
                &[0; 12].into(),
                &self.hash,
                opened.as_mut_slice().into(),
                &(*tag).into(),
            )
            .map_err(|_| HandshakeError::Decrypt)?;
        self.mix_hash(part);
        Ok(opened)
    }

    /// The transport keys: the initiator's sending key, then the responder's (§5.4.5).
    pub(super) fn split(&self) -> [Secret; 2] {
        kdf(&self.chaining_key, &[])
    }

    fn mix_hash(&mut self, data: &[u8]) {
        self.hash = hash(&[&self.hash, data]);
    }
}
