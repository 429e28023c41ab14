//! Calls the sessions whose timers are due, and none else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rand_core::Rng;
use wg_common::id::{PeerId, WorkerId};
use wg_common::time::Now;

use super::{Cell, Handshakes, Outside, lock};
use crate::session::{Session, TICK, Token, Wheel};

/// Peers that are all to be reached at once are reached so long one after another.
const PACE: Duration = Duration::from_millis(1);

/// From so many unanswered initiations on, a peer is taken to be elsewhere: one may have been lost.
const UNANSWERED_MIN: u32 = 2;

/// The wheel on which cells wait, and who waits for it.
///
/// Its lock is taken last: nothing else is locked under it.
#[derive(Default)]
pub(super) struct Alarms {
    wheel: Wheel<Arc<Cell>>,
    /// Until when the thread that calls [`Handshakes::tick`] believes it may sleep.
    asleep_until: Option<Now>,
}

/// A cell's place on the wheel: a [`Token`], or none. Only read and written under the wheel's lock.
pub(super) struct Place(AtomicU32);

impl Place {
    /// Not on the wheel.
    pub(super) const fn none() -> Self {
        Self(AtomicU32::new(u32::MAX))
    }

    fn get(&self) -> Option<Token> {
        let number = self.0.load(Ordering::Relaxed);
        (number != u32::MAX).then(|| Token::from_u32(number))
    }

    fn set(&self, token: Option<Token>) {
        self.0.store(token.map_or(u32::MAX, Token::to_u32), Ordering::Relaxed);
    }
}

impl Alarms {
    /// Has `cell` come due at `at` and at no other moment; not at all for `None`. Says whether that
    /// is sooner than anybody is awake for.
    fn set(&mut self, cell: &Arc<Cell>, at: Option<Now>) -> bool {
        match (cell.place.get(), at) {
            (None, None) => {}
            (None, Some(at)) => cell.place.set(Some(self.wheel.schedule(Arc::clone(cell), at))),
            (Some(token), Some(at)) => self.wheel.reschedule(token, at),
            (Some(token), None) => {
                cell.place.set(None);
                self.wheel.cancel(token);
            }
        }
        at.is_some_and(|at| self.asleep_until.is_some_and(|until| at < until))
    }

    fn take_due(&mut self, now: Now) -> Vec<Arc<Cell>> {
        let mut due = Vec::new();
        self.wheel.advance(now, &mut due);
        for cell in &due {
            cell.place.set(None);
        }
        due
    }
}

/// Spreads what many peers do for the first time: a daemon that starts, wakes or goes on would
/// handshake with all of them in one instant, and so would they.
#[derive(Debug, Default)]
pub(super) struct Pace {
    last: Now,
}

impl Pace {
    /// The next free moment, at once if there was none lately. If so many wait that it would be later
    /// than `within`, any moment until then.
    pub(super) fn next(&mut self, rng: &mut impl Rng, within: Duration, now: Now) -> Now {
        // A clock that went back leaves nobody waiting for it.
        let free = if self.last > now + within + PACE { now } else { self.last + PACE };
        if free > now + within {
            let ns = u64::try_from(within.as_nanos()).unwrap_or(u64::MAX);
            return now + Duration::from_nanos(rng.next_u64() % ns.max(1));
        }
        self.last = free.max(now);
        self.last
    }
}

impl<O: Outside> Handshakes<O> {
    /// Calls the sessions that are due, and says how many they were. To be called when
    /// [`next_timeout`](Self::next_timeout) says; calling it too early does nothing.
    pub fn tick(&self, now: Now) -> usize {
        let due = lock(&self.alarms).take_due(now);
        for cell in &due {
            self.handle_timeout(cell, now);
        }
        due.len()
    }

    /// When [`tick`](Self::tick) wants to be called, if there is a timer.
    ///
    /// The caller may sleep until then: if something sooner comes up, it shows in
    /// [`sooner`](Self::sooner).
    pub fn next_timeout(&self) -> Option<Now> {
        let mut alarms = lock(&self.alarms);
        let next = alarms.wheel.next();
        alarms.asleep_until = Some(next.unwrap_or(Now::from_boot_ns(u64::MAX)));
        next
    }

    /// Waits until a timer runs out sooner than [`next_timeout`](Self::next_timeout) said.
    pub async fn sooner(&self) {
        self.sooner.notified().await;
    }

    /// The peers whose sessions have a timer, in no order: all that have keypairs or a handshake are among
    /// them, unless there is a pause.
    pub fn waiting_peers(&self) -> Vec<PeerId> {
        lock(&self.alarms).wheel.values().map(|cell| cell.hot.id).collect()
    }

    /// Number of sessions that have a timer.
    pub fn awake_count(&self) -> usize {
        lock(&self.alarms).wheel.len()
    }

    /// Runs the timers of one session.
    pub(super) fn handle_timeout(&self, cell: &Arc<Cell>, now: Now) {
        let mut session = cell.session();
        if let Some(identity) = self.identity()
            && self.shared.pause(now).is_none()
        {
            let before = session.unanswered_count();
            let actions = self.with_context(cell, &identity, WorkerId(0), now, |context| {
                session.handle_timeout(context, now)
            });
            let count = session.unanswered_count();
            if count > before && count >= UNANSWERED_MIN && cell.is_named.load(Ordering::Relaxed) {
                lock(&self.unanswered).push(cell.hot.id);
            }
            self.execute(cell, &actions, WorkerId(0), now);
        }
        self.awaken_after(cell, &session, now, now + TICK);
    }

    /// Takes note of when a cell's session wants to be called next. To be called after each call to the
    /// session, before it is unlocked.
    pub(super) fn awaken(&self, cell: &Arc<Cell>, session: &Session, now: Now) {
        self.awaken_after(cell, session, now, Now::default());
    }

    /// As [`awaken`](Self::awaken), but no sooner than `least`: a session that always wants to be
    /// called would keep a core busy.
    fn awaken_after(&self, cell: &Arc<Cell>, session: &Session, now: Now, least: Now) {
        let wake_at = if self.shared.pause(now).is_none() { session.wake_at(now) } else { None };
        if lock(&self.alarms).set(cell, wake_at.map(|at| at.max(least))) {
            self.sooner.notify_one();
        }
    }

    /// Has [`take_unanswered`](Self::take_unanswered) tell of a peer.
    pub fn set_named(&self, peer: PeerId) {
        if let Some(cell) = self.cell(peer) {
            cell.is_named.store(true, Ordering::Relaxed);
        }
    }

    /// Peers that [`set_named`](Self::set_named) was called for and that did not answer an initiation,
    /// which was not the first, since the last call. A peer may be among them more than once.
    pub fn take_unanswered(&self) -> Vec<PeerId> {
        std::mem::take(&mut lock(&self.unanswered))
    }

    /// A moment for something that many peers may be about to do, within `within` from `now` on.
    pub(super) fn pace(&self, within: Duration, now: Now) -> Now {
        lock(&self.pace).next(&mut self.outside.rng(), within, now)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    const START: Now = Now::from_boot_ns(1_000_000_000_000);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn who_comes_alone_does_not_wait() {
        let (mut pace, mut rng) = (Pace::default(), StdRng::seed_from_u64(1));
        for second in 0..3 {
            let now = START + SECOND * second;
            assert_eq!(pace.next(&mut rng, SECOND * 25, now), now);
        }
    }

    #[test]
    fn a_hundred_thousand_peers_do_not_come_in_one_instant() {
        let (mut pace, mut rng) = (Pace::default(), StdRng::seed_from_u64(1));
        let mut by_ms = vec![0_u32; 25_001];
        for _ in 0..100_000 {
            let at = pace.next(&mut rng, SECOND * 25, START);
            by_ms[(at - START).as_millis() as usize] += 1;
        }
        assert!(by_ms.iter().all(|&count| count < 30), "{:?}", by_ms.iter().max());
        assert!(by_ms.chunks(1000).all(|second| second.iter().sum::<u32>() < 8000));
    }

    #[test]
    fn a_clock_that_went_back_makes_nobody_wait() {
        let (mut pace, mut rng) = (Pace::default(), StdRng::seed_from_u64(1));
        pace.next(&mut rng, SECOND, START + SECOND * 3600);
        assert_eq!(pace.next(&mut rng, SECOND, START), START);
    }
}
