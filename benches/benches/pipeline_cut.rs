//! How long does it take to make packets of a super-packet, all but the sealing?
//!
//! `cut`: 64 KiB of TCP in IPv4 into packets of 1,440 bytes, and into tiny ones. `outbound`: the same from
//! a queue in memory to a socket that takes everything, through a worker's outbound half with a back end
//! that seals nothing: reading (a copy), cutting, routing, counters, headers. Rates are of packets cut.

use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use benches::ipv4_packet;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ipnet::IpNet;
use wg_common::endpoint::Endpoint;
use wg_common::id::{DeviceId, PeerId, ReceiverIndex, ShardId, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::time::Now;
use wg_userspace::aead::{BatchAead, Job};
use wg_userspace::datapath::outbound::{DatagramSink, Outbound, Outgoing, PacketSource, Unsent};
use wg_userspace::datapath::{Shared, SocketGroup};
use wg_userspace::key::PublicKey;
use wg_userspace::noise::{Established, Role, TransportKeys};
use wg_userspace::routing::AllowedIps;
use wg_userspace::segments::vnet::{PartialChecksum, SegmentKind, Segments};
use wg_userspace::segments::{Cut, VnetHeader};
use wg_userspace::session::{HotPeer, Keypair};

/// A super-packet of TCP whose segments have `payload_len` bytes.
fn super_packet(payload_len: u16) -> (VnetHeader, Vec<u8>) {
    let mut packet = ipv4_packet(65_535 / 1440 * 1400 + 40);
    packet[9] = 6; // TCP
    packet[32..34].copy_from_slice(&[0x50, 0x10]);
    let kind = SegmentKind::TcpV4;
    let segments = Segments { kind, has_cwr: false, headers_len: 40, payload_len };
    let checksum = Some(PartialChecksum { start: 20, offset: 16 });
    (VnetHeader { checksum, segments: Some(segments) }, packet)
}

/// Seals nothing.
struct Plain;

impl BatchAead for Plain {
    fn name(&self) -> &'static str {
        "plain"
    }

    fn seal(&self, jobs: &mut [Job<'_>]) {
        black_box(jobs);
    }

    fn open(&self, jobs: &mut [Job<'_>]) {
        black_box(jobs);
    }
}

/// A queue that always has the same packet.
struct Queue(VnetHeader, Vec<u8>);

impl PacketSource for Queue {
    fn read(&self, buffer: &mut [u8]) -> io::Result<Option<(VnetHeader, usize)>> {
        buffer[..self.1.len()].copy_from_slice(&self.1);
        Ok(Some((self.0, self.1.len())))
    }
}

/// Takes everything, and counts it.
#[derive(Default)]
struct Sink(std::cell::Cell<u64>);

impl DatagramSink for Sink {
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
        black_box(datagrams);
        self.0.set(self.0.get() + datagrams.len() as u64);
        Unsent::default()
    }
}

/// The outbound half of a worker with one peer, which owns everything and has a keypair.
fn outbound(now: Now) -> Outbound {
    const INDEXES: IndexPermutation = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
    let sockets = SocketGroup { port: 51820, of_worker: Vec::new() };
    let (shared, _) =
        Shared::new(DeviceId(0), 1, Vec::new(), sockets, None, INDEXES).expect("an event");
    let mut allowed_ips = AllowedIps::default();
    allowed_ips.insert("0.0.0.0/0".parse::<IpNet>().expect("a prefix"), PeerId(1));
    shared.routing.store(allowed_ips.snapshot());
    let peer = Arc::new(HotPeer::new(PeerId(1), DeviceId(0), PublicKey::from_bytes([1; 32])));
    let endpoint = Endpoint::configured("192.0.2.1:1000".parse().expect("an address"));
    peer.endpoint.store(Some(Arc::new(endpoint)));
    shared.peers.set(1, Arc::clone(&peer));
    let index = ReceiverIndex::from_wire([1, 2, 3, 4]);
    let established = Established {
        keys: TransportKeys { send: [1; 32], receive: [2; 32] },
        local_index: index,
        remote_index: index,
        role: Role::Initiator,
    };
    let keypair = Keypair::new(&established, Arc::downgrade(&peer), ShardId::new(0), now);
    let keypair = Arc::new(keypair);
    peer.keypairs.update(|keypairs| keypairs.installed_by_initiator(Arc::clone(&keypair)));
    Outbound::new(WorkerId(0), shared, &Plain)
}

fn cut(c: &mut Criterion) {
    let mut group = c.benchmark_group("cut");
    for payload_len in [1400, 100] {
        let (header, packet) = super_packet(payload_len);
        let segments = header.segments.expect("it is a super-packet");
        let count = (packet.len() - 40).div_ceil(payload_len.into()) as u64;
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::new("cut", payload_len + 40), |b| {
            let mut segment = vec![0; 64 * 1600];
            b.iter(|| {
                let packet = black_box(&packet);
                let cut = Cut::new(segments, header.checksum, packet).expect("it holds together");
                for index in 0..cut.count() {
                    cut.write(packet, index, &mut segment[index % 64 * 1600..]);
                }
                black_box(&mut segment);
            });
        });
    }
    let now = Now::from_boot_ns(1_000_000_000);
    let (header, packet) = super_packet(1400);
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::new("outbound", 1440), |b| {
        b.iter_custom(|count| {
            let (mut outbound, sink) = (outbound(now), Sink::default());
            let queue = Queue(header, packet.clone());
            let start = std::time::Instant::now();
            while sink.0.get() < count {
                outbound.process(&queue, &sink, now).expect("it always reads");
            }
            start.elapsed().mul_f64(count as f64 / sink.0.get() as f64)
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = cut
}
criterion_main!(benches);
