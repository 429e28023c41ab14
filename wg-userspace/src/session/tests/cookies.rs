//! Cookies at the end that is told them: in both roles, from our own responder and from boringtun.

use std::net::IpAddr;

use boringtun::noise::rate_limiter::RateLimiter;
use wg_common::protocol::{COOKIE_LIFETIME, COOKIE_REPLY_LEN};

use super::*;
use crate::noise::{Cookie, check_mac1, check_mac2};

const COOKIE: [u8; 16] = [9; 16];

fn cookie() -> Cookie {
    Cookie::from_bytes(COOKIE)
}

/// The cookie of one of our addresses.
fn other_cookie(number: u8) -> Cookie {
    Cookie::from_bytes([number; 16])
}

/// The reply of the other end, whose key is `number`, to a message.
fn reply(number: u8, message: &[u8]) -> [u8; COOKIE_REPLY_LEN] {
    let mut rng = StdRng::seed_from_u64(8);
    cookie().reply_to(&Identity::new(key(number)), message, &mut rng).unwrap()
}

impl Side {
    /// Sends an initiation as soon as it may, and gives it.
    fn initiation(&mut self, now: Now) -> Vec<u8> {
        self.initiate(now);
        self.outbox.pop().unwrap().0
    }

    fn told(&mut self, reply: &[u8; COOKIE_REPLY_LEN], now: Now) -> Result<(), DropReason> {
        self.session.handle_cookie_reply(reply, now)
    }
}

fn shows_cookie(message: &[u8]) -> bool {
    assert!(check_mac1(&Identity::new(key(2)), message));
    let shown = check_mac2(&cookie(), message);
    assert!(shown || message[message.len() - 16..] == [0; 16], "mac2 is right or zero");
    shown
}

#[test]
fn a_cookie_is_shown_in_the_initiation_that_is_repeated() {
    let mut side = lonely();
    let first = side.initiation(START);
    assert!(!shows_cookie(&first));
    let (activity, endpoint) = (format!("{:?}", side.peer().activity), side.endpoint());
    let due = side.session.poll_timeout().unwrap();

    side.told(&reply(2, &first), START + MS).unwrap();
    assert!(side.outbox.is_empty(), "nothing is sent before it is time");
    assert_eq!(side.session.poll_timeout(), Some(due), "and that is no sooner");
    assert_eq!(format!("{:?}", side.peer().activity), activity);
    assert_eq!(side.endpoint(), endpoint);

    side.handle_timeout(due);
    assert!(shows_cookie(&side.outbox.pop().unwrap().0));
}

#[test]
fn a_cookie_is_used_for_115_seconds() {
    let mut side = lonely();
    let first = side.initiation(START);
    side.told(&reply(2, &first), START).unwrap();
    side.clear();
    assert!(shows_cookie(&side.initiation(START + (COOKIE_LIFETIME - TICK))));
    side.clear();
    assert!(!shows_cookie(&side.initiation(START + COOKIE_LIFETIME)));
    side.clear();
    assert!(!shows_cookie(&side.initiation(START + MS)), "it is gone");
    assert_eq!(COOKIE_LIFETIME, SECOND * 115);
}

#[test]
fn a_cookie_is_shown_in_responses_too() {
    let mut pair = Pair::connected();
    pair.sides[A].clear();
    pair.sides[B].clear();
    pair.now = pair.now + SECOND * 10;
    for (round, shown) in [(0, false), (1, true)] {
        let now = pair.now + SECOND * round;
        pair.sides[A].clear();
        let initiation = pair.sides[A].initiation(now);
        pair.sides[B].receive(&initiation, address(1), now).unwrap();
        let response = pair.sides[B].outbox.pop().unwrap().0;
        assert_eq!(check_mac2(&cookie(), &response), shown);
        if round == 0 {
            // A, under load, tells it a cookie instead of finishing the handshake.
            pair.sides[B].told(&reply(1, &response), now).unwrap();
        }
    }
}

/// One end of two; the other has an IPv4 address and an IPv6 address, and is under load all the time.
struct TwoWays {
    side: Side,
    other: Side,
    now: Now,
}

impl TwoWays {
    fn new() -> Self {
        Self { side: lonely(), other: Side::new(2, key(2), &key(1), psk()), now: START }
    }

    /// The next message to there, when what came before is too long ago to hold it back: our
    /// initiation, or our answer to one of the peer's.
    fn message(&mut self, to: Endpoint, is_response: bool) -> Vec<u8> {
        self.now = self.now + SECOND * 6;
        self.side.clear();
        self.other.clear();
        if is_response {
            self.other.set_endpoint(address(1));
            let initiation = self.other.initiation(self.now);
            self.side.receive(&initiation, to, self.now).unwrap();
            let (message, sent_to) = self.side.outbox.pop().unwrap();
            assert_eq!(sent_to, to);
            message
        } else {
            self.side.set_endpoint(to);
            self.side.initiation(self.now)
        }
    }

    /// Has it answered with the cookie of that number.
    fn tell(&mut self, number: u8, message: &[u8]) {
        let mut rng = StdRng::seed_from_u64(8);
        let reply = other_cookie(number).reply_to(&self.other.identity, message, &mut rng);
        self.side.told(&reply.unwrap(), self.now).unwrap();
    }
}

fn ipv6(last: u16) -> Endpoint {
    Endpoint::configured(SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, last], 51820)))
}

/// A peer that we ask by IPv6 and that asks us by IPv4 sees us at two addresses. Were there one cookie
/// for both, each would push the other out before it is shown.
#[test]
fn each_way_to_a_peer_has_a_cookie_of_its_own() {
    let mut ways = TwoWays::new();
    for round in 0..3 {
        for (number, to, is_response) in [(6, ipv6(2), false), (4, address(2), true)] {
            let message = ways.message(to, is_response);
            assert_eq!(check_mac2(&other_cookie(number), &message), round > 0, "round {round}");
            ways.tell(number, &message);
        }
    }

    // Two there are and no more: a third takes the place of the older one, whichever port it is.
    let third = ways.message(address(3), true);
    ways.tell(3, &third);
    let shown = [(address(3), 3), (address(2), 4), (ipv6(2), 3)];
    for (to, number) in shown {
        let to = Endpoint::configured(SocketAddr::new(to.remote.ip(), 1000));
        assert!(check_mac2(&other_cookie(number), &ways.message(to, true)), "{to:?}");
    }
}

#[test]
fn a_peer_that_moved_is_shown_the_cookie_that_it_told_last() {
    let mut ways = TwoWays::new();
    for (number, to) in [(4, address(2)), (6, ipv6(2)), (5, address(2))] {
        let message = ways.message(to, false);
        ways.tell(number, &message);
    }
    assert!(check_mac2(&other_cookie(5), &ways.message(address(7), false)));
    // Each grows old by itself; then the younger is the last one.
    ways.now = START + SECOND * 12 + (COOKIE_LIFETIME - SECOND * 6);
    assert!(check_mac2(&other_cookie(5), &ways.message(ipv6(2), false)));
    let message = ways.message(ipv6(2), false);
    assert_eq!(message[message.len() - 16..], [0; 16]);
}

#[test]
fn a_message_earns_one_reply() {
    let mut side = lonely();
    let first = side.initiation(START);
    let reply_to_first = reply(2, &first);
    side.told(&reply_to_first, START).unwrap();
    assert_eq!(side.told(&reply_to_first, START), Err(DropReason::UnknownIndex), "a replay");
    assert_eq!(side.told(&reply(2, &first), START), Err(DropReason::UnknownIndex), "a second one");

    // Only the last message counts; the repeated one bears the same index, but another mac1.
    let due = side.session.poll_timeout().unwrap();
    side.handle_timeout(due);
    let second = side.outbox.pop().unwrap().0;
    assert_eq!(first[4..8], second[4..8]);
    assert_eq!(side.told(&reply(2, &first), due), Err(DropReason::BadHandshake));
    assert_eq!(side.told(&reply(2, &second), due), Ok(()));
}

#[test]
fn a_reply_of_somebody_else_changes_nothing() {
    let mut side = lonely();
    assert_eq!(side.told(&[3; COOKIE_REPLY_LEN], START), Err(DropReason::UnknownIndex));
    let message = side.initiation(START);
    assert_eq!(side.told(&reply(3, &message), START), Err(DropReason::BadHandshake));
    let mut other_index = message.clone();
    other_index[4] ^= 1;
    assert_eq!(side.told(&reply(2, &other_index), START), Err(DropReason::UnknownIndex));
    // The right one may still come.
    assert_eq!(side.told(&reply(2, &message), START), Ok(()));
    // One that says our key is another's does not.
    side.session.set_remote(None, &mut side.indexes);
    assert_eq!(side.told(&reply(2, &message), START), Err(DropReason::UnknownIndex));
}

#[test]
fn a_cookie_ends_with_the_identity_it_was_told_to() {
    let mut side = lonely();
    let message = side.initiation(START);
    side.told(&reply(2, &message), START).unwrap();
    let remote = RemoteStatic::new(&side.identity, key(2).public_key(), psk());
    side.session.set_remote(Some(remote.into()), &mut side.indexes);
    assert!(!shows_cookie(&side.initiation(START)));
}

proptest! {
    #[test]
    fn any_reply_is_refused_without_panic(parts: [[u8; 32]; 2]) {
        let mut side = lonely();
        let message = side.initiation(START);
        let mut bytes: [u8; COOKIE_REPLY_LEN] = parts.concat().try_into().unwrap();
        prop_assert!(side.told(&bytes, START).is_err());
        bytes[4..8].copy_from_slice(&message[4..8]);
        prop_assert!(side.told(&bytes, START).is_err());
        side.clear();
        prop_assert!(!shows_cookie(&side.initiation(START)));
    }
}

/// boringtun under load, at the other end of a [`Side`].
fn loaded_boringtun() -> Tunn {
    let private = x25519::StaticSecret::from(*key(2).expose());
    let limiter = RateLimiter::new(&x25519::PublicKey::from(&private), 0);
    let remote = x25519::PublicKey::from(*key(1).public_key().as_bytes());
    Tunn::new(private, remote, Some(*psk().expose()), None, 9, Some(Arc::new(limiter)))
}

/// What boringtun sends when a datagram comes from us.
fn sent(tunn: &mut Tunn, datagram: &[u8]) -> Vec<u8> {
    let mut buffer = [0; 2048];
    match tunn.decapsulate(Some(IpAddr::from([192, 0, 2, 1])), datagram, &mut buffer) {
        TunnResult::WriteToNetwork(datagram) => datagram.to_vec(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn boringtun_under_load_answers_our_second_initiation() {
    let mut side = lonely();
    let mut tunn = loaded_boringtun();
    side.send(&packet(1, 100), START);
    let reply = sent(&mut tunn, &side.outbox.pop().unwrap().0);
    assert_eq!(reply.len(), COOKIE_REPLY_LEN);
    side.receive(&reply, address(2), START).unwrap();

    let due = side.session.poll_timeout().unwrap();
    side.handle_timeout(due);
    let response = sent(&mut tunn, &side.outbox.pop().unwrap().0);
    side.receive(&response, address(2), due).unwrap();
    assert!(side.staged.is_empty(), "the staged packet is on its way");
}

#[test]
fn boringtun_under_load_takes_our_second_response() {
    let mut side = Side::new(1, key(1), &key(2), psk());
    let mut tunn = loaded_boringtun();
    let mut buffer = [0; 2048];
    let mut initiation = |tunn: &mut Tunn| match tunn.format_handshake_initiation(&mut buffer, true)
    {
        TunnResult::WriteToNetwork(datagram) => datagram.to_vec(),
        other => panic!("{other:?}"),
    };
    let first = initiation(&mut tunn);
    side.receive(&first, address(2), START).unwrap();
    let reply = sent(&mut tunn, &side.outbox.pop().unwrap().0);
    side.receive(&reply, address(2), START).unwrap();

    let second = initiation(&mut tunn);
    side.receive(&second, address(2), START + REKEY_TIMEOUT).unwrap();
    let keepalive = sent(&mut tunn, &side.outbox.pop().unwrap().0);
    assert_eq!(keepalive.len(), TRANSPORT_MIN_LEN, "the handshake is done");
    side.receive(&keepalive, address(2), START + REKEY_TIMEOUT).unwrap();
}
