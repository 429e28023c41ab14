//! What stands before datagrams on the wire when this process sends them itself, past the kernel's stack.
//!
//! Only what the kernel would do as plainly is told: one route, one next hop, one Ethernet link. In doubt
//! nothing is, and the kernel sends.

use std::net::IpAddr;

use futures_util::StreamExt as _;
use netlink_packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};

use super::{Host, HostError, own_mtu};

/// TTL or hop limit of what leaves by a route that has none of its own: the kernel's default.
const HOP_LIMIT: u8 = 64;

/// Where a datagram goes next, on a link of which the caller knows the rest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NextHop {
    /// The neighbour to which it is given: a router, or who is meant.
    pub neighbour: IpAddr,
    /// The address of this host from which it leaves.
    pub source: IpAddr,
    /// TTL or hop limit with which it leaves.
    pub hop_limit: u8,
    /// MTU in bytes to which the kernel cuts what it sends by IPv6, if that is another one than was
    /// configured. It may be what an ICMP message said: longer ones are the kernel's to fragment.
    pub learnt_mtu: Option<u32>,
}

/// The only next hop that `route` leads to, the kernel's answer for a datagram to `remote`. `matched` is the
/// route in the table that it comes from.
pub(super) fn next_hop(
    remote: IpAddr,
    route: &RouteMessage,
    matched: &RouteMessage,
) -> Option<NextHop> {
    // Else it is what an ICMP message said.
    if ![route, matched].into_iter().all(is_plain) || router(route) != router(matched) {
        return None;
    }
    let neighbour = match router(route) {
        Some(router) => router?,
        None => remote,
    };
    let mut hop = NextHop { neighbour, source: remote, hop_limit: HOP_LIMIT, learnt_mtu: None };
    let mut source = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::PrefSource(address) => source = source.or(Some(ip(address)?)),
            // It was asked for, and the kernel has agreed; IPv6 says nothing that way, too.
            RouteAttribute::Source(address) => {
                source = Some(ip(address)?).filter(|ip| !ip.is_unspecified()).or(source);
            }
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Hoplimit(limit @ 1..) = metric {
                        hop.hop_limit = u8::try_from(*limit).ok()?;
                    }
                }
            }
            _ => {}
        }
    }
    if remote.is_ipv6() {
        hop.learnt_mtu = own_mtu(route);
    }
    // None of ours will do as yet, if that is nothing.
    hop.source = source?;
    Some(hop)
}

/// The router that a route leads to, if it does, and if that has an address that is one of IP.
fn router(route: &RouteMessage) -> Option<Option<IpAddr>> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(gateway) => Some(ip(gateway)),
        RouteAttribute::Via(RouteVia::Inet(ip)) => Some(Some((*ip).into())),
        RouteAttribute::Via(RouteVia::Inet6(ip)) => Some(Some((*ip).into())),
        RouteAttribute::Via(_) => Some(None),
        _ => None,
    })
}

/// Whether a route says no more than a link and perhaps a router.
fn is_plain(route: &RouteMessage) -> bool {
    let is_odd = |attribute: &RouteAttribute| {
        matches!(
            attribute,
            // One of several, which depends on the flow. A number of a next hop may stand for several.
            RouteAttribute::MultiPath(_)
                | RouteAttribute::NhId(_)
                // Something stands around the datagram.
                | RouteAttribute::Encap(_)
                | RouteAttribute::EncapType(_)
                | RouteAttribute::NewDestination(_)
                | RouteAttribute::NewDestinationAddress(_)
        )
    };
    // A route by TOS is for others than ours, which have none; then there are rules of that kind.
    route.header.kind == RouteType::Unicast
        && route.header.tos == 0
        && !route.attributes.iter().any(is_odd)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// The MAC address of a link on which frames can be sent as they are: Ethernet, up, alone, and no link on
/// top of another.
pub(super) fn ethernet_address(message: &LinkMessage) -> Option<[u8; 6]> {
    if message.header.link_layer_type != LinkLayerType::Ether
        || !message.header.flags.contains(LinkFlags::Up)
        || message.header.flags.contains(LinkFlags::Noarp)
    {
        return None;
    }
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            // Part of a bond, a bridge, a VRF.
            LinkAttribute::Controller(_) => return None,
            LinkAttribute::LinkInfo(infos) if !infos.iter().all(is_simple) => return None,
            LinkAttribute::Address(address) => mac = <[u8; 6]>::try_from(&address[..]).ok(),
            _ => {}
        }
    }
    mac.filter(is_unicast)
}

/// NICs have no kind at all.
fn is_simple(info: &LinkInfo) -> bool {
    !matches!(info, LinkInfo::Kind(kind) if *kind != InfoKind::Veth)
}

/// Whether a frame can be sent to this address alone.
pub(super) fn is_unicast(mac: &[u8; 6]) -> bool {
    mac[0] & 1 == 0 && *mac != [0; 6]
}

impl Host {
    /// Has the kernel find out whether a neighbour that it knows is still there, as if it had a packet for it.
    /// It does so some seconds later, if nothing has told meanwhile.
    ///
    /// Nothing becomes of it if the kernel has no such neighbour.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub async fn use_neighbour(&self, link: u32, address: IpAddr) -> Result<(), HostError> {
        let mut message = NeighbourMessage::default();
        message.header.family = match address {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.header.ifindex = link;
        message.header.flags = NeighbourFlags::Use;
        let destination = NeighbourAttribute::Destination(NeighbourAddress::from(address));
        message.attributes.push(destination);
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(message));
        // Not to make one.
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let failed = |error| HostError::new(format!("looking whether {address} is there"), error);
        let mut answers = self.handle.clone().request(request).map_err(failed)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return match rustix::io::Errno::from_io_error(&error.to_io()) {
                    Some(rustix::io::Errno::NOENT) => Ok(()),
                    _ => Err(failed(rtnetlink::Error::NetlinkError(error))),
                };
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::route::RouteHeader;

    use super::*;

    fn route(attributes: &[RouteAttribute]) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header = RouteHeader { kind: RouteType::Unicast, ..RouteHeader::default() };
        route.attributes = attributes.to_vec();
        route
    }

    fn address(text: &str) -> RouteAddress {
        match text.parse().unwrap() {
            IpAddr::V4(ip) => RouteAddress::Inet(ip),
            IpAddr::V6(ip) => RouteAddress::Inet6(ip),
        }
    }

    #[test]
    fn a_plain_route_has_one_next_hop() {
        let remote: IpAddr = "192.0.2.1".parse().unwrap();
        let on_link = route(&[RouteAttribute::PrefSource(address("10.0.0.1"))]);
        let hop = next_hop(remote, &on_link, &route(&[])).unwrap();
        let expected = NextHop {
            neighbour: remote,
            source: "10.0.0.1".parse().unwrap(),
            hop_limit: 64,
            learnt_mtu: None,
        };
        assert_eq!(hop, expected);
        let far = route(&[
            RouteAttribute::Gateway(address("10.0.0.254")),
            RouteAttribute::PrefSource(address("10.0.0.1")),
            RouteAttribute::Source(address("10.0.0.7")),
            RouteAttribute::Metrics(vec![RouteMetric::Hoplimit(9)]),
        ]);
        let by_router = route(&[RouteAttribute::Gateway(address("10.0.0.254"))]);
        let hop = next_hop(remote, &far, &by_router).unwrap();
        assert_eq!(hop.neighbour, "10.0.0.254".parse::<IpAddr>().unwrap());
        assert_eq!((hop.source, hop.hop_limit), ("10.0.0.7".parse().unwrap(), 9));
        let by_v6 = RouteAttribute::Via(RouteVia::Inet6("fe80::1".parse().unwrap()));
        let far = route(&[by_v6.clone(), RouteAttribute::PrefSource(address("10.0.0.1"))]);
        let hop = next_hop(remote, &far, &route(&[by_v6])).unwrap();
        assert_eq!(hop.neighbour, "fe80::1".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn in_doubt_there_is_none() {
        let remote: IpAddr = "192.0.2.1".parse().unwrap();
        let source = RouteAttribute::PrefSource(address("10.0.0.1"));
        for odd in [
            RouteAttribute::MultiPath(Vec::new()),
            RouteAttribute::NhId(1),
            RouteAttribute::Encap(Vec::new()),
            RouteAttribute::NewDestination(Vec::new()),
        ] {
            let matched = route(std::slice::from_ref(&odd));
            assert_eq!(
                next_hop(remote, &route(std::slice::from_ref(&source)), &matched),
                None,
                "{odd:?}"
            );
            let found = route(&[source.clone(), odd.clone()]);
            assert_eq!(next_hop(remote, &found, &route(&[])), None, "{odd:?}");
        }
        assert_eq!(next_hop(remote, &route(&[]), &route(&[])), None, "no source");
        let redirected = RouteAttribute::Gateway(address("10.0.0.66"));
        let found = route(&[source.clone(), redirected]);
        assert_eq!(next_hop(remote, &found, &route(&[])), None, "redirected");
        for kind in [RouteType::Local, RouteType::Broadcast, RouteType::BlackHole] {
            let mut found = route(std::slice::from_ref(&source));
            found.header.kind = kind;
            assert_eq!(next_hop(remote, &found, &route(&[])), None, "{kind:?}");
        }
        let mut by_tos = route(&[]);
        by_tos.header.tos = 8;
        assert_eq!(next_hop(remote, &route(&[source]), &by_tos), None);
    }

    #[test]
    fn frames_are_sent_on_simple_ethernet_links_alone() {
        let link = |attributes: &[LinkAttribute]| {
            let mut link = LinkMessage::default();
            link.header.link_layer_type = LinkLayerType::Ether;
            link.header.flags = LinkFlags::Up;
            link.attributes = attributes.to_vec();
            link
        };
        let mac = LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]);
        let kind = |kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]);
        let good = link(&[mac.clone(), kind(InfoKind::Veth)]);
        assert_eq!(ethernet_address(&good), Some([2, 0, 0, 0, 0, 1]));
        for odd in [kind(InfoKind::Vlan), kind(InfoKind::Bond), LinkAttribute::Controller(3)] {
            assert_eq!(ethernet_address(&link(&[mac.clone(), odd])), None);
        }
        for bad in [vec![], vec![0; 6], vec![1, 0, 0, 0, 0, 1], vec![2; 8]] {
            assert_eq!(ethernet_address(&link(&[LinkAttribute::Address(bad)])), None);
        }
        let mut down = good.clone();
        down.header.flags = LinkFlags::empty();
        assert_eq!(ethernet_address(&down), None);
        let mut other = good;
        other.header.link_layer_type = LinkLayerType::Infiniband;
        assert_eq!(ethernet_address(&other), None);
    }
}
