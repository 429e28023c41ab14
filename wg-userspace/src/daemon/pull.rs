//! Pulls peers that knock: looks them up, adds them, and lets them go when they are idle.
//!
//! ```text
//! handshake ─ Notice::LookUp ─ Device, then another PeerSource ─ Known ─ Device::pull ─ looked_up
//!           └ Notice::Handshake ─ TimestampKeeper ─ keep_timestamp
//! tick ─ IdleWatch ─ removed as if wg(8) had said so ─ TimestampKeeper
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::mpsc;
use wg_common::id::PeerId;
use wg_common::time::Now;

use super::control::Control;
use super::effects::preshared_key_of;
use super::pulled::{IDLE_TIME, IdleWatch, TimestampKeeper};
use crate::datapath::shared::PEER_COUNT_MAX;
use crate::device::{Effect, KnownPeer, Lookup, PeerChange, PeerSource, SetRequest, Tai64N};
use crate::handshake::source::Answer;
use crate::handshake::{Notice, Notify};
use crate::key::PublicKey;
use crate::lookup::Report;
use crate::noise::Timestamp;

/// Notices of the handshake pool that wait for control.
const NOTICE_COUNT_MAX: usize = 4096;
/// Idle peers that are removed in one turn: control has other things to do.
const EVICTIONS_PER_TICK: usize = 64;
/// A failing source is complained about no more often than this.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(30);

/// What happens around pulled peers, for [`Control::pull_event`].
#[derive(Debug)]
pub enum PullEvent {
    /// The handshake pool has something to say.
    Notice(Notice),
    /// A source has.
    Report(Report),
}

/// Where [`PullEvent`]s come out.
pub struct PullEvents {
    notices: mpsc::Receiver<Notice>,
    reports: mpsc::Receiver<Report>,
}

impl PullEvents {
    /// Events of the pool, which is to be given the [`Notify`], and of a source.
    pub fn new(reports: mpsc::Receiver<Report>) -> (Self, Notify) {
        let (sender, notices) = mpsc::channel(NOTICE_COUNT_MAX);
        let notify = Box::new(move |notice| sender.try_send(notice).is_ok());
        (Self { notices, reports }, notify)
    }

    /// The next event; waits for ever if nothing is pulled.
    pub async fn next(events: &mut Option<Self>) -> PullEvent {
        let Some(events) = events else { return std::future::pending().await };
        tokio::select! {
            Some(notice) = events.notices.recv() => PullEvent::Notice(notice),
            Some(report) = events.reports.recv() => PullEvent::Report(report),
            else => std::future::pending().await,
        }
    }
}

/// A source of peers, and what control remembers of those it pulled.
pub struct Pulling {
    source: Box<dyn PeerSource<Peer = KnownPeer>>,
    idle: RefCell<IdleWatch>,
    timestamps: RefCell<TimestampKeeper>,
    counts: Counts,
    complained: Cell<Option<Now>>,
    /// Failures since then.
    silent: Cell<u64>,
}

/// What `tidegate show` tells of the source.
#[derive(Default)]
struct Counts {
    asked: Cell<u64>,
    known: Cell<u64>,
    unknown: Cell<u64>,
    failed: Cell<u64>,
    refused: Cell<u64>,
    evicted: Cell<u64>,
    timestamps_failed: Cell<u64>,
}

fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

impl Pulling {
    /// Pulls peers from `source`.
    pub fn new(source: Box<dyn PeerSource<Peer = KnownPeer>>) -> Self {
        Self {
            source,
            idle: RefCell::new(IdleWatch::new(IDLE_TIME)),
            timestamps: RefCell::default(),
            counts: Counts::default(),
            complained: Cell::default(),
            silent: Cell::default(),
        }
    }

    /// Counts of what the source said and what came of it, by name.
    pub fn status(&self) -> BTreeMap<&'static str, u64> {
        let counts = &self.counts;
        BTreeMap::from([
            ("asked", counts.asked.get()),
            ("known", counts.known.get()),
            ("unknown", counts.unknown.get()),
            ("failed", counts.failed.get()),
            ("refused", counts.refused.get()),
            ("evicted", counts.evicted.get()),
            ("timestamps_failed", counts.timestamps_failed.get()),
            ("pulled_peers", self.idle.borrow().count() as u64),
        ])
    }

    /// Says that something failed, but not all the time.
    fn complain(&self, what: &str, error: &dyn std::fmt::Display, now: Now) {
        if self.complained.get().is_some_and(|at| now.since(at) < COMPLAINT_INTERVAL) {
            return self.silent.set(self.silent.get() + 1);
        }
        self.complained.set(Some(now));
        tracing::warn!(%error, not_said_since = self.silent.take(), "{what}");
    }

    /// Has the source keep a timestamp, if there is one to keep.
    fn keep(&self, key: &PublicKey, timestamp: Option<Tai64N>) {
        if let Some(timestamp) = timestamp
            && !self.source.keep_timestamp(key, timestamp)
        {
            // It keeps none, and says nothing more.
            self.timestamps.borrow_mut().forget(key);
        }
    }
}

impl Control {
    /// Does what an event around pulled peers asks for.
    pub fn pull_event(&self, event: PullEvent, now: Now) {
        let Some(pulling) = &self.pulling else { return };
        match event {
            PullEvent::Notice(Notice::LookUp(key)) => self.look_up(pulling, &key, now),
            PullEvent::Notice(Notice::Handshake(id)) => self.keep_timestamp(pulling, id, now),
            PullEvent::Report(Report::LookedUp { public_key, outcome }) => match outcome {
                Ok(Some(known)) => self.pull(pulling, *known, now),
                Ok(None) => self.unknown(pulling, &public_key, now),
                Err(error) => {
                    count(&pulling.counts.failed);
                    pulling.complain("a peer could not be looked up", &error, now);
                    self.handshakes.looked_up(&public_key, Answer::Failed, now);
                }
            },
            PullEvent::Report(Report::Kept { public_key, outcome, .. }) => {
                if let Err(error) = outcome {
                    count(&pulling.counts.timestamps_failed);
                    pulling.timestamps.borrow_mut().failed(&public_key);
                    pulling.complain("a peer's timestamp is not kept", &error, now);
                }
                let next = pulling.timestamps.borrow_mut().ended(&public_key, now);
                pulling.keep(&public_key, next);
            }
        }
    }

    /// Lets look-ups fail whose time is over, removes idle peers, and sends timestamps that are due. To
    /// be called several times a second.
    pub fn pull_tick(&self, now: Now) {
        let Some(pulling) = &self.pulling else { return };
        for _ in 0..self.handshakes.expire_lookups(now) {
            count(&pulling.counts.failed);
            pulling.complain("a peer could not be looked up", &"no answer in time", now);
        }
        loop {
            let due = pulling.timestamps.borrow_mut().due(now);
            let Some((key, timestamp)) = due else { break };
            pulling.keep(&key, Some(timestamp));
        }
        for _ in 0..EVICTIONS_PER_TICK {
            let due = pulling.idle.borrow_mut().due(now);
            let Some(key) = due else { break };
            self.evict_if_idle(pulling, key, now);
        }
    }

    /// Takes note of what a request has made configured peers.
    pub(super) fn peers_configured(&self, keys: &[PublicKey]) {
        let Some(pulling) = &self.pulling else { return };
        let device = self.device.borrow();
        for key in keys {
            let peer = device.find(key).and_then(|id| device.peer(id));
            if peer.is_some_and(|peer| !peer.pulled) && pulling.idle.borrow_mut().forget(key) {
                pulling.timestamps.borrow_mut().forget(key);
            }
        }
    }

    /// Takes note that a peer is about to be removed, whatever for.
    pub(super) fn peer_leaves(&self, id: PeerId, key: &PublicKey, now: Now) {
        let Some(pulling) = &self.pulling else { return };
        if !pulling.idle.borrow_mut().forget(key) {
            return;
        }
        if let Some(cell) = self.handshakes.cell(id) {
            let timestamp = *cell.greatest_timestamp().as_bytes();
            let next = pulling.timestamps.borrow_mut().leave(key, timestamp, now);
            pulling.keep(key, next);
        }
    }

    fn look_up(&self, pulling: &Pulling, key: &PublicKey, now: Now) {
        // The device goes first: the peer may have been configured since it knocked.
        let configured = self.device.borrow().lookup(key);
        if let Lookup::Known(_) = configured {
            return self.handshakes.looked_up(key, Answer::Known, now);
        }
        count(&pulling.counts.asked);
        match pulling.source.lookup(key) {
            Lookup::Known(known) => self.pull(pulling, known, now),
            Lookup::Unknown => self.unknown(pulling, key, now),
            Lookup::Pending => {}
        }
    }

    fn unknown(&self, pulling: &Pulling, key: &PublicKey, now: Now) {
        count(&pulling.counts.unknown);
        self.handshakes.looked_up(key, Answer::Unknown, now);
    }

    /// Makes a peer of what the source knows, if its initiation still waits and is no replay.
    fn pull(&self, pulling: &Pulling, known: KnownPeer, now: Now) {
        let key = known.public_key;
        let Some(knocked) = self.handshakes.awaited(&key) else { return };
        count(&pulling.counts.known);
        if self.device.borrow().find(&key).is_some() {
            return self.handshakes.looked_up(&key, Answer::Known, now);
        }
        if self.device.borrow().peer_count() >= PEER_COUNT_MAX {
            count(&pulling.counts.refused);
            pulling.complain("a peer is not pulled", &"there are too many already", now);
            return self.handshakes.looked_up(&key, Answer::Failed, now);
        }
        let mut timestamps = pulling.timestamps.borrow_mut();
        let greatest = timestamps.begin(key, known.greatest_timestamp);
        if *knocked.as_bytes() <= greatest {
            let next = timestamps.leave(&key, greatest, now);
            drop(timestamps);
            pulling.keep(&key, next);
            return self.handshakes.looked_up(&key, Answer::Replayed, now);
        }
        drop(timestamps);
        let effects = match self.device.borrow_mut().pull(known) {
            Ok(effects) => effects,
            Err(error) => {
                pulling.timestamps.borrow_mut().forget(&key);
                count(&pulling.counts.refused);
                // Rare, since it is remembered for a while; and somebody must set it right.
                tracing::warn!(peer = %key, %error, "a peer is refused for what its source says");
                return self.handshakes.looked_up(&key, Answer::Unknown, now);
            }
        };
        if effects.is_empty() {
            // Nobody is a peer of himself.
            pulling.timestamps.borrow_mut().forget(&key);
            return self.handshakes.looked_up(&key, Answer::Unknown, now);
        }
        for effect in effects {
            match effect {
                Effect::PeerAdded { id, public_key } => {
                    let hot = self.hot_peer(id, public_key);
                    let greatest = Timestamp::from_bytes(greatest);
                    let psk = preshared_key_of(&self.device.borrow(), id);
                    self.handshakes.add_known_peer(hot, psk, greatest);
                }
                effect => self.carry_out(effect),
            }
        }
        pulling.idle.borrow_mut().watch(key, now);
        tracing::debug!(peer = %key, "pulled");
        self.handshakes.looked_up(&key, Answer::Known, now);
    }

    fn keep_timestamp(&self, pulling: &Pulling, id: PeerId, now: Now) {
        let Some(cell) = self.handshakes.cell(id) else { return };
        let (key, timestamp) = (cell.hot.public_key, *cell.greatest_timestamp().as_bytes());
        let next = pulling.timestamps.borrow_mut().seen(&key, timestamp, now);
        pulling.keep(&key, next);
    }

    fn evict_if_idle(&self, pulling: &Pulling, key: PublicKey, now: Now) {
        let id = self.device.borrow().find(&key);
        let cell = id.and_then(|id| self.handshakes.cell(id));
        let Some(cell) = cell else {
            pulling.idle.borrow_mut().forget(&key);
            return;
        };
        // Without a keypair, it counts from when it was pulled: it is looked at when that is over.
        if let Some(busy_until) = cell.busy_until(now)
            && !pulling.idle.borrow().is_idle(busy_until, now)
        {
            return pulling.idle.borrow_mut().watch(key, busy_until);
        }
        tracing::debug!(peer = %key, "idle, and let go");
        count(&pulling.counts.evicted);
        let change = PeerChange { remove: true, ..PeerChange::new(key) };
        let request = SetRequest { peers: vec![change], ..SetRequest::default() };
        let effects = self.device.borrow_mut().apply(request);
        for effect in effects {
            self.carry_out(effect);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::net::UdpSocket;
    use std::rc::Rc;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use wg_common::endpoint::Endpoint;
    use wg_common::id::{DeviceId, ReceiverIndex, WorkerId};
    use wg_common::index::{IndexLayout, IndexPermutation};
    use wg_common::outcome::DropReason;
    use wg_common::protocol::{INITIATION_INTERVAL_MIN, REJECT_AFTER_TIME};

    use super::*;
    use crate::aead::RingAead;
    use crate::counters::Totals;
    use crate::datapath::handoff::{HandshakeDatagram, Work};
    use crate::datapath::{Shared, SocketGroup, WorkQueue};
    use crate::handshake::{Handshakes, Os, source::Limits};
    use crate::key::{PresharedKey, PrivateKey};
    use crate::noise::{Identity, Initiator, RemoteStatic, initiate};
    use crate::sys::clock;
    use crate::sys::random::Rng;
    use crate::uapi::Handler as _;
    use crate::udp;

    const SECOND: Duration = Duration::from_secs(1);

    /// A source that is asked, answers when the test says so, and keeps timestamps.
    #[derive(Clone, Default)]
    struct Source(Rc<RefCell<Peers>>);

    #[derive(Default)]
    struct Peers {
        known: HashMap<PublicKey, KnownPeer>,
        asked: Vec<PublicKey>,
        kept: Vec<(PublicKey, Tai64N)>,
        is_slow: bool,
    }

    impl PeerSource for Source {
        type Peer = KnownPeer;

        fn lookup(&self, key: &PublicKey) -> Lookup<KnownPeer> {
            let mut peers = self.0.borrow_mut();
            peers.asked.push(*key);
            if peers.is_slow {
                return Lookup::Pending;
            }
            peers.known.get(key).map_or(Lookup::Unknown, |known| Lookup::Known(known.clone()))
        }

        fn keep_timestamp(&self, key: &PublicKey, timestamp: Tai64N) -> bool {
            let mut peers = self.0.borrow_mut();
            peers.kept.push((*key, timestamp));
            if let Some(known) = peers.known.get_mut(key) {
                known.greatest_timestamp = known.greatest_timestamp.max(timestamp);
            }
            true
        }
    }

    /// A gateway without peers, a source, and a socket at which answers arrive.
    struct Gateway {
        control: Control,
        work: Arc<WorkQueue>,
        events: Option<PullEvents>,
        source: Source,
        own_key: PrivateKey,
        client: UdpSocket,
        now: Now,
    }

    /// Somebody who may become a peer.
    struct Client {
        identity: Identity,
        preshared_key: PresharedKey,
    }

    impl Client {
        fn new(seed: u8) -> Self {
            let identity = Identity::new(PrivateKey::from_bytes([seed; 32]));
            Self { identity, preshared_key: PresharedKey::from_bytes([seed; 32]) }
        }

        fn key(&self) -> PublicKey {
            *self.identity.public_key()
        }

        fn known(&self) -> KnownPeer {
            KnownPeer {
                public_key: self.key(),
                preshared_key: self.preshared_key.clone(),
                endpoint: None,
                persistent_keepalive: 0,
                allowed_ips: vec!["10.9.0.2/32".parse().unwrap()],
                greatest_timestamp: Tai64N::default(),
            }
        }
    }

    impl Gateway {
        fn new() -> Self {
            let (port, of_worker) = udp::bind_group(0, 1, 0).unwrap();
            let sockets = SocketGroup { port, of_worker };
            let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
            let (shared, work) =
                Shared::new(DeviceId(0), 1, Vec::new(), sockets, None, indexes).unwrap();
            let (reports, receiver) = mpsc::channel(1);
            drop(reports);
            let (events, notify) = PullEvents::new(receiver);
            let outside = Os::new(Arc::clone(&shared));
            let handshakes = Handshakes::new(Arc::clone(&shared), outside, &RingAead, None);
            let handshakes = Arc::new(handshakes.with_source(Limits::default(), notify));
            let source = Source::default();
            let control = Control::new(shared, handshakes, None, Default::default(), "ring")
                .with_pulling(Some(Pulling::new(Box::new(source.clone()))));
            let own_key = PrivateKey::from_bytes([99; 32]);
            let request =
                SetRequest { private_key: Some(Some(own_key.clone())), ..SetRequest::default() };
            control.set(request).unwrap();
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            client.set_read_timeout(Some(SECOND)).unwrap();
            let now = clock::boot_now();
            Self { control, work, events: Some(events), source, own_key, client, now }
        }

        /// An initiation of `client`, made `second` seconds after 1970.
        fn initiation(&self, client: &Client, second: u64) -> (Initiator, HandshakeDatagram) {
            let psk = client.preshared_key.clone();
            let remote = RemoteStatic::new(&client.identity, self.own_key.public_key(), psk);
            let timestamp = Timestamp::from_unix(second, 0);
            let index = ReceiverIndex::from_wire([1; 4]);
            let (initiator, message) =
                initiate(&client.identity, &remote, index, timestamp, None, &mut Rng).unwrap();
            let from = Endpoint::configured(self.client.local_addr().unwrap());
            let datagram = HandshakeDatagram::new(DeviceId(0), &message, from, WorkerId(0));
            (initiator, datagram.unwrap())
        }

        /// Receives a datagram a while after the last, and does what comes of it.
        fn receive(&mut self, datagram: &HandshakeDatagram) {
            self.now = self.now + INITIATION_INTERVAL_MIN;
            self.work.push(Work::Datagram(*datagram));
            while self.control.handshakes.turn(&self.work, self.now) {}
            self.settle();
        }

        fn settle(&mut self) {
            let events = self.events.as_mut().unwrap();
            while let Ok(notice) = events.notices.try_recv() {
                self.control.pull_event(PullEvent::Notice(notice), self.now);
            }
        }

        /// Lets time pass in which everything is looked at as often as it should.
        fn wait(&mut self, time: Duration) {
            let end = self.now + time;
            while self.now < end {
                self.now = self.now + SECOND;
                self.control.handshakes.tick(self.now);
                self.control.pull_tick(self.now);
                self.settle();
            }
        }

        /// Whether the client was answered with what finishes `initiator`'s handshake.
        fn answers(&self, client: &Client, initiator: &Initiator) -> bool {
            let mut message = [0; 92];
            if self.client.recv(&mut message).is_err() {
                return false;
            }
            let psk = client.preshared_key.clone();
            let remote = RemoteStatic::new(&client.identity, self.own_key.public_key(), psk);
            initiator.finish(&client.identity, &remote, &message).is_ok()
        }

        /// The first transport message comes, as far as workers are concerned.
        fn confirm(&self, client: &Client) {
            let id = self.control.device.borrow().find(&client.key()).unwrap();
            let hot = Arc::clone(&self.control.handshakes.cell(id).unwrap().hot);
            let next = hot.keypairs.load().next.clone().unwrap();
            assert!(hot.confirm(&next));
            self.work.push(Work::Confirmed(id));
            while self.control.handshakes.turn(&self.work, self.now) {}
        }

        fn dropped(&self, reason: DropReason) -> u64 {
            Totals::sum([self.control.handshakes.drops()]).dropped(reason)
        }

        fn peer_count(&self) -> usize {
            self.control.device.borrow().peer_count()
        }

        fn learn(&self, known: KnownPeer) {
            self.source.0.borrow_mut().known.insert(known.public_key, known);
        }
    }

    fn stamp(second: u64) -> Tai64N {
        *Timestamp::from_unix(second, 0).as_bytes()
    }

    /// A peer that says nothing after its handshake goes within this time.
    fn silent_for() -> Duration {
        REJECT_AFTER_TIME + IDLE_TIME + SECOND
    }

    #[test]
    fn a_known_peer_is_pulled_and_its_initiation_answered() {
        let mut gateway = Gateway::new();
        let client = Client::new(1);
        gateway.learn(client.known());
        let (initiator, datagram) = gateway.initiation(&client, 100);
        gateway.receive(&datagram);
        assert!(gateway.answers(&client, &initiator), "the preshared key is that of the source");
        assert_eq!(gateway.dropped(DropReason::LookupPending), 1);
        assert_eq!(gateway.source.0.borrow().asked, [client.key()]);
        let device = gateway.control.device.borrow();
        let id = device.find(&client.key()).unwrap();
        assert!(device.peer(id).unwrap().pulled);
        let owner = gateway.control.shared.routing.load().lookup("10.9.0.2".parse().unwrap());
        assert_eq!(owner, Some(id));
    }

    #[test]
    fn an_unknown_sender_gets_nothing_and_is_not_asked_for_again() {
        let mut gateway = Gateway::new();
        let client = Client::new(1);
        for second in 0..5 {
            let (_, datagram) = gateway.initiation(&client, 100 + second);
            gateway.receive(&datagram);
        }
        assert_eq!((gateway.peer_count(), gateway.dropped(DropReason::UnknownPeer)), (0, 5));
        assert_eq!(gateway.source.0.borrow().asked.len(), 1);
        gateway.client.set_nonblocking(true).unwrap();
        assert!(gateway.client.recv(&mut [0; 200]).is_err());
    }

    #[test]
    fn who_does_not_have_the_private_key_has_nobody_looked_up() {
        let mut gateway = Gateway::new();
        let (victim, attacker) = (Client::new(1), Client::new(2));
        gateway.learn(victim.known());
        // Sealed for the gateway, with the victim's static key, by somebody who lacks its private key:
        // as far as that tag goes, everything is right.
        let (_, datagram) = gateway.initiation(&victim, 100);
        let (_, other) = gateway.initiation(&attacker, 100);
        let mut forged = datagram.message().to_vec();
        forged[88..116].copy_from_slice(&other.message()[88..116]);
        let mac1 = remac(&gateway, &forged);
        forged[116..132].copy_from_slice(&mac1);
        let forged =
            HandshakeDatagram::new(DeviceId(0), &forged, datagram.from, WorkerId(0)).unwrap();
        gateway.receive(&forged);
        assert_eq!(gateway.dropped(DropReason::BadHandshake), 1);
        assert!(gateway.source.0.borrow().asked.is_empty());
        assert_eq!(gateway.peer_count(), 0);
    }

    /// mac1 of a message to the gateway.
    fn remac(gateway: &Gateway, message: &[u8]) -> [u8; 16] {
        use blake2::digest::consts::U16;
        use blake2::digest::{FixedOutput, KeyInit};
        use blake2::{Blake2s256, Blake2sMac, Digest, digest::Update};
        let public_key = gateway.own_key.public_key();
        let key = Blake2s256::digest([b"mac1----", public_key.as_bytes().as_slice()].concat());
        let mut mac = Blake2sMac::<U16>::new_from_slice(&key).unwrap();
        mac.update(&message[..116]);
        mac.finalize_fixed().into()
    }

    #[test]
    fn a_retry_is_answered_when_the_source_is_slow() {
        let mut gateway = Gateway::new();
        let client = Client::new(1);
        gateway.source.0.borrow_mut().is_slow = true;
        let (_, first) = gateway.initiation(&client, 100);
        let (initiator, retry) = gateway.initiation(&client, 105);
        gateway.receive(&first);
        gateway.receive(&retry);
        assert_eq!(gateway.source.0.borrow().asked.len(), 1);
        let known = Ok(Some(Box::new(client.known())));
        let report = Report::LookedUp { public_key: client.key(), outcome: known };
        gateway.control.pull_event(PullEvent::Report(report), gateway.now);
        assert!(gateway.answers(&client, &initiator));
    }

    #[test]
    fn a_source_that_never_answers_is_given_up() {
        let mut gateway = Gateway::new();
        let client = Client::new(1);
        gateway.source.0.borrow_mut().is_slow = true;
        let (_, first) = gateway.initiation(&client, 100);
        gateway.receive(&first);
        gateway.wait(Limits::default().timeout);
        assert_eq!(gateway.control.pulling.as_ref().unwrap().status()["failed"], 1);
        // What is said too late is not heard; the peer asks again.
        let known = Ok(Some(Box::new(client.known())));
        let report = Report::LookedUp { public_key: client.key(), outcome: known };
        gateway.control.pull_event(PullEvent::Report(report), gateway.now);
        assert_eq!(gateway.peer_count(), 0);
        gateway.source.0.borrow_mut().is_slow = false;
        gateway.learn(client.known());
        gateway.wait(SECOND * 2);
        let (initiator, retry) = gateway.initiation(&client, 115);
        gateway.receive(&retry);
        assert!(gateway.answers(&client, &initiator));
    }

    #[test]
    fn an_idle_peer_goes_and_its_initiations_stay_replays() {
        let mut gateway = Gateway::new();
        let client = Client::new(1);
        gateway.learn(client.known());
        let (initiator, datagram) = gateway.initiation(&client, 100);
        gateway.receive(&datagram);
        assert!(gateway.answers(&client, &initiator));
        gateway.wait(silent_for() - SECOND * 3);
        assert_eq!(gateway.peer_count(), 1, "too early");
        gateway.wait(SECOND * 4);
        assert_eq!(gateway.peer_count(), 0);
        assert!(
            gateway.control.shared.routing.load().lookup("10.9.0.2".parse().unwrap()).is_none()
        );
        // Never confirmed, but kept when it went.
        assert_eq!(gateway.source.0.borrow().kept, [(client.key(), stamp(100))]);

        let pulled_before = gateway.control.pulling.as_ref().unwrap().status()["pulled_peers"];
        gateway.receive(&datagram);
        assert_eq!(gateway.dropped(DropReason::OldTimestamp), 1);
        assert_eq!((gateway.peer_count(), pulled_before), (0, 0), "a replay pulls nobody");

        let (initiator, datagram) = gateway.initiation(&client, 101);
        gateway.receive(&datagram);
        assert!(gateway.answers(&client, &initiator), "the peer itself is not shut out");
    }

    #[test]
    fn a_peer_in_use_stays() {
        let mut gateway = Gateway::new();
        let client = Client::new(1);
        gateway.learn(client.known());
        for round in 0..10 {
            let (initiator, datagram) = gateway.initiation(&client, 100 + round);
            gateway.receive(&datagram);
            assert!(gateway.answers(&client, &initiator));
            gateway.confirm(&client);
            gateway.wait(REJECT_AFTER_TIME + IDLE_TIME - SECOND * 9);
            assert_eq!(gateway.peer_count(), 1, "round {round}");
        }
        assert_eq!(gateway.source.0.borrow().asked.len(), 1);
    }

    #[test]
    fn a_confirmed_handshake_has_its_timestamp_kept() {
        let mut gateway = Gateway::new();
        let client = Client::new(1);
        gateway.learn(client.known());
        let (initiator, datagram) = gateway.initiation(&client, 100);
        gateway.receive(&datagram);
        assert!(gateway.answers(&client, &initiator));
        gateway.wait(SECOND);
        assert!(gateway.source.0.borrow().kept.is_empty(), "it may be a replay yet");
        gateway.confirm(&client);
        gateway.wait(SECOND);
        assert_eq!(gateway.source.0.borrow().kept, [(client.key(), stamp(100))]);
    }

    #[test]
    fn a_peer_that_was_configured_meanwhile_never_goes() {
        let mut gateway = Gateway::new();
        let client = Client::new(1);
        gateway.learn(client.known());
        let (_, datagram) = gateway.initiation(&client, 100);
        gateway.receive(&datagram);
        let change = PeerChange { update_only: true, ..PeerChange::new(client.key()) };
        let request = SetRequest { peers: vec![change], ..SetRequest::default() };
        gateway.control.set(request).unwrap();
        gateway.wait(silent_for() * 3);
        assert_eq!(gateway.peer_count(), 1);
        assert!(gateway.source.0.borrow().kept.is_empty());
    }

    #[test]
    fn a_peer_that_wg_removes_leaves_its_timestamp() {
        let mut gateway = Gateway::new();
        let client = Client::new(1);
        gateway.learn(client.known());
        let (_, datagram) = gateway.initiation(&client, 100);
        gateway.receive(&datagram);
        let change = PeerChange { remove: true, ..PeerChange::new(client.key()) };
        let request = SetRequest { peers: vec![change], ..SetRequest::default() };
        gateway.control.set(request).unwrap();
        assert_eq!(gateway.source.0.borrow().kept, [(client.key(), stamp(100))]);
        assert_eq!(gateway.control.pulling.as_ref().unwrap().status()["pulled_peers"], 0);
    }

    #[test]
    fn a_peer_whose_prefix_is_configured_for_another_is_refused() {
        let mut gateway = Gateway::new();
        let (configured, client) = (Client::new(1), Client::new(2));
        let nets = configured.known().allowed_ips.into_iter();
        let nets = nets.map(crate::device::AllowedIpChange::Add).collect();
        let change = PeerChange { allowed_ips: nets, ..PeerChange::new(configured.key()) };
        let request = SetRequest { peers: vec![change], ..SetRequest::default() };
        gateway.control.set(request).unwrap();
        gateway.learn(client.known());
        for second in 0..2 {
            let (_, datagram) = gateway.initiation(&client, 100 + second);
            gateway.receive(&datagram);
        }
        assert_eq!(gateway.control.pulling.as_ref().unwrap().status()["refused"], 1);
        assert_eq!((gateway.peer_count(), gateway.dropped(DropReason::UnknownPeer)), (1, 2));
        let routing = gateway.control.shared.routing.load();
        let owner = gateway.control.device.borrow().find(&configured.key());
        assert_eq!(routing.lookup("10.9.0.2".parse().unwrap()), owner);
    }

    #[test]
    fn who_is_not_added_is_not_looked_up_again_and_again() {
        let mut gateway = Gateway::new();
        // Somebody with our own key, whom a device never takes as a peer.
        let own = Client::new(99);
        assert_eq!(own.key(), gateway.own_key.public_key());
        gateway.learn(own.known());
        let (_, datagram) = gateway.initiation(&own, 100);
        gateway.receive(&datagram);
        assert_eq!(gateway.source.0.borrow().asked.len(), 1);
        // Nor one that control says is known, and is not.
        let gone = Client::new(1);
        gateway.source.0.borrow_mut().is_slow = true;
        let (_, datagram) = gateway.initiation(&gone, 100);
        gateway.receive(&datagram);
        gateway.control.handshakes.looked_up(&gone.key(), Answer::Known, gateway.now);
        gateway.settle();
        assert_eq!(gateway.source.0.borrow().asked.len(), 2);
        assert_eq!((gateway.peer_count(), gateway.dropped(DropReason::UnknownPeer)), (0, 2));
    }

    #[test]
    fn configured_peers_need_no_source() {
        let mut gateway = Gateway::new();
        let client = Client::new(1);
        let change = PeerChange {
            preshared_key: Some(client.preshared_key.clone()),
            ..PeerChange::new(client.key())
        };
        let request = SetRequest { peers: vec![change], ..SetRequest::default() };
        gateway.control.set(request).unwrap();
        let (initiator, datagram) = gateway.initiation(&client, 100);
        gateway.receive(&datagram);
        assert!(gateway.answers(&client, &initiator));
        assert!(gateway.source.0.borrow().asked.is_empty());
        gateway.confirm(&client);
        gateway.wait(SECOND);
        assert!(gateway.source.0.borrow().kept.is_empty());
        let hot = gateway.control.handshakes.cell(PeerId(0)).unwrap().hot.clone();
        assert!(!hot.handshake_wanted.load(Ordering::Relaxed));
    }
}
