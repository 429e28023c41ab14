//! How things stand: the answer to `tidegate show`.

use serde::Serialize;
use std::collections::BTreeMap;
use wg_common::time::Now;

use crate::sandbox;

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
    /// What this process may still do, if it was confined.
    pub privileges: Option<sandbox::Report>,
    /// Workers that do not move at present.
    pub stuck_workers: usize,
    /// Whether handshakes come faster than we would do them: cookies are demanded.
    pub under_load: bool,
    /// Back end of the AEAD.
    pub aead: String,
    /// Tunnel packets received, by path.
    pub paths: BTreeMap<&'static str, u64>,
    /// Whether, and until when, there are no keypairs.
    pub quiesced: Option<Quiesced>,
    /// How often all sessions were cleared, by why.
    pub sessions_cleared: BTreeMap<&'static str, u64>,
    /// Packets dropped by this process, by reason; without zeros.
    pub drops: BTreeMap<&'static str, u64>,
    /// What the source of pulled peers said, and what came of it; empty if there is none.
    pub peer_source: BTreeMap<&'static str, u64>,
    /// What the steer program counted: events, and drops by reason (without zeros).
    pub steer: BTreeMap<&'static str, u64>,
}

/// A pause without keypairs.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Quiesced {
    /// Seconds that are left of it, rounded up; `None` if it lasts until somebody resumes.
    pub seconds_left: Option<u64>,
}

impl Quiesced {
    /// The pause until `until`, if it is not over.
    pub fn of(until: Now, now: Now) -> Option<Self> {
        let is_endless = until.boot_ns() == u64::MAX;
        let left = until.since(now).as_nanos().div_ceil(1_000_000_000) as u64;
        (now < until).then_some(Self { seconds_left: (!is_endless).then_some(left) })
    }
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
