//! `run`: the keeper of a daemon, in the foreground or in the background; `data`: what it keeps.

use std::ffi::CStr;
use std::io::IsTerminal;
use std::os::fd::AsFd;

use anyhow::Context;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::{Code, Failure, args, directives, launch};
use crate::{
    daemon,
    keeper::{self, Launch, notify},
    sandbox,
    sys::{clock, process},
};

/// The first descriptor beyond the standard streams.
const FIRST_FD: i32 = 3;
/// What the host calls the data process, in at most 15 bytes.
const DATA_PROCESS_NAME: &CStr = c"tidegate-data";

pub fn run(mut arguments: args::Run) -> Result<Code, Failure> {
    if !arguments.background_child {
        // What the first of several files says goes before what others say.
        for interface in &arguments.interfaces {
            arguments.data_path.fill_from(&directives::of(interface));
        }
    }
    let options = options(&arguments)?;
    let log = arguments.log.as_deref();
    if arguments.background_child {
        launch::leave_session()?;
        // What is worth a warning before the daemon is ready reaches the terminal it was
        // started from.
        let log = log.unwrap_or("warn").to_owned();
        let ready = || match launch::tell_ready() {
            Ok(true) => {}
            // As the signal would have done that tells of a parent's end.
            Ok(false) => end_oneself(),
            Err(error) => tracing::warn!("{error:#}"),
        };
        keep(&options, Launch { log, with_time: false, in_background: true }, ready)?;
    } else if arguments.foreground || wants_foreground() {
        let log = log.unwrap_or("info").to_owned();
        let ready = || {
            tracing::info!("{} ready", are(&options.interfaces));
            notify::ready(None);
        };
        // The journal has its own time stamps.
        let with_time = !is_journal(std::io::stderr());
        keep(&options, Launch { log, with_time, in_background: false }, ready)?;
    } else {
        let background = launch::Background::start(&options, log)?;
        notify::ready(Some(background.pid()));
    }
    Ok(Code::Ok)
}

/// Is the keeper.
fn keep(options: &daemon::Options, launch: Launch, ready: impl FnOnce()) -> Result<(), Failure> {
    start_logging(&launch.log, launch.with_time);
    match keeper::run(options, &launch, ready) {
        Err(error) => match error.downcast_ref() {
            Some(&keeper::Error::NotReady(status)) => Err(launch::of_child(status)),
            None => Err(error.into()),
        },
        Ok(()) => Ok(()),
    }
}

/// Begins the end of this process in good order.
fn end_oneself() {
    use rustix::process::{Signal, getpid, kill_process};
    if let Err(error) = kill_process(getpid(), Signal::TERM) {
        tracing::error!(%error, "nobody knows of this daemon, and it does not end");
    }
}

/// Is the data process: its standard input and output are the keeper's channels.
pub fn data(arguments: &args::Data) -> Result<Code, Failure> {
    // Once it has given up what it may do, it reaches no journal: its lines go there by standard error.
    log_to_stderr(&arguments.log, arguments.with_time);
    // Else ps(1) would call it `exe`. A name that is refused changes nothing.
    let _ = rustix::thread::set_name(DATA_PROCESS_NAME);
    let null = launch::null()?;
    let own = |fd| rustix::io::fcntl_dupfd_cloexec(fd, FIRST_FD).context("taking over a channel");
    let (requests, events) = (own(rustix::stdio::stdin())?, own(rustix::stdio::stdout())?);
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .context("letting go of the standard streams")?;
    // Threads that begin later inherit it.
    if let Err(error) = process::take_precedence() {
        tracing::info!(%error, "packets are moved at the usual priority, not before what else the host does");
    }
    // A hook for tests opens a file with it.
    clock::reading();
    let sandbox =
        sandbox::Options { parent: Some(arguments.keeper), ..sandbox::Options::default() };
    let entered = sandbox::enter_early(&sandbox)
        .map_err(anyhow::Error::new)
        .context("giving up what this process may do")?;
    daemon::run(requests, events, &entered, || {
        if arguments.in_background
            && let Err(error) = rustix::stdio::dup2_stderr(&null)
        {
            tracing::warn!(%error, "standard error stays open");
        }
    })?;
    Ok(Code::Ok)
}

/// What the daemon is told; what was left open is its default.
fn options(arguments: &args::Run) -> Result<daemon::Options, Failure> {
    let (names, data_path) = (&arguments.interfaces, &arguments.data_path);
    for (at, name) in names.iter().enumerate() {
        if names[..at].contains(name) {
            return Err(Failure::new(
                Code::Usage,
                format_args!("`{name}` is named twice; name it once"),
            ));
        }
    }
    Ok(daemon::Options {
        interfaces: names.iter().map(|name| name.as_str().to_owned()).collect(),
        // Also in the background, where the file's warnings were printed before.
        rules: names.iter().map(directives::rules_of).collect(),
        nat: names.iter().map(directives::nat_of).collect(),
        xdp: data_path.xdp().unwrap_or_default().to_vec(),
        by_socket: arguments.by_socket.clone(),
        mode: data_path.mode.unwrap_or(daemon::Mode::Auto),
        busy_poll: data_path.busy_poll,
        aead: data_path.aead,
        workers: data_path.workers.map(usize::from),
        peer_source: data_path.peer_source.clone(),
    })
}

/// Names with their verb.
fn are(interfaces: &[String]) -> String {
    let verb = if interfaces.len() == 1 { "is" } else { "are" };
    format!("{} {verb}", interfaces.join(", "))
}

/// As wireguard-go: tools set this to keep a daemon in the foreground.
fn wants_foreground() -> bool {
    std::env::var_os("WG_PROCESS_FOREGROUND").is_some_and(|value| value == "1")
}

/// Sends log lines to standard error, or to the journal with their fields if that is where standard
/// error leads; `filter` was checked with the arguments.
fn start_logging(filter: &str, with_time: bool) {
    if is_journal(std::io::stderr())
        && let Ok(journal) = tracing_journald::layer()
    {
        let layers = tracing_subscriber::registry().with(EnvFilter::new(filter)).with(journal);
        return layers.try_init().expect("nobody else sets a subscriber");
    }
    log_to_stderr(filter, with_time);
}

fn log_to_stderr(filter: &str, with_time: bool) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    let result = if with_time { builder.try_init() } else { builder.without_time().try_init() };
    result.expect("nobody else sets a subscriber");
}

/// Whether `stream` leads to the journal.
fn is_journal(stream: impl AsFd) -> bool {
    is_stream(std::env::var("JOURNAL_STREAM").ok().as_deref(), stream)
}

/// Whether `stream` is the one that the service manager named (systemd.exec(5)): it may have been led
/// elsewhere since.
fn is_stream(named: Option<&str>, stream: impl AsFd) -> bool {
    let named = named.and_then(|named| named.split_once(':'));
    let numbers = named.and_then(|(dev, ino)| Some((dev.parse().ok()?, ino.parse().ok()?)));
    let is: Option<(u64, u64)> =
        rustix::fs::fstat(stream).ok().map(|stat| (stat.st_dev, stat.st_ino));
    numbers.is_some() && numbers == is
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_is_where_standard_error_leads_and_not_where_it_once_led() {
        let (file, other) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let stat = rustix::fs::fstat(&file).unwrap();
        let named = format!("{}:{}", stat.st_dev, stat.st_ino);
        assert!(is_stream(Some(&named), &file));
        assert!(!is_stream(Some(&named), &other));
        for wrong in [None, Some(""), Some(":"), Some("1"), Some("x:y")] {
            assert!(!is_stream(wrong, &file), "{wrong:?}");
        }
    }
}
