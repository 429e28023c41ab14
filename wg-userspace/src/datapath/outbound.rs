//! From TUN to datagram: whose packet it is, counters, seal the batch, send.
//!
//! Packets stand in slots of one slab, with room before them for the transport header and behind
//! them for padding and tag, so that encapsulation never moves them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrayvec::ArrayVec;
use wg_common::endpoint::Endpoint;
use wg_common::headers::inner_destination;
use wg_common::id::{PeerId, WorkerId};
use wg_common::outcome::DropReason;
use wg_common::protocol::{TAG_LEN, TRANSPORT_HEADER_LEN, TRANSPORT_OVERHEAD};
use wg_common::time::Now;

use super::BATCH_LEN;
use super::answers::Answers;
use super::encap::{padded_len, transport_header};
use super::routing_loop::LoopedFragments;
use super::shared::Shared;
use super::staging::Staging;
use crate::aead::{BatchAead, Job};
use crate::counters::{Counters, Path};
use crate::session::{HotPeer, Keypair};
use crate::tun::TunQueue;
use crate::udp::UdpSockets;

/// Where packets to seal come from.
pub trait PacketSource {
    /// Reads one IP packet to the beginning of `buffer`; `None` if there is none now.
    ///
    /// # Errors
    /// If there will be none any more, or this one was lost.
    fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>>;

    /// Gives a packet back: an ICMP message for the sender of one that was read. If it is not taken,
    /// it is lost, and so it is where nobody listens.
    fn answer(&self, _packet: &[u8]) {}
}

impl PacketSource for TunQueue {
    fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        TunQueue::read(self, buffer)
    }

    fn answer(&self, packet: &[u8]) {
        // Full, down or gone: the next turn finds out. ICMP promises nothing.
        let _ = TunQueue::write(self, packet);
    }
}

/// Where messages go.
pub trait DatagramSink {
    /// Sends at most [`BATCH_LEN`] datagrams, those of one IP version in order, with this outer TOS.
    fn send(&self, datagrams: &[(&[u8], &Endpoint)], tos: u8) -> Unsent;
}

/// What did not go as it should when a batch was sent.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Unsent {
    /// Datagrams that are lost.
    pub failed: usize,
    /// Bit *i*: datagram *i* went, but the address of ours that its endpoint names is gone.
    pub stale_sources: u64,
}

impl DatagramSink for UdpSockets {
    fn send(&self, datagrams: &[(&[u8], &Endpoint)], tos: u8) -> Unsent {
        let mut outcome = Unsent::default();
        for v4 in [true, false] {
            let mut batch: ArrayVec<(&[u8], &Endpoint), BATCH_LEN> = ArrayVec::new();
            let mut places: ArrayVec<usize, BATCH_LEN> = ArrayVec::new();
            for (place, datagram) in datagrams.iter().enumerate() {
                if datagram.1.remote.is_ipv4() == v4 {
                    batch.push(*datagram);
                    places.push(place);
                }
            }
            if batch.is_empty() {
                continue;
            }
            let Some(socket) = self.for_remote(&batch[0].1.remote) else {
                outcome.failed += batch.len();
                continue;
            };
            let sent = socket.send(&batch, tos);
            outcome.failed += sent.failed;
            if let Some(error) = sent.error {
                tracing::trace!(%error, "sending");
            }
            for (bit, place) in places.into_iter().enumerate() {
                outcome.stale_sources |= (sent.stale_sources >> bit & 1) << place;
            }
        }
        outcome
    }
}

/// The payload of a slot begins at a multiple of 64 bytes: eight per cent of the AEAD's time.
const SLOT_HEADROOM: usize = 64;
/// Largest packet that a slot holds.
const PACKET_LEN_MAX: usize = 65_535 - TRANSPORT_OVERHEAD;
/// Bytes of a slot. Pages that no packet reaches are never touched. The odd part keeps the packets
/// of neighbouring slots out of each other's cache sets.
const SLOT_LEN: usize = SLOT_HEADROOM + PACKET_LEN_MAX.next_multiple_of(64) + 25 * 64;
const _: () = assert!(SLOT_HEADROOM >= TRANSPORT_HEADER_LEN);
const _: () = assert!(SLOT_LEN >= SLOT_HEADROOM + PACKET_LEN_MAX + 16 + TAG_LEN);

/// The outbound half of a worker.
pub struct Outbound {
    id: WorkerId,
    shared: Arc<Shared>,
    aead: &'static dyn BatchAead,
    staging: Staging,
    answers: Answers,
    looped: LoopedFragments,
    slab: Vec<u8>,
}

/// Packets of this batch for one peer.
struct Group {
    peer: Arc<HotPeer>,
    /// What seals them; without it they are staged.
    keypair: Option<Arc<Keypair>>,
    endpoint: Endpoint,
    /// How many packets there are.
    count: u64,
    /// The counters that are reserved for them and not used yet.
    next_counter: u64,
    counters_left: u64,
    sent_bytes: u64,
}

impl Group {
    /// The next of the reserved counters.
    fn next_counter(&mut self) -> Option<u64> {
        self.counters_left = self.counters_left.checked_sub(1)?;
        self.next_counter += 1;
        Some(self.next_counter - 1)
    }
}

/// A packet in a slot, and the group it belongs to.
struct Outgoing {
    slot: usize,
    len: usize,
    group: usize,
}

/// A message in a slot.
struct Message {
    slot: usize,
    group: usize,
    /// Bytes from the transport header to the tag.
    len: usize,
    counter: u64,
}

impl Outbound {
    /// The outbound half of worker `id`.
    pub fn new(id: WorkerId, shared: Arc<Shared>, aead: &'static dyn BatchAead) -> Self {
        Self {
            id,
            shared,
            aead,
            staging: Staging::default(),
            answers: Answers::default(),
            looped: LoopedFragments::default(),
            slab: vec![0; SLOT_LEN * BATCH_LEN],
        }
    }

    /// Reads a batch from `tun` and sends it. Says whether there may be more to read.
    ///
    /// # Errors
    /// What reading said, if it was not "nothing now"; packets read before it are sent.
    pub fn process(
        &mut self,
        tun: &impl PacketSource,
        socket: &impl DatagramSink,
        now: Now,
    ) -> io::Result<bool> {
        let mut lens: ArrayVec<usize, BATCH_LEN> = ArrayVec::new();
        let mut outcome = Ok(true);
        for slot in self.slab.chunks_exact_mut(SLOT_LEN) {
            match tun.read(&mut slot[SLOT_HEADROOM..SLOT_HEADROOM + PACKET_LEN_MAX]) {
                Ok(Some(len)) => lens.push(len),
                Ok(None) => outcome = Ok(false),
                Err(error) => outcome = Err(error),
            }
            if !matches!(outcome, Ok(true)) {
                break;
            }
        }
        if self.shared.is_up() {
            self.route(&lens, tun, socket, now);
        } else {
            let counters = counters(&self.shared, self.id);
            counters.drop(DropReason::InterfaceDown, lens.len() as u64);
        }
        outcome
    }

    /// Sends staged packets whose keypair has come. Says whether there are more.
    pub fn flush_staged(&mut self, socket: &impl DatagramSink, now: Now) -> bool {
        if self.staging.is_empty() {
            return false;
        }
        if let Some(reason) = self.shared.pause(now) {
            self.staging.clear(counters(&self.shared, self.id), reason);
            return false;
        }
        self.staging.drop_given_up(counters(&self.shared, self.id));
        let ready = self.staging.ready(|peer| self.shared.sealing_keypair(peer, now).is_some());
        let Some(peer) = ready else {
            let peers = &self.shared.peers;
            let is_peer = |peer: &Arc<HotPeer>| {
                peers.get(peer.id.0 as usize).is_some_and(|known| Arc::ptr_eq(&known, peer))
            };
            self.staging.expire(counters(&self.shared, self.id), is_peer, now);
            return false;
        };
        let mut lens: ArrayVec<usize, BATCH_LEN> = ArrayVec::new();
        while lens.len() < BATCH_LEN
            && let Some(packet) = self.staging.pop(peer.id)
        {
            let start = lens.len() * SLOT_LEN + SLOT_HEADROOM;
            self.slab[start..start + packet.len()].copy_from_slice(&packet);
            lens.push(packet.len());
        }
        let mut groups = ArrayVec::new();
        let mut packets = ArrayVec::new();
        match group_of(&self.shared, &peer, &mut groups, false, now) {
            Ok(group) => {
                groups[group].count = lens.len() as u64;
                packets.extend(lens.iter().enumerate().map(|(slot, &len)| Outgoing {
                    slot,
                    len,
                    group,
                }));
                self.seal_and_send(packets, groups, socket, now);
            }
            Err(reason) => counters(&self.shared, self.id).drop(reason, lens.len() as u64),
        }
        !self.staging.is_empty()
    }

    /// Finds the peers of the packets in the first slots, then seals and sends them.
    fn route(
        &mut self,
        lens: &[usize],
        tun: &impl PacketSource,
        socket: &impl DatagramSink,
        now: Now,
    ) {
        if let Some(reason) = self.shared.pause(now) {
            counters(&self.shared, self.id).drop(reason, lens.len() as u64);
            return;
        }
        let mut groups: ArrayVec<Group, BATCH_LEN> = ArrayVec::new();
        let mut packets: ArrayVec<Outgoing, BATCH_LEN> = ArrayVec::new();
        let mut dropped: ArrayVec<(usize, DropReason), BATCH_LEN> = ArrayVec::new();
        loop {
            let routing = self.shared.routing.load();
            for (slot, &len) in lens.iter().enumerate() {
                let start = slot * SLOT_LEN + SLOT_HEADROOM;
                let group = inner_destination(&self.slab[start..start + len])
                    .and_then(|destination| routing.lookup(destination).ok_or(DropReason::NoPeer))
                    .and_then(|peer| self.group_by_id(peer, &mut groups, now))
                    .and_then(|group| {
                        let packet = &self.slab[start..start + len];
                        let remote = groups[group].endpoint.remote;
                        if self.looped.is_ours(packet, remote, &self.shared) {
                            return Err(DropReason::RoutingLoop);
                        }
                        Ok(group)
                    });
                match group {
                    Ok(group) => {
                        groups[group].count += 1;
                        packets.push(Outgoing { slot, len, group });
                    }
                    Err(reason) => dropped.push((slot, reason)),
                }
            }
            // An id may belong to another peer than the one that the table means, if the table is of
            // the past by now.
            if Arc::ptr_eq(&routing, &self.shared.routing.load()) {
                break;
            }
            groups.clear();
            packets.clear();
            dropped.clear();
        }
        for (slot, reason) in dropped {
            counters(&self.shared, self.id).drop(reason, 1);
            if matches!(reason, DropReason::NoPeer | DropReason::NoEndpoint) {
                let start = slot * SLOT_LEN + SLOT_HEADROOM;
                let packet = &self.slab[start..start + lens[slot]];
                if reason == DropReason::NoPeer {
                    self.shared.note_no_peer(packet, now);
                }
                if let Some(answer) = self.answers.unreachable(packet, now) {
                    tun.answer(answer);
                }
            }
        }
        self.seal_and_send(packets, groups, socket, now);
    }

    fn group_by_id(
        &self,
        peer: PeerId,
        groups: &mut ArrayVec<Group, BATCH_LEN>,
        now: Now,
    ) -> Result<usize, DropReason> {
        if let Some(group) = groups.iter().rposition(|group| group.peer.id == peer) {
            return Ok(group);
        }
        let peer = self.shared.peers.get(peer.0 as usize).ok_or(DropReason::NoPeer)?;
        group_of(&self.shared, &peer, groups, self.staging.holds(&peer), now)
    }

    fn seal_and_send(
        &mut self,
        packets: ArrayVec<Outgoing, BATCH_LEN>,
        mut groups: ArrayVec<Group, BATCH_LEN>,
        socket: &impl DatagramSink,
        now: Now,
    ) {
        // Of some, every packet was one of our own.
        for group in groups.iter_mut().filter(|group| group.count > 0) {
            self.reserve(group, now);
        }
        let mtu = self.shared.mtu.load(Ordering::Relaxed);
        let Self { slab, staging, shared, .. } = self;
        let counters = counters(shared, self.id);
        // First the bytes of every message, then one pass that borrows them all for the AEAD.
        let mut messages: ArrayVec<Message, BATCH_LEN> = ArrayVec::new();
        for packet in packets {
            let group = &mut groups[packet.group];
            let start = packet.slot * SLOT_LEN + SLOT_HEADROOM;
            let Some(counter) = group.next_counter() else {
                let packet = &slab[start..start + packet.len];
                staging.push(&group.peer, packet, counters, now);
                continue;
            };
            let keypair = group.keypair.as_ref().expect("it reserved the counter");
            let padded = padded_len(packet.len, mtu);
            slab[start + packet.len..start + padded].fill(0);
            slab[start - TRANSPORT_HEADER_LEN..start]
                .copy_from_slice(&transport_header(keypair.remote_index(), counter));
            let message = Message {
                slot: packet.slot,
                group: packet.group,
                len: padded + TRANSPORT_OVERHEAD,
                counter,
            };
            group.sent_bytes += message.len as u64;
            messages.push(message);
        }
        let mut jobs: ArrayVec<Job<'_>, BATCH_LEN> = ArrayVec::new();
        let mut rest = messages.iter().peekable();
        for (slot, bytes) in slab.chunks_exact_mut(SLOT_LEN).enumerate() {
            if let Some(message) = rest.next_if(|message| message.slot == slot) {
                let keypair = groups[message.group].keypair.as_ref().expect("it sealed above");
                let end = SLOT_HEADROOM + message.len - TRANSPORT_HEADER_LEN;
                let buffer = &mut bytes[SLOT_HEADROOM..end];
                jobs.push(Job::new(keypair.seal_key(), message.counter, buffer));
            }
        }
        if jobs.is_empty() {
            return;
        }
        self.aead.seal(&mut jobs);
        drop(jobs);
        let datagrams: ArrayVec<(&[u8], &Endpoint), BATCH_LEN> = messages
            .iter()
            .map(|message| {
                let start = message.slot * SLOT_LEN + SLOT_HEADROOM - TRANSPORT_HEADER_LEN;
                let bytes = &slab[start..start + message.len];
                (bytes, &groups[message.group].endpoint)
            })
            .collect();
        let Unsent { failed, stale_sources } = socket.send(&datagrams, 0);
        if failed > 0 {
            counters.drop(DropReason::SocketSend, failed as u64);
        }
        counters.sent(Path::Socket, datagrams.len().saturating_sub(failed) as u64);
        for (place, message) in messages.iter().enumerate() {
            if stale_sources >> place & 1 != 0 {
                groups[message.group].peer.forget_local_source();
            }
        }
        if failed == datagrams.len() {
            for group in groups.iter().filter(|group| group.sent_bytes > 0) {
                group.peer.note_unsent(group.endpoint.remote, now);
            }
            return;
        }
        for group in groups.iter().filter(|group| group.sent_bytes > 0) {
            group.peer.transfer.sent(group.sent_bytes);
            group.peer.activity.data_sent(now);
        }
    }

    /// Reserves counters for a group's packets, and asks for a handshake where one is due.
    fn reserve(&self, group: &mut Group, now: Now) {
        let Some(keypair) = &group.keypair else {
            // With one, these packets only wait behind others that are staged.
            if self.shared.sealing_keypair(&group.peer, now).is_none() {
                self.shared.want_handshake(&group.peer);
            }
            return;
        };
        if let Some(reserved) = keypair.reserve(group.count) {
            group.next_counter = reserved.first;
            group.counters_left = reserved.count;
        }
        if group.counters_left < group.count || keypair.wants_rekey_to_send(now) {
            self.shared.want_handshake(&group.peer);
        }
    }
}

/// Opens a group for `peer`, which has none yet. `behind_staged` packets wait for those that are staged
/// already: the next flush takes them all, in order.
fn group_of(
    shared: &Shared,
    peer: &Arc<HotPeer>,
    groups: &mut ArrayVec<Group, BATCH_LEN>,
    behind_staged: bool,
    now: Now,
) -> Result<usize, DropReason> {
    let endpoint = match peer.endpoint.load().as_deref() {
        Some(endpoint) => *endpoint,
        None => {
            peer.note_no_endpoint(now);
            return Err(DropReason::NoEndpoint);
        }
    };
    let keypair = if behind_staged { None } else { shared.sealing_keypair(peer, now) };
    groups.push(Group {
        peer: Arc::clone(peer),
        keypair,
        endpoint,
        count: 0,
        next_counter: 0,
        counters_left: 0,
        sent_bytes: 0,
    });
    Ok(groups.len() - 1)
}

fn counters(shared: &Shared, id: WorkerId) -> &Counters {
    &shared.workers[usize::from(id.0)].counters
}
