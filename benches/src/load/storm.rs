//! A storm of handshake initiations: they are made before it begins, so that what is measured is the gateway.
//!
//! Here the noise is Tidegate's own, since boringtun makes no initiation in advance. A part of the responses is looked
//! at closely afterwards: each has to finish its handshake.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use wg_common::id::ReceiverIndex;
use wg_common::message::{Message, classify};
use wg_common::protocol::{COOKIE_REPLY_LEN, INITIATION_LEN, MAC_LEN, RESPONSE_LEN};
use wg_userspace::key::{PresharedKey, PrivateKey, PublicKey};
use wg_userspace::noise::{
    Cookie, Identity, Initiator, RemoteStatic, Timestamp, initiate, mac, mac1_of,
};
use wg_userspace::sys::clock;
use wg_userspace::sys::random::Rng;

use super::arguments::Handshakes;
use super::pace::Pacer;
use super::peers::Peer;
use super::percentiles::Percentiles;
use super::report::StormReport;
use super::sockets::Sockets;
use super::target;

/// A peer's next initiation comes so much later at the soonest: gateways ignore what comes within 20 ms, and some
/// within more.
const PEER_INTERVAL: Duration = Duration::from_millis(25);
/// Initiations per second that are made where no rate is given: more than a core of any gateway answers.
const RATE_MAX: f64 = 15_000.0;
/// Initiations of one storm at most: 44 MB.
const INITIATIONS_MAX: u64 = 300_000;
/// Responses that are looked at closely, at most.
const SAMPLES_MAX: u64 = 1000;
/// An initiation without an answer for so long is taken for lost, and another one sent instead. An answer that comes
/// later still counts.
const LOST_AFTER: Duration = Duration::from_millis(300);
/// What a late sender makes up for.
const DEBT_NS: u64 = 20_000_000;
/// boringtun's timestamps have 37 seconds between TAI and UTC, Tidegate's 10. With as many, a peer of this storm and
/// one of a flood, which is the same peer, never seem to repeat what the other has sent.
const BORINGTUN_AHEAD_S: u64 = 27;

/// One initiation, from when it is made to when it is answered.
struct Initiation {
    message: [u8; INITIATION_LEN],
    /// Since the storm began; when it was to be sent, if there is a rate.
    sent: Option<Duration>,
    answered: bool,
    /// Whether it was taken for lost.
    lost: bool,
    /// Whether it was sent once more, with a cookie.
    has_cookie: bool,
}

/// One whose response is looked at closely.
struct Sample {
    at: usize,
    initiator: Initiator,
    response: Option<[u8; RESPONSE_LEN]>,
}

/// Prepares initiations, sends them, and counts the responses.
///
/// # Errors
/// If the destination is none that may have load, the arguments make no sense, or the kernel refuses.
pub fn storm(arguments: &Handshakes) -> Result<StormReport> {
    let gateway = &arguments.gateway;
    target::way(gateway.to, gateway.nic.as_deref())?;
    let peers: Vec<Peer> = gateway.seed.peers(arguments.count)?.collect();
    let count = initiation_count(arguments)?;
    if let Some(from) = &arguments.from {
        ensure!(
            from.addr().is_ipv4() == gateway.to.is_ipv4(),
            "{from} and {} are of different IP versions",
            gateway.to
        );
    }
    let mut sockets = Sockets::open(gateway.to, arguments.ports)?;
    let (initiations, samples) = prepare(gateway.server_key, &peers, count)?;
    let mut storm = Storm {
        arguments,
        remote: remote_of(&peers[0], gateway.server_key).1,
        initiations,
        samples,
        next: 0,
        cookies: HashMap::new(),
        cookie_count: 0,
        waiting: VecDeque::new(),
        outstanding: 0,
        answered: 0,
        latencies_ns: Vec::new(),
    };
    let (seconds, forgiven) = storm.run(&mut sockets)?;
    storm.report(&peers, seconds, forgiven)
}

/// How many initiations a storm needs at most.
fn initiation_count(arguments: &Handshakes) -> Result<u64> {
    let seconds = arguments.seconds;
    ensure!(arguments.outstanding > 0, "one initiation must wait at least");
    let per_peer = (seconds / PEER_INTERVAL.as_secs_f64()).ceil().max(1.0);
    let most = (per_peer * f64::from(arguments.count)) as u64;
    match arguments.rate {
        Some(rate) => {
            ensure!(rate.is_finite() && rate >= 1.0, "a rate of {rate} is none");
            let wanted = ((rate * seconds).round() as u64).max(1);
            ensure!(
                wanted <= most,
                "{} peers send {} initiations per second at most, not {rate}; give a higher --count",
                arguments.count,
                most as f64 / seconds
            );
            ensure!(
                wanted <= INITIATIONS_MAX,
                "{wanted} initiations are more than {INITIATIONS_MAX}"
            );
            Ok(wanted)
        }
        None => Ok(most.min((RATE_MAX * seconds).ceil() as u64).clamp(1, INITIATIONS_MAX)),
    }
}

fn remote_of(peer: &Peer, gateway: PublicKey) -> (Identity, RemoteStatic) {
    let identity = Identity::new(PrivateKey::from_bytes(peer.private_key));
    let remote = RemoteStatic::new(&identity, gateway, PresharedKey::default());
    (identity, remote)
}

/// Makes `count` initiations of the peers in turn, on all cores.
fn prepare(
    gateway: PublicKey,
    peers: &[Peer],
    count: u64,
) -> Result<(Vec<Initiation>, Vec<Sample>)> {
    let thread_count = std::thread::available_parallelism().map_or(1, usize::from);
    let sample_every = count.div_ceil(SAMPLES_MAX).max(1);
    let (seconds, nanos) = clock::wall();
    let begin = Duration::new(seconds + BORINGTUN_AHEAD_S, nanos);
    let of_peer = |peer: &Peer| -> Result<Vec<(u64, [u8; INITIATION_LEN], Initiator)>> {
        let (identity, remote) = remote_of(peer, gateway);
        let numbers = (u64::from(peer.number)..count).step_by(peers.len()).zip(0..);
        numbers
            .map(|(at, round)| {
                // None is sent before this time, so that no later run is refused for it.
                let time = begin + PEER_INTERVAL * round;
                let timestamp = Timestamp::from_unix(time.as_secs(), time.subsec_nanos());
                let index = ReceiverIndex::from_wire((at as u32).to_le_bytes());
                let (initiator, message) =
                    initiate(&identity, &remote, index, timestamp, None, &mut Rng)
                        .context("the gateway's public key makes no secret")?;
                Ok((at, message, initiator))
            })
            .collect()
    };
    let mut messages = vec![[0; INITIATION_LEN]; count as usize];
    let mut samples = Vec::new();
    // A portion at a time: what is kept of an initiation for its response is larger than the message.
    for portion in peers.chunks(64 * thread_count) {
        let made = std::thread::scope(|scope| {
            let threads: Vec<_> = portion
                .chunks(portion.len().div_ceil(thread_count))
                .map(|peers| scope.spawn(|| peers.iter().map(of_peer).collect::<Result<Vec<_>>>()))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect::<Result<Vec<_>>>()
        })?;
        for (at, message, initiator) in made.into_iter().flatten().flatten() {
            messages[at as usize] = message;
            if at.is_multiple_of(sample_every) {
                samples.push(Sample { at: at as usize, initiator, response: None });
            }
        }
    }
    samples.sort_by_key(|sample| sample.at);
    let initiation = |message| Initiation {
        message,
        sent: None,
        answered: false,
        lost: false,
        has_cookie: false,
    };
    Ok((messages.into_iter().map(initiation).collect(), samples))
}

struct Storm<'a> {
    arguments: &'a Handshakes,
    /// The gateway, as any peer sees it: what opens its cookie replies.
    remote: RemoteStatic,
    initiations: Vec<Initiation>,
    samples: Vec<Sample>,
    /// The one to send next.
    next: usize,
    /// By the socket and the address from which messages leave, to which a cookie is bound.
    cookies: HashMap<(u32, Option<IpAddr>), Cookie>,
    cookie_count: u64,
    /// Sent and perhaps not answered yet, in order, with the time after which they are lost.
    waiting: VecDeque<(usize, Duration)>,
    /// How many were sent and are neither answered nor lost.
    outstanding: u32,
    answered: u64,
    latencies_ns: Vec<u64>,
}

impl Storm<'_> {
    /// Sends and receives until the time is over, at a given rate until the last answers have come, too; gives the time
    /// taken, and how many initiations were given up.
    fn run(&mut self, sockets: &mut Sockets) -> Result<(f64, u64)> {
        let mut pacer = self.arguments.rate.map(|rate| Pacer::new(rate, 0, DEBT_NS, 1));
        // The last is due when the time is over.
        let slack = if pacer.is_some() { 0.05 } else { 0.0 };
        let limit = Duration::from_secs_f64(self.arguments.seconds * (1.0 + slack) + slack);
        let begin = Instant::now();
        let mut last = Duration::ZERO;
        loop {
            let now = begin.elapsed();
            self.give_up(now);
            let is_over = now >= limit;
            let left = if is_over { 0 } else { self.initiations.len() - self.next };
            if left == 0 && self.outstanding == 0 {
                break;
            }
            if is_over && pacer.is_none() {
                last = now;
                break;
            }
            let due = match &mut pacer {
                Some(pacer) => pacer.due(self.next as u64, now.as_nanos() as u64) as usize,
                None => self.arguments.outstanding.saturating_sub(self.outstanding) as usize,
            };
            let mut is_idle = true;
            // A few, then it listens again: else answers would wait here.
            for _ in 0..due.min(left).min(16) {
                if now < self.not_before(self.next) {
                    break;
                }
                let sent = match self.arguments.rate {
                    Some(rate) => Duration::from_secs_f64((self.next + 1) as f64 / rate).min(now),
                    None => begin.elapsed(),
                };
                self.initiations[self.next].sent = Some(sent);
                self.send(self.next, sockets)?;
                self.waiting.push_back((self.next, now + LOST_AFTER));
                self.next += 1;
                self.outstanding += 1;
                last = begin.elapsed();
                is_idle = false;
            }
            let pause = Duration::from_micros(if is_idle { 200 } else { 0 });
            let mut again = Vec::new();
            sockets.receive(pause, |message| {
                last = begin.elapsed();
                again.extend(self.take(message, last));
                Ok(())
            })?;
            for at in again {
                self.send(at, sockets)?;
            }
        }
        let forgiven = pacer.map_or(0, |pacer| pacer.forgiven());
        Ok((last.as_secs_f64().max(1e-9), forgiven))
    }

    /// Takes those for lost that had no answer for too long.
    fn give_up(&mut self, now: Duration) {
        while let Some(&(at, lost_at)) = self.waiting.front() {
            let initiation = &mut self.initiations[at];
            if !initiation.answered && now < lost_at {
                break;
            }
            if !initiation.answered {
                initiation.lost = true;
                self.outstanding -= 1;
            }
            self.waiting.pop_front();
        }
    }

    /// When initiation `at` may be sent, by its peer's interval.
    fn not_before(&self, at: usize) -> Duration {
        PEER_INTERVAL * (at as u32 / self.arguments.count)
    }

    fn peer(&self, at: usize) -> u32 {
        at as u32 % self.arguments.count
    }

    fn source(&self, at: usize) -> Option<IpAddr> {
        self.arguments.from.as_ref().map(|prefix| nth_address(prefix, self.peer(at)))
    }

    /// What a cookie for initiation `at` is bound to.
    fn cookie_of(&self, at: usize) -> (u32, Option<IpAddr>) {
        (self.peer(at) % u32::from(self.arguments.ports), self.source(at))
    }

    /// Sends it, with the cookie of its port and address if there is one.
    fn send(&mut self, at: usize, sockets: &Sockets) -> Result<()> {
        let (peer, source) = (self.peer(at), self.source(at));
        if let Some(cookie) = self.cookies.get(&self.cookie_of(at)) {
            write_mac2(&mut self.initiations[at].message, cookie);
        }
        sockets.send(peer, &self.initiations[at].message, source)?;
        Ok(())
    }

    /// Takes a message of the gateway's; gives the initiation that is to be sent again, now with a cookie.
    fn take(&mut self, message: &[u8], now: Duration) -> Option<usize> {
        match classify(message).ok()? {
            Message::Response(index) => {
                let at = u32::from_le_bytes(index.to_wire()) as usize;
                let initiation = self.initiations.get_mut(at)?;
                let sent = initiation.sent.filter(|_| !initiation.answered)?;
                initiation.answered = true;
                self.answered += 1;
                // One that comes late was given up before.
                self.outstanding -= u32::from(!initiation.lost);
                self.latencies_ns.push(now.saturating_sub(sent).as_nanos() as u64);
                if let Ok(sample) = self.samples.binary_search_by_key(&at, |sample| sample.at) {
                    self.samples[sample].response = message.try_into().ok();
                }
                None
            }
            Message::CookieReply(index) => {
                let at = u32::from_le_bytes(index.to_wire()) as usize;
                let reply: &[u8; COOKIE_REPLY_LEN] = message.try_into().ok()?;
                let initiation = self.initiations.get(at)?;
                if initiation.sent.is_none() || initiation.answered {
                    return None;
                }
                let mac1 = mac1_of(&initiation.message)?;
                let cookie = Cookie::open_reply(reply, &self.remote, index, &mac1).ok()?;
                self.cookie_count += 1;
                let initiation = &mut self.initiations[at];
                // Once: a gateway that asks again has too many of this address.
                let first = !std::mem::replace(&mut initiation.has_cookie, true);
                let bound_to = self.cookie_of(at);
                self.cookies.insert(bound_to, cookie);
                first.then_some(at)
            }
            _ => None,
        }
    }

    fn report(mut self, peers: &[Peer], seconds: f64, forgiven: u64) -> Result<StormReport> {
        let (mut verified, mut false_responses) = (0, 0);
        for sample in &self.samples {
            let Some(response) = &sample.response else { continue };
            let peer = &peers[sample.at % peers.len()];
            let (identity, remote) = remote_of(peer, self.arguments.gateway.server_key);
            match sample.initiator.finish(&identity, &remote, response) {
                Ok(_) => verified += 1,
                Err(_) => false_responses += 1,
            }
        }
        let sent = self.next as u64;
        let all_sent = self.next == self.initiations.len();
        let mut warnings = Vec::new();
        let late = self.arguments.rate.is_some_and(|rate| forgiven as f64 > rate * seconds / 100.0);
        if late {
            warnings.push(format!("this machine was too late for {forgiven} initiations"));
        }
        let by_peers = f64::from(self.arguments.count) / PEER_INTERVAL.as_secs_f64();
        let few = self.arguments.rate.is_none() && sent as f64 > by_peers * seconds * 0.9;
        if few {
            warnings.push(format!(
                "{} peers send {by_peers:.0} initiations per second at most: give a higher --count",
                self.arguments.count
            ));
        }
        let used_up = self.arguments.rate.is_none() && all_sent && !few;
        if used_up {
            warnings
                .push("all initiations that were made were sent: give less --seconds".to_owned());
        }
        if self.cookie_count > 0 {
            let addresses = match &self.arguments.from {
                Some(from) => from.to_string(),
                None => "one address".to_owned(),
            };
            warnings.push(format!(
                "the gateway demanded cookies: it may answer few initiations of each address, as 20 per second; they \
                 came from {addresses} (--from)"
            ));
        }
        if false_responses > 0 {
            warnings.push(format!("{false_responses} responses do not finish their handshakes"));
        }
        Ok(StormReport {
            sent,
            answered: self.answered,
            cookies: self.cookie_count,
            verified,
            false_responses,
            seconds,
            sent_per_second: sent as f64 / seconds,
            answered_per_second: self.answered as f64 / seconds,
            latency_us: Percentiles::of(&mut self.latencies_ns),
            ended: if used_up { "initiations" } else { "time" }.to_owned(),
            limited_by_sender: late || few || used_up,
            warnings,
        })
    }
}

/// The address of a prefix that a peer has.
fn nth_address(prefix: &IpNet, peer: u32) -> IpAddr {
    let host_bits = u32::from(prefix.max_prefix_len() - prefix.prefix_len());
    // The first is the network's own, where there are several.
    let room = 1_u64.checked_shl(host_bits).unwrap_or(u64::MAX);
    let nth = if room > 2 { 1 + u64::from(peer) % (room - 2) } else { u64::from(peer) % room };
    match prefix.network() {
        IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits() + nth as u32).into(),
        IpAddr::V6(first) => Ipv6Addr::from_bits(first.to_bits() + u128::from(nth)).into(),
    }
}

fn write_mac2(message: &mut [u8; INITIATION_LEN], cookie: &Cookie) {
    let (covered, mac2) = message.split_last_chunk_mut::<MAC_LEN>().expect("longer than a mac");
    *mac2 = mac(cookie.expose(), covered);
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use clap::Parser;
    use wg_userspace::noise::{CookieSecret, check_mac2, open_initiation};

    use super::super::arguments::{Arguments, Command};
    use super::*;

    fn arguments(to: std::net::SocketAddr, key: &PublicKey, options: &str) -> Handshakes {
        let line = format!("load handshakes --to {to} --server-key {key} {options}");
        match Arguments::try_parse_from(line.split_whitespace()).unwrap().command {
            Command::Handshakes(arguments) => arguments,
            other => panic!("{other:?}"),
        }
    }

    /// A gateway that demands cookies, if it is told so, and answers everything else, as it should or with noise.
    fn gateway(
        socket: &UdpSocket,
        identity: &Identity,
        peers: &[Peer],
        with_cookies: bool,
        truthful: bool,
    ) -> u64 {
        let remotes: HashMap<PublicKey, RemoteStatic> = peers
            .iter()
            .map(|peer| {
                let key = peer.public_key();
                (key, RemoteStatic::new(identity, key, PresharedKey::default()))
            })
            .collect();
        let secret = CookieSecret::generate(&mut Rng);
        let mut stamps: HashMap<PublicKey, Timestamp> = HashMap::new();
        let (mut datagram, mut count) = ([0; 2048], 0);
        while let Ok((len, from)) = socket.recv_from(&mut datagram) {
            let Ok(message) = <&[u8; INITIATION_LEN]>::try_from(&datagram[..len]) else { continue };
            let cookie = secret.cookie(from);
            if with_cookies && !check_mac2(&cookie, message) {
                let reply = cookie.reply_to(identity, message, &mut Rng).unwrap();
                socket.send_to(&reply, from).unwrap();
                continue;
            }
            let opened = open_initiation(identity, message).unwrap();
            let remote = &remotes[&opened.sender()];
            let authentic = opened.authenticate(remote).unwrap();
            let last = stamps.insert(*remote.public_key(), authentic.timestamp());
            assert!(last.is_none_or(|last| last < authentic.timestamp()), "a replay");
            let index = ReceiverIndex::from_wire([9; 4]);
            let (_, mut response) = authentic.respond(remote, index, None, &mut Rng).unwrap();
            if !truthful {
                response[20] ^= 1;
            }
            socket.send_to(&response, from).unwrap();
            count += 1;
        }
        count
    }

    fn storm_on(options: &str, with_cookies: bool, truthful: bool) -> (StormReport, u64) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(1500))).unwrap();
        let identity = Identity::new(PrivateKey::from_bytes([5; 32]));
        let arguments = arguments(socket.local_addr().unwrap(), identity.public_key(), options);
        let peers: Vec<_> = arguments.gateway.seed.peers(arguments.count).unwrap().collect();
        std::thread::scope(|scope| {
            let gateway =
                scope.spawn(|| gateway(&socket, &identity, &peers, with_cookies, truthful));
            let report = storm(&arguments).unwrap();
            (report, gateway.join().unwrap())
        })
    }

    #[test]
    fn every_answer_is_counted_once_and_finishes_its_handshake() {
        let (report, answered) =
            storm_on("--count 10 --seconds 0.5 --rate 100 --nic lo", false, true);
        assert_eq!((report.sent, report.answered, answered), (50, 50, 50), "{report:?}");
        assert_eq!((report.verified, report.false_responses, report.cookies), (50, 0, 0));
        assert!(report.latency_us.is_some_and(|times| times.max > 0.0));
    }

    #[test]
    fn cookies_are_used_and_remembered() {
        let options = "--count 20 --seconds 0.5 --rate 200 --ports 2";
        let (report, answered) = storm_on(options, true, true);
        assert_eq!((report.sent, answered), (100, 100), "{report:?}");
        assert_eq!(report.answered, 100, "{report:?}");
        assert!((2..100).contains(&report.cookies), "{report:?}");
    }

    #[test]
    fn responses_that_lie_are_found_out() {
        let (report, _) = storm_on("--count 10 --seconds 0.3 --rate 100", false, false);
        assert_eq!((report.verified, report.false_responses), (0, report.answered));
        assert!(report.warnings.iter().any(|warning| warning.contains("do not finish")));
    }

    #[test]
    fn without_a_rate_a_new_one_follows_each_answer() {
        let (report, answered) = storm_on("--count 30 --seconds 0.4 --outstanding 4", false, true);
        // What is under way when the time is over does not count.
        assert!((report.answered..=report.answered + 4).contains(&answered), "{report:?}");
        assert!(report.answered >= 30, "{report:?}");
        assert!(report.sent <= 30 * 16, "40 per second and peer at most");
    }

    #[test]
    fn a_rate_that_the_peers_may_not_have_is_refused() {
        let to = "127.0.0.1:9".parse().unwrap();
        let key = PrivateKey::from_bytes([5; 32]).public_key();
        let count = |options: &str| initiation_count(&arguments(to, &key, options));
        let error = count("--count 10 --seconds 1 --rate 500").unwrap_err().to_string();
        assert!(error.contains("400 initiations per second"), "{error}");
        assert_eq!(count("--count 10 --seconds 1 --rate 400").unwrap(), 400);
        assert_eq!(count("--count 10 --seconds 1").unwrap(), 400);
        assert_eq!(count("--count 100000 --seconds 2").unwrap(), 30_000);
        assert_eq!(count("--count 100000 --seconds 100").unwrap(), INITIATIONS_MAX);
    }

    #[test]
    fn addresses_of_peers_are_hosts_of_the_prefix() {
        let nth = |prefix: &str, peer| nth_address(&prefix.parse().unwrap(), peer).to_string();
        assert_eq!(nth("198.51.100.0/24", 0), "198.51.100.1");
        assert_eq!(nth("198.51.100.0/24", 253), "198.51.100.254");
        assert_eq!(nth("198.51.100.0/24", 254), "198.51.100.1");
        assert_eq!(nth("198.51.100.7/32", 5), "198.51.100.7");
        assert_eq!(nth("2001:db8::/64", 1), "2001:db8::2");
    }
}
