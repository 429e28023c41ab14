//! What happens to the hosts of one seed: storms, in which everything does, and calms, in which
//! every pair must find together again.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};
use wg_common::protocol::{TYPE_COOKIE_REPLY, TYPE_INITIATION, TYPE_RESPONSE, TYPE_TRANSPORT};
use wg_userspace::device::{AllowedIpChange, PeerChange, SetRequest};
use wg_userspace::key::{PresharedKey, PrivateKey, PublicKey};

use crate::model::Form;
use crate::network::{Flight, MS, SECOND, Weather, corrupt, foreign, public_v4, public_v6};
use crate::world::{Event, PORT, World, inner_v4, inner_v6, is_leap, trace};

/// The number that stands for the address of the NAT box.
const NAT: usize = 100;

/// One seed's plan.
pub struct Scenario {
    /// Pairs that are each other's peers; the second of a pair has a public address.
    pairs: Vec<(usize, usize)>,
    /// When the storm or the calm ends.
    phase_ends: u64,
    /// Whether an attacker goes on in calms.
    replays_always: bool,
    /// Addresses that a host has had.
    moves: Vec<u16>,
}

/// How long one seed's world exists.
pub fn length(seed: u64) -> u64 {
    (240 + seed % 5 * 45) * SECOND
}

/// Makes the world of a seed.
pub fn build(seed: u64) -> (World, Scenario) {
    let mut world = World::new(seed);
    let count = [2, 2, 3, 3, 4][world.rng.random_range(0..5)];
    let twin = world.rng.random_bool(0.3).then(|| world.rng.random_range(0..count));
    let mut pairs = Vec::new();
    for host in 0..count {
        let worker_count = world.rng.random_range(1..=3);
        world.add_host(worker_count, twin == Some(host), public_v4(host, 0));
        let fair = Weather::fair(world.rng.random_range(0..40 * MS));
        let scatter = [0.0, 0.0, 0.3, 1.0][world.rng.random_range(0..4)];
        let has_v6 = world.rng.random_bool(0.5);
        let host_ref = &mut world.hosts[host];
        (host_ref.weather, host_ref.scatter) = (fair, scatter);
        host_ref.v6 = has_v6.then(|| public_v6(host, 0));
    }
    // Behind NAT stand the first ones, so that the second of a pair can always be reached.
    let behind_nat = [0, 0, 1, 1, 2][world.rng.random_range(0..5)].min(count - 1);
    for host in 0..behind_nat {
        let host_ref = &mut world.hosts[host];
        host_ref.nat = Some((public_v4(NAT, 0), 1024 + host as u16).into());
        host_ref.v6 = None;
    }
    for second in 1..count {
        for first in 0..second {
            let both_hidden = second < behind_nat;
            if !both_hidden && (first + 1 == second || world.rng.random_bool(0.6)) {
                pairs.push((first, second));
            }
        }
    }
    if pairs.iter().all(|&(first, _)| first != 0) {
        pairs.push((0, count - 1));
    }
    let keys: Vec<PrivateKey> = (0..count).map(|_| PrivateKey::generate(&mut world.rng)).collect();
    let mut requests: Vec<SetRequest> = keys
        .iter()
        .map(|key| SetRequest { private_key: Some(Some(key.clone())), ..SetRequest::default() })
        .collect();
    for &(first, second) in &pairs {
        let preshared = world.rng.random_bool(0.3).then(|| PresharedKey::generate(&mut world.rng));
        for (own, other) in [(first, second), (second, first)] {
            let host = &world.hosts[other];
            let known = host.nat.is_none() && (other == second || world.rng.random_bool(0.6));
            let endpoint = known.then(|| address_of(&mut world, other));
            let keepalive = *[0, 0, 0, 5, 25].choose(&mut world.rng).expect("there are some");
            requests[own].peers.push(PeerChange {
                preshared_key: preshared.clone(),
                endpoint,
                persistent_keepalive: Some(keepalive),
                allowed_ips: allowed_of(other).map(AllowedIpChange::Add).to_vec(),
                ..PeerChange::new(keys[other].public_key())
            });
        }
    }
    for (host, request) in requests.into_iter().enumerate() {
        world.configure(host, request);
    }
    for &(first, second) in &pairs {
        let directions = world.rng.random_range(1..4);
        for (bit, (from, to)) in [(1, (first, second)), (2, (second, first))] {
            if directions & bit != 0 && world.flows.len() < 5 {
                let v6 = world.rng.random_bool(0.3);
                let inner = if v6 { inner_v6 } else { inner_v4 };
                world.add_flow(from, to, (inner(from, 1), inner(to, 1)), SECOND);
            }
        }
    }
    let scenario = Scenario {
        pairs,
        phase_ends: 0,
        replays_always: world.rng.random_bool(0.5),
        moves: vec![0; count],
    };
    world.schedule(0, Event::Scenario);
    (world, scenario)
}

/// The prefixes of a host.
fn allowed_of(host: usize) -> [IpNet; 2] {
    let v4 = IpNet::new(inner_v4(host, 0), 24).expect("24 bits are a prefix");
    let v6 = IpNet::new(inner_v6(host, 0), 112).expect("112 bits are a prefix");
    [v4, v6]
}

/// An outer address of a host that is not behind NAT.
fn address_of(world: &mut World, host: usize) -> SocketAddr {
    let prefers_v6 = world.rng.random_bool(0.3);
    let host = &world.hosts[host];
    let address = if prefers_v6 { host.v6.or(host.v4) } else { host.v4.or(host.v6) };
    SocketAddr::new(address.expect("hosts have addresses"), PORT)
}

fn change(peer: PublicKey, change: impl FnOnce(&mut PeerChange)) -> SetRequest {
    let mut one = PeerChange { update_only: true, ..PeerChange::new(peer) };
    change(&mut one);
    SetRequest { peers: vec![one], ..SetRequest::default() }
}

impl Scenario {
    /// The next thing that happens.
    pub fn act(&mut self, world: &mut World) {
        if world.now >= self.phase_ends {
            self.begin_phase(world);
        }
        let next = if world.calm {
            if self.replays_always {
                replay(world);
            }
            if world.rng.random_bool(0.05) {
                // Nobody notices, and nothing is lost.
                let host = world.rng.random_range(0..world.hosts.len());
                if world.hosts[host].asleep_until <= world.now {
                    let worker_count = world.rng.random_range(1..=3);
                    world.hand_over(host, worker_count);
                }
            }
            world.rng.random_range(SECOND..10 * SECOND)
        } else {
            self.disturb(world);
            world.rng.random_range(50 * MS..4 * SECOND)
        };
        world.schedule(next, Event::Scenario);
    }

    fn begin_phase(&mut self, world: &mut World) {
        world.calm = world.now > 0 && !world.calm || world.now == 0 && world.rng.random_bool(0.3);
        let seconds = if world.calm {
            *[50, 90, 260].choose(&mut world.rng).expect("there are some")
        } else {
            world.rng.random_range(10..80)
        };
        self.phase_ends = world.now + seconds * SECOND;
        trace!(world, "{} for {seconds} s", if world.calm { "calm" } else { "storm" });
        if !world.calm {
            return;
        }
        for host in 0..world.hosts.len() {
            let delay = world.rng.random_range(0..40 * MS);
            world.hosts[host].weather = Weather::fair(delay);
            if world.rng.random_bool(0.5) {
                world.set_wall(host, 0);
            }
            world.disturb(host);
            world.schedule(0, Event::SetUp(host, true));
            world.schedule(0, Event::Resume(host));
        }
        // Who does not know where a peer is asks; somebody tells him.
        for (first, second) in self.pairs.clone() {
            self.tell_endpoint(world, first, second);
            if world.hosts[first].nat.is_none() && world.rng.random_bool(0.7) {
                self.tell_endpoint(world, second, first);
            }
        }
    }

    /// Sets the endpoint of `peer` at `host` to where it is.
    fn tell_endpoint(&self, world: &mut World, host: usize, peer: usize) {
        let Some(key) = world.hosts[peer].configured.public_key else { return };
        let v6 = world.hosts[host].v6.is_some() && world.hosts[host].v4.is_none();
        let mut at = address_of(world, peer);
        if at.is_ipv6() && world.hosts[host].v6.is_none() || v6 && at.is_ipv4() {
            let other = &world.hosts[peer];
            let Some(ip) = (if v6 { other.v6 } else { other.v4 }) else { return };
            at = SocketAddr::new(ip, PORT);
        }
        world.configure(host, change(key, |peer| peer.endpoint = Some(at)));
    }

    fn disturb(&mut self, world: &mut World) {
        let host = world.rng.random_range(0..world.hosts.len());
        match world.rng.random_range(0..34) {
            0..=2 => {
                let weather = Weather::drawn(&mut world.rng);
                trace!(world, "host {host}: {weather:?}");
                world.hosts[host].weather = weather;
            }
            3..=5 => replay(world),
            6 => noise(world),
            7 => self.rebind(world, host),
            8 => self.move_house(world, host),
            9 => jump_wall(world, host),
            10 => sleep(world, host, true),
            11 => sleep(world, host, false),
            12 => {
                let worker_count = world.rng.random_range(1..=3);
                if world.hosts[host].asleep_until <= world.now {
                    world.restart(host, worker_count);
                }
                stream(world, Some(host));
            }
            13 => self.change_preshared_key(world),
            14 => self.change_private_key(world, host),
            15 => self.remove_peer(world),
            16 => self.move_prefix(world, host),
            17 => {
                let (first, second) = *self.pairs.choose(&mut world.rng).expect("there are some");
                self.tell_endpoint(world, first, second);
            }
            18 => self.change_keepalive(world),
            19 => hold_worker(world, host),
            20 => fail_edges(world, host),
            21 => burst(world),
            22 => stream(world, None),
            23 => world.schedule(0, Event::Skip { host, left: 4 }),
            24 | 25 => self.copy(world),
            26 | 27 => quiesce(world, host),
            28 | 29 => {
                trace!(world, "the interface of host {host} goes down");
                let delay = world.rng.random_range(0..10 * SECOND);
                world.schedule(0, Event::SetUp(host, false));
                world.schedule(delay, Event::SetUp(host, true));
            }
            30 | 31 => hand_over(world, host),
            _ => {
                let left = world.rng.random_range(1..60);
                trace!(world, "host {host} is flooded");
                world.schedule(0, Event::Flood { host, left });
            }
        }
    }

    /// The NAT box forgets the host, and lends it another port or address.
    fn rebind(&mut self, world: &mut World, host: usize) {
        if world.hosts[host].nat.is_some() {
            let moves = world.rng.random_range(0..3);
            let port = world.rng.random_range(1024..65535);
            let nat = SocketAddr::new(public_v4(NAT, moves), port);
            if world.resolve(nat).is_none() {
                trace!(world, "host {host} is at {nat}");
                world.hosts[host].nat = Some(nat);
                world.disturb(host);
            }
        }
    }

    /// The host gets other addresses; its peers learn of it by what it sends.
    fn move_house(&mut self, world: &mut World, host: usize) {
        if world.hosts[host].nat.is_some() {
            return;
        }
        self.moves[host] += 1;
        let moves = self.moves[host];
        let form = world.rng.random_range(0..4);
        world.hosts[host].v4 = (form != 3).then(|| public_v4(host, moves));
        world.hosts[host].v6 = (form > 1).then(|| public_v6(host, moves));
        trace!(world, "host {host} moved to {:?} {:?}", world.hosts[host].v4, world.hosts[host].v6);
        world.disturb(host);
    }

    fn change_preshared_key(&mut self, world: &mut World) {
        let (first, second) = *self.pairs.choose(&mut world.rng).expect("there are some");
        let key = if world.rng.random_bool(0.2) {
            PresharedKey::default()
        } else {
            PresharedKey::generate(&mut world.rng)
        };
        for (own, other) in [(first, second), (second, first)] {
            let Some(peer) = world.hosts[other].configured.public_key else { return };
            let request = change(peer, |peer| peer.preshared_key = Some(key.clone()));
            let delay = world.rng.random_range(0..5 * SECOND);
            world.schedule(delay, Event::Configure(own, request));
        }
    }

    /// A host gets another key, of which its peers are told, or has none for a while.
    fn change_private_key(&mut self, world: &mut World, host: usize) {
        let Some(before) = world.hosts[host].configured.public_key else { return };
        if world.rng.random_bool(0.2) {
            // For a while there is none.
            let back = world.hosts[host].configured.request().private_key;
            let delay = world.rng.random_range(0..10 * SECOND);
            let none = SetRequest { private_key: Some(None), ..SetRequest::default() };
            let again = SetRequest { private_key: back, ..SetRequest::default() };
            world.configure(host, none);
            world.schedule(delay, Event::Configure(host, again));
            return;
        }
        let key = PrivateKey::generate(&mut world.rng);
        let public = key.public_key();
        let request = SetRequest { private_key: Some(Some(key)), ..SetRequest::default() };
        world.configure(host, request);
        world.disturb(host);
        for other in 0..world.hosts.len() {
            let Some(known) = world.hosts[other].configured.peer(&before).cloned() else {
                continue;
            };
            let allowed = known.allowed_ips.iter().map(|net| AllowedIpChange::Add(*net));
            let new = PeerChange {
                preshared_key: Some(known.preshared_key.clone()),
                endpoint: known.endpoint,
                allowed_ips: allowed.collect(),
                ..PeerChange::new(public)
            };
            let old = PeerChange { remove: true, ..PeerChange::new(before) };
            let request = SetRequest { peers: vec![old, new], ..SetRequest::default() };
            world.configure(other, request);
        }
    }

    /// A peer is removed on one side, and added again.
    fn remove_peer(&mut self, world: &mut World) {
        let (first, second) = *self.pairs.choose(&mut world.rng).expect("there are some");
        let Some(key) = world.hosts[second].configured.public_key else { return };
        let Some(known) = world.hosts[first].configured.peer(&key).cloned() else { return };
        let old = PeerChange { remove: true, ..PeerChange::new(key) };
        world.configure(first, SetRequest { peers: vec![old], ..SetRequest::default() });
        let allowed = known.allowed_ips.iter().map(|net| AllowedIpChange::Add(*net));
        let new = PeerChange {
            preshared_key: Some(known.preshared_key.clone()),
            endpoint: known.endpoint,
            persistent_keepalive: Some(known.persistent_keepalive),
            allowed_ips: allowed.collect(),
            ..PeerChange::new(key)
        };
        world.configure(first, SetRequest { peers: vec![new], ..SetRequest::default() });
        world.disturb(first);
    }

    /// A prefix that nobody needs goes to another peer; sometimes one that somebody does, and back.
    fn move_prefix(&mut self, world: &mut World, host: usize) {
        let peers: Vec<_> = world.hosts[host].configured.peers.keys().copied().collect();
        let Some(to) = peers.choose(&mut world.rng) else { return };
        let to = PublicKey::from_bytes(*to);
        let net = if world.rng.random_bool(0.5) {
            IpNet::new(inner_v4(100, 0), 16 + world.rng.random_range(0..9)).expect("a prefix")
        } else {
            IpNet::new(inner_v4(world.rng.random_range(0..4), 1), 32).expect("a prefix")
        };
        let add = change(to, |peer| peer.allowed_ips.push(AllowedIpChange::Add(net)));
        world.configure(host, add);
        let remove = change(to, |peer| peer.allowed_ips.push(AllowedIpChange::Remove(net)));
        let delay = world.rng.random_range(0..20 * SECOND);
        world.schedule(delay, Event::Configure(host, remove));
    }

    /// A snapshot of a host is taken, and comes to life later.
    fn copy(&mut self, world: &mut World) {
        let Some(host) = world.hosts.iter().position(|host| host.twin.is_some()) else { return };
        if !world.freeze(host) {
            return;
        }
        let as_another = world.rng.random_bool(0.4);
        let wall_is_set = world.rng.random_bool(0.5);
        let delay = world.rng.random_range(0..60 * SECOND);
        world.schedule(delay, Event::Restore { host, as_another, wall_is_set });
        if as_another {
            self.moves.push(0);
        }
    }

    fn change_keepalive(&mut self, world: &mut World) {
        let (first, second) = *self.pairs.choose(&mut world.rng).expect("there are some");
        let Some(key) = world.hosts[second].configured.public_key else { return };
        let seconds = *[0, 1, 25].choose(&mut world.rng).expect("there are some");
        let request = change(key, |peer| peer.persistent_keepalive = Some(seconds));
        world.configure(first, request);
    }
}

/// Sends again what was once sent: from where it came or from elsewhere, to whom it was for or to
/// another.
fn replay(world: &mut World) {
    if world.archive.is_empty() {
        return;
    }
    for _ in 0..world.rng.random_range(1..20) {
        let place = world.rng.random_range(0..world.archive.len());
        let mut flight = world.archive[place].clone();
        if world.rng.random_bool(0.5) {
            flight.from = foreign(&mut world.rng, flight.to);
        }
        if world.rng.random_bool(0.2) {
            let host = world.rng.random_range(0..world.hosts.len());
            let nat = world.hosts[host].nat.filter(|_| flight.from.is_ipv4());
            flight.to = nat.unwrap_or(flight.to);
        }
        trace!(world, "replay of type {} from {} to {}", flight.bytes[0], flight.from, flight.to);
        world.carry(None, flight);
    }
}

/// Sends bytes that only look like messages.
fn noise(world: &mut World) {
    let host = world.rng.random_range(0..world.hosts.len());
    let Some(v4) = world.hosts[host].v4.filter(|_| world.hosts[host].nat.is_none()) else { return };
    for _ in 0..world.rng.random_range(1..20) {
        let kinds = [TYPE_INITIATION, TYPE_RESPONSE, TYPE_COOKIE_REPLY, TYPE_TRANSPORT, 9];
        let kind = *kinds.choose(&mut world.rng).expect("there are some");
        let len = match kind {
            TYPE_INITIATION => 148,
            TYPE_RESPONSE => 92,
            TYPE_COOKIE_REPLY => 64,
            _ => world.rng.random_range(1..200),
        };
        let mut bytes = vec![0; len];
        world.rng.fill_bytes(&mut bytes);
        bytes[0] = kind;
        bytes.iter_mut().skip(1).take(3).for_each(|byte| *byte = 0);
        // Sometimes with an index that is in use, or nearly a message that was.
        if let Some(seen) = world.archive.choose(&mut world.rng)
            && world.rng.random_bool(0.5)
        {
            bytes = seen.bytes.clone();
            corrupt(&mut world.rng, &mut bytes);
        }
        let to = SocketAddr::new(v4, PORT);
        let from = foreign(&mut world.rng, to);
        world.carry(None, Flight { bytes, from, to });
    }
}

fn jump_wall(world: &mut World, host: usize) {
    let by = *[1, 10, 100, 86_400].choose(&mut world.rng).expect("there are some") * SECOND as i64;
    let by = if world.rng.random_bool(0.5) { by } else { -by };
    trace!(world, "the wall clock of host {host} jumps by {} s", by / SECOND as i64);
    world.set_wall(host, world.hosts[host].wall_offset + by);
}

/// There are no keys for a while.
fn quiesce(world: &mut World, host: usize) {
    if world.hosts[host].asleep_until > world.now {
        return;
    }
    let time = world.rng.random_range(0..15 * SECOND);
    trace!(world, "host {host} quiesces for {} ms", time / MS);
    let time = std::time::Duration::from_nanos(time);
    world.forbid_keys(host);
    world.drive(host, |engine, now, steps| engine.quiesce(time, now, steps));
    if world.rng.random_bool(0.5) {
        let delay = world.rng.random_range(0..15 * SECOND);
        world.schedule(delay, Event::Resume(host));
    }
}

/// Another process of the host takes over, or nearly.
fn hand_over(world: &mut World, host: usize) {
    if world.hosts[host].asleep_until > world.now {
        return;
    }
    world.disturb(host);
    match world.rng.random_range(0..4) {
        kind @ (0 | 1) => {
            trace!(world, "host {host} fails to hand over, and takes back: {}", kind == 0);
            world.hosts[host].side.disordered = true;
            world.drive(host, |engine, now, steps| {
                engine.fail_to_hand_over(kind == 0, now, steps);
            });
        }
        _ => {
            let worker_count = world.rng.random_range(1..=3);
            world.hand_over(host, worker_count);
        }
    }
}

/// Nothing runs for a while. In a suspended host boot time does; in a paused virtual machine it does
/// not, nor does the wall clock, until somebody sets it: at once, or later.
fn sleep(world: &mut World, host: usize, suspended: bool) {
    let longest = *[2, 20, 200].choose(&mut world.rng).expect("there are some");
    let time = world.rng.random_range(SECOND..longest * SECOND);
    let wall_is_set = !suspended && world.rng.random_bool(0.5);
    trace!(world, "host {host} sleeps for {} ms, suspended: {suspended}", time / MS);
    let until = world.now + time;
    let sleeper = &mut world.hosts[host];
    if sleeper.asleep_until > world.now {
        return;
    }
    sleeper.asleep_until = until;
    sleeper.disturbed = until;
    let slept = time as i64;
    sleeper.monotonic_offset -= slept;
    if !suspended {
        sleeper.skewed_until = until + SECOND * 190;
        sleeper.boot_offset -= slept;
        if !wall_is_set {
            sleeper.wall_offset -= slept;
        }
    }
    if (suspended || wall_is_set && is_leap(slept)) && world.rng.random_bool(0.3) {
        // Before control has looked.
        world.schedule(time, Event::HandOver(host));
    }
}

/// A worker stands still.
fn hold_worker(world: &mut World, host: usize) {
    let count = world.hosts[host].engine.worker_count();
    let lane = world.rng.random_range(0..count);
    let time = world.rng.random_range(100 * MS..4 * SECOND);
    trace!(world, "worker {lane} of host {host} stands still for {} ms", time / MS);
    world.hosts[host].side.disordered = true;
    world.hosts[host].stuck_until = world.now + time;
    world.hosts[host].disturbed = world.now + time;
    let duration = std::time::Duration::from_nanos(time);
    world.drive(host, |engine, now, _| engine.hold(lane, now + duration));
}

/// The socket or the TUN device takes nothing.
fn fail_edges(world: &mut World, host: usize) {
    let until = world.now + world.rng.random_range(10 * MS..3 * SECOND);
    let is_socket = world.rng.random_bool(0.5);
    let host_ref = &mut world.hosts[host];
    if is_socket {
        host_ref.socket_fails_until = until;
    } else {
        host_ref.tun_full_until = until;
    }
    host_ref.disturbed = until;
}

/// Many packets at once, some of which are not as they should be.
fn burst(world: &mut World) {
    if world.flows.is_empty() {
        return;
    }
    let number = world.rng.random_range(0..world.flows.len());
    let (from, source, lane) = {
        let flow = &world.flows[number];
        (flow.from, flow.addresses.0, flow.lane)
    };
    if world.hosts[from].asleep_until > world.now {
        return;
    }
    let count = *[3, 20, 70, 200].choose(&mut world.rng).expect("there are some");
    trace!(world, "flow {number}: burst of {count}");
    for _ in 0..count {
        let sizes = [56, 64, 129, 500, 1408, 1409, 1420, 1500];
        let len = *sizes.choose(&mut world.rng).expect("there are some");
        let (mut spoofed, mut form) = (source, Form::Whole);
        match world.rng.random_range(0..30) {
            0 => form = Form::TooShort,
            1 if source.is_ipv4() => form = Form::NoVersion,
            2 => {
                let other = world.rng.random_range(0..4);
                let inner: fn(usize, u8) -> IpAddr =
                    if source.is_ipv4() { inner_v4 } else { inner_v6 };
                spoofed = inner(other, 9);
            }
            _ => {}
        }
        let packet = world.make_packet(number, spoofed, len, form);
        world.route(from, lane, packet);
    }
}

/// Packets of some flows, one after the other.
fn stream(world: &mut World, from: Option<usize>) {
    for flow in 0..world.flows.len() {
        let is_chosen = match from {
            Some(host) => world.flows[flow].from == host,
            None => world.rng.random_bool(0.5),
        };
        if is_chosen {
            let left = world.rng.random_range(1..60);
            world.schedule(0, Event::Stream { flow, left });
        }
    }
}
