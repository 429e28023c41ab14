//! What goes between workers, and from workers to the handshake pool, by bounded queues.
//!
//! Nothing here blocks a worker: a full queue refuses, and the worker counts a drop.

use std::collections::VecDeque;

use crossbeam_queue::ArrayQueue;
use wg_common::endpoint::Endpoint;
use wg_common::id::{DeviceId, PeerId, WorkerId};
use wg_common::protocol::INITIATION_LEN;

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

/// A transport datagram on its way from the worker that received it to its keypair's home.
#[derive(Debug)]
pub struct Parcel {
    /// The datagram, in a buffer that [`ParcelPool`] of worker `origin` lent.
    pub buffer: Box<[u8]>,
    /// Bytes of the datagram in `buffer`.
    pub len: usize,
    /// Where it came from.
    pub from: Endpoint,
    /// The outer header's TOS or traffic class.
    pub tos: u8,
    /// How it came to this host.
    pub path: Path,
    /// Whose pool the buffer goes back to.
    pub origin: WorkerId,
}

/// Buffers for parcels. Their owner takes, the receiver of a parcel gives back; both without a lock.
#[derive(Debug)]
pub struct ParcelPool {
    free: ArrayQueue<Box<[u8]>>,
}

impl ParcelPool {
    /// A pool of `count` buffers of `buffer_len` bytes.
    pub fn new(count: usize, buffer_len: usize) -> Self {
        let free = ArrayQueue::new(count.max(1));
        for _ in 0..count {
            // Zeroed memory that nobody touches costs no page until a parcel needs it.
            let _ = free.push(vec![0; buffer_len].into_boxed_slice());
        }
        Self { free }
    }

    /// Takes a buffer, if one is free.
    pub fn take(&self) -> Option<Box<[u8]>> {
        self.free.pop()
    }

    /// Gives a buffer back.
    pub fn give_back(&self, buffer: Box<[u8]>) {
        // Cannot be full: the pool holds as many places as it made buffers.
        let _ = self.free.push(buffer);
    }
}

/// One worker's ends of the rings to and from every other worker.
pub struct Mesh {
    /// To worker `i`; `None` for the worker itself.
    pub to: Vec<Option<rtrb::Producer<Parcel>>>,
    /// From worker `i`; `None` for the worker itself.
    pub from: Vec<Option<rtrb::Consumer<Parcel>>>,
}

impl Mesh {
    /// Rings of `len` parcels between each two of `worker_count` workers: one mesh for each.
    pub fn between(worker_count: usize, len: usize) -> VecDeque<Mesh> {
        let mut meshes: VecDeque<Mesh> = (0..worker_count)
            .map(|_| Mesh { to: Vec::new(), from: (0..worker_count).map(|_| None).collect() })
            .collect();
        for sender in 0..worker_count {
            for receiver in 0..worker_count {
                if sender == receiver {
                    meshes[sender].to.push(None);
                    continue;
                }
                let (producer, consumer) = rtrb::RingBuffer::new(len);
                meshes[sender].to.push(Some(producer));
                meshes[receiver].from[sender] = Some(consumer);
            }
        }
        meshes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_reaches_every_other() {
        let mut meshes = Mesh::between(3, 4);
        for (i, mesh) in meshes.iter().enumerate() {
            assert_eq!(mesh.to.iter().filter(|p| p.is_some()).count(), 2);
            assert!(mesh.to[i].is_none() && mesh.from[i].is_none());
        }
        let parcel = Parcel {
            buffer: Box::new([7; 4]),
            len: 4,
            from: Endpoint::configured("10.0.0.1:1".parse().unwrap()),
            tos: 0,
            path: Path::Socket,
            origin: WorkerId(0),
        };
        meshes[0].to[2].as_mut().unwrap().push(parcel).unwrap();
        assert!(meshes[1].from[0].as_mut().unwrap().pop().is_err());
        assert_eq!(meshes[2].from[0].as_mut().unwrap().pop().unwrap().buffer[0], 7);
    }

    #[test]
    fn a_pool_lends_no_more_than_it_has() {
        let pool = ParcelPool::new(2, 8);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        assert!(pool.take().is_none());
        pool.give_back(a);
        assert!(pool.take().is_some());
        drop(b);
    }

    #[test]
    fn a_datagram_longer_than_an_initiation_is_refused() {
        let from = Endpoint::configured("[::1]:1".parse().unwrap());
        let make = |len| HandshakeDatagram::new(DeviceId(0), &vec![1; len], from, WorkerId(0));
        assert_eq!(make(148).unwrap().message().len(), 148);
        assert!(make(149).is_none());
    }
}
