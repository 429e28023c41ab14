//! Initiations of peers that nobody here knows: looked up at a source, if there is one.
//!
//! ```text
//! pool     unknown_sender ─ Lookups ─ initiation waits        looked_up ─ received as any other
//!                             └ Notice::LookUp ┐                  │
//! control                                      └ PeerSource ─ peer is added
//! ```
//!
//! An initiation proves who made it before its sender is looked up: a private key belongs to its
//! static key, even if nobody knows the two. So nobody has another's peer pulled, and what waits for a
//! look-up is what the peer itself has sent.

use std::sync::Mutex;

use wg_common::id::PeerId;
use wg_common::outcome::DropReason;
use wg_common::time::Now;

use super::source::{Admission, Answer, Limits, Lookups, Waiting};
use super::{Cell, Handshakes, Outside, lock};
use crate::datapath::handoff::HandshakeDatagram;
use crate::key::{PresharedKey, PublicKey};
use crate::noise::{Identity, OpenedInitiation, RemoteStatic, Timestamp};
use crate::session::Action;

/// What the pool has to tell control.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Notice {
    /// This sender is to be looked up; [`Handshakes::looked_up`] ends it.
    LookUp(PublicKey),
    /// There is a keypair with this peer, and both sides know it.
    Handshake(PeerId),
}

/// How the pool tells control. Never waits; false if control has too much to read already.
pub type Notify = Box<dyn Fn(Notice) -> bool + Send + Sync>;

/// What stands before the peers that we know.
pub(super) struct Gate {
    lookups: Mutex<Lookups>,
    notify: Notify,
}

impl<O: Outside> Handshakes<O> {
    /// Has unknown senders looked up: `notify` is told of each.
    #[must_use]
    pub fn with_source(self, limits: Limits, notify: Notify) -> Self {
        let lookups = Mutex::new(Lookups::new(limits, &mut self.outside.rng()));
        Self { gate: Some(Gate { lookups, notify }), ..self }
    }

    /// What becomes of an initiation whose sender is no peer of ours. It is not answered now.
    pub(super) fn unknown_sender(
        &self,
        identity: &Identity,
        opened: OpenedInitiation,
        datagram: &HandshakeDatagram,
        now: Now,
    ) -> DropReason {
        let Some(gate) = &self.gate else { return DropReason::UnknownPeer };
        let key = opened.sender();
        // First what costs little.
        if let Err(reason) = lock(&gate.lookups).check(&key, datagram.from.remote.ip(), now) {
            return reason;
        }
        let remote = RemoteStatic::new(identity, key, PresharedKey::default());
        let timestamp = match opened.authenticate(&remote) {
            Ok(authentic) => authentic.timestamp(),
            Err(error) => return error.drop_reason(),
        };
        let mut lookups = lock(&gate.lookups);
        match lookups.admit(key, Waiting { datagram: *datagram, timestamp }, now) {
            Ok(Admission::New) if !(gate.notify)(Notice::LookUp(key)) => {
                lookups.withdraw(&key);
                DropReason::LookupLimit
            }
            Ok(Admission::New | Admission::Pending) => DropReason::LookupPending,
            Err(reason) => reason,
        }
    }

    /// The timestamp of the initiation that waits for its sender to be looked up, if one does.
    pub fn awaited(&self, key: &PublicKey) -> Option<Timestamp> {
        lock(&self.gate.as_ref()?.lookups).awaited(key)
    }

    /// Ends a look-up. If the sender is a peer of ours by now, its initiation is received as any other.
    pub fn looked_up(&self, key: &PublicKey, answer: Answer, now: Now) {
        let Some(gate) = &self.gate else { return };
        // Who was removed again in the meantime must not be looked up again and again.
        let is_gone = answer == Answer::Known && self.cell_by_key(key).is_none();
        let answer = if is_gone { Answer::Unknown } else { answer };
        let Some(waiting) = lock(&gate.lookups).answered(key, answer, now) else { return };
        match answer {
            // It waited for its turn before, and has proved who made it.
            Answer::Known => self.count(self.receive(&waiting.datagram, now)),
            Answer::Unknown => {
                self.strangers.note_unknown(&waiting.datagram, *key, now);
                self.drops.drop_shared(DropReason::UnknownPeer, 1);
            }
            Answer::Replayed => self.drops.drop_shared(DropReason::OldTimestamp, 1),
            // It was counted when it came.
            Answer::Failed => {}
        }
    }

    /// Ends the look-ups that nobody answered in time; says how many. To be called several times a
    /// second.
    pub fn expire_lookups(&self, now: Now) -> usize {
        self.gate.as_ref().map_or(0, |gate| lock(&gate.lookups).expire(now))
    }

    /// Tells control if these actions say that a handshake is completed.
    pub(super) fn tell_of_keypair(&self, cell: &Cell, actions: &[Action]) {
        let Some(gate) = &self.gate else { return };
        if actions.iter().any(|action| matches!(action, Action::Flush)) {
            // If control is too busy to hear of it, it hears of the next one.
            let _ = (gate.notify)(Notice::Handshake(cell.hot.id));
        }
    }
}

impl Cell {
    /// The greatest timestamp of the peer's initiations.
    pub fn greatest_timestamp(&self) -> Timestamp {
        self.session().greatest_timestamp()
    }

    /// When the peer's last keypair dies, or died; not before `now` while a timer of it runs. `None` if
    /// there never was anything.
    pub fn busy_until(&self, now: Now) -> Option<Now> {
        self.session().busy_until(now)
    }
}
