//! What holds for every back end that this CPU has: each is held against published vectors, against a
//! model that is slow and plain, and against `ring`.

mod batches;
mod model;
mod tampering;
mod vectors;

use super::choice::back_ends;
use super::*;

/// Bytes before and behind each packet that are nobody's.
const FENCE: u8 = 0xa5;
const FENCE_LEN: usize = 64;
/// Alignments that packets are laid out in, by bytes.
const ALIGNMENT_COUNT: usize = 64;

/// Memory for a batch: packets at any alignment, each between fences.
struct Frames {
    bytes: Vec<u8>,
    /// Where each packet begins, and its length with the tag.
    places: Vec<(usize, usize)>,
}

impl Frames {
    /// Room for packets (and tags) of these lengths; the first byte of each is at an address that is
    /// `alignment` above a multiple of [`ALIGNMENT_COUNT`].
    fn new(packets: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let (mut places, mut end) = (Vec::new(), 0);
        for (sealed_len, alignment) in packets {
            let start = (end + FENCE_LEN).next_multiple_of(ALIGNMENT_COUNT) + alignment;
            places.push((start, sealed_len));
            end = start + sealed_len;
        }
        let bytes = vec![FENCE; end + FENCE_LEN + ALIGNMENT_COUNT];
        let shift = bytes.as_ptr().align_offset(ALIGNMENT_COUNT);
        places.iter_mut().for_each(|(start, _)| *start += shift);
        Self { bytes, places }
    }

    /// The packets with their tags.
    fn packets(&mut self) -> Vec<&mut [u8]> {
        let (mut packets, mut rest, mut at) = (Vec::new(), &mut self.bytes[..], 0);
        for &(start, len) in &self.places {
            let (packet, behind) = rest.split_at_mut(start - at).1.split_at_mut(len);
            packets.push(packet);
            (rest, at) = (behind, start + len);
        }
        packets
    }

    /// Asserts that nothing outside the packets was written.
    fn check_fences(&self, name: &str) {
        let mut at = 0;
        for &(start, len) in &self.places {
            assert!(self.bytes[at..start].iter().all(|&b| b == FENCE), "{name}: before {start}");
            at = start + len;
        }
        assert!(self.bytes[at..].iter().all(|&b| b == FENCE), "{name}: behind the last");
    }
}

/// Bytes that look like nothing.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Keys that differ.
fn keys(count: usize) -> Vec<AeadKey> {
    let bytes = |i: usize| noise(KEY_LEN, i as u64 + 1).try_into().unwrap();
    (0..count).map(|i| AeadKey::new(&bytes(i))).collect()
}

#[test]
fn wiping_leaves_a_key_of_zeros() {
    let seal = |key: &AeadKey| {
        let mut buffer = [7; 80];
        RingAead.seal(&mut [Job::new(key, 3, &mut buffer)]);
        buffer
    };
    let mut key = AeadKey::new(&[5; KEY_LEN]);
    assert_ne!(seal(&key), seal(&AeadKey::new(&[0; KEY_LEN])));
    assert_eq!(**key.expose(), [5; KEY_LEN]);
    key.wipe();
    assert_eq!(seal(&key), seal(&AeadKey::new(&[0; KEY_LEN])));
    assert_eq!(**key.expose(), [0; KEY_LEN]);
}

#[test]
fn a_key_prints_no_bytes() {
    assert_eq!(format!("{:?}", AeadKey::new(&[0xab; KEY_LEN])), "AeadKey(..)");
}
