//! A flood of handshake initiations from spoofed addresses, while honest peers use the gateway.
//!
//! ```text
//!  client                     gateway                     LAN host
//!  boringtun, connected ═════ Tidegate ────────────────── TCP server, ping
//!  attacker ─── outer ──▶     10.9.0.1 ══════ lan ══════▶ Tidegate, connects during the flood
//!  (any source address)                                   10.9.0.3
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use wg_common::headers::{IPV4_LEN, PROTOCOL_UDP, UDP_LEN};
use wg_common::id::ReceiverIndex;
use wg_common::protocol::INITIATION_LEN;
use wg_userspace::key::{PresharedKey, PrivateKey, PublicKey};
use wg_userspace::noise::{Identity, RemoteStatic, Timestamp, initiate};
use xtask::demonstration::{CLIENT_CONF, GATEWAY_CONF, Programs, Tools, spawn_peer};
use xtask::lab::{self, CLIENT_V4, GATEWAY_V4, HOST_V4, Lab, OUTER, Process, Space};

const LIMIT: Duration = Duration::from_secs(10);
/// Several times Rekey-Timeout: a handshake under load needs a second try at least.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(40);
const LATE_INNER: &str = "10.9.0.3";
const LATE_PORT: u16 = 51822;
const GATEWAY_INNER: &str = "10.9.0.1";

/// Unit of the times in `/proc/PID/stat`: the same on every Linux, whatever its timer does.
const TICKS_PER_SECOND: f64 = 100.0;

fn tidegate() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_tidegate"))
}

/// `tidegate run -f` in a namespace.
struct Daemon<'a> {
    space: &'a Space,
    interface: String,
    process: Process,
}

impl<'a> Daemon<'a> {
    fn start(lab: &Lab, space: &'a Space, suffix: char, options: &[&str], conf: &str) -> Self {
        let interface = lab.interface(suffix);
        let mut command = space.command(tidegate());
        command.args(["run", "-f", &interface]).args(options);
        let process = space.spawn("tidegate-run", &mut command).unwrap();
        let mut daemon = Daemon { space, interface, process };
        let ready = lab::wait_for("the daemon", LIMIT, || {
            anyhow::ensure!(daemon.process.ended()?.is_none(), "it ended");
            Ok(daemon.status())
        });
        ready.unwrap_or_else(|error| panic!("{error:#}: {}", daemon.process.errors()));
        let keys: Vec<&str> = conf.lines().filter(|line| !line.starts_with("Address")).collect();
        let file = lab.write(&format!("{}.set", daemon.interface), &keys.join("\n")).unwrap();
        daemon.space.run("wg", &["setconf", &daemon.interface, file.to_str().unwrap()]).unwrap();
        daemon.space.configure(&daemon.interface, conf).unwrap();
        daemon
    }

    /// What `tidegate show` says of its data path.
    fn status(&self) -> Option<Value> {
        let text = self.space.run(tidegate(), &["show", &self.interface, "--json"]).ok()?;
        let shown: Value = serde_json::from_str(&text).ok()?;
        shown.pointer("/interfaces/0/data_path").cloned()
    }

    fn is_under_load(&self) -> bool {
        self.status().unwrap()["under_load"] == true
    }

    fn drops(&self) -> BTreeMap<String, u64> {
        serde_json::from_value(self.status().unwrap()["drops"].clone()).unwrap()
    }

    /// Endpoint and time of the latest handshake of the peer that has this inner address.
    fn peer(&self, inner: &str) -> (String, u64) {
        let dump = self.space.run("wg", &["show", &self.interface, "dump"]).unwrap();
        let line = dump.lines().find(|line| line.contains(inner)).unwrap();
        let fields: Vec<&str> = line.split('\t').collect();
        (fields[2].to_owned(), fields[4].parse().unwrap())
    }

    /// Seconds that processors have spent on it.
    fn cpu_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.pid())).unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let ticks = |at: usize| fields.split_whitespace().nth(at).unwrap().parse::<f64>().unwrap();
        (ticks(11) + ticks(12)) / TICKS_PER_SECOND
    }
}

/// Somebody at the outer link who knows the gateway's public key, and writes what source address he
/// likes.
struct Attacker {
    socket: OwnedFd,
    messages: Vec<[u8; INITIATION_LEN]>,
    /// Addresses and ports of honest peers: each of his messages in four comes from one of them.
    victims: Vec<SocketAddrV4>,
    rng: StdRng,
}

impl Attacker {
    fn new(space: &Space, victims: Vec<SocketAddrV4>) -> Self {
        let namespace = File::open(Path::new("/run/netns").join(space.name())).unwrap();
        // A namespace belongs to a thread, a socket stays in the one where it was made.
        let open = || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), kind).unwrap();
            let (family, flags) = (AddressFamily::INET, SocketFlags::CLOEXEC);
            socket_with(family, SocketType::RAW, flags, Some(ipproto::RAW)).unwrap()
        };
        let socket = thread::scope(|scope| scope.spawn(open).join().unwrap());
        let mut rng = StdRng::seed_from_u64(1);
        let identity = Identity::new(PrivateKey::generate(&mut rng));
        let gateway = PrivateKey::from_base64(lab::conf_values(GATEWAY_CONF, "PrivateKey")[0])
            .unwrap()
            .public_key();
        let remote = RemoteStatic::new(&identity, gateway, PresharedKey::default());
        let mut initiation = |number: u32| {
            let index = ReceiverIndex::from_wire(number.to_le_bytes());
            let timestamp = Timestamp::from_unix(1_800_000_000, number);
            initiate(&identity, &remote, index, timestamp, None, &mut rng).unwrap().1
        };
        let messages = (0..256).map(&mut initiation).collect();
        Self { socket, messages, victims, rng: StdRng::seed_from_u64(2) }
    }

    fn send(&mut self) -> bool {
        let message = self.messages[self.rng.random_range(..self.messages.len())];
        let from = if self.rng.random_ratio(1, 4) {
            self.victims[self.rng.random_range(..self.victims.len())]
        } else {
            let [_, b, c, d] = self.rng.random::<[u8; 4]>();
            SocketAddrV4::new(Ipv4Addr::new(10, b, c, d), self.rng.random_range(1024..=u16::MAX))
        };
        let to: SocketAddrV4 = format!("{GATEWAY_V4}:51820").parse().unwrap();
        sendto(&self.socket, &packet(from, to, &message), SendFlags::empty(), &to).is_ok()
    }

    /// Sends in bursts, `per_second` messages in all, until it is told to stop; counts them.
    fn flood(&mut self, per_second: u32, pause: Duration, stop: &AtomicBool, sent: &AtomicU64) {
        let begin = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let due = (begin.elapsed().as_secs_f64() * f64::from(per_second)) as u64;
            for _ in sent.load(Ordering::Relaxed)..due {
                if self.send() {
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            }
            thread::sleep(pause);
        }
    }
}

/// An IPv4 packet; the kernel writes its length and checksum, and a UDP checksum it may lack.
fn packet(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; IPV4_LEN + UDP_LEN];
    (packet[0], packet[8], packet[9]) = (0x45, 64, PROTOCOL_UDP);
    packet[12..16].copy_from_slice(&from.ip().octets());
    packet[16..20].copy_from_slice(&to.ip().octets());
    packet[20..22].copy_from_slice(&from.port().to_be_bytes());
    packet[22..24].copy_from_slice(&to.port().to_be_bytes());
    let len = (UDP_LEN + payload.len()) as u16;
    packet[24..26].copy_from_slice(&len.to_be_bytes());
    packet.extend_from_slice(payload);
    packet
}

/// What a test needs, unless it must be skipped.
fn lab(test: &str) -> Option<Lab> {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    let lab = Lab::new().unwrap();
    // Answers to any address go back to the attacker's link, and none is filtered for it.
    lab.gateway.ip(&format!("route add default via {CLIENT_V4}")).unwrap();
    for link in ["all", OUTER] {
        lab.gateway.set_sysctl(&format!("net/ipv4/conf/{link}/rp_filter"), "0").unwrap();
    }
    Some(lab)
}

/// The `wg0.conf`s of the gateway and of the peer that connects during the flood.
fn confs() -> (String, String) {
    let late_key = PrivateKey::from_bytes([0x4a; 32]);
    let late: PublicKey = late_key.public_key();
    let gateway_key = lab::conf_values(CLIENT_CONF, "PublicKey")[0];
    (
        format!("{GATEWAY_CONF}\n[Peer]\nPublicKey = {late}\nAllowedIPs = {LATE_INNER}/32\n"),
        format!(
            "[Interface]\nAddress = {LATE_INNER}/32\nListenPort = {LATE_PORT}\nPrivateKey = {}\n\
             [Peer]\nPublicKey = {gateway_key}\nAllowedIPs = {GATEWAY_INNER}/32\n\
             Endpoint = 192.168.20.1:51820\nPersistentKeepalive = 1\n",
            *late_key.to_base64()
        ),
    )
}

fn honest_peers_in_a_flood(test: &str, options: &[&str]) {
    let Some(lab) = lab(test) else { return };
    let programs = Programs::in_folder(tidegate().parent().unwrap()).unwrap();
    let (gateway_conf, late_conf) = confs();
    let gateway = Daemon::start(&lab, &lab.gateway, 'g', options, &gateway_conf);
    let mut client = spawn_peer(&lab, &programs, CLIENT_CONF, &["--initiate"]).unwrap();
    client.event("handshake", LIMIT).unwrap();
    assert!(lab.client.ping(HOST_V4, 3, &[]).unwrap().answered >= 2);
    assert!(!gateway.is_under_load());
    let mode = options[options.len() - 1];
    assert_eq!(gateway.status().unwrap()["mode"], mode, "{:?}", gateway.status());
    let (endpoint, _) = gateway.peer("10.9.0.2");
    let late: SocketAddrV4 = format!("{HOST_V4}:{LATE_PORT}").parse().unwrap();

    let mut attacker = Attacker::new(&lab.client, vec![endpoint.parse().unwrap(), late]);
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let begin = Instant::now();
    let flooded = thread::scope(|scope| {
        // A thousand at once: more than wait without load.
        scope.spawn(|| attacker.flood(4000, Duration::from_millis(250), &stop, &sent));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let load = lab::wait_for("load", LIMIT, || Ok(gateway.is_under_load().then_some(())));
            load.unwrap_or_else(|error| panic!("{error:#}: {:?}", gateway.status()));

            let connecting = Instant::now();
            let daemon = Daemon::start(&lab, &lab.host, 'h', &["--mode", "udp"], &late_conf);
            let connected = lab::wait_for("a handshake", HANDSHAKE_LIMIT, || {
                Ok((daemon.peer(GATEWAY_INNER).1 > 0).then_some(()))
            });
            connected.unwrap_or_else(|error| panic!("{error:#}: {:?}", gateway.status()));
            println!("connected after {:?} of flood", connecting.elapsed());
            assert!(lab.host.ping(GATEWAY_INNER, 10, &[]).unwrap().answered >= 5);

            assert!(lab.client.ping(HOST_V4, 20, &[]).unwrap().answered >= 10);
            let transfers = Tools::start(&lab, &programs).unwrap().files(1 << 20).unwrap();
            assert!(transfers.iter().all(|transfer| transfer.equal), "{transfers:?}");
            daemon
        }));
        stop.store(true, Ordering::Relaxed);
        outcome
    });
    let late_daemon = flooded.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let (sent, taken) = (sent.into_inner(), begin.elapsed());
    let per_second = sent as f64 / taken.as_secs_f64();
    let drops = gateway.drops();
    println!("{sent} initiations in {taken:?}: {per_second:.0} a second; {drops:?}");
    assert!(per_second >= 2000.0, "{per_second}");
    assert!(drops["cookie_demanded"] > 0, "{drops:?}");
    // Nobody's endpoint has moved to where the attacker is.
    assert_eq!(gateway.peer("10.9.0.2").0, endpoint);
    assert_eq!(gateway.peer(LATE_INNER).0, late.to_string());

    // When it is over, so is the load, and a handshake needs no cookie.
    let calm =
        lab::wait_for(
            "the end of the load",
            LIMIT,
            || Ok((!gateway.is_under_load()).then_some(())),
        );
    calm.unwrap();
    drop(late_daemon);
    assert!(lab.client.ping(HOST_V4, 5, &[]).unwrap().answered >= 4);
}

#[test]
fn honest_peers_connect_and_talk_during_a_flood_in_udp_mode() {
    let test = "honest_peers_connect_and_talk_during_a_flood_in_udp_mode";
    honest_peers_in_a_flood(test, &["--mode", "udp"]);
}

#[test]
fn honest_peers_connect_and_talk_during_a_flood_in_native_mode() {
    let test = "honest_peers_connect_and_talk_during_a_flood_in_native_mode";
    honest_peers_in_a_flood(test, &["--xdp", OUTER, "--mode", "native"]);
}

/// Prints what an even flood costs the gateway: run it by name, with a release build.
#[test]
#[ignore = "a measurement, not a test"]
fn cost_of_a_flood() {
    let Some(lab) = lab("cost_of_a_flood") else { return };
    let (gateway_conf, _) = confs();
    let gateway = Daemon::start(&lab, &lab.gateway, 'g', &["--mode", "udp"], &gateway_conf);
    let victim = format!("{CLIENT_V4}:51821").parse().unwrap();
    let mut attacker = Attacker::new(&lab.client, vec![victim]);
    for rate in [0, 2000, 10_000, 50_000] {
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let (cpu, begin, before) = (gateway.cpu_seconds(), Instant::now(), gateway.drops());
        let mut loaded = 0;
        thread::scope(|scope| {
            scope.spawn(|| attacker.flood(rate, Duration::from_millis(1), &stop, &sent));
            for _ in 0..10 {
                thread::sleep(Duration::from_millis(500));
                loaded += u32::from(gateway.is_under_load());
            }
            stop.store(true, Ordering::Relaxed);
        });
        let taken = begin.elapsed().as_secs_f64();
        let share = (gateway.cpu_seconds() - cpu) / taken * 100.0;
        let mut drops = gateway.drops();
        for (reason, count) in &mut drops {
            *count -= before.get(reason).copied().unwrap_or(0);
        }
        let sent = sent.into_inner() as f64 / taken;
        println!("{sent:.0}/s: {share:.1} % of a core, under load {loaded} of 10 times, {drops:?}");
        thread::sleep(Duration::from_secs(2));
    }
}
