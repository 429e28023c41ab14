//! `AllowedIPs`: who has which prefix. A prefix belongs to one peer, to the last that is given it;
//! of several that hold an address the longest counts.

use std::collections::HashMap;

use ipnet::IpNet;

use super::{Page, Rule, Severity, listed};
use crate::check::Finding;
use crate::config::{PeerConfig, Spanned, Table};

/// Places of a finding that are shown, for there may be thousands.
const PLACES_MAX: usize = 4;

/// A prefix of a peer.
#[derive(Clone, Copy)]
struct Given<'a> {
    peer: usize,
    prefix: &'a Spanned<IpNet>,
}

pub fn find(page: &Page<'_>) -> Vec<Finding> {
    let peers = &page.config.peers;
    let all = || {
        peers.iter().enumerate().flat_map(|(peer, config)| {
            config.allowed_ips.iter().map(move |prefix| Given { peer, prefix })
        })
    };
    let mut found: Vec<Finding> =
        peers.iter().filter(|peer| peer.allowed_ips.is_empty()).map(|p| missing(page, p)).collect();

    let mut by_prefix: HashMap<IpNet, Vec<Given<'_>>> = HashMap::new();
    for given in all() {
        by_prefix.entry(given.prefix.value).or_default().push(given);
    }
    for given in by_prefix.values() {
        found.extend(same(page, given));
    }
    // What stands in a finding already is not worth another one.
    let is_only = |given: &Given<'_>| by_prefix[&given.prefix.value].len() == 1;
    found.extend(all().filter(is_only).filter_map(|given| host_bits(page, given)));
    found.extend(overlaps(page, &by_prefix));
    found.extend(default_routes(page));
    found
}

fn missing(page: &Page<'_>, peer: &PeerConfig) -> Finding {
    let label = page.label(peer);
    let kind = (Severity::Warning, Rule::AllowedIpsMissing);
    let message =
        format!("nothing is sent to {label}, and what it sends is dropped: it has no AllowedIPs");
    page.found(kind, message, peer.public_key.span, "this peer")
        .help("write `AllowedIPs = ` and its addresses in the tunnel, such as 10.9.0.2/32")
}

/// The same prefix more than once; `given` is in the order of the file.
fn same(page: &Page<'_>, given: &[Given<'_>]) -> Option<Finding> {
    let [rest @ .., last] = given else { return None };
    let first = rest.first()?;
    let label = |given: &Given<'_>| page.label(&page.config.peers[given.peer]);
    let net = last.prefix.value;
    if rest.iter().all(|other| other.peer == last.peer) {
        let message = format!("{} is given {net} twice", label(last));
        let kind = (Severity::Note, Rule::AllowedIpsRepeated);
        return Some(
            page.found(kind, message, last.prefix.span, "again here")
                .at(page.file, first.prefix.span, "first here")
                .help("keep one of the two"),
        );
    }
    let mut losers: Vec<&Given<'_>> = Vec::new();
    for other in rest.iter().filter(|other| other.peer != last.peer) {
        if losers.last().is_none_or(|known| known.peer != other.peer) {
            losers.push(other);
        }
    }
    let names = listed(losers.iter().map(|loser| label(loser)).collect());
    let (get, send, is) =
        if losers.len() == 1 { ("gets", "it sends", "is") } else { ("get", "they send", "is") };
    let message = format!(
        "{net} belongs to {winner}, the last to which it is given: {names} {get} nothing that is \
         sent there, and what {send} from there {is} dropped",
        winner = label(last)
    );
    let kind = (Severity::Error, Rule::AllowedIpsSame);
    let mut finding = page.found(kind, message, last.prefix.span, "this one counts");
    for loser in losers.iter().take(PLACES_MAX - 1) {
        finding = finding.at(page.file, loser.prefix.span, "this one has no effect");
    }
    let hosts: Vec<String> = [losers[0], last]
        .into_iter()
        .filter_map(|given| written(page, given))
        .filter(|written| written.addr() != net.addr())
        .map(|written| format!("{}/{}", written.addr(), written.max_prefix_len()))
        .collect();
    Some(finding.help(match &hosts[..] {
        [loser, winner] => format!(
            "AllowedIPs are the addresses of one peer, not of the network: write {loser} for \
             {}, and {winner} for {}",
            label(losers[0]),
            label(last)
        ),
        _ => "take it away from all peers but one, or give each its own part of it".to_owned(),
    }))
}

/// A prefix as it stands in the file, with the bits behind it.
fn written(page: &Page<'_>, given: &Given<'_>) -> Option<IpNet> {
    let text: String = page.text(given.prefix.span).split_whitespace().collect();
    text.parse().ok()
}

fn host_bits(page: &Page<'_>, given: Given<'_>) -> Option<Finding> {
    let written = written(page, &given)?;
    let meant = given.prefix.value;
    if written == meant {
        return None;
    }
    let host = format!("{}/{}", written.addr(), written.max_prefix_len());
    let message = format!("{written} in AllowedIPs means all of {meant}");
    let kind = (Severity::Note, Rule::AllowedIpsHostBits);
    let label = "bits behind the prefix do not count";
    Some(
        page.found(kind, message, given.prefix.span, label)
            .help(format!("write {meant} for the network, or {host} for that one host")),
    )
}

/// Prefixes that lie within one of another peer, a finding for each that holds others.
fn overlaps(page: &Page<'_>, by_prefix: &HashMap<IpNet, Vec<Given<'_>>>) -> Vec<Finding> {
    // The last one has it.
    let mut owned: Vec<Given<'_>> =
        by_prefix.values().filter_map(|given| given.last().copied()).collect();
    // A prefix comes right before all that it holds.
    owned.sort_by_key(|given| {
        let net = given.prefix.value;
        (net.network(), net.prefix_len())
    });
    let mut around: Vec<Given<'_>> = Vec::new();
    let mut held: HashMap<IpNet, (Given<'_>, Vec<Given<'_>>)> = HashMap::new();
    for given in owned {
        while around.pop_if(|outer| !outer.prefix.contains(&given.prefix.value)).is_some() {}
        if let Some(outer) = around.last()
            && outer.peer != given.peer
            // Exceptions from "everything" are meant.
            && outer.prefix.prefix_len() > 0
        {
            let entry = held.entry(outer.prefix.value);
            entry.or_insert_with(|| (*outer, Vec::new())).1.push(given);
        }
        around.push(given);
    }
    let label = |given: &Given<'_>| page.label(&page.config.peers[given.peer]);
    let finding = |(outer, inner): (Given<'_>, Vec<Given<'_>>)| {
        let parts = inner.iter().take(PLACES_MAX + 1);
        let mut parts: Vec<String> =
            parts.map(|given| format!("{} ({})", given.prefix.value, label(given))).collect();
        parts.resize_with(inner.len(), String::new);
        let message = format!(
            "of {}, which {} has, some goes to others: {}",
            outer.prefix.value,
            label(&outer),
            listed(parts)
        );
        let kind = (Severity::Note, Rule::AllowedIpsOverlap);
        let mut finding = page.found(kind, message, outer.prefix.span, "the rest goes here");
        for given in inner.iter().take(PLACES_MAX - 1) {
            finding = finding.at(page.file, given.prefix.span, "the longer prefix wins");
        }
        finding
    };
    held.into_values().map(finding).collect()
}

fn default_routes(page: &Page<'_>) -> Vec<Finding> {
    let interface = &page.config.interface;
    let peers = &page.config.peers;
    let default = |is_v4: bool| {
        let all = peers.iter().flat_map(|peer| &peer.allowed_ips);
        all.into_iter().find(|net| net.prefix_len() == 0 && net.addr().is_ipv4() == is_v4)
    };
    let (v4, v6) = (default(true), default(false));
    let Some(first) = v4.or(v6) else { return Vec::new() };
    let hooks = || interface.hooks.iter().map(|hook| hook.command.as_str());
    let is_marked = interface.fwmark.as_ref().is_some_and(|mark| mark.value != 0)
        || hooks().any(|hook| hook.contains("fwmark"));
    let table = interface.table.as_ref();
    let Some(table) = table.filter(|table| table.value != Table::Auto) else {
        let Some(v4) = v4.filter(|_| v6.is_none()) else { return Vec::new() };
        return vec![
            page.found(
                (Severity::Note, Rule::DefaultRouteOfOneFamily),
                "IPv6 does not go through the tunnel: only 0.0.0.0/0 does",
                v4.span,
                "IPv4 only",
            )
            .help("write `0.0.0.0/0, ::/0` if all is meant to go through it"),
        ];
    };
    if is_marked {
        return Vec::new();
    }
    const HELP: &str = "write `FwMark = 51820`, and have rules that do not send datagrams with \
                        that mark into the tunnel; or leave `Table` out";
    let adds_default = hooks().any(|hook| {
        hook.contains("route") && ["default", "0.0.0.0/", "::/"].iter().any(|to| hook.contains(to))
    });
    let (severity, message) = match &table.value {
        Table::Off if adds_default => (
            Severity::Warning,
            "the default route of the hooks may send the tunnel's own datagrams into the tunnel",
        ),
        Table::Off => (
            Severity::Note,
            "who adds a default route must keep the tunnel's own datagrams out of it: they have \
             no mark",
        ),
        _ => (
            Severity::Warning,
            "the default route of this table sends the tunnel's own datagrams into the tunnel, if \
             a rule has them look there",
        ),
    };
    let finding = page.found(
        (severity, Rule::DefaultRouteUnmarked),
        message,
        table.span,
        "with this no mark is set, and no rules",
    );
    vec![finding.at(page.file, first.span, "everything").help(HELP)]
}

#[cfg(test)]
mod tests {
    use super::super::tests::{PEERS, file, findings, rules};
    use super::*;

    /// A file with peers that have these AllowedIPs.
    fn peers(allowed_ips: &[&str]) -> String {
        let mut text = file("", &format!("AllowedIPs = {}", allowed_ips[0]));
        for (number, allowed_ips) in allowed_ips.iter().enumerate().skip(1) {
            let key = PEERS[number];
            text += &format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {allowed_ips}\n");
        }
        text
    }

    fn of(allowed_ips: &[&str]) -> Vec<Rule> {
        findings(&peers(allowed_ips)).iter().map(|finding| finding.rule).collect()
    }

    #[test]
    fn a_prefix_has_one_owner_and_it_is_said_who() {
        let found = findings(&peers(&["10.9.0.2/24", "10.9.0.3/24", "10.9.0.4/24"]));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].severity, Severity::Error);
        let winner = format!("10.9.0.0/24 belongs to the peer {:.8}…, the last", PEERS[2]);
        assert!(found[0].message.starts_with(&winner), "{}", found[0].message);
        assert!(found[0].message.contains("laptop and the peer"), "{}", found[0].message);
        assert_eq!(found[0].places.len(), 3);
        let help = found[0].help.as_ref().unwrap();
        assert!(help.contains("10.9.0.2/32 for laptop") && help.contains("10.9.0.4/32"), "{help}");
        assert_eq!(of(&["10.9.0.2/32, 10.9.0.2/32"]), [Rule::AllowedIpsRepeated]);
        assert_eq!(of(&["0.0.0.0/0, ::/0", "0.0.0.0/0, ::/0"]), [Rule::AllowedIpsSame; 2]);
    }

    #[test]
    fn a_part_of_anothers_prefix_is_noted_once() {
        assert_eq!(of(&["10.8.0.0/16", "10.8.1.0/24, 10.8.2.0/24"]), [Rule::AllowedIpsOverlap]);
        assert_eq!(of(&["10.8.0.0/16, 10.8.1.0/24"]), []);
        assert_eq!(of(&["0.0.0.0/0, ::/0", "10.8.1.0/24"]), []);
        assert_eq!(of(&["10.8.0.0/16", "10.9.1.0/24", "fd09::/64"]), []);
        let found = findings(&peers(&["10.8.0.0/16", "10.8.0.0/24", "10.8.0.0/32"]));
        assert_eq!(found.len(), 2, "each is within the next longer one only");
    }

    #[test]
    fn bits_behind_a_prefix_are_noted() {
        assert_eq!(of(&["10.9.0.2/24"]), [Rule::AllowedIpsHostBits]);
        assert_eq!(of(&["10.9.0.2 / 32"]), []);
        assert_eq!(of(&["10.9.0.2"]), []);
        assert_eq!(of(&[""]), [Rule::AllowedIpsMissing]);
    }

    #[test]
    fn a_default_route_keeps_out_the_own_datagrams() {
        let of = |lines: &str| rules(lines, "AllowedIPs = 0.0.0.0/0, ::/0");
        assert_eq!(of(""), []);
        assert_eq!(of("Table = auto"), []);
        assert_eq!(of("Table = 100"), [Rule::DefaultRouteUnmarked]);
        assert_eq!(of("Table = 100\nFwMark = 7"), []);
        assert_eq!(of("Table = off"), [Rule::DefaultRouteUnmarked]);
        assert_eq!(of("Table = off\nPostUp = wg set %i fwmark 7"), []);
        let by_hook = "Table = off\nPostUp = ip route add default dev %i";
        let found = findings(&file(by_hook, "AllowedIPs = 0.0.0.0/0, ::/0"));
        assert_eq!(found[0].severity, Severity::Warning);
        assert_eq!(rules("", "AllowedIPs = 0.0.0.0/0"), [Rule::DefaultRouteOfOneFamily]);
    }
}
