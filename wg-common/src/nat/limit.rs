//! How many ICMP errors are written: buckets of tokens, each in one word, so that CPUs share one without a lock.

use crate::map::AddressKey;

/// A bucket that is full at first. Its word is the boot time in nanoseconds at which it is full again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bucket {
    /// Time in which it gets a token.
    interval_ns: u64,
    /// Tokens of a full one.
    burst: u64,
}

impl Bucket {
    /// The errors of one kind that a device's programs write: the kernel's `icmp_msgs_per_sec` and
    /// `icmp_msgs_burst`.
    pub const ALL: Self = Self { interval_ns: 1_000_000, burst: 50 };
    /// Those to one [`receiver`]: the kernel's `icmp_ratelimit`, with what it lets come at once.
    pub const ONE: Self = Self { interval_ns: 1_000_000_000, burst: 6 };

    /// The bucket's word after a token was taken; `None` if it has none. Of a clock that went back it is full
    /// sooner, of a word from the future no token is had until then.
    #[inline(always)]
    pub const fn take(self, word: u64, now_ns: u64) -> Option<u64> {
        let from = if word > now_ns { word } else { now_ns };
        let Some(full_ns) = from.checked_add(self.interval_ns) else { return None };
        if full_ns - now_ns > self.interval_ns * self.burst { None } else { Some(full_ns) }
    }
}

/// Kinds of errors, each with buckets of its own: a flood that makes one leaves the others alone.
pub const KINDS: usize = 2;
/// That TTL or hop limit is used up.
pub const TIME_EXCEEDED: u32 = 0;
/// That only smaller packets get through.
pub const TOO_BIG: u32 = 1;

/// Who counts as one receiver of errors: an address of IPv4, a /64 of IPv6, which is what one host can have.
#[inline(always)]
pub const fn receiver(address: &AddressKey) -> AddressKey {
    let [a, b, _, _] = address.0;
    if address.is_v4() { *address } else { AddressKey([a, b, 0, 0]) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a bucket that counts, in whole nanoseconds.
        #[test]
        fn as_many_are_taken_as_a_counting_bucket_has(
            steps in prop::collection::vec(prop_oneof![0_u64..3, 0_u64..3_000_000, 0_u64..80_000_000], 1..200),
            one in any::<bool>(),
        ) {
            let bucket = if one { Bucket::ONE } else { Bucket::ALL };
            let full = bucket.interval_ns * bucket.burst;
            let (mut now, mut word, mut level) = (1_000_u64, 0, full);
            for step in steps {
                now += step;
                level = full.min(level + step);
                let has_one = level >= bucket.interval_ns;
                let taken = bucket.take(word, now);
                prop_assert_eq!(taken.is_some(), has_one);
                if let Some(next) = taken {
                    level -= bucket.interval_ns;
                    word = next;
                }
            }
        }

        #[test]
        fn any_word_and_clock_are_taken_without_harm(word in any::<u64>(), now in any::<u64>()) {
            if let Some(next) = Bucket::ALL.take(word, now) {
                prop_assert!(next > now && next > word);
            }
        }
    }

    #[test]
    fn a_receiver_is_an_address_or_a_64() {
        let v4 = AddressKey::v4([192, 0, 2, 1]);
        assert_eq!(receiver(&v4), v4);
        let v6 = |last| AddressKey::v6([0x20, 1, 0xd, 0xb8, 0, 0, 0, 7, 9, 9, 9, 9, 9, 9, 9, last]);
        assert_eq!(receiver(&v6(1)), receiver(&v6(2)));
        assert_ne!(receiver(&v6(1)), v6(1));
    }
}
