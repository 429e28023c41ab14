//! ICMP messages that tell a sender that its packet cannot be delivered.
//!
//! The kernel's WireGuard answers a packet for which it has no peer, or no endpoint, or which is too big,
//! with ICMP; so do we, by a packet that is written to the TUN device. Pure: bytes in, bytes into the
//! caller's buffer.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::headers::{Checksum, IPV4_LEN, IPV6_LEN, inner_packet};
use crate::upper::{PROTOCOL_ICMP, PROTOCOL_ICMPV6, upper};

/// Bytes of an ICMP header: type, code, checksum, four unused.
const ICMP_LEN: usize = 8;
/// Longest message about an IPv4 packet (RFC 1812 §4.3.2.3): every host takes a datagram of that size.
const V4_LEN_MAX: usize = 576;
/// Longest message about an IPv6 packet: the smallest MTU that a link may have (RFC 4443 §2.4 c).
const V6_LEN_MAX: usize = 1280;
/// Longest message that is written.
pub const ERROR_LEN_MAX: usize = V6_LEN_MAX;
/// TOS of ICMP errors: precedence "internetwork control" (RFC 1812 §4.3.2.5).
const ERROR_TOS: u8 = 0xc0;
const TTL: u8 = 64;

/// Writes to `message` what tells the sender of `packet` that it cannot be delivered, and gives its
/// length: *host unreachable* in IPv4, *address unreachable* in IPv6, as the kernel's WireGuard says.
///
/// It comes from the address to which `packet` went. An address of this host would suit better, but
/// the kernel takes no packet from a device that names its own address as the source (a martian). The
/// packet's destination is routed to this very device, so that reverse path filters let it pass, under
/// policy routing and masquerading as well; and it names to the sender what cannot be reached.
///
/// Nothing is written, and `None` given, for what must not be answered (RFC 1122 §3.2.2, RFC 4443
/// §2.4 e): an ICMP error, or an ICMP message of which that is not known; a fragment other than the
/// first; a source or destination that names no single host; and for what is no whole packet.
pub fn unreachable(packet: &[u8], message: &mut [u8; ERROR_LEN_MAX]) -> Option<usize> {
    const HOST: Kind = Kind { kind: 3, code: 1, rest: 0 };
    const ADDRESS: Kind = Kind { kind: 1, code: 3, rest: 0 };

    write(packet, (HOST, ADDRESS), message)
}

/// Writes to `message` what tells the sender of `packet` that only packets of `mtu` bytes get through, and
/// gives its length: *fragmentation needed* in IPv4 (RFC 1191), *packet too big* in IPv6.
///
/// Its source, and what is not answered, are as with [`unreachable`]: the sender's stack heeds it for the
/// connection or the route of the packet that is quoted.
pub fn too_big(packet: &[u8], mtu: usize, message: &mut [u8; ERROR_LEN_MAX]) -> Option<usize> {
    let fragmentation_needed =
        Kind { kind: 3, code: 4, rest: u16::try_from(mtu).unwrap_or(u16::MAX).into() };
    let packet_too_big = Kind { kind: 2, code: 0, rest: u32::try_from(mtu).unwrap_or(u32::MAX) };
    write(packet, (fragmentation_needed, packet_too_big), message)
}

/// What an ICMP error says.
#[derive(Clone, Copy)]
struct Kind {
    kind: u8,
    code: u8,
    /// The last four bytes of the header.
    rest: u32,
}

/// Writes an error of one of these kinds, by the version of `packet`.
fn write(
    packet: &[u8],
    (v4, v6): (Kind, Kind),
    message: &mut [u8; ERROR_LEN_MAX],
) -> Option<usize> {
    let inner = inner_packet(packet).ok()?;
    let packet = &packet[..inner.len];
    let carried = upper(packet).filter(|carried| carried.has_header())?;
    let answers = match carried.protocol {
        PROTOCOL_ICMP => is_v4_query(*packet.get(carried.offset)?),
        PROTOCOL_ICMPV6 => is_v6_informational(*packet.get(carried.offset)?),
        _ => true,
    };
    if !answers || !is_single_host(inner.src) || !is_single_host(inner.dst) {
        return None;
    }
    match (inner.dst, inner.src) {
        (IpAddr::V4(from), IpAddr::V4(to)) => Some(write_v4(packet, from, to, v4, message)),
        (IpAddr::V6(from), IpAddr::V6(to)) => Some(write_v6(packet, from, to, v6, message)),
        _ => None,
    }
}

/// Echo, router discovery, timestamp, information and mask messages. All others are errors, or may be
/// some day.
fn is_v4_query(kind: u8) -> bool {
    matches!(kind, 0 | 8..=10 | 13..=18)
}

/// RFC 4443 §2.1; a redirect (137) counts as an error (§2.4 e.2).
fn is_v6_informational(kind: u8) -> bool {
    kind >= 128 && kind != 137
}

fn is_single_host(address: IpAddr) -> bool {
    match address {
        // 0/8 is "this network"; 224/4 is multicast; 240/4 is reserved, with the broadcast address.
        IpAddr::V4(address) => !matches!(address.octets()[0], 0 | 127 | 224..),
        IpAddr::V6(address) => {
            !address.is_unspecified() && !address.is_loopback() && !address.is_multicast()
        }
    }
}

fn write_v4(
    packet: &[u8],
    from: Ipv4Addr,
    to: Ipv4Addr,
    kind: Kind,
    message: &mut [u8; ERROR_LEN_MAX],
) -> usize {
    const DONT_FRAGMENT: u8 = 0x40;

    let quote = &packet[..packet.len().min(V4_LEN_MAX - IPV4_LEN - ICMP_LEN)];
    let len = IPV4_LEN + ICMP_LEN + quote.len();
    let (ip, icmp) = message[..len].split_at_mut(IPV4_LEN);
    let [len_high, len_low] = (len as u16).to_be_bytes();
    ip[..12].copy_from_slice(&[
        0x45,
        ERROR_TOS,
        len_high,
        len_low,
        // No id: it is never cut up (RFC 6864 §4.1).
        0,
        0,
        DONT_FRAGMENT,
        0,
        TTL,
        PROTOCOL_ICMP,
        0,
        0,
    ]);
    ip[12..16].copy_from_slice(&from.octets());
    ip[16..].copy_from_slice(&to.octets());
    let sum = Checksum::default().bytes(ip).finish();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    write_icmp(icmp, kind, quote, Checksum::default());
    len
}

fn write_v6(
    packet: &[u8],
    from: Ipv6Addr,
    to: Ipv6Addr,
    kind: Kind,
    message: &mut [u8; ERROR_LEN_MAX],
) -> usize {
    let quote = &packet[..packet.len().min(V6_LEN_MAX - IPV6_LEN - ICMP_LEN)];
    let payload_len = ICMP_LEN + quote.len();
    let (ip, icmp) = message[..IPV6_LEN + payload_len].split_at_mut(IPV6_LEN);
    let [len_high, len_low] = (payload_len as u16).to_be_bytes();
    ip[..8].copy_from_slice(&[0x60, 0, 0, 0, len_high, len_low, PROTOCOL_ICMPV6, TTL]);
    ip[8..24].copy_from_slice(&from.octets());
    ip[24..].copy_from_slice(&to.octets());
    let pseudo = Checksum::pseudo(from.into(), to.into(), PROTOCOL_ICMPV6, payload_len as u32);
    write_icmp(icmp, kind, quote, pseudo);
    IPV6_LEN + payload_len
}

/// Writes the ICMP header and the quote behind it. `sum` is what the checksum begins with.
fn write_icmp(icmp: &mut [u8], kind: Kind, quote: &[u8], sum: Checksum) {
    icmp[..4].copy_from_slice(&[kind.kind, kind.code, 0, 0]);
    icmp[4..ICMP_LEN].copy_from_slice(&kind.rest.to_be_bytes());
    icmp[ICMP_LEN..].copy_from_slice(quote);
    let sum = sum.bytes(icmp).finish();
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::headers::PROTOCOL_UDP;

    fn v4(src: [u8; 4], dst: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; IPV4_LEN];
        (packet[0], packet[8], packet[9]) = (0x45, 64, protocol);
        packet[2..4].copy_from_slice(&((IPV4_LEN + payload.len()) as u16).to_be_bytes());
        packet[12..16].copy_from_slice(&src);
        packet[16..20].copy_from_slice(&dst);
        packet.extend_from_slice(payload);
        packet
    }

    fn v6(src: &str, dst: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let octets = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
        let mut packet = vec![0; IPV6_LEN];
        (packet[0], packet[6], packet[7]) = (0x60, protocol, 64);
        packet[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
        packet[8..24].copy_from_slice(&octets(src));
        packet[24..40].copy_from_slice(&octets(dst));
        packet.extend_from_slice(payload);
        packet
    }

    const US: [u8; 4] = [10, 9, 0, 1];
    const NOBODY: [u8; 4] = [10, 9, 0, 77];

    fn answer(packet: &[u8]) -> Option<Vec<u8>> {
        let mut message = [0xaa; ERROR_LEN_MAX];
        unreachable(packet, &mut message).map(|len| message[..len].to_vec())
    }

    #[test]
    fn ipv4_is_answered_with_host_unreachable() {
        let packet = v4(US, NOBODY, PROTOCOL_UDP, &[7; 30]);
        let answer = answer(&packet).unwrap();
        assert_eq!(answer[..2], [0x45, 0xc0]);
        assert_eq!((answer[8], answer[9]), (64, PROTOCOL_ICMP));
        assert_eq!((&answer[12..16], &answer[16..20]), (&NOBODY[..], &US[..]));
        assert_eq!((answer[20], answer[21], &answer[24..28]), (3, 1, &[0; 4][..]));
        assert_eq!(answer[28..], packet);
    }

    #[test]
    fn ipv6_is_answered_with_address_unreachable() {
        let packet = v6("fd09::1", "fd09::77", PROTOCOL_UDP, &[7; 30]);
        let answer = answer(&packet).unwrap();
        assert_eq!((answer[0], answer[6], answer[7]), (0x60, PROTOCOL_ICMPV6, 64));
        assert_eq!((&answer[8..24], &answer[24..40]), (&packet[24..40], &packet[8..24]));
        assert_eq!((answer[40], answer[41], &answer[44..48]), (1, 3, &[0; 4][..]));
        assert_eq!(answer[48..], packet);
    }

    #[test]
    fn who_sends_too_much_is_told_how_much_gets_through() {
        let told = |packet: &[u8], mtu| {
            let mut message = [0xaa; ERROR_LEN_MAX];
            too_big(packet, mtu, &mut message).map(|len| message[..len].to_vec())
        };
        let packet = v4(US, NOBODY, PROTOCOL_UDP, &[7; 30]);
        let answer = told(&packet, 1340).unwrap();
        assert_eq!((&answer[12..16], &answer[16..20]), (&NOBODY[..], &US[..]));
        assert_eq!((answer[20], answer[21], &answer[24..28]), (3, 4, &[0, 0, 0x05, 0x3c][..]));
        assert_eq!(answer[28..], packet);
        assert!(sums_up(&[&answer[..20]]) && sums_up(&[&answer[20..]]));
        assert_eq!(told(&packet, 70_000).unwrap()[24..28], [0, 0, 0xff, 0xff]);

        let packet = v6("fd09::1", "fd09::77", PROTOCOL_UDP, &[7; 30]);
        let answer = told(&packet, 70_000).unwrap();
        assert_eq!((&answer[8..24], &answer[24..40]), (&packet[24..40], &packet[8..24]));
        assert_eq!(
            (answer[40], answer[41], &answer[44..48]),
            (2, 0, &70_000_u32.to_be_bytes()[..])
        );
        assert_eq!(answer[48..], packet);
        let len = (answer.len() as u32 - 40).to_be_bytes();
        assert!(sums_up(&[&answer[8..40], &len, &[0, 0, 0, 58], &answer[40..]]));

        let about_an_error = v6("fd09::1", "fd09::77", 58, &[2, 0, 0, 0, 0, 0, 5, 0]);
        assert_eq!(told(&about_an_error, 1280), None);
    }

    #[test]
    fn long_packets_are_quoted_as_far_as_every_link_carries_it() {
        let answer_v4 = answer(&v4(US, NOBODY, PROTOCOL_UDP, &[7; 1400])).unwrap();
        assert_eq!(answer_v4.len(), 576);
        let answer_v6 = answer(&v6("fd09::1", "fd09::77", PROTOCOL_UDP, &[7; 1400])).unwrap();
        assert_eq!(answer_v6.len(), 1280);
    }

    #[test]
    fn padding_behind_a_packet_is_not_quoted() {
        let packet = v4(US, NOBODY, PROTOCOL_UDP, &[7; 30]);
        let padded = [&packet[..], &[0; 6]].concat();
        assert_eq!(answer(&padded), answer(&packet));
    }

    #[test]
    fn icmp_errors_are_not_answered_and_queries_are() {
        for kind in 0..=255 {
            let payload = [kind, 0, 0, 0, 0, 0, 0, 0];
            let query = [0, 8, 9, 10, 13, 14, 15, 16, 17, 18].contains(&kind);
            assert_eq!(answer(&v4(US, NOBODY, 1, &payload)).is_some(), query, "type {kind}");
            let informational = kind >= 128 && kind != 137;
            let packet = v6("fd09::1", "fd09::77", 58, &payload);
            assert_eq!(answer(&packet).is_some(), informational, "type {kind}");
        }
        assert_eq!(answer(&v4(US, NOBODY, 1, &[])), None, "its type is not there");
    }

    #[test]
    fn only_the_first_fragment_is_answered() {
        for (word, answered) in [(0x2000_u16, true), (0x2001, false), (0x0005, false)] {
            let mut packet = v4(US, NOBODY, PROTOCOL_UDP, &[7; 40]);
            packet[6..8].copy_from_slice(&word.to_be_bytes());
            assert_eq!(answer(&packet).is_some(), answered, "{word:#x}");
        }
        for (offset, answered) in [(1, true), (9, false)] {
            let fragment = [PROTOCOL_UDP, 0, 0, offset, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
            let packet = v6("fd09::1", "fd09::77", 44, &fragment);
            assert_eq!(answer(&packet).is_some(), answered, "{offset}");
        }
    }

    #[test]
    fn who_is_no_single_host_gets_and_causes_no_answer() {
        let others = [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 251], [240, 0, 0, 1], [255; 4]];
        for other in others {
            assert_eq!(answer(&v4(US, other, PROTOCOL_UDP, &[7; 8])), None, "to {other:?}");
            assert_eq!(answer(&v4(other, US, PROTOCOL_UDP, &[7; 8])), None, "from {other:?}");
        }
        for other in ["::", "::1", "ff02::2"] {
            assert_eq!(answer(&v6("fd09::1", other, PROTOCOL_UDP, &[7; 8])), None, "to {other}");
            assert_eq!(answer(&v6(other, "fd09::1", PROTOCOL_UDP, &[7; 8])), None, "from {other}");
        }
    }

    #[test]
    fn what_is_no_whole_packet_is_not_answered() {
        let packet = v4(US, NOBODY, PROTOCOL_UDP, &[7; 30]);
        for cut in 0..packet.len() {
            assert_eq!(answer(&packet[..cut]), None, "{cut}");
        }
        assert_eq!(answer(&[0x75; 60]), None);
    }

    /// The checksum, slowly.
    fn sums_up(parts: &[&[u8]]) -> bool {
        let mut sum = 0_u32;
        for pair in parts.concat().chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum == 0xffff
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_rightly_or_not_at_all(
            mut packet in prop::collection::vec(any::<u8>(), 0..2000),
            honest in any::<bool>(),
            v6 in any::<bool>(),
        ) {
            if honest && packet.len() >= IPV6_LEN {
                let len = packet.len() as u16;
                if v6 {
                    (packet[0], packet[8], packet[24]) = (0x60, 0x20, 0x20);
                    packet[4..6].copy_from_slice(&(len - IPV6_LEN as u16).to_be_bytes());
                } else {
                    (packet[0], packet[12], packet[16]) = (0x45, 10, 10);
                    packet[2..4].copy_from_slice(&len.to_be_bytes());
                }
            }
            let Some(answer) = answer(&packet) else { return Ok(()) };
            let about = inner_packet(&packet).unwrap();
            let it = inner_packet(&answer).unwrap();
            prop_assert_eq!((it.src, it.dst, it.len), (about.dst, about.src, answer.len()));
            let quote = if it.src.is_ipv4() {
                prop_assert!(answer.len() <= 576 && sums_up(&[&answer[..20]]) && sums_up(&[&answer[20..]]));
                &answer[28..]
            } else {
                let len = (answer.len() as u32 - 40).to_be_bytes();
                prop_assert!(answer.len() <= 1280);
                prop_assert!(sums_up(&[&answer[8..40], &len, &[0, 0, 0, 58], &answer[40..]]));
                &answer[48..]
            };
            prop_assert!(packet.starts_with(quote) && quote.len() >= about.len.min(28));
        }
    }
}
