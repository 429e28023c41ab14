//! Handshakes and the outside: whom they answer, what they never move, and a link that goes down.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use wg_common::endpoint::Endpoint;
use wg_common::id::{DeviceId, PeerId, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::protocol::{INITIATION_LEN, RESPONSE_LEN};

use super::*;
use crate::aead::RingAead;
use crate::datapath::SocketGroup;
use crate::datapath::handoff::HandshakeDatagram;
use crate::noise::Timestamp;
use crate::session::TICK;
use crate::sys::random::Rng;

static AEAD: RingAead = RingAead;
const START: Now = Now::from_boot_ns(1_000_000_000_000);
const PEER: PeerId = PeerId(1);

/// A message, and where it was sent.
type Sent = (Vec<u8>, Endpoint);

/// Writes down what is sent. Its wall clock moves on whenever it is asked.
#[derive(Clone, Default)]
struct World {
    sent: Arc<Mutex<Vec<Sent>>>,
    secs: Arc<AtomicU64>,
}

impl Outside for World {
    type Rng = Rng;

    fn rng(&self) -> Rng {
        Rng
    }

    fn wall(&self) -> Timestamp {
        Timestamp::from_unix(1_800_000_000 + self.secs.fetch_add(1, Ordering::Relaxed), 0)
    }

    fn send(&self, _: WorkerId, message: &[u8], to: &Endpoint, _: u8) -> bool {
        self.sent.lock().unwrap().push((message.to_vec(), *to));
        true
    }
}

/// A device with one peer.
struct Device {
    world: World,
    handshakes: Handshakes<World>,
    hot: Arc<HotPeer>,
}

fn endpoint(remote: &str) -> Endpoint {
    Endpoint::configured(remote.parse().unwrap())
}

impl Device {
    /// Two that are each other's peer.
    fn pair() -> [Device; 2] {
        let keys = [1, 2].map(|byte| PrivateKey::from_bytes([byte; 32]));
        let publics = [keys[1].public_key(), keys[0].public_key()];
        let mut others = publics.into_iter();
        keys.map(|key| Device::new(key, others.next().unwrap()))
    }

    fn new(key: PrivateKey, other: PublicKey) -> Device {
        let sockets = SocketGroup { port: 1, of_worker: Vec::new() };
        let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
        let (shared, _) = Shared::new(DeviceId(0), 2, Vec::new(), sockets, None, indexes).unwrap();
        let world = World::default();
        let handshakes = Handshakes::new(shared, world.clone(), &AEAD, None);
        handshakes.set_private_key(Some(key), START);
        let hot = Arc::new(HotPeer::new(PEER, DeviceId(0), other));
        handshakes.add_peer(Arc::clone(&hot));
        Device { world, handshakes, hot }
    }

    fn set_endpoint(&self, at: &str) {
        self.hot.endpoint.store(Some(Arc::new(endpoint(at))));
    }

    fn endpoint(&self) -> Option<Endpoint> {
        self.hot.endpoint.load().as_deref().copied()
    }

    fn initiate(&self, now: Now) {
        self.handshakes.work(&Work::Initiate(DeviceId(0), PEER), now);
    }

    /// What was sent since the last call.
    fn sent(&self) -> Vec<Sent> {
        std::mem::take(&mut *self.world.sent.lock().unwrap())
    }

    fn receive(&self, message: &[u8], from: &str, now: Now) {
        let from = endpoint(from);
        let datagram = HandshakeDatagram::new(DeviceId(0), message, from, WorkerId(1)).unwrap();
        self.handshakes.work(&Work::Datagram(datagram), now);
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        crate::counters::Totals::sum([self.handshakes.drops()]).dropped(reason)
    }

    fn last_worker(&self) -> u16 {
        self.hot.last_worker.load(Ordering::Relaxed)
    }
}

#[test]
fn handshake_messages_are_answered_to_their_source_and_move_nothing() {
    let [alice, bob] = Device::pair();
    alice.set_endpoint("192.0.2.2:2");
    bob.set_endpoint("192.0.2.1:1");
    let (of_alice, of_bob) = (alice.endpoint(), bob.endpoint());

    alice.initiate(START);
    let initiation = alice.sent().remove(0).0;
    assert_eq!(initiation.len(), INITIATION_LEN);
    bob.receive(&initiation, "203.0.113.9:9", START);
    let (response, to) = bob.sent().remove(0);
    assert_eq!((response.len(), to), (RESPONSE_LEN, endpoint("203.0.113.9:9")));
    assert_eq!((bob.endpoint(), bob.last_worker()), (of_bob, HotPeer::NO_WORKER));

    // A capture of it, from where its sender never was.
    bob.receive(&initiation, "203.0.113.66:6", START + Duration::from_secs(1));
    assert_eq!((bob.sent(), bob.dropped(DropReason::OldTimestamp)), (Vec::new(), 1));
    assert_eq!((bob.endpoint(), bob.last_worker()), (of_bob, HotPeer::NO_WORKER));

    // A cookie reply for the pending handshake, and one for none.
    let index = &initiation[4..8];
    for index in [index, &[0xff; 4]] {
        let mut reply = vec![3, 0, 0, 0];
        reply.extend_from_slice(index);
        reply.resize(64, 7);
        alice.receive(&reply, "203.0.113.66:6", START);
        assert_eq!((alice.endpoint(), alice.last_worker()), (of_alice, HotPeer::NO_WORKER));
    }

    alice.receive(&response, "203.0.113.77:7", START);
    assert!(alice.hot.keypairs.load().current.is_some());
    assert_eq!((alice.endpoint(), alice.last_worker()), (of_alice, HotPeer::NO_WORKER));
    // Its confirmation goes to where the peer was configured, too.
    assert_eq!(alice.sent().remove(0).1, of_alice.unwrap());
}

#[test]
fn an_initiation_gives_a_peer_without_endpoint_none() {
    let [alice, bob] = Device::pair();
    alice.set_endpoint("192.0.2.2:2");
    alice.initiate(START);
    bob.receive(&alice.sent().remove(0).0, "203.0.113.9:9", START);
    assert_eq!(bob.sent().len(), 1);
    assert_eq!(bob.endpoint(), None);
}

#[test]
fn while_the_interface_is_down_nothing_is_sent_or_answered() {
    let [alice, bob] = Device::pair();
    alice.set_endpoint("192.0.2.2:2");
    bob.set_endpoint("192.0.2.1:1");
    alice.initiate(START);
    let initiation = alice.sent().remove(0).0;

    bob.handshakes.shared.up.store(false, Ordering::Relaxed);
    bob.handshakes.go_down(START);
    bob.receive(&initiation, "192.0.2.1:1", START);
    assert_eq!((bob.sent().len(), bob.dropped(DropReason::InterfaceDown)), (0, 1));
    bob.hot.handshake_wanted.store(true, Ordering::Relaxed);
    bob.initiate(START);
    assert!(bob.sent().is_empty());
    assert!(!bob.hot.handshake_wanted.load(Ordering::Relaxed), "it may be asked for again");
    bob.handshakes.set_persistent_keepalive(PEER, Some(Duration::from_secs(1)), START);
    bob.handshakes.tick(START + Duration::from_secs(5));
    assert!(bob.sent().is_empty());

    // Nothing of it was noted: once up, the same initiation is answered.
    bob.handshakes.shared.up.store(true, Ordering::Relaxed);
    bob.receive(&initiation, "192.0.2.1:1", START + Duration::from_secs(6));
    assert_eq!(bob.sent().len(), 1);
}

#[test]
fn going_down_ends_sessions_and_going_up_starts_persistent_keepalives() {
    let [alice, bob] = Device::pair();
    alice.set_endpoint("192.0.2.2:2");
    alice.handshakes.set_persistent_keepalive(PEER, Some(Duration::from_secs(25)), START);
    alice.handshakes.tick(START + TICK);
    bob.receive(&alice.sent().remove(0).0, "192.0.2.1:1", START);
    alice.receive(&bob.sent().remove(0).0, "192.0.2.2:2", START);
    alice.sent();
    let index = alice.hot.keypairs.load().current.as_ref().unwrap().local_index();

    // A handshake is under way as well, and a packet waits for its answer.
    alice.hot.activity.data_sent(START);
    let later = START + Duration::from_secs(6);
    alice.handshakes.work(&Work::Initiate(DeviceId(0), PEER), later);
    assert_eq!(alice.sent().len(), 1);
    alice.handshakes.shared.up.store(false, Ordering::Relaxed);
    alice.handshakes.go_down(later);
    assert!(alice.hot.keypairs.load().iter().next().is_none());
    assert!(alice.handshakes.shared.keypair(index).is_none());
    assert_eq!(alice.hot.activity.unanswered_since(), None);

    alice.handshakes.shared.up.store(true, Ordering::Relaxed);
    alice.handshakes.go_up(later);
    alice.handshakes.tick(later + TICK);
    let sent = alice.sent();
    assert_eq!((sent.len(), sent[0].0.len()), (1, INITIATION_LEN), "at once, and anew");
    bob.receive(&sent[0].0, "192.0.2.1:1", later);
    alice.receive(&bob.sent().remove(0).0, "192.0.2.2:2", later);
    assert!(alice.hot.keypairs.load().current.is_some());
}

#[test]
fn a_low_order_public_key_is_a_peer_that_is_never_sent_anything() {
    let device = Device::new(PrivateKey::from_bytes([1; 32]), PublicKey::from_bytes([0; 32]));
    device.set_endpoint("192.0.2.2:2");
    device.handshakes.set_persistent_keepalive(PEER, Some(Duration::from_secs(1)), START);
    for second in 0..200 {
        device.handshakes.tick(START + Duration::from_secs(second));
    }
    assert!(device.sent().is_empty());
}

#[test]
fn another_private_key_is_handshaken_with_at_once() {
    let [alice, bob] = Device::pair();
    alice.set_endpoint("192.0.2.2:2");
    alice.initiate(START);
    alice.sent();
    // Rekey-Timeout has not passed.
    let new = PrivateKey::from_bytes([3; 32]);
    let public = new.public_key();
    alice.handshakes.set_private_key(Some(new), START);
    alice.initiate(START);
    let sent = alice.sent();
    assert_eq!(sent.len(), 1);
    bob.handshakes.remove_peer(PEER, START);
    bob.handshakes.add_peer(Arc::new(HotPeer::new(PEER, DeviceId(0), public)));
    bob.receive(&sent[0].0, "192.0.2.1:1", START);
    assert_eq!(bob.sent().len(), 1);
}
