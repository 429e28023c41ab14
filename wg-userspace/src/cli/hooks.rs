//! `PreUp`, `PostUp`, `PreDown` and `PostDown`: lines of the config file that a shell runs.

use std::{
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use anyhow::Context;
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::retry_on_intr,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::{Code, Failure, ledger::Hook, name::InterfaceName, programs};
use crate::config::{Config, HookEvent};

/// The hooks of an event, in the order of the file.
pub fn of(config: &Config, interface: &InterfaceName, event: HookEvent) -> Vec<Hook> {
    let hooks = config.interface.hooks.iter().filter(|hook| hook.event == event);
    hooks
        .map(|hook| Hook {
            event,
            command: hook.command.replace("%i", interface.as_str()),
            place: config.place(hook.span),
        })
        .collect()
}

/// Runs a hook to its end. If this is given up, the shell is told to end.
///
/// # Errors
/// If it fails, with the line of the file.
pub async fn run(hook: &Hook) -> Result<(), Failure> {
    eprintln!("[#] {}", hook.command);
    let mut child = shell(&hook.command).context("starting a shell for a hook")?;
    let ending = EndWhenDropped::new(&child);
    // A thread of its own, so that signals are heard meanwhile.
    let waited = tokio::task::spawn_blocking(move || child.wait());
    let status = waited.await.context("waiting for a hook")?.context("waiting for a hook")?;
    drop(ending);
    told(hook, status)
}

fn told(hook: &Hook, status: ExitStatus) -> Result<(), Failure> {
    if status.success() {
        return Ok(());
    }
    let event = hook.event.name();
    let line = format!("{}: {event} {}: {}", hook.place, programs::ended(status), hook.command);
    Err(Failure::new(Code::Runtime, line))
}

/// wg-quick's hooks are evaluated by bash(1).
fn shell(command: &str) -> std::io::Result<Child> {
    let shell = if programs::is_there("bash") { "bash" } else { "sh" };
    Command::new(shell).args(["-c", command]).spawn()
}

/// How long a shell may take to end when it is told to.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Tells a child process to end when nobody waits for it any more, and gives it time to.
struct EndWhenDropped(Option<rustix::fd::OwnedFd>);

impl EndWhenDropped {
    fn new(child: &Child) -> EndWhenDropped {
        let pid = Pid::from_child(child);
        EndWhenDropped(pidfd_open(pid, PidfdFlags::empty()).ok())
    }
}

impl Drop for EndWhenDropped {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.0 {
            // It has ended, mostly: then this is refused.
            if pidfd_send_signal(pidfd, Signal::TERM).is_ok() {
                let timeout = END_TIMEOUT.try_into().expect("some seconds fit");
                let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
                let _ = retry_on_intr(|| poll(&mut fds, Some(&timeout)));
            }
        }
    }
}
