//! Which receiver indexes are in use, and by whom.
//!
//! An index is live in the kernel's map before [`IndexTable::allocate`] returns it, so before any
//! message can carry it. A freed slot rests before it is used again, so that packets on their way
//! to its last user do not meet the next one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hashbrown::HashMap;
use rand_core::Rng;
use wg_common::id::ReceiverIndex;
use wg_common::map::index_entry;
use wg_common::protocol::REJECT_AFTER_TIME;
use wg_common::time::Now;

use crate::sys::SharedWords;

/// Time for which a freed slot is not used again: three lives of a keypair.
pub const REST_TIME: Duration = REJECT_AFTER_TIME.saturating_mul(3);

/// The receiver indexes of one device. `T` is whom an index belongs to.
pub struct IndexTable<T> {
    owners: HashMap<ReceiverIndex, Arc<T>>,
    /// The slots freed, first freed first, and when each may be used again.
    resting: VecDeque<(usize, Now)>,
    /// The epoch of each slot's latest user: its successor has the next. Slots beyond were never used.
    epochs: Vec<u16>,
    /// Where the epochs of fresh slots begin: a restart does not repeat the indexes before it.
    first_epoch: u16,
    capacity: usize,
    /// The kernel side's view: slots beyond it pass there unchecked.
    live: Option<Arc<SharedWords>>,
}

impl<T> IndexTable<T> {
    /// A table of `capacity` slots, mirrored in `live` if there is a kernel side.
    pub fn new(capacity: usize, live: Option<Arc<SharedWords>>, rng: &mut impl Rng) -> Self {
        Self {
            owners: HashMap::new(),
            resting: VecDeque::new(),
            epochs: Vec::new(),
            first_epoch: rng.next_u32() as u16,
            capacity: capacity.min(ReceiverIndex::SLOT_COUNT),
            live,
        }
    }

    /// An index for `owner`; `None` if every slot is in use or rests.
    pub fn allocate(&mut self, owner: &Arc<T>, now: Now) -> Option<ReceiverIndex> {
        let slot = match self.resting.front() {
            Some(&(slot, until)) if until <= now => {
                self.resting.pop_front();
                self.epochs[slot] = self.epochs[slot].wrapping_add(1);
                slot
            }
            _ if self.epochs.len() < self.capacity => {
                self.epochs.push(self.first_epoch);
                self.epochs.len() - 1
            }
            _ => return None,
        };
        let index = ReceiverIndex::new(slot, self.epochs[slot].into());
        self.owners.insert(index, Arc::clone(owner));
        self.publish(slot, index_entry(index));
        Some(index)
    }

    /// Whom `index` belongs to.
    pub fn owner(&self, index: ReceiverIndex) -> Option<&Arc<T>> {
        self.owners.get(&index)
    }

    /// Frees `index`; its slot begins to rest. Freeing twice does nothing.
    pub fn release(&mut self, index: ReceiverIndex, now: Now) {
        if self.owners.remove(&index).is_some() {
            self.publish(index.slot(), 0);
            self.resting.push_back((index.slot(), now + REST_TIME));
        }
    }

    fn publish(&self, slot: usize, entry: u64) {
        if let Some(word) = self.live.as_ref().and_then(|live| live.get(slot)) {
            word.store(entry, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn table(capacity: usize) -> IndexTable<u8> {
        IndexTable::new(capacity, None, &mut rand::rngs::StdRng::seed_from_u64(1))
    }

    const START: Now = Now::from_boot_ns(1);

    #[test]
    fn a_full_table_refuses() {
        let mut table = table(2);
        let owner = Arc::new(0);
        let first = table.allocate(&owner, START).unwrap();
        let second = table.allocate(&owner, START).unwrap();
        assert_ne!(first.slot(), second.slot());
        assert!(table.allocate(&owner, START).is_none());
    }

    #[test]
    fn a_freed_slot_rests_and_then_has_another_index() {
        let mut table = table(1);
        let owner = Arc::new(0);
        let first = table.allocate(&owner, START).unwrap();
        table.release(first, START);
        assert!(table.owner(first).is_none());
        let almost = START + (REST_TIME - Duration::from_nanos(1));
        assert!(table.allocate(&owner, almost).is_none());
        let second = table.allocate(&owner, START + REST_TIME).unwrap();
        assert_eq!(first.slot(), second.slot());
        assert_ne!(first, second);
    }

    #[test]
    fn the_slot_freed_first_is_used_first() {
        let mut table = table(2);
        let owner = Arc::new(0);
        let a = table.allocate(&owner, START).unwrap();
        let b = table.allocate(&owner, START).unwrap();
        table.release(b, START);
        table.release(a, START);
        assert_eq!(table.allocate(&owner, START + REST_TIME).unwrap().slot(), b.slot());
        assert_eq!(table.allocate(&owner, START + REST_TIME).unwrap().slot(), a.slot());
    }

    #[test]
    fn freeing_twice_does_not_lend_a_slot_twice() {
        let mut table = table(2);
        let owner = Arc::new(0);
        let a = table.allocate(&owner, START).unwrap();
        table.release(a, START);
        table.release(a, START);
        let later = START + REST_TIME;
        let b = table.allocate(&owner, later).unwrap();
        let c = table.allocate(&owner, later).unwrap();
        assert_ne!(b.slot(), c.slot());
    }
}
