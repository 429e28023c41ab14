//! What is found, compared with what packets do in a slow and obvious model of two ends.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::check::{Rule, Severity};
use crate::config::{Config, parse};
use crate::key::{PrivateKey, PublicKey};

#[derive(Clone, Debug)]
struct Sketch {
    key: u8,
    addresses: Vec<IpNet>,
    port: Option<u16>,
    /// What a router forwards to `port`, by `#! Endpoint`.
    forwarded: Option<u16>,
    peers: Vec<PeerSketch>,
}

#[derive(Clone, Debug)]
struct PeerSketch {
    key: u8,
    psk: Option<u8>,
    allowed: Vec<IpNet>,
    endpoint: Option<(u8, u16)>,
}

fn private(key: u8) -> PrivateKey {
    PrivateKey::from_bytes([8 * (key + 1); 32])
}

fn public(key: u8) -> PublicKey {
    private(key).public_key()
}

const PORT: u16 = 51820;

fn v4(host: u8) -> IpAddr {
    Ipv4Addr::new(10, 9, 0, host).into()
}

fn v6(host: u8) -> IpAddr {
    Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, host.into()).into()
}

/// A mesh in which all matches. `families` says for each end whether it has IPv6 as well.
fn matching(families: &[bool], servers: &[bool]) -> Vec<Sketch> {
    let own = |file: usize| u8::try_from(file + 1).unwrap();
    let end = |file: usize| {
        let mut addresses = vec![IpNet::new_assert(v4(own(file)), 28)];
        if families[file] {
            addresses.push(IpNet::new_assert(v6(own(file)), 124));
        }
        let is_server = |file: usize| file == 0 || servers[file];
        let others = (0..families.len()).filter(|&other| other != file);
        let peer = |other: usize| {
            let mut allowed = vec![IpNet::from(v4(own(other)))];
            if families[other] && families[file] {
                allowed.push(IpNet::from(v6(own(other))));
            }
            let endpoint = is_server(other).then_some((own(other), PORT));
            PeerSketch { key: own(other), psk: None, allowed, endpoint }
        };
        // Two that can only be found by others do not know each other.
        let peers = others.filter(|&other| is_server(file) || is_server(other)).map(peer).collect();
        let port = is_server(file).then_some(PORT);
        Sketch { key: own(file), addresses, port, forwarded: None, peers }
    };
    (0..families.len()).map(end).collect()
}

/// A way to spoil a file.
#[derive(Clone, Debug)]
enum Mutation {
    Key(u8),
    Address(Index, u8),
    MoreAddress(u8),
    LessAddress(Index),
    Port(Option<u16>),
    Forwarded(u16),
    PeerKey(Index, u8),
    Psk(Index, u8),
    Allowed(Index, Index, u8),
    MoreAllowed(Index, IpNet),
    LessAllowed(Index, Index),
    Endpoint(Index, Option<u16>),
    LessPeer(Index),
    PeersTurned,
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<Index>;
    let host = || 1..6u8;
    let net = prop_oneof![
        host().prop_map(|host| IpNet::from(v4(host))),
        host().prop_map(|host| IpNet::from(v6(host))),
        Just("10.9.0.0/28".parse().unwrap()),
        Just("0.0.0.0/0".parse().unwrap()),
        Just("::/0".parse().unwrap()),
        Just("192.168.7.0/24".parse().unwrap()),
        Just("fd20::/64".parse().unwrap()),
    ];
    prop_oneof![
        1 => host().prop_map(Mutation::Key),
        2 => (at(), host()).prop_map(|(at, host)| Mutation::Address(at, host)),
        2 => host().prop_map(Mutation::MoreAddress),
        1 => at().prop_map(Mutation::LessAddress),
        1 => prop_oneof![Just(None), Just(Some(0)), Just(Some(7)), Just(Some(PORT))].prop_map(Mutation::Port),
        1 => prop_oneof![Just(7), Just(8), Just(PORT)].prop_map(Mutation::Forwarded),
        1 => (at(), host()).prop_map(|(at, host)| Mutation::PeerKey(at, host)),
        1 => (at(), 0..3u8).prop_map(|(at, psk)| Mutation::Psk(at, psk)),
        2 => (at(), at(), host()).prop_map(|(at, net, host)| Mutation::Allowed(at, net, host)),
        3 => (at(), net).prop_map(|(at, net)| Mutation::MoreAllowed(at, net)),
        1 => (at(), at()).prop_map(|(at, net)| Mutation::LessAllowed(at, net)),
        1 => (at(), prop_oneof![Just(None), Just(Some(7)), Just(Some(PORT))])
            .prop_map(|(at, port)| Mutation::Endpoint(at, port)),
        1 => at().prop_map(Mutation::LessPeer),
        1 => Just(Mutation::PeersTurned),
    ]
}

fn spoil(end: &mut Sketch, mutation: &Mutation) {
    let peer =
        |peers: &mut Vec<PeerSketch>, at: Index| (!peers.is_empty()).then(|| at.index(peers.len()));
    let host_like = |net: IpNet, host: u8| {
        let address = if net.addr().is_ipv4() { v4(host) } else { v6(host) };
        IpNet::new_assert(address, net.prefix_len()).trunc()
    };
    match *mutation {
        Mutation::Key(key) => end.key = key,
        Mutation::Address(at, host) if !end.addresses.is_empty() => {
            let address = at.index(end.addresses.len());
            let old = end.addresses[address];
            let new = if old.addr().is_ipv4() { v4(host) } else { v6(host) };
            end.addresses[address] = IpNet::new_assert(new, old.prefix_len());
        }
        // In another network: only what is routed may go out from it.
        Mutation::MoreAddress(host) => {
            end.addresses.insert(0, IpNet::new_assert(Ipv4Addr::new(10, 8, 0, host).into(), 28));
            end.addresses.dedup_by_key(|net| net.addr());
        }
        Mutation::LessAddress(at) if !end.addresses.is_empty() => {
            end.addresses.remove(at.index(end.addresses.len()));
        }
        Mutation::Port(port) => end.port = port,
        Mutation::Forwarded(port) => end.forwarded = Some(port),
        Mutation::PeersTurned => end.peers.reverse(),
        Mutation::LessPeer(at) => {
            if let Some(at) = peer(&mut end.peers, at) {
                end.peers.remove(at);
            }
        }
        Mutation::PeerKey(at, key) => {
            if let Some(at) = peer(&mut end.peers, at) {
                end.peers[at].key = key;
            }
        }
        Mutation::Psk(at, psk) => {
            if let Some(at) = peer(&mut end.peers, at) {
                end.peers[at].psk = (psk > 0).then_some(psk);
            }
        }
        Mutation::Endpoint(at, port) => {
            if let Some(at) = peer(&mut end.peers, at) {
                end.peers[at].endpoint = port.map(|port| (end.peers[at].key, port));
            }
        }
        Mutation::MoreAllowed(at, net) => {
            if let Some(at) = peer(&mut end.peers, at) {
                end.peers[at].allowed.push(net);
            }
        }
        Mutation::Allowed(at, net, host) => {
            if let Some(at) = peer(&mut end.peers, at)
                && !end.peers[at].allowed.is_empty()
            {
                let nets = &mut end.peers[at].allowed;
                let net = net.index(nets.len());
                nets[net] = host_like(nets[net], host);
            }
        }
        Mutation::LessAllowed(at, net) => {
            if let Some(at) = peer(&mut end.peers, at)
                && !end.peers[at].allowed.is_empty()
            {
                let nets = &mut end.peers[at].allowed;
                nets.remove(net.index(nets.len()));
            }
        }
        Mutation::Address(..) | Mutation::LessAddress(_) => {}
    }
}

fn text(end: &Sketch) -> String {
    let list = |nets: &[IpNet]| nets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
    let mut text = format!(
        "[Interface]\nPrivateKey = {}\nAddress = {}\n",
        *private(end.key).to_base64(),
        list(&end.addresses)
    );
    if let Some(port) = end.port {
        writeln!(text, "ListenPort = {port}").unwrap();
    }
    if let Some(port) = end.forwarded {
        writeln!(text, "#! Endpoint = gw.example.org:{port}").unwrap();
    }
    for peer in &end.peers {
        writeln!(text, "[Peer]\nPublicKey = {}", public(peer.key)).unwrap();
        writeln!(text, "AllowedIPs = {}", list(&peer.allowed)).unwrap();
        if let Some(psk) = peer.psk {
            let key = crate::key::PresharedKey::from_bytes([psk; 32]);
            writeln!(text, "PresharedKey = {}", *key.to_base64()).unwrap();
        }
        if let Some((host, port)) = peer.endpoint {
            writeln!(text, "Endpoint = 198.51.100.{host}:{port}").unwrap();
        }
    }
    text
}

impl Sketch {
    /// Whose an address is, by trying all prefixes.
    fn owner(&self, address: IpAddr) -> Option<usize> {
        let nets = self.peers.iter().enumerate();
        let nets = nets.flat_map(|(peer, of)| of.allowed.iter().map(move |net| (peer, *net)));
        let around = nets.filter(|(_, net)| net.contains(&address));
        around.max_by_key(|(_, net)| net.prefix_len()).map(|(peer, _)| peer)
    }

    fn peer(&self, key: u8) -> Option<usize> {
        self.peers.iter().position(|peer| peer.key == key)
    }

    /// The address from which the host sends to another.
    fn source(&self, to: IpAddr) -> Option<IpAddr> {
        let family = || self.addresses.iter().filter(|own| own.addr().is_ipv4() == to.is_ipv4());
        let on_link = family().filter(|own| own.contains(&to)).max_by_key(|own| own.prefix_len());
        on_link.or_else(|| family().next()).map(|own| own.addr())
    }
}

/// Addresses that any file may speak of.
fn universe() -> Vec<IpAddr> {
    let hosts = (0..16).flat_map(|host| [v4(host), v6(host), Ipv4Addr::new(10, 8, 0, host).into()]);
    let outside = ["192.0.2.1", "192.168.7.1", "2001:db8::1", "fd20::1"];
    hosts.chain(outside.map(|text| text.parse().unwrap())).collect()
}

/// Whether all that `a` may send to `b` is accepted there, and gets to no other.
fn accepts(a: &Sketch, peer: usize, b: &Sketch, back: usize) -> bool {
    let is_sent = |to: IpAddr| a.owner(to) == Some(peer);
    let sent = universe().into_iter().filter(|&to| is_sent(to)).all(|to| {
        // Without an address of the family it is another's, which is a warning.
        a.source(to).is_none_or(|from| b.owner(from) == Some(back))
    });
    // Each can reach the other's address in a common network, and the only one of a family.
    let meets = |own: &IpNet, other: &Sketch| {
        other.addresses.iter().any(|theirs| own.contains(&theirs.addr()))
    };
    let is_same = |x: &IpNet, y: &IpNet| x.addr().is_ipv4() == y.addr().is_ipv4();
    let is_only =
        |own: &IpNet, of: &Sketch| of.addresses.iter().filter(|net| is_same(net, own)).count() == 1;
    let addressed = a.addresses.iter().all(|own| {
        let has_family = b.addresses.iter().any(|theirs| is_same(theirs, own));
        let is_meant = meets(own, b) || (is_only(own, a) && has_family);
        !is_meant || b.owner(own.addr()) == Some(back)
    });
    sent && addressed
}

/// Whether packets get through in both directions, whoever begins.
fn delivered(ends: &[Sketch], a: usize, b: usize) -> bool {
    let is_copy = |file: usize| ends.iter().filter(|end| end.key == ends[file].key).count() > 1;
    if is_copy(a) || is_copy(b) {
        return false;
    }
    let (near, far) = (&ends[a], &ends[b]);
    let (Some(peer), Some(back)) = (near.peer(far.key), far.peer(near.key)) else { return false };
    let (peer_of, back_of) = (&near.peers[peer], &far.peers[back]);
    let finds = |endpoint: Option<(u8, u16)>, end: &Sketch| {
        let listens = end.port.is_some_and(|port| port != 0);
        endpoint
            .is_none_or(|(_, asked)| listens && [end.port, end.forwarded].contains(&Some(asked)))
    };
    peer_of.psk == back_of.psk
        && (peer_of.endpoint.is_some() || back_of.endpoint.is_some())
        && finds(peer_of.endpoint, far)
        && finds(back_of.endpoint, near)
        && accepts(near, peer, far, back)
        && accepts(far, back, near, peer)
}

/// Whether a finding says that two files do not meet.
fn is_about(finding: &Finding, a: usize, b: usize) -> bool {
    let has = |file| finding.places.iter().any(|place| place.file == file);
    match finding.rule {
        // These are of one end, and so of all its pairs.
        Rule::SamePrivateKey | Rule::SameAddress => has(a) || has(b),
        // The first place is in one of the two; several others may disagree with that one.
        _ => has(a) && has(b) && [a, b].contains(&finding.places[0].file),
    }
}

fn check(ends: &[Sketch]) -> Option<Vec<Finding>> {
    let texts: Vec<String> = ends.iter().map(text).collect();
    let configs: Option<Vec<Config>> =
        texts.iter().map(|text| parse("end.conf", text).ok()).collect();
    let configs = configs?;
    let names = ["a", "b", "c", "d"];
    let subjects = configs.iter().zip(names).map(|(config, name)| Subject { name, config });
    Some(together(&subjects.collect::<Vec<_>>()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn an_error_is_found_exactly_where_packets_are_lost(
        families in vec(any::<bool>(), 4),
        servers in vec(any::<bool>(), 4),
        count in 2..5usize,
        mutations in vec((any::<Index>(), mutation()), 0..4),
    ) {
        let mut ends = matching(&families[..count], &servers[..count]);
        for (file, mutation) in &mutations {
            let file = file.index(count);
            spoil(&mut ends[file], mutation);
        }
        // What is no file by itself is none of ours.
        let findings = check(&ends);
        prop_assume!(findings.is_some());
        let findings = findings.unwrap_or_default();
        if mutations.is_empty() {
            prop_assert!(findings.is_empty(), "{:#?}", findings);
        }
        for a in 0..count {
            for b in a + 1..count {
                let knows = |a: usize, b: usize| ends[a].peer(ends[b].key).is_some();
                if !knows(a, b) && !knows(b, a) {
                    continue;
                }
                let mut errors = findings.iter().filter(|finding| finding.severity == Severity::Error);
                let texts = || ends.iter().map(text).collect::<Vec<_>>().join("\n");
                if delivered(&ends, a, b) {
                    // An address that two have is wrong even if this pair's packets get through.
                    let error = errors.find(|finding| {
                        finding.rule != Rule::SameAddress && is_about(finding, a, b)
                    });
                    prop_assert!(error.is_none(), "{a} and {b}: {error:#?}\n{}", texts());
                } else {
                    // A peer with the key of a third is found as the wrong key of who is meant.
                    let is_known = errors.any(|finding| {
                        let has = |file| finding.places.iter().any(|place| place.file == file);
                        let is_key = finding.rule == Rule::WrongKey && (has(a) || has(b));
                        is_key || is_about(finding, a, b)
                    });
                    prop_assert!(is_known, "{a} and {b}: nothing found\n{}", texts());
                }
            }
        }
    }
}
