//! The calls behind AF_XDP sockets. What the shared memory means is `xsk`'s.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::net::xdp::{
    SocketAddrXdp, SocketAddrXdpFlags, SocketAddrXdpWithSharedUmem, XDP_PGOFF_RX_RING,
    XDP_PGOFF_TX_RING, XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING, XdpOptionsFlags,
    XdpRingOffset, XdpUmemReg, XdpUmemRegFlags,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with, sockopt,
};

use super::memory::Memory;

/// Bytes that the kernel keeps free at the start of every chunk it receives into.
pub const PACKET_HEADROOM: u32 = 256;
/// Flag in a ring: the kernel sleeps and wants to be called.
pub const RING_NEED_WAKEUP: u32 = libc::XDP_RING_NEED_WAKEUP;

/// One entry of the rx and tx rings (`struct xdp_desc`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Descriptor {
    /// Offset of the packet in the UMEM.
    pub addr: u64,
    /// Bytes of the packet.
    pub len: u32,
    /// Flags; 0 for a packet that is whole.
    pub options: u32,
}
const _: () = assert!(size_of::<Descriptor>() == size_of::<libc::xdp_desc>());

/// Entries of each of the four rings; powers of two.
#[derive(Clone, Copy, Debug)]
pub struct RingSizes {
    /// Of the fill ring.
    pub fill: u32,
    /// Of the rx ring.
    pub rx: u32,
    /// Of the tx ring.
    pub tx: u32,
    /// Of the completion ring.
    pub completion: u32,
}

/// A ring's memory, and where in it things are (in bytes).
#[derive(Debug)]
pub struct RingMemory {
    /// The mapping.
    pub memory: Memory,
    /// Of the `u32` that the producer advances.
    pub producer: usize,
    /// Of the `u32` that the consumer advances.
    pub consumer: usize,
    /// Of the `u32` of flags.
    pub flags: usize,
    /// Of the first entry.
    pub entries: usize,
}

/// The memory of an XSK's four rings.
#[derive(Debug)]
pub struct RingMemories {
    /// Empty chunks to the kernel; entries are `u64`.
    pub fill: RingMemory,
    /// Received packets; entries are [`Descriptor`].
    pub rx: RingMemory,
    /// Packets to send; entries are [`Descriptor`].
    pub tx: RingMemory,
    /// Sent chunks from the kernel; entries are `u64`.
    pub completion: RingMemory,
}

/// Opens an AF_XDP socket.
///
/// # Errors
/// `EAFNOSUPPORT` on a kernel without; `PermissionDenied` without `CAP_NET_RAW`.
pub fn open() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::XDP, SocketType::RAW, flags, None)?)
}

/// Whether `fd` is an AF_XDP socket.
pub fn is_xsk(fd: impl AsFd) -> bool {
    sockopt::socket_domain(fd).is_ok_and(|domain| domain == AddressFamily::XDP)
}

/// Gives `memory` to the socket as its UMEM of chunks of `chunk_size` bytes.
/// `headroom` bytes beyond [`PACKET_HEADROOM`] stay free before what is received.
///
/// The kernel writes to chunks only once their addresses are put into a ring. It holds the pages
/// itself: unmapping `memory` is safe at any time.
///
/// # Errors
/// `ENOBUFS` if the UMEM exceeds the limit of locked memory; `EINVAL` for impossible sizes.
pub fn register_umem(
    socket: impl AsFd,
    memory: &Memory,
    chunk_size: u32,
    headroom: u32,
) -> io::Result<()> {
    let umem = XdpUmemReg {
        addr: memory.base().as_ptr().expose_provenance() as u64,
        len: memory.len() as u64,
        chunk_size,
        headroom,
        flags: XdpUmemRegFlags::empty(),
        tx_metadata_len: 0,
    };
    Ok(sockopt::set_xdp_umem_reg(&socket, umem)?)
}

/// Makes the rings of a socket.
///
/// # Errors
/// `EINVAL` for impossible sizes.
pub fn make_rings(socket: impl AsFd, sizes: RingSizes) -> io::Result<()> {
    sockopt::set_xdp_umem_fill_ring_size(&socket, sizes.fill)?;
    sockopt::set_xdp_umem_completion_ring_size(&socket, sizes.completion)?;
    sockopt::set_xdp_rx_ring_size(&socket, sizes.rx)?;
    Ok(sockopt::set_xdp_tx_ring_size(&socket, sizes.tx)?)
}

/// Maps the rings of a socket that [`make_rings`] was called for, with the same `sizes`.
///
/// # Errors
/// `EBUSY` if the socket is bound and the kernel is older than 6.4; `EINVAL` if the rings are
/// smaller than `sizes` says.
pub fn map_rings(socket: impl AsFd, sizes: RingSizes) -> io::Result<RingMemories> {
    let offsets = sockopt::xdp_mmap_offsets(&socket)?;
    let map = |page_offset: u64, at: XdpRingOffset, size: u32, entry_len: usize| {
        let entries = at.desc as usize;
        let memory = Memory::shared(&socket, page_offset, entries + size as usize * entry_len)?;
        let flags = at.flags.ok_or(io::ErrorKind::Unsupported)? as usize;
        let (producer, consumer) = (at.producer as usize, at.consumer as usize);
        Ok::<_, io::Error>(RingMemory { memory, producer, consumer, flags, entries })
    };
    let (addr_len, descriptor_len) = (size_of::<u64>(), size_of::<Descriptor>());
    Ok(RingMemories {
        fill: map(XDP_UMEM_PGOFF_FILL_RING, offsets.fr, sizes.fill, addr_len)?,
        rx: map(XDP_PGOFF_RX_RING, offsets.rx, sizes.rx, descriptor_len)?,
        tx: map(XDP_PGOFF_TX_RING, offsets.tx, sizes.tx, descriptor_len)?,
        completion: map(XDP_UMEM_PGOFF_COMPLETION_RING, offsets.cr, sizes.completion, addr_len)?,
    })
}

/// How a socket is bound.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum BindMode {
    /// The kernel copies each packet between the driver's memory and the UMEM.
    #[default]
    Copy,
    /// The driver uses the UMEM itself, or binding fails.
    ZeroCopy,
    /// Zero-copy where the driver can, else copy.
    Auto,
}

/// Binds the socket to a queue, with need-wakeup flags in its rings.
///
/// # Errors
/// `EBUSY` if the queue has a socket, or had one until a few milliseconds ago; `EINVAL` if there is
/// no such queue; `ENODEV`; `EOPNOTSUPP` if the driver has no zero-copy.
pub fn bind(socket: impl AsFd, ifindex: u32, queue: u32, mode: BindMode) -> io::Result<()> {
    let flags = SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP
        | match mode {
            BindMode::Copy => SocketAddrXdpFlags::XDP_COPY,
            BindMode::ZeroCopy => SocketAddrXdpFlags::XDP_ZEROCOPY,
            BindMode::Auto => SocketAddrXdpFlags::empty(),
        };
    Ok(rustix::net::bind(socket, &SocketAddrXdp::new(flags, ifindex, queue))?)
}

/// Binds the socket to a queue with the UMEM of `other`, which is bound to another queue, of this interface
/// or another one. It copies or not, and has need-wakeup flags, as that has.
///
/// # Errors
/// As [`bind`]; `EINVAL` also on a kernel before 5.10, and `EBADF` if `other` is not bound.
pub fn bind_sharing(
    socket: impl AsFd,
    ifindex: u32,
    queue: u32,
    other: BorrowedFd<'_>,
) -> io::Result<()> {
    let flags = SocketAddrXdpFlags::XDP_SHARED_UMEM;
    let addr = SocketAddrXdp::new(flags, ifindex, queue);
    let shared = SocketAddrXdpWithSharedUmem { addr, shared_umem_fd: other };
    Ok(rustix::net::bind(socket, &shared)?)
}

/// Whether a bound socket is zero-copy.
///
/// # Errors
/// If it is no XSK.
pub fn is_zero_copy(socket: impl AsFd) -> io::Result<bool> {
    let options = sockopt::xdp_options(socket)?;
    Ok(options.contains(XdpOptionsFlags::XDP_OPTIONS_ZEROCOPY))
}

/// Whether the kernel lets who has a socket run the NIC's side of it ([`prefer_busy_poll`]).
///
/// # Errors
/// `ENOPROTOOPT` on one that does not, or before Linux 5.11; `EPERM` without `CAP_NET_ADMIN`.
pub fn can_busy_poll() -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    prefer_busy_poll(socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?)
}

/// Has each call that looks for packets on the socket, [`wake_rx`] and [`wake_tx`] for an XSK, do what the NIC's
/// interrupt would have done, for at most [`POLLED_PER_CALL`] packets. Interrupts stay off as long as such calls come
/// often enough, if the NIC was told to put them off (`napi_defer_hard_irqs`, `gro_flush_timeout`).
///
/// # Errors
/// As [`can_busy_poll`].
pub fn prefer_busy_poll(socket: impl AsFd) -> io::Result<()> {
    set_option(&socket, libc::SO_PREFER_BUSY_POLL, 1)?;
    // Not to be 0; how long a call that may wait would look.
    set_option(&socket, libc::SO_BUSY_POLL, 20)?;
    set_option(&socket, libc::SO_BUSY_POLL_BUDGET, POLLED_PER_CALL)
}

/// Packets that a call looks at on a NIC that is polled: a driver's usual share.
const POLLED_PER_CALL: libc::c_int = 64;

fn set_option(socket: &impl AsFd, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let (len, value) = (size_of_val(&value) as libc::socklen_t, &raw const value);
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `len` bytes of an integer that outlives the call.
    let outcome = unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, name, value.cast(), len) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the kernel counts for an XSK (`XDP_STATISTICS`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Statistics {
    /// Packets dropped for other reasons than those below.
    pub rx_dropped: u64,
    /// Packets dropped because the rx ring was full.
    pub rx_ring_full: u64,
    /// Times the kernel found the fill ring empty.
    pub fill_ring_empty: u64,
    /// Entries of the fill ring that were no chunk.
    pub fill_invalid: u64,
    /// Descriptors of the tx ring that were not within a chunk.
    pub tx_invalid: u64,
    /// Times the kernel found the tx ring empty.
    pub tx_ring_empty: u64,
}

/// Reads the socket's statistics.
///
/// # Errors
/// If it is no XSK.
pub fn statistics(socket: impl AsFd) -> io::Result<Statistics> {
    let counts = sockopt::xdp_statistics(socket)?;
    Ok(Statistics {
        rx_dropped: counts.rx_dropped,
        rx_ring_full: counts.rx_ring_full.unwrap_or(0),
        fill_ring_empty: counts.rx_fill_ring_empty_descs.unwrap_or(0),
        fill_invalid: counts.rx_invalid_descs,
        tx_invalid: counts.tx_invalid_descs,
        tx_ring_empty: counts.tx_ring_empty_descs.unwrap_or(0),
    })
}

/// Has the kernel look at the fill ring.
///
/// # Errors
/// `ENETDOWN` and the like; the ring is looked at again when the interface is back.
pub fn wake_rx(socket: impl AsFd) -> io::Result<()> {
    recv(socket, &mut [0_u8; 0][..], RecvFlags::DONTWAIT)?;
    Ok(())
}

/// Has the kernel send from the tx ring. In copy mode a call sends some (32 by default) itself.
///
/// # Errors
/// `EAGAIN`: there is more to send. `ENOBUFS`, `EBUSY`: the interface takes no more now.
pub fn wake_tx(socket: impl AsFd) -> io::Result<()> {
    send(socket, &[], SendFlags::DONTWAIT)?;
    Ok(())
}
