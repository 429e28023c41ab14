//! Does on packets from a TUN queue what the kernel left to be done: cuts a super-packet into the packets
//! that it stands for, and finishes checksums.
//!
//! A super-packet is believed only what its own headers say. Segments are those that the kernel would make
//! (`tcp_gso_segment`, `__udp_gso_segment`, `inet_gso_segment`).

use wg_common::headers::{
    Checksum, IPV4_LEN, IPV6_LEN, PROTOCOL_TCP, PROTOCOL_UDP, UDP_LEN, inner_packet,
};
use wg_common::outcome::DropReason;
use wg_common::upper::upper;

use super::vnet::{PartialChecksum, SegmentKind, Segments};

/// Offsets in an IPv4 header.
mod ipv4 {
    pub const TOTAL_LEN: usize = 2;
    pub const ID: usize = 4;
    pub const CHECKSUM: usize = 10;
}
/// Offset of the payload length in an IPv6 header.
const IPV6_PAYLOAD_LEN: usize = 4;
/// Offsets in a TCP header, and its flags.
mod tcp {
    pub const LEN_MIN: usize = 20;
    pub const LEN_MAX: usize = 60;
    pub const SEQUENCE: usize = 4;
    pub const DATA_OFFSET: usize = 12;
    pub const FLAGS: usize = 13;
    pub const CHECKSUM: usize = 16;
    pub const FIN: u8 = 0x01;
    pub const PSH: u8 = 0x08;
    pub const CWR: u8 = 0x80;
}
/// Offsets in a UDP header.
mod udp {
    pub const LEN: usize = 4;
    pub const CHECKSUM: usize = 6;
}

/// A super-packet that was found to hold together, and how it is cut. Its bytes are the caller's, who
/// shows them again for each segment.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    kind: SegmentKind,
    /// Bytes of the super-packet.
    len: usize,
    /// Where the TCP or UDP header begins.
    upper: usize,
    /// Bytes of all headers.
    headers_len: usize,
    /// Bytes that each segment carries, but for the last.
    payload_len: usize,
    /// What is the same in the IP headers of all segments, if they have a checksum.
    ip_sum: Checksum,
    /// What is the same in their pseudo headers and in their TCP or UDP headers.
    upper_sum: Checksum,
}

impl Cut {
    /// Looks whether `packet` can be cut into `segments`. `checksum` is what the virtio header says of
    /// its checksum.
    ///
    /// # Errors
    /// [`DropReason::BadOffload`] if it cannot: it is no whole TCP or UDP packet of that kind and IP version,
    /// is longer or shorter than its headers say, a fragment, or without payload, or its checksum is
    /// elsewhere than it belongs.
    pub fn new(
        segments: Segments,
        checksum: Option<PartialChecksum>,
        packet: &[u8],
    ) -> Result<Self, DropReason> {
        Self::read(segments, checksum, packet).ok_or(DropReason::BadOffload)
    }

    fn read(segments: Segments, checksum: Option<PartialChecksum>, packet: &[u8]) -> Option<Self> {
        let inner = inner_packet(packet).ok().filter(|inner| inner.len == packet.len())?;
        let behind = upper(packet).filter(|behind| behind.fragment.is_none())?;
        let header = packet.get(behind.offset..)?;
        let (protocol, header_len, checksum_at) = match (segments.kind, inner.src.is_ipv4()) {
            (SegmentKind::TcpV4, true) | (SegmentKind::TcpV6, false) => {
                let len = usize::from(header.get(tcp::DATA_OFFSET)? >> 4) * 4;
                (PROTOCOL_TCP, Some(len).filter(|len| *len >= tcp::LEN_MIN)?, tcp::CHECKSUM)
            }
            (SegmentKind::Udp, _) => {
                let len = header.get(udp::LEN..)?.first_chunk().copied()?;
                let is_whole = usize::from(u16::from_be_bytes(len)) == header.len();
                (PROTOCOL_UDP, is_whole.then_some(UDP_LEN)?, udp::CHECKSUM)
            }
            _ => return None,
        };
        let is_there = |checksum: PartialChecksum| {
            (usize::from(checksum.start), usize::from(checksum.offset))
                == (behind.offset, checksum_at)
        };
        let has_payload = header.len() > header_len && segments.payload_len > 0;
        if behind.protocol != protocol || !has_payload || !checksum.is_none_or(is_there) {
            return None;
        }
        let mut same = [0; tcp::LEN_MAX];
        let same = &mut same[..header_len];
        same.copy_from_slice(&header[..header_len]);
        let partial = [same[checksum_at], same[checksum_at + 1]];
        same[checksum_at..checksum_at + 2].fill(0);
        match segments.kind {
            SegmentKind::Udp => same[udp::LEN..udp::CHECKSUM].fill(0),
            SegmentKind::TcpV4 | SegmentKind::TcpV6 => {
                same[tcp::SEQUENCE..tcp::SEQUENCE + 4].fill(0);
                same[tcp::FLAGS] = 0;
            }
        }
        let plain_len = if inner.src.is_ipv4() { IPV4_LEN } else { IPV6_LEN };
        let pseudo = if behind.offset == plain_len {
            Checksum::pseudo(inner.src, inner.dst, protocol, 0)
        } else {
            // Options and routing headers can name another last destination than the header does
            // (RFC 8200 §8.1). Whoever made the packet knew it, and began the checksum with it.
            checksum?;
            let len = u16::try_from(header.len()).ok()?;
            Checksum::default().bytes(&partial).word(!len)
        };
        Some(Self {
            kind: segments.kind,
            len: packet.len(),
            upper: behind.offset,
            headers_len: behind.offset + header_len,
            payload_len: segments.payload_len.into(),
            ip_sum: ip_sum(&packet[..behind.offset], inner.src.is_ipv4()),
            upper_sum: pseudo.bytes(same),
        })
    }

    /// Number of segments, at least one.
    pub fn count(&self) -> usize {
        (self.len - self.headers_len).div_ceil(self.payload_len)
    }

    /// Bytes of segment `index`. All have the same, but for the last, which may be shorter.
    ///
    /// # Panics
    /// If there is no such segment.
    pub fn segment_len(&self, index: usize) -> usize {
        self.headers_len + self.payload(index).len()
    }

    /// Where the payload of segment `index` stands in the super-packet.
    fn payload(&self, index: usize) -> std::ops::Range<usize> {
        let start = self.headers_len + index * self.payload_len;
        assert!(start < self.len, "the segment is one of those counted");
        start..self.len.min(start + self.payload_len)
    }

    /// Writes segment `index` of `packet`, the super-packet that was looked at, to the beginning of
    /// `segment`, and gives its length: [`Cut::segment_len`]. It has all its checksums.
    ///
    /// # Panics
    /// If there is no such segment, if `packet` is shorter than what was looked at, or `segment` than
    /// what is written.
    pub fn write(&self, packet: &[u8], index: usize, segment: &mut [u8]) -> usize {
        let payload = self.payload(index);
        let len = self.headers_len + payload.len();
        let is_last = payload.end == self.len;
        let (headers, rest) = segment[..len].split_at_mut(self.headers_len);
        headers.copy_from_slice(&packet[..self.headers_len]);
        let (ip, header) = headers.split_at_mut(self.upper);
        self.write_ip(ip, index, len);
        // It fits: the whole did, by its IP header.
        let upper_len = (len - self.upper) as u16;
        let sum = self.upper_sum.word(upper_len).copied(&packet[payload], rest);
        match self.kind {
            SegmentKind::Udp => {
                put(header, udp::LEN, upper_len);
                put(header, udp::CHECKSUM, not_zero(sum.word(upper_len).finish()));
            }
            SegmentKind::TcpV4 | SegmentKind::TcpV6 => {
                let sum = self.write_tcp(header, index, is_last, sum);
                put(header, tcp::CHECKSUM, sum.finish());
            }
        }
        len
    }

    /// What differs in the IP header of a segment of `len` bytes.
    fn write_ip(&self, ip: &mut [u8], index: usize, len: usize) {
        if ip[0] >> 4 == 6 {
            return put(ip, IPV6_PAYLOAD_LEN, (len - IPV6_LEN) as u16);
        }
        let first = u16::from_be_bytes([ip[ipv4::ID], ip[ipv4::ID + 1]]);
        let (total_len, id) = (len as u16, first.wrapping_add(index as u16));
        put(ip, ipv4::TOTAL_LEN, total_len);
        put(ip, ipv4::ID, id);
        put(ip, ipv4::CHECKSUM, self.ip_sum.word(total_len).word(id).finish());
    }

    /// What differs in the TCP header of a segment, but for its checksum: adds it to `sum`.
    fn write_tcp(&self, header: &mut [u8], index: usize, is_last: bool, sum: Checksum) -> Checksum {
        let sequence = &mut header[tcp::SEQUENCE..tcp::SEQUENCE + 4];
        let first = sequence.first_chunk().copied().map(u32::from_be_bytes);
        let first = first.expect("the slice has four bytes");
        let at = first.wrapping_add((index * self.payload_len) as u32);
        sequence.copy_from_slice(&at.to_be_bytes());
        let flags = &mut header[tcp::FLAGS];
        if !is_last {
            *flags &= !(tcp::FIN | tcp::PSH);
        }
        if index > 0 {
            // The sender halved its window once (RFC 3168 §6.1.2).
            *flags &= !tcp::CWR;
        }
        sum.word((at >> 16) as u16).word(at as u16).word((*flags).into())
    }
}

/// Of an IPv4 header, what is the same in all segments. IPv6 headers have no checksum.
fn ip_sum(ip: &[u8], is_v4: bool) -> Checksum {
    if !is_v4 {
        return Checksum::default();
    }
    Checksum::default()
        .bytes(&ip[..ipv4::TOTAL_LEN])
        .bytes(&ip[ipv4::ID + 2..ipv4::CHECKSUM])
        .bytes(&ip[ipv4::CHECKSUM + 2..])
}

/// Finishes the checksum of a packet that is no super-packet.
///
/// # Errors
/// [`DropReason::BadOffload`] if it would stand outside of the packet.
pub fn finish_checksum(checksum: PartialChecksum, packet: &mut [u8]) -> Result<(), DropReason> {
    let covered = packet.get_mut(checksum.start.into()..).ok_or(DropReason::BadOffload)?;
    // The sum of the pseudo header is in its place and counts.
    let sum = not_zero(Checksum::default().bytes(covered).finish());
    let place = covered.get_mut(checksum.offset.into()..).and_then(|rest| rest.first_chunk_mut());
    *place.ok_or(DropReason::BadOffload)? = sum.to_be_bytes();
    Ok(())
}

/// Zero means "no checksum" in UDP (RFC 768), and elsewhere both forms of zero are right.
fn not_zero(sum: u16) -> u16 {
    if sum == 0 { 0xffff } else { sum }
}

fn put(header: &mut [u8], at: usize, value: u16) {
    header[at..at + 2].copy_from_slice(&value.to_be_bytes());
}
