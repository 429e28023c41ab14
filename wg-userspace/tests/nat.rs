//! A gateway that translates by `#! Nat`, with the whole daemon and no rule of netfilter.
//!
//! ```text
//!  client 172.31.0.2 ═══ wan ═══ gateway ─── lan ─── host
//!  10.9.0.2                      10.9.0.1   192.168.77.1   192.168.77.2
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    collections::HashSet,
    fs::File,
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    path::PathBuf,
    process::Output,
    time::{Duration, Instant},
};

use common::tidegate;
use serde_json::Value;
use wg_userspace::key::PrivateKey;
use wg_userspace::sys::netns::NetNs;
use xtask::lab::{self, End, Layout, Site, Space, find_program};

const LAYOUT: Layout = Layout {
    hosts: &["client", "gateway", "host"],
    routers: &["gateway"],
    links: &[
        &[
            End { host: "client", nic: "wan", addresses: &["172.31.0.2/24"] },
            End { host: "gateway", nic: "wan", addresses: &["172.31.0.1/24"] },
        ],
        &[
            End { host: "gateway", nic: "lan", addresses: &["192.168.77.1/24"] },
            End { host: "host", nic: "eth0", addresses: &["192.168.77.2/24"] },
        ],
    ],
    routes: &[],
    private: false,
};
const HOST: &str = "192.168.77.2";
const MASQUERADE: &str = "#! Nat = masquerade out=lan bypass-firewall";
const LIMIT: Duration = Duration::from_secs(30);

/// An end of the tunnel that was brought up by its file.
struct Tunnel<'a> {
    space: &'a Space,
    interface: String,
    file: PathBuf,
    text: String,
}

impl Drop for Tunnel<'_> {
    fn drop(&mut self) {
        let _ = self.tidegate(&["down", self.file.to_str().unwrap()]);
    }
}

impl<'a> Tunnel<'a> {
    fn up(site: &'a Site, role: &'static str, text: String, lines: &str) -> Self {
        let interface = site.interface(role.chars().next().unwrap());
        let file = site.write(&format!("{interface}.conf"), &text.replace("LINES", lines)).unwrap();
        let tunnel = Self { space: site.space(role), interface, file, text };
        tunnel.succeeds(&["up", tunnel.path(), "--mode", "udp", "--workers", "1"]);
        tunnel
    }

    fn path(&self) -> &str {
        self.file.to_str().unwrap()
    }

    fn tidegate(&self, arguments: &[&str]) -> Output {
        let mut command = self.space.command(tidegate());
        command.args(arguments).env("TIDEGATE_TEST_NAT_PORTS", "256").output().unwrap()
    }

    fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.tidegate(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn reload(&self, lines: &str) -> String {
        std::fs::write(&self.file, self.text.replace("LINES", lines)).unwrap();
        self.succeeds(&["reload", self.path()])
    }

    fn nat(&self) -> Value {
        serde_json::from_str(&self.succeeds(&["show", &self.interface, "nat", "--json"])).unwrap()
    }
}

/// Both ends, with these lines at the gateway.
fn tunnel<'a>(site: &'a Site, lines: &str) -> [Tunnel<'a>; 2] {
    let key = |byte: u8| PrivateKey::from_bytes([byte; 32]);
    let (client, gateway) = (key(0x11), key(0x22));
    let gateway_text = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 51820\nAddress = 10.9.0.1/24\nLINES\n\
         [Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.2/32\n",
        gateway.to_base64().as_str(),
        client.public_key(),
    );
    let client_text = format!(
        "[Interface]\nPrivateKey = {}\nAddress = 10.9.0.2/24\nLINES\n\
         [Peer]\nPublicKey = {}\nEndpoint = 172.31.0.1:51820\n\
         AllowedIPs = 10.9.0.0/24, 192.168.77.0/24\n",
        client.to_base64().as_str(),
        gateway.public_key(),
    );
    [Tunnel::up(site, "gateway", gateway_text, lines), Tunnel::up(site, "client", client_text, "")]
}

fn skips(test: &str) -> bool {
    let missing = lab::unavailable()
        .or_else(|| find_program("ping").is_none().then(|| "needs the program `ping`".to_owned()));
    if let Some(reason) = &missing {
        eprintln!("SKIPPED {test}: {reason}");
    }
    missing.is_some()
}

/// Runs something in a host's namespace.
fn inside<R: Send>(space: &Space, body: impl FnOnce() -> R + Send) -> R {
    let namespace = File::open(format!("/run/netns/{}", space.name())).unwrap();
    NetNs::from(OwnedFd::from(namespace)).run(body)
}

/// Bytes that are nowhere the same.
fn blob(len: usize) -> Vec<u8> {
    let mut word = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

/// Sends `sent` to the host by TCP, which sends it back; gives what came, and whom the host saw.
fn echo_by_tcp(site: &Site, sent: &[u8]) -> (Vec<u8>, IpAddr) {
    let listener = inside(site.space("host"), || TcpListener::bind((HOST, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let host = scope.spawn(move || {
            let (mut stream, from) = listener.accept().unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            stream.write_all(&received).unwrap();
            from.ip()
        });
        let received = inside(site.space("client"), || {
            let mut stream = TcpStream::connect_timeout(&to, LIMIT).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.write_all(sent).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            received
        });
        (received, host.join().unwrap())
    })
}

/// A datagram to the host and back; whom the host saw, if it saw anybody.
fn echo_by_udp(site: &Site) -> Option<SocketAddr> {
    let bind = |role: &str, at: &str| {
        let socket = inside(site.space(role), || UdpSocket::bind((at, 0)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        socket
    };
    let (host, client) = (bind("host", HOST), bind("client", "10.9.0.2"));
    let mut buffer = [0; 64];
    for _ in 0..4 {
        client.send_to(b"hello", host.local_addr().unwrap()).unwrap();
        let Ok((len, from)) = host.recv_from(&mut buffer) else { continue };
        // It may know no way back.
        if host.send_to(&buffer[..len], from).is_err() {
            continue;
        }
        let Ok((len, _)) = client.recv_from(&mut buffer) else { continue };
        assert_eq!(&buffer[..len], b"hello");
        return Some(from);
    }
    None
}

fn is_answered(site: &Site) -> bool {
    site.space("client").ping(HOST, 3, &["-W", "1"]).is_ok_and(|ping| ping.answered > 0)
}

fn seen_as(site: &Site) -> Option<IpAddr> {
    echo_by_udp(site).map(|from| from.ip())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_gateway_translates_and_follows_addresses_and_its_file() {
    if skips("a_gateway_translates_and_follows_addresses_and_its_file") {
        return;
    }
    let site = Site::new(&LAYOUT).unwrap();
    let [gateway, _client] = tunnel(&site, MASQUERADE);
    assert!(is_answered(&site), "{}", gateway.nat());
    assert_eq!(seen_as(&site), Some(ip("192.168.77.1")));
    let sent = blob(8 << 20);
    let (received, from) = echo_by_tcp(&site, &sent);
    assert_eq!(from, ip("192.168.77.1"));
    assert!(received == sent, "all bytes come back as they were");

    let shown = gateway.nat();
    assert!(shown["flow_count"].as_u64().unwrap() >= 3, "{shown}");
    assert_eq!(shown["externals"][0]["address"], "192.168.77.1", "{shown}");
    assert_eq!(shown["talkers"][0]["inner"], "10.9.0.2", "{shown}");
    assert!(shown["talkers"][0]["bytes_out"].as_u64().unwrap() > 8 << 20, "{shown}");
    assert!(shown["events"]["translated_out"].as_u64().unwrap() > 0, "{shown}");

    // Another address: new flows have it at once, or nearly.
    let space = site.space("gateway");
    space.ip("addr del 192.168.77.1/24 dev lan").unwrap();
    space.ip("addr add 192.168.77.9/24 dev lan").unwrap();
    let ended = Instant::now() + LIMIT;
    while seen_as(&site) != Some(ip("192.168.77.9")) {
        assert!(Instant::now() < ended, "{}", gateway.nat());
    }
    // None: nothing passes untranslated.
    space.ip("addr del 192.168.77.9/24 dev lan").unwrap();
    space.ip("route add 192.168.77.0/24 dev lan").unwrap();
    let ended = Instant::now() + LIMIT;
    while gateway.nat()["drops"]["no_external"].is_null() {
        assert_eq!(seen_as(&site), None);
        assert!(Instant::now() < ended, "{}", gateway.nat());
    }
    space.ip("addr add 192.168.77.1/24 dev lan").unwrap();
    let ended = Instant::now() + LIMIT;
    while seen_as(&site) != Some(ip("192.168.77.1")) {
        assert!(Instant::now() < ended, "{}", gateway.nat());
    }

    // Other lines, and none.
    let allow = format!("{MASQUERADE}\n#! Allow = 10.9.0.0/24 -> 192.168.77.0/24 udp");
    let told = gateway.reload(&allow);
    assert!(told.contains("+ #! Allow = 10.9.0.0/24 -> 192.168.77.0/24 udp"), "{told}");
    assert_eq!(seen_as(&site), Some(ip("192.168.77.1")));
    assert!(!is_answered(&site), "only UDP is allowed");
    let shown = gateway.nat();
    assert!(shown["drops"]["not_allowed"].as_u64().unwrap() > 0, "{shown}");
    assert!(shown["allows"][0]["flows"].as_u64().unwrap() > 0, "{shown}");
    gateway.reload("");
    assert_eq!(seen_as(&site), None, "the host knows no way back to what is not translated");
    let text = gateway.succeeds(&["show", &gateway.interface, "nat"]);
    assert!(text.contains("no `#! Nat`"), "{text}");
    gateway.reload(MASQUERADE);
    assert!(is_answered(&site), "{}", gateway.nat());
}

#[test]
fn many_short_flows_use_few_ports_again_and_again() {
    const FLOWS: usize = 800;

    if skips("many_short_flows_use_few_ports_again_and_again") {
        return;
    }
    let site = Site::new(&LAYOUT).unwrap();
    let [gateway, _client] = tunnel(&site, MASQUERADE);
    assert!(is_answered(&site), "{}", gateway.nat());
    let listener = inside(site.space("host"), || TcpListener::bind((HOST, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    let ports = std::thread::scope(|scope| {
        let host = scope.spawn(move || {
            let mut ports = HashSet::new();
            for _ in 0..FLOWS {
                let (mut stream, from) = listener.accept().unwrap();
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                stream.write_all(&byte).unwrap();
                ports.insert(from.port());
            }
            ports
        });
        inside(site.space("client"), || {
            for number in 0..FLOWS {
                let mut stream = TcpStream::connect_timeout(&to, LIMIT).unwrap();
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                stream.write_all(&[number as u8]).unwrap();
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                assert_eq!(byte, [number as u8]);
            }
        });
        host.join().unwrap()
    });
    assert!(ports.len() <= 256, "{} ports", ports.len());
    let shown = gateway.nat();
    assert!(shown["externals"][0]["ports"]["tcp"] == 256, "{shown}");
}
