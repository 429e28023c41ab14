//! Which of a peer's keypairs seals, and which still open.

use std::sync::Arc;

use wg_common::id::ReceiverIndex;
use wg_common::time::Now;

use super::Keypair;

/// A peer's keypairs, as a value: every change makes a new one.
#[derive(Clone, Debug, Default)]
pub struct Keypairs {
    /// Seals; opens.
    pub current: Option<Arc<Keypair>>,
    /// Opens what was on its way when `current` came.
    pub previous: Option<Arc<Keypair>>,
    /// Made as responder and not confirmed: opens, and when it first has, becomes `current`, or
    /// `previous` to one that is newer.
    pub next: Option<Arc<Keypair>>,
}

impl Keypairs {
    /// What seals now, if anything does: never `next`, whose initiator may not know it yet.
    pub fn seals_with(&self, now: Now) -> Option<&Arc<Keypair>> {
        self.current.as_ref().filter(|keypair| keypair.can_seal(now))
    }

    /// After our initiation was answered: `new` seals at once.
    ///
    /// `current` goes on opening, for the peer seals with it until it hears of `new`. An unconfirmed
    /// `next` stays too, for its initiator may use it yet: so each side of two handshakes that
    /// crossed opens what the other seals. The kernel lets go of `current` where there is a `next`;
    /// then what is on its way is lost, and somebody who held an initiation back and let it come
    /// when there was a keypair in use could have that loss at the next rekey.
    #[must_use]
    pub fn installed_by_initiator(&self, new: Arc<Keypair>) -> Self {
        Self { current: Some(new), previous: self.current.clone(), next: self.next.clone() }
    }

    /// After we answered an initiation: `new` waits for its first packet.
    ///
    /// Replaces an older `next`, whose response was lost. The kernel drops `previous` here; we keep
    /// it until `new` is confirmed, since an initiation alone, which may be a replay after a restart,
    /// must not take a keypair in use away.
    #[must_use]
    pub fn installed_by_responder(&self, new: Arc<Keypair>) -> Self {
        Self { next: Some(new), ..self.clone() }
    }

    /// After the keypair with this local index has opened a packet: if it is `next`, it seals from
    /// now on. Otherwise nothing changes.
    ///
    /// Where `current` was made after it, that seals on: the peer has answered it, and may have let go
    /// of `next` since. Else somebody who held the first packet of `next` back could let it come when
    /// the peer has, and nothing that we seal would be opened.
    #[must_use]
    pub fn confirmed(&self, index: ReceiverIndex) -> Self {
        let Some(next) = self.next.as_ref().filter(|next| next.local_index() == index) else {
            return self.clone();
        };
        let newer = self.current.as_ref().filter(|current| current.created() > next.created());
        let (current, previous) = match newer {
            Some(current) => (current, Some(next)),
            None => (next, self.current.as_ref()),
        };
        Self { current: Some(Arc::clone(current)), previous: previous.cloned(), next: None }
    }

    /// Without those that are dead at `now`.
    #[must_use]
    pub fn without_expired(&self, now: Now) -> Self {
        let living = |keypair: &Option<Arc<Keypair>>| {
            keypair.as_ref().filter(|keypair| !keypair.is_expired(now)).cloned()
        };
        Self {
            current: living(&self.current),
            previous: living(&self.previous),
            next: living(&self.next),
        }
    }

    /// Those whose handshake began at `not_before` or later.
    #[must_use]
    pub fn begun_since(&self, not_before: Now) -> Self {
        let newer = |keypair: &Option<Arc<Keypair>>| {
            keypair.as_ref().filter(|keypair| keypair.begun() >= not_before).cloned()
        };
        Self {
            current: newer(&self.current),
            previous: newer(&self.previous),
            next: newer(&self.next),
        }
    }

    /// Without any.
    #[must_use]
    pub fn cleared(&self) -> Self {
        Self::default()
    }

    /// All there are.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Keypair>> {
        [&self.current, &self.previous, &self.next].into_iter().flatten()
    }

    /// Whether this very keypair is among them.
    pub fn contains(&self, keypair: &Arc<Keypair>) -> bool {
        self.iter().any(|own| Arc::ptr_eq(own, keypair))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use wg_common::protocol::REJECT_AFTER_TIME;

    use super::*;
    use crate::noise::Role;
    use crate::session::keypair::tests::{START, keypair};

    /// Indexes of current, previous and next; 0 for none.
    type Three = [u32; 3];

    fn of(indexes: Three) -> Keypairs {
        let keypair = |index| Arc::new(keypair(index, Role::Responder, START));
        let [current, previous, next] = indexes.map(|index| (index != 0).then(|| keypair(index)));
        Keypairs { current, previous, next }
    }

    fn indexes(keypairs: &Keypairs) -> Three {
        let index = |keypair: &Arc<Keypair>| keypair.local_index().value();
        [&keypairs.current, &keypairs.previous, &keypairs.next]
            .map(|keypair| keypair.as_ref().map_or(0, index))
    }

    #[track_caller]
    fn check(table: &[(Three, Three)], transition: impl Fn(&Keypairs) -> Keypairs) {
        for (before, after) in table {
            assert_eq!(indexes(&transition(&of(*before))), *after, "from {before:?}");
        }
    }

    fn index(value: u32) -> ReceiverIndex {
        ReceiverIndex::from_wire(value.to_le_bytes())
    }

    fn new() -> Arc<Keypair> {
        Arc::new(keypair(9, Role::Initiator, START))
    }

    #[test]
    fn what_the_initiator_installs_seals_at_once_and_takes_nothing_in_use_away() {
        let table = [
            ([0, 0, 0], [9, 0, 0]),
            ([1, 0, 0], [9, 1, 0]),
            ([1, 2, 0], [9, 1, 0]),
            ([0, 0, 3], [9, 0, 3]),
            ([1, 0, 3], [9, 1, 3]),
            ([1, 2, 3], [9, 1, 3]),
            ([0, 2, 0], [9, 0, 0]),
        ];
        check(&table, |keypairs| keypairs.installed_by_initiator(new()));
    }

    #[test]
    fn what_the_responder_installs_takes_nothing_away_but_an_older_next() {
        let table = [
            ([0, 0, 0], [0, 0, 9]),
            ([1, 0, 0], [1, 0, 9]),
            ([1, 2, 0], [1, 2, 9]),
            ([1, 2, 3], [1, 2, 9]),
            ([0, 0, 3], [0, 0, 9]),
        ];
        check(&table, |keypairs| keypairs.installed_by_responder(new()));
    }

    #[test]
    fn the_first_packet_makes_next_current() {
        let table = [
            ([0, 0, 3], [3, 0, 0]),
            ([1, 0, 3], [3, 1, 0]),
            ([1, 2, 3], [3, 1, 0]),
            ([0, 2, 3], [3, 0, 0]),
        ];
        check(&table, |keypairs| keypairs.confirmed(index(3)));
    }

    #[test]
    fn a_first_packet_that_was_held_back_does_not_replace_a_newer_keypair() {
        let made = |index, at| Some(Arc::new(keypair(index, Role::Responder, at)));
        let later = START + Duration::from_nanos(1);
        let next = made(3, START);
        let keypairs = Keypairs { current: made(1, later), previous: made(2, START), next };
        assert_eq!(indexes(&keypairs.confirmed(index(3))), [1, 3, 0]);
        let next = made(3, later);
        let keypairs = Keypairs { current: made(1, START), previous: made(2, START), next };
        assert_eq!(indexes(&keypairs.confirmed(index(3))), [3, 1, 0]);
    }

    #[test]
    fn packets_of_other_keypairs_change_nothing() {
        let table = [([0, 0, 0], [0, 0, 0]), ([1, 2, 3], [1, 2, 3]), ([1, 2, 0], [1, 2, 0])];
        check(&table, |keypairs| keypairs.confirmed(index(1)));
        check(&table, |keypairs| keypairs.confirmed(index(2)));
        check(&table, |keypairs| keypairs.confirmed(index(4)));
    }

    #[test]
    fn only_current_seals() {
        for (before, seals) in [([1, 2, 3], 1), ([0, 2, 3], 0), ([0, 0, 3], 0)] {
            let keypairs = of(before);
            let index = keypairs.seals_with(START).map_or(0, |k| k.local_index().value());
            assert_eq!(index, seals);
        }
        assert!(of([1, 2, 3]).seals_with(START + REJECT_AFTER_TIME).is_none());
    }

    #[test]
    fn the_dead_are_taken_out_and_only_they() {
        let old = |index| Some(Arc::new(keypair(index, Role::Initiator, START)));
        let keypairs = Keypairs {
            current: Some(Arc::new(keypair(1, Role::Initiator, START + Duration::from_secs(60)))),
            previous: old(2),
            next: old(3),
        };
        let almost = START + (REJECT_AFTER_TIME - Duration::from_nanos(1));
        assert_eq!(indexes(&keypairs.without_expired(almost)), [1, 2, 3]);
        assert_eq!(indexes(&keypairs.without_expired(START + REJECT_AFTER_TIME)), [1, 0, 0]);
        assert_eq!(indexes(&keypairs.cleared()), [0, 0, 0]);
    }
}
