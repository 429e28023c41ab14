//! `cargo xtask bench-peers`: what many peers cost a gateway that is configured with them, most of them idle.
//!
//! ```text
//!  client                       gateway                      LAN host
//!  tidegate-load ────────────── tidegate: N peers ────────── tidegate-load count
//! ```
//!
//! For each number of peers a daemon is started and configured by wg(8), then one by `tidegate up` of the same
//! file. Namespaces are made for it and removed. The peers are synthetic: any 32 bytes are a public key, and
//! idle peers need no private ones. Throughput with many active peers is measured if `tidegate-load` is there.

use std::{
    fmt::Write as _,
    fs,
    net::Ipv4Addr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    build_ebpf,
    lab::{self, GATEWAY_V4, HOST_V4, LAN, Lab, Process, Space},
    workspace::{cargo, succeed, target_dir},
};

/// No step may take longer.
const STEP_LIMIT: Duration = Duration::from_secs(600);
/// The gateway is at rest when its processes took less than this of a core for [`REST_WINDOW`].
const REST_WINDOW: Duration = Duration::from_secs(1);
const REST_MAX: Duration = Duration::from_millis(30);
const REST_LIMIT: Duration = Duration::from_secs(120);
const PORT: u16 = 51820;
/// Peers that are active at once.
const ACTIVE_COUNT: u32 = 10_000;
/// Bytes of the packets that they send.
const ACTIVE_PACKET_LEN: u32 = 512;
/// Seconds for which they send.
const ACTIVE_S: f64 = 4.0;
/// The gateway's private key in the benchmark.
const PRIVATE_KEY: [u8; 32] = [0x42; 32];

/// Arguments of `bench-peers`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Numbers of peers
    #[arg(long, value_delimiter = ',', default_values_t = [10_000, 100_000, 1_000_000])]
    peers: Vec<u32>,
    /// What public keys are derived from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Spread the peers' addresses over 10.0.0.0/8, instead of one after the other
    #[arg(long)]
    spread: bool,
    /// Give each peer an endpoint
    #[arg(long)]
    endpoints: bool,
    /// How long the idle gateway is watched, in seconds
    #[arg(long, default_value_t = 10.0)]
    idle: f64,
    /// Leave out `tidegate up` and `reload`
    #[arg(long)]
    wg_only: bool,
    /// Leave out active peers
    #[arg(long)]
    idle_only: bool,
    /// The folder of `tidegate` and `tidegate-load`; they are built if it is not given
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Write what was measured into this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What was measured.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Report {
    /// For each number of peers.
    pub idle: Vec<Idle>,
    /// With many that are active; nothing if nobody could send.
    pub active: Option<Active>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// What idle peers cost.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Idle {
    /// How many.
    pub peers: u32,
    /// `wg setconf`, in seconds.
    pub setconf_s: f64,
    /// CPU time of wg(8) itself in that.
    pub setconf_wg_cpu_s: f64,
    /// CPU time of the gateway in that.
    pub setconf_gateway_cpu_s: f64,
    /// Until the gateway is at rest after that: the kernel is told who owns which prefix meanwhile.
    pub settle_s: f64,
    /// `wg addconf` of one peer more.
    pub add_one_s: f64,
    /// `wg setconf` of the same file once more.
    pub setconf_again_s: f64,
    /// What the data process has resident more than before, for each peer, in bytes.
    pub data_bytes_per_peer: f64,
    /// The same of the keeper.
    pub keeper_bytes_per_peer: f64,
    /// What is kept in memory for a process that follows, in no process's resident set, for each peer.
    pub kept_bytes_per_peer: f64,
    /// The highest that the data process had resident, for each peer: while it was configured.
    pub peak_bytes_per_peer: f64,
    /// CPU of both processes at rest, in per cent of a core.
    pub idle_cpu_percent: f64,
    /// `wg show IF dump`.
    pub wg_show_s: f64,
    /// `tidegate show IF --json`.
    pub tidegate_show_s: f64,
    /// Removing all of them.
    pub remove_s: f64,
    /// What the data process has resident more than before all, then, in bytes.
    pub left_bytes: i64,
    /// `tidegate up` of the same file, with the start of the daemon.
    pub up_s: Option<f64>,
    /// `tidegate reload` with one peer more.
    pub reload_s: Option<f64>,
}

/// What is delivered with one active peer, and with many.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Active {
    /// How many there are.
    pub peers: u32,
    /// Bytes of an inner packet.
    pub packet_len: u32,
    /// Packets per second delivered, all from one peer.
    pub one_pps: f64,
    /// The same from all in turn.
    pub all_pps: f64,
}

impl Active {
    /// What many deliver as a part of what one does.
    pub fn ratio(&self) -> f64 {
        self.all_pps / self.one_pps
    }
}

/// Builds what is needed, measures, and prints a table.
///
/// # Errors
/// If the machine cannot, or a step fails.
pub fn bench(options: &Options) -> Result<ExitCode> {
    if let Some(reason) = lab::unavailable() {
        bail!("{reason}");
    }
    let programs = match &options.programs {
        Some(folder) => std::path::absolute(folder)?,
        None => build()?,
    };
    let report = measure(&programs, options)?;
    print!("{}", table(&report));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn build() -> Result<PathBuf> {
    build_ebpf::build(false)?;
    let mut build = cargo();
    build.args(["build", "--locked", "--release", "-p", "wg-userspace", "-p", "benches"]);
    succeed(build.args(["--bin", "tidegate", "--bin", "tidegate-load"]))?;
    Ok(target_dir().join("release"))
}

/// Measures all that is asked for, with the programs in a folder.
///
/// # Errors
/// If a step fails.
pub fn measure(programs: &Path, options: &Options) -> Result<Report> {
    let tidegate = programs.join("tidegate");
    ensure!(tidegate.is_file(), "no {}", tidegate.display());
    let mut report = Report::default();
    for &peers in &options.peers {
        eprintln!("{peers} peers");
        let lab = Lab::new()?;
        report.idle.push(idle(&lab, &tidegate, options, peers)?);
    }
    let load = programs.join("tidegate-load");
    if options.idle_only {
        report.notes.push("Active peers were left out.".to_owned());
    } else if !load.is_file() {
        report.notes.push(format!("Active peers need {}.", load.display()));
    } else {
        eprintln!("{ACTIVE_COUNT} active peers");
        report.active = Some(active(&Lab::new()?, &tidegate, &load)?);
    }
    Ok(report)
}

/// What is measured, a line for each number of peers.
pub fn table(report: &Report) -> String {
    let mut text = String::from(
        "| peers | setconf, s (CPU of wg, of the gateway) | at rest after, s | one more, s | again, s | \
         resident, bytes a peer (peak) | keeper | kept | idle CPU, % | wg show, s | tidegate show, s | \
         removal, s | left, MiB | up, s | reload, s |\n",
    );
    text += &format!("|{}\n", " --- |".repeat(15));
    for idle in &report.idle {
        let maybe =
            |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.2}"));
        let columns = [
            idle.peers.to_string(),
            format!(
                "{:.2} ({:.2}, {:.2})",
                idle.setconf_s, idle.setconf_wg_cpu_s, idle.setconf_gateway_cpu_s
            ),
            format!("{:.1}", idle.settle_s),
            format!("{:.3}", idle.add_one_s),
            format!("{:.2}", idle.setconf_again_s),
            format!("{:.0} ({:.0})", idle.data_bytes_per_peer, idle.peak_bytes_per_peer),
            format!("{:.0}", idle.keeper_bytes_per_peer),
            format!("{:.0}", idle.kept_bytes_per_peer),
            format!("{:.2}", idle.idle_cpu_percent),
            format!("{:.2}", idle.wg_show_s),
            format!("{:.2}", idle.tidegate_show_s),
            format!("{:.2}", idle.remove_s),
            format!("{:.1}", idle.left_bytes as f64 / f64::from(1 << 20)),
            maybe(idle.up_s),
            maybe(idle.reload_s),
        ];
        text += &format!("| {} |\n", columns.join(" | "));
    }
    if let Some(active) = &report.active {
        text += &format!(
            "\nPackets of {} bytes delivered: {:.0} a second from one peer, {:.0} from {} in turn ({:.2})\n",
            active.packet_len,
            active.one_pps,
            active.all_pps,
            active.peers,
            active.ratio()
        );
    }
    for note in &report.notes {
        text += &format!("\n{note}\n");
    }
    text
}

fn idle(lab: &Lab, tidegate: &Path, options: &Options, peers: u32) -> Result<Idle> {
    let space = &lab.gateway;
    let many = lab.write("many.conf", &conf(options, 0..peers))?;
    let none = lab.write("none.conf", &conf(options, 0..0))?;
    let one = lab.write("one.conf", &section(options, peers))?;
    let name = lab.interface('g');
    let mut gateway = Gateway::start(space, tidegate, &name)?;
    let before = gateway.memory()?;
    let mut found = Idle { peers, ..Idle::default() };
    let more = |now: u64, before: u64| (now as f64 - before as f64) / f64::from(peers);

    let cpu = space.cpu_time();
    let (took, wg_cpu) = timed_with_cpu(space, &format!("wg setconf {name} {}", many.display()))?;
    (found.setconf_s, found.setconf_wg_cpu_s) = (took, wg_cpu);
    found.setconf_gateway_cpu_s = (space.cpu_time() - cpu).as_secs_f64();
    found.settle_s = gateway.rest()?;
    let after = gateway.memory()?;
    found.data_bytes_per_peer = more(after.data, before.data);
    found.keeper_bytes_per_peer = more(after.keeper, before.keeper);
    found.kept_bytes_per_peer = more(after.kept, before.kept);
    found.peak_bytes_per_peer = more(after.peak, before.data);
    let (cpu, start) = (space.cpu_time(), Instant::now());
    sleep(Duration::from_secs_f64(options.idle))?;
    let cpu = (space.cpu_time() - cpu).as_secs_f64();
    found.idle_cpu_percent = 100.0 * cpu / start.elapsed().as_secs_f64();

    let count = format!("test $(wg show {name} peers | wc -l) = {peers}");
    timed(space, &count).context("wg show does not list every peer")?;
    found.wg_show_s = timed(space, &format!("wg show {name} dump > /dev/null"))?;
    let show = format!("{} show {name} --json > /dev/null", tidegate.display());
    found.tidegate_show_s = timed(space, &show)?;
    found.add_one_s = timed(space, &format!("wg addconf {name} {}", one.display()))?;
    found.setconf_again_s = timed(space, &format!("wg setconf {name} {}", many.display()))?;
    gateway.rest()?;
    found.remove_s = timed(space, &format!("wg setconf {name} {}", none.display()))?;
    gateway.rest()?;
    found.left_bytes = gateway.memory()?.data as i64 - before.data as i64;
    gateway.end()?;

    if !options.wg_only {
        // The name of the file is the name of the interface.
        let name = lab.interface('u');
        // The network of its address covers all peers: there is one route, and not one for each of them.
        let text = conf(options, 0..peers).replacen('\n', "\nAddress = 10.255.255.254/8\n", 1);
        let file = lab.write(&format!("{name}.conf"), &text)?;
        let told = |verb: &str| format!("{} {verb} {}", tidegate.display(), file.display());
        found.up_s = Some(timed(space, &format!("{} --mode udp", told("up")))?);
        lab.write(&format!("{name}.conf"), &(text + &section(options, peers)))?;
        found.reload_s = Some(timed(space, &told("reload"))?);
        timed(space, &told("down"))?;
    }
    Ok(found)
}

fn active(lab: &Lab, tidegate: &Path, load: &Path) -> Result<Active> {
    let name = lab.interface('g');
    let gateway = Gateway::start(&lab.gateway, tidegate, &name)?;
    let many = lab.path("active.conf");
    let own = lab.write("own.conf", &interface())?;
    let script = format!(
        "cp {own} {many} && {load} peers --count {ACTIVE_COUNT} --seed 1 >> {many} && wg setconf {name} {many}",
        own = own.display(),
        many = many.display(),
        load = load.display(),
    );
    timed(&lab.gateway, &script)?;
    lab.gateway.ip(&format!("link set {name} mtu 1420 up"))?;
    let key = lab.gateway.run("wg", &["show", &name, "public-key"])?;
    let socket = lab.path("counter");
    let mut counting = lab.host.command(load);
    counting.args(["count", "--nic", LAN, "--socket"]).arg(&socket);
    let mut counter = lab.host.spawn("count", &mut counting)?;
    lab::wait_for("the counter", Duration::from_secs(10), || {
        ensure!(counter.ended()?.is_none(), "it ended: {}", counter.errors());
        Ok(socket.exists().then_some(()))
    })?;
    let flood = |peers: u32| -> Result<f64> {
        let mut command = lab.client.command(load);
        command.args([
            "flood",
            "--to",
            &format!("{GATEWAY_V4}:{PORT}"),
            "--server-key",
            key.trim(),
        ]);
        command.args(["--peers", &peers.to_string(), "--seed", "1", "--dst", HOST_V4]);
        command.args(["--size", &ACTIVE_PACKET_LEN.to_string(), "--burst", "1", "--pps", "max"]);
        command.args(["--seconds", &ACTIVE_S.to_string(), "--counter"]).arg(&socket);
        let said = lab.client.spawn("flood", &mut command)?.finish(STEP_LIMIT)?;
        let said: Value = serde_json::from_str(&said).context("what the flood prints")?;
        said.pointer("/delivered/pps").and_then(Value::as_f64).context("no count of the flood")
    };
    // In turn, so that what else the machine does harms both alike.
    let (mut one, mut all) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        one.push(flood(1)?);
        all.push(flood(ACTIVE_COUNT)?);
    }
    drop(gateway);
    let [one_pps, all_pps] = [one, all].map(|mut samples| {
        samples.sort_unstable_by(f64::total_cmp);
        samples[samples.len() / 2]
    });
    Ok(Active { peers: ACTIVE_COUNT, packet_len: ACTIVE_PACKET_LEN, one_pps, all_pps })
}

/// A daemon, which is a keeper and its data process.
struct Gateway<'a> {
    space: &'a Space,
    process: Process,
}

/// Bytes that are resident.
#[derive(Clone, Copy, Debug, Default)]
struct Resident {
    keeper: u64,
    data: u64,
    /// The most that the data process ever had.
    peak: u64,
    /// In files without a name that the keeper holds for a data process that follows.
    kept: u64,
}

impl Gateway<'_> {
    fn start<'a>(space: &'a Space, tidegate: &Path, name: &str) -> Result<Gateway<'a>> {
        let mut command = space.command(tidegate);
        command.args(["run", "-f", name, "--mode", "udp"]);
        let mut process = space.spawn("tidegate", &mut command)?;
        lab::wait_for("the gateway", Duration::from_secs(20), || {
            ensure!(process.ended()?.is_none(), "it ended: {}", process.errors());
            Ok(space.run("wg", &["show", name]).ok())
        })?;
        let mut gateway = Gateway { space, process };
        gateway.rest()?;
        Ok(gateway)
    }

    /// The keeper, and its data process.
    fn pids(&self) -> Result<[u32; 2]> {
        let keeper = self.process.pid();
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children"))?;
        let data = children.split_whitespace().next().context("the keeper has no data process")?;
        Ok([keeper, data.parse()?])
    }

    fn memory(&self) -> Result<Resident> {
        let [keeper, data] = self.pids()?;
        let field = |pid: u32, file: &str, name: &str| -> Result<u64> {
            let text = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
            kib(&text, name).map(|kib| kib << 10).with_context(|| format!("no {name} of {pid}"))
        };
        Ok(Resident {
            keeper: field(keeper, "smaps_rollup", "Rss:")?,
            data: field(data, "smaps_rollup", "Rss:")?,
            peak: field(data, "status", "VmHWM:")?,
            kept: kept(keeper)?,
        })
    }

    /// Waits until it has nothing to do; says how many seconds that took.
    fn rest(&mut self) -> Result<f64> {
        let start = Instant::now();
        let mut rested = start.elapsed();
        loop {
            let cpu = self.space.cpu_time();
            sleep(REST_WINDOW)?;
            let ended = self.process.ended()?;
            ensure!(ended.is_none(), "the gateway ended: {}", self.process.errors());
            if self.space.cpu_time() - cpu < REST_MAX {
                return Ok(rested.as_secs_f64());
            }
            rested = start.elapsed();
            ensure!(rested < REST_LIMIT, "the gateway does not come to rest");
        }
    }

    fn end(mut self) -> Result<()> {
        self.process.signal(rustix::process::Signal::TERM)?;
        let status = self.process.wait(Duration::from_secs(60))?;
        ensure!(status.success(), "the gateway ended with {status}: {}", self.process.errors());
        Ok(())
    }
}

/// A number of KiB in a file of `/proc`.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Bytes of the keeper's nameless files for who follows a data process.
fn kept(keeper: u32) -> Result<u64> {
    let mut sizes = Vec::new();
    for entry in fs::read_dir(format!("/proc/{keeper}/fd"))? {
        let path = entry?.path();
        // It may be closed by now.
        let Ok(target) = fs::read_link(&path) else { continue };
        if target.to_string_lossy().starts_with("/memfd:tidegate-memory")
            && let Ok(file) = fs::metadata(&path)
        {
            sizes.push((file.ino(), file.blocks() * 512));
        }
    }
    sizes.sort_unstable();
    sizes.dedup();
    Ok(sizes.into_iter().map(|(_, bytes)| bytes).sum())
}

fn sleep(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        lab::check_interrupted()?;
        thread::sleep(Duration::from_millis(50).min(end - Instant::now()));
    }
    Ok(())
}

/// Runs a shell's line, and says how long it took.
fn timed(space: &Space, line: &str) -> Result<f64> {
    timed_with_cpu(space, line).map(|(took, _)| took)
}

/// As [`timed`], with the CPU time of what the shell ran.
fn timed_with_cpu(space: &Space, line: &str) -> Result<(f64, f64)> {
    let script =
        format!("set -e; start=$(date +%s.%N); {line}; date +\"took $start %s.%N\"; times");
    let mut command = space.command("sh");
    command.args(["-c", &script]);
    let said = space.spawn("sh", &mut command)?.finish(STEP_LIMIT).context(line.to_owned())?;
    parse_times(&said).with_context(|| format!("reading the times of `{line}`: {said}"))
}

/// From `took BEGIN END` on, and the second line of `times`, which is of children.
fn parse_times(said: &str) -> Option<(f64, f64)> {
    let mut lines = said.lines().skip_while(|line| !line.starts_with("took "));
    let mut ends = lines.next()?.split_whitespace().skip(1).map(str::parse::<f64>);
    let (begin, end) = (ends.next()?.ok()?, ends.next()?.ok()?);
    let of_children = lines.nth(1)?.split_whitespace().map(|time| {
        let (minutes, seconds) = time.strip_suffix('s')?.split_once('m')?;
        Some(minutes.parse::<f64>().ok()? * 60.0 + seconds.parse::<f64>().ok()?)
    });
    Some((end - begin, of_children.sum::<Option<f64>>()?))
}

fn interface() -> String {
    let key = BASE64_STANDARD.encode(PRIVATE_KEY);
    format!("[Interface]\nPrivateKey = {key}\nListenPort = {PORT}\n")
}

/// A file for wg(8) with these peers.
fn conf(options: &Options, numbers: std::ops::Range<u32>) -> String {
    let mut text = interface();
    for number in numbers {
        text += &section(options, number);
    }
    text
}

fn section(options: &Options, number: u32) -> String {
    let mut text = String::new();
    let key = BASE64_STANDARD.encode(public_key(options.seed, number));
    let address = address(number, options.spread);
    write!(text, "[Peer]\nPublicKey = {key}\nAllowedIPs = {address}/32\n")
        .expect("a string takes everything");
    if options.endpoints {
        text += "Endpoint = 198.51.100.2:9\n";
    }
    text
}

/// In 10.0.0.0/8; no other peer below two to the power of 22 has it.
fn address(number: u32, spread: bool) -> Ipv4Addr {
    const PEERS_MAX: u32 = 1 << 22;
    let number = number % PEERS_MAX;
    // An odd factor permutes the numbers.
    let host = if spread { number.wrapping_mul(0x9e37_79b1) % (1 << 24) } else { number + 1 };
    Ipv4Addr::from_bits(10 << 24 | host)
}

/// Bytes that nobody has the private key of, by splitmix64.
fn public_key(seed: u64, number: u32) -> [u8; 32] {
    let mut state = seed.rotate_left(32) ^ u64::from(number) << 3;
    let mut key = [0; 32];
    for word in key.chunks_exact_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(mixed ^ mixed >> 31).to_le_bytes());
    }
    key
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_peers_have_a_key_or_an_address() {
        for spread in [false, true] {
            let addresses: HashSet<_> =
                (0..300_000).map(|number| address(number, spread)).collect();
            assert_eq!(addresses.len(), 300_000);
            assert!(addresses.iter().all(|address| address.octets()[0] == 10));
        }
        let keys: HashSet<_> = (0..100_000).map(|number| public_key(1, number)).collect();
        assert_eq!(keys.len(), 100_000);
        assert!(!keys.contains(&public_key(2, 7)), "another seed, others");
    }

    #[test]
    fn times_are_read_as_shells_print_them() {
        let said = "7\ntook 1764.5 1766.75\n0m0.001s 0m0.00s\n1m0.500000s 0m0.250000s\n";
        assert_eq!(parse_times(said), Some((2.25, 60.75)));
        assert_eq!(parse_times("took 1764.5 1766.75\n"), None);
    }

    #[test]
    fn a_table_has_a_column_for_each_head() {
        let idle = Idle { peers: 7, up_s: Some(1.0), ..Idle::default() };
        let active = Active { peers: 2, packet_len: 512, one_pps: 200.0, all_pps: 100.0 };
        let report = Report { idle: vec![idle], active: Some(active), notes: Vec::new() };
        let table = table(&report);
        let bars: Vec<_> = table.lines().take(3).map(|line| line.matches('|').count()).collect();
        assert_eq!(bars, [16; 3], "{table}");
        assert!(table.contains("(0.50)"), "{table}");
    }
}
