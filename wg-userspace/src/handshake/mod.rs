//! The pool beside the workers: takes handshake messages and drives sessions.
//!
//! Everything a handshake needs and a packet does not lives here: the device's identity, each peer's
//! [`Session`] in a lock, receiver indexes, timers. Its results reach the workers as keypairs
//! published in [`Shared`]. Pool threads and the control thread both call [`Handshakes`].
//!
//! A message first waits in a bounded queue, then in a bounded lane, until [`Handshakes::turn`] gets to
//! it. Nothing is allocated for, and no state moved by, a message that did not authenticate.

mod buckets;
mod cookies;
pub mod handover;
mod index;
#[cfg(test)]
mod index_model;
mod interface;
mod knock;
mod lanes;
#[cfg(test)]
mod link_tests;
mod load;
mod outside;
mod pool;
#[cfg(test)]
mod pool_tests;
mod receive;
pub mod source;
mod timers;
#[cfg(test)]
mod timers_tests;
mod troubles;
#[cfg(test)]
mod troubles_tests;

use std::hash::BuildHasher as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hashbrown::{DefaultHashBuilder, HashTable};
use wg_common::id::{PeerId, ReceiverIndex, WorkerId};
use wg_common::outcome::DropReason;
use wg_common::protocol::{HANDSHAKE_TOS, TAG_LEN, TRANSPORT_HEADER_LEN, TRANSPORT_OVERHEAD};
use wg_common::time::Now;

use self::index::IndexTable;
use self::knock::Gate;
use self::lanes::Lanes;
use self::timers::{Alarms, Pace, Place};
use self::troubles::StrangerNotes;
use crate::aead::{BatchAead, Job};
use crate::counters::Counters;
use crate::datapath::encap::transport_header;
use crate::datapath::handoff::{HandshakeDatagram, Work};
use crate::datapath::{Shared, WorkQueue};
use crate::key::{PresharedKey, PrivateKey, PublicKey};
use crate::noise::{Identity, Remote, Timestamp};
use crate::session::{Action, Context, HotPeer, Indexes, Keypair, Session};
use crate::sys::SharedWords;

pub use knock::{Notice, Notify};
pub use outside::{Os, Outside};
pub use pool::Pool;
pub use troubles::Trouble;

/// Messages that one turn looks at before it handles one. As a look costs a hundredth of a handshake,
/// they do not pile up in the queue before them.
const ADMITTED_PER_TURN: usize = 128;

/// The sessions of one device, and what their handshakes need.
pub struct Handshakes<O = Os> {
    shared: Arc<Shared>,
    outside: O,
    aead: &'static dyn BatchAead,
    identity: RwLock<Option<Arc<Identity>>>,
    cells: RwLock<Cells>,
    indexes: Mutex<IndexTable<Cell>>,
    /// Messages that wait to be handled. The lock is held for a moment, and with it no other is taken.
    lanes: Mutex<Lanes>,
    /// Cells that want to be called, and when.
    alarms: Mutex<Alarms>,
    /// Something has to be done sooner than whoever calls [`Handshakes::tick`] was told.
    sooner: tokio::sync::Notify,
    pace: Mutex<Pace>,
    /// Peers whose endpoint has a name, and whose handshakes go unanswered.
    unanswered: Mutex<Vec<PeerId>>,
    /// Drops counted by any thread of this room.
    drops: Counters,
    /// What becomes of unknown senders, if there is a source to look them up in.
    gate: Option<Gate>,
    strangers: StrangerNotes,
}

/// All cells. Of a million each table counts: the keys stand in the cells only.
#[derive(Default)]
struct Cells {
    /// By the peers' ids, which number slots.
    slots: Vec<Option<Arc<Cell>>>,
    by_key: HashTable<PeerId>,
    hasher: DefaultHashBuilder,
}

impl Cells {
    fn get(&self, peer: PeerId) -> Option<&Arc<Cell>> {
        self.slots.get(peer.0 as usize)?.as_ref()
    }

    fn find(&self, key: &PublicKey) -> Option<&Arc<Cell>> {
        let is_its =
            |&peer: &PeerId| self.get(peer).is_some_and(|cell| cell.hot.public_key == *key);
        self.by_key.find(self.hasher.hash_one(key), is_its).and_then(|&peer| self.get(peer))
    }

    /// In the order of their ids.
    fn iter(&self) -> impl Iterator<Item = &Arc<Cell>> {
        self.slots.iter().flatten()
    }

    fn len(&self) -> usize {
        self.by_key.len()
    }

    fn reserve(&mut self, count: usize) {
        let Self { slots, by_key, hasher } = self;
        by_key.reserve(count, |&peer| hasher.hash_one(key_in(slots, peer)));
    }

    /// In place of who was in this slot; it is found by its key from now on.
    fn insert(&mut self, cell: Arc<Cell>) {
        let (id, key) = (cell.hot.id, cell.hot.public_key);
        self.remove(id);
        if let Some(other) = self.find(&key).map(|cell| cell.hot.id) {
            self.forget_key(other);
        }
        let slot = id.0 as usize;
        if self.slots.len() <= slot {
            self.slots.resize(slot + 1, None);
        }
        self.slots[slot] = Some(cell);
        let Self { slots, by_key, hasher } = self;
        let hash = hasher.hash_one(key);
        by_key.insert_unique(hash, id, |&peer| hasher.hash_one(key_in(slots, peer)));
    }

    fn remove(&mut self, peer: PeerId) -> Option<Arc<Cell>> {
        self.forget_key(peer);
        let cell = self.slots.get_mut(peer.0 as usize)?.take();
        if self.by_key.is_empty() && self.slots.iter().all(Option::is_none) {
            // What a million needed once is not kept for ever.
            (self.slots, self.by_key) = Default::default();
        }
        cell
    }

    fn forget_key(&mut self, peer: PeerId) {
        let Some(cell) = self.get(peer) else { return };
        let hash = self.hasher.hash_one(cell.hot.public_key);
        if let Ok(entry) = self.by_key.find_entry(hash, |&other| other == peer) {
            entry.remove();
        }
    }
}

/// The key of a peer that is in `by_key`, and so in its slot.
fn key_in(slots: &[Option<Arc<Cell>>], peer: PeerId) -> PublicKey {
    slots[peer.0 as usize].as_ref().expect("who is found by its key has a slot").hot.public_key
}

/// One peer as this room keeps it.
pub struct Cell {
    /// The half that workers read.
    pub hot: Arc<HotPeer>,
    session: Mutex<Session>,
    place: Place,
    /// Its endpoint has, or had, a name that can be looked up.
    is_named: AtomicBool,
}

impl Cell {
    fn session(&self) -> MutexGuard<'_, Session> {
        lock(&self.session)
    }

    /// The key shared with the peer.
    #[cfg(test)]
    pub fn preshared_key(&self) -> PresharedKey {
        self.session().preshared_key().clone()
    }

    /// When the latest handshake was completed.
    pub fn last_handshake(&self) -> Option<SystemTime> {
        let (secs, nanos) = self.session().last_handshake()?.to_unix();
        Some(UNIX_EPOCH + Duration::new(secs, nanos))
    }
}

/// A lock whose holder panicked still guards whole values: every change under it is a single call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lends indexes to one cell's session, and publishes its keypairs.
struct CellIndexes<'a> {
    table: &'a Mutex<IndexTable<Cell>>,
    shared: &'a Shared,
    cell: &'a Arc<Cell>,
    now: Now,
}

impl Indexes for CellIndexes<'_> {
    fn allocate(&mut self) -> Option<ReceiverIndex> {
        lock(self.table).allocate(self.cell, self.now)
    }

    fn release(&mut self, index: ReceiverIndex) {
        lock(self.table).release(index, self.now);
    }

    fn adopt(&mut self, index: ReceiverIndex) -> bool {
        lock(self.table).adopt(index, self.cell, self.now)
    }

    fn publish(&mut self, keypair: &Arc<Keypair>) {
        self.shared.publish(keypair);
    }

    fn retire(&mut self, keypair: &Arc<Keypair>) {
        // First from the workers: the slot is nobody else's before it is free.
        self.shared.retire(keypair);
        self.release(keypair.local_index());
    }
}

impl<O: Outside> Handshakes<O> {
    /// No sessions yet. `live_indexes` is the kernel side's view of receiver indexes, if there is one.
    pub fn new(
        shared: Arc<Shared>,
        outside: O,
        aead: &'static dyn BatchAead,
        live_indexes: Option<Arc<SharedWords>>,
    ) -> Self {
        let slots = shared.slots.clone();
        let indexes = IndexTable::new(shared.indexes, slots, live_indexes, &mut outside.rng());
        let lanes = Lanes::new(&mut outside.rng());
        Self {
            shared,
            outside,
            aead,
            identity: RwLock::default(),
            cells: RwLock::default(),
            indexes: Mutex::new(indexes),
            lanes: Mutex::new(lanes),
            alarms: Mutex::default(),
            sooner: tokio::sync::Notify::new(),
            pace: Mutex::default(),
            unanswered: Mutex::default(),
            drops: Counters::default(),
            gate: None,
            strangers: StrangerNotes::default(),
        }
    }

    /// Drops counted in this room.
    pub fn drops(&self) -> &Counters {
        &self.drops
    }

    fn identity(&self) -> Option<Arc<Identity>> {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn cells(&self) -> RwLockReadGuard<'_, Cells> {
        self.cells.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cell of a peer.
    pub fn cell(&self, peer: PeerId) -> Option<Arc<Cell>> {
        self.cells().get(peer).cloned()
    }

    fn cell_by_key(&self, key: &PublicKey) -> Option<Arc<Cell>> {
        self.cells().find(key).cloned()
    }

    /// All cells, in order of their ids: the same input is always answered in the same order.
    fn all_cells(&self) -> Vec<Arc<Cell>> {
        self.cells().iter().cloned().collect()
    }

    /// Number of peers that have a session.
    pub fn cell_count(&self) -> usize {
        self.cells().len()
    }

    /// Makes room for so many more peers at once.
    pub fn reserve(&self, peer_count: usize) {
        self.cells.write().unwrap_or_else(PoisonError::into_inner).reserve(peer_count);
    }

    /// Number of receiver indexes in use.
    pub fn index_count(&self) -> usize {
        lock(&self.indexes).lent_count()
    }

    /// Gives the device another private key, or none. Sessions under the old one end.
    pub fn set_private_key(&self, key: Option<PrivateKey>, now: Now) {
        let identity = key.map(|key| Arc::new(Identity::new(key)));
        self.identity.write().unwrap_or_else(PoisonError::into_inner).clone_from(&identity);
        for cell in self.all_cells() {
            let mut session = cell.session();
            let remote = identity.as_deref().map(Remote::new);
            session.set_remote(remote, &mut self.indexes_of(&cell, now));
            self.revive(&cell, &mut session, now);
        }
    }

    /// Begins to serve a peer. `hot` is published to the workers.
    pub fn add_peer(&self, hot: Arc<HotPeer>) {
        self.add_known_peer(hot, PresharedKey::default(), Timestamp::default());
    }

    /// As [`add_peer`](Self::add_peer), for a peer of which something is known. Its initiations had
    /// timestamps up to `greatest_timestamp` before we knew it: they are replays from the beginning. And
    /// none of its handshakes is done without `preshared_key`, as early as it may come.
    pub fn add_known_peer(
        &self,
        hot: Arc<HotPeer>,
        preshared_key: PresharedKey,
        greatest_timestamp: Timestamp,
    ) {
        let remote = self.identity().map(|identity| Remote::new(&identity));
        self.add_cell(hot, remote, preshared_key, greatest_timestamp);
    }

    fn add_cell(
        &self,
        hot: Arc<HotPeer>,
        remote: Option<Remote>,
        preshared_key: PresharedKey,
        greatest: Timestamp,
    ) {
        self.shared.forget_home(hot.id);
        let mut session = Session::new(Arc::clone(&hot), remote);
        // For when there is an identity.
        session.set_preshared_key(preshared_key);
        session.raise_greatest_timestamp(greatest);
        let cell = Arc::new(Cell {
            session: Mutex::new(session),
            place: Place::none(),
            is_named: AtomicBool::new(false),
            hot: Arc::clone(&hot),
        });
        self.cells.write().unwrap_or_else(PoisonError::into_inner).insert(cell);
        self.shared.peers.set(hot.id.0 as usize, hot);
    }

    /// Ends a peer's sessions and forgets it.
    pub fn remove_peer(&self, peer: PeerId, now: Now) {
        self.shared.peers.clear(peer.0 as usize);
        let cell = self.cells.write().unwrap_or_else(PoisonError::into_inner).remove(peer);
        let Some(cell) = cell else { return };
        let mut session = cell.session();
        session.set_remote(None, &mut self.indexes_of(&cell, now));
        // Whoever has found the cell before cannot wake it again: without a remote there are no timers.
        self.awaken(&cell, &session, now);
    }

    /// Gives a peer another preshared key; the next handshake uses it.
    pub fn set_preshared_key(&self, peer: PeerId, key: PresharedKey) {
        if let Some(cell) = self.cell(peer) {
            cell.session().set_preshared_key(key);
        }
    }

    /// Gives a peer a persistent keepalive interval; zero switches it off. The first one is sent at
    /// once, or when it is this peer's turn if many are given one.
    pub fn set_persistent_keepalive(&self, peer: PeerId, interval: Option<Duration>, now: Now) {
        if let Some(cell) = self.cell(peer) {
            let mut session = cell.session();
            let is_new = session.persistent_keepalive().is_none();
            let first = interval.filter(|_| is_new).map(|interval| self.pace(interval, now));
            session.set_persistent_keepalive(interval, first.unwrap_or(now));
            self.awaken(&cell, &session, now);
        }
    }

    /// Ends every keypair and handshake. Peers for whom packets wait, and those with a persistent
    /// keepalive, are handshaken with anew, unless the device makes a pause.
    pub fn clear_sessions(&self, now: Now) {
        for cell in self.all_cells() {
            let mut session = cell.session();
            session.clear(&mut self.indexes_of(&cell, now));
            self.revive(&cell, &mut session, now);
        }
    }

    /// As [`clear_sessions`](Self::clear_sessions), but for what has begun since `not_before`: a peer
    /// with whom we shook hands after a break of time, before somebody clears what was before, believes
    /// in that keypair.
    pub fn clear_older_sessions(&self, not_before: Now, now: Now) {
        for cell in self.all_cells() {
            let mut session = cell.session();
            session.clear_older(not_before, &mut self.indexes_of(&cell, now));
            self.revive(&cell, &mut session, now);
        }
    }

    /// Goes on after a pause.
    pub fn resume(&self, now: Now) {
        for cell in self.all_cells() {
            self.revive(&cell, &mut cell.session(), now);
        }
    }

    /// Has a session whose keypairs and handshake have ended reach for its peer, if it has reason to.
    fn revive(&self, cell: &Arc<Cell>, session: &mut Session, now: Now) {
        if self.shared.pause(now).is_none() {
            if let Some(interval) = session.persistent_keepalive() {
                session.restart_persistent_keepalive(self.pace(interval, now));
            }
            let waits = cell.hot.staged.load(Ordering::Relaxed) > 0;
            if waits && self.shared.sealing_keypair(&cell.hot, now).is_none() {
                self.initiate_locked(cell, session, now);
            }
        }
        self.awaken(cell, session, now);
    }

    /// Locks the session of a cell for a handshake.
    ///
    /// Whoever begins a pause says so first and then locks every session once: who has the lock after
    /// him gets the reason here, and what is done before him he ends.
    fn session_for_handshake<'a>(
        &self,
        cell: &'a Cell,
        now: Now,
    ) -> Result<MutexGuard<'a, Session>, DropReason> {
        let session = cell.session();
        self.shared.pause(now).map_or(Ok(session), Err)
    }

    /// Handshakes anew with every peer that has a keypair in use at home at `worker`.
    pub fn leave_home(&self, worker: WorkerId, now: Now) {
        for cell in self.all_cells() {
            let keypairs = cell.hot.keypairs.load();
            let mut used = keypairs.current.iter().chain(&keypairs.next);
            if used.any(|keypair| self.shared.worker_of(keypair.home()) == worker) {
                self.initiate(&cell, now);
            }
        }
    }

    /// Does a part of what workers left in `queue`: looks at some messages, handles one of those that
    /// wait, and does one thing that our own peers need. Says whether there was anything to do.
    pub fn turn(&self, queue: &WorkQueue, now: Now) -> bool {
        match queue.take_displaced() {
            0 => {}
            count => self.drops.drop_shared(DropReason::Outdated, count),
        }
        let need = queue.take_need();
        if let Some(need) = &need {
            self.work(need, now);
        }
        let mut admitted = 0;
        while admitted < ADMITTED_PER_TURN
            && let Some(datagram) = self.recall(now).or_else(|| queue.take_datagram())
        {
            admitted += 1;
            self.count(self.admit(datagram, queue.datagram_count(), now));
        }
        if lock(&self.lanes).len() > 1 {
            // Other threads of the pool can take a part.
            queue.wake();
        }
        let handled = self.handle_next(now);
        need.is_some() || admitted > 0 || handled
    }

    /// Does at once what a worker left. A message takes part in the order of those that wait: under
    /// load another one may be handled now, and this one in a later [`turn`](Self::turn).
    pub fn work(&self, work: &Work, now: Now) {
        match work {
            Work::Datagram(datagram) => {
                self.count(self.admit(*datagram, 0, now));
                self.handle_next(now);
            }
            Work::Initiate(_, peer) => {
                if let Some(cell) = self.cell(*peer) {
                    self.initiate(&cell, now);
                }
            }
            Work::Confirmed(peer) => {
                if let Some(cell) = self.cell(*peer) {
                    self.handle_timeout(&cell, now);
                }
            }
        }
    }

    /// The pool's threads have worked for `time` until `now`, which is the sum of their times divided
    /// by their number. Where that is much, cookies are demanded.
    pub fn worked(&self, time: Duration, now: Now) {
        lock(&self.lanes).worked(time, now);
    }

    /// Whether cookies are demanded.
    pub fn is_under_load(&self, now: Now) -> bool {
        lock(&self.lanes).is_under_load(now)
    }

    /// Handles one of the messages that wait, if there is one whose turn it is.
    fn handle_next(&self, now: Now) -> bool {
        let next = lock(&self.lanes).next(now);
        if let Some(datagram) = &next {
            self.count(self.receive(datagram, now));
        }
        next.is_some()
    }

    fn recall(&self, now: Now) -> Option<HandshakeDatagram> {
        lock(&self.lanes).recall(now)
    }

    fn count(&self, outcome: Result<(), DropReason>) {
        if let Err(reason) = outcome {
            self.drops.drop_shared(reason, 1);
        }
    }

    fn initiate(&self, cell: &Arc<Cell>, now: Now) {
        let mut session = cell.session();
        self.initiate_locked(cell, &mut session, now);
        self.awaken(cell, &session, now);
    }

    fn initiate_locked(&self, cell: &Arc<Cell>, session: &mut Session, now: Now) {
        // The session was locked first: the identity that is read now is the one its remote was made
        // for, and a pause that begins ends what is done before.
        let identity = if self.shared.pause(now).is_none() { self.identity() } else { None };
        let Some(identity) = identity else {
            cell.hot.handshake_wanted.store(false, Ordering::Relaxed);
            return;
        };
        let actions = self.with_context(cell, &identity, WorkerId(0), now, |context| {
            session.initiate(context, now)
        });
        self.execute(cell, &actions, WorkerId(0), now);
    }

    fn indexes_of<'a>(&'a self, cell: &'a Arc<Cell>, now: Now) -> CellIndexes<'a> {
        CellIndexes { table: &self.indexes, shared: &self.shared, cell, now }
    }

    /// Calls `act` with what a session needs to do its part of a handshake.
    fn with_context<T>(
        &self,
        cell: &Arc<Cell>,
        identity: &Identity,
        worker: WorkerId,
        now: Now,
        act: impl FnOnce(&mut Context<'_, O::Rng, CellIndexes<'_>>) -> T,
    ) -> T {
        let last = WorkerId(cell.hot.last_worker.load(Ordering::Relaxed));
        let preferred = if usize::from(last.0) < self.shared.workers.len() { last } else { worker };
        let mut indexes = self.indexes_of(cell, now);
        act(&mut Context {
            identity,
            indexes: &mut indexes,
            rng: &mut self.outside.rng(),
            timestamp: self.outside.wall(),
            home: self.shared.home_for(cell.hot.id, preferred, now),
        })
    }

    /// Does what a session asks for, in its order.
    fn execute(&self, cell: &Arc<Cell>, actions: &[Action], worker: WorkerId, now: Now) {
        for action in actions {
            match action {
                Action::Send { message, to } => {
                    if self.outside.send(worker, message, to, HANDSHAKE_TOS) {
                        cell.hot.transfer.sent(message.len() as u64);
                    } else {
                        cell.hot.note_unsent(to.remote, now);
                        self.drops.drop_shared(DropReason::SocketSend, 1);
                    }
                }
                Action::SendKeepalive => self.send_keepalive(&cell.hot, worker, now),
                Action::Flush => self.shared.wake_all(),
                Action::DropStaged => {
                    cell.hot.give_up_count.fetch_add(1, Ordering::Relaxed);
                    self.shared.wake_all();
                }
                Action::CountDrop(reason) => self.drops.drop_shared(*reason, 1),
            }
        }
        self.shared.follow_home(&cell.hot);
        self.tell_of_keypair(cell, actions);
    }

    /// Sends a transport message without a packet, if there is a keypair to seal it with.
    fn send_keepalive(&self, peer: &HotPeer, worker: WorkerId, now: Now) {
        let Some(endpoint) = peer.endpoint.load_full() else { return };
        let Some(keypair) = self.shared.sealing_keypair(peer, now) else { return };
        let Some(reserved) = keypair.reserve(1) else { return };
        let mut message = [0; TRANSPORT_OVERHEAD];
        message[..TRANSPORT_HEADER_LEN]
            .copy_from_slice(&transport_header(keypair.remote_index(), reserved.first));
        let tag: &mut [u8] = &mut message[TRANSPORT_HEADER_LEN..];
        debug_assert_eq!(tag.len(), TAG_LEN);
        self.aead.seal(&mut [Job::new(keypair.seal_key(), reserved.first, tag)]);
        if self.outside.send(worker, &message, &endpoint, 0) {
            peer.transfer.sent(message.len() as u64);
            peer.activity.keepalive_sent(now);
        } else {
            peer.note_unsent(endpoint.remote, now);
            self.drops.drop_shared(DropReason::SocketSend, 1);
        }
    }
}
