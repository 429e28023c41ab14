//! One end of a tunnel: a session with the plainest caller that it can have.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use wg_common::endpoint::Endpoint;
use wg_common::id::{Counter, DeviceId, PeerId, ReceiverIndex, ShardId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::message::{Message, classify};
use wg_common::outcome::DropReason;
use wg_common::protocol::{
    REJECT_AFTER_MESSAGES, STAGED_PACKETS_MAX, TAG_LEN, TRANSPORT_HEADER_LEN, TYPE_TRANSPORT,
};
use wg_common::time::Now;
use wg_userspace::aead::{BatchAead, Job, RingAead};
use wg_userspace::key::{PresharedKey, PrivateKey, PublicKey};
use wg_userspace::noise::{Identity, RemoteStatic, Timestamp, open_initiation};
use wg_userspace::session::handover::{DeviceExport, PeerExport};
use wg_userspace::session::{Action, Context, HotPeer, Indexes, Keypair, Session};
use zeroize::Zeroizing;

/// When everything begins.
pub const START: Now = Now::from_boot_ns(1_000_000_000_000);

/// How all hosts make their indexes.
pub const INDEXES: IndexPermutation = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);

/// Receiver indexes that are never lent twice.
#[derive(Debug, Default)]
pub struct Shelf {
    lent: u32,
    /// Lends none.
    pub exhausted: bool,
    /// Lent and not given back.
    pub live: BTreeSet<u32>,
    /// Published keypairs by local index.
    pub keypairs: BTreeMap<u32, Arc<Keypair>>,
}

impl Indexes for Shelf {
    fn allocate(&mut self) -> Option<ReceiverIndex> {
        if self.exhausted {
            return None;
        }
        // A predecessor's index may be anywhere.
        loop {
            self.lent += 1;
            let index = INDEXES.own_index(self.lent, 7);
            if self.live.insert(index.value()) {
                return Some(index);
            }
        }
    }

    fn release(&mut self, index: ReceiverIndex) {
        assert!(self.live.remove(&index.value()), "an index is given back once");
    }

    fn adopt(&mut self, index: ReceiverIndex) -> bool {
        let is_frozen = |keypair: &Arc<Keypair>| keypair.is_frozen();
        self.live.insert(index.value()) || self.keypairs.get(&index.value()).is_some_and(is_frozen)
    }

    fn publish(&mut self, keypair: &Arc<Keypair>) {
        let index = keypair.local_index().value();
        assert!(self.live.contains(&index), "live before it is published");
        let before = self.keypairs.insert(index, Arc::clone(keypair));
        assert!(before.is_none_or(|before| before.is_frozen()), "an index has one keypair");
    }

    fn retire(&mut self, keypair: &Arc<Keypair>) {
        assert!(self.keypairs.remove(&keypair.local_index().value()).is_some(), "it was published");
        self.release(keypair.local_index());
    }
}

/// A host with one peer.
pub struct Host {
    /// Where it is.
    pub address: Endpoint,
    pub session: Session,
    pub indexes: Shelf,
    /// Messages that have left, and where to.
    pub outbox: Vec<(Vec<u8>, Endpoint)>,
    /// Packets that were opened.
    pub received: Vec<Vec<u8>>,
    identity: Identity,
    rng: StdRng,
    staged: Vec<Vec<u8>>,
    /// Local index of a keypair, and a counter that it has sealed with.
    sealed: HashSet<(u32, u64)>,
    /// The same of what was opened.
    opened: HashSet<(u32, u64)>,
}

impl Host {
    /// Two hosts that know each other's keys; where the other one is, the first one only.
    pub fn pair() -> [Host; 2] {
        // Multiplications on the curve cost more than all else.
        static KEYS: LazyLock<[[PrivateKey; 2]; 1]> =
            LazyLock::new(|| [[1, 2].map(|number| PrivateKey::from_bytes([number; 32]))]);
        let [[a, b]] = &*KEYS;
        let hosts = [Host::new(1, a, b), Host::new(2, b, a)];
        hosts[0].set_endpoint(hosts[1].address);
        hosts
    }

    fn new(number: u8, key: &PrivateKey, other: &PrivateKey) -> Self {
        let identity = Identity::new(key.clone());
        let public_key = other.public_key();
        let peer = Arc::new(HotPeer::new(PeerId(number.into()), DeviceId(0), public_key));
        let remote = RemoteStatic::new(&identity, public_key, PresharedKey::default());
        Self {
            address: address(number),
            session: Session::new(peer, Some(remote.into())),
            indexes: Shelf::default(),
            outbox: Vec::new(),
            received: Vec::new(),
            identity,
            rng: StdRng::seed_from_u64(number.into()),
            staged: Vec::new(),
            sealed: HashSet::new(),
            opened: HashSet::new(),
        }
    }

    pub fn public_key(&self) -> &PublicKey {
        self.identity.public_key()
    }

    /// Lets the first one initiate, and carries what they say until nobody says any more.
    pub fn connect(hosts: &mut [Host; 2], now: Now) {
        hosts[0].initiate(now);
        while let Some(from) = (0..2).find(|from| !hosts[*from].outbox.is_empty()) {
            let (message, _) = hosts[from].outbox.remove(0);
            let address = hosts[from].address;
            hosts[1 - from].receive(&message, address, now).expect("a right message");
        }
    }

    /// Ends the session, and gives what a successor needs to go on with it.
    pub fn export(&mut self, now: Now) -> Vec<u8> {
        self.session.freeze(&mut self.indexes);
        let peer = self.session.export(wall(now), now).expect("it was frozen just now");
        let (public_key, index_key) = (*self.public_key(), Zeroizing::new(vec![1; 16]));
        let export = DeviceExport { public_key, index_key, exported: now, peers: vec![peer] };
        export.into_bytes().to_vec()
    }

    /// Goes on with a session; the number of keypairs that were taken, and that were refused.
    pub fn import(&mut self, export: PeerExport, now: Now) -> (usize, usize) {
        let imported = self.session.import(export, ShardId::new(0), &mut self.indexes, now);
        self.perform(imported.actions, now);
        (imported.taken, imported.refused)
    }

    /// Lets so much time pass, with nobody at the other end, that nothing may be left.
    pub fn rest(&mut self, now: Now) {
        self.session.set_persistent_keepalive(None, now);
        for seconds in (0..800).step_by(2) {
            let now = now + Duration::from_secs(seconds);
            self.handle_timeout(now);
            self.outbox.clear();
        }
        assert!(self.indexes.live.is_empty(), "indexes are held by nobody's keypairs");
        assert!(!self.session.is_awake(), "an idle peer has no timers");
    }

    pub fn peer(&self) -> Arc<HotPeer> {
        Arc::clone(self.session.peer())
    }

    pub fn set_endpoint(&self, endpoint: Endpoint) {
        self.peer().endpoint.store(Some(Arc::new(endpoint)));
    }

    /// Calls the session and does what it wants.
    fn call(
        &mut self,
        now: Now,
        f: impl FnOnce(&mut Session, &mut Context<'_, StdRng, Shelf>) -> Result<Vec<Action>, DropReason>,
    ) -> Result<(), DropReason> {
        let mut ctx = Context {
            identity: &self.identity,
            indexes: &mut self.indexes,
            rng: &mut self.rng,
            timestamp: wall(now),
            home: ShardId::new(0),
        };
        let actions = f(&mut self.session, &mut ctx)?;
        self.perform(actions, now);
        Ok(())
    }

    fn perform(&mut self, actions: Vec<Action>, now: Now) {
        for action in actions {
            match action {
                Action::Send { message, to } => {
                    let sender = u32::from_le_bytes(message[4..8].try_into().unwrap());
                    assert!(self.indexes.live.contains(&sender), "live before it is sent");
                    let is_response = matches!(classify(&message), Ok(Message::Response(_)));
                    let is_published = self.indexes.keypairs.contains_key(&sender);
                    assert!(!is_response || is_published, "published before it is sent");
                    self.outbox.push((message.to_vec(), to));
                }
                Action::SendKeepalive => {
                    if self.seal(&[], now) {
                        self.peer().activity.keepalive_sent(now);
                    }
                }
                Action::Flush => self.flush(now),
                Action::DropStaged => self.staged.clear(),
                Action::CountDrop(_) => {}
            }
        }
        self.peer().staged.store(self.staged.len() as u32, Relaxed);
    }

    pub fn initiate(&mut self, now: Now) {
        let _ = self.call(now, |session, ctx| Ok(session.initiate(ctx, now)));
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Now) {
        let _ = self.call(now, |session, ctx| Ok(session.handle_timeout(ctx, now)));
        self.check();
    }

    /// What holds whenever the session has been called: nothing is lent that nobody uses, and what
    /// workers may seal with or open with can be found.
    pub fn check(&self) {
        let peer = self.peer();
        let keypairs = peer.keypairs.load();
        for keypair in keypairs.iter() {
            let published = &self.indexes.keypairs[&keypair.local_index().value()];
            assert!(Arc::ptr_eq(published, keypair), "all keypairs are published");
        }
        let pending = usize::from(self.session.pending_index().is_some());
        assert_eq!(self.indexes.live.len(), self.indexes.keypairs.len() + pending, "none leaks");
        assert!(self.indexes.keypairs.len() <= 6, "keypairs that are gone are retired in time");
    }

    /// Seals a packet with the current keypair.
    pub fn seal(&mut self, packet: &[u8], now: Now) -> bool {
        let peer = self.peer();
        let keypairs = peer.keypairs.load();
        let (Some(keypair), Some(to)) =
            (keypairs.seals_with(now), peer.endpoint.load().as_deref().copied())
        else {
            return false;
        };
        let Some(reserved) = keypair.reserve(1) else { return false };
        let message = self.seal_with(keypair, reserved.first, packet);
        self.outbox.push((message, to));
        true
    }

    /// Seals a packet with this keypair and counter, which it notes.
    pub fn seal_with(&mut self, keypair: &Keypair, counter: u64, packet: &[u8]) -> Vec<u8> {
        assert!(counter < REJECT_AFTER_MESSAGES);
        let used = (keypair.local_index().value(), counter);
        assert!(self.sealed.insert(used), "a nonce was used twice");
        let mut message = vec![TYPE_TRANSPORT, 0, 0, 0];
        message.extend_from_slice(&keypair.remote_index().to_wire());
        message.extend_from_slice(&counter.to_le_bytes());
        message.extend_from_slice(packet);
        message.resize(message.len() + TAG_LEN, 0);
        let buffer = &mut message[TRANSPORT_HEADER_LEN..];
        RingAead.seal(&mut [Job::new(keypair.seal_key(), counter, buffer)]);
        message
    }

    /// Sends a packet from the TUN device, as a worker does.
    pub fn send(&mut self, packet: &[u8], now: Now) {
        let peer = self.peer();
        if !self.seal(packet, now) {
            if self.staged.len() == STAGED_PACKETS_MAX {
                self.staged.remove(0);
            }
            self.staged.push(packet.to_vec());
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
    ///
    /// # Errors
    /// Why it was dropped.
    pub fn receive(&mut self, datagram: &[u8], from: Endpoint, now: Now) -> Result<(), DropReason> {
        match classify(datagram)? {
            Message::Initiation => {
                let message = datagram.first_chunk().expect("classified");
                let opened = open_initiation(&self.identity, message)
                    .map_err(|error| error.drop_reason())?;
                let remote = self.session.remote().ok_or(DropReason::NoPrivateKey)?;
                let authentic = opened.authenticate(remote).map_err(|e| e.drop_reason())?;
                self.call(now, |s, ctx| s.handle_initiation(authentic, from, ctx, now))
            }
            Message::Response(_) => {
                let message = datagram.first_chunk().expect("classified");
                self.call(now, |session, ctx| session.handle_response(message, ctx, now))
            }
            Message::CookieReply(_) => {
                let message = datagram.first_chunk().expect("classified");
                self.session.handle_cookie_reply(message, now)
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
        let keypair = self.indexes.keypairs.get(&index.value());
        let keypair = keypair.cloned().ok_or(DropReason::UnknownIndex)?;
        if !keypair.can_open(now) {
            return Err(DropReason::KeyExpired);
        }
        let counter = u64::from_le_bytes(datagram[8..16].try_into().expect("classified"));
        let mut buffer = datagram[TRANSPORT_HEADER_LEN..].to_vec();
        let mut jobs = [Job::new(keypair.open_key(), counter, &mut buffer)];
        RingAead.open(&mut jobs);
        if !jobs[0].ok {
            return Err(DropReason::BadTag);
        }
        let mut receiving = Arc::clone(&keypair).receive().ok_or(DropReason::HandedOver)?;
        if !receiving.accept(Counter(counter)) {
            return Err(DropReason::Replay);
        }
        assert!(self.opened.insert((index.value(), counter)), "a replay was accepted");
        buffer.truncate(buffer.len() - TAG_LEN);
        let peer = keypair.peer().expect("the session holds it");
        self.set_endpoint(from);
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

/// An address by its last byte.
pub fn address(last: u8) -> Endpoint {
    Endpoint::configured(([192, 0, 2, last], 51820).into())
}

/// The wall clock when boot time is `now`.
fn wall(now: Now) -> Timestamp {
    let ns = 1_700_000_000_000_000_000 + now.boot_ns();
    Timestamp::from_unix(ns / 1_000_000_000, (ns % 1_000_000_000) as u32)
}
