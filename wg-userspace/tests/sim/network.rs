//! The wires between hosts: loss, delay, reordering, duplication, corruption, and NAT boxes.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rand::rngs::StdRng;
use rand::{Rng, RngExt};

/// Nanoseconds of a millisecond.
pub const MS: u64 = 1_000_000;
/// Nanoseconds of a second.
pub const SECOND: u64 = 1_000 * MS;

/// A datagram under way.
#[derive(Clone, Debug)]
pub struct Flight {
    pub bytes: Vec<u8>,
    pub from: SocketAddr,
    pub to: SocketAddr,
}

/// What a host's wire does to datagrams, in either direction.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Least time that a datagram takes.
    pub delay: u64,
    /// Up to so much more, drawn for each.
    pub jitter: u64,
    pub loss: f64,
    pub duplication: f64,
    pub corruption: f64,
    /// Whether one may overtake another.
    pub reorders: bool,
}

impl Weather {
    /// Nothing is lost, late or changed.
    pub fn fair(delay: u64) -> Self {
        let (loss, duplication, corruption) = (0.0, 0.0, 0.0);
        Self { delay, jitter: 0, loss, duplication, corruption, reorders: false }
    }

    /// Anything from fair to nearly cut off.
    pub fn drawn(rng: &mut StdRng) -> Self {
        Self {
            delay: rng.random_range(0..80 * MS),
            jitter: if rng.random_bool(0.5) { rng.random_range(0..400 * MS) } else { 0 },
            loss: [0.0, 0.02, 0.2, 0.6, 0.95][rng.random_range(0..5)],
            duplication: [0.0, 0.05, 0.3][rng.random_range(0..3)],
            corruption: [0.0, 0.0, 0.1][rng.random_range(0..3)],
            reorders: rng.random_bool(0.5),
        }
    }
}

/// The wires of all hosts.
#[derive(Default)]
pub struct Network {
    /// When the last datagram between two hosts arrives.
    last: HashMap<(usize, usize), u64>,
}

impl Network {
    /// The copies of a datagram that arrive, each with its moment.
    pub fn carry(
        &mut self,
        rng: &mut StdRng,
        (from, to): ((usize, Weather), (usize, Weather)),
        flight: Flight,
        now: u64,
    ) -> Vec<(u64, Flight)> {
        let ((from, out), (to, back)) = (from, to);
        let mut arriving = Vec::new();
        let copies = 1 + usize::from(rng.random_bool(out.duplication.max(back.duplication)));
        for _ in 0..copies {
            if rng.random_bool(out.loss.max(back.loss)) {
                continue;
            }
            let jitter = out.jitter.max(back.jitter);
            let mut at = now + out.delay + back.delay;
            if jitter > 0 {
                at += rng.random_range(0..jitter);
            }
            let last = self.last.entry((from, to)).or_default();
            if !out.reorders && !back.reorders {
                at = at.max(*last + 1);
            }
            *last = at.max(*last);
            let mut copy = flight.clone();
            if rng.random_bool(out.corruption.max(back.corruption)) {
                corrupt(rng, &mut copy.bytes);
            }
            arriving.push((at, copy));
        }
        arriving
    }
}

/// Changes some bits, the length, or all.
pub fn corrupt(rng: &mut StdRng, bytes: &mut Vec<u8>) {
    match rng.random_range(0..4) {
        0 | 1 => {
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] ^= 1 << rng.random_range(0..8);
            }
        }
        2 => bytes.truncate(rng.random_range(1..=bytes.len())),
        _ => {
            let mut more = vec![0; rng.random_range(1..64)];
            rng.fill_bytes(&mut more);
            bytes.extend_from_slice(&more);
        }
    }
}

/// The address of host `number`'s wire, of which it has had `moves` others before.
pub fn public_v4(number: usize, moves: u16) -> IpAddr {
    let [high, low] = moves.to_be_bytes();
    Ipv4Addr::new(60 + number as u8, high, low, 1).into()
}

/// As [`public_v4`], for IPv6.
pub fn public_v6(number: usize, moves: u16) -> IpAddr {
    Ipv6Addr::new(0x2001, 0xdb8, number as u16, moves, 0, 0, 0, 1).into()
}

/// An address from which only strangers send to `to`.
pub fn foreign(rng: &mut StdRng, to: SocketAddr) -> SocketAddr {
    let (last, port) = (rng.random_range(1..255), rng.random_range(1024..65535));
    if to.is_ipv4() {
        (Ipv4Addr::new(203, 0, 113, last), port).into()
    } else {
        (Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, last.into()), port).into()
    }
}
