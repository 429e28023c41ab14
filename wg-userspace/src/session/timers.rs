//! When a handshake is begun, repeated and given up, and when a keepalive is due (§6.1–6.5).
//!
//! Only moments and decisions: [`Timers`] says what is [`Due`], `Session` does it. The timers that
//! traffic arms are moments in [`Activity`], where workers set and clear them.

use std::time::Duration;

use rand_core::Rng;
use wg_common::protocol::{
    KEEPALIVE_TIMEOUT, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT, REKEY_TIMEOUT_JITTER_MAX,
};
use wg_common::time::Now;

use super::Activity;

/// Time after the first unanswered packet at which a new handshake is made (§6.5), without jitter.
const NEW_HANDSHAKE_AFTER: Duration = KEEPALIVE_TIMEOUT.saturating_add(REKEY_TIMEOUT);

/// Something to be done now. Its timer no longer runs, but where doing it starts it again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Due {
    /// Repeat the initiation that was not answered.
    Retransmit,
    /// Give the handshake up.
    GiveUp,
    /// Begin the handshake that had to wait for Rekey-Timeout.
    Deferred,
    /// Begin a handshake: packets were not answered.
    NewHandshake,
    /// Send a keepalive: packets came and nothing was sent.
    Keepalive,
    /// Send a persistent keepalive.
    PersistentKeepalive,
}

/// One peer's timers.
#[derive(Debug, Default)]
pub struct Timers {
    attempt: Option<Attempt>,
    /// A handshake is to begin as soon as Rekey-Timeout allows.
    deferred: bool,
    /// When the last initiation or response was sent.
    handshake_sent: Option<Now>,
    persistent: Option<Persistent>,
    /// Initiations that were not answered in time and handshakes that were given up, since one was
    /// completed.
    unanswered_count: u32,
    /// Added to the next timeouts, so that peers who lost each other at once do not return at once.
    jitter: Duration,
}

/// A handshake that we have begun.
#[derive(Debug)]
struct Attempt {
    /// When it was begun, or last asked for.
    since: Now,
    retransmit_at: Now,
}

#[derive(Debug)]
struct Persistent {
    interval: Duration,
    /// When the last one was due; before that, when the first one is.
    at: Now,
    is_first: bool,
}

impl Timers {
    /// Whether a handshake of ours waits for its response.
    pub fn is_trying(&self) -> bool {
        self.attempt.is_some()
    }

    /// Whether Rekey-Timeout has passed since the last handshake message that we sent.
    ///
    /// Responses count too, as in the kernel: whoever has just answered waits for the first packet.
    pub fn may_initiate(&self, now: Now) -> bool {
        self.handshake_sent.is_none_or(|at| now.since(at) >= REKEY_TIMEOUT)
    }

    /// Has a handshake begin as soon as it may.
    pub fn defer(&mut self) {
        self.deferred = true;
    }

    /// Gives a handshake the whole Rekey-Attempt-Time from `now` on: it is begun, or somebody asked
    /// for it again (§6.4).
    pub fn begin_or_renew(&mut self, now: Now) {
        match &mut self.attempt {
            Some(attempt) => attempt.since = now,
            None => self.attempt = Some(Attempt { since: now, retransmit_at: now }),
        }
        self.deferred = false;
    }

    /// An initiation was sent, or should have been.
    pub fn initiation_sent(&mut self, rng: &mut (impl Rng + ?Sized), now: Now) {
        self.handshake_message_sent(rng, now);
        if let Some(attempt) = &mut self.attempt {
            attempt.retransmit_at = now + REKEY_TIMEOUT + self.jitter;
        }
    }

    /// Since when packets must have waited for an answer, so that who has no other timer begins a
    /// handshake when we would have sent the next initiation. None if we would not.
    pub fn as_unanswered_since(&self) -> Option<Now> {
        let at =
            self.attempt.as_ref().map(|attempt| attempt.retransmit_at).or(self.deferred_at())?;
        let since = Duration::from_nanos(at.boot_ns()).saturating_sub(NEW_HANDSHAKE_AFTER);
        // The beginning of time stands for never.
        Some(Now::default() + since.max(Duration::from_nanos(1)))
    }

    /// A response was sent.
    pub fn response_sent(&mut self, rng: &mut (impl Rng + ?Sized), now: Now) {
        self.handshake_message_sent(rng, now);
    }

    fn handshake_message_sent(&mut self, rng: &mut (impl Rng + ?Sized), now: Now) {
        const JITTER_MAX_NS: u64 = REKEY_TIMEOUT_JITTER_MAX.as_nanos() as u64;
        self.jitter = Duration::from_nanos(rng.next_u64() % (JITTER_MAX_NS + 1));
        self.handshake_sent = Some(now);
    }

    /// A handshake was completed, in whichever role: no other is needed.
    pub fn completed(&mut self) {
        self.attempt = None;
        self.deferred = false;
        self.unanswered_count = 0;
    }

    /// How many initiations were not answered in time and handshakes given up, since one was completed.
    pub fn unanswered_count(&self) -> u32 {
        self.unanswered_count
    }

    /// All keypairs and handshakes were cleared; the next handshake may begin at once.
    pub fn cleared(&mut self) {
        self.completed();
        self.handshake_sent = None;
    }

    /// Sends a keepalive whenever there was no traffic for `interval`; the first one at `first`, unless
    /// there was an interval before.
    pub fn set_persistent_keepalive(&mut self, interval: Option<Duration>, first: Now) {
        let before = self.persistent.take();
        self.persistent = interval.map(|interval| match before {
            Some(persistent) => Persistent { interval, ..persistent },
            None => Persistent { interval, at: first, is_first: true },
        });
    }

    /// Has the next persistent keepalive sent at `first`, if there are any.
    pub fn restart_persistent_keepalive(&mut self, first: Now) {
        if let Some(persistent) = &mut self.persistent {
            (persistent.at, persistent.is_first) = (first, true);
        }
    }

    /// The interval of persistent keepalives, if there are any.
    pub fn persistent_keepalive(&self) -> Option<Duration> {
        self.persistent.as_ref().map(|persistent| persistent.interval)
    }

    /// When [`take_due`](Self::take_due) gives something, if nothing is sent or received until then.
    pub fn poll(&self, activity: &Activity) -> Option<Now> {
        [
            self.attempt.as_ref().map(|attempt| attempt.retransmit_at),
            self.deferred_at(),
            self.new_handshake_at(activity),
            activity.owed_since().map(|since| since + KEEPALIVE_TIMEOUT),
            self.persistent_at(activity),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Takes one thing that is due at `now`. To be called until there is none.
    pub fn take_due(&mut self, activity: &Activity, now: Now) -> Option<Due> {
        let is_due = |at: Option<Now>| at.is_some_and(|at| at <= now);

        if let Some(attempt) = &mut self.attempt
            && attempt.retransmit_at <= now
        {
            self.unanswered_count = self.unanswered_count.saturating_add(1);
            if now.since(attempt.since) >= REKEY_ATTEMPT_TIME {
                self.attempt = None;
                return Some(Due::GiveUp);
            }
            attempt.retransmit_at = now + REKEY_TIMEOUT;
            return Some(Due::Retransmit);
        }
        if is_due(self.deferred_at()) {
            self.deferred = false;
            return Some(Due::Deferred);
        }
        if let Some(since) = activity.unanswered_since()
            && is_due(self.new_handshake_at(activity))
        {
            activity.clear_unanswered(since);
            return Some(Due::NewHandshake);
        }
        // Not armed again for packets that came meanwhile: this keepalive answers them too.
        if let Some(since) = activity.owed_since()
            && is_due(Some(since + KEEPALIVE_TIMEOUT))
        {
            activity.clear_owed(since);
            return Some(Due::Keepalive);
        }
        if is_due(self.persistent_at(activity))
            && let Some(persistent) = &mut self.persistent
        {
            (persistent.at, persistent.is_first) = (now, false);
            return Some(Due::PersistentKeepalive);
        }
        None
    }

    fn deferred_at(&self) -> Option<Now> {
        self.deferred.then(|| self.handshake_sent.map_or(Now::default(), |at| at + REKEY_TIMEOUT))
    }

    fn new_handshake_at(&self, activity: &Activity) -> Option<Now> {
        activity.unanswered_since().map(|since| since + NEW_HANDSHAKE_AFTER + self.jitter)
    }

    fn persistent_at(&self, activity: &Activity) -> Option<Now> {
        let persistent = self.persistent.as_ref()?;
        if persistent.is_first {
            return Some(persistent.at);
        }
        let traffic = activity.last_sent().max(activity.last_received());
        Some(traffic.map_or(persistent.at, |at| at.max(persistent.at)) + persistent.interval)
    }
}
