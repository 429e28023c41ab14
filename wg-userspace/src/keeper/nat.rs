//! NAT and forwarding of a device: a thread that has the programs and their maps.
//!
//! It begins with the lines of the file that the device was started with, and listens on a socket of root's own
//! (`/run/tidegate/IF.nat`) for other ones, and for who wants to see how things stand. So rules never pass through
//! the data process, which could be somebody else's by then. What lines mean is thought out in
//! [`nat`](crate::nat); here is what the host tells of links and addresses, and the sweeper's clock.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc};
use wg_common::headers::{PROTOCOL_TCP, PROTOCOL_UDP};
use wg_common::map::AddressKey;
use wg_common::nat::map::{
    EXTERNALS_LEN, Flow, FlowKey, Mapping, MappingKey, PROTOCOLS_LEN, Protocol, RuleSet, Slot, ring,
};
use wg_common::nat::{tcp, timeout};

use crate::bpf::{
    Attachment, BpfError, FlowPages, MappingPages, Nat, NatHook, NatIds, NatOptions,
    remove_left_overs,
};
use crate::config;
use crate::host::{AddressWatch, AnyLinkWatch, ForwardingLink, Host};
use crate::nat::Lines;
use crate::nat::ports::{BLOCK_LEN, FreePorts, Window};
use crate::nat::rules::{Facts, Nic, RuleBook};
use crate::nat::sweep::{Life, Next, Outside, Room, Scarce, Sweeper, Tables};
use crate::sys::clock;

/// Where its sockets are, and the files of blocks of ports.
const DIR: &str = "/run/tidegate";
/// Blocks of ports that a device begins with. It takes more as it needs them.
const BLOCKS_FIRST: usize = 2;
/// Rounds of the sweeper begin so often while nothing is scarce.
const ROUND_EVERY_NS: u64 = 5_000_000_000;
/// Entries that are looked at in one step.
const STEP: usize = 2048;
/// Waits between steps, by what the last one left to do. The first one is longer after a step that took longer: half of
/// a CPU is the most that sweeping takes.
const WAIT_AT_ONCE: Duration = Duration::from_millis(1);
const WAIT_SOON: Duration = Duration::from_millis(20);
const WAIT_LATER: Duration = Duration::from_millis(100);
/// How often other devices are asked for ports that they have no use for any more.
const ASK_FOR_BLOCKS_EVERY_NS: u64 = 1_000_000_000;
/// Links that change all the time are looked at so often, and at the latest: nobody tells of some changes.
const LOOK_BETWEEN: Duration = Duration::from_millis(50);
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Longest text that is taken from a client.
const ASKED_LEN_MAX: u64 = 1 << 20;
/// How long a client may take.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// The socket of a device.
pub fn socket_path(interface: &str) -> PathBuf {
    Path::new(DIR).join(format!("{interface}.nat"))
}

/// What is asked on the socket: a text of JSON, up to the end of the client's sending.
#[derive(Debug, Deserialize, Serialize)]
pub enum Asked {
    /// To follow these lines from now on, and no others: `#!` lines as in a file.
    Follow(String),
    /// How things stand.
    State,
}

/// What is answered.
#[derive(Debug, Deserialize, Serialize)]
pub enum Told {
    /// They are followed; these were before.
    Followed(String),
    /// How things stand.
    State(State),
    /// It is not so, and nothing has changed.
    Refused(String),
}

/// How things stand.
#[derive(Debug, Default, Deserialize, Serialize)]
pub struct State {
    /// The lines that are followed.
    pub lines: String,
    /// The maps, if there are lines.
    pub ids: Option<NatIds>,
    /// How many flows there may be.
    pub flow_count_max: usize,
    /// External addresses.
    pub externals: Vec<ExternalState>,
    /// Where the programs are: the interface's name, and whether by a link of the kernel (TCX).
    pub attached: Vec<(String, bool)>,
}

/// An external address.
#[derive(Debug, Deserialize, Serialize)]
pub struct ExternalState {
    /// The address, if there is one at present.
    pub address: Option<IpAddr>,
    /// The NIC's name.
    pub nic: String,
    /// Ports in use, and those that it has, of TCP, UDP and echoes.
    pub ports: [(u32, u32); PROTOCOLS_LEN as usize],
}

/// The thread. Dropping it ends it, and takes the programs away.
pub struct NatThread {
    commands: mpsc::UnboundedSender<Command>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the keeper's loop and the thread know of each other.
struct Shared {
    /// Whether there are programs.
    is_on: AtomicBool,
    /// Told when there were none, and are now: they know of no owners yet.
    begins: Arc<Notify>,
}

enum Command {
    /// Whether somebody owns each of these prefixes.
    Owned(Vec<(IpAddr, u8, bool)>),
}

impl NatThread {
    /// Begins to follow `lines` for a device, and to listen for others. Tells `begins` whenever it has new programs,
    /// which are to be told all owners.
    ///
    /// # Errors
    /// If the lines cannot be followed: without them packets would pass that are not to.
    pub fn start(
        interface: &str,
        tun: u32,
        lines: Lines,
        begins: Arc<Notify>,
    ) -> anyhow::Result<Self> {
        let (commands, asked) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared { is_on: AtomicBool::new(false), begins });
        let (tell, told) = std::sync::mpsc::channel();
        let (interface, of_thread) = (interface.to_owned(), Arc::clone(&shared));
        let is_asked = !lines.is_empty();
        let thread = std::thread::Builder::new()
            .name("tidegate-nat".to_owned())
            .spawn(move || run(interface, tun, lines, of_thread, asked, &tell))
            .context("starting the thread of NAT")?;
        let this = Self { commands, shared, thread: Some(thread) };
        match told.recv().context("the thread of NAT has ended").flatten() {
            Err(error) if is_asked => return Err(error),
            // Such as no folder for its socket: a device that has no use for it works all the same.
            Err(error) => {
                tracing::info!(
                    error = format!("{error:#}"),
                    "lines about NAT cannot be taken later"
                );
            }
            Ok(()) => {}
        }
        Ok(this)
    }

    /// Whether there are programs, which want to know of owners.
    pub fn is_on(&self) -> bool {
        self.shared.is_on.load(Ordering::Relaxed)
    }

    /// Says of each of these prefixes whether somebody owns it.
    pub fn set_owned(&self, owned: Vec<(IpAddr, u8, bool)>) {
        // It ends only with this.
        let _ = self.commands.send(Command::Owned(owned));
    }
}

impl Drop for NatThread {
    fn drop(&mut self) {
        // A channel without senders is the end.
        self.commands = mpsc::unbounded_channel().0;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of NAT has panicked");
        }
    }
}

type Started = std::sync::mpsc::Sender<anyhow::Result<()>>;

fn run(
    interface: String,
    tun: u32,
    lines: Lines,
    shared: Arc<Shared>,
    commands: mpsc::UnboundedReceiver<Command>,
    started: &Started,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime of NAT");
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return drop(started.send(Err(error))),
    };
    runtime.block_on(async {
        let begun = Service::begin(interface, tun, lines, shared).await;
        match begun {
            Ok((service, socket, changed)) => {
                let _ = started.send(Ok(()));
                service.serve(socket, &changed, commands).await;
            }
            Err(error) => drop(started.send(Err(error))),
        }
    });
}

/// Has `changed` told when something about addresses or links has changed.
///
/// Each watch has a task and a socket of its own: a list that is given up half-way would keep the kernel from
/// beginning another one on the same socket.
fn watch(changed: &Arc<Notify>) -> anyhow::Result<()> {
    let mut addresses = AddressWatch::new(Host::new()?)?;
    let mut links = AnyLinkWatch::new()?;
    let tell = Arc::clone(changed);
    tokio::spawn(async move {
        loop {
            match addresses.next().await {
                Ok(_) => tell.notify_one(),
                Err(error) => return tracing::warn!(%error, "NAT sees late which addresses change"),
            }
        }
    });
    let tell = Arc::clone(changed);
    tokio::spawn(async move {
        loop {
            match links.next().await {
                Ok(()) => tell.notify_one(),
                Err(error) => return tracing::warn!(%error, "NAT sees late which links change"),
            }
        }
    });
    Ok(())
}

/// The file of the socket.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    fn bind(interface: &str) -> anyhow::Result<Self> {
        make_dir(Path::new(DIR))?;
        let path = socket_path(interface);
        // Whoever has the interface has the socket: the kernel has just given us that.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", path.display()));
            }
            _ => {}
        }
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("listening at {}", path.display()))?;
        Ok(Self { listener, path })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn make_dir(dir: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("making {}", dir.display()))
}

/// A device's NAT.
struct Service {
    interface: String,
    tun: u32,
    host: Host,
    shared: Arc<Shared>,
    lines: Lines,
    running: Option<Running>,
}

impl Service {
    async fn begin(
        interface: String,
        tun: u32,
        lines: Lines,
        shared: Arc<Shared>,
    ) -> anyhow::Result<(Self, Socket, Arc<Notify>)> {
        let host = Host::new().context("opening netlink")?;
        // Before anything is read of what they tell.
        let changed = Arc::new(Notify::new());
        watch(&changed)?;
        let socket = Socket::bind(&interface)?;
        match remove_left_overs(Some(tun)) {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "removed filters of processes that were killed"),
            Err(error) => tracing::warn!(%error, "filters of processes that were killed may stay"),
        }
        let empty = Lines::default();
        let mut service = Self { interface, tun, host, shared, lines: empty, running: None };
        service.follow(lines).await.context("following the lines about NAT")?;
        Ok((service, socket, changed))
    }

    async fn serve(
        mut self,
        socket: Socket,
        changed: &Notify,
        mut commands: mpsc::UnboundedReceiver<Command>,
    ) {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut wait = WAIT_LATER;
        loop {
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(Command::Owned(owned)) => self.set_owned(&owned),
                    None => return,
                },
                client = socket.listener.accept() => match client {
                    Ok((client, _)) => self.answer(client).await,
                    Err(error) => {
                        tracing::warn!(%error, "nobody is answered about NAT for a moment");
                        tokio::time::sleep(LOOK_BETWEEN).await;
                    }
                },
                () = tokio::time::sleep(wait), if self.running.is_some() => {
                    wait = self.step();
                }
                () = changed.notified() => {
                    self.look_again().await;
                    tokio::time::sleep(LOOK_BETWEEN).await;
                }
                _ = looks.tick() => self.look_again().await,
            }
        }
    }

    fn set_owned(&mut self, owned: &[(IpAddr, u8, bool)]) {
        let Some(running) = &mut self.running else { return };
        for &(address, len, is_owned) in owned {
            if let Err(error) = running.tables.nat.set_owned(address, len, is_owned) {
                running.warn_once(Warned::OWNERS, || {
                    tracing::warn!(%error, "NAT drops what comes from some peers");
                });
            }
        }
    }

    fn step(&mut self) -> Duration {
        let Some(running) = &mut self.running else { return WAIT_LATER };
        running.step(&self.interface)
    }

    /// Looks how the host is now.
    async fn look_again(&mut self) {
        let Some(running) = &mut self.running else { return };
        let interface = &self.interface;
        let links = match self.host.forwarding_links().await {
            Ok(links) => links,
            Err(error) => return tracing::warn!(interface, %error, "NAT does not see addresses"),
        };
        if let Err(error) = running.look_again(&self.lines, interface, &links, self.tun) {
            let error = format!("{error:#}");
            running.warn_once(Warned::FOLLOW, || {
                tracing::error!(interface, error, "NAT does not follow the host's addresses");
            });
        } else {
            running.warned &= !Warned::FOLLOW;
        }
    }

    /// Follows other lines from now on. Nothing has changed if that fails.
    async fn follow(&mut self, lines: Lines) -> anyhow::Result<()> {
        lines.check()?;
        if lines.text() == self.lines.text() {
            return Ok(());
        }
        if lines.is_empty() {
            self.running = None;
            self.shared.is_on.store(false, Ordering::Relaxed);
            self.lines = lines;
            return Ok(());
        }
        let links = self.host.forwarding_links().await?;
        if let Some(running) = &mut self.running
            && running.fits(&lines, &links, self.tun)
        {
            let followed = running.follow(&lines, &self.interface, &links, self.tun);
            if followed.is_err() {
                // Also what it has changed already.
                let back = running.follow(&self.lines, &self.interface, &links, self.tun);
                if let Err(error) = back {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "rules are partly those of before"
                    );
                }
            }
            followed?;
        } else {
            let had_flows = self.running.is_some();
            let begun = Running::begin(&lines, &self.interface, &links, self.tun)?;
            // First those are there, then the former ones go.
            self.running = Some(begun);
            self.shared.is_on.store(true, Ordering::Relaxed);
            self.shared.begins.notify_one();
            if had_flows {
                tracing::warn!(
                    interface = self.interface,
                    "more external addresses than before: flows began anew"
                );
            }
        }
        self.lines = lines;
        Ok(())
    }

    async fn answer(&mut self, client: UnixStream) {
        let outcome = tokio::time::timeout(CLIENT_TIMEOUT, self.converse(client)).await;
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a client that asked about NAT went away"),
            Err(_) => tracing::debug!("a client that asked about NAT took too long"),
        }
    }

    async fn converse(&mut self, mut client: UnixStream) -> io::Result<()> {
        // Its file is root's only, too.
        if client.peer_cred()?.uid() != rustix::process::geteuid().as_raw() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut text = Vec::new();
        (&mut client).take(ASKED_LEN_MAX).read_to_end(&mut text).await?;
        let told = match serde_json::from_slice(&text) {
            Ok(Asked::State) => Told::State(self.state()),
            Ok(Asked::Follow(lines)) => {
                let before = self.lines.text();
                match self.follow_text(&lines).await {
                    Ok(()) => Told::Followed(before),
                    Err(error) => Told::Refused(format!("{error:#}")),
                }
            }
            Err(error) => Told::Refused(error.to_string()),
        };
        client.write_all(&serde_json::to_vec(&told)?).await?;
        client.shutdown().await
    }

    async fn follow_text(&mut self, text: &str) -> anyhow::Result<()> {
        let text = format!("[Interface]\n{text}");
        let (directives, problems) = config::directives("the lines", &text);
        // A line that is not understood may be the one that denies.
        if let Some(problem) = problems.first() {
            anyhow::bail!("{problem}");
        }
        self.follow(Lines::of_directives(&directives)).await
    }

    fn state(&self) -> State {
        let lines = self.lines.text();
        let Some(running) = &self.running else { return State { lines, ..State::default() } };
        State { lines, ..running.state() }
    }
}

/// What was warned of, until it is over.
struct Warned;

impl Warned {
    const PORTS: u8 = 1;
    const FLOWS: u8 = 1 << 1;
    const MAPPINGS: u8 = 1 << 2;
    const FOLLOW: u8 = 1 << 3;
    const SWEEP: u8 = 1 << 4;
    const OWNERS: u8 = 1 << 5;
}

/// The programs, and what is done for them.
struct Running {
    tables: KernelTables,
    sweeper: Sweeper,
    book: RuleBook,
    rules: Box<RuleSet>,
    facts: Facts,
    free: FreePorts,
    window: Window,
    /// The blocks of ports that are ours.
    blocks: Vec<Block>,
    /// Names of links by their indexes.
    names: Vec<(u32, String)>,
    /// Where the NIC's program is.
    nics: Vec<u32>,
    warned: u8,
    /// Until then no more ports are asked for: others have them all.
    no_block_until_ns: u64,
    /// How long the longest round of the sweeper took.
    round_max_ns: u64,
}

impl Running {
    fn begin(
        lines: &Lines,
        interface: &str,
        links: &[ForwardingLink],
        tun: u32,
    ) -> anyhow::Result<Self> {
        let free = free_ports();
        let window = free.window().context(
            "net.ipv4.ip_local_port_range leaves no ports for NAT; write a smaller one, such as \
             `sysctl net.ipv4.ip_local_port_range='32768 60999'`",
        )?;
        let facts = facts(lines, links, tun, window.port_first);
        let mut book = RuleBook::default();
        let rules = book.rule_set(lines, &facts)?;
        let externals = rules.external_count.max(2).next_power_of_two();
        let options =
            NatOptions { externals: externals.min(EXTERNALS_LEN as u32), ..NatOptions::default() };
        let nat = Nat::load(options).map_err(|error| {
            let text = error.to_string();
            tracing::debug!(
                interface,
                error = text,
                "the kernel does not take the programs of NAT"
            );
            // Not the verifier's log, which may be long.
            anyhow::anyhow!(
                "loading the programs of NAT: {}",
                text.lines().next().unwrap_or_default()
            )
        })?;
        let tables = KernelTables::new(nat).context("reading the tables of NAT")?;
        let room = Room { flows: tables.flows.room(), mappings: tables.mappings.room() };
        let ring_count = tables.nat.external_count() * PROTOCOLS_LEN;
        let mut running = Self {
            sweeper: Sweeper::new(life(), room, ring_count, window.port_first),
            tables,
            book,
            rules: rules.clone(),
            facts,
            free,
            window,
            blocks: Vec::new(),
            names: Vec::new(),
            nics: Vec::new(),
            warned: 0,
            no_block_until_ns: 0,
            round_max_ns: 0,
        };
        for _ in 0..BLOCKS_FIRST {
            running.take_block()?;
        }
        anyhow::ensure!(
            !running.blocks.is_empty(),
            "other devices have all the ports; free some by a smaller net.ipv4.ip_local_port_range"
        );
        running.hold(rules)?;
        running.attach(lines, interface, links, tun)?;
        Ok(running)
    }

    /// Whether there is room for the external addresses of other lines.
    fn fits(&self, lines: &Lines, links: &[ForwardingLink], tun: u32) -> bool {
        let facts = facts(lines, links, tun, self.window.port_first);
        let rules = self.book.clone().rule_set(lines, &facts);
        rules.is_ok_and(|rules| rules.external_count <= self.tables.nat.external_count())
    }

    fn follow(
        &mut self,
        lines: &Lines,
        interface: &str,
        links: &[ForwardingLink],
        tun: u32,
    ) -> anyhow::Result<()> {
        let facts = facts(lines, links, tun, self.window.port_first);
        let rules = self.book.rule_set(lines, &facts)?;
        self.hold(rules)?;
        self.facts = facts;
        self.attach(lines, interface, links, tun)
    }

    fn look_again(
        &mut self,
        lines: &Lines,
        interface: &str,
        links: &[ForwardingLink],
        tun: u32,
    ) -> anyhow::Result<()> {
        if facts(lines, links, tun, self.window.port_first) != self.facts {
            tracing::info!(interface, "the addresses or links of NAT have changed");
            self.follow(lines, interface, links, tun)
        } else {
            self.attach(lines, interface, links, tun)
        }
    }

    /// Has the programs follow these rules.
    fn hold(&mut self, rules: Box<RuleSet>) -> anyhow::Result<()> {
        self.tables.nat.swap_rules(&rules).context("giving the programs their rules")?;
        self.rules = rules;
        self.sweeper.set_outsides(self.rules.externals.map(|external| Outside {
            address: (external.address != AddressKey([0; 4])).then_some(external.address),
            nic: external.nic,
        }));
        let forward = self.rules.forward[..self.rules.forward_count as usize].iter();
        let kept: Vec<(Protocol, u16)> = forward
            .map(|rule| {
                let is_tcp = rule.protocol == Protocol::Tcp as u32;
                let protocol = if is_tcp { Protocol::Tcp } else { Protocol::Udp };
                (protocol, u16::from_be(rule.port))
            })
            .collect();
        self.sweeper.keep_ports(&mut self.tables, kept);
        // A place that is new has no ports yet.
        let blocks: Vec<u32> = self.blocks.iter().map(|block| block.number).collect();
        for ring in self.rings() {
            if self.sweeper.lent(ring) == 0 {
                blocks.iter().for_each(|block| self.lend(ring, *block));
            }
        }
        Ok(())
    }

    /// The rings of the places that are in use.
    fn rings(&self) -> std::ops::Range<u32> {
        0..self.rules.external_count.min(self.tables.nat.external_count()) * PROTOCOLS_LEN
    }

    fn lend(&mut self, ring: u32, block: u32) {
        let ports = self.free.of_block(block).into_iter().take(block_len());
        self.sweeper.lend(&mut self.tables, ring, ports);
    }

    /// Whether so little of a ring is left that a burst could take it all before the next look: another block is there
    /// for the taking, and who needs few ports never asks for it.
    fn is_low(&self) -> bool {
        self.rings().any(|ring| {
            let (head, tail) = self.tables.ring(ring);
            let full = self.sweeper.lent(ring).min(BLOCK_LEN);
            tail.wrapping_sub(head) < full / 4 * 3
        })
    }

    /// Takes another block, if there is one; says so.
    fn take_block(&mut self) -> anyhow::Result<bool> {
        if self.blocks.len() >= blocks_max() {
            return Ok(false);
        }
        let is_ours = |block: u32| self.blocks.iter().any(|ours| ours.number == block);
        let others = self.window.blocks.iter().copied().filter(|block| !is_ours(*block));
        for block in others {
            if let Some(ours) = Block::take(block)? {
                self.blocks.push(ours);
                for ring in self.rings() {
                    if self.sweeper.lent(ring) != 0 {
                        self.lend(ring, block);
                    }
                }
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Attaches the programs where lines want them, and takes them away elsewhere.
    fn attach(
        &mut self,
        lines: &Lines,
        interface: &str,
        links: &[ForwardingLink],
        tun: u32,
    ) -> anyhow::Result<()> {
        let nat = &mut self.tables.nat;
        nat.attach(interface, NatHook::Tun, tun)
            .with_context(|| format!("attaching NAT to {interface}"))?;
        let named = lines.nics();
        // What may come into the tunnel is judged wherever it comes from.
        let is_wanted = |link: &&ForwardingLink| {
            let is_any = !lines.allow.is_empty() && link.is_ethernet;
            link.name != interface && (is_any || named.contains(link.name.as_str()))
        };
        let wanted: Vec<&ForwardingLink> = links.iter().filter(is_wanted).collect();
        for index in std::mem::take(&mut self.nics) {
            if wanted.iter().any(|link| link.index == index) {
                self.nics.push(index);
            } else {
                nat.detach_index(index);
            }
        }
        let mut outcome = Ok(());
        for link in wanted {
            // Where it is attached by a filter, somebody may have removed that.
            match nat.attach(&link.name, NatHook::Nic, tun) {
                Ok(_) if self.nics.contains(&link.index) => {}
                Ok(attachment) => {
                    let is_link = attachment == Attachment::Tcx;
                    tracing::info!(
                        interface,
                        nic = link.name,
                        is_link,
                        "NAT looks at what comes in"
                    );
                    self.nics.push(link.index);
                }
                Err(error) => {
                    let error = anyhow::Error::new(error);
                    outcome = Err(error.context(format!("attaching NAT to {}", link.name)));
                }
            }
        }
        self.names = links.iter().map(|link| (link.index, link.name.clone())).collect();
        outcome
    }

    /// Does a step of sweeping; says how long until the next one.
    fn step(&mut self, interface: &str) -> Duration {
        let now_ns = clock::boot_now().boot_ns();
        self.tables.nat.say_alive(now_ns);
        let next = match self.sweeper.step(&mut self.tables, STEP, now_ns) {
            Ok(next) => next,
            Err(error) => {
                self.warn_once(Warned::SWEEP, || {
                    tracing::error!(interface, %error, "flows that are over stay");
                });
                return WAIT_LATER;
            }
        };
        self.tell_scarce(interface, now_ns);
        let (round_ns, flows) = self.sweeper.latest_round();
        if round_ns > self.round_max_ns {
            self.round_max_ns = round_ns;
            let ms = round_ns / 1_000_000;
            tracing::debug!(interface, flows, ms, "sweeping NAT's tables took longer than before");
        }
        let took_ns = clock::boot_now().boot_ns().saturating_sub(now_ns);
        match next {
            Next::AtOnce => WAIT_AT_ONCE.max(Duration::from_nanos(took_ns)),
            Next::Soon => WAIT_SOON,
            Next::Later => WAIT_LATER,
        }
    }

    fn tell_scarce(&mut self, interface: &str, now_ns: u64) {
        let Scarce { mut ports, ports_soon, flows, mappings } = self.sweeper.scarce();
        // Sooner another port than that of a flow that has just ended.
        if (ports || ports_soon || self.is_low()) && now_ns >= self.no_block_until_ns {
            let has_more = self.take_block().unwrap_or_else(|error| {
                tracing::debug!(error = format!("{error:#}"), "no more ports");
                false
            });
            ports &= !has_more;
            if !has_more {
                self.no_block_until_ns = now_ns + ASK_FOR_BLOCKS_EVERY_NS;
            }
        }
        if flows {
            self.warn_once(Warned::FLOWS, || {
                tracing::warn!(interface, "NAT's table of flows is nearly full: the oldest end");
            });
        }
        if mappings {
            self.warn_once(Warned::MAPPINGS, || {
                tracing::warn!(interface, "NAT's table of mappings is nearly full: the oldest end");
            });
        }
        if ports {
            self.warn_once(Warned::PORTS, || {
                tracing::warn!(
                    interface,
                    "NAT's ports are nearly all in use: the oldest end; `#! Nat = snat` with more addresses has more"
                );
            });
        }
    }

    fn warn_once(&mut self, what: u8, warn: impl FnOnce()) {
        if self.warned & what == 0 {
            warn();
        }
        self.warned |= what;
    }

    fn state(&self) -> State {
        let nat = &self.tables.nat;
        let name = |index: u32| {
            let found = self.names.iter().find(|(of, _)| *of == index);
            found.map_or_else(|| format!("#{index}"), |(_, name)| name.clone())
        };
        let places = self.rules.externals.iter().take(self.rules.external_count as usize);
        let externals = places.enumerate().filter(|(_, external)| external.nic != 0);
        let externals = externals.map(|(number, external)| ExternalState {
            address: address_of(external.address),
            nic: name(external.nic),
            ports: [Protocol::Tcp, Protocol::Udp, Protocol::Echo].map(|protocol| {
                let ring = ring(number as u32, protocol);
                let lent = self.sweeper.lent(ring);
                (lent.saturating_sub(nat.free_port_count(ring)), lent)
            }),
        });
        let attached = nat.attached().map(|(index, hook, attachment)| {
            let name = if hook == NatHook::Tun { "tunnel".to_owned() } else { name(index) };
            (name, attachment == Attachment::Tcx)
        });
        State {
            lines: String::new(),
            ids: nat.ids().ok(),
            flow_count_max: self.tables.flows.room(),
            externals: externals.collect(),
            attached: attached.collect(),
        }
    }
}

/// The address of a key, if it is one.
fn address_of(key: AddressKey) -> Option<IpAddr> {
    (key != AddressKey([0; 4])).then(|| crate::nat::address(key))
}

/// The facts that lines need.
fn facts(lines: &Lines, links: &[ForwardingLink], tun: u32, port_first: u32) -> Facts {
    let named = lines.nics();
    let links = links.iter().filter(|link| named.contains(link.name.as_str()));
    let nics = links.map(|link| Nic {
        name: link.name.clone(),
        index: link.index,
        // What leaves by one that NAT cannot use finds no address, and is dropped.
        addresses: if link.has_ethernet_header { link.addresses.clone() } else { Vec::new() },
    });
    Facts { tun, nics: nics.collect(), port_first }
}

/// The ports that this host has no use for. What cannot be read takes none away.
fn free_ports() -> FreePorts {
    let mut free = FreePorts::default();
    let read = |name: &str| fs::read_to_string(name).unwrap_or_default();
    free.take_ephemeral(&read("/proc/sys/net/ipv4/ip_local_port_range"));
    free.take_reserved(&read("/proc/sys/net/ipv4/ip_local_reserved_ports"));
    for name in ["tcp", "tcp6", "udp", "udp6"] {
        free.take_sockets(&read(&format!("/proc/thread-self/net/{name}")));
    }
    free
}

/// A block of ports that is ours: its file is there, and locked, as long as this is.
struct Block {
    number: u32,
    path: PathBuf,
    _file: File,
}

impl Block {
    /// Makes a block of ports ours, unless it is somebody else's.
    fn take(number: u32) -> anyhow::Result<Option<Self>> {
        use std::os::unix::fs::MetadataExt as _;
        let dir = Path::new(DIR).join("ports");
        make_dir(&dir)?;
        // Other namespaces have addresses of their own.
        let namespace = fs::metadata("/proc/thread-self/ns/net")?.ino();
        Self::take_at(number, dir.join(format!("{namespace}-{number}")))
    }

    fn take_at(number: u32, path: PathBuf) -> anyhow::Result<Option<Self>> {
        use std::os::unix::fs::OpenOptionsExt as _;
        loop {
            let mut options = File::options();
            let file = options.write(true).create(true).truncate(false).mode(0o600).open(&path);
            let file = file.with_context(|| format!("opening {}", path.display()))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => {
                    return Err(error).with_context(|| format!("locking {}", path.display()));
                }
            }
            // Who had it may have removed the file since it was opened: a lock on that keeps nobody away.
            if is_at(&file, &path).with_context(|| format!("looking at {}", path.display()))? {
                return Ok(Some(Self { number, path, _file: file }));
            }
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // While it is locked: who opens it now finds out, and makes another one. One of a process that was killed stays,
        // and is used again.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether the open file is the one at this path.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |of: fs::Metadata| (of.dev(), of.ino());
    match fs::metadata(path) {
        Ok(there) => Ok(identity(there) == identity(file.metadata()?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// A hook for tests: a device takes this many ports of each protocol, and no more, if
/// `TIDEGATE_TEST_NAT_PORTS` says so.
#[cfg(debug_assertions)]
fn ports_for_a_test() -> Option<usize> {
    std::env::var("TIDEGATE_TEST_NAT_PORTS").ok()?.parse().ok()
}

#[cfg(not(debug_assertions))]
const fn ports_for_a_test() -> Option<usize> {
    None
}

/// Most ports of a block that are used.
fn block_len() -> usize {
    ports_for_a_test().unwrap_or(usize::MAX)
}

/// Most blocks of a device.
fn blocks_max() -> usize {
    if ports_for_a_test().is_some() { 1 } else { usize::MAX }
}

/// A hook for tests: what is idle lives for so small a part of its time, and is looked for as much more often, if
/// `TIDEGATE_TEST_NAT_HASTE` says so.
#[cfg(debug_assertions)]
fn haste() -> u64 {
    static HASTE: std::sync::LazyLock<u64> = std::sync::LazyLock::new(|| {
        let text = std::env::var("TIDEGATE_TEST_NAT_HASTE").unwrap_or_default();
        text.parse().unwrap_or(1).max(1)
    });
    *HASTE
}

#[cfg(not(debug_assertions))]
const fn haste() -> u64 {
    1
}

/// As the programs count.
fn life() -> Life {
    Life {
        timeout_ns: |key, flow| timeout::of(key, flow).as_nanos() as u64 / haste(),
        is_closed: |key, flow| {
            key.protocol == PROTOCOL_TCP
                && matches!(tcp::State::of(flow.state), tcp::State::TimeWait | tcp::State::Closed)
        },
        mapping_ns: |protocol| timeout::of_mapping(protocol).as_nanos() as u64 / haste(),
        // As that of UDP (RFC 4787 §4.3).
        permit_ns: timeout::of_mapping(PROTOCOL_UDP).as_nanos() as u64 / haste(),
        round_every_ns: ROUND_EVERY_NS / haste(),
    }
}

/// The tables in the kernel, for the sweeper.
struct KernelTables {
    nat: Nat,
    flows: FlowPages,
    mappings: MappingPages,
}

impl KernelTables {
    fn new(nat: Nat) -> io::Result<Self> {
        let (flows, mappings) = (nat.flow_pages()?, nat.mapping_pages()?);
        Ok(Self { nat, flows, mappings })
    }
}

/// Why the tables cannot be read.
#[derive(Debug, thiserror::Error)]
enum TableError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error("walking through a table of NAT: {0}")]
    Walk(#[from] io::Error),
}

impl Tables for KernelTables {
    type Error = TableError;

    fn next_flows(
        &mut self,
        count: usize,
        into: &mut Vec<(FlowKey, Flow)>,
    ) -> Result<bool, TableError> {
        Ok(self.flows.next(count, into)?)
    }

    fn rewind_flows(&mut self) {
        self.flows.rewind();
    }

    fn remove_flow(&mut self, key: &FlowKey, was: &Flow) -> Result<(), TableError> {
        let is = self.nat.flow(key)?;
        let is_same = |is: &Flow| {
            (is.created_ns, is.last_seen_ns, is.generation)
                == (was.created_ns, was.last_seen_ns, was.generation)
        };
        if is.as_ref().is_some_and(is_same) {
            self.nat.remove_flow(key)?;
        }
        Ok(())
    }

    fn next_mappings(
        &mut self,
        count: usize,
        into: &mut Vec<(MappingKey, Mapping)>,
    ) -> Result<bool, TableError> {
        Ok(self.mappings.next(count, into)?)
    }

    fn rewind_mappings(&mut self) {
        self.mappings.rewind();
    }

    fn remove_mapping(&mut self, key: &MappingKey, was: &Mapping) -> Result<(), TableError> {
        if self.nat.mapping(key)?.as_ref() == Some(was) {
            self.nat.remove_mapping(key)?;
        }
        Ok(())
    }

    fn slot(&mut self, index: u32) -> Result<Slot, TableError> {
        Ok(self.nat.slot(index)?)
    }

    fn end_slot(&mut self, index: u32) -> Result<(), TableError> {
        Ok(self.nat.end_slot(index)?)
    }

    fn ring(&self, ring: u32) -> (u32, u32) {
        let (head, tail) = self.nat.ring_ends(ring);
        (head as u32, tail as u32)
    }

    fn port_at(&self, ring: u32, position: u32) -> u32 {
        self.nat.port_at(ring, position.into())
    }

    fn put(&mut self, ring: u32, port: u32) {
        // There is room for every port of a ring.
        let has_room = self.nat.free_port(ring, port);
        debug_assert!(has_room, "a port is in a ring once");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_one_ones_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1-7");
        let take = || Block::take_at(7, path.clone()).unwrap();
        let block = take().unwrap();
        assert!(take().is_none());
        // Somebody opens it, and is slow.
        let late = File::options().write(true).open(&path).unwrap();
        drop(block);
        assert!(!path.exists());
        flock(&late, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert!(!is_at(&late, &path).unwrap());
        let next = take().unwrap();
        assert!(!is_at(&late, &path).unwrap() && is_at(&next._file, &path).unwrap());
        // What a process that was killed has left.
        std::mem::forget(next);
        File::create(dir.path().join("1-8")).unwrap();
        assert!(Block::take_at(8, dir.path().join("1-8")).unwrap().is_some());
    }

    #[test]
    fn many_threads_never_have_a_block_at_the_same_time() {
        use std::sync::atomic::AtomicU32;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1-7");
        let (holders, turns) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while turns.load(Ordering::Relaxed) < 400 {
                        let Some(block) = Block::take_at(7, path.clone()).unwrap() else {
                            continue;
                        };
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        turns.fetch_add(1, Ordering::Relaxed);
                        holders.fetch_sub(1, Ordering::SeqCst);
                        drop(block);
                    }
                });
            }
        });
        assert!(!path.exists());
    }
}
