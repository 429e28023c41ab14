//! What `up` will do, worked out from a config file before anything is done.

use std::{collections::HashMap, net::SocketAddr};

use ipnet::IpNet;
use wg_common::protocol::DEFAULT_MTU;

use super::{Failure, args::DataPathArgs, name::InterfaceName};
use crate::{
    config::{self, Config, Endpoint, PeerConfig},
    daemon,
    device::SetRequest,
};

/// Bytes that a tunnel adds to an inner packet at most: IPv6 and UDP headers, and the overhead
/// of transport data. wg-quick takes them off whatever the endpoint's family is.
const OUTER_OVERHEAD: u32 = 80;

/// MTU of the way to an endpoint that nobody knows.
const PATH_MTU_DEFAULT: u32 = 1500;
const _: () = assert!((PATH_MTU_DEFAULT - OUTER_OVERHEAD) as usize == DEFAULT_MTU);

/// Everything that `up` does.
pub struct Plan {
    /// How the daemon is started.
    pub daemon: daemon::Options,
    /// The request that configures it, as `wg setconf` would.
    pub request: SetRequest,
    /// Addresses of the interface.
    pub addresses: Vec<IpNet>,
    /// Its MTU, if the file says one.
    pub mtu: Option<u32>,
    /// Where the peers are.
    pub endpoints: Vec<SocketAddr>,
    /// What the peers own.
    pub allowed_ips: Vec<IpNet>,
    /// Number of peers.
    pub peer_count: usize,
}

impl Plan {
    /// Works out what `up` does. What the command line says goes before what the file says.
    ///
    /// # Errors
    /// Those of `resolve`, which gives the address of a host name with a port.
    pub fn new(
        interface: &InterfaceName,
        config: &Config,
        arguments: &DataPathArgs,
        resolve: impl Fn(&str, u16) -> Result<SocketAddr, Failure>,
    ) -> Result<Self, Failure> {
        let mut resolved: HashMap<(&str, u16), SocketAddr> = HashMap::new();
        for peer in &config.peers {
            if let Some(Endpoint::Host { host, port }) = peer.endpoint.as_deref() {
                let address = resolve(host, *port)
                    .map_err(|failure| failure.within(format_args!("peer {}", label(peer))))?;
                resolved.insert((host, *port), address);
            }
        }
        let address_of = |endpoint: &Endpoint| match endpoint {
            Endpoint::Address(address) => Some(*address),
            Endpoint::Host { host, port } => resolved.get(&(host.as_str(), *port)).copied(),
        };
        let request = SetRequest::replacing(config, address_of);
        let allowed_ips = config.peers.iter().flat_map(|peer| &peer.allowed_ips);
        Ok(Self {
            daemon: daemon_options(interface, config, arguments),
            endpoints: request.peers.iter().filter_map(|peer| peer.endpoint).collect(),
            request,
            addresses: config.interface.addresses.iter().map(|address| address.value).collect(),
            mtu: config.interface.mtu.as_ref().map(|mtu| u32::from(mtu.value)),
            allowed_ips: allowed_ips.map(|prefix| prefix.value).collect(),
            peer_count: config.peers.len(),
        })
    }
}

/// What people call a peer.
fn label(peer: &PeerConfig) -> String {
    match &peer.name {
        Some(name) => name.value.clone(),
        None => peer.public_key.to_string(),
    }
}

fn daemon_options(
    interface: &InterfaceName,
    config: &Config,
    arguments: &DataPathArgs,
) -> daemon::Options {
    let file = config.interface.xdp.as_ref();
    let file_nics = || {
        let nics = file.iter().flat_map(|xdp| &xdp.interfaces);
        nics.map(|nic| nic.value.clone()).collect()
    };
    let file_mode = file.and_then(|xdp| xdp.mode.as_ref()).map(|mode| match mode.value {
        config::Mode::Auto => daemon::Mode::Auto,
        config::Mode::Native => daemon::Mode::Native,
        config::Mode::Udp => daemon::Mode::Udp,
    });
    let file_workers = config.interface.workers.as_ref().map(|workers| workers.value);
    daemon::Options {
        interface: interface.as_str().to_owned(),
        xdp: arguments.xdp().map_or_else(file_nics, <[String]>::to_vec),
        mode: arguments.mode.or(file_mode).unwrap_or(daemon::Mode::Auto),
        workers: arguments.workers.map(usize::from).or(file_workers),
        peer_source: arguments.peer_source.clone(),
    }
}

/// MTU of the tunnel, by the MTUs of the ways to its endpoints, or else of the default route:
/// the greatest, as wg-quick takes it.
pub fn tunnel_mtu(paths: &[u32], default_route: Option<u32>) -> u32 {
    let path = paths.iter().copied().max().or(default_route).unwrap_or(PATH_MTU_DEFAULT);
    path.saturating_sub(OUTER_OVERHEAD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Code, args};

    const FILE: &str = "\
        [Interface]\n\
        PrivateKey = SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=\n\
        ListenPort = 51820\n\
        FwMark = 0x10\n\
        Address = 10.9.0.1/24, fd09::1/64\n\
        MTU = 1380\n\
        #! Xdp = eth0,eth1 mode=native\n\
        #! Workers = 3\n\
        [Peer]\n\
        #! Name = laptop\n\
        PublicKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\
        PresharedKey = IiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiI=\n\
        AllowedIPs = 10.9.0.2/32, fd09::2/128\n\
        Endpoint = laptop.example:7\n\
        PersistentKeepalive = 25\n\
        [Peer]\n\
        PublicKey = AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n\
        AllowedIPs = 192.168.7.9/24\n\
        Endpoint = [fd00::1]:8\n";

    fn plan(
        arguments: &DataPathArgs,
        resolve: impl Fn(&str, u16) -> Result<SocketAddr, Failure>,
    ) -> Result<Plan, Failure> {
        let config = config::parse("wg0.conf", FILE).unwrap();
        assert!(config.unsupported().is_empty());
        Plan::new(&"wg0".parse().unwrap(), &config, arguments, resolve)
    }

    fn arguments(line: &str) -> DataPathArgs {
        match args::parse(line.split_whitespace().map(Into::into).collect()) {
            Ok(args::Command::Up(up)) => up.data_path,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn laptop(host: &str, port: u16) -> Result<SocketAddr, Failure> {
        assert_eq!((host, port), ("laptop.example", 7));
        Ok("10.0.0.7:7".parse().unwrap())
    }

    #[test]
    fn a_file_becomes_one_request() {
        let plan = plan(&DataPathArgs::default(), laptop).unwrap_or_else(|_| panic!("it is good"));
        let endpoints = ["10.0.0.7:7", "[fd00::1]:8"].map(|text| text.parse().unwrap());
        assert_eq!(plan.request.listen_port, Some(51820));
        assert_eq!(plan.request.fwmark, Some(16));
        assert!(plan.request.replace_peers);
        assert_eq!(plan.request.peers.len(), 2);
        assert_eq!(plan.request.peers[0].endpoint, Some(endpoints[0]));
        assert_eq!(plan.request.peers[1].endpoint, Some(endpoints[1]));
        assert_eq!(plan.endpoints, endpoints);
        assert_eq!(plan.addresses, ["10.9.0.1/24", "fd09::1/64"].map(|net| net.parse().unwrap()));
        assert_eq!(plan.mtu, Some(1380));
        let allowed = ["10.9.0.2/32", "fd09::2/128", "192.168.7.0/24"];
        assert_eq!(plan.allowed_ips, allowed.map(|net| net.parse().unwrap()));
        assert_eq!(plan.peer_count, 2);
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let options = |line: &str| {
            plan(&arguments(line), laptop).unwrap_or_else(|_| panic!("it is good")).daemon
        };
        let file = options("tidegate up wg0");
        assert_eq!(file.xdp, ["eth0", "eth1"]);
        assert_eq!((file.mode, file.workers), (daemon::Mode::Native, Some(3)));
        let line = options("tidegate up wg0 --xdp eth5 --mode udp --workers 1");
        assert_eq!(line.xdp, ["eth5"]);
        assert_eq!((line.mode, line.workers), (daemon::Mode::Udp, Some(1)));
        assert!(options("tidegate up wg0 --xdp=").xdp.is_empty());
    }

    #[test]
    fn a_name_that_is_not_found_says_whose_it_is() {
        let failure = plan(&DataPathArgs::default(), |_, _| {
            Err(Failure::new(Code::Runtime, "endpoint `laptop.example:7`: not found"))
        });
        let line = failure.err().expect("it fails").into_line().1;
        assert_eq!(line, "peer laptop: endpoint `laptop.example:7`: not found");
    }

    #[test]
    fn the_mtu_is_that_of_wg_quick() {
        assert_eq!(tunnel_mtu(&[], None), 1420);
        assert_eq!(tunnel_mtu(&[], Some(1492)), 1412);
        assert_eq!(tunnel_mtu(&[1500, 9000, 1492], Some(1300)), 8920);
        assert_eq!(tunnel_mtu(&[60], None), 0);
    }
}
