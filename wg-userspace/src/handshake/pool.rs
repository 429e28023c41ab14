//! The pool's threads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::Receiver;

use super::Handshakes;
use crate::datapath::handoff::Work;
use crate::sys::clock;

/// Threads that do handshakes beside the workers, until [`Pool::stop`] is called.
pub struct Pool {
    stop: crossbeam_channel::Sender<()>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `thread_count` threads that take from `work`.
    ///
    /// # Errors
    /// If the kernel gives no thread.
    pub fn start(
        handshakes: &Arc<Handshakes>,
        work: &Receiver<Work>,
        thread_count: usize,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let threads = (0..thread_count)
            .map(|number| {
                let (handshakes, work) = (Arc::clone(handshakes), work.clone());
                let stopped = stopped.clone();
                std::thread::Builder::new().name(format!("handshake-{number}")).spawn(move || {
                    loop {
                        crossbeam_channel::select! {
                            recv(work) -> work => match work {
                                Ok(work) => {
                                    // A message that finds a bug of ours must not end all handshakes.
                                    let act = || handshakes.work(&work, clock::boot_now());
                                    if catch_unwind(AssertUnwindSafe(act)).is_err() {
                                        tracing::error!("a handshake message made us panic");
                                    }
                                }
                                Err(_) => return,
                            },
                            recv(stopped) -> _ => return,
                        }
                    }
                })
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self { stop, threads })
    }

    /// Ends the threads, each after the message it is at.
    pub fn stop(self) {
        drop(self.stop);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a handshake thread had panicked");
            }
        }
    }
}
