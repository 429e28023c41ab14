//! Batches that another thread seals and opens: order, and what happens while they are away.

use super::segments::{Post, header, segments_of, tcp};
use super::*;
use crate::datapath::fan_out::{DEPTH, Helping, Rings, Turn};
use crate::datapath::opening::Opening;
use crate::datapath::outbound::Sealing;

/// Longer than a helper may keep a batch.
const LATE: Duration = Duration::from_millis(100);

/// A gateway whose worker 0 is saturated, while worker 1 has time.
struct Fan {
    gateway: Gateway,
    helping: Helping,
    turns: u64,
}

impl Fan {
    fn new() -> Self {
        let mut gateway = Gateway::new();
        gateway.give_keypair(1, Role::Initiator);
        let mut helping = Helping::default();
        let (mut open, mut seal) = (Rings::<Opening>::between(2), Rings::<Sealing>::between(2));
        helping.add(open.pop_back().unwrap().split().1);
        helping.add(seal.pop_back().unwrap().split().1);
        let inbound = gateway.inbound.remove(0).with_helpers(open.remove(0).unwrap().split().0);
        gateway.inbound.insert(0, inbound);
        gateway.outbound = gateway.outbound.with_helpers(seal.remove(0).unwrap().split().0);
        gateway.shared.crew.set_awake(WorkerId(1), true);
        let mut fan = Self { gateway, helping, turns: 0 };
        fan.turn(true);
        fan
    }

    fn turn(&mut self, is_saturated: bool) {
        self.turns += 1;
        let turn = Turn { number: self.turns, is_saturated };
        self.gateway.inbound[0].begin_turn(turn);
        self.gateway.outbound.begin_turn(turn);
    }

    /// Datagrams that the peer sends: batches of `len` numbered packets.
    fn batches(&mut self, count: usize, len: usize) -> Vec<Vec<Vec<u8>>> {
        self.turn(false);
        let packets: Vec<_> = (0..count * len).map(|n| numbered(PEER_1, US, n)).collect();
        let datagrams = datagrams_of(&mut self.gateway, 1, &packets);
        self.turn(true);
        datagrams.chunks(len).map(<[_]>::to_vec).collect()
    }

    /// A batch comes to the saturated worker.
    fn receive(&mut self, datagrams: &[Vec<u8>], now: Now) {
        let mut datagrams = datagrams.to_vec();
        let mut arrivals: Vec<_> = datagrams
            .iter_mut()
            .map(|bytes| Arrival {
                bytes,
                from: endpoint("192.0.2.1:1000"),
                tos: 0,
                path: Path::Socket,
                worker: WorkerId(0),
            })
            .collect();
        self.gateway.inbound[0].process(&mut arrivals, &self.gateway.tun, now);
    }

    /// A batch comes from the TUN device.
    fn send(&mut self, packets: impl IntoIterator<Item = Vec<u8>>, now: Now) {
        self.gateway.tun.to_read.borrow_mut().extend(packets);
        let Gateway { outbound, tun, wire, .. } = &mut self.gateway;
        while outbound.process(tun, wire, now).unwrap() {}
    }

    fn help(&mut self) -> bool {
        self.helping.help(&self.gateway.shared.crew, &mut 100)
    }

    fn release(&mut self, now: Now) {
        let Gateway { inbound, outbound, tun, wire, .. } = &mut self.gateway;
        inbound[0].release(tun, now);
        outbound.release(wire, now);
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        self.gateway.dropped(0, reason)
    }

    fn fanned_out(&self) -> u64 {
        crate::counters::Totals::sum([&self.gateway.shared.workers[0].counters]).fanned_out()
    }
}

fn numbered(source: [u8; 4], destination: [u8; 4], number: usize) -> Vec<u8> {
    let mut packet = packet(source, destination, 100);
    packet[40..44].copy_from_slice(&(number as u32).to_le_bytes());
    packet
}

fn numbers(packets: &[Vec<u8>]) -> Vec<usize> {
    let number = |packet: &Vec<u8>| u32::from_le_bytes(packet[40..44].try_into().unwrap());
    packets.iter().map(|packet| number(packet) as usize).collect()
}

/// The counters of messages.
fn counters(messages: &[Vec<u8>]) -> Vec<u64> {
    messages.iter().map(|it| u64::from_le_bytes(it[8..16].try_into().unwrap())).collect()
}

#[test]
fn what_comes_is_written_in_order_though_others_open_it() {
    let mut fan = Fan::new();
    let batches = fan.batches(6, 20);
    for batch in &batches[..5] {
        fan.receive(batch, START);
    }
    assert_eq!(fan.fanned_out(), DEPTH as u64, "as many as one helper takes");
    assert!(fan.gateway.written().is_empty());
    assert_eq!(fan.gateway.peer(1).transfer.rx_bytes(), 0, "nothing is accepted");
    assert!(fan.help());
    assert!(fan.gateway.written().is_empty(), "only its home releases it");
    fan.release(START);
    let written = fan.gateway.written();
    assert_eq!(numbers(&written), (0..100).collect::<Vec<_>>());
    assert_eq!(written[7], numbered(PEER_1, US, 7));
    // Without need, the next is opened where it lies.
    fan.turn(false);
    fan.receive(&batches[5], START);
    assert_eq!(numbers(&fan.gateway.written()), (100..120).collect::<Vec<_>>());
    assert!(!fan.help());
    assert_eq!(fan.fanned_out(), DEPTH as u64);
    // The window knows them all.
    fan.receive(&batches.concat()[..64], START);
    fan.receive(&batches.concat()[64..], START);
    assert_eq!(fan.dropped(DropReason::Replay), 120);
}

#[test]
fn a_replay_of_what_is_away_is_dropped() {
    let mut fan = Fan::new();
    let batches = fan.batches(1, 20);
    for _ in 0..3 {
        fan.receive(&batches[0], START);
    }
    assert!(fan.help());
    fan.release(START);
    assert_eq!(fan.gateway.written().len(), 20);
    assert_eq!(fan.dropped(DropReason::Replay), 40);
}

#[test]
fn a_bad_tag_that_a_helper_sees_moves_nothing() {
    let mut fan = Fan::new();
    let mut batches = fan.batches(1, 20);
    let good = batches[0].clone();
    batches[0].iter_mut().for_each(|datagram| datagram[30] ^= 1);
    fan.receive(&batches[0], START);
    assert!(fan.help());
    fan.release(START);
    assert_eq!(fan.dropped(DropReason::BadTag), 20);
    assert_eq!(fan.gateway.peer(1).transfer.rx_bytes(), 0);
    fan.receive(&good, START);
    assert!(fan.help());
    fan.release(START);
    assert_eq!(fan.gateway.written().len(), 20, "the window did not move either");
}

#[test]
fn datagrams_of_any_size_find_room_in_bundles() {
    let mut fan = Fan::new();
    fan.turn(false);
    let lens = [60_000, 100, 30_000, 64, 65_000, 40_000, 1400].repeat(3);
    let packets: Vec<_> = lens.iter().map(|&len| packet(PEER_1, US, len)).collect();
    let datagrams = datagrams_of(&mut fan.gateway, 1, &packets);
    fan.turn(true);
    // One is away, so that these go by bundles.
    let first = fan.batches(1, 20).remove(0);
    fan.receive(&first, START);
    fan.receive(&datagrams, START);
    assert!(fan.help());
    fan.release(START);
    assert_eq!(fan.gateway.written()[20..], packets);
}

#[test]
fn what_leaves_is_sent_in_order_though_others_seal_it() {
    let mut fan = Fan::new();
    let count = (DEPTH + 1) * 64;
    fan.send((0..count).map(|n| numbered(US, PEER_1, n)), START);
    assert_eq!(fan.fanned_out(), DEPTH as u64);
    assert!(fan.gateway.sent().is_empty());
    assert!(fan.help());
    assert!(fan.gateway.sent().is_empty(), "only its home sends it");
    fan.release(START);
    let sent = fan.gateway.sent();
    assert_eq!(counters(&sent), (0..count as u64).collect::<Vec<_>>());
    let tx = fan.gateway.peer(1).transfer.tx_bytes();
    assert_eq!(tx, sent.iter().map(|message| message.len() as u64).sum::<u64>());
    // They come back as they were.
    let mut all = AllowedIps::default();
    all.insert("0.0.0.0/0".parse::<IpNet>().unwrap(), PeerId(1));
    fan.gateway.shared.routing.store(all.snapshot());
    fan.turn(false);
    sent.chunks(64).for_each(|batch| fan.receive(batch, START));
    assert_eq!(numbers(&fan.gateway.written()), (0..count).collect::<Vec<_>>());
}

#[test]
fn a_super_packet_is_cut_to_its_end_though_its_first_segments_are_away() {
    let mut fan = Fan::new();
    let (bytes, post) = (tcp(2, 65_495), Post::default());
    fan.gateway.tun.unfinished.borrow_mut().push_back((header(400), bytes.clone()));
    let behind = packet(US, PEER_1, 48);
    fan.gateway.tun.to_read.borrow_mut().push_back(behind.clone());
    let mut batch_count = 0;
    loop {
        let Gateway { outbound, tun, .. } = &mut fan.gateway;
        let more = outbound.process(tun, &post, START).unwrap();
        batch_count += 1;
        assert!(batch_count < 100, "it comes to an end");
        // The arenas are used again and again.
        if batch_count % 3 == 0 {
            assert!(fan.help());
            fan.gateway.outbound.release(&post, START);
        }
        if !more {
            break;
        }
    }
    fan.help();
    fan.gateway.outbound.release(&post, START);
    let mut expected = segments_of(header(400), &bytes);
    expected.push(behind);
    assert_eq!(post.opened(1), expected);
    assert!(fan.fanned_out() > 1);
}

#[test]
fn what_a_stuck_helper_has_is_counted_and_the_rest_goes_on() {
    let mut fan = Fan::new();
    let batches = fan.batches(DEPTH + 1, 20);
    batches.iter().for_each(|batch| fan.receive(batch, START));
    fan.send((0..(DEPTH + 1) * 64).map(|n| numbered(US, PEER_1, n)), START);
    assert_eq!(fan.fanned_out(), 2 * DEPTH as u64);
    fan.release(START + LATE);
    assert_eq!(fan.dropped(DropReason::HelperStuck), (DEPTH * (20 + 64)) as u64);
    assert_eq!(numbers(&fan.gateway.written()), (DEPTH * 20..(DEPTH + 1) * 20).collect::<Vec<_>>());
    let sent = fan.gateway.sent();
    let first = counters(&sent)[0];
    assert_eq!(counters(&sent), (first..first + 64).collect::<Vec<_>>());
    // It comes back, too late for what it had; no counter is used again.
    assert!(fan.help());
    fan.release(START + LATE);
    assert!(fan.gateway.written().is_empty() && fan.gateway.sent().is_empty());
    fan.send((0..64).map(|n| numbered(US, PEER_1, n)), START + LATE);
    fan.help();
    fan.release(START + LATE);
    let sent = fan.gateway.sent();
    assert_eq!(counters(&sent), (first + 64..first + 128).collect::<Vec<_>>());
}

/// What becomes of a batch in each direction if something happens while it is away: before the helper
/// works on it, or after.
fn happens(what: impl Fn(&Gateway)) -> Fan {
    let mut outcomes = [false, true].map(|helps_before| {
        let mut fan = Fan::new();
        let batch = fan.batches(1, 20).remove(0);
        fan.receive(&batch, START);
        fan.send((0..30).map(|n| numbered(US, PEER_1, n)), START);
        assert_eq!(fan.fanned_out(), 2);
        if helps_before {
            assert!(fan.help());
        }
        what(&fan.gateway);
        assert_eq!(fan.help(), !helps_before);
        fan.release(START);
        assert!(fan.gateway.inbound[0].is_empty() && fan.gateway.outbound.is_empty());
        fan
    });
    let [before, after] = &mut outcomes;
    let all = |fan: &mut Fan| (fan.gateway.written(), counters(&fan.gateway.sent()));
    let ((written, sent), (its_written, its_sent)) = (all(before), all(after));
    assert_eq!((&written, &sent), (&its_written, &its_sent));
    for &reason in DropReason::ALL {
        assert_eq!(before.dropped(reason), after.dropped(reason), "{reason:?}");
    }
    before.gateway.tun.written.replace(written);
    let [before, _] = outcomes;
    before.gateway.wire.0.replace(vec![Vec::new(); sent.len()]);
    before
}

#[test]
fn after_a_break_of_time_nothing_from_before_is_sent_or_taken() {
    let fan = happens(|gateway| gateway.shared.end_keypairs(START + Duration::from_secs(1)));
    assert!(fan.gateway.written().is_empty() && fan.gateway.sent().is_empty());
    assert_eq!(fan.dropped(DropReason::KeyExpired), 50);
}

#[test]
fn in_a_pause_nothing_is_sent_or_taken() {
    let fan = happens(|gateway| gateway.shared.set_quiesced_until(START + LATE));
    assert!(fan.gateway.written().is_empty() && fan.gateway.sent().is_empty());
    assert_eq!(fan.dropped(DropReason::Quiesced), 50);
    let fan = happens(|gateway| gateway.shared.up.store(false, Ordering::Relaxed));
    assert!(fan.gateway.written().is_empty() && fan.gateway.sent().is_empty());
    assert_eq!(fan.dropped(DropReason::InterfaceDown), 50);
}

#[test]
fn a_keypair_that_is_handed_over_meanwhile_accepts_nothing_more() {
    let fan = happens(|gateway| {
        let keypair = gateway.peer(1).keypairs.load().current.clone().unwrap();
        assert!(keypair.freeze().unwrap().is_settled(), "nobody receives while a batch is away");
    });
    assert!(fan.gateway.written().is_empty());
    assert_eq!(fan.dropped(DropReason::HandedOver), 20);
    assert_eq!(fan.gateway.sent().len(), 30, "their counters were reserved before");
}

#[test]
fn a_keypair_that_is_replaced_meanwhile_is_dead_at_once() {
    let fan = happens(|gateway| {
        gateway.peer(1).keypairs.update(crate::session::Keypairs::cleared);
    });
    assert!(fan.gateway.written().is_empty());
    assert_eq!(fan.dropped(DropReason::UnknownIndex), 20);
    assert_eq!(fan.gateway.sent().len(), 30, "it was sealed before, as far as anybody can tell");
}

#[test]
fn nothing_holds_a_keypair_but_a_helper() {
    let mut fan = Fan::new();
    let batches = fan.batches(DEPTH + 2, 20);
    let keypair = fan.gateway.peer(1).keypairs.load().current.clone().unwrap();
    let holders = Arc::strong_count(&keypair);
    batches.iter().for_each(|batch| fan.receive(batch, START));
    fan.send((0..(DEPTH + 1) * 64).map(|n| numbered(US, PEER_1, n)), START);
    assert_eq!(Arc::strong_count(&keypair), holders + 2 * DEPTH, "so many are away");
    assert!(fan.help());
    assert_eq!(Arc::strong_count(&keypair), holders, "and none is released yet");
}

#[test]
fn staged_packets_go_in_their_turn() {
    let mut fan = Fan::new();
    fan.send((0..64).map(|n| numbered(US, PEER_1, n)), START);
    let keypair = fan.gateway.peer(1).keypairs.load().current.clone().unwrap();
    fan.gateway.peer(1).keypairs.update(crate::session::Keypairs::cleared);
    fan.send((64..70).map(|n| numbered(US, PEER_1, n)), START);
    fan.gateway
        .peer(1)
        .keypairs
        .update(|keypairs| keypairs.installed_by_initiator(Arc::clone(&keypair)));
    let Gateway { outbound, wire, .. } = &mut fan.gateway;
    while outbound.flush_staged(wire, START) {}
    assert!(wire.0.borrow().is_empty(), "they wait behind what is away");
    assert!(fan.help());
    fan.release(START);
    assert_eq!(counters(&fan.gateway.sent()), (0..70).collect::<Vec<u64>>());
}
