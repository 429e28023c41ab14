//! The UMEM: memory in chunks that we and the kernel pass to and fro, and the book of who has which.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{io, slice};

use super::XskOptions;
use crate::sys::memory::{Memory, memfd, memfd_len};
use crate::sys::xdp::{Descriptor, PACKET_HEADROOM};

/// Bytes before a received packet beyond the kernel's own: with them, the sealed packet of a
/// transport message in IPv4 without VLAN (14 + 20 + 8 + 16 bytes of headers) begins on a multiple
/// of 64, which the AEAD likes.
pub(super) const HEADROOM: u32 = 6;

/// Where packets begin in their chunks, unless an XDP program moved them.
const PACKET_AT: u32 = PACKET_HEADROOM + HEADROOM;
const _: () = assert!((PACKET_AT + 14 + 20 + 8 + 16).is_multiple_of(64));

/// Tells UMEMs apart, so that a frame cannot be used with another's memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct UmemId(u32);

/// The number of an XSK among those that share a UMEM.
pub(super) type Seat = u8;

/// Memory shared with the kernel, in chunks, each of which has one owner at a time: we, as a
/// [`Frame`]; or a ring; or the kernel.
#[derive(Debug)]
pub struct Umem {
    id: UmemId,
    memory: Memory,
    fd: OwnedFd,
    chunk_size: u32,
    chunk_count: u32,
}

/// A chunk that is ours, with the packet in it. Whoever holds it may touch the packet's bytes,
/// through [`Umem::bytes`].
///
/// It is given back with [`super::Xsk::recycle`] or [`super::Xsk::transmit`]; one that is dropped
/// is a chunk lost until the pool is ([`super::Pool::frames_held`] shows it).
#[derive(Debug)]
#[must_use = "a frame that is dropped is lost to its UMEM: recycle or transmit it"]
pub struct Frame {
    umem: UmemId,
    /// Offset of the packet in the UMEM.
    addr: u32,
    len: u32,
}

impl Frame {
    /// Bytes of the packet.
    #[expect(clippy::len_without_is_empty, reason = "a packet has a link header")]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Makes the packet shorter; does nothing if `len` is not less than [`Frame::len`].
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(u32::try_from(len).unwrap_or(u32::MAX));
    }
}

impl Umem {
    pub(super) fn new(options: &XskOptions) -> io::Result<Self> {
        let fd = memfd("tidegate-umem", options.umem_len())?;
        Self::from_fd(fd, options)
    }

    /// # Errors
    /// `InvalidInput` if `fd` is no memfd of sealed size, or not of the size that `options` say.
    pub(super) fn from_fd(fd: OwnedFd, options: &XskOptions) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if memfd_len(&fd)? != options.umem_len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "UMEM of another size"));
        }
        let memory = Memory::shared(&fd, 0, options.umem_len())?;
        let id = UmemId(NEXT.fetch_add(1, Ordering::Relaxed));
        let &XskOptions { chunk_size, chunk_count, .. } = options;
        Ok(Self { id, memory, fd, chunk_size, chunk_count })
    }

    pub(super) fn id(&self) -> UmemId {
        self.id
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// The packet's bytes.
    ///
    /// # Panics
    /// If the frame is another UMEM's.
    pub fn bytes<'a>(&'a self, frame: &'a Frame) -> &'a [u8] {
        let start = self.start(frame);
        // SAFETY: as in `bytes_mut`, but that 'a borrows the frame shared, so that no mutable
        // reference to its bytes exists meanwhile.
        unsafe { slice::from_raw_parts(start, frame.len as usize) }
    }

    /// The packet's bytes, to be changed in place.
    ///
    /// # Panics
    /// If the frame is another UMEM's.
    pub fn bytes_mut<'a>(&'a self, frame: &'a mut Frame) -> &'a mut [u8] {
        let start = self.start(frame);
        // SAFETY: `addr..addr + len` lies inside one chunk of this mapping: frames are made only
        // by `Ledger::frame`, which checks it, they only get shorter, and `start` has checked that
        // this one is ours. The mapping lives for 'a, and its file cannot shrink. Nobody else
        // refers to these bytes: the ledger makes a frame only of a chunk that has none, 'a borrows
        // it mutably, and the kernel writes only to chunks in the rings, to which a chunk goes by
        // giving its frame away.
        unsafe { slice::from_raw_parts_mut(start, frame.len as usize) }
    }

    fn start(&self, frame: &Frame) -> *mut u8 {
        assert_eq!(frame.umem, self.id, "a frame is used with its own UMEM");
        self.memory.base().as_ptr().wrapping_add(frame.addr as usize)
    }
}

/// Who has a chunk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Holder {
    /// We, without a use for it.
    Pool,
    /// We, as a [`Frame`].
    Frame,
    /// The kernel, to receive into: in the fill or rx ring of that XSK, or between.
    Receiving(Seat),
    /// The kernel, to send: in the tx or completion ring of that XSK, or between.
    Sending(Seat),
    /// A predecessor, or the kernel: not known. It comes back if the kernel has it.
    Unknown,
}

/// The book of who has which chunk. It is what makes frames unique: whatever the rings say, a chunk
/// becomes a frame only if the book has it at the other side of just that XSK.
#[derive(Debug)]
pub(super) struct Ledger {
    umem: UmemId,
    chunk_size: u32,
    holders: Vec<Holder>,
    /// Chunks of the pool, the last one used on top: it is likely to be still in a cache.
    pool: Vec<u32>,
    frames: usize,
}

impl Ledger {
    /// All chunks are in the pool.
    pub(super) fn new(umem: &Umem) -> Self {
        let mut ledger = Self::unknown(umem);
        // The first chunk on top.
        (0..umem.chunk_count).rev().for_each(|chunk| ledger.adopt(chunk));
        ledger
    }

    /// Nobody knows where the chunks are.
    pub(super) fn unknown(umem: &Umem) -> Self {
        Self {
            umem: umem.id,
            chunk_size: umem.chunk_size,
            holders: vec![Holder::Unknown; umem.chunk_count as usize],
            pool: Vec::with_capacity(umem.chunk_count as usize),
            frames: 0,
        }
    }

    /// Puts a chunk into the pool of which nothing was known.
    pub(super) fn adopt(&mut self, chunk: u32) {
        if let Some(holder @ Holder::Unknown) = self.holders.get_mut(chunk as usize) {
            *holder = Holder::Pool;
            self.pool.push(chunk);
        }
    }

    /// Notes what a ring says about a chunk of which nothing was known; says whether nothing was.
    pub(super) fn note(&mut self, addr: u64, now: Holder) -> bool {
        let Some(chunk) = self.chunk_of(addr) else { return false };
        let holder = &mut self.holders[chunk as usize];
        let is_news = *holder == Holder::Unknown;
        if is_news {
            *holder = now;
        }
        is_news
    }

    /// Takes a chunk from the pool to be received into, and gives its address for the fill ring.
    pub(super) fn take_for_fill(&mut self, seat: Seat) -> Option<u64> {
        let chunk = self.pool.pop()?;
        self.holders[chunk as usize] = Holder::Receiving(seat);
        Some(u64::from(chunk) * u64::from(self.chunk_size))
    }

    /// Takes a chunk from the pool as a frame whose packet has all the room there is.
    pub(super) fn take_for_frame(&mut self) -> Option<Frame> {
        let chunk = self.pool.pop()?;
        self.holders[chunk as usize] = Holder::Frame;
        self.frames += 1;
        let addr = chunk * self.chunk_size + PACKET_AT;
        Some(Frame { umem: self.umem, addr, len: self.chunk_size - PACKET_AT })
    }

    /// Makes a frame of a descriptor from the rx ring of an XSK, unless it is none that the kernel may give
    /// there: it must be a whole packet, within a chunk that we gave this XSK for receiving. Says who had
    /// the chunk.
    pub(super) fn frame(&mut self, descriptor: Descriptor, seat: Seat) -> Option<(Frame, Holder)> {
        let Descriptor { addr, len, options } = descriptor;
        let chunk = self.chunk_of(addr)?;
        let addr = u32::try_from(addr).ok()?;
        let fits = len <= self.chunk_size - addr % self.chunk_size;
        let holder = &mut self.holders[chunk as usize];
        let is_its = [Holder::Receiving(seat), Holder::Unknown].contains(holder);
        if !fits || !is_its || options != 0 {
            return None;
        }
        let had = std::mem::replace(holder, Holder::Frame);
        self.frames += 1;
        Some((Frame { umem: self.umem, addr, len }, had))
    }

    /// Puts a chunk from the completion ring of an XSK into the pool, and says who had it. Nothing if we did
    /// not give it that XSK for sending.
    pub(super) fn complete(&mut self, addr: u64, seat: Seat) -> Option<Holder> {
        let chunk = self.chunk_of(addr)?;
        let holder = &mut self.holders[chunk as usize];
        if ![Holder::Sending(seat), Holder::Unknown].contains(holder) {
            return None;
        }
        let had = std::mem::replace(holder, Holder::Pool);
        self.pool.push(chunk);
        Some(had)
    }

    /// Puts a frame's chunk into the pool.
    pub(super) fn recycle(&mut self, frame: Frame) {
        let chunk = self.end(frame, Holder::Pool);
        self.pool.push(chunk);
    }

    /// Gives a frame's chunk to be sent by an XSK.
    pub(super) fn send(&mut self, frame: Frame, seat: Seat) {
        self.end(frame, Holder::Sending(seat));
    }

    /// Puts into the pool what an XSK had to which the kernel holds on no more.
    pub(super) fn reclaim(&mut self, seat: Seat) {
        for (chunk, holder) in (0..).zip(&mut self.holders) {
            if [Holder::Receiving(seat), Holder::Sending(seat)].contains(holder) {
                *holder = Holder::Pool;
                self.pool.push(chunk);
            }
        }
    }

    /// # Panics
    /// If the frame is another UMEM's.
    fn end(&mut self, frame: Frame, now: Holder) -> u32 {
        assert_eq!(frame.umem, self.umem, "a frame goes back to its own UMEM");
        let chunk = frame.addr / self.chunk_size;
        let holder = &mut self.holders[chunk as usize];
        debug_assert_eq!(*holder, Holder::Frame, "a frame is the only one of its chunk");
        *holder = now;
        self.frames -= 1;
        chunk
    }

    /// The descriptor of a frame.
    ///
    /// # Panics
    /// If the frame is another UMEM's.
    pub(super) fn descriptor(&self, frame: &Frame) -> Descriptor {
        assert_eq!(frame.umem, self.umem, "a frame is sent by its own XSK");
        Descriptor { addr: frame.addr.into(), len: frame.len, options: 0 }
    }

    /// Frames that callers have, or have lost.
    pub(super) fn frames(&self) -> usize {
        self.frames
    }

    /// Chunks in the pool.
    pub(super) fn pooled(&self) -> usize {
        self.pool.len()
    }

    /// Numbers of the chunks that are ours, in the pool or as frames.
    pub(super) fn ours(&self) -> Vec<u32> {
        let ours = |holder: &Holder| matches!(holder, Holder::Pool | Holder::Frame);
        (0..)
            .zip(&self.holders)
            .filter(|(_, holder)| ours(holder))
            .map(|(chunk, _)| chunk)
            .collect()
    }

    /// Who has a chunk.
    #[cfg(test)]
    pub(super) fn holder(&self, chunk: u64) -> Option<Holder> {
        self.holders.get(chunk as usize).copied()
    }

    fn chunk_of(&self, addr: u64) -> Option<u32> {
        let chunk = u32::try_from(addr / u64::from(self.chunk_size)).ok()?;
        ((chunk as usize) < self.holders.len()).then_some(chunk)
    }
}
