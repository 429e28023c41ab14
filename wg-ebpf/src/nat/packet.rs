//! A packet at a TC hook, from its IP header on, and the kernel's calls that change it.
#![expect(unsafe_code, reason = "the kernel's helpers")]

use core::ptr;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::{
    bpf_csum_diff, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes,
    bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use wg_common::headers::Bytes;
use wg_common::nat::error::QUOTED_MAX_V6;
use wg_common::nat::packet::{Difference, Room, Skb, Summed};

use super::maps::{self, SUMMED_LEN};

/// A packet, and how many bytes of a link's header stand before its IP header.
pub struct Packet<'a> {
    /// What the program was called with.
    pub context: &'a TcContext,
    /// Offset of the IP header.
    pub link_len: u32,
}

impl Bytes for Packet<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.context.len().wrapping_sub(self.link_len) as usize
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        // SAFETY: the kernel writes N bytes to `bytes`, which has as many, or says that there are not so many; the
        // context is the one that this run of the program was given.
        let result = unsafe {
            bpf_skb_load_bytes(
                self.context.as_ptr().cast(),
                self.link_len + offset as u32,
                bytes.as_mut_ptr().cast(),
                N as u32,
            )
        };
        (result == 0).then_some(bytes)
    }

    #[inline(always)]
    fn sum(&self, len: u32) -> Option<u64> {
        const BLOCKS: u32 = QUOTED_MAX_V6.div_ceil(SUMMED_LEN as u32);
        const _: () = assert!(SUMMED_LEN.is_power_of_two());

        let block = maps::summed()?;
        let (mut at, mut sum) = (0, 0);
        for _ in 0..BLOCKS {
            if at >= len {
                break;
            }
            let left = len - at;
            let left = if left < SUMMED_LEN as u32 { left } else { SUMMED_LEN as u32 };
            // Says to the verifier that it is not 0, and not more.
            let left = ((left - 1) & (SUMMED_LEN as u32 - 1)) + 1;
            let context = self.context.as_ptr().cast();
            // SAFETY: the kernel writes `left` bytes to `block`, which has as many, or says that there are not so many.
            let result = unsafe {
                bpf_skb_load_bytes(context, self.link_len + at, block.as_mut_ptr().cast(), left)
            };
            if result != 0 {
                return None;
            }
            // SAFETY: the kernel reads as many bytes of `block`.
            let summed =
                unsafe { bpf_csum_diff(ptr::null_mut(), 0, block.as_mut_ptr().cast(), left, sum) };
            if summed < 0 {
                return None;
            }
            sum = summed as u32;
            at += left;
        }
        Some(sum as u64)
    }
}

impl Skb for Packet<'_> {
    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        self.write(offset, bytes, 0)
    }

    #[inline(always)]
    fn store_uncovered<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        self.write(offset, bytes, BPF_F_RECOMPUTE_CSUM.into())
    }

    #[inline(always)]
    fn replace_l3(&mut self, offset: usize, difference: Difference) -> Option<()> {
        let at = self.link_len as usize + offset;
        self.context.l3_csum_replace(at, 0, difference.folded().into(), 0).ok()
    }

    #[inline(always)]
    fn replace_l4(
        &mut self,
        offset: usize,
        difference: Difference,
        summed: Summed,
        zero_is_none: bool,
    ) -> Option<()> {
        // Kernels from 6.16 on tell IPv6's pseudo-header from IPv4's (`BPF_F_IPV6`), others refuse to hear of it. What
        // is mistaken without is the sum of the whole packet that a NIC has found: nobody asks for it where the packet
        // leaves the host, or enters a TUN device.
        let pseudo = match summed {
            Summed::Contents => 0,
            Summed::AddressesV4 | Summed::AddressesV6 => BPF_F_PSEUDO_HDR,
        };
        let zero = if zero_is_none { BPF_F_MARK_MANGLED_0 } else { 0 };
        let at = self.link_len as usize + offset;
        let difference = difference.folded().into();
        self.context.l4_csum_replace(at, 0, difference, (pseudo | zero).into()).ok()
    }
}

impl Room for Packet<'_> {
    #[inline(always)]
    fn put_before<const N: usize>(&mut self, head: &[u8; N], len: u32) -> Option<()> {
        let context = self.context.as_ptr().cast();
        // This also takes away what makes it a super-packet. A checksum that is not finished stays so.
        // SAFETY: the context is the one that this run of the program was given.
        if unsafe { bpf_skb_change_tail(context, self.link_len + len, 0) } != 0 {
            return None;
        }
        // Between the link's header and IP's, which are known to be elsewhere then: room that is made at the very front
        // is a link's to the kernel, and taken off again on the way into a TUN device.
        // SAFETY: as above.
        if unsafe { bpf_skb_adjust_room(context, N as i32, BPF_ADJ_ROOM_MAC, 0) } != 0 {
            return None;
        }
        // SAFETY: the kernel reads N bytes of `head`, and writes them into the packet or refuses.
        let result = unsafe {
            bpf_skb_store_bytes(
                context,
                self.link_len,
                head.as_ptr().cast(),
                N as u32,
                BPF_F_RECOMPUTE_CSUM.into(),
            )
        };
        (result == 0).then_some(())
    }
}

impl Packet<'_> {
    #[inline(always)]
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N], flags: u64) -> Option<()> {
        // SAFETY: the kernel reads N bytes of `bytes`, and writes them into the packet or says that they do not fit.
        let result = unsafe {
            bpf_skb_store_bytes(
                self.context.as_ptr().cast(),
                self.link_len + offset as u32,
                bytes.as_ptr().cast(),
                N as u32,
                flags,
            )
        };
        (result == 0).then_some(())
    }
}
