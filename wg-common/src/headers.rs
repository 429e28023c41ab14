//! Reading and writing Ethernet, IPv4, IPv6 and UDP headers; checksums.
//!
//! [`locate`] finds the UDP datagram in a frame. It is written over [`Bytes`], so that the steer
//! program in the kernel and the daemon run the very same code, and the tests of one hold for the
//! other. What is not plainly a whole datagram in the forms it knows is `None`: the kernel's own
//! stack knows the rest.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use core::ops::Range;

use crate::outcome::DropReason;

/// Bytes of an Ethernet header without tags.
pub const ETHERNET_LEN: usize = 14;
/// Bytes that an 802.1Q or 802.1ad tag adds.
pub const VLAN_TAG_LEN: usize = 4;
/// Tags that [`locate`] looks behind.
pub const VLAN_TAGS_MAX: usize = 2;
/// Bytes of an IPv4 header without options.
pub const IPV4_LEN: usize = 20;
/// Bytes of an IPv6 header without extension headers.
pub const IPV6_LEN: usize = 40;
/// Bytes of a UDP header.
pub const UDP_LEN: usize = 8;
/// Most bytes that stand before the message in a frame that [`locate`] understands.
pub const OUTER_LEN_MAX: usize = ETHERNET_LEN + VLAN_TAGS_MAX * VLAN_TAG_LEN + IPV6_LEN + UDP_LEN;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// EtherType of an 802.1Q tag.
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// EtherType of an 802.1ad (QinQ) service tag.
pub const ETHERTYPE_QINQ: u16 = 0x88a8;
/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;

/// First byte of an IPv4 header without options: version 4, five words.
const IPV4_PLAIN: u8 = 0x45;
/// "More fragments" and the fragment offset in the third word of an IPv4 header.
const IPV4_FRAGMENT: u16 = 0x3fff;

/// A packet whose bytes can be read one header field at a time.
pub trait Bytes {
    /// Length of the packet in bytes.
    fn len(&self) -> usize;

    /// Whether the packet has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `N` bytes from `offset` on, or `None` if the packet ends before them.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;

    /// The sum of the words of 16 bits, in the order of memory, of the first `len` bytes, a multiple of four; it is to
    /// be folded still. `None` if the packet ends before.
    #[inline(always)]
    fn sum(&self, len: u32) -> Option<u64> {
        let mut sum = 0;
        for at in (0..len as usize).step_by(4) {
            sum += u32::from_ne_bytes(self.read(at)?) as u64;
        }
        Some(sum)
    }

    /// The `u16` in network byte order at `offset`.
    #[inline(always)]
    fn be16(&self, offset: usize) -> Option<u16> {
        self.read(offset).map(u16::from_be_bytes)
    }
}

impl Bytes for [u8] {
    #[inline(always)]
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
    }
}

/// Which version of IP carries a datagram.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IpVersion {
    /// IPv4, without options.
    V4,
    /// IPv6, without extension headers.
    V6,
}

/// Where the parts of a UDP datagram stand in its frame; offsets in bytes from the frame's start.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Located {
    /// Version of the IP header.
    pub version: IpVersion,
    /// Offset of the IP header.
    pub ip: usize,
    /// Offset of the UDP header.
    pub udp: usize,
    /// Length of what the UDP header says it carries. Padding behind it does not count.
    pub payload_len: usize,
}

impl Located {
    /// Offset of the first byte behind the UDP header.
    #[inline(always)]
    pub const fn payload(&self) -> usize {
        self.udp + UDP_LEN
    }
}

/// Finds the UDP datagram in an Ethernet frame.
///
/// Knows up to [`VLAN_TAGS_MAX`] tags, IPv4 without options and not fragmented, IPv6 without
/// extension headers. Lengths must hold together: UDP inside IP inside the frame. Checksums are not
/// looked at: they are unfinished on traffic between local interfaces, and the message's tag
/// proves more.
#[inline(always)]
pub fn locate<B: Bytes + ?Sized>(frame: &B) -> Option<Located> {
    let mut ip = ETHERNET_LEN;
    let mut ethertype = frame.be16(12)?;
    // By hand, not in a loop: the offsets of each branch are constants to the kernel's verifier.
    if is_tag(ethertype) {
        ethertype = frame.be16(ip + 2)?;
        ip += VLAN_TAG_LEN;
        if is_tag(ethertype) {
            ethertype = frame.be16(ip + 2)?;
            ip += VLAN_TAG_LEN;
        }
    }
    let (version, udp, ip_payload_len) = match ethertype {
        ETHERTYPE_IPV4 => {
            let [plain, _tos, total_hi, total_lo, _, _, fragment_hi, fragment_lo, _ttl, protocol] =
                frame.read::<10>(ip)?;
            let fragment = u16::from_be_bytes([fragment_hi, fragment_lo]) & IPV4_FRAGMENT;
            if plain != IPV4_PLAIN || fragment != 0 || protocol != PROTOCOL_UDP {
                return None;
            }
            let total_len = u16::from_be_bytes([total_hi, total_lo]) as usize;
            (IpVersion::V4, ip + IPV4_LEN, total_len.checked_sub(IPV4_LEN)?)
        }
        ETHERTYPE_IPV6 => {
            let [version, _, _, _, payload_hi, payload_lo, next_header] = frame.read::<7>(ip)?;
            if version >> 4 != 6 || next_header != PROTOCOL_UDP {
                return None;
            }
            let payload_len = u16::from_be_bytes([payload_hi, payload_lo]) as usize;
            (IpVersion::V6, ip + IPV6_LEN, payload_len)
        }
        _ => return None,
    };
    let udp_len = frame.be16(udp + 4)? as usize;
    if udp_len > ip_payload_len || udp + ip_payload_len > frame.len() {
        return None;
    }
    Some(Located { version, ip, udp, payload_len: udp_len.checked_sub(UDP_LEN)? })
}

#[inline(always)]
const fn is_tag(ethertype: u16) -> bool {
    ethertype == ETHERTYPE_VLAN || ethertype == ETHERTYPE_QINQ
}

/// A UDP datagram in its frame: who sent it to whom, and where its payload stands.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OuterDatagram {
    /// Sender. The scope of a link-local IPv6 address is 0: the frame does not tell it.
    pub src: SocketAddr,
    /// Receiver; scope as for `src`.
    pub dst: SocketAddr,
    /// TOS byte (IPv4) or traffic class (IPv6): DSCP and ECN.
    pub tos: u8,
    /// The payload's bytes in the frame, by the UDP header's length.
    pub payload: Range<usize>,
}

/// Reads the outer headers of a frame; `None` for everything that [`locate`] leaves to the kernel.
pub fn parse_frame(frame: &[u8]) -> Option<OuterDatagram> {
    let at = locate(frame)?;
    let (src, dst, tos) = match at.version {
        IpVersion::V4 => {
            let [src, dst] = [frame.read::<4>(at.ip + 12)?, frame.read::<4>(at.ip + 16)?];
            (Ipv4Addr::from(src).into(), Ipv4Addr::from(dst).into(), frame.read::<1>(at.ip + 1)?[0])
        }
        IpVersion::V6 => {
            let [src, dst] = [frame.read::<16>(at.ip + 8)?, frame.read::<16>(at.ip + 24)?];
            let class = (frame.be16(at.ip)? >> 4) as u8;
            (Ipv6Addr::from(src).into(), Ipv6Addr::from(dst).into(), class)
        }
    };
    Some(OuterDatagram {
        src: SocketAddr::new(src, frame.be16(at.udp)?),
        dst: SocketAddr::new(dst, frame.be16(at.udp + 2)?),
        tos,
        payload: at.payload()..at.payload() + at.payload_len,
    })
}

/// What an opened packet's IP header says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InnerPacket {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Bytes of the packet, header included; what stands behind them is padding.
    pub len: usize,
}

/// Reads the IP header of an opened packet, which may have padding behind it.
///
/// # Errors
/// [`DropReason::BadInnerVersion`] if it is neither IPv4 nor IPv6; [`DropReason::BadInnerLength`] if
/// it is empty, if its header is not whole, or if the header's length does not fit into it.
#[inline]
pub fn inner_packet(packet: &[u8]) -> Result<InnerPacket, DropReason> {
    let (header_len, len) = match IpHeader::of(packet)? {
        IpHeader::V4(h) => ((h[0] & 0x0f) as usize * 4, u16::from_be_bytes([h[2], h[3]]) as usize),
        IpHeader::V6(h) => (IPV6_LEN, IPV6_LEN + u16::from_be_bytes([h[4], h[5]]) as usize),
    };
    if header_len < IPV4_LEN || len < header_len || len > packet.len() {
        return Err(DropReason::BadInnerLength);
    }
    let (src, dst) = IpHeader::of(packet)?.addresses();
    Ok(InnerPacket { src, dst, len })
}

/// The destination of a packet that our own kernel routed into the tunnel: its header must be
/// whole, its lengths are not questioned.
///
/// # Errors
/// [`DropReason::BadInnerVersion`] and [`DropReason::BadInnerLength`], as [`inner_packet`].
#[inline]
pub fn inner_destination(packet: &[u8]) -> Result<IpAddr, DropReason> {
    Ok(IpHeader::of(packet)?.addresses().1)
}

/// An address as its bytes stand in a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AddressBytes {
    /// Of IPv4.
    V4([u8; 4]),
    /// Of IPv6.
    V6([u8; 16]),
}

/// As [`inner_destination`], for whom an address is enough, and why there is none does not matter.
#[inline(always)]
pub fn destination_bytes<P: Bytes + ?Sized>(packet: &P) -> Option<AddressBytes> {
    let [first] = packet.read(0)?;
    match first >> 4 {
        4 => packet.read(16).map(AddressBytes::V4),
        6 => packet.read(24).map(AddressBytes::V6),
        _ => None,
    }
}

/// The fixed part of an inner packet's IP header.
enum IpHeader<'a> {
    V4(&'a [u8; IPV4_LEN]),
    V6(&'a [u8; IPV6_LEN]),
}

impl<'a> IpHeader<'a> {
    #[inline(always)]
    fn of(packet: &'a [u8]) -> Result<Self, DropReason> {
        let first = packet.first().ok_or(DropReason::BadInnerLength)?;
        match first >> 4 {
            4 => packet.first_chunk().map(Self::V4).ok_or(DropReason::BadInnerLength),
            6 => packet.first_chunk().map(Self::V6).ok_or(DropReason::BadInnerLength),
            _ => Err(DropReason::BadInnerVersion),
        }
    }

    /// Source and destination.
    #[inline(always)]
    fn addresses(&self) -> (IpAddr, IpAddr) {
        match *self {
            Self::V4(&[.., a, b, c, d, e, f, g, h]) => {
                (Ipv4Addr::from([a, b, c, d]).into(), Ipv4Addr::from([e, f, g, h]).into())
            }
            Self::V6(h) => {
                let mut both = [[0; 16]; 2];
                both[0].copy_from_slice(&h[8..24]);
                both[1].copy_from_slice(&h[24..40]);
                (Ipv6Addr::from(both[0]).into(), Ipv6Addr::from(both[1]).into())
            }
        }
    }
}

/// An 802.1Q or 802.1ad tag.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct VlanTag {
    /// [`ETHERTYPE_VLAN`] or [`ETHERTYPE_QINQ`].
    pub ethertype: u16,
    /// Priority, drop eligibility and VLAN number, as they stand in the tag.
    pub control: u16,
}

/// All that stands before a message in its frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OuterHeaders {
    /// Destination MAC address.
    pub dst_mac: [u8; 6],
    /// Source MAC address.
    pub src_mac: [u8; 6],
    /// Tags from the outside in; a second one without a first one is not written.
    pub tags: [Option<VlanTag>; VLAN_TAGS_MAX],
    /// Sender.
    pub src: SocketAddr,
    /// Receiver, of the same version as `src`.
    pub dst: SocketAddr,
    /// TOS byte or traffic class.
    pub tos: u8,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// Identification of IPv4, by which a router that fragments tells datagrams apart. IPv6 has none in a whole
    /// packet.
    pub id: u16,
}

impl OuterHeaders {
    /// Bytes before the message.
    pub fn len(&self) -> usize {
        let tags = self.tags.iter().take_while(|tag| tag.is_some()).count();
        let ip = if self.src.is_ipv4() { IPV4_LEN } else { IPV6_LEN };
        ETHERNET_LEN + tags * VLAN_TAG_LEN + ip + UDP_LEN
    }

    /// Never: there is no frame without headers.
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Writes the headers into the first [`OuterHeaders::len`] bytes of `frame`; the rest of it is
    /// the message and must be there already, since the UDP checksum covers it.
    ///
    /// As the kernel's WireGuard does it: IPv4 with "don't fragment" clear, IPv6 with flow label 0, UDP with
    /// a checksum in both. `None`, with `frame` in an unspecified state, if the headers do not fit, if the message
    /// is longer than IP can say, or if `src` and `dst` are of different versions.
    pub fn write(&self, frame: &mut [u8]) -> Option<()> {
        let (headers, message) = frame.split_at_mut_checked(self.len())?;
        self.write_before(headers, message.len(), Checksum::default().bytes(message))
    }

    /// As [`OuterHeaders::write`], with a `message` that is still elsewhere: copies it behind the headers in the
    /// pass that its checksum needs. `None`, too, if `frame` is not just as long as both.
    pub fn write_with(&self, message: &[u8], frame: &mut [u8]) -> Option<()> {
        let (headers, room) = frame.split_at_mut_checked(self.len())?;
        if room.len() != message.len() {
            return None;
        }
        let sum = Checksum::default().copied(message, room);
        self.write_before(headers, message.len(), sum)
    }

    /// Writes the headers before a message of which the length and the sum are known.
    fn write_before(&self, headers: &mut [u8], message_len: usize, sum: Checksum) -> Option<()> {
        let mut at = Cursor { frame: headers, offset: 0, message_len };
        at.put(self.dst_mac)?;
        at.put(self.src_mac)?;
        for tag in self.tags.iter().map_while(|tag| *tag) {
            at.put(tag.ethertype.to_be_bytes())?;
            at.put(tag.control.to_be_bytes())?;
        }
        let pseudo = match (self.src, self.dst) {
            (SocketAddr::V4(src), SocketAddr::V4(dst)) => {
                at.put(ETHERTYPE_IPV4.to_be_bytes())?;
                let ip = at.offset;
                let total_len = u16::try_from(at.rest_len()).ok()?;
                let udp_len = total_len.checked_sub(IPV4_LEN as u16)?;
                at.put([IPV4_PLAIN, self.tos])?;
                at.put(total_len.to_be_bytes())?;
                at.put(self.id.to_be_bytes())?;
                at.put([0, 0, self.ttl, PROTOCOL_UDP, 0, 0])?;
                at.put(src.ip().octets())?;
                at.put(dst.ip().octets())?;
                let sum = Checksum::default().bytes(at.frame.get(ip..at.offset)?).finish();
                at.frame.get_mut(ip + 10..ip + 12)?.copy_from_slice(&sum.to_be_bytes());
                Checksum::pseudo(self.src.ip(), self.dst.ip(), PROTOCOL_UDP, udp_len.into())
            }
            (SocketAddr::V6(src), SocketAddr::V6(dst)) => {
                at.put(ETHERTYPE_IPV6.to_be_bytes())?;
                let udp_len = u16::try_from(at.rest_len().checked_sub(IPV6_LEN)?).ok()?;
                at.put((0x6000 | u16::from(self.tos) << 4).to_be_bytes())?;
                at.put([0, 0])?;
                at.put(udp_len.to_be_bytes())?;
                at.put([PROTOCOL_UDP, self.ttl])?;
                at.put(src.ip().octets())?;
                at.put(dst.ip().octets())?;
                Checksum::pseudo(self.src.ip(), self.dst.ip(), PROTOCOL_UDP, udp_len.into())
            }
            _ => return None,
        };
        let udp = at.offset;
        let udp_len = u16::try_from(at.rest_len()).ok()?;
        at.put(self.src.port().to_be_bytes())?;
        at.put(self.dst.port().to_be_bytes())?;
        at.put(udp_len.to_be_bytes())?;
        at.put([0, 0])?;
        let sum = match pseudo.bytes(at.frame.get(udp..)?).and(sum).finish() {
            // Zero on the wire means "no checksum" (RFC 768), which IPv6 does not allow.
            0 => 0xffff,
            sum => sum,
        };
        at.frame.get_mut(udp + 6..udp + 8)?.copy_from_slice(&sum.to_be_bytes());
        Some(())
    }
}

/// Writes one field after the other into what stands before a message.
struct Cursor<'a> {
    frame: &'a mut [u8],
    offset: usize,
    message_len: usize,
}

impl Cursor<'_> {
    fn rest_len(&self) -> usize {
        self.frame.len() - self.offset + self.message_len
    }

    fn put<const N: usize>(&mut self, bytes: [u8; N]) -> Option<()> {
        *self.frame.get_mut(self.offset..)?.first_chunk_mut()? = bytes;
        self.offset += N;
        Some(())
    }
}

/// The internet checksum (RFC 1071) of what was added to it so far.
///
/// It is a sum of words as the host reads them, of any size: in one's complement that comes to the same, but
/// for the order of bytes, which [`Checksum::finish`] puts right (RFC 1071 §2). It has room for more bytes
/// than any packet has.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Checksum(u64);

impl Checksum {
    /// Starts with the pseudo header of an upper-layer packet of `len` bytes.
    ///
    /// # Panics
    /// If `src` and `dst` are of different versions.
    pub fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, len: u32) -> Self {
        let addresses = match (src, dst) {
            (IpAddr::V4(s), IpAddr::V4(d)) => Self(0).bytes(&s.octets()).bytes(&d.octets()),
            (IpAddr::V6(s), IpAddr::V6(d)) => Self(0).bytes(&s.octets()).bytes(&d.octets()),
            _ => panic!("source and destination are of one version"),
        };
        addresses.word(protocol.into()).word((len >> 16) as u16).word(len as u16)
    }

    /// Adds a word in host byte order, which stands in the packet in network byte order.
    #[must_use]
    #[inline]
    pub const fn word(self, word: u16) -> Self {
        Self(self.0 + word.to_be() as u64)
    }

    /// Adds what was added to another one, which may have ended with a part of odd length.
    #[must_use]
    #[inline]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// Adds bytes; only the last part added may be of odd length.
    #[must_use]
    #[inline]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        let (blocks, rest) = bytes.as_chunks();
        let sum = Self(self.0 + sum_of_rest(rest));
        if blocks.is_empty() { sum } else { Self(sum.0 + sum_of_blocks(blocks)) }
    }

    /// Adds bytes, as [`Checksum::bytes`], and copies them to `to`.
    ///
    /// # Panics
    /// If `to` is of another length.
    #[must_use]
    #[inline]
    pub fn copied(self, bytes: &[u8], to: &mut [u8]) -> Self {
        assert_eq!(bytes.len(), to.len(), "as many bytes as are copied");
        let ((blocks, rest), (to_blocks, to_rest)) = (bytes.as_chunks(), to.as_chunks_mut());
        to_rest.copy_from_slice(rest);
        Self(self.0 + sum_of_rest(rest) + sum_of_copied_blocks(blocks, to_blocks))
    }

    /// The checksum for the header, host byte order.
    pub const fn finish(self) -> u16 {
        !u16::from_be(fold(self.0))
    }
}

/// The checksum after one 16-bit word that it covers became `new` instead of `old`
/// (RFC 1624, equation 3).
pub const fn checksum_update(checksum: u16, old: u16, new: u16) -> u16 {
    !fold(!checksum as u64 + !old as u64 + new as u64)
}

/// The checksum after an aligned 32-bit field that it covers became `new` instead of `old`.
pub const fn checksum_update_u32(checksum: u16, old: u32, new: u32) -> u16 {
    let high = checksum_update(checksum, (old >> 16) as u16, (new >> 16) as u16);
    checksum_update(high, old as u16, new as u16)
}

/// Bytes that are summed at once.
const BLOCK_LEN: usize = 32;
/// Blocks whose sums [`Lanes`] have room for.
const BLOCKS_MAX: usize = 1 << 16;

/// The words of a block, as the host reads them.
type Words = [u32; BLOCK_LEN / 4];

/// Sums of the words in [`BLOCKS_MAX`] blocks at most, as lanes that compilers make vectors of.
#[derive(Default)]
struct Lanes {
    /// The words. What goes beyond 32 bits is lost, and found again by `upper`.
    all: Words,
    /// The upper halves of the words.
    upper: Words,
}

impl Lanes {
    #[inline(always)]
    fn add(&mut self, words: Words) {
        for ((all, upper), word) in self.all.iter_mut().zip(&mut self.upper).zip(words) {
            *all = all.wrapping_add(word);
            // Of 2^16 halves, each below 2^16.
            *upper = upper.wrapping_add(word >> 16);
        }
    }

    /// The sum of their 16-bit halves. That of the lower ones is below 2^32 too, and so what is left of a lane
    /// without the upper ones.
    #[inline(always)]
    fn sum(&self) -> u64 {
        let lanes = self.all.iter().zip(&self.upper);
        lanes.map(|(all, &upper)| u64::from(all.wrapping_sub(upper << 16)) + u64::from(upper)).sum()
    }
}

#[inline(always)]
fn words(block: &[u8; BLOCK_LEN]) -> Words {
    let (words, _) = block.as_chunks();
    core::array::from_fn(|at| u32::from_ne_bytes(words[at]))
}

fn sum_of_blocks(blocks: &[[u8; BLOCK_LEN]]) -> u64 {
    let of_part = |part: &[[u8; BLOCK_LEN]]| {
        let mut lanes = Lanes::default();
        part.iter().for_each(|block| lanes.add(words(block)));
        lanes.sum()
    };
    blocks.chunks(BLOCKS_MAX).map(of_part).sum()
}

/// As [`sum_of_blocks`]. Copies them as well, in the same pass: what was loaded for the one is not loaded again
/// for the other.
fn sum_of_copied_blocks(blocks: &[[u8; BLOCK_LEN]], to: &mut [[u8; BLOCK_LEN]]) -> u64 {
    let mut sum = 0;
    for (part, to) in blocks.chunks(BLOCKS_MAX).zip(to.chunks_mut(BLOCKS_MAX)) {
        let mut lanes = Lanes::default();
        for (block, to) in part.iter().zip(to) {
            let words = words(block);
            let (to, _) = to.as_chunks_mut();
            to.iter_mut().zip(words).for_each(|(to, word)| *to = word.to_ne_bytes());
            lanes.add(words);
        }
        sum += lanes.sum();
    }
    sum
}

/// The sum of fewer bytes than a block has, in steps that halve: a loop over so few costs more.
#[inline(always)]
fn sum_of_rest(mut rest: &[u8]) -> u64 {
    let halves = |word: u64| (word & 0xffff_ffff) + (word >> 32);
    let mut sum = 0;
    if let Some((bytes, behind)) = rest.split_first_chunk::<16>() {
        let (words, _) = bytes.as_chunks();
        sum += words.iter().map(|word| halves(u64::from_ne_bytes(*word))).sum::<u64>();
        rest = behind;
    }
    if let Some((bytes, behind)) = rest.split_first_chunk() {
        sum += halves(u64::from_ne_bytes(*bytes));
        rest = behind;
    }
    if let Some((bytes, behind)) = rest.split_first_chunk() {
        sum += u64::from(u32::from_ne_bytes(*bytes));
        rest = behind;
    }
    if let Some((bytes, behind)) = rest.split_first_chunk() {
        sum += u64::from(u16::from_ne_bytes(*bytes));
        rest = behind;
    }
    sum + rest.first().map_or(0, |&last| u64::from(u16::from_ne_bytes([last, 0])))
}

const fn fold(sum: u64) -> u16 {
    // Four folds bring any 64-bit sum below 2^16, carries included.
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mac() -> impl Strategy<Value = [u8; 6]> {
        any::<[u8; 6]>()
    }

    fn tag() -> impl Strategy<Value = VlanTag> {
        (prop_oneof![Just(ETHERTYPE_VLAN), Just(ETHERTYPE_QINQ)], any::<u16>())
            .prop_map(|(ethertype, control)| VlanTag { ethertype, control })
    }

    fn tags() -> impl Strategy<Value = [Option<VlanTag>; VLAN_TAGS_MAX]> {
        prop_oneof![
            Just([None, None]),
            tag().prop_map(|t| [Some(t), None]),
            (tag(), tag()).prop_map(|(a, b)| [Some(a), Some(b)]),
        ]
    }

    fn addresses() -> impl Strategy<Value = (IpAddr, IpAddr)> {
        prop_oneof![
            any::<([u8; 4], [u8; 4])>().prop_map(|(a, b)| (a.into(), b.into())),
            any::<([u8; 16], [u8; 16])>().prop_map(|(a, b)| (a.into(), b.into())),
        ]
    }

    fn headers() -> impl Strategy<Value = OuterHeaders> {
        (mac(), mac(), tags(), addresses(), any::<(u16, u16)>(), any::<(u8, u8, u16)>()).prop_map(
            |(dst_mac, src_mac, tags, (src, dst), ports, (tos, ttl, id))| OuterHeaders {
                dst_mac,
                src_mac,
                tags,
                src: SocketAddr::new(src, ports.0),
                dst: SocketAddr::new(dst, ports.1),
                tos,
                ttl,
                id,
            },
        )
    }

    fn message() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..1600)
    }

    fn frame(headers: &OuterHeaders, message: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; headers.len()];
        frame.extend_from_slice(message);
        headers.write(&mut frame).unwrap();
        frame
    }

    /// The same checksum, slowly: one word after the other with end-around carry.
    fn plain_checksum(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    /// The same frame, slowly: field after field as the RFCs draw them (791, 8200, 768), checksums word by
    /// word over bytes that are laid out for it.
    fn plain_frame(headers: &OuterHeaders, message: &[u8]) -> Vec<u8> {
        let udp_len = (8 + message.len()) as u16;
        let mut udp =
            [headers.src.port(), headers.dst.port(), udp_len, 0].map(u16::to_be_bytes).concat();
        udp.extend(message);
        let addresses = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let both = [addresses(headers.src.ip()), addresses(headers.dst.ip())].concat();
        let pseudo = [&both[..], &[0, 0], &udp_len.to_be_bytes(), &[0, 17], &udp].concat();
        let sum = plain_checksum(&pseudo);
        let sum: u16 = if sum == 0 { !0 } else { sum };
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        let mut frame = [headers.dst_mac, headers.src_mac].concat();
        for tag in headers.tags.iter().flatten() {
            frame.extend([tag.ethertype, tag.control].map(u16::to_be_bytes).concat());
        }
        let mut ip = Vec::new();
        if headers.src.is_ipv4() {
            frame.extend([0x08, 0x00]);
            ip.extend([0x45, headers.tos]);
            ip.extend((20 + udp_len).to_be_bytes());
            ip.extend(headers.id.to_be_bytes());
            ip.extend([0, 0, headers.ttl, 17, 0, 0]);
            ip.extend(both);
            let sum = plain_checksum(&ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            frame.extend([0x86, 0xdd]);
            ip.extend((6 << 28 | u32::from(headers.tos) << 20).to_be_bytes());
            ip.extend(udp_len.to_be_bytes());
            ip.extend([17, headers.ttl]);
            ip.extend(both);
        }
        [frame, ip, udp].concat()
    }

    proptest! {
        #[test]
        fn every_byte_is_what_a_slow_builder_writes(headers in headers(), message in message()) {
            prop_assert_eq!(frame(&headers, &message), plain_frame(&headers, &message));
        }

        #[test]
        fn what_is_written_is_read_back(headers in headers(), message in message()) {
            let frame = frame(&headers, &message);
            let read = parse_frame(&frame).unwrap();
            prop_assert_eq!((read.src, read.dst, read.tos), (headers.src, headers.dst, headers.tos));
            prop_assert_eq!(&frame[read.payload], &message[..]);
        }

        #[test]
        fn written_checksums_verify(headers in headers(), message in message()) {
            let frame = frame(&headers, &message);
            let at = locate(&frame[..]).unwrap();
            if at.version == IpVersion::V4 {
                prop_assert_eq!(plain_checksum(&frame[at.ip..at.udp]), 0);
            }
            let udp = &frame[at.udp..];
            let sum = Checksum::pseudo(headers.src.ip(), headers.dst.ip(), 17, udp.len() as u32);
            prop_assert_eq!(sum.bytes(udp).finish(), 0);
            prop_assert_ne!(&udp[6..8], &[0, 0]);
        }

        #[test]
        fn padding_behind_the_datagram_does_not_count(
            headers in headers(), message in message(), padding in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let whole = frame(&headers, &message);
            let mut padded = whole.clone();
            padded.extend(padding);
            prop_assert_eq!(parse_frame(&padded), parse_frame(&whole));
        }

        #[test]
        fn a_truncated_frame_is_left_to_the_kernel(
            headers in headers(), message in message(), cut in any::<prop::sample::Index>(),
        ) {
            let frame = frame(&headers, &message);
            prop_assert_eq!(parse_frame(&frame[..cut.index(frame.len())]), None);
        }

        #[test]
        fn no_bytes_lead_out_of_the_frame(frame in prop::collection::vec(any::<u8>(), 0..128)) {
            if let Some(read) = parse_frame(&frame) {
                prop_assert!(frame.get(read.payload).is_some());
            }
        }

        #[test]
        fn no_changed_byte_leads_out_of_the_frame(
            headers in headers(), message in message(),
            at in any::<prop::sample::Index>(), value in any::<u8>(),
        ) {
            let mut frame = frame(&headers, &message);
            let at = at.index(headers.len());
            frame[at] = value;
            if let Some(read) = parse_frame(&frame) {
                prop_assert!(frame.get(read.payload).is_some());
            }
        }

        #[test]
        fn headers_need_their_room(headers in headers(), len in any::<prop::sample::Index>()) {
            let mut frame = vec![0; len.index(headers.len())];
            prop_assert_eq!(headers.write(&mut frame), None);
            prop_assert_eq!(headers.write_with(&[], &mut frame), None);
        }

        #[test]
        fn a_message_is_copied_behind_its_headers(headers in headers(), message in message()) {
            let mut copied = vec![0xa5; headers.len() + message.len()];
            prop_assert_eq!(headers.write_with(&message, &mut copied), Some(()));
            prop_assert_eq!(&copied, &frame(&headers, &message));
            copied.push(0);
            prop_assert_eq!(headers.write_with(&message, &mut copied), None);
        }

        #[test]
        fn checksum_is_the_plain_one(bytes in message()) {
            prop_assert_eq!(Checksum::default().bytes(&bytes).finish(), plain_checksum(&bytes));
        }

        #[test]
        fn what_is_copied_is_summed_as_it_stands(bytes in message(), before: u16) {
            let mut to = vec![0xa5; bytes.len()];
            let sum = Checksum::default().word(before);
            prop_assert_eq!(sum.copied(&bytes, &mut to).finish(), sum.bytes(&bytes).finish());
            prop_assert_eq!(to, bytes);
        }

        #[test]
        fn a_word_counts_as_its_bytes(words in prop::collection::vec(any::<u16>(), 0..40)) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            let sum = words.iter().fold(Checksum::default(), |sum, &word| sum.word(word));
            prop_assert_eq!(sum.finish(), plain_checksum(&bytes));
        }

        #[test]
        fn updated_checksum_is_the_recomputed_one(
            mut words in prop::collection::vec(any::<u16>(), 2..40),
            at in any::<prop::sample::Index>(), new in any::<u32>(),
        ) {
            // RFC 1624 keeps the two zeros of one's complement apart only if the covered bytes are
            // not all zero, which no header is.
            words[0] |= 1;
            let bytes = |words: &[u16]| words.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<_>>();
            let at = 1 + at.index(words.len() - 1);
            let before = plain_checksum(&bytes(&words));
            let old = words[at];
            words[at] = new as u16;
            prop_assert_eq!(checksum_update(before, old, new as u16), plain_checksum(&bytes(&words)));

            words.push(0);
            let before = plain_checksum(&bytes(&words));
            let old = u32::from(words[at]) << 16 | u32::from(words[at + 1]);
            (words[at], words[at + 1]) = ((new >> 16) as u16, new as u16);
            prop_assert_eq!(checksum_update_u32(before, old, new), plain_checksum(&bytes(&words)));
        }

        #[test]
        fn inner_packet_never_promises_more_than_there_is(
            mut packet in prop::collection::vec(any::<u8>(), 0..128), version in 0u8..16, ihl in 0u8..16,
        ) {
            if let Some(first) = packet.first_mut() {
                *first = version << 4 | ihl;
            }
            match inner_packet(&packet) {
                Ok(inner) => {
                    prop_assert!(inner.len <= packet.len());
                    prop_assert_eq!(inner_destination(&packet), Ok(inner.dst));
                    let bytes = match inner.dst {
                        IpAddr::V4(dst) => AddressBytes::V4(dst.octets()),
                        IpAddr::V6(dst) => AddressBytes::V6(dst.octets()),
                    };
                    prop_assert_eq!(destination_bytes(&packet[..]), Some(bytes));
                    prop_assert_eq!(inner.src.is_ipv4(), version == 4);
                }
                Err(DropReason::BadInnerVersion) => prop_assert!(version != 4 && version != 6),
                Err(reason) => prop_assert_eq!(reason, DropReason::BadInnerLength),
            }
        }

        #[test]
        fn inner_packet_is_read_behind_its_outer_headers(headers in headers(), message in message(), padding in 0usize..16) {
            let mut frame = frame(&headers, &message);
            let at = locate(&frame[..]).unwrap();
            let len = frame.len() - at.ip;
            frame.resize(frame.len() + padding, 0);
            let inner = InnerPacket { src: headers.src.ip(), dst: headers.dst.ip(), len };
            prop_assert_eq!(inner_packet(&frame[at.ip..]), Ok(inner));
        }
    }

    /// The greatest sums that there are, of bytes for which the lanes are used once, just so, and again.
    #[test]
    fn long_runs_of_ones_are_summed_right() {
        const LANES_LEN: usize = BLOCKS_MAX * BLOCK_LEN;
        for len in [LANES_LEN - 32, LANES_LEN, LANES_LEN + 33, 2 * LANES_LEN + 1] {
            let (bytes, mut to) = (vec![0xff; len], vec![0; len]);
            let sum = Checksum::default().copied(&bytes, &mut to);
            assert_eq!(sum.finish(), plain_checksum(&bytes), "{len}");
            assert_eq!(Checksum::default().bytes(&to), sum, "{len}");
        }
    }

    #[test]
    #[should_panic = "as many bytes as are copied"]
    fn bytes_are_not_copied_to_fewer() {
        let _ = Checksum::default().copied(&[1; 40], &mut [0; 39]);
    }

    fn plain_v4() -> Vec<u8> {
        let headers = OuterHeaders {
            dst_mac: [2; 6],
            src_mac: [4; 6],
            tags: [None, None],
            src: "192.0.2.1:4444".parse().unwrap(),
            dst: "192.0.2.2:51820".parse().unwrap(),
            tos: 0,
            ttl: 64,
            id: 0,
        };
        frame(&headers, &[7; 32])
    }

    #[test]
    fn odd_forms_are_left_to_the_kernel() {
        // Name, offset in an untagged IPv4 frame, value.
        let cases: [(&str, usize, u8); 9] = [
            ("options", 14, 0x46),
            ("version", 14, 0x65),
            ("first fragment", 20, 0x20),
            ("later fragment", 21, 1),
            ("TCP", 23, 6),
            ("ARP", 13, 6),
            ("total length below the header", 17, 19),
            ("UDP length below its header", 39, 7),
            ("UDP length beyond IP", 39, 8 + 32 + 1),
        ];
        assert!(parse_frame(&plain_v4()).is_some());
        for (name, at, value) in cases {
            let mut frame = plain_v4();
            frame[at] = value;
            assert_eq!(parse_frame(&frame), None, "{name}");
        }
    }

    #[test]
    fn three_tags_are_left_to_the_kernel() {
        let mut frame = plain_v4();
        for tags in 1..=3 {
            frame.splice(12..12, [0x81, 0, 0, 5]);
            assert_eq!(parse_frame(&frame).is_some(), tags <= VLAN_TAGS_MAX, "{tags} tags");
        }
    }

    #[test]
    fn inner_lengths_are_checked() {
        let mut v4 = vec![0; 24];
        (v4[0], v4[3]) = (0x45, 24);
        assert_eq!(inner_packet(&v4).unwrap().len, 24);
        assert_eq!(inner_packet(&[]), Err(DropReason::BadInnerLength));
        assert_eq!(inner_packet(&v4[..19]), Err(DropReason::BadInnerLength));
        assert_eq!(inner_packet(&v4[..23]), Err(DropReason::BadInnerLength));
        for (first, total) in [(0x44, 24), (0x46, 23), (0x45, 19)] {
            (v4[0], v4[3]) = (first, total);
            assert_eq!(inner_packet(&v4), Err(DropReason::BadInnerLength), "{first:#x} {total}");
        }
        v4[0] = 0x55;
        assert_eq!(inner_packet(&v4), Err(DropReason::BadInnerVersion));

        let mut v6 = vec![0; 48];
        (v6[0], v6[5]) = (0x60, 8);
        assert_eq!(inner_packet(&v6).unwrap().len, 48);
        v6[5] = 9;
        assert_eq!(inner_packet(&v6), Err(DropReason::BadInnerLength));
        assert_eq!(inner_packet(&v6[..39]), Err(DropReason::BadInnerLength));
    }
}
