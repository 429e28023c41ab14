//! What goes wrong with a peer, for people: noted where something is refused, read when `tidegate show`
//! asks. No decision depends on it.
//!
//! A note is a number and two moments in a fixed place. It is taken on paths of errors only. What is not
//! authentic can raise a number there, and resets, allocates and moves nothing: a completed handshake
//! wipes the notes, and the clock.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use wg_common::time::Now;

/// What was noted so long ago is no trouble any more.
pub const TROUBLE_FADES_AFTER: Duration = Duration::from_secs(15 * 60);

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What is wrong, the most urgent first.
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub enum TroubleKind { $($(#[$doc])* $name,)* }

        impl TroubleKind {
            /// All kinds.
            pub const ALL: &[TroubleKind] = &[$(TroubleKind::$name,)*];

            /// The name in `tidegate show --json`.
            pub const fn name(self) -> &'static str {
                match self { $(TroubleKind::$name => $text,)* }
            }
        }
    };
}

kinds! {
    /// The kernel takes no datagrams to the peer's endpoint.
    DatagramsUnsent = "datagrams_unsent",
    /// Responses to our initiations come, and cannot be opened.
    ResponsesUnreadable = "responses_unreadable",
    /// Nothing answers our initiations.
    InitiationsUnanswered = "initiations_unanswered",
    /// The peer's initiations are answered, and nothing comes that confirms it.
    ResponsesUnconfirmed = "responses_unconfirmed",
    /// There are packets for the peer, and nobody knows where it is.
    NoEndpoint = "no_endpoint",
    /// The peer sends from inner addresses that it does not own.
    SourceNotAllowed = "source_not_allowed",
    /// The peer's initiations are no newer than one that was answered.
    TimestampsOld = "timestamps_old",
    /// Nothing has answered our initiations, and we have stopped trying.
    HandshakeGivenUp = "handshake_given_up",
    /// Of the device: initiations come that are meant for another public key.
    OtherKey = "other_key",
    /// Of the device: initiations come from keys that are no peers.
    UnknownKeys = "unknown_keys",
    /// Of the device: there are packets to addresses that no peer owns.
    NoPeer = "no_peer",
}

/// How often something happened, without a pause of [`TROUBLE_FADES_AFTER`]. Moments are in whole seconds
/// of boot time: there is one of these for each kind and peer.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Spell {
    count: u32,
    since_s: u32,
    last_s: u32,
}

fn whole_seconds(now: Now) -> u32 {
    u32::try_from(now.boot_ns() / 1_000_000_000).unwrap_or(u32::MAX)
}

impl Spell {
    /// It happened at `now`.
    pub fn note(&mut self, now: Now) {
        self.note_late(Duration::ZERO, now);
    }

    /// It is noticed at `now`; the first time it is, it has gone on for `late`.
    pub(super) fn note_late(&mut self, late: Duration, now: Now) {
        let now_s = whole_seconds(now);
        if !self.is_fresh(now) {
            let late_s = u32::try_from(late.as_secs()).unwrap_or(u32::MAX);
            *self = Self { count: 0, since_s: now_s.saturating_sub(late_s), last_s: now_s };
        }
        self.count = self.count.saturating_add(1);
        self.last_s = now_s;
    }

    /// Whether it has happened, and not too long ago.
    pub fn is_fresh(&self, now: Now) -> bool {
        self.count > 0 && self.last_s_ago(now) <= TROUBLE_FADES_AFTER.as_secs()
    }

    /// How often.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whole seconds since the first time.
    pub fn since_s_ago(&self, now: Now) -> u64 {
        whole_seconds(now).saturating_sub(self.since_s).into()
    }

    /// Whole seconds since the last time.
    pub fn last_s_ago(&self, now: Now) -> u64 {
        whole_seconds(now).saturating_sub(self.last_s).into()
    }

    /// Whether all of it happened no later than the second of `then`.
    pub fn is_over_since(&self, then: Now) -> bool {
        self.last_s <= whole_seconds(then)
    }
}

/// A [`Spell`] that several threads note, and what the last time was about.
///
/// Who notes never waits: where another one does so just now, once is not counted.
#[derive(Debug)]
pub struct Noted<T>(Mutex<Option<(Spell, T)>>);

impl<T> Default for Noted<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T: Copy> Noted<T> {
    /// It happened at `now`, with this.
    pub fn note(&self, about: T, now: Now) {
        let Ok(mut noted) = self.0.try_lock() else { return };
        let mut spell = noted.map(|(spell, _)| spell).unwrap_or_default();
        spell.note(now);
        *noted = Some((spell, about));
    }

    /// How often it happened and what the last time was about, if that was not too long ago.
    pub fn get(&self, now: Now) -> Option<(Spell, T)> {
        // Who notes has the lock for a moment, and cannot panic meanwhile.
        let noted = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        noted.filter(|(spell, _)| spell.is_fresh(now))
    }
}

/// What workers note of a peer: of packets of this host, and of what the peer has authentically sent.
/// Allocated for the first of them.
#[derive(Debug, Default)]
pub struct PeerNotes {
    /// Packets for it, while no endpoint is known.
    pub no_endpoint: Noted<()>,
    /// Datagrams that the kernel did not take, and where they were to go.
    pub unsent: Noted<SocketAddr>,
    /// Packets from it that the source check refused, and their source.
    pub refused: Noted<IpAddr>,
}

/// What a session notes of its handshakes.
#[derive(Debug, Default)]
pub(super) struct HandshakeNotes {
    /// Initiations of ours that were not answered in time.
    pub unanswered: Spell,
    /// Responses that could not be opened. They have the index of the handshake in flight and a right mac1,
    /// which whoever is on the path can make.
    pub unreadable: Spell,
    /// Initiations that we have answered.
    pub unconfirmed: Spell,
    /// Initiations that were not newer than one before. Whoever has seen one can repeat it.
    pub old: Spell,
}

impl HandshakeNotes {
    /// Whether anything is there to be told, now or later.
    pub fn is_fresh(&self, now: Now) -> bool {
        [self.unanswered, self.unreadable, self.unconfirmed, self.old]
            .iter()
            .any(|spell| spell.is_fresh(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Now = Now::from_boot_ns(1_000_000_000_000);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_spell_counts_until_it_fades() {
        let mut spell = Spell::default();
        assert!(!spell.is_fresh(START));
        spell.note_late(SECOND * 5, START);
        spell.note_late(SECOND * 5, START + SECOND * 5);
        let now = START + SECOND * 7;
        assert_eq!((spell.count(), spell.since_s_ago(now), spell.last_s_ago(now)), (2, 12, 2));
        assert!(spell.is_over_since(START + SECOND * 5) && !spell.is_over_since(START));
        let last = START + SECOND * 5 + TROUBLE_FADES_AFTER;
        assert!(spell.is_fresh(last) && !spell.is_fresh(last + SECOND));
        spell.note(last + SECOND);
        assert_eq!((spell.count(), spell.since_s_ago(last + SECOND)), (1, 0), "it begins anew");
    }

    #[test]
    fn a_number_does_not_come_round() {
        let mut spell = Spell { count: u32::MAX, since_s: 0, last_s: whole_seconds(START) };
        spell.note(START);
        assert_eq!(spell.count(), u32::MAX);
        // A clock that went back is no reason to panic.
        assert_eq!(spell.last_s_ago(Now::default()), 0);
    }

    #[test]
    fn who_notes_waits_for_nobody() {
        let noted = Noted::default();
        noted.note(1, START);
        let held = noted.0.lock().unwrap();
        noted.note(2, START);
        drop(held);
        noted.note(3, START);
        let (spell, about) = noted.get(START).unwrap();
        assert_eq!((spell.count(), about), (2, 3));
        assert!(noted.get(START + TROUBLE_FADES_AFTER + SECOND).is_none());
    }

    #[test]
    fn kinds_have_names_of_their_own() {
        let names: std::collections::BTreeSet<_> =
            TroubleKind::ALL.iter().map(|k| k.name()).collect();
        assert_eq!(names.len(), TroubleKind::ALL.len());
    }
}
