//! A gateway's two halves, without a kernel: packets from its TUN device, datagrams from a peer of its
//! and from nobody. What comes out is what a plain model says, and every packet is counted once.

use std::cell::{OnceCell, RefCell};
use std::collections::{HashSet, VecDeque};
use std::io;
use std::iter;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use wg_common::endpoint::Endpoint;
use wg_common::headers::{inner_destination, inner_packet};
use wg_common::id::{DeviceId, PeerId, WorkerId};
use wg_common::mss::{self, TcpChecksum};
use wg_common::outcome::DropReason;
use wg_common::protocol::{
    DEFAULT_MTU, REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME, REPLAY_WINDOW_LEN, TAG_LEN,
    TRANSPORT_HEADER_LEN,
};
use wg_common::time::Now;
use wg_userspace::aead::{BatchAead, Job, RingAead};
use wg_userspace::counters::{Path, Totals};
use wg_userspace::datapath::handoff::{Mesh, Parcel, ParcelReceiver, Work};
use wg_userspace::datapath::inbound::{Arrival, Inbound, PacketSink};
use wg_userspace::datapath::outbound::{DatagramSink, Outbound, Outgoing, PacketSource, Unsent};
use wg_userspace::datapath::{Shared, SocketGroup, WorkQueue};
use wg_userspace::routing::AllowedIps;
use wg_userspace::segments::{Run, VnetHeader};
use wg_userspace::session::{HotPeer, Keypair};

use super::Input;
use super::host::{Host, INDEXES, START, address};

static AEAD: RingAead = RingAead;
/// Prefixes and their owners: 1 is the peer with a session, 2 has none, 3 is not there.
const PREFIXES: [(&str, u32); 6] = [
    ("10.0.0.0/8", 1),
    ("10.0.0.0/24", 2),
    ("10.0.0.7/32", 1),
    ("fd00::/8", 1),
    ("fd00::3/128", 2),
    ("192.168.0.0/16", 3),
];

#[derive(Default)]
struct Tun {
    to_read: RefCell<VecDeque<Vec<u8>>>,
    written: RefCell<Vec<Vec<u8>>>,
    /// To the senders of packets that were read.
    answers: RefCell<Vec<Vec<u8>>>,
}

impl PacketSource for Tun {
    fn read(&self, buffer: &mut [u8]) -> io::Result<Option<(VnetHeader, usize)>> {
        let Some(packet) = self.to_read.borrow_mut().pop_front() else { return Ok(None) };
        buffer[..packet.len()].copy_from_slice(&packet);
        Ok(Some((VnetHeader::PLAIN, packet.len())))
    }

    fn answer(&self, packet: &[u8]) {
        self.answers.borrow_mut().push(packet.to_vec());
    }
}

impl PacketSink for Tun {
    fn write(&self, run: &Run<'_>) -> io::Result<()> {
        self.written.borrow_mut().extend(run.packets().map(<[u8]>::to_vec));
        Ok(())
    }
}

#[derive(Default)]
struct Wire(RefCell<Vec<Vec<u8>>>);

impl DatagramSink for Wire {
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
        self.0.borrow_mut().extend(datagrams.iter().map(|datagram| datagram.bytes.to_vec()));
        Unsent::default()
    }
}

/// A gateway of one worker or two, and its peer.
struct World {
    shared: Arc<Shared>,
    work: Arc<WorkQueue>,
    inbound: Vec<Inbound>,
    /// What worker 1 sends to worker 0, where the keypair is at home.
    home: Option<ParcelReceiver>,
    outbound: Outbound,
    tun: Tun,
    wire: Wire,
    /// Ours, and the peer's of the same handshake.
    keypairs: [Arc<Keypair>; 2],
    now: Now,
    next_counter: u64,
    /// Counters that the gateway has opened.
    seen: HashSet<u64>,
    /// Datagrams that came, with packets of the TUN device that are none; and how many were good.
    arrived: u64,
    accepted: u64,
    handshakes: u64,
    dropped_before: u64,
    endpoint: Endpoint,
}

impl World {
    fn new(worker_count: usize) -> Self {
        let [mut gateway, mut peer] = Host::pair();
        gateway.initiate(START);
        let (initiation, _) = gateway.outbox.remove(0);
        peer.receive(&initiation, gateway.address, START).expect("a right initiation");
        let (response, _) = peer.outbox.remove(0);
        gateway.receive(&response, peer.address, START).expect("a right response");
        let keypair_of = |host: &Host| {
            Arc::clone(host.indexes.keypairs.values().next().expect("they have shaken hands"))
        };
        let keypairs = [keypair_of(&gateway), keypair_of(&peer)];
        let hot = gateway.peer();

        let (shared, work) = shared(worker_count);
        shared.peers.set(hot.id.0 as usize, Arc::clone(&hot));
        let silent = HotPeer::new(PeerId(2), DeviceId(0), hot.public_key);
        silent.endpoint.store(Some(Arc::new(address(3))));
        shared.peers.set(2, Arc::new(silent));
        publish(&shared, &keypairs[0]);
        let mut meshes = Mesh::between(worker_count, 16);
        let home = meshes[0].from.pop().expect("one for each worker");
        let inbound = (0..worker_count as u16)
            .map(|id| {
                let mesh = meshes.pop_front().expect("one for each worker");
                Inbound::new(WorkerId(id), Arc::clone(&shared), &AEAD, mesh.to)
            })
            .collect();
        let outbound = Outbound::new(WorkerId(0), Arc::clone(&shared), &AEAD);
        let dropped_before = dropped(&shared);
        let (endpoint, next_counter) = (peer.address, keypairs[0].sent());
        Self {
            shared,
            work,
            inbound,
            home,
            outbound,
            tun: Tun::default(),
            wire: Wire::default(),
            keypairs,
            now: START,
            next_counter,
            seen: HashSet::new(),
            arrived: 0,
            accepted: 0,
            handshakes: 0,
            dropped_before,
            endpoint,
        }
    }
}

/// What a gateway's workers share, with the prefixes. Made once for each number of workers, since its
/// buffers are many; only its counters remember what was before.
fn shared(worker_count: usize) -> (Arc<Shared>, Arc<WorkQueue>) {
    thread_local! {
        static MADE: [OnceCell<(Arc<Shared>, Arc<WorkQueue>)>; 2] = const { [OnceCell::new(), OnceCell::new()] };
    }
    let make = || {
        let sockets = SocketGroup { port: 51820, of_worker: Vec::new() };
        let (shared, work) =
            Shared::new(DeviceId(0), worker_count, Vec::new(), sockets, None, INDEXES).unwrap();
        let mut allowed_ips = AllowedIps::default();
        for (net, owner) in PREFIXES {
            allowed_ips.insert(net.parse().unwrap(), PeerId(owner));
        }
        shared.routing.store(allowed_ips.snapshot());
        (shared, work)
    };
    MADE.with(|made| made[worker_count - 1].get_or_init(make).clone())
}

/// Datagrams that were dropped since the workers were made.
fn dropped(shared: &Shared) -> u64 {
    let totals = Totals::sum(shared.workers.iter().map(|worker| &worker.counters));
    let reasons = DropReason::ALL.iter().filter(|reason| !OUTBOUND.contains(reason));
    reasons.map(|reason| totals.dropped(*reason)).sum()
}

/// Lets the workers find a keypair.
fn publish(shared: &Shared, keypair: &Arc<Keypair>) {
    shared.publish(keypair);
}

/// Who owns an address, by looking at every prefix.
fn owner(addr: IpAddr) -> Option<u32> {
    let nets = PREFIXES.map(|(net, owner)| (net.parse::<IpNet>().unwrap(), owner));
    let around = nets.iter().filter(|(net, _)| net.contains(&addr));
    around.max_by_key(|(net, _)| net.prefix_len()).map(|(_, owner)| *owner)
}

impl World {
    fn is_alive(&self) -> bool {
        self.now.since(self.keypairs[0].created()) < REJECT_AFTER_TIME
    }

    /// A packet from the TUN device: one datagram that the peer can open, or none.
    fn send(&mut self, packet: &[u8]) {
        self.tun.to_read.borrow_mut().push_back(packet.to_vec());
        while self.outbound.process(&self.tun, &self.wire, self.now).expect("it always reads") {}
        let sent = self.wire.0.take();
        let answers = self.tun.answers.take();
        assert!(answers.len() <= 1 && (answers.is_empty() || sent.is_empty()));
        for answer in answers {
            let inner = inner_packet(&answer).expect("an ICMP message is a packet");
            assert_eq!(inner.len, answer.len());
            assert_eq!(Ok(inner.dst), inner_source(packet), "answered to the sender");
        }
        let destination = inner_destination(packet);
        // Counted as a datagram's inner packet would be.
        self.arrived += u64::from(destination.is_err());
        let to = destination.ok().and_then(owner);
        if to != Some(1) || !self.is_alive() {
            assert!(sent.is_empty(), "a packet for nobody, or without a key, was sent");
            return;
        }
        let [datagram] = &sent[..] else { panic!("one packet, {} datagrams", sent.len()) };
        let counter = u64::from_le_bytes(datagram[8..16].try_into().unwrap());
        assert_eq!(counter, self.next_counter, "counters follow each other");
        self.next_counter += 1;
        assert_eq!(datagram[4..8], self.keypairs[1].local_index().to_wire());
        let mut buffer = datagram[TRANSPORT_HEADER_LEN..].to_vec();
        let mut jobs = [Job::new(self.keypairs[1].open_key(), counter, &mut buffer)];
        AEAD.open(&mut jobs);
        assert!(jobs[0].ok);
        let (inner, padding) = buffer[..buffer.len() - TAG_LEN].split_at(packet.len());
        assert_eq!(inner, through_the_tunnel(packet), "altered on its way");
        assert!(padding.iter().all(|byte| *byte == 0) && padding.len() < 16);
        let len = inner.len() + padding.len();
        assert!(len.is_multiple_of(16) || len == DEFAULT_MTU || packet.len() > DEFAULT_MTU);
    }

    /// What the peer seals under a counter.
    fn seal(&self, counter: u64, packet: &[u8]) -> Vec<u8> {
        let mut message = vec![4, 0, 0, 0];
        message.extend_from_slice(&self.keypairs[0].local_index().to_wire());
        message.extend_from_slice(&counter.to_le_bytes());
        message.extend_from_slice(packet);
        message.resize(message.len() + TAG_LEN, 0);
        let buffer = &mut message[TRANSPORT_HEADER_LEN..];
        AEAD.seal(&mut [Job::new(self.keypairs[1].seal_key(), counter, buffer)]);
        message
    }

    /// A datagram comes to a worker; gives what reached the TUN device.
    fn receive(&mut self, worker: usize, datagram: &[u8], from: Endpoint) -> Vec<Vec<u8>> {
        self.arrived += 1;
        let worker = worker % self.inbound.len();
        let (mut bytes, path) = (datagram.to_vec(), Path::Socket);
        let id = WorkerId(worker as u16);
        let mut arrivals = [Arrival { bytes: &mut bytes, from, tos: 0, path, worker: id }];
        self.inbound[worker].process(&mut arrivals, &self.tun, self.now);
        while let Some(mut parcel) = self.home.as_mut().and_then(ParcelReceiver::pop) {
            let Parcel { from, tos, path, origin, .. } = parcel;
            let bytes = parcel.datagram();
            let mut arrivals = [Arrival { bytes, from, tos, path, worker: origin }];
            self.inbound[0].process(&mut arrivals, &self.tun, self.now);
            self.home.as_mut().expect("it came from there").give_back(parcel.buffer);
        }
        self.tun.written.take()
    }

    /// A message of the peer's, altered or not: it reaches the TUN device if it is right, new, in
    /// time, and from an address of the peer's.
    fn receive_sealed(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let counter = match choice % 8 {
            0..4 => self.seen.iter().max().map_or(0, |greatest| greatest + 1),
            4 => u64::from(input.byte()),
            5 => u64::from(input.number()),
            6 => self.seen.iter().max().map_or(0, |last| last.wrapping_sub(REPLAY_WINDOW_LEN)),
            _ => REJECT_AFTER_MESSAGES - 2 + u64::from(input.byte() % 4),
        };
        let alteration = (choice & 8 != 0).then(|| (usize::from(input.number()), input.byte()));
        let (worker, from) = (usize::from(choice >> 4), address(choice >> 5));
        let len = usize::from(input.byte());
        let packet = input.bytes(len);
        let mut datagram = self.seal(counter, packet);
        let mut is_right = counter < REJECT_AFTER_MESSAGES && self.is_alive();
        if let Some((at, bits)) = alteration {
            let at = at % datagram.len();
            datagram[at] ^= bits;
            is_right &= bits == 0;
        }
        let greatest = self.seen.iter().max().copied().unwrap_or(0);
        is_right &= greatest < REPLAY_WINDOW_LEN || counter > greatest - REPLAY_WINDOW_LEN;
        is_right &= !self.seen.contains(&counter);

        let delivered = self.receive(worker, &datagram, from);
        let inner = inner_packet(packet).ok().filter(|inner| owner(inner.src) == Some(1));
        let expected =
            inner.filter(|_| is_right).map(|inner| through_the_tunnel(&packet[..inner.len]));
        assert_eq!(delivered.first(), expected.as_ref());
        assert!(delivered.len() <= 1);
        if is_right {
            self.seen.insert(counter);
            self.endpoint = from;
            // A keepalive is neither a packet nor dropped.
            self.accepted += u64::from(packet.is_empty() || expected.is_some());
        }
    }

    /// Whatever anybody sends reaches nobody.
    fn receive_raw(&mut self, worker: usize, datagram: &[u8]) {
        assert!(self.receive(worker, datagram, address(66)).is_empty(), "a forgery was delivered");
    }

    /// Every datagram is counted once, and only authentic ones move the endpoint.
    fn check(&mut self) {
        self.handshakes += iter::from_fn(|| self.work.take()).filter(is_datagram).count() as u64;
        let dropped = dropped(&self.shared) - self.dropped_before;
        assert_eq!(self.arrived, self.accepted + self.handshakes + dropped, "counted once");
        let peer = self.shared.peers.get(1).expect("it stays");
        assert_eq!(peer.endpoint.load().as_deref(), Some(&self.endpoint));
    }
}

/// Where a packet comes from; its header is read, its lengths are not looked at.
fn inner_source(packet: &[u8]) -> Result<IpAddr, DropReason> {
    let mut swapped = packet.to_vec();
    match packet.first().map_or(0, |first| first >> 4) {
        4 if packet.len() >= 20 => swapped[12..20].rotate_left(4),
        6 if packet.len() >= 40 => swapped[8..40].rotate_left(16),
        _ => {}
    }
    inner_destination(&swapped)
}

/// A packet as it leaves a tunnel: only the size that a SYN offers may be another.
fn through_the_tunnel(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    mss::clamp(&mut packet, DEFAULT_MTU, TcpChecksum::Full);
    packet
}

/// Why packets of the TUN device are dropped and datagrams are not.
const OUTBOUND: [DropReason; 3] =
    [DropReason::NoPeer, DropReason::NoEndpoint, DropReason::StagedFull];

fn is_datagram(work: &Work) -> bool {
    matches!(work, Work::Datagram(_))
}

/// The number of workers, then steps: an operation with what it needs.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut world = World::new(1 + usize::from(input.byte() & 1));
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        for worker in 0..world.inbound.len() as u16 {
            world.shared.beat(WorkerId(worker), world.now);
        }
        let operation = input.byte();
        match operation % 8 {
            0 | 1 => {
                let len = usize::from(input.byte());
                // Around the MTU, padding is another.
                let more = if operation & 8 != 0 { DEFAULT_MTU - 200 } else { 0 };
                let mut packet = input.bytes(len).to_vec();
                packet.resize(packet.len() + more, 0);
                world.send(&packet);
            }
            2..=4 => world.receive_sealed(&mut input),
            5 | 6 => {
                let len = usize::from(input.byte());
                let mut datagram = input.bytes(len).to_vec();
                if operation & 8 != 0 && datagram.len() >= 8 {
                    datagram[..4].copy_from_slice(&[4, 0, 0, 0]);
                    datagram[4..8].copy_from_slice(&world.keypairs[0].local_index().to_wire());
                }
                world.receive_raw(usize::from(operation >> 4), &datagram);
            }
            _ => world.now = world.now + Duration::from_secs(u64::from(input.byte())),
        }
        world.check();
    }
}

/// Packets both ways, of both versions, from right and wrong addresses; replays; the key's end.
pub fn seeds() -> Vec<Vec<u8>> {
    let v4 = |src: [u8; 4], dst: [u8; 4], len: u8| {
        let mut packet = vec![0x45, 0, 0, len, 0, 0, 0, 0, 64, 17, 0, 0];
        packet.extend([src, dst].concat());
        packet.resize(len.into(), 7);
        packet
    };
    let v6 = |src: u8, dst: u8| {
        let mut packet = vec![0x60, 0, 0, 0, 0, 2, 17, 64];
        for last in [src, dst] {
            packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        }
        packet.extend([1, 2]);
        packet
    };
    let framed = |head: &[u8], packet: &[u8]| [head, &[packet.len() as u8], packet].concat();
    let (us, peer, other) = ([10, 9, 0, 1], [10, 0, 0, 7], [10, 0, 0, 8]);
    let inward = |packet: &[u8], choice: u8| framed(&[2, choice], packet);
    let both = [
        framed(&[0], &v4(us, peer, 40)),
        framed(&[0], &v4(us, other, 40)),
        framed(&[0], &v6(1, 5)),
        framed(&[8], &v4(us, peer, 200)),
        inward(&v4(peer, us, 30), 0),
        inward(&v4(other, us, 30), 0x30),
        inward(&v6(5, 1), 0x10),
        inward(&[], 0x40),
    ]
    .concat();
    let replays = [
        [2, 4, 3, 0].to_vec(),
        [2, 4, 3, 0].to_vec(),
        [2, 4, 2, 0].to_vec(),
        [2, 5, 0, 64, 0].to_vec(),
        [2, 6, 0].to_vec(),
        [2, 7, 1, 0].to_vec(),
        [2, 7, 2, 0].to_vec(),
        framed(&[2, 8, 20, 0, 1], &v4(peer, us, 30)),
    ]
    .concat();
    let end = [both.clone(), vec![7, 170], both.clone(), vec![7, 10], both.clone()].concat();
    let mut initiation = vec![1, 0, 0, 0];
    initiation.resize(148, 3);
    let raw =
        [framed(&[5], &initiation), framed(&[5 | 8], &[1; 40]), framed(&[21], &[4; 9])].concat();
    let steps = [both, replays, end, raw];
    [0, 1]
        .iter()
        .flat_map(|more| steps.iter().map(|steps| [&[*more], &steps[..]].concat()))
        .collect()
}
