//! What a simulated device sees of the world outside: its randomness, its wall clock, its sockets.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use rand::rngs::StdRng;
use rand::{SeedableRng, TryCryptoRng, TryRng};
use wg_common::endpoint::Endpoint;
use wg_common::id::WorkerId;
use wg_userspace::datapath::inbound::PacketSink;
use wg_userspace::datapath::outbound::{DatagramSink, Outgoing, PacketSource, Unsent};
use wg_userspace::handshake::Outside;
use wg_userspace::noise::Timestamp;
use wg_userspace::segments::{Run, VnetHeader};

/// A datagram that left a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sent {
    pub bytes: Vec<u8>,
    pub to: Endpoint,
    pub tos: u8,
}

/// The world outside of one device. Copies are the same world.
#[derive(Clone)]
pub struct SimOutside(Arc<Mutex<State>>);

struct State {
    rng: StdRng,
    wall: Timestamp,
    /// Our own addresses.
    addresses: Vec<IpAddr>,
    socket_fails: bool,
    sent: Vec<Sent>,
}

impl SimOutside {
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            rng: StdRng::seed_from_u64(seed),
            wall: Timestamp::default(),
            addresses: Vec::new(),
            socket_fails: false,
            sent: Vec::new(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("one thread has it")
    }

    /// Begins another stream of randomness, as a kernel does that learns that it was cloned.
    pub fn reseed(&self, seed: u64) {
        self.state().rng = StdRng::seed_from_u64(seed);
    }

    /// Sets what the device finds when it looks next.
    pub fn set(&self, wall: Timestamp, addresses: &[IpAddr], socket_fails: bool) {
        let mut state = self.state();
        state.wall = wall;
        state.addresses.clear();
        state.addresses.extend_from_slice(addresses);
        state.socket_fails = socket_fails;
    }

    /// What was sent since the last call.
    pub fn take_sent(&self) -> Vec<Sent> {
        std::mem::take(&mut self.state().sent)
    }
}

impl State {
    /// Sends one datagram. Says whether it went, and whether its endpoint names an address of ours
    /// that is gone.
    fn send(&mut self, bytes: &[u8], to: &Endpoint, tos: u8) -> (bool, bool) {
        let reachable = self.addresses.iter().any(|own| own.is_ipv4() == to.remote.is_ipv4());
        if self.socket_fails || !reachable {
            return (false, false);
        }
        self.sent.push(Sent { bytes: bytes.to_vec(), to: *to, tos });
        (true, to.local.is_some_and(|local| !self.addresses.contains(&local.addr)))
    }
}

impl DatagramSink for SimOutside {
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
        let mut state = self.state();
        let mut unsent = Unsent::default();
        for (place, datagram) in datagrams.iter().enumerate() {
            let (went, stale) = state.send(datagram.bytes, datagram.endpoint, datagram.tos);
            unsent.failed += usize::from(!went);
            unsent.stale_sources |= u64::from(stale) << place;
        }
        unsent
    }
}

impl Outside for SimOutside {
    type Rng = SimRng;

    fn rng(&self) -> SimRng {
        SimRng(self.clone())
    }

    fn wall(&self) -> Timestamp {
        self.state().wall
    }

    fn send(&self, _worker: WorkerId, message: &[u8], to: &Endpoint, tos: u8) -> bool {
        self.state().send(message, to, tos).0
    }
}

/// The randomness of one device.
pub struct SimRng(SimOutside);

impl TryRng for SimRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        self.0.state().rng.try_next_u32()
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        self.0.state().rng.try_next_u64()
    }

    fn try_fill_bytes(&mut self, dst: &mut [u8]) -> Result<(), Infallible> {
        self.0.state().rng.try_fill_bytes(dst)
    }
}

impl TryCryptoRng for SimRng {}

/// A queue of a TUN device whose far end is the simulation.
#[derive(Default)]
pub struct SimTun {
    pub to_read: RefCell<VecDeque<Vec<u8>>>,
    /// What was read since somebody looked.
    pub read: RefCell<Vec<Vec<u8>>>,
    pub written: RefCell<Vec<Vec<u8>>>,
    /// It takes nothing.
    pub full: Cell<bool>,
}

impl PacketSource for SimTun {
    fn read(&self, buffer: &mut [u8]) -> io::Result<Option<(VnetHeader, usize)>> {
        let Some(packet) = self.to_read.borrow_mut().pop_front() else { return Ok(None) };
        buffer[..packet.len()].copy_from_slice(&packet);
        let len = packet.len();
        self.read.borrow_mut().push(packet);
        Ok(Some((VnetHeader::PLAIN, len)))
    }
}

impl PacketSink for SimTun {
    fn write(&self, run: &Run<'_>) -> io::Result<()> {
        if self.full.get() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.written.borrow_mut().extend(run.packets().map(<[u8]>::to_vec));
        Ok(())
    }
}
