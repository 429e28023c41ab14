//! Devices on a simulated network: the real engine, a plain model beside it, one clock, and one seed
//! from which all chance comes.
//!
//! ```text
//! TIDEGATE_SIM_SEED=7 TIDEGATE_SIM_TRACE=1 cargo test -p wg-userspace --test sim seeds -- --nocapture
//! TIDEGATE_SIM_SEEDS=10000 cargo test --release -p wg-userspace --test sim seeds -- --nocapture
//! ```
//!
//! With both, so many seeds are run from that one on.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod engine;
mod model;
mod network;
mod outside;
mod record;
mod scenario;
mod world;

use std::env;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use wg_userspace::device::{AllowedIpChange, PeerChange, SetRequest};
use wg_userspace::key::PrivateKey;

use crate::model::Counts;
use crate::network::{MS, SECOND, public_v4};
use crate::world::{PORT, World, inner_v4};

/// Seeds that are run when nobody says how many, if there is time for them.
const SEED_COUNT: u64 = 250;
/// Seeds that are run however long it takes.
const SEED_COUNT_MIN: u64 = 40;
/// After this time, no more seeds are begun when nobody says how many.
const TIME_MAX: Duration = Duration::from_secs(30);

/// Seeds that fail before the rest is left alone.
const FAILED_MAX: usize = 10;
/// Runs one seed, with its number in the environment.
const COMMAND: &str = "cargo test -p wg-userspace --test sim seeds -- --nocapture";

/// What one seed came to.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    hash: u64,
    silence_max: Duration,
    good: Duration,
    datagram_count: u64,
    counts: Counts,
}

/// Lives through one seed; `None` if something did not hold, of which it tells.
fn run(seed: u64, print: bool) -> Option<Run> {
    let (mut world, mut scenario) = scenario::build(seed);
    world.trace.print = print;
    let lived = catch_unwind(AssertUnwindSafe(|| {
        world.run(scenario::length(seed), &mut |world| scenario.act(world));
    }));
    if lived.is_err() {
        eprintln!(
            "seed {seed} failed after {:.6} s. Its last steps:\n{}replay it with\n    \
             TIDEGATE_SIM_SEED={seed} TIDEGATE_SIM_TRACE=1 {COMMAND}",
            world.now as f64 / SECOND as f64,
            world.trace.tail()
        );
        return None;
    }
    Some(Run {
        hash: world.trace.hash,
        silence_max: world.silence_max,
        good: world.good,
        datagram_count: world.datagram_count,
        counts: world.model.counts,
    })
}

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

#[test]
fn seeds() {
    let first = number("TIDEGATE_SIM_SEED");
    let told = number("TIDEGATE_SIM_SEEDS").or(first.map(|_| 1));
    let count = told.unwrap_or(SEED_COUNT);
    let print = number("TIDEGATE_SIM_TRACE").is_some_and(|n| n != 0);
    let first = first.unwrap_or(0);
    let started = Instant::now();
    let next = AtomicU64::new(first);
    let (runs, failed) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let threads = if print { 1 } else { thread::available_parallelism().map_or(1, usize::from) };
    let live = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let is_late =
                told.is_none() && seed >= first + SEED_COUNT_MIN && started.elapsed() > TIME_MAX;
            if is_late || seed >= first + count || failed.lock().unwrap().len() >= FAILED_MAX {
                return;
            }
            match run(seed, print) {
                Some(run) => runs.lock().unwrap().push(run),
                None => failed.lock().unwrap().push(seed),
            }
        }
    };
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(live))));
    let (runs, mut failed) = (runs.into_inner().unwrap(), failed.into_inner().unwrap());
    failed.sort_unstable();
    let sum = |of: fn(&Run) -> u64| runs.iter().map(of).sum::<u64>();
    println!(
        "{} seeds in {:.1} s: {} datagrams, {} sealed, {} delivered, {} replays and {} forgeries \
         refused, {} wrong sources, {} initiations, {} handshake messages taken, {} cookies, {} parcels, \
         {} endpoints moved, {} staged at most, {:.0} s on good paths, silent there for {:.1} s at most",
        runs.len(),
        started.elapsed().as_secs_f64(),
        sum(|run| run.datagram_count),
        sum(|run| run.counts.sealed),
        sum(|run| run.counts.delivered),
        sum(|run| run.counts.replays),
        sum(|run| run.counts.refused),
        sum(|run| run.counts.wrong_source),
        sum(|run| run.counts.initiations),
        sum(|run| run.counts.handshakes),
        sum(|run| run.counts.cookies),
        sum(|run| run.counts.parcels),
        sum(|run| run.counts.moves),
        runs.iter().map(|run| run.counts.staged_max).max().unwrap_or(0),
        runs.iter().map(|run| run.good.as_secs_f64()).sum::<f64>(),
        runs.iter().map(|run| run.silence_max.as_secs_f64()).fold(0.0, f64::max),
    );
    assert!(failed.is_empty(), "seeds that failed: {failed:?}; see above");
}

/// Two devices for a day: a packet every eleven minutes one way, every 37 the other.
#[test]
fn a_sparse_day_costs_little_and_loses_nothing() {
    let mut world = World::new(0);
    world.tick = 500 * MS;
    let keys = [PrivateKey::generate(&mut world.rng), PrivateKey::generate(&mut world.rng)];
    for host in 0..2 {
        world.add_host(2, false, public_v4(host, 0));
    }
    for host in 0..2 {
        let other = 1 - host;
        let peer = PeerChange {
            endpoint: Some(SocketAddr::new(public_v4(other, 0), PORT)),
            allowed_ips: vec![AllowedIpChange::Add(inner_v4(other, 1).into())],
            ..PeerChange::new(keys[other].public_key())
        };
        world.configure(
            host,
            SetRequest {
                private_key: Some(Some(keys[host].clone())),
                peers: vec![peer],
                ..SetRequest::default()
            },
        );
    }
    world.add_flow(0, 1, (inner_v4(0, 1), inner_v4(1, 1)), 11 * 60 * SECOND);
    world.add_flow(1, 0, (inner_v4(1, 1), inner_v4(0, 1)), 37 * 60 * SECOND);
    world.run(24 * 3600 * SECOND, &mut |_| {});
    let packets = world.model.packets.len() as u64;
    assert!(packets > 24 * 60 / 11);
    assert_eq!(world.model.counts.delivered, packets, "nothing is lost");
    let counts = world.model.counts;
    assert!(counts.initiations <= packets, "{} initiations", counts.initiations);
    // Initiation, response, the packet, and the keepalive that answers it.
    let datagrams = world.datagram_count;
    assert!(datagrams <= 4 * packets, "{datagrams} datagrams for {packets} packets");
    for host in &world.hosts {
        assert!(host.engine.handshakes.index_count() <= 2);
    }
}

#[test]
fn a_seed_lives_the_same_life_twice() {
    for seed in [1, 2, 3] {
        let [once, again] = [(); 2].map(|()| run(seed, false).unwrap().hash);
        assert_eq!(once, again, "seed {seed}");
    }
}
