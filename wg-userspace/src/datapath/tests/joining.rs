//! What the TUN device is given of a batch.

use super::*;
use crate::segments::SegmentKind;
use crate::segments::packets_for_tests::TestPacket;

const PEER: &str = "10.0.0.2";
const HOST: &str = "10.1.0.1";

/// A TUN device that keeps how many packets came with each write, and refuses some.
struct Picky {
    refuses: fn(&Run<'_>) -> Option<io::ErrorKind>,
    writes: RefCell<Vec<(usize, bool)>>,
    packets: RefCell<Vec<Vec<u8>>>,
}

impl Picky {
    fn new(refuses: fn(&Run<'_>) -> Option<io::ErrorKind>) -> Self {
        Self { refuses, writes: RefCell::default(), packets: RefCell::default() }
    }

    /// How many packets each write had, and whether it was taken.
    fn writes(&self) -> Vec<(usize, bool)> {
        self.writes.take()
    }
}

impl PacketSink for Picky {
    fn write(&self, run: &Run<'_>) -> io::Result<()> {
        let refusal = (self.refuses)(run);
        self.writes.borrow_mut().push((run.len(), refusal.is_none()));
        if let Some(kind) = refusal {
            return Err(kind.into());
        }
        self.packets.borrow_mut().extend(run.packets().map(<[u8]>::to_vec));
        Ok(())
    }
}

/// A gateway that has a keypair with peer 1.
fn gateway() -> Gateway {
    let gateway = Gateway::new();
    gateway.give_keypair(1, Role::Initiator);
    gateway
}

/// Has peer 1 send a batch.
fn receive(gateway: &mut Gateway, packets: &[Vec<u8>], tun: &Picky) {
    let mut datagrams = datagrams_of(gateway, 1, packets);
    let (from, worker) = (endpoint("192.0.2.1:1000"), WorkerId(0));
    let mut arrivals: Vec<_> = datagrams
        .iter_mut()
        .map(|bytes| Arrival { bytes, from, path: Path::Socket, worker, tos: 0 })
        .collect();
    gateway.inbound[0].process(&mut arrivals, tun, START);
}

fn tcp(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|number| TestPacket::tcp(PEER, HOST, number, 101).bytes()).collect()
}

fn udp(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|number| TestPacket::udp(PEER, HOST, number, 101).bytes()).collect()
}

#[test]
fn packets_of_a_flow_are_one_write() {
    let (mut gateway, tun) = (gateway(), Picky::new(|_| None));
    // One is not the peer's to send, and neither joined nor a gap to the others.
    let foreign = TestPacket::tcp("10.0.0.3", HOST, 0, 101).bytes();
    let mut packets = tcp(20);
    packets.insert(7, foreign);
    receive(&mut gateway, &packets, &tun);
    assert_eq!(tun.writes(), [(20, true)]);
    assert_eq!(tun.packets.take(), tcp(20), "without the padding of the messages");
    assert_eq!(gateway.dropped(0, DropReason::SourceNotAllowed), 1);
}

#[test]
fn nothing_waits_for_the_next_batch() {
    let (mut gateway, tun) = (gateway(), Picky::new(|_| None));
    for batch in tcp(6).chunks(3) {
        receive(&mut gateway, batch, &tun);
        assert_eq!(tun.writes(), [(3, true)]);
    }
}

#[test]
fn udp_that_the_kernel_cannot_cut_is_written_packet_by_packet() {
    let no_uso: fn(&Run<'_>) -> _ =
        |run| (run.kind() == Some(SegmentKind::Udp)).then_some(io::ErrorKind::InvalidInput);
    let (mut gateway, tun) = (gateway(), Picky::new(no_uso));
    receive(&mut gateway, &udp(3), &tun);
    assert_eq!(tun.writes(), [(3, false), (1, true), (1, true), (1, true)]);
    // It is not tried again; TCP is.
    receive(&mut gateway, &[udp(2), tcp(2)].concat(), &tun);
    assert_eq!(tun.writes(), [(1, true), (1, true), (2, true)]);
    assert_eq!(tun.packets.take(), [udp(3), udp(2), tcp(2)].concat());
    assert_eq!(gateway.dropped(0, DropReason::TunWrite), 0);
}

#[test]
fn tcp_that_is_refused_once_is_tried_again() {
    let refuses: fn(&Run<'_>) -> _ = |run| (run.len() > 1).then_some(io::ErrorKind::InvalidInput);
    let (mut gateway, tun) = (gateway(), Picky::new(refuses));
    for _ in 0..2 {
        receive(&mut gateway, &tcp(2), &tun);
        assert_eq!(tun.writes(), [(2, false), (1, true), (1, true)]);
    }
}

#[test]
fn every_packet_of_a_run_that_is_lost_is_counted() {
    let (mut gateway, tun) = (gateway(), Picky::new(|_| Some(io::ErrorKind::WouldBlock)));
    receive(&mut gateway, &[tcp(5), udp(3)].concat(), &tun);
    assert_eq!(tun.writes(), [(5, false), (3, false)], "nothing is tried a second time");
    assert_eq!(gateway.dropped(0, DropReason::TunWrite), 8);

    let tun = Picky::new(|_| Some(io::ErrorKind::InvalidInput));
    receive(&mut gateway, &tcp(2), &tun);
    assert_eq!(tun.writes(), [(2, false), (1, false), (1, false)]);
    assert_eq!(gateway.dropped(0, DropReason::TunWrite), 10);
}
