//! The two gates of a keypair that a hand-over shuts for good: the counter that whoever seals moves,
//! and the door of the replay window.
//!
//! Nothing here but atomics, so that `tests/gates_model.rs` can run this very file under a model
//! checker: it names them by way of the module above.

use super::atomic::{
    AtomicU8, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

/// The next counter to seal with.
#[derive(Debug)]
pub struct SendCounter(AtomicU64);

impl SendCounter {
    /// What a stopped counter holds; beyond every limit.
    pub const STOPPED: u64 = u64::MAX;

    /// A counter at `next`.
    pub fn new(next: u64) -> Self {
        Self(AtomicU64::new(next))
    }

    /// The next counter, or [`STOPPED`](Self::STOPPED).
    pub fn next(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Takes up to `n` counters below `limit`, which is the same in every call: the first one and how
    /// many, or `None` if there is none (or `n` is 0).
    pub fn take(&self, limit: u64, n: u64) -> Option<(u64, u64)> {
        // Not `fetch_add`: threads that find the limit reached would push the counter on, in the
        // end around to 0. Relaxed, since the counter guards no other memory, and changes of one
        // atomic have one order for all threads.
        let mut first = self.0.load(Relaxed);
        loop {
            let count = n.min(limit.saturating_sub(first));
            if count == 0 {
                return None;
            }
            match self.0.compare_exchange_weak(first, first + count, Relaxed, Relaxed) {
                Ok(_) => return Some((first, count)),
                Err(moved) => first = moved,
            }
        }
    }

    /// Stops it for good: no [`take`](Self::take) after this one, in the order of changes that all
    /// threads agree on, gives anything. Tells where it stood, to its first caller only.
    pub fn stop(&self) -> Option<u64> {
        match self.0.swap(Self::STOPPED, Relaxed) {
            Self::STOPPED => None,
            next => Some(next),
        }
    }
}

/// Whether somebody receives, and whether anybody still may.
///
/// Whoever wants in does not wait: it is let in or sent away. Whoever shuts may have to come back until
/// the one inside has left.
#[derive(Debug)]
pub struct ReceiveGate(AtomicU8);

impl ReceiveGate {
    const INSIDE: u8 = 1;
    const SHUT: u8 = 2;

    /// An open gate with nobody inside.
    pub fn new() -> Self {
        Self(AtomicU8::new(0))
    }

    /// Goes in, if the gate is open and nobody is inside. Who is let in must leave.
    pub fn enter(&self) -> bool {
        self.0.compare_exchange(0, Self::INSIDE, Acquire, Relaxed).is_ok()
    }

    /// Leaves.
    pub fn leave(&self) {
        self.0.fetch_and(!Self::INSIDE, Release);
    }

    /// Shuts the gate for good: nobody goes in any more.
    pub fn shut(&self) {
        self.0.fetch_or(Self::SHUT, AcqRel);
    }

    /// Whether the gate is shut. That somebody is still inside is possible.
    pub fn is_shut(&self) -> bool {
        self.0.load(Relaxed) & Self::SHUT != 0
    }

    /// Whether the gate is shut and nobody is inside: then what was done inside is all there will ever
    /// be, and the caller sees it.
    pub fn is_settled(&self) -> bool {
        self.0.load(Acquire) == Self::SHUT
    }
}
