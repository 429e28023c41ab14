//! Receiver indexes from the first message to the last packet, against a plain model.
//!
//! One gateway (its sessions, its index table, the map of the kernel side, one worker) and some peers
//! that are nothing but handshakes and keys. Messages are lost, come late, and may be answered in the
//! very instant in which they are sent. The model knows which keypairs the gateway must have, and so
//! says of every packet whether it must be taken: one that is valid is never dropped, at whatever
//! instant it comes, and one for a dead keypair never is taken, or meets another peer's.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use wg_common::endpoint::Endpoint;
use wg_common::id::{DeviceId, PeerId, ReceiverIndex, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::map::{index_entry, may_live};
use wg_common::message::{Message, classify};
use wg_common::outcome::DropReason;
use wg_common::protocol::{INITIATION_INTERVAL_MIN, REJECT_AFTER_TIME, TRANSPORT_OVERHEAD};

use super::*;
use crate::aead::{AeadKey, RingAead};
use crate::counters::{Path, Totals};
use crate::datapath::handoff::{HandshakeDatagram, Mesh};
use crate::datapath::inbound::{Arrival, Inbound, PacketSink, Run};
use crate::datapath::{Crew, SocketGroup};
use crate::noise::{Established, Initiator, RemoteStatic, Timestamp, initiate, open_initiation};

const START: Now = Now::from_boot_ns(1_000_000_000);
const PEER_COUNT: usize = 3;
/// So few that they run out.
const SLOT_BITS: u32 = 4;
/// What the kernel side's map holds in the slots of other devices.
const FOREIGN: u64 = u64::MAX;
const REST: Duration = Duration::from_secs(540);
static AEAD: RingAead = RingAead;

/// A keypair as the far end has it.
struct FarKeypair {
    /// The gateway's index: packets go to it.
    gateway_index: ReceiverIndex,
    /// The index of the far end itself.
    own_index: u32,
    key: AeadKey,
    counter: u64,
    /// Whether the far end may seal with it: as initiator at once, as responder when it has received.
    may_seal: bool,
}

/// The far end of a tunnel.
struct Far {
    identity: Identity,
    gateway: RemoteStatic,
    /// The handshake it has begun last.
    pending: Option<Initiator>,
    keypairs: Vec<FarKeypair>,
    /// The gateway's initiations that have arrived.
    initiations: Vec<Vec<u8>>,
}

/// A keypair that the gateway must have.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Kept {
    index: ReceiverIndex,
    created: Now,
}

/// What the gateway must have of one peer (whitepaper §6.2, as `session::Keypairs` has it).
#[derive(Clone, Copy, Debug, Default)]
struct Model {
    current: Option<Kept>,
    previous: Option<Kept>,
    next: Option<Kept>,
}

impl Model {
    fn responded(&mut self, new: Kept) {
        self.next = Some(new);
    }

    fn finished(&mut self, new: Kept) {
        self.previous = self.current.replace(new);
    }

    fn opened(&mut self, index: ReceiverIndex) {
        if self.next.is_some_and(|next| next.index == index) {
            self.previous = self.current;
            self.current = self.next.take();
        }
    }

    fn has(&self, index: ReceiverIndex, now: Now) -> bool {
        [self.current, self.previous, self.next]
            .into_iter()
            .flatten()
            .any(|kept| kept.index == index && now.since(kept.created) < REJECT_AFTER_TIME)
    }
}

/// Everything outside of the gateway.
struct World {
    now: Now,
    fars: Vec<Far>,
    models: Vec<Model>,
    inbound: Inbound,
    next_far_index: u32,
    /// Whether peers answer in the very instant in which something is sent to them.
    answers_at_once: bool,
    /// Whether what the gateway sends is lost.
    loses: bool,
    seed: u64,
    /// Packets on their way to the gateway: when they come, from whom, to which index.
    flying: Vec<(Now, usize, ReceiverIndex, Vec<u8>)>,
    /// Responses on their way to the gateway.
    responses: Vec<(Now, usize, Vec<u8>)>,
}

/// What [`Handshakes`] is given as the world; what it sends is looked at while it sends.
#[derive(Clone)]
struct Network {
    shared: Arc<Shared>,
    live: Arc<SharedWords>,
    world: Arc<Mutex<World>>,
    gateway: Arc<OnceLock<Weak<Handshakes<Network>>>>,
}

/// A TUN device without a host.
struct NoHost;

impl PacketSink for NoHost {
    fn write(&self, _run: &Run<'_>) -> io::Result<()> {
        panic!("keepalives carry nothing");
    }
}

fn endpoint(peer: usize) -> Endpoint {
    Endpoint::configured(([192, 0, 2, peer as u8 + 1], 51820).into())
}

fn peer_of(to: &Endpoint) -> usize {
    match to.remote.ip() {
        std::net::IpAddr::V4(ip) => usize::from(ip.octets()[3]) - 1,
        std::net::IpAddr::V6(_) => unreachable!("peers have IPv4 addresses"),
    }
}

fn index_at(message: &[u8], at: usize) -> ReceiverIndex {
    ReceiverIndex::from_wire(*message[at..].first_chunk().unwrap())
}

impl World {
    fn rng(&mut self) -> StdRng {
        self.seed += 1;
        StdRng::seed_from_u64(self.seed)
    }

    fn wall(&self) -> Timestamp {
        let ns = 1_700_000_000_000_000_000 + self.now.boot_ns();
        Timestamp::from_unix(ns / 1_000_000_000, (ns % 1_000_000_000) as u32)
    }

    /// A keepalive of `peer`, sealed under the keypair with this number of its own.
    fn seal(&mut self, peer: usize, keypair: usize) -> (ReceiverIndex, Vec<u8>) {
        let keypair = &mut self.fars[peer].keypairs[keypair];
        let mut message = [0; TRANSPORT_OVERHEAD];
        message[..TRANSPORT_HEADER_LEN]
            .copy_from_slice(&transport_header(keypair.gateway_index, keypair.counter));
        let tag = &mut message[TRANSPORT_HEADER_LEN..];
        AEAD.seal(&mut [Job::new(&keypair.key, keypair.counter, tag)]);
        keypair.counter += 1;
        (keypair.gateway_index, message.to_vec())
    }

    fn learn(&mut self, peer: usize, established: &Established, may_seal: bool) {
        self.fars[peer].keypairs.push(FarKeypair {
            gateway_index: established.remote_index,
            own_index: established.local_index.value(),
            key: AeadKey::new(&established.keys.send),
            counter: 0,
            may_seal,
        });
    }
}

impl Network {
    /// What the kernel side does with a packet to this index.
    fn passes_the_kernel(&self, index: ReceiverIndex) -> bool {
        let word = |slot| self.live.get(slot as usize).map(|word| word.load(Ordering::Acquire));
        may_live(&self.shared.indexes, index, word)
    }

    /// Whom the gateway would give a response to this index to.
    fn owner(&self, index: ReceiverIndex) -> Option<PeerId> {
        let gateway = self.gateway.get().unwrap().upgrade().unwrap();
        let table = lock(&gateway.indexes);
        table.owner(index).map(|cell| cell.hot.id)
    }

    /// A packet comes: by the kernel side to the worker.
    fn arrive(&self, world: &mut World, peer: usize, index: ReceiverIndex, mut message: Vec<u8>) {
        let valid = world.models[peer].has(index, world.now);
        let before = Totals::sum([&self.shared.workers[0].counters]);
        let passes = self.passes_the_kernel(index);
        if passes {
            let mut arrivals = [Arrival {
                bytes: &mut message,
                from: endpoint(peer),
                tos: 0,
                path: Path::Xsk,
                worker: WorkerId(0),
            }];
            world.inbound.process(&mut arrivals, &NoHost, world.now);
        }
        let after = Totals::sum([&self.shared.workers[0].counters]);
        let taken = after.received(Path::Xsk) - before.received(Path::Xsk) == 1;
        let why: Vec<_> = after.drops().filter(|(r, n)| *n != before.dropped(*r)).collect();
        assert_eq!(taken, valid, "peer {peer}, index {index}: kernel {passes}, worker {why:?}");
        if taken {
            world.models[peer].opened(index);
        } else {
            // Never a bad tag: that would be another peer's keypair.
            let known = [DropReason::UnknownIndex, DropReason::KeyExpired];
            assert!(why.iter().all(|(reason, _)| known.contains(reason)), "{why:?}");
        }
    }

    /// The gateway sends an initiation.
    fn initiated(&self, world: &mut World, peer: usize, message: &[u8]) {
        let index = index_at(message, 4);
        assert!(self.passes_the_kernel(index), "an initiation's index is live when it leaves");
        assert_eq!(self.owner(index), Some(PeerId(peer as u32)));
        if !world.loses {
            world.fars[peer].initiations.push(message.to_vec());
        }
    }

    /// The gateway sends a response.
    fn responded(&self, world: &mut World, peer: usize, message: &[u8]) {
        let index = index_at(message, 4);
        assert!(self.passes_the_kernel(index), "a response's index is live when it leaves");
        assert_eq!(self.owner(index), Some(PeerId(peer as u32)));
        world.models[peer].responded(Kept { index, created: world.now });
        if world.loses {
            return;
        }
        let far = &world.fars[peer];
        let Some(pending) = &far.pending else { return };
        let message = message.first_chunk().unwrap();
        let Ok(established) = pending.finish(&far.identity, &far.gateway, message) else { return };
        assert_eq!(established.remote_index, index);
        world.fars[peer].pending = None;
        world.learn(peer, &established, true);
        if world.answers_at_once {
            let (index, message) = world.seal(peer, world.fars[peer].keypairs.len() - 1);
            self.arrive(world, peer, index, message);
        }
    }

    /// The gateway sends a keepalive: as initiator, it has finished a handshake.
    fn sealed(&self, world: &mut World, peer: usize, message: &[u8]) {
        let to = index_at(message, 4).value();
        let now = world.now;
        let keypairs = &mut world.fars[peer].keypairs;
        let number = keypairs.iter().position(|keypair| keypair.own_index == to).unwrap();
        let keypair = &mut keypairs[number];
        let index = keypair.gateway_index;
        if keypair.may_seal {
            return;
        }
        keypair.may_seal = true;
        world.models[peer].finished(Kept { index, created: now });
        if world.answers_at_once {
            let (index, message) = world.seal(peer, number);
            self.arrive(world, peer, index, message);
        }
    }
}

impl Outside for Network {
    type Rng = StdRng;

    fn rng(&self) -> StdRng {
        lock(&self.world).rng()
    }

    fn wall(&self) -> Timestamp {
        lock(&self.world).wall()
    }

    fn send(&self, _worker: WorkerId, message: &[u8], to: &Endpoint, _tos: u8) -> bool {
        let world = &mut *lock(&self.world);
        let peer = peer_of(to);
        match classify(message).unwrap() {
            Message::Initiation => self.initiated(world, peer, message),
            Message::Response(_) => self.responded(world, peer, message),
            Message::Transport(_) => self.sealed(world, peer, message),
            Message::CookieReply(_) => unreachable!("nothing is under load"),
        }
        true
    }
}

/// The gateway and what is known of its slots from watching the map.
struct Lab {
    network: Network,
    gateway: Arc<Handshakes<Network>>,
    queue: Arc<WorkQueue>,
    /// Slot → its index.
    used: BTreeMap<usize, u64>,
    /// Slots that were used and are free, first freed first, with the time they were freed.
    freed: VecDeque<(usize, Now)>,
}

/// What may happen.
#[derive(Clone, Debug)]
enum Step {
    /// A peer sends an initiation; `.1`: the response is lost.
    PeerInitiates(usize, bool),
    /// The gateway wants a handshake with a peer; `.1`: its message is lost.
    GatewayInitiates(usize, bool),
    /// A peer answers an initiation that it has got; the response takes this long.
    PeerResponds(usize, prop::sample::Index, Duration),
    /// A peer sends a packet, under any keypair that it ever had; the packet takes this long.
    PeerSends(usize, prop::sample::Index, Duration),
    /// Timers run.
    Tick,
    Pass(Duration),
    /// The peer is removed and added again.
    Readd(usize),
    /// The device gets its key again, which ends every session.
    Rekey,
    /// Whether peers answer in the instant.
    AnswerAtOnce(bool),
}

fn delay() -> impl Strategy<Value = Duration> {
    prop_oneof![
        2 => Just(Duration::ZERO),
        2 => (1..2000_u64).prop_map(Duration::from_millis),
        1 => (0..=185_u64).prop_map(Duration::from_secs),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let peer = 0..PEER_COUNT;
    let any_index = any::<prop::sample::Index>;
    prop_oneof![
        5 => (peer.clone(), prop::bool::weighted(0.2))
            .prop_map(|(peer, lost)| Step::PeerInitiates(peer, lost)),
        4 => (peer.clone(), prop::bool::weighted(0.2))
            .prop_map(|(peer, lost)| Step::GatewayInitiates(peer, lost)),
        4 => (peer.clone(), any_index(), delay())
            .prop_map(|(peer, which, delay)| Step::PeerResponds(peer, which, delay)),
        10 => (peer.clone(), any_index(), delay())
            .prop_map(|(peer, which, delay)| Step::PeerSends(peer, which, delay)),
        2 => Just(Step::Tick),
        5 => (20..6000_u64).prop_map(|ms| Step::Pass(Duration::from_millis(ms))),
        2 => prop::sample::select(vec![60, 120, 179, 180, 181, 360, 540, 541])
            .prop_map(|secs| Step::Pass(Duration::from_secs(secs))),
        1 => peer.prop_map(Step::Readd),
        1 => Just(Step::Rekey),
        2 => any::<bool>().prop_map(Step::AnswerAtOnce),
    ]
}

fn private_key(number: usize) -> PrivateKey {
    PrivateKey::generate(&mut StdRng::seed_from_u64(number as u64))
}

impl Lab {
    /// A gateway that is one of some devices of its process, the one with this number.
    fn new(seed: u64, (number, device_count): (u32, u32)) -> Self {
        let layout = IndexLayout::new(0, SLOT_BITS).unwrap();
        let indexes = IndexPermutation::new([seed as u32, 2, 3, 4], layout);
        let live = Arc::new(SharedWords::private(layout.slot_count() as usize).unwrap());
        let sockets = SocketGroup { port: 51820, of_worker: Vec::new() };
        let slots = layout.share(number, device_count);
        for slot in (0..layout.slot_count()).filter(|slot| !slots.contains(slot)) {
            live[slot as usize].store(FOREIGN, Ordering::Relaxed);
        }
        let crew = Crew::new(1, None).unwrap();
        let place = (DeviceId(0), slots);
        let (shared, queue) =
            Shared::in_crew(crew, place, Vec::new(), sockets, indexes, 0).unwrap();
        let to = Mesh::between(1, 1).remove(0).unwrap().to;
        let inbound = Inbound::new(WorkerId(0), Arc::clone(&shared), &AEAD, to);
        let own = private_key(PEER_COUNT);
        let public_key = own.public_key();
        let fars = (0..PEER_COUNT).map(|peer| {
            let identity = Identity::new(private_key(peer));
            let gateway = RemoteStatic::new(&identity, public_key, PresharedKey::default());
            let (keypairs, initiations) = (Vec::new(), Vec::new());
            Far { identity, gateway, pending: None, keypairs, initiations }
        });
        let world = World {
            now: START,
            fars: fars.collect(),
            models: vec![Model::default(); PEER_COUNT],
            inbound,
            next_far_index: 0,
            answers_at_once: true,
            loses: false,
            seed,
            flying: Vec::new(),
            responses: Vec::new(),
        };
        let network = Network {
            shared: Arc::clone(&shared),
            live: Arc::clone(&live),
            world: Arc::new(Mutex::new(world)),
            gateway: Arc::default(),
        };
        let gateway = Arc::new(Handshakes::new(shared, network.clone(), &AEAD, Some(live)));
        assert!(network.gateway.set(Arc::downgrade(&gateway)).is_ok());
        gateway.set_private_key(Some(own), START);
        let lab = Self { network, gateway, queue, used: BTreeMap::new(), freed: VecDeque::new() };
        for peer in 0..PEER_COUNT {
            lab.add(peer);
        }
        lab
    }

    fn add(&self, peer: usize) {
        let public_key = private_key(peer).public_key();
        let hot = HotPeer::new(PeerId(peer as u32), DeviceId(0), public_key);
        hot.endpoint.store(Some(Arc::new(endpoint(peer))));
        self.gateway.add_peer(Arc::new(hot));
    }

    fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.network.world)
    }

    fn receive(&self, peer: usize, message: &[u8]) -> Result<(), DropReason> {
        let now = self.world().now;
        self.network.shared.beat(WorkerId(0), now);
        let from = endpoint(peer);
        let datagram = HandshakeDatagram::new(DeviceId(0), message, from, WorkerId(0)).unwrap();
        self.gateway.receive(&datagram, now)
    }

    fn step(&mut self, step: &Step) {
        let mut now = self.world().now;
        match step {
            Step::PeerInitiates(peer, lost) => {
                now = now + INITIATION_INTERVAL_MIN;
                self.pass(now);
                let mut world = self.world();
                world.loses = *lost;
                world.next_far_index += 1;
                let index = ReceiverIndex::from_wire(world.next_far_index.to_le_bytes());
                let (mut rng, wall) = (world.rng(), world.wall());
                let far = &mut world.fars[*peer];
                let (pending, message) =
                    initiate(&far.identity, &far.gateway, index, wall, None, &mut rng).unwrap();
                far.pending = Some(pending);
                drop(world);
                let result = self.receive(*peer, &message);
                if result.is_err() {
                    assert_eq!(result, Err(DropReason::NoIndex));
                    let resting = self.freed.iter().filter(|(_, at)| now.since(*at) < REST);
                    let busy = self.used.len() + resting.count();
                    let slots = self.network.shared.slots.len();
                    assert_eq!(busy, slots, "refused only when full");
                }
                self.world().loses = false;
            }
            Step::GatewayInitiates(peer, lost) => {
                self.world().loses = *lost;
                let cell = self.gateway.cell(PeerId(*peer as u32)).unwrap();
                self.gateway.initiate(&cell, now);
                self.world().loses = false;
            }
            Step::PeerResponds(peer, which, delay) => self.respond(*peer, *which, *delay),
            Step::PeerSends(peer, which, delay) => {
                let mut world = self.world();
                let world = &mut *world;
                let mut able: Vec<usize> = (0..world.fars[*peer].keypairs.len()).collect();
                able.retain(|number| world.fars[*peer].keypairs[*number].may_seal);
                if !able.is_empty() {
                    // Mostly one of the latest; at times one that is long dead.
                    let latest = if which.index(4) == 3 { able.len() } else { able.len().min(4) };
                    let number = able[able.len() - 1 - which.index(latest)];
                    let (index, message) = world.seal(*peer, number);
                    world.flying.push((now + *delay, *peer, index, message));
                }
            }
            Step::Tick => {
                while self.gateway.turn(&self.queue, now) {}
                self.gateway.tick(now);
            }
            Step::Pass(time) => self.pass(now + *time),
            Step::Readd(peer) => {
                self.world().models[*peer] = Model::default();
                self.gateway.remove_peer(PeerId(*peer as u32), now);
                self.add(*peer);
            }
            Step::Rekey => {
                self.world().models.fill(Model::default());
                self.gateway.set_private_key(Some(private_key(PEER_COUNT)), now);
            }
            Step::AnswerAtOnce(at_once) => self.world().answers_at_once = *at_once,
        }
        self.watch();
        // What comes without delay is due.
        let now = self.world().now;
        self.pass(now);
    }

    fn respond(&self, peer: usize, which: prop::sample::Index, delay: Duration) {
        let mut world = self.world();
        let count = world.fars[peer].initiations.len();
        if count == 0 {
            return;
        }
        let message = world.fars[peer].initiations[which.index(count)].clone();
        world.next_far_index += 1;
        let index = ReceiverIndex::from_wire(world.next_far_index.to_le_bytes());
        let mut rng = world.rng();
        let far = &world.fars[peer];
        let opened = open_initiation(&far.identity, message.first_chunk().unwrap()).unwrap();
        let authentic = opened.authenticate(&far.gateway).unwrap();
        let (established, response) =
            authentic.respond(&far.gateway, index, None, &mut rng).unwrap();
        world.learn(peer, &established, false);
        let at = world.now + delay;
        world.responses.push((at, peer, response.to_vec()));
    }

    /// Lets time pass; what is on its way comes at its time.
    fn pass(&mut self, until: Now) {
        loop {
            let mut world = self.world();
            let packet = world.flying.iter().map(|flying| flying.0).min();
            let response = world.responses.iter().map(|response| response.0).min();
            let Some(next) = packet.into_iter().chain(response).min().filter(|at| *at <= until)
            else {
                world.now = until;
                return;
            };
            world.now = next.max(world.now);
            self.network.shared.beat(WorkerId(0), world.now);
            if let Some(which) = world.flying.iter().position(|flying| flying.0 == next) {
                let (_, peer, index, message) = world.flying.remove(which);
                self.network.arrive(&mut world, peer, index, message);
                drop(world);
            } else {
                let which = world.responses.iter().position(|response| response.0 == next);
                let (_, peer, message) = world.responses.remove(which.unwrap());
                drop(world);
                let awaited = self.gateway.cell(PeerId(peer as u32)).unwrap();
                let awaited = awaited.session().pending_index() == Some(index_at(&message, 8));
                let result = self.receive(peer, &message);
                assert_eq!(awaited, result != Err(DropReason::UnknownIndex), "{result:?}");
            }
            self.watch();
        }
    }

    /// Compares the map with what sessions hold, and slots with the order in which they are used.
    fn watch(&mut self) {
        let now = self.world().now;
        let live = &self.network.live;
        for slot in 0..live.len() {
            let entry = live[slot].load(Ordering::Acquire);
            if !self.network.shared.slots.contains(&(slot as u32)) {
                assert_eq!(entry, FOREIGN, "slot {slot} is another device's");
                continue;
            }
            let before = self.used.get(&slot).copied().unwrap_or(0);
            if entry == before {
                continue;
            }
            if before != 0 {
                self.used.remove(&slot);
                self.freed.push_back((slot, now));
            }
            if entry != 0 {
                if let Some(at) = self.freed.iter().position(|(freed, _)| *freed == slot) {
                    let (_, freed_at) = self.freed.remove(at).unwrap();
                    assert!(now.since(freed_at) >= REST, "slot {slot} has not rested");
                }
                self.used.insert(slot, entry);
            }
        }
        let mut held = BTreeMap::new();
        for peer in 0..PEER_COUNT {
            let cell = self.gateway.cell(PeerId(peer as u32)).unwrap();
            let pending = cell.session().pending_index();
            let keypairs = cell.hot.keypairs.load();
            let indexes = keypairs.iter().map(|keypair| keypair.local_index());
            for index in indexes.chain(pending) {
                let slot = self.network.shared.indexes.slot_of(index).unwrap() as usize;
                assert!(held.insert(slot, index_entry(index)).is_none(), "one slot, one user");
            }
        }
        for (slot, entry) in &held {
            assert_eq!(self.used.get(slot), Some(entry), "what is held is live");
        }
    }

    /// When sessions have had their turn, nothing is live but what they hold.
    fn settle(&mut self) {
        let now = self.world().now;
        while self.gateway.turn(&self.queue, now) {}
        self.gateway.tick(now);
        self.watch();
        let held: usize = (0..PEER_COUNT)
            .map(|peer| {
                let cell = self.gateway.cell(PeerId(peer as u32)).unwrap();
                let pending = usize::from(cell.session().pending_index().is_some());
                cell.hot.keypairs.load().iter().count() + pending
            })
            .sum();
        assert_eq!(self.used.len(), held, "nothing else is live");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn no_valid_packet_is_dropped_and_no_dead_keypair_found(
        seed in any::<u32>(), share in prop::sample::select(vec![(0, 1), (0, 2), (1, 2), (1, 3)]),
        steps in prop::collection::vec(step(), 0..150),
    ) {
        let mut lab = Lab::new(u64::from(seed), share);
        for step in &steps {
            lab.step(step);
            if matches!(step, Step::Tick) {
                lab.settle();
            }
        }
        lab.settle();
    }
}
