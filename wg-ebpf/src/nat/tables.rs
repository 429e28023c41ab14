//! What the engine asks of maps and of the kernel.
#![expect(unsafe_code, reason = "the kernel's helpers, and map values that are shared with others")]

use aya_ebpf::cty::c_void;
use core::{mem, ptr};

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_F_CURRENT_NETNS, BPF_FIB_LKUP_RET_BLACKHOLE, BPF_FIB_LKUP_RET_FRAG_NEEDED,
    BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
    BPF_FIB_LKUP_RET_PROHIBIT, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNREACHABLE,
    bpf_fib_lookup as FibLookup, bpf_redir_neigh as NextHop, bpf_sock_tuple as SockTuple,
};
use aya_ebpf::helpers::{
    bpf_check_mtu, bpf_fib_lookup, bpf_loop, bpf_redirect, bpf_redirect_neigh, bpf_sk_lookup_udp,
    bpf_sk_release, bpf_skb_change_head, bpf_skb_store_bytes, bpf_skc_lookup_tcp,
};
use aya_ebpf::programs::TcContext;
use wg_common::headers::{
    ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTOCOL_TCP, PROTOCOL_UDP,
};
use wg_common::map::AddressKey;
use wg_common::nat::engine::{Route, Search, Segments, Tables};
use wg_common::nat::map::{
    Flow, FlowKey, FragmentEntry, FragmentKey, Mapping, MappingKey, RuleSet, Slot,
};
use wg_common::nat::tuple::Tuple;
use wg_common::outcome::NatEvent;

use super::maps;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `BPF_FIB_LOOKUP_MARK`: the way is looked up with a mark, which stands where the source's link address is put.
const FIB_LOOKUP_MARK: u32 = 1 << 5;
/// The kernel knows no such flag.
const EINVAL: i64 = -22;

/// The maps, for one packet.
pub struct Kernel<'a> {
    context: &'a TcContext,
    /// Index of the TUN device.
    tun: u32,
    /// The found flow, or null.
    found: *mut Flow,
    /// What the kernel said of the way.
    fib: &'a mut FibLookup,
    /// The rule that was looked for.
    rule: &'a mut u32,
    fib_result: u32,
    /// Whether the kernel is to look after the next hop's link address.
    is_stale: bool,
}

impl<'a> Kernel<'a> {
    #[inline(always)]
    pub fn new(
        context: &'a TcContext,
        tun: u32,
        fib: &'a mut FibLookup,
        rule: &'a mut u32,
    ) -> Self {
        Self {
            context,
            tun,
            found: ptr::null_mut(),
            fib,
            rule,
            fib_result: BPF_FIB_LKUP_RET_NOT_FWDED,
            is_stale: false,
        }
    }

    /// Sends the packet, from its IP header on, out of the NIC by the way that was found last: the verdict, or
    /// `None` if that is not possible.
    // Not a part of the program itself: before 6.10 the kernel rounds the stacks of a chain of calls up to 32 bytes
    // each, and the longest chain would be beyond 512.
    #[inline(never)]
    pub fn send_out(&mut self, is_v4: bool, link_len: u32) -> Option<i32> {
        let context = self.context.as_ptr().cast();
        if link_len == 0 {
            // SAFETY: the context is the one that this run of the program was given.
            if unsafe { bpf_skb_change_head(context, ETHERNET_LEN as u32, 0) } != 0 {
                return None;
            }
        }
        let [high, low] = if is_v4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 }.to_be_bytes();
        let [a, b, c, d, e, f] = self.fib.dmac;
        let [g, h, i, j, k, l] = self.fib.smac;
        let is_known = self.fib_result == BPF_FIB_LKUP_RET_SUCCESS && !self.is_stale;
        let header = [a, b, c, d, e, f, g, h, i, j, k, l, high, low];
        // SAFETY: the kernel reads 14 bytes of `header`, and writes them into the packet or refuses.
        let result = unsafe {
            bpf_skb_store_bytes(context, 0, header.as_ptr().cast(), ETHERNET_LEN as u32, 0)
        };
        if result != 0 {
            return None;
        }
        if is_known {
            // SAFETY: the helper has no preconditions.
            return Some(unsafe { bpf_redirect(self.fib.ifindex, 0) } as i32);
        }
        maps::count_event(NatEvent::Resolved);
        // SAFETY: as `FibLookup` above.
        let mut hop: NextHop = unsafe { mem::zeroed() };
        hop.nh_family = self.fib.family.into();
        // SAFETY: both unions hold integers only; the kernel wrote the next hop of this family there.
        unsafe {
            if self.fib.family == AF_INET {
                hop.__bindgen_anon_1.ipv4_nh = self.fib.__bindgen_anon_4.ipv4_dst;
            } else {
                hop.__bindgen_anon_1.ipv6_nh = self.fib.__bindgen_anon_4.ipv6_dst;
            }
        }
        // SAFETY: the kernel reads a `bpf_redir_neigh` of this size.
        let verdict = unsafe {
            bpf_redirect_neigh(self.fib.ifindex, &mut hop, size_of::<NextHop>() as i32, 0)
        };
        Some(verdict as i32)
    }

    /// The MTU of a device, if `len` is more.
    #[inline(always)]
    fn mtu_below(&self, ifindex: u32, len: u32) -> Option<u32> {
        let mut mtu = len;
        // SAFETY: the kernel reads and writes one word.
        let result = unsafe { bpf_check_mtu(self.context.as_ptr(), ifindex, &mut mtu, 0, 0) };
        // Of a super-packet it says that all is well, whatever length it was asked about: so its MTU is compared. A device
        // that is gone, or down, is found out when it is given the packet.
        (result >= 0 && len > mtu).then_some(mtu)
    }

    /// Sends the packet into the tunnel.
    #[inline(always)]
    pub fn send_in(&self) -> i32 {
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_redirect(self.tun, 0) as i32 }
    }
}

/// Asks the kernel for a way.
#[inline(always)]
fn ask(context: &TcContext, fib: &mut FibLookup, flags: u32) -> i64 {
    let size = size_of::<FibLookup>() as i32;
    // SAFETY: the kernel reads and writes a `bpf_fib_lookup` of this size.
    unsafe { bpf_fib_lookup(context.as_ptr(), fib, size, flags) }
}

/// A search that is under way.
struct UnderWay<'a, Q> {
    rules: &'a RuleSet,
    query: &'a Q,
    rule: *mut u32,
}

/// Looks at one entry; 1 if no other needs to be looked at.
extern "C" fn step<Q: Search>(index: u64, under_way: *mut UnderWay<'_, Q>) -> i64 {
    // SAFETY: `search` made it, and waits.
    let under_way = unsafe { &*under_way };
    let is_met = under_way.query.is_met(under_way.rules, index as u32);
    if is_met {
        // SAFETY: this CPU's scratch memory.
        unsafe { *under_way.rule = index as u32 };
    }
    is_met.into()
}

impl Tables for Kernel<'_> {
    #[inline(always)]
    fn now_ns(&self) -> u64 {
        maps::now_ns()
    }

    #[inline(always)]
    fn find_flow(&mut self, key: &FlowKey) -> bool {
        self.found = maps::flow(key);
        !self.found.is_null()
    }

    #[inline(always)]
    fn found<R>(&mut self, change: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        let flow = self.found;
        if flow.is_null() {
            return None;
        }
        // SAFETY: the kernel keeps the memory of the element until this run of the program is over. Other CPUs and
        // control may read and write it too: integers, of which one write may be lost; and where control removes the
        // element meanwhile, a flow that takes its place may begin with wrong counts. `change` keeps no reference.
        Some(change(unsafe { &mut *flow }))
    }

    #[inline(always)]
    fn put_flow(&mut self, key: &FlowKey, flow: &Flow) -> bool {
        maps::put_flow(key, flow) && self.find_flow(key)
    }

    #[inline(always)]
    fn remove_flow(&mut self, key: &FlowKey) {
        self.found = ptr::null_mut();
        maps::remove_flow(key);
    }

    #[inline(always)]
    fn mapping(&mut self, key: &MappingKey) -> Option<Mapping> {
        maps::mapping(key)
    }

    #[inline(always)]
    fn put_mapping(&mut self, key: &MappingKey, mapping: &Mapping) -> bool {
        maps::put_mapping(key, mapping)
    }

    #[inline(always)]
    fn slot(&mut self, index: u32) -> Option<Slot> {
        let slot = maps::slot(index)?;
        // SAFETY: an element of an array that outlives the program. Who takes the slot changes the generation last, and
        // the flow's must be the same.
        Some(unsafe { slot.read() })
    }

    #[inline(always)]
    fn take_slot(&mut self, index: u32, inner: &AddressKey, inner_port: u16) -> Option<u32> {
        let slot = maps::slot(index)?;
        // SAFETY: as above; nobody else took this slot's port from its ring.
        unsafe {
            let generation = (&raw const (*slot).generation).read_volatile().wrapping_add(1) | 1;
            (*slot).last_seen_ns = maps::now_ns();
            (*slot).inner = *inner;
            (*slot).inner_port = inner_port;
            (&raw mut (*slot).generation).write_volatile(generation);
            Some(generation)
        }
    }

    #[inline(always)]
    fn touch_slot(&mut self, index: u32) {
        if let Some(slot) = maps::slot(index) {
            // SAFETY: as above; a word that is written in one piece.
            unsafe { (&raw mut (*slot).last_seen_ns).write_volatile(maps::now_ns()) };
        }
    }

    #[inline(always)]
    fn take_port(&mut self, ring: u32) -> Option<u32> {
        maps::take_port(ring)
    }

    #[inline(always)]
    fn is_owned(&mut self, address: &AddressKey) -> bool {
        maps::is_owned(address)
    }

    #[inline(never)]
    fn has_socket(&mut self, tuple: &Tuple, address: &AddressKey, port: u16) -> bool {
        // SAFETY: integers and unions of such.
        let mut socket: SockTuple = unsafe { mem::zeroed() };
        let len = if tuple.is_v4 {
            // SAFETY: a union of integers.
            let v4 = unsafe { &mut socket.__bindgen_anon_1.ipv4 };
            (v4.saddr, v4.daddr) = (tuple.destination.0[3], address.0[3]);
            (v4.sport, v4.dport) = (tuple.destination_port, port);
            12
        } else {
            // SAFETY: as above.
            let v6 = unsafe { &mut socket.__bindgen_anon_1.ipv6 };
            (v6.saddr, v6.daddr) = (tuple.destination.0, address.0);
            (v6.sport, v6.dport) = (tuple.destination_port, port);
            36
        };
        let (context, netns) = (self.context.as_ptr(), i64::from(BPF_F_CURRENT_NETNS) as u64);
        // SAFETY: the kernel reads `len` bytes of `socket`, which has as many.
        let found = unsafe {
            match tuple.protocol {
                PROTOCOL_TCP => bpf_skc_lookup_tcp(context, &mut socket, len, netns, 0),
                PROTOCOL_UDP => bpf_sk_lookup_udp(context, &mut socket, len, netns, 0),
                _ => return false,
            }
        };
        if found.is_null() {
            return false;
        }
        // SAFETY: the kernel gave it, and gets it back once.
        unsafe { bpf_sk_release(found.cast()) };
        true
    }

    #[inline(always)]
    fn rule(&mut self) -> &mut u32 {
        self.rule
    }

    #[inline(never)]
    fn search<Q: Search>(&mut self, rules: &RuleSet, count: u32, query: &Q) {
        let mut under_way = UnderWay { rules, query, rule: self.rule };
        let step = step::<Q> as extern "C" fn(u64, *mut UnderWay<'_, Q>) -> i64;
        // SAFETY: the kernel calls `step` with the numbers below `count` and with this very context, which outlives
        // the call.
        unsafe {
            bpf_loop(count, step as *mut c_void, (&raw mut under_way).cast(), 0);
        }
    }

    #[inline(always)]
    fn refresh_next_hop(&mut self) {
        self.is_stale = true;
    }

    #[inline(never)]
    fn route(&mut self, tuple: &Tuple, len: u32) -> Route {
        let fib = &mut *self.fib;
        fib.family = if tuple.is_v4 { AF_INET } else { AF_INET6 };
        fib.l4_protocol = tuple.protocol;
        fib.sport = tuple.source_port;
        fib.dport = tuple.destination_port;
        // No length: the kernel would hold it against what routers have told of paths as well, which it does not when it
        // forwards a packet itself.
        fib.__bindgen_anon_1.tot_len = 0;
        // The kernel takes what it knows of: in IPv4 the TOS without its last two bits, in IPv6 the traffic class, which
        // stands in its header behind the version.
        let class = (tuple.tos as u32) << 20;
        fib.__bindgen_anon_2.flowinfo = if tuple.is_v4 { 0 } else { class.to_be() };
        if tuple.is_v4 {
            fib.__bindgen_anon_2.tos = tuple.tos;
        }
        fib.__bindgen_anon_5.tbid = 0;
        // SAFETY: the context is the one that this run of the program was given.
        let (ifindex, mark) =
            unsafe { ((*self.context.skb.skb).ifindex, (*self.context.skb.skb).mark) };
        fib.ifindex = ifindex;
        if tuple.is_v4 {
            fib.__bindgen_anon_3.ipv4_src = tuple.source.0[3];
            fib.__bindgen_anon_4.ipv4_dst = tuple.destination.0[3];
        } else {
            fib.__bindgen_anon_3.ipv6_src = tuple.source.0;
            fib.__bindgen_anon_4.ipv6_dst = tuple.destination.0;
        }
        let result = if mark == 0 {
            ask(self.context, fib, 0)
        } else {
            // Where the kernel takes the mark from.
            let [a, b, c, d] = mark.to_ne_bytes();
            fib.smac = [a, b, c, d, 0, 0];
            match ask(self.context, fib, FIB_LOOKUP_MARK) {
                // Kernels before 6.10 do not know of it, and look at nothing.
                EINVAL => ask(self.context, fib, 0),
                result => result,
            }
        };
        self.fib_result = result as u32;
        match self.fib_result {
            // That the whole packet is too large for the device says nothing: each segment is held against it.
            BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED => {
                let to = fib.ifindex;
                if self.mtu_below(to, len).is_some() { Route::TooBig } else { Route::Out(to) }
            }
            BPF_FIB_LKUP_RET_NOT_FWDED => Route::Local,
            BPF_FIB_LKUP_RET_BLACKHOLE
            | BPF_FIB_LKUP_RET_UNREACHABLE
            | BPF_FIB_LKUP_RET_PROHIBIT
            | BPF_FIB_LKUP_RET_FWD_DISABLED => Route::Refused,
            _ => Route::Unknown,
        }
    }

    #[inline(always)]
    fn tunnel_mtu_below(&mut self, len: u32) -> Option<u32> {
        self.mtu_below(self.tun, len)
    }

    #[inline(always)]
    fn fragments(&mut self, key: &FragmentKey) -> Option<FragmentEntry> {
        maps::fragments(key)
    }

    #[inline(always)]
    fn put_fragments(&mut self, key: &FragmentKey, entry: &FragmentEntry) {
        maps::put_fragments(key, entry);
    }

    #[inline(never)]
    fn may_answer(&mut self, to: &AddressKey, kind: u32) -> bool {
        maps::may_answer(to, kind)
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is the one that this run of the program was given.
        unsafe { (*self.context.skb.skb).ifindex }
    }

    #[inline(always)]
    fn segments(&self) -> Segments {
        // SAFETY: as above.
        unsafe {
            Segments {
                len: (*self.context.skb.skb).gso_size,
                count: (*self.context.skb.skb).gso_segs,
            }
        }
    }

    #[inline(always)]
    fn count(&mut self, event: NatEvent) {
        maps::count_event(event);
    }

    #[inline(always)]
    fn count_allowed(&mut self, counter: u32) {
        maps::count_allowed(counter);
    }
}
