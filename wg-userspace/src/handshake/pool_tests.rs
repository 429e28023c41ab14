//! The pool without threads: messages of a client, of boringtun and of strangers, in turns that the
//! tests make, with and without load.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use rand::SeedableRng;
use rand::rngs::StdRng;
use wg_common::endpoint::Endpoint;
use wg_common::id::{DeviceId, PeerId, ReceiverIndex, WorkerId};
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_common::outcome::DropReason;
use wg_common::protocol::{COOKIE_REPLY_LEN, INITIATION_LEN, REKEY_TIMEOUT, RESPONSE_LEN};
use wg_common::time::Now;

use super::{Handshakes, Outside, lock};
use crate::aead::RingAead;
use crate::counters::Totals;
use crate::datapath::handoff::{HandshakeDatagram, Work};
use crate::datapath::{Shared, SocketGroup, WorkQueue};
use crate::key::{PresharedKey, PrivateKey, PublicKey};
use crate::noise::{Cookie, Identity, RemoteStatic, Timestamp, agreement_count, initiate, mac1_of};
use crate::session::HotPeer;

const START: Now = Now::from_boot_ns(1_000_000_000_000);
const MS: Duration = Duration::from_millis(1);
const HONEST: &str = "192.0.2.7:51820";
const PEER: PeerId = PeerId(1);

/// What was sent, and where to.
type Sent = Arc<Mutex<Vec<(Vec<u8>, SocketAddr)>>>;

/// A world that keeps what is sent.
struct World {
    seed: Mutex<u64>,
    sent: Sent,
}

impl Outside for World {
    type Rng = StdRng;

    fn rng(&self) -> StdRng {
        let mut seed = lock(&self.seed);
        *seed += 1;
        StdRng::seed_from_u64(*seed)
    }

    fn wall(&self) -> Timestamp {
        Timestamp::from_unix(1_700_000_000, *lock(&self.seed) as u32)
    }

    fn send(&self, _: WorkerId, message: &[u8], to: &Endpoint, _: u8) -> bool {
        lock(&self.sent).push((message.to_vec(), to.remote));
        true
    }
}

/// A gateway with one peer, whose key is `key(2)`, and another one that never answers.
struct Gateway {
    handshakes: Handshakes<World>,
    queue: Arc<WorkQueue>,
    shared: Arc<Shared>,
    sent: Sent,
    now: Now,
}

fn key(number: u8) -> PrivateKey {
    PrivateKey::from_bytes([number; 32])
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

const INDEXES: IndexPermutation = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);

impl Gateway {
    fn new() -> Self {
        let sockets = SocketGroup { port: 51820, of_worker: Vec::new() };
        let (shared, queue) =
            Shared::new(DeviceId(0), 1, Vec::new(), sockets, None, INDEXES).unwrap();
        let sent = Sent::default();
        let world = World { seed: Mutex::new(1), sent: Arc::clone(&sent) };
        let handshakes = Handshakes::new(Arc::clone(&shared), world, &RingAead, None);
        handshakes.set_private_key(Some(key(1)), START);
        for (id, public_key) in [(PEER, key(2).public_key()), (PeerId(2), key(3).public_key())] {
            handshakes.add_peer(Arc::new(HotPeer::new(id, DeviceId(0), public_key)));
        }
        Self { handshakes, queue, shared, sent, now: START }
    }

    /// One that is under load for a second from now on.
    fn loaded() -> Self {
        let gateway = Self::new();
        gateway.press();
        gateway
    }

    /// Has the pool work as much as makes load.
    fn press(&self) {
        // However long ago the last time was.
        self.handshakes.worked(Duration::from_secs(1 << 20), self.now);
        assert!(self.handshakes.is_under_load(self.now));
    }

    fn push(&self, message: &[u8], from: &str) {
        let from = Endpoint::configured(address(from));
        let datagram = HandshakeDatagram::new(DeviceId(0), message, from, WorkerId(0)).unwrap();
        assert!(self.shared.hand_off(Work::Datagram(datagram)));
    }

    /// Turns until there is nothing to do; gives what was sent.
    fn turns(&self) -> Vec<(Vec<u8>, SocketAddr)> {
        while self.handshakes.turn(&self.queue, self.now) {}
        std::mem::take(&mut *lock(&self.sent))
    }

    /// What is sent for one message.
    fn answer(&self, message: &[u8], from: &str) -> Option<Vec<u8>> {
        self.push(message, from);
        let mut sent = self.turns();
        assert!(sent.len() <= 1);
        let (answer, to) = sent.pop()?;
        assert_eq!(to, address(from));
        Some(answer)
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        Totals::sum([self.handshakes.drops()]).dropped(reason)
    }

    fn drops(&self) -> Vec<(DropReason, u64)> {
        Totals::sum([self.handshakes.drops()]).drops().collect()
    }

    fn has_keypair(&self) -> bool {
        let cell = self.handshakes.cell(PEER).unwrap();
        cell.hot.keypairs.load().iter().count() > 0
    }
}

/// Somebody who knows the gateway's public key, and its private one.
struct Client {
    identity: Identity,
    remote: RemoteStatic,
    rng: StdRng,
    /// Seconds of its clock.
    clock: u64,
}

impl Client {
    fn new(number: u8) -> Self {
        let identity = Identity::new(key(number));
        let gateway = key(1).public_key();
        let remote = RemoteStatic::new(&identity, gateway, PresharedKey::default());
        Self { identity, remote, rng: StdRng::seed_from_u64(number.into()), clock: 1_800_000_000 }
    }

    fn initiation(&mut self, cookie: Option<&Cookie>) -> [u8; INITIATION_LEN] {
        self.clock += 1;
        let timestamp = Timestamp::from_unix(self.clock, 0);
        let index = ReceiverIndex::from_wire((self.clock as u32).to_le_bytes());
        let Self { identity, remote, rng, .. } = self;
        initiate(identity, remote, index, timestamp, cookie, rng).unwrap().1
    }

    /// The cookie in a reply to this message.
    fn open(&self, reply: &[u8], message: &[u8]) -> Cookie {
        let index = ReceiverIndex::from_wire(*message[4..].first_chunk().unwrap());
        let mac1 = mac1_of(message).unwrap();
        Cookie::open_reply(reply.try_into().unwrap(), &self.remote, index, &mac1).unwrap()
    }
}

#[test]
fn without_load_an_initiation_needs_no_cookie() {
    let gateway = Gateway::new();
    let response = gateway.answer(&Client::new(2).initiation(None), HONEST).unwrap();
    assert_eq!(response.len(), RESPONSE_LEN);
    assert_eq!(gateway.drops(), []);
}

#[test]
fn under_load_an_initiation_is_answered_once_it_shows_its_cookie() {
    let gateway = Gateway::loaded();
    let mut client = Client::new(2);
    let first = client.initiation(None);
    let reply = gateway.answer(&first, HONEST).unwrap();
    assert_eq!(reply.len(), COOKIE_REPLY_LEN);
    assert!(!gateway.has_keypair());
    let cookie = client.open(&reply, &first);

    // From another port it is worth nothing.
    let stolen = client.initiation(Some(&cookie));
    let reply = gateway.answer(&stolen, "192.0.2.7:51821").unwrap();
    assert_eq!(reply.len(), COOKIE_REPLY_LEN);
    assert_eq!(gateway.dropped(DropReason::CookieDemanded), 2);

    let response = gateway.answer(&client.initiation(Some(&cookie)), HONEST).unwrap();
    assert_eq!(response.len(), RESPONSE_LEN);
    assert!(gateway.has_keypair());
    // mac2 does not excuse a replay.
    assert_eq!(gateway.answer(&stolen, HONEST), None);
    assert_eq!(gateway.dropped(DropReason::OldTimestamp), 1);
}

#[test]
fn the_load_ends_by_itself() {
    let mut gateway = Gateway::loaded();
    let mut client = Client::new(2);
    gateway.now = START + MS * 999;
    assert_eq!(gateway.answer(&client.initiation(None), HONEST).unwrap().len(), COOKIE_REPLY_LEN);
    gateway.now = START + MS * 1000;
    assert_eq!(gateway.answer(&client.initiation(None), HONEST).unwrap().len(), RESPONSE_LEN);
}

/// Messages of strangers with a right mac1, all different.
fn strangers(count: usize) -> Vec<[u8; INITIATION_LEN]> {
    let mut client = Client::new(99);
    (0..count).map(|_| client.initiation(None)).collect()
}

#[test]
fn a_queue_that_fills_makes_load() {
    let gateway = Gateway::new();
    for (i, message) in strangers(700).iter().enumerate() {
        gateway.push(message, &format!("10.0.{}.{}:9", i >> 8, i & 255));
    }
    let before = agreement_count();
    let sent = gateway.turns();
    // The first look finds the rest of the queue behind: nobody gets past it.
    assert_eq!(sent.len(), 500, "the budget of cookie replies");
    assert_eq!(gateway.dropped(DropReason::CookieDemanded), 500);
    assert_eq!(gateway.dropped(DropReason::RateLimited), 200);
    assert_eq!(agreement_count(), before, "and nothing costly was done");
}

#[test]
fn a_flood_from_the_address_of_an_honest_peer_does_not_lock_it_out() {
    let gateway = Gateway::loaded();
    let mut client = Client::new(2);
    let first = client.initiation(None);
    let cookie = client.open(&gateway.answer(&first, HONEST).unwrap(), &first);
    let flood = strangers(300);
    for message in flood.iter().cycle().take(3000) {
        gateway.push(message, HONEST);
    }
    gateway.push(&client.initiation(Some(&cookie)), HONEST);
    let before = agreement_count();
    let sent = gateway.turns();
    let responses = sent.iter().filter(|(message, _)| message.len() == RESPONSE_LEN).count();
    assert_eq!(responses, 1);
    // Three, and one since it is the first of this peer.
    assert_eq!(agreement_count() - before, 4, "the honest peer's handshake alone costs anything");
    assert_eq!(
        gateway.dropped(DropReason::CookieDemanded) + gateway.dropped(DropReason::RateLimited),
        3001
    );
}

#[test]
fn our_own_peers_need_no_cookie_and_no_place_among_strangers() {
    let gateway = Gateway::loaded();
    let endpoint = Endpoint::configured(address("192.0.2.3:51820"));
    let cell = gateway.handshakes.cell(PeerId(2)).unwrap();
    cell.hot.endpoint.store(Some(Arc::new(endpoint)));
    let flood = strangers(100);
    for message in flood.iter().cycle().take(10_000) {
        gateway.push(message, "10.0.0.1:9");
    }
    gateway.shared.want_handshake(&cell.hot);
    assert!(gateway.handshakes.turn(&gateway.queue, gateway.now));
    let sent = std::mem::take(&mut *lock(&gateway.sent));
    assert_eq!(sent[0].0.len(), INITIATION_LEN, "the first turn begins with it");
    assert_eq!(gateway.dropped(DropReason::Outdated), 10_000 - 4096, "the oldest made room");
}

#[test]
fn what_is_not_for_us_is_dropped_before_a_cookie_is_thought_of() {
    let gateway = Gateway::loaded();
    let mut client = Client::new(2);
    let mut message = client.initiation(None);
    message[20] ^= 1;
    assert_eq!(gateway.answer(&message, HONEST), None);
    assert_eq!(gateway.drops(), [(DropReason::BadMac1, 1)]);

    // A response to nothing has its right mac1, and earns nothing all the same.
    let (from, to) = (Identity::new(key(2)), Identity::new(key(1)));
    let remote = RemoteStatic::new(&to, key(2).public_key(), PresharedKey::default());
    let index = ReceiverIndex::from_wire([77, 0, 0, 7]);
    let timestamp = Timestamp::from_unix(1, 0);
    let (_, initiation) =
        initiate(&to, &remote, index, timestamp, None, &mut StdRng::seed_from_u64(1)).unwrap();
    let remote = RemoteStatic::new(&from, key(1).public_key(), PresharedKey::default());
    let (_, response) = crate::noise::open_initiation(&from, &initiation)
        .unwrap()
        .authenticate(&remote)
        .unwrap()
        .respond(&remote, index, None, &mut StdRng::seed_from_u64(2))
        .unwrap();
    assert_eq!(gateway.answer(&response, HONEST), None);
    assert_eq!(gateway.dropped(DropReason::UnknownIndex), 1);

    // And so does a cookie reply to nothing.
    let mut reply = [0; COOKIE_REPLY_LEN];
    reply[0] = 3;
    assert_eq!(gateway.answer(&reply, HONEST), None);
    assert_eq!(gateway.dropped(DropReason::UnknownIndex), 2);
}

#[test]
fn without_a_private_key_nothing_is_answered() {
    let gateway = Gateway::loaded();
    gateway.handshakes.set_private_key(None, gateway.now);
    let mut client = Client::new(2);
    let message = client.initiation(None);
    assert_eq!(gateway.answer(&message, HONEST), None);
    let mut reply = [0; COOKIE_REPLY_LEN];
    reply[0] = 3;
    assert_eq!(gateway.answer(&reply, HONEST), None);
    assert_eq!(gateway.drops(), [(DropReason::NoPrivateKey, 2)]);
}

#[test]
fn an_initiation_costs_three_agreements_and_a_stranger_one() {
    let before = agreement_count();
    let mut gateway = Gateway::new();
    assert_eq!(agreement_count(), before, "peers that have not come yet cost none");
    let mut client = Client::new(2);
    let initiation = client.initiation(None);
    // Ephemeral with our static key to find the sender; ephemeral with both of its keys to answer.
    // What finds the sender is not done again, and static with static is done for the first message
    // that needs it.
    assert_eq!(cost(&gateway, &initiation), (3 + 1, true), "the first contact");
    gateway.now = gateway.now + MS * 1000;
    assert_eq!(cost(&gateway, &client.initiation(None)), (3, true));
    assert_eq!(cost(&gateway, &initiation), (1, false), "a replay");
    assert_eq!(cost(&gateway, &Client::new(50).initiation(None)), (1, false), "nobody we know");

    // Somebody who says that he is our peer, which is no secret, and has not its key.
    let mut liar = Client::new(51);
    let mut claim = |victim: u8| {
        liar.identity = identity_claiming(key(victim).public_key());
        let gateway_key = key(1).public_key();
        liar.remote = RemoteStatic::new(&liar.identity, gateway_key, PresharedKey::default());
        liar.initiation(None)
    };
    assert_eq!(cost(&gateway, &claim(2)), (1, false));
    assert_eq!(cost(&gateway, &claim(3)), (1 + 1, false), "of whom nothing was heard");
    assert_eq!(cost(&gateway, &claim(3)), (1, false), "refused, but remembered");
    let refused = [DropReason::UnknownPeer, DropReason::BadHandshake];
    assert_eq!(refused.map(|reason| gateway.dropped(reason)), [1, 3]);
}

#[test]
fn what_was_agreed_under_another_private_key_is_forgotten() {
    let mut gateway = Gateway::new();
    let mut client = Client::new(2);
    assert_eq!(cost(&gateway, &client.initiation(None)), (3 + 1, true));
    let before = agreement_count();
    gateway.handshakes.set_private_key(Some(key(9)), gateway.now);
    assert_eq!(agreement_count(), before, "nothing is made in advance");
    let gateway_key = key(9).public_key();
    client.remote = RemoteStatic::new(&client.identity, gateway_key, PresharedKey::default());
    gateway.now = gateway.now + MS * 1000;
    assert_eq!(cost(&gateway, &client.initiation(None)), (3 + 1, true));
    gateway.now = gateway.now + MS * 1000;
    assert_eq!(cost(&gateway, &client.initiation(None)), (3, true));
}

/// How many agreements a message costs, and whether it is answered.
fn cost(gateway: &Gateway, message: &[u8]) -> (u64, bool) {
    let before = agreement_count();
    let answer = gateway.answer(message, HONEST);
    (agreement_count() - before, answer.is_some())
}

/// An identity that shows a public key which is not its own.
fn identity_claiming(public_key: PublicKey) -> Identity {
    Identity::claiming(key(51), public_key)
}

#[test]
fn what_did_not_authenticate_changes_nothing() {
    let gateway = Gateway::new();
    let mut liar = Client::new(51);
    liar.identity = identity_claiming(key(2).public_key());
    liar.remote = RemoteStatic::new(&liar.identity, key(1).public_key(), PresharedKey::default());
    let cell = gateway.handshakes.cell(PEER).unwrap();
    let state = || {
        let indexes = lock(&gateway.handshakes.indexes).lent_count();
        let session = format!("{:?}", cell.session());
        (indexes, session, gateway.handshakes.awake_count())
    };
    let before = state();
    let mut altered = Client::new(2).initiation(None);
    altered[30] ^= 1;
    for message in strangers(20).iter().chain([&liar.initiation(None), &altered]) {
        assert_eq!(gateway.answer(message, HONEST), None);
    }
    assert_eq!(state(), before);
    assert!(!gateway.has_keypair());
    // The same one with its right bytes is taken as ever.
    assert!(gateway.answer(&Client::new(2).initiation(None), HONEST).is_some());
}

/// boringtun in the client's place.
fn boringtun() -> Tunn {
    let remote = x25519::PublicKey::from(*key(1).public_key().as_bytes());
    Tunn::new(x25519::StaticSecret::from(*key(2).expose()), remote, None, None, 5, None)
}

fn sent(result: TunnResult<'_>) -> Vec<u8> {
    match result {
        TunnResult::WriteToNetwork(message) => message.to_vec(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn boringtun_shows_the_cookie_that_we_tell_it_in_both_roles() {
    let mut gateway = Gateway::loaded();
    let (mut tunn, mut buffer) = (boringtun(), [0; 2048]);
    let first = sent(tunn.format_handshake_initiation(&mut buffer, true));
    let reply = gateway.answer(&first, HONEST).unwrap();
    assert!(matches!(tunn.decapsulate(None, &reply, &mut buffer), TunnResult::Done));
    let second = sent(tunn.format_handshake_initiation(&mut buffer, true));
    let response = gateway.answer(&second, HONEST).unwrap();
    assert_eq!(response.len(), RESPONSE_LEN);
    let keepalive = sent(tunn.decapsulate(None, &response, &mut buffer));
    assert_eq!(keepalive.len(), 32);

    // Now we initiate, and are under load when it responds. It has a cookie, which is of this secret.
    let cell = gateway.handshakes.cell(PEER).unwrap();
    cell.hot.endpoint.store(Some(Arc::new(Endpoint::configured(address(HONEST)))));
    gateway.now = START + REKEY_TIMEOUT;
    gateway.press();
    gateway.shared.want_handshake(&cell.hot);
    let initiation = gateway.turns().pop().unwrap().0;
    let response = sent(tunn.decapsulate(None, &initiation, &mut buffer));
    gateway.push(&response, "192.0.2.7:9");
    assert_eq!(gateway.turns().pop().unwrap().0.len(), COOKIE_REPLY_LEN, "not from there");
    let keepalive = gateway.answer(&response, HONEST).unwrap();
    assert_eq!(keepalive.len(), 32, "the handshake is done");
}

#[test]
fn a_cookie_reply_finds_its_handshake_in_both_roles() {
    let gateway = Gateway::new();
    let client = Client::new(2);
    let cookie = Cookie::from_bytes([9; 16]);
    let mut rng = StdRng::seed_from_u64(4);
    let told = |message: &[u8], rng: &mut StdRng| {
        let reply = cookie.reply_to(&client.identity, message, rng).unwrap();
        assert_eq!(gateway.answer(&reply, "203.0.113.1:1"), None);
    };
    // By the index of the handshake that we began …
    let cell = gateway.handshakes.cell(PEER).unwrap();
    cell.hot.endpoint.store(Some(Arc::new(Endpoint::configured(address(HONEST)))));
    gateway.shared.want_handshake(&cell.hot);
    let initiation = gateway.turns().pop().unwrap().0;
    told(&initiation, &mut rng);
    assert_eq!(gateway.drops(), []);
    // … and of the keypair that we made.
    let response = gateway.answer(&Client::new(2).initiation(None), HONEST).unwrap();
    assert!(crate::noise::check_mac2(&cookie, &response));
    told(&response, &mut rng);
    assert_eq!(gateway.drops(), []);
    let endpoint = cell.hot.endpoint.load().as_deref().copied().unwrap();
    assert_eq!(endpoint.remote, address(HONEST), "it moves no endpoint");
    // Each of them once.
    told(&response, &mut rng);
    assert_eq!(gateway.drops(), [(DropReason::UnknownIndex, 1)]);
}

#[test]
fn several_threads_share_the_work() {
    let gateway = Gateway::new();
    let messages = strangers(400);
    let before = messages.len() as u64;
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for message in messages.iter().cycle().take(2000) {
                    gateway.push(message, HONEST);
                    gateway.handshakes.turn(&gateway.queue, gateway.now);
                }
            });
        }
    });
    gateway.turns();
    let counted: u64 = gateway.drops().iter().map(|(_, count)| count).sum();
    assert_eq!(counted, 3 * 2000, "{:?} of {before}", gateway.drops());
}
