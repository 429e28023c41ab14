//! The data process: started, told, killed.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::net::UnixDatagram;

use super::client::{receive_async, waitable};
use super::protocol::{self, Answer, ChannelError, Event, Request};

/// A data process that takes no more events than that is stuck, or asks too much.
const PENDING_COUNT_MAX: usize = 1 << 16;

/// How data processes are started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What they log, to our standard error.
    pub log: String,
    /// Log lines have their time.
    pub with_time: bool,
    /// They let go of standard error when they are ready.
    pub in_background: bool,
}

/// A data process. It is killed when this is dropped.
pub struct Data {
    child: Child,
    /// Nothing once it has closed its end, or said what makes no sense.
    requests: Option<UnixDatagram>,
    events: UnixDatagram,
    pending: VecDeque<Vec<u8>>,
    started: Instant,
}

impl Data {
    /// Starts one. It ends with the calling thread, which should be the process's first.
    ///
    /// # Errors
    /// If there is no process to be had.
    pub fn start(interfaces: &[String], launch: &Launch) -> io::Result<Self> {
        let (requests, its_requests) = protocol::pair()?;
        let (events, its_events) = protocol::pair()?;
        // Our own file, also after another one was installed in its place.
        let mut command = Command::new("/proc/self/exe");
        let own_pid = std::process::id().to_string();
        command.arg0("tidegate").args(["data", "--keeper", &own_pid, "--log", &launch.log]);
        if launch.with_time {
            command.arg("--with-time");
        }
        if launch.in_background {
            command.arg("--in-background");
        }
        command.arg("--").args(interfaces);
        // In a group of its own: a Ctrl-C is for the keeper, which ends it in good order.
        command.stdin(Stdio::from(its_requests)).stdout(Stdio::from(its_events)).process_group(0);
        let child = command.spawn()?;
        Ok(Self {
            child,
            requests: Some(waitable(requests)?),
            events: waitable(events)?,
            pending: VecDeque::new(),
            started: Instant::now(),
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// For how long it has been there.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Ends it at once. [`Data::ended`] will tell.
    pub fn kill(&mut self) {
        self.requests = None;
        // That fails only if it has ended.
        let _ = self.child.kill();
    }

    /// Waits for its next request, for ever if it makes none any more; meanwhile tells it what it is to be
    /// told. Dropping the future before it is ready loses nothing.
    ///
    /// # Errors
    /// If there is nobody, or nobody sensible, at the other end.
    pub async fn request(&mut self) -> Result<(Request, Vec<OwnedFd>), ChannelError> {
        loop {
            let request = async {
                match &self.requests {
                    Some(requests) => receive_async(requests).await,
                    None => std::future::pending().await,
                }
            };
            let told = async {
                match self.pending.front() {
                    Some(text) => send_text(&self.events, text).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                request = request => return request,
                told = told => {
                    self.pending.pop_front();
                    if told.is_err() {
                        // It is gone, which the other channel tells.
                        self.pending.clear();
                    }
                }
            }
        }
    }

    /// Answers its request.
    ///
    /// # Errors
    /// If it does not take the answer, for which it should be waiting.
    pub fn answer(&self, answer: &Answer, fds: &[OwnedFd]) -> Result<(), ChannelError> {
        let Some(requests) = &self.requests else { return Err(ChannelError::Closed) };
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        protocol::send(requests, answer, &fds)
    }

    /// Tells it something, as soon as it listens.
    pub fn tell(&mut self, event: &Event) {
        if self.pending.len() >= PENDING_COUNT_MAX {
            tracing::warn!("the data process does not listen any more");
            return self.kill();
        }
        match serde_json::to_vec(event) {
            Ok(text) => self.pending.push_back(text),
            Err(error) => tracing::error!(%error, "an event that cannot be told"),
        }
    }
}

async fn send_text(socket: &UnixDatagram, text: &[u8]) -> Result<(), ChannelError> {
    let sent = socket
        .async_io(Interest::WRITABLE, || match protocol::send_text(socket, text, &[]) {
            Err(ChannelError::Io(error)) => Err(error),
            other => Ok(other),
        })
        .await;
    sent.map_err(ChannelError::Io)?
}

impl Drop for Data {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.kill();
            let _ = self.child.wait();
        }
    }
}
