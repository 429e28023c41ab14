//! Whether we are under load: then cookies are demanded (§5.3).

use std::time::Duration;

use wg_common::protocol::HANDSHAKE_QUEUE_LEN;
use wg_common::time::Now;

/// So many messages that wait are a sign of load: an eighth of the queue, as in the kernel.
pub const WAITING_MAX: usize = HANDSHAKE_QUEUE_LEN / 8;
/// How long one sign counts, as in the kernel: a peer that was told a cookie and one that was not do
/// not alternate.
pub const HOLD_TIME: Duration = Duration::from_secs(1);
/// What the pool worked is summed up over this time at least.
const WINDOW: Duration = Duration::from_millis(100);
/// The pool may work one half of a window; more is a sign of load. Strangers must not cost the
/// workers, who share the processors, more than that.
const BUSY_WINDOW_PART: u32 = 2;

/// Watches the queue and the pool. Ours to decide (§5.3 leaves it open); the kernel watches the queue.
#[derive(Debug, Default)]
pub struct Load {
    last_sign: Option<Now>,
    window_begin: Now,
    worked: Duration,
}

impl Load {
    /// So many messages wait.
    pub fn waiting(&mut self, count: usize, now: Now) {
        if count >= WAITING_MAX {
            self.last_sign = Some(now);
        }
    }

    /// The pool has worked for `time` until `now`: what its threads did, divided by their number.
    pub fn worked(&mut self, time: Duration, now: Now) {
        self.worked += time;
        let window = now.since(self.window_begin);
        if window < WINDOW {
            return;
        }
        if self.worked * BUSY_WINDOW_PART > window {
            self.last_sign = Some(now);
        }
        (self.window_begin, self.worked) = (now, Duration::ZERO);
    }

    /// Whether there was a sign of load lately.
    pub fn is_high(&self, now: Now) -> bool {
        self.last_sign.is_some_and(|at| now.since(at) < HOLD_TIME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Now = Now::from_boot_ns(10_000_000_000);
    const MS: Duration = Duration::from_millis(1);
    const TICK: Duration = Duration::from_nanos(1);

    #[test]
    fn a_queue_that_is_an_eighth_full_is_load_for_a_second() {
        let mut load = Load::default();
        assert!(!load.is_high(START));
        load.waiting(511, START);
        assert!(!load.is_high(START));
        load.waiting(512, START);
        assert!(load.is_high(START));
        // Emptier again, it stays for a second after the last sign.
        load.waiting(0, START + MS);
        load.waiting(4096, START + MS * 400);
        load.waiting(0, START + MS * 401);
        assert!(load.is_high(START + (MS * 1400 - TICK)));
        assert!(!load.is_high(START + MS * 1400));
    }

    /// Works this part of each millisecond, for so many; gives whether there was load at the end.
    fn after(load: &mut Load, part: u32, millis: u32, begin: Now) -> bool {
        for i in 1..=millis {
            load.worked(MS * part / 100, begin + MS * i);
        }
        load.is_high(begin + MS * millis)
    }

    #[test]
    fn a_pool_that_works_more_than_half_of_its_time_is_load() {
        let mut load = Load::default();
        assert!(!after(&mut load, 49, 10_000, START));
        let busy = START + MS * 10_000;
        assert!(!after(&mut load, 80, 50, busy), "not for a moment");
        assert!(after(&mut load, 80, 200, busy + MS * 50));
        let quiet = busy + MS * 250;
        assert!(after(&mut load, 1, 900, quiet));
        assert!(!after(&mut load, 1, 200, quiet + MS * 900));
    }

    #[test]
    fn a_pause_is_no_work() {
        let mut load = Load::default();
        load.worked(MS * 90, START);
        for i in 1..100 {
            // 90 ms at once, each ten seconds.
            load.worked(MS * 90, START + Duration::from_secs(10) * i);
            assert!(!load.is_high(START + Duration::from_secs(10) * i));
        }
    }
}
