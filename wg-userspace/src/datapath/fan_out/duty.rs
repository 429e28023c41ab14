//! Whether a thread is saturated, has time for others, or may sleep.

use std::sync::Arc;
use std::time::Duration;

use wg_common::id::WorkerId;
use wg_common::time::Now;

use crate::datapath::crew::{Crew, InFlight};

/// A thread that had more to do than it did in so many turns, one after the other, is saturated.
const SATURATED_TURNS: u32 = 8;
/// Turns beyond that which are remembered: one turn that left nothing does not end it.
const REMEMBERED_TURNS: u32 = 2 * SATURATED_TURNS;
/// Bundles that a thread takes in one turn from others, if its own packets leave time.
const BUDGET: usize = 2;
/// A thread that has helped looks for more for so long before it sleeps: being woken takes as long as several
/// bundles.
const LINGER: Duration = Duration::from_micros(100);

/// A turn, as lines see it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turn {
    /// Its number, from [`Crew::turns`].
    pub number: u64,
    /// Whether the thread is saturated.
    pub is_saturated: bool,
}

/// What one thread knows of its own load.
pub struct Duty {
    id: WorkerId,
    crew: Arc<Crew>,
    busy_turns: u32,
    /// When it last worked for others.
    helped: Now,
}

impl Duty {
    /// Of this thread.
    pub fn new(id: WorkerId, crew: Arc<Crew>) -> Self {
        Self { id, crew, busy_turns: 0, helped: Now::default() }
    }

    /// Begins a turn with so much in flight.
    pub fn begin_turn(&mut self, in_flight: InFlight) -> Turn {
        self.crew.set_in_flight(self.id, in_flight);
        self.crew.begin_turn(self.id);
        let is_saturated = self.busy_turns >= SATURATED_TURNS;
        Turn { number: self.crew.turns(self.id), is_saturated }
    }

    /// How many bundles of others it may work on in a turn after which its own sources may have `more`.
    pub fn budget(&self, more: bool) -> usize {
        if more { 1 } else { BUDGET }
    }

    /// Ends a turn after which its own sources may have `more`, and in which it `helped`. Says whether to
    /// go on without sleeping.
    pub fn end_turn(&mut self, more: bool, helped: bool, now: Now) -> bool {
        self.busy_turns =
            if more { (self.busy_turns + 1).min(REMEMBERED_TURNS) } else { self.busy_turns / 2 };
        self.crew.set_awake(self.id, !more);
        if helped {
            self.helped = now;
        }
        more || now.since(self.helped) < LINGER
    }

    /// Says that the thread is about to sleep, unless `has_something` says that there is something to do: it
    /// is asked after others know.
    pub fn may_sleep(&self, has_something: impl FnOnce() -> bool) -> bool {
        self.crew.set_asleep(self.id);
        let may = !has_something();
        if !may {
            self.wake();
        }
        may
    }

    /// Says that the thread is awake again.
    pub fn wake(&self) {
        self.crew.set_awake(self.id, true);
    }
}
