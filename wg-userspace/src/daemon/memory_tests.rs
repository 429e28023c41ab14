//! The memory of a data process: what is read is what was written, whatever became of it since.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use rustix::fs::SealFlags;

use super::memory::{Known, Memory, MemoryError, Remembered, read, snapshot, wipe};
use crate::device::{AllowedIpChange, Device, PeerChange, SetRequest};
use crate::key::{PresharedKey, PrivateKey, PublicKey};
use crate::noise::Timestamp;
use crate::sys::memory::memfd_len;

const CAPACITY: u64 = 1 << 20;

/// What happens to a device.
#[derive(Clone, Debug)]
enum Step {
    Set(SetRequest),
    Peers(Vec<(PublicKey, Known)>),
    Compact,
}

/// What a journal is to say: every step applied to plain values.
#[derive(Default)]
struct Model {
    device: Device,
    peers: HashMap<PublicKey, Known>,
}

impl Model {
    fn apply(&mut self, step: &Step) {
        match step {
            Step::Set(request) => {
                let before: Vec<_> =
                    self.device.peers().map(|(id, peer)| (id, peer.public_key)).collect();
                for (_, key) in before {
                    let is_removed = request.replace_peers
                        || request.peers.iter().any(|peer| peer.public_key == key && peer.remove)
                        || request.private_key.iter().flatten().any(|own| own.public_key() == key);
                    if is_removed {
                        self.peers.remove(&key);
                    }
                }
                self.device.apply(request.clone());
                for peer in request.peers.iter().filter(|peer| peer.endpoint.is_some()) {
                    if let Some(known) = self.peers.get_mut(&peer.public_key) {
                        known.endpoint = None;
                    }
                }
            }
            Step::Peers(peers) => {
                let device = &self.device;
                let there = peers.iter().filter(|(key, _)| device.find(key).is_some());
                self.peers.extend(there.copied());
            }
            Step::Compact => {}
        }
    }

    fn known(&self) -> HashMap<PublicKey, Known> {
        self.peers.clone()
    }
}

fn key(number: u8) -> PublicKey {
    PrivateKey::from_bytes([number + 1; 32]).public_key()
}

fn any_endpoint() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![
        (any::<[u8; 4]>(), 1..u16::MAX).prop_map(SocketAddr::from),
        (any::<[u8; 16]>(), 1..u16::MAX).prop_map(SocketAddr::from),
        (1..u16::MAX, 1..9_u32).prop_map(|(port, scope)| {
            std::net::SocketAddrV6::new("fe80::1".parse().unwrap(), port, 0, scope).into()
        }),
    ]
}

fn any_peer() -> impl Strategy<Value = PeerChange> {
    let net = (0..4_u8, 8..=32_u8, prop::bool::ANY).prop_map(|(byte, len, adds)| {
        let net = ipnet::Ipv4Net::new([10, byte, 0, 0].into(), len).unwrap().into();
        if adds { AllowedIpChange::Add(net) } else { AllowedIpChange::Remove(net) }
    });
    let flags = (prop::bool::weighted(0.2), prop::bool::weighted(0.2), prop::bool::ANY);
    (
        0..5_u8,
        flags,
        option::of(any_endpoint()),
        option::of(0..99_u16),
        option::of(0..3_u8),
        option::of("|[a-z]{1,3}"),
        vec(net, 0..4),
    )
        .prop_map(
            |(number, (remove, update_only, replaces), endpoint, keepalive, psk, name, nets)| {
                PeerChange {
                    remove,
                    update_only,
                    preshared_key: psk.map(|byte| PresharedKey::from_bytes([byte; 32])),
                    endpoint,
                    persistent_keepalive: keepalive,
                    name,
                    replace_allowed_ips: replaces,
                    allowed_ips: nets,
                    ..PeerChange::new(key(number))
                }
            },
        )
}

fn any_step() -> impl Strategy<Value = Step> {
    let set = (
        option::of(option::of(0..4_u8)),
        option::of(0..9_u16),
        option::of(0..9_u32),
        (option::of(any::<bool>()), option::of(any::<bool>())),
        prop::bool::weighted(0.1),
        vec(any_peer(), 0..4),
    );
    let set = set.prop_map(|(private_key, listen_port, fwmark, rules, replace_peers, peers)| {
        let private_key =
            private_key.map(|key| key.map(|byte| PrivateKey::from_bytes([byte + 1; 32])));
        // A peer that comes twice in one request makes the model too clever.
        let mut seen = std::collections::HashSet::new();
        let peers = peers.into_iter().filter(|peer| seen.insert(peer.public_key)).collect();
        let (mss_clamp, copy_dscp) = rules;
        Step::Set(SetRequest {
            private_key,
            listen_port,
            fwmark,
            mss_clamp,
            copy_dscp,
            replace_peers,
            peers,
        })
    });
    let known = (0..6_u8, option::of(any_endpoint()), any::<[u8; 12]>(), any::<[bool; 2]>());
    let known = known.prop_map(|(number, endpoint, timestamp, [is_by_name, had_session])| {
        let greatest_timestamp = Timestamp::from_bytes(timestamp);
        (key(number), Known { endpoint, is_by_name, greatest_timestamp, had_session })
    });
    prop_oneof![
        4 => set,
        3 => vec(known, 0..6).prop_map(Step::Peers),
        1 => Just(Step::Compact),
    ]
}

/// The whole of a device, in words.
fn words(device: &Device) -> Vec<String> {
    let requests = snapshot(device);
    requests.map(|request| crate::uapi::format_set(&request).to_string()).collect()
}

fn write(memory: &mut Memory, step: &Step) {
    match step {
        Step::Set(request) => memory.append_set(request).unwrap(),
        Step::Peers(peers) => memory.append_peers(peers.iter().copied()).unwrap(),
        Step::Compact => {
            let Remembered { device, peers, .. } = read(&*memory).unwrap();
            let compacted = Memory::compacted(&device, &[], peers.into_iter()).unwrap();
            std::mem::replace(memory, compacted).wipe().unwrap();
        }
    }
}

fn size(memory: &Memory) -> u64 {
    let mut length = [0; 8];
    rustix::io::pread(memory, &mut length, 16).unwrap();
    u64::from_le_bytes(length)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_is_read_is_the_device_after_every_step(steps in vec(any_step(), 0..12)) {
        let mut memory = Memory::new(CAPACITY).unwrap();
        let mut model = Model::default();
        for step in &steps {
            write(&mut memory, step);
            model.apply(step);
            let remembered = read(&memory).unwrap();
            prop_assert!(!remembered.is_damaged);
            prop_assert_eq!(words(&remembered.device), words(&model.device));
            prop_assert_eq!(remembered.peers, model.known());
        }
    }

    /// A journal that was cut anywhere is that of the steps up to there.
    #[test]
    fn what_is_cut_is_the_device_up_to_the_last_whole_record(
        steps in vec(any_step().prop_filter("in one journal", |step| !matches!(step, Step::Compact)), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut memory = Memory::new(CAPACITY).unwrap();
        let mut ends = vec![size(&memory)];
        for step in &steps {
            write(&mut memory, step);
            ends.push(size(&memory));
        }
        let cut = ends[0] + cut.index((size(&memory) - ends[0] + 1) as usize) as u64;
        rustix::io::pwrite(&memory, &cut.to_le_bytes(), 16).unwrap();
        let remembered = read(&memory).unwrap();
        let whole = ends.iter().rposition(|&end| end <= cut).unwrap();
        let mut model = Model::default();
        steps[..whole].iter().for_each(|step| model.apply(step));
        prop_assert_eq!(words(&remembered.device), words(&model.device));
        prop_assert_eq!(&remembered.peers, &model.known());
        prop_assert_eq!(remembered.is_damaged, !ends.contains(&cut));
    }

    /// A byte that changed ends the reading there; nothing panics, and nothing of it is believed.
    #[test]
    fn what_was_changed_is_not_believed(
        steps in vec(any_step(), 1..8),
        at in any::<prop::sample::Index>(),
        bits in 1..=u8::MAX,
    ) {
        let mut memory = Memory::new(CAPACITY).unwrap();
        for step in &steps {
            write(&mut memory, step);
        }
        let at = at.index(size(&memory) as usize) as u64;
        let mut byte = [0];
        rustix::io::pread(&memory, &mut byte, at).unwrap();
        rustix::io::pwrite(&memory, &[byte[0] ^ bits], at).unwrap();
        // Four bytes of the header say nothing.
        match read(&memory) {
            Ok(remembered) => prop_assert!(remembered.is_damaged || (12..16).contains(&at)),
            Err(MemoryError::Foreign) => prop_assert!(at < 8),
            Err(MemoryError::Version(_)) => prop_assert!((8..12).contains(&at)),
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    /// Any bytes behind a header are read without harm.
    #[test]
    fn nonsense_is_read_without_harm(bytes in vec(any::<u8>(), 0..600), claimed in any::<u64>()) {
        let memory = Memory::new(CAPACITY).unwrap();
        rustix::io::pwrite(&memory, &bytes, 24).unwrap();
        rustix::io::pwrite(&memory, &claimed.to_le_bytes(), 16).unwrap();
        let remembered = read(&memory).unwrap();
        prop_assert_eq!(remembered.device.peer_count(), 0);
    }
}

fn peer(number: u32) -> PeerChange {
    let mut bytes = [7; 32];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    let net = ipnet::Ipv4Net::new(number.into(), 32).unwrap();
    PeerChange {
        preshared_key: Some(PresharedKey::from_bytes(bytes)),
        endpoint: Some(([192, 0, 2, 1], 51820).into()),
        allowed_ips: vec![AllowedIpChange::Add(net.into())],
        ..PeerChange::new(PublicKey::from_bytes(bytes))
    }
}

#[test]
fn a_full_memory_takes_nothing_and_grows_when_it_is_compacted() {
    let mut memory = Memory::new(4096).unwrap();
    let mut device = Device::default();
    let full = (0..).find(|&number| {
        let request = SetRequest { peers: vec![peer(number)], ..SetRequest::default() };
        match memory.append_set(&request) {
            Ok(()) => {
                device.apply(request);
                false
            }
            Err(error) => {
                assert!(matches!(error, MemoryError::Full), "{error}");
                true
            }
        }
    });
    assert!(full.unwrap() > 5);
    assert_eq!(words(&read(&memory).unwrap().device), words(&device), "it says what it said");
    let mut compacted = Memory::compacted(&device, &[], std::iter::empty()).unwrap();
    compacted.append_set(&SetRequest { peers: vec![peer(9999)], ..SetRequest::default() }).unwrap();
    assert_eq!(read(&compacted).unwrap().device.peer_count(), device.peer_count() + 1);
}

#[test]
fn a_wiped_memory_holds_no_byte_of_before() {
    let mut memory = Memory::new(CAPACITY).unwrap();
    memory.append_set(&SetRequest { peers: vec![peer(1)], ..SetRequest::default() }).unwrap();
    let kept = memory.as_fd().try_clone_to_owned().unwrap();
    memory.wipe().unwrap();
    let mut bytes = vec![1; CAPACITY as usize];
    let mut at = 0;
    while at < bytes.len() {
        at += rustix::io::pread(&kept, &mut bytes[at..], at as u64).unwrap();
    }
    assert!(bytes.iter().all(|&byte| byte == 0));
    assert!(matches!(read(&kept), Err(MemoryError::Foreign)));
}

#[test]
fn its_size_is_sealed_and_a_file_that_may_shrink_is_refused() {
    let memory = Memory::new(CAPACITY).unwrap();
    assert_eq!(memfd_len(&memory).unwrap() as u64, CAPACITY);
    let seals = rustix::fs::fcntl_get_seals(&memory).unwrap();
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(read(&file), Err(MemoryError::Foreign)));
    assert!(matches!(wipe(&file), Err(MemoryError::Foreign)));
}

#[test]
fn pulled_peers_are_left_to_their_source() {
    let mut device = Device::default();
    let pulled = PeerChange { pulled: true, ..peer(2) };
    device.apply(SetRequest { peers: vec![peer(1), pulled], ..SetRequest::default() });
    let memory = Memory::compacted(&device, &[], std::iter::empty()).unwrap();
    let remembered = read(&memory).unwrap().device;
    assert_eq!(remembered.peer_count(), 1);
    assert!(remembered.find(&peer(1).public_key).is_some());
}

/// The gateway is to hold as many.
#[test]
fn a_million_peers_fit() {
    const COUNT: u32 = 1_000_000;
    let mut device = Device::default();
    device.apply(SetRequest { peers: (0..COUNT).map(peer).collect(), ..SetRequest::default() });
    let known = |number| (peer(number).public_key, Known { had_session: true, ..Known::default() });
    let memory = Memory::compacted(&device, &[], (0..COUNT).map(known)).unwrap();
    let remembered = read(&memory).unwrap();
    assert_eq!(remembered.device.peer_count(), COUNT as usize);
    assert_eq!(remembered.peers.len(), COUNT as usize);
    assert!(!remembered.is_damaged);
    let last = peer(COUNT - 1);
    let id = remembered.device.find(&last.public_key).unwrap();
    assert_eq!(remembered.device.peer(id).unwrap().preshared_key, last.preshared_key.unwrap());
}
