//! `run`: the daemon, in the foreground or in the background.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use super::{Code, Failure, args, launch};
use crate::daemon;

pub fn run(arguments: args::Run) -> Result<Code, Failure> {
    let options = options(arguments.interface.as_str(), &arguments.data_path);
    let log = arguments.log.as_deref();
    if arguments.background_child {
        launch::leave_session()?;
        // What is worth a warning before the daemon is ready reaches the terminal it was
        // started from.
        start_logging(log.unwrap_or("warn"), false);
        let ready = || {
            if let Err(error) = launch::tell_ready() {
                tracing::warn!("{error:#}");
            }
        };
        daemon::run(options, ready)?;
    } else if arguments.foreground || wants_foreground() {
        // systemd's journal has its own time stamps.
        start_logging(log.unwrap_or("info"), std::env::var_os("JOURNAL_STREAM").is_none());
        let interface = options.interface.clone();
        daemon::run(options, || tracing::info!("{interface} is ready"))?;
    } else {
        launch::Background::start(&options, log)?;
    }
    Ok(Code::Ok)
}

/// What the daemon is told; what was left open is its default.
fn options(interface: &str, data_path: &args::DataPathArgs) -> daemon::Options {
    daemon::Options {
        interface: interface.to_owned(),
        xdp: data_path.xdp().unwrap_or_default().to_vec(),
        mode: data_path.mode.unwrap_or(daemon::Mode::Auto),
        workers: data_path.workers.map(usize::from),
        peer_source: data_path.peer_source.clone(),
    }
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
