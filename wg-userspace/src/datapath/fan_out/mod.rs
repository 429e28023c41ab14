//! One worker's batches, sealed and opened by several threads, and released in order.
//!
//! A NIC puts the packets of one tunnel on one queue, and their replay window is at one worker: alone, a
//! tunnel is as fast as one core. A thread that is saturated therefore gives batches to threads that have
//! time. Those do nothing but AEAD. Everything that must be in order or has one writer stays at the worker:
//! before a batch is given away it is routed, its counters are reserved and its headers are written, or its
//! keypairs are found; after it is back the replay window, endpoints, timers, the TUN device and sending.
//!
//! A batch travels as a **bundle**: memory that is made once and moves by its box, with all that is to be
//! known of the batch. The worker has a [`Line`] of them in each direction, oldest first. Only the one at the
//! front is released; those behind it wait, also if they are done. Nobody waits for anybody:
//!
//! - As long as the thread is not saturated, or nobody has time, or a batch is small, and the line is empty,
//!   nothing of this happens: the batch is sealed or opened where it lies. So there is no latency at low load.
//! - Otherwise a batch goes to a thread that has time and room in its ring (`DEPTH`), the one that has the least
//!   to do, or, if there is none, is done by the worker itself, and takes its place in the line. So the work is
//!   shared by how fast each is, and a bundle holds keys only while it is with a helper.
//! - A bundle that does not come back for `LATE` is given up: its packets are counted as dropped, and the
//!   helper gets no more until it has given back what it has.
//! - A helper that keeps the front of the line and gives nothing back for `SLOW` gets no more for a while, from
//!   `REST_MIN` to `REST_MAX`: its core is shared with somebody, and one thread alone is faster than one that waits.
//! - A helper takes few bundles a turn, and only one if its own packets leave no time; then nobody gives it more.
//! - Who has time says so in [`Crew`]; who sleeps is woken, by who gives and by who gives back. A helper
//!   looks for more for a little while before it sleeps again.
//!
//! What a batch may do is asked again when it is released, as if it had come just then: after a pause, a
//! break of time or a hand-over it is dropped with the reason, and the helper does not seal or open with a
//! keypair that ended meanwhile. [`Crew::all_turned_since`] and [`Crew::obeys_since`] count what is in
//! flight.

mod duty;
mod line;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use wg_common::id::WorkerId;

use super::crew::Crew;

pub use duty::{Duty, Turn};
pub use line::{Head, Line};

/// Bundles that one line has with one helper: one in work, and so many that it has something to do while the
/// worker opens or seals one itself and does the rest for several.
pub(in crate::datapath) const DEPTH: usize = 3;
/// Threads that may help one worker: so many that what is left to it takes all of its time.
const HELPERS_MAX: usize = 15;
/// Packets below which a batch is not given away: then the way there and back costs as much as it saves.
const WORTHWHILE: usize = 16;
/// A bundle that is away for so long is given up. Longer than a scheduler takes a core away, much shorter than
/// a stalled flow needs to recover.
const LATE: Duration = Duration::from_millis(50);
/// A helper that gives nothing back for so long holds up the line: several times what a bundle takes it if it has
/// its core.
const SLOW: Duration = Duration::from_millis(1);
/// A helper that was slow gets nothing for a while. Its core is not its own at present, and whoever waits for it
/// loses more than it gains. The first time it is as long as a scheduler takes the core away;
const REST_MIN: Duration = Duration::from_millis(5);
/// twice as long if it is slow again, until what is lost at each new try does not count;
const REST_MAX: Duration = Duration::from_millis(320);
/// and after so long without, as at first.
const STEADY: Duration = Duration::from_secs(1);

/// The packets of a batch, with what has to be known to seal or open them.
pub trait Bundle: Send {
    /// Number of packets.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Seals or opens them, unless a keypair among them has ended, and lets go of all keypairs.
    fn work(&mut self);

    /// Forgets the batch.
    fn clear(&mut self);
}

/// A bundle on its way, by its number in its line.
struct Task<B> {
    number: u64,
    bundle: Box<B>,
}

/// A line's ends of the rings to and from one helper.
pub struct ToHelper<B> {
    helper: WorkerId,
    tasks: rtrb::Producer<Task<B>>,
    back: rtrb::Consumer<Task<B>>,
}

/// A helper's ends of the rings from and to one line.
pub struct FromHome<B> {
    home: WorkerId,
    tasks: rtrb::Consumer<Task<B>>,
    back: rtrb::Producer<Task<B>>,
}

/// What one worker has of the rings between all workers of its device, in one direction.
pub struct Rings<B> {
    to: Vec<ToHelper<B>>,
    from: Vec<FromHome<B>>,
}

impl<B> Default for Rings<B> {
    fn default() -> Self {
        Self { to: Vec::new(), from: Vec::new() }
    }
}

impl<B> Rings<B> {
    /// Rings between `worker_count` workers.
    pub fn between(worker_count: usize) -> VecDeque<Self> {
        let mut all: VecDeque<Self> = (0..worker_count).map(|_| Self::default()).collect();
        for home in 0..worker_count {
            // Each begins with another helper.
            for offset in 1..worker_count.min(1 + HELPERS_MAX) {
                let helper = (home + offset) % worker_count;
                let (tasks_to, tasks) = rtrb::RingBuffer::new(DEPTH);
                let (back, back_from) = rtrb::RingBuffer::new(DEPTH);
                let id = |number: usize| WorkerId(number as u16);
                let to = ToHelper { helper: id(helper), tasks: tasks_to, back: back_from };
                all[home].to.push(to);
                all[helper].from.push(FromHome { home: id(home), tasks, back });
            }
        }
        all
    }

    /// Those to helpers, and those from the workers that this one helps.
    pub fn split(self) -> (Vec<ToHelper<B>>, Vec<FromHome<B>>) {
        (self.to, self.from)
    }
}

/// Where bundles come from to be worked on.
pub trait Help: Send {
    /// Works on the oldest bundle, if there is one, and gives it back.
    fn help(&mut self, crew: &Crew) -> bool;

    /// Whether a bundle waits.
    fn is_wanted(&self) -> bool;
}

impl<B: Bundle> Help for FromHome<B> {
    fn help(&mut self, crew: &Crew) -> bool {
        let Ok(mut task) = self.tasks.pop() else { return false };
        task.bundle.work();
        let back = self.back.push(task);
        debug_assert!(back.is_ok(), "the ring is as long as there are bundles away");
        crew.rouse(self.home);
        true
    }

    fn is_wanted(&self) -> bool {
        !self.tasks.is_empty()
    }
}

/// One worker's help for the other workers of its device.
#[derive(Default)]
pub struct Helping {
    from: Vec<Box<dyn Help>>,
    /// The ring that is looked at first.
    first: usize,
}

impl Helping {
    /// Also helps these.
    pub fn add<B: Bundle + 'static>(&mut self, from: Vec<FromHome<B>>) {
        self.from.extend(from.into_iter().map(|from| Box::new(from) as Box<dyn Help>));
    }

    /// Works on bundles of others, as many as `budget` says, in turn, and takes them from it. Says whether
    /// there were any.
    pub fn help(&mut self, crew: &Crew, budget: &mut usize) -> bool {
        let (count, mut in_vain) = (self.from.len(), 0);
        let before = *budget;
        while *budget > 0 && in_vain < count {
            if self.from[self.first].help(crew) {
                (*budget, in_vain) = (*budget - 1, 0);
            } else {
                in_vain += 1;
            }
            self.first = if self.first + 1 < count { self.first + 1 } else { 0 };
        }
        *budget < before
    }

    /// Whether somebody waits for help.
    pub fn is_wanted(&self) -> bool {
        self.from.iter().any(|from| from.is_wanted())
    }
}
