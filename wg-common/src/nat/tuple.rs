//! Which flow a packet belongs to, and whether it can be translated.
//!
//! [`Tuple::of`] reads the IP header and the ports behind it; [`Tuple::quoted`] those of the packet that an ICMP
//! error is about. Whatever has an IP header has a tuple, so that rules can be asked about its addresses;
//! [`Kind`] says what may be done with it. Every offset is a constant of its family.

use crate::headers::{Bytes, IPV4_LEN, IPV6_LEN, PROTOCOL_TCP, PROTOCOL_UDP, UDP_LEN};
use crate::map::AddressKey;
use crate::mss::TCP_LEN;
use crate::nat::map::{FlowKey, FragmentKey, MappingKey, Protocol};
use crate::upper::{PROTOCOL_ICMP, PROTOCOL_ICMPV6};

/// Bytes of an ICMP header.
pub const ICMP_LEN: usize = 8;
/// Bytes of IPv6's fragment header.
const FRAGMENT_LEN: usize = 8;
/// Bytes of the upper layer that every ICMP error quotes (RFC 792).
const QUOTED_LEN: usize = 8;
/// Where the checksum stands in a TCP header.
const TCP_CHECKSUM: usize = 16;

/// Extension headers of IPv6 (RFC 8200, RFC 4302, RFC 6275, RFC 7401, RFC 5533).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;

/// "More fragments" and the fragment offset in the fourth word of an IPv4 header.
const V4_FRAGMENT: u16 = 0x3fff;
const V4_FRAGMENT_OFFSET: u16 = 0x1fff;
const V4_DONT_FRAGMENT: u16 = 0x4000;
/// The same in IPv6's fragment header: two bits between them are reserved.
const V6_FRAGMENT_OFFSET: u16 = 0xfff8;

/// What a packet is to translation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Kind {
    /// A TCP segment, or the first fragment of one with the whole of its header's fixed part.
    Tcp,
    /// A UDP datagram, or the first fragment of one.
    Udp,
    /// An echo request of ICMP or ICMPv6, or the first fragment of one.
    EchoRequest,
    /// An echo reply, likewise.
    EchoReply,
    /// An ICMP error: what it is about, [`Tuple::quoted`] says.
    Error,
    /// A fragment other than the first: it has addresses and an identification, and its ports are 0.
    LaterFragment,
    /// Another protocol, or another message of ICMP (neighbour discovery as well). Its ports are 0, it cannot be
    /// translated.
    Other,
    /// In a form that is not translated, and whose ports were not read: IPv4 options (a source route says that
    /// the destination is another one), extension headers of IPv6 other than a fragment header behind the IP
    /// header, redirects, source quenches (RFC 6633), a fragmented ICMP error.
    Unfit,
    /// Its lengths do not hold together, or its first fragment is so short, or a later one so early, that the
    /// header could be another one when they are put together (RFC 1858, RFC 3128).
    Broken,
}

/// What a packet says of itself. Ports are as they stand in it, in network byte order; an echo's identifier is
/// in both.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tuple {
    /// From whom.
    pub source: AddressKey,
    /// To whom.
    pub destination: AddressKey,
    /// From which port.
    pub source_port: u16,
    /// To which port.
    pub destination_port: u16,
    /// IP protocol number; of what is in the first fragment, where it is another one.
    pub protocol: u8,
    /// What it is.
    pub kind: Kind,
    /// TOS or traffic class.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Whether it is IPv4.
    pub is_v4: bool,
    /// Whether routers must not fragment it: as in IPv6 they never do.
    pub dont_fragment: bool,
    /// Whether it is a fragment, the first included.
    pub is_fragment: bool,
    /// Whether the checksum of the upper layer is there, and not 0 where that means none.
    pub has_checksum: bool,
    /// Offset of the upper layer's header.
    pub upper: u16,
    /// Of a fragment: its identification.
    pub fragment_id: u32,
    /// Bytes of the packet by its IP header; padding may stand behind them. Of a quoted packet: the offset at
    /// which the quotation ends at the latest.
    pub len: u32,
}

impl Tuple {
    /// Reads the packet; `None` if it has no IP header.
    #[inline(always)]
    pub fn of<B: Bytes + ?Sized>(packet: &B) -> Option<Self> {
        let [first] = packet.read(0)?;
        match first >> 4 {
            4 => Self::of_v4(packet),
            6 => Self::of_v6(packet),
            _ => None,
        }
    }

    /// Reads the packet that an ICMP error is about, as far as it is quoted; its source is who sent it. `None` if
    /// `self` is no [`Kind::Error`], or if the quotation is none that can be translated: of TCP, UDP or an echo, not
    /// a later fragment, without options or extension headers other than a fragment header, and with eight bytes
    /// behind its headers.
    #[inline(always)]
    pub fn quoted<B: Bytes + ?Sized>(&self, packet: &B) -> Option<Self> {
        if self.kind as u8 != Kind::Error as u8 {
            return None;
        }
        if self.is_v4 { self.quoted_v4(packet) } else { self.quoted_v6(packet) }
    }

    /// The key of its flow, for a packet that comes from inside.
    #[inline(always)]
    pub const fn flow_from_inside(&self) -> FlowKey {
        FlowKey {
            inner: self.source,
            remote: self.destination,
            inner_port: self.source_port,
            remote_port: self.remote_port(self.destination_port),
            protocol: self.protocol,
            padding: [0; 3],
        }
    }

    /// The key of its flow, for a packet that goes inside.
    #[inline(always)]
    pub const fn flow_from_outside(&self) -> FlowKey {
        FlowKey {
            inner: self.destination,
            remote: self.source,
            inner_port: self.destination_port,
            remote_port: self.remote_port(self.source_port),
            protocol: self.protocol,
            padding: [0; 3],
        }
    }

    /// The key of its source's mapping at a NIC.
    #[inline(always)]
    pub const fn mapping(&self, nic: u32) -> MappingKey {
        MappingKey {
            inner: self.source,
            inner_port: self.source_port,
            protocol: self.protocol,
            padding: 0,
            nic,
        }
    }

    /// The key by which its fragments are known, all with the addresses that they came with.
    #[inline(always)]
    pub const fn fragments(&self, ifindex: u32) -> FragmentKey {
        FragmentKey {
            source: self.source,
            destination: self.destination,
            id: self.fragment_id,
            ifindex,
            protocol: self.protocol as u32,
        }
    }

    /// Whose slots it takes; `None` if it cannot be translated by itself.
    #[inline(always)]
    pub const fn slots(&self) -> Option<Protocol> {
        match self.kind {
            Kind::Tcp => Some(Protocol::Tcp),
            Kind::Udp => Some(Protocol::Udp),
            Kind::EchoRequest | Kind::EchoReply => Some(Protocol::Echo),
            _ => None,
        }
    }

    /// Whether it is an echo request or reply.
    #[inline(always)]
    pub const fn is_echo(&self) -> bool {
        matches!(self.kind, Kind::EchoRequest | Kind::EchoReply)
    }

    /// Bytes of the largest packet that a super-packet of segments of `segment_len` bytes each (`gso_size`) becomes.
    /// `None` if it is neither TCP nor UDP.
    #[inline(always)]
    pub fn segment_len<B: Bytes + ?Sized>(&self, packet: &B, segment_len: u32) -> Option<u32> {
        let upper = self.upper as usize;
        let header = match self.kind {
            Kind::Tcp => (packet.read::<1>(upper + 12)?[0] >> 4) as u32 * 4,
            Kind::Udp => UDP_LEN as u32,
            _ => return None,
        };
        Some(self.upper as u32 + header + segment_len)
    }

    #[inline(always)]
    const fn remote_port(&self, port: u16) -> u16 {
        if self.is_echo() { 0 } else { port }
    }

    /// What is known of a packet before its upper layer was looked at.
    #[inline(always)]
    const fn without_ports(is_v4: bool, source: AddressKey, destination: AddressKey) -> Self {
        Self {
            source,
            destination,
            source_port: 0,
            destination_port: 0,
            protocol: 0,
            kind: Kind::Broken,
            tos: 0,
            ttl: 0,
            is_v4,
            dont_fragment: !is_v4,
            is_fragment: false,
            has_checksum: false,
            upper: if is_v4 { IPV4_LEN as u16 } else { IPV6_LEN as u16 },
            fragment_id: 0,
            len: 0,
        }
    }

    #[inline(always)]
    fn of_v4<B: Bytes + ?Sized>(packet: &B) -> Option<Self> {
        let header: [u8; IPV4_LEN] = packet.read(0)?;
        let mut tuple = Self::from_v4(&header);
        let word = u16::from_be_bytes([header[6], header[7]]);
        tuple.len = u16::from_be_bytes([header[2], header[3]]) as u32;
        let header_len = (header[0] & 0x0f) as u32 * 4;
        if header_len < IPV4_LEN as u32
            || tuple.len < header_len
            || tuple.len as usize > packet.len()
        {
            return Some(tuple);
        }
        if header_len > IPV4_LEN as u32 {
            tuple.kind = Kind::Unfit;
            return Some(tuple);
        }
        match word & V4_FRAGMENT_OFFSET {
            0 => tuple.read_upper::<B, IPV4_LEN>(packet),
            // Its bytes may be those of TCP's flags.
            1 if tuple.protocol == PROTOCOL_TCP => {}
            _ => tuple.kind = Kind::LaterFragment,
        }
        Some(tuple)
    }

    #[inline(always)]
    fn from_v4(h: &[u8; IPV4_LEN]) -> Self {
        let mut tuple = Self::without_ports(
            true,
            AddressKey::v4([h[12], h[13], h[14], h[15]]),
            AddressKey::v4([h[16], h[17], h[18], h[19]]),
        );
        let word = u16::from_be_bytes([h[6], h[7]]);
        tuple.protocol = h[9];
        tuple.tos = h[1];
        tuple.ttl = h[8];
        tuple.dont_fragment = word & V4_DONT_FRAGMENT != 0;
        tuple.is_fragment = word & V4_FRAGMENT != 0;
        tuple.fragment_id = u16::from_be_bytes([h[4], h[5]]) as u32;
        tuple
    }

    #[inline(always)]
    fn of_v6<B: Bytes + ?Sized>(packet: &B) -> Option<Self> {
        let mut tuple = Self::read_v6::<B, 0>(packet)?;
        let [high, low] = packet.read(4)?;
        tuple.len = IPV6_LEN as u32 + u16::from_be_bytes([high, low]) as u32;
        // The keys of mapped addresses are those of IPv4's flows, and no honest packet bears them (RFC 4942 §2.2).
        let is_mapped = tuple.source.is_v4() || tuple.destination.is_v4();
        if tuple.len as usize > packet.len() || is_mapped {
            return Some(tuple);
        }
        match tuple.protocol {
            FRAGMENT => {
                if tuple.len < (IPV6_LEN + FRAGMENT_LEN) as u32 {
                    return Some(tuple);
                }
                let offset = tuple.read_fragment::<B, IPV6_LEN>(packet)?;
                match offset {
                    0 => tuple.read_upper::<B, { IPV6_LEN + FRAGMENT_LEN }>(packet),
                    1 if tuple.protocol == PROTOCOL_TCP => {}
                    _ => tuple.kind = Kind::LaterFragment,
                }
            }
            _ => tuple.read_upper::<B, IPV6_LEN>(packet),
        }
        Some(tuple)
    }

    /// Addresses, next header and hop limit of the IPv6 header at `AT`.
    #[inline(always)]
    fn read_v6<B: Bytes + ?Sized, const AT: usize>(packet: &B) -> Option<Self> {
        let source = AddressKey::v6(packet.read(AT + 8)?);
        let destination = AddressKey::v6(packet.read(AT + 24)?);
        let mut tuple = Self::without_ports(false, source, destination);
        [tuple.protocol, tuple.ttl] = packet.read(AT + 6)?;
        let [high, low] = packet.read(AT)?;
        tuple.tos = high << 4 | low >> 4;
        Some(tuple)
    }

    /// Reads the fragment header at `AT`, and gives its offset in units of eight bytes.
    #[inline(always)]
    fn read_fragment<B: Bytes + ?Sized, const AT: usize>(&mut self, packet: &B) -> Option<u16> {
        let header: [u8; FRAGMENT_LEN] = packet.read(AT)?;
        self.protocol = header[0];
        self.is_fragment = true;
        self.upper = (AT + FRAGMENT_LEN) as u16;
        self.fragment_id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        Some((u16::from_be_bytes([header[2], header[3]]) & V6_FRAGMENT_OFFSET) >> 3)
    }

    /// Reads the header of the upper layer at `AT`.
    #[inline(always)]
    fn read_upper<B: Bytes + ?Sized, const AT: usize>(&mut self, packet: &B) {
        let len = self.len as usize - AT;
        match self.protocol {
            PROTOCOL_TCP if len >= TCP_LEN => self.read_ports::<B, AT>(packet, Kind::Tcp),
            PROTOCOL_UDP if len >= UDP_LEN => self.read_ports::<B, AT>(packet, Kind::Udp),
            PROTOCOL_ICMP if self.is_v4 && len >= ICMP_LEN => self.read_icmp::<B, AT>(packet),
            PROTOCOL_ICMPV6 if !self.is_v4 && len >= ICMP_LEN => self.read_icmp::<B, AT>(packet),
            PROTOCOL_TCP | PROTOCOL_UDP => {}
            PROTOCOL_ICMP if self.is_v4 => {}
            PROTOCOL_ICMPV6 if !self.is_v4 => {}
            HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION | MOBILITY | HIP
            | SHIM6
                if !self.is_v4 =>
            {
                self.kind = Kind::Unfit;
            }
            _ => self.kind = Kind::Other,
        }
    }

    #[inline(always)]
    fn read_ports<B: Bytes + ?Sized, const AT: usize>(&mut self, packet: &B, kind: Kind) {
        let Some([a, b, c, d, _, _, sum_0, sum_1]) = packet.read(AT) else { return };
        self.source_port = u16::from_ne_bytes([a, b]);
        self.destination_port = u16::from_ne_bytes([c, d]);
        self.has_checksum = self.protocol != PROTOCOL_UDP || [sum_0, sum_1] != [0, 0];
        self.kind = kind;
    }

    #[inline(always)]
    fn read_icmp<B: Bytes + ?Sized, const AT: usize>(&mut self, packet: &B) {
        let Some([kind, _, _, _, id_0, id_1]) = packet.read(AT) else { return };
        self.has_checksum = true;
        self.kind = icmp_kind(self.is_v4, kind);
        if self.is_echo() {
            self.source_port = u16::from_ne_bytes([id_0, id_1]);
            self.destination_port = self.source_port;
        }
        if self.kind as u8 == Kind::Error as u8 && self.is_fragment {
            self.kind = Kind::Unfit;
        }
    }

    #[inline(always)]
    fn quoted_v4<B: Bytes + ?Sized>(&self, packet: &B) -> Option<Self> {
        const IP: usize = IPV4_LEN + ICMP_LEN;

        if (self.len as usize) < IP + IPV4_LEN {
            return None;
        }
        let header: [u8; IPV4_LEN] = packet.read(IP)?;
        let mut quoted = Self::from_v4(&header);
        let is_later = u16::from_be_bytes([header[6], header[7]]) & V4_FRAGMENT_OFFSET != 0;
        if header[0] != 0x45 || is_later {
            return None;
        }
        quoted.len = self.len;
        quoted.upper = (IP + IPV4_LEN) as u16;
        quoted.read_quoted::<B, { IP + IPV4_LEN }>(packet)?;
        Some(quoted)
    }

    #[inline(always)]
    fn quoted_v6<B: Bytes + ?Sized>(&self, packet: &B) -> Option<Self> {
        // ICMPv6 behind a fragment header, also one that fragments nothing (RFC 6946), is not read as an error.
        const IP: usize = IPV6_LEN + ICMP_LEN;
        const UPPER: usize = IP + IPV6_LEN;

        if (self.len as usize) < UPPER || packet.read::<1>(IP)?[0] >> 4 != 6 {
            return None;
        }
        let mut quoted = Self::read_v6::<B, IP>(packet)?;
        if quoted.source.is_v4() || quoted.destination.is_v4() {
            return None;
        }
        quoted.len = self.len;
        quoted.upper = UPPER as u16;
        if quoted.protocol != FRAGMENT {
            quoted.read_quoted::<B, UPPER>(packet)?;
        } else if (self.len as usize) >= UPPER + FRAGMENT_LEN
            && quoted.read_fragment::<B, UPPER>(packet)? == 0
        {
            quoted.read_quoted::<B, { UPPER + FRAGMENT_LEN }>(packet)?;
        } else {
            return None;
        }
        Some(quoted)
    }

    /// As [`Tuple::read_upper`], where no more than the first bytes need be there.
    #[inline(always)]
    fn read_quoted<B: Bytes + ?Sized, const AT: usize>(&mut self, packet: &B) -> Option<()> {
        if (self.len as usize) < AT + QUOTED_LEN {
            return None;
        }
        match self.protocol {
            PROTOCOL_TCP => {
                self.read_ports::<B, AT>(packet, Kind::Tcp);
                self.has_checksum = self.len as usize >= AT + TCP_CHECKSUM + 2;
            }
            PROTOCOL_UDP => self.read_ports::<B, AT>(packet, Kind::Udp),
            PROTOCOL_ICMP if self.is_v4 => self.read_icmp::<B, AT>(packet),
            PROTOCOL_ICMPV6 if !self.is_v4 => self.read_icmp::<B, AT>(packet),
            _ => return None,
        }
        self.slots().map(|_| ())
    }
}

/// Whether an address names one host, and another than the one that looks at it: no loopback, multicast or
/// broadcast address, nor one of those that stand for none.
#[inline(always)]
pub const fn is_single_host(address: &AddressKey) -> bool {
    if address.is_v4() {
        // 0/8 is "this network"; 224/4 is multicast; 240/4 is reserved, with the broadcast address.
        let [first, ..] = address.0[3].to_ne_bytes();
        return first != 0 && first != 127 && first < 224;
    }
    let [first, ..] = address.0[0].to_ne_bytes();
    let is_low = address.0[0] == 0 && address.0[1] == 0 && address.0[2] == 0;
    first != 0xff && !(is_low && u32::from_be(address.0[3]) <= 1)
}

/// By the type of an ICMP or ICMPv6 message.
#[inline(always)]
const fn icmp_kind(is_v4: bool, kind: u8) -> Kind {
    if is_v4 {
        match kind {
            8 => Kind::EchoRequest,
            0 => Kind::EchoReply,
            3 | 11 | 12 => Kind::Error,
            4 | 5 => Kind::Unfit,
            _ => Kind::Other,
        }
    } else {
        match kind {
            128 => Kind::EchoRequest,
            129 => Kind::EchoReply,
            1..=4 => Kind::Error,
            137 => Kind::Unfit,
            _ => Kind::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nat::model::{self, Content, Finish, Packet};
    use crate::upper::upper;

    /// What a tuple should say of a packet, but for its kind and where its upper layer is.
    fn check(tuple: &Tuple, packet: &Packet) -> Result<(), TestCaseError> {
        prop_assert_eq!(tuple.source, packet.key(0));
        prop_assert_eq!(tuple.destination, packet.key(1));
        prop_assert_eq!(
            [tuple.source_port, tuple.destination_port].map(u16::from_be),
            packet.ports()
        );
        prop_assert_eq!((tuple.protocol, tuple.ttl), (packet.protocol(), packet.ttl));
        prop_assert_eq!(tuple.tos, packet.tos);
        prop_assert_eq!(tuple.is_v4, packet.is_v4());
        prop_assert_eq!(tuple.is_fragment, packet.fragment.is_some());
        prop_assert_eq!(tuple.dont_fragment, packet.dont_fragment || !packet.is_v4());
        if packet.is_v4() || packet.fragment.is_some() {
            prop_assert_eq!(tuple.fragment_id, packet.id);
        }
        let kind = match packet.content {
            Content::Tcp { .. } => Kind::Tcp,
            Content::Udp { .. } => Kind::Udp,
            Content::Echo { is_request: true, .. } => Kind::EchoRequest,
            Content::Echo { is_request: false, .. } => Kind::EchoReply,
            Content::Error { .. } => Kind::Error,
            Content::Later { .. } => Kind::LaterFragment,
        };
        prop_assert_eq!(tuple.kind, kind);
        Ok(())
    }

    fn any_packet() -> impl Strategy<Value = Packet> {
        any::<bool>()
            .prop_flat_map(|v4| prop_oneof![model::packet(v4), model::later(v4), model::error(v4)])
    }

    proptest! {
        #[test]
        fn packets_are_read_as_they_were_written(packet in any_packet(), padding in 0_usize..20) {
            let mut bytes = packet.bytes(Finish::Full);
            let len = bytes.len();
            bytes.resize(len + padding, 0xee);
            let tuple = Tuple::of(&bytes[..]).unwrap();
            check(&tuple, &packet)?;
            prop_assert_eq!(tuple.len as usize, len);
            prop_assert_eq!(tuple.upper as usize, upper(&bytes).unwrap().offset);
            let quoted = tuple.quoted(&bytes[..]);
            if let Content::Error { quoted: expected, .. } = &packet.content {
                let quoted = quoted.unwrap();
                check(&quoted, expected)?;
                prop_assert_eq!(quoted.len as usize, len);
                let ip = tuple.upper as usize + 8;
                prop_assert_eq!(quoted.upper as usize - ip, upper(&bytes[ip..]).unwrap().offset);
            } else {
                prop_assert_eq!(quoted, None);
            }
        }

        /// What is cut off is broken, and no tuple leads behind its end.
        #[test]
        fn what_is_cut_off_is_broken(packet in any_packet(), cut in any::<prop::sample::Index>()) {
            let bytes = packet.bytes(Finish::Full);
            let tuple = Tuple::of(&bytes[..cut.index(bytes.len())]);
            prop_assert!(tuple.is_none_or(|tuple| tuple.kind == Kind::Broken));
        }

        /// As above, where the IP header agrees that it ends there.
        #[test]
        fn what_ends_early_is_broken_or_whole(packet in any_packet(), cut in any::<prop::sample::Index>()) {
            let mut bytes = packet.bytes(Finish::Full);
            let (ip, at) = if packet.is_v4() { (20, 2) } else { (40, 4) };
            bytes.truncate(ip + cut.index(bytes.len() - ip + 1));
            let len = (bytes.len() - if packet.is_v4() { 0 } else { 40 }) as u16;
            bytes[at..at + 2].copy_from_slice(&len.to_be_bytes());
            let tuple = Tuple::of(&bytes[..]).unwrap();
            let needed = match tuple.kind {
                Kind::Tcp => 20,
                Kind::Broken | Kind::LaterFragment => 0,
                _ => 8,
            };
            prop_assert!(bytes.len() >= tuple.upper as usize + needed);
            let is_whole = match packet.content {
                Content::Later { .. } => packet.is_v4() || bytes.len() >= 48,
                Content::Tcp { .. } => bytes.len() >= upper(&bytes).map_or(99, |u| u.offset) + 20,
                _ => bytes.len() >= upper(&bytes).map_or(99, |u| u.offset) + 8,
            };
            prop_assert_eq!(tuple.kind != Kind::Broken, is_whole);
            if let Some(quoted) = tuple.quoted(&bytes[..]) {
                prop_assert!(quoted.upper as usize + 8 <= bytes.len());
                prop_assert!(quoted.len as usize == bytes.len());
            }
        }

        #[test]
        fn any_bytes_are_read_without_harm(
            mut bytes in prop::collection::vec(any::<u8>(), 0..140), first in any::<u8>(), protocol in any::<u8>(),
        ) {
            if let Some(byte) = bytes.first_mut() {
                *byte = if first & 1 == 0 { 0x45 } else { 0x60 };
            }
            // Of protocols that are read further, and of lengths that hold.
            if bytes.len() > 40 && first & 2 != 0 {
                let known = [1, 6, 17, 58, 44][usize::from(protocol) % 5];
                let (len, at, next) = if first & 1 == 0 { (bytes.len(), 2, 9) } else { (bytes.len() - 40, 4, 6) };
                bytes[at..at + 2].copy_from_slice(&(len as u16).to_be_bytes());
                bytes[next] = known;
            }
            if let Some(tuple) = Tuple::of(&bytes[..]) {
                let _ = tuple.quoted(&bytes[..]);
                let _ = tuple.segment_len(&bytes[..], 1400);
                prop_assert!(tuple.kind == Kind::Broken || tuple.len as usize <= bytes.len());
            }
        }
    }

    fn v4(protocol: u8, word: u16, content: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        (packet[0], packet[8], packet[9]) = (0x45, 64, protocol);
        packet[2..4].copy_from_slice(&(20 + content.len() as u16).to_be_bytes());
        packet[6..8].copy_from_slice(&word.to_be_bytes());
        packet[12..20].copy_from_slice(&[10, 9, 0, 2, 192, 0, 2, 1]);
        packet.extend(content);
        packet
    }

    fn v6(next: u8, content: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        (packet[0], packet[6], packet[7]) = (0x60, next, 64);
        packet[4..6].copy_from_slice(&(content.len() as u16).to_be_bytes());
        (packet[8], packet[24]) = (0xfd, 0x20);
        packet.extend(content);
        packet
    }

    fn kind(packet: &[u8]) -> Kind {
        Tuple::of(packet).unwrap().kind
    }

    #[test]
    fn ipv4_options_are_unfit() {
        let mut packet = v4(17, 0, &[0; 16]);
        assert_eq!(kind(&packet), Kind::Udp);
        packet[0] = 0x46;
        assert_eq!(kind(&packet), Kind::Unfit);
        packet[0] = 0x4f;
        assert_eq!(kind(&packet), Kind::Broken, "longer than the packet");
        packet[0] = 0x44;
        assert_eq!(kind(&packet), Kind::Broken);
        assert_eq!(Tuple::of(&[0x55; 60][..]), None);
    }

    #[test]
    fn ipv6_extension_headers_are_unfit_and_other_protocols_are_other() {
        for next in 0..=255 {
            let expected = match next {
                0 | 43 | 51 | 60 | 135 | 139 | 140 => Kind::Unfit,
                6 => Kind::Tcp,
                17 => Kind::Udp,
                44 => Kind::Other,
                58 => Kind::Error,
                _ => Kind::Other,
            };
            // Behind a fragment header, whose next one is 1.
            assert_eq!(
                kind(&v6(next, &[1; 24])),
                if next == 44 { Kind::LaterFragment } else { expected },
                "{next}"
            );
            let fragment = [&[next, 0, 0, 1, 0, 0, 0, 7], &[1; 24][..]].concat();
            let expected = match next {
                44 | 58 => Kind::Unfit,
                _ => expected,
            };
            assert_eq!(kind(&v6(44, &fragment)), expected, "{next} in a first fragment");
        }
    }

    #[test]
    fn icmp_messages_are_told_apart() {
        for message in 0..=255 {
            let expected = match message {
                0 => Kind::EchoReply,
                8 => Kind::EchoRequest,
                3 | 11 | 12 => Kind::Error,
                4 | 5 => Kind::Unfit,
                _ => Kind::Other,
            };
            assert_eq!(kind(&v4(1, 0, &[message, 0, 0, 0, 0, 0, 0, 0])), expected, "{message}");
            assert_eq!(kind(&v4(58, 0, &[message, 0, 0, 0, 0, 0, 0, 0])), Kind::Other);
            let expected = match message {
                128 => Kind::EchoRequest,
                129 => Kind::EchoReply,
                1..=4 => Kind::Error,
                137 => Kind::Unfit,
                _ => Kind::Other,
            };
            assert_eq!(kind(&v6(58, &[message, 0, 0, 0, 0, 0, 0, 0])), expected, "{message}");
            assert_eq!(kind(&v6(1, &[message, 0, 0, 0, 0, 0, 0, 0])), Kind::Other);
        }
        assert_eq!(
            kind(&v4(1, 0x2000, &[3, 0, 0, 0, 0, 0, 0, 0])),
            Kind::Unfit,
            "a fragmented error"
        );
        assert_eq!(kind(&v4(1, 0, &[8, 0, 0, 0, 0, 0, 0])), Kind::Broken);
    }

    #[test]
    fn fragments_cannot_replace_a_header_that_was_looked_at() {
        assert_eq!(kind(&v4(6, 0x2000, &[0; 19])), Kind::Broken, "its flags may come later");
        assert_eq!(kind(&v4(6, 0x2000, &[0; 20])), Kind::Tcp);
        assert_eq!(kind(&v4(6, 1, &[0; 20])), Kind::Broken, "its flags may be other ones");
        assert_eq!(kind(&v4(6, 2, &[0; 20])), Kind::LaterFragment);
        assert_eq!(kind(&v4(17, 1, &[0; 20])), Kind::LaterFragment);
        let v6 = |offset: u8| v6(44, &[&[6, 0, 0, offset << 3, 0, 0, 0, 1], &[0; 20][..]].concat());
        assert_eq!(kind(&v6(1)), Kind::Broken);
        assert_eq!(kind(&v6(2)), Kind::LaterFragment);
        assert_eq!(kind(&v6(0)), Kind::Tcp);
    }

    #[test]
    fn mapped_addresses_in_ipv6_are_not_taken_for_ipv4() {
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 9, 0, 2];
        for at in [8, 24] {
            let mut packet = v6(17, &[0; 8]);
            assert_eq!(kind(&packet), Kind::Udp);
            packet[at..at + 16].copy_from_slice(&mapped);
            assert_eq!(kind(&packet), Kind::Broken);
            let mut error = v6(58, &[&[1, 0, 0, 0, 0, 0, 0, 0], &packet[..]].concat());
            assert_eq!(Tuple::of(&error[..]).unwrap().quoted(&error[..]), None);
            error[48 + at] = 0xfd;
            assert!(Tuple::of(&error[..]).unwrap().quoted(&error[..]).is_some());
        }
    }

    #[test]
    fn what_is_quoted_must_be_translatable() {
        let quoted = |inner: &[u8]| {
            let error = v4(1, 0, &[&[11, 0, 0, 0, 0, 0, 0, 0], inner].concat());
            Tuple::of(&error[..]).unwrap().quoted(&error[..]).map(|quoted| quoted.kind)
        };
        assert_eq!(quoted(&v4(17, 0, &[1; 8])), Some(Kind::Udp));
        assert_eq!(quoted(&v4(6, 0x2000, &[1; 8])), Some(Kind::Tcp), "a first fragment");
        assert_eq!(quoted(&v4(1, 0, &[8, 0, 0, 0, 0, 0, 0, 0])), Some(Kind::EchoRequest));
        assert_eq!(quoted(&v4(1, 0, &[3, 0, 0, 0, 0, 0, 0, 0])), None, "an error about an error");
        assert_eq!(quoted(&v4(17, 1, &[1; 8])), None, "a later fragment");
        assert_eq!(quoted(&v4(47, 0, &[1; 8])), None, "another protocol");
        assert_eq!(quoted(&v4(17, 0, &[1; 7])), None, "too short");
        assert_eq!(quoted(&v6(17, &[1; 8])), None, "another family");
        let mut options = v4(17, 0, &[1; 12]);
        options[0] = 0x46;
        assert_eq!(quoted(&options), None, "options");
    }

    #[test]
    fn both_directions_have_one_key() {
        let out = v4(17, 0, &[0x30, 0x39, 0, 53, 0, 8, 0, 0]);
        let mut back = v4(17, 0, &[0, 53, 0x30, 0x39, 0, 8, 0, 0]);
        back[12..20].rotate_left(4);
        let (out, back) = (Tuple::of(&out[..]).unwrap(), Tuple::of(&back[..]).unwrap());
        assert_eq!(out.flow_from_inside(), back.flow_from_outside());
        assert_eq!(out.flow_from_inside().remote_port, 53_u16.to_be());
        assert_eq!(out.mapping(7).inner_port, 12345_u16.to_be());

        let request = v4(1, 0, &[8, 0, 0, 0, 1, 2, 0, 0]);
        let mut reply = v4(1, 0, &[0, 0, 0, 0, 1, 2, 0, 0]);
        reply[12..20].rotate_left(4);
        let (request, reply) = (Tuple::of(&request[..]).unwrap(), Tuple::of(&reply[..]).unwrap());
        let key = request.flow_from_inside();
        assert_eq!(key, reply.flow_from_outside());
        assert_eq!((u16::from_be(key.inner_port), key.remote_port), (0x102, 0));
    }

    #[test]
    fn the_largest_segment_of_a_super_packet_has_its_headers_too() {
        let mut tcp = [0; 60];
        tcp[12] = 0x80;
        let packet = v4(6, 0, &tcp);
        let of = |packet: &[u8]| Tuple::of(packet).unwrap().segment_len(packet, 1000);
        assert_eq!(of(&packet), Some(20 + 32 + 1000));
        assert_eq!(of(&v6(17, &[0; 60])), Some(40 + 8 + 1000));
        assert_eq!(of(&v4(47, 0, &[0; 60])), None);
    }

    #[test]
    fn some_addresses_name_no_single_host() {
        let v4 = |o| is_single_host(&AddressKey::v4(o));
        assert!(v4([10, 0, 0, 1]) && v4([223, 255, 255, 255]) && v4([128, 0, 0, 0]));
        for octets in [[0; 4], [0, 1, 2, 3], [127, 0, 0, 1], [224, 0, 0, 1], [255; 4]] {
            assert!(!v4(octets), "{octets:?}");
        }
        let v6 = |text: &str| {
            is_single_host(&AddressKey::v6(text.parse::<core::net::Ipv6Addr>().unwrap().octets()))
        };
        assert!(v6("fd00::1") && v6("fe80::1") && v6("::2"));
        assert!(!v6("::") && !v6("::1") && !v6("ff02::1"));
    }
}
