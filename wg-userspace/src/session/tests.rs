//! Sessions against each other, against a clock that the tests move, and against boringtun.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use wg_common::endpoint::{Endpoint, LocalSource};
use wg_common::id::{Counter, DeviceId, PeerId, ReceiverIndex, ShardId};
use wg_common::message::{Message, classify};
use wg_common::outcome::DropReason;
use wg_common::protocol::{
    KEEPALIVE_TIMEOUT, PADDING_MULTIPLE, REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME,
    REKEY_AFTER_MESSAGES, REKEY_AFTER_TIME, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT,
    REKEY_TIMEOUT_JITTER_MAX, TAG_LEN, TRANSPORT_HEADER_LEN, TRANSPORT_MIN_LEN, TYPE_TRANSPORT,
};
use wg_common::time::Now;

mod whitepaper;

use super::{Action, Context, HotPeer, Indexes, Keypair, Session};
use crate::aead::{BatchAead, Job, RingAead};
use crate::key::{PresharedKey, PrivateKey};
use crate::noise::{Identity, Remote, RemoteStatic, Role, Timestamp, open_initiation};

mod cookies;

const START: Now = Now::from_boot_ns(1_000_000_000_000);
const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
const TICK: Duration = Duration::from_nanos(1);
/// After unanswered data a handshake begins within these bounds.
const NEW_HANDSHAKE: Duration = Duration::from_secs(15);

/// Indexes that are never lent twice.
#[derive(Default)]
struct TestIndexes {
    lent: u32,
    live: BTreeSet<u32>,
    exhausted: bool,
    /// Published keypairs by local index.
    table: HashMap<u32, Arc<Keypair>>,
}

impl Indexes for TestIndexes {
    fn allocate(&mut self) -> Option<ReceiverIndex> {
        if self.exhausted {
            return None;
        }
        self.lent += 1;
        let index = ReceiverIndex::from_wire((0x5a50_0000 | self.lent).to_le_bytes());
        self.live.insert(index.value());
        Some(index)
    }

    fn release(&mut self, index: ReceiverIndex) {
        assert!(self.live.remove(&index.value()), "an index is given back once");
    }

    fn adopt(&mut self, index: ReceiverIndex) -> bool {
        self.live.insert(index.value()) || self.table[&index.value()].is_frozen()
    }

    fn publish(&mut self, keypair: &Arc<Keypair>) {
        let index = keypair.local_index().value();
        assert!(self.live.contains(&index), "live before it is published");
        let before = self.table.insert(index, Arc::clone(keypair));
        assert!(before.is_none_or(|before| before.is_frozen()));
    }

    fn retire(&mut self, keypair: &Arc<Keypair>) {
        assert!(self.table.remove(&keypair.local_index().value()).is_some());
        self.release(keypair.local_index());
    }
}

/// One end of a tunnel: a session, and the plainest caller and worker it can have.
struct Side {
    identity: Identity,
    address: Endpoint,
    session: Session,
    indexes: TestIndexes,
    rng: StdRng,
    staged: VecDeque<Vec<u8>>,
    outbox: Vec<(Vec<u8>, Endpoint)>,
    received: Vec<Vec<u8>>,
    /// When a message of each kind left.
    initiations: Vec<Now>,
    responses: Vec<Now>,
    keepalives: Vec<Now>,
    dropped_staged: usize,
    refused: Vec<DropReason>,
}

fn address(last: u8) -> Endpoint {
    Endpoint::configured(SocketAddr::from(([192, 0, 2, last], 51820)))
}

fn wall(now: Now) -> Timestamp {
    let ns = 1_700_000_000_000_000_000 + now.boot_ns();
    Timestamp::from_unix(ns / 1_000_000_000, (ns % 1_000_000_000) as u32)
}

impl Side {
    fn new(number: u8, key: PrivateKey, remote: &PrivateKey, psk: PresharedKey) -> Self {
        let identity = Identity::new(key);
        let remote = remote.public_key();
        let peer = Arc::new(HotPeer::new(PeerId(number.into()), DeviceId(0), remote));
        let session = Session::new(peer, Some(RemoteStatic::new(&identity, remote, psk).into()));
        Self {
            identity,
            address: address(number),
            session,
            indexes: TestIndexes::default(),
            rng: StdRng::seed_from_u64(number.into()),
            staged: VecDeque::new(),
            outbox: Vec::new(),
            received: Vec::new(),
            initiations: Vec::new(),
            responses: Vec::new(),
            keepalives: Vec::new(),
            dropped_staged: 0,
            refused: Vec::new(),
        }
    }

    fn peer(&self) -> Arc<HotPeer> {
        Arc::clone(self.session.peer())
    }

    fn set_endpoint(&self, endpoint: Endpoint) {
        self.peer().endpoint.store(Some(Arc::new(endpoint)));
    }

    fn endpoint(&self) -> Option<Endpoint> {
        self.peer().endpoint.load().as_deref().copied()
    }

    /// Calls the session and does what it wants.
    fn call<T>(
        &mut self,
        now: Now,
        f: impl FnOnce(&mut Session, &mut Context<'_, StdRng, TestIndexes>) -> Result<Vec<Action>, T>,
    ) -> Result<(), T> {
        let mut ctx = Context {
            identity: &self.identity,
            indexes: &mut self.indexes,
            rng: &mut self.rng,
            timestamp: wall(now),
            home: ShardId::new(3),
        };
        let actions = f(&mut self.session, &mut ctx)?;
        self.perform(actions, now);
        Ok(())
    }

    fn initiate(&mut self, now: Now) {
        self.call(now, |session, ctx| Ok::<_, ()>(session.initiate(ctx, now))).unwrap();
    }

    fn handle_timeout(&mut self, now: Now) {
        self.call(now, |session, ctx| Ok::<_, ()>(session.handle_timeout(ctx, now))).unwrap();
        let keypairs = self.peer().keypairs.load().iter().count();
        assert_eq!(self.indexes.table.len(), keypairs, "what is not among the keypairs is retired");
        let pending = usize::from(self.session.pending_index().is_some());
        assert_eq!(self.indexes.live.len(), keypairs + pending, "no index leaks");
    }

    fn clear(&mut self) {
        self.session.clear(&mut self.indexes);
    }

    /// Runs timers until `until`, with nobody at the other end.
    fn run_alone(&mut self, until: Now) {
        while let Some(due) = self.session.poll_timeout().filter(|due| *due <= until) {
            self.handle_timeout(due);
            let next = self.session.poll_timeout();
            assert!(next.is_none_or(|next| next > due), "due at {due:?} again");
        }
    }

    fn perform(&mut self, actions: Vec<Action>, now: Now) {
        for action in actions {
            match action {
                Action::Send { message, to } => {
                    let sender = u32::from_le_bytes(*message[4..].first_chunk().unwrap());
                    assert!(self.indexes.live.contains(&sender), "live before it is sent");
                    if matches!(classify(&message), Ok(Message::Response(_))) {
                        assert!(
                            self.indexes.table.contains_key(&sender),
                            "published before it is sent"
                        );
                        self.responses.push(now);
                    } else {
                        self.initiations.push(now);
                    }
                    self.outbox.push((message.to_vec(), to));
                }
                Action::SendKeepalive => {
                    if self.seal(&[], now) {
                        self.keepalives.push(now);
                        self.peer().activity.keepalive_sent(now);
                    }
                }
                Action::Flush => self.flush(now),
                Action::DropStaged => {
                    self.dropped_staged += self.staged.len();
                    self.staged.clear();
                }
                Action::CountDrop(reason) => self.refused.push(reason),
            }
        }
        self.peer().staged.store(self.staged.len() as u32, Relaxed);
        for keypair in self.peer().keypairs.load().iter() {
            let published = &self.indexes.table[&keypair.local_index().value()];
            assert!(Arc::ptr_eq(published, keypair), "all keypairs are published");
        }
    }

    /// Seals a packet with the current keypair into the outbox.
    fn seal(&mut self, packet: &[u8], now: Now) -> bool {
        let peer = self.peer();
        let keypairs = peer.keypairs.load();
        let Some(keypair) = keypairs.seals_with(now) else { return false };
        let Some(reserved) = keypair.reserve(1) else { return false };
        assert!(reserved.first < REJECT_AFTER_MESSAGES);
        let padded = packet.len().next_multiple_of(PADDING_MULTIPLE);
        let mut message = vec![TYPE_TRANSPORT, 0, 0, 0];
        message.extend_from_slice(&keypair.remote_index().to_wire());
        message.extend_from_slice(&reserved.first.to_le_bytes());
        message.extend_from_slice(packet);
        message.resize(TRANSPORT_HEADER_LEN + padded + TAG_LEN, 0);
        let buffer = &mut message[TRANSPORT_HEADER_LEN..];
        RingAead.seal(&mut [Job::new(keypair.seal_key(), reserved.first, buffer)]);
        self.outbox.push((message, self.endpoint().expect("we know where to")));
        true
    }

    /// Sends a packet from the TUN device, as a worker does.
    fn send(&mut self, packet: &[u8], now: Now) {
        let peer = self.peer();
        if !self.seal(packet, now) {
            self.staged.push_back(packet.to_vec());
            peer.staged.store(self.staged.len() as u32, Relaxed);
            self.want_handshake(now);
            return;
        }
        peer.activity.data_sent(now);
        let keypairs = peer.keypairs.load();
        if keypairs.current.as_ref().is_some_and(|keypair| keypair.wants_rekey_to_send(now)) {
            self.want_handshake(now);
        }
    }

    fn flush(&mut self, now: Now) {
        for packet in std::mem::take(&mut self.staged) {
            self.send(&packet, now);
        }
    }

    fn want_handshake(&mut self, now: Now) {
        if !self.peer().handshake_wanted.swap(true, Relaxed) {
            self.initiate(now);
        }
    }

    /// Takes a datagram, as workers and the handshake pool do together.
    fn receive(&mut self, datagram: &[u8], from: Endpoint, now: Now) -> Result<(), DropReason> {
        match classify(datagram)? {
            Message::Initiation => {
                let opened = open_initiation(&self.identity, datagram.first_chunk().unwrap())
                    .map_err(|error| error.drop_reason())?;
                let remote = self.session.remote().unwrap();
                let authentic = opened.authenticate(remote).map_err(|e| e.drop_reason())?;
                self.call(now, |s, ctx| s.handle_initiation(authentic, from, ctx, now))
            }
            Message::Response(_) => {
                let message = datagram.first_chunk().unwrap();
                self.call(now, |session, ctx| session.handle_response(message, ctx, now))
            }
            Message::CookieReply(_) => {
                self.session.handle_cookie_reply(datagram.first_chunk().unwrap(), now)
            }
            Message::Transport(index) => self.open(datagram, index, from, now),
        }
    }

    fn open(
        &mut self,
        datagram: &[u8],
        index: ReceiverIndex,
        from: Endpoint,
        now: Now,
    ) -> Result<(), DropReason> {
        let keypair =
            self.indexes.table.get(&index.value()).cloned().ok_or(DropReason::UnknownIndex)?;
        if !keypair.can_open(now) {
            return Err(DropReason::KeyExpired);
        }
        let counter = u64::from_le_bytes(*datagram[8..].first_chunk().unwrap());
        let mut buffer = datagram[TRANSPORT_HEADER_LEN..].to_vec();
        let mut jobs = [Job::new(keypair.open_key(), counter, &mut buffer)];
        RingAead.open(&mut jobs);
        if !jobs[0].ok {
            return Err(DropReason::BadTag);
        }
        let mut receiving = keypair.clone().receive().ok_or(DropReason::HandedOver)?;
        if !receiving.accept(Counter(counter)) {
            return Err(DropReason::Replay);
        }
        buffer.truncate(buffer.len() - TAG_LEN);
        let peer = keypair.peer().unwrap();
        peer.endpoint.store(Some(Arc::new(from)));
        if buffer.is_empty() {
            peer.activity.authenticated_received(now);
        } else {
            peer.activity.data_received(now);
            self.received.push(buffer);
        }
        if peer.confirm(&keypair) {
            self.flush(now);
        }
        if keypair.wants_rekey_on_receive(now) {
            self.want_handshake(now);
        }
        Ok(())
    }
}

fn key(number: u8) -> PrivateKey {
    PrivateKey::from_bytes([number; 32])
}

fn psk() -> PresharedKey {
    PresharedKey::generate(&mut StdRng::seed_from_u64(77))
}

/// One end that knows where the other is, and the key of the other.
fn lonely() -> Side {
    let side = Side::new(1, key(1), &key(2), psk());
    side.set_endpoint(address(2));
    side
}

/// Two ends and the wire between them.
struct Pair {
    sides: [Side; 2],
    now: Now,
    wire: Vec<Flight>,
    rng: StdRng,
    weather: Weather,
    drops: Vec<(usize, DropReason)>,
}

struct Flight {
    arrives: Now,
    to: usize,
    datagram: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Weather {
    lost_percent: u32,
    doubled_percent: u32,
    delay_ms: (u64, u64),
}

const CALM: Weather = Weather { lost_percent: 0, doubled_percent: 0, delay_ms: (10, 10) };

const A: usize = 0;
const B: usize = 1;

impl Pair {
    /// Only A knows where the other is.
    fn new() -> Self {
        let a = Side::new(1, key(1), &key(2), psk());
        let b = Side::new(2, key(2), &key(1), psk());
        a.set_endpoint(b.address);
        let rng = StdRng::seed_from_u64(5);
        Self { sides: [a, b], now: START, wire: Vec::new(), rng, weather: CALM, drops: Vec::new() }
    }

    /// A has initiated, and both can send.
    fn connected() -> Self {
        let mut pair = Self::new();
        pair.sides[A].initiate(START);
        pair.run(SECOND);
        for side in &pair.sides {
            assert!(side.peer().keypairs.load().seals_with(pair.now).is_some());
        }
        pair
    }

    fn send(&mut self, side: usize, packet: &[u8]) {
        self.sides[side].send(packet, self.now);
        self.collect();
    }

    /// Takes what the sides have sent to the wire.
    fn collect(&mut self) {
        for from in [A, B] {
            let (remote, outbox) =
                (self.sides[1 - from].address.remote, std::mem::take(&mut self.sides[from].outbox));
            for (datagram, to) in outbox {
                let mut copies = 1;
                if to.remote != remote || self.rng.random_ratio(self.weather.lost_percent, 100) {
                    copies = 0;
                } else if self.rng.random_ratio(self.weather.doubled_percent, 100) {
                    copies = 2;
                }
                for _ in 0..copies {
                    let (least, most) = self.weather.delay_ms;
                    let arrives = self.now + MS * self.rng.random_range(least..=most) as u32;
                    self.wire.push(Flight { arrives, to: 1 - from, datagram: datagram.clone() });
                }
            }
        }
    }

    /// Lets `time` pass.
    fn run(&mut self, time: Duration) {
        let until = self.now + time;
        loop {
            self.collect();
            let arrival = self.wire.iter().map(|flight| flight.arrives).min();
            let timers = self.sides.iter().filter_map(|side| side.session.poll_timeout());
            let Some(next) = timers.chain(arrival).min().filter(|next| *next <= until) else {
                break;
            };
            self.now = self.now.max(next);
            if let Some(i) = self.wire.iter().position(|flight| flight.arrives <= self.now) {
                let Flight { to, datagram, .. } = self.wire.remove(i);
                let from = self.sides[1 - to].address;
                if let Err(reason) = self.sides[to].receive(&datagram, from, self.now) {
                    self.drops.push((to, reason));
                }
            }
            for side in &mut self.sides {
                if side.session.poll_timeout().is_some_and(|due| due <= self.now) {
                    side.handle_timeout(self.now);
                }
            }
        }
        self.now = until;
    }

    fn received(&self, side: usize) -> usize {
        self.sides[side].received.len()
    }
}

fn within(at: Now, least: Now, jitter: Duration) -> bool {
    least <= at && at <= least + jitter
}

// ---------------------------------------------------------------------------------------------
// Beginning, repeating and giving up a handshake
// ---------------------------------------------------------------------------------------------

#[test]
fn initiation_is_repeated_after_rekey_timeout() {
    let mut side = lonely();
    side.initiate(START);
    assert_eq!(side.initiations, [START]);
    let index = side.session.pending_index();
    let due = side.session.poll_timeout().unwrap();
    assert!(within(due, START + REKEY_TIMEOUT, REKEY_TIMEOUT_JITTER_MAX));
    side.handle_timeout(Now::from_boot_ns(due.boot_ns() - 1));
    assert_eq!(side.initiations.len(), 1);
    side.handle_timeout(due);
    assert_eq!(side.initiations, [START, due]);
    assert_eq!(side.session.pending_index(), index, "it keeps its index");
    let [(first, _), (second, _)] = &side.outbox[..] else { panic!("two messages") };
    assert_ne!(first, second, "but nothing else");
}

#[test]
fn repetitions_are_jittered() {
    let mut side = lonely();
    side.initiate(START);
    side.run_alone(START + REKEY_ATTEMPT_TIME);
    let gaps: Vec<_> = side.initiations.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps.iter().all(|&gap| gap >= REKEY_TIMEOUT));
    assert!(gaps.iter().all(|&gap| gap <= REKEY_TIMEOUT + REKEY_TIMEOUT_JITTER_MAX));
    assert!(gaps.iter().collect::<BTreeSet<_>>().len() > 10);
}

#[test]
fn a_repeated_initiation_chooses_its_source_anew() {
    let mut side = lonely();
    let local = Some(LocalSource { addr: [192, 0, 2, 1].into(), ifindex: 4 });
    side.set_endpoint(Endpoint { local, ..address(2) });
    side.initiate(START);
    side.handle_timeout(side.session.poll_timeout().unwrap());
    let sources: Vec<_> = side.outbox.iter().map(|(_, to)| to.local).collect();
    assert_eq!(sources, [local, None]);
}

#[test]
fn handshake_is_given_up_after_rekey_attempt_time() {
    let mut side = lonely();
    side.send(b"packet", START);
    side.run_alone(START + (REKEY_ATTEMPT_TIME - TICK));
    assert_eq!(side.dropped_staged, 0);
    side.run_alone(START + REKEY_ATTEMPT_TIME + REKEY_TIMEOUT + REKEY_TIMEOUT_JITTER_MAX);
    assert_eq!(side.dropped_staged, 1);
    assert!(side.initiations.iter().all(|&at| at < START + REKEY_ATTEMPT_TIME));
    assert!((17..=18).contains(&side.initiations.len()), "{}", side.initiations.len());
    assert!(side.indexes.live.is_empty());
    assert!(!side.session.is_awake());
    assert!(!side.peer().handshake_wanted.load(Relaxed), "workers may ask again");
}

#[test]
fn asking_again_lets_an_attempt_last_longer() {
    let mut side = lonely();
    side.initiate(START);
    let asked = START + SECOND * 60;
    side.run_alone(asked);
    let before = side.initiations.len();
    side.initiate(asked);
    assert_eq!(side.initiations.len(), before, "one is in flight");
    side.run_alone(asked + (REKEY_ATTEMPT_TIME - TICK));
    assert!(side.session.pending_index().is_some());
    assert!(*side.initiations.last().unwrap() > asked + SECOND * 80);
    side.run_alone(asked + REKEY_ATTEMPT_TIME + SECOND * 6);
    assert!(side.session.pending_index().is_none());
}

#[test]
fn workers_may_ask_again_after_each_repetition() {
    let mut side = lonely();
    side.send(b"first", START);
    assert!(side.peer().handshake_wanted.load(Relaxed));
    side.send(b"second", START);
    side.handle_timeout(side.session.poll_timeout().unwrap());
    assert!(!side.peer().handshake_wanted.load(Relaxed));
}

#[test]
fn initiations_are_never_closer_than_rekey_timeout() {
    let mut pair = Pair::connected();
    assert_eq!(pair.sides[A].initiations, [START]);
    pair.sides[A].initiate(pair.now);
    pair.sides[A].initiate(pair.now);
    assert_eq!(pair.sides[A].initiations, [START]);
    pair.run(SECOND * 10);
    assert_eq!(pair.sides[A].initiations, [START, START + REKEY_TIMEOUT]);
    pair.sides[B].initiate(pair.now);
    assert_eq!(pair.sides[B].initiations, [pair.now], "its response is older than that");
}

#[test]
fn whoever_has_just_responded_waits_for_the_first_packet() {
    let mut pair = Pair::new();
    pair.sides[B].set_endpoint(address(1));
    pair.sides[A].initiate(START);
    pair.run(MS * 10); // B has answered, A does not know yet
    pair.send(B, b"packet");
    assert!(pair.sides[B].initiations.is_empty());
    pair.run(SECOND * 30);
    assert!(pair.sides[B].initiations.is_empty(), "the first packet was its answer");
    assert_eq!(pair.received(A), 1);
}

#[test]
fn a_response_that_stays_alone_is_followed_by_an_initiation() {
    let mut pair = Pair::new();
    pair.sides[B].set_endpoint(address(1));
    pair.sides[A].initiate(START);
    pair.run(MS * 10);
    pair.wire.clear();
    pair.sides[A].clear(); // it has forgotten everything
    pair.send(B, b"packet");
    pair.run(SECOND * 10);
    assert_eq!(pair.sides[B].initiations, [START + MS * 10 + REKEY_TIMEOUT]);
    assert_eq!(pair.received(A), 1);
}

#[test]
fn there_is_no_handshake_without_an_endpoint() {
    let mut side = Side::new(1, key(1), &key(2), psk());
    side.send(b"packet", START);
    assert!(side.initiations.is_empty());
    assert!(!side.session.is_awake());
    assert!(!side.peer().handshake_wanted.load(Relaxed), "workers may ask again");
    side.set_endpoint(address(2));
    side.send(b"packet", START);
    assert_eq!(side.initiations, [START]);
}

#[test]
fn there_is_no_handshake_without_a_private_key() {
    let mut side = lonely();
    side.session.set_remote(None, &mut side.indexes);
    side.session.set_persistent_keepalive(Some(SECOND), START);
    side.initiate(START);
    side.run_alone(START + SECOND * 20);
    assert!(side.initiations.is_empty());
    assert_eq!(*side.session.preshared_key(), psk(), "but it is remembered");
}

#[test]
fn without_a_free_index_the_initiation_waits_for_the_next_repetition() {
    let mut side = lonely();
    side.indexes.exhausted = true;
    side.initiate(START);
    assert!(side.initiations.is_empty());
    side.indexes.exhausted = false;
    side.run_alone(START + SECOND * 6);
    assert_eq!(side.initiations.len(), 1);
}

#[test]
fn an_idle_peer_sleeps() {
    let side = lonely();
    assert_eq!(side.session.poll_timeout(), None);
    assert!(!side.session.is_awake());
    assert!(size_of::<Session>() <= 48, "{} bytes", size_of::<Session>());
    assert!(size_of::<HotPeer>() <= 152, "{} bytes", size_of::<HotPeer>());
}

#[test]
fn a_peer_who_never_comes_has_no_room_for_what_has_not_happened() {
    let mut side = lonely();
    let peer = Arc::new(HotPeer::new(PeerId(7), DeviceId(0), key(7).public_key()));
    let mut session = Session::new(Arc::clone(&peer), Some(Remote::new(&side.identity)));
    session.set_preshared_key(psk());
    session.raise_greatest_timestamp(Timestamp::default());
    session.set_persistent_keepalive(None, START);
    session.clear(&mut side.indexes);
    session.clear_older(START, &mut side.indexes);
    session.set_remote(Some(Remote::new(&side.identity)), &mut side.indexes);
    assert_eq!(session.handle_cookie_reply(&[0; 64], START), Err(DropReason::UnknownIndex));
    assert!((session.poll_timeout(), session.wake_at(START)) == (None, None));
    assert!(session.troubles(START).is_empty() && !session.has_notes(START));
    assert_eq!(session.busy_until(START), None);
    assert!(session.course.begun().is_none());
    assert!(session.has_no_remote_static());
    let other = HotPeer::new(PeerId(8), DeviceId(0), key(7).public_key());
    assert!(
        Arc::ptr_eq(&peer.keypairs.load(), &other.keypairs.load()),
        "they share what they lack"
    );
    // Then it is what it would have been from the beginning.
    let remote = session.remote().unwrap();
    assert_eq!(remote.public_key(), &peer.public_key);
    assert_eq!(*remote.preshared_key(), psk());
    session.set_preshared_key(PresharedKey::from_bytes([9; 32]));
    assert_eq!(*session.remote().unwrap().preshared_key(), PresharedKey::from_bytes([9; 32]));
}

// ---------------------------------------------------------------------------------------------
// Receiving handshakes
// ---------------------------------------------------------------------------------------------

/// A's initiation at `now`, made of an attempt of its own.
fn initiation(pair: &mut Pair, now: Now) -> Vec<u8> {
    pair.sides[A].clear();
    pair.sides[A].initiate(now);
    pair.sides[A].outbox.pop().unwrap().0
}

#[test]
fn a_timestamp_from_before_this_session_makes_replays_too() {
    let mut pair = Pair::new();
    let old = initiation(&mut pair, START);
    let new = initiation(&mut pair, START + SECOND);
    let (b, from) = (&mut pair.sides[B], address(1));
    b.session.raise_greatest_timestamp(wall(START));
    b.session.raise_greatest_timestamp(Timestamp::default());
    assert_eq!(b.session.greatest_timestamp(), wall(START), "a lesser one changes nothing");
    assert_eq!(b.receive(&old, from, START + SECOND), Err(DropReason::OldTimestamp));
    assert_eq!(b.receive(&new, from, START + SECOND), Ok(()));
    assert_eq!(b.session.greatest_timestamp(), wall(START + SECOND));
}

#[test]
fn a_peer_is_busy_until_its_last_keypair_dies() {
    let mut pair = Pair::new();
    let initiation = initiation(&mut pair, START);
    let b = &mut pair.sides[B];
    assert_eq!(b.session.busy_until(START), None);
    b.receive(&initiation, address(1), START).unwrap();
    let end = START + REJECT_AFTER_TIME;
    assert_eq!(b.session.busy_until(START), Some(end));
    // It is remembered when nothing is left of it.
    b.clear();
    assert_eq!(b.session.busy_until(end + SECOND), Some(end));
    // Whoever tries to reach the peer keeps it.
    b.set_endpoint(address(1));
    b.initiate(end + SECOND);
    assert_eq!(b.session.busy_until(end + SECOND), Some(end + SECOND));
}

#[test]
fn a_repeated_or_older_timestamp_is_refused() {
    let mut pair = Pair::new();
    let old = initiation(&mut pair, START);
    let new = initiation(&mut pair, START + SECOND);
    let (b, from) = (&mut pair.sides[B], address(1));
    assert_eq!(b.receive(&new, from, START + SECOND), Ok(()));
    for (message, at) in [(&new, 2), (&old, 3), (&new, 4)] {
        let outcome = b.receive(message, from, START + SECOND * at);
        assert_eq!(outcome, Err(DropReason::OldTimestamp));
    }
    assert_eq!(b.responses.len(), 1);
    assert_eq!(b.indexes.live.len(), 1);
    b.clear();
    let outcome = b.receive(&new, from, START + SECOND * 5);
    assert_eq!(outcome, Err(DropReason::OldTimestamp), "it survives clearing");
}

#[test]
fn a_flood_of_initiations_is_refused() {
    let mut pair = Pair::new();
    let messages: Vec<_> = (1..=3).map(|i| initiation(&mut pair, START + SECOND * i)).collect();
    let (b, from) = (&mut pair.sides[B], address(1));
    assert_eq!(b.receive(&messages[0], from, START), Ok(()));
    let outcome = b.receive(&messages[1], from, START + (MS * 20 - TICK));
    assert_eq!(outcome, Err(DropReason::InitiationFlood));
    assert_eq!(b.receive(&messages[1], from, START + MS * 20), Ok(()), "nothing had changed");
}

#[test]
fn a_peer_that_initiates_all_the_time_does_not_use_up_the_indexes_of_all() {
    let mut pair = Pair::new();
    let mut answered = |from: Now, count: u32| {
        let receive = |i| {
            let now = from + MS * 20 * i;
            pair.sides[A].clear();
            let message = initiation(&mut pair, now);
            pair.sides[B].receive(&message, address(1), now)
        };
        let outcomes: Vec<_> = (0..count).map(receive).collect();
        let refused = Err(DropReason::InitiationFlood);
        assert!(outcomes.iter().all(|outcome| outcome.is_ok() || *outcome == refused));
        outcomes.iter().filter(|outcome| outcome.is_ok()).count()
    };
    assert_eq!(answered(START, 1000), 100 + 19, "a burst, and one a second");
    assert_eq!(answered(START + SECOND * 20, 500), 10);
    assert_eq!(answered(START + SECOND * 1000, 50), 50, "who was silent may again");
}

#[test]
fn an_initiation_is_answered_to_its_source_and_moves_no_endpoint() {
    let mut pair = Pair::new();
    let message = initiation(&mut pair, START);
    for configured in [None, Some(address(9))] {
        let mut b = Side::new(2, key(2), &key(1), psk());
        b.peer().endpoint.store(configured.map(Arc::new));
        b.receive(&message, address(7), START).unwrap();
        assert_eq!(b.outbox[0].1, address(7));
        assert_eq!(b.endpoint(), configured);
    }
}

#[test]
fn the_endpoint_moves_with_the_first_packet() {
    let mut pair = Pair::new();
    pair.sides[A].initiate(START);
    assert_eq!(pair.sides[B].endpoint(), None);
    pair.run(SECOND);
    assert_eq!(pair.sides[B].endpoint(), Some(pair.sides[A].address));
}

#[test]
fn without_a_free_index_an_initiation_is_refused_and_may_come_again() {
    let mut pair = Pair::new();
    let message = initiation(&mut pair, START);
    let b = &mut pair.sides[B];
    b.indexes.exhausted = true;
    assert_eq!(b.receive(&message, address(1), START), Err(DropReason::NoIndex));
    b.indexes.exhausted = false;
    assert_eq!(b.receive(&message, address(1), START), Ok(()));
}

#[test]
fn without_a_free_index_no_initiation_leaves_until_there_is_one() {
    let mut pair = Pair::new();
    let a = &mut pair.sides[A];
    a.indexes.exhausted = true;
    a.initiate(START);
    assert!(a.outbox.is_empty());
    assert_eq!(a.refused, [DropReason::NoIndex], "it is counted");
    a.indexes.exhausted = false;
    a.run_alone(START + SECOND * 6);
    assert_eq!(a.initiations.len(), 1);
}

#[test]
fn a_refused_response_changes_nothing() {
    let mut pair = Pair::new();
    pair.sides[A].initiate(START);
    pair.run(MS * 15);
    let response = pair.wire.pop().unwrap().datagram;
    let (from, now) = (address(2), pair.now);
    let a = &mut pair.sides[A];
    let poll = a.session.poll_timeout();
    for at in [4, 8, 12, 44, 60] {
        let mut bad = response.clone();
        bad[at] ^= 1;
        assert!(a.receive(&bad, from, now).is_err());
        assert!(a.indexes.table.is_empty());
        assert_eq!(a.session.poll_timeout(), poll);
    }
    assert_eq!(a.receive(&response, from, now), Ok(()));
    assert_eq!(a.receive(&response, from, now), Err(DropReason::UnknownIndex), "only once");
}

#[test]
fn another_preshared_key_completes_no_handshake() {
    let mut pair = Pair::new();
    pair.sides[B].session.set_preshared_key(PresharedKey::default());
    pair.sides[A].initiate(START);
    pair.run(SECOND * 3);
    assert_eq!(pair.drops, [(A, DropReason::BadHandshake)]);
    assert!(pair.sides[A].indexes.table.is_empty());
    // What both have now counts for the next initiation.
    pair.sides[A].session.set_preshared_key(PresharedKey::default());
    pair.run(SECOND * 3);
    pair.send(A, b"packet");
    pair.run(SECOND);
    assert_eq!(pair.received(B), 1);
}

#[test]
fn another_preshared_key_keeps_the_keypairs() {
    let mut pair = Pair::connected();
    for side in &mut pair.sides {
        side.session.set_preshared_key(PresharedKey::default());
    }
    pair.send(A, b"packet");
    pair.run(SECOND);
    assert_eq!(pair.received(B), 1);
    assert_eq!(pair.sides[A].initiations.len(), 1);
}

#[test]
fn responder_sends_only_after_first_receipt() {
    let mut pair = Pair::new();
    pair.sides[B].set_endpoint(address(1));
    pair.sides[A].initiate(START);
    pair.run(MS * 10);
    assert_eq!(pair.sides[B].responses.len(), 1);
    assert_eq!(pair.sides[B].session.last_handshake(), None);
    pair.send(B, b"packet");
    assert_eq!(pair.sides[B].staged.len(), 1);
    assert!(pair.wire.iter().all(|flight| flight.datagram[0] != TYPE_TRANSPORT));
    pair.run(MS * 20); // the response, then the keepalive that confirms it
    assert!(pair.sides[B].staged.is_empty());
    assert_eq!(pair.sides[B].session.last_handshake(), Some(wall(START + MS * 30)));
    pair.run(MS * 10);
    assert_eq!(pair.sides[A].received[0][..6], *b"packet");
}

#[test]
fn the_initiator_confirms_with_a_staged_packet_or_else_a_keepalive() {
    let mut pair = Pair::new();
    pair.send(A, b"packet");
    pair.run(SECOND);
    assert!(pair.sides[A].keepalives.is_empty());
    assert_eq!(pair.received(B), 1);
    let pair = Pair::connected();
    assert_eq!(pair.sides[A].keepalives, [START + MS * 20]);
    assert_eq!(pair.sides[A].session.last_handshake(), Some(wall(START + MS * 20)));
}

#[test]
fn staged_packets_go_in_order_once_there_is_a_keypair() {
    let mut pair = Pair::new();
    for number in 0..20 {
        pair.send(A, &[number; 16]);
    }
    pair.run(SECOND);
    let numbers: Vec<_> = pair.sides[B].received.iter().map(|packet| packet[0]).collect();
    assert_eq!(numbers, (0..20).collect::<Vec<_>>());
    assert_eq!(pair.sides[A].initiations.len(), 1);
}

#[test]
fn handshakes_that_cross_leave_a_working_tunnel() {
    let mut pair = Pair::new();
    pair.sides[B].set_endpoint(address(1));
    pair.send(A, b"from a");
    pair.send(B, b"from b");
    pair.run(MS * 100);
    for _ in 0..5 {
        pair.send(A, b"from a");
        pair.send(B, b"from b");
        pair.run(SECOND);
    }
    assert_eq!((pair.received(A), pair.received(B)), (6, 6));
    assert_eq!(pair.drops, []);
    let sent = pair.sides.each_ref().map(|side| side.initiations.len());
    assert_eq!(sent, [1, 1]);
}

#[test]
fn a_lost_response_is_made_up_for_by_the_next_initiation() {
    let mut pair = Pair::new();
    pair.send(A, b"packet");
    pair.run(MS * 10);
    pair.wire.clear();
    pair.run(SECOND * 6);
    assert_eq!(pair.received(B), 1);
    assert_eq!(pair.sides[B].responses.len(), 2);
    assert_eq!(pair.sides[B].indexes.table.len(), 1, "the first answer's keypair is retired");
}

#[test]
fn a_confirmation_ends_our_own_attempt() {
    let mut pair = Pair::new();
    pair.sides[B].set_endpoint(address(77)); // where nobody is
    pair.send(B, b"packet");
    pair.run(SECOND * 7);
    pair.sides[A].initiate(pair.now);
    pair.run(SECOND);
    assert_eq!(pair.sides[B].session.pending_index(), None);
    pair.run(SECOND * 30);
    assert_eq!(pair.sides[B].initiations.len(), 2);
    assert_eq!(pair.received(A), 1);
}

// ---------------------------------------------------------------------------------------------
// Keys' life
// ---------------------------------------------------------------------------------------------

#[test]
fn rekey_only_by_the_initiator() {
    let mut pair = Pair::connected();
    for _ in 0..600 {
        pair.send(A, b"from a");
        pair.send(B, b"from b");
        pair.run(SECOND);
    }
    assert!(pair.sides[B].initiations.is_empty());
    assert_eq!(pair.sides[A].initiations.len(), 5, "600 s in pieces of 120 s");
    for gap in pair.sides[A].initiations.windows(2).map(|pair| pair[1] - pair[0]) {
        assert!(gap >= REKEY_AFTER_TIME && gap < REKEY_AFTER_TIME + SECOND * 2);
    }
    assert_eq!((pair.received(A), pair.received(B)), (600, 600), "nothing is lost by it");
    assert_eq!(pair.drops, []);
}

#[test]
fn an_initiator_that_only_receives_rekeys_in_time() {
    let mut pair = Pair::connected();
    for _ in 0..600 {
        pair.send(B, b"from b");
        pair.run(SECOND);
    }
    assert!(pair.sides[B].initiations.is_empty());
    assert_eq!(pair.received(A), 600);
    assert_eq!(pair.drops, []);
}

#[test]
fn received_data_makes_the_initiator_rekey_when_little_time_is_left() {
    let mut pair = Pair::connected();
    let created = START + MS * 20;
    pair.run((created + (SECOND * 165 - MS * 10)) - pair.now - TICK);
    pair.send(B, b"just too early");
    pair.run(TICK);
    pair.run(MS * 10 - TICK);
    assert_eq!(pair.received(A), 1);
    assert_eq!(pair.sides[A].initiations.len(), 1);
    pair.send(B, b"late enough");
    pair.run(MS * 10);
    assert_eq!(pair.sides[A].initiations.len(), 2);
}

#[test]
fn more_than_rekey_after_messages_begin_a_handshake_in_both_roles() {
    for side in [A, B] {
        let mut pair = Pair::connected();
        pair.run(SECOND * 10); // past Rekey-Timeout
        let current = pair.sides[side].peer().keypairs.load().current.clone().unwrap();
        let before = pair.sides[side].initiations.len();
        // A holder's counters are fewer than the whitepaper's, and it wants a rekey before they end.
        let rekey_after = current.generation().rekey_after();
        assert!(rekey_after <= REKEY_AFTER_MESSAGES);
        // This leaves one counter to send without a handshake.
        current.reserve(rekey_after - 1 - current.sent()).unwrap();
        pair.send(side, b"packet");
        assert_eq!(pair.sides[side].initiations.len(), before);
        pair.send(side, b"packet");
        assert_eq!(pair.sides[side].initiations.len(), before + 1);
        pair.run(SECOND);
        assert_eq!(pair.received(1 - side), 2, "they were sent all the same");
    }
}

#[test]
fn at_reject_after_messages_packets_wait_for_the_next_keypair() {
    let mut pair = Pair::connected();
    pair.run(SECOND * 10);
    let current = pair.sides[B].peer().keypairs.load().current.clone().unwrap();
    let end = current.generation().counters().end;
    assert!(end <= REJECT_AFTER_MESSAGES);
    current.reserve(end - 1 - current.sent()).unwrap();
    pair.send(B, b"the last");
    assert_eq!(current.sent(), end);
    assert!(pair.sides[B].staged.is_empty());
    pair.send(B, b"one more");
    assert_eq!(pair.sides[B].staged.len(), 1);
    pair.run(SECOND);
    assert!(pair.sides[B].staged.is_empty());
    assert_eq!(pair.received(A), 2);
    assert_eq!(current.sent(), end);
}

#[test]
fn an_idle_tunnel_does_not_rekey() {
    let mut pair = Pair::connected();
    pair.run(SECOND * 600);
    assert_eq!(pair.sides[A].initiations.len(), 1);
    assert!(pair.sides[B].initiations.is_empty());
}

#[test]
fn keys_are_dead_after_reject_after_time() {
    let mut pair = Pair::connected();
    let created = START + MS * 10; // B's; A's is 10 ms younger
    pair.run((created + REJECT_AFTER_TIME) - pair.now - TICK);
    assert_eq!(pair.sides[B].indexes.table.len(), 1);
    let kept = Arc::downgrade(pair.sides[B].indexes.table.values().next().unwrap());
    pair.run(TICK);
    assert!(pair.sides[B].indexes.table.is_empty() && pair.sides[B].indexes.live.is_empty());
    assert!(kept.upgrade().is_none(), "nobody holds the keys any more");
    pair.send(B, b"packet");
    assert_eq!(pair.sides[B].staged.len(), 1);
    assert_eq!(pair.sides[B].initiations.len(), 1);
    pair.run(SECOND);
    assert_eq!(pair.received(A), 1);
}

#[test]
fn nothing_is_left_after_three_times_reject_after_time() {
    let mut pair = Pair::connected();
    pair.send(A, b"packet");
    pair.wire.clear();
    pair.weather.lost_percent = 100;
    pair.run(REJECT_AFTER_TIME * 3);
    for side in &pair.sides {
        assert!(side.indexes.table.is_empty() && side.indexes.live.is_empty());
        assert!(side.session.pending_index().is_none());
        assert!(!side.session.is_awake());
    }
}

#[test]
fn clearing_ends_everything_at_once() {
    let mut pair = Pair::connected();
    pair.run(SECOND * 10);
    pair.sides[A].initiate(pair.now);
    pair.sides[A].peer().activity.data_received(pair.now);
    pair.sides[A].peer().activity.data_sent(pair.now);
    pair.sides[A].peer().activity.data_received(pair.now);
    let now = pair.now;
    pair.sides[A].clear();
    assert!(pair.sides[A].indexes.table.is_empty() && pair.sides[A].indexes.live.is_empty());
    assert!(!pair.sides[A].session.is_awake());
    let activity = &pair.sides[A].peer().activity;
    assert_eq!((activity.unanswered_since(), activity.owed_since()), (None, None));
    pair.sides[A].outbox.clear();
    pair.sides[A].initiate(now + MS * 20);
    assert_eq!(pair.sides[A].outbox.len(), 1, "Rekey-Timeout does not hold for what is gone");
    pair.run(SECOND);
    assert_eq!(pair.sides[A].indexes.table.len(), 1);
}

#[test]
fn what_a_worker_replaced_is_retired() {
    let mut pair = Pair::connected();
    for _ in 0..3 {
        pair.run(SECOND * 10);
        pair.sides[A].initiate(pair.now);
        pair.run(SECOND);
    }
    // `handle_timeout` has compared table, indexes and keypairs each time.
    assert_eq!(pair.sides[B].indexes.table.len(), 2);
    assert_eq!(pair.sides[B].session.poll_timeout().map(|due| due > pair.now), Some(true));
}

#[test]
fn a_confirmation_is_noticed_without_a_word() {
    let mut pair = Pair::new();
    pair.sides[A].initiate(START);
    pair.run(MS * 10);
    let (_, b) = pair.sides.split_at_mut(1);
    let next = b[0].peer().keypairs.load().next.clone().unwrap();
    assert!(b[0].session.poll_timeout() > Some(pair.now));
    assert!(b[0].peer().confirm(&next));
    assert_eq!(b[0].session.poll_timeout(), Some(Now::default()), "at once");
    b[0].handle_timeout(pair.now);
    assert_eq!(b[0].session.last_handshake(), Some(wall(pair.now)));
    assert!(b[0].session.poll_timeout() > Some(pair.now));
}

#[test]
fn a_confirmation_just_before_the_next_initiation_is_noticed_too() {
    let mut pair = Pair::new();
    pair.sides[A].initiate(START);
    pair.run(MS * 10);
    let later = START + SECOND * 6;
    let next_initiation = initiation(&mut pair, later);
    let b = &mut pair.sides[B];
    let next = b.peer().keypairs.load().next.clone().unwrap();
    assert!(b.peer().confirm(&next));
    b.receive(&next_initiation, address(1), later).unwrap();
    assert_eq!(b.session.last_handshake(), Some(wall(later)));
    assert_eq!(b.indexes.table.len(), 2);
    b.handle_timeout(later);
}

#[test]
fn keypairs_are_at_home_where_the_caller_said() {
    let pair = Pair::connected();
    for side in &pair.sides {
        let keypair = side.indexes.table.values().next().unwrap();
        assert_eq!(keypair.home(), ShardId::new(3));
        assert!(Arc::ptr_eq(&keypair.peer().unwrap(), side.session.peer()));
    }
    let roles =
        pair.sides.each_ref().map(|side| side.indexes.table.values().next().unwrap().role());
    assert_eq!(roles, [Role::Initiator, Role::Responder]);
}

// ---------------------------------------------------------------------------------------------
// Silence
// ---------------------------------------------------------------------------------------------

#[test]
fn unanswered_data_leads_to_a_new_handshake() {
    let mut pair = Pair::connected();
    pair.run(SECOND * 30);
    pair.weather.lost_percent = 100;
    let sent = pair.now;
    for _ in 0..14 {
        pair.send(A, b"packet"); // the first one counts
        pair.run(SECOND);
    }
    assert_eq!(pair.sides[A].initiations.len(), 1);
    pair.run(SECOND * 2);
    assert_eq!(pair.sides[A].initiations.len(), 2);
    let begun = pair.sides[A].initiations[1];
    assert!(within(begun, sent + NEW_HANDSHAKE, REKEY_TIMEOUT_JITTER_MAX));
}

#[test]
fn the_handshake_after_silence_is_jittered() {
    let mut waits = BTreeSet::new();
    for seed in 0..20 {
        let mut pair = Pair::new();
        pair.sides[A].rng = StdRng::seed_from_u64(seed);
        pair.sides[A].initiate(START);
        pair.run(SECOND * 20);
        pair.weather.lost_percent = 100;
        let sent = pair.now;
        pair.send(A, b"packet");
        pair.run(SECOND * 16);
        waits.insert(*pair.sides[A].initiations.last().unwrap() - sent);
    }
    assert!(waits.len() > 10);
    assert!(waits.iter().all(|wait| *wait >= NEW_HANDSHAKE));
}

#[test]
fn a_keepalive_answers_data() {
    let mut pair = Pair::connected();
    pair.run(SECOND * 30);
    let sent = pair.now;
    pair.send(A, b"packet");
    pair.run(SECOND * 60);
    assert_eq!(pair.sides[B].keepalives, [sent + MS * 10 + KEEPALIVE_TIMEOUT]);
    assert_eq!(pair.sides[A].initiations.len(), 1, "so there is no new handshake");
}

#[test]
fn keepalives_do_not_answer_keepalives() {
    let mut pair = Pair::connected();
    let before = pair.sides.each_ref().map(|side| side.keepalives.len());
    assert_eq!(before, [1, 0]);
    pair.run(SECOND * 100);
    pair.send(A, b"packet");
    pair.run(SECOND * 60);
    let after = pair.sides.each_ref().map(|side| side.keepalives.len());
    assert_eq!(after, [1, 1]);
}

#[test]
fn whoever_sends_owes_no_keepalive() {
    let mut pair = Pair::connected();
    for _ in 0..20 {
        pair.send(A, b"question");
        pair.run(SECOND * 4);
        pair.send(B, b"answer");
        pair.run(SECOND);
    }
    pair.run(SECOND * 8);
    assert_eq!(pair.sides[A].keepalives.len(), 1, "the confirmation");
    assert!(pair.sides[B].keepalives.is_empty());
}

#[test]
fn steady_data_one_way_is_answered_every_keepalive_timeout() {
    let mut pair = Pair::connected();
    for _ in 0..100 {
        pair.send(A, b"packet");
        pair.run(SECOND);
    }
    let count = pair.sides[B].keepalives.len();
    assert!((9..=10).contains(&count), "{count}");
}

#[test]
fn a_keepalive_without_a_keypair_begins_a_handshake() {
    let mut side = lonely();
    side.peer().activity.data_received(START);
    side.run_alone(START + KEEPALIVE_TIMEOUT);
    assert_eq!(side.initiations, [START + KEEPALIVE_TIMEOUT]);
}

#[test]
fn persistent_keepalive_follows_its_interval_of_silence() {
    let mut pair = Pair::connected();
    pair.run(SECOND * 9);
    let set = pair.now;
    pair.sides[A].session.set_persistent_keepalive(Some(SECOND * 25), set);
    pair.run(SECOND * 60);
    let sent = pair.sides[A].keepalives[1..].to_vec();
    assert_eq!(sent, [set, set + SECOND * 25, set + SECOND * 50], "the first one at once");
    // Any traffic, in either direction, is as good.
    pair.send(B, b"packet");
    pair.run(SECOND * 9);
    pair.send(A, b"packet");
    let answered = pair.now;
    pair.run(SECOND * 30);
    let keepalives = &pair.sides[A].keepalives;
    assert!(keepalives[4..].iter().all(|&at| at >= answered + SECOND * 25));
    pair.sides[A].session.set_persistent_keepalive(None, pair.now);
    let count = pair.sides[A].keepalives.len();
    pair.run(SECOND * 100);
    assert_eq!(pair.sides[A].keepalives.len(), count);
}

#[test]
fn a_changed_interval_does_not_begin_anew() {
    let mut pair = Pair::connected();
    let set = pair.now;
    pair.sides[A].session.set_persistent_keepalive(Some(SECOND * 25), set);
    pair.run(SECOND * 5);
    for interval in [25, 20] {
        pair.sides[A].session.set_persistent_keepalive(Some(SECOND * interval), pair.now);
    }
    pair.run(SECOND * 16);
    assert_eq!(pair.sides[A].keepalives[1..], [set, set + SECOND * 20]);
}

#[test]
fn persistent_keepalive_keeps_trying_for_ever() {
    let mut side = lonely();
    side.session.set_persistent_keepalive(Some(SECOND * 25), START);
    side.run_alone(START + SECOND * 3600);
    assert_eq!(side.initiations[0], START, "at once");
    assert!(side.initiations.len() > 300, "{}", side.initiations.len());
    let gaps = side.initiations.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(gaps.clone().min().unwrap() >= REKEY_TIMEOUT);
    assert!(gaps.max().unwrap() <= SECOND * 31, "{:?}", side.initiations);
    assert!(side.indexes.lent < 50, "{} indexes for one peer", side.indexes.lent);
}

#[test]
fn persistent_keepalive_keeps_a_tunnel_alive() {
    let mut pair = Pair::connected();
    pair.sides[A].session.set_persistent_keepalive(Some(SECOND * 25), pair.now);
    for _ in 0..20 {
        pair.run(SECOND * 60);
        pair.send(B, b"packet");
    }
    pair.run(SECOND);
    assert!(pair.sides[B].initiations.is_empty(), "it always had a keypair");
    assert_eq!(pair.received(A), 20);
}

#[test]
fn clock_jumping_forward_by_hours_ends_all_keys_and_a_packet_begins_anew() {
    let mut pair = Pair::connected();
    pair.sides[A].session.set_persistent_keepalive(Some(SECOND * 25), pair.now);
    pair.run(SECOND * 2);
    pair.send(A, b"packet"); // it waits for an answer across the jump
    pair.sides[B].peer().endpoint.store(Some(Arc::new(address(1))));
    pair.wire.clear();
    let sent = pair.sides.each_ref().map(|side| side.initiations.len());
    pair.now = pair.now + SECOND * 3600 * 5;
    for side in &mut pair.sides {
        assert!(side.peer().keypairs.load().seals_with(pair.now).is_none(), "before any timer ran");
        side.handle_timeout(pair.now);
        assert!(side.indexes.table.is_empty());
    }
    // What was due many times is done once.
    assert_eq!(pair.sides[A].initiations.len(), sent[A] + 1);
    assert_eq!(pair.sides[B].initiations.len(), sent[B]);
    pair.run(SECOND);
    pair.send(B, b"packet");
    pair.run(SECOND);
    assert_eq!(pair.received(A), 1);
}

#[test]
fn a_handshake_in_flight_when_the_clock_jumps_forward_is_given_up() {
    let mut side = lonely();
    side.send(b"packet", START);
    let later = START + SECOND * 3600;
    side.handle_timeout(later);
    assert_eq!((side.dropped_staged, side.session.pending_index()), (1, None));
    side.send(b"packet", later);
    assert_eq!(side.initiations, [START, later]);
}

#[test]
fn clock_going_backward_harms_nothing() {
    let mut pair = Pair::connected();
    pair.sides[A].session.set_persistent_keepalive(Some(SECOND * 25), pair.now);
    pair.send(A, b"packet");
    pair.run(SECOND * 3);
    let (before, sent) = (pair.now, pair.sides[A].initiations.len());
    for back in [SECOND, SECOND * 60, SECOND * 900] {
        pair.now = Now::from_boot_ns(before.boot_ns() - back.as_nanos() as u64);
        for side in &mut pair.sides {
            side.handle_timeout(pair.now);
            side.initiate(pair.now);
            side.handle_timeout(pair.now);
        }
        pair.send(A, b"packet");
        pair.send(B, b"packet");
        pair.run(MS * 100);
        assert_eq!(pair.sides[A].initiations.len(), sent, "nothing is repeated early");
    }
    assert_eq!((pair.received(A), pair.received(B)), (3, 4));
    assert_eq!(pair.drops, []);
    // When it is as late again as it was, all goes on.
    pair.now = before;
    pair.run(SECOND * 300);
    pair.send(B, b"packet");
    pair.run(SECOND);
    assert_eq!(pair.received(A), 4);
}

#[test]
fn asking_every_keepalive_timeout_misses_no_timer() {
    // Traffic between two questions arms nothing that runs out before the second.
    let side = lonely();
    let asked = START;
    assert_eq!(side.session.poll_timeout(), None);
    side.peer().activity.data_received(asked + TICK);
    side.peer().activity.data_sent(asked + TICK);
    side.peer().activity.data_received(asked + TICK);
    assert!(side.session.poll_timeout().unwrap() >= asked + KEEPALIVE_TIMEOUT);
}

// ---------------------------------------------------------------------------------------------
// A bad link
// ---------------------------------------------------------------------------------------------

fn weather() -> impl Strategy<Value = Weather> {
    (0..60_u32, 0..30_u32, 0..50_u64, 0..4000_u64).prop_map(|(lost, doubled, least, more)| {
        Weather { lost_percent: lost, doubled_percent: doubled, delay_ms: (least, least + more) }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn a_lossy_link_loses_packets_but_never_the_tunnel(
        seed: u64,
        weathers in prop::collection::vec((weather(), 1..300_u64), 1..6),
        pause in 1..40_u64,
        both_know: bool,
    ) {
        let mut pair = Pair::new();
        pair.rng = StdRng::seed_from_u64(seed);
        if both_know {
            pair.sides[B].set_endpoint(address(1));
        }
        let mut number = 0_u64;
        for (weather, seconds) in weathers {
            pair.weather = weather;
            for _ in 0..seconds / pause + 1 {
                for side in [A, B] {
                    // B may not know where A is yet.
                    if pair.sides[side].endpoint().is_some() && pair.rng.random_ratio(2, 3) {
                        number += 1;
                        pair.send(side, &[number.to_le_bytes(); 2].concat());
                    }
                }
                pair.run(SECOND * pause as u32);
            }
        }
        for side in &pair.sides {
            let distinct: BTreeSet<_> = side.received.iter().collect();
            prop_assert_eq!(distinct.len(), side.received.len(), "nothing is delivered twice");
        }
        for (_, reason) in &pair.drops {
            prop_assert!(!matches!(reason, DropReason::BadTag | DropReason::BadMac1), "{:?}", reason);
        }

        // Fair weather again: what is sent after one handshake's time arrives, both ways.
        pair.weather = CALM;
        pair.send(A, b"wake up, all of you");
        pair.run(SECOND * 25);
        let before = [A, B].map(|side| pair.received(side));
        pair.send(A, b"hello from a");
        pair.send(B, b"hello from b");
        pair.run(SECOND * 6);
        let after = [A, B].map(|side| pair.received(side));
        prop_assert_eq!(after, before.map(|count| count + 1));

        // And in silence everything ends.
        pair.run(SECOND * 600);
        for side in &pair.sides {
            prop_assert!(side.indexes.table.is_empty() && side.indexes.live.is_empty());
            prop_assert!(!side.session.is_awake());
        }
    }
}

// ---------------------------------------------------------------------------------------------
// boringtun
// ---------------------------------------------------------------------------------------------

/// boringtun's end of a tunnel to a [`Side`].
struct Oracle {
    tunn: Tunn,
    buffer: Vec<u8>,
}

impl Oracle {
    fn new(psk: Option<[u8; 32]>) -> Self {
        let private = x25519::StaticSecret::from(*key(2).expose());
        let remote = x25519::PublicKey::from(*key(1).public_key().as_bytes());
        let tunn = Tunn::new(private, remote, psk, None, 9, None);
        Self { tunn, buffer: vec![0; 2048] }
    }

    /// What it sends for a packet from its TUN device.
    fn send(&mut self, packet: &[u8]) -> Option<Vec<u8>> {
        match self.tunn.encapsulate(packet, &mut self.buffer) {
            TunnResult::WriteToNetwork(datagram) => Some(datagram.to_vec()),
            TunnResult::Done => None,
            other => panic!("{other:?}"),
        }
    }

    /// What it sends, and what it delivers, when a datagram comes.
    fn receive(&mut self, datagram: &[u8]) -> (Vec<Vec<u8>>, Option<Vec<u8>>) {
        let mut sent = Vec::new();
        let mut input = datagram;
        loop {
            match self.tunn.decapsulate(None, input, &mut self.buffer) {
                TunnResult::WriteToNetwork(datagram) => sent.push(datagram.to_vec()),
                TunnResult::WriteToTunnelV4(packet, _) => return (sent, Some(packet.to_vec())),
                TunnResult::Done => return (sent, None),
                other => panic!("{other:?}"),
            }
            input = &[]; // it has more
        }
    }
}

/// An IPv4 packet, as boringtun looks at it.
fn packet(number: u8, payload_len: usize) -> Vec<u8> {
    let mut packet = vec![0; 20 + payload_len];
    packet[0] = 0x45;
    let len = (packet.len() as u16).to_be_bytes();
    packet[2..4].copy_from_slice(&len);
    packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    packet[20..].fill(number);
    packet
}

fn exchange_data(side: &mut Side, oracle: &mut Oracle) {
    for number in 0..100 {
        let packet = packet(number, usize::from(number) * 13 + 1);
        side.send(&packet, START);
        let (datagram, to) = side.outbox.pop().unwrap();
        assert_eq!(to.remote, address(2).remote);
        let (_, delivered) = oracle.receive(&datagram);
        assert_eq!(delivered.as_ref(), Some(&packet));

        let datagram = oracle.send(&packet).unwrap();
        side.receive(&datagram, address(2), START).unwrap();
        let received = side.received.pop().unwrap();
        assert_eq!(received[..packet.len()], packet);
        assert_eq!(side.receive(&datagram, address(2), START), Err(DropReason::Replay));
    }
}

fn psks() -> [(PresharedKey, Option<[u8; 32]>); 2] {
    [(psk(), Some(*psk().expose())), (PresharedKey::default(), None)]
}

#[test]
fn we_initiate_and_boringtun_responds() {
    for (ours, theirs) in psks() {
        let mut side = Side::new(1, key(1), &key(2), ours);
        side.set_endpoint(address(2));
        let mut oracle = Oracle::new(theirs);
        side.send(&packet(1, 100), START);
        let (responses, _) = oracle.receive(&side.outbox.pop().unwrap().0);
        side.receive(&responses[0], address(2), START).unwrap();
        let (_, delivered) = oracle.receive(&side.outbox.pop().unwrap().0);
        assert_eq!(delivered, Some(packet(1, 100)), "the staged packet");
        assert!(side.staged.is_empty() && side.outbox.is_empty());
        exchange_data(&mut side, &mut oracle);
    }
}

#[test]
fn boringtun_initiates_and_we_respond() {
    for (ours, theirs) in psks() {
        let mut side = Side::new(1, key(1), &key(2), ours);
        let mut oracle = Oracle::new(theirs);
        let initiation = oracle.send(&packet(1, 100)).unwrap();
        side.receive(&initiation, address(2), START).unwrap();
        let replay = side.receive(&initiation, address(2), START + SECOND);
        assert_eq!(replay, Err(DropReason::OldTimestamp));
        let response = side.outbox.pop().unwrap().0;
        let (confirmation, _) = oracle.receive(&response);
        assert!(!confirmation.is_empty());
        assert_eq!(confirmation[0].len(), TRANSPORT_MIN_LEN, "a keepalive comes first");
        for datagram in confirmation {
            side.receive(&datagram, address(2), START).unwrap();
        }
        assert_eq!(side.received.pop(), Some(packet(1, 100)), "its queued packet");
        exchange_data(&mut side, &mut oracle);
    }
}

#[test]
fn boringtun_refuses_another_preshared_key() {
    let mut side = lonely();
    let mut oracle = Oracle::new(Some([3; 32]));
    side.initiate(START);
    let (responses, _) = oracle.receive(&side.outbox.pop().unwrap().0);
    let outcome = side.receive(&responses[0], address(2), START);
    assert_eq!(outcome, Err(DropReason::BadHandshake));
    assert!(side.indexes.table.is_empty());
}
