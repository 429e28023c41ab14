//! The load generator's programs in the kernel, in an object of their own: no part of the gateway.
//!
//! Their maps are described in [`wg_common::load`].
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(
    unsafe_code,
    reason = "map values are shared with the user side; globals are found by name"
)]

use aya_ebpf::Global;
use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP};
use aya_ebpf::bindings::{BPF_F_MMAPABLE, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::{
    bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_redirect, bpf_xdp_adjust_tail,
    bpf_xdp_store_bytes,
};
use aya_ebpf::macros::{classifier, map, xdp};
use aya_ebpf::maps::{Array, PerCpuArray};
use aya_ebpf::programs::{TcContext, XdpContext};
use wg_common::headers::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_LEN, IPV6_LEN, PROTOCOL_UDP, UDP_LEN,
};
use wg_common::load::{
    CHUNK_LEN, COUNTS_BUFFERS, COUNTS_BYTES, COUNTS_FIRST_NS, COUNTS_LAST_NS, COUNTS_LEN,
    COUNTS_PACKETS, COUNTS_PASSED, DEBT_NS, FRAME_LEN_MAX, FRAME_LEN_MIN, INTERVAL_PARTS_LOG2,
    LOOKS, SIZES_LEN, STATE_BEGIN_NS, STATE_END, STATE_FAILED, STATE_FIRST_NS, STATE_IDLE,
    STATE_INTERVAL, STATE_LAST_NS, STATE_LEN, STATE_LIMIT_NS, STATE_NEXT, frame_of_entry, segments,
};

// The loader says how many chunks and frames there are.
#[map]
static CHUNKS: Array<[u8; CHUNK_LEN]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
static FRAMES: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
static STATE: Array<[u64; STATE_LEN]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
static COUNTS: PerCpuArray<[u64; COUNTS_LEN]> = PerCpuArray::with_max_entries(1, 0);

#[map]
static SIZES: PerCpuArray<u64> = PerCpuArray::with_max_entries(SIZES_LEN, 0);

/// By which interface frames leave.
#[unsafe(no_mangle)]
static NIC: Global<u32> = Global::new(0);

/// Bytes before the IP header of what is counted.
#[unsafe(no_mangle)]
static LINK_LEN: Global<u32> = Global::new(0);

/// UDP port of what is counted.
#[unsafe(no_mangle)]
static PORT: Global<u16> = Global::new(0);

/// XDP, in a test run: makes the frame the next of those that were prepared, if it is due, and sends it.
#[xdp]
fn tidegate_load_live(ctx: XdpContext) -> u32 {
    let Some(state) = STATE.get_ptr_mut(0) else { return XDP_ABORTED };
    // SAFETY: the array has one entry, which outlives the program. Only one test run at a time uses it, on one CPU;
    // the user side writes it before and reads it after.
    let state = unsafe { &mut *state };
    match next(&ctx, state) {
        Some(true) => {
            state[STATE_NEXT] += 1;
            // SAFETY: the helper takes numbers only.
            unsafe { bpf_redirect(NIC.load(), 0) as u32 }
        }
        Some(false) => {
            state[STATE_IDLE] += 1;
            XDP_DROP
        }
        None => {
            state[STATE_FAILED] += 1;
            XDP_ABORTED
        }
    }
}

/// Writes the next frame; false if none is due, nothing if it cannot.
#[inline(always)]
fn next(ctx: &XdpContext, state: &mut [u64; STATE_LEN]) -> Option<bool> {
    let next = state[STATE_NEXT];
    if next >= state[STATE_END] {
        return Some(false);
    }
    let is_first = state[STATE_FIRST_NS] == 0;
    // The coarse clock is cheap and some milliseconds behind: good enough between the first and the last.
    // SAFETY: the helpers have no preconditions.
    let mut now = unsafe {
        if is_first || next + 1 == state[STATE_END] {
            bpf_ktime_get_ns()
        } else {
            bpf_ktime_get_coarse_ns()
        }
    };
    if is_first {
        state[STATE_FIRST_NS] = now;
        state[STATE_BEGIN_NS] = now;
    }
    if now >= state[STATE_FIRST_NS] + state[STATE_LIMIT_NS] {
        return Some(false);
    }
    if state[STATE_INTERVAL] != 0 {
        now = due(state, next);
        if now == 0 {
            return Some(false);
        }
    }
    state[STATE_LAST_NS] = now;
    let entry = FRAMES.get_ptr(next as u32)?;
    // SAFETY: the array outlives the program; the user side has written the word before the run began.
    let (chunk, at, len) = frame_of_entry(unsafe { *entry });
    let chunk = CHUNKS.get_ptr(chunk)?;
    if at > (CHUNK_LEN - FRAME_LEN_MAX) as u64
        || len < FRAME_LEN_MIN as u64
        || len > FRAME_LEN_MAX as u64
    {
        return None;
    }
    let has = (ctx.data_end() - ctx.data()) as u64;
    // SAFETY: the context is the one that this run of the program was given. `len` bytes from `at` on lie within
    // the chunk, as was just checked, and the kernel checks it for the frame.
    unsafe {
        if has != len && bpf_xdp_adjust_tail(ctx.ctx, len.wrapping_sub(has) as i32) != 0 {
            return None;
        }
        let bytes = chunk.cast::<u8>().add(at as usize);
        if bpf_xdp_store_bytes(ctx.ctx, 0, bytes.cast_mut().cast(), len as u32) != 0 {
            return None;
        }
    }
    Some(true)
}

/// The time, once frame `next` is due; 0 if that is not soon. What is too late to be made up for is left out.
#[inline(always)]
fn due(state: &mut [u64; STATE_LEN], next: u64) -> u64 {
    let since_begin = next.wrapping_mul(state[STATE_INTERVAL]) >> INTERVAL_PARTS_LOG2;
    let due = state[STATE_BEGIN_NS] + since_begin;
    for _ in 0..LOOKS {
        // SAFETY: the helper has no preconditions.
        let now = unsafe { bpf_ktime_get_ns() };
        if now >= due {
            let late = now - due;
            if late > DEBT_NS {
                state[STATE_BEGIN_NS] += late - DEBT_NS;
            }
            return now;
        }
    }
    0
}

/// TC at an interface's ingress: counts UDP packets to the port and drops them; all others pass.
#[classifier]
fn tidegate_load_count(ctx: TcContext) -> i32 {
    let Some(counts) = COUNTS.get_ptr_mut(0) else { return TC_ACT_UNSPEC };
    // SAFETY: this CPU's own copy of the value, and programs at ingress do not interrupt each other on a CPU; the
    // user side only reads it.
    let counts = unsafe { &mut *counts };
    match packet(&ctx) {
        Some(packet) => {
            count(&ctx, &packet, counts);
            TC_ACT_SHOT
        }
        None => {
            counts[COUNTS_PASSED] += 1;
            TC_ACT_UNSPEC
        }
    }
}

/// A packet to count.
struct Counted {
    header_len: u32,
    /// Bytes behind the headers, of all segments.
    payload_len: u32,
}

#[inline(always)]
fn packet(ctx: &TcContext) -> Option<Counted> {
    const V4: u16 = ETHERTYPE_IPV4;
    const V6: u16 = ETHERTYPE_IPV6;
    let link_len = LINK_LEN.load() as usize;
    // SAFETY: the context is the one that this run of the program was given.
    let (protocol, len) = unsafe { ((*ctx.skb.skb).protocol, (*ctx.skb.skb).len) };
    let (ip_len, upper, said_len) = match u16::from_be(protocol as u16) {
        V4 => {
            let head: [u8; 4] = ctx.load(link_len).ok()?;
            let upper: u8 = ctx.load(link_len + 9).ok()?;
            let fragment: [u8; 2] = ctx.load(link_len + 6).ok()?;
            if head[0] != 0x45 || u16::from_be_bytes(fragment) & 0x3fff != 0 {
                return None;
            }
            (IPV4_LEN, upper, u32::from(u16::from_be_bytes([head[2], head[3]])))
        }
        V6 => {
            let head: [u8; 8] = ctx.load(link_len).ok()?;
            let said = u32::from(u16::from_be_bytes([head[4], head[5]])) + IPV6_LEN as u32;
            (IPV6_LEN, head[6], said)
        }
        _ => return None,
    };
    let port: [u8; 2] = ctx.load(link_len + ip_len + 2).ok()?;
    if upper != PROTOCOL_UDP || u16::from_be_bytes(port) != PORT.load() {
        return None;
    }
    let header_len = (ip_len + UDP_LEN) as u32;
    // Of a buffer with several packets, the header may not say the length; what is one may be padded.
    let has_len = len.checked_sub(link_len as u32)?;
    let all_len = if segment_len(ctx) == 0 { said_len.min(has_len) } else { has_len };
    Some(Counted { header_len, payload_len: all_len.checked_sub(header_len)? })
}

#[inline(always)]
fn segment_len(ctx: &TcContext) -> u32 {
    // SAFETY: the context is the one that this run of the program was given.
    unsafe { (*ctx.skb.skb).gso_size }
}

#[inline(always)]
fn count(ctx: &TcContext, packet: &Counted, counts: &mut [u64; COUNTS_LEN]) {
    let segment_len = segment_len(ctx);
    let (segment_count, last_len) = segments(packet.payload_len, segment_len);
    counts[COUNTS_PACKETS] += u64::from(segment_count);
    counts[COUNTS_BYTES] +=
        u64::from(packet.payload_len) + u64::from(segment_count) * u64::from(packet.header_len);
    counts[COUNTS_BUFFERS] += 1;
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    if counts[COUNTS_FIRST_NS] == 0 {
        counts[COUNTS_FIRST_NS] = now;
    }
    counts[COUNTS_LAST_NS] = now;
    if segment_count > 1 {
        count_size(packet.header_len + segment_len, u64::from(segment_count) - 1);
    }
    count_size(packet.header_len + last_len, 1);
}

#[inline(always)]
fn count_size(len: u32, count: u64) {
    let index = if len < SIZES_LEN { len } else { SIZES_LEN - 1 };
    if let Some(size) = SIZES.get_ptr_mut(index) {
        // SAFETY: as in `tidegate_load_count`.
        unsafe { *size += count };
    }
}

/// What the programs tell the kernel: helpers for redirecting ask for a licence compatible with the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Never reached: the verifier accepts no program that could panic its way here.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// So that the crate can be checked and linted on the host; it does nothing there.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
