//! Where a peer's datagrams go.

use core::net::{IpAddr, SocketAddr};

/// A peer's endpoint: its outer address and port, and which address of ours answers it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Endpoint {
    /// The peer's outer address and port.
    pub remote: SocketAddr,
    /// The address of ours that the peer dialled, if it has sent us anything: replies leave from it.
    pub local: Option<LocalSource>,
}

/// An address of ours and the interface on which it was dialled.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct LocalSource {
    /// Of the same family as the endpoint's remote address.
    pub addr: IpAddr,
    /// Index of the interface on which the datagram arrived; 0 if unknown.
    pub ifindex: u32,
}

impl Endpoint {
    /// An endpoint from which nothing has come yet, as a configuration names it.
    pub const fn configured(remote: SocketAddr) -> Self {
        Self { remote, local: None }
    }
}
