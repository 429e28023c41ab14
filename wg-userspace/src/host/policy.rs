//! Rules for which table is asked, routes of tables other than the main one, and taking things away
//! again.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr},
};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    route::{RouteAttribute, RouteMessage, RouteProtocol},
    rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
};
use rtnetlink::IpVersion;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{Host, HostError};

/// A version of the internet protocol.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// The family of a prefix.
    pub const fn of(net: IpNet) -> Family {
        match net {
            IpNet::V4(_) => Family::V4,
            IpNet::V6(_) => Family::V6,
        }
    }

    const fn version(self) -> IpVersion {
        match self {
            Family::V4 => IpVersion::V4,
            Family::V6 => IpVersion::V6,
        }
    }

    const fn address_family(self) -> AddressFamily {
        match self {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        }
    }
}

/// A rule for which table is asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rule {
    /// For which packets.
    pub family: Family,
    /// Its place: rules are asked from the least to the greatest.
    pub priority: u32,
    /// The table that is asked.
    pub table: u32,
    /// The mark that a packet must not have.
    pub unless_marked: Option<u32>,
    /// Routes of this prefix length or less do not count.
    pub suppress_prefix_len: Option<u32>,
}

impl Rule {
    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = self.family.address_family();
        message.header.action = RuleAction::ToTable;
        message.attributes.push(RuleAttribute::Priority(self.priority));
        match u8::try_from(self.table) {
            Ok(table) => message.header.table = table,
            Err(_) => message.attributes.push(RuleAttribute::Table(self.table)),
        }
        if let Some(mark) = self.unless_marked {
            message.header.flags |= RuleFlags::Invert;
            message.attributes.push(RuleAttribute::FwMark(mark));
        }
        if let Some(len) = self.suppress_prefix_len {
            message.attributes.push(RuleAttribute::SuppressPrefixLen(len));
        }
        message
    }

    fn from_message(family: Family, message: &RuleMessage) -> Rule {
        let mut rule = Rule {
            family,
            priority: 0,
            table: message.header.table.into(),
            unless_marked: None,
            suppress_prefix_len: None,
        };
        for attribute in &message.attributes {
            match *attribute {
                RuleAttribute::Priority(priority) => rule.priority = priority,
                RuleAttribute::Table(table) => rule.table = table,
                RuleAttribute::FwMark(mark) if message.header.flags.contains(RuleFlags::Invert) => {
                    rule.unless_marked = Some(mark);
                }
                RuleAttribute::SuppressPrefixLen(len) if len != u32::MAX => {
                    rule.suppress_prefix_len = Some(len);
                }
                _ => {}
            }
        }
        rule
    }
}

impl Host {
    /// The rules of a family, in the order in which they are asked, as far as [`Rule`] shows them.
    /// None if the host does not speak it.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn rules(&self, family: Family) -> Result<Vec<Rule>, HostError> {
        let messages: Vec<RuleMessage> =
            match self.handle.rule().get(family.version()).execute().try_collect().await {
                Ok(messages) => messages,
                Err(rtnetlink::Error::NetlinkError(_)) => Vec::new(),
                Err(error) => return Err(HostError::new("listing rules", error)),
            };
        Ok(messages.iter().map(|message| Rule::from_message(family, message)).collect())
    }

    /// The priority that the kernel gives to a rule that comes without one: just before the second
    /// rule of all.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn next_rule_priority(&self, family: Family) -> Result<u32, HostError> {
        let rules = self.rules(family).await?;
        Ok(rules.get(1).map_or(0, |second| second.priority.saturating_sub(1)))
    }

    /// Adds a rule.
    ///
    /// # Errors
    /// [`HostError::Exists`] if there is this rule, or when the kernel refuses.
    pub async fn add_rule(&self, rule: Rule) -> Result<(), HostError> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = rule.message();
        let result = request.execute().await;
        result.map_err(|error| {
            HostError::new(format!("adding a rule for table {}", rule.table), error)
        })
    }

    /// Deletes exactly this rule, if it is there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn delete_rule(&self, rule: Rule) -> Result<(), HostError> {
        // The kernel compares only what is in the message, and of that not whether it is inverted.
        if !self.rules(rule.family).await?.contains(&rule) {
            return Ok(());
        }
        let result = self.handle.rule().del(rule.message()).execute().await;
        gone(result, || format!("deleting the rule for table {}", rule.table))
    }

    /// Whether a table has routes, of either family.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn has_routes(&self, table: u32) -> Result<bool, HostError> {
        for family in Family::ALL {
            let mut query = RouteMessage::default();
            query.header.address_family = family.address_family();
            let mut routes = self.handle.route().get(query).execute();
            let mut found = false;
            // To the end: the socket is for the next request, too.
            loop {
                match routes.try_next().await {
                    Ok(Some(route)) => found |= table_of(&route) == table,
                    Ok(None) => break,
                    // A family that the host does not speak.
                    Err(rtnetlink::Error::NetlinkError(_)) => break,
                    Err(error) => return Err(HostError::new("listing routes", error)),
                }
            }
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Deletes a link's route for a prefix from a table, if it is there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn delete_route(
        &self,
        link_index: u32,
        prefix: IpNet,
        table: u32,
    ) -> Result<(), HostError> {
        let route = link_route(link_index, prefix, table);
        let result = self.handle.route().del(route).execute().await;
        gone(result, || format!("deleting route {prefix}"))
    }

    /// Takes an address from a link, if it has it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn delete_address(&self, link_index: u32, address: IpNet) -> Result<(), HostError> {
        let mut request =
            self.handle.address().add(link_index, address.addr(), address.prefix_len());
        let message = request.message_mut().clone();
        let result = self.handle.address().del(message).execute().await;
        gone(result, || format!("removing address {address}"))
    }
}

/// Takes what is not there any more as deleted.
fn gone(
    result: Result<(), rtnetlink::Error>,
    doing: impl FnOnce() -> String,
) -> Result<(), HostError> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if is_gone(&message.to_io()) => Ok(()),
        Err(error) => Err(HostError::new(doing(), error)),
        Ok(()) => Ok(()),
    }
}

fn is_gone(error: &io::Error) -> bool {
    const GONE: [Errno; 4] = [Errno::SRCH, Errno::NOENT, Errno::NODEV, Errno::ADDRNOTAVAIL];
    Errno::from_io_error(error).is_some_and(|errno| GONE.contains(&errno))
}

pub(super) fn table_of(route: &RouteMessage) -> u32 {
    let attribute = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    attribute.unwrap_or(route.header.table.into())
}

/// The message for a route with link scope.
pub(super) fn link_route(link_index: u32, prefix: IpNet, table: u32) -> RouteMessage {
    use netlink_packet_route::route::RouteScope;
    use rtnetlink::RouteMessageBuilder;
    match prefix.trunc() {
        IpNet::V4(prefix) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(prefix.addr(), prefix.prefix_len())
            .output_interface(link_index)
            .scope(RouteScope::Link)
            .protocol(RouteProtocol::Boot)
            .table_id(table)
            .build(),
        IpNet::V6(prefix) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(prefix.addr(), prefix.prefix_len())
            .output_interface(link_index)
            .protocol(RouteProtocol::Boot)
            .table_id(table)
            .build(),
    }
}
