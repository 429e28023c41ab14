//! Which packets from the TUN device are our own datagrams: a tunnel routed into itself.
//!
//! The kernel's WireGuard sees the route of what it sends and refuses one that leads into its own
//! device. A datagram of ours passes the whole stack before it comes back, so it is known by what it
//! is: from an address of this host and our listen port to the very endpoint to which it would be sent
//! once more.

use std::net::{IpAddr, SocketAddr};

use wg_common::headers::{PROTOCOL_UDP, inner_packet};
use wg_common::upper::upper;

use super::shared::Shared;

/// Cut-up datagrams that are remembered for their later parts, which come right behind.
const REMEMBERED: usize = 16;

/// What the parts of one datagram have in common.
#[derive(Clone, Copy, Eq, PartialEq)]
struct Whole {
    src: IpAddr,
    dst: IpAddr,
    id: u32,
}

/// The datagrams of ours whose first parts came from the TUN device lately.
#[derive(Default)]
pub struct LoopedFragments {
    /// The newest last; the oldest makes room.
    known: arrayvec::ArrayVec<Whole, REMEMBERED>,
}

impl LoopedFragments {
    /// Whether `packet`, which is to go to `endpoint`, is a datagram of ours, or a part of one whose
    /// first part was seen before.
    pub fn is_ours(&mut self, packet: &[u8], endpoint: SocketAddr, shared: &Shared) -> bool {
        // Nearly every packet goes elsewhere than to the endpoint, and ends here.
        let Ok(inner) = inner_packet(packet) else { return false };
        if inner.dst != endpoint.ip() {
            return false;
        }
        let Some(upper) = upper(packet).filter(|upper| upper.protocol == PROTOCOL_UDP) else {
            return false;
        };
        let whole = |id| Whole { src: inner.src, dst: inner.dst, id };
        if let Some(later) = upper.fragment.filter(|fragment| !fragment.is_first) {
            return self.known.contains(&whole(later.id));
        }
        let ports = packet.get(upper.offset..).and_then(|udp| udp.first_chunk::<4>());
        let Some(&[from_high, from_low, to_high, to_low]) = ports else { return false };
        let ours = u16::from_be_bytes([from_high, from_low]) == shared.sockets.load().port
            && u16::from_be_bytes([to_high, to_low]) == endpoint.port()
            && shared.host_addresses.load().contains(&inner.src);
        if ours && let Some(fragment) = upper.fragment {
            if self.known.is_full() {
                self.known.remove(0);
            }
            self.known.push(whole(fragment.id));
        }
        ours
    }
}
