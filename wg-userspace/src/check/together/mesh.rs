//! What the files of a tunnel have in common: addresses, MTUs, networks behind them.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::super::{Finding, Rule, Severity};
use super::ends::{End, is_host, is_v4};
use super::keys::Links;
use super::words;

/// Addresses that several files have, with the files: nothing else is said of them.
pub type Shared = HashSet<(usize, IpAddr)>;

/// Checks all groups of files.
pub fn check(ends: &[End<'_>], links: &Links, findings: &mut Vec<Finding>) -> Shared {
    let groups = links.groups();
    let shared = same_addresses(ends, links, &groups, findings);
    mtus(ends, links, &groups, findings);
    networks(ends, links, findings);
    shared
}

/// Addresses that several files of a group have.
fn same_addresses(
    ends: &[End<'_>],
    links: &Links,
    groups: &[usize],
    findings: &mut Vec<Finding>,
) -> Shared {
    let mut users: BTreeMap<(usize, IpAddr), BTreeSet<usize>> = BTreeMap::new();
    for end in ends {
        for own in end.addresses() {
            users.entry((groups[end.file], own.addr())).or_default().insert(end.file);
        }
    }
    users.retain(|_, files| files.len() > 1);
    let shared =
        users.iter().flat_map(|((_, address), files)| files.iter().map(|&file| (file, *address)));
    let shared = shared.collect();
    let mut by_files: BTreeMap<BTreeSet<usize>, Vec<IpAddr>> = BTreeMap::new();
    for ((_, address), files) in users {
        by_files.entry(files).or_default().push(address);
    }
    for (files, addresses) in by_files {
        findings.push(same_address(ends, links, &files, &addresses));
    }
    shared
}

fn same_address(
    ends: &[End<'_>],
    links: &Links,
    files: &BTreeSet<usize>,
    addresses: &[IpAddr],
) -> Finding {
    // It is wrong in the file for which others have another address.
    let is_denied = |file: usize| {
        links.pairs_of(file).any(|pair| {
            let owner = ends[pair.far].owners.of(addresses[0]);
            owner.is_none_or(|owned| owned.peer != pair.back)
        })
    };
    let last = files.iter().next_back().expect("an address has users");
    let wrong = *files.iter().find(|&&file| is_denied(file)).unwrap_or(last);
    let labels = files.iter().map(|&file| &ends[file].label);
    let mut finding = Finding::new(
        Severity::Error,
        Rule::SameAddress,
        format!(
            "{} have the same Address {}: packets to {} get to one of them at most",
            words::list(labels),
            words::list(addresses),
            words::number(addresses.len(), "it", "them"),
        ),
    );
    let others = files.iter().copied().filter(|&file| file != wrong);
    for file in std::iter::once(wrong).chain(others) {
        for &address in addresses {
            let label = format!("an Address of {}", ends[file].label);
            finding = finding.at(file, ends[file].address_span(address), label);
        }
    }
    let end = &ends[wrong];
    let expected = links.pairs_of(wrong).find_map(|pair| {
        let far = &ends[pair.far];
        let place = |own: IpNet| match addresses.contains(&own.addr()) {
            true => expected_host(end, far, pair.back, own.addr())
                .map(|net| in_place_of(end, own.addr(), net.addr())),
            false => Some(own),
        };
        let all: Option<Vec<IpNet>> = end.addresses().map(place).collect();
        Some((words::line(all?)?, &far.label))
    });
    finding.help(match expected {
        Some((line, by)) => {
            format!("write `Address = {line}`, which is what {by} expects of {}", end.label)
        }
        None => format!("give {} another address, here and in the others' AllowedIPs", end.label),
    })
}

/// The only host of `address`' family that `far` expects of `end` and that it does not have.
pub fn expected_host(end: &End<'_>, far: &End<'_>, back: usize, address: IpAddr) -> Option<IpNet> {
    let nets = far.peers()[back].allowed_ips.iter().map(|net| net.value);
    let is_meant =
        |net: &IpNet| is_host(*net) && is_v4(*net) == address.is_ipv4() && !end.has(net.addr());
    let mut hosts = nets.filter(is_meant);
    hosts.next().filter(|_| hosts.next().is_none())
}

/// `address` with the prefix length that `old` has in the file.
pub fn in_place_of(end: &End<'_>, old: IpAddr, address: IpAddr) -> IpNet {
    let len = end.addresses().find(|own| own.addr() == old).map(|own| own.prefix_len());
    len.and_then(|len| IpNet::new(address, len).ok()).unwrap_or_else(|| address.into())
}

/// Files whose MTU is not that of the files that they meet.
fn mtus(ends: &[End<'_>], links: &Links, groups: &[usize], findings: &mut Vec<Finding>) {
    let mtu = |file: usize| ends[file].config().interface.mtu.as_ref();
    let mut counts: BTreeMap<usize, BTreeMap<u16, usize>> = BTreeMap::new();
    for end in ends {
        if let Some(mtu) = mtu(end.file) {
            *counts.entry(groups[end.file]).or_default().entry(mtu.value).or_default() += 1;
        }
    }
    for end in ends {
        let Some(own) = mtu(end.file) else { continue };
        let counts = &counts[&groups[end.file]];
        let most = |(mtu, count): &(&u16, &usize)| (**count, **mtu);
        let usual = counts.iter().max_by_key(most).map(|(&mtu, _)| mtu);
        if usual == Some(own.value) {
            continue;
        }
        let other = |pair: super::Pair| {
            mtu(pair.far).filter(|mtu| mtu.value != own.value).map(|mtu| (pair.far, mtu))
        };
        let Some((far, theirs)) = links.pairs_of(end.file).find_map(other) else { continue };
        findings.push(
            Finding::new(
                Severity::Warning,
                Rule::MtuDiffers,
                format!(
                    "{} has an MTU of {}, {} one of {}: packets that fit through one end may not fit \
                     through the other",
                    end.label, own.value, ends[far].label, theirs.value
                ),
            )
            .at(end.file, own.span, format!("the MTU of {}", end.label))
            .at(far, theirs.span, format!("the MTU of {}", ends[far].label))
            .help(format!(
                "write `MTU = {}` in all files, or no `MTU`",
                own.value.min(theirs.value)
            )),
        );
    }
}

/// Networks that some reach by one end, others by another.
fn networks(ends: &[End<'_>], links: &Links, findings: &mut Vec<Finding>) {
    // By network: who sends it to whom.
    let mut ways: BTreeMap<IpNet, Vec<(usize, usize)>> = BTreeMap::new();
    for pair in (0..ends.len()).flat_map(|file| links.pairs_of(file)) {
        for net in ends[pair.near].owned_by(pair.peer) {
            let is_tunnel = |end: &End<'_>| {
                end.addresses().any(|own| own.contains(&net) || net.contains(&own.addr()))
            };
            if !is_host(net) && !is_tunnel(&ends[pair.near]) && !is_tunnel(&ends[pair.far]) {
                ways.entry(net).or_default().push((pair.near, pair.far));
            }
        }
    }
    for (net, ways) in ways {
        // Who sends it on is not its end.
        let senders: HashSet<usize> = ways.iter().map(|&(near, _)| near).collect();
        let ways: Vec<_> = ways.into_iter().filter(|(_, far)| !senders.contains(far)).collect();
        let by: BTreeSet<usize> = ways.iter().map(|&(_, far)| far).collect();
        if by.len() < 2 {
            continue;
        }
        let says =
            |&(near, far): &(usize, usize)| format!("{} by {}", ends[near].label, ends[far].label);
        let mut finding = Finding::new(
            Severity::Note,
            Rule::NetworkAtTwoEnds,
            format!("{net} is reached at two ends: {}", words::list(ways.iter().map(says))),
        );
        for &(near, far) in &ways {
            let Some(peer) = links.peer(near, far) else { continue };
            let allowed = ends[near].peers()[peer].allowed_ips.iter().find(|own| own.value == net);
            if let Some(allowed) = allowed {
                let label = format!("{} sends it to {}", ends[near].label, ends[far].label);
                finding = finding.at(near, allowed.span, label);
            }
        }
        findings.push(finding.help("nothing, if the network is at both; else correct one of them"));
    }
}
