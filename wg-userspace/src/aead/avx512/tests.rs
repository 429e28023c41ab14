//! The back end against `ring`, byte for byte.

use std::iter;

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use wg_common::protocol::{KEY_LEN, TAG_LEN};

use super::poly1305::GROUP;
use super::scratch::Scratch;
use super::*;
use crate::aead::AeadKey;

/// What stands before, between and behind the buffers, and must still stand there afterwards.
const CANARY: u8 = 0xa5;
const GAP: usize = 80;

/// The back end, or a word that there is none.
macro_rules! require_avx512 {
    () => {
        match $crate::aead::Avx512Aead::detect() {
            Some(back_end) => back_end,
            None => {
                eprintln!("SKIPPED {}: this CPU has not what AVX-512 code needs", module_path!());
                return;
            }
        }
    };
}

pub(super) use require_avx512;

/// A packet to be sealed.
#[derive(Clone, Debug)]
struct Plain {
    /// Packets with the same number have the same key, as a value and as an object.
    key: usize,
    counter: u64,
    /// Of the buffer, from a multiple of 64.
    offset: usize,
    data: Vec<u8>,
}

impl Plain {
    fn random(rng: &mut impl Rng, len: usize) -> Self {
        // Carries in Poly1305 love extremes.
        let data = match rng.random_range(0..6) {
            0 => vec![0; len],
            1 => vec![0xff; len],
            _ => iter::repeat_with(|| rng.random()).take(len).collect(),
        };
        // Counters whose low half overflows, too.
        let counter = [rng.random(), u64::from(u32::MAX) + rng.random_range(0..3)];
        Self {
            key: rng.random_range(0..8),
            counter: counter[rng.random_range(0..2)],
            offset: rng.random_range(0..64),
            data,
        }
    }
}

/// Buffers in one piece of memory, with gaps.
struct Arena {
    bytes: Vec<u8>,
    /// Where each buffer is.
    places: Vec<std::ops::Range<usize>>,
}

impl Arena {
    fn of(packets: &[Plain]) -> Self {
        let (mut end, mut places) = (0, Vec::new());
        for Plain { offset, data, .. } in packets {
            let start = (end + GAP).next_multiple_of(64) + offset;
            end = start + data.len() + TAG_LEN;
            places.push(start..end);
        }
        let mut bytes = vec![CANARY; end + GAP];
        for (place, packet) in places.iter().zip(packets) {
            bytes[place.clone()][..packet.data.len()].copy_from_slice(&packet.data);
        }
        Self { bytes, places }
    }

    fn buffer(&self, i: usize) -> &[u8] {
        &self.bytes[self.places[i].clone()]
    }

    fn jobs<'a>(&'a mut self, keys: &'a [AeadKey], packets: &[Plain]) -> Vec<Job<'a>> {
        let (mut rest, mut at, mut jobs) = (&mut self.bytes[..], 0, Vec::new());
        for (place, packet) in self.places.iter().zip(packets) {
            let (buffer, behind) = rest[place.start - at..].split_at_mut(place.len());
            jobs.push(Job::new(&keys[packet.key], packet.counter, buffer));
            (rest, at) = (behind, place.end);
        }
        jobs
    }

    /// Everything that is in no buffer.
    fn gaps(&self) -> Vec<u8> {
        let starts = iter::once(0).chain(self.places.iter().map(|place| place.end));
        let ends = self.places.iter().map(|place| place.start).chain([self.bytes.len()]);
        starts.zip(ends).flat_map(|(start, end)| self.bytes[start..end].to_vec()).collect()
    }
}

fn keys() -> Vec<AeadKey> {
    (0..8_u8).map(|i| AeadKey::new(&[i.wrapping_mul(37) ^ 0x5c; KEY_LEN])).collect()
}

/// Seals and opens `packets` as one batch, and compares every byte with what `ring` makes. Of those
/// in `spoilt` (place, byte of the buffer) a bit is turned before they are opened.
fn check(back_end: Avx512Aead, packets: &[Plain], spoilt: &[(usize, usize)]) {
    let keys = keys();
    let (mut arena, mut expected) = (Arena::of(packets), Arena::of(packets));
    RingAead.seal(&mut expected.jobs(&keys, packets));
    let mut jobs = arena.jobs(&keys, packets);
    back_end.seal_in_lanes(&mut jobs);
    assert!(jobs.iter().all(|job| job.ok));
    for (i, packet) in packets.iter().enumerate() {
        assert!(arena.buffer(i) == expected.buffer(i), "sealed {i} of {} bytes", packet.data.len());
    }
    assert!(arena.gaps().iter().all(|byte| *byte == CANARY), "sealing wrote beside a buffer");

    for &(i, byte) in spoilt {
        let at = arena.places[i].start + byte;
        arena.bytes[at] ^= 1 << (byte % 8);
    }
    let before = arena.bytes.clone();
    let mut jobs = arena.jobs(&keys, packets);
    back_end.open_in_lanes(&mut jobs);
    let ok: Vec<_> = jobs.iter().map(|job| job.ok).collect();
    for (i, packet) in packets.iter().enumerate() {
        let is_spoilt = spoilt.iter().any(|(spoilt, _)| *spoilt == i);
        assert_eq!(ok[i], !is_spoilt, "opened {i} of {} bytes", packet.data.len());
        let len = packet.data.len();
        if is_spoilt {
            assert!(arena.buffer(i) == &before[arena.places[i].clone()], "{i} has failed");
        } else {
            assert!(arena.buffer(i)[..len] == packet.data, "opened {i} of {len} bytes");
            assert!(arena.buffer(i)[len..] == expected.buffer(i)[len..], "the tag of {i}");
        }
    }
    assert!(arena.gaps().iter().all(|byte| *byte == CANARY), "opening wrote beside a buffer");
}

#[test]
fn packets_of_every_length_are_sealed_and_opened_as_by_ring() {
    let back_end = require_avx512!();
    let mut rng = StdRng::seed_from_u64(1);
    for len in 0..=2048 {
        // Short ones in every lane; of the others a few.
        let count = if len <= 300 { 33 } else { 1 + len % 11 };
        let packets: Vec<_> = (0..count).map(|_| Plain::random(&mut rng, len)).collect();
        check(back_end, &packets, &[]);
    }
}

#[test]
fn batches_of_every_size_are_sealed_and_opened_as_by_ring() {
    let back_end = require_avx512!();
    let mut rng = StdRng::seed_from_u64(2);
    for count in 0..=130 {
        for len in [0, 1, 64, 100, 256] {
            let packets: Vec<_> = (0..count).map(|_| Plain::random(&mut rng, len)).collect();
            check(back_end, &packets, &[]);
        }
    }
}

#[test]
fn every_rest_of_a_row_meets_every_other_in_every_lane() {
    let back_end = require_avx512!();
    let mut rng = StdRng::seed_from_u64(3);
    // All have one to two blocks, so nothing is sorted: packet i of 64 has the rest (a · i + b) % 64.
    for a in (1..64).step_by(2) {
        for b in (0..64).step_by(if a < 8 { 1 } else { 7 }) {
            let packets: Vec<_> =
                (0..16).map(|i| Plain::random(&mut rng, 256 + (a * i + b) % 64)).collect();
            check(back_end, &packets, &[]);
        }
    }
}

#[test]
fn mixed_batches_are_sealed_and_opened_as_by_ring() {
    let back_end = require_avx512!();
    let mut rng = StdRng::seed_from_u64(4);
    for round in 0..400 {
        let count = rng.random_range(1..100);
        let len_max = [10, 70, 300, 1500, 4000][round % 5];
        let packets: Vec<_> = (0..count)
            .map(|_| {
                let len = rng.random_range(0..=len_max);
                Plain::random(&mut rng, len)
            })
            .collect();
        let spoilt: Vec<_> = packets
            .iter()
            .enumerate()
            .filter_map(|(i, packet)| {
                let byte = rng.random_range(0..packet.data.len() + TAG_LEN);
                rng.random_bool(0.2).then_some((i, byte))
            })
            .collect();
        check(back_end, &packets, &spoilt);
    }
}

#[test]
fn the_longest_packets_beside_the_shortest() {
    let back_end = require_avx512!();
    let mut rng = StdRng::seed_from_u64(5);
    let lens = [65_535, 0, 65_519, 1, 9000, 65_535, 64, 40_000, 16, 65_472];
    let packets: Vec<_> = lens.into_iter().map(|len| Plain::random(&mut rng, len)).collect();
    check(back_end, &packets, &[]);
    check(back_end, &packets, &[(0, 65_550), (4, 17), (8, 0)]);
}

#[test]
fn a_bit_that_is_wrong_fails_its_packet_alone_wherever_it_is() {
    let back_end = require_avx512!();
    let mut rng = StdRng::seed_from_u64(6);
    for len in [0, 1, 15, 16, 17, 47, 64, 81] {
        for byte in 0..len + TAG_LEN {
            for lane in 0..GROUP {
                let packets: Vec<_> =
                    (0..GROUP + 3).map(|_| Plain::random(&mut rng, len)).collect();
                check(back_end, &packets, &[(lane, byte)]);
            }
        }
    }
}

#[test]
fn packets_fail_in_every_lane_of_a_chunk() {
    let back_end = require_avx512!();
    let mut rng = StdRng::seed_from_u64(7);
    for len in [0, 40, 64, 200] {
        for count in [2, 5, 15, 16, 17, 31, 32, 33, 64] {
            let packets: Vec<_> = (0..count).map(|_| Plain::random(&mut rng, len)).collect();
            for lane in 0..count {
                check(back_end, &packets, &[(lane, len)]);
            }
            let all: Vec<_> = (0..count).map(|lane| (lane, len + 15)).collect();
            check(back_end, &packets, &all);
        }
    }
}

#[test]
fn buffers_without_room_for_a_tag_do_not_open_and_harm_no_others() {
    let back_end = require_avx512!();
    let key = AeadKey::new(&[9; KEY_LEN]);
    for len in 0..TAG_LEN {
        let mut good = [[7; 100]; 3];
        let mut jobs = good.each_mut().map(|buffer| Job::new(&key, 5, buffer));
        back_end.seal_in_lanes(&mut jobs);
        let mut short = vec![0x5a; len];
        let [a, b, c] = &mut good;
        let mut jobs = [
            Job::new(&key, 5, a),
            Job::new(&key, 5, &mut short),
            Job::new(&key, 5, b),
            Job::new(&key, 5, c),
        ];
        jobs[1].ok = true; // as a buffer's last user may have left it
        back_end.open_in_lanes(&mut jobs);
        assert_eq!(jobs.map(|job| job.ok), [true, false, true, true]);
        assert!(short.iter().all(|byte| *byte == 0x5a));
        assert!(good.iter().all(|buffer| buffer[..100 - TAG_LEN].iter().all(|byte| *byte == 7)));
    }
}

#[test]
#[should_panic(expected = "a buffer to seal has room for the tag")]
fn sealing_refuses_a_buffer_without_room_for_a_tag() {
    let Some(back_end) = Avx512Aead::detect() else {
        panic!("a buffer to seal has room for the tag")
    };
    let key = AeadKey::new(&[9; KEY_LEN]);
    let (mut good, mut short) = ([7; 100], [7; TAG_LEN - 1]);
    back_end.seal(&mut [Job::new(&key, 5, &mut good), Job::new(&key, 5, &mut short)]);
}

#[test]
fn a_call_leaves_no_secret_in_the_scratch() {
    let back_end = require_avx512!();
    let mut rng = StdRng::seed_from_u64(8);
    let packets: Vec<_> = (0..40).map(|i| Plain::random(&mut rng, 30 * i)).collect();
    check(back_end, &packets, &[(3, 0)]);
    Scratch::lend(|scratch| assert!(scratch.has_no_secrets()));
}

/// Memory between two pages that nobody may touch.
struct Fenced {
    start: *mut u8,
}

const PAGE: usize = 4096;
const FENCED: usize = 2 * PAGE;

impl Fenced {
    fn new() -> Self {
        use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
        let all = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: new memory, at no address of anybody's; then the first and last page of it.
        unsafe {
            let len = FENCED + 2 * PAGE;
            let map = mmap_anonymous(std::ptr::null_mut(), len, all, MapFlags::PRIVATE).unwrap();
            mprotect(map, PAGE, MprotectFlags::empty()).unwrap();
            mprotect(map.byte_add(PAGE + FENCED), PAGE, MprotectFlags::empty()).unwrap();
            Self { start: map.cast::<u8>().add(PAGE) }
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped and zeroed by `new`, and lent out as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.start, FENCED) }
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        // SAFETY: what `new` mapped, and nobody has any more.
        unsafe {
            let map = self.start.sub(PAGE).cast();
            rustix::mm::munmap(map, FENCED + 2 * PAGE).unwrap();
        }
    }
}

#[test]
fn nothing_outside_the_buffers_is_read_or_written() {
    let back_end = require_avx512!();
    let mut fenced: Vec<_> = (0..10).map(|_| Fenced::new()).collect();
    let key = AeadKey::new(&[3; KEY_LEN]);
    let mut lens: Vec<_> = (0..=200).collect();
    lens.extend([255, 256, 257, 1000, 1439, 1440, 1441, 2048]);
    for len in lens {
        for at_the_end in [false, true] {
            let place = if at_the_end { FENCED - len - TAG_LEN } else { 0 };
            let place = place..place + len + TAG_LEN;
            let mut expected = vec![0x33; len + TAG_LEN];
            RingAead.seal(&mut [Job::new(&key, 6, &mut expected)]);
            for memory in &mut fenced {
                memory.bytes()[place.clone()].fill(0x33);
            }
            let mut jobs: Vec<_> = fenced
                .iter_mut()
                .map(|memory| Job::new(&key, 6, &mut memory.bytes()[place.clone()]))
                .collect();
            back_end.seal_in_lanes(&mut jobs);
            assert!(jobs.iter().all(|job| job.buffer == &expected[..]));
            back_end.open_in_lanes(&mut jobs);
            assert!(jobs.iter().all(|job| job.ok && job.buffer[..len].iter().all(|b| *b == 0x33)));
        }
    }
}

/// RFC 8439 §2.4.2: its nonce is one that a counter makes.
#[test]
fn rfc_8439_2_4_2() {
    let back_end = require_avx512!();
    let key = AeadKey::new(&std::array::from_fn(|i| i as u8));
    let text = *b"Ladies and Gentlemen of the class of '99: If I could offer you only one \
        tip for the future, sunscreen would be it.";
    let sealed = [
        0x6e, 0x2e, 0x35, 0x9a, 0x25, 0x68, 0xf9, 0x80, 0x41, 0xba, 0x07, 0x28, 0xdd, 0x0d, 0x69,
        0x81, 0xe9, 0x7e, 0x7a, 0xec, 0x1d, 0x43, 0x60, 0xc2, 0x0a, 0x27, 0xaf, 0xcc, 0xfd, 0x9f,
        0xae, 0x0b, 0xf9, 0x1b, 0x65, 0xc5, 0x52, 0x47, 0x33, 0xab, 0x8f, 0x59, 0x3d, 0xab, 0xcd,
        0x62, 0xb3, 0x57, 0x16, 0x39, 0xd6, 0x24, 0xe6, 0x51, 0x52, 0xab, 0x8f, 0x53, 0x0c, 0x35,
        0x9f, 0x08, 0x61, 0xd8, 0x07, 0xca, 0x0d, 0xbf, 0x50, 0x0d, 0x6a, 0x61, 0x56, 0xa3, 0x8e,
        0x08, 0x8a, 0x22, 0xb6, 0x5e, 0x52, 0xbc, 0x51, 0x4d, 0x16, 0xcc, 0xf8, 0x06, 0x81, 0x8c,
        0xe9, 0x1a, 0xb7, 0x79, 0x37, 0x36, 0x5a, 0xf9, 0x0b, 0xbf, 0x74, 0xa3, 0x5b, 0xe6, 0xb4,
        0x0b, 0x8e, 0xed, 0xf2, 0x78, 0x5e, 0x42, 0x87, 0x4d,
    ];
    for count in [2, 7, 33] {
        let mut buffers = vec![[0; 114 + TAG_LEN]; count];
        let mut jobs: Vec<_> = buffers
            .iter_mut()
            .map(|buffer| {
                buffer[..114].copy_from_slice(&text);
                Job::new(&key, 0x4a00_0000, buffer)
            })
            .collect();
        back_end.seal(&mut jobs);
        for buffer in &buffers {
            assert_eq!(buffer[..114], sealed);
        }
    }
}

#[test]
fn small_batches_and_single_long_packets_are_left_to_ring() {
    let key = AeadKey::new(&[3; KEY_LEN]);
    let is_worth_it = |lens: &[usize]| {
        let mut buffers: Vec<_> = lens.iter().map(|len| vec![0; len + TAG_LEN]).collect();
        let jobs: Vec<_> = buffers.iter_mut().map(|b| Job::new(&key, 0, b)).collect();
        is_worth_it(&jobs)
    };
    for lens in [&[][..], &[0], &[1440], &[65_519], &[64, 64], &[9000, 0, 0, 0]] {
        assert!(!is_worth_it(lens), "{lens:?}");
    }
    for lens in [&[0; 4][..], &[64; 4], &[1440; 2], &[65_519; 4], &[64; 64]] {
        assert!(is_worth_it(lens), "{lens:?}");
    }
}

#[test]
fn batches_too_small_for_lanes_work_all_the_same() {
    let back_end = require_avx512!();
    let key = AeadKey::new(&[3; KEY_LEN]);
    let mut buffer = [7; 64];
    let mut jobs = [Job::new(&key, 9, &mut buffer)];
    back_end.seal(&mut jobs);
    assert!(jobs[0].ok);
    back_end.open(&mut jobs);
    assert!(jobs[0].ok && jobs[0].buffer[..48] == [7; 48]);
    back_end.seal(&mut []);
    back_end.open(&mut []);
    back_end.seal_in_lanes(&mut []);
    back_end.open_in_lanes(&mut []);
}
