//! Where load may go: only to the address and by the interface that were named.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use wg_common::headers::PROTOCOL_UDP;
use wg_userspace::host::{AskedRoute, Host, RouteTo};

/// The way to a destination that may have load.
#[derive(Clone, Debug)]
pub struct Way {
    /// Index of the interface; 0: the destination is this host.
    pub link: u32,
    /// Its name.
    pub nic: String,
    /// Its MTU.
    pub mtu: u32,
    /// This host's address on the way.
    pub source: IpAddr,
    /// Who gets the frames: a router, or the destination.
    pub neighbour: IpAddr,
    /// Its own MAC address, if it is an Ethernet of which we know how to send frames.
    pub mac: Option<[u8; 6]>,
}

/// The name of the interface to oneself.
const LOOPBACK: &str = "lo";

/// Refuses what is no address of one host.
///
/// # Errors
/// If it is not specified, or stands for several hosts.
pub fn check_address(address: IpAddr) -> Result<()> {
    let address = address.to_canonical();
    ensure!(!address.is_unspecified(), "{address} is no destination: it names no host");
    ensure!(!address.is_multicast(), "{address} is multicast: load goes to one host only");
    let is_broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    ensure!(!is_broadcast, "{address} is broadcast: load goes to one host only");
    Ok(())
}

/// Refuses what is no address and port of one host.
///
/// # Errors
/// As [`check_address`], or if the port is 0.
pub fn check_destination(to: SocketAddr) -> Result<()> {
    check_address(to.ip())?;
    ensure!(to.port() != 0, "{to} has no port");
    Ok(())
}

/// The way to a destination, which may have load, by the interface that was named, if one was.
///
/// # Errors
/// As [`check_destination`]; if there is no route, if it leads to several hosts, or leaves by another interface.
pub fn way(to: SocketAddr, nic: Option<&str>) -> Result<Way> {
    check_destination(to)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let way = runtime.block_on(find(to))?;
    if let Some(nic) = nic {
        check_interface(to, &way.nic, nic)?;
    }
    Ok(way)
}

/// Refuses an interface that is not the one that was named.
fn check_interface(to: SocketAddr, found: &str, named: &str) -> Result<()> {
    ensure!(
        found == named,
        "the route to {to} leaves by {found}, not by {named}: nothing is sent; `ip route get {}` shows it",
        to.ip()
    );
    Ok(())
}

async fn find(to: SocketAddr) -> Result<Way> {
    let host = Host::new()?;
    let asked = AskedRoute {
        source: None,
        destination: to.ip(),
        link_in: 0,
        mark: 0,
        protocol: PROTOCOL_UDP,
        ports: None,
    };
    let found = match host.ask_route(&asked).await? {
        Ok(found) => found,
        Err(why) => bail!("there is no way to {to} ({})", why.name()),
    };
    let index = match found.to {
        RouteTo::Link(index) => index,
        RouteTo::Local => host.link_index(LOOPBACK).await?,
        RouteTo::Several => bail!("{to} stands for several hosts: load goes to one only"),
    };
    let link = host.link_by_index(index).await?.context("the interface of the route is gone")?;
    let neighbour = found.router.unwrap_or(to.ip());
    Ok(Way {
        link: index,
        nic: link.name,
        mtu: link.mtu,
        // A route to oneself may name none.
        source: found.own_source.unwrap_or(to.ip()),
        neighbour,
        mac: link.ethernet,
    })
}

impl Way {
    /// The MAC address of who gets the frames, as the kernel knows it: it does once something was sent there.
    ///
    /// # Errors
    /// If it does not.
    pub fn neighbour_mac(&self) -> Result<[u8; 6]> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let neighbours = runtime.block_on(async { Host::new()?.neighbours().await })?;
        let of = (self.link, self.neighbour);
        neighbours.get(&of).map(|neighbour| neighbour.mac).with_context(|| {
            format!("the MAC address of {} on {} is not known", self.neighbour, self.nic)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_host_can_be_a_destination() {
        for address in
            ["0.0.0.0", "::", "224.0.0.1", "239.255.255.250", "ff02::1", "255.255.255.255"]
        {
            assert!(check_address(address.parse().unwrap()).is_err(), "{address}");
        }
        for address in ["::ffff:224.0.0.1", "::ffff:0.0.0.0", "::ffff:255.255.255.255"] {
            assert!(check_address(address.parse().unwrap()).is_err(), "{address}");
        }
        for address in ["198.51.100.1", "2001:db8::1", "127.0.0.1"] {
            assert!(check_address(address.parse().unwrap()).is_ok(), "{address}");
        }
        assert!(check_destination("198.51.100.1:0".parse().unwrap()).is_err());
    }

    #[test]
    fn a_route_by_another_interface_is_refused() {
        let to = "127.0.0.1:9".parse().unwrap();
        assert_eq!(way(to, Some("lo")).unwrap().nic, "lo");
        assert_eq!(way(to, None).unwrap().source, to.ip());
        let error = way(to, Some("eth0")).unwrap_err().to_string();
        assert!(error.contains("leaves by lo, not by eth0"), "{error}");
    }
}
