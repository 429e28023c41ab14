//! The prefixes themselves: owner of each, and each peer's own in order. Not made for looking up
//! addresses; that is what the tables are for.
//!
//! A peer's prefixes form a list through the records (indexes instead of pointers), so that a prefix
//! leaves the middle of a peer with 65,000 others at no cost, and a peer with one prefix, of which
//! there may be a million, costs no allocation of its own. Both tables hold numbers of records alone, and
//! look at the records for what they mean: some fifty bytes for each prefix in all.

use std::hash::BuildHasher as _;

use hashbrown::{DefaultHashBuilder, HashTable};
use ipnet::IpNet;
use wg_common::id::PeerId;

use super::Route;

/// No record.
const NONE: u32 = u32::MAX;

/// All prefixes of a device. Whatever goes in must have its host bits cleared.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    /// Prefixes in use, and free slots (which [`Prefixes::free`] names).
    records: Vec<Record>,
    free: Vec<u32>,
    /// Records in use, by their prefixes.
    by_net: HashTable<u32>,
    /// The first record of each peer that has one, by the peers.
    by_peer: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// How many prefixes there are of each length, so that [`Prefixes::around`] asks only for
    /// lengths that exist.
    v4_count_by_len: LenCounts<33>,
    v6_count_by_len: LenCounts<129>,
}

#[derive(Debug)]
struct Record {
    net: IpNet,
    peer: PeerId,
    /// The one before it in the peer's list; of the first, the last.
    before: u32,
    /// The one behind it; [`NONE`] behind the last.
    after: u32,
}

#[derive(Debug)]
struct LenCounts<const N: usize>([u32; N]);

impl<const N: usize> Default for LenCounts<N> {
    fn default() -> Self {
        Self([0; N])
    }
}

impl Prefixes {
    pub(super) fn len(&self) -> usize {
        self.by_net.len()
    }

    /// All of them, in no order.
    pub(super) fn nets(&self) -> impl Iterator<Item = IpNet> {
        self.by_net.iter().map(|&slot| self.record(slot).net)
    }

    /// Who owns this very prefix.
    pub(super) fn owner(&self, net: IpNet) -> Option<PeerId> {
        let is_its = |&slot: &u32| self.record(slot).net == net;
        let slot = *self.by_net.find(self.hasher.hash_one(net), is_its)?;
        Some(self.record(slot).peer)
    }

    /// Makes a prefix the last one of `peer`; gives its owner until now.
    pub(super) fn insert(&mut self, net: IpNet, peer: PeerId) -> Option<PeerId> {
        let previous = self.remove(net);
        let first = self.first_of(peer);
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = u32::try_from(self.records.len()).expect("memory ends before 2^32");
                assert!(slot != NONE, "memory ends before the numbers");
                self.records.push(Record { net, peer, before: slot, after: NONE });
                slot
            }
        };
        let mut before = slot;
        if let Some(first) = first {
            before = std::mem::replace(&mut self.record_mut(first).before, slot);
            self.record_mut(before).after = slot;
        }
        *self.record_mut(slot) = Record { net, peer, before, after: NONE };

        let Self { records, by_net, by_peer, hasher, .. } = self;
        let record = |slot: u32| &records[slot as usize];
        by_net.insert_unique(hasher.hash_one(net), slot, |&slot| hasher.hash_one(record(slot).net));
        if first.is_none() {
            let hash_of = |&slot: &u32| hasher.hash_one(record(slot).peer);
            by_peer.insert_unique(hasher.hash_one(peer), slot, hash_of);
        }
        *self.count_mut(net) += 1;
        previous
    }

    /// Removes a prefix, whoever owns it; gives its owner.
    pub(super) fn remove(&mut self, net: IpNet) -> Option<PeerId> {
        let Self { records, by_net, by_peer, hasher, .. } = self;
        let is_its = |&slot: &u32| records[slot as usize].net == net;
        let (slot, _) = by_net.find_entry(hasher.hash_one(net), is_its).ok()?.remove();
        let Record { peer, before, after, .. } = records[slot as usize];
        let of_peer = |&slot: &u32| records[slot as usize].peer == peer;
        let first = by_peer.find_entry(hasher.hash_one(peer), of_peer);
        let mut first = first.expect("who owns a record has a first one");
        if *first.get() != slot {
            let first = *first.get();
            let behind = if after == NONE { first } else { after };
            records[before as usize].after = after;
            records[behind as usize].before = before;
        } else if after == NONE {
            first.remove();
        } else {
            *first.get_mut() = after;
            records[after as usize].before = before;
        }
        *self.count_mut(net) -= 1;
        if self.by_net.is_empty() {
            // What a million needed once is not kept for ever.
            *self = Self::default();
        } else {
            self.free.push(slot);
        }
        Some(peer)
    }

    /// The longest prefix that contains `net` and is shorter.
    pub(super) fn around(&self, net: IpNet) -> Option<Route> {
        let count_by_len: &[u32] = match net {
            IpNet::V4(_) => &self.v4_count_by_len.0,
            IpNet::V6(_) => &self.v6_count_by_len.0,
        };
        (0..net.prefix_len()).rev().filter(|&len| count_by_len[len as usize] > 0).find_map(|len| {
            let shorter = IpNet::new(net.addr(), len).expect("shorter than a length of the family");
            self.owner(shorter.trunc()).map(|peer| Route { peer, len })
        })
    }

    /// The prefixes of `peer` from its first to its last.
    pub(super) fn of_peer(&self, peer: PeerId) -> impl Iterator<Item = IpNet> {
        let first = self.first_of(peer).map(|slot| self.record(slot));
        let next = |record: &&Record| (record.after != NONE).then(|| self.record(record.after));
        std::iter::successors(first, next).map(|record| record.net)
    }

    /// The first record of `peer`.
    fn first_of(&self, peer: PeerId) -> Option<u32> {
        let is_its = |&slot: &u32| self.record(slot).peer == peer;
        self.by_peer.find(self.hasher.hash_one(peer), is_its).copied()
    }

    fn record(&self, slot: u32) -> &Record {
        &self.records[slot as usize]
    }

    fn record_mut(&mut self, slot: u32) -> &mut Record {
        &mut self.records[slot as usize]
    }

    fn count_mut(&mut self, net: IpNet) -> &mut u32 {
        let len = usize::from(net.prefix_len());
        match net {
            IpNet::V4(_) => &mut self.v4_count_by_len.0[len],
            IpNet::V6(_) => &mut self.v6_count_by_len.0[len],
        }
    }
}
