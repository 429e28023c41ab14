//! Which unknown senders are looked up: what may be pending, what is known to be unknown.
//!
//! Decisions only; who asks a source, and how, is somebody else's business. Everything in here has a
//! size that is fixed by [`Limits`]: whoever makes keypairs by the million and knocks with each of
//! them gets [`DropReason::LookupLimit`], and takes the places of others only as far as his source
//! addresses reach.

use std::net::IpAddr;
use std::time::Duration;

use blake2::Blake2sMac;
use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use hashbrown::HashMap;
use rand_core::Rng;
use wg_common::outcome::DropReason;
use wg_common::time::Now;

use crate::datapath::handoff::HandshakeDatagram;
use crate::key::PublicKey;
use crate::noise::Timestamp;
use crate::rate::{Bucket, Rate, Source};

/// What look-ups of unknown senders may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Look-ups that may be pending.
    pub pending_max: usize,
    /// Look-ups that may be pending for one source: an IPv4 address, or an IPv6 prefix of 64 bits.
    pub pending_per_source_max: usize,
    /// A look-up that was not answered for so long has failed.
    pub timeout: Duration,
    /// How often a source is asked.
    pub rate: Rate,
    /// How often it is asked for one source address. A peer asks every five seconds at most, but many
    /// may be behind one address.
    pub rate_per_source: Rate,
    /// Rounded up to a power of two. Sources beyond share their rates.
    pub source_count: usize,
    /// How long a key stays unknown.
    pub unknown_ttl: Duration,
    /// How long a look-up that failed is not tried again.
    pub failed_ttl: Duration,
    /// Keys that are remembered as unknown. Rounded up to a power of two.
    pub unknown_count: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pending_max: 1024,
            pending_per_source_max: 8,
            timeout: Duration::from_secs(10),
            rate: Rate::new(500, 1000),
            rate_per_source: Rate::new(32, 64),
            source_count: 4096,
            unknown_ttl: Duration::from_secs(30),
            failed_ttl: Duration::from_secs(1),
            // All that the rate allows within the time.
            unknown_count: 16_384,
        }
    }
}

/// An initiation that waits for its sender to be looked up. It is authentic: its sender has the
/// private key, whoever he is.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// The message.
    pub datagram: HandshakeDatagram,
    /// When it was made, by the sender's clock.
    pub timestamp: Timestamp,
}

/// What is to be done about an initiation that was taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Admission {
    /// The source is to be asked.
    New,
    /// It has been asked already.
    Pending,
}

/// How a look-up ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// The sender is a peer now.
    Known,
    /// It will not be one.
    Unknown,
    /// The source knows the sender, but its initiation is a replay.
    Replayed,
    /// Nobody can tell at present.
    Failed,
}

/// The look-ups of one device.
pub struct Lookups {
    limits: Limits,
    /// For what is chosen by strangers.
    hash_key: [u8; 32],
    pending: HashMap<PublicKey, Pending>,
    pending_by_source: HashMap<Source, usize>,
    unknown: UnknownKeys,
    bucket: Bucket,
    source_buckets: Box<[Bucket]>,
}

struct Pending {
    waiting: Waiting,
    since: Now,
    /// Who counts it: the source of its first initiation.
    source: Source,
}

impl Lookups {
    /// Nothing is pending, nobody unknown. All memory that it ever needs is allocated here.
    pub fn new(limits: Limits, rng: &mut (impl Rng + ?Sized)) -> Self {
        // A map that is less than half full takes the places of removed entries again, and never grows.
        let map_capacity = 2 * limits.pending_max;
        let mut hash_key = [0; 32];
        rng.fill_bytes(&mut hash_key);
        Self {
            hash_key,
            pending: HashMap::with_capacity(map_capacity),
            pending_by_source: HashMap::with_capacity(map_capacity),
            unknown: UnknownKeys::new(limits.unknown_count),
            bucket: Bucket::default(),
            source_buckets: (0..limits.source_count.next_power_of_two())
                .map(|_| Bucket::default())
                .collect(),
            limits,
        }
    }

    /// Whether an initiation of `key` would be taken. Changes nothing: to be asked before the
    /// initiation is authenticated, which costs more.
    ///
    /// # Errors
    /// [`DropReason::UnknownPeer`] if it is known that nobody knows the sender,
    /// [`DropReason::LookupLimit`] if too much is pending, or was asked just now.
    pub fn check(&self, key: &PublicKey, from: IpAddr, now: Now) -> Result<Admission, DropReason> {
        if self.pending.contains_key(key) {
            return Ok(Admission::Pending);
        }
        if self.unknown.contains(self.hash(key.as_bytes()), now) {
            return Err(DropReason::UnknownPeer);
        }
        let source = Source::of(from);
        let pending_here = self.pending_by_source.get(&source).copied().unwrap_or(0);
        let is_allowed = self.pending.len() < self.limits.pending_max
            && pending_here < self.limits.pending_per_source_max
            && self.bucket.has_token(self.limits.rate, now)
            && self.source_buckets[self.slot_of(source)]
                .has_token(self.limits.rate_per_source, now);
        if is_allowed { Ok(Admission::New) } else { Err(DropReason::LookupLimit) }
    }

    /// Keeps an authentic initiation until its sender is looked up. One that waits already is replaced
    /// by a newer one of the same sender.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn admit(
        &mut self,
        key: PublicKey,
        waiting: Waiting,
        now: Now,
    ) -> Result<Admission, DropReason> {
        let from = waiting.datagram.from.remote.ip();
        let admission = self.check(&key, from, now)?;
        match self.pending.get_mut(&key) {
            // A replay must not displace what the peer has just sent.
            Some(pending) if waiting.timestamp > pending.waiting.timestamp => {
                pending.waiting = waiting;
            }
            Some(_) => {}
            None => {
                let source = Source::of(from);
                let slot = self.slot_of(source);
                self.bucket.take(self.limits.rate, now);
                self.source_buckets[slot].take(self.limits.rate_per_source, now);
                *self.pending_by_source.entry(source).or_default() += 1;
                self.pending.insert(key, Pending { waiting, since: now, source });
            }
        }
        Ok(admission)
    }

    /// The timestamp of the initiation that waits for this look-up, if it is pending.
    pub fn awaited(&self, key: &PublicKey) -> Option<Timestamp> {
        self.pending.get(key).map(|pending| pending.waiting.timestamp)
    }

    /// Ends a look-up, and gives the initiation that waited for it; `None` if none was pending.
    pub fn answered(&mut self, key: &PublicKey, answer: Answer, now: Now) -> Option<Waiting> {
        let pending = self.take(key)?;
        let ttl = match answer {
            // Whoever replays must not shut the peer itself out.
            Answer::Known | Answer::Replayed => None,
            Answer::Unknown => Some(self.limits.unknown_ttl),
            Answer::Failed => Some(self.limits.failed_ttl),
        };
        if let Some(ttl) = ttl {
            self.unknown.insert(self.hash(key.as_bytes()), now + ttl, now);
        }
        Some(pending.waiting)
    }

    /// Forgets a look-up that could not be begun.
    pub fn withdraw(&mut self, key: &PublicKey) {
        self.take(key);
    }

    /// Ends the look-ups that were not answered in time; says how many. To be called several times a
    /// second.
    pub fn expire(&mut self, now: Now) -> usize {
        let timeout = self.limits.timeout;
        let is_late = |pending: &Pending| now.since(pending.since) >= timeout;
        let late: Vec<PublicKey> = self
            .pending
            .iter()
            .filter(|(_, pending)| is_late(pending))
            .map(|(&key, _)| key)
            .collect();
        for key in &late {
            self.answered(key, Answer::Failed, now);
        }
        late.len()
    }

    /// Number of look-ups that are pending.
    pub fn pending_count(&self) -> usize {
        self.pending.len()
    }

    fn take(&mut self, key: &PublicKey) -> Option<Pending> {
        let pending = self.pending.remove(key)?;
        if let Some(count) = self.pending_by_source.get_mut(&pending.source) {
            *count -= 1;
            if *count == 0 {
                self.pending_by_source.remove(&pending.source);
            }
        }
        Some(pending)
    }

    fn slot_of(&self, source: Source) -> usize {
        let mask = self.source_buckets.len() - 1;
        self.hash(&source.to_bytes()) as usize & mask
    }

    /// A hash that nobody outside can aim.
    fn hash(&self, bytes: &[u8]) -> u128 {
        let mut mac = Blake2sMac::<U16>::new_from_slice(&self.hash_key)
            .expect("BLAKE2s takes keys of 32 bytes");
        mac.update(bytes);
        u128::from_le_bytes(mac.finalize_fixed().into())
    }
}

/// Places that a key may have in [`UnknownKeys`].
const WAYS: usize = 4;

/// Keys that nobody knows, by their hashes: a table of fixed size. A key that finds no place takes
/// that of the one which would be forgotten first.
struct UnknownKeys {
    sets: Box<[[UnknownKey; WAYS]]>,
}

#[derive(Clone, Copy, Default)]
struct UnknownKey {
    hash: u128,
    until: Now,
}

impl UnknownKeys {
    fn new(count: usize) -> Self {
        let set_count = count.div_ceil(WAYS).next_power_of_two();
        Self { sets: vec![[UnknownKey::default(); WAYS]; set_count].into() }
    }

    fn set_of(&self, hash: u128) -> usize {
        hash as usize & (self.sets.len() - 1)
    }

    fn contains(&self, hash: u128, now: Now) -> bool {
        self.sets[self.set_of(hash)].iter().any(|key| key.hash == hash && key.until > now)
    }

    fn insert(&mut self, hash: u128, until: Now, now: Now) {
        let set = self.set_of(hash);
        let keys = &mut self.sets[set];
        let place = keys
            .iter_mut()
            .min_by_key(|key| (key.hash != hash, key.until.max(now)))
            .expect("a set has places");
        *place = UnknownKey { hash, until };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use wg_common::endpoint::Endpoint;
    use wg_common::id::{DeviceId, WorkerId};

    use super::*;

    const START: Now = Now::from_boot_ns(1_000_000_000_000);
    const SECOND: Duration = Duration::from_secs(1);
    const TICK: Duration = Duration::from_nanos(1);

    fn lookups() -> Lookups {
        Lookups::new(Limits::default(), &mut StdRng::seed_from_u64(1))
    }

    fn key(number: u64) -> PublicKey {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        PublicKey::from_bytes(bytes)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// An initiation from `from`, made `second` seconds after 1970.
    fn waiting(from: IpAddr, second: u64) -> Waiting {
        let from = Endpoint::configured((from, 51820).into());
        let datagram = HandshakeDatagram::new(DeviceId(0), &[1; 148], from, WorkerId(0)).unwrap();
        Waiting { datagram, timestamp: Timestamp::from_unix(second, 0) }
    }

    fn v4(number: u32) -> IpAddr {
        IpAddr::V4(number.into())
    }

    #[test]
    fn a_sender_is_looked_up_once_and_its_newest_initiation_waits() {
        let mut lookups = lookups();
        let from = ip("192.0.2.1");
        assert_eq!(lookups.admit(key(1), waiting(from, 5), START), Ok(Admission::New));
        assert_eq!(lookups.admit(key(1), waiting(from, 6), START), Ok(Admission::Pending));
        // A replay does not displace it.
        assert_eq!(lookups.admit(key(1), waiting(from, 4), START), Ok(Admission::Pending));
        assert_eq!((lookups.pending_count(), lookups.pending_by_source.len()), (1, 1));
        assert_eq!(lookups.awaited(&key(1)), Some(Timestamp::from_unix(6, 0)));
        let waited = lookups.answered(&key(1), Answer::Known, START).unwrap();
        assert_eq!(waited.timestamp, Timestamp::from_unix(6, 0));
        assert!(lookups.answered(&key(1), Answer::Known, START).is_none());
        assert_eq!((lookups.pending_count(), lookups.pending_by_source.len()), (0, 0));
    }

    #[test]
    fn an_unknown_key_is_not_looked_up_again_for_a_while() {
        for (answer, ttl) in [(Answer::Unknown, SECOND * 30), (Answer::Failed, SECOND)] {
            let mut lookups = lookups();
            let from = ip("192.0.2.1");
            lookups.admit(key(1), waiting(from, 5), START).unwrap();
            lookups.answered(&key(1), answer, START);
            let almost = START + (ttl - TICK);
            assert_eq!(lookups.check(&key(1), from, almost), Err(DropReason::UnknownPeer));
            assert_eq!(lookups.check(&key(1), from, START + ttl), Ok(Admission::New), "{answer:?}");
            assert_eq!(lookups.check(&key(2), from, START), Ok(Admission::New));
        }
    }

    #[test]
    fn a_replay_shuts_nobody_out() {
        let mut lookups = lookups();
        let from = ip("192.0.2.1");
        for answer in [Answer::Known, Answer::Replayed] {
            lookups.admit(key(1), waiting(from, 5), START).unwrap();
            lookups.answered(&key(1), answer, START);
            assert_eq!(lookups.check(&key(1), from, START), Ok(Admission::New));
        }
    }

    #[test]
    fn an_unanswered_look_up_fails_after_its_timeout() {
        let mut lookups = lookups();
        let from = ip("192.0.2.1");
        lookups.admit(key(1), waiting(from, 5), START).unwrap();
        let end = START + Limits::default().timeout;
        // A retry does not keep it alive.
        lookups.admit(key(1), waiting(from, 6), START + SECOND * 9).unwrap();
        assert_eq!(lookups.expire(Now::from_boot_ns(end.boot_ns() - 1)), 0);
        assert_eq!(lookups.expire(end), 1);
        assert_eq!(lookups.pending_count(), 0);
        assert_eq!(lookups.check(&key(1), from, end), Err(DropReason::UnknownPeer));
        assert_eq!(lookups.check(&key(1), from, end + SECOND), Ok(Admission::New));
    }

    #[test]
    fn one_source_has_few_look_ups_pending() {
        // Addresses of one /64 are one source; so is an IPv4 address in either form.
        for (one, other) in [
            ([ip("192.0.2.1"), ip("::ffff:192.0.2.1")], ip("192.0.2.2")),
            ([ip("2001:db8::1"), ip("2001:db8::ffff:0:0:1")], ip("2001:db8:0:1::1")),
        ] {
            let mut lookups = lookups();
            for number in 0..8 {
                let from = one[number as usize % 2];
                assert_eq!(lookups.admit(key(number), waiting(from, 5), START), Ok(Admission::New));
            }
            for from in one {
                assert_eq!(lookups.check(&key(8), from, START), Err(DropReason::LookupLimit));
            }
            assert_eq!(lookups.check(&key(8), other, START), Ok(Admission::New));
            lookups.answered(&key(3), Answer::Known, START);
            assert_eq!(lookups.check(&key(8), one[0], START), Ok(Admission::New));
        }
    }

    #[test]
    fn all_sources_together_have_a_bounded_number_pending() {
        let mut lookups = lookups();
        for number in 0..1000 {
            lookups.admit(key(number), waiting(v4(number as u32), 5), START).unwrap();
        }
        // The rest of the burst comes later.
        let later = START + SECOND;
        for number in 1000..1024 {
            lookups.admit(key(number), waiting(v4(number as u32), 5), later).unwrap();
        }
        let one_more = lookups.admit(key(1024), waiting(v4(1024), 5), later);
        assert_eq!(one_more, Err(DropReason::LookupLimit));
        lookups.expire(START + SECOND * 10);
        assert_eq!(lookups.pending_count(), 24);
    }

    #[test]
    fn rates_bound_what_a_source_is_asked() {
        let Limits { rate, rate_per_source, .. } = Limits::default();
        // One source address; then as many as there are keys.
        for (sources, rate) in [(1, rate_per_source), (u32::MAX, rate)] {
            let mut lookups = lookups();
            let mut asked = 0;
            let seconds = 20;
            for step in 0..seconds * 4000 {
                let now = START + SECOND / 4000 * step;
                let number = key(step.into());
                if lookups.admit(number, waiting(v4(step % sources), 5), now).is_ok() {
                    asked += 1;
                    lookups.answered(&number, Answer::Unknown, now);
                }
            }
            let expected = rate.burst + rate.per_second * seconds;
            assert!(asked <= expected && asked > expected - 10, "{asked} of {expected}");
        }
    }

    #[test]
    fn a_flood_of_unknown_keys_exhausts_nothing() {
        let mut lookups = lookups();
        let pending_bytes = lookups.pending.allocation_size();
        let source_bytes = lookups.pending_by_source.allocation_size();
        let unknown_len = lookups.unknown.sets.len();
        let honest = key(u64::MAX);
        let mut pending = std::collections::VecDeque::new();
        // 2,000,000 keys in 100 s: first from one address, then from everywhere.
        for number in 0..2_000_000_u64 {
            let now = START + Duration::from_micros(50) * number as u32;
            let one_address = number < 1_000_000;
            let from = if one_address { v4(7) } else { v4(1 << 24 | number as u32) };
            if lookups.admit(key(number), waiting(from, 5), now).is_ok() {
                pending.push_back((number, now));
            }
            // The source is slow: one and a half seconds for every answer.
            while pending.front().is_some_and(|&(_, at)| now.since(at) > SECOND * 3 / 2) {
                let (number, _) = pending.pop_front().unwrap();
                lookups.answered(&key(number), Answer::Unknown, now);
            }
            if number % 2000 == 0 {
                lookups.expire(now);
            }
            assert!(lookups.pending_count() <= 1024);
            // From another address, a peer gets through while one address floods.
            if one_address && number % 100_000 == 99_999 {
                let known = lookups.admit(honest, waiting(v4(8), number), now);
                assert_eq!(known, Ok(Admission::New));
                assert!(lookups.answered(&honest, Answer::Known, now).is_some());
            }
        }
        // The flood is over: nothing grew, and everybody gets through.
        let end = START + Duration::from_secs(100) + Limits::default().timeout;
        lookups.expire(end);
        assert_eq!((lookups.pending_count(), lookups.pending_by_source.len()), (0, 0));
        assert_eq!(lookups.pending.allocation_size(), pending_bytes);
        assert_eq!(lookups.pending_by_source.allocation_size(), source_bytes);
        assert_eq!(lookups.unknown.sets.len(), unknown_len);
        for (number, from) in [(1, v4(7)), (2, v4(8)), (3, v4(1 << 24 | 9))] {
            let key = key(u64::MAX - number);
            assert_eq!(lookups.admit(key, waiting(from, 5), end), Ok(Admission::New));
            assert!(lookups.answered(&key, Answer::Known, end).is_some());
        }
    }

    #[test]
    fn what_the_rate_allows_is_remembered() {
        let Limits { rate, unknown_ttl, unknown_count, .. } = Limits::default();
        let most = u64::from(rate.per_second) * unknown_ttl.as_secs() + u64::from(rate.burst);
        assert!(most <= unknown_count as u64);
    }

    proptest! {
        /// Against a plain list: nothing is unknown that was not found to be, and not for longer.
        #[test]
        fn only_what_was_not_found_is_unknown(
            steps in prop::collection::vec((0_u64..6, 0_u32..3, 0_u64..8), 1..200),
            seed in any::<u64>(),
        ) {
            let mut rng = StdRng::seed_from_u64(seed);
            // Few places, so that they are fought for.
            let limits = Limits { unknown_count: 4, pending_max: 3, ..Limits::default() };
            let mut lookups = Lookups::new(limits, &mut rng);
            let mut unknown_until = HashMap::new();
            let mut pending_since = HashMap::new();
            let mut now = START;
            for (number, what, wait) in steps {
                now = now + SECOND * wait as u32;
                let (key, from) = (key(number), v4(rng.random_range(0..4)));
                let unknown = unknown_until.get(&number).is_some_and(|&until| until > now);
                match lookups.admit(key, waiting(from, 5), now) {
                    Err(DropReason::UnknownPeer) => prop_assert!(unknown),
                    Err(reason) => prop_assert_eq!(reason, DropReason::LookupLimit),
                    Ok(_) => {
                        prop_assert!(lookups.awaited(&key).is_some());
                        pending_since.entry(number).or_insert(now);
                    }
                }
                let answer = [Answer::Known, Answer::Unknown, Answer::Failed][what as usize];
                if rng.random_bool(0.7) && lookups.answered(&key, answer, now).is_some() {
                    pending_since.remove(&number);
                    let ttl = [0, 30, 1][what as usize];
                    unknown_until.insert(number, now + SECOND * ttl);
                }
                let late = |since: Now| now.since(since) >= limits.timeout;
                let expected = pending_since.values().filter(|&&since| late(since)).count();
                prop_assert_eq!(lookups.expire(now), expected);
                for (number, _) in pending_since.extract_if(|_, &mut since| late(since)) {
                    unknown_until.insert(number, now + SECOND);
                }
                prop_assert!(lookups.pending_count() <= 3);
                let by_source: usize = lookups.pending_by_source.values().sum();
                prop_assert_eq!(by_source, lookups.pending_count());
            }
        }
    }
}
