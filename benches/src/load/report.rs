//! What `tidegate-load` prints, and what a counter tells who connects to its socket.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::percentiles::Percentiles;

/// What `flood` did.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct FloodReport {
    /// `sockets`, `live` or `xsk`.
    pub by: String,
    /// As on the command line.
    pub size: String,
    /// How many peers sent.
    pub peers: u32,
    /// UDP ports from which they sent.
    pub ports: u16,
    /// Packets that each sent in a row.
    pub burst: u32,
    /// How the handshakes went.
    pub handshakes: HandshakesDone,
    /// Packets that were sealed in advance.
    pub sealed: Sealed,
    /// Packets per second that were asked for; none: as many as will go.
    pub asked_pps: Option<f64>,
    /// Packets sent.
    pub packets: u64,
    /// Bytes of the inner packets that were sent.
    pub bytes: u64,
    /// From the first packet to the last.
    pub seconds: f64,
    /// `packets` per second.
    pub pps: f64,
    /// Packets that the kernel refused; not among `packets`.
    pub refused: u64,
    /// Live frames that found a full ring on their way out: on a veth, the gateway's end did not take them in time.
    /// They are among `packets`.
    pub nic_dropped: u64,
    /// Why it ended: `time`, or `packets` if there were none left.
    pub ended: String,
    /// Whether this machine, not the gateway, held the rate down: it did not keep the rate, or, with `max`, nothing was
    /// lost.
    pub limited_by_sender: bool,
    /// CPU time of the sending thread per packet, in ns.
    pub sender_ns_per_packet: f64,
    /// What a counter saw of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivered: Option<Delivered>,
    /// CPU time of the processes that were named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpu: Vec<CpuTime>,
    /// What a reader should know.
    pub warnings: Vec<String>,
}

/// How the handshakes before a flood went.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct HandshakesDone {
    /// How many were finished: one for each peer.
    pub count: u32,
    /// Initiations that were sent once more.
    pub repeated: u32,
    /// Cookie replies that came.
    pub cookies: u32,
    /// For all of them, with the sealing between them.
    pub seconds: f64,
}

/// Packets sealed in advance.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Sealed {
    /// How many.
    pub packets: u64,
    /// Memory that they take.
    pub bytes: u64,
}

/// What came out of the gateway.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Delivered {
    /// Packets that the counter saw.
    pub packets: u64,
    /// Packets that were sent and not seen.
    pub lost: u64,
    /// `lost` as a part of what was sent.
    pub loss: f64,
    /// Packets that the counter saw per second of sending.
    pub pps: f64,
}

/// CPU time of a process.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct CpuTime {
    /// The process.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// In user mode, while packets were sent and counted.
    pub user_seconds: f64,
    /// In the kernel.
    pub system_seconds: f64,
    /// Both, for a packet that was delivered if that is known, else for one that was sent.
    pub ns_per_packet: f64,
}

/// What `count` saw.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct CountReport {
    /// Packets, those that came as one (GSO) each counted.
    pub packets: u64,
    /// Bytes of the packets with their IP headers.
    pub bytes: u64,
    /// Buffers in which they came.
    pub buffers: u64,
    /// From the first to the last, to about 4 ms.
    pub seconds: f64,
    /// `packets` per second; 0 if all came at once.
    pub pps: f64,
    /// How many packets were so long, by their length in bytes.
    pub by_size: BTreeMap<u32, u64>,
    /// Other packets, which passed.
    pub passed: u64,
}

/// What `handshakes` saw.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct StormReport {
    /// Initiations sent.
    pub sent: u64,
    /// Handshake responses that came in time, to initiations that were sent; each counted once.
    pub answered: u64,
    /// Initiations that were answered by a cookie reply, and sent once more with the cookie.
    pub cookies: u64,
    /// Of responses that were looked at closely afterwards, those that finish their handshake.
    pub verified: u64,
    /// And those that do not.
    pub false_responses: u64,
    /// For how long.
    pub seconds: f64,
    /// `sent` per second.
    pub sent_per_second: f64,
    /// `answered` per second.
    pub answered_per_second: f64,
    /// From an initiation to its response, in µs.
    pub latency_us: Option<Percentiles>,
    /// Why it ended: `time`, or `initiations` if there were none left.
    pub ended: String,
    /// Whether this machine, not the gateway, held the rate down.
    pub limited_by_sender: bool,
    /// What a reader should know.
    pub warnings: Vec<String>,
}

/// What `latency` saw.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct LatencyReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that came back; each counted once.
    pub received: u64,
    /// Those that did not.
    pub lost: u64,
    /// For how long.
    pub seconds: f64,
    /// Datagrams per second that were sent.
    pub rate: f64,
    /// From when each was to be sent until it was back, in µs: a stall counts for all that it held up.
    pub latency_us: Option<Percentiles>,
    /// From when each was sent, in µs: where this is much lower, this machine was late.
    pub from_send_us: Option<Percentiles>,
    /// What a reader should know.
    pub warnings: Vec<String>,
}

/// What `echo` did.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct EchoReport {
    /// Datagrams that were sent back.
    pub echoed: u64,
    /// Datagrams that could not be, or came from the port of another echo.
    pub failed: u64,
}

/// What `loss-free` found.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct LossFreeReport {
    /// The highest rate at which nothing was lost; none if all that were tried lost something.
    pub pps: Option<f64>,
    /// The lowest rate that failed, if one did.
    pub lowest_failed_pps: Option<f64>,
    /// Trials of that rate, in the search and after it, that lost nothing.
    pub clean_trials: u32,
    /// All trials of that rate.
    pub trials: u32,
    /// `clean_trials` as a part of `trials`.
    pub confidence: f64,
    /// Part of the packets that was allowed to be lost.
    pub loss_allowed: f64,
    /// Whether this machine could send no faster than what it found, so that the gateway may do more.
    pub limited_by_sender: bool,
    /// Every rate that was tried, in order.
    pub steps: Vec<Step>,
    /// What a reader should know.
    pub warnings: Vec<String>,
}

/// A rate that was tried.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Step {
    /// Packets per second.
    pub pps: f64,
    /// Whether more than half of the trials were clean.
    pub passed: bool,
    /// The trials.
    pub trials: Vec<Trial>,
}

/// One flood at a rate.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Trial {
    /// Packets sent.
    pub sent: u64,
    /// Packets that the counter saw.
    pub delivered: u64,
    /// Packets per second that were really sent.
    pub pps: f64,
    /// Whether the sender kept the rate.
    pub kept_rate: bool,
}
