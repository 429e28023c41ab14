//! The keeper and the data process: what becomes of a tunnel when either dies.
//!
//! ```text
//!  client                     gateway                    LAN host
//!  Tidegate ══ outer (veth) ══ Tidegate ─── lan (veth) ─── 192.168.20.2
//!  10.9.0.2                    10.9.0.1
//!                              keeper ── data process, which the tests kill
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use common::{Daemon, LIMIT, NATIVE, UDP, assert_answered, public_key, socket, tidegate, value};
use rustix::{
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with},
    process::{Pid, Signal, kill_process},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use serde_json::Value;
use wg_common::{
    id::PeerId,
    map::{PEER_WORKERS_LEN, peer_worker},
};
use wg_userspace::key::PublicKey;
use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER},
    lab::{self, GATEWAY_V4, HOST_V4, Lab, OUTER, Space},
};

const CLIENT_INNER: &str = "10.9.0.2";
const NOBODY: &str = "65534";
/// How long a replacement may take until traffic goes on; what was measured is printed.
const GOES_ON: Duration = Duration::from_secs(10);

fn lab(test: &str) -> Option<Lab> {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    Some(Lab::new().unwrap())
}

/// The children of a process.
fn children(of: u32) -> Vec<u32> {
    let parent = |pid: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, which ends with the last parenthesis, may hold anything.
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| parent(pid) == Some(of)).collect()
}

/// The data process of a daemon.
fn data(daemon: &Daemon) -> u32 {
    let all = children(daemon.process.pid());
    assert_eq!(all.len(), 1, "a keeper has one child: {all:?}");
    all[0]
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

/// Kills the data process; gives the one that follows once it answers, and how long that took.
fn replace(daemon: &Daemon) -> (u32, Duration) {
    let before = data(daemon);
    signal(before, Signal::KILL);
    let killed = Instant::now();
    (follower(daemon, before, LIMIT), killed.elapsed())
}

fn follower(daemon: &Daemon, before: u32, limit: Duration) -> u32 {
    let errors = || daemon.process.errors();
    let found = lab::wait_for("another data process", limit, || {
        let all = children(daemon.process.pid());
        Ok(all.into_iter().find(|&pid| pid != before))
    });
    let pid = found.unwrap_or_else(|error| panic!("{error:#}\n{}", errors()));
    // It is asked until it is there.
    daemon.status();
    pid
}

fn tunnel<'a>(lab: &'a Lab, options: &[&str], gateway_conf: &str) -> [Daemon<'a>; 2] {
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), options);
    gateway.configure(lab, gateway_conf);
    let client = Daemon::start(&lab.client, &lab.interface('c'), UDP);
    client.configure(lab, CLIENT_CONF);
    assert_answered(&lab.client, &[GATEWAY_INNER[0], HOST_V4]);
    [gateway, client]
}

/// Waits until one echo request is answered, and gives how long that took.
fn until_answered(space: &Space, to: &str, daemon: &Daemon) -> Duration {
    until_answered_in(GOES_ON, space, to, daemon)
}

fn until_answered_in(limit: Duration, space: &Space, to: &str, daemon: &Daemon) -> Duration {
    let begun = Instant::now();
    let answered = lab::wait_for("an answer", limit, || {
        let one = space.run("ping", &["-n", "-c", "1", "-W", "1", to]);
        Ok(one.is_ok().then_some(()))
    });
    answered.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.process.errors()));
    begun.elapsed()
}

/// A socket made in a namespace, where it stays.
fn inside<T: Send>(space: &Space, make: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(Path::new("/run/netns").join(space.name())).unwrap();
    let enter = || {
        let kind = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(namespace.as_fd(), kind).unwrap();
        make()
    };
    thread::scope(|scope| scope.spawn(enter).join().unwrap())
}

/// What comes on the links of a namespace.
struct Wire(OwnedFd);

impl Wire {
    fn of(space: &Space) -> Wire {
        let (family, flags) = (AddressFamily::PACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        let kind = SocketType::RAW;
        Wire(inside(space, || socket_with(family, kind, flags, Some(eth::ALL)).unwrap()))
    }

    /// How many frames came since the last call: with IPv4 packets to `inner`, and with UDP datagrams.
    fn count(&self, inner: Ipv4Addr) -> (usize, usize) {
        let (mut clear, mut outer) = (0, 0);
        let mut buffer = [0; 2048];
        while let Ok((_, len)) = recv(&self.0, &mut buffer, RecvFlags::empty()) {
            let frame = &buffer[..len];
            if len < 34 || frame[12..14] != [8, 0] {
                continue;
            }
            if frame[30..34] == inner.octets() {
                clear += 1;
            } else if frame[23] == 17 {
                outer += 1;
            }
        }
        (clear, outer)
    }
}

fn a_killed_data_process_is_replaced(test: &str, options: &[&str]) {
    let Some(lab) = lab(test) else { return };
    let [gateway, _client] = tunnel(&lab, options, GATEWAY_CONF);
    // What is not taken by the tunnel's routes would leave in the clear.
    lab.gateway.ip(&format!("route add default via {} dev {OUTER}", lab::CLIENT_V4)).unwrap();
    let wire = Wire::of(&lab.client);
    let inner = CLIENT_INNER.parse().unwrap();
    let shown = || {
        let routes = lab.gateway.ip_json(&format!("route show dev {}", gateway.interface));
        let link = lab.gateway.ip_json(&format!("addr show dev {}", gateway.interface));
        let link = link.unwrap();
        (routes.unwrap(), link[0]["ifindex"].clone(), link[0]["addr_info"].clone())
    };
    let before = shown();
    let mut pings = lab.host.command("ping");
    pings.args(["-n", "-i", "0.05", "-q", CLIENT_INNER]);
    let _pings = lab.host.spawn("pings", &mut pings).unwrap();
    let mut outer = 0;
    lab::wait_for("traffic", LIMIT, || {
        outer += wire.count(inner).1;
        Ok((outer > 10).then_some(()))
    })
    .unwrap();

    let first = data(&gateway);
    signal(first, Signal::KILL);
    let killed = Instant::now();
    assert_eq!(shown(), before, "interface, addresses and routes stay");
    let second = follower(&gateway, first, LIMIT);
    let replaced = killed.elapsed();
    until_answered(&lab.host, CLIENT_INNER, &gateway);
    println!("{test}: another process after {replaced:?}, traffic after {:?}", killed.elapsed());
    assert_eq!(shown(), before, "they are the same ones");
    assert_ne!(first, second);
    assert_eq!(wire.count(inner).0, 0, "no inner packet in the clear");
    let mode = if options.contains(&"native") { "native" } else { "udp" };
    let status = gateway.status();
    assert_eq!(status.mode, mode, "{status:?}");
    if mode == "native" {
        let answered = lab.host.ping(CLIENT_INNER, 5, &[]).unwrap().answered;
        assert!(answered >= 4 && gateway.status().paths["xsk"] > 0, "{:?}", gateway.status());
    }

    // Once more, so that the second one leaves all that the third one needs.
    let (third, _) = replace(&gateway);
    until_answered(&lab.host, CLIENT_INNER, &gateway);
    assert!(third != second && wire.count(inner).0 == 0);

    // And this is what it would look like.
    lab.gateway.ip(&format!("link del {}", gateway.interface)).unwrap();
    let leaks = || Ok((wire.count(inner).0 > 0).then_some(()));
    lab::wait_for("inner packets in the clear", LIMIT, leaks).unwrap();
    gateway.ends_cleanly();
}

#[test]
fn a_killed_data_process_is_replaced_in_udp_mode() {
    a_killed_data_process_is_replaced("a_killed_data_process_is_replaced_in_udp_mode", UDP);
}

#[test]
fn a_killed_data_process_is_replaced_in_native_mode() {
    a_killed_data_process_is_replaced("a_killed_data_process_is_replaced_in_native_mode", NATIVE);
}

/// The UMEMs that a process has mapped.
fn umems(pid: u32) -> usize {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    maps.lines().filter(|line| line.contains("/memfd:tidegate-umem")).count()
}

/// However many queues a thread has: their XSKs share one UMEM, also those of a process that follows.
#[test]
fn queues_of_a_thread_share_their_memory() {
    let Some(lab) = lab("queues_of_a_thread_share_their_memory") else { return };
    let plug = |queue_count: u32| {
        lab.gateway.ip(&format!("link del {OUTER}")).unwrap();
        let queues = format!("numrxqueues {queue_count} numtxqueues {queue_count}");
        let peer = lab.client.name();
        let link =
            format!("link add {OUTER} {queues} type veth peer name {OUTER} {queues} netns {peer}");
        lab.gateway.ip(&link).unwrap();
        for (space, last) in [(&lab.gateway, 1), (&lab.client, 2)] {
            space.ip(&format!("address add 198.51.100.{last}/24 dev {OUTER}")).unwrap();
            space.ip(&format!("link set {OUTER} up")).unwrap();
        }
    };
    let has_queues = |gateway: &Daemon, count: u64| {
        let queues = || Ok((gateway.status().nics[0]["queues"] == count).then_some(()));
        lab::wait_for(&format!("{count} queues"), LIMIT, queues).unwrap();
    };
    let answers = |gateway: &Daemon| {
        until_answered(&lab.client, GATEWAY_INNER[0], gateway);
        let before = gateway.status().paths["xsk"];
        let answered = lab.client.ping(GATEWAY_INNER[0], 5, &["-i", "0.1"]).unwrap().answered;
        assert!(answered >= 4 && gateway.status().paths["xsk"] > before, "{:?}", gateway.status());
    };
    plug(4);
    for (workers, count) in [("1", 1), ("2", 2)] {
        let options = [NATIVE, &["--workers", workers]].concat();
        let [gateway, _client] = tunnel(&lab, &options, GATEWAY_CONF);
        has_queues(&gateway, 4);
        answers(&gateway);
        assert_eq!(umems(data(&gateway)), count, "{workers} workers");
        let (second, _) = replace(&gateway);
        has_queues(&gateway, 4);
        answers(&gateway);
        assert_eq!(umems(second), count, "{workers} workers");
        // Queues that go and come leave nothing behind.
        plug(2);
        has_queues(&gateway, 2);
        answers(&gateway);
        assert_eq!(umems(second), count, "{workers} workers");
        plug(4);
        has_queues(&gateway, 4);
        answers(&gateway);
        assert_eq!(umems(second), count, "{workers} workers");
    }
}

/// The maps that the keeper holds: id, type and number of entries.
fn maps(daemon: &Daemon) -> Vec<(String, u32, u32)> {
    let folder = format!("/proc/{}/fdinfo", daemon.process.pid());
    let texts = fs::read_dir(folder).unwrap().flatten();
    let texts = texts.filter_map(|file| fs::read_to_string(file.path()).ok());
    let map = |text: String| {
        let field = |name| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let number = |name| field(name)?.parse().ok();
        Some((field("map_id:")?.to_owned(), number("map_type:")?, number("max_entries:")?))
    };
    texts.filter_map(map).collect()
}

fn bpftool(arguments: &[&str]) -> Option<Value> {
    let output = Command::new("bpftool").arg("-j").args(arguments).output().ok()?;
    serde_json::from_slice(&output.stdout).ok()
}

/// Bytes as bpftool prints them.
fn bytes(value: &Value) -> Vec<u8> {
    let text = |byte: &Value| byte.as_str().unwrap().trim_start_matches("0x").to_owned();
    let bytes = value.as_array().unwrap().iter().map(text);
    bytes.map(|text| u8::from_str_radix(&text, 16).unwrap()).collect()
}

/// The prefixes that the program which chooses TUN queues knows, in order.
fn known_prefixes(daemon: &Daemon) -> Vec<String> {
    const LPM_TRIE: u32 = 11;
    let mut known = Vec::new();
    for (id, _, _) in maps(daemon).into_iter().filter(|map| map.1 == LPM_TRIE) {
        for element in bpftool(&["map", "dump", "id", &id]).unwrap().as_array().unwrap() {
            let key = bytes(&element["key"]);
            let (len, addr) = key.split_first_chunk().unwrap();
            let addr: IpAddr = match <[u8; 4]>::try_from(addr) {
                Ok(v4) => v4.into(),
                Err(_) => <[u8; 16]>::try_from(addr).unwrap().into(),
            };
            known.push(format!("{addr}/{}", u32::from_ne_bytes(*len)));
        }
    }
    known.sort();
    known
}

/// The allowed IPs of all peers, in order.
fn allowed_ips(daemon: &Daemon) -> Vec<String> {
    let peers = daemon.dump().into_iter().skip(1);
    let mut nets: Vec<String> =
        peers.flat_map(|peer| peer[3].split(',').map(str::to_owned).collect::<Vec<_>>()).collect();
    nets.sort();
    nets
}

fn assert_knows(daemon: &Daemon, count: usize) {
    let (mut known, mut allowed) = (Vec::new(), Vec::new());
    let agree = lab::wait_for("the prefixes", LIMIT, || {
        (known, allowed) = (known_prefixes(daemon), allowed_ips(daemon));
        Ok((known == allowed && known.len() == count).then_some(()))
    });
    agree.unwrap_or_else(|error| panic!("{error:#}: {known:?}, allowed are {allowed:?}"));
}

/// Whether there is a worker at which the first peer is at home.
fn has_home(daemon: &Daemon) -> bool {
    const ARRAY: u32 = 2;
    let is_of_homes = |map: &(String, u32, u32)| (map.1, map.2) == (ARRAY, PEER_WORKERS_LEN);
    let (id, _, _) = maps(daemon).into_iter().find(is_of_homes).unwrap();
    let first = ["map", "lookup", "id", &id, "key", "0", "0", "0", "0"];
    let word = bytes(&bpftool(&first).unwrap()["value"]);
    peer_worker(u64::from_ne_bytes(word.try_into().unwrap()), PeerId(0)).is_some()
}

#[test]
fn the_kernel_side_knows_who_owns_what_and_where_they_are_at_home() {
    let test = "the_kernel_side_knows_who_owns_what_and_where_they_are_at_home";
    let Some(lab) = lab(test) else { return };
    if bpftool(&["version"]).is_none() {
        eprintln!("SKIPPED {test}: there is no bpftool");
        return;
    }
    let options = [UDP, &["--workers", "2"]].concat();
    let [gateway, _client] = tunnel(&lab, &options, GATEWAY_CONF);
    let is_on = |daemon: &Daemon| daemon.status().tun_steering["is_on"] == true;
    assert!(is_on(&gateway), "{:?}", gateway.status());
    let count = allowed_ips(&gateway).len();
    assert!(count > 0);
    assert_knows(&gateway, count);
    assert!(has_home(&gateway), "there was a handshake");

    let peer = gateway.dump()[1][0].clone();
    let other = public_key(&lab.gateway, &lab, &wireguard_key(&lab));
    let set = |arguments: &str| {
        let line = format!("set {} peer {arguments}", gateway.interface);
        gateway.wg(&line.split(' ').collect::<Vec<_>>());
    };
    set(&format!("{other} allowed-ips 0.0.0.0/0,::/0,10.77.0.0/16,fd77::/64"));
    assert_knows(&gateway, count + 4);
    set(&format!("{other} allowed-ips 10.77.0.0/16"));
    assert_knows(&gateway, count + 1);
    // More than are told at once.
    let many: Vec<String> =
        (0..3000).map(|i| format!("10.78.{}.{}/32", i / 256, i % 256)).collect();
    set(&format!("{other} allowed-ips {}", many.join(",")));
    assert_knows(&gateway, count + 3000);

    replace(&gateway);
    assert!(is_on(&gateway), "{:?}", gateway.status());
    assert_knows(&gateway, count + 3000);
    set(&format!("{other} remove"));
    set(&format!("{peer} allowed-ips 10.9.0.2/32"));
    assert_knows(&gateway, 1);
    until_answered(&lab.gateway, CLIENT_INNER, &gateway);
    assert!(has_home(&gateway));
}

/// What `show --json` says of a daemon's data path.
fn data_path(daemon: &Daemon, space: &Space) -> Value {
    let output =
        space.command(tidegate()).args(["show", "--json", &daemon.interface]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    report["interfaces"][0]["data_path"].clone()
}

/// A gateway with two workers, and how many packets one of them hands on to the other while the client speaks
/// from one port after the other; also when there is another data process, and another port of the gateway.
fn handed_on(lab: &Lab, refused: &[(&str, &str)]) -> (u64, Value) {
    let options = [UDP, &["--workers", "2"]].concat();
    let gateway = Daemon::start_with(&lab.gateway, &lab.interface('g'), &options, refused);
    gateway.configure(lab, GATEWAY_CONF);
    let client = Daemon::start(&lab.client, &lab.interface('c'), UDP);
    client.configure(lab, CLIENT_CONF);
    let speak = |ports: std::ops::Range<u16>| {
        for port in ports {
            let port = port.to_string();
            client.wg(&["set", &client.interface, "listen-port", &port]);
            until_answered(&lab.client, GATEWAY_INNER[0], &client);
            let ping = lab.client.ping(GATEWAY_INNER[0], 20, &["-i", "0.005", "-W", "1"]);
            assert!(ping.unwrap().answered > 0);
        }
    };
    let count = || data_path(&gateway, &lab.gateway)["handed_on"].as_u64().unwrap();
    speak(4000..4006);
    let first = count();
    replace(&gateway);
    until_answered(&lab.gateway, CLIENT_INNER, &gateway);
    speak(4020..4026);
    gateway.wg(&["set", &gateway.interface, "listen-port", "5000"]);
    until_answered(&lab.gateway, CLIENT_INNER, &gateway);
    speak(4040..4046);
    // The other process has counted anew.
    (first + count(), data_path(&gateway, &lab.gateway))
}

#[test]
fn datagrams_come_to_the_worker_at_which_their_keypair_is_at_home() {
    let test = "datagrams_come_to_the_worker_at_which_their_keypair_is_at_home";
    let Some(lab) = lab(test) else { return };
    let (count, shown) = handed_on(&lab, &[]);
    assert_eq!(shown["socket_steering"]["is_on"], true, "{shown}");
    assert_eq!(count, 0, "{shown}");
}

#[test]
fn a_kernel_that_takes_no_steering_chooses_by_itself_and_it_is_said() {
    let test = "a_kernel_that_takes_no_steering_chooses_by_itself_and_it_is_said";
    if !cfg!(debug_assertions) {
        eprintln!("SKIPPED {test}: the keeper can be told to refuse in debug builds only");
        return;
    }
    let Some(lab) = lab(test) else { return };
    let (count, shown) = handed_on(&lab, &[("TIDEGATE_TEST_REFUSE_STEERING", "tun,sockets")]);
    for kind in ["tun_steering", "socket_steering"] {
        assert_eq!(shown[kind]["is_on"], false, "{shown}");
        assert_eq!(shown[kind]["reason"], "a test refuses the program");
    }
    assert!(count > 0, "18 ports, of which half belong to the other worker");
}

fn wireguard_key(lab: &Lab) -> String {
    lab.gateway.run("wg", &["genkey"]).unwrap().trim().to_owned()
}

#[test]
fn a_tcp_connection_outlives_the_data_process() {
    let Some(lab) = lab("a_tcp_connection_outlives_the_data_process") else { return };
    let [gateway, _client] = tunnel(&lab, UDP, GATEWAY_CONF);
    let listener = inside(&lab.host, || TcpListener::bind((HOST_V4, 7009)).unwrap());
    let mut near = inside(&lab.client, || TcpStream::connect((HOST_V4, 7009)).unwrap());
    let (mut far, _) = listener.accept().unwrap();
    for stream in [&near, &far] {
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    }
    let mut exchange = |text: &[u8]| {
        near.write_all(text).unwrap();
        let mut heard = vec![0; text.len()];
        far.read_exact(&mut heard).unwrap();
        far.write_all(&heard).unwrap();
        near.read_exact(&mut heard).unwrap();
        assert_eq!(heard, text);
    };
    exchange(b"before");
    signal(data(&gateway), Signal::KILL);
    let killed = Instant::now();
    exchange(&[7; 100_000]);
    println!("100,000 bytes went to and fro {:?} after the process was killed", killed.elapsed());
}

#[test]
fn a_peer_with_a_keepalive_is_reached_without_a_packet_of_ours() {
    let Some(lab) = lab("a_peer_with_a_keepalive_is_reached_without_a_packet_of_ours") else {
        return;
    };
    let conf = format!("{GATEWAY_CONF}PersistentKeepalive = 25\n");
    let [gateway, client] = tunnel(&lab, UDP, &conf);
    let latest = |daemon: &Daemon| daemon.dump()[1][4].parse::<u64>().unwrap();
    let before = latest(&client);
    // The next one has another second.
    thread::sleep(Duration::from_millis(1100));
    replace(&gateway);
    for daemon in [&gateway, &client] {
        lab::wait_for("a handshake", GOES_ON, || Ok((latest(daemon) > before).then_some(())))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", gateway.process.errors()));
    }
}

#[test]
fn what_wg_has_set_and_where_peers_have_gone_is_remembered() {
    let Some(lab) = lab("what_wg_has_set_and_where_peers_have_gone_is_remembered") else { return };
    let [gateway, client] = tunnel(&lab, UDP, GATEWAY_CONF);
    let other = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
    let peer = value(GATEWAY_CONF, "PublicKey");
    let interface = gateway.interface.as_str();
    let set = |words: &str| {
        let words: Vec<&str> = ["set", interface].into_iter().chain(words.split(' ')).collect();
        gateway.wg(&words);
    };
    set("listen-port 2000 fwmark 0x1f");
    set(&format!("peer {other} allowed-ips 10.9.7.0/24,fd09:7::/64 endpoint 198.51.100.77:1"));
    set(&format!("peer {other} persistent-keepalive 21"));
    client.wg(&["set", &client.interface, "listen-port", "2222"]);
    let gateway_key = value(CLIENT_CONF, "PublicKey");
    let endpoint = format!("{GATEWAY_V4}:2000");
    client.wg(&["set", &client.interface, "peer", gateway_key, "endpoint", &endpoint]);
    until_answered(&lab.client, GATEWAY_INNER[0], &gateway);
    let config = || {
        let mut lines = gateway.dump();
        // Without what is counted, and when.
        for line in &mut lines[1..] {
            line.drain(4..7);
        }
        lines[1..].sort();
        lines
    };
    let before = config();
    assert!(before.iter().any(|line| line[0] == peer && line[2].ends_with(":2222")), "{before:?}");
    let uapi = |request: String| {
        let mut stream = UnixStream::connect(socket(interface)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let hex = PublicKey::from_base64(peer).unwrap().to_hex();
    let named = uapi(format!("set=1\npublic_key={hex}\ntidegate_name=a laptop\n\n"));
    assert_eq!(named, "errno=0\n\n");
    let is_named = || uapi("get=1\n\n".to_owned()).contains("\ntidegate_name=a laptop\n");
    assert!(is_named());
    // Where peers go is written down several times a second.
    thread::sleep(Duration::from_millis(500));
    replace(&gateway);
    assert_eq!(config(), before);
    assert!(is_named(), "its name is remembered");
    until_answered(&lab.client, GATEWAY_INNER[0], &gateway);

    // What is changed after a replacement is remembered as well.
    set(&format!("peer {other} remove"));
    set("listen-port 2001");
    let before = config();
    assert_eq!(before.len(), 2);
    replace(&gateway);
    assert_eq!(config(), before);
}

#[test]
fn a_pause_goes_on_in_the_process_that_follows() {
    let Some(lab) = lab("a_pause_goes_on_in_the_process_that_follows") else { return };
    // Who has no reason to reach the other one waits for it: 15 s without an answer, and then some.
    let goes_on = Duration::from_secs(40);
    let [gateway, _client] = tunnel(&lab, UDP, GATEWAY_CONF);
    let tidegate = |words: &[&str]| gateway.space.run(tidegate(), words).unwrap();
    tidegate(&["quiesce", &gateway.interface]);
    replace(&gateway);
    assert!(tidegate(&["show", &gateway.interface]).contains("quiesced: until it is resumed"));
    assert_eq!(lab.client.ping(GATEWAY_INNER[0], 2, &[]).unwrap().answered, 0);
    tidegate(&["quiesce", &gateway.interface, "--resume"]);
    until_answered_in(goes_on, &lab.client, GATEWAY_INNER[0], &gateway);
    replace(&gateway);
    assert!(!tidegate(&["show", &gateway.interface]).contains("quiesced"));
    until_answered_in(goes_on, &lab.client, GATEWAY_INNER[0], &gateway);
}

#[test]
fn a_data_process_that_stands_still_is_replaced() {
    let Some(lab) = lab("a_data_process_that_stands_still_is_replaced") else { return };
    let [gateway, _client] = tunnel(&lab, UDP, GATEWAY_CONF);
    let first = data(&gateway);
    signal(first, Signal::STOP);
    follower(&gateway, first, Duration::from_secs(30));
    until_answered(&lab.client, GATEWAY_INNER[0], &gateway);
}

#[test]
fn with_the_keeper_everything_goes() {
    let Some(lab) = lab("with_the_keeper_everything_goes") else { return };
    for options in [UDP, NATIVE] {
        let mut gateway = Daemon::start(&lab.gateway, &lab.interface('g'), options);
        gateway.configure(&lab, GATEWAY_CONF);
        let child = data(&gateway);
        assert_eq!(common::xdp_program(&lab).is_some(), options == NATIVE);
        gateway.process.signal(Signal::KILL).unwrap();
        gateway.process.wait(LIMIT).unwrap();
        let gone = || {
            let is_gone = !Path::new(&format!("/proc/{child}/stat")).exists()
                && !lab.gateway.has_interface(&gateway.interface)
                && common::xdp_program(&lab).is_none();
            Ok(is_gone.then_some(()))
        };
        lab::wait_for("the end of everything", LIMIT, gone).unwrap();
        assert!(UnixStream::connect(socket(&gateway.interface)).is_err(), "nobody listens");
        fs::remove_file(socket(&gateway.interface)).unwrap();
    }
}

#[test]
fn both_processes_end_in_good_order() {
    let Some(lab) = lab("both_processes_end_in_good_order") else { return };
    for end in [Signal::TERM, Signal::INT] {
        let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
        let child = data(&gateway);
        // Whoever ends a whole group of processes means the same.
        signal(child, end);
        gateway.process.signal(end).unwrap();
        gateway.ends_cleanly();
        assert!(!Path::new(&format!("/proc/{child}/stat")).exists());
    }
}

#[test]
fn the_data_process_may_do_next_to_nothing() {
    let Some(lab) = lab("the_data_process_may_do_next_to_nothing") else { return };
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), NATIVE);
    gateway.configure(&lab, GATEWAY_CONF);
    for is_first in [true, false] {
        let child = if is_first { data(&gateway) } else { replace(&gateway).0 };
        let threads = fs::read_dir(format!("/proc/{child}/task")).unwrap();
        let mut count = 0;
        for thread in threads {
            let text = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
            let field = |name: &str| -> Vec<&str> {
                let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                line.trim_start_matches(':').split_whitespace().collect()
            };
            for none in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(field(none), ["0000000000000000"], "{none}");
            }
            assert_eq!((field("NoNewPrivs"), field("Seccomp")), (vec!["1"], vec!["2"]));
            assert_eq!((field("Uid"), field("Gid")), (vec![NOBODY; 4], vec![NOBODY; 4]));
            assert!(field("Groups").is_empty());
            count += 1;
        }
        assert!(count >= 3, "control, a worker and the pool: {count}");
    }
    let json = gateway.space.run(tidegate(), &["show", &gateway.interface, "--json"]).unwrap();
    let shown: Value = serde_json::from_str(&json).unwrap();
    let held = shown.pointer("/interfaces/0/data_path/privileges").unwrap();
    assert_eq!(held["uid"], 65534);
    assert_eq!(held["capabilities"]["permitted"], 0);
    assert_eq!((&held["no_new_privs"], &held["seccomp"]), (&true.into(), &"filter".into()));
    assert!(held["landlock"].is_string());
    let text = gateway.space.run(tidegate(), &["show", &gateway.interface]).unwrap();
    assert!(text.contains("privileges: uid 65534, no capabilities, no new privileges, seccomp"));
}

/// Nice values of a process's threads.
fn nice(pid: u32) -> Vec<i32> {
    let of = |thread: std::io::Result<fs::DirEntry>| {
        let stat = fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
        // The name ends with the last parenthesis, and may have spaces.
        let behind_name = stat.rsplit(')').next().unwrap();
        behind_name.split_whitespace().nth(16).unwrap().parse().unwrap()
    };
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(of).collect()
}

#[test]
fn packets_are_moved_before_what_else_the_host_does() {
    let Some(lab) = lab("packets_are_moved_before_what_else_the_host_does") else { return };
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    let own = nice(std::process::id())[0];
    let keeper = nice(gateway.process.pid());
    assert!(keeper.iter().all(|nice| *nice == own), "{keeper:?}, {own}");
    // Whoever runs the tests may have chosen another value, which stays.
    let expected = if own == 0 { -10 } else { own };
    for is_first in [true, false] {
        let child = if is_first { data(&gateway) } else { replace(&gateway).0 };
        let threads = nice(child);
        assert!(threads.len() >= 3, "control, a worker and the pool");
        assert!(threads.iter().all(|nice| *nice == expected), "{threads:?}, {expected}");
    }
}

/// `fe80::1%outer`: what the name of a link means is asked after all privileges are gone.
#[test]
fn a_scope_is_understood_by_its_name() {
    let Some(lab) = lab("a_scope_is_understood_by_its_name") else { return };
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    let peer = value(GATEWAY_CONF, "PublicKey");
    let request = format!(
        "set=1\npublic_key={}\nendpoint=[fe80::7%{OUTER}]:7\n\n",
        PublicKey::from_base64(peer).unwrap().to_hex()
    );
    let mut stream = UnixStream::connect(socket(&gateway.interface)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = [0; 64];
    let len = stream.read(&mut answer).unwrap();
    assert_eq!(answer[..len], *b"errno=0\n\n");
}
