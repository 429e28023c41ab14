//! The arguments of `peer`.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, Subcommand};
use ipnet::IpNet;

use super::name::PeerName;
use crate::{config::OwnEndpoint, key::PublicKey};

/// What to do with peers.
#[derive(Debug, Subcommand)]
pub enum Peer {
    /// Add a peer to a config file, and to the interface if it is up; print the peer's own config
    /// file
    Add(Add),
    /// Remove a peer from a config file, and from the interface if it is up
    Remove(Remove),
    /// List the peers of a config file
    List(List),
}

/// Arguments of `peer add`.
#[derive(Args, Debug)]
pub struct Add {
    /// Name of an interface, or its config file
    #[arg(value_name = "IF|FILE")]
    pub what: String,
    /// What the peer is called
    #[arg(value_parser = clap::value_parser!(PeerName))]
    pub name: PeerName,
    /// What the peer may send from: its own addresses, and networks behind it [default: the next
    /// free address of each network of the interface]
    #[arg(long, value_name = "NET,..", value_delimiter = ',', value_parser = net)]
    pub allowed_ips: Vec<IpNet>,
    /// The peer's public key; without it a new private key is made, and printed with the peer's
    /// config only
    #[arg(long, value_name = "KEY", value_parser = public_key, conflicts_with = "qr")]
    pub public_key: Option<PublicKey>,
    /// Make a preshared key, too
    #[arg(long)]
    pub psk: bool,
    /// Where the peer reaches this interface; without a port it is the ListenPort [default: what
    /// `#! Endpoint` says]
    #[arg(long, value_name = "HOST[:PORT]")]
    pub endpoint: Option<OwnEndpoint>,
    /// Name servers and search domains for the peer
    #[arg(long, value_name = "SERVER,..", value_delimiter = ',', value_parser = dns)]
    pub dns: Vec<String>,
    /// The peer's PersistentKeepalive, which keeps a NAT before it open; 0: none
    #[arg(long, value_name = "SECONDS", default_value_t = 25)]
    pub keepalive: u16,
    /// The peer sends everything through the tunnel
    #[arg(long, conflicts_with = "routes")]
    pub route_all: bool,
    /// What the peer sends through the tunnel besides the tunnel's own networks
    #[arg(long, value_name = "NET,..", value_delimiter = ',', value_parser = net)]
    pub routes: Vec<IpNet>,
    /// Print the peer's config as a QR code
    #[arg(long, conflicts_with = "out")]
    pub qr: bool,
    /// Write the peer's config into a new file, instead of to standard output
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Print what would be added, and change nothing
    #[arg(long, conflicts_with_all = ["qr", "out"])]
    pub dry_run: bool,
}

/// Arguments of `peer remove`.
#[derive(Args, Debug)]
pub struct Remove {
    /// Name of an interface, or its config file
    #[arg(value_name = "IF|FILE")]
    pub what: String,
    /// What the peer is called, or its public key
    #[arg(value_name = "NAME|KEY")]
    pub peer: String,
    /// Print what would be removed, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `peer list`.
#[derive(Args, Debug)]
pub struct List {
    /// Name of an interface, or its config file
    #[arg(value_name = "IF|FILE")]
    pub what: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A network, or an address that stands for itself alone. Host bits go.
fn net(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    let net = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    let net = net.map_err(|_| "write a network such as 10.9.0.7/32 or fd09::/64".to_owned())?;
    Ok(net.trunc())
}

fn public_key(text: &str) -> Result<PublicKey, String> {
    PublicKey::from_base64(text.trim()).map_err(|error| error.to_string())
}

/// A word of `DNS`: an address or a domain.
fn dns(text: &str) -> Result<String, String> {
    let text = text.trim();
    let is_domain = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_'))
    };
    if text.parse::<IpAddr>().is_ok() || is_domain(text) {
        Ok(text.to_owned())
    } else {
        Err("write the address of a name server, or a domain to search in".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_lose_their_host_bits() {
        assert_eq!(net("10.9.0.7").unwrap().to_string(), "10.9.0.7/32");
        assert_eq!(net("fd09::7/64").unwrap().to_string(), "fd09::/64");
        assert!(net("10.9.0.7/33").is_err() && net("x").is_err());
        assert!(dns("10.0.0.53").is_ok() && dns("corp.example").is_ok());
        assert!(dns("a#b").is_err() && dns("a b").is_err() && dns("").is_err());
    }
}
