//! Moments in boot time.

use core::ops::{Add, Sub};
use core::time::Duration;

/// A moment in boot time: nanoseconds since the host started, suspend included (`CLOCK_BOOTTIME`).
///
/// Keys age while a host sleeps, so every timer of the protocol uses this clock. Pure code takes a
/// `Now` as its last argument; only `sys` reads the clock.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Now(u64);

impl Now {
    /// The moment `ns` nanoseconds after boot.
    pub const fn from_boot_ns(ns: u64) -> Self {
        Self(ns)
    }

    /// Nanoseconds since boot.
    pub const fn boot_ns(self) -> u64 {
        self.0
    }

    /// Time since `earlier`; zero if `earlier` is later.
    pub const fn since(self, earlier: Now) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// All clocks at about one moment: in truth one after the other, in the order of the fields, and the
/// thread may have been kept waiting anywhere between them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reading {
    /// Boot time before the others were read.
    pub before: Now,
    /// Nanoseconds of monotonic time: as boot time, but it stands still while the host sleeps.
    pub monotonic_ns: u64,
    /// Nanoseconds of real time since 1970.
    pub real_ns: u64,
    /// Boot time after the others were read.
    pub after: Now,
}

impl Add<Duration> for Now {
    type Output = Now;

    fn add(self, by: Duration) -> Now {
        Now(self.0.saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Now> for Now {
    type Output = Duration;

    /// Saturates at zero, as [`Now::since`].
    fn sub(self, earlier: Now) -> Duration {
        self.since(earlier)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn differences_undo_sums(at in 0u64..1 << 62, by in 0u64..1 << 62) {
            let (at, by) = (Now::from_boot_ns(at), Duration::from_nanos(by));
            prop_assert_eq!((at + by) - at, by);
            prop_assert_eq!(at - (at + by), Duration::ZERO);
        }

        #[test]
        fn sums_saturate(at in any::<u64>()) {
            let end = Now::from_boot_ns(u64::MAX);
            prop_assert_eq!(Now::from_boot_ns(at) + Duration::MAX, end);
        }
    }
}
