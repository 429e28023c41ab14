//! Waiting for several descriptors at once, and waking who waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, eventfd};
pub use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

/// Waits until one of `fds` is ready or `timeout` is over, and gives the number that are ready.
///
/// What is ready stands in [`PollFd::revents`]. A signal ends the wait early, with 0 ready and
/// stale `revents`: go by the number.
///
/// # Errors
/// The kernel's, all of which mean a mistake of ours.
pub fn poll(fds: &mut [PollFd<'_>], timeout: Duration) -> io::Result<usize> {
    let timeout = Timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    match rustix::event::poll(fds, Some(&timeout)) {
        Ok(count) => Ok(count),
        Err(Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// A flag that makes a waiting thread's [`poll`] return. Signals from any thread; many signals
/// before one [`EventFd::drain`] count as one.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Makes one that is not signalled.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Wakes who polls this, now or at its next [`poll`].
    pub fn signal(&self) {
        // Fails only when the counter is full, and then it is signalled already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Takes the signal back. True if there was one.
    ///
    /// Drain first and look at the queues after: a signal that comes between is kept for the next
    /// [`poll`].
    pub fn drain(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(event: &EventFd, timeout: Duration) -> bool {
        poll(&mut [PollFd::new(event, PollFlags::IN)], timeout).unwrap() == 1
    }

    #[test]
    fn a_signal_wakes_once_until_it_is_drained() {
        let event = EventFd::new().unwrap();
        assert!(!ready(&event, Duration::ZERO));
        event.signal();
        event.signal();
        assert!(ready(&event, Duration::ZERO));
        assert!(event.drain());
        assert!(!event.drain());
        assert!(!ready(&event, Duration::from_millis(1)));
    }

    #[test]
    fn a_signal_from_another_thread_ends_the_wait() {
        let event = EventFd::new().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| event.signal());
            assert!(ready(&event, Duration::from_secs(30)));
        });
    }
}
