//! The safe twin: an XSK whose other end is ours too, so that rings, frames and all that is built
//! on them can be tested without a kernel, a NIC or privileges, under sanitizers, and against a
//! kernel that misbehaves.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::ring::{Consumer, Producer, Ring};
use super::umem::Umem;
use super::{Backing, Place, Pool, Rings, Xsk, XskError, XskOptions, io_error};
use crate::sys::wait::EventFd;
use crate::sys::xdp::{Descriptor, PACKET_HEADROOM};

/// What the kernel does for an XSK, done by a test.
#[derive(Debug)]
pub struct KernelTwin {
    umem: Arc<Umem>,
    options: XskOptions,
    signals: Arc<Signals>,
    fill: Consumer<u64>,
    rx: Producer<Descriptor>,
    tx: Consumer<Descriptor>,
    completion: Producer<u64>,
    /// Chunks that were taken from the fill or tx ring and not given back yet.
    taken: HashSet<u64>,
    /// Chunks that were given back without having been taken. The XSK may believe it and have a
    /// frame of them, so their bytes are never touched from here again.
    forged: HashSet<u64>,
}

/// What an XSK and its other end tell each other beside the rings.
#[derive(Debug)]
pub struct Signals {
    /// There is something in the rx ring.
    pub(super) delivered: EventFd,
    /// Calls to look at the fill ring, and at the tx ring.
    pub(super) rx_wakes: AtomicU32,
    pub(super) tx_wakes: AtomicU32,
}

/// An XSK that says it is `queue` of the interface, with a UMEM of its own, and its other end.
///
/// # Errors
/// [`XskError::Options`]; [`XskError::Io`] when memory or descriptors are exhausted.
pub fn pair(
    ifindex: u32,
    queue: u32,
    options: XskOptions,
) -> Result<(Pool, Xsk, KernelTwin), XskError> {
    let (mut pool, mut places) = places(1, options)?;
    let (mut xsk, kernel) = on(&pool, places.remove(0), ifindex, queue, options)?;
    pool.admit(&mut xsk);
    Ok((pool, xsk, kernel))
}

/// A pool, and places for so many XSKs to share its UMEM.
///
/// # Errors
/// As [`pair`].
pub fn places(count: usize, options: XskOptions) -> Result<(Pool, Vec<Place>), XskError> {
    options.check()?;
    let pool = Pool::new(Umem::new(&options).map_err(io_error("making a UMEM"))?);
    let places = pool.places(count);
    Ok((pool, places))
}

/// An XSK on one of these places, which is to be admitted, and its other end.
///
/// # Errors
/// As [`pair`].
pub fn on(
    pool: &Pool,
    place: Place,
    ifindex: u32,
    queue: u32,
    options: XskOptions,
) -> Result<(Xsk, KernelTwin), XskError> {
    let (rings, others) = make_rings(options.ring_size).map_err(io_error("making rings"))?;
    let delivered = EventFd::new().map_err(io_error("making an eventfd"))?;
    let (rx_wakes, tx_wakes) = (AtomicU32::new(0), AtomicU32::new(0));
    let signals = Arc::new(Signals { delivered, rx_wakes, tx_wakes });
    let backing = Backing::Twin(Arc::clone(&signals));
    let xsk = Xsk::assemble(backing, (ifindex, queue), options, place, rings);
    let kernel = KernelTwin {
        umem: Arc::clone(pool.umem()),
        options,
        signals,
        fill: Consumer::new(others.fill),
        rx: Producer::new(others.rx),
        tx: Consumer::new(others.tx),
        completion: Producer::new(others.completion),
        taken: HashSet::new(),
        forged: HashSet::new(),
    };
    Ok((xsk, kernel))
}

fn make_rings(size: u32) -> io::Result<(Rings, Rings)> {
    let rings = Rings {
        fill: Ring::in_memory(size)?,
        rx: Ring::in_memory(size)?,
        tx: Ring::in_memory(size)?,
        completion: Ring::in_memory(size)?,
    };
    let others = Rings {
        fill: rings.fill.other_end(),
        rx: rings.rx.other_end(),
        tx: rings.tx.other_end(),
        completion: rings.completion.other_end(),
    };
    Ok((rings, others))
}

impl KernelTwin {
    /// Delivers a packet as the kernel does in copy mode: into the next chunk of the fill ring.
    /// False, and nothing happens, if that ring is empty, the rx ring full, or the packet longer
    /// than a chunk receives.
    pub fn deliver(&mut self, packet: &[u8]) -> bool {
        if packet.len() > self.options.packet_len_max()
            || self.rx.outstanding() == self.options.ring_size
        {
            return false;
        }
        let Some(chunk) = self.take_chunk() else { return false };
        let addr = chunk + u64::from(PACKET_HEADROOM + super::HEADROOM);
        self.copy_in(addr, packet);
        self.deliver_descriptor(Descriptor { addr, len: packet.len() as u32, options: 0 })
    }

    /// Puts any descriptor into the rx ring, true or forged. False if that is full.
    pub fn deliver_descriptor(&mut self, descriptor: Descriptor) -> bool {
        self.give_back(descriptor.addr);
        let written = self.rx.write(descriptor).is_ok();
        self.rx.submit();
        self.signals.delivered.signal();
        written
    }

    /// Takes a chunk from the fill ring, as a driver does that has no packet yet.
    pub fn take_chunk(&mut self) -> Option<u64> {
        let addr = self.fill.read()?;
        self.fill.release();
        self.taken.insert(self.chunk_of(addr));
        Some(addr)
    }

    /// Takes the next packet from the tx ring. [`KernelTwin::complete`] gives its chunk back.
    pub fn take_transmitted(&mut self) -> Option<(u64, Vec<u8>)> {
        let Descriptor { addr, len, .. } = self.tx.read()?;
        self.tx.release();
        self.taken.insert(self.chunk_of(addr));
        Some((addr, self.copy_out(addr, len as usize)))
    }

    /// Puts any address into the completion ring, true or forged. False if that is full.
    pub fn complete(&mut self, addr: u64) -> bool {
        self.give_back(addr);
        let written = self.completion.write(addr).is_ok();
        self.completion.submit();
        written
    }

    /// Says that the XSK has not believed a forged entry, so that nothing has come of it.
    #[cfg(test)]
    pub(super) fn was_refused(&mut self, addr: u64) {
        self.forged.remove(&self.chunk_of(addr));
    }

    /// Asks to be called when there is something in the fill ring, or in the tx ring.
    pub fn sleeps(&mut self, fill: bool, tx: bool) {
        self.fill.ask_for_wakeup(fill);
        self.tx.ask_for_wakeup(tx);
    }

    /// How often it was called for the fill ring, and for the tx ring.
    pub fn wakes(&self) -> [u32; 2] {
        [&self.signals.rx_wakes, &self.signals.tx_wakes].map(|wakes| wakes.load(Ordering::Relaxed))
    }

    fn chunk_of(&self, addr: u64) -> u64 {
        addr / u64::from(self.options.chunk_size)
    }

    fn give_back(&mut self, addr: u64) {
        let chunk = self.chunk_of(addr);
        if !self.taken.remove(&chunk) {
            self.forged.insert(chunk);
        }
    }

    fn copy_in(&self, addr: u64, packet: &[u8]) {
        let start = self.at(addr, packet.len());
        // SAFETY: inside the UMEM, see `at`. The chunk came from the fill ring, to which it goes
        // only when its frame has ended, and was not given back since (`at` checked): no reference
        // to it exists. The indexes of the rings order what the two threads do.
        unsafe { start.copy_from_nonoverlapping(packet.as_ptr(), packet.len()) }
    }

    fn copy_out(&self, addr: u64, len: usize) -> Vec<u8> {
        let start = self.at(addr, len);
        let mut packet = vec![0; len];
        // SAFETY: as in `copy_in`, with the tx ring.
        unsafe { start.copy_to_nonoverlapping(packet.as_mut_ptr(), len) }
        packet
    }

    fn at(&self, addr: u64, len: usize) -> *mut u8 {
        let chunk = self.chunk_of(addr);
        assert!(!self.forged.contains(&chunk), "chunk {chunk} was given back by a forged entry");
        let memory = self.umem.memory();
        let start = usize::try_from(addr).expect("an address in the UMEM");
        assert!(start.checked_add(len).is_some_and(|end| end <= memory.len()));
        memory.base().as_ptr().wrapping_add(start)
    }
}
