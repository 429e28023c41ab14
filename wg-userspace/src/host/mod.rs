//! Addresses, routes and links of the host, by netlink.
//!
//! One [`Host`] is one netlink socket in the network namespace of the thread that made it; its
//! requests run on the tokio runtime that was current then. [`AddressWatch`] tells which
//! addresses the host has, for the steer program; [`LinkWatch`] what becomes of the TUN device,
//! [`AnyLinkWatch`] that something became of others; [`xdp_features`] what a NIC's driver can do;
//! [`RouteWatch`] that datagrams may leave by another link, [`NeighbourWatch`] who is on it; [`CloneWatch`]
//! whether this virtual machine
//! is a copy. This room does not know what a device or a
//! peer is: it is told names, prefixes and numbers.

mod address_watch;
mod ask_route;
mod clone_watch;
mod forwarding;
mod link_watch;
mod neighbour_watch;
mod netdev;
mod next_hop;
mod policy;
mod route;
mod route_watch;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures_util::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage},
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp},
    route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric},
};
use rtnetlink::{LinkGetRequest, LinkUnspec, RouteMessageBuilder};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use wg_common::headers::PROTOCOL_UDP;

pub use address_watch::{AddressChange, AddressWatch};
pub use ask_route::{AskedRoute, FoundRoute, NoWay, RouteTo};
pub use clone_watch::CloneWatch;
pub use forwarding::ForwardingLink;
pub use link_watch::{AnyLinkWatch, LinkChange, LinkWatch};
pub use neighbour_watch::{Neighbour, NeighbourChange, NeighbourOf, NeighbourWatch};
pub use netdev::{XdpFeatures, xdp_features};
pub use next_hop::NextHop;
pub use policy::{Family, Rule};
pub use route::missing_routes;
pub use route_watch::RouteWatch;

/// Why the host's networking could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No netlink socket.
    #[error("opening a netlink socket")]
    Open(#[source] io::Error),
    /// There is no interface of this name or index.
    #[error("there is no network interface {0}; `ip link` lists them")]
    NoLink(String),
    /// The kernel refused for want of a privilege.
    #[error(
        "{doing}: CAP_NET_ADMIN is needed; run it as root (in a container with `--cap-add NET_ADMIN`)"
    )]
    Privilege {
        /// What was being done.
        doing: String,
    },
    /// What was to be added is there already.
    #[error("{doing}: it exists already")]
    Exists {
        /// What was being done.
        doing: String,
    },
    /// The kernel refused for another reason.
    #[error("{doing}")]
    Refused {
        /// What was being done.
        doing: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The netlink socket closed, or answered with something else than was asked.
    #[error("{doing}: the netlink socket gave no answer")]
    NoAnswer {
        /// What was being done.
        doing: String,
    },
}

impl HostError {
    /// Names what was being done when netlink gave `error`.
    fn new(doing: impl Into<String>, error: rtnetlink::Error) -> HostError {
        let doing = doing.into();
        let rtnetlink::Error::NetlinkError(message) = error else {
            return HostError::NoAnswer { doing };
        };
        let source = message.to_io();
        match Errno::from_io_error(&source) {
            Some(Errno::PERM) => HostError::Privilege { doing },
            Some(Errno::EXIST) => HostError::Exists { doing },
            _ => HostError::Refused { doing, source },
        }
    }
}

/// A network interface of the host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    /// Its index, unique within the network namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it was taken up. It may have no carrier all the same.
    pub is_up: bool,
    /// Its MAC address, if frames can be sent on it as they are: it is Ethernet, up, part of no other link, and on
    /// top of none.
    pub ethernet: Option<[u8; 6]>,
    /// Receive queues that its driver made room for, at least 1. Not all of them need be in use.
    pub rx_queue_count: u32,
    /// Whether it is one end of a pair that the kernel makes.
    pub is_veth: bool,
    /// The kernel's number of the XDP program on it, if there is one.
    pub xdp_program: Option<u32>,
}

impl Link {
    fn from_message(message: LinkMessage) -> Link {
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            mtu: 0,
            is_up: message.header.flags.contains(LinkFlags::Up),
            ethernet: next_hop::ethernet_address(&message),
            rx_queue_count: 1,
            is_veth: false,
            xdp_program: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::NumRxQueues(count) => link.rx_queue_count = count.max(1),
                LinkAttribute::LinkInfo(infos) => {
                    link.is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
                }
                LinkAttribute::Xdp(xdp) => link.xdp_program = xdp.iter().find_map(program_id),
                _ => {}
            }
        }
        link
    }
}

fn program_id(attribute: &LinkXdp) -> Option<u32> {
    match attribute {
        LinkXdp::ProgId(id)
        | LinkXdp::DrvProgId(id)
        | LinkXdp::SkbProgId(id)
        | LinkXdp::HwProgId(id) => Some(*id),
        _ => None,
    }
}

/// An address that the host has on one of its links.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct HostAddress {
    /// Index of the link.
    pub link_index: u32,
    /// The address, with the length of the prefix that is reached through the link.
    pub net: IpNet,
}

impl HostAddress {
    fn from_message(message: &AddressMessage) -> Option<HostAddress> {
        // On a link with a remote end IFA_ADDRESS is the remote's and IFA_LOCAL ours; IPv6
        // leaves IFA_LOCAL out when there is no remote end.
        let mut local = None;
        let mut address = None;
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(ip) => local = Some(*ip),
                AddressAttribute::Address(ip) => address = Some(*ip),
                _ => {}
            }
        }
        let net = IpNet::new(local.or(address)?, message.header.prefix_len).ok()?;
        Some(HostAddress { link_index: message.header.index, net })
    }
}

/// Where datagrams go to, and what is settled of how.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Towards {
    /// The address they go to.
    pub remote: IpAddr,
    /// The address of this host from which they leave, of the same version; or whichever suits.
    pub source: Option<IpAddr>,
    /// Index of the link by which they leave, for an address that is its link's only; 0: whichever suits.
    pub link: u32,
    /// UDP ports of this host and of the remote one, which rules may ask for; or whichever.
    pub ports: Option<(u16, u16)>,
}

/// By what datagrams leave.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Way {
    /// Index of the link.
    pub link: u32,
    /// The MTU in bytes that somebody has given the route, if it is not the link's.
    pub mtu: Option<u32>,
    /// What else is to be known to send past the kernel, if that would do what the kernel does.
    pub next_hop: Option<NextHop>,
}

/// Number of the main routing table.
pub const MAIN_TABLE: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// The host's networking, as one network namespace shows it.
#[derive(Clone, Debug)]
pub struct Host {
    handle: rtnetlink::Handle,
}

impl Host {
    /// Opens a netlink socket in the network namespace of this thread.
    ///
    /// # Errors
    /// [`HostError::Open`] when the kernel gives no socket.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new() -> Result<Host, HostError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(HostError::Open)?;
        tokio::spawn(connection);
        Ok(Host { handle })
    }

    /// The link called `name`, or nothing if there is none.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, HostError> {
        self.first_link(self.handle.link().get().match_name(name)).await
    }

    /// The link with this index, or nothing if there is none.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn link_by_index(&self, index: u32) -> Result<Option<Link>, HostError> {
        self.first_link(self.handle.link().get().match_index(index)).await
    }

    /// Index of the link called `name`.
    ///
    /// # Errors
    /// [`HostError::NoLink`] if there is none.
    pub async fn link_index(&self, name: &str) -> Result<u32, HostError> {
        match self.link(name).await? {
            Some(link) => Ok(link.index),
            None => Err(HostError::NoLink(name.to_owned())),
        }
    }

    async fn first_link(&self, query: LinkGetRequest) -> Result<Option<Link>, HostError> {
        match query.execute().boxed().try_next().await {
            Ok(found) => Ok(found.map(Link::from_message)),
            Err(rtnetlink::Error::NetlinkError(error))
                if Errno::from_io_error(&error.to_io()) == Some(Errno::NODEV) =>
            {
                Ok(None)
            }
            Err(error) => Err(HostError::new("looking up a network interface", error)),
        }
    }

    /// Sets a link's MTU in bytes.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn set_mtu(&self, link_index: u32, mtu: u32) -> Result<(), HostError> {
        let change = LinkUnspec::new_with_index(link_index).mtu(mtu).build();
        let result = self.handle.link().set(change).execute().await;
        result.map_err(|error| HostError::new(format!("setting the MTU to {mtu}"), error))
    }

    /// Brings a link up.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn set_up(&self, link_index: u32) -> Result<(), HostError> {
        let change = LinkUnspec::new_with_index(link_index).up().build();
        let result = self.handle.link().set(change).execute().await;
        result.map_err(|error| HostError::new("bringing the interface up", error))
    }

    /// Deletes a link.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn delete_link(&self, link_index: u32) -> Result<(), HostError> {
        let result = self.handle.link().del(link_index).execute().await;
        result.map_err(|error| HostError::new("deleting the interface", error))
    }

    /// Gives a link an address, with the prefix that is reached through it.
    ///
    /// # Errors
    /// [`HostError::Exists`] when it has the address already, or when the kernel refuses.
    pub async fn add_address(&self, link_index: u32, address: IpNet) -> Result<(), HostError> {
        let mut request =
            self.handle.address().add(link_index, address.addr(), address.prefix_len());
        // `ip address add` sets no broadcast address unless asked to, so wg-quick's interfaces
        // have none.
        request
            .message_mut()
            .attributes
            .retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
        let result = request.execute().await;
        result.map_err(|error| HostError::new(format!("adding address {address}"), error))
    }

    /// All addresses of the host.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn addresses(&self) -> Result<Vec<HostAddress>, HostError> {
        let messages: Vec<AddressMessage> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| HostError::new("listing addresses", error))?;
        Ok(messages.iter().filter_map(HostAddress::from_message).collect())
    }

    /// Routes a prefix to a link, with link scope.
    ///
    /// # Errors
    /// [`HostError::Exists`] when the table has such a route already, or when the kernel refuses.
    pub async fn add_route(
        &self,
        link_index: u32,
        prefix: IpNet,
        table: u32,
    ) -> Result<(), HostError> {
        let route = policy::link_route(link_index, prefix, table);
        let result = self.handle.route().add(route).execute().await;
        result.map_err(|error| HostError::new(format!("adding route {prefix}"), error))
    }

    /// Prefixes that the main table routes to a link.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn routes(&self, link_index: u32) -> Result<Vec<IpNet>, HostError> {
        let mut prefixes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let found = self.main_routes(family).await?;
            let ours = found.iter().filter(|route| output_link(route) == Some(link_index));
            prefixes.extend(ours.filter_map(destination));
        }
        Ok(prefixes)
    }

    /// Prefixes that any table routes to a link, with the tables.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn routes_of_all_tables(
        &self,
        link_index: u32,
    ) -> Result<Vec<(IpNet, u32)>, HostError> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let routes = self.all_routes(family).await?;
            let ours = routes.iter().filter(|route| output_link(route) == Some(link_index));
            found.extend(
                ours.filter_map(|route| Some((destination(route)?, policy::table_of(route)))),
            );
        }
        Ok(found)
    }

    /// MTU in bytes of the way to `destination`: the route's own if it has one, else that of
    /// the link it leaves by; nothing if there is no route.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn path_mtu(&self, destination: IpAddr) -> Result<Option<u32>, HostError> {
        match self.way_to(destination).await? {
            Some(route) => self.route_mtu(&route).await,
            None => Ok(None),
        }
    }

    /// As [`path_mtu`](Self::path_mtu); nothing if the way is by this link.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn path_mtu_but_by(
        &self,
        link_index: u32,
        destination: IpAddr,
    ) -> Result<Option<u32>, HostError> {
        match self.way_to(destination).await? {
            Some(route) if output_link(&route) != Some(link_index) => self.route_mtu(&route).await,
            _ => Ok(None),
        }
    }

    async fn way_to(&self, destination: IpAddr) -> Result<Option<RouteMessage>, HostError> {
        let query = match destination {
            IpAddr::V4(ip) => {
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(ip, 32).build()
            }
            IpAddr::V6(ip) => {
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(ip, 128).build()
            }
        };
        match self.handle.route().get(query).execute().boxed().try_next().await {
            Ok(found) => Ok(found),
            // Unreachable, prohibited, or a family the host does not speak: no way there.
            Err(rtnetlink::Error::NetlinkError(_)) => Ok(None),
            Err(error) => {
                Err(HostError::new(format!("looking up the route to {destination}"), error))
            }
        }
    }

    /// By which link datagrams leave, and the MTU that their route was given; nothing if they would not
    /// leave. The next hop costs another question.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn way_towards(
        &self,
        towards: &Towards,
        mark: u32,
        with_next_hop: bool,
    ) -> Result<Option<Way>, HostError> {
        let Some(route) = self.route_towards(towards, mark, RouteFlags::empty()).await? else {
            return Ok(None);
        };
        let Some(link) = output_link(&route) else { return Ok(None) };
        let (mut mtu, mut hop) = (None, None);
        if own_mtu(&route).is_some() || with_next_hop {
            // It may be what an ICMP message said, which anybody can send. The route that matched, as it
            // was configured, knows nothing of those.
            let matched = self.route_towards(towards, mark, RouteFlags::FibMatch).await?;
            mtu = matched.as_ref().and_then(own_mtu);
            hop = matched.and_then(|matched| next_hop::next_hop(towards.remote, &route, &matched));
        }
        Ok(Some(Way { link, mtu, next_hop: hop.filter(|_| with_next_hop) }))
    }

    async fn route_towards(
        &self,
        towards: &Towards,
        mark: u32,
        flags: RouteFlags,
    ) -> Result<Option<RouteMessage>, HostError> {
        let mut query = match towards.remote {
            IpAddr::V4(remote) => {
                let query = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(remote, 32);
                match towards.source {
                    Some(IpAddr::V4(source)) => query.source_prefix(source, 32),
                    _ => query,
                }
                .build()
            }
            IpAddr::V6(remote) => {
                let query = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(remote, 128);
                match towards.source {
                    Some(IpAddr::V6(source)) => query.source_prefix(source, 128),
                    _ => query,
                }
                .build()
            }
        };
        query.header.flags = flags;
        if mark != 0 {
            query.attributes.push(RouteAttribute::Mark(mark));
        }
        if let Some((local, remote)) = towards.ports {
            let ports = [
                RouteAttribute::IpProto(PROTOCOL_UDP),
                RouteAttribute::Sport(local),
                RouteAttribute::Dport(remote),
            ];
            query.attributes.extend(ports);
        }
        if towards.link != 0 {
            query.attributes.push(RouteAttribute::Oif(towards.link));
        }
        match self.handle.route().get(query).execute().boxed().try_next().await {
            Ok(route) => Ok(route),
            Err(rtnetlink::Error::NetlinkError(_)) => Ok(None),
            Err(error) => {
                Err(HostError::new(format!("looking up the route to {}", towards.remote), error))
            }
        }
    }

    /// MTU in bytes of the IPv4 default route, if there is one.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn default_route_mtu(&self) -> Result<Option<u32>, HostError> {
        let routes = self.main_routes(AddressFamily::Inet).await?;
        match routes.iter().find(|route| route.header.destination_prefix_length == 0) {
            Some(route) => self.route_mtu(route).await,
            None => Ok(None),
        }
    }

    async fn main_routes(&self, family: AddressFamily) -> Result<Vec<RouteMessage>, HostError> {
        let mut routes = self.all_routes(family).await?;
        routes.retain(|route| route.header.table == RouteHeader::RT_TABLE_MAIN);
        Ok(routes)
    }

    async fn all_routes(&self, family: AddressFamily) -> Result<Vec<RouteMessage>, HostError> {
        let mut query = RouteMessage::default();
        query.header.address_family = family;
        let routes = self.handle.route().get(query).execute().try_collect().await;
        routes.map_err(|error| HostError::new("listing routes", error))
    }

    async fn route_mtu(&self, route: &RouteMessage) -> Result<Option<u32>, HostError> {
        if let Some(own) = own_mtu(route) {
            return Ok(Some(own));
        }
        match output_link(route) {
            Some(index) => Ok(self.link_by_index(index).await?.map(|link| link.mtu)),
            None => Ok(None),
        }
    }
}

/// The MTU that a route has beside that of its link.
fn own_mtu(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|metric| match metric {
            RouteMetric::Mtu(mtu) => Some(*mtu),
            _ => None,
        }),
        _ => None,
    })
}

fn output_link(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

fn destination(route: &RouteMessage) -> Option<IpNet> {
    use netlink_packet_route::route::RouteAddress;
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    });
    let any = match route.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    IpNet::new(address.unwrap_or(any), route.header.destination_prefix_length).ok()
}

#[cfg(test)]
mod tests;
