//! Whether two files that know each other get as far as a session: preshared keys, and how one finds
//! the other.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::super::{Finding, Rule, Severity};
use super::ends::{End, is_host};
use super::keys::Links;
use super::{Pair, words};
use crate::config::{Endpoint, PeerConfig, Span, Spanned};

/// Checks every pair.
pub fn check(ends: &[End<'_>], links: &Links, findings: &mut Vec<Finding>) {
    for pair in links.pairs() {
        let meeting = Meeting::new(ends, pair);
        findings.extend(meeting.preshared_key());
        findings.extend(meeting.start());
    }
    for end in ends {
        findings.extend(ports(ends, links, end));
        findings.extend(hosts(ends, links, end));
    }
    findings.extend(same_endpoints(ends, links));
}

struct Meeting<'a, 'b> {
    pair: Pair,
    near: &'a End<'b>,
    far: &'a End<'b>,
    /// What `near` says of `far`.
    peer: &'b PeerConfig,
    /// What `far` says of `near`.
    back: &'b PeerConfig,
}

impl<'a, 'b> Meeting<'a, 'b> {
    fn new(ends: &'a [End<'b>], pair: Pair) -> Self {
        let (near, far) = (&ends[pair.near], &ends[pair.far]);
        let (peer, back) = (&near.peers()[pair.peer], &far.peers()[pair.back]);
        Self { pair, near, far, peer, back }
    }

    fn turned(&self) -> Self {
        let (near, far) = (self.far, self.near);
        Self { pair: self.pair.turned(), near, far, peer: self.back, back: self.peer }
    }

    fn preshared_key(&self) -> Option<Finding> {
        let of = |peer: &'b PeerConfig| peer.preshared_key.as_ref().filter(|key| !key.is_zero());
        let (near, far) = (&self.near.label, &self.far.label);
        let new = |message| Finding::new(Severity::Error, Rule::PresharedKeys, message);
        match (of(self.peer), of(self.back)) {
            (Some(here), Some(there)) if here.value != there.value => Some(
                new(format!(
                    "{near} and {far} have different preshared keys for each other: none of their \
                     handshakes succeeds"
                ))
                .at(self.pair.far, there.span, format!("{far}'s for {near}"))
                .at(self.pair.near, here.span, format!("{near}'s for {far}"))
                .help("write the same `PresharedKey` line into both files"),
            ),
            (Some(key), None) => Some(
                new(format!(
                    "{near} has a preshared key for {far}, but {far} has none for {near}: none of \
                     their handshakes succeeds"
                ))
                .at(self.pair.far, self.back.public_key.span, "no `PresharedKey` for this peer")
                .at(self.pair.near, key.span, format!("{near}'s for {far}"))
                .help(format!(
                    "copy the `PresharedKey` line of {near} to {far}, or remove it from both"
                )),
            ),
            (None, Some(_)) => self.turned().preshared_key(),
            _ => None,
        }
    }

    fn start(&self) -> Option<Finding> {
        match (&self.peer.endpoint, &self.back.endpoint) {
            // Who has a port that does not change can be looked for.
            (None, None) if self.far.port().is_none() && self.near.port().is_some() => {
                self.turned().start()
            }
            (None, None) => Some(self.nobody_starts()),
            (None, Some(_)) => self.turned().start(),
            (Some(_), None) => self.sleeps(),
            (Some(_), Some(_)) => None,
        }
    }

    fn nobody_starts(&self) -> Finding {
        let (near, far) = (&self.near.label, &self.far.label);
        let help = match (&self.far.config().interface.endpoint, self.far.port()) {
            (Some(known), Some(port)) => {
                let place = known.endpoint(port);
                format!(
                    "write `Endpoint = {place}` for {far} in {near}, as `#! Endpoint` of {far} says"
                )
            }
            (_, port) => {
                let port = port.map_or_else(|| "port".to_owned(), |port| port.to_string());
                format!(
                    "write `Endpoint = host:{port}` for {far} in {near}, with the host at which \
                     {far} can be reached"
                )
            }
        };
        Finding::new(
            Severity::Error,
            Rule::NobodyStarts,
            format!(
                "neither {near} nor {far} has an Endpoint for the other: no handshake can begin"
            ),
        )
        .at(self.pair.near, self.peer.public_key.span, format!("no `Endpoint` for {far}"))
        .at(self.pair.far, self.back.public_key.span, format!("no `Endpoint` for {near}"))
        .help(help)
    }

    /// Only `near` can start, and `far` may have something to send before it does: for a network that
    /// lies behind `near`.
    fn sleeps(&self) -> Option<Finding> {
        let keeps_alive = self.peer.persistent_keepalive.as_ref().is_some_and(|at| at.value != 0);
        let is_behind = |net: &&Spanned<IpNet>| {
            !is_host(net.value) && !self.near.addresses().any(|own| own.contains(&net.value))
        };
        let behind = self.back.allowed_ips.iter().find(is_behind)?;
        let endpoint = self.peer.endpoint.as_ref()?;
        let (near, far) = (&self.near.label, &self.far.label);
        (!keeps_alive).then(|| {
            Finding::new(
                Severity::Note,
                Rule::NoKeepalive,
                format!(
                    "{far} cannot send to {} behind {near} until {near} has sent something: only \
                     {near} has an Endpoint for the other, and it has no PersistentKeepalive",
                    behind.value
                ),
            )
            .at(self.pair.near, endpoint.span, "the only one of the two that can start")
            .at(self.pair.far, behind.span, format!("{far} sends this to {near}"))
            .help(format!("write `PersistentKeepalive = 25` for {far} in {near}"))
        })
    }
}

/// Who looks for an end, and where.
type Seeker<'a, 'b> = (&'a End<'b>, &'b Spanned<Endpoint>);

fn seekers<'a, 'b>(ends: &'a [End<'b>], links: &Links, end: &End<'b>) -> Vec<Seeker<'a, 'b>> {
    let seeker = |pair: Pair| {
        let seeker = &ends[pair.far];
        Some((seeker, seeker.peers()[pair.back].endpoint.as_ref()?))
    };
    links.pairs_of(end.file).filter_map(seeker).collect()
}

/// The port at which others look for `end`, and the one at which it listens.
fn ports<'b>(ends: &[End<'b>], links: &Links, end: &End<'b>) -> Vec<Finding> {
    let seekers = seekers(ends, links, end);
    let Some((_, first)) = seekers.first() else { return Vec::new() };
    let listen_port = end.config().interface.listen_port.as_ref();
    let Some((listen_port, port)) = listen_port.zip(end.port()) else {
        return vec![no_listen_port(end, &seekers, first.port())];
    };
    let is_wrong = |seeker: &Seeker<'_, '_>| !end.is_found_at(seeker.1.port());
    let wrong: Vec<Seeker<'_, '_>> = seekers.iter().copied().filter(is_wrong).collect();
    let asked = first.port();
    let is_one = wrong.len() > 1
        && wrong.len() == seekers.len()
        && wrong.iter().all(|(_, endpoint)| endpoint.port() == asked);
    if is_one {
        // All others agree: it is this file that is wrong.
        let finding = wrong_port(end, &wrong, port)
            .at(end.file, listen_port.span, "not the port of the others' Endpoint")
            .help(format!("write `ListenPort = {asked}` in {}", end.label));
        return vec![looked_for(finding, &wrong)];
    }
    let finding = |seeker: &Seeker<'_, '_>| {
        let (near, endpoint) = *seeker;
        looked_for(wrong_port(end, &[*seeker], port), &[*seeker])
            .at(end.file, listen_port.span, format!("{} listens here", end.label))
            .help(format!(
                "write `Endpoint = {}` in {}, unless a router on the way turns port {} into {port}",
                with_port(near, endpoint.span, end.outside_port().unwrap_or(port)),
                near.label,
                endpoint.port(),
            ))
    };
    wrong.iter().map(finding).collect()
}

/// The host at which others look for `end`, and the one at which it says that it is found.
fn hosts<'b>(ends: &[End<'b>], links: &Links, end: &End<'b>) -> Vec<Finding> {
    let Some((said, port)) = end.config().interface.endpoint.as_ref().zip(end.port()) else {
        return Vec::new();
    };
    let place = said.endpoint(port);
    let finding = |(near, endpoint): &Seeker<'_, '_>| {
        Finding::new(
            Severity::Warning,
            Rule::EndpointHost,
            format!(
                "{0} looks for {2} at {1}, but {2} says that it is found at {3}",
                near.label,
                host_of(endpoint),
                end.label,
                host_of(&place),
            ),
        )
        .at(near.file, endpoint.span, format!("{} looks here", near.label))
        .at(end.file, said.span, format!("{} is found here", end.label))
        .help(format!(
            "write `Endpoint = {place}` in {}, unless it has another way to {}",
            near.label, end.label
        ))
    };
    let seekers = seekers(ends, links, end);
    let lost = seekers.iter().filter(|(_, endpoint)| are_of_two_hosts(endpoint, &place));
    lost.map(finding).collect()
}

/// Whether two endpoints are not of one host, as far as can be told without asking anybody: a name may
/// lead to each address, a host may have one of each family, and one of a site besides a public one.
fn are_of_two_hosts(one: &Endpoint, other: &Endpoint) -> bool {
    let is_of_site = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.is_private() || v4.is_link_local() || v4.is_loopback(),
        IpAddr::V6(v6) => v6.is_unique_local() || v6.is_unicast_link_local() || v6.is_loopback(),
    };
    match (one, other) {
        (Endpoint::Address(one), Endpoint::Address(other)) => {
            one.is_ipv4() == other.is_ipv4()
                && is_of_site(one.ip()) == is_of_site(other.ip())
                && one.ip() != other.ip()
        }
        (Endpoint::Host { host: one, .. }, Endpoint::Host { host: other, .. }) => {
            // A colon is of an address with a scope, which is another one on each host.
            !one.contains(':') && !other.contains(':') && !one.eq_ignore_ascii_case(other)
        }
        _ => false,
    }
}

fn host_of(endpoint: &Endpoint) -> String {
    match endpoint {
        Endpoint::Address(address) => address.ip().to_string(),
        Endpoint::Host { host, .. } => host.clone(),
    }
}

fn no_listen_port(end: &End<'_>, seekers: &[Seeker<'_, '_>], asked: u16) -> Finding {
    let (span, label) = match &end.config().interface.listen_port {
        Some(zero) => (zero.span, "0 is any free port"),
        None => (words::interface_span(&end.subject), "no `ListenPort` here"),
    };
    let finding = Finding::new(
        Severity::Error,
        Rule::NoListenPort,
        format!(
            "{0} has no ListenPort, so its port is another at each start: the Endpoint that {1} {2} \
             for {0} leads nowhere",
            end.label,
            words::list(seekers.iter().map(|(seeker, _)| &seeker.label)),
            words::number(seekers.len(), "has", "have"),
        ),
    )
    .at(end.file, span, label)
    .help(format!("write `ListenPort = {asked}` in {}", end.label));
    looked_for(finding, seekers)
}

/// `seekers` look at one port, which is not `port`.
fn wrong_port(end: &End<'_>, seekers: &[Seeker<'_, '_>], port: u16) -> Finding {
    let asked = seekers.first().map_or(0, |(_, endpoint)| endpoint.port());
    Finding::new(
        Severity::Error,
        Rule::EndpointPort,
        format!(
            "{} {} for {} at port {asked}, but {2} listens on port {port}",
            words::list(seekers.iter().map(|(seeker, _)| &seeker.label)),
            words::number(seekers.len(), "looks", "look"),
            end.label,
        ),
    )
}

fn looked_for(mut finding: Finding, seekers: &[Seeker<'_, '_>]) -> Finding {
    for (seeker, endpoint) in seekers {
        finding = finding.at(seeker.file, endpoint.span, format!("{} looks here", seeker.label));
    }
    finding
}

/// The endpoint that stands at `span`, with another port.
fn with_port(end: &End<'_>, span: Span, port: u16) -> String {
    let shown = words::shown(end.config(), span);
    let host = shown.rsplit_once(':').map_or(&*shown, |(host, _)| host);
    format!("{host}:{port}")
}

/// An endpoint as it can be compared: names have no case.
fn place_of(endpoint: &Endpoint) -> String {
    match endpoint {
        Endpoint::Address(address) => address.to_string(),
        Endpoint::Host { host, port } => format!("{}:{port}", host.to_ascii_lowercase()),
    }
}

/// Two files that are looked for at the same place.
fn same_endpoints(ends: &[End<'_>], links: &Links) -> Vec<Finding> {
    // By place and who is looked for there: by which peers.
    type Seekers = Vec<(usize, usize)>;
    let mut places: BTreeMap<String, BTreeMap<usize, Seekers>> = BTreeMap::new();
    for pair in (0..ends.len()).flat_map(|file| links.pairs_of(file)) {
        // Who looks at a port at which nobody listens is told so.
        if let Some(endpoint) = &ends[pair.near].peers()[pair.peer].endpoint
            && ends[pair.far].is_found_at(endpoint.port())
        {
            let sought = places.entry(place_of(endpoint)).or_default();
            sought.entry(pair.far).or_default().push((pair.near, pair.peer));
        }
    }
    let mut findings = Vec::new();
    for sought in places.values() {
        // Whom most look for there is there; of two, the first.
        let most = |(file, seekers): &(&usize, &Seekers)| (seekers.len(), usize::MAX - **file);
        let Some((&owner, of_owner)) = sought.iter().max_by_key(most) else { continue };
        for (&other, seekers) in sought.iter().filter(|&(&file, _)| file != owner) {
            let span = |&(near, peer): &(usize, usize)| {
                let peer = &ends[near].peers()[peer];
                peer.endpoint.as_ref().map_or(peer.public_key.span, |endpoint| endpoint.span)
            };
            let place = words::shown(ends[seekers[0].0].config(), span(&seekers[0]));
            let mut finding = Finding::new(
                Severity::Warning,
                Rule::SameEndpoint,
                format!(
                    "{} and {} are both looked for at {place}: one of them is not found there",
                    ends[owner].label, ends[other].label
                ),
            );
            for seeker in seekers {
                let label =
                    format!("where {} looks for {}", ends[seeker.0].label, ends[other].label);
                finding = finding.at(seeker.0, span(seeker), label);
            }
            for seeker in of_owner.iter().take(1) {
                let label =
                    format!("where {} looks for {}", ends[seeker.0].label, ends[owner].label);
                finding = finding.at(seeker.0, span(seeker), label);
            }
            findings.push(finding.help(format!(
                "write the host at which {} can be reached, or another port",
                ends[other].label
            )));
        }
    }
    findings
}
