//! Opens the edges, chooses the back end, starts the workers.

use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rand_core::Rng as _;
use wg_common::id::{DeviceId, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::map::{QUEUES_LEN, QueueEntry, QueueKey};

use super::control::Control;
use super::mode::{Mode, ModeInUse};
use super::pull::{PullEvents, Pulling};
use super::status::Nic;
use super::{Error, Options, follow};
use crate::aead::{BatchAead, RingAead};
use crate::bpf::{LogReader, Steer, SteerOptions};
use crate::datapath::handoff::Mesh;
use crate::datapath::shared::PARCEL_RING_LEN;
use crate::datapath::{Shared, SocketGroup, Worker, WorkerEdges, XskPort};
use crate::handshake::{Handshakes, Os, Pool, source};
use crate::host::{AddressWatch, Host, Link, LinkChange, LinkWatch, RouteWatch};
use crate::lookup::HttpSource;
use crate::sys::{affinity, clock, random};
use crate::tun::{Tun, TunError};
use crate::udp;
use crate::xsk::{Xsk, XskError, XskOptions};

/// Most workers of one device.
const WORKER_COUNT_MAX: usize = 64;

/// A daemon that runs.
pub struct Running {
    /// What answers and applies.
    pub control: Rc<Control>,
    /// Changes of the host's addresses.
    pub addresses: AddressWatch,
    /// Changes of the TUN device.
    pub link: LinkWatch,
    /// Log lines of the kernel side, if it is loaded.
    pub steer_log: Option<LogReader>,
    /// What happens around pulled peers, if there is a source of them.
    pub pull_events: Option<PullEvents>,
    workers: Vec<JoinHandle<()>>,
    pool: Pool,
}

impl Running {
    /// Whether no worker is left.
    pub fn is_dead(&self) -> bool {
        self.workers.iter().all(JoinHandle::is_finished)
    }

    /// Follows the TUN device, which is gone from where it was. Says whether it is followed.
    pub async fn follow_link(&mut self) -> bool {
        match follow::moved_link(&self.control.shared.tun_queues[0]).await {
            Ok(Some(link)) => self.link = link,
            Ok(None) => self.control.link_changed(LinkChange::Gone),
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the interface's state is not followed any more"
                );
                // Else nothing would ever go through it again.
                self.control.set_up(true);
                return false;
            }
        }
        true
    }

    /// Stops the workers and closes what they used. Workers that do not stop in time are left alone.
    pub fn stop(self, timeout: Duration) {
        let shared = Arc::clone(&self.control.shared);
        // No datagram is steered to a worker that is about to go.
        self.control.detach();
        shared.stopping.store(true, Ordering::Relaxed);
        shared.wake_all();
        let deadline = Instant::now() + timeout;
        for worker in self.workers {
            while !worker.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !worker.is_finished() {
                tracing::warn!("a worker did not stop");
            } else if worker.join().is_err() {
                tracing::error!("a worker had panicked");
            }
        }
        self.pool.stop();
    }
}

/// The kernel side and the NICs it is attached to.
#[derive(Default)]
struct Kernel {
    steer: Option<Steer>,
    nics: Vec<Link>,
    /// Why NICs that were named are not among them.
    refused: Vec<String>,
}

/// Opens everything and starts the workers.
///
/// # Errors
/// If something that is needed in every mode cannot be had.
pub async fn start(options: &Options, host: &Host) -> anyhow::Result<Running> {
    let cpus = affinity::inherited_cpus().context("reading which CPUs this process may use")?;
    let worker_count = options.workers.unwrap_or(cpus.len()).clamp(1, WORKER_COUNT_MAX);
    let indexes = IndexPermutation::new(random_key(), IndexLayout::DEFAULT);
    let mut kernel = open_kernel(options, host, indexes).await?;
    let tun = open_tun(&options.interface, worker_count)?;
    let tun_index = tun.ifindex();
    let aead: &'static dyn BatchAead = &RingAead;
    let (port, of_worker) =
        udp::bind_group(0, worker_count, 0).context("opening the UDP sockets")?;
    let heartbeats = kernel.steer.as_ref().map(Steer::heartbeats);
    let live_indexes = kernel.steer.as_ref().map(Steer::live_indexes);
    let sockets = SocketGroup { port, of_worker };
    let (shared, work) =
        Shared::new(DeviceId(0), worker_count, tun.into_queues(), sockets, heartbeats, indexes)
            .context("preparing the workers")?;
    // It is down until the link's watch says that it was taken up.
    shared.up.store(false, Ordering::Relaxed);
    let outside = Os::new(Arc::clone(&shared));
    let mut handshakes = Handshakes::new(Arc::clone(&shared), outside, aead, live_indexes);
    let (mut pulling, mut pull_events) = (None, None);
    if let Some(socket) = &options.peer_source {
        let (http, reports) = HttpSource::new(socket);
        let (events, notify) = PullEvents::new(reports);
        handshakes = handshakes.with_source(source::Limits::default(), notify);
        (pulling, pull_events) = (Some(Pulling::new(Box::new(http))), Some(events));
    }
    let handshakes = Arc::new(handshakes);
    let pool = Pool::start(&handshakes, &work, Pool::thread_count(cpus.len()))
        .context("starting the handshake pool")?;

    let (nics, mut xsks) = bind_xsks(&mut kernel, worker_count);
    let mode = mode_in_use(options, &kernel, &nics);
    let mut workers = Vec::new();
    for worker in 0..worker_count {
        // Threads take their time to start; nobody is stuck meanwhile.
        shared.beat(WorkerId(worker as u16), clock::boot_now());
    }
    for (number, mesh) in Mesh::between(worker_count, PARCEL_RING_LEN).into_iter().enumerate() {
        let edges = WorkerEdges { xsks: std::mem::take(&mut xsks[number]), mesh };
        let worker = Worker::new(WorkerId(number as u16), Arc::clone(&shared), edges, aead)
            .context("preparing a worker")?;
        let cpu = cpus[number % cpus.len()];
        let thread = std::thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || {
                if let Err(error) = affinity::pin(cpu) {
                    tracing::warn!(cpu, %error, "a worker is not pinned");
                }
                worker.run();
            })
            .context("starting a worker")?;
        workers.push(thread);
    }

    let steer_log = kernel.steer.as_mut().and_then(Steer::log_reader);
    let addresses = AddressWatch::new(host.clone())?;
    let link = LinkWatch::new(host.clone(), tun_index)?;
    let routes = RouteWatch::new()?;
    let control = Control::new(shared, handshakes, kernel.steer, mode, nics, aead.name());
    let control = Rc::new(control.with_pulling(pulling));
    tokio::task::spawn_local(follow::routes(Rc::clone(&control), host.clone(), routes));
    Ok(Running { control, addresses, link, steer_log, pull_events, workers, pool })
}

/// A key for receiver indexes, another one at each start: indexes from before mean nothing.
fn random_key() -> [u32; IndexPermutation::KEY_LEN] {
    std::array::from_fn(|_| random::Rng.next_u32())
}

fn open_tun(name: &str, worker_count: usize) -> anyhow::Result<Tun> {
    Tun::open(name, worker_count).map_err(|error| {
        let known = match &error {
            TunError::NotPermitted { .. } => Some(Error::Privilege(error.to_string())),
            TunError::Exists { .. } => Some(Error::AlreadyExists(name.to_owned())),
            _ => None,
        };
        match known {
            // It says all that its source does.
            Some(known) => known.into(),
            None => anyhow::Error::new(error).context(format!("creating the interface {name}")),
        }
    })
}

/// Loads the kernel side and attaches it to the NICs that were named, where that is wanted and works.
/// Without queues it lets everything pass.
async fn open_kernel(
    options: &Options,
    host: &Host,
    indexes: IndexPermutation,
) -> anyhow::Result<Kernel> {
    let mut kernel = Kernel::default();
    if options.mode == Mode::Udp {
        return Ok(kernel);
    }
    for name in &options.xdp {
        let link = host.link(name).await?.ok_or_else(|| Error::NotFound(name.clone()))?;
        if kernel.steer.is_none() {
            let log = tracing::enabled!(target: "wg_ebpf", tracing::Level::DEBUG);
            let options = SteerOptions { log, ..SteerOptions::new(indexes) };
            match Steer::load(options) {
                Ok(steer) => kernel.steer = Some(steer),
                Err(error) => {
                    tracing::warn!(%error, "no kernel side; sockets instead");
                    kernel.refused.push(error.to_string());
                    break;
                }
            }
        }
        let steer = kernel.steer.as_mut().expect("loaded above");
        match steer.attach(name) {
            Ok(()) => kernel.nics.push(link),
            Err(error) => {
                tracing::warn!(nic = name, %error, "no XDP on this NIC; sockets instead");
                kernel.refused.push(format!("{name}: {error}"));
            }
        }
    }
    if kernel.nics.is_empty() {
        kernel.steer = None;
    }
    Ok(kernel)
}

/// Binds an XSK to each queue of each NIC, and has the steer program use it. Gives the XSKs of each
/// worker: queue *q* belongs to worker *q* modulo their number.
fn bind_xsks(kernel: &mut Kernel, worker_count: usize) -> (Vec<Nic>, Vec<Vec<XskPort>>) {
    let mut of_worker: Vec<Vec<XskPort>> = (0..worker_count).map(|_| Vec::new()).collect();
    let mut nics = Vec::new();
    let mut slots = 0..QUEUES_LEN;
    let Some(steer) = &mut kernel.steer else { return (nics, of_worker) };
    for nic in &kernel.nics {
        let mut status = Nic { name: nic.name.clone(), queues: 0, zero_copy: false };
        for queue in 0..nic.rx_queue_count {
            let xsk = match Xsk::bind(nic.index, queue, XskOptions::default()) {
                Ok(xsk) => xsk,
                // Drivers make room for more queues than they use.
                Err(XskError::NoQueue { .. }) if queue > 0 => break,
                Err(error) => {
                    tracing::warn!(nic = nic.name, queue, %error, "no XSK; sockets instead");
                    kernel.refused.push(format!("{} queue {queue}: {error}", nic.name));
                    continue;
                }
            };
            let Some(slot) = slots.next() else { break };
            let worker = WorkerId((queue as usize % worker_count) as u16);
            let key = QueueKey { ifindex: nic.index, queue };
            if let Err(error) = steer.set_queue(key, QueueEntry::new(slot, worker), xsk.as_fd()) {
                tracing::warn!(nic = nic.name, queue, %error, "cannot steer to this queue's XSK");
                continue;
            }
            status.queues += 1;
            status.zero_copy |= xsk.is_zero_copy().unwrap_or(false);
            of_worker[usize::from(worker.0)].push(XskPort {
                xsk,
                ifindex: nic.index,
                dropped: [0; 2],
            });
        }
        if status.queues > 0 {
            nics.push(status);
        }
    }
    (nics, of_worker)
}

fn mode_in_use(options: &Options, kernel: &Kernel, nics: &[Nic]) -> ModeInUse {
    let reason = if options.mode == Mode::Udp {
        "asked for".to_owned()
    } else if options.xdp.is_empty() {
        "no NIC was named for XDP".to_owned()
    } else if nics.is_empty() {
        kernel.refused.join("; ")
    } else {
        let on: Vec<String> =
            nics.iter().map(|nic| format!("{} (queues: {})", nic.name, nic.queues)).collect();
        let mut reason = format!("XSKs on {}", on.join(", "));
        for refused in &kernel.refused {
            reason.push_str("; not on ");
            reason.push_str(refused);
        }
        reason
    };
    if nics.is_empty() && options.mode == Mode::Native {
        tracing::warn!(reason, "native mode was asked for, sockets are in use");
    }
    ModeInUse { native: !nics.is_empty(), reason }
}
