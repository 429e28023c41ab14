//! The two clocks: boot time for everything that ages, wall-clock time for what leaves this host.

use rustix::time::{ClockId, clock_gettime};
use wg_common::time::Now;

/// The present moment in boot time (`CLOCK_BOOTTIME`: it counts while the host sleeps).
///
/// About 30 ns; a worker reads it once per batch.
pub fn boot_now() -> Now {
    let (secs, nanos) = read(ClockId::Boottime);
    Now::from_boot_ns(secs * 1_000_000_000 + u64::from(nanos))
}

/// Wall-clock time since 1970: seconds, and nanoseconds below one second. It may jump.
///
/// A clock set before 1970 reads as 1970.
pub fn wall() -> (u64, u32) {
    read(ClockId::Realtime)
}

fn read(clock: ClockId) -> (u64, u32) {
    let time = clock_gettime(clock);
    match u64::try_from(time.tv_sec) {
        // The kernel keeps nanoseconds below 10^9.
        Ok(secs) => (secs, time.tv_nsec as u32),
        Err(_) => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_time_does_not_go_back() {
        let first = boot_now();
        assert!(first.boot_ns() > 0);
        assert!(boot_now() >= first);
    }

    #[test]
    fn wall_clock_is_split_into_seconds_and_nanoseconds() {
        let (secs, nanos) = wall();
        assert!(secs > 1_600_000_000);
        assert!(nanos < 1_000_000_000);
    }
}
