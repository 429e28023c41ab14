//! The judge judged: boringtun at both ends, and the lab that carries it.
//!
//! ```text
//!  client: boringtun ══ outer ══ gateway: boringtun ── lan ── host: lab-tool
//! ```

use std::{path::Path, time::Duration};

use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, Programs, Tools, spawn_peer},
    lab::{self, HOST_V4, HOST_V6, Lab},
};

const LIMIT: Duration = Duration::from_secs(10);

fn programs() -> Programs {
    Programs {
        tidegate: Path::new("tidegate").to_owned(),
        peer: env!("CARGO_BIN_EXE_boringtun-peer").into(),
        tool: env!("CARGO_BIN_EXE_lab-tool").into(),
    }
}

#[test]
fn boringtun_carries_files_between_two_of_itself() {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED boringtun_carries_files_between_two_of_itself: {reason}");
        return;
    }
    let (lab, programs) = (Lab::new().unwrap(), programs());
    let interface = lab.interface('g');
    let conf = GATEWAY_CONF;
    let file = lab.write("gateway.conf", conf).unwrap();
    let mut command = lab.gateway.command(&programs.peer);
    let mut gateway = lab.gateway.spawn("gateway", command.arg(&interface).arg(file)).unwrap();
    gateway.event("ready", LIMIT).unwrap();
    lab.gateway.configure(&interface, conf).unwrap();

    let mut client = spawn_peer(&lab, &programs, CLIENT_CONF, &["--initiate"]).unwrap();
    let initiator = client.event("handshake", LIMIT).unwrap();
    let responder = gateway.event("handshake", LIMIT).unwrap();
    assert_eq!(
        (&initiator["role"], &responder["role"]),
        (&"initiator".into(), &"responder".into())
    );

    for to in [HOST_V4, HOST_V6] {
        let ping = lab.client.ping(to, 3, &[]).unwrap();
        assert_eq!(ping.answered, 3, "{to}");
    }
    let tools = Tools::start(&lab, &programs).unwrap();
    let transfers = tools.files(2 << 20).unwrap();
    assert!(transfers.iter().all(|transfer| transfer.equal), "{transfers:?}");
    for direction in ["up", "down"] {
        let (mbit_s, packets_per_s) = tools.load(direction, Duration::from_secs(1)).unwrap();
        println!("{direction}: {mbit_s:.0} Mbit/s, {packets_per_s:.0} packets/s");
        assert!(mbit_s > 0.0 && packets_per_s > 0.0);
    }
}

#[test]
fn a_lab_leaves_nothing_behind() {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED a_lab_leaves_nothing_behind: {reason}");
        return;
    }
    let lab = Lab::new().unwrap();
    let names: Vec<_> = lab.spaces().iter().map(|space| space.name().to_owned()).collect();
    let folder = lab.path("");
    // One that is waited for, and one that has left us, as a daemon does.
    let mut command = lab.host.command("sleep");
    let mut child = lab.host.spawn("sleep", command.arg("600")).unwrap();
    lab.host.run("setsid", &["--fork", "sh", "-c", "exec sleep 600 >/dev/null 2>&1"]).unwrap();
    let all = lab.host.run("ip", &["netns", "pids", &names[2]]).unwrap();
    assert!(all.lines().count() >= 2, "{all}");
    drop(lab);
    assert!(child.ended().unwrap().is_some());
    assert!(!folder.exists());
    for name in names {
        assert!(!Path::new("/run/netns").join(&name).exists(), "{name}");
    }
    for pid in all.split_whitespace() {
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        assert!(!command.starts_with("sleep"), "{pid} is still there");
    }
}
