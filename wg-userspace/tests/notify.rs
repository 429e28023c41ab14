//! What the service manager is told, and the unit that it is told by.
//!
//! ```text
//! test, as the service manager ── NOTIFY_SOCKET ── tidegate run -f, in a namespace
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use xtask::lab::{self, Lab, Process};

const LIMIT: Duration = Duration::from_secs(10);
const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");
/// The service manager wants to hear of the daemon within this, and hears of it twice as often.
const WATCHDOG: Duration = Duration::from_millis(400);

/// Starts a daemon that is told to notify, with more of its environment.
fn start(lab: &Lab, environment: &[(&str, &str)]) -> (UnixDatagram, Process) {
    let path = lab.path("notify.sock");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = lab.gateway.command(Path::new(TIDEGATE));
    command.args(["run", "-f", "--mode", "udp", "--workers", "2", &lab.interface('g')]);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
    command.env_remove("WATCHDOG_PID").envs(environment.iter().copied());
    (socket, lab.gateway.spawn("tidegate-run", &mut command).unwrap())
}

/// The next message to the service manager, if there is one in time.
fn next(socket: &UnixDatagram) -> Option<String> {
    let mut bytes = [0; 256];
    let len = socket.recv(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes[..len]).trim().to_owned())
}

/// The first one that is not about its workers, which may move before it is ready.
fn ready(socket: &UnixDatagram) -> Option<String> {
    std::iter::from_fn(|| next(socket)).find(|message| message != "WATCHDOG=1")
}

#[test]
fn it_says_that_it_is_ready_that_it_lives_and_that_it_ends() {
    let test = "notify::it_says_that_it_is_ready_that_it_lives_and_that_it_ends";
    if let Some(reason) = lab::unavailable() {
        return eprintln!("SKIPPED {test}: {reason}");
    }
    let lab = Lab::new().unwrap();
    let (socket, process) = start(&lab, &[]);
    assert_eq!(ready(&socket).as_deref(), Some("READY=1"));
    for _ in 0..3 {
        assert_eq!(next(&socket).as_deref(), Some("WATCHDOG=1"));
    }
    process.signal(Signal::TERM).unwrap();
    let last = std::iter::from_fn(|| next(&socket)).find(|message| message != "WATCHDOG=1");
    assert_eq!(last.as_deref(), Some("STOPPING=1"));
}

#[test]
fn it_does_not_say_that_it_lives_while_a_worker_stands_still() {
    let test = "notify::it_does_not_say_that_it_lives_while_a_worker_stands_still";
    if let Some(reason) = lab::unavailable() {
        return eprintln!("SKIPPED {test}: {reason}");
    }
    let lab = Lab::new().unwrap();
    let (socket, _process) = start(&lab, &[("TIDEGATE_TEST_STALL_WORKER", "1:0")]);
    assert_eq!(ready(&socket).as_deref(), Some("READY=1"));
    // It takes its time until a worker counts as standing still, and then there is silence.
    socket.set_read_timeout(Some(WATCHDOG * 5)).unwrap();
    let beats = std::iter::from_fn(|| next(&socket)).take(10).count();
    assert!(beats < 10, "it goes on to say that it lives");
}

#[test]
fn the_unit_is_one_that_systemd_takes() {
    let test = "notify::the_unit_is_one_that_systemd_takes";
    if lab::find_program("systemd-analyze").is_none() {
        return eprintln!("SKIPPED {test}: there is no systemd-analyze");
    }
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../dist/systemd/tidegate@.service");
    let unit = std::fs::read_to_string(unit).unwrap();
    // With the first, systemd before 252 has no TUN device for a unit; with the second, none has.
    for line in ["ProtectClock=yes", "PrivateDevices=yes"] {
        assert!(!unit.lines().any(|known| known == line), "{line}");
    }
    let unit = unit.replace("/usr/bin/tidegate", TIDEGATE);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tidegate@.service"), &unit).unwrap();
    let instance = folder.path().join("tidegate@wg0.service");
    std::os::unix::fs::symlink("tidegate@.service", &instance).unwrap();
    let mut verify = Command::new("systemd-analyze");
    let output = verify.args(["verify", "--man=no"]).arg(&instance).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let ours = errors.lines().filter(|line| line.contains("tidegate"));
    assert_eq!(ours.collect::<Vec<_>>(), Vec::<&str>::new());
    assert!(output.status.success(), "{errors}");
}
