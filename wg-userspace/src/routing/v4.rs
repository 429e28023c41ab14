//! IPv4: DIR-16-8-8. A root of 65,536 slots for the first two bytes of an address, chunks of 256
//! slots for the third and the fourth byte where prefixes are that long.
//!
//! Chosen over tries (kernel-style radix, treebitmap, prefix-trie) because a look-up is at most
//! three dependent loads: 27 ns at a million prefixes where tries took 520 to 1,700 ns. It costs
//! memory where prefixes are long and scattered (82 MB for a million /32 in 10.0.0.0/8), and 256 KiB
//! always. Chunks stand in pages of 32, so that sharing them between snapshots takes one reference
//! count for 32 KiB, and finding one takes a load from a table that stays in the cache.

use std::net::Ipv4Addr;
use std::ops::Range;
use std::sync::Arc;

use ipnet::Ipv4Net;
use wg_common::id::PeerId;

use super::Route;

/// Bits of an address that choose a slot of the root.
const ROOT_BITS: u8 = 16;
/// Bits of an address that choose a slot of a chunk.
const CHUNK_BITS: u8 = 8;
const ROOT_LEN: usize = 1 << ROOT_BITS;
const CHUNK_LEN: usize = 1 << CHUNK_BITS;
const _: () = assert!(ROOT_BITS + 2 * CHUNK_BITS == 32);
/// Chunks of a page.
const PAGE_LEN: usize = 32;

type Chunk = [Slot; CHUNK_LEN];
type Page = [Chunk; PAGE_LEN];

/// Which peer owns an IPv4 address.
#[derive(Clone, Debug)]
pub(super) struct Table {
    root: Arc<[Slot; ROOT_LEN]>,
    pages: Vec<Arc<Page>>,
    /// Chunks that are part of the table.
    used_count: usize,
    /// The first free chunk; slot 0 of a free chunk names the next one.
    free: Option<u32>,
}

/// What the table says of one value of an address's first bits: nobody, the owner and the length of
/// the longest prefix, or which chunk says more.
///
/// Bit 31 set: below it a chunk's index. Else bits 25 to 30 are the length, the rest the owner's
/// number plus one. All zero: nobody.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Slot(u32);

const CHUNK_FLAG: u32 = 1 << 31;
const LEN_SHIFT: u32 = 25;
const OWNER_MASK: u32 = (1 << LEN_SHIFT) - 1;
const _: () = assert!(32 << LEN_SHIFT < CHUNK_FLAG as u64);

/// Greatest peer that a slot can name.
pub(super) const PEER_MAX: u32 = OWNER_MASK - 1;

/// Where a slot is: in the root, or in a chunk.
#[derive(Clone, Copy)]
struct Place {
    chunk: Option<u32>,
    index: usize,
}

impl Slot {
    const NOBODY: Slot = Slot(0);

    fn new(route: Option<Route>) -> Slot {
        route.map_or(Slot::NOBODY, |Route { peer, len }| {
            Slot(u32::from(len) << LEN_SHIFT | (peer.0 + 1))
        })
    }

    fn chunk_at(index: u32) -> Slot {
        Slot(CHUNK_FLAG | index)
    }

    #[inline]
    fn chunk(self) -> Option<u32> {
        (self.0 & CHUNK_FLAG != 0).then_some(self.0 & !CHUNK_FLAG)
    }

    /// Length of the prefix that won the slot; 0 if none did. Not for slots with a chunk.
    fn len(self) -> u8 {
        (self.0 >> LEN_SHIFT) as u8
    }

    /// Not for slots with a chunk.
    #[inline]
    fn owner(self) -> Option<PeerId> {
        (self.0 & OWNER_MASK).checked_sub(1).map(PeerId)
    }
}

impl Default for Table {
    fn default() -> Self {
        let root: Box<[Slot; ROOT_LEN]> =
            vec![Slot::NOBODY; ROOT_LEN].try_into().expect("the vector was made this long");
        Self { root: root.into(), pages: Vec::new(), used_count: 0, free: None }
    }
}

impl Table {
    #[inline]
    pub(super) fn lookup(&self, addr: Ipv4Addr) -> Option<PeerId> {
        let [a, b, c, d] = addr.octets();
        let mut slot = self.root[usize::from(u16::from_be_bytes([a, b]))];
        if let Some(chunk) = slot.chunk() {
            slot = self.chunk(chunk)[usize::from(c)];
            if let Some(chunk) = slot.chunk() {
                slot = self.chunk(chunk)[usize::from(d)];
            }
        }
        slot.owner()
    }

    /// Gives all of `net` that no longer prefix holds to `net` itself, which `peer` owns now.
    pub(super) fn insert(&mut self, net: Ipv4Net, peer: PeerId) {
        self.overwrite(net, Some(Route { peer, len: net.prefix_len() }));
    }

    /// Gives what `net` itself won to the next longest prefix `around` it.
    pub(super) fn remove(&mut self, net: Ipv4Net, around: Option<Route>) {
        self.overwrite(net, around);
        self.give_up_chunks(net);
    }

    /// Writes `route` to all slots of `net` that no longer prefix won.
    fn overwrite(&mut self, net: Ipv4Net, route: Option<Route>) {
        let (chunk, slots) = self.slots_of(net);
        for index in slots {
            self.overwrite_at(Place { chunk, index }, net.prefix_len(), Slot::new(route));
        }
    }

    fn overwrite_at(&mut self, place: Place, len: u8, new: Slot) {
        let slot = self.slot(place);
        if let Some(chunk) = slot.chunk() {
            for index in 0..CHUNK_LEN {
                self.overwrite_at(Place { chunk: Some(chunk), index }, len, new);
            }
        } else if slot.len() <= len {
            self.set_slot(place, new);
        }
    }

    /// The slots that together are `net`, in the root or in one chunk, which is made if need be.
    fn slots_of(&mut self, net: Ipv4Net) -> (Option<u32>, Range<usize>) {
        let (addr, len) = (net.network(), net.prefix_len());
        let (mut chunk, mut bits) = (None, ROOT_BITS);
        while len > bits {
            chunk = Some(self.chunk_below(Place { chunk, index: index_of(addr, bits) }));
            bits += CHUNK_BITS;
        }
        let first = index_of(addr, bits);
        (chunk, first..first + (1 << (bits - len)))
    }

    /// The chunk of this slot; if there is none, one that says the same as the slot did.
    fn chunk_below(&mut self, place: Place) -> u32 {
        let slot = self.slot(place);
        if let Some(chunk) = slot.chunk() {
            return chunk;
        }
        let chunk = self.allocate();
        *self.chunk_mut(chunk) = [slot; CHUNK_LEN];
        self.set_slot(place, Slot::chunk_at(chunk));
        chunk
    }

    /// Frees the chunks on the way to `net` in which no prefix is long enough to need them.
    fn give_up_chunks(&mut self, net: Ipv4Net) {
        let addr = net.network();
        // The lower one first: without it the upper one may have become needless too.
        for bits in [ROOT_BITS + CHUNK_BITS, ROOT_BITS] {
            if net.prefix_len() <= bits {
                continue;
            }
            let root = Place { chunk: None, index: index_of(addr, ROOT_BITS) };
            let place = if bits == ROOT_BITS {
                root
            } else {
                Place { chunk: self.slot(root).chunk(), index: index_of(addr, bits) }
            };
            let chunk = self.slot(place).chunk().expect("longer prefixes stand in chunks");
            let slots = self.chunk(chunk);
            // Prefixes this short fill the whole chunk: if nothing is longer, all slots are equal.
            if slots.iter().all(|slot| slot.chunk().is_none() && slot.len() <= bits) {
                self.set_slot(place, slots[0]);
                self.release(chunk);
            }
        }
    }

    fn allocate(&mut self) -> u32 {
        if self.free.is_none() {
            let first = self.pages.len() * PAGE_LEN;
            self.pages.push(Arc::new([[Slot::NOBODY; CHUNK_LEN]; PAGE_LEN]));
            for chunk in (first..first + PAGE_LEN).rev() {
                // At most 2^24 + 2^16 chunks can be needed.
                self.push_free(chunk as u32);
            }
        }
        let chunk = self.free.expect("filled above");
        self.free = self.chunk(chunk)[0].chunk();
        self.used_count += 1;
        chunk
    }

    fn release(&mut self, chunk: u32) {
        self.used_count -= 1;
        if self.used_count == 0 {
            self.pages = Vec::new();
            self.free = None;
        } else {
            self.push_free(chunk);
        }
    }

    fn push_free(&mut self, chunk: u32) {
        let next = self.free.replace(chunk);
        self.chunk_mut(chunk)[0] = next.map_or(Slot::NOBODY, Slot::chunk_at);
    }

    #[inline]
    fn chunk(&self, chunk: u32) -> &Chunk {
        &self.pages[chunk as usize / PAGE_LEN][chunk as usize % PAGE_LEN]
    }

    fn chunk_mut(&mut self, chunk: u32) -> &mut Chunk {
        let page = &mut self.pages[chunk as usize / PAGE_LEN];
        &mut Arc::make_mut(page)[chunk as usize % PAGE_LEN]
    }

    fn slot(&self, place: Place) -> Slot {
        match place.chunk {
            None => self.root[place.index],
            Some(chunk) => self.chunk(chunk)[place.index],
        }
    }

    fn set_slot(&mut self, place: Place, slot: Slot) {
        match place.chunk {
            None => Arc::make_mut(&mut self.root)[place.index] = slot,
            Some(chunk) => self.chunk_mut(chunk)[place.index] = slot,
        }
    }

    /// Chunks that are part of the table, and pages that hold them.
    #[cfg(test)]
    pub(super) fn size(&self) -> (usize, usize) {
        (self.used_count, self.pages.len())
    }

    /// Pages that two tables share.
    #[cfg(test)]
    pub(super) fn shared_pages(&self, other: &Table) -> usize {
        self.pages.iter().zip(&other.pages).filter(|(a, b)| Arc::ptr_eq(a, b)).count()
    }
}

/// Index of the slot of `addr`, in the root or chunk whose slots tell the first `bits` bits apart.
fn index_of(addr: Ipv4Addr, bits: u8) -> usize {
    let leading = (addr.to_bits() >> (32 - bits)) as usize;
    if bits == ROOT_BITS { leading } else { leading % CHUNK_LEN }
}
