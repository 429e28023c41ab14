//! The ioctls of `/dev/net/tun`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd as _, OwnedFd};

use libc::{IFNAMSIZ, c_short, ifreq};
use rustix::fs::{Mode, OFlags};
use rustix::io::{IoSlice, IoSliceMut, readv, writev};

/// Bytes of `struct virtio_net_hdr`, which stands before every packet.
pub const VNET_HEADER_LEN: usize = 10;
/// The virtio header of a packet that asks for nothing: no checksum to fill in, no segments.
pub const VNET_HEADER_PLAIN: [u8; VNET_HEADER_LEN] = [0; VNET_HEADER_LEN];

/// Flags of every queue we open: IP packets without a link header, several queues, virtio header.
const FLAGS: libc::c_int =
    libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE | libc::IFF_VNET_HDR;

/// Opens a queue of the TUN device `name` (at most 15 bytes) that does not block. With `create`,
/// the device is made and must not be there yet; it ends with its last queue.
///
/// # Errors
/// `NotFound` or `PermissionDenied` from opening `/dev/net/tun`. From the device: `EBUSY` if it
/// is there but must not be; `EPERM` without `CAP_NET_ADMIN`; `EINVAL` if it is another kind of
/// device; `E2BIG` if it has no queue left.
pub fn open_queue(name: &str, create: bool) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
        .map_err(|error| OpenError::Open(error.into()))?;
    let mut request = empty_request();
    assert!(name.len() < IFNAMSIZ, "checked by the caller");
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // Without IFF_TUN_EXCL a second daemon would silently get a queue of the first one's device.
    let exclusive = if create { libc::IFF_TUN_EXCL } else { 0 };
    request.ifr_ifru.ifru_flags = (FLAGS | exclusive) as c_short;
    // SAFETY: TUNSETIFF reads and writes an `ifreq`, which this is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if result != 0 {
        return Err(OpenError::Attach(io::Error::last_os_error()));
    }
    set_offloads(&fd).map_err(OpenError::Attach)?;
    Ok(fd)
}

/// Has the kernel give us what it can: super-packets of TCP and UDP, and packets with an unfinished
/// checksum. All queues of a device share this.
fn set_offloads(fd: &OwnedFd) -> io::Result<()> {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    // Those of UDP are there from Linux 6.2 on, and only both together.
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let mut result = Ok(());
    for flags in [tcp | udp, tcp, 0] {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let refused = unsafe {
            libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(flags))
        } != 0;
        if !refused {
            return Ok(());
        }
        result = Err(io::Error::last_os_error());
    }
    result
}

/// Which step of [`open_queue`] failed.
#[derive(Debug)]
pub enum OpenError {
    /// Opening `/dev/net/tun`.
    Open(io::Error),
    /// Making the device, or attaching to it.
    Attach(io::Error),
}

/// The name of the device to which a queue belongs.
///
/// # Errors
/// `InvalidInput` if `fd` is no TUN queue as [`open_queue`] makes them; `EBADFD` if its device is
/// gone.
pub fn queue_device(fd: impl AsFd) -> io::Result<String> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF writes an `ifreq`, which this is; other kinds of file do not know this
    // request's number, which has the TUN driver's own letter in it.
    let result =
        unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TUNGETIFF filled in the flags; any bytes are a value of this field.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    let mut header_len: libc::c_int = 0;
    // SAFETY: TUNGETVNETHDRSZ writes an `int`, which this is.
    let result = unsafe {
        libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNGETVNETHDRSZ as _, &raw mut header_len)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // TUNGETIFF answers with flags as TUNSETIFF takes them.
    if flags & (FLAGS | libc::IFF_TAP) != FLAGS || header_len != VNET_HEADER_LEN as libc::c_int {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a TUN queue as we open them"));
    }
    let name = request.ifr_name.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
    String::from_utf8(name).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Has a BPF program (a socket filter) choose the queue by which a packet leaves, for the whole device and
/// in place of the kernel's way or of another program.
///
/// # Errors
/// `EINVAL` if the kernel does not know the request or the program is of another kind; `EBADFD` if the
/// queue's device is gone.
pub fn set_steering(queue: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let program: libc::c_int = program.as_fd().as_raw_fd();
    // SAFETY: TUNSETSTEERINGEBPF reads an `int`, which this is; other kinds of file do not know this
    // request's number, which has the TUN driver's own letter in it.
    let result = unsafe {
        libc::ioctl(queue.as_fd().as_raw_fd(), libc::TUNSETSTEERINGEBPF as _, &raw const program)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A descriptor of the network namespace in which a queue's device is now.
///
/// # Errors
/// `EBADFD` if its device is gone; `EPERM` without `CAP_NET_ADMIN` in that namespace.
pub fn queue_namespace(fd: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: TUNGETDEVNETNS takes no argument; other kinds of file do not know this request's number,
    // which has the TUN driver's own letter in it.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNGETDEVNETNS as _, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

/// Reads one packet: its bytes go to `packet`. Gives its virtio header and its length, at most that
/// of `packet`: the rest of a longer one is lost.
///
/// # Errors
/// `WouldBlock`, and those of a device that is gone.
pub fn read_packet(fd: impl AsFd, packet: &mut [u8]) -> io::Result<([u8; VNET_HEADER_LEN], usize)> {
    let mut header = VNET_HEADER_PLAIN;
    let read = readv(fd, &mut [IoSliceMut::new(&mut header), IoSliceMut::new(packet)])?;
    Ok((header, read.saturating_sub(VNET_HEADER_LEN)))
}

/// Writes one whole packet.
///
/// # Errors
/// `InvalidInput` if it is no IP packet; `EIO` while the device is down; those of a device that is
/// gone.
pub fn write_packet(fd: impl AsFd, packet: &[u8]) -> io::Result<()> {
    write_parts(fd, &[IoSlice::new(&VNET_HEADER_PLAIN), IoSlice::new(packet)])
}

/// Writes a virtio header and the packet behind it, in one call but from several places, at most 1,024.
///
/// # Errors
/// As [`write_packet`]; `InvalidInput` also for segments of a kind that the kernel does not know.
pub fn write_parts(fd: impl AsFd, parts: &[IoSlice<'_>]) -> io::Result<()> {
    writev(fd, parts)?;
    Ok(())
}

/// Has the kernel cut and finish all packets before they are read from the queue's device.
///
/// # Errors
/// Those of a device that is gone.
#[cfg(test)]
pub fn switch_offloads_off(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD as _, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn empty_request() -> ifreq {
    // SAFETY: all zeros is a value of this C struct and of each variant of its union.
    unsafe { std::mem::zeroed() }
}
