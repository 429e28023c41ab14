//! The neighbours of the host, and how they change.

use std::collections::HashMap;
use std::net::IpAddr;

use futures_util::{FutureExt as _, Stream, StreamExt as _, TryStreamExt as _};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};

use super::next_hop::is_unicast;
use super::{Host, HostError};

/// A neighbour to whom frames can be sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Neighbour {
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Whether the kernel would find out if it is still there before it relies on it for long.
    pub is_stale: bool,
}

/// Index of a link, and the address of a neighbour on it.
pub type NeighbourOf = (u32, IpAddr);

/// A neighbour, and how it is now; nothing if no frames can be sent to it.
pub type NeighbourChange = (NeighbourOf, Option<Neighbour>);

type Messages = Box<dyn Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Send + Unpin>;

/// Tells every neighbour once, and then what changes.
///
/// Nothing is missed: the watch subscribes before it lists, and lists again when the kernel says that it
/// lost a message.
pub struct NeighbourWatch {
    host: Host,
    messages: Messages,
    known: HashMap<NeighbourOf, Neighbour>,
    must_list: bool,
}

impl NeighbourWatch {
    /// Starts to watch the neighbours in the namespace of `host`, which must be this thread's.
    ///
    /// # Errors
    /// [`HostError::Open`] when the kernel gives no socket.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(host: Host) -> Result<Self, HostError> {
        let (connection, _, messages) =
            rtnetlink::new_multicast_connection(&[MulticastGroup::Neigh])
                .map_err(HostError::Open)?;
        tokio::spawn(connection);
        Ok(Self {
            host,
            messages: Box::new(messages.map(|(message, _)| message)),
            known: HashMap::new(),
            must_list: true,
        })
    }

    /// Waits for changes, and gives all that there are. Dropping the future before it is ready loses nothing.
    ///
    /// # Errors
    /// When the kernel does not list the neighbours, or closed the socket; the watch is of no more use then.
    pub async fn next(&mut self) -> Result<Vec<NeighbourChange>, HostError> {
        let mut changes = Vec::new();
        loop {
            if self.must_list {
                let listed = self.list().await?;
                changes.extend(self.replace(listed));
                self.must_list = false;
            }
            while let Some(message) = self.messages.next().now_or_never() {
                let Some(message) = message else { return Err(closed()) };
                self.note(message, &mut changes);
            }
            if self.must_list {
                continue;
            }
            if !changes.is_empty() {
                return Ok(changes);
            }
            let message = self.messages.next().await.ok_or_else(closed)?;
            self.note(message, &mut changes);
        }
    }

    fn note(
        &mut self,
        message: NetlinkMessage<RouteNetlinkMessage>,
        changes: &mut Vec<NeighbourChange>,
    ) {
        let (message, is_there) = match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(new)) => (new, true),
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(gone)) => (gone, false),
            NetlinkPayload::Overrun(_) => return self.must_list = true,
            _ => return,
        };
        let Some((of, neighbour)) = read(&message) else { return };
        let now = neighbour.filter(|_| is_there);
        let before = match now {
            Some(now) => self.known.insert(of, now),
            None => self.known.remove(&of),
        };
        if before != now {
            changes.push((of, now));
        }
    }

    async fn list(&self) -> Result<HashMap<NeighbourOf, Neighbour>, HostError> {
        self.host.neighbours().await
    }
}

impl Host {
    /// All neighbours to whom frames can be sent.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn neighbours(&self) -> Result<HashMap<NeighbourOf, Neighbour>, HostError> {
        let mut listed = HashMap::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let query = self.handle.neighbours().get().set_address_family(family);
            let found: Vec<NeighbourMessage> = query
                .execute()
                .try_collect()
                .await
                .map_err(|error| HostError::new("listing neighbours", error))?;
            for message in found {
                if let Some((of, Some(neighbour))) = read(&message) {
                    listed.insert(of, neighbour);
                }
            }
        }
        Ok(listed)
    }
}

impl NeighbourWatch {
    /// Takes a complete list for the truth and gives the differences.
    fn replace(&mut self, listed: HashMap<NeighbourOf, Neighbour>) -> Vec<NeighbourChange> {
        let before = std::mem::replace(&mut self.known, listed);
        let gone = before.keys().filter(|of| !self.known.contains_key(of)).map(|&of| (of, None));
        let new = self.known.iter().filter(|(of, now)| before.get(of) != Some(now));
        gone.chain(new.map(|(&of, &now)| (of, Some(now)))).collect()
    }
}

/// Who is meant, and how it is.
fn read(message: &NeighbourMessage) -> Option<(NeighbourOf, Option<Neighbour>)> {
    // For whom this host answers.
    if message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let link = message.header.ifindex;
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                address = Some(IpAddr::V4(*ip));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                address = Some(IpAddr::V6(*ip));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(&bytes[..]).ok().filter(is_unicast);
            }
            _ => {}
        }
    }
    let is_stale = match message.header.state {
        NeighbourState::Stale => Some(true),
        NeighbourState::Reachable
        | NeighbourState::Delay
        | NeighbourState::Probe
        | NeighbourState::Permanent => Some(false),
        // Not resolved, not there, or a link without addresses.
        _ => None,
    };
    let neighbour = mac.zip(is_stale).map(|(mac, is_stale)| Neighbour { mac, is_stale });
    Some(((link, address?), neighbour))
}

fn closed() -> HostError {
    HostError::NoAnswer { doing: "watching neighbours".to_owned() }
}
