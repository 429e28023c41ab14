//! How often something may happen: token buckets, and what counts as one source.
//!
//! A bucket is one moment: when it will be full again. A full bucket is as good as none.

use std::net::IpAddr;
use std::time::Duration;

use wg_common::time::Now;

/// How fast buckets fill, and how much they hold.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Tokens that a bucket gets in a second; at least 1.
    pub per_second: u32,
    /// Tokens in a full bucket; at least 1.
    pub burst: u32,
}

impl Rate {
    /// So many tokens a second, and so many in a full bucket.
    ///
    /// # Panics
    /// If one of them is 0.
    pub const fn new(per_second: u32, burst: u32) -> Self {
        assert!(per_second > 0 && burst > 0);
        Self { per_second, burst }
    }

    /// Time for one token.
    fn interval(self) -> Duration {
        Duration::from_nanos(1_000_000_000 / u64::from(self.per_second))
    }
}

/// One token bucket; at first it is full.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Bucket {
    full_at: Now,
}

impl Bucket {
    /// Whether there is a token.
    pub fn has_token(self, rate: Rate, now: Now) -> bool {
        self.settled(rate, now) + rate.interval() <= now + rate.interval() * rate.burst
    }

    /// Takes a token, if there is one.
    pub fn take(&mut self, rate: Rate, now: Now) -> bool {
        let may = self.has_token(rate, now);
        self.full_at = self.settled(rate, now);
        if may {
            self.full_at = self.full_at + rate.interval();
        }
        may
    }

    /// When it is full. It never lacks more than it holds, also if the clock went back.
    fn settled(self, rate: Rate, now: Now) -> Now {
        self.full_at.clamp(now, now + rate.interval() * rate.burst)
    }
}

/// What counts as one source of datagrams: an IPv4 address, or an IPv6 network of 64 bits, which one
/// host has.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Source(u128);

impl Source {
    /// The source that an address belongs to. IPv4 lies where IPv6 has its IPv4-mapped addresses.
    pub fn of(addr: IpAddr) -> Self {
        Self(match addr.to_canonical() {
            IpAddr::V4(addr) => addr.to_ipv6_mapped().to_bits(),
            IpAddr::V6(addr) => addr.to_bits() >> 64 << 64,
        })
    }

    /// Bytes that are another source's never.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: Now = Now::from_boot_ns(1_000_000_000_000);
    const SECOND: Duration = Duration::from_secs(1);

    proptest! {
        #[test]
        fn a_bucket_is_one_of_counted_tokens(
            per_second in 1_u32..2000, burst in 1_u32..100,
            steps in prop::collection::vec(0_u64..3_000_000_000, 1..200),
        ) {
            let rate = Rate::new(per_second, burst);
            let interval = 1_000_000_000 / u64::from(per_second);
            let mut bucket = Bucket::default();
            // Tokens in parts of a nanosecond's worth.
            let (mut now, mut tokens) = (START, u64::from(burst) * interval);
            for step in steps {
                now = now + Duration::from_nanos(step);
                tokens = (tokens + step).min(u64::from(burst) * interval);
                let expected = tokens >= interval;
                prop_assert_eq!(bucket.has_token(rate, now), expected);
                prop_assert_eq!(bucket.take(rate, now), expected);
                if expected {
                    tokens -= interval;
                }
            }
        }
    }

    #[test]
    fn a_clock_that_goes_back_locks_nobody_out_for_longer_than_a_full_bucket_takes() {
        let (rate, mut bucket) = (Rate::new(20, 5), Bucket::default());
        while bucket.take(rate, START + SECOND * 3600) {}
        assert!(!bucket.take(rate, START));
        assert!(bucket.take(rate, START + Duration::from_millis(50)));
    }

    #[test]
    fn a_clock_that_stands_still_earns_nothing() {
        let (rate, mut bucket) = (Rate::new(1000, 50), Bucket::default());
        let taken = (0..1000).filter(|_| bucket.take(rate, START)).count();
        assert_eq!(taken, 50);
    }

    #[test]
    fn sources_are_ipv4_addresses_and_ipv6_networks() {
        let of = |text: &str| Source::of(text.parse().unwrap());
        assert_eq!(of("192.0.2.1"), of("::ffff:192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:0:0:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
    }
}
