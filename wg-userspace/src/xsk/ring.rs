//! A ring of entries between a producer and a consumer in different processes: here, we and the
//! kernel. Each end owns one index and reads the other's; an index counts on through 2^32, its low
//! bits are the place in the ring.
//!
//! Memory order is that of the kernel's `xsk_queue.h`: the owner of an index stores it with release
//! after touching the entries, the other side loads it with acquire before.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::memory::Memory;
use crate::sys::xdp::{Descriptor, RING_NEED_WAKEUP, RingMemory};

/// What lies in a ring.
///
/// # Safety
/// Any bytes must be a value of it: the other side writes them.
pub(super) unsafe trait Entry: Copy {}
// SAFETY: an integer.
unsafe impl Entry for u64 {}
// SAFETY: integers only.
unsafe impl Entry for Descriptor {}

/// The parts of a mapped ring, for either end.
#[derive(Debug)]
pub(super) struct Ring<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<T>,
    size: u32,
    /// Keeps the pointers valid.
    memory: Arc<Memory>,
}

// SAFETY: the pointers lead into `memory`, which lives as long and may be used from any thread.
// Indexes and flags are atomics; entries are touched only through `Producer` and `Consumer`.
unsafe impl<T: Entry> Send for Ring<T> {}

impl<T: Entry> Ring<T> {
    /// Finds the parts of a ring of `size` entries.
    ///
    /// # Panics
    /// If `size` is no power of two, or a part is not aligned or not within the memory.
    pub(super) fn new(at: RingMemory, size: u32) -> Self {
        assert!(size.is_power_of_two());
        let RingMemory { memory, producer, consumer, flags, entries } = at;
        let part = |offset: usize, align: usize, len: usize| {
            assert!(offset.is_multiple_of(align));
            assert!(offset.checked_add(len).is_some_and(|end| end <= memory.len()));
            // SAFETY: within the mapping, as just checked.
            unsafe { memory.base().add(offset) }
        };
        let index = |offset| part(offset, align_of::<AtomicU32>(), size_of::<AtomicU32>()).cast();
        let entries_len = size as usize * size_of::<T>();
        Self {
            producer: index(producer),
            consumer: index(consumer),
            flags: index(flags),
            entries: part(entries, align_of::<T>(), entries_len).cast(),
            size,
            memory: Arc::new(memory),
        }
    }

    /// A ring in memory of our own, all zero, for two ends that are both ours.
    pub(super) fn in_memory(size: u32) -> std::io::Result<Self> {
        const LINE: usize = 64;
        let memory = Memory::private(3 * LINE + size as usize * size_of::<T>())?;
        let at =
            RingMemory { memory, producer: 0, consumer: LINE, flags: 2 * LINE, entries: 3 * LINE };
        Ok(Self::new(at, size))
    }

    /// The same ring for its other end.
    pub(super) fn other_end(&self) -> Self {
        let &Self { producer, consumer, flags, entries, size, .. } = self;
        Self { producer, consumer, flags, entries, size, memory: Arc::clone(&self.memory) }
    }

    fn word(&self, word: NonNull<AtomicU32>) -> &AtomicU32 {
        // SAFETY: `word` is one of ours, aligned and within `memory` (`new` checked both), which
        // lives as long as `self`; everyone uses it atomically.
        unsafe { word.as_ref() }
    }

    fn producer(&self) -> &AtomicU32 {
        self.word(self.producer)
    }

    fn consumer(&self) -> &AtomicU32 {
        self.word(self.consumer)
    }

    fn entry(&self, index: u32) -> NonNull<T> {
        // SAFETY: the place is below `size`, a power of two; `new` checked that this many entries
        // are within the memory.
        unsafe { self.entries.add((index & (self.size - 1)) as usize) }
    }

    /// Entries between the two indexes now, whoever's they are. They may be corrupt or move.
    pub(super) fn snapshot(&self) -> Vec<T> {
        let (from, to) =
            (self.consumer().load(Ordering::Acquire), self.producer().load(Ordering::Acquire));
        (0..to.wrapping_sub(from).min(self.size))
            // SAFETY: inside the ring, see `entry`; any bytes are a value of `T`. It is called
            // before this process has an end that writes; should another process write at the same
            // time, we read torn integers, which the caller checks like all others.
            .map(|i| unsafe { self.entry(from.wrapping_add(i)).read_volatile() })
            .collect()
    }
}

/// The end that writes.
#[derive(Debug)]
pub(super) struct Producer<T> {
    ring: Ring<T>,
    /// Where the next entry goes; ahead of the ring's index by what is not submitted.
    next: u32,
    /// The consumer's index when last read.
    consumed: u32,
}

impl<T: Entry> Producer<T> {
    pub(super) fn new(ring: Ring<T>) -> Self {
        let next = ring.producer().load(Ordering::Relaxed);
        let consumed = ring.consumer().load(Ordering::Acquire);
        Self { ring, next, consumed }
    }

    /// Entries that the other side has not consumed, including those not submitted.
    pub(super) fn outstanding(&mut self) -> u32 {
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        self.known_outstanding()
    }

    fn known_outstanding(&self) -> u32 {
        // A consumer ahead of us is broken; then nothing is known to be free.
        let count = self.next.wrapping_sub(self.consumed);
        if count <= self.ring.size { count } else { self.ring.size }
    }

    /// Writes an entry; gives it back if the ring is full. It is seen after [`Producer::submit`].
    pub(super) fn write(&mut self, entry: T) -> Result<(), T> {
        if self.known_outstanding() == self.ring.size && self.outstanding() == self.ring.size {
            return Err(entry);
        }
        // SAFETY: inside the ring, see `Ring::entry`. The other side does not look here: it has
        // consumed this place (loaded with acquire in `outstanding`), and our index does not cover
        // it before `submit`. `&mut self` is the only producer of this process.
        unsafe { self.ring.entry(self.next).write(entry) };
        self.next = self.next.wrapping_add(1);
        Ok(())
    }

    /// Shows the other side what was written.
    pub(super) fn submit(&mut self) {
        self.ring.producer().store(self.next, Ordering::Release);
    }

    /// Whether the kernel asks to be called.
    pub(super) fn needs_wakeup(&self) -> bool {
        self.ring.word(self.ring.flags).load(Ordering::Relaxed) & RING_NEED_WAKEUP != 0
    }
}

impl<T: Entry> Consumer<T> {
    /// Asks the producer to call, or not to.
    pub(super) fn ask_for_wakeup(&self, asks: bool) {
        let flags = if asks { RING_NEED_WAKEUP } else { 0 };
        self.ring.word(self.ring.flags).store(flags, Ordering::Relaxed);
    }
}

/// The end that reads.
#[derive(Debug)]
pub(super) struct Consumer<T> {
    ring: Ring<T>,
    /// The next entry to read; ahead of the ring's index by what is not released.
    next: u32,
    /// The producer's index when last read.
    produced: u32,
}

impl<T: Entry> Consumer<T> {
    pub(super) fn new(ring: Ring<T>) -> Self {
        let next = ring.consumer().load(Ordering::Relaxed);
        Self { ring, next, produced: next }
    }

    /// Reads the next entry, if there is one.
    pub(super) fn read(&mut self) -> Option<T> {
        if self.produced == self.next {
            let produced = self.ring.producer().load(Ordering::Acquire);
            // A producer more than a whole ring ahead is broken. What lies there is read no
            // further than once round; callers check every entry.
            self.produced = if produced.wrapping_sub(self.next) <= self.ring.size {
                produced
            } else {
                self.next.wrapping_add(self.ring.size)
            };
            if self.produced == self.next {
                return None;
            }
        }
        // SAFETY: inside the ring, see `Ring::entry`; any bytes are a value of `T`. The producer
        // has submitted this place (loaded with acquire above) and does not write it again before
        // `release`. `&mut self` is the only consumer of this process.
        let entry = unsafe { self.ring.entry(self.next).read() };
        self.next = self.next.wrapping_add(1);
        Some(entry)
    }

    /// Gives back the places of what was read.
    pub(super) fn release(&mut self) {
        self.ring.consumer().store(self.next, Ordering::Release);
    }

    /// Whether nothing is left to read.
    pub(super) fn is_empty(&self) -> bool {
        self.ring.producer().load(Ordering::Acquire) == self.next
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn ring(size: u32) -> (Producer<u64>, Consumer<u64>) {
        let ring = Ring::in_memory(size).unwrap();
        (Producer::new(ring.other_end()), Consumer::new(ring))
    }

    #[test]
    fn entries_come_out_in_order_once_submitted() {
        let (mut producer, mut consumer) = ring(4);
        producer.write(1).unwrap();
        producer.write(2).unwrap();
        assert_eq!(consumer.read(), None);
        assert!(consumer.is_empty());
        producer.submit();
        assert!(!consumer.is_empty());
        assert_eq!([consumer.read(), consumer.read(), consumer.read()], [Some(1), Some(2), None]);
        assert_eq!(producer.outstanding(), 2);
        consumer.release();
        assert_eq!(producer.outstanding(), 0);
    }

    #[test]
    fn a_full_ring_gives_the_entry_back_until_places_are_released() {
        let (mut producer, mut consumer) = ring(2);
        producer.write(1).unwrap();
        producer.write(2).unwrap();
        producer.submit();
        assert_eq!(producer.write(3), Err(3));
        assert_eq!(consumer.read(), Some(1));
        assert_eq!(producer.write(3), Err(3));
        consumer.release();
        assert_eq!(producer.write(3), Ok(()));
        assert_eq!(producer.write(4), Err(4));
    }

    #[test]
    fn indexes_wrap_around() {
        let ring = Ring::<u64>::in_memory(4).unwrap();
        for index in [ring.producer(), ring.consumer()] {
            index.store(u32::MAX - 1, Ordering::Relaxed);
        }
        let (mut producer, mut consumer) =
            (Producer::new(ring.other_end()), Consumer::new(ring.other_end()));
        for i in 0..10 {
            producer.write(i).unwrap();
            producer.submit();
            assert_eq!(producer.outstanding(), 1);
            assert_eq!(consumer.read(), Some(i));
            consumer.release();
        }
    }

    #[test]
    fn a_broken_index_reads_no_more_than_once_round_and_writes_nothing() {
        let ring = Ring::<u64>::in_memory(4).unwrap();
        let (mut producer, mut consumer) =
            (Producer::new(ring.other_end()), Consumer::new(ring.other_end()));
        ring.consumer().store(7, Ordering::Relaxed);
        assert_eq!(producer.outstanding(), 4);
        assert_eq!(producer.write(1), Err(1));
        ring.producer().store(1000, Ordering::Relaxed);
        for _ in 0..4 {
            assert!(consumer.read().is_some());
        }
        assert_eq!(ring.snapshot().len(), 4);
    }

    #[test]
    fn two_threads_see_every_entry_whole_and_in_order() {
        const COUNT: u64 = 20_000;
        let give_up = Instant::now() + Duration::from_secs(60);
        let ring = Ring::<Descriptor>::in_memory(64).unwrap();
        let mut producer = Producer::new(ring.other_end());
        let mut consumer = Consumer::new(ring);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for i in 0..COUNT {
                    let entry = Descriptor { addr: i, len: i as u32, options: !(i as u32) };
                    while producer.write(entry).is_err() {
                        assert!(Instant::now() < give_up);
                        std::thread::yield_now();
                    }
                    producer.submit();
                }
            });
            let mut expected = 0;
            while expected < COUNT {
                let Some(got) = consumer.read() else {
                    assert!(Instant::now() < give_up);
                    std::thread::yield_now();
                    continue;
                };
                assert_eq!(
                    (got.addr, got.len, got.options),
                    (expected, expected as u32, !(expected as u32))
                );
                consumer.release();
                expected += 1;
            }
        });
    }
}
