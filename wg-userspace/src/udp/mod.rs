//! Ordinary UDP sockets on the listen port: always open, also beside XSKs, for datagrams that XDP
//! passes and for sending.
//!
//! Knows datagrams, endpoints and batches, and nothing of what is in them. Received batches go to
//! `datapath::inbound`; what is sent comes from `datapath::outbound` and from handshakes.
//!
//! **Path MTU.** Anyone can forge the ICMP message that says "too big", so it must not be able to
//! shrink what a tunnel carries. IPv4: `IP_PMTUDISC_OMIT`, that is, only the outgoing interface's MTU
//! counts and DF is clear, so that this host fragments what its own link does not carry, and a router
//! what a link behind does not. (`IP_PMTUDISC_INTERFACE` differs in the first: it refuses.) IPv6
//! routers do not fragment, so ignoring the message altogether would lose every full-size packet on
//! a path that really is narrower: with `IPV6_PMTUDISC_DONT` it only makes this host fragment outer
//! datagrams (to no less than 1,280 bytes). In neither case does the inner MTU change.
//!
//! **Runs.** Datagrams of one sender, or to one receiver, that are alike cross the kernel as one
//! (`UDP_GRO`, `UDP_SEGMENT`), and are datagrams again on both sides of this room. A run that the kernel
//! refuses is sent one by one at once: it cuts up a datagram that is too long for the path, but not the
//! pieces of a run. Where that happened no such runs are tried for some seconds (`refusals`).

mod refusals;
mod runs;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use arrayvec::ArrayVec;
use wg_common::endpoint::Endpoint;

use self::refusals::Refusals;
use crate::sys::errno::{
    EADDRNOTAVAIL, EAFNOSUPPORT, EINVAL, EIO, EMSGSIZE, ENETUNREACH, ENODEV, ENOPROTOOPT,
    EOPNOTSUPP,
};
pub use crate::sys::mmsg::{BATCH_MAX, Datagram, Outgoing, ReceiveBatch};
use crate::sys::socket::{self, Family};
use crate::sys::{clock, mmsg};

/// Bytes asked for in each direction: some 5,000 full-size datagrams, 50 ms of a gigabit.
const BUFFER_LEN: usize = 8 << 20;

/// Ports that are tried when the kernel's choice for IPv4 is taken in IPv6.
const CHOICES_MAX: usize = 64;

/// Why the sockets of a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum UdpError {
    /// Another socket has the port, be it in IPv4 or IPv6, or another device of ours.
    #[error(
        "UDP port {port} is in use by another program or device; `ss -ulnp sport = {port}` says which"
    )]
    InUse {
        /// The port asked for; 0 if none was free in both families.
        port: u16,
    },
    /// The host refuses the port or the mark.
    #[error("not permitted to {what}; {needed} is needed, run it as root")]
    NotPermitted {
        /// What was being done.
        what: &'static str,
        /// The capability that allows it.
        needed: &'static str,
    },
    /// A descriptor that was handed to us is no UDP socket as this room makes them.
    #[error("descriptor is not a bound UDP socket of one IP version")]
    NotUdp,
    /// Anything else.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// A worker's sockets: one per IP version.
#[derive(Debug)]
pub struct UdpSockets {
    /// For IPv4.
    pub v4: UdpSocket,
    /// For IPv6, where the host has it.
    pub v6: Option<UdpSocket>,
}

impl UdpSockets {
    /// The socket that sends to `remote`, if the host has its IP version.
    pub fn for_remote(&self, remote: &SocketAddr) -> Option<&UdpSocket> {
        match remote {
            SocketAddr::V4(_) => Some(&self.v4),
            SocketAddr::V6(_) => self.v6.as_ref(),
        }
    }

    /// The sockets there are.
    pub fn iter(&self) -> impl Iterator<Item = &UdpSocket> {
        std::iter::once(&self.v4).chain(&self.v6)
    }

    /// Changes the mark of both.
    ///
    /// # Errors
    /// As [`UdpSocket::set_fwmark`].
    pub fn set_fwmark(&self, fwmark: u32) -> Result<(), UdpError> {
        self.iter().try_for_each(|socket| socket.set_fwmark(fwmark))
    }
}

/// Opens sockets for `worker_count` workers on `port`, in IPv4 and IPv6. The kernel spreads peers
/// over the workers' sockets by their address and port (`SO_REUSEPORT`). `fwmark` 0 is none.
///
/// Port 0 chooses one that is free in both; the port is given back.
///
/// The first socket of each family is bound *before* it allows sharing, so that a port somebody has
/// is refused, also when they would share it: two devices on one port would take each other's
/// datagrams. From then on only a process of the same effective user can join the group; the kernel
/// refuses all others. (So whoever gives up root must have bound before.)
///
/// # Errors
/// [`UdpError::InUse`], [`UdpError::NotPermitted`]. No socket stays open.
///
/// # Panics
/// If `worker_count` is 0.
pub fn bind_group(
    port: u16,
    worker_count: usize,
    fwmark: u32,
) -> Result<(u16, Vec<UdpSockets>), UdpError> {
    assert!(worker_count > 0, "a device has a worker");
    let tries = if port == 0 { CHOICES_MAX } else { 1 };
    let (port, v4, v6) = (0..tries)
        .find_map(|_| match claim(port) {
            Err(UdpError::InUse { .. }) => None,
            claimed => Some(claimed),
        })
        .unwrap_or(Err(UdpError::InUse { port }))?;

    let has_v6 = v6.is_some();
    let mut first = Some((v4, v6));
    let mut group = Vec::with_capacity(worker_count);
    for _ in 0..worker_count {
        let (v4, v6) = match first.take() {
            Some(sockets) => sockets,
            None => {
                (join(Family::V4, port)?, if has_v6 { Some(join(Family::V6, port)?) } else { None })
            }
        };
        let v6 = v6.map(|v6| UdpSocket::prepare(v6, Family::V6, port)).transpose()?;
        let sockets = UdpSockets { v4: UdpSocket::prepare(v4, Family::V4, port)?, v6 };
        if fwmark != 0 {
            sockets.set_fwmark(fwmark)?;
        }
        group.push(sockets);
    }
    Ok((port, group))
}

/// Takes `port`, or any if it is 0, for us alone in both families, then opens it for sharing.
fn claim(port: u16) -> Result<(u16, OwnedFd, Option<OwnedFd>), UdpError> {
    let v4 = socket::udp(Family::V4).map_err(io_error("opening an IPv4 UDP socket"))?;
    bind(&v4, Family::V4, port)?;
    let (_, port) = socket::udp_local(&v4).map_err(io_error("reading the port"))?;
    let v6 = match socket::udp(Family::V6) {
        Ok(v6) => match bind(&v6, Family::V6, port) {
            Ok(()) => Some(v6),
            // IPv6 is there but switched off.
            Err(UdpError::Io { source, .. })
                if source.kind() == io::ErrorKind::AddrNotAvailable =>
            {
                None
            }
            Err(error) => return Err(error),
        },
        Err(error) if error.raw_os_error() == Some(EAFNOSUPPORT) => None,
        Err(error) => return Err(io_error("opening an IPv6 UDP socket")(error)),
    };
    for socket in std::iter::once(&v4).chain(&v6) {
        socket::set_reuse_port(socket).map_err(io_error("sharing the port"))?;
    }
    Ok((port, v4, v6))
}

/// Another socket on a port that is ours already.
fn join(family: Family, port: u16) -> Result<OwnedFd, UdpError> {
    let socket = socket::udp(family).map_err(io_error("opening a UDP socket"))?;
    socket::set_reuse_port(&socket).map_err(io_error("sharing the port"))?;
    bind(&socket, family, port)?;
    Ok(socket)
}

fn bind(socket: &OwnedFd, family: Family, port: u16) -> Result<(), UdpError> {
    socket::bind_any(socket, family, port).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => UdpError::InUse { port },
        io::ErrorKind::PermissionDenied => UdpError::NotPermitted {
            what: "bind to a UDP port below 1024",
            needed: "CAP_NET_BIND_SERVICE",
        },
        _ => io_error("binding a UDP socket")(error),
    })
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> UdpError {
    move |source| UdpError::Io { what, source }
}

/// What became of a batch given to [`UdpSocket::send`].
#[derive(Debug, Default)]
pub struct Sent {
    /// Datagrams that the kernel took.
    pub sent: usize,
    /// Datagrams that it did not take, which are lost.
    pub failed: usize,
    /// Bit *i*: this host no longer has the local address by which datagram *i*'s endpoint is
    /// answered. The datagram was sent without; the caller should forget the address.
    pub stale_sources: u64,
    /// Why the last one that failed did.
    pub error: Option<io::Error>,
}
const _: () = assert!(BATCH_MAX <= u64::BITS as usize);

impl Sent {
    /// Adds what became of some of the batch, of which the first is datagram `at`.
    fn add(&mut self, part: Self, at: usize) {
        self.sent += part.sent;
        self.failed += part.failed;
        self.stale_sources |= part.stale_sources << at;
        self.error = part.error.or(self.error.take());
    }
}

/// A UDP socket of one IP version that does not block.
#[derive(Debug)]
pub struct UdpSocket {
    fd: OwnedFd,
    family: Family,
    port: u16,
    /// Whether the kernel knows runs.
    sends_runs: bool,
    refusals: Refusals,
}

impl UdpSocket {
    /// Takes over a bound socket from who made it (with [`bind_group`]), with its options: they are not
    /// touched, so that this needs no right to set any.
    ///
    /// # Errors
    /// [`UdpError::NotUdp`] for anything else.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, UdpError> {
        match socket::udp_local(&fd) {
            Ok((family, port)) if port != 0 => Ok(Self::new(fd, family, port)),
            _ => Err(UdpError::NotUdp),
        }
    }

    fn new(fd: OwnedFd, family: Family, port: u16) -> Self {
        let sends_runs = socket::can_segment(&fd);
        Self { fd, family, port, sends_runs, refusals: Refusals::default() }
    }

    /// The socket's descriptor, for who takes it over.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Sets the options of a bound socket.
    fn prepare(fd: OwnedFd, family: Family, port: u16) -> Result<Self, UdpError> {
        let options = || {
            socket::set_nonblocking(&fd)?;
            socket::set_receive_details(&fd, family)?;
            socket::set_path_mtu_rules(&fd, family)?;
            // Without, each datagram comes alone.
            let _ = socket::set_gro(&fd);
            socket::set_buffers(&fd, BUFFER_LEN)
        };
        options().map_err(io_error("setting options of a UDP socket"))?;
        Ok(Self::new(fd, family, port))
    }

    /// The local port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The IP version.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The mark that routing rules see on what is sent; 0 is none.
    ///
    /// # Errors
    /// The system's.
    pub fn fwmark(&self) -> Result<u32, UdpError> {
        socket::mark(&self.fd).map_err(io_error("reading a firewall mark"))
    }

    /// Changes that mark.
    ///
    /// # Errors
    /// [`UdpError::NotPermitted`].
    pub fn set_fwmark(&self, fwmark: u32) -> Result<(), UdpError> {
        socket::set_mark(&self.fd, fwmark).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => UdpError::NotPermitted {
                what: "set a firewall mark on a UDP socket",
                needed: "CAP_NET_ADMIN",
            },
            _ => io_error("setting a firewall mark")(error),
        })
    }

    /// Receives about [`BATCH_MAX`] datagrams and gives their number; 0: none waits. Runs that were
    /// joined on their way here may make it more.
    ///
    /// # Errors
    /// The system's. None is the fault of a datagram.
    pub fn receive(&self, batch: &mut ReceiveBatch) -> io::Result<usize> {
        batch.receive(&self.fd)
    }

    /// Datagrams that the kernel has dropped before this socket, nearly all for want of room. Wraps
    /// around.
    ///
    /// # Errors
    /// The system's, if it does not know.
    pub fn drops(&self) -> io::Result<u32> {
        socket::drops(&self.fd)
    }

    /// Sends up to [`BATCH_MAX`] datagrams, in order, with one call if nothing goes wrong; replies
    /// leave from the address that the peer dialled. Neighbours that are alike cross the kernel as one.
    ///
    /// A datagram that the kernel refuses does not keep back those behind it; only when the send
    /// buffer is full are the rest lost too. An endpoint of the other IP version fails.
    ///
    /// # Panics
    /// If there are more than [`BATCH_MAX`].
    pub fn send(&self, datagrams: &[Outgoing<'_>]) -> Sent {
        assert!(datagrams.len() <= BATCH_MAX, "one call sends a batch");
        self.send_runs(datagrams, &self.runs_of(datagrams))
    }

    /// The lengths of the runs that `datagrams` are to be sent in.
    fn runs_of(&self, datagrams: &[Outgoing<'_>]) -> ArrayVec<usize, BATCH_MAX> {
        let now = (!self.refusals.is_empty()).then(clock::boot_now);
        let mut runs = ArrayVec::new();
        let mut rest = datagrams;
        while let Some(first) = rest.first() {
            let remote = first.endpoint.remote.ip();
            let is_allowed = self.sends_runs
                && now.is_none_or(|now| self.refusals.allows(remote, first.bytes.len(), now));
            let len = if is_allowed { runs::run_len(rest) } else { 1 };
            runs.push(len);
            rest = &rest[len..];
        }
        runs
    }

    fn send_runs(&self, datagrams: &[Outgoing<'_>], runs: &[usize]) -> Sent {
        let mut outcome = Sent::default();
        let mut next = 0;
        let mut runs = runs;
        while let Some(&run_len) = runs.first() {
            match mmsg::send(&self.fd, &datagrams[next..], runs.iter().copied()) {
                Ok(sent) => {
                    let (gone, left) = runs.split_at(sent);
                    let count: usize = gone.iter().sum();
                    outcome.sent += count;
                    next += count;
                    runs = left;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    outcome.failed += datagrams.len() - next;
                    outcome.error = Some(error);
                    break;
                }
                Err(error) => {
                    let run = &datagrams[next..next + run_len];
                    let apart = match run {
                        [single] => self.send_without_source(single, error),
                        run => self.send_apart(run, &error),
                    };
                    outcome.add(apart, next);
                    next += run_len;
                    runs = &runs[1..];
                }
            }
        }
        outcome
    }

    /// Sends the datagrams of a run that was refused for `error` one by one, and takes note if it was for
    /// being a run.
    fn send_apart(&self, run: &[Outgoing<'_>], error: &io::Error) -> Sent {
        let apart = self.send_runs(run, &[1; BATCH_MAX][..run.len()]);
        let remote = run[0].endpoint.remote.ip();
        // A local address that is gone is refused for reasons that could be those of a run, too: then
        // the datagrams did not go with it alone either.
        let went_alone = apart.sent > 0 && apart.stale_sources == 0;
        match error.raw_os_error() {
            // The pieces are longer than the path's MTU; older kernels say that it is invalid.
            Some(EMSGSIZE) => {
                self.refusals.refused_by(remote, run[0].bytes.len(), clock::boot_now());
            }
            Some(EINVAL) if went_alone => {
                self.refusals.refused_by(remote, run[0].bytes.len(), clock::boot_now());
            }
            // The NIC computes no checksums, or IPsec is in between.
            Some(EIO) if went_alone => {
                self.refusals.refused_by(remote, 0, clock::boot_now());
            }
            Some(EOPNOTSUPP | ENOPROTOOPT) if went_alone => {
                self.refusals.refused_by_all(clock::boot_now());
            }
            _ => {}
        }
        apart
    }

    /// Tries once more, without the local address, if that can have been the reason for `error`.
    fn send_without_source(&self, datagram: &Outgoing<'_>, error: io::Error) -> Sent {
        // Not an address of this host: EINVAL, in IPv4 ENETUNREACH on newer kernels. Its link is
        // gone: ENODEV. Without a source the true unreachable fails again.
        let errno = error.raw_os_error();
        let may_be_stale = matches!(errno, Some(EINVAL | EADDRNOTAVAIL | ENETUNREACH | ENODEV));
        if datagram.endpoint.local.is_none() || !may_be_stale {
            return Sent { failed: 1, error: Some(error), ..Sent::default() };
        }
        let endpoint = Endpoint::configured(datagram.endpoint.remote);
        match mmsg::send(&self.fd, &[Outgoing { endpoint: &endpoint, ..*datagram }], [1]) {
            Ok(_) => Sent { sent: 1, stale_sources: 1, ..Sent::default() },
            Err(error) => Sent { failed: 1, error: Some(error), ..Sent::default() },
        }
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashSet};
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use std::process::Command;
    use std::time::Duration;

    use proptest::prelude::*;
    use wg_common::endpoint::LocalSource;

    use super::*;
    use crate::require_root;
    use crate::sys::errno::EPERM;
    use crate::sys::netns::{NetNs, in_new_netns};
    use crate::sys::wait::{PollFd, PollFlags, poll};

    fn ip(arguments: &str) {
        let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {arguments}: {errors}");
    }

    /// Owned copies of what arrives next on `socket`.
    fn receive(socket: &UdpSocket) -> Vec<(Vec<u8>, Endpoint, u8)> {
        let mut fds = [PollFd::new(socket, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Duration::from_secs(10)).unwrap(), 1);
        let mut batch = ReceiveBatch::new().unwrap();
        assert!(socket.receive(&mut batch).unwrap() > 0);
        batch.datagrams().map(|got| (got.bytes.to_vec(), got.endpoint, got.tos)).collect()
    }

    /// Sends these, all with this TOS.
    fn send(socket: &UdpSocket, datagrams: &[(&[u8], &Endpoint)], tos: u8) -> Sent {
        let datagrams: Vec<_> =
            datagrams.iter().map(|&(bytes, endpoint)| Outgoing { bytes, endpoint, tos }).collect();
        socket.send(&datagrams)
    }

    fn single() -> UdpSockets {
        bind_group(0, 1, 0).unwrap().1.pop().unwrap()
    }

    fn loopback(socket: &UdpSocket) -> SocketAddr {
        match socket.family() {
            Family::V4 => (Ipv4Addr::LOCALHOST, socket.port()).into(),
            Family::V6 => (Ipv6Addr::LOCALHOST, socket.port()).into(),
        }
    }

    #[test]
    fn port_zero_finds_a_port_free_in_both_families() {
        let (port, group) = bind_group(0, 2, 0).unwrap();
        assert_ne!(port, 0);
        assert!(group.iter().flat_map(UdpSockets::iter).all(|socket| socket.port() == port));
    }

    #[test]
    fn a_port_in_use_in_either_family_is_refused() {
        for taken in ["0.0.0.0:0", "[::1]:0"] {
            let foreign = std::net::UdpSocket::bind(taken).unwrap();
            let port = foreign.local_addr().unwrap().port();
            let refused = bind_group(port, 2, 0);
            assert!(matches!(refused, Err(UdpError::InUse { port: p }) if p == port), "{taken}");
        }
    }

    #[test]
    fn a_port_that_would_be_shared_is_refused_too() {
        for family in [Family::V4, Family::V6] {
            let other = socket::udp(family).unwrap();
            socket::set_reuse_port(&other).unwrap();
            socket::bind_any(&other, family, 0).unwrap();
            let (_, port) = socket::udp_local(&other).unwrap();
            let refused = bind_group(port, 1, 0);
            assert!(matches!(refused, Err(UdpError::InUse { .. })), "{family:?}");
        }
    }

    #[test]
    fn a_batch_arrives_whole_in_order_and_with_its_details() {
        let (a, b) = (single(), single());
        for (from, to) in [(Some(&a.v4), Some(&b.v4)), (a.v6.as_ref(), b.v6.as_ref())] {
            let (Some(from), Some(to)) = (from, to) else { continue };
            let endpoint = Endpoint::configured(loopback(to));
            let payloads: Vec<Vec<u8>> =
                (0..64).map(|i| vec![i; 1 + usize::from(i) * 23]).collect();
            let datagrams: Vec<_> = payloads.iter().map(|p| (&p[..], &endpoint)).collect();
            let sent = send(from, &datagrams, 0x88);
            assert_eq!((sent.sent, sent.failed, sent.stale_sources), (64, 0, 0));

            let got = receive(to);
            assert_eq!(got.iter().map(|(bytes, ..)| bytes.clone()).collect::<Vec<_>>(), payloads);
            for (_, endpoint, tos) in got {
                assert_eq!(endpoint.remote, loopback(from));
                let local = endpoint.local.unwrap();
                assert_eq!((local.addr, local.ifindex), (loopback(to).ip(), 1));
                assert_eq!(tos, 0x88);
            }
        }
    }

    #[test]
    fn a_batch_is_used_again_and_again() {
        let (a, b) = (single(), single());
        let endpoint = Endpoint::configured(loopback(&b.v4));
        let mut batch = ReceiveBatch::new().unwrap();
        for (round, count) in [64, 1, 0, 3, 64].into_iter().enumerate() {
            let payload = [round as u8; 32];
            let datagrams: Vec<_> = (0..count).map(|_| (&payload[..], &endpoint)).collect();
            assert_eq!(send(&a.v4, &datagrams, 0).sent, count);
            assert_eq!(b.v4.receive(&mut batch).unwrap(), count);
            assert_eq!((batch.len(), batch.is_empty()), (count, count == 0));
            for got in batch.datagrams() {
                assert_eq!(got.bytes, payload);
                assert!(got.endpoint.local.is_some() && !got.truncated);
                if got.run_len == count {
                    assert_eq!(got.bytes[16..].as_ptr().addr() % 64, 0);
                }
                got.bytes.fill(0xff);
            }
        }
    }

    #[test]
    fn the_longest_datagram_is_not_cut() {
        let (a, b) = (single(), single());
        let payload = vec![7; 65_507];
        let endpoint = Endpoint::configured(loopback(&b.v4));
        assert_eq!(send(&a.v4, &[(&payload, &endpoint)], 0).sent, 1);
        assert_eq!(receive(&b.v4)[0].0, payload);
    }

    /// Datagrams of these lengths, each with a number in its first bytes, as far as there is room.
    fn numbered(lens: impl IntoIterator<Item = usize>) -> Vec<Vec<u8>> {
        let make = |(number, len): (usize, usize)| {
            let mut payload = vec![number as u8; len];
            let number = (number as u32).to_le_bytes();
            let room = len.min(4);
            payload[..room].copy_from_slice(&number[..room]);
            payload
        };
        lens.into_iter().enumerate().map(make).collect()
    }

    fn all_to<'a>(
        endpoint: &'a Endpoint,
        payloads: &'a [Vec<u8>],
    ) -> Vec<(&'a [u8], &'a Endpoint)> {
        payloads.iter().map(|payload| (&payload[..], endpoint)).collect()
    }

    fn payloads_of(got: Vec<(Vec<u8>, Endpoint, u8)>) -> Vec<Vec<u8>> {
        got.into_iter().map(|(bytes, ..)| bytes).collect()
    }

    #[test]
    fn a_run_crosses_the_kernel_as_one_and_comes_out_as_it_went_in() {
        let (a, b) = (single(), single());
        for (from, to) in [(Some(&a.v4), Some(&b.v4)), (a.v6.as_ref(), b.v6.as_ref())] {
            let (Some(from), Some(to)) = (from, to) else { continue };
            assert!(from.sends_runs, "this kernel knows runs");
            let endpoint = Endpoint::configured(loopback(to));
            let payloads = numbered([1452; 63].into_iter().chain([700]));
            let sent = send(from, &all_to(&endpoint, &payloads), 0x89);
            assert_eq!((sent.sent, sent.failed, sent.stale_sources), (64, 0, 0), "{sent:?}");
            assert!(from.refusals.is_empty());

            let mut batch = ReceiveBatch::new().unwrap();
            assert_eq!(to.receive(&mut batch).unwrap(), 64);
            assert_eq!((batch.buffer_count(), batch.may_have_more()), (2, false));
            let run_lens: Vec<usize> = batch.datagrams().map(|got| got.run_len).collect();
            assert_eq!(run_lens, (1..=45).rev().chain((1..=19).rev()).collect::<Vec<_>>());
            for (got, payload) in batch.datagrams().zip(&payloads) {
                assert_eq!(got.bytes, payload);
                assert_eq!((got.endpoint.remote, got.tos), (loopback(from), 0x89));
                assert_eq!(got.endpoint.local.unwrap().addr, loopback(to).ip());
                assert!(!got.truncated);
            }
        }
    }

    #[test]
    fn a_receiver_that_knows_no_runs_gets_datagrams() {
        let a = single();
        let plain = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let endpoint = Endpoint::configured(plain.local_addr().unwrap());
        let payloads = numbered([500; 20].into_iter().chain([3]));
        assert_eq!(send(&a.v4, &all_to(&endpoint, &payloads), 0).sent, 21);
        let mut buffer = [0; 2048];
        for payload in payloads {
            let len = plain.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..len], payload);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_mixture_arrives_as_it_was_sent(
            stretches in prop::collection::vec(
                (
                    prop_oneof![Just(0), 1..200_usize, 1400..1460_usize, 20_000..65_507_usize],
                    1..20_usize,
                    any::<u8>(),
                    any::<bool>(),
                ),
                1..8,
            ),
        ) {
            let (a, b) = (single(), [single(), single()]);
            let endpoints = b.each_ref().map(|to| Endpoint::configured(loopback(&to.v4)));
            let each = stretches.iter().flat_map(|&(len, count, tos, other)| {
                std::iter::repeat_n((len, tos, usize::from(other)), count)
            });
            // What the buffers of a socket hold without privileges.
            let mut room = 150_000;
            let fits = |&(len, ..): &(usize, u8, usize)| {
                room -= i64::try_from(len).unwrap();
                room >= 0
            };
            let each: Vec<_> = each.take(64).take_while(fits).collect();
            let payloads = numbered(each.iter().map(|&(len, ..)| len));
            let datagrams: Vec<_> = payloads
                .iter()
                .zip(&each)
                .map(|(bytes, &(_, tos, to))| Outgoing { bytes, endpoint: &endpoints[to], tos })
                .collect();
            let sent = a.v4.send(&datagrams);
            prop_assert_eq!((sent.sent, sent.failed), (datagrams.len(), 0));
            for (number, to) in b.iter().enumerate() {
                let mut batch = ReceiveBatch::new().unwrap();
                let mut got: Vec<(Vec<u8>, u8)> = Vec::new();
                while to.v4.receive(&mut batch).unwrap() > 0 {
                    got.extend(batch.datagrams().map(|got| (got.bytes.to_vec(), got.tos)));
                }
                let its = payloads.iter().zip(&each).filter(|(_, (.., to))| *to == number);
                let its: Vec<_> = its.map(|(payload, &(_, tos, _))| (payload.clone(), tos)).collect();
                prop_assert!(got == its, "receiver {}", number);
            }
        }
    }

    #[test]
    fn the_longest_run_is_taken() {
        let (a, b) = (single(), single());
        for (from, to) in [(Some(&a.v4), Some(&b.v4)), (a.v6.as_ref(), b.v6.as_ref())] {
            let (Some(from), Some(to)) = (from, to) else { continue };
            let endpoint = Endpoint::configured(loopback(to));
            // As many bytes as may be; and as many datagrams.
            for lens in [[1452; 45].into_iter().chain([133]).collect(), vec![1; 64]] {
                let payloads = numbered(lens);
                let datagrams = all_to(&endpoint, &payloads);
                assert_eq!(send(from, &datagrams, 0).sent, payloads.len());
                let mut batch = ReceiveBatch::new().unwrap();
                assert_eq!(to.receive(&mut batch).unwrap(), payloads.len());
                assert_eq!(batch.buffer_count(), 1);
                assert!(batch.datagrams().map(|got| got.bytes.to_vec()).eq(payloads));
                assert!(from.refusals.is_empty());
            }
        }
    }

    #[test]
    fn a_batch_of_runs_is_bounded_and_leaves_the_rest_in_the_socket() {
        let (a, b) = (single(), single());
        let endpoint = Endpoint::configured(loopback(&b.v4));
        let payloads = numbered([40; 64 * 64]);
        for part in payloads.chunks(64) {
            assert_eq!(send(&a.v4, &all_to(&endpoint, part), 0).sent, 64);
        }
        let mut batch = ReceiveBatch::new().unwrap();
        let mut got = Vec::new();
        while b.v4.receive(&mut batch).unwrap() > 0 {
            assert!(batch.len() <= mmsg::RECEIVED_MAX && batch.buffer_count() <= BATCH_MAX);
            assert!(batch.len() == 16 * 64 && batch.may_have_more(), "{}", batch.len());
            assert_eq!(batch.datagrams().count(), batch.len());
            got.extend(batch.datagrams().map(|got| got.bytes.to_vec()));
        }
        assert!(got == payloads);
        assert!(!batch.may_have_more());
    }

    #[test]
    fn a_run_from_an_address_that_went_away_is_sent_and_its_path_not_blamed() {
        let (a, b) = (single(), single());
        let cases = [
            (Some(&a.v4), Some(&b.v4), "192.0.2.1"),
            (a.v6.as_ref(), b.v6.as_ref(), "2001:db8::1"),
        ];
        for (from, to, gone) in cases {
            let (Some(from), Some(to)) = (from, to) else { continue };
            let plain = Endpoint::configured(loopback(to));
            let local = Some(LocalSource { addr: gone.parse().unwrap(), ifindex: 1 });
            let stale = Endpoint { local, ..plain };
            let payloads = numbered([100; 6]);
            let mut datagrams = all_to(&stale, &payloads);
            (datagrams[0].1, datagrams[5].1) = (&plain, &plain);
            let sent = send(from, &datagrams, 0);
            assert_eq!((sent.sent, sent.failed, sent.stale_sources), (6, 0, 0b1_1110), "{sent:?}");
            assert!(from.refusals.is_empty());
            assert_eq!(payloads_of(receive(to)), payloads);
        }
    }

    #[test]
    fn what_is_refused_as_a_run_goes_one_by_one_and_is_remembered() {
        let shorter = [EINVAL, EMSGSIZE];
        for errno in [EIO, EINVAL, EMSGSIZE, EOPNOTSUPP, ENOPROTOOPT, EPERM] {
            let (a, b) = (single(), single());
            let endpoint = Endpoint::configured(loopback(&b.v4));
            let payloads = numbered([100, 100, 100, 30]);
            let datagrams = |len: usize, endpoint| {
                let cut = move |payload| Outgoing {
                    bytes: &payloads_at(payload)[..len],
                    endpoint,
                    tos: 1,
                };
                [0, 1, 2].map(cut)
            };
            let run: Vec<_> = payloads
                .iter()
                .map(|bytes| Outgoing { bytes, endpoint: &endpoint, tos: 1 })
                .collect();
            let sent = a.v4.send_apart(&run, &io::Error::from_raw_os_error(errno));
            assert_eq!((sent.sent, sent.failed), (4, 0));
            let mut batch = ReceiveBatch::new().unwrap();
            assert_eq!(b.v4.receive(&mut batch).unwrap(), 4);
            assert_eq!(batch.buffer_count(), 4, "they went one by one");
            assert!(batch.datagrams().map(|got| got.bytes.to_vec()).eq(payloads.iter().cloned()));

            let elsewhere = Endpoint::configured("127.0.0.2:9".parse().unwrap());
            let run_lens = |len, endpoint| a.v4.runs_of(&datagrams(len, endpoint)).to_vec();
            let apart = vec![1, 1, 1];
            let expected = [
                if errno == EPERM { vec![3] } else { apart.clone() },
                if errno == EPERM || shorter.contains(&errno) { vec![3] } else { apart.clone() },
                if [EOPNOTSUPP, ENOPROTOOPT].contains(&errno) { apart } else { vec![3] },
            ];
            let found = [(100, &endpoint), (99, &endpoint), (100, &elsewhere)];
            assert_eq!(found.map(|(len, to)| run_lens(len, to)), expected, "error {errno}");
            // And what is sent then arrives.
            assert_eq!(a.v4.send(&run).sent, 4);
            assert_eq!(payloads_of(receive(&b.v4)), payloads);
        }
    }

    fn payloads_at(number: usize) -> &'static [u8; 100] {
        &[[0; 100], [1; 100], [2; 100]][number]
    }

    #[test]
    fn a_kernel_without_runs_is_sent_none() {
        let (a, b) = (single(), single());
        let from = UdpSocket { sends_runs: false, ..a.v4 };
        let endpoint = Endpoint::configured(loopback(&b.v4));
        let payloads = numbered([100; 5]);
        assert_eq!(send(&from, &all_to(&endpoint, &payloads), 0).sent, 5);
        let mut batch = ReceiveBatch::new().unwrap();
        assert_eq!(b.v4.receive(&mut batch).unwrap(), 5);
        assert_eq!(batch.buffer_count(), 5);
    }

    #[test]
    fn what_finds_no_room_in_a_socket_is_counted() {
        let (a, b) = (single(), single());
        socket::set_buffers(&b.v4, 0).unwrap();
        let endpoint = Endpoint::configured(loopback(&b.v4));
        assert_eq!(b.v4.drops().unwrap(), 0);
        let payload = [1; 1000];
        for _ in 0..50 {
            assert_eq!(send(&a.v4, &[(&payload, &endpoint)], 0).sent, 1);
        }
        let kept = receive(&b.v4).len();
        assert!((1..50).contains(&kept));
        assert_eq!(b.v4.drops().unwrap() as usize, 50 - kept);
    }

    #[test]
    fn a_reply_leaves_from_the_address_dialled() {
        let (server, client) = (single(), single());
        let dialled: SocketAddr = (Ipv4Addr::new(127, 3, 2, 1), server.v4.port()).into();
        send(&client.v4, &[(b"hello", &Endpoint::configured(dialled))], 0);
        let (_, endpoint, _) = receive(&server.v4).remove(0);
        assert_eq!(endpoint.local.unwrap().addr, dialled.ip());
        send(&server.v4, &[(b"reply", &endpoint)], 0);
        assert_eq!(receive(&client.v4)[0].1.remote, dialled);
    }

    #[test]
    fn an_address_that_went_away_is_reported_and_done_without() {
        let (a, b) = (single(), single());
        let remote = loopback(&b.v4);
        let gone = LocalSource { addr: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), ifindex: 1 };
        let (plain, stale) = (Endpoint::configured(remote), Endpoint { remote, local: Some(gone) });
        let sent =
            send(&a.v4, &[(b"1", &plain), (b"2", &stale), (b"3", &plain), (b"4", &stale)], 0);
        assert_eq!((sent.sent, sent.failed, sent.stale_sources), (4, 0, 0b1010), "{sent:?}");
        let got: Vec<u8> = receive(&b.v4).iter().map(|(bytes, ..)| bytes[0]).collect();
        assert_eq!(got, b"1234");

        let (Some(a), Some(b)) = (&a.v6, &b.v6) else { return };
        let gone = LocalSource { addr: "2001:db8::1".parse().unwrap(), ifindex: 1 };
        let stale = Endpoint { remote: loopback(b), local: Some(gone) };
        let sent = send(a, &[(b"1", &stale)], 0);
        assert_eq!((sent.sent, sent.failed, sent.stale_sources), (1, 0, 1));
    }

    #[test]
    fn a_datagram_that_is_refused_does_not_keep_back_the_others() {
        let (a, b) = (single(), single());
        let endpoint = Endpoint::configured(loopback(&b.v4));
        let too_long = vec![0; 65_536];
        let other_family = Endpoint::configured("[::1]:9".parse().unwrap());
        let batch = [
            (&b"1"[..], &endpoint),
            (&too_long[..], &endpoint),
            (&b"2"[..], &endpoint),
            (&b"x"[..], &other_family),
            (&b"3"[..], &endpoint),
        ];
        let sent = send(&a.v4, &batch, 0);
        assert_eq!((sent.sent, sent.failed, sent.stale_sources), (3, 2, 0));
        assert!(sent.error.is_some());
        let got: Vec<u8> = receive(&b.v4).iter().map(|(bytes, ..)| bytes[0]).collect();
        assert_eq!(got, b"123");
    }

    #[test]
    fn peers_are_spread_over_all_workers_and_each_stays_with_one() {
        let (port, group) = bind_group(0, 4, 0).unwrap();
        let clients: Vec<_> =
            (0..64).map(|_| std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        for client in clients.iter().chain(&clients) {
            client.send_to(b"x", ("127.0.0.1", port)).unwrap();
        }
        let mut batch = ReceiveBatch::new().unwrap();
        let mut seen = HashSet::new();
        let mut total = 0;
        for sockets in &group {
            let mut here = HashSet::new();
            while sockets.v4.receive(&mut batch).unwrap() > 0 {
                total += batch.len();
                here.extend(batch.datagrams().map(|got| got.endpoint.remote));
            }
            assert!(!here.is_empty());
            assert!(seen.is_disjoint(&here));
            seen.extend(here);
        }
        assert_eq!((seen.len(), total), (64, 128));
    }

    #[test]
    fn a_socket_is_rebuilt_from_its_descriptor() {
        let (a, b) = (single(), single());
        let (port, remote) = (b.v4.port(), loopback(&b.v4));
        let b = UdpSocket::from_fd(b.v4.into_fd()).unwrap();
        assert_eq!((b.port(), b.family()), (port, Family::V4));
        send(&a.v4, &[(b"x", &Endpoint::configured(remote))], 0);
        assert!(receive(&b)[0].1.local.is_some());
    }

    #[test]
    fn descriptors_that_are_no_bound_udp_sockets_are_refused() {
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        let tcp: OwnedFd = std::net::TcpListener::bind("127.0.0.1:0").unwrap().into();
        let unbound = socket::udp(Family::V4).unwrap();
        for fd in [file, tcp, unbound] {
            assert!(matches!(UdpSocket::from_fd(fd), Err(UdpError::NotUdp)));
        }
    }

    /// Two namespaces joined by a veth pair: `fd00::1/64` and `10.8.0.1/24` here, 2 there.
    fn pair(number: u32) -> (NetNs, NetNs, String) {
        let (near, far) = (NetNs::new().unwrap(), NetNs::new().unwrap());
        let name = format!("tg{}u{number}", std::process::id());
        near.run(|| {
            let path = far.path();
            ip(&format!("link add {name} type veth peer name {name} netns {path}"));
        });
        for (ns, host) in [(&near, 1), (&far, 2)] {
            ns.run(|| {
                ip(&format!("addr add 10.8.0.{host}/24 dev {name}"));
                ip(&format!("addr add fd00::{host}/64 dev {name} nodad"));
                ip(&format!("addr add fe80::{host}/64 dev {name} nodad"));
                ip(&format!("link set {name} up"));
            });
        }
        (near, far, name)
    }

    #[test]
    fn link_local_replies_find_their_link() {
        require_root!();
        let (near, far, name) = pair(0);
        let server = near.run(single);
        let client = far.run(single);
        let scope = far.run(|| crate::sys::link::index(&name).unwrap());
        let port = server.v4.port();
        let dialled = std::net::SocketAddrV6::new("fe80::1".parse().unwrap(), port, 0, scope);
        let (server, client) = (server.v6.unwrap(), client.v6.unwrap());
        let sent = send(&client, &[(b"hello", &Endpoint::configured(dialled.into()))], 0);
        assert_eq!(sent.sent, 1, "{sent:?}");
        let (_, endpoint, _) = receive(&server).remove(0);
        assert_eq!(endpoint.local.unwrap().addr, IpAddr::V6(*dialled.ip()));
        let sent = send(&server, &[(b"reply", &endpoint)], 0);
        assert_eq!((sent.sent, sent.stale_sources), (1, 0), "{sent:?}");
        assert_eq!(receive(&client)[0].1.remote, SocketAddr::V6(dialled));
    }

    #[test]
    fn ipv6_datagrams_beyond_the_link_are_cut_up_by_this_host() {
        require_root!();
        let (near, far, name) = pair(1);
        near.run(|| ip(&format!("link set {name} mtu 1280")));
        let (here, there) = (near.run(single).v6.unwrap(), far.run(single).v6.unwrap());
        let endpoint =
            Endpoint::configured(SocketAddr::new("fd00::2".parse().unwrap(), there.port()));
        let sent = send(&here, &[(&[1; 1452], &endpoint)], 0);
        assert_eq!(sent.sent, 1, "{sent:?}");
        assert_eq!(receive(&there)[0].0, [1; 1452]);
    }

    /// `10.8.1.1/24`, `fd01::1/64` and, beyond a router whose second link carries 1280 bytes only,
    /// `10.8.2.2/24`, `fd02::2/64`.
    fn narrow_path(number: u32) -> [NetNs; 3] {
        let [near, router, far] = std::array::from_fn(|_| NetNs::new().unwrap());
        let name = |link| format!("tg{}n{number}{link}", std::process::id());
        let (left, right) = (name('l'), name('r'));
        for (name, end) in [(&left, &near), (&right, &far)] {
            let path = end.path();
            router.run(|| ip(&format!("link add {name} type veth peer name {name} netns {path}")));
        }
        let set_up = |ns: &NetNs, name: &str, net: u32, host: u32, mtu: u32| {
            ns.run(|| {
                ip(&format!("addr add 10.8.{net}.{host}/24 dev {name}"));
                ip(&format!("addr add fd0{net}::{host}/64 dev {name} nodad"));
                ip(&format!("link set {name} mtu {mtu} up"));
            });
        };
        set_up(&near, &left, 1, 1, 1500);
        set_up(&router, &left, 1, 2, 1500);
        set_up(&router, &right, 2, 1, 1280);
        set_up(&far, &right, 2, 2, 1280);
        router.run(|| {
            for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/{switch}"), "1").unwrap();
            }
        });
        for (ns, net, router) in [(&near, 2, 2), (&far, 1, 1)] {
            let own = 3 - net;
            ns.run(|| {
                ip(&format!("route add 10.8.{net}.0/24 via 10.8.{own}.{router}"));
                ip(&format!("route add fd0{net}::/64 via fd0{own}::{router}"));
            });
        }
        [near, router, far]
    }

    #[test]
    fn a_narrow_path_loses_no_ipv4_datagram_and_is_not_remembered() {
        require_root!();
        let [near, _router, far] = narrow_path(0);
        let (here, there) = (near.run(single), far.run(single));
        let endpoint =
            Endpoint::configured(SocketAddr::new("10.8.2.2".parse().unwrap(), there.v4.port()));
        for i in 0..3 {
            // As DF is clear, the router cuts it up and has nothing to complain about.
            assert_eq!(send(&here.v4, &[(&[i; 1452], &endpoint)], 0).sent, 1);
            assert_eq!(receive(&there.v4)[0].0, [i; 1452]);
        }
    }

    #[test]
    fn a_narrow_path_costs_ipv6_only_what_came_before_its_message() {
        require_root!();
        let [near, _router, far] = narrow_path(1);
        let (here, there) = (near.run(single).v6.unwrap(), far.run(single).v6.unwrap());
        let remote = SocketAddr::new("fd02::2".parse().unwrap(), there.port());
        let endpoint = Endpoint::configured(remote);
        let mut batch = ReceiveBatch::new().unwrap();
        let mut lost = 0;
        loop {
            assert_eq!(send(&here, &[(&[1; 1452], &endpoint)], 0).sent, 1);
            let mut fds = [PollFd::new(&there, PollFlags::IN)];
            if poll(&mut fds, Duration::from_millis(200)).unwrap() == 1 {
                break;
            }
            lost += 1;
            assert!(lost < 20, "the message makes this host cut datagrams up");
        }
        there.receive(&mut batch).unwrap();
        assert_eq!(batch.datagrams().next().unwrap().bytes, [1; 1452]);
    }

    #[test]
    fn ipv6_runs_beyond_the_link_are_cut_up_by_this_host_and_shorter_ones_still_go() {
        require_root!();
        let (near, far, name) = pair(3);
        near.run(|| ip(&format!("link set {name} mtu 1280")));
        let (here, there) = (near.run(single).v6.unwrap(), far.run(single).v6.unwrap());
        let endpoint =
            Endpoint::configured(SocketAddr::new("fd00::2".parse().unwrap(), there.port()));
        for (len, run_lens) in [(1452, vec![1; 44]), (1200, vec![44])] {
            let payloads = numbered([len; 44]);
            let datagrams = all_to(&endpoint, &payloads);
            for _ in 0..2 {
                let sent = send(&here, &datagrams, 0);
                assert_eq!((sent.sent, sent.failed), (44, 0), "{sent:?}");
                let mut got = Vec::new();
                while got.len() < 44 {
                    got.extend(payloads_of(receive(&there)));
                }
                assert!(got == payloads);
            }
            let datagrams: Vec<_> = datagrams
                .iter()
                .map(|&(bytes, endpoint)| Outgoing { bytes, endpoint, tos: 0 })
                .collect();
            assert_eq!(here.runs_of(&datagrams)[..], run_lens, "{len} bytes");
        }
    }

    #[test]
    fn a_run_that_meets_a_narrow_path_arrives_whole() {
        require_root!();
        let [near, _router, far] = narrow_path(2);
        let (here, there) = (near.run(single), far.run(single));
        let payloads = numbered([1452; 44]);
        // As DF is clear, the router cuts each up.
        let remote = SocketAddr::new("10.8.2.2".parse().unwrap(), there.v4.port());
        let endpoint = Endpoint::configured(remote);
        assert_eq!(send(&here.v4, &all_to(&endpoint, &payloads), 0).sent, 44);
        let all: BTreeSet<_> = payloads.iter().cloned().collect();
        let mut got = BTreeSet::new();
        while got.len() < 44 {
            got.extend(payloads_of(receive(&there.v4)));
        }
        assert!(got == all);

        // Here the router complains, and from then on this host does it.
        let (here, there) = (here.v6.unwrap(), there.v6.unwrap());
        let remote = SocketAddr::new("fd02::2".parse().unwrap(), there.port());
        let endpoint = Endpoint::configured(remote);
        for lost in 0.. {
            assert!(lost < 20, "the message makes this host cut datagrams up");
            assert_eq!(send(&here, &all_to(&endpoint, &payloads), 0).sent, 44);
            let mut fds = [PollFd::new(&there, PollFlags::IN)];
            if poll(&mut fds, Duration::from_millis(200)).unwrap() == 1 {
                break;
            }
        }
        let mut got = BTreeSet::new();
        while got.len() < 44 {
            got.extend(payloads_of(receive(&there)));
        }
        assert!(got == all);
    }

    #[test]
    fn ipv4_datagrams_beyond_the_link_are_fragmented() {
        require_root!();
        let (near, far, name) = pair(2);
        near.run(|| ip(&format!("link set {name} mtu 1280")));
        let (here, there) = (near.run(single).v4, far.run(single).v4);
        let remote = SocketAddr::new("10.8.0.2".parse().unwrap(), there.port());
        let endpoint = Endpoint::configured(remote);
        let sent = send(&here, &[(&[1; 1452], &endpoint), (&[2; 1252], &endpoint)], 0);
        assert_eq!((sent.sent, sent.failed), (2, 0));
        let mut batch = ReceiveBatch::new().unwrap();
        let mut lens = Vec::new();
        while lens.len() < 2 {
            let mut fds = [PollFd::new(&there, PollFlags::IN)];
            assert_eq!(poll(&mut fds, Duration::from_secs(10)).unwrap(), 1);
            there.receive(&mut batch).unwrap();
            lens.extend(batch.datagrams().map(|datagram| datagram.bytes.len()));
        }
        assert_eq!(lens, [1452, 1252]);
    }

    #[test]
    fn a_mark_is_set_on_the_group() {
        require_root!();
        in_new_netns(|| {
            let (_, group) = bind_group(0, 2, 0xcafe).unwrap();
            for socket in group.iter().flat_map(UdpSockets::iter) {
                assert_eq!(socket::mark(socket).unwrap(), 0xcafe);
                socket.set_fwmark(0).unwrap();
                assert_eq!(socket::mark(socket).unwrap(), 0);
            }
        });
    }

    #[test]
    fn buffers_go_beyond_the_limit_of_the_host() {
        require_root!();
        assert!(socket::buffers(&single().v4).unwrap() >= (BUFFER_LEN, BUFFER_LEN));
    }

    #[test]
    fn a_host_without_ipv6_addresses_still_has_a_group() {
        require_root!();
        in_new_netns(|| {
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
            let (port, group) = bind_group(0, 1, 0).unwrap();
            assert_eq!(group[0].v4.port(), port);
        });
    }
}
