//! How many handshake messages each source may have handled: a token bucket for each.
//!
//! A full bucket is as good as none, so the table has a fixed size, and a source that is found nowhere
//! has a full one.

use std::net::IpAddr;

use rand_core::CryptoRng;
use wg_common::protocol::{KEY_LEN, SOURCE_MESSAGES_BURST, SOURCE_MESSAGES_PER_SECOND};
use wg_common::time::Now;
use zeroize::Zeroizing;

use crate::noise::mac;
use crate::rate::{Bucket, Rate, Source};

/// The rate of one source's handshake messages, as in the kernel.
const RATE: Rate = Rate::new(SOURCE_MESSAGES_PER_SECOND, SOURCE_MESSAGES_BURST);

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
                let fullest = set.iter_mut().min_by_key(|entry| entry.bucket);
                let entry = fullest.expect("a set has entries");
                *entry = Entry { tag, bucket: Bucket::default() };
                entry
            }
        };
        entry.bucket.take(RATE, now)
    }

    /// The set and the tag of a source.
    fn place(&self, source: IpAddr) -> (usize, u64) {
        let hash = mac::<KEY_LEN>(&self.key, &Source::of(source).to_bytes());
        let [low, high] = [0, 8].map(|at| {
            u64::from_ne_bytes(*hash[at..].first_chunk().expect("a mac is 16 bytes long"))
        });
        (low as usize % SETS, high)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
}
