//! Looks up the names of endpoints anew when peers do not answer.
//!
//! The kernel's WireGuard has addresses only, so that a peer whose address changes is lost until
//! somebody configures it again. Here the list of names comes after the configuration
//! (`tidegate=names`). If a peer with a name leaves a second initiation unanswered, the keeper is asked
//! where the name leads now: this process may open no sockets. If that is elsewhere, and nothing has
//! come from the peer meanwhile, its endpoint is there from then on. Where a peer that is alive has
//! roamed to always counts for more than its name.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hashbrown::HashSet;
use wg_common::endpoint::Endpoint;
use wg_common::protocol::KEEPALIVE_TIMEOUT;
use wg_common::time::Now;

use super::control::Control;
use crate::datapath::handoff::Work;
use crate::datapath::shared::PEER_COUNT_MAX;
use crate::device::SetRequest;
use crate::keeper::protocol::RESOLVE_EVERY;
use crate::key::PublicKey;
use crate::uapi::{EndpointName, Errno};

/// A peer's name is asked for this often: a little less often than the keeper looks, for a request that
/// comes too early is in vain.
const ASK_EVERY: Duration = RESOLVE_EVERY.saturating_add(Duration::from_secs(1));

/// A host, and a port there.
type Place = (String, u16);

/// The names of a device's endpoints.
#[derive(Debug, Default)]
pub struct Names {
    by_peer: HashMap<PublicKey, Named>,
    /// What the keeper was asked for, and the peers that wait for it.
    asking: HashMap<Place, HashSet<PublicKey>>,
}

#[derive(Debug)]
struct Named {
    place: Place,
    /// When it was last asked for.
    asked: Option<Now>,
    /// Where it led when the endpoint was last changed because of it.
    led_to: Option<SocketAddr>,
}

impl Names {
    /// These names. Of several for one peer the last counts.
    pub fn new(names: Vec<EndpointName>) -> Self {
        let named = names.into_iter().map(|EndpointName { public_key, host, port }| {
            (public_key, Named { place: (host, port), asked: None, led_to: None })
        });
        Self { by_peer: named.collect(), asking: HashMap::new() }
    }

    /// These names from now on. Of one that is the same as before it stays known what it led to.
    pub fn replace(&mut self, names: Vec<EndpointName>) {
        let mut new = Self::new(names).by_peer;
        for (peer, named) in &mut new {
            if let Some(before) = self.by_peer.remove(peer).filter(|b| b.place == named.place) {
                *named = before;
            }
        }
        self.by_peer = new;
    }

    /// The names, in the order of keys.
    pub fn list(&self) -> Vec<EndpointName> {
        let of = |(key, named): (&PublicKey, &Named)| {
            let (host, port) = named.place.clone();
            EndpointName { public_key: *key, host, port }
        };
        let mut list: Vec<_> = self.by_peer.iter().map(of).collect();
        list.sort_unstable_by_key(|name| *name.public_key.as_bytes());
        list
    }

    /// Forgets a peer's name.
    pub fn remove(&mut self, peer: &PublicKey) {
        self.by_peer.remove(peer);
    }

    /// Forgets the names of peers that a request removes, or says the endpoints of.
    pub fn follow(&mut self, request: &SetRequest) {
        if request.replace_peers {
            *self = Self::default();
        }
        if self.by_peer.is_empty() {
            return;
        }
        for change in request.peers.iter().filter(|c| c.remove || c.endpoint.is_some()) {
            self.remove(&change.public_key);
        }
    }

    /// A peer does not answer: what to ask the keeper for, if it is time.
    pub fn ask(&mut self, peer: &PublicKey, now: Now) -> Option<&Place> {
        let named = self.by_peer.get_mut(peer)?;
        if named.asked.is_some_and(|asked| now.since(asked) < ASK_EVERY) {
            return None;
        }
        named.asked = Some(now);
        self.asking.entry(named.place.clone()).or_default().insert(*peer);
        Some(&named.place)
    }

    /// The peers that waited for this answer and have the name yet, with when they asked.
    pub fn answered(&mut self, host: &str, port: u16) -> Vec<(PublicKey, Now)> {
        let place = (host.to_owned(), port);
        let waiting = self.asking.remove(&place).unwrap_or_default();
        let asked = |peer: PublicKey| {
            let named = self.by_peer.get(&peer).filter(|named| named.place == place)?;
            Some((peer, named.asked?))
        };
        waiting.into_iter().filter_map(asked).collect()
    }

    /// The endpoint of a peer was changed because of its name.
    pub fn led(&mut self, peer: &PublicKey, to: SocketAddr) {
        if let Some(named) = self.by_peer.get_mut(peer) {
            named.led_to = Some(to);
        }
    }

    /// Whether a peer's endpoint is where its name led to when it was last looked up here.
    pub fn has_led(&self, peer: &PublicKey, to: SocketAddr) -> bool {
        self.by_peer.get(peer).is_some_and(|named| named.led_to == Some(to))
    }
}

/// Where a peer may be that did not answer at `current`, if its name leads to `addresses`.
fn elsewhere(current: Option<SocketAddr>, addresses: &[SocketAddr]) -> Option<SocketAddr> {
    if current.is_some_and(|current| addresses.contains(&current)) {
        return None;
    }
    let is_alike = |to: &&SocketAddr| current.is_some_and(|at| at.is_ipv4() == to.is_ipv4());
    addresses.iter().find(is_alike).or(addresses.first()).copied()
}

impl Control {
    /// Replaces the names of the device's endpoints. Those of peers that it does not have are left out.
    ///
    /// # Errors
    /// If they are too many.
    pub(super) fn replace_names(&self, mut names: Vec<EndpointName>) -> Result<(), Errno> {
        if names.len() > PEER_COUNT_MAX {
            return Err(Errno::ENOSPC);
        }
        let device = self.device.borrow();
        names.retain(|name| match device.find(&name.public_key) {
            Some(id) => {
                self.handshakes.set_named(id);
                true
            }
            None => false,
        });
        drop(device);
        self.names.borrow_mut().replace(names);
        Ok(())
    }

    /// Asks where peers are that do not answer.
    pub(super) fn names_tick(&self, now: Now) {
        for id in self.handshakes.take_unanswered() {
            let (Some(keeper), Some(cell)) = (&self.keeper, self.handshakes.cell(id)) else {
                continue;
            };
            // Who is alive lets nobody wait for longer.
            let last = cell.hot.activity.last_received();
            if last.is_some_and(|last| now.since(last) < KEEPALIVE_TIMEOUT) {
                continue;
            }
            if let Some((host, port)) = self.names.borrow_mut().ask(&cell.hot.public_key, now) {
                keeper.resolve(self.shared.device.0, host, *port);
            }
        }
    }

    /// Follows a name that was asked for to where it leads; nowhere if there are no `addresses`.
    pub fn resolved(&self, host: &str, port: u16, addresses: &[SocketAddr]) {
        let now = self.now();
        let waiting = self.names.borrow_mut().answered(host, port);
        for (public_key, asked) in waiting {
            let id = self.device.borrow().find(&public_key);
            let Some((id, cell)) = id.and_then(|id| Some((id, self.handshakes.cell(id)?))) else {
                continue;
            };
            // In this order: what a peer that is heard of again changes later lets the swap fail.
            let before = cell.hot.endpoint.load_full();
            if cell.hot.activity.has_received_since(asked) {
                continue;
            }
            let current = before.as_ref().map(|endpoint| endpoint.remote);
            let Some(to) = elsewhere(current, addresses) else { continue };
            let new = Some(Arc::new(Endpoint::configured(to)));
            let found = cell.hot.endpoint.compare_and_swap(&before, new);
            if found.as_ref().map(Arc::as_ptr) != before.as_ref().map(Arc::as_ptr) {
                continue;
            }
            self.names.borrow_mut().led(&public_key, to);
            let peer = cell.hot.label();
            tracing::info!(%peer, host, endpoint = %to, "its name leads elsewhere by now");
            // At once, or with the next initiation if the last was just sent.
            self.handshakes.work(&Work::Initiate(self.shared.device, id), now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::PeerChange;

    const START: Now = Now::from_boot_ns(1_000_000_000_000);
    const SECOND: Duration = Duration::from_secs(1);

    fn key(number: u8) -> PublicKey {
        PublicKey::from_bytes([number; 32])
    }

    fn name(number: u8, host: &str) -> EndpointName {
        EndpointName { public_key: key(number), host: host.to_owned(), port: 7 }
    }

    fn names() -> Names {
        Names::new(vec![name(2, "b.test"), name(1, "a.test"), name(3, "a.test")])
    }

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_is_not_asked_for_all_the_time() {
        let mut names = names();
        assert!(names.ask(&key(9), START).is_none(), "it has none");
        assert_eq!(names.ask(&key(1), START), Some(&("a.test".to_owned(), 7)));
        assert!(names.ask(&key(1), START + RESOLVE_EVERY).is_none());
        assert!(names.ask(&key(1), START + ASK_EVERY).is_some(), "whether or not it was answered");
        assert!(names.ask(&key(2), START + ASK_EVERY).is_some(), "each for itself");
    }

    #[test]
    fn an_answer_is_for_all_that_wait_for_it_and_for_nobody_else() {
        let mut names = names();
        names.ask(&key(1), START);
        names.ask(&key(3), START + SECOND);
        names.ask(&key(2), START);
        assert!(names.answered("a.test", 8).is_empty(), "another port");
        let mut waiting = names.answered("a.test", 7);
        waiting.sort_by_key(|(key, _)| *key.as_bytes());
        assert_eq!(waiting, [(key(1), START), (key(3), START + SECOND)]);
        assert!(names.answered("a.test", 7).is_empty(), "they wait no more");
        assert_eq!(names.answered("b.test", 7), [(key(2), START)]);
    }

    #[test]
    fn a_name_ends_with_its_peer_and_with_an_endpoint_that_is_set() {
        let follow = |request: &SetRequest| {
            let mut names = names();
            names.ask(&key(1), START);
            names.follow(request);
            let left: Vec<_> = names.list().iter().map(|name| name.public_key).collect();
            (left, names.answered("a.test", 7).len())
        };
        let peers = |peers: Vec<PeerChange>| SetRequest { peers, ..SetRequest::default() };
        let change = PeerChange::new(key(1));
        let keepalive = PeerChange { persistent_keepalive: Some(1), ..change.clone() };
        assert_eq!(follow(&peers(vec![keepalive])), (vec![key(1), key(2), key(3)], 1));
        let moved = PeerChange { endpoint: Some(addr("10.0.0.1:1")), ..change.clone() };
        assert_eq!(follow(&peers(vec![moved])), (vec![key(2), key(3)], 0));
        let removed = PeerChange { remove: true, ..change };
        assert_eq!(follow(&peers(vec![removed])), (vec![key(2), key(3)], 0));
        let replaced = SetRequest { replace_peers: true, ..SetRequest::default() };
        assert_eq!(follow(&replaced), (vec![], 0));
    }

    #[test]
    fn an_answer_to_a_name_of_before_changes_nothing() {
        let mut names = names();
        names.ask(&key(1), START);
        names.replace(vec![name(1, "c.test")]);
        assert!(names.answered("a.test", 7).is_empty());
    }

    #[test]
    fn a_peer_stays_where_its_name_leads_and_changes_its_family_last() {
        let [v4, other_v4, v6] = ["10.0.0.1:7", "10.0.0.2:7", "[fd00::1]:7"].map(addr);
        assert_eq!(elsewhere(Some(v4), &[]), None);
        assert_eq!(elsewhere(Some(v4), &[v6, other_v4, v4]), None);
        assert_eq!(elsewhere(Some(v4), &[v6, other_v4]), Some(other_v4));
        assert_eq!(elsewhere(Some(v6), &[v4, other_v4]), Some(v4));
        assert_eq!(elsewhere(None, &[v6, v4]), Some(v6));
        assert_eq!(elsewhere(Some(addr("10.0.0.1:8")), &[v4]), Some(v4), "another port");
    }

    #[test]
    fn it_is_known_by_which_endpoint_a_name_has_come_true() {
        let mut names = names();
        let [one, other] = ["10.0.0.1:7", "10.0.0.2:7"].map(addr);
        names.led(&key(1), one);
        assert!(names.has_led(&key(1), one));
        assert!(!names.has_led(&key(1), other) && !names.has_led(&key(2), one));
        names.replace(vec![name(1, "a.test")]);
        assert!(names.has_led(&key(1), one), "the same is said again");
        names.replace(vec![name(1, "c.test")]);
        assert!(!names.has_led(&key(1), one));
    }
}
