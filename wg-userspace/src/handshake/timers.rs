//! Runs the timers of the sessions that have one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use wg_common::id::WorkerId;
use wg_common::time::Now;

use super::{Cell, Handshakes, Outside, lock};

impl<O: Outside> Handshakes<O> {
    /// Runs the timers that are due. To be called several times a second.
    pub fn tick(&self, now: Now) {
        let cells = std::mem::take(&mut *lock(&self.awake));
        let mut still_awake = Vec::with_capacity(cells.len());
        for cell in cells {
            let mut session = cell.session();
            let identity = self.identity();
            let actions = match &identity {
                Some(identity) => self.with_context(&cell, identity, WorkerId(0), now, |context| {
                    session.handle_timeout(context, now)
                }),
                None => Vec::new(),
            };
            self.execute(&cell, &actions, WorkerId(0), now);
            if session.is_awake() {
                drop(session);
                still_awake.push(cell);
            } else {
                cell.awake.store(false, Ordering::Relaxed);
            }
        }
        lock(&self.awake).append(&mut still_awake);
    }

    /// Has the timers of `cell` run from now on.
    pub(super) fn awaken(&self, cell: &Arc<Cell>) {
        if !cell.awake.swap(true, Ordering::Relaxed) {
            lock(&self.awake).push(Arc::clone(cell));
        }
    }
}
