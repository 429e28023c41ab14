//! How long does the steer program take for a packet, without the kernel's work around it?
//!
//! The kernel runs the program that is attached to NICs, many times on one packet, and says how long
//! one run took, in whole nanoseconds: `steered` to an XSK, `passed` because it is not ours, or
//! `dropped`. Nothing is attached or delivered. Needs the capabilities to load it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use benches::{FULL_MESSAGE_LEN, frame, message};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use wg_common::id::{DeviceId, ReceiverIndex, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::map::{QueueEntry, QueueKey, index_entry};
use wg_common::protocol::{INITIATION_LEN, TRANSPORT_MIN_LEN, TYPE_INITIATION, TYPE_TRANSPORT};
use wg_userspace::bpf::{BpfError, Steer, SteerOptions, XdpVerdict};
use wg_userspace::sys::clock;

const PORT: u16 = 51820;
const LOCAL_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
const LOCAL_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));
const FOREIGN_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 3));
const INDEXES: IndexPermutation = IndexPermutation::new(
    [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
    IndexLayout::DEFAULT,
);
const SLOT: u32 = 5;
const LIVE: ReceiverIndex = INDEXES.own_index(SLOT, 3);
const DEAD: ReceiverIndex = INDEXES.own_index(SLOT, 2);
const WORKER: WorkerId = WorkerId(0);
/// The loopback device, from which the kernel lets the packets of test runs come.
const QUEUE: QueueKey = QueueKey { ifindex: 1, queue: 0 };
/// Runs of one call. They take less time than it takes for a heartbeat to become stale.
const RUN_COUNT_MAX: u64 = 100_000;

/// The program with a port, two addresses, a live index and a served queue.
struct Lab {
    steer: Steer,
    /// The program's map does not hold it.
    _xsk: OwnedFd,
}

impl Lab {
    fn new() -> Result<Self, BpfError> {
        let mut steer = Steer::load(SteerOptions::new(INDEXES))?;
        let xsk = socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None)
            .expect("who may load programs may make an XSK");
        steer.set_port(PORT, Some(DeviceId(0)));
        steer.add_address(LOCAL_V4)?;
        steer.add_address(LOCAL_V6)?;
        steer.live_indexes()[SLOT as usize].store(index_entry(LIVE), Ordering::Relaxed);
        steer.set_queue(QUEUE, QueueEntry::new(0, WORKER, 2048), xsk.as_fd())?;
        Ok(Self { steer, _xsk: xsk })
    }

    fn heartbeat(&self) {
        let now = clock::boot_now().boot_ns();
        self.steer.heartbeats()[usize::from(WORKER.0)].store(now, Ordering::Relaxed);
    }

    fn verdict(&self, frame: &[u8]) -> XdpVerdict {
        self.heartbeat();
        self.steer.test_run(frame).expect("the kernel takes the frame")
    }

    fn time(&self, frame: &[u8], run_count: u64) -> Duration {
        let mut elapsed = Duration::ZERO;
        let mut left = run_count;
        while left > 0 {
            let now_count = left.min(RUN_COUNT_MAX) as u32;
            self.heartbeat();
            let mean = self.steer.time_run(frame, now_count).expect("the kernel took it before");
            elapsed += mean * now_count;
            left -= u64::from(now_count);
        }
        elapsed
    }
}

fn steer(c: &mut Criterion) {
    let lab = match Lab::new() {
        Ok(lab) => lab,
        Err(error @ BpfError::NotPermitted) => {
            eprintln!("SKIPPED steer: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let data = message(TYPE_TRANSPORT, LIVE, FULL_MESSAGE_LEN);
    let keepalive = message(TYPE_TRANSPORT, LIVE, TRANSPORT_MIN_LEN);
    let initiation = message(TYPE_INITIATION, DEAD, INITIATION_LEN);
    let dead = message(TYPE_TRANSPORT, DEAD, FULL_MESSAGE_LEN);

    let mut group = c.benchmark_group("steer");
    group.throughput(Throughput::Elements(1));
    for (name, what, to, port, message, verdict) in [
        ("steered", "v4", LOCAL_V4, PORT, &data, XdpVerdict::Redirect),
        ("steered", "v6", LOCAL_V6, PORT, &data, XdpVerdict::Redirect),
        ("steered", "keepalive", LOCAL_V4, PORT, &keepalive, XdpVerdict::Redirect),
        ("steered", "initiation", LOCAL_V4, PORT, &initiation, XdpVerdict::Redirect),
        ("dropped", "dead_index", LOCAL_V4, PORT, &dead, XdpVerdict::Drop),
        ("passed", "other_port", LOCAL_V4, 53, &data, XdpVerdict::Pass),
        ("passed", "other_address", FOREIGN_V4, PORT, &data, XdpVerdict::Pass),
    ] {
        let frame = frame(SocketAddr::new(to, port), message);
        assert_eq!(lab.verdict(&frame), verdict, "{name}/{what}");
        group.bench_function(BenchmarkId::new(name, what), |b| {
            b.iter_custom(|run_count| lab.time(&frame, run_count));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = steer
}
criterion_main!(benches);
