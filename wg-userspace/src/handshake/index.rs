//! Which receiver indexes are in use, and by whom.
//!
//! A slot is in use for as long as a handshake is in flight or its keypair lives; a peer that rests
//! has none. An index is live in the kernel's map before [`IndexTable::allocate`] returns it, so
//! before any message can carry it. A freed slot rests before it is used again, so that packets on
//! their way to its last user do not meet the next one; the next one has another index.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand_core::Rng;
use wg_common::id::ReceiverIndex;
use wg_common::index::IndexPermutation;
use wg_common::map::index_entry;
use wg_common::protocol::REJECT_AFTER_TIME;
use wg_common::time::Now;

use crate::sys::SharedWords;

/// Time for which a freed slot is not used again: three lives of a keypair.
pub const REST_TIME: Duration = REJECT_AFTER_TIME.saturating_mul(3);

/// The receiver indexes of one device. `T` is whom an index belongs to.
pub struct IndexTable<T> {
    indexes: IndexPermutation,
    /// The slots that are ours to lend.
    range: Range<u32>,
    /// Those of them that were ever used, or lie below one that a predecessor had lent; the rest of them
    /// cost nothing.
    slots: Vec<Slot<T>>,
    /// The slots that are free again, first freed first, and when each may be used.
    resting: VecDeque<(u32, Now)>,
    /// Slots that were never lent here, but perhaps by a predecessor.
    gaps: BTreeSet<u32>,
    /// When whatever a predecessor had lent there has rested.
    gaps_rest_until: Now,
    /// Where the epochs of fresh slots begin: under a key that outlives us, a restart does not repeat
    /// the indexes before it.
    first_epoch: u32,
    /// The kernel side's view: slots beyond it pass there unchecked.
    live: Option<Arc<SharedWords>>,
}

struct Slot<T> {
    owner: Option<Arc<T>>,
    /// The epoch of its latest user; the next one has the next.
    epoch: u32,
}

impl<T> IndexTable<T> {
    /// A table of these slots of `indexes`, mirrored in `live` if there is a kernel side.
    pub fn new(
        indexes: IndexPermutation,
        range: Range<u32>,
        live: Option<Arc<SharedWords>>,
        rng: &mut impl Rng,
    ) -> Self {
        Self {
            indexes,
            range,
            slots: Vec::new(),
            resting: VecDeque::new(),
            gaps: BTreeSet::new(),
            gaps_rest_until: Now::default(),
            first_epoch: rng.next_u32(),
            live,
        }
    }

    /// An index for `owner`, live when this returns; `None` if every slot is in use or rests.
    pub fn allocate(&mut self, owner: &Arc<T>, now: Now) -> Option<ReceiverIndex> {
        let slot = match self.resting.front() {
            Some(&(slot, until)) if until <= now => {
                self.resting.pop_front();
                let used = self.slot_mut(slot);
                used.epoch = used.epoch.wrapping_add(1);
                slot
            }
            _ if self.slots.len() < self.range.len() => self.push(),
            _ if self.gaps_rest_until <= now => self.gaps.pop_first()?,
            _ => return None,
        };
        let used = self.slot_mut(slot);
        used.owner = Some(Arc::clone(owner));
        let epoch = used.epoch;
        let index = self.indexes.own_index(slot, epoch);
        self.store(slot, index_entry(index));
        Some(index)
    }

    /// Takes over an index that a predecessor had lent, for `owner`; live when this returns. `true`
    /// also if it is lent to `owner` already, `false` if its slot is, or was, another's, or is not ours.
    ///
    /// Slots below it that nobody takes over rest from `now` on: the predecessor may have lent them.
    pub fn adopt(&mut self, index: ReceiverIndex, owner: &Arc<T>, now: Now) -> bool {
        if let Some(known) = self.owner(index) {
            return Arc::ptr_eq(known, owner);
        }
        let slot = self.indexes.slot_of(index).filter(|slot| self.range.contains(slot));
        let Some(slot) = slot else { return false };
        while self.slot(slot).is_none() {
            let gap = self.push();
            self.gaps.insert(gap);
            self.gaps_rest_until = now + REST_TIME;
        }
        if !self.gaps.remove(&slot) {
            return false;
        }
        let epoch = self.indexes.parts_of(index).epoch;
        *self.slot_mut(slot) = Slot { owner: Some(Arc::clone(owner)), epoch };
        self.store(slot, index_entry(index));
        true
    }

    /// Whom `index` belongs to; nobody if its slot has another user by now, or none.
    pub fn owner(&self, index: ReceiverIndex) -> Option<&Arc<T>> {
        self.slot(self.slot_in_use(index)?)?.owner.as_ref()
    }

    /// Number of indexes that are lent.
    pub fn lent_count(&self) -> usize {
        self.slots.len() - self.resting.len() - self.gaps.len()
    }

    /// Frees `index`; its slot begins to rest. Freeing twice does nothing.
    pub fn release(&mut self, index: ReceiverIndex, now: Now) {
        let Some(slot) = self.slot_in_use(index) else { return };
        self.store(slot, 0);
        self.slot_mut(slot).owner = None;
        self.resting.push_back((slot, now + REST_TIME));
    }

    /// The slot that is in use under this very index.
    fn slot_in_use(&self, index: ReceiverIndex) -> Option<u32> {
        let slot = self.indexes.slot_of(index)?;
        let used = self.slot(slot)?;
        let is_its_index = self.indexes.own_index(slot, used.epoch) == index;
        (used.owner.is_some() && is_its_index).then_some(slot)
    }

    /// A slot of ours that was used before, or passed over.
    fn slot(&self, slot: u32) -> Option<&Slot<T>> {
        self.slots.get(slot.checked_sub(self.range.start)? as usize)
    }

    /// As [`slot`](Self::slot), for one that is known to have been.
    fn slot_mut(&mut self, slot: u32) -> &mut Slot<T> {
        &mut self.slots[(slot - self.range.start) as usize]
    }

    /// Begins with the next slot that nobody had.
    fn push(&mut self) -> u32 {
        let slot = self.range.start + self.slots.len() as u32;
        self.slots.push(Slot { owner: None, epoch: self.first_epoch });
        slot
    }

    fn store(&self, slot: u32, entry: u64) {
        if let Some(word) = self.live.as_ref().and_then(|live| live.get(slot as usize)) {
            word.store(entry, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use rand::SeedableRng;
    use wg_common::index::IndexLayout;
    use wg_common::map::may_live;

    use super::*;

    const START: Now = Now::from_boot_ns(1);
    const TICK: Duration = Duration::from_nanos(1);

    /// A permutation of two slots.
    fn indexes() -> IndexPermutation {
        IndexPermutation::new([1, 2, 3, 4], IndexLayout::new(2, 1).unwrap()).at_node(3)
    }

    fn table() -> IndexTable<u8> {
        whole(indexes(), None, 1)
    }

    /// A table of all slots.
    fn whole(
        indexes: IndexPermutation,
        live: Option<Arc<SharedWords>>,
        seed: u64,
    ) -> IndexTable<u8> {
        let slots = indexes.layout().share(0, 1);
        IndexTable::new(indexes, slots, live, &mut rand::rngs::StdRng::seed_from_u64(seed))
    }

    fn slot(index: ReceiverIndex) -> u32 {
        indexes().slot_of(index).unwrap()
    }

    #[test]
    fn a_full_table_refuses() {
        let mut table = table();
        let owner = Arc::new(0);
        let first = table.allocate(&owner, START).unwrap();
        let second = table.allocate(&owner, START).unwrap();
        assert_ne!(slot(first), slot(second));
        assert!(table.allocate(&owner, START).is_none());
    }

    #[test]
    fn a_freed_slot_rests_and_then_has_another_index() {
        let mut table = table();
        let owner = Arc::new(0);
        let first = table.allocate(&owner, START).unwrap();
        table.allocate(&owner, START).unwrap();
        table.release(first, START);
        assert!(table.owner(first).is_none());
        assert!(table.allocate(&owner, START + (REST_TIME - TICK)).is_none());
        let second = table.allocate(&owner, START + REST_TIME).unwrap();
        assert_eq!(slot(first), slot(second));
        assert_ne!(first, second);
        assert!(table.owner(first).is_none());
    }

    #[test]
    fn the_slot_freed_first_is_used_first() {
        let mut table = table();
        let owner = Arc::new(0);
        let a = table.allocate(&owner, START).unwrap();
        let b = table.allocate(&owner, START).unwrap();
        table.release(b, START);
        table.release(a, START);
        assert_eq!(slot(table.allocate(&owner, START + REST_TIME).unwrap()), slot(b));
        assert_eq!(slot(table.allocate(&owner, START + REST_TIME).unwrap()), slot(a));
    }

    #[test]
    fn freeing_twice_does_not_lend_a_slot_twice() {
        let mut table = table();
        let owner = Arc::new(0);
        let a = table.allocate(&owner, START).unwrap();
        table.release(a, START);
        table.release(a, START);
        let later = START + REST_TIME;
        let b = table.allocate(&owner, later).unwrap();
        let c = table.allocate(&owner, later).unwrap();
        assert_ne!(slot(b), slot(c));
        table.release(a, later);
        assert!(table.owner(b).is_some(), "an index of an earlier epoch frees nothing");
    }

    #[test]
    fn slots_that_were_never_used_cost_nothing() {
        let indexes = IndexPermutation::new([0; 4], IndexLayout::DEFAULT);
        let mut table = whole(indexes, None, 1);
        let owner = Arc::new(0);
        let mut now = START;
        for _ in 0..1000 {
            let both = [table.allocate(&owner, now), table.allocate(&owner, now)];
            for index in both {
                table.release(index.unwrap(), now);
            }
            now = now + REST_TIME;
        }
        assert_eq!(table.slots.len(), 2);
        assert!(table.slots.capacity() < 16 && table.resting.capacity() < 16);
    }

    /// What may happen to a table.
    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u8),
        /// Frees one that is in use.
        Release(prop::sample::Index),
        /// Frees one that was ever given out.
        ReleaseAny(prop::sample::Index),
        Pass(Duration),
        /// A packet of a stranger, who guesses.
        Guess([u8; 4]),
    }

    fn step() -> impl Strategy<Value = Step> {
        let to_the_end_of_a_rest = prop::sample::select(vec![
            TICK,
            Duration::from_secs(1),
            REJECT_AFTER_TIME,
            REST_TIME - TICK,
            REST_TIME,
        ]);
        prop_oneof![
            6 => any::<u8>().prop_map(Step::Allocate),
            4 => any::<prop::sample::Index>().prop_map(Step::Release),
            1 => any::<prop::sample::Index>().prop_map(Step::ReleaseAny),
            2 => to_the_end_of_a_rest.prop_map(Step::Pass),
            1 => (0..700_u64).prop_map(|secs| Step::Pass(Duration::from_secs(secs))),
            1 => any::<[u8; 4]>().prop_map(Step::Guess),
        ]
    }

    /// One of some devices that share the slots.
    fn share() -> impl Strategy<Value = (u32, u32)> {
        (1u32..=4).prop_flat_map(|count| (0..count, Just(count)))
    }

    /// What a table must be, said plainly.
    struct Model {
        range: Range<u32>,
        in_use: BTreeMap<u32, (ReceiverIndex, u8)>,
        /// Slot, and when it was freed.
        freed: Vec<(u32, Now)>,
        ever_used: u32,
        /// Every index that was given out, oldest first, and whom to.
        given: Vec<(ReceiverIndex, u8)>,
    }

    impl Model {
        fn new(range: Range<u32>) -> Self {
            let (in_use, freed, given) = Default::default();
            Self { ever_used: range.start, range, in_use, freed, given }
        }

        /// Which slot is next.
        fn next(&mut self, now: Now) -> Option<u32> {
            let first = self.freed.first().copied();
            match first {
                Some((slot, at)) if now.since(at) >= Duration::from_secs(540) => {
                    self.freed.remove(0);
                    Some(slot)
                }
                _ if self.ever_used < self.range.end => {
                    self.ever_used += 1;
                    Some(self.ever_used - 1)
                }
                _ => None,
            }
        }

        fn owner(&self, index: ReceiverIndex) -> Option<u8> {
            self.in_use.values().find(|(used, _)| *used == index).map(|(_, owner)| *owner)
        }

        fn release(&mut self, index: ReceiverIndex, now: Now) {
            let slot =
                self.in_use.iter().find(|(_, (used, _))| *used == index).map(|(slot, _)| *slot);
            if let Some(slot) = slot {
                self.in_use.remove(&slot);
                self.freed.push((slot, now));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

        #[test]
        fn a_table_is_what_its_model_is(
            key in any::<[u32; 4]>(), node_bits in 0u32..=8, node in any::<u32>(),
            slot_bits in 1u32..=4, first in any::<u64>(), (number, count) in share(),
            map_len in 1usize..=16,
            steps in prop::collection::vec(step(), 0..200),
        ) {
            let layout = IndexLayout::new(node_bits, slot_bits).unwrap();
            let indexes = IndexPermutation::new(key, layout).at_node(node);
            let live = Arc::new(SharedWords::private(map_len).unwrap());
            let mut rng = rand::rngs::StdRng::seed_from_u64(first);
            let range = layout.share(number, count);
            let shared = Some(Arc::clone(&live));
            let mut table = IndexTable::new(indexes, range.clone(), shared, &mut rng);
            // What other devices hold.
            let foreign = |slot: u32| u64::from(!range.contains(&slot)) * 0xf0f0;
            for (slot, word) in live.iter().enumerate() {
                word.store(foreign(slot as u32), Ordering::Relaxed);
            }
            // What the kernel side does with a packet to this index.
            let reaches = |index| may_live(&indexes, index, |slot| {
                live.get(slot as usize).map(|word| word.load(Ordering::Acquire))
            });
            let mut model = Model::new(range.clone());
            let mut now = START;
            for step in steps {
                match step {
                    Step::Allocate(owner) => {
                        let index = table.allocate(&Arc::new(owner), now);
                        let slot = model.next(now);
                        prop_assert_eq!(index.and_then(|index| indexes.slot_of(index)), slot);
                        if let Some((index, slot)) = index.zip(slot) {
                            prop_assert!(model.given.iter().all(|(before, _)| *before != index));
                            model.given.push((index, owner));
                            prop_assert!(model.in_use.insert(slot, (index, owner)).is_none());
                        }
                    }
                    Step::Release(which) => {
                        let in_use: Vec<_> = model.in_use.values().map(|used| used.0).collect();
                        if !in_use.is_empty() {
                            let index = in_use[which.index(in_use.len())];
                            table.release(index, now);
                            model.release(index, now);
                        }
                    }
                    Step::ReleaseAny(which) => {
                        if !model.given.is_empty() {
                            let index = model.given[which.index(model.given.len())].0;
                            table.release(index, now);
                            model.release(index, now);
                        }
                    }
                    Step::Pass(time) => now = now + time,
                    Step::Guess(bytes) => {
                        let index = ReceiverIndex::from_wire(bytes);
                        prop_assert_eq!(table.owner(index).map(|owner| **owner), model.owner(index));
                    }
                }
                // The map in the kernel holds what is in use, and else what others put there.
                for (slot, word) in live.iter().enumerate() {
                    let used = model.in_use.get(&(slot as u32));
                    let entry = used.map_or(foreign(slot as u32), |(index, _)| index_entry(*index));
                    prop_assert_eq!(word.load(Ordering::Acquire), entry);
                }
                // A packet to any index ever given out, however late, finds its owner or nobody.
                for (index, to) in &model.given {
                    let owner = model.owner(*index);
                    prop_assert!(owner.is_none() || owner == Some(*to));
                    prop_assert_eq!(table.owner(*index).map(|owner| **owner), owner);
                    let beyond = indexes.slot_of(*index).unwrap() as usize >= map_len;
                    prop_assert_eq!(reaches(*index), owner.is_some() || beyond);
                }
            }
        }
    }

    #[test]
    fn devices_that_share_the_slots_never_lend_the_same_one() {
        let layout = IndexLayout::new(0, 4).unwrap();
        let indexes = IndexPermutation::new([1, 2, 3, 4], layout);
        let live = Arc::new(SharedWords::private(16).unwrap());
        let mut tables = [0, 1, 2].map(|number| {
            let mut rng = rand::rngs::StdRng::seed_from_u64(u64::from(number));
            let slots = layout.share(number, 3);
            IndexTable::new(indexes, slots, Some(Arc::clone(&live)), &mut rng)
        });
        let owners = [0, 1, 2].map(Arc::new);
        let mut lent = BTreeMap::new();
        for (table, owner) in tables.iter_mut().zip(&owners) {
            while let Some(index) = table.allocate(owner, START) {
                let slot = indexes.slot_of(index).unwrap();
                assert!(lent.insert(slot, (index, **owner)).is_none(), "slot {slot} is lent twice");
            }
        }
        assert_eq!(lent.len(), 16, "and none is left over");
        for (index, of) in lent.values() {
            for (number, table) in tables.iter_mut().enumerate() {
                let is_its = *of == number;
                assert_eq!(table.owner(*index).is_some(), is_its);
                // Another's is neither freed nor taken over, by whatever mistake or message.
                if !is_its {
                    table.release(*index, START);
                    assert!(!table.adopt(*index, &owners[number], START));
                }
            }
            let slot = indexes.slot_of(*index).unwrap() as usize;
            assert_eq!(live[slot].load(Ordering::Acquire), index_entry(*index));
        }
    }

    #[test]
    fn an_adopted_index_is_lent_to_nobody_else() {
        // The predecessor lent slots 1 and 3; of 0 and 2 we know nothing.
        let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::new(0, 3).unwrap());
        let index = |slot| indexes.own_index(slot, 0xabc);
        let slot = |index| indexes.slot_of(index).unwrap();
        let mut table = whole(indexes, None, 1);
        let (owner, other) = (Arc::new(0), Arc::new(1));
        for slot in [1, 3] {
            assert!(table.adopt(index(slot), &owner, START));
            assert!(table.adopt(index(slot), &owner, START), "once more");
            assert!(!table.adopt(index(slot), &other, START), "only its owner has it");
            assert!(!table.adopt(indexes.own_index(slot, 0xabd), &other, START), "slot in use");
            assert!(Arc::ptr_eq(table.owner(index(slot)).unwrap(), &owner));
        }
        // What was never lent comes first, then what the predecessor may have lent, rested.
        let fresh = [(); 4].map(|()| slot(table.allocate(&other, START).unwrap()));
        assert_eq!(fresh, [4, 5, 6, 7]);
        assert!(table.allocate(&other, START + (REST_TIME - TICK)).is_none());
        table.release(index(3), START);
        assert!(!table.adopt(index(3), &owner, START), "it rests");
        let rested = [(); 3].map(|()| table.allocate(&other, START + REST_TIME).unwrap());
        assert_eq!(rested.map(slot), [3, 0, 2]);
        assert_ne!(rested[0], index(3));
        assert!(table.allocate(&other, START + REST_TIME).is_none());
    }
}
