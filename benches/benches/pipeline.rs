//! How long does a worker take for a packet, in memory: everything but AEAD, and with it?
//!
//! Packets have 1,440 bytes, unless a name says otherwise; rates are of packets.
//!
//! `open→coalesce`, from datagrams to what is written to the TUN device, which takes everything. `join`: opened
//! packets, whose checksums are looked at, become runs. `all but AEAD`: a batch through the inbound half, with
//! a back end that opens nothing; `with ring`: with one that does. Of `1` flow of TCP, as it fills one run (47)
//! or a batch (64); of `8` flows, one packet of each after the other; of `64`, where nothing can be joined.
//!
//! `read→segment→seal`, from super-packets of 64 KiB of TCP in a queue to a socket that takes everything. `cut`:
//! the packets alone, of 1,440 bytes and tiny ones. `all but AEAD`: through the outbound half with a back end
//! that seals nothing: reading (a copy), cutting, routing, counters, headers; `with ring`: with one that does.
//!
//! `fan-out`: one tunnel with each back end, on one thread, and on two or more as far as there are CPUs, of which all
//! but the first help: inbound a stream of batches of 64 packets of one flow, which are received by a copy, outbound
//! as above.

use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, LazyLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use benches::{BATCH_MAX, ipv4_packet};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ipnet::IpNet;
use wg_common::endpoint::Endpoint;
use wg_common::headers::{Checksum, IPV4_LEN};
use wg_common::id::{DeviceId, PeerId, ShardId, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::protocol::TRANSPORT_OVERHEAD;
use wg_common::time::Now;
use wg_userspace::aead::{BatchAead, Job, RingAead, choice};
use wg_userspace::counters::Path;
use wg_userspace::datapath::fan_out::{Duty, Helping};
use wg_userspace::datapath::handoff::Mesh;
use wg_userspace::datapath::inbound::{Arrival, Inbound, PacketSink, Run};
use wg_userspace::datapath::outbound::{DatagramSink, Outbound, Outgoing, PacketSource, Unsent};
use wg_userspace::datapath::{Shared, SocketGroup};
use wg_userspace::key::PublicKey;
use wg_userspace::noise::{Established, Role, TransportKeys};
use wg_userspace::routing::AllowedIps;
use wg_userspace::segments::join::{Batch, Plan};
use wg_userspace::segments::vnet::{PartialChecksum, SegmentKind, Segments};
use wg_userspace::segments::{Cut, VnetHeader};
use wg_userspace::session::{HotPeer, Keypair};
use wg_userspace::sys::affinity;

const PACKET_LEN: usize = 1440;
const TCP: u8 = 6;
const TCP_LEN: usize = 32;
/// Packets of [`PACKET_LEN`] of which a super-packet has room.
const RUN_LEN: usize = 47;
const START: Now = Now::from_boot_ns(1_000_000_000);
/// How many flows, and packets in a batch of them.
const FLOWS: [(usize, usize); 4] = [(1, RUN_LEN), (1, BATCH_MAX), (8, BATCH_MAX), (64, BATCH_MAX)];
/// What is done beside AEAD, and what together with it.
const BACK_ENDS: [(&str, &dyn BatchAead); 2] = [("all but AEAD", &Plain), ("with ring", &RingAead)];

/// Seals and opens nothing.
struct Plain;

impl BatchAead for Plain {
    fn name(&self) -> &'static str {
        "plain"
    }

    fn seal(&self, jobs: &mut [Job<'_>]) {
        black_box(jobs);
    }

    fn open(&self, jobs: &mut [Job<'_>]) {
        jobs.iter_mut().for_each(|job| job.ok = true);
    }
}

/// A device with so many workers and one peer, which owns everything and has a keypair with one key for both
/// directions: it opens what it has sealed.
fn device(worker_count: usize, now: Now) -> Arc<Shared> {
    const INDEXES: IndexPermutation = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
    let sockets = SocketGroup { port: 51820, of_worker: Vec::new() };
    let (shared, _) = Shared::new(DeviceId(0), worker_count, Vec::new(), sockets, None, INDEXES)
        .expect("an event");
    let mut allowed_ips = AllowedIps::default();
    allowed_ips.insert("0.0.0.0/0".parse::<IpNet>().expect("a prefix"), PeerId(1));
    shared.routing.store(allowed_ips.snapshot());
    let peer = Arc::new(HotPeer::new(PeerId(1), DeviceId(0), PublicKey::from_bytes([1; 32])));
    peer.endpoint.store(Some(Arc::new(endpoint())));
    shared.peers.set(1, Arc::clone(&peer));
    let index = INDEXES.own_index(1, 1);
    let established = Established {
        keys: TransportKeys { send: [1; 32], receive: [1; 32] },
        local_index: index,
        remote_index: index,
        role: Role::Initiator,
    };
    let keypair = Keypair::new(&established, Arc::downgrade(&peer), ShardId::new(0), now);
    let keypair = Arc::new(keypair);
    shared.publish(&keypair);
    peer.keypairs.update(|keypairs| keypairs.installed_by_initiator(Arc::clone(&keypair)));
    shared
}

fn endpoint() -> Endpoint {
    Endpoint::configured("192.0.2.1:1000".parse().expect("an address"))
}

/// A packet of a TCP stream to port `flow`, the one with this number.
fn tcp_packet(flow: usize, number: usize) -> Vec<u8> {
    let mut packet = ipv4_packet(PACKET_LEN);
    packet[4..6].copy_from_slice(&(number as u16).to_be_bytes());
    packet[9] = TCP;
    packet[10..12].fill(0);
    let sum = Checksum::default().bytes(&packet[..IPV4_LEN]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());

    let address = |at: usize| {
        let octets: [u8; 4] = *packet[at..].first_chunk().expect("an IPv4 header");
        IpAddr::from(Ipv4Addr::from(octets))
    };
    let upper_len = PACKET_LEN - IPV4_LEN;
    let pseudo = Checksum::pseudo(address(12), address(16), TCP, upper_len as u32);
    let tcp = &mut packet[IPV4_LEN..];
    let sequence = number * (upper_len - TCP_LEN);
    tcp[..2].copy_from_slice(&5001_u16.to_be_bytes());
    tcp[2..4].copy_from_slice(&(flow as u16).to_be_bytes());
    tcp[4..8].copy_from_slice(&(sequence as u32).to_be_bytes());
    // Acknowledgement; header length, ACK, window; checksum, urgent pointer; options.
    tcp[8..12].fill(7);
    tcp[12..16].copy_from_slice(&[(TCP_LEN / 4 * 16) as u8, 0x10, 1, 0]);
    tcp[16..20].fill(0);
    tcp[20..TCP_LEN].fill(1);
    let sum = pseudo.bytes(tcp).finish();
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The packets of a batch of several flows.
fn packets_of(flow_count: usize, packet_count: usize) -> Vec<Vec<u8>> {
    (0..packet_count).map(|number| tcp_packet(number % flow_count, number / flow_count)).collect()
}

/// A queue that has these packets once, or a super-packet for ever.
enum Queue<'a> {
    Once(RefCell<std::slice::Iter<'a, Vec<u8>>>),
    Always(VnetHeader, &'a [u8]),
}

impl PacketSource for Queue<'_> {
    fn read(&self, buffer: &mut [u8]) -> io::Result<Option<(VnetHeader, usize)>> {
        let (header, packet) = match self {
            Self::Once(packets) => match packets.borrow_mut().next() {
                Some(packet) => (VnetHeader::PLAIN, packet.as_slice()),
                None => return Ok(None),
            },
            Self::Always(header, packet) => (*header, *packet),
        };
        buffer[..packet.len()].copy_from_slice(packet);
        Ok(Some((header, packet.len())))
    }
}

/// Takes everything, and counts it.
#[derive(Default)]
struct Sink(Cell<u64>);

impl DatagramSink for Sink {
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
        black_box(datagrams);
        self.0.set(self.0.get() + datagrams.len() as u64);
        Unsent::default()
    }
}

impl PacketSink for Sink {
    fn write(&self, run: &Run<'_>) -> io::Result<()> {
        let head = run.head();
        black_box(run.parts(&head));
        self.0.set(self.0.get() + run.len() as u64);
        Ok(())
    }
}

/// Keeps datagrams.
#[derive(Default)]
struct Post(RefCell<Vec<Vec<u8>>>);

impl DatagramSink for Post {
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
        self.0.borrow_mut().extend(datagrams.iter().map(|datagram| datagram.bytes.to_vec()));
        Unsent::default()
    }
}

/// These packets as a device with this back end seals them, under new counters each time.
fn sealed(outbound: &mut Outbound, packets: &[Vec<u8>], now: Now) -> Vec<Vec<u8>> {
    let (queue, post) = (Queue::Once(RefCell::new(packets.iter())), Post::default());
    while outbound.process(&queue, &post, now).expect("it always reads") {}
    post.0.take()
}

/// Mean time of as many packets as a batch has, of which nothing but taking them in is timed.
fn time_inbound(aead: &'static dyn BatchAead, packets: &[Vec<u8>], batch_count: u64) -> Duration {
    let device = device(1, START);
    let mut outbound = Outbound::new(WorkerId(0), Arc::clone(&device), aead);
    let alone = Mesh::between(1, 1).pop_front().expect("one worker has one");
    let mut inbound = Inbound::new(WorkerId(0), device, aead, alone.to);
    let sink = Sink::default();
    let mut time = Duration::ZERO;
    for _ in 0..batch_count {
        let mut datagrams = sealed(&mut outbound, packets, START);
        let mut arrivals: Vec<Arrival<'_>> = datagrams
            .iter_mut()
            .map(|bytes| Arrival {
                bytes,
                from: endpoint(),
                tos: 0,
                path: Path::Socket,
                worker: WorkerId(0),
            })
            .collect();
        let start = Instant::now();
        inbound.process(&mut arrivals, &sink, START);
        time += start.elapsed();
    }
    assert_eq!(sink.0.get(), batch_count * packets.len() as u64, "none is dropped");
    time
}

fn open_coalesce(c: &mut Criterion) {
    let mut group = c.benchmark_group("open→coalesce");
    for (flow_count, packet_count) in FLOWS {
        let packets = packets_of(flow_count, packet_count);
        let all = Batch::from_iter(packets.iter().map(Vec::as_slice));
        let expected = flow_count.max(packet_count.div_ceil(RUN_LEN));
        assert_eq!(Plan::of(&all, true).runs().count(), expected, "they are joined");

        group.throughput(Throughput::Elements(packet_count as u64));
        let id = |what: &str| BenchmarkId::new(format!("{what}/{flow_count}"), packet_count);
        group.bench_function(id("join"), |b| {
            b.iter(|| {
                let batch = Batch::from_iter(black_box(&packets).iter().map(Vec::as_slice));
                for run in Plan::of(&batch, true).runs() {
                    let head = run.head();
                    black_box(run.parts(&head));
                }
            });
        });
        for (what, aead) in BACK_ENDS {
            group.bench_function(id(what), |b| {
                b.iter_custom(|count| time_inbound(aead, &packets, count));
            });
        }
    }
    group.finish();
}

/// A super-packet of TCP whose segments have `payload_len` bytes.
fn super_packet(payload_len: u16) -> (VnetHeader, Vec<u8>) {
    let mut packet = ipv4_packet(65_535 / PACKET_LEN * 1400 + 40);
    packet[9] = TCP;
    packet[32..34].copy_from_slice(&[0x50, 0x10]);
    let kind = SegmentKind::TcpV4;
    let segments = Segments { kind, has_cwr: false, headers_len: 40, payload_len };
    let checksum = Some(PartialChecksum { start: 20, offset: 16 });
    (VnetHeader { checksum, segments: Some(segments) }, packet)
}

fn read_segment_seal(c: &mut Criterion) {
    let mut group = c.benchmark_group("read→segment→seal");
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
    let (header, packet) = super_packet(1400);
    group.throughput(Throughput::Elements(1));
    for (what, aead) in BACK_ENDS {
        group.bench_function(BenchmarkId::new(what, PACKET_LEN), |b| {
            b.iter_custom(|count| {
                let mut outbound = Outbound::new(WorkerId(0), device(1, START), aead);
                let (queue, sink) = (Queue::Always(header, &packet), Sink::default());
                let start = Instant::now();
                while sink.0.get() < count {
                    outbound.process(&queue, &sink, START).expect("it always reads");
                }
                start.elapsed().mul_f64(count as f64 / sink.0.get() as f64)
            });
        });
    }
    group.finish();
}

/// The time: a line gives up helpers that are late, so its clock moves.
fn now() -> Now {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    START + BEGAN.elapsed()
}

/// One tunnel's two halves on the first of several threads; the others help until it is dropped.
struct Tunnel {
    shared: Arc<Shared>,
    inbound: Inbound,
    outbound: Outbound,
    duty: Duty,
    is_over: Arc<AtomicBool>,
    helpers: Vec<JoinHandle<()>>,
}

impl Tunnel {
    fn new(aead: &'static dyn BatchAead, cpus: &[usize]) -> Self {
        let shared = device(cpus.len(), now());
        let mut meshes = Mesh::between(cpus.len(), 1);
        let mesh = meshes.pop_front().expect("one for each thread");
        let is_over = Arc::new(AtomicBool::new(false));
        let are_there = Arc::new(Barrier::new(cpus.len()));
        let helpers = (1..).zip(meshes).map(|(number, mesh)| {
            let mut helping = Helping::default();
            helping.add(mesh.open.split().1);
            helping.add(mesh.seal.split().1);
            let (id, cpu) = (WorkerId(number), cpus[usize::from(number)]);
            let (crew, is_over) = (Arc::clone(&shared.crew), Arc::clone(&is_over));
            let are_there = Arc::clone(&are_there);
            crew.beat(id, now());
            crew.set_awake(id, true);
            std::thread::spawn(move || {
                affinity::pin(cpu).expect("it may be used");
                are_there.wait();
                while !is_over.load(Ordering::Relaxed) {
                    crew.beat(id, now());
                    if !helping.help(&crew, &mut 2) {
                        std::hint::spin_loop();
                    }
                }
            })
        });
        let helpers = helpers.collect();
        are_there.wait();
        let inbound = Inbound::new(WorkerId(0), Arc::clone(&shared), aead, mesh.to);
        let outbound = Outbound::new(WorkerId(0), Arc::clone(&shared), aead);
        let mut tunnel = Self {
            inbound: inbound.with_helpers(mesh.open.split().0),
            outbound: outbound.with_helpers(mesh.seal.split().0),
            duty: Duty::new(WorkerId(0), Arc::clone(&shared.crew)),
            shared,
            is_over,
            helpers,
        };
        // Until it is saturated.
        (0..20).for_each(|_| tunnel.turn());
        tunnel
    }

    /// As a thread does that has more to do.
    fn turn(&mut self) {
        self.duty.end_turn(true, false, now());
        let turn = self.duty.begin_turn(self.inbound.in_flight().with(self.outbound.in_flight()));
        self.shared.beat(WorkerId(0), now());
        self.inbound.begin_turn(turn);
        self.outbound.begin_turn(turn);
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.helpers.drain(..).for_each(|helper| helper.join().expect("it does not panic"));
    }
}

/// Batches that are sealed at a time, and then come.
const STREAM_LEN: u64 = 256;

fn time_stream(tunnel: &mut Tunnel, seals: &mut Outbound, batch_count: u64) -> Duration {
    let packets = packets_of(1, BATCH_MAX);
    let sink = Sink::default();
    // Where datagrams are received.
    let mut received = vec![[0; PACKET_LEN + TRANSPORT_OVERHEAD]; BATCH_MAX];
    let mut time = Duration::ZERO;
    let mut left = batch_count;
    while left > 0 {
        let count = left.min(STREAM_LEN);
        left -= count;
        let batches: Vec<_> = (0..count).map(|_| sealed(seals, &packets, now())).collect();
        let start = Instant::now();
        for batch in &batches {
            tunnel.turn();
            tunnel.inbound.release(&sink, now());
            while !tunnel.inbound.has_room() {
                std::hint::spin_loop();
                tunnel.inbound.release(&sink, now());
            }
            let mut arrivals: Vec<Arrival<'_>> = received
                .iter_mut()
                .zip(batch)
                .map(|(bytes, datagram)| {
                    bytes.copy_from_slice(datagram);
                    let (path, worker) = (Path::Socket, WorkerId(0));
                    Arrival { bytes, from: endpoint(), tos: 0, path, worker }
                })
                .collect();
            tunnel.inbound.process(&mut arrivals, &sink, now());
        }
        while !tunnel.inbound.is_empty() {
            std::hint::spin_loop();
            tunnel.inbound.release(&sink, now());
        }
        time += start.elapsed();
    }
    assert_eq!(sink.0.get(), batch_count * BATCH_MAX as u64, "none is dropped");
    time
}

fn time_sending(tunnel: &mut Tunnel, count: u64) -> Duration {
    let (header, packet) = super_packet(1400);
    let (queue, sink) = (Queue::Always(header, &packet), Sink::default());
    let start = Instant::now();
    while sink.0.get() < count {
        tunnel.turn();
        tunnel.outbound.release(&sink, now());
        tunnel.outbound.process(&queue, &sink, now()).expect("it always reads");
    }
    while !tunnel.outbound.is_empty() {
        std::hint::spin_loop();
        tunnel.outbound.release(&sink, now());
    }
    start.elapsed().mul_f64(count as f64 / sink.0.get() as f64)
}

fn fan_out(c: &mut Criterion) {
    let cpus = affinity::inherited_cpus().expect("they can be asked for");
    affinity::pin(cpus[0]).expect("it may be used");
    let mut group = c.benchmark_group("fan-out");
    for aead in choice::back_ends() {
        for thread_count in [1, 2, 4, 8, 16].into_iter().filter(|&count| count <= cpus.len()) {
            let id = |way: &str| BenchmarkId::new(format!("{way}/{}", aead.name()), thread_count);
            group.throughput(Throughput::Elements(BATCH_MAX as u64));
            group.bench_function(id("inbound"), |b| {
                let mut tunnel = Tunnel::new(aead, &cpus[..thread_count]);
                let mut seals = Outbound::new(WorkerId(0), Arc::clone(&tunnel.shared), aead);
                b.iter_custom(|count| time_stream(&mut tunnel, &mut seals, count));
            });
            group.throughput(Throughput::Elements(1));
            group.bench_function(id("outbound"), |b| {
                let mut tunnel = Tunnel::new(aead, &cpus[..thread_count]);
                b.iter_custom(|count| time_sending(&mut tunnel, count));
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
    targets = open_coalesce, read_segment_seal, fan_out
}
criterion_main!(benches);
