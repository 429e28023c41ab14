//! What tests of a gateway that translates have in common: their hosts, and a tunnel whose ends are brought up by files.
//!
//! ```text
//!  client 172.31.0.2 ═══ wan ═══ gateway ─── lan ─┬─ host
//!  10.9.0.2                      10.9.0.1         │  192.168.77.2
//!  fd09::2                       fd09::1          │  fd20::2
//!                        lan 192.168.77.1         │
//!                            fd20::1              └─ router ─── far
//!                                                    192.168.77.3   192.168.88.2
//!                                                    fd20::3        fd88::2
//! ```
//!
//! Nobody behind the gateway knows a way to the tunnel's addresses.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    path::PathBuf,
    process::Output,
    time::{Duration, Instant},
};

use serde_json::Value;
use wg_userspace::key::PrivateKey;
use wg_userspace::sys::netns::NetNs;
use xtask::lab::{self, End, Layout, Site, Space, find_program};

use crate::common::tidegate;

pub const LAYOUT: Layout = Layout {
    hosts: &["client", "gateway", "host", "router", "far"],
    routers: &["gateway", "router"],
    links: &[
        &[
            End { host: "client", nic: "wan", addresses: &["172.31.0.2/24"] },
            End { host: "gateway", nic: "wan", addresses: &["172.31.0.1/24"] },
        ],
        &[
            End { host: "gateway", nic: "lan", addresses: &["192.168.77.1/24", "fd20::1/64"] },
            End { host: "host", nic: "eth0", addresses: &["192.168.77.2/24", "fd20::2/64"] },
            End { host: "router", nic: "lan", addresses: &["192.168.77.3/24", "fd20::3/64"] },
        ],
        &[
            End { host: "router", nic: "far", addresses: &["192.168.88.1/24", "fd88::1/64"] },
            End { host: "far", nic: "eth0", addresses: &["192.168.88.2/24", "fd88::2/64"] },
        ],
    ],
    routes: &[
        ("gateway", "192.168.88.0/24 via 192.168.77.3"),
        ("gateway", "fd88::/64 via fd20::3"),
        ("host", "192.168.88.0/24 via 192.168.77.3"),
        ("host", "fd88::/64 via fd20::3"),
        ("far", "192.168.77.0/24 via 192.168.88.1"),
        ("far", "fd20::/64 via fd88::1"),
    ],
    private: false,
};
pub const GATEWAY: &str = "192.168.77.1";
pub const HOST: &str = "192.168.77.2";
pub const MASQUERADE: &str = "#! Nat = masquerade out=lan bypass-firewall";
pub const LIMIT: Duration = Duration::from_secs(30);

/// An end of the tunnel that was brought up by its file.
pub struct Tunnel<'a> {
    pub space: &'a Space,
    pub interface: String,
    file: PathBuf,
    text: String,
    hooks: &'a [(&'a str, &'a str)],
}

impl Drop for Tunnel<'_> {
    fn drop(&mut self) {
        let _ = self.tidegate(&["down", self.file.to_str().unwrap()]);
    }
}

impl<'a> Tunnel<'a> {
    fn up(
        site: &'a Site,
        role: &'static str,
        text: String,
        lines: &str,
        hooks: &'a [(&'a str, &'a str)],
    ) -> Self {
        let interface = site.interface(role.chars().next().unwrap());
        let file = site.write(&format!("{interface}.conf"), &text.replace("LINES", lines)).unwrap();
        let tunnel = Self { space: site.space(role), interface, file, text, hooks };
        tunnel.succeeds(&["up", tunnel.path(), "--mode", "udp", "--workers", "1"]);
        tunnel
    }

    pub fn path(&self) -> &str {
        self.file.to_str().unwrap()
    }

    pub fn tidegate(&self, arguments: &[&str]) -> Output {
        let mut command = self.space.command(tidegate());
        command.args(arguments).envs(self.hooks.iter().copied()).output().unwrap()
    }

    pub fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.tidegate(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn reload(&self, lines: &str) -> String {
        std::fs::write(&self.file, self.text.replace("LINES", lines)).unwrap();
        self.succeeds(&["reload", self.path()])
    }

    pub fn nat(&self) -> Value {
        serde_json::from_str(&self.succeeds(&["show", &self.interface, "nat", "--json"])).unwrap()
    }
}

/// Both ends, gateway and client, with these lines at the gateway and these hooks for tests in the environment.
pub fn tunnel<'a>(site: &'a Site, lines: &str, hooks: &'a [(&'a str, &'a str)]) -> [Tunnel<'a>; 2] {
    let key = |byte: u8| PrivateKey::from_bytes([byte; 32]);
    let (client, gateway, second) = (key(0x11), key(0x22), key(0x33));
    let gateway_text = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 51820\nAddress = 10.9.0.1/24, fd09::1/64\nLINES\n\
         [Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.2/32, 10.9.1.0/24, fd09::2/128\n\
         [Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.3/32, fd09::3/128\n",
        gateway.to_base64().as_str(),
        client.public_key(),
        second.public_key(),
    );
    let client_text = format!(
        "[Interface]\nPrivateKey = {}\nAddress = 10.9.0.2/24, fd09::2/64\nLINES\n\
         [Peer]\nPublicKey = {}\nEndpoint = 172.31.0.1:51820\n\
         AllowedIPs = 10.9.0.0/24, 192.168.77.0/24, 192.168.88.0/24, fd09::/64, fd20::/64, fd88::/64\n",
        client.to_base64().as_str(),
        gateway.public_key(),
    );
    [
        Tunnel::up(site, "gateway", gateway_text, lines, hooks),
        Tunnel::up(site, "client", client_text, "", hooks),
    ]
}

/// A second peer of the gateway, where the router is: 10.9.0.3 and fd09::3.
pub fn second_peer(site: &Site) -> Tunnel<'_> {
    let key = |byte: u8| PrivateKey::from_bytes([byte; 32]);
    let text = format!(
        "[Interface]\nPrivateKey = {}\nAddress = 10.9.0.3/24, fd09::3/64\nLINES\n\
         [Peer]\nPublicKey = {}\nEndpoint = {GATEWAY}:51820\nAllowedIPs = 10.9.0.0/24, fd09::/64\n",
        key(0x33).to_base64().as_str(),
        key(0x22).public_key(),
    );
    Tunnel::up(site, "router", text, "", &[])
}

/// Has hosts beside the gateway send it fragments that the tunnel takes, in pieces no longer than that. (Those that are
/// longer would have to be cut again.)
pub fn shorten_fragments(site: &Site) {
    for (role, nic) in [("host", "eth0"), ("router", "lan")] {
        for route in [format!("{GATEWAY}/32"), "fd20::1/128".to_owned()] {
            site.space(role).ip(&format!("route add {route} dev {nic} mtu 1400")).unwrap();
        }
    }
}

/// Whether a test that needs these programs cannot run here; says so then.
pub fn skips(test: &str, programs: &[&str]) -> bool {
    let missing = lab::unavailable().or_else(|| {
        let missing = programs.iter().find(|name| find_program(name).is_none())?;
        Some(format!("needs the program `{missing}`"))
    });
    if let Some(reason) = &missing {
        eprintln!("SKIPPED {test}: {reason}");
    }
    missing.is_some()
}

/// Runs something in a host's namespace.
pub fn inside<R: Send>(space: &Space, body: impl FnOnce() -> R + Send) -> R {
    let namespace = File::open(format!("/run/netns/{}", space.name())).unwrap();
    NetNs::from(OwnedFd::from(namespace)).run(body)
}

/// Bytes that are nowhere the same.
pub fn blob(len: usize) -> Vec<u8> {
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

/// Waits for a connection, but not for ever.
pub fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    listener.set_nonblocking(true).unwrap();
    let ended = Instant::now() + LIMIT;
    loop {
        match listener.accept() {
            Ok((stream, from)) => {
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                return (stream, from);
            }
            Err(error) => assert!(Instant::now() < ended, "nobody has connected: {error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends `sent` by TCP from one host `to` another, which listens at `at` and sends it back; gives what came, and whom the
/// other one saw.
pub fn echo_tcp_between(
    from: &Space,
    to: SocketAddr,
    (other, at): (&Space, SocketAddr),
    sent: &[u8],
) -> (Vec<u8>, IpAddr) {
    let listener = inside(other, || TcpListener::bind(at).unwrap());
    let to = if to.port() == 0 { listener.local_addr().unwrap() } else { to };
    std::thread::scope(|scope| {
        let host = scope.spawn(move || {
            let (mut stream, seen) = accept(&listener);
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            stream.write_all(&received).unwrap();
            seen.ip()
        });
        let received = inside(from, || {
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

/// As above, from the client to a host.
pub fn echo_by_tcp(site: &Site, role: &str, at: IpAddr, sent: &[u8]) -> (Vec<u8>, IpAddr) {
    let at = SocketAddr::new(at, 0);
    echo_tcp_between(site.space("client"), at, (site.space(role), at), sent)
}

/// A socket in a host's namespace that waits for half a second.
pub fn udp(site: &Site, role: &str, at: impl std::net::ToSocketAddrs + Send) -> UdpSocket {
    let socket = inside(site.space(role), || UdpSocket::bind(at).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

/// `sent` from one socket to the other, as `to`, and back; whom the other saw, if it came back.
pub fn echo_between(
    from: &UdpSocket,
    to: SocketAddr,
    host: &UdpSocket,
    sent: &[u8],
) -> Option<SocketAddr> {
    let mut buffer = [0; 1 << 16];
    for _ in 0..4 {
        let _ = from.send_to(sent, to);
        let Ok((len, seen)) = host.recv_from(&mut buffer) else { continue };
        assert!(buffer[..len] == *sent, "it comes as it was");
        // It may know no way back.
        if host.send_to(&buffer[..len], seen).is_err() {
            continue;
        }
        let Ok((len, answerer)) = from.recv_from(&mut buffer) else { continue };
        assert!(buffer[..len] == *sent, "the answer comes as it was");
        assert_eq!(answerer, to, "who was asked answers");
        return Some(seen);
    }
    None
}

/// A datagram to the host and back; whom the host saw, if it saw anybody.
pub fn echo_by_udp(site: &Site) -> Option<SocketAddr> {
    let (host, client) = (udp(site, "host", (HOST, 0)), udp(site, "client", ("10.9.0.2", 0)));
    echo_between(&client, host.local_addr().unwrap(), &host, b"hello")
}

pub fn is_answered(site: &Site) -> bool {
    site.space("client").ping(HOST, 3, &["-W", "1"]).is_ok_and(|ping| ping.answered > 0)
}

pub fn seen_as(site: &Site) -> Option<IpAddr> {
    echo_by_udp(site).map(|from| from.ip())
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
