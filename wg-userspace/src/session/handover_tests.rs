//! Sessions handed from process to process, in every order, with crashes: against a peer that replays
//! everything it has ever sent, and a book of all that was sealed and delivered.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use wg_common::endpoint::{Endpoint, LocalSource};
use wg_common::id::{Counter, DeviceId, PeerId, ReceiverIndex, ShardId};
use wg_common::protocol::{REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME, REPLAY_WINDOW_LEN};
use wg_common::time::Now;
use zeroize::Zeroizing;

use super::handover::{DeviceExport, ImportError, with_digest};
use super::{
    Action, Generation, HotPeer, Indexes, Keypair, Keypairs, Receiving, ReplayWindow, Session,
};
use crate::key::PublicKey;
use crate::noise::{Established, RemoteStatic, Role, Timestamp, TransportKeys};

const START: Now = Now::from_boot_ns(1_000_000_000_000);
/// What the wall clock says.
const WALL: Timestamp = Timestamp::from_bytes([0x40; 12]);
const SECOND: Duration = Duration::from_secs(1);
const IDENTITY: PublicKey = PublicKey::from_bytes([7; 32]);
const PEER: PublicKey = PublicKey::from_bytes([9; 32]);

/// Published keypairs by local index. Every index can be adopted that is not another keypair's.
#[derive(Default)]
struct Published(HashMap<u32, Arc<Keypair>>);

impl Indexes for Published {
    fn allocate(&mut self) -> Option<ReceiverIndex> {
        None
    }

    fn release(&mut self, _index: ReceiverIndex) {}

    fn adopt(&mut self, index: ReceiverIndex) -> bool {
        self.0.get(&index.value()).is_none_or(|keypair| keypair.is_frozen())
    }

    fn publish(&mut self, keypair: &Arc<Keypair>) {
        self.0.insert(keypair.local_index().value(), Arc::clone(keypair));
    }

    fn retire(&mut self, keypair: &Arc<Keypair>) {
        let gone = self.0.remove(&keypair.local_index().value()).expect("it was published");
        assert!(Arc::ptr_eq(&gone, keypair), "what is retired is not its replacement");
    }
}

/// One process of the host, and what its worker is at.
struct Process {
    session: Session,
    indexes: Published,
    /// A batch that is not done yet.
    inside: Option<Receiving>,
}

fn keys(number: u8) -> TransportKeys {
    TransportKeys { send: [number; 32], receive: [!number; 32] }
}

impl Process {
    fn new() -> Self {
        let peer = Arc::new(HotPeer::new(PeerId(1), DeviceId(0), PEER));
        Self {
            session: Session::new(peer, Some(RemoteStatic::unreachable(PEER).into())),
            indexes: Published::default(),
            inside: None,
        }
    }

    /// The keypair with key `number`, as a handshake would make it, in the place that `transition` says.
    fn handshake(
        &mut self,
        number: u8,
        transition: fn(&Keypairs, Arc<Keypair>) -> Keypairs,
        now: Now,
    ) -> Arc<Keypair> {
        let index = ReceiverIndex::from_wire([number, 0, 0, 0]);
        let (keys, role) = (keys(number), Role::Initiator);
        let established = Established { keys, local_index: index, remote_index: index, role };
        let peer = Arc::downgrade(self.session.peer());
        let keypair = Arc::new(Keypair::new(&established, peer, ShardId::new(0), now));
        self.session.course.published.push(Arc::clone(&keypair));
        self.indexes.publish(&keypair);
        self.session.peer().keypairs.update(|keypairs| transition(keypairs, Arc::clone(&keypair)));
        keypair
    }

    fn keypairs(&self) -> Arc<Keypairs> {
        Arc::clone(&self.session.peer().keypairs.load())
    }

    fn current(&self) -> Arc<Keypair> {
        self.keypairs().current.clone().expect("there is one")
    }

    fn freeze(&mut self) {
        self.session.freeze(&mut self.indexes);
    }

    /// The bytes in the transfer memory; `None` if there is nothing to export.
    fn export(&mut self, now: Now) -> Option<Zeroizing<Vec<u8>>> {
        let peer = self.session.export(WALL, now)?;
        Some(device(vec![peer], now).into_bytes())
    }

    /// Imports the peer that is in the transfer memory; says how many keypairs were taken and refused.
    fn import(&mut self, memory: &mut [u8], now: Now) -> (usize, usize) {
        let mut export = DeviceExport::take_from(memory).expect("it is whole");
        assert!(memory.iter().all(|&byte| byte == 0), "wiped before it is used");
        export.check(&IDENTITY, now).expect("it is ours");
        let peer = export.peers.pop().expect("there is one");
        assert!(export.peers.is_empty() && *peer.public_key() == PEER);
        let imported = self.session.import(peer, ShardId::new(5), &mut self.indexes, now);
        (imported.taken, imported.refused)
    }
}

fn device(peers: Vec<super::handover::PeerExport>, now: Now) -> DeviceExport {
    let index_key = Zeroizing::new(b"sixteen byte key".to_vec());
    DeviceExport { public_key: IDENTITY, index_key, exported: now, peers }
}

/// What can happen to the processes. The number says to which.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    /// A worker begins to receive a batch, or ends it.
    Enter(usize),
    Leave(usize),
    Freeze(usize),
    Export(usize),
    /// The hand-over fails, and this process knows; the bytes are lost.
    Fail(usize),
    Import(usize),
    /// The importer has taken the bytes and dies.
    ImportAndCrash(usize),
    /// It dies, and is started again.
    Crash(usize),
    /// The bytes are lost, and nobody knows.
    Lose,
    /// A handshake makes a new keypair.
    Handshake(usize),
}

/// All processes, the transfer memory, the peer, and the book.
struct World {
    processes: Vec<Process>,
    /// Exports under way, oldest first; each has one reader.
    transfers: Vec<Zeroizing<Vec<u8>>>,
    /// For each key that a handshake has made: the peer's next counter, and its window.
    peer: Vec<(u64, ReplayWindow)>,
    /// All that the peer has ever sent: key and counter.
    sent: Vec<(u8, u64)>,
    sealed: HashSet<(u8, u64)>,
    delivered: HashSet<(u8, u64)>,
    /// Counters that the peer leaves out before each message.
    gap: u64,
    imports: usize,
}

impl World {
    fn new(process_count: usize, gap: u64) -> Self {
        let mut world = Self {
            processes: (0..process_count).map(|_| Process::new()).collect(),
            transfers: Vec::new(),
            peer: Vec::new(),
            sent: Vec::new(),
            sealed: HashSet::new(),
            delivered: HashSet::new(),
            gap,
            imports: 0,
        };
        world.take(Step::Handshake(0));
        world
    }

    /// What makes a difference now.
    fn possible(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for (p, process) in self.processes.iter().enumerate() {
            let is_out = process.session.is_handed_over();
            let has_keypairs = !process.session.course.published.is_empty();
            match process.inside {
                None if has_keypairs && !is_out => steps.push(Step::Enter(p)),
                None => {}
                Some(_) => steps.push(Step::Leave(p)),
            }
            if has_keypairs {
                steps.push(Step::Crash(p));
            }
            if is_out {
                steps.extend([Step::Export(p), Step::Fail(p)]);
            } else {
                steps.push(if has_keypairs { Step::Freeze(p) } else { Step::Handshake(p) });
            }
            if !self.transfers.is_empty() {
                steps.extend([Step::Import(p), Step::ImportAndCrash(p)]);
            }
        }
        if !self.transfers.is_empty() {
            steps.push(Step::Lose);
        }
        steps
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Enter(p) => {
                let process = &mut self.processes[p];
                process.inside = process.keypairs().current.clone().and_then(Keypair::receive);
            }
            Step::Leave(p) => self.processes[p].inside = None,
            Step::Freeze(p) => self.processes[p].freeze(),
            Step::Export(p) => self.transfers.extend(self.processes[p].export(START)),
            Step::Fail(p) => {
                // This one has written the oldest transfer, or none that is left.
                let process = &mut self.processes[p];
                process.session.resume(&mut process.indexes);
                assert!(process.keypairs().iter().next().is_none());
            }
            Step::Import(p) => {
                let mut memory = self.transfers.remove(0);
                self.processes[p].import(&mut memory, START);
                self.imports += 1;
                assert_eq!(
                    DeviceExport::take_from(&mut memory).unwrap_err(),
                    ImportError::Magic,
                    "nothing is left to import"
                );
            }
            Step::ImportAndCrash(p) => {
                let mut memory = self.transfers.remove(0);
                self.processes[p].import(&mut memory, START);
                self.processes[p] = Process::new();
            }
            Step::Crash(p) => self.processes[p] = Process::new(),
            Step::Lose => drop(self.transfers.remove(0)),
            Step::Handshake(p) => {
                let number = self.peer.len() as u8;
                self.peer.push((0, ReplayWindow::new()));
                self.processes[p].handshake(number, Keypairs::installed_by_initiator, START);
            }
        }
        self.check();
    }

    /// Every process seals and opens whatever it can.
    fn check(&mut self) {
        for p in 0..self.processes.len() {
            self.seal(p);
        }
        for number in 0..self.peer.len() {
            let next = &mut self.peer[number].0;
            *next += 1 + self.gap;
            // The one before comes late, once everything else has come.
            self.sent.extend([(number as u8, *next), (number as u8, next.saturating_sub(3))]);
        }
        for p in 0..self.processes.len() {
            self.open(p);
        }
    }

    fn seal(&mut self, p: usize) {
        let process = &self.processes[p];
        for keypair in process.indexes.0.values() {
            let number = keypair.seal_key().expose()[0];
            let Some(reserved) = keypair.reserve(2) else { continue };
            assert!(!keypair.is_frozen(), "a frozen keypair seals nothing");
            for counter in reserved.into_counters() {
                assert!(keypair.generation().counters().contains(&counter));
                assert!(self.sealed.insert((number, counter)), "nonce {number}:{counter} twice");
                let taken = self.peer[usize::from(number)].1.accept(Counter(counter));
                assert!(taken, "the peer takes what each holder seals");
            }
        }
    }

    fn open(&mut self, p: usize) {
        let process = &mut self.processes[p];
        for keypair in process.indexes.0.values() {
            let number = keypair.seal_key().expose()[0];
            let is_same = |inside: &&mut Receiving| Arc::ptr_eq(inside.keypair(), keypair);
            let mut new = None;
            let receiving = match process.inside.as_mut().filter(is_same) {
                Some(inside) => inside,
                None => match Arc::clone(keypair).receive() {
                    Some(receiving) => {
                        assert!(!keypair.is_frozen(), "nobody begins after a freeze");
                        new.insert(receiving)
                    }
                    None => continue,
                },
            };
            for &message in self.sent.iter().filter(|message| message.0 == number) {
                if receiving.accept(Counter(message.1)) {
                    assert!(self.delivered.insert(message), "{message:?} delivered twice");
                }
            }
        }
    }
}

/// All sequences of `len` steps from what `steps` leads to. Returns how many there are.
fn explore(steps: &mut Vec<Step>, len: usize, process_count: usize) -> usize {
    let mut world = World::new(process_count, 0);
    steps.iter().for_each(|&step| world.take(step));
    if len == 0 {
        return 1;
    }
    let possible = world.possible();
    drop(world);
    possible
        .into_iter()
        .map(|step| {
            steps.push(step);
            let count = explore(steps, len - 1, process_count);
            steps.pop();
            count
        })
        .sum()
}

#[test]
fn no_short_sequence_uses_a_nonce_or_delivers_a_packet_twice() {
    let count = explore(&mut Vec::new(), 6, 2);
    assert!(count > 10_000, "{count}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn no_sequence_uses_a_nonce_or_delivers_a_packet_twice(
        choices in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
        process_count in 2..=3_usize,
        gap in prop_oneof![Just(0), 0..10_u64, Just(REPLAY_WINDOW_LEN - 1), Just(REPLAY_WINDOW_LEN)],
    ) {
        let mut world = World::new(process_count, gap);
        for choice in choices {
            let possible = world.possible();
            world.take(possible[choice.index(possible.len())]);
        }
    }
}

#[test]
fn a_keypair_goes_through_many_hands() {
    let mut world = World::new(3, 0);
    for round in 0..100 {
        let (from, to) = (round % 3, (round + 1) % 3);
        for step in [Step::Freeze(from), Step::Export(from), Step::Import(to), Step::Crash(from)] {
            world.take(step);
        }
        let keypair = world.processes[to].current();
        assert_eq!(keypair.generation().number() as usize, round + 1);
    }
    assert_eq!(world.imports, 100);
    assert_eq!(world.peer.len(), 1, "no handshake was needed");
    assert_eq!(world.delivered.len(), world.sent.iter().collect::<HashSet<_>>().len());
}

#[test]
fn who_takes_its_own_export_back_is_the_next_generation() {
    let mut process = Process::new();
    let before = process.handshake(1, Keypairs::installed_by_initiator, START);
    assert_eq!(before.reserve(10).unwrap().first, 0);
    process.freeze();
    let mut memory = process.export(START).unwrap();
    assert_eq!(process.import(&mut memory, START), (1, 0));
    let after = process.current();
    assert_eq!(after.generation().number(), 1);
    assert_eq!(after.reserve(1).unwrap().first, 1 << 40);
    assert!(before.reserve(1).is_none() && Arc::clone(&before).receive().is_none());
    assert!(Arc::ptr_eq(&process.indexes.0[&after.local_index().value()], &after));
    assert!(!process.session.is_handed_over());
}

#[test]
fn a_failed_hand_over_revives_nothing() {
    let mut process = Process::new();
    let keypair = process.handshake(1, Keypairs::installed_by_initiator, START);
    process.freeze();
    drop(process.export(START).unwrap());
    process.session.resume(&mut process.indexes);
    assert!(keypair.reserve(1).is_none() && keypair.receive().is_none());
    assert!(process.keypairs().iter().next().is_none() && process.indexes.0.is_empty());
    assert!(!process.session.is_handed_over());
}

#[test]
fn a_keypair_is_exported_once() {
    let mut process = Process::new();
    let keypair = process.handshake(1, Keypairs::installed_by_initiator, START);
    assert!(process.session.export(WALL, START).is_none(), "not before it is frozen");
    process.freeze();
    assert!(keypair.freeze().is_none(), "only the first to freeze may export");
    process.freeze();
    assert_eq!(process.session.export(WALL, START).unwrap().keypair_count(), 1);
    assert!(process.session.export(WALL, START).is_none());
}

#[test]
fn a_keypair_whose_worker_is_stuck_is_left_out() {
    let mut process = Process::new();
    let keypair = process.handshake(1, Keypairs::installed_by_initiator, START);
    process.handshake(2, Keypairs::installed_by_responder, START);
    let mut stuck = Arc::clone(&keypair).receive().unwrap();
    process.freeze();
    assert_eq!(process.session.unsettled_count(), 1);
    assert!(stuck.accept(Counter(0)), "it finishes its batch");
    let export = process.session.export(WALL, START).unwrap();
    assert_eq!(export.keypair_count(), 1, "the other one");
    drop(stuck);
    assert!(keypair.reserve(1).is_none() && keypair.receive().is_none(), "and yet it is dead");
}

#[test]
fn a_worker_that_has_left_lets_its_window_go() {
    let mut process = Process::new();
    let keypair = process.handshake(1, Keypairs::installed_by_initiator, START);
    let mut receiving = keypair.receive().unwrap();
    process.freeze();
    assert!(receiving.accept(Counter(5)));
    drop(receiving);
    assert_eq!(process.session.unsettled_count(), 0);
    let mut memory = process.export(START).unwrap();
    let mut successor = Process::new();
    assert_eq!(successor.import(&mut memory, START), (1, 0));
    let mut receiving = successor.current().receive().unwrap();
    assert!(!receiving.accept(Counter(5)), "accepted by the exporter, after the freeze began");
    assert!(receiving.accept(Counter(4)));
}

#[test]
fn a_successor_has_what_the_exporter_had() {
    let mut process = Process::new();
    process.handshake(1, Keypairs::installed_by_initiator, START);
    process.handshake(2, Keypairs::installed_by_initiator, START + SECOND);
    process.handshake(3, Keypairs::installed_by_responder, START + SECOND * 2);
    let local = Some(LocalSource { addr: "2001:db8::2".parse().unwrap(), ifindex: 3 });
    let endpoint = Endpoint { remote: "[fe80::1%4]:51820".parse().unwrap(), local };
    let (now, peer) = (START + SECOND * 3, Arc::clone(process.session.peer()));
    peer.endpoint.store(Some(Arc::new(endpoint)));
    peer.transfer.received(1000);
    peer.transfer.sent(2000);
    peer.activity.data_received(now);
    process.session.course.greatest_timestamp = Timestamp::from_unix(5, 0);
    process.session.course.last_handshake = Some(Timestamp::from_unix(6, 0));
    process.freeze();
    let mut memory = process.export(now).unwrap();

    let mut successor = Process::new();
    assert_eq!(successor.import(&mut memory, now), (3, 0));
    let keypairs = successor.keypairs();
    let numbers = [&keypairs.current, &keypairs.previous, &keypairs.next]
        .map(|keypair| keypair.as_ref().unwrap().seal_key().expose()[0]);
    assert_eq!(numbers, [2, 1, 3]);
    for (age, keypair) in [2, 3, 1].into_iter().zip(keypairs.iter()) {
        assert_eq!(now.since(keypair.created()), SECOND * age, "age goes on");
        assert_eq!(keypair.home(), ShardId::new(5), "the home is the successor's");
        assert_eq!(keypair.role(), Role::Initiator);
        assert!(Arc::ptr_eq(&successor.indexes.0[&keypair.local_index().value()], keypair));
        assert!(Arc::ptr_eq(&keypair.peer().unwrap(), successor.session.peer()));
    }
    let hot = successor.session.peer();
    assert_eq!(**hot.endpoint.load().as_ref().unwrap(), endpoint);
    assert_eq!((hot.transfer.rx_bytes(), hot.transfer.tx_bytes()), (1000, 2000));
    assert_eq!(hot.activity.owed_since(), Some(now), "a keepalive is owed by the successor");
    assert_eq!(successor.session.course.greatest_timestamp, Timestamp::from_unix(5, 0));
    assert_eq!(successor.session.last_handshake(), Some(Timestamp::from_unix(6, 0)));
    // The first packet confirms what waited for it.
    assert!(hot.confirm(keypairs.next.as_ref().unwrap()));
    assert_eq!(successor.current().seal_key().expose()[0], 3);
    assert!(successor.session.is_awake());
}

#[test]
fn a_confirmation_that_nobody_noticed_is_not_lost() {
    for is_confirmed in [true, false] {
        let mut process = Process::new();
        let keypair = process.handshake(1, Keypairs::installed_by_responder, START);
        process.session.course.awaited = Some(keypair.local_index());
        if is_confirmed {
            assert!(process.session.peer().confirm(&keypair));
        }
        process.freeze();
        let mut memory = process.export(START).unwrap();
        let mut successor = Process::new();
        successor.import(&mut memory, START);
        assert_eq!(successor.session.last_handshake(), is_confirmed.then_some(WALL));
        assert_eq!(successor.session.course.awaited.is_some(), !is_confirmed);
    }
}

#[test]
fn what_waits_for_a_keypair_goes_when_it_is_imported() {
    let mut process = Process::new();
    process.handshake(1, Keypairs::installed_by_initiator, START);
    process.freeze();
    let peer = process.session.export(WALL, START).unwrap();
    let mut successor = Process::new();
    let imported = successor.session.import(peer, ShardId::new(0), &mut successor.indexes, START);
    assert!(matches!(imported.actions[..], [Action::Flush]));
}

#[test]
fn a_session_with_keypairs_of_its_own_keeps_them() {
    let mut process = Process::new();
    process.handshake(1, Keypairs::installed_by_initiator, START);
    process.session.course.greatest_timestamp = Timestamp::from_unix(5, 0);
    process.freeze();
    let mut memory = process.export(START).unwrap();
    let mut successor = Process::new();
    let own = successor.handshake(2, Keypairs::installed_by_initiator, START);
    assert_eq!(successor.import(&mut memory, START), (0, 1));
    assert!(Arc::ptr_eq(&successor.current(), &own));
    assert!(own.reserve(1).is_some());
    assert_eq!(
        successor.session.course.greatest_timestamp,
        Timestamp::from_unix(5, 0),
        "old is old"
    );
}

#[test]
fn the_dead_are_neither_exported_nor_imported() {
    let mut process = Process::new();
    process.handshake(1, Keypairs::installed_by_initiator, START);
    process.handshake(2, Keypairs::installed_by_initiator, START + SECOND);
    process.freeze();
    let mut memory = process.export(START + REJECT_AFTER_TIME).unwrap();
    let mut successor = Process::new();
    let later = START + REJECT_AFTER_TIME + SECOND;
    assert_eq!(successor.import(&mut memory, later), (0, 1), "one was left, and died on its way");
    assert!(successor.indexes.0.is_empty());
}

#[test]
fn an_index_that_is_in_use_is_not_taken_over() {
    let mut process = Process::new();
    process.handshake(1, Keypairs::installed_by_initiator, START);
    process.handshake(2, Keypairs::installed_by_initiator, START);
    process.freeze();
    let mut memory = process.export(START).unwrap();
    let mut successor = Process::new();
    let mut other = Process::new();
    let keypair = other.handshake(2, Keypairs::installed_by_initiator, START);
    successor.indexes.publish(&keypair);
    assert_eq!(successor.import(&mut memory, START), (1, 1));
    assert!(successor.keypairs().current.is_none() && successor.keypairs().previous.is_some());
}

#[test]
fn the_last_generation_is_handed_over_no_more() {
    let mut process = Process::new();
    process.handshake(1, Keypairs::installed_by_initiator, START);
    process.freeze();
    let mut peer = process.session.export(WALL, START).unwrap();
    let keypair = &mut peer.keypairs[0];
    keypair.generation = Generation::new(Generation::COUNT - 1).unwrap();
    keypair.next = keypair.generation.counters().start;
    let mut memory = device(vec![peer], START).into_bytes();
    assert_eq!(Process::new().import(&mut memory, START), (0, 1));
}

#[test]
fn a_session_that_is_handed_over_does_nothing() {
    let mut process = Process::new();
    let keypair = process.handshake(1, Keypairs::installed_by_responder, START);
    process.session.course.awaited = Some(keypair.local_index());
    process.freeze();
    assert!(process.session.poll_timeout().is_none());
    let peer = Arc::clone(process.session.peer());
    assert!(peer.handshake_wanted.load(Ordering::Relaxed), "workers need not ask");
    process.session.clear(&mut process.indexes);
    assert_eq!(process.indexes.0.len(), 1, "its indexes are the successor's");
    process.session.resume(&mut process.indexes);
    assert!(process.indexes.0.is_empty() && !peer.handshake_wanted.load(Ordering::Relaxed));
}

#[test]
fn threads_that_seal_while_a_keypair_freezes_get_nothing_beyond_it() {
    for round in 0..300 {
        let mut process = Process::new();
        let keypair = process.handshake(1, Keypairs::installed_by_initiator, START);
        let frozen = AtomicBool::new(false);
        let mut counters: Vec<u64> = std::thread::scope(|scope| {
            let seal = |step: u64| {
                let (keypair, frozen) = (&keypair, &frozen);
                scope.spawn(move || {
                    let mut counters = Vec::new();
                    loop {
                        let was_frozen = frozen.load(Ordering::SeqCst);
                        match keypair.reserve(step) {
                            Some(_) if was_frozen => panic!("reserved after a freeze"),
                            Some(reserved) => counters.extend(reserved.into_counters()),
                            None => return counters,
                        }
                    }
                })
            };
            let threads = [1, 3].map(seal);
            (0..round * 3).for_each(|_| std::hint::spin_loop());
            keypair.freeze().unwrap();
            frozen.store(true, Ordering::SeqCst);
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        counters.sort_unstable();
        assert!(counters.iter().copied().eq(0..counters.len() as u64), "each once");
    }
}

#[test]
fn a_thread_that_receives_while_a_keypair_freezes_accepts_what_the_window_knows() {
    for round in 0..300 {
        let mut process = Process::new();
        let keypair = process.handshake(1, Keypairs::installed_by_initiator, START);
        let (accepted, mut memory) = std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                let mut accepted = Vec::new();
                for first in (0..200_000).step_by(16) {
                    let Some(mut receiving) = Arc::clone(&keypair).receive() else { break };
                    // Every other one comes, newest first.
                    let batch = (first..first + 16).rev().step_by(2);
                    accepted.extend(batch.filter(|&c| receiving.accept(Counter(c))));
                }
                accepted
            });
            (0..round * 3).for_each(|_| std::hint::spin_loop());
            process.freeze();
            while process.session.unsettled_count() > 0 {
                std::thread::yield_now();
            }
            let memory = process.export(START).unwrap();
            (worker.join().unwrap(), memory)
        });
        let mut successor = Process::new();
        assert_eq!(successor.import(&mut memory, START), (1, 0));
        let mut receiving = successor.current().receive().unwrap();
        let end = accepted.iter().max().map_or(0, |greatest| greatest + 1);
        let known: HashSet<u64> = accepted.into_iter().collect();
        for counter in end.saturating_sub(REPLAY_WINDOW_LEN)..end + 3 {
            let is_new = !known.contains(&counter);
            assert_eq!(receiving.accept(Counter(counter)), is_new, "{counter} in round {round}");
        }
    }
}

/// An export of two peers with all there can be.
fn full_export() -> DeviceExport {
    let mut peers = Vec::new();
    for (peer, remote) in [(1_u8, "192.0.2.1:1000"), (2, "[2001:db8::1]:2000")] {
        let mut process = Process::new();
        for (number, install) in [
            (1, Keypairs::installed_by_initiator as fn(&Keypairs, Arc<Keypair>) -> Keypairs),
            (2, Keypairs::installed_by_initiator),
            (3, Keypairs::installed_by_responder),
        ] {
            let keypair = process.handshake(peer * 16 + number, install, START);
            keypair.reserve(u64::from(number));
            let mut receiving = keypair.receive().unwrap();
            let counters =
                [0, 1, 77, 9000 * u64::from(number - 1), 9000 * u64::from(number - 1) + 2];
            let accepted = counters.iter().filter(|&&counter| receiving.accept(Counter(counter)));
            assert!(accepted.count() >= 3);
        }
        let hot = process.session.peer();
        hot.endpoint.store(Some(Arc::new(Endpoint::configured(remote.parse().unwrap()))));
        hot.activity.data_sent(START);
        process.session.course.greatest_timestamp = Timestamp::from_unix(5, 0);
        process.session.course.last_handshake = Some(Timestamp::from_unix(6, 0));
        process.freeze();
        let mut export = process.session.export(WALL, START).unwrap();
        export.public_key = PublicKey::from_bytes([peer; 32]);
        peers.push(export);
    }
    device(peers, START)
}

const DIGEST_LEN: usize = 32;
/// Where the peers of [`full_export`] begin.
const PEERS_AT: usize = 8 + 4 + 8 + 32 + 1 + 16 + 4;

fn body() -> Zeroizing<Vec<u8>> {
    let mut bytes = full_export().into_bytes();
    let len = bytes.len() - DIGEST_LEN;
    bytes.truncate(len);
    bytes
}

/// What becomes of a body with its digest; the memory must be wiped in any case.
fn take(body: &[u8]) -> Result<DeviceExport, ImportError> {
    let mut memory = with_digest(body);
    let outcome = DeviceExport::take_from(&mut memory);
    assert!(memory.iter().all(|&byte| byte == 0), "wiped, also after an error");
    outcome
}

#[test]
fn an_export_survives_the_transfer_memory() {
    let bytes = full_export().into_bytes();
    let mut memory = bytes.clone();
    let export = DeviceExport::take_from(&mut memory).unwrap();
    assert_eq!(export.index_key.as_slice(), b"sixteen byte key");
    assert_eq!(*export.into_bytes(), *bytes);
}

#[test]
fn an_export_prints_no_key() {
    let mut export = full_export();
    export.peers.truncate(1);
    let text = format!("{export:?}");
    // Sixteen times the byte 17 is the beginning of its first key.
    assert!(!text.contains(&"17, ".repeat(16)) && !text.contains("seal_key"), "{text}");
}

#[test]
fn bytes_that_end_early_are_refused() {
    let (body, whole) = (body(), full_export().into_bytes());
    for len in
        (0..300).chain(body.len() - 300..body.len()).chain((300..body.len() - 300).step_by(97))
    {
        assert!(take(&body[..len]).is_err(), "{len} bytes with their digest");
        let mut memory = whole[..len].to_vec();
        assert!(DeviceExport::take_from(&mut memory).is_err(), "{len} bytes");
        assert!(memory.iter().all(|&byte| byte == 0));
    }
    let longer = [&body[..], &[0; 5]].concat();
    assert_eq!(take(&longer).unwrap_err(), ImportError::Trailing(5));
}

#[test]
fn every_field_is_checked() {
    use ImportError::{Digest, Magic, Truncated, Twice, Value, Version};
    const KEYPAIR_AT: usize = PEERS_AT + 32 + 23 + 21 + 12 + 13 + 16 + 32 + 1;
    const KEYPAIR_LEN: usize = 1 + 1 + 4 + 8 + 4 + 4 + 8 + 8 + 64 + 8 + 1024;
    const PEER_LEN: usize = KEYPAIR_AT - PEERS_AT + 3 * KEYPAIR_LEN;
    let late = (START + SECOND).boot_ns().to_le_bytes();
    let old = 5_u64.to_le_bytes();
    let table: &[(usize, &[u8], ImportError)] = &[
        (0, b"T", Magic),
        (8, &[2], Version(2)),
        (52, &[65], Value("length of an index key")),
        (PEERS_AT - 4, &[3], Truncated("a peer")),
        (PEERS_AT - 4, &[255; 4], Truncated("a peer")),
        (PEERS_AT + PEER_LEN, &[1; 32], Twice("peer")),
        (PEERS_AT + 32, &[5], Value("address")),
        (PEERS_AT + 32, &[0], Value("address")),
        (PEERS_AT + 37, &[1], Value("address")),
        (PEERS_AT + 51, &[1], Value("scope of an endpoint")),
        (PEERS_AT + 55, &[6], Value("source")),
        (PEERS_AT + 72, &[1], Value("interface of an endpoint")),
        (PEERS_AT + 88, &[2], Value("time of a handshake")),
        (PEERS_AT + 88, &[0], Value("time of a handshake")),
        (PEERS_AT + 117, &late, Value("moment of a peer")),
        (KEYPAIR_AT - 1, &[4], Value("number of keypairs")),
        (KEYPAIR_AT, &[3], Value("slot of a keypair")),
        (KEYPAIR_AT, &[2], Value("order of keypairs")),
        (KEYPAIR_AT + KEYPAIR_LEN, &[0], Value("order of keypairs")),
        (KEYPAIR_AT + 1, &[2], Value("role")),
        (KEYPAIR_AT + 2, &[0, 0, 0, 1], Value("generation")),
        (KEYPAIR_AT + 2, &[1], Value("sending counter")),
        (KEYPAIR_AT + 6, &[255; 8], Value("sending counter")),
        (KEYPAIR_AT + KEYPAIR_LEN + 14, &[0x12, 0, 0, 0], Twice("receiver index")),
        (KEYPAIR_AT + 22, &late, Value("age of a keypair")),
        (KEYPAIR_AT + 30, &late, Value("age of a keypair")),
        (KEYPAIR_AT + 30, &old, Value("age of a keypair")),
        (KEYPAIR_AT + 102, &[255; 8], Value("replay window")),
        (KEYPAIR_AT + 102, &[0; 8], Value("replay window")),
    ];
    for &(at, bytes, error) in table {
        let mut body = body();
        body[at..at + bytes.len()].copy_from_slice(bytes);
        assert_eq!(take(&body).unwrap_err(), error, "{bytes:x?} at {at}");
    }
    let mut memory = full_export().into_bytes();
    memory[PEERS_AT + 200] ^= 1;
    assert_eq!(DeviceExport::take_from(&mut memory).unwrap_err(), Digest);
}

#[test]
fn an_export_is_for_its_device_and_its_time() {
    let export = full_export();
    export.check(&IDENTITY, START).unwrap();
    assert_eq!(export.check(&PEER, START), Err(ImportError::OtherIdentity(IDENTITY)));
    let before = Now::from_boot_ns(START.boot_ns() - 1);
    assert_eq!(export.check(&IDENTITY, before), Err(ImportError::OtherTime));
}

proptest! {
    #[test]
    fn bytes_that_somebody_made_up_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(take(&bytes).is_err());
        let head = [&b"tidegate\x01\0\0\0"[..], &bytes].concat();
        let _ = take(&head);
    }

    #[test]
    fn what_is_taken_is_written_the_same_way(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut body = body();
        for (at, value) in changes {
            let at = at.index(body.len());
            body[at] = value;
        }
        if let Ok(export) = take(&body) {
            let windows = export.peers.iter().flat_map(|peer| &peer.keypairs);
            prop_assert!(windows.clone().all(|k| k.window.parts().0 <= REJECT_AFTER_MESSAGES));
            let bytes = export.into_bytes();
            prop_assert_eq!(&bytes[..bytes.len() - DIGEST_LEN], &body[..]);
        }
    }
}
