//! What stands around a sealed packet: the transport header before it, the padding inside it.

use wg_common::id::{Counter, ReceiverIndex};
use wg_common::protocol::{PADDING_MULTIPLE, TRANSPORT_HEADER_LEN, TYPE_TRANSPORT};

/// The header of a transport data message (whitepaper §5.4.6).
pub fn transport_header(receiver: ReceiverIndex, counter: u64) -> [u8; TRANSPORT_HEADER_LEN] {
    let mut header = [0; TRANSPORT_HEADER_LEN];
    header[0] = TYPE_TRANSPORT;
    header[4..8].copy_from_slice(&receiver.to_wire());
    header[8..].copy_from_slice(&counter.to_le_bytes());
    header
}

/// The counter of a transport data message; `None` if `message` is shorter than its header.
pub fn transport_counter(message: &[u8]) -> Option<Counter> {
    let bytes = message.get(8..TRANSPORT_HEADER_LEN)?;
    Some(Counter(u64::from_le_bytes(bytes.try_into().ok()?)))
}

/// Length to which a packet of `len` bytes is padded before it is sealed: a multiple of 16, but not
/// beyond the MTU (§5.4.6; the clamp is the kernel's, so that a full packet never outgrows the path).
///
/// A packet larger than the MTU stays as it is.
pub fn padded_len(len: usize, mtu: usize) -> usize {
    len.next_multiple_of(PADDING_MULTIPLE).min(mtu.max(len))
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
    fn header_and_counter_are_each_others_inverse() {
        let header =
            transport_header(ReceiverIndex::from_wire([1, 2, 3, 4]), 0x1122_3344_5566_7788);
        assert_eq!(header[..8], [4, 0, 0, 0, 1, 2, 3, 4]);
        assert_eq!(transport_counter(&header), Some(Counter(0x1122_3344_5566_7788)));
        assert_eq!(transport_counter(&header[..15]), None);
    }
}
