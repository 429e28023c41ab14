//! Senders outside are told what a gateway that forwards a port cannot deliver: by ICMP errors that the programs in the
//! kernel write, with the whole daemon.
//!
//! ```text
//!  client 172.31.0.2 ═══ wan ═══ gateway ─── lan ─── host
//!  10.9.0.2, 10.9.0.3            MTU 1380   192.168.77.1   192.168.77.2
//!  fd09::2                                  fd77::1        fd77::2
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    fs::File,
    io::Read as _,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::OwnedFd,
    process::Output,
    time::{Duration, Instant},
};

use common::tidegate;
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};
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
            End { host: "gateway", nic: "lan", addresses: &["192.168.77.1/24", "fd77::1/64"] },
            End { host: "host", nic: "eth0", addresses: &["192.168.77.2/24", "fd77::2/64"] },
        ],
    ],
    routes: &[],
    private: false,
};
const MTU: u32 = 1380;
const LINES: &str = "#! Forward = udp lan:8080 -> 10.9.0.2:80 bypass-firewall\n\
                     #! Forward = udp lan:8080 -> [fd09::2]:80 bypass-firewall\n";
const LIMIT: Duration = Duration::from_secs(10);

/// An end of the tunnel that was brought up by its file.
struct Tunnel<'a> {
    space: &'a Space,
    interface: String,
    path: String,
}

impl<'a> Tunnel<'a> {
    fn up(site: &'a Site, role: &'static str, text: &str) -> Self {
        let interface = site.interface(role.chars().next().unwrap());
        let file = site.write(&format!("{interface}.conf"), text).unwrap();
        let path = file.to_str().unwrap().to_owned();
        let tunnel = Self { space: site.space(role), interface, path };
        tunnel.succeeds(&["up", &tunnel.path, "--mode", "udp", "--workers", "1"]);
        tunnel
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

    fn nat(&self) -> Value {
        serde_json::from_str(&self.succeeds(&["show", &self.interface, "nat", "--json"])).unwrap()
    }
}

impl Drop for Tunnel<'_> {
    fn drop(&mut self) {
        let _ = self.tidegate(&["down", &self.path]);
    }
}

/// Both ends, with these lines at the gateway.
fn tunnel<'a>(site: &'a Site, lines: &str) -> [Tunnel<'a>; 2] {
    let key = |byte: u8| PrivateKey::from_bytes([byte; 32]);
    let (client, gateway) = (key(0x11), key(0x22));
    let gateway_text = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 51820\nAddress = 10.9.0.1/24, fd09::1/64\n\
         MTU = {MTU}\n{lines}[Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.2/31, fd09::2/128\n",
        gateway.to_base64().as_str(),
        client.public_key(),
    );
    let client_text = format!(
        "[Interface]\nPrivateKey = {}\nAddress = 10.9.0.2/24, 10.9.0.3/24, fd09::2/64\n\
         [Peer]\nPublicKey = {}\nEndpoint = 172.31.0.1:51820\nPersistentKeepalive = 1\n\
         AllowedIPs = 10.9.0.0/24, fd09::/64, 192.168.77.0/24, fd77::/64\n",
        client.to_base64().as_str(),
        gateway.public_key(),
    );
    [Tunnel::up(site, "gateway", &gateway_text), Tunnel::up(site, "client", &client_text)]
}

/// Runs something in a host's namespace.
fn inside<R: Send>(space: &Space, body: impl FnOnce() -> R + Send) -> R {
    let namespace = File::open(format!("/run/netns/{}", space.name())).unwrap();
    NetNs::from(OwnedFd::from(namespace)).run(body)
}

/// One word after the other, with end-around carry.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for pair in parts.concat().chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What the host hears, and its socket for what it sends.
struct Sender {
    socket: UdpSocket,
    errors: Socket,
    us: SocketAddr,
    to: SocketAddr,
}

/// An error that came, from its ICMP header on.
struct Told {
    kind: [u8; 2],
    mtu: u32,
    quoted: Vec<u8>,
}

impl Sender {
    fn new(site: &Site, us: &str, to: &str) -> Self {
        let (us, to): (IpAddr, IpAddr) = (us.parse().unwrap(), to.parse().unwrap());
        let (domain, protocol) = match us {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let (socket, errors) = inside(site.space("host"), || {
            let socket = UdpSocket::bind((us, 0)).unwrap();
            socket.connect((to, 8080)).unwrap();
            (socket, Socket::new(domain, Type::RAW, Some(protocol)).unwrap())
        });
        errors.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let us = socket.local_addr().unwrap();
        Self { socket, errors, us, to: (to, 8080).into() }
    }

    /// Sends a datagram of so many bytes; gives the error that comes back.
    fn told(&self, len: usize) -> Told {
        let data: Vec<u8> = (0..len).map(|i| i as u8).collect();
        self.socket.send(&data).unwrap();
        let mut buffer = [0; 2000];
        let until = Instant::now() + LIMIT;
        while Instant::now() < until {
            let Ok(len) = (&self.errors).read(&mut buffer) else { continue };
            let mut message = &buffer[..len];
            let mut pseudo = Vec::new();
            if let (IpAddr::V4(us), IpAddr::V4(to)) = (self.us.ip(), self.to.ip()) {
                let (ip, icmp) = message.split_at(20);
                assert_eq!(ip[12..20], [to.octets(), us.octets()].concat()[..], "in whose name");
                assert_eq!(sum(&[ip]), 0xffff);
                message = icmp;
            } else if let (IpAddr::V6(us), IpAddr::V6(to)) = (self.us.ip(), self.to.ip()) {
                if !(1..=4).contains(&message[0]) {
                    // Neighbour discovery.
                    continue;
                }
                let len = (message.len() as u32).to_be_bytes();
                pseudo = [&to.octets()[..], &us.octets(), &len, &[0, 0, 0, 58]].concat();
            }
            let quoted = message[8..].to_vec();
            // Before the tunnel was up there were others, about what found nobody.
            let upper = if self.us.is_ipv4() { 20 } else { 40 };
            if quoted[upper + 4..upper + 6] != (8 + data.len() as u16).to_be_bytes() {
                continue;
            }
            self.assert_sum(&pseudo, message);
            let mtu = u32::from_be_bytes(message[4..8].try_into().unwrap());
            return Told { kind: [message[0], message[1]], mtu, quoted };
        }
        panic!("nothing came back");
    }

    /// The error's checksum is right: as it stands, or when who finishes the checksum of what is quoted has done so,
    /// which veths put off.
    fn assert_sum(&self, pseudo: &[u8], message: &[u8]) {
        let mut finished = message.to_vec();
        let upper = 8 + if self.us.is_ipv4() { 20 } else { 40 };
        let checksum = !sum(&[&message[upper..]]);
        finished[upper + 6..upper + 8].copy_from_slice(&checksum.to_be_bytes());
        let sums = [message, &finished].map(|message| sum(&[pseudo, message]));
        assert!(sums.contains(&0xffff), "{sums:x?}");
    }

    /// What is quoted is the datagram of so many bytes that was sent, with this TTL.
    fn assert_quoted(&self, quoted: &[u8], len: usize, ttl: u8) {
        let ports = [self.us.port(), self.to.port(), 8 + len as u16];
        let ports = ports.map(u16::to_be_bytes).concat();
        let (upper, at) = match (self.us.ip(), self.to.ip()) {
            (IpAddr::V4(us), IpAddr::V4(to)) => {
                assert_eq!(quoted[12..20], [us.octets(), to.octets()].concat()[..]);
                assert_eq!(sum(&[&quoted[..20]]), 0xffff);
                (20, 8)
            }
            (IpAddr::V6(us), IpAddr::V6(to)) => {
                assert_eq!(quoted[8..40], [us.octets(), to.octets()].concat()[..]);
                (40, 7)
            }
            _ => unreachable!("of one family"),
        };
        assert_eq!(quoted[at], ttl);
        assert_eq!(quoted[upper..upper + 6], ports[..]);
        let data: Vec<u8> = (0..len).map(|i| i as u8).collect();
        let shown = &quoted[upper + 8..];
        assert!(shown.len() >= 8 && data.starts_with(shown), "{} bytes", shown.len());
    }
}

#[test]
fn senders_outside_learn_what_does_not_get_through() {
    const LARGE: usize = 1440;

    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED senders_outside_learn_what_does_not_get_through: {reason}");
        return;
    }
    let site = Site::new(&LAYOUT).unwrap();
    let [gateway, _client] = tunnel(&site, LINES);
    let v4 = Sender::new(&site, "192.168.77.2", "192.168.77.1");
    let v6 = Sender::new(&site, "fd77::2", "fd77::1");

    // The way is open for what fits.
    for (inner, sender) in [("10.9.0.2:80", &v4), ("[fd09::2]:80", &v6)] {
        let service = inside(site.space("client"), || UdpSocket::bind(inner).unwrap());
        service.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let (mut buffer, until) = ([0; 64], Instant::now() + LIMIT);
        loop {
            assert!(Instant::now() < until, "{}", gateway.nat());
            sender.socket.send(b"hello").unwrap();
            if let Ok((5, from)) = service.recv_from(&mut buffer) {
                assert_eq!(from, sender.us);
                break;
            }
        }
    }

    let told = v4.told(LARGE);
    assert_eq!((told.kind, told.mtu), ([3, 4], MTU), "fragmentation needed");
    v4.assert_quoted(&told.quoted, LARGE, 64);
    let told = v6.told(LARGE);
    assert_eq!((told.kind, told.mtu), ([2, 0], MTU), "packet too big");
    v6.assert_quoted(&told.quoted, LARGE, 64);
    // The sender's kernel believes it: it sends none so large any more. (Of IPv6 it cuts them up itself.)
    let is_refused = |error: std::io::Error| {
        error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error())
    };
    let mut sent = (0..3).map(|_| v4.socket.send(&[0; LARGE]));
    assert!(sent.any(|sent| sent.is_err_and(is_refused)), "{}", gateway.nat());

    v4.socket.set_ttl(1).unwrap();
    let told = v4.told(100);
    assert_eq!(told.kind, [11, 0], "time exceeded");
    v4.assert_quoted(&told.quoted, 100, 1);

    let shown = gateway.nat();
    assert!(shown["events"]["answered"].as_u64().unwrap() >= 3, "{shown}");
    assert!(
        shown["drops"]["too_large"].is_null() && shown["drops"]["hop_limit"].is_null(),
        "{shown}"
    );

    // More than one host may hear of.
    let limited =
        || gateway.nat()["drops"]["answer_limited"].as_u64().is_some_and(|count| count > 0);
    let until = Instant::now() + LIMIT;
    while !limited() {
        assert!(Instant::now() < until, "{}", gateway.nat());
        for _ in 0..20 {
            // An error that came before is told here.
            let _ = v4.socket.send(b"again");
        }
    }
}

/// RFC 4787 REQ-9: two who are inside meet at their external addresses, as hole punching has them do.
#[test]
fn hosts_inside_meet_at_their_external_addresses() {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED hosts_inside_meet_at_their_external_addresses: {reason}");
        return;
    }
    let site = Site::new(&LAYOUT).unwrap();
    let [gateway, _client] = tunnel(&site, "#! Nat = masquerade out=lan bypass-firewall\n");
    let bind = |role: &str, at: &str| {
        let socket = inside(site.space(role), || UdpSocket::bind(at).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        socket
    };
    let host = bind("host", "192.168.77.2:0");
    let both = [bind("client", "10.9.0.2:0"), bind("client", "10.9.0.3:0")];
    let mut buffer = [0; 64];
    let until = Instant::now() + LIMIT;
    // How the host sees them.
    let seen = both.each_ref().map(|socket| {
        loop {
            assert!(Instant::now() < until, "{}", gateway.nat());
            socket.send_to(b"who am I", host.local_addr().unwrap()).unwrap();
            if let Ok((8, from)) = host.recv_from(&mut buffer) {
                break from;
            }
        }
    });
    assert!(seen.iter().all(|from| from.ip() == "192.168.77.1".parse::<IpAddr>().unwrap()));
    // The first one opens the way for the other, and comes to nobody; then both speak.
    both[0].send_to(b"first", seen[1]).unwrap();
    assert!(both[1].recv_from(&mut buffer).is_err(), "nothing was sent there yet");
    for (me, other) in [(1, 0), (0, 1), (1, 0)] {
        both[me].send_to(b"hello", seen[other]).unwrap();
        let (len, from) = both[other].recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..len], from), (&b"hello"[..], seen[me]));
    }
    let shown = gateway.nat();
    assert!(shown["drops"]["unsolicited"].as_u64().unwrap() > 0, "{shown}");
}
