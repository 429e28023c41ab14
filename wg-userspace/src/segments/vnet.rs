//! The header before each packet on a TUN queue: what is left to do on it.

/// What the packets of a run are, which the kernel joins to one or cuts from one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SegmentKind {
    /// TCP in IPv4 (TSO).
    TcpV4,
    /// TCP in IPv6 (TSO).
    TcpV6,
    /// UDP in either (USO).
    Udp,
}

/// How a packet is cut into the packets that it stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segments {
    /// What they are.
    pub kind: SegmentKind,
    /// Whether the first of them alone has CWR: the others begin without (RFC 3168 §6.1.2).
    pub has_cwr: bool,
    /// Bytes of the headers that each gets, from the IP header to the end of TCP's or UDP's. The kernel
    /// does not promise that it is right: a hint for who reads.
    pub headers_len: u16,
    /// Bytes that each carries behind its headers, the last one at most so many.
    pub payload_len: u16,
}

/// A checksum that is left to whoever sends the packet on a wire.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PartialChecksum {
    /// Where what it covers begins, in bytes from the start of the packet.
    pub start: u16,
    /// Where it stands, in bytes from `start`. The sum of the pseudo-header is there.
    pub offset: u16,
}

/// `struct virtio_net_hdr` (Virtio 1.2 §5.1.6), as Linux has it before packets of a TUN queue: its numbers
/// are in the host's byte order.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct VnetHeader {
    /// The checksum that is unfinished, if one is.
    pub checksum: Option<PartialChecksum>,
    /// The packets for which this one stands, if it is not one itself.
    pub segments: Option<Segments>,
}

impl VnetHeader {
    /// Bytes of the header.
    pub const LEN: usize = 10;
    /// The header of a packet that is whole.
    pub const PLAIN: Self = Self { checksum: None, segments: None };

    const NEEDS_CHECKSUM: u8 = 1;
    const GSO_NONE: u8 = 0;
    const GSO_TCP_V4: u8 = 1;
    const GSO_TCP_V6: u8 = 4;
    const GSO_UDP: u8 = 5;
    const GSO_ECN: u8 = 0x80;

    /// Reads a header. `None` if it tells of segments of a kind that we have not asked for, or of empty
    /// ones.
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let [flags, gso, ref rest @ ..] = *bytes;
        let word = |at: usize| u16::from_ne_bytes([rest[at], rest[at + 1]]);
        let checksum = (flags & Self::NEEDS_CHECKSUM != 0)
            .then(|| PartialChecksum { start: word(4), offset: word(6) });
        let kind = match gso & !Self::GSO_ECN {
            Self::GSO_NONE => return Some(Self { checksum, segments: None }),
            Self::GSO_TCP_V4 => SegmentKind::TcpV4,
            Self::GSO_TCP_V6 => SegmentKind::TcpV6,
            Self::GSO_UDP => SegmentKind::Udp,
            _ => return None,
        };
        let has_cwr = gso & Self::GSO_ECN != 0;
        let segments = Segments { kind, has_cwr, headers_len: word(0), payload_len: word(2) };
        (segments.payload_len != 0).then_some(Self { checksum, segments: Some(segments) })
    }

    /// The header as the kernel reads it.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        if let Some(PartialChecksum { start, offset }) = self.checksum {
            bytes[0] = Self::NEEDS_CHECKSUM;
            bytes[6..8].copy_from_slice(&start.to_ne_bytes());
            bytes[8..].copy_from_slice(&offset.to_ne_bytes());
        }
        if let Some(segments) = self.segments {
            let kind = match segments.kind {
                SegmentKind::TcpV4 => Self::GSO_TCP_V4,
                SegmentKind::TcpV6 => Self::GSO_TCP_V6,
                SegmentKind::Udp => Self::GSO_UDP,
            };
            bytes[1] = kind | if segments.has_cwr { Self::GSO_ECN } else { 0 };
            bytes[2..4].copy_from_slice(&segments.headers_len.to_ne_bytes());
            bytes[4..6].copy_from_slice(&segments.payload_len.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_whole_packet_has_zeros_before_it() {
        assert_eq!(VnetHeader::PLAIN.to_bytes(), [0; VnetHeader::LEN]);
        assert_eq!(VnetHeader::from_bytes(&[0; _]), Some(VnetHeader::PLAIN));
        // "The checksum was looked at" asks for nothing.
        assert_eq!(
            VnetHeader::from_bytes(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            Some(VnetHeader::PLAIN)
        );
    }

    #[test]
    fn what_is_not_asked_for_or_empty_is_refused() {
        // UFO, the tunnels' kinds, one that there is not.
        for gso in [3, 0x20, 0x40, 6, 0x81 | 0x20] {
            assert_eq!(VnetHeader::from_bytes(&[1, gso, 1, 1, 1, 1, 1, 1, 1, 1]), None, "{gso}");
        }
        assert_eq!(VnetHeader::from_bytes(&[1, 1, 40, 40, 0, 0, 20, 20, 16, 16]), None);
    }

    #[test]
    fn fields_stand_where_the_kernel_has_them() {
        let header = VnetHeader {
            checksum: Some(PartialChecksum { start: 0x1111, offset: 0x2222 }),
            segments: Some(Segments {
                kind: SegmentKind::TcpV6,
                has_cwr: true,
                headers_len: 0x3333,
                payload_len: 0x4444,
            }),
        };
        assert_eq!(header.to_bytes(), [1, 0x84, 0x33, 0x33, 0x44, 0x44, 0x11, 0x11, 0x22, 0x22]);
    }

    proptest! {
        #[test]
        fn what_is_read_is_written_the_same(bytes: [u8; VnetHeader::LEN]) {
            if let Some(header) = VnetHeader::from_bytes(&bytes) {
                prop_assert_eq!(VnetHeader::from_bytes(&header.to_bytes()), Some(header));
            }
        }
    }
}
