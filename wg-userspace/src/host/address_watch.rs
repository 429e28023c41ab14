//! The addresses of the host and how they change.

use std::{
    collections::{HashSet, VecDeque},
    net::IpAddr,
};

use futures_util::{Stream, StreamExt};
use netlink_packet_route::{RouteNetlinkMessage, address::AddressMessage};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
};

use super::{Host, HostAddress, HostError};

/// The host got its first link with an address, or lost the last.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AddressChange {
    /// The host has this address now.
    Added(IpAddr),
    /// The host has this address no more.
    Removed(IpAddr),
}

type Messages = Box<dyn Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Send + Unpin>;

/// Tells every address of the host once, and then what changes.
///
/// Nothing is missed: the watch subscribes before it lists, and lists again when the kernel
/// says that it lost a message.
pub struct AddressWatch {
    host: Host,
    messages: Messages,
    known: Known,
    ready: VecDeque<AddressChange>,
    must_list: bool,
}

impl AddressWatch {
    /// Starts to watch the addresses of `host`, which must be of this thread's network
    /// namespace.
    ///
    /// # Errors
    /// [`HostError::Open`] when the kernel gives no socket.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(host: Host) -> Result<AddressWatch, HostError> {
        let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (connection, _, messages) =
            rtnetlink::new_multicast_connection(&groups).map_err(HostError::Open)?;
        tokio::spawn(connection);
        Ok(AddressWatch {
            host,
            messages: Box::new(messages.map(|(message, _)| message)),
            known: Known::default(),
            ready: VecDeque::new(),
            must_list: true,
        })
    }

    /// Waits for the next change. Dropping the future before it is ready loses nothing.
    ///
    /// # Errors
    /// When the kernel does not list the addresses, or closed the socket; the watch is of no
    /// more use then.
    pub async fn next(&mut self) -> Result<AddressChange, HostError> {
        loop {
            if self.must_list {
                let listed = self.host.addresses().await?;
                self.ready.extend(self.known.replace(listed));
                self.must_list = false;
            }
            if let Some(change) = self.ready.pop_front() {
                return Ok(change);
            }
            let Some(message) = self.messages.next().await else {
                return Err(HostError::NoAnswer { doing: "watching addresses".to_owned() });
            };
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(added)) => {
                    self.ready.extend(self.known.add(&added));
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelAddress(removed)) => {
                    self.ready.extend(self.known.remove(&removed));
                }
                NetlinkPayload::Overrun(_) => self.must_list = true,
                _ => {}
            }
        }
    }
}

/// Addresses by link. One address may be on several links; the host has it until it has left
/// the last.
#[derive(Debug, Default)]
struct Known {
    on_links: HashSet<(u32, IpAddr)>,
}

impl Known {
    fn has(&self, ip: IpAddr) -> bool {
        self.on_links.iter().any(|&(_, known)| known == ip)
    }

    fn add(&mut self, message: &AddressMessage) -> Option<AddressChange> {
        let address = HostAddress::from_message(message)?;
        let ip = address.net.addr();
        let is_new = !self.has(ip);
        self.on_links.insert((address.link_index, ip));
        is_new.then_some(AddressChange::Added(ip))
    }

    fn remove(&mut self, message: &AddressMessage) -> Option<AddressChange> {
        let address = HostAddress::from_message(message)?;
        let ip = address.net.addr();
        let was_known = self.on_links.remove(&(address.link_index, ip));
        (was_known && !self.has(ip)).then_some(AddressChange::Removed(ip))
    }

    /// Takes a complete list for the truth and gives the differences.
    fn replace(&mut self, listed: Vec<HostAddress>) -> Vec<AddressChange> {
        let addresses = |on_links: &HashSet<(u32, IpAddr)>| -> HashSet<IpAddr> {
            on_links.iter().map(|&(_, ip)| ip).collect()
        };
        let before = addresses(&self.on_links);
        self.on_links = listed.iter().map(|found| (found.link_index, found.net.addr())).collect();
        let after = addresses(&self.on_links);
        let removed = before.difference(&after).map(|&ip| AddressChange::Removed(ip));
        let added = after.difference(&before).map(|&ip| AddressChange::Added(ip));
        removed.chain(added).collect()
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::address::AddressAttribute;

    use super::*;

    fn message(link_index: u32, ip: &str) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.index = link_index;
        message.header.prefix_len = 24;
        message.attributes.push(AddressAttribute::Address(ip.parse().unwrap()));
        message
    }

    fn listed(link_index: u32, net: &str) -> HostAddress {
        HostAddress { link_index, net: net.parse().unwrap() }
    }

    #[test]
    fn an_address_on_two_links_leaves_with_the_last() {
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        let mut known = Known::default();
        assert_eq!(known.add(&message(1, "10.0.0.1")), Some(AddressChange::Added(ip)));
        assert_eq!(known.add(&message(2, "10.0.0.1")), None);
        assert_eq!(known.remove(&message(1, "10.0.0.1")), None);
        assert_eq!(known.remove(&message(2, "10.0.0.1")), Some(AddressChange::Removed(ip)));
        assert_eq!(known.remove(&message(2, "10.0.0.1")), None);
    }

    #[test]
    fn a_new_list_gives_the_differences() {
        let mut known = Known::default();
        known.replace(vec![listed(1, "10.0.0.1/24"), listed(2, "10.0.0.2/24")]);
        let changes = known.replace(vec![listed(1, "10.0.0.2/24"), listed(3, "fd00::1/64")]);
        assert_eq!(
            changes,
            [
                AddressChange::Removed("10.0.0.1".parse().unwrap()),
                AddressChange::Added("fd00::1".parse().unwrap()),
            ]
        );
    }

    #[test]
    fn the_local_end_of_a_point_to_point_link_is_ours() {
        let mut message = message(4, "10.0.0.2");
        message.attributes.push(AddressAttribute::Local("10.0.0.1".parse().unwrap()));
        let address = HostAddress::from_message(&message).unwrap();
        assert_eq!(address, listed(4, "10.0.0.1/24"));
    }
}
