//! The prefixes themselves: owner of each, and each peer's own in order. Not made for looking up
//! addresses; that is what the tables are for.
//!
//! A peer's prefixes form a list through the records (indexes instead of pointers), so that a prefix
//! leaves the middle of a peer with 65,000 others at no cost, and a peer with one prefix, of which
//! there may be a million, costs no allocation of its own.

use hashbrown::HashMap;
use ipnet::IpNet;
use wg_common::id::PeerId;

use super::Route;

/// All prefixes of a device. Whatever goes in must have its host bits cleared.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    /// Slots of `records` by prefix.
    slots: HashMap<IpNet, u32>,
    /// Prefixes in use, and free slots (which [`Prefixes::free`] names).
    records: Vec<Record>,
    free: Vec<u32>,
    ends: HashMap<PeerId, Ends>,
    /// How many prefixes there are of each length, so that [`Prefixes::around`] asks only for
    /// lengths that exist.
    v4_count_by_len: LenCounts<33>,
    v6_count_by_len: LenCounts<129>,
}

#[derive(Debug)]
struct Record {
    net: IpNet,
    peer: PeerId,
    /// Neighbours in the peer's list.
    before: Option<u32>,
    after: Option<u32>,
}

/// The slots at the ends of a peer's list.
#[derive(Debug)]
struct Ends {
    first: u32,
    last: u32,
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
        self.slots.len()
    }

    /// All of them, in no order.
    pub(super) fn nets(&self) -> impl Iterator<Item = IpNet> {
        self.slots.keys().copied()
    }

    /// Who owns this very prefix.
    pub(super) fn owner(&self, net: IpNet) -> Option<PeerId> {
        self.slots.get(&net).map(|&slot| self.record(slot).peer)
    }

    /// Makes a prefix the last one of `peer`; gives its owner until now.
    pub(super) fn insert(&mut self, net: IpNet, peer: PeerId) -> Option<PeerId> {
        let previous = self.remove(net);
        let record =
            Record { net, peer, before: self.ends.get(&peer).map(|ends| ends.last), after: None };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.records[slot as usize] = record;
                slot
            }
            None => {
                self.records.push(record);
                u32::try_from(self.records.len() - 1).expect("memory ends before 2^32 prefixes do")
            }
        };
        match self.ends.get_mut(&peer) {
            Some(ends) => {
                let before = std::mem::replace(&mut ends.last, slot);
                self.records[before as usize].after = Some(slot);
            }
            None => {
                self.ends.insert(peer, Ends { first: slot, last: slot });
            }
        }
        self.slots.insert(net, slot);
        *self.count_mut(net) += 1;
        previous
    }

    /// Removes a prefix, whoever owns it; gives its owner.
    pub(super) fn remove(&mut self, net: IpNet) -> Option<PeerId> {
        let slot = self.slots.remove(&net)?;
        let Record { peer, before, after, .. } = *self.record(slot);
        let ends = self.ends.get_mut(&peer).expect("who owns a record has a list");
        match (before, after) {
            (None, None) => {
                self.ends.remove(&peer);
            }
            (None, Some(after)) => ends.first = after,
            (Some(before), None) => ends.last = before,
            (Some(_), Some(_)) => {}
        }
        if let Some(before) = before {
            self.records[before as usize].after = after;
        }
        if let Some(after) = after {
            self.records[after as usize].before = before;
        }
        self.free.push(slot);
        *self.count_mut(net) -= 1;
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
        let first = self.ends.get(&peer).map(|ends| self.record(ends.first));
        std::iter::successors(first, |record| record.after.map(|slot| self.record(slot)))
            .map(|record| record.net)
    }

    fn record(&self, slot: u32) -> &Record {
        &self.records[slot as usize]
    }

    fn count_mut(&mut self, net: IpNet) -> &mut u32 {
        let len = usize::from(net.prefix_len());
        match net {
            IpNet::V4(_) => &mut self.v4_count_by_len.0[len],
            IpNet::V6(_) => &mut self.v6_count_by_len.0[len],
        }
    }
}
