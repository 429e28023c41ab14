//! Lines and helpers with bundles that only say who they are.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use wg_common::id::WorkerId;
use wg_common::map::HEARTBEAT_STALE_NS;
use wg_common::time::Now;

use super::{
    Bundle, DEPTH, Duty, Head, Helping, LATE, Line, REST_MAX, REST_MIN, Rings, SLOW, STEADY, Turn,
    WORTHWHILE,
};
use crate::datapath::crew::{Crew, InFlight};
use crate::sys::wait::{PollFd, PollFlags, poll};

const START: Now = Now::from_boot_ns(1_000_000_000);
const BUNDLES: usize = 12;
const ROOM: usize = 3;
const SATURATED: Turn = Turn { number: 1, is_saturated: true };

/// A batch of so many packets, that is worked on by adding one.
#[derive(Default)]
struct Toy {
    number: u64,
    packet_count: usize,
    work_count: usize,
}

impl Bundle for Toy {
    fn len(&self) -> usize {
        self.packet_count
    }

    fn work(&mut self) {
        self.work_count += 1;
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Worker 0's line, and the ends of its helpers.
struct Setting {
    crew: Arc<Crew>,
    line: Line<Toy>,
    helpers: Vec<Helping>,
    next: u64,
    now: Now,
}

impl Setting {
    fn new(worker_count: usize) -> Self {
        let crew = Crew::new(worker_count, None).unwrap();
        let mut all: VecDeque<Rings<Toy>> = Rings::between(worker_count);
        let (to, _) = all.pop_front().unwrap().split();
        let helpers = all.into_iter().map(|rings| {
            let mut helping = Helping::default();
            helping.add(rings.split().1);
            helping
        });
        let mut line = Line::new(Arc::clone(&crew), to, BUNDLES, Toy::default, ROOM);
        line.begin_turn(SATURATED);
        let setting = Self { line, helpers: helpers.collect(), next: 0, now: START, crew };
        setting.beat();
        (1..worker_count).for_each(|helper| setting.crew.set_awake(id(helper), true));
        setting
    }

    fn beat(&self) {
        (0..=self.helpers.len()).for_each(|worker| self.crew.beat(id(worker), self.now));
    }

    /// A batch comes. Says whether it was given away.
    fn submit(&mut self, packet_count: usize) -> bool {
        assert!(self.line.wants(packet_count, self.now));
        let mut bundle = self.line.take().unwrap();
        assert_eq!((bundle.packet_count, bundle.work_count), (0, 0), "nothing is left of another");
        (bundle.number, bundle.packet_count) = (self.next, packet_count);
        self.next += 1;
        self.line.submit(bundle, self.now)
    }

    fn help(&mut self, helper: usize, mut budget: usize) -> bool {
        self.helpers[helper - 1].help(&self.crew, &mut budget)
    }

    /// What can be released: the numbers, or how many packets were lost.
    fn released(&mut self) -> Vec<Result<u64, usize>> {
        let mut released = Vec::new();
        while let Some(head) = self.line.next(self.now) {
            released.push(match head {
                Head::Done(bundle) => {
                    assert_eq!(bundle.work_count, 1);
                    let number = bundle.number;
                    self.line.recycle(bundle);
                    Ok(number)
                }
                Head::Lost(count) => Err(count),
            });
        }
        released
    }

    fn free_count(&mut self) -> usize {
        let free: Vec<_> = std::iter::from_fn(|| self.line.take()).collect();
        let count = free.len();
        free.into_iter().for_each(|bundle| self.line.recycle(bundle));
        count
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
    }
}

fn id(worker: usize) -> WorkerId {
    WorkerId(worker as u16)
}

fn done(numbers: impl IntoIterator<Item = u64>) -> Vec<Result<u64, usize>> {
    numbers.into_iter().map(Ok).collect()
}

#[test]
fn batches_leave_in_order_whoever_is_done_first() {
    let mut setting = Setting::new(3);
    let given: Vec<bool> = (0..8).map(|_| setting.submit(64)).collect();
    let expected = [true, true, true, true, true, true, false, false];
    assert_eq!(given, expected, "three each, then none has room");
    assert!(setting.released().is_empty());
    assert!(setting.help(2, 9), "the second helper is faster");
    assert!(setting.released().is_empty());
    assert!(setting.help(1, 1));
    assert_eq!(setting.released(), done([0, 1]), "they had one each in turn");
    assert!(setting.help(1, 1));
    assert_eq!(setting.released(), done([2, 3]));
    assert!(setting.help(1, 1));
    assert_eq!(setting.released(), done(4..8));
    assert!(setting.line.is_empty() && !setting.help(1, 9) && !setting.help(2, 9));
    assert_eq!(setting.free_count(), BUNDLES);
}

#[test]
fn nothing_is_given_without_need_or_to_who_has_no_time() {
    let wants = |change: fn(&mut Setting)| {
        let mut setting = Setting::new(2);
        change(&mut setting);
        setting.line.wants(WORTHWHILE, setting.now)
    };
    assert!(wants(|_| {}));
    assert!(!wants(|setting| {
        setting.line.begin_turn(Turn { number: 1, is_saturated: false });
    }));
    assert!(!wants(|setting| setting.crew.set_awake(id(1), false)));
    assert!(wants(|setting| setting.crew.set_asleep(id(1))), "it is woken");
    assert!(!wants(|setting| setting.pass(Duration::from_nanos(HEARTBEAT_STALE_NS))));
    let setting = Setting::new(2);
    assert!(!setting.line.wants(WORTHWHILE - 1, START));
    assert!(!Setting::new(1).line.wants(64, START), "there is nobody");
}

#[test]
fn what_follows_a_batch_that_is_away_waits_behind_it() {
    let mut setting = Setting::new(2);
    assert!(setting.submit(64));
    assert!(!setting.submit(1), "too small to be given");
    setting.line.begin_turn(Turn { number: 2, is_saturated: false });
    assert!(!setting.submit(64), "there is no need any more");
    assert!(setting.released().is_empty());
    assert!(setting.help(1, 1));
    assert_eq!(setting.released(), done(0..3));
    assert!(!setting.line.wants(64, START), "and then all is as before");
}

#[test]
fn what_a_helper_keeps_is_given_up_and_known_when_it_comes() {
    let mut setting = Setting::new(3);
    let given: Vec<bool> = (0..7).map(|_| setting.submit(20)).collect();
    assert_eq!(given, [true, true, true, true, true, true, false]);
    assert!(setting.help(2, 9));
    setting.pass(LATE - Duration::from_nanos(1));
    assert!(setting.released().is_empty());
    setting.pass(Duration::from_nanos(1));
    setting.beat();
    assert_eq!(setting.released(), [Err(20), Ok(1), Err(20), Ok(3), Err(20), Ok(5), Ok(6)]);
    assert_eq!(setting.free_count(), BUNDLES - DEPTH);
    // The other one gets more, that one none, until it has given back what it has.
    setting.pass(REST_MAX);
    setting.beat();
    let given: Vec<bool> = (0..4).map(|_| setting.submit(20)).collect();
    assert_eq!(given, [true, true, true, false]);
    assert!(setting.help(1, 1));
    assert!(setting.help(2, 9));
    assert_eq!(setting.released(), done(7..11));
    let given: Vec<bool> = (0..4).map(|_| setting.submit(20)).collect();
    assert_eq!(given, [true, true, true, false]);
    assert!(setting.help(1, 9));
    assert!(setting.help(2, 9));
    assert_eq!(setting.released(), done(11..15));
    assert_eq!(setting.free_count(), BUNDLES, "no memory is lost");
    let given: Vec<bool> = (0..6).map(|_| setting.submit(20)).collect();
    assert_eq!(given, [true; 6]);
}

#[test]
fn a_helper_that_holds_up_the_line_rests_each_time_for_longer() {
    let mut setting = Setting::new(2);
    let wants = |setting: &Setting| setting.line.wants(20, setting.now);
    let ns = Duration::from_nanos(1);
    let mut rest = REST_MIN;
    for _ in 0..20 {
        assert!(setting.submit(20) && setting.submit(20));
        // What counts is how long nothing comes back, not how long one thing is away.
        setting.pass(SLOW - ns);
        assert!(setting.released().is_empty() && setting.help(1, 1));
        assert_eq!(setting.released().len(), 1);
        setting.pass(SLOW - ns);
        assert!(setting.released().is_empty() && setting.submit(20));
        setting.pass(ns);
        assert!(setting.released().is_empty());
        assert!(setting.help(1, 9));
        assert_eq!(setting.released().len(), 2);
        setting.pass(rest - ns);
        setting.beat();
        assert!(!wants(&setting), "it rests for {rest:?}");
        setting.pass(ns);
        assert!(wants(&setting));
        rest = REST_MAX.min(2 * rest);
    }
    assert_eq!(rest, REST_MAX);
    setting.pass(STEADY);
    setting.beat();
    assert!(setting.submit(20));
    setting.pass(SLOW);
    assert!(setting.released().is_empty() && setting.help(1, 9));
    assert_eq!(setting.released().len(), 1);
    setting.pass(REST_MIN);
    setting.beat();
    assert!(wants(&setting), "that was long ago");
}

#[test]
fn helpers_that_keep_everything_hold_up_nobody() {
    let mut setting = Setting::new(16);
    let mut packets = 0;
    for _ in 0..20 {
        while setting.line.has_room() && setting.line.wants(64, setting.now) {
            setting.submit(64);
            packets += 64;
        }
        setting.pass(LATE);
        setting.beat();
        for released in setting.released() {
            packets -= released.map_or_else(|lost| lost, |_| 64);
        }
        assert!(setting.line.is_empty());
    }
    assert_eq!(packets, 0, "what is lost is counted");
    assert!(setting.free_count() > 0, "some memory is always left to the worker");
    assert!(!setting.line.wants(64, setting.now) && setting.line.has_room(), "it goes on alone");
    (1..16).for_each(|helper| {
        setting.help(helper, 9);
    });
    assert!(setting.released().is_empty());
    assert_eq!(setting.free_count(), BUNDLES);
    assert!(setting.line.wants(64, setting.now));
}

#[test]
fn a_line_is_bounded() {
    let mut setting = Setting::new(2);
    while setting.line.has_room() {
        setting.submit(64);
    }
    assert_eq!(setting.free_count(), ROOM - 1);
    while setting.free_count() > 0 {
        setting.submit(64);
    }
    assert!(setting.line.take().is_none());
    assert!(setting.help(1, 9));
    assert_eq!(setting.released().len(), BUNDLES);
    assert!(setting.line.has_room());
}

#[test]
fn a_helper_that_leaves_is_one_that_is_stuck() {
    let mut setting = Setting::new(2);
    assert!(setting.submit(64));
    setting.helpers.clear();
    assert!(setting.released().is_empty());
    setting.pass(LATE);
    setting.crew.beat(id(1), setting.now);
    assert_eq!(setting.released(), [Err(64)]);
    assert!(!setting.line.wants(64, setting.now));
    drop(setting);
    // And a worker that leaves takes nobody along.
    let mut setting = Setting::new(2);
    assert!(setting.submit(64) && setting.submit(64));
    let Setting { crew, line, mut helpers, .. } = setting;
    drop(line);
    assert!(helpers[0].help(&crew, &mut 9) && !helpers[0].help(&crew, &mut 9));
}

#[test]
fn all_homes_are_helped_in_turn_and_within_the_budget() {
    let crew = Crew::new(3, None).unwrap();
    let mut all: VecDeque<Rings<Toy>> = Rings::between(3);
    let mut helping = Helping::default();
    helping.add(all.pop_back().unwrap().split().1);
    crew.beat(id(2), START);
    crew.set_awake(id(2), true);
    let mut lines: Vec<Line<Toy>> = all
        .into_iter()
        .map(|rings| {
            let mut to = rings.split().0;
            to.retain(|to| to.helper == id(2));
            Line::new(Arc::clone(&crew), to, BUNDLES, Toy::default, 0)
        })
        .collect();
    for line in &mut lines {
        line.begin_turn(SATURATED);
        for _ in 0..DEPTH {
            let mut bundle = line.take().unwrap();
            bundle.packet_count = 64;
            assert!(line.submit(bundle, START));
        }
    }
    assert!(helping.is_wanted());
    let mut done = [0; 2];
    for round in 1..=DEPTH {
        let mut budget = 2;
        assert!(helping.help(&crew, &mut budget));
        assert_eq!(budget, 0);
        for (line, done) in lines.iter_mut().zip(&mut done) {
            *done += std::iter::from_fn(|| line.next(START)).count();
        }
        assert_eq!(done, [round; 2], "one of each");
    }
    assert!(!helping.is_wanted() && !helping.help(&crew, &mut 1));
}

#[test]
fn what_is_in_flight_holds_up_who_waits_for_a_turn() {
    let mut setting = Setting::new(2);
    let crew = Arc::clone(&setting.crew);
    let turn = |setting: &mut Setting| {
        setting.pass(Duration::from_millis(1));
        for worker in 0..2 {
            let in_flight =
                if worker == 0 { setting.line.in_flight() } else { InFlight::default() };
            crew.set_in_flight(id(worker), in_flight);
            crew.begin_turn(id(worker));
        }
        let turn = Turn { number: crew.turns(id(0)), is_saturated: true };
        setting.line.begin_turn(turn);
        setting.beat();
    };
    turn(&mut setting);
    assert!(setting.submit(64));
    let (at, turns) = (setting.now, crew.turns(id(0)));
    let passed = |setting: &Setting| {
        assert!(crew.obeys_since(id(1), turns) || setting.now == at);
        (crew.all_turned_since(at), crew.obeys_since(id(0), turns))
    };
    assert_eq!(passed(&setting), (false, false));
    turn(&mut setting);
    turn(&mut setting);
    assert_eq!(passed(&setting), (false, false), "it is away");
    assert!(setting.help(1, 1));
    assert_eq!(passed(&setting), (false, false), "it is back, but nobody has looked");
    assert_eq!(setting.released(), done([0]));
    turn(&mut setting);
    assert_eq!(passed(&setting), (true, true));
    // What is given up will not be sent. But a helper has it.
    assert!(setting.submit(64));
    let (at, turns) = (setting.now, crew.turns(id(0)));
    setting.pass(LATE);
    assert_eq!(setting.released(), [Err(64)]);
    turn(&mut setting);
    assert!(crew.all_turned_since(at) && !crew.obeys_since(id(0), turns));
    assert!(setting.help(1, 1));
    assert!(setting.released().is_empty());
    turn(&mut setting);
    assert!(crew.obeys_since(id(0), turns));
}

#[test]
fn a_thread_is_saturated_after_some_turns_and_has_no_time_then() {
    let crew = Crew::new(2, None).unwrap();
    let mut duty = Duty::new(id(0), Arc::clone(&crew));
    let mut turns = |more: &[bool]| {
        let turn = |&more: &bool| {
            duty.end_turn(more, false, START);
            assert_eq!(crew.has_time(id(0)), !more);
            duty.begin_turn(InFlight::default()).is_saturated
        };
        more.iter().map(turn).filter(|is_saturated| *is_saturated).count()
    };
    assert_eq!(
        turns(&[true, true, true, false].repeat(20)),
        0,
        "it comes to an end again and again"
    );
    assert!(turns(&[true; 20]) > 10);
    assert_eq!(turns(&[false, true, true]), 3, "it is not over at once");
    assert_eq!(turns(&[false; 5]), 0);
}

#[test]
fn who_has_helped_looks_for_more_before_it_sleeps() {
    let crew = Crew::new(2, None).unwrap();
    let mut duty = Duty::new(id(0), Arc::clone(&crew));
    assert!(!duty.end_turn(false, false, START));
    assert!(duty.end_turn(false, true, START));
    assert!(duty.end_turn(false, false, START + Duration::from_micros(20)));
    assert!(!duty.end_turn(false, false, START + Duration::from_millis(1)));
    assert!(!duty.may_sleep(|| true) && duty.may_sleep(|| false));
    assert!(crew.has_time(id(0)), "one that sleeps is woken");
    assert!(duty.budget(false) > duty.budget(true) && duty.budget(true) > 0);
}

/// Sleeps as a thread does, until it is woken. `false` if nobody did.
fn sleep(crew: &Crew, worker: usize) -> bool {
    let wake = crew.wake(id(worker));
    let mut fds = [PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN)];
    let is_woken = poll(&mut fds, Duration::from_secs(20)).unwrap() > 0;
    wake.drain();
    is_woken
}

#[test]
fn threads_that_sleep_and_wake_lose_nothing_and_keep_order() {
    const HELPERS: usize = 3;
    let mut setting = Setting::new(1 + HELPERS);
    let total = if cfg!(debug_assertions) { 30_000 } else { 300_000 };
    let helped = AtomicU64::new(0);
    let crew = &Arc::clone(&setting.crew);
    let is_over = &AtomicU64::new(0);
    std::thread::scope(|scope| {
        for (number, mut helping) in setting.helpers.drain(..).enumerate() {
            let helped = &helped;
            scope.spawn(move || {
                let worker = 1 + number;
                let duty = Duty::new(id(worker), Arc::clone(crew));
                let mut empty_handed = 0;
                while is_over.load(Ordering::Acquire) == 0 {
                    crew.beat(id(worker), START);
                    if helping.help(crew, &mut 2) {
                        helped.fetch_add(1, Ordering::Relaxed);
                        empty_handed = 0;
                    } else {
                        empty_handed += 1;
                    }
                    let is_called = || helping.is_wanted() || is_over.load(Ordering::Acquire) != 0;
                    if empty_handed > number && duty.may_sleep(is_called) {
                        assert!(sleep(crew, worker), "nobody woke it");
                        duty.wake();
                    }
                }
            });
        }
        let duty = Duty::new(id(0), Arc::clone(crew));
        let mut expected = 0;
        while expected < total {
            while setting.next < total && setting.line.has_room() {
                if !setting.line.wants(64, START) {
                    // Inline.
                    assert_eq!(setting.next, expected);
                    (setting.next, expected) = (setting.next + 1, expected + 1);
                    continue;
                }
                setting.submit(64);
            }
            for released in setting.released() {
                assert_eq!(released, Ok(expected));
                expected += 1;
            }
            if expected < total && !setting.line.is_empty() {
                let line = &setting.line;
                if duty.may_sleep(|| line.is_answered()) {
                    assert!(sleep(crew, 0), "nobody woke it");
                    duty.wake();
                }
            }
        }
        is_over.store(1, Ordering::Release);
        (1..=HELPERS).for_each(|helper| crew.wake(id(helper)).signal());
    });
    assert!(helped.into_inner() > 0);
    assert_eq!(setting.free_count(), BUNDLES);
}
