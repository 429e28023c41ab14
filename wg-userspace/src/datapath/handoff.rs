//! What goes between workers, and from workers to the handshake pool, by bounded queues.
//!
//! Nothing here blocks a worker: a full queue refuses, and the worker counts a drop.

use std::collections::VecDeque;

use wg_common::endpoint::Endpoint;
use wg_common::id::{DeviceId, PeerId, WorkerId};
use wg_common::outcome::DropReason;
use wg_common::protocol::{INITIATION_LEN, TRANSPORT_HEADER_LEN};

use super::fan_out::Rings;
use super::opening::Opening;
use super::outbound::Sealing;
use crate::counters::Path;

/// What a worker leaves to the handshake pool.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "the queue holds messages by value: nothing is allocated for what is not authentic"
)]
pub enum Work {
    /// A datagram that is a handshake message by its length and type; nothing else is checked.
    Datagram(HandshakeDatagram),
    /// Packets wait for a keypair with this peer, or its keypair grows old.
    Initiate(DeviceId, PeerId),
    /// The first packet of a keypair has come from this peer. Who is not told notices it later.
    Confirmed(PeerId),
}

/// A handshake message as it arrived.
#[derive(Clone, Copy, Debug)]
pub struct HandshakeDatagram {
    /// The device on whose port it arrived.
    pub device: DeviceId,
    /// Where it came from, and which address of ours it was sent to.
    pub from: Endpoint,
    /// The worker that received it.
    pub worker: WorkerId,
    len: u8,
    bytes: [u8; INITIATION_LEN],
}

impl HandshakeDatagram {
    /// Copies `message`; `None` if it is longer than any handshake message.
    pub fn new(device: DeviceId, message: &[u8], from: Endpoint, worker: WorkerId) -> Option<Self> {
        let mut bytes = [0; INITIATION_LEN];
        bytes.get_mut(..message.len())?.copy_from_slice(message);
        Some(Self { device, from, worker, len: message.len() as u8, bytes })
    }

    /// The message.
    pub fn message(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// Where the sealed packet of a transport message begins in a [`ParcelBuffer`] is a multiple of this, which
/// the AEAD likes.
const ALIGNMENT: usize = 64;

/// Memory of a parcel.
#[derive(Debug)]
pub struct ParcelBuffer {
    bytes: Box<[u8]>,
    /// Where the datagram begins.
    begin: usize,
}

impl ParcelBuffer {
    /// For datagrams of at most `len` bytes.
    fn new(len: usize) -> Self {
        // Zeroed memory that nobody touches costs no page until a parcel needs it.
        let bytes = vec![0; len + ALIGNMENT].into_boxed_slice();
        // Only speed hangs on it.
        let sealed = bytes.as_ptr().wrapping_add(TRANSPORT_HEADER_LEN);
        let begin = sealed.align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { bytes, begin }
    }

    /// Copies a datagram; `false` if it is too long.
    #[must_use]
    pub fn fill(&mut self, datagram: &[u8]) -> bool {
        let room = self.bytes[self.begin..].get_mut(..datagram.len());
        room.map(|room| room.copy_from_slice(datagram)).is_some()
    }

    /// The first `len` bytes of its datagram.
    ///
    /// # Panics
    /// If it is longer than any.
    pub fn datagram(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.begin..][..len]
    }
}

/// A transport datagram on its way from the worker that received it to its keypair's home.
#[derive(Debug)]
pub struct Parcel {
    /// The datagram, in a buffer that goes back to `origin` by [`ParcelReceiver::give_back`].
    pub buffer: ParcelBuffer,
    /// Bytes of the datagram in `buffer`.
    pub len: usize,
    /// Where it came from.
    pub from: Endpoint,
    /// The outer header's TOS or traffic class.
    pub tos: u8,
    /// How it came to this host.
    pub path: Path,
    /// The worker that sent it.
    pub origin: WorkerId,
}

impl Parcel {
    /// The datagram.
    pub fn datagram(&mut self) -> &mut [u8] {
        self.buffer.datagram(self.len)
    }
}

/// One worker's parcels to the others, with the buffers for them: the one that came back last is the next
/// to be used, since it is likely to be in a cache still.
#[derive(Debug)]
pub struct Outbox {
    /// To worker `i`; `None` for the worker itself.
    to: Vec<Option<ParcelSender>>,
    free: Vec<ParcelBuffer>,
}

#[derive(Debug)]
struct ParcelSender {
    parcels: rtrb::Producer<Parcel>,
    /// Buffers that come back.
    empties: rtrb::Consumer<ParcelBuffer>,
    /// Buffers that have not come back. Never more than either ring is long.
    away: usize,
}

/// Buffers of a worker for each that a ring is long: one worker that stands still cannot hold them all.
const BUFFERS_FOR_EACH: usize = 4;

/// What one worker receives from another.
#[derive(Debug)]
pub struct ParcelReceiver {
    parcels: rtrb::Consumer<Parcel>,
    empties: rtrb::Producer<ParcelBuffer>,
}

impl Outbox {
    /// Makes the buffers, for datagrams of at most `len` bytes, if there is another worker.
    pub fn make_buffers(&mut self, len: usize) {
        let ring_len = self.to.iter().flatten().map(|to| to.parcels.buffer().capacity()).max();
        self.make(ring_len.map_or(0, |ring_len| BUFFERS_FOR_EACH * ring_len), len);
    }

    fn make(&mut self, count: usize, len: usize) {
        self.free.extend((0..count).map(|_| ParcelBuffer::new(len)));
    }

    /// A buffer for a parcel to worker `to`.
    ///
    /// # Errors
    /// [`DropReason::QueueFull`] if as many as one worker may have are on their way to that one or in
    /// use there; [`DropReason::NoBuffer`] if there is none left.
    ///
    /// # Panics
    /// If `to` is the worker itself, or none.
    pub fn take(&mut self, to: WorkerId) -> Result<ParcelBuffer, DropReason> {
        let Self { to: senders, free } = self;
        let sender = senders[usize::from(to.0)].as_mut().expect("a worker is at home at itself");
        sender.reclaim(free);
        if sender.away == sender.parcels.buffer().capacity() {
            return Err(DropReason::QueueFull);
        }
        if free.is_empty() {
            senders.iter_mut().flatten().for_each(|sender| sender.reclaim(free));
        }
        free.pop().ok_or(DropReason::NoBuffer)
    }

    /// Takes a buffer back that is not sent.
    pub fn keep(&mut self, buffer: ParcelBuffer) {
        self.free.push(buffer);
    }

    /// Sends a parcel, whose buffer was taken for this worker.
    pub fn send(&mut self, to: WorkerId, parcel: Parcel) {
        let sender = self.to[usize::from(to.0)].as_mut().expect("a buffer was taken for it");
        sender.away += 1;
        sender.parcels.push(parcel).expect("the ring is as long as there are buffers away");
    }
}

impl ParcelSender {
    fn reclaim(&mut self, free: &mut Vec<ParcelBuffer>) {
        while let Ok(buffer) = self.empties.pop() {
            self.away -= 1;
            free.push(buffer);
        }
    }
}

impl ParcelReceiver {
    /// The oldest parcel.
    pub fn pop(&mut self) -> Option<Parcel> {
        self.parcels.pop().ok()
    }

    /// Number of parcels that wait.
    pub fn len(&self) -> usize {
        self.parcels.slots()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.parcels.is_empty()
    }

    /// Gives the buffer of a parcel from here back to its sender.
    pub fn give_back(&mut self, buffer: ParcelBuffer) {
        let back = self.empties.push(buffer);
        debug_assert!(back.is_ok(), "the ring is as long as there are buffers away");
    }
}

/// One worker's ends of the rings to and from every other worker.
pub struct Mesh {
    /// To the others.
    pub to: Outbox,
    /// From worker `i`; `None` for the worker itself.
    pub from: Vec<Option<ParcelReceiver>>,
    /// For batches that others open.
    pub open: Rings<Opening>,
    /// For batches that others seal.
    pub seal: Rings<Sealing>,
}

impl Mesh {
    /// Rings of `len` parcels between each two of `worker_count` workers: one mesh for each.
    pub fn between(worker_count: usize, len: usize) -> VecDeque<Mesh> {
        let (open, seal) = (Rings::between(worker_count), Rings::between(worker_count));
        let mut meshes: VecDeque<Mesh> = open
            .into_iter()
            .zip(seal)
            .map(|(open, seal)| Mesh {
                to: Outbox { to: Vec::new(), free: Vec::new() },
                from: (0..worker_count).map(|_| None).collect(),
                open,
                seal,
            })
            .collect();
        for sender in 0..worker_count {
            for receiver in 0..worker_count {
                if sender == receiver {
                    meshes[sender].to.to.push(None);
                    continue;
                }
                let (parcels_to, parcels) = rtrb::RingBuffer::new(len);
                let (empties, empties_from) = rtrb::RingBuffer::new(len);
                let sending = ParcelSender { parcels: parcels_to, empties: empties_from, away: 0 };
                meshes[sender].to.to.push(Some(sending));
                meshes[receiver].from[sender] = Some(ParcelReceiver { parcels, empties });
            }
        }
        meshes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = 4;

    fn parcel(mut buffer: ParcelBuffer, origin: u16, bytes: &[u8]) -> Parcel {
        assert!(buffer.fill(bytes));
        let from = Endpoint::configured("10.0.0.1:1".parse().unwrap());
        let origin = WorkerId(origin);
        Parcel { buffer, len: bytes.len(), from, tos: 0, path: Path::Socket, origin }
    }

    fn meshes(worker_count: usize, buffer_count: usize) -> VecDeque<Mesh> {
        let mut meshes = Mesh::between(worker_count, LEN);
        meshes.iter_mut().for_each(|mesh| mesh.to.make(buffer_count, 100));
        meshes
    }

    fn send(from: &mut Mesh, origin: u16, to: u16, bytes: &[u8]) -> Result<(), DropReason> {
        let buffer = from.to.take(WorkerId(to))?;
        from.to.send(WorkerId(to), parcel(buffer, origin, bytes));
        Ok(())
    }

    #[test]
    fn every_worker_reaches_every_other() {
        let mut meshes = meshes(3, 2);
        for from in 0..3_u16 {
            for to in (0..3_u16).filter(|&to| to != from) {
                send(&mut meshes[usize::from(from)], from, to, &[from as u8, to as u8]).unwrap();
            }
        }
        for (to, mesh) in meshes.iter_mut().enumerate() {
            assert!(mesh.from[to].is_none());
            for (from, ring) in mesh.from.iter_mut().enumerate() {
                let Some(ring) = ring else { continue };
                assert_eq!((ring.len(), ring.is_empty()), (1, false));
                let mut parcel = ring.pop().unwrap();
                assert_eq!(parcel.datagram(), [from as u8, to as u8]);
                ring.give_back(parcel.buffer);
                assert!(ring.pop().is_none());
            }
        }
    }

    #[test]
    fn the_buffer_that_came_back_last_is_the_next() {
        let mut meshes = meshes(2, 3);
        let place = |buffer: &ParcelBuffer| buffer.bytes.as_ptr();
        let mut places = Vec::new();
        for _ in 0..2 {
            let buffer = meshes[0].to.take(WorkerId(1)).unwrap();
            places.push(place(&buffer));
            meshes[0].to.send(WorkerId(1), parcel(buffer, 0, &[1]));
        }
        let ring = meshes[1].from[0].as_mut().unwrap();
        let both = [ring.pop().unwrap(), ring.pop().unwrap()];
        both.into_iter().for_each(|parcel| ring.give_back(parcel.buffer));
        for expected in [places[1], places[0]] {
            assert_eq!(place(&meshes[0].to.take(WorkerId(1)).unwrap()), expected);
        }
    }

    #[test]
    fn who_stands_still_holds_no_more_than_its_ring() {
        let mut meshes = meshes(3, 2 * LEN);
        for _ in 0..LEN {
            send(&mut meshes[0], 0, 1, &[1]).unwrap();
        }
        assert_eq!(send(&mut meshes[0], 0, 1, &[1]), Err(DropReason::QueueFull));
        for _ in 0..LEN {
            send(&mut meshes[0], 0, 2, &[2]).unwrap();
        }
        // What is taken out is not back yet.
        let parcel = meshes[1].from[0].as_mut().unwrap().pop().unwrap();
        assert_eq!(send(&mut meshes[0], 0, 1, &[1]), Err(DropReason::QueueFull));
        meshes[1].from[0].as_mut().unwrap().give_back(parcel.buffer);
        send(&mut meshes[0], 0, 1, &[1]).unwrap();
    }

    #[test]
    fn buffers_come_back_from_whoever_has_them() {
        let mut meshes = meshes(3, 1);
        send(&mut meshes[0], 0, 1, &[1]).unwrap();
        assert_eq!(send(&mut meshes[0], 0, 2, &[2]), Err(DropReason::NoBuffer));
        let ring = meshes[1].from[0].as_mut().unwrap();
        let parcel = ring.pop().unwrap();
        ring.give_back(parcel.buffer);
        send(&mut meshes[0], 0, 2, &[2]).unwrap();
    }

    #[test]
    fn who_has_no_others_has_no_buffers() {
        let mut meshes = [1, 2].map(|count| Mesh::between(count, LEN).remove(0).unwrap());
        meshes.iter_mut().for_each(|mesh| mesh.to.make_buffers(100));
        assert_eq!(meshes.map(|mesh| mesh.to.free.len()), [0, 4 * LEN]);
    }

    #[test]
    fn sealed_packets_are_aligned_and_what_is_too_long_is_refused() {
        for len in [0, 1, 16, 2048] {
            let mut buffer = ParcelBuffer::new(len);
            assert!(buffer.fill(&vec![7; len]));
            assert_eq!(buffer.datagram(len), vec![7; len]);
            assert!(!buffer.fill(&vec![7; len + ALIGNMENT + 1]));
            if let Some(sealed) = buffer.datagram(len).get(TRANSPORT_HEADER_LEN..) {
                assert!(sealed.as_ptr().addr().is_multiple_of(ALIGNMENT));
            }
        }
    }

    #[test]
    fn threads_that_exchange_parcels_lose_no_buffer() {
        const COUNT: u32 = 20_000;
        let mut meshes = meshes(2, LEN);
        let mut mesh = meshes.pop_back().unwrap();
        std::thread::scope(|scope| {
            let ring = mesh.from[0].as_mut().unwrap();
            scope.spawn(move || {
                for number in 0..COUNT {
                    let mut parcel = loop {
                        match ring.pop() {
                            Some(parcel) => break parcel,
                            None => std::thread::yield_now(),
                        }
                    };
                    assert_eq!(parcel.datagram(), number.to_be_bytes());
                    ring.give_back(parcel.buffer);
                }
            });
            for number in 0..COUNT {
                while send(&mut meshes[0], 0, 1, &number.to_be_bytes()).is_err() {
                    std::thread::yield_now();
                }
            }
        });
        assert_eq!((0..LEN).filter(|_| meshes[0].to.take(WorkerId(1)).is_ok()).count(), LEN);
        assert_eq!(meshes[0].to.take(WorkerId(1)).unwrap_err(), DropReason::NoBuffer);
    }

    #[test]
    fn a_datagram_longer_than_an_initiation_is_refused() {
        let from = Endpoint::configured("[::1]:1".parse().unwrap());
        let make = |len| HandshakeDatagram::new(DeviceId(0), &vec![1; len], from, WorkerId(0));
        assert_eq!(make(148).unwrap().message().len(), 148);
        assert!(make(149).is_none());
    }
}
