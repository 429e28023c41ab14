//! UDP sockets of the synthetic peers, and floods by them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use wg_common::endpoint::{Endpoint, LocalSource};
use wg_userspace::sys::errno::{EINVAL, EIO, EMSGSIZE, ENOBUFS, EOPNOTSUPP};
use wg_userspace::sys::mmsg::{self, BATCH_MAX, Outgoing, ReceiveBatch};
use wg_userspace::sys::socket::{self, Family};
use wg_userspace::sys::wait::{PollFd, PollFlags, poll};

use super::arguments::Rate;
use super::pace::Pacer;
use super::sealed::{Places, Plan};

/// Most sockets: each peer has one of its own up to this many.
pub const SOCKETS_MAX: u16 = 4096;
/// Bytes of a run of datagrams that crosses the kernel as one, at most.
const RUN_BYTES_MAX: usize = 65_000;
/// Bytes of a socket's buffers.
const BUFFER_LEN: usize = 4 << 20;
/// What a late sender makes up for.
pub(super) const DEBT_NS: u64 = 5_000_000;
/// Sleeping takes this much longer than asked for, now and then: the rest of a wait is spent awake.
const AWAKE: Duration = Duration::from_micros(120);

/// Sockets that all speak to one gateway. Peer *n* has socket *n* modulo their number.
pub struct Sockets {
    sockets: Vec<OwnedFd>,
    ports: Vec<u16>,
    endpoint: Endpoint,
    batch: ReceiveBatch,
}

impl Sockets {
    /// Opens as many, on ports that the kernel chooses.
    ///
    /// # Errors
    /// If the kernel gives none.
    pub fn open(to: SocketAddr, count: u16) -> Result<Self> {
        ensure!((1..=SOCKETS_MAX).contains(&count), "1 to {SOCKETS_MAX} ports, not {count}");
        let family = Family::of(&to);
        let (mut sockets, mut ports) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let socket = socket::udp(family)?;
            socket::bind_any(&socket, family, 0).context("binding a UDP socket")?;
            socket::set_buffers(&socket, BUFFER_LEN)?;
            socket::set_path_mtu_rules(&socket, family)?;
            ports.push(socket::udp_local(&socket)?.1);
            sockets.push(socket);
        }
        let endpoint = Endpoint::configured(to);
        Ok(Self { sockets, ports, endpoint, batch: ReceiveBatch::new()? })
    }

    /// How many there are.
    pub fn count(&self) -> u16 {
        self.sockets.len() as u16
    }

    /// The port of a peer.
    pub fn port(&self, peer: u32) -> u16 {
        self.ports[self.index(peer)]
    }

    fn index(&self, peer: u32) -> usize {
        peer as usize % self.sockets.len()
    }

    /// Sends one datagram of a peer, from `source` if it is given; false if there was no room for it.
    ///
    /// # Errors
    /// The kernel's, for other reasons.
    pub fn send(&self, peer: u32, message: &[u8], source: Option<IpAddr>) -> Result<bool> {
        let local = source.map(|addr| LocalSource { addr, ifindex: 0 });
        let endpoint = Endpoint { local, ..self.endpoint };
        let datagram = Outgoing { bytes: message, endpoint: &endpoint, tos: 0 };
        match mmsg::send(&self.sockets[self.index(peer)], &[datagram], [1]) {
            Ok(count) => Ok(count == 1),
            Err(error) if is_full(&error) => Ok(false),
            Err(error) => {
                Err(error).with_context(|| format!("sending to {}", self.endpoint.remote))
            }
        }
    }

    /// Waits for datagrams from the gateway, for `timeout` at most, and hands them over; there may be none.
    ///
    /// # Errors
    /// The kernel's, and those of `take`.
    pub fn receive(
        &mut self,
        timeout: Duration,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut waiting: Vec<_> =
            self.sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        if poll(&mut waiting, timeout)? == 0 {
            return Ok(());
        }
        let ready: Vec<usize> =
            (0..waiting.len()).filter(|&at| !waiting[at].revents().is_empty()).collect();
        for at in ready {
            match self.batch.receive(&self.sockets[at]) {
                Ok(_) => {}
                // What an ICMP message said of an earlier datagram.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(error) => return Err(error).context("receiving"),
            }
            for datagram in self.batch.datagrams() {
                if datagram.endpoint.remote == self.endpoint.remote && !datagram.truncated {
                    take(datagram.bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Sends the packets of a plan, in order and each of them once, for `limit` at most.
    ///
    /// # Errors
    /// If the kernel refuses for a reason that will not pass.
    pub fn flood(
        &self,
        plan: &Plan,
        places: &Places,
        bytes: &[u8],
        rate: Rate,
        limit: Duration,
    ) -> Result<Flooded> {
        let mut done = Flooded::default();
        let mut joins = vec![true; self.sockets.len()];
        let burst = u64::from(plan.burst());
        let begin = Instant::now();
        let mut pacer = rate.number().map(|rate| Pacer::new(rate, 0, DEBT_NS, burst));
        let mut next = 0;
        while next < plan.packet_count() {
            let now = begin.elapsed();
            if now >= limit {
                break;
            }
            let count =
                (burst - next % burst).min(plan.packet_count() - next).min(BATCH_MAX as u64);
            if let Some(pacer) = &mut pacer {
                let now_ns = now.as_nanos() as u64;
                if pacer.due(next, now_ns) < count {
                    let due = Duration::from_nanos(pacer.when(next, count)).min(limit);
                    wait(due.saturating_sub(now));
                    continue;
                }
            }
            let datagrams: Vec<Outgoing<'_>> = (next..next + count)
                .map(|at| {
                    let place = places.at(at);
                    let bytes = &bytes[place.offset()..][..place.len()];
                    Outgoing { bytes, endpoint: &self.endpoint, tos: 0 }
                })
                .collect();
            let socket = self.index(plan.peer(next));
            done.refused += send_all(&self.sockets[socket], &datagrams, &mut joins[socket])?;
            next += count;
        }
        done.packets = next - done.refused;
        done.attempted = next;
        done.time = begin.elapsed();
        done.forgiven = pacer.map_or(0, |pacer| pacer.forgiven());
        done.joined = joins.iter().all(|joins| *joins);
        Ok(done)
    }
}

/// What a flood came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flooded {
    /// Packets that the kernel, or the interface, took.
    pub packets: u64,
    /// Packets that were used up: these are the first of the plan.
    pub attempted: u64,
    /// Packets that it did not take.
    pub refused: u64,
    /// Packets that an interface took and dropped: its ring, or that of the other end, was full.
    pub nic_dropped: u64,
    /// From the first to the last.
    pub time: Duration,
    /// Packets that the rate asked for and that were given up, since the sender was too late.
    pub forgiven: u64,
    /// Whether runs crossed the kernel as one.
    pub joined: bool,
}

/// Waits for about so long.
pub(super) fn wait(time: Duration) {
    match time.checked_sub(AWAKE) {
        Some(time) if !time.is_zero() => std::thread::sleep(time),
        _ => std::hint::spin_loop(),
    }
}

fn is_full(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(ENOBUFS)
}

/// Sends datagrams of one length, waiting for room; gives how many the kernel refused. `joins`: whether they cross
/// the kernel as one, as long as it takes them like that.
fn send_all(socket: &OwnedFd, datagrams: &[Outgoing<'_>], joins: &mut bool) -> Result<u64> {
    let mut refused = 0;
    let mut rest = datagrams;
    while let Some(first) = rest.first() {
        let run_len =
            if *joins { (RUN_BYTES_MAX / first.bytes.len()).clamp(1, rest.len()) } else { 1 };
        let runs = rest.chunks(run_len).map(<[_]>::len);
        match mmsg::send(socket, rest, runs) {
            Ok(sent) => rest = &rest[(sent * run_len).min(rest.len())..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(socket, PollFlags::OUT)], Duration::from_millis(100))?;
            }
            Err(error) if error.raw_os_error() == Some(ENOBUFS) => {
                refused += run_len as u64;
                rest = &rest[run_len..];
            }
            Err(error)
                if run_len > 1
                    && matches!(
                        error.raw_os_error(),
                        Some(EIO | EINVAL | EMSGSIZE | EOPNOTSUPP)
                    ) =>
            {
                *joins = false;
            }
            Err(error) => {
                return Err(error).with_context(|| format!("sending to {}", first.endpoint.remote));
            }
        }
    }
    Ok(refused)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn datagrams_arrive_once_each_in_order_joined_or_not() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let sockets = Sockets::open(receiver.local_addr().unwrap(), 2).unwrap();
        let payloads: Vec<[u8; 100]> = (0..50).map(|at| [at; 100]).collect();
        for mut joins in [true, false] {
            let datagrams: Vec<_> = payloads
                .iter()
                .map(|bytes| Outgoing { bytes, endpoint: &sockets.endpoint, tos: 0 })
                .collect();
            assert_eq!(send_all(&sockets.sockets[1], &datagrams, &mut joins).unwrap(), 0);
            for payload in &payloads {
                let mut buffer = [0; 200];
                let (len, from) = receiver.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..len], from.port()), (&payload[..], sockets.port(3)));
            }
        }
    }

    #[test]
    fn only_the_gateway_is_heard() {
        let gateway = UdpSocket::bind("127.0.0.1:0").unwrap();
        let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut sockets = Sockets::open(gateway.local_addr().unwrap(), 1).unwrap();
        let to = ("127.0.0.1", sockets.port(0));
        stranger.send_to(b"no", to).unwrap();
        gateway.send_to(b"yes", to).unwrap();
        let mut heard = Vec::new();
        while heard.is_empty() {
            let take = |bytes: &[u8]| {
                heard.push(bytes.to_vec());
                Ok(())
            };
            sockets.receive(Duration::from_secs(5), take).unwrap();
        }
        assert_eq!(heard, [b"yes".to_vec()]);
    }
}
