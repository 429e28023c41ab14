//! The threads of the data path, as all devices of the process see them: signs of life, who stands in
//! for whom, what wakes them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use wg_common::id::WorkerId;
use wg_common::map::{HEARTBEAT_STALE_NS, QUEUES_LEN};
use wg_common::time::Now;

use super::staging::Budget;
use super::thread::XskPort;
use crate::counters::Counters;
use crate::sys::{EventFd, SharedWords};
use crate::xsk::Pool;

/// The threads of the data path. Each of them runs one worker of every device.
pub struct Crew {
    threads: Vec<Thread>,
    /// Changes whenever some deputy does.
    deputies_epoch: AtomicU32,
    /// The heartbeats as the kernel side sees them, if there is one.
    kernel_heartbeats: Option<Arc<SharedWords>>,
    staging: Arc<Budget>,
    /// XSKs that threads were told to close.
    closed: ArrayQueue<(PortId, Option<Closed>)>,
    /// Whether some XSK sends.
    transmits: AtomicBool,
}

/// Which XSK.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PortId {
    /// Index of the NIC.
    pub ifindex: u32,
    /// Its queue.
    pub queue: u32,
}

/// An XSK that a thread has given back, with the pool of its UMEM if no other shares that.
pub type Closed = (XskPort, Option<Pool>);

/// What is to become of a thread's XSKs.
#[expect(
    clippy::large_enum_variant,
    reason = "a box would be given back by a thread that moves packets"
)]
pub enum PortChange {
    /// It has one more, and the pool of its UMEM if no other of its XSKs shares that.
    Open(XskPort, Option<Pool>),
    /// It gives one back, for [`Crew::take_closed`].
    Close(PortId),
}

/// Later than every moment and turn.
const NOTHING: u64 = u64::MAX;

/// How much a thread has to do beside what others give it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
enum Rest {
    /// Its own packets leave no time, or it has not begun to run.
    None,
    /// It has time for others, and looks at what they give it in each turn.
    Awake,
    /// It has time for others, and must be woken.
    Asleep,
}

/// What a thread has begun and not finished, from earlier turns.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct InFlight {
    /// When the turn began in which the oldest message was sealed that has not left.
    pub unsent_since: Option<Now>,
    /// The turn in which the oldest batch was given away that has not come back.
    pub away_since: Option<u64>,
}

impl InFlight {
    /// What is in flight of both.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        fn older<T: Ord>(a: Option<T>, b: Option<T>) -> Option<T> {
            a.into_iter().chain(b).min()
        }
        Self {
            unsent_since: older(self.unsent_since, other.unsent_since),
            away_since: older(self.away_since, other.away_since),
        }
    }
}

/// Changes of XSKs that a thread has not looked at yet.
const PORT_CHANGES_MAX: usize = 64;

/// What one thread shares with everyone else, beside what it does for a device.
struct Thread {
    /// What it counted that belongs to no device.
    counters: Counters,
    wake: EventFd,
    /// Boot time in nanoseconds at which it last moved.
    heartbeat: AtomicU64,
    /// Number of turns that it has begun.
    turns: AtomicU64,
    /// Boot time in nanoseconds of the turn in which the oldest message was sealed that has not left yet;
    /// [`NOTHING`] if all have.
    unsent_since: AtomicU64,
    /// The turn in which the oldest batch was given to another thread that this one has not back;
    /// [`NOTHING`] if it has all.
    away_since: AtomicU64,
    /// Whether it can help others: a [`Rest`].
    rest: AtomicU8,
    /// Who reads its sockets and TUN queues while it is stuck: worker number + 1, or 0.
    deputy: AtomicU16,
    port_changes: ArrayQueue<PortChange>,
}

impl Crew {
    /// So many threads, none of which has moved yet.
    ///
    /// # Errors
    /// If the kernel gives no event descriptor.
    pub fn new(
        thread_count: usize,
        kernel_heartbeats: Option<Arc<SharedWords>>,
    ) -> std::io::Result<Arc<Self>> {
        let threads = (0..thread_count)
            .map(|_| {
                Ok(Thread {
                    counters: Counters::default(),
                    wake: EventFd::new()?,
                    heartbeat: AtomicU64::new(0),
                    turns: AtomicU64::new(0),
                    unsent_since: AtomicU64::new(NOTHING),
                    away_since: AtomicU64::new(NOTHING),
                    rest: AtomicU8::new(Rest::None as u8),
                    deputy: AtomicU16::new(0),
                    port_changes: ArrayQueue::new(PORT_CHANGES_MAX),
                })
            })
            .collect::<std::io::Result<_>>()?;
        let (deputies_epoch, staging) = (AtomicU32::new(0), Arc::default());
        let transmits = AtomicBool::new(false);
        // As many as there can be, so that it is never full.
        let closed = ArrayQueue::new(2 * QUEUES_LEN as usize);
        Ok(Arc::new(Self {
            threads,
            deputies_epoch,
            kernel_heartbeats,
            staging,
            transmits,
            closed,
        }))
    }

    /// Takes note that some XSK sends, so that it is worth while to find out how.
    pub fn note_transmits(&self) {
        self.transmits.store(true, Ordering::Relaxed);
    }

    /// Whether some XSK sends.
    pub fn transmits(&self) -> bool {
        self.transmits.load(Ordering::Relaxed)
    }

    /// Number of threads, and so of workers of each device.
    pub fn thread_count(&self) -> usize {
        self.threads.len()
    }

    fn of(&self, worker: WorkerId) -> &Thread {
        &self.threads[usize::from(worker.0)]
    }

    /// What the thread of `worker` counted that belongs to no device. Only that thread may add.
    pub fn counters(&self, worker: WorkerId) -> &Counters {
        &self.of(worker).counters
    }

    /// What all threads counted that belongs to no device.
    pub fn all_counters(&self) -> impl Iterator<Item = &Counters> {
        self.threads.iter().map(|thread| &thread.counters)
    }

    /// What all workers of all devices may keep staged.
    pub(super) fn staging(&self) -> &Arc<Budget> {
        &self.staging
    }

    /// What wakes the thread of `worker`.
    pub fn wake(&self, worker: WorkerId) -> &EventFd {
        &self.of(worker).wake
    }

    /// Tells the thread of `worker` what is to become of its XSKs, in the order of the calls.
    ///
    /// # Errors
    /// Gives the change back if too many wait already.
    #[expect(clippy::result_large_err, reason = "what is refused is tried again")]
    pub fn change_port(&self, worker: WorkerId, change: PortChange) -> Result<(), PortChange> {
        let thread = self.of(worker);
        thread.port_changes.push(change)?;
        thread.wake.signal();
        Ok(())
    }

    /// The next change that the thread of `worker` is to make.
    pub(super) fn next_port_change(&self, worker: WorkerId) -> Option<PortChange> {
        let changes = &self.of(worker).port_changes;
        // Nearly always: looking costs less than taking nothing.
        if changes.is_empty() { None } else { changes.pop() }
    }

    /// Gives back what a thread was told to close, if it had that.
    pub(super) fn give_back(&self, id: PortId, port: Option<Closed>) {
        // There is room for all there can be. What does not fit is closed here, which only takes time.
        drop(self.closed.push((id, port)));
    }

    /// An XSK that a thread has given back, if it had it.
    pub fn take_closed(&self) -> Option<(PortId, Option<Closed>)> {
        self.closed.pop()
    }

    /// Wakes every thread: something it must look at has changed.
    pub fn wake_all(&self) {
        for thread in &self.threads {
            thread.wake.signal();
        }
    }

    /// Says that the thread of `worker` moves.
    pub fn beat(&self, worker: WorkerId, now: Now) {
        self.of(worker).heartbeat.store(now.boot_ns(), Ordering::Release);
        let words = self.kernel_heartbeats.as_ref();
        if let Some(word) = words.and_then(|words| words.get(usize::from(worker.0))) {
            word.store(now.boot_ns(), Ordering::Relaxed);
        }
    }

    /// Whether `worker` moved lately.
    pub fn moves(&self, worker: WorkerId, now: Now) -> bool {
        self.still_for(worker, now) < Duration::from_nanos(HEARTBEAT_STALE_NS)
    }

    /// How long ago `worker` last said that it moves.
    pub fn still_for(&self, worker: WorkerId, now: Now) -> Duration {
        let beat = self.of(worker).heartbeat.load(Ordering::Relaxed);
        now.since(Now::from_boot_ns(beat))
    }

    /// Whether every thread has begun a turn after `at`, and nothing from before is in flight: what one had
    /// sealed before has left, and what it had accepted is delivered.
    pub fn all_turned_since(&self, at: Now) -> bool {
        self.threads.iter().all(|thread| {
            // In this order: the turn that has begun has said first what is in flight.
            thread.heartbeat.load(Ordering::Acquire) > at.boot_ns()
                && thread.unsent_since.load(Ordering::Acquire) > at.boot_ns()
        })
    }

    /// Has `deputy` read what belongs to `worker`, of every device; `None` gives it back.
    pub fn set_deputy(&self, worker: WorkerId, deputy: Option<WorkerId>) {
        let value = deputy.map_or(0, |d| d.0 + 1);
        if self.of(worker).deputy.swap(value, Ordering::Relaxed) != value {
            self.deputies_epoch.fetch_add(1, Ordering::Release);
            self.wake_all();
        }
    }

    /// Who reads what belongs to `worker`, if not itself.
    pub fn deputy_of(&self, worker: WorkerId) -> Option<WorkerId> {
        self.of(worker).deputy.load(Ordering::Relaxed).checked_sub(1).map(WorkerId)
    }

    /// Changes whenever some deputy does.
    pub fn deputies_epoch(&self) -> u32 {
        self.deputies_epoch.load(Ordering::Acquire)
    }

    /// Says that the thread of `worker` begins a turn: what it seals and opens in it obeys what it reads
    /// from now on.
    pub fn begin_turn(&self, worker: WorkerId) {
        self.of(worker).turns.fetch_add(1, Ordering::SeqCst);
    }

    /// Number of turns that the thread of `worker` has begun.
    pub fn turns(&self, worker: WorkerId) -> u64 {
        self.of(worker).turns.load(Ordering::SeqCst)
    }

    /// Whether the thread of `worker` has begun another turn since it had begun `turns`, and has back what it
    /// had given to others until then: whatever was stored before `turns` was read is obeyed.
    pub fn obeys_since(&self, worker: WorkerId, turns: u64) -> bool {
        // In this order: the turn that has begun has said first what is in flight.
        self.turns(worker) > turns && self.of(worker).away_since.load(Ordering::SeqCst) > turns
    }

    /// Says what the thread of `worker` has in flight. To be called before each turn.
    pub fn set_in_flight(&self, worker: WorkerId, in_flight: InFlight) {
        let thread = self.of(worker);
        let unsent = in_flight.unsent_since.map_or(NOTHING, Now::boot_ns);
        thread.unsent_since.store(unsent, Ordering::Release);
        thread.away_since.store(in_flight.away_since.unwrap_or(NOTHING), Ordering::SeqCst);
    }

    /// Says how much the thread of `worker` has to do, which is awake.
    pub fn set_awake(&self, worker: WorkerId, has_time: bool) {
        let rest = if has_time { Rest::Awake } else { Rest::None };
        self.of(worker).rest.store(rest as u8, Ordering::Relaxed);
    }

    /// Says that the thread of `worker` is about to sleep. It has to look once more for what others gave it:
    /// who gives something later wakes it.
    pub fn set_asleep(&self, worker: WorkerId) {
        self.of(worker).rest.store(Rest::Asleep as u8, Ordering::Relaxed);
        // Between this store and the look at the rings, as the one in `rouse` is between ring and load.
        fence(Ordering::SeqCst);
    }

    /// Wakes the thread of `worker` if it sleeps: something was put into a ring for it.
    pub fn rouse(&self, worker: WorkerId) {
        let Thread { rest, wake, .. } = self.of(worker);
        fence(Ordering::SeqCst);
        if rest.load(Ordering::Relaxed) == Rest::Asleep as u8
            && rest.swap(Rest::Awake as u8, Ordering::Relaxed) == Rest::Asleep as u8
        {
            wake.signal();
        }
    }

    /// Whether the thread of `worker` has time to help others.
    pub fn has_time(&self, worker: WorkerId) -> bool {
        self.of(worker).rest.load(Ordering::Relaxed) != Rest::None as u8
    }
}
