//! When something was sent to a peer and came from it: what the timers of §6 run on.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use wg_common::time::Now;

/// Traffic that comes sooner after the last than this does not move `last_sent` and `last_received`:
/// a busy peer's cache line is then read by many workers and written by few.
const GRAIN: Duration = Duration::from_millis(10);

/// Moments of a peer's traffic. Workers store them; control compares them with its timers.
///
/// A timer of the kernel's that is *armed unless pending* is a moment here that is set unless set;
/// a timer that is deleted is a moment that is cleared.
#[derive(Debug, Default)]
pub struct Activity {
    unanswered_since: Moment,
    owed_since: Moment,
    last_sent: Moment,
    last_received: Moment,
}

impl Activity {
    /// Transport data with a packet in it was sent.
    pub fn data_sent(&self, now: Now) {
        self.unanswered_since.set_if_none(now);
        self.authenticated_sent(now);
    }

    /// A keepalive was sent.
    pub fn keepalive_sent(&self, now: Now) {
        self.authenticated_sent(now);
    }

    /// Any message was sent that the peer can authenticate: transport data or handshake.
    pub fn authenticated_sent(&self, now: Now) {
        self.owed_since.clear();
        self.last_sent.advance(now);
    }

    /// Transport data with a packet in it came, and its tag and counter are right.
    pub fn data_received(&self, now: Now) {
        self.owed_since.set_if_none(now);
        self.authenticated_received(now);
    }

    /// Any message of the peer came that is authentic and new: transport data or handshake.
    pub fn authenticated_received(&self, now: Now) {
        self.unanswered_since.clear();
        self.last_received.advance(now);
    }

    /// When the first packet was sent after the last message that came from the peer.
    pub fn unanswered_since(&self) -> Option<Now> {
        self.unanswered_since.get()
    }

    /// When the first packet came after the last message that was sent to the peer.
    pub fn owed_since(&self) -> Option<Now> {
        self.owed_since.get()
    }

    /// When something was last sent; up to 10 ms early.
    pub fn last_sent(&self) -> Option<Now> {
        self.last_sent.get()
    }

    /// When something last came; up to 10 ms early.
    pub fn last_received(&self) -> Option<Now> {
        self.last_received.get()
    }

    /// Whether something came after `then`; perhaps also if it came up to 10 ms before.
    pub fn has_received_since(&self, then: Now) -> bool {
        self.last_received().is_some_and(|at| at + GRAIN > then)
    }

    /// All moments, for a hand-over at `now`.
    pub(super) fn moments(&self, now: Now) -> Moments {
        self.all().map(|moment| moment.0.load(Relaxed).min(now.boot_ns()))
    }

    /// Goes on from where another process left, but for what has happened here since.
    pub(super) fn restore(&self, moments: &Moments) {
        for (moment, &ns) in self.all().into_iter().zip(moments) {
            // Only from none: the moment may have been set by a worker.
            let _ = moment.0.compare_exchange(0, ns, Relaxed, Relaxed);
        }
    }

    fn all(&self) -> [&Moment; 4] {
        [&self.unanswered_since, &self.owed_since, &self.last_sent, &self.last_received]
    }

    /// Forgets what waits for an answer, and what is owed one: there is nothing to seal it with.
    pub(super) fn forget(&self) {
        self.unanswered_since.clear();
        self.owed_since.clear();
    }

    /// Has packets wait for an answer since `since`, if they do not for longer.
    pub(super) fn await_answer_since(&self, since: Now) {
        self.unanswered_since.move_back(since);
    }

    /// Forgets that packets wait for an answer, if they do so since `since`; newer ones count anew.
    pub(super) fn clear_unanswered(&self, since: Now) {
        self.unanswered_since.clear_if(since);
    }

    /// Forgets that a keepalive is owed, if it is so since `since`.
    pub(super) fn clear_owed(&self, since: Now) {
        self.owed_since.clear_if(since);
    }
}

/// The moments of a peer in a hand-over: boot time in nanoseconds, 0 for none.
pub(super) type Moments = [u64; 4];

/// Boot time in nanoseconds; 0 for none. Nothing else is read by way of it, so that no ordering is
/// needed.
#[derive(Debug, Default)]
struct Moment(AtomicU64);

impl Moment {
    fn get(&self) -> Option<Now> {
        match self.0.load(Relaxed) {
            0 => None,
            ns => Some(Now::from_boot_ns(ns)),
        }
    }

    fn set_if_none(&self, now: Now) {
        if self.0.load(Relaxed) == 0 {
            // Who is second was no earlier by more than the two threads' clocks differ.
            let _ = self.0.compare_exchange(0, now.boot_ns(), Relaxed, Relaxed);
        }
    }

    fn clear(&self) {
        if self.0.load(Relaxed) != 0 {
            self.0.store(0, Relaxed);
        }
    }

    fn clear_if(&self, since: Now) {
        let _ = self.0.compare_exchange(since.boot_ns(), 0, Relaxed, Relaxed);
    }

    /// Is no later than `since` from now on.
    fn move_back(&self, since: Now) {
        let earlier = |ns: u64| (ns == 0 || ns > since.boot_ns()).then_some(since.boot_ns());
        let _ = self.0.fetch_update(Relaxed, Relaxed, earlier);
    }

    /// Moves on to `now`, never back.
    fn advance(&self, now: Now) {
        if now.since(Now::from_boot_ns(self.0.load(Relaxed))) >= GRAIN {
            self.0.fetch_max(now.boot_ns(), Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Now = Now::from_boot_ns(1_000_000_000);
    const STEP: Duration = Duration::from_secs(1);

    #[test]
    fn the_first_unanswered_packet_counts() {
        let activity = Activity::default();
        activity.data_sent(START);
        activity.data_sent(START + STEP);
        assert_eq!(activity.unanswered_since(), Some(START));
        activity.authenticated_received(START + STEP);
        assert_eq!(activity.unanswered_since(), None);
        activity.data_sent(START + STEP * 2);
        assert_eq!(activity.unanswered_since(), Some(START + STEP * 2));
    }

    #[test]
    fn keepalives_and_handshakes_wait_for_no_answer() {
        let activity = Activity::default();
        activity.keepalive_sent(START);
        activity.authenticated_sent(START);
        assert_eq!(activity.unanswered_since(), None);
        assert_eq!(activity.last_sent(), Some(START));
    }

    #[test]
    fn received_data_is_owed_an_answer_until_anything_is_sent() {
        for send in [Activity::data_sent, Activity::keepalive_sent, Activity::authenticated_sent] {
            let activity = Activity::default();
            activity.data_received(START);
            activity.data_received(START + STEP);
            assert_eq!(activity.owed_since(), Some(START));
            assert_eq!(activity.last_received(), Some(START + STEP));
            send(&activity, START + STEP);
            assert_eq!(activity.owed_since(), None);
        }
        let activity = Activity::default();
        activity.authenticated_received(START);
        assert_eq!(activity.owed_since(), None, "a keepalive is owed nothing");
    }

    #[test]
    fn moments_of_traffic_move_in_grains_and_never_back() {
        let activity = Activity::default();
        activity.keepalive_sent(START);
        activity.keepalive_sent(START + GRAIN / 2);
        assert_eq!(activity.last_sent(), Some(START));
        activity.keepalive_sent(START + GRAIN);
        assert_eq!(activity.last_sent(), Some(START + GRAIN));
        activity.keepalive_sent(START);
        assert_eq!(activity.last_sent(), Some(START + GRAIN));
    }

    #[test]
    fn what_came_after_a_moment_is_never_missed() {
        let activity = Activity::default();
        assert!(!activity.has_received_since(Now::default()));
        activity.authenticated_received(START);
        activity.authenticated_received(START + GRAIN / 2);
        assert!(
            activity.has_received_since(START + GRAIN / 4),
            "it is stored as if it came before"
        );
        assert!(!activity.has_received_since(START + GRAIN));
    }

    #[test]
    fn clearing_spares_what_began_later() {
        let activity = Activity::default();
        activity.data_sent(START);
        activity.clear_unanswered(START + STEP);
        assert_eq!(activity.unanswered_since(), Some(START));
        activity.clear_unanswered(START);
        assert_eq!(activity.unanswered_since(), None);
    }
}
