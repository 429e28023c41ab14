//! A pause without keys, for a planned snapshot: what is in memory then opens and seals nothing.

use std::time::Duration;

use wg_common::id::WorkerId;
use wg_common::time::Now;

use crate::datapath::Shared;
use crate::sys::clock;

/// Workers are asked this often whether they have moved on.
const ASK_EVERY: Duration = Duration::from_millis(1);
/// A worker that is kept from its core moves again sooner, or counts as stuck.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// A pause that has begun.
pub struct Begun {
    /// The turns that each worker had begun by then.
    pub turns: Vec<u64>,
}

/// Lets there be no keypairs for `time`, or until somebody resumes; a longer pause that has begun
/// already goes on, since who asked for it relies on it. Sessions are to be cleared next.
pub fn begin(shared: &Shared, time: Option<Duration>, now: Now) -> Begun {
    shared.quiesce_until(now + time.unwrap_or(Duration::MAX));
    shared.end_keypairs(now);
    shared.wake_all();
    // After the stores: who begins a turn later than this obeys them.
    let turns = workers(shared).map(|worker| shared.crew.turns(worker)).collect();
    Begun { turns }
}

/// Waits until no worker can seal any more, and gives the number of those that stand still and so may
/// be in the midst of a turn. `None` if the pause was over before: somebody resumed, or it was too short.
pub async fn settled(shared: &Shared, turns: Vec<u64>) -> Option<usize> {
    let begun = clock::boot_now();
    loop {
        let now = clock::boot_now();
        if !shared.is_quiesced(now) {
            return None;
        }
        let late =
            |&worker: &WorkerId| !shared.crew.obeys_since(worker, turns[usize::from(worker.0)]);
        let (mut stuck, mut waits) = (0, false);
        for worker in workers(shared).filter(late) {
            stuck += 1;
            waits |= shared.moves(worker, now);
        }
        if stuck == 0 || !waits || now.since(begun) > WAIT_MAX {
            return Some(stuck);
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// Whether there was a pause whose time is over.
pub fn is_over(shared: &Shared, now: Now) -> bool {
    shared.quiesced_until() != Now::default() && !shared.is_quiesced(now)
}

fn workers(shared: &Shared) -> impl Iterator<Item = WorkerId> {
    (0..shared.workers.len()).map(|worker| WorkerId(worker as u16))
}

#[cfg(test)]
mod tests {
    use wg_common::id::DeviceId;
    use wg_common::index::{IndexLayout, IndexPermutation};

    use super::*;
    use crate::datapath::SocketGroup;

    fn shared(worker_count: usize) -> std::sync::Arc<Shared> {
        let sockets = SocketGroup { port: 1, of_worker: Vec::new() };
        let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
        Shared::new(DeviceId(0), worker_count, Vec::new(), sockets, None, indexes).unwrap().0
    }

    fn wait(shared: &Shared, turns: Vec<u64>) -> Option<usize> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.unwrap().block_on(settled(shared, turns))
    }

    #[test]
    fn a_pause_ends_with_its_time() {
        let shared = shared(1);
        let now = Now::from_boot_ns(5_000_000_000);
        assert!(!is_over(&shared, now), "there was none");
        begin(&shared, Some(Duration::from_secs(3)), now);
        let end = now + Duration::from_secs(3);
        let almost = Now::from_boot_ns(end.boot_ns() - 1);
        assert!(shared.is_quiesced(almost) && !is_over(&shared, almost));
        assert!(!shared.is_quiesced(end) && is_over(&shared, end));
        begin(&shared, None, now);
        assert!(shared.is_quiesced(now + Duration::from_secs(1 << 30)));
    }

    #[test]
    fn it_is_settled_when_every_worker_has_begun_another_turn() {
        let shared = shared(2);
        let now = clock::boot_now();
        (0..2).for_each(|worker| shared.beat(WorkerId(worker), now));
        let begun = begin(&shared, None, now);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                (0..2).for_each(|worker| shared.crew.begin_turn(WorkerId(worker)));
            });
            assert_eq!(wait(&shared, begun.turns), Some(0));
        });
        assert!(clock::boot_now().since(now) >= Duration::from_millis(20), "it has waited");
    }

    #[test]
    fn a_worker_that_stands_still_is_said_and_not_waited_for() {
        let shared = shared(2);
        shared.beat(WorkerId(0), clock::boot_now());
        let begun = begin(&shared, None, clock::boot_now());
        shared.crew.begin_turn(WorkerId(0));
        assert_eq!(wait(&shared, begun.turns), Some(1));
    }

    #[test]
    fn nobodys_pause_is_made_shorter_by_another() {
        let shared = shared(1);
        let now = Now::from_boot_ns(5_000_000_000);
        begin(&shared, None, now);
        begin(&shared, Some(Duration::from_secs(1)), now);
        assert!(shared.is_quiesced(now + Duration::from_secs(3600)));
        shared.set_quiesced_until(Now::default());
        begin(&shared, Some(Duration::from_secs(1)), now);
        assert!(!shared.is_quiesced(now + Duration::from_secs(2)), "after a resume it counts");
    }

    #[test]
    fn a_pause_that_somebody_ended_is_not_said_to_have_settled() {
        let shared = shared(1);
        let begun = begin(&shared, None, clock::boot_now());
        shared.crew.begin_turn(WorkerId(0));
        shared.set_quiesced_until(Now::default());
        assert_eq!(wait(&shared, begun.turns), None);
    }
}
