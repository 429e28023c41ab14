//! `Endpoint`: whether datagrams can get there at all.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Page, Rule, Severity};
use crate::check::Finding;
use crate::config::{Endpoint, PeerConfig, Span, Spanned, Table};

pub fn find(page: &Page<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    let ways = Ways::of(page);
    let mut first_of: HashMap<&Endpoint, &PeerConfig> = HashMap::new();
    for peer in &page.config.peers {
        let Some(endpoint) = &peer.endpoint else { continue };
        match first_of.entry(&endpoint.value) {
            Entry::Vacant(entry) => {
                entry.insert(peer);
            }
            Entry::Occupied(first) => {
                let first = first.get();
                let span = first.endpoint.as_ref().map_or(first.public_key.span, |at| at.span);
                found.push(
                    page.found(
                        (Severity::Warning, Rule::EndpointRepeated),
                        format!(
                            "{} and {} have the same Endpoint, where only one of them can be",
                            page.label(first),
                            page.label(peer)
                        ),
                        endpoint.span,
                        "again here",
                    )
                    .at(page.file, span, "first here")
                    .help("correct one of them, or remove it if that side comes to us"),
                );
            }
        }
        if let Endpoint::Address(address) = &endpoint.value {
            let finding = unusable(page, peer, endpoint, address.ip());
            found.extend(
                finding.or_else(|| ways.in_tunnel(page, peer, endpoint.span, address.ip())),
            );
        }
    }
    found
}

fn unusable(
    page: &Page<'_>,
    peer: &PeerConfig,
    endpoint: &Spanned<Endpoint>,
    ip: IpAddr,
) -> Option<Finding> {
    let what = match ip {
        _ if ip.is_unspecified() => "this stands for no address",
        _ if ip.is_multicast() => "this stands for many hosts",
        IpAddr::V4(ip) if ip.is_broadcast() => "this stands for many hosts",
        IpAddr::V6(ip) if ip.is_unicast_link_local() => "an address on a link needs to name it",
        _ => return None,
    };
    let message = format!("{} is never found at {ip}", page.label(peer));
    let kind = (Severity::Error, Rule::EndpointUnusable);
    let help = match ip {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => {
            format!("write the interface behind it, such as `[{ip}%eth0]:51820`")
        }
        _ => "write the public address or the name of the other side; leave the line out if it \
              comes to us"
            .to_owned(),
    };
    Some(page.found(kind, message, endpoint.span, what).help(help))
}

/// What the main table sends into the tunnel.
struct Ways {
    spans: HashMap<IpNet, (Span, Why)>,
    /// Lengths of prefixes, for each family.
    lens: [BTreeSet<u8>; 2],
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Why {
    Address,
    AllowedIps,
}

impl Ways {
    fn of(page: &Page<'_>) -> Ways {
        let interface = &page.config.interface;
        let mut ways = Ways { spans: HashMap::new(), lens: Default::default() };
        let is_auto = interface.table.as_ref().is_none_or(|table| table.value == Table::Auto);
        if is_auto {
            // /0 goes into a table where the device's own datagrams are not looked up.
            let all = page.config.peers.iter().flat_map(|peer| &peer.allowed_ips);
            for net in all.filter(|net| net.prefix_len() > 0) {
                ways.add(net.value, net.span, Why::AllowedIps);
            }
        }
        for address in &interface.addresses {
            ways.add(address.trunc(), address.span, Why::Address);
        }
        ways
    }

    fn add(&mut self, net: IpNet, span: Span, why: Why) {
        self.spans.insert(net, (span, why));
        self.lens[usize::from(net.addr().is_ipv6())].insert(net.prefix_len());
    }

    fn in_tunnel(
        &self,
        page: &Page<'_>,
        peer: &PeerConfig,
        span: Span,
        ip: IpAddr,
    ) -> Option<Finding> {
        let lens = self.lens[usize::from(ip.is_ipv6())].iter().rev();
        let nets = lens.filter_map(|&len| IpNet::new(ip, len).ok()).map(|net| net.trunc());
        let ways = nets.filter_map(|net| Some((net, *self.spans.get(&net)?)));
        // The network of the tunnel says most about what is wrong.
        let ways: Vec<_> = ways.collect();
        let of_address = ways.iter().find(|(_, (_, why))| *why == Why::Address);
        let &(net, (of, why)) = of_address.or(ways.first())?;
        let message = format!(
            "datagrams to {} would go into the tunnel itself: {net} leads into it",
            page.label(peer)
        );
        let (label, help) = match why {
            Why::Address => (
                "the network of the tunnel",
                "an Endpoint is an address outside the tunnel, by which the other side is reached \
                 without it: write its public address or name",
            ),
            Why::AllowedIps => (
                "what lies here is sent through the tunnel",
                "leave the endpoint's address out of AllowedIPs; this does no harm only if a more \
                 specific route leads to it",
            ),
        };
        let kind = (Severity::Warning, Rule::EndpointInTunnel);
        let finding = page.found(kind, message, span, "reached through the tunnel");
        Some(finding.at(page.file, of, label).help(help))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{PEERS, file, findings, rules};
    use super::*;

    fn of(endpoint: &str) -> Vec<Rule> {
        rules("", &format!("AllowedIPs = 10.9.0.2/32, 192.168.0.0/16\nEndpoint = {endpoint}"))
    }

    #[test]
    fn an_endpoint_is_a_host_outside_the_tunnel() {
        for good in ["198.51.100.1:1", "vpn.example.org:1", "[fe80::1%eth0]:1", "127.0.0.1:1"] {
            assert_eq!(of(good), [], "{good}");
        }
        for bad in ["0.0.0.0:1", "224.0.0.1:1", "255.255.255.255:1", "[::]:1", "[fe80::1]:1"] {
            assert_eq!(of(bad), [Rule::EndpointUnusable], "{bad}");
        }
        for bad in ["10.9.0.2:1", "10.9.0.7:1", "192.168.3.4:1"] {
            assert_eq!(of(bad), [Rule::EndpointInTunnel], "{bad}");
        }
    }

    #[test]
    fn a_marked_default_route_holds_no_endpoint_and_two_halves_do() {
        let of = |table: &str, nets: &str| {
            rules(table, &format!("AllowedIPs = {nets}\nEndpoint = 198.51.100.1:1"))
        };
        assert_eq!(of("", "0.0.0.0/0, ::/0"), []);
        assert_eq!(of("", "0.0.0.0/1, 128.0.0.0/1"), [Rule::EndpointInTunnel]);
        assert_eq!(of("Table = off", "0.0.0.0/1, 128.0.0.0/1"), []);
    }

    #[test]
    fn two_peers_are_not_at_one_place() {
        let text = file("", "Endpoint = vpn.example.org:1");
        let again = format!(
            "{text}[Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.3/32\nEndpoint = vpn.example.org:1\n",
            PEERS[1]
        );
        let found = findings(&again);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].rule, Rule::EndpointRepeated);
        assert_eq!(findings(&again.replace("org:1\n[", "org:2\n[")).len(), 0);
    }
}
