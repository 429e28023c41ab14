//! Does the time of sealing and opening tell anything about keys, packets or tags?
//!
//! The method is that of dudect (Reparaz, Balasch, Verbauwhede: "Dude, is my code constant time?"):
//! calls on inputs of two classes follow each other in random order, from the same memory, and Welch's
//! t compares their times. What the scheduler and interrupts add comes to both classes alike, and only
//! slows: so the test is repeated on the fastest half and on the fastest nine tenths, and the greatest |t| counts.
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
const SHARES: [f64; 3] = [1.0, 0.9, 0.5];

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

    /// Keys, and packets, are all zeros, or all random.
    fn fill(&mut self, keys_are_random: bool, packets_are_random: bool, rng: &mut StdRng) {
        for (key, buffer) in self.keys.iter_mut().zip(&mut self.buffers) {
            // Both classes do the same here.
            let (mut bytes, mut packet): ([u8; KEY_LEN], [u8; LEN]) = (rng.random(), rng.random());
            let keep = |is_random: bool| if is_random { 0xff } else { 0 };
            bytes.iter_mut().for_each(|byte| *byte &= keep(keys_are_random));
            packet.iter_mut().for_each(|byte| *byte &= keep(packets_are_random));
            *key = AeadKey::new(&bytes);
            buffer[..LEN].copy_from_slice(&packet);
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

/// Changes one byte of every tag: the first, or the last.
fn spoil_tags(batch: &mut Batch, last: bool) {
    let at = LEN + if last { TAG_LEN - 1 } else { 0 };
    batch.buffers.iter_mut().for_each(|buffer| buffer[at] ^= 0x40);
}

fn test(aead: &dyn BatchAead) {
    let batch = &mut Batch::new();
    let seal = |jobs: &mut [Job<'_>]| aead.seal(jobs);
    let open = |jobs: &mut [Job<'_>]| aead.open(jobs);
    let name = |what: &str| format!("{} {what}", aead.name());

    let keys = |batch: &mut Batch, class, rng: &mut StdRng| batch.fill(class, true, rng);
    let packets = |batch: &mut Batch, class, rng: &mut StdRng| batch.fill(true, class, rng);
    report(&name("seal: keys of zeros or random"), measure(batch, keys, seal));
    report(&name("seal: packets of zeros or random"), measure(batch, packets, seal));

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

    let spoilt = |batch: &mut Batch, class, rng: &mut StdRng| {
        sealed(batch, true, rng);
        spoil_tags(batch, class);
    };
    report(&name("open: first or last byte of tags wrong"), measure(batch, spoilt, open));

    let spoilt = |batch: &mut Batch, class, rng: &mut StdRng| {
        sealed(batch, true, rng);
        // One bit of each tag, or half of them.
        let mask = if class { rng.random() } else { 1_u128 };
        for buffer in &mut batch.buffers {
            let tag = buffer.last_chunk_mut::<TAG_LEN>().expect("a tag is there");
            *tag = (u128::from_ne_bytes(*tag) ^ mask).to_ne_bytes();
        }
    };
    report(&name("open: one bit or half of tags' bits wrong"), measure(batch, spoilt, open));

    let spoilt = |batch: &mut Batch, class: bool, rng: &mut StdRng| {
        sealed(batch, true, rng);
        // Which packet it is tells the outcome; what of it was changed must not show.
        let at = if class { LEN - 1 } else { 0 };
        batch.buffers.iter_mut().for_each(|buffer| buffer[at] ^= 1);
    };
    report(&name("open: first or last byte of packets wrong"), measure(batch, spoilt, open));
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
        spoil_tags(batch, class);
    };
    let times = measure(&mut Batch::new(), spoilt, leaks);
    report("a comparison that leaks, to be seen", times);
}
