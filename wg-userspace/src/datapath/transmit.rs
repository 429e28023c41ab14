//! The way out of a worker: by an XSK what one can send, by the sockets all else.
//!
//! By an XSK go messages to peers of whom control has published a [`LinkWay`](crate::session::LinkWay) that
//! leads out of a NIC on which this thread has an XSK that transmits: copied once, into a frame behind their
//! headers. The NIC is told once a turn. What is longer than the way's MTU, or has a DSCP, which routes may
//! heed, goes by the socket; so a flow whose packets are alike keeps to one of both.
//!
//! **Order.** When the tx ring or the chunks that are set apart for it are used up, the NIC is told at once.
//! What it does not take then is dropped and counted, as a socket does with a full buffer: by the socket it
//! would overtake what is in the ring. Only a ring in which nothing has moved for [`STUCK_AFTER`] is passed
//! by, until it moves: what lies in there is late already.

use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrayvec::ArrayVec;
use wg_common::headers::{ETHERNET_LEN, OuterHeaders};
use wg_common::time::Now;

use super::BATCH_LEN;
use super::outbound::{DatagramSink, Outgoing, Unsent};
use super::thread::{Ports, XskPort};
use crate::session::{Hop, HotPeer};
use crate::udp::UdpSockets;
use crate::xsk::{Pool, Xsk};

/// A ring of which the NIC has taken nothing for so long counts as stuck.
const STUCK_AFTER: Duration = Duration::from_millis(100);
/// Chunks of an XSK that are set apart for what it sends: a batch of each worker, and a millisecond at a
/// million packets a second. The others are received into, so that neither starves the other.
pub const TX_CHUNKS: u32 = 1024;
/// The part of a TOS byte that is ECN's.
const ECN: u8 = 3;

/// What is known of an XSK's tx ring.
#[derive(Debug, Default)]
pub struct TxState {
    /// When the NIC last took something, or there was nothing to take.
    moved: Now,
    /// Whether there may be something in the ring.
    is_used: bool,
}

impl XskPort {
    /// Takes back what was sent. To be called at the beginning of each turn.
    pub(super) fn reap(&mut self, pool: &mut Pool, now: Now) {
        if !self.transmits && !self.tx.is_used {
            return;
        }
        if self.xsk.complete(pool) > 0 || self.xsk.tx_outstanding() == 0 {
            self.tx.moved = now;
        }
    }

    /// Has the NIC send what is in the ring. To be called at the end of each turn.
    pub(super) fn kick(&mut self) {
        if !self.tx.is_used {
            return;
        }
        if let Err(error) = self.xsk.kick() {
            // It is down, or gone: what lies in the ring goes when it is back.
            tracing::trace!(%error, "sending by an XSK");
        }
        self.tx.is_used = self.xsk.sending() > 0;
    }

    /// Whether what lies in the ring has to be kicked again.
    pub(super) fn waits(&mut self) -> bool {
        self.tx.is_used && self.xsk.tx_outstanding() > 0
    }

    fn is_stuck(&self, now: Now) -> bool {
        self.tx.is_used && now.since(self.tx.moved) >= STUCK_AFTER
    }

    /// Puts a message behind headers into the ring.
    fn put(&mut self, pool: &mut Pool, headers: &OuterHeaders, message: &[u8]) -> Put {
        match put((&mut self.xsk, pool), headers, message) {
            Put::NoRoom => {}
            put => {
                self.tx.is_used = true;
                return put;
            }
        }
        // Perhaps the NIC has only not been told of what is there.
        let _ = self.xsk.kick();
        self.xsk.complete(pool);
        put((&mut self.xsk, pool), headers, message)
    }
}

/// What became of a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Put {
    /// It is in the ring.
    InRing,
    /// There is no room at present.
    NoRoom,
    /// It does not fit a frame.
    TooLong,
}

fn put((xsk, pool): (&mut Xsk, &mut Pool), headers: &OuterHeaders, message: &[u8]) -> Put {
    let Some(mut frame) = xsk.allocate_to_send(pool) else { return Put::NoRoom };
    let len = headers.len() + message.len();
    let fits = len <= frame.len();
    frame.truncate(len);
    let bytes = pool.umem().bytes_mut(&mut frame);
    let written = fits.then(|| headers.write_with(message, bytes)).flatten();
    if written.is_none() {
        xsk.recycle(pool, frame);
        return Put::TooLong;
    }
    match xsk.transmit(pool, frame) {
        Ok(()) => Put::InRing,
        Err(frame) => {
            xsk.recycle(pool, frame);
            Put::NoRoom
        }
    }
}

/// Where a worker's messages leave: its sockets, and the XSKs of its thread.
pub struct Exit<'a> {
    sockets: &'a UdpSockets,
    ports: RefCell<&'a mut Ports>,
}

impl<'a> Exit<'a> {
    /// By these.
    pub fn new(sockets: &'a UdpSockets, ports: &'a mut Ports) -> Self {
        Self { sockets, ports: RefCell::new(ports) }
    }

    /// Sends what is for one peer by an XSK, as far as that can be; the rest is given to `by_socket`.
    fn send_by_xsk<'d>(
        &self,
        peer: &HotPeer,
        datagrams: &[Outgoing<'d>],
        outcome: &mut Unsent,
        by_socket: &mut impl FnMut(usize, Outgoing<'d>),
        now: Now,
    ) {
        let mut ports = self.ports.borrow_mut();
        let way = peer.way.load();
        let found = way.as_deref().zip(datagrams.first()).and_then(|(way, first)| {
            let hop = way.hop().filter(|hop| hop.is_resolved && way.is_for(first.endpoint))?;
            let leads = |port: &XskPort| port.ifindex == hop.link && !port.is_stuck(now);
            Some((way, hop, ports.find(leads)?))
        });
        let Some((way, hop, (port, pool))) = found else {
            datagrams.iter().enumerate().for_each(|(at, datagram)| by_socket(at, *datagram));
            return;
        };
        way.note_used();
        let count = datagrams.len() as u32;
        let first_id = peer.datagram_id.fetch_add(count, Ordering::Relaxed) as u16;
        for (at, datagram) in datagrams.iter().enumerate() {
            let put = match self.headers(hop, datagram, first_id.wrapping_add(at as u16)) {
                Some(headers) => port.put(pool, &headers, datagram.bytes),
                None => Put::TooLong,
            };
            match put {
                Put::InRing => outcome.by_xsk += 1,
                Put::NoRoom => outcome.no_room += 1,
                Put::TooLong => by_socket(at, *datagram),
            }
        }
    }

    /// What stands before a datagram, if it may go by an XSK.
    fn headers(&self, hop: &Hop, datagram: &Outgoing<'_>, id: u16) -> Option<OuterHeaders> {
        let Outgoing { bytes, endpoint, tos } = datagram;
        let mut headers = OuterHeaders { tos: *tos, id, ..hop.headers };
        headers.src.set_port(self.sockets.for_remote(&endpoint.remote)?.port());
        headers.dst.set_port(endpoint.remote.port());
        let packet_len = headers.len() - ETHERNET_LEN + bytes.len();
        (packet_len <= hop.mtu && tos & !ECN == 0).then_some(headers)
    }
}

impl DatagramSink for Exit<'_> {
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
        self.sockets.send(datagrams)
    }

    fn send_to_peers(
        &self,
        datagrams: &[Outgoing<'_>],
        peers: &[(&HotPeer, usize)],
        now: Now,
    ) -> Unsent {
        if !self.ports.borrow().transmit() {
            return self.sockets.send(datagrams);
        }
        let mut outcome = Unsent::default();
        let mut rest: ArrayVec<Outgoing<'_>, BATCH_LEN> = ArrayVec::new();
        let mut places: ArrayVec<usize, BATCH_LEN> = ArrayVec::new();
        let mut begin = 0;
        for &(peer, count) in peers {
            let mut by_socket = |at: usize, datagram| {
                rest.push(datagram);
                places.push(begin + at);
            };
            let its = &datagrams[begin..begin + count];
            self.send_by_xsk(peer, its, &mut outcome, &mut by_socket, now);
            begin += count;
        }
        if !rest.is_empty() {
            let by_socket = self.sockets.send(&rest);
            outcome.failed += by_socket.failed;
            for (bit, place) in places.into_iter().enumerate() {
                outcome.stale_sources |= (by_socket.stale_sources >> bit & 1) << place;
            }
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket as Receiver};
    use std::sync::Arc;

    use wg_common::endpoint::Endpoint;
    use wg_common::headers::parse_frame;
    use wg_common::id::{DeviceId, PeerId};

    use super::*;
    use crate::key::PublicKey;
    use crate::session::LinkWay;
    use crate::udp;
    use crate::xsk::twin::{self, KernelTwin};
    use crate::xsk::{BindMode, XskOptions};

    const LINK: u32 = 7;
    /// Chunks that are set apart.
    const ROOM: usize = 4;
    const SMALL: XskOptions = XskOptions {
        mode: BindMode::Copy,
        chunk_size: 2048,
        chunk_count: 16,
        ring_size: 8,
        fill_level: 8,
    };

    /// An XSK with its other end, sockets, and a peer that both lead to.
    struct Setting {
        ports: Ports,
        nic: KernelTwin,
        sockets: UdpSockets,
        receiver: Receiver,
        peer: HotPeer,
        now: Now,
    }

    impl Setting {
        fn new() -> Self {
            let (pool, xsk, nic) = twin::pair(LINK, 0, SMALL).unwrap();
            let mut port = XskPort::new(xsk, LINK, true);
            port.xsk.set_apart_to_send(ROOM as u32);
            let mut ports = Ports::default();
            ports.open(port, Some(pool));
            let receiver = Receiver::bind("127.0.0.1:0").unwrap();
            receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let (_, mut sockets) = udp::bind_group(0, 1, 0).unwrap();
            let peer = HotPeer::new(PeerId(0), DeviceId(0), PublicKey::from_bytes([0; 32]));
            let sockets = sockets.remove(0);
            let now = Now::from_boot_ns(1_000_000_000);
            let mut setting = Self { ports, nic, sockets, receiver, peer, now };
            setting.publish(|_| {});
            setting.turn();
            setting
        }

        fn endpoint(&self) -> Endpoint {
            Endpoint::configured(self.receiver.local_addr().unwrap())
        }

        fn publish(&self, change: impl FnOnce(&mut Hop)) {
            let headers = OuterHeaders {
                dst_mac: [2, 0, 0, 0, 0, 2],
                src_mac: [2, 0, 0, 0, 0, 1],
                tags: [None, None],
                src: "192.0.2.1:0".parse().unwrap(),
                dst: "127.0.0.1:0".parse().unwrap(),
                tos: 0,
                ttl: 64,
                id: 0,
            };
            let neighbour = "192.0.2.254".parse().unwrap();
            let mut hop = Hop { link: LINK, neighbour, mtu: 1500, headers, is_resolved: true };
            change(&mut hop);
            self.peer.way.store(Some(Arc::new(LinkWay::new(&self.endpoint(), Some(hop)))));
        }

        /// Sends messages of these lengths, the first filled with 0, the next with 1, and so on.
        fn send(&mut self, lens: &[usize], tos: u8) -> Unsent {
            let messages: Vec<_> = (0..).zip(lens).map(|(i, &len)| vec![i; len]).collect();
            let endpoint = self.endpoint();
            let outgoing = |bytes| Outgoing { bytes, endpoint: &endpoint, tos };
            let datagrams: Vec<_> = messages.iter().map(|bytes| outgoing(&bytes[..])).collect();
            let exit = Exit::new(&self.sockets, &mut self.ports);
            exit.send_to_peers(&datagrams, &[(&self.peer, datagrams.len())], self.now)
        }

        fn turn(&mut self) {
            self.port().0.kick();
            self.now = self.now + Duration::from_millis(1);
            let now = self.now;
            let (port, pool) = self.port();
            port.reap(pool, now);
        }

        fn port(&mut self) -> (&mut XskPort, &mut Pool) {
            (&mut self.ports.ports[0], &mut self.ports.pools[0])
        }

        /// What has come by the socket: the first byte of each.
        fn by_socket(&self, count: usize) -> Vec<u8> {
            let mut buffer = [0; 2048];
            let one = |_| {
                self.receiver.recv(&mut buffer).unwrap();
                buffer[0]
            };
            (0..count).map(one).collect()
        }
    }

    #[test]
    fn messages_leave_by_the_xsk_in_order_behind_their_headers() {
        let mut setting = Setting::new();
        setting.peer.datagram_id.store(0x1_ffff, Ordering::Relaxed);
        assert_eq!(setting.send(&[32, 1000, 33], 2), Unsent { by_xsk: 3, ..Unsent::default() });
        setting.turn();
        for (i, len, id) in [(0, 32, 0xffff_u16), (1, 1000, 0), (2, 33, 1)] {
            let (_, frame) = setting.nic.take_transmitted().unwrap();
            let read = parse_frame(&frame).unwrap();
            let port = setting.sockets.v4.port();
            assert_eq!(read.src, SocketAddr::new("192.0.2.1".parse().unwrap(), port));
            assert_eq!((read.dst, read.tos), (setting.endpoint().remote, 2));
            assert_eq!(frame[read.payload], vec![i; len]);
            assert_eq!(frame[18..20], id.to_be_bytes());
        }
        assert!(setting.nic.take_transmitted().is_none());
        assert!(setting.peer.way.load().as_ref().unwrap().take_used());
    }

    #[test]
    fn what_is_doubtful_leaves_by_the_socket() {
        let mut setting = Setting::new();
        // IP and UDP take 28 bytes.
        let by_socket = |setting: &mut Setting, lens: &[usize], tos, expected: &[u8]| {
            let outcome = setting.send(lens, tos);
            assert_eq!(outcome.by_xsk, lens.len() - expected.len());
            assert_eq!((outcome.failed, outcome.no_room), (0, 0));
            assert_eq!(setting.by_socket(expected.len()), expected);
            while let Some((chunk, _)) = setting.nic.take_transmitted() {
                setting.nic.complete(chunk);
            }
            setting.turn();
            while let Some((chunk, _)) = setting.nic.take_transmitted() {
                setting.nic.complete(chunk);
            }
            setting.turn();
        };
        by_socket(&mut setting, &[1472, 1473, 1472], 0, &[1]);
        by_socket(&mut setting, &[32, 32], 0x88, &[0, 1]);
        setting.publish(|hop| hop.mtu = 9000);
        by_socket(&mut setting, &[1900, 32], 0, &[0]);
        setting.publish(|hop| hop.is_resolved = false);
        by_socket(&mut setting, &[32], 0, &[0]);
        setting.publish(|hop| hop.link = LINK + 1);
        by_socket(&mut setting, &[32], 0, &[0]);
        setting.publish(|_| {});
        by_socket(&mut setting, &[32], 0, &[]);
        let other = Endpoint::configured("192.0.2.9:1".parse().unwrap());
        let hop = *setting.peer.way.load().as_ref().unwrap().hop().unwrap();
        setting.peer.way.store(Some(Arc::new(LinkWay::new(&other, Some(hop)))));
        by_socket(&mut setting, &[32], 0, &[0]);
        setting.peer.forget_way();
        by_socket(&mut setting, &[32], 0, &[0]);
        setting.publish(|_| {});
        setting.port().0.transmits = false;
        by_socket(&mut setting, &[32], 0, &[0]);
    }

    #[test]
    fn a_ring_that_is_full_drops_and_one_that_is_stuck_is_passed_by() {
        let mut setting = Setting::new();
        let outcome = setting.send(&[32; 7], 0);
        assert_eq!(outcome, Unsent { by_xsk: ROOM, no_room: 7 - ROOM, ..Unsent::default() });
        for _ in 0..99 {
            setting.turn();
        }
        let outcome = setting.send(&[32], 0);
        assert_eq!(outcome, Unsent { no_room: 1, ..Unsent::default() }, "it would overtake");
        setting.turn();
        setting.turn();
        assert_eq!(setting.send(&[32], 0), Unsent::default());
        assert_eq!(setting.by_socket(1), [0]);
        // It moves again.
        let (chunk, _) = setting.nic.take_transmitted().unwrap();
        setting.nic.complete(chunk);
        setting.turn();
        let outcome = setting.send(&[32; 2], 0);
        assert_eq!(outcome, Unsent { by_xsk: 1, no_room: 1, ..Unsent::default() });
    }

    #[test]
    fn neither_direction_takes_what_the_other_needs() {
        let mut setting = Setting::new();
        // All that can be received is under way, and as much is sent as can be.
        let mut frames = ArrayVec::new();
        let mut delivered = 0;
        for _ in 0..10 {
            while setting.nic.deliver(&[0; 60]) {
                delivered += 1;
            }
            let (port, pool) = setting.port();
            port.xsk.receive(pool, &mut frames);
            // Only half of them come back at once.
            if let Some(frame) = frames.pop() {
                port.xsk.recycle(pool, frame);
            }
        }
        assert!(delivered >= SMALL.fill_level);
        assert_eq!(setting.send(&[32; ROOM], 0).by_xsk, ROOM);
        let (port, pool) = setting.port();
        frames.into_iter().for_each(|frame| port.xsk.recycle(pool, frame));
        assert!(setting.nic.deliver(&[0; 60]), "there is always something to receive into");
    }
}
