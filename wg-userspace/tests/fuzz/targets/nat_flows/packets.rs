//! Packets as the RFCs draw them, with checksums from scratch, and the question which checksums of a packet are right.

use std::net::IpAddr;

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMPV6: u8 = 58;
pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;

/// What is in an IP packet.
#[derive(Clone, Debug)]
pub enum Content {
    Tcp {
        ports: [u16; 2],
        flags: u8,
        data: Vec<u8>,
    },
    Udp {
        ports: [u16; 2],
        has_checksum: bool,
        data: Vec<u8>,
    },
    Echo {
        is_request: bool,
        id: u16,
        data: Vec<u8>,
    },
    /// Type and code, the second word, and the first bytes of a packet.
    Error {
        kind: [u8; 2],
        rest: [u8; 4],
        quoted: Vec<u8>,
    },
    Other {
        protocol: u8,
        data: Vec<u8>,
    },
}

/// An IP packet.
#[derive(Clone, Debug)]
pub struct Packet {
    pub from: IpAddr,
    pub to: IpAddr,
    pub ttl: u8,
    pub dont_fragment: bool,
    /// Offset in bytes, and whether more follow.
    pub fragment: Option<(u16, bool)>,
    pub id: u16,
    /// Options of IPv4, or extension headers of IPv6 whose first one this is.
    pub options: Option<(u8, Vec<u8>)>,
    pub content: Content,
}

impl Packet {
    pub fn new(from: IpAddr, to: IpAddr, content: Content) -> Self {
        Self {
            from,
            to,
            ttl: 64,
            dont_fragment: false,
            fragment: None,
            id: 0x1d07,
            options: None,
            content,
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let (protocol, upper) = self.upper();
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let options = self.options.as_ref().map_or(&[][..], |(_, options)| options);
                assert!(options.len().is_multiple_of(4), "whole words");
                let header_len = 20 + options.len();
                let (offset, more) = self.fragment.unwrap_or_default();
                let word =
                    u16::from(self.dont_fragment) << 14 | u16::from(more) << 13 | (offset / 8);
                let mut header = vec![0x40 | (header_len / 4) as u8, 0];
                header.extend(((header_len + upper.len()) as u16).to_be_bytes());
                header.extend(self.id.to_be_bytes());
                header.extend(word.to_be_bytes());
                header.extend([self.ttl, protocol, 0, 0]);
                header.extend([from.octets(), to.octets()].concat());
                header.extend(options);
                let checksum = !sum(&[&header]);
                header[10..12].copy_from_slice(&checksum.to_be_bytes());
                [header, upper].concat()
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut next = protocol;
                let mut rest = upper;
                if let Some((offset, more)) = self.fragment {
                    let word = (offset | u16::from(more)).to_be_bytes();
                    let id = u32::from(self.id).to_be_bytes();
                    rest = [&[next, 0][..], &word, &id, &rest].concat();
                    next = 44;
                }
                if let Some((kind, options)) = &self.options {
                    rest = [&[next, 0][..], options, &rest].concat();
                    next = *kind;
                }
                let len = (rest.len() as u16).to_be_bytes();
                let start = [0x60, 0, 0, 0, len[0], len[1], next, self.ttl];
                [&start[..], &from.octets(), &to.octets(), &rest].concat()
            }
            _ => panic!("addresses of two families"),
        }
    }

    /// The protocol, and the upper layer.
    fn upper(&self) -> (u8, Vec<u8>) {
        let is_v4 = self.from.is_ipv4();
        let icmp = if is_v4 { ICMP } else { ICMPV6 };
        let two = |ports: &[u16; 2]| ports.map(u16::to_be_bytes).concat();
        let (protocol, mut upper, field) = match &self.content {
            Content::Tcp { ports, flags, data } => {
                let numbers = [0, 0, 0, 9, 0, 0, 0, 7, 0x50, *flags, 0x20, 0, 0, 0, 0, 0];
                (TCP, [&two(ports)[..], &numbers, data].concat(), 16)
            }
            Content::Udp { ports, data, .. } => {
                let len = (8 + data.len() as u16).to_be_bytes();
                (UDP, [&two(ports)[..], &len, &[0, 0], data].concat(), 6)
            }
            Content::Echo { is_request, id, data } => {
                let kind = match (is_v4, is_request) {
                    (true, true) => 8,
                    (true, false) => 0,
                    (false, true) => 128,
                    (false, false) => 129,
                };
                let [high, low] = id.to_be_bytes();
                (icmp, [&[kind, 0, 0, 0, high, low, 0, 1], &data[..]].concat(), 2)
            }
            Content::Error { kind, rest, quoted } => {
                (icmp, [&kind[..], &[0, 0], rest, quoted].concat(), 2)
            }
            Content::Other { protocol, data } => return (*protocol, data.clone()),
        };
        if let Content::Udp { has_checksum: false, .. } = self.content {
            return (protocol, upper);
        }
        let mut checksum = !sum(&[&pseudo(self.from, self.to, protocol, upper.len()), &upper]);
        if checksum == 0 && protocol == UDP {
            checksum = 0xffff;
        }
        upper[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
        (protocol, upper)
    }
}

/// One word after the other, with end-around carry (RFC 1071).
pub fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for pair in parts.concat().chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What a checksum covers besides: nothing in ICMP of IPv4.
fn pseudo(from: IpAddr, to: IpAddr, protocol: u8, len: usize) -> Vec<u8> {
    let addresses = match (from, to) {
        (IpAddr::V4(_), _) if protocol == ICMP => return Vec::new(),
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
        _ => panic!("addresses of two families"),
    };
    [&addresses[..], &(len as u32).to_be_bytes(), &[0, 0, 0, protocol]].concat()
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The addresses of a packet that has whole ones.
pub fn ends(packet: &[u8]) -> Option<[IpAddr; 2]> {
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
    match packet.first()? >> 4 {
        4 => Some([v4(12)?, v4(16)?]),
        6 => Some([v6(8)?, v6(24)?]),
        _ => None,
    }
}

/// A checksum that can be looked at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Checksum {
    Header,
    Upper,
    /// UDP has none.
    None,
    QuotedHeader,
    QuotedUpper,
}

/// The right checksums of a packet, and of the one that it quotes. Those of fragments, and of what is quoted in
/// part, cannot be looked at.
pub fn right(packet: &[u8]) -> Vec<Checksum> {
    let mut found = Vec::new();
    let Some((protocol, upper)) = look(packet, &mut found) else { return found };
    let is_error = match protocol {
        ICMP => matches!(upper.first(), Some(3 | 11 | 12)),
        ICMPV6 => matches!(upper.first(), Some(1..=4)),
        _ => false,
    };
    if is_error && upper.len() >= 8 {
        let mut quoted = Vec::new();
        look(&upper[8..], &mut quoted);
        found.extend(quoted.into_iter().map(|checksum| match checksum {
            Checksum::Header => Checksum::QuotedHeader,
            _ => Checksum::QuotedUpper,
        }));
    }
    found
}

/// Adds the right ones of this packet; gives protocol and upper layer, if all of it is there.
fn look<'a>(packet: &'a [u8], found: &mut Vec<Checksum>) -> Option<(u8, &'a [u8])> {
    let [from, to] = ends(packet)?;
    let (protocol, start, end) = if from.is_ipv4() {
        let (start, end) = (usize::from(packet[0] & 15) * 4, usize::from(word(packet, 2)));
        if start < 20 || start > packet.len() {
            return None;
        }
        if sum(&[&packet[..start]]) == 0xffff {
            found.push(Checksum::Header);
        }
        if word(packet, 6) & 0x3fff != 0 {
            return None;
        }
        (packet[9], start, end)
    } else {
        let end = 40 + usize::from(word(packet, 4));
        match packet[6] {
            // A fragment that is the whole packet.
            44 if packet.len() >= 48 && word(packet, 42) & 0xfff9 == 0 => (packet[40], 48, end),
            44 => return None,
            protocol => (protocol, 40, end),
        }
    };
    let upper = packet.get(start..end)?;
    let field = match protocol {
        TCP => 16,
        UDP => 6,
        ICMP if from.is_ipv4() => 2,
        ICMPV6 if !from.is_ipv4() => 2,
        _ => return None,
    };
    if upper.len() < field + 2 {
        return None;
    }
    if protocol == UDP && word(upper, field) == 0 {
        found.push(Checksum::None);
    } else if sum(&[&pseudo(from, to, protocol, upper.len()), upper]).is_multiple_of(0xffff) {
        // Of zeros alone the sum may be 0, to which kernels come as well (RFC 1624 §3).
        found.push(Checksum::Upper);
    }
    Some((protocol, upper))
}
