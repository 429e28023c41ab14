//! Hands sessions over to another process of the same host: a hot restart.
//!
//! ```text
//! exporter   freeze ─ workers pass a turn ─ export ─ into_bytes ─┐
//!                                                 transfer memory, one reader
//! importer                       import ─ take_from (wipes it) ◀─┘
//! ```
//!
//! What must never happen is that a nonce is used twice, or a packet delivered twice. So:
//!
//! - **Freezing is for good.** [`Session::freeze`] ends sealing by one change of one atomic, and
//!   receiving by another; nothing undoes them. The keypairs are dead in this process even if the
//!   hand-over fails. Who gives up calls [`Session::resume`], and handshakes make new ones.
//! - **The window moves when it stands still.** [`Session::export`] reads a replay window only when
//!   the gate is shut and the home worker outside of it; a keypair whose worker is stuck inside is
//!   left out, and is nobody's any more.
//! - **A keypair is exported at most once**: the freeze tells its first caller only where the counter
//!   stood.
//! - **Whoever imports is the next [`Generation`]**, also who takes back what it has exported itself.
//!   Its counters begin beyond all that the exporter could have used.
//! - **An export is imported at most once.** Two importers of the same bytes would be of the same
//!   generation, and use nonces twice. An export is a value without `Clone`, and import consumes it;
//!   the bytes between have one reader: [`DeviceExport::take_from`] wipes them before anything that
//!   was in them can be used. Who crashes before that has used nothing, who crashes later left
//!   nothing behind. What is beyond this module is the caller's part: **to copy the bytes, or to let two
//!   processes read them at once, is to use nonces twice.** A private memory object that is sent to
//!   one process, and a pipe, are right; a file is wrong.
//!
//! What was sealed shall leave before the successor's first packet: the peer's window forgets the
//! older ones when it sees the next generation's counters. For this the caller waits, between freeze
//! and export, until every worker has passed a turn. Who does not wait loses packets, no more.
//!
//! A handshake in flight is not carried: it ends, and the successor begins anew when it would have been
//! repeated, unless the peer is heard before. Who only seals on would not ask for one. Preshared keys,
//! allowed IPs and intervals are configuration, and come to the successor as such. A keypair's
//! home is chosen anew. Its age is in boot time, which all processes of a host share.

mod format;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use wg_common::endpoint::Endpoint;
use wg_common::id::{ReceiverIndex, ShardId};
use wg_common::protocol::KEY_LEN;
use wg_common::time::Now;
use zeroize::Zeroizing;

use super::activity::Moments;
use super::{Action, Frozen, Generation, Indexes, Keypair, Keypairs, ReplayWindow, Session};
use crate::key::PublicKey;
use crate::noise::{Role, Timestamp};

pub use format::{INDEX_KEY_LEN_MAX, ImportError, with_digest};

/// A device's sessions on their way. Not to be copied: the successor's nonces depend on it.
#[derive(Debug)]
pub struct DeviceExport {
    /// The identity by which the keypairs were made.
    pub public_key: PublicKey,
    /// What the device makes receiver indexes with; the successor must do the same. Opaque here, of at
    /// most [`INDEX_KEY_LEN_MAX`] bytes.
    pub index_key: Zeroizing<Vec<u8>>,
    /// When the export was made.
    pub exported: Now,
    /// Its peers, each once.
    pub peers: Vec<PeerExport>,
}

/// A peer's session on its way.
#[derive(Debug)]
pub struct PeerExport {
    pub(super) public_key: PublicKey,
    pub(super) endpoint: Option<Endpoint>,
    pub(super) greatest_timestamp: Timestamp,
    pub(super) last_handshake: Option<Timestamp>,
    pub(super) rx_bytes: u64,
    pub(super) tx_bytes: u64,
    pub(super) moments: Moments,
    /// In the order of [`Slot`], each at most once.
    pub(super) keypairs: Vec<KeypairExport>,
}

/// A keypair on its way.
pub(super) struct KeypairExport {
    pub slot: Slot,
    pub role: Role,
    /// The exporter's.
    pub generation: Generation,
    /// Where the exporter's sending counter stood.
    pub next: u64,
    pub local_index: ReceiverIndex,
    pub remote_index: ReceiverIndex,
    pub begun: Now,
    pub created: Now,
    pub seal_key: Zeroizing<[u8; KEY_LEN]>,
    pub open_key: Zeroizing<[u8; KEY_LEN]>,
    pub window: ReplayWindow,
}

/// How far a session has been handed over.
#[derive(Debug, Default)]
pub(super) enum Handover {
    /// It lives here.
    #[default]
    No,
    /// It has ended, and these can be exported.
    Frozen(Vec<Frozen>),
    /// It is out of the hand.
    Exported,
}

/// Which of a peer's [`Keypairs`] one was.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Slot {
    Current,
    Previous,
    Next,
}

impl fmt::Debug for KeypairExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeypairExport")
            .field("slot", &self.slot)
            .field("generation", &self.generation)
            .field("local_index", &self.local_index)
            .finish_non_exhaustive()
    }
}

impl PeerExport {
    /// Who the peer is.
    pub fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// Number of keypairs.
    pub fn keypair_count(&self) -> usize {
        self.keypairs.len()
    }

    /// Leaves out the keypairs whose handshake had begun before `not_before`: what may not be used here
    /// any more may not be used by anybody, and the successor does not know why.
    pub fn leave_out_older(&mut self, not_before: Now) {
        self.keypairs.retain(|keypair| keypair.begun >= not_before);
    }

    /// Whether there is nothing in it that a new session does not have.
    pub fn is_empty(&self) -> bool {
        self.keypairs.is_empty()
            && self.greatest_timestamp == Timestamp::default()
            && self.last_handshake.is_none()
            && self.endpoint.is_none()
            && (self.rx_bytes, self.tx_bytes) == (0, 0)
    }
}

/// What came of importing a peer.
#[derive(Debug, Default)]
pub struct Imported {
    /// Keypairs in use now.
    pub taken: usize,
    /// Keypairs that are dead: too old, handed over too often, with a receiver index that is in use, or
    /// of a peer that has keypairs already.
    pub refused: usize,
    /// What the session wants done.
    pub actions: Vec<Action>,
}

impl Session {
    /// Whether this session was frozen: it does nothing any more, until it takes its export back or
    /// [`resume`](Self::resume)s.
    pub fn is_handed_over(&self) -> bool {
        !matches!(self.course.handover, Handover::No)
    }

    /// Ends sealing and receiving with the peer's keypairs, for good, and the handshake in flight.
    ///
    /// Their indexes stay live: the successor's packets come under them.
    pub fn freeze(&mut self, indexes: &mut impl Indexes) {
        if self.is_handed_over() {
            return;
        }
        if let Some(since) = self.course.timers.as_unanswered_since() {
            self.peer.activity.await_answer_since(since);
        }
        self.abandon(indexes);
        self.course.timers.completed();
        self.retire(indexes);
        // So that workers, who find nothing to seal with, need not ask for what we would not begin.
        self.peer.handshake_wanted.store(true, Relaxed);
        self.course.handover =
            Handover::Frozen(self.course.published.iter().filter_map(Keypair::freeze).collect());
    }

    /// Number of frozen keypairs with which a worker still receives.
    pub fn unsettled_count(&self) -> usize {
        match &self.course.handover {
            Handover::Frozen(frozen) => frozen.iter().filter(|frozen| !frozen.is_settled()).count(),
            Handover::No | Handover::Exported => 0,
        }
    }

    /// Gives what was frozen out of the hand; once. `None` if nothing was, or it was given out before.
    ///
    /// To be called when every worker has passed a turn since [`freeze`](Self::freeze): what they had
    /// sealed has left then, and none still receives. A keypair that is received with nevertheless, by
    /// a worker that is stuck, is left out. `wall` is the wall clock.
    pub fn export(&mut self, wall: Timestamp, now: Now) -> Option<PeerExport> {
        let Handover::Frozen(frozen) = &mut self.course.handover else { return None };
        let frozen = std::mem::take(frozen);
        self.course.handover = Handover::Exported;
        // Before anything else is read: what a worker has changed inside the gate belongs to it.
        let settled: Vec<_> = frozen.into_iter().filter(|frozen| frozen.is_settled()).collect();
        let peer = &self.peer;
        let keypairs = peer.keypairs.load();
        // A worker may have confirmed what we waited for, and no timer has told us.
        if let Some(index) = self.course.awaited.take() {
            let is_awaited = |keypair: &Arc<Keypair>| keypair.local_index() == index;
            if !keypairs.next.as_ref().is_some_and(is_awaited) && keypairs.iter().any(is_awaited) {
                self.course.last_handshake = Some(wall);
            }
        }
        let place = |keypair: &Arc<Keypair>| {
            let is =
                |own: &Option<Arc<Keypair>>| own.as_ref().is_some_and(|k| Arc::ptr_eq(k, keypair));
            [
                (&keypairs.current, Slot::Current),
                (&keypairs.previous, Slot::Previous),
                (&keypairs.next, Slot::Next),
            ]
            .into_iter()
            .find_map(|(own, slot)| is(own).then_some(slot))
        };
        let mut exports: Vec<_> = settled
            .into_iter()
            .filter(|frozen| !frozen.keypair().is_expired(now))
            .filter_map(|frozen| {
                let slot = place(frozen.keypair())?;
                frozen.export(slot, now)
            })
            .collect();
        exports.sort_unstable_by_key(|export| export.slot);
        Some(PeerExport {
            public_key: peer.public_key,
            endpoint: peer.endpoint.load().as_deref().copied(),
            greatest_timestamp: self.course.greatest_timestamp,
            last_handshake: self.course.last_handshake,
            rx_bytes: peer.transfer.rx_bytes(),
            tx_bytes: peer.transfer.tx_bytes(),
            moments: peer.activity.moments(now),
            keypairs: exports,
        })
    }

    /// Goes on with what another process, or this one, has exported; new keypairs are at home in `home`.
    ///
    /// A session that has made keypairs of its own keeps them, and imports none.
    pub fn import(
        &mut self,
        export: PeerExport,
        home: ShardId,
        indexes: &mut impl Indexes,
        now: Now,
    ) -> Imported {
        let PeerExport { greatest_timestamp, last_handshake, keypairs: exports, .. } = export;
        self.course.greatest_timestamp = self.course.greatest_timestamp.max(greatest_timestamp);
        self.course.last_handshake = self.course.last_handshake.max(last_handshake);
        self.peer.transfer.restore(export.rx_bytes, export.tx_bytes);
        let mut imported = Imported::default();
        if !self.is_handed_over() && !self.course.published.is_empty() {
            imported.refused = exports.len();
            return imported;
        }
        self.peer.activity.restore(&export.moments);
        if let Some(endpoint) = export.endpoint {
            self.peer.endpoint.store(Some(Arc::new(endpoint)));
            self.peer.forget_way();
        }

        let mut keypairs = Keypairs::default();
        let mut new = Vec::new();
        for export in exports {
            let slot = export.slot;
            let peer = Arc::downgrade(&self.peer);
            let keypair = Keypair::import(export, peer, home)
                .filter(|keypair| !keypair.is_expired(now))
                .filter(|keypair| indexes.adopt(keypair.local_index()))
                .map(Arc::new);
            let Some(keypair) = keypair else {
                imported.refused += 1;
                continue;
            };
            *match slot {
                Slot::Current => &mut keypairs.current,
                Slot::Previous => &mut keypairs.previous,
                Slot::Next => &mut keypairs.next,
            } = Some(Arc::clone(&keypair));
            new.push(keypair);
        }
        imported.taken = new.len();
        // Of what we had exported ourselves, the keypairs that come back are only replaced: their
        // indexes are in use.
        for gone in std::mem::take(&mut self.course.published) {
            if new.iter().all(|keypair| keypair.local_index() != gone.local_index()) {
                indexes.retire(&gone);
            }
        }
        for keypair in &new {
            indexes.publish(keypair);
        }
        self.course.published = new;
        self.course.awaited = keypairs.next.as_ref().map(|next| next.local_index());
        self.peer.keypairs.update(|_| keypairs.clone());
        self.course.handover = Handover::No;
        self.peer.handshake_wanted.store(false, Relaxed);
        if keypairs.seals_with(now).is_some() {
            imported.actions.push(Action::Flush);
        }
        imported
    }

    /// The hand-over has failed, and nobody will import what was exported. The keypairs are given up and
    /// their indexes released; handshakes may begin again.
    ///
    /// Does nothing unless the session was frozen.
    pub fn resume(&mut self, indexes: &mut impl Indexes) {
        if self.is_handed_over() {
            self.course.handover = Handover::No;
            self.clear(indexes);
        }
    }
}
