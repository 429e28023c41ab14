//! AF_XDP sockets: packets of one queue of a NIC, in memory shared with the kernel.
//!
//! Knows frames and rings, and nothing of what is in a packet. Which packets come is decided by the
//! steer program, to whose XSK map the socket is given (`bpf`); they go to `datapath::inbound`.
//!
//! A chunk's way: pool → *fill* ring → kernel → *rx* ring → [`Frame`] → [`Xsk::recycle`] → pool; or
//! pool → [`Xsk::allocate_to_send`] → [`Frame`] → [`Xsk::transmit`] → *tx* ring → kernel → *completion*
//! ring → pool. Every number that comes from a ring is checked before it becomes a frame. XSKs of several
//! queues and NICs can share a UMEM and its [`Pool`], if one thread serves them.
//!
//! The kernel takes chunks from the fill ring first in, first out, so what is in use goes round all
//! chunks of that ring: as many as ride out a pause of the worker ([`XskOptions::fill_level`]), but
//! not all there are. The pool above it is last in, first out.

mod pool;
mod ring;
pub mod twin;
mod umem;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;

pub use self::pool::{PLACES_MAX, Place, Pool, PoolParts, XskParts};
use self::ring::{Consumer, Producer, Ring};
pub use self::umem::{Frame, Umem, UmemId};
use self::umem::{HEADROOM, Holder};
use crate::sys::errno::{EAFNOSUPPORT, EBUSY, EINVAL, ENOBUFS, ENODEV, EOPNOTSUPP, EPERM};
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

/// An XSK, bound to one queue of one interface. Its chunks come from a [`Pool`], always the same.
///
/// Wait for it with `poll`: readable when something is received.
#[derive(Debug)]
pub struct Xsk {
    backing: Backing,
    ifindex: u32,
    queue: u32,
    options: XskOptions,
    place: Place,
    fill: Producer<u64>,
    rx: Consumer<Descriptor>,
    tx: Producer<Descriptor>,
    completion: Consumer<u64>,
    /// Chunks that are with the kernel, to receive into and to send.
    receiving: u32,
    sending: u32,
    /// Chunks that are set apart to be sent.
    to_send: u32,
    /// Chunks that came to the pool since the fill ring was last looked at.
    recycled: u32,
    /// Whether it may take chunks: what was before it on its place has left.
    is_admitted: bool,
    bad_descriptors: u64,
}

/// Who is at the other end of the rings.
#[derive(Debug)]
enum Backing {
    Kernel(OwnedFd),
    /// A [`twin::KernelTwin`], which signals what it delivers.
    Twin(Arc<twin::Signals>),
}

impl Backing {
    /// Has the other end look at the fill ring.
    fn wake_rx(&self) -> io::Result<()> {
        match self {
            Self::Kernel(socket) => xdp::wake_rx(socket),
            Self::Twin(signals) => {
                signals.rx_wakes.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    /// Has the other end send from the tx ring.
    fn wake_tx(&self) -> io::Result<()> {
        match self {
            Self::Kernel(socket) => xdp::wake_tx(socket),
            Self::Twin(signals) => {
                signals.tx_wakes.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        }
    }
}

/// An AF_XDP socket with its rings, and a UMEM unless it is to share another's, before it is bound and before
/// anybody has mapped them: for a process that may make one, and another that uses it. (Rings of a bound
/// socket can be mapped since Linux 6.4.)
#[derive(Debug)]
pub struct Unbound {
    /// The socket.
    pub socket: OwnedFd,
    /// The memfd of its own UMEM.
    pub umem: Option<OwnedFd>,
    /// How it was made, and is to be bound.
    pub options: XskOptions,
}

impl Unbound {
    /// Makes a socket with a UMEM, which is mapped here only until the kernel has it.
    ///
    /// # Errors
    /// See [`XskError`].
    pub fn new(options: XskOptions) -> Result<Self, XskError> {
        let unbound = Self::without_umem(options)?;
        let umem = Umem::new(&options).map_err(io_error("making a UMEM"))?;
        let registered =
            xdp::register_umem(&unbound.socket, umem.memory(), options.chunk_size, HEADROOM);
        registered.map_err(|error| match error.raw_os_error() {
            Some(ENOBUFS) => XskError::MemoryLimit { len: options.umem_len() },
            Some(EPERM) => XskError::NotPermitted,
            _ => io_error("registering a UMEM")(error),
        })?;
        Ok(Self { umem: Some(umem.into_fd()), ..unbound })
    }

    /// Makes a socket that is to share the UMEM of another, made with the same options.
    ///
    /// # Errors
    /// See [`XskError`].
    pub fn without_umem(options: XskOptions) -> Result<Self, XskError> {
        options.check()?;
        let socket = xdp::open().map_err(|error| match error.raw_os_error() {
            Some(EAFNOSUPPORT) => XskError::NoAfXdp,
            Some(EPERM) => XskError::NotPermitted,
            _ => io_error("opening an AF_XDP socket")(error),
        })?;
        xdp::make_rings(&socket, options.ring_sizes()).map_err(io_error("making rings"))?;
        Ok(Self { socket, umem: None, options })
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
    wait_for_queue(ifindex, queue, || xdp::bind(&socket, ifindex, queue, mode))
}

/// As [`bind`], of a socket that shares the UMEM of `other`, which is bound. It is zero-copy if that is.
///
/// # Errors
/// See [`XskError`]. [`XskError::NoQueue`] also where the kernel shares no UMEM over queues: before Linux
/// 5.10.
pub fn bind_sharing(
    socket: impl AsFd,
    ifindex: u32,
    queue: u32,
    other: impl AsFd,
) -> Result<(), XskError> {
    wait_for_queue(ifindex, queue, || xdp::bind_sharing(&socket, ifindex, queue, other.as_fd()))
}

fn wait_for_queue(
    ifindex: u32,
    queue: u32,
    bind: impl Fn() -> io::Result<()>,
) -> Result<(), XskError> {
    let give_up = Instant::now() + BUSY_MAX;
    loop {
        let Err(error) = bind() else { return Ok(()) };
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
    /// Makes an XSK for `queue` of the interface, with its fill ring full and a UMEM of its own. Packets
    /// come once it is in the steer program's map.
    ///
    /// Waits for a queue that is busy, as [`bind`] does.
    ///
    /// # Errors
    /// See [`XskError`].
    pub fn bind(ifindex: u32, queue: u32, options: XskOptions) -> Result<(Pool, Self), XskError> {
        let (pool, xsk, _) = Self::from_unbound(Unbound::new(options)?, (1, 0), ifindex, queue)?;
        bind(&xsk, ifindex, queue, options.mode)?;
        Ok((pool, xsk))
    }

    /// Takes over a socket with a UMEM that is not bound yet, from this process or another, and fills its fill
    /// ring. It is to be bound to `queue` of the interface then, with [`bind`]. Beside it are the pool, of
    /// which `to_send` chunks are set apart, and the places for others that share the UMEM; with it there
    /// are `place_count`, 1 to [`PLACES_MAX`].
    ///
    /// `unbound` must be used once only, as the parts in [`Pool::from_parts`].
    ///
    /// # Errors
    /// [`XskError::NotXsk`].
    pub fn from_unbound(
        unbound: Unbound,
        (place_count, to_send): (usize, u32),
        ifindex: u32,
        queue: u32,
    ) -> Result<(Pool, Self, Vec<Place>), XskError> {
        let Unbound { socket, umem: Some(umem), options } = unbound else {
            return Err(XskError::NotXsk);
        };
        options.check()?;
        let umem = Umem::from_fd(umem, &options).map_err(|_| XskError::NotXsk)?;
        let mut pool = Pool::new(umem);
        let mut places = pool.places(place_count);
        let place = places.remove(0);
        let rings = Rings::of(&socket, options)?;
        let of = (ifindex, queue);
        let mut xsk = Self::assemble(Backing::Kernel(socket), of, options, place, rings);
        xsk.set_apart_to_send(to_send);
        pool.admit(&mut xsk);
        Ok((pool, xsk, places))
    }

    /// Takes over a socket without a UMEM that is not bound yet, from this process or another. It is to be
    /// bound to `queue` of the interface with [`bind_sharing`], beside an XSK of the UMEM where it gets this
    /// place; then [`Pool::admit`] takes it into service.
    ///
    /// # Errors
    /// [`XskError::NotXsk`], with the place.
    ///
    /// # Panics
    /// If the place is not for this queue: see [`Place::suits`].
    pub fn sharing(
        unbound: Unbound,
        place: Place,
        ifindex: u32,
        queue: u32,
    ) -> Result<Self, (XskError, Place)> {
        assert!(place.suits(ifindex, queue), "the kernel may use the chunks of that place");
        let Unbound { socket, umem: None, options } = unbound else {
            return Err((XskError::NotXsk, place));
        };
        match Rings::of(&socket, options) {
            Ok(rings) => {
                let of = (ifindex, queue);
                Ok(Self::assemble(Backing::Kernel(socket), of, options, place, rings))
            }
            Err(error) => Err((error, place)),
        }
    }

    fn assemble(
        backing: Backing,
        (ifindex, queue): (u32, u32),
        options: XskOptions,
        place: Place,
        rings: Rings,
    ) -> Self {
        Self {
            backing,
            ifindex,
            queue,
            options,
            place,
            fill: Producer::new(rings.fill),
            rx: Consumer::new(rings.rx),
            tx: Producer::new(rings.tx),
            completion: Consumer::new(rings.completion),
            receiving: 0,
            sending: 0,
            to_send: 0,
            recycled: 0,
            is_admitted: false,
            bad_descriptors: 0,
        }
    }

    /// Closes the socket, and gives its place to another. Nothing if the kernel may go on sending what is in
    /// some chunks, and nobody can tell until when: copies that are queued refer to chunks.
    pub fn close(self) -> Option<Place> {
        let Self { backing, ifindex, queue, mut place, sending, is_admitted, .. } = self;
        let zero_copy = match &backing {
            Backing::Kernel(socket) => xdp::is_zero_copy(socket).unwrap_or(true),
            Backing::Twin(_) => false,
        };
        // The kernel waits here until nobody copies into chunks any more.
        drop(backing);
        if !zero_copy && sending > 0 {
            return None;
        }
        // One that was never in use has left nothing, and changes nothing.
        if is_admitted {
            place.left_by = zero_copy.then_some((ifindex, queue));
        }
        Some(place)
    }

    /// Which UMEM its packets are in.
    pub fn umem(&self) -> UmemId {
        self.place.umem
    }

    /// Index of the interface.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// The interface's queue.
    pub fn queue(&self) -> u32 {
        self.queue
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

    /// Adds the packets that have arrived to `frames`, as far as there is room, and gives their
    /// number.
    ///
    /// # Panics
    /// If the pool is another UMEM's.
    pub fn receive(&mut self, pool: &mut Pool, frames: &mut ArrayVec<Frame, BATCH_MAX>) -> usize {
        self.assert_own(pool);
        let before = frames.len();
        // Bounded, so that a broken ring cannot hold us here.
        for _ in 0..frames.remaining_capacity() {
            let Some(descriptor) = self.rx.read() else { break };
            match pool.ledger.frame(descriptor, self.place.seat) {
                Some((frame, had)) => {
                    self.receiving -= u32::from(had != Holder::Unknown);
                    frames.push(frame);
                }
                None => self.bad_descriptors += 1,
            }
        }
        self.rx.release();
        if let Backing::Twin(signals) = &self.backing
            && self.rx.is_empty()
        {
            signals.delivered.drain();
            // What was delivered in between is signalled again.
            if !self.rx.is_empty() {
                signals.delivered.signal();
            }
        }
        frames.len() - before
    }

    /// Looks for packets in the kernel's place, unless some wait already, if the socket
    /// [prefers that](xdp::prefer_busy_poll).
    pub fn poll_nic(&mut self) {
        if self.rx.is_empty() {
            // An interface that is down has none.
            let _ = self.backing.wake_rx();
        }
    }

    /// Takes a frame back that is of no more use; its chunk will be received into again.
    ///
    /// The kernel hears of it from time to time, and at the latest with the last frame.
    ///
    /// # Panics
    /// If the pool or the frame is another UMEM's.
    pub fn recycle(&mut self, pool: &mut Pool, frame: Frame) {
        pool.recycle(frame);
        self.recycled += 1;
        if self.recycled >= REFILL_AT || pool.frames_held() == 0 {
            self.refill(pool);
        }
    }

    /// Brings the fill ring to its level from the pool, and wakes the kernel if it asks for it.
    fn refill(&mut self, pool: &mut Pool) {
        self.assert_own(pool);
        self.recycled = 0;
        // Frames come from here or from others on the same UMEM: while they are held, all make do with less.
        let may_have = (self.part() - self.to_send).saturating_sub(pool.frames_held() as u32);
        let below_level = self.options.fill_level.saturating_sub(self.fill.outstanding());
        for _ in 0..below_level.min(may_have.saturating_sub(self.receiving)) {
            let Some(addr) = pool.ledger.take_for_fill(self.place.seat) else { break };
            self.fill.write(addr).expect("the level is at most the ring's size");
            self.receiving += 1;
        }
        self.fill.submit();
        if self.fill.needs_wakeup() {
            // An interface that is down looks at the ring when it is back.
            let _ = self.backing.wake_rx();
        }
    }

    /// Its part of the chunks of the UMEM.
    fn part(&self) -> u32 {
        self.options.chunk_count / self.place.count
    }

    fn assert_own(&self, pool: &Pool) {
        assert_eq!(pool.id(), self.place.umem, "an XSK is used with its own UMEM");
    }

    /// From now on sets its part of so many chunks of the UMEM apart to be sent: no more are sent at a time,
    /// and never are so many received into that fewer are left. 0, as in the beginning: whoever comes first
    /// has them.
    pub fn set_apart_to_send(&mut self, chunks: u32) {
        self.to_send = chunks.div_ceil(self.place.count).min(self.part());
    }

    /// As [`Pool::allocate`], of the chunks that are set apart. `None` if they are all under way.
    pub fn allocate_to_send(&self, pool: &mut Pool) -> Option<Frame> {
        self.assert_own(pool);
        if self.to_send == 0 || self.sending < self.to_send { pool.allocate() } else { None }
    }

    /// Chunks that were given to be sent, and have not come back.
    pub fn sending(&self) -> usize {
        self.sending as usize
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
    /// If the pool or the frame is another UMEM's.
    pub fn transmit(&mut self, pool: &mut Pool, frame: Frame) -> Result<(), Frame> {
        self.assert_own(pool);
        if self.tx.write(pool.ledger.descriptor(&frame)).is_err() {
            return Err(frame);
        }
        pool.ledger.send(frame, self.place.seat);
        self.sending += 1;
        Ok(())
    }

    /// Has the kernel send what is in the tx ring, as far as the interface takes it now. What is
    /// left goes with the next call.
    ///
    /// # Errors
    /// `ENETDOWN`, `ENXIO` and the like: the interface does not send at all.
    pub fn kick(&mut self) -> io::Result<()> {
        self.tx.submit();
        // A call sends its share only and says so with EAGAIN; it says the same when it cannot go on.
        // Then the ring does not move; but up to Linux 6.12 at least it also does not as long as calls
        // leave some of what they saw. So there are as many as it takes if each sends its share.
        let mut left = self.tx.outstanding();
        let mut shares = left.div_ceil(SENT_PER_CALL);
        while left > 0 && self.tx.needs_wakeup() {
            shares = shares.saturating_sub(1);
            let may_go_on = match self.backing.wake_tx() {
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
    ///
    /// # Panics
    /// If the pool is another UMEM's.
    pub fn complete(&mut self, pool: &mut Pool) -> usize {
        self.assert_own(pool);
        let mut count = 0;
        for _ in 0..self.options.ring_size {
            let Some(addr) = self.completion.read() else { break };
            match pool.ledger.complete(addr, self.place.seat) {
                Some(had) => {
                    self.sending -= u32::from(had != Holder::Unknown);
                    count += 1;
                }
                None => self.bad_descriptors += 1,
            }
        }
        self.completion.release();
        count
    }
}

impl AsFd for Xsk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.backing {
            Backing::Kernel(socket) => socket.as_fd(),
            Backing::Twin(signals) => signals.delivered.as_fd(),
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
    /// Those of a socket that is not bound yet.
    fn of(socket: &OwnedFd, options: XskOptions) -> Result<Self, XskError> {
        options.check()?;
        if !xdp::is_xsk(socket) {
            return Err(XskError::NotXsk);
        }
        let sizes = options.ring_sizes();
        let rings =
            xdp::map_rings(socket, sizes).map_err(io_error("mapping the rings of an XSK"))?;
        Ok(Self::new(rings, sizes))
    }

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

    /// An XSK with the pool of a UMEM that it does not share.
    struct Lone {
        xsk: Xsk,
        pool: Pool,
    }

    fn pair(ifindex: u32, queue: u32, options: XskOptions) -> (Lone, twin::KernelTwin) {
        let (pool, xsk, kernel) = twin::pair(ifindex, queue, options).unwrap();
        (Lone { xsk, pool }, kernel)
    }

    impl Lone {
        fn receive(&mut self, frames: &mut ArrayVec<Frame, BATCH_MAX>) -> usize {
            self.xsk.receive(&mut self.pool, frames)
        }

        fn recycle(&mut self, frame: Frame) {
            self.xsk.recycle(&mut self.pool, frame);
        }

        fn transmit(&mut self, frame: Frame) -> Result<(), Frame> {
            self.xsk.transmit(&mut self.pool, frame)
        }

        fn complete(&mut self) -> usize {
            self.xsk.complete(&mut self.pool)
        }

        fn umem(&self) -> &Arc<Umem> {
            self.pool.umem()
        }
    }

    fn receive(xsk: &mut Lone) -> Vec<Frame> {
        let mut frames = ArrayVec::new();
        assert_eq!(xsk.receive(&mut frames), frames.len());
        frames.into_iter().collect()
    }

    fn ready(xsk: &Lone, timeout: Duration) -> bool {
        poll(&mut [PollFd::new(&xsk.xsk, PollFlags::IN)], timeout).unwrap() == 1
    }

    // With the safe twin.

    #[test]
    fn packets_arrive_in_order_and_may_be_changed_in_place() {
        let (mut xsk, mut kernel) = pair(3, 1, SMALL);
        assert_eq!((xsk.xsk.ifindex(), xsk.xsk.queue()), (3, 1));
        for i in 0..4 {
            assert!(kernel.deliver(&[i; 100]));
        }
        assert!(!kernel.deliver(b"the fill ring is at its level, and that is used up"));
        let mut frames = receive(&mut xsk);
        assert_eq!(xsk.pool.frames_held(), 4);
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
        assert_eq!(xsk.pool.frames_held(), 0);
        assert!(kernel.deliver(b"the last frame refilled the ring"));
    }

    #[test]
    fn payload_of_a_transport_message_is_aligned() {
        let (mut xsk, mut kernel) = pair(1, 0, SMALL);
        kernel.deliver(&[0; 14 + 20 + 8 + 16 + 32]);
        let frame = receive(&mut xsk).remove(0);
        assert_eq!(xsk.umem().bytes(&frame)[58..].as_ptr().addr() % 64, 0);
        xsk.recycle(frame);
    }

    #[test]
    fn chunks_are_used_again_last_in_first_out() {
        let options = XskOptions { fill_level: 1, ..SMALL };
        let (mut xsk, mut kernel) = pair(1, 0, options);
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
        let (mut xsk, mut kernel) = pair(1, 0, SMALL);
        for _ in 0..10 {
            kernel.deliver(b"lost");
            drop(receive(&mut xsk));
        }
        assert_eq!(xsk.pool.frames_held(), 4, "the ring is refilled only by what comes back");
        drop(xsk);
    }

    #[test]
    fn frames_may_outlive_their_xsk() {
        let (mut xsk, mut kernel) = pair(1, 0, SMALL);
        kernel.deliver(b"packet");
        let (frame, umem) = (receive(&mut xsk).remove(0), Arc::clone(xsk.umem()));
        drop(xsk);
        assert_eq!(umem.bytes(&frame), b"packet");
        drop(frame);
    }

    #[test]
    fn a_batch_has_at_most_64_frames_and_the_rest_waits() {
        let options = XskOptions { chunk_count: 256, ring_size: 128, fill_level: 128, ..SMALL };
        let (mut xsk, mut kernel) = pair(1, 0, options);
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
        let (mut xsk, mut kernel) = pair(1, 0, SMALL);
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
        assert_eq!(xsk.xsk.counts().unwrap().bad_descriptors, bad.len() as u64);

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
        let (mut xsk, mut kernel) = pair(1, 0, SMALL);
        let (other, _kernel) = pair(1, 1, SMALL);
        kernel.deliver(b"packet");
        let frame = receive(&mut xsk).remove(0);
        other.umem().bytes(&frame);
    }

    #[test]
    #[should_panic(expected = "its own UMEM")]
    fn a_frame_cannot_be_recycled_elsewhere() {
        let (mut xsk, mut kernel) = pair(1, 0, SMALL);
        let (mut other, _kernel) = pair(1, 1, SMALL);
        kernel.deliver(b"packet");
        other.recycle(receive(&mut xsk).remove(0));
    }

    #[test]
    fn what_is_transmitted_comes_back_by_completion() {
        let (mut xsk, mut kernel) = pair(1, 0, SMALL);
        let pooled = xsk.pool.pooled();
        for i in 0..8 {
            let mut frame = xsk.pool.allocate().unwrap();
            frame.truncate(60);
            Arc::clone(xsk.umem()).bytes_mut(&mut frame).fill(i);
            xsk.transmit(frame).unwrap();
        }
        assert!(kernel.take_transmitted().is_none(), "not before the kick");
        let frame = xsk.pool.allocate().unwrap();
        let frame = xsk.transmit(frame).expect_err("the ring is full");
        xsk.recycle(frame);
        xsk.xsk.kick().unwrap();
        assert_eq!((xsk.pool.frames_held(), xsk.pool.pooled()), (0, pooled - 8));
        for i in 0..8 {
            let (addr, packet) = kernel.take_transmitted().unwrap();
            assert_eq!(packet, [i; 60]);
            assert!(kernel.complete(addr));
        }
        assert_eq!(xsk.complete(), 8);
        assert_eq!(xsk.pool.pooled(), pooled);
        assert!(kernel.complete(0), "a chunk that is in the fill ring");
        assert!(kernel.complete(u64::MAX));
        assert_eq!(xsk.complete(), 0);
        assert_eq!(xsk.xsk.counts().unwrap().bad_descriptors, 2);
    }

    #[test]
    fn allocate_ends_with_the_pool() {
        let (mut xsk, _kernel) = pair(1, 0, SMALL);
        let frames: Vec<Frame> = std::iter::from_fn(|| xsk.pool.allocate()).collect();
        assert_eq!(frames.len(), 12, "four of sixteen are in the fill ring");
        frames.into_iter().for_each(|frame| xsk.recycle(frame));
    }

    #[test]
    fn the_kernel_is_called_when_it_asks_for_it_and_only_then() {
        let (mut xsk, mut kernel) = pair(1, 0, SMALL);
        let mut go_round = |kernel: &mut twin::KernelTwin| {
            assert!(kernel.deliver(b"packet"));
            let frame = receive(&mut xsk).remove(0);
            xsk.transmit(frame).unwrap();
            xsk.xsk.kick().unwrap();
            let (addr, _) = kernel.take_transmitted().unwrap();
            assert!(kernel.complete(addr));
            assert_eq!(xsk.complete(), 1);
            assert!(kernel.deliver(b"packet"));
            let frame = receive(&mut xsk).remove(0);
            xsk.recycle(frame);
        };
        go_round(&mut kernel);
        assert_eq!(kernel.wakes(), [0, 0], "it looks at its rings by itself");
        kernel.sleeps(true, false);
        go_round(&mut kernel);
        assert_eq!(kernel.wakes(), [1, 0], "once, with the last frame");
        kernel.sleeps(false, true);
        go_round(&mut kernel);
        assert_eq!(kernel.wakes(), [1, 1]);
        kernel.sleeps(true, true);
        go_round(&mut kernel);
        assert_eq!(kernel.wakes(), [2, 2]);
        // Without anything to send there is nothing to say.
        xsk.xsk.kick().unwrap();
        assert_eq!(kernel.wakes(), [2, 2]);
    }

    #[test]
    fn a_nic_is_polled_unless_packets_wait() {
        let (mut xsk, mut kernel) = pair(1, 0, SMALL);
        xsk.xsk.poll_nic();
        assert_eq!(kernel.wakes(), [1, 0]);
        assert!(kernel.deliver(b"packet"));
        xsk.xsk.poll_nic();
        assert_eq!(kernel.wakes(), [1, 0]);
        assert_eq!(receive(&mut xsk).len(), 1);
        xsk.xsk.poll_nic();
        assert_eq!(kernel.wakes(), [2, 0]);
    }

    #[test]
    fn two_threads_lose_and_mix_up_nothing() {
        const COUNT: u32 = 50_000;
        let options = XskOptions { chunk_count: 256, ring_size: 128, fill_level: 100, ..SMALL };
        let (mut xsk, mut kernel) = pair(1, 0, options);
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
        assert_eq!(xsk.xsk.counts().unwrap().bad_descriptors, 0);
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
        let (Lone { xsk, pool }, kernel) = pair(1, 0, SMALL);
        let (pool, xsks) = pool.into_parts(vec![xsk]).expect_err("its UMEM is shared");
        drop(kernel);
        pool.into_parts(xsks).expect_err("it has no socket");
    }

    // Several XSKs that share a UMEM.

    /// One packet by an XSK, whose frame is kept.
    fn take(xsk: &mut Xsk, pool: &mut Pool) -> Option<Frame> {
        let mut frames: ArrayVec<Frame, BATCH_MAX> = ArrayVec::new();
        xsk.receive(pool, &mut frames);
        assert!(frames.len() <= 1);
        frames.pop()
    }

    #[test]
    fn what_one_queue_gives_back_another_is_given_last_in_first_out() {
        let options = XskOptions { fill_level: 1, ..SMALL };
        let (mut pool, places) = twin::places(4, options).unwrap();
        let mut queues: Vec<_> = (0..)
            .zip(places)
            .map(|(queue, place)| twin::on(&pool, place, 1, queue, options).unwrap())
            .collect();
        queues.iter_mut().for_each(|(xsk, _)| pool.admit(xsk));
        assert_eq!(pool.pooled(), 12);
        let mut seen = std::collections::BTreeSet::new();
        for round in 0..40 {
            let (xsk, kernel) = &mut queues[round % 4];
            assert!(kernel.deliver(&[round as u8; 60]));
            let frame = take(xsk, &mut pool).unwrap();
            assert_eq!(pool.umem().bytes(&frame), [round as u8; 60]);
            seen.insert(pool.umem().bytes(&frame).as_ptr());
            xsk.recycle(&mut pool, frame);
        }
        assert_eq!(seen.len(), 4, "four are hot, twelve are not touched");
    }

    #[test]
    fn no_queue_takes_what_another_needs() {
        let options = XskOptions { chunk_count: 32, ring_size: 32, fill_level: 32, ..SMALL };
        let (mut pool, places) = twin::places(2, options).unwrap();
        let mut queues: Vec<_> = (0..)
            .zip(places)
            .map(|(queue, place)| twin::on(&pool, place, 1, queue, options).unwrap())
            .collect();
        for (xsk, _) in &mut queues {
            xsk.set_apart_to_send(8);
            pool.admit(xsk);
        }
        // One is flooded, and takes nothing; and sends all that it can, which the NIC does not take.
        let (first, kernel) = &mut queues[0];
        let delivered = (0..100).filter(|_| kernel.deliver(&[0; 60])).count();
        assert_eq!(delivered, 12);
        let sent = (0..100).filter(|_| {
            let Some(frame) = first.allocate_to_send(&mut pool) else { return false };
            first.transmit(&mut pool, frame).is_ok()
        });
        assert_eq!(sent.count(), 4);
        // The other has its part.
        let (second, kernel) = &mut queues[1];
        for _ in 0..5 {
            let delivered = (0..100).filter(|_| kernel.deliver(&[0; 60])).count();
            assert_eq!(delivered, 12);
            while let Some(frame) = {
                let mut frames: ArrayVec<Frame, BATCH_MAX> = ArrayVec::new();
                second.receive(&mut pool, &mut frames);
                let first = frames.pop();
                frames.into_iter().for_each(|frame| second.recycle(&mut pool, frame));
                first
            } {
                second.recycle(&mut pool, frame);
            }
        }
        assert!(second.allocate_to_send(&mut pool).is_some());
    }

    #[test]
    fn a_queue_that_goes_leaves_its_chunks_to_the_one_that_follows() {
        let (mut pool, mut places) = twin::places(2, SMALL).unwrap();
        let (mut stays, mut stays_kernel) = twin::on(&pool, places.remove(0), 1, 0, SMALL).unwrap();
        pool.admit(&mut stays);
        let mut place = places.remove(0);
        for round in 0..20 {
            let (mut xsk, mut kernel) = twin::on(&pool, place, 1, 1, SMALL).unwrap();
            pool.admit(&mut xsk);
            assert_eq!(pool.pooled(), 16 - 8, "four each are in the fill rings");
            // Some chunks are with the kernel, some are received, some wait.
            kernel.take_chunk().unwrap();
            assert!(kernel.deliver(&[round; 60]));
            assert!(kernel.deliver(&[round; 60]));
            let mut frames = ArrayVec::new();
            assert_eq!(xsk.receive(&mut pool, &mut frames), 2);
            xsk.recycle(&mut pool, frames.pop().unwrap());
            assert!(kernel.deliver(&[round; 60]));
            // A frame may be given back after that.
            place = xsk.close().expect("nothing is being sent");
            pool.recycle(frames.pop().unwrap());
            assert!(stays_kernel.deliver(&[round; 60]));
            let frame = take(&mut stays, &mut pool).unwrap();
            stays.recycle(&mut pool, frame);
        }
    }

    #[test]
    fn chunks_that_the_kernel_may_still_send_are_given_to_nobody() {
        let (mut pool, mut places) = twin::places(1, SMALL).unwrap();
        let (mut xsk, _kernel) = twin::on(&pool, places.remove(0), 1, 1, SMALL).unwrap();
        pool.admit(&mut xsk);
        let frame = pool.allocate().unwrap();
        xsk.transmit(&mut pool, frame).unwrap();
        assert!(xsk.close().is_none());
        let place = |left_by| Place { umem: pool.id(), seat: 0, count: 1, left_by };
        assert!(place(None).suits(3, 1));
        assert!(place(Some((3, 1))).suits(3, 1));
        assert!(!place(Some((3, 1))).suits(3, 0) && !place(Some((3, 1))).suits(4, 1));
    }

    #[test]
    #[should_panic(expected = "its own UMEM")]
    fn an_xsk_is_of_no_use_with_another_pool() {
        let (mut one, _kernel) = pair(1, 0, SMALL);
        let (mut other, _kernel) = pair(1, 1, SMALL);
        one.xsk.receive(&mut other.pool, &mut ArrayVec::new());
    }

    mod sharing {
        use proptest::prelude::*;

        use super::*;

        #[derive(Clone, Debug)]
        enum Event {
            /// A packet comes to a queue.
            Deliver(usize),
            /// The driver takes a chunk and drops what it got, which a real one puts back; and says that of
            /// another chunk, or one of another queue: not true.
            Forge(usize, u64),
            ForgeCompletion(usize, u64),
            Receive(usize),
            /// A frame goes back, by any queue.
            Recycle(usize, usize),
            Transmit(usize),
            Complete(usize),
            /// The queue goes, and comes back.
            Reopen(usize),
        }

        const QUEUES: usize = 3;

        fn event() -> impl Strategy<Value = Event> {
            let queue = 0..QUEUES;
            let chunk = 0..30_u64;
            prop_oneof![
                6 => queue.clone().prop_map(Event::Deliver),
                1 => (queue.clone(), chunk.clone()).prop_map(|(queue, at)| Event::Forge(queue, at)),
                1 => (queue.clone(), chunk).prop_map(|(q, at)| Event::ForgeCompletion(q, at)),
                5 => queue.clone().prop_map(Event::Receive),
                6 => (queue.clone(), 0..100_usize).prop_map(|(q, which)| Event::Recycle(q, which)),
                3 => queue.clone().prop_map(Event::Transmit),
                3 => queue.clone().prop_map(Event::Complete),
                1 => queue.prop_map(Event::Reopen),
            ]
        }

        const OPTIONS: XskOptions =
            XskOptions { chunk_count: 24, ring_size: 16, fill_level: 6, ..SMALL };

        fn chunk_of(pool: &Pool, frame: &Frame) -> usize {
            let base = pool.umem().memory().base().as_ptr().addr();
            (pool.umem().bytes(frame).as_ptr().addr() - base) / OPTIONS.chunk_size as usize
        }

        proptest! {
            #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

            /// Whatever is done, and whatever the other side says: each chunk has one owner, no frame's
            /// bytes are another's, and none is lost that nobody has forged.
            #[test]
            fn every_chunk_has_one_owner(events in prop::collection::vec(event(), 1..200)) {
                let (mut pool, places) = twin::places(QUEUES, OPTIONS).unwrap();
                let mut queues: Vec<_> = (0..).zip(places).map(|(queue, place)| {
                    let (mut xsk, kernel) = twin::on(&pool, place, 1, queue, OPTIONS).unwrap();
                    xsk.set_apart_to_send(6);
                    pool.admit(&mut xsk);
                    Some((xsk, kernel))
                }).collect();
                // Of each frame: its chunk, and what is in it.
                let mut held: Vec<(Frame, usize, u8)> = Vec::new();
                // What waits in each rx ring and tx ring, in order: chunk and content, or a forgery.
                let mut received: [std::collections::VecDeque<u8>; QUEUES] = Default::default();
                let mut sent: [std::collections::VecDeque<(usize, u8)>; QUEUES] = Default::default();
                let mut content = 0_u8;
                for event in events {
                    content = content.wrapping_add(1);
                    match event {
                        Event::Deliver(at) => {
                            let (_, kernel) = queues[at].as_mut().unwrap();
                            if kernel.deliver(&[content; 60]) {
                                received[at].push_back(content);
                            }
                        }
                        Event::Forge(at, chunk) => {
                            // Never one that was given to this queue: that would be no forgery, but a driver
                            // that uses a chunk twice.
                            let (xsk, kernel) = queues[at].as_mut().unwrap();
                            let mine = Holder::Receiving(xsk.place.seat);
                            if pool.ledger.holder(chunk) != Some(mine) {
                                let addr = chunk * u64::from(OPTIONS.chunk_size);
                                let whole = Descriptor { addr, len: 60, options: 0 };
                                let before = xsk.bad_descriptors;
                                if received[at].is_empty() && kernel.deliver_descriptor(whole) {
                                    let mut frames: ArrayVec<Frame, BATCH_MAX> = ArrayVec::new();
                                    prop_assert_eq!(xsk.receive(&mut pool, &mut frames), 0);
                                    prop_assert_eq!(xsk.bad_descriptors, before + 1);
                                    kernel.was_refused(addr);
                                }
                            }
                        }
                        Event::ForgeCompletion(at, chunk) => {
                            let (xsk, kernel) = queues[at].as_mut().unwrap();
                            let mine = Holder::Sending(xsk.place.seat);
                            if pool.ledger.holder(chunk) != Some(mine) {
                                let before = pool.pooled();
                                kernel.complete(chunk * u64::from(OPTIONS.chunk_size));
                                prop_assert_eq!(xsk.complete(&mut pool), 0);
                                prop_assert_eq!(pool.pooled(), before);
                                kernel.was_refused(chunk * u64::from(OPTIONS.chunk_size));
                            }
                        }
                        Event::Receive(at) => {
                            let (xsk, _) = queues[at].as_mut().unwrap();
                            let mut frames: ArrayVec<Frame, BATCH_MAX> = ArrayVec::new();
                            xsk.receive(&mut pool, &mut frames);
                            prop_assert_eq!(frames.len(), received[at].len());
                            for frame in frames {
                                let content = received[at].pop_front().unwrap();
                                prop_assert_eq!(pool.umem().bytes(&frame), &[content; 60]);
                                let chunk = chunk_of(&pool, &frame);
                                prop_assert!(held.iter().all(|(_, other, _)| *other != chunk));
                                held.push((frame, chunk, content));
                            }
                        }
                        Event::Recycle(at, which) => {
                            if held.is_empty() { continue }
                            let (frame, _, _) = held.swap_remove(which % held.len());
                            queues[at].as_mut().unwrap().0.recycle(&mut pool, frame);
                        }
                        Event::Transmit(at) => {
                            let (xsk, _) = queues[at].as_mut().unwrap();
                            let Some(mut frame) = xsk.allocate_to_send(&mut pool) else { continue };
                            frame.truncate(60);
                            pool.umem().bytes_mut(&mut frame).fill(content);
                            let chunk = chunk_of(&pool, &frame);
                            prop_assert!(held.iter().all(|(_, other, _)| *other != chunk));
                            xsk.transmit(&mut pool, frame).unwrap();
                            xsk.kick().unwrap();
                            sent[at].push_back((chunk, content));
                        }
                        Event::Complete(at) => {
                            let (xsk, kernel) = queues[at].as_mut().unwrap();
                            let Some((addr, packet)) = kernel.take_transmitted() else {
                                prop_assert!(sent[at].is_empty());
                                continue;
                            };
                            let (chunk, content) = sent[at].pop_front().unwrap();
                            prop_assert_eq!(addr / u64::from(OPTIONS.chunk_size), chunk as u64);
                            prop_assert_eq!(packet, [content; 60]);
                            prop_assert!(kernel.complete(addr));
                            prop_assert_eq!(xsk.complete(&mut pool), 1);
                        }
                        Event::Reopen(at) => {
                            if !sent[at].is_empty() { continue }
                            let (xsk, _kernel) = queues[at].take().unwrap();
                            let place = xsk.close().unwrap();
                            received[at].clear();
                            let next = twin::on(&pool, place, 1, at as u32, OPTIONS).unwrap();
                            let (mut xsk, kernel) = next;
                            xsk.set_apart_to_send(6);
                            pool.admit(&mut xsk);
                            queues[at] = Some((xsk, kernel));
                        }
                    }
                    // What is held has not been touched.
                    for (frame, _, content) in &held {
                        prop_assert_eq!(pool.umem().bytes(frame), &[*content; 60]);
                    }
                    prop_assert_eq!(pool.frames_held(), held.len());
                    let with_kernel = queues.iter().flatten();
                    let with_kernel: u32 =
                        with_kernel.map(|(xsk, _)| xsk.receiving + xsk.sending).sum();
                    let all = pool.pooled() + held.len() + with_kernel as usize;
                    prop_assert_eq!(all, OPTIONS.chunk_count as usize);
                }
                // In the end everybody gets a part again.
                for (frame, _, _) in held {
                    queues[0].as_mut().unwrap().0.recycle(&mut pool, frame);
                }
                for (xsk, kernel) in queues.iter_mut().flatten() {
                    xsk.refill(&mut pool);
                    let mut frames: ArrayVec<Frame, BATCH_MAX> = ArrayVec::new();
                    xsk.receive(&mut pool, &mut frames);
                    frames.into_iter().for_each(|frame| xsk.recycle(&mut pool, frame));
                    let delivered = (0..100).filter(|_| kernel.deliver(&[0; 60])).count();
                    prop_assert_eq!(delivered, 6);
                }
            }
        }
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

        fn bind(&self, queue: u32) -> Result<Lone, XskError> {
            let bound = self.near.run(|| Xsk::bind(self.ifindex, queue, XskOptions::default()));
            bound.map(|(pool, xsk)| Lone { xsk, pool })
        }

        /// The steer program's stand-in, with an XSK for queue 0 and one for queue 1.
        fn steer(&self) -> (Redirect, Vec<Lone>) {
            let redirect = self.near.run(|| Redirect::attach(self.ifindex).unwrap());
            let xsks: Vec<Lone> = (0..2).map(|queue| self.bind(queue).unwrap()).collect();
            for (queue, xsk) in (0..).zip(&xsks) {
                redirect.set(queue, &xsk.xsk).unwrap();
            }
            (redirect, xsks)
        }

        /// A socket at the far end's port. A process that another test is about to start may hold the one before for a
        /// moment.
        fn far_socket(&self) -> UdpSocket {
            let bind = || UdpSocket::bind("10.7.0.2:7777");
            for _ in 0..100 {
                match self.far.run(bind) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                        sleep(Duration::from_millis(10));
                    }
                    bound => return bound.unwrap(),
                }
            }
            panic!("the far end's port stays in use");
        }

        fn send_from_far(&self, payloads: impl Iterator<Item = Vec<u8>>) {
            let socket = self.far_socket();
            for payload in payloads {
                socket.send_to(&payload, "10.7.0.1:51820").unwrap();
            }
        }
    }

    /// Payloads of the UDP datagrams from the far end that arrive on any of `xsks`.
    fn payloads(xsks: &mut [Lone], count: usize) -> Vec<Vec<u8>> {
        let give_up = Instant::now() + Duration::from_secs(10);
        let mut payloads = Vec::new();
        while payloads.len() < count && Instant::now() < give_up {
            let mut fds: Vec<_> =
                xsks.iter().map(|xsk| PollFd::new(&xsk.xsk, PollFlags::IN)).collect();
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
        assert!(xsks.iter().all(|xsk| !xsk.xsk.is_zero_copy().unwrap()));
        // More than the UMEM has chunks, so that each goes round.
        for round in 0..10_u8 {
            let sent: Vec<_> = (0..1000).map(|i: usize| vec![round; i % 1400 + 1]).collect();
            wire.send_from_far(sent.iter().cloned());
            assert_eq!(payloads(&mut xsks, 1000), sent);
        }
        for xsk in &xsks {
            assert_eq!(xsk.pool.frames_held(), 0);
            let counts = xsk.xsk.counts().unwrap();
            assert_eq!(counts.bad_descriptors, 0);
            assert_eq!((counts.kernel.rx_dropped, counts.kernel.rx_ring_full), (0, 0));
        }
    }

    #[test]
    fn who_polls_the_nic_gets_what_comes_in_order() {
        require_root!();
        if let Err(error) = xdp::can_busy_poll() {
            let test = "who_polls_the_nic_gets_what_comes_in_order";
            return crate::sys::netns::report_skipped(test, &error.to_string());
        }
        let wire = Wire::new(12);
        let (_redirect, mut xsks) = wire.steer();
        xsks.iter().for_each(|xsk| xdp::prefer_busy_poll(&xsk.xsk).unwrap());
        for round in 0..4_u8 {
            let sent: Vec<_> = (0..1000).map(|i: usize| vec![round; i % 1400 + 1]).collect();
            wire.send_from_far(sent.iter().cloned());
            xsks.iter_mut().for_each(|xsk| xsk.xsk.poll_nic());
            assert_eq!(payloads(&mut xsks, 1000), sent);
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
            held.extend(xsk.pool.allocate());
        }
        let chunks: Vec<usize> = xsks.iter().map(|xsk| xsk.pool.pooled()).collect();
        let rebuilt: Result<Vec<Lone>, XskError> = xsks
            .into_iter()
            .map(|Lone { xsk, pool }| {
                let parts = pool.into_parts(vec![xsk]).expect("its UMEM is not shared");
                let (pool, mut xsks) = Pool::from_parts(parts)?;
                Ok(Lone { xsk: xsks.remove(0), pool })
            })
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
            assert_eq!(xsk.pool.frames_held(), 0);
            // The frames that were held at the hand-over are in the pool again.
            assert_eq!(xsk.pool.pooled(), pooled + 1);
        }
        // And on: several times round the rings.
        for _ in 0..5 {
            wire.send_from_far((0..1000).map(|_| vec![9; 100]));
            assert_eq!(payloads(&mut xsks, 1000).len(), 1000);
        }
        assert!(xsks.iter().all(|xsk| xsk.xsk.counts().unwrap().bad_descriptors == 0));
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
        let socket = wire.far_socket();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let pooled = xsk.pool.pooled();
        for round in 0..50_u8 {
            for i in 0..100_u8 {
                let packet = datagram(&[round, i, 7]);
                let mut frame = xsk.pool.allocate().unwrap();
                frame.truncate(packet.len());
                Arc::clone(xsk.umem()).bytes_mut(&mut frame).copy_from_slice(&packet);
                xsk.transmit(frame).unwrap();
            }
            xsk.xsk.kick().unwrap();
            for i in 0..100_u8 {
                let mut payload = [0; 64];
                let (len, from) = socket.recv_from(&mut payload).unwrap();
                assert_eq!(payload[..len], [round, i, 7]);
                assert_eq!(from, "10.7.0.1:51820".parse().unwrap());
            }
            xsk.complete();
        }
        let give_up = Instant::now() + Duration::from_secs(10);
        while xsk.pool.pooled() < pooled && Instant::now() < give_up {
            xsk.complete();
            sleep(Duration::from_millis(1));
        }
        assert_eq!((xsk.pool.pooled(), xsk.pool.frames_held()), (pooled, 0));
        let counts = xsk.xsk.counts().unwrap();
        assert_eq!((counts.bad_descriptors, counts.kernel.tx_invalid), (0, 0));
    }

    /// Binds an XSK on that place, beside `other`.
    fn bind_beside(wire: &Wire, queue: u32, place: Place, other: &Xsk) -> Result<Xsk, XskError> {
        let other = other.as_fd();
        wire.near.run(|| {
            let unbound = Unbound::without_umem(XskOptions::default())?;
            let xsk = Xsk::sharing(unbound, place, wire.ifindex, queue).unwrap();
            bind_sharing(&xsk, wire.ifindex, queue, other)?;
            Ok(xsk)
        })
    }

    /// An XSK with a UMEM for several.
    fn bind_first(wire: &Wire, queue: u32, count: usize) -> (Pool, Xsk, Vec<Place>) {
        wire.near.run(|| {
            let options = XskOptions::default();
            let unbound = Unbound::new(options).unwrap();
            let first = Xsk::from_unbound(unbound, (count, 0), wire.ifindex, queue).unwrap();
            bind(&first.1, wire.ifindex, queue, options.mode).unwrap();
            first
        })
    }

    /// Payloads that begin with this may come or not.
    const DOUBTFUL: u8 = 0xee;

    /// The payloads that come by XSKs with one pool.
    fn payloads_of(xsks: &mut [Xsk], pool: &mut Pool, count: usize) -> Vec<Vec<u8>> {
        let give_up = Instant::now() + Duration::from_secs(10);
        let mut payloads = Vec::new();
        while payloads.len() < count && Instant::now() < give_up {
            let mut fds: Vec<_> = xsks.iter().map(|xsk| PollFd::new(xsk, PollFlags::IN)).collect();
            poll(&mut fds, Duration::from_millis(100)).unwrap();
            for xsk in xsks.iter_mut() {
                let mut frames: ArrayVec<Frame, BATCH_MAX> = ArrayVec::new();
                xsk.receive(pool, &mut frames);
                for frame in frames {
                    let packet = pool.umem().bytes(&frame);
                    if packet[12..14] == [8, 0] && packet[23] == 17 {
                        let len = usize::from(u16::from_be_bytes([packet[38], packet[39]]));
                        let payload = &packet[42..34 + len];
                        if payload[0] != DOUBTFUL {
                            payloads.push(payload.to_vec());
                        }
                    }
                    xsk.recycle(pool, frame);
                }
            }
        }
        payloads
    }

    #[test]
    fn queues_and_nics_share_a_umem() {
        require_root!();
        // Two NICs; of the first both queues.
        let (wire, other) = (Wire::new(7), Wire::new(8));
        let (mut pool, first, mut places) = bind_first(&wire, 0, 4);
        let mut place = || places.pop().unwrap();
        let second = bind_beside(&wire, 1, place(), &first).unwrap();
        // Sockets belong to namespaces; UMEMs do not.
        let third = bind_beside(&other, 0, place(), &first).unwrap();
        // Which queue a flow comes by is the kernel's to say.
        let fourth = bind_beside(&other, 1, place(), &first).unwrap();
        let mut xsks = vec![first, second, third, fourth];
        for xsk in &mut xsks {
            xsk.set_apart_to_send(40);
            pool.admit(xsk);
        }
        assert!(xsks.iter().all(|xsk| !xsk.is_zero_copy().unwrap()));
        // Copies leave by calls only; those that share have what the first asked for.
        assert!(xsks.iter().all(|xsk| xsk.tx.needs_wakeup()));
        let redirects =
            [&wire, &other].map(|wire| wire.near.run(|| Redirect::attach(wire.ifindex).unwrap()));
        redirects[0].set(0, &xsks[0]).unwrap();
        redirects[0].set(1, &xsks[1]).unwrap();
        redirects[1].set(0, &xsks[2]).unwrap();
        redirects[1].set(1, &xsks[3]).unwrap();
        for round in 0..10_u8 {
            for wire in [&wire, &other] {
                let mut sent: Vec<_> = (0..1000).map(|i| vec![round; i % 1400 + 1]).collect();
                wire.send_from_far(sent.iter().cloned());
                let mut came = payloads_of(&mut xsks, &mut pool, 1000);
                came.sort();
                sent.sort();
                assert!(came == sent, "round {round}: {} of {}", came.len(), sent.len());
            }
        }
        // And by each something leaves.
        for (at, wire) in [(0, &wire), (1, &wire), (2, &other), (3, &other)] {
            let socket = wire.far_socket();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            for i in 0..200 {
                let packet = datagram(&[at as u8, i, 9]);
                let mut frame = pool.allocate().unwrap();
                frame.truncate(packet.len());
                pool.umem().bytes_mut(&mut frame).copy_from_slice(&packet);
                xsks[at].transmit(&mut pool, frame).unwrap();
                xsks[at].kick().unwrap();
                let mut payload = [0; 64];
                let len = socket.recv(&mut payload).unwrap();
                assert_eq!(payload[..len], [at as u8, i, 9]);
                xsks[at].complete(&mut pool);
            }
        }
        for xsk in &xsks {
            let counts = xsk.counts().unwrap();
            let kernel = counts.kernel;
            assert_eq!((counts.bad_descriptors, kernel.rx_dropped, kernel.fill_invalid), (0, 0, 0));
        }
        let with_kernel: u32 = xsks.iter().map(|xsk| xsk.receiving + xsk.sending).sum();
        assert_eq!(pool.pooled() + with_kernel as usize, 4096);
    }

    #[test]
    fn a_queue_that_shares_a_umem_comes_and_goes_while_another_receives() {
        require_root!();
        let wire = Wire::new(9);
        let (mut pool, first, mut places) = bind_first(&wire, 0, 2);
        let redirect = wire.near.run(|| Redirect::attach(wire.ifindex).unwrap());
        redirect.set(0, &first).unwrap();
        let (mut xsks, mut place) = (vec![first], places.pop());
        for round in 0..5_u8 {
            let mut second = bind_beside(&wire, 1, place.take().unwrap(), &xsks[0]).unwrap();
            pool.admit(&mut second);
            redirect.set(1, &second).unwrap();
            xsks.push(second);
            let sent: Vec<_> = (0..3000).map(|i| vec![round; i % 1400 + 1]).collect();
            for part in sent.chunks(1000) {
                wire.send_from_far(part.iter().cloned());
                let mut came = payloads_of(&mut xsks, &mut pool, 1000);
                let mut part = part.to_vec();
                came.sort();
                part.sort();
                assert!(came == part, "round {round}: {}", came.len());
            }
            // Something waits when it goes.
            wire.send_from_far((0..100).map(|_| vec![DOUBTFUL; 10]));
            place = xsks.pop().unwrap().close();
        }
        // The first goes, the UMEM stays as long as one of them does.
        let second = bind_beside(&wire, 1, place.take().unwrap(), &xsks[0]).unwrap();
        xsks.push(second);
        pool.admit(&mut xsks[1]);
        redirect.set(1, &xsks[1]).unwrap();
        let place = xsks.remove(0).close().unwrap();
        let mut again = bind_beside(&wire, 0, place, &xsks[0]).unwrap();
        pool.admit(&mut again);
        redirect.set(0, &again).unwrap();
        xsks.push(again);
        wire.send_from_far((0..1000).map(|_| vec![7; 100]));
        assert_eq!(payloads_of(&mut xsks, &mut pool, 1000).len(), 1000);
    }

    #[test]
    fn xsks_that_share_a_umem_are_rebuilt_together() {
        require_root!();
        let wire = Wire::new(10);
        let (mut pool, first, mut places) = bind_first(&wire, 0, 2);
        let mut second = bind_beside(&wire, 1, places.pop().unwrap(), &first).unwrap();
        pool.admit(&mut second);
        let redirect = wire.near.run(|| Redirect::attach(wire.ifindex).unwrap());
        let mut xsks = vec![first, second];
        (0..).zip(&xsks).for_each(|(queue, xsk)| redirect.set(queue, xsk).unwrap());
        for is_known in [true, false] {
            wire.send_from_far((0..50).map(|i| vec![i; 100]));
            sleep(Duration::from_millis(50));
            let pooled = pool.pooled();
            let mut parts = pool.into_parts(xsks).unwrap();
            if !is_known {
                // The owner died.
                parts.ours.clear();
            }
            let rebuilt = Pool::from_parts(parts);
            if matches!(rebuilt, Err(XskError::KernelTooOld)) {
                let test = "xsks_that_share_a_umem_are_rebuilt_together";
                return crate::sys::netns::report_skipped(test, "needs Linux 6.4");
            }
            (pool, xsks) = rebuilt.unwrap();
            assert!(pool.pooled() == if is_known { pooled } else { 0 } || pooled < 200);
            for round in 0..5_u8 {
                let count = if round == 0 { 50 } else { 1000 };
                if round > 0 {
                    wire.send_from_far((0..1000).map(|_| vec![round; 100]));
                }
                assert_eq!(payloads_of(&mut xsks, &mut pool, count).len(), count);
            }
            for xsk in &xsks {
                assert_eq!(xsk.counts().unwrap().bad_descriptors, 0);
            }
        }
    }

    #[test]
    fn what_cannot_share_a_umem_is_refused() {
        require_root!();
        let wire = Wire::new(11);
        let (_pool, first, mut places) = bind_first(&wire, 0, 3);
        let mut place = || places.pop().unwrap();
        assert!(matches!(
            bind_beside(&wire, 2, place(), &first),
            Err(XskError::NoQueue { queue: 2, .. })
        ));
        let unbound = wire.near.run(|| Unbound::new(XskOptions::default()).unwrap());
        let (_, not_bound, _) = Xsk::from_unbound(unbound, (1, 0), wire.ifindex, 1).unwrap();
        assert!(bind_beside(&wire, 1, place(), &not_bound).is_err());
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
            assert!(!Xsk::bind(wire.ifindex, 0, auto).unwrap().1.is_zero_copy().unwrap());
        });
    }

    #[test]
    fn descriptors_that_are_no_xsk_are_refused() {
        let socket = || OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        let parts = || PoolParts {
            umem: socket(),
            options: SMALL,
            place_count: 1,
            xsks: vec![XskParts { socket: socket(), ifindex: 1, queue: 0, place: 0 }],
            ours: Vec::new(),
        };
        assert!(matches!(Pool::from_parts(parts()), Err(XskError::NotXsk)));
        let umem = || crate::sys::memory::memfd("test", SMALL.umem_len()).unwrap();
        let parts = || PoolParts { umem: umem(), ..parts() };
        assert!(matches!(Pool::from_parts(parts()), Err(XskError::NotXsk)));
        let unbound = Unbound { socket: socket(), umem: Some(umem()), options: SMALL };
        assert!(matches!(Xsk::from_unbound(unbound, (1, 0), 1, 0), Err(XskError::NotXsk)));
        let (pool, mut places) = twin::places(1, SMALL).unwrap();
        let unbound = Unbound { socket: socket(), umem: None, options: SMALL };
        let refused = Xsk::sharing(unbound, places.remove(0), 1, 0);
        let (XskError::NotXsk, place) = refused.unwrap_err() else { panic!() };
        assert_eq!(place.umem(), pool.id());
    }

    #[test]
    fn a_umem_that_is_none_is_refused() {
        require_root!();
        let wire = Wire::new(6);
        let Lone { xsk, pool } = wire.bind(0).unwrap();
        let mut parts = pool.into_parts(vec![xsk]).expect("not shared");
        parts.umem = OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        assert!(matches!(Pool::from_parts(parts), Err(XskError::NotXsk)));
    }
}
