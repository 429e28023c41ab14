//! Links and addresses as they matter to who forwards packets.

use std::net::IpAddr;

use futures_util::TryStreamExt as _;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};

use super::{Host, HostAddress, HostError};

/// A link by which packets may come and go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ForwardingLink {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is Ethernet, and no part of another link.
    pub is_ethernet: bool,
    /// Whether its packets have an Ethernet header.
    pub has_ethernet_header: bool,
    /// Its addresses from which packets may leave, what the kernel would choose first. None of a link only.
    pub addresses: Vec<IpAddr>,
}

impl Host {
    /// All links but that to oneself.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn forwarding_links(&self) -> Result<Vec<ForwardingLink>, HostError> {
        let links: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| HostError::new("listing links", error))?;
        let addresses: Vec<AddressMessage> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| HostError::new("listing addresses", error))?;
        let is_loopback = |link: &LinkMessage| link.header.flags.contains(LinkFlags::Loopback);
        let links = links.iter().filter(|link| !is_loopback(link));
        Ok(links.map(|link| ForwardingLink::new(link, &addresses)).collect())
    }
}

impl ForwardingLink {
    fn new(link: &LinkMessage, addresses: &[AddressMessage]) -> Self {
        let (mut name, mut is_part) = (String::new(), false);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(is) => name.clone_from(is),
                LinkAttribute::Controller(of) => is_part = *of != 0,
                _ => {}
            }
        }
        let index = link.header.index;
        let own = addresses.iter().filter(|message| message.header.index == index);
        let mut ranked: Vec<(u8, IpAddr)> = own.filter_map(ranked).collect();
        // The kernel lists them in its own order, which stays.
        ranked.sort_by_key(|(rank, _)| *rank);
        let mut addresses: Vec<IpAddr> = Vec::new();
        for (_, address) in ranked {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        let has_ethernet_header = link.header.link_layer_type == LinkLayerType::Ether;
        let is_ethernet = has_ethernet_header && !is_part;
        Self { index, name, is_ethernet, has_ethernet_header, addresses }
    }
}

/// An address from which packets may leave; those with the least number first.
fn ranked(message: &AddressMessage) -> Option<(u8, IpAddr)> {
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        if let AddressAttribute::Flags(all) = attribute {
            flags = *all;
        }
    }
    let never = AddressFlags::Tentative | AddressFlags::Dadfailed;
    let is_of_link = !matches!(message.header.scope, AddressScope::Universe | AddressScope::Site);
    // An optimistic one is tentative, and may be used.
    if is_of_link || (flags.intersects(never) && !flags.contains(AddressFlags::Optimistic)) {
        return None;
    }
    let address = HostAddress::from_message(message)?.net.addr();
    // Of IPv6 the bit of a secondary one says that it is only for a while.
    let rank = u8::from(flags.contains(AddressFlags::Secondary))
        + 2 * u8::from(flags.contains(AddressFlags::Deprecated));
    Some((rank, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str, scope: AddressScope, flags: AddressFlags) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.index = 3;
        message.header.prefix_len = 24;
        message.header.scope = scope;
        message.attributes.push(AddressAttribute::Address(text.parse().unwrap()));
        message.attributes.push(AddressAttribute::Flags(flags));
        message
    }

    #[test]
    fn the_first_address_is_the_one_that_the_kernel_would_choose() {
        let (global, none) = (AddressScope::Universe, AddressFlags::empty());
        let messages = [
            message("192.0.2.3", global, AddressFlags::Secondary),
            message("2001:db8::4", global, AddressFlags::Deprecated),
            message("2001:db8::5", global, AddressFlags::Tentative),
            message("fe80::1", AddressScope::Link, none),
            message("192.0.2.2", global, AddressFlags::Permanent),
            message("2001:db8::6", global, AddressFlags::Tentative | AddressFlags::Optimistic),
        ];
        let mut link = LinkMessage::default();
        link.header.index = 3;
        link.header.link_layer_type = LinkLayerType::Ether;
        link.attributes.push(LinkAttribute::IfName("eth0".to_owned()));
        let found = ForwardingLink::new(&link, &messages);
        let addresses: Vec<String> = found.addresses.iter().map(IpAddr::to_string).collect();
        assert_eq!(addresses, ["192.0.2.2", "2001:db8::6", "192.0.2.3", "2001:db8::4"]);
        assert!(found.is_ethernet);
        link.attributes.push(LinkAttribute::Controller(7));
        let part = ForwardingLink::new(&link, &messages);
        assert!(!part.is_ethernet && part.has_ethernet_header);
    }
}
