//! What the host says of the ways to peers, in one answer: links, next hops, neighbours.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use super::protocol::{HopTowards, LinkTowards};
use crate::host::{
    Host, HostError, Link, Neighbour, NeighbourChange, NeighbourOf, NextHop, Towards, Way,
};
use crate::sys::xfrm;

/// The neighbours of the host.
#[derive(Default)]
pub struct Neighbours(HashMap<NeighbourOf, Neighbour>);

impl Neighbours {
    /// Takes over changes; gives those neighbours that have another MAC address than before, with it.
    pub fn change(&mut self, changes: &[NeighbourChange]) -> Vec<(u32, IpAddr, Option<[u8; 6]>)> {
        let mac = |neighbour: Option<Neighbour>| neighbour.map(|neighbour| neighbour.mac);
        let mut moved = Vec::new();
        for &(of, now) in changes {
            let before = match now {
                Some(now) => self.0.insert(of, now),
                None => self.0.remove(&of),
            };
            if mac(before) != mac(now) {
                moved.push((of.0, of.1, mac(now)));
            }
        }
        moved
    }

    fn get(&self, link: u32, address: IpAddr) -> Option<Neighbour> {
        self.0.get(&(link, address)).copied()
    }
}

/// Looks at ways.
pub struct Look<'a> {
    host: &'a Host,
    neighbours: &'a Neighbours,
    mark: u32,
    with_hops: bool,
    /// Links that were looked at: most peers are reached by one.
    links: HashMap<u32, Option<Link>>,
    /// Neighbours of which the kernel has been told that they are in use.
    used: HashSet<NeighbourOf>,
}

impl<'a> Look<'a> {
    /// Looks at ways of datagrams with this mark; also at what is needed to send them past the kernel, if
    /// `with_hops` is set and nothing speaks against that.
    pub fn new(host: &'a Host, neighbours: &'a Neighbours, mark: u32, with_hops: bool) -> Self {
        // What IPsec does with datagrams, routes do not tell. In doubt it does something.
        let with_hops = with_hops && matches!(xfrm::outbound_policy_count(), Ok(0));
        Self { host, neighbours, mark, with_hops, links: HashMap::new(), used: HashSet::new() }
    }

    /// By which link datagrams leave, if they do.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn towards(&mut self, towards: &Towards) -> Result<Option<LinkTowards>, HostError> {
        let way = self.host.way_towards(towards, self.mark, self.with_hops).await?;
        let Some(Way { link, mtu, next_hop }) = way else { return Ok(None) };
        let (link_mtu, mac) = match self.link(link).await? {
            Some(found) => (found.mtu, found.ethernet),
            None => return Ok(None),
        };
        let mtu = mtu.unwrap_or(link_mtu).min(link_mtu);
        let mut hop = None;
        if let (Some(next_hop), Some(src_mac)) = (next_hop, mac) {
            let NextHop { neighbour, source, hop_limit, learnt_mtu } = next_hop;
            let dst_mac = self.neighbour(link, neighbour).await.map(|known| known.mac);
            let mtu = learnt_mtu.unwrap_or(mtu).min(mtu);
            hop = Some(HopTowards { neighbour, source, hop_limit, mtu, src_mac, dst_mac });
        }
        Ok(Some(LinkTowards { link, mtu, hop }))
    }

    async fn link(&mut self, index: u32) -> Result<&Option<Link>, HostError> {
        if !self.links.contains_key(&index) {
            let found = self.host.link_by_index(index).await?;
            self.links.insert(index, found);
        }
        Ok(&self.links[&index])
    }

    /// A neighbour, if frames can be sent to it. The kernel sees none of those: it is told that there are
    /// some, so that it finds out whether the neighbour is still there.
    ///
    /// That is done by what lasts for one time (`NTF_USE`), and not by having the kernel keep the neighbour
    /// for good (`NTF_MANAGED`): nothing is left of it, however this process ends.
    async fn neighbour(&mut self, link: u32, address: IpAddr) -> Option<Neighbour> {
        let neighbour = self.neighbours.get(link, address)?;
        if neighbour.is_stale
            && self.used.insert((link, address))
            && let Err(error) = self.host.use_neighbour(link, address).await
        {
            tracing::debug!(%error, "a neighbour may have moved, and nobody asks");
            return None;
        }
        Some(neighbour)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_neighbours_that_are_reached_otherwise_have_moved() {
        let of = (3, "192.0.2.1".parse().unwrap());
        let is = |mac: u8, is_stale| Some(Neighbour { mac: [mac; 6], is_stale });
        let mut neighbours = Neighbours::default();
        assert_eq!(neighbours.change(&[(of, None)]), []);
        let told = |mac: Option<u8>| (of.0, of.1, mac.map(|mac| [mac; 6]));
        assert_eq!(neighbours.change(&[(of, is(2, false))]), [told(Some(2))]);
        assert_eq!(neighbours.change(&[(of, is(2, true))]), []);
        assert_eq!(neighbours.get(3, of.1), is(2, true));
        let changes = [(of, is(4, true)), (of, None)];
        assert_eq!(neighbours.change(&changes), [told(Some(4)), told(None)]);
        assert_eq!(neighbours.get(3, of.1), None);
    }
}
