//! What is kept of a peer once something has happened to it.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, LazyLock};

use wg_common::id::ReceiverIndex;
use wg_common::time::Now;

use super::Keypair;
use super::cookie::PeerCookie;
use super::handover::Handover;
use super::timers::Timers;
use super::troubles::HandshakeNotes;
use crate::noise::{Initiator, Timestamp};

/// A handshake that we have begun.
#[derive(Debug)]
pub(super) struct Pending {
    pub initiator: Initiator,
    /// When its newest initiation, with all that is secret in it, was made.
    pub begun: Now,
}

/// What a [`Session`](super::Session) is beside who its peer is.
#[derive(Debug, Default)]
pub(super) struct Course {
    /// The handshake that waits for its response.
    pub pending: Option<Box<Pending>>,
    /// Keypairs that workers can find: those in the peer's [`Keypairs`](super::Keypairs), and those that
    /// were taken out since we last looked.
    pub published: Vec<Arc<Keypair>>,
    /// The keypair that we made as responder and that waits for its first packet.
    pub awaited: Option<ReceiverIndex>,
    pub timers: Timers,
    pub cookie: PeerCookie,
    /// The greatest timestamp of an initiation that was answered, here or by whom we have it from.
    pub greatest_timestamp: Timestamp,
    /// When the keypair that was made last dies, or died.
    pub keypairs_until: Option<Now>,
    /// When an initiation was last answered; the beginning of time if never.
    pub answered: Now,
    /// Until when answers' intervals are spent in advance.
    pub answers_spent: Now,
    pub last_handshake: Option<Timestamp>,
    pub handover: Handover,
    pub notes: HandshakeNotes,
}

/// A session's [`Course`], which takes room from the first write on. Before that it reads as one in which
/// nothing has happened: a million peers who never come have none.
#[derive(Debug, Default)]
pub(super) struct LazyCourse(Option<Box<Course>>);

impl LazyCourse {
    /// The course, if there is one: what would only write that nothing has happened begins none.
    pub fn begun(&mut self) -> Option<&mut Course> {
        self.0.as_deref_mut()
    }
}

impl Deref for LazyCourse {
    type Target = Course;

    fn deref(&self) -> &Course {
        static NOTHING: LazyLock<Course> = LazyLock::new(Course::default);
        self.0.as_deref().unwrap_or(&NOTHING)
    }
}

impl DerefMut for LazyCourse {
    fn deref_mut(&mut self) -> &mut Course {
        self.0.get_or_insert_default()
    }
}
