//! `up`: from a config file to an interface that works, or to none at all.
//!
//! The [`Plan`] gives the steps; each is settled, noted in the [`Ledger`], and carried out. If one
//! fails, or a signal comes, everything that was noted is undone by [`TakeDown`].

use std::{collections::HashSet, io, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use ipnet::IpNet;
use rustix::io::Errno;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
};
use zeroize::Zeroizing;

use super::{
    Code, Failure,
    applied::Applied,
    args,
    down::{TakeDown, runtime, undo_left_overs},
    files::unreadable,
    foreground, forwarding,
    launch::Background,
    ledger::{Header, Ledger, Process},
    name::{ConfigFile, InterfaceName},
    nat,
    plan::{Configuration, POLICY_TABLE, Plan, RoutesTo},
    points::Points,
    print, resolve,
    shortcut::{self, Obstacle, Way},
    show,
    socket::Socket,
    steps::{self, Context, Step},
    text::plural,
};
use crate::{
    config::{self, Config, ConfigErrors, Endpoint},
    daemon::Mode,
    device::SetRequest,
    host::{Host, MAIN_TABLE, missing_routes},
    keeper::notify,
    sys::clock,
    uapi::{self, EndpointName},
};

pub fn up(arguments: args::Up) -> Result<Code, Failure> {
    let file = ConfigFile::which(&arguments.what, Path::exists)
        .map_err(|error| Failure::new(Code::Usage, error))?;
    let interface = &file.interface;
    let text = read(&file.path)?;
    let config = config::parse(&file.path.display().to_string(), &text).map_err(Failure::config)?;
    if let Some(errors) = ConfigErrors::new(config.unsupported()) {
        return Err(Failure::config(errors));
    }
    let plan = Plan::new(interface, &config, &arguments.data_path)?;
    let mut plan = plan.with_routers(&config, &forwarding::with_routers());
    plan.daemon.by_socket = sent_by_sockets(&plan, arguments.bypass_firewall);
    let runtime = runtime()?;
    let outcome = bring_up(&arguments, &file, config, &plan, &runtime);
    // A name that is still being looked up is not waited for.
    runtime.shutdown_background();
    outcome
}

fn bring_up(
    arguments: &args::Up,
    file: &ConfigFile,
    config: Config,
    plan: &Plan,
    runtime: &Runtime,
) -> Result<Code, Failure> {
    let started = clock::boot_now();
    let interface = &file.interface;
    let host = runtime.block_on(async { Host::new() })?;
    if arguments.dry_run {
        let lines = runtime.block_on(dry_run(interface, &host, &config, plan))?;
        let steps = lines.iter().map(|line| format!("[#] {line}\n"));
        print(&std::iter::once(instructions(&config)).chain(steps).collect::<String>())?;
        check_shortcut(interface, plan, arguments.bypass_firewall)?;
        forwarding::check(interface, &config, arguments.bypass_firewall)?;
        return Ok(Code::Ok);
    }

    if runtime.block_on(host.link(interface.as_str()))?.is_some() {
        return Err(exists(interface).within(interface));
    }
    check_shortcut(interface, plan, arguments.bypass_firewall)?;
    forwarding::check(interface, &config, arguments.bypass_firewall)?;
    runtime.block_on(undo_left_overs(&host, interface));
    runtime.block_on(make_room(interface, &host)).map_err(|failure| failure.within(interface))?;

    // From here on they do not end this process any more, but what it does.
    let mut interruption = runtime.block_on(async { Interruption::new() })?;
    let header = Header::new(interface, &file.path, plan.down_hooks.clone())
        .context("noting what is done")?;
    let ledger = Ledger::create(header).map_err(|failure| failure.within(interface))?;
    let mut work =
        Work { interface, host: &host, plan, ledger, background: None, points: Points::default() };
    let done = runtime.block_on(async {
        tokio::select! {
            done = work.run(Arc::new(config)) => done,
            () = interruption.wait() => Err(Failure::new(Code::Runtime, "interrupted")),
        }
    });
    let Work { ledger, background, .. } = work;
    let mtu = match done {
        Ok(mtu) => mtu,
        Err(failure) => {
            let failure = failure.within(interface);
            let take_down = TakeDown::after_failure(interface, &host, ledger, background);
            return Err(match runtime.block_on(take_down.run()) {
                Ok(()) => failure.and("everything was undone"),
                Err(undoing) => {
                    undoing.print();
                    failure.and("not everything could be undone")
                }
            });
        }
    };
    let daemon = ledger.record().keeper;
    // `down` may come.
    drop(ledger);
    let code = summarize(interface, plan, mtu, clock::boot_now().since(started))?;
    if arguments.foreground {
        let ready = || notify::ready(None);
        runtime.block_on(foreground::stay(
            interface,
            &host,
            background,
            daemon,
            interruption,
            ready,
        ))?;
    } else {
        notify::ready(background.as_ref().map(Background::pid));
    }
    Ok(code)
}

/// Reads a config file; warns if everybody else can, too.
pub fn read(path: &Path) -> Result<Zeroizing<String>, Failure> {
    let doing = || format!("reading {}", path.display());
    let text = match std::fs::read_to_string(path) {
        Ok(text) => Zeroizing::new(text),
        Err(error) => return Err(unreadable(path, &error)),
    };
    if is_world_accessible(path).with_context(doing)? {
        let path = path.display();
        eprintln!(
            "tidegate: warning: everybody may read {path} and the keys in it; `chmod 600 {path}`"
        );
    }
    Ok(text)
}

/// Whether others have any right to the file and to its folder, as wg-quick asks.
pub fn is_world_accessible(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::PermissionsExt;
    const OTHERS: u32 = 0o007;
    let path = path.canonicalize()?;
    let file = path.metadata()?.permissions().mode();
    let folder = match path.parent() {
        Some(folder) => folder.metadata()?.permissions().mode(),
        None => OTHERS,
    };
    Ok(file & folder & OTHERS != 0)
}

/// Refuses XDP on a NIC where it would go round a rule of the firewall.
fn check_shortcut(
    interface: &InterfaceName,
    plan: &Plan,
    bypasses_firewall: bool,
) -> Result<(), Failure> {
    match shortcut_refusal(plan, bypasses_firewall) {
        None => Ok(()),
        Some(line) => Err(Failure::new(Code::Runtime, line).within(interface)),
    }
}

/// Why XDP is refused on a NIC, if it is.
pub fn shortcut_refusal(plan: &Plan, bypasses_firewall: bool) -> Option<String> {
    if bypasses_firewall || plan.bypasses_firewall || plan.daemon.mode == Mode::Udp {
        return None;
    }
    let mut obstacles = plan.daemon.xdp.iter().filter_map(|nic| {
        let obstacle = shortcut::obstacle(Way::In, plan.listen_port, nic)?;
        Some((nic, obstacle))
    });
    let (nic, obstacle) = obstacles.next()?;
    let port = match plan.listen_port {
        Some(port) => format!("port {port}"),
        None => "the port (the file has no ListenPort)".to_owned(),
    };
    Some(format!(
        "XDP on {nic} would go round a rule of the firewall that may concern {port}: {}: \
         `{}`; accept UDP to the port before that rule, or use sockets (`--mode udp`), or \
         say that the rule need not hold for it (`--bypass-firewall`, or \
         `#! Xdp = {nic} bypass-firewall`)",
        obstacle.program, obstacle.rule
    ))
}

/// The NICs by which AF_XDP would send past a rule of the firewall, so that sockets are to do it, each with the
/// reason.
fn sent_by_sockets(plan: &Plan, bypasses_firewall: bool) -> Vec<(String, String)> {
    // In other modes sockets send in any case.
    let may_send = matches!(plan.daemon.mode, Mode::Auto | Mode::ZeroCopy);
    if bypasses_firewall || plan.bypasses_firewall || !may_send {
        return Vec::new();
    }
    let obstacle = |nic: &String| {
        let Obstacle { program, rule } = shortcut::obstacle(Way::Out, plan.listen_port, nic)?;
        let why = format!(
            "AF_XDP would go round a rule of the firewall that may concern what leaves: {program}: `{rule}`"
        );
        Some((nic.clone(), why))
    };
    plan.daemon.xdp.iter().filter_map(obstacle).collect()
}

fn exists(interface: &InterfaceName) -> Failure {
    let line = format_args!(
        "the interface exists already; `tidegate reload {interface}` makes it what the file says, \
         `tidegate down {interface}` takes it down"
    );
    Failure::new(Code::Existence, line)
}

/// What is said of a daemon that was there a moment ago.
pub const DAEMON_IS_GONE: &str = "its daemon has ended; what it printed or the journal says why";

/// How long a daemon whose interface is gone may take to end, and how often is looked.
const ENDING_MAX: Duration = Duration::from_secs(5);
const ENDING_POLL: Duration = Duration::from_millis(10);

/// Undoes what an `up` that was killed has left of this interface.
async fn make_room(interface: &InterfaceName, host: &Host) -> Result<(), Failure> {
    let Some(ledger) = Ledger::open(interface)? else { return Ok(()) };
    let record = ledger.record();
    let started = clock::boot_now();
    // One whose interface is gone is about to end.
    while !record.is_left_over() && clock::boot_now().since(started) < ENDING_MAX {
        if host.link(interface.as_str()).await?.is_some() {
            // Another `up` was faster.
            return Err(exists(interface));
        }
        tokio::time::sleep(ENDING_POLL).await;
    }
    if !record.is_left_over() {
        let line = format_args!(
            "its daemon still runs, but the interface is not here; `tidegate down {interface}` ends \
             it, or take another name"
        );
        return Err(Failure::new(Code::Existence, line));
    }
    eprintln!("tidegate: {interface}: undoing what a process that was killed has left");
    TakeDown::of_left_over(interface, host, ledger).run().await
}

/// The signals that interrupt `up`.
pub struct Interruption([Signal; 3]);

impl Interruption {
    /// From here on they do not end this process any more.
    ///
    /// # Errors
    /// If they cannot be waited for.
    pub fn new() -> Result<Interruption, Failure> {
        let of = |kind| signal(kind).context("waiting for signals");
        Ok(Interruption([
            of(SignalKind::interrupt())?,
            of(SignalKind::terminate())?,
            of(SignalKind::hangup())?,
        ]))
    }

    /// Waits for one of them.
    pub async fn wait(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// The way through the steps.
struct Work<'a> {
    interface: &'a InterfaceName,
    host: &'a Host,
    plan: &'a Plan,
    ledger: Ledger,
    background: Option<Background>,
    points: Points,
}

impl Work<'_> {
    /// Does everything; gives the MTU.
    async fn run(&mut self, config: Arc<Config>) -> Result<Option<u32>, Failure> {
        let table = match self.plan.needs_policy_table() {
            true => Some(self.take_table().await?),
            false => None,
        };
        let mut configuration = None;
        let mut routes: Option<HashSet<IpNet>> = None;
        let mut mtu = None;
        for step in self.plan.steps(table) {
            if step == Step::Daemon {
                // Not before, for a `PreUp` may make the way to the name service.
                configuration = Some(resolved(&config).await?);
            }
            if self.plan.routes_to == RoutesTo::Auto
                && let Step::Route { prefix, table: MAIN_TABLE } = &step
            {
                if routes.is_none() {
                    routes = Some(self.missing_routes().await?);
                }
                if !routes.as_ref().is_some_and(|routes| routes.contains(prefix)) {
                    continue;
                }
            }
            // Priorities are not given to two interfaces at once.
            let choosing = matches!(step, Step::Rule { .. })
                .then(Ledger::choose)
                .transpose()
                .context("waiting for another `tidegate`")?;
            let endpoints =
                configuration.as_ref().map_or(&[][..], |configuration| &configuration.endpoints);
            let context = Context { interface: self.interface, host: self.host, endpoints };
            let Some(step) = steps::settle(step, &context).await? else { continue };
            if let Step::Mtu(settled) = step {
                mtu = settled;
            }
            self.points.pass()?;
            let id = self.ledger.note(step.clone()).context("noting a step")?;
            self.points.pass()?;
            match &step {
                Step::Daemon => self.start_daemon()?,
                Step::Configure => {
                    let configuration = configuration.as_ref().expect("it comes before");
                    // Before there is anybody whose packets could pass.
                    nat::follow(self.interface, &nat::lines_of(&config))?;
                    configure(self.interface, &configuration.request)?;
                    tell_names(self.interface, &config);
                    let path = self.ledger.record().header.config.clone();
                    let applied = Applied::new(&path, &config, self.plan, &configuration.request);
                    let noted = applied.and_then(|applied| self.ledger.applies(applied));
                    noted.context("noting the configuration")?;
                }
                step => steps::carry_out(step, &context).await?,
            }
            self.points.pass()?;
            self.ledger.done(id).context("noting a step")?;
            drop(choosing);
            // Steps that only wait for the kernel would not hear of a signal.
            tokio::task::yield_now().await;
        }
        self.ledger.is_up().context("noting the end")?;
        self.points.pass()?;
        Ok(mtu)
    }

    /// A table without routes that no other interface is about to use.
    async fn take_table(&mut self) -> Result<u32, Failure> {
        let _choosing = Ledger::choose().context("waiting for another `tidegate`")?;
        let table = free_table(self.interface, self.host).await?;
        self.ledger.takes_table(table).context("noting a routing table")?;
        Ok(table)
    }

    fn start_daemon(&mut self) -> Result<(), Failure> {
        self.background = Some(Background::start(&self.plan.daemon, None)?);
        let socket = Socket::find(self.interface)?;
        let pid = socket.map(|socket| socket.daemon()).transpose()?.flatten();
        let keeper = pid.and_then(Process::of);
        let keeper = keeper.ok_or_else(|| Failure::new(Code::Runtime, DAEMON_IS_GONE))?;
        Ok(self.ledger.kept_by(keeper).context("noting the daemon")?)
    }

    async fn missing_routes(&self) -> Result<HashSet<IpNet>, Failure> {
        let index = self.host.link_index(self.interface.as_str()).await?;
        let present = self.host.routes(index).await?;
        Ok(missing_routes(self.plan.allowed_ips.iter().copied(), present).into_iter().collect())
    }
}

/// The first table from wg-quick's on that nobody uses.
pub async fn free_table(interface: &InterfaceName, host: &Host) -> Result<u32, Failure> {
    let others: Vec<u32> =
        Ledger::others(interface).iter().filter_map(|record| record.table).collect();
    let mut table = POLICY_TABLE;
    while others.contains(&table) || host.has_routes(table).await? {
        table += 1;
    }
    Ok(table)
}

/// Resolves names, which may take long, in a thread of its own.
async fn resolved(config: &Arc<Config>) -> Result<Configuration, Failure> {
    let config = Arc::clone(config);
    let resolving = tokio::task::spawn_blocking(move || {
        let retries = resolve::retries();
        Configuration::new(&config, |host, port| resolve::resolve(host, port, retries))
    });
    resolving.await.context("resolving names")?
}

/// Configures the daemon.
///
/// # Errors
/// If it refuses; it has changed nothing then.
pub fn configure(interface: &InterfaceName, request: &SetRequest) -> Result<(), Failure> {
    let socket =
        Socket::find(interface)?.ok_or_else(|| Failure::new(Code::Runtime, DAEMON_IS_GONE))?;
    match socket.request(&uapi::format_set(request))?.error() {
        None => Ok(()),
        Some(error) if Errno::from_io_error(&error) == Some(Errno::ADDRINUSE) => {
            let port = request.listen_port.unwrap_or(0);
            let line = format_args!(
                "UDP port {port} is in use by another program; `ss -ulnp sport = {port}` says which; \
                 end it, or choose another ListenPort"
            );
            Err(Failure::new(Code::Runtime, line))
        }
        Some(error) => {
            Err(anyhow::Error::new(error).context("the daemon refused the configuration").into())
        }
    }
}

/// Tells the daemon which endpoints the file gives as names, so that it looks for peers that are not there
/// any more.
pub fn tell_names(interface: &InterfaceName, config: &Config) {
    let names = config.peers.iter().filter_map(|peer| match peer.endpoint.as_deref()? {
        Endpoint::Address(_) => None,
        Endpoint::Host { host, port } => {
            let host = host.clone();
            Some(EndpointName { public_key: *peer.public_key, host, port: *port })
        }
    });
    tell_these_names(interface, &names.collect::<Vec<_>>());
}

/// As [`tell_names`], of names that are known. A daemon that does not know of such things is told nothing
/// but that there are none.
pub fn tell_these_names(interface: &InterfaceName, names: &[EndpointName]) {
    let tell = || -> Result<(), Failure> {
        let Some(socket) = Socket::find(interface)? else { return Ok(()) };
        let answer = socket.request(&uapi::format_names(names))?;
        answer.error().map_or(Ok(()), |error| Err(anyhow::Error::new(error).into()))
    };
    if let Err(failure) = tell()
        && !names.is_empty()
    {
        let what = "warning: the names of endpoints are not looked up again";
        failure.within(what).within(interface).print();
    }
}

/// What would be done, a line for each step, as far as it can be told without doing it.
pub async fn dry_run(
    interface: &InterfaceName,
    host: &Host,
    config: &Config,
    plan: &Plan,
) -> Result<Vec<String>, Failure> {
    let table = match plan.needs_policy_table() {
        true => Some(free_table(interface, host).await?),
        false => None,
    };
    // Names are not looked up: what is shown is that the ways to the others have this MTU.
    let endpoints: Vec<_> = config
        .peers
        .iter()
        .filter_map(|peer| match peer.endpoint.as_deref() {
            Some(Endpoint::Address(address)) => Some(*address),
            _ => None,
        })
        .collect();
    let context = Context { interface, host, endpoints: &endpoints };
    let mut lines = Vec::new();
    for step in planned_steps(plan, table) {
        let step = match step {
            step @ (Step::Mtu(_) | Step::Dns { .. }) => {
                match steps::settle(step, &context).await? {
                    Some(step) => step,
                    None => continue,
                }
            }
            step => step,
        };
        lines.extend(step.shown(interface));
    }
    Ok(lines)
}

/// The steps, without routes that the kernel makes by itself: those to the networks of the addresses.
pub fn planned_steps(plan: &Plan, policy_table: Option<u32>) -> Vec<Step> {
    let connected = plan.addresses.iter().copied();
    let routes: HashSet<IpNet> =
        missing_routes(plan.allowed_ips.iter().copied(), connected).into_iter().collect();
    let is_left_out = |step: &Step| {
        plan.routes_to == RoutesTo::Auto
            && matches!(step, Step::Route { prefix, table: MAIN_TABLE } if !routes.contains(prefix))
    };
    let steps = plan.steps(policy_table).into_iter();
    steps.filter(|step| !is_left_out(step)).collect()
}

/// The file's `#!` lines as they were understood, a line each.
fn instructions(config: &Config) -> String {
    let mut text = String::new();
    for line in config.interface.instructions() {
        text += &format!("{}\n", line.value);
    }
    for peer in &config.peers {
        for line in peer.instructions() {
            text += &format!("{}, of peer {}\n", line.value, peer.public_key.value);
        }
    }
    text
}

/// Says what came of it.
fn summarize(
    interface: &InterfaceName,
    plan: &Plan,
    mtu: Option<u32>,
    took: Duration,
) -> Result<Code, Failure> {
    let socket = Socket::find(interface)?
        .ok_or_else(|| Failure::new(Code::Runtime, DAEMON_IS_GONE).within(interface))?;
    let state = show::ask(interface, &socket, false)?;
    let mut facts = vec![plural(plan.peer_count as u64, "peer")];
    facts.extend(plan.addresses.iter().map(IpNet::to_string));
    facts.push(format!("port {}", state.listen_port));
    facts.extend(mtu.map(|mtu| format!("MTU {mtu}")));
    let margin = " ".repeat(interface.as_str().len());
    let mut text = format!("{interface}  up in {} ms   {}\n", took.as_millis(), facts.join(" · "));
    let mut code = Code::Ok;
    if let Some(path) = &state.data_path {
        text += &format!("{margin}  {path}\n");
        if plan.daemon.mode == Mode::Native && path.mode != "native" {
            // Zero-copy that cannot be is an error.
            text += &format!("{margin}  degraded: --mode native was asked for\n");
            code = Code::Degraded;
        }
    }
    print(&text)?;
    Ok(code)
}
