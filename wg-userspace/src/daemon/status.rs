//! How things stand: the answer to `tidegate show`.

use serde::Serialize;
use std::collections::BTreeMap;
use wg_common::time::Now;

use crate::handshake::Trouble;
use crate::keeper::choice::By;
use crate::sandbox;

/// What a daemon says of its data path.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The best back end in use: `zerocopy`, `native` or `udp`.
    pub mode: String,
    /// Why this one.
    pub reason: String,
    /// The NICs that were named for XDP.
    pub nics: Vec<Nic>,
    /// Number of workers.
    pub workers: usize,
    /// Whether packets out of the TUN device come to the worker that their peer belongs to.
    pub tun_steering: Steering,
    /// Whether transport data on the listen port comes to the worker that its peer belongs to.
    pub socket_steering: Steering,
    /// Tunnel packets that came to another worker, and were handed on to it.
    pub handed_on: u64,
    /// Batches of this device's workers that others sealed or opened, since one thread was saturated.
    pub fanned_out: u64,
    /// Whether the segment size that a SYN offers is lowered to what the tunnel carries.
    pub mss_clamp: bool,
    /// Whether outer headers get the DSCP of the packets in them.
    pub copy_dscp: bool,
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
    /// Tunnel packets sent, by path.
    pub sent: BTreeMap<&'static str, u64>,
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
    /// What is wrong, the most urgent first: of the device, then of its peers.
    pub troubles: Vec<TroubleStatus>,
    /// How many more peers' troubles there are.
    pub more_troubles: usize,
}

/// Whether the kernel hands packets to the worker that their peer belongs to.
#[derive(Clone, Debug, Serialize)]
pub struct Steering {
    /// Whether it does.
    pub is_on: bool,
    /// Why not, or which ones it does not.
    pub reason: Option<String>,
}

impl Steering {
    /// It does not.
    pub fn off(reason: impl Into<String>) -> Self {
        Self { is_on: false, reason: Some(reason.into()) }
    }
}

/// Most troubles with peers that are told at once.
pub const PEER_TROUBLES_MAX: usize = 64;

/// Something that is wrong.
#[derive(Clone, Debug, Serialize)]
pub struct TroubleStatus {
    /// The peer's public key in base64; none if it is the device's.
    pub peer: Option<String>,
    /// The name of the kind.
    pub kind: &'static str,
    /// How often it has happened.
    pub count: u32,
    /// Seconds since the first time.
    pub since_s: u64,
    /// Seconds since the last time.
    pub last_s: u64,
    /// The address that it is about, if it is about one.
    pub address: Option<String>,
    /// The public key that it is about, if it is about one, in base64.
    pub public_key: Option<String>,
}

impl TroubleStatus {
    /// How it is at `now`.
    pub fn new(trouble: &Trouble, now: Now) -> Self {
        Self {
            peer: trouble.peer.map(|key| key.to_string()),
            kind: trouble.kind.name(),
            count: trouble.spell.count(),
            since_s: trouble.spell.since_s_ago(now),
            last_s: trouble.spell.last_s_ago(now),
            address: trouble.address.clone(),
            public_key: trouble.public_key.map(|key| key.to_string()),
        }
    }
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

/// A NIC that was named for XDP.
#[derive(Clone, Debug, Serialize)]
pub struct Nic {
    /// Its name.
    pub name: String,
    /// Receive queues with an XSK.
    pub queues: u32,
    /// Whether the kernel gives packets to any of the XSKs without copying them.
    pub zero_copy: bool,
    /// How packets come in.
    pub receive: By,
    /// How they leave.
    pub transmit: By,
    /// Why it is so.
    pub reason: String,
}
