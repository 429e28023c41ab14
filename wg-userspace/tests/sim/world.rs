//! Hosts on a network, one clock, and what happens to them.
//!
//! ```text
//!  flows ─▶ host: Engine (the real one) ─▶ network ─▶ host: Engine ─▶ flows
//!                 │ every step                              │
//!                 └───────────────▶ model ◀─────────────────┘
//! ```

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use wg_common::endpoint::{Endpoint, LocalSource};
use wg_common::id::ReceiverIndex;
use wg_common::protocol::{
    KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME, REKEY_AFTER_TIME, REKEY_TIMEOUT,
    REKEY_TIMEOUT_JITTER_MAX, TYPE_INITIATION, TYPE_RESPONSE,
};
use wg_common::time::{Now, Reading};
use wg_userspace::device::SetRequest;
use wg_userspace::key::{PresharedKey, PrivateKey, PublicKey};
use wg_userspace::noise::{Identity, RemoteStatic, Timestamp, initiate};

use crate::engine::{Datagram, Engine, Step};
use crate::model::{Actor, Configured, Form, Model, Side, handshake_digest};
use crate::network::{Flight, MS, Network, SECOND, Weather, foreign, public_v4};
use crate::record;

/// The port of every device.
pub const PORT: u16 = 51820;
/// What hosts believe the time is when nothing disturbs their clocks, in seconds since 1970.
const EPOCH: u64 = 1_700_000_000;
/// Datagrams that an attacker keeps.
const ARCHIVE_LEN: usize = 4096;

/// How long a pair may be silent on a good path while somebody sends (§6): a packet goes unanswered
/// for Keepalive-Timeout + Rekey-Timeout before a new handshake is begun, which may have to wait for
/// Rekey-Timeout after the last one; or an initiation that was lost before is repeated after
/// Rekey-Timeout. Then a second for the next packet, and for the way.
pub const SILENCE_MAX: Duration = KEEPALIVE_TIMEOUT
    .saturating_add(REKEY_TIMEOUT.saturating_mul(2))
    .saturating_add(REKEY_TIMEOUT_JITTER_MAX.saturating_mul(2))
    .saturating_add(Duration::from_secs(2));

/// How much longer a handshake takes with who is under load: the initiation and the response may each
/// be answered by a cookie, which shows when the handshake is repeated (§5.3).
const COOKIES_MAX: Duration =
    REKEY_TIMEOUT.saturating_add(REKEY_TIMEOUT_JITTER_MAX).saturating_mul(2);

/// A packet or an initiation that comes so long after it was made was held back by somebody, in
/// nanoseconds.
const HELD_BACK: u64 = 5_000_000_000;
/// On a good path that has been used, a packet is never lost; this late it may be.
const LATE_MAX: u64 = 8 * SECOND;
/// The greatest age at which an initiator that sends every second still seals with a keypair: it asks
/// for a handshake after Rekey-After-Time, which may have to wait for Rekey-Timeout.
const AGE_MAX: Duration =
    REKEY_AFTER_TIME.saturating_add(REKEY_TIMEOUT).saturating_add(Duration::from_secs(3));
/// As [`AGE_MAX`], for a responder whose packets are answered: handshakes that cross leave both sides
/// as responders, and then each renews when it receives (§6.2).
const ANSWERER_AGE_MAX: Duration =
    REJECT_AFTER_TIME.saturating_sub(KEEPALIVE_TIMEOUT).saturating_add(Duration::from_secs(3));

/// Something that will happen.
#[derive(Debug)]
pub enum Event {
    /// A datagram reaches where its destination address is now.
    Arrive(Flight),
    /// A host's workers get the processor.
    Turn(usize),
    /// A host's control thread looks at its timers.
    Tick(usize),
    /// A flow's next packet.
    Packet(usize),
    /// A change of a host's configuration.
    Configure(usize, SetRequest),
    /// More of a stream of packets that belong to a flow.
    Stream { flow: usize, left: u32 },
    /// Counters up to the next multiple of 4096 are used up, as by packets that are lost.
    Skip { host: usize, left: u32 },
    /// A snapshot of a host is brought to life: as another host, or in its place.
    Restore {
        host: usize,
        as_another: bool,
        /// Whether its wall clock is set at once.
        wall_is_set: bool,
    },
    /// An attacker keeps a host's pool busy.
    Flood { host: usize, left: u32 },
    /// A host's interface goes down or up.
    SetUp(usize, bool),
    /// Another process of a host takes over as soon as one of its workers has had a turn.
    HandOver(usize),
    /// A host's operator ends its pause.
    Resume(usize),
    /// The next thing that a scenario does.
    Scenario,
}

struct Scheduled {
    at: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// A computer with one device.
pub struct Host {
    /// Hosts of one lineage are copies of each other.
    pub lineage: usize,
    pub engine: Engine,
    pub side: Side,
    pub configured: Configured,
    /// A second process that has had the same life until it was frozen.
    pub twin: Option<Twin>,
    pub v4: Option<IpAddr>,
    pub v6: Option<IpAddr>,
    /// The outer address and port that a NAT box lends, if it stands behind one.
    pub nat: Option<SocketAddr>,
    /// Boot time less the world's time.
    pub boot_offset: i64,
    /// Monotonic time less the world's time.
    pub monotonic_offset: i64,
    /// The wall clock's error.
    pub wall_offset: i64,
    /// The greatest time that went into an initiation.
    wall_greatest: i64,
    pub asleep_until: u64,
    pub socket_fails_until: u64,
    pub tun_full_until: u64,
    pub stuck_until: u64,
    pub weather: Weather,
    /// Probability that a datagram reaches any worker instead of its own.
    pub scatter: f64,
    /// When something last happened that a pair may need time to recover from.
    pub disturbed: u64,
    /// When it was last under load.
    loaded: u64,
    /// When it last answered an initiation.
    responded: u64,
    /// To whom it last sealed with a keypair whose initiator it is.
    initiates: HashSet<[u8; 32]>,
    /// The wall clock's distance from boot time, and boot time's from monotonic time, when its process
    /// was last called.
    clocks: Option<[i64; 2]>,
    /// Until then its keypairs may be younger by its own clock than by their other ends'.
    pub skewed_until: u64,
    /// Another host has the same key.
    pub contended: bool,
    turn_at: Option<u64>,
    /// When its timers were last looked at, and will be.
    ticked: u64,
    tick_at: u64,
}

/// What a snapshot of a host holds.
pub struct Twin {
    pub engine: Engine,
    pub frozen: Option<Frozen>,
}

/// What is known of a twin that stands still.
pub struct Frozen {
    boot: i64,
    monotonic: i64,
    wall: i64,
    side: Side,
    configured: Configured,
}

/// Packets from one host to another, one a second.
pub struct Flow {
    pub from: usize,
    pub to: usize,
    pub addresses: (IpAddr, IpAddr),
    /// The TUN queue that the kernel puts it into.
    pub lane: usize,
    /// Time between packets.
    pub period: u64,
    pub sends: bool,
    /// Since when the path has been good, and packets were sent.
    pub good_since: Option<u64>,
    last_delivered: u64,
    /// When the sender last heard of the receiver by a packet or an initiation that somebody had held
    /// back: then it has no reason to handshake anew.
    last_heard_late: u64,
    /// Packets sent on a good path.
    outstanding: VecDeque<(u64, u64)>,
}

/// What is done with the trace.
#[derive(Default)]
pub struct Trace {
    pub print: bool,
    pub hash: u64,
    /// The last lines, for who fails.
    lines: VecDeque<String>,
}

impl Trace {
    pub fn line(&mut self, at: u64, text: fmt::Arguments<'_>) {
        let line = format!("{:>12.6} {text}", at as f64 / SECOND as f64);
        for byte in line.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if self.print {
            println!("{line}");
        } else {
            if self.lines.len() == 30 {
                self.lines.pop_front();
            }
            self.lines.push_back(line);
        }
    }

    /// The last lines.
    pub fn tail(&self) -> String {
        self.lines.iter().map(|line| format!("    {line}\n")).collect()
    }
}

/// What a world is made with.
pub struct World {
    pub seed: u64,
    pub rng: StdRng,
    /// Nanoseconds since it began.
    pub now: u64,
    queue: BinaryHeap<Reverse<Scheduled>>,
    scheduled_count: u64,
    pub hosts: Vec<Host>,
    pub flows: Vec<Flow>,
    pub model: Model,
    /// When each packet was made.
    given: Vec<u64>,
    /// Which host sent an initiation, and when.
    initiations: HashMap<u64, (usize, u64)>,
    network: Network,
    /// Datagrams that an attacker has seen.
    pub archive: Vec<Flight>,
    /// Nothing disturbs anybody.
    pub calm: bool,
    /// Time between two looks at a host's timers.
    pub tick: u64,
    pub trace: Trace,
    /// The longest silence on a good path.
    pub silence_max: Duration,
    /// Time for which flows had a good path, in all.
    pub good: Duration,
    /// Datagrams that went onto the wire.
    pub datagram_count: u64,
    process_count: u64,
}

macro_rules! trace {
    ($world:expr, $($text:tt)+) => {
        $world.trace.line($world.now, format_args!($($text)+))
    };
}
pub(crate) use trace;

impl World {
    pub fn new(seed: u64) -> Self {
        // What an earlier seed left when it failed.
        drop(record::take());
        Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            now: 0,
            queue: BinaryHeap::new(),
            scheduled_count: 0,
            hosts: Vec::new(),
            flows: Vec::new(),
            model: Model::default(),
            given: Vec::new(),
            initiations: HashMap::new(),
            network: Network::default(),
            archive: Vec::new(),
            calm: true,
            tick: 200 * MS,
            trace: Trace::default(),
            silence_max: Duration::ZERO,
            good: Duration::ZERO,
            datagram_count: 0,
            process_count: 0,
        }
    }

    /// A new process: its randomness is its own.
    pub fn process(&mut self, worker_count: usize) -> Engine {
        self.process_count += 1;
        Engine::new(worker_count, self.process_seed())
    }

    fn process_seed(&self) -> u64 {
        self.seed.wrapping_mul(1 << 16).wrapping_add(self.process_count)
    }

    /// A process that begins as the last one did.
    fn twin(&self, worker_count: usize) -> Twin {
        Twin { engine: Engine::new(worker_count, self.process_seed()), frozen: None }
    }

    /// Adds a host with an address, and says its number.
    pub fn add_host(&mut self, worker_count: usize, has_twin: bool, address: IpAddr) -> usize {
        let engine = self.process(worker_count);
        let twin = has_twin.then(|| self.twin(worker_count));
        let number = self.hosts.len();
        self.hosts.push(Host {
            lineage: number,
            engine,
            side: Side::default(),
            configured: Configured::default(),
            twin,
            v4: Some(address).filter(IpAddr::is_ipv4),
            v6: Some(address).filter(IpAddr::is_ipv6),
            nat: None,
            boot_offset: (1_000 * (number as i64 + 1) + 7) * SECOND as i64,
            monotonic_offset: (900 * (number as i64 + 1)) * SECOND as i64,
            wall_offset: 0,
            wall_greatest: i64::MIN,
            asleep_until: 0,
            socket_fails_until: 0,
            tun_full_until: 0,
            stuck_until: 0,
            weather: Weather::fair(5 * MS),
            scatter: 0.0,
            disturbed: 0,
            loaded: 0,
            responded: 0,
            initiates: HashSet::new(),
            clocks: None,
            skewed_until: 0,
            contended: false,
            turn_at: None,
            ticked: self.now,
            tick_at: u64::MAX,
        });
        let first = self.rng.random_range(0..self.tick);
        self.tick_at(number, self.now + first);
        number
    }

    pub fn add_flow(&mut self, from: usize, to: usize, addresses: (IpAddr, IpAddr), period: u64) {
        let lane = self.rng.random_range(0..self.hosts[from].engine.worker_count());
        let (good_since, outstanding) = (None, VecDeque::new());
        let (last_delivered, last_heard_late) = (0, 0);
        self.flows.push(Flow {
            from,
            to,
            addresses,
            lane,
            period,
            sends: true,
            good_since,
            last_delivered,
            last_heard_late,
            outstanding,
        });
        let first = self.rng.random_range(0..SECOND);
        self.schedule(first, Event::Packet(self.flows.len() - 1));
    }

    /// Has something happen after `delay`.
    pub fn schedule(&mut self, delay: u64, event: Event) {
        self.scheduled_count += 1;
        let (at, order) = (self.now + delay, self.scheduled_count);
        self.queue.push(Reverse(Scheduled { at, order, event }));
    }

    /// Lets everything happen until `end`; `scenario` is called for its own events.
    pub fn run(&mut self, end: u64, scenario: &mut dyn FnMut(&mut World)) {
        while let Some(Reverse(next)) = self.queue.pop() {
            if next.at >= end {
                self.queue.push(Reverse(next));
                break;
            }
            self.now = next.at;
            match next.event {
                Event::Arrive(flight) => self.arrive(flight),
                Event::Turn(host) => self.turn(host),
                Event::Tick(host) => self.tick(host),
                Event::Packet(flow) => self.packet(flow),
                Event::Configure(host, request) => self.configure(host, request),
                Event::Stream { flow, left } => self.stream(flow, left),
                Event::Skip { host, left } => self.skip(host, left),
                Event::Restore { host, as_another, wall_is_set } => {
                    self.restore(host, as_another, wall_is_set);
                }
                Event::Flood { host, left } => self.flood(host, left),
                Event::SetUp(host, _) | Event::Resume(host)
                    if self.hosts[host].asleep_until > self.now =>
                {
                    let rest = self.hosts[host].asleep_until - self.now;
                    self.schedule(rest, next.event);
                }
                Event::SetUp(host, is_up) => {
                    self.drive(host, |engine, now, steps| engine.set_up(is_up, now, steps));
                }
                Event::HandOver(host) if self.hosts[host].asleep_until <= self.now => {
                    self.disturb(host);
                    self.drive(host, |engine, now, steps| engine.turn(0, 1, now, steps));
                    let count = self.hosts[host].engine.worker_count();
                    self.hand_over(host, count);
                }
                Event::HandOver(_) => {}
                Event::Resume(host) => {
                    self.drive(host, |engine, now, steps| engine.resume(now, steps));
                }
                Event::Scenario => scenario(self),
            }
        }
        self.now = end;
    }

    /// Boot time of a host.
    pub fn boot(&self, host: usize) -> Now {
        let ns = self.now as i64 + self.hosts[host].boot_offset;
        Now::from_boot_ns(u64::try_from(ns).expect("hosts have started before"))
    }

    /// The wall clock of a host, in nanoseconds after the epoch of the world.
    fn wall(&self, host: usize) -> i64 {
        self.now as i64 + self.hosts[host].wall_offset
    }

    /// Calls the engine of `host`, and its twin's as long as that lives the same life.
    pub fn drive(&mut self, number: usize, act: impl Fn(&mut Engine, Now, &mut Vec<Step>)) {
        self.follow_clocks(number);
        let now = self.boot(number);
        let wall = self.wall(number);
        let since_epoch = EPOCH as i64 * SECOND as i64 + wall;
        let (secs, nanos) = (since_epoch / SECOND as i64, since_epoch % SECOND as i64);
        let timestamp = Timestamp::from_unix(secs as u64, nanos as u32);
        let host = &mut self.hosts[number];
        let addresses: Vec<IpAddr> = [host.v4, host.v6].into_iter().flatten().collect();
        let reading = Reading {
            before: now,
            monotonic_ns: (self.now as i64 + host.monotonic_offset) as u64,
            real_ns: since_epoch as u64,
            after: now,
        };
        let socket_fails = host.socket_fails_until > self.now;
        let tun_full = host.tun_full_until > self.now;
        let run = |engine: &mut Engine| {
            engine.set_clocks(reading);
            engine.outside.set(timestamp, &addresses, socket_fails);
            engine.set_tun_full(tun_full);
            let mut steps = Vec::new();
            act(engine, now, &mut steps);
            steps
        };
        let steps = run(&mut host.engine);
        if let Some(twin) = &mut host.twin
            && twin.frozen.is_none()
        {
            let mirrored = run(&mut twin.engine);
            let came = |steps: &[Step]| -> Vec<_> {
                steps.iter().map(|step| (step.sent.clone(), step.written.clone())).collect()
            };
            assert!(came(&steps) == came(&mirrored), "the same input was answered differently");
        }
        for step in steps {
            self.follow(number, step);
        }
        if self.hosts[number].engine.has_work(now) {
            self.wake(number);
        }
        self.plan_tick(number);
    }

    /// If the clocks of a host show that it slept, or was set right, since its process last ran, it must
    /// not seal with what it had. What was set twice meanwhile shows only by what is left of it.
    fn follow_clocks(&mut self, number: usize) {
        let host = &mut self.hosts[number];
        let [wall, asleep] =
            [host.wall_offset - host.boot_offset, host.boot_offset - host.monotonic_offset];
        let before = host.clocks.replace([wall, asleep]);
        if before.is_some_and(|before| is_leap(wall - before[0]) || asleep != before[1]) {
            self.forbid_keys(number);
        }
    }

    /// Has the control thread of a host look at its timers when they want it, and every now and then.
    fn plan_tick(&mut self, number: usize) {
        let host = &self.hosts[number];
        let next = host.engine.next_timeout().map_or(u64::MAX, |at| {
            let at = at.boot_ns() as i64 - host.boot_offset;
            at.max(self.now as i64 + 1) as u64
        });
        let at = next.min(host.ticked + self.tick).max(self.now + 1);
        if at < host.tick_at {
            self.tick_at(number, at);
        }
    }

    fn tick_at(&mut self, number: usize, at: u64) {
        self.hosts[number].tick_at = at;
        self.schedule(at - self.now, Event::Tick(number));
    }

    /// Has the model look at a step, and carries on what came of it.
    fn follow(&mut self, number: usize, step: Step) {
        let (now, wall) = (self.now, self.wall(number));
        let host = &mut self.hosts[number];
        let actor = Actor {
            host: number,
            lineage: host.lineage,
            configured: &host.configured,
            worker_count: host.engine.worker_count(),
        };
        if step.is_under_load {
            host.loaded = now;
        }
        let answers = step.sent.iter().any(|sent| sent.bytes[0] == TYPE_RESPONSE);
        if answers {
            host.responded = now;
        }
        let noted = self.model.check(&actor, &mut host.side, &step);
        if !noted.initiated.is_empty() {
            host.wall_greatest = host.wall_greatest.max(wall);
        }
        for id in noted.delivered {
            let flow = self.model.packets[id as usize].flow as usize;
            trace!(self, "host {number} delivers packet {id}");
            self.flows[flow].last_delivered = now;
            self.hear(number, (self.flows[flow].from, self.given[id as usize]));
        }
        if let Some(initiation) = step.arrivals.first().filter(|_| answers) {
            // As a packet, it is a sign of life: the wait for an answer begins anew (§6.5).
            let made = self.initiations.get(&handshake_digest(&initiation.bytes));
            self.hear(number, *made.expect("somebody made what is answered"));
        }
        for (peer, age, is_initiator) in noted.sealed {
            let initiates = &mut self.hosts[number].initiates;
            if is_initiator {
                initiates.insert(*peer.as_bytes());
            } else {
                initiates.remove(peer.as_bytes());
            }
            self.check_age(number, &peer, age, is_initiator);
        }
        for sent in step.sent {
            self.send(number, sent.bytes, sent.to);
        }
    }

    /// A host hears of `sender` by what that made at a moment.
    fn hear(&mut self, number: usize, (sender, made): (usize, u64)) {
        if self.now - made > HELD_BACK {
            let back = |flow: &&mut Flow| flow.from == number && flow.to == sender;
            self.flows.iter_mut().filter(back).for_each(|flow| flow.last_heard_late = self.now);
        }
    }

    /// On a path that has been good, keypairs are renewed in time: by the initiator when it sends, and
    /// when it receives what its responder sends.
    fn check_age(&self, number: usize, peer: &PublicKey, age: Duration, is_initiator: bool) {
        let longest = if is_initiator { AGE_MAX } else { ANSWERER_AGE_MAX };
        if age <= longest {
            return;
        }
        // Since before it could be renewed.
        let since = self.now - (age - REKEY_AFTER_TIME).as_nanos() as u64;
        let may_be = |host: usize| age <= longest + self.cookies_max(host, since);
        let is_kept = |host: usize| self.hosts[host].skewed_until < since;
        let lasts =
            |flow: &&Flow| flow.period <= SECOND && flow.good_since.is_some_and(|at| at < since);
        let has = |from: usize, to: usize| {
            self.flows.iter().filter(lasts).any(|flow| (flow.from, flow.to) == (from, to))
        };
        let other = (0..self.hosts.len())
            .find(|&host| self.hosts[host].configured.public_key == Some(*peer));
        if let Some(other) = other {
            assert!(
                !(has(number, other) && (is_initiator || has(other, number)))
                    || !(is_kept(number) && is_kept(other))
                    || may_be(number)
                    || may_be(other),
                "host {number} seals for host {other} with a keypair that is {age:?} old"
            );
        }
    }

    /// How much longer than otherwise handshakes with a host may have taken since `since`.
    fn cookies_max(&self, host: usize, since: u64) -> Duration {
        if self.hosts[host].loaded >= since { COOKIES_MAX } else { Duration::ZERO }
    }

    /// A datagram leaves a host.
    fn send(&mut self, number: usize, bytes: Vec<u8>, to: Endpoint) {
        let host = &self.hosts[number];
        let default = if to.remote.is_ipv4() { host.v4 } else { host.v6 };
        let own = to.local.map(|local| local.addr).filter(|own| {
            [host.v4, host.v6].contains(&Some(*own)) && own.is_ipv4() == to.remote.is_ipv4()
        });
        let Some(source) = own.or(default) else { return };
        let from = match host.nat {
            Some(nat) if source.is_ipv4() => nat,
            _ => SocketAddr::new(source, PORT),
        };
        self.datagram_count += 1;
        if bytes[0] == TYPE_INITIATION {
            self.initiations.insert(handshake_digest(&bytes), (number, self.now));
        }
        let flight = Flight { bytes, from, to: to.remote };
        trace!(
            self,
            "host {number} sends type {} of {} bytes from {from} to {}",
            flight.bytes[0],
            flight.bytes.len(),
            flight.to
        );
        if self.archive.len() < ARCHIVE_LEN {
            self.archive.push(flight.clone());
        } else {
            let place = self.rng.random_range(0..ARCHIVE_LEN);
            self.archive[place] = flight.clone();
        }
        self.carry(Some(number), flight);
    }

    /// Puts a datagram onto the wire of the host that sends it, if it is one's.
    pub fn carry(&mut self, from: Option<usize>, flight: Flight) {
        assert_eq!(flight.from.is_ipv4(), flight.to.is_ipv4(), "no datagram is of both families");
        // Where nobody is, it is lost on the way.
        let Some((to, _)) = self.resolve(flight.to) else { return };
        let back = self.hosts[to].weather;
        let out = from.map_or(Weather::fair(MS), |from| self.hosts[from].weather);
        let wire = ((from.unwrap_or(usize::MAX), out), (to, back));
        for (at, copy) in self.network.carry(&mut self.rng, wire, flight, self.now) {
            self.schedule(at - self.now, Event::Arrive(copy));
        }
    }

    /// Which host is at an outer address, and by which of its own.
    pub fn resolve(&self, to: SocketAddr) -> Option<(usize, IpAddr)> {
        self.hosts.iter().enumerate().find_map(|(number, host)| match (host.nat, host.v4) {
            (Some(nat), Some(v4)) if nat == to => Some((number, v4)),
            (Some(_), _) if to.is_ipv4() => None,
            _ => [host.v4, host.v6]
                .into_iter()
                .flatten()
                .find(|own| SocketAddr::new(*own, PORT) == to)
                .map(|own| (number, own)),
        })
    }

    fn arrive(&mut self, flight: Flight) {
        let Some((number, own)) = self.resolve(flight.to) else { return };
        let host = &self.hosts[number];
        if host.asleep_until > self.now {
            return;
        }
        let count = host.engine.worker_count();
        let lane = if host.scatter > 0.0 && self.rng.random_bool(host.scatter) {
            self.rng.random_range(0..count)
        } else {
            // As a NIC does: by the outer addresses and ports.
            let octets = match flight.from.ip() {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            let sum = octets.iter().fold(flight.from.port(), |sum, byte| {
                sum.wrapping_mul(31).wrapping_add(u16::from(*byte))
            });
            usize::from(sum) % count
        };
        trace!(
            self,
            "host {number} worker {lane} gets type {:?} of {} bytes from {}",
            flight.bytes.first(),
            flight.bytes.len(),
            flight.from
        );
        let from =
            Endpoint { remote: flight.from, local: Some(LocalSource { addr: own, ifindex: 1 }) };
        let host = &mut self.hosts[number];
        self.model.arrive(&mut host.side, lane, &flight.bytes, from);
        let datagram = Datagram { bytes: flight.bytes, from };
        if let Some(twin) = host.twin.as_mut().filter(|twin| twin.frozen.is_none()) {
            twin.engine.receive(lane, datagram.clone());
        }
        host.engine.receive(lane, datagram);
        self.wake(number);
    }

    /// Has a host's workers run soon.
    fn wake(&mut self, number: usize) {
        let latest = if self.calm { 50_000 } else { 2 * MS };
        let delay = self.rng.random_range(1_000..latest);
        let host = &mut self.hosts[number];
        if host.turn_at.is_none_or(|at| at > self.now + delay) {
            host.turn_at = Some(self.now + delay);
            self.schedule(delay, Event::Turn(number));
        }
    }

    fn turn(&mut self, number: usize) {
        let host = &mut self.hosts[number];
        if host.turn_at != Some(self.now) {
            return;
        }
        host.turn_at = None;
        if host.asleep_until > self.now {
            return;
        }
        let first = self.rng.random_range(0..self.hosts[number].engine.worker_count());
        let pool_share = self.rng.random_range(0..5);
        self.drive(number, |engine, now, steps| engine.turn(first, pool_share, now, steps));
    }

    fn tick(&mut self, number: usize) {
        let host = &mut self.hosts[number];
        if host.tick_at != self.now {
            return;
        }
        if host.asleep_until > self.now {
            // It goes on when it wakes.
            let wakes = host.asleep_until;
            self.tick_at(number, wakes);
            return;
        }
        (host.ticked, host.tick_at) = (self.now, u64::MAX);
        self.drive(number, |engine, now, steps| {
            engine.tick(now, steps);
            if steps.last().is_some_and(|step| step.staged[1] > 0) {
                engine.turn(0, 1, now, steps);
            }
        });
        let host = &self.hosts[number];
        let peers = host.configured.peers.len();
        let cells = host.engine.handshakes.cell_count();
        assert!(cells == peers, "{cells} cells for {peers} peers");
        let indexes = host.engine.handshakes.index_count();
        assert!(indexes <= 5 * peers, "{indexes} indexes for {peers} peers");
    }

    /// Gives a host a packet to send.
    pub fn route(&mut self, number: usize, lane: usize, packet: Vec<u8>) {
        let host = &mut self.hosts[number];
        let lane = lane % host.engine.worker_count();
        if let Some(twin) = host.twin.as_mut().filter(|twin| twin.frozen.is_none()) {
            twin.engine.route(lane, packet.clone());
        }
        host.engine.route(lane, packet);
        self.wake(number);
    }

    /// Makes the next packet of a flow, but with this source and form.
    pub fn make_packet(&mut self, flow: usize, source: IpAddr, len: usize, form: Form) -> Vec<u8> {
        let Flow { from, addresses, .. } = self.flows[flow];
        let lineage = self.hosts[from].lineage;
        self.given.push(self.now);
        self.model.packet(lineage, flow as u32, (source, addresses.1), len, form)
    }

    fn packet(&mut self, number: usize) {
        self.check_flow(number);
        let Flow { from, addresses, lane, period, sends, .. } = self.flows[number];
        self.schedule(period, Event::Packet(number));
        if !sends || self.hosts[from].asleep_until > self.now {
            return;
        }
        let id = self.model.packets.len() as u64;
        let len = self.rng.random_range(56..300);
        let packet = self.make_packet(number, addresses.0, len, Form::Whole);
        trace!(self, "flow {number}: host {from} has packet {id}");
        self.route(from, lane, packet);
        let now = self.now;
        let may_miss = self.renews_crossed(number);
        let flow = &mut self.flows[number];
        if flow.good_since.is_some() && !may_miss {
            flow.outstanding.push_back((now, id));
        }
    }

    /// Whether a flow's receiver has just been answered, and handshakes had crossed before: each side
    /// seals with its own keypair, of which the receiver keeps only the one that it sealed with itself.
    /// What the sender seals until it hears of the new one is lost, as in the kernel.
    fn renews_crossed(&self, number: usize) -> bool {
        let flow = &self.flows[number];
        let initiates = |from: usize, to: usize| {
            let peer = self.hosts[to].configured.public_key;
            peer.is_some_and(|peer| self.hosts[from].initiates.contains(peer.as_bytes()))
        };
        self.now - self.hosts[flow.from].responded < SECOND
            && initiates(flow.from, flow.to)
            && initiates(flow.to, flow.from)
    }

    fn stream(&mut self, number: usize, left: u32) {
        let Flow { from, addresses, lane, .. } = self.flows[number];
        if left == 0 || self.hosts[from].asleep_until > self.now {
            return;
        }
        for _ in 0..self.rng.random_range(1..4) {
            let packet = self.make_packet(number, addresses.0, 56, Form::Whole);
            self.route(from, lane, packet);
        }
        let gap = self.rng.random_range(100_000..10 * MS);
        self.schedule(gap, Event::Stream { flow: number, left: left - 1 });
    }

    fn skip(&mut self, number: usize, left: u32) {
        let peers: Vec<_> = self.hosts[number].configured.peers.keys().copied().collect();
        self.drive(number, |engine, now, _| {
            let peers = peers.iter().filter_map(|key| engine.peer(&PublicKey::from_bytes(*key)));
            for peer in peers {
                if let Some(keypair) = peer.keypairs.load().seals_with(now) {
                    let _used_up = keypair.reserve(4096 - keypair.sent() % 4096);
                }
            }
        });
        for flow in 0..self.flows.len() {
            if self.flows[flow].from == number {
                self.stream(flow, 2);
            }
        }
        if left > 0 {
            self.schedule(SECOND / 2, Event::Skip { host: number, left: left - 1 });
        }
    }

    /// A live pair is never silent for long, and on a good path nothing is lost.
    fn check_flow(&mut self, number: usize) {
        if !self.is_good(number) {
            let flow = &mut self.flows[number];
            flow.good_since = None;
            flow.outstanding.clear();
            return;
        }
        let (now, sends) = (self.now, self.flows[number].sends);
        let flow = &mut self.flows[number];
        let disturbed = self.hosts[flow.from].disturbed.max(self.hosts[flow.to].disturbed);
        let since = flow.good_since.unwrap_or(now).max(disturbed);
        if flow.good_since != Some(since) {
            flow.outstanding.clear();
        }
        flow.good_since = Some(since);
        if !sends {
            return;
        }
        self.good += Duration::from_nanos(flow.period);
        let last = since.max(flow.last_delivered).max(flow.last_heard_late);
        let silence =
            Duration::from_nanos(now - last).saturating_sub(Duration::from_nanos(flow.period));
        self.silence_max = self.silence_max.max(silence);
        let (from, to) = (flow.from, flow.to);
        let allowed =
            |since| SILENCE_MAX + self.cookies_max(from, since).max(self.cookies_max(to, since));
        let (silent_for, settles_in) = (allowed(last), allowed(since));
        let flow = &mut self.flows[number];
        assert!(
            silence <= silent_for,
            "flow {number} from host {} to host {} is silent for {silence:?} on a good path",
            flow.from,
            flow.to
        );
        let skewed = self.hosts[flow.from].skewed_until.max(self.hosts[flow.to].skewed_until);
        // Who hears what was held back has no reason to handshake anew either.
        let settled = (since.max(flow.last_heard_late) + settles_in.as_nanos() as u64).max(skewed);
        while let Some(&(sent, id)) = flow.outstanding.front()
            && sent + LATE_MAX < now
        {
            flow.outstanding.pop_front();
            let lineage = self.hosts[flow.to].lineage;
            assert!(
                sent < settled || self.model.was_delivered(lineage, id),
                "packet {id} of flow {number} was lost on a good path"
            );
        }
    }

    /// Whether nothing that the network or a configuration does keeps a flow from being carried.
    fn is_good(&self, number: usize) -> bool {
        let flow = &self.flows[number];
        let (from, to) = (&self.hosts[flow.from], &self.hosts[flow.to]);
        let is_well = |number: usize, host: &Host| {
            !host.contended
                && host.engine.shared.pause(self.boot(number)).is_none()
                && host.asleep_until <= self.now
                && host.socket_fails_until <= self.now
                && host.tun_full_until <= self.now
                && host.stuck_until <= self.now
        };
        let (Some(ours), Some(theirs)) = (from.configured.public_key, to.configured.public_key)
        else {
            return false;
        };
        let agree = || {
            let (ours, theirs) = (to.configured.peer(&ours)?, from.configured.peer(&theirs)?);
            Some(ours.preshared_key == theirs.preshared_key)
        };
        let reaches = || {
            let at = from.engine.endpoint(&theirs)?;
            Some(
                self.resolve(at)?.0 == flow.to
                    && if at.is_ipv4() { from.v4.is_some() } else { from.v6.is_some() },
            )
        };
        self.calm
            && is_well(flow.from, from)
            && is_well(flow.to, to)
            && from.configured.owner(flow.addresses.1) == Some(theirs)
            && to.configured.owner(flow.addresses.0) == Some(ours)
            && agree() == Some(true)
            && reaches() == Some(true)
            && self.wall(flow.from) >= from.wall_greatest
    }

    /// Changes a host's configuration now, or when it wakes.
    pub fn configure(&mut self, number: usize, request: SetRequest) {
        if let Some(Some(key)) = &request.private_key {
            self.model.meet(key);
        }
        if self.hosts[number].asleep_until > self.now {
            let rest = self.hosts[number].asleep_until - self.now;
            return self.schedule(rest, Event::Configure(number, request));
        }
        trace!(self, "host {number} is configured: {} peers change", request.peers.len());
        self.hosts[number].configured.apply(&request);
        if request.peers.iter().any(|peer| peer.remove) {
            // The greatest timestamp goes with the peer.
            self.hosts[number].side.forget_handshakes();
        }
        self.drive(number, |engine, now, steps| engine.configure(request.clone(), now, steps));
    }

    /// Says that a host needs time to recover.
    pub fn disturb(&mut self, number: usize) {
        self.hosts[number].disturbed = self.now;
    }

    /// Takes a snapshot of a host that has a twin.
    pub fn freeze(&mut self, number: usize) -> bool {
        let wall = self.wall(number);
        let now = self.now as i64;
        let host = &mut self.hosts[number];
        let (boot, monotonic) = (now + host.boot_offset, now + host.monotonic_offset);
        if host.asleep_until > self.now {
            return false;
        }
        let Some(twin) = host.twin.as_mut().filter(|twin| twin.frozen.is_none()) else {
            return false;
        };
        let (side, configured) = (host.side.clone(), host.configured.clone());
        twin.frozen = Some(Frozen { boot, monotonic, wall, side, configured });
        trace!(self, "snapshot of host {number}");
        true
    }

    /// Brings a snapshot to life. What ran since it was taken is known to its peers and not to it.
    fn restore(&mut self, number: usize, as_another: bool, wall_is_set: bool) {
        let host = &mut self.hosts[number];
        let Some(Twin { engine, frozen: Some(frozen) }) = host.twin.take() else { return };
        trace!(self, "host {number} is restored, as another: {as_another}");
        self.process_count += 1;
        // The kernel's randomness begins anew before anybody else learns of the clone.
        engine.outside.reseed(self.process_seed());
        let (lineage, lost) = (self.hosts[number].lineage, &self.hosts[number].side);
        if !as_another {
            self.model.lose(lineage, &frozen.side, lost);
        }
        self.model.roll_back(lineage, &frozen.side);
        if as_another {
            self.model.copy(lineage, &frozen.side);
        }
        self.model.has_copies = true;
        let newest = self.hosts[number].configured.clone();
        let restored = if as_another {
            let other = self.hosts.len();
            self.add_host(1, false, public_v4(other, 0));
            let wall_offset = self.hosts[number].wall_offset;
            let lineage = self.hosts[number].lineage;
            self.hosts[number].contended = true;
            let host = &mut self.hosts[other];
            (host.lineage, host.contended) = (lineage, true);
            host.wall_offset = wall_offset;
            other
        } else {
            number
        };
        let host = &mut self.hosts[restored];
        (host.engine, host.side, host.configured) = (engine, frozen.side, frozen.configured);
        // Its clocks go on from where they were, until somebody sets the one on the wall.
        let now = self.now as i64;
        host.boot_offset = frozen.boot - now;
        host.monotonic_offset = frozen.monotonic - now;
        let behind = frozen.wall - now;
        let leap = host.wall_offset - behind;
        if !wall_is_set {
            host.wall_offset = behind;
        }
        host.clocks = None;
        host.turn_at = None;
        (host.ticked, host.tick_at) = (self.now, u64::MAX);
        host.asleep_until = 0;
        host.skewed_until = self.now + 190 * SECOND;
        let changed = host.configured != newest;
        self.disturb(restored);
        self.forbid_keys(restored);
        // Where real time does not leap, nothing but the hypervisor tells.
        if !(wall_is_set && is_leap(leap)) {
            self.drive(restored, |engine, now, steps| engine.cloned(now, steps));
        }
        self.wake(restored);
        self.plan_tick(restored);
        if changed && !as_another {
            let request = SetRequest { replace_peers: true, ..newest.request() };
            self.hosts[restored].side.forget_handshakes();
            self.configure(restored, request);
        }
    }

    /// No key that has sealed before is to seal on a host from now on.
    pub fn forbid_keys(&mut self, number: usize) {
        let now = self.boot(number);
        self.hosts[number].side.forbidden_before = Some(now);
    }

    /// Sets the wall clock of a host. If that shows, it ends its keypairs.
    pub fn set_wall(&mut self, number: usize, offset: i64) {
        self.hosts[number].wall_offset = offset;
        self.disturb(number);
    }

    /// Another process of a host takes over.
    pub fn hand_over(&mut self, number: usize, worker_count: usize) {
        trace!(self, "host {number} hands over to {worker_count} workers");
        self.process_count += 1;
        let seed = self.process_seed();
        let request = self.hosts[number].configured.request();
        self.hosts[number].side.disordered = true;
        // The successor's counters are so much greater that what they overtake on the way is lost.
        for flow in self.flows.iter_mut().filter(|flow| flow.from == number) {
            if self.hosts[number].weather.reorders || self.hosts[flow.to].weather.reorders {
                flow.outstanding.clear();
            }
        }
        self.drive(number, |engine, now, steps| {
            engine.hand_over((worker_count, seed), &request, now, steps);
        });
    }

    /// An attacker floods a host with initiations of his own.
    fn flood(&mut self, number: usize, left: u32) {
        let host = &self.hosts[number];
        let Some(key) = host.configured.public_key.filter(|_| left > 0) else { return };
        let to = host.nat.or(host.v4.map(|v4| SocketAddr::new(v4, PORT)));
        let identity = Identity::new(PrivateKey::generate(&mut self.rng));
        let remote = RemoteStatic::new(&identity, key, PresharedKey::default());
        let (index, timestamp) =
            (ReceiverIndex::from_wire(left.to_le_bytes()), Timestamp::from_unix(EPOCH, 0));
        let made = initiate(&identity, &remote, index, timestamp, None, &mut self.rng);
        let (_, message) = made.expect("the key is a point");
        for _ in 0..3 {
            if let Some(to) = to {
                let from = foreign(&mut self.rng, to);
                self.carry(None, Flight { bytes: message.to_vec(), from, to });
            }
        }
        if self.hosts[number].asleep_until <= self.now {
            self.drive(number, |engine, now, _| engine.load(now));
        }
        self.schedule(SECOND / 2, Event::Flood { host: number, left: left - 1 });
    }

    /// Begins a host's process anew: nothing is left but its configuration.
    pub fn restart(&mut self, number: usize, worker_count: usize) {
        trace!(self, "host {number} restarts with {worker_count} workers");
        let has_twin = self.hosts[number].twin.is_some();
        let engine = self.process(worker_count);
        let twin = has_twin.then(|| self.twin(worker_count));
        let host = &mut self.hosts[number];
        host.engine = engine;
        host.twin = twin;
        host.clocks = None;
        host.side = Side::default();
        let request = host.configured.request();
        self.disturb(number);
        self.configure(number, request);
    }
}

/// Whether real time that is set by so many nanoseconds shows for certain.
pub fn is_leap(by: i64) -> bool {
    by.unsigned_abs() > 3 * SECOND / 2
}

/// The inner address of a host.
pub fn inner_v4(host: usize, last: u8) -> IpAddr {
    Ipv4Addr::new(10, 7, host as u8, last).into()
}

/// As [`inner_v4`], for IPv6.
pub fn inner_v6(host: usize, last: u8) -> IpAddr {
    std::net::Ipv6Addr::new(0xfd07, 0, 0, host as u16, 0, 0, 0, last.into()).into()
}
