//! The inner packets of a flood: plain UDP datagrams of chosen sizes.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use wg_common::headers::{Checksum, IPV4_LEN, IPV6_LEN, PROTOCOL_UDP, UDP_LEN};
use wg_common::protocol::{PADDING_MULTIPLE, TRANSPORT_OVERHEAD};

/// Bytes of the shortest inner packet of either version.
pub const LEN_MIN: usize = IPV6_LEN + UDP_LEN;
/// Bytes of the longest one: with all headers it fits into the slot of a live frame.
pub const LEN_MAX: usize = 1800;
/// IMIX: of twelve packets, seven have 64 bytes, four 576, and one has 1,372, which any tunnel takes; spread.
const IMIX_ORDER: [usize; 12] = [64, 576, 64, 64, 576, 64, 1372, 64, 576, 64, 576, 64];
/// UDP port from which inner datagrams come.
const INNER_SOURCE_PORT: u16 = 9009;

/// Which lengths inner packets have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Size {
    /// All the same.
    Fixed(usize),
    /// 7 : 4 : 1 of 64, 576 and 1,372 bytes.
    Imix,
}

impl Size {
    /// The lengths, in the order in which they recur.
    pub fn pattern(&self) -> &[usize] {
        match self {
            Size::Fixed(len) => std::slice::from_ref(len),
            Size::Imix => &IMIX_ORDER,
        }
    }

    /// The longest.
    pub fn longest(&self) -> usize {
        self.pattern().iter().copied().max().expect("no pattern is empty")
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "imix" {
            return Ok(Size::Imix);
        }
        match text.parse() {
            Ok(len) if (LEN_MIN..=LEN_MAX).contains(&len) => Ok(Size::Fixed(len)),
            _ => {
                Err(format!("`{text}` is neither `imix` nor a length from {LEN_MIN} to {LEN_MAX}"))
            }
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Size::Fixed(len) => fmt::Display::fmt(len, f),
            Size::Imix => f.write_str("imix"),
        }
    }
}

/// Bytes of the transport message that carries an inner packet of `len` bytes.
pub const fn message_len(len: usize) -> usize {
    padded(len) + TRANSPORT_OVERHEAD
}

/// With the zeros that are sealed behind a packet (§5.4.6), which boringtun leaves to its caller.
pub const fn padded(len: usize) -> usize {
    len.next_multiple_of(PADDING_MULTIPLE)
}

/// A UDP datagram of `len` bytes with its headers, and the padding behind it. Its payload is zeros; its
/// checksums are right.
///
/// # Panics
/// If `len` is less than the headers, or the addresses are of different versions.
pub fn inner_packet(src: IpAddr, dst: IpAddr, port: u16, len: usize) -> Vec<u8> {
    let mut packet = vec![0; padded(len)];
    let header_len = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let total_len = u16::try_from(len).expect("a packet is short");
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&total_len.to_be_bytes());
            // "Don't fragment": the identification means nothing, as in what Linux sends.
            packet[6] = 0x40;
            (packet[8], packet[9]) = (64, PROTOCOL_UDP);
            packet[12..16].copy_from_slice(&src.octets());
            packet[16..20].copy_from_slice(&dst.octets());
            let sum = Checksum::default().bytes(&packet[..IPV4_LEN]).finish();
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            IPV4_LEN
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let rest_len = u16::try_from(len - IPV6_LEN).expect("a packet is short");
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&rest_len.to_be_bytes());
            (packet[6], packet[7]) = (PROTOCOL_UDP, 64);
            packet[8..24].copy_from_slice(&src.octets());
            packet[24..40].copy_from_slice(&dst.octets());
            IPV6_LEN
        }
        _ => panic!("{src} and {dst} are of different versions"),
    };
    let udp_len = u16::try_from(len - header_len).expect("a packet is short");
    let udp = &mut packet[header_len..len];
    udp[0..2].copy_from_slice(&INNER_SOURCE_PORT.to_be_bytes());
    udp[2..4].copy_from_slice(&port.to_be_bytes());
    udp[4..6].copy_from_slice(&udp_len.to_be_bytes());
    let sum = match Checksum::pseudo(src, dst, PROTOCOL_UDP, udp_len.into()).bytes(udp).finish() {
        // Zero would mean that there is none.
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    packet
}

#[cfg(test)]
mod tests {
    use wg_common::headers;

    use super::*;

    #[test]
    fn imix_has_its_parts_in_every_twelve_packets() {
        for (len, count) in [(64, 7), (576, 4), (1372, 1)] {
            assert_eq!(IMIX_ORDER.iter().filter(|&&other| other == len).count(), count);
        }
        assert_eq!(Size::Imix.longest(), 1372);
        assert_eq!(Size::Fixed(64).pattern(), [64]);
    }

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for text in ["imix", "64", "512", "1372", "48", "1800"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
        for text in ["", "47", "1801", "IMIX", "-1"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn packets_are_as_long_as_they_say_and_their_sums_are_right() {
        let addresses = [("10.64.0.1", "192.168.20.2"), ("fd64::1", "fd20::2")];
        for (src, dst) in addresses.map(|(src, dst)| (src.parse().unwrap(), dst.parse().unwrap())) {
            for len in [48, 64, 65, 512, 1372] {
                let packet = inner_packet(src, dst, 9, len);
                assert_eq!(packet.len() % 16, 0);
                let inner = headers::inner_packet(&packet).unwrap();
                assert_eq!((inner.len, inner.src), (len, src));
                assert_eq!(headers::inner_destination(&packet).unwrap(), dst);
                let header_len = if src.is_ipv4() { IPV4_LEN } else { IPV6_LEN };
                let udp_len = (len - header_len) as u32;
                let sum = Checksum::pseudo(src, dst, PROTOCOL_UDP, udp_len);
                assert_eq!(sum.bytes(&packet[header_len..len]).finish(), 0);
                if src.is_ipv4() {
                    assert_eq!(Checksum::default().bytes(&packet[..IPV4_LEN]).finish(), 0);
                }
            }
        }
    }

    #[test]
    fn messages_are_padded_as_the_whitepaper_has_it() {
        assert_eq!([64, 65, 512, 1372].map(message_len), [96, 112, 544, 1408]);
    }
}
