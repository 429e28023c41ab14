//! What does it cost control to be given many peers at once?
//!
//! A request of 100,000 new peers with one allowed IP each, and the time for each of them: `parse` reads its text,
//! `apply` makes them peers of a device, `serve` gives each a session and lets workers find it, `text` is what is
//! kept for a process that follows. `publish` is one prefix more in a device that has so many, with the snapshot
//! that workers get.

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ipnet::{IpNet, Ipv4Net};
use rand::RngExt;
use wg_common::id::{DeviceId, PeerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::time::Now;
use wg_userspace::aead::RingAead;
use wg_userspace::datapath::{Shared, SocketGroup};
use wg_userspace::device::{AllowedIpChange, Device, PeerChange, SetRequest};
use wg_userspace::handshake::{Handshakes, Os};
use wg_userspace::key::{PrivateKey, PublicKey};
use wg_userspace::session::HotPeer;
use wg_userspace::uapi;

const COUNT: u32 = 100_000;

fn keys() -> Vec<PublicKey> {
    let mut rng = benches::rng();
    (0..COUNT).map(|_| PublicKey::from_bytes(rng.random())).collect()
}

fn request(keys: &[PublicKey]) -> SetRequest {
    let peers = (1..).zip(keys).map(|(number, &key)| {
        let net = Ipv4Net::from(Ipv4Addr::from_bits(10 << 24 | number));
        PeerChange {
            replace_allowed_ips: true,
            allowed_ips: vec![AllowedIpChange::Add(net.into())],
            ..PeerChange::new(key)
        }
    });
    SetRequest { replace_peers: true, peers: peers.collect(), ..SetRequest::default() }
}

fn peers(c: &mut Criterion) {
    let keys = keys();
    let request = request(&keys);
    let mut group = c.benchmark_group("peers");
    group.sample_size(10).throughput(Throughput::Elements(COUNT.into()));

    let text = uapi::format_set(&request);
    let lines = text.strip_prefix("set=1\n").expect("it begins like this");
    group.bench_function("parse", |b| {
        b.iter(|| uapi::parse_set(black_box(lines)).expect("it makes sense"));
    });
    group.bench_function("apply", |b| {
        let new = || (Device::default(), request.clone());
        b.iter_batched(
            new,
            |(mut device, request)| (device.apply(request), device),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("serve", |b| {
        b.iter_batched(
            handshakes,
            |handshakes| {
                handshakes.reserve(keys.len());
                for (id, &key) in (0..).map(PeerId).zip(&keys) {
                    handshakes.add_peer(Arc::new(HotPeer::new(id, DeviceId(0), key)));
                }
                handshakes
            },
            BatchSize::PerIteration,
        );
    });
    let mut device = Device::default();
    device.apply(request.clone());
    group.bench_function("text", |b| {
        b.iter(|| uapi::format_set(black_box(&request)).len());
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("publish", |b| {
        let mut rng = benches::rng();
        let mut snapshot = device.allowed_ips().snapshot();
        b.iter(|| {
            let addr = Ipv4Addr::from_bits(11 << 24 | rng.random::<u32>() >> 8);
            let allowed_ips = vec![AllowedIpChange::Add(IpNet::from(Ipv4Net::from(addr)))];
            let peer = PeerChange { allowed_ips, ..PeerChange::new(keys[0]) };
            let peers = vec![peer];
            device.apply(SetRequest { peers, ..SetRequest::default() });
            snapshot = device.allowed_ips().snapshot();
        });
        drop(snapshot);
    });
    group.finish();
}

/// Of a device with a key.
fn handshakes() -> Handshakes {
    let sockets = SocketGroup { port: 1, of_worker: Vec::new() };
    let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
    let shared = Shared::new(DeviceId(0), 1, Vec::new(), sockets, None, indexes);
    let (shared, _) = shared.expect("the kernel gives an event descriptor");
    let outside = Os::new(Arc::clone(&shared));
    let handshakes = Handshakes::new(shared, outside, &RingAead, None);
    handshakes.set_private_key(Some(PrivateKey::from_bytes([7; 32])), Now::default());
    handshakes
}

criterion_group!(benches, peers);
criterion_main!(benches);
