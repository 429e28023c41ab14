//! The replay window (whitepaper §5.4.6, after RFC 6479): which counters of a keypair have come.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use wg_common::id::Counter;
use wg_common::protocol::{REJECT_AFTER_MESSAGES, REPLAY_WINDOW_LEN};

const WORD_BITS: u64 = u64::BITS as u64;
/// Words of 64 counters in a window.
pub(super) const WORD_COUNT: usize = (REPLAY_WINDOW_LEN / WORD_BITS) as usize;
const _: () = assert!(
    REPLAY_WINDOW_LEN.is_power_of_two() && REPLAY_WINDOW_LEN.is_multiple_of(WORD_BITS),
    "counters map to bits by their low bits"
);

/// Remembers which of the last [`REPLAY_WINDOW_LEN`] counters, up to the greatest that has come,
/// were accepted.
///
/// Only one thread at a time may call [`accept`](Self::accept): the window is made of atomics so that
/// it can live in a shared keypair, not so that two threads could move it. A keypair's home worker gets
/// it by [`Keypair::receive`](super::Keypair::receive).
///
/// All 8192 counters are usable; the kernel clears whole words and so has 8128 of as many bits.
#[derive(Debug)]
pub struct ReplayWindow {
    /// One more than the greatest accepted counter; 0 before the first.
    end: AtomicU64,
    /// Bit `counter % REPLAY_WINDOW_LEN` says whether the counter was accepted; bits of counters
    /// from `end` on are stale, and cleared when the window moves over them.
    seen: [AtomicU64; WORD_COUNT],
}

impl ReplayWindow {
    /// A window that nothing has come to.
    pub fn new() -> Self {
        Self { end: AtomicU64::new(0), seen: [const { AtomicU64::new(0) }; WORD_COUNT] }
    }

    /// Whether [`accept`](Self::accept) would accept this counter now.
    #[inline]
    pub fn would_accept(&self, Counter(counter): Counter) -> bool {
        let end = self.end.load(Relaxed);
        if counter >= end {
            return counter < REJECT_AFTER_MESSAGES;
        }
        end - counter <= REPLAY_WINDOW_LEN && {
            let (word, mask) = place(counter);
            self.seen[word].load(Relaxed) & mask == 0
        }
    }

    /// Takes note of a counter and says whether it is new: neither seen before, nor older than the
    /// window, nor beyond [`REJECT_AFTER_MESSAGES`].
    ///
    /// To be called only after the packet's tag has proved right.
    #[inline]
    pub fn accept(&self, Counter(counter): Counter) -> bool {
        if !self.would_accept(Counter(counter)) {
            return false;
        }
        let end = self.end.load(Relaxed);
        if counter >= end {
            // Its own bit is set below, whatever it is.
            self.clear(end, counter - end);
            self.end.store(counter + 1, Relaxed);
        }
        let (word, mask) = place(counter);
        self.seen[word].store(self.seen[word].load(Relaxed) | mask, Relaxed);
        true
    }

    /// The window as it stands, for its next holder. To be called when nobody moves it any more.
    pub(super) fn copy(&self) -> Self {
        let seen = std::array::from_fn(|word| AtomicU64::new(self.seen[word].load(Relaxed)));
        Self { end: AtomicU64::new(self.end.load(Relaxed)), seen }
    }

    /// What stands in a window: one more than the greatest accepted counter, and the words of bits.
    pub(super) fn parts(&self) -> (u64, impl Iterator<Item = u64>) {
        (self.end.load(Relaxed), self.seen.iter().map(|word| word.load(Relaxed)))
    }

    /// The window in which these stand; `None` if none can come to hold them.
    pub(super) fn from_parts(end: u64, seen: [u64; WORD_COUNT]) -> Option<Self> {
        if end > REJECT_AFTER_MESSAGES {
            return None;
        }
        // The greatest counter was accepted, and none beyond it.
        if let Some(greatest) = end.checked_sub(1) {
            let (word, mask) = place(greatest);
            if seen[word] & mask == 0 {
                return None;
            }
        }
        if end < REPLAY_WINDOW_LEN {
            let (word, mask) = place(end);
            if seen[word] & !(mask - 1) != 0 || seen[word + 1..].iter().any(|&word| word != 0) {
                return None;
            }
        }
        Some(Self { end: AtomicU64::new(end), seen: seen.map(AtomicU64::new) })
    }

    /// Clears the bits of `count` counters from `first` on.
    #[inline]
    fn clear(&self, first: u64, count: u64) {
        if count >= REPLAY_WINDOW_LEN {
            self.seen.iter().for_each(|word| word.store(0, Relaxed));
            return;
        }
        let (mut at, end) = (first, first + count);
        while at < end {
            // Up to the end of this word, or of the run if that comes first.
            let bits = (WORD_BITS - at % WORD_BITS).min(end - at);
            let (word, lowest) = place(at);
            let run = (u64::MAX >> (WORD_BITS - bits)) * lowest;
            self.seen[word].store(self.seen[word].load(Relaxed) & !run, Relaxed);
            at += bits;
        }
    }
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self::new()
    }
}

/// The word of a counter's bit, and the bit in it.
#[inline]
fn place(counter: u64) -> (usize, u64) {
    ((counter / WORD_BITS) as usize % WORD_COUNT, 1 << (counter % WORD_BITS))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const LEN: u64 = REPLAY_WINDOW_LEN;

    /// The obvious model: every counter ever accepted.
    #[derive(Default)]
    struct Model {
        accepted: HashSet<u64>,
        greatest: Option<u64>,
    }

    impl Model {
        fn accept(&mut self, counter: u64) -> bool {
            let too_old = self.greatest.is_some_and(|g| counter < g && g - counter >= LEN);
            let ok = counter < REJECT_AFTER_MESSAGES && !too_old && self.accepted.insert(counter);
            if ok {
                self.greatest = self.greatest.max(Some(counter));
            }
            ok
        }
    }

    /// What the next packet's counter does, relative to the greatest so far.
    #[derive(Clone, Debug)]
    enum Step {
        Back(u64),
        Forward(u64),
        Exactly(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            8 => (0..200_u64).prop_map(Step::Back),
            8 => (0..200_u64).prop_map(Step::Forward),
            2 => (LEN - 70..LEN + 70).prop_map(Step::Back),
            2 => (LEN - 70..LEN + 70).prop_map(Step::Forward),
            1 => (0..3 * LEN).prop_map(Step::Back),
            1 => (0..3 * LEN).prop_map(Step::Forward),
            1 => (0..u64::MAX / 64).prop_map(Step::Forward),
            1 => prop_oneof![
                Just(0),
                Just(1),
                Just(REJECT_AFTER_MESSAGES - 1),
                Just(REJECT_AFTER_MESSAGES),
                Just(u64::MAX),
            ].prop_map(Step::Exactly),
        ];
        prop::collection::vec(step, 0..600)
    }

    proptest! {
        #[test]
        fn the_window_agrees_with_a_set(start in 0..10 * LEN, steps in steps()) {
            let (window, mut model) = (ReplayWindow::new(), Model::default());
            prop_assert_eq!(window.accept(Counter(start)), model.accept(start));
            for step in steps {
                let greatest = model.greatest.unwrap();
                let counter = match step {
                    Step::Back(by) => greatest.saturating_sub(by),
                    Step::Forward(by) => greatest.saturating_add(by),
                    Step::Exactly(counter) => counter,
                };
                let counter = Counter(counter);
                let would = window.would_accept(counter);
                let expected = model.accept(counter.0);
                prop_assert_eq!(would, expected, "would_accept at {}: {:?}", greatest, counter);
                prop_assert_eq!(window.accept(counter), expected, "accept at {}: {:?}", greatest, counter);
            }
        }
    }

    #[track_caller]
    fn check(window: &ReplayWindow, packets: impl IntoIterator<Item = (u64, bool)>) {
        for (counter, ok) in packets {
            assert_eq!(window.would_accept(Counter(counter)), ok, "would_accept({counter})");
            assert_eq!(window.accept(Counter(counter)), ok, "accept({counter})");
        }
    }

    fn moved(window: &ReplayWindow) -> Option<ReplayWindow> {
        let (end, seen) = window.parts();
        ReplayWindow::from_parts(end, seen.collect::<Vec<_>>().try_into().unwrap())
    }

    proptest! {
        #[test]
        fn a_window_that_moved_answers_as_before(start in 0..10 * LEN, steps in steps()) {
            let window = ReplayWindow::new();
            let mut greatest = start;
            let mut counters = vec![start];
            for step in steps {
                counters.push(match step {
                    Step::Back(by) => greatest.saturating_sub(by),
                    Step::Forward(by) => greatest.saturating_add(by),
                    Step::Exactly(counter) => counter,
                });
                greatest = greatest.max(counters[counters.len() - 1]);
            }
            for &counter in &counters {
                window.accept(Counter(counter));
            }
            let moved = moved(&window).expect("what accept makes is consistent");
            let ends = [window.end.load(Relaxed), moved.end.load(Relaxed)];
            prop_assert_eq!(ends[0], ends[1]);
            let around = (ends[0].saturating_sub(LEN + 2)..ends[0] + 2).chain(counters);
            for counter in around.map(Counter) {
                prop_assert_eq!(window.would_accept(counter), moved.would_accept(counter));
            }
        }
    }

    #[test]
    fn windows_that_cannot_be_are_refused() {
        let seen = |words: &[(usize, u64)]| {
            let mut seen = [0; WORD_COUNT];
            words.iter().for_each(|&(word, bits)| seen[word] = bits);
            seen
        };
        let consistent = |end, words: &[_]| ReplayWindow::from_parts(end, seen(words)).is_some();
        assert!(consistent(0, &[]) && consistent(1, &[(0, 1)]) && consistent(3, &[(0, 0b101)]));
        assert!(consistent(65, &[(0, 7), (1, 1)]) && consistent(64, &[(0, 1 << 63)]));
        assert!(!consistent(1, &[]) && !consistent(3, &[(0, 0b11)]), "the greatest has not come");
        assert!(!consistent(0, &[(0, 1)]) && !consistent(1, &[(0, 3)]), "one beyond it has come");
        assert!(!consistent(64, &[(0, 1 << 63), (1, 1)]) && !consistent(1, &[(0, 1), (127, 1)]));
        // Beyond the first round every bit has a meaning.
        assert!(consistent(LEN + 1, &[(0, u64::MAX), (127, u64::MAX)]));
        assert!(consistent(LEN, &[(127, u64::MAX)]) && !consistent(LEN, &[(0, 1)]));
        let last = place(REJECT_AFTER_MESSAGES - 1);
        assert!(consistent(REJECT_AFTER_MESSAGES, &[last]));
        let beyond = place(REJECT_AFTER_MESSAGES);
        assert!(!consistent(REJECT_AFTER_MESSAGES + 1, &[beyond]));
    }

    #[test]
    fn every_counter_is_accepted_once() {
        let window = ReplayWindow::new();
        check(&window, [(0, true), (0, false), (1, true), (1, false), (0, false)]);
        check(&window, [(9, true), (7, true), (8, true), (8, false), (7, false), (9, false)]);
        check(&window, [(2, true), (2, false)]);
    }

    #[test]
    fn the_window_reaches_back_exactly_its_length() {
        let window = ReplayWindow::new();
        check(&window, [(LEN, true), (0, false), (1, true), (1, false)]);
        check(&window, [(LEN - 1, true), (LEN + 1, true), (1, false), (2, true)]);
        check(&window, [(4 * LEN, true), (3 * LEN, false), (3 * LEN + 1, true)]);
        check(&window, [(10, false), (3 * LEN + 1, false), (4 * LEN, false)]);
    }

    #[test]
    fn a_full_window_that_came_in_order_still_takes_its_oldest() {
        let window = ReplayWindow::new();
        check(&window, (1..LEN).map(|counter| (counter, true)));
        check(&window, [(0, true), (0, false), (LEN, true), (0, false), (1, false)]);
    }

    #[test]
    fn packets_in_reverse_order_are_all_accepted_within_the_window() {
        let window = ReplayWindow::new();
        check(&window, (0..LEN).rev().map(|counter| (counter, true)));
        check(&window, (0..LEN).rev().map(|counter| (counter, false)));
        let window = ReplayWindow::new();
        check(&window, (1..=LEN).rev().map(|counter| (counter, true)));
        check(&window, [(0, false), (LEN + 1, true), (1, false)]);
    }

    #[test]
    fn a_jump_forgets_only_what_it_leaves_behind() {
        let window = ReplayWindow::new();
        check(&window, (0..LEN).map(|counter| (counter, true)));
        // Half a window further: the upper half is remembered, the new half is fresh.
        check(&window, [(LEN + LEN / 2 - 1, true)]);
        check(&window, (LEN / 2..LEN).map(|counter| (counter, false)));
        check(&window, (LEN..LEN + LEN / 2 - 1).map(|counter| (counter, true)));
        // Many windows further, onto bits that were all set.
        check(&window, [(100 * LEN - 1, true)]);
        check(&window, (99 * LEN..100 * LEN - 1).map(|counter| (counter, true)));
    }

    #[test]
    fn no_counter_from_reject_after_messages_on_is_accepted() {
        const END: u64 = REJECT_AFTER_MESSAGES;
        let window = ReplayWindow::new();
        check(&window, [(END, false), (u64::MAX, false), (0, true)]);
        check(&window, [(END - 1, true), (END, false), (END - 1, false), (END + 1, false)]);
        check(&window, [(u64::MAX, false), (END - 2, true), (END - LEN, true)]);
        check(&window, [(END - LEN - 1, false), (0, false)]);
    }
}
