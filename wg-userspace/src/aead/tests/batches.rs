//! Batches of every kind against `ring`, byte for byte.

use std::collections::BTreeSet;

use proptest::prelude::*;
use wg_common::protocol::{KEY_LEN, TAG_LEN};

use super::{ALIGNMENT_COUNT, Frames, back_ends, keys, model, noise};
use crate::aead::{AeadKey, BatchAead, Job, RingAead};

/// Most packets of a batch in the data path.
const BATCH_LEN: usize = 64;
/// Longest packet whose length meets every place of a batch.
const LEN_MAX: usize = 2048;

/// Counters that use all their bits.
fn counter(place: usize) -> u64 {
    (place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Seals and opens `packets`, which are long enough for their tags, and compares each step.
fn check(aead: &dyn BatchAead, keys: &[AeadKey], plain: &[&[u8]], sealed: &[Vec<u8>]) {
    let name = aead.name();
    let align = |place: usize, len: usize| (len * 13 + place * 7) % ALIGNMENT_COUNT;
    let lens = plain
        .iter()
        .enumerate()
        .map(|(place, packet)| (packet.len() + TAG_LEN, align(place, packet.len())));
    let mut frames = Frames::new(lens);
    let mut packets = frames.packets();
    for (packet, plain) in packets.iter_mut().zip(plain) {
        packet[..plain.len()].copy_from_slice(plain);
    }
    let jobs = packets.into_iter().enumerate();
    let jobs =
        jobs.map(|(place, buffer)| Job::new(&keys[place % keys.len()], counter(place), buffer));
    let mut jobs: Vec<_> = jobs.collect();
    aead.seal(&mut jobs);
    for (place, (job, sealed)) in jobs.iter_mut().zip(sealed).enumerate() {
        assert!(job.ok, "{name}: place {place} of {}", plain.len());
        let len = plain[place].len();
        assert!(job.buffer == sealed, "{name}: sealing {len} at place {place} of {}", plain.len());
        job.ok = false;
    }
    aead.open(&mut jobs);
    for (place, (job, &plain_)) in jobs.iter().zip(plain).enumerate() {
        let at = format!("{name}: opening {} at place {place} of {}", plain_.len(), plain.len());
        assert!(job.ok && job.buffer[..plain_.len()] == *plain_, "{at}");
    }
    drop(jobs);
    frames.check_fences(name);
}

/// What `ring` makes of packets, each with the key of its place.
fn sealed_by_ring(keys: &[AeadKey], plain: &[&[u8]]) -> Vec<Vec<u8>> {
    let seal = |(place, packet): (usize, &&[u8])| {
        let mut sealed = [packet, &[0; TAG_LEN][..]].concat();
        RingAead.seal(&mut [Job::new(&keys[place % keys.len()], counter(place), &mut sealed)]);
        sealed
    };
    plain.iter().enumerate().map(seal).collect()
}

/// Batches of 64 bring every length to every place; and sizes 2q + 1 and 2q + 2, where q is how often
/// 64 goes into the length, bring every size to every length of a last block, once.
#[test]
fn uniform_batches_of_every_length_and_size_seal_and_open_as_ring_does() {
    const TAILS: usize = 64;
    let keys = keys(BATCH_LEN);
    let pool = noise(LEN_MAX + BATCH_LEN, 7);
    for aead in back_ends() {
        let mut met = BTreeSet::new();
        for len in 0..=LEN_MAX {
            let plain: Vec<&[u8]> = (0..BATCH_LEN).map(|place| &pool[place..place + len]).collect();
            let sealed = sealed_by_ring(&keys, &plain);
            let often = len / TAILS;
            for size in [2 * often + 1, 2 * often + 2, BATCH_LEN].map(|size| size.min(BATCH_LEN)) {
                check(aead, &keys, &plain[..size], &sealed[..size]);
                met.insert((size, len % TAILS));
            }
        }
        assert_eq!(met.len(), BATCH_LEN * TAILS);
    }
}

/// One key for all is a way of its own through a back end.
#[test]
fn batches_with_one_key_seal_and_open_as_ring_does() {
    let (keys, pool) = (keys(1), noise(LEN_MAX + BATCH_LEN, 8));
    for aead in back_ends() {
        for len in (0..=LEN_MAX).step_by(61) {
            for size in [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, BATCH_LEN] {
                let plain: Vec<&[u8]> = (0..size).map(|place| &pool[place..place + len]).collect();
                check(aead, &keys, &plain, &sealed_by_ring(&keys, &plain));
            }
        }
    }
}

#[test]
fn the_longest_packets_are_sealed_and_opened_among_short_ones() {
    let pool = noise(65_535, 9);
    let keys = keys(5);
    for lens in [
        &[65_535][..],
        &[65_535, 0, 1, 65_535 - TAG_LEN, 64, 65_534, 16_384, 16_383, 9_000],
        &[0, 0, 65_535, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        let plain: Vec<&[u8]> = lens.iter().map(|&len| &pool[..len]).collect();
        let sealed = sealed_by_ring(&keys, &plain);
        back_ends().into_iter().for_each(|aead| check(aead, &keys, &plain, &sealed));
    }
}

#[test]
fn all_zeros_and_all_ones_are_sealed_as_the_model_does() {
    for byte in [0x00, 0xff] {
        let key = [byte; KEY_LEN];
        let keys = [AeadKey::new(&key)];
        let packet = vec![byte; 300];
        let plain: Vec<&[u8]> = (0..48).map(|place| &packet[..place * 6]).collect();
        let sealed = |(place, plain): (usize, &&[u8])| {
            model::seal(&key, &model::nonce_of(counter(place)), &[], plain)
        };
        let sealed: Vec<_> = plain.iter().enumerate().map(sealed).collect();
        back_ends().into_iter().for_each(|aead| check(aead, &keys, &plain, &sealed));
    }
}

#[test]
fn the_counters_edges_are_sealed_as_the_model_does() {
    let counters = [0, 1, u32::MAX.into(), 1 << 32, 1 << 63, u64::MAX - 1, u64::MAX];
    let key = AeadKey::new(&[3; KEY_LEN]);
    for aead in back_ends() {
        let mut buffers = [[0x77; 100 + TAG_LEN]; 7];
        let jobs = buffers.iter_mut().zip(counters);
        let mut jobs: Vec<_> = jobs.map(|(buffer, n)| Job::new(&key, n, buffer)).collect();
        aead.seal(&mut jobs);
        for job in &jobs {
            let nonce = model::nonce_of(job.counter);
            let expected = model::seal(&[3; KEY_LEN], &nonce, &[], &[0x77; 100]);
            assert_eq!(job.buffer, expected, "{} {}", aead.name(), job.counter);
        }
    }
}

#[test]
fn a_batch_may_be_empty() {
    for aead in back_ends() {
        aead.seal(&mut []);
        aead.open(&mut []);
    }
}

/// Packets as a batch of the data path may hold them: keepalives, short ones, full ones, others.
fn lens() -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(0),
        4 => 0_usize..=192,
        2 => prop::sample::select(vec![576, 1_280, 1_408, 1_420, 1_440, 1_452, 1_500]),
        2 => 0_usize..=LEN_MAX,
        1 => 8_900_usize..=9_100,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn mixed_batches_seal_and_open_as_ring_does(
        lens in prop::collection::vec(lens(), 0..=150),
        key_count in 1_usize..=64,
        seed in any::<u64>(),
    ) {
        let (keys, pool) = (keys(key_count), noise(9_300, seed));
        let plain = lens.iter().enumerate().map(|(place, &len)| &pool[place..place + len]);
        let plain: Vec<&[u8]> = plain.collect();
        let sealed = sealed_by_ring(&keys, &plain);
        back_ends().into_iter().for_each(|aead| check(aead, &keys, &plain, &sealed));
    }
}
