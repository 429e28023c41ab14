//! A hierarchical timer wheel: who wants to be called at which moment.
//!
//! Time is cut into ticks of about a millisecond. Each level has 64 slots, each slot of a level is as
//! long as all of the level below. An entry stands in the level of the highest digit in which its tick
//! differs from the present one, and moves down as that comes near. So every operation takes
//! constant time, however many entries there are, and who has no entry costs nothing.

use std::time::Duration;

use wg_common::time::Now;

/// Entries are never early, and late by less than this.
pub const TICK: Duration = Duration::from_nanos(TICK_NS);

const TICK_NS: u64 = 1 << 20;
/// Bits of a digit of a tick: a level has this many slots as a power of two.
const DIGIT_BITS: u32 = 6;
const SLOT_COUNT: usize = 1 << DIGIT_BITS;
/// Enough digits for every tick that there is.
const LEVEL_COUNT: usize = (u64::BITS - TICK_NS.trailing_zeros() + 1).div_ceil(DIGIT_BITS) as usize;
/// The list of entries that are due at once; lists of slots come before it.
const DUE: usize = LEVEL_COUNT * SLOT_COUNT;
/// No entry.
const NONE: u32 = u32::MAX;

/// Names an entry, until that is removed or comes due.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Token(u32);

impl Token {
    /// As a number below [`u32::MAX`].
    pub const fn to_u32(self) -> u32 {
        self.0
    }

    /// The token that has this number.
    pub const fn from_u32(number: u32) -> Self {
        Self(number)
    }
}

/// Values that come due.
#[derive(Debug)]
pub struct Wheel<T> {
    /// The tick up to which everything has come due.
    elapsed: u64,
    entries: Vec<Entry<T>>,
    /// The first of the entries that are not in use.
    free: u32,
    len: usize,
    /// The first entry of each list.
    lists: Box<[u32]>,
    /// Bit *s* of level *l*: slot *s* is not empty.
    occupied: [u64; LEVEL_COUNT],
}

#[derive(Debug)]
struct Entry<T> {
    /// `None` if the entry is not in use.
    value: Option<T>,
    /// It comes due when this tick begins.
    tick: u64,
    list: usize,
    previous: u32,
    next: u32,
}

impl<T> Default for Wheel<T> {
    fn default() -> Self {
        Self {
            elapsed: 0,
            entries: Vec::new(),
            free: NONE,
            len: 0,
            lists: vec![NONE; DUE + 1].into(),
            occupied: [0; LEVEL_COUNT],
        }
    }
}

impl<T> Wheel<T> {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The values of all entries, in no order. Takes no time for entries that were in use before.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        // No entry has the number that stands for none.
        let entry = move |number: u32| self.entries.get(number as usize);
        let of_list = move |&first: &u32| {
            std::iter::successors(entry(first), move |before| entry(before.next))
        };
        self.lists.iter().flat_map(of_list).filter_map(|entry| entry.value.as_ref())
    }

    /// Has `value` come due at `at`.
    ///
    /// # Panics
    /// If there are as many entries as numbers.
    pub fn schedule(&mut self, value: T, at: Now) -> Token {
        let entry =
            Entry { value: Some(value), tick: tick(at), list: DUE, previous: NONE, next: NONE };
        let number = match self.free {
            NONE => {
                let number = u32::try_from(self.entries.len()).expect("memory ends before");
                assert!(number != NONE, "memory ends before the numbers");
                self.entries.push(entry);
                number
            }
            number => {
                self.free = self.entries[number as usize].next;
                self.entries[number as usize] = entry;
                number
            }
        };
        self.len += 1;
        self.link(number);
        Token(number)
    }

    /// Has an entry come due at `at` instead.
    ///
    /// # Panics
    /// If there is no such entry.
    pub fn reschedule(&mut self, token: Token, at: Now) {
        self.unlink(token.0);
        let entry = &mut self.entries[token.0 as usize];
        assert!(entry.value.is_some(), "the entry has come due or was cancelled");
        entry.tick = tick(at);
        self.link(token.0);
    }

    /// Removes an entry, and gives its value back.
    ///
    /// # Panics
    /// If there is no such entry.
    pub fn cancel(&mut self, token: Token) -> T {
        self.unlink(token.0);
        self.give_up(token.0)
    }

    /// A moment at which [`advance`](Self::advance) wants to be called, if there is an entry: when the
    /// next one comes due, or before, to move entries down.
    pub fn next(&self) -> Option<Now> {
        if self.lists[DUE] != NONE {
            return Some(begin(self.elapsed));
        }
        self.next_slot().map(|(_, first)| begin(first))
    }

    /// Takes the entries that are due at `now`; calling it too early does nothing.
    ///
    /// A clock that went back makes them wait again. This looks at every entry once.
    pub fn advance(&mut self, now: Now, due: &mut Vec<T>) {
        // A tick has passed when it has begun.
        let now = now.boot_ns() / TICK_NS;
        if now < self.elapsed {
            self.turn_back(now);
        }
        self.take(DUE, due);
        while let Some((list, first)) = self.next_slot().filter(|&(_, first)| first <= now) {
            self.elapsed = first;
            let mut number = self.lists[list];
            while number != NONE {
                let next = self.entries[number as usize].next;
                self.unlink(number);
                self.link(number);
                number = next;
            }
            self.take(DUE, due);
        }
        self.elapsed = now;
    }

    fn take(&mut self, list: usize, values: &mut Vec<T>) {
        while self.lists[list] != NONE {
            let number = self.lists[list];
            self.unlink(number);
            values.push(self.give_up(number));
        }
    }

    /// The slot that comes first, and its first tick: the lowest level has what comes next, and all its
    /// entries come after the present.
    fn next_slot(&self) -> Option<(usize, u64)> {
        let level = self.occupied.iter().position(|&occupied| occupied != 0)?;
        let slot = self.occupied[level].trailing_zeros() as usize;
        let bits = DIGIT_BITS * level as u32;
        // What all ticks of this level have in common stands above its digit.
        let common = self.elapsed >> (bits + DIGIT_BITS) << (bits + DIGIT_BITS);
        Some((level * SLOT_COUNT + slot, common | (slot as u64) << bits))
    }

    fn turn_back(&mut self, now: u64) {
        self.elapsed = now;
        self.lists.fill(NONE);
        self.occupied = [0; LEVEL_COUNT];
        for number in 0..self.entries.len() {
            if self.entries[number].value.is_some() {
                self.link(number as u32);
            }
        }
    }

    fn link(&mut self, number: u32) {
        let entry = &mut self.entries[number as usize];
        entry.list = if entry.tick <= self.elapsed {
            DUE
        } else {
            let highest = (u64::BITS - 1) - (entry.tick ^ self.elapsed).leading_zeros();
            let level = (highest / DIGIT_BITS) as usize;
            let slot = (entry.tick >> (DIGIT_BITS * level as u32)) as usize % SLOT_COUNT;
            self.occupied[level] |= 1 << slot;
            level * SLOT_COUNT + slot
        };
        let first = std::mem::replace(&mut self.lists[entry.list], number);
        (entry.previous, entry.next) = (NONE, first);
        if first != NONE {
            self.entries[first as usize].previous = number;
        }
    }

    fn unlink(&mut self, number: u32) {
        let Entry { list, previous, next, .. } = self.entries[number as usize];
        match previous {
            NONE => self.lists[list] = next,
            previous => self.entries[previous as usize].next = next,
        }
        if next != NONE {
            self.entries[next as usize].previous = previous;
        }
        if list != DUE && self.lists[list] == NONE {
            self.occupied[list / SLOT_COUNT] &= !(1 << (list % SLOT_COUNT));
        }
    }

    /// Frees an entry that stands in no list.
    fn give_up(&mut self, number: u32) -> T {
        let entry = &mut self.entries[number as usize];
        let value = entry.value.take().expect("a token names an entry that is in use");
        entry.next = std::mem::replace(&mut self.free, number);
        self.len -= 1;
        value
    }
}

/// The tick that begins at `at` or next after it.
fn tick(at: Now) -> u64 {
    at.boot_ns().div_ceil(TICK_NS)
}

fn begin(tick: u64) -> Now {
    Now::from_boot_ns(tick.saturating_mul(TICK_NS))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const START: Now = Now::from_boot_ns(1_000_000_000_000);
    const HOUR: Duration = Duration::from_secs(3600);

    fn advance(wheel: &mut Wheel<u32>, now: Now) -> Vec<u32> {
        let mut due = Vec::new();
        wheel.advance(now, &mut due);
        due.sort_unstable();
        due
    }

    #[test]
    fn an_entry_is_never_early_and_late_by_less_than_a_tick() {
        for after in [0, 1, 1_000, TICK_NS, 5_000_000_000, 3_600_000_000_000] {
            let mut wheel = Wheel::default();
            assert!(advance(&mut wheel, START).is_empty());
            let at = START + Duration::from_nanos(after);
            wheel.schedule(7, at);
            if after > 0 {
                assert!(advance(&mut wheel, Now::from_boot_ns(at.boot_ns() - 1)).is_empty());
            }
            assert_eq!(advance(&mut wheel, at + TICK), [7], "{after} ns");
            assert!(wheel.is_empty() && wheel.next().is_none());
        }
    }

    #[test]
    fn a_clock_that_went_back_makes_entries_wait_and_does_not_spin() {
        let mut wheel = Wheel::default();
        advance(&mut wheel, START + HOUR);
        wheel.schedule(1, START + HOUR + HOUR);
        // The clock of who schedules is behind already, then that of who advances.
        wheel.schedule(2, START + Duration::from_secs(10));
        assert!(advance(&mut wheel, START).is_empty());
        assert!(wheel.next() > Some(START));
        assert_eq!(advance(&mut wheel, START + Duration::from_secs(11)), [2]);
        assert_eq!(advance(&mut wheel, START + HOUR + HOUR + TICK), [1]);
    }

    #[test]
    fn the_end_of_time_is_no_end_of_the_wheel() {
        let mut wheel = Wheel::default();
        let token = wheel.schedule(1, Now::from_boot_ns(u64::MAX));
        assert!(advance(&mut wheel, Now::from_boot_ns(u64::MAX)).is_empty());
        assert_eq!(wheel.cancel(token), 1);
    }

    #[test]
    fn an_advance_looks_at_what_is_due_and_nothing_else() {
        // A million entries for later; each advance and each question passes without a look at them.
        let mut wheel = Wheel::default();
        advance(&mut wheel, START);
        for i in 0..1_000_000_u32 {
            wheel.schedule(i, START + HOUR + Duration::from_millis(u64::from(i % 1000)));
        }
        let mut wakes = 0;
        while wheel.len() == 1_000_000 {
            let next = wheel.next().unwrap();
            advance(&mut wheel, next);
            wakes += 1;
        }
        assert!(wakes <= LEVEL_COUNT, "{wakes} wake-ups before the first entry is due");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Schedule(i64),
        Reschedule(usize, i64),
        Cancel(usize),
        /// Forward if positive.
        Pass(i64),
        /// To where the wheel wants to be called.
        Follow,
    }

    /// Nanoseconds, over all scales.
    fn span() -> impl Strategy<Value = i64> {
        let magnitude = prop_oneof![
            0..3_000_000_i64,
            0..2_000_000_000_i64,
            0..600_000_000_000_i64,
            0..40_000_000_000_000_i64,
        ];
        (magnitude, prop::bool::weighted(0.15)).prop_map(|(ns, back)| if back { -ns } else { ns })
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => span().prop_map(Step::Schedule),
            2 => (any::<usize>(), span()).prop_map(|(i, ns)| Step::Reschedule(i, ns)),
            1 => any::<usize>().prop_map(Step::Cancel),
            3 => span().prop_map(Step::Pass),
            3 => Just(Step::Follow),
        ]
    }

    fn shift(now: Now, ns: i64) -> Now {
        Now::from_boot_ns(now.boot_ns().saturating_add_signed(ns))
    }

    proptest! {
        #[test]
        fn it_does_what_a_sorted_map_does(steps in prop::collection::vec(step(), 1..200)) {
            let mut wheel = Wheel::default();
            let mut now = START;
            advance(&mut wheel, now);
            let mut model: BTreeMap<u32, (Token, Now)> = BTreeMap::new();
            let nth = |model: &BTreeMap<u32, _>, i: usize| {
                (!model.is_empty()).then(|| *model.keys().nth(i % model.len()).unwrap())
            };
            for (id, step) in (0..).zip(steps) {
                match step {
                    Step::Schedule(ns) => {
                        let at = shift(now, ns);
                        model.insert(id, (wheel.schedule(id, at), at));
                        continue;
                    }
                    Step::Reschedule(i, ns) => {
                        if let Some(id) = nth(&model, i) {
                            let entry = model.get_mut(&id).unwrap();
                            entry.1 = shift(now, ns);
                            wheel.reschedule(entry.0, entry.1);
                        }
                        continue;
                    }
                    Step::Cancel(i) => {
                        if let Some(id) = nth(&model, i) {
                            let (token, _) = model.remove(&id).unwrap();
                            prop_assert_eq!(wheel.cancel(token), id);
                        }
                        continue;
                    }
                    Step::Pass(ns) => now = shift(now, ns),
                    Step::Follow => now = wheel.next().map_or(now, |next| next.max(now)),
                }
                let passed = now.boot_ns() / TICK_NS;
                let is_due = |at: Now| at.boot_ns().div_ceil(TICK_NS) <= passed;
                let expected: Vec<u32> =
                    model.iter().filter(|(_, (_, at))| is_due(*at)).map(|(id, _)| *id).collect();
                prop_assert_eq!(advance(&mut wheel, now), expected);
                model.retain(|_, (_, at)| !is_due(*at));
                prop_assert_eq!(wheel.len(), model.len());
                let mut values: Vec<u32> = wheel.values().copied().collect();
                values.sort_unstable();
                prop_assert!(values.iter().eq(model.keys()));
                match (wheel.next(), model.values().map(|(_, at)| *at).min()) {
                    (None, None) => {}
                    (Some(next), Some(first)) => {
                        prop_assert!(next > now, "it does not spin");
                        prop_assert!(next < first + TICK, "and does not oversleep");
                    }
                    (next, first) => prop_assert!(false, "{:?} and {:?}", next, first),
                }
            }
        }
    }
}
