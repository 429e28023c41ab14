//! How things stand: the answer to `tidegate show`.

use serde::Serialize;
use std::collections::BTreeMap;

/// What a daemon says of its data path.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The back end in use: `native` or `udp`.
    pub mode: String,
    /// Why this one.
    pub reason: String,
    /// The NICs with the steer program.
    pub nics: Vec<Nic>,
    /// Number of workers.
    pub workers: usize,
    /// Workers that do not move at present.
    pub stuck_workers: usize,
    /// Whether handshakes come faster than we would do them: cookies are demanded.
    pub under_load: bool,
    /// Back end of the AEAD.
    pub aead: String,
    /// Tunnel packets received, by path.
    pub paths: BTreeMap<&'static str, u64>,
    /// Packets dropped by this process, by reason; without zeros.
    pub drops: BTreeMap<&'static str, u64>,
    /// What the source of pulled peers said, and what came of it; empty if there is none.
    pub peer_source: BTreeMap<&'static str, u64>,
    /// What the steer program counted: events, and drops by reason (without zeros).
    pub steer: BTreeMap<&'static str, u64>,
}

/// A NIC with the steer program.
#[derive(Clone, Debug, Serialize)]
pub struct Nic {
    /// Its name.
    pub name: String,
    /// Receive queues with an XSK.
    pub queues: u32,
    /// Whether the kernel gives packets to the XSKs without copying them.
    pub zero_copy: bool,
}
