//! Bounds-checked access to packet memory: the only `unsafe` on packet bytes.
#![expect(unsafe_code, reason = "packet memory is reached through two addresses")]

use core::marker::PhantomData;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::bpf_skb_load_bytes;
use aya_ebpf::programs::{SkBuffContext, SkReuseportContext, XdpContext};
use wg_common::headers::Bytes;

/// The bytes of the packet at an XDP hook, from its Ethernet header on.
pub struct Packet<'a> {
    start: usize,
    end: usize,
    context: PhantomData<&'a XdpContext>,
}

impl<'a> Packet<'a> {
    /// The packet for which the program was called.
    #[inline(always)]
    pub fn of(context: &'a XdpContext) -> Self {
        Self { start: context.data(), end: context.data_end(), context: PhantomData }
    }
}

impl Bytes for Packet<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.end - self.start
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let first = self.start + offset;
        if first + N > self.end {
            return None;
        }
        // SAFETY: the N bytes lie between the addresses that the kernel gave for this packet, as
        // was just checked, and the packet outlives the context that `self` borrows. Bytes have no
        // alignment, and the verifier refuses the program if the check does not cover the access.
        Some(unsafe { *(first as *const [u8; N]) })
    }
}

/// The bytes of a packet that the kernel holds as an skb, from where its network header begins: they may
/// lie in pieces, so that each read is a call of the kernel.
pub struct Skb<'a>(pub &'a SkBuffContext);

impl Bytes for Skb<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len() as usize
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.load(offset).ok()
    }
}

/// The bytes of a datagram for which a socket is chosen, from its UDP header on. Where it stands for several,
/// they are those of the first.
pub struct Datagram<'a>(pub &'a SkReuseportContext);

impl Bytes for Datagram<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        // What lies behind the linear part can be had by this alone.
        // SAFETY: the kernel writes N bytes to `bytes`, which has as many, or says that there are not so many;
        // the context is the one that this run of the program was given.
        let result = unsafe {
            bpf_skb_load_bytes(self.0.as_ptr(), offset as u32, bytes.as_mut_ptr().cast(), N as u32)
        };
        (result == 0).then_some(bytes)
    }
}
