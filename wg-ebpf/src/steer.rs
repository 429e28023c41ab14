//! Is this datagram ours, and does this queue's XSK get it?

use wg_common::headers::{Bytes, IpVersion, Located, locate};
use wg_common::map::{AddressKey, HEARTBEAT_STALE_NS, QueueKey};
use wg_common::message::{HEAD_LEN, Message, classify_head};
use wg_common::outcome::{DropReason, SteerEvent};

use crate::maps;

/// What becomes of a packet.
pub enum Verdict {
    /// Ours, but no device of ours could do anything with it.
    Drop(DropReason),
    /// The kernel's own stack gets it.
    Pass(SteerEvent),
    /// This entry of the XSK map gets it, or the kernel if the entry is empty.
    Steer {
        /// Index in the XSK map.
        xsk: u32,
    },
}

/// Judges the packet that came on `queue`. In doubt it passes: the kernel hands it to our ordinary
/// socket if it is ours after all.
#[inline(always)]
pub fn steer<P: Bytes>(packet: &P, queue: QueueKey) -> Verdict {
    let Some(at) = locate(packet) else {
        return Verdict::Pass(SteerEvent::PassedForeign);
    };
    if is_ours(packet, &at) != Some(true) {
        return Verdict::Pass(SteerEvent::PassedForeign);
    }
    let message = match classify(packet, &at) {
        Ok(message) => message,
        Err(reason) => return Verdict::Drop(reason),
    };
    if let Message::Response(index) | Message::CookieReply(index) | Message::Transport(index) =
        message
        && !maps::may_live(index)
    {
        return Verdict::Drop(DropReason::UnknownIndex);
    }
    let Some(entry) = maps::queue_entry(&queue) else {
        return Verdict::Pass(SteerEvent::PassedNoXsk);
    };
    if packet.len() > entry.frame_len_max as usize {
        return Verdict::Pass(SteerEvent::PassedTooLong);
    }
    match maps::heartbeat_age_ns(entry.worker) {
        Some(age) if age < HEARTBEAT_STALE_NS => Verdict::Steer { xsk: entry.xsk },
        _ => Verdict::Pass(SteerEvent::PassedStale),
    }
}

/// Whether the datagram goes to a port and an address of ours. The port comes first: it costs
/// least, and nearly all that is not ours ends there.
#[inline(always)]
fn is_ours<P: Bytes>(packet: &P, at: &Located) -> Option<bool> {
    if !maps::is_listen_port(packet.be16(at.udp + 2)?) {
        return Some(false);
    }
    let address = match at.version {
        IpVersion::V4 => AddressKey::v4(packet.read(at.ip + 16)?),
        IpVersion::V6 => {
            let address = AddressKey::v6(packet.read(at.ip + 24)?);
            // `::ffff:a.b.c.d` in a packet is no address of ours, though it is the key of one.
            if address.is_v4() {
                return Some(false);
            }
            address
        }
    };
    Some(maps::is_local(&address))
}

#[inline(always)]
fn classify<P: Bytes>(packet: &P, at: &Located) -> Result<Message, DropReason> {
    let payload = at.payload();
    let whole_head = at.payload_len >= HEAD_LEN;
    // `locate` found the payload inside the packet, so that these reads succeed: if the payload is
    // too short for them, the message is too short as well.
    let Some(head) = packet.read(payload).filter(|_| whole_head) else {
        return Err(DropReason::BadLength);
    };
    let response_receiver = packet.read(payload + HEAD_LEN).unwrap_or_default();
    classify_head(head, response_receiver, at.payload_len)
}
