//! Takes over the edges, chooses the back end, starts the workers.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use wg_common::id::{DeviceId, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};

use super::control::Control;
use super::nics::Nics;
use super::pull::{PullEvents, Pulling};
use super::socket_steering;
use super::status::Steering;
use super::tun_steering::TunSteering;
use crate::aead::choice::{self, Chosen};
use crate::aead::{AeadChoice, BatchAead};
use crate::datapath::handoff::Mesh;
use crate::datapath::shared::{DATAGRAM_LEN_MAX, PARCEL_RING_LEN};
use crate::datapath::{Crew, Ports, Shared, SocketGroup, Worker, WorkerThread};
use crate::handshake::{Handshakes, Os, Pool, source};
use crate::keeper::Keeper;
use crate::keeper::protocol::{DeviceSetup, Setup};
use crate::lookup::HttpSource;
use crate::sys::{SharedWords, affinity, clock};

/// A device that runs.
pub struct Device {
    /// Name of the interface, as it was made.
    pub interface: String,
    /// What answers and applies.
    pub control: Rc<Control>,
    /// What happens around pulled peers, if there is a source of them.
    pub pull_events: Option<PullEvents>,
    /// Does its handshakes.
    pub pool: Pool,
}

/// The threads on which the workers of all devices run.
pub struct Threads(Vec<JoinHandle<()>>);

impl Threads {
    /// Whether none is left.
    pub fn are_dead(&self) -> bool {
        self.0.iter().all(JoinHandle::is_finished)
    }

    /// Waits for their end, of which they were told. Those that do not stop in time are left alone.
    pub fn join(self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        for worker in self.0 {
            while !worker.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !worker.is_finished() {
                tracing::warn!("a worker did not stop");
            } else if worker.join().is_err() {
                tracing::error!("a worker had panicked");
            }
        }
    }
}

/// What a device is made of before its workers run.
struct Prepared {
    interface: String,
    shared: Arc<Shared>,
    handshakes: Arc<Handshakes>,
    tun_steering: TunSteering,
    socket_steering: Steering,
    pulling: Option<Pulling>,
    pull_events: Option<PullEvents>,
    pool: Pool,
}

/// Takes over what the keeper has opened and starts the workers. Gives the devices in the keeper's order.
///
/// # Errors
/// If something that is needed in every mode cannot be had.
pub fn start(
    keeper: &Rc<Keeper>,
    setup: &Setup,
    heartbeats: SharedWords,
    live_indexes: Option<SharedWords>,
) -> anyhow::Result<(Vec<Device>, Threads, Nics)> {
    let cpus = affinity::inherited_cpus().context("reading which CPUs this process may use")?;
    let aead = choose_aead(setup.aead)?;
    let crew = Crew::new(setup.worker_count, Some(Arc::new(heartbeats)))
        .context("preparing the workers")?;
    let live_indexes = live_indexes.map(Arc::new);
    let mut devices = Vec::new();
    for DeviceSetup { number, interface, .. } in &setup.devices {
        let (device, live) = (DeviceId(*number), live_indexes.clone());
        let pool_len = Pool::thread_count(cpus.len());
        let device = prepare(keeper, setup, device, &crew, live, aead, pool_len)
            .with_context(|| format!("preparing {interface}"))?;
        devices.push(Prepared { interface: interface.clone(), ..device });
    }
    let (nics, ports) = Nics::begin(keeper, setup, &crew)?;
    let threads = start_threads(&cpus, &crew, &devices, ports, aead)?;

    let devices = devices.into_iter().map(|device| {
        let Prepared {
            interface,
            shared,
            handshakes,
            tun_steering,
            socket_steering,
            pulling,
            pull_events,
            pool,
        } = device;
        let (keeper, back_ends) = (Some(Rc::clone(keeper)), nics.in_use());
        let control = Control::new(shared, handshakes, keeper, back_ends, aead.name());
        let control = control.with_tun_steering(tun_steering).with_socket_steering(socket_steering);
        let control = Rc::new(control.with_pulling(pulling));
        Device { interface, control, pull_events, pool }
    });
    Ok((devices.collect(), threads, nics))
}

/// Chooses what seals and opens, for all that this process does.
fn choose_aead(asked: AeadChoice) -> anyhow::Result<&'static dyn BatchAead> {
    let Chosen { aead, rejected } = choice::choose(asked)?;
    if let Some((back_end, difference)) = rejected {
        tracing::warn!(back_end, %difference, "an AEAD back end differs from `ring`, which is used instead");
    }
    Ok(aead)
}

fn prepare(
    keeper: &Rc<Keeper>,
    setup: &Setup,
    device: DeviceId,
    crew: &Arc<Crew>,
    live_indexes: Option<Arc<SharedWords>>,
    aead: &'static dyn BatchAead,
    pool_len: usize,
) -> anyhow::Result<Prepared> {
    let worker_count = setup.worker_count;
    let indexes = IndexPermutation::new(setup.index_key, IndexLayout::DEFAULT);
    let slots = indexes.layout().share(u32::from(device.0), setup.device_count as u32);
    let tun_queues = keeper.tun_queues(device.0);
    let (port, of_worker) = keeper.sockets(device.0);
    anyhow::ensure!(
        tun_queues.len() == worker_count && of_worker.len() == worker_count,
        "the keeper gave {} queues and {} sockets for {worker_count} workers",
        tun_queues.len(),
        of_worker.len(),
    );
    let sockets = SocketGroup { port, of_worker };
    let (crew, place) = (Arc::clone(crew), (device, slots));
    let (shared, work) =
        Shared::in_crew(crew, place, tun_queues, sockets, indexes, DATAGRAM_LEN_MAX)
            .context("preparing the workers")?;
    // It is down until the keeper says that it was taken up.
    shared.up.store(false, Ordering::Relaxed);
    let tun_steering = TunSteering::begin(keeper, &shared);
    let socket_steering = socket_steering::begin(keeper, &shared);
    let outside = Os::new(Arc::clone(&shared));
    let mut handshakes = Handshakes::new(Arc::clone(&shared), outside, aead, live_indexes);
    let (mut pulling, mut pull_events) = (None, None);
    if setup.has_peer_source {
        let keeper = Rc::clone(keeper);
        let (http, reports) = HttpSource::new(move || keeper.connect_peer_source());
        let (events, notify) = PullEvents::new(reports);
        handshakes = handshakes.with_source(source::Limits::default(), notify);
        (pulling, pull_events) = (Some(Pulling::new(Box::new(http))), Some(events));
    }
    let handshakes = Arc::new(handshakes);
    let pool = Pool::start(&handshakes, &work, pool_len).context("starting the handshake pool")?;
    let interface = String::new();
    Ok(Prepared {
        interface,
        shared,
        handshakes,
        tun_steering,
        socket_steering,
        pulling,
        pull_events,
        pool,
    })
}

/// Starts the threads, each with a worker of every device and some of the XSKs.
fn start_threads(
    cpus: &[usize],
    crew: &Arc<Crew>,
    devices: &[Prepared],
    ports: Vec<Ports>,
    aead: &'static dyn BatchAead,
) -> anyhow::Result<Threads> {
    let ids = || (0..crew.thread_count()).map(|number| WorkerId(number as u16));
    // Threads take their time to start; nobody is stuck meanwhile.
    ids().for_each(|id| crew.beat(id, clock::boot_now()));
    let between = |_| Mesh::between(crew.thread_count(), PARCEL_RING_LEN);
    let mut meshes: Vec<_> = devices.iter().map(between).collect();
    let mut threads = Vec::new();
    for (id, ports) in ids().zip(ports) {
        let workers = devices.iter().zip(&mut meshes).map(|(device, meshes)| {
            let mesh = meshes.pop_front().expect("one for each worker");
            Worker::new(id, Arc::clone(&device.shared), mesh, aead)
        });
        let thread = WorkerThread::new(id, Arc::clone(crew), ports, workers.collect())
            .context("preparing a worker")?;
        // One at least is left for who sends to them.
        let thread = thread.with_own_core(crew.thread_count() < cpus.len());
        let cpu = cpus[usize::from(id.0) % cpus.len()];
        let spawned = std::thread::Builder::new().name(format!("worker-{id}")).spawn(move || {
            if let Err(error) = affinity::pin(cpu) {
                tracing::warn!(cpu, %error, "a worker is not pinned");
            }
            thread.run();
        });
        threads.push(spawned.context("starting a worker")?);
    }
    Ok(Threads(threads))
}
