//! NAT and forwarding: the programs at a TUN device's ingress and at NICs' ingress. What they decide is in
//! [`wg_common::nat::engine`].

mod maps;
mod packet;
mod tables;

use aya_ebpf::Global;
use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use wg_common::headers::{ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use wg_common::nat::engine::{self, Verdict, Work};
use wg_common::nat::map::RuleSet;
use wg_common::outcome::{DropReason, NatEvent};

use self::packet::Packet;
use self::tables::Kernel;

/// Bytes before the IP header at a TUN device's ingress; the loader puts it in.
#[expect(unsafe_code, reason = "the loader finds the global by its name")]
#[unsafe(no_mangle)]
static LINK_LEN: Global<u32> = Global::new(0);

/// The next program, or the kernel, gets the packet: `TCX_NEXT`.
const NEXT: i32 = TC_ACT_UNSPEC;
const SHOT: i32 = TC_ACT_SHOT;

/// Where packets come out of the tunnel.
#[classifier]
fn tidegate_nat_tun(ctx: TcContext) -> i32 {
    match maps::rules(&ctx) {
        Some(rules) => from_tunnel(&ctx, rules),
        None => NEXT,
    }
}

/// Where packets come in by a NIC.
#[classifier]
fn tidegate_nat_nic(ctx: TcContext) -> i32 {
    match maps::rules(&ctx) {
        Some(rules) => from_nic(&ctx, rules),
        None => NEXT,
    }
}

#[inline(always)]
fn from_tunnel(ctx: &TcContext, rules: &RuleSet) -> i32 {
    let link_len = LINK_LEN.load();
    let mut packet = Packet { context: ctx, link_len };
    let Some(scratch) = maps::scratch() else { return NEXT };
    let work = &mut scratch.work;
    let mut tables = Kernel::new(ctx, rules.tun, &mut scratch.fib, &mut scratch.rule);
    let verdict = engine::from_tunnel(&mut packet, &mut tables, rules, work);
    carry_out(&mut packet, &mut tables, rules, work, verdict)
}

#[inline(always)]
fn from_nic(ctx: &TcContext, rules: &RuleSet) -> i32 {
    let Some(ETHERTYPE_IPV4 | ETHERTYPE_IPV6) = ethertype(ctx) else { return NEXT };
    let mut packet = Packet { context: ctx, link_len: ETHERNET_LEN as u32 };
    let Some(scratch) = maps::scratch() else { return NEXT };
    let work = &mut scratch.work;
    let mut tables = Kernel::new(ctx, rules.tun, &mut scratch.fib, &mut scratch.rule);
    let verdict = engine::from_nic(&mut packet, &mut tables, rules, work);
    carry_out(&mut packet, &mut tables, rules, work, verdict)
}

/// Does what the engine says.
#[inline(always)]
fn carry_out(
    packet: &mut Packet<'_>,
    tables: &mut Kernel<'_>,
    rules: &RuleSet,
    work: &mut Work,
    verdict: Verdict,
) -> i32 {
    let (verdict, there, back) = match verdict {
        Verdict::Answer(error) => {
            let verdict = engine::answer(packet, tables, rules, work, error);
            (verdict, NatEvent::Answered, NatEvent::Answered)
        }
        verdict => (verdict, NatEvent::TranslatedOut, NatEvent::TranslatedIn),
    };
    match verdict {
        Verdict::Pass(event) => pass(event),
        Verdict::In => {
            maps::count_event(back);
            tables.send_in()
        }
        Verdict::Out => match tables.send_out(work.tuple().is_v4, packet.link_len) {
            Some(verdict) => {
                maps::count_event(there);
                verdict
            }
            None => shoot(packet.context, DropReason::NotChanged),
        },
        Verdict::Drop(reason) => shoot(packet.context, reason),
        // An answer is not answered.
        Verdict::Answer(_) => shoot(packet.context, DropReason::NotChanged),
    }
}

/// What the kernel says the packet is. A tag that a NIC's frame bears belongs to another device, which has it
/// taken off.
#[inline(always)]
#[expect(unsafe_code, reason = "the kernel's context")]
fn ethertype(ctx: &TcContext) -> Option<u16> {
    // SAFETY: the context is the one that this run of the program was given.
    let (protocol, has_tag) = unsafe { ((*ctx.skb.skb).protocol, (*ctx.skb.skb).vlan_present) };
    (has_tag == 0).then_some(u16::from_be(protocol as u16))
}

#[inline(always)]
fn pass(event: NatEvent) -> i32 {
    maps::count_event(event);
    NEXT
}

#[inline(always)]
fn shoot(ctx: &TcContext, reason: DropReason) -> i32 {
    maps::count_drop(reason);
    if crate::LOG.load() != 0 {
        debug!(ctx, "nat: dropped: reason {}", reason as u32);
    }
    SHOT
}
