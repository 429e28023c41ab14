//! What the service manager is told: sd_notify(3). Without one, nothing is told and nothing fails.

use std::time::Duration;

use sd_notify::NotifyState;
use wg_common::time::Now;

/// Says that the service is ready, and that process `main` is what it consists of; this process if
/// not given.
pub fn ready(main: Option<u32>) {
    match main {
        Some(pid) => tell(&[NotifyState::MainPid(pid), NotifyState::Ready]),
        None => tell(&[NotifyState::Ready]),
    }
}

/// Says that the service ends.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager is not told");
    }
}

/// How soon is looked again whether the service is alive, where it was not.
const TRY_EVERY: Duration = Duration::from_millis(100);

/// Says regularly that the service is alive, if the service manager restarts it otherwise.
#[derive(Debug)]
pub struct Heartbeat {
    every: Duration,
    due: Now,
}

impl Heartbeat {
    /// As the service manager wants it; `None` if it does not.
    pub fn wanted() -> Option<Self> {
        // Half of it, as sd_watchdog_enabled(3) recommends.
        sd_notify::watchdog_enabled().map(|limit| Self { every: limit / 2, due: Now::default() })
    }

    /// How long there is nothing to do at `now` for [`Heartbeat::beat`].
    pub fn wait(&self, now: Now) -> Duration {
        self.due.since(now)
    }

    /// Says so at `now` if it is time, and only if it is true.
    pub fn beat(&mut self, is_alive: bool, now: Now) {
        if self.says_so(is_alive, now) {
            tell(&[NotifyState::Watchdog]);
        }
    }

    fn says_so(&mut self, is_alive: bool, now: Now) -> bool {
        if now < self.due {
            return false;
        }
        self.due = now + if is_alive { self.every } else { TRY_EVERY.min(self.every) };
        is_alive
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_beats_in_time_and_only_while_it_is_true() {
        const SECOND: Duration = Duration::from_secs(1);
        let start = Now::from_boot_ns(9_000_000_000);
        let mut heartbeat = Heartbeat { every: SECOND * 5, due: Now::default() };
        assert!(!heartbeat.says_so(false, start));
        assert_eq!(heartbeat.wait(start), TRY_EVERY);
        assert!(heartbeat.says_so(true, start + TRY_EVERY), "as soon as it is true");
        assert_eq!(heartbeat.wait(start + TRY_EVERY), SECOND * 5);
        let start = start + TRY_EVERY;
        assert!(!heartbeat.says_so(true, start + SECOND * 4));
        assert!(!heartbeat.says_so(false, start + SECOND * 60));
        assert!(heartbeat.says_so(true, start + SECOND * 61));
        assert!(!heartbeat.says_so(true, start + SECOND * 62));
    }
}
