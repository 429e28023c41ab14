//! Writing other addresses and ports into a packet, where it stands.
//!
//! Each call changes one end of it. A packet of which both change (it goes to a forwarded port from inside, or
//! comes back from there) is changed twice, both times with the tuple that was read at first.

use crate::headers::{IPV4_LEN, IPV6_LEN, UDP_LEN};
use crate::map::AddressKey;
use crate::nat::packet::{Difference, Skb, Summed};
use crate::nat::tuple::{ICMP_LEN, Kind, Tuple};

/// Where things stand: in the IP headers,
const V4_TTL: usize = 8;
const V4_CHECKSUM: usize = 10;
const V4_ADDRESSES: usize = 12;
const V6_HOP_LIMIT: usize = 7;
const V6_ADDRESSES: usize = 8;
/// and in those of the upper layer.
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = UDP_LEN - 2;
const ICMP_CHECKSUM: usize = 2;
const ECHO_ID: usize = 4;

/// One of the two who speak with each other.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum End {
    /// Who sent it.
    Source,
    /// To whom it goes.
    Destination,
}

impl End {
    /// The other one.
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// Who an end is from now on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Change {
    /// Which end.
    pub end: End,
    /// Its address, of the packet's family.
    pub address: AddressKey,
    /// Its port or, of an echo, the identifier; in network byte order.
    pub port: u16,
}

/// Gives an end of a TCP, UDP or echo packet another address and port, and one of a later fragment another
/// address. `tuple` is what [`Tuple::of`] said of the packet.
///
/// `None` if the packet is of another kind, and if it could not be written: it may be half changed then, and must
/// be dropped.
#[inline(always)]
pub fn translate<S: Skb>(packet: &mut S, tuple: &Tuple, change: &Change) -> Option<()> {
    let is_fragment = tuple.kind as u8 == Kind::LaterFragment as u8;
    if !is_fragment && tuple.slots().is_none() {
        return None;
    }
    let addresses = Difference::default().address(address(tuple, change.end), &change.address);
    // Checksums of IPv6 are those of the upper layer, if it has one.
    let is_covered = tuple.is_v4 || (!is_fragment && tuple.has_checksum);
    store_address(packet, tuple.is_v4, 0, change, is_covered)?;
    if tuple.is_v4 {
        packet.replace_l3(V4_CHECKSUM, addresses)?;
    }
    if is_fragment {
        return Some(());
    }
    let upper = tuple.upper as usize;
    let field = upper + port_field(tuple.kind, change.end);
    let port = change.port.to_ne_bytes();
    if !tuple.has_checksum {
        return packet.store_uncovered(field, port);
    }
    packet.store(field, port)?;
    let at = upper + checksum_field(tuple.kind);
    let is_udp = tuple.kind as u8 == Kind::Udp as u8;
    if has_pseudo_header(tuple) {
        let summed = if tuple.is_v4 { Summed::AddressesV4 } else { Summed::AddressesV6 };
        packet.replace_l4(at, addresses, summed, is_udp)?;
    }
    let ports = Difference::default().number(port_of(tuple, change.end), change.port);
    packet.replace_l4(at, ports, Summed::Contents, is_udp)
}

/// Gives an end of an ICMP error another address, and the opposite end of the packet that it quotes another address
/// and port: what was sent to somebody is quoted as from him. `tuple` and `quoted` are what [`Tuple::of`] and
/// [`Tuple::quoted`] said of the packet. The error's own end may be another than the quoted one, if a router on
/// the way sent it.
///
/// The quoted checksums are changed, too, where they are quoted: a host may compare them. `None` as with
/// [`translate`].
#[inline(always)]
pub fn translate_error<S: Skb>(
    packet: &mut S,
    tuple: &Tuple,
    quoted: &Tuple,
    change: &Change,
) -> Option<()> {
    let outer = Difference::default().address(address(tuple, change.end), &change.address);
    store_address(packet, tuple.is_v4, 0, change, true)?;
    if tuple.is_v4 {
        packet.replace_l3(V4_CHECKSUM, outer)?;
    }
    let icmp = tuple.upper as usize;
    let sum = icmp + ICMP_CHECKSUM;
    if !tuple.is_v4 {
        packet.replace_l4(sum, outer, Summed::AddressesV6, false)?;
    }
    let change = Change { end: change.end.other(), ..*change };
    let contents = translate_quoted(packet, icmp + ICMP_LEN, quoted, &change)?;
    packet.replace_l4(sum, contents, Summed::Contents, false)
}

/// Changes the quoted packet at `ip`, and says what this does to a sum over it. Its checksums are bytes as others
/// here: the kernel knows nothing of them.
#[inline(always)]
fn translate_quoted<S: Skb>(
    packet: &mut S,
    ip: usize,
    quoted: &Tuple,
    change: &Change,
) -> Option<Difference> {
    let addresses = Difference::default().address(address(quoted, change.end), &change.address);
    let ports = Difference::default().number(port_of(quoted, change.end), change.port);
    store_address(packet, quoted.is_v4, ip, change, true)?;
    let mut all = addresses.and(ports);
    if quoted.is_v4 {
        all = all.and(change_sum(packet, ip + V4_CHECKSUM, addresses, false)?);
    }
    let upper = quoted.upper as usize;
    packet.store(upper + port_field(quoted.kind, change.end), change.port.to_ne_bytes())?;
    if quoted.has_checksum {
        let at = upper + checksum_field(quoted.kind);
        let covered = if has_pseudo_header(quoted) { addresses.and(ports) } else { ports };
        let is_udp = quoted.kind as u8 == Kind::Udp as u8;
        all = all.and(change_sum(packet, at, covered, is_udp)?);
    }
    Some(all)
}

/// Brings a checksum in the quoted packet up to date, and says what this does to a sum over it.
#[inline(always)]
fn change_sum<S: Skb>(
    packet: &mut S,
    at: usize,
    covered: Difference,
    is_udp: bool,
) -> Option<Difference> {
    let old = u16::from_ne_bytes(packet.read(at)?);
    let new = match covered.apply(old) {
        0 if is_udp => 0xffff,
        new => new,
    };
    packet.store(at, new.to_ne_bytes())?;
    Some(Difference::default().number(old, new))
}

/// Takes one off the TTL or hop limit. `None` if nothing is left of it then, and if it could not be written.
#[inline(always)]
pub fn decrement_ttl<S: Skb>(packet: &mut S, tuple: &Tuple) -> Option<()> {
    if tuple.ttl <= 1 {
        return None;
    }
    let ttl = tuple.ttl - 1;
    if tuple.is_v4 {
        packet.store(V4_TTL, [ttl])?;
        let difference =
            Difference::default().word([tuple.ttl, tuple.protocol], [ttl, tuple.protocol]);
        packet.replace_l3(V4_CHECKSUM, difference)
    } else {
        packet.store_uncovered(V6_HOP_LIMIT, [ttl])
    }
}

/// Writes the address of an end into the IP header at `ip`.
#[inline(always)]
fn store_address<S: Skb>(
    packet: &mut S,
    is_v4: bool,
    ip: usize,
    change: &Change,
    is_covered: bool,
) -> Option<()> {
    let [a, b, c, d] = change.address.0;
    let is_destination = change.end as usize;
    if is_v4 {
        return packet.store(ip + V4_ADDRESSES + 4 * is_destination, d.to_ne_bytes());
    }
    let mut octets = [0; 16];
    octets[..4].copy_from_slice(&a.to_ne_bytes());
    octets[4..8].copy_from_slice(&b.to_ne_bytes());
    octets[8..12].copy_from_slice(&c.to_ne_bytes());
    octets[12..].copy_from_slice(&d.to_ne_bytes());
    let at = ip + V6_ADDRESSES + 16 * is_destination;
    if is_covered { packet.store(at, octets) } else { packet.store_uncovered(at, octets) }
}

#[inline(always)]
const fn address(tuple: &Tuple, end: End) -> &AddressKey {
    match end {
        End::Source => &tuple.source,
        End::Destination => &tuple.destination,
    }
}

#[inline(always)]
const fn port_of(tuple: &Tuple, end: End) -> u16 {
    match end {
        End::Source => tuple.source_port,
        End::Destination => tuple.destination_port,
    }
}

/// Where the port of an end stands in the header of the upper layer.
#[inline(always)]
const fn port_field(kind: Kind, end: End) -> usize {
    match kind {
        Kind::EchoRequest | Kind::EchoReply => ECHO_ID,
        _ => 2 * end as usize,
    }
}

#[inline(always)]
const fn checksum_field(kind: Kind) -> usize {
    match kind {
        Kind::Tcp => TCP_CHECKSUM,
        Kind::Udp => UDP_CHECKSUM,
        _ => ICMP_CHECKSUM,
    }
}

/// Whether the checksum of the upper layer covers the addresses.
#[inline(always)]
const fn has_pseudo_header(tuple: &Tuple) -> bool {
    !tuple.is_v4 || !tuple.is_echo()
}
const _: () = assert!(IPV4_LEN == V4_ADDRESSES + 8 && IPV6_LEN == V6_ADDRESSES + 32);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nat::model::{self, Content, Finish, Packet, address, key};
    use crate::nat::packet::{Buffer, Sums};

    const ENDS: [End; 2] = [End::Source, End::Destination];

    /// The same sum: 0 and 0xffff are one.
    fn same(a: u16, b: u16) -> bool {
        a % 0xffff == b % 0xffff
    }

    /// Runs `change` on a packet with finished checksums, with such whose whole sum is known, and, if it may be so,
    /// with an unfinished one: each time it must become `expected`.
    fn becomes(
        packet: &Packet,
        expected: &Packet,
        change: impl Fn(&mut Buffer<'_>) -> Option<()>,
    ) -> Result<(), TestCaseError> {
        let original = packet.bytes(Finish::Full);
        for sums in [Sums::Finished, Sums::Whole(Buffer::whole(&original))] {
            let mut bytes = original.clone();
            let mut buffer = Buffer { bytes: &mut bytes, sums };
            prop_assert_eq!(change(&mut buffer), Some(()));
            let sums = buffer.sums;
            prop_assert_eq!(&bytes, &expected.bytes(Finish::Full));
            if let Sums::Whole(sum) = sums {
                prop_assert!(same(sum, Buffer::whole(&bytes)), "the sum of the whole packet");
            }
        }
        let may_be_partial = match packet.content {
            Content::Tcp { .. } => packet.fragment.is_none(),
            Content::Udp { has_checksum, .. } => packet.fragment.is_none() && has_checksum,
            _ => false,
        };
        if may_be_partial {
            let mut bytes = packet.bytes(Finish::Partial);
            let mut buffer = Buffer { bytes: &mut bytes, sums: Sums::Partial };
            prop_assert_eq!(change(&mut buffer), Some(()));
            prop_assert_eq!(&bytes, &expected.bytes(Finish::Partial));
        }
        Ok(())
    }

    fn family() -> impl Strategy<Value = (bool, Vec<u8>, Vec<u8>)> {
        any::<bool>().prop_flat_map(|v4| (Just(v4), address(v4), address(v4)))
    }

    fn with_packet(
        of: fn(bool) -> BoxedStrategy<Packet>,
    ) -> impl Strategy<Value = (Packet, [Vec<u8>; 2])> {
        family().prop_flat_map(move |(v4, a, b)| (of(v4), Just([a, b])))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn another_end_is_as_if_it_had_been_written_so(
            (packet, [new, _]) in with_packet(model::packet), port in any::<u16>(), end in 0_usize..2,
        ) {
            let expected = packet.clone().with(end, &new, port);
            let change = Change { end: ENDS[end], address: key(&new), port: port.to_be() };
            becomes(&packet, &expected, |buffer| {
                let tuple = Tuple::of(buffer).unwrap();
                translate(buffer, &tuple, &change)
            })?;
        }

        #[test]
        fn both_ends_may_change_one_after_the_other(
            (packet, new) in with_packet(model::packet), ports in any::<[u16; 2]>(),
        ) {
            // An echo has one identifier for both.
            let is_echo = matches!(packet.content, Content::Echo { .. });
            let ports = if is_echo { [packet.ports()[0], ports[1]] } else { ports };
            let expected = packet.clone().with(0, &new[0], ports[0]).with(1, &new[1], ports[1]);
            becomes(&packet, &expected, |buffer| {
                let tuple = Tuple::of(buffer).unwrap();
                for (i, end) in ENDS.into_iter().enumerate() {
                    let change = Change { end, address: key(&new[i]), port: ports[i].to_be() };
                    translate(buffer, &tuple, &change)?;
                }
                Some(())
            })?;
        }

        #[test]
        fn later_fragments_get_the_address_alone(
            (packet, [new, _]) in with_packet(model::later), port in any::<u16>(), end in 0_usize..2,
        ) {
            let expected = packet.clone().with(end, &new, port);
            let change = Change { end: ENDS[end], address: key(&new), port: port.to_be() };
            becomes(&packet, &expected, |buffer| {
                let tuple = Tuple::of(buffer).unwrap();
                translate(buffer, &tuple, &change)
            })?;
        }

        #[test]
        fn an_error_quotes_what_its_receiver_sent(
            (packet, new) in with_packet(model::error), ports in any::<[u16; 2]>(), ends in 1_u8..4,
        ) {
            let Content::Error { quoted, .. } = &packet.content else { unreachable!() };
            // An echo has one identifier for both: nobody forwards it, so that one end changes at most.
            prop_assume!(ends != 3 || !matches!(quoted.content, Content::Echo { .. }));
            let changes = |i: usize| Change { end: ENDS[i], address: key(&new[i]), port: ports[i].to_be() };
            let mut expected = packet.clone();
            for i in (0..2).filter(|i| ends & 1 << i != 0) {
                expected = expected.with(i, &new[i], 0);
                let Content::Error { quoted, .. } = &mut expected.content else { unreachable!() };
                **quoted = quoted.clone().with(1 - i, &new[i], ports[i]);
            }
            becomes(&packet, &expected, |buffer| {
                let tuple = Tuple::of(buffer).unwrap();
                let quoted = tuple.quoted(buffer).unwrap();
                for i in (0..2).filter(|i| ends & 1 << i != 0) {
                    translate_error(buffer, &tuple, &quoted, &changes(i))?;
                }
                Some(())
            })?;
        }

        #[test]
        fn a_hop_takes_one_off(packet in any::<bool>().prop_flat_map(|v4| {
            prop_oneof![model::packet(v4), model::later(v4), model::error(v4)]
        })) {
            if packet.ttl <= 1 {
                let mut bytes = packet.bytes(Finish::Full);
                let mut buffer = Buffer::finished(&mut bytes);
                let tuple = Tuple::of(&buffer).unwrap();
                prop_assert_eq!(decrement_ttl(&mut buffer, &tuple), None);
                prop_assert_eq!(bytes, packet.bytes(Finish::Full));
                return Ok(());
            }
            let expected = Packet { ttl: packet.ttl - 1, ..packet.clone() };
            becomes(&packet, &expected, |buffer| {
                let tuple = Tuple::of(buffer).unwrap();
                decrement_ttl(buffer, &tuple)
            })?;
        }
    }

    #[test]
    fn a_wrong_checksum_is_not_healed() {
        let packet = Packet {
            addresses: [vec![10, 9, 0, 2], vec![192, 0, 2, 1]],
            tos: 0,
            ttl: 64,
            id: 7,
            fragment: None,
            dont_fragment: true,
            content: Content::Tcp { ports: [1, 2], middle: [3; 12], rest: vec![4; 9] },
        };
        let mut bytes = packet.bytes(Finish::Full);
        bytes[30] ^= 1;
        let mut buffer = Buffer::finished(&mut bytes);
        let tuple = Tuple::of(&buffer).unwrap();
        let change = Change { end: End::Source, address: key(&[203, 0, 113, 9]), port: 9 };
        translate(&mut buffer, &tuple, &change).unwrap();
        let mut expected = packet.with(0, &[203, 0, 113, 9], 9_u16.to_be()).bytes(Finish::Full);
        expected[30] ^= 1;
        assert_eq!(bytes, expected);
    }

    #[test]
    fn what_cannot_be_translated_is_left_alone() {
        let mut bytes = vec![0; 40];
        (bytes[0], bytes[3], bytes[9]) = (0x45, 40, 47);
        let before = bytes.clone();
        let mut buffer = Buffer::finished(&mut bytes);
        let tuple = Tuple::of(&buffer).unwrap();
        assert_eq!(tuple.kind, Kind::Other);
        let change = Change { end: End::Source, address: key(&[203, 0, 113, 9]), port: 9 };
        assert_eq!(translate(&mut buffer, &tuple, &change), None);
        assert_eq!(bytes, before);
    }
}
