//! A packet of any bytes is read, translated, shortened by a hop and answered. What is read is what a plain
//! parser finds. What is written are the addresses and ports that were asked for, and every checksum is as right
//! or as wrong as it was before.

use wg_common::map::AddressKey;
use wg_common::nat::error::{Error, Head, answer};
use wg_common::nat::packet::{Buffer, Sums};
use wg_common::nat::rewrite::{Change, End, decrement_ttl, translate, translate_error};
use wg_common::nat::tcp::{self, From, Segment};
use wg_common::nat::tuple::{Kind, Tuple};

use super::Input;

/// A packet, or one that is quoted, as the RFCs draw it; offsets from the start of all bytes.
#[derive(Clone, Debug, PartialEq)]
struct Plain {
    is_v4: bool,
    ip: usize,
    protocol: u8,
    upper: usize,
    kind: Kind,
}

impl Plain {
    /// Where the address of an end stands.
    fn address(&self, end: usize) -> std::ops::Range<usize> {
        let (first, len) = if self.is_v4 { (12, 4) } else { (8, 16) };
        let start = self.ip + first + end * len;
        start..start + len
    }

    fn key(&self, bytes: &[u8], end: usize) -> AddressKey {
        key(&bytes[self.address(end)])
    }

    /// Where the port of an end stands, and the checksum of the upper layer.
    fn fields(&self, end: usize) -> Option<(usize, usize)> {
        let (port, checksum) = match self.kind {
            Kind::Tcp => (2 * end, 16),
            Kind::Udp => (2 * end, 6),
            Kind::EchoRequest | Kind::EchoReply => (4, 2),
            _ => return None,
        };
        Some((self.upper + port, self.upper + checksum))
    }

    fn has_pseudo_header(&self) -> bool {
        !self.is_v4 || self.protocol != 1
    }

    /// The pseudo-header, but for the length, which does not change.
    fn pseudo(&self, bytes: &[u8]) -> u64 {
        let addresses = self.address(0).start..self.address(1).end;
        if self.has_pseudo_header() { sum(&bytes[addresses]) } else { 0 }
    }
}

/// The words of the bytes, added up; the same as another if both are modulo 0xffff.
fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)))
        .sum()
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn key(address: &[u8]) -> AddressKey {
    match address.len() {
        4 => AddressKey::v4(address.try_into().unwrap()),
        _ => AddressKey::v6(address.try_into().unwrap()),
    }
}

fn is_mapped(address: &[u8]) -> bool {
    address.len() == 16 && address[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]
}

/// What a packet is, before its upper layer was looked at: its length, what carries on, and where; and the offset of
/// a fragment with whether it is one at all. `Err` says why nobody looks further.
struct Network {
    len: usize,
    protocol: u8,
    upper: usize,
    fragment: Option<u16>,
}

fn network(packet: &[u8]) -> Option<Result<Network, Kind>> {
    let broken = Some(Err(Kind::Broken));
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            let (header_len, len) = (usize::from(packet[0] & 15) * 4, usize::from(word(packet, 2)));
            if header_len < 20 || len < header_len || len > packet.len() {
                return broken;
            }
            if header_len > 20 {
                return Some(Err(Kind::Unfit));
            }
            let (flags, protocol) = (word(packet, 6), packet[9]);
            let fragment = (flags & 0x3fff != 0).then_some(flags & 0x1fff);
            Some(Ok(Network { len, protocol, upper: 20, fragment }))
        }
        6 if packet.len() >= 40 => {
            let len = 40 + usize::from(word(packet, 4));
            if len > packet.len() || is_mapped(&packet[8..24]) || is_mapped(&packet[24..40]) {
                return broken;
            }
            if packet[6] != 44 {
                return Some(Ok(Network { len, protocol: packet[6], upper: 40, fragment: None }));
            }
            if len < 48 {
                return broken;
            }
            let fragment = Some(word(packet, 42) >> 3);
            Some(Ok(Network { len, protocol: packet[40], upper: 48, fragment }))
        }
        _ => None,
    }
}

/// What a packet is.
fn plain(packet: &[u8]) -> Option<Plain> {
    let is_v4 = packet.first()? >> 4 == 4;
    let found = network(packet)?;
    let of = |protocol, upper, kind| Some(Plain { is_v4, ip: 0, protocol, upper, kind });
    let Network { len, protocol, upper, fragment } = match found {
        Ok(network) => network,
        Err(kind) => return of(0, 0, kind),
    };
    match fragment {
        Some(1) if protocol == 6 => return of(protocol, upper, Kind::Broken),
        Some(1..) => return of(protocol, upper, Kind::LaterFragment),
        _ => {}
    }
    let rest = len - upper;
    let icmp = if is_v4 { 1 } else { 58 };
    let kind = match protocol {
        6 if rest >= 20 => Kind::Tcp,
        17 if rest >= 8 => Kind::Udp,
        6 | 17 => Kind::Broken,
        _ if protocol == icmp && rest < 8 => Kind::Broken,
        _ if protocol == icmp => match icmp_kind(is_v4, packet[upper]) {
            Kind::Error if fragment.is_some() => Kind::Unfit,
            kind => kind,
        },
        0 | 43 | 44 | 51 | 60 | 135 | 139 | 140 if !is_v4 => Kind::Unfit,
        _ => Kind::Other,
    };
    of(protocol, upper, kind)
}

fn icmp_kind(is_v4: bool, kind: u8) -> Kind {
    match (is_v4, kind) {
        (true, 8) | (false, 128) => Kind::EchoRequest,
        (true, 0) | (false, 129) => Kind::EchoReply,
        (true, 3 | 11 | 12) | (false, 1..=4) => Kind::Error,
        (true, 4 | 5) | (false, 137) => Kind::Unfit,
        _ => Kind::Other,
    }
}

/// What an error quotes.
fn quoted(packet: &[u8], outer: &Plain, len: usize) -> Option<Plain> {
    let (ip, is_v4) = (outer.upper + 8, outer.is_v4);
    let quote = &packet[ip..len];
    let (protocol, header) = if is_v4 {
        if quote.len() < 20 || quote[0] != 0x45 || word(quote, 6) & 0x1fff != 0 {
            return None;
        }
        (quote[9], 20)
    } else {
        if quote.len() < 40
            || quote[0] >> 4 != 6
            || is_mapped(&quote[8..24])
            || is_mapped(&quote[24..40])
        {
            return None;
        }
        match quote[6] {
            44 if quote.len() >= 48 && word(quote, 42) >> 3 == 0 => (quote[40], 48),
            44 => return None,
            next => (next, 40),
        }
    };
    if quote.len() < header + 8 {
        return None;
    }
    let kind = match (protocol, is_v4) {
        (6, _) => Kind::Tcp,
        (17, _) => Kind::Udp,
        (1, true) | (58, false) => icmp_kind(is_v4, quote[header]),
        _ => return None,
    };
    let found = Plain { is_v4, ip, protocol, upper: ip + header, kind };
    found.fields(0).is_some().then_some(found)
}

fn check_tuple(bytes: &[u8], tuple: &Tuple, plain: &Plain) {
    assert_eq!(tuple.is_v4, plain.is_v4);
    assert_eq!(tuple.source, plain.key(bytes, 0));
    assert_eq!(tuple.destination, plain.key(bytes, 1));
    assert_eq!(tuple.kind, plain.kind);
    if plain.upper != 0 {
        assert_eq!((tuple.protocol, usize::from(tuple.upper)), (plain.protocol, plain.upper));
    }
    let ports = [0, 1].map(|end| plain.fields(end).map_or(0, |(port, _)| word(bytes, port)));
    assert_eq!([tuple.source_port, tuple.destination_port].map(u16::from_be), ports);
}

/// Everything that a packet is held against after it was changed.
#[derive(Debug, PartialEq)]
struct Rest {
    /// Sums of what checksums cover, with them, modulo 0xffff.
    sums: Vec<u64>,
    /// The bytes without addresses, ports and checksums.
    bytes: Vec<u8>,
    /// Where there is none of UDP.
    none: Vec<bool>,
}

impl Rest {
    fn of(
        bytes: &[u8],
        outer: &Plain,
        inner: Option<&Plain>,
        len: usize,
        is_partial: bool,
    ) -> Self {
        let mut rest = Self { sums: Vec::new(), bytes: bytes.to_vec(), none: Vec::new() };
        for (plain, is_outer) in [(Some(outer), true), (inner, false)] {
            let Some(plain) = plain else { continue };
            rest.clear(plain.address(0).start..plain.address(1).end);
            if plain.is_v4 {
                rest.sums.push(sum(&bytes[plain.ip..plain.ip + 20]) % 0xffff);
                rest.clear(plain.ip + 10..plain.ip + 12);
            }
            let checksum = match (plain.fields(0), plain.kind) {
                (Some((_, checksum)), _) => checksum,
                (None, Kind::Error) => plain.upper + 2,
                (None, _) => continue,
            };
            let end = if is_outer { bytes.len() } else { len };
            for port in [0, 1].iter().filter_map(|&end| plain.fields(end)) {
                rest.clear(port.0..port.0 + 2);
            }
            // Quoted as far as the checksum, or the first byte of it, which nobody touches.
            if checksum + 2 > end {
                continue;
            }
            let found = u64::from(word(bytes, checksum));
            let is_none = plain.kind == Kind::Udp && found == 0;
            rest.none.push(is_none);
            let pseudo = plain.pseudo(bytes);
            if is_partial && is_outer {
                rest.sums.push((found + 0xffff * 0x1_0000 - pseudo) % 0xffff);
            } else if !is_none {
                rest.sums.push((pseudo + sum(&bytes[plain.upper..end])) % 0xffff);
            }
            rest.clear(checksum..checksum + 2);
        }
        rest
    }

    fn clear(&mut self, range: std::ops::Range<usize>) {
        self.bytes[range].fill(0);
    }
}

/// Who ends are to be from now on.
struct Wanted {
    addresses: [[u8; 16]; 2],
    ports: [u16; 2],
}

impl Wanted {
    fn address(&self, is_v4: bool, end: usize) -> &[u8] {
        &self.addresses[end][..if is_v4 { 4 } else { 16 }]
    }

    fn change(&self, is_v4: bool, end: usize) -> Change {
        let ends = [End::Source, End::Destination];
        Change {
            end: ends[end],
            address: key(self.address(is_v4, end)),
            port: self.ports[end].to_be(),
        }
    }
}

/// Changes the ends of `ends`, and compares what became of the packet.
fn check_translation(
    packet: &[u8],
    outer: &Plain,
    tuple: &Tuple,
    wanted: &Wanted,
    ends: &[usize],
    sums: Sums,
) {
    let mut bytes = packet.to_vec();
    let mut buffer = Buffer { bytes: &mut bytes, sums };
    let len = tuple.len as usize;
    let inner = if outer.kind == Kind::Error { quoted(packet, outer, len) } else { None };
    for &end in ends {
        let change = wanted.change(outer.is_v4, end);
        let done = if outer.kind == Kind::Error {
            let Some(quoted) = tuple.quoted(&buffer) else { return };
            translate_error(&mut buffer, tuple, &quoted, &change)
        } else {
            translate(&mut buffer, tuple, &change)
        };
        let may_be =
            outer.fields(0).is_some() || outer.kind == Kind::LaterFragment || inner.is_some();
        assert_eq!(done.is_some(), may_be);
        if !may_be {
            assert_eq!(buffer.bytes, packet, "what is not translated is left alone");
            return;
        }
    }
    let sums_after = buffer.sums;
    let is_partial = sums == Sums::Partial;
    let [before, after] =
        [packet, &bytes[..]].map(|b| Rest::of(b, outer, inner.as_ref(), len, is_partial));
    assert_eq!(before, after, "{outer:?} {inner:?}");
    if let (Sums::Whole(_), Sums::Whole(whole)) = (sums, sums_after) {
        assert_eq!(whole % 0xffff, Buffer::whole(&bytes) % 0xffff, "the sum of the whole packet");
    }
    for end in 0..2 {
        let is_changed = ends.contains(&end);
        let expected =
            if is_changed { wanted.address(outer.is_v4, end) } else { &packet[outer.address(end)] };
        assert_eq!(&bytes[outer.address(end)], expected);
        if let Some((port, _)) = outer.fields(end) {
            let is_echo = outer.kind != Kind::Tcp && outer.kind != Kind::Udp;
            let by = if is_echo { ends.last().copied() } else { is_changed.then_some(end) };
            let expected = by.map_or(word(packet, port), |by| wanted.ports[by]);
            assert_eq!(word(&bytes, port), expected);
        }
        if let Some(inner) = &inner {
            let expected = if is_changed {
                wanted.address(outer.is_v4, end)
            } else {
                &packet[inner.address(1 - end)]
            };
            assert_eq!(&bytes[inner.address(1 - end)], expected);
        }
    }
}

fn check_hop(packet: &[u8], outer: &Plain, tuple: &Tuple) {
    let mut bytes = packet.to_vec();
    let mut buffer = Buffer { bytes: &mut bytes, sums: Sums::Whole(Buffer::whole(packet)) };
    let done = decrement_ttl(&mut buffer, tuple);
    let sums = buffer.sums;
    assert_eq!(done.is_some(), tuple.ttl > 1);
    if done.is_none() {
        assert_eq!(bytes, packet);
        return;
    }
    let at = if outer.is_v4 { 8 } else { 7 };
    assert_eq!(bytes[at], packet[at] - 1);
    if outer.is_v4 {
        assert_eq!(sum(&bytes[..20]) % 0xffff, sum(&packet[..20]) % 0xffff);
    }
    let Sums::Whole(whole) = sums else { unreachable!("it was so before") };
    assert_eq!(whole % 0xffff, Buffer::whole(&bytes) % 0xffff);
    bytes[at] += 1;
    if outer.is_v4 {
        bytes[10..12].copy_from_slice(&packet[10..12]);
    }
    assert_eq!(bytes, packet);
}

/// Whether the checksums of an error hold.
fn holds(error: &[u8]) -> bool {
    let of = |sum: u64| sum.is_multiple_of(0xffff);
    if error[0] >> 4 == 4 {
        return of(sum(&error[..20])) && of(sum(&error[20..]));
    }
    of(sum(&error[8..]) + error.len() as u64 - 40 + 58)
}

fn check_answer(packet: &[u8], outer: &Plain, tuple: &Tuple, error: Error, from: &AddressKey) {
    let Some(found) = answer(packet, tuple, error, from) else { return };
    let quoted = &packet[..found.quoted_len as usize];
    let mut bytes = match found.head {
        Head::V4(head) => [&head, quoted].concat(),
        Head::V6(head) => [&head, quoted].concat(),
    };
    assert!(bytes.len() <= if outer.is_v4 { 576 } else { 1280 });
    if holds(&bytes) {
        return;
    }
    // It was taken for one whose checksum somebody is to finish.
    let head = bytes.len() - quoted.len();
    let (_, field) = outer.fields(0).expect("only such can be unfinished");
    let checksum = !((sum(&bytes[head + outer.upper..]) + 0xfffe) % 0xffff + 1) as u16;
    bytes[head + field..][..2].copy_from_slice(&checksum.to_be_bytes());
    assert!(holds(&bytes));
}

/// New ends, how the checksums stand and what is changed; then the packet.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let (choice, other) = (input.byte(), input.byte());
    let mut wanted = Wanted {
        addresses: [input.array(), input.array()],
        ports: [input.number(), input.number()],
    };
    for address in &mut wanted.addresses {
        // Nobody gives such.
        address[0] |= u8::from(is_mapped(address));
    }
    let state = input.byte();
    let packet = input.bytes(usize::MAX);
    let Some(tuple) = Tuple::of(packet) else {
        assert!(plain(packet).is_none());
        return;
    };
    let outer = plain(packet).expect("it has an IP header");
    check_tuple(packet, &tuple, &outer);
    let len = tuple.len as usize;
    match tuple.quoted(packet) {
        Some(found) => {
            let inner = quoted(packet, &outer, len).expect("it quotes a packet");
            check_tuple(packet, &found, &inner);
        }
        None => assert!(outer.kind != Kind::Error || quoted(packet, &outer, len).is_none()),
    }
    let sums = match choice % 4 {
        0 if matches!(outer.kind, Kind::Tcp | Kind::Udp)
            && tuple.has_checksum
            && !tuple.is_fragment =>
        {
            Sums::Partial
        }
        1 => Sums::Finished,
        _ => Sums::Whole(Buffer::whole(packet)),
    };
    // Nothing is echoed by a third one: an echo has one identifier.
    let is_echo = |kind| matches!(kind, Kind::EchoRequest | Kind::EchoReply);
    let echoes =
        is_echo(outer.kind) || tuple.quoted(packet).is_some_and(|quoted| is_echo(quoted.kind));
    let ends: &[usize] = match choice / 4 % 3 {
        0 => &[0],
        1 => &[1],
        _ if echoes => &[0],
        _ => &[0, 1],
    };
    check_translation(packet, &outer, &tuple, &wanted, ends, sums);
    check_hop(packet, &outer, &tuple);
    let error =
        if other & 1 == 0 { Error::TimeExceeded } else { Error::TooBig(u32::from(other) << 6) };
    check_answer(packet, &outer, &tuple, error, &key(wanted.address(outer.is_v4, 0)));
    if let (Kind::Tcp, Some(segment)) = (outer.kind, Segment::of(packet, &tuple)) {
        let from = [From::Inside, From::Outside];
        let (_, mut windows) = tcp::begin(&segment, from[usize::from(other >> 1 & 1)]);
        let after = tcp::step(state, &mut windows, &segment, from[usize::from(other >> 2 & 1)]);
        let is_forged = state & 1 == 0 && other & 4 != 0 && !segment.opens();
        assert!(!is_forged || after == state, "nobody inside has said anything");
        let _ = tuple.segment_len(packet, 1400);
    }
}

/// Whole packets of each kind, in both versions, with checksums that hold.
pub fn seeds() -> Vec<Vec<u8>> {
    let addresses = |is_v4: bool| -> Vec<u8> {
        match is_v4 {
            true => vec![10, 9, 0, 2, 192, 0, 2, 1],
            false => [[0xfd, 9], [0x20, 1]]
                .iter()
                .flat_map(|ip| [&ip[..], &[0; 13], &[7]].concat())
                .collect(),
        }
    };
    let ip = |is_v4: bool, protocol: u8, upper: &[u8]| {
        let mut packet = match is_v4 {
            true => {
                let [high, low] = (20 + upper.len() as u16).to_be_bytes();
                let start = [
                    &[0x45, 0, high, low, 0, 7, 0x40, 0, 64, protocol, 0, 0],
                    &addresses(true)[..],
                ]
                .concat();
                let checksum = !((sum(&start) % 0xffff) as u16);
                let mut start = start;
                start[10..12].copy_from_slice(&checksum.to_be_bytes());
                start
            }
            false => {
                let [high, low] = (upper.len() as u16).to_be_bytes();
                [&[0x60, 0, 0, 0, high, low, protocol, 64], &addresses(false)[..]].concat()
            }
        };
        packet.extend(upper);
        packet
    };
    let summed = |is_v4: bool, protocol: u8, mut upper: Vec<u8>, at: usize| {
        let pseudo = if protocol == 1 {
            0
        } else {
            sum(&addresses(is_v4)) + u64::from(protocol) + upper.len() as u64
        };
        let checksum = !(((pseudo + sum(&upper)) % 0xffff) as u16);
        upper[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        ip(is_v4, protocol, &upper)
    };
    let mut packets = Vec::new();
    for is_v4 in [true, false] {
        let icmp = if is_v4 { 1 } else { 58 };
        let tcp = [
            &[0x30, 0x39, 1, 0xbb, 0, 0, 0, 9, 0, 0, 0, 8, 0x80, 2, 2, 0, 0, 0, 0, 0][..],
            &[2, 4, 5, 0xb4, 1, 3, 3, 7, 0, 0, 0, 0],
        ]
        .concat();
        let udp = [0x30, 0x39, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4].to_vec();
        let echo = [if is_v4 { 8 } else { 128 }, 0, 0, 0, 1, 2, 0, 1, 9, 9].to_vec();
        let whole = [
            summed(is_v4, 6, tcp.clone(), 16),
            summed(is_v4, 17, udp.clone(), 6),
            summed(is_v4, icmp, echo, 2),
        ];
        for packet in &whole {
            let kind = if is_v4 { 3 } else { 2 };
            let error = [&[kind, 4, 0, 0, 0, 0, 5, 0], &packet[..]].concat();
            packets.push(summed(is_v4, icmp, error.clone(), 2));
            packets.push(summed(
                is_v4,
                icmp,
                error[..error.len().min(if is_v4 { 36 } else { 56 })].to_vec(),
                2,
            ));
        }
        packets.extend(whole);
        packets.push(ip(is_v4, 17, &udp));
        packets.push(ip(is_v4, 47, &udp));
        let mut fragment = ip(is_v4, 17, &udp);
        if is_v4 {
            fragment[6..8].copy_from_slice(&[0x20, 0]);
            packets.push(fragment.clone());
            fragment[6..8].copy_from_slice(&[0x20, 9]);
            packets.push(fragment);
        } else {
            packets.push(ip(false, 44, &[&[17, 0, 0, 1, 0, 0, 0, 7], &udp[..]].concat()));
            packets.push(ip(false, 44, &[&[17, 0, 0, 9, 0, 0, 0, 7], &udp[..]].concat()));
            packets.push(ip(false, 60, &udp));
        }
    }
    let ends = [[203, 0, 113, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [0xff; 16]].concat();
    let head =
        |i: usize| [&[i as u8, i as u8 * 5], &ends[..], &[0x12, 0x34, 0xff, 0xff, 0x43]].concat();
    packets.iter().enumerate().map(|(i, packet)| [&head(i)[..], packet].concat()).collect()
}
