//! A packet that is changed where it stands, by calls that know what the kernel knows of its checksums.
//!
//! Bytes alone do not say whether a packet's checksum is finished: of one that a stack on this host has made,
//! and of a super-packet, there is often only the sum of the pseudo-header ([`Sums::Partial`]). And a NIC may have
//! summed up a whole packet, to be compared with what its header says ([`Sums::Whole`]). The kernel knows,
//! programs in it do not: so the difference that a change makes is told to it, and it does what is right.

use crate::headers::Bytes;
use crate::map::AddressKey;

/// A packet from its IP header on, which may be changed. Offsets are in bytes from there; `None` is given where
/// the packet ends before, or where the kernel refuses, and then the packet is of no use any more.
pub trait Skb: Bytes {
    /// Writes bytes that a checksum of the packet covers, which is told of it by another call.
    fn store<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()>;

    /// Writes bytes that no checksum of the packet makes up for: the sum of the whole packet becomes another
    /// (`BPF_F_RECOMPUTE_CSUM`).
    fn store_uncovered<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()>;

    /// Changes the checksum of an IPv4 header at `offset` as if what it covers had changed by `difference`.
    fn replace_l3(&mut self, offset: usize, difference: Difference) -> Option<()>;

    /// Changes the checksum of TCP, UDP, ICMP or ICMPv6 at `offset`, as [`Skb::replace_l3`]. With `zero_is_none`,
    /// as UDP has it, a checksum of 0 stays 0, and one that would become 0 is 0xffff.
    fn replace_l4(
        &mut self,
        offset: usize,
        difference: Difference,
        summed: Summed,
        zero_is_none: bool,
    ) -> Option<()>;
}

/// A packet that can become shorter at its end and longer at its front.
pub trait Room: Skb {
    /// Cuts off what stands behind the first `len` bytes, and puts `head` before them. Of a super-packet nothing is
    /// left to be cut into segments then. `None` as in [`Skb`].
    fn put_before<const N: usize>(&mut self, head: &[u8; N], len: u32) -> Option<()>;
}

/// What a checksum of the upper layer covers that has changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Summed {
    /// Header or contents of the upper layer: a partial checksum does not have them in it yet.
    Contents,
    /// The addresses in the pseudo-header, of IPv4. The header's own checksum makes up for them in the sum of the
    /// whole packet, so that the change of this one is new there.
    AddressesV4,
    /// Those of IPv6. This very change makes up for them in the sum of the whole packet, which stays as it is.
    AddressesV6,
}

/// By how much a sum of one's complement changes: words in the order in which they stand in the packet.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Difference(u64);

impl Difference {
    /// Of an aligned word of 16 bits.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, from: [u8; 2], to: [u8; 2]) -> Self {
        self.number(u16::from_ne_bytes(from), u16::from_ne_bytes(to))
    }

    /// As [`Difference::word`], of a number as it was read from memory, in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn number(self, from: u16, to: u16) -> Self {
        Self(self.0 + (!from) as u64 + to as u64)
    }

    /// Of an address, both of one family.
    #[inline(always)]
    #[must_use]
    pub const fn address(self, from: &AddressKey, to: &AddressKey) -> Self {
        let mut sum = self.0 + (!from.0[3]) as u64 + to.0[3] as u64;
        // The first three words of IPv4's keys are the same.
        if !from.is_v4() {
            sum += (!from.0[0]) as u64 + to.0[0] as u64;
            sum += (!from.0[1]) as u64 + to.0[1] as u64;
            sum += (!from.0[2]) as u64 + to.0[2] as u64;
        }
        Self(sum)
    }

    /// Both together.
    #[inline(always)]
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// In 32 bits, as the kernel's helpers take it for `to`, with 0 for `from` and for the size of the field.
    #[inline(always)]
    pub const fn folded(self) -> u32 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum as u32
    }

    /// The finished checksum that follows upon `checksum`, as both stand in the packet.
    #[inline(always)]
    pub const fn apply(self, checksum: u16) -> u16 {
        !fold((!checksum) as u64 + self.folded() as u64)
    }
}

/// One's complement sum of 16-bit words.
#[inline(always)]
pub(super) const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + ((sum >> 32) & 0xffff) + (sum >> 48);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// How a packet's checksums stand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sums {
    /// All are finished (`CHECKSUM_NONE`, `CHECKSUM_UNNECESSARY`).
    Finished,
    /// That of the upper layer is the pseudo-header's sum alone, not inverted (`CHECKSUM_PARTIAL`).
    Partial,
    /// All are finished, and this is the sum of the whole packet (`CHECKSUM_COMPLETE`).
    Whole(u16),
}

/// A packet in memory, changed as the kernel changes its own: for tests, and for what runs beside the kernel.
#[derive(Debug)]
pub struct Buffer<'a> {
    /// From the IP header on.
    pub bytes: &'a mut [u8],
    /// How its checksums stand.
    pub sums: Sums,
}

impl<'a> Buffer<'a> {
    /// A packet whose checksums are finished.
    pub fn finished(bytes: &'a mut [u8]) -> Self {
        Self { bytes, sums: Sums::Finished }
    }

    /// The sum over all of the bytes, folded; what [`Sums::Whole`] should hold.
    pub fn whole(bytes: &[u8]) -> u16 {
        let words = bytes.chunks(2).map(|pair| match *pair {
            [first, second] => u64::from(u16::from_ne_bytes([first, second])),
            [last] => u64::from(u16::from_ne_bytes([last, 0])),
            _ => 0,
        });
        fold(words.sum())
    }
}

impl Bytes for Buffer<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.bytes.len()
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.read(offset)
    }
}

impl Skb for Buffer<'_> {
    fn store<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        *self.bytes.get_mut(offset..)?.first_chunk_mut()? = bytes;
        Some(())
    }

    fn store_uncovered<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        self.store(offset, bytes)?;
        if let Sums::Whole(_) = self.sums {
            self.sums = Sums::Whole(Self::whole(self.bytes));
        }
        Some(())
    }

    fn replace_l3(&mut self, offset: usize, difference: Difference) -> Option<()> {
        let sum = u16::from_ne_bytes(self.read(offset)?);
        self.store(offset, difference.apply(sum).to_ne_bytes())
    }

    fn replace_l4(
        &mut self,
        offset: usize,
        difference: Difference,
        summed: Summed,
        zero_is_none: bool,
    ) -> Option<()> {
        let old = u16::from_ne_bytes(self.read(offset)?);
        if zero_is_none && old == 0 {
            return Some(());
        }
        let mut new = match self.sums {
            Sums::Partial if summed == Summed::Contents => old,
            Sums::Partial => !difference.apply(!old),
            _ => difference.apply(old),
        };
        if zero_is_none && new == 0 {
            new = 0xffff;
        }
        self.store(offset, new.to_ne_bytes())?;
        if let (Sums::Whole(sum), Summed::AddressesV4) = (self.sums, summed) {
            self.sums = Sums::Whole(fold(u64::from(sum) + u64::from(!old) + u64::from(new)));
        }
        Some(())
    }
}
