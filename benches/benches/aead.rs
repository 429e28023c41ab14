//! How long does it take to seal, and to open, a batch of packets?
//!
//! `<len>x<batch>`: bytes of each packet, packets of one call, all with one key; `-mixed`: each
//! with a key of its own; `imix`: seven packets of 64 bytes to four of 576 to one of 1,440. Whatever
//! the batch, the 64 packets of a pool take turns, so that all have the same footprint. boringtun
//! encapsulates and decapsulates one by one, from one buffer to another, header and replay window
//! included: that is what its interface offers.

use std::time::Duration;

use benches::{BATCH_MAX, BUFFER_LEN, connected_tunns, ipv4_packet, time_with_refills, to_network};
use boringtun::noise::{Tunn, TunnResult};
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use wg_common::protocol::{TAG_LEN, TRANSPORT_OVERHEAD};
use wg_userspace::aead::choice::back_ends;
use wg_userspace::aead::{AeadKey, BatchAead, Job};

const LENS: [Len; 4] = [Len::All(64), Len::All(256), Len::All(1440), Len::Imix];
const BATCHES: [usize; 8] = [1, 2, 3, 4, 8, 16, 32, BATCH_MAX];
/// Those that boringtun is measured with: it knows no batches.
const BATCHES_OF_BORINGTUN: [usize; 2] = [1, BATCH_MAX];
/// Twelve packets as they may follow each other.
const IMIX: [usize; 12] = [64, 576, 64, 64, 576, 64, 1440, 64, 576, 64, 576, 64];

/// How long packets are.
#[derive(Clone, Copy, PartialEq)]
enum Len {
    All(usize),
    Imix,
}

impl Len {
    /// Bytes of the packet at this place of the pool.
    fn at(self, place: usize) -> usize {
        match self {
            Self::All(len) => len,
            Self::Imix => IMIX[place % IMIX.len()],
        }
    }
}

/// What is measured for each back end.
#[derive(Clone, Copy)]
struct Case {
    len: Len,
    batch: usize,
    mixed: bool,
}

impl Case {
    fn all() -> impl Iterator<Item = Case> {
        LENS.into_iter()
            .flat_map(|len| BATCHES.map(|batch| (len, batch)))
            .flat_map(|(len, batch)| [false, true].map(|mixed| Case { len, batch, mixed }))
            // One packet has one key, unless it is one of several lengths.
            .filter(|case| case.len == Len::Imix || case.batch > 1 || !case.mixed)
            .filter(|case| case.len != Len::Imix || case.mixed)
    }

    fn id(self, back_end: &str) -> BenchmarkId {
        let Case { len, batch, mixed } = self;
        let len = match len {
            Len::All(len) => len.to_string(),
            Len::Imix => "imix".to_owned(),
        };
        BenchmarkId::new(back_end, format!("{len}x{batch}{}", if mixed { "-mixed" } else { "" }))
    }

    fn key_count(self) -> usize {
        if self.mixed { BATCH_MAX } else { 1 }
    }

    /// Calls until every packet of the pool had its turn, but for a rest of less than a batch.
    fn call_count(self) -> usize {
        BATCH_MAX / self.batch
    }

    fn is_for_boringtun(self) -> bool {
        BATCHES_OF_BORINGTUN.contains(&self.batch)
    }
}

/// Buffers as frames of a UMEM have them: 64-byte aligned, 2 KiB apart.
struct Pool {
    bytes: Vec<u8>,
    offset: usize,
}

impl Pool {
    fn new() -> Self {
        const ALIGN: usize = 64;
        let bytes = vec![0; BATCH_MAX * BUFFER_LEN + ALIGN];
        let offset = bytes.as_ptr().align_offset(ALIGN);
        Self { bytes, offset }
    }

    fn buffers(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.bytes[self.offset..].chunks_exact_mut(BUFFER_LEN)
    }
}

fn keys(count: usize) -> Vec<AeadKey> {
    (0..count).map(|i| AeadKey::new(&[i as u8; 32])).collect()
}

fn jobs<'a>(case: Case, keys: &'a [AeadKey], pool: &'a mut Pool) -> Vec<Job<'a>> {
    let jobs = pool.buffers().enumerate().map(|(i, buffer)| {
        let len = case.len.at(i);
        let buffer = &mut buffer[..len + TAG_LEN];
        buffer[..len].copy_from_slice(&ipv4_packet(len));
        Job::new(&keys[i % keys.len()], i as u64, buffer)
    });
    jobs.collect()
}

fn seal(c: &mut Criterion) {
    let mut group = c.benchmark_group("seal");
    for case in Case::all() {
        group.throughput(Throughput::Elements(case.batch as u64));
        for aead in back_ends() {
            seal_with(aead, case, &mut group);
        }
        if !case.is_for_boringtun() {
            continue;
        }
        let packets: Vec<Vec<u8>> = (0..BATCH_MAX).map(|i| ipv4_packet(case.len.at(i))).collect();
        let mut tunns: Vec<Tunn> = (0..case.key_count()).map(|_| connected_tunns().0).collect();
        let mut sealed = vec![[0; BUFFER_LEN]; BATCH_MAX];
        let mut next = 0;
        group.bench_function(case.id("boringtun"), |b| {
            b.iter(|| {
                for (i, sealed) in (next..).zip(&mut sealed[next..next + case.batch]) {
                    let tunn = &mut tunns[i % case.key_count()];
                    to_network(tunn.encapsulate(&packets[i], sealed));
                }
                next = (next + case.batch) % BATCH_MAX;
            });
        });
    }
    group.finish();
}

fn seal_with(aead: &dyn BatchAead, case: Case, group: &mut BenchmarkGroup<'_, WallTime>) {
    let (keys, mut pool) = (keys(case.key_count()), Pool::new());
    let mut jobs = jobs(case, &keys, &mut pool);
    let mut call = 0;
    group.bench_function(case.id(aead.name()), |b| {
        b.iter(|| {
            aead.seal(&mut jobs[call * case.batch..(call + 1) * case.batch]);
            call = (call + 1) % case.call_count();
        });
    });
}

fn open(c: &mut Criterion) {
    let mut group = c.benchmark_group("open");
    for case in Case::all() {
        group.throughput(Throughput::Elements(case.batch as u64));
        for aead in back_ends() {
            open_with(aead, case, &mut group);
        }
        if !case.is_for_boringtun() {
            continue;
        }
        let packets: Vec<Vec<u8>> = (0..BATCH_MAX).map(|i| ipv4_packet(case.len.at(i))).collect();
        let (mut senders, mut receivers): (Vec<Tunn>, Vec<Tunn>) =
            (0..case.key_count()).map(|_| connected_tunns()).unzip();
        let mut opened = vec![[0; BUFFER_LEN]; BATCH_MAX];
        // A datagram opens once: the next time it is a replay.
        let seal_all = |datagrams: &mut Vec<[u8; BUFFER_LEN]>| {
            for (i, datagram) in datagrams.iter_mut().enumerate() {
                let tunn = &mut senders[i % case.key_count()];
                let len = to_network(tunn.encapsulate(&packets[i], datagram)).len();
                assert_eq!(len, sealed_len(case, i));
            }
        };
        let open_batch = |datagrams: &mut Vec<[u8; BUFFER_LEN]>, call: usize| {
            let batch = call * case.batch..(call + 1) * case.batch;
            for i in batch {
                let tunn = &mut receivers[i % case.key_count()];
                let datagram = &datagrams[i][..sealed_len(case, i)];
                let result = tunn.decapsulate(None, datagram, &mut opened[i]);
                assert!(matches!(result, TunnResult::WriteToTunnelV4(..)));
            }
        };
        let mut datagrams = vec![[0; BUFFER_LEN]; BATCH_MAX];
        bench_used_up(&mut group, case.id("boringtun"), case, &mut datagrams, seal_all, open_batch);
    }
    group.finish();
}

fn open_with(aead: &dyn BatchAead, case: Case, group: &mut BenchmarkGroup<'_, WallTime>) {
    let (keys, mut pool) = (keys(case.key_count()), Pool::new());
    let mut jobs = jobs(case, &keys, &mut pool);
    aead.seal(&mut jobs);
    let sealed: Vec<Vec<u8>> = jobs.iter().map(|job| job.buffer.to_vec()).collect();
    // An opened buffer holds the packet: what came has to be put there again.
    let refill = |jobs: &mut Vec<Job<'_>>| {
        for (job, sealed) in jobs.iter_mut().zip(&sealed) {
            job.buffer.copy_from_slice(sealed);
        }
    };
    let open_batch = |jobs: &mut Vec<Job<'_>>, call: usize| {
        let batch = &mut jobs[call * case.batch..(call + 1) * case.batch];
        aead.open(batch);
        assert!(batch.iter().all(|job| job.ok));
    };
    bench_used_up(group, case.id(aead.name()), case, &mut jobs, refill, open_batch);
}

fn bench_used_up<T>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    case: Case,
    used_up: &mut T,
    mut refill: impl FnMut(&mut T),
    mut run: impl FnMut(&mut T, usize),
) {
    group.bench_function(id, |b| {
        b.iter_custom(|iterations| {
            time_with_refills(iterations, case.call_count(), used_up, &mut refill, &mut run)
        });
    });
}

/// Bytes of a transport message as boringtun makes it of the packet at this place: it does not pad.
fn sealed_len(case: Case, place: usize) -> usize {
    case.len.at(place) + TRANSPORT_OVERHEAD
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = seal, open
}
criterion_main!(benches);
