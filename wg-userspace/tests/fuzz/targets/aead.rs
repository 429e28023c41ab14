//! The AEAD's back ends against `ring`: batches of all lengths, alignments, keys and counters, then some
//! of what was sealed changed.

use wg_common::protocol::{KEY_LEN, TAG_LEN};
use wg_userspace::aead::choice::back_ends;
use wg_userspace::aead::{AeadKey, BatchAead, Job, RingAead};

use super::Input;

/// Most packets of a batch: three passes of the widest back end, and some.
const BATCH_LEN_MAX: usize = 100;
/// Most bytes of a batch: longest packets are few.
const BYTES_MAX: usize = 1 << 17;
/// Keys of a batch.
const KEY_COUNT: usize = 8;
/// Bytes before and behind each packet that are nobody's.
const FENCE_LEN: usize = 64;
const FENCE: u8 = 0xa5;

/// One packet of a batch.
struct Packet {
    key: usize,
    counter: u64,
    plain: Vec<u8>,
    /// Bytes from a multiple of 64 to where it begins.
    alignment: usize,
    /// Where a bit of what was sealed is changed, and which.
    change: Option<(usize, u8)>,
}

impl Packet {
    fn read(input: &mut Input<'_>) -> Self {
        let [kind, key, shift, content, alignment, change] = input.array();
        let number = usize::from(input.number());
        let len = match kind % 16 {
            0 => 0,
            1..=8 => number % 257,
            9..=13 => number % 2_049,
            14 => number % 9_001,
            _ => number,
        };
        let plain = (0..len).map(|i| match content {
            0 => 0,
            0xff => 0xff,
            _ => (i as u8).wrapping_mul(content) ^ (i >> 8) as u8,
        });
        let counter = u64::from(input.number()).rotate_left(shift.into());
        // Every fourth is changed; the place is one of its bytes, the last ones are the tag's.
        let at = usize::from(input.number()) % (len + TAG_LEN);
        Self {
            key: usize::from(key) % KEY_COUNT,
            counter: if shift & 0x40 == 0 { counter } else { !counter },
            plain: plain.collect(),
            alignment: usize::from(alignment) % 64,
            change: (change % 4 == 0).then_some((at, change >> 5)),
        }
    }

    fn sealed_len(&self) -> usize {
        self.plain.len() + TAG_LEN
    }
}

/// The packets of a batch in memory, each at its alignment and between fences.
struct Frames {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl Frames {
    fn new(packets: &[Packet]) -> Self {
        let mut end = 0;
        let mut starts = Vec::new();
        for packet in packets {
            let start = (end + FENCE_LEN).next_multiple_of(64) + packet.alignment;
            starts.push(start);
            end = start + packet.sealed_len();
        }
        let mut bytes = vec![FENCE; end + FENCE_LEN + 64];
        let shift = bytes.as_ptr().align_offset(64);
        for (start, packet) in starts.iter_mut().zip(packets) {
            *start += shift;
            bytes[*start..][..packet.plain.len()].copy_from_slice(&packet.plain);
        }
        Self { bytes, starts }
    }

    fn jobs<'a>(&'a mut self, packets: &[Packet], keys: &'a [AeadKey]) -> Vec<Job<'a>> {
        let (mut jobs, mut rest, mut at) = (Vec::new(), &mut self.bytes[..], 0);
        for (packet, &start) in packets.iter().zip(&self.starts) {
            let (buffer, behind) =
                rest.split_at_mut(start - at).1.split_at_mut(packet.sealed_len());
            (rest, at) = (behind, start + packet.sealed_len());
            jobs.push(Job::new(&keys[packet.key], packet.counter, buffer));
        }
        jobs
    }

    fn check_fences(&self, packets: &[Packet]) {
        let mut at = 0;
        for (&start, packet) in self.starts.iter().zip(packets) {
            assert!(self.bytes[at..start].iter().all(|&byte| byte == FENCE), "before {start}");
            at = start + packet.sealed_len();
        }
        assert!(self.bytes[at..].iter().all(|&byte| byte == FENCE), "behind the last");
    }
}

/// The first bytes are keys; then each packet takes some.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let seeds: [u8; KEY_COUNT] = input.array();
    let key = |seed: u8| {
        AeadKey::new(&std::array::from_fn::<_, KEY_LEN, _>(|i| {
            if seed.is_multiple_of(7) {
                seed
            } else {
                seed.wrapping_mul(31).wrapping_add((i as u8).wrapping_mul(57))
            }
        }))
    };
    let keys = seeds.map(key);
    let (mut packets, mut left) = (Vec::new(), BYTES_MAX);
    while !input.is_empty() && packets.len() < BATCH_LEN_MAX {
        let packet = Packet::read(&mut input);
        let Some(rest) = left.checked_sub(packet.sealed_len()) else { break };
        left = rest;
        packets.push(packet);
    }
    back_ends().into_iter().for_each(|aead| check(aead, &packets, &keys));
}

fn check(aead: &dyn BatchAead, packets: &[Packet], keys: &[AeadKey]) {
    let (mut frames, mut by_ring) = (Frames::new(packets), Frames::new(packets));
    let (mut jobs, mut expected) = (frames.jobs(packets, keys), by_ring.jobs(packets, keys));
    aead.seal(&mut jobs);
    RingAead.seal(&mut expected);
    for (place, (job, expected)) in jobs.iter().zip(&expected).enumerate() {
        assert!(job.ok && job.buffer == expected.buffer, "{} seals {place}", aead.name());
    }
    for jobs in [&mut jobs, &mut expected] {
        for (job, packet) in jobs.iter_mut().zip(packets) {
            if let Some((at, bit)) = packet.change {
                job.buffer[at] ^= 1 << bit;
            }
            // The opposite of what it should become.
            job.ok = packet.change.is_some();
        }
    }
    let arrived: Vec<Vec<u8>> = jobs.iter().map(|job| job.buffer.to_vec()).collect();
    aead.open(&mut jobs);
    RingAead.open(&mut expected);
    for (place, (job, packet)) in jobs.iter().zip(packets).enumerate() {
        assert_eq!(job.ok, packet.change.is_none(), "{} opens {place}", aead.name());
        assert_eq!(job.ok, expected[place].ok, "ring opens {place}");
        let opened = &job.buffer[..packet.plain.len()];
        if job.ok {
            assert!(opened == packet.plain, "{} opens {place} as something else", aead.name());
        } else {
            let came = &arrived[place][..opened.len()];
            let is_nothing = opened == came || opened.iter().all(|&byte| byte == 0);
            assert!(is_nothing, "{} shows {place}, which it refused", aead.name());
        }
    }
    drop((jobs, expected));
    frames.check_fences(packets);
}

/// Batches that fill passes and such that do not; all kinds of lengths.
pub fn seeds() -> Vec<Vec<u8>> {
    let packet = |i: usize, kind: u8, len: usize| {
        let [low, high] = (len as u16).to_le_bytes();
        let i = i as u8;
        [
            kind,
            i,
            i.wrapping_mul(5),
            i,
            i.wrapping_mul(3),
            i.wrapping_mul(37),
            low,
            high,
            i,
            1,
            i,
            i,
        ]
    };
    let batch = |count: usize, kind: u8, len: fn(usize) -> usize| {
        let packets = (0..count).flat_map(|i| packet(i, kind, len(i)));
        [0, 1, 2, 3, 4, 5, 6, 255].into_iter().chain(packets).collect::<Vec<u8>>()
    };
    vec![
        batch(1, 9, |_| 1_440),
        batch(4, 9, |_| 1_440),
        batch(33, 1, |_| 64),
        batch(64, 9, |i| [64, 576, 1_440][i % 3]),
        batch(100, 9, |i| i * 20),
        batch(17, 0, |_| 0),
        batch(5, 15, |i| 65_535 - i),
    ]
}
