//! How long does the replay window take for a packet?
//!
//! Batches of 64 counters: `in_order` as they were sent; `reordered` within runs of 64; `replayed`,
//! refused because they came before.

use std::time::Duration;

use benches::{BATCH_MAX, rng};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::seq::SliceRandom;
use wg_common::id::Counter;
use wg_userspace::session::ReplayWindow;

fn replay(c: &mut Criterion) {
    let in_order: Vec<u64> = (0..BATCH_MAX as u64).collect();
    let mut reordered = in_order.clone();
    reordered.shuffle(&mut rng());

    let mut group = c.benchmark_group("replay");
    group.throughput(Throughput::Elements(BATCH_MAX as u64));
    for (name, run) in [("in_order", &in_order), ("reordered", &reordered)] {
        let (window, mut first) = (ReplayWindow::new(), 0);
        group.bench_function(BenchmarkId::new(name, BATCH_MAX), |b| {
            b.iter(|| {
                assert!(run.iter().all(|counter| window.accept(Counter(first + counter))));
                first += BATCH_MAX as u64;
            });
        });
    }

    let window = ReplayWindow::new();
    assert!(in_order.iter().all(|&counter| window.accept(Counter(counter))));
    group.bench_function(BenchmarkId::new("replayed", BATCH_MAX), |b| {
        b.iter(|| assert!(!reordered.iter().any(|&counter| window.accept(Counter(counter)))));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = replay
}
criterion_main!(benches);
