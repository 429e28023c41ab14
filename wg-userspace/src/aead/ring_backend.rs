//! The portable back end, packet by packet with `ring`; also what every other one is compared with.

use ring::aead::{Aad, NONCE_LEN, Nonce};
use wg_common::protocol::TAG_LEN;

use super::{BatchAead, Job};

/// The back end on `ring`, which picks its own code by CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct RingAead;

impl BatchAead for RingAead {
    fn name(&self) -> &'static str {
        "ring"
    }

    fn seal(&self, jobs: &mut [Job<'_>]) {
        for job in jobs {
            let (key, nonce) = (&job.key.ring, nonce(job.counter));
            let (packet, tag) = job
                .buffer
                .split_last_chunk_mut::<TAG_LEN>()
                .expect("a buffer to seal has room for the tag");
            let sealed = key
                .seal_in_place_separate_tag(nonce, Aad::empty(), packet)
                .expect("a packet is far below the cipher's limit of 256 GiB");
            tag.copy_from_slice(sealed.as_ref());
            job.ok = true;
        }
    }

    fn open(&self, jobs: &mut [Job<'_>]) {
        for job in jobs {
            let (key, nonce) = (&job.key.ring, nonce(job.counter));
            job.ok = key.open_in_place(nonce, Aad::empty(), job.buffer).is_ok();
        }
    }
}

/// Four zero bytes, then the counter, little-endian (whitepaper §5.4.6).
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

#[cfg(test)]
mod tests {
    use chacha20poly1305::aead::{AeadInOut, KeyInit};
    use chacha20poly1305::{ChaCha20Poly1305, Key};
    use proptest::prelude::*;
    use wg_common::protocol::KEY_LEN;

    use super::*;
    use crate::aead::AeadKey;

    /// The same in another implementation.
    fn sealed_by_oracle(key: &[u8; KEY_LEN], counter: u64, packet: &[u8]) -> Vec<u8> {
        let mut nonce = [0; NONCE_LEN];
        nonce[4..].copy_from_slice(&counter.to_le_bytes());
        let mut sealed = packet.to_vec();
        let tag = ChaCha20Poly1305::new(&Key::from(*key))
            .encrypt_inout_detached(&nonce.into(), &[], sealed.as_mut_slice().into())
            .unwrap();
        sealed.extend_from_slice(&tag);
        sealed
    }

    fn with_tag_room(packet: &[u8]) -> Vec<u8> {
        [packet, &[0; TAG_LEN]].concat()
    }

    proptest! {
        #[test]
        fn a_batch_seals_as_another_implementation_does(
            packets in prop::collection::vec(
                (any::<[u8; KEY_LEN]>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..1600)),
                0..8,
            ),
        ) {
            let keys: Vec<_> = packets.iter().map(|(key, ..)| AeadKey::new(key)).collect();
            let mut buffers: Vec<_> = packets.iter().map(|(.., p)| with_tag_room(p)).collect();
            let mut jobs: Vec<_> = keys
                .iter()
                .zip(&packets)
                .zip(&mut buffers)
                .map(|((key, &(_, counter, _)), buffer)| Job::new(key, counter, buffer))
                .collect();
            RingAead.seal(&mut jobs);
            prop_assert!(jobs.iter().all(|job| job.ok));
            for ((key, counter, packet), job) in packets.iter().zip(&jobs) {
                prop_assert_eq!(&job.buffer[..], &sealed_by_oracle(key, *counter, packet)[..]);
            }

            RingAead.open(&mut jobs);
            for ((.., packet), job) in packets.iter().zip(&jobs) {
                prop_assert!(job.ok);
                prop_assert_eq!(&job.buffer[..packet.len()], &packet[..]);
            }
        }

        #[test]
        fn one_wrong_bit_fails_its_job_and_no_other(
            packet in prop::collection::vec(any::<u8>(), 0..200),
            at in any::<prop::sample::Index>(),
            bit in 0_u8..8,
        ) {
            let key = AeadKey::new(&[9; KEY_LEN]);
            let good = sealed_by_oracle(&[9; KEY_LEN], 77, &packet);
            let mut bad = good.clone();
            bad[at.index(good.len())] ^= 1 << bit;
            let (mut before, mut after) = (good.clone(), good);
            let mut jobs = [&mut before, &mut bad, &mut after].map(|b| Job::new(&key, 77, b));
            jobs[1].ok = true; // as a buffer's last user may have left it
            RingAead.open(&mut jobs);
            prop_assert_eq!(jobs.map(|job| job.ok), [true, false, true]);
            prop_assert_eq!(&before[..packet.len()], &packet[..]);
            prop_assert_eq!(&after[..packet.len()], &packet[..]);
        }
    }

    #[test]
    fn another_counter_or_key_fails() {
        let sealed = sealed_by_oracle(&[9; KEY_LEN], 77, b"packet");
        for (key, counter, ok) in [(9, 77, true), (9, 78, false), (8, 77, false)] {
            let (key, mut buffer) = (AeadKey::new(&[key; KEY_LEN]), sealed.clone());
            let mut jobs = [Job::new(&key, counter, &mut buffer)];
            RingAead.open(&mut jobs);
            assert_eq!(jobs[0].ok, ok);
        }
    }

    #[test]
    fn a_buffer_shorter_than_a_tag_does_not_open() {
        let key = AeadKey::new(&[9; KEY_LEN]);
        for len in 0..TAG_LEN {
            let mut buffer = vec![0x5a; len];
            let mut jobs = [Job::new(&key, 0, &mut buffer)];
            RingAead.open(&mut jobs);
            assert!(!jobs[0].ok);
        }
    }
}
