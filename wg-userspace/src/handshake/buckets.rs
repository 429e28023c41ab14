//! How often something may happen: token buckets, one for each source address or one for all.
//!
//! A bucket is one moment: when it will be full again. A full bucket is as good as none, so the table
//! of sources has a fixed size, and a source that is found nowhere has a full one.

use std::net::IpAddr;
use std::time::Duration;

use rand_core::CryptoRng;
use wg_common::protocol::{KEY_LEN, SOURCE_MESSAGES_BURST, SOURCE_MESSAGES_PER_SECOND};
use wg_common::time::Now;
use zeroize::Zeroizing;

use crate::noise::mac;

/// How fast buckets fill, and how much they hold.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Time for one token.
    interval: Duration,
    burst: u32,
}

impl Rate {
    /// So many tokens a second, and so many in a full bucket.
    pub const fn new(per_second: u32, burst: u32) -> Self {
        Self { interval: Duration::from_nanos(1_000_000_000 / per_second as u64), burst }
    }

    /// The rate of one source's handshake messages, as in the kernel.
    pub const SOURCE: Self = Self::new(SOURCE_MESSAGES_PER_SECOND, SOURCE_MESSAGES_BURST);
}

/// One token bucket; at first it is full.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    full_at: Now,
}

impl Bucket {
    /// Takes a token, if there is one.
    pub fn take(&mut self, rate: Rate, now: Now) -> bool {
        // It never lacks more than it holds, also if the clock went back.
        let empty = now + rate.interval * rate.burst;
        self.full_at = self.full_at.clamp(now, empty);
        let may = self.full_at + rate.interval <= empty;
        if may {
            self.full_at = self.full_at + rate.interval;
        }
        may
    }
}

/// Buckets of one set: whose bucket it is decides the set, and it may be any of these.
const WAYS: usize = 8;
/// Number of sets; a power of two. With 16 bytes a bucket, the table has 128 KiB.
const SETS: usize = 1024;

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// Whose bucket it is, by a keyed hash: nobody can choose addresses that meet.
    tag: u64,
    bucket: Bucket,
}

/// A token bucket for each source: an IPv4 address, or an IPv6 network of 64 bits, which one host has.
///
/// Takes no memory for a source. A new one takes the bucket of its set that is the fullest, which says
/// the least: most of them are full and say nothing.
pub struct SourceBuckets {
    key: Zeroizing<[u8; KEY_LEN]>,
    sets: Box<[[Entry; WAYS]]>,
}

impl SourceBuckets {
    /// Full buckets for everyone.
    pub fn new(rng: &mut impl CryptoRng) -> Self {
        let mut key = Zeroizing::new([0; KEY_LEN]);
        rng.fill_bytes(key.as_mut_slice());
        Self { key, sets: vec![[Entry::default(); WAYS]; SETS].into_boxed_slice() }
    }

    /// Takes a token from the bucket of `source`, if it has one.
    pub fn take(&mut self, source: IpAddr, now: Now) -> bool {
        let (set, tag) = self.place(source);
        let set = &mut self.sets[set];
        let entry = match set.iter().position(|entry| entry.tag == tag) {
            Some(known) => &mut set[known],
            None => {
                let fullest = set.iter_mut().min_by_key(|entry| entry.bucket.full_at);
                let entry = fullest.expect("a set has entries");
                *entry = Entry { tag, bucket: Bucket::default() };
                entry
            }
        };
        entry.bucket.take(Rate::SOURCE, now)
    }

    /// The set and the tag of a source.
    fn place(&self, source: IpAddr) -> (usize, u64) {
        let hash = match source.to_canonical() {
            IpAddr::V4(v4) => mac::<KEY_LEN>(&self.key, &v4.octets()),
            IpAddr::V6(v6) => mac::<KEY_LEN>(&self.key, &v6.octets()[..8]),
        };
        let [low, high] = [0, 8].map(|at| {
            u64::from_ne_bytes(*hash[at..].first_chunk().expect("a mac is 16 bytes long"))
        });
        (low as usize % SETS, high)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    const START: Now = Now::from_boot_ns(1_000_000_000);
    const MS: Duration = Duration::from_millis(1);

    fn buckets() -> SourceBuckets {
        SourceBuckets::new(&mut StdRng::seed_from_u64(1))
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// The list of the kernel's own test of its ratelimiter: milliseconds to wait before, and what
    /// comes of it.
    const AS_KERNEL: [(u32, bool); 11] = [
        (0, true),
        (0, true),
        (0, true),
        (0, true),
        (0, true),
        (0, false),
        (50, true),
        (0, false),
        (100, true),
        (0, true),
        (0, false),
    ];

    #[test]
    fn a_source_may_do_as_much_as_in_the_kernel() {
        let mut buckets = buckets();
        let mut now = START;
        for (i, (wait_ms, may)) in AS_KERNEL.into_iter().enumerate() {
            now = now + MS * wait_ms;
            // Two networks of one site, two hosts of one network, two IPv4 addresses; while one waits
            // the others do.
            assert_eq!(buckets.take(ip("8000::1"), now), may, "step {i}");
            assert_eq!(buckets.take(ip("192.0.2.1"), now), may, "step {i}");
            assert_eq!(buckets.take(ip("192.0.2.2"), now), may, "step {i}");
            assert_eq!(buckets.take(ip("8000:0:0:1::1"), now), may, "step {i}");
        }
        // No token is left in that network, also not for another host of it.
        assert!(!buckets.take(ip("8000::2"), now));
        assert!(!buckets.take(ip("::ffff:192.0.2.1"), now), "the same address, written otherwise");
        assert!(buckets.take(ip("192.0.2.3"), now));
    }

    #[test]
    fn a_full_set_gives_up_its_fullest_bucket() {
        let mut buckets = buckets();
        let set = |buckets: &SourceBuckets, number: u32| {
            buckets.place(IpAddr::from(number.to_be_bytes())).0
        };
        let first = set(&buckets, 0);
        let of_one_set: Vec<IpAddr> = (0..u32::MAX)
            .filter(|&number| set(&buckets, number) == first)
            .map(|number| IpAddr::from(number.to_be_bytes()))
            .take(WAYS + 1)
            .collect();
        // The third one takes one token, all others five.
        for (i, &source) in of_one_set[..WAYS].iter().enumerate() {
            for _ in 0..if i == 2 { 1 } else { 5 } {
                assert!(buckets.take(source, START));
            }
        }
        assert!(buckets.take(of_one_set[WAYS], START), "a newcomer is never turned away");
        for (i, &source) in of_one_set[..WAYS].iter().enumerate() {
            if i != 2 {
                assert!(!buckets.take(source, START), "{i} is remembered");
            }
        }
        assert!(buckets.take(of_one_set[2], START), "forgotten, it has a full bucket");
    }

    #[test]
    fn a_flood_of_sources_takes_no_memory() {
        let mut buckets = buckets();
        for number in 0..100_000_u32 {
            assert!(buckets.take(IpAddr::from(number.to_be_bytes()), START));
        }
        assert_eq!(buckets.sets.len() * WAYS * size_of::<Entry>(), 128 << 10);
    }

    #[test]
    fn a_clock_that_goes_back_locks_nobody_out_for_longer_than_a_full_bucket_takes() {
        let mut bucket = Bucket::default();
        assert!((0..5).all(|_| bucket.take(Rate::SOURCE, START + Duration::from_secs(3600))));
        assert!(!bucket.take(Rate::SOURCE, START));
        assert!(bucket.take(Rate::SOURCE, START + MS * 50));
    }

    proptest! {
        /// The bucket once more, as the kernel keeps it: tokens that are counted.
        #[test]
        fn a_bucket_is_one_of_counted_tokens(steps in prop::collection::vec(0..130_u32, 1..200)) {
            let mut bucket = Bucket::default();
            let (mut tokens, mut last, mut now) = (250_u32, START, START);
            for step in steps {
                now = now + MS * step;
                tokens = (tokens + (now - last).as_millis() as u32).min(250);
                last = now;
                let may = tokens >= 50;
                tokens -= if may { 50 } else { 0 };
                prop_assert_eq!(bucket.take(Rate::SOURCE, now), may);
            }
        }
    }
}
