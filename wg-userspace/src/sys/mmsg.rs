//! Many datagrams with one call: `recvmmsg` and `sendmmsg`, with the control messages that carry
//! the address dialled and the TOS byte.

use std::cell::UnsafeCell;
use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use arrayvec::ArrayVec;
use libc::{c_int, cmsghdr, in_pktinfo, in6_pktinfo, iovec, mmsghdr, sockaddr_in, sockaddr_in6};
use wg_common::endpoint::{Endpoint, LocalSource};

use super::memory::Memory;

/// Datagrams that one call receives or sends at most.
pub const BATCH_MAX: usize = 64;

/// Bytes of a receive buffer: no UDP datagram is longer, so none is ever cut off.
const BUFFER_LEN: usize = 65_536;
/// Bytes before the datagram in its buffer. With the 16 bytes of a transport header they put the
/// sealed packet on a multiple of 64, which the AEAD likes.
const HEADROOM: usize = 48;
/// Distance of two buffers. A power of two would put the beginnings of all buffers, which is all
/// that most datagrams touch, into the same few sets of the caches; 25 lines more spread them.
const STRIDE: usize = HEADROOM + 16 + BUFFER_LEN + 25 * 64;
const _: () = assert!(STRIDE.is_multiple_of(64) && HEADROOM + BUFFER_LEN <= STRIDE);

/// Room for the control messages of one datagram. The two we ask for take 64 bytes in IPv6.
#[repr(C, align(8))]
struct Control([u8; 128]);
// `cmsghdr` is read and written in place.
const _: () = assert!(align_of::<Control>() >= align_of::<cmsghdr>());

/// Room for a socket address of either family.
#[derive(Clone, Copy)]
#[repr(C)]
union Name {
    any: libc::sa_family_t,
    v4: sockaddr_in,
    v6: sockaddr_in6,
}
const _: () = assert!(offset_of!(sockaddr_in, sin_family) == 0);
const _: () = assert!(offset_of!(sockaddr_in6, sin6_family) == 0);

/// What a `mmsghdr` points to.
struct Slot {
    name: Name,
    iovec: iovec,
    control: Control,
}

/// A datagram in a [`ReceiveBatch`].
#[derive(Debug)]
pub struct Datagram<'a> {
    /// The payload, in the batch's buffer: it may be opened in place. Byte 16, where the sealed
    /// packet of a transport message begins, lies on a multiple of 64.
    pub bytes: &'a mut [u8],
    /// Where it came from, and the address of ours that was dialled.
    pub endpoint: Endpoint,
    /// The outer header's TOS or traffic class: DSCP and ECN.
    pub tos: u8,
    /// Whether the datagram was longer than the buffer, which only an IPv6 jumbogram can be.
    pub truncated: bool,
}

/// Buffers for [`BATCH_MAX`] datagrams, allocated once and used for batch after batch.
///
/// They are 64 KiB each, of which a page costs memory only once a datagram has reached it.
pub struct ReceiveBatch {
    /// Points into `slots` and `buffers`, which live and stay where they are as long as this does.
    headers: Vec<UnsafeCell<mmsghdr>>,
    slots: Vec<UnsafeCell<Slot>>,
    buffers: Memory,
    received: usize,
}

// SAFETY: the raw pointers in `headers` and `slots` point only to heap memory and a mapping that
// this value owns, and neither belongs to a thread.
unsafe impl Send for ReceiveBatch {}

impl ReceiveBatch {
    /// Reserves the buffers.
    ///
    /// # Errors
    /// When address space is exhausted.
    pub fn new() -> io::Result<Self> {
        let buffers = Memory::private(STRIDE * BATCH_MAX)?;
        let slots: Vec<_> = (0..BATCH_MAX)
            .map(|i| {
                UnsafeCell::new(Slot {
                    name: Name { any: libc::AF_UNSPEC as libc::sa_family_t },
                    iovec: iovec {
                        // In bounds: slot `i` has the `STRIDE` bytes from `i * STRIDE` on.
                        iov_base: buffers
                            .base()
                            .as_ptr()
                            .wrapping_add(i * STRIDE + HEADROOM)
                            .cast(),
                        iov_len: BUFFER_LEN,
                    },
                    control: Control([0; _]),
                })
            })
            .collect();
        let headers = slots.iter().map(|slot| UnsafeCell::new(empty_header(slot))).collect();
        Ok(Self { headers, slots, buffers, received: 0 })
    }

    /// Replaces the batch's datagrams by those that wait in `socket`, up to [`BATCH_MAX`]; gives
    /// their number, which is 0 if none waits. Does not block.
    ///
    /// # Errors
    /// The socket's. The batch is empty then.
    pub fn receive(&mut self, socket: impl AsFd) -> io::Result<usize> {
        // What the last call used bears its lengths now.
        for (header, slot) in self.headers[..self.received].iter().zip(&self.slots) {
            // SAFETY: nobody else refers to the header: `self` is borrowed mutably, and no call
            // of the kernel is under way.
            unsafe { *header.get() = empty_header(slot) };
        }
        self.received = 0;
        let received = loop {
            // SAFETY: `headers` is an array of `BATCH_MAX` headers (an `UnsafeCell<T>` lies in
            // memory as a `T`). Each points to its own slot's name and control room and to its own
            // buffer, with their sizes; they outlive the call, and nothing refers to them while
            // `self` is borrowed mutably.
            let result = unsafe {
                libc::recvmmsg(
                    socket.as_fd().as_raw_fd(),
                    UnsafeCell::raw_get(self.headers.as_ptr()),
                    BATCH_MAX as libc::c_uint,
                    libc::MSG_DONTWAIT as _,
                    ptr::null_mut(),
                )
            };
            if let Ok(count) = usize::try_from(result) {
                break count;
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => break 0,
                _ => return Err(error),
            }
        };
        assert!(received <= BATCH_MAX, "the kernel was offered this many");
        self.received = received;
        Ok(received)
    }

    /// Number of datagrams in the batch.
    pub fn len(&self) -> usize {
        self.received
    }

    /// Whether the batch has no datagrams.
    pub fn is_empty(&self) -> bool {
        self.received == 0
    }

    /// The datagrams, in order of arrival. All may be held at the same time.
    pub fn datagrams(&mut self) -> impl ExactSizeIterator<Item = Datagram<'_>> {
        let buffers = self.buffers.base();
        let used = self.headers[..self.received].iter().zip(&self.slots);
        used.enumerate().map(move |(i, (header, slot))| {
            // SAFETY: `self` is borrowed mutably for as long as the iterator lives, so that no
            // call of the kernel writes there. Only these shared references are made.
            let (header, slot) = unsafe { (&*header.get(), &*slot.get()) };
            let len = (header.msg_len as usize).min(BUFFER_LEN);
            // SAFETY: inside the mapping, see `STRIDE`; zeroed or written by the kernel. Slots do
            // not overlap and each is visited once, so this is the only reference to these bytes
            // for as long as `self` is borrowed.
            let bytes = unsafe {
                let start = buffers.add(i * STRIDE + HEADROOM);
                std::slice::from_raw_parts_mut(start.as_ptr(), len)
            };
            let details = read_details(&header.msg_hdr);
            Datagram {
                bytes,
                endpoint: Endpoint { remote: read_name(&slot.name), local: details.local },
                tos: details.tos,
                truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            }
        })
    }
}

impl std::fmt::Debug for ReceiveBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReceiveBatch").field("received", &self.received).finish_non_exhaustive()
    }
}

/// A header that offers `slot` to the kernel.
fn empty_header(slot: &UnsafeCell<Slot>) -> mmsghdr {
    let slot = slot.get();
    // SAFETY: all zeros is a value of this C struct of integers and pointers.
    let mut header: mmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    let message = &mut header.msg_hdr;
    // SAFETY: these only compute the addresses of fields of the slot, which is there.
    unsafe {
        message.msg_name = (&raw mut (*slot).name).cast();
        message.msg_iov = &raw mut (*slot).iovec;
        message.msg_control = (&raw mut (*slot).control).cast();
    }
    message.msg_namelen = size_of::<Name>() as libc::socklen_t;
    message.msg_iovlen = 1;
    message.msg_controllen = size_of::<Control>() as _;
    header
}

/// Reads the address that the kernel put into `name`.
fn read_name(name: &Name) -> SocketAddr {
    // SAFETY: the name was zeroed or written by the kernel, so that all its bytes are initialised;
    // any bytes are a value of each variant. The family says which one is meant.
    unsafe {
        match c_int::from(name.any) {
            libc::AF_INET => {
                let ip = Ipv4Addr::from(name.v4.sin_addr.s_addr.to_ne_bytes());
                SocketAddrV4::new(ip, u16::from_be(name.v4.sin_port)).into()
            }
            libc::AF_INET6 => {
                let ip = Ipv6Addr::from(name.v6.sin6_addr.s6_addr);
                // The flow label is no part of who the peer is.
                SocketAddrV6::new(ip, u16::from_be(name.v6.sin6_port), 0, name.v6.sin6_scope_id)
                    .into()
            }
            // Not from a UDP socket. Nothing can be sent to it, which suits an unknown sender.
            _ => SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0).into(),
        }
    }
}

#[derive(Default)]
struct Details {
    local: Option<LocalSource>,
    tos: u8,
}

/// Reads the control messages of a datagram just received.
fn read_details(message: &libc::msghdr) -> Details {
    let mut details = Details::default();
    // SAFETY: `msg_control` points to the slot's control room, which `datagrams` keeps from being
    // written, and `msg_controllen` is the part of it that the kernel filled with whole messages.
    // The macros stay within. Values are read by `read_unaligned` up to the kernel's size for them.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(message);
        while let Some(header) = next.as_ref() {
            let data = libc::CMSG_DATA(header);
            match (header.cmsg_level, header.cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info: in_pktinfo = ptr::read_unaligned(data.cast());
                    // Not `ipi_addr`: for a broadcast, that is no address of ours.
                    let addr = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
                    details.local = local_source(addr.into(), info.ipi_ifindex as u32);
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info: in6_pktinfo = ptr::read_unaligned(data.cast());
                    let addr = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                    details.local = local_source(addr.into(), info.ipi6_ifindex as _);
                }
                (libc::IPPROTO_IP, libc::IP_TOS) => details.tos = *data,
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    details.tos = ptr::read_unaligned(data.cast::<c_int>()) as u8;
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(message, header);
        }
    }
    details
}

/// The source for replies, unless `addr` cannot be one.
fn local_source(addr: IpAddr, ifindex: u32) -> Option<LocalSource> {
    let usable = !addr.is_unspecified() && !addr.is_multicast();
    usable.then_some(LocalSource { addr, ifindex })
}

/// Sends `datagrams` (at most [`BATCH_MAX`]) in order with one call, from the local addresses that
/// their endpoints name, each with this TOS byte. Gives how many went out. Does not block.
///
/// Every remote address must be of the socket's family, and so must the local one.
///
/// # Errors
/// Why the first one did not go; if it went, a later one's error shows when it is sent again.
///
/// # Panics
/// If there are more than [`BATCH_MAX`].
pub fn send(socket: impl AsFd, datagrams: &[(&[u8], &Endpoint)], tos: u8) -> io::Result<usize> {
    assert!(datagrams.len() <= BATCH_MAX, "one call sends a batch");
    let mut slots = ArrayVec::<(Slot, usize), BATCH_MAX>::new();
    for (bytes, endpoint) in datagrams {
        let mut control = Control([0; _]);
        let control_len = write_control(&mut control, endpoint, tos);
        // The kernel only reads from where an `iovec` for sending points.
        let iovec = iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        slots.push((Slot { name: write_name(&endpoint.remote), iovec, control }, control_len));
    }
    let mut headers = ArrayVec::<mmsghdr, BATCH_MAX>::new();
    for ((slot, control_len), (_, endpoint)) in slots.iter_mut().zip(datagrams) {
        // SAFETY: all zeros is a value of this C struct of integers and pointers.
        let mut header: mmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        let message = &mut header.msg_hdr;
        message.msg_name = (&raw mut slot.name).cast();
        message.msg_namelen = match endpoint.remote {
            SocketAddr::V4(_) => size_of::<sockaddr_in>() as libc::socklen_t,
            SocketAddr::V6(_) => size_of::<sockaddr_in6>() as libc::socklen_t,
        };
        message.msg_iov = &raw mut slot.iovec;
        message.msg_iovlen = 1;
        if *control_len > 0 {
            message.msg_control = (&raw mut slot.control).cast();
            message.msg_controllen = *control_len as _;
        }
        headers.push(header);
    }
    loop {
        // SAFETY: `headers` holds `headers.len()` headers. Each points to a slot of its own, filled
        // above and neither moved nor touched since, and through it to a payload that `datagrams`
        // borrows; the lengths are theirs. The kernel writes only to the headers' `msg_len`.
        let result = unsafe {
            libc::sendmmsg(
                socket.as_fd().as_raw_fd(),
                headers.as_mut_ptr(),
                headers.len() as libc::c_uint,
                (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as _,
            )
        };
        if let Ok(sent) = usize::try_from(result) {
            return Ok(sent);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn write_name(addr: &SocketAddr) -> Name {
    match addr {
        SocketAddr::V4(addr) => Name {
            v4: sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: addr.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
                sin_zero: [0; 8],
            },
        },
        SocketAddr::V6(addr) => Name {
            v6: sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: addr.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: addr.ip().octets() },
                sin6_scope_id: addr.scope_id(),
            },
        },
    }
}

/// Writes the control messages for the source and for `tos`, unless they say nothing, and gives
/// the bytes used.
fn write_control(control: &mut Control, endpoint: &Endpoint, tos: u8) -> usize {
    let mut used = 0;
    let v6 = endpoint.remote.is_ipv6();
    match endpoint.local.map(|local| (local.addr, local.ifindex)) {
        Some((IpAddr::V4(addr), _)) if !v6 => {
            // The interface stays open: routes may have changed since the peer dialled.
            let info = in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(addr.octets()) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            used = append(control, used, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
        }
        Some((IpAddr::V6(addr), ifindex)) if v6 => {
            let info = in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: addr.octets() },
                // A link-local address means nothing without its link.
                ipi6_ifindex: if addr.is_unicast_link_local() { ifindex as _ } else { 0 },
            };
            used = append(control, used, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
        }
        _ => {}
    }
    if tos != 0 {
        let (level, kind) = if v6 {
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS)
        } else {
            (libc::IPPROTO_IP, libc::IP_TOS)
        };
        used = append(control, used, level, kind, c_int::from(tos));
    }
    used
}

/// Writes one control message at `used` and gives where the next one goes.
fn append<T: Copy>(
    control: &mut Control,
    used: usize,
    level: c_int,
    kind: c_int,
    value: T,
) -> usize {
    let size = size_of::<T>() as libc::c_uint;
    // SAFETY: these two only compute.
    let (len, space) = unsafe { (libc::CMSG_LEN(size), libc::CMSG_SPACE(size)) };
    let room = &mut control.0[used..used + space as usize];
    let header = cmsghdr { cmsg_len: len as _, cmsg_level: level, cmsg_type: kind };
    let data_at = len as usize - size_of::<T>();
    // SAFETY: `room` has `CMSG_SPACE` bytes (checked by the slice above): the header, and from
    // `data_at` on the value. Both are written unaligned.
    unsafe {
        ptr::write_unaligned(room.as_mut_ptr().cast(), header);
        ptr::write_unaligned(room.as_mut_ptr().add(data_at).cast(), value);
    }
    used + space as usize
}
