//! Several devices: in one process, and in processes beside each other on one NIC.
//!
//! ```text
//!  client: one process               gateway: one process, or two
//!  10.9.0.2 ═╗                       ╔═ 10.9.0.1, port 51820
//!            ╠═════ outer (veth) ════╣
//!  10.8.0.2 ═╝                       ╚═ 10.8.0.1, port 51821
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    os::fd::AsFd,
    path::Path,
    thread,
};

use common::{LIMIT, NATIVE, UDP, public_key, socket, tidegate, value, xdp_program};
use rustix::{
    process::{Pid, Signal, kill_process},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_userspace::{
    bpf::{Steer, SteerOptions},
    sys::link,
    xsk::{Xsk, XskOptions},
};
use xtask::{
    demonstration::{CLIENT_CONF, DataPath, GATEWAY_CONF},
    lab::{self, Lab, OUTER, Process, Space},
};

/// The gateway's addresses in the two tunnels.
const INNER: [&str; 2] = ["10.9.0.1", "10.8.0.1"];

fn lab(test: &str) -> Option<Lab> {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    Some(Lab::new().unwrap())
}

/// One of the devices of a process.
struct Device<'a> {
    space: &'a Space,
    name: String,
}

impl Device<'_> {
    fn status(&self) -> DataPath {
        DataPath::of(self.space, tidegate(), &self.name).unwrap()
    }

    fn configure(&self, lab: &Lab, conf: &str) {
        let keys: Vec<&str> = conf.lines().filter(|line| !line.starts_with("Address")).collect();
        let file = lab.write(&format!("{}.set", self.name), &keys.join("\n")).unwrap();
        self.space.run("wg", &["setconf", &self.name, file.to_str().unwrap()]).unwrap();
        self.space.configure(&self.name, conf).unwrap();
    }

    /// Has a configured device handshake anew: it cannot know that its peer is another process now.
    fn forget_session(&self, lab: &Lab, peer: &str) {
        self.space.run("wg", &["set", &self.name, "peer", peer, "remove"]).unwrap();
        let file = lab.path(&format!("{}.set", self.name));
        self.space.run("wg", &["setconf", &self.name, file.to_str().unwrap()]).unwrap();
    }

    /// What wg(8) shows: the listen port, and whether there was a handshake with the only peer.
    fn shown(&self) -> (String, bool) {
        let dump = self.space.run("wg", &["show", &self.name, "dump"]).unwrap();
        let mut lines = dump.lines().map(|line| line.split('\t').collect::<Vec<_>>());
        let (device, peer) = (lines.next().unwrap(), lines.next().unwrap());
        assert!(lines.next().is_none(), "one peer: {dump}");
        (device[2].to_owned(), peer[4] != "0")
    }

    fn is_gone(&self) -> bool {
        !self.space.has_interface(&self.name) && !socket(&self.name).exists()
    }
}

/// One process with a device for each suffix.
fn start<'a>(
    lab: &Lab,
    space: &'a Space,
    suffixes: &str,
    options: &[&str],
) -> (Process, Vec<Device<'a>>) {
    let names: Vec<String> = suffixes.chars().map(|suffix| lab.interface(suffix)).collect();
    let mut command = space.command(tidegate());
    command.args(["run", "-f"]).args(options).args(&names);
    let mut process = space.spawn(&format!("tidegate-run-{suffixes}"), &mut command).unwrap();
    let ready = lab::wait_for("the daemon", LIMIT, || {
        let ended = process.ended()?;
        anyhow::ensure!(ended.is_none(), "it ended: {}", process.errors());
        let answers = |name: &String| DataPath::of(space, tidegate(), name).is_ok();
        Ok(names.iter().all(answers).then_some(()))
    });
    ready.unwrap_or_else(|error| panic!("{error:#}\n{}", process.errors()));
    (process, names.into_iter().map(|name| Device { space, name }).collect())
}

/// The config files of both tunnels: the gateway's, then the client's.
fn confs(lab: &Lab) -> [[String; 2]; 2] {
    let key = || lab.client.run("wg", &["genkey"]).unwrap().trim().to_owned();
    let (gateway, client) = (key(), key());
    let public = |key: &str| public_key(&lab.client, lab, key);
    let other = |conf: &str, own: &str, peer: &str| {
        conf.replace(value(conf, "PrivateKey"), own)
            .replace(value(conf, "PublicKey"), peer)
            .replace("10.9.0.", "10.8.0.")
            .replace("fd09::", "fd08::")
            .replace("51820", "51821")
    };
    let others = [
        other(GATEWAY_CONF, &gateway, &public(&client)),
        other(CLIENT_CONF, &client, &public(&gateway)),
    ];
    // The second tunnel leads to the gateway alone.
    let others = others.map(|conf| conf.replace(", 192.168.20.0/24, fd20::/64", ""));
    [[GATEWAY_CONF.to_owned(), CLIENT_CONF.to_owned()], others]
}

/// Runs something in a thread that is in the namespace.
fn within<T: Send>(space: &Space, run: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(Path::new("/run/netns").join(space.name())).unwrap();
    let run = || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        run()
    };
    thread::scope(|scope| scope.spawn(run).join().unwrap())
}

/// How many of these pings of the client's are answered. Several may go at once.
fn ping(lab: &Lab, to: &str, count: u32, interval_s: &str) -> u32 {
    let mut command = lab.client.command("ping");
    command.args(["-n", "-q", "-W", "2", "-i", interval_s, "-c", &count.to_string(), to]);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().position(|word| word.starts_with("received")).expect("a summary");
    words[at - 1].parse().unwrap()
}

/// A megabyte there and back by TCP.
fn tcp(lab: &Lab, to: &str) {
    let listener = within(&lab.gateway, || TcpListener::bind((to, 7100)).unwrap());
    let address = listener.local_addr().unwrap();
    let sent: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut received = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        });
        let mut stream =
            within(&lab.client, || TcpStream::connect_timeout(&address, LIMIT).unwrap());
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&sent).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        stream.read_to_end(&mut received).unwrap();
    });
    assert!(received == sent, "{to}: what came back is not what was sent");
}

/// Has every device carry traffic, all of them at once.
fn carry(lab: &Lab, inner: &[&str]) {
    thread::scope(|scope| {
        for to in inner {
            scope.spawn(move || {
                let answered = ping(lab, to, 10, "0.2");
                assert!(answered >= 9, "{to}: {answered}");
                tcp(lab, to);
            });
        }
    });
}

/// Both gateway's devices and the client's, configured.
fn configure(lab: &Lab, gateway: [&Device<'_>; 2], client: &[Device<'_>]) {
    for ((conf, gateway), client) in confs(lab).iter().zip(gateway).zip(client) {
        gateway.configure(lab, &conf[0]);
        client.configure(lab, &conf[1]);
    }
}

#[test]
fn one_process_serves_two_devices_by_one_steer_program() {
    let Some(lab) = lab("one_process_serves_two_devices_by_one_steer_program") else { return };
    let (mut process, devices) = start(&lab, &lab.gateway, "gh", NATIVE);
    let (mut far, clients) = start(&lab, &lab.client, "cd", UDP);
    let program = xdp_program(&lab).unwrap();
    configure(&lab, [&devices[0], &devices[1]], &clients);
    carry(&lab, &INNER);
    for (device, port) in devices.iter().zip(["51820", "51821"]) {
        let status = device.status();
        assert_eq!(status.mode, "native", "{:?}", status.reason);
        assert!(status.paths["xsk"] > 100, "{:?}", status.paths);
        assert_eq!(status.drops.get("unknown_index"), None);
        assert_eq!(device.shown(), (port.to_owned(), true));
    }

    // One goes, and the other loses nothing.
    thread::scope(|scope| {
        let pings = scope.spawn(|| ping(&lab, INNER[1], 150, "0.02"));
        thread::sleep(std::time::Duration::from_secs(1));
        lab.gateway.ip(&format!("link del {}", devices[0].name)).unwrap();
        assert_eq!(pings.join().unwrap(), 150, "{}", process.errors());
    });
    lab::wait_for("the end of one device", LIMIT, || Ok(devices[0].is_gone().then_some(())))
        .unwrap();
    assert_eq!(xdp_program(&lab), Some(program));
    assert!(process.ended().unwrap().is_none());
    let before = devices[1].status().paths["xsk"];
    carry(&lab, &INNER[1..]);
    assert!(devices[1].status().paths["xsk"] > before + 100);
    assert_eq!(devices[1].shown(), ("51821".to_owned(), true));

    // Its port is free, and its name.
    let (mut again, anew) = start(&lab, &lab.gateway, "g", UDP);
    anew[0].configure(&lab, GATEWAY_CONF);
    clients[0].forget_session(&lab, value(CLIENT_CONF, "PublicKey"));
    carry(&lab, &INNER[..1]);
    lab.gateway.ip(&format!("link del {}", anew[0].name)).unwrap();
    assert!(again.wait(LIMIT).unwrap().success(), "{}", again.errors());

    // With the last one the process ends.
    lab.gateway.ip(&format!("link del {}", devices[1].name)).unwrap();
    assert!(process.wait(LIMIT).unwrap().success(), "{}", process.errors());
    assert!(devices[1].is_gone());
    assert_eq!(xdp_program(&lab), None);
    far.signal(Signal::TERM).unwrap();
    assert!(far.wait(LIMIT).unwrap().success(), "{}", far.errors());
    assert!(clients.iter().all(Device::is_gone));
}

/// The children of a process.
fn children(of: u32) -> Vec<u32> {
    let tasks = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap();
    tasks.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

#[test]
fn a_data_process_comes_back_with_every_device_that_is_left() {
    let Some(lab) = lab("a_data_process_comes_back_with_every_device_that_is_left") else { return };
    let (process, devices) = start(&lab, &lab.gateway, "fgh", NATIVE);
    let (_far, clients) = start(&lab, &lab.client, "cd", UDP);
    configure(&lab, [&devices[1], &devices[2]], &clients);
    carry(&lab, &INNER);
    lab.gateway.ip(&format!("link del {}", devices[0].name)).unwrap();
    lab::wait_for("the end of one device", LIMIT, || Ok(devices[0].is_gone().then_some(())))
        .unwrap();

    let before = children(process.pid());
    let [data] = before[..] else { panic!("{before:?}") };
    kill_process(Pid::from_raw(data as i32).unwrap(), Signal::KILL).unwrap();
    lab::wait_for("another data process", LIMIT, || {
        let now = children(process.pid());
        Ok((now.len() == 1 && now != before).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", process.errors()));
    // Each has its own keys and port again, and its own slots of the indexes.
    lab::wait_for("both tunnels", LIMIT * 3, || {
        Ok(INNER.iter().all(|to| ping(&lab, to, 1, "1") == 1).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", process.errors()));
    carry(&lab, &INNER);
    for (device, port) in devices[1..].iter().zip(["51820", "51821"]) {
        let status = device.status();
        assert_eq!(status.mode, "native", "{:?}", status.reason);
        assert!(status.paths["xsk"] > 100, "{:?}", status.paths);
        assert_eq!(device.shown(), (port.to_owned(), true));
    }
}

#[test]
fn a_second_process_on_a_nic_uses_sockets_and_says_why() {
    let Some(lab) = lab("a_second_process_on_a_nic_uses_sockets_and_says_why") else { return };
    let (mut first, of_first) = start(&lab, &lab.gateway, "g", NATIVE);
    let program = xdp_program(&lab).unwrap();
    let (mut second, of_second) = start(&lab, &lab.gateway, "h", NATIVE);
    let (_far, clients) = start(&lab, &lab.client, "cd", UDP);
    assert_eq!(xdp_program(&lab), Some(program));
    configure(&lab, [&of_first[0], &of_second[0]], &clients);
    carry(&lab, &INNER);
    let (native, sockets) = (of_first[0].status(), of_second[0].status());
    assert_eq!((native.mode.as_str(), sockets.mode.as_str()), ("native", "udp"));
    assert!(native.paths["xsk"] > 100 && sockets.paths["socket"] > 100);
    let why = format!("already has an XDP program, tidegate_steer (id {program})");
    let reason = sockets.reason.unwrap();
    assert!(reason.contains(OUTER) && reason.contains(&why), "{reason}");

    first.signal(Signal::TERM).unwrap();
    assert!(first.wait(LIMIT).unwrap().success(), "{}", first.errors());
    assert!(of_first[0].is_gone());
    // The NIC is free now, and somebody waits for it.
    lab::wait_for("the second process's program", LIMIT, || {
        Ok((of_second[0].status().mode == "native").then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", second.errors()));
    assert_ne!(xdp_program(&lab), Some(program));
    carry(&lab, &INNER[1..]);
    assert!(of_second[0].status().paths["xsk"] > 100);
    assert!(second.ended().unwrap().is_none());
}

#[test]
fn somebody_elses_program_is_never_replaced() {
    let Some(lab) = lab("somebody_elses_program_is_never_replaced") else { return };
    let foreign = within(&lab.gateway, || {
        let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
        let mut steer = Steer::load(SteerOptions::new(indexes)).unwrap();
        steer.attach(OUTER).unwrap();
        steer
    });
    let program = xdp_program(&lab).unwrap();
    {
        let (mut process, devices) = start(&lab, &lab.gateway, "gh", NATIVE);
        let (mut far, clients) = start(&lab, &lab.client, "cd", UDP);
        configure(&lab, [&devices[0], &devices[1]], &clients);
        carry(&lab, &INNER);
        for device in &devices {
            let status = device.status();
            assert_eq!(status.mode, "udp");
            assert!(
                status.reason.as_deref().unwrap().contains(&format!("(id {program})")),
                "{:?}",
                status.reason
            );
        }
        for process in [&mut process, &mut far] {
            process.signal(Signal::TERM).unwrap();
            assert!(process.wait(LIMIT).unwrap().success(), "{}", process.errors());
        }
        assert_eq!(xdp_program(&lab), Some(program), "also when it ends");
    }
    drop(foreign);
    assert_eq!(xdp_program(&lab), None);
}

#[test]
fn somebody_elses_xsk_is_never_replaced() {
    let Some(lab) = lab("somebody_elses_xsk_is_never_replaced") else { return };
    let foreign = within(&lab.gateway, || {
        Xsk::bind(link::index(OUTER).unwrap(), 0, XskOptions::default()).unwrap().1
    });
    let (mut process, devices) = start(&lab, &lab.gateway, "gh", NATIVE);
    let (_far, clients) = start(&lab, &lab.client, "cd", UDP);
    configure(&lab, [&devices[0], &devices[1]], &clients);
    carry(&lab, &INNER);
    for device in &devices {
        let status = device.status();
        assert_eq!(status.mode, "udp");
        assert!(
            status.reason.as_deref().unwrap().contains(&format!("{OUTER}: queue 0:")),
            "{:?}",
            status.reason
        );
        assert!(status.paths["xsk"] == 0 && status.paths["socket"] > 100);
    }
    foreign.counts().unwrap();
    process.signal(Signal::TERM).unwrap();
    assert!(process.wait(LIMIT).unwrap().success(), "{}", process.errors());
}
