//! Up to sixteen threads under one clock, whose turns cost simulated time: order, shares, and where packets stay.
//!
//! Nothing runs beside anything else: the thread that is earliest makes its next step. The halves, lines, helpers
//! and duties are those of the data path; sockets and queues are bounded lists.

use std::cell::Cell;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::aead::Job;
use crate::counters::Totals;
use crate::datapath::BATCH_LEN;
use crate::datapath::crew::InFlight;
use crate::datapath::encap::transport_header;
use crate::datapath::fan_out::{DEPTH, Duty, Helping};

/// What things cost, in nanoseconds: a turn, a packet beside AEAD, and AEAD.
const TURN: u64 = 1_000;
const PACKET: u64 = 150;
const AEAD_COST: u64 = 850;
/// From a signal until who slept runs.
const WAKING: u64 = 20_000;
/// Packets that a socket or a queue of the TUN device holds.
const QUEUE_LEN: usize = 2048;
const MS: u64 = 1_000_000;

thread_local! {
    static JOBS: Cell<u64> = const { Cell::new(0) };
}

/// Seals and opens nothing, but knows what should open, and counts.
struct Metered;

fn tag(job: &Job<'_>) -> [u8; 16] {
    let mut tag = [0; 16];
    tag[..8].copy_from_slice(&job.counter.to_le_bytes());
    tag[8..].copy_from_slice(&job.key.expose()[..8]);
    tag
}

impl BatchAead for Metered {
    fn name(&self) -> &'static str {
        "metered"
    }

    fn seal(&self, jobs: &mut [Job<'_>]) {
        JOBS.set(JOBS.get() + jobs.len() as u64);
        for job in jobs {
            let (tag, at) = (tag(job), job.buffer.len() - 16);
            job.buffer[at..].copy_from_slice(&tag);
            job.ok = true;
        }
    }

    fn open(&self, jobs: &mut [Job<'_>]) {
        JOBS.set(JOBS.get() + jobs.len() as u64);
        for job in jobs {
            job.ok = job.buffer.ends_with(&tag(job));
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Direction {
    In,
    Out,
}

/// Packets of one peer, in one direction.
struct Flow {
    direction: Direction,
    /// Where its peer is at home, and its packets come.
    worker: usize,
    interval: u64,
    next_at: u64,
    sent: u32,
    /// The number that must not come again, nor any before it.
    expected: u32,
    delivered: u64,
    overflown: u64,
    longest_wait: u64,
}

impl Flow {
    fn new(direction: Direction, worker: usize, interval: u64) -> Self {
        let next_at = START.boot_ns();
        Self {
            direction,
            worker,
            interval,
            next_at,
            sent: 0,
            expected: 0,
            delivered: 0,
            overflown: 0,
            longest_wait: 0,
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    /// A turn begins.
    Turn,
    /// Looks whether somebody wants help, at most so many times yet.
    Look(usize),
    /// Has worked on a bundle, and may look so many times yet.
    Helped(usize),
    Asleep,
}

struct Thread {
    inbound: Inbound,
    outbound: Outbound,
    helping: Helping,
    duty: Duty,
    socket: VecDeque<Vec<u8>>,
    tun: Tun,
    wire: Wire,
    step: Step,
    /// When it makes that step.
    at: u64,
    more: bool,
    helped: bool,
    /// It stands still between these moments.
    held: (u64, u64),
}

struct Simulation {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
    flows: Vec<Flow>,
    /// Nothing comes from then on.
    end: u64,
}

impl Simulation {
    fn new(thread_count: usize, flows: Vec<Flow>) -> Self {
        let sockets = SocketGroup { port: 51820, of_worker: Vec::new() };
        let shared = Shared::new(DeviceId(0), thread_count, Vec::new(), sockets, None, INDEXES);
        let (shared, _) = shared.unwrap();
        let mut allowed_ips = AllowedIps::default();
        for (number, flow) in flows.iter().enumerate() {
            let slot = number + 1;
            let prefix = format!("10.0.{number}.0/24");
            allowed_ips.insert(prefix.parse::<IpNet>().unwrap(), PeerId(slot as u32));
            let peer = peer(slot as u32);
            let (key, home) = ((slot as u8, slot as u8), ShardId::new(flow.worker));
            let keypair = keypair(&peer, slot, key, Role::Initiator, home);
            shared.publish(&keypair);
            peer.keypairs.update(|keypairs| keypairs.installed_by_initiator(Arc::clone(&keypair)));
            shared.peers.set(slot, peer);
        }
        shared.routing.store(allowed_ips.snapshot());
        let threads = Mesh::between(thread_count, 16).into_iter().enumerate();
        let threads = threads
            .map(|(number, mesh)| {
                let id = WorkerId(number as u16);
                let ((open_by, to_open), (seal_by, to_seal)) =
                    (mesh.open.split(), mesh.seal.split());
                let mut helping = Helping::default();
                helping.add(to_open);
                helping.add(to_seal);
                let inbound = Inbound::new(id, Arc::clone(&shared), &Metered, mesh.to);
                let outbound = Outbound::new(id, Arc::clone(&shared), &Metered);
                Thread {
                    inbound: inbound.with_helpers(open_by),
                    outbound: outbound.with_helpers(seal_by),
                    helping,
                    duty: Duty::new(id, Arc::clone(&shared.crew)),
                    socket: VecDeque::new(),
                    tun: Tun::default(),
                    wire: Wire::default(),
                    step: Step::Turn,
                    at: START.boot_ns(),
                    more: false,
                    helped: false,
                    held: (0, 0),
                }
            })
            .collect();
        Self { shared, threads, flows, end: 0 }
    }

    /// Lets packets come for so long, then waits until all is quiet.
    fn run(&mut self, time: u64) {
        self.end = START.boot_ns() + time;
        let late = self.end + 1_000 * MS;
        loop {
            let earliest = self.threads.iter().enumerate().min_by_key(|(_, thread)| thread.at);
            let (number, thread) = earliest.unwrap();
            assert!(thread.at < late, "it comes to rest");
            let all_asleep = self.threads.iter().all(|thread| thread.step == Step::Asleep);
            if thread.at > self.end && all_asleep && self.threads.iter().all(Thread::is_empty) {
                break;
            }
            let at = thread.at;
            self.step(number);
            // Who was woken by that step.
            for (number, thread) in self.threads.iter_mut().enumerate() {
                let wake = self.shared.crew.wake(WorkerId(number as u16));
                if thread.step == Step::Asleep && wake.drain() {
                    thread.at = thread.at.min(at + WAKING);
                }
            }
        }
        self.check();
    }

    fn step(&mut self, number: usize) {
        let thread = &mut self.threads[number];
        if (thread.held.0..thread.held.1).contains(&thread.at) {
            thread.at = thread.held.1;
            return;
        }
        let now = Now::from_boot_ns(thread.at);
        thread.step = match thread.step {
            Step::Turn => return self.turn(number, now),
            Step::Asleep => {
                self.shared.crew.wake(WorkerId(number as u16)).drain();
                thread.duty.wake();
                return self.turn(number, now);
            }
            Step::Look(left) if left > 0 && thread.helping.is_wanted() => {
                // Of a whole batch.
                thread.at += AEAD_COST * BATCH_LEN as u64;
                Step::Helped(left - 1)
            }
            Step::Helped(left) => {
                thread.helped |= thread.helping.help(&self.shared.crew, &mut 1);
                Step::Look(left)
            }
            Step::Look(_) => {
                let goes_on = thread.duty.end_turn(thread.more, thread.helped, now)
                    || thread.inbound.awaits(now)
                    || thread.outbound.awaits(now);
                let (inbound, outbound) = (&thread.inbound, &thread.outbound);
                let is_called = || {
                    thread.helping.is_wanted() || inbound.is_answered() || outbound.is_answered()
                };
                if goes_on || !thread.duty.may_sleep(is_called) {
                    Step::Turn
                } else {
                    let has_line = !(inbound.is_empty() && outbound.is_empty());
                    let until = thread.at + if has_line { 10 * MS } else { 100 * MS };
                    let comes = |flow: &Flow| flow.worker == number && flow.next_at < self.end;
                    let next =
                        self.flows.iter().filter(|flow| comes(flow)).map(|flow| flow.next_at);
                    thread.at = next.min().unwrap_or(u64::MAX).clamp(thread.at, until);
                    Step::Asleep
                }
            }
        };
    }

    /// A thread's own part of its turn, as `WorkerThread::turn` does it.
    fn turn(&mut self, number: usize, now: Now) {
        self.arrive(number, now);
        let thread = &mut self.threads[number];
        let id = WorkerId(number as u16);
        let jobs = JOBS.get();
        let Thread { inbound, outbound, tun, wire, socket, duty, .. } = thread;
        let turn = duty.begin_turn(inbound.in_flight().with(outbound.in_flight()));
        inbound.begin_turn(turn);
        outbound.begin_turn(turn);
        self.shared.beat(id, now);
        inbound.release(tun, now);
        outbound.release(wire, now);
        let mut taken = Vec::new();
        if inbound.has_room() {
            taken.extend(socket.drain(..socket.len().min(BATCH_LEN)));
            let mut arrivals: Vec<_> = taken
                .iter_mut()
                .map(|bytes| Arrival {
                    bytes,
                    from: endpoint("192.0.2.1:1000"),
                    tos: 0,
                    path: Path::Socket,
                    worker: id,
                })
                .collect();
            inbound.process(&mut arrivals, tun, now);
        }
        let before = tun.to_read.borrow().len();
        let mut more = outbound.process(tun, wire, now).unwrap();
        let read = before - tun.to_read.borrow().len();
        more |= !socket.is_empty();
        thread.more = more;
        thread.helped = false;
        let packets = (taken.len() + read) as u64;
        thread.at += TURN + PACKET * packets + AEAD_COST * (JOBS.get() - jobs);
        thread.step = Step::Look(thread.duty.budget(more));
        self.depart(number);
    }

    /// Packets that have come by now.
    fn arrive(&mut self, number: usize, now: Now) {
        let thread = &mut self.threads[number];
        for (at, flow) in
            self.flows.iter_mut().enumerate().filter(|(_, flow)| flow.worker == number)
        {
            while flow.next_at <= now.boot_ns() && flow.next_at < self.end {
                let (stamp, count) = (flow.next_at, flow.sent);
                flow.next_at += flow.interval;
                flow.sent += 1;
                let len = match flow.direction {
                    Direction::In => thread.socket.len(),
                    Direction::Out => thread.tun.to_read.borrow().len(),
                };
                if len >= QUEUE_LEN {
                    flow.overflown += 1;
                    continue;
                }
                let peer = [10, 0, at as u8, 2];
                let (source, destination) = match flow.direction {
                    Direction::In => (peer, US),
                    Direction::Out => (US, peer),
                };
                let mut packet = packet(source, destination, 64);
                packet[40..44].copy_from_slice(&count.to_le_bytes());
                packet[44..52].copy_from_slice(&stamp.to_le_bytes());
                match flow.direction {
                    Direction::Out => thread.tun.to_read.borrow_mut().push_back(packet),
                    Direction::In => {
                        let counter = u64::from(count);
                        let header = transport_header(index(at + 1), counter);
                        let mut tag = [at as u8 + 1; 16];
                        tag[..8].copy_from_slice(&counter.to_le_bytes());
                        thread.socket.push_back([&header[..], &packet, &tag].concat());
                    }
                }
            }
        }
    }

    /// What a thread has written and sent.
    fn depart(&mut self, number: usize) {
        let thread = &self.threads[number];
        let written = thread.tun.written.take().into_iter();
        let written = written.map(|packet| (Direction::In, packet[14], packet));
        let sent = thread.wire.0.take().into_iter().map(|message| {
            let packet = message[16..].to_vec();
            (Direction::Out, packet[18], packet)
        });
        for (direction, flow, packet) in written.chain(sent) {
            let flow = &mut self.flows[usize::from(flow)];
            assert_eq!((flow.direction, flow.worker), (direction, number));
            let count = u32::from_le_bytes(packet[40..44].try_into().unwrap());
            assert!(count >= flow.expected, "{count} came after {}", flow.expected);
            flow.expected = count + 1;
            flow.delivered += 1;
            let stamp = u64::from_le_bytes(packet[44..52].try_into().unwrap());
            flow.longest_wait = flow.longest_wait.max(thread.at - stamp);
        }
    }

    /// Every packet was delivered, or is counted.
    fn check(&self) {
        let totals = Totals::sum(self.shared.workers.iter().map(|worker| &worker.counters));
        let mut missing = 0;
        for flow in &self.flows {
            missing += u64::from(flow.sent) - flow.overflown - flow.delivered;
        }
        assert_eq!(missing, totals.dropped(DropReason::HelperStuck));
        let others: Vec<_> =
            totals.drops().filter(|(reason, _)| *reason != DropReason::HelperStuck).collect();
        assert_eq!(others, []);
    }

    fn fanned_out(&self) -> u64 {
        Totals::sum(self.shared.workers.iter().map(|worker| &worker.counters)).fanned_out()
    }
}

impl Thread {
    fn is_empty(&self) -> bool {
        self.socket.is_empty()
            && self.tun.to_read.borrow().is_empty()
            && self.inbound.is_empty()
            && self.outbound.is_empty()
            && self.inbound.in_flight().with(self.outbound.in_flight()) == InFlight::default()
    }
}

/// Faster than any number of threads is.
const FLOOD: u64 = 100;

/// Packets of one tunnel that so many threads carry in ten milliseconds.
fn carried(direction: Direction, thread_count: usize) -> u64 {
    let mut simulation = Simulation::new(thread_count, vec![Flow::new(direction, 0, FLOOD)]);
    simulation.run(10 * MS);
    simulation.flows[0].delivered - QUEUE_LEN as u64
}

#[test]
fn one_tunnel_grows_with_the_threads_until_its_home_is_used_up() {
    for direction in [Direction::In, Direction::Out] {
        let carried = [1, 2, 4, 8, 16].map(|count| carried(direction, count));
        let percent = carried.map(|count| count * 100 / carried[0]);
        // What is left to its home is a sixth of the work and the turns' part.
        for (percent, least) in percent.into_iter().zip([100, 185, 340, 500, 500]) {
            assert!(percent >= least, "{direction:?}: {percent} of {least}");
        }
    }
}

#[test]
fn a_tunnel_that_one_thread_carries_is_left_to_it() {
    for direction in [Direction::In, Direction::Out] {
        // Three quarters of what it can.
        let mut simulation = Simulation::new(16, vec![Flow::new(direction, 3, 1_400)]);
        simulation.run(20 * MS);
        assert_eq!((simulation.fanned_out(), simulation.flows[0].overflown), (0, 0));
        // Longer than a batch takes nothing waits.
        assert!(simulation.flows[0].longest_wait < 2 * BATCH_LEN as u64 * (PACKET + AEAD_COST));
    }
}

#[test]
fn tunnels_share_helpers_fairly() {
    for direction in [Direction::In, Direction::Out] {
        for (thread_count, tunnels) in [(3, 2), (4, 2), (4, 3), (16, 5), (16, 15)] {
            let flows = (0..tunnels).map(|worker| Flow::new(direction, worker, FLOOD)).collect();
            let mut simulation = Simulation::new(thread_count, flows);
            simulation.run(10 * MS);
            let delivered = || simulation.flows.iter().map(|flow| flow.delivered);
            let (least, most) = (delivered().min().unwrap(), delivered().max().unwrap());
            assert!(
                least * 100 >= most * 70,
                "{direction:?} {thread_count} {tunnels}: {least} {most}"
            );
        }
    }
}

#[test]
fn who_helps_loses_nothing_of_its_own() {
    for direction in [Direction::In, Direction::Out] {
        for interval in [1_500, 2_000, 10_000] {
            let flows = vec![Flow::new(direction, 0, FLOOD), Flow::new(direction, 1, interval)];
            let mut simulation = Simulation::new(2, flows);
            simulation.run(20 * MS);
            let own = &simulation.flows[1];
            assert_eq!((own.overflown, own.delivered), (0, own.sent.into()));
            assert!(own.longest_wait < MS, "{direction:?} {interval}: {}", own.longest_wait);
            assert!(simulation.fanned_out() > 0);
        }
    }
}

#[test]
fn a_helper_that_stands_still_costs_what_it_has_and_no_more() {
    for direction in [Direction::In, Direction::Out] {
        let mut simulation = Simulation::new(3, vec![Flow::new(direction, 0, FLOOD)]);
        let begin = START.boot_ns() + 3 * MS;
        simulation.threads[1].held = (begin, begin + 400 * MS);
        simulation.run(100 * MS);
        let dropped = Totals::sum(simulation.shared.workers.iter().map(|worker| &worker.counters))
            .dropped(DropReason::HelperStuck);
        assert!((1..=(DEPTH * BATCH_LEN) as u64).contains(&dropped), "{dropped}");
        // For a while it waited; then the other one helped.
        let alone = 100 * MS / (PACKET + AEAD_COST);
        assert!(simulation.flows[0].delivered * 10 > alone * 8);
    }
}

#[test]
fn whatever_comes_is_in_order_and_accounted_for() {
    for seed in 0..if cfg!(debug_assertions) { 40 } else { 600 } {
        let mut rng = StdRng::seed_from_u64(seed);
        let thread_count = rng.random_range(1..=16);
        let flows = (0..rng.random_range(1..=20))
            .map(|_| {
                let direction = [Direction::In, Direction::Out][rng.random_range(0..2)];
                let interval = [FLOOD, 300, 900, 3_000, 50_000][rng.random_range(0..5)];
                Flow::new(direction, rng.random_range(0..thread_count), interval)
            })
            .collect();
        let mut simulation = Simulation::new(thread_count, flows);
        for thread in &mut simulation.threads {
            if rng.random_range(0..4) == 0 {
                let begin = START.boot_ns() + rng.random_range(0..8 * MS);
                thread.held = (begin, begin + rng.random_range(0..150 * MS));
            }
        }
        println!("seed {seed}: {thread_count} threads, {} flows", simulation.flows.len());
        simulation.run(rng.random_range(1..6) * MS);
    }
}
