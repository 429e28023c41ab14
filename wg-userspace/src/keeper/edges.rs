//! What the keeper opens and keeps, whatever becomes of the data process.

use std::io;
use std::net::IpAddr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use ipnet::IpNet;
use rand_core::Rng as _;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::sync::Notify;
use wg_common::id::{DeviceId, PeerId, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::map::{
    HEARTBEATS_LEN, PEER_WORKERS_LEN, QUEUES_LEN, QueueEntry, QueueKey, peer_word,
};

use super::nat::NatThread;
use super::nics::{Nics, NotBound};
use super::protocol::{
    Answer, DeviceSetup, LINKS_MAX, NamedNic, OWNERS_MAX, Refusal, Request, Setup,
};
use super::ways::{Look, Neighbours};
use crate::bpf::{BpfError, LogReader, SocketSteering, Steer, TunSteering};
use crate::daemon::{AeadChoice, Error, Mode, Options, PacketRules};
use crate::host::{AddressChange, Host, Towards};
use crate::nat;
use crate::sys::errno::ENODEV;
use crate::sys::{SharedWords, affinity, memory, random};
use crate::tun::{Tun, TunError, TunQueue};
use crate::uapi;
use crate::udp::{self, UdpError, UdpSockets};
use crate::xsk::Unbound;

/// Most workers of one device.
const WORKER_COUNT_MAX: usize = 64;
/// Groups of sockets beside the present one. A data process that works closes them.
const FORMER_COUNT_MAX: usize = 16;

/// Everything that is open.
pub struct Edges {
    /// By number; nothing in the place of one whose interface was deleted.
    devices: Vec<Option<Device>>,
    mode: Mode,
    aead: AeadChoice,
    peer_source: Option<PathBuf>,
    worker_count: usize,
    index_key: [u32; IndexPermutation::KEY_LEN],
    nics: Nics,
    /// Log lines of the kernel side, if it is loaded and has any.
    pub steer_log: Option<LogReader>,
    heartbeats: Heartbeats,
    /// An XSK that is open, and not bound.
    unbound: Option<OwnedFd>,
    /// Those of the host, if NICs were named for XDP.
    pub neighbours: Neighbours,
    /// Told when a device has programs of NAT that know of no owners.
    nat_begins: Arc<Notify>,
}

/// What is open for one device.
struct Device {
    id: DeviceId,
    interface: String,
    tun: Vec<TunQueue>,
    tun_index: u32,
    /// What chooses the TUN device's queues, if the data process asked for it.
    tun_steering: Option<TunSteering>,
    /// What chooses among the sockets on the present port, if the data process asked for it.
    socket_steering: Option<SocketSteering>,
    /// The indexes that the device lends are those of these slots.
    indexes: IndexPermutation,
    slots: Range<u32>,
    sockets: Group,
    /// Whether somebody has chosen the port, or said that any will do.
    has_chosen_port: bool,
    former: Vec<Group>,
    listener: uapi::Listener,
    memory: Option<OwnedFd>,
    quiesced_until: u64,
    /// What it was started with.
    rules: PacketRules,
    /// NAT and forwarding: after the TUN device, so that nothing passes when both go.
    nat: NatThread,
}

/// The sockets on one port.
struct Group {
    port: u16,
    of_worker: Vec<UdpSockets>,
}

/// The workers' heartbeats: the kernel side's, or in a file of ours where there is none.
struct Heartbeats {
    words: Arc<SharedWords>,
    file: Option<OwnedFd>,
}

/// What was asked for makes no sense, or belongs to nobody.
pub struct Nonsense;

impl Edges {
    /// Opens everything but the XSKs, which come with each data process.
    ///
    /// # Errors
    /// If something that is needed in every mode cannot be had.
    pub async fn open(options: &Options, host: &Host) -> anyhow::Result<Self> {
        let cpus = affinity::inherited_cpus().context("reading which CPUs this process may use")?;
        let worker_count = options.workers.unwrap_or(cpus.len()).clamp(1, WORKER_COUNT_MAX);
        // Another key at each start: indexes from before mean nothing.
        let index_key = std::array::from_fn(|_| random::Rng.next_u32());
        let indexes = IndexPermutation::new(index_key, IndexLayout::DEFAULT);
        let mut nics = Nics::new(options, indexes);
        nics.follow(host, &[]).await;
        nics.check()?;
        let heartbeats = Heartbeats::open(nics.steer.as_ref())
            .context("making the memory of the workers' heartbeats")?;
        let mut devices = Vec::new();
        let nat_begins = Arc::new(Notify::new());
        for (number, interface) in options.interfaces.iter().enumerate() {
            let id = DeviceId(number as u16);
            let rules = (options.rules_of(number), options.nat_of(number), Arc::clone(&nat_begins));
            let slots = indexes.layout().share(number as u32, options.interfaces.len() as u32);
            let device = Device::open(id, interface, worker_count, (indexes, slots), rules)?;
            devices.push(Some(device));
        }
        let steer_log = nics.steer.as_mut().and_then(Steer::log_reader);
        let edges = Self {
            devices,
            mode: options.mode,
            aead: options.aead,
            peer_source: options.peer_source.clone(),
            worker_count,
            index_key,
            nics,
            steer_log,
            heartbeats,
            unbound: None,
            neighbours: Neighbours::default(),
            nat_begins,
        };
        for device in edges.devices.iter().flatten() {
            steer_port(edges.nics.steer.as_ref(), device.id, None, device.sockets.port);
        }
        Ok(edges)
    }

    /// The files of the UAPI sockets of the devices that are there.
    pub fn socket_files(&self) -> impl Iterator<Item = (DeviceId, &Path)> {
        self.devices.iter().flatten().map(|device| (device.id, device.listener.path()))
    }

    /// The numbers of the devices that are there, with the indexes that their interfaces had in the
    /// beginning.
    pub fn interfaces(&self) -> impl Iterator<Item = (DeviceId, u32)> {
        self.devices.iter().flatten().map(|device| (device.id, device.tun_index))
    }

    /// One of a device's TUN queues, which tells where its interface is. Nothing if that was deleted.
    pub fn tun_queue(&self, device: DeviceId) -> Option<&TunQueue> {
        self.device(device.0).ok()?.as_ref().map(|device| &device.tun[0])
    }

    /// Told when a device has programs of NAT that know of no owners.
    pub fn nat_begins(&self) -> Arc<Notify> {
        Arc::clone(&self.nat_begins)
    }

    /// The devices with programs of NAT.
    pub fn with_nat(&self) -> impl Iterator<Item = DeviceId> {
        self.devices.iter().flatten().filter(|device| device.nat.is_on()).map(|device| device.id)
    }

    /// Closes everything of a device whose interface was deleted; says its name, and whether there is any
    /// other.
    pub fn close(&mut self, device: DeviceId) -> Option<(String, bool)> {
        let closed = self.devices.get_mut(usize::from(device.0))?.take()?;
        if let Some(steer) = &self.nics.steer {
            steer.set_port(closed.sockets.port, None);
        }
        Some((closed.interface, self.devices.iter().any(Option::is_some)))
    }

    /// A device, if it is there yet.
    fn device(&self, number: u16) -> Result<&Option<Device>, Nonsense> {
        self.devices.get(usize::from(number)).ok_or(Nonsense)
    }

    /// When each worker last moved, in nanoseconds of boot time.
    pub fn beats(&self) -> Vec<u64> {
        use std::sync::atomic::Ordering;
        let words = self.heartbeats.words.iter().take(self.worker_count);
        words.map(|word| word.load(Ordering::Relaxed)).collect()
    }

    /// Lets the kernel side forget what belonged to a data process that is gone. Its XSKs were closed
    /// with it.
    pub fn forget_process(&mut self) {
        use std::sync::atomic::Ordering;
        self.devices.iter_mut().flatten().for_each(|device| device.former.clear());
        self.unbound = None;
        self.nics.forget_process();
        let Some(steer) = &self.nics.steer else { return };
        for word in steer.live_indexes().iter() {
            // Most were never touched; reading them makes no page of them.
            if word.load(Ordering::Relaxed) != 0 {
                word.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Takes the kernel side off the NICs.
    pub fn detach(&mut self) {
        self.steer_log = None;
        self.nics.steer = None;
    }

    /// Looks at the NICs that were named, and chooses again where something has changed; gives all of them
    /// if any was.
    pub async fn follow_nics(&mut self, host: &Host) -> Option<Vec<NamedNic>> {
        if !self.nics.is_any_named() {
            return None;
        }
        let chosen = self.devices.iter().flatten().filter(|device| device.has_chosen_port);
        let ports: Vec<u16> = chosen.map(|device| device.sockets.port).collect();
        self.nics.follow(host, &ports).await.then(|| self.nics.named())
    }

    /// Tells the kernel side of an address of this host.
    pub fn address_changed(&mut self, change: AddressChange) {
        let Some(steer) = &mut self.nics.steer else { return };
        let (what, outcome) = match change {
            AddressChange::Added(address) => (address, steer.add_address(address)),
            AddressChange::Removed(address) => (address, steer.remove_address(address)),
        };
        if let Err(error) = outcome {
            // Its datagrams pass to the socket: slower, but nothing is lost.
            tracing::warn!(address = %what, %error, "the kernel side does not know this address");
        }
    }

    /// Whether NICs were named for XDP.
    pub fn is_xdp_asked(&self) -> bool {
        self.nics.is_any_named()
    }

    /// Does what the data process asks for.
    ///
    /// # Errors
    /// [`Nonsense`], if the data process is not as it should be.
    pub async fn serve(
        &mut self,
        request: Request,
        fds: Vec<OwnedFd>,
        host: &Host,
    ) -> Result<(Answer, Vec<OwnedFd>), Nonsense> {
        if let Some(number) = request.device() {
            let device = self.devices.get_mut(usize::from(number)).ok_or(Nonsense)?;
            let answered = match device {
                Some(device) => device.serve(&request, fds, self.nics.steer.as_ref())?,
                // Which the data process is about to be told.
                None if request.is_note() => done(),
                None => Err(refusal("its interface was deleted", Some(ENODEV))),
            };
            return Ok(answered.unwrap_or_else(|refusal| (Answer::Refused(refusal), Vec::new())));
        }
        let answered = match request {
            Request::Setup => self.setup(),
            Request::OpenXsk { ifindex, generation, shares } => {
                self.open_xsk(ifindex, generation, shares)
            }
            Request::BindXsk { ifindex, queue, slot, worker, generation } => {
                if slot >= QUEUES_LEN || usize::from(worker) >= self.worker_count {
                    return Err(Nonsense);
                }
                let Some(socket) = self.unbound.take() else { return Err(Nonsense) };
                let entry = |frame_len_max| QueueEntry::new(slot, WorkerId(worker), frame_len_max);
                let (key, other) = (QueueKey { ifindex, queue }, fds.into_iter().next());
                match self.nics.bind((&socket, other.as_ref()), key, generation, entry) {
                    Ok(zero_copy) => Ok((Answer::Bound { zero_copy }, Vec::new())),
                    Err(NotBound::CannotShare(why)) => Ok((Answer::CannotShare(why), Vec::new())),
                    Err(NotBound::NoQueue) => Ok((Answer::NoQueue, Vec::new())),
                    Err(NotBound::Refused(why)) => Err(refusal(why, None)),
                }
            }
            Request::LinksTowards { mark, with_hops, towards } => {
                if towards.len() > LINKS_MAX {
                    return Err(Nonsense);
                }
                let look = Look::new(host, &self.neighbours, mark, with_hops);
                links_towards(look, &towards).await
            }
            Request::SteerCounters => self.counters(),
            Request::ConnectPeerSource => self.connect_peer_source(),
            Request::Ready | Request::Alive => done(),
            Request::TunQueues { .. }
            | Request::SteerTun { .. }
            | Request::SteerSockets { .. }
            | Request::SetOwners { .. }
            | Request::Sockets { .. }
            | Request::OpenSockets { .. }
            | Request::CloseSockets { .. }
            | Request::SetMark { .. }
            | Request::Remember { .. }
            | Request::Resolve { .. }
            | Request::PauseUntil { .. } => unreachable!("they are a device's"),
        };
        Ok(answered.unwrap_or_else(|refusal| (Answer::Refused(refusal), Vec::new())))
    }

    fn setup(&self) -> Answered {
        let steer = self.nics.steer.as_ref();
        let devices = self.devices.iter().flatten();
        let setup = Setup {
            device_count: self.devices.len(),
            devices: devices.clone().map(Device::setup).collect(),
            worker_count: self.worker_count,
            index_key: self.index_key,
            mode: self.mode,
            nics: self.nics.named(),
            aead: self.aead,
            has_peer_source: self.peer_source.is_some(),
            live_index_count: steer.map(|steer| steer.live_indexes().len()),
        };
        let own_beats = self.heartbeats.file.as_ref().map(AsFd::as_fd);
        let beats = own_beats.or_else(|| steer.map(Steer::heartbeats_fd));
        let listeners = devices.clone().map(|device| device.listener.as_fd());
        let maps = [beats, steer.map(Steer::live_indexes_fd)].into_iter().flatten();
        let memories = devices.filter_map(|device| device.memory.as_ref().map(AsFd::as_fd));
        Ok((Answer::Setup(setup), clones(listeners.chain(maps).chain(memories))?))
    }

    /// Makes an XSK, which is bound when the data process has mapped it.
    fn open_xsk(&mut self, ifindex: u32, generation: u64, shares: bool) -> Answered {
        let Some(options) = self.nics.xsk_options(ifindex, generation) else {
            return Err(refusal("there are to be no such sockets on this interface", None));
        };
        let make = if shares { Unbound::without_umem } else { Unbound::new };
        let Unbound { socket, umem, options } =
            make(options).map_err(|error| refusal(error, None))?;
        self.unbound = Some(clone(socket.as_fd())?);
        let fds = std::iter::once(socket).chain(umem).collect();
        Ok((Answer::Xsk { chunk_size: options.chunk_size }, fds))
    }

    fn counters(&self) -> Answered {
        let counters = match &self.nics.steer {
            Some(steer) => steer.counters().map_err(|error| refusal(error, None))?.to_counts(),
            None => Vec::new(),
        };
        Ok((Answer::Counters(counters), Vec::new()))
    }

    fn connect_peer_source(&self) -> Answered {
        let Some(path) = &self.peer_source else { return Err(refusal("there is none", None)) };
        let connect = || {
            // Not to wait for a service that takes no connections at present.
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(socket)
        };
        let socket = connect().map_err(|error: io::Error| {
            refusal(format_args!("{}: {error}", path.display()), error.raw_os_error())
        })?;
        Ok((Answer::Connected, vec![socket]))
    }
}

impl Device {
    fn open(
        id: DeviceId,
        interface: &str,
        worker_count: usize,
        (indexes, slots): (IndexPermutation, Range<u32>),
        (rules, lines, nat_begins): (PacketRules, nat::Lines, Arc<Notify>),
    ) -> anyhow::Result<Self> {
        let tun = open_tun(interface, worker_count)?;
        let tun_index = tun.ifindex();
        let (port, of_worker) =
            udp::bind_group(0, worker_count, 0).context("opening the UDP sockets")?;
        let listener = uapi::Listener::bind(interface)
            .with_context(|| format!("opening the socket of {interface} for wg(8)"))?;
        let nat = NatThread::start(interface, tun_index, lines, nat_begins)
            .with_context(|| format!("starting NAT for {interface}"))?;
        Ok(Self {
            id,
            interface: interface.to_owned(),
            tun: tun.into_queues(),
            tun_index,
            tun_steering: None,
            socket_steering: None,
            indexes,
            slots,
            sockets: Group { port, of_worker },
            has_chosen_port: false,
            former: Vec::new(),
            listener,
            memory: None,
            quiesced_until: 0,
            rules,
            nat,
        })
    }

    fn setup(&self) -> DeviceSetup {
        DeviceSetup {
            number: self.id.0,
            interface: self.interface.clone(),
            has_memory: self.memory.is_some(),
            quiesced_until: self.quiesced_until,
            rules: self.rules,
        }
    }

    /// Does what is asked for this device.
    fn serve(
        &mut self,
        request: &Request,
        fds: Vec<OwnedFd>,
        steer: Option<&Steer>,
    ) -> Result<Answered, Nonsense> {
        Ok(match *request {
            Request::Remember { .. } => {
                let Ok([memory]) = <[OwnedFd; 1]>::try_from(fds) else { return Err(Nonsense) };
                self.memory = Some(memory);
                done()
            }
            // The rest is not done here.
            Request::Resolve { ref host, port, .. } => {
                if !uapi::is_host(host) || port == 0 {
                    return Err(Nonsense);
                }
                done()
            }
            Request::PauseUntil { boot_ns, .. } => {
                self.quiesced_until = boot_ns;
                done()
            }
            Request::TunQueues { .. } => {
                clones(self.tun.iter().map(AsFd::as_fd)).map(|fds| (Answer::TunQueues, fds))
            }
            Request::SteerTun { .. } => self.steer_tun(),
            Request::SteerSockets { .. } => self.steer_sockets(),
            Request::SetOwners { ref owners, .. } => self.set_owners(owners)?,
            Request::OpenSockets { port, fwmark, .. } => {
                self.open_sockets(port, fwmark, steer).and_then(|()| self.sockets.answer())
            }
            Request::CloseSockets { port, .. } => {
                self.former.retain(|group| group.port != port);
                done()
            }
            Request::SetMark { fwmark, .. } => self.sockets.set_mark(fwmark).and_then(|()| done()),
            // The others are nobody's.
            _ => self.sockets.answer(),
        })
    }

    /// Has a program choose the TUN device's queues. What was there before stays if that fails.
    fn steer_tun(&mut self) -> Answered {
        refused_by_a_test("tun")?;
        let refused = |error: BpfError| {
            tracing::debug!(%error, "the kernel does not take the program that chooses TUN queues");
            // Not the verifier's log, which may be long.
            refusal(error.to_string().lines().next().unwrap_or_default(), None)
        };
        let steering = TunSteering::load().map_err(refused)?;
        let program = steering.program_fd().map_err(refused)?;
        self.tun[0].set_steering(program).map_err(|error| {
            refusal(format_args!("the kernel lets no program choose TUN queues: {error}"), None)
        })?;
        let peer_workers = clone(steering.peer_workers_fd())?;
        self.tun_steering = Some(steering);
        Ok((Answer::PeerWorkers, vec![peer_workers]))
    }

    /// Has a program choose the sockets. If that fails, the kernel does.
    fn steer_sockets(&mut self) -> Answered {
        refused_by_a_test("sockets")?;
        let refused = |error: BpfError| {
            tracing::debug!(%error, "the kernel does not take the program that chooses sockets");
            refusal(error.to_string().lines().next().unwrap_or_default(), None)
        };
        let mut steering = match self.socket_steering.take() {
            Some(steering) => steering,
            None => SocketSteering::load(self.indexes, self.slots.clone()).map_err(refused)?,
        };
        steering.forget_keypairs();
        self.sockets.steer(&mut steering).map_err(refused)?;
        let index_workers = clone(steering.index_workers_fd())?;
        self.socket_steering = Some(steering);
        Ok((Answer::IndexWorkers, vec![index_workers]))
    }

    /// Says who owns prefixes, as far as the kernel takes it; tells the first thing that it does not take.
    fn set_owners(&mut self, owners: &[(IpAddr, u8, Option<u32>)]) -> Result<Answered, Nonsense> {
        let is_sense = |&(addr, len, owner): &(IpAddr, u8, Option<u32>)| {
            let owner_exists = |owner| peer_word(PeerId(owner)) < PEER_WORKERS_LEN;
            IpNet::new(addr, len).is_ok() && owner.is_none_or(owner_exists)
        };
        if owners.len() > OWNERS_MAX || !owners.iter().all(is_sense) {
            return Err(Nonsense);
        }
        let owned = |&(addr, len, owner): &(IpAddr, u8, Option<u32>)| (addr, len, owner.is_some());
        if self.nat.is_on() {
            self.nat.set_owned(owners.iter().map(owned).collect());
        }
        let Some(steering) = &mut self.tun_steering else { return Ok(done()) };
        let mut outcome = done();
        for &(addr, len, owner) in owners {
            if let Err(error) = steering.set_owner(addr, len, owner.map(PeerId)) {
                outcome = outcome.and_then(|_| Err(refusal(error, None)));
            }
        }
        Ok(outcome)
    }

    /// Opens sockets on another port. Nothing is changed if that fails.
    fn open_sockets(
        &mut self,
        port: u16,
        fwmark: u32,
        steer: Option<&Steer>,
    ) -> Result<(), Refusal> {
        let before = self.sockets.port;
        self.has_chosen_port = true;
        if port == before {
            return self.sockets.set_mark(fwmark);
        }
        let group = match self.former.iter().position(|group| group.port == port) {
            Some(at) => {
                self.former[at].set_mark(fwmark)?;
                self.former.swap_remove(at)
            }
            None if self.former.len() >= FORMER_COUNT_MAX => {
                return Err(refusal("too many ports are in use", None));
            }
            None => {
                let (port, of_worker) =
                    udp::bind_group(port, self.tun.len(), fwmark).map_err(refused_socket)?;
                Group { port, of_worker }
            }
        };
        self.former.push(std::mem::replace(&mut self.sockets, group));
        steer_port(steer, self.id, Some(before), self.sockets.port);
        if let Some(steering) = &mut self.socket_steering
            && let Err(error) = self.sockets.steer(steering)
        {
            let (interface, port) = (&self.interface, self.sockets.port);
            tracing::warn!(interface, port, %error, "the kernel spreads datagrams over workers by itself");
        }
        Ok(())
    }
}

fn steer_port(steer: Option<&Steer>, device: DeviceId, before: Option<u16>, port: u16) {
    if let Some(steer) = steer {
        if let Some(before) = before {
            steer.set_port(before, None);
        }
        steer.set_port(port, Some(device));
    }
}

type Answered = Result<(Answer, Vec<OwnedFd>), Refusal>;

fn done() -> Answered {
    Ok((Answer::Done, Vec::new()))
}

fn refusal(text: impl std::fmt::Display, errno: Option<i32>) -> Refusal {
    Refusal { text: text.to_string(), errno }
}

fn refused_socket(error: UdpError) -> Refusal {
    use crate::sys::errno::{EACCES, EADDRINUSE};
    let errno = match &error {
        UdpError::InUse { .. } => Some(EADDRINUSE),
        UdpError::NotPermitted { .. } => Some(EACCES),
        UdpError::Io { source, .. } => source.raw_os_error(),
        UdpError::NotUdp => None,
    };
    refusal(error, errno)
}

/// A hook for tests: refuses a program of a kind that `TIDEGATE_TEST_REFUSE_STEERING` names, as a kernel does
/// that has none.
#[cfg(debug_assertions)]
fn refused_by_a_test(kind: &str) -> Result<(), Refusal> {
    match std::env::var("TIDEGATE_TEST_REFUSE_STEERING") {
        Ok(kinds) if kinds.split(',').any(|refused| refused == kind) => {
            Err(refusal("a test refuses the program", None))
        }
        _ => Ok(()),
    }
}

#[cfg(not(debug_assertions))]
#[expect(clippy::unnecessary_wraps, reason = "in debug builds it may refuse")]
fn refused_by_a_test(_: &str) -> Result<(), Refusal> {
    Ok(())
}

/// Descriptors that can be given away.
fn clones<'a>(fds: impl Iterator<Item = BorrowedFd<'a>>) -> Result<Vec<OwnedFd>, Refusal> {
    fds.map(clone).collect()
}

fn clone(fd: BorrowedFd<'_>) -> Result<OwnedFd, Refusal> {
    fd.try_clone_to_owned().map_err(|error| refusal(&error, error.raw_os_error()))
}

async fn links_towards(mut look: Look<'_>, towards: &[Towards]) -> Answered {
    let mut links = Vec::with_capacity(towards.len());
    for towards in towards {
        links.push(look.towards(towards).await.map_err(|error| refusal(error, None))?);
    }
    Ok((Answer::Links(links), Vec::new()))
}

impl Group {
    fn answer(&self) -> Answered {
        let v4 = self.of_worker.iter().map(|sockets| sockets.v4.as_fd());
        let v6 = self.of_worker.iter().filter_map(|sockets| sockets.v6.as_ref()).map(AsFd::as_fd);
        let has_v6 = self.of_worker.iter().any(|sockets| sockets.v6.is_some());
        Ok((Answer::Sockets { port: self.port, has_v6 }, clones(v4.chain(v6))?))
    }

    /// Has `steering` choose among them.
    fn steer(&self, steering: &mut SocketSteering) -> Result<(), BpfError> {
        let v4: Vec<_> = self.of_worker.iter().map(|sockets| sockets.v4.as_fd()).collect();
        let v6 = self.of_worker.iter().filter_map(|sockets| sockets.v6.as_ref());
        steering.steer(&v4, &v6.map(AsFd::as_fd).collect::<Vec<_>>())
    }

    /// Marks all sockets, or none.
    fn set_mark(&self, fwmark: u32) -> Result<(), Refusal> {
        let mut before = Vec::new();
        for sockets in self.of_worker.iter().flat_map(UdpSockets::iter) {
            let marked = sockets.fwmark().map_err(refused_socket).and_then(|mark| {
                before.push((sockets, mark));
                sockets.set_fwmark(fwmark).map_err(refused_socket)
            });
            if let Err(refusal) = marked {
                // They had that mark, so that they may have it again.
                before.iter().for_each(|(sockets, mark)| drop(sockets.set_fwmark(*mark)));
                return Err(refusal);
            }
        }
        Ok(())
    }
}

impl Heartbeats {
    fn open(steer: Option<&Steer>) -> io::Result<Self> {
        if let Some(steer) = steer {
            return Ok(Self { words: steer.heartbeats(), file: None });
        }
        let count = HEARTBEATS_LEN as usize;
        let file = memory::memfd("tidegate-heartbeats", count * size_of::<u64>())?;
        Ok(Self { words: Arc::new(SharedWords::map(&file, count)?), file: Some(file) })
    }
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
