//! The two gates of a keypair under a model checker: every interleaving of threads that seal and
//! receive with one that freezes, with every value that the memory model lets them see.
//!
//! The file under test is compiled here once more, with the model's atomics in place of the real ones.

#![expect(unsafe_code, reason = "what the gate guards is a cell of the model")]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

mod atomic {
    pub use loom::sync::atomic::{AtomicU8, AtomicU64, Ordering};
}

#[path = "../src/session/gates.rs"]
mod gates;

use gates::{ReceiveGate, SendCounter};

const LIMIT: u64 = 1 << 40;

#[test]
fn nothing_is_reserved_beyond_where_a_freeze_stood() {
    loom::model(|| {
        let counter = Arc::new(SendCounter::new(0));
        let seal = |runs: &'static [u64]| {
            let counter = Arc::clone(&counter);
            thread::spawn(move || runs.iter().filter_map(|&n| counter.take(LIMIT, n)).collect())
        };
        let threads: [thread::JoinHandle<Vec<_>>; 2] = [seal(&[1, 2]), seal(&[3])];
        let stood = counter.stop().expect("nobody else stops it");
        assert!(counter.stop().is_none() && counter.take(LIMIT, 1).is_none());
        let mut runs: Vec<_> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
        runs.sort_unstable();
        let mut next = 0;
        for (first, count) in runs {
            assert_eq!(first, next, "each once, and none left out");
            next = first + count;
        }
        assert_eq!(next, stood);
        assert_eq!(counter.next(), SendCounter::STOPPED);
    });
}

/// A gate and what it guards; the model reports whoever touches that at the same time as another.
struct Guarded {
    gate: ReceiveGate,
    window: UnsafeCell<u64>,
}

#[test]
fn a_window_that_is_read_when_the_gate_is_settled_moves_no_more() {
    loom::model(|| {
        let guarded = Arc::new(Guarded { gate: ReceiveGate::new(), window: UnsafeCell::new(0) });
        let worker = {
            let guarded = Arc::clone(&guarded);
            thread::spawn(move || {
                let mut accepted = 0;
                for _ in 0..2 {
                    if guarded.gate.enter() {
                        // SAFETY: the model checks that nobody else is at it.
                        guarded.window.with_mut(|window| unsafe { *window += 1 });
                        guarded.gate.leave();
                        accepted += 1;
                    }
                }
                accepted
            })
        };
        guarded.gate.shut();
        assert!(guarded.gate.is_shut() && !guarded.gate.enter());
        while !guarded.gate.is_settled() {
            thread::yield_now();
        }
        // SAFETY: the model checks that nobody else is at it.
        let read = guarded.window.with(|window| unsafe { *window });
        assert_eq!(worker.join().unwrap(), read, "all that was accepted is in what was read");
    });
}

#[test]
fn only_one_is_inside() {
    loom::model(|| {
        let guarded = Arc::new(Guarded { gate: ReceiveGate::new(), window: UnsafeCell::new(0) });
        let enter = || {
            let guarded = Arc::clone(&guarded);
            thread::spawn(move || {
                if guarded.gate.enter() {
                    // SAFETY: the model checks that nobody else is at it.
                    guarded.window.with_mut(|window| unsafe { *window += 1 });
                    guarded.gate.leave();
                }
            })
        };
        let threads = [enter(), enter()];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}
