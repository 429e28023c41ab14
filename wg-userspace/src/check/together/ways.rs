//! Whether packets get through: each end drops what comes from an address that it does not expect of
//! the sender, and sends to that address by the same table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::super::{Finding, Place, Rule, Severity};
use super::ends::{End, Owned, is_host, is_v4};
use super::keys::Links;
use super::mesh::{Shared, expected_host, in_place_of};
use super::{Pair, words};
use crate::config::PeerConfig;

/// Checks every pair, in both directions.
pub fn check(ends: &[End<'_>], links: &Links, shared: &Shared, findings: &mut Vec<Finding>) {
    let ways = Ways { ends, links };
    let mut drops = Vec::new();
    for pair in links.pairs() {
        for pair in [pair, pair.turned()] {
            drops.extend(ways.drops(pair, shared));
            findings.extend(ways.no_route(pair));
        }
    }
    for end in ends {
        findings.extend([true, false].into_iter().filter_map(|v4| ways.no_address(end, v4)));
    }
    ways.swapped(&mut drops, findings);
    ways.at_all_others(&mut drops, findings);
    ways.at_one(&drops, findings);
}

/// An address of `near` from which `far` takes nothing.
#[derive(Clone, Copy)]
struct Drop {
    pair: Pair,
    address: IpAddr,
    /// Whose it is at `far`.
    owner: Option<Owned>,
    /// What `near` sends from it, if it has other addresses for most.
    only_to: Option<IpNet>,
}

struct Ways<'a, 'b> {
    ends: &'a [End<'b>],
    links: &'a Links,
}

impl<'b> Ways<'_, 'b> {
    fn drops(&self, pair: Pair, shared: &Shared) -> Vec<Drop> {
        let (near, far) = (&self.ends[pair.near], &self.ends[pair.far]);
        let mut drops: Vec<Drop> = Vec::new();
        for own in near.addresses() {
            let address = own.addr();
            let owner = far.owners.of(address);
            let is_known = drops.iter().any(|drop| drop.address == address);
            let is_expected = owner.is_some_and(|owned| owned.peer == pair.back);
            if is_expected || is_known || shared.contains(&(pair.near, address)) {
                continue;
            }
            if let Some(only_to) = self.used(pair, own) {
                drops.push(Drop { pair, address, owner, only_to });
            }
        }
        drops
    }

    /// Whether `near` would send from an address to `far`, and if not to all of it, to what.
    fn used(&self, pair: Pair, own: IpNet) -> Option<Option<IpNet>> {
        let (near, far) = (&self.ends[pair.near], &self.ends[pair.far]);
        let is_same = |net: &IpNet| is_v4(*net) == is_v4(own);
        let routed: Vec<IpNet> = near.owned_by(pair.peer).filter(is_same).collect();
        let has_family = far.addresses().any(|theirs| is_same(&theirs));
        if routed.is_empty() && !has_family {
            return None;
        }
        let is_only = near.addresses().filter(is_same).all(|other| other.addr() == own.addr());
        let is_on_link = far.addresses().any(|theirs| own.contains(&theirs.addr()));
        if is_only || is_on_link {
            return Some(None);
        }
        let net = routed.into_iter().find(|&net| near.sources(net).contains(&own.addr()))?;
        Some(Some(net))
    }

    fn back(&self, pair: Pair) -> &'b PeerConfig {
        &self.ends[pair.far].peers()[pair.back]
    }

    /// A peer of `far`, by the file's name if it is one.
    fn label_at(&self, far: usize, peer: usize) -> String {
        match self.links.file(far, peer) {
            Some(file) => self.ends[file].label.clone(),
            None => {
                let end = &self.ends[far];
                words::peer_label(end.config(), &end.peers()[peer])
            }
        }
    }

    /// Two ends whose addresses the third has the wrong way round.
    fn swapped(&self, drops: &mut Vec<Drop>, findings: &mut Vec<Finding>) {
        let mut takers: BTreeSet<(usize, usize, usize)> = BTreeSet::new();
        for drop in &*drops {
            if let Some(owned) = drop.owner
                && let Some(taker) = self.links.file(drop.pair.far, owned.peer)
            {
                takers.insert((drop.pair.far, drop.pair.near, taker));
            }
        }
        for &(at, first, second) in &takers {
            if first > second || !takers.contains(&(at, second, first)) {
                continue;
            }
            let is_of = |drop: &Drop| {
                let ends = [first, second];
                drop.pair.far == at && ends.contains(&drop.pair.near)
            };
            let [a, b, far] = [first, second, at].map(|file| &self.ends[file]);
            let mut finding = Finding::new(
                Severity::Error,
                Rule::DroppedSource,
                format!(
                    "{0} has the AllowedIPs of {1} and {2} the wrong way round: it sends to each \
                     what is for the other, and drops what they send",
                    far.label, a.label, b.label
                ),
            );
            for drop in drops.iter().filter(|drop| is_of(drop)) {
                let label = |file: usize| &self.ends[file].label;
                if let Some(owned) = drop.owner {
                    let of = self.label_at(at, owned.peer);
                    finding = finding.at(
                        at,
                        owned.span,
                        format!("{}'s, given to {of}", label(drop.pair.near)),
                    );
                }
            }
            for drop in drops.iter().filter(|drop| is_of(drop)) {
                let end = &self.ends[drop.pair.near];
                finding = finding.at(
                    end.file,
                    end.address_span(drop.address),
                    format!("{} has it", end.label),
                );
            }
            findings.push(finding.help(format!(
                "swap the `AllowedIPs` of {} and {} in {}, or their `PublicKey`",
                a.label, b.label, far.label
            )));
            drops.retain(|drop| !is_of(drop));
        }
    }

    /// Addresses of one end that none of several others expects: it is that end that is wrong.
    fn at_all_others(&self, drops: &mut Vec<Drop>, findings: &mut Vec<Finding>) {
        let mut droppers: BTreeMap<(usize, IpAddr), BTreeSet<usize>> = BTreeMap::new();
        for drop in drops.iter().filter(|drop| drop.owner.is_none()) {
            droppers.entry((drop.pair.near, drop.address)).or_default().insert(drop.pair.far);
        }
        droppers.retain(|&(near, address), files| {
            let accepts = |pair: Pair| {
                let owner = self.ends[pair.far].owners.of(address);
                owner.is_some_and(|owned| owned.peer == pair.back)
            };
            files.len() > 1 && !self.links.pairs_of(near).any(accepts)
        });
        drops.retain(|drop| {
            drop.owner.is_some() || !droppers.contains_key(&(drop.pair.near, drop.address))
        });
        let mut by_files: BTreeMap<(usize, BTreeSet<usize>), Vec<IpAddr>> = BTreeMap::new();
        for ((near, address), files) in droppers {
            by_files.entry((near, files)).or_default().push(address);
        }
        for ((near, files), addresses) in by_files {
            findings.push(self.at_all(&self.ends[near], &files, &addresses));
        }
    }

    fn at_all(&self, near: &End<'b>, files: &BTreeSet<usize>, addresses: &[IpAddr]) -> Finding {
        let pairs: Vec<Pair> =
            self.links.pairs_of(near.file).filter(|pair| files.contains(&pair.far)).collect();
        let mut finding = Finding::new(
            Severity::Error,
            Rule::DroppedSource,
            format!(
                "{} drop what {} sends from {}: none of them has that in its AllowedIPs for {1}",
                words::list(files.iter().map(|&file| &self.ends[file].label)),
                near.label,
                words::list(addresses),
            ),
        );
        for &address in addresses {
            let label = format!("an Address of {}", near.label);
            finding = finding.at(near.file, near.address_span(address), label);
        }
        for &pair in &pairs {
            finding.places.push(self.expectation(pair, addresses));
        }
        let expected: BTreeSet<Option<IpNet>> = pairs
            .iter()
            .map(|pair| expected_host(near, &self.ends[pair.far], pair.back, addresses[0]))
            .collect();
        let one = expected.first().copied().flatten().filter(|_| expected.len() == 1);
        finding.help(match one {
            Some(net) => format!(
                "write `Address = {}` in {}, or correct the others",
                in_place_of(near, addresses[0], net.addr()),
                near.label
            ),
            None => format!(
                "add `{}` to the `AllowedIPs` that the others have for {}",
                words::list(addresses.iter().map(|&address| IpNet::from(address))),
                near.label
            ),
        })
    }

    /// What an end drops of one other.
    fn at_one(&self, drops: &[Drop], findings: &mut Vec<Finding>) {
        let mut groups: BTreeMap<(usize, usize, Option<usize>, bool), Vec<Drop>> = BTreeMap::new();
        for &drop in drops {
            let owner = drop.owner.map(|owned| owned.peer);
            let key = (drop.pair.near, drop.pair.far, owner, drop.only_to.is_some());
            groups.entry(key).or_default().push(drop);
        }
        findings.extend(groups.values().map(|drops| self.dropped(drops)));
    }

    /// `drops` are of one pair and one owner, and not empty.
    fn dropped(&self, drops: &[Drop]) -> Finding {
        let Drop { pair, owner, only_to, .. } = drops[0];
        let (near, far) = (&self.ends[pair.near], &self.ends[pair.far]);
        let back = self.back(pair);
        let addresses: Vec<IpAddr> = drops.iter().map(|drop| drop.address).collect();
        let from = words::list(&addresses);
        let drops_what = match only_to {
            None => format!("{} drops what {} sends from {from}", far.label, near.label),
            Some(net) => format!(
                "{} drops what {} sends to {net}, since that goes out from {from}",
                far.label, near.label
            ),
        };
        let have = match &*back.allowed_ips {
            [] => format!("it has no AllowedIPs for {}", near.label),
            nets => format!(
                "its AllowedIPs for {} are {}",
                near.label,
                words::list(nets.iter().map(|net| net.value))
            ),
        };
        let around = back.allowed_ips.iter().filter(|net| net.contains(&addresses[0]));
        let around = around.max_by_key(|net| net.prefix_len());
        let mut finding = Finding::new(Severity::Error, Rule::DroppedSource, String::new());
        match owner {
            None => {
                finding.message = format!("{drops_what}: {have}");
                finding.places.push(self.expectation(pair, &addresses));
                let wanted = self.wanted(pair, &addresses);
                finding = finding.help(match only_to {
                    None => wanted,
                    Some(_) => format!(
                        "{wanted}; or put the Address that {} expects first in {}",
                        far.label, near.label
                    ),
                });
            }
            Some(owned) => {
                let other = self.label_at(far.file, owned.peer);
                let theirs = Place {
                    file: far.file,
                    span: owned.span,
                    label: format!("{} gives it to {other}", far.label),
                };
                if let Some(around) = around {
                    let why = if around.value == owned.net {
                        format!("{} stands at {other} as well, and the last one wins", owned.net)
                    } else {
                        format!(
                            "it belongs to {other} there, whose {} is longer than {}'s {}",
                            owned.net, near.label, around.value
                        )
                    };
                    finding.message = format!("{drops_what}: {why}");
                    finding.places.push(theirs);
                    finding = finding.at(far.file, around.span, format!("what {} has", near.label));
                    finding = finding.help(if around.value == owned.net || is_host(owned.net) {
                        format!("remove `{}` from {other} in {}", owned.net, far.label)
                    } else {
                        self.wanted(pair, &addresses)
                    });
                } else {
                    finding.message = format!(
                        "{drops_what}: there it belongs to {other} by {}, and {have}",
                        owned.net
                    );
                    finding.places.extend([self.expectation(pair, &addresses), theirs]);
                    finding.help = Some(self.wanted(pair, &addresses).into());
                }
            }
        }
        for &address in &addresses {
            let label = format!("{} sends from here", near.label);
            finding = finding.at(near.file, near.address_span(address), label);
        }
        finding
    }

    /// What `far` expects of `near` instead of `addresses`: where it is to be changed.
    fn expectation(&self, pair: Pair, addresses: &[IpAddr]) -> Place {
        let (near, back) = (&self.ends[pair.near], self.back(pair));
        let is_same = |net: IpNet| addresses.iter().any(|own| own.is_ipv4() == is_v4(net));
        let nets = || back.allowed_ips.iter();
        let wrong =
            nets().find(|net| is_same(net.value) && is_host(net.value) && !near.has(net.addr()));
        let net = wrong.or_else(|| nets().find(|net| is_same(net.value))).or_else(|| nets().next());
        let (span, label) = match net {
            Some(net) => {
                (net.span, format!("what {} expects of {}", self.ends[pair.far].label, near.label))
            }
            None => (back.public_key.span, format!("no `AllowedIPs` for {}", near.label)),
        };
        Place { file: pair.far, span, label }
    }

    /// The line to write so that `far` takes `addresses` of `near`.
    fn wanted(&self, pair: Pair, addresses: &[IpAddr]) -> String {
        let (near, far) = (&self.ends[pair.near], &self.ends[pair.far]);
        let mut nets: Vec<IpNet> =
            self.back(pair).allowed_ips.iter().map(|net| net.value).collect();
        for &address in addresses {
            let mistaken = expected_host(near, far, pair.back, address);
            match nets.iter_mut().find(|net| mistaken == Some(**net)) {
                Some(net) => *net = address.into(),
                None => nets.push(address.into()),
            }
        }
        match words::line(nets) {
            Some(line) => {
                format!("write `AllowedIPs = {line}` for {} in {}", near.label, far.label)
            }
            None => format!(
                "add `{}` to the `AllowedIPs` for {} in {}",
                words::list(addresses.iter().map(|&address| IpNet::from(address))),
                near.label,
                far.label
            ),
        }
    }

    /// `near` makes no routes, and has no network in which `far` is.
    fn no_route(&self, pair: Pair) -> Option<Finding> {
        let (near, far) = (&self.ends[pair.near], &self.ends[pair.far]);
        let interface = &near.config().interface;
        let table = interface.table.as_ref().filter(|_| near.routes_nothing())?;
        if interface.hooks.iter().any(|hook| hook.command.contains("route")) {
            return None;
        }
        let sent = |theirs: &IpNet| {
            near.owners.of(theirs.addr()).is_some_and(|owned| owned.peer == pair.peer)
        };
        let reached = |theirs: &IpNet| near.addresses().any(|own| own.contains(&theirs.addr()));
        let theirs: Vec<IpNet> = far.addresses().filter(sent).collect();
        let lost = *theirs.first().filter(|_| !theirs.iter().any(reached))?;
        Some(
            Finding::new(
                Severity::Warning,
                Rule::NoRoute,
                format!(
                    "{0} has no route to {1} at {2}: `Table = off` makes none, and {2} lies in no \
                     network of {0}'s Address",
                    near.label,
                    far.label,
                    lost.addr()
                ),
            )
            .at(near.file, table.span, "no routes of AllowedIPs")
            .at(far.file, far.address_span(lost.addr()), format!("where {} is", far.label))
            .help(format!(
                "remove `Table = off` from {0}, add a route in its PostUp, or widen its Address",
                near.label
            )),
        )
    }

    /// `near` sends to others what it has no address of its own for, and they take none of that
    /// family from it.
    fn no_address(&self, near: &End<'b>, v4: bool) -> Option<Finding> {
        let is_of = |net: IpNet| is_v4(net) == v4;
        // Without any address the host's others are meant.
        if near.routes_nothing() || near.addresses().next().is_none() || near.addresses().any(is_of)
        {
            return None;
        }
        self.links.pairs_of(near.file).find_map(|pair| {
            if self.back(pair).allowed_ips.iter().any(|net| is_of(net.value)) {
                return None;
            }
            let net = near.owned_by(pair.peer).find(|&net| is_of(net))?;
            let allowed =
                near.peers()[pair.peer].allowed_ips.iter().find(|own| own.value == net)?;
            let family = if v4 { "IPv4" } else { "IPv6" };
            let far = &self.ends[pair.far];
            Some(
                Finding::new(
                    Severity::Warning,
                    Rule::NoAddress,
                    format!(
                        "{0} sends {net} to {1}, but has no {family} Address, and {1} takes no \
                         {family} from {0}: all of it is lost",
                        near.label, far.label
                    ),
                )
                .at(near.file, allowed.span, format!("{family} for {}", far.label))
                .at(near.file, words::interface_span(&near.subject), format!("no {family} Address"))
                .help(format!(
                    "give {} an {family} Address, and {} AllowedIPs for it; or leave it so, if \
                     {family} is to be cut off",
                    near.label, far.label
                )),
            )
        })
    }
}
