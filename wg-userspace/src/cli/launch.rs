//! A daemon in the background: a second process of this program that says when it is ready. It is the
//! keeper, and has a child of its own.
//!
//! The child runs `tidegate run --background-child …` in a session of its own. Its standard
//! output is a pipe on which it writes one line when the interface and its socket exist; until
//! then it shares standard error with us, so that its errors and warnings reach the user. After
//! that its standard streams are `/dev/null`.

use std::{
    ffi::OsStr,
    fs::File,
    io::{BufRead, BufReader, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context;
use rustix::process::{Pid, Signal};

use super::{Code, Failure};
use crate::daemon;

/// What the child writes when it is ready.
const READY_LINE: &str = "ready\n";

/// How long a daemon may take to end before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// A daemon that runs in the background and is ready.
pub struct Background {
    child: Child,
}

impl Background {
    /// Starts a daemon and waits until it is ready.
    ///
    /// # Errors
    /// With the child's exit code if it ends before that; it has printed why.
    pub fn start(options: &daemon::Options, log: Option<&str>) -> Result<Self, Failure> {
        let mut child = command(options, log)
            .and_then(|mut command| command.spawn())
            .context("starting the daemon's process")?;
        let stdout = child.stdout.take().expect("its standard output is piped");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("waiting until the daemon is ready")?;
        if line == READY_LINE {
            return Ok(Self { child });
        }
        Err(of_child(child.wait().context("waiting for the daemon's end")?))
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the daemon has ended; tells it to, and at last kills it, if it takes too long.
    pub fn stop(mut self) {
        let pid = Pid::from_child(&self.child);
        if wait_for_end(pid, STOP_TIMEOUT) {
            return self.reap();
        }
        // Both can only fail if it has ended in the meantime: it is our child, so its id is not
        // given to another process before we reap it.
        let _ = rustix::process::kill_process(pid, Signal::TERM);
        if !wait_for_end(pid, STOP_TIMEOUT) {
            let _ = self.child.kill();
        }
        self.reap();
    }

    fn reap(&mut self) {
        let _ = self.child.wait();
    }
}

/// A process that ended before it was ready, and has printed why.
pub fn of_child(status: ExitStatus) -> Failure {
    match (status.code(), status.signal()) {
        (Some(0), _) => Failure::new(
            Code::Runtime,
            "the daemon ended before it was ready; `tidegate run -f IF` shows what it prints",
        ),
        (Some(code), _) => Failure::of_child(code.try_into().unwrap_or(Code::Runtime as u8)),
        (None, signal) => {
            let signal = signal.unwrap_or(0);
            Failure::new(
                Code::Runtime,
                format_args!(
                    "the daemon was killed by signal {signal}; the journal or `dmesg` may say why"
                ),
            )
        }
    }
}

/// Waits until a process has ended; false if it has not after `timeout`.
pub fn wait_for_end(pid: Pid, timeout: Duration) -> bool {
    use rustix::{
        event::{PollFd, PollFlags, poll},
        io::retry_on_intr,
        process::{PidfdFlags, pidfd_open},
    };
    // No such process: it has ended and was reaped.
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
    let timeout = timeout.try_into().expect("some seconds fit");
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    matches!(retry_on_intr(|| poll(&mut fds, Some(&timeout))), Ok(1..))
}

fn command(options: &daemon::Options, log: Option<&str>) -> std::io::Result<Command> {
    use clap::ValueEnum;
    let mut command = Command::new(std::env::current_exe()?);
    let mode = options.mode.to_possible_value().expect("no mode is hidden");
    command.arg0("tidegate").args(["run", "--background-child", "--mode", mode.get_name()]);
    let aead = options.aead.to_possible_value().expect("no back end is hidden");
    command.args(["--aead", aead.get_name()]);
    command.arg(format!("--xdp={}", options.xdp.join(",")));
    for (nic, reason) in &options.by_socket {
        command.arg(format!("--by-socket={nic}={reason}"));
    }
    if options.busy_poll {
        command.arg("--busy-poll");
    }
    if let Some(workers) = options.workers {
        command.arg(format!("--workers={workers}"));
    }
    if let Some(socket) = &options.peer_source {
        command
            .arg("--peer-source")
            .arg([OsStr::new("unix:"), socket.as_os_str()].join(OsStr::new("")));
    }
    if let Some(log) = log {
        command.arg(format!("--log={log}"));
    }
    // `--`: a name may begin with a dash.
    command.arg("--").args(&options.interfaces);
    // It is the daemon that the service manager watches, not who started it.
    command.env_remove("WATCHDOG_PID");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    Ok(command)
}

/// Leaves the session of whoever started us, but ends with it until we are ready. For the
/// child, before anything else.
pub fn leave_session() -> Result<(), Failure> {
    rustix::process::setsid().context("starting a session of its own")?;
    orphaned_by_a_test("begin");
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
        .context("asking to end with the parent process")?;
    // Of one that has ended before, no signal tells.
    if !is_waited_for() {
        return Err(Failure::new(Code::Runtime, "who started the daemon has ended"));
    }
    orphaned_by_a_test("middle");
    // A working directory would keep its file system mounted.
    std::env::set_current_dir("/").context("changing to the root directory")?;
    Ok(())
}

/// Whether somebody still has the other end of our standard output, if that is a pipe.
fn is_waited_for() -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let stdout = std::io::stdout();
    let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let found = poll(&mut fds, Some(&at_once));
    found.is_err() || !fds[0].revents().contains(PollFlags::ERR)
}

/// Says that the daemon is ready and lets go of the standard streams. For the child. False if whoever
/// waited for that has ended: then nobody will ever know of this daemon, and it is to end, too.
pub fn tell_ready() -> anyhow::Result<bool> {
    // Who hears that it is ready may end at once.
    rustix::process::set_parent_process_death_signal(None)
        .context("staying when the parent process ends")?;
    orphaned_by_a_test("end");
    let mut out = std::io::stdout().lock();
    let is_told = out.write_all(READY_LINE.as_bytes()).and_then(|()| out.flush()).is_ok();
    let null = null()?;
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .and_then(|()| rustix::stdio::dup2_stderr(&null))
        .context("letting go of the standard streams")?;
    Ok(is_told)
}

/// A hook for tests: kills the parent process at the point that `TIDEGATE_TEST_ORPHAN_AT` names.
#[cfg(debug_assertions)]
fn orphaned_by_a_test(point: &str) {
    use rustix::process::{getppid, kill_process};
    if std::env::var("TIDEGATE_TEST_ORPHAN_AT").is_ok_and(|wanted| wanted == point)
        && let Some(parent) = getppid()
    {
        let _ = kill_process(parent, Signal::KILL);
        while getppid() == Some(parent) {
            std::thread::yield_now();
        }
    }
}

#[cfg(not(debug_assertions))]
fn orphaned_by_a_test(_: &str) {}

/// What takes everything and has nothing.
pub fn null() -> anyhow::Result<File> {
    File::options().read(true).write(true).open("/dev/null").context("opening /dev/null")
}
