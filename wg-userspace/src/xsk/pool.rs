//! The chunks of a UMEM that nobody uses, for all XSKs that share it, and who may take how many.
//!
//! XSKs that share a UMEM are those of one thread, which has the pool: so there are no locks. What is free is
//! last in, first out for all of them together. Each has a **place**, of which there are as many as were asked
//! for in the beginning, and an equal part of the chunks: what one queue holds, however full its rings are, is
//! never lacking to another.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::ring::Ring;
use super::umem::{Frame, Holder, Ledger, Seat, Umem, UmemId};
use super::{Backing, Rings, Xsk, XskError, XskOptions};
use crate::sys::errno::EBUSY;
use crate::sys::xdp;

/// The most XSKs that share a UMEM. Of the usual 4,096 chunks each has 256 then.
pub const PLACES_MAX: usize = 16;

/// The free chunks of a UMEM. Whoever has it serves the XSKs that share the UMEM.
#[derive(Debug)]
pub struct Pool {
    pub(super) umem: Arc<Umem>,
    pub(super) ledger: Ledger,
}

/// The right to be one of the XSKs that share a UMEM.
#[derive(Debug)]
pub struct Place {
    pub(super) umem: UmemId,
    pub(super) seat: Seat,
    /// How many places the UMEM has.
    pub(super) count: u32,
    /// Whose chunks of the place the kernel may still use: a zero-copy XSK on this queue of this interface,
    /// which was closed.
    pub(super) left_by: Option<(u32, u32)>,
}

impl Place {
    /// The UMEM.
    pub fn umem(&self) -> UmemId {
        self.umem
    }

    /// Whether an XSK on this queue of the interface may have it. A driver may use the chunks of a
    /// zero-copy XSK for a while after that was closed; but not any more once another XSK is bound to the
    /// queue, which until then is busy. So only an XSK of the same queue follows.
    pub fn suits(&self, ifindex: u32, queue: u32) -> bool {
        self.left_by.is_none_or(|left_by| left_by == (ifindex, queue))
    }
}

/// What the XSKs that share a UMEM are rebuilt from, in this process or another: descriptors, and what only
/// their owner knows.
#[derive(Debug)]
pub struct PoolParts {
    /// The memfd of the UMEM.
    pub umem: OwnedFd,
    /// The options with which the XSKs were bound.
    pub options: XskOptions,
    /// How many places the UMEM has.
    pub place_count: u32,
    /// The XSKs, each on a place of its own.
    pub xsks: Vec<XskParts>,
    /// Numbers of the chunks that were the owner's, in no ring. Empty if that is not known (the
    /// owner died): those chunks are then out of use.
    pub ours: Vec<u32>,
}

/// One of the XSKs of [`PoolParts`].
#[derive(Debug)]
pub struct XskParts {
    /// The bound socket.
    pub socket: OwnedFd,
    /// The interface to which the socket is bound.
    pub ifindex: u32,
    /// The queue to which it is bound.
    pub queue: u32,
    /// The number of its place.
    pub place: u8,
}

impl Pool {
    pub(super) fn new(umem: Umem) -> Self {
        let ledger = Ledger::new(&umem);
        Self { umem: Arc::new(umem), ledger }
    }

    /// So many places of a pool in which none is taken.
    pub(super) fn places(&self, count: usize) -> Vec<Place> {
        let count = count.clamp(1, PLACES_MAX) as u32;
        let umem = self.umem.id();
        (0..count).map(|seat| Place { umem, seat: seat as Seat, count, left_by: None }).collect()
    }

    /// Which UMEM it is.
    pub fn id(&self) -> UmemId {
        self.umem.id()
    }

    /// The memory in which frames have their bytes.
    pub fn umem(&self) -> &Arc<Umem> {
        &self.umem
    }

    /// Frames that callers have now. One that never comes back was dropped.
    pub fn frames_held(&self) -> usize {
        self.ledger.frames()
    }

    /// Chunks that neither the kernel nor a caller has.
    pub fn pooled(&self) -> usize {
        self.ledger.pooled()
    }

    /// Takes a frame back that is of no more use. [`Xsk::recycle`] does this, too, and sees to it that packets
    /// are received again.
    ///
    /// # Panics
    /// If the frame is another UMEM's.
    pub fn recycle(&mut self, frame: Frame) {
        self.ledger.recycle(frame);
    }

    /// A frame to write a packet into: all room of a chunk, to be cut by [`Frame::truncate`].
    /// `None` if the pool is empty: [`Xsk::complete`] brings back what was sent.
    pub fn allocate(&mut self) -> Option<Frame> {
        self.ledger.take_for_frame()
    }

    /// Takes an XSK into service that was bound: what one before it on its place had left is in the pool
    /// again, and packets can be received.
    ///
    /// # Panics
    /// If the XSK is of another UMEM.
    pub fn admit(&mut self, xsk: &mut Xsk) {
        if !std::mem::replace(&mut xsk.is_admitted, true) {
            self.ledger.reclaim(xsk.place.seat);
        }
        xsk.refill(self);
    }

    /// Takes over bound XSKs. What waits in their rings is not lost.
    ///
    /// The former owner must have stopped using them, and `parts` must be used once only: memory that
    /// two pools share changes under their frames. The kernel cannot tell; a UMEM's descriptor leaves
    /// this room by [`Pool::into_parts`] only, which ends the former owner.
    ///
    /// # Errors
    /// [`XskError::NotXsk`], [`XskError::KernelTooOld`].
    pub fn from_parts(parts: PoolParts) -> Result<(Self, Vec<Xsk>), XskError> {
        let PoolParts { umem, options, place_count, xsks, ours } = parts;
        options.check()?;
        let mut is_free = vec![true; (place_count as usize).min(PLACES_MAX)];
        let mut takes =
            |xsk: &XskParts| is_free.get_mut(usize::from(xsk.place)).is_some_and(std::mem::take);
        if !xsks.iter().all(&mut takes) {
            return Err(XskError::NotXsk);
        }
        let umem = Umem::from_fd(umem, &options).map_err(|_| XskError::NotXsk)?;
        let mut ledger = Ledger::unknown(&umem);
        let id = umem.id();
        let mut rebuilt = Vec::new();
        for XskParts { socket, ifindex, queue, place } in xsks {
            if !xdp::is_xsk(&socket) {
                return Err(XskError::NotXsk);
            }
            let sizes = options.ring_sizes();
            let rings =
                xdp::map_rings(&socket, sizes).map_err(|error| match error.raw_os_error() {
                    Some(EBUSY) => XskError::KernelTooOld,
                    _ => XskError::NotXsk,
                })?;
            let rings = Rings::new(rings, sizes);
            let counts = note(&mut ledger, &rings, place);
            let place = Place { umem: id, seat: place, count: place_count, left_by: None };
            let backing = Backing::Kernel(socket);
            let mut xsk = Xsk::assemble(backing, (ifindex, queue), options, place, rings);
            (xsk.receiving, xsk.sending) = counts;
            xsk.is_admitted = true;
            rebuilt.push(xsk);
        }
        ours.into_iter().for_each(|chunk| ledger.adopt(chunk));
        let mut pool = Self { umem: Arc::new(umem), ledger };
        rebuilt.iter_mut().for_each(|xsk| xsk.refill(&mut pool));
        Ok((pool, rebuilt))
    }

    /// Takes the pool and all its XSKs apart for [`Pool::from_parts`]. Frames that callers still have become
    /// ours again: their bytes cannot be reached any more.
    ///
    /// # Errors
    /// Gives them back while somebody else holds the UMEM (see [`Pool::umem`]), if one of the XSKs is
    /// another's, and if it is a twin.
    pub fn into_parts(self, xsks: Vec<Xsk>) -> Result<PoolParts, (Self, Vec<Xsk>)> {
        let Self { umem, ledger } = self;
        let is_ours =
            |xsk: &Xsk| xsk.place.umem == umem.id() && matches!(xsk.backing, Backing::Kernel(_));
        let Some(first) = xsks.first().filter(|_| xsks.iter().all(is_ours)) else {
            return Err((Self { umem, ledger }, xsks));
        };
        let (options, place_count) = (first.options, first.place.count);
        let umem = match Arc::try_unwrap(umem) {
            Ok(umem) => umem.into_fd(),
            Err(umem) => return Err((Self { umem, ledger }, xsks)),
        };
        let xsks = xsks.into_iter().filter_map(|xsk| match xsk.backing {
            Backing::Kernel(socket) => {
                let Xsk { ifindex, queue, .. } = xsk;
                Some(XskParts { socket, ifindex, queue, place: xsk.place.seat })
            }
            Backing::Twin(_) => None,
        });
        Ok(PoolParts { umem, options, place_count, xsks: xsks.collect(), ours: ledger.ours() })
    }
}

/// Notes which chunks are in the rings of an XSK; counts those to receive into, and those to send.
fn note(ledger: &mut Ledger, rings: &Rings, seat: Seat) -> (u32, u32) {
    let mut count = |addrs: Vec<u64>, holder| {
        addrs.into_iter().filter(|&addr| ledger.note(addr, holder)).count() as u32
    };
    let addrs = |ring: &Ring<xdp::Descriptor>| ring.snapshot().iter().map(|it| it.addr).collect();
    let (receiving, sending) = (Holder::Receiving(seat), Holder::Sending(seat));
    (
        count(rings.fill.snapshot(), receiving) + count(addrs(&rings.rx), receiving),
        count(addrs(&rings.tx), sending) + count(rings.completion.snapshot(), sending),
    )
}
