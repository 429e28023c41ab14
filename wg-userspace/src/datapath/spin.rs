//! Whether a thread that has found nothing looks again at once, or sleeps.
//!
//! What comes while a thread looks is found some microseconds earlier than it would be by one that has to
//! be woken. Looking is worth it only for as long as the next packet is likely to take, and only where
//! nobody else needs the core: not the kernel's own threads, and not who is to send that packet.
//!
//! So a thread looks for no longer than its *window*. The window grows when a packet came a little too late
//! for it, and halves when it was looked for in vain: an idle thread soon sleeps at once. A thread that
//! lost its core while it looked shares it, and does not look for a while.

use std::time::Duration;

use wg_common::time::Now;

/// Longest window: beyond it a wake-up costs little beside the wait.
const WINDOW_MAX: Duration = Duration::from_micros(50);
/// Shortest window but none.
const WINDOW_MIN: Duration = Duration::from_micros(5);
/// Between two looks this long has passed only if the core was doing something else: a look takes a
/// microsecond or two.
const LOST: Duration = Duration::from_micros(100);
/// How long a thread does not look after that.
const REST: Duration = Duration::from_secs(1);

/// What one thread has learnt of how long it waits.
#[derive(Debug)]
pub(super) struct Spin {
    /// Whether there are cores beside those of the data path.
    has_own_core: bool,
    window: Duration,
    /// When it began to wait, and when it last looked.
    waits: Option<(Now, Now)>,
    rests_until: Now,
}

impl Spin {
    /// For a thread that has a core of its own, or not: one that has not never looks again.
    pub(super) fn new(has_own_core: bool) -> Self {
        let (window, rests_until) = (Duration::ZERO, Now::default());
        Self { has_own_core, window, waits: None, rests_until }
    }

    /// Whether to look again at once: there was nothing at `now`. If not, sleep.
    pub(super) fn looks_again(&mut self, now: Now) -> bool {
        let (begun, looked) = self.waits.unwrap_or((now, now));
        if now.since(looked) >= LOST {
            (self.window, self.rests_until) = (Duration::ZERO, now + REST);
        }
        self.waits = Some((begun, now));
        self.has_own_core && now.since(begun) < self.window
    }

    /// There is something at `now`, or there was nothing for long.
    pub(super) fn found(&mut self, now: Now) {
        let Some((begun, _)) = self.waits.take() else { return };
        let waited = now.since(begun);
        if waited > WINDOW_MAX {
            let half = self.window / 2;
            self.window = if half < WINDOW_MIN { Duration::ZERO } else { half };
        } else if waited > self.window && now >= self.rests_until {
            self.window = (self.window * 2).clamp(WINDOW_MIN, WINDOW_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const US: Duration = Duration::from_micros(1);
    const START: Now = Now::from_boot_ns(1_000_000_000);

    /// A thread that waits until `found`, looking every microsecond. Gives how long it looked.
    fn wait(spin: &mut Spin, begun: Now, found: Now) -> Duration {
        let mut now = begun;
        while now < found && spin.looks_again(now) {
            now = now + US;
        }
        spin.found(found);
        now.since(begun)
    }

    fn waits(spin: &mut Spin, at: &mut Now, gaps: &[u64]) -> Vec<u128> {
        let each = |gap: &u64| {
            let begun = *at;
            *at = begun + US * *gap as u32;
            wait(spin, begun, *at).as_micros()
        };
        gaps.iter().map(each).collect()
    }

    #[test]
    fn the_window_grows_until_it_pays_and_stays() {
        let (mut spin, mut at) = (Spin::new(true), START);
        assert_eq!(waits(&mut spin, &mut at, &[30; 6]), [0, 5, 10, 20, 30, 30]);
        assert_eq!(waits(&mut spin, &mut at, &[1, 40, 3]), [1, 40, 3], "it is 40");
        assert_eq!(waits(&mut spin, &mut at, &[50, 50, 50]), [40, 50, 50]);
    }

    #[test]
    fn an_idle_thread_soon_sleeps_at_once() {
        let (mut spin, mut at) = (Spin::new(true), START);
        waits(&mut spin, &mut at, &[45; 8]);
        let in_vain = [100_000, 1000, 51, 100_000, 1000, 1000];
        assert_eq!(waits(&mut spin, &mut at, &in_vain), [50, 25, 13, 7, 0, 0]);
        assert_eq!(waits(&mut spin, &mut at, &[100_000; 20]), [0; 20]);
    }

    #[test]
    fn who_shares_its_core_sleeps_at_once() {
        let (mut spin, mut at) = (Spin::new(false), START);
        assert_eq!(waits(&mut spin, &mut at, &[1, 5, 10, 30, 30, 30, 3]), [0; 7]);
    }

    #[test]
    fn who_loses_its_core_while_it_looks_rests() {
        let (mut spin, mut at) = (Spin::new(true), START);
        waits(&mut spin, &mut at, &[30; 6]);
        assert!(spin.looks_again(at));
        let late = at + LOST;
        assert!(!spin.looks_again(late));
        spin.found(late + US);
        at = late + US;
        assert_eq!(waits(&mut spin, &mut at, &[30; 5]), [0; 5]);
        at = late + REST;
        assert_eq!(waits(&mut spin, &mut at, &[30; 5]), [0, 5, 10, 20, 30]);
    }

    #[test]
    fn sleep_is_no_loss_of_the_core() {
        let (mut spin, mut at) = (Spin::new(true), START);
        waits(&mut spin, &mut at, &[30; 6]);
        assert!(spin.looks_again(at));
        assert!(!spin.looks_again(at + 45 * US), "it sleeps now");
        spin.found(at + Duration::from_secs(1));
        at = at + Duration::from_secs(1);
        assert_eq!(waits(&mut spin, &mut at, &[10]), [10]);
    }

    #[test]
    fn clocks_that_stand_still_or_go_back_harm_nothing() {
        let mut spin = Spin::new(true);
        spin.found(START);
        for now in [START, START, Now::from_boot_ns(5), START] {
            assert!(!spin.looks_again(now));
        }
        spin.found(Now::from_boot_ns(0));
    }

    proptest! {
        /// Each window that was looked through in vain had grown before by half of it at least, and grows
        /// only where packets come close to each other.
        #[test]
        fn what_is_lost_is_bounded_by_what_came(gaps in prop::collection::vec(0_u64..300, 0..200)) {
            let (mut spin, mut at) = (Spin::new(true), START);
            let (mut in_vain, mut close) = (Duration::ZERO, 0);
            for gap in gaps {
                let before = spin.window;
                let looked = waits(&mut spin, &mut at, &[gap])[0];
                prop_assert!(looked <= gap.into() && looked <= WINDOW_MAX.as_micros());
                prop_assert!(spin.window <= WINDOW_MAX);
                if u128::from(gap) > looked {
                    in_vain += US * looked as u32;
                }
                close += u32::from(spin.window > before);
            }
            prop_assert!(in_vain <= 2 * WINDOW_MAX * close);
        }
    }
}
