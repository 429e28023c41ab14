//! The keeper: a small process that owns what the host gives us, and starts the data process.
//!
//! It opens every edge (TUN queues, sockets, the steer program, XSKs, the socket for wg(8), netlink) and
//! hands descriptors to its child, which runs `daemon` without privileges. When that dies, everything it
//! had opened for it stays, packets are dropped, and another one is started in its place. The keeper
//! reads no packet and holds no key: what the data process wants remembered is a memfd to it.
//!
//! [`run`] is its loop, [`edges`] what it keeps and does when asked, [`child`] the data process as a
//! process, [`protocol`] what both say to each other, [`client`] the data process's end of it, [`nics`]
//! the NICs that were named for XDP and [`choice`] how they receive and send, [`notify`] what the service
//! manager is told, [`resolve`] looks up names of endpoints for the data process,
//! [`ways`] the ways to peers.

mod child;
pub mod choice;
mod client;
mod edges;
mod follow;
pub mod nat;
mod nics;
pub mod notify;
pub mod protocol;
mod resolve;
mod ways;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use wg_common::id::DeviceId;
use wg_common::map::HEARTBEAT_STALE_NS;
use wg_common::time::Now;

use self::child::Data;
use self::edges::Edges;
use self::protocol::{ADDRESSES_MAX, ChannelError, Event, NEIGHBOURS_MAX, Request};
use self::resolve::{Question, Resolved, Resolver};
use crate::daemon::Options;
use crate::host::{
    AddressChange, AddressWatch, AnyLinkWatch, CloneWatch, Host, LinkChange, LinkWatch,
    NeighbourChange, NeighbourWatch, RouteWatch,
};
use crate::sys::{FileWatch, clock};
use crate::tun::is_gone;

pub use self::child::Launch;
pub use self::client::{Begin, Events, Keeper, NoXsk, XskAt};

/// Routes that change all the time are told this often.
const BETWEEN_ROUTES: Duration = Duration::from_millis(100);
/// So are neighbours.
const BETWEEN_NEIGHBOURS: Duration = Duration::from_millis(50);

/// So are links.
const BETWEEN_LINKS: Duration = Duration::from_millis(50);

/// NICs are looked at once in so many looks: nobody tells of their queues and rules.
const LOOKS_PER_NICS: u32 = 4;
/// The data process is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A data process at which nothing has moved in so many looks in a row is stuck: five seconds.
const STILL_LOOKS_MAX: u32 = 10;
/// How long the data process may take to end when it is told to.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// One that lived for longer was well, and is replaced at once.
const WELL_AFTER: Duration = Duration::from_secs(10);
/// Waits before the next one is started, if it was not: doubled from the first to the last.
const WAIT_MIN: Duration = Duration::from_millis(100);
const WAIT_MAX: Duration = Duration::from_secs(5);

/// Why a keeper ends that has not been told to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The first data process ended before it answered wg(8). It has printed why.
    #[error("the data process ended before it was ready: {0}")]
    NotReady(ExitStatus),
}

/// Keeps devices until SIGTERM, SIGINT or the deletion of their last TUN device; calls `ready` once wg(8) is
/// answered for the first time.
///
/// # Errors
/// If it cannot start: [`Error`] or [`daemon::Error`](crate::daemon::Error) in the chain where that says
/// more. A stop is no error.
pub fn run(options: &Options, launch: &Launch, ready: impl FnOnce()) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the keeper's runtime")?;
    tokio::task::LocalSet::new().block_on(&runtime, keep(options, launch, ready))
}

async fn keep(options: &Options, launch: &Launch, ready: impl FnOnce()) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watching for SIGINT")?;
    let mut child = signal(SignalKind::child()).context("watching for the data process's end")?;
    let host = Host::new().context("opening netlink")?;
    let edges = Edges::open(options, &host).await?;
    let mut watches = Watches::new(&host, &edges)?;
    let nat_begins = edges.nat_begins();
    let (resolver, mut resolved) = Resolver::new();
    let interfaces = options.interfaces.join(" ");
    let mut keeping = Keeping {
        interfaces: &options.interfaces,
        launch,
        host,
        edges,
        resolver,
        data: None,
        known: Known::default(),
        look: Look::default(),
        looks: 0,
        heartbeat: notify::Heartbeat::wanted(),
        wait: Duration::ZERO,
        start_at: None,
        stop_by: None,
    };
    let mut ready = Some(ready);
    keeping.start()?;
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let due = keeping.due();
        let beat_in = keeping.beat_in();
        tokio::select! {
            _ = terminate.recv() => keeping.stop(),
            _ = interrupt.recv() => keeping.stop(),
            _ = child.recv() => {}
            request = next_request(&mut keeping.data) => {
                if keeping.requested(request).await
                    && let Some(ready) = ready.take()
                {
                    ready();
                    tracing::info!(interfaces, "kept");
                }
            }
            () = nat_begins.notified() => keeping.ask_for_owners(),
            _ = looks.tick() => {
                keeping.look();
                if keeping.looks_at_nics() {
                    keeping.follow_nics().await;
                }
            }
            () = tokio::time::sleep_until(due.into()) => keeping.is_due(),
            () = tokio::time::sleep(beat_in) => keeping.beat(),
            Some(resolved) = resolved.recv() => keeping.resolved(resolved),
            event = watches.next() => match event {
                Watched::Address(change) => keeping.address_changed(change),
                Watched::Link(device, LinkChange::Gone) => {
                    let Some(queue) = keeping.edges.tun_queue(device) else { continue };
                    match follow::moved_link(queue).await {
                        Ok(Some(link)) => watches.watch_link(device, link),
                        Ok(None) => keeping.device_gone(device),
                        Err(error) => {
                            let error = format!("{error:#}");
                            tracing::warn!(error, "the interface's state is not followed any more");
                            keeping.link_is(device, None, true);
                        }
                    }
                }
                Watched::Link(device, LinkChange::Is { mtu, is_up }) => {
                    keeping.link_is(device, Some(mtu), is_up);
                }
                // Else nothing would ever go through it again.
                Watched::LinkLost(device) => keeping.link_is(device, None, true),
                Watched::SocketGone(device) => {
                    tracing::info!("the UAPI socket was removed");
                    keeping.device_gone(device);
                }
                Watched::Links => keeping.follow_nics().await,
                Watched::Routes => keeping.tell(&Event::RoutesChanged),
                Watched::Neighbours(changes) => keeping.neighbours_changed(&changes),
                Watched::NeighboursLost => {
                    keeping.edges.neighbours = ways::Neighbours::default();
                    keeping.tell(&Event::RoutesChanged);
                }
                Watched::Cloned => keeping.tell(&Event::Cloned),
            },
        }
        match keeping.ended() {
            Some(status) if ready.is_some() && keeping.stop_by.is_none() => {
                return Err(Error::NotReady(status).into());
            }
            Some(status) => keeping.follow_end(status),
            None => {}
        }
        if keeping.stop_by.is_some() && keeping.data.is_none() {
            tracing::info!(interfaces, "down");
            return Ok(());
        }
    }
}

async fn next_request(data: &mut Option<Data>) -> Result<(Request, Vec<OwnedFd>), ChannelError> {
    match data {
        Some(data) => data.request().await,
        None => std::future::pending().await,
    }
}

/// What is kept, and the data process that uses it.
struct Keeping<'a> {
    interfaces: &'a [String],
    launch: &'a Launch,
    host: Host,
    edges: Edges,
    resolver: Resolver,
    data: Option<Data>,
    known: Known,
    look: Look,
    /// Looks since NICs were looked at.
    looks: u32,
    /// What the service manager wants to hear, if it does.
    heartbeat: Option<notify::Heartbeat>,
    /// The latest wait before a start.
    wait: Duration,
    /// When the next data process is due.
    start_at: Option<Instant>,
    /// The end has come, and the data process has until then.
    stop_by: Option<Instant>,
}

/// What the host has told, for a data process that comes later.
#[derive(Default)]
struct Known {
    addresses: BTreeSet<IpAddr>,
    /// MTU, and whether it is up, of the interface of each device.
    links: BTreeMap<DeviceId, (Option<u32>, bool)>,
}

/// What was seen of the data process.
#[derive(Default)]
struct Look {
    beats: Vec<u64>,
    answered: bool,
    still: u32,
}

impl Look {
    /// Looks once; says whether the process counts as stuck. Looks are counted, not time: when the host
    /// slept, both processes did.
    fn is_stuck(&mut self, beats: Vec<u64>) -> bool {
        let moved = std::mem::take(&mut self.answered) || beats != self.beats;
        self.beats = beats;
        self.still = if moved { 0 } else { self.still + 1 };
        self.still >= STILL_LOOKS_MAX
    }
}

impl Keeping<'_> {
    /// Starts a data process and tells it what is known.
    fn start(&mut self) -> anyhow::Result<()> {
        let mut data =
            Data::start(self.interfaces, self.launch).context("starting the data process")?;
        let addresses: Vec<IpAddr> = self.known.addresses.iter().copied().collect();
        for added in addresses.chunks(ADDRESSES_MAX) {
            data.tell(&Event::Addresses { added: added.to_vec(), removed: Vec::new() });
        }
        for (device, &(mtu, is_up)) in &self.known.links {
            data.tell(&Event::Link { device: device.0, mtu, is_up });
        }
        self.look = Look::default();
        self.data = Some(data);
        self.ask_for_owners();
        Ok(())
    }

    /// Asks who owns what, for NAT.
    fn ask_for_owners(&mut self) {
        let devices: Vec<DeviceId> = self.edges.with_nat().collect();
        for device in devices {
            self.tell(&Event::TellOwners { device: device.0 });
        }
    }

    /// When [`Keeping::is_due`] is to be called.
    fn due(&self) -> Instant {
        let far = || Instant::now() + Duration::from_secs(3600);
        self.stop_by.or(self.start_at).unwrap_or_else(far)
    }

    /// Does what is due.
    fn is_due(&mut self) {
        let now = Instant::now();
        if self.stop_by.is_some_and(|at| at <= now) {
            if let Some(data) = &mut self.data {
                tracing::warn!("the data process does not stop, and is killed");
                data.kill();
            }
            // It is waited for, and not killed all the time.
            self.stop_by = Some(now + STOP_TIMEOUT);
        } else if self.start_at.is_some_and(|at| at <= now) {
            self.start_at = None;
            if let Err(error) = self.start() {
                // Such as no memory for another process at present.
                tracing::error!(error = format!("{error:#}"), "there is no data process");
                self.start_later();
            }
        }
    }

    fn start_later(&mut self) {
        self.wait = (self.wait * 2).clamp(WAIT_MIN, WAIT_MAX);
        self.start_at = Some(Instant::now() + self.wait);
    }

    /// Serves a request; says whether wg(8) is answered from now on.
    async fn requested(&mut self, request: Result<(Request, Vec<OwnedFd>), ChannelError>) -> bool {
        let Some(data) = &mut self.data else { return false };
        let (request, fds) = match request {
            Ok(request) => request,
            Err(error) => {
                if !matches!(error, ChannelError::Closed) {
                    tracing::error!(%error, "the data process makes no sense, and is killed");
                }
                data.kill();
                return false;
            }
        };
        // Whoever asks is alive, also before it answers pings.
        self.look.answered = true;
        let is_ready = matches!(request, Request::Ready);
        let is_other_port = matches!(request, Request::OpenSockets { .. });
        let question = Question::of(&request);
        let answered = match self.edges.serve(request, fds, &self.host).await {
            Ok((answer, fds)) => data.answer(&answer, &fds).map_err(|error| error.to_string()),
            Err(edges::Nonsense) => Err("it asks for what makes no sense".to_owned()),
        };
        if let Err(error) = answered {
            tracing::error!(error, "the data process is not as it should be, and is killed");
            data.kill();
            return false;
        }
        if is_other_port {
            self.follow_nics().await;
        }
        if let Some(question) = question {
            self.resolver.ask(question, clock::boot_now());
        }
        is_ready
    }

    /// Looks whether the data process is there for more than the list of processes.
    fn look(&mut self) {
        if let Some(log) = &mut self.edges.steer_log {
            log.flush();
        }
        let Some(data) = &mut self.data else { return };
        if self.look.is_stuck(self.edges.beats()) {
            tracing::error!(process = data.id(), "the data process is stuck, and is killed");
            self.look = Look::default();
            data.kill();
        } else {
            data.tell(&Event::Ping);
        }
    }

    /// Whether it is time to look at NICs. To be asked once a look.
    fn looks_at_nics(&mut self) -> bool {
        self.looks = (self.looks + 1) % LOOKS_PER_NICS;
        self.looks == 0
    }

    /// Chooses again how NICs receive and send, where something about them has changed.
    async fn follow_nics(&mut self) {
        if self.stop_by.is_some() {
            return;
        }
        if let Some(named) = self.edges.follow_nics(&self.host).await {
            self.tell(&Event::Nics(named));
        }
    }

    /// How long [`Keeping::beat`] may wait.
    fn beat_in(&self) -> Duration {
        let far = Duration::from_secs(3600);
        self.heartbeat.as_ref().map_or(far, |heartbeat| heartbeat.wait(clock::boot_now()))
    }

    /// Tells the service manager that the workers move, if they all do.
    fn beat(&mut self) {
        let now = clock::boot_now();
        let moves =
            |&at: &u64| now.since(Now::from_boot_ns(at)).as_nanos() < HEARTBEAT_STALE_NS.into();
        let is_alive = self.data.is_some() && self.edges.beats().iter().all(moves);
        if let Some(heartbeat) = &mut self.heartbeat {
            heartbeat.beat(is_alive, now);
        }
    }

    fn tell(&mut self, event: &Event) {
        if let Some(data) = &mut self.data {
            data.tell(event);
        }
    }

    fn resolved(&mut self, Resolved { question, addresses }: Resolved) {
        self.resolver.answered(&question);
        let Question { device, host, port } = question;
        self.tell(&Event::Resolved { device, host, port, addresses });
    }

    fn address_changed(&mut self, change: AddressChange) {
        self.edges.address_changed(change);
        let (added, removed) = match change {
            AddressChange::Added(address) => {
                self.known.addresses.insert(address);
                (vec![address], Vec::new())
            }
            AddressChange::Removed(address) => {
                self.known.addresses.remove(&address);
                (Vec::new(), vec![address])
            }
        };
        self.tell(&Event::Addresses { added, removed });
    }

    fn neighbours_changed(&mut self, changes: &[NeighbourChange]) {
        let moved = self.edges.neighbours.change(changes);
        if moved.len() > NEIGHBOURS_MAX {
            self.tell(&Event::RoutesChanged);
        } else if !moved.is_empty() {
            self.tell(&Event::NeighboursMoved(moved));
        }
    }

    fn link_is(&mut self, device: DeviceId, mtu: Option<u32>, is_up: bool) {
        self.known.links.insert(device, (mtu, is_up));
        self.tell(&Event::Link { device: device.0, mtu, is_up });
    }

    /// Lets go of a device whose interface was deleted. The last one is the end.
    fn device_gone(&mut self, device: DeviceId) {
        let Some((interface, any_left)) = self.edges.close(device) else { return };
        tracing::info!(interface, "the interface was deleted");
        self.known.links.remove(&device);
        if any_left {
            self.tell(&Event::Gone { device: device.0 });
        } else {
            self.stop();
        }
    }

    /// Begins to stop.
    fn stop(&mut self) {
        if self.stop_by.is_some() {
            return;
        }
        notify::stopping();
        // No datagram is steered to a worker that is about to go.
        self.edges.detach();
        self.start_at = None;
        self.stop_by = Some(Instant::now() + STOP_TIMEOUT);
        self.tell(&Event::Stop);
    }

    /// How the data process ended, if it has just been found to have.
    fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.data.as_mut()?.ended()?;
        Some(status)
    }

    /// Has another one follow the data process that has ended, unless this is the end.
    fn follow_end(&mut self, status: ExitStatus) {
        let Some(data) = self.data.take() else { return };
        if self.stop_by.is_some() {
            return;
        }
        let devices: Vec<_> = self.edges.interfaces().map(|(device, _)| device).collect();
        for device in devices {
            let queue = self.edges.tun_queue(device);
            if queue.is_some_and(|queue| queue.device().is_err_and(|error| is_gone(&error))) {
                self.device_gone(device);
            }
        }
        if self.stop_by.is_some() {
            return;
        }
        self.edges.forget_process();
        if data.age() > WELL_AFTER {
            self.wait = Duration::ZERO;
            self.start_at = Some(Instant::now());
        } else {
            self.start_later();
        }
        tracing::error!(%status, again_in = ?self.wait, "the data process has ended");
    }
}

/// What the host tells. Each watch has a task of its own, so that none is interrupted by what others tell.
struct Watches {
    told: mpsc::Receiver<Watched>,
    tell: mpsc::Sender<Watched>,
}

enum Watched {
    Address(AddressChange),
    Link(DeviceId, LinkChange),
    LinkLost(DeviceId),
    /// The file of a device's UAPI socket is gone.
    SocketGone(DeviceId),
    /// Some link appeared, changed or is gone.
    Links,
    Routes,
    Neighbours(Vec<NeighbourChange>),
    NeighboursLost,
    Cloned,
}

impl Watches {
    fn new(host: &Host, edges: &Edges) -> anyhow::Result<Self> {
        let (tell, told) = mpsc::channel(64);
        let watches = Self { told, tell };
        watches.watch_addresses(AddressWatch::new(host.clone())?);
        for (device, index) in edges.interfaces() {
            watches.watch_link(device, LinkWatch::new(host.clone(), index)?);
        }
        for (device, path) in edges.socket_files() {
            match FileWatch::new(path) {
                Ok(watch) => watches.watch_socket(device, watch),
                Err(error) => tracing::warn!(%error, "nobody tells if the UAPI socket is removed"),
            }
        }
        watches.watch_routes(RouteWatch::new()?);
        watches.watch_links(AnyLinkWatch::new()?);
        if edges.is_xdp_asked() {
            watches.watch_neighbours(NeighbourWatch::new(host.clone())?);
        }
        match CloneWatch::new() {
            Ok(watch) => watches.watch_clones(watch),
            Err(error) => {
                tracing::warn!(%error, "clones of this machine are seen by its clock only");
            }
        }
        Ok(watches)
    }

    /// Waits for what comes next. Dropping the future before it is ready loses nothing.
    async fn next(&mut self) -> Watched {
        self.told.recv().await.expect("one sender is ours")
    }

    fn watch_addresses(&self, mut watch: AddressWatch) {
        let tell = self.tell.clone();
        tokio::task::spawn_local(async move {
            loop {
                let change = watch.next().await.inspect_err(|error| {
                    // Datagrams to addresses that are new pass to the sockets.
                    tracing::warn!(%error, "the host's addresses are not followed any more");
                });
                let Ok(change) = change else { return };
                if tell.send(Watched::Address(change)).await.is_err() {
                    return;
                }
            }
        });
    }

    /// Follows the interface of a device until it is gone.
    fn watch_link(&self, device: DeviceId, mut watch: LinkWatch) {
        let tell = self.tell.clone();
        tokio::task::spawn_local(async move {
            loop {
                let watched = match watch.next().await {
                    Ok(change) => Watched::Link(device, change),
                    Err(error) => {
                        tracing::warn!(%error, "the interface's state is not followed any more");
                        Watched::LinkLost(device)
                    }
                };
                let is_last = !matches!(watched, Watched::Link(_, LinkChange::Is { .. }));
                if tell.send(watched).await.is_err() || is_last {
                    return;
                }
            }
        });
    }

    fn watch_routes(&self, mut watch: RouteWatch) {
        let tell = self.tell.clone();
        tokio::task::spawn_local(async move {
            loop {
                if let Err(error) = watch.next().await {
                    tracing::warn!(%error, "routes are not followed: peers keep the address that they dialled");
                    return;
                }
                if tell.send(Watched::Routes).await.is_err() {
                    return;
                }
                tokio::time::sleep(BETWEEN_ROUTES).await;
            }
        });
    }

    fn watch_links(&self, mut watch: AnyLinkWatch) {
        let tell = self.tell.clone();
        tokio::task::spawn_local(async move {
            loop {
                if let Err(error) = watch.next().await {
                    tracing::warn!(%error, "NICs that come and go are seen late");
                    return;
                }
                if tell.send(Watched::Links).await.is_err() {
                    return;
                }
                tokio::time::sleep(BETWEEN_LINKS).await;
            }
        });
    }

    fn watch_neighbours(&self, mut watch: NeighbourWatch) {
        let tell = self.tell.clone();
        tokio::task::spawn_local(async move {
            loop {
                let watched = match watch.next().await {
                    Ok(changes) => Watched::Neighbours(changes),
                    Err(error) => {
                        tracing::warn!(%error, "neighbours are not followed: sockets send");
                        Watched::NeighboursLost
                    }
                };
                let is_last = matches!(watched, Watched::NeighboursLost);
                if tell.send(watched).await.is_err() || is_last {
                    return;
                }
                tokio::time::sleep(BETWEEN_NEIGHBOURS).await;
            }
        });
    }

    fn watch_socket(&self, device: DeviceId, watch: FileWatch) {
        let tell = self.tell.clone();
        tokio::task::spawn_local(async move {
            match watch.gone().await {
                // Nobody is left to be told at the very end.
                Ok(()) => drop(tell.send(Watched::SocketGone(device)).await),
                Err(error) => tracing::warn!(%error, "nobody tells if the UAPI socket is removed"),
            }
        });
    }

    fn watch_clones(&self, watch: CloneWatch) {
        let tell = self.tell.clone();
        tokio::task::spawn_local(async move {
            loop {
                if let Err(error) = watch.next().await {
                    tracing::warn!(%error, "clones of this machine are seen by its clock only");
                    return;
                }
                if tell.send(Watched::Cloned).await.is_err() {
                    return;
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_neither_moves_nor_answers_is_stuck_after_a_while() {
        let mut look = Look::default();
        let stuck = |look: &mut Look| (0..50).find(|_| look.is_stuck(vec![1, 2]));
        // The first look sees something new.
        assert_eq!(stuck(&mut look), Some(STILL_LOOKS_MAX as usize as i32));
        let mut look = Look::default();
        for beat in 0..100 {
            assert!(!look.is_stuck(vec![1, beat]), "one worker moves");
        }
        for _ in 0..100 {
            look.answered = true;
            assert!(!look.is_stuck(vec![1, 99]), "it answers");
        }
        assert!(stuck(&mut look).is_some());
    }
}
