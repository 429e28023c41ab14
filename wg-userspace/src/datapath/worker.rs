//! One device's part of a thread: its sockets and TUN queue there, what other threads send it, and what
//! waits.

use std::os::fd::AsFd;
use std::sync::Arc;

use arrayvec::ArrayVec;
use wg_common::id::WorkerId;
use wg_common::outcome::DropReason;
use wg_common::time::{Now, Reading};

use super::crew::InFlight;
use super::fan_out::{Helping, Turn};
use super::handoff::{Mesh, Parcel, ParcelReceiver};
use super::inbound::{Arrival, Inbound};
use super::outbound::Outbound;
use super::shared::{Shared, SocketGroup};
use super::thread::{Ports, SLEEP_MAX};
use super::transmit::Exit;
use super::{BATCH_LEN, BATCHES_MAX};
use crate::aead::BatchAead;
use crate::counters::Path;
use crate::session::Continuity;
use crate::sys::mmsg::ReceiveBatch;
use crate::sys::wait::{PollFd, PollFlags};
use crate::tun;
use crate::udp::UdpSocket;

/// One worker: what a thread does for one device.
pub struct Worker {
    id: WorkerId,
    shared: Arc<Shared>,
    inbound: Inbound,
    outbound: Outbound,
    /// What it does for other workers of the device.
    helping: Helping,
    from: Vec<Option<ParcelReceiver>>,
    /// The ring that went first in the latest turn.
    first_ring: usize,
    sockets: Arc<SocketGroup>,
    /// What the kernel had dropped before this worker's own sockets when it was last asked: IPv4, IPv6.
    socket_drops: [u32; 2],
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
    continuity: Continuity,
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

/// What the kernel has dropped before the sockets of worker `id`, in IPv4 and IPv6; `known` where it does
/// not say.
fn drops_before(sockets: &SocketGroup, id: WorkerId, known: [u32; 2]) -> [u32; 2] {
    let own = sockets.of_worker.get(usize::from(id.0));
    let own = [own.map(|own| &own.v4), own.and_then(|own| own.v6.as_ref())];
    std::array::from_fn(|i| own[i].and_then(|socket| socket.drops().ok()).unwrap_or(known[i]))
}

impl Worker {
    /// Worker `id` of a device, with its rings to and from the device's other workers.
    pub fn new(
        id: WorkerId,
        shared: Arc<Shared>,
        mesh: Mesh,
        aead: &'static dyn BatchAead,
    ) -> Self {
        let sockets = shared.sockets.load_full();
        let Mesh { to, from, open, seal } = mesh;
        let ((open_by, to_open), (seal_by, to_seal)) = (open.split(), seal.split());
        let mut helping = Helping::default();
        helping.add(to_open);
        helping.add(to_seal);
        let inbound = Inbound::new(id, Arc::clone(&shared), aead, to).with_helpers(open_by);
        let outbound = Outbound::new(id, Arc::clone(&shared), aead).with_helpers(seal_by);
        Self {
            id,
            inbound,
            outbound,
            helping,
            from,
            first_ring: 0,
            socket_drops: drops_before(&sockets, id, [0; 2]),
            sockets,
            reads: vec![Reads::of(id)],
            deputies_epoch: 0,
            drained: false,
            flush: false,
            flushed: Now::default(),
            continuity: Continuity::default(),
            shared,
        }
    }

    /// Whether its device is being stopped, or has lost its TUN device.
    pub(super) fn is_over(&self) -> bool {
        self.shared.is_over()
    }

    /// Whether its device is being stopped.
    #[cfg(debug_assertions)]
    pub(super) fn is_stopping(&self) -> bool {
        self.shared.stopping.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// The port that frames for this device are sent to.
    pub(super) fn port(&self) -> u16 {
        self.sockets.port
    }

    /// Takes over what has changed since the last turn: the clocks, and what control writes.
    pub(super) fn begin_turn(&mut self, reading: &Reading, turn: Turn) {
        self.shared.now_of(&mut self.continuity, reading);
        self.follow_control();
        self.inbound.begin_turn(turn);
        self.outbound.begin_turn(turn);
    }

    /// What is in flight from earlier turns.
    pub(super) fn in_flight(&self) -> InFlight {
        self.inbound.in_flight().with(self.outbound.in_flight())
    }

    /// Whether a batch that was given to a helper is to be back in a moment.
    pub(super) fn awaits(&self, now: Now) -> bool {
        self.inbound.awaits(now) || self.outbound.awaits(now)
    }

    /// Whether a batch waits to be released.
    pub(super) fn has_line(&self) -> bool {
        !self.inbound.is_empty() || !self.outbound.is_empty()
    }

    /// Whether another thread wants something sealed or opened, or has done so for this one.
    pub(super) fn is_called(&self) -> bool {
        self.helping.is_wanted() || self.inbound.is_answered() || self.outbound.is_answered()
    }

    /// Seals and opens for others, as many batches as `budget` says. Says whether there were any.
    pub(super) fn help(&mut self, budget: &mut usize) -> bool {
        self.helping.help(&self.shared.crew, budget)
    }

    /// Whether datagrams may be taken in.
    pub(super) fn has_room(&self) -> bool {
        self.inbound.has_room()
    }

    /// Lets go of what is sealed and opened and at the front of its line. To be done first in each turn.
    pub(super) fn release(&mut self, ports: &mut Ports, now: Now) {
        self.inbound.release(&self.shared.tun_queues[usize::from(self.id.0)], now);
        let own = &self.sockets.of_worker[usize::from(self.id.0)];
        self.outbound.release(&Exit::new(own, ports), now);
    }

    /// One bounded round over its device's own sources of packets. Says whether there may be more.
    pub(super) fn turn(
        &mut self,
        received: &mut ReceiveBatch,
        ports: &mut Ports,
        now: Now,
    ) -> bool {
        let is_down = !self.shared.is_up();
        let mut more = self.receive_parcels(now);
        for i in 0..self.reads.len() {
            let Reads { worker, v4, v6, tun } = self.reads[i];
            let sockets = Arc::clone(&self.sockets);
            let theirs = &sockets.of_worker[worker];
            let v4 = v4 && self.receive_datagrams(&theirs.v4, received, now);
            let v6 = v6
                && theirs.v6.as_ref().is_some_and(|v6| self.receive_datagrams(v6, received, now));
            let tun = tun && self.send_packets(worker, ports, now);
            self.reads[i] = Reads { worker, v4, v6, tun };
            more |= v4 | v6 | tun;
        }
        self.drained = is_down && self.reads.iter().all(|reads| !reads.tun);
        more | self.flush_staged(ports, now)
    }

    /// Sends staged packets whose keypair has come. Looking for them costs time with each peer that
    /// has some, so it is done after a wake-up, which follows every new keypair, and now and then.
    fn flush_staged(&mut self, ports: &mut Ports, now: Now) -> bool {
        if !self.flush && now.since(self.flushed) < SLEEP_MAX {
            return false;
        }
        let own = &self.sockets.of_worker[usize::from(self.id.0)];
        self.flush = self.outbound.flush_staged(&Exit::new(own, ports), now);
        self.flushed = now;
        self.flush
    }

    /// Counts what the kernel has dropped before this worker's own sockets since this was last called.
    pub(super) fn count_kernel_drops(&mut self) {
        let before = self.socket_drops;
        self.socket_drops = drops_before(&self.sockets, self.id, before);
        let counters = &self.shared.workers[usize::from(self.id.0)].counters;
        for (before, after) in before.into_iter().zip(self.socket_drops) {
            counters.drop(DropReason::SocketFull, after.wrapping_sub(before).into());
        }
    }

    /// Takes over what control has changed.
    fn follow_control(&mut self) {
        let sockets = self.shared.sockets.load();
        if !Arc::ptr_eq(&sockets, &self.sockets) {
            self.sockets = Arc::clone(&sockets);
            self.socket_drops = drops_before(&sockets, self.id, [0; 2]);
        }
        drop(sockets);
        let epoch = self.shared.crew.deputies_epoch();
        if epoch != self.deputies_epoch {
            self.deputies_epoch = epoch;
            let workers = (0..self.shared.workers.len()).map(|worker| WorkerId(worker as u16));
            self.reads = workers
                .filter(|&worker| {
                    worker == self.id || self.shared.crew.deputy_of(worker) == Some(self.id)
                })
                .map(Reads::of)
                .collect();
        }
    }

    /// What is to be waited for: three descriptors of each worker that this one reads for.
    pub(super) fn polled(&self) -> impl Iterator<Item = PollFd<'_>> {
        // Without flags it still tells that the device is gone.
        let tun_flags = if self.drained { PollFlags::empty() } else { PollFlags::IN };
        self.reads.iter().flat_map(move |reads| {
            let sockets = &self.sockets.of_worker[reads.worker];
            let v4 = sockets.v4.as_fd();
            let v6 = sockets.v6.as_ref().map_or(v4, |v6| v6.as_fd());
            let tun = self.shared.tun_queues[reads.worker].as_fd();
            [(v4, PollFlags::IN), (v6, PollFlags::IN), (tun, tun_flags)]
                .map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
        })
    }

    /// Learns whether its thread was woken, and which of [`polled`](Self::polled) may have something: the
    /// next of `ready` in the same order.
    pub(super) fn learn(&mut self, woken: bool, ready: &mut impl Iterator<Item = bool>) {
        self.flush |= woken;
        for reads in &mut self.reads {
            for may_have in [&mut reads.v4, &mut reads.v6, &mut reads.tun] {
                *may_have |= ready.next().unwrap_or(true);
            }
        }
    }

    /// Takes datagrams, at most [`BATCH_LEN`]. Gives how many cost something.
    pub(super) fn receive(&mut self, arrivals: &mut [Arrival<'_>], now: Now) -> usize {
        let tun = &self.shared.tun_queues[usize::from(self.id.0)];
        self.inbound.process(arrivals, tun, now)
    }

    fn receive_parcels(&mut self, now: Now) -> bool {
        if !self.has_room() {
            return true;
        }
        let mut parcels: ArrayVec<Parcel, BATCH_LEN> = ArrayVec::new();
        // Another ring goes first each time, so that none starves.
        let count = self.from.len();
        self.first_ring = if self.first_ring + 1 < count { self.first_ring + 1 } else { 0 };
        let (before, from) = self.from.split_at_mut(self.first_ring);
        for ring in from.iter_mut().chain(before).flatten() {
            while !parcels.is_full()
                && let Some(parcel) = ring.pop()
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
                from: parcel.from,
                tos: parcel.tos,
                path: parcel.path,
                worker: parcel.origin,
                bytes: parcel.datagram(),
            })
            .collect();
        self.receive(&mut arrivals, now);
        let full = arrivals.is_full();
        drop(arrivals);
        for parcel in parcels {
            let ring = self.from[usize::from(parcel.origin.0)].as_mut();
            ring.expect("it came by this ring").give_back(parcel.buffer);
        }
        full
    }

    /// Takes datagrams from a socket, at most [`BATCHES_MAX`] batches. Says whether there may be more.
    fn receive_datagrams(
        &mut self,
        socket: &UdpSocket,
        received: &mut ReceiveBatch,
        now: Now,
    ) -> bool {
        let (mut costly, mut taken) = (0, 0);
        loop {
            if !self.has_room() {
                return true;
            }
            if let Err(error) = socket.receive(received) {
                tracing::debug!(%error, "receiving");
                return false;
            }
            // Of runs there are more than a batch.
            taken += received.len();
            costly += self.receive_batch(received, now);
            let has_enough = costly >= BATCH_LEN || taken >= BATCHES_MAX * BATCH_LEN;
            if !received.may_have_more() || has_enough {
                return received.may_have_more();
            }
        }
    }

    /// Takes what a socket has given. Gives how many of it cost something.
    fn receive_batch(&mut self, received: &mut ReceiveBatch, now: Now) -> usize {
        let mut costly = 0;
        let mut arrivals: ArrayVec<Arrival<'_>, BATCH_LEN> = ArrayVec::new();
        for datagram in received.datagrams() {
            if datagram.truncated {
                let counters = &self.shared.workers[usize::from(self.id.0)].counters;
                counters.drop(DropReason::TooLarge, 1);
                continue;
            }
            // What came as one is opened as one if a batch has room for it: it can go on as one.
            let room = if datagram.run_len > BATCH_LEN { 1 } else { datagram.run_len };
            if arrivals.remaining_capacity() < room {
                costly += self.receive(&mut arrivals, now);
                arrivals.clear();
            }
            arrivals.push(Arrival {
                bytes: datagram.bytes,
                from: datagram.endpoint,
                tos: datagram.tos,
                path: Path::Socket,
                worker: self.id,
            });
        }
        costly + self.receive(&mut arrivals, now)
    }

    fn send_packets(&mut self, worker: usize, ports: &mut Ports, now: Now) -> bool {
        let tun = &self.shared.tun_queues[worker];
        let own = &self.sockets.of_worker[usize::from(self.id.0)];
        match self.outbound.process(tun, &Exit::new(own, ports), now) {
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
