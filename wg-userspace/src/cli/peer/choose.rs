//! What a new peer gets: its addresses, and what its own file is to say.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    addresses::{self, Full},
    args::Add,
};
use crate::{
    cli::{Code, Failure},
    config::{Config, Endpoint, PeerConfig},
};

/// All that is not said by the command line alone.
#[derive(Debug, Eq, PartialEq)]
pub struct Chosen {
    /// The peer's AllowedIPs in our file.
    pub allowed_ips: Vec<IpNet>,
    /// The peer's addresses, each in its network.
    pub addresses: Vec<IpNet>,
    /// Our AllowedIPs in the peer's file.
    pub routes: Vec<IpNet>,
    /// Where the peer finds us, if that is known.
    pub endpoint: Option<Endpoint>,
    /// What people should know.
    pub hints: Vec<String>,
}

/// Chooses for a peer that `config` does not have yet.
///
/// # Errors
/// If the peer is there already, or if something is missing.
pub fn choose(arguments: &Add, config: &Config) -> Result<Chosen, Failure> {
    refuse_known(arguments, config)?;
    let own: Vec<IpNet> = config.interface.addresses.iter().map(|net| net.value).collect();
    let allowed_ips = match arguments.allowed_ips.as_slice() {
        [] => free(config, &own)?.into_iter().map(IpNet::from).collect(),
        given => checked(given, config, &own)?,
    };
    let is_host = |net: &&IpNet| net.prefix_len() == net.max_prefix_len();
    let addresses = allowed_ips.iter().filter(is_host).map(|net| in_network(net.addr(), &own));
    let addresses: Vec<IpNet> = addresses.collect();
    let mut hints = Vec::new();
    let endpoint = endpoint(arguments, config, &mut hints)?;
    let is_v4 = |net: &IpNet| matches!(net, IpNet::V4(_));
    // What a peer has no address for, it cannot send.
    let has_family = |net: &IpNet| addresses.iter().any(|address| is_v4(address) == is_v4(net));
    let mut routes: Vec<IpNet> = own.iter().copied().filter(has_family).collect();
    routes.extend(&arguments.routes);
    if arguments.route_all {
        let all = ["0.0.0.0/0", "::/0"].map(|net| net.parse::<IpNet>().expect("it is a network"));
        for net in all {
            if has_family(&net) {
                routes.push(net);
            } else {
                let family = if is_v4(&net) { "IPv4" } else { "IPv6" };
                hints.push(format!(
                    "the peer has no {family} address: what it sends by {family} does not go through \
                     the tunnel"
                ));
            }
        }
    }
    Ok(Chosen { allowed_ips, addresses, routes: without_covered(&routes), endpoint, hints })
}

fn refuse_known(arguments: &Add, config: &Config) -> Result<(), Failure> {
    let name = arguments.name.as_str();
    let mut names = config.peers.iter().filter_map(|peer| peer.name.as_ref());
    if let Some(known) = names.find(|known| known.value == name) {
        let line = format!(
            "{}: there is a peer called `{name}` already; take another name, or remove that one first \
             (`tidegate peer remove`)",
            config.place(known.span)
        );
        return Err(Failure::new(Code::Existence, line));
    }
    let Some(key) = arguments.public_key else { return Ok(()) };
    if key == config.interface.private_key.public_key() {
        let line = "`--public-key` is the interface's own key; give the peer's";
        return Err(Failure::new(Code::Existence, line));
    }
    match config.peers.iter().find(|peer| *peer.public_key == key) {
        None => Ok(()),
        Some(peer) => {
            let place = config.place(peer.public_key.span);
            let line = format!(
                "{place}: {} has this key already; `tidegate peer remove` it first, or take another \
                 key",
                called(peer)
            );
            Err(Failure::new(Code::Existence, line))
        }
    }
}

/// A peer, as people know it.
fn called(peer: &PeerConfig) -> String {
    match &peer.name {
        Some(name) => format!("`{}`", name.value),
        None => format!("a peer ({})", peer.public_key.value),
    }
}

fn free(config: &Config, own: &[IpNet]) -> Result<Vec<IpAddr>, Failure> {
    let networks = addresses::networks(own);
    if networks.is_empty() {
        let line = "no Address of the file is in a network with room for peers; say which addresses this \
                    one has (`--allowed-ips 10.9.0.2/32`)";
        return Err(Failure::new(Code::Existence, line));
    }
    let taken = config.peers.iter().flat_map(|peer| &peer.allowed_ips);
    let taken: Vec<IpNet> = taken.map(|net| net.value).collect();
    addresses::free(&networks, own, &taken).map_err(|Full(network)| {
        let line = format!(
            "{network} is full: each address of it is the interface's own, or in the AllowedIPs of a \
             peer; remove a peer, give the interface a larger network, or say which addresses this one \
             has (`--allowed-ips`)"
        );
        Failure::new(Code::Existence, line)
    })
}

/// What was given, each once, if no other peer would lose anything by it.
fn checked(given: &[IpNet], config: &Config, own: &[IpNet]) -> Result<Vec<IpNet>, Failure> {
    let mut allowed_ips: Vec<IpNet> = Vec::new();
    for net in given {
        if own.iter().any(|own| IpNet::from(own.addr()) == *net) {
            let line =
                format!("{} is the interface's own address; give the peer another one", net.addr());
            return Err(Failure::new(Code::Existence, line));
        }
        let of_peers = config
            .peers
            .iter()
            .flat_map(|peer| peer.allowed_ips.iter().map(move |net| (peer, net)));
        if let Some((peer, known)) = of_peers.into_iter().find(|(_, known)| known.value == *net) {
            let (place, peer) = (config.place(known.span), called(peer));
            let line = format!(
                "{place}: {peer} has {net} already, and would lose it to the new peer; give this \
                     one another network"
            );
            return Err(Failure::new(Code::Existence, line));
        }
        if !allowed_ips.contains(net) {
            allowed_ips.push(*net);
        }
    }
    if !allowed_ips.iter().any(|net| net.prefix_len() == net.max_prefix_len()) {
        let line = "`--allowed-ips` has no address of the peer's own; add one, such as 10.9.0.2/32";
        return Err(Failure::new(Code::Usage, line));
    }
    Ok(allowed_ips)
}

/// An address with the length of the network of ours that it is in.
fn in_network(address: IpAddr, own: &[IpNet]) -> IpNet {
    let networks = own.iter().filter(|net| net.contains(&address));
    let len = networks.map(IpNet::prefix_len).max();
    let host = IpNet::from(address);
    IpNet::new(address, len.unwrap_or(host.prefix_len())).unwrap_or(host)
}

fn endpoint(
    arguments: &Add,
    config: &Config,
    hints: &mut Vec<String>,
) -> Result<Option<Endpoint>, Failure> {
    let listen_port = config.interface.listen_port.as_deref().copied().filter(|&port| port != 0);
    let endpoint = arguments.endpoint.as_ref().or(config.interface.endpoint.as_deref());
    let Some(endpoint) = endpoint else {
        // Who has a key has a file, or writes one.
        if arguments.public_key.is_some() {
            return Ok(None);
        }
        let line = "the peer does not know where this interface is; say `--endpoint HOST`, or write \
                    `#! Endpoint = HOST` below [Interface] once for all peers";
        return Err(Failure::new(Code::Usage, line));
    };
    let Some(port) = listen_port else {
        let line = "the file has no ListenPort, so that the port is another one after each start and the \
                    peer does not find it; write `ListenPort = 51820` below [Interface]";
        return Err(Failure::new(Code::Config, line));
    };
    if let Some(other) = endpoint.port().filter(|&other| other != port) {
        hints.push(format!(
            "the peer sends to port {other}, and the interface listens on {port}: something has to \
             forward the one to the other"
        ));
    }
    Ok(Some(endpoint.endpoint(port)))
}

/// Each network once, and none that another one covers.
fn without_covered(nets: &[IpNet]) -> Vec<IpNet> {
    let mut kept: Vec<IpNet> = Vec::new();
    for net in nets.iter().map(IpNet::trunc) {
        if !kept.iter().any(|other| other.contains(&net)) {
            kept.retain(|other| !net.contains(other));
            kept.push(net);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    const FILE: &str = "\
        [Interface]\n\
        PrivateKey = SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=\n\
        Address = 10.9.0.1/24, fd09::1/64\n\
        ListenPort = 51820\n\
        #! Endpoint = gw.example.org:51820\n\
        [Peer]\n\
        #! Name = laptop\n\
        PublicKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\
        AllowedIPs = 10.9.0.2/32, fd09::2/128\n";

    fn arguments(rest: &str) -> Add {
        let line = format!("tidegate peer add wg0 phone {rest}");
        let words = line.split_whitespace().map(Into::into).collect();
        match crate::cli::args::parse(words) {
            Ok(crate::cli::args::Command::Peer(super::super::args::Peer::Add(add))) => add,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn chosen(text: &str, rest: &str) -> Result<Chosen, (u8, String)> {
        let config = config::parse("wg0.conf", text).unwrap();
        choose(&arguments(rest), &config).map_err(Failure::into_line)
    }

    fn texts(nets: &[IpNet]) -> String {
        nets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_peer_gets_what_is_free_and_the_ways_of_the_tunnel() {
        let found = chosen(FILE, "").unwrap();
        assert_eq!(texts(&found.allowed_ips), "10.9.0.3/32 fd09::3/128");
        assert_eq!(texts(&found.addresses), "10.9.0.3/24 fd09::3/64");
        assert_eq!(texts(&found.routes), "10.9.0.0/24 fd09::/64");
        assert_eq!(found.endpoint, Some("gw.example.org:51820".parse().unwrap()));
        assert!(found.hints.is_empty());
    }

    #[test]
    fn routes_are_as_asked_for() {
        let routes = |text: &str, rest: &str| texts(&chosen(text, rest).unwrap().routes);
        assert_eq!(routes(FILE, "--route-all"), "0.0.0.0/0 ::/0");
        let nets = "--routes 10.0.0.0/8,192.168.20.7,10.1.0.0/16";
        assert_eq!(routes(FILE, nets), "fd09::/64 10.0.0.0/8 192.168.20.7/32");
        let v4_only = FILE.replace(", fd09::1/64", "");
        let found = chosen(&v4_only, "--route-all").unwrap();
        assert_eq!(texts(&found.routes), "0.0.0.0/0");
        assert!(found.hints[0].contains("by IPv6 does not go through"), "{:?}", found.hints);
    }

    #[test]
    fn given_addresses_are_taken_if_nobody_loses_them() {
        let found = chosen(FILE, "--allowed-ips 10.9.0.77,10.8.0.0/16,192.0.2.9").unwrap();
        assert_eq!(texts(&found.allowed_ips), "10.9.0.77/32 10.8.0.0/16 192.0.2.9/32");
        assert_eq!(texts(&found.addresses), "10.9.0.77/24 192.0.2.9/32");
        assert_eq!(texts(&found.routes), "10.9.0.0/24", "it has no IPv6 address");
        for (rest, code, word) in [
            ("10.9.0.2", 5, "wg0.conf:9: `laptop` has 10.9.0.2/32 already"),
            ("10.9.0.1", 5, "own address"),
            ("10.8.0.0/16", 2, "no address of the peer's own"),
        ] {
            let (found, line) = chosen(FILE, &format!("--allowed-ips {rest}")).unwrap_err();
            assert!(found == code && line.contains(word), "{line}");
        }
        let (code, line) = chosen(&FILE.replace("10.9.0.1/24", "10.9.0.1/30"), "").unwrap_err();
        assert!(code == 5 && line.starts_with("10.9.0.0/30 is full"), "{line}");
        let (code, line) = chosen(&FILE.replace("Address", "# Address"), "").unwrap_err();
        assert!(code == 5 && line.contains("--allowed-ips"), "{line}");
    }

    #[test]
    fn a_name_or_key_that_is_there_is_refused_with_its_place() {
        let text = FILE.replace("laptop", "phone");
        let (code, line) = chosen(&text, "").unwrap_err();
        assert!(
            code == 5 && line.starts_with("wg0.conf:7: there is a peer called `phone`"),
            "{line}"
        );
        let key = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
        let (code, line) = chosen(FILE, &format!("--public-key {key}")).unwrap_err();
        assert_eq!(code, 5);
        assert!(line.starts_with("wg0.conf:8: `laptop` has this key already; "), "{line}");
        let own = config::parse("wg0.conf", FILE).unwrap().interface.private_key.public_key();
        let (code, line) = chosen(FILE, &format!("--public-key {own}")).unwrap_err();
        assert!(code == 5 && line.contains("the interface's own key"), "{line}");
    }

    #[test]
    fn where_we_are_is_said_known_or_asked_for() {
        let endpoint = |text: &str, rest: &str| {
            let found = chosen(text, rest)?;
            Ok::<_, (u8, String)>((found.endpoint.map(|at| at.to_string()), found.hints.len()))
        };
        let at = |text: &str| Some(text.to_owned());
        let other = "--endpoint [2001:db8::1]:7";
        assert_eq!(endpoint(FILE, other).unwrap(), (at("[2001:db8::1]:7"), 1));
        assert_eq!(endpoint(FILE, "--endpoint a.example").unwrap(), (at("a.example:51820"), 0));
        let plain = FILE.replace("gw.example.org:51820", "gw.example.org");
        assert_eq!(endpoint(&plain, "").unwrap(), (at("gw.example.org:51820"), 0));
        let unknown = FILE.replace("#! Endpoint", "# Endpoint");
        let (code, line) = endpoint(&unknown, "").unwrap_err();
        assert!(code == 2 && line.contains("#! Endpoint = HOST`"), "{line}");
        let key = "--public-key CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=";
        assert_eq!(endpoint(&unknown, key).unwrap(), (None, 0));
        let silent = FILE.replace("ListenPort", "# ListenPort");
        for rest in ["", "--endpoint a.example", "--endpoint a.example:7"] {
            let (code, line) = endpoint(&silent, rest).unwrap_err();
            assert!(code == 3 && line.contains("write `ListenPort"), "{line}");
        }
        let neither = unknown.replace("ListenPort", "# ListenPort");
        assert_eq!(endpoint(&neither, key).unwrap(), (None, 0));
    }
}
