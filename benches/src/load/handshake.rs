//! Handshakes of all peers before a flood, by boringtun: it shares no code with the gateway that it measures.
//!
//! The first goes slowly, and each that succeeds makes the next come a little sooner, up to where the gateway
//! demands cookies: then it answers only a few initiations a second of one address, and all take longer.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use boringtun::noise::{Tunn, TunnResult};
use wg_common::message::{Message, classify};
use wg_userspace::key::PublicKey;

use super::peers::Peer;
use super::report::HandshakesDone;
use super::sockets::Sockets;

/// Handshakes under way at a time, at most.
const IN_FLIGHT_MAX: usize = 32;
/// An initiation without an answer is sent once more after this time.
const REPEAT_AFTER: Duration = Duration::from_secs(1);
/// Bytes of the longest message of a handshake, or of what boringtun says behind it.
const MESSAGE_LEN_MAX: usize = 256;
/// Bits of a receiver index that number the sessions of one peer, in boringtun.
const SESSION_BITS: u32 = 8;

/// How soon the next peer begins.
#[derive(Clone, Copy, Debug)]
struct Interval {
    now: Duration,
    least: Duration,
}

impl Interval {
    const FIRST: Duration = Duration::from_millis(4);
    const MOST: Duration = Duration::from_millis(200);
    const LEAST: Duration = Duration::from_micros(150);
    /// How long a gateway that was under load demands cookies, and a little.
    const REST: Duration = Duration::from_millis(1100);

    const fn new() -> Self {
        Self { now: Self::FIRST, least: Self::LEAST }
    }

    /// A handshake succeeded.
    fn shorten(&mut self) {
        self.now = (self.now * 49 / 50).max(self.least);
    }

    /// The gateway demanded a cookie: it was too soon by a quarter at least.
    fn lengthen(&mut self) {
        self.least = (self.now * 5 / 4).clamp(self.least, Self::MOST);
        self.now = (self.now * 2).clamp(self.least, Self::MOST);
    }
}

struct Flight {
    peer: Peer,
    tunn: Tunn,
    sent: Instant,
}

/// Shakes hands with the gateway for each of `peers`. `done` gets each session, which may send from then on, and
/// may keep it or not.
///
/// # Errors
/// If a peer has had no answer when `patience` is over after the last that had one, or `done` fails.
pub fn shake_hands(
    sockets: &mut Sockets,
    gateway: PublicKey,
    peers: impl Iterator<Item = Peer>,
    patience: Duration,
    mut done: impl FnMut(&Peer, Tunn) -> Result<()>,
) -> Result<HandshakesDone> {
    let begin = Instant::now();
    let mut report = HandshakesDone::default();
    let mut peers = peers.peekable();
    let mut flights: HashMap<u32, Flight> = HashMap::new();
    let mut interval = Interval::new();
    let (mut next_at, mut last_success) = (begin, begin);
    let mut room = [0; MESSAGE_LEN_MAX];
    while peers.peek().is_some() || !flights.is_empty() {
        let now = Instant::now();
        if now >= next_at
            && flights.len() < IN_FLIGHT_MAX
            && let Some(peer) = peers.next()
        {
            next_at = now + interval.now;
            let mut tunn = Tunn::new(
                peer.private_key.into(),
                (*gateway.as_bytes()).into(),
                None,
                None,
                peer.number,
                None,
            );
            initiate(&mut tunn, peer.number, sockets, &mut room)?;
            flights.insert(peer.number, Flight { peer, tunn, sent: Instant::now() });
        }
        let may_begin = flights.len() < IN_FLIGHT_MAX && peers.peek().is_some();
        let pause = if may_begin {
            next_at.saturating_duration_since(Instant::now())
        } else {
            REPEAT_AFTER / 10
        };

        let mut finished: Vec<Flight> = Vec::new();
        let mut asked: Vec<u32> = Vec::new();
        let mut keepalives: Vec<(u32, Vec<u8>)> = Vec::new();
        sockets.receive(pause.min(REPEAT_AFTER / 10), |message| {
            let Some(number) = addressee(message) else { return Ok(()) };
            let Some(flight) = flights.get_mut(&number) else { return Ok(()) };
            match flight.tunn.decapsulate(None, message, &mut room) {
                // The keepalive, without which the gateway must not send.
                TunnResult::WriteToNetwork(keepalive) => {
                    keepalives.push((number, keepalive.to_vec()));
                    finished.extend(flights.remove(&number));
                }
                TunnResult::Done => asked.push(number),
                // Not for this handshake, or not the gateway's: the right one may still come.
                _ => {}
            }
            Ok(())
        })?;
        for (number, keepalive) in keepalives {
            sockets.send(number, &keepalive, None)?;
        }
        for flight in finished {
            report.count += 1;
            interval.shorten();
            done(&flight.peer, flight.tunn)?;
            last_success = Instant::now();
        }
        if !asked.is_empty() {
            report.cookies += asked.len() as u32;
            interval.lengthen();
            next_at = Instant::now() + Interval::REST;
            for number in asked {
                let flight = flights.get_mut(&number).expect("it was asked");
                // Not at once: all that were asked would come at once.
                flight.sent = Instant::now();
            }
        }
        for (number, flight) in &mut flights {
            if flight.sent.elapsed() >= REPEAT_AFTER {
                report.repeated += 1;
                flight.sent = Instant::now();
                initiate(&mut flight.tunn, *number, sockets, &mut room)?;
            }
        }
        if last_success.elapsed() > patience {
            let left = flights.len() + peers.count();
            bail!(
                "{left} of {} handshakes had no answer for {patience:?}; is the gateway there, has it this key, and these \
                 peers (`tidegate-load peers`)?",
                left + report.count as usize
            );
        }
    }
    report.seconds = begin.elapsed().as_secs_f64();
    Ok(report)
}

fn initiate(tunn: &mut Tunn, number: u32, sockets: &Sockets, room: &mut [u8]) -> Result<()> {
    match tunn.format_handshake_initiation(room, true) {
        TunnResult::WriteToNetwork(initiation) => {
            // One that there is no room for is as good as lost.
            sockets.send(number, initiation, None)?;
            Ok(())
        }
        other => bail!("boringtun makes no initiation: {other:?}"),
    }
}

/// The number of the peer that a message of a handshake is for.
fn addressee(message: &[u8]) -> Option<u32> {
    match classify(message).ok()? {
        Message::Response(index) | Message::CookieReply(index) => {
            Some(u32::from_le_bytes(index.to_wire()) >> SESSION_BITS)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::sync::Arc;

    use boringtun::noise::rate_limiter::RateLimiter;
    use boringtun::x25519::{PublicKey as Point, StaticSecret};

    use super::super::arguments::Seed;
    use super::*;

    const GATEWAY: [u8; 32] = [7; 32];

    fn gateway_key() -> PublicKey {
        PublicKey::from_bytes(*Point::from(&StaticSecret::from(GATEWAY)).as_bytes())
    }

    fn seed() -> Seed {
        Seed { seed: 1, network: "10.64.0.0/10".parse().unwrap() }
    }

    /// A gateway by boringtun that loses the first initiation of each peer, demands a cookie of the next, and answers
    /// then. Ends when `count` keepalives have come.
    fn reluctant_gateway(socket: &UdpSocket, count: usize) {
        let secret = StaticSecret::from(GATEWAY);
        // None may come without a cookie.
        let limiter = Arc::new(RateLimiter::new(&Point::from(&secret), 0));
        let mut tunns: Vec<Tunn> = seed()
            .peers(count as u32)
            .unwrap()
            .map(|peer| {
                let of_peer = Point::from(*peer.public_key().as_bytes());
                let limiter = Some(Arc::clone(&limiter));
                Tunn::new(secret.clone(), of_peer, None, None, 100 + peer.number, limiter)
            })
            .collect();
        let (mut met, mut keepalives) = (std::collections::HashSet::new(), 0);
        let (mut datagram, mut room) = ([0; 2048], [0; 2048]);
        while keepalives < count {
            let (len, from) = socket.recv_from(&mut datagram).unwrap();
            let datagram = &datagram[..len];
            if datagram[0] == 1 && met.insert(datagram[5]) {
                continue;
            }
            for tunn in &mut tunns {
                match tunn.decapsulate(Some(from.ip()), datagram, &mut room) {
                    TunnResult::WriteToNetwork(answer) => {
                        socket.send_to(answer, from).unwrap();
                        break;
                    }
                    TunnResult::Done => {
                        keepalives += 1;
                        break;
                    }
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn hands_are_shaken_in_spite_of_loss_and_cookies() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut sockets = Sockets::open(socket.local_addr().unwrap(), 2).unwrap();
        let gateway = std::thread::spawn(move || reluctant_gateway(&socket, 3));
        let mut numbers = Vec::new();
        let seed = seed();
        let peers = seed.peers(3).unwrap();
        let done = |peer: &Peer, mut tunn: Tunn| {
            let mut room = [0; 200];
            assert!(matches!(tunn.encapsulate(&[0; 16], &mut room), TunnResult::WriteToNetwork(_)));
            assert_eq!(room[0], 4, "it has a session");
            numbers.push(peer.number);
            Ok(())
        };
        let limit = Duration::from_secs(20);
        let report = shake_hands(&mut sockets, gateway_key(), peers, limit, done).unwrap();
        gateway.join().unwrap();
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 1, 2]);
        assert_eq!((report.count, report.cookies), (3, 3));
        assert!(report.repeated >= 6, "{report:?}");
    }

    #[test]
    fn a_gateway_that_does_not_answer_is_given_up() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut sockets = Sockets::open(socket.local_addr().unwrap(), 1).unwrap();
        let patience = Duration::from_millis(300);
        let begin = Instant::now();
        let seed = seed();
        let peers = seed.peers(5).unwrap();
        let error = shake_hands(&mut sockets, gateway_key(), peers, patience, |_, _| {
            panic!("nobody is there")
        })
        .unwrap_err();
        assert!(error.to_string().contains("5 of 5"), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn handshakes_come_sooner_until_cookies_are_demanded() {
        let mut interval = Interval::new();
        for _ in 0..1000 {
            interval.shorten();
        }
        assert_eq!(interval.now, Interval::LEAST);
        interval.lengthen();
        assert_eq!(interval.now, Interval::LEAST * 2);
        for _ in 0..1000 {
            interval.shorten();
        }
        assert_eq!(interval.now, Interval::LEAST * 5 / 4, "not as soon as before");
        for _ in 0..100 {
            interval.lengthen();
        }
        assert_eq!(interval.now, Interval::MOST);
    }

    #[test]
    fn only_messages_of_a_handshake_have_an_addressee() {
        let mut response = [0; 92];
        response[0] = 2;
        response[8..12].copy_from_slice(&(0x1234_u32 << 8 | 1).to_le_bytes());
        assert_eq!(addressee(&response), Some(0x1234));
        let mut reply = [0; 64];
        reply[0] = 3;
        reply[4..8].copy_from_slice(&(5_u32 << 8).to_le_bytes());
        assert_eq!(addressee(&reply), Some(5));
        for message in [&[][..], &[2], &response[..91], &[4; 64], &[1; 148]] {
            assert_eq!(addressee(message), None);
        }
    }
}
