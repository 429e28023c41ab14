//! The pool's threads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use wg_common::time::Reading;

use super::{Handshakes, Outside};
use crate::datapath::WorkQueue;
use crate::session::Continuity;
use crate::sys::clock;

/// Processors for each thread: the others are the workers'. Two of them have one thread.
const CPUS_PER_THREAD: usize = 4;
/// Most threads: beyond these they would mostly wait for each other's locks.
const THREAD_COUNT_MAX: usize = 8;
/// Longest sleep. Whatever comes wakes a thread; this is for what nobody thought of.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// Threads that do handshakes beside the workers, until [`Pool::stop`] is called.
pub struct Pool {
    stopping: Arc<AtomicBool>,
    queue: Arc<WorkQueue>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// How many threads suit a process that may use so many processors.
    pub fn thread_count(cpu_count: usize) -> usize {
        (cpu_count / CPUS_PER_THREAD).clamp(1, THREAD_COUNT_MAX)
    }

    /// Starts `thread_count` threads that take from `queue`.
    ///
    /// # Errors
    /// If the kernel gives no thread.
    pub fn start(
        handshakes: &Arc<Handshakes>,
        queue: &Arc<WorkQueue>,
        thread_count: usize,
    ) -> std::io::Result<Self> {
        let mut pool =
            Self { stopping: Arc::default(), queue: Arc::clone(queue), threads: Vec::new() };
        for number in 0..thread_count {
            let (handshakes, queue) = (Arc::clone(handshakes), Arc::clone(queue));
            let stopping = Arc::clone(&pool.stopping);
            let thread = std::thread::Builder::new()
                .name(format!("handshake-{number}"))
                .spawn(move || run(&handshakes, &queue, thread_count as u32, &stopping));
            match thread {
                Ok(thread) => pool.threads.push(thread),
                Err(error) => {
                    pool.stop();
                    return Err(error);
                }
            }
        }
        Ok(pool)
    }

    /// Ends the threads, each after the message it is at.
    pub fn stop(self) {
        self.stopping.store(true, Ordering::Relaxed);
        for thread in self.threads {
            // One wake-up may wake one thread only, and another one than this.
            while !thread.is_finished() {
                self.queue.wake();
                std::thread::sleep(Duration::from_millis(1));
            }
            if thread.join().is_err() {
                tracing::error!("a handshake thread had panicked");
            }
        }
    }
}

fn run(handshakes: &Handshakes, queue: &WorkQueue, thread_count: u32, stopping: &AtomicBool) {
    let mut continuity = Continuity::default();
    while !stopping.load(Ordering::Relaxed) {
        let (reading, before) = (clock::reading(), clock::thread_time());
        // A message that finds a bug of ours must not end all handshakes.
        let turn = || turn_at(handshakes, queue, &mut continuity, &reading);
        match catch_unwind(AssertUnwindSafe(turn)) {
            Ok(true) => {}
            Ok(false) => {
                if let Err(error) = queue.sleep(SLEEP_MAX) {
                    tracing::error!(%error, "a handshake thread cannot sleep");
                    std::thread::sleep(Duration::from_millis(10));
                }
                continue;
            }
            Err(_) => tracing::error!("a handshake message made us panic"),
        }
        // Not the time that has passed: who has to wait for the workers' processors, or for a host that
        // sleeps, costs nobody anything.
        let worked = clock::thread_time().saturating_sub(before);
        handshakes.worked(worked / thread_count, clock::boot_now());
    }
}

/// One turn. A keepalive is sealed here too: so it is seen first whether the host slept or was cloned.
pub(super) fn turn_at<O: Outside>(
    handshakes: &Handshakes<O>,
    queue: &WorkQueue,
    continuity: &mut Continuity,
    reading: &Reading,
) -> bool {
    let now = handshakes.shared.now_of(continuity, reading);
    handshakes.turn(queue, now)
}

#[cfg(test)]
mod tests {
    use wg_common::endpoint::Endpoint;
    use wg_common::id::{DeviceId, WorkerId};
    use wg_common::outcome::DropReason;

    use super::*;
    use crate::aead::RingAead;
    use crate::counters::Totals;
    use crate::datapath::handoff::{HandshakeDatagram, Work};
    use crate::datapath::{Shared, SocketGroup};
    use crate::handshake::Os;
    use wg_common::index::{IndexLayout, IndexPermutation};

    #[test]
    fn threads_wake_for_work_and_stop_when_told() {
        const COUNT: u64 = 1000;
        let sockets = SocketGroup { port: 51820, of_worker: Vec::new() };
        let (shared, queue) = Shared::new(
            DeviceId(0),
            1,
            Vec::new(),
            sockets,
            None,
            IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT),
        )
        .unwrap();
        let os = Os::new(Arc::clone(&shared));
        let handshakes = Arc::new(Handshakes::new(Arc::clone(&shared), os, &RingAead, None));
        let pool = Pool::start(&handshakes, &queue, 3).unwrap();
        let from = Endpoint::configured("192.0.2.1:1".parse().unwrap());
        let datagram = HandshakeDatagram::new(DeviceId(0), &[1; 148], from, WorkerId(0)).unwrap();
        let dropped = || Totals::sum([handshakes.drops()]).dropped(DropReason::NoPrivateKey);
        for number in 1..=COUNT {
            shared.hand_off(Work::Datagram(datagram));
            if number % 100 == 0 {
                while dropped() < number {
                    std::thread::yield_now();
                }
            }
        }
        pool.stop();
        assert_eq!(dropped(), COUNT);
    }

    #[test]
    fn few_processors_have_one_thread() {
        let counts = [0, 1, 2, 4, 7, 8, 16, 64, 1024].map(Pool::thread_count);
        assert_eq!(counts, [1, 1, 1, 1, 1, 2, 4, 8, 8]);
    }
}
