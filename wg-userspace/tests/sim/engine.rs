//! The process of one device: the real engine with all its workers, driven by one thread.
//!
//! Workers take turns as their loop does; what threads would do at once is done in an order that the
//! simulation draws. Every call into the engine becomes a [`Step`] that says what went in, what came
//! out, and how the counters moved.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use wg_common::endpoint::Endpoint;
use wg_common::id::{DeviceId, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::outcome::DropReason;
use wg_common::time::{Now, Reading};
use wg_userspace::counters::{Path, Totals};
use wg_userspace::daemon::{Watchdog, carry_out};
use wg_userspace::datapath::handoff::{Mesh, ParcelReceiver, Work};
use wg_userspace::datapath::inbound::{Arrival, Inbound};
use wg_userspace::datapath::outbound::Outbound;
use wg_userspace::datapath::shared::PARCEL_RING_LEN;
use wg_userspace::datapath::{BATCH_LEN, Crew, Shared, SocketGroup, WorkQueue};
use wg_userspace::device::{Device, SetRequest};
use wg_userspace::handshake::Handshakes;
use wg_userspace::key::PublicKey;
use wg_userspace::session::handover::DeviceExport;
use wg_userspace::session::{Continuity, HotPeer};
use wg_userspace::sys::wait::{PollFd, PollFlags, poll};
use zeroize::Zeroizing;

use crate::outside::{Sent, SimOutside, SimTun};
use crate::record::{self, AEAD, Operation};

/// A worker looks at its staged packets at least this often (`worker::SLEEP_MAX`).
const SLEEP_MAX: Duration = Duration::from_millis(100);

/// No datagram here is longer.
const PARCEL_LEN: usize = 2048;

/// A datagram as it reached a device.
#[derive(Clone, Debug)]
pub struct Datagram {
    pub bytes: Vec<u8>,
    pub from: Endpoint,
}

/// Which call into the engine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Call {
    Inbound,
    Outbound,
    Flush,
    Handshake,
    Tick,
    Configure,
}

/// One call into the engine, and all that came of it.
#[derive(Debug)]
pub struct Step {
    pub call: Call,
    pub now: Now,
    /// What was given to the inbound half or to the pool, as it was before.
    pub arrivals: Vec<Datagram>,
    /// Where the bytes of each arrival stood.
    pub addresses: Vec<usize>,
    /// Packets that the outbound half read.
    pub read: Vec<Vec<u8>>,
    pub operations: Vec<Operation>,
    pub sent: Vec<Sent>,
    pub written: Vec<Vec<u8>>,
    pub tun_full: bool,
    /// How the counters moved.
    pub drops: [u64; DropReason::COUNT],
    pub received: u64,
    pub counted_sent: u64,
    /// Datagrams sent on to the worker at which they are at home.
    pub parcels: usize,
    /// Messages left to the pool.
    pub handed: usize,
    /// Handshakes asked for.
    pub wanted: usize,
    /// Whether cookies are demanded.
    pub is_under_load: bool,
    /// Staged packets before and after.
    pub staged: [u64; 2],
    /// Where the peers are after it.
    pub endpoints: Vec<(PublicKey, Option<SocketAddr>)>,
}

impl Step {
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }

    pub fn dropped_in_all(&self) -> u64 {
        self.drops.iter().sum()
    }
}

/// The process of one device.
pub struct Engine {
    pub shared: Arc<Shared>,
    pub outside: SimOutside,
    pub handshakes: Handshakes<SimOutside>,
    device: Device,
    watchdog: Watchdog,
    lanes: Vec<Lane>,
    /// What the sockets of each worker hold.
    sockets: Vec<VecDeque<Datagram>>,
    /// Queues of the TUN device.
    tuns: Vec<SimTun>,
    work: Arc<WorkQueue>,
    /// What its threads read of the host's clocks.
    reading: Reading,
    /// The pool's, and the control thread's.
    continuity: [Continuity; 2],
    /// Sessions were cleared for everything that ended keypairs before.
    cleared: Now,
    /// What receiver indexes are made with.
    index_key: [u32; 4],
    /// Work that was counted and waits for a pool thread.
    pending: VecDeque<Work>,
    /// Every peer that there ever was: packets may be staged for one that is gone.
    peers: Vec<Arc<HotPeer>>,
    /// Counters as they were after the last step.
    totals: Totals,
    staged: u64,
}

/// One worker.
struct Lane {
    inbound: Inbound,
    outbound: Outbound,
    from: Vec<Option<ParcelReceiver>>,
    first_ring: usize,
    flush: bool,
    flushed: Now,
    /// Whose sockets and TUN queue it reads.
    reads: Vec<usize>,
    deputies_epoch: u32,
    continuity: Continuity,
    /// It does not move before this.
    stuck_until: Now,
}

impl Engine {
    /// A device without key and peers, with `worker_count` workers.
    pub fn new(worker_count: usize, seed: u64) -> Self {
        let key = [seed as u32, (seed >> 32) as u32, 3, 4];
        Self::with(worker_count, SimOutside::new(seed), key)
    }

    fn with(worker_count: usize, outside: SimOutside, index_key: [u32; 4]) -> Self {
        let sockets = SocketGroup { port: 0, of_worker: Vec::new() };
        let indexes = IndexPermutation::new(index_key, IndexLayout::DEFAULT);
        let crew = Crew::new(worker_count, None).unwrap();
        let only = (DeviceId(0), indexes.layout().share(0, 1));
        let (shared, work) =
            Shared::in_crew(crew, only, Vec::new(), sockets, indexes, PARCEL_LEN).unwrap();
        let handshakes = Handshakes::new(Arc::clone(&shared), outside.clone(), &AEAD, None);
        let lanes = Mesh::between(worker_count, PARCEL_RING_LEN)
            .into_iter()
            .enumerate()
            .map(|(number, mesh)| {
                let id = WorkerId(number as u16);
                Lane {
                    inbound: Inbound::new(id, Arc::clone(&shared), &AEAD, mesh.to),
                    outbound: Outbound::new(id, Arc::clone(&shared), &AEAD),
                    from: mesh.from,
                    first_ring: 0,
                    flush: false,
                    flushed: Now::default(),
                    reads: vec![number],
                    deputies_epoch: 0,
                    continuity: Continuity::default(),
                    stuck_until: Now::default(),
                }
            })
            .collect();
        Self {
            outside,
            handshakes,
            device: Device::default(),
            watchdog: Watchdog::new(worker_count),
            lanes,
            sockets: (0..worker_count).map(|_| VecDeque::new()).collect(),
            tuns: (0..worker_count).map(|_| SimTun::default()).collect(),
            work,
            reading: Reading {
                before: Now::default(),
                monotonic_ns: 0,
                real_ns: 0,
                after: Now::default(),
            },
            continuity: Default::default(),
            cleared: Now::default(),
            index_key,
            pending: VecDeque::new(),
            peers: Vec::new(),
            totals: Totals::default(),
            staged: 0,
            shared,
        }
    }

    pub fn worker_count(&self) -> usize {
        self.lanes.len()
    }

    /// A datagram reaches the socket of a worker.
    pub fn receive(&mut self, lane: usize, datagram: Datagram) {
        self.sockets[lane].push_back(datagram);
    }

    /// The kernel routes a packet into a queue of the TUN device.
    pub fn route(&mut self, lane: usize, packet: Vec<u8>) {
        self.tuns[lane].to_read.borrow_mut().push_back(packet);
    }

    /// Whether the TUN device takes packets.
    pub fn set_tun_full(&mut self, full: bool) {
        for tun in &self.tuns {
            tun.full.set(full);
        }
    }

    /// Holds a worker still.
    pub fn hold(&mut self, lane: usize, until: Now) {
        self.lanes[lane].stuck_until = until;
    }

    /// Where the device sends to `peer`.
    pub fn endpoint(&self, peer: &PublicKey) -> Option<SocketAddr> {
        let hot = &self.handshakes.cell(self.device.find(peer)?)?.hot;
        let endpoint = hot.endpoint.load();
        endpoint.as_ref().map(|endpoint| endpoint.remote)
    }

    /// The peer as the workers know it.
    pub fn peer(&self, peer: &PublicKey) -> Option<Arc<HotPeer>> {
        Some(Arc::clone(&self.handshakes.cell(self.device.find(peer)?)?.hot))
    }

    /// As `Control::now`, by which whatever control does begins.
    fn look(&mut self) {
        self.shared.now_of(&mut self.continuity[1], &self.reading);
    }

    /// As `Control::set`: changes the configuration.
    pub fn configure(&mut self, request: SetRequest, now: Now, steps: &mut Vec<Step>) {
        self.look();
        for effect in self.device.apply(request) {
            carry_out(effect, &self.device, &self.handshakes, &self.shared, now);
        }
        for (id, _) in self.device.peers() {
            let hot = &self.handshakes.cell(id).expect("peers have cells").hot;
            if !self.peers.iter().any(|known| Arc::ptr_eq(known, hot)) {
                self.peers.push(Arc::clone(hot));
            }
        }
        steps.push(self.step(Call::Configure, now));
    }

    /// Sets what the process reads of the host's clocks from now on.
    pub fn set_clocks(&mut self, reading: Reading) {
        self.reading = reading;
    }

    /// As `Control::cloned`: the device is told that it is a copy.
    pub fn cloned(&mut self, now: Now, steps: &mut Vec<Step>) {
        self.shared.end_keypairs(now);
        self.shared.wake_all();
        self.clear_sessions(now, steps);
    }

    /// As `Control::quiesce`: there are no keypairs for `time`, or until somebody resumes.
    pub fn quiesce(&mut self, time: Duration, now: Now, steps: &mut Vec<Step>) {
        self.shared.set_quiesced_until(now + time);
        self.shared.end_keypairs(now);
        self.shared.wake_all();
        self.clear_sessions(now, steps);
    }

    /// As `Control::resume`.
    pub fn resume(&mut self, now: Now, steps: &mut Vec<Step>) {
        self.look();
        self.shared.set_quiesced_until(Now::default());
        self.handshakes.resume(now);
        steps.push(self.step(Call::Configure, now));
    }

    /// As `Control::set_up`: the interface goes down or up.
    pub fn set_up(&mut self, is_up: bool, now: Now, steps: &mut Vec<Step>) {
        if self.shared.up.swap(is_up, Ordering::Relaxed) == is_up {
            return;
        }
        self.look();
        if is_up {
            self.handshakes.go_up(now);
        } else {
            self.handshakes.go_down(now);
        }
        steps.push(self.step(Call::Configure, now));
    }

    /// The pool has had so much to do that cookies are demanded.
    pub fn load(&mut self, now: Now) {
        self.handshakes.worked(Duration::from_secs(10), now);
    }

    /// Another process of this host takes over, with `worker_count` workers; sockets and TUN device
    /// are passed to it. What waits in it is lost.
    pub fn hand_over(
        &mut self,
        (worker_count, seed): (usize, u64),
        request: &SetRequest,
        now: Now,
        steps: &mut Vec<Step>,
    ) {
        let Some(mut bytes) = self.export(now, steps) else { return };
        self.outside.reseed(seed);
        let mut next = Self::with(worker_count, self.outside.clone(), self.index_key);
        next.reading = self.reading;
        next.shared.up.store(self.shared.is_up(), Ordering::Relaxed);
        next.shared.set_quiesced_until(self.shared.quiesced_until());
        for (queues, datagrams) in self.sockets.drain(..).enumerate() {
            next.sockets[queues % worker_count].extend(datagrams);
        }
        for (queues, tun) in self.tuns.drain(..).enumerate() {
            next.tuns[queues % worker_count].to_read.get_mut().append(&mut tun.to_read.take());
        }
        next.configure(request.clone(), now, steps);
        let export = DeviceExport::take_from(&mut bytes).unwrap();
        next.handshakes.import_all(export, now).unwrap();
        steps.push(next.step(Call::Configure, now));
        *self = next;
    }

    /// A hand-over that fails when the export is out: it is taken back, or lost.
    pub fn fail_to_hand_over(&mut self, takes_back: bool, now: Now, steps: &mut Vec<Step>) {
        let Some(mut bytes) = self.export(now, steps) else { return };
        if takes_back {
            let export = DeviceExport::take_from(&mut bytes).unwrap();
            self.handshakes.import_all(export, now).unwrap();
        } else {
            self.handshakes.resume_all(now);
        }
        steps.push(self.step(Call::Configure, now));
    }

    /// The sessions in bytes, when workers have done what they had to.
    fn export(&mut self, now: Now, steps: &mut Vec<Step>) -> Option<Zeroizing<Vec<u8>>> {
        let key: Vec<u8> = self.index_key.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.look();
        let quiet = || {
            for lane in (0..self.lanes.len()).filter(|&lane| self.moves(lane, now)) {
                self.shared.beat(WorkerId(lane as u16), now + Duration::from_nanos(1));
            }
        };
        let export = self.handshakes.export_all(&key, quiet, now)?;
        steps.push(self.step(Call::Configure, now));
        Some(export.into_bytes())
    }

    /// As `Control::clear_sessions`.
    fn clear_sessions(&mut self, now: Now, steps: &mut Vec<Step>) {
        let not_before = self.shared.keys_not_before();
        self.cleared = not_before;
        self.handshakes.clear_sessions(now.max(not_before));
        steps.push(self.step(Call::Configure, now));
    }

    /// When the control thread wants to look at its timers.
    pub fn next_timeout(&self) -> Option<Now> {
        self.handshakes.next_timeout()
    }

    /// As `Control::tick`.
    pub fn tick(&mut self, now: Now, steps: &mut Vec<Step>) {
        let now = self.shared.now_of(&mut self.continuity[1], &self.reading).max(now);
        if self.shared.keys_not_before() > self.cleared && self.shared.latest_break().is_some() {
            // As `Control::follow_break`.
            let not_before = self.shared.keys_not_before();
            self.cleared = not_before;
            self.handshakes.clear_older_sessions(not_before, now.max(not_before));
            steps.push(self.step(Call::Configure, now));
        }
        if self.shared.quiesced_until() != Now::default() && !self.shared.is_quiesced(now) {
            self.resume(now, steps);
        }
        for lane in 0..self.lanes.len() {
            self.begin_turn(lane, now);
        }
        self.watchdog.look(&self.shared, &self.handshakes, now);
        self.handshakes.tick(now);
        self.take_work();
        steps.push(self.step(Call::Tick, now));
    }

    /// One turn of every worker that moves, the worker `first` before the others, and `pool_share`
    /// pieces of the pool's work.
    pub fn turn(&mut self, first: usize, pool_share: usize, now: Now, steps: &mut Vec<Step>) {
        let count = self.lanes.len();
        for lane in (0..count).map(|i| (first + i) % count) {
            if self.begin_turn(lane, now) {
                self.turn_of(lane, now, steps);
            }
        }
        for _ in 0..pool_share {
            self.shared.now_of(&mut self.continuity[0], &self.reading);
            let Some(work) = self.pending.pop_front() else { break };
            self.handshakes.work(&work, now);
            let mut step = self.step(Call::Handshake, now);
            if let Work::Datagram(datagram) = &work {
                let bytes = datagram.message().to_vec();
                step.arrivals.push(Datagram { bytes, from: datagram.from });
            }
            steps.push(step);
        }
    }

    /// Whether another turn would find something to do.
    pub fn has_work(&self, now: Now) -> bool {
        !self.pending.is_empty()
            || (0..self.lanes.len()).filter(|&lane| self.moves(lane, now)).any(|lane| {
                let own = &self.lanes[lane];
                own.flush
                    || self.is_woken(lane)
                    || own.from.iter().flatten().any(|ring| !ring.is_empty())
                    || own.reads.iter().any(|&of| {
                        !self.sockets[of].is_empty() || !self.tuns[of].to_read.borrow().is_empty()
                    })
            })
    }

    fn moves(&self, lane: usize, now: Now) -> bool {
        self.lanes[lane].stuck_until <= now
    }

    /// As `worker::Worker::run` begins a turn, if the worker moves.
    fn begin_turn(&mut self, lane: usize, now: Now) -> bool {
        let moves = self.moves(lane, now);
        if moves {
            let worker = WorkerId(lane as u16);
            self.shared.crew.begin_turn(worker);
            self.shared.now_of(&mut self.lanes[lane].continuity, &self.reading);
            self.shared.beat(worker, now);
        }
        moves
    }

    fn is_woken(&self, lane: usize) -> bool {
        let wake = self.shared.crew.wake(WorkerId(lane as u16));
        let mut fds = [PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN)];
        poll(&mut fds, Duration::ZERO).unwrap() > 0
    }

    /// As `worker::Worker::turn`.
    fn turn_of(&mut self, lane: usize, now: Now, steps: &mut Vec<Step>) {
        if self.is_woken(lane) {
            self.shared.crew.wake(WorkerId(lane as u16)).drain();
            self.lanes[lane].flush = true;
        }
        self.follow_control(lane);
        self.receive_parcels(lane, now, steps);
        for of in self.lanes[lane].reads.clone() {
            self.receive_datagrams(lane, of, now, steps);
            if !self.tuns[of].to_read.borrow().is_empty() {
                let outcome = self.lanes[lane].outbound.process(&self.tuns[of], &self.outside, now);
                outcome.unwrap();
                self.close(Call::Outbound, now, steps);
            }
        }
        let own = &mut self.lanes[lane];
        if own.flush || now.since(own.flushed) >= SLEEP_MAX {
            own.flush = own.outbound.flush_staged(&self.outside, now);
            own.flushed = now;
            self.close(Call::Flush, now, steps);
        }
    }

    /// As `worker::Worker::follow_control`.
    fn follow_control(&mut self, lane: usize) {
        let epoch = self.shared.crew.deputies_epoch();
        if epoch != self.lanes[lane].deputies_epoch {
            let own = WorkerId(lane as u16);
            self.lanes[lane].deputies_epoch = epoch;
            self.lanes[lane].reads = (0..self.lanes.len())
                .filter(|&of| {
                    of == lane || self.shared.crew.deputy_of(WorkerId(of as u16)) == Some(own)
                })
                .collect();
        }
    }

    /// As `worker::Worker::receive_parcels`.
    fn receive_parcels(&mut self, lane: usize, now: Now, steps: &mut Vec<Step>) {
        let mut parcels = Vec::new();
        let own = &mut self.lanes[lane];
        own.first_ring = (own.first_ring + 1) % own.from.len();
        let (before, from) = own.from.split_at_mut(own.first_ring);
        for ring in from.iter_mut().chain(before).flatten() {
            while parcels.len() < BATCH_LEN
                && let Some(parcel) = ring.pop()
            {
                parcels.push(parcel);
            }
        }
        if parcels.is_empty() {
            return;
        }
        let mut arrivals: Vec<Arrival<'_>> = parcels
            .iter_mut()
            .map(|parcel| Arrival {
                from: parcel.from,
                tos: parcel.tos,
                path: parcel.path,
                worker: parcel.origin,
                bytes: parcel.datagram(),
            })
            .collect();
        let mut step = self.inbound(lane, &mut arrivals, now);
        drop(arrivals);
        for parcel in parcels {
            let ring = self.lanes[lane].from[usize::from(parcel.origin.0)].as_mut();
            ring.unwrap().give_back(parcel.buffer);
        }
        step.tun_full = self.tuns[lane].full.get();
        steps.push(step);
    }

    /// As `worker::Worker::receive_datagrams`.
    fn receive_datagrams(&mut self, lane: usize, of: usize, now: Now, steps: &mut Vec<Step>) {
        let count = self.sockets[of].len().min(BATCH_LEN);
        if count == 0 {
            return;
        }
        let mut datagrams: Vec<Datagram> = self.sockets[of].drain(..count).collect();
        let worker = WorkerId(lane as u16);
        let mut arrivals: Vec<Arrival<'_>> = datagrams
            .iter_mut()
            .map(|datagram| Arrival {
                bytes: &mut datagram.bytes,
                from: datagram.from,
                tos: 0,
                path: Path::Socket,
                worker,
            })
            .collect();
        let mut step = self.inbound(lane, &mut arrivals, now);
        step.tun_full = self.tuns[lane].full.get();
        steps.push(step);
    }

    fn inbound(&mut self, lane: usize, arrivals: &mut [Arrival<'_>], now: Now) -> Step {
        let before: Vec<Datagram> = arrivals
            .iter()
            .map(|arrival| Datagram { bytes: arrival.bytes.to_vec(), from: arrival.from })
            .collect();
        let addresses = arrivals.iter().map(|arrival| arrival.bytes.as_ptr().addr()).collect();
        let in_rings = self.parcel_count();
        self.lanes[lane].inbound.process(arrivals, &self.tuns[lane], now);
        let (handed, wanted) = self.take_work();
        let mut step = self.step(Call::Inbound, now);
        step.parcels = self.parcel_count() - in_rings;
        (step.handed, step.wanted) = (handed, wanted);
        (step.arrivals, step.addresses) = (before, addresses);
        step
    }

    fn parcel_count(&self) -> usize {
        let rings = self.lanes.iter().flat_map(|lane| lane.from.iter().flatten());
        rings.map(ParcelReceiver::len).sum()
    }

    /// Takes what workers left to the pool: how many messages, and how many wishes.
    fn take_work(&mut self) -> (usize, usize) {
        let (mut handed, mut wanted) = (0, 0);
        while let Some(work) = self.work.take() {
            match work {
                Work::Datagram(_) => handed += 1,
                Work::Initiate(..) => wanted += 1,
                Work::Confirmed(_) => {}
            }
            self.pending.push_back(work);
        }
        (handed, wanted)
    }

    fn close(&mut self, call: Call, now: Now, steps: &mut Vec<Step>) {
        let (handed, wanted) = self.take_work();
        let mut step = self.step(call, now);
        (step.handed, step.wanted) = (handed, wanted);
        steps.push(step);
    }

    /// Closes a call into the engine: collects what came of it.
    fn step(&mut self, call: Call, now: Now) -> Step {
        let workers = self.shared.workers.iter().map(|worker| &worker.counters);
        let totals = Totals::sum(workers.chain([self.handshakes.drops()]));
        let before = std::mem::replace(&mut self.totals, totals);
        let moved = |count: &dyn Fn(&Totals) -> u64| count(&self.totals) - count(&before);
        let mut drops = [0; DropReason::COUNT];
        for &reason in DropReason::ALL {
            drops[reason as usize] = moved(&|totals| totals.dropped(reason));
        }
        let staged = self.peers.iter().map(|p| u64::from(p.staged.load(Ordering::Relaxed))).sum();
        Step {
            call,
            now,
            arrivals: Vec::new(),
            addresses: Vec::new(),
            read: self.tuns.iter().flat_map(|tun| tun.read.take()).collect(),
            operations: record::take(),
            sent: self.outside.take_sent(),
            written: self.tuns.iter().flat_map(|tun| tun.written.take()).collect(),
            tun_full: false,
            drops,
            received: moved(&|totals| totals.received(Path::Socket)),
            counted_sent: moved(&|totals| totals.sent(Path::Socket)),
            parcels: 0,
            handed: 0,
            wanted: 0,
            is_under_load: self.handshakes.is_under_load(now),
            staged: [std::mem::replace(&mut self.staged, staged), staged],
            endpoints: self
                .device
                .peers()
                .filter_map(|(id, peer)| {
                    let cell = self.handshakes.cell(id)?;
                    let endpoint = cell.hot.endpoint.load();
                    Some((peer.public_key, endpoint.as_ref().map(|known| known.remote)))
                })
                .collect(),
        }
    }
}
