//! What an IP packet carries: the header behind its IP header, and whether it is a fragment.
//!
//! For packets that the host's own kernel made or forwards. Pure functions over bytes; what does not
//! hold together is `None`.

use crate::headers::{IPV4_LEN, IPV6_LEN};

/// IP protocol number of ICMP for IPv4.
pub const PROTOCOL_ICMP: u8 = 1;
/// IP protocol number of ICMP for IPv6.
pub const PROTOCOL_ICMPV6: u8 = 58;

/// Extension headers that are looked behind; no honest packet has more.
const EXTENSIONS_MAX: usize = 8;
/// "More fragments" and the fragment offset in the fourth word of an IPv4 header.
const IPV4_FRAGMENT: u16 = 0x3fff;
/// The fragment offset alone.
const IPV4_FRAGMENT_OFFSET: u16 = 0x1fff;
/// The fragment offset in an IPv6 fragment header, above two reserved bits and "more fragments".
const IPV6_FRAGMENT_OFFSET: u16 = 0xfff8;

/// What stands behind an IP header and its extensions.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Upper {
    /// The IP protocol number of what is carried.
    pub protocol: u8,
    /// Where it begins in the packet, in bytes. Behind the end if the packet is cut off there.
    pub offset: usize,
    /// Which fragment this is, if it is one.
    pub fragment: Option<Fragment>,
}

/// A part of a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Fragment {
    /// What all parts of a packet have in common; 16 bits in IPv4.
    pub id: u32,
    /// Whether the header of what is carried is in this part.
    pub is_first: bool,
}

impl Upper {
    /// Whether the header of what is carried is in this packet.
    pub fn has_header(&self) -> bool {
        self.fragment.is_none_or(|fragment| fragment.is_first)
    }
}

/// Looks behind the IP header of `packet`, and behind the extension headers of IPv6.
pub fn upper(packet: &[u8]) -> Option<Upper> {
    match packet.first()? >> 4 {
        4 => {
            let header: &[u8; IPV4_LEN] = packet.first_chunk()?;
            let offset = usize::from(header[0] & 0x0f) * 4;
            if offset < IPV4_LEN {
                return None;
            }
            let word = u16::from_be_bytes([header[6], header[7]]);
            let fragment = (word & IPV4_FRAGMENT != 0).then(|| Fragment {
                id: u16::from_be_bytes([header[4], header[5]]).into(),
                is_first: word & IPV4_FRAGMENT_OFFSET == 0,
            });
            Some(Upper { protocol: header[9], offset, fragment })
        }
        6 => behind_extensions(packet),
        _ => None,
    }
}

/// RFC 8200 §4.
fn behind_extensions(packet: &[u8]) -> Option<Upper> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    const MOBILITY: u8 = 135;

    let header: &[u8; IPV6_LEN] = packet.first_chunk()?;
    let mut upper = Upper { protocol: header[6], offset: IPV6_LEN, fragment: None };
    for _ in 0..EXTENSIONS_MAX {
        let rest = packet.get(upper.offset..).unwrap_or_default();
        let len = match upper.protocol {
            HOP_BY_HOP | ROUTING | DESTINATION | MOBILITY => (usize::from(*rest.get(1)?) + 1) * 8,
            // In words of four bytes, less two (RFC 4302 §2.2).
            AUTHENTICATION => (usize::from(*rest.get(1)?) + 2) * 4,
            FRAGMENT => {
                let header: &[u8; 8] = rest.first_chunk()?;
                let offset = u16::from_be_bytes([header[2], header[3]]) & IPV6_FRAGMENT_OFFSET;
                let id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                upper.fragment = Some(Fragment { id, is_first: offset == 0 });
                header.len()
            }
            _ => return Some(upper),
        };
        upper.protocol = rest[0];
        upper.offset += len;
        if !upper.has_header() {
            return Some(upper);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v4(word: u16) -> Vec<u8> {
        let mut packet = vec![0; 28];
        (packet[0], packet[5], packet[9]) = (0x45, 7, 17);
        packet[6..8].copy_from_slice(&word.to_be_bytes());
        packet
    }

    /// An IPv6 packet with these extension headers: type and bytes.
    fn v6(extensions: &[(u8, &[u8])], protocol: u8) -> Vec<u8> {
        let mut packet = vec![0; IPV6_LEN];
        packet[0] = 0x60;
        let mut next_at = 6;
        for (kind, bytes) in extensions {
            packet[next_at] = *kind;
            next_at = packet.len();
            packet.extend_from_slice(bytes);
        }
        packet[next_at] = protocol;
        packet.extend([0; 8]);
        packet
    }

    #[test]
    fn ipv4_fragments_are_told_apart() {
        let of = |word| upper(&v4(word)).unwrap();
        let whole = Upper { protocol: 17, offset: 20, fragment: None };
        assert_eq!((of(0), of(0x4000)), (whole, whole), "DF makes no fragment");
        assert_eq!(of(0x2000).fragment, Some(Fragment { id: 7, is_first: true }));
        assert_eq!(of(0x2001).fragment, Some(Fragment { id: 7, is_first: false }));
        assert_eq!(of(0x0001).fragment, Some(Fragment { id: 7, is_first: false }));
        assert!(of(0x2000).has_header() && !of(1).has_header());
        let mut options = v4(0);
        options[0] = 0x46;
        assert_eq!(upper(&options).unwrap().offset, 24);
        options[0] = 0x44;
        assert_eq!(upper(&options), None);
    }

    #[test]
    fn ipv6_extension_headers_are_looked_behind() {
        assert_eq!(upper(&v6(&[], 17)).unwrap().offset, 40);
        let long = [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let authentication = [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let packet = v6(&[(0, &[0; 8]), (43, &long), (51, &authentication), (60, &[0; 8])], 58);
        let found = Upper { protocol: 58, offset: 40 + 8 + 16 + 12 + 8, fragment: None };
        assert_eq!(upper(&packet), Some(found));
        for cut in 40..packet.len() - 8 {
            let found = upper(&packet[..cut]);
            assert!(found.is_none_or(|found| found.offset > cut), "{cut}: {found:?}");
        }
    }

    #[test]
    fn ipv6_fragments_are_told_apart() {
        let fragment = |offset: u16| {
            let [high, low] = offset.to_be_bytes();
            let packet = v6(&[(44, &[0, 0, high, low, 0, 0, 1, 2])], 17);
            upper(&packet).unwrap()
        };
        let (protocol, offset) = (17, 48);
        for (field, is_first) in [(1, true), (0, true), (9, false), (8, false)] {
            let fragment = fragment(field);
            let expected = Some(Fragment { id: 0x102, is_first });
            assert_eq!(fragment, Upper { protocol, offset, fragment: expected });
        }
        // What looks like an extension header in a later part is its content.
        let later = v6(&[(44, &[0, 0, 0, 8, 0, 0, 1, 2])], 60);
        assert_eq!(upper(&later).unwrap().protocol, 60);
    }

    #[test]
    fn an_endless_chain_is_not_followed() {
        let options: Vec<(u8, &[u8])> = vec![(60, &[0; 8]); EXTENSIONS_MAX + 1];
        assert_eq!(upper(&v6(&options, 17)), None);
        assert!(upper(&v6(&options[2..], 17)).is_some());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(
            mut packet in prop::collection::vec(any::<u8>(), 0..200), version in 4u8..8,
        ) {
            if let Some(first) = packet.first_mut() {
                *first = version << 4 | *first & 0x0f;
            }
            if let Some(upper) = upper(&packet) {
                prop_assert!(upper.offset >= IPV4_LEN);
            }
        }
    }
}
