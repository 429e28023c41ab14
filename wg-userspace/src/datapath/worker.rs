//! The loop of one worker.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrayvec::ArrayVec;
use wg_common::endpoint::{Endpoint, LocalSource};
use wg_common::headers::parse_frame;
use wg_common::id::WorkerId;
use wg_common::outcome::DropReason;
use wg_common::time::Now;

use super::BATCH_LEN;
use super::handoff::{Mesh, Parcel};
use super::inbound::{Arrival, Inbound};
use super::outbound::Outbound;
use super::shared::{Shared, SocketGroup};
use crate::aead::BatchAead;
use crate::counters::Path;
use crate::session::Continuity;
use crate::sys::clock;
use crate::sys::mmsg::ReceiveBatch;
use crate::sys::wait::{PollFd, PollFlags, poll};
use crate::tun;
use crate::udp::UdpSocket;
use crate::xsk::{Frame, Xsk};

/// Longest sleep: a worker that waits for packets still says that it lives well before its heartbeat
/// counts as stale.
const SLEEP_MAX: Duration = Duration::from_millis(100);

/// The kernel is asked this often what it dropped before the XSKs.
const ASK_INTERVAL: Duration = Duration::from_secs(1);
/// Descriptors that one worker waits for: three of each worker that it reads for, its wake-up, XSKs.
const POLLED_MAX: usize = 1024;

/// What only this worker touches.
pub struct WorkerEdges {
    /// The XSKs of its queues.
    pub xsks: Vec<XskPort>,
    /// Its rings to and from the other workers.
    pub mesh: Mesh,
}

/// An XSK and the NIC on which it is bound.
pub struct XskPort {
    /// The socket with its rings and UMEM.
    pub xsk: Xsk,
    /// The NIC.
    pub ifindex: u32,
    /// What the kernel had dropped before this socket when it was last asked: for want of room in the
    /// rx ring, and of a chunk.
    pub dropped: [u64; 2],
}

/// One worker, before and while it runs.
pub struct Worker {
    id: WorkerId,
    shared: Arc<Shared>,
    inbound: Inbound,
    outbound: Outbound,
    xsks: Vec<XskPort>,
    from: Vec<Option<rtrb::Consumer<Parcel>>>,
    received: ReceiveBatch,
    sockets: Arc<SocketGroup>,
    /// Whose sockets and TUN queue this worker reads: its own, and those of workers that are stuck.
    reads: Vec<Reads>,
    deputies_epoch: u32,
    /// The interface is down, and what its queues held from before is gone. What they hold now was sent
    /// after it went up again: it waits until control has noticed.
    drained: bool,
    /// Whether staged packets may be able to go.
    flush: bool,
    /// When staged packets were last looked at.
    flushed: Now,
    /// When the kernel was last asked what it dropped before the XSKs.
    asked: Now,
    continuity: Continuity,
    #[cfg(debug_assertions)]
    stall: Option<Stall>,
}

/// A worker whose sockets and TUN queue are read here, and which of them may have something.
#[derive(Clone, Copy)]
struct Reads {
    worker: usize,
    v4: bool,
    v6: bool,
    tun: bool,
}

impl Reads {
    fn of(worker: WorkerId) -> Self {
        Self { worker: usize::from(worker.0), v4: true, v6: true, tun: true }
    }
}

impl Worker {
    /// Worker `id` with its edges.
    ///
    /// # Errors
    /// If there is no memory for its buffers.
    pub fn new(
        id: WorkerId,
        shared: Arc<Shared>,
        edges: WorkerEdges,
        aead: &'static dyn BatchAead,
    ) -> io::Result<Self> {
        let WorkerEdges { xsks, mesh } = edges;
        let received = ReceiveBatch::new()?;
        Ok(Self {
            id,
            inbound: Inbound::new(id, Arc::clone(&shared), aead, mesh.to),
            outbound: Outbound::new(id, Arc::clone(&shared), aead),
            xsks,
            from: mesh.from,
            received,
            sockets: shared.sockets.load_full(),
            reads: vec![Reads::of(id)],
            deputies_epoch: 0,
            drained: false,
            flush: false,
            flushed: Now::default(),
            asked: Now::default(),
            continuity: Continuity::default(),
            shared,
            #[cfg(debug_assertions)]
            stall: Stall::from_env(id),
        })
    }

    /// Moves packets until [`Shared::stopping`] is set or the TUN device is gone.
    pub fn run(mut self) {
        let mut more = true;
        while !self.shared.stopping.load(Ordering::Relaxed)
            && !self.shared.tun_gone.load(Ordering::Relaxed)
        {
            self.wait(if more { Duration::ZERO } else { SLEEP_MAX });
            #[cfg(debug_assertions)]
            if let Some(stall) = &mut self.stall {
                stall.hold(&self.shared, clock::boot_now());
            }
            self.shared.begin_turn(self.id);
            // Before anything is sealed or opened.
            let now = self.shared.now_of(&mut self.continuity, &clock::reading());
            self.shared.beat(self.id, now);
            self.follow_control();
            more = self.turn(now);
        }
    }

    /// One bounded round over everything that may have packets. Says whether there may be more.
    fn turn(&mut self, now: Now) -> bool {
        let is_down = !self.shared.is_up();
        let mut more = self.receive_parcels(now);
        for port in 0..self.xsks.len() {
            more |= self.receive_frames(port, now);
        }
        for i in 0..self.reads.len() {
            let Reads { worker, v4, v6, tun } = self.reads[i];
            let sockets = Arc::clone(&self.sockets);
            let theirs = &sockets.of_worker[worker];
            let v4 = v4 && self.receive_datagrams(&theirs.v4, now);
            let v6 = v6 && theirs.v6.as_ref().is_some_and(|v6| self.receive_datagrams(v6, now));
            let tun = tun && self.send_packets(worker, now);
            self.reads[i] = Reads { worker, v4, v6, tun };
            more |= v4 | v6 | tun;
        }
        self.drained = is_down && self.reads.iter().all(|reads| !reads.tun);
        self.count_kernel_drops(now);
        more | self.flush_staged(now)
    }

    /// Now and then, counts what the kernel has dropped before the XSKs.
    fn count_kernel_drops(&mut self, now: Now) {
        if now.since(self.asked) < ASK_INTERVAL {
            return;
        }
        self.asked = now;
        let counters = &self.shared.workers[usize::from(self.id.0)].counters;
        for XskPort { xsk, dropped, .. } in &mut self.xsks {
            let Ok(counts) = xsk.counts() else { continue };
            let kernel = counts.kernel;
            let newest = [kernel.rx_ring_full, kernel.rx_dropped];
            let reasons = [DropReason::XskRingFull, DropReason::XskNoChunk];
            for ((reason, before), after) in reasons.into_iter().zip(dropped).zip(newest) {
                counters.drop(reason, after.wrapping_sub(*before));
                *before = after;
            }
        }
    }

    /// Sends staged packets whose keypair has come. Looking for them costs time with each peer that
    /// has some, so it is done after a wake-up, which follows every new keypair, and now and then.
    fn flush_staged(&mut self, now: Now) -> bool {
        if !self.flush && now.since(self.flushed) < SLEEP_MAX {
            return false;
        }
        let own = &self.sockets.of_worker[usize::from(self.id.0)];
        self.flush = self.outbound.flush_staged(own, now);
        self.flushed = now;
        self.flush
    }

    /// Takes over what control has changed.
    fn follow_control(&mut self) {
        let sockets = self.shared.sockets.load();
        if !Arc::ptr_eq(&sockets, &self.sockets) {
            self.sockets = Arc::clone(&sockets);
        }
        drop(sockets);
        let epoch = self.shared.deputies_epoch.load(Ordering::Acquire);
        if epoch != self.deputies_epoch {
            self.deputies_epoch = epoch;
            let workers = (0..self.shared.workers.len()).map(|worker| WorkerId(worker as u16));
            self.reads = workers
                .filter(|&worker| {
                    worker == self.id || self.shared.deputy_of(worker) == Some(self.id)
                })
                .map(Reads::of)
                .collect();
        }
    }

    /// Sleeps until there is something to do, at most for `timeout`, and learns what has something.
    fn wait(&mut self, timeout: Duration) {
        let own = &self.shared.workers[usize::from(self.id.0)];
        let mut fds: ArrayVec<PollFd<'_>, POLLED_MAX> = ArrayVec::new();
        for reads in &self.reads {
            let sockets = &self.sockets.of_worker[reads.worker];
            fds.push(readable_fd(sockets.v4.as_fd()));
            fds.push(readable_fd(sockets.v6.as_ref().map_or(sockets.v4.as_fd(), |v6| v6.as_fd())));
            let tun = self.shared.tun_queues[reads.worker].as_fd();
            // Without flags it still tells that the device is gone.
            let flags = if self.drained { PollFlags::empty() } else { PollFlags::IN };
            fds.push(PollFd::from_borrowed_fd(tun, flags));
        }
        fds.push(readable_fd(own.wake.as_fd()));
        let xsks = self.xsks.iter().take(fds.remaining_capacity());
        fds.extend(xsks.map(|port| readable_fd(port.xsk.as_fd())));
        match poll(&mut fds, timeout) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) => {
                tracing::error!(%error, "waiting for packets");
                std::thread::sleep(Duration::from_millis(10));
                return;
            }
        }
        for (reads, fds) in self.reads.iter_mut().zip(fds.chunks_exact(3)) {
            reads.v4 |= is_ready(&fds[0]);
            reads.v6 |= is_ready(&fds[1]);
            reads.tun |= is_ready(&fds[2]);
        }
        if is_ready(&fds[3 * self.reads.len()]) {
            own.wake.drain();
            self.flush = true;
        }
    }

    fn receive_parcels(&mut self, now: Now) -> bool {
        let mut parcels: ArrayVec<Parcel, BATCH_LEN> = ArrayVec::new();
        // Another ring goes first each time, so that none starves.
        self.from.rotate_left(1);
        for ring in self.from.iter_mut().flatten() {
            while !parcels.is_full()
                && let Ok(parcel) = ring.pop()
            {
                parcels.push(parcel);
            }
        }
        if parcels.is_empty() {
            return false;
        }
        let mut arrivals: ArrayVec<Arrival<'_>, BATCH_LEN> = parcels
            .iter_mut()
            .map(|parcel| Arrival {
                bytes: &mut parcel.buffer[..parcel.len],
                from: parcel.from,
                path: parcel.path,
                worker: parcel.origin,
            })
            .collect();
        let tun = &self.shared.tun_queues[usize::from(self.id.0)];
        self.inbound.process(&mut arrivals, tun, now);
        let full = arrivals.is_full();
        drop(arrivals);
        for parcel in parcels {
            let origin = &self.shared.workers[usize::from(parcel.origin.0)];
            origin.parcels.give_back(parcel.buffer);
        }
        full
    }

    fn receive_frames(&mut self, port: usize, now: Now) -> bool {
        let XskPort { xsk, ifindex, .. } = &mut self.xsks[port];
        let mut frames: ArrayVec<Frame, BATCH_LEN> = ArrayVec::new();
        xsk.receive(&mut frames);
        if frames.is_empty() {
            return false;
        }
        let counters = &self.shared.workers[usize::from(self.id.0)].counters;
        let umem = xsk.umem();
        let mut arrivals: ArrayVec<Arrival<'_>, BATCH_LEN> = ArrayVec::new();
        for frame in &mut frames {
            let bytes = umem.bytes_mut(frame);
            // The steer program let it through by the same rules.
            let Some(outer) = parse_frame(bytes) else {
                counters.drop(DropReason::BadLength, 1);
                continue;
            };
            let local = LocalSource { addr: outer.dst.ip(), ifindex: *ifindex };
            let mut remote = outer.src;
            if let SocketAddr::V6(remote) = &mut remote
                && remote.ip().is_unicast_link_local()
            {
                remote.set_scope_id(*ifindex);
            }
            arrivals.push(Arrival {
                bytes: &mut bytes[outer.payload],
                from: Endpoint { remote, local: Some(local) },
                path: Path::Xsk,
                worker: self.id,
            });
        }
        let tun = &self.shared.tun_queues[usize::from(self.id.0)];
        self.inbound.process(&mut arrivals, tun, now);
        drop(arrivals);
        let full = frames.is_full();
        for frame in frames {
            xsk.recycle(frame);
        }
        full
    }

    fn receive_datagrams(&mut self, socket: &UdpSocket, now: Now) -> bool {
        let counters = &self.shared.workers[usize::from(self.id.0)].counters;
        if let Err(error) = socket.receive(&mut self.received) {
            tracing::debug!(%error, "receiving");
            return false;
        }
        let full = self.received.len() == BATCH_LEN;
        let mut arrivals: ArrayVec<Arrival<'_>, BATCH_LEN> = ArrayVec::new();
        for datagram in self.received.datagrams() {
            if datagram.truncated {
                counters.drop(DropReason::TooLarge, 1);
                continue;
            }
            arrivals.push(Arrival {
                bytes: datagram.bytes,
                from: datagram.endpoint,
                path: Path::Socket,
                worker: self.id,
            });
        }
        let tun = &self.shared.tun_queues[usize::from(self.id.0)];
        self.inbound.process(&mut arrivals, tun, now);
        full
    }

    fn send_packets(&mut self, worker: usize, now: Now) -> bool {
        let tun = &self.shared.tun_queues[worker];
        let own = &self.sockets.of_worker[usize::from(self.id.0)];
        match self.outbound.process(tun, own, now) {
            Ok(more) => more,
            Err(error) if tun::is_gone(&error) => {
                self.shared.report_tun_gone();
                false
            }
            Err(error) => {
                tracing::debug!(%error, "reading from the TUN device");
                false
            }
        }
    }
}

fn readable_fd(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::from_borrowed_fd(fd, PollFlags::IN)
}

/// Whether there is something to read, or an error to learn of by reading.
fn is_ready(fd: &PollFd<'_>) -> bool {
    !fd.revents().is_empty()
}

/// A hook for tests: `TIDEGATE_TEST_STALL_WORKER=<worker>:<after ms>[:<for ms>]` makes one worker
/// stand still, as one does that a debugger holds or a core has lost.
#[cfg(debug_assertions)]
struct Stall {
    from: Now,
    until: Now,
}

#[cfg(debug_assertions)]
impl Stall {
    fn from_env(id: WorkerId) -> Option<Self> {
        let text = std::env::var("TIDEGATE_TEST_STALL_WORKER").ok()?;
        let mut numbers = text.split(':').map(|number| number.parse::<u64>().ok());
        if numbers.next()?? != u64::from(id.0) {
            return None;
        }
        let from = clock::boot_now() + Duration::from_millis(numbers.next()??);
        let held = numbers.next().flatten().map_or(Duration::MAX, Duration::from_millis);
        Some(Self { from, until: from + held })
    }

    fn hold(&mut self, shared: &Shared, now: Now) {
        if now < self.from {
            return;
        }
        while clock::boot_now() < self.until && !shared.stopping.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.from = Now::from_boot_ns(u64::MAX);
    }
}
