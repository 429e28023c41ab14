//! Who is served at a time, and who is let go for somebody new.
//!
//! There is always room for one more: when the last place is taken, the client that has been silent
//! for the longest loses its own. Those that are in the middle of nothing go first; then those that
//! stall in the middle of a request or an answer. Who is being served, or gets on, stays.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// Clients at a time, with the one that is new.
const CLIENTS_MAX: usize = 64;
/// Who gets no further for so long in the middle of something stalls.
pub const STALLED: Duration = Duration::from_secs(1);

/// The places of all clients.
#[derive(Debug, Default)]
pub struct Places {
    taken: Rc<RefCell<Vec<Rc<Seat>>>>,
}

/// A client's place, until it is dropped.
#[derive(Debug)]
pub struct Place {
    seat: Rc<Seat>,
    all: Rc<RefCell<Vec<Rc<Seat>>>>,
}

#[derive(Debug)]
struct Seat {
    doing: Cell<Doing>,
    /// When it last got on with that.
    since: Cell<Instant>,
    let_go: Notify,
    is_let_go: Cell<bool>,
}

/// What a client is in the middle of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Doing {
    /// It may ask for something.
    Nothing,
    /// It sends a request, or reads an answer.
    Talking,
    /// It waits for us.
    Served,
}

impl Places {
    /// Whether one more may come.
    pub fn has_room(&self) -> bool {
        self.taken.borrow().len() < CLIENTS_MAX
    }

    /// Gives a place to somebody new, and sees to it that there is one for the next.
    pub fn take(&self, now: Instant) -> Place {
        let seat = Rc::new(Seat {
            doing: Cell::new(Doing::Nothing),
            since: Cell::new(now),
            let_go: Notify::new(),
            is_let_go: Cell::new(false),
        });
        self.make_room(now);
        self.taken.borrow_mut().push(Rc::clone(&seat));
        let all = Rc::clone(&self.taken);
        Place { seat, all }
    }

    /// Has somebody leave if no place is left but the one for somebody new, and if anybody can.
    pub fn make_room(&self, now: Instant) {
        let taken = self.taken.borrow();
        if taken.len() + 1 < CLIENTS_MAX || taken.iter().any(|seat| seat.is_let_go.get()) {
            return;
        }
        let silent = taken.iter().filter(|seat| match seat.doing.get() {
            Doing::Nothing => true,
            Doing::Talking => now.duration_since(seat.since.get()) >= STALLED,
            Doing::Served => false,
        });
        let first =
            silent.min_by_key(|seat| (seat.doing.get() != Doing::Nothing, seat.since.get()));
        if let Some(seat) = first {
            seat.is_let_go.set(true);
            seat.let_go.notify_one();
        }
    }
}

impl Place {
    /// Takes note of what the client does from now on.
    pub fn does(&self, doing: Doing) {
        self.seat.doing.set(doing);
        self.gets_on();
    }

    /// Takes note that bytes came or went.
    pub fn gets_on(&self) {
        self.seat.since.set(Instant::now());
    }

    /// Waits until the place is needed for somebody else.
    pub async fn let_go(&self) {
        self.seat.let_go.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.all.borrow_mut().retain(|seat| !Rc::ptr_eq(seat, &self.seat));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn let_go(places: &[Place]) -> Vec<usize> {
        (0..places.len()).filter(|&n| places[n].seat.is_let_go.get()).collect()
    }

    fn set(place: &Place, doing: Doing, since: Instant) {
        place.seat.doing.set(doing);
        place.seat.since.set(since);
    }

    #[test]
    fn the_oldest_idle_one_goes_then_the_oldest_that_stalls() {
        let start = Instant::now();
        let all = Places::default();
        let mut places: Vec<_> = (0..CLIENTS_MAX - 1).map(|_| all.take(start)).collect();
        for (n, place) in (0_u64..).zip(&places) {
            set(place, Doing::Talking, start + Duration::from_millis(n));
        }
        set(&places[0], Doing::Served, start);
        set(&places[9], Doing::Nothing, start + Duration::from_millis(800));
        set(&places[11], Doing::Nothing, start + Duration::from_millis(700));
        assert_eq!(let_go(&places), [] as [usize; 0], "there was room");

        let now = start + Duration::from_millis(900);
        places.push(all.take(now));
        assert!(!all.has_room());
        assert_eq!(let_go(&places), [11], "nobody stalls yet, but two do nothing");
        all.make_room(now);
        assert_eq!(let_go(&places), [11], "one is enough");
        places.remove(11);
        assert!(all.has_room());
        let newest = places.len() - 1;
        set(&places[newest], Doing::Talking, now);

        places.push(all.take(now));
        assert_eq!(let_go(&places), [9]);
        places.remove(9);
        let newest = places.len() - 1;
        set(&places[newest], Doing::Talking, now);

        places.push(all.take(now));
        let newest = places.len() - 1;
        set(&places[newest], Doing::Talking, now);
        assert_eq!(let_go(&places), [] as [usize; 0], "everybody gets on: the next one waits");
        assert!(!all.has_room());
        all.make_room(start + STALLED + Duration::from_millis(1));
        assert_eq!(let_go(&places), [1], "the first that stalls; our own work is not its fault");
    }
}
