//! A gateway that carries real traffic, between an independent client and a LAN host.
//!
//! ```text
//!  client                                gateway                             LAN host
//!  boringtun's `Tunn` ═══ outer veth ═══ XDP → AF_XDP → workers → TUN ═══ lan veth ═══ lab-tool
//! ```
//!
//! The files of `examples/first-tunnel` configure both ends. `tidegate up` starts the gateway and
//! `tidegate down` ends it, as a user would. What was carried, and by which path, is measured from
//! outside where that is possible: by the receivers, `sha256sum`, and the counters of the links.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::lab::{self, HOST_V4, HOST_V6, Lab, OUTER, Process, Site, Space};

/// The client's end of the pair.
pub const CLIENT_CONF: &str = include_str!("../../examples/first-tunnel/client.conf");
/// The gateway's end of the pair.
pub const GATEWAY_CONF: &str = include_str!("../../examples/first-tunnel/gateway.conf");
/// The gateway's addresses inside the tunnel.
pub const GATEWAY_INNER: [&str; 2] = ["10.9.0.1", "fd09::1"];

/// Exit code when all hashes match, but in a mode that nobody asked for.
pub const OTHER_MODE: u8 = 6;
/// Part of the tunnel packets that the requested mode must carry.
pub const SHARE_MIN: f64 = 0.99;
/// TCP port of the LAN host's server.
const PORT: u16 = 7007;
/// How long one step may take, unless it says how long it runs.
pub const STEP_LIMIT: Duration = Duration::from_secs(60);

/// How the gateway receives.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// What the gateway finds best
    Auto,
    /// AF_XDP sockets behind native XDP
    Native,
    /// Ordinary UDP sockets
    Udp,
}

impl Mode {
    /// The word on the command line and in reports.
    pub fn word(self) -> &'static str {
        match self {
            Mode::Auto => "auto",
            Mode::Native => "native",
            Mode::Udp => "udp",
        }
    }
}

/// What to show.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Folder with the built programs
    #[arg(long)]
    pub programs: PathBuf,
    /// Mode of the gateway
    #[arg(long, value_enum, default_value_t = Mode::Native)]
    pub mode: Mode,
    /// Where to write the report, as JSON
    #[arg(long)]
    pub report: Option<PathBuf>,
    /// Leave namespaces and processes standing
    #[arg(long)]
    pub keep: bool,
    /// We are root in a user namespace only
    #[arg(long)]
    pub rootless: bool,
    /// Stop when standard input ends
    #[arg(long)]
    pub lifeline: bool,
}

/// The programs that take part.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The daemon and its command line.
    pub tidegate: PathBuf,
    /// The client.
    pub peer: PathBuf,
    /// The TCP tools.
    pub tool: PathBuf,
}

impl Programs {
    /// Those in a folder of cargo's.
    ///
    /// # Errors
    /// If one is missing, with the command that builds it.
    pub fn in_folder(folder: &Path) -> Result<Programs> {
        let program = |name: &str, package: &str| {
            // A host with file systems of its own starts everything from the root.
            let path = std::path::absolute(folder.join(name))?;
            let built = path.is_file();
            ensure!(built, "no {}: `cargo build -p {package} --bin {name}`", path.display());
            Ok(path)
        };
        Ok(Programs {
            tidegate: program("tidegate", "wg-userspace")?,
            peer: program("boringtun-peer", "benches")?,
            tool: program("lab-tool", "benches")?,
        })
    }
}

/// How much traffic to send.
#[derive(Clone, Copy, Debug)]
pub struct Amount {
    /// Bytes of the file that goes each way, by IPv4 and by IPv6.
    pub file_len: u64,
    /// How long the load lasts, each way.
    pub load: Duration,
}

impl Amount {
    /// What `cargo xtask run` sends.
    pub const FULL: Amount = Amount { file_len: 16 << 20, load: Duration::from_secs(5) };
    /// Enough for a test.
    pub const SMALL: Amount = Amount { file_len: 4 << 20, load: Duration::from_secs(1) };
}

/// A value for each way of the traffic, seen from the client.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct EachWay {
    /// Client to LAN host.
    pub up: f64,
    /// LAN host to client.
    pub down: f64,
}

/// One file through the tunnel.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Transfer {
    /// `up` or `down`, by `v4` or `v6`.
    pub what: String,
    /// Its length, as received.
    pub bytes: u64,
    /// Whether it arrived with the sha256 it left with.
    pub equal: bool,
    /// The address that it came from, if the server received it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_as: Option<IpAddr>,
}

/// What was seen; `--report` writes it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Report {
    /// How the gateway received.
    pub mode: String,
    /// How it was to receive.
    pub requested_mode: Mode,
    /// Why this mode.
    pub reason: Option<String>,
    /// Whether every file arrived as it left.
    pub hashes_equal: bool,
    /// From the client's initiation to the response it accepted.
    pub handshake_ms: f64,
    /// TCP payload under load, by its receiver.
    pub mbit_s: EachWay,
    /// Outer packets of that way under load, by the link's counters.
    pub pps: EachWay,
    /// Packets that the steer program handed to an XSK.
    pub steered: u64,
    /// Packets that it left to the kernel, by reason.
    pub passed: BTreeMap<String, u64>,
    /// Packets dropped, by reason: by the steer program and by the workers.
    pub dropped: BTreeMap<String, u64>,
    /// Tunnel packets that the gateway received, by the path that they came.
    pub paths: BTreeMap<String, u64>,
    /// Each file.
    pub transfers: Vec<Transfer>,
    /// Answered echo requests and mean round trip, by address.
    pub pings: BTreeMap<String, String>,
    /// Number of the gateway's workers.
    pub workers: u64,
    /// What a reader should know.
    pub notes: Vec<String>,
    /// How it ended: 0, 1 or 6.
    pub exit_code: u8,
}

impl Report {
    /// Part of the tunnel packets that came by the path of a mode.
    pub fn share(&self, mode: Mode) -> f64 {
        share(&self.paths, mode)
    }

    /// 0, 6 or 1: see [`OTHER_MODE`].
    fn verdict(&self, rootless: bool) -> u8 {
        let all_answered = self.pings.values().all(|answered| !answered.starts_with("0/"));
        if !self.hashes_equal || self.paths.values().sum::<u64>() == 0 || !all_answered {
            return 1;
        }
        let asked_for = match self.requested_mode {
            Mode::Auto => !rootless,
            mode => self.mode == mode.word() && self.share(mode) >= SHARE_MIN,
        };
        if asked_for { 0 } else { OTHER_MODE }
    }

    /// The table at the end.
    pub fn table(&self) -> String {
        let list = |counts: &BTreeMap<String, u64>| {
            let mut some: Vec<_> = counts.iter().filter(|&(_, &count)| count > 0).collect();
            some.sort_by_key(|&(_, &count)| std::cmp::Reverse(count));
            let texts: Vec<_> =
                some.iter().map(|(name, count)| format!("{name} {count}")).collect();
            if texts.is_empty() { "none".to_owned() } else { texts.join(", ") }
        };
        let mode = match &self.reason {
            Some(reason) => format!("{} ({reason})", self.mode),
            None => self.mode.clone(),
        };
        let percent = self.share(match self.mode.as_str() {
            "native" => Mode::Native,
            _ => Mode::Udp,
        }) * 100.0;
        let equal = self.transfers.iter().filter(|transfer| transfer.equal).count();
        let pings: Vec<_> =
            self.pings.iter().map(|(to, answered)| format!("{to} {answered}")).collect();
        let rows = [
            ("mode", mode),
            ("requested", format!("{}, {} workers", self.requested_mode.word(), self.workers)),
            ("handshake", format!("{:.2} ms", self.handshake_ms)),
            ("ping", pings.join(", ")),
            ("files", format!("{equal} of {} with equal sha256", self.transfers.len())),
            ("load up", format!("{:.0} Mbit/s, {:.0} packets/s", self.mbit_s.up, self.pps.up)),
            (
                "load down",
                format!("{:.0} Mbit/s, {:.0} packets/s", self.mbit_s.down, self.pps.down),
            ),
            ("came by", format!("{} ({percent:.2} % as the mode says)", list(&self.paths))),
            ("XDP steered", self.steered.to_string()),
            ("XDP passed", list(&self.passed)),
            ("dropped", list(&self.dropped)),
        ];
        let mut table = String::new();
        let rule = "─".repeat(72);
        writeln!(table, "{rule}").expect("a string takes everything");
        for (name, value) in rows {
            writeln!(table, " {name:<12} {value}").expect("a string takes everything");
        }
        for note in &self.notes {
            writeln!(table, " {:<12} {note}", "note").expect("a string takes everything");
        }
        table + &rule
    }
}

/// Part of the packets that came by the path of a mode.
pub fn share(paths: &BTreeMap<String, u64>, mode: Mode) -> f64 {
    let total: u64 = paths.values().sum();
    let path = match mode {
        Mode::Native => "xsk",
        Mode::Udp => "socket",
        Mode::Auto => return if total > 0 { 1.0 } else { 0.0 },
    };
    let by_path = paths.get(path).copied().unwrap_or(0);
    if total == 0 { 0.0 } else { by_path as f64 / total as f64 }
}

/// Shows it, prints the table and writes the report.
///
/// # Errors
/// If something did not work at all.
pub fn demonstrate(options: &Options) -> Result<ExitCode> {
    present(options, |programs| {
        let report = show(programs, options, Amount::FULL)?;
        Ok((serde_json::to_value(&report)?, report.table(), report.exit_code))
    })
}

/// Lets something be shown that gives its report, its table and its exit code; writes the one and
/// prints the other.
///
/// # Errors
/// If something did not work at all; the report says so, too.
pub fn present(
    options: &Options,
    show: impl FnOnce(&Programs) -> Result<(Value, String, u8)>,
) -> Result<ExitCode> {
    lab::catch_signals()?;
    if options.lifeline {
        end_with_standard_input();
    }
    let shown = Programs::in_folder(&options.programs).and_then(|programs| show(&programs));
    let json = match &shown {
        Ok((report, _, _)) => report.clone(),
        Err(error) => {
            let error = format!("{error:#}");
            json!({ "requested_mode": options.mode, "error": error, "exit_code": 1 })
        }
    };
    if let Some(path) = &options.report {
        // Written into the file that the user made, whose owner it keeps.
        let text = serde_json::to_string_pretty(&json)? + "\n";
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    let (_, table, exit_code) = shown?;
    println!("{table}");
    println!(" {}", conclusion(exit_code));
    Ok(ExitCode::from(exit_code))
}

/// Has every wait end with an error once standard input has ended: whoever started us is gone.
pub fn end_with_standard_input() {
    std::thread::spawn(|| {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        lab::interrupt();
    });
}

fn conclusion(exit_code: u8) -> &'static str {
    match exit_code {
        0 => "It works. Next: `cargo xtask test`, or bring up a wg0.conf of your own.",
        OTHER_MODE => "It works, but not in the mode that was asked for (exit code 6).",
        _ => "It does not work as it should: see above (exit code 1).",
    }
}

/// The whole of it, in a lab of its own.
///
/// # Errors
/// If something did not work at all; a hash that differs is a result.
pub fn show(programs: &Programs, options: &Options, amount: Amount) -> Result<Report> {
    let mut lab = Lab::new()?;
    if options.keep {
        lab.keep();
    }
    let mut notes = Vec::new();
    if options.rootless {
        notes.push("no root and no sudo: a user namespace, where XDP cannot be used".to_owned());
    }
    let mode = if options.rootless { Mode::Udp } else { options.mode };

    step("the gateway comes up");
    let gateway = Gateway::start(&lab, programs, mode, &mut notes)?;
    step("boringtun shakes hands with it");
    let (_client, handshake_ms) = start_client(&lab, programs)?;
    let pings = pings(&lab)?;
    let tools = Tools::start(&lab, programs)?;
    let transfers = tools.files(amount.file_len)?;
    let (up, pps_up) = tools.load("up", amount.load)?;
    let (down, pps_down) = tools.load("down", amount.load)?;

    let status = gateway.status()?;
    if !options.keep {
        step("the gateway goes down");
        gateway.stop()?;
    }
    let steered = |name: &str| status.steer.get(name).copied().unwrap_or(0);
    let mut dropped = status.drops;
    let mut passed = BTreeMap::new();
    for (name, count) in &status.steer {
        if let Some(why) = name.strip_prefix("passed_") {
            passed.insert(why.to_owned(), *count);
        } else if name != "steered" {
            *dropped.entry(name.clone()).or_default() += count;
        }
    }
    let mut report = Report {
        steered: steered("steered"),
        mode: status.mode,
        requested_mode: options.mode,
        reason: status.reason,
        hashes_equal: transfers.iter().all(|transfer| transfer.equal),
        handshake_ms,
        mbit_s: EachWay { up, down },
        pps: EachWay { up: pps_up, down: pps_down },
        passed,
        dropped,
        paths: status.paths,
        transfers,
        pings,
        workers: status.workers,
        notes,
        exit_code: 0,
    };
    report.exit_code = report.verdict(options.rootless);
    Ok(report)
}

/// Says what is being done.
pub fn step(what: &str) {
    eprintln!("  · {what}");
}

/// The data path of a running daemon, as `tidegate show --json` tells it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct DataPath {
    /// How datagrams come in: `native` or `udp`.
    pub mode: String,
    /// Why this mode.
    pub reason: Option<String>,
    /// NICs from which XDP steers, as the daemon describes them.
    pub nics: Vec<Value>,
    /// Number of workers.
    pub workers: u64,
    /// Whether packets out of the TUN device come to their peer's worker, as the daemon describes it.
    pub tun_steering: Value,
    /// Packets dropped by workers, by reason.
    pub drops: BTreeMap<String, u64>,
    /// What the steer program did, by event and by reason of a drop.
    pub steer: BTreeMap<String, u64>,
    /// Tunnel packets received, by path.
    pub paths: BTreeMap<String, u64>,
    /// Tunnel packets sent, by path.
    pub sent: BTreeMap<String, u64>,
}

impl DataPath {
    /// Asks the daemon of an interface.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn of(space: &Space, tidegate: &Path, interface: &str) -> Result<DataPath> {
        let text = space.run(tidegate, &["show", interface, "--json"])?;
        let shown: Value = serde_json::from_str(&text).context("what `show --json` prints")?;
        let data_path = shown.pointer("/interfaces/0/data_path").context("no data path in it")?;
        Ok(serde_json::from_value(data_path.clone())?)
    }
}

/// The gateway, run by its command line.
struct Gateway<'a> {
    lab: &'a Lab,
    tidegate: &'a Path,
    interface: String,
}

impl<'a> Gateway<'a> {
    /// Brings it up, with sockets if it does not come up in the mode that was asked for.
    fn start(
        lab: &'a Lab,
        programs: &'a Programs,
        mode: Mode,
        notes: &mut Vec<String>,
    ) -> Result<Gateway<'a>> {
        let interface = lab.interface('g');
        // The name of the file is the name of the interface.
        let file = lab.write(&format!("{interface}.conf"), GATEWAY_CONF)?;
        let up = |mode: Mode| {
            let mut command = lab.gateway.command(&programs.tidegate);
            command.arg("up").arg(&file).args(["--mode", mode.word()]);
            if mode != Mode::Udp {
                command.args(["--xdp", OUTER]);
            }
            lab.gateway.spawn("tidegate-up", &mut command)?.finish(STEP_LIMIT)
        };
        let said = up(mode).or_else(|error| {
            lab::check_interrupted()?;
            if mode == Mode::Udp {
                return Err(error);
            }
            let why = format!("--mode {} did not come up: {error:#}", mode.word());
            eprintln!("{why}");
            notes.push(why.lines().next_back().unwrap_or_default().to_owned());
            up(Mode::Udp)
        })?;
        for line in said.lines() {
            eprintln!("    {line}");
        }
        Ok(Gateway { lab, tidegate: &programs.tidegate, interface })
    }

    fn status(&self) -> Result<DataPath> {
        DataPath::of(&self.lab.gateway, self.tidegate, &self.interface)
    }

    fn stop(&self) -> Result<()> {
        self.lab.gateway.run(self.tidegate, &["down", &self.interface])?;
        let left = self.lab.gateway.has_interface(&self.interface);
        ensure!(!left, "`tidegate down` left the interface {} behind", self.interface);
        Ok(())
    }
}

/// Starts boringtun as the client and waits for its handshake; gives its duration in ms.
fn start_client(lab: &Lab, programs: &Programs) -> Result<(Process, f64)> {
    let mut client = spawn_peer(lab, programs, CLIENT_CONF, &["--initiate"])?;
    let handshake = client.event("handshake", Duration::from_secs(15))?;
    let ms = handshake["ms"].as_f64().context("the handshake's duration")?;
    Ok((client, ms))
}

/// Starts boringtun in the client's namespace, with the addresses and routes of its `wg0.conf`.
///
/// # Errors
/// If it cannot be started or its interface not be configured.
pub fn spawn_peer(lab: &Lab, programs: &Programs, conf: &str, options: &[&str]) -> Result<Process> {
    let interface = lab.interface('c');
    let file = lab.write("client.conf", conf)?;
    let mut command = lab.client.command(&programs.peer);
    command.arg(&interface).arg(&file).args(options);
    let mut peer = lab.client.spawn("boringtun-peer", &mut command)?;
    peer.event("ready", Duration::from_secs(10))?;
    lab.client.configure(&interface, conf)?;
    Ok(peer)
}

fn pings(lab: &Lab) -> Result<BTreeMap<String, String>> {
    let mut answers = BTreeMap::new();
    for to in [GATEWAY_INNER[0], GATEWAY_INNER[1], HOST_V4, HOST_V6] {
        step(&format!("ping {to}"));
        let ping = lab.client.ping(to, 5, &[])?;
        let time = ping.mean_ms.map_or_else(String::new, |ms| format!(" {ms:.2} ms"));
        answers.insert(to.to_owned(), format!("{}/{}{time}", ping.answered, ping.sent));
    }
    Ok(answers)
}

/// TCP between a client and a server on another host.
pub struct Tools<'a> {
    site: &'a Site,
    client: &'a Space,
    tool: &'a Path,
    _server: Process,
}

impl<'a> Tools<'a> {
    /// Starts a server on the LAN host, for the client.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(lab: &'a Lab, programs: &'a Programs) -> Result<Tools<'a>> {
        Tools::between(lab, &programs.tool, &lab.client, &lab.host)
    }

    /// Starts a server on one host, for a client on another.
    ///
    /// # Errors
    /// If it does not start.
    pub fn between(
        site: &'a Site,
        tool: &'a Path,
        client: &'a Space,
        server: &Space,
    ) -> Result<Tools<'a>> {
        let folder = site.path("received");
        fs::create_dir_all(&folder)?;
        let mut command = server.command(tool);
        command.arg("serve").arg(PORT.to_string()).arg(&folder);
        let mut server = server.spawn("lab-tool-serve", &mut command)?;
        server.event("ready", Duration::from_secs(10))?;
        Ok(Tools { site, client, tool, _server: server })
    }

    /// A file of random bytes each way, by IPv4 and by IPv6.
    ///
    /// # Errors
    /// If a transfer breaks off; a hash that differs is a result.
    pub fn files(&self, len: u64) -> Result<Vec<Transfer>> {
        let mut transfers = self.files_with(HOST_V4, len)?;
        transfers.extend(self.files_with(HOST_V6, len)?);
        Ok(transfers)
    }

    /// A file of random bytes each way, to an address of the server's and from it.
    ///
    /// # Errors
    /// As [`Tools::files`].
    pub fn files_with(&self, host: &str, len: u64) -> Result<Vec<Transfer>> {
        let file = self.site.path("file");
        let mut random = File::open("/dev/urandom")?.take(len);
        io::copy(&mut random, &mut File::create(&file)?)?;
        let sha256 = sha256sum(&file)?;
        let family = if host.contains(':') { "v6" } else { "v4" };
        let mut transfers = Vec::new();
        for direction in ["up", "down"] {
            step(&format!("a file of {} MiB {direction} by {family}", len >> 20));
            let server = server(host)?;
            let mut command = self.client.command(self.tool);
            match direction {
                "up" => command.arg("put").arg(&server).arg(&file),
                _ => command.arg("get").arg(&server).arg(&file).arg(self.site.path("fetched")),
            };
            let received = self.received(&mut command, STEP_LIMIT)?;
            transfers.push(Transfer {
                what: format!("{direction} {family}"),
                bytes: received["bytes"].as_u64().unwrap_or(0),
                equal: received["sha256"] == sha256.as_str(),
                seen_as: received["from"].as_str().and_then(|address| address.parse().ok()),
            });
        }
        Ok(transfers)
    }

    /// A stream one way; gives Mbit/s of payload and packets/s of the outer link.
    ///
    /// # Errors
    /// If the stream breaks off.
    pub fn load(&self, direction: &str, duration: Duration) -> Result<(f64, f64)> {
        let (before, started) = (self.client.packets(OUTER)?, Instant::now());
        let mbit_s = self.load_to(HOST_V4, direction, duration)?;
        let (after, taken) = (self.client.packets(OUTER)?, started.elapsed());
        let packets = match direction {
            "up" => after.1 - before.1,
            _ => after.0 - before.0,
        };
        Ok((mbit_s, packets as f64 / taken.as_secs_f64()))
    }

    /// A stream one way, to an address of the server's or from it; gives Mbit/s of payload.
    ///
    /// # Errors
    /// If the stream breaks off.
    pub fn load_to(&self, host: &str, direction: &str, duration: Duration) -> Result<f64> {
        step(&format!("{} s load {direction}", duration.as_secs_f64()));
        let mut command = self.client.command(self.tool);
        command.arg("load").arg(server(host)?).arg(direction);
        command.arg(duration.as_millis().to_string());
        let received = self.received(&mut command, duration + STEP_LIMIT)?;
        received["mbit_s"].as_f64().context("the receiver's Mbit/s")
    }

    fn received(&self, command: &mut std::process::Command, limit: Duration) -> Result<Value> {
        let text = self.client.spawn("lab-tool", command)?.finish(limit)?;
        Ok(serde_json::from_str(&text)?)
    }
}

fn server(host: &str) -> Result<String> {
    let address: IpAddr = host.parse()?;
    Ok(SocketAddr::new(address, PORT).to_string())
}

fn sha256sum(file: &Path) -> Result<String> {
    let output = std::process::Command::new("sha256sum").arg(file).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.split(' ').next() {
        Some(hash) if hash.len() == 64 => Ok(hash.to_owned()),
        _ => bail!("sha256sum prints no hash for {}", file.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(requested_mode: Mode, mode: &str, xsk: u64, socket: u64) -> Report {
        Report {
            mode: mode.to_owned(),
            requested_mode,
            reason: None,
            hashes_equal: true,
            handshake_ms: 1.0,
            mbit_s: EachWay::default(),
            pps: EachWay::default(),
            steered: xsk,
            passed: BTreeMap::new(),
            dropped: BTreeMap::new(),
            paths: [("xsk".to_owned(), xsk), ("socket".to_owned(), socket)].into(),
            transfers: Vec::new(),
            pings: [("10.9.0.1".to_owned(), "5/5 0.10 ms".to_owned())].into(),
            workers: 2,
            notes: Vec::new(),
            exit_code: 0,
        }
    }

    #[test]
    fn the_requested_mode_must_carry_99_percent() {
        assert_eq!(report(Mode::Native, "native", 990, 10).verdict(false), 0);
        assert_eq!(report(Mode::Native, "native", 989, 11).verdict(false), OTHER_MODE);
        assert_eq!(report(Mode::Native, "udp", 0, 100).verdict(false), OTHER_MODE);
        assert_eq!(report(Mode::Udp, "udp", 0, 100).verdict(false), 0);
        assert_eq!(report(Mode::Auto, "udp", 0, 100).verdict(false), 0);
    }

    #[test]
    fn without_root_only_udp_is_what_was_asked_for() {
        assert_eq!(report(Mode::Native, "udp", 0, 100).verdict(true), OTHER_MODE);
        assert_eq!(report(Mode::Auto, "udp", 0, 100).verdict(true), OTHER_MODE);
        assert_eq!(report(Mode::Udp, "udp", 0, 100).verdict(true), 0);
    }

    #[test]
    fn a_hash_that_differs_and_silence_are_failures() {
        let mut wrong = report(Mode::Udp, "udp", 0, 100);
        wrong.hashes_equal = false;
        assert_eq!(wrong.verdict(false), 1);
        assert_eq!(report(Mode::Udp, "udp", 0, 0).verdict(false), 1);
        let mut silent = report(Mode::Udp, "udp", 0, 100);
        silent.pings.insert("fd09::1".to_owned(), "0/5".to_owned());
        assert_eq!(silent.verdict(false), 1);
    }

    #[test]
    fn the_examples_are_a_pair() {
        let value = |conf, key| lab::conf_values(conf, key);
        assert_eq!(value(CLIENT_CONF, "PresharedKey"), value(GATEWAY_CONF, "PresharedKey"));
        let address = |prefix: &str| prefix.split('/').next().unwrap().to_owned();
        let addresses = |conf: &str, key| -> Vec<String> {
            lab::conf_values(conf, key).into_iter().map(address).collect()
        };
        assert_eq!(addresses(CLIENT_CONF, "Address"), addresses(GATEWAY_CONF, "AllowedIPs"));
        let reached = addresses(CLIENT_CONF, "AllowedIPs");
        assert_eq!(addresses(GATEWAY_CONF, "Address"), GATEWAY_INNER);
        assert!(reached.starts_with(&GATEWAY_INNER.map(str::to_owned)));
        let endpoint = format!("{}:{}", lab::GATEWAY_V4, value(GATEWAY_CONF, "ListenPort")[0]);
        assert_eq!(value(CLIENT_CONF, "Endpoint"), [endpoint.as_str()]);
    }
}
