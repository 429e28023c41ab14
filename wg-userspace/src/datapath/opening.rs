//! A batch of datagrams that may be opened by another thread.

use std::sync::{Arc, Weak};

use arrayvec::ArrayVec;
use wg_common::endpoint::Endpoint;
use wg_common::id::{Counter, ReceiverIndex, WorkerId};
use wg_common::protocol::TRANSPORT_HEADER_LEN;

use super::BATCH_LEN;
use super::fan_out::{Bundle, Line, ToHelper};
use super::inbound::Arrival;
use super::shared::{DATAGRAM_LEN_MAX, Shared};
use crate::aead::{BatchAead, Job};
use crate::counters::Path;
use crate::session::{Keypair, Receiving};

/// Bytes before each datagram: with the transport header they put the sealed packet on a multiple of 64, which
/// the AEAD likes.
const HEADROOM: usize = 64 - TRANSPORT_HEADER_LEN;
/// Room for the datagrams of a bundle: a batch of the usual size, and one of any size.
const BYTES_LEN: usize = 160 << 10;
const _: () = assert!(slot_len(DATAGRAM_LEN_MAX) <= BYTES_LEN);
/// Bundles of a line. What one call of the kernel gives may fill half of them.
const BUNDLE_COUNT: usize = 40;
/// Bundles that are free before the kernel is asked for datagrams: sixteen buffers are a batch each at most if
/// they hold runs, and a few more may come before them.
const ROOM: usize = 20;

/// Bytes that a datagram takes. An odd number of cache lines, so that the beginnings of datagrams do not meet in
/// the same few sets of the cache.
const fn slot_len(len: usize) -> usize {
    ((HEADROOM + len).div_ceil(64) | 1) * 64
}

/// A line of them, with these helpers.
pub(super) fn line(
    shared: &Arc<Shared>,
    aead: &'static dyn BatchAead,
    helpers: Vec<ToHelper<Opening>>,
) -> Line<Opening> {
    let crew = Arc::clone(&shared.crew);
    Line::new(crew, helpers, BUNDLE_COUNT, || Opening::new(Arc::clone(shared), aead), ROOM)
}

/// The bundle: copies of datagrams, since the memory that they came in is wanted back.
pub struct Opening {
    shared: Arc<Shared>,
    aead: &'static dyn BatchAead,
    bytes: Box<[u8]>,
    /// Where its first multiple of 64 is.
    begin: usize,
    /// Where room is left, from there on.
    free: usize,
    datagrams: ArrayVec<Copied, BATCH_LEN>,
    groups: ArrayVec<Group, BATCH_LEN>,
    /// Whether it was tried to open them.
    is_done: bool,
}

/// A keypair of the batch.
struct Group {
    index: ReceiverIndex,
    /// Until it is done.
    keypair: Option<Arc<Keypair>>,
    /// To know it again.
    known: Weak<Keypair>,
}

/// A datagram in the bundle.
struct Copied {
    start: usize,
    len: usize,
    group: usize,
    counter: Counter,
    from: Endpoint,
    tos: u8,
    path: Path,
    worker: WorkerId,
    is_open: bool,
}

/// What is to be known of a datagram when it is released.
#[derive(Clone, Copy)]
pub(super) struct Opened {
    /// Its keypair, among [`Opening::keypairs`].
    pub group: usize,
    pub counter: Counter,
    /// Whether its tag is right.
    pub is_open: bool,
}

impl Opening {
    fn new(shared: Arc<Shared>, aead: &'static dyn BatchAead) -> Self {
        // Zeroed memory that nobody touches costs no page until a datagram needs it.
        let bytes = vec![0; BYTES_LEN + 63].into_boxed_slice();
        // Only speed hangs on it.
        let begin = bytes.as_ptr().align_offset(64).min(63);
        let (datagrams, groups) = (ArrayVec::new(), ArrayVec::new());
        Self { shared, aead, bytes, begin, free: 0, datagrams, groups, is_done: false }
    }

    /// Whether there is room for one more of so many bytes.
    pub(super) fn has_room(&self, len: usize) -> bool {
        !self.datagrams.is_full() && self.free + slot_len(len) <= BYTES_LEN
    }

    /// Copies a datagram, for which there is room.
    pub(super) fn push(
        &mut self,
        datagram: &Arrival<'_>,
        (index, keypair): (ReceiverIndex, &Receiving),
        counter: Counter,
    ) {
        let known = self.groups.iter().rposition(|group| group.index == index);
        let group = known.unwrap_or_else(|| {
            let keypair = Arc::clone(keypair.keypair());
            let known = Arc::downgrade(&keypair);
            self.groups.push(Group { index, keypair: Some(keypair), known });
            self.groups.len() - 1
        });
        let (start, len) = (self.begin + self.free + HEADROOM, datagram.bytes.len());
        self.bytes[start..start + len].copy_from_slice(datagram.bytes);
        self.free += slot_len(len);
        let Arrival { from, tos, path, worker, .. } = *datagram;
        self.datagrams.push(Copied {
            start,
            len,
            group,
            counter,
            from,
            tos,
            path,
            worker,
            is_open: false,
        });
    }

    /// Whether it was tried to open them.
    pub(super) fn is_done(&self) -> bool {
        self.is_done
    }

    /// The keypairs that they were for.
    pub(super) fn keypairs(&self) -> impl Iterator<Item = (ReceiverIndex, &Weak<Keypair>)> {
        self.groups.iter().map(|group| (group.index, &group.known))
    }

    /// The datagrams as they came, but opened, and what became of each.
    pub(super) fn arrivals(&mut self) -> impl Iterator<Item = (Opened, Arrival<'_>)> {
        let (mut rest, mut at) = (&mut self.bytes[..], 0);
        self.datagrams.iter().map(move |datagram| {
            let Copied { start, len, group, counter, from, tos, path, worker, is_open } = *datagram;
            let (bytes, behind) = std::mem::take(&mut rest)[start - at..].split_at_mut(len);
            (rest, at) = (behind, start + len);
            let opened = Opened { group, counter, is_open };
            (opened, Arrival { bytes, from, tos, path, worker })
        })
    }
}

impl Bundle for Opening {
    fn len(&self) -> usize {
        self.datagrams.len()
    }

    fn work(&mut self) {
        let Self { shared, aead, bytes, datagrams, groups, is_done, .. } = self;
        let mut keypairs = groups.iter().filter_map(|group| group.keypair.as_ref());
        if keypairs.all(|keypair| shared.may_use(keypair)) {
            let mut jobs: ArrayVec<Job<'_>, BATCH_LEN> = ArrayVec::new();
            let (mut rest, mut at) = (&mut bytes[..], 0);
            for datagram in &*datagrams {
                let (start, end) =
                    (datagram.start + TRANSPORT_HEADER_LEN, datagram.start + datagram.len);
                let (buffer, behind) = rest[start - at..].split_at_mut(end - start);
                (rest, at) = (behind, end);
                let keypair = groups[datagram.group].keypair.as_ref();
                let key = keypair.expect("it is not done yet").open_key();
                jobs.push(Job::new(key, datagram.counter.0, buffer));
            }
            aead.open(&mut jobs);
            let opened: ArrayVec<bool, BATCH_LEN> = jobs.iter().map(|job| job.ok).collect();
            drop(jobs);
            for (datagram, is_open) in datagrams.iter_mut().zip(opened) {
                datagram.is_open = is_open;
            }
            *is_done = true;
        }
        groups.iter_mut().for_each(|group| group.keypair = None);
    }

    fn clear(&mut self) {
        self.datagrams.clear();
        self.groups.clear();
        (self.free, self.is_done) = (0, false);
    }
}
