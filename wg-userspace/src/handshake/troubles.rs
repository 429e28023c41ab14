//! What goes wrong, for people: what sessions and workers have noted, the most urgent first.
//!
//! Of handshake messages from nobody we know there is one note for each kind, in a fixed place: how many
//! came and where the last came from. A flood of them makes a number grow.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use wg_common::time::Now;

use super::{Cell, Handshakes, Outside};
use crate::datapath::handoff::HandshakeDatagram;
use crate::key::PublicKey;
use crate::session::{Noted, Spell, TroubleKind};

/// Something that is wrong.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Trouble {
    /// With whom; nobody if it is the device's.
    pub peer: Option<PublicKey>,
    /// What.
    pub kind: TroubleKind,
    /// How often, and when.
    pub spell: Spell,
    /// The address that it is about, by kind: an endpoint, a source or a destination.
    pub address: Option<String>,
    /// The public key that it is about, by kind: who is unknown, or owns the source.
    pub public_key: Option<PublicKey>,
}

impl Trouble {
    fn new(peer: Option<&Cell>, kind: TroubleKind, spell: Spell) -> Self {
        let peer = peer.map(|cell| cell.hot.public_key);
        Self { peer, kind, spell, address: None, public_key: None }
    }
}

/// Handshake messages from nobody we know.
#[derive(Default)]
pub(super) struct StrangerNotes {
    /// Initiations whose mac1 is not for our public key: whoever sends a datagram is noted here.
    other_key: Noted<SocketAddr>,
    /// Initiations to us. The key is what the sender says it is.
    unknown: Noted<(SocketAddr, PublicKey)>,
}

impl StrangerNotes {
    pub(super) fn note_other_key(&self, datagram: &HandshakeDatagram, now: Now) {
        self.other_key.note(datagram.from.remote, now);
    }

    pub(super) fn note_unknown(&self, datagram: &HandshakeDatagram, key: PublicKey, now: Now) {
        self.unknown.note((datagram.from.remote, key), now);
    }
}

impl<O: Outside> Handshakes<O> {
    /// At most `count_max` troubles with peers, the most urgent first; how many more there are; and those of
    /// the device. A peer of which nothing was noted costs a look at a flag.
    pub fn troubles(&self, count_max: usize, now: Now) -> (Vec<Trouble>, usize, Vec<Trouble>) {
        let mut troubles = Vec::new();
        let mut count = 0;
        for cell in self.troubled_cells() {
            let of_peer = self.troubles_of(&cell, now);
            count += of_peer.len();
            troubles.extend(of_peer);
            if troubles.len() > 8 * count_max {
                put_in_order(&mut troubles, now);
                troubles.truncate(count_max);
            }
        }
        put_in_order(&mut troubles, now);
        troubles.truncate(count_max);
        let more = count - troubles.len();
        (troubles, more, self.device_troubles(now))
    }

    /// Peers of which something was noted. They count as untroubled from now on.
    fn troubled_cells(&self) -> Vec<Arc<Cell>> {
        let is_troubled = |cell: &Cell| {
            cell.hot.in_trouble.load(Relaxed) && cell.hot.in_trouble.swap(false, Relaxed)
        };
        self.cells().iter().filter(|cell| is_troubled(cell)).cloned().collect()
    }

    fn troubles_of(&self, cell: &Cell, now: Now) -> Vec<Trouble> {
        let hot = &cell.hot;
        let session = cell.session();
        let of_handshakes = session.troubles(now);
        let mut is_noted = session.has_notes(now);
        drop(session);
        let mut troubles = Vec::new();
        if let Some(notes) = hot.notes() {
            if let Some((spell, to)) = notes.unsent.get(now) {
                is_noted = true;
                // What came since then was answered, or would have been.
                let received = hot.activity.last_received();
                if !received.is_some_and(|received| spell.is_over_since(received)) {
                    let address = Some(to.to_string());
                    let unsent = Trouble::new(Some(cell), TroubleKind::DatagramsUnsent, spell);
                    troubles.push(Trouble { address, ..unsent });
                }
            }
            if let Some((spell, ())) = notes.no_endpoint.get(now) {
                is_noted = true;
                if hot.endpoint.load().is_none() {
                    troubles.push(Trouble::new(Some(cell), TroubleKind::NoEndpoint, spell));
                }
            }
            if let Some((spell, source)) = notes.refused.get(now) {
                is_noted = true;
                let owner = self.shared.routing.load().lookup(source);
                // It may have been given the prefix meanwhile.
                if owner != Some(hot.id) {
                    let owner = owner.and_then(|id| self.shared.peers.get(id.0 as usize));
                    let refused = Trouble::new(Some(cell), TroubleKind::SourceNotAllowed, spell);
                    troubles.push(Trouble {
                        address: Some(source.to_string()),
                        public_key: owner.map(|peer| peer.public_key),
                        ..refused
                    });
                }
            }
        }
        // What is not sent is not answered either.
        let is_unsent = troubles.iter().any(|trouble| trouble.kind == TroubleKind::DatagramsUnsent);
        for (kind, spell) in of_handshakes {
            let is_of_answers =
                matches!(kind, TroubleKind::InitiationsUnanswered | TroubleKind::HandshakeGivenUp);
            if !(is_unsent && is_of_answers) {
                let endpoint = hot.endpoint.load().as_ref().map(|at| at.remote.to_string());
                let trouble = Trouble::new(Some(cell), kind, spell);
                troubles.push(Trouble { address: endpoint, ..trouble });
            }
        }
        if is_noted {
            hot.in_trouble.store(true, Relaxed);
        }
        troubles
    }

    fn device_troubles(&self, now: Now) -> Vec<Trouble> {
        let mut troubles = Vec::new();
        if let Some((spell, from)) = self.strangers.other_key.get(now) {
            let address = Some(from.to_string());
            let other = Trouble::new(None, TroubleKind::OtherKey, spell);
            troubles.push(Trouble { address, ..other });
        }
        if let Some((spell, (from, key))) = self.strangers.unknown.get(now)
            && self.cell_by_key(&key).is_none()
        {
            let unknown = Trouble::new(None, TroubleKind::UnknownKeys, spell);
            let (address, public_key) = (Some(from.to_string()), Some(key));
            troubles.push(Trouble { address, public_key, ..unknown });
        }
        if let Some((spell, to)) = self.shared.no_peer.get(now)
            && self.shared.routing.load().lookup(to).is_none()
        {
            let no_peer = Trouble::new(None, TroubleKind::NoPeer, spell);
            troubles.push(Trouble { address: Some(to.to_string()), ..no_peer });
        }
        troubles
    }
}

/// The most urgent kinds first; of one kind, what happened last. The same input has the same order.
fn put_in_order(troubles: &mut [Trouble], now: Now) {
    troubles.sort_by_key(|trouble| {
        let peer = trouble.peer.map(|key| *key.as_bytes());
        (trouble.kind, trouble.spell.last_s_ago(now), peer)
    });
}
