//! Finds workers that do not move, and has others read what is theirs.
//!
//! A stuck worker's keypairs are not taken over: its replay windows may move any moment. Its sockets
//! and TUN queue are read by a deputy, and if it stays stuck its peers get new keypairs that are at
//! home elsewhere.

use std::time::Duration;

use wg_common::id::WorkerId;
use wg_common::time::Now;

use crate::datapath::Shared;
use crate::handshake::{Handshakes, Outside};

/// A worker that stands still for longer loses its peers. One that was only kept off its core for a
/// moment keeps them: handshaking anew with all of them would cost more than the pause.
const HOME_LOST_AFTER: Duration = Duration::from_secs(1);

/// Whoever looks later than this was away himself, and judges nobody.
const LATE_AFTER: Duration = Duration::from_millis(500);

/// Watches over the workers of one device.
#[derive(Debug)]
pub struct Watchdog {
    /// Workers whose peers were sent elsewhere since they last moved.
    left: Vec<bool>,
    /// When it last looked.
    looked: Now,
}

impl Watchdog {
    /// Watches over `worker_count` workers.
    pub fn new(worker_count: usize) -> Self {
        Self { left: vec![false; worker_count], looked: Now::default() }
    }

    /// Looks once at every worker. To be called several times a second.
    pub fn look<O: Outside>(&mut self, shared: &Shared, handshakes: &Handshakes<O>, now: Now) {
        let pause = now.since(self.looked);
        self.looked = now;
        if pause > LATE_AFTER {
            // The host slept, or this thread was kept waiting: so were the workers, perhaps.
            return;
        }
        let count = self.left.len() as u16;
        for (worker, left) in (0..count).map(WorkerId).zip(&mut self.left) {
            let deputy = shared.crew.deputy_of(worker);
            if shared.moves(worker, now) {
                *left = false;
                if deputy.is_some() {
                    tracing::info!(%worker, "the worker moves again");
                    shared.crew.set_deputy(worker, None);
                }
                continue;
            }
            let next = (1..count)
                .map(|step| WorkerId((worker.0 + step) % count))
                .find(|&other| shared.moves(other, now));
            let Some(next) = next else { continue };
            if !deputy.is_some_and(|deputy| shared.moves(deputy, now)) {
                tracing::warn!(%worker, deputy = %next, "the worker stands still; another reads for it");
                shared.crew.set_deputy(worker, Some(next));
            }
            if !*left && shared.crew.still_for(worker, now) > HOME_LOST_AFTER {
                tracing::warn!(%worker, "its peers handshake anew, to be at home elsewhere");
                handshakes.leave_home(worker, now);
                *left = true;
            }
        }
    }
}
