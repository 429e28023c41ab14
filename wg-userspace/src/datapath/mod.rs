//! The workers, which move batches of packets on pinned threads, and what they share with control.
//!
//! A thread ([`WorkerThread`]) has the XSKs of its queues, and one [`Worker`] of each device that the
//! process serves: it takes frames to the device on whose port they came, and goes round the workers so
//! that none starves. What concerns the thread alone (its heartbeat, who stands in for it) is in
//! [`Crew`], what concerns the device in [`Shared`].
//!
//! Inbound, a worker takes datagrams from its XSKs and sockets, opens transport data in batches and
//! writes the packets to its TUN queue. Outbound it reads the TUN queue, seals in batches and sends
//! from its sockets. Handshake messages go to the `handshake` room through [`handoff`].
//!
//! A worker never waits for another thread, and takes no lock and allocates nothing for a packet
//! once it runs. It must not know how keypairs are made, what a configuration is, or who asks for
//! counters: it reads what control published in [`Shared`] and leaves the rest in bounded queues.

mod answers;
pub mod crew;
pub mod encap;
pub mod fan_out;
pub mod handoff;
pub mod inbound;
mod opening;
pub mod outbound;
mod routing_loop;
pub mod shared;
mod spin;
mod staging;
#[cfg(test)]
mod tests;
pub mod thread;
pub mod transmit;
mod work_queue;
pub mod worker;

pub use crew::{Crew, PortChange, PortId};
pub use shared::{Shared, SocketGroup};
pub use thread::{Ports, WorkerThread, XskPort};
pub use transmit::TX_CHUNKS;
pub use work_queue::WorkQueue;
pub use worker::Worker;

/// Packets that one turn takes from one source, and that one AEAD call sees.
pub const BATCH_LEN: usize = 64;

/// Batches of datagrams that one turn takes from one source, as long as so many of them are dropped at
/// sight that the others make no batch: a flood of what is not ours is emptied before it hides what is.
const BATCHES_MAX: usize = 8;
