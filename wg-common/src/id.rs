//! Names that are numbers. Each has a type of its own, so that one never lands in another's place.

/// One WireGuard instance of this process: a key, a port, peers.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct DeviceId(pub u16);

/// A peer's slot in its device; reused after the peer is removed.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PeerId(pub u32);

/// A pinned thread of the data path, and the worker of each device there. Counts from 0.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct WorkerId(pub u16);

/// One of [`ShardId::COUNT`] virtual homes; a table maps shards to workers.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ShardId(u8);

impl ShardId {
    /// Number of shards.
    pub const COUNT: usize = 64;

    /// The shard with this number, modulo [`ShardId::COUNT`].
    pub const fn new(number: usize) -> Self {
        Self((number % Self::COUNT) as u8)
    }

    /// Counts from 0, below [`ShardId::COUNT`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Index by which the receiver of a message finds its handshake or keypair (whitepaper §5.4).
///
/// Chosen by the receiver; host byte order. Whoever did not choose it can only give it back: what
/// our own mean, [`IndexPermutation`](crate::index::IndexPermutation) knows.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ReceiverIndex(u32);

impl ReceiverIndex {
    /// The index with this value.
    pub(crate) const fn from_value(value: u32) -> Self {
        Self(value)
    }

    /// Reads the four bytes of a message (little-endian).
    pub const fn from_wire(bytes: [u8; 4]) -> Self {
        Self(u32::from_le_bytes(bytes))
    }

    /// The four bytes of a message (little-endian).
    pub const fn to_wire(self) -> [u8; 4] {
        self.0.to_le_bytes()
    }

    /// The whole index in host byte order.
    pub const fn value(self) -> u32 {
        self.0
    }
}

/// The number of a transport data message under its keypair (whitepaper §5.4.6).
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Counter(pub u64);

impl core::fmt::Display for ReceiverIndex {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl core::fmt::Display for PeerId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.fmt(f)
    }
}

impl core::fmt::Display for WorkerId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn receiver_index_survives_the_wire(bytes in any::<[u8; 4]>()) {
            let index = ReceiverIndex::from_wire(bytes);
            prop_assert_eq!(index.to_wire(), bytes);
            prop_assert_eq!(index.value(), u32::from_le_bytes(bytes));
        }

        #[test]
        fn shard_stays_below_their_number(number in any::<usize>()) {
            prop_assert_eq!(ShardId::new(number).index(), number % ShardId::COUNT);
        }
    }
}
