//! What stands around a sealed packet: the transport header before it, the padding inside it.

use wg_common::id::{Counter, ReceiverIndex};
use wg_common::protocol::{PADDING_MULTIPLE, TRANSPORT_HEADER_LEN, TYPE_TRANSPORT};

/// The header of a transport data message (whitepaper §5.4.6).
#[inline]
pub fn transport_header(receiver: ReceiverIndex, counter: u64) -> [u8; TRANSPORT_HEADER_LEN] {
    // One number, which is written at once: bytes that are put together in memory and read from there as
    // a whole have to wait for each other.
    let index = u32::from_le_bytes(receiver.to_wire());
    let header = u128::from(TYPE_TRANSPORT) | u128::from(index) << 32 | u128::from(counter) << 64;
    header.to_le_bytes()
}

/// The counter of a transport data message; `None` if `message` is shorter than its header.
#[inline]
pub fn transport_counter(message: &[u8]) -> Option<Counter> {
    let bytes = message.get(8..TRANSPORT_HEADER_LEN)?;
    Some(Counter(u64::from_le_bytes(bytes.try_into().ok()?)))
}

/// Length to which a packet of `len` bytes is padded before it is sealed: a multiple of 16, but not
/// beyond the MTU (§5.4.6; the clamp is the kernel's, so that a full packet never outgrows the path).
///
/// A packet larger than the MTU stays as it is.
#[inline]
pub fn padded_len(len: usize, mtu: usize) -> usize {
    len.next_multiple_of(PADDING_MULTIPLE).min(mtu.max(len))
}

/// The outer TOS or traffic class for `packet`: its DSCP if `copy_dscp`, else 0, and its ECN bits as the kernel's WireGuard has them
/// (`INET_ECN_encapsulate`). That is RFC 6040, but for CE, which is carried inside alone and goes as ECT(0).
#[inline]
pub fn outer_tos(packet: &[u8], copy_dscp: bool) -> u8 {
    const ECT_0: u8 = 2;
    const CE: u8 = 3;
    let tos = match packet {
        [first, second, ..] if first >> 4 == 6 => first << 4 | second >> 4,
        [_, second, ..] => *second,
        _ => 0,
    };
    let dscp = if copy_dscp { tos & !CE } else { 0 };
    dscp | if tos & CE == CE { ECT_0 } else { tos & CE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_a_multiple_of_sixteen_below_the_mtu_and_never_beyond_it() {
        assert_eq!(padded_len(0, 1420), 0);
        assert_eq!(padded_len(1, 1420), 16);
        assert_eq!(padded_len(16, 1420), 16);
        assert_eq!(padded_len(129, 1420), 144);
        assert_eq!(padded_len(1408, 1420), 1408);
        assert_eq!(padded_len(1409, 1420), 1420);
        assert_eq!(padded_len(1420, 1420), 1420);
        assert_eq!(padded_len(1500, 1420), 1500, "larger than the MTU: as it is");
        for mtu in [576, 1280, 1420, 9000] {
            for len in 0..=mtu {
                let padded = padded_len(len, mtu);
                assert!(padded >= len && padded <= mtu);
                assert!(padded.is_multiple_of(16) || padded == mtu);
                assert!(padded - len < 16);
            }
        }
    }

    #[test]
    fn ecn_goes_outside_as_the_kernel_does_it_and_dscp_where_that_is_wanted() {
        for (inner, outer) in [(0, 0), (1, 1), (2, 2), (3, 2)] {
            for dscp in (0..=u8::MAX).step_by(4) {
                let tos: u8 = dscp | inner;
                for (copy_dscp, outer) in [(false, outer), (true, dscp | outer)] {
                    let v6 = [0x60 | tos >> 4, tos << 4 | 0x0f, 0, 0];
                    assert_eq!(outer_tos(&[0x45, tos, 0, 0], copy_dscp), outer);
                    assert_eq!(outer_tos(&v6, copy_dscp), outer);
                }
            }
        }
        for copy_dscp in [false, true] {
            assert_eq!((outer_tos(&[], copy_dscp), outer_tos(&[0x63], copy_dscp)), (0, 0));
        }
    }

    #[test]
    fn header_and_counter_are_each_others_inverse() {
        let header =
            transport_header(ReceiverIndex::from_wire([1, 2, 3, 4]), 0x1122_3344_5566_7788);
        assert_eq!(header[..8], [4, 0, 0, 0, 1, 2, 3, 4]);
        assert_eq!(transport_counter(&header), Some(Counter(0x1122_3344_5566_7788)));
        assert_eq!(transport_counter(&header[..15]), None);
    }
}
