//! What a call is given, in the order in which it is worked at.

use std::marker::PhantomData;

use arrayvec::ArrayVec;
use wg_common::protocol::{KEY_LEN, TAG_LEN};

use super::super::Job;
use super::chacha::BLOCK_LEN;

/// Jobs that are listed, and sorted, at a time.
pub(super) const WINDOW: usize = 64;

/// What ChaCha20's block counter of 32 bits reaches, without the block of the one-time key.
const PACKET_LEN_MAX: usize = BLOCK_LEN * u32::MAX as usize;

/// Lengths from this many blocks on are not told apart.
const SORTED_BLOCKS_MAX: usize = 31;

/// A job's packet and its tag, held by address: lanes of one pass work at many packets at once.
///
/// Exists while the job's buffer is borrowed, and nobody else reads or writes that meanwhile.
#[derive(Clone, Copy)]
pub(super) struct Packet<'a> {
    /// The job's place in the window.
    pub index: usize,
    pub key: &'a [u8; KEY_LEN],
    pub counter: u64,
    data: *mut u8,
    len: usize,
    buffer: PhantomData<&'a mut [u8]>,
}

impl<'a> Packet<'a> {
    /// The packet of `job`, if its buffer can hold a tag.
    fn of(index: usize, job: &'a mut Job<'_>) -> Option<Self> {
        let len = packet_len(job)?;
        let (key, data) = (job.key.expose(), job.buffer.as_mut_ptr());
        Some(Self { index, key, counter: job.counter, data, len, buffer: PhantomData })
    }

    /// Bytes before the tag.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Blocks of ChaCha20 that the packet takes, beside that of its one-time key.
    pub fn block_count(&self) -> usize {
        self.len.div_ceil(BLOCK_LEN)
    }

    /// The packet's first byte. [`Self::len`] bytes may be read and written there.
    pub fn data(&self) -> *mut u8 {
        self.data
    }

    /// The tag that stands behind the packet.
    pub fn tag(&self) -> [u8; TAG_LEN] {
        // SAFETY: `of` saw that the buffer has as many bytes behind `len`, and it is still borrowed.
        unsafe { self.data.add(self.len).cast::<[u8; TAG_LEN]>().read() }
    }

    /// Writes the tag behind the packet.
    pub fn set_tag(&self, tag: [u8; TAG_LEN]) {
        // SAFETY: as above; nobody else has the buffer.
        unsafe { self.data.add(self.len).cast::<[u8; TAG_LEN]>().write(tag) }
    }
}

/// Whether the job's buffer can hold a tag, and what is before it is not too long for the cipher.
pub(super) fn is_possible(job: &Job<'_>) -> bool {
    packet_len(job).is_some()
}

fn packet_len(job: &Job<'_>) -> Option<usize> {
    job.buffer.len().checked_sub(TAG_LEN).filter(|len| *len <= PACKET_LEN_MAX)
}

/// Lists the packets of a window's jobs; none for those that are not possible.
///
/// Packets of about the same length stand together, so that the eight that `poly1305` takes at once
/// have few idle lanes.
pub(super) fn list<'a>(jobs: &'a mut [Job<'_>], packets: &mut ArrayVec<Packet<'a>, WINDOW>) {
    let (mut first, mut is_even) = (None, true);
    for (i, job) in jobs.iter_mut().enumerate() {
        let Some(packet) = Packet::of(i, job) else { continue };
        is_even &= rank(&packet) == *first.get_or_insert(rank(&packet));
        packets.push(packet);
    }
    if !is_even {
        sort(packets);
    }
}

/// What is sorted by.
fn rank(packet: &Packet<'_>) -> usize {
    (packet.len / BLOCK_LEN).min(SORTED_BLOCKS_MAX)
}

/// Sorts by counting: first how many there are of each rank, so where each rank begins; then each
/// packet goes to its rank's next place.
fn sort(packets: &mut ArrayVec<Packet<'_>, WINDOW>) {
    let mut next = [0; SORTED_BLOCKS_MAX + 2];
    for packet in &*packets {
        next[rank(packet) + 1] += 1;
    }
    for rank in 1..next.len() {
        next[rank] += next[rank - 1];
    }
    let mut order = [0; WINDOW];
    for (i, packet) in packets.iter().enumerate() {
        let place = &mut next[rank(packet)];
        order[*place] = i;
        *place += 1;
    }
    let unsorted = packets.clone();
    for (packet, i) in packets.iter_mut().zip(order) {
        *packet = unsorted[i];
    }
}
