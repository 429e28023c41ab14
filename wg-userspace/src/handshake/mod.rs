//! The pool beside the workers: takes handshake messages and drives sessions.
//!
//! Everything a handshake needs and a packet does not lives here: the device's identity, each peer's
//! [`Session`] in a lock, receiver indexes, timers. Its results reach the workers as keypairs
//! published in [`Shared`]. Pool threads and the control thread both call [`Handshakes`].
//!
//! Nothing is allocated for, and no state moved by, a message that did not authenticate.

mod index;
mod pool;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hashbrown::HashMap;
use wg_common::id::{PeerId, ReceiverIndex, WorkerId};
use wg_common::message::{Message, classify};
use wg_common::outcome::DropReason;
use wg_common::protocol::{HANDSHAKE_TOS, TAG_LEN, TRANSPORT_HEADER_LEN, TRANSPORT_OVERHEAD};
use wg_common::time::Now;

use self::index::IndexTable;
use crate::aead::{BatchAead, Job};
use crate::counters::Counters;
use crate::datapath::Shared;
use crate::datapath::encap::transport_header;
use crate::datapath::handoff::{HandshakeDatagram, Work};
use crate::datapath::outbound::DatagramSink as _;
use crate::key::{PresharedKey, PrivateKey, PublicKey};
use crate::noise::{Identity, RemoteStatic, Timestamp, check_mac1, open_initiation};
use crate::session::{Action, Context, HotPeer, Indexes, Session};
use crate::sys::random::Rng;
use crate::sys::{SharedWords, clock};

pub use pool::Pool;

/// The sessions of one device, and what their handshakes need.
pub struct Handshakes {
    shared: Arc<Shared>,
    aead: &'static dyn BatchAead,
    identity: RwLock<Option<Arc<Identity>>>,
    cells: RwLock<Cells>,
    indexes: Mutex<IndexTable<Cell>>,
    /// Cells with a timer that may run.
    awake: Mutex<Vec<Arc<Cell>>>,
    /// Drops counted by any thread of this room.
    drops: Counters,
}

#[derive(Default)]
struct Cells {
    by_key: HashMap<PublicKey, Arc<Cell>>,
    by_id: HashMap<PeerId, Arc<Cell>>,
}

/// One peer as this room keeps it.
pub struct Cell {
    /// The half that workers read.
    pub hot: Arc<HotPeer>,
    session: Mutex<Session>,
    awake: AtomicBool,
}

impl Cell {
    fn session(&self) -> MutexGuard<'_, Session> {
        lock(&self.session)
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

/// Lends indexes to one cell's session.
struct CellIndexes<'a> {
    table: &'a Mutex<IndexTable<Cell>>,
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
}

impl Handshakes {
    /// No sessions yet. `live_indexes` is the kernel side's view of receiver indexes, if there is one.
    pub fn new(
        shared: Arc<Shared>,
        aead: &'static dyn BatchAead,
        live_indexes: Option<Arc<SharedWords>>,
    ) -> Self {
        let indexes = IndexTable::new(ReceiverIndex::SLOT_COUNT, live_indexes, &mut Rng);
        Self {
            shared,
            aead,
            identity: RwLock::default(),
            cells: RwLock::default(),
            indexes: Mutex::new(indexes),
            awake: Mutex::default(),
            drops: Counters::default(),
        }
    }

    /// Drops counted in this room.
    pub fn drops(&self) -> &Counters {
        &self.drops
    }

    fn identity(&self) -> Option<Arc<Identity>> {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The cell of a peer.
    pub fn cell(&self, peer: PeerId) -> Option<Arc<Cell>> {
        self.cells.read().unwrap_or_else(PoisonError::into_inner).by_id.get(&peer).cloned()
    }

    fn cell_by_key(&self, key: &PublicKey) -> Option<Arc<Cell>> {
        self.cells.read().unwrap_or_else(PoisonError::into_inner).by_key.get(key).cloned()
    }

    fn all_cells(&self) -> Vec<Arc<Cell>> {
        self.cells.read().unwrap_or_else(PoisonError::into_inner).by_id.values().cloned().collect()
    }

    /// Gives the device another private key, or none. Sessions under the old one end.
    pub fn set_private_key(&self, key: Option<PrivateKey>, now: Now) {
        let identity = key.map(|key| Arc::new(Identity::new(key)));
        self.identity.write().unwrap_or_else(PoisonError::into_inner).clone_from(&identity);
        for cell in self.all_cells() {
            let mut session = cell.session();
            let remote = identity.as_deref().map(|identity| {
                RemoteStatic::new(identity, cell.hot.public_key, session.preshared_key().clone())
            });
            let actions = session.set_remote(remote, &mut self.indexes_of(&cell, now));
            self.execute(&cell, &actions, WorkerId(0), now);
        }
    }

    /// Begins to serve a peer. `hot` is published to the workers.
    pub fn add_peer(&self, hot: Arc<HotPeer>) {
        let remote = self
            .identity()
            .map(|identity| RemoteStatic::new(&identity, hot.public_key, PresharedKey::default()));
        let cell = Arc::new(Cell {
            session: Mutex::new(Session::new(Arc::clone(&hot), remote)),
            awake: AtomicBool::new(false),
            hot: Arc::clone(&hot),
        });
        let mut cells = self.cells.write().unwrap_or_else(PoisonError::into_inner);
        cells.by_key.insert(hot.public_key, Arc::clone(&cell));
        cells.by_id.insert(hot.id, cell);
        drop(cells);
        self.shared.peers.set(hot.id.0 as usize, hot);
    }

    /// Ends a peer's sessions and forgets it.
    pub fn remove_peer(&self, peer: PeerId, now: Now) {
        self.shared.peers.clear(peer.0 as usize);
        let mut cells = self.cells.write().unwrap_or_else(PoisonError::into_inner);
        let Some(cell) = cells.by_id.remove(&peer) else { return };
        cells.by_key.remove(&cell.hot.public_key);
        drop(cells);
        let mut session = cell.session();
        let actions = session.set_remote(None, &mut self.indexes_of(&cell, now));
        // Else its timer would keep the cell awake for ever.
        session.set_persistent_keepalive(None, now);
        self.execute(&cell, &actions, WorkerId(0), now);
    }

    /// Gives a peer another preshared key; the next handshake uses it.
    pub fn set_preshared_key(&self, peer: PeerId, key: PresharedKey) {
        if let Some(cell) = self.cell(peer) {
            cell.session().set_preshared_key(key);
        }
    }

    /// Gives a peer a persistent keepalive interval; zero switches it off.
    pub fn set_persistent_keepalive(&self, peer: PeerId, interval: Option<Duration>, now: Now) {
        if let Some(cell) = self.cell(peer) {
            cell.session().set_persistent_keepalive(interval, now);
            self.awaken(&cell);
        }
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

    /// Does what a worker left in the queue.
    pub fn work(&self, work: &Work, now: Now) {
        match work {
            Work::Datagram(datagram) => {
                if let Err(reason) = self.receive(datagram, now) {
                    self.drops.drop_shared(reason, 1);
                }
            }
            Work::Initiate(_, peer) => {
                if let Some(cell) = self.cell(*peer) {
                    self.initiate(&cell, now);
                }
            }
        }
    }

    /// Runs the timers that are due. To be called several times a second.
    pub fn tick(&self, now: Now) {
        let cells = std::mem::take(&mut *lock(&self.awake));
        let mut still_awake = Vec::with_capacity(cells.len());
        for cell in cells {
            let mut session = cell.session();
            let identity = self.identity();
            let actions = match &identity {
                Some(identity) => self.with_context(&cell, identity, WorkerId(0), now, |context| {
                    session.handle_timeout(context, now)
                }),
                None => Vec::new(),
            };
            self.execute(&cell, &actions, WorkerId(0), now);
            if session.is_awake() {
                drop(session);
                still_awake.push(cell);
            } else {
                cell.awake.store(false, Ordering::Relaxed);
            }
        }
        lock(&self.awake).append(&mut still_awake);
    }

    fn initiate(&self, cell: &Arc<Cell>, now: Now) {
        // The session first: the identity that is read then is the one its remote was made for.
        let mut session = cell.session();
        let Some(identity) = self.identity() else {
            cell.hot.handshake_wanted.store(false, Ordering::Relaxed);
            return;
        };
        let actions = self.with_context(cell, &identity, WorkerId(0), now, |context| {
            session.initiate(context, now)
        });
        self.execute(cell, &actions, WorkerId(0), now);
        drop(session);
        self.awaken(cell);
    }

    /// Receives a handshake message.
    fn receive(&self, datagram: &HandshakeDatagram, now: Now) -> Result<(), DropReason> {
        let identity = self.identity().ok_or(DropReason::NoPrivateKey)?;
        let message = datagram.message();
        let kind = classify(message)?;
        if !matches!(kind, Message::CookieReply(_)) && !check_mac1(&identity, message) {
            return Err(DropReason::BadMac1);
        }
        // What a session asks for is done before anyone else can ask it for more: else a keypair
        // could be retired before it is published.
        match kind {
            Message::Initiation => {
                let bytes = message.first_chunk().ok_or(DropReason::BadLength)?;
                let opened = open_initiation(&identity, bytes).map_err(|e| e.drop_reason())?;
                let cell = self.cell_by_key(&opened.sender()).ok_or(DropReason::BadHandshake)?;
                let mut session = cell.session();
                let remote = session.remote().ok_or(DropReason::BadHandshake)?;
                let authentic = opened.authenticate(remote).map_err(|e| e.drop_reason())?;
                let worker = datagram.worker;
                let actions = self.with_context(&cell, &identity, worker, now, |context| {
                    session.handle_initiation(authentic, datagram.from, context, now)
                })?;
                self.received(&cell, message, &actions, worker, now);
            }
            Message::Response(index) => {
                let cell = lock(&self.indexes).owner(index).cloned();
                let cell = cell.ok_or(DropReason::UnknownIndex)?;
                let bytes = message.first_chunk().ok_or(DropReason::BadLength)?;
                let mut session = cell.session();
                let worker = datagram.worker;
                let actions = self.with_context(&cell, &identity, worker, now, |context| {
                    session.handle_response(bytes, context, now)
                })?;
                self.received(&cell, message, &actions, worker, now);
            }
            // Nothing asks for cookies, and no transport data is a handshake message.
            Message::CookieReply(_) | Message::Transport(_) => {
                return Err(DropReason::BadHandshake);
            }
        }
        Ok(())
    }

    fn received(
        &self,
        cell: &Arc<Cell>,
        message: &[u8],
        actions: &[Action],
        worker: WorkerId,
        now: Now,
    ) {
        cell.hot.transfer.received(message.len() as u64);
        self.execute(cell, actions, worker, now);
        self.awaken(cell);
    }

    fn indexes_of<'a>(&'a self, cell: &'a Arc<Cell>, now: Now) -> CellIndexes<'a> {
        CellIndexes { table: &self.indexes, cell, now }
    }

    /// Calls `act` with what a session needs to do its part of a handshake.
    fn with_context<T>(
        &self,
        cell: &Arc<Cell>,
        identity: &Identity,
        worker: WorkerId,
        now: Now,
        act: impl FnOnce(&mut Context<'_, Rng, CellIndexes<'_>>) -> T,
    ) -> T {
        let (secs, nanos) = clock::wall();
        let last = WorkerId(cell.hot.last_worker.load(Ordering::Relaxed));
        let preferred = if usize::from(last.0) < self.shared.workers.len() { last } else { worker };
        let mut indexes = self.indexes_of(cell, now);
        act(&mut Context {
            identity,
            indexes: &mut indexes,
            rng: &mut Rng,
            timestamp: Timestamp::from_unix(secs, nanos),
            home: self.shared.home_for(cell.hot.id, preferred, now),
        })
    }

    /// Does what a session asks for, in its order.
    fn execute(&self, cell: &Arc<Cell>, actions: &[Action], worker: WorkerId, now: Now) {
        for action in actions {
            match action {
                Action::Publish(keypair) => {
                    let slot = keypair.local_index().slot();
                    self.shared.keypairs.set(slot, Arc::clone(keypair));
                }
                Action::Retire(keypair) => {
                    let index = keypair.local_index();
                    self.shared.keypairs.clear(index.slot());
                    lock(&self.indexes).release(index, now);
                }
                Action::Send { message, to } => {
                    let sockets = self.shared.sockets.load();
                    let socket = &sockets.of_worker[usize::from(worker.0)];
                    if socket.send(&[(message, to)], HANDSHAKE_TOS).failed == 0 {
                        cell.hot.transfer.sent(message.len() as u64);
                    } else {
                        self.drops.drop_shared(DropReason::SocketSend, 1);
                    }
                }
                Action::SendKeepalive => self.send_keepalive(&cell.hot, worker, now),
                Action::Flush | Action::DropStaged => self.shared.wake_all(),
            }
        }
    }

    /// Sends a transport message without a packet, if there is a keypair to seal it with.
    fn send_keepalive(&self, peer: &HotPeer, worker: WorkerId, now: Now) {
        let Some(endpoint) = peer.endpoint.load_full() else { return };
        let keypairs = peer.keypairs.load();
        let Some(keypair) = keypairs.seals_with(now) else { return };
        let Some(reserved) = keypair.reserve(1) else { return };
        let mut message = [0; TRANSPORT_OVERHEAD];
        message[..TRANSPORT_HEADER_LEN]
            .copy_from_slice(&transport_header(keypair.remote_index(), reserved.first));
        let tag: &mut [u8] = &mut message[TRANSPORT_HEADER_LEN..];
        debug_assert_eq!(tag.len(), TAG_LEN);
        self.aead.seal(&mut [Job::new(keypair.seal_key(), reserved.first, tag)]);
        let sockets = self.shared.sockets.load();
        let socket = &sockets.of_worker[usize::from(worker.0)];
        if socket.send(&[(&message, &endpoint)], 0).failed == 0 {
            peer.transfer.sent(message.len() as u64);
            peer.activity.keepalive_sent(now);
        } else {
            self.drops.drop_shared(DropReason::SocketSend, 1);
        }
    }

    fn awaken(&self, cell: &Arc<Cell>) {
        if !cell.awake.swap(true, Ordering::Relaxed) {
            lock(&self.awake).push(Arc::clone(cell));
        }
    }
}
