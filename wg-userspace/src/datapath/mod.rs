//! The workers: pinned threads that move batches of packets, and what they share with control.
//!
//! Inbound, a worker takes datagrams from its XSKs and sockets, opens transport data in batches and
//! writes the packets to its TUN queue. Outbound it reads the TUN queue, seals in batches and sends
//! from its sockets. Handshake messages go to the `handshake` room through [`handoff`].
//!
//! A worker never waits for another thread, and takes no lock and allocates nothing for a packet
//! once it runs. It must not know how keypairs are made, what a configuration is, or who asks for
//! counters: it reads what control published in [`Shared`] and leaves the rest in bounded queues.

mod answers;
pub mod encap;
pub mod handoff;
pub mod inbound;
pub mod outbound;
mod routing_loop;
pub mod shared;
mod staging;
#[cfg(test)]
mod tests;
mod work_queue;
pub mod worker;

pub use shared::{Shared, SocketGroup};
pub use work_queue::WorkQueue;
pub use worker::{Worker, WorkerEdges, XskPort};

/// Packets that one turn takes from one source, and that one AEAD call sees.
pub const BATCH_LEN: usize = 64;
