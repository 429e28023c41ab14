//! Receiver indexes as this gateway makes them: a keyed permutation of node, slot and epoch.
//!
//! Who chooses an index may put into it what he likes (whitepaper §5.4). Ours says which node of a
//! fleet it belongs to, in which slot of that node's table the keypair is, and which of the slot's
//! successive users it is. The permutation hides that: who has seen some indexes cannot tell the
//! others. It needs no table, so that the kernel side and every node can take an index apart.
//!
//! It keeps strangers from guessing live indexes, and is made to be cheap. Nothing's security rests
//! on it: what a message is worth, its tag says.

use core::ops::Range;

use crate::id::ReceiverIndex;

/// How many of an index's 32 bits stand for what; the same on all nodes of a fleet.
///
/// The bits that are left are the epoch's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct IndexLayout {
    node_bits: u32,
    slot_bits: u32,
}

impl IndexLayout {
    /// Most bits of a slot number.
    pub const SLOT_BITS_MAX: u32 = 24;
    /// Least bits of an epoch: so many users of a slot, less one, have an index that none before had.
    pub const EPOCH_BITS_MIN: u32 = 4;
    /// One node with 2^20 slots, each with 2^12 epochs.
    pub const DEFAULT: Self = Self { node_bits: 0, slot_bits: 20 };

    /// A layout; `None` if there are no bits for slots, or more than [`Self::SLOT_BITS_MAX`], or fewer
    /// than [`Self::EPOCH_BITS_MIN`] would be left.
    pub const fn new(node_bits: u32, slot_bits: u32) -> Option<Self> {
        let slots_fit = slot_bits >= 1 && slot_bits <= Self::SLOT_BITS_MAX;
        // Each bound by itself first: the sum of two great numbers may be a small one.
        let epochs_fit = node_bits < u32::BITS
            && slots_fit
            && node_bits + slot_bits + Self::EPOCH_BITS_MIN <= u32::BITS;
        if epochs_fit { Some(Self { node_bits, slot_bits }) } else { None }
    }

    /// Bits of the node's number.
    pub const fn node_bits(self) -> u32 {
        self.node_bits
    }

    /// Bits of the slot's number.
    pub const fn slot_bits(self) -> u32 {
        self.slot_bits
    }

    /// Bits of the epoch.
    pub const fn epoch_bits(self) -> u32 {
        u32::BITS - self.node_bits - self.slot_bits
    }

    /// Number of nodes; at least one.
    pub const fn node_count(self) -> u32 {
        1 << self.node_bits
    }

    /// Number of slots of a node.
    pub const fn slot_count(self) -> u32 {
        1 << self.slot_bits
    }

    /// The slots of one of `count` devices that share a node's, the one with this number: together they
    /// have all of them, and no two have one in common. Empty if the number is none of theirs.
    pub fn share(self, number: u32, count: u32) -> Range<u32> {
        let count = count.max(1);
        let begin = |number: u32| {
            let slot = u64::from(self.slot_count()) * u64::from(number.min(count));
            (slot / u64::from(count)) as u32
        };
        begin(number)..begin(number.saturating_add(1))
    }

    /// Number of epochs of a slot.
    pub const fn epoch_count(self) -> u32 {
        1 << self.epoch_bits()
    }

    #[inline(always)]
    const fn join(self, parts: IndexParts) -> u32 {
        let node = (parts.node & (self.node_count() - 1)) as u64;
        let epoch = parts.epoch & (self.epoch_count() - 1);
        let slot = parts.slot & (self.slot_count() - 1);
        // Without bits for nodes the shift is by all 32.
        (node << (u32::BITS - self.node_bits)) as u32 | epoch << self.slot_bits | slot
    }

    #[inline(always)]
    const fn split(self, joined: u32) -> IndexParts {
        IndexParts {
            node: (joined as u64 >> (u32::BITS - self.node_bits)) as u32,
            slot: joined & (self.slot_count() - 1),
            epoch: (joined >> self.slot_bits) & (self.epoch_count() - 1),
        }
    }
}

impl Default for IndexLayout {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What an index says.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct IndexParts {
    /// The node of the fleet that chose it.
    pub node: u32,
    /// The slot of that node's table.
    pub slot: u32,
    /// Which of the slot's successive users it belongs to.
    pub epoch: u32,
}

/// What makes indexes and takes them apart: a key, a layout, and which node we are.
///
/// A Feistel network with two halves of 16 bits: a permutation whatever its rounds are made of, and
/// undone by the same rounds backwards. Four rounds are enough for every bit of the parts to change
/// each bit of the index half of the time.
///
/// The kernel side gets it as it lies in memory.
#[derive(Clone, Copy, Eq, PartialEq)]
#[repr(C)]
pub struct IndexPermutation {
    key: [u32; Self::KEY_LEN],
    layout: IndexLayout,
    node: u32,
}

impl IndexPermutation {
    /// Words of a key: one for each round.
    pub const KEY_LEN: usize = 4;

    /// The permutation under `key`, of node 0.
    pub const fn new(key: [u32; Self::KEY_LEN], layout: IndexLayout) -> Self {
        Self { key, layout, node: 0 }
    }

    /// The same permutation on another node of the fleet; its number is taken modulo
    /// [`IndexLayout::node_count`].
    #[must_use]
    pub const fn at_node(self, node: u32) -> Self {
        Self { node: node & (self.layout.node_count() - 1), ..self }
    }

    /// How the bits are shared out.
    pub const fn layout(&self) -> IndexLayout {
        self.layout
    }

    /// Which node we are.
    pub const fn node(&self) -> u32 {
        self.node
    }

    /// The index of these parts, each taken modulo its number of values.
    pub const fn index_of(&self, parts: IndexParts) -> ReceiverIndex {
        ReceiverIndex::from_value(self.permute(self.layout.join(parts)))
    }

    /// What an index says, whoever made it.
    #[inline(always)]
    pub const fn parts_of(&self, index: ReceiverIndex) -> IndexParts {
        self.layout.split(self.permute_back(index.value()))
    }

    /// Our index for a slot in an epoch, taken modulo their numbers.
    pub const fn own_index(&self, slot: u32, epoch: u32) -> ReceiverIndex {
        self.index_of(IndexParts { node: self.node, slot, epoch })
    }

    /// The slot of ours that an index names, below [`IndexLayout::slot_count`]; `None` if it is another
    /// node's. Whether the slot's user has that very index is for the caller to compare.
    #[inline(always)]
    pub const fn slot_of(&self, index: ReceiverIndex) -> Option<u32> {
        let parts = self.parts_of(index);
        if parts.node == self.node { Some(parts.slot) } else { None }
    }

    const fn permute(&self, value: u32) -> u32 {
        let (mut high, mut low) = (value >> 16, value & 0xffff);
        high ^= round(low, self.key[0]);
        low ^= round(high, self.key[1]);
        high ^= round(low, self.key[2]);
        low ^= round(high, self.key[3]);
        high << 16 | low
    }

    #[inline(always)]
    const fn permute_back(&self, value: u32) -> u32 {
        let (mut high, mut low) = (value >> 16, value & 0xffff);
        low ^= round(high, self.key[3]);
        high ^= round(low, self.key[2]);
        low ^= round(high, self.key[1]);
        high ^= round(low, self.key[0]);
        high << 16 | low
    }
}

impl core::fmt::Debug for IndexPermutation {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("IndexPermutation")
            .field("layout", &self.layout)
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// 16 bits that depend on each bit of `half` and of `key`: multiplications carry bits upwards, the
/// shift brings them back down.
#[inline(always)]
const fn round(half: u32, key: u32) -> u32 {
    let mixed = (half ^ key).wrapping_mul(MULTIPLIERS[0]);
    (mixed ^ mixed >> 15).wrapping_mul(MULTIPLIERS[1]) >> 16
}

/// Odd numbers that mix well together, found for a 32-bit integer hash by a search for low bias (the
/// hash-prospector project; in the public domain).
const MULTIPLIERS: [u32; 2] = [0x21f0_aaad, 0xd35a_2d97];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn layouts() -> impl Iterator<Item = IndexLayout> {
        let widths = (0..=u32::BITS).flat_map(|node| (0..=u32::BITS).map(move |slot| (node, slot)));
        widths.filter_map(|(node_bits, slot_bits)| IndexLayout::new(node_bits, slot_bits))
    }

    fn layout() -> impl Strategy<Value = IndexLayout> {
        prop::sample::select(layouts().collect::<Vec<_>>())
    }

    fn permutation() -> impl Strategy<Value = IndexPermutation> {
        (any::<[u32; 4]>(), layout(), any::<u32>())
            .prop_map(|(key, layout, node)| IndexPermutation::new(key, layout).at_node(node))
    }

    fn index(value: u32) -> ReceiverIndex {
        ReceiverIndex::from_wire(value.to_le_bytes())
    }

    /// Keys without pattern, and those with the most.
    fn keys() -> Vec<[u32; 4]> {
        let mut rng = StdRng::seed_from_u64(1);
        let mut keys = vec![[0; 4], [u32::MAX; 4], [1, 0, 0, 0]];
        keys.extend((0..8).map(|_| std::array::from_fn(|_| rng.random())));
        keys
    }

    proptest! {
        #[test]
        fn parts_survive_being_an_index(
            permutation in permutation(), node in any::<u32>(), slot in any::<u32>(), epoch in any::<u32>(),
        ) {
            let layout = permutation.layout();
            let parts = IndexParts {
                node: node % layout.node_count(),
                slot: slot % layout.slot_count(),
                epoch: epoch % layout.epoch_count(),
            };
            prop_assert_eq!(permutation.parts_of(permutation.index_of(parts)), parts);
            let whole = IndexParts { node, slot, epoch };
            prop_assert_eq!(permutation.index_of(whole), permutation.index_of(parts));
        }

        #[test]
        fn an_index_survives_being_taken_apart(permutation in permutation(), value in any::<u32>()) {
            let parts = permutation.parts_of(index(value));
            prop_assert_eq!(permutation.index_of(parts), index(value));
        }

        #[test]
        fn only_our_own_indexes_have_a_slot(permutation in permutation(), value in any::<u32>()) {
            let parts = permutation.parts_of(index(value));
            let expected = (parts.node == permutation.node()).then_some(parts.slot);
            prop_assert_eq!(permutation.slot_of(index(value)), expected);
            let own = permutation.own_index(parts.slot, parts.epoch);
            prop_assert_eq!(permutation.slot_of(own), Some(parts.slot));
            prop_assert_eq!(own == index(value), parts.node == permutation.node());
        }

        #[test]
        fn shares_are_apart_and_together_all(
            layout in layout(), count in prop_oneof![1u32..=9, any::<u32>()], number in any::<u32>(),
        ) {
            let number = number % count.max(1);
            let share = layout.share(number, count);
            // What ends here begins there: so no slot is in two of them, and none in no share.
            prop_assert_eq!(share.end, layout.share(number + 1, count).start);
            prop_assert_eq!(layout.share(0, count).start, 0);
            prop_assert_eq!(layout.share(count.max(1) - 1, count).end, layout.slot_count());
            prop_assert!(layout.share(count, count).is_empty());
            let fair = layout.slot_count() / count.max(1);
            prop_assert!(share.start <= share.end && share.len() as u32 >= fair);
            prop_assert!(share.len() as u32 <= fair + 1);
        }

        #[test]
        fn another_key_makes_another_permutation(
            key in any::<[u32; 4]>(), word in 0usize..4, flipped in 1u32.., values in any::<[u32; 16]>(),
        ) {
            let mut other = key;
            other[word] ^= flipped;
            let (a, b) = (
                IndexPermutation::new(key, IndexLayout::DEFAULT),
                IndexPermutation::new(other, IndexLayout::DEFAULT),
            );
            let differ = |value: &u32| a.parts_of(index(*value)) != b.parts_of(index(*value));
            prop_assert!(values.iter().any(differ));
        }
    }

    #[test]
    fn no_two_values_of_a_half_have_the_same_index() {
        for key in keys() {
            let permutation = IndexPermutation::new(key, IndexLayout::DEFAULT);
            for other_half in [0, 1, 0x5a5a, 0xffff] {
                for shift in [0, 16] {
                    let mut indexes: Vec<u32> = (0..1 << 16)
                        .map(|half| permutation.permute(half << shift | other_half << (16 - shift)))
                        .collect();
                    indexes.sort_unstable();
                    indexes.dedup();
                    assert_eq!(indexes.len(), 1 << 16);
                }
            }
        }
    }

    #[test]
    fn fields_are_kept_apart_for_all_widths() {
        for layout in layouts() {
            let bits = [layout.node_bits(), layout.slot_bits(), layout.epoch_bits()];
            assert_eq!(bits.iter().sum::<u32>(), u32::BITS);
            assert!(bits[1] >= 1 && bits[2] >= IndexLayout::EPOCH_BITS_MIN);
            let greatest = [layout.node_count(), layout.slot_count(), layout.epoch_count()];
            let masks = [0, 1, 2].map(|field| {
                let mut parts = [0; 3];
                parts[field] = greatest[field] - 1;
                let parts = IndexParts { node: parts[0], slot: parts[1], epoch: parts[2] };
                assert_eq!(layout.split(layout.join(parts)), parts, "{layout:?}");
                layout.join(parts)
            });
            assert_eq!(masks.map(u32::count_ones), bits, "{layout:?}");
            assert_eq!(masks[0] | masks[1] | masks[2], u32::MAX, "{layout:?}");
        }
    }

    #[test]
    fn layouts_that_do_not_fit_are_refused() {
        for (node_bits, slot_bits) in
            [(0, 0), (0, 25), (9, 20), (28, 1), (27, 2), (32, 1), (u32::MAX, 1), (0, u32::MAX)]
        {
            assert_eq!(IndexLayout::new(node_bits, slot_bits), None, "{node_bits}, {slot_bits}");
        }
        assert_eq!(IndexLayout::new(0, 20), Some(IndexLayout::default()));
        assert_eq!(IndexLayout::new(8, 20).unwrap().epoch_count(), 16);
        assert_eq!(IndexLayout::new(27, 1).unwrap().slot_count(), 2);
    }

    /// How often each bit differs between pairs of indexes, at its farthest from half of the time.
    fn bias(pairs: impl Iterator<Item = (u32, u32)>) -> f64 {
        let (mut counts, mut pair_count) = ([0; 32], 0);
        for (a, b) in pairs {
            pair_count += 1;
            for (bit, count) in counts.iter_mut().enumerate() {
                *count += (a ^ b) >> bit & 1;
            }
        }
        let far = |count: u32| (f64::from(count) / f64::from(pair_count) - 0.5).abs();
        counts.into_iter().map(far).fold(0.0, f64::max)
    }

    /// Of 4096 throws of a coin, the share of heads is this far from half once in 10^10 times.
    const BIAS_MAX: f64 = 0.05;

    #[test]
    fn successive_slots_and_epochs_differ_in_half_of_the_bits() {
        for key in keys() {
            let permutation = IndexPermutation::new(key, IndexLayout::DEFAULT);
            let of = |slot, epoch| permutation.own_index(slot, epoch).value();
            let slots = bias((0..4096).map(|slot| (of(slot, 7), of(slot + 1, 7))));
            let epochs = bias((0..4095).map(|epoch| (of(7, epoch), of(7, epoch + 1))));
            assert!(slots < BIAS_MAX && epochs < BIAS_MAX, "{slots} {epochs} under {key:x?}");
        }
    }

    #[test]
    fn every_bit_of_the_parts_changes_each_bit_of_the_index_half_of_the_time() {
        let mut rng = StdRng::seed_from_u64(2);
        for key in keys() {
            let permutation = IndexPermutation::new(key, IndexLayout::DEFAULT);
            for bit in 0..u32::BITS {
                let flipped = bias((0..4096).map(|_| {
                    let value = rng.random();
                    (permutation.permute(value), permutation.permute(value ^ 1 << bit))
                }));
                assert!(flipped < BIAS_MAX, "bit {bit}: {flipped} under {key:x?}");
            }
        }
    }

    #[test]
    fn the_way_from_one_index_to_the_next_tells_nothing_of_the_way_after_it() {
        for key in keys() {
            let permutation = IndexPermutation::new(key, IndexLayout::DEFAULT);
            let of = |slot| permutation.own_index(slot, 7).value();
            for step in [u32::wrapping_sub, |a: u32, b: u32| a ^ b] {
                let mut steps: Vec<u32> =
                    (0..4096).map(|slot| step(of(slot + 1), of(slot))).collect();
                steps.sort_unstable();
                steps.dedup();
                // Of 4096 random numbers of 32 bits, two are equal once in 500 times.
                assert!(steps.len() >= 4094, "{} under {key:x?}", steps.len());
            }
            // What is affine over bits has f(a ^ b ^ c) = f(a) ^ f(b) ^ f(c).
            let affine = (0..4096).filter(|a| of(*a) ^ of(0x1000) ^ of(0x2000) == of(a ^ 0x3000));
            assert!(affine.count() <= 1, "under {key:x?}");
        }
    }
}
