//! The arguments of `init`.

use std::{net::IpAddr, path::PathBuf, str::FromStr};

use clap::{Args, Subcommand};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::network::{self, Choice};
use crate::{
    cli::name::InterfaceName,
    config::{EndpointError, OwnEndpoint},
};

/// Which ends there are, and what they are to each other.
#[derive(Debug, Subcommand)]
pub enum Shape {
    /// Clients reach one server, and the server its clients
    Bridge(Bridge),
    /// Clients send everything through a gateway, and the internet sees the gateway's address
    Gateway(Gateway),
    /// Clients reach a network that one server stands in
    Jumpbox(Jumpbox),
    /// All ends reach each other without one in the middle
    Mesh(Mesh),
}

/// Arguments of every shape.
#[derive(Args, Debug)]
pub struct Common {
    /// Where the files go, in a folder for each end
    #[arg(value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// IPv4 inside the tunnel, or `none`
    #[arg(long, value_name = "NET", default_value = "10.9.0.0/24")]
    pub network: Choice<Ipv4Net>,
    /// IPv6 inside the tunnel, or `none` [default: one of your own, of the form fdxx:xxxx:xxxx::/64]
    #[arg(long, value_name = "NET")]
    pub network6: Option<Choice<Ipv6Net>>,
    /// Port of an end whose endpoint names none
    #[arg(long, value_name = "PORT", default_value_t = 51820,
          value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// Give each two ends a preshared key
    #[arg(long)]
    pub psk: bool,
    /// Name of the interface, and of the files, at all ends
    #[arg(long, value_name = "IF", default_value = "wg0")]
    pub interface: InterfaceName,
}

/// Arguments of the shapes with one end in the middle.
#[derive(Args, Debug)]
pub struct Star {
    /// Where clients find the end in the middle: a name or an address, and its UDP port
    #[arg(long, value_name = "HOST[:PORT]")]
    pub endpoint: OwnEndpoint,
    /// Names of the clients
    #[arg(long, value_name = "NAME,..", default_value = "laptop", value_delimiter = ',')]
    pub clients: Vec<EndName>,
    /// Whom clients ask for names while the tunnel is up
    #[arg(long, value_name = "ADDR,..", value_delimiter = ',')]
    pub dns: Vec<IpAddr>,
}

/// Arguments of `init bridge`.
#[derive(Args, Debug)]
pub struct Bridge {
    #[command(flatten)]
    pub common: Common,
    #[command(flatten)]
    pub star: Star,
    /// Name of the end in the middle
    #[arg(long, default_value = "server")]
    pub name: EndName,
}

/// Arguments of `init gateway`.
#[derive(Args, Debug)]
pub struct Gateway {
    #[command(flatten)]
    pub common: Common,
    #[command(flatten)]
    pub star: Star,
    /// Name of the end in the middle
    #[arg(long, default_value = "gateway")]
    pub name: EndName,
    /// The gateway's interface to the internet
    #[arg(long, value_name = "NIC", default_value = "eth0", value_parser = nic)]
    pub out: String,
}

/// Arguments of `init jumpbox`.
#[derive(Args, Debug)]
pub struct Jumpbox {
    #[command(flatten)]
    pub common: Common,
    #[command(flatten)]
    pub star: Star,
    /// Name of the end in the middle
    #[arg(long, default_value = "jumpbox")]
    pub name: EndName,
    /// The networks behind the jumpbox
    #[arg(long, value_name = "NET,..", required = true, value_delimiter = ',',
          value_parser = network::network)]
    pub vlan: Vec<IpNet>,
    /// The jumpbox's interface to those networks
    #[arg(long, value_name = "NIC", default_value = "eth1", value_parser = nic)]
    pub out: String,
}

/// Arguments of `init mesh`.
#[derive(Args, Debug)]
pub struct Mesh {
    #[command(flatten)]
    pub common: Common,
    /// The ends, and where the others find them; one of them may be without
    #[arg(long, value_name = "NAME=HOST[:PORT],..", required = true, value_delimiter = ',')]
    pub nodes: Vec<Node>,
}

/// The name of an end: its folder's name, and what others call it in their files.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndName(String);

impl EndName {
    /// The longest `#! Name`, in characters.
    const LEN_MAX: usize = 63;

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for EndName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_good = (1..=Self::LEN_MAX).contains(&text.chars().count())
            && text.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | '.'))
            // Not hidden, not an option, and not the folder above.
            && !text.starts_with(['.', '-']);
        match is_good {
            true => Ok(Self(text.to_owned())),
            false => Err(format!(
                "`{text}` is no name for an end; take 1 to {} letters, digits or `_-.`",
                Self::LEN_MAX
            )),
        }
    }
}

/// An end of a mesh.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    /// What it is called.
    pub name: EndName,
    /// Where it is found.
    pub endpoint: Option<OwnEndpoint>,
}

impl FromStr for Node {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, endpoint) = match text.split_once('=') {
            Some((name, endpoint)) => {
                (name, Some(endpoint.parse().map_err(|error: EndpointError| error.to_string())?))
            }
            None => (text, None),
        };
        Ok(Self { name: name.parse()?, endpoint })
    }
}

/// The name of a NIC. It goes into a shell's command.
fn nic(text: &str) -> Result<String, String> {
    let is_good = (1..=InterfaceName::LEN_MAX).contains(&text.len())
        && text.bytes().all(|c| c.is_ascii_alphanumeric() || b"_.-".contains(&c))
        && !text.starts_with(['-', '.']);
    match is_good {
        true => Ok(text.to_owned()),
        false => {
            Err(format!("`{text}` cannot be the name of a network interface; `ip link` lists them"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_ends_are_fit_for_folders() {
        for good in ["laptop", "server-1", "a.b_c", "Müllers_Büro", &"x".repeat(63)] {
            assert_eq!(good.parse::<EndName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", ".hidden", "-x", "a/b", "a b", "a\n", "a=b", &"x".repeat(64)] {
            assert!(bad.parse::<EndName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_of_nics_are_nothing_to_a_shell() {
        for good in ["eth0", "enp3s0.20", "vlan_20", "wan-1"] {
            assert_eq!(nic(good), Ok(good.to_owned()));
        }
        for bad in ["", "eth0;reboot", "$(x)", "a b", "-A", "sixteen-letters-", "`x`", "a|b"] {
            assert!(nic(bad).is_err(), "{bad}");
        }
    }
}
