//! The load generator against a real gateway, with its counter behind it.
//!
//! ```text
//!  client                                gateway                    LAN host
//!  tidegate-load: 50 peers ═══ outer ═══ tidegate ────── lan ────── tidegate-load count, echo
//!  boringtun-peer ════════════════════════╯
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use benches::load::{CountReport, FloodReport, LatencyReport, LossFreeReport, StormReport};
use rustix::process::Signal;
use serde::de::DeserializeOwned;
use xtask::demonstration::{CLIENT_CONF, GATEWAY_CONF, Programs, spawn_peer};
use xtask::lab::{self, GATEWAY_V4, HOST_V4, LAN, Lab, OUTER, Process, Space};

const LIMIT: Duration = Duration::from_secs(20);
/// Time for handshakes with a gateway that was not optimised, beside other tests.
const FLOOD_LIMIT: Duration = Duration::from_secs(60);
const PEERS: u64 = 50;
const GATEWAY_KEY: &str = "HgkKTLOi6hnyGGlo573/Hewubk3cvOCiOUog61R7VD8=";

fn tool() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_tidegate-load"))
}

fn lab(test: &str) -> Option<Lab> {
    let reason = lab::unavailable()
        .or_else(|| lab::find_program("wg").is_none().then(|| "needs the program `wg`".to_owned()));
    if let Some(reason) = reason {
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    Some(Lab::new().unwrap())
}

/// Tidegate as a gateway.
fn gateway(lab: &Lab, programs: &Programs, options: &[&str]) -> Process {
    let interface = lab.interface('g');
    let mut command = lab.gateway.command(&programs.tidegate);
    command.args(["run", "-f", &interface]).args(options);
    configured(lab, &interface, &mut command)
}

/// Starts a gateway's daemon; it gets the client of the first tunnel and all synthetic peers.
fn configured(lab: &Lab, interface: &str, command: &mut Command) -> Process {
    let space = &lab.gateway;
    let mut process = space.spawn("gateway", command).unwrap();
    let ready = lab::wait_for("the gateway", LIMIT, || {
        anyhow::ensure!(process.ended()?.is_none(), "it ended");
        Ok(space.run("wg", &["show", interface]).ok())
    });
    ready.unwrap_or_else(|error| panic!("{error:#}: {}", process.errors()));
    let peers = space.run(tool(), &["peers", "--count", "50", "--seed", "7"]).unwrap();
    assert_eq!(peers.matches("[Peer]").count() as u64, PEERS);
    let own: Vec<_> = GATEWAY_CONF.lines().filter(|line| !line.starts_with("Address")).collect();
    let file = lab.write("gateway.set", &format!("{}\n{peers}", own.join("\n"))).unwrap();
    space.run("wg", &["setconf", interface, file.to_str().unwrap()]).unwrap();
    space.configure(interface, GATEWAY_CONF).unwrap();
    space.ip(&format!("route add 10.64.0.0/10 dev {interface}")).unwrap();
    // Else the first packets are lost while the neighbour is looked for.
    assert_eq!(space.ping(HOST_V4, 1, &[]).unwrap().answered, 1);
    process
}

fn programs() -> Programs {
    Programs::in_folder(tool().parent().unwrap()).unwrap()
}

/// A counter at the LAN host.
struct Counter {
    process: Process,
    path: PathBuf,
}

impl Counter {
    fn start(lab: &Lab) -> Self {
        let path = lab.path("count.sock");
        let mut command = lab.host.command(tool());
        command.args(["count", "--nic", LAN, "--socket"]).arg(&path);
        let mut process = lab.host.spawn("count", &mut command).unwrap();
        lab::wait_for("the counter", LIMIT, || {
            anyhow::ensure!(process.ended()?.is_none(), "it ended: {}", process.errors());
            Ok(path.exists().then_some(()))
        })
        .unwrap();
        Self { process, path }
    }

    fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }

    fn end(self) -> CountReport {
        self.process.signal(Signal::TERM).unwrap();
        let report = json(&self.process.finish(LIMIT).unwrap());
        assert!(!self.path.exists(), "the socket is left");
        report
    }
}

fn json<T: DeserializeOwned>(text: &str) -> T {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Runs the tool in a namespace; `arguments` are separated by blanks.
fn run<T: DeserializeOwned>(space: &Space, arguments: &str) -> T {
    json(&output(space, arguments).unwrap())
}

fn output(space: &Space, arguments: &str) -> anyhow::Result<String> {
    let mut command = space.command(tool());
    space.spawn("load", command.args(arguments.split_whitespace()))?.finish(FLOOD_LIMIT)
}

fn to_gateway(command: &str) -> String {
    format!("{command} --to {GATEWAY_V4}:51820 --server-key {GATEWAY_KEY} --seed 7 --nic {OUTER}")
}

fn flood(counter: &Counter, peers: u64, options: &str) -> String {
    format!(
        "{} --peers {peers} --dst {HOST_V4} --counter {} {options}",
        to_gateway("flood"),
        counter.path()
    )
}

#[test]
fn what_a_gateway_delivers_is_counted_to_the_packet() {
    let Some(lab) = lab("what_a_gateway_delivers_is_counted_to_the_packet") else { return };
    let programs = programs();
    let gateway = gateway(&lab, &programs, &["--mode", "udp"]);
    let counter = Counter::start(&lab);

    let mut expected = CountReport::default();
    for (size, peers, lens) in [
        ("64", 50, &[(64, 1)][..]),
        ("1372", 50, &[(1372, 1)]),
        // In a round of so many, sizes have just their parts.
        ("imix", 48, &[(64, 7), (576, 4), (1372, 1)]),
    ] {
        let options =
            format!("--size {size} --pps 4000 --seconds 0.6 --burst 8 --pid {}", gateway.pid());
        let report: FloodReport = run(&lab.client, &flood(&counter, peers, &options));
        assert_eq!((report.handshakes.count, report.packets), (peers as u32, 2400), "{report:?}");
        assert_eq!((report.by.as_str(), report.ports, report.burst), ("sockets", peers as u16, 8));
        let delivered = report.delivered.unwrap();
        assert_eq!((delivered.packets, delivered.lost), (2400, 0), "{report:?}");
        assert_eq!(report.cpu.len(), 1);
        for (len, part) in lens {
            let parts: u64 = lens.iter().map(|(_, part)| part).sum();
            *expected.by_size.entry(*len).or_default() += 2400 / parts * part;
        }
        expected.bytes += report.bytes;
    }

    // Runs that the gateway joined come as one, and are many all the same.
    let report: FloodReport = run(
        &lab.client,
        &flood(&counter, PEERS, "--size 512 --pps 4000 --seconds 0.5 --burst 20 --ports 3"),
    );
    assert_eq!((report.ports, report.delivered.unwrap().packets), (3, 2000), "{report:?}");
    *expected.by_size.entry(512).or_default() += 2000;
    expected.bytes += report.bytes;

    let (received_before, _) = lab.host.packets(LAN).unwrap();
    let count = counter.end();
    assert_eq!(count.packets, 3 * 2400 + 2000);
    assert_eq!((&count.by_size, count.bytes), (&expected.by_size, expected.bytes));
    assert!(count.buffers <= received_before && count.buffers < count.packets, "{count:?}");
}

#[test]
fn handshakes_and_round_trips_are_timed() {
    let Some(lab) = lab("handshakes_and_round_trips_are_timed") else { return };
    let programs = programs();
    let _gateway = gateway(&lab, &programs, &["--mode", "udp"]);

    let options = "--count 50 --seconds 1 --rate 100";
    let storm: StormReport = run(&lab.client, &format!("{} {options}", to_gateway("handshakes")));
    assert_eq!((storm.sent, storm.false_responses), (100, 0), "{storm:?}");
    assert!(storm.answered >= 90 && storm.verified == storm.answered, "{storm:?}");
    assert!(storm.latency_us.is_some());

    let mut peer = spawn_peer(&lab, &programs, CLIENT_CONF, &["--initiate"]).unwrap();
    peer.event("handshake", LIMIT).unwrap();
    let mut command = lab.host.command(tool());
    let echo = lab.host.spawn("echo", command.args(["echo", "--listen", HOST_V4])).unwrap();
    let inner = lab.interface('c');
    let ask = format!("latency --to {HOST_V4} --seconds 1 --rate 200 --nic {inner}");
    let report = lab::wait_for("the first echo", LIMIT, || {
        Ok(output(&lab.client, &ask).ok().map(|text| json::<LatencyReport>(&text)))
    })
    .unwrap();
    assert_eq!(report.sent, 200);
    assert!(report.received >= 190 && report.latency_us.unwrap().p50 > 0.0, "{report:?}");
    echo.signal(Signal::TERM).unwrap();
    let echoed: benches::load::EchoReport = json(&echo.finish(LIMIT).unwrap());
    assert!(echoed.echoed >= report.received);

    // By another way than the one that was named, nothing is sent.
    let (_, sent_before) = lab.client.packets(OUTER).unwrap();
    let by_other =
        to_gateway("handshakes").replace(&format!("--nic {OUTER}"), &format!("--nic {inner}"));
    let refused = output(&lab.client, &format!("{by_other} {options}")).unwrap_err().to_string();
    assert!(refused.contains(&format!("leaves by {OUTER}, not by {inner}")), "{refused}");
    for to in ["224.0.0.1:51820", "255.255.255.255:51820", "198.51.100.255:51820", "0.0.0.0:51820"]
    {
        let other = to_gateway("handshakes").replace(&format!("{GATEWAY_V4}:51820"), to);
        assert!(output(&lab.client, &format!("{other} {options}")).is_err(), "{to}");
    }
    let (_, sent_after) = lab.client.packets(OUTER).unwrap();
    assert!(sent_after - sent_before < 50, "{} packets left", sent_after - sent_before);
}

#[test]
fn another_implementation_takes_the_same_load() {
    const TEST: &str = "another_implementation_takes_the_same_load";
    let Some(lab) = lab(TEST) else { return };
    let Some(other) = lab::find_program("wireguard-go") else {
        eprintln!("SKIPPED {TEST}: needs the program `wireguard-go`");
        return;
    };
    let interface = lab.interface('w');
    let mut command = lab.gateway.command(other);
    let _gateway = configured(&lab, &interface, command.args(["-f", &interface]));
    let counter = Counter::start(&lab);
    let flood = flood(&counter, PEERS, "--size imix --pps 1000 --seconds 0.4");
    let first: FloodReport = run(&lab.client, &flood);
    assert_eq!(first.delivered.unwrap().packets, 400, "{first:?}");
    // Its timestamps are between those of the two floods.
    let options = "--count 50 --seconds 0.5 --rate 100";
    let storm: StormReport = run(&lab.client, &format!("{} {options}", to_gateway("handshakes")));
    assert!(storm.answered >= 40 && storm.verified == storm.answered, "{storm:?}");
    let second: FloodReport = run(&lab.client, &flood);
    assert_eq!(second.delivered.unwrap().packets, 400, "{second:?}");
    assert_eq!(counter.end().packets, 800);
}

#[test]
fn frames_past_the_stack_reach_a_gateway_once_each() {
    let Some(lab) = lab("frames_past_the_stack_reach_a_gateway_once_each") else { return };
    let programs = programs();
    let _gateway = gateway(&lab, &programs, &["--xdp", OUTER, "--mode", "native"]);
    let counter = Counter::start(&lab);

    let mut sent = 0;
    for size in ["64", "imix"] {
        let options = format!("--by live --size {size} --pps 4000 --seconds 0.6");
        let report: FloodReport = run(&lab.client, &flood(&counter, PEERS, &options));
        assert_eq!((report.by.as_str(), report.packets), ("live", 2400), "{report:?}");
        assert_eq!(report.burst, 1);
        assert!(report.seconds >= 0.55, "it was paced: {report:?}");
        assert_eq!(report.delivered.unwrap().packets, 2400, "{report:?}");
        sent += report.packets;
    }
    let options = "--by xsk --size 512 --pps 4000 --seconds 0.3";
    let report: FloodReport = run(&lab.client, &flood(&counter, PEERS, options));
    assert_eq!(
        (report.by.as_str(), report.packets, report.refused),
        ("xsk", 1200, 0),
        "{report:?}"
    );
    assert_eq!(report.delivered.unwrap().packets, 1200, "{report:?}");
    sent += report.packets;

    let options = "--by live --size 64 --pps max --seconds 0.5 --memory 8";
    let report: FloodReport = run(&lab.client, &flood(&counter, PEERS, options));
    assert!(report.sealed.bytes <= 8 << 20, "{report:?}");
    assert_eq!(report.packets, report.sealed.packets, "they are few");
    assert_eq!(report.ended, "packets");
    let delivered = report.delivered.unwrap().packets;
    assert!(delivered > 0 && delivered <= report.packets, "{report:?}");

    // The rate that is asked for at most is no burden.
    let loss_free = flood(&counter, PEERS, "--by live --size 64 --pps 3000 --seconds 0.3")
        .replace("flood", "loss-free");
    let found: LossFreeReport =
        run(&lab.client, &format!("{loss_free} --lowest 1500 --trials 1 --confirm 1 --loss 0.01"));
    // So few are no burden to the gateway; a busy machine may send fewer still.
    assert!(found.limited_by_sender && found.pps.is_none_or(|pps| pps >= 1500.0), "{found:?}");
    let trials = found.steps.iter().flat_map(|step| &step.trials);
    assert!(
        trials.clone().count() > 0 && trials.clone().all(|trial| trial.delivered == trial.sent),
        "{found:?}"
    );
    let in_trials: u64 =
        found.steps.iter().flat_map(|step| &step.trials).map(|trial| trial.delivered).sum();

    let unnamed = flood(&counter, PEERS, "--by live --size 64 --pps 10 --seconds 1")
        .replace(&format!("--nic {OUTER}"), "");
    let refused = output(&lab.client, &unnamed).unwrap_err().to_string();
    assert!(refused.contains("name the interface by --nic"), "{refused}");

    let count = counter.end();
    // Trials that were made again, since the sender was late, are not among the steps.
    assert!(count.packets >= sent + delivered + in_trials, "{count:?}");
}
