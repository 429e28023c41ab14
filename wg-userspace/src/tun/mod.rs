//! The TUN device: IP packets to and from the kernel, through one queue per worker.
//!
//! Knows packets as bytes, and nothing of what is in them. What is read goes to
//! `datapath::outbound`, what is written comes from `datapath::inbound`. Addresses, routes, MTU and
//! taking the device up are `host`'s.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::segments::{Run, VnetHeader};
use crate::sys::errno::{EACCES, EBADFD, EBUSY, EEXIST, EFAULT, EINVAL, ENODEV, EPERM};
use crate::sys::netns::NetNs;
use crate::sys::{link, socket, tuntap};

/// Longest name of an interface, in bytes.
pub const NAME_LEN_MAX: usize = 15;

/// Most queues the kernel gives a TUN device (`MAX_TAP_QUEUES`).
pub const QUEUES_MAX: usize = 256;

/// Why a TUN device could not be opened or taken over.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// No interface can have this name.
    #[error(
        "the kernel takes no interface called {name:?}; take 1 to {NAME_LEN_MAX} of A-Z a-z 0-9 _ = + . -, but \
         not `all` or `default`"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// There is an interface of this name, ours or not.
    #[error(
        "interface {name} exists already; `ip link del {name}` removes it, or take another name"
    )]
    Exists {
        /// The name.
        name: String,
    },
    /// The process lacks the privilege.
    #[error(
        "making interface {name}: CAP_NET_ADMIN and access to /dev/net/tun are needed; run it as root (in a \
         container with `--cap-add NET_ADMIN --device /dev/net/tun`)"
    )]
    NotPermitted {
        /// The name.
        name: String,
    },
    /// The host has no TUN devices.
    #[error(
        "there is no /dev/net/tun; load the kernel module (`modprobe tun`), or give the container the device \
         (`--device /dev/net/tun`)"
    )]
    NoDriver,
    /// More queues than the kernel has for a device, or none.
    #[error("a TUN device has 1 to {QUEUES_MAX} queues, not {count}")]
    QueueCount {
        /// Queues asked for.
        count: usize,
    },
    /// A descriptor that was handed to us is no TUN queue as this room makes them.
    #[error(
        "descriptor is not a queue of a TUN device with virtio headers, or not of the same one"
    )]
    NotTun,
    /// Anything else.
    #[error("{what} {name}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The interface.
        name: String,
        /// The system's error.
        source: io::Error,
    },
}

/// Whether an error of [`TunQueue::read`] or [`TunQueue::write`] says that the device is gone, or
/// on its way out: nothing will come from it any more.
pub fn is_gone(error: &io::Error) -> bool {
    error.kind() == GONE
}

/// The kind as which the three faces of a vanished device come out of this room.
const GONE: io::ErrorKind = io::ErrorKind::NotConnected;

/// A TUN device and all its queues. It ends when they are closed.
#[derive(Debug)]
pub struct Tun {
    name: String,
    ifindex: u32,
    queues: Vec<TunQueue>,
}

impl Tun {
    /// Makes the device `name` with `queue_count` queues. It is down, has no addresses, and the
    /// kernel gives it none when it goes up (no link-local IPv6 address: a peer could not own it).
    ///
    /// A device that exists is refused, even one that would let us attach: its queues are someone's.
    ///
    /// # Errors
    /// See [`TunError`]. Nothing is left behind.
    pub fn open(name: &str, queue_count: usize) -> Result<Self, TunError> {
        check_name(name)?;
        if !(1..=QUEUES_MAX).contains(&queue_count) {
            return Err(TunError::QueueCount { count: queue_count });
        }
        let queues = (0..queue_count)
            .map(|i| tuntap::open_queue(name, i == 0).map(TunQueue))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| open_error(name, error))?;
        let io_error = |what| {
            let name = name.to_owned();
            move |source| TunError::Io { what, name, source }
        };
        let ifindex = link::index(name).map_err(io_error("finding the index of"))?;
        link::disable_address_generation(ifindex)
            .map_err(io_error("switching address generation off for"))?;
        Ok(Self { name: name.to_owned(), ifindex, queues })
    }

    /// Takes over the queues of a device from who made it (with [`Tun::open`]), in their order.
    ///
    /// # Errors
    /// [`TunError::NotTun`] unless all are queues of one device, which is still there.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Self, TunError> {
        let queues = fds.into_iter().map(TunQueue::from_fd).collect::<Result<Vec<_>, _>>()?;
        let names = queues.iter().map(TunQueue::device).collect::<io::Result<Vec<_>>>();
        let mut names = names.map_err(|_| TunError::NotTun)?;
        names.dedup();
        let [name] = names.try_into().map_err(|_| TunError::NotTun)?;
        let ifindex = link::index(&name).map_err(|_| TunError::NotTun)?;
        Ok(Self { name, ifindex, queues })
    }

    /// The interface's name when it was opened; an administrator may rename it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface's index, which stays as long as the device does.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// The queues in the kernel's order. Closing one moves the last one into its place.
    pub fn into_queues(self) -> Vec<TunQueue> {
        self.queues
    }
}

/// The rule of wg-quick(8), less the names that mean something else in `/proc/sys/net`.
fn check_name(name: &str) -> Result<(), TunError> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"_=+.-".contains(&c);
    let reserved = ["", ".", "..", "all", "default"].contains(&name);
    if name.len() <= NAME_LEN_MAX && name.bytes().all(allowed) && !reserved {
        Ok(())
    } else {
        Err(TunError::Name { name: name.to_owned() })
    }
}

fn open_error(name: &str, error: tuntap::OpenError) -> TunError {
    let name = name.to_owned();
    match error {
        tuntap::OpenError::Open(source) => match source.kind() {
            io::ErrorKind::NotFound => TunError::NoDriver,
            io::ErrorKind::PermissionDenied => TunError::NotPermitted { name },
            // ENODEV: the device node is there, its driver is not.
            _ if source.raw_os_error() == Some(ENODEV) => TunError::NoDriver,
            _ => TunError::Io { what: "opening /dev/net/tun for", name, source },
        },
        tuntap::OpenError::Attach(source) => match source.raw_os_error() {
            // EINVAL: it exists and is no TUN device, or not of our kind; the name is checked.
            Some(EBUSY | EEXIST | EINVAL) => TunError::Exists { name },
            Some(EPERM | EACCES) => TunError::NotPermitted { name },
            _ => TunError::Io { what: "making interface", name, source },
        },
    }
}

/// One queue of a TUN device, which does not block. Wait for it with `poll`; a device that is gone
/// shows as ready, and then by the error of [`TunQueue::read`].
#[derive(Debug)]
pub struct TunQueue(OwnedFd);

impl TunQueue {
    /// Takes over a queue from who made it (with [`Tun::open`]).
    ///
    /// # Errors
    /// [`TunError::NotTun`] for anything else.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TunError> {
        tuntap::queue_device(&fd)
            .and_then(|_| socket::set_nonblocking(&fd))
            .map_err(|_| TunError::NotTun)?;
        Ok(Self(fd))
    }

    /// The queue's descriptor, for who takes it over.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// A queue without a device, whose other end is a test: packets go as datagrams, each after a virtio
    /// header.
    #[cfg(test)]
    pub fn twin() -> io::Result<(Self, std::os::unix::net::UnixDatagram)> {
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        Ok((Self(ours.into()), theirs))
    }

    /// The present name of the queue's device.
    ///
    /// # Errors
    /// One for which [`is_gone`] holds.
    pub fn device(&self) -> io::Result<String> {
        tuntap::queue_device(&self.0).map_err(mark_gone)
    }

    /// The network namespace in which the queue's device is now.
    ///
    /// # Errors
    /// One for which [`is_gone`] holds, or the want of `CAP_NET_ADMIN` in that namespace.
    pub fn namespace(&self) -> io::Result<NetNs> {
        tuntap::queue_namespace(&self.0).map(NetNs::from).map_err(mark_gone)
    }

    /// Has a BPF program choose the queue of the device by which a packet leaves, in place of whatever
    /// chose it before. The device keeps the program.
    ///
    /// # Errors
    /// `EINVAL` if the kernel does not know of that, or `program` is no socket filter; one for which
    /// [`is_gone`] holds.
    pub fn set_steering(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        tuntap::set_steering(&self.0, program).map_err(mark_gone)
    }

    /// Reads one packet, or one that stands for several, into `packet`. Gives what is left to do on it,
    /// and its length; `None` if none waits.
    ///
    /// `packet` should have room for 64 KiB: the rest of a longer packet is lost, and what is left then
    /// says in its IP header that it was longer.
    ///
    /// # Errors
    /// `InvalidData` if there was one on which is to be done what nobody asked for: it is lost, others may
    /// wait. See [`is_gone`].
    pub fn read(&self, packet: &mut [u8]) -> io::Result<Option<(VnetHeader, usize)>> {
        loop {
            match tuntap::read_packet(&self.0, packet) {
                Ok((header, len)) => {
                    let header = VnetHeader::from_bytes(&header);
                    return Ok(Some((header.ok_or(io::ErrorKind::InvalidData)?, len)));
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(mark_gone(error)),
                },
            }
        }
    }

    /// Writes one whole IP packet, whose checksums must be complete.
    ///
    /// # Errors
    /// `EIO` while the device is down, `EINVAL` for what is no IP packet; see [`is_gone`].
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        write(|| tuntap::write_packet(&self.0, packet))
    }

    /// Writes the packets of a run at once.
    ///
    /// # Errors
    /// As [`write`](Self::write); `EINVAL` also for a run of UDP before Linux 6.2. None of the packets is
    /// written then.
    pub fn write_run(&self, run: &Run<'_>) -> io::Result<()> {
        let head = run.head();
        let parts = run.parts(&head);
        write(|| tuntap::write_parts(&self.0, &parts))
    }
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Does a write until no signal interrupts it.
fn write(once: impl Fn() -> io::Result<()>) -> io::Result<()> {
    loop {
        match once() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map_err(mark_gone),
        }
    }
}

/// EBADFD: the queue has lost its device. EFAULT: the device was removed while the call was under
/// way (our buffers are valid). ENODEV: it is being removed.
fn mark_gone(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(EBADFD | EFAULT | ENODEV) => GONE.into(),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    mod tcp;

    use std::net::UdpSocket;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use wg_common::headers::{Checksum, PROTOCOL_UDP, inner_packet};
    use wg_common::upper::upper;

    use super::*;
    use crate::require_root;
    use crate::segments::join::{Batch, PACKETS_MAX, Plan};
    use crate::segments::packets_for_tests::{TestPacket, TestUpper};
    use crate::segments::{Cut, finish_checksum};
    use crate::sys::netns::in_new_netns;
    use crate::sys::wait::{PollFd, PollFlags, poll};

    /// A name of at most 15 bytes with our pid in it.
    fn device_name(number: u32) -> String {
        format!("tg{}t{number}", std::process::id())
    }

    fn ip(arguments: &str) -> String {
        let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {arguments}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn wait(queue: &TunQueue) {
        let mut fds = [PollFd::new(queue, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Duration::from_secs(10)).unwrap(), 1);
    }

    #[test]
    fn impossible_names_are_refused_before_anything_is_opened() {
        let long = "x".repeat(16);
        for name in ["", ".", "..", "all", "default", "a/b", "tun%d", "a b", "a:1", "ü", &long] {
            assert!(matches!(Tun::open(name, 1), Err(TunError::Name { .. })), "{name:?}");
        }
        assert!(check_name(&"x".repeat(15)).is_ok());
        assert!(check_name("wg0.1_=+-").is_ok());
    }

    #[test]
    fn a_device_has_1_to_256_queues() {
        for count in [0, 257] {
            assert!(matches!(Tun::open("wg0", count), Err(TunError::QueueCount { .. })));
        }
    }

    #[test]
    fn packets_pass_both_ways() {
        require_root!();
        in_new_netns(|| {
            let name = device_name(0);
            let tun = Tun::open(&name, 1).unwrap();
            assert_eq!(tun.name(), name);
            assert_eq!(tun.ifindex(), link::index(&name).unwrap());
            ip(&format!("addr add 10.9.0.1/24 dev {name}"));
            ip(&format!("link set {name} up"));
            let queue = &tun.into_queues()[0];
            assert!(queue.read(&mut [0; 2048]).unwrap().is_none());

            let socket = UdpSocket::bind("10.9.0.1:5000").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            socket.send_to(b"out", "10.9.0.2:6000").unwrap();
            wait(queue);
            let mut packet = [0; 2048];
            let (header, len) = queue.read(&mut packet).unwrap().unwrap();
            assert_eq!(len, 20 + 8 + 3);
            finish_checksum(header.checksum.unwrap(), &mut packet[..len]).unwrap();
            assert_eq!(packet[0], 0x45);
            assert_eq!(packet[28..len], *b"out");

            // Sent back as its own reply: ends change places, which leaves all checksums right.
            let packet = &mut packet[..len];
            let (left, right) = packet[12..20].split_at_mut(4);
            left.swap_with_slice(right);
            let (left, right) = packet[20..24].split_at_mut(2);
            left.swap_with_slice(right);
            queue.write(packet).unwrap();
            let mut answer = [0; 16];
            let (len, from) = socket.recv_from(&mut answer).unwrap();
            assert_eq!((&answer[..len], from), (&b"out"[..], "10.9.0.2:6000".parse().unwrap()));
        });
    }

    /// What is read next, cut into packets and finished.
    fn read_packets(queue: &TunQueue) -> Vec<Vec<u8>> {
        wait(queue);
        let mut bytes = vec![0; 65_575];
        let (header, len) = queue.read(&mut bytes).unwrap().unwrap();
        let bytes = &mut bytes[..len];
        let Some(segments) = header.segments else {
            if let Some(checksum) = header.checksum {
                finish_checksum(checksum, bytes).unwrap();
            }
            return vec![bytes.to_vec()];
        };
        let cut = Cut::new(segments, header.checksum, bytes).unwrap();
        let segment = |index| {
            let mut segment = vec![0; cut.segment_len(index)];
            cut.write(bytes, index, &mut segment);
            segment
        };
        (0..cut.count()).map(segment).collect()
    }

    /// Whether the checksum behind the IP header is right.
    fn verifies(packet: &[u8]) -> bool {
        let (inner, behind) = (inner_packet(packet).unwrap(), upper(packet).unwrap());
        let rest = &packet[behind.offset..];
        let pseudo = Checksum::pseudo(inner.src, inner.dst, behind.protocol, rest.len() as u32);
        inner.len == packet.len() && pseudo.bytes(rest).finish() == 0
    }

    #[test]
    fn the_kernels_super_packets_of_udp_are_cut_into_right_packets() {
        require_root!();
        in_new_netns(|| {
            let name = device_name(7);
            let queue = &Tun::open(&name, 1).unwrap().into_queues()[0];
            ip(&format!("addr add 10.9.0.1/24 dev {name}"));
            ip(&format!("addr add fd09::1/64 dev {name} nodad"));
            ip(&format!("link set {name} up mtu 1420"));
            for (own, to) in [("10.9.0.1:0", "10.9.0.2:6000"), ("[fd09::1]:0", "[fd09::2]:6000")] {
                let sender = UdpSocket::bind(own).unwrap();
                socket::set_segment_len(&sender, 1000).unwrap();
                let payload: Vec<u8> = (0..40_500u32).map(|i| (i / 7) as u8).collect();
                sender.send_to(&payload, to).unwrap();
                let (mut got, mut most) = (Vec::new(), 0);
                while got.len() < payload.len() {
                    let packets = read_packets(queue);
                    most = most.max(packets.len());
                    for packet in packets {
                        assert!(packet.len() <= 1420);
                        let behind = upper(&packet).unwrap();
                        if behind.protocol == PROTOCOL_UDP {
                            assert!(verifies(&packet));
                            got.extend_from_slice(&packet[behind.offset + 8..]);
                        }
                    }
                }
                assert_eq!(got, payload);
                // From Linux 6.2 on.
                assert_eq!(most, 41, "the kernel did not cut it");
            }
        });
    }

    #[test]
    fn a_long_packet_is_cut_to_the_buffer() {
        require_root!();
        in_new_netns(|| {
            let name = device_name(6);
            let queue = &Tun::open(&name, 1).unwrap().into_queues()[0];
            ip(&format!("addr add 10.9.0.1/24 dev {name}"));
            ip(&format!("link set {name} up"));
            let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
            socket.send_to(&[0; 100], "10.9.0.2:6000").unwrap();
            wait(queue);
            assert_eq!(queue.read(&mut [0; 64]).unwrap().unwrap().1, 64);
        });
    }

    #[test]
    fn the_kernel_gives_no_link_local_address() {
        require_root!();
        in_new_netns(|| {
            let name = device_name(1);
            let tun = Tun::open(&name, 1).unwrap();
            ip(&format!("link set {name} up"));
            assert_eq!(ip(&format!("-6 addr show dev {name}")), "");
            drop(tun);
        });
    }

    #[test]
    fn a_device_that_exists_is_refused() {
        require_root!();
        in_new_netns(|| {
            let name = device_name(2);
            let first = Tun::open(&name, 2).unwrap();
            assert!(matches!(Tun::open(&name, 1), Err(TunError::Exists { .. })));
            assert!(matches!(Tun::open("lo", 1), Err(TunError::Exists { .. })));
            drop(first);
            // A process that another test is about to start may hold the descriptors until it runs.
            let waited = Instant::now();
            while let Err(error) = Tun::open(&name, 1) {
                assert!(matches!(error, TunError::Exists { .. }), "{error}");
                assert!(waited.elapsed() < Duration::from_secs(10), "{error}");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }

    #[test]
    fn a_device_is_rebuilt_from_its_descriptors() {
        require_root!();
        in_new_netns(|| {
            let name = device_name(3);
            let tun = Tun::open(&name, 3).unwrap();
            let ifindex = tun.ifindex();
            let fds: Vec<OwnedFd> = tun.into_queues().into_iter().map(TunQueue::into_fd).collect();
            let tun = Tun::from_fds(fds).unwrap();
            assert_eq!((tun.name(), tun.ifindex()), (name.as_str(), ifindex));
            assert_eq!(tun.into_queues().len(), 3);
        });
    }

    #[test]
    fn descriptors_that_are_no_queues_are_refused() {
        let socket: OwnedFd = UdpSocket::bind("127.0.0.1:0").unwrap().into();
        assert!(matches!(TunQueue::from_fd(socket), Err(TunError::NotTun)));
        assert!(matches!(Tun::from_fds(Vec::new()), Err(TunError::NotTun)));
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        assert!(matches!(TunQueue::from_fd(file), Err(TunError::NotTun)));
    }

    #[test]
    fn queues_of_a_deleted_device_say_that_it_is_gone() {
        require_root!();
        in_new_netns(|| {
            let name = device_name(4);
            let queues = Tun::open(&name, 2).unwrap().into_queues();
            ip(&format!("link set {name} up"));
            ip(&format!("link del {name}"));
            for queue in &queues {
                wait(queue);
                assert!(is_gone(&queue.read(&mut [0; 64]).unwrap_err()));
                assert!(is_gone(&queue.write(&[0x45; 64]).unwrap_err()));
                assert!(is_gone(&queue.device().unwrap_err()));
            }
        });
    }

    #[test]
    fn a_write_that_fails_does_not_look_like_a_device_that_is_gone() {
        require_root!();
        in_new_netns(|| {
            let name = device_name(5);
            let queue = &Tun::open(&name, 1).unwrap().into_queues()[0];
            let down = queue.write(&[0x45; 64]).unwrap_err();
            assert!(!is_gone(&down), "{down}");
            ip(&format!("link set {name} up"));
            for packet in [&[][..], &[0][..], &[0xff; 40][..]] {
                assert!(!is_gone(&queue.write(packet).unwrap_err()));
            }
        });
    }

    /// Writes packets that must be one run.
    fn write_joined(queue: &TunQueue, packets: &[TestPacket]) {
        let packets: Vec<_> = packets.iter().map(TestPacket::bytes).collect();
        let batch: Batch<'_> = packets.iter().map(Vec::as_slice).collect();
        let plan = Plan::of(&batch, true);
        let [run] = plan.runs().collect::<Vec<_>>().try_into().unwrap();
        queue.write_run(&run).unwrap();
    }

    #[test]
    fn a_run_of_udp_comes_to_a_socket_as_its_datagrams() {
        require_root!();
        in_new_netns(|| {
            let name = device_name(7);
            let queue = &Tun::open(&name, 1).unwrap().into_queues()[0];
            ip(&format!("addr add 10.9.0.1/24 dev {name}"));
            ip(&format!("addr add fd09::1/64 dev {name} nodad"));
            ip(&format!("link set {name} up"));
            for (src, dst) in [("10.9.0.2", "10.9.0.1"), ("fd09::2", "fd09::1")] {
                let socket = UdpSocket::bind((dst, 5002)).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                let mut packets: Vec<_> =
                    (0..PACKETS_MAX).map(|number| TestPacket::udp(src, dst, number, 333)).collect();
                packets[PACKETS_MAX - 1].payload.truncate(7);
                write_joined(queue, &packets);
                for packet in packets {
                    let mut datagram = [0; 1024];
                    let (len, from) = socket.recv_from(&mut datagram).unwrap();
                    assert_eq!(datagram[..len], packet.payload);
                    assert_eq!(from, (packet.src, packet.ports.0).into());
                }
            }
        });
    }

    /// Two devices between which the kernel forwards:
    ///
    /// ```text
    /// fd09::2, 10.9.0.2 ─ (written) near ─ kernel ─ far (read) ─ 10.8.0.2, fd08::2
    /// ```
    #[test]
    fn the_kernel_cuts_a_run_into_what_came_in() {
        require_root!();
        in_new_netns(|| {
            let names = [device_name(8), device_name(9)];
            let [near, far] =
                [0, 1].map(|at| Tun::open(&names[at], 1).unwrap().into_queues().remove(0));
            tuntap::switch_offloads_off(&far).unwrap();
            for (name, net) in names.iter().zip([9, 8]) {
                ip(&format!("addr add 10.{net}.0.1/24 dev {name}"));
                ip(&format!("addr add fd0{net}::1/64 dev {name} nodad"));
                ip(&format!("link set {name} up"));
            }
            for forwarding in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/{forwarding}"), "1").unwrap();
            }
            for (src, dst) in [("10.9.0.2", "10.8.0.2"), ("fd09::2", "fd08::2")] {
                for make in [TestPacket::tcp, TestPacket::udp] {
                    for (count, payload_len, last_len) in
                        [(44, 1401, 800), (2, 1, 1), (64, 536, 535)]
                    {
                        let mut packets: Vec<_> =
                            (0..count).map(|number| make(src, dst, number, payload_len)).collect();
                        packets[count - 1].payload.truncate(last_len);
                        set_flags(&mut packets[0], 0x80);
                        set_flags(&mut packets[count - 1], 0x08);
                        write_joined(&near, &packets);
                        for mut packet in packets {
                            packet.ttl -= 1;
                            assert_eq!(read_from(&far, &packet), packet.bytes());
                        }
                    }
                }
            }
        });
    }

    fn set_flags(packet: &mut TestPacket, more: u16) {
        if let TestUpper::Tcp { flags, .. } = &mut packet.upper {
            *flags |= more;
        }
    }

    /// The next packet that has the source of this one: the kernel sends some of its own.
    fn read_from(queue: &TunQueue, packet: &TestPacket) -> Vec<u8> {
        loop {
            wait(queue);
            let mut read = vec![0; 2048];
            let (header, len) = queue.read(&mut read).unwrap().unwrap();
            assert_eq!(header, VnetHeader::PLAIN);
            read.truncate(len);
            if inner_packet(&read).unwrap().src == packet.src {
                return read;
            }
        }
    }
}
