//! The timestamp of an initiation: TAI64N, coarsened.

use wg_common::protocol::{INITIATION_INTERVAL_MIN, TIMESTAMP_LEN};

/// TAI64N label of the second 1970-01-01 00:00:00 UTC, as the kernel's `tai64n_now` and
/// wireguard-go have it: ten seconds between TAI and UTC, later leap seconds left out.
const UNIX_EPOCH: u64 = (1 << 62) + 10;

/// Nanoseconds are rounded down to a multiple of this, so that an initiation does not tell the
/// network how precisely our clock runs. As in the kernel the greatest power of two within the
/// least time between two initiations: 2^24 ns, 16.8 ms.
const GRAIN_NS: u32 = 1 << INITIATION_INTERVAL_MIN.as_nanos().ilog2();
const _: () = assert!(GRAIN_NS == 1 << 24);

/// The moment an initiation was made, by its maker's wall clock (§5.1, §5.4.2).
///
/// Receivers only compare them: an initiation counts if its timestamp is greater than all before.
/// `Default` is less than every timestamp of a clock.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Timestamp([u8; TIMESTAMP_LEN]);

impl Timestamp {
    /// The timestamp of a wall clock's `secs` and `nanos` since 1970, coarsened.
    ///
    /// Two moments less than 16.8 ms apart may have the same.
    pub fn from_unix(secs: u64, nanos: u32) -> Self {
        let mut bytes = [0; TIMESTAMP_LEN];
        let (secs_bytes, nanos_bytes) = bytes.split_at_mut(size_of::<u64>());
        secs_bytes.copy_from_slice(&UNIX_EPOCH.saturating_add(secs).to_be_bytes());
        nanos_bytes.copy_from_slice(&(nanos / GRAIN_NS * GRAIN_NS).to_be_bytes());
        Self(bytes)
    }

    /// The timestamp of these bytes of a message. All values are taken: peers need not keep TAI.
    pub const fn from_bytes(bytes: [u8; TIMESTAMP_LEN]) -> Self {
        Self(bytes)
    }

    /// The wall clock's seconds and nanoseconds since 1970, as far as they are in it.
    pub fn to_unix(self) -> (u64, u32) {
        let [secs @ .., n0, n1, n2, n3] = self.0;
        let secs = u64::from_be_bytes(secs);
        (secs.saturating_sub(UNIX_EPOCH), u32::from_be_bytes([n0, n1, n2, n3]))
    }

    /// The bytes of a message: seconds, then nanoseconds, both big-endian.
    pub const fn as_bytes(&self) -> &[u8; TIMESTAMP_LEN] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epoch_is_that_of_the_kernel() {
        let epoch = [0x40, 0, 0, 0, 0, 0, 0, 0x0a, 0, 0, 0, 0];
        assert_eq!(*Timestamp::from_unix(0, 0).as_bytes(), epoch);
        assert_eq!(Timestamp::from_bytes(epoch), Timestamp::from_unix(0, 0));
    }

    #[test]
    fn nanoseconds_are_coarse() {
        let start = Timestamp::from_unix(1_800_000_000, 0);
        assert_eq!(Timestamp::from_unix(1_800_000_000, GRAIN_NS - 1), start);
        let next = Timestamp::from_unix(1_800_000_000, GRAIN_NS);
        assert_eq!(next.as_bytes()[8..], [1, 0, 0, 0]);
        let last = Timestamp::from_unix(1_800_000_000, 999_999_999);
        assert_eq!(last.as_bytes()[8..], [0x3b, 0, 0, 0]);
    }

    #[test]
    fn order_is_that_of_time() {
        let times = [
            Timestamp::default(),
            Timestamp::from_unix(0, 0),
            Timestamp::from_unix(255, 900_000_000),
            Timestamp::from_unix(256, 0),
            Timestamp::from_unix(256, 20_000_000),
            Timestamp::from_unix(1 << 33, 0),
            Timestamp::from_unix(u64::MAX, u32::MAX),
        ];
        assert!(times.is_sorted_by(|a, b| a < b));
    }
}
