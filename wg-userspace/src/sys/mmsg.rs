//! Many datagrams with one call: `recvmmsg` and `sendmmsg`, with the control messages that carry
//! the address dialled, the TOS byte, and the length of the pieces where several datagrams cross the
//! kernel as one (`UDP_GRO`, `UDP_SEGMENT`).

use std::cell::UnsafeCell;
use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::{mem, ptr};

use arrayvec::ArrayVec;
use libc::{c_int, cmsghdr, in_pktinfo, in6_pktinfo, iovec, mmsghdr, sockaddr_in, sockaddr_in6};
use wg_common::endpoint::{Endpoint, LocalSource};

use super::memory::Memory;

/// Datagrams that [`send`] takes at most. A [`ReceiveBatch`] has as many buffers, and more datagrams
/// only where the kernel put several into one.
pub const BATCH_MAX: usize = 64;
/// Buffers that are offered to the kernel at a time. Each may come back with a whole run of datagrams:
/// a batch is to hold [`BATCH_MAX`] of those that come alone, but not as many runs.
const OFFERED: usize = 16;
const _: () = assert!(BATCH_MAX.is_multiple_of(OFFERED));
/// Datagrams of one buffer at most. The kernel joins 64, and lets local senders send runs of 128;
/// only a virtual machine may claim to have sent more, and then they are short.
const RUN_LEN_MAX: usize = 128;
/// Datagrams of one batch at most.
pub const RECEIVED_MAX: usize = BATCH_MAX - 1 + OFFERED * RUN_LEN_MAX;

/// Bytes of a receive buffer: no UDP datagram is longer, so none is ever cut off.
const BUFFER_LEN: usize = 65_536;
/// Bytes before the datagram in its buffer. With the 16 bytes of a transport header they put the
/// sealed packet on a multiple of 64, which the AEAD likes.
const HEADROOM: usize = 48;
/// Distance of two buffers. A power of two would put the beginnings of all buffers, which is all
/// that most datagrams touch, into the same few sets of the caches; 25 lines more spread them.
const STRIDE: usize = HEADROOM + 16 + BUFFER_LEN + 25 * 64;
const _: () = assert!(STRIDE.is_multiple_of(64) && HEADROOM + BUFFER_LEN <= STRIDE);

/// Room for the control messages of one message. The three there are take 88 bytes in IPv6.
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
    /// The payload, in the batch's buffer: it may be opened in place. Of the first datagram of a
    /// buffer, byte 16, where the sealed packet of a transport message begins, lies on a multiple of 64.
    pub bytes: &'a mut [u8],
    /// Where it came from, and the address of ours that was dialled.
    pub endpoint: Endpoint,
    /// The outer header's TOS or traffic class: DSCP and ECN.
    pub tos: u8,
    /// Datagrams that came with it as one, from this one on: 1 is the last, or one that came alone.
    pub run_len: usize,
    /// Whether this is no whole datagram: one longer than the buffer, which only an IPv6 jumbogram can
    /// be, or the rest of a run longer than any.
    pub truncated: bool,
}

/// Buffers for [`BATCH_MAX`] datagrams or runs of them, allocated once and used for batch after batch.
///
/// They are 64 KiB each, of which a page costs memory only once a datagram has reached it.
pub struct ReceiveBatch {
    /// Points into `slots` and `buffers`, which live and stay where they are as long as this does.
    headers: Vec<UnsafeCell<mmsghdr>>,
    slots: Vec<UnsafeCell<Slot>>,
    buffers: Memory,
    /// What is in the first buffers. Has room for all of them.
    filled: Vec<Filled>,
    datagram_count: usize,
    may_have_more: bool,
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
        let filled = Vec::with_capacity(BATCH_MAX);
        Ok(Self { headers, slots, buffers, filled, datagram_count: 0, may_have_more: false })
    }

    /// Replaces the batch's datagrams by those that wait in `socket`; gives their number, which is 0 if
    /// none waits. Stops at [`BATCH_MAX`]; runs may bring it up to [`RECEIVED_MAX`]. Does not block.
    ///
    /// # Errors
    /// The socket's. The batch is empty then.
    pub fn receive(&mut self, socket: impl AsFd) -> io::Result<usize> {
        // What the last calls used bears its lengths now.
        for (header, slot) in self.headers.iter().zip(&self.slots).take(self.filled.len()) {
            // SAFETY: nobody else refers to the header: `self` is borrowed mutably, and no call
            // of the kernel is under way.
            unsafe { *header.get() = empty_header(slot) };
        }
        self.filled.clear();
        self.datagram_count = 0;
        self.may_have_more = true;
        while self.datagram_count < BATCH_MAX {
            match self.fill(socket.as_fd()) {
                Ok(OFFERED) => {}
                Ok(_) => {
                    self.may_have_more = false;
                    break;
                }
                Err(error) if self.filled.is_empty() => {
                    self.may_have_more = false;
                    return Err(error);
                }
                // It concerned none of those that are here.
                Err(_) => break,
            }
        }
        Ok(self.datagram_count)
    }

    /// Fills up to [`OFFERED`] buffers with one call, and gives their number.
    fn fill(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let first = self.filled.len();
        let offered = &self.headers[first..first + OFFERED];
        let received = loop {
            // SAFETY: `offered` is an array of `OFFERED` headers (an `UnsafeCell<T>` lies in
            // memory as a `T`). Each points to its own slot's name and control room and to its own
            // buffer, with their sizes; they outlive the call, and nothing refers to them while
            // `self` is borrowed mutably.
            let result = unsafe {
                libc::recvmmsg(
                    socket.as_raw_fd(),
                    UnsafeCell::raw_get(offered.as_ptr()),
                    OFFERED as libc::c_uint,
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
        assert!(received <= OFFERED, "the kernel was offered this many");
        for (header, slot) in offered.iter().zip(&self.slots[first..]).take(received) {
            // SAFETY: `self` is borrowed mutably, and the call of the kernel is over: nobody writes
            // there. Only these shared references are made.
            let filled = unsafe { Filled::read(&*header.get(), &*slot.get()) };
            self.datagram_count += filled.count;
            self.filled.push(filled);
        }
        Ok(received)
    }

    /// Number of datagrams in the batch.
    pub fn len(&self) -> usize {
        self.datagram_count
    }

    /// Whether the batch has no datagrams.
    pub fn is_empty(&self) -> bool {
        self.datagram_count == 0
    }

    /// Whether there may be more in the socket than the batch has.
    pub fn may_have_more(&self) -> bool {
        self.may_have_more
    }

    /// Buffers that are in use: datagrams that came as one share one.
    pub fn buffer_count(&self) -> usize {
        self.filled.len()
    }

    /// The datagrams, in order of arrival. All may be held at the same time.
    pub fn datagrams(&mut self) -> impl Iterator<Item = Datagram<'_>> {
        let buffers = self.buffers.base();
        self.filled.iter().enumerate().flat_map(move |(i, filled)| {
            // SAFETY: inside the mapping, see `STRIDE`; zeroed or written by the kernel. Slots do
            // not overlap and each is visited once, so this is the only reference to these bytes
            // for as long as `self` is borrowed mutably, which also keeps the kernel away.
            let bytes = unsafe {
                let start = buffers.add(i * STRIDE + HEADROOM);
                std::slice::from_raw_parts_mut(start.as_ptr(), filled.len)
            };
            filled.cut(bytes)
        })
    }
}

impl std::fmt::Debug for ReceiveBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReceiveBatch").field("len", &self.datagram_count).finish_non_exhaustive()
    }
}

/// What the kernel put into a buffer: a datagram, or several with the same headers.
#[derive(Clone, Copy, Debug)]
struct Filled {
    endpoint: Endpoint,
    tos: u8,
    /// Bytes of all datagrams, at most [`BUFFER_LEN`].
    len: usize,
    /// Length of each but the last, which may be shorter; not 0.
    piece_len: usize,
    /// How many there are; not 0.
    count: usize,
    /// Whether bytes are missing behind the last one.
    truncated: bool,
}

impl Filled {
    /// Reads what a call of the kernel left in a header and in its slot.
    fn read(header: &mmsghdr, slot: &Slot) -> Self {
        let len = (header.msg_len as usize).min(BUFFER_LEN);
        let details = read_details(&header.msg_hdr);
        let piece_len = details.piece_len.unwrap_or(len).max(1);
        Self {
            endpoint: Endpoint { remote: read_name(&slot.name), local: details.local },
            tos: details.tos,
            len,
            piece_len,
            count: piece_count(len, piece_len),
            truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
        }
    }

    /// The datagrams in `bytes`.
    fn cut<'a>(self, mut bytes: &'a mut [u8]) -> impl Iterator<Item = Datagram<'a>> {
        (0..self.count).map(move |i| {
            let run_len = self.count - i;
            let whole = self.piece_len.min(bytes.len());
            let len = if run_len == 1 { bytes.len() } else { whole };
            let (piece, rest) = mem::take(&mut bytes).split_at_mut(len);
            bytes = rest;
            Datagram {
                bytes: piece,
                endpoint: self.endpoint,
                tos: self.tos,
                run_len,
                truncated: len > whole || run_len == 1 && self.truncated,
            }
        })
    }
}

/// Datagrams of `piece_len` bytes that make `len` bytes, as far as they are told apart.
fn piece_count(len: usize, piece_len: usize) -> usize {
    len.div_ceil(piece_len).clamp(1, RUN_LEN_MAX)
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
    /// Length of the datagrams, if there are several.
    piece_len: Option<usize>,
}

/// Reads the control messages of what was just received.
fn read_details(message: &libc::msghdr) -> Details {
    let mut details = Details::default();
    // SAFETY: `msg_control` points to the slot's control room, which `fill` keeps from being written,
    // and `msg_controllen` is the part of it that the kernel filled with whole messages.
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
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let len = ptr::read_unaligned(data.cast::<c_int>());
                    details.piece_len = usize::try_from(len).ok().filter(|&len| len > 0);
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

/// A datagram to send.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// The payload.
    pub bytes: &'a [u8],
    /// Where it goes, and which address of ours it leaves from.
    pub endpoint: &'a Endpoint,
    /// The outer header's TOS or traffic class: DSCP and ECN.
    pub tos: u8,
}

/// What a `mmsghdr` for sending points to, beside the payload.
struct Head {
    name: Name,
    control: Control,
    control_len: usize,
}

/// Sends the first of `datagrams` in order with one call, from the local addresses that their endpoints
/// name, each with its TOS byte. Does not block.
///
/// `runs` says how many of them cross the kernel as one message each, and so how many there are. All of a
/// run have the endpoint and TOS of its first and the first one's length, but that the last may be shorter.
/// Gives how many *runs* went out, whole.
///
/// Every remote address must be of the socket's family, and so must the local one.
///
/// # Errors
/// Why the first run did not go; if it went, a later one's error shows when it is sent again.
///
/// # Panics
/// If there are more than [`BATCH_MAX`], or a run is empty or goes beyond them.
pub fn send(
    socket: impl AsFd,
    datagrams: &[Outgoing<'_>],
    runs: impl IntoIterator<Item = usize>,
) -> io::Result<usize> {
    // The kernel only reads from where an `iovec` for sending points.
    let mut iovecs: ArrayVec<iovec, BATCH_MAX> = datagrams
        .iter()
        .map(|datagram| iovec {
            iov_base: datagram.bytes.as_ptr().cast_mut().cast(),
            iov_len: datagram.bytes.len(),
        })
        .collect();
    let mut heads = ArrayVec::<Head, BATCH_MAX>::new();
    let mut headers = ArrayVec::<mmsghdr, BATCH_MAX>::new();
    let mut rest = datagrams;
    let mut payloads = &mut iovecs[..];
    for count in runs {
        let (run, behind) = rest.split_at(count);
        let (payload, payloads_behind) = payloads.split_at_mut(count);
        (rest, payloads) = (behind, payloads_behind);
        heads.push(head_of(run));
        // SAFETY: all zeros is a value of this C struct of integers and pointers.
        let mut header: mmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        header.msg_hdr.msg_iov = payload.as_mut_ptr();
        header.msg_hdr.msg_iovlen = count as _;
        headers.push(header);
    }
    // Not before all heads are where they stay.
    for (header, head) in headers.iter_mut().zip(&mut heads) {
        let message = &mut header.msg_hdr;
        message.msg_name = (&raw mut head.name).cast();
        message.msg_namelen = name_len(&head.name);
        if head.control_len > 0 {
            message.msg_control = (&raw mut head.control).cast();
            message.msg_controllen = head.control_len as _;
        }
    }
    loop {
        // SAFETY: `headers` holds `headers.len()` headers. Each points to a head of its own and to its own
        // part of `iovecs`, both filled above and neither moved nor touched since, and through that to
        // payloads that `datagrams` borrows; the lengths are theirs. The kernel writes only to the
        // headers' `msg_len`.
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

/// Where a run goes, and how.
fn head_of(run: &[Outgoing<'_>]) -> Head {
    let first = run.first().expect("a run has a datagram");
    let mut control = Control([0; _]);
    let mut control_len = write_control(&mut control, first.endpoint, first.tos);
    if run.len() > 1 {
        // Too long for the field is too long for the kernel, which says so of 0.
        let piece_len = u16::try_from(first.bytes.len()).unwrap_or(0);
        control_len =
            append(&mut control, control_len, libc::SOL_UDP, libc::UDP_SEGMENT, piece_len);
    }
    Head { name: write_name(&first.endpoint.remote), control, control_len }
}

/// Bytes of the address in `name`.
fn name_len(name: &Name) -> libc::socklen_t {
    // SAFETY: the family stands at the same place in each variant.
    let len = match c_int::from(unsafe { name.any }) {
        libc::AF_INET => size_of::<sockaddr_in>(),
        _ => size_of::<sockaddr_in6>(),
    };
    len as libc::socklen_t
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

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(len: usize, piece_len: usize, truncated: bool) -> Vec<(Vec<u8>, usize, bool)> {
        let endpoint = Endpoint::configured("192.0.2.1:1".parse().unwrap());
        let count = piece_count(len, piece_len);
        let filled = Filled { endpoint, tos: 0, len, piece_len, count, truncated };
        let mut bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
        filled.cut(&mut bytes).map(|got| (got.bytes.to_vec(), got.run_len, got.truncated)).collect()
    }

    #[test]
    fn a_buffer_is_cut_where_its_datagrams_end() {
        assert_eq!(filled(0, 1, false), [(vec![], 1, false)], "an empty datagram is one, too");
        assert_eq!(filled(3, 3, false), [(vec![0, 1, 2], 1, false)]);
        let cut = filled(5, 2, false);
        assert_eq!(cut, [(vec![0, 1], 3, false), (vec![2, 3], 2, false), (vec![4], 1, false)]);
        let cut = filled(4, 2, true);
        assert_eq!(cut, [(vec![0, 1], 2, false), (vec![2, 3], 1, true)], "the end is missing");
        assert_eq!(filled(2, 9, false), [(vec![0, 1], 1, false)]);
    }

    #[test]
    fn a_run_longer_than_any_ends_as_no_datagram() {
        for (len, piece_len) in [(65_535, 1), (RUN_LEN_MAX + 1, 1), (2 * RUN_LEN_MAX + 1, 2)] {
            let cut = filled(len, piece_len, false);
            assert_eq!(cut.len(), RUN_LEN_MAX);
            assert!(
                cut[..RUN_LEN_MAX - 1]
                    .iter()
                    .all(|(bytes, _, bad)| bytes.len() == piece_len && !bad)
            );
            assert!(cut[RUN_LEN_MAX - 1].2);
            assert_eq!(cut.iter().map(|(bytes, ..)| bytes.len()).sum::<usize>(), len);
        }
        let cut = filled(2 * RUN_LEN_MAX - 1, 2, false);
        assert!(cut.len() == RUN_LEN_MAX && cut.iter().all(|(_, _, bad)| !bad));
    }
}
