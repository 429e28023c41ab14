//! `peer list`: the peers of a file, and what is known of those that run.

use std::{collections::HashMap, path::Path};

use anyhow::Context as _;
use ipnet::IpNet;
use serde::Serialize;

use super::{args, target::Target};
use crate::{
    cli::{
        Code, Failure, applied, print, show,
        socket::Socket,
        text::{self, Paint},
        up,
    },
    config::{self, Config},
    key::PublicKey,
    sys::clock,
};

/// What `tidegate peer list --json` prints.
#[derive(Debug, Serialize)]
struct Listed<'a> {
    /// The file.
    file: &'a Path,
    /// Its interface.
    interface: &'a str,
    /// Whether the interface is up by this file.
    is_up: bool,
    /// In the order of the file.
    peers: Vec<ListedPeer<'a>>,
}

/// A peer. Fields that have no value are `null`.
#[derive(Debug, Serialize)]
struct ListedPeer<'a> {
    /// What it is called.
    name: Option<&'a str>,
    public_key: String,
    has_preshared_key: bool,
    allowed_ips: Vec<String>,
    /// As the file has it.
    endpoint: Option<String>,
    persistent_keepalive_s: Option<u16>,
    /// Seconds since 1970 (UTC); nothing if the interface is not up, or there was none.
    latest_handshake_unix_s: Option<u64>,
}

pub fn list(arguments: &args::List) -> Result<Code, Failure> {
    let target = Target::of(&arguments.what)?;
    let path = &target.file.path;
    let text = up::read(path)?;
    let config = config::parse(&target.name(), &text).map_err(Failure::config)?;
    let handshakes = if target.is_up { handshakes(&target)? } else { HashMap::new() };
    let peers = peers(&config, &handshakes);
    if arguments.json {
        let interface = target.file.interface.as_str();
        let listed = Listed { file: path, interface, is_up: target.is_up, peers };
        let json = serde_json::to_string_pretty(&listed).context("writing JSON")?;
        print(&format!("{json}\n"))?;
    } else {
        let (now_unix_s, _) = clock::wall();
        print(&table(&peers, target.is_up.then_some(now_unix_s)))?;
    }
    Ok(Code::Ok)
}

fn handshakes(target: &Target) -> Result<HashMap<PublicKey, u64>, Failure> {
    let interface = &target.file.interface;
    let Some(socket) = Socket::find(interface)? else { return Ok(HashMap::new()) };
    let peers = show::ask(interface, &socket, false)?.peers;
    let latest =
        peers.iter().filter_map(|peer| Some((peer.public_key.0, peer.latest_handshake_unix_s?)));
    Ok(latest.collect())
}

fn peers<'a>(config: &'a Config, handshakes: &HashMap<PublicKey, u64>) -> Vec<ListedPeer<'a>> {
    let peers = config.peers.iter().map(|peer| ListedPeer {
        name: peer.name.as_ref().map(|name| name.value.as_str()),
        public_key: peer.public_key.to_string(),
        has_preshared_key: peer.preshared_key.as_ref().is_some_and(|key| !key.is_zero()),
        allowed_ips: peer.allowed_ips.iter().map(|net| IpNet::to_string(net)).collect(),
        endpoint: peer.endpoint.as_deref().map(applied::written),
        persistent_keepalive_s: peer.persistent_keepalive.as_deref().copied().filter(|&s| s != 0),
        latest_handshake_unix_s: handshakes.get(&*peer.public_key).copied(),
    });
    peers.collect()
}

/// A line for each peer; with the time of the clock on the wall, also when it was there last.
fn table(peers: &[ListedPeer<'_>], now_unix_s: Option<u64>) -> String {
    const PLAIN: Paint = Paint { is_on: false };
    let Some(width) =
        peers.iter().map(|peer| peer.name.map_or(1, |name| name.chars().count())).max()
    else {
        return "no peers\n".to_owned();
    };
    let ips: Vec<String> = peers.iter().map(|peer| peer.allowed_ips.join(", ")).collect();
    let ips_width = ips.iter().map(|text| text.len()).max().unwrap_or(0);
    let line = |(peer, ips): (&ListedPeer<'_>, &String)| {
        let handshake = now_unix_s.map(|now| match peer.latest_handshake_unix_s {
            Some(then) => format!("  handshake {}", text::ago(then, PLAIN, now)),
            None => "  no handshake yet".to_owned(),
        });
        let (name, key) = (peer.name.unwrap_or("-"), &peer.public_key);
        format!("{name:width$}  {ips:ips_width$}  {key}{}\n", handshake.unwrap_or_default())
    };
    peers.iter().zip(&ips).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peer_has_a_line() {
        let text = "[Interface]\nPrivateKey = SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=\n\
            [Peer]\n#! Name = Büro\nPublicKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\
            AllowedIPs = 10.9.0.2/32, 10.1.0.0/16\n\
            [Peer]\nPublicKey = AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n";
        let config = config::parse("wg0.conf", text).unwrap();
        let one = *config.peers[0].public_key;
        let peers = peers(&config, &HashMap::from([(one, 100)]));
        assert_eq!(
            table(&peers, Some(102)),
            "Büro  10.9.0.2/32, 10.1.0.0/16  AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=  \
             handshake 2 seconds ago\n\
             -                               AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=  \
             no handshake yet\n"
        );
        assert!(!table(&peers, None).contains("handshake"));
        assert_eq!(table(&[], None), "no peers\n");
    }
}
