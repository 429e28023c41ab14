//! The plain reference beside the engine: what was sent by whom and for whom, and what must hold of
//! every step of every device.
//!
//! It is slow and obvious on purpose: sets instead of windows, lists instead of tries. It knows keys
//! only by name and packets by the number that stands in them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use wg_common::endpoint::Endpoint;
use wg_common::outcome::DropReason;
use wg_common::protocol::{
    DEFAULT_MTU, HANDSHAKE_TOS, MAC_LEN, REJECT_AFTER_TIME, REKEY_TIMEOUT, REPLAY_WINDOW_LEN,
    STAGED_PACKETS_MAX, TAG_LEN, TYPE_COOKIE_REPLY, TYPE_INITIATION, TYPE_RESPONSE, TYPE_TRANSPORT,
};
use wg_common::time::Now;
use wg_userspace::device::{AllowedIpChange, PeerChange, SetRequest};
use wg_userspace::key::{PresharedKey, PrivateKey, PublicKey};
use wg_userspace::noise::{Identity, check_mac1};

use crate::engine::{Call, Step};
use crate::record::{KeyName, Operation, Outcome};

/// Fails the seed if `condition` does not hold.
macro_rules! hold {
    ($condition:expr, $($message:tt)+) => {
        assert!($condition, $($message)+)
    };
}

/// Marks our packets.
const MARK: &[u8; 8] = b"tidesim!";

/// What a device is configured to be, as a plain list.
#[derive(Clone, Default, PartialEq)]
pub struct Configured {
    private_key: Option<PrivateKey>,
    /// That of the private key.
    pub public_key: Option<PublicKey>,
    pub peers: BTreeMap<[u8; 32], ConfiguredPeer>,
}

/// A peer in it.
#[derive(Clone, Default, PartialEq)]
pub struct ConfiguredPeer {
    pub preshared_key: PresharedKey,
    pub endpoint: Option<SocketAddr>,
    pub persistent_keepalive: u16,
    pub allowed_ips: Vec<IpNet>,
}

impl Configured {
    pub fn peer(&self, key: &PublicKey) -> Option<&ConfiguredPeer> {
        self.peers.get(key.as_bytes())
    }

    /// Changes it as wg(8) says a request does.
    pub fn apply(&mut self, request: &SetRequest) {
        if request.replace_peers {
            self.peers.clear();
        }
        if let Some(key) = &request.private_key {
            self.private_key.clone_from(key);
            self.public_key = key.as_ref().map(PrivateKey::public_key);
            if let Some(own) = self.public_key {
                self.peers.remove(own.as_bytes());
            }
        }
        for change in &request.peers {
            let key = *change.public_key.as_bytes();
            if change.remove {
                self.peers.remove(&key);
                continue;
            }
            if change.update_only && !self.peers.contains_key(&key) {
                continue;
            }
            for allowed in &change.allowed_ips {
                if let AllowedIpChange::Add(net) = allowed {
                    let others = self.peers.values_mut();
                    others.for_each(|peer| peer.allowed_ips.retain(|own| own != net));
                }
            }
            let peer = self.peers.entry(key).or_default();
            if let Some(key) = &change.preshared_key {
                peer.preshared_key = key.clone();
            }
            peer.endpoint = change.endpoint.or(peer.endpoint);
            if let Some(seconds) = change.persistent_keepalive {
                peer.persistent_keepalive = seconds;
            }
            if change.replace_allowed_ips {
                peer.allowed_ips.clear();
            }
            for allowed in &change.allowed_ips {
                match *allowed {
                    AllowedIpChange::Add(net) => peer.allowed_ips.push(net),
                    AllowedIpChange::Remove(net) => peer.allowed_ips.retain(|own| *own != net),
                }
            }
        }
    }

    /// The request that gives a new process all of it.
    pub fn request(&self) -> SetRequest {
        let peers = self.peers.iter().map(|(key, peer)| PeerChange {
            preshared_key: Some(peer.preshared_key.clone()),
            endpoint: peer.endpoint,
            persistent_keepalive: Some(peer.persistent_keepalive),
            allowed_ips: peer.allowed_ips.iter().map(|net| AllowedIpChange::Add(*net)).collect(),
            ..PeerChange::new(PublicKey::from_bytes(*key))
        });
        SetRequest {
            private_key: Some(self.private_key.clone()),
            peers: peers.collect(),
            ..SetRequest::default()
        }
    }

    /// Who owns an address: the longest prefix that holds it.
    pub fn owner(&self, address: IpAddr) -> Option<PublicKey> {
        let all = self
            .peers
            .iter()
            .flat_map(|(key, peer)| peer.allowed_ips.iter().map(move |net| (net, key)));
        all.filter(|(net, _)| net.contains(&address))
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, key)| PublicKey::from_bytes(*key))
    }
}

/// A packet that was given to some device's TUN.
pub struct Packet {
    pub bytes: Vec<u8>,
    /// The flow that it belongs to.
    pub flow: u32,
    /// The lineage of its sender.
    pub lineage: usize,
    /// Who may read it, by what the sender's tables said when the sender took it.
    readers: Vec<PublicKey>,
}

/// How a packet was made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    Whole,
    /// Its header tells of more bytes than there are.
    TooShort,
    /// It is of no IP version.
    NoVersion,
}

/// One device process as the model sees it.
#[derive(Clone, Default)]
pub struct Side {
    /// Received counters of each key.
    windows: HashMap<KeyName, Window>,
    endpoints: BTreeMap<[u8; 32], Option<SocketAddr>>,
    /// When a peer was last sent an initiation.
    initiated: HashMap<PublicKey, Now>,
    /// For whom our index was put into an initiation.
    asked: HashMap<u32, PublicKey>,
    /// Our indexes in the responses to a peer's index.
    responded: HashMap<(PublicKey, u32), HashSet<u32>>,
    /// Our indexes under which something was opened.
    opened: HashSet<u32>,
    /// Handshake messages that were accepted.
    accepted: HashSet<u64>,
    /// When each of our keys first sealed.
    first_sealed: HashMap<KeyName, Now>,
    /// Packets that were sealed.
    sealed: HashSet<u64>,
    /// The last packet of each flow that was sealed, by who may read it.
    last_sealed: HashMap<(u32, PublicKey), u64>,
    /// At which worker a transport message arrived, and as the how-manieth; none if more than once.
    arrived: HashMap<[u8; TAG_LEN], Option<(usize, u64)>>,
    /// From where it came, and to which address of ours.
    sources: HashMap<[u8; TAG_LEN], Vec<Endpoint>>,
    arrival_count: u64,
    /// The last arrival of each flow, by key and worker, whose packet was delivered.
    last_delivered: HashMap<(u32, KeyName, usize), u64>,
    /// A worker stood still: others read for it, and order is not kept.
    pub disordered: bool,
    /// Keys that sealed before this moment must not seal any more.
    pub forbidden_before: Option<Now>,
}

#[derive(Clone, Default)]
struct Window {
    greatest: Option<u64>,
    seen: HashSet<u64>,
}

impl Window {
    /// Whether a counter is new.
    fn accept(&mut self, counter: u64) -> bool {
        let newest = self.greatest.map_or(counter, |greatest| greatest.max(counter));
        let is_new = newest - counter < REPLAY_WINDOW_LEN && self.seen.insert(counter);
        if is_new {
            self.greatest = Some(newest);
        }
        is_new
    }

    /// Whether a counter is known not to be new.
    fn knows(&self, counter: u64) -> bool {
        let greatest = self.greatest.unwrap_or(0);
        self.seen.contains(&counter) || greatest.saturating_sub(counter) >= REPLAY_WINDOW_LEN
    }
}

/// Who takes a step.
pub struct Actor<'a> {
    pub host: usize,
    /// Hosts of one lineage are copies of each other.
    pub lineage: usize,
    pub configured: &'a Configured,
    pub worker_count: usize,
}

/// What a step brought to the TUN device.
#[derive(Default)]
pub struct Noted {
    /// Numbers of the packets that were delivered.
    pub delivered: Vec<u64>,
    /// Initiations that were sent, and to whom.
    pub initiated: Vec<PublicKey>,
    /// For whom packets were sealed, how long after the keypair's first one, and whether we are its
    /// initiator.
    pub sealed: Vec<(PublicKey, Duration, bool)>,
}

#[derive(Default)]
pub struct Model {
    pub packets: Vec<Packet>,
    /// Everything that was ever sealed, and a digest of it.
    sealed: HashMap<(KeyName, u64), u64>,
    /// Who sealed first with a key.
    sealers: HashMap<KeyName, (usize, PublicKey)>,
    /// Digests of all handshake messages that devices sent.
    genuine: HashSet<u64>,
    /// Everyone who ever had a key.
    identities: Vec<Identity>,
    /// Packets that were delivered, by lineage.
    delivered: HashSet<(usize, u64)>,
    /// Packets that two lives of a host may both have sealed, and that may be delivered once more.
    copied: HashSet<u64>,
    /// Some host is a copy of another or of its former self, and may choose the same indexes again.
    pub has_copies: bool,
    pub counts: Counts,
}

/// What happened, to see that the simulation does something.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub sealed: u64,
    pub delivered: u64,
    pub replays: u64,
    pub refused: u64,
    pub wrong_source: u64,
    pub initiations: u64,
    pub handshakes: u64,
    pub moves: u64,
    pub cookies: u64,
    pub parcels: u64,
    pub staged_max: u64,
}

impl Model {
    /// Somebody has this key from now on.
    pub fn meet(&mut self, key: &PrivateKey) {
        let identity = Identity::new(key.clone());
        if self.identities.iter().all(|known| known.public_key() != identity.public_key()) {
            self.identities.push(identity);
        }
    }

    /// Makes a packet from a host of `lineage`.
    pub fn packet(
        &mut self,
        lineage: usize,
        flow: u32,
        addresses: (IpAddr, IpAddr),
        len: usize,
        form: Form,
    ) -> Vec<u8> {
        let id = self.packets.len() as u64;
        let mut bytes = header(addresses);
        let body = bytes.len();
        bytes.extend_from_slice(MARK);
        bytes.extend_from_slice(&id.to_le_bytes());
        let mut filler = id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        while bytes.len() < len.max(body + 16) {
            filler = filler.rotate_left(7).wrapping_mul(0x2545_f491_4f6c_dd1d) + 1;
            bytes.push(filler as u8);
        }
        set_len(&mut bytes, form);
        self.packets.push(Packet { bytes: bytes.clone(), flow, lineage, readers: Vec::new() });
        bytes
    }

    /// A datagram reaches a worker's socket.
    pub fn arrive(&mut self, side: &mut Side, lane: usize, bytes: &[u8], from: Endpoint) {
        side.arrival_count += 1;
        if bytes.first() == Some(&TYPE_TRANSPORT)
            && let Some(tag) = bytes.last_chunk()
        {
            let seen = Some((lane, side.arrival_count));
            side.arrived.entry(*tag).and_modify(|seen| *seen = None).or_insert(seen);
            side.sources.entry(*tag).or_default().push(from);
        }
    }

    /// Looks at one step of a device.
    pub fn check(&mut self, actor: &Actor<'_>, side: &mut Side, step: &Step) -> Noted {
        let mut noted = Noted::default();
        if step.call == Call::Configure {
            // A session that ended may begin a handshake at once.
            side.initiated.clear();
        }
        for packet in &step.read {
            let owner = destination(packet).and_then(|to| actor.configured.owner(to));
            if let (Some(id), Some(owner)) = (number(packet), owner) {
                self.packets[id as usize].readers.push(owner);
            }
        }
        for sealed in step.operations.iter().filter(|o| o.outcome == Outcome::Sealed) {
            self.check_seal(actor, side, step, sealed);
        }
        if step.call == Call::Handshake {
            self.check_handshake(side, step);
        }
        self.check_sent(actor, side, step, &mut noted);
        match step.call {
            Call::Inbound => self.check_inbound(actor, side, step, &mut noted),
            Call::Outbound | Call::Flush => {
                let seals = step.operations.len() as u64;
                let lost = step.dropped(DropReason::SocketSend);
                hold!(step.counted_sent + lost == seals, "{seals} sealed, counted {step:#?}");
                let before = step.staged[0] + step.read.len() as u64;
                let after = step.counted_sent + step.dropped_in_all() + step.staged[1];
                hold!(before == after, "packets are counted wrongly: {before} became {after}");
            }
            Call::Handshake | Call::Tick | Call::Configure => {}
        }
        self.check_endpoints(side, step);
        let bound = STAGED_PACKETS_MAX * actor.worker_count * (actor.configured.peers.len() + 8);
        hold!(step.staged[1] <= bound as u64, "{} packets are staged", step.staged[1]);
        self.counts.staged_max = self.counts.staged_max.max(step.staged[1]);
        self.counts.parcels += step.parcels as u64;
        noted
    }

    fn check_seal(&mut self, actor: &Actor<'_>, side: &mut Side, step: &Step, sealed: &Operation) {
        let Operation { key, counter, .. } = *sealed;
        let before = self.sealed.insert((key, counter), digest(&sealed.plain));
        hold!(before.is_none(), "nonce used twice: key {key:016x}, counter {counter}");
        self.counts.sealed += 1;
        if let Some(own) = actor.configured.public_key {
            self.sealers.entry(key).or_insert((actor.lineage, own));
        }
        hold!(
            self.sealers.get(&key).is_some_and(|sealer| sealer.0 == actor.lineage),
            "sealed with a key of somebody else, or without an identity"
        );
        let first = *side.first_sealed.entry(key).or_insert(step.now);
        let age = step.now.since(first);
        hold!(age < REJECT_AFTER_TIME, "sealed with a key that first sealed {age:?} ago");
        if let Some(moment) = side.forbidden_before {
            hold!(first >= moment, "sealed with a key that had to be cleared");
        }
        if sealed.plain.is_empty() {
            return;
        }
        let id = number(&sealed.plain).expect("only our packets are sealed");
        let packet = &self.packets[id as usize];
        let len = packet.bytes.len();
        let padded = len.div_ceil(16) * 16;
        let padded = if padded > DEFAULT_MTU { len.max(DEFAULT_MTU) } else { padded };
        hold!(sealed.plain.len() == padded, "{len} bytes are padded to {}", sealed.plain.len());
        hold!(sealed.plain[..len] == packet.bytes, "packet {id} was altered before it was sealed");
        hold!(sealed.plain[len..].iter().all(|&byte| byte == 0), "padding is not zero");
        hold!(packet.lineage == actor.lineage, "packet {id} is of another host");
        hold!(side.sealed.insert(id), "packet {id} was sealed twice");
        let reader = *packet.readers.first().expect("it was taken for somebody");
        let last = side.last_sealed.insert((packet.flow, reader), id);
        hold!(
            side.disordered || last.is_none_or(|last| last < id),
            "packet {id} of flow {} was sealed after {last:?}",
            packet.flow
        );
    }

    /// What left: well-formed, to where it must go, not too early.
    fn check_sent(&mut self, actor: &Actor<'_>, side: &mut Side, step: &Step, noted: &mut Noted) {
        for sent in &step.sent {
            let bytes = &sent.bytes;
            hold!(bytes[1..4] == [0; 3], "reserved bytes are sent as they are");
            match bytes[0] {
                TYPE_TRANSPORT => {
                    let made = step.operations.iter().find(|operation| {
                        operation.outcome == Outcome::Sealed
                            && Some(&operation.tag) == bytes.last_chunk()
                    });
                    let made = made.expect("transport data is sealed in the step that sends it");
                    hold!(bytes[8..16] == made.counter.to_le_bytes(), "the header's counter");
                    hold!(bytes.len() == made.plain.len() + 32, "the length of transport data");
                    hold!(sent.tos == 0, "outer TOS of transport data");
                    let at =
                        |key: &[u8; 32]| side.endpoints.get(key) == Some(&Some(sent.to.remote));
                    let peers: Vec<PublicKey> = match number(&made.plain) {
                        Some(id) => self.packets[id as usize].readers.clone(),
                        None => actor
                            .configured
                            .peers
                            .keys()
                            .map(|key| PublicKey::from_bytes(*key))
                            .collect(),
                    };
                    let mut peers = peers.iter().filter(|key| at(key.as_bytes()));
                    let Some(peer) = peers.next() else {
                        panic!("transport data goes to {}, where no reader is", sent.to.remote);
                    };
                    if peers.next().is_none() {
                        let ours = side.responded.get(&(*peer, word(bytes, 4)));
                        hold!(
                            self.has_copies
                                || ours.is_none_or(|ours| !ours.is_disjoint(&side.opened)),
                            "a responder sent before it received"
                        );
                        let age = step.now.since(side.first_sealed[&made.key]);
                        noted.sealed.push((*peer, age, ours.is_none()));
                    }
                }
                TYPE_INITIATION => {
                    hold!(sent.tos == HANDSHAKE_TOS, "outer TOS of a handshake message");
                    self.genuine.insert(handshake_digest(bytes));
                    let to = self.receiver(bytes).expect("initiations are for somebody");
                    side.asked.insert(word(bytes, 4), to);
                    if let Some(last) = side.initiated.insert(to, step.now) {
                        let gap = step.now.since(last);
                        hold!(gap >= REKEY_TIMEOUT, "two initiations within {gap:?}");
                    }
                    noted.initiated.push(to);
                    self.counts.initiations += 1;
                }
                TYPE_RESPONSE => {
                    hold!(sent.tos == HANDSHAKE_TOS, "outer TOS of a handshake message");
                    self.genuine.insert(handshake_digest(bytes));
                    let to = self.receiver(bytes).expect("responses are for somebody");
                    let ours = side.responded.entry((to, word(bytes, 8))).or_default();
                    ours.insert(word(bytes, 4));
                    let asked = step.arrivals.first().expect("it answers something");
                    hold!(
                        sent.to.remote == asked.from.remote,
                        "an initiation is answered to its source"
                    );
                }
                TYPE_COOKIE_REPLY => {
                    hold!(sent.tos == 0, "outer TOS of a cookie reply");
                    hold!(
                        step.dropped(DropReason::CookieDemanded) == 1,
                        "a cookie reply stands for a message that is not handled"
                    );
                    self.genuine.insert(handshake_digest(bytes));
                    let asked = step.arrivals.first().expect("it answers something");
                    hold!(
                        sent.to.remote == asked.from.remote && bytes.len() < asked.bytes.len(),
                        "a cookie goes to who wants one, and is shorter"
                    );
                    self.counts.cookies += 1;
                }
                kind => panic!("a message of type {kind} was sent"),
            }
        }
    }

    /// What came: opened, new, of the right sender, and unaltered; and counted as what it is.
    fn check_inbound(
        &mut self,
        actor: &Actor<'_>,
        side: &mut Side,
        step: &Step,
        noted: &mut Noted,
    ) {
        let mut expected = [0; DropReason::COUNT];
        let mut expect = |reason: DropReason| expected[reason as usize] += 1_u64;
        let (mut fresh, mut of_inner) = (0_u64, 0_u64);
        let mut written = Vec::new();
        let mut moved: BTreeMap<[u8; 32], Vec<SocketAddr>> = BTreeMap::new();
        for operation in step.operations.iter().filter(|o| o.outcome != Outcome::Sealed) {
            if operation.outcome == Outcome::Refused {
                expect(DropReason::BadTag);
                self.counts.refused += 1;
                continue;
            }
            let made = self.sealed.get(&(operation.key, operation.counter));
            hold!(made == Some(&digest(&operation.plain)), "opened what nobody sealed");
            let (_, sealer) = self.sealers[&operation.key];
            let place = step.addresses.iter().position(|at| at + 16 == operation.address);
            let arrival = &step.arrivals[place.expect("what is opened has arrived")];
            hold!(
                side.sources.get(&operation.tag).is_some_and(|all| all.contains(&arrival.from)),
                "a datagram is said to come from {:?}, and did not",
                arrival.from
            );
            if !side.windows.entry(operation.key).or_default().accept(operation.counter) {
                expect(DropReason::Replay);
                self.counts.replays += 1;
                continue;
            }
            fresh += 1;
            side.opened.insert(word(&arrival.bytes, 4));
            moved.entry(*sealer.as_bytes()).or_default().push(arrival.from.remote);
            if operation.plain.is_empty() {
                continue;
            }
            let id = number(&operation.plain).expect("only our packets are sealed");
            let packet = &self.packets[id as usize];
            let own = actor.configured.public_key;
            hold!(
                own.is_some_and(|own| packet.readers.contains(&own)),
                "packet {id} was read by host {}, for whom it was not",
                actor.host
            );
            let reason = match judge(&packet.bytes) {
                Err(reason) => Some(reason),
                Ok(source) if actor.configured.owner(source) != Some(sealer) => {
                    self.counts.wrong_source += 1;
                    Some(DropReason::SourceNotAllowed)
                }
                Ok(_) if step.tun_full => Some(DropReason::TunWrite),
                Ok(_) => None,
            };
            if let Some(reason) = reason {
                expect(reason);
                of_inner += 1;
                continue;
            }
            written.push(&packet.bytes);
            let is_first = self.delivered.insert((actor.lineage, id)) || self.copied.remove(&id);
            hold!(is_first, "packet {id} was delivered twice");
            self.counts.delivered += 1;
            noted.delivered.push(id);
            if let Some(Some((lane, arrived))) = side.arrived.get(&operation.tag) {
                let flow = (packet.flow, operation.key, *lane);
                let last = side.last_delivered.insert(flow, *arrived);
                hold!(
                    side.disordered || last.is_none_or(|last| last < *arrived),
                    "packet {id} of flow {} was delivered out of order",
                    packet.flow
                );
            }
        }
        // Some were not looked at further than to their counters.
        let at_sight =
            step.dropped(DropReason::Replay).saturating_sub(expected[DropReason::Replay as usize]);
        let may_be_replay = |bytes: &[u8], at: usize| {
            let counter = bytes.get(8..).and_then(|rest| rest.first_chunk());
            let counter = counter.copied().map(u64::from_le_bytes);
            let knows = |counter| side.windows.values().any(|window| window.knows(counter));
            bytes.first() == Some(&TYPE_TRANSPORT)
                && step.operations.iter().all(|operation| operation.address != at + 16)
                && counter.is_some_and(knows)
        };
        let arrivals = step.arrivals.iter().zip(&step.addresses);
        let known =
            arrivals.filter(|(arrival, at)| may_be_replay(&arrival.bytes, **at)).count() as u64;
        hold!(at_sight <= known, "{at_sight} dropped as replays, and {known} can have been");
        expected[DropReason::Replay as usize] += at_sight;
        self.counts.replays += at_sight;
        hold!(step.written.iter().eq(written), "the TUN device got something else");
        hold!(step.received == fresh, "{fresh} messages were new, {} counted", step.received);
        for reason in [
            DropReason::BadTag,
            DropReason::Replay,
            DropReason::SourceNotAllowed,
            DropReason::BadInnerLength,
            DropReason::BadInnerVersion,
            DropReason::TunWrite,
        ] {
            let (counted, expected) = (step.dropped(reason), expected[reason as usize]);
            hold!(counted == expected, "{expected} of {reason:?}, {counted} counted");
        }
        let accounted =
            step.received + step.dropped_in_all() - of_inner + (step.parcels + step.handed) as u64;
        let count = step.arrivals.len() as u64;
        hold!(accounted == count, "{count} datagrams came, {accounted} are accounted for");
        for (peer, endpoint) in &step.endpoints {
            let Some(before) = side.endpoints.get(peer.as_bytes()) else { continue };
            let allowed = match moved.get(peer.as_bytes()) {
                Some(sources) => endpoint.is_some_and(|at| sources.contains(&at)),
                None => endpoint == before,
            };
            hold!(allowed, "endpoint moved from {before:?} to {endpoint:?}");
            if endpoint != before {
                self.counts.moves += 1;
            }
        }
    }

    /// A handshake message is taken once, if it is genuine, or counted as one drop.
    fn check_handshake(&mut self, side: &mut Side, step: &Step) {
        let Some(arrival) = step.arrivals.first() else { return };
        let dropped = step.dropped_in_all() - step.dropped(DropReason::SocketSend);
        hold!(dropped <= 1, "one message, {dropped} drops");
        if dropped == 1 {
            let cookies = step.dropped(DropReason::CookieDemanded) as usize;
            hold!(step.sent.len() == cookies, "a message that was dropped was answered");
            return;
        }
        if step.is_under_load && step.dropped(DropReason::SocketSend) > 0 {
            // A cookie was demanded, but could not be sent.
            return;
        }
        let digest = handshake_digest(&arrival.bytes);
        hold!(self.genuine.contains(&digest), "a handshake message that nobody sent was taken");
        hold!(side.accepted.insert(digest), "a handshake message was taken twice");
        self.counts.handshakes += 1;
        if arrival.bytes[0] == TYPE_RESPONSE
            && let Some(peer) = side.asked.get(&word(&arrival.bytes, 8))
        {
            // From here on the peer's index is that of a keypair whose initiator we are.
            side.responded.remove(&(*peer, word(&arrival.bytes, 4)));
        }
    }

    /// Only a change of the configuration, and what `check_inbound` looks at, moves endpoints.
    fn check_endpoints(&mut self, side: &mut Side, step: &Step) {
        let new: BTreeMap<_, _> =
            step.endpoints.iter().map(|(key, at)| (*key.as_bytes(), *at)).collect();
        if !matches!(step.call, Call::Inbound | Call::Configure) {
            hold!(new == side.endpoints, "endpoints moved in {:?}", step.call);
        }
        side.endpoints = new;
    }

    /// For whom a handshake message is.
    fn receiver(&self, message: &[u8]) -> Option<PublicKey> {
        let to = self.identities.iter().find(|identity| check_mac1(identity, message))?;
        Some(*to.public_key())
    }

    /// A host of `lineage` begins again where `side` was: what it had taken and not sealed by then, it
    /// may seal once more, and its peers cannot know it for what they had.
    pub fn roll_back(&mut self, lineage: usize, side: &Side) {
        let packets = &self.packets;
        self.delivered.retain(|&(_, id)| {
            packets[id as usize].lineage != lineage || side.sealed.contains(&id)
        });
    }

    /// As [`roll_back`](Self::roll_back), and before it: what the host had sealed since, as `lost` says,
    /// may be on its way, and come beside what it seals once more.
    pub fn lose(&mut self, lineage: usize, side: &Side, lost: &Side) {
        let delivered: HashSet<u64> = self.delivered.iter().map(|&(_, id)| id).collect();
        let again = lost.sealed.iter().filter(|id| {
            self.packets[**id as usize].lineage == lineage
                && !side.sealed.contains(id)
                && !delivered.contains(id)
        });
        self.copied.extend(again);
    }

    /// Two hosts of `lineage` go on from where `side` was: what was taken and not sealed by then, both
    /// may seal.
    pub fn copy(&mut self, lineage: usize, side: &Side) {
        let ids = 0..self.packets.len() as u64;
        self.copied.extend(ids.filter(|id| {
            self.packets[*id as usize].lineage == lineage && !side.sealed.contains(id)
        }));
    }

    /// Whether a packet was delivered at a host of `lineage`.
    pub fn was_delivered(&self, lineage: usize, id: u64) -> bool {
        self.delivered.contains(&(lineage, id))
    }
}

impl Side {
    /// Handshake messages that were accepted once may be so again.
    pub fn forget_handshakes(&mut self) {
        self.accepted.clear();
    }
}

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// A digest of what mac1 and the handshake cover: mac2 is anyone's to write while no cookie is
/// demanded.
pub fn handshake_digest(message: &[u8]) -> u64 {
    digest(&message[..message.len() - MAC_LEN])
}

/// The little-endian word at `at`.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("messages are longer"))
}

fn is_v4(packet: &[u8]) -> bool {
    packet[0] >> 4 == 4
}

/// The number that stands in a packet of ours.
pub fn number(packet: &[u8]) -> Option<u64> {
    // Junk keeps the length of an IPv4 header.
    let start = if packet.first()? >> 4 == 6 { 40 } else { 20 };
    let (mark, rest) = packet.get(start..)?.split_first_chunk::<8>()?;
    (mark == MARK).then(|| rest.first_chunk().map(|id| u64::from_le_bytes(*id)))?
}

fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet[0] >> 4 {
        4 => Some(Ipv4Addr::from(*packet[16..].first_chunk::<4>()?).into()),
        6 => Some(Ipv6Addr::from(*packet[24..].first_chunk::<16>()?).into()),
        _ => None,
    }
}

/// What a receiver must say of a packet: its source, or why it is none.
fn judge(packet: &[u8]) -> Result<IpAddr, DropReason> {
    let len = match packet[0] >> 4 {
        4 => usize::from(u16::from_be_bytes([packet[2], packet[3]])),
        6 => 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])),
        _ => return Err(DropReason::BadInnerVersion),
    };
    // Longer than the padding could make up for.
    if len > packet.len() {
        return Err(DropReason::BadInnerLength);
    }
    Ok(if is_v4(packet) {
        Ipv4Addr::from(*packet[12..].first_chunk::<4>().expect("it is longer")).into()
    } else {
        Ipv6Addr::from(*packet[8..].first_chunk::<16>().expect("it is longer")).into()
    })
}

/// An IP header of no length yet.
fn header((source, destination): (IpAddr, IpAddr)) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
            header.extend_from_slice(&source.octets());
            header.extend_from_slice(&destination.octets());
            header
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, 17, 64];
            header.extend_from_slice(&source.octets());
            header.extend_from_slice(&destination.octets());
            header
        }
        _ => panic!("a packet has one IP version"),
    }
}

/// Writes the packet's length into its header, or what `form` says.
fn set_len(packet: &mut [u8], form: Form) {
    let more = if form == Form::TooShort { 64 } else { 0 };
    if is_v4(packet) {
        let len = (packet.len() + more) as u16;
        packet[2..4].copy_from_slice(&len.to_be_bytes());
    } else {
        let len = (packet.len() - 40 + more) as u16;
        packet[4..6].copy_from_slice(&len.to_be_bytes());
    }
    if form == Form::NoVersion {
        packet[0] = 0x50;
    }
}
