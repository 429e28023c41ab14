//! `run`: the keeper of a daemon, in the foreground or in the background; `data`: what it keeps.

use std::io::IsTerminal;

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use super::{Code, Failure, args, launch};
use crate::{
    daemon,
    keeper::{self, Launch},
    sandbox,
    sys::clock,
};

/// The first descriptor beyond the standard streams.
const FIRST_FD: i32 = 3;

pub fn run(arguments: args::Run) -> Result<Code, Failure> {
    let options = options(&arguments)?;
    let log = arguments.log.as_deref();
    if arguments.background_child {
        launch::leave_session()?;
        // What is worth a warning before the daemon is ready reaches the terminal it was
        // started from.
        let log = log.unwrap_or("warn").to_owned();
        let ready = || {
            if let Err(error) = launch::tell_ready() {
                tracing::warn!("{error:#}");
            }
        };
        keep(&options, Launch { log, with_time: false, in_background: true }, ready)?;
    } else if arguments.foreground || wants_foreground() {
        // systemd's journal has its own time stamps.
        let with_time = std::env::var_os("JOURNAL_STREAM").is_none();
        let log = log.unwrap_or("info").to_owned();
        let ready = || tracing::info!("{} ready", are(&options.interfaces));
        keep(&options, Launch { log, with_time, in_background: false }, ready)?;
    } else {
        launch::Background::start(&options, log)?;
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

/// Is the data process: its standard input and output are the keeper's channels.
pub fn data(arguments: &args::Data) -> Result<Code, Failure> {
    start_logging(&arguments.log, arguments.with_time);
    let null = launch::null()?;
    let own = |fd| rustix::io::fcntl_dupfd_cloexec(fd, FIRST_FD).context("taking over a channel");
    let (requests, events) = (own(rustix::stdio::stdin())?, own(rustix::stdio::stdout())?);
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .context("letting go of the standard streams")?;
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
            return Err(Failure::new(Code::Usage, format_args!("`{name}` is named twice")));
        }
    }
    Ok(daemon::Options {
        interfaces: names.iter().map(|name| name.as_str().to_owned()).collect(),
        xdp: data_path.xdp().unwrap_or_default().to_vec(),
        mode: data_path.mode.unwrap_or(daemon::Mode::Auto),
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

/// Sends log lines to standard error; `filter` was checked with the arguments.
fn start_logging(filter: &str, with_time: bool) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    let result = if with_time { builder.try_init() } else { builder.without_time().try_init() };
    result.expect("nobody else sets a subscriber");
}
