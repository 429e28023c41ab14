//! The largest segment that two ends of a TCP connection agree on, where it is too large for the tunnel
//! between them.
//!
//! Each end says in its SYN how large a segment it takes, by the MTU of its own link. Of a tunnel on the
//! way it knows nothing, and the ICMP message that would tell it is often lost. So the gateway lowers
//! what the SYN says.

use crate::headers::{IPV4_LEN, IPV6_LEN, PROTOCOL_UDP, checksum_update};
use crate::upper::upper;

/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// Bytes of a TCP header without options.
pub const TCP_LEN: usize = 20;

/// Offsets in a TCP header.
const DATA_OFFSET: usize = 12;
const FLAGS: usize = 13;
const CHECKSUM: usize = 16;
const SYN: u8 = 0x02;

/// Where IP headers name what they carry.
const V4_PROTOCOL: usize = 9;
const V6_NEXT_HEADER: usize = 6;

/// Kinds of options (RFC 9293 §3.1), and the length of the one that is looked for.
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const MAX_SEGMENT_SIZE: u8 = 2;
const MAX_SEGMENT_SIZE_LEN: usize = 4;

/// How the checksum of a TCP segment stands in its packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TcpChecksum {
    /// It covers the segment, as on a wire.
    Full,
    /// The pseudo-header's sum alone is there, and whoever sends the packet adds the segment's: a TUN
    /// queue gives packets like that, and marks them as unfinished. What changes in the segment changes
    /// no part of that sum.
    Partial,
}

/// Lowers the maximum segment size that a SYN in `packet` names to what an inner packet of `mtu` bytes
/// carries, headers without options deducted (RFC 6691); says whether it has changed something. Never
/// raises it.
///
/// `packet` is an IP packet without padding behind it. It is left alone if it is no SYN, if it is a
/// fragment without TCP's header, if an option does not fit into the header (no option may hide behind
/// it), or if none names a size: then the sender takes 536 bytes, or 1220, which every tunnel carries. A
/// wrong checksum stays wrong.
#[inline]
pub fn clamp(packet: &mut [u8], mtu: usize, checksum: TcpChecksum) -> bool {
    may_be_syn(packet) && clamp_syn(packet, mtu, checksum)
}

/// A look at a few bytes, which is all that nearly every packet costs: whether it may be a SYN.
#[inline]
fn may_be_syn(packet: &[u8]) -> bool {
    let flags = match packet {
        [first, ..] if first >> 4 == 4 && packet.get(V4_PROTOCOL) == Some(&PROTOCOL_TCP) => {
            usize::from(first & 0x0f) * 4 + FLAGS
        }
        [first, ..] if first >> 4 == 6 => match packet.get(V6_NEXT_HEADER) {
            Some(&PROTOCOL_TCP) => IPV6_LEN + FLAGS,
            Some(&PROTOCOL_UDP) | None => return false,
            // Extension headers, perhaps.
            Some(_) => return true,
        },
        _ => return false,
    };
    packet.get(flags).is_some_and(|flags| flags & SYN != 0)
}

fn clamp_syn(packet: &mut [u8], mtu: usize, checksum: TcpChecksum) -> bool {
    let Some((tcp, ip_len)) = syn_at(packet) else { return false };
    let Some(limit) = mtu.checked_sub(ip_len + TCP_LEN).filter(|&limit| limit > 0) else {
        return false;
    };
    let limit = u16::try_from(limit).unwrap_or(u16::MAX);
    lower(&mut packet[tcp..], limit, checksum).unwrap_or(false)
}

/// Where the TCP header of a SYN begins, and the length of an IP header without options of that version.
fn syn_at(packet: &[u8]) -> Option<(usize, usize)> {
    let ip_len = match packet.first()? >> 4 {
        4 => IPV4_LEN,
        6 => IPV6_LEN,
        _ => return None,
    };
    let carried = upper(packet).filter(|carried| carried.has_header())?;
    if carried.protocol != PROTOCOL_TCP {
        return None;
    }
    let flags = *packet.get(carried.offset + FLAGS)?;
    (flags & SYN != 0).then_some((carried.offset, ip_len))
}

/// Lowers the sizes in the options of `segment`, which begins with its TCP header. `None` if the header
/// does not hold together; nothing is changed then.
fn lower(segment: &mut [u8], limit: u16, checksum: TcpChecksum) -> Option<bool> {
    let header_len = usize::from(*segment.get(DATA_OFFSET)? >> 4) * 4;
    if header_len < TCP_LEN {
        return None;
    }
    let header = segment.get_mut(..header_len)?;
    // Who reads them may heed the first or the last that names a size, and not heed what is broken behind
    // it: so first all of them are looked at, and then all are lowered.
    let mut at = TCP_LEN;
    while let Some(option) = next_option(header, at)? {
        at = option.end;
    }
    let mut has_changed = false;
    let mut at = TCP_LEN;
    while let Some(option) = next_option(header, at)? {
        at = option.end;
        if option.kind != MAX_SEGMENT_SIZE {
            continue;
        }
        let size = option.end - 2;
        let old = u16::from_be_bytes([header[size], header[size + 1]]);
        if old <= limit {
            continue;
        }
        header[size..option.end].copy_from_slice(&limit.to_be_bytes());
        has_changed = true;
        if checksum == TcpChecksum::Full {
            let sum = u16::from_be_bytes([header[CHECKSUM], header[CHECKSUM + 1]]);
            // A field at an odd offset lies across two words: its bytes count as those of a swapped one do.
            let (old, new) = match size % 2 {
                0 => (old, limit),
                _ => (old.swap_bytes(), limit.swap_bytes()),
            };
            let sum = checksum_update(sum, old, new);
            header[CHECKSUM..CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
        }
    }
    Some(has_changed)
}

/// An option in a TCP header.
struct TcpOption {
    kind: u8,
    /// Offset of the first byte behind it.
    end: usize,
}

/// The option at `at`, where one before it ended; `Some(None)` if there is none any more, `None` if it
/// does not fit into the header or has a length that its kind cannot have.
#[inline]
fn next_option(header: &[u8], at: usize) -> Option<Option<TcpOption>> {
    let kind = match header.get(at) {
        None | Some(&END) => return Some(None),
        Some(&NO_OPERATION) => return Some(Some(TcpOption { kind: NO_OPERATION, end: at + 1 })),
        Some(&kind) => kind,
    };
    let len = usize::from(*header.get(at + 1)?);
    let end = at + len;
    let fits = len >= 2 && end <= header.len();
    let is_right = kind != MAX_SEGMENT_SIZE || len == MAX_SEGMENT_SIZE_LEN;
    (fits && is_right).then_some(Some(TcpOption { kind, end }))
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    const MSS_1460: [u8; 4] = [2, 4, 0x05, 0xb4];
    const SYN_ACK: u8 = 0x12;

    /// A TCP segment with these options, padded to whole words by what ends a list, and without a checksum.
    fn segment(flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut segment = vec![0; TCP_LEN];
        segment[..4].copy_from_slice(&[0x9c, 0x40, 0, 80]);
        segment.extend_from_slice(options);
        segment.resize(segment.len().next_multiple_of(4), END);
        (segment[DATA_OFFSET], segment[FLAGS]) = ((segment.len() as u8 / 4) << 4, flags);
        segment.extend_from_slice(payload);
        segment
    }

    fn v4(segment: &[u8]) -> Vec<u8> {
        let len = (IPV4_LEN + segment.len()) as u16;
        let mut packet =
            vec![0x45, 0, (len >> 8) as u8, len as u8, 0, 0, 0x40, 0, 64, PROTOCOL_TCP, 0, 0];
        packet.extend(Ipv4Addr::new(10, 9, 0, 1).octets());
        packet.extend(Ipv4Addr::new(192, 0, 2, 7).octets());
        packet.extend_from_slice(segment);
        finish(&mut packet, IPV4_LEN);
        packet
    }

    /// With these bytes of extension headers, the first of this kind.
    fn v6(next: u8, extensions: &[u8], segment: &[u8]) -> Vec<u8> {
        let len = (extensions.len() + segment.len()) as u16;
        let mut packet = vec![0x60, 0, 0, 0, (len >> 8) as u8, len as u8, next, 64];
        packet.extend(Ipv6Addr::from(0xfd09_u128 << 112 | 1).octets());
        packet.extend(Ipv6Addr::from(0x2001_0db8_u128 << 96 | 7).octets());
        packet.extend_from_slice(extensions);
        packet.extend_from_slice(segment);
        finish(&mut packet, IPV6_LEN + extensions.len());
        packet
    }

    /// What a TCP checksum is summed over, slowly and by the book; 0xffff if it is right.
    fn sum(packet: &[u8], tcp: usize) -> u16 {
        let addresses = if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] };
        let len = ((packet.len() - tcp) as u32).to_be_bytes();
        let all = [addresses, &len, &[0, 0, 0, PROTOCOL_TCP], &packet[tcp..]].concat();
        all.chunks(2).fold(0_u32, |sum, pair| {
            let sum = sum + u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            (sum & 0xffff) + (sum >> 16)
        }) as u16
    }

    fn finish(packet: &mut [u8], tcp: usize) {
        packet[tcp + CHECKSUM..tcp + CHECKSUM + 2].fill(0);
        let sum = !sum(packet, tcp);
        packet[tcp + CHECKSUM..tcp + CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
    }

    fn clamped(packet: &[u8], mtu: usize) -> Option<Vec<u8>> {
        let mut packet = packet.to_vec();
        let before = packet.clone();
        let has_changed = clamp(&mut packet, mtu, TcpChecksum::Full);
        assert_eq!(has_changed, packet != before);
        has_changed.then_some(packet)
    }

    #[test]
    fn a_syn_names_what_fits_into_the_tunnel() {
        for flags in [SYN, SYN_ACK, 0xc2] {
            let segment = segment(flags, &MSS_1460, &[]);
            let v4 = clamped(&v4(&segment), 1420).unwrap();
            assert_eq!(v4[40..44], [2, 4, 0x05, 0x64], "1380");
            assert_eq!(sum(&v4, 20), 0xffff);
            let v6 = clamped(&v6(PROTOCOL_TCP, &[], &segment), 1420).unwrap();
            assert_eq!(v6[60..64], [2, 4, 0x05, 0x50], "1360");
            assert_eq!(sum(&v6, 40), 0xffff);
        }
    }

    #[test]
    fn what_fits_already_is_never_raised() {
        for (mss, mtu, changes) in [
            (1380_u16, 1420, false),
            (1381, 1420, true),
            (536, 1420, false),
            (0, 1420, false),
            (u16::MAX, 65_575, false),
            (u16::MAX, 65_574, true),
            (u16::MAX, usize::MAX, false),
            (1, 40, false),
            (1460, 40, false),
            (1460, 0, false),
            (1460, 41, true),
        ] {
            let [high, low] = mss.to_be_bytes();
            let packet = v4(&segment(SYN, &[2, 4, high, low], &[]));
            assert_eq!(clamped(&packet, mtu).is_some(), changes, "{mss} at {mtu}");
        }
    }

    #[test]
    fn only_a_syn_is_changed() {
        for flags in (0..=255_u8).filter(|flags| flags & SYN == 0) {
            assert_eq!(clamped(&v4(&segment(flags, &MSS_1460, &[])), 1420), None, "{flags:#x}");
        }
        let mut udp = v4(&segment(SYN, &MSS_1460, &[]));
        udp[9] = 17;
        assert_eq!(clamped(&udp, 1420), None);
        let udp = v6(17, &[], &segment(SYN, &MSS_1460, &[]));
        assert_eq!(clamped(&udp, 1420), None);
        let mut v5 = v4(&segment(SYN, &MSS_1460, &[]));
        v5[0] = 0x55;
        assert_eq!(clamped(&v5, 1420), None);
    }

    #[test]
    fn a_fragment_without_the_header_is_left_alone() {
        let packet = v4(&segment(SYN, &MSS_1460, &[1; 16]));
        for (word, changes) in [(0x2000_u16, true), (0x2001, false), (0x0002, false)] {
            let mut packet = packet.clone();
            packet[6..8].copy_from_slice(&word.to_be_bytes());
            assert_eq!(clamped(&packet, 1420).is_some(), changes, "{word:#x}");
        }
        let syn = segment(SYN, &MSS_1460, &[1; 16]);
        for (offset, changes) in [(1, true), (8, false), (9, false)] {
            let fragment = [PROTOCOL_TCP, 0, 0, offset, 0, 0, 0, 9];
            assert_eq!(clamped(&v6(44, &fragment, &syn), 1420).is_some(), changes, "{offset}");
        }
    }

    #[test]
    fn headers_before_tcp_are_looked_behind() {
        let syn = segment(SYN, &MSS_1460, &[]);
        // Options to every hop, then to the destination.
        let extensions =
            [60, 0, 1, 4, 0, 0, 0, 0, PROTOCOL_TCP, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let packet = clamped(&v6(0, &extensions, &syn), 1420).unwrap();
        assert_eq!(packet[84..88], [2, 4, 0x05, 0x50]);
        assert_eq!(sum(&packet, 64), 0xffff);

        let mut packet = v4(&syn);
        packet[0] = 0x46;
        packet.splice(20..20, [1, 1, 1, 0]);
        assert_eq!(clamped(&packet, 1420).unwrap()[44..48], [2, 4, 0x05, 0x64]);
    }

    #[test]
    fn options_are_read_as_they_are_written() {
        const TIMESTAMPS: &[u8] = &[8, 10, 0, 0, 0, 1, 0, 0, 0, 0];
        const SCALE: &[u8] = &[3, 3, 7];
        type Case = (&'static str, &'static [&'static [u8]], &'static [usize]);
        // Name, options, and where the sizes are that are to be lowered.
        let cases: &[Case] = &[
            ("first", &[&MSS_1460, SCALE], &[2]),
            ("as Linux writes it", &[&MSS_1460, &[4, 2], TIMESTAMPS, &[1], SCALE], &[2]),
            ("behind others", &[SCALE, &[1], TIMESTAMPS, &MSS_1460], &[16]),
            ("at an odd offset", &[&[1], &MSS_1460], &[3]),
            ("at an odd offset behind others", &[SCALE, &MSS_1460, &[1]], &[5]),
            ("twice", &[&MSS_1460, &[1], &MSS_1460], &[2, 7]),
            ("at the very end", &[&[1, 1, 1, 1], &MSS_1460], &[6]),
            ("none", &[], &[]),
            ("others only", &[SCALE, TIMESTAMPS], &[]),
            ("behind the end of the list", &[&[0], &MSS_1460], &[]),
            ("a length of zero", &[&[5, 0], &MSS_1460], &[]),
            ("a length of one", &[&[5, 1], &MSS_1460], &[]),
            ("a length of zero behind it", &[&MSS_1460, &[5, 0, 1, 1]], &[]),
            ("beyond the end", &[&MSS_1460, &[5, 5, 0, 0]], &[]),
            ("no length", &[&MSS_1460, &[1, 1, 1, 5]], &[]),
            ("too short a size", &[&[2, 3, 5], &MSS_1460], &[]),
            ("too long a size", &[&[2, 6, 5, 0xb4, 0, 0], &[1, 1]], &[]),
            ("cut off", &[&[1, 1, 2, 4]], &[]),
        ];
        for (name, options, sizes) in cases {
            let packet = v4(&segment(SYN, &options.concat(), &[7; 3]));
            let mut expected = packet.clone();
            for size in *sizes {
                expected[40 + size..42 + size].copy_from_slice(&1380_u16.to_be_bytes());
            }
            finish(&mut expected, 20);
            assert_eq!(clamped(&packet, 1420).unwrap_or(packet), expected, "{name}");
        }
    }

    #[test]
    fn a_header_that_is_not_whole_is_left_alone() {
        let whole = v4(&segment(SYN, &MSS_1460, &[]));
        for len in 0..whole.len() {
            assert_eq!(clamped(&whole[..len], 1420), None, "{len}");
        }
        for words in [0, 4, 7, 15] {
            let mut packet = whole.clone();
            packet[20 + DATA_OFFSET] = words << 4;
            assert_eq!(clamped(&packet, 1420), None, "{words}");
        }
        let mut packet = whole.clone();
        packet[20 + DATA_OFFSET] = 5 << 4;
        assert_eq!(clamped(&packet, 1420), None, "what follows is no option");
    }

    #[test]
    fn a_sum_that_is_not_finished_is_not_touched() {
        let mut packet = v4(&segment(SYN, &MSS_1460, &[]));
        packet[36..38].copy_from_slice(&[0x12, 0x34]);
        assert!(clamp(&mut packet, 1420, TcpChecksum::Partial));
        assert_eq!((&packet[36..38], &packet[42..44]), (&[0x12, 0x34][..], &[0x05, 0x64][..]));
    }

    /// Where the sizes in a SYN's options are, by reading them into a list; `None` if one is odd.
    fn sizes(options: &[u8]) -> Option<Vec<usize>> {
        let mut found = Vec::new();
        let mut rest = options;
        while let [kind, behind @ ..] = rest {
            match (*kind, behind) {
                (0, _) => break,
                (1, _) => rest = behind,
                (kind, [len, ..]) if *len >= 2 && usize::from(*len) <= rest.len() => {
                    if kind == 2 {
                        (*len == 4).then(|| found.push(options.len() - rest.len() + 2))?;
                    }
                    rest = &rest[usize::from(*len)..];
                }
                _ => return None,
            }
        }
        Some(found)
    }

    fn option() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            Just(vec![1]),
            any::<u16>().prop_map(|mss| [&[2, 4], &mss.to_be_bytes()[..]].concat()),
            any::<u16>().prop_map(|mss| [&[2, 4], &mss.to_be_bytes()[..]].concat()),
            Just(vec![3, 3, 7]),
            Just(vec![4, 2]),
            Just(vec![8, 10, 1, 2, 3, 4, 5, 6, 7, 8]),
            (3_u8..=255, 0_u8..=12).prop_map(|(kind, len)| [kind, len].to_vec()),
            prop::collection::vec(any::<u8>(), 0..3),
        ]
    }

    proptest! {
        #[test]
        fn sizes_are_lowered_and_the_sum_is_that_of_what_is_there(
            options in prop::collection::vec(option(), 0..8),
            flags: u8, payload in prop::collection::vec(any::<u8>(), 0..40),
            is_v4: bool, partial: bool, error: u16, mtu in 1280_usize..9000,
        ) {
            let mut options = options.concat();
            options.resize(options.len().min(40).next_multiple_of(4), 1);
            let segment = segment(flags | SYN, &options, &payload);
            let tcp = if is_v4 { IPV4_LEN } else { IPV6_LEN };
            let mut packet = if is_v4 { v4(&segment) } else { v6(PROTOCOL_TCP, &[], &segment) };
            let checksum = if partial { TcpChecksum::Partial } else { TcpChecksum::Full };
            // Of a sum that is wrong, the error is to be kept.
            let at = tcp + CHECKSUM;
            let wrong = u16::from_be_bytes([packet[at], packet[at + 1]]) ^ error;
            packet[at..at + 2].copy_from_slice(&wrong.to_be_bytes());
            let before = packet.clone();

            let has_changed = clamp(&mut packet, mtu, checksum);

            let limit = (mtu - tcp - TCP_LEN) as u16;
            let mut expected = before.clone();
            for size in sizes(&options).unwrap_or_default() {
                let size = &mut expected[tcp + TCP_LEN + size..][..2];
                let lowered = u16::from_be_bytes([size[0], size[1]]).min(limit);
                size.copy_from_slice(&lowered.to_be_bytes());
            }
            prop_assert_eq!(has_changed, expected != before);
            if has_changed && !partial {
                prop_assert_eq!(sum(&packet, tcp) % 0xffff, sum(&before, tcp) % 0xffff);
                expected[at..at + 2].copy_from_slice(&packet[at..at + 2]);
            }
            prop_assert_eq!(packet, expected);
        }

        #[test]
        fn any_bytes_are_survived(
            mut packet in prop::collection::vec(any::<u8>(), 0..120),
            first in prop_oneof![Just(0x45_u8), Just(0x46), Just(0x60), any::<u8>()],
            mtu in 0_usize..70_000,
        ) {
            if packet.len() > IPV6_LEN {
                (packet[0], packet[6], packet[9]) = (first, PROTOCOL_TCP, PROTOCOL_TCP);
            }
            let before = packet.clone();
            let has_changed = clamp(&mut packet, mtu, TcpChecksum::Full);
            prop_assert_eq!(has_changed, packet != before);
            prop_assert!(!clamp(&mut packet, mtu, TcpChecksum::Full), "once is enough");
        }
    }
}
