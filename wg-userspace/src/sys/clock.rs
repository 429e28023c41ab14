//! The clocks: boot time for everything that ages, wall-clock time for what leaves this host, and what a
//! thread has had of the processor.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use wg_common::time::{Now, Reading};

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

/// For how long the calling thread has had a processor.
pub fn thread_time() -> Duration {
    let (secs, nanos) = read(ClockId::ThreadCPUTime);
    Duration::new(secs, nanos)
}

/// All clocks, so that it can be seen how they stand to each other.
///
/// About 120 ns; a worker reads it once per batch, and takes its time from it.
pub fn reading() -> Reading {
    let ns = |clock| {
        let (secs, nanos) = read(clock);
        secs.saturating_mul(1_000_000_000).saturating_add(nanos.into())
    };
    #[cfg(debug_assertions)]
    let slept_ns = slept_ns_in_test();
    #[cfg(not(debug_assertions))]
    let slept_ns = 0;
    Reading {
        before: boot_now(),
        monotonic_ns: ns(ClockId::Monotonic).saturating_sub(slept_ns),
        real_ns: ns(ClockId::Realtime),
        after: boot_now(),
    }
}

/// A hook for tests: once there is something in the file that `TIDEGATE_TEST_SLEPT` names, the host has
/// slept for ten seconds. It is opened at the first reading: later, this process may open nothing.
#[cfg(debug_assertions)]
fn slept_ns_in_test() -> u64 {
    use std::{fs::File, sync::OnceLock};
    static FILE: OnceLock<Option<File>> = OnceLock::new();
    let file =
        FILE.get_or_init(|| std::env::var_os("TIDEGATE_TEST_SLEPT").map(File::open)?.ok()).as_ref();
    let len = file.and_then(|file| file.metadata().ok()).map_or(0, |metadata| metadata.len());
    if len > 0 { 10_000_000_000 } else { 0 }
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
    fn boot_time_stands_around_the_other_clocks() {
        let reading = reading();
        assert!(reading.before <= reading.after);
        assert!(reading.monotonic_ns <= reading.after.boot_ns());
        assert!(reading.real_ns / 1_000_000_000 > 1_600_000_000);
    }

    #[test]
    fn a_thread_that_waits_has_no_time_of_the_processor() {
        let (thread, boot) = (thread_time(), boot_now());
        std::thread::sleep(Duration::from_millis(50));
        assert!(boot_now().since(boot) >= Duration::from_millis(50));
        assert!(thread_time().saturating_sub(thread) < Duration::from_millis(25));
    }

    #[test]
    fn wall_clock_is_split_into_seconds_and_nanoseconds() {
        let (secs, nanos) = wall();
        assert!(secs > 1_600_000_000);
        assert!(nanos < 1_000_000_000);
    }
}
