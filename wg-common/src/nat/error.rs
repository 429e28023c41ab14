//! ICMP errors that a program makes out of the packet that they are about: what it puts in front, and how much of
//! the packet it leaves.

use crate::headers::{Bytes, IPV4_LEN, IPV6_LEN, PROTOCOL_TCP, PROTOCOL_UDP, UDP_LEN};
use crate::map::AddressKey;
use crate::nat::packet::fold;
use crate::nat::tuple::{ICMP_LEN, Kind, Tuple, is_single_host};
use crate::upper::{PROTOCOL_ICMP, PROTOCOL_ICMPV6};

/// Bytes of the headers of an error about an IPv4 packet.
pub const HEAD_LEN_V4: usize = IPV4_LEN + ICMP_LEN;
/// Bytes of those of an error about an IPv6 packet.
pub const HEAD_LEN_V6: usize = IPV6_LEN + ICMP_LEN;

/// Room for the headers of any error.
pub const HEAD_LEN_MAX: usize = HEAD_LEN_V6;

/// Longest quotation of an IPv4 packet: every host takes a datagram of 576 bytes (RFC 1812 §4.3.2.3).
const QUOTED_MAX_V4: u32 = 576 - HEAD_LEN_V4 as u32;
/// Longest one of an IPv6 packet: every link has an MTU of 1280 bytes (RFC 4443 §2.4 c).
pub const QUOTED_MAX_V6: u32 = 1280 - HEAD_LEN_V6 as u32;
const TCP_CHECKSUM: usize = 16;
/// TOS: precedence "internetwork control" (RFC 1812 §4.3.2.5).
const TOS: u8 = 0xc0;
const TTL: u8 = 64;
const DONT_FRAGMENT: u8 = 0x40;

/// What an error says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Error {
    /// TTL or hop limit is used up.
    TimeExceeded,
    /// Only packets of so many bytes get through: *fragmentation needed* in IPv4, *packet too big* in IPv6.
    TooBig(u32),
}

impl Error {
    /// The first word of the header, without the checksum, and the last one.
    #[inline(always)]
    const fn header(self, is_v4: bool) -> ([u8; 2], u32) {
        match (self, is_v4) {
            (Self::TimeExceeded, true) => ([11, 0], 0),
            (Self::TimeExceeded, false) => ([3, 0], 0),
            (Self::TooBig(mtu), true) => ([3, 4], if mtu > 0xffff { 0xffff } else { mtu }),
            (Self::TooBig(mtu), false) => ([2, 0], mtu),
        }
    }
}

/// What stands before the quoted packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Head {
    /// Before an IPv4 packet.
    V4([u8; HEAD_LEN_V4]),
    /// Before an IPv6 packet.
    V6([u8; HEAD_LEN_V6]),
}

/// An error about a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Answer {
    /// What stands before the quoted packet.
    pub head: Head,
    /// Bytes of the packet that are left, from its IP header on.
    pub quoted_len: u32,
}

/// What tells the sender of `packet`, which `tuple` describes, an error in the name of `from`.
///
/// If the packet's checksum is not finished, whoever finishes it will do so in the quotation: the checksum of the
/// error is the one that is right then. That it is not finished is seen by its being the sum of the
/// pseudo-header, which one finished checksum out of 65,536 is as well.
///
/// `None` for what must not be answered, as [`may_be_answered`] has it.
#[inline(always)]
pub fn answer<B: Bytes + ?Sized>(
    packet: &B,
    tuple: &Tuple,
    error: Error,
    from: &AddressKey,
) -> Option<Answer> {
    let mut head = [0; HEAD_LEN_MAX];
    let quoted_len = write_head(packet, tuple, error, from, &mut head)?;
    let head = match head.first_chunk() {
        Some(head) if tuple.is_v4 => Head::V4(*head),
        _ => Head::V6(head),
    };
    Some(Answer { head, quoted_len })
}

/// As [`answer`], with a `head` that is written where it stands, [`HEAD_LEN_V4`] or [`HEAD_LEN_V6`] bytes of it; gives
/// [`Answer::quoted_len`].
#[inline(always)]
pub fn write_head<B: Bytes + ?Sized>(
    packet: &B,
    tuple: &Tuple,
    error: Error,
    from: &AddressKey,
    head: &mut [u8; HEAD_LEN_MAX],
) -> Option<u32> {
    if !may_be_answered(tuple) {
        return None;
    }
    let quoted_max = if tuple.is_v4 { QUOTED_MAX_V4 } else { QUOTED_MAX_V6 };
    // Sums are made of words of four bytes; the header of the upper layer ends with one.
    let quoted_len = (if tuple.len < quoted_max { tuple.len } else { quoted_max }) & !3;
    let (kind, rest) = error.header(tuple.is_v4);
    let rest = rest.to_be_bytes();
    let icmp = u16::from_ne_bytes(kind) as u64 + u32::from_ne_bytes(rest) as u64;
    let sum = quoted_sum(packet, tuple, quoted_len)? + icmp;
    if tuple.is_v4 {
        write_v4(head, quoted_len, &tuple.source, from);
        let [sum_0, sum_1] = (!fold(sum)).to_ne_bytes();
        put(head, IPV4_LEN, [kind[0], kind[1], sum_0, sum_1]);
        put(head, IPV4_LEN + 4, rest);
    } else {
        let len = (ICMP_LEN as u32 + quoted_len) as u16;
        let pseudo = sum_of(from) + sum_of(&tuple.source) + words(PROTOCOL_ICMPV6, len);
        let [sum_0, sum_1] = (!fold(sum + pseudo)).to_ne_bytes();
        let [len_high, len_low] = len.to_be_bytes();
        put(head, 0, [0x60, 0, 0, 0, len_high, len_low, PROTOCOL_ICMPV6, TTL]);
        put_address(head, 8, from);
        put_address(head, 24, &tuple.source);
        put(head, IPV6_LEN, [kind[0], kind[1], sum_0, sum_1]);
        put(head, IPV6_LEN + 4, rest);
    }
    Some(quoted_len)
}

/// Whether a packet may be answered with an error (RFC 1122 §3.2.2, RFC 4443 §2.4 e). Not so: ICMP errors, and other
/// ICMP messages than echoes; fragments other than the first; a source or destination that names no single host;
/// what is broken or unfit.
#[inline(always)]
pub const fn may_be_answered(tuple: &Tuple) -> bool {
    let is_icmp = tuple.protocol == PROTOCOL_ICMP || tuple.protocol == PROTOCOL_ICMPV6;
    let is_meant = match tuple.kind {
        Kind::Tcp | Kind::Udp | Kind::EchoRequest | Kind::EchoReply => true,
        Kind::Other => !is_icmp,
        _ => false,
    };
    is_meant && is_single_host(&tuple.source) && is_single_host(&tuple.destination)
}

/// The addresses, protocol and TOS with which the answer to a packet goes, from who it was sent to: by them its way
/// is looked up.
#[inline(always)]
pub const fn answer_tuple(to: &Tuple) -> Tuple {
    Tuple {
        source: to.destination,
        destination: to.source,
        source_port: 0,
        destination_port: 0,
        protocol: if to.is_v4 { PROTOCOL_ICMP } else { PROTOCOL_ICMPV6 },
        kind: Kind::Error,
        tos: if to.is_v4 { TOS } else { 0 },
        ttl: TTL,
        is_fragment: false,
        ..*to
    }
}

#[inline(always)]
fn write_v4(head: &mut [u8; HEAD_LEN_MAX], quoted_len: u32, to: &AddressKey, from: &AddressKey) {
    let [len_high, len_low] = ((HEAD_LEN_V4 as u32 + quoted_len) as u16).to_be_bytes();
    // No id: it is never cut up (RFC 6864 §4.1).
    let pairs =
        [[0x45, TOS], [len_high, len_low], [0, 0], [DONT_FRAGMENT, 0], [TTL, PROTOCOL_ICMP]];
    let mut sum = from.0[3] as u64 + to.0[3] as u64;
    let mut at = 0;
    while at < pairs.len() {
        put(head, 2 * at, pairs[at]);
        sum += u16::from_ne_bytes(pairs[at]) as u64;
        at += 1;
    }
    put(head, 10, (!fold(sum)).to_ne_bytes());
    put(head, 12, from.0[3].to_ne_bytes());
    put(head, 16, to.0[3].to_ne_bytes());
}

/// The sum of the first `len` bytes of the packet, a multiple of four, as they are when they arrive.
#[inline(always)]
fn quoted_sum<B: Bytes + ?Sized>(packet: &B, tuple: &Tuple, len: u32) -> Option<u64> {
    match partial_seed(packet, tuple)? {
        // When it is finished, all that it covers sums up to 0, less what it began with.
        Some(seed) => Some(packet.sum(tuple.upper as u32)? + (!seed) as u64),
        None => packet.sum(len),
    }
}

/// What the packet's checksum begins with, if it is not finished; `None` if the packet cannot be read.
#[inline(always)]
fn partial_seed<B: Bytes + ?Sized>(packet: &B, tuple: &Tuple) -> Option<Option<u16>> {
    let field = match tuple.kind {
        Kind::Tcp => TCP_CHECKSUM,
        Kind::Udp => UDP_LEN - 2,
        _ => return Some(None),
    };
    let found = u16::from_ne_bytes(packet.read(tuple.upper as usize + field)?);
    let len = (tuple.len - tuple.upper as u32) as u16;
    let protocol = if tuple.kind as u8 == Kind::Tcp as u8 { PROTOCOL_TCP } else { PROTOCOL_UDP };
    let sum = sum_of(&tuple.source) + sum_of(&tuple.destination) + words(protocol, len);
    Some((found == fold(sum) && !tuple.is_fragment).then_some(found))
}

/// The sum of the words of an address.
#[inline(always)]
const fn sum_of(address: &AddressKey) -> u64 {
    let [a, b, c, d] = address.0;
    if address.is_v4() { d as u64 } else { a as u64 + b as u64 + c as u64 + d as u64 }
}

/// The sum of the last words of a pseudo-header.
#[inline(always)]
const fn words(protocol: u8, len: u16) -> u64 {
    u16::from_ne_bytes([0, protocol]) as u64 + u16::from_ne_bytes(len.to_be_bytes()) as u64
}

/// Writes `bytes` where there is room for them, by constants.
#[inline(always)]
fn put<const M: usize>(to: &mut [u8; HEAD_LEN_MAX], at: usize, bytes: [u8; M]) {
    let mut i = 0;
    while i < M && at + i < HEAD_LEN_MAX {
        to[at + i] = bytes[i];
        i += 1;
    }
}

#[inline(always)]
fn put_address(to: &mut [u8; HEAD_LEN_MAX], at: usize, address: &AddressKey) {
    let [a, b, c, d] = address.0;
    put(to, at, a.to_ne_bytes());
    put(to, at + 4, b.to_ne_bytes());
    put(to, at + 8, c.to_ne_bytes());
    put(to, at + 12, d.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::icmp::{ERROR_LEN_MAX, too_big};
    use crate::nat::model::{self, Content, Finish, Packet, address, key, sum};

    /// The error as it arrives.
    fn answered(bytes: &[u8], error: Error, from: &[u8]) -> Option<Vec<u8>> {
        let tuple = Tuple::of(bytes).unwrap();
        let answer = answer(bytes, &tuple, error, &key(from))?;
        let quoted = &bytes[..answer.quoted_len as usize];
        Some(match answer.head {
            Head::V4(head) => [&head, quoted].concat(),
            Head::V6(head) => [&head, quoted].concat(),
        })
    }

    /// Whether the checksums of an error hold.
    fn holds(error: &[u8]) -> bool {
        if error[0] >> 4 == 4 {
            return sum(&[&error[..20]]) == 0xffff && sum(&[&error[20..]]) == 0xffff;
        }
        let len = (error.len() as u32 - 40).to_be_bytes();
        sum(&[&error[8..40], &len, &[0, 0, 0, 58], &error[40..]]) == 0xffff
    }

    fn single_hosts() -> impl Strategy<Value = (Packet, Vec<u8>)> {
        any::<bool>()
            .prop_flat_map(|v4| (model::packet(v4), address(v4)))
            .prop_filter("of one host to another", |(packet, _)| {
                is_single_host(&packet.key(0)) && is_single_host(&packet.key(1))
            })
    }

    fn errors() -> impl Strategy<Value = Error> {
        prop_oneof![Just(Error::TimeExceeded), any::<u32>().prop_map(Error::TooBig)]
    }

    /// What finishes a partial checksum does, wherever the packet is.
    fn finish(bytes: &mut [u8], upper: usize, field: usize) {
        let checksum = !sum(&[&bytes[upper..]]);
        bytes[upper + field..][..2].copy_from_slice(&checksum.to_be_bytes());
    }

    proptest! {
        #[test]
        fn errors_go_back_and_their_checksums_hold(
            (packet, from) in single_hosts(), error in errors(), more in 0_usize..1500,
        ) {
            let mut packet = packet;
            if let Content::Tcp { rest: data, .. } | Content::Udp { data, .. } = &mut packet.content {
                data.resize(data.len() + more, 0xa5);
            }
            let bytes = packet.bytes(Finish::Full);
            let answer = answered(&bytes, error, &from).unwrap();
            prop_assert!(holds(&answer));
            let tuple = Tuple::of(&answer[..]).unwrap();
            prop_assert_eq!(tuple.kind, Kind::Error);
            prop_assert_eq!((tuple.source, tuple.destination), (key(&from), packet.key(0)));
            prop_assert_eq!(tuple.len as usize, answer.len());
            let len_max = if packet.is_v4() { 576 } else { 1280 };
            prop_assert!(answer.len() <= len_max);
            let quoted = tuple.quoted(&answer[..]).unwrap();
            prop_assert_eq!((quoted.source, quoted.destination), (packet.key(0), packet.key(1)));
            let head = if packet.is_v4() { 28 } else { 48 };
            let rest = u32::from_be_bytes(answer[head - 4..head].try_into().unwrap());
            let (kind, told) = match error {
                Error::TimeExceeded => (if packet.is_v4() { [11, 0] } else { [3, 0] }, 0),
                Error::TooBig(mtu) if packet.is_v4() => ([3, 4], mtu.min(0xffff)),
                Error::TooBig(mtu) => ([2, 0], mtu),
            };
            prop_assert_eq!((&answer[head - 8..head - 6], rest), (&kind[..], told));
        }

        /// Of an unfinished packet the checksum holds once somebody has finished what is quoted.
        #[test]
        fn unfinished_checksums_may_be_finished_later(
            (packet, from) in single_hosts(), error in errors(), more in 0_usize..1500,
        ) {
            let mut packet = Packet { fragment: None, ..packet };
            let field = match &mut packet.content {
                Content::Tcp { rest: data, .. } => {
                    data.resize(data.len() + more, 0x5a);
                    16
                }
                Content::Udp { data, has_checksum, .. } => {
                    *has_checksum = true;
                    data.resize(data.len() + more, 0x5a);
                    6
                }
                _ => return Ok(()),
            };
            let bytes = packet.bytes(Finish::Partial);
            let mut answer = answered(&bytes, error, &from).unwrap();
            let (head, upper) = if packet.is_v4() { (28, 20) } else { (48, 40) };
            finish(&mut answer, head + upper, field);
            prop_assert!(holds(&answer));
        }

        #[test]
        fn any_bytes_are_answered_without_harm(
            mut bytes in prop::collection::vec(any::<u8>(), 1..200), v4 in any::<bool>(), error in errors(),
        ) {
            bytes[0] = if v4 { 0x45 } else { 0x60 };
            if let Some(tuple) = Tuple::of(&bytes[..])
                && let Some(answer) = answer(&bytes[..], &tuple, error, &tuple.destination)
            {
                prop_assert!(answer.quoted_len as usize <= bytes.len());
            }
        }

        /// It says the same as what user space writes, which quotes a few bytes more.
        #[test]
        fn both_sides_answer_alike((packet, _) in single_hosts(), mtu in 1280_u32..9000) {
            let bytes = packet.bytes(Finish::Full);
            let ours = answered(&bytes, Error::TooBig(mtu), &packet.addresses[1]).unwrap();
            let mut message = [0; ERROR_LEN_MAX];
            let len = too_big(&bytes, mtu as usize, &mut message).unwrap();
            prop_assert!(len >= ours.len() && len - ours.len() < 4);
            if len == ours.len() {
                prop_assert_eq!(&message[..len], &ours[..]);
            }
        }
    }

    #[test]
    fn errors_later_fragments_and_groups_are_not_answered() {
        let echo = Content::Echo { is_request: true, id: 1, data: Vec::new() };
        let of = |source: [u8; 4], destination: [u8; 4], fragment, content: &Content| Packet {
            addresses: [source.to_vec(), destination.to_vec()],
            tos: 0,
            ttl: 1,
            id: 7,
            fragment,
            dont_fragment: false,
            content: content.clone(),
        };
        let (us, them) = ([10, 9, 0, 2], [192, 0, 2, 1]);
        let is_answered = |packet: &Packet| {
            answered(&packet.bytes(Finish::Full), Error::TimeExceeded, &them).is_some()
        };
        let packet = of(us, them, None, &echo);
        assert!(is_answered(&packet));
        assert!(is_answered(&of(us, them, Some((0, true)), &echo)));
        let later = Content::Later { protocol: 17, data: vec![1; 16] };
        assert!(!is_answered(&of(us, them, Some((2, true)), &later)));
        let [kind, code, rest] = [3, 1, 0];
        let (quoted, rest) = (Box::new(packet), [rest; 4]);
        let error = Content::Error { kind, code, rest, quoted, quoted_len: 28 };
        assert!(!is_answered(&of(us, them, None, &error)));
        for group in [[224, 0, 0, 5], [255; 4], [127, 0, 0, 1], [0; 4]] {
            assert!(!is_answered(&of(us, group, None, &echo)));
            assert!(!is_answered(&of(group, them, None, &echo)));
        }
    }
}
