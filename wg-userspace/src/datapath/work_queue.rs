//! What workers leave to the handshake pool, and how they wake it.
//!
//! Two bounded queues without locks. What our own peers need has a place of its own, which strangers
//! cannot fill. Where a datagram finds no room the oldest goes: under a flood the newest is the one
//! whose sender still waits.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use super::handoff::{HandshakeDatagram, Work};
use crate::sys::{EventFd, wait};

/// The queues from all workers to the threads of the pool.
#[derive(Debug)]
pub struct WorkQueue {
    datagrams: ArrayQueue<HandshakeDatagram>,
    needs: ArrayQueue<Work>,
    /// Datagrams that had to make room for newer ones, and that nobody has counted yet.
    displaced: AtomicU64,
    wake: EventFd,
    /// Threads that sleep, or are about to.
    sleepers: AtomicUsize,
    /// `wake` is signalled, or is about to be: nobody else needs to.
    signalled: AtomicBool,
}

impl WorkQueue {
    /// Room for so many datagrams, and for so many needs of our own peers.
    ///
    /// # Errors
    /// If the kernel gives no event descriptor.
    pub fn new(datagram_count: usize, need_count: usize) -> io::Result<Self> {
        Ok(Self {
            datagrams: ArrayQueue::new(datagram_count),
            needs: ArrayQueue::new(need_count),
            displaced: AtomicU64::new(0),
            wake: EventFd::new()?,
            sleepers: AtomicUsize::new(0),
            signalled: AtomicBool::new(false),
        })
    }

    /// Leaves work to the pool; `false` if it is not taken. A datagram always is.
    ///
    /// Costs a system call only while a thread sleeps, and then only who comes first.
    pub fn push(&self, work: Work) -> bool {
        let taken = match work {
            Work::Datagram(datagram) => {
                if self.datagrams.force_push(datagram).is_some() {
                    self.displaced.fetch_add(1, Ordering::Relaxed);
                }
                true
            }
            need => self.needs.push(need).is_ok(),
        };
        self.wake();
        taken
    }

    /// The oldest need of our own peers.
    pub fn take_need(&self) -> Option<Work> {
        self.needs.pop()
    }

    /// The oldest datagram.
    pub fn take_datagram(&self) -> Option<HandshakeDatagram> {
        self.datagrams.pop()
    }

    /// The oldest need, or else the oldest datagram.
    pub fn take(&self) -> Option<Work> {
        self.take_need().or_else(|| self.take_datagram().map(Work::Datagram))
    }

    /// Datagrams that wait.
    pub fn datagram_count(&self) -> usize {
        self.datagrams.len()
    }

    /// Datagrams that had to make room since this was last asked.
    pub fn take_displaced(&self) -> u64 {
        // A plain read first: nearly always there is none.
        match self.displaced.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.displaced.swap(0, Ordering::Relaxed),
        }
    }

    /// Wakes the threads that sleep, if there are any.
    pub fn wake(&self) {
        // Pairs with the fence in `sleep`: either this sees the sleeper, or the sleeper sees what was
        // pushed before.
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) > 0 && !self.signalled.swap(true, Ordering::AcqRel)
        {
            self.wake.signal();
        }
    }

    /// Has a thread of the pool sleep until there is work, and no longer than `timeout`.
    ///
    /// # Errors
    /// The kernel's, which mean a mistake of ours.
    pub fn sleep(&self, timeout: Duration) -> io::Result<()> {
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let mut outcome = Ok(());
        if self.datagrams.is_empty() && self.needs.is_empty() {
            let mut wake = [wait::PollFd::new(&self.wake, wait::PollFlags::IN)];
            outcome = wait::poll(&mut wake, timeout).map(drop);
        }
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
        if self.wake.drain() {
            // Whoever relied on the signal pushed before it looked at this: we see it when we look.
            self.signalled.swap(false, Ordering::AcqRel);
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use wg_common::endpoint::Endpoint;
    use wg_common::id::{DeviceId, PeerId, WorkerId};

    use super::*;

    fn datagram(number: u8) -> Work {
        let from = Endpoint::configured("192.0.2.1:1".parse().unwrap());
        let message = [number; 92];
        Work::Datagram(HandshakeDatagram::new(DeviceId(0), &message, from, WorkerId(0)).unwrap())
    }

    fn need(number: u32) -> Work {
        Work::Initiate(DeviceId(0), PeerId(number))
    }

    #[test]
    fn the_oldest_datagram_makes_room_and_is_counted() {
        let queue = WorkQueue::new(4, 1).unwrap();
        assert!((0..7).all(|number| queue.push(datagram(number))));
        assert_eq!((queue.take_displaced(), queue.take_displaced()), (3, 0));
        let numbers: Vec<u8> =
            std::iter::from_fn(|| queue.take_datagram()).map(|d| d.message()[0]).collect();
        assert_eq!(numbers, [3, 4, 5, 6]);
    }

    #[test]
    fn strangers_do_not_fill_the_place_of_our_own_peers() {
        let queue = WorkQueue::new(4, 2).unwrap();
        (0..100).for_each(|number| assert!(queue.push(datagram(number))));
        assert!(queue.push(need(1)) && queue.push(need(2)));
        assert!(!queue.push(need(3)), "it is told, and asks again later");
        assert!(matches!(queue.take(), Some(Work::Initiate(_, PeerId(1)))), "before all datagrams");
        assert_eq!(queue.datagram_count(), 4);
    }

    #[test]
    fn nobody_signals_while_nobody_sleeps() {
        let queue = WorkQueue::new(4, 1).unwrap();
        queue.push(datagram(1));
        assert!(!queue.wake.drain());
        // And with work there, nobody falls asleep.
        let before = Instant::now();
        queue.sleep(Duration::from_secs(60)).unwrap();
        assert!(before.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn no_work_is_left_while_all_sleep() {
        const COUNT: u32 = 20_000;
        const THREADS: usize = 3;
        /// The end comes by the queue as well: a word beside it could be missed by who falls asleep.
        const END: PeerId = PeerId(u32::MAX);
        let queue = WorkQueue::new(64, COUNT as usize + THREADS).unwrap();
        let done = AtomicUsize::new(0);
        let before = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    loop {
                        match queue.take_need() {
                            Some(Work::Initiate(_, END)) => break,
                            Some(_) => {
                                if done.fetch_add(1, Ordering::Relaxed) + 1 == COUNT as usize {
                                    (0..THREADS).for_each(|_| assert!(queue.push(need(END.0))));
                                }
                            }
                            // Far longer than the test may take: a lost wake-up shows.
                            None => queue.sleep(Duration::from_secs(600)).unwrap(),
                        }
                    }
                    // Who goes may have been the only one that knew of the others' ends.
                    queue.wake();
                });
            }
            for worker in 0..2 {
                let queue = &queue;
                scope.spawn(move || {
                    for number in 0..COUNT / 2 {
                        assert!(queue.push(need(number)));
                        if number % 64 == worker {
                            // Lets the others fall asleep.
                            std::thread::sleep(Duration::from_micros(200));
                        }
                    }
                });
            }
        });
        assert!(before.elapsed() < Duration::from_secs(300));
    }
}
