//! That something has changed by which datagrams find their way.

use futures_util::{FutureExt as _, Stream, StreamExt as _};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::{MulticastGroup, packet_core::NetlinkMessage};

use super::HostError;

type Messages = Box<dyn Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Send + Unpin>;

/// Tells that routes, rules, addresses or links changed, without saying how.
pub struct RouteWatch {
    messages: Messages,
}

impl RouteWatch {
    /// Starts to watch this thread's network namespace.
    ///
    /// # Errors
    /// [`HostError::Open`] when the kernel gives no socket.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new() -> Result<RouteWatch, HostError> {
        // A link that goes down takes its IPv4 routes with it without a word about them.
        let groups = [
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Link,
        ];
        let (connection, _, messages) =
            rtnetlink::new_multicast_connection(&groups).map_err(HostError::Open)?;
        tokio::spawn(connection);
        Ok(RouteWatch { messages: Box::new(messages.map(|(message, _)| message)) })
    }

    /// Waits until there was a change since the last call. Dropping the future loses nothing.
    ///
    /// # Errors
    /// When the kernel closed the socket; the watch is of no more use then.
    pub async fn next(&mut self) -> Result<(), HostError> {
        let closed = || HostError::NoAnswer { doing: "watching routes".to_owned() };
        self.messages.next().await.ok_or_else(closed)?;
        while let Some(Some(_)) = self.messages.next().now_or_never() {}
        Ok(())
    }
}
