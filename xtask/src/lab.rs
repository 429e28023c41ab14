//! Hosts in network namespaces, for demonstrations and for tests.
//!
//! A [`Site`] is built from its [`Layout`]; the one that most tests want is the [`Lab`]:
//!
//! ```text
//!  client                      gateway                       LAN host
//!  outer 198.51.100.2 ──────── outer 198.51.100.1
//!        2001:db8:51::2              2001:db8:51::1
//!                              lan   192.168.20.1 ────────── lan 192.168.20.2
//!                                    fd20::1                     fd20::2
//! ```
//!
//! The gateway forwards; the LAN host knows the way back to the tunnel's addresses
//! (10.9.0.0/24 and fd09::/64). Namespaces and TUN devices carry the pid of the process that made
//! them. Whatever happens short of SIGKILL, a [`Site`] that goes out of scope ends the processes in
//! its namespaces and removes them: errors and panics unwind through it, and a signal only sets a
//! flag that every wait in here looks at.
//!
//! Hosts share the files of the machine. Where a layout says that they are [private](Layout::private),
//! each has a `/run` and an `/etc/wireguard` of its own, so that interfaces may be called what they
//! are called, and any number of sites may have a `wg0`.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::Write as _,
    ops::{Deref, DerefMut},
    os::unix::{
        fs::{DirBuilderExt, OpenOptionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// The gateway's outer IPv4 address.
pub const GATEWAY_V4: &str = "198.51.100.1";
/// The gateway's outer IPv6 address.
pub const GATEWAY_V6: &str = "2001:db8:51::1";
/// The client's outer IPv4 address.
pub const CLIENT_V4: &str = "198.51.100.2";
/// The client's outer IPv6 address.
pub const CLIENT_V6: &str = "2001:db8:51::2";
/// The LAN host's IPv4 address.
pub const HOST_V4: &str = "192.168.20.2";
/// The LAN host's IPv6 address.
pub const HOST_V6: &str = "fd20::2";
/// The link between client and gateway, by the same name at both ends.
pub const OUTER: &str = "outer";
/// The link between gateway and LAN host, by the same name at both ends.
pub const LAN: &str = "lan";

/// How long a process may take to end after SIGTERM, before it gets SIGKILL.
const GRACE: Duration = Duration::from_secs(3);
const POLL_EVERY: Duration = Duration::from_millis(20);

/// What a bash that has a mount namespace of its own, and a folder `$F`, does to have no `nft`, so that
/// programs use iptables.
pub const HIDE_NFT: &str = r#"
    while nft=$(type -P nft); do
        hides=$(mktemp -d -p "$F") folder=$(dirname "$nft")
        mknod "$hides/nft" c 0 0
        mount -t overlay tidegate-test -o "lowerdir=$hides:$folder" "$folder"
        hash -r
    done"#;

static SIGNALLED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static LABS_MADE: AtomicU32 = AtomicU32::new(0);

/// Turns SIGINT, SIGTERM and SIGHUP into a flag, so that what has to be cleaned up is.
///
/// # Errors
/// If a handler cannot be set.
pub fn catch_signals() -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&SIGNALLED))?;
    }
    Ok(())
}

/// As a signal would: lets every wait end with an error.
pub fn interrupt() {
    SIGNALLED.store(true, Ordering::Relaxed);
}

/// An error once a signal has come.
///
/// # Errors
/// After SIGINT, SIGTERM, SIGHUP or [`interrupt`].
pub fn check_interrupted() -> Result<()> {
    ensure!(!SIGNALLED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

/// Asks `probe` every few milliseconds until it has an answer.
///
/// # Errors
/// If `probe` has one, a signal comes, or `limit` passes: then the text says what was waited for.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(answer) = probe()? {
            return Ok(answer);
        }
        check_interrupted()?;
        ensure!(Instant::now() < end, "{what}: not within {limit:?}");
        thread::sleep(POLL_EVERY);
    }
}

/// Why namespaces cannot be made here, if they cannot: the reason a test gives for skipping.
pub fn unavailable() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root to make network namespaces".to_owned());
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("needs /dev/net/tun".to_owned());
    }
    for tool in ["ip", "ping"] {
        if find_program(tool).is_none() {
            return Some(format!("needs the program `{tool}`"));
        }
    }
    None
}

/// Where a program is, by PATH and the folders of the administrator's programs.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// What a [`Site`] is built from.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The hosts, by their roles.
    pub hosts: &'static [&'static str],
    /// Those that forward packets.
    pub routers: &'static [&'static str],
    /// What they are linked by: two ends are a cable, more are plugged into the switch.
    pub links: &'static [&'static [End]],
    /// Routes: a host, and what `ip route add` is told there.
    pub routes: &'static [(&'static str, &'static str)],
    /// Whether each host has a `/run` and an `/etc/wireguard` of its own, both empty. The machine must
    /// have both.
    pub private: bool,
}

/// A host's end of a link.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// The host's role.
    pub host: &'static str,
    /// What its interface is called.
    pub nic: &'static str,
    /// The interface's addresses, with their prefix lengths.
    pub addresses: &'static [&'static str],
}

/// Hosts, and a folder for their files.
pub struct Site {
    spaces: Vec<(&'static str, Space)>,
    /// Processes that do nothing but keep the private file systems of a space.
    holders: Vec<Process>,
    directory: PathBuf,
    tag: String,
    keep: bool,
    _one_at_a_time: Option<MutexGuard<'static, ()>>,
}

impl Site {
    /// Makes namespaces, links, addresses and routes. In one process one such site stands at a time; a
    /// second caller waits.
    ///
    /// # Errors
    /// Without the privilege to make them, or if `ip` fails; what was made by then is removed.
    pub fn new(layout: &Layout) -> Result<Site> {
        let one_at_a_time = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        Site::make(layout, Some(one_at_a_time))
    }

    fn make(layout: &Layout, one_at_a_time: Option<MutexGuard<'static, ()>>) -> Result<Site> {
        catch_signals()?;
        let number = LABS_MADE.fetch_add(1, Ordering::Relaxed);
        let tag = format!("tg{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(format!("{tag}.lab"));
        DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .with_context(|| format!("making {}", directory.display()))?;
        let mut site = Site {
            spaces: Vec::new(),
            holders: Vec::new(),
            directory,
            tag,
            keep: false,
            _one_at_a_time: one_at_a_time,
        };
        site.build(layout).context("making the namespaces")?;
        Ok(site)
    }

    fn build(&mut self, layout: &Layout) -> Result<()> {
        for &host in layout.hosts {
            self.add_space(host)?;
            if layout.private {
                self.hold(host)?;
            }
        }
        for ends in layout.links {
            self.link(ends)?;
            for End { host, nic, addresses } in *ends {
                for address in *addresses {
                    // Without `nodad` the address is unusable for the first second.
                    let nodad = if address.contains(':') { "nodad" } else { "" };
                    self.space(host).ip(&format!("addr add {address} dev {nic} {nodad}"))?;
                }
                self.space(host).ip(&format!("link set {nic} up"))?;
            }
        }
        for &router in layout.routers {
            self.space(router).set_sysctl("net/ipv4/ip_forward", "1")?;
            self.space(router).set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
        }
        for (host, route) in layout.routes {
            self.space(host).ip(&format!("route add {route}"))?;
        }
        Ok(())
    }

    fn add_space(&mut self, role: &'static str) -> Result<()> {
        let name = format!("{}-{role}", self.tag);
        let space = Space { name, directory: self.directory.clone(), holder: None };
        ip(&["netns", "add", &space.name])?;
        self.spaces.push((role, space));
        self.space(role).ip("link set lo up")
    }

    /// Gives a host file systems of its own, which live as long as a process in them.
    fn hold(&mut self, host: &str) -> Result<()> {
        // `ip netns exec` has detached what it mounts from the machine's own mounts. Without the list
        // of modules wg-quick(8) does not see that the kernel's own WireGuard is loaded.
        const SCRIPT: &str = "set -e
            mount -t tmpfs -o mode=755 tmpfs /run
            mount -t tmpfs -o mode=700 tmpfs /etc/wireguard
            [ ! -e /sys/module/wireguard ] || mount -t tmpfs tmpfs /sys/module
            echo '{\"event\":\"ready\"}'
            exec sleep infinity";
        let space = self.space(host);
        let mut holder = space.spawn("holder", space.command("sh").args(["-c", SCRIPT]))?;
        holder.event("ready", Duration::from_secs(10))?;
        let pid = holder.pid();
        self.holders.push(holder);
        let (_, space) = self.spaces.iter_mut().find(|(role, _)| *role == host).expect("added");
        space.holder = Some(pid);
        Ok(())
    }

    /// A link whose ends are made inside their namespaces, so that the machine's own are not touched.
    fn link(&mut self, ends: &[End]) -> Result<()> {
        const SWITCH: &str = "switch";
        const BRIDGE: &str = "bridge";
        if let [one, other] = ends {
            return self.cable(one.host, one.nic, other.host, other.nic);
        }
        self.add_space(SWITCH)?;
        self.space(SWITCH).ip(&format!("link add {BRIDGE} type bridge"))?;
        self.space(SWITCH).ip(&format!("link set {BRIDGE} up"))?;
        for (number, end) in ends.iter().enumerate() {
            let port = format!("port{number}");
            self.cable(end.host, end.nic, SWITCH, &port)?;
            self.space(SWITCH).ip(&format!("link set {port} master {BRIDGE} up"))?;
        }
        Ok(())
    }

    fn cable(&self, one: &str, nic: &str, other: &str, other_nic: &str) -> Result<()> {
        let (one, other) = (self.space(one), &self.space(other).name);
        one.ip(&format!("link add {nic} type veth peer name {other_nic} netns {other}"))
    }

    /// A host.
    ///
    /// # Panics
    /// If the layout has no host of that role.
    pub fn space(&self, role: &str) -> &Space {
        let found = self.spaces.iter().find(|(known, _)| *known == role);
        &found.unwrap_or_else(|| panic!("no host is called {role}")).1
    }

    /// All namespaces.
    pub fn spaces(&self) -> Vec<&Space> {
        self.spaces.iter().map(|(_, space)| space).collect()
    }

    /// Leaves everything standing when the site goes out of scope.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// A name for a TUN device: sockets of wg(8) lie in one folder for all namespaces, so it
    /// carries the pid.
    pub fn interface(&self, suffix: char) -> String {
        let name = format!("{}{suffix}", self.tag);
        assert!(name.len() < 16, "`{name}` is too long for an interface");
        name
    }

    /// A file in the site's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Writes a file that only its owner reads, as one with a private key should be.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.path(name);
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.keep {
            for space in self.spaces() {
                let enter = match space.holder {
                    Some(pid) => format!("nsenter --target {pid} --mount --net"),
                    None => format!("ip netns exec {}", space.name),
                };
                eprintln!("kept: namespace {} ({enter} …)", space.name);
            }
            eprintln!("kept: {}", self.directory.display());
            self.holders.drain(..).for_each(std::mem::forget);
            return;
        }
        for space in self.spaces() {
            space.remove();
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The site that most tests want.
const LAB: Layout = Layout {
    hosts: &["client", "gateway", "host"],
    routers: &["gateway"],
    links: &[
        &[
            End {
                host: "gateway",
                nic: OUTER,
                addresses: &["198.51.100.1/24", "2001:db8:51::1/64"],
            },
            End {
                host: "client",
                nic: OUTER,
                addresses: &["198.51.100.2/24", "2001:db8:51::2/64"],
            },
        ],
        &[
            End { host: "gateway", nic: LAN, addresses: &["192.168.20.1/24", "fd20::1/64"] },
            End { host: "host", nic: LAN, addresses: &["192.168.20.2/24", "fd20::2/64"] },
        ],
    ],
    routes: &[("host", "10.9.0.0/24 via 192.168.20.1"), ("host", "fd09::/64 via fd20::1")],
    private: false,
};

/// The three namespaces drawn above, and a folder for their files.
pub struct Lab {
    /// Where the client is.
    pub client: Space,
    /// Where the gateway is.
    pub gateway: Space,
    /// The host in the gateway's LAN.
    pub host: Space,
    site: Site,
}

impl Lab {
    /// As [`Site::new`].
    ///
    /// # Errors
    /// As [`Site::new`].
    pub fn new() -> Result<Lab> {
        Ok(Lab::at(Site::new(&LAB)?))
    }

    /// As [`Lab::new`], but waits for nobody and keeps nobody waiting: for what takes minutes and
    /// little work.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn beside_others() -> Result<Lab> {
        Ok(Lab::at(Site::make(&LAB, None)?))
    }

    fn at(site: Site) -> Lab {
        let [client, gateway, host] =
            ["client", "gateway", "host"].map(|role| site.space(role).clone());
        Lab { client, gateway, host, site }
    }
}

impl Deref for Lab {
    type Target = Site;

    fn deref(&self) -> &Site {
        &self.site
    }
}

impl DerefMut for Lab {
    fn deref_mut(&mut self) -> &mut Site {
        &mut self.site
    }
}

/// One namespace; its [`Site`] removes it.
#[derive(Clone)]
pub struct Space {
    name: String,
    directory: PathBuf,
    /// The process that keeps its private file systems.
    holder: Option<u32>,
}

impl Space {
    /// The namespace's name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `ip` inside the namespace; `arguments` are separated by blanks.
    ///
    /// # Errors
    /// If `ip` says no.
    pub fn ip(&self, arguments: &str) -> Result<()> {
        let mut all = vec!["-n", &self.name];
        all.extend(arguments.split_whitespace());
        ip(&all).map(drop)
    }

    /// `ip -json` inside the namespace.
    ///
    /// # Errors
    /// If `ip` says no or prints no JSON.
    pub fn ip_json(&self, arguments: &str) -> Result<Value> {
        let mut all = vec!["-n", &self.name, "-json"];
        all.extend(arguments.split_whitespace());
        let text = ip(&all)?;
        serde_json::from_str(&text).with_context(|| format!("what `ip {arguments}` prints"))
    }

    /// Sets a value below `/proc/sys` as the namespace sees it.
    ///
    /// # Errors
    /// If the kernel does not take it.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let script = format!("echo {value} > /proc/sys/{key}");
        self.run("sh", &["-c", &script]).map(drop)
    }

    /// A command that will run inside the namespace, in its own process group: a Ctrl-C reaches
    /// us alone, and we end it in order.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        // Both become the program, so that their pid is the program's.
        let mut command = match self.holder {
            Some(pid) => {
                let mut command = Command::new("nsenter");
                command.args(["--target", &pid.to_string(), "--mount", "--net", "--"]);
                command
            }
            None => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", &self.name]);
                command
            }
        };
        command.arg(program.as_ref());
        command.stdin(Stdio::null()).process_group(0);
        command
    }

    /// Starts a command made by [`Space::command`] whose output goes to files named after `name`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&self, name: &str, command: &mut Command) -> Result<Process> {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let file = |kind| self.directory.join(format!("{number}-{name}.{kind}"));
        let (output, errors) = (file("out"), file("err"));
        let child = command
            .stdout(File::create(&output)?)
            .stderr(File::create(&errors)?)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Process { name: name.to_owned(), child, output, errors })
    }

    /// Runs a program to its end and gives what it printed.
    ///
    /// # Errors
    /// If it takes more than half a minute, or ends with an exit code other than 0.
    pub fn run(&self, program: impl AsRef<Path>, arguments: &[&str]) -> Result<String> {
        let program = program.as_ref();
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.spawn(&name, self.command(program).args(arguments))?.finish(Duration::from_secs(30))
    }

    /// Sends `count` echo requests, five a second, and gives how many were answered with their
    /// mean round trip in milliseconds.
    ///
    /// # Errors
    /// If `ping` cannot be run; that nobody answers is a result.
    pub fn ping(&self, to: &str, count: u32, options: &[&str]) -> Result<Ping> {
        let mut command = self.command("ping");
        command.args(["-n", "-q", "-i", "0.2", "-W", "2", "-c", &count.to_string()]);
        let mut ping = self.spawn("ping", command.args(options).arg(to))?;
        let status = ping.wait(Duration::from_secs(10 + u64::from(count) / 4))?;
        ensure!(status.code().is_some_and(|code| code < 2), "ping {to}: {}", ping.errors());
        Ping::parse(&ping.output()).with_context(|| format!("reading what ping {to} prints"))
    }

    /// Packets an interface has received and sent.
    ///
    /// # Errors
    /// If there is no such interface.
    pub fn packets(&self, interface: &str) -> Result<(u64, u64)> {
        let links = self.ip_json(&format!("-s link show dev {interface}"))?;
        let count = |way| links.pointer(&format!("/0/stats64/{way}/packets"))?.as_u64();
        count("rx").zip(count("tx")).context("counters of the interface")
    }

    /// Whether the namespace has an interface of this name.
    pub fn has_interface(&self, interface: &str) -> bool {
        self.ip(&format!("link show dev {interface}")).is_ok()
    }

    /// Gives an interface the addresses of a `wg0.conf` and the routes of its AllowedIPs, and
    /// takes it up: what wg-quick(8) would do.
    ///
    /// # Errors
    /// If `ip` says no.
    pub fn configure(&self, interface: &str, conf: &str) -> Result<()> {
        for address in conf_values(conf, "Address") {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            self.ip(&format!("addr add {address} dev {interface} {nodad}"))?;
        }
        // Its peer owns no link-local address, so packets from one would be dropped.
        self.ip(&format!("link set {interface} addrgenmode none"))?;
        let mtu = conf_values(conf, "MTU").pop().unwrap_or("1420");
        self.ip(&format!("link set {interface} mtu {mtu} up"))?;
        for prefix in conf_values(conf, "AllowedIPs") {
            self.ip(&format!("route replace {prefix} dev {interface}"))?;
        }
        Ok(())
    }

    /// Processes inside, which are ours: nobody else knows the namespace.
    fn pids(&self) -> Vec<Pid> {
        let text = ip(&["netns", "pids", &self.name]).unwrap_or_default();
        text.lines().filter_map(|line| Pid::from_raw(line.trim().parse().ok()?)).collect()
    }

    /// The names of the processes inside, but for the one that keeps the private file systems.
    pub fn processes(&self) -> Vec<String> {
        let holder = self.holder.and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        let others = self.pids().into_iter().filter(|&pid| Some(pid) != holder);
        let name =
            |pid: Pid| fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).ok();
        others.filter_map(name).map(|name| name.trim_end().to_owned()).collect()
    }

    /// How long the processes inside have run on CPUs, in all of their threads.
    pub fn cpu_time(&self) -> Duration {
        /// Ticks of proc(5) per second: what every Linux of today tells programs.
        const TICKS_PER_S: u64 = 100;
        let ticks = |pid: Pid| {
            let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
            cpu_ticks(&stat)
        };
        let ticks: u64 = self.pids().into_iter().filter_map(ticks).sum();
        Duration::from_millis(ticks * 1000 / TICKS_PER_S)
    }

    fn remove(&self) {
        for pid in self.pids() {
            let _ = kill_process(pid, Signal::TERM);
        }
        let end = Instant::now() + GRACE;
        while !self.pids().is_empty() && Instant::now() < end {
            thread::sleep(POLL_EVERY);
        }
        for pid in self.pids() {
            let _ = kill_process(pid, Signal::KILL);
        }
        // It is not there if the lab was not finished.
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

/// In user mode and in the kernel, by what `/proc/PID/stat` shows.
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The name of the program may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// The values of a key in a `wg0.conf`, of all sections, split at commas.
pub fn conf_values<'a>(conf: &'a str, key: &str) -> Vec<&'a str> {
    conf.lines()
        .filter_map(|line| line.split('#').next()?.split_once('='))
        .filter(|(name, _)| name.trim().eq_ignore_ascii_case(key))
        .flat_map(|(_, values)| values.split(',').map(str::trim))
        .collect()
}

fn ip(arguments: &[&str]) -> Result<String> {
    let output = Command::new("ip").args(arguments).output().context("running `ip`")?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("ip {}: {}", arguments.join(" "), errors.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Echo requests and their answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ping {
    /// Requests sent.
    pub sent: u32,
    /// Requests answered.
    pub answered: u32,
    /// Mean round trip of the answered ones.
    pub mean_ms: Option<f64>,
}

impl Ping {
    fn parse(text: &str) -> Option<Ping> {
        let counts = text.lines().find(|line| line.contains("packets transmitted"))?;
        let mut parts = counts.split(", ");
        let number = |part: &str| part.split_whitespace().next()?.parse().ok();
        let (sent, answered) = (number(parts.next()?)?, number(parts.next()?)?);
        let mean_ms = text
            .lines()
            .find_map(|line| line.strip_prefix("rtt min/avg/max/mdev = "))
            .and_then(|times| times.split('/').nth(1)?.parse().ok());
        Some(Ping { sent, answered, mean_ms })
    }
}

/// A process of ours; it is ended when this goes out of scope.
pub struct Process {
    name: String,
    child: Child,
    output: PathBuf,
    errors: PathBuf,
}

impl Process {
    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed to standard output so far.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// What it has printed to standard error so far.
    pub fn errors(&self) -> String {
        fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If a signal comes or `limit` passes first.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, limit, || Ok(self.child.try_wait()?))
    }

    /// Whether it has ended already.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its successful end and gives what it printed.
    ///
    /// # Errors
    /// If it fails, with what it says about it; or as [`Process::wait`].
    pub fn finish(mut self, limit: Duration) -> Result<String> {
        let status = self.wait(limit)?;
        if status.success() { Ok(self.output()) } else { Err(self.failure(status)) }
    }

    fn failure(&self, status: ExitStatus) -> anyhow::Error {
        let errors = self.errors();
        let lines: Vec<_> = errors.trim_end().lines().collect();
        let last = lines[lines.len().saturating_sub(30)..].join("\n");
        anyhow!("{} ended with {status}\n{last}", self.name)
    }

    /// Waits for a JSON line of its output whose `event` is this one.
    ///
    /// # Errors
    /// If it ends before, a signal comes, or `limit` passes.
    pub fn event(&mut self, event: &str, limit: Duration) -> Result<Value> {
        let what = format!("`{event}` from {}", self.name);
        wait_for(&what, limit, || {
            let ended = self.ended()?;
            let found = self
                .output()
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok())
                .find(|line| line["event"] == event);
            match (found, ended) {
                (None, Some(status)) => Err(self.failure(status)),
                (found, _) => Ok(found),
            }
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal)
            .with_context(|| format!("signalling {}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A child that was waited for has no pid any more that would be ours to signal.
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        let _ = self.signal(Signal::TERM);
        let end = Instant::now() + GRACE;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > end {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            thread::sleep(POLL_EVERY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_a_conf_are_split_and_comments_cut() {
        let conf = "[Interface]\nAddress = 10.9.0.2/24, fd09::2/64 # both\n#Address = 1.1.1.1/32\n\
                    [Peer]\nallowedips=10.0.0.0/8\nAllowedIPs = ::/0\n";
        assert_eq!(conf_values(conf, "Address"), ["10.9.0.2/24", "fd09::2/64"]);
        assert_eq!(conf_values(conf, "AllowedIPs"), ["10.0.0.0/8", "::/0"]);
    }

    #[test]
    fn the_lab_has_the_addresses_that_are_drawn() {
        let addresses: Vec<_> =
            LAB.links.iter().copied().flatten().map(|end| end.addresses).collect();
        let [gateway, client, _, host] = addresses[..] else { panic!("two cables") };
        for (addresses, [v4, v6]) in [
            (gateway, [GATEWAY_V4, GATEWAY_V6]),
            (client, [CLIENT_V4, CLIENT_V6]),
            (host, [HOST_V4, HOST_V6]),
        ] {
            assert_eq!(addresses, [format!("{v4}/24"), format!("{v6}/64")]);
        }
    }

    #[test]
    fn ping_is_read_with_and_without_answers() {
        let answered = "PING 10.9.0.1 (10.9.0.1) 56(84) bytes of data.\n\n--- 10.9.0.1 ping \
            statistics ---\n5 packets transmitted, 4 received, 20% packet loss, time 811ms\n\
            rtt min/avg/max/mdev = 0.017/0.031/0.051/0.012 ms\n";
        let ping = Ping { sent: 5, answered: 4, mean_ms: Some(0.031) };
        assert_eq!(Ping::parse(answered), Some(ping));
        let silent = "5 packets transmitted, 0 received, +2 errors, 100% packet loss, time 4ms\n";
        assert_eq!(Ping::parse(silent), Some(Ping { sent: 5, answered: 0, mean_ms: None }));
    }
}
