//! How long does it take to say which message a datagram is, and which datagram a frame brings?
//!
//! Batches of 64 datagrams: of one kind each, or `mixed`, which no branch predictor can learn; and
//! of frames with a full transport message each, as a worker finds them in the UMEM.

use std::hint::black_box;
use std::time::Duration;

use benches::{BATCH_MAX, FULL_MESSAGE_LEN, frame, message, rng};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::RngExt;
use wg_common::headers::parse_frame;
use wg_common::id::ReceiverIndex;
use wg_common::message::classify;
use wg_common::protocol::{
    INITIATION_LEN, RESPONSE_LEN, TRANSPORT_MIN_LEN, TYPE_INITIATION, TYPE_RESPONSE, TYPE_TRANSPORT,
};

/// So many that the order in which kinds follow each other is not learnt.
const MIXED_COUNT: usize = 1 << 14;

fn datagrams(c: &mut Criterion) {
    let index = ReceiverIndex::from_wire([5, 3, 2, 1]);
    let transport = message(TYPE_TRANSPORT, index, FULL_MESSAGE_LEN);
    let initiation = message(TYPE_INITIATION, index, INITIATION_LEN);
    let foreign = message(0x16, index, 300);
    let kinds = [
        transport.clone(),
        initiation.clone(),
        message(TYPE_RESPONSE, index, RESPONSE_LEN),
        message(TYPE_TRANSPORT, index, TRANSPORT_MIN_LEN),
        foreign.clone(),
    ];
    let mut rng = rng();
    let mixed = (0..MIXED_COUNT).map(|_| kinds[rng.random_range(0..kinds.len())].clone()).collect();

    let mut group = c.benchmark_group("classify");
    group.throughput(Throughput::Elements(BATCH_MAX as u64));
    for (name, datagrams) in [
        ("transport", vec![transport; BATCH_MAX]),
        ("initiation", vec![initiation; BATCH_MAX]),
        ("foreign", vec![foreign; BATCH_MAX]),
        ("mixed", mixed),
    ] {
        let mut batches = datagrams.chunks_exact(BATCH_MAX).cycle();
        group.bench_function(BenchmarkId::new(name, BATCH_MAX), |b| {
            b.iter(|| {
                for datagram in batches.next().expect("a cycle") {
                    _ = black_box(classify(black_box(datagram)));
                }
            });
        });
    }
    group.finish();
}

fn frames(c: &mut Criterion) {
    let transport =
        message(TYPE_TRANSPORT, ReceiverIndex::from_wire([5, 3, 2, 1]), FULL_MESSAGE_LEN);
    let mut group = c.benchmark_group("classify_frame");
    group.throughput(Throughput::Elements(BATCH_MAX as u64));
    for (name, dst) in [("v4", "192.0.2.2:51820"), ("v6", "[2001:db8::2]:51820")] {
        let frame = frame(dst.parse().expect("an address"), &transport);
        let frames = vec![frame; BATCH_MAX];
        group.bench_function(BenchmarkId::new(name, BATCH_MAX), |b| {
            b.iter(|| {
                for frame in &frames {
                    let datagram = parse_frame(black_box(frame)).expect("a datagram");
                    _ = black_box(classify(&frame[datagram.payload.clone()]));
                    black_box(&datagram);
                }
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = datagrams, frames
}
criterion_main!(benches);
