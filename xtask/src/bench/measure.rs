//! Carries a plan out: round by round, everybody in turn, on hosts of their own.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{
    hosts::{Device, Hosts, Keys, LOAD_NETWORK, LOAD_SOURCES, PORT},
    implementations::Implementation,
    machine::{Away, CoreWatch, Cores, Machine, online_core_count, stay_on},
    noise::{Spin, Steal},
    plan::{Client, Offloads, Plan, order},
    progress::Progress,
    raw::{FORMAT, Raw, Round, Sample, Turn},
    rows::{ECHO_LOAD_MBIT_S, Measurement, Row, Size, Way},
};
use crate::{
    demonstration::DataPath,
    lab::{self, GATEWAY_V4, HOST_V4, LAN, OUTER, Process, Space},
};

/// How long loops spin on all cores: before the first round, and before each turn.
const SPIN_FIRST: Duration = Duration::from_millis(1000);
const SPIN: Duration = Duration::from_millis(200);
/// What is estimated for the hosts of a turn, for a gateway on them, and for what surrounds a measurement.
const HOSTS_TAKE: Duration = Duration::from_millis(1300);
const GATEWAY_TAKES: Duration = Duration::from_millis(700);
const SURROUNDINGS_TAKE: Duration = Duration::from_millis(250);
/// What sealing in advance takes, by the length of the flood.
const SEALING_TAKES: u32 = 1;
/// How long something may take beside what it is meant to take.
const PATIENCE: Duration = Duration::from_secs(12);
/// TCP port of the LAN host's server.
const TCP_PORT: u16 = 7007;
/// Echoes per second.
const ECHO_RATE: u32 = 500;
/// Peers of a flood, and of a storm of handshakes; a gateway takes few initiations of one.
const FLOOD_PEERS: u32 = 1;
const HANDSHAKE_PEERS: u32 = 1000;
/// What the keys of such peers are derived from.
const SEED: &str = "9";
/// Packets are sealed in advance for a flood that is as fast, in packets per second, unless they took more
/// memory, in MiB.
const SEALED_FOR: f64 = 1.5e6;
const SEALED_MIB_MAX: f64 = 512.0;
/// Characters of a failure that are kept.
const FAILURE_LEN: usize = 300;

/// What everybody's turn needs.
struct Bench<'a> {
    plan: &'a Plan,
    measurements: Vec<Measurement>,
    rows: Vec<Row>,
    cores: Cores,
    tools: Tools,
}

/// Programs that put load on.
struct Tools {
    tidegate: PathBuf,
    tcp: PathBuf,
    load: Option<PathBuf>,
}

impl Tools {
    fn in_folder(folder: &Path) -> Result<Tools> {
        let there = |name: &str| Some(folder.join(name)).filter(|path| path.is_file());
        let needed = |name: &str| {
            there(name).with_context(|| format!("there is no {} in {}", name, folder.display()))
        };
        Ok(Tools {
            tidegate: needed("tidegate")?,
            tcp: needed("lab-tool")?,
            load: there("tidegate-load"),
        })
    }

    fn load(&self) -> Result<&Path> {
        self.load.as_deref().context("there is no tidegate-load")
    }
}

/// What is needed of a gateway to measure something.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// A tunnel from the client to the LAN host.
    Through,
    /// The peers of a flood.
    Flood,
    /// The peers of a storm.
    Storm,
}

impl Stage {
    const ALL: [Stage; 3] = [Stage::Through, Stage::Flood, Stage::Storm];

    fn of(measurement: Measurement) -> Stage {
        match measurement {
            Measurement::Tcp(..) | Measurement::Echo { .. } => Stage::Through,
            Measurement::Flood(_) => Stage::Flood,
            Measurement::Handshakes => Stage::Storm,
        }
    }

    /// Of its gateway's interface.
    fn suffix(self) -> char {
        match self {
            Stage::Through => 't',
            Stage::Flood => 'f',
            Stage::Storm => 's',
        }
    }
}

/// What something is estimated to take.
fn estimate(measurement: Measurement, plan: &Plan) -> Duration {
    let length = measurement.duration(&plan.lengths);
    let sealing = match measurement {
        Measurement::Flood(_) => length * SEALING_TAKES,
        _ => Duration::ZERO,
    };
    length + sealing + SURROUNDINGS_TAKE
}

/// What one turn of everybody is estimated to take.
///
/// # Errors
/// If the plan makes no sense.
pub fn estimate_round(plan: &Plan) -> Result<Duration> {
    let measurements = plan.measurements()?;
    let has_load = Tools::in_folder(&plan.programs)?.load.is_some();
    let turn = |implementation: &Implementation| {
        let made = measurements
            .iter()
            .filter(|&&measurement| why_not(measurement, implementation, has_load).is_none());
        let mut all = HOSTS_TAKE + SPIN;
        for stage in Stage::ALL {
            let of_stage = made.clone().filter(|&&measurement| Stage::of(measurement) == stage);
            let sum: Duration = of_stage.map(|&measurement| estimate(measurement, plan)).sum();
            if !sum.is_zero() {
                all += sum + GATEWAY_TAKES;
            }
        }
        all
    };
    Ok(plan.implementations.iter().map(turn).sum())
}

/// Why something is not tried, if it is not.
fn why_not(
    measurement: Measurement,
    implementation: &Implementation,
    has_load: bool,
) -> Option<&'static str> {
    let needs_tunnel = Stage::of(measurement) != Stage::Through;
    let needs_load = !matches!(measurement, Measurement::Tcp(..));
    if needs_tunnel && implementation.device.is_none() {
        Some("there is no tunnel to be loaded")
    } else if needs_load && !has_load {
        Some("there is no tidegate-load")
    } else {
        None
    }
}

/// Measures; `keep` is called after each round with all that there is.
///
/// # Errors
/// If hosts cannot be made, or a signal comes before a round is complete: afterwards it is a note.
pub fn measure(plan: &Plan, date: String, keep: &mut dyn FnMut(&Raw) -> Result<()>) -> Result<Raw> {
    lab::catch_signals()?;
    let measurements = plan.measurements()?;
    let cores = Cores::choose()?;
    let machine = Machine::look()?;
    let rows: Vec<_> = measurements.iter().flat_map(|measurement| measurement.rows()).collect();
    let tools = Tools::in_folder(&plan.programs)?;
    let bench = Bench { plan, measurements, rows, cores, tools };
    let mut raw = Raw {
        format: FORMAT,
        date,
        command: plan.command.clone(),
        commit: plan.commit.clone(),
        machine,
        setup: bench.setup(),
        rows: bench.rows.clone(),
        columns: plan.implementations.iter().map(|one| one.column.clone()).collect(),
        before: Spin::on(&bench.cores.all(), SPIN_FIRST)?,
        rounds: Vec::new(),
        notes: plan.notes.clone(),
    };
    stay_on(&bench.cores.others)?;
    let round_takes = estimate_round(plan)?;
    let mut progress = Progress::new(round_takes * plan.rounds);
    let begun = Instant::now();
    let mut longest = Duration::ZERO;
    for number in 0..plan.rounds {
        let limit = plan.limit_s.map(Duration::from_secs_f64);
        if number > 0 && limit.is_some_and(|limit| begun.elapsed() + longest > limit) {
            raw.notes.push(format!(
                "{number} of {} rounds were made: another one would have taken too long.",
                plan.rounds
            ));
            break;
        }
        let since = Instant::now();
        match bench.round(number, &mut progress) {
            Ok(round) => raw.rounds.push(round),
            Err(_) if number > 0 && lab::check_interrupted().is_err() => {
                raw.notes.push(format!("Interrupted after {number} of {} rounds.", plan.rounds));
                break;
            }
            Err(error) => return Err(error),
        }
        longest = longest.max(since.elapsed());
        keep(&raw)?;
    }
    keep(&raw)?;
    Ok(raw)
}

impl Bench<'_> {
    /// What was done, for people.
    fn setup(&self) -> Vec<String> {
        let Cores { gateway, others } = &self.cores;
        let others: Vec<_> = others.iter().map(usize::to_string).collect();
        let others = others.join(", ");
        let mut setup = vec![
            "Client, gateway and LAN host are network namespaces, joined by veth pairs.".to_owned(),
            match self.cores.are_apart() {
                true => format!(
                    "The gateway's processes and the receive work of its links have core {gateway}; everything \
                     else, both ends of the load as well, has the others ({others}). Where those are busy, figures \
                     bound the gateway's from below."
                ),
                false => "There is one core, for the gateway and for all load.".to_owned(),
            },
            match self.plan.offloads {
                Offloads::Off => "Segmentation and receive offloads of the links are off: packets of the MTU's \
                                  size cross them."
                    .to_owned(),
                Offloads::On => "Offloads of the links are on: super-packets cross them whole, which no wire \
                                 does."
                    .to_owned(),
            },
            match self.plan.client {
                Client::Tidegate => "The client's end is tidegate with sockets in every column.".to_owned(),
                Client::Same => "The client's end is the same as the gateway.".to_owned(),
            },
            "\"core\": all that the gateway's core did, the kernel's receive work as well, whoever it was for \
             (time that was neither idle nor stolen, by `/proc/stat`); \"process\": user and system time of the \
             gateway's processes alone. A gigabyte is 10⁹ bytes of TCP payload, by its receiver."
                .to_owned(),
            "Everybody has a turn in each round, and the order changes; each turn has hosts of its own, and a \
             gateway that was just started."
                .to_owned(),
        ];
        let has = |stage| self.measurements.iter().any(|&one| Stage::of(one) == stage);
        if has(Stage::Flood) {
            setup.push(format!(
                "Floods are packets of {FLOOD_PEERS} peer that were sealed in advance, sent by sockets as fast \
                 as they go, and counted where they reach the LAN host; sizes are those of the inner IP packets."
            ));
        }
        if has(Stage::Storm) {
            setup.push(format!(
                "Handshakes are those of {HANDSHAKE_PEERS} peers, each with an address of its own, as many at \
                 once as are answered."
            ));
        }
        if self.measurements.iter().any(|one| matches!(one, Measurement::Echo { .. })) {
            setup.push(format!(
                "Echoes are UDP, {ECHO_RATE} a second, timed from when each was to be sent."
            ));
        }
        setup
    }

    fn round(&self, number: u32, progress: &mut Progress) -> Result<Round> {
        let mut round = Round::default();
        for index in order(number, self.plan.implementations.len()) {
            let implementation = &self.plan.implementations[index];
            let title = &implementation.column.title;
            progress.turn(format!("round {} of {}, {title}", number + 1, self.plan.rounds));
            round.turns.push(self.turn(implementation, progress)?);
        }
        Ok(round)
    }

    fn turn(&self, implementation: &Implementation, progress: &mut Progress) -> Result<Turn> {
        let begun = Instant::now();
        progress.step("how quiet the machine is", SPIN);
        let before = Spin::on(&self.cores.all(), SPIN)?;
        progress.step("hosts", HOSTS_TAKE);
        let hosts = Hosts::new(&self.cores, self.plan.offloads)?;
        let (since, away) = (Instant::now(), Away::of(None)?);
        let mut taken = Taken::default();
        for stage in Stage::ALL {
            self.stage(stage, implementation, &hosts, &mut taken, progress)?;
        }
        let stolen = Away::of(None)?.since(away).stolen;
        let seconds = since.elapsed().as_secs_f64() * online_core_count()? as f64;
        let steal = Steal { seconds, stolen_s: stolen.as_secs_f64() };
        drop(hosts);
        Ok(Turn {
            column: implementation.column.name.clone(),
            before,
            steal,
            seconds: begun.elapsed().as_secs_f64(),
            samples: taken.samples,
            details: taken.details,
        })
    }

    /// Makes the measurements of a stage. What goes wrong is a sample; only a signal is an error.
    fn stage(
        &self,
        stage: Stage,
        implementation: &Implementation,
        hosts: &Hosts,
        taken: &mut Taken,
        progress: &mut Progress,
    ) -> Result<()> {
        let mut measurements = Vec::new();
        for &measurement in &self.measurements {
            if Stage::of(measurement) != stage {
                continue;
            }
            match why_not(measurement, implementation, self.tools.load.is_some()) {
                Some(why) => taken.all(measurement, &Sample::NotMeasured(why.to_owned())),
                None => measurements.push(measurement),
            }
        }
        if measurements.is_empty() {
            return Ok(());
        }
        progress.step("the gateway comes up", GATEWAY_TAKES);
        let mut measurements = measurements.into_iter();
        let mut failed = match Running::start(self, stage, implementation, hosts) {
            Err(error) => Some(error.context("it does not come up")),
            Ok(mut running) => {
                let mut failed = None;
                for measurement in measurements.by_ref() {
                    progress.step(&measurement.name(), estimate(measurement, self.plan));
                    match running.measure(measurement) {
                        Ok(figures) => taken.figures(measurement, figures),
                        Err(error) => {
                            lab::check_interrupted()?;
                            taken.all(measurement, &Sample::Failed(brief(&error)));
                            // Whether it is worth while to go on.
                            failed = running.check().err();
                        }
                    }
                    if failed.is_some() {
                        break;
                    }
                }
                failed
            }
        };
        lab::check_interrupted()?;
        for measurement in measurements {
            progress.skip(estimate(measurement, self.plan));
            let why = failed.get_or_insert_with(|| anyhow::anyhow!("nothing was said"));
            taken.all(measurement, &Sample::Failed(brief(why)));
        }
        Ok(())
    }
}

/// What a turn gave.
#[derive(Default)]
struct Taken {
    samples: BTreeMap<String, Sample>,
    details: BTreeMap<String, Value>,
}

impl Taken {
    /// The same for all rows of a measurement.
    fn all(&mut self, measurement: Measurement, sample: &Sample) {
        for row in measurement.rows() {
            self.samples.insert(row.id, sample.clone());
        }
    }

    fn figures(&mut self, measurement: Measurement, figures: Figures) {
        let Figures { samples, details } = figures;
        for (row, sample) in measurement.rows().into_iter().zip(samples) {
            let sample = match sample {
                Sample::Value(value) if !value.is_finite() => {
                    Sample::Failed(format!("{value} was measured"))
                }
                sample => sample,
            };
            self.samples.insert(row.id, sample);
        }
        self.details.insert(measurement.name(), details);
    }
}

/// What a measurement gave.
struct Figures {
    /// In the order of its rows.
    samples: Vec<Sample>,
    /// What else was said.
    details: Value,
}

/// Memory for the packets of a flood, in MiB.
fn sealed_mib(size: Size, length: Duration) -> u32 {
    /// With what is around an inner packet, and what IMIX is in the mean.
    const AROUND: f64 = 48.0;
    const IMIX: f64 = 344.0;
    let packet = AROUND
        + match size {
            Size::Bytes(bytes) => f64::from(bytes),
            Size::Imix => IMIX,
        };
    let mib = SEALED_FOR * length.as_secs_f64() * packet / f64::from(1 << 20);
    mib.ceil().clamp(1.0, SEALED_MIB_MAX) as u32
}

/// An error on one line, not too long.
fn brief(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    let words: Vec<_> = text.split_whitespace().collect();
    let text = words.join(" ");
    match text.char_indices().nth(FAILURE_LEN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A gateway that is ready to be measured, and what else runs for it.
struct Running<'a> {
    bench: &'a Bench<'a>,
    hosts: &'a Hosts,
    stage: Stage,
    keys: Keys,
    gateway: Option<Device>,
    _client: Option<Device>,
    /// On the LAN host.
    _servers: Vec<Process>,
}

impl<'a> Running<'a> {
    fn start(
        bench: &'a Bench<'a>,
        stage: Stage,
        implementation: &Implementation,
        hosts: &'a Hosts,
    ) -> Result<Running<'a>> {
        let (keys, client) = (Keys::new()?, Keys::new()?);
        let gateway = match &implementation.device {
            None => None,
            Some(device) => {
                let peers = match stage {
                    Stage::Through => Hosts::client_peer(&client),
                    Stage::Flood => bench.peers(&hosts.lab.client, FLOOD_PEERS)?,
                    Stage::Storm => bench.peers(&hosts.lab.client, HANDSHAKE_PEERS)?,
                };
                let gateway = hosts.start_gateway(device, stage.suffix(), &keys, &peers)?;
                if device.is_xdp {
                    bench.check_mode(&hosts.lab.gateway, &gateway)?;
                }
                Some(gateway)
            }
        };
        let (mut servers, mut client_end) = (Vec::new(), None);
        if stage == Stage::Through {
            match (&implementation.device, bench.plan.client) {
                (None, _) => hosts.forward_plainly()?,
                (Some(device), Client::Same) => {
                    client_end = Some(hosts.start_client(device, &client, &keys)?);
                }
                (Some(_), Client::Tidegate) => {
                    let device = Implementation::client(&bench.tools.tidegate);
                    client_end = Some(hosts.start_client(&device, &client, &keys)?);
                }
            }
            let host = &hosts.lab.host;
            let mut serve = host.command(&bench.tools.tcp);
            serve.arg("serve").arg(TCP_PORT.to_string()).arg(hosts.lab.path(""));
            let mut server = host.spawn("lab-tool-serve", &mut serve)?;
            server.event("ready", PATIENCE)?;
            servers.push(server);
            if let Some(load) = &bench.tools.load {
                let mut echo = host.command(load);
                servers.push(host.spawn("echo", echo.args(["echo", "--listen", HOST_V4]))?);
            }
            hosts.wait_for_answer(PATIENCE)?;
        }
        let _client = client_end;
        Ok(Running { bench, hosts, stage, keys, gateway, _client, _servers: servers })
    }

    /// An error if it is of no use any more.
    fn check(&mut self) -> Result<()> {
        if let Some(gateway) = &mut self.gateway {
            gateway.check()?;
        }
        if self.stage == Stage::Through {
            self.hosts
                .wait_for_answer(Duration::from_secs(3))
                .context("it does not answer any more")?;
        }
        Ok(())
    }

    fn measure(&mut self, measurement: Measurement) -> Result<Figures> {
        let length = measurement.duration(&self.bench.plan.lengths);
        let figures = match measurement {
            Measurement::Tcp(way, streams) => self.tcp(way, streams, length),
            Measurement::Echo { loaded } => self.echo(loaded, length),
            Measurement::Flood(size) => self.flood(size, length),
            Measurement::Handshakes => self.storm(length),
        }?;
        // A gateway that went down under load has not carried it.
        if let Some(gateway) = &mut self.gateway {
            gateway.check()?;
        }
        Ok(figures)
    }

    fn tcp(&self, way: Way, streams: u8, length: Duration) -> Result<Figures> {
        let client = &self.hosts.lab.client;
        let watch = Watch::start(self)?;
        let mut loads = Vec::new();
        for _ in 0..streams {
            loads.push(self.spawn_tcp(way, length, None)?);
        }
        let (mut bytes, mut mbit_s) = (0, 0.0);
        for load in loads {
            let received: Value = serde_json::from_str(&load.finish(length + PATIENCE)?)?;
            bytes += received["bytes"].as_u64().context("bytes of a stream")?;
            mbit_s += received["mbit_s"].as_f64().context("Mbit/s of a stream")?;
        }
        let used = watch.used()?;
        ensure!(bytes > 0, "nothing was carried for {}", client.name());
        let gigabytes = bytes as f64 / 1e9;
        Ok(Figures {
            samples: vec![
                Sample::Value(mbit_s / 1e3),
                used.core(gigabytes),
                used.process(gigabytes),
            ],
            details: json!({ "bytes": bytes, "core_busy": used.core_busy() }),
        })
    }

    /// A stream of `lab-tool`; `mbit_s` holds it back.
    fn spawn_tcp(&self, way: Way, length: Duration, mbit_s: Option<u32>) -> Result<Process> {
        let client = &self.hosts.lab.client;
        let mut command = client.command(&self.bench.tools.tcp);
        command.arg("load").arg(format!("{HOST_V4}:{TCP_PORT}")).arg(way.word());
        command.arg(length.as_millis().to_string());
        if let Some(mbit_s) = mbit_s {
            command.arg("--mbit-s").arg(mbit_s.to_string());
        }
        client.spawn("lab-tool", &mut command)
    }

    fn echo(&self, is_loaded: bool, length: Duration) -> Result<Figures> {
        /// Until the stream beside it has begun, and after which it still goes on.
        const MARGIN: Duration = Duration::from_millis(300);
        let stream = match is_loaded {
            true => Some(self.spawn_tcp(Way::Up, length + 4 * MARGIN, Some(ECHO_LOAD_MBIT_S))?),
            false => None,
        };
        if is_loaded {
            std::thread::sleep(MARGIN);
        }
        let (seconds, rate) = (length.as_secs_f64().to_string(), ECHO_RATE.to_string());
        let report = self
            .load(&["latency", "--to", HOST_V4, "--seconds", &seconds, "--rate", &rate], length)?;
        let carried = match stream {
            Some(stream) => serde_json::from_str(&stream.finish(length + PATIENCE)?)?,
            None => Value::Null,
        };
        let percentile = |name: &str| {
            let value = report.pointer(&format!("/latency_us/{name}")).and_then(Value::as_f64);
            value.map(Sample::Value).context("no echo came back")
        };
        Ok(Figures {
            samples: vec![percentile("p50")?, percentile("p99")?],
            details: json!({ "latency": report, "beside": carried }),
        })
    }

    fn flood(&self, size: Size, length: Duration) -> Result<Figures> {
        let host = &self.hosts.lab.host;
        let socket = self.hosts.lab.path("counter.sock");
        let mut count = host.command(self.bench.tools.load()?);
        count.args(["count", "--nic", LAN, "--socket"]).arg(&socket);
        let mut counter = host.spawn("count", &mut count)?;
        lab::wait_for("the counter", PATIENCE, || {
            ensure!(counter.ended()?.is_none(), "the counter ended: {}", counter.errors());
            Ok(socket.exists().then_some(()))
        })?;
        let watch = Watch::start(self)?;
        let (to, seconds) = (format!("{GATEWAY_V4}:{PORT}"), length.as_secs_f64().to_string());
        let (word, peers) = (size.word(), FLOOD_PEERS.to_string());
        let arguments = [
            ["flood", "--to", &to, "--server-key", &self.keys.public, "--nic", OUTER],
            ["--peers", &peers, "--size", &word, "--dst", HOST_V4, "--pps=max"],
        ];
        let mut arguments = arguments.concat();
        let counter_path = socket.to_string_lossy();
        arguments.extend(["--seed", SEED, "--network", LOAD_NETWORK, "--seconds", &seconds]);
        let memory = sealed_mib(size, length).to_string();
        arguments.extend(["--memory", &memory, "--patience", "5", "--counter", &counter_path]);
        let report = self.load(&arguments, length * (1 + 8 * SEALING_TAKES));
        let used = watch.used()?;
        counter.signal(Signal::TERM)?;
        counter.finish(PATIENCE)?;
        let report = report?;
        let number = |path: &str| report.pointer(path).and_then(Value::as_f64);
        let delivered = number("/delivered/packets").context("what the counter saw")?;
        let seconds = number("/seconds").context("how long the flood took")?;
        ensure!(delivered > 0.0 && seconds > 0.0, "nothing of the flood was delivered");
        // In µs for each packet, as in seconds for a million.
        let millions = delivered / 1e6;
        Ok(Figures {
            samples: vec![
                Sample::Value(delivered / seconds / 1e3),
                used.core(millions),
                used.process(millions),
            ],
            details: report,
        })
    }

    fn storm(&self, length: Duration) -> Result<Figures> {
        let watch = Watch::start(self)?;
        let (to, seconds) = (format!("{GATEWAY_V4}:{PORT}"), length.as_secs_f64().to_string());
        let count = HANDSHAKE_PEERS.to_string();
        let arguments = [
            ["handshakes", "--to", &to, "--server-key", &self.keys.public, "--nic", OUTER],
            ["--count", &count, "--seed", SEED, "--network", LOAD_NETWORK, "--seconds"],
        ];
        let mut arguments = arguments.concat();
        arguments.extend([seconds.as_str(), "--from", LOAD_SOURCES]);
        let report = self.load(&arguments, length * 4)?;
        let used = watch.used()?;
        let number = |name: &str| report[name].as_f64();
        let answered = number("answered").context("how many were answered")?;
        let per_second = number("answered_per_second").context("how many a second")?;
        ensure!(answered > 0.0, "no initiation was answered");
        Ok(Figures {
            samples: vec![Sample::Value(per_second), used.core(answered / 1e6)],
            details: report,
        })
    }

    /// Runs `tidegate-load` at the client, and gives its report.
    fn load(&self, arguments: &[&str], length: Duration) -> Result<Value> {
        let client = &self.hosts.lab.client;
        let mut command = client.command(self.bench.tools.load()?);
        let load = client.spawn("tidegate-load", command.args(arguments))?;
        serde_json::from_str(&load.finish(length + PATIENCE)?).context("what tidegate-load prints")
    }
}

impl Bench<'_> {
    /// The sections of synthetic peers.
    fn peers(&self, space: &Space, count: u32) -> Result<String> {
        let count = count.to_string();
        let arguments = ["--count", &count, "--seed", SEED, "--network", LOAD_NETWORK];
        space.run(self.tools.load()?, &[&["peers"], &arguments[..]].concat())
    }

    /// An error unless datagrams come by XDP.
    fn check_mode(&self, space: &Space, gateway: &Device) -> Result<()> {
        let DataPath { mode, reason, .. } =
            DataPath::of(space, &self.tools.tidegate, &gateway.interface)?;
        ensure!(mode == "native", "it runs in mode {mode}: {}", reason.unwrap_or_default());
        Ok(())
    }
}

/// A stopwatch for the CPU of the gateway.
struct Watch<'a> {
    running: &'a Running<'a>,
    core: CoreWatch,
    processes: Duration,
}

impl<'a> Watch<'a> {
    fn start(running: &'a Running<'a>) -> Result<Watch<'a>> {
        // First what takes time to find out.
        let processes = running.hosts.lab.gateway.cpu_time();
        Ok(Watch { running, processes, core: CoreWatch::start(running.hosts.cores.gateway)? })
    }

    fn used(&self) -> Result<Used> {
        let (core, elapsed) = self.core.busy()?;
        let processes = self.running.hosts.lab.gateway.cpu_time().saturating_sub(self.processes);
        Ok(Used {
            core: self.running.hosts.cores.are_apart().then_some(core),
            elapsed,
            processes: self.running.gateway.is_some().then_some(processes),
        })
    }
}

/// CPU of the gateway.
struct Used {
    /// Of its core, if that is its alone.
    core: Option<Duration>,
    elapsed: Duration,
    /// Of its processes, if it has some.
    processes: Option<Duration>,
}

impl Used {
    /// Of the core, for each of so many.
    fn core(&self, count: f64) -> Sample {
        match self.core {
            Some(core) => Sample::Value(core.as_secs_f64() / count),
            None => Sample::NotMeasured("the gateway has no core for itself".to_owned()),
        }
    }

    fn process(&self, count: f64) -> Sample {
        match self.processes {
            Some(processes) => Sample::Value(processes.as_secs_f64() / count),
            None => Sample::NotMeasured("the kernel forwards, without a process".to_owned()),
        }
    }

    /// The part of the time that the core was busy, beginnings and ends included.
    fn core_busy(&self) -> Option<f64> {
        Some(self.core?.as_secs_f64() / self.elapsed.as_secs_f64().max(1e-6))
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn failures_are_one_line_and_not_too_long() {
        let error = anyhow!("a\n  b\tc").context("it does not come up");
        assert_eq!(brief(&error), "it does not come up: a b c");
        let long = brief(&anyhow!("é".repeat(5000)));
        assert_eq!(long.chars().count(), FAILURE_LEN + 1);
        assert!(long.ends_with("é…"));
    }

    #[test]
    fn no_more_is_sealed_than_is_sent() {
        let mib = |size, ms| sealed_mib(size, Duration::from_millis(ms));
        // 1.5 million packets of 112 bytes.
        assert_eq!(mib(Size::Bytes(64), 1000), 161);
        assert_eq!(mib(Size::Bytes(1372), 1500), 512);
        assert_eq!((mib(Size::Imix, 1), mib(Size::Imix, 0)), (1, 1));
    }

    #[test]
    fn numbers_that_are_none_are_failures() {
        let mut taken = Taken::default();
        let samples =
            vec![Sample::Value(f64::NAN), Sample::Value(f64::INFINITY), Sample::Value(1.0)];
        taken.figures(Measurement::Tcp(Way::Up, 1), Figures { samples, details: Value::Null });
        assert_eq!(taken.samples["tcp_up_1"], Sample::Failed("NaN was measured".to_owned()));
        assert_eq!(taken.samples["tcp_up_1_core"], Sample::Failed("inf was measured".to_owned()));
        assert_eq!(taken.samples["tcp_up_1_process"], Sample::Value(1.0));
    }

    #[test]
    fn cpu_is_told_only_where_it_means_something() {
        let second = Duration::from_secs(1);
        let used = Used { core: Some(second), elapsed: 2 * second, processes: None };
        assert_eq!(used.core(4.0), Sample::Value(0.25));
        assert_eq!(used.core_busy(), Some(0.5));
        assert!(matches!(used.process(4.0), Sample::NotMeasured(_)));
        let used = Used { core: None, elapsed: second, processes: Some(second) };
        assert!(matches!(used.core(4.0), Sample::NotMeasured(_)));
        assert_eq!((used.process(2.0), used.core_busy()), (Sample::Value(0.5), None));
    }

    #[test]
    fn without_a_tunnel_or_the_tool_it_is_said_why() {
        let (ours, _) = super::super::implementations::find(
            Path::new("/nowhere/tidegate"),
            &["tidegate".to_owned(), "none".to_owned()],
        )
        .unwrap();
        let why =
            |measurement, index: usize, has_load| why_not(measurement, &ours[index], has_load);
        for measurement in Measurement::ALL {
            assert_eq!(why(measurement, 0, true), None);
            let is_through = Stage::of(measurement) == Stage::Through;
            assert_eq!(why(measurement, 1, true).is_none(), is_through, "{measurement:?}");
            let is_tcp = matches!(measurement, Measurement::Tcp(..));
            assert_eq!(why(measurement, 0, false).is_none(), is_tcp, "{measurement:?}");
        }
    }
}
