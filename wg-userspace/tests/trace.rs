//! What `tidegate trace` says of a packet, and what becomes of one that is sent.
//!
//! ```text
//!  client 172.31.0.2 ═══ wan ═══ gateway ─── lan ─── host
//!  10.9.0.2, 10.9.0.77           10.9.0.1   192.168.77.1   192.168.77.2
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    fs::File,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    path::PathBuf,
    process::Output,
    time::{Duration, Instant},
};

use common::tidegate;
use serde_json::Value;
use wg_userspace::key::PrivateKey;
use wg_userspace::sys::netns::NetNs;
use xtask::lab::{self, End, Layout, Site, Space};

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
const INNER: &str = "10.9.0.2";
const LINES: &str = "#! Nat = masquerade out=lan bypass-firewall\n\
                     #! Forward = udp lan:8080 -> 10.9.0.2:5000 bypass-firewall\n\
                     #! Allow = 10.9.0.0/24 -> 192.168.77.0/24 udp 7000-7999\n\
                     #! Allow = 10.9.0.0/24 -> 198.51.100.0/24 udp\n\
                     #! Allow = 10.9.0.0/24 -> 192.168.77.0/24 tcp 7000-7999";
/// Exit codes.
const GETS_THROUGH: i32 = 0;
const DROPPED: i32 = 7;
const LIMIT: Duration = Duration::from_secs(30);
/// What does not come in this time does not come.
const WAIT: Duration = Duration::from_millis(700);

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
        tunnel.succeeds(&["up", tunnel.file.to_str().unwrap(), "--mode", "udp", "--workers", "1"]);
        tunnel
    }

    fn tidegate(&self, arguments: &[&str]) -> Output {
        self.space.command(tidegate()).args(arguments).output().unwrap()
    }

    fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.tidegate(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn reload(&self, lines: &str) {
        std::fs::write(&self.file, self.text.replace("LINES", lines)).unwrap();
        self.succeeds(&["reload", self.file.to_str().unwrap()]);
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.succeeds(arguments)).unwrap()
    }

    /// How often NAT dropped something for a reason.
    fn nat_drops(&self, reason: &str) -> u64 {
        let shown = self.json(&["show", &self.interface, "nat", "--json"]);
        shown["drops"][reason].as_u64().unwrap_or(0)
    }

    /// How often the data path did.
    fn tunnel_drops(&self, reason: &str) -> u64 {
        let shown = self.json(&["show", &self.interface, "--json"]);
        shown["interfaces"][0]["data_path"]["drops"][reason].as_u64().unwrap_or(0)
    }

    /// What is said of a packet, as JSON; the text must be of the same opinion, and so the exit code.
    fn trace(&self, from: &str, to: &str, more: &[&str], code: i32) -> Value {
        let mut arguments = vec!["trace", &self.interface, from, to];
        arguments.extend(more);
        let text = self.tidegate(&arguments);
        arguments.push("--json");
        let json = self.tidegate(&arguments);
        let (said, errors) = (String::from_utf8_lossy(&text.stdout), &text.stderr);
        let context = format!("{arguments:?}: {said}{}", String::from_utf8_lossy(errors));
        println!("{context}");
        assert_eq!((text.status.code(), json.status.code()), (Some(code), Some(code)), "{context}");
        let json: Value = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!(json["verdict"]["fate"] == "dropped", code == DROPPED, "{json}");
        if let Some(reason) = json["verdict"]["reason"].as_str() {
            assert!(said.contains(reason), "{context}");
        }
        json
    }
}

/// Both ends, with these lines at the gateway.
fn tunnel<'a>(site: &'a Site, lines: &str) -> [Tunnel<'a>; 2] {
    let key = |byte: u8| PrivateKey::from_bytes([byte; 32]);
    let (client, gateway) = (key(0x33), key(0x44));
    let gateway_text = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 51820\nAddress = 10.9.0.1/24, fd09::1/64\nLINES\n\
         [Peer]\n#! Name = laptop\nPublicKey = {}\nAllowedIPs = 10.9.0.2/32, fd09::2/128\n",
        gateway.to_base64().as_str(),
        client.public_key(),
    );
    let client_text = format!(
        "[Interface]\nPrivateKey = {}\nAddress = 10.9.0.2/24, 10.9.0.77/24\n\
         [Peer]\nPublicKey = {}\nEndpoint = 172.31.0.1:51820\n\
         AllowedIPs = 10.9.0.0/24, 192.168.77.0/24, 198.51.100.0/24\n",
        client.to_base64().as_str(),
        gateway.public_key(),
    );
    [Tunnel::up(site, "gateway", gateway_text, lines), Tunnel::up(site, "client", client_text, "")]
}

/// Runs something in a host's namespace.
fn inside<R: Send>(space: &Space, body: impl FnOnce() -> R + Send) -> R {
    let namespace = File::open(format!("/run/netns/{}", space.name())).unwrap();
    NetNs::from(OwnedFd::from(namespace)).run(body)
}

fn bind(site: &Site, role: &str, at: &str) -> UdpSocket {
    let socket = inside(site.space(role), || UdpSocket::bind(at).unwrap());
    socket.set_read_timeout(Some(WAIT)).unwrap();
    socket
}

/// Who sent what comes, if anything does.
fn received(at: &UdpSocket) -> Option<SocketAddr> {
    let mut buffer = [0; 64];
    at.recv_from(&mut buffer).ok().map(|(_, from)| from)
}

/// Waits until a count is greater than it was.
fn grows(what: &str, before: u64, count: impl Fn() -> u64) {
    let ended = Instant::now() + LIMIT;
    while count() <= before {
        assert!(Instant::now() < ended, "{what} is not counted");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_is_said_of_a_packet_is_what_becomes_of_it() {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED what_is_said_of_a_packet_is_what_becomes_of_it: {reason}");
        return;
    }
    let site = Site::new(&LAYOUT).unwrap();
    let [gateway, _client] = tunnel(&site, LINES);
    let client = bind(&site, "client", "10.9.0.2:5000");
    let host = bind(&site, "host", "192.168.77.2:7000");

    // Translated: the port that is said to be next is the one that the host sees.
    let said = gateway.trace("10.9.0.2:5000", "192.168.77.2:7000/udp", &[], GETS_THROUGH);
    assert_eq!(said["verdict"]["fate"], "translated", "{said}");
    assert_eq!(said["from_peer"]["name"], "laptop", "{said}");
    assert_eq!(said["worker"]["number"], 0, "{said}");
    assert_eq!(said["nat"]["state"], "new_flow", "{said}");
    assert!(said["nat"]["line"].as_str().unwrap().contains("masquerade out=lan"), "{said}");
    assert_eq!(said["nat"]["external"], "192.168.77.1", "{said}");
    assert!(said["nat"]["external_port"].is_null() && said["egress"]["fits"] == true, "{said}");
    assert_eq!(said["rule"]["flows"], 0, "{said}");
    assert_eq!(said["route"]["link"], "lan", "{said}");
    let next = said["nat"]["next_port"].as_u64().unwrap();
    let shown = gateway.json(&["show", &gateway.interface, "nat", "--json"]);
    assert_eq!(shown["flow_count"], 0, "what is asked changes nothing: {shown}");
    let ended = Instant::now() + LIMIT;
    let from = loop {
        client.send_to(b"one", (HOST, 7000)).unwrap();
        if let Some(from) = received(&host) {
            break from;
        }
        assert!(Instant::now() < ended, "nothing comes through");
    };
    assert_eq!(from, SocketAddr::from(([192, 168, 77, 1], next as u16)));

    // Its flow is there now, and is found without its ports, from both sides.
    let said = gateway.trace(INNER, HOST, &[], GETS_THROUGH);
    assert_eq!(said["nat"]["state"], "flow", "{said}");
    assert_eq!(said["nat"]["external_port"], next, "{said}");
    assert_eq!(said["packet"]["ends"]["source_port"], 5000, "{said}");
    assert_eq!(said["rule"]["flows"], 1, "{said}");
    assert!(said["nat"]["flow"]["packets_out"].as_u64().unwrap() > 0, "{said}");
    assert_eq!(said["egress"]["next_hop"], HOST, "{said}");
    assert_eq!(said["egress"]["link_address"].as_str().unwrap().len(), 17, "{said}");
    let said = gateway.trace("192.168.77.2:7000", "192.168.77.1", &[], GETS_THROUGH);
    assert_eq!(said["nat"]["state"], "flow", "{said}");
    assert_eq!(said["becomes"]["destination"], INNER, "{said}");
    assert_eq!(said["to_peer"]["name"], "laptop", "{said}");
    host.send_to(b"two", from).unwrap();
    assert_eq!(received(&client), Some(host.local_addr().unwrap()));

    // So is one of TCP, in its midst.
    let listener = inside(site.space("host"), || TcpListener::bind((HOST, 7100)).unwrap());
    let stream = inside(site.space("client"), || {
        TcpStream::connect_timeout(&listener.local_addr().unwrap(), LIMIT).unwrap()
    });
    let (_accepted, seen) = listener.accept().unwrap();
    let said = gateway.trace(INNER, "192.168.77.2:7100/tcp", &[], GETS_THROUGH);
    assert_eq!(said["nat"]["flow"]["state"], "Established", "{said}");
    let port = u64::from(stream.local_addr().unwrap().port());
    assert_eq!(said["packet"]["ends"]["source_port"], port, "{said}");
    assert_eq!(said["rule"]["flows"], 1, "{said}");
    assert_eq!(said["becomes"]["source_port"], u64::from(seen.port()), "{said}");
    let said = gateway.trace("192.168.77.2:7100", "192.168.77.1/tcp", &[], GETS_THROUGH);
    assert_eq!(said["becomes"]["destination_port"], port, "{said}");

    // What stands at another port of the same host may answer, a stranger may not.
    let said = gateway.trace("192.168.77.99:1", &format!("192.168.77.1:{next}/udp"), &[], DROPPED);
    assert_eq!(said["verdict"]["reason"], "unsolicited", "{said}");

    // Not allowed: the reason is the one that is counted.
    let said = gateway.trace(INNER, "192.168.77.2:6000/udp", &[], DROPPED);
    assert_eq!(said["verdict"]["dropped_by"], "nat", "{said}");
    assert_eq!(said["nat"]["state"], "drops", "{said}");
    let reason = said["verdict"]["reason"].as_str().unwrap().to_owned();
    assert_eq!(reason, "not_allowed");
    let before = gateway.nat_drops(&reason);
    client.send_to(b"three", (HOST, 6000)).unwrap();
    grows(&reason, before, || gateway.nat_drops(&reason));

    // A source that nobody owns does not get out of the tunnel.
    let said = gateway.trace("10.9.0.77", "192.168.77.2:7000/udp", &[], DROPPED);
    assert_eq!(said["verdict"]["dropped_by"], "tunnel", "{said}");
    let reason = said["verdict"]["reason"].as_str().unwrap().to_owned();
    assert_eq!(reason, "source_not_allowed");
    let before = gateway.tunnel_drops(&reason);
    bind(&site, "client", "10.9.0.77:0").send_to(b"four", (HOST, 7000)).unwrap();
    grows(&reason, before, || gateway.tunnel_drops(&reason));

    // A port that is forwarded, from outside.
    let said = gateway.trace("192.168.77.2:7000", "192.168.77.1:8080/udp", &[], GETS_THROUGH);
    assert_eq!(said["verdict"]["fate"], "translated", "{said}");
    assert!(said["nat"]["line"].as_str().unwrap().starts_with("#! Forward"), "{said}");
    assert_eq!(said["becomes"]["destination_port"], 5000, "{said}");
    host.send_to(b"five", ("192.168.77.1", 8080)).unwrap();
    assert_eq!(received(&client), Some(host.local_addr().unwrap()));

    // No route: the kernel says so itself.
    let said = gateway.trace(INNER, "198.51.100.7:53/udp", &[], DROPPED);
    assert_eq!(said["verdict"]["dropped_by"], "kernel", "{said}");
    assert_eq!(said["route"]["missing"], "no_route", "{said}");

    // By an interface that is named; to nobody in the tunnel; and too long for the way out.
    let said = gateway.trace("192.168.77.1", "10.9.0.200:1/udp", &[], DROPPED);
    assert_eq!(said["comes"], "from_host", "{said}");
    assert_eq!(said["verdict"]["reason"], "no_peer", "{said}");
    let by = ["--by", "wan"];
    let said = gateway.trace("203.0.113.5", "10.9.0.2:7000/udp", &by, DROPPED);
    assert_eq!(said["comes_by"], "wan", "{said}");
    assert_eq!(said["verdict"]["reason"], "not_allowed", "{said}");
    let long = ["--len", "2000"];
    let said = gateway.trace("10.9.0.2:9", "192.168.77.2:7000/udp", &long, DROPPED);
    assert_eq!(said["verdict"]["reason"], "too_large", "{said}");
    assert_eq!(said["egress"]["fits"], false, "{said}");

    // By IPv6 as well.
    let said = gateway.trace("fd09::1", "[fd09::2]:53/udp", &[], GETS_THROUGH);
    assert_eq!(said["comes"], "from_host", "{said}");
    assert_eq!(said["to_peer"]["prefix"], "fd09::2/128", "{said}");
    assert_eq!(said["egress"]["interface"], gateway.interface.as_str(), "{said}");
    let said = gateway.trace("fd09::2", "2001:db8::1/icmp", &[], DROPPED);
    assert_eq!(said["from_peer"]["name"], "laptop", "{said}");
    assert!(!said["route"]["missing"].is_null(), "{said}");

    // Without lines it is the kernel's way.
    gateway.reload("");
    let said = gateway.trace(INNER, HOST, &[], GETS_THROUGH);
    assert_eq!(said["nat"]["state"], "no_lines", "{said}");
    assert_eq!(said["verdict"]["fate"], "passes", "{said}");
    let text = gateway.succeeds(&["trace", &gateway.interface, INNER, HOST]);
    assert!(text.contains("no NAT here: the kernel's way"), "{text}");
}

#[test]
fn what_cannot_be_asked_is_explained() {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED what_cannot_be_asked_is_explained: {reason}");
        return;
    }
    let site = Site::new(&LAYOUT).unwrap();
    let [gateway, _client] = tunnel(&site, LINES);
    let said = |arguments: &[&str]| {
        let output = gateway.tidegate(arguments);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let interface = gateway.interface.as_str();
    for (arguments, code, part) in [
        (&[interface, INNER, "fd09::1"][..], 2, "different versions of IP"),
        (&[interface, INNER, "192.168.77.2/tcp"], 2, "there is no flow of tcp"),
        (&[interface, "203.0.113.5", HOST], 2, "say by which interface it comes"),
        (&[interface, INNER, HOST, "--by", "nic9"], 5, "there is no network interface nic9"),
        (&[interface, INNER, HOST, "--len", "20"], 2, "has at least 28 bytes"),
        (&["tg9", INNER, HOST], 5, "no daemon listens"),
    ] {
        let line = [&["trace"], arguments].concat();
        let (ended, text) = said(&line);
        assert!(ended == code && text.contains(part), "{arguments:?}: {ended}: {text}");
    }
}
