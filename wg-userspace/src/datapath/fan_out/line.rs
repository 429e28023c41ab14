//! The bundles of one worker in one direction: oldest first, done or away.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use arrayvec::ArrayVec;
use wg_common::time::Now;

use super::{
    Bundle, DEPTH, LATE, REST_MAX, REST_MIN, SLOW, STEADY, Task, ToHelper, Turn, WORTHWHILE,
};
use crate::datapath::crew::{Crew, InFlight};

/// For so long a thread looks whether a bundle is back, before it sleeps and is woken.
const LOOKED_FOR: Duration = Duration::from_millis(1);

/// One worker's batches in one direction, in order.
pub struct Line<B> {
    crew: Arc<Crew>,
    helpers: Vec<Helper<B>>,
    /// Bundles away, with all helpers.
    away: usize,
    queue: VecDeque<Place<B>>,
    /// The number of the bundle at the front.
    first: u64,
    /// Last in, first out: the memory that was used last is likely to be in a cache still.
    free: Vec<Box<B>>,
    /// Free bundles that a caller wants to find between two looks at [`Line::has_room`].
    room: usize,
    turn: Turn,
}

struct Helper<B> {
    to: ToHelper<B>,
    /// The turns in which the bundles that it has were given to it.
    away: ArrayVec<u64, DEPTH>,
    /// Those of them that were given up.
    lost: usize,
    /// When it last gave something back, or was given something and had nothing.
    moved: Now,
    /// How long it rests, or did last.
    rest: Duration,
    /// Until when it gets no more, since it was slow.
    rests_until: Now,
}

impl<B> Helper<B> {
    fn new(to: ToHelper<B>) -> Self {
        let (moved, rests_until) = (Now::default(), Now::default());
        Self { to, away: ArrayVec::new(), lost: 0, moved, rest: Duration::ZERO, rests_until }
    }

    /// Lets it rest if it holds up the line, for longer than last time unless that is long ago.
    fn look_at_pace(&mut self, now: Now) {
        if now.since(self.moved) < SLOW || now < self.rests_until {
            return;
        }
        self.rest = match now.since(self.rests_until) < STEADY {
            true => (2 * self.rest).clamp(REST_MIN, REST_MAX),
            false => REST_MIN,
        };
        self.rests_until = now + self.rest;
    }
}

enum Place<B> {
    /// A helper has it.
    Away {
        helper: usize,
        packet_count: usize,
        since: Now,
    },
    Done {
        bundle: Box<B>,
        since: Now,
    },
}

impl<B> Place<B> {
    fn since(&self) -> Now {
        match self {
            Place::Away { since, .. } | Place::Done { since, .. } => *since,
        }
    }
}

/// What is released next.
pub enum Head<B> {
    /// A bundle that was worked on; it goes back by [`Line::recycle`].
    Done(Box<B>),
    /// So many packets were given to a helper that did not give them back in time.
    Lost(usize),
}

impl<B: Bundle> Line<B> {
    /// A line that gives nothing away.
    pub fn alone(crew: Arc<Crew>) -> Self {
        Self::new(crew, Vec::new(), 0, || unreachable!("it has no bundles"), 0)
    }

    /// A line with these helpers and so many bundles, of which the caller needs `room` at once. Without helpers
    /// none are made.
    pub fn new(
        crew: Arc<Crew>,
        helpers: Vec<ToHelper<B>>,
        bundle_count: usize,
        bundle: impl Fn() -> B,
        room: usize,
    ) -> Self {
        let helpers: Vec<_> = helpers.into_iter().map(Helper::new).collect();
        let bundle_count = if helpers.is_empty() { 0 } else { bundle_count };
        Self {
            crew,
            helpers,
            away: 0,
            queue: VecDeque::with_capacity(bundle_count),
            first: 0,
            free: (0..bundle_count).map(|_| Box::new(bundle())).collect(),
            room,
            turn: Turn::default(),
        }
    }

    /// Takes note of the turn that begins.
    #[inline]
    pub fn begin_turn(&mut self, turn: Turn) {
        self.turn = turn;
    }

    /// Whether a batch of so many packets is to go by a bundle, and not be worked on where it lies.
    #[inline]
    pub fn wants(&self, packet_count: usize, now: Now) -> bool {
        !self.queue.is_empty()
            || self.may_give(packet_count)
                && self.free.len() > self.room
                && self.free_helper(now).is_some()
    }

    /// Whether more may be taken in: else what waits has to be released first.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.queue.is_empty() || self.free.len() >= self.room
    }

    /// A bundle to fill, if there is one.
    pub fn take(&mut self) -> Option<Box<B>> {
        self.free.pop()
    }

    /// Puts a bundle at the end of the line, and gives it to a helper or works on it. Says whether it was given
    /// away.
    pub fn submit(&mut self, mut bundle: Box<B>, now: Now) -> bool {
        let packet_count = bundle.len();
        // One is left for this worker.
        let gives = self.may_give(packet_count) && !self.free.is_empty();
        if let Some(at) = if gives { self.free_helper(now) } else { None } {
            let number = self.first + self.queue.len() as u64;
            let helper = &mut self.helpers[at];
            match helper.to.tasks.push(Task { number, bundle }) {
                Ok(()) => {
                    if helper.away.is_empty() {
                        helper.moved = now;
                    }
                    helper.away.push(self.turn.number);
                    self.away += 1;
                    self.queue.push_back(Place::Away { helper: at, packet_count, since: now });
                    self.crew.rouse(helper.to.helper);
                    return true;
                }
                Err(rtrb::PushError::Full(task)) => bundle = task.bundle,
            }
        }
        bundle.work();
        self.queue.push_back(Place::Done { bundle, since: now });
        false
    }

    /// The front of the line, if it can be released.
    pub fn next(&mut self, now: Now) -> Option<Head<B>> {
        self.collect(now);
        if let Place::Away { helper, since, .. } = *self.queue.front()? {
            self.helpers[helper].look_at_pace(now);
            if now.since(since) < LATE {
                return None;
            }
        }
        let front = self.queue.pop_front()?;
        self.first += 1;
        Some(match front {
            Place::Done { bundle, .. } => Head::Done(bundle),
            Place::Away { helper, packet_count, .. } => {
                self.helpers[helper].lost += 1;
                Head::Lost(packet_count)
            }
        })
    }

    /// Takes a bundle back that was released.
    pub fn recycle(&mut self, mut bundle: Box<B>) {
        bundle.clear();
        self.free.push(bundle);
    }

    /// Whether nothing waits to be released.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether a bundle is away that will be back in a moment.
    pub fn is_awaited(&self, now: Now) -> bool {
        self.queue.front().is_some_and(|front| now.since(front.since()) < LOOKED_FOR)
    }

    /// Whether a helper has given something back.
    pub fn is_answered(&self) -> bool {
        self.away > 0 && self.helpers.iter().any(|helper| !helper.to.back.is_empty())
    }

    /// What is in flight.
    pub fn in_flight(&self) -> InFlight {
        let unsent_since = self.queue.front().map(Place::since);
        let away_since = match self.away {
            0 => None,
            _ => self.helpers.iter().filter_map(|helper| helper.away.first().copied()).min(),
        };
        InFlight { unsent_since, away_since }
    }

    #[inline]
    fn may_give(&self, packet_count: usize) -> bool {
        self.turn.is_saturated && packet_count >= WORTHWHILE
    }

    /// Of the helpers that have time and room, the first of those that have the least to do for this line.
    fn free_helper(&self, now: Now) -> Option<usize> {
        let may = |Helper { to, away, lost, rests_until, .. }: &Helper<B>| {
            !away.is_full()
                && *lost == 0
                && now >= *rests_until
                && self.crew.has_time(to.helper)
                && self.crew.moves(to.helper, now)
        };
        let helpers = self.helpers.iter().enumerate().filter(|(_, helper)| may(helper));
        helpers.min_by_key(|(_, helper)| helper.away.len()).map(|(at, _)| at)
    }

    /// Takes what helpers have given back.
    fn collect(&mut self, now: Now) {
        if self.away == 0 {
            return;
        }
        for helper in &mut self.helpers {
            while !helper.away.is_empty()
                && let Ok(Task { number, mut bundle }) = helper.to.back.pop()
            {
                helper.away.remove(0);
                helper.moved = now;
                self.away -= 1;
                let place = number.checked_sub(self.first);
                match place.and_then(|place| self.queue.get_mut(place as usize)) {
                    Some(place) => *place = Place::Done { bundle, since: place.since() },
                    // It was given up.
                    None => {
                        helper.lost -= 1;
                        bundle.clear();
                        self.free.push(bundle);
                    }
                }
            }
        }
    }
}
