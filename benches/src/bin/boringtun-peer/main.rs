//! An independent WireGuard peer: boringtun's `Tunn` between a TUN device and a UDP socket.
//!
//! It shares no code with the daemon, not even the parser of `wg0.conf`, so that nothing of ours
//! judges itself. One process holds one device with one peer, in the network namespace it is
//! started in; addresses, MTU and routes are the caller's business. What it has to say goes to
//! standard output, one JSON object a line:
//!
//! ```text
//! {"event":"ready","interface":"tg1","port":51820}
//! {"event":"handshake","role":"initiator","ms":1.83}
//! ```
//!
//! The second line is printed once, for the first handshake that completes: as initiator from the
//! initiation sent to the response accepted, as responder from the initiation received to the
//! first transport message opened.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use boringtun::noise::{Tunn, TunnResult};
use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

mod conf;
#[expect(unsafe_code, reason = "naming a TUN device takes one ioctl")]
mod tun;

/// How often `Tunn` wants its timers run.
const TIMERS_EVERY: Duration = Duration::from_millis(100);
/// Packets taken from one side before the other gets its turn.
const BATCH: usize = 64;
/// The largest datagram or packet, and what `Tunn` adds to it.
const BUFFER_LEN: usize = 65_536 + 256;
/// Message types of the whitepaper, §5.4.
const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const TRANSPORT: u8 = 4;

/// boringtun as a peer of its own, for demonstrations and tests.
#[derive(Parser)]
struct Arguments {
    /// The TUN device to create.
    interface: String,
    /// A wg0.conf with one peer.
    config: PathBuf,
    /// Start a handshake at once instead of with the first packet.
    #[arg(long)]
    initiate: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let text = std::fs::read_to_string(&arguments.config)
        .with_context(|| format!("reading {}", arguments.config.display()))?;
    let conf = conf::parse(&text).with_context(|| format!("in {}", arguments.config.display()))?;
    let tun = tun::Tun::create(&arguments.interface)
        .with_context(|| format!("creating the TUN device {}", arguments.interface))?;
    let socket = bind(conf.listen_port).context("binding the UDP socket")?;

    let mut peer = Peer::new(conf, tun, socket);
    say(&json!({
        "event": "ready",
        "interface": arguments.interface,
        "port": peer.socket.local_addr()?.port(),
    }));
    if arguments.initiate {
        peer.initiate();
    }
    peer.run()
}

fn say(line: &serde_json::Value) {
    // The reader may be gone, which is no reason to stop carrying packets.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), format!("{line}\n").as_bytes());
}

/// One socket for both families; IPv4 alone where IPv6 is not available.
fn bind(port: u16) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)))?;
    socket.set_nonblocking(true)?;
    // The default of 200 KiB holds a millisecond of a fast link.
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 4 << 20);
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, 4 << 20);
    Ok(socket)
}

/// The first handshake, for the line about it.
#[derive(Default)]
struct FirstHandshake {
    initiation_sent: Option<Instant>,
    initiation_received: Option<Instant>,
    told: bool,
}

impl FirstHandshake {
    fn sent(&mut self, message: &[u8]) {
        if message.first() == Some(&INITIATION) {
            self.initiation_sent = Some(Instant::now());
        }
    }

    /// A message that `Tunn` accepted; `at` is when it arrived.
    fn accepted(&mut self, message_type: u8, at: Instant) {
        let (role, since) = match message_type {
            INITIATION => {
                self.initiation_received = Some(at);
                return;
            }
            RESPONSE => ("initiator", self.initiation_sent),
            TRANSPORT => ("responder", self.initiation_received),
            _ => return,
        };
        if let (false, Some(since)) = (self.told, since) {
            self.told = true;
            let ms = since.elapsed().as_secs_f64() * 1e3;
            say(&json!({"event": "handshake", "role": role, "ms": (ms * 1e3).round() / 1e3}));
        }
    }
}

struct Peer {
    tunn: Tunn,
    tun: tun::Tun,
    socket: UdpSocket,
    endpoint: Option<SocketAddr>,
    first: FirstHandshake,
    /// What `Tunn` writes into.
    out: Box<[u8]>,
}

impl Peer {
    fn new(conf: conf::Conf, tun: tun::Tun, socket: UdpSocket) -> Peer {
        let tunn = Tunn::new(
            conf.private_key.into(),
            conf.public_key.into(),
            conf.preshared_key,
            conf.persistent_keepalive,
            std::process::id() & 0xff_ffff,
            None,
        );
        let endpoint = conf.endpoint.map(|to| for_socket(&socket, to));
        let out = vec![0; BUFFER_LEN].into_boxed_slice();
        Peer { tunn, tun, socket, endpoint, first: FirstHandshake::default(), out }
    }

    fn initiate(&mut self) {
        let result = self.tunn.format_handshake_initiation(&mut self.out, true);
        if let TunnResult::WriteToNetwork(message) = result {
            self.first.sent(message);
            send(&self.socket, self.endpoint, message);
        }
    }

    fn run(mut self) -> Result<()> {
        let mut buffer = vec![0; BUFFER_LEN].into_boxed_slice();
        let mut timers_due = Instant::now() + TIMERS_EVERY;
        loop {
            let moved = self.outbound(&mut buffer)? + self.inbound(&mut buffer)?;
            let now = Instant::now();
            if now >= timers_due {
                self.timers();
                timers_due = now + TIMERS_EVERY;
            }
            if moved == 0 {
                self.wait(timers_due.saturating_duration_since(now))?;
            }
        }
    }

    fn wait(&self, at_most: Duration) -> Result<()> {
        let mut fds =
            [PollFd::new(&self.tun, PollFlags::IN), PollFd::new(&self.socket, PollFlags::IN)];
        let timeout = Timespec::try_from(at_most).context("a wait of at most 100 ms")?;
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("waiting for packets"),
        }
    }

    /// TUN → wire.
    fn outbound(&mut self, buffer: &mut [u8]) -> Result<usize> {
        for count in 0..BATCH {
            let Some(len) = self.tun.read(buffer).context("reading the TUN device")? else {
                return Ok(count);
            };
            if let TunnResult::WriteToNetwork(message) =
                self.tunn.encapsulate(&buffer[..len], &mut self.out)
            {
                self.first.sent(message);
                send(&self.socket, self.endpoint, message);
            }
        }
        Ok(BATCH)
    }

    /// Wire → TUN.
    fn inbound(&mut self, buffer: &mut [u8]) -> Result<usize> {
        for count in 0..BATCH {
            let (len, from) = match self.socket.recv_from(buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(count),
                // What an ICMP message says about an earlier datagram.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => continue,
                Err(error) => return Err(error).context("receiving"),
            };
            self.datagram(&buffer[..len], from);
        }
        Ok(BATCH)
    }

    fn datagram(&mut self, datagram: &[u8], from: SocketAddr) {
        let at = Instant::now();
        let Some(&message_type) = datagram.first() else { return };
        let mut result = self.tunn.decapsulate(Some(from.ip()), datagram, &mut self.out);
        if matches!(result, TunnResult::Err(_)) {
            return;
        }
        self.endpoint = Some(from);
        self.first.accepted(message_type, at);
        loop {
            match result {
                TunnResult::WriteToNetwork(message) => {
                    self.first.sent(message);
                    send(&self.socket, self.endpoint, message);
                    // Packets that waited for the handshake come out of calls without a datagram.
                    result = self.tunn.decapsulate(None, &[], &mut self.out);
                }
                TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                    self.tun.write(packet);
                    return;
                }
                TunnResult::Done | TunnResult::Err(_) => return,
            }
        }
    }

    fn timers(&mut self) {
        if let TunnResult::WriteToNetwork(message) = self.tunn.update_timers(&mut self.out) {
            self.first.sent(message);
            send(&self.socket, self.endpoint, message);
        }
    }
}

/// A full socket buffer loses the datagram, as a full link would.
fn send(socket: &UdpSocket, endpoint: Option<SocketAddr>, message: &[u8]) {
    if let Some(endpoint) = endpoint {
        let _ = socket.send_to(message, endpoint);
    }
}

/// An IPv6 socket reaches IPv4 addresses in their mapped form.
fn for_socket(socket: &UdpSocket, to: SocketAddr) -> SocketAddr {
    match (socket.local_addr(), to.ip()) {
        (Ok(SocketAddr::V6(_)), IpAddr::V4(v4)) => {
            SocketAddr::new(v4.to_ipv6_mapped().into(), to.port())
        }
        _ => to,
    }
}
