//! Whatever is changed in a packet is found, and neither delivers it nor disturbs its neighbours.

use proptest::prelude::*;
use wg_common::protocol::TAG_LEN;

use super::{Frames, back_ends, keys, noise};
use crate::aead::{AeadKey, BatchAead, Job, RingAead};

const BATCH_LEN: usize = 64;

/// Packets with their tags, as they come, and what they hold.
struct Arrived {
    keys: Vec<AeadKey>,
    plain: Vec<Vec<u8>>,
    sealed: Vec<Vec<u8>>,
}

impl Arrived {
    fn new(lens: impl IntoIterator<Item = usize>) -> Self {
        let lens = lens.into_iter().enumerate();
        let plain: Vec<_> = lens.map(|(place, len)| noise(len, place as u64 + 50)).collect();
        let keys = keys(plain.len().div_ceil(2).max(1));
        let mut sealed: Vec<_> =
            plain.iter().map(|packet| [&packet[..], &[0; TAG_LEN]].concat()).collect();
        let jobs = sealed.iter_mut().enumerate();
        let jobs = jobs.map(|(place, buffer)| Job::new(&keys[place / 2], place as u64, buffer));
        RingAead.seal(&mut jobs.collect::<Vec<_>>());
        Self { keys, plain, sealed }
    }

    /// Opens all, after `change` had its way with them, and asserts that exactly those are refused of
    /// which a byte has changed.
    fn open(&self, aead: &dyn BatchAead, change: impl Fn(usize, &mut [u8])) {
        let name = aead.name();
        let places = self.sealed.iter().enumerate();
        let mut frames = Frames::new(places.map(|(place, packet)| (packet.len(), place % 64)));
        let mut arrived = Vec::new();
        for (place, (packet, sealed)) in frames.packets().into_iter().zip(&self.sealed).enumerate()
        {
            packet.copy_from_slice(sealed);
            change(place, packet);
            arrived.push(packet.to_vec());
        }
        let jobs = frames.packets().into_iter().enumerate();
        let jobs =
            jobs.map(|(place, buffer)| Job::new(&self.keys[place / 2], place as u64, buffer));
        let mut jobs: Vec<_> = jobs.collect();
        for (place, job) in jobs.iter_mut().enumerate() {
            // As a buffer's last user may have left it.
            job.ok = arrived[place] != self.sealed[place];
        }
        aead.open(&mut jobs);
        for (place, (job, plain)) in jobs.iter().zip(&self.plain).enumerate() {
            let is_good = arrived[place] == self.sealed[place];
            let at = format!("{name}: place {place} of {}, {} bytes", jobs.len(), plain.len());
            assert_eq!(job.ok, is_good, "{at}");
            let (packet, came) = (&job.buffer[..plain.len()], &arrived[place][..plain.len()]);
            if is_good {
                assert!(packet == plain, "{at}: its neighbours disturbed it");
            } else {
                // `ring` zeroes what it has decrypted by then.
                let is_nothing = packet == came || packet.iter().all(|&byte| byte == 0);
                assert!(is_nothing, "{at}: a packet that was refused shows");
            }
        }
        drop(jobs);
        frames.check_fences(name);
    }
}

#[test]
fn a_change_of_any_byte_of_a_short_packet_is_found() {
    for len in 0..=80 {
        let arrived = Arrived::new([len; 9]);
        for aead in back_ends() {
            for at in 0..len + TAG_LEN {
                let changed = at % 9;
                arrived.open(aead, |place, packet| {
                    if place == changed {
                        packet[at] ^= 1 << (at % 8);
                    }
                });
            }
        }
    }
}

#[test]
fn a_change_of_any_byte_in_any_lane_is_found() {
    const LEN: usize = 21;
    let arrived = Arrived::new([LEN; BATCH_LEN]);
    for aead in back_ends() {
        for changed in 0..BATCH_LEN {
            for at in 0..LEN + TAG_LEN {
                arrived.open(aead, |place, packet| {
                    if place == changed {
                        packet[at] ^= 0x80 >> (at % 8);
                    }
                });
            }
        }
    }
}

#[test]
fn every_bit_of_a_tag_counts() {
    let arrived = Arrived::new([48; 33]);
    for aead in back_ends() {
        for bit in 0..TAG_LEN * 8 {
            arrived.open(aead, |place, packet| {
                if place % 33 == bit % 33 {
                    packet[48 + bit / 8] ^= 1 << (bit % 8);
                }
            });
        }
    }
}

#[test]
fn any_set_of_a_batch_may_be_bad() {
    let arrived = Arrived::new((0..BATCH_LEN).map(|place| place * 23));
    let spoil = |packet: &mut [u8]| *packet.last_mut().unwrap() ^= 4;
    for aead in back_ends() {
        arrived.open(aead, |_, packet| spoil(packet));
        for one in 0..BATCH_LEN {
            // All but one, and runs from the beginning.
            arrived.open(aead, |place, packet| {
                if place != one {
                    spoil(packet)
                }
            });
            arrived.open(aead, |place, packet| {
                if place < one {
                    spoil(packet)
                }
            });
        }
    }
}

#[test]
fn two_changes_that_cancel_in_a_sum_do_not_cancel_here() {
    let arrived = Arrived::new([64; 20]);
    for aead in back_ends() {
        arrived.open(aead, |place, packet| match place % 4 {
            // The same change of the packet and of the tag; two blocks, or two packets' tags, swapped.
            0 => (packet[0] ^= 1, packet[64] ^= 1).0,
            1 => packet[..32].rotate_left(16),
            2 => packet[64..].copy_from_slice(&arrived.sealed[place + 1][64..]),
            _ => {}
        });
    }
}

#[test]
fn a_buffer_shorter_than_a_tag_opens_nowhere_in_a_batch() {
    for aead in back_ends() {
        for len in 0..TAG_LEN {
            for short in [0, 3, 16, 32] {
                let arrived = Arrived::new([100; 33]);
                let mut buffers = arrived.sealed.clone();
                buffers[short] = vec![0x5a; len];
                let jobs = buffers.iter_mut().enumerate();
                let jobs = jobs.map(|(place, buffer)| {
                    Job::new(&arrived.keys[place / 2], place as u64, buffer)
                });
                let mut jobs: Vec<_> = jobs.collect();
                jobs[short].ok = true;
                aead.open(&mut jobs);
                for (place, job) in jobs.iter().enumerate() {
                    assert_eq!(job.ok, place != short, "{}: {len} at {short}", aead.name());
                }
            }
        }
    }
}

#[test]
fn another_key_or_counter_is_found_in_every_place() {
    let arrived = Arrived::new([70; BATCH_LEN]);
    for aead in back_ends() {
        for changed in 0..BATCH_LEN {
            let mut buffers = arrived.sealed.clone();
            let jobs = buffers.iter_mut().enumerate().map(|(place, buffer)| {
                let (mut key, mut counter) = (place / 2, place as u64);
                match changed % 2 {
                    0 if place == changed => key ^= 1,
                    1 if place == changed => counter ^= 1 << (place % 64),
                    _ => {}
                }
                Job::new(&arrived.keys[key], counter, buffer)
            });
            let mut jobs: Vec<_> = jobs.collect();
            aead.open(&mut jobs);
            for (place, job) in jobs.iter().enumerate() {
                assert_eq!(job.ok, place != changed, "{}: {changed}", aead.name());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn changes_anywhere_in_mixed_batches_are_found(
        packets in prop::collection::vec(
            (0_usize..1_600, prop::option::weighted(0.4, (any::<prop::sample::Index>(), 0_u8..8))),
            1..=100,
        ),
    ) {
        let arrived = Arrived::new(packets.iter().map(|&(len, _)| len));
        for aead in back_ends() {
            arrived.open(aead, |place, packet| {
                if let (_, Some((at, bit))) = &packets[place] {
                    packet[at.index(packet.len())] ^= 1 << bit;
                }
            });
        }
    }
}
