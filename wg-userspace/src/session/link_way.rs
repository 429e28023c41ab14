//! How datagrams to a peer are framed, where they are sent past the kernel's stack.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use wg_common::endpoint::Endpoint;
use wg_common::headers::OuterHeaders;

/// What was found out of the way to an endpoint: a value that control publishes, and workers read.
#[derive(Debug)]
pub struct LinkWay {
    /// The remote address that it leads to.
    remote: IpAddr,
    /// The address of ours that the peer had dialled.
    dialled: Option<IpAddr>,
    /// Nothing if the kernel's stack has to send.
    hop: Option<Hop>,
    /// Whether a worker has sent by it since control last asked.
    used: AtomicBool,
}

/// The first hop of a way, over Ethernet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hop {
    /// Index of the link by which datagrams leave.
    pub link: u32,
    /// The neighbour to whom they are given.
    pub neighbour: IpAddr,
    /// Longest IP packet in bytes that leaves in one piece.
    pub mtu: usize,
    /// What stands before them, but for what differs between datagrams: ports, TOS, identification.
    pub headers: OuterHeaders,
    /// Whether the neighbour's MAC address is known, and in the headers.
    pub is_resolved: bool,
}

impl LinkWay {
    /// The way to `endpoint`.
    pub fn new(endpoint: &Endpoint, hop: Option<Hop>) -> Self {
        let (remote, dialled) = ends(endpoint);
        Self { remote, dialled, hop, used: AtomicBool::new(false) }
    }

    /// Whether it was `endpoint` whose way was looked for. Its port does not matter.
    pub fn is_for(&self, endpoint: &Endpoint) -> bool {
        ends(endpoint) == (self.remote, self.dialled)
    }

    /// The first hop, if there is one over Ethernet, resolved or not.
    pub fn hop(&self) -> Option<&Hop> {
        self.hop.as_ref()
    }

    /// The same way, to a neighbour that has another MAC address, or none that is known.
    pub fn with_neighbour_at(&self, mac: Option<[u8; 6]>) -> Self {
        let mut hop = self.hop;
        if let Some(hop) = &mut hop {
            hop.is_resolved = mac.is_some();
            hop.headers.dst_mac = mac.unwrap_or_default();
        }
        let used = AtomicBool::new(self.used.load(Relaxed));
        Self { remote: self.remote, dialled: self.dialled, hop, used }
    }

    /// Takes note that something is sent by it.
    pub fn note_used(&self) {
        if !self.used.load(Relaxed) {
            self.used.store(true, Relaxed);
        }
    }

    /// Whether something was sent by it since this was last asked.
    pub fn take_used(&self) -> bool {
        self.used.load(Relaxed) && self.used.swap(false, Relaxed)
    }
}

fn ends(endpoint: &Endpoint) -> (IpAddr, Option<IpAddr>) {
    (endpoint.remote.ip(), endpoint.local.map(|local| local.addr))
}

#[cfg(test)]
mod tests {
    use wg_common::endpoint::LocalSource;

    use super::*;

    fn endpoint(remote: &str, local: Option<&str>) -> Endpoint {
        let local = local.map(|addr| LocalSource { addr: addr.parse().unwrap(), ifindex: 3 });
        Endpoint { remote: remote.parse().unwrap(), local }
    }

    #[test]
    fn a_way_leads_to_one_address_from_one_address() {
        let way = LinkWay::new(&endpoint("192.0.2.1:7", Some("10.0.0.1")), None);
        assert!(way.is_for(&endpoint("192.0.2.1:8", Some("10.0.0.1"))));
        for other in [
            endpoint("192.0.2.2:7", Some("10.0.0.1")),
            endpoint("192.0.2.1:7", Some("10.0.0.2")),
            endpoint("192.0.2.1:7", None),
        ] {
            assert!(!way.is_for(&other), "{other:?}");
        }
    }

    #[test]
    fn use_is_told_once() {
        let way = LinkWay::new(&endpoint("192.0.2.1:7", None), None);
        assert!(!way.take_used());
        way.note_used();
        way.note_used();
        assert!(way.with_neighbour_at(None).take_used(), "a neighbour that moved is still in use");
        assert!(way.take_used() && !way.take_used());
    }
}
