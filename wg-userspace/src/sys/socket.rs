//! UDP sockets and their options, as far as `std` and `rustix` have none of them.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use libc::c_int;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with, sockopt};

/// IP version of a socket. An IPv6 socket never speaks IPv4 here (`IPV6_V6ONLY`), so addresses of
/// the form `::ffff:a.b.c.d` never appear.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Of this address.
    pub fn of(addr: &SocketAddr) -> Self {
        if addr.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// Makes a UDP socket that does not block.
///
/// # Errors
/// `EAFNOSUPPORT` if the host does not have this family.
pub fn udp(family: Family) -> io::Result<OwnedFd> {
    let domain = match family {
        Family::V4 => AddressFamily::INET,
        Family::V6 => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(domain, SocketType::DGRAM, flags, Some(ipproto::UDP))?;
    if family == Family::V6 {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    Ok(socket)
}

/// Binds to `port` on every address of the socket's family.
///
/// # Errors
/// `AddrInUse`, or `PermissionDenied` for a low port.
pub fn bind_any(socket: impl AsFd, family: Family, port: u16) -> io::Result<()> {
    let addr: SocketAddr = match family {
        Family::V4 => (Ipv4Addr::UNSPECIFIED, port).into(),
        Family::V6 => (Ipv6Addr::UNSPECIFIED, port).into(),
    };
    Ok(rustix::net::bind(socket, &addr)?)
}

/// The port to which a UDP socket is bound, and its family.
///
/// # Errors
/// `InvalidInput` if it is no UDP socket, or an IPv6 socket that also speaks IPv4.
pub fn udp_local(socket: impl AsFd) -> io::Result<(Family, u16)> {
    let is_udp = sockopt::socket_type(&socket)? == SocketType::DGRAM
        && sockopt::socket_protocol(&socket)? == Some(ipproto::UDP);
    match SocketAddr::try_from(rustix::net::getsockname(&socket)?) {
        Ok(SocketAddr::V4(addr)) if is_udp => Ok((Family::V4, addr.port())),
        Ok(SocketAddr::V6(addr)) if is_udp && sockopt::ipv6_v6only(&socket)? => {
            Ok((Family::V6, addr.port()))
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a UDP socket of one family")),
    }
}

/// Makes operations on this descriptor return instead of waiting.
///
/// # Errors
/// The kernel's; there are none for sockets and TUN queues.
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::io::ioctl_fionbio(fd, true)?)
}

/// Lets further sockets of the same effective user bind to this socket's port. May be set after
/// binding.
///
/// # Errors
/// The kernel's; there are none for UDP sockets.
pub fn set_reuse_port(socket: impl AsFd) -> io::Result<()> {
    Ok(sockopt::set_socket_reuseport(socket, true)?)
}

/// Asks for receive and send buffers of `len` bytes (the kernel doubles it for its bookkeeping):
/// beyond the host's limit with `CAP_NET_ADMIN`, up to it without.
///
/// # Errors
/// The kernel's; there are none for UDP sockets.
pub fn set_buffers(socket: impl AsFd, len: usize) -> io::Result<()> {
    if sockopt::set_socket_recv_buffer_size_force(&socket, len).is_err() {
        sockopt::set_socket_recv_buffer_size(&socket, len)?;
    }
    if sockopt::set_socket_send_buffer_size_force(&socket, len).is_err() {
        sockopt::set_socket_send_buffer_size(&socket, len)?;
    }
    Ok(())
}

/// Makes what is received come with the address dialled, the interface and the TOS byte, which
/// [`super::mmsg::ReceiveBatch`] reads.
///
/// # Errors
/// The kernel's; there are none for sockets of this family.
pub fn set_receive_details(socket: impl AsFd, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => {
            set_int(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
            set_int(&socket, libc::IPPROTO_IP, libc::IP_RECVTOS, 1)
        }
        Family::V6 => {
            set_int(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
            set_int(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)
        }
    }
}

/// Lets several datagrams of one sender be received as one, with the length of each, which
/// [`super::mmsg::ReceiveBatch`] reads.
///
/// # Errors
/// The kernel's, if it is older than 5.0.
pub fn set_gro(socket: impl AsFd) -> io::Result<()> {
    set_int(socket, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// Whether several datagrams may be sent as one message, with the length of each. A kernel that does not
/// know that would send them as one datagram.
pub fn can_segment(socket: impl AsFd) -> bool {
    get_int(socket, libc::SOL_UDP, libc::UDP_SEGMENT).is_ok()
}

/// Datagrams that came for this socket and were dropped before it: for want of room, or because their
/// checksum was wrong. Wraps around.
///
/// # Errors
/// The kernel's, if it is older than 4.12.
pub fn drops(socket: impl AsFd) -> io::Result<u32> {
    /// `SK_MEMINFO_DROPS` and `SK_MEMINFO_VARS` of `linux/sock_diag.h`.
    const DROPS: usize = 8;
    const VARS: usize = 9;
    let mut values = [0_u32; VARS];
    let mut len = size_of_val(&values) as libc::socklen_t;
    // SAFETY: the descriptor is open while `socket` is borrowed; the kernel writes at most `len`
    // bytes to `values`, whose size that is, and any bytes are integers.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(values[DROPS]) } else { Err(io::Error::last_os_error()) }
}

/// What a socket makes of ICMP messages that say a datagram was too big. See `udp` for the choice.
///
/// # Errors
/// The kernel's; there are none for sockets of this family.
pub fn set_path_mtu_rules(socket: impl AsFd, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => {
            let rule = libc::IP_PMTUDISC_OMIT;
            set_int(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, rule)
        }
        Family::V6 => {
            let rule = libc::IPV6_PMTUDISC_DONT;
            set_int(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, rule)
        }
    }
}

/// The mark that routing rules see on what this socket sends; 0 is none.
///
/// # Errors
/// `PermissionDenied` without `CAP_NET_ADMIN` or `CAP_NET_RAW`.
pub fn set_mark(socket: impl AsFd, mark: u32) -> io::Result<()> {
    set_int(socket, libc::SOL_SOCKET, libc::SO_MARK, mark as c_int)
}

/// The socket's mark.
///
/// # Errors
/// The kernel's; there are none for sockets.
pub fn mark(socket: impl AsFd) -> io::Result<u32> {
    get_int(socket, libc::SOL_SOCKET, libc::SO_MARK).map(|mark| mark as u32)
}

/// Bytes of the receive and the send buffer, bookkeeping included.
///
/// # Errors
/// The kernel's; there are none for sockets.
pub fn buffers(socket: impl AsFd) -> io::Result<(usize, usize)> {
    Ok((sockopt::socket_recv_buffer_size(&socket)?, sockopt::socket_send_buffer_size(&socket)?))
}

fn get_int(socket: impl AsFd, level: c_int, name: c_int) -> io::Result<c_int> {
    let mut value: c_int = 0;
    let mut len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open while `socket` is borrowed; the kernel writes at most `len`
    // bytes to `value`, whose size that is, and any bytes are an `int`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Has what is sent be cut into datagrams of `len` bytes.
#[cfg(test)]
pub(crate) fn set_segment_len(socket: impl AsFd, len: u16) -> io::Result<()> {
    set_int(socket, libc::SOL_UDP, libc::UDP_SEGMENT, len.into())
}

fn set_int(socket: impl AsFd, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open while `socket` is borrowed, and the option's value is an
    // `int` that outlives the call and whose size is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
