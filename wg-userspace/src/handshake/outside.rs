//! What the pool needs of the world outside: chance, the wall clock, a way out.

use std::sync::Arc;

use rand_core::CryptoRng;
use wg_common::endpoint::Endpoint;
use wg_common::id::WorkerId;

use crate::datapath::Shared;
use crate::datapath::outbound::{DatagramSink as _, Outgoing};
use crate::noise::Timestamp;
use crate::sys::clock;
use crate::sys::random::Rng;

/// The world as [`Handshakes`](super::Handshakes) knows it. [`Os`] is the real one; simulations bring
/// their own.
pub trait Outside: Send + Sync {
    /// Where randomness comes from.
    type Rng: CryptoRng;

    /// Randomness.
    fn rng(&self) -> Self::Rng;

    /// The wall clock. It may jump.
    fn wall(&self) -> Timestamp;

    /// Sends a message from the sockets of `worker`, with this outer TOS; says whether it went.
    fn send(&self, worker: WorkerId, message: &[u8], to: &Endpoint, tos: u8) -> bool;
}

/// The kernel's randomness and clock, and the device's sockets.
pub struct Os {
    shared: Arc<Shared>,
}

impl Os {
    /// The world of the device that `shared` belongs to.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

impl Outside for Os {
    type Rng = Rng;

    fn rng(&self) -> Rng {
        Rng
    }

    fn wall(&self) -> Timestamp {
        let (secs, nanos) = clock::wall();
        Timestamp::from_unix(secs, nanos)
    }

    fn send(&self, worker: WorkerId, message: &[u8], to: &Endpoint, tos: u8) -> bool {
        let sockets = self.shared.sockets.load();
        let datagram = Outgoing { bytes: message, endpoint: to, tos };
        sockets.of_worker[usize::from(worker.0)].send(&[datagram]).failed == 0
    }
}
