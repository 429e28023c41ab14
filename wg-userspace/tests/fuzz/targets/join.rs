//! Joining the packets of a batch, against a slow model of how the kernel cuts: what it gives is what
//! came in, but for ids that mean nothing, in the order of each flow, and nothing that it could have given
//! is left apart.

use wg_common::headers::inner_packet;
use wg_userspace::segments::join::{Batch, PACKETS_MAX, Plan, Run};
use wg_userspace::segments::vnet::{PartialChecksum, SegmentKind, VnetHeader};

use super::Input;

const TCP: u8 = 6;
const UDP: u8 = 17;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;
/// FIN, SYN, RST, URG.
const NO_DATA: u8 = 0x27;

/// What the next packet of a flow has, in which nothing is odd.
#[derive(Clone)]
struct Flow {
    v6: bool,
    protocol: u8,
    port: u8,
    id: u16,
    id_step: u16,
    sequence: u32,
    options_len: usize,
    flags: u8,
    tos: u8,
    fill: u8,
}

impl Flow {
    fn new(number: u8) -> Self {
        Self {
            v6: number & 1 != 0,
            protocol: if number & 2 != 0 { UDP } else { TCP },
            port: number & 4,
            // They turn over soon.
            id: 0xfffa,
            id_step: 1,
            sequence: 0xffff_fe00,
            options_len: if number & 4 != 0 { 12 } else { 0 },
            flags: ACK,
            tos: 0,
            fill: number,
        }
    }

    /// The next packet, with all checksums.
    fn packet(&mut self, payload_len: usize) -> Vec<u8> {
        let mut upper = vec![19, self.port, 19, 137];
        if self.protocol == TCP {
            upper.extend(self.sequence.to_be_bytes());
            upper.extend([1, 2, 3, 4, ((20 + self.options_len) / 4 * 16) as u8, self.flags]);
            upper.extend([1, 0, 0, 0, 0, 0]);
            upper.extend(std::iter::repeat_n(1, self.options_len));
        } else {
            upper.extend(((8 + payload_len) as u16).to_be_bytes());
            upper.extend([0, 0]);
        }
        upper.extend((0..payload_len).map(|at| self.fill.wrapping_add(at as u8)));
        let mut packet = Vec::new();
        if self.v6 {
            packet.extend([0x60 | self.tos >> 4, self.tos << 4 | 3, 2, 1]);
            packet.extend((upper.len() as u16).to_be_bytes());
            packet.extend([self.protocol, 64]);
            packet.extend([0xfd; 31]);
            packet.push(self.port);
        } else {
            packet.extend([0x45, self.tos]);
            packet.extend(((20 + upper.len()) as u16).to_be_bytes());
            packet.extend(self.id.to_be_bytes());
            packet.extend([0x40, 0, 64, self.protocol, 0, 0, 10, 0, 0, 2, 10, 0, 0, self.port]);
        }
        packet.extend(upper);
        finish(&mut packet);
        self.id = self.id.wrapping_add(self.id_step);
        self.sequence = self.sequence.wrapping_add(payload_len as u32);
        self.fill = self.fill.wrapping_add(7);
        packet
    }
}

/// Where TCP or UDP begins in a packet without options and extension headers.
fn upper_at(packet: &[u8]) -> usize {
    if packet[0] >> 4 == 4 { 20 } else { 40 }
}

fn protocol_of(packet: &[u8]) -> u8 {
    packet[if packet[0] >> 4 == 4 { 9 } else { 6 }]
}

fn checksum_at(packet: &[u8]) -> usize {
    upper_at(packet) + if protocol_of(packet) == TCP { 16 } else { 6 }
}

/// The sum of RFC 1071, one word after the other.
fn sum(words: &[u8]) -> u16 {
    words.chunks(2).fold(0_u16, |sum, pair| {
        let word = u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]);
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

/// What a checksum of TCP or UDP covers beside the packet.
fn pseudo(packet: &[u8]) -> Vec<u8> {
    let upper = upper_at(packet);
    let addresses = if upper == 20 { &packet[12..20] } else { &packet[8..40] };
    let [high, low] = ((packet.len() - upper) as u16).to_be_bytes();
    [addresses, &[0, protocol_of(packet), high, low]].concat()
}

/// Writes the checksums of a packet without options and extension headers.
fn finish(packet: &mut [u8]) {
    let (upper, at) = (upper_at(packet), checksum_at(packet));
    if upper == 20 {
        packet[10..12].fill(0);
        let sum = !sum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packet[at..at + 2].fill(0);
    let sum = match !sum(&[&pseudo(packet), &packet[upper..]].concat()) {
        0 if protocol_of(packet) == UDP => 0xffff,
        sum => sum,
    };
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

fn word(packet: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

/// What the kernel makes of a write to a TUN queue (`tcp_gso_segment`, `__udp_gso_segment`,
/// `inet_gso_segment`, `ipv6_gso_segment`).
fn cut(written: &[u8]) -> Vec<Vec<u8>> {
    let (vnet, whole) = written.split_first_chunk().expect("a virtio header");
    let vnet = VnetHeader::from_bytes(vnet).expect("one that the kernel knows");
    let Some(segments) = vnet.segments else {
        assert_eq!(vnet, VnetHeader::PLAIN);
        return vec![whole.to_vec()];
    };
    let (upper, at) = (upper_at(whole), checksum_at(whole));
    let headers_len = match segments.kind {
        SegmentKind::Udp => upper + 8,
        SegmentKind::TcpV4 | SegmentKind::TcpV6 => upper + usize::from(whole[upper + 12] >> 4) * 4,
    };
    assert_eq!(headers_len, usize::from(segments.headers_len));
    assert_eq!(inner_packet(whole).expect("a packet").len, whole.len());
    assert!(upper != 20 || sum(&whole[..20]) == 0xffff, "the checksum of IPv4");
    let start = upper as u16;
    assert_eq!(vnet.checksum, Some(PartialChecksum { start, offset: at as u16 - start }));
    assert_eq!(word(whole, at), sum(&pseudo(whole)));

    let (headers, payload) = whole.split_at(headers_len);
    let payloads: Vec<_> = payload.chunks(segments.payload_len.into()).collect();
    assert!(payloads.len() > 1, "a run of one is no run");
    let mut packets = Vec::new();
    for (number, payload) in payloads.iter().enumerate() {
        let mut packet = [headers, payload].concat();
        let len = packet.len() - if upper == 20 { 0 } else { 40 };
        let len_at = if upper == 20 { 2 } else { 4 };
        packet[len_at..len_at + 2].copy_from_slice(&(len as u16).to_be_bytes());
        if upper == 20 {
            let id = word(headers, 4).wrapping_add(number as u16);
            packet[4..6].copy_from_slice(&id.to_be_bytes());
        }
        if segments.kind == SegmentKind::Udp {
            let len = (packet.len() - upper) as u16;
            packet[upper + 4..upper + 6].copy_from_slice(&len.to_be_bytes());
        } else {
            let first = u32::from_be_bytes(*headers[upper + 4..].first_chunk().expect("TCP"));
            let before = number * usize::from(segments.payload_len);
            let sequence = first.wrapping_add(before as u32);
            packet[upper + 4..upper + 8].copy_from_slice(&sequence.to_be_bytes());
            assert_eq!(segments.has_cwr, headers[upper + 13] & CWR != 0);
            if number > 0 {
                packet[upper + 13] &= !CWR;
            }
            if number + 1 < payloads.len() {
                packet[upper + 13] &= !(PSH | FIN);
            }
        }
        finish(&mut packet);
        packets.push(packet);
    }
    packets
}

fn written(run: &Run<'_>) -> Vec<u8> {
    let head = run.head();
    run.parts(&head).iter().flat_map(|part| part.iter().copied()).collect()
}

/// Of a packet: between whom it goes, and its flow if it is told.
fn flow(packet: &[u8]) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
    let (len, addresses) = match packet.first()? >> 4 {
        4 => (20, 12..20),
        6 => (40, 8..40),
        _ => return None,
    };
    let ends = packet.get(..len)?[addresses].to_vec();
    let is_whole = match len {
        20 => {
            packet[0] == 0x45
                && packet[6] & 0xbf == 0
                && packet[7] == 0
                && usize::from(word(packet, 2)) == packet.len()
        }
        _ => usize::from(word(packet, 4)) + 40 == packet.len(),
    };
    let has_ports = [TCP, UDP].contains(&protocol_of(packet)) && packet.len() >= len + 4;
    let flow =
        (is_whole && has_ports).then(|| [&[protocol_of(packet)], &packet[len..len + 4]].concat());
    Some((ends, flow))
}

/// Whether nobody can tell that two packets are of different flows.
fn may_be_of_one_flow(one: &[u8], other: &[u8]) -> bool {
    match (flow(one), flow(other)) {
        (Some((ends, flow)), Some((other_ends, other_flow))) => {
            ends == other_ends && (flow.is_none() || other_flow.is_none() || flow == other_flow)
        }
        _ => true,
    }
}

/// Whether a packet carries data and nothing else, as far as it alone tells.
fn is_plain(packet: &[u8], uso: bool) -> bool {
    let Some((_, Some(_))) = flow(packet) else { return false };
    let (upper, mut finished) = (upper_at(packet), packet.to_vec());
    let (header_len, is_data) = if protocol_of(packet) == UDP {
        if packet.len() < upper + 8 {
            return false;
        }
        (8, uso && usize::from(word(packet, upper + 4)) == packet.len() - upper)
    } else {
        if packet.len() < upper + 20 {
            return false;
        }
        let has_data_flags = packet[upper + 13] & (NO_DATA | ACK) == ACK;
        let has_one_zero = [0, 0xffff].contains(&word(packet, upper + 16));
        let header_len = usize::from(packet[upper + 12] >> 4) * 4;
        (header_len, header_len >= 20 && has_data_flags && !has_one_zero)
    };
    finish(&mut finished);
    is_data && packet.len() > upper + header_len && finished == packet
}

/// Packets as they came from the kernel again: if ids mean nothing (RFC 6864 §4.1) and are all the same,
/// each is one more than the one before.
fn as_cut(packets: &[&[u8]]) -> Vec<Vec<u8>> {
    let is_fixed = |packet: &&[u8]| {
        packet.len() >= 20
            && packet[0] == 0x45
            && packet[6] & 0x40 != 0
            && packet[4..6] == packets[0][4..6]
    };
    let renumbers = packets.len() > 1 && packets.iter().all(is_fixed);
    let mut packets: Vec<Vec<u8>> = packets.iter().map(|packet| packet.to_vec()).collect();
    for (number, packet) in
        packets.iter_mut().enumerate().filter(|(number, _)| renumbers && *number > 0)
    {
        let id = word(packet, 4).wrapping_add(number as u16);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[10..12].fill(0);
        let sum = !sum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packets
}

/// Whether `packet` can follow the packets of a run: joined in the obvious way and cut, they are as they
/// came.
fn can_follow(run: &[&[u8]], packet: &[u8], uso: bool) -> bool {
    let first = run[0];
    if !is_plain(first, uso) || !is_plain(packet, uso) || !may_be_of_one_flow(first, packet) {
        return false;
    }
    let upper = upper_at(first);
    let (headers_len, kind) = match (protocol_of(first), upper) {
        (UDP, _) => (upper + 8, 5),
        (_, 20) => (upper + usize::from(first[upper + 12] >> 4) * 4, 1),
        _ => (upper + usize::from(first[upper + 12] >> 4) * 4, 4),
    };
    let all = || run.iter().copied().chain([packet]);
    if all().any(|packet| packet.len() <= headers_len) {
        return false;
    }
    let mut whole = first[..headers_len].to_vec();
    all().for_each(|packet| whole.extend(&packet[headers_len..]));
    if whole.len() > 0xffff {
        return false;
    }
    let len = whole.len() as u16;
    let mut is_ecn = 0;
    match upper {
        20 => whole[2..4].copy_from_slice(&len.to_be_bytes()),
        _ => whole[4..6].copy_from_slice(&(len - 40).to_be_bytes()),
    }
    if kind == 5 {
        whole[upper + 4..upper + 6].copy_from_slice(&(len - upper as u16).to_be_bytes());
    } else {
        whole[upper + 13] |= packet[upper + 13] & PSH;
        is_ecn = whole[upper + 13] & CWR;
    }
    finish(&mut whole);
    let (at, partial) = (checksum_at(&whole), sum(&pseudo(&whole)));
    whole[at..at + 2].copy_from_slice(&partial.to_be_bytes());
    let words = [headers_len, first.len() - headers_len, upper, at - upper];
    let words = words.iter().flat_map(|&word| (word as u16).to_ne_bytes());
    let written: Vec<u8> = [1, kind | is_ecn].into_iter().chain(words).chain(whole).collect();
    cut(&written) == as_cut(&all().collect::<Vec<_>>())
}

fn check(packets: &[Vec<u8>], uso: bool) {
    let batch: Batch<'_> = packets.iter().map(Vec::as_slice).collect();
    let plan = Plan::of(&batch, uso);
    let runs: Vec<Vec<&[u8]>> = plan.runs().map(|run| run.packets().collect()).collect();
    let place = |packet: &[u8]| {
        packets.iter().position(|other| std::ptr::eq(other.as_ptr(), packet.as_ptr()))
    };
    let mut order = Vec::new();
    for (run, packets) in plan.runs().zip(&runs) {
        assert_eq!(run.len(), packets.len());
        assert!(uso || run.kind() != Some(SegmentKind::Udp));
        let cut = cut(&written(&run));
        assert_eq!(cut, as_cut(packets), "as they came in");
        for (single, packet) in run.singles().zip(packets) {
            assert_eq!(written(&single), [&[0; VnetHeader::LEN], *packet].concat());
        }
        order
            .extend(packets.iter().filter(|packet| !packet.is_empty()).map(|packet| place(packet)));
    }
    let order: Vec<usize> = order.into_iter().map(|at| at.expect("one of the batch")).collect();
    assert_eq!(order.len(), packets.iter().filter(|packet| !packet.is_empty()).count());
    for (after, &second) in order.iter().enumerate() {
        for &first in &order[..after] {
            let in_order = first < second;
            assert!(first != second, "once");
            assert!(in_order || !may_be_of_one_flow(&packets[first], &packets[second]), "in order");
        }
    }
    // What came before each packet in its flow is a run that it could not be added to.
    for (at, packet) in packets.iter().enumerate().filter(|(_, packet)| !packet.is_empty()) {
        let before = packets[..at].iter().rposition(|other| may_be_of_one_flow(other, packet));
        let Some(before) = before.filter(|before| !packets[*before].is_empty()) else { continue };
        let run_of = |at: usize| {
            runs.iter().position(|run| run.iter().any(|packet| place(packet) == Some(at)))
        };
        if run_of(before) != run_of(at) {
            let run = &runs[run_of(before).expect("it is in one")];
            assert!(!can_follow(run, packet, uso), "{before} and {at} are left apart");
        }
    }
}

/// Steps make packets of flows, most of which follow each other, or change one that was made.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let uso = input.byte() & 1 == 0;
    let mut flows: Vec<Flow> = (0..8).map(Flow::new).collect();
    let mut packets: Vec<Vec<u8>> = Vec::new();
    while !input.is_empty() && packets.len() < PACKETS_MAX {
        let (kind, value) = (input.byte(), input.byte());
        let flow = &mut flows[usize::from(kind & 7)];
        match kind >> 3 {
            // A run.
            0..=3 => {
                let len = usize::from(input.byte());
                for _ in 0..=value % 64 {
                    packets.push(flow.packet(len));
                }
            }
            4..=7 => packets.push(flow.packet(value.into())),
            8 => packets.push(flow.packet(value as usize * 64)),
            // It loses some, or begins anew.
            9 => flow.sequence = flow.sequence.wrapping_add(value.into()),
            10 if value & 1 != 0 => flow.id_step ^= 1,
            10 => flow.id = flow.id.wrapping_add(u16::from(value) / 2),
            11 => flow.tos = value,
            12 => flow.flags ^= value,
            13 => flow.flags = ACK | value & (PSH | CWR),
            14 => flow.options_len = usize::from(value % 11) * 4,
            15 => *flow = Flow::new(kind & 7),
            // The checksum turns out right, or is wrong.
            kind @ 16..=27 => {
                let at = usize::from(input.byte());
                if let Some(packet) = packets.last_mut()
                    && let Some(byte) = packet.get_mut(at)
                {
                    *byte ^= value;
                    let has_headers = packet.len() >= 60 && matches!(packet[0] >> 4, 4 | 6);
                    if kind < 24 && has_headers {
                        finish(packet);
                    }
                }
            }
            28 => {
                if let Some(packet) = packets.last_mut() {
                    packet.truncate(packet.len().saturating_sub(value.into()));
                }
            }
            29 => {
                if let Some(packet) = packets.last_mut() {
                    packet.extend(input.bytes(value.into()));
                }
            }
            30 => {
                if let Some(packet) = packets.get(usize::from(value)) {
                    packets.push(packet.clone());
                }
            }
            _ => packets.push(input.bytes(value.into()).to_vec()),
        }
        packets.truncate(PACKETS_MAX);
    }
    check(&packets, uso);
}

/// Runs of each flow, interleaved, pushed, short, of long packets, and with each byte changed.
pub fn seeds() -> Vec<Vec<u8>> {
    let plain = |flow: u8| vec![0, flow, 63, 200];
    let mut seeds: Vec<Vec<u8>> = (0..8).map(plain).collect();
    let interleaved = [32_u8, 100, 33, 100, 34, 100, 35, 100, 36, 100, 37, 100].repeat(5);
    seeds.push([&[0], &interleaved[..]].concat());
    seeds.push([&[1], &interleaved[..]].concat());
    seeds.push([&[0], &[64, 255, 65, 255, 66, 255].repeat(8)[..]].concat());
    let step = [13 << 3, CWR, 32, 90, 13 << 3, 0, 32, 90, 32, 90, 13 << 3, PSH, 32, 90, 13 << 3, 0];
    seeds.push([&[0], &step.repeat(4)[..]].concat());
    // The same ids, where they mean nothing and where they do.
    for flow in 0..8 {
        let (toggle, run) = ([10 << 3 | flow, 1], [flow, 9, 100]);
        seeds.push([&[0], &toggle[..], &run, &toggle, &run, &toggle, &run].concat());
        let fragmentable = [32 | flow, 90, 16 << 3, 0x40, 6].repeat(3);
        seeds.push([&[0], &toggle[..], &fragmentable].concat());
    }
    for at in 0..60 {
        let flow = at & 3;
        let changed = [32 | flow, 90, 32 | flow, 90, 16 << 3, 1, at, 32 | flow, 90];
        seeds.push([&[0], &changed[..]].concat());
    }
    seeds
}
