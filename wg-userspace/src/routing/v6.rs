//! IPv6: the address space cut into ranges that have one longest prefix each, sorted, in leaves of
//! up to 128 ranges. Two binary searches find the range of an address: one for the leaf, one in it.
//!
//! Prefixes nest or are disjoint, so *n* of them make at most 2*n* + 1 ranges, however long they
//! are and however they nest: a look-up takes the logarithm of their number (40 ns with 1,000
//! prefixes, 100 with 100,000 of 11 lengths; Zen 5, random hits), and a table their number in memory
//! (42 bytes a prefix, full leaves). What else was weighed:
//! - Flat chunks as for IPv4: 16 levels; scattered /128 cost up to 13 KiB each.
//! - Compressed tries (treebitmap and its like): fewer bytes, but dependent loads as deep as the
//!   prefixes nest and branch, and sharing between snapshots node by node.
//! - A hash table for each length, asked from the longest: 25 and 45 ns on the same prefixes, but it
//!   takes as long as a device has lengths, and "everything except one address" has 128 of them.
//!   A binary search over lengths needs markers with precomputed answers, which a short prefix
//!   changes by the thousand.

use std::net::Ipv6Addr;
use std::sync::Arc;

use ipnet::Ipv6Net;
use wg_common::id::PeerId;

use super::Route;

/// Most ranges of a leaf.
const LEAF_LEN: usize = 128;
/// A leaf that holds fewer ranges after a change is joined with a neighbour.
const LEAF_LEN_MIN: usize = LEAF_LEN / 4;
/// Ranges that leaves get when too many for one leaf are spread: some room is left for the next.
const LEAF_LEN_SPREAD: usize = LEAF_LEN * 3 / 4;

/// Which peer owns an IPv6 address.
///
/// The leaves, one after another, list all ranges: the first begins at 0, each ends where the next
/// begins, and no two neighbours have the same route.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// First address of each leaf.
    firsts: Vec<u128>,
    leaves: Vec<Arc<Leaf>>,
}

/// Up to [`LEAF_LEN`] ranges, at least one.
#[derive(Clone, Debug)]
struct Leaf {
    /// First address of each range; [`u128::MAX`] behind the last.
    firsts: [u128; LEAF_LEN],
    /// Number of the range's owner plus one, or 0.
    owners: [u32; LEAF_LEN],
    /// Length of the range's longest prefix, or 0. Only the writer looks at it.
    lens: [u8; LEAF_LEN],
    range_count: usize,
}

/// A range of addresses: it begins at `first` and ends where the next one begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct AddressRange {
    first: u128,
    route: Option<Route>,
}

impl Default for Table {
    fn default() -> Self {
        let leaf = Leaf::new(&[AddressRange { first: 0, route: None }]);
        Self { firsts: vec![0], leaves: vec![Arc::new(leaf)] }
    }
}

impl Table {
    #[inline]
    pub(super) fn lookup(&self, addr: Ipv6Addr) -> Option<PeerId> {
        let addr = addr.to_bits();
        let leaf = &*self.leaves[self.leaf_of(addr)];
        leaf.owners[leaf.range_of(addr)].checked_sub(1).map(PeerId)
    }

    /// Gives all of `net` that no longer prefix holds to `net` itself, which `peer` owns now.
    pub(super) fn insert(&mut self, net: Ipv6Net, peer: PeerId) {
        self.overwrite(net, Some(Route { peer, len: net.prefix_len() }));
    }

    /// Gives what `net` itself won to the next longest prefix `around` it.
    pub(super) fn remove(&mut self, net: Ipv6Net, around: Option<Route>) {
        self.overwrite(net, around);
    }

    /// Writes `route` to all of `net` that no longer prefix won.
    fn overwrite(&mut self, net: Ipv6Net, route: Option<Route>) {
        let (first, last) = (net.network().to_bits(), net.broadcast().to_bits());
        // One address more on each side, so that ranges there join if they say the same now.
        let mut from = self.leaf_of(first.saturating_sub(1));
        let mut to = self.leaf_of(last.saturating_add(1));
        let mut ranges: Vec<AddressRange> =
            self.leaves[from..=to].iter().flat_map(|leaf| leaf.ranges()).collect();
        cut_at(&mut ranges, first);
        if let Some(behind) = last.checked_add(1) {
            cut_at(&mut ranges, behind);
        }
        for range in &mut ranges {
            let inside = (first..=last).contains(&range.first);
            if inside && range.route.is_none_or(|old| old.len <= net.prefix_len()) {
                range.route = route;
            }
        }
        ranges.dedup_by(|next, range| next.route == range.route);
        if ranges.len() < LEAF_LEN_MIN && to + 1 < self.leaves.len() {
            to += 1;
            ranges.extend(self.leaves[to].ranges());
        } else if ranges.len() < LEAF_LEN_MIN && from > 0 {
            from -= 1;
            ranges.splice(..0, self.leaves[from].ranges());
        }

        let leaf_count =
            if ranges.len() <= LEAF_LEN { 1 } else { ranges.len().div_ceil(LEAF_LEN_SPREAD) };
        let leaves: Vec<_> = ranges
            .chunks(ranges.len().div_ceil(leaf_count))
            .map(|ranges| Arc::new(Leaf::new(ranges)))
            .collect();
        self.firsts.splice(from..=to, leaves.iter().map(|leaf| leaf.firsts[0]));
        self.leaves.splice(from..=to, leaves);
    }

    /// The leaf that holds the range of `addr`.
    #[inline]
    fn leaf_of(&self, addr: u128) -> usize {
        // The first leaf begins at 0, so at least one begins at `addr` or before.
        self.firsts.partition_point(|&first| first <= addr) - 1
    }

    /// Number of ranges, and of leaves that hold them.
    ///
    /// # Panics
    /// If the ranges are not as [`Table`] says.
    #[cfg(test)]
    pub(super) fn size(&self) -> (usize, usize) {
        let ranges: Vec<_> = self.leaves.iter().flat_map(|leaf| leaf.ranges()).collect();
        assert_eq!(ranges[0].first, 0);
        assert!(ranges.is_sorted_by(|a, b| a.first < b.first && a.route != b.route));
        assert!(self.firsts.iter().eq(self.leaves.iter().map(|leaf| &leaf.firsts[0])));
        (ranges.len(), self.leaves.len())
    }

    /// Leaves that two tables share.
    #[cfg(test)]
    pub(super) fn shared_leaves(&self, other: &Table) -> usize {
        let of_other: std::collections::HashSet<_> = other.leaves.iter().map(Arc::as_ptr).collect();
        self.leaves.iter().filter(|leaf| of_other.contains(&Arc::as_ptr(leaf))).count()
    }
}

impl Leaf {
    /// # Panics
    /// If there are more than [`LEAF_LEN`] ranges.
    fn new(ranges: &[AddressRange]) -> Self {
        let mut leaf = Leaf {
            firsts: [u128::MAX; LEAF_LEN],
            owners: [0; LEAF_LEN],
            lens: [0; LEAF_LEN],
            range_count: ranges.len(),
        };
        for (i, range) in ranges.iter().enumerate() {
            leaf.firsts[i] = range.first;
            if let Some(Route { peer, len }) = range.route {
                (leaf.owners[i], leaf.lens[i]) = (peer.0 + 1, len);
            }
        }
        leaf
    }

    /// The range that holds `addr`, which is not before the first.
    #[inline]
    fn range_of(&self, addr: u128) -> usize {
        let behind = self.firsts.partition_point(|&first| first <= addr);
        // For the very last address, the padding counts too.
        behind.min(self.range_count) - 1
    }

    fn ranges(&self) -> impl Iterator<Item = AddressRange> {
        (0..self.range_count).map(|i| AddressRange {
            first: self.firsts[i],
            route: self.owners[i]
                .checked_sub(1)
                .map(|peer| Route { peer: PeerId(peer), len: self.lens[i] }),
        })
    }
}

/// Makes a range begin at `addr`, saying what was said there before.
///
/// # Panics
/// If the first range begins behind `addr`.
fn cut_at(ranges: &mut Vec<AddressRange>, addr: u128) {
    let behind = ranges.partition_point(|range| range.first <= addr);
    let AddressRange { first, route } = ranges[behind - 1];
    if first != addr {
        ranges.insert(behind, AddressRange { first: addr, route });
    }
}
