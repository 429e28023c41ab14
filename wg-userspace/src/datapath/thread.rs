//! The loop of one thread: it waits for, and goes round, the XSKs of its queues and its worker of each
//! device.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use arrayvec::ArrayVec;
use wg_common::endpoint::{Endpoint, LocalSource};
use wg_common::headers::parse_frame;
use wg_common::id::WorkerId;
use wg_common::map::QUEUES_LEN;
use wg_common::outcome::DropReason;
use wg_common::time::{Now, Reading};

use super::crew::{Crew, InFlight, PortChange, PortId};
use super::fan_out::Duty;
use super::inbound::Arrival;
use super::spin::Spin;
use super::transmit::{TX_CHUNKS, TxState};
use super::worker::Worker;
use super::{BATCH_LEN, BATCHES_MAX};
use crate::counters::Path;
use crate::sys::clock;
use crate::sys::mmsg::ReceiveBatch;
use crate::sys::wait::{PollFd, PollFlags, poll};
use crate::xsk::{Frame, Pool, Xsk};

/// Longest sleep: a thread that waits for packets still says that it lives well before its heartbeat
/// counts as stale.
pub(super) const SLEEP_MAX: Duration = Duration::from_millis(100);

/// A NIC that has not taken all that is to be sent is told again after this time.
const KICK_AGAIN: Duration = Duration::from_millis(1);
/// A batch that a helper does not give back is given up about this late at most.
const RELEASE_AGAIN: Duration = Duration::from_millis(10);
/// The kernel is asked this often what it dropped before the XSKs and sockets.
const ASK_INTERVAL: Duration = Duration::from_secs(1);
/// Descriptors that one thread waits for: its wake-up, XSKs, and of each device three of each worker that
/// it reads for. The rest is looked at in each turn.
const POLLED_MAX: usize = 1024;
/// XSKs among them.
const POLLED_XSKS_MAX: usize = POLLED_MAX / 2;

/// The XSKs of a thread, and the pools of the UMEMs that they share.
#[derive(Default)]
pub struct Ports {
    /// The XSKs. The pool of each is among the others.
    pub(super) ports: Vec<XskPort>,
    pub(super) pools: Vec<Pool>,
}

impl Ports {
    /// Takes an XSK that is bound, with its pool if that is not here yet.
    pub fn open(&mut self, mut port: XskPort, pool: Option<Pool>) {
        self.pools.extend(pool);
        match self.pools.iter_mut().find(|pool| pool.id() == port.xsk.umem()) {
            Some(pool) => pool.admit(&mut port.xsk),
            // It was closed meanwhile; without a pool nothing can be done with it.
            None => return,
        }
        self.ports.push(port);
    }

    /// Lets go of an XSK, and of its pool if no other shares that.
    pub(super) fn close(&mut self, id: PortId) -> Option<(XskPort, Option<Pool>)> {
        let is_it = |port: &XskPort| (port.ifindex, port.xsk.queue()) == (id.ifindex, id.queue);
        let port = self.ports.swap_remove(self.ports.iter().position(is_it)?);
        let umem = port.xsk.umem();
        let pool = match self.ports.iter().any(|other| other.xsk.umem() == umem) {
            true => None,
            false => self.pools.iter().position(|pool| pool.id() == umem),
        };
        Some((port, pool.map(|at| self.pools.swap_remove(at))))
    }

    /// Does something with each XSK and its pool.
    fn each(&mut self, mut f: impl FnMut(&mut XskPort, &mut Pool)) {
        let Self { ports, pools } = self;
        ports.iter_mut().for_each(|port| f(port, pool_of(pools, &port.xsk)));
    }

    /// An XSK that transmits, with its pool, of which something holds.
    pub(super) fn find(
        &mut self,
        leads: impl Fn(&XskPort) -> bool,
    ) -> Option<(&mut XskPort, &mut Pool)> {
        let Self { ports, pools } = self;
        let port = ports.iter_mut().find(|port| port.transmits && leads(port))?;
        let pool = pool_of(pools, &port.xsk);
        Some((port, pool))
    }

    /// Whether any of them transmits.
    pub(super) fn transmit(&self) -> bool {
        self.ports.iter().any(|port| port.transmits)
    }
}

fn pool_of<'a>(pools: &'a mut [Pool], xsk: &Xsk) -> &'a mut Pool {
    let its = |pool: &&mut Pool| pool.id() == xsk.umem();
    pools.iter_mut().find(its).expect("a thread has the pools of its XSKs")
}

/// An XSK and the NIC on which it is bound.
pub struct XskPort {
    /// The socket with its rings.
    pub xsk: Xsk,
    /// The NIC.
    pub ifindex: u32,
    /// What the kernel had dropped before this socket when it was last asked: for want of room in the
    /// rx ring, and of a chunk.
    pub dropped: [u64; 2],
    /// Whether packets leave by it, too. Else sockets send.
    pub transmits: bool,
    /// Whether this thread looks for packets in the kernel's place while it has work.
    pub busy_polls: bool,
    /// What is known of its tx ring.
    pub(super) tx: TxState,
}

impl XskPort {
    /// An XSK that is bound on the NIC with this index.
    pub fn new(mut xsk: Xsk, ifindex: u32, transmits: bool) -> Self {
        xsk.set_apart_to_send(if transmits { TX_CHUNKS } else { 0 });
        let tx = TxState::default();
        Self { xsk, ifindex, dropped: [0; 2], transmits, busy_polls: false, tx }
    }
}

/// One thread of the data path, before and while it runs.
pub struct WorkerThread {
    id: WorkerId,
    crew: Arc<Crew>,
    ports: Ports,
    /// One of each device that is not over.
    workers: Vec<Worker>,
    /// The worker that went first in the latest turn.
    first: usize,
    received: ReceiveBatch,
    /// When the kernel was last asked what it dropped before the XSKs and sockets.
    asked: Now,
    spin: Spin,
    duty: Duty,
    #[cfg(debug_assertions)]
    stall: Option<Stall>,
}

impl WorkerThread {
    /// Thread `id` of `crew`, with the XSKs of its queues and its worker of each device.
    ///
    /// # Errors
    /// If there is no memory for its buffers.
    pub fn new(
        id: WorkerId,
        crew: Arc<Crew>,
        mut ports: Ports,
        workers: Vec<Worker>,
    ) -> std::io::Result<Self> {
        // Others may come while it runs, without memory being asked for then.
        let Ports { ports: xsks, pools } = &mut ports;
        xsks.reserve_exact((QUEUES_LEN as usize).saturating_sub(xsks.len()));
        pools.reserve_exact((QUEUES_LEN as usize).saturating_sub(pools.len()));
        Ok(Self {
            id,
            duty: Duty::new(id, Arc::clone(&crew)),
            crew,
            ports,
            workers,
            first: 0,
            received: ReceiveBatch::new()?,
            asked: Now::default(),
            spin: Spin::new(false),
            #[cfg(debug_assertions)]
            stall: Stall::from_env(id),
        })
    }

    /// Says that the machine has cores beside those of the data path: then a thread that waits for packets
    /// that follow each other closely looks for them instead of sleeping.
    #[must_use]
    pub fn with_own_core(self, has_own_core: bool) -> Self {
        Self { spin: Spin::new(has_own_core), ..self }
    }

    /// Moves packets until every device is over.
    pub fn run(mut self) {
        let mut more = true;
        while self.any_left() {
            if more {
                self.wait(Duration::ZERO);
            } else {
                self.wait_for_more();
            }
            #[cfg(debug_assertions)]
            if let Some(stall) = &mut self.stall {
                stall.hold(&self.workers, clock::boot_now());
            }
            more = self.turn(clock::reading);
        }
    }

    /// Lets go of devices that are over. Says whether any other is left.
    pub(super) fn any_left(&mut self) -> bool {
        self.workers.retain(|worker| !worker.is_over());
        !self.workers.is_empty()
    }

    /// One bounded round over everything that may have packets. Says whether there may be more.
    pub(super) fn turn(&mut self, read_clocks: impl FnOnce() -> Reading) -> bool {
        let in_flight = self.workers.iter().map(Worker::in_flight);
        let turn = self.duty.begin_turn(in_flight.fold(InFlight::default(), InFlight::with));
        // Before anything is sealed or opened.
        let reading = read_clocks();
        for worker in &mut self.workers {
            worker.begin_turn(&reading, turn);
        }
        let now = reading.after;
        self.crew.beat(self.id, now);
        self.change_ports();
        let mut more = false;
        self.ports.each(|port, pool| port.reap(pool, now));
        self.workers.iter_mut().for_each(|worker| worker.release(&mut self.ports, now));
        for port in 0..self.ports.ports.len() {
            more |= self.receive_frames(port, now);
        }
        // Another device goes first each time, so that none starves.
        let count = self.workers.len();
        self.first = if self.first + 1 < count { self.first + 1 } else { 0 };
        let (before, from) = self.workers.split_at_mut(self.first);
        for worker in from.iter_mut().chain(before.iter_mut()) {
            more |= worker.turn(&mut self.received, &mut self.ports, now);
        }
        self.ports.ports.iter_mut().for_each(XskPort::kick);
        let mut budget = self.duty.budget(more);
        let mut helped = false;
        for worker in from.iter_mut().chain(before) {
            helped |= worker.help(&mut budget);
        }
        self.count_kernel_drops(now);
        let awaits = self.workers.iter().any(|worker| worker.awaits(now));
        self.duty.end_turn(more, helped, now) || awaits
    }

    /// Whether others have given something to do, or given it back.
    fn is_called(&self) -> bool {
        self.workers.iter().any(Worker::is_called)
    }

    /// Takes XSKs, and gives back those that are to be closed.
    fn change_ports(&mut self) {
        while let Some(change) = self.crew.next_port_change(self.id) {
            match change {
                // There are no more of them than numbers in the map, for which there is room.
                PortChange::Open(port, pool) => self.ports.open(port, pool),
                PortChange::Close(id) => self.crew.give_back(id, self.ports.close(id)),
            }
        }
    }

    /// Now and then, counts what the kernel has dropped before the XSKs and the workers' sockets.
    fn count_kernel_drops(&mut self, now: Now) {
        if now.since(self.asked) < ASK_INTERVAL {
            return;
        }
        self.asked = now;
        self.workers.iter_mut().for_each(Worker::count_kernel_drops);
        let counters = self.crew.counters(self.id);
        for XskPort { xsk, dropped, .. } in &mut self.ports.ports {
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

    /// Waits until there is something to do, at most for [`SLEEP_MAX`], or [`KICK_AGAIN`] if there is something
    /// to send.
    fn wait_for_more(&mut self) {
        while self.spin.looks_again(clock::boot_now()) {
            if self.wait(Duration::ZERO) || self.is_called() {
                return self.spin.found(clock::boot_now());
            }
        }
        if self.duty.may_sleep(|| self.is_called()) {
            let timeout = if self.ports.ports.iter_mut().any(XskPort::waits) {
                KICK_AGAIN
            } else if self.workers.iter().any(Worker::has_line) {
                RELEASE_AGAIN
            } else {
                SLEEP_MAX
            };
            self.wait(timeout);
            self.duty.wake();
        }
        self.spin.found(clock::boot_now());
    }

    /// Sleeps until there is something to do, at most for `timeout`, and tells the workers what has
    /// something. Says whether there is.
    pub(super) fn wait(&mut self, timeout: Duration) -> bool {
        let wake = self.crew.wake(self.id);
        let mut fds: ArrayVec<PollFd<'_>, POLLED_MAX> = ArrayVec::new();
        fds.push(readable_fd(wake.as_fd()));
        let xsks = self.ports.ports.iter().take(POLLED_XSKS_MAX);
        fds.extend(xsks.map(|port| readable_fd(port.xsk.as_fd())));
        let ours = fds.len();
        let mut polled = fds.remaining_capacity();
        for fd in self.workers.iter().flat_map(Worker::polled).take(polled) {
            fds.push(fd);
            polled -= 1;
        }
        match poll(&mut fds, timeout) {
            // Nothing, unless there was too much to ask for.
            Ok(0) if polled > 0 => return false,
            Ok(_) => {}
            Err(error) => {
                tracing::error!(%error, "waiting for packets");
                std::thread::sleep(Duration::from_millis(10));
                return true;
            }
        }
        let ready: ArrayVec<bool, POLLED_MAX> = fds.iter().map(is_ready).collect();
        drop(fds);
        let woken = ready[0];
        if woken {
            wake.drain();
        }
        let mut ready = ready.into_iter().skip(ours).chain(std::iter::repeat(true));
        for worker in &mut self.workers {
            worker.learn(woken, &mut ready);
        }
        true
    }

    /// Takes frames from an XSK, at most [`BATCHES_MAX`] batches. Says whether there may be more.
    fn receive_frames(&mut self, port: usize, now: Now) -> bool {
        let XskPort { xsk, busy_polls, .. } = &mut self.ports.ports[port];
        if *busy_polls {
            xsk.poll_nic();
        }
        let mut costly = 0;
        for _ in 0..BATCHES_MAX {
            // For whom frames are is seen when they are taken.
            if !self.workers.iter().all(Worker::has_room) {
                return true;
            }
            let (is_full, count) = self.receive_batch(port, now);
            costly += count;
            if !is_full || costly >= BATCH_LEN {
                return is_full;
            }
        }
        true
    }

    /// Takes a batch of frames from an XSK. Says whether it is full, and how many cost something.
    fn receive_batch(&mut self, port: usize, now: Now) -> (bool, usize) {
        let Ports { ports, pools } = &mut self.ports;
        let XskPort { xsk, ifindex, .. } = &mut ports[port];
        let pool = pool_of(pools, xsk);
        let mut frames: ArrayVec<Frame, BATCH_LEN> = ArrayVec::new();
        xsk.receive(pool, &mut frames);
        if frames.is_empty() {
            return (false, 0);
        }
        let counters = self.crew.counters(self.id);
        let umem = pool.umem();
        // The worker for which the first of them is, and what is for it; then what is for others.
        let mut device = 0;
        let mut arrivals: ArrayVec<Arrival<'_>, BATCH_LEN> = ArrayVec::new();
        let mut others: ArrayVec<(usize, Arrival<'_>), BATCH_LEN> = ArrayVec::new();
        for frame in &mut frames {
            let bytes = umem.bytes_mut(frame);
            // The steer program let it through by the same rules.
            let Some(outer) = parse_frame(bytes) else {
                counters.drop(DropReason::BadLength, 1);
                continue;
            };
            let port = outer.dst.port();
            let whose = match self.workers.get(device) {
                Some(worker) if worker.port() == port => Some(device),
                _ => self.workers.iter().position(|worker| worker.port() == port),
            };
            let Some(whose) = whose else {
                // The port was another one a moment ago, or its device is over.
                counters.drop(DropReason::NoDevice, 1);
                continue;
            };
            let local = LocalSource { addr: outer.dst.ip(), ifindex: *ifindex };
            let mut remote = outer.src;
            if let SocketAddr::V6(remote) = &mut remote
                && remote.ip().is_unicast_link_local()
            {
                remote.set_scope_id(*ifindex);
            }
            let arrival = Arrival {
                bytes: &mut bytes[outer.payload],
                from: Endpoint { remote, local: Some(local) },
                tos: outer.tos,
                path: Path::Xsk,
                worker: self.id,
            };
            if arrivals.is_empty() {
                device = whose;
            }
            if whose == device {
                arrivals.push(arrival);
            } else {
                others.push((whose, arrival));
            }
        }
        let mut costly = 0;
        while !arrivals.is_empty() {
            costly += self.workers[device].receive(&mut arrivals, now);
            arrivals.clear();
            let Some((next, _)) = others.first() else { break };
            device = *next;
            for (whose, arrival) in others.take() {
                if whose == device {
                    arrivals.push(arrival);
                } else {
                    others.push((whose, arrival));
                }
            }
        }
        drop((arrivals, others));
        let full = frames.is_full();
        for frame in frames {
            xsk.recycle(pool, frame);
        }
        (full, costly)
    }
}

fn readable_fd(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::from_borrowed_fd(fd, PollFlags::IN)
}

/// Whether there is something to read, or an error to learn of by reading.
fn is_ready(fd: &PollFd<'_>) -> bool {
    !fd.revents().is_empty()
}

/// A hook for tests: `TIDEGATE_TEST_STALL_WORKER=<worker>:<after ms>[:<for ms>]` makes one thread
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

    fn hold(&mut self, workers: &[Worker], now: Now) {
        if now < self.from {
            return;
        }
        while clock::boot_now() < self.until && !workers.iter().all(Worker::is_stopping) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.from = Now::from_boot_ns(u64::MAX);
    }
}
