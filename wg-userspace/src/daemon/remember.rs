//! Keeps the memory for a successor up to date, and begins from that of a predecessor.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use wg_common::endpoint::Endpoint;
use wg_common::id::PeerId;
use wg_common::time::Now;
use zeroize::Zeroizing;

use super::control::Control;
use super::effects::preshared_key_of;
use super::memory::{Known, Memory, MemoryError, Remembered, snapshot};
use crate::datapath::handoff::Work;
use crate::device::{Device, Effect, Peer, SetRequest};
use crate::key::PublicKey;
use crate::uapi;

/// Peers whose sessions are awake are looked at this often, and this many at a time: what is noted is not
/// much older, but where there are very many.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const LOOK_AT_MAX: usize = 8192;
/// So many others are looked at each time. Nothing happens to them but what control itself does; a million
/// that rest must not keep it busy.
const SWEPT_AT_ONCE: usize = 256;
/// Handshakes with peers of before are begun this many at a time, several times a second.
const REACH_AT_MAX: usize = 64;

/// Gives a new memory to whoever keeps it, in place of the one before.
pub type HandOver = Box<dyn Fn(BorrowedFd<'_>) -> io::Result<()>>;

/// What was noted last of peers, where that is more than [`configured`] says.
type Noted = HashMap<PeerId, (PublicKey, Known)>;

/// A memory, and what was written to it.
pub struct Remembering {
    memory: Memory,
    hand_over: HandOver,
    noted: Noted,
    /// Peers that were awake when it was last asked who is.
    awake: Vec<PeerId>,
    /// Of those, and of those before, who is to be looked at.
    to_look_at: Vec<PeerId>,
    /// The slot to be looked at next, of all.
    next: usize,
    looked: Now,
}

/// What is known of a peer of which nothing but its configuration was remembered.
fn configured(peer: &Peer) -> Known {
    Known { endpoint: peer.endpoint, ..Known::default() }
}

impl Control {
    /// Makes this device, which has no peers yet, what it was before: keys, peers, allowed IPs, and
    /// where peers were; their initiations of before are replays. Begins handshakes with those that had
    /// a session as soon as the interface is up. Sockets are as whoever kept them left them.
    ///
    /// To be called before anything is received.
    pub fn recall(&self, remembered: &Remembered) {
        let mut routing_changed = false;
        for request in snapshot(&remembered.device) {
            let effects = self.device.borrow_mut().apply(request);
            for effect in effects {
                match effect {
                    Effect::PeerAdded { id, public_key } => {
                        let psk = preshared_key_of(&self.device.borrow(), id);
                        let greatest = remembered.known(&public_key).greatest_timestamp;
                        let hot = self.hot_peer(id, public_key);
                        self.handshakes.add_known_peer(hot, psk, greatest);
                    }
                    // Once for all.
                    Effect::RoutingChanged => routing_changed = true,
                    effect => self.carry_out(effect),
                }
            }
        }
        if routing_changed {
            self.carry_out(Effect::RoutingChanged);
        }
        self.fwmark.set(self.device.borrow().fwmark());
        if let Err(error) = self.replace_names(remembered.names.list()) {
            tracing::error!(%error, "the names of endpoints are lost");
        }
        let device = self.device.borrow();
        let mut reach = VecDeque::new();
        for (id, peer) in device.peers() {
            let known = remembered.known(&peer.public_key);
            if let (Some(addr), Some(cell)) = (known.endpoint, self.handshakes.cell(id)) {
                cell.hot.endpoint.store(Some(Arc::new(Endpoint::configured(addr))));
                cell.hot.forget_way();
                if known.is_by_name {
                    self.names.borrow_mut().led(&peer.public_key, addr);
                }
            }
            // Persistent keepalives begin by themselves.
            if known.had_session && peer.persistent_keepalive == 0 {
                reach.push_back(id);
            }
        }
        let peer_count = device.peer_count();
        drop(device);
        tracing::info!(
            peers = peer_count,
            had_sessions = reach.len(),
            damaged = remembered.is_damaged,
            "goes on with what the process before it knew"
        );
        self.to_reach.replace(reach);
    }

    /// Keeps a memory from now on, for which it begins a new one that says what the device is now.
    /// `hand_over` is called with it, and with each that takes its place; the one before is wiped then.
    ///
    /// # Errors
    /// If there is no memory, or nobody takes it.
    pub fn remember(&self, hand_over: HandOver) -> Result<(), MemoryError> {
        let (memory, noted) = self.memorize()?;
        hand_over(memory.as_fd())?;
        self.remembering.replace(Some(Remembering {
            memory,
            hand_over,
            noted,
            awake: Vec::new(),
            to_look_at: Vec::new(),
            next: 0,
            looked: Now::default(),
        }));
        Ok(())
    }

    /// Wipes the memory. For an orderly end, which has no successor.
    pub fn forget(&self) {
        let Some(remembering) = self.remembering.take() else { return };
        if let Err(error) = remembering.memory.wipe() {
            tracing::warn!(%error, "keys may be left in the memory for a successor");
        }
    }

    /// The text of a request that is about to be carried out, if it is to be remembered; empty if all is to
    /// be written anew.
    pub(super) fn to_remember(&self, request: &SetRequest) -> Option<Zeroizing<String>> {
        let remembering = self.remembering.borrow();
        let remembering = remembering.as_ref()?;
        if !remembering.memory.has_room_for(request) {
            return Some(Zeroizing::default());
        }
        // A pulled peer that a request names is a configured one from then on, of which nothing was
        // written yet: all is written anew.
        let device = self.device.borrow();
        let names_pulled = request.peers.iter().any(|change| {
            let peer = device.find(&change.public_key).and_then(|id| device.peer(id));
            peer.is_some_and(|peer| peer.pulled)
        });
        Some(if names_pulled { Zeroizing::default() } else { uapi::format_set(request) })
    }

    /// Notes a request that was carried out, by what [`to_remember`](Self::to_remember) gave.
    pub(super) fn remember_set(&self, text: &str) {
        if text.is_empty() {
            return self.compact();
        }
        self.note(|memory| memory.append_set_text(text));
    }

    /// Notes which endpoints were given as names.
    pub(super) fn remember_names(&self) {
        let names = self.names.borrow().list();
        self.note(|memory| memory.append_names(&names));
    }

    /// Notes what has changed at peers, a part of them at a time.
    pub(super) fn remember_tick(&self, now: Now) {
        let changed = {
            let mut remembering = self.remembering.borrow_mut();
            let Some(remembering) = remembering.as_mut() else { return };
            if now.since(remembering.looked) < LOOK_EVERY {
                return;
            }
            remembering.looked = now;
            self.changed_peers(remembering)
        };
        if !changed.is_empty() {
            self.note(|memory| memory.append_peers(changed.iter().copied()));
        }
    }

    /// Begins some of the handshakes that a process before this one would have had no need of.
    pub(super) fn reach_tick(&self, now: Now) {
        if self.shared.pause(now).is_some() {
            return;
        }
        for _ in 0..REACH_AT_MAX {
            let Some(peer) = self.to_reach.borrow_mut().pop_front() else { return };
            let Some(known) = self.known(peer) else { continue };
            if known.endpoint.is_some() && !known.had_session {
                self.handshakes.work(&Work::Initiate(self.shared.device, peer), now);
            }
        }
    }

    fn changed_peers(&self, remembering: &mut Remembering) -> Vec<(PublicKey, Known)> {
        let device = self.device.borrow();
        let Remembering { noted, awake, to_look_at, next, .. } = remembering;
        if to_look_at.is_empty() {
            // Who has gone to sleep since then is looked at once more.
            to_look_at.append(awake);
            *awake = self.handshakes.waiting_peers();
            to_look_at.extend_from_slice(awake);
        }
        let rest = to_look_at.split_off(to_look_at.len().min(LOOK_AT_MAX));
        let mut looked_at = mem::replace(to_look_at, rest);
        let slot_count = device.slot_count();
        for _ in 0..slot_count.min(SWEPT_AT_ONCE) {
            let slot = *next % slot_count;
            *next = slot + 1;
            looked_at.push(PeerId(slot as u32));
        }
        looked_at.sort_unstable();
        looked_at.dedup();
        looked_at.into_iter().filter_map(|id| self.change(&device, noted, id)).collect()
    }

    /// What is known of a peer, if that is not what was noted. It is noted now.
    fn change(&self, device: &Device, noted: &mut Noted, id: PeerId) -> Option<(PublicKey, Known)> {
        let peer = device.peer(id).filter(|peer| !peer.pulled);
        let is = peer.and_then(|peer| Some((peer, self.known(id)?)));
        let Some((peer, known)) = is else {
            noted.remove(&id);
            return None;
        };
        let key = peer.public_key;
        // What was noted may be of another peer that was in this slot.
        let before = noted.get(&id).filter(|(its, _)| *its == key).map(|&(_, known)| known);
        if known == configured(peer) {
            noted.remove(&id);
        } else if before != Some(known) {
            noted.insert(id, (key, known));
        }
        (known != before.unwrap_or(configured(peer))).then_some((key, known))
    }

    fn note(&self, append: impl FnOnce(&mut Memory) -> Result<(), MemoryError>) {
        let outcome = match self.remembering.borrow_mut().as_mut() {
            Some(remembering) => append(&mut remembering.memory),
            None => return,
        };
        match outcome {
            Ok(()) => {}
            // What was to be noted is in force already, and so part of the new one.
            Err(MemoryError::Full) => self.compact(),
            Err(error) => tracing::error!(%error, "a successor would not know of a change"),
        }
    }

    /// Has a new memory take the place of this one.
    fn compact(&self) {
        let made = self.memorize();
        let mut remembering = self.remembering.borrow_mut();
        let Some(remembering) = remembering.as_mut() else { return };
        let replaced = made.and_then(|(memory, noted)| {
            (remembering.hand_over)(memory.as_fd())?;
            remembering.noted = noted;
            mem::replace(&mut remembering.memory, memory).wipe()
        });
        if let Err(error) = replaced {
            tracing::error!(%error, "a successor would not know of a change");
        }
    }

    /// A memory of all that is known now, and what it says of the peer in each slot.
    fn memorize(&self) -> Result<(Memory, Noted), MemoryError> {
        let device = self.device.borrow();
        let mut noted = Noted::new();
        for (id, peer) in device.peers().filter(|(_, peer)| !peer.pulled) {
            if let Some(known) = self.known(id).filter(|known| *known != configured(peer)) {
                noted.insert(id, (peer.public_key, known));
            }
        }
        let names = self.names.borrow().list();
        let memory = Memory::compacted(&device, &names, noted.values().copied())?;
        Ok((memory, noted))
    }

    fn known(&self, peer: PeerId) -> Option<Known> {
        let cell = self.handshakes.cell(peer)?;
        let endpoint = cell.hot.endpoint.load().as_ref().map(|endpoint| endpoint.remote);
        let has_led = |to| self.names.borrow().has_led(&cell.hot.public_key, to);
        Some(Known {
            endpoint,
            is_by_name: endpoint.is_some_and(has_led),
            greatest_timestamp: cell.greatest_timestamp(),
            had_session: cell.hot.keypairs.load().iter().next().is_some(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::os::fd::OwnedFd;
    use std::rc::Rc;
    use std::sync::atomic::Ordering;

    use wg_common::id::DeviceId;
    use wg_common::index::{IndexLayout, IndexPermutation};

    use super::*;
    use crate::aead::RingAead;
    use crate::daemon::memory::read;
    use crate::datapath::{Shared, SocketGroup};
    use crate::device::{AllowedIpChange, Device, PeerChange};
    use crate::handshake::{Handshakes, Os};
    use crate::key::{PresharedKey, PrivateKey};
    use crate::noise::Timestamp;
    use crate::sys::clock;
    use crate::uapi::{EndpointName, Handler as _};
    use crate::udp;

    fn control() -> Control {
        let (port, of_worker) = udp::bind_group(0, 1, 0).unwrap();
        let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
        let sockets = SocketGroup { port, of_worker };
        let (shared, _) = Shared::new(DeviceId(0), 1, Vec::new(), sockets, None, indexes).unwrap();
        shared.up.store(false, Ordering::Relaxed);
        let os = Os::new(Arc::clone(&shared));
        let handshakes = Arc::new(Handshakes::new(Arc::clone(&shared), os, &RingAead, None));
        Control::new(shared, handshakes, None, Default::default(), "ring")
    }

    /// Where a keeper has the memory.
    type Kept = Rc<RefCell<Vec<OwnedFd>>>;

    fn kept() -> (Kept, HandOver) {
        let kept = Kept::default();
        let keep = Rc::clone(&kept);
        let hand_over = move |fd: BorrowedFd<'_>| {
            keep.borrow_mut().push(fd.try_clone_to_owned()?);
            Ok(())
        };
        (kept, Box::new(hand_over))
    }

    fn latest(kept: &Kept) -> Remembered {
        read(kept.borrow().last().unwrap()).unwrap()
    }

    fn key(number: u8) -> PublicKey {
        PrivateKey::from_bytes([number; 32]).public_key()
    }

    fn peer(number: u8) -> PeerChange {
        PeerChange {
            preshared_key: Some(PresharedKey::from_bytes([number; 32])),
            endpoint: Some(([127, 0, 0, 1], 9).into()),
            name: Some(format!("number {number}")),
            allowed_ips: vec![AllowedIpChange::Add(
                ipnet::Ipv4Net::new([10, 0, 0, number].into(), 32).unwrap().into(),
            )],
            ..PeerChange::new(key(number))
        }
    }

    fn request(peers: Vec<PeerChange>) -> SetRequest {
        let private_key = Some(Some(PrivateKey::from_bytes([9; 32])));
        SetRequest { private_key, peers, ..SetRequest::default() }
    }

    fn words(device: &Device) -> Vec<String> {
        snapshot(device).map(|request| uapi::format_set(&request).to_string()).collect()
    }

    #[test]
    fn a_request_is_remembered_when_it_was_carried_out() {
        let control = control();
        control.set(request(vec![peer(1)])).unwrap();
        let (kept, hand_over) = kept();
        control.remember(hand_over).unwrap();
        assert_eq!(words(&latest(&kept).device), words(&control.device.borrow()), "of before");
        control.set(request(vec![peer(2), PeerChange { remove: true, ..peer(1) }])).unwrap();
        assert_eq!(words(&latest(&kept).device), words(&control.device.borrow()));
        assert_eq!(kept.borrow().len(), 1, "in one memory");
    }

    #[test]
    fn a_peer_that_has_moved_is_noted_at_a_tick() {
        let control = control();
        let (kept, hand_over) = kept();
        control.remember(hand_over).unwrap();
        control.set(request(vec![peer(1), peer(2)])).unwrap();
        let id = control.device.borrow().find(&key(1)).unwrap();
        let moved = ([127, 0, 0, 2], 99).into();
        let hot = Arc::clone(&control.handshakes.cell(id).unwrap().hot);
        hot.endpoint.store(Some(Arc::new(Endpoint::configured(moved))));
        let now = clock::boot_now();
        control.remember_tick(now);
        assert_eq!(latest(&kept).known(&key(1)).endpoint, Some(moved));
        hot.endpoint.store(None);
        control.remember_tick(now + LOOK_EVERY / 2);
        assert_eq!(latest(&kept).known(&key(1)).endpoint, Some(moved), "not before its time");
        control.remember_tick(now + LOOK_EVERY);
        assert_eq!(latest(&kept).known(&key(1)).endpoint, None);
    }

    #[test]
    fn a_memory_that_is_full_is_replaced_and_wiped() {
        let control = control();
        let (kept, hand_over) = kept();
        control.remember(hand_over).unwrap();
        while kept.borrow().len() == 1 {
            control.set(request((1..200).map(peer).collect())).unwrap();
        }
        assert_eq!(words(&latest(&kept).device), words(&control.device.borrow()));
        assert!(read(&kept.borrow()[0]).is_err(), "nothing is left in the former one");
        control.forget();
        assert!(read(&kept.borrow()[1]).is_err(), "nor in the last one, after an orderly end");
    }

    #[test]
    fn a_pulled_peer_that_is_named_is_remembered_whole() {
        let control = control();
        let (kept, hand_over) = kept();
        control.remember(hand_over).unwrap();
        let pulled = PeerChange { pulled: true, ..peer(1) };
        for effect in control.device.borrow_mut().apply(request(vec![pulled])) {
            if let Effect::PeerAdded { id, public_key } = effect {
                control.handshakes.add_peer(control.hot_peer(id, public_key));
            }
        }
        let named = PeerChange { update_only: true, ..PeerChange::new(key(1)) };
        control.set(SetRequest { peers: vec![named], ..SetRequest::default() }).unwrap();
        assert_eq!(words(&latest(&kept).device), words(&control.device.borrow()));
        assert_eq!(latest(&kept).device.peer_count(), 1);
    }

    fn remembered(had_session: bool) -> (Remembered, Known) {
        let mut device = Device::default();
        device.apply(SetRequest { fwmark: Some(7), ..request((1..=3).map(peer).collect()) });
        let known = Known {
            endpoint: Some(([127, 0, 0, 3], 9).into()),
            is_by_name: false,
            greatest_timestamp: Timestamp::from_unix(1_800_000_000, 0),
            had_session,
        };
        let peers = [(key(2), known)].into();
        (Remembered { device, peers, ..Remembered::default() }, known)
    }

    fn name(number: u8, host: &str) -> EndpointName {
        EndpointName { public_key: key(number), host: host.to_owned(), port: 9 }
    }

    #[test]
    fn names_of_endpoints_are_remembered_and_recalled() {
        let control = control();
        let (kept, hand_over) = kept();
        control.remember(hand_over).unwrap();
        control.set(request(vec![peer(1), peer(2)])).unwrap();
        control.set_names(vec![name(1, "a.test"), name(2, "b.test"), name(3, "c.test")]).unwrap();
        let names = |kept: &Kept| latest(kept).names.list();
        let listed = |control: &Control| control.names.borrow().list();
        assert_eq!(names(&kept), listed(&control));
        assert_eq!(names(&kept).len(), 2, "there is no third peer");
        // The endpoint is what it was, and yet it was set.
        control.set(SetRequest { peers: vec![peer(1)], ..SetRequest::default() }).unwrap();
        assert_eq!(names(&kept), [name(2, "b.test")]);
        control.compact();
        assert_eq!(names(&kept), [name(2, "b.test")]);
        let successor = self::control();
        successor.recall(&latest(&kept));
        assert_eq!(listed(&successor), [name(2, "b.test")]);
        let gone = PeerChange { remove: true, ..PeerChange::new(key(2)) };
        control.set(SetRequest { peers: vec![gone], ..SetRequest::default() }).unwrap();
        assert!(names(&kept).is_empty() && listed(&control).is_empty());
    }

    #[test]
    fn a_peer_that_is_silent_follows_its_name() {
        let control = control();
        control.set(request(vec![peer(1), peer(2)])).unwrap();
        control.set_names(vec![name(1, "a.test"), name(2, "a.test")]).unwrap();
        let hot = |number| {
            let id = control.device.borrow().find(&key(number)).unwrap();
            Arc::clone(&control.handshakes.cell(id).unwrap().hot)
        };
        let remote = |number| hot(number).endpoint.load().as_ref().unwrap().remote;
        let now = clock::boot_now();
        for number in [1, 2] {
            assert!(control.names.borrow_mut().ask(&key(number), now).is_some());
        }
        // The second is heard of before the answer comes.
        hot(2).activity.authenticated_received(now);
        let [before, elsewhere] =
            [([127, 0, 0, 1], 9), ([127, 0, 0, 2], 9)].map(std::net::SocketAddr::from);
        control.resolved("a.test", 9, &[elsewhere]);
        assert_eq!((remote(1), remote(2)), (elsewhere, before));
        assert_eq!(control.names.borrow().list().len(), 2, "it is no request that sets it");
        control.resolved("a.test", 9, &[before]);
        assert_eq!(remote(1), elsewhere, "nobody has asked");
    }

    #[test]
    fn a_successor_knows_which_peers_are_where_their_names_have_led() {
        let control = control();
        let (kept, hand_over) = kept();
        control.remember(hand_over).unwrap();
        control.set(request(vec![peer(1), peer(2)])).unwrap();
        control.set_names(vec![name(1, "a.test"), name(2, "b.test")]).unwrap();
        let now = clock::boot_now();
        assert!(control.names.borrow_mut().ask(&key(1), now).is_some());
        let elsewhere = ([127, 0, 0, 2], 9).into();
        control.resolved("a.test", 9, &[elsewhere]);
        control.remember_tick(now + LOOK_EVERY);
        assert!(latest(&kept).known(&key(1)).is_by_name);
        let successor = self::control();
        successor.recall(&latest(&kept));
        let names = successor.names.borrow();
        assert!(names.has_led(&key(1), elsewhere));
        assert!(!names.has_led(&key(2), ([127, 0, 0, 1], 9).into()), "it was given like this");
    }

    #[test]
    fn a_successor_is_the_device_of_before() {
        let control = control();
        let (remembered, known) = remembered(true);
        control.recall(&remembered);
        assert_eq!(words(&control.device.borrow()), words(&remembered.device));
        assert_eq!(control.fwmark.get(), 7);
        let id = control.device.borrow().find(&key(2)).unwrap();
        let cell = control.handshakes.cell(id).unwrap();
        assert_eq!(cell.greatest_timestamp(), known.greatest_timestamp);
        assert_eq!(cell.preshared_key(), PresharedKey::from_bytes([2; 32]));
        let label = format!("number 2 ({})", key(2).short());
        assert_eq!(cell.hot.label().to_string(), label, "logs know its name");
        assert_eq!(cell.hot.endpoint.load().as_ref().unwrap().remote, known.endpoint.unwrap());
        let routing = control.shared.routing.load();
        assert_eq!(routing.lookup("10.0.0.2".parse().unwrap()), Some(id));
        // What it knew is there for the next one, too.
        let (kept, hand_over) = kept();
        control.remember(hand_over).unwrap();
        let next = latest(&kept).known(&key(2));
        assert_eq!(next.greatest_timestamp, known.greatest_timestamp);
        assert_eq!(next.endpoint, known.endpoint);
    }

    #[test]
    fn peers_that_had_a_session_are_reached_for_when_the_interface_is_up() {
        for (had_session, handshakes) in [(true, 1), (false, 0)] {
            let control = control();
            control.recall(&remembered(had_session).0);
            control.reach_tick(clock::boot_now());
            assert_eq!(control.handshakes.index_count(), 0, "it is down");
            control.set_up(true);
            control.reach_tick(clock::boot_now());
            assert_eq!(control.handshakes.index_count(), handshakes);
        }
    }
}
