//! What an `[Interface]` says of itself: addresses, MTU, DNS, port.

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Page, Rule, Severity, listed};
use crate::check::Finding;
use crate::config::{Endpoint, Spanned, Table};

/// The least MTU with which a link has IPv6 (RFC 8200, section 5).
const IPV6_MTU_MIN: u16 = 1280;
/// MTU of a path of which nothing is known.
const PATH_MTU: u16 = 1500;
/// Bytes that a tunnel adds to a packet: IP and UDP headers, and the overhead of transport data.
const OVERHEAD_V4: u16 = 60;
const OVERHEAD_V6: u16 = 80;

/// Whether a host may have this address. `prefix` says the network in which it stands.
fn is_usable(address: IpAddr) -> bool {
    !address.is_unspecified()
        && !address.is_multicast()
        && !address.is_loopback()
        && !matches!(address, IpAddr::V4(address) if address.is_broadcast())
}

pub fn find(page: &Page<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    let interface = &page.config.interface;
    let gives_address = |hook: &str| hook.contains("addr") || hook.contains("ifconfig");
    if interface.addresses.is_empty()
        && !interface.hooks.iter().any(|hook| gives_address(&hook.command))
    {
        found.push(
            page.found(
                (Severity::Warning, Rule::AddressMissing),
                "the interface gets no address, so that nobody can be reached at it",
                interface.private_key.span,
                "this interface",
            )
            .help("write `Address = ` and its address in the tunnel, such as 10.9.0.1/24"),
        );
    }
    let mut first_of: HashMap<IpAddr, &Spanned<IpNet>> = HashMap::new();
    for address in &interface.addresses {
        if let Some(first) = first_of.get(&address.addr()) {
            found.push(
                page.found(
                    (Severity::Warning, Rule::AddressRepeated),
                    format!("the interface gets {} twice", address.addr()),
                    address.span,
                    "again here",
                )
                .at(page.file, first.span, "first here")
                .help("keep one of the two"),
            );
            continue;
        }
        first_of.insert(address.addr(), address);
        found.extend(unusable(page, address));
    }

    for peer in &page.config.peers {
        for prefix in &peer.allowed_ips {
            let is_host = prefix.prefix_len() == prefix.max_prefix_len();
            let Some(own) = first_of.get(&prefix.addr()).filter(|_| is_host) else { continue };
            let label = page.label(peer);
            found.push(
                page.found(
                    (Severity::Warning, Rule::AddressOfPeer),
                    format!(
                        "{} is this interface's own address, and {label} is said to have it: \
                         nothing is ever sent to it there",
                        prefix.addr()
                    ),
                    prefix.span,
                    "AllowedIPs are addresses of the other side",
                )
                .at(page.file, own.span, "the own address")
                .help(format!("write the address that stands in the file of {label}")),
            );
        }
    }
    found
}

fn unusable(page: &Page<'_>, address: &Spanned<IpNet>) -> Option<Finding> {
    let ip = address.addr();
    if !is_usable(ip) {
        let what = match ip {
            _ if ip.is_unspecified() => "this stands for no address",
            _ if ip.is_loopback() => "this is every host's own address",
            _ => "this stands for many hosts",
        };
        let message = format!("no interface can have the address {ip}");
        let kind = (Severity::Error, Rule::AddressUnusable);
        let finding = page.found(kind, message, address.span, what);
        return Some(finding.help("write its address in the tunnel, such as 10.9.0.1/24"));
    }
    // Networks of one or two hosts have no addresses of their own.
    if address.prefix_len() + 1 >= address.max_prefix_len() {
        return None;
    }
    let is_broadcast = ip.is_ipv4() && ip == address.broadcast();
    if !is_broadcast && ip != address.network() {
        return None;
    }
    let (what, label) = match is_broadcast {
        true => ("all hosts of", "its broadcast address"),
        false => ("the whole network", "all bits behind the prefix are 0"),
    };
    let message = format!("{ip} stands for {what} {}", address.trunc());
    let kind = (Severity::Warning, Rule::AddressOfNetwork);
    let example = address.hosts().next().unwrap_or(ip);
    let example = format!("{example}/{}", address.prefix_len());
    Some(
        page.found(kind, message, address.span, label)
            .help(format!("write the address of this host, such as {example}")),
    )
}

pub fn find_mtu(page: &Page<'_>) -> Vec<Finding> {
    let interface = &page.config.interface;
    let Some(mtu) = &interface.mtu else { return Vec::new() };
    let of_peers = page.config.peers.iter().flat_map(|peer| &peer.allowed_ips);
    let v6 = interface.addresses.iter().chain(of_peers).find(|net| net.addr().is_ipv6());
    if let Some(v6) = v6.filter(|_| mtu.value < IPV6_MTU_MIN) {
        return vec![
            page.found(
                (Severity::Error, Rule::MtuBelowIpv6),
                format!(
                    "an interface with an MTU of {} has no IPv6, so that `up` fails",
                    mtu.value
                ),
                mtu.span,
                format!("IPv6 needs at least {IPV6_MTU_MIN}"),
            )
            .at(page.file, v6.span, "this is IPv6")
            .help(format!(
                "write at least {IPV6_MTU_MIN}, or leave IPv6 out; without the line the MTU is \
                 found by itself"
            )),
        ];
    }
    let is_v6 = page.config.peers.iter().any(|peer| {
        matches!(peer.endpoint.as_deref(), Some(Endpoint::Address(address)) if address.is_ipv6())
    });
    let overhead = if is_v6 { OVERHEAD_V6 } else { OVERHEAD_V4 };
    let greatest = PATH_MTU - overhead;
    if mtu.value <= greatest {
        return Vec::new();
    }
    vec![
        page.found(
            (Severity::Warning, Rule::MtuTooLarge),
            format!(
                "packets of {} bytes do not fit into datagrams of {PATH_MTU}: large ones are cut \
                 into fragments, or lost",
                mtu.value
            ),
            mtu.span,
            format!("the tunnel adds {overhead} bytes"),
        )
        .help(format!(
            "write at most {greatest}, or nothing: then the MTU is found by itself; leave it if \
             all the way to the other side takes {} bytes",
            u32::from(mtu.value) + u32::from(overhead)
        )),
    ]
}

pub fn find_dns(page: &Page<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    let interface = &page.config.interface;
    let is_server = |word: &str| word.parse::<IpAddr>().is_ok();
    for word in interface.dns.iter().filter(|word| !is_server(word)) {
        let is_domain = |text: &str| {
            text.bytes()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_' | b'~'))
                && !text.bytes().all(|c| c.is_ascii_digit() || c == b'.')
        };
        if is_domain(word) {
            continue;
        }
        let shown = page.text(word.span);
        found.push(
            page.found(
                (Severity::Warning, Rule::DnsWord),
                format!("`{shown}` of `DNS` is no address, and is taken for a search domain"),
                word.span,
                "neither an address nor a domain",
            )
            .help("write addresses without port, quotes and brackets, such as 10.9.0.1 or fd09::1"),
        );
    }
    let servers = || interface.dns.iter().filter(|word| is_server(word));
    if let (Some(first), None) = (interface.dns.first(), servers().next()) {
        if found.is_empty() {
            found.push(
                page.found(
                    (Severity::Warning, Rule::DnsWithoutServer),
                    "search domains without a name server change nothing",
                    first.span,
                    "a search domain",
                )
                .help("write the address of a name server beside it"),
            );
        }
        return found;
    }
    if matches!(interface.table.as_deref(), Some(Table::Off)) {
        return found;
    }
    let of_peers = || page.config.peers.iter().flat_map(|peer| &peer.allowed_ips);
    let routed = || interface.addresses.iter().chain(of_peers());
    let outside: Vec<_> = servers()
        .filter(|server| {
            let address = server.parse::<IpAddr>().ok();
            !address.is_some_and(|address| routed().any(|net| net.contains(&address)))
        })
        .collect();
    if let Some(first) = outside.first() {
        let all = listed(outside.iter().map(|server| server.value.clone()).collect());
        let (is, it) = if outside.len() == 1 { ("is", "it") } else { ("are", "them") };
        let finding = page.found(
            (Severity::Note, Rule::DnsOutside),
            format!("{all} {is} asked outside the tunnel: no peer has {it} in its AllowedIPs"),
            first.span,
            "not routed to a peer",
        );
        found.push(finding.help(
            "if names should be looked up through the tunnel, give the address to the peer behind \
             which the server is",
        ));
    }
    found
}

pub fn find_of_interface(page: &Page<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    let interface = &page.config.interface;
    if page.config.peers.is_empty() {
        found.push(
            page.found(
                (Severity::Note, Rule::PeersMissing),
                "the file has no [Peer]: the interface talks to nobody",
                interface.private_key.span,
                "this interface",
            )
            .help("write a [Peer] with a PublicKey and AllowedIPs for each other side"),
        );
    }
    let has_port = interface.listen_port.as_ref().is_some_and(|port| port.value != 0);
    let mut waiting = page.config.peers.iter().filter(|peer| peer.endpoint.is_none());
    if let (false, Some(first)) = (has_port, waiting.next()) {
        let others = waiting.count();
        let mut who = vec![page.label(first)];
        if others > 0 {
            who.push(format!("{others} more"));
        }
        let (has, it) = if others == 0 { ("has", "it") } else { ("have", "them") };
        let mut finding = page.found(
            (Severity::Warning, Rule::ListenPortMissing),
            format!(
                "nobody can start with {who}: {it} {has} no Endpoint here, and cannot know this \
                 interface's port, which is another one at each start",
                who = listed(who),
                it = if others == 0 { "it" } else { "they" },
            ),
            interface.listen_port.as_ref().map_or(interface.private_key.span, |port| port.span),
            if interface.listen_port.is_some() { "0 is any port" } else { "no ListenPort here" },
        );
        finding = finding.at(page.file, first.public_key.span, "no Endpoint here");
        found.push(finding.help(format!(
            "write `ListenPort = 51820` and use that port in the Endpoint at the other side, or \
             give {it} an Endpoint"
        )));
    }
    if interface.save_config.as_deref() == Some(&true)
        && let Some((offset, len)) = first_comment(page.config.source().inner())
    {
        let save = interface.save_config.as_ref().expect("it is set");
        found.push(
            page.found(
                (Severity::Note, Rule::SaveConfigComments),
                "wg-quick(8) would lose the comments of this file when the interface goes down",
                save.span,
                "this writes the file anew",
            )
            .at(page.file, crate::config::Span::new(offset.into(), len), "a comment")
            .help(
                "`tidegate down` and `tidegate save` keep comments; or write `SaveConfig = false`",
            ),
        );
    }
    found
}

/// Where the first line that is a comment stands, and its length.
fn first_comment(text: &str) -> Option<(usize, usize)> {
    let mut offset = 0;
    for line in text.split_inclusive('\n') {
        let trimmed = line.trim();
        if trimmed.starts_with('#') {
            return Some((offset + line.find('#')?, trimmed.len()));
        }
        offset += line.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::tests::{file, findings, rules};
    use super::*;

    #[test]
    fn addresses_that_no_host_has_are_found() {
        let of = |address: &str| rules(&format!("Address = {address}"), "");
        for good in ["10.9.0.1/24", "10.9.0.0/31", "10.9.0.1", "fd09::1/64", "10.9.0.0/32"] {
            assert_eq!(of(good), [], "{good}");
        }
        for bad in ["0.0.0.0/0", "127.0.0.1/8", "224.0.0.1/24", "::/64", "255.255.255.255"] {
            assert_eq!(of(bad), [Rule::AddressUnusable], "{bad}");
        }
        for bad in ["10.9.0.0/24", "10.9.0.255/24", "fd09::/64"] {
            assert_eq!(of(bad), [Rule::AddressOfNetwork], "{bad}");
        }
        assert_eq!(of("10.9.0.1/24, 10.9.0.1/32"), [Rule::AddressRepeated]);
        assert_eq!(of(""), [Rule::AddressMissing]);
        assert_eq!(of("\nPostUp = ip addr add 10.9.0.1/24 dev %i"), []);
        let help = findings(&file("Address = 10.9.0.0/24", ""))[0].help.clone().unwrap();
        assert!(help.contains("10.9.0.1/24"), "{help}");
    }

    #[test]
    fn the_own_address_is_no_peers() {
        assert_eq!(rules("", "AllowedIPs = 10.9.0.1/32"), [Rule::AddressOfPeer]);
        assert_eq!(rules("", "AllowedIPs = 10.9.0.0/24"), []);
    }

    #[test]
    fn an_mtu_fits_both_families_and_the_way() {
        let of = |mtu: u16, peer: &str| rules(&format!("MTU = {mtu}"), peer);
        assert_eq!(of(1279, ""), []);
        assert_eq!(of(1279, "AllowedIPs = fd09::2/128"), [Rule::MtuBelowIpv6]);
        assert_eq!(of(1280, "AllowedIPs = fd09::2/128"), []);
        assert_eq!(of(1440, ""), []);
        assert_eq!(of(1441, ""), [Rule::MtuTooLarge]);
        assert_eq!(of(1420, "Endpoint = [2001:db8::1]:1"), []);
        assert_eq!(of(1421, "Endpoint = [2001:db8::1]:1"), [Rule::MtuTooLarge]);
    }

    #[test]
    fn name_servers_are_addresses_within_the_tunnel() {
        let of = |dns: &str| rules(&format!("DNS = {dns}"), "");
        assert_eq!(of("10.9.0.2"), []);
        assert_eq!(of("10.9.0.2, example.org, ~corp"), []);
        assert_eq!(of("1.1.1.1"), [Rule::DnsOutside]);
        assert_eq!(rules("DNS = 1.1.1.1\nTable = off", ""), []);
        assert_eq!(of("10.9.0.2, 10.9.0.256"), [Rule::DnsWord]);
        assert_eq!(of("\"10.9.0.2\""), [Rule::DnsWord]);
        assert_eq!(of("10.9.0.2:53"), [Rule::DnsWord]);
        assert_eq!(of("%i"), [Rule::DnsWord]);
        assert_eq!(of("example.org"), [Rule::DnsWithoutServer]);
    }

    #[test]
    fn who_waits_has_a_port() {
        let without = |peer: &str| findings(&file("", peer).replace("ListenPort = 51820\n", ""));
        assert_eq!(without("")[0].rule, Rule::ListenPortMissing);
        assert_eq!(without("Endpoint = 198.51.100.1:1").len(), 0);
        let zero = file("", "").replace("51820", "0");
        assert_eq!(findings(&zero)[0].rule, Rule::ListenPortMissing);
    }

    #[test]
    fn saving_by_wg_quick_loses_comments() {
        assert_eq!(rules("SaveConfig = true", "# mine"), [Rule::SaveConfigComments]);
        assert_eq!(rules("SaveConfig = false", "# mine"), []);
        assert_eq!(first_comment("[Interface]\n  # x y \n"), Some((14, 5)));
        assert_eq!(first_comment("[Interface] # x\n"), None);
    }
}
