//! From datagram to TUN: triage, open the batch, replay, source check, join, write.
//!
//! A packet changes nothing until it is proven. The order is: length and type, receiver index, home,
//! key age, whether its counter has come before, tag, replay, then endpoint and timers, then the inner header, the source check, and
//! the TUN device, to which packets of a flow go as one. A batch leaves nothing behind that waits for
//! the next, unless another thread opens it: then all that follows its opening is done when it is back and
//! those before it are done, and its keypairs are asked for again.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use arrayvec::ArrayVec;
use wg_common::ecn;
use wg_common::endpoint::Endpoint;
use wg_common::headers::inner_packet;
use wg_common::id::{Counter, ReceiverIndex, WorkerId};
use wg_common::message::{Message, classify};
use wg_common::mss::{self, TcpChecksum};
use wg_common::outcome::DropReason;
use wg_common::protocol::{REJECT_AFTER_MESSAGES, TAG_LEN, TRANSPORT_HEADER_LEN};
use wg_common::time::Now;

use super::BATCH_LEN;
use super::crew::InFlight;
use super::encap::transport_counter;
use super::fan_out::{Bundle, Head, Line, ToHelper, Turn};
use super::handoff::{HandshakeDatagram, Outbox, Parcel, Work};
use super::opening::{self, Opened, Opening};
use super::shared::Shared;
use crate::aead::{BatchAead, Job};
use crate::counters::Path;
use crate::routing::RoutingTable;
use crate::segments::SegmentKind;
use crate::segments::join::{Batch, PACKETS_MAX, Plan};
use crate::session::{HotPeer, Keypair, Receiving};
use crate::tun::{self, TunQueue};

pub use crate::segments::Run;

const _: () = assert!(BATCH_LEN <= PACKETS_MAX, "a batch is joined as a whole");

/// Where opened packets go.
pub trait PacketSink {
    /// Takes the packets of a run, all or none.
    ///
    /// # Errors
    /// If it does not take them: `InvalidInput` if it may take them one by one; [`tun::is_gone`] tells
    /// whether it ever will again.
    fn write(&self, run: &Run<'_>) -> io::Result<()>;
}

impl PacketSink for TunQueue {
    fn write(&self, run: &Run<'_>) -> io::Result<()> {
        self.write_run(run)
    }
}

/// One datagram as it arrived, in memory that may be changed.
#[derive(Debug)]
pub struct Arrival<'a> {
    /// The UDP payload.
    pub bytes: &'a mut [u8],
    /// Where it came from, and which address of ours it was sent to.
    pub from: Endpoint,
    /// The outer header's TOS or traffic class: DSCP and ECN.
    pub tos: u8,
    /// How it came.
    pub path: Path,
    /// The worker at which it came; not the one that opens it if that is at home elsewhere.
    pub worker: WorkerId,
}

/// The inbound half of a worker.
pub struct Inbound {
    id: WorkerId,
    shared: Arc<Shared>,
    aead: &'static dyn BatchAead,
    /// Rings to the other workers, for packets that are at home there.
    to: Outbox,
    line: Line<Opening>,
    /// Whether the TUN device takes runs of UDP, as far as is known: Linux does from 6.2 on.
    uso: bool,
}

/// A keypair that packets of this batch belong to, and what they did.
struct Group {
    index: ReceiverIndex,
    /// Held until the batch is done: whoever freezes the keypair then knows that what was accepted has
    /// been delivered.
    keypair: Receiving,
    peer: Arc<HotPeer>,
    /// Bytes of accepted messages.
    accepted_bytes: u64,
    /// Whether one of them carried a packet.
    data: bool,
    /// Where the last of them came from, and at which worker.
    last: Option<(Endpoint, WorkerId)>,
}

impl Group {
    /// Takes note of a message that is authentic and no replay.
    #[inline]
    fn accept(&mut self, datagram: &Arrival<'_>) {
        self.accepted_bytes += datagram.bytes.len() as u64;
        self.last = Some((datagram.from, datagram.worker));
        self.data |= !inner(datagram).is_empty();
    }
}

/// What an opened message carries; empty for a keepalive.
fn inner<'a>(datagram: &'a Arrival<'_>) -> &'a [u8] {
    &datagram.bytes[TRANSPORT_HEADER_LEN..datagram.bytes.len() - TAG_LEN]
}

/// As [`inner`], to be changed.
fn inner_mut<'a>(datagram: &'a mut Arrival<'_>) -> &'a mut [u8] {
    let end = datagram.bytes.len() - TAG_LEN;
    &mut datagram.bytes[TRANSPORT_HEADER_LEN..end]
}

/// A packet that may be opened.
struct Candidate {
    arrival: usize,
    group: usize,
    counter: Counter,
}

/// What triage says of an arrival.
enum Triage {
    Open { group: usize, counter: Counter },
    Handshake,
    ElsewhereAtHome(WorkerId),
}

impl Inbound {
    /// The inbound half of worker `id`, with its rings to the others.
    pub fn new(
        id: WorkerId,
        shared: Arc<Shared>,
        aead: &'static dyn BatchAead,
        mut to: Outbox,
    ) -> Self {
        to.make_buffers(shared.parcel_len);
        let line = Line::alone(Arc::clone(&shared.crew));
        Self { id, shared, aead, to, line, uso: true }
    }

    /// With helpers that open batches while this thread is saturated.
    #[must_use]
    pub fn with_helpers(mut self, helpers: Vec<ToHelper<Opening>>) -> Self {
        self.line = opening::line(&self.shared, self.aead, helpers);
        self
    }

    /// Takes note of the turn that begins.
    pub fn begin_turn(&mut self, turn: Turn) {
        self.line.begin_turn(turn);
    }

    /// Whether datagrams may be taken in: else those that wait to be opened have to be released first.
    pub fn has_room(&self) -> bool {
        self.line.has_room()
    }

    /// Whether a batch that was given to a helper is to be back in a moment.
    pub fn awaits(&self, now: Now) -> bool {
        self.line.is_awaited(now)
    }

    /// Whether a helper has given something back.
    pub fn is_answered(&self) -> bool {
        self.line.is_answered()
    }

    /// What is in flight. What is only opened has not been accepted.
    pub fn in_flight(&self) -> InFlight {
        InFlight { unsent_since: None, ..self.line.in_flight() }
    }

    /// Whether nothing waits to be released.
    pub fn is_empty(&self) -> bool {
        self.line.is_empty()
    }

    /// Takes in what helpers have opened, in the order in which it came. To be called in every turn.
    pub fn release(&mut self, tun: &impl PacketSink, now: Now) {
        while let Some(head) = self.line.next(now) {
            match head {
                Head::Done(mut bundle) => {
                    self.accept_opened(&mut bundle, tun, now);
                    self.line.recycle(bundle);
                }
                Head::Lost(count) => self.counters().drop(DropReason::HelperStuck, count as u64),
            }
        }
    }

    /// Takes a batch of at most [`BATCH_LEN`] datagrams; what is good in them goes to `tun`, now or when it is
    /// released. Gives how many cost something: the others were dropped at sight.
    pub fn process(
        &mut self,
        arrivals: &mut [Arrival<'_>],
        tun: &impl PacketSink,
        now: Now,
    ) -> usize {
        if !self.shared.is_up() {
            self.counters().drop(DropReason::InterfaceDown, arrivals.len() as u64);
            return 0;
        }
        // Older than any keypair of this batch: an id in it cannot mean a peer that came later.
        let routing = self.shared.routing.load_full();
        let mut groups: ArrayVec<Group, BATCH_LEN> = ArrayVec::new();
        let mut candidates: ArrayVec<Candidate, BATCH_LEN> = ArrayVec::new();
        let (mut wake, mut dropped) = (0_u64, 0);
        let is_quiesced = self.shared.is_quiesced(now);
        for (arrival, datagram) in arrivals.iter().enumerate() {
            let triage = self.triage(datagram, &mut groups, is_quiesced, now);
            let outcome = triage.and_then(|triage| match triage {
                Triage::Open { group, counter } => {
                    candidates.push(Candidate { arrival, group, counter });
                    Ok(())
                }
                Triage::Handshake => self.hand_off_handshake(datagram),
                Triage::ElsewhereAtHome(home) => {
                    wake |= 1 << (home.0 % 64);
                    self.send_home(datagram, home, now)
                }
            });
            if let Err(reason) = outcome {
                self.counters().drop(reason, 1);
                dropped += 1;
            }
        }
        self.wake(wake);
        if self.line.wants(candidates.len(), now) {
            self.submit(arrivals, &candidates, &groups, now);
            // What is at the front may be done by now.
            drop(groups);
            self.release(tun, now);
        } else {
            let opened = self.open(arrivals, &candidates, &groups);
            self.accept(arrivals, (&candidates, &opened), &mut groups, &routing, tun, now);
        }
        arrivals.len() - dropped
    }

    /// Copies the candidates into bundles, for whoever opens them.
    fn submit(
        &mut self,
        arrivals: &[Arrival<'_>],
        candidates: &[Candidate],
        groups: &[Group],
        now: Now,
    ) {
        let mut bundle: Option<Box<Opening>> = None;
        for candidate in candidates {
            let (datagram, group) = (&arrivals[candidate.arrival], &groups[candidate.group]);
            let full = |bundle: &mut Box<Opening>| !bundle.has_room(datagram.bytes.len());
            if let Some(full) = bundle.take_if(full) {
                self.submit_bundle(full, now);
            }
            if bundle.is_none() {
                bundle = self.line.take();
            }
            match &mut bundle {
                Some(bundle) => {
                    bundle.push(datagram, (group.index, &group.keypair), candidate.counter);
                }
                None => self.counters().drop(DropReason::QueueFull, 1),
            }
        }
        if let Some(bundle) = bundle {
            self.submit_bundle(bundle, now);
        }
    }

    fn submit_bundle(&mut self, bundle: Box<Opening>, now: Now) {
        if self.line.submit(bundle, now) {
            self.counters().fanned_out(1);
        }
    }

    /// Takes in a batch that was opened elsewhere, or earlier, as if it had come now.
    fn accept_opened(&mut self, bundle: &mut Opening, tun: &impl PacketSink, now: Now) {
        let ended = if bundle.is_done() { None } else { Some(DropReason::KeyExpired) };
        if let Some(reason) = self.shared.pause(now).or(ended) {
            self.counters().drop(reason, bundle.len() as u64);
            return;
        }
        // Older than any keypair of this batch: an id in it cannot mean a peer that came later.
        let routing = self.shared.routing.load_full();
        let mut groups: ArrayVec<Group, BATCH_LEN> = ArrayVec::new();
        let places: ArrayVec<Result<usize, DropReason>, BATCH_LEN> = bundle
            .keypairs()
            .map(|(index, known)| self.open_known_group(index, known, &mut groups, now))
            .collect();
        let mut arrivals: ArrayVec<Arrival<'_>, BATCH_LEN> = ArrayVec::new();
        let mut candidates: ArrayVec<Candidate, BATCH_LEN> = ArrayVec::new();
        let mut opened: ArrayVec<bool, BATCH_LEN> = ArrayVec::new();
        for (Opened { group, counter, is_open }, datagram) in bundle.arrivals() {
            match places[group] {
                Ok(group) => {
                    candidates.push(Candidate { arrival: arrivals.len(), group, counter });
                    opened.push(is_open);
                    arrivals.push(datagram);
                }
                Err(reason) => self.counters().drop(reason, 1),
            }
        }
        self.accept(&mut arrivals, (&candidates, &opened), &mut groups, &routing, tun, now);
    }

    /// Opens a group for the keypair that opened packets, if it still may.
    fn open_known_group(
        &self,
        index: ReceiverIndex,
        known: &Weak<Keypair>,
        groups: &mut ArrayVec<Group, BATCH_LEN>,
        now: Now,
    ) -> Result<usize, DropReason> {
        // A keypair stays where it is at home.
        let group = self.open_group(index, groups, now)?.map_err(|_| DropReason::UnknownIndex)?;
        // And an index means no other for a long time.
        if Arc::as_ptr(groups[group].keypair.keypair()) != known.as_ptr() {
            groups.pop();
            return Err(DropReason::UnknownIndex);
        }
        Ok(group)
    }

    /// Takes in what was opened: replay window, endpoint and timers, source check, and on to `tun`.
    fn accept(
        &mut self,
        arrivals: &mut [Arrival<'_>],
        (candidates, opened): (&[Candidate], &[bool]),
        groups: &mut [Group],
        routing: &RoutingTable,
        tun: &impl PacketSink,
        now: Now,
    ) {
        let counters = self.counters();
        let mut admitted: ArrayVec<(usize, usize), BATCH_LEN> = ArrayVec::new();
        for (candidate, &opened) in candidates.iter().zip(opened) {
            let (group, datagram) =
                (&mut groups[candidate.group], &mut arrivals[candidate.arrival]);
            if !opened {
                counters.drop(DropReason::BadTag, 1);
                continue;
            }
            if !group.keypair.accept(candidate.counter) {
                counters.drop(DropReason::Replay, 1);
                continue;
            }
            group.accept(datagram);
            counters.received(datagram.path, 1);
            let tos = datagram.tos;
            let packet = inner_mut(datagram);
            if packet.is_empty() {
                continue;
            }
            ecn::decapsulate(packet, tos);
            match self.admit(packet, group, routing, now) {
                Ok(len) => admitted.push((candidate.arrival, len)),
                Err(reason) => counters.drop(reason, 1),
            }
        }
        // Before any packet leaves for the TUN device: its answer needs the endpoint and the keypair
        // that it has proved, and another worker may be asked for them at once.
        for group in &*groups {
            self.settle(group, now);
        }
        let packets: Batch<'_> =
            admitted.into_iter().map(|(at, len)| &inner(&arrivals[at])[..len]).collect();
        self.deliver(&packets, tun);
    }

    fn counters(&self) -> &crate::counters::Counters {
        &self.shared.workers[usize::from(self.id.0)].counters
    }

    #[inline]
    fn triage(
        &self,
        datagram: &Arrival<'_>,
        groups: &mut ArrayVec<Group, BATCH_LEN>,
        is_quiesced: bool,
        now: Now,
    ) -> Result<Triage, DropReason> {
        let message = classify(datagram.bytes)?;
        if is_quiesced {
            return Err(DropReason::Quiesced);
        }
        let index = match message {
            Message::Transport(index) => index,
            Message::Initiation | Message::Response(_) | Message::CookieReply(_) => {
                return Ok(Triage::Handshake);
            }
        };
        // Runs of packets share their keypair: the last group is the likely one.
        let known = groups.iter().rposition(|group| group.index == index);
        let group = match known {
            Some(group) => group,
            None => match self.open_group(index, groups, now)? {
                Ok(group) => group,
                Err(home) => return Ok(Triage::ElsewhereAtHome(home)),
            },
        };
        let counter = transport_counter(datagram.bytes).ok_or(DropReason::BadLength)?;
        if counter.0 >= REJECT_AFTER_MESSAGES {
            return Err(DropReason::KeyExpired);
        }
        // It says so again once the tag has proved right: others of this batch may have the same.
        if !groups[group].keypair.would_accept(counter) {
            return Err(DropReason::Replay);
        }
        Ok(Triage::Open { group, counter })
    }

    /// Opens a group for the keypair with this index, or tells the other worker at which it is at home.
    fn open_group(
        &self,
        index: ReceiverIndex,
        groups: &mut ArrayVec<Group, BATCH_LEN>,
        now: Now,
    ) -> Result<Result<usize, WorkerId>, DropReason> {
        let keypair = self.shared.keypair(index).ok_or(DropReason::UnknownIndex)?;
        let home = self.shared.worker_of(keypair.home());
        if home != self.id {
            return Ok(Err(home));
        }
        if !keypair.can_open(now) || !self.shared.may_use(&keypair) {
            return Err(DropReason::KeyExpired);
        }
        let peer = keypair.peer().ok_or(DropReason::UnknownIndex)?;
        // Control retires what has been replaced a little later; it is dead at once.
        if !peer.keypairs.load().contains(&keypair) {
            return Err(DropReason::UnknownIndex);
        }
        let keypair = keypair.receive().ok_or(DropReason::HandedOver)?;
        groups.push(Group { index, keypair, peer, accepted_bytes: 0, data: false, last: None });
        Ok(Ok(groups.len() - 1))
    }

    fn hand_off_handshake(&self, datagram: &Arrival<'_>) -> Result<(), DropReason> {
        let device = self.shared.device;
        let work = HandshakeDatagram::new(device, datagram.bytes, datagram.from, self.id)
            .ok_or(DropReason::BadLength)?;
        if self.shared.hand_off(Work::Datagram(work)) { Ok(()) } else { Err(DropReason::QueueFull) }
    }

    fn send_home(
        &mut self,
        datagram: &Arrival<'_>,
        home: WorkerId,
        now: Now,
    ) -> Result<(), DropReason> {
        if !self.shared.moves(home, now) {
            return Err(DropReason::HomeStuck);
        }
        let mut buffer = self.to.take(home)?;
        if !buffer.fill(datagram.bytes) {
            self.to.keep(buffer);
            return Err(DropReason::TooLarge);
        }
        let Arrival { from, tos, path, .. } = *datagram;
        let len = datagram.bytes.len();
        self.to.send(home, Parcel { buffer, len, from, tos, path, origin: self.id });
        self.counters().handed_on(1);
        Ok(())
    }

    fn wake(&self, workers: u64) {
        for worker in (0..self.shared.workers.len()).map(|number| WorkerId(number as u16)) {
            if workers & (1 << (worker.0 % 64)) != 0 && worker != self.id {
                self.shared.crew.wake(worker).signal();
            }
        }
    }

    /// Opens the candidates in place; says of each whether its tag is right.
    fn open(
        &self,
        arrivals: &mut [Arrival<'_>],
        candidates: &[Candidate],
        groups: &[Group],
    ) -> ArrayVec<bool, BATCH_LEN> {
        let mut jobs: ArrayVec<Job<'_>, BATCH_LEN> = ArrayVec::new();
        let mut rest = candidates.iter().peekable();
        for (i, datagram) in arrivals.iter_mut().enumerate() {
            if let Some(candidate) = rest.next_if(|candidate| candidate.arrival == i) {
                jobs.push(Job {
                    key: groups[candidate.group].keypair.open_key(),
                    counter: candidate.counter.0,
                    buffer: &mut datagram.bytes[TRANSPORT_HEADER_LEN..],
                    ok: false,
                });
            }
        }
        if !jobs.is_empty() {
            self.aead.open(&mut jobs);
        }
        jobs.iter().map(|job| job.ok).collect()
    }

    /// Looks whether the sender of an opened packet may send it, and lowers the segment size that it offers
    /// if it is a SYN. Gives the packet's length without padding.
    #[inline]
    fn admit(
        &self,
        packet: &mut [u8],
        group: &Group,
        routing: &RoutingTable,
        now: Now,
    ) -> Result<usize, DropReason> {
        let inner = inner_packet(packet)?;
        if routing.lookup(inner.src) != Some(group.peer.id) {
            group.peer.note_refused(inner.src, now);
            return Err(DropReason::SourceNotAllowed);
        }
        let packet = &mut packet[..inner.len];
        let device_mtu = self.shared.mtu.load(Ordering::Relaxed);
        let mtu = group.peer.inner_mtu.mtu(inner.src.is_ipv6(), device_mtu);
        if self.shared.mss_clamp.load(Ordering::Relaxed) {
            mss::clamp(packet, mtu, TcpChecksum::Full);
        }
        Ok(inner.len)
    }

    /// Hands packets to `tun`, those of a flow as one. A run that it refuses is tried packet by packet.
    fn deliver(&mut self, packets: &Batch<'_>, tun: &impl PacketSink) {
        for run in Plan::of(packets, self.uso).runs() {
            match tun.write(&run) {
                Err(error) if run.len() > 1 && error.kind() == io::ErrorKind::InvalidInput => {
                    if run.kind() == Some(SegmentKind::Udp) && self.uso {
                        tracing::debug!("the TUN device takes no runs of UDP");
                        self.uso = false;
                    }
                    for single in run.singles() {
                        self.note_written(tun.write(&single), 1);
                    }
                }
                result => self.note_written(result, run.len()),
            }
        }
    }

    /// Counts the packets of a write that failed.
    fn note_written(&self, result: io::Result<()>, packet_count: usize) {
        let Err(error) = result else { return };
        if tun::is_gone(&error) {
            self.shared.report_tun_gone();
        }
        self.counters().drop(DropReason::TunWrite, packet_count as u64);
    }

    /// Carries what a batch proved over to the peer.
    fn settle(&self, group: &Group, now: Now) {
        let Some((endpoint, worker)) = group.last else { return };
        let peer = &group.peer;
        peer.last_worker.store(worker.0, Ordering::Relaxed);
        peer.transfer.received(group.accepted_bytes);
        peer.activity.authenticated_received(now);
        if group.data {
            peer.activity.data_received(now);
        }
        if peer.confirm(group.keypair.keypair()) {
            self.shared.follow_home(peer);
            // Staged packets can go, at whichever worker they are.
            self.shared.wake_all();
            // If the queue is full, control notices it when it asks next.
            self.shared.hand_off(Work::Confirmed(peer.id));
        }
        if peer.endpoint.load().as_deref() != Some(&endpoint) {
            tracing::debug!(peer = %peer.label(), endpoint = %endpoint.remote, "endpoint moved");
            peer.endpoint.store(Some(Arc::new(endpoint)));
            peer.forget_way();
            self.shared.want_inner_mtu(peer);
        }
        if group.keypair.wants_rekey_on_receive(now) {
            self.shared.want_handshake(peer);
        }
    }
}
