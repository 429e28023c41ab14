//! Percentiles of times.

use serde::{Deserialize, Serialize};

/// Times that this part of all did not exceed, in µs.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half of them.
    pub p50: f64,
    /// Nine of ten.
    pub p90: f64,
    /// 99 of 100.
    pub p99: f64,
    /// 999 of 1,000.
    pub p99_9: f64,
    /// All of them.
    pub max: f64,
}

impl Percentiles {
    /// Of times in nanoseconds, which it sorts; nothing if there are none.
    ///
    /// A percentile is one of the times (nearest rank), never something between two: no time is told that did
    /// not occur.
    pub fn of(times_ns: &mut [u64]) -> Option<Self> {
        times_ns.sort_unstable();
        let last = times_ns.len().checked_sub(1)?;
        // The least rank that has as many of `of` as asked for at or below it.
        let at = |share: usize, of: usize| {
            let rank = (times_ns.len() * share).div_ceil(of).clamp(1, last + 1);
            times_ns[rank - 1] as f64 / 1e3
        };
        Some(Self {
            p50: at(1, 2),
            p90: at(9, 10),
            p99: at(99, 100),
            p99_9: at(999, 1000),
            max: times_ns[last] as f64 / 1e3,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_least_time_that_enough_do_not_exceed() {
        let mut times: Vec<u64> = (1..=1000).rev().map(|us| us * 1000).collect();
        let found = Percentiles::of(&mut times).unwrap();
        let expected =
            Percentiles { p50: 500.0, p90: 900.0, p99: 990.0, p99_9: 999.0, max: 1000.0 };
        assert_eq!(found, expected);
    }

    #[test]
    fn few_times_are_not_stretched() {
        assert_eq!(Percentiles::of(&mut []), None);
        let one = Percentiles::of(&mut [7000]).unwrap();
        assert_eq!((one.p50, one.p99_9, one.max), (7.0, 7.0, 7.0));
        let three = Percentiles::of(&mut [3000, 1000, 2000]).unwrap();
        assert_eq!((three.p50, three.p90, three.p99), (2.0, 3.0, 3.0));
    }

    #[test]
    fn one_stall_in_a_thousand_shows_in_the_last_percentile_only() {
        let mut times = vec![1000; 998];
        times.extend([50_000_000, 50_000_000]);
        let found = Percentiles::of(&mut times).unwrap();
        assert_eq!((found.p50, found.p99, found.p99_9, found.max), (1.0, 1.0, 50_000.0, 50_000.0));
    }
}
