//! A table of shared values by slot number that is read without locks.

use std::fmt;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;

/// Slots of a segment.
const SEGMENT_LEN: usize = 4096;

/// A table of `Arc<T>` by slot number. Readers take no lock; memory for 4096 slots at a time is
/// allocated by the first value that needs it.
pub struct SlotTable<T> {
    segments: Box<[OnceLock<Segment<T>>]>,
}

type Segment<T> = Box<[ArcSwapOption<T>]>;

impl<T> SlotTable<T> {
    /// An empty table with slots 0 to `capacity`, rounded up to whole segments.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { segments: (0..capacity.div_ceil(SEGMENT_LEN)).map(|_| OnceLock::new()).collect() }
    }

    /// Number of slots.
    pub fn capacity(&self) -> usize {
        self.segments.len() * SEGMENT_LEN
    }

    /// The value of a slot, or `None` if it has none or lies beyond the table.
    pub fn get(&self, slot: usize) -> Option<Arc<T>> {
        self.segments.get(slot / SEGMENT_LEN)?.get()?[slot % SEGMENT_LEN].load_full()
    }

    /// Puts a value into a slot and gives back the one that was there.
    ///
    /// # Panics
    /// If the slot lies beyond the table.
    pub fn set(&self, slot: usize, value: Arc<T>) -> Option<Arc<T>> {
        let segment = self.segments[slot / SEGMENT_LEN]
            .get_or_init(|| (0..SEGMENT_LEN).map(|_| ArcSwapOption::empty()).collect());
        segment[slot % SEGMENT_LEN].swap(Some(value))
    }

    /// Empties a slot and gives back the value that was there.
    pub fn clear(&self, slot: usize) -> Option<Arc<T>> {
        self.segments.get(slot / SEGMENT_LEN)?.get()?[slot % SEGMENT_LEN].swap(None)
    }
}

impl<T> fmt::Debug for SlotTable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotTable").field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_holds_what_was_set_last() {
        let table = SlotTable::with_capacity(10_000);
        assert_eq!(table.capacity(), 3 * SEGMENT_LEN);
        for slot in [0, 1, SEGMENT_LEN - 1, SEGMENT_LEN, 9_999] {
            assert!(table.get(slot).is_none());
            assert!(table.clear(slot).is_none());
            assert!(table.set(slot, Arc::new(slot)).is_none());
            assert_eq!(*table.get(slot).unwrap(), slot);
            assert_eq!(table.set(slot, Arc::new(slot + 1)).as_deref(), Some(&slot));
        }
        assert_eq!(*table.get(9_999).unwrap(), 10_000);
        assert_eq!(table.clear(9_999).as_deref(), Some(&10_000));
        assert!(table.get(9_999).is_none());
        assert!(table.get(9_998).is_none());
    }

    #[test]
    fn slots_beyond_the_table_are_empty() {
        let table = SlotTable::<()>::with_capacity(1);
        assert!(table.get(SEGMENT_LEN).is_none());
        assert!(table.get(usize::MAX).is_none());
        assert!(table.clear(usize::MAX).is_none());
    }

    #[test]
    fn segments_are_allocated_by_their_first_value() {
        let table = SlotTable::with_capacity(1 << 20);
        table.set(5 * SEGMENT_LEN, Arc::new(()));
        let allocated = table.segments.iter().filter(|segment| segment.get().is_some()).count();
        assert_eq!(allocated, 1);
    }
}
