//! From TUN to datagram: whose packet it is, counters, seal the batch, send.
//!
//! Packets stand behind each other in one arena, each with room before it for the transport header and
//! behind it for padding and tag, so that encapsulation never moves them. A super-packet is cut into the
//! packets that it stands for in the room behind it. What one batch has no room for is cut for the next.
//! A batch that another thread seals goes there with its arena, and another arena takes its place.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrayvec::ArrayVec;
use wg_common::endpoint::Endpoint;
use wg_common::headers::{IPV6_LEN, inner_destination};
use wg_common::id::{PeerId, WorkerId};
use wg_common::mss::{self, TcpChecksum};
use wg_common::outcome::DropReason;
use wg_common::protocol::{PADDING_MULTIPLE, TAG_LEN, TRANSPORT_HEADER_LEN, TRANSPORT_OVERHEAD};
use wg_common::time::Now;

use super::BATCH_LEN;
use super::answers::Answers;
use super::crew::InFlight;
use super::encap::{outer_tos, padded_len, transport_header};
use super::fan_out::{Bundle, DEPTH, Head, Line, ToHelper, Turn};
use super::routing_loop::LoopedFragments;
use super::shared::Shared;
use super::staging::Staging;
use crate::aead::{BatchAead, Job};
use crate::counters::{Counters, Path};
use crate::segments::{Cut, VnetHeader, finish_checksum};
use crate::session::{HotPeer, Keypair, is_v6};
use crate::tun::TunQueue;
pub use crate::udp::Outgoing;
use crate::udp::UdpSockets;

/// Where packets to seal come from.
pub trait PacketSource {
    /// Reads one IP packet, or one that stands for several, to the beginning of `buffer`: what is left to
    /// do on it, and its length. `None` if there is none now.
    ///
    /// # Errors
    /// `InvalidData` if this one was lost; any other if there will be none for a while, or any more.
    fn read(&self, buffer: &mut [u8]) -> io::Result<Option<(VnetHeader, usize)>>;

    /// Gives a packet back: an ICMP message for the sender of one that was read. If it is not taken,
    /// it is lost, and so it is where nobody listens.
    fn answer(&self, _packet: &[u8]) {}
}

impl PacketSource for TunQueue {
    fn read(&self, buffer: &mut [u8]) -> io::Result<Option<(VnetHeader, usize)>> {
        TunQueue::read(self, buffer)
    }

    fn answer(&self, packet: &[u8]) {
        // Full, down or gone: the next turn finds out. ICMP promises nothing.
        let _ = TunQueue::write(self, packet);
    }
}

/// Where messages go.
pub trait DatagramSink {
    /// Sends at most [`BATCH_LEN`] datagrams, those of one IP version in order.
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent;

    /// As [`send`](Self::send), of messages to peers who are known: in their order, so many to each.
    fn send_to_peers(
        &self,
        datagrams: &[Outgoing<'_>],
        _peers: &[(&HotPeer, usize)],
        _now: Now,
    ) -> Unsent {
        self.send(datagrams)
    }
}

/// What did not go as it should when a batch was sent.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Unsent {
    /// Datagrams that the socket did not take, which are lost.
    pub failed: usize,
    /// Datagrams for which an XSK had no room, which are lost.
    pub no_room: usize,
    /// Datagrams that went by an XSK.
    pub by_xsk: usize,
    /// Bit *i*: datagram *i* went, but the address of ours that its endpoint names is gone.
    pub stale_sources: u64,
}

impl DatagramSink for UdpSockets {
    fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
        let mut outcome = Unsent::default();
        for v4 in [true, false] {
            let mut batch: ArrayVec<Outgoing<'_>, BATCH_LEN> = ArrayVec::new();
            let mut places: ArrayVec<usize, BATCH_LEN> = ArrayVec::new();
            for (place, datagram) in datagrams.iter().enumerate() {
                if datagram.endpoint.remote.is_ipv4() == v4 {
                    batch.push(*datagram);
                    places.push(place);
                }
            }
            if batch.is_empty() {
                continue;
            }
            let Some(socket) = self.for_remote(&batch[0].endpoint.remote) else {
                outcome.failed += batch.len();
                continue;
            };
            let sent = socket.send(&batch);
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

/// Room before each packet. Every packet begins at a multiple of 64 bytes: eight per cent of the AEAD's
/// time.
const HEADROOM: usize = 64;
/// Largest packet that is sealed.
const PACKET_LEN_MAX: usize = 65_535 - TRANSPORT_OVERHEAD;
/// Largest packet that is read: as long as IPv6 can say, to tell it from one that fits.
const READ_LEN: usize = IPV6_LEN + 65_535;
/// Where the last packet of a batch may begin. A batch of full packets of the usual MTU still fits; a full
/// super-packet with its segments passes it, and is a batch of its own: so the bytes that a worker uses
/// again and again stay in its cache.
const READ_BEGIN_MAX: usize = 128 << 10;
/// Room for the segments of a super-packet, behind it: 64 with all their headers, of any usual kind.
const SEGMENTS_LEN: usize = 96 << 10;
/// Bytes of the arena.
const ARENA_LEN: usize = READ_BEGIN_MAX + slot_len(READ_LEN) + SEGMENTS_LEN;
/// Most arenas that wait in line: those that several helpers can have, more than one worker keeps busy.
const ARENAS_MAX: usize = 24;
const _: () = assert!(HEADROOM >= TRANSPORT_HEADER_LEN && HEADROOM.is_multiple_of(64));
// Behind a super-packet, wherever it stands, there is room for one of its segments at least.
const _: () = assert!(slot_len(PACKET_LEN_MAX) <= SEGMENTS_LEN);

/// Bytes that a packet of `len` takes in the arena. An odd number of cache lines, so that the beginnings of
/// packets do not meet in the same few sets of the cache.
const fn slot_len(len: usize) -> usize {
    let padded = len.next_multiple_of(PADDING_MULTIPLE);
    ((HEADROOM + padded + TAG_LEN).div_ceil(64) | 1) * 64
}

/// Where packets stand: bytes that begin at a multiple of 64.
struct Arena {
    bytes: Box<[u8]>,
    begin: usize,
}

impl Arena {
    fn new() -> Self {
        let bytes = vec![0; ARENA_LEN + 63].into_boxed_slice();
        // Only speed hangs on it.
        let begin = bytes.as_ptr().align_offset(64).min(63);
        Self { bytes, begin }
    }

    #[inline]
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.begin..][..ARENA_LEN]
    }

    #[inline]
    fn packet(&self, packet: &Placed) -> &[u8] {
        &self.bytes[self.begin + packet.start..][..packet.len]
    }
}

/// A packet in the arena, headroom before it.
#[derive(Clone, Copy)]
struct Placed {
    start: usize,
    len: usize,
}

/// A super-packet that is not cut to the end.
struct Unfinished {
    packet: Placed,
    cut: Cut,
    next: usize,
}

impl Unfinished {
    /// Copies what it is cut from to the beginning of another arena.
    fn move_to(&mut self, to: &mut Arena, from: &Arena) {
        let Placed { len, .. } = self.packet;
        to.bytes()[HEADROOM..HEADROOM + len].copy_from_slice(from.packet(&self.packet));
        self.packet.start = HEADROOM;
    }

    /// Where the arena is free behind it.
    fn end(&self) -> usize {
        self.packet.start - HEADROOM + slot_len(self.packet.len)
    }

    fn left(&self) -> usize {
        self.cut.count() - self.next
    }
}

/// The packets of one batch, in the order in which they stand in the arena.
#[derive(Default)]
struct Batch {
    packets: ArrayVec<Placed, BATCH_LEN>,
    /// How many of them, in their order, have the same headers but for what differs between segments.
    runs: ArrayVec<usize, BATCH_LEN>,
    /// Where the arena is free.
    free: usize,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.packets.is_full() || self.free > READ_BEGIN_MAX
    }

    /// Takes a packet of `len` bytes, which stands behind the headroom at `free`.
    fn take(&mut self, len: usize) {
        self.packets.push(Placed { start: self.free + HEADROOM, len });
        self.free += slot_len(len);
    }

    /// The runs: the first packet of each, and all.
    fn runs(&self) -> impl Iterator<Item = (&Placed, &[Placed])> {
        let mut rest = &self.packets[..];
        self.runs.iter().filter_map(move |&count| {
            let (run, behind) = rest.split_at(count);
            rest = behind;
            Some((run.first()?, run))
        })
    }
}

/// The outbound half of a worker.
pub struct Outbound {
    id: WorkerId,
    shared: Arc<Shared>,
    aead: &'static dyn BatchAead,
    staging: Staging,
    answers: Answers,
    looped: LoopedFragments,
    arena: Arena,
    unfinished: Option<Unfinished>,
    line: Line<Sealing>,
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
    #[inline]
    fn next_counter(&mut self) -> Option<u64> {
        self.counters_left = self.counters_left.checked_sub(1)?;
        self.next_counter += 1;
        Some(self.next_counter - 1)
    }
}

/// A packet, and the group it belongs to.
struct Routed {
    packet: Placed,
    group: usize,
    tos: u8,
}

/// A message in the arena.
struct Message {
    /// Where its packet begins, behind the transport header.
    start: usize,
    group: usize,
    /// Bytes from the transport header to the tag.
    len: usize,
    counter: u64,
    tos: u8,
}

impl Outbound {
    /// The outbound half of worker `id`.
    pub fn new(id: WorkerId, shared: Arc<Shared>, aead: &'static dyn BatchAead) -> Self {
        let staging = Staging::new(Arc::clone(shared.crew.staging()));
        let line = Line::alone(Arc::clone(&shared.crew));
        Self {
            id,
            shared,
            aead,
            staging,
            answers: Answers::default(),
            looped: LoopedFragments::default(),
            arena: Arena::new(),
            unfinished: None,
            line,
        }
    }

    /// With helpers that seal batches while this thread is saturated.
    #[must_use]
    pub fn with_helpers(mut self, helpers: Vec<ToHelper<Sealing>>) -> Self {
        let crew = Arc::clone(&self.shared.crew);
        // As many as there can be away, and some that wait behind those.
        let count = (DEPTH * helpers.len() + 4).min(ARENAS_MAX);
        let bundle = || Sealing::new(Arc::clone(&self.shared), self.aead);
        self.line = Line::new(crew, helpers, count, bundle, 1);
        self
    }

    /// Takes note of the turn that begins.
    pub fn begin_turn(&mut self, turn: Turn) {
        self.line.begin_turn(turn);
    }

    /// Whether a batch that was given to a helper is to be back in a moment.
    pub fn awaits(&self, now: Now) -> bool {
        self.line.is_awaited(now)
    }

    /// Whether a helper has given something back.
    pub fn is_answered(&self) -> bool {
        self.line.is_answered()
    }

    /// What is in flight.
    pub fn in_flight(&self) -> InFlight {
        self.line.in_flight()
    }

    /// Whether nothing waits to be released.
    pub fn is_empty(&self) -> bool {
        self.line.is_empty()
    }

    /// Sends what helpers have sealed, in the order in which it was read. To be called in every turn.
    pub fn release(&mut self, socket: &impl DatagramSink, now: Now) {
        while let Some(head) = self.line.next(now) {
            match head {
                Head::Done(mut bundle) => {
                    let counters = counters(&self.shared, self.id);
                    // What was sealed before a break of time must not follow it, and nothing leaves in a pause.
                    match self.shared.pause(now).or(bundle.refused()) {
                        Some(reason) => counters.drop(reason, bundle.len() as u64),
                        None => bundle.send(counters, socket, now),
                    }
                    self.line.recycle(bundle);
                }
                Head::Lost(count) => {
                    counters(&self.shared, self.id).drop(DropReason::HelperStuck, count as u64);
                }
            }
        }
    }

    /// Reads a batch from `tun` and sends it, now or when it is released. Says whether there may be more to
    /// read, or to cut.
    ///
    /// # Errors
    /// What reading said, if it was not "nothing now"; packets read before it are sent.
    pub fn process(
        &mut self,
        tun: &impl PacketSource,
        socket: &impl DatagramSink,
        now: Now,
    ) -> io::Result<bool> {
        if !self.line.has_room() {
            // What is read waits best where it is.
            return Ok(true);
        }
        let mut batch = self.empty_batch();
        let outcome = self.gather(tun, &mut batch);
        if self.shared.is_up() {
            self.route(&batch, tun, socket, now);
        } else {
            let unfinished = self.unfinished.take().map_or(0, |unfinished| unfinished.left());
            let count = batch.packets.len() + unfinished;
            counters(&self.shared, self.id).drop(DropReason::InterfaceDown, count as u64);
        }
        outcome
    }

    /// A batch that leaves a super-packet alone that is not cut to the end.
    fn empty_batch(&self) -> Batch {
        let free = self.unfinished.as_ref().map_or(0, Unfinished::end);
        Batch { free, ..Batch::default() }
    }

    /// Reads packets of one batch, and cuts those that stand for several. Says whether there may be more.
    fn gather(&mut self, tun: &impl PacketSource, batch: &mut Batch) -> io::Result<bool> {
        self.cut(batch);
        for _ in 0..BATCH_LEN {
            if batch.is_full() || self.unfinished.is_some() {
                break;
            }
            let start = batch.free + HEADROOM;
            let read = tun.read(&mut self.arena.bytes()[start..start + READ_LEN]);
            let dropped = match read {
                Ok(Some((header, len))) => self.take(header, len, batch),
                Ok(None) => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    Err(DropReason::BadOffload)
                }
                Err(error) => return Err(error),
            };
            if let Err(reason) = dropped {
                counters(&self.shared, self.id).drop(reason, 1);
            }
        }
        Ok(true)
    }

    /// Does what is left to do on a packet that was read to where the arena is free.
    fn take(
        &mut self,
        header: VnetHeader,
        len: usize,
        batch: &mut Batch,
    ) -> Result<(), DropReason> {
        let start = batch.free + HEADROOM;
        let bytes = &mut self.arena.bytes()[start..start + len];
        let Some(segments) = header.segments else {
            if len > PACKET_LEN_MAX {
                return Err(DropReason::TooLarge);
            }
            if let Some(checksum) = header.checksum {
                finish_checksum(checksum, bytes)?;
            }
            batch.take(len);
            batch.runs.push(1);
            return Ok(());
        };
        let cut = Cut::new(segments, header.checksum, bytes)?;
        if cut.segment_len(0) > PACKET_LEN_MAX {
            return Err(DropReason::TooLarge);
        }
        let unfinished = Unfinished { packet: Placed { start, len }, cut, next: 0 };
        batch.free = unfinished.end();
        self.unfinished = Some(unfinished);
        self.cut(batch);
        Ok(())
    }

    /// Cuts as many segments of the super-packet that is under way as the batch has room for.
    fn cut(&mut self, batch: &mut Batch) {
        let Some(Unfinished { packet, cut, next }) = &mut self.unfinished else { return };
        let count = cut.count();
        let mut run = 0;
        let (whole, behind) = self.arena.bytes().split_at_mut(packet.start + packet.len);
        let (whole, end) = (&whole[packet.start..], packet.start + packet.len);
        while *next < count && !batch.packets.is_full() {
            let len = cut.segment_len(*next);
            if batch.free + slot_len(len) > ARENA_LEN {
                break;
            }
            cut.write(whole, *next, &mut behind[batch.free + HEADROOM - end..]);
            batch.take(len);
            *next += 1;
            run += 1;
        }
        if run > 0 {
            batch.runs.push(run);
        }
        if *next == count {
            self.unfinished = None;
        }
    }

    /// Sends staged packets whose keypair has come. Says whether there are more.
    pub fn flush_staged(&mut self, socket: &impl DatagramSink, now: Now) -> bool {
        if self.staging.is_empty() {
            return false;
        }
        if !self.line.has_room() {
            return true;
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
        let mut batch = self.empty_batch();
        while !batch.packets.is_full()
            && batch.free + slot_len(PACKET_LEN_MAX) <= ARENA_LEN
            && let Some(packet) = self.staging.pop(peer.id)
        {
            let start = batch.free + HEADROOM;
            self.arena.bytes()[start..start + packet.len()].copy_from_slice(&packet);
            batch.take(packet.len());
        }
        let count = batch.packets.len();
        let mut groups = ArrayVec::new();
        match group_of(&self.shared, &peer, &mut groups, false, now) {
            Ok(group) => {
                groups[group].count = count as u64;
                let copy_dscp = self.shared.copy_dscp.load(Ordering::Relaxed);
                let routed = |packet: &Placed| {
                    let tos = outer_tos(self.arena.packet(packet), copy_dscp);
                    Routed { packet: *packet, group, tos }
                };
                let packets = batch.packets.iter().map(routed).collect();
                self.seal_and_send(packets, groups, socket, now);
            }
            Err(reason) => counters(&self.shared, self.id).drop(reason, count as u64),
        }
        !self.staging.is_empty()
    }

    /// Finds the peers of a batch's packets, then seals and sends them. What is the same for all packets of
    /// a run is done once.
    fn route(
        &mut self,
        batch: &Batch,
        tun: &impl PacketSource,
        socket: &impl DatagramSink,
        now: Now,
    ) {
        if let Some(reason) = self.shared.pause(now) {
            counters(&self.shared, self.id).drop(reason, batch.packets.len() as u64);
            return;
        }
        let mut groups: ArrayVec<Group, BATCH_LEN> = ArrayVec::new();
        let mut packets: ArrayVec<Routed, BATCH_LEN> = ArrayVec::new();
        let mut dropped: ArrayVec<(Placed, usize, DropReason), BATCH_LEN> = ArrayVec::new();
        let mut too_large: ArrayVec<(Placed, usize), BATCH_LEN> = ArrayVec::new();
        let mtu = self.shared.mtu.load(Ordering::Relaxed);
        let copy_dscp = self.shared.copy_dscp.load(Ordering::Relaxed);
        loop {
            let routing = self.shared.routing.load();
            for (first, run) in batch.runs() {
                let packet = self.arena.packet(first);
                let group = inner_destination(packet)
                    .and_then(|destination| routing.lookup(destination).ok_or(DropReason::NoPeer))
                    .and_then(|peer| self.group_by_id(peer, &mut groups, now))
                    .and_then(|group| {
                        let remote = groups[group].endpoint.remote;
                        if self.looped.is_ours(packet, remote, &self.shared) {
                            return Err(DropReason::RoutingLoop);
                        }
                        let inner_mtu = &groups[group].peer.inner_mtu;
                        if let Some(mtu) = inner_mtu.exceeded_by(packet, first.len, mtu) {
                            too_large.push((*first, mtu));
                            return Err(DropReason::TooLarge);
                        }
                        Ok(group)
                    });
                match group {
                    Ok(group) => {
                        groups[group].count += run.len() as u64;
                        let tos = outer_tos(packet, copy_dscp);
                        packets.extend(run.iter().map(|&packet| Routed { packet, group, tos }));
                    }
                    Err(reason) => dropped.push((*first, run.len(), reason)),
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
            too_large.clear();
        }
        for (packet, count, reason) in dropped {
            counters(&self.shared, self.id).drop(reason, count as u64);
            if matches!(reason, DropReason::NoPeer | DropReason::NoEndpoint) {
                let packet = self.arena.packet(&packet);
                if reason == DropReason::NoPeer {
                    self.shared.note_no_peer(packet, now);
                }
                if let Some(answer) = self.answers.unreachable(packet, now) {
                    tun.answer(answer);
                }
            }
        }
        for (packet, mtu) in too_large {
            if let Some(answer) = self.answers.too_big(self.arena.packet(&packet), mtu, now) {
                tun.answer(answer);
            }
        }
        if self.shared.mss_clamp.load(Ordering::Relaxed) {
            for Routed { packet: Placed { start, len }, group, .. } in &packets {
                let inner_mtu = &groups[*group].peer.inner_mtu;
                let packet = &mut self.arena.bytes()[*start..start + len];
                mss::clamp(packet, inner_mtu.mtu(is_v6(packet), mtu), TcpChecksum::Full);
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

    /// Seals and sends packets, which are in the order in which they stand in the arena.
    fn seal_and_send(
        &mut self,
        packets: ArrayVec<Routed, BATCH_LEN>,
        mut groups: ArrayVec<Group, BATCH_LEN>,
        socket: &impl DatagramSink,
        now: Now,
    ) {
        // Of some, every packet was one of our own.
        for group in groups.iter_mut().filter(|group| group.count > 0) {
            self.reserve(group, now);
        }
        let mtu = self.shared.mtu.load(Ordering::Relaxed);
        let shared = Arc::clone(&self.shared);
        let counters = counters(&shared, self.id);
        let (arena, staging) = (self.arena.bytes(), &mut self.staging);
        // First the bytes of every message, then one pass that borrows them all for the AEAD.
        let mut messages: ArrayVec<Message, BATCH_LEN> = ArrayVec::new();
        for Routed { packet: Placed { start, len }, group: number, tos } in packets {
            let group = &mut groups[number];
            let Some(counter) = group.next_counter() else {
                staging.push(&group.peer, &arena[start..start + len], counters, now);
                continue;
            };
            let keypair = group.keypair.as_ref().expect("it reserved the counter");
            let padded = padded_len(len, group.peer.inner_mtu.padding_bound(mtu));
            if padded > len {
                arena[start + len..start + padded].fill(0);
            }
            arena[start - TRANSPORT_HEADER_LEN..start]
                .copy_from_slice(&transport_header(keypair.remote_index(), counter));
            let len = padded + TRANSPORT_OVERHEAD;
            group.sent_bytes += len as u64;
            messages.push(Message { start, group: number, len, counter, tos });
        }
        if messages.is_empty() {
            return;
        }
        if !self.line.wants(messages.len(), now) {
            seal(self.aead, arena, &messages, &groups);
            send(&self.arena, &mut messages, &groups, counters, socket, now);
            return;
        }
        let Some(mut bundle) = self.line.take() else {
            counters.drop(DropReason::QueueFull, messages.len() as u64);
            return;
        };
        bundle.fill(&mut self.arena, messages, groups);
        if let Some(unfinished) = &mut self.unfinished {
            unfinished.move_to(&mut self.arena, &bundle.arena);
        }
        if self.line.submit(bundle, now) {
            counters.fanned_out(1);
        }
        // What is at the front may be done by now.
        self.release(socket, now);
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
    let asks_for_way = shared.crew.transmits() && !peer.knows_way_to(&endpoint);
    if peer.inner_mtu.is_unknown() || asks_for_way {
        shared.want_inner_mtu(peer);
    }
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

/// A batch that may be sealed by another thread, with the arena in which it stands.
pub struct Sealing {
    shared: Arc<Shared>,
    aead: &'static dyn BatchAead,
    arena: Arena,
    messages: ArrayVec<Message, BATCH_LEN>,
    groups: ArrayVec<Group, BATCH_LEN>,
    /// When the oldest of its keypairs began.
    begun: Now,
    is_sealed: bool,
}

impl Sealing {
    fn new(shared: Arc<Shared>, aead: &'static dyn BatchAead) -> Self {
        Self {
            shared,
            aead,
            arena: Arena::new(),
            messages: ArrayVec::new(),
            groups: ArrayVec::new(),
            begun: Now::default(),
            is_sealed: false,
        }
    }

    /// Takes a batch, and gives its own arena for the batch's.
    fn fill(
        &mut self,
        arena: &mut Arena,
        messages: ArrayVec<Message, BATCH_LEN>,
        groups: ArrayVec<Group, BATCH_LEN>,
    ) {
        std::mem::swap(arena, &mut self.arena);
        self.messages.extend(messages);
        self.groups.extend(groups);
        let keypairs = self.groups.iter().filter_map(|group| group.keypair.as_ref());
        self.begun = keypairs.map(|keypair| keypair.begun()).min().unwrap_or_default();
    }

    /// Why nothing of it is sent, if it is so: it was not sealed, or what sealed it has ended since.
    fn refused(&self) -> Option<DropReason> {
        let may_go = self.is_sealed && self.begun >= self.shared.keys_not_before();
        (!may_go).then_some(DropReason::KeyExpired)
    }

    fn send(&mut self, counters: &Counters, socket: &impl DatagramSink, now: Now) {
        send(&self.arena, &mut self.messages, &self.groups, counters, socket, now);
    }
}

impl Bundle for Sealing {
    fn len(&self) -> usize {
        self.messages.len()
    }

    fn work(&mut self) {
        if self.begun >= self.shared.keys_not_before() {
            seal(self.aead, self.arena.bytes(), &self.messages, &self.groups);
            self.is_sealed = true;
        }
        self.groups.iter_mut().for_each(|group| group.keypair = None);
    }

    fn clear(&mut self) {
        self.messages.clear();
        self.groups.clear();
        self.is_sealed = false;
    }
}

/// Seals messages, which are in the order in which they stand in the arena.
fn seal(aead: &dyn BatchAead, arena: &mut [u8], messages: &[Message], groups: &[Group]) {
    let mut jobs: ArrayVec<Job<'_>, BATCH_LEN> = ArrayVec::new();
    let (mut rest, mut at) = (arena, 0);
    for message in messages {
        let keypair = groups[message.group].keypair.as_ref().expect("it reserved the counter");
        let len = message.len - TRANSPORT_HEADER_LEN;
        let (buffer, behind) = rest[message.start - at..].split_at_mut(len);
        jobs.push(Job::new(keypair.seal_key(), message.counter, buffer));
        (rest, at) = (behind, message.start + len);
    }
    aead.seal(&mut jobs);
}

/// Sends messages that are sealed.
fn send(
    arena: &Arena,
    messages: &mut [Message],
    groups: &[Group],
    counters: &Counters,
    socket: &impl DatagramSink,
    now: Now,
) {
    // Those of one peer next to each other, each peer's in their order.
    if !messages.is_sorted_by_key(|message| message.group) {
        messages.sort_unstable_by_key(|message| (message.group, message.start));
    }
    let datagrams: ArrayVec<Outgoing<'_>, BATCH_LEN> = messages
        .iter()
        .map(|message| {
            let start = message.start - TRANSPORT_HEADER_LEN;
            let bytes = arena.packet(&Placed { start, len: message.len });
            let endpoint = &groups[message.group].endpoint;
            Outgoing { bytes, endpoint, tos: message.tos }
        })
        .collect();
    let peers: ArrayVec<(&HotPeer, usize), BATCH_LEN> = messages
        .chunk_by(|one, next| one.group == next.group)
        .map(|its| (&*groups[its[0].group].peer, its.len()))
        .collect();
    let unsent = socket.send_to_peers(&datagrams, &peers, now);
    let Unsent { failed, no_room, by_xsk, stale_sources } = unsent;
    let lost = failed + no_room;
    if lost > 0 {
        counters.drop(DropReason::SocketSend, failed as u64);
        counters.drop(DropReason::XskSend, no_room as u64);
    }
    counters.sent(Path::Xsk, by_xsk as u64);
    counters.sent(Path::Socket, datagrams.len().saturating_sub(lost + by_xsk) as u64);
    for (place, message) in messages.iter().enumerate() {
        if stale_sources >> place & 1 != 0 {
            groups[message.group].peer.forget_local_source();
        }
    }
    if lost == datagrams.len() {
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

fn counters(shared: &Shared, id: WorkerId) -> &Counters {
    &shared.workers[usize::from(id.0)].counters
}
