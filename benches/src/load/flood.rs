//! One flood: handshakes, packets sealed in advance, all of them sent once, and what came of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use wg_common::headers::{IPV4_LEN, IPV6_LEN, OuterHeaders, UDP_LEN};
use wg_common::load::{FRAME_LEN_MAX, frame_offset};
use wg_common::protocol::REJECT_AFTER_TIME;
use wg_userspace::sys::{affinity, clock};

use super::arguments::{By, Flood};
use super::count::{ask, ask_settled};
use super::cpu::CpuTimes;
use super::handshake::shake_hands;
use super::live::Live;
use super::packet::message_len;
use super::report::{CountReport, Delivered, FloodReport, HandshakesDone};
use super::sealed::{Places, Plan, frame_extra_len, seal};
use super::sockets::{Flooded, Sockets};
use super::target::{self, Way};
use super::xsk;

/// Ports of peers where nobody says how many.
const PORTS_DEFAULT: u32 = 64;
/// Packets in a row by sockets and by live frames where nobody says how many.
const BURST_SOCKETS: u32 = 32;
const BURST_LIVE: u32 = 1;
/// Longest run that the kernel takes as one.
const BURST_MAX: u32 = 64;
/// A sender kept its rate if it sent this part of the packets at least.
const KEPT: f64 = 0.99;
/// A flood at a given rate may take so much longer than asked for, as a part and in seconds, until it is ended: its
/// sender is late, which is told, but has sent all packets.
const SLACK: f64 = 0.5;
/// Keys get too old at Reject-After-Time: a flood must be over by then, with some room.
const AGE_MAX: Duration = REJECT_AFTER_TIME.saturating_sub(Duration::from_secs(10));
/// TTL of live frames.
const TTL: u8 = 64;

/// Shakes hands, seals, sends and counts.
///
/// # Errors
/// If the destination is none that may have load, a peer gets no answer, memory does not suffice, or the kernel
/// refuses.
pub fn flood(flood: &Flood) -> Result<FloodReport> {
    let way = check(flood)?;
    if let Some(cpu) = flood.cpu {
        affinity::pin(cpu).with_context(|| format!("pinning the sender to CPU {cpu}"))?;
    }
    let port_count = flood.ports.unwrap_or(flood.peers.min(PORTS_DEFAULT) as u16);
    let mut sockets = Sockets::open(flood.gateway.to, port_count)?;
    let began = Instant::now();
    let ready = match flood.by {
        By::Sockets => Ready::sockets(flood, &mut sockets)?,
        By::Live => Ready::live(flood, &mut sockets, &way)?,
        By::Xsk => Ready::xsk(flood, &mut sockets, &way)?,
    };
    let age = began.elapsed() + Duration::from_secs_f64(flood.seconds);
    ensure!(
        age < AGE_MAX,
        "the flood would end {} s after its first handshake, and keys are refused after {} s; take fewer peers or less \
         time",
        age.as_secs(),
        REJECT_AFTER_TIME.as_secs()
    );

    let count_before = flood.counter.as_deref().map(ask_settled).transpose()?;
    let cpu_before = CpuTimes::read(&flood.pids)?;
    let thread_before = clock::thread_time();
    let limit = match flood.pps.number() {
        Some(_) => flood.seconds * (1.0 + SLACK) + SLACK,
        None => flood.seconds,
    };
    let flooded = ready.send(flood, &sockets, Duration::from_secs_f64(limit))?;
    let thread_time = clock::thread_time().saturating_sub(thread_before);
    let cpu_after = CpuTimes::read(&flood.pids)?;
    let count_after = flood.counter.as_deref().map(ask_settled).transpose()?;

    let delivered =
        count_before.zip(count_after).map(|(before, after)| delivered(&before, &after, &flooded));
    let per_packet = delivered.map_or(flooded.packets, |delivered| delivered.packets);
    let mut report = report(flood, &ready, &flooded);
    report.ports = sockets.count();
    report.sender_ns_per_packet = thread_time.as_nanos() as f64 / flooded.packets.max(1) as f64;
    // Who lost nothing could have taken more.
    report.limited_by_sender |=
        report.asked_pps.is_none() && delivered.is_some_and(|delivered| delivered.lost == 0);
    report.delivered = delivered;
    report.cpu = cpu_after.since(&cpu_before, per_packet);
    Ok(report)
}

/// Refuses what must not, or cannot, have load.
fn check(flood: &Flood) -> Result<Way> {
    target::check_address(flood.dst)?;
    ensure!(
        flood.dst.is_ipv4() == flood.gateway.seed.network.addr().is_ipv4(),
        "{} and the peers' network {} are of different IP versions",
        flood.dst,
        flood.gateway.seed.network
    );
    let by_frames = flood.by != By::Sockets;
    ensure!(
        !by_frames || flood.gateway.nic.is_some(),
        "--by {} sends past the kernel's routes: name the interface by --nic",
        flood.by.word()
    );
    flood.gateway.seed.check(flood.peers)?;
    if let Some(path) = &flood.counter {
        ask(path)?;
    }
    let way = target::way(flood.gateway.to, flood.gateway.nic.as_deref())?;
    let outer_len = if flood.gateway.to.is_ipv4() { IPV4_LEN } else { IPV6_LEN } + UDP_LEN;
    let longest = message_len(flood.size.longest()) + outer_len;
    ensure!(
        longest <= way.mtu as usize,
        "packets of {} bytes make datagrams of {longest}, more than the MTU {} of {}",
        flood.size.longest(),
        way.mtu,
        way.nic
    );
    Ok(way)
}

/// All packets of a flood, sealed.
struct Ready {
    plan: Plan,
    places: Places,
    handshakes: HandshakesDone,
    packets: Packets,
}

/// Where they are.
enum Packets {
    /// Messages in our memory.
    Bytes(Vec<u8>),
    /// Frames in the kernel's.
    Live(Live),
    /// Frames in our memory, and the way that they take.
    Xsk(Vec<u8>, Way),
}

impl Ready {
    fn sockets(flood: &Flood, sockets: &mut Sockets) -> Result<Self> {
        let burst = flood.burst.unwrap_or(BURST_SOCKETS).min(BURST_MAX);
        let plan = Plan::new(flood, burst, 0)?;
        let places = Places::new(&plan, 0, |offset, _| offset);
        let mut bytes = vec![0; places.bytes()];
        let handshakes = all(flood, sockets, &plan, |_, at, message| {
            let place = places.at(at);
            bytes[place.offset()..][..place.len()].copy_from_slice(message);
            Ok(())
        })?;
        Ok(Self { plan, places, handshakes, packets: Packets::Bytes(bytes) })
    }

    fn live(flood: &Flood, sockets: &mut Sockets, way: &Way) -> Result<Self> {
        let frames = Frames::new(flood, way)?;
        let extra_len = frame_extra_len(flood, frames.headers.len());
        let plan = Plan::new(flood, flood.burst.unwrap_or(BURST_LIVE), extra_len)?;
        let places = Places::new(&plan, frames.headers.len(), |offset, _| frame_offset(offset));
        let live = Live::new(way, &places, plan.packet_count())?;
        let handshakes = frames.all(flood, sockets, &plan, |at, headers, message| {
            live.put(places.at(at), headers, message);
        })?;
        Ok(Self { plan, places, handshakes, packets: Packets::Live(live) })
    }

    fn xsk(flood: &Flood, sockets: &mut Sockets, way: &Way) -> Result<Self> {
        let frames = Frames::new(flood, way)?;
        let plan = Plan::new(flood, flood.burst.unwrap_or(BURST_LIVE), frames.headers.len())?;
        let places = Places::new(&plan, frames.headers.len(), |offset, _| offset);
        let mut bytes = vec![0; places.bytes()];
        let handshakes = frames.all(flood, sockets, &plan, |at, headers, message| {
            let place = places.at(at);
            let frame = &mut bytes[place.offset()..][..place.len()];
            headers.write_with(message, frame).expect("the place is made for this frame");
        })?;
        Ok(Self { plan, places, handshakes, packets: Packets::Xsk(bytes, way.clone()) })
    }

    fn send(&self, flood: &Flood, sockets: &Sockets, limit: Duration) -> Result<Flooded> {
        let Self { plan, places, .. } = self;
        match &self.packets {
            Packets::Bytes(bytes) => sockets.flood(plan, places, bytes, flood.pps, limit),
            Packets::Live(live) => live.flood(plan.packet_count(), flood.pps, limit),
            Packets::Xsk(bytes, way) => xsk::flood(way, plan, places, bytes, flood.pps, limit),
        }
    }
}

/// What stands before the messages of a flood that leaves past the kernel's stack.
struct Frames<'a> {
    way: &'a Way,
    headers: OuterHeaders,
}

impl<'a> Frames<'a> {
    fn new(flood: &Flood, way: &'a Way) -> Result<Self> {
        let src_mac = way.mac.with_context(|| {
            format!(
                "{} is no interface for frames: it must be Ethernet, up, and part of no other",
                way.nic
            )
        })?;
        let headers = OuterHeaders {
            dst_mac: [0; 6],
            src_mac,
            tags: [None; _],
            src: (way.source, 0).into(),
            dst: flood.gateway.to,
            tos: 0,
            ttl: TTL,
            id: 0,
        };
        let longest = headers.len() + message_len(flood.size.longest());
        ensure!(
            longest <= FRAME_LEN_MAX,
            "a frame of {longest} bytes is more than {FRAME_LEN_MAX}"
        );
        Ok(Self { way, headers })
    }

    /// Shakes hands and seals for all peers. `put` gets the number, headers and message of each frame.
    fn all(
        mut self,
        flood: &Flood,
        sockets: &mut Sockets,
        plan: &Plan,
        mut put: impl FnMut(u64, &OuterHeaders, &[u8]),
    ) -> Result<HandshakesDone> {
        let port_count = flood.peers.min(sockets.count().into());
        let ports: Vec<u16> = (0..port_count).map(|peer| sockets.port(peer)).collect();
        let mut is_known = false;
        all(flood, sockets, plan, |peer, at, message| {
            if !is_known {
                // The kernel knows it since the handshake's first message left.
                self.headers.dst_mac = self.way.neighbour_mac()?;
                is_known = true;
            }
            self.headers.src.set_port(ports[peer as usize % ports.len()]);
            put(at, &self.headers, message);
            Ok(())
        })
    }
}

/// Shakes hands and seals for all peers. `put` gets the peer, the number and the message of each packet.
fn all(
    flood: &Flood,
    sockets: &mut Sockets,
    plan: &Plan,
    mut put: impl FnMut(u32, u64, &[u8]) -> Result<()>,
) -> Result<HandshakesDone> {
    let patience = Duration::from_secs_f64(flood.patience);
    let peers = flood.gateway.seed.peers(flood.peers)?;
    shake_hands(sockets, flood.gateway.server_key, peers, patience, |peer, mut tunn| {
        seal(plan, flood, peer, &mut tunn, |at, message| put(peer.number, at, message))
    })
}

fn delivered(before: &CountReport, after: &CountReport, flooded: &Flooded) -> Delivered {
    let packets = after.packets.saturating_sub(before.packets);
    let lost = flooded.packets.saturating_sub(packets);
    Delivered {
        packets,
        lost,
        loss: lost as f64 / flooded.packets.max(1) as f64,
        pps: packets as f64 / flooded.time.as_secs_f64().max(1e-9),
    }
}

fn report(flood: &Flood, ready: &Ready, flooded: &Flooded) -> FloodReport {
    let seconds = flooded.time.as_secs_f64().max(1e-9);
    let pps = flooded.packets as f64 / seconds;
    let all_sent = flooded.attempted == ready.plan.packet_count();
    let asked_pps = flood.pps.number();
    let kept = asked_pps.is_none_or(|rate| all_sent && pps >= rate * KEPT);
    let mut warnings = Vec::new();
    if !kept {
        warnings.push(format!(
            "this machine sent {pps:.0} packets per second, not {:.0}: what is lost says little of the gateway",
            asked_pps.unwrap_or_default()
        ));
    }
    if flooded.refused > 0 {
        warnings.push(format!("the kernel refused {} packets", flooded.refused));
    }
    if flooded.nic_dropped > 0 {
        let dropped = flooded.nic_dropped;
        warnings.push(format!(
            "{dropped} frames found a full ring: the other end did not take them in time"
        ));
    }
    if flood.by == By::Sockets && ready.plan.burst() > 1 && !flooded.joined {
        warnings
            .push("the kernel did not take runs as one on this way: sending was slow".to_owned());
    }
    if asked_pps.is_none() && all_sent && seconds < flood.seconds * KEPT {
        warnings.push(format!(
            "all packets were sent after {seconds:.2} s; for more, give --memory above {}",
            flood.memory
        ));
    }
    FloodReport {
        by: flood.by.word().to_owned(),
        size: flood.size.to_string(),
        peers: flood.peers,
        ports: 0,
        burst: ready.plan.burst(),
        handshakes: ready.handshakes,
        sealed: ready.places.report(),
        asked_pps,
        packets: flooded.packets,
        bytes: ready.plan.inner_bytes(flooded.attempted),
        seconds,
        pps,
        refused: flooded.refused,
        nic_dropped: flooded.nic_dropped,
        ended: if asked_pps.is_none() && all_sent { "packets" } else { "time" }.to_owned(),
        limited_by_sender: !kept,
        sender_ns_per_packet: 0.0,
        delivered: None,
        cpu: Vec::new(),
        warnings,
    }
}
