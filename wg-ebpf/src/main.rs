//! Tidegate's programs in the kernel, one function per hook.
//!
//! They are thin: what a packet is, [`wg_common`] knows, so that the host tests the very code that
//! the kernel runs. The maps are described there too.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

mod maps;
mod nat;
mod packet;
mod steer;

use aya_ebpf::Global;
use aya_ebpf::bindings::sk_action::SK_PASS;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::macros::{sk_reuseport, socket_filter, xdp};
use aya_ebpf::programs::{SkBuffContext, SkReuseportContext, XdpContext};
use aya_log_ebpf::debug;
use wg_common::headers::{Bytes, IpVersion, UDP_LEN, destination_bytes};
use wg_common::map::{QueueKey, socket_number, tun_queue};
use wg_common::outcome::SteerEvent;

use crate::packet::{Datagram, Packet, Skb};
use crate::steer::Verdict;

/// 1 if the loader wants log lines. The kernel's verifier removes them otherwise.
#[expect(unsafe_code, reason = "the loader finds the global by its name")]
#[unsafe(no_mangle)]
static LOG: Global<u8> = Global::new(0);

/// XDP: hands our datagrams to the XSK of the queue on which they came, drops what only pretends to
/// be ours, and leaves all else to the kernel.
#[xdp]
fn tidegate_steer(ctx: XdpContext) -> u32 {
    let queue = QueueKey { ifindex: ctx.ingress_ifindex() as u32, queue: ctx.rx_queue_index() };
    match steer::steer(&Packet::of(&ctx), queue) {
        Verdict::Drop(reason) => {
            maps::count_drop(reason);
            if LOG.load() != 0 {
                debug!(&ctx, "dropped: reason {}, queue {}", reason as u32, queue.queue);
            }
            XDP_DROP
        }
        Verdict::Pass(event) => {
            maps::count_event(event);
            if LOG.load() != 0 && event as u8 != SteerEvent::PassedForeign as u8 {
                debug!(&ctx, "passed: event {}, queue {}", event as u32, queue.queue);
            }
            XDP_PASS
        }
        Verdict::Steer { xsk } => match maps::redirect(xsk) {
            Ok(redirect) => {
                maps::count_event(SteerEvent::Steered);
                redirect
            }
            // The socket is gone or not there yet.
            Err(pass) => {
                maps::count_event(SteerEvent::PassedNoXsk);
                pass
            }
        },
    }
}

/// Of a TUN device: chooses the queue by which a packet leaves, so that the worker reads it at which the
/// peer that it is for is at home. What is no IP packet leaves by the first.
#[socket_filter]
fn tidegate_queue(ctx: SkBuffContext) -> i64 {
    let to = destination_bytes(&Skb(&ctx));
    to.map_or(0, |to| tun_queue(&to, maps::owner, maps::home)).into()
}

/// Of the sockets on a listen port: has transport data come to that of the worker at which its keypair is at
/// home. Everything else is the kernel's to spread, by addresses and ports; nothing is dropped.
#[sk_reuseport]
fn tidegate_socket(ctx: SkReuseportContext) -> u32 {
    if let Some(socket) = socket_of(&ctx) {
        // Refused where the array has no socket of this very group at present: then the kernel chooses.
        let _ = maps::select(&ctx, socket);
    }
    SK_PASS
}

#[inline(always)]
fn socket_of(ctx: &SkReuseportContext) -> Option<u32> {
    const ETHERTYPE_V6: u16 = 0x86dd_u16.to_be();
    let version =
        if ctx.eth_protocol() as u16 == ETHERTYPE_V6 { IpVersion::V6 } else { IpVersion::V4 };
    let head = Datagram(ctx).read(UDP_LEN)?;
    socket_number(version, maps::datagram_worker(head)?)
}

/// What the programs tell the kernel: helpers for tracing and redirecting ask for a licence
/// compatible with the GPL.
#[expect(unsafe_code, reason = "the loader finds the licence by its section")]
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
