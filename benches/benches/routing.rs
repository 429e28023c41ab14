//! How long does it take to find the peer that owns an address, and to change who does?
//!
//! `hit`: a batch of 64 addresses, each inside a random one of as many prefixes as the parameter
//! says; `miss`: nobody's. `move`: one host prefix goes from a peer to another while the snapshot
//! before lives, and the one after is published. The prefixes are those of a gateway: mostly single
//! hosts, some networks.

use std::hint::black_box;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use benches::{BATCH_MAX, rng};
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rand::RngExt;
use wg_common::id::PeerId;
use wg_userspace::routing::AllowedIps;

const PREFIX_COUNTS: [usize; 2] = [1_000, 100_000];
/// More than the first level of a cache holds, as the addresses of many peers' packets are.
const ADDRESS_COUNT: usize = 1 << 16;

/// In 10.0.0.0/8: 90 % hosts, 8 % /24, 2 % /16 to /20.
fn prefixes_v4(count: usize) -> Vec<Ipv4Net> {
    let mut rng = rng();
    let nets = std::iter::repeat_with(|| {
        let len = match rng.random_range(0..100) {
            0..90 => 32,
            90..98 => 24,
            _ => rng.random_range(16..=20),
        };
        let addr = 10 << 24 | rng.random_range(0u32..1 << 24);
        Ipv4Net::new(addr.into(), len).expect("shorter than an address").trunc()
    });
    nets.take(count).collect()
}

/// In 2001:db8::/32: 60 % hosts, 30 % /64, 10 % /48 to /56.
fn prefixes_v6(count: usize) -> Vec<Ipv6Net> {
    let mut rng = rng();
    let nets = std::iter::repeat_with(|| {
        let len = match rng.random_range(0..100) {
            0..60 => 128,
            60..90 => 64,
            _ => rng.random_range(48..=56),
        };
        let addr = 0x2001_0db8 << 96 | rng.random_range(0u128..1 << 96);
        Ipv6Net::new(addr.into(), len).expect("shorter than an address").trunc()
    });
    nets.take(count).collect()
}

fn allowed_ips<N: Into<IpNet> + Copy>(nets: &[N]) -> AllowedIps {
    let mut allowed = AllowedIps::default();
    for (peer, &net) in (0..).map(PeerId).zip(nets) {
        allowed.insert(net.into(), peer);
    }
    allowed
}

fn v4(c: &mut Criterion) {
    let mut group = c.benchmark_group("routing_v4");
    for count in PREFIX_COUNTS {
        let nets = prefixes_v4(count);
        let table = allowed_ips(&nets).snapshot();
        let mut rng = rng();
        let hits: Vec<Ipv4Addr> = std::iter::repeat_with(|| {
            let net = nets[rng.random_range(0..nets.len())];
            (net.network().to_bits() | rng.random::<u32>() & net.hostmask().to_bits()).into()
        })
        .take(ADDRESS_COUNT)
        .collect();
        let misses: Vec<Ipv4Addr> =
            (0..ADDRESS_COUNT).map(|_| (172 << 24 | rng.random::<u32>() >> 8).into()).collect();
        let lookup = |addr| table.lookup_v4(addr);
        bench_lookups(&mut group, BenchmarkId::new("hit", count), &hits, BATCH_MAX, lookup);
        bench_lookups(&mut group, BenchmarkId::new("miss", count), &misses, 0, lookup);
    }
    group.finish();
}

fn v6(c: &mut Criterion) {
    let mut group = c.benchmark_group("routing_v6");
    for count in PREFIX_COUNTS {
        let nets = prefixes_v6(count);
        let table = allowed_ips(&nets).snapshot();
        let mut rng = rng();
        let hits: Vec<Ipv6Addr> = std::iter::repeat_with(|| {
            let net = nets[rng.random_range(0..nets.len())];
            (net.network().to_bits() | rng.random::<u128>() & net.hostmask().to_bits()).into()
        })
        .take(ADDRESS_COUNT)
        .collect();
        let misses: Vec<Ipv6Addr> =
            (0..ADDRESS_COUNT).map(|_| (0xfd << 120 | rng.random::<u128>() >> 8).into()).collect();
        let lookup = |addr| table.lookup_v6(addr);
        bench_lookups(&mut group, BenchmarkId::new("hit", count), &hits, BATCH_MAX, lookup);
        bench_lookups(&mut group, BenchmarkId::new("miss", count), &misses, 0, lookup);
    }
    group.finish();
}

/// Looks up batch after batch of `addrs`; in each, as many have an owner as `owned_count` says.
fn bench_lookups<A: Copy>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    addrs: &[A],
    owned_count: usize,
    lookup: impl Fn(A) -> Option<PeerId>,
) {
    group.throughput(Throughput::Elements(BATCH_MAX as u64));
    let mut batches = addrs.chunks_exact(BATCH_MAX).cycle();
    group.bench_function(id, |b| {
        b.iter(|| {
            let batch = batches.next().expect("a cycle");
            let owned = batch.iter().filter(|&&addr| black_box(lookup(addr)).is_some());
            assert_eq!(owned.count(), owned_count);
        });
    });
}

fn change(c: &mut Criterion) {
    let mut group = c.benchmark_group("routing_change");
    for count in PREFIX_COUNTS {
        let nets_v4 = prefixes_v4(count).into_iter().map(IpNet::from);
        let nets_v6 = prefixes_v6(count).into_iter().map(IpNet::from);
        let nets: Vec<IpNet> = nets_v4.chain(nets_v6).collect();
        for (name, host_len) in [("move_v4", 32), ("move_v6", 128)] {
            let mut allowed = allowed_ips(&nets);
            let mut published = allowed.snapshot();
            let mut hosts = nets.iter().filter(|net| net.prefix_len() == host_len).cycle();
            let mut peers = (0..AllowedIps::PEER_MAX.0).map(PeerId).cycle();
            group.bench_function(BenchmarkId::new(name, count), |b| {
                b.iter(|| {
                    let (net, peer) = hosts.next().zip(peers.next()).expect("cycles");
                    allowed.insert(*net, peer);
                    published = allowed.snapshot();
                });
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = v4, v6, change
}
criterion_main!(benches);
