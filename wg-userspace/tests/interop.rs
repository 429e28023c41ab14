//! Tunnels with other implementations, each as the program that its users run.
//!
//! ```text
//!  client                                  gateway                  LAN host
//!  another implementation ══ outer (veth) ══ Tidegate ── lan (veth) ── TCP server
//!  10.9.0.2, fd09::2                       10.9.0.1, fd09::1        192.168.20.2, fd20::2
//! ```
//!
//! Debian has wireguard-go. The others are tested where they are in PATH:
//! `cargo install boringtun-cli gotatun-cli`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER, Programs, Tools},
    lab::{
        self, CLIENT_V4, CLIENT_V6, GATEWAY_V4, GATEWAY_V6, HOST_V4, HOST_V6, Lab, Process, Space,
        find_program,
    },
};

const LIMIT: Duration = Duration::from_secs(10);
const CLIENT_INNER: [&str; 2] = ["10.9.0.2", "fd09::2"];

/// An implementation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Implementation {
    Tidegate,
    WireguardGo,
    Boringtun,
    Gotatun,
}

use Implementation::{Boringtun, Gotatun, Tidegate, WireguardGo};

impl Implementation {
    fn program(self) -> Option<PathBuf> {
        match self {
            Tidegate => Some(PathBuf::from(env!("CARGO_BIN_EXE_tidegate"))),
            WireguardGo => find_program("wireguard-go"),
            Boringtun => find_program("boringtun-cli"),
            Gotatun => find_program("gotatun"),
        }
    }

    fn arguments(self, log: &str) -> Vec<&str> {
        match self {
            Tidegate => vec!["run", "--mode", "udp", "-f"],
            WireguardGo => vec!["-f"],
            Boringtun | Gotatun => vec!["-f", "--disable-drop-privileges", "--log", log],
        }
    }
}

/// Who sends the first initiation: only that side knows where the other is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum First {
    They,
    We,
}

/// Why a test cannot be run, in the line that says so.
fn unavailable(test: &str, other: Implementation) -> bool {
    let reason = match (lab::unavailable(), other.program()) {
        (Some(reason), _) => reason,
        (None, None) => format!("needs {other:?} in PATH"),
        (None, Some(_)) => return false,
    };
    eprintln!("SKIPPED {test}: {reason}");
    true
}

/// A daemon of some implementation, and its interface.
struct Device<'a> {
    space: &'a Space,
    interface: String,
    /// Ended before its socket is removed.
    process: Option<Process>,
}

impl<'a> Device<'a> {
    /// Starts the daemon, gives it the keys and peers of a `wg0.conf` in one request, and the
    /// interface its addresses and routes.
    fn start(
        lab: &Lab,
        space: &'a Space,
        interface: String,
        implementation: Implementation,
        conf: &str,
    ) -> Device<'a> {
        let log = lab.path(&format!("{interface}.log"));
        let mut command = space.command(implementation.program().unwrap());
        command.args(implementation.arguments(log.to_str().unwrap())).arg(&interface);
        // As its users have to say on Linux, where the kernel's own is preferred.
        command.env("WG_PROCESS_FOREGROUND", "1");
        let mut process = space.spawn(&format!("{implementation:?}"), &mut command).unwrap();
        let ready = lab::wait_for("its socket", LIMIT, || {
            let ended = process.ended()?;
            anyhow::ensure!(ended.is_none(), "it ended: {}", process.errors());
            Ok((socket(&interface).exists() && space.has_interface(&interface)).then_some(()))
        });
        let device = Device { space, interface, process: Some(process) };
        ready.unwrap_or_else(|error| panic!("{implementation:?}: {error:#}"));
        let keys: Vec<&str> =
            conf.lines().filter(|line| !line.trim_start().starts_with("Address")).collect();
        let file = lab.write(&format!("{}.set", device.interface), &keys.join("\n")).unwrap();
        device.wg(&["setconf", &device.interface, file.to_str().unwrap()]);
        space.configure(&device.interface, conf).unwrap();
        device
    }

    fn wg(&self, arguments: &[&str]) -> String {
        self.space.run("wg", arguments).unwrap()
    }

    /// A line for each peer, in its fields, of what `wg show` says by this word.
    fn show(&self, what: &str) -> Vec<Vec<String>> {
        let text = self.wg(&["show", &self.interface, what]);
        text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
    }

    /// When the last handshake with a peer was, in seconds since 1970; 0 for never.
    fn latest_handshake(&self, public_key: &str) -> u64 {
        let all = self.show("latest-handshakes");
        let line = all.iter().find(|line| line[0] == public_key).expect("a peer");
        line[1].parse().unwrap()
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        drop(self.process.take());
        // Not every daemon takes its socket along.
        let _ = fs::remove_file(socket(&self.interface));
    }
}

fn socket(interface: &str) -> PathBuf {
    Path::new("/var/run/wireguard").join(format!("{interface}.sock"))
}

fn assert_answered(space: &Space, to: &[&str]) {
    for to in to {
        let ping = space.ping(to, 5, &[]).unwrap();
        assert!(ping.answered >= 4, "{to}: {ping:?}");
    }
}

/// A tunnel with a preshared key: echo requests and files both ways, of both versions of IP.
fn talk(test: &str, other: Implementation, first: First, outside: [&str; 2]) {
    if unavailable(test, other) {
        return;
    }
    let [gateway_address, client_address] = outside;
    let lab = Lab::new().unwrap();
    let programs =
        Programs::in_folder(Tidegate.program().unwrap().parent().expect("a folder")).unwrap();
    let (gateway_conf, client_conf) = match first {
        First::They => (GATEWAY_CONF.to_owned(), CLIENT_CONF.replace(GATEWAY_V4, gateway_address)),
        First::We => (
            format!("{GATEWAY_CONF}Endpoint = {client_address}:51821\n"),
            CLIENT_CONF
                .replace("[Interface]", "[Interface]\nListenPort = 51821")
                .replace("Endpoint =", "# Endpoint ="),
        ),
    };
    assert!(client_conf.contains("\nPresharedKey = "));
    let interface = |suffix| lab.interface(suffix);
    let gateway = Device::start(&lab, &lab.gateway, interface('g'), Tidegate, &gateway_conf);
    let client = Device::start(&lab, &lab.client, interface('c'), other, &client_conf);

    let (near, far): (&Space, &[&str]) = match first {
        First::They => (&lab.client, &[GATEWAY_INNER[0], GATEWAY_INNER[1], HOST_V4, HOST_V6]),
        First::We => (&lab.host, &CLIENT_INNER),
    };
    assert_answered(near, far);
    assert_answered(&lab.host, &CLIENT_INNER);
    assert_answered(&lab.client, &[HOST_V4, HOST_V6]);
    let transfers = Tools::start(&lab, &programs).unwrap().files(1 << 20).unwrap();
    assert!(transfers.iter().all(|transfer| transfer.equal), "{transfers:?}");

    for device in [&gateway, &client] {
        assert_ne!(device.show("latest-handshakes")[0][1], "0", "{:?}", device.show("dump"));
    }
    let seen = &gateway.show("endpoints")[0][1];
    assert!(seen.starts_with(&format!("{client_address}:")), "{seen}");
}

/// Bytes of whole messages, as kernel's selftest has them: ten echo requests and their answers, and a
/// handshake, the initiator's with its first packet behind it.
#[test]
fn transfer_is_counted_as_the_kernel_counts_it() {
    const TEST: &str = "transfer_is_counted_as_the_kernel_counts_it";
    if unavailable(TEST, Tidegate) {
        return;
    }
    let lab = Lab::new().unwrap();
    let gateway = Device::start(&lab, &lab.gateway, lab.interface('g'), Tidegate, GATEWAY_CONF);
    let client = Device::start(&lab, &lab.client, lab.interface('c'), Tidegate, CLIENT_CONF);
    assert_eq!(lab.client.ping(GATEWAY_INNER[0], 10, &[]).unwrap().answered, 10);
    let [of_client, of_gateway] =
        [&client, &gateway].map(|device| device.show("transfer")[0].clone());
    assert_eq!(of_client[1..], ["1372", "1428"]);
    assert_eq!(of_gateway[1..], ["1428", "1372"]);
}

/// What a peer costs must not be on a stack, or grow with the number of peers.
#[test]
fn thirty_thousand_peers_are_taken_in_one_request() {
    const TEST: &str = "thirty_thousand_peers_are_taken_in_one_request";
    const PEER_COUNT: u32 = 30_000;
    if unavailable(TEST, Tidegate) {
        return;
    }
    let lab = Lab::new().unwrap();
    let gateway = Device::start(&lab, &lab.gateway, lab.interface('g'), Tidegate, GATEWAY_CONF);
    let client = Device::start(&lab, &lab.client, lab.interface('c'), Tidegate, CLIENT_CONF);
    let mut conf = String::new();
    for peer in 0..PEER_COUNT {
        // Any 32 bytes are a public key; these are base64 of a number and zeros.
        let digits = [24, 18, 12, 6, 0].map(|shift| {
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
                [(peer >> shift & 63) as usize] as char
        });
        let [_, a, b, c] = peer.to_be_bytes();
        let digits: String = digits.iter().collect();
        conf += &format!(
            "[Peer]\nPublicKey = A{digits}{}=\nAllowedIPs = 10.{}.{b}.{c}/32\n",
            "A".repeat(37),
            100 + a
        );
    }
    let file = lab.write("many.conf", &conf).unwrap();
    gateway.wg(&["addconf", &gateway.interface, file.to_str().unwrap()]);
    assert_eq!(gateway.show("peers").len(), PEER_COUNT as usize + 1);
    assert_answered(&lab.client, &[GATEWAY_INNER[0]]);
    assert_ne!(client.show("latest-handshakes")[0][1], "0");
}

const V4: [&str; 2] = [GATEWAY_V4, CLIENT_V4];

fn v6() -> [String; 2] {
    [GATEWAY_V6, CLIENT_V6].map(|address| format!("[{address}]"))
}

/// The four tests of an implementation.
macro_rules! tests {
    ($other:ident: $they_v4:ident, $they_v6:ident, $we_v4:ident, $we_v6:ident) => {
        tests!($they_v4, $other, First::They, V4);
        tests!($they_v6, $other, First::They, v6().each_ref().map(String::as_str));
        tests!($we_v4, $other, First::We, V4);
        tests!($we_v6, $other, First::We, v6().each_ref().map(String::as_str));
    };
    ($name:ident, $other:ident, $first:expr, $outside:expr) => {
        #[test]
        fn $name() {
            talk(stringify!($name), $other, $first, $outside);
        }
    };
}

tests!(
    WireguardGo: wireguard_go_initiates_over_ipv4,
    wireguard_go_initiates_over_ipv6,
    we_initiate_to_wireguard_go_over_ipv4,
    we_initiate_to_wireguard_go_over_ipv6
);
tests!(
    Boringtun: boringtun_cli_initiates_over_ipv4,
    boringtun_cli_initiates_over_ipv6,
    we_initiate_to_boringtun_cli_over_ipv4,
    we_initiate_to_boringtun_cli_over_ipv6
);
tests!(
    Gotatun: gotatun_initiates_over_ipv4,
    gotatun_initiates_over_ipv6,
    we_initiate_to_gotatun_over_ipv4,
    we_initiate_to_gotatun_over_ipv6
);

/// One of the tunnels that are rekeyed side by side.
struct Tunnel {
    other: Implementation,
    first: First,
    number: usize,
    public_key: String,
    conf: String,
}

impl Tunnel {
    fn ours(&self) -> String {
        format!("10.9.{}.1", 100 + self.number)
    }

    fn theirs(&self) -> String {
        format!("10.9.{}.2", self.number)
    }

    fn port(&self) -> usize {
        52_000 + self.number
    }
}

fn key_pair(space: &Space) -> [String; 2] {
    let pair = space.run("sh", &["-c", "k=$(wg genkey); echo $k; echo $k | wg pubkey"]).unwrap();
    let [private, public] = pair.lines().map(str::to_owned).collect::<Vec<_>>().try_into().unwrap();
    [private, public]
}

/// After Rekey-After-Time, 120 seconds, whoever initiated does so again; nothing that is under way is
/// lost. All implementations, in both roles, by turns over IPv4 and IPv6, at the same time; this is
/// the slow one, and runs beside the others.
#[test]
fn a_rekey_under_traffic_loses_nothing() {
    const TEST: &str = "a_rekey_under_traffic_loses_nothing";
    /// Five a second.
    const PING_COUNT: u32 = 660;
    let mut others = vec![Tidegate];
    for other in [WireguardGo, Boringtun, Gotatun] {
        if !unavailable(&format!("{TEST} with {other:?}"), other) {
            others.push(other);
        }
    }
    if unavailable(TEST, Tidegate) {
        return;
    }
    let lab = Lab::beside_others().unwrap();
    let [gateway_key, gateway_public_key] = key_pair(&lab.gateway);
    let preshared_key = lab.gateway.run("wg", &["genpsk"]).unwrap();
    let mut gateway_conf = format!("[Interface]\nListenPort = 51820\nPrivateKey = {gateway_key}\n");
    let mut tunnels = Vec::new();
    for first in [First::They, First::We] {
        for &other in &others {
            let number = tunnels.len();
            let [key, public_key] = key_pair(&lab.gateway);
            let mut tunnel = Tunnel { other, first, number, public_key, conf: String::new() };
            let [gateway, client] = match number % 2 {
                0 => V4.map(str::to_owned),
                _ => v6(),
            };
            let (port, ours, theirs) = (tunnel.port(), tunnel.ours(), tunnel.theirs());
            tunnel.conf = format!(
                "[Interface]\nListenPort = {port}\nPrivateKey = {key}\nAddress = {theirs}/32\n\
                 [Peer]\nPublicKey = {gateway_public_key}\nPresharedKey = {preshared_key}\
                 AllowedIPs = {ours}/32\n"
            );
            gateway_conf += &format!(
                "Address = {ours}/32\n[Peer]\nPublicKey = {}\nPresharedKey = {preshared_key}\
                 AllowedIPs = {theirs}/32\n",
                tunnel.public_key
            );
            match first {
                First::They => tunnel.conf += &format!("Endpoint = {gateway}:51820\n"),
                First::We => gateway_conf += &format!("Endpoint = {client}:{port}\n"),
            }
            tunnels.push(tunnel);
        }
    }
    let gateway = Device::start(&lab, &lab.gateway, lab.interface('g'), Tidegate, &gateway_conf);
    let devices: Vec<_> = tunnels
        .iter()
        .map(|tunnel| {
            let interface =
                lab.interface(char::from(b'a' + tunnel.number as u8).to_ascii_uppercase());
            Device::start(&lab, &lab.client, interface, tunnel.other, &tunnel.conf)
        })
        .collect();
    for tunnel in tunnels.iter().filter(|tunnel| tunnel.first == First::We) {
        let ping = lab.gateway.ping(&tunnel.theirs(), 3, &["-I", &tunnel.ours()]).unwrap();
        assert!(ping.answered >= 2, "{:?}: {ping:?}", tunnel.other);
    }
    thread::scope(|scope| {
        let pings: Vec<_> = tunnels
            .iter()
            .zip(&devices)
            .map(|(tunnel, device)| {
                scope.spawn(|| {
                    let (to, options) = (tunnel.ours(), ["-I", &device.interface]);
                    assert_eq!(lab.client.ping(&to, 3, &options).unwrap().answered, 3);
                    let before = gateway.latest_handshake(&tunnel.public_key);
                    let ping = lab.client.ping(&to, PING_COUNT, &options).unwrap();
                    (ping, before, gateway.latest_handshake(&tunnel.public_key))
                })
            })
            .collect();
        for (tunnel, ping) in tunnels.iter().zip(pings) {
            let (ping, before, after) = ping.join().unwrap();
            let Tunnel { other, first, .. } = tunnel;
            println!("{other:?}, {first:?} first: {ping:?}, rekeyed after {} s", after - before);
            assert!(before != 0 && after >= before + 100, "{other:?} {first:?}: no new handshake");
            assert_eq!(ping.answered, ping.sent, "{other:?} {first:?}: packets are lost");
        }
    });
}
