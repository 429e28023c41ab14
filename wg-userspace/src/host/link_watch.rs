//! What becomes of one link.

use futures_util::{FutureExt as _, Stream, StreamExt as _};
use netlink_packet_route::{RouteNetlinkMessage, link::LinkFlags};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
};

use super::{Host, HostError};

/// What became of a link.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LinkChange {
    /// It is there, and this is how.
    Is {
        /// Its MTU in bytes.
        mtu: u32,
        /// Whether it was taken up.
        is_up: bool,
    },
    /// It was deleted, or moved to another network namespace.
    Gone,
}

type Messages = Box<dyn Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Send + Unpin>;

/// Tells how a link is once, and then what changes.
pub struct LinkWatch {
    host: Host,
    link_index: u32,
    messages: Messages,
    told: Option<LinkChange>,
    must_look: bool,
}

impl LinkWatch {
    /// Starts to watch the link with this index in the namespace of `host`, which must be this thread's.
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
    /// A link that was down for a moment only is told to have been.
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
                if let Some(down) = self.went_down(&message.payload) {
                    self.told = Some(down);
                    return Ok(down);
                }
                continue;
            }
            let link = self.host.link_by_index(self.link_index).await?;
            self.must_look = false;
            let change = link.map_or(LinkChange::Gone, |link| LinkChange::Is {
                mtu: link.mtu,
                is_up: link.is_up,
            });
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

    /// The change to tell if the message says that the link went down: by now it may be up again.
    fn went_down(&self, payload: &NetlinkPayload<RouteNetlinkMessage>) -> Option<LinkChange> {
        match (payload, self.told) {
            (
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)),
                Some(LinkChange::Is { mtu, is_up: true }),
            ) if link.header.index == self.link_index
                && !link.header.flags.contains(LinkFlags::Up) =>
            {
                Some(LinkChange::Is { mtu, is_up: false })
            }
            _ => None,
        }
    }
}

/// Tells that some link appeared, changed or is gone, without saying which.
pub struct AnyLinkWatch {
    messages: Messages,
}

impl AnyLinkWatch {
    /// Starts to watch this thread's network namespace.
    ///
    /// # Errors
    /// [`HostError::Open`] when the kernel gives no socket.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new() -> Result<AnyLinkWatch, HostError> {
        let (connection, _, messages) =
            rtnetlink::new_multicast_connection(&[MulticastGroup::Link])
                .map_err(HostError::Open)?;
        tokio::spawn(connection);
        Ok(AnyLinkWatch { messages: Box::new(messages.map(|(message, _)| message)) })
    }

    /// Waits until there was a change since the last call. Dropping the future loses nothing.
    ///
    /// # Errors
    /// When the kernel closed the socket; the watch is of no more use then.
    pub async fn next(&mut self) -> Result<(), HostError> {
        let closed = || HostError::NoAnswer { doing: "watching links".to_owned() };
        self.messages.next().await.ok_or_else(closed)?;
        while let Some(Some(_)) = self.messages.next().now_or_never() {}
        Ok(())
    }
}
