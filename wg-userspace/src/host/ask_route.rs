//! Which way the kernel would send a packet that this host forwards, or sends itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType, RouteVia,
};
use rtnetlink::RouteMessageBuilder;
use rustix::io::Errno;

use super::{Host, HostError, output_link, own_mtu};

/// A packet that is to go somewhere.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AskedRoute {
    /// From whom; of an own packet of the host the address may be left to the kernel.
    pub source: Option<IpAddr>,
    /// To whom.
    pub destination: IpAddr,
    /// Index of the link by which it came; 0: it is the host's own.
    pub link_in: u32,
    /// The mark that it bears; 0: none.
    pub mark: u32,
    /// IP protocol number, and the ports of TCP and UDP.
    pub protocol: u8,
    /// From which port, to which.
    pub ports: Option<(u16, u16)>,
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RouteTo {
    /// Out of the link with this index.
    Link(u32),
    /// To this host.
    Local,
    /// To several at a time.
    Several,
}

/// The kernel's answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FoundRoute {
    /// Where it goes.
    pub to: RouteTo,
    /// The router, if there is one.
    pub router: Option<IpAddr>,
    /// The address that the host's own packets get by this route.
    pub own_source: Option<IpAddr>,
    /// The table that had the route.
    pub table: u32,
    /// The MTU of the route, if it has one of its own.
    pub mtu: Option<u32>,
}

/// Why there is no way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NoWay {
    /// No route.
    None,
    /// A route that says so, or the host does not forward what comes by this link.
    Unreachable,
    /// Forbidden by a route or a rule.
    Prohibited,
    /// A route that drops; or a source that cannot be.
    Invalid,
    /// The way back to the source leads elsewhere (`rp_filter`).
    Source,
}

impl NoWay {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "no_route",
            Self::Unreachable => "unreachable",
            Self::Prohibited => "prohibited",
            Self::Invalid => "blackhole_or_bad_source",
            Self::Source => "reverse_path",
        }
    }

    fn of(error: &std::io::Error) -> Option<Self> {
        match Errno::from_io_error(error)? {
            Errno::NETUNREACH | Errno::SRCH | Errno::AFNOSUPPORT => Some(Self::None),
            Errno::HOSTUNREACH => Some(Self::Unreachable),
            Errno::ACCESS => Some(Self::Prohibited),
            Errno::INVAL => Some(Self::Invalid),
            Errno::XDEV => Some(Self::Source),
            _ => None,
        }
    }
}

impl Host {
    /// Asks the kernel for the way of a packet. It changes nothing by that.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn ask_route(
        &self,
        asked: &AskedRoute,
    ) -> Result<Result<FoundRoute, NoWay>, HostError> {
        let answer = self.get_route(asked, RouteFlags::LookupTable).await?;
        Ok(answer.and_then(|route| read(&route)))
    }

    /// Length of the prefix of the route that a packet takes; nothing if there is no route.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn prefix_len_of_route(&self, asked: &AskedRoute) -> Result<Option<u8>, HostError> {
        let answer = self.get_route(asked, RouteFlags::FibMatch).await?;
        Ok(answer.ok().map(|route| route.header.destination_prefix_length))
    }

    async fn get_route(
        &self,
        asked: &AskedRoute,
        flags: RouteFlags,
    ) -> Result<Result<RouteMessage, NoWay>, HostError> {
        let mut query = match asked.destination {
            IpAddr::V4(to) => {
                let query = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, 32);
                match asked.source {
                    Some(IpAddr::V4(from)) => query.source_prefix(from, 32),
                    _ => query,
                }
                .build()
            }
            IpAddr::V6(to) => {
                let query = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to, 128);
                match asked.source {
                    Some(IpAddr::V6(from)) => query.source_prefix(from, 128),
                    _ => query,
                }
                .build()
            }
        };
        query.header.flags = flags;
        if asked.link_in != 0 {
            query.attributes.push(RouteAttribute::Iif(asked.link_in));
        }
        if asked.mark != 0 {
            query.attributes.push(RouteAttribute::Mark(asked.mark));
        }
        if let Some((from, to)) = asked.ports {
            query.attributes.extend([
                RouteAttribute::IpProto(asked.protocol),
                RouteAttribute::Sport(from),
                RouteAttribute::Dport(to),
            ]);
        }
        match self.handle.route().get(query).execute().boxed().try_next().await {
            Ok(Some(route)) => Ok(Ok(route)),
            Ok(None) => Ok(Err(NoWay::None)),
            Err(rtnetlink::Error::NetlinkError(error)) => match NoWay::of(&error.to_io()) {
                Some(no_way) => Ok(Err(no_way)),
                None => Err(refused(asked, rtnetlink::Error::NetlinkError(error))),
            },
            Err(error) => Err(refused(asked, error)),
        }
    }
}

fn refused(asked: &AskedRoute, error: rtnetlink::Error) -> HostError {
    HostError::new(format!("looking up the route to {}", asked.destination), error)
}

fn read(route: &RouteMessage) -> Result<FoundRoute, NoWay> {
    let to = match route.header.kind {
        RouteType::Local | RouteType::Anycast => RouteTo::Local,
        RouteType::Broadcast | RouteType::Multicast => RouteTo::Several,
        RouteType::BlackHole => return Err(NoWay::Invalid),
        RouteType::Unreachable => return Err(NoWay::Unreachable),
        RouteType::Prohibit => return Err(NoWay::Prohibited),
        _ => RouteTo::Link(output_link(route).ok_or(NoWay::None)?),
    };
    let mut found = FoundRoute {
        to,
        router: None,
        own_source: None,
        table: u32::from(route.header.table),
        mtu: own_mtu(route),
    };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Gateway(address) => found.router = ip(address),
            RouteAttribute::Via(RouteVia::Inet(ip)) => found.router = Some((*ip).into()),
            RouteAttribute::Via(RouteVia::Inet6(ip)) => found.router = Some((*ip).into()),
            RouteAttribute::PrefSource(address) => found.own_source = ip(address),
            RouteAttribute::Table(table) => found.table = *table,
            _ => {}
        }
    }
    if found.table == u32::from(RouteHeader::RT_TABLE_UNSPEC) {
        found.table = super::MAIN_TABLE;
    }
    Ok(found)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: RouteType, attributes: &[RouteAttribute]) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.kind = kind;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.attributes = attributes.to_vec();
        message
    }

    #[test]
    fn an_answer_says_where_and_by_whom() {
        let router: Ipv4Addr = "192.0.2.1".parse().unwrap();
        let by_router = message(
            RouteType::Unicast,
            &[
                RouteAttribute::Oif(3),
                RouteAttribute::Gateway(RouteAddress::Inet(router)),
                RouteAttribute::Table(51820),
            ],
        );
        let found = read(&by_router).unwrap();
        assert_eq!(found.to, RouteTo::Link(3));
        assert_eq!((found.router, found.table), (Some(router.into()), 51820));
        let local = read(&message(RouteType::Local, &[RouteAttribute::Oif(1)])).unwrap();
        assert_eq!((local.to, local.table), (RouteTo::Local, 254));
        for (kind, why) in [
            (RouteType::Unreachable, NoWay::Unreachable),
            (RouteType::Prohibit, NoWay::Prohibited),
            (RouteType::BlackHole, NoWay::Invalid),
        ] {
            assert_eq!(read(&message(kind, &[])).unwrap_err(), why);
        }
        assert_eq!(read(&message(RouteType::Unicast, &[])).unwrap_err(), NoWay::None);
    }

    #[test]
    fn errors_of_the_kernel_say_why_there_is_no_way() {
        let of = |errno: Errno| NoWay::of(&errno.into());
        assert_eq!(of(Errno::NETUNREACH), Some(NoWay::None));
        assert_eq!(of(Errno::XDEV), Some(NoWay::Source));
        assert_eq!(of(Errno::NOBUFS), None);
    }
}
