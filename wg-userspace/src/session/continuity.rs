//! Whether time has passed as it should, or the host slept, or is another one than it was.
//!
//! A host that slept has keys in its memory that should be dead, and a virtual machine that was
//! cloned, or went back to a snapshot, would use counters that another one has used. Both show in how the
//! clocks stand to each other: boot time runs on during sleep while monotonic time stands still, and
//! whoever sets a clone's clock right makes real time leap against boot time.
//!
//! A thread looks once a turn, before it seals. Of a clone that is made within a turn, both ends finish that
//! turn with the same counters: a worker at most a batch for each queue that it reads and one of staged
//! packets. And a clone whose kernel tells of nothing and whose clock nobody sets is not noticed at all. Who
//! plans a snapshot makes a pause before it.

use std::time::Duration;

use wg_common::time::{Now, Reading};

/// A sleep that is shorter than this is not told from none.
const SLEEP_MIN_NS: i64 = 1_000_000;
/// Real time may be set by this much between two observations. Daemons that set it right slew what is
/// less, and leap seconds are one second.
const LEAP_MIN_NS: i64 = 1_000_000_000;
/// Real time is slewed by less than a thousandth.
const SLEW_DIVISOR: i64 = 1000;

/// Why nothing that was secret before can be trusted to have been used by us alone, and in time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Break {
    /// The host slept.
    Slept {
        /// For how long, at least.
        time: Duration,
        /// Boot time less monotonic time, in nanoseconds: no two sleeps have the same.
        offset_ns: i64,
    },
    /// Real time leapt against boot time: the virtual machine was cloned or restored, or somebody set
    /// the clock.
    Leapt {
        /// By how many nanoseconds, at least; negative if it went back.
        by_ns: i64,
        /// Real time less boot time, in nanoseconds.
        offset_ns: i64,
    },
}

/// Follows the clocks. Each thread that seals has one.
#[derive(Debug, Default)]
pub struct Continuity(Option<Known>);

/// What is known of the clocks.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Boot time less monotonic time.
    asleep: Span,
    /// Real time less boot time.
    wall: Span,
    /// Boot time of the last observation.
    boot_ns: i64,
}

/// Bounds of a number: a clock is read at some moment between the two readings of boot time around it,
/// and the thread may have been kept waiting anywhere between them.
#[derive(Clone, Copy, Debug)]
struct Span {
    least: i64,
    most: i64,
}

impl Span {
    /// What both say, or the newer one's if they have nothing in common.
    fn narrowed(self, older: Span, drift: i64) -> Span {
        let least = self.least.max(older.least.saturating_sub(drift));
        let most = self.most.min(older.most.saturating_add(drift));
        if least <= most { Span { least, most } } else { self }
    }

    /// By how much it certainly differs from an older one.
    fn moved_since(self, older: Span) -> i64 {
        if self.least > older.most {
            self.least.saturating_sub(older.most)
        } else {
            self.most.saturating_sub(older.least).min(0)
        }
    }
}

impl Continuity {
    /// When the clocks were last observed, if ever.
    pub fn observed(&self) -> Option<Now> {
        self.0.map(|known| Now::from_boot_ns(known.boot_ns.max(0).unsigned_abs()))
    }

    /// Takes note of a reading that was made after all before it, and says what has happened between
    /// the last one and this.
    pub fn observe(&mut self, reading: &Reading) -> Option<Break> {
        let [before, after] = [reading.before, reading.after].map(|now| signed(now.boot_ns()));
        let (monotonic, real) = (signed(reading.monotonic_ns), signed(reading.real_ns));
        let mut known = Known {
            asleep: Span { least: before - monotonic, most: after - monotonic },
            wall: Span { least: real - after, most: real - before },
            boot_ns: before,
        };
        let Some(last) = self.0 else {
            self.0 = Some(known);
            return None;
        };
        let asleep = known.asleep.moved_since(last.asleep);
        let drift = before.saturating_sub(last.boot_ns).max(0) / SLEW_DIVISOR;
        let wall = known.wall.moved_since(last.wall);
        let broken = if asleep.abs() > SLEEP_MIN_NS {
            let time = Duration::from_nanos(asleep.unsigned_abs());
            Some(Break::Slept { time, offset_ns: known.asleep.least })
        } else if wall.abs() > LEAP_MIN_NS.saturating_add(drift) {
            Some(Break::Leapt { by_ns: wall, offset_ns: known.wall.least })
        } else {
            // Of the same number, all bounds hold. Real time may have drifted.
            known.asleep = known.asleep.narrowed(last.asleep, 0);
            known.wall = known.wall.narrowed(last.wall, drift);
            None
        };
        self.0 = Some(known);
        broken
    }
}

impl Break {
    /// Whether `self` and `other` tell of the same event, seen by two threads.
    pub fn is_same(&self, other: &Break) -> bool {
        match (self, other) {
            (Self::Slept { offset_ns: a, .. }, Self::Slept { offset_ns: b, .. }) => {
                a.abs_diff(*b) <= SLEEP_MIN_NS.unsigned_abs()
            }
            (Self::Leapt { offset_ns: a, .. }, Self::Leapt { offset_ns: b, .. }) => {
                a.abs_diff(*b) <= LEAP_MIN_NS.unsigned_abs() / 2
            }
            _ => false,
        }
    }
}

/// Clocks reach 2^63 ns after 292 years.
fn signed(ns: u64) -> i64 {
    i64::try_from(ns).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wg_common::time::Now;

    use super::*;

    const S: i64 = 1_000_000_000;
    const MS: i64 = 1_000_000;

    /// A host whose clocks the test moves.
    #[derive(Clone, Copy)]
    struct Host {
        monotonic: i64,
        asleep: i64,
        wall: i64,
    }

    impl Host {
        fn new() -> Self {
            Self { monotonic: 1000 * S, asleep: 7 * S, wall: 1_700_000_000 * S }
        }

        fn boot(&self) -> Now {
            Now::from_boot_ns((self.monotonic + self.asleep) as u64)
        }

        fn pass(&mut self, ns: i64) {
            self.monotonic += ns;
        }

        fn sleep(&mut self, ns: i64) {
            self.asleep += ns;
        }

        /// Reads the clocks, and is kept waiting between them.
        fn reading(&mut self, waits: [i64; 3]) -> Reading {
            let before = self.boot();
            self.pass(waits[0]);
            let monotonic_ns = self.monotonic as u64;
            self.pass(waits[1]);
            let real_ns = (self.wall + self.monotonic + self.asleep) as u64;
            self.pass(waits[2]);
            Reading { before, monotonic_ns, real_ns, after: self.boot() }
        }
    }

    const QUICK: [i64; 3] = [30, 30, 30];

    #[test]
    fn the_first_observation_compares_with_nothing() {
        assert_eq!(Continuity::default().observe(&Host::new().reading(QUICK)), None);
    }

    #[test]
    fn a_sleep_is_noticed_once() {
        for slept in [2 * MS, S, 3600 * S] {
            let (mut host, mut continuity) = (Host::new(), Continuity::default());
            continuity.observe(&host.reading(QUICK));
            host.sleep(slept);
            let observed = continuity.observe(&host.reading(QUICK));
            let Some(Break::Slept { time, .. }) = observed else { panic!("{slept}: {observed:?}") };
            assert!(time.as_nanos().abs_diff(slept as u128) < 1000);
            host.pass(100 * MS);
            assert_eq!(continuity.observe(&host.reading(QUICK)), None);
        }
    }

    #[test]
    fn a_leap_of_real_time_is_noticed_in_both_directions() {
        for by in [1001 * MS, -1001 * MS, 86_400 * S, -86_400 * S] {
            let (mut host, mut continuity) = (Host::new(), Continuity::default());
            continuity.observe(&host.reading(QUICK));
            host.pass(100 * MS);
            host.wall += by;
            let observed = continuity.observe(&host.reading(QUICK));
            let Some(Break::Leapt { by_ns, .. }) = observed else { panic!("{by}: {observed:?}") };
            assert!(by_ns.signum() == by.signum() && by_ns.abs_diff(by) < 1000);
            assert_eq!(continuity.observe(&host.reading(QUICK)), None);
        }
    }

    #[test]
    fn small_corrections_of_real_time_are_no_leap() {
        let (mut host, mut continuity) = (Host::new(), Continuity::default());
        for by in [900, -900, 900, 900, 900, -500] {
            continuity.observe(&host.reading(QUICK));
            host.pass(100 * MS);
            host.wall += by * MS;
            assert_eq!(continuity.observe(&host.reading(QUICK)), None, "{by} ms");
        }
    }

    #[test]
    fn a_sleep_that_falls_into_an_observation_is_noticed_by_the_next() {
        for at in 0..3 {
            let (mut host, mut continuity) = (Host::new(), Continuity::default());
            continuity.observe(&host.reading(QUICK));
            let mut parts = [host; 4];
            for (i, part) in parts.iter_mut().enumerate() {
                part.pass(30 * i as i64);
                part.sleep(if i > at { 60 * S } else { 0 });
            }
            let torn = Reading {
                before: parts[0].boot(),
                monotonic_ns: parts[1].monotonic as u64,
                real_ns: parts[2].reading([0; 3]).real_ns,
                after: parts[3].boot(),
            };
            let first = continuity.observe(&torn);
            let second = continuity.observe(&parts[3].reading(QUICK));
            assert!(matches!((first, second), (None, Some(Break::Slept { .. }))), "{at}");
        }
    }

    #[test]
    fn two_threads_that_see_one_sleep_know_it_for_the_same() {
        let mut host = Host::new();
        let mut threads = [Continuity::default(), Continuity::default()];
        threads
            .iter_mut()
            .for_each(|thread| assert!(thread.observe(&host.reading(QUICK)).is_none()));
        host.sleep(5 * S);
        let [first, second] = threads.each_mut().map(|thread| {
            host.pass(80 * MS);
            thread.observe(&host.reading([10, 100_000, 50])).unwrap()
        });
        assert!(first.is_same(&second));
        host.sleep(5 * S);
        let third = threads[0].observe(&host.reading(QUICK)).unwrap();
        assert!(!third.is_same(&first));
    }

    /// Waits between readings: mostly none, now and then a long one.
    fn waits() -> impl Strategy<Value = [i64; 3]> {
        let wait = || prop_oneof![4 => 0..1000_i64, 1 => 0..20 * S];
        [wait(), wait(), wait()]
    }

    proptest! {
        #[test]
        fn neither_waiting_nor_slewing_is_a_break(
            steps in prop::collection::vec((waits(), 0..600 * S, -500..500_i64), 1..60),
        ) {
            let (mut host, mut continuity) = (Host::new(), Continuity::default());
            for (waits, pause, ppm) in steps {
                prop_assert_eq!(continuity.observe(&host.reading(waits)), None);
                host.pass(pause);
                host.wall += pause / 1_000_000 * ppm;
            }
        }

        #[test]
        fn a_sleep_is_always_noticed(
            before in prop::collection::vec((waits(), 0..600 * S), 1..20),
            slept in 2 * MS..1_000_000 * S,
            waits in waits(),
        ) {
            let (mut host, mut continuity) = (Host::new(), Continuity::default());
            for (waits, pause) in before {
                prop_assert_eq!(continuity.observe(&host.reading(waits)), None);
                host.pass(pause);
            }
            // Some reading before it was a quick one.
            prop_assert_eq!(continuity.observe(&host.reading(QUICK)), None);
            host.sleep(slept);
            let noticed = [waits, QUICK].map(|waits| continuity.observe(&host.reading(waits)));
            prop_assert!(noticed.iter().any(Option::is_some), "{:?}", noticed);
        }
    }
}
