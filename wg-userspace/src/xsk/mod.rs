//! AF_XDP sockets: packets of one queue of a NIC, in memory shared with the kernel.
//!
//! Knows frames and rings, and nothing of what is in a packet. Which packets come is decided by the
//! steer program, to whose XSK map the socket is given (`bpf`); they go to `datapath::inbound`.
//!
//! A chunk's way: pool → *fill* ring → kernel → *rx* ring → [`Frame`] → [`Xsk::recycle`] → pool; or
//! pool → [`Xsk::allocate`] → [`Frame`] → [`Xsk::transmit`] → *tx* ring → kernel → *completion*
//! ring → pool. Every number that comes from a ring is checked before it becomes a frame.
//!
//! The kernel takes chunks from the fill ring first in, first out, so what is in use goes round all
//! chunks of that ring: as many as ride out a pause of the worker ([`XskOptions::fill_level`]), but
//! not all there are. The pool above it is last in, first out.

mod ring;
pub mod twin;
mod umem;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;

use self::ring::{Consumer, Producer, Ring};
pub use self::umem::{Frame, Umem};
use self::umem::{HEADROOM, Holder, Ledger};
use crate::sys::errno::{EAFNOSUPPORT, EBUSY, EINVAL, ENOBUFS, ENODEV, EOPNOTSUPP, EPERM};
use crate::sys::wait::EventFd;
use crate::sys::xdp::{self, Descriptor, RingMemories, RingSizes};
pub use crate::sys::xdp::{BindMode, Statistics};

/// Frames that one call of [`Xsk::receive`] gives at most.
pub const BATCH_MAX: usize = 64;

/// What a call sends in copy mode, unless the socket is told otherwise.
const SENT_PER_CALL: u32 = 32;

/// Chunks that wait in the pool before the fill ring is told: the other side reads that cache line.
const REFILL_AT: u32 = 32;

/// How long a queue may stay busy after its last socket was closed: the kernel takes some
/// milliseconds to let go of a UMEM.
const BUSY_MAX: Duration = Duration::from_secs(1);
const BUSY_PAUSE: Duration = Duration::from_millis(5);

const CHUNK_SIZE_MAX: u32 = 4096;
const CHUNK_COUNT_MAX: u32 = 1 << 20;

/// How an XSK is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct XskOptions {
    /// Copy, zero-copy, or as the driver can.
    pub mode: BindMode,
    /// Bytes of a chunk: 2048 or 4096. See [`XskOptions::packet_len_max`].
    pub chunk_size: u32,
    /// Chunks of the UMEM.
    pub chunk_count: u32,
    /// Entries of each ring; a power of two.
    pub ring_size: u32,
    /// Chunks that wait in the kernel to be received into, at most `ring_size`: what is lost in a
    /// pause of the worker is what comes beyond. More of them are more memory in use, which falls
    /// out of the caches.
    pub fill_level: u32,
}

impl Default for XskOptions {
    /// 4,096 chunks of 2 KiB, half of them waiting: 2.5 ms at 800,000 packets a second.
    fn default() -> Self {
        Self {
            mode: BindMode::Copy,
            chunk_size: 2048,
            chunk_count: 4096,
            ring_size: 2048,
            fill_level: 2048,
        }
    }
}

impl XskOptions {
    /// The longest packet, link header included, that a chunk of this size can receive; the kernel
    /// drops longer ones.
    pub fn packet_len_max(&self) -> usize {
        (self.chunk_size - xdp::PACKET_HEADROOM - HEADROOM) as usize
    }

    fn umem_len(&self) -> usize {
        self.chunk_size as usize * self.chunk_count as usize
    }

    fn ring_sizes(&self) -> RingSizes {
        let size = self.ring_size;
        RingSizes { fill: size, rx: size, tx: size, completion: size }
    }

    fn check(&self) -> Result<(), XskError> {
        let wrong = if ![2048, CHUNK_SIZE_MAX].contains(&self.chunk_size) {
            "chunk_size is 2048 or 4096"
        } else if !self.ring_size.is_power_of_two() || self.ring_size > 1 << 16 {
            "ring_size is a power of two of at most 65,536"
        } else if self.fill_level == 0 || self.fill_level > self.ring_size {
            "fill_level is 1 to ring_size"
        } else if self.chunk_count < self.fill_level || self.chunk_count > CHUNK_COUNT_MAX {
            "chunk_count is fill_level to 1,048,576"
        } else {
            return Ok(());
        };
        Err(XskError::Options(wrong))
    }
}
// Offsets in a UMEM are kept in 32 bits.
const _: () = assert!((CHUNK_SIZE_MAX as u64 * CHUNK_COUNT_MAX as u64 - 1) >> 32 == 0);

/// Why an XSK could not be made or taken over.
#[derive(Debug, thiserror::Error)]
pub enum XskError {
    /// The options contradict each other.
    #[error("impossible options of an XSK: {0}")]
    Options(&'static str),
    /// The kernel has no AF_XDP.
    #[error("the kernel has no AF_XDP sockets; it needs CONFIG_XDP_SOCKETS")]
    NoAfXdp,
    /// The process lacks the privilege.
    #[error("making an AF_XDP socket: CAP_NET_RAW and CAP_NET_ADMIN are needed; run it as root")]
    NotPermitted,
    /// The UMEM exceeds the limit of locked memory.
    #[error(
        "{len} bytes of packet memory exceed the limit of locked memory; raise it (`ulimit -l unlimited`, \
         `LimitMEMLOCK=infinity` of a service), or give it CAP_IPC_LOCK"
    )]
    MemoryLimit {
        /// Bytes of the UMEM.
        len: usize,
    },
    /// Another socket has the queue, also after waiting for it.
    #[error(
        "queue {queue} of interface {ifindex} has the AF_XDP socket of another program; `ss --xdp -p` says \
         which"
    )]
    Busy {
        /// The interface.
        ifindex: u32,
        /// The queue.
        queue: u32,
    },
    /// There is no such interface, or it has no such queue.
    #[error("interface {ifindex} has no queue {queue}")]
    NoQueue {
        /// The interface.
        ifindex: u32,
        /// The queue.
        queue: u32,
    },
    /// The driver cannot do zero-copy.
    #[error("the driver of interface {ifindex} has no zero-copy AF_XDP")]
    NoZeroCopy {
        /// The interface.
        ifindex: u32,
    },
    /// Descriptors that were handed to us are no XSK and its UMEM.
    #[error("descriptors are not an AF_XDP socket and its UMEM")]
    NotXsk,
    /// The rings of a bound socket cannot be mapped again.
    #[error("taking over a bound AF_XDP socket needs Linux 6.4")]
    KernelTooOld,
    /// Anything else.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// What the kernel and we count for an XSK.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct XskCounts {
    /// The kernel's counts.
    pub kernel: Statistics,
    /// Entries of the rx and completion rings that were none of our chunks; 0 unless something is
    /// broken. The chunks they meant are lost.
    pub bad_descriptors: u64,
}

/// An XSK with a UMEM of its own, bound to one queue of one interface.
///
/// Wait for it with `poll`: readable when something is received.
#[derive(Debug)]
pub struct Xsk {
    // First, so that the kernel is gone before the memory is.
    backing: Backing,
    ifindex: u32,
    queue: u32,
    options: XskOptions,
    umem: Arc<Umem>,
    ledger: Ledger,
    fill: Producer<u64>,
    rx: Consumer<Descriptor>,
    tx: Producer<Descriptor>,
    completion: Consumer<u64>,
    /// Chunks that came to the pool since the fill ring was last looked at.
    recycled: u32,
    bad_descriptors: u64,
}

/// Who is at the other end of the rings.
#[derive(Debug)]
enum Backing {
    Kernel(OwnedFd),
    /// A [`twin::KernelTwin`], which signals what it delivers.
    Twin(Arc<EventFd>),
}

/// What an XSK is rebuilt from, in this process or another: descriptors, and what only its owner
/// knows.
#[derive(Debug)]
pub struct XskParts {
    /// The bound socket.
    pub socket: OwnedFd,
    /// The memfd of the UMEM.
    pub umem: OwnedFd,
    /// The interface to which the socket is bound.
    pub ifindex: u32,
    /// The queue to which it is bound.
    pub queue: u32,
    /// The options with which it was bound.
    pub options: XskOptions,
    /// Numbers of the chunks that were the owner's, in no ring. Empty if that is not known (the
    /// owner died): those chunks are then out of use.
    pub ours: Vec<u32>,
}

/// An AF_XDP socket with its UMEM and rings, before it is bound and before anybody has mapped them: for a
/// process that may make one, and another that uses it. (Rings of a bound socket can be mapped since
/// Linux 6.4.)
#[derive(Debug)]
pub struct Unbound {
    /// The socket.
    pub socket: OwnedFd,
    /// The memfd of the UMEM.
    pub umem: OwnedFd,
    /// How it was made, and is to be bound.
    pub options: XskOptions,
}

impl Unbound {
    /// Makes a socket. Its UMEM is mapped here only until the kernel has it.
    ///
    /// # Errors
    /// See [`XskError`].
    pub fn new(options: XskOptions) -> Result<Self, XskError> {
        options.check()?;
        let umem = Umem::new(&options).map_err(io_error("making a UMEM"))?;
        let socket = xdp::open().map_err(|error| match error.raw_os_error() {
            Some(EAFNOSUPPORT) => XskError::NoAfXdp,
            Some(EPERM) => XskError::NotPermitted,
            _ => io_error("opening an AF_XDP socket")(error),
        })?;
        let sizes = options.ring_sizes();
        xdp::set_up(&socket, umem.memory(), options.chunk_size, HEADROOM, sizes).map_err(
            |error| match error.raw_os_error() {
                Some(ENOBUFS) => XskError::MemoryLimit { len: options.umem_len() },
                Some(EPERM) => XskError::NotPermitted,
                _ => io_error("registering a UMEM")(error),
            },
        )?;
        Ok(Self { socket, umem: umem.into_fd(), options })
    }
}

/// Binds the socket of an XSK whose fill ring is full to `queue` of an interface.
///
/// Waits up to a second for a queue that is busy, as it is for some milliseconds after another XSK there
/// was closed.
///
/// # Errors
/// See [`XskError`].
pub fn bind(socket: impl AsFd, ifindex: u32, queue: u32, mode: BindMode) -> Result<(), XskError> {
    let give_up = Instant::now() + BUSY_MAX;
    loop {
        let Err(error) = xdp::bind(&socket, ifindex, queue, mode) else { return Ok(()) };
        return Err(match error.raw_os_error() {
            Some(EBUSY) if Instant::now() < give_up => {
                sleep(BUSY_PAUSE);
                continue;
            }
            Some(EBUSY) => XskError::Busy { ifindex, queue },
            Some(EINVAL | ENODEV) => XskError::NoQueue { ifindex, queue },
            Some(EOPNOTSUPP) => XskError::NoZeroCopy { ifindex },
            Some(EPERM) => XskError::NotPermitted,
            _ => io_error("binding an XSK")(error),
        });
    }
}

impl Xsk {
    /// Makes an XSK for `queue` of the interface, with its fill ring full. Packets come once it is
    /// in the steer program's map.
    ///
    /// Waits for a queue that is busy, as [`bind`] does.
    ///
    /// # Errors
    /// See [`XskError`].
    pub fn bind(ifindex: u32, queue: u32, options: XskOptions) -> Result<Self, XskError> {
        let xsk = Self::from_unbound(Unbound::new(options)?, ifindex, queue)?;
        bind(&xsk, ifindex, queue, options.mode)?;
        Ok(xsk)
    }

    /// Takes over a socket that is not bound yet, from this process or another, and fills its fill ring.
    /// It is to be bound to `queue` of the interface then, with [`bind`].
    ///
    /// `unbound` must be used once only, as the parts in [`Xsk::from_parts`].
    ///
    /// # Errors
    /// [`XskError::NotXsk`].
    pub fn from_unbound(unbound: Unbound, ifindex: u32, queue: u32) -> Result<Self, XskError> {
        let Unbound { socket, umem, options } = unbound;
        options.check()?;
        if !xdp::is_xsk(&socket) {
            return Err(XskError::NotXsk);
        }
        let umem = Umem::from_fd(umem, &options).map_err(|_| XskError::NotXsk)?;
        let sizes = options.ring_sizes();
        let rings =
            xdp::map_rings(&socket, sizes).map_err(io_error("mapping the rings of an XSK"))?;
        let ledger = Ledger::new(&umem);
        let rings = Rings::new(rings, sizes);
        let mut xsk =
            Self::assemble(Backing::Kernel(socket), (ifindex, queue), options, umem, ledger, rings);
        xsk.refill();
        Ok(xsk)
    }

    /// Takes over a bound XSK. What waits in its rings is not lost.
    ///
    /// The former owner must have stopped using it, and `parts` must be used once only: memory that
    /// two XSKs share changes under their frames. The kernel cannot tell; a UMEM's descriptor leaves
    /// this room by [`Xsk::into_parts`] only, which ends the former owner.
    ///
    /// # Errors
    /// [`XskError::NotXsk`], [`XskError::KernelTooOld`].
    pub fn from_parts(parts: XskParts) -> Result<Self, XskError> {
        let XskParts { socket, umem, ifindex, queue, options, ours } = parts;
        options.check()?;
        if !xdp::is_xsk(&socket) {
            return Err(XskError::NotXsk);
        }
        let umem = Umem::from_fd(umem, &options).map_err(|_| XskError::NotXsk)?;
        let sizes = options.ring_sizes();
        let rings = xdp::map_rings(&socket, sizes).map_err(|error| match error.raw_os_error() {
            Some(EBUSY) => XskError::KernelTooOld,
            _ => XskError::NotXsk,
        })?;
        let rings = Rings::new(rings, sizes);

        let mut ledger = Ledger::unknown(&umem);
        for addr in rings.fill.snapshot() {
            ledger.note(addr, Holder::Receiving);
        }
        for descriptor in rings.rx.snapshot() {
            ledger.note(descriptor.addr, Holder::Receiving);
        }
        for descriptor in rings.tx.snapshot() {
            ledger.note(descriptor.addr, Holder::Sending);
        }
        for addr in rings.completion.snapshot() {
            ledger.note(addr, Holder::Sending);
        }
        ours.into_iter().for_each(|chunk| ledger.adopt(chunk));

        let backing = Backing::Kernel(socket);
        let mut xsk = Self::assemble(backing, (ifindex, queue), options, umem, ledger, rings);
        xsk.refill();
        Ok(xsk)
    }

    /// Takes the XSK apart for [`Xsk::from_parts`]. Frames that callers still have become ours
    /// again: their bytes cannot be reached any more.
    ///
    /// # Errors
    /// Gives the XSK back while somebody else holds its UMEM (see [`Xsk::umem`]), and if it is a
    /// twin.
    pub fn into_parts(mut self) -> Result<XskParts, Box<Self>> {
        let umem = match Arc::try_unwrap(self.umem) {
            Ok(umem) => umem,
            Err(umem) => {
                self.umem = umem;
                return Err(Box::new(self));
            }
        };
        match self.backing {
            Backing::Kernel(socket) => Ok(XskParts {
                socket,
                umem: umem.into_fd(),
                ifindex: self.ifindex,
                queue: self.queue,
                options: self.options,
                ours: self.ledger.ours(),
            }),
            backing @ Backing::Twin(_) => {
                Err(Box::new(Self { backing, umem: Arc::new(umem), ..self }))
            }
        }
    }

    fn assemble(
        backing: Backing,
        (ifindex, queue): (u32, u32),
        options: XskOptions,
        umem: Umem,
        ledger: Ledger,
        rings: Rings,
    ) -> Self {
        Self {
            backing,
            ifindex,
            queue,
            options,
            umem: Arc::new(umem),
            ledger,
            fill: Producer::new(rings.fill),
            rx: Consumer::new(rings.rx),
            tx: Producer::new(rings.tx),
            completion: Consumer::new(rings.completion),
            recycled: 0,
            bad_descriptors: 0,
        }
    }

    /// Index of the interface.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// The interface's queue.
    pub fn queue(&self) -> u32 {
        self.queue
    }

    /// The memory in which frames have their bytes.
    pub fn umem(&self) -> &Arc<Umem> {
        &self.umem
    }

    /// Whether the driver uses the UMEM itself.
    ///
    /// # Errors
    /// The kernel's; there are none for an XSK.
    pub fn is_zero_copy(&self) -> io::Result<bool> {
        match &self.backing {
            Backing::Kernel(socket) => xdp::is_zero_copy(socket),
            Backing::Twin(_) => Ok(false),
        }
    }

    /// What was lost, and where.
    ///
    /// # Errors
    /// The kernel's; there are none for an XSK.
    pub fn counts(&self) -> io::Result<XskCounts> {
        let kernel = match &self.backing {
            Backing::Kernel(socket) => xdp::statistics(socket)?,
            Backing::Twin(_) => Statistics::default(),
        };
        Ok(XskCounts { kernel, bad_descriptors: self.bad_descriptors })
    }

    /// Frames that callers have now. One that never comes back was dropped.
    pub fn frames_held(&self) -> usize {
        self.ledger.frames()
    }

    /// Adds the packets that have arrived to `frames`, as far as there is room, and gives their
    /// number.
    pub fn receive(&mut self, frames: &mut ArrayVec<Frame, BATCH_MAX>) -> usize {
        let before = frames.len();
        // Bounded, so that a broken ring cannot hold us here.
        for _ in 0..frames.remaining_capacity() {
            let Some(descriptor) = self.rx.read() else { break };
            match self.ledger.frame(descriptor) {
                Some(frame) => frames.push(frame),
                None => self.bad_descriptors += 1,
            }
        }
        self.rx.release();
        if let Backing::Twin(event) = &self.backing
            && self.rx.is_empty()
        {
            event.drain();
            // What was delivered in between is signalled again.
            if !self.rx.is_empty() {
                event.signal();
            }
        }
        frames.len() - before
    }

    /// Takes a frame back that is of no more use; its chunk will be received into again.
    ///
    /// The kernel hears of it from time to time, and at the latest with the last frame.
    ///
    /// # Panics
    /// If the frame is another XSK's.
    pub fn recycle(&mut self, frame: Frame) {
        self.ledger.recycle(frame);
        self.recycled += 1;
        if self.recycled >= REFILL_AT || self.ledger.frames() == 0 {
            self.refill();
        }
    }

    /// Brings the fill ring to its level from the pool, and wakes the kernel if it asks for it.
    fn refill(&mut self) {
        self.recycled = 0;
        let missing = self.options.fill_level.saturating_sub(self.fill.outstanding());
        for _ in 0..missing {
            let Some(addr) = self.ledger.take_for_fill() else { break };
            self.fill.write(addr).expect("the level is at most the ring's size");
        }
        self.fill.submit();
        if let Backing::Kernel(socket) = &self.backing
            && self.fill.needs_wakeup()
        {
            // An interface that is down looks at the ring when it is back.
            let _ = xdp::wake_rx(socket);
        }
    }

    /// A frame to write a packet into: all room of a chunk, to be cut by [`Frame::truncate`].
    /// `None` if the pool is empty: [`Xsk::complete`] brings back what was sent.
    pub fn allocate(&mut self) -> Option<Frame> {
        self.ledger.take_for_frame()
    }

    /// From now on sets so many chunks apart to be sent: no more are sent at a time, and never are so many
    /// received into that fewer are left. 0, as in the beginning: whoever comes first has them.
    pub fn set_apart_to_send(&mut self, chunks: u32) {
        self.ledger.set_apart_to_send(chunks);
    }

    /// As [`Xsk::allocate`], of the chunks that are set apart. `None` if they are all under way.
    pub fn allocate_to_send(&mut self) -> Option<Frame> {
        if self.ledger.may_send() { self.allocate() } else { None }
    }

    /// Chunks that were given to be sent, and have not come back.
    pub fn sending(&self) -> usize {
        self.ledger.sending()
    }

    /// Packets in the tx ring that the kernel has not taken.
    pub fn tx_outstanding(&mut self) -> u32 {
        self.tx.outstanding()
    }

    /// Puts a packet, link header and all, into the tx ring. It leaves with [`Xsk::kick`].
    ///
    /// # Errors
    /// Gives the frame back if the ring is full.
    ///
    /// # Panics
    /// If the frame is another XSK's.
    pub fn transmit(&mut self, frame: Frame) -> Result<(), Frame> {
        if self.tx.write(self.ledger.descriptor(&frame)).is_err() {
            return Err(frame);
        }
        self.ledger.send(frame);
        Ok(())
    }

    /// Has the kernel send what is in the tx ring, as far as the interface takes it now. What is
    /// left goes with the next call.
    ///
    /// # Errors
    /// `ENETDOWN`, `ENXIO` and the like: the interface does not send at all.
    pub fn kick(&mut self) -> io::Result<()> {
        self.tx.submit();
        let Backing::Kernel(socket) = &self.backing else { return Ok(()) };
        // A call sends its share only and says so with EAGAIN; it says the same when it cannot go on.
        // Then the ring does not move; but up to Linux 6.12 at least it also does not as long as calls
        // leave some of what they saw. So there are as many as it takes if each sends its share.
        let mut left = self.tx.outstanding();
        let mut shares = left.div_ceil(SENT_PER_CALL);
        while left > 0 && self.tx.needs_wakeup() {
            shares = shares.saturating_sub(1);
            let may_go_on = match xdp::wake_tx(socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => shares > 0,
                Err(error) if matches!(error.raw_os_error(), Some(ENOBUFS | EBUSY)) => break,
                result => result.map(|()| false)?,
            };
            let before = std::mem::replace(&mut left, self.tx.outstanding());
            if left == before && !may_go_on {
                break;
            }
        }
        Ok(())
    }

    /// Takes chunks back that were sent, and gives their number. To be called before the pool or
    /// the tx ring runs out: the kernel stops sending when the completion ring is full.
    pub fn complete(&mut self) -> usize {
        let mut count = 0;
        for _ in 0..self.options.ring_size {
            let Some(addr) = self.completion.read() else { break };
            if self.ledger.complete(addr) {
                count += 1;
            } else {
                self.bad_descriptors += 1;
            }
        }
        self.completion.release();
        count
    }

    /// Chunks that neither the kernel nor a caller has.
    pub fn pooled(&self) -> usize {
        self.ledger.pooled()
    }
}

impl AsFd for Xsk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.backing {
            Backing::Kernel(socket) => socket.as_fd(),
            Backing::Twin(event) => event.as_fd(),
        }
    }
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> XskError {
    move |source| XskError::Io { what, source }
}

/// The four rings before they have ends.
struct Rings {
    fill: Ring<u64>,
    rx: Ring<Descriptor>,
    tx: Ring<Descriptor>,
    completion: Ring<u64>,
}

impl Rings {
    fn new(memories: RingMemories, sizes: RingSizes) -> Self {
        Self {
            fill: Ring::new(memories.fill, sizes.fill),
            rx: Ring::new(memories.rx, sizes.rx),
            tx: Ring::new(memories.tx, sizes.tx),
            completion: Ring::new(memories.completion, sizes.completion),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::process::Command;

    use super::*;
    use crate::require_root;
    use crate::sys::bpf_for_tests::Redirect;
    use crate::sys::link;
    use crate::sys::netns::NetNs;
    use crate::sys::wait::{PollFd, PollFlags, poll};

    const SMALL: XskOptions = XskOptions {
        mode: BindMode::Copy,
        chunk_size: 2048,
        chunk_count: 16,
        ring_size: 8,
        fill_level: 4,
    };

    fn receive(xsk: &mut Xsk) -> Vec<Frame> {
        let mut frames = ArrayVec::new();
        assert_eq!(xsk.receive(&mut frames), frames.len());
        frames.into_iter().collect()
    }

    fn ready(xsk: &Xsk, timeout: Duration) -> bool {
        poll(&mut [PollFd::new(xsk, PollFlags::IN)], timeout).unwrap() == 1
    }

    // With the safe twin.

    #[test]
    fn packets_arrive_in_order_and_may_be_changed_in_place() {
        let (mut xsk, mut kernel) = twin::pair(3, 1, SMALL).unwrap();
        assert_eq!((xsk.ifindex(), xsk.queue()), (3, 1));
        for i in 0..4 {
            assert!(kernel.deliver(&[i; 100]));
        }
        assert!(!kernel.deliver(b"the fill ring is at its level, and that is used up"));
        let mut frames = receive(&mut xsk);
        assert_eq!(xsk.frames_held(), 4);
        let umem = Arc::clone(xsk.umem());
        // All of them at once, as a batch is opened.
        let packets: Vec<&mut [u8]> =
            frames.iter_mut().map(|frame| umem.bytes_mut(frame)).collect();
        for (i, packet) in (0..).zip(packets) {
            assert_eq!(packet, [i; 100]);
            packet.fill(0xff);
        }
        for frame in frames {
            assert_eq!(umem.bytes(&frame), [0xff; 100]);
            xsk.recycle(frame);
        }
        assert_eq!(xsk.frames_held(), 0);
        assert!(kernel.deliver(b"the last frame refilled the ring"));
    }

    #[test]
    fn payload_of_a_transport_message_is_aligned() {
        let (mut xsk, mut kernel) = twin::pair(1, 0, SMALL).unwrap();
        kernel.deliver(&[0; 14 + 20 + 8 + 16 + 32]);
        let frame = receive(&mut xsk).remove(0);
        assert_eq!(xsk.umem().bytes(&frame)[58..].as_ptr().addr() % 64, 0);
        xsk.recycle(frame);
    }

    #[test]
    fn chunks_are_used_again_last_in_first_out() {
        let options = XskOptions { fill_level: 1, ..SMALL };
        let (mut xsk, mut kernel) = twin::pair(1, 0, options).unwrap();
        let mut seen = Vec::new();
        for _ in 0..20 {
            assert!(kernel.deliver(b"packet"));
            let frame = receive(&mut xsk).remove(0);
            seen.push(xsk.umem().bytes(&frame).as_ptr());
            xsk.recycle(frame);
        }
        seen.dedup();
        assert_eq!(seen.len(), 1, "one chunk is hot, fifteen are not touched");
    }

    #[test]
    fn a_dropped_frame_shows_as_held_and_harms_nothing_else() {
        let (mut xsk, mut kernel) = twin::pair(1, 0, SMALL).unwrap();
        for _ in 0..10 {
            kernel.deliver(b"lost");
            drop(receive(&mut xsk));
        }
        assert_eq!(xsk.frames_held(), 4, "the ring is refilled only by what comes back");
        drop(xsk);
    }

    #[test]
    fn frames_may_outlive_their_xsk() {
        let (mut xsk, mut kernel) = twin::pair(1, 0, SMALL).unwrap();
        kernel.deliver(b"packet");
        let (frame, umem) = (receive(&mut xsk).remove(0), Arc::clone(xsk.umem()));
        drop(xsk);
        assert_eq!(umem.bytes(&frame), b"packet");
        drop(frame);
    }

    #[test]
    fn a_batch_has_at_most_64_frames_and_the_rest_waits() {
        let options = XskOptions { chunk_count: 256, ring_size: 128, fill_level: 128, ..SMALL };
        let (mut xsk, mut kernel) = twin::pair(1, 0, options).unwrap();
        for _ in 0..100 {
            assert!(kernel.deliver(b"packet"));
        }
        assert!(ready(&xsk, Duration::ZERO));
        let mut frames = ArrayVec::new();
        assert_eq!(xsk.receive(&mut frames), 64);
        assert_eq!(xsk.receive(&mut frames), 0, "no room");
        assert!(ready(&xsk, Duration::ZERO), "36 wait");
        frames.drain(..).for_each(|frame| xsk.recycle(frame));
        assert_eq!(xsk.receive(&mut frames), 36);
        assert!(!ready(&xsk, Duration::ZERO));
        frames.drain(..).for_each(|frame| xsk.recycle(frame));
    }

    #[test]
    fn descriptors_that_are_no_packet_of_ours_make_no_frame() {
        let (mut xsk, mut kernel) = twin::pair(1, 0, SMALL).unwrap();
        let chunk = kernel.take_chunk().unwrap();
        let whole = |addr, len| Descriptor { addr, len, options: 0 };
        let bad = [
            whole(16 * 2048, 10),                            // behind the UMEM
            whole(u64::MAX, 10),                             // far behind
            whole(u64::from(u32::MAX) + 1, 10),              // would be chunk 0 in 32 bits
            whole(chunk + 262, 2048 - 262 + 1),              // into the next chunk
            whole(chunk, u32::MAX),                          // longer than the UMEM
            whole(15 * 2048, 10),                            // a chunk that is in the pool
            Descriptor { addr: chunk, len: 10, options: 1 }, // a part of a packet
        ];
        for descriptor in bad {
            assert!(kernel.deliver_descriptor(descriptor));
        }
        assert!(receive(&mut xsk).is_empty());
        assert_eq!(xsk.counts().unwrap().bad_descriptors, bad.len() as u64);

        // The most that is right, and then the same chunk again while we have it.
        let right = whole(chunk + 262, 2048 - 262);
        kernel.deliver_descriptor(right);
        kernel.deliver_descriptor(right);
        let frames = receive(&mut xsk);
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].len(), SMALL.packet_len_max());
        frames.into_iter().for_each(|frame| xsk.recycle(frame));
    }

    #[test]
    #[should_panic(expected = "its own UMEM")]
    fn a_frame_is_of_no_use_with_another_umem() {
        let (mut xsk, mut kernel) = twin::pair(1, 0, SMALL).unwrap();
        let (other, _kernel) = twin::pair(1, 1, SMALL).unwrap();
        kernel.deliver(b"packet");
        let frame = receive(&mut xsk).remove(0);
        other.umem().bytes(&frame);
    }

    #[test]
    #[should_panic(expected = "its own UMEM")]
    fn a_frame_cannot_be_recycled_elsewhere() {
        let (mut xsk, mut kernel) = twin::pair(1, 0, SMALL).unwrap();
        let (mut other, _kernel) = twin::pair(1, 1, SMALL).unwrap();
        kernel.deliver(b"packet");
        other.recycle(receive(&mut xsk).remove(0));
    }

    #[test]
    fn what_is_transmitted_comes_back_by_completion() {
        let (mut xsk, mut kernel) = twin::pair(1, 0, SMALL).unwrap();
        let pooled = xsk.pooled();
        for i in 0..8 {
            let mut frame = xsk.allocate().unwrap();
            frame.truncate(60);
            Arc::clone(xsk.umem()).bytes_mut(&mut frame).fill(i);
            xsk.transmit(frame).unwrap();
        }
        assert!(kernel.take_transmitted().is_none(), "not before the kick");
        let frame = xsk.allocate().unwrap();
        let frame = xsk.transmit(frame).expect_err("the ring is full");
        xsk.recycle(frame);
        xsk.kick().unwrap();
        assert_eq!((xsk.frames_held(), xsk.pooled()), (0, pooled - 8));
        for i in 0..8 {
            let (addr, packet) = kernel.take_transmitted().unwrap();
            assert_eq!(packet, [i; 60]);
            assert!(kernel.complete(addr));
        }
        assert_eq!(xsk.complete(), 8);
        assert_eq!(xsk.pooled(), pooled);
        assert!(kernel.complete(0), "a chunk that is in the fill ring");
        assert!(kernel.complete(u64::MAX));
        assert_eq!(xsk.complete(), 0);
        assert_eq!(xsk.counts().unwrap().bad_descriptors, 2);
    }

    #[test]
    fn allocate_ends_with_the_pool() {
        let (mut xsk, _kernel) = twin::pair(1, 0, SMALL).unwrap();
        let frames: Vec<Frame> = std::iter::from_fn(|| xsk.allocate()).collect();
        assert_eq!(frames.len(), 12, "four of sixteen are in the fill ring");
        frames.into_iter().for_each(|frame| xsk.recycle(frame));
    }

    #[test]
    fn two_threads_lose_and_mix_up_nothing() {
        const COUNT: u32 = 50_000;
        let options = XskOptions { chunk_count: 256, ring_size: 128, fill_level: 100, ..SMALL };
        let (mut xsk, mut kernel) = twin::pair(1, 0, options).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let give_up = Instant::now() + Duration::from_secs(60);
                for i in 0..COUNT {
                    let packet = i.to_ne_bytes().repeat(1 + (i % 300) as usize);
                    while !kernel.deliver(&packet) {
                        assert!(Instant::now() < give_up);
                        std::thread::yield_now();
                    }
                }
            });
            let mut frames = ArrayVec::new();
            let mut expected = 0;
            while expected < COUNT {
                if xsk.receive(&mut frames) == 0 {
                    assert!(ready(&xsk, Duration::from_secs(10)));
                }
                for frame in frames.drain(..) {
                    let packet = xsk.umem().bytes(&frame);
                    assert_eq!(packet.len(), 4 * (1 + expected as usize % 300));
                    assert!(packet.chunks(4).all(|word| word == expected.to_ne_bytes()));
                    expected += 1;
                    xsk.recycle(frame);
                }
            }
        });
        assert_eq!(xsk.counts().unwrap().bad_descriptors, 0);
    }

    #[test]
    fn impossible_options_are_refused() {
        let wrong = [
            XskOptions { chunk_size: 1024, ..SMALL },
            XskOptions { ring_size: 0, ..SMALL },
            XskOptions { ring_size: 6, ..SMALL },
            XskOptions { fill_level: 0, ..SMALL },
            XskOptions { fill_level: 9, ..SMALL },
            XskOptions { chunk_count: 3, ..SMALL },
            XskOptions { chunk_count: u32::MAX, ..SMALL },
        ];
        for options in wrong {
            assert!(matches!(twin::pair(1, 0, options), Err(XskError::Options(_))));
        }
        assert!(XskOptions::default().check().is_ok());
        assert!(XskOptions::default().packet_len_max() > 1500 + 14 + 8);
    }

    #[test]
    fn a_twin_is_not_taken_apart() {
        let (xsk, kernel) = twin::pair(1, 0, SMALL).unwrap();
        let xsk = xsk.into_parts().expect_err("its UMEM is shared");
        drop(kernel);
        xsk.into_parts().expect_err("it has no socket");
    }

    // With the kernel.

    /// Two namespaces joined by a veth pair of two queues each: the near end is the XSK's, the far
    /// end has `10.7.0.2/24`. Each knows the other's link address.
    struct Wire {
        near: NetNs,
        far: NetNs,
        ifindex: u32,
    }

    const NEAR_MAC: [u8; 6] = [2, 0, 0, 0, 7, 1];
    const FAR_MAC: [u8; 6] = [2, 0, 0, 0, 7, 2];

    impl Wire {
        fn new(number: u32) -> Self {
            fn ip(arguments: &str) {
                let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
                let errors = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "ip {arguments}: {errors}");
            }
            let (near, far) = (NetNs::new().unwrap(), NetNs::new().unwrap());
            let name = format!("tg{}x{number}", std::process::id());
            let queues = "numrxqueues 2 numtxqueues 2";
            near.run(|| {
                let path = far.path();
                ip(&format!(
                    "link add {name} address 02:00:00:00:07:01 {queues} type veth \
                     peer name {name} address 02:00:00:00:07:02 {queues} netns {path}"
                ));
                ip(&format!("addr add 10.7.0.1/24 dev {name}"));
                ip(&format!("link set {name} up"));
            });
            far.run(|| {
                ip(&format!("addr add 10.7.0.2/24 dev {name}"));
                ip(&format!("link set {name} up"));
                ip(&format!("neigh add 10.7.0.1 lladdr 02:00:00:00:07:01 dev {name}"));
            });
            let ifindex = near.run(|| link::index(&name).unwrap());
            Self { near, far, ifindex }
        }

        fn bind(&self, queue: u32) -> Result<Xsk, XskError> {
            self.near.run(|| Xsk::bind(self.ifindex, queue, XskOptions::default()))
        }

        /// The steer program's stand-in, with an XSK for queue 0 and one for queue 1.
        fn steer(&self) -> (Redirect, Vec<Xsk>) {
            let redirect = self.near.run(|| Redirect::attach(self.ifindex).unwrap());
            let xsks: Vec<Xsk> = (0..2).map(|queue| self.bind(queue).unwrap()).collect();
            for (queue, xsk) in (0..).zip(&xsks) {
                redirect.set(queue, xsk).unwrap();
            }
            (redirect, xsks)
        }

        fn send_from_far(&self, payloads: impl Iterator<Item = Vec<u8>>) {
            let socket = self.far.run(|| UdpSocket::bind("10.7.0.2:7777").unwrap());
            for payload in payloads {
                socket.send_to(&payload, "10.7.0.1:51820").unwrap();
            }
        }
    }

    /// Payloads of the UDP datagrams from the far end that arrive on any of `xsks`.
    fn payloads(xsks: &mut [Xsk], count: usize) -> Vec<Vec<u8>> {
        let give_up = Instant::now() + Duration::from_secs(10);
        let mut payloads = Vec::new();
        while payloads.len() < count && Instant::now() < give_up {
            let mut fds: Vec<_> = xsks.iter().map(|xsk| PollFd::new(xsk, PollFlags::IN)).collect();
            poll(&mut fds, Duration::from_millis(100)).unwrap();
            for xsk in xsks.iter_mut() {
                for frame in receive(xsk) {
                    let packet = xsk.umem().bytes(&frame);
                    // IPv4, UDP, to our port: the link also carries IPv6's own chatter.
                    if packet[12..14] == [8, 0] && packet[23] == 17 {
                        assert_eq!(packet[..12], [NEAR_MAC, FAR_MAC].concat());
                        let len = usize::from(u16::from_be_bytes([packet[38], packet[39]]));
                        payloads.push(packet[42..34 + len].to_vec());
                    }
                    xsk.recycle(frame);
                }
            }
        }
        payloads
    }

    #[test]
    fn packets_come_from_the_wire() {
        require_root!();
        let wire = Wire::new(0);
        let (_redirect, mut xsks) = wire.steer();
        assert!(xsks.iter().all(|xsk| !xsk.is_zero_copy().unwrap()));
        // More than the UMEM has chunks, so that each goes round.
        for round in 0..10_u8 {
            let sent: Vec<_> = (0..1000).map(|i: usize| vec![round; i % 1400 + 1]).collect();
            wire.send_from_far(sent.iter().cloned());
            assert_eq!(payloads(&mut xsks, 1000), sent);
        }
        for xsk in &xsks {
            assert_eq!(xsk.frames_held(), 0);
            let counts = xsk.counts().unwrap();
            assert_eq!(counts.bad_descriptors, 0);
            assert_eq!((counts.kernel.rx_dropped, counts.kernel.rx_ring_full), (0, 0));
        }
    }

    #[test]
    fn a_bound_xsk_is_rebuilt_with_what_waits_in_its_rings() {
        require_root!();
        let wire = Wire::new(1);
        let (_redirect, mut xsks) = wire.steer();
        wire.send_from_far((0..5).map(|i| vec![i; 100]));
        // Waits until they are all in rings.
        sleep(Duration::from_millis(50));
        let mut held: Vec<Frame> = Vec::new();
        for xsk in &mut xsks {
            held.extend(xsk.allocate());
        }
        let chunks: Vec<usize> = xsks.iter().map(Xsk::pooled).collect();
        let rebuilt: Result<Vec<Xsk>, XskError> = xsks
            .into_iter()
            .map(|xsk| Xsk::from_parts(xsk.into_parts().expect("its UMEM is not shared")))
            .collect();
        let mut xsks = match rebuilt {
            Err(XskError::KernelTooOld) => {
                crate::sys::netns::report_skipped(
                    "a_bound_xsk_is_rebuilt_with_what_waits_in_its_rings",
                    "needs Linux 6.4",
                );
                return;
            }
            rebuilt => rebuilt.unwrap(),
        };
        let expected: Vec<Vec<u8>> = (0..5).map(|i| vec![i; 100]).collect();
        assert_eq!(payloads(&mut xsks, 5), expected);
        for (xsk, pooled) in xsks.iter().zip(chunks) {
            assert_eq!(xsk.frames_held(), 0);
            // The frames that were held at the hand-over are in the pool again.
            assert_eq!(xsk.pooled(), pooled + 1);
        }
        // And on: several times round the rings.
        for _ in 0..5 {
            wire.send_from_far((0..1000).map(|_| vec![9; 100]));
            assert_eq!(payloads(&mut xsks, 1000).len(), 1000);
        }
        assert!(xsks.iter().all(|xsk| xsk.counts().unwrap().bad_descriptors == 0));
        drop(held);
    }

    /// An Ethernet frame with a UDP datagram from the near to the far end, written by hand.
    fn datagram(payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        packet.extend([FAR_MAC, NEAR_MAC].concat());
        packet.extend([8, 0]);
        let len = 20 + 8 + payload.len() as u16;
        let mut ip = [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 7, 0, 1, 10, 7, 0, 2];
        ip[2..4].copy_from_slice(&len.to_be_bytes());
        let sum: u32 =
            ip.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend(ip);
        for field in [51820, 7777, 8 + payload.len() as u16, 0] {
            packet.extend(field.to_be_bytes());
        }
        packet.extend(payload);
        packet
    }

    #[test]
    fn packets_go_to_the_wire_more_than_one_call_sends_and_chunks_come_back() {
        require_root!();
        let wire = Wire::new(2);
        let mut xsk = wire.bind(0).unwrap();
        let socket = wire.far.run(|| UdpSocket::bind("10.7.0.2:7777").unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let pooled = xsk.pooled();
        for round in 0..50_u8 {
            for i in 0..100_u8 {
                let packet = datagram(&[round, i, 7]);
                let mut frame = xsk.allocate().unwrap();
                frame.truncate(packet.len());
                Arc::clone(xsk.umem()).bytes_mut(&mut frame).copy_from_slice(&packet);
                xsk.transmit(frame).unwrap();
            }
            xsk.kick().unwrap();
            for i in 0..100_u8 {
                let mut payload = [0; 64];
                let (len, from) = socket.recv_from(&mut payload).unwrap();
                assert_eq!(payload[..len], [round, i, 7]);
                assert_eq!(from, "10.7.0.1:51820".parse().unwrap());
            }
            xsk.complete();
        }
        let give_up = Instant::now() + Duration::from_secs(10);
        while xsk.pooled() < pooled && Instant::now() < give_up {
            xsk.complete();
            sleep(Duration::from_millis(1));
        }
        assert_eq!((xsk.pooled(), xsk.frames_held()), (pooled, 0));
        let counts = xsk.counts().unwrap();
        assert_eq!((counts.bad_descriptors, counts.kernel.tx_invalid), (0, 0));
    }

    #[test]
    fn a_queue_may_be_bound_again_at_once() {
        require_root!();
        let wire = Wire::new(3);
        for _ in 0..5 {
            drop(wire.bind(0).unwrap());
        }
    }

    #[test]
    fn a_queue_that_stays_busy_is_refused_after_a_second() {
        require_root!();
        let wire = Wire::new(4);
        let _first = wire.bind(0).unwrap();
        let start = Instant::now();
        assert!(matches!(wire.bind(0), Err(XskError::Busy { queue: 0, .. })));
        assert!(start.elapsed() >= BUSY_MAX);
        wire.bind(1).unwrap();
    }

    #[test]
    fn what_cannot_be_bound_says_why() {
        require_root!();
        let wire = Wire::new(5);
        assert!(matches!(wire.bind(2), Err(XskError::NoQueue { queue: 2, .. })));
        wire.near.run(|| {
            let none = Xsk::bind(0x7fff_ffff, 0, SMALL);
            assert!(matches!(none, Err(XskError::NoQueue { .. })));
            let zero_copy = XskOptions { mode: BindMode::ZeroCopy, ..SMALL };
            let refused = Xsk::bind(wire.ifindex, 0, zero_copy);
            assert!(matches!(refused, Err(XskError::NoZeroCopy { .. })));
            let auto = XskOptions { mode: BindMode::Auto, ..SMALL };
            assert!(!Xsk::bind(wire.ifindex, 0, auto).unwrap().is_zero_copy().unwrap());
        });
    }

    #[test]
    fn descriptors_that_are_no_xsk_are_refused() {
        let socket = || OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        let parts = XskParts {
            socket: socket(),
            umem: socket(),
            ifindex: 1,
            queue: 0,
            options: SMALL,
            ours: Vec::new(),
        };
        assert!(matches!(Xsk::from_parts(parts), Err(XskError::NotXsk)));
    }

    #[test]
    fn a_umem_that_is_none_is_refused() {
        require_root!();
        let wire = Wire::new(6);
        let mut parts = wire.bind(0).unwrap().into_parts().expect("not shared");
        parts.umem = OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        assert!(matches!(Xsk::from_parts(parts), Err(XskError::NotXsk)));
    }
}
