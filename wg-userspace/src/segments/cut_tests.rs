//! Cutting against a slow model: one that builds each segment from nothing.

use proptest::prelude::*;
use wg_common::headers::{IPV4_LEN, IPV6_LEN, PROTOCOL_TCP, PROTOCOL_UDP, inner_packet};
use wg_common::outcome::DropReason;
use wg_common::upper::upper;

use super::cut::{Cut, finish_checksum};
use super::vnet::{PartialChecksum, SegmentKind, Segments};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// What a packet is made of.
#[derive(Clone, Debug)]
struct Parts {
    /// IPv4 options or IPv6 extension headers: one of destination options, in units of 8 bytes.
    between: usize,
    is_v4: bool,
    is_tcp: bool,
    tos: u8,
    id: u16,
    sequence: u32,
    flags: u8,
    tcp_options: Vec<u8>,
    payload: Vec<u8>,
}

/// One word after the other with end-around carry.
fn plain_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

impl Parts {
    fn protocol(&self) -> u8 {
        if self.is_tcp { PROTOCOL_TCP } else { PROTOCOL_UDP }
    }

    fn kind(&self) -> SegmentKind {
        match (self.is_tcp, self.is_v4) {
            (false, _) => SegmentKind::Udp,
            (true, true) => SegmentKind::TcpV4,
            (true, false) => SegmentKind::TcpV6,
        }
    }

    fn upper_at(&self) -> usize {
        (if self.is_v4 { IPV4_LEN } else { IPV6_LEN }) + self.between * 8
    }

    fn place(&self) -> PartialChecksum {
        let offset = if self.is_tcp { 16 } else { 6 };
        PartialChecksum { start: self.upper_at() as u16, offset }
    }

    fn segments(&self, payload_len: u16) -> Segments {
        // Of what is only a hint, nonsense.
        let (has_cwr, headers_len) = (self.flags & CWR != 0, 7);
        Segments { kind: self.kind(), has_cwr, headers_len, payload_len }
    }

    /// The pseudo header.
    fn pseudo(&self, upper_len: usize) -> Vec<u8> {
        let addresses = if self.is_v4 { vec![10; 8] } else { vec![0xfd; 32] };
        let rest = [0, 0, (upper_len >> 8) as u8, upper_len as u8, 0, 0, 0, self.protocol()];
        [&addresses[..], &rest].concat()
    }

    /// The packet, with the right checksum, or with that of the pseudo header alone.
    fn packet(&self, is_partial: bool) -> Vec<u8> {
        let mut header = vec![0x12, 0x34, 0x56, 0x78];
        if self.is_tcp {
            header.extend(self.sequence.to_be_bytes());
            let words = (20 + self.tcp_options.len()) / 4;
            header.extend([1, 2, 3, 4, (words << 4) as u8, self.flags, 5, 6, 0, 0, 7, 8]);
            header.extend(&self.tcp_options);
        } else {
            header.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            header.extend([0, 0]);
        }
        let mut rest = [header, self.payload.clone()].concat();
        let pseudo = self.pseudo(rest.len());
        let mut sum = if is_partial {
            plain_sum(&pseudo)
        } else {
            !plain_sum(&[&pseudo[..], &rest].concat())
        };
        if !is_partial && !self.is_tcp && sum == 0 {
            sum = 0xffff;
        }
        let at = usize::from(self.place().offset);
        rest[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        [self.ip_header(rest.len()), rest].concat()
    }

    fn ip_header(&self, upper_len: usize) -> Vec<u8> {
        let behind = self.between * 8 + upper_len;
        if !self.is_v4 {
            let mut header = vec![0x60 | self.tos >> 4, self.tos << 4, 0, 0];
            header.extend((behind as u16).to_be_bytes());
            header.extend([if self.between > 0 { 60 } else { self.protocol() }, 64]);
            header.extend([0xfd; 32]);
            if self.between > 0 {
                let mut extension = vec![0; self.between * 8];
                extension[..3].copy_from_slice(&[self.protocol(), self.between as u8 - 1, 1]);
                extension[3] = extension.len() as u8 - 4;
                header.extend(extension);
            }
            return header;
        }
        let mut header = vec![0x45 + self.between as u8 * 2, self.tos];
        header.extend(((IPV4_LEN + behind) as u16).to_be_bytes());
        header.extend(self.id.to_be_bytes());
        header.extend([0x40, 0, 63, self.protocol(), 0, 0]);
        header.extend([10; 8]);
        header.extend(vec![1; self.between * 8]);
        let sum = !plain_sum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    }

    /// The segments, each built from nothing.
    fn model(&self, payload_len: usize) -> Vec<Vec<u8>> {
        let chunks: Vec<_> = self.payload.chunks(payload_len).collect();
        let last = chunks.len() - 1;
        let segment = |(index, chunk): (usize, &&[u8])| {
            let mut flags = self.flags;
            if index != 0 {
                flags &= !CWR;
            }
            if index != last {
                flags &= !(FIN | PSH);
            }
            let parts = Parts {
                flags,
                id: self.id.wrapping_add(index as u16),
                sequence: self.sequence.wrapping_add((index * payload_len) as u32),
                payload: chunk.to_vec(),
                ..self.clone()
            };
            parts.packet(false)
        };
        chunks.iter().enumerate().map(segment).collect()
    }
}

fn parts(payload_len: impl Into<prop::collection::SizeRange>) -> impl Strategy<Value = Parts> {
    (
        (any::<(bool, bool)>(), prop_oneof![3 => Just(0), 1 => 1usize..5]),
        any::<(u8, u16, u32, u8)>(),
        (0usize..11, any::<u8>()),
        prop::collection::vec(any::<u8>(), payload_len),
    )
        .prop_map(|(((is_v4, is_tcp), between), numbers, (words, option), payload)| Parts {
            between,
            is_v4,
            is_tcp,
            tos: numbers.0,
            id: numbers.1,
            sequence: numbers.2,
            flags: numbers.3,
            tcp_options: vec![option; words * 4],
            payload,
        })
}

fn segments_of(cut: &Cut, packet: &[u8]) -> Vec<Vec<u8>> {
    let segment = |index| {
        let mut segment = vec![0xee; cut.segment_len(index) + 3];
        let len = cut.write(packet, index, &mut segment);
        assert_eq!(len, cut.segment_len(index));
        assert_eq!(segment.split_off(len), [0xee; 3], "nothing behind is touched");
        segment
    };
    (0..cut.count()).map(segment).collect()
}

/// Whether all checksums of a packet are right, found with another implementation than ours.
fn verifies(packet: &[u8]) -> bool {
    let (inner, behind) = (inner_packet(packet).unwrap(), upper(packet).unwrap());
    let header = &packet[behind.offset..];
    let (addresses, ip_is_right) = match packet[0] >> 4 {
        4 => (&packet[12..20], plain_sum(&packet[..behind.offset]) == 0xffff),
        _ => (&packet[8..40], true),
    };
    let len = (header.len() as u32).to_be_bytes();
    let all = [addresses, &len, &[0, 0, 0, behind.protocol], header].concat();
    inner.len == packet.len() && ip_is_right && plain_sum(&all) == 0xffff
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn segments_are_those_of_the_model(
        parts in parts(1..5000), payload_len in prop_oneof![1u16..80, 500u16..1500, Just(u16::MAX)],
    ) {
        let packet = parts.packet(true);
        let cut = Cut::new(parts.segments(payload_len), Some(parts.place()), &packet).unwrap();
        let segments = segments_of(&cut, &packet);
        prop_assert_eq!(&segments, &parts.model(payload_len.into()));
        prop_assert!(segments.iter().all(|segment| verifies(segment)));
    }

    #[test]
    fn a_checksum_that_the_kernel_says_nothing_of_is_computed(parts in parts(1..3000), field: u16) {
        let parts = Parts { between: 0, ..parts };
        let mut packet = parts.packet(true);
        let at = parts.upper_at() + usize::from(parts.place().offset);
        packet[at..at + 2].copy_from_slice(&field.to_be_bytes());
        let cut = Cut::new(parts.segments(700), None, &packet).unwrap();
        prop_assert_eq!(segments_of(&cut, &packet), parts.model(700));
    }

    #[test]
    fn a_finished_checksum_is_the_right_one(parts in parts(0..2000)) {
        let mut packet = parts.packet(true);
        finish_checksum(parts.place(), &mut packet).unwrap();
        prop_assert!(verifies(&packet));
        let at = parts.upper_at() + usize::from(parts.place().offset);
        prop_assert_ne!(&packet[at..at + 2], &[0, 0]);
    }

    #[test]
    fn a_changed_super_packet_is_refused_or_cut_into_packets(
        parts in parts(1..300), payload_len in 0u16..200, changes in prop::collection::vec((0usize..90, any::<u8>()), 1..4),
        end in prop_oneof![2 => Just(usize::MAX), 1 => 0usize..400], claims: bool,
    ) {
        let mut packet = parts.packet(true);
        for (at, value) in changes {
            let len = packet.len();
            packet[at % len] = value;
        }
        packet.truncate(end);
        let checksum = claims.then(|| parts.place());
        if let Ok(cut) = Cut::new(parts.segments(payload_len), checksum, &packet) {
            for segment in segments_of(&cut, &packet) {
                prop_assert_eq!(inner_packet(&segment).unwrap().len, segment.len());
            }
        }
    }

    #[test]
    fn a_checksum_anywhere_harms_nothing(
        mut packet in prop::collection::vec(any::<u8>(), 0..80), start in 0u16..100, offset in 0u16..100,
    ) {
        let fits = usize::from(start) + usize::from(offset) + 2 <= packet.len();
        let result = finish_checksum(PartialChecksum { start, offset }, &mut packet);
        prop_assert_eq!(result.is_ok(), fits);
    }
}

fn plain(is_v4: bool, is_tcp: bool) -> Parts {
    Parts {
        between: 0,
        is_v4,
        is_tcp,
        tos: 2,
        id: 0xffff,
        sequence: u32::MAX - 5,
        flags: 0x10 | FIN | PSH | CWR,
        tcp_options: vec![1; 12],
        payload: (0..2500u16).map(|i| i as u8).collect(),
    }
}

#[test]
fn flags_numbers_and_ids_wrap_and_stand_where_they_belong() {
    let parts = plain(true, true);
    let packet = parts.packet(true);
    let cut = Cut::new(parts.segments(1000), Some(parts.place()), &packet).unwrap();
    let segments = segments_of(&cut, &packet);
    let read = |s: &Vec<u8>| (s[1], s[4..6].to_vec(), s[24..28].to_vec(), s[33], s.len());
    let expected = [
        (2, vec![0xff, 0xff], vec![0xff, 0xff, 0xff, 0xfa], 0x10 | CWR, 1052),
        (2, vec![0, 0], vec![0, 0, 3, 0xe2], 0x10, 1052),
        (2, vec![0, 1], vec![0, 0, 7, 0xca], 0x10 | FIN | PSH, 552),
    ];
    assert_eq!(segments.iter().map(read).collect::<Vec<_>>(), expected);
}

#[test]
fn a_udp_checksum_of_zero_is_sent_as_its_other_form() {
    for is_v4 in [true, false] {
        let mut parts = plain(is_v4, false);
        parts.payload = vec![0; 64];
        // The second datagram's own checksum in its payload leaves a sum of zero.
        let second = &parts.model(32)[1];
        let at = parts.upper_at() + 6;
        let checksum = [second[at], second[at + 1]];
        parts.payload[32..34].copy_from_slice(&checksum);
        let packet = parts.packet(true);
        let cut = Cut::new(parts.segments(32), Some(parts.place()), &packet).unwrap();
        let segments = segments_of(&cut, &packet);
        assert_eq!(segments[1][at..at + 2], [0xff, 0xff]);
        assert!(verifies(&segments[1]));
    }
}

#[test]
fn the_longest_super_packet_is_cut() {
    for (is_v4, is_tcp) in [(true, true), (false, true), (true, false), (false, false)] {
        let mut parts = plain(is_v4, is_tcp);
        let headers = parts.upper_at() + if is_tcp { 32 } else { 8 };
        parts.payload = vec![9; 65_535 - headers];
        let packet = parts.packet(true);
        for payload_len in [1, 1368, 65_535] {
            let checksum = Some(parts.place());
            let cut = Cut::new(parts.segments(payload_len), checksum, &packet).unwrap();
            assert_eq!(cut.count(), (65_535 - headers).div_ceil(payload_len.into()));
            for index in [0, cut.count() - 1] {
                let mut segment = vec![0; cut.segment_len(index)];
                cut.write(&packet, index, &mut segment);
                assert!(verifies(&segment));
            }
        }
    }
}

#[test]
fn what_does_not_hold_together_is_refused() {
    type Change = fn(&mut Vec<u8>, &mut Segments, &mut Option<PartialChecksum>);
    let tcp_v4: [(&str, Change); 15] = [
        ("another kind", |_, s, _| s.kind = SegmentKind::Udp),
        ("another version", |_, s, _| s.kind = SegmentKind::TcpV6),
        ("empty segments", |_, s, _| s.payload_len = 0),
        ("not IP", |p, _, _| p[0] = 0x55),
        ("a short IP header", |p, _, _| p[0] = 0x44),
        ("a longer packet", |p, _, _| p.push(0)),
        ("a shorter packet", |p, _, _| p.truncate(p.len() - 1)),
        ("another protocol", |p, _, _| p[9] = 17),
        ("a first fragment", |p, _, _| p[6] = 0x20),
        ("a later fragment", |p, _, _| p[7] = 1),
        ("a short TCP header", |p, _, _| p[32] = 0x40),
        ("a TCP header beyond the end", |p, _, _| {
            p.truncate(60);
            p[2..4].copy_from_slice(&[0, 60]);
            p[32] = 0xf0;
        }),
        ("no payload", |p, _, _| {
            p.truncate(52);
            p[2..4].copy_from_slice(&[0, 52]);
        }),
        ("a checksum that begins elsewhere", |_, _, c| c.as_mut().unwrap().start += 2),
        ("a checksum that stands elsewhere", |_, _, c| c.as_mut().unwrap().offset += 2),
    ];
    let udp_v6: [(&str, Change); 5] = [
        ("another kind", |_, s, _| s.kind = SegmentKind::TcpV6),
        ("a shorter UDP packet", |p, _, _| p[44] -= 1),
        ("a longer UDP packet", |p, _, _| p[44] += 1),
        ("a fragment", |p, _, _| p[6] = 44),
        ("no UDP header", |p, _, _| {
            p.truncate(47);
            p[4..6].copy_from_slice(&[0, 7]);
        }),
    ];
    for (parts, changes) in [(plain(true, true), &tcp_v4[..]), (plain(false, false), &udp_v6[..])] {
        for (name, change) in changes {
            let mut packet = parts.packet(true);
            let (mut segments, mut checksum) = (parts.segments(1000), Some(parts.place()));
            assert!(Cut::new(segments, checksum, &packet).is_ok());
            change(&mut packet, &mut segments, &mut checksum);
            let refused = Cut::new(segments, checksum, &packet);
            assert_eq!(refused.err(), Some(DropReason::BadOffload), "{name}");
        }
    }
}

#[test]
fn options_whose_destination_nobody_knows_are_not_guessed_at() {
    let parts = Parts { between: 1, ..plain(true, true) };
    let packet = parts.packet(true);
    assert!(Cut::new(parts.segments(1000), None, &packet).is_err());
    assert!(Cut::new(parts.segments(1000), Some(parts.place()), &packet).is_ok());
}
