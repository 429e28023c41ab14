//! Each file as an end: its key, what people call it, and who owns which address there.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::super::Subject;
use super::words;
use crate::config::{Config, PeerConfig, Span, Table};
use crate::key::PublicKey;

/// A file.
pub struct End<'a> {
    /// Its place among the files.
    pub file: usize,
    /// The file itself.
    pub subject: Subject<'a>,
    /// The public key of its `PrivateKey`.
    pub key: PublicKey,
    /// What sentences call it.
    pub label: String,
    /// Who owns which address there.
    pub owners: Owners,
}

/// Reads what is asked again and again out of the files.
pub fn ends<'a>(subjects: &[Subject<'a>]) -> Vec<End<'a>> {
    let mut ends: Vec<End<'a>> = subjects
        .iter()
        .enumerate()
        .map(|(file, &subject)| End {
            file,
            subject,
            key: subject.config.interface.private_key.public_key(),
            label: subject.name.to_owned(),
            owners: Owners::new(subject.config),
        })
        .collect();
    name(&mut ends);
    ends
}

/// The others' name for it goes before the file's stem. Ends that would be called alike are called by
/// their stems, or by the whole names of their files.
fn name(ends: &mut [End<'_>]) {
    let mut names: HashMap<PublicKey, String> = HashMap::new();
    let files: HashSet<PublicKey> = ends.iter().map(|end| end.key).collect();
    for end in &*ends {
        for peer in end.peers().iter().filter(|peer| files.contains(&peer.public_key.value)) {
            if let Some(name) = words::peer_name(end.config(), peer) {
                names.entry(peer.public_key.value).or_insert(name);
            }
        }
    }
    for end in &mut *ends {
        if let Some(name) = names.get(&end.key) {
            end.label.clone_from(name);
        }
    }
    tell_apart(ends, |end| end.subject.name.to_owned());
    tell_apart(ends, |end| end.config().source().name().to_owned());
}

/// Gives another label to all that share theirs.
fn tell_apart(ends: &mut [End<'_>], label: impl Fn(&End<'_>) -> String) {
    let mut counts: HashMap<String, usize> = HashMap::new();
    for end in &*ends {
        *counts.entry(end.label.clone()).or_default() += 1;
    }
    for end in ends {
        if counts[&end.label] > 1 {
            end.label = label(end);
        }
    }
}

impl<'a> End<'a> {
    /// What the file says.
    pub const fn config(&self) -> &'a Config {
        self.subject.config
    }

    /// Its peers, in the order of the file.
    pub fn peers(&self) -> &'a [PeerConfig] {
        &self.subject.config.peers
    }

    /// Its addresses, with the networks around them.
    pub fn addresses(&self) -> impl Iterator<Item = IpNet> + Clone {
        self.config().interface.addresses.iter().map(|address| address.value)
    }

    /// Whether it has this very address.
    pub fn has(&self, address: IpAddr) -> bool {
        self.addresses().any(|own| own.addr() == address)
    }

    /// Where the file has this very address.
    pub fn address_span(&self, address: IpAddr) -> Span {
        let addresses = &self.config().interface.addresses;
        let own = addresses.iter().find(|own| own.addr() == address);
        own.map_or_else(|| words::interface_span(&self.subject), |own| own.span)
    }

    /// Whether `up` makes no routes of its allowed IPs.
    pub fn routes_nothing(&self) -> bool {
        self.config().interface.table.as_ref().is_some_and(|table| table.value == Table::Off)
    }

    /// The port on which it can be found, if it is the same at each start.
    pub fn port(&self) -> Option<u16> {
        let port = self.config().interface.listen_port.as_ref()?;
        Some(port.value).filter(|&port| port != 0)
    }

    /// The port on which others find it, which a router may forward to its own.
    pub fn outside_port(&self) -> Option<u16> {
        let endpoint = self.config().interface.endpoint.as_ref();
        endpoint
            .and_then(|endpoint| endpoint.port())
            .filter(|_| self.port().is_some())
            .or(self.port())
    }

    /// Whether it is found at a port: its own, or the one that is forwarded.
    pub fn is_found_at(&self, port: u16) -> bool {
        [self.port(), self.outside_port()].contains(&Some(port))
    }

    /// What of the allowed IPs of a peer is its own, and not of a later peer with the same prefix.
    pub fn owned_by(&self, peer: usize) -> impl Iterator<Item = IpNet> {
        let nets = self.peers()[peer].allowed_ips.iter().map(|net| net.value);
        nets.filter(move |&net| self.owners.exactly(net).is_some_and(|owned| owned.peer == peer))
    }

    /// The address from which the host sends to `net`, or to a part of it: each that it may be.
    ///
    /// That is the first address in whose network the destination lies. Else it is the first address
    /// of the family for IPv4; for IPv6 the one that has most bits in common with the destination,
    /// and nobody can tell if several have.
    pub fn sources(&self, net: IpNet) -> Vec<IpAddr> {
        let family = || self.addresses().filter(move |own| is_v4(*own) == is_v4(net));
        let mut sources: Vec<IpAddr> = Vec::new();
        for (index, own) in family().enumerate() {
            let is_first = !family().take(index).any(|other| other.trunc() == own.trunc());
            let meet = own.contains(&net) || net.contains(&own);
            if is_first && meet {
                sources.push(own.addr());
            }
        }
        let is_inside = family().any(|own| own.contains(&net));
        if !is_inside && !self.routes_nothing() {
            sources.extend(self.source_elsewhere(net, family()));
        }
        sources.sort_unstable();
        sources.dedup();
        sources
    }

    fn source_elsewhere(
        &self,
        net: IpNet,
        mut family: impl Iterator<Item = IpNet> + Clone,
    ) -> Option<IpAddr> {
        if is_v4(net) {
            return family.next().map(|own| own.addr());
        }
        let common = |own: IpNet| common_len(own.addr(), net.network());
        let most = family.clone().map(common).max()?;
        let mut nearest = family.filter(|own| common(*own) == most);
        let nearest = (nearest.next(), nearest.next());
        match nearest {
            (Some(only), None) => Some(only.addr()),
            _ => None,
        }
    }
}

/// Bits that two addresses of one family begin with.
fn common_len(a: IpAddr, b: IpAddr) -> u32 {
    match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        _ => 0,
    }
}

/// Whether it is of IPv4.
pub const fn is_v4(net: IpNet) -> bool {
    matches!(net, IpNet::V4(_))
}

/// Whether a prefix is one address.
pub fn is_host(net: IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// Who owns which address: the longest prefix, and of the same prefix at two peers the last.
pub struct Owners {
    prefixes: HashMap<IpNet, Owned>,
    /// Lengths of prefixes that there are, longest first: of IPv4, of IPv6.
    lens: [Vec<u8>; 2],
}

/// A prefix, and whose it is.
#[derive(Clone, Copy, Debug)]
pub struct Owned {
    /// Index of the peer.
    pub peer: usize,
    /// The prefix.
    pub net: IpNet,
    /// Where the peer has it.
    pub span: Span,
}

impl Owners {
    fn new(config: &Config) -> Self {
        let mut prefixes = HashMap::new();
        let mut is_used = [[false; 129]; 2];
        for (peer, of) in config.peers.iter().enumerate() {
            for net in &of.allowed_ips {
                let (net, span) = (net.value.trunc(), net.span);
                prefixes.insert(net, Owned { peer, net, span });
                is_used[usize::from(!is_v4(net))][usize::from(net.prefix_len())] = true;
            }
        }
        let longest_first = |used: [bool; 129]| {
            let lens = (0..=128u8).rev();
            lens.filter(|&len| used[usize::from(len)]).collect()
        };
        Self { prefixes, lens: is_used.map(longest_first) }
    }

    /// Whose this address is.
    pub fn of(&self, address: IpAddr) -> Option<Owned> {
        let lens = &self.lens[usize::from(address.is_ipv6())];
        lens.iter().find_map(|&len| {
            let net = IpNet::new(address, len).ok()?.trunc();
            self.prefixes.get(&net).copied()
        })
    }

    /// Whose this very prefix is.
    pub fn exactly(&self, net: IpNet) -> Option<Owned> {
        self.prefixes.get(&net.trunc()).copied()
    }
}
