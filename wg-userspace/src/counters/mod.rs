//! What workers count: one writer each, summed for whoever asks.
//!
//! Every thread that handles packets has [`Counters`] of its own and adds to them without a locked
//! instruction; [`Totals::sum`] reads all of them at any time, for `tidegate show`, reports and
//! metrics. Bytes of single peers are not here, they belong to the peer (`session`).

use std::iter::Sum;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::ser::{Serialize, SerializeMap, SerializeStruct, Serializer};
use wg_common::outcome::DropReason;

/// The way by which a tunnel packet (a transport data message) came or went.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Path {
    /// An XSK.
    Xsk,
    /// An ordinary UDP socket.
    Socket,
}

impl Path {
    /// All paths, in the order of their values.
    pub const ALL: &[Path] = &[Path::Xsk, Path::Socket];
    /// Number of paths.
    pub const COUNT: usize = Self::ALL.len();

    /// The path's name in `tidegate show`, reports and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Path::Xsk => "xsk",
            Path::Socket => "socket",
        }
    }
}

/// What one thread counts.
///
/// Anyone may read, but only one thread may add: an addition is a load and a store, and those of
/// two writers could swallow each other. Begins at a pair of cache lines (which processors fetch
/// together), so that neighbours in an array do not slow each other down.
#[derive(Debug)]
#[repr(align(128))]
pub struct Counters {
    dropped: [AtomicU64; DropReason::COUNT],
    received: [AtomicU64; Path::COUNT],
    sent: [AtomicU64; Path::COUNT],
    handed_on: AtomicU64,
    fanned_out: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            dropped: [const { AtomicU64::new(0) }; DropReason::COUNT],
            received: [const { AtomicU64::new(0) }; Path::COUNT],
            sent: [const { AtomicU64::new(0) }; Path::COUNT],
            handed_on: AtomicU64::new(0),
            fanned_out: AtomicU64::new(0),
        }
    }
}

impl Counters {
    /// Counts `n` packets that were dropped.
    #[inline]
    pub fn drop(&self, reason: DropReason, n: u64) {
        add(&self.dropped[reason as usize], n);
    }

    /// As [`Counters::drop`], for a table that several threads write, all of them by this.
    pub fn drop_shared(&self, reason: DropReason, n: u64) {
        self.dropped[reason as usize].fetch_add(n, Ordering::Relaxed);
    }

    /// Counts `n` tunnel packets that came from a peer: opened and not a replay.
    #[inline]
    pub fn received(&self, path: Path, n: u64) {
        add(&self.received[path as usize], n);
    }

    /// Counts `n` tunnel packets that were handed on to the worker at which their keypair is at home.
    #[inline]
    pub fn handed_on(&self, n: u64) {
        add(&self.handed_on, n);
    }

    /// Counts `n` batches that were given to another thread to be sealed or opened.
    #[inline]
    pub fn fanned_out(&self, n: u64) {
        add(&self.fanned_out, n);
    }

    /// Counts `n` tunnel packets that were handed to the NIC or the socket.
    #[inline]
    pub fn sent(&self, path: Path, n: u64) {
        add(&self.sent[path as usize], n);
    }
}

#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// The sums of all threads' [`Counters`] at about one moment.
///
/// Serialized as `{"dropped": {"bad_length": 0, …}, "received": {"xsk": 0, "socket": 0}, "sent": {…}, "handed_on": 0,
/// "fanned_out": 0}`: every name is always there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Totals {
    dropped: [u64; DropReason::COUNT],
    received: [u64; Path::COUNT],
    sent: [u64; Path::COUNT],
    handed_on: u64,
    fanned_out: u64,
}

impl Default for Totals {
    fn default() -> Self {
        Self {
            dropped: [0; DropReason::COUNT],
            received: [0; Path::COUNT],
            sent: [0; Path::COUNT],
            handed_on: 0,
            fanned_out: 0,
        }
    }
}

impl Totals {
    /// Adds up what the threads have counted until now.
    pub fn sum<'a>(counters: impl IntoIterator<Item = &'a Counters>) -> Self {
        counters.into_iter().sum()
    }

    /// Packets dropped for `reason`.
    pub const fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped[reason as usize]
    }

    /// Tunnel packets received by `path`.
    pub const fn received(&self, path: Path) -> u64 {
        self.received[path as usize]
    }

    /// Tunnel packets sent by `path`.
    pub const fn sent(&self, path: Path) -> u64 {
        self.sent[path as usize]
    }

    /// Tunnel packets that were handed on to the worker at which their keypair is at home.
    pub const fn handed_on(&self) -> u64 {
        self.handed_on
    }

    /// Batches that were given to another thread to be sealed or opened.
    pub const fn fanned_out(&self) -> u64 {
        self.fanned_out
    }

    /// Drop reasons that occurred, with their counts.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> {
        DropReason::ALL.iter().map(|&reason| (reason, self.dropped(reason))).filter(|&(_, n)| n > 0)
    }
}

impl<'a> Sum<&'a Counters> for Totals {
    fn sum<I: Iterator<Item = &'a Counters>>(counters: I) -> Self {
        let mut totals = Totals::default();
        for one in counters {
            accumulate(&mut totals.dropped, &one.dropped);
            accumulate(&mut totals.received, &one.received);
            accumulate(&mut totals.sent, &one.sent);
            for (total, counter) in
                [(&mut totals.handed_on, &one.handed_on), (&mut totals.fanned_out, &one.fanned_out)]
            {
                accumulate(std::slice::from_mut(total), std::slice::from_ref(counter));
            }
        }
        totals
    }
}

fn accumulate(totals: &mut [u64], counters: &[AtomicU64]) {
    for (total, counter) in totals.iter_mut().zip(counters) {
        *total = total.wrapping_add(counter.load(Ordering::Relaxed));
    }
}

impl Serialize for Totals {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let reasons = || DropReason::ALL.iter().map(|reason| reason.name());
        let paths = || Path::ALL.iter().map(|path| path.name());
        let mut fields = serializer.serialize_struct("Totals", 5)?;
        fields.serialize_field("dropped", &Named(|| reasons().zip(self.dropped)))?;
        fields.serialize_field("received", &Named(|| paths().zip(self.received)))?;
        fields.serialize_field("sent", &Named(|| paths().zip(self.sent)))?;
        fields.serialize_field("handed_on", &self.handed_on)?;
        fields.serialize_field("fanned_out", &self.fanned_out)?;
        fields.end()
    }
}

/// A map from name to count, from a function that lists them.
struct Named<F>(F);

impl<I, F> Serialize for Named<F>
where
    I: Iterator<Item = (&'static str, u64)>,
    F: Fn() -> I,
{
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, n) in (self.0)() {
            map.serialize_entry(name, &n)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_the_sums_of_all_workers() {
        let workers = [Counters::default(), Counters::default()];
        workers[0].drop(DropReason::Replay, 2);
        workers[1].drop(DropReason::Replay, 3);
        workers[1].drop(DropReason::NoPeer, 1);
        workers[0].received(Path::Xsk, 64);
        workers[0].received(Path::Socket, 1);
        workers[1].sent(Path::Socket, 7);
        workers.iter().for_each(|worker| worker.fanned_out(4));
        let totals = Totals::sum(&workers);
        assert_eq!(totals.dropped(DropReason::Replay), 5);
        assert_eq!(totals.dropped(DropReason::BadTag), 0);
        assert_eq!(totals.received(Path::Xsk), 64);
        assert_eq!(totals.received(Path::Socket), 1);
        assert_eq!(totals.sent(Path::Xsk), 0);
        assert_eq!(totals.sent(Path::Socket), 7);
        assert_eq!((totals.fanned_out(), totals.handed_on()), (8, 0));
        let drops: Vec<_> = totals.drops().collect();
        assert_eq!(drops, [(DropReason::Replay, 5), (DropReason::NoPeer, 1)]);
        assert_eq!(Totals::sum(&[]), Totals::default());
    }

    #[test]
    fn every_reason_and_path_has_a_counter_of_its_own() {
        let counters = Counters::default();
        for (i, &reason) in DropReason::ALL.iter().enumerate() {
            counters.drop(reason, 100 + i as u64);
        }
        for (i, &path) in Path::ALL.iter().enumerate() {
            counters.received(path, 200 + i as u64);
            counters.sent(path, 300 + i as u64);
        }
        let totals = Totals::sum([&counters]);
        for (i, &reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(totals.dropped(reason), 100 + i as u64);
        }
        for (i, &path) in Path::ALL.iter().enumerate() {
            assert_eq!(totals.received(path), 200 + i as u64);
            assert_eq!(totals.sent(path), 300 + i as u64);
        }
    }

    #[test]
    fn totals_are_serialized_by_name() {
        let counters = Counters::default();
        counters.drop(DropReason::BadTag, 3);
        counters.received(Path::Xsk, 9);
        let json = serde_json::to_value(Totals::sum([&counters])).unwrap();
        assert_eq!(json["dropped"].as_object().unwrap().len(), DropReason::COUNT);
        assert_eq!(json["dropped"]["bad_tag"], 3);
        assert_eq!(json["dropped"]["replay"], 0);
        assert_eq!(json["received"], serde_json::json!({"xsk": 9, "socket": 0}));
        assert_eq!(json["sent"], serde_json::json!({"xsk": 0, "socket": 0}));
    }

    #[test]
    fn readers_see_counts_of_a_running_writer_grow() {
        let counters = Counters::default();
        std::thread::scope(|scope| {
            scope.spawn(|| (0..10_000).for_each(|_| counters.drop(DropReason::Replay, 1)));
            let mut seen = 0;
            while seen < 10_000 {
                let now = Totals::sum([&counters]).dropped(DropReason::Replay);
                assert!(now >= seen);
                seen = now;
            }
        });
    }
}
