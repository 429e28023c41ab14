//! Which peer of which file is which file.
//!
//! A peer is the file whose key it has. A peer whose key leads nowhere (to no file, or to one that
//! does not know us) may be meant for another: it is, if what it says besides its key is what that
//! file says of itself. Then the key is the mistake, and all else is checked as if it were right.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::super::{Finding, Rule, Severity};
use super::ends::{End, is_host};
use super::{Pair, words};
use crate::config::PeerConfig;
use crate::key::PublicKey;

/// Which peer is which file.
pub struct Links {
    /// By file: the files that it knows, and its peer for each.
    known: Vec<BTreeMap<usize, Link>>,
}

/// A peer that is a file.
#[derive(Clone, Copy)]
struct Link {
    peer: usize,
    by: By,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum By {
    /// It has the file's key.
    Key,
    /// Its key is wrong.
    Likeness,
}

impl Links {
    /// The peer of `near` that is `far`.
    pub fn peer(&self, near: usize, far: usize) -> Option<usize> {
        self.known[near].get(&far).map(|link| link.peer)
    }

    /// The files that know each other, each two once.
    pub fn pairs(&self) -> impl Iterator<Item = Pair> {
        self.known.iter().enumerate().flat_map(move |(near, known)| {
            known.range(near + 1..).filter_map(move |(&far, link)| {
                let back = self.peer(far, near)?;
                Some(Pair { near, far, peer: link.peer, back })
            })
        })
    }

    /// The pairs of a file, seen from it.
    pub fn pairs_of(&self, near: usize) -> impl Iterator<Item = Pair> {
        self.known[near].iter().filter_map(move |(&far, link)| {
            let back = self.peer(far, near)?;
            Some(Pair { near, far, peer: link.peer, back })
        })
    }

    /// The file that a peer is.
    pub fn file(&self, near: usize, peer: usize) -> Option<usize> {
        self.known[near].iter().find(|(_, link)| link.peer == peer).map(|(&far, _)| far)
    }

    /// Numbers of the groups of files that know one another, directly or by others: one a file.
    pub fn groups(&self) -> Vec<usize> {
        let mut groups: Vec<usize> = (0..self.known.len()).collect();
        for (near, known) in self.known.iter().enumerate() {
            for &far in known.keys() {
                let (a, b) = (root(&mut groups, near), root(&mut groups, far));
                groups[a.max(b)] = a.min(b);
            }
        }
        (0..groups.len()).map(|file| root(&mut groups, file)).collect()
    }

    fn is_known_by_key(&self, near: usize, far: usize) -> bool {
        self.known[near].get(&far).is_some_and(|link| link.by == By::Key)
    }
}

/// The least file of a group; shortens the way to it.
fn root(groups: &mut [usize], file: usize) -> usize {
    let mut at = file;
    while groups[at] != at {
        groups[at] = groups[groups[at]];
        at = groups[at];
    }
    at
}

/// What a peer is for the search.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Fate {
    /// Its key is of no file.
    Unknown,
    /// It is a file, or it is told of elsewhere.
    Explained,
}

/// Finds out who is who, and tells of keys that are wrong.
pub fn link(ends: &[End<'_>]) -> (Links, Vec<Finding>) {
    let mut search = Search::new(ends);
    search.copies();
    search.by_key();
    search.private_keys();
    search.by_likeness();
    search.one_sided();
    search.strangers();
    (search.links, search.findings)
}

struct Search<'a, 'b> {
    ends: &'a [End<'b>],
    /// The files of each key.
    files: HashMap<PublicKey, Vec<usize>>,
    /// By file: whether another has its key. Who is who cannot be told then.
    is_copy: Vec<bool>,
    links: Links,
    /// By file and peer.
    fates: Vec<Vec<Fate>>,
    findings: Vec<Finding>,
}

impl<'a, 'b> Search<'a, 'b> {
    fn new(ends: &'a [End<'b>]) -> Self {
        let mut files: HashMap<PublicKey, Vec<usize>> = HashMap::new();
        for end in ends {
            files.entry(end.key).or_default().push(end.file);
        }
        Self {
            ends,
            is_copy: ends.iter().map(|end| files[&end.key].len() > 1).collect(),
            files,
            links: Links { known: vec![BTreeMap::new(); ends.len()] },
            fates: ends.iter().map(|end| vec![Fate::Unknown; end.peers().len()]).collect(),
            findings: Vec::new(),
        }
    }

    /// Files with one `PrivateKey`.
    fn copies(&mut self) {
        // In the order of files, not of the map.
        let first = |end: &&End<'_>| self.files[&end.key][0] == end.file;
        for end in self.ends.iter().filter(first).filter(|end| self.is_copy[end.file]) {
            let files = &self.files[&end.key];
            // Who is looked for by another key is the one that should get that key's private half.
            let is_missed = |&&file: &&usize| self.is_missed(file);
            let wrong = files.iter().find(is_missed).or(files.last());
            let wrong = *wrong.expect("a key has files");
            let labels = files.iter().map(|&file| &self.ends[file].label);
            let mut finding = Finding::new(
                Severity::Error,
                Rule::SamePrivateKey,
                format!(
                    "{} have the same PrivateKey: others cannot tell them apart, and answer \
                     whoever spoke last",
                    words::list(labels)
                ),
            );
            let others = files.iter().copied().filter(|&file| file != wrong);
            for file in std::iter::once(wrong).chain(others) {
                let span = self.ends[file].config().interface.private_key.span;
                let label = if file == wrong { "this key" } else { "the same as here" };
                finding = finding.at(file, span, label);
            }
            self.findings.push(finding.help(format!(
                "give {} a key of its own (`tidegate genkey`), and the others its public key",
                self.ends[wrong].label
            )));
        }
    }

    /// Whether another file has a peer with exactly the addresses of `file`, and a key that is of no
    /// file.
    fn is_missed(&self, file: usize) -> bool {
        let end = &self.ends[file];
        self.ends.iter().filter(|other| other.file != file).any(|other| {
            end.addresses().any(|own| {
                other.owners.of(own.addr()).is_some_and(|owned| {
                    is_host(owned.net)
                        && !self.files.contains_key(&other.peers()[owned.peer].public_key)
                })
            })
        })
    }

    fn by_key(&mut self) {
        for end in self.ends {
            for (index, peer) in end.peers().iter().enumerate() {
                let Some(files) = self.files.get(&peer.public_key.value) else { continue };
                self.fates[end.file][index] = Fate::Explained;
                if let [far] = files[..]
                    && !self.is_copy[end.file]
                {
                    self.links.known[end.file].insert(far, Link { peer: index, by: By::Key });
                }
            }
        }
    }

    /// Peers with a file's private key where its public key belongs.
    fn private_keys(&mut self) {
        let leaked: HashMap<PublicKey, usize> = self
            .ends
            .iter()
            .filter(|end| !self.is_copy[end.file])
            .map(|end| {
                (PublicKey::from_bytes(*end.config().interface.private_key.expose()), end.file)
            })
            .collect();
        for end in self.ends.iter().filter(|end| !self.is_copy[end.file]) {
            for (index, peer) in end.peers().iter().enumerate() {
                let Some(&far) = leaked.get(&peer.public_key.value) else { continue };
                self.fates[end.file][index] = Fate::Explained;
                self.links.known[end.file]
                    .entry(far)
                    .or_insert(Link { peer: index, by: By::Likeness });
                let other = &self.ends[far];
                // No place in the file that has the key as a public one: it would be shown there.
                self.findings.push(
                    Finding::new(
                        Severity::Error,
                        Rule::PrivateKeyAsPublicKey,
                        format!(
                            "the PublicKey that {} has for {} is {1}'s PrivateKey: {1} is not \
                             found by it, and its secret is in two files",
                            end.label, other.label
                        ),
                    )
                    .at(far, other.config().interface.private_key.span, "this very key")
                    .help(format!("write `PublicKey = {}` in {}", other.key, end.label)),
                );
            }
        }
    }

    /// Peers whose key leads nowhere, but who are like a file that we should know.
    fn by_likeness(&mut self) {
        let mut by_address: HashMap<IpAddr, Vec<usize>> = HashMap::new();
        let mut by_name: HashMap<&str, usize> = HashMap::new();
        for end in self.ends {
            for own in end.addresses() {
                by_address.entry(own.addr()).or_default().push(end.file);
            }
            by_name.insert(end.subject.name, end.file);
        }
        let askers = self.askers();
        // By key and file: who has that key for it.
        let mut wrong: BTreeMap<(PublicKey, usize), Vec<(usize, usize)>> = BTreeMap::new();
        for end in self.ends.iter().filter(|end| !self.is_copy[end.file]) {
            for (peer, far) in self.likenesses(end, &by_address, &by_name, &askers[end.file]) {
                self.fates[end.file][peer] = Fate::Explained;
                if self.is_copy[far] {
                    continue;
                }
                let key = end.peers()[peer].public_key.value;
                wrong.entry((key, far)).or_default().push((end.file, peer));
            }
        }
        for ((key, far), holders) in wrong {
            for &(near, peer) in &holders {
                self.links.known[near].retain(|_, link| link.peer != peer);
                self.links.known[near].insert(far, Link { peer, by: By::Likeness });
            }
            self.findings.push(self.wrong_key(&key, far, &holders));
        }
    }

    /// By file: those that know it by key and are not known by it.
    fn askers(&self) -> Vec<Vec<usize>> {
        let mut askers = vec![Vec::new(); self.ends.len()];
        for (near, known) in self.links.known.iter().enumerate() {
            for &far in known.keys().filter(|&&far| self.links.peer(far, near).is_none()) {
                askers[far].push(near);
            }
        }
        askers
    }

    /// Peers of `end` that are like files.
    fn likenesses(
        &self,
        end: &End<'b>,
        by_address: &HashMap<IpAddr, Vec<usize>>,
        by_name: &HashMap<&str, usize>,
        askers: &[usize],
    ) -> Vec<(usize, usize)> {
        const ADDRESS: u32 = 4;
        const NAME: u32 = 2;
        const ASKS: u32 = 2;
        const ROUTED: u32 = 1;
        const ENOUGH: u32 = 4;

        let near = end.file;
        let known = &self.links.known[near];
        let files: HashMap<usize, usize> =
            known.iter().map(|(&far, link)| (link.peer, far)).collect();
        let leads_nowhere = |(index, peer): (usize, &'b PeerConfig)| {
            let far = files.get(&index).copied();
            let is_free = match far {
                Some(far) => self.links.peer(far, near).is_none() && known[&far].by == By::Key,
                None => self.fates[near][index] == Fate::Unknown,
            };
            is_free.then_some((index, far, peer))
        };
        let free: Vec<_> = end.peers().iter().enumerate().filter_map(leads_nowhere).collect();
        let is_candidate = |far: usize, peer: usize| {
            let key = &end.peers()[peer].public_key.value;
            far != near
                // Who has that very peer is somebody else than it; but for files that is known.
                && (files.contains_key(&peer)
                    || !self.ends[far].peers().iter().any(|other| other.public_key.value == *key))
                && !(self.links.peer(near, far).is_some() && self.links.peer(far, near).is_some())
                && self.ends[far].key != *key
        };
        let mut scores: BTreeMap<(usize, usize), u32> = BTreeMap::new();
        for &(index, own, peer) in &free {
            let hosts = peer.allowed_ips.iter().map(|net| net.value).filter(|&net| is_host(net));
            let hosts: Vec<IpAddr> = hosts.map(|net| net.addr()).collect();
            let is_all = |file: usize| hosts.iter().all(|&host| self.ends[file].has(host));
            if !hosts.is_empty() && own.is_some_and(is_all) {
                continue;
            }
            let files = hosts.first().and_then(|host| by_address.get(host));
            for &far in files.into_iter().flatten().filter(|&&far| is_all(far)) {
                if is_candidate(far, index) {
                    *scores.entry((index, far)).or_default() += ADDRESS;
                }
            }
            let name = words::peer_name(end.config(), peer);
            if let Some(&far) = name.and_then(|name| by_name.get(&*name))
                && is_candidate(far, index)
            {
                *scores.entry((index, far)).or_default() += NAME;
            }
        }
        let free_peers: HashSet<usize> = free.iter().map(|&(index, ..)| index).collect();
        for &far in askers {
            let owners = self.ends[far].addresses().filter_map(|own| end.owners.of(own.addr()));
            let peers: BTreeSet<usize> = owners.map(|owned| owned.peer).collect();
            for peer in peers.into_iter().filter(|peer| free_peers.contains(peer)) {
                if is_candidate(far, peer) {
                    *scores.entry((peer, far)).or_default() += ROUTED;
                }
            }
        }
        for ((_, far), score) in &mut scores {
            if askers.contains(far) {
                *score += ASKS;
            }
        }
        // One who asks, and one who is not found: they are meant for each other, unless the addresses
        // say otherwise.
        if let (&[(index, own, peer)], &[far]) = (&*free, askers)
            && own.is_none()
            && !peer.allowed_ips.iter().any(|net| is_host(net.value))
            && is_candidate(far, index)
        {
            *scores.entry((index, far)).or_default() += ENOUGH;
        }
        let mut ranked: Vec<_> = scores.into_iter().filter(|(_, score)| *score >= ENOUGH).collect();
        ranked.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        let (mut peers, mut files) = (HashSet::new(), HashSet::new());
        let best = ranked.into_iter().filter_map(|((peer, far), _)| {
            let is_new = !peers.contains(&peer) && !files.contains(&far);
            (is_new && peers.insert(peer) && files.insert(far)).then_some((peer, far))
        });
        best.collect()
    }

    fn wrong_key(&self, key: &PublicKey, far: usize, holders: &[(usize, usize)]) -> Finding {
        let end = &self.ends[far];
        let own = end.config().interface.private_key.span;
        let peer_span =
            |&(near, peer): &(usize, usize)| (near, self.ends[near].peers()[peer].public_key.span);
        let of_other = self.files.get(key).and_then(|files| files.first());
        let label = match of_other {
            Some(&other) => format!("this is the key of {}", self.ends[other].label),
            None => "this key belongs to none of the files".to_owned(),
        };
        let near = |holder: &(usize, usize)| &*self.ends[holder.0].label;
        let line = format!("`PublicKey = {}`", end.key);
        if let [holder] = holders {
            let (near, (file, span)) = (near(holder), peer_span(holder));
            return Finding::new(
                Severity::Error,
                Rule::WrongKey,
                format!(
                    "the PublicKey that {near} has for {0} does not belong to {0}'s PrivateKey: \
                     neither of them answers the other's handshakes",
                    end.label
                ),
            )
            .at(file, span, label)
            .at(far, own, format!("the key of {}", end.label))
            .help(format!("write {line} for {} in {near}", end.label));
        }
        let mut finding = Finding::new(
            Severity::Error,
            Rule::WrongKey,
            format!(
                "{} have another PublicKey for {1} than that of {1}'s PrivateKey: none of them \
                 answers its handshakes, and it none of theirs",
                words::list(holders.iter().map(near)),
                end.label
            ),
        )
        .at(far, own, "not the private half of the key that the others have");
        for (file, span) in holders.iter().map(peer_span) {
            finding = finding.at(file, span, label.clone());
        }
        finding.help(format!(
            "write the PrivateKey that belongs to {key} in {}; or, if its key is new, {line} in \
             the others",
            end.label
        ))
    }

    /// Files that know one that does not know them.
    fn one_sided(&mut self) {
        let mut findings = Vec::new();
        for near in 0..self.ends.len() {
            for (&far, link) in &self.links.known[near] {
                let is_silent = self.links.is_known_by_key(near, far)
                    && self.links.peer(far, near).is_none()
                    && !self.is_copy[far];
                if is_silent {
                    findings.push(self.ignored(near, far, link.peer));
                }
            }
        }
        self.findings.extend(findings);
    }

    fn ignored(&self, near: usize, far: usize, peer: usize) -> Finding {
        let (from, to) = (&self.ends[near], &self.ends[far]);
        let hosts = words::line(from.addresses().map(|own| IpNet::from(own.addr())));
        let allowed = hosts.filter(|hosts| !hosts.is_empty());
        let allowed =
            allowed.map_or_else(String::new, |line| format!(" and `AllowedIPs = {line}`"));
        Finding::new(
            Severity::Error,
            Rule::OneSided,
            format!(
                "{} ignores {}'s handshakes: it has no peer with {1}'s key",
                to.label, from.label
            ),
        )
        .at(
            far,
            words::interface_span(&to.subject),
            format!("no peer of this file is {}", from.label),
        )
        .at(
            near,
            from.peers()[peer].public_key.span,
            format!("{} has {} as a peer", from.label, to.label),
        )
        .help(format!("add to {} a [Peer] with `PublicKey = {}`{allowed}", to.label, from.key))
    }

    /// Peers whose files are not here, and files that meet nobody.
    fn strangers(&mut self) {
        let groups = self.links.groups();
        let mut sizes = vec![0; groups.len()];
        for &group in &groups {
            sizes[group] += 1;
        }
        let mut alone: Vec<usize> = Vec::new();
        let mut findings = Vec::new();
        for end in self.ends.iter().filter(|end| !self.is_copy[end.file]) {
            let fates = &self.fates[end.file];
            let unknown =
                || fates.iter().zip(end.peers()).filter(|(fate, _)| **fate == Fate::Unknown);
            if sizes[groups[end.file]] == 1 {
                // Whom a copy would know is not alone.
                if fates.iter().all(|&fate| fate == Fate::Unknown) {
                    alone.push(end.file);
                }
            } else if let Some((_, first)) = unknown().next() {
                let (count, all) = (unknown().count(), fates.len());
                let which = match count {
                    1 => words::peer_label(end.config(), first),
                    _ => format!("{count} of {all} peers"),
                };
                findings.push(
                    Finding::new(
                        Severity::Note,
                        Rule::UnknownPeer,
                        format!(
                            "{which} of {} {} in none of the files: whether they match is not known",
                            end.label,
                            words::number(count, "is", "are"),
                        ),
                    )
                    .at(end.file, first.public_key.span, "the key of none of these files")
                    .help("name all files of a tunnel to have all its pairs checked"),
                );
            }
        }
        self.findings.extend(findings);
        self.findings.extend(self.alone(&alone));
    }

    /// Files that meet none of the others. Where their networks are those of others it looks like a
    /// mistake, else like another tunnel.
    fn alone(&self, alone: &[usize]) -> Vec<Finding> {
        let networks = |end: &End<'_>| -> HashSet<IpNet> {
            end.addresses().map(|own| own.trunc()).filter(|&net| !is_host(net)).collect()
        };
        let mut counts: HashMap<IpNet, usize> = HashMap::new();
        for net in self.ends.iter().flat_map(networks) {
            *counts.entry(net).or_default() += 1;
        }
        let is_near =
            |&&file: &&usize| networks(&self.ends[file]).iter().any(|net| counts[net] > 1);
        let label = |file: usize| &self.ends[file].label;
        let span = |file: usize| words::interface_span(&self.ends[file].subject);
        if alone.len() == self.ends.len() {
            let is_near = alone.iter().any(|file| is_near(&file));
            let message = match alone {
                [a, b] => {
                    format!("neither {} nor {} has the other as a peer", label(*a), label(*b))
                }
                _ => {
                    let labels = words::list(alone.iter().map(|&file| label(file)));
                    format!("none of {labels} has another as a peer")
                }
            };
            let severity = if is_near { Severity::Warning } else { Severity::Note };
            let mut finding = Finding::new(severity, Rule::Stranger, message);
            for &file in alone.iter().take(2) {
                let key = format!("its public key is {}", self.ends[file].key);
                finding = finding.at(file, span(file), key);
            }
            return vec![finding.help(if is_near {
                "if they are meant to meet, give each a [Peer] with the other's public key"
            } else {
                "files of different tunnels are better checked by themselves"
            })];
        }
        let finding = |file: &usize| {
            let severity = if is_near(&file) { Severity::Warning } else { Severity::Note };
            Finding::new(
                severity,
                Rule::Stranger,
                format!("{} and the other files do not know each other", label(*file)),
            )
            .at(*file, span(*file), format!("its public key is {}", self.ends[*file].key))
            .help("give it a [Peer] in one of the others, and one for that in it")
        };
        alone.iter().map(finding).collect()
    }
}
