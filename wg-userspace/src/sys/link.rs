//! The few things edges need of a network interface before it is in use: its index, taking it up,
//! and keeping the kernel from giving it an IPv6 address. Everything else is `host`'s.

use std::io;
use std::os::fd::AsRawFd as _;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

/// The index of the interface `name` in the calling thread's network namespace.
///
/// # Errors
/// `ENODEV` if there is none of this name.
pub fn index(name: &str) -> io::Result<u32> {
    let any = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    Ok(rustix::net::netdevice::name_to_index(any, name)?)
}

/// Whether there is an interface with this index in the calling thread's network namespace; so it is taken to be if
/// that cannot be known.
pub fn is_there(ifindex: u32) -> bool {
    let any = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    let name = any.and_then(|any| rustix::net::netdevice::index_to_name(any, ifindex));
    !matches!(name, Err(rustix::io::Errno::NODEV))
}

/// Whether what comes and goes by the interface `name` has an Ethernet header, and another end than this host.
///
/// # Errors
/// `ENODEV` if there is none of this name.
pub fn has_ethernet_header(name: &str) -> io::Result<bool> {
    let any = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: integers, arrays and pointers, of which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the kernel reads and writes one `ifreq`, whose name ends with a zero.
    let result =
        unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCGIFHWADDR as _, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has written this field of the union.
    Ok(unsafe { request.ifr_ifru.ifru_hwaddr.sa_family } == libc::ARPHRD_ETHER)
}

/// Takes the interface up.
///
/// # Errors
/// `ENODEV`, or `PermissionDenied` without `CAP_NET_ADMIN`.
pub fn set_up(ifindex: u32) -> io::Result<()> {
    let up = libc::IFF_UP as u32;
    set_link(ifindex, up, up, &[])
}

/// Keeps the kernel from making IPv6 addresses for the interface. To be called before it goes up.
///
/// By netlink and not through `/proc/sys`, which is read-only in many containers. On a host
/// without IPv6 there is nothing to do.
///
/// # Errors
/// `ENODEV`, or `PermissionDenied` without `CAP_NET_ADMIN`.
pub fn disable_address_generation(ifindex: u32) -> io::Result<()> {
    const IFLA_AF_SPEC: u16 = 26;
    const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
    const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

    let mode = attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
    let spec = attribute(IFLA_AF_SPEC, &attribute(libc::AF_INET6 as u16, &mode));
    match set_link(ifindex, 0, 0, &spec) {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(()),
        result => result,
    }
}

/// Sends one `RTM_SETLINK` and waits for its acknowledgement.
fn set_link(ifindex: u32, flags: u32, change: u32, attributes: &[u8]) -> io::Result<()> {
    const REQUEST: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    const HEADER_LEN: usize = 16;
    const IFINFO_LEN: usize = 16;

    let len = HEADER_LEN + IFINFO_LEN + attributes.len();
    let mut message = Vec::with_capacity(len);
    // struct nlmsghdr: length, type, flags, sequence, port. All in host byte order.
    message.extend((len as u32).to_ne_bytes());
    message.extend(libc::RTM_SETLINK.to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    // struct ifinfomsg: family, padding, type, index, flags, change.
    message.extend([0; 4]);
    message.extend(ifindex.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(change.to_ne_bytes());
    message.extend(attributes);

    let family = AddressFamily::NETLINK;
    let netlink = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    sendto(&netlink, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;

    // The kernel answers within the call above: an error message whose first word is 0 or -errno,
    // followed by our request.
    let mut answer = [0; 4096];
    let (_, received) = recv(&netlink, &mut answer, RecvFlags::empty())?;
    let word = |at: usize| answer[at..].first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
    let kind = [answer[4], answer[5]];
    match (u16::from_ne_bytes(kind).into(), word(HEADER_LEN)) {
        (libc::NLMSG_ERROR, Some(0)) if received >= HEADER_LEN + 4 => Ok(()),
        (libc::NLMSG_ERROR, Some(errno)) if received >= HEADER_LEN + 4 => {
            Err(io::Error::from_raw_os_error(-errno))
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "unexpected netlink answer")),
    }
}

/// A netlink attribute: length and type, then the value, padded to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = 4 + value.len();
    let mut bytes = Vec::with_capacity(len.next_multiple_of(4));
    bytes.extend((len as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(len.next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_nest_and_are_padded() {
        let inner = attribute(8, &[1]);
        assert_eq!(inner[..2], 5_u16.to_ne_bytes());
        assert_eq!(inner[2..4], 8_u16.to_ne_bytes());
        assert_eq!(inner[4..], [1, 0, 0, 0]);
        assert_eq!(attribute(10, &inner).len(), 12);
    }

    #[test]
    fn the_link_to_oneself_is_no_ethernet() {
        assert!(is_there(index("lo").unwrap()));
        assert!(!has_ethernet_header("lo").unwrap());
    }

    #[test]
    fn an_interface_that_does_not_exist_is_an_error() {
        assert!(index("no-such-link").is_err());
        assert!(disable_address_generation(0x7fff_ffff).is_err());
        assert!(has_ethernet_header("no-such-link").is_err());
        assert!(!is_there(0x7fff_ffff));
    }
}
