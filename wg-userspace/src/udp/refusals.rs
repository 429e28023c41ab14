//! Where runs were refused of late, so that the refusal is not paid for with each batch.
//!
//! A run can be refused because of its pieces' length (the path's MTU is smaller: alone, each is cut up),
//! or because of what the kernel sends by (a NIC without checksums, a policy of IPsec). Both can change,
//! so that it is tried again after a while.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use wg_common::time::Now;

/// How long a refusal is remembered.
const REMEMBERED_FOR: Duration = Duration::from_secs(10);
/// Destinations that are remembered. With more than these, no runs are tried at all for a while.
const PLACE_COUNT: usize = 16;

/// What one socket remembers. One thread writes nearly always; where two do, a mixture of what they
/// remember costs speed and nothing else.
#[derive(Debug, Default)]
pub struct Refusals {
    hasher: RandomState,
    places: [Place; PLACE_COUNT],
    /// Boot time in nanoseconds until which nothing takes runs.
    all_until: AtomicU64,
    /// Boot time in nanoseconds at which the last of these is forgotten; 0 if there is none.
    any_until: AtomicU64,
}

#[derive(Debug, Default)]
struct Place {
    /// Hash of the destination's address.
    key: AtomicU64,
    /// Boot time in nanoseconds.
    until: AtomicU64,
    /// Runs of shorter pieces than this may go.
    piece_len: AtomicUsize,
}

impl Refusals {
    /// Whether nothing is remembered: nobody needs to look at the clock.
    pub fn is_empty(&self) -> bool {
        self.any_until.load(Ordering::Relaxed) == 0
    }

    /// Whether a run of pieces of `piece_len` bytes to `remote` may be tried.
    pub fn allows(&self, remote: IpAddr, piece_len: usize, now: Now) -> bool {
        let any_until = self.any_until.load(Ordering::Relaxed);
        if now.boot_ns() >= any_until {
            // Unless there is a new one by now.
            let _ =
                self.any_until.compare_exchange(any_until, 0, Ordering::Relaxed, Ordering::Relaxed);
            return true;
        }
        if now.boot_ns() < self.all_until.load(Ordering::Relaxed) {
            return false;
        }
        self.place_of(self.key_of(remote), now)
            .is_none_or(|place| piece_len < place.piece_len.load(Ordering::Relaxed))
    }

    /// Takes note that `remote` took no run of pieces of `piece_len` bytes; 0 stands for any.
    pub fn refused_by(&self, remote: IpAddr, piece_len: usize, now: Now) {
        let until = (now + REMEMBERED_FOR).boot_ns();
        let key = self.key_of(remote);
        if let Some(place) = self.place_of(key, now) {
            place.piece_len.fetch_min(piece_len, Ordering::Relaxed);
            place.until.store(until, Ordering::Relaxed);
        } else if let Some(place) = self.places.iter().find(|place| !place.is_in_use(now)) {
            place.key.store(key, Ordering::Relaxed);
            place.piece_len.store(piece_len, Ordering::Relaxed);
            place.until.store(until, Ordering::Relaxed);
        } else {
            return self.refused_by_all(now);
        }
        self.any_until.fetch_max(until, Ordering::Relaxed);
    }

    /// Takes note that no destination takes runs.
    pub fn refused_by_all(&self, now: Now) {
        let until = (now + REMEMBERED_FOR).boot_ns();
        self.all_until.store(until, Ordering::Relaxed);
        self.any_until.fetch_max(until, Ordering::Relaxed);
    }

    fn key_of(&self, remote: IpAddr) -> u64 {
        self.hasher.hash_one(remote)
    }

    fn place_of(&self, key: u64, now: Now) -> Option<&Place> {
        let is_its =
            |place: &&Place| place.is_in_use(now) && place.key.load(Ordering::Relaxed) == key;
        self.places.iter().find(is_its)
    }
}

impl Place {
    fn is_in_use(&self, now: Now) -> bool {
        now.boot_ns() < self.until.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Now = Now::from_boot_ns(1_000_000_000);

    fn host(number: u8) -> IpAddr {
        [192, 0, 2, number].into()
    }

    #[test]
    fn a_length_is_refused_to_one_destination_for_a_while() {
        let refusals = Refusals::default();
        assert!(refusals.is_empty() && refusals.allows(host(1), 1452, START));
        refusals.refused_by(host(1), 1452, START);
        assert!(!refusals.is_empty());
        for (remote, piece_len, is_allowed) in
            [(1, 1452, false), (1, 1453, false), (1, 1451, true), (2, 1452, true)]
        {
            assert_eq!(refusals.allows(host(remote), piece_len, START), is_allowed);
        }
        // The path is narrower still.
        refusals.refused_by(host(1), 1300, START);
        refusals.refused_by(host(1), 1400, START);
        assert!(!refusals.allows(host(1), 1300, START) && refusals.allows(host(1), 1299, START));

        let later = START + REMEMBERED_FOR;
        assert!(refusals.allows(host(1), 1452, later) && refusals.is_empty());
        refusals.refused_by(host(1), 1452, later);
        assert!(refusals.allows(host(1), 1451, later), "what was before is forgotten");
    }

    #[test]
    fn zero_refuses_every_length() {
        let refusals = Refusals::default();
        refusals.refused_by(host(1), 0, START);
        assert!(!refusals.allows(host(1), 1, START) && refusals.allows(host(2), 1, START));
    }

    #[test]
    fn more_destinations_than_there_is_room_for_stop_all_runs() {
        let refusals = Refusals::default();
        (0..PLACE_COUNT as u8).for_each(|i| refusals.refused_by(host(i), 0, START));
        assert!(refusals.allows(host(200), 1452, START));
        refusals.refused_by(host(100), 0, START);
        assert!(!refusals.allows(host(200), 1452, START));
        let later = START + REMEMBERED_FOR;
        assert!(refusals.allows(host(200), 1452, later) && refusals.is_empty());
        refusals.refused_by(host(100), 0, later);
        assert!(refusals.allows(host(200), 1452, later), "places are free again");
    }

    #[test]
    fn a_socket_can_be_told_that_nothing_takes_runs() {
        let refusals = Refusals::default();
        refusals.refused_by_all(START);
        assert!(!refusals.allows(host(1), 1, START));
        assert!(refusals.allows(host(1), 1, START + REMEMBERED_FOR));
    }
}
