use std::collections::HashMap;

use ipnet::{Ipv4Net, Ipv6Net};
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

const A: PeerId = PeerId(0);
const B: PeerId = PeerId(1);
const C: PeerId = PeerId(2);
const D: PeerId = PeerId(3);

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn table(prefixes: &[(&str, PeerId)]) -> AllowedIps {
    let mut allowed = AllowedIps::default();
    for &(text, peer) in prefixes {
        allowed.insert(net(text), peer);
    }
    allowed
}

#[track_caller]
fn assert_owner(allowed: &AllowedIps, addr: &str, owner: impl Into<Option<PeerId>>) {
    assert_eq!(allowed.snapshot().lookup(addr.parse().unwrap()), owner.into(), "owner of {addr}");
}

fn texts(allowed: &AllowedIps, peer: PeerId) -> Vec<String> {
    allowed.of_peer(peer).map(|net| net.to_string()).collect()
}

/// The plain model: a list of prefixes in order, and look-up by trying all of them.
#[derive(Clone, Debug, Default)]
struct Model(Vec<(IpNet, PeerId)>);

impl Model {
    fn insert(&mut self, net: IpNet, peer: PeerId) -> Option<PeerId> {
        let previous = self.take(net);
        self.0.push((net.trunc(), peer));
        previous
    }

    fn take(&mut self, net: IpNet) -> Option<PeerId> {
        let at = self.0.iter().position(|&(other, _)| other == net.trunc())?;
        Some(self.0.remove(at).1)
    }

    fn remove(&mut self, net: IpNet, peer: PeerId) -> bool {
        let own = self.0.contains(&(net.trunc(), peer));
        if own {
            self.take(net);
        }
        own
    }

    fn lookup(&self, addr: IpAddr) -> Option<PeerId> {
        let around = self.0.iter().filter(|(net, _)| net.contains(&addr));
        around.max_by_key(|(net, _)| net.prefix_len()).map(|&(_, peer)| peer)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Insert(IpNet, PeerId),
    /// Gives a prefix that is already there, if there is one, to this peer.
    Move(Index, PeerId),
    Remove(IpNet, PeerId),
    /// Removes a prefix that is there, if there is one.
    RemoveOwn(Index),
    RemovePeer(PeerId),
    Publish,
}

fn peer() -> impl Strategy<Value = PeerId> {
    prop_oneof![
        9 => (0u32..5).prop_map(PeerId),
        1 => Just(AllowedIps::PEER_MAX),
    ]
}

/// Prefixes that often nest, touch, or are equal but for their host bits.
fn any_net() -> impl Strategy<Value = IpNet> {
    let v4_addr = prop_oneof![
        Just(0),
        Just(u32::MAX),
        any::<u32>(),
        any::<u8>().prop_map(|low| 0x0a00_0000 | u32::from(low)),
        any::<u16>().prop_map(|low| 0x0a01_0000 | u32::from(low)),
        (0u32..4).prop_map(|high| high << 30),
    ];
    let v6_addr = prop_oneof![
        Just(0),
        Just(u128::MAX),
        any::<u128>(),
        any::<u8>().prop_map(|low| 0x2001_0db8 << 96 | u128::from(low)),
        any::<u32>().prop_map(|low| 0x2001_0db8 << 96 | u128::from(low) << 48),
        (0u128..4).prop_map(|high| high << 126),
    ];
    let v4_len = prop_oneof![0u8..=32, 8u8..=8, 15u8..=17, 23u8..=25, 30u8..=32];
    let v6_len = prop_oneof![0u8..=128, 46u8..=50, 63u8..=65, 120u8..=128];
    prop_oneof![
        (v4_addr, v4_len).prop_map(|(addr, len)| Ipv4Net::new(addr.into(), len).unwrap().into()),
        (v6_addr, v6_len).prop_map(|(addr, len)| Ipv6Net::new(addr.into(), len).unwrap().into()),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (any_net(), peer()).prop_map(|(net, peer)| Step::Insert(net, peer)),
        3 => (any::<Index>(), peer()).prop_map(|(at, peer)| Step::Move(at, peer)),
        1 => (any_net(), peer()).prop_map(|(net, peer)| Step::Remove(net, peer)),
        6 => any::<Index>().prop_map(Step::RemoveOwn),
        1 => peer().prop_map(Step::RemovePeer),
        1 => Just(Step::Publish),
    ]
}

/// The addresses at which a table that has to do with `net` can go wrong: both ends of the prefix,
/// the neighbours outside, and one inside.
fn edges(net: IpNet, inside: u128) -> Vec<IpAddr> {
    match net {
        IpNet::V4(net) => {
            let (first, last) = (net.network().to_bits(), net.broadcast().to_bits());
            let inside = first | (inside as u32 & !net.netmask().to_bits());
            [first.wrapping_sub(1), first, inside, last, last.wrapping_add(1)]
                .map(|addr| IpAddr::V4(addr.into()))
                .into()
        }
        IpNet::V6(net) => {
            let (first, last) = (net.network().to_bits(), net.broadcast().to_bits());
            let inside = first | (inside & !net.netmask().to_bits());
            [first.wrapping_sub(1), first, inside, last, last.wrapping_add(1)]
                .map(|addr| IpAddr::V6(addr.into()))
                .into()
        }
    }
}

fn run(allowed: &mut AllowedIps, model: &mut Model, step: &Step) -> Result<(), TestCaseError> {
    match *step {
        Step::Insert(net, peer) => {
            prop_assert_eq!(allowed.insert(net, peer), model.insert(net, peer));
        }
        Step::Move(at, peer) if !model.0.is_empty() => {
            let (net, owner) = *at.get(&model.0);
            prop_assert_eq!(allowed.insert(net, peer), Some(owner));
            model.insert(net, peer);
        }
        Step::Remove(net, peer) => {
            prop_assert_eq!(allowed.remove(net, peer), model.remove(net, peer));
        }
        Step::RemoveOwn(at) if !model.0.is_empty() => {
            let (net, owner) = *at.get(&model.0);
            prop_assert!(allowed.remove(net, owner));
            model.remove(net, owner);
        }
        Step::RemovePeer(peer) => {
            allowed.remove_peer(peer);
            model.0.retain(|&(_, owner)| owner != peer);
        }
        Step::Move(..) | Step::RemoveOwn(_) | Step::Publish => {}
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn table_and_every_snapshot_agree_with_a_plain_list(
        steps in prop::collection::vec(step(), 1..120),
        inside in prop::collection::vec(any::<u128>(), 1..8),
        elsewhere in prop::collection::vec(any::<u128>(), 0..8),
    ) {
        let (mut allowed, mut model) = (AllowedIps::default(), Model::default());
        let mut published = Vec::new();
        let mut addrs: Vec<IpAddr> = elsewhere
            .iter()
            .flat_map(|&bits| [IpAddr::V6(bits.into()), IpAddr::V4((bits as u32).into())])
            .collect();
        for step in &steps {
            run(&mut allowed, &mut model, step)?;
            if let Step::Insert(net, _) | Step::Remove(net, _) = *step {
                addrs.extend(inside.iter().flat_map(|&inside| edges(net, inside)));
            }
            if let Step::Publish = step {
                published.push((allowed.snapshot(), model.clone()));
            }
        }
        published.push((allowed.snapshot(), model.clone()));
        addrs.sort_unstable();
        addrs.dedup();
        for (snapshot, model) in &published {
            for &addr in &addrs {
                prop_assert_eq!(snapshot.lookup(addr), model.lookup(addr), "{}", addr);
            }
        }

        prop_assert_eq!(allowed.len(), model.0.len());
        for peer in (0..5).map(PeerId).chain([AllowedIps::PEER_MAX]) {
            let listed: Vec<_> = allowed.of_peer(peer).collect();
            let own = model.0.iter().filter(|(_, owner)| *owner == peer);
            prop_assert_eq!(listed, own.map(|&(net, _)| net).collect::<Vec<_>>());
        }
    }

    #[test]
    fn removing_everything_leaves_nothing_behind(
        nets in prop::collection::vec((any_net(), peer()), 1..300),
        order in any::<u64>(),
    ) {
        let mut allowed = AllowedIps::default();
        let mut owners = HashMap::new();
        for &(net, peer) in &nets {
            allowed.insert(net, peer);
            owners.insert(net.trunc(), peer);
        }
        let mut owners: Vec<_> = owners.into_iter().collect();
        owners.sort_unstable_by_key(|(net, _)| (net.addr(), net.prefix_len()));
        let half = (order % owners.len() as u64) as usize;
        owners.rotate_left(half);
        for (net, peer) in owners {
            prop_assert!(allowed.remove(net, peer));
        }
        prop_assert!(allowed.is_empty());
        let table = allowed.snapshot();
        prop_assert_eq!(table.v4.size(), (0, 0));
        prop_assert_eq!(table.v6.size(), (1, 1));
        for (net, _) in nets {
            prop_assert_eq!(table.lookup(net.network()), None);
        }
    }
}

/// Random sequences of a few dozen prefixes rarely fill a leaf or a page; this one fills hundreds.
#[test]
fn large_tables_agree_with_a_hash_of_their_prefixes() {
    use rand::{RngExt, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(7);
    let mut allowed = AllowedIps::default();
    let mut owners: HashMap<IpNet, PeerId> = HashMap::new();
    for round in 0..40_000 {
        let net = if round % 2 == 0 {
            let len = [32, 32, 32, 24, 20][rng.random_range(0..5)];
            let addr = 0x0a00_0000 | rng.random_range(0u32..1 << 19);
            IpNet::from(Ipv4Net::new(addr.into(), len).unwrap()).trunc()
        } else {
            let len = [128, 64, 64, 56, 48][rng.random_range(0..5)];
            let subnet = u128::from(rng.random_range(0u32..1 << 19)) << 64;
            let host = rng.random_range(0u128..3);
            let addr = 0x2001_0db8 << 96 | subnet | host;
            IpNet::from(Ipv6Net::new(addr.into(), len).unwrap()).trunc()
        };
        let peer = PeerId(rng.random_range(0..2000));
        match owners.get(&net) {
            Some(&owner) if round % 3 == 0 => {
                assert!(allowed.remove(net, owner));
                owners.remove(&net);
            }
            _ => {
                assert_eq!(allowed.insert(net, peer), owners.insert(net, peer));
            }
        }
    }
    for peer in (0..2000).step_by(5).map(PeerId) {
        allowed.remove_peer(peer);
        owners.retain(|_, owner| *owner != peer);
    }

    let table = allowed.snapshot();
    let expected = |addr: IpAddr| {
        let lens = if addr.is_ipv4() { 0..=32 } else { 0..=128 };
        lens.rev().find_map(|len| owners.get(&IpNet::new(addr, len).unwrap().trunc()).copied())
    };
    for &net in owners.keys() {
        for addr in edges(net, rng.random()) {
            assert_eq!(table.lookup(addr), expected(addr), "{addr}");
        }
    }
    let (range_count, leaf_count) = table.v6.size();
    assert!(range_count > 10_000);
    assert!(leaf_count < range_count / 32, "{leaf_count} leaves for {range_count} ranges");
}

#[test]
fn longest_prefix_names_the_owner() {
    let allowed = table(&[
        ("172.16.0.0/12", A),
        ("172.16.8.0/21", B),
        ("172.16.8.200/32", C),
        ("172.16.9.128/25", D),
        ("fd10::/16", A),
        ("fd10:20::/32", B),
        ("fd10:20::7/128", C),
        ("fd10:20:0:0:8000::/65", D),
    ]);
    assert_owner(&allowed, "172.15.255.255", None);
    assert_owner(&allowed, "172.16.0.0", A);
    assert_owner(&allowed, "172.16.8.0", B);
    assert_owner(&allowed, "172.16.8.199", B);
    assert_owner(&allowed, "172.16.8.200", C);
    assert_owner(&allowed, "172.16.8.201", B);
    assert_owner(&allowed, "172.16.9.127", B);
    assert_owner(&allowed, "172.16.9.128", D);
    assert_owner(&allowed, "172.16.10.0", B);
    assert_owner(&allowed, "172.16.16.0", A);
    assert_owner(&allowed, "172.32.0.0", None);
    assert_owner(&allowed, "fd0f:ffff::", None);
    assert_owner(&allowed, "fd10::1", A);
    assert_owner(&allowed, "fd10:20::6", B);
    assert_owner(&allowed, "fd10:20::7", C);
    assert_owner(&allowed, "fd10:20::8", B);
    assert_owner(&allowed, "fd10:20::8000:0:0:0", D);
    assert_owner(&allowed, "fd10:20:0:1::", B);
    assert_owner(&allowed, "fd10:21::", A);
    assert_owner(&allowed, "fd11::", None);
}

#[test]
fn order_of_insertion_does_not_change_owners() {
    let prefixes = [("10.0.0.0/8", A), ("10.1.0.0/16", B), ("10.1.2.0/24", C), ("10.1.2.3/32", D)];
    let mut backwards = prefixes;
    backwards.reverse();
    for allowed in [table(&prefixes), table(&backwards)] {
        assert_owner(&allowed, "10.9.9.9", A);
        assert_owner(&allowed, "10.1.9.9", B);
        assert_owner(&allowed, "10.1.2.9", C);
        assert_owner(&allowed, "10.1.2.3", D);
    }
}

#[test]
fn default_routes_own_what_nobody_else_does() {
    let mut allowed = table(&[("10.0.0.0/8", B), ("10.0.0.1/32", C), ("fd00::/8", B)]);
    assert_owner(&allowed, "0.0.0.0", None);
    allowed.insert(net("0.0.0.0/0"), A);
    allowed.insert(net("::/0"), D);
    for (addr, owner) in [
        ("0.0.0.0", A),
        ("255.255.255.255", A),
        ("11.0.0.0", A),
        ("10.0.0.0", B),
        ("10.0.0.1", C),
        ("::", D),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", D),
        ("fc00::", D),
        ("fd00::", B),
    ] {
        assert_owner(&allowed, addr, owner);
    }
    assert!(allowed.remove(net("10.0.0.0/8"), B));
    assert_owner(&allowed, "10.0.0.0", A);
    assert_owner(&allowed, "10.0.0.1", C);
    assert!(allowed.remove(net("0.0.0.0/0"), A));
    assert!(allowed.remove(net("::/0"), D));
    assert_owner(&allowed, "11.0.0.0", None);
    assert_owner(&allowed, "10.0.0.1", C);
    assert_owner(&allowed, "ffff::", None);
}

#[test]
fn families_do_not_mix() {
    let allowed = table(&[("0.0.0.0/0", A), ("::ffff:192.0.2.0/120", B)]);
    assert_owner(&allowed, "192.0.2.1", A);
    assert_owner(&allowed, "::ffff:192.0.2.1", B);
    assert_owner(&allowed, "::ffff:192.0.3.1", None);
    assert_owner(&allowed, "::c000:201", None);
}

#[test]
fn host_bits_are_ignored() {
    let mut allowed = table(&[("198.51.100.77/27", A), ("2001:db8::dead:beef/96", A)]);
    assert_eq!(texts(&allowed, A), ["198.51.100.64/27", "2001:db8::/96"]);
    assert_owner(&allowed, "198.51.100.64", A);
    assert_owner(&allowed, "198.51.100.95", A);
    assert_owner(&allowed, "198.51.100.96", None);
    assert_eq!(allowed.insert(net("198.51.100.90/27"), B), Some(A));
    assert!(allowed.remove(net("2001:db8::1/96"), A));
    assert_eq!(texts(&allowed, A), [""; 0]);
    assert_eq!(texts(&allowed, B), ["198.51.100.64/27"]);
}

#[test]
fn prefix_moves_to_the_peer_that_got_it_last() {
    let mut allowed = table(&[("10.0.0.0/16", A), ("10.0.0.0/24", A), ("10.0.1.0/24", A)]);
    assert_eq!(allowed.insert(net("10.0.0.0/24"), B), Some(A));
    assert_owner(&allowed, "10.0.0.9", B);
    assert_owner(&allowed, "10.0.1.9", A);
    assert_eq!(texts(&allowed, A), ["10.0.0.0/16", "10.0.1.0/24"]);
    assert_eq!(texts(&allowed, B), ["10.0.0.0/24"]);
    assert_eq!(allowed.len(), 3);

    assert!(!allowed.remove(net("10.0.0.0/24"), A), "it is B's now");
    assert_owner(&allowed, "10.0.0.9", B);
    assert!(allowed.remove(net("10.0.0.0/24"), B));
    assert!(!allowed.remove(net("10.0.0.0/24"), B));
    assert_owner(&allowed, "10.0.0.9", A);
}

#[test]
fn prefixes_are_listed_in_the_order_in_which_the_peer_got_them() {
    let mut allowed = table(&[("10.3.0.0/16", A), ("fd00::/64", A), ("10.1.0.0/16", A)]);
    allowed.insert(net("10.2.0.0/16"), B);
    assert_eq!(texts(&allowed, A), ["10.3.0.0/16", "fd00::/64", "10.1.0.0/16"]);
    assert_eq!(allowed.insert(net("10.3.0.0/16"), A), Some(A));
    assert_eq!(texts(&allowed, A), ["fd00::/64", "10.1.0.0/16", "10.3.0.0/16"]);
    allowed.remove(net("10.1.0.0/16"), A);
    allowed.insert(net("10.2.0.0/16"), A);
    assert_eq!(texts(&allowed, A), ["fd00::/64", "10.3.0.0/16", "10.2.0.0/16"]);
    assert_eq!(texts(&allowed, B), [""; 0]);
}

#[test]
fn removed_peer_owns_nothing_and_its_ranges_fall_to_what_is_around() {
    let mut allowed = table(&[
        ("0.0.0.0/0", D),
        ("192.168.0.0/16", A),
        ("192.168.0.0/24", A),
        ("192.168.0.64/26", B),
        ("192.168.0.65/32", A),
        ("fd00::/48", A),
        ("fd00::/64", B),
    ]);
    allowed.remove_peer(A);
    assert_eq!(allowed.of_peer(A).count(), 0);
    assert_owner(&allowed, "192.168.0.1", D);
    assert_owner(&allowed, "192.168.0.64", B);
    assert_owner(&allowed, "192.168.0.65", B);
    assert_owner(&allowed, "fd00:0:0:1::", None);
    assert_owner(&allowed, "fd00::1", B);
    allowed.remove_peer(A);
    allowed.remove_peer(D);
    assert_owner(&allowed, "192.168.0.1", None);
    assert_owner(&allowed, "192.168.0.65", B);
    assert_eq!(allowed.len(), 2);
}

#[test]
fn single_bits_at_both_ends_of_the_space_are_told_apart() {
    let mut allowed = table(&[
        ("0.0.0.0/32", A),
        ("0.0.0.1/32", B),
        ("127.255.255.255/32", A),
        ("128.0.0.0/32", B),
        ("255.255.255.254/32", A),
        ("255.255.255.255/32", B),
        ("::/128", A),
        ("::1/128", B),
        ("7fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", A),
        ("8000::/128", B),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/128", A),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", B),
    ]);
    assert_owner(&allowed, "0.0.0.0", A);
    assert_owner(&allowed, "0.0.0.1", B);
    assert_owner(&allowed, "0.0.0.2", None);
    assert_owner(&allowed, "127.255.255.255", A);
    assert_owner(&allowed, "128.0.0.0", B);
    assert_owner(&allowed, "255.255.255.253", None);
    assert_owner(&allowed, "255.255.255.254", A);
    assert_owner(&allowed, "255.255.255.255", B);
    assert_owner(&allowed, "::", A);
    assert_owner(&allowed, "::1", B);
    assert_owner(&allowed, "::2", None);
    assert_owner(&allowed, "7fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", A);
    assert_owner(&allowed, "8000::", B);
    assert_owner(&allowed, "8000::1", None);
    assert_owner(&allowed, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe", A);
    assert_owner(&allowed, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", B);
    allowed.remove_peer(A);
    assert_owner(&allowed, "255.255.255.254", None);
    assert_owner(&allowed, "255.255.255.255", B);
    assert_owner(&allowed, "::", None);
    assert_owner(&allowed, "::1", B);
}

#[test]
fn prefixes_of_every_length_may_nest() {
    let mut allowed = AllowedIps::default();
    for len in 0..=32 {
        allowed.insert(Ipv4Net::new(Ipv4Addr::BROADCAST, len).unwrap().into(), PeerId(len.into()));
    }
    for len in 0..=128 {
        let net = Ipv6Net::new(u128::MAX.into(), len).unwrap();
        allowed.insert(net.into(), PeerId(1000 + u32::from(len)));
    }
    let table = allowed.snapshot();
    // An address that differs first in bit `len` lies in the prefixes up to that length.
    for len in 0..32u32 {
        assert_eq!(table.lookup_v4((!(1 << (31 - len))).into()), Some(PeerId(len)));
    }
    for len in 0..128u32 {
        assert_eq!(table.lookup_v6((!(1 << (127 - len))).into()), Some(PeerId(1000 + len)));
    }
    // Without the even ones, each falls to the next shorter.
    for len in (0..=128u8).step_by(2) {
        if len <= 32 {
            let net = Ipv4Net::new(Ipv4Addr::BROADCAST, len).unwrap();
            assert!(allowed.remove(net.into(), PeerId(len.into())));
        }
        let net = Ipv6Net::new(u128::MAX.into(), len).unwrap();
        assert!(allowed.remove(net.into(), PeerId(1000 + u32::from(len))));
    }
    let table = allowed.snapshot();
    assert_eq!(table.lookup_v4(0x7fff_ffff.into()), None);
    assert_eq!(table.lookup_v4(Ipv4Addr::BROADCAST), Some(PeerId(31)));
    assert_eq!(table.lookup_v4((u32::MAX - 0b10).into()), Some(PeerId(29)));
    assert_eq!(table.lookup_v6((u128::MAX - 0b10).into()), Some(PeerId(1125)));
}

#[test]
fn neighbours_of_one_peer_stay_apart() {
    // The ranges of 2001:db8::/65 and its sibling say the same; removing one must not take both.
    let mut allowed = table(&[
        ("2001:db8::/65", A),
        ("2001:db8::8000:0:0:0/65", A),
        ("10.0.0.0/25", A),
        ("10.0.0.128/25", A),
    ]);
    assert!(allowed.remove(net("2001:db8::/65"), A));
    assert!(allowed.remove(net("10.0.0.128/25"), A));
    assert_owner(&allowed, "2001:db8::7fff:ffff:ffff:ffff", None);
    assert_owner(&allowed, "2001:db8::8000:0:0:0", A);
    assert_owner(&allowed, "10.0.0.127", A);
    assert_owner(&allowed, "10.0.0.128", None);
}

#[test]
fn snapshot_does_not_change_and_shares_what_did_not() {
    let mut allowed = AllowedIps::default();
    for i in 0..40_000u32 {
        let v4 = Ipv4Net::new((0x0a00_0000 | i << 4).into(), 32).unwrap();
        allowed.insert(v4.into(), A);
        let v6 = Ipv6Net::new((0x2001_0db8 << 96 | u128::from(i) << 64).into(), 64).unwrap();
        allowed.insert(v6.into(), if i % 2 == 0 { A } else { B });
    }
    let before = allowed.snapshot();
    assert!(Arc::ptr_eq(&before, &allowed.snapshot()));
    assert_eq!(allowed.insert(net("10.0.0.0/32"), B), Some(A));
    assert_eq!(allowed.insert(net("2001:db8::/64"), B), Some(A));
    let after = allowed.snapshot();
    assert_eq!(before.lookup_v4(Ipv4Addr::new(10, 0, 0, 0)), Some(A));
    assert_eq!(after.lookup_v4(Ipv4Addr::new(10, 0, 0, 0)), Some(B));
    assert_eq!(before.lookup("2001:db8::".parse().unwrap()), Some(A));
    assert_eq!(after.lookup("2001:db8::".parse().unwrap()), Some(B));

    let (_, page_count) = after.v4.size();
    assert!(page_count > 50);
    assert_eq!(after.v4.shared_pages(&before.v4), page_count - 1);
    let (_, leaf_count) = after.v6.size();
    assert!(leaf_count > 300);
    assert_eq!(after.v6.shared_leaves(&before.v6), leaf_count - 1);
}

#[test]
fn chunks_are_given_back_and_used_again() {
    let mut allowed = table(&[("10.0.0.0/8", A)]);
    let size = |allowed: &AllowedIps| allowed.snapshot().v4.size();
    assert_eq!(size(&allowed), (0, 0));
    allowed.insert(net("10.0.0.1/32"), B);
    allowed.insert(net("10.1.0.0/24"), B);
    assert_eq!(size(&allowed), (3, 1));
    allowed.remove(net("10.0.0.1/32"), B);
    assert_eq!(size(&allowed), (1, 1));
    assert_owner(&allowed, "10.0.0.1", A);
    allowed.insert(net("10.2.3.4/30"), B);
    assert_eq!(size(&allowed), (3, 1));
    allowed.remove_peer(B);
    assert_eq!(size(&allowed), (0, 0));
    assert_owner(&allowed, "10.1.0.0", A);
}

#[test]
#[should_panic(expected = "beyond the greatest")]
fn peer_beyond_the_greatest_is_refused() {
    AllowedIps::default().insert(net("::/0"), PeerId(AllowedIps::PEER_MAX.0 + 1));
}
