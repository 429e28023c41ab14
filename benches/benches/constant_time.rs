//! Does the time of sealing and opening tell anything about keys, packets or tags?
//!
//! The method is that of dudect (Reparaz, Balasch, Verbauwhede: "Dude, is my code constant time?"):
//! calls on inputs of two classes follow each other in random order, from the same memory, and Welch's
//! t compares their times. What the scheduler and interrupts add comes to both classes alike, and only
//! slows: so the test is repeated on the fastest nine tenths, half and tenth, and the greatest |t| counts.
//!
//! What prepares a call must be the same instructions for both classes, too. Where the compiler made
//! branches of it, calls took another time although their data were alike (`benches/README.md`). So a
//! class is only ever a mask through which the compiler does not see. One row is a control whose
//! classes are alike.
//!
//! |t| below 4.5 is what equal times give: a single test exceeds it by chance once in 150,000 times. A
//! leak grows with the root of the number of calls; a noisy machine does not, but its drift can lift
//! single values somewhat: run again with `TIDEGATE_CALLS` ten times as large, and see whether t grows.
//! Above 10 it is certain. The last line is a comparison that does leak: the method sees it, or cannot
//! see anything here. Absence of evidence is no proof; the back ends argue theirs in their heads.

use std::env;
use std::hint::black_box;
use std::time::Instant;

use benches::rng;
use rand::RngExt;
use rand::rngs::StdRng;
use wg_common::protocol::{KEY_LEN, TAG_LEN};
use wg_userspace::aead::choice::back_ends;
use wg_userspace::aead::{AeadKey, BatchAead, Job};

/// Packets of a call: a full pass of every back end.
const BATCH: usize = 32;
/// Bytes of a packet: some whole blocks, and a rest.
const LEN: usize = 200;
/// Calls of a test, unless `TIDEGATE_CALLS` says otherwise.
const CALLS: usize = 40_000;
/// Calls before those, which warm caches and are not counted.
const WARM_UP_CALLS: usize = 1_000;
/// Above it, times differ.
const T_LIMIT: f64 = 4.5;
/// Shares of the calls, the fastest ones, that are compared.
const SHARES: [f64; 4] = [1.0, 0.9, 0.5, 0.1];

/// Masks for [`Batch::fill`].
const RANDOM: u8 = 0xff;
const ZEROS: u8 = 0;

/// [`ZEROS`] or [`RANDOM`], by the class. What is done with it is compiled to the same instructions for
/// both, since the compiler does not see that there are but two values.
fn mask(class: bool) -> u8 {
    black_box(u8::from(class).wrapping_neg())
}

type Buffer = [u8; LEN + TAG_LEN];

/// What a call works on; always in the same memory.
struct Batch {
    keys: Vec<AeadKey>,
    buffers: Vec<Buffer>,
}

impl Batch {
    fn new() -> Self {
        let keys = (0..BATCH).map(|_| AeadKey::new(&[0; KEY_LEN])).collect();
        Self { keys, buffers: vec![[0; LEN + TAG_LEN]; BATCH] }
    }

    /// Keys, and packets, are all zeros, or all random: ANDed with masks.
    fn fill(&mut self, key_mask: u8, packet_mask: u8, rng: &mut StdRng) {
        for (key, buffer) in self.keys.iter_mut().zip(&mut self.buffers) {
            let (mut bytes, mut packet): ([u8; KEY_LEN], [u8; LEN]) = (rng.random(), rng.random());
            bytes.iter_mut().for_each(|byte| *byte &= key_mask);
            packet.iter_mut().for_each(|byte| *byte &= packet_mask);
            *key = AeadKey::new(&bytes);
            buffer[..LEN].copy_from_slice(&packet);
        }
    }

    /// Packets whose ciphertext is all zeros, or random: ANDed with a mask.
    fn fill_for_ciphertext(&mut self, mask: u8, aead: &dyn BatchAead, rng: &mut StdRng) {
        self.fill(RANDOM, ZEROS, rng);
        aead.seal(&mut self.jobs());
        // Zeros have become the key stream.
        for buffer in &mut self.buffers {
            let ciphertext: [u8; LEN] = rng.random();
            buffer.iter_mut().zip(ciphertext).for_each(|(byte, wanted)| *byte ^= wanted & mask);
        }
    }

    fn jobs(&mut self) -> Vec<Job<'_>> {
        let jobs = self.keys.iter().zip(&mut self.buffers).enumerate();
        jobs.map(|(i, (key, buffer))| Job::new(key, i as u64, buffer)).collect()
    }
}

/// Times of the calls, in nanoseconds, with their class.
type Times = Vec<(f64, bool)>;

/// Prepares and times calls, each of a class that chance decides.
fn measure(
    batch: &mut Batch,
    prepare: impl Fn(&mut Batch, bool, &mut StdRng),
    call: impl Fn(&mut [Job<'_>]),
) -> Times {
    let count = env::var("TIDEGATE_CALLS").ok().and_then(|count| count.parse().ok());
    let mut rng = rng();
    let mut time = || {
        let class = rng.random();
        prepare(batch, class, &mut rng);
        let mut jobs = batch.jobs();
        let start = Instant::now();
        call(black_box(&mut jobs));
        (start.elapsed().as_nanos() as f64, class)
    };
    let all = WARM_UP_CALLS + count.unwrap_or(CALLS);
    (0..all).map(|_| time()).skip(WARM_UP_CALLS).collect()
}

/// Welch's t of two classes: the difference of their means, in its own standard deviations. Infinite if
/// they have nothing in common, as where all of the fastest calls are of one class.
fn welch(times: &[(f64, bool)]) -> f64 {
    let of_class = |class| {
        let of_class = || times.iter().filter(move |time| time.1 == class).map(|time| time.0);
        let count = of_class().count() as f64;
        let mean = of_class().sum::<f64>() / count;
        let variance = of_class().map(|time| (time - mean).powi(2)).sum::<f64>() / (count - 1.0);
        (mean, variance / count)
    };
    let ((mean_a, error_a), (mean_b, error_b)) = (of_class(false), of_class(true));
    let t = (mean_a - mean_b) / (error_a + error_b).sqrt();
    if t.is_nan() { f64::INFINITY } else { t }
}

/// Prints the greatest t of all shares.
fn report(name: &str, mut times: Times) {
    times.sort_by(|a, b| a.0.total_cmp(&b.0));
    let median = times[times.len() / 2].0;
    let of_share = |share: f64| welch(&times[..(times.len() as f64 * share) as usize]);
    let t = SHARES.map(of_share).into_iter().max_by(|a, b| a.abs().total_cmp(&b.abs()));
    let t = t.expect("there are shares");
    let verdict = if t.abs() < T_LIMIT { "equal" } else { "DIFFERS" };
    println!("{name:48} t = {t:9.2}  {verdict}  ({} calls of {median} ns)", times.len());
}

/// Changes one byte of every buffer: the first from `first` on, or, `distance` behind it, the last.
fn spoil(batch: &mut Batch, first: usize, distance: usize, class: bool) {
    let at = first + (distance & usize::from(mask(class)));
    batch.buffers.iter_mut().for_each(|buffer| buffer[at] ^= 0x40);
}

fn test(aead: &dyn BatchAead) {
    let batch = &mut Batch::new();
    let seal = |jobs: &mut [Job<'_>]| aead.seal(jobs);
    let open = |jobs: &mut [Job<'_>]| aead.open(jobs);
    let name = |what: &str| format!("{} {what}", aead.name());

    let keys = |batch: &mut Batch, class, rng: &mut StdRng| batch.fill(mask(class), RANDOM, rng);
    let packets = |batch: &mut Batch, class, rng: &mut StdRng| batch.fill(RANDOM, mask(class), rng);
    let ciphertext = |batch: &mut Batch, class, rng: &mut StdRng| {
        batch.fill_for_ciphertext(mask(class), aead, rng);
    };
    report(&name("seal: keys of zeros or random"), measure(batch, keys, seal));
    report(&name("seal: packets of zeros or random"), measure(batch, packets, seal));
    report(&name("seal: ciphertext of zeros or random"), measure(batch, ciphertext, seal));

    let sealed = |batch: &mut Batch, class, rng: &mut StdRng| {
        keys(batch, class, rng);
        seal(&mut batch.jobs());
    };
    report(&name("open: keys of zeros or random"), measure(batch, sealed, open));
    let sealed = |batch: &mut Batch, class, rng: &mut StdRng| {
        packets(batch, class, rng);
        seal(&mut batch.jobs());
    };
    report(&name("open: packets of zeros or random"), measure(batch, sealed, open));
    let sealed = |batch: &mut Batch, class, rng: &mut StdRng| {
        ciphertext(batch, class, rng);
        seal(&mut batch.jobs());
    };
    report(&name("open: ciphertext of zeros or random"), measure(batch, sealed, open));

    let random = |batch: &mut Batch, rng: &mut StdRng| {
        batch.fill(RANDOM, RANDOM, rng);
        seal(&mut batch.jobs());
    };
    let spoilt = |batch: &mut Batch, class, rng: &mut StdRng| {
        random(batch, rng);
        spoil(batch, LEN, TAG_LEN - 1, class);
    };
    report(&name("open: first or last byte of tags wrong"), measure(batch, spoilt, open));

    let spoilt = |batch: &mut Batch, class, rng: &mut StdRng| {
        random(batch, rng);
        // One bit of each tag, or half of them.
        let mask = u128::from_ne_bytes([mask(class); TAG_LEN]);
        let change = (rng.random::<u128>() & mask) | 1;
        for buffer in &mut batch.buffers {
            let tag = buffer.last_chunk_mut::<TAG_LEN>().expect("a tag is there");
            *tag = (u128::from_ne_bytes(*tag) ^ change).to_ne_bytes();
        }
    };
    report(&name("open: one bit or half of tags' bits wrong"), measure(batch, spoilt, open));

    // Which packet it is tells the outcome; what of it was changed must not show.
    let spoilt = |batch: &mut Batch, class, rng: &mut StdRng| {
        random(batch, rng);
        spoil(batch, 0, LEN - 1, class);
    };
    report(&name("open: first or last byte of packets wrong"), measure(batch, spoilt, open));

    let same = |batch: &mut Batch, _: bool, rng: &mut StdRng| random(batch, rng);
    report(&name("open: control, classes alike"), measure(batch, same, open));
}

/// A comparison that ends at the first difference.
fn leaks(jobs: &mut [Job<'_>]) {
    for job in jobs {
        let tag = &job.buffer[LEN..];
        job.ok = tag.iter().all(|&byte| black_box(byte) == 0);
    }
}

fn main() {
    back_ends().into_iter().for_each(test);
    let spoilt = |batch: &mut Batch, class, _: &mut StdRng| {
        batch.buffers.iter_mut().for_each(|buffer| buffer[LEN..].fill(0));
        spoil(batch, LEN, TAG_LEN - 1, class);
    };
    let times = measure(&mut Batch::new(), spoilt, leaks);
    report("a comparison that leaks, to be seen", times);
}
