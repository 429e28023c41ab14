//! What is done with a batch: windows, chunks, groups, and in which order.

use arrayvec::ArrayVec;
use wg_common::protocol::TAG_LEN;

use super::super::Job;
use super::chacha::{LANES, Passes};
use super::jobs::{self, Packet, WINDOW};
use super::poly1305::{self, GROUP};
use super::rounds;
use super::scratch::Scratch;

/// The back end for CPUs with AVX-512. A value of this type proves that this one has what it needs.
#[derive(Clone, Copy, Debug)]
pub struct Avx512Aead {
    _detected: (),
}

impl Avx512Aead {
    /// The back end, if this CPU and its operating system have AVX-512 F, BW, DQ, VL, IFMA, VBMI2
    /// and BMI2.
    pub fn detect() -> Option<Self> {
        let detected = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512ifma")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("bmi2");
        detected.then_some(Self { _detected: () })
    }

    /// Seals in lanes, however few jobs there are.
    ///
    /// # Panics
    /// If a buffer is shorter than a tag.
    pub(super) fn seal_in_lanes(self, jobs: &mut [Job<'_>]) {
        let have_room = jobs.iter().all(|job| jobs::is_possible(job));
        assert!(have_room, "a buffer to seal has room for the tag");
        // SAFETY: `self` proves that the CPU has the features.
        Scratch::lend(|scratch| unsafe { seal_all(jobs, scratch) });
    }

    /// Opens in lanes, however few jobs there are.
    pub(super) fn open_in_lanes(self, jobs: &mut [Job<'_>]) {
        // SAFETY: `self` proves that the CPU has the features.
        Scratch::lend(|scratch| unsafe { open_all(jobs, scratch) });
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn seal_all(jobs: &mut [Job<'_>], scratch: &mut Scratch) {
    for window in jobs.chunks_mut(WINDOW) {
        let mut packets = ArrayVec::new();
        jobs::list(window, &mut packets);
        for chunk in packets.chunks(LANES) {
            seal_chunk(chunk, scratch);
        }
        drop(packets);
        for job in window {
            job.ok = true;
        }
    }
    rounds::wipe_registers();
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn open_all(jobs: &mut [Job<'_>], scratch: &mut Scratch) {
    for window in jobs.chunks_mut(WINDOW) {
        let mut ok = [false; WINDOW];
        let mut packets = ArrayVec::new();
        jobs::list(window, &mut packets);
        for chunk in packets.chunks(LANES) {
            let right = open_chunk(chunk, scratch);
            for (i, packet) in chunk.iter().enumerate() {
                ok[packet.index] = (right >> i) & 1 == 1;
            }
        }
        drop(packets);
        for (job, ok) in window.iter_mut().zip(ok) {
            job.ok = ok;
        }
    }
    rounds::wipe_registers();
}

/// Encrypts, and computes the tags of what came of it: those of a group as soon as the passes have
/// left it, while it is in the nearest cache.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn seal_chunk(packets: &[Packet<'_>], scratch: &mut Scratch) {
    let mut passes = Passes::new(packets, &mut scratch.chacha);
    let mut tags = [[[0; TAG_LEN]; GROUP]; LANES / GROUP];
    for (i, group) in packets.chunks(GROUP).enumerate() {
        while passes.done() < GROUP * i + group.len() {
            if passes.fill(packets.len(), u32::MAX) > 0 {
                passes.run();
                passes.apply();
            }
        }
        tags[i] = poly1305::tags(group, passes.one_time_keys(i), &mut scratch.poly1305);
    }
    // Not before: the next group's reads, a multiple of 2 KiB away, would wait for these writes.
    for (packet, tag) in packets.iter().zip(tags.as_flattened()) {
        packet.set_tag(*tag);
    }
}

/// Decrypts the packets that have the right tag, group by group, and says which they are: bit `i` for
/// packet `i`.
///
/// Lanes that the first pass has besides the one-time keys make key stream for data already. It is
/// held back until the tags of all these packets are known.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn open_chunk(packets: &[Packet<'_>], scratch: &mut Scratch) -> u32 {
    let mut passes = Passes::new(packets, &mut scratch.chacha);
    passes.fill(packets.len(), u32::MAX);
    passes.run();
    let (mut is_held, mut right) = (true, 0);
    for (i, group) in packets.chunks(GROUP).enumerate() {
        let tags = poly1305::tags(group, passes.one_time_keys(i), &mut scratch.poly1305);
        for (lane, (packet, tag)) in group.iter().zip(tags).enumerate() {
            right |= u32::from(is_equal(packet.tag(), tag)) << (GROUP * i + lane);
        }
        let verified = GROUP * i + group.len();
        if is_held {
            if verified < passes.begun() {
                continue;
            }
            passes.keep(right);
            passes.apply();
            is_held = false;
        }
        while passes.fill(verified, right) == LANES {
            passes.run();
            passes.apply();
        }
    }
    if passes.fill(packets.len(), right) > 0 {
        passes.run();
        passes.apply();
    }
    right
}

/// Compares all bits, whichever differ.
fn is_equal(a: [u8; TAG_LEN], b: [u8; TAG_LEN]) -> bool {
    u128::from_ne_bytes(a) ^ u128::from_ne_bytes(b) == 0
}
