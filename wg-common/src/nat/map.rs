//! The maps of NAT: names, keys, values. The ABI between its programs and control.
//!
//! Each device with a `Nat`, `Forward` or `Allow` line has maps of its own. Addresses are [`AddressKey`]s: IPv4 as
//! `::ffff:a.b.c.d`, so that prefixes of IPv4 are 96 bits longer than they are written. Ports are as they
//! stand in packets, in network byte order, unless a name says otherwise; ICMP echo has its identifier in the
//! place of the inner port, and 0 in that of the remote one.

use crate::map::AddressKey;

/// Array of maps with one entry: the [`RuleSet`] that holds, alone in an array. Swapped as a whole.
pub const RULES: &str = "NAT_RULES";
/// Hash: [`FlowKey`] → [`Flow`]. Entries are made by the programs and removed by control.
pub const FLOWS: &str = "NAT_FLOWS";
/// Most entries of [`FLOWS`], unless the loader chooses another number.
pub const FLOWS_LEN: u32 = 1 << 18;
/// Hash: [`MappingKey`] → [`Mapping`]: the slot that an inner address and port have. As [`FLOWS`].
pub const MAPPINGS: &str = "NAT_MAPPINGS";
/// Most entries of [`MAPPINGS`], unless the loader chooses another number.
pub const MAPPINGS_LEN: u32 = 1 << 18;
/// Array, mapped: [`Slot`] of each external port, indexed by [`slot_index`]. The loader chooses how many.
pub const SLOTS: &str = "NAT_SLOTS";
/// Array of `u64`, mapped: rings of free slots, [`PORTS_LEN`] words each, indexed by [`slot_index`] of the ring and
/// `position % PORTS_LEN`. A word is the port, counted from [`RuleSet::port_first`]. Control writes at the tail,
/// programs take at the head.
pub const FREE_PORTS: &str = "NAT_FREE_PORTS";
/// Array of `u64`, mapped: [`RING_WORDS`] words of each ring: its head at the first, its tail at word [`RING_TAIL`].
/// Both only grow; the ring is empty where they are equal.
pub const PORT_RINGS: &str = "NAT_PORT_RINGS";
/// Words of a ring in [`PORT_RINGS`]: head and tail do not share a cache line.
pub const RING_WORDS: u32 = 16;
/// Where the tail stands.
pub const RING_TAIL: u32 = 8;
/// LRU hash: [`FragmentKey`] → [`FragmentEntry`], from the first fragment of a packet to those that follow.
pub const FRAGMENTS: &str = "NAT_FRAGMENTS";
/// Most entries of [`FRAGMENTS`].
pub const FRAGMENTS_LEN: u32 = 4096;
/// Array of `u64`: the words of the [`Bucket::ALL`](crate::nat::limit::Bucket::ALL) of each kind of error.
pub const ANSWERS: &str = "NAT_ANSWERS";
/// LRU hash: [`receiver`](crate::nat::limit::receiver) → the words of its
/// [`Bucket::ONE`](crate::nat::limit::Bucket::ONE) of each kind.
pub const ANSWERED: &str = "NAT_ANSWERED";
/// Most entries of [`ANSWERED`].
pub const ANSWERED_LEN: u32 = 4096;
/// Per-CPU array of `u64`: drop reasons, then [`NatEvent`](crate::outcome::NatEvent)s.
pub const NAT_COUNTERS: &str = "NAT_COUNTERS";
/// Per-CPU array of `u64`: packets that each of the [`RuleSet::allow`] rules let begin a flow, by its
/// [`AllowRule::counter`].
pub const ALLOW_COUNTERS: &str = "NAT_ALLOWED";
/// Array, mapped, of one word: boot time in nanoseconds at which the owner last said that it lives. Where that
/// is older than [`OWNER_STALE_NS`] and [`RuleSet::tun`] is gone, programs that the owner left behind let everything pass.
pub const OWNER: &str = "NAT_OWNER";
/// Where programs die with their owner, their links are his: [`OWNER_BY_LINK`] stands there.
pub const OWNER_BY_LINK: u64 = u64::MAX;
/// Age from which an owner counts as dead.
pub const OWNER_STALE_NS: u64 = 5_000_000_000;

/// Name of the program at a TUN device's ingress, where packets come out of the tunnel.
pub const TUN_PROGRAM: &str = "tidegate_nat_tun";
/// Name of the global that says how many bytes stand before the IP header at a TUN device's ingress (`u32`): none,
/// but in runs of the program without a device.
pub const LINK_LEN_GLOBAL: &str = "LINK_LEN";
/// Name of the program at a NIC's ingress.
pub const NIC_PROGRAM: &str = "tidegate_nat_nic";

/// Most [`RuleSet::nat`] rules.
pub const NAT_RULES_LEN: usize = 64;
/// Most [`RuleSet::forward`] rules.
pub const FORWARD_RULES_LEN: usize = 256;
/// Most [`RuleSet::allow`] rules; one with several ranges of ports is several.
pub const ALLOW_RULES_LEN: usize = 512;
/// Most external addresses.
pub const EXTERNALS_LEN: usize = 16;
/// Most NICs that are named.
pub const NICS_LEN: usize = 32;

/// Slots of a protocol at an external address: ports from [`RuleSet::port_first`] on.
pub const PORTS_LEN: u32 = 1 << 15;
/// Protocols with slots of their own: TCP, UDP, ICMP (and ICMPv6) echo.
pub const PROTOCOLS_LEN: u32 = 3;
/// Slots of an external address.
pub const SLOTS_PER_EXTERNAL: u32 = PORTS_LEN * PROTOCOLS_LEN;

/// A protocol with slots of its own.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Protocol {
    /// TCP.
    Tcp = 0,
    /// UDP.
    Udp = 1,
    /// Echo requests and replies of ICMP and ICMPv6.
    Echo = 2,
}

/// The ring of free ports, in [`PORT_RINGS`], of a protocol at an external address.
#[inline(always)]
pub const fn ring(external: u32, protocol: Protocol) -> u32 {
    external * PROTOCOLS_LEN + protocol as u32
}

/// The number in [`SLOTS`] of a port, counted from [`RuleSet::port_first`].
#[inline(always)]
pub const fn slot_index(ring: u32, port: u32) -> u32 {
    ring * PORTS_LEN + port
}

/// No slot: the flow is not translated, or by a rule that forwards a port.
pub const NO_SLOT: u32 = u32::MAX;
/// No entry of a table of rules.
pub const NO_RULE: u32 = u32::MAX;

/// A prefix of addresses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Prefix {
    /// The address; bits behind the prefix are 0.
    pub address: AddressKey,
    /// Which bits of an address count: a program need not compute that.
    pub mask: AddressKey,
}

impl Prefix {
    /// The prefix of this many bits, 96 more than written for IPv4. Other bits of the address are cleared; a length
    /// beyond 128 is 128.
    pub const fn new(address: AddressKey, len: u32) -> Self {
        let mut prefix = Self { address, mask: AddressKey([0; 4]) };
        let mut word = 0;
        while word < 4 {
            let bits = len.saturating_sub(word as u32 * 32);
            let bits = if bits > 32 { 32 } else { bits };
            let mask = ((u32::MAX as u64) << (32 - bits)) as u32;
            prefix.mask.0[word] = mask.to_be();
            prefix.address.0[word] &= mask.to_be();
            word += 1;
        }
        prefix
    }

    /// 0 if an address is in the prefix. A number, so that several such questions cost one branch. A prefix of IPv6
    /// has no address of IPv4 in it, as short as it may be.
    #[inline(always)]
    pub const fn distance(&self, of: &AddressKey) -> u32 {
        self.distance_within(of) | self.distance_from(Self::family(of))
    }

    /// What [`Prefix::distance_from`] wants to know of an address: all ones for IPv4, else 0.
    #[inline(always)]
    pub const fn family(of: &AddressKey) -> u32 {
        (of.is_v4() as u32).wrapping_neg()
    }

    /// 0 unless the address is of IPv4, and the prefix is not.
    #[inline(always)]
    pub const fn distance_from(&self, family: u32) -> u32 {
        // The third word is what tells them apart, and part of all prefixes of IPv4.
        family & !self.mask.0[2]
    }

    /// As [`Prefix::distance`], for an address of the prefix's family.
    #[inline(always)]
    pub const fn distance_within(&self, of: &AddressKey) -> u32 {
        (self.address.0[0] ^ of.0[0] & self.mask.0[0])
            | (self.address.0[1] ^ of.0[1] & self.mask.0[1])
            | (self.address.0[2] ^ of.0[2] & self.mask.0[2])
            | (self.address.0[3] ^ of.0[3] & self.mask.0[3])
    }
}

/// Packets that come out of the tunnel and go out of a NIC get an external address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct NatRule {
    /// Whose packets. Of one family: `::ffff:0:0/96` is any of IPv4.
    pub from: Prefix,
    /// Index of the NIC.
    pub out: u32,
    /// The first of its external addresses in [`RuleSet::externals`], all of one family.
    pub external_first: u32,
    /// How many it has; 0: none at present, its packets are dropped.
    pub external_count: u32,
}

/// What comes to a port of a NIC's address goes to somebody else.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct ForwardRule {
    /// The address to which it comes: one of the NIC's. A rule with several addresses is several rules.
    pub external: AddressKey,
    /// To whom it goes.
    pub to: AddressKey,
    /// Index of the NIC.
    pub nic: u32,
    /// The port to which it comes.
    pub port: u16,
    /// The port to which it goes.
    pub to_port: u16,
    /// The [`Protocol`]: TCP or UDP.
    pub protocol: u32,
}

/// What may begin a flow. Answers may pass.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct AllowRule {
    /// Who.
    pub from: Prefix,
    /// To whom, before a [`ForwardRule`] changes it. Of the same family.
    pub to: Prefix,
    /// The IP protocol number; 0: every one, and both ICMPs are one.
    pub protocol: u32,
    /// The first port to which it goes, in host byte order; 0 with `port_last` 65,535: any.
    pub port_first: u16,
    /// The last one.
    pub port_last: u16,
    /// Its number in [`ALLOW_COUNTERS`]: that of its line.
    pub counter: u32,
}

/// An address that stands for inner ones.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct External {
    /// The address; all zeros: none at present.
    pub address: AddressKey,
    /// Index of the NIC.
    pub nic: u32,
    /// Counts the addresses that stood here.
    pub generation: u32,
}

/// All that holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct RuleSet {
    /// Counts rule sets. A flow that was judged by another one is judged again.
    pub version: u32,
    /// Index of the TUN device.
    pub tun: u32,
    /// The first port of each protocol's slots, in host byte order.
    pub port_first: u32,
    /// Bits of [`rule_flags`].
    pub flags: u32,
    /// How many entries of `nat` hold.
    pub nat_count: u32,
    /// Of `forward`.
    pub forward_count: u32,
    /// Of `allow`.
    pub allow_count: u32,
    /// Of `externals`.
    pub external_count: u32,
    /// The first one that fits is taken.
    pub nat: [NatRule; NAT_RULES_LEN],
    /// As above.
    pub forward: [ForwardRule; FORWARD_RULES_LEN],
    /// As above.
    pub allow: [AllowRule; ALLOW_RULES_LEN],
    /// External addresses. One keeps its place as long as it is used.
    pub externals: [External; EXTERNALS_LEN],
}

/// Bits of [`RuleSet::flags`].
pub mod rule_flags {
    /// There is an `Allow` line: what none of them names does not pass.
    pub const DENY: u32 = 1;
}

/// A flow, seen from inside.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct FlowKey {
    /// Who is inside the tunnel. (Of a flow between two who are, the one that began it.)
    pub inner: AddressKey,
    /// With whom.
    pub remote: AddressKey,
    /// The inner port.
    pub inner_port: u16,
    /// The remote port. 0 for a flow of TCP or UDP: no flow, but that a mapping has sent to this address, so
    /// that what comes from its other ports may pass (address-dependent filtering, RFC 4787 §5).
    pub remote_port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// Zeros.
    pub padding: [u8; 3],
}

/// What is known of a flow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Flow {
    /// Boot time in nanoseconds of its last packet.
    pub last_seen_ns: u64,
    /// Boot time in nanoseconds of its first packet.
    pub created_ns: u64,
    /// Packets from inside and from outside; each segment of a super-packet is one.
    pub packets: [u64; 2],
    /// Bytes of them, IP headers included.
    pub bytes: [u64; 2],
    /// The external address, if it is translated.
    pub external: AddressKey,
    /// Its slot's number in [`SLOTS`], or [`NO_SLOT`].
    pub slot: u32,
    /// The slot's generation: if it has another one, this flow is over.
    pub generation: u32,
    /// [`RuleSet::version`] by which it was judged.
    pub version: u32,
    /// Which rule it follows: index in the table of its kind, or [`NO_RULE`].
    pub rule: u32,
    /// The external port.
    pub external_port: u16,
    /// A [`FlowKind`].
    pub kind: u8,
    /// State of the flow: see `nat::tcp` for TCP; else [`SEEN_OUT`], [`SEEN_IN`].
    pub state: u8,
    /// Index of the NIC on its outer side.
    pub nic: u32,
    /// Of TCP: what each side, inner first, has sent and may send.
    pub windows: [TcpWindow; 2],
}

/// Bit of [`Flow::state`] of what is not TCP: something came from inside.
pub const SEEN_OUT: u8 = 1;
/// Bit of [`Flow::state`] of what is not TCP: something came from outside.
pub const SEEN_IN: u8 = 2;

/// What is done to a flow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum FlowKind {
    /// It passes untranslated, and began inside.
    Plain = 0,
    /// Its inner address has an external one ([`NatRule`]).
    Source = 1,
    /// It came to a port that is forwarded ([`ForwardRule`]).
    Forward = 2,
    /// It passes untranslated, and began outside.
    PlainInbound = 3,
}

/// What one side of a TCP flow has sent and may send; sequence numbers in host byte order.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct TcpWindow {
    /// Behind the last byte that it has sent.
    pub end: u32,
    /// Behind the last byte that it may send: what the other side has acknowledged, and its window.
    pub end_max: u32,
    /// Greatest window that it has told, scaled.
    pub window_max: u32,
    /// The scale of the windows that it tells, and [`TcpWindow::HAS_SCALE`] if it has sent one.
    pub scale: u32,
    /// Behind the last of its bytes that the other side has acknowledged.
    pub acked: u32,
}

impl TcpWindow {
    /// Bit of [`TcpWindow::scale`].
    pub const HAS_SCALE: u32 = 1 << 8;
}

/// An inner address and port, to an external address.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct MappingKey {
    /// The inner address.
    pub inner: AddressKey,
    /// The inner port.
    pub inner_port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub padding: u8,
    /// Index of the NIC by which it goes out.
    pub nic: u32,
}

/// The slot of a mapping.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Mapping {
    /// Number in [`SLOTS`].
    pub slot: u32,
    /// The slot's generation: if it has another one, this mapping is over.
    pub generation: u32,
}

/// The way back from an external port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Slot {
    /// Boot time in nanoseconds at which its last flow began, or one was last seen, to about a second.
    pub last_seen_ns: u64,
    /// The inner address.
    pub inner: AddressKey,
    /// Counts those who had the slot. Odd while somebody has it: a program adds 1 when it takes the slot
    /// from a ring, control adds 1 when it takes it back, before it puts it into the ring again.
    pub generation: u32,
    /// The inner port.
    pub inner_port: u16,
    /// Zero.
    pub padding: u16,
}

/// A packet that comes in fragments.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct FragmentKey {
    /// Its source.
    pub source: AddressKey,
    /// Its destination.
    pub destination: AddressKey,
    /// Its identification.
    pub id: u32,
    /// Index of the device by which it came.
    pub ifindex: u32,
    /// The IP protocol number.
    pub protocol: u32,
}

/// What becomes of its other fragments.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct FragmentEntry {
    /// Boot time in nanoseconds of the first one.
    pub created_ns: u64,
    /// Their source from now on.
    pub source: AddressKey,
    /// Their destination from now on.
    pub destination: AddressKey,
    /// What is done with them: one of [`fragment_verdict`].
    pub verdict: u32,
    /// Zero.
    pub padding: u32,
}

/// What is done with a packet's later fragments.
pub mod fragment_verdict {
    /// They go out of a NIC.
    pub const OUT: u32 = 1;
    /// They go into the tunnel.
    pub const IN: u32 = 2;
    /// They are left to the kernel.
    pub const PASS: u32 = 3;
}

const _: () = {
    assert!(size_of::<Prefix>() == 32);
    assert!(size_of::<NatRule>() == 44);
    assert!(size_of::<ForwardRule>() == 44);
    assert!(size_of::<AllowRule>() == 76);
    assert!(size_of::<External>() == 24);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Flow>() == 128);
    assert!(size_of::<MappingKey>() == 24);
    assert!(size_of::<Slot>() == 32);
    assert!(size_of::<FragmentKey>() == 44);
    assert!(size_of::<FragmentEntry>() == 48);
};

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "`Pod` says that a map value may be copied as bytes")]
mod pod {
    macro_rules! pod {
        ($($name:ident)*) => {
            $(
                // SAFETY: a `repr(C)` struct of integers and of such structs, without padding: the sizes asserted
                // above are the sums of their fields, and any bytes are a value.
                unsafe impl aya::Pod for super::$name {}
            )*
        };
    }
    pod!(RuleSet FlowKey Flow MappingKey Mapping Slot FragmentKey FragmentEntry);
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_prefix_holds_the_addresses_with_its_first_bits(
            address in any::<u128>(), other in any::<u128>(), common in 0u32..=128, len in 0u32..=130,
        ) {
            // The other one has `common` bits in common, or more by chance.
            let keep = u128::MAX.checked_shl(128 - common).unwrap_or(0);
            let other = address & keep | other & !keep;
            let key = |bits: u128| AddressKey::v6(bits.to_be_bytes());
            let is_inside = (address ^ other).leading_zeros() >= len.min(128);
            prop_assert_eq!(Prefix::new(key(address), len).distance(&key(other)) == 0, is_inside);
        }
    }

    #[test]
    fn a_prefix_of_ipv4_is_96_bits_longer() {
        let key = |text: &str| AddressKey::from(text.parse::<IpAddr>().unwrap());
        let prefix = Prefix::new(key("10.9.77.1"), 96 + 16);
        assert_eq!(prefix.address, key("10.9.0.0"));
        assert_eq!(prefix.distance(&key("10.9.1.2")), 0);
        assert_ne!(prefix.distance(&key("10.8.1.2")), 0);
        assert_ne!(prefix.distance(&key("::10.9.1.2")), 0);
        assert_eq!(Prefix::new(key("0.0.0.0"), 96).distance(&key("192.0.2.1")), 0);
        assert_ne!(Prefix::new(key("0.0.0.0"), 96).distance(&key("2001:db8::1")), 0);
        assert_ne!(Prefix::new(key("::"), 0).distance(&key("192.0.2.1")), 0);
        assert_eq!(Prefix::new(key("::"), 0).distance(&key("2001:db8::1")), 0);
    }
}
