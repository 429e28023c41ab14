//! The data process: start, stop; carries changes of the device to every other room.
//!
//! The one place that knows every room: [`start`] takes over the edges from the keeper and starts the
//! workers, [`control`] answers wg(8) and applies changes, [`effects`] carries them to sessions and
//! workers, [`pull`] adds peers that knock, [`names`] follows names of endpoints, [`nics`] NICs, [`quiesce`] pauses,
//! [`memory`] is what a successor is left and [`remember`] keeps it, [`watchdog`] finds stuck workers,
//! [`tun_steering`] and [`socket_steering`] tell the kernel which worker packets and datagrams are for, [`status`] says how things stand. Everything here runs on one thread; it may be slow and must be
//! right.

mod control;
mod effects;
pub mod memory;
#[cfg(test)]
mod memory_tests;
mod mode;
mod names;
mod nics;
mod pull;
mod pulled;
mod quiesce;
mod remember;
mod socket_steering;
mod start;
mod status;
mod tun_steering;
mod watchdog;
mod ways;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};
use wg_common::time::Now;

use self::control::Control;
use self::memory::MemoryError;
use self::pull::PullEvents;
use self::start::Device;
use crate::handshake::Pool;
use crate::keeper::protocol::Event;
use crate::keeper::{Begin, Events, Keeper};
use crate::nat;
use crate::sandbox;
use crate::uapi;

pub use crate::aead::AeadChoice;
pub use crate::device::PacketRules;
pub use effects::carry_out;
pub use mode::Mode;
pub use watchdog::Watchdog;

/// How long workers may take to stop before they are left alone.
const STOP_TIMEOUT: Duration = Duration::from_millis(1500);

/// Most devices of one process.
pub const DEVICE_COUNT_MAX: usize = 64;

/// What a daemon is started with; everything else comes through the UAPI socket.
#[derive(Clone, Debug)]
pub struct Options {
    /// Names of the TUN devices to create: at least one, at most [`DEVICE_COUNT_MAX`], no two the same.
    pub interfaces: Vec<String>,
    /// What is done to packets of each of them, until somebody says otherwise; of those beyond, what is usual.
    pub rules: Vec<PacketRules>,
    /// What is translated, forwarded and allowed for each of them, until somebody says otherwise; for those
    /// beyond, nothing.
    pub nat: Vec<nat::Lines>,
    /// NICs to attach the steer program to.
    pub xdp: Vec<String>,
    /// Names of NICs by whose XSKs nothing is to be sent, each with the reason.
    pub by_socket: Vec<(String, String)>,
    /// Which back end to use.
    pub mode: Mode,
    /// Whether threads ask those NICs for packets themselves while they have work.
    pub busy_poll: bool,
    /// Which back end seals and opens.
    pub aead: AeadChoice,
    /// Number of workers; the CPUs this process may run on if not given.
    pub workers: Option<usize>,
    /// Unix socket of the service that knows peers which are not configured.
    pub peer_source: Option<PathBuf>,
}

impl Options {
    /// What is done to packets of the device with this number.
    pub fn rules_of(&self, number: usize) -> PacketRules {
        self.rules.get(number).copied().unwrap_or_default()
    }

    /// What is translated, forwarded and allowed for the device with this number.
    pub fn nat_of(&self, number: usize) -> nat::Lines {
        self.nat.get(number).cloned().unwrap_or_default()
    }
}

/// Why a daemon did not start, where the caller can do something about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused for want of privilege.
    #[error("{0}")]
    Privilege(String),
    /// An interface of this name is there already.
    #[error(
        "interface {0} exists already; `tidegate show {0}` says if it is a device, `ip link del {0}` removes it"
    )]
    AlreadyExists(String),
    /// Zero-copy was asked for, and cannot be: the NIC and why.
    #[error("zero-copy was asked for, and cannot be: {0}")]
    NoZeroCopy(String),
}

/// Runs the data process: a daemon on what the keeper at the other end of `requests` and `events` has
/// opened, until it says stop. Calls `ready` once wg(8) is answered; then gives up all system calls that
/// are not needed any more, and tells the keeper. `entered` says how the process was confined before.
///
/// # Errors
/// If it cannot start, or the keeper is gone. A stop is no error.
pub fn run(
    requests: OwnedFd,
    events: OwnedFd,
    entered: &sandbox::Report,
    ready: impl FnOnce(),
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the control thread's runtime")?;
    tokio::task::LocalSet::new().block_on(&runtime, serve(requests, events, entered, ready))
}

async fn serve(
    requests: OwnedFd,
    events: OwnedFd,
    entered: &sandbox::Report,
    ready: impl FnOnce(),
) -> anyhow::Result<()> {
    // Whoever tells all processes to end tells the keeper, too: it says when.
    let _terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;
    let _interrupt = signal(SignalKind::interrupt()).context("watching for SIGINT")?;
    let keeper = Rc::new(Keeper::new(requests).context("opening the channel to the keeper")?);
    let events = Events::new(events).context("opening the channel of events")?;
    let Begin { setup, listeners, heartbeats, live_indexes, memories } =
        keeper.setup().context("asking the keeper what to begin with")?;
    let (started, threads, nics) = start::start(&keeper, &setup, heartbeats, live_indexes)?;
    let nics = Rc::new(nics);
    // Ends with this.
    let _following_nics = AbortOnDrop(
        tokio::task::spawn_local({
            let nics = Rc::clone(&nics);
            async move { nics.follow().await }
        })
        .abort_handle(),
    );
    let mut devices = BTreeMap::new();
    let mut tasks = JoinSet::new();
    let edges = listeners.into_iter().zip(memories);
    for ((its, device), (listener, memory)) in setup.devices.iter().zip(started).zip(edges) {
        let Device { interface, control, pull_events, pool } = device;
        control.shared.quiesce_until(Now::from_boot_ns(its.quiesced_until));
        control.follow_rules(its.rules);
        begin_memory(&control, &keeper, memory)
            .with_context(|| format!("making a memory of {interface} for who comes after"))?;
        let server = uapi::Server::from_fd(listener).context("taking over the UAPI socket")?;
        let routes = Rc::new(Notify::new());
        let serving = (Rc::clone(&control), server, pull_events, Rc::clone(&routes));
        let number = its.number;
        tasks.spawn_local(async move { (number, serve_device(serving).await) });
        tracing::info!(interface, mode = control.mode(), aead = control.aead(), "up");
        devices.insert(number, Served { interface, control, routes, pool });
    }
    ready();
    let sealed = sandbox::seal(entered).context("giving up what this process may do")?;
    devices.values().for_each(|device| device.control.set_privileges(sealed));
    keeper.ready();
    let outcome = loop {
        tokio::select! {
            ended = tasks.join_next() => match ended {
                Some(Ok((number, Ok(())))) => {
                    let Some(device) = devices.remove(&number) else { continue };
                    tracing::info!(interface = device.interface, "the interface was deleted");
                    device.pool.stop();
                    device.control.forget();
                }
                Some(Ok((_, Err(error)))) => break Err(error),
                Some(Err(error)) => break Err(anyhow::Error::new(error).context("serving a device")),
                // All were deleted.
                None => break Ok(()),
            },
            () = nics.served_anew() => devices.values().for_each(|device| device.routes.notify_one()),
            event = events.next() => match event {
                Ok(Event::Addresses { added, removed }) => {
                    for device in devices.values() {
                        device.control.addresses_changed(&added, &removed);
                        // Nothing is to leave from an address that is gone.
                        device.routes.notify_one();
                    }
                }
                Ok(Event::Link { device, mtu, is_up }) => {
                    if let Some(device) = devices.get(&device) {
                        device.control.link_changed(mtu, is_up);
                    }
                }
                Ok(Event::Gone { device }) => {
                    if let Some(device) = devices.get(&device) {
                        device.control.gone();
                    }
                }
                Ok(Event::TellOwners { device }) => {
                    if let Some(device) = devices.get(&device) {
                        device.control.tell_owners();
                    }
                }
                Ok(Event::Resolved { device, host, port, addresses }) => {
                    if let Some(device) = devices.get(&device) {
                        device.control.resolved(&host, port, &addresses);
                    }
                }
                Ok(Event::Nics(named)) => nics.chosen_again(named),
                Ok(Event::RoutesChanged) => {
                    devices.values().for_each(|device| device.routes.notify_one());
                }
                Ok(Event::NeighboursMoved(moved)) => {
                    let moved = moved.into_iter().map(|(link, at, mac)| ((link, at), mac)).collect();
                    devices.values().for_each(|device| device.control.neighbours_moved(&moved));
                }
                Ok(Event::Cloned) => devices.values().for_each(|device| device.control.cloned()),
                Ok(Event::Ping) => keeper.alive(),
                Ok(Event::Stop) => break Ok(()),
                Err(error) => break Err(anyhow::Error::new(error).context("listening to the keeper")),
            },
        }
        if threads.are_dead() && !devices.values().all(|device| device.control.shared.is_over()) {
            break Err(anyhow::anyhow!("every worker has ended"));
        }
    };
    tasks.shutdown().await;
    for device in devices.values() {
        device.control.shared.stopping.store(true, Ordering::Relaxed);
        device.control.shared.wake_all();
    }
    threads.join(STOP_TIMEOUT);
    if outcome.is_ok() {
        devices.values().for_each(|device| device.control.forget());
    }
    devices.into_values().for_each(|device| device.pool.stop());
    outcome
}

/// A device that is served.
struct Served {
    interface: String,
    control: Rc<Control>,
    /// To be told when routes have changed.
    routes: Rc<Notify>,
    pool: Pool,
}

/// Answers wg(8) for a device and does what is due, until its interface is gone.
async fn serve_device(
    (control, server, mut pull_events, routes): (
        Rc<Control>,
        uapi::Server,
        Option<PullEvents>,
        Rc<Notify>,
    ),
) -> anyhow::Result<()> {
    let mut serving = tokio::task::spawn_local(server.serve(Rc::clone(&control)));
    let following = tokio::task::spawn_local(follow_routes(Rc::clone(&control), routes));
    // They end with this.
    let _guard = [serving.abort_handle(), following.abort_handle()].map(AbortOnDrop);
    while !control.shared.tun_gone.load(Ordering::Relaxed) {
        tokio::select! {
            end = &mut serving => anyhow::bail!("the UAPI server has ended: {end:?}"),
            () = tokio::time::sleep(control.sleep_time()) => control.tick(),
            event = PullEvents::next(&mut pull_events) => {
                control.pull_event(event, control.now());
            }
            // The time to sleep is asked for anew.
            () = control.sooner() => {}
        }
    }
    Ok(())
}

/// Ends a task when it is dropped.
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Goes on with what a predecessor has left, if there was one, and begins to leave something itself.
fn begin_memory(
    control: &Control,
    keeper: &Rc<Keeper>,
    left: Option<OwnedFd>,
) -> Result<(), MemoryError> {
    if let Some(left) = &left {
        match memory::read(left) {
            Ok(remembered) => {
                control.recall(&remembered);
                control.recall_sockets();
            }
            Err(error) => {
                tracing::error!(%error, "what the process before has left cannot be read");
            }
        }
    }
    let (keeper, device) = (Rc::clone(keeper), control.shared.device.0);
    control.remember(Box::new(move |memory| {
        keeper.remember(device, memory);
        Ok(())
    }))?;
    left.map_or(Ok(()), memory::wipe)
}

/// Least time between two looks at the ways to all peers.
const ROUTES_EVERY: Duration = Duration::from_millis(100);

/// Has `control` look at the ways to peers whenever there may be others.
async fn follow_routes(control: Rc<Control>, changed: Rc<Notify>) {
    loop {
        changed.notified().await;
        control.routes_changed().await;
        // A router's table changes all the time.
        tokio::time::sleep(ROUTES_EVERY).await;
    }
}
