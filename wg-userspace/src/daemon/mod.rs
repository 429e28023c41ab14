//! Start, signals, stop; carries changes of the device to every other room.
//!
//! The one place that knows every room: [`start`] opens the edges and starts the workers,
//! [`control`] answers wg(8) and applies changes, [`effects`] carries them to sessions and workers,
//! [`follow`] goes where the interface and routes go, [`pull`] adds peers that knock, [`quiesce`]
//! pauses, [`watchdog`] finds stuck workers, [`status`] says how things stand. Everything here runs on
//! one thread; it may be slow and must be right.

mod control;
mod effects;
mod follow;
mod mode;
mod pull;
mod pulled;
mod quiesce;
mod start;
mod status;
mod watchdog;

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use self::pull::PullEvents;
use crate::host::{CloneWatch, Host, LinkChange};
use crate::uapi;

pub use effects::carry_out;
pub use mode::{Mode, ModeInUse};
pub use watchdog::Watchdog;

/// How long workers may take to stop before they are left alone.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// What a daemon is started with; everything else comes through the UAPI socket.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the TUN device to create.
    pub interface: String,
    /// NICs to attach the steer program to.
    pub xdp: Vec<String>,
    /// Which back end to use.
    pub mode: Mode,
    /// Number of workers; the CPUs this process may run on if not given.
    pub workers: Option<usize>,
    /// Unix socket of the service that knows peers which are not configured.
    pub peer_source: Option<PathBuf>,
}

/// Why a daemon did not start, where the caller can do something about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused for want of privilege.
    #[error("{0}")]
    Privilege(String),
    /// An interface of this name is there already.
    #[error("interface `{0}` exists already")]
    AlreadyExists(String),
    /// There is no interface of this name.
    #[error("there is no interface `{0}`")]
    NotFound(String),
}

/// Runs a daemon until SIGTERM, SIGINT or the deletion of its TUN device; calls `ready` once wg(8)
/// can configure it.
///
/// # Errors
/// If it cannot start, [`Error`] in the chain where that says more. A stop is no error.
pub fn run(options: Options, ready: impl FnOnce()) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the control thread's runtime")?;
    tokio::task::LocalSet::new().block_on(&runtime, serve(options, ready))
}

async fn serve(options: Options, ready: impl FnOnce()) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watching for SIGINT")?;
    let host = Host::new().context("opening netlink")?;
    let mut running = start::start(&options, &host).await?;
    let control = Rc::clone(&running.control);
    let server = uapi::Server::bind(&options.interface)
        .with_context(|| format!("opening the UAPI socket of {}", options.interface))?;
    let mut serving = tokio::task::spawn_local(server.serve(Rc::clone(&control)));
    let mut clones = CloneWatch::new()
        .inspect_err(
            |error| tracing::warn!(%error, "clones of this machine are seen by its clock only"),
        )
        .ok();
    tracing::info!(interface = options.interface, mode = control.mode().name(), "up");
    ready();
    let mut follow_addresses = true;
    let mut follow_link = true;
    let outcome = loop {
        tokio::select! {
            _ = terminate.recv() => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            end = &mut serving => break Err(anyhow::anyhow!("the UAPI server has ended: {end:?}")),
            () = tokio::time::sleep(control.sleep_time()) => {
                control.tick();
                if let Some(log) = &mut running.steer_log {
                    log.flush();
                }
            }
            event = PullEvents::next(&mut running.pull_events) => {
                control.pull_event(event, control.now());
            }
            // The time to sleep is asked for anew.
            () = control.sooner() => {}
            told = next_clone(clones.as_ref()) => match told {
                Ok(()) => control.cloned(),
                Err(error) => {
                    tracing::warn!(%error, "clones of this machine are seen by its clock only");
                    clones = None;
                }
            },
            change = running.addresses.next(), if follow_addresses => match change {
                Ok(change) => control.address_changed(change),
                Err(error) => {
                    // Datagrams to addresses that are new pass to the sockets.
                    tracing::warn!(%error, "the host's addresses are not followed any more");
                    follow_addresses = false;
                }
            },
            change = running.link.next(), if follow_link => match change {
                Ok(LinkChange::Gone) => follow_link = running.follow_link().await,
                Ok(change) => control.link_changed(change),
                Err(error) => {
                    tracing::warn!(%error, "the interface's state is not followed any more");
                    control.set_up(true);
                    follow_link = false;
                }
            },
        }
        if control.shared.tun_gone.load(Ordering::Relaxed) {
            tracing::info!(interface = options.interface, "the interface was deleted");
            break Ok(());
        }
        if running.is_dead() {
            break Err(anyhow::anyhow!("every worker has ended"));
        }
    };
    if !serving.is_finished() {
        serving.abort();
        let _ = serving.await;
    }
    running.stop(STOP_TIMEOUT);
    tracing::info!(interface = options.interface, "down");
    outcome
}

/// Waits for the next clone; for ever if nobody tells.
async fn next_clone(watch: Option<&CloneWatch>) -> std::io::Result<()> {
    match watch {
        Some(watch) => watch.next().await,
        None => std::future::pending().await,
    }
}
