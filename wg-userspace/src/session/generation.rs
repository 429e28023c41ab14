//! Who may seal with which counters, when a keypair has several holders one after another.

use std::ops::Range;

use wg_common::protocol::{REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES};

/// The number of a keypair's holder: who made it is the first, and each hand-over begins the next.
///
/// Generation *g* seals with the counters g·2^40 to (g + 1)·2^40 only. So two holders can never use a
/// nonce twice, whatever either has lost or forgotten; and since a holder's counters are all greater
/// than those of the one before, the peer's replay window takes them.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Generation(u32);

impl Generation {
    /// Bits of a counter within its generation.
    const COUNTER_BITS: u32 = 40;
    /// Number of generations.
    pub const COUNT: u32 = 1 << (u64::BITS - Self::COUNTER_BITS);
    /// So many counters before a generation's end a rekey is wanted: the same part of all as lies
    /// between Rekey-After-Messages and Reject-After-Messages. Hours at ten million packets a second.
    const REKEY_BEFORE_END: u64 = 1 << (Self::COUNTER_BITS - 4);

    /// The generation of this number, if it is below [`COUNT`](Self::COUNT).
    pub const fn new(number: u32) -> Option<Self> {
        if number < Self::COUNT { Some(Self(number)) } else { None }
    }

    /// Its number; counts from 0.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The generation of the next holder, unless this is the last one.
    pub const fn successor(self) -> Option<Self> {
        Self::new(self.0 + 1)
    }

    /// The counters that its holder may seal with; none from Reject-After-Messages on.
    pub const fn counters(self) -> Range<u64> {
        let first = (self.0 as u64) << Self::COUNTER_BITS;
        // The last generation's would end with 2^64.
        let end = match self.successor() {
            Some(next) => (next.0 as u64) << Self::COUNTER_BITS,
            None => REJECT_AFTER_MESSAGES,
        };
        first..end
    }

    /// The counter after which its holder wants a new handshake: near the end of its own, and in any
    /// case after Rekey-After-Messages.
    pub const fn rekey_after(self) -> u64 {
        let near_end = self.counters().end - Self::REKEY_BEFORE_END;
        if near_end < REKEY_AFTER_MESSAGES { near_end } else { REKEY_AFTER_MESSAGES }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_share_no_counter_and_leave_none_out() {
        let last = Generation::COUNT - 1;
        for number in [0, 1, 2, 77, 1 << 20, last - 1] {
            let generation = Generation::new(number).unwrap();
            let next = generation.successor().unwrap();
            assert_eq!(generation.counters().end, next.counters().start, "{number}");
            assert_eq!(generation.counters().start, u64::from(number) * (1 << 40));
        }
        let last = Generation::new(last).unwrap();
        assert_eq!(last.counters().end, REJECT_AFTER_MESSAGES);
        assert!(last.counters().end - last.counters().start < 1 << 40);
        assert!(last.successor().is_none() && Generation::new(Generation::COUNT).is_none());
    }

    #[test]
    fn a_rekey_is_wanted_before_the_counters_end() {
        let after = |number| Generation::new(number).unwrap().rekey_after();
        assert_eq!(after(0), (1 << 40) - (1 << 36));
        assert_eq!(after(3), (4 << 40) - (1 << 36));
        assert_eq!(after(1 << 20), REKEY_AFTER_MESSAGES);
        assert_eq!(after(Generation::COUNT - 1), REKEY_AFTER_MESSAGES);
    }
}
