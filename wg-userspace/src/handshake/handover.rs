//! Hands a device's sessions over to another process of this host; [`session::handover`] says how, and
//! why it is safe.
//!
//! [`session::handover`]: crate::session::handover

use std::sync::Arc;

use wg_common::id::WorkerId;
use wg_common::time::Now;
use zeroize::Zeroizing;

use super::{Cell, Handshakes, Outside};
use crate::session::handover::{DeviceExport, ImportError};

/// What came of importing a device.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ImportedAll {
    /// Keypairs in use now.
    pub taken: usize,
    /// Keypairs that are dead; their peers make new ones.
    pub refused: usize,
    /// Peers that are none of ours any more.
    pub unknown_peers: usize,
}

impl<O: Outside> Handshakes<O> {
    /// Ends sealing and receiving with all keypairs, for good, and gives out what a successor needs to go
    /// on with them. `None` without a private key: there are no sessions then.
    ///
    /// `index_key` is what receiver indexes are made with.
    ///
    /// `quiet` is called when all keypairs are frozen. It returns when every worker has passed a turn: when
    /// [`Crew::all_turned_since`] the moment it was called, asked again and again after
    /// [`Shared::wake_all`]. What was sealed before has left then, and all that was accepted is
    /// delivered. It may give up on a worker that is stuck: keypairs with which that one receives just
    /// then are left out, and what it sealed and has not sent comes too late to be accepted. The
    /// keypairs stay frozen in any case.
    ///
    /// The caller has looked at the clocks just before, by [`Shared::now_of`]: what a break of time has
    /// ended is left out, and the successor cannot see one that was before it began.
    ///
    /// From now on no session does anything here, until [`import_all`](Self::import_all) or
    /// [`resume_all`](Self::resume_all).
    ///
    /// [`Shared::now_of`]: crate::datapath::Shared::now_of
    /// [`Crew::all_turned_since`]: crate::datapath::Crew::all_turned_since
    /// [`Shared::wake_all`]: crate::datapath::Shared::wake_all
    pub fn export_all(
        &self,
        index_key: &[u8],
        quiet: impl FnOnce(),
        now: Now,
    ) -> Option<DeviceExport> {
        // The sessions' keypairs are this identity's: a session that is frozen takes no other.
        let public_key = *self.identity()?.public_key();
        let cells = self.all_cells();
        for cell in &cells {
            cell.session().freeze(&mut self.indexes_of(cell, now));
        }
        quiet();
        // Every worker has looked at the clocks by now: if this is a clone, another one has these too.
        let not_before = self.shared.keys_not_before();
        let mut unsettled = 0;
        let mut peers = Vec::with_capacity(cells.len());
        for cell in &cells {
            let mut session = cell.session();
            unsettled += session.unsettled_count();
            let Some(mut export) = session.export(self.outside.wall(), now) else { continue };
            export.leave_out_older(not_before);
            if !export.is_empty() {
                peers.push(export);
            }
        }
        if unsettled > 0 {
            tracing::warn!(keypairs = unsettled, "left out of the hand-over: a worker is stuck");
        }
        let index_key = Zeroizing::new(index_key.to_vec());
        Some(DeviceExport { public_key, index_key, exported: now, peers })
    }

    /// Goes on with the sessions of a predecessor, or takes back what was exported here and reached nobody.
    /// Sessions that were frozen and are not in the export go on without keypairs.
    ///
    /// Comes after the private key and the peers: what is not theirs is wiped. Receiver indexes must be
    /// made with the key that is in the export.
    ///
    /// # Errors
    /// [`ImportError`], if the export is not for this device. What was in it is gone then too.
    pub fn import_all(&self, export: DeviceExport, now: Now) -> Result<ImportedAll, ImportError> {
        let identity = self.identity().ok_or(ImportError::OtherIdentity(export.public_key))?;
        export.check(identity.public_key(), now)?;
        let mut all = ImportedAll::default();
        for peer in export.peers {
            let Some(cell) = self.cell_by_key(peer.public_key()) else {
                all.unknown_peers += 1;
                continue;
            };
            let home = self.shared.home_for(cell.hot.id, self.home_hint(&cell), now);
            let mut session = cell.session();
            let imported = session.import(peer, home, &mut self.indexes_of(&cell, now), now);
            all.taken += imported.taken;
            all.refused += imported.refused;
            self.execute(&cell, &imported.actions, WorkerId(0), now);
            self.awaken(&cell, &session, now);
        }
        self.resume_all(now);
        Ok(all)
    }

    /// The hand-over has failed, and nobody will import what was exported: sessions that are still frozen
    /// begin anew.
    pub fn resume_all(&self, now: Now) {
        for cell in self.all_cells() {
            let mut session = cell.session();
            if session.is_handed_over() {
                session.resume(&mut self.indexes_of(&cell, now));
                self.awaken(&cell, &session, now);
            }
        }
    }

    /// The worker at which a peer's packets last came, or another one for each peer.
    fn home_hint(&self, cell: &Arc<Cell>) -> WorkerId {
        let last = cell.hot.last_worker.load(std::sync::atomic::Ordering::Relaxed);
        let count = self.shared.workers.len();
        if usize::from(last) < count {
            WorkerId(last)
        } else {
            WorkerId((cell.hot.id.0 as usize % count) as u16)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use ipnet::IpNet;
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use wg_common::endpoint::Endpoint;
    use wg_common::id::{DeviceId, PeerId};
    use wg_common::outcome::DropReason;
    use wg_common::protocol::TYPE_INITIATION;
    use wg_common::protocol::TYPE_TRANSPORT;

    use super::*;
    use crate::aead::RingAead;
    use crate::counters::{Path, Totals};
    use crate::datapath::handoff::{HandshakeDatagram, Mesh};
    use crate::datapath::inbound::{Arrival, Inbound, PacketSink};
    use crate::datapath::outbound::{DatagramSink, Outbound, Outgoing, PacketSource, Unsent};
    use crate::datapath::{Shared, SocketGroup, WorkQueue};
    use crate::key::PrivateKey;
    use crate::noise::Timestamp;
    use crate::routing::AllowedIps;
    use crate::segments::{Run, VnetHeader};
    use crate::session::HotPeer;
    use wg_common::index::{IndexLayout, IndexPermutation};

    const START: Now = Now::from_boot_ns(1_000_000_000_000);
    const SECOND: Duration = Duration::from_secs(1);
    const INDEXES: IndexPermutation = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
    static AEAD: RingAead = RingAead;
    static SEEDS: AtomicU64 = AtomicU64::new(1);

    /// What leaves is kept here until it is carried over.
    #[derive(Default)]
    struct Wire(Mutex<Vec<Vec<u8>>>);

    impl Outside for Arc<Wire> {
        type Rng = StdRng;

        fn rng(&self) -> StdRng {
            StdRng::seed_from_u64(SEEDS.fetch_add(1, Ordering::Relaxed))
        }

        fn wall(&self) -> Timestamp {
            // Each later than the one before, by more than the grain of timestamps.
            Timestamp::from_unix(SEEDS.fetch_add(1, Ordering::Relaxed), 0)
        }

        fn send(&self, _: WorkerId, message: &[u8], _: &Endpoint, _: u8) -> bool {
            super::super::lock(&self.0).push(message.to_vec());
            true
        }
    }

    impl DatagramSink for Arc<Wire> {
        fn send(&self, datagrams: &[Outgoing<'_>]) -> Unsent {
            super::super::lock(&self.0)
                .extend(datagrams.iter().map(|datagram| datagram.bytes.to_vec()));
            Unsent::default()
        }
    }

    /// A TUN device whose far end is the test.
    #[derive(Default)]
    struct Tun {
        to_read: RefCell<Vec<Vec<u8>>>,
        written: RefCell<Vec<Vec<u8>>>,
    }

    impl PacketSource for Tun {
        fn read(&self, buffer: &mut [u8]) -> io::Result<Option<(VnetHeader, usize)>> {
            let Some(packet) = self.to_read.borrow_mut().pop() else { return Ok(None) };
            buffer[..packet.len()].copy_from_slice(&packet);
            Ok(Some((VnetHeader::PLAIN, packet.len())))
        }
    }

    impl PacketSink for Tun {
        fn write(&self, run: &Run<'_>) -> io::Result<()> {
            self.written.borrow_mut().extend(run.packets().map(<[u8]>::to_vec));
            Ok(())
        }
    }

    /// A process with one worker, and one peer that owns all addresses.
    struct Process {
        shared: Arc<Shared>,
        work: Arc<WorkQueue>,
        handshakes: Handshakes<Arc<Wire>>,
        inbound: Inbound,
        outbound: Outbound,
        tun: Tun,
        wire: Arc<Wire>,
    }

    fn key(number: u8) -> PrivateKey {
        PrivateKey::from_bytes([number; 32])
    }

    impl Process {
        /// Number `own`, whose peer is `other`.
        fn new(own: u8, other: u8) -> Self {
            let sockets = SocketGroup { port: 51820, of_worker: Vec::new() };
            let (shared, work) =
                Shared::new(DeviceId(0), 1, Vec::new(), sockets, None, INDEXES).unwrap();
            let wire = Arc::new(Wire::default());
            let handshakes = Handshakes::new(Arc::clone(&shared), Arc::clone(&wire), &AEAD, None);
            let hot = HotPeer::new(PeerId(1), DeviceId(0), key(other).public_key());
            hot.endpoint.store(Some(Arc::new(from())));
            handshakes.set_private_key(Some(key(own)), START);
            handshakes.add_peer(Arc::new(hot));
            let mut allowed_ips = AllowedIps::default();
            allowed_ips.insert("0.0.0.0/0".parse::<IpNet>().unwrap(), PeerId(1));
            shared.routing.store(allowed_ips.snapshot());
            shared.beat(WorkerId(0), START);
            let to = Mesh::between(1, 1).remove(0).unwrap().to;
            let inbound = Inbound::new(WorkerId(0), Arc::clone(&shared), &AEAD, to);
            let outbound = Outbound::new(WorkerId(0), Arc::clone(&shared), &AEAD);
            Self { shared, work, handshakes, inbound, outbound, tun: Tun::default(), wire }
        }

        /// Sends a packet to the peer, if there is a keypair; what leaves with it.
        fn send(&mut self, id: u8, now: Now) -> Vec<Vec<u8>> {
            self.tun.to_read.borrow_mut().push(packet(id));
            self.outbound.process(&self.tun, &self.wire, now).unwrap();
            self.run(now)
        }

        /// Does what workers have left for the pool, and flushes; what leaves then.
        fn run(&mut self, now: Now) -> Vec<Vec<u8>> {
            while self.handshakes.turn(&self.work, now) {}
            while self.outbound.flush_staged(&self.wire, now) {}
            std::mem::take(&mut *super::super::lock(&self.wire.0))
        }

        /// Takes datagrams; what leaves in answer.
        fn receive(&mut self, datagrams: &[Vec<u8>], now: Now) -> Vec<Vec<u8>> {
            for datagram in datagrams {
                let (mut bytes, worker) = (datagram.clone(), WorkerId(0));
                let (bytes, from, path) = (&mut bytes[..], from(), Path::Socket);
                let mut arrivals = [Arrival { bytes, from, tos: 0, path, worker }];
                self.inbound.process(&mut arrivals, &self.tun, now);
            }
            self.run(now)
        }

        /// The packets that came out of the tunnel, by their ids.
        fn delivered(&self) -> Vec<u8> {
            self.tun.written.take().iter().map(|packet| packet[20]).collect()
        }

        fn dropped(&self, reason: DropReason) -> u64 {
            Totals::sum([&self.shared.workers[0].counters]).dropped(reason)
        }
    }

    fn from() -> Endpoint {
        Endpoint::configured("192.0.2.1:1000".parse().unwrap())
    }

    /// An IPv4 packet that is told from others by `id`.
    fn packet(id: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 21, 0, 0, 0, 0, 64, 17, 0, 0];
        packet.extend_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2, id]);
        packet
    }

    fn counter(message: &[u8]) -> u64 {
        assert_eq!(message[0], TYPE_TRANSPORT);
        u64::from_le_bytes(*message[8..].first_chunk().unwrap())
    }

    /// A gateway and a peer that have shaken hands; all is carried until both are silent.
    fn connected() -> (Process, Process) {
        let (mut gateway, mut peer) = (Process::new(1, 2), Process::new(2, 1));
        let mut messages = peer.send(1, START);
        while !messages.is_empty() {
            let answers = gateway.receive(&messages, START);
            messages = peer.receive(&answers, START);
        }
        assert_eq!(gateway.delivered(), [1]);
        (gateway, peer)
    }

    /// Exports as the caller should: the worker passes a turn when nothing is sealed any more.
    fn export(gateway: &Process, now: Now) -> Zeroizing<Vec<u8>> {
        let shared = &gateway.shared;
        let quiet = || {
            shared.beat(WorkerId(0), now + Duration::from_nanos(1));
            assert!(shared.crew.all_turned_since(now));
        };
        gateway.handshakes.export_all(b"key", quiet, now).unwrap().into_bytes()
    }

    fn import(gateway: &Process, memory: &mut [u8], now: Now) -> ImportedAll {
        let export = DeviceExport::take_from(memory).unwrap();
        assert_eq!(export.index_key.as_slice(), b"key");
        gateway.handshakes.import_all(export, now).unwrap()
    }

    #[test]
    fn a_handshake_in_flight_is_repeated_by_the_successor() {
        let (mut gateway, mut peer) = connected();
        let asks = |process: &mut Process, now: Now| {
            process.handshakes.tick(now);
            let sent = process.run(now).into_iter();
            sent.filter(|message| message[0] == TYPE_INITIATION).collect::<Vec<_>>()
        };
        // What is sealed is not answered.
        gateway.send(2, START);
        let begun = START + SECOND * 16;
        assert_eq!(asks(&mut gateway, begun).len(), 1, "and is lost");
        let now = begun + SECOND;
        let mut memory = export(&gateway, now);
        let mut successor = Process::new(1, 2);
        import(&successor, &mut memory, now);
        successor.send(3, now);
        assert!(asks(&mut successor, now + SECOND * 3).is_empty(), "Rekey-Timeout has not passed");
        let again = asks(&mut successor, now + SECOND * 5);
        assert_eq!(again.len(), 1);
        // Where the peer is heard, there is no need.
        let heard = peer.send(4, now + SECOND * 5);
        let mut memory = export(&successor, now + SECOND * 5);
        let mut last = Process::new(1, 2);
        import(&last, &mut memory, now + SECOND * 5);
        last.receive(&heard, now + SECOND * 5);
        assert!(asks(&mut last, now + SECOND * 15).is_empty());
    }

    #[test]
    fn a_peer_does_not_notice_a_hand_over() {
        let (mut gateway, mut peer) = connected();
        let old = peer.send(2, START);
        gateway.receive(&old, START);
        let late = peer.send(3, START);
        let mut memory = export(&gateway, START);
        // Nothing goes through the exporter any more.
        assert!(gateway.receive(&late, START).is_empty() && gateway.send(9, START).is_empty());
        assert_eq!(gateway.delivered(), [2]);
        assert_eq!(gateway.dropped(DropReason::HandedOver), 1);

        let mut successor = Process::new(1, 2);
        let taken = ImportedAll { taken: 1, ..ImportedAll::default() };
        assert_eq!(import(&successor, &mut memory, START + SECOND), taken);
        assert!(successor.receive(&[old, late].concat(), START + SECOND).is_empty());
        assert_eq!(successor.delivered(), [3], "what the exporter delivered is a replay here");
        assert_eq!(successor.dropped(DropReason::Replay), 1);
        let answer = successor.send(4, START + SECOND);
        assert_eq!(counter(&answer[0]) >> 40, 1, "in the successor's own counters");
        assert!(peer.receive(&answer, START + SECOND).is_empty(), "no handshake");
        assert_eq!(peer.delivered(), [4]);
        let cell = successor.handshakes.cell(PeerId(1)).unwrap();
        assert!(cell.last_handshake().is_some());
    }

    #[test]
    fn keypairs_of_before_a_break_of_time_are_not_handed_over() {
        let (gateway, _) = connected();
        // A worker has noticed that this is a clone; control has not cleared the sessions yet.
        gateway.shared.end_keypairs(START + SECOND);
        let mut memory = export(&gateway, START + SECOND);
        let mut successor = Process::new(1, 2);
        assert_eq!(import(&successor, &mut memory, START + SECOND).taken, 0);
        assert_eq!(successor.send(4, START + SECOND)[0][0], TYPE_INITIATION, "a new handshake");
    }

    #[test]
    fn an_exporter_answers_no_handshake() {
        let (gateway, _) = connected();
        let _memory = export(&gateway, START);
        let mut peer = Process::new(2, 1);
        let initiation = peer.send(5, START + SECOND * 10).remove(0);
        let datagram =
            HandshakeDatagram::new(DeviceId(0), &initiation, from(), WorkerId(0)).unwrap();
        let refused = gateway.handshakes.receive(&datagram, START + SECOND * 10);
        assert_eq!(refused, Err(DropReason::HandedOver));
        gateway.handshakes.tick(START + SECOND * 300);
        assert!(super::super::lock(&gateway.wire.0).is_empty());
    }

    #[test]
    fn what_is_taken_back_goes_on_in_the_next_generation() {
        let (mut gateway, mut peer) = connected();
        let mut memory = export(&gateway, START);
        assert!(gateway.send(2, START).is_empty(), "staged meanwhile");
        assert_eq!(import(&gateway, &mut memory, START).taken, 1);
        let messages = gateway.run(START);
        assert_eq!(messages.iter().map(|m| counter(m)).collect::<Vec<_>>(), [1 << 40]);
        peer.receive(&messages, START);
        assert_eq!(peer.delivered(), [2]);
        gateway.receive(&peer.send(3, START), START);
        assert_eq!(gateway.delivered(), [3]);
    }

    #[test]
    fn after_a_failed_hand_over_handshakes_make_new_keypairs() {
        let (mut gateway, mut peer) = connected();
        drop(export(&gateway, START));
        let now = START + SECOND * 10;
        assert!(gateway.send(2, now).is_empty());
        gateway.handshakes.resume_all(now);
        let mut messages = gateway.send(3, now);
        assert_eq!(messages.len(), 1, "an initiation");
        while !messages.is_empty() {
            let answers = peer.receive(&messages, now);
            messages = gateway.receive(&answers, now);
        }
        assert_eq!(peer.delivered(), [2, 3]);
    }

    #[test]
    fn a_predecessors_index_is_lent_to_nobody_else() {
        let (gateway, _) = connected();
        let mut memory = export(&gateway, START);
        let successor = Process::new(1, 2);
        import(&successor, &mut memory, START);
        let cell = successor.handshakes.cell(PeerId(1)).unwrap();
        let keypairs = cell.hot.keypairs.load();
        let adopted = keypairs.current.as_ref().unwrap().local_index();
        let mut table = super::super::lock(&successor.handshakes.indexes);
        assert!(Arc::ptr_eq(table.owner(adopted).unwrap(), &cell));
        for _ in 0..100 {
            let index = table.allocate(&cell, START).unwrap();
            assert_ne!(INDEXES.slot_of(index), INDEXES.slot_of(adopted));
        }
    }

    #[test]
    fn an_export_of_another_identity_is_refused() {
        let (gateway, _) = connected();
        let mut memory = export(&gateway, START);
        let stranger = Process::new(3, 2);
        let export = DeviceExport::take_from(&mut memory).unwrap();
        let own = key(1).public_key();
        assert_eq!(
            stranger.handshakes.import_all(export, START),
            Err(ImportError::OtherIdentity(own))
        );
    }

    #[test]
    fn peers_that_are_gone_are_not_imported() {
        let (gateway, _) = connected();
        let mut memory = export(&gateway, START);
        let successor = Process::new(1, 5);
        let unknown = ImportedAll { unknown_peers: 1, ..ImportedAll::default() };
        assert_eq!(import(&successor, &mut memory, START), unknown);
    }
}
