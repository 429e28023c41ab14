//! The same probes through a gateway that translates by iptables and through one that translates by `#! Nat`: both give
//! the same answers, but for [`DIFFERENCES`]. The hosts are drawn in `nat_site`; the link to `far` is a narrow one.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod nat_site;

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use nat_site::{
    LAYOUT, MASQUERADE, Tunnel, blob, echo_between, echo_by_tcp, inside, ip, shorten_fragments,
    skips, tunnel, udp,
};
use socket2::{Domain, Protocol, Socket, Type};
use xtask::lab::{Site, Space};

/// Where both differ, and why: the probe, what it gives with iptables, and what by `#! Nat`.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    // The kernel takes the sender's own port if it is free; `#! Nat` one of its pool, which no socket of the gateway has.
    ("keeps its port", "yes", "no"),
    // RFC 4787 §5: filtering that depends on the address alone is what lets most things through that want it (REQ-8);
    // connection tracking knows only the very port that was asked.
    ("another port of who was asked", "not heard", "heard"),
    // Connection tracking takes it for a packet to the gateway itself, which has no such port and says so. By `#! Nat`
    // the port belongs to the flow, and it is dropped (`unsolicited`).
    ("a stranger, to a port in use, is told", "ConnectionRefused", "nothing"),
    // Connection tracking knows who began. By `#! Nat` an answer is translated as all that leaves is, and means nothing
    // to who asked.
    ("somebody outside who knows the inner address", "answered", "unanswered"),
];

/// MTU of the link to `far`.
const NARROW: &str = "1300";
/// The client's port where answers name it.
const PORT: u16 = 40_001;

struct Family {
    name: &'static str,
    client: IpAddr,
    external: IpAddr,
    host: IpAddr,
    far: IpAddr,
    route_to_client: &'static str,
}

fn families() -> [Family; 2] {
    [
        Family {
            name: "IPv4",
            client: ip("10.9.0.2"),
            external: ip("192.168.77.1"),
            host: ip("192.168.77.2"),
            far: ip("192.168.88.2"),
            route_to_client: "10.9.0.2/32 via 192.168.77.1",
        },
        Family {
            name: "IPv6",
            client: ip("fd09::2"),
            external: ip("fd20::1"),
            host: ip("fd20::2"),
            far: ip("fd88::2"),
            route_to_client: "fd09::2/128 via fd20::1",
        },
    ]
}

/// Hears the ICMP errors that come to the client.
struct Ear {
    /// A raw one, which is read as any other.
    socket: UdpSocket,
}

impl Ear {
    fn new(site: &Site, at: IpAddr) -> Self {
        let (domain, protocol) = match at {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = inside(site.space("client"), || {
            UdpSocket::from(Socket::new(domain, Type::RAW, Some(protocol)).unwrap())
        });
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        Self { socket }
    }

    /// The next error about what came from [`PORT`]: who says what about whose packet to whom.
    fn hears(&self) -> String {
        let ended = Instant::now() + Duration::from_secs(2);
        let mut buffer = [0; 2048];
        while Instant::now() < ended {
            let Ok((len, sayer)) = self.socket.recv_from(&mut buffer) else { continue };
            let packet = &buffer[..len];
            let told = if sayer.is_ipv4() { told_v4(packet) } else { told_v6(packet) };
            if let Some(told) = told.filter(|told| told.contains(&format!("port {PORT} "))) {
                return format!("{}: {told}", sayer.ip());
            }
        }
        "nothing".to_owned()
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(<[u8; 4]>::try_from(bytes).ok()?.into()),
        _ => Some(<[u8; 16]>::try_from(bytes).ok()?.into()),
    }
}

fn ports(bytes: &[u8]) -> Option<(u16, u16)> {
    let port = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    Some((port(0)?, port(2)?))
}

fn told_v4(packet: &[u8]) -> Option<String> {
    let header_len = usize::from(packet.first()? & 15) * 4;
    let icmp = packet.get(header_len..)?;
    let (kind, code) = (*icmp.first()?, *icmp.get(1)?);
    if !matches!(kind, 3 | 11) {
        return None;
    }
    let mtu = ports(icmp.get(4..)?)?.1;
    let quoted = icmp.get(8..)?;
    let (from, to) = (address(quoted.get(12..16)?)?, address(quoted.get(16..20)?)?);
    let (port, to_port) = ports(quoted.get(usize::from(quoted[0] & 15) * 4..)?)?;
    let mtu = if (kind, code) == (3, 4) { format!(" (MTU {mtu})") } else { String::new() };
    Some(format!("{kind}/{code}{mtu} about {from} port {port} to {to} port {to_port}"))
}

fn told_v6(icmp: &[u8]) -> Option<String> {
    let (kind, code) = (*icmp.first()?, *icmp.get(1)?);
    if kind >= 128 {
        return None;
    }
    let mtu = ports(icmp.get(4..)?)?.1;
    let quoted = icmp.get(8..)?;
    let (from, to) = (address(quoted.get(8..24)?)?, address(quoted.get(24..40)?)?);
    let (port, to_port) = ports(quoted.get(40..)?)?;
    let mtu = if kind == 2 { format!(" (MTU {mtu})") } else { String::new() };
    Some(format!("{kind}/{code}{mtu} about {from} port {port} to {to} port {to_port}"))
}

fn set_ttl(socket: &UdpSocket, ttl: u32) {
    let socket = socket2::SockRef::from(socket);
    let is_v4 = socket.local_addr().unwrap().as_socket_ipv4().is_some();
    if is_v4 { socket.set_ttl_v4(ttl) } else { socket.set_unicast_hops_v6(ttl) }.unwrap();
}

fn yes(is_so: bool) -> String {
    (if is_so { "yes" } else { "no" }).to_owned()
}

/// The first error that a connected socket is told.
fn told(socket: &UdpSocket) -> String {
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    match socket.recv(&mut [0; 64]) {
        Ok(_) => "an answer".to_owned(),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => "nothing".to_owned(),
        Err(error) => format!("{:?}", error.kind()),
    }
}

fn connected(space: &Space, to: SocketAddr) -> String {
    inside(space, || match TcpStream::connect_timeout(&to, Duration::from_secs(3)) {
        Ok(_) => "connected".to_owned(),
        Err(error) => format!("{:?}", error.kind()),
    })
}

/// Whether somebody answers one of a few echo requests, or the only one.
fn answered(space: &Space, to: IpAddr, count: u32) -> String {
    let ping = space.ping(&to.to_string(), count, &["-W", "1"]).unwrap();
    (if ping.answered > 0 { "answered" } else { "unanswered" }).to_owned()
}

/// Who refuses an echo request of so many hops.
fn refused_by(site: &Site, to: IpAddr, hops: u32) -> String {
    let mut command = site.space("client").command("ping");
    command.args(["-n", "-c", "1", "-W", "2", "-t", &hops.to_string(), &to.to_string()]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|line| line.starts_with("From ")).unwrap_or("nobody");
    line.to_owned()
}

/// All probes of a family: what each is about, and what came of it.
fn probe(site: &Site, gateway: &Tunnel<'_>, family: &Family) -> Vec<(&'static str, String)> {
    let &Family { client, external, host, far, .. } = family;
    let space = site.space("client");
    let mut found: Vec<(&'static str, String)> = Vec::new();
    let any = |address| SocketAddr::new(address, 0);

    // First packets to neighbours that are not known yet.
    for role in ["gateway", "router"] {
        site.space(role).ip("neigh flush all").unwrap();
    }
    found.push(("an only echo to an unknown neighbour", answered(space, host, 1)));
    found.push(("an only echo through an unknown neighbour", answered(space, far, 1)));
    found.push(("an echo to the gateway's outer address", answered(space, external, 3)));

    // Bulk. The way to `far` has a narrow link, of which the client learns by its own packets.
    let sent = blob(4 << 20);
    let before = gateway.space.packets("lan").unwrap().1;
    let (received, seen) = echo_by_tcp(site, "host", host, &sent);
    let packets = gateway.space.packets("lan").unwrap().1 - before;
    found.push(("TCP there and back", yes(received == sent)));
    found.push(("TCP is seen as", seen.to_string()));
    found.push(("TCP in super-packets", yes(packets < sent.len() as u64 / 1420 / 2)));
    let (received, seen) = echo_by_tcp(site, "far", far, &sent[..1 << 20]);
    found.push(("TCP by a narrow link, there and back", yes(received == sent[..1 << 20])));
    found.push(("TCP by a narrow link is seen as", seen.to_string()));

    // Datagrams.
    let mut seen_ports = Vec::new();
    let client_socket = udp(site, "client", any(client));
    for (role, at, len, name) in [
        ("host", host, 100, "UDP is seen as"),
        ("far", far, 100, "UDP from afar is seen as"),
        ("host", host, 4000, "UDP in fragments is seen as"),
    ] {
        let socket = udp(site, role, any(at));
        let to = socket.local_addr().unwrap();
        let seen = echo_between(&client_socket, to, &socket, &sent[..len]);
        seen_ports.extend(seen.map(|seen| seen.port()));
        found.push((name, seen.map_or("nobody".to_owned(), |seen| seen.ip().to_string())));
    }
    let own_port = client_socket.local_addr().unwrap().port();
    found.push(("keeps its port", yes(seen_ports.iter().all(|port| *port == own_port))));
    let is_one = seen_ports.iter().all(|port| *port == seen_ports[0]);
    found.push(("has one port for all", yes(is_one)));

    // Errors from the way there.
    let ear = Ear::new(site, client);
    let socket = udp(site, "client", SocketAddr::new(client, PORT));
    for (hops, name) in [(1, "UDP, 1 hop"), (2, "UDP, 2 hops"), (3, "UDP, 3 hops")] {
        set_ttl(&socket, hops);
        socket.send_to(b"who is there", SocketAddr::new(far, 33_434)).unwrap();
        found.push((name, ear.hears()));
    }
    for (hops, name) in [(1, "an echo, 1 hop"), (2, "an echo, 2 hops")] {
        found.push((name, refused_by(site, far, hops)));
    }
    set_ttl(&socket, 64);
    // What TCP has learnt.
    space.ip("route flush cache").unwrap();
    space.ip("-6 route flush cache").unwrap();
    socket.send_to(&sent[..1340], SocketAddr::new(far, 33_434)).unwrap();
    found.push(("UDP that is too long for a link", ear.hears()));
    let asking = udp(site, "client", any(client));
    asking.connect(SocketAddr::new(host, 33_434)).unwrap();
    asking.send(b"hello").unwrap();
    found.push(("UDP to a closed port", told(&asking)));
    found.push(("TCP to a closed port", connected(space, SocketAddr::new(host, 33_434))));

    // What nobody asked for.
    let asked = udp(site, "host", any(host));
    let seen = echo_between(&client_socket, asked.local_addr().unwrap(), &asked, b"hello").unwrap();
    let hears = |from: &UdpSocket| {
        from.send_to(b"unasked", seen).unwrap();
        let is_heard = client_socket.recv(&mut [0; 64]).is_ok();
        (if is_heard { "heard" } else { "not heard" }).to_owned()
    };
    found.push(("another port of who was asked", hears(&udp(site, "host", any(host)))));
    let stranger =
        udp(site, "router", any(if host.is_ipv4() { ip("192.168.77.3") } else { ip("fd20::3") }));
    found.push(("a stranger, to a port in use", hears(&stranger)));
    stranger.connect(seen).unwrap();
    let _ = stranger.take_error();
    stranger.send(b"unasked").unwrap();
    found.push(("a stranger, to a port in use, is told", told(&stranger)));
    let stranger = udp(site, "host", any(host));
    stranger.connect(SocketAddr::new(external, 2222)).unwrap();
    stranger.send(b"unasked").unwrap();
    found.push(("a stranger, to a port that nobody has, is told", told(&stranger)));
    let refused = connected(site.space("host"), SocketAddr::new(external, 2222));
    found.push(("a stranger's TCP to a port that nobody has", refused));
    found.push(("a stranger's echo to the gateway", answered(site.space("far"), external, 3)));
    found.push(("the gateway's own echo", answered(gateway.space, far, 3)));
    let outside = site.space("host");
    outside.ip(&format!("route add {}", family.route_to_client)).unwrap();
    found.push(("somebody outside who knows the inner address", answered(outside, client, 2)));
    outside.ip(&format!("route del {}", family.route_to_client)).unwrap();
    found
}

/// All probes through a gateway with these lines.
fn probes(lines: &str) -> Vec<(&'static str, &'static str, String)> {
    let site = Site::new(&LAYOUT).unwrap();
    for (role, nic) in [("router", "far"), ("far", "eth0")] {
        site.space(role).ip(&format!("link set {nic} mtu {NARROW}")).unwrap();
    }
    let [gateway, _client] = tunnel(&site, lines, &[]);
    shorten_fragments(&site);
    // The handshake.
    assert!(nat_site::is_answered(&site), "{lines}");
    let mut all = Vec::new();
    for family in families() {
        let found = probe(&site, &gateway, &family);
        all.extend(found.into_iter().map(|(what, result)| (family.name, what, result)));
    }
    all
}

#[test]
fn answers_are_those_that_iptables_gives() {
    if skips("answers_are_those_that_iptables_gives", &["ping", "iptables", "ip6tables"]) {
        return;
    }
    let by_iptables = probes(
        "PostUp = iptables -t nat -A POSTROUTING -s 10.9.0.0/24 -o lan -j MASQUERADE\n\
         PostUp = iptables -A INPUT -m conntrack --ctstate INVALID\n\
         PostUp = ip6tables -t nat -A POSTROUTING -s fd09::/64 -o lan -j MASQUERADE\n\
         PostUp = ip6tables -A INPUT -m conntrack --ctstate INVALID",
    );
    let by_bpf = probes(&format!(
        "{MASQUERADE}\n#! Nat = masquerade out=lan from=fd09::/64 bypass-firewall"
    ));
    let mut wrong = Vec::new();
    assert_eq!(by_iptables.len(), by_bpf.len());
    for ((family, what, iptables), (_, _, bpf)) in by_iptables.iter().zip(&by_bpf) {
        eprintln!("{family} {what}: {iptables} / {bpf}");
        let known = DIFFERENCES.iter().find(|(name, ..)| name == what);
        let is_right = match known {
            Some((_, with_iptables, with_bpf)) => iptables == with_iptables && bpf == with_bpf,
            None => iptables == bpf,
        };
        if !is_right {
            wrong.push(format!("{family}, {what}: {iptables} by iptables, {bpf} by `#! Nat`"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // Both could be wrong in the same way.
    let good = ["yes", "answered", "ConnectionRefused"];
    for (family, what, result) in &by_bpf {
        let is_told = ["UDP is", "UDP from", "UDP in", "TCP is", "TCP by a narrow link is"];
        if is_told.iter().any(|name| what.starts_with(name)) {
            let external = if *family == "IPv4" { "192.168.77.1" } else { "fd20::1" };
            assert_eq!(result, external, "{family}, {what}");
        } else if what.contains("hop") || what.contains("too long") {
            assert!(result != "nothing" && result != "nobody", "{family}, {what}: {result}");
        } else if !DIFFERENCES.iter().any(|(name, ..)| name == what)
            && *what != "a stranger, to a port in use"
        {
            assert!(good.contains(&result.as_str()), "{family}, {what}: {result}");
        }
    }
}
