//! Seals and opens batches of packets with ChaCha20-Poly1305, as transport messages use it
//! (whitepaper §5.4.6): the nonce is four zero bytes and the counter, there is no associated data,
//! the tag stands behind the packet.
//!
//! This room knows no peers, headers or limits: whoever fills a [`Job`] answers for its counter.
//! Sealed packets go on to `datapath::encap`, opened ones to the replay window.

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector loads and stores, and assembly")]
mod avx512;
#[cfg(not(target_arch = "x86_64"))]
#[path = "avx512/absent.rs"]
mod avx512;
pub mod choice;
mod ring_backend;
#[cfg(test)]
mod tests;

use std::fmt;
use std::hint::black_box;

use ring::aead::{CHACHA20_POLY1305, LessSafeKey, UnboundKey};
use wg_common::protocol::KEY_LEN;
#[cfg(doc)]
use wg_common::protocol::TAG_LEN;
use zeroize::{Zeroize, Zeroizing};

pub use avx512::Avx512Aead;
pub use choice::AeadChoice;
pub use ring_backend::RingAead;

/// Seals and opens batches; one implementation per back end.
///
/// The jobs of a batch are independent: each has its own key, counter and buffer.
pub trait BatchAead: Send + Sync {
    /// The back end's name in reports and logs.
    fn name(&self) -> &'static str;

    /// Seals every job: what stands before the last [`TAG_LEN`] bytes is encrypted in place, and
    /// these bytes become the tag. Sets `ok`.
    ///
    /// # Panics
    /// If a buffer is shorter than a tag.
    fn seal(&self, jobs: &mut [Job<'_>]);

    /// Opens every job: checks the tag in the last [`TAG_LEN`] bytes and decrypts, in place, what
    /// stands before it. Sets `ok` to whether the tag was right (a buffer shorter than a tag has
    /// none).
    ///
    /// The bytes before the tag of a job that failed are unspecified: neither plaintext nor, with
    /// every back end, the ciphertext that came (`ring` has decrypted by the time it knows the tag,
    /// and zeroes what it has). Such a packet can only be dropped.
    fn open(&self, jobs: &mut [Job<'_>]);
}

/// One packet to seal or to open.
#[derive(Debug)]
pub struct Job<'a> {
    /// The key.
    pub key: &'a AeadKey,
    /// The message's counter. With one key, no two packets may be sealed under the same.
    pub counter: u64,
    /// The packet and, behind it, [`TAG_LEN`] bytes for its tag.
    pub buffer: &'a mut [u8],
    /// Whether the job succeeded; written by the call.
    pub ok: bool,
}

impl<'a> Job<'a> {
    /// A job that has not been done yet.
    pub fn new(key: &'a AeadKey, counter: u64, buffer: &'a mut [u8]) -> Self {
        Self { key, counter, buffer, ok: false }
    }
}

/// A key for one direction of a keypair; wiped when dropped.
pub struct AeadKey {
    ring: LessSafeKey,
    /// The same key once more: `ring` does not give it back, and a hand-over needs it. 32 bytes beside
    /// the five hundred of `ring`, in memory that holds the key anyway.
    bytes: Zeroizing<[u8; KEY_LEN]>,
}

impl AeadKey {
    /// Prepares `key`. The caller's copy stays the caller's to wipe.
    pub fn new(key: &[u8; KEY_LEN]) -> Self {
        Self { ring: ring_key(key), bytes: Zeroizing::new(*key) }
    }

    /// The secret bytes, to hand the key over to another process of this host.
    pub fn expose(&self) -> &Zeroizing<[u8; KEY_LEN]> {
        &self.bytes
    }

    /// Writes a key of zeros over this one.
    fn wipe(&mut self) {
        // `ring` does not wipe its keys. Its value holds the key inline and owns nothing, so an
        // assignment overwrites it; the black box keeps the write, though nothing reads it again.
        self.ring = ring_key(&[0; KEY_LEN]);
        black_box(&mut self.ring);
        self.bytes.zeroize();
    }
}

impl Drop for AeadKey {
    fn drop(&mut self) {
        self.wipe();
    }
}

impl fmt::Debug for AeadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AeadKey(..)")
    }
}

fn ring_key(key: &[u8; KEY_LEN]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).expect("a key of this length fits"))
}
