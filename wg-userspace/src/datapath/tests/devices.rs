//! One thread that serves two devices, and what must not get from one of them to the other.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ipnet::IpNet;
use wg_common::endpoint::Endpoint;
use wg_common::headers::OuterHeaders;
use wg_common::id::{DeviceId, PeerId, ShardId, WorkerId};
use wg_common::outcome::DropReason;
use wg_common::time::Reading;

use super::{AEAD, INDEXES, PEER_1, START, US, index, keypair, packet, peer, reading};
use crate::aead::{AeadKey, BatchAead as _, Job};
use crate::counters::Totals;
use crate::datapath::encap::transport_header;
use crate::datapath::handoff::{Mesh, Work};
use crate::datapath::thread::{Ports, WorkerThread, XskPort};
use crate::datapath::{BATCH_LEN, BATCHES_MAX, Crew, Shared, SocketGroup, WorkQueue, Worker};
use crate::noise::Role;
use crate::routing::AllowedIps;
use crate::sys::{SharedWords, socket};
use crate::tun::TunQueue;
use crate::udp::{self, ReceiveBatch, UdpSocket};
use crate::xsk::XskOptions;
use crate::xsk::twin::{self, KernelTwin};

const VIRTIO_HEADER_LEN: usize = 10;

/// A device with its peer 1, which owns 10.0.0.2 and has a keypair.
struct Device {
    shared: Arc<Shared>,
    work: Arc<WorkQueue>,
    /// The other ends of its TUN queues.
    tun: Vec<UnixDatagram>,
    key: u8,
    slot: usize,
}

/// Two threads, with the same two devices on both. Of the second, most tests have no use.
struct Lab {
    crew: Arc<Crew>,
    heartbeats: Arc<SharedWords>,
    devices: [Device; 2],
    thread: WorkerThread,
    second: WorkerThread,
    nic: KernelTwin,
    /// Where the peers of both are.
    far: std::net::UdpSocket,
}

impl Lab {
    fn new() -> Self {
        let heartbeats = Arc::new(SharedWords::private(2).unwrap());
        let crew = Crew::new(2, Some(Arc::clone(&heartbeats))).unwrap();
        let far = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let devices = [0, 1].map(|number| Device::new(&crew, number, far.local_addr().unwrap()));
        let mut meshes = [0, 1].map(|_| Mesh::between(2, 16));
        let [workers, others] = [0, 1].map(|number| {
            let workers = devices.iter().zip(&mut meshes).map(|(device, meshes)| {
                let mesh = meshes.pop_front().unwrap();
                Worker::new(WorkerId(number), Arc::clone(&device.shared), mesh, &AEAD)
            });
            workers.collect()
        });
        let (pool, xsk, nic) = twin::pair(7, 0, XskOptions::default()).unwrap();
        let mut ports = Ports::default();
        ports.open(XskPort::new(xsk, 7, false), Some(pool));
        let thread = WorkerThread::new(WorkerId(0), Arc::clone(&crew), ports, workers).unwrap();
        let (id, ports) = (WorkerId(1), Ports::default());
        let second = WorkerThread::new(id, Arc::clone(&crew), ports, others).unwrap();
        Self { crew, heartbeats, devices, thread, second, nic, far }
    }

    fn port(&self, device: usize) -> u16 {
        self.devices[device].shared.sockets.load().port
    }

    /// A frame comes to the NIC.
    fn deliver(&mut self, port: u16, message: &[u8]) {
        self.deliver_with(port, message, 0);
    }

    /// With this outer TOS.
    fn deliver_with(&mut self, port: u16, message: &[u8], tos: u8) {
        let headers = OuterHeaders {
            dst_mac: [2; 6],
            src_mac: [4; 6],
            tags: [None, None],
            // Where answers reach `far`.
            src: self.far.local_addr().unwrap(),
            dst: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port),
            tos,
            ttl: 64,
            id: 0,
        };
        let mut frame = [vec![0; headers.len()], message.to_vec()].concat();
        headers.write(&mut frame).unwrap();
        assert!(self.nic.deliver(&frame));
    }

    /// Where a device is reached without the NIC.
    fn address(&self, device: usize) -> Endpoint {
        Endpoint::configured(SocketAddr::from(([127, 0, 0, 1], self.port(device))))
    }

    /// A socket whose datagrams to the first device reach the socket of the first thread.
    fn sender(&self) -> UdpSocket {
        let to = self.address(0);
        let sockets = self.devices[0].shared.sockets.load_full();
        let mut received = ReceiveBatch::new().unwrap();
        let reaches_it = |far: &UdpSocket| {
            far.send(&[udp::Outgoing { bytes: b"?", endpoint: &to, tos: 0 }]);
            sockets.of_worker[0].v4.receive(&mut received).unwrap() == 1
        };
        let mut senders = (0..100).map(|_| udp::bind_group(0, 1, 0).unwrap().1.remove(0).v4);
        senders.find(reaches_it).unwrap()
    }

    /// Has the thread wait for nothing, and turn once.
    fn turn(&mut self) -> bool {
        self.turn_at(reading(START, Duration::ZERO, Duration::ZERO))
    }

    fn turn_at(&mut self, reading: Reading) -> bool {
        self.thread.wait(Duration::ZERO);
        self.thread.turn(|| reading)
    }

    /// The same with the second thread.
    fn turn_second(&mut self) -> bool {
        self.second.wait(Duration::ZERO);
        self.second.turn(|| reading(START, Duration::ZERO, Duration::ZERO))
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        Totals::sum(self.crew.all_counters()).dropped(reason)
    }
}

impl Device {
    fn new(crew: &Arc<Crew>, number: u16, far: SocketAddr) -> Self {
        let (tun_queues, tun) = (0..2).map(|_| TunQueue::twin().unwrap()).unzip();
        let (port, of_worker) = udp::bind_group(0, 2, 0).unwrap();
        let slots = INDEXES.layout().share(u32::from(number), 2);
        let (key, slot) = (40 + number as u8, slots.start as usize + 1);
        let sockets = SocketGroup { port, of_worker };
        let place = (DeviceId(number), slots);
        let (shared, work) =
            Shared::in_crew(Arc::clone(crew), place, tun_queues, sockets, INDEXES, 2048).unwrap();
        let mut allowed_ips = AllowedIps::default();
        allowed_ips.insert("10.0.0.2/32".parse::<IpNet>().unwrap(), PeerId(1));
        shared.routing.store(allowed_ips.snapshot());
        let peer = peer(1);
        peer.endpoint.store(Some(Arc::new(Endpoint::configured(far))));
        let keypair = keypair(&peer, slot, (key, key), Role::Initiator, ShardId::new(0));
        shared.publish(&keypair);
        peer.keypairs.update(|keypairs| keypairs.installed_by_initiator(Arc::clone(&keypair)));
        shared.peers.set(1, peer);
        Self { shared, work, tun, key, slot }
    }

    /// A message that the peer seals.
    fn message(&self, counter: u64, packet: &[u8]) -> Vec<u8> {
        let header = transport_header(index(self.slot), counter);
        let mut message = [&header[..], packet, &[0; 16]].concat();
        let key = AeadKey::new(&[self.key; 32]);
        AEAD.seal(&mut [Job::new(&key, counter, &mut message[16..])]);
        message
    }

    /// What the device has written to a queue of its TUN device.
    fn written(&self, queue: usize) -> Vec<Vec<u8>> {
        let mut buffer = [0; 2048];
        std::iter::from_fn(|| {
            let len = self.tun[queue].recv(&mut buffer).ok()?;
            Some(buffer[VIRTIO_HEADER_LEN..len].to_vec())
        })
        .collect()
    }

    /// The kernel routes a packet into a queue of its TUN device.
    fn route(&self, queue: usize, packet: &[u8]) {
        let bytes = [&[0; VIRTIO_HEADER_LEN], packet].concat();
        assert_eq!(self.tun[queue].send(&bytes).unwrap(), bytes.len());
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        Totals::sum(self.shared.workers.iter().map(|worker| &worker.counters)).dropped(reason)
    }

    fn initiations(&self) -> Vec<u8> {
        std::iter::from_fn(|| self.work.take())
            .map(|work| match work {
                Work::Datagram(datagram) => {
                    assert_eq!(datagram.device, self.shared.device);
                    datagram.message()[147]
                }
                other => panic!("{other:?}"),
            })
            .collect()
    }
}

fn initiation(number: u8) -> Vec<u8> {
    let mut message = vec![0; 148];
    (message[0], message[147]) = (1, number);
    message
}

#[test]
fn frames_go_to_the_device_on_whose_port_they_came_and_in_order() {
    let mut lab = Lab::new();
    let ports = [lab.port(0), lab.port(1), 9];
    let sent: Vec<usize> = (0..BATCH_LEN).map(|i| [1, 0, 0, 1, 2, 1][i % 6]).collect();
    for (number, &to) in sent.iter().enumerate() {
        lab.deliver(ports[to], &initiation(number as u8));
    }
    assert!(!lab.turn(), "some were dropped at sight, so that it has looked for more");
    for (device, of) in lab.devices.iter().zip(0..) {
        let its: Vec<u8> = (0..).zip(&sent).filter(|(_, to)| **to == of).map(|(n, _)| n).collect();
        assert_eq!(device.initiations(), its);
    }
    let to_nobody = sent.iter().filter(|&&to| to == 2).count();
    assert_eq!(lab.dropped(DropReason::NoDevice), to_nobody as u64);
}

#[test]
fn a_packet_is_opened_by_the_device_that_lent_its_index_and_no_other() {
    let mut lab = Lab::new();
    let inner = packet(PEER_1, US, 96);
    for of in [0, 1] {
        let message = lab.devices[of].message(1, &inner);
        lab.deliver(lab.port(1 - of), &message);
        lab.deliver(lab.port(of), &message);
    }
    lab.turn();
    for device in &lab.devices {
        assert_eq!(device.written(0), std::slice::from_ref(&inner));
        assert_eq!(device.dropped(DropReason::UnknownIndex), 1);
    }
}

#[test]
fn runs_are_opened_in_order_and_with_their_marks() {
    let mut lab = Lab::new();
    lab.turn();
    let far = lab.sender();
    let to = lab.address(0);
    let mut inner = packet(PEER_1, US, 100);
    inner[1] = 0b10;
    // More than the AEAD takes at once, and no multiple of it.
    let messages: Vec<_> = (0..150)
        .map(|counter| {
            inner[20..24].copy_from_slice(&(counter as u32).to_le_bytes());
            lab.devices[0].message(counter, &inner)
        })
        .collect();
    for messages in messages.chunks(50) {
        let run: Vec<_> = messages
            .iter()
            .map(|bytes| udp::Outgoing { bytes, endpoint: &to, tos: 0b11 })
            .collect();
        assert_eq!(far.send(&run).sent, run.len());
    }
    assert!(!lab.turn(), "they fill three buffers");
    let written = lab.devices[0].written(0);
    assert_eq!(written.len(), messages.len());
    for (number, packet) in written.iter().enumerate() {
        assert_eq!((packet[1], &packet[20..24]), (0b11, &(number as u32).to_le_bytes()[..]));
    }
}

#[test]
fn a_thread_that_is_saturated_is_helped_by_one_that_has_time() {
    let mut lab = Lab::new();
    let port = lab.port(0);
    let (mut counter, mut numbers) = (0, Vec::new());
    let fanned_out = |lab: &Lab| {
        let workers = &lab.devices[0].shared.workers;
        Totals::sum(workers.iter().map(|worker| &worker.counters)).fanned_out()
    };
    let mut inner = packet(PEER_1, US, 64);
    let mut full_turn = |lab: &mut Lab| {
        for _ in 0..BATCH_LEN {
            inner[20..24].copy_from_slice(&(counter as u32).to_le_bytes());
            lab.deliver(port, &lab.devices[0].message(counter, &inner));
            counter += 1;
        }
        assert!(lab.turn(), "there may be more");
        let written = lab.devices[0].written(0).into_iter();
        numbers.extend(written.map(|packet| packet[20..24].to_vec()));
        (numbers.len(), counter as usize)
    };
    assert!(!lab.turn_second(), "it has nothing to do");
    for _ in 0..8 {
        let (written, sent) = full_turn(&mut lab);
        assert_eq!(written, sent, "each batch at once");
    }
    assert_eq!(fanned_out(&lab), 0);
    full_turn(&mut lab);
    let given = fanned_out(&lab);
    assert!(given > 0);
    assert_eq!(full_turn(&mut lab).0, 8 * BATCH_LEN, "all wait for what is away");
    assert!(lab.turn_second(), "it looks for more");
    assert_eq!(full_turn(&mut lab).0, 10 * BATCH_LEN, "the last is away again");
    // One that sleeps is woken.
    lab.crew.set_asleep(WorkerId(1));
    full_turn(&mut lab);
    assert!(fanned_out(&lab) > given && lab.crew.wake(WorkerId(1)).drain());
    lab.turn_second();
    assert_eq!(full_turn(&mut lab).0, 12 * BATCH_LEN);
    lab.turn_second();
    lab.turn();
    let last = lab.devices[0].written(0).into_iter().map(|packet| packet[20..24].to_vec());
    numbers.extend(last);
    let expected = (0..13 * BATCH_LEN as u32).map(|number| number.to_le_bytes().to_vec());
    assert_eq!(numbers, expected.collect::<Vec<_>>());
    assert_eq!(lab.devices[0].dropped(DropReason::HelperStuck), 0);
}

#[test]
fn a_mark_on_a_frame_reaches_the_packet() {
    let mut lab = Lab::new();
    let mut inner = packet(PEER_1, US, 96);
    inner[1] = 0b01;
    let (port, message) = (lab.port(0), lab.devices[0].message(1, &inner));
    lab.deliver_with(port, &message, 0xff);
    lab.turn();
    assert_eq!(lab.devices[0].written(0)[0][1], 0b11);
}

#[test]
fn what_the_kernel_drops_before_a_socket_is_counted_once_a_second() {
    let mut lab = Lab::new();
    lab.turn();
    let far = lab.sender();
    let to = lab.address(0);
    let sockets = lab.devices[0].shared.sockets.load_full();
    let own = &sockets.of_worker[0].v4;
    socket::set_buffers(own, 0).unwrap();
    for _ in 0..50 {
        far.send(&[udp::Outgoing { bytes: &[9; 1000], endpoint: &to, tos: 0 }]);
    }
    let dropped = own.drops().unwrap();
    assert!((1..50).contains(&dropped));
    lab.turn();
    assert_eq!(lab.devices[0].dropped(DropReason::SocketFull), 0, "not asked yet");
    for after in [1, 2, 3] {
        let later = START + Duration::from_secs(after);
        lab.turn_at(reading(later, Duration::ZERO, Duration::ZERO));
        assert_eq!(lab.devices[0].dropped(DropReason::SocketFull), u64::from(dropped));
        assert_eq!(lab.devices[1].dropped(DropReason::SocketFull), 0);
    }
}

#[test]
fn a_port_may_change_while_frames_come() {
    let mut lab = Lab::new();
    let before = lab.port(0);
    lab.turn();
    let (port, of_worker) = udp::bind_group(0, 2, 0).unwrap();
    lab.devices[0].shared.sockets.store(Arc::new(SocketGroup { port, of_worker }));
    for port in [before, port] {
        lab.deliver(port, &initiation(port as u8));
    }
    lab.turn();
    assert_eq!(lab.devices[0].initiations(), [port as u8]);
    assert_eq!(lab.dropped(DropReason::NoDevice), 1);
}

#[test]
fn a_device_that_is_over_leaves_the_other_running() {
    for leave in [Shared::report_tun_gone, |shared: &Shared| {
        shared.stopping.store(true, Ordering::Relaxed);
    }] {
        for gone in [0, 1] {
            let mut lab = Lab::new();
            lab.turn();
            leave(&lab.devices[gone].shared);
            assert!(lab.thread.any_left() && lab.second.any_left());
            lab.devices.iter().for_each(|device| device.route(0, &packet(US, PEER_1, 64)));
            while lab.turn() {}
            let mut datagram = [0; 256];
            assert_eq!(lab.far.recv(&mut datagram).unwrap(), 96);
            assert_eq!(datagram[4..8], index(lab.devices[1 - gone].slot).to_wire());
            lab.far.set_nonblocking(true).unwrap();
            assert!(lab.far.recv(&mut datagram).is_err(), "it sends nothing");
            let inner = packet(PEER_1, US, 64);
            for of in [0, 1] {
                lab.deliver(lab.port(of), &lab.devices[of].message(1, &inner));
            }
            while lab.turn() {}
            assert_eq!(lab.devices[1 - gone].written(0), [inner]);
            assert!(lab.devices[gone].written(0).is_empty(), "and takes nothing");
            assert_eq!(lab.dropped(DropReason::NoDevice), 1);
            // Nobody but us holds what it had: its sockets close with it.
            assert_eq!(Arc::strong_count(&lab.devices[gone].shared), 1);
            leave(&lab.devices[1 - gone].shared);
            assert!(!lab.thread.any_left());
            lab.thread.run();
        }
    }
}

#[test]
fn a_device_with_much_to_do_starves_no_other() {
    let mut lab = Lab::new();
    lab.turn();
    let backlog = 3 * BATCH_LEN;
    for busy in [0, 1] {
        let [of_busy, of_other] = [busy, 1 - busy].map(|of| &lab.devices[of]);
        for _ in 0..backlog {
            of_busy.route(0, &packet(US, PEER_1, 64));
        }
        for turn in 0..3 {
            of_other.route(0, &packet(US, PEER_1, 64));
            lab.thread.wait(Duration::ZERO);
            let more = lab.thread.turn(|| reading(START, Duration::ZERO, Duration::ZERO));
            assert!(more, "a turn is bounded");
            let mut from_busy = 0;
            let mut datagram = [0; 256];
            for _ in 0..=BATCH_LEN {
                lab.far.recv(&mut datagram).unwrap();
                from_busy += usize::from(datagram[4..8] == index(of_busy.slot).to_wire());
            }
            assert_eq!(
                from_busy, BATCH_LEN,
                "turn {turn}: all of one batch, and the other's packet"
            );
        }
        lab.turn();
    }
}

/// Messages for the first device that are dropped at sight: for nobody, too short, known already.
fn junk(lab: &mut Lab) -> [(Vec<u8>, DropReason); 3] {
    let known = lab.devices[0].message(1, &packet(PEER_1, US, 64));
    lab.deliver(lab.port(0), &known);
    lab.turn();
    assert_eq!(lab.devices[0].written(0).len(), 1);
    let mut to_nobody = lab.devices[0].message(2, &packet(PEER_1, US, 64));
    to_nobody[4..8].copy_from_slice(&index(lab.devices[0].slot + 1).to_wire());
    [
        (known[..31].to_vec(), DropReason::BadLength),
        (to_nobody, DropReason::UnknownIndex),
        (known, DropReason::Replay),
    ]
}

#[test]
fn a_flood_of_what_is_not_ours_is_emptied_first_and_starves_nobody() {
    const COUNT: usize = 900;
    let mut lab = Lab::new();
    let junk = junk(&mut lab);
    for (message, _) in junk.iter().cycle().take(COUNT) {
        lab.deliver(lab.port(0), message);
    }
    let inner = packet(PEER_1, US, 96);
    for of in [0, 1] {
        lab.deliver(lab.port(of), &lab.devices[of].message(3, &inner));
    }
    let dropped = |lab: &Lab| {
        junk.iter().map(|(_, reason)| lab.devices[0].dropped(*reason) as usize).sum::<usize>()
    };
    let mut datagram = [0; 256];
    for turn in 1.. {
        lab.devices.iter().for_each(|device| device.route(0, &packet(US, PEER_1, 64)));
        let more = lab.turn();
        let expected = COUNT.min(turn * BATCHES_MAX * BATCH_LEN);
        assert_eq!((dropped(&lab), more), (expected, expected < COUNT), "turn {turn}");
        // In the same turn, whatever comes from outside.
        (0..2).for_each(|_| assert_eq!(lab.far.recv(&mut datagram).unwrap(), 96));
        if !more {
            break;
        }
        assert!(lab.devices.iter().all(|device| device.written(0).is_empty()));
    }
    for device in &lab.devices {
        assert_eq!(device.written(0), std::slice::from_ref(&inner));
    }
    for (_, reason) in &junk {
        assert_eq!(lab.devices[0].dropped(*reason) as usize, COUNT / junk.len());
    }
}

#[test]
fn a_flood_of_good_packets_is_bounded_and_starves_nobody() {
    let mut lab = Lab::new();
    lab.turn();
    let (far, to) = (lab.sender(), lab.address(0));
    let inner = packet(PEER_1, US, 64);
    let count = 3 * BATCH_LEN;
    for counter in 0..count as u64 {
        lab.deliver(lab.port(0), &lab.devices[0].message(counter, &inner));
    }
    for turn in 0..3 {
        let bytes = lab.devices[0].message(1000 + turn, &inner);
        assert_eq!(far.send(&[udp::Outgoing { bytes: &bytes, endpoint: &to, tos: 0 }]).sent, 1);
        lab.deliver(lab.port(1), &lab.devices[1].message(turn, &inner));
        lab.devices.iter().for_each(|device| device.route(0, &packet(US, PEER_1, 64)));
        assert!(lab.turn());
        assert_eq!(lab.devices[0].written(0).len(), BATCH_LEN + 1, "a batch, and by the socket");
        // The first device's went to where its latest datagram had come from.
        assert_eq!(lab.far.recv(&mut [0; 256]).unwrap(), 96);
    }
    assert!(!lab.turn());
    assert_eq!(lab.devices[1].written(0).len(), 3, "they stood behind the others in the ring");
}

#[test]
fn a_flood_by_the_socket_is_emptied_to_what_is_ours() {
    const COUNT: usize = 4 * BATCH_LEN;
    let mut lab = Lab::new();
    let junk = junk(&mut lab);
    let (far, to) = (lab.sender(), lab.address(0));
    let inner = packet(PEER_1, US, 96);
    let good = lab.devices[0].message(9, &inner);
    for (bytes, _) in junk.iter().cycle().take(COUNT).chain([&(good, DropReason::Replay)]) {
        assert_eq!(far.send(&[udp::Outgoing { bytes, endpoint: &to, tos: 0 }]).sent, 1);
    }
    assert!(!lab.turn());
    assert_eq!(lab.devices[0].written(0), [inner]);
    let dropped = junk.iter().map(|(_, reason)| lab.devices[0].dropped(*reason) as usize);
    assert_eq!(dropped.sum::<usize>(), COUNT);
}

#[test]
fn a_turn_beats_once_for_all_and_looks_at_the_clocks_for_each() {
    let mut lab = Lab::new();
    let zero = Duration::ZERO;
    lab.turn();
    let turns = lab.crew.turns(WorkerId(0));
    let later = START + Duration::from_secs(1);
    lab.turn_at(reading(later, zero, zero));
    assert_eq!(lab.crew.turns(WorkerId(0)), turns + 1);
    assert_eq!(lab.heartbeats[0].load(Ordering::Relaxed), later.boot_ns());
    assert_eq!(lab.heartbeats[1].load(Ordering::Relaxed), 0, "the other thread has not turned");
    for device in &lab.devices {
        assert!(device.shared.moves(WorkerId(0), later));
        assert!(!device.shared.moves(WorkerId(1), later));
        assert!(device.shared.keys_not_before() < START);
    }
    // A leap of the clock: in the same turn neither device takes what was sealed before.
    let leapt = later + Duration::from_millis(1);
    for of in [0, 1] {
        lab.deliver(lab.port(of), &lab.devices[of].message(1, &packet(PEER_1, US, 64)));
    }
    lab.turn_at(reading(leapt, zero, Duration::from_secs(5)));
    for device in &lab.devices {
        assert_eq!(device.shared.keys_not_before(), leapt);
        assert!(device.written(0).is_empty());
        assert_eq!(device.dropped(DropReason::KeyExpired), 1);
    }
}

#[test]
fn a_deputy_reads_what_is_the_stuck_ones_of_every_device() {
    let mut lab = Lab::new();
    lab.turn();
    let read = |lab: &mut Lab| {
        lab.devices.iter().for_each(|device| device.route(1, &packet(US, PEER_1, 64)));
        while lab.turn() {}
        lab.far.set_nonblocking(true).unwrap();
        let mut datagram = [0; 256];
        std::iter::from_fn(|| lab.far.recv(&mut datagram).ok()).count()
    };
    assert_eq!(read(&mut lab), 0);
    lab.crew.set_deputy(WorkerId(1), Some(WorkerId(0)));
    lab.turn();
    assert_eq!(read(&mut lab), 4, "what waited, and what came");
    lab.crew.set_deputy(WorkerId(1), None);
    lab.turn();
    assert_eq!(read(&mut lab), 0);
}

#[test]
fn quiescing_one_device_is_not_quiescing_the_other() {
    let mut lab = Lab::new();
    lab.turn();
    let [quiet, other] = &lab.devices;
    quiet.shared.end_keypairs(START + Duration::from_nanos(1));
    quiet.shared.set_quiesced_until(START + Duration::from_secs(9));
    assert!(!other.shared.is_quiesced(START));
    let inner = packet(PEER_1, US, 64);
    for of in [0, 1] {
        lab.deliver(lab.port(of), &lab.devices[of].message(1, &inner));
    }
    lab.turn();
    assert!(lab.devices[0].written(0).is_empty());
    assert_eq!(lab.devices[0].dropped(DropReason::Quiesced), 1);
    assert_eq!(lab.devices[1].written(0), [inner]);
}
