//! Explicit congestion notification (RFC 3168) on its way through the tunnel.
//!
//! Where a packet comes out, a mark that its outer header got on the way is carried over to it, as
//! RFC 6040 says, with what the kernel's WireGuard does where a mark meets a packet that does not take
//! part: the RFC drops that, the kernel leaves it as it is, and so do we.

use crate::headers::{IPV4_LEN, IPV6_LEN, checksum_update};

/// The two bits of a TOS byte or traffic class; the other six are the DSCP.
pub const ECN_MASK: u8 = 0b11;
/// The sender does not take part.
pub const NOT_ECT: u8 = 0b00;
/// Congestion experienced: a router's mark.
pub const CE: u8 = 0b11;

/// Carries the mark of an outer header with this TOS byte or traffic class over to the IP packet that came
/// in it. What takes no part, or is no IP packet with a whole header, stays as it is; an IPv4 header
/// checksum that was wrong stays wrong.
#[inline]
pub fn decapsulate(packet: &mut [u8], outer_tos: u8) {
    if outer_tos & ECN_MASK == CE {
        mark(packet);
    }
}

fn mark(packet: &mut [u8]) {
    match packet.first().map(|first| first >> 4) {
        Some(4) => mark_v4(packet),
        Some(6) => mark_v6(packet),
        _ => {}
    }
}

fn mark_v4(packet: &mut [u8]) {
    let Some(header) = packet.first_chunk_mut::<IPV4_LEN>() else { return };
    if header[1] & ECN_MASK == NOT_ECT {
        return;
    }
    let old = u16::from_be_bytes([header[0], header[1]]);
    let new = old | u16::from(CE);
    let checksum = u16::from_be_bytes([header[10], header[11]]);
    header[..2].copy_from_slice(&new.to_be_bytes());
    header[10..12].copy_from_slice(&checksum_update(checksum, old, new).to_be_bytes());
}

fn mark_v6(packet: &mut [u8]) {
    let Some(header) = packet.first_chunk_mut::<IPV6_LEN>() else { return };
    // The lower half of the traffic class is the upper half of the second byte.
    if header[1] >> 4 & ECN_MASK != NOT_ECT {
        header[1] |= CE << 4;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::headers::Checksum;

    /// The ECN that comes out, by the outer one (rows) and the inner one, 0 to 3: RFC 6040, figure 4, but
    /// for the mark on a packet that takes no part, and for ECT(1), which the kernel does not carry over.
    const OUT: [[u8; 4]; 4] = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 3, 3, 3]];

    fn v4(tos: u8, rest: [u8; 18]) -> Vec<u8> {
        let mut packet = vec![0x45, tos];
        packet.extend(rest);
        packet[10..12].fill(0);
        let checksum = Checksum::default().bytes(&packet).finish();
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        packet
    }

    fn v6(class: u8, rest: [u8; 38]) -> Vec<u8> {
        let mut packet = vec![0x60 | class >> 4, class << 4 | rest[0] & 0x0f];
        packet.extend(rest);
        packet
    }

    proptest! {
        #[test]
        fn every_pair_comes_out_as_the_table_says_and_nothing_else_changes(
            outer_dscp in 0..64_u8, inner_dscp in 0..64_u8, rest in any::<[u8; 38]>(),
        ) {
            for (outer, row) in OUT.iter().enumerate() {
                for (inner, &expected) in row.iter().enumerate() {
                    let outer_tos = outer_dscp << 2 | outer as u8;
                    let [before, after] = [inner as u8, expected].map(|ecn| inner_dscp << 2 | ecn);

                    let v4 = |tos| v4(tos, *rest.first_chunk().unwrap());
                    let mut packet = v4(before);
                    decapsulate(&mut packet, outer_tos);
                    prop_assert_eq!(Checksum::default().bytes(&packet).finish(), 0);
                    prop_assert_eq!(packet, v4(after));

                    let mut packet = v6(before, rest);
                    decapsulate(&mut packet, outer_tos);
                    prop_assert_eq!(packet, v6(after, rest));
                }
            }
        }

        #[test]
        fn any_bytes_are_taken(mut packet in prop::collection::vec(any::<u8>(), 0..64), tos: u8) {
            let before = packet.clone();
            decapsulate(&mut packet, tos);
            if before.len() < IPV4_LEN || !matches!(before[0] >> 4, 4 | 6) {
                prop_assert_eq!(packet, before);
            }
        }
    }

    #[test]
    fn a_wrong_checksum_is_not_healed() {
        let mut packet = v4(0b01, [7; 18]);
        packet[10] ^= 0x10;
        decapsulate(&mut packet, CE);
        assert_eq!(packet[1], CE);
        assert_ne!(Checksum::default().bytes(&packet).finish(), 0);
    }
}
