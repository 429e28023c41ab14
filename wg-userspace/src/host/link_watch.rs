//! What becomes of one link.

use futures_util::{Stream, StreamExt as _};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
};

use super::{Host, HostError};

/// What became of a link.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LinkChange {
    /// It has this MTU.
    Mtu(u32),
    /// It was deleted.
    Gone,
}

type Messages = Box<dyn Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Send + Unpin>;

/// Tells a link's MTU once, and then what changes.
pub struct LinkWatch {
    host: Host,
    link_index: u32,
    messages: Messages,
    told: Option<LinkChange>,
    must_look: bool,
}

impl LinkWatch {
    /// Starts to watch the link with this index in the namespace of `host`.
    ///
    /// # Errors
    /// [`HostError::Open`] when the kernel gives no socket.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(host: Host, link_index: u32) -> Result<LinkWatch, HostError> {
        let (connection, _, messages) =
            rtnetlink::new_multicast_connection(&[MulticastGroup::Link])
                .map_err(HostError::Open)?;
        tokio::spawn(connection);
        let messages = Box::new(messages.map(|(message, _)| message));
        Ok(LinkWatch { host, link_index, messages, told: None, must_look: true })
    }

    /// Waits for the next change. Dropping the future before it is ready loses nothing.
    ///
    /// # Errors
    /// When the kernel does not tell, or closed the socket; the watch is of no more use then.
    pub async fn next(&mut self) -> Result<LinkChange, HostError> {
        loop {
            if !self.must_look {
                let Some(message) = self.messages.next().await else {
                    return Err(HostError::NoAnswer { doing: "watching a link".to_owned() });
                };
                self.must_look = self.concerns_us(&message.payload);
                continue;
            }
            let link = self.host.link_by_index(self.link_index).await?;
            self.must_look = false;
            let change = link.map_or(LinkChange::Gone, |link| LinkChange::Mtu(link.mtu));
            if self.told != Some(change) {
                self.told = Some(change);
                return Ok(change);
            }
        }
    }

    /// Whether to look again: at any message about the link, since not every message says all of it.
    fn concerns_us(&self, payload: &NetlinkPayload<RouteNetlinkMessage>) -> bool {
        match payload {
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link),
            ) => link.header.index == self.link_index,
            NetlinkPayload::Overrun(_) => true,
            _ => false,
        }
    }
}
