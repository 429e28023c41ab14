//! Which handshake messages are worth their cost, and in which order.
//!
//! A handshake costs the pool a hundred times what a look at mac1 and mac2 does, and mac1 proves
//! nothing about an address. So while we are under load (§5.3) there are two lanes:
//!
//! ```text
//! mac1 is right ─┬ not under load ────────────────▶ in order
//!                ├ mac2 is right ─ source's bucket ▶ newest first, the oldest makes room
//!                └ otherwise ─ budget of all ──────▶ cookie reply, and nothing else
//! ```
//!
//! mac2 comes before the bucket: who writes the address of an honest peer into his datagrams has no
//! cookie of it, and empties nobody's bucket but his own.

use std::collections::VecDeque;

use rand_core::CryptoRng;
use wg_common::outcome::DropReason;
use wg_common::time::Now;

use super::buckets::SourceBuckets;
use super::cookies::Cookies;
use super::load::{Load, WAITING_MAX};
use crate::datapath::handoff::HandshakeDatagram;
use crate::noise::Cookie;
use crate::rate::{Bucket, Rate};

/// Cookie replies to all sources together. An honest peer in a flood of as many messages gets one for
/// each of its own.
const COOKIE_REPLIES: Rate = Rate::new(10_000, 500);
/// Messages with a right mac2 that wait: more would only be answered late.
const PROVEN_MAX: usize = 512;

/// What becomes of a message.
#[derive(Debug)]
pub enum Verdict {
    /// It waits for its turn.
    Waits,
    /// It waits, and an older one was dropped for it.
    Displaces,
    /// Its sender is to be told this cookie, and it is dropped.
    Demand(Cookie),
    /// It is dropped.
    Refused(DropReason),
}

/// The handshake messages of one device that wait to be handled.
pub struct Lanes {
    load: Load,
    cookies: Cookies,
    sources: SourceBuckets,
    cookie_replies: Bucket,
    /// Came while we were not under load; oldest first.
    calm: VecDeque<HandshakeDatagram>,
    /// Came with a right mac2 while we were; oldest first.
    proven: VecDeque<HandshakeDatagram>,
}

impl Lanes {
    /// Empty lanes; they never hold more than they have room for now.
    pub fn new(rng: &mut impl CryptoRng) -> Self {
        Self {
            load: Load::default(),
            cookies: Cookies::default(),
            sources: SourceBuckets::new(rng),
            cookie_replies: Bucket::default(),
            calm: VecDeque::with_capacity(WAITING_MAX),
            proven: VecDeque::with_capacity(PROVEN_MAX),
        }
    }

    /// Whether cookies are demanded.
    pub fn is_under_load(&self, now: Now) -> bool {
        self.load.is_high(now)
    }

    /// The pool has worked for `time` until `now`; see [`Load::worked`].
    pub fn worked(&mut self, time: std::time::Duration, now: Now) {
        self.load.worked(time, now);
    }

    /// Messages that wait in here.
    pub fn len(&self) -> usize {
        self.calm.len() + self.proven.len()
    }

    /// Decides about an initiation or response whose mac1 is right, while `behind` others wait
    /// elsewhere.
    pub fn admit(
        &mut self,
        datagram: HandshakeDatagram,
        behind: usize,
        rng: &mut impl CryptoRng,
        now: Now,
    ) -> Verdict {
        self.load.waiting(behind + self.len(), now);
        if !self.load.is_high(now) {
            // There is room: if as many waited, there would be load.
            self.calm.push_back(datagram);
            return Verdict::Waits;
        }
        let from = datagram.from.remote;
        if let Err(cookie) = self.cookies.check(datagram.message(), from, rng, now) {
            return if self.cookie_replies.take(COOKIE_REPLIES, now) {
                Verdict::Demand(cookie)
            } else {
                Verdict::Refused(DropReason::RateLimited)
            };
        }
        if !self.sources.take(from.ip(), now) {
            return Verdict::Refused(DropReason::RateLimited);
        }
        let displaces = self.proven.len() == PROVEN_MAX && self.proven.pop_front().is_some();
        self.proven.push_back(datagram);
        if displaces { Verdict::Displaces } else { Verdict::Waits }
    }

    /// Under load, a message that was admitted before and has to prove its address now: it is to be
    /// admitted again.
    pub fn recall(&mut self, now: Now) -> Option<HandshakeDatagram> {
        if self.load.is_high(now) { self.calm.pop_back() } else { None }
    }

    /// The message to handle next: under load the newest that has proved its address, else the oldest
    /// of all.
    pub fn next(&mut self, now: Now) -> Option<HandshakeDatagram> {
        if self.load.is_high(now) {
            self.proven.pop_back()
        } else {
            self.proven.pop_front().or_else(|| self.calm.pop_front())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use wg_common::endpoint::Endpoint;
    use wg_common::id::{DeviceId, WorkerId};
    use wg_common::protocol::{INITIATION_LEN, MAC_LEN};

    use super::*;
    use crate::handshake::load::HOLD_TIME;
    use crate::noise::mac;

    const START: Now = Now::from_boot_ns(1_000_000_000);
    const MS: Duration = Duration::from_millis(1);
    const HONEST: &str = "192.0.2.7:51820";

    struct Test {
        lanes: Lanes,
        rng: StdRng,
    }

    impl Test {
        fn new() -> Self {
            let mut rng = StdRng::seed_from_u64(1);
            Self { lanes: Lanes::new(&mut rng), rng }
        }

        /// Under load from now on.
        fn loaded(now: Now) -> Self {
            let mut test = Self::new();
            test.lanes.load.waiting(WAITING_MAX, now);
            test
        }

        fn admit(&mut self, datagram: HandshakeDatagram, now: Now) -> Verdict {
            self.lanes.admit(datagram, 0, &mut self.rng, now)
        }

        /// A message from `from` with a right mac2.
        fn proven(&mut self, number: u32, from: &str, now: Now) -> HandshakeDatagram {
            let cookie = self.lanes.cookies.cookie(address(from), &mut self.rng, now);
            message(number, from, Some(&cookie))
        }

        fn admit_proven(&mut self, number: u32, from: &str, now: Now) -> Verdict {
            let datagram = self.proven(number, from, now);
            self.admit(datagram, now)
        }

        /// The numbers of the messages in the order in which they come out.
        fn out(&mut self, now: Now) -> Vec<u32> {
            std::iter::from_fn(|| self.lanes.next(now)).map(|d| number(&d)).collect()
        }
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// What looks like an initiation, and bears a number. mac1 is looked at before.
    fn message(number: u32, from: &str, cookie: Option<&Cookie>) -> HandshakeDatagram {
        let mut bytes = [0; INITIATION_LEN];
        bytes[0] = 1;
        bytes[4..8].copy_from_slice(&number.to_le_bytes());
        if let Some(cookie) = cookie {
            let (rest, mac2) = bytes.split_last_chunk_mut::<MAC_LEN>().unwrap();
            *mac2 = mac(cookie.expose(), rest);
        }
        let from = Endpoint::configured(address(from));
        HandshakeDatagram::new(DeviceId(0), &bytes, from, WorkerId(0)).unwrap()
    }

    fn number(datagram: &HandshakeDatagram) -> u32 {
        u32::from_le_bytes(*datagram.message()[4..].first_chunk().unwrap())
    }

    #[test]
    fn without_load_all_are_taken_in_order_and_no_cookie_is_needed() {
        let mut test = Test::new();
        for number in 0..500 {
            assert!(matches!(test.admit(message(number, HONEST, None), START), Verdict::Waits));
        }
        assert!(!test.lanes.is_under_load(START));
        assert_eq!(test.out(START), (0..500).collect::<Vec<_>>());
    }

    #[test]
    fn many_that_wait_are_load_wherever_they_wait() {
        let mut test = Test::new();
        for number in 0..512 {
            assert!(matches!(test.admit(message(number, HONEST, None), START), Verdict::Waits));
        }
        assert!(matches!(test.admit(message(512, HONEST, None), START), Verdict::Demand(_)));
        let mut test = Test::new();
        let verdict = test.lanes.admit(message(0, HONEST, None), 512, &mut test.rng, START);
        assert!(matches!(verdict, Verdict::Demand(_)));
    }

    #[test]
    fn under_load_a_message_without_cookie_earns_one_and_nothing_else() {
        let mut test = Test::loaded(START);
        let Verdict::Demand(cookie) = test.admit(message(1, HONEST, None), START) else {
            panic!("a cookie is demanded")
        };
        assert_eq!(test.lanes.len(), 0);
        // It is the one that counts, from there and from nowhere else.
        for (from, right) in
            [(HONEST, true), ("192.0.2.7:51821", false), ("192.0.2.8:51820", false)]
        {
            let verdict = test.admit(message(2, from, Some(&cookie)), START);
            assert_eq!(matches!(verdict, Verdict::Waits), right, "{from}: {verdict:?}");
        }
        assert_eq!(test.out(START), [2]);
    }

    #[test]
    fn cookies_are_demanded_for_a_second_after_the_last_sign_of_load() {
        let mut test = Test::loaded(START);
        let almost = START + (HOLD_TIME - MS);
        assert!(matches!(test.admit(message(1, HONEST, None), almost), Verdict::Demand(_)));
        let after = START + HOLD_TIME;
        assert!(matches!(test.admit(message(2, HONEST, None), after), Verdict::Waits));
    }

    #[test]
    fn a_cookie_of_an_older_secret_counts_no_more() {
        let mut test = Test::loaded(START);
        let old = test.proven(1, HONEST, START);
        let later = START + Duration::from_secs(120);
        test.lanes.load.waiting(WAITING_MAX, later);
        assert!(matches!(test.admit(old, later), Verdict::Demand(_)));
        assert!(matches!(test.admit_proven(2, HONEST, later), Verdict::Waits));
    }

    #[test]
    fn a_spoofer_of_an_honest_peers_address_locks_nobody_out() {
        let mut test = Test::loaded(START);
        for number in 0..100_000 {
            let verdict = test.admit(message(number, HONEST, None), START);
            assert!(!matches!(verdict, Verdict::Waits | Verdict::Displaces));
        }
        // Its bucket is full.
        for number in 0..5 {
            let verdict = test.admit_proven(number, HONEST, START);
            assert!(matches!(verdict, Verdict::Waits), "{verdict:?}");
        }
    }

    #[test]
    fn a_source_with_a_cookie_has_only_so_many_tokens() {
        let mut test = Test::loaded(START);
        for number in 0..5 {
            assert!(matches!(test.admit_proven(number, HONEST, START), Verdict::Waits));
        }
        for from in [HONEST, "192.0.2.7:1"] {
            let verdict = test.admit_proven(9, from, START);
            assert!(matches!(verdict, Verdict::Refused(DropReason::RateLimited)), "{verdict:?}");
        }
        assert!(matches!(test.admit_proven(5, "192.0.2.8:1", START), Verdict::Waits));
        assert!(matches!(test.admit_proven(6, HONEST, START + MS * 50), Verdict::Waits));
    }

    #[test]
    fn cookie_replies_have_one_budget_for_all() {
        let mut test = Test::loaded(START);
        let mut demanded = 0;
        for i in 0..20_000_u32 {
            let from = format!("10.{}.{}.{}:9", i >> 16, i >> 8 & 255, i & 255);
            // 20,000 within half a second.
            match test.admit(message(i, &from, None), START + Duration::from_micros(25) * i) {
                Verdict::Demand(_) => demanded += 1,
                Verdict::Refused(DropReason::RateLimited) => {}
                verdict => panic!("{verdict:?}"),
            }
        }
        assert!((5_400..=5_600).contains(&demanded), "{demanded}");
        // With a cookie one is not concerned.
        let now = START + MS * 500;
        assert!(matches!(test.admit_proven(1, HONEST, now), Verdict::Waits));
    }

    #[test]
    fn under_load_the_newest_goes_first_and_the_oldest_makes_room() {
        let mut test = Test::loaded(START);
        for i in 0..600 {
            let verdict = test.admit_proven(i, &format!("10.0.{}.{}:9", i >> 8, i & 255), START);
            assert_eq!(matches!(verdict, Verdict::Displaces), i >= 512, "{i}: {verdict:?}");
        }
        assert_eq!(test.out(START), (88..600).rev().collect::<Vec<_>>());
    }

    #[test]
    fn what_came_before_the_load_has_to_prove_itself() {
        let mut test = Test::new();
        let proven = test.proven(0, HONEST, START);
        test.admit(proven, START);
        test.admit(message(1, "192.0.2.9:9", None), START);
        assert!(test.lanes.recall(START).is_none());
        test.lanes.load.waiting(WAITING_MAX, START);
        assert!(test.lanes.next(START).is_none(), "none has proved its address");
        let mut verdicts = Vec::new();
        while let Some(datagram) = test.lanes.recall(START) {
            verdicts.push(test.admit(datagram, START));
        }
        assert!(matches!(verdicts[..], [Verdict::Demand(_), Verdict::Waits]), "{verdicts:?}");
        assert_eq!(test.out(START), [0]);
    }

    #[test]
    fn what_waits_at_the_end_of_the_load_is_handled_first() {
        let mut test = Test::loaded(START);
        test.admit_proven(1, HONEST, START);
        test.admit_proven(2, HONEST, START);
        let after = START + HOLD_TIME;
        test.admit(message(3, HONEST, None), after);
        assert_eq!(test.out(after), [1, 2, 3]);
    }

    #[test]
    fn lanes_never_grow() {
        let mut test = Test::new();
        let room = [test.lanes.calm.capacity(), test.lanes.proven.capacity()];
        for i in 0..20_000_u32 {
            let now = START + MS * (i / 10);
            let from = format!("10.{}.{}.{}:9", i >> 16, i >> 8 & 255, i & 255);
            if i % 3 == 0 {
                test.admit(message(i, &from, None), now);
            } else {
                test.admit_proven(i, &from, now);
            }
        }
        assert_eq!([test.lanes.calm.capacity(), test.lanes.proven.capacity()], room);
    }
}
