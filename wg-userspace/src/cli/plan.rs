//! What `up` will do, worked out from a config file before anything is done.

use std::{collections::HashMap, net::SocketAddr};

use ipnet::IpNet;
use wg_common::protocol::DEFAULT_MTU;

use super::{
    Failure,
    args::DataPathArgs,
    difference::Label,
    dns,
    forwarding::{self, Setting},
    hooks,
    ledger::Hook,
    name::InterfaceName,
    nic_settings,
    steps::{RuleKind, Step},
    tables,
};
use crate::{
    config::{self, Config, Endpoint, HookEvent, Table},
    daemon,
    device::SetRequest,
    host::{Family, MAIN_TABLE},
    nat,
};

/// Bytes that a tunnel adds to an inner packet at most: IPv6 and UDP headers, and the overhead
/// of transport data. wg-quick takes them off whatever the endpoint's family is.
const OUTER_OVERHEAD: u32 = 80;

/// MTU of the way to an endpoint that nobody knows.
const PATH_MTU_DEFAULT: u32 = 1500;
const _: () = assert!((PATH_MTU_DEFAULT - OUTER_OVERHEAD) as usize == DEFAULT_MTU);

/// The first table that is tried for default routes; the next ones follow.
pub const POLICY_TABLE: u32 = 51820;

/// What reverse path filters need when answers are looked up by their mark.
pub const SRC_VALID_MARK: &str = "net/ipv4/conf/all/src_valid_mark";

/// Everything that `up` does.
pub struct Plan {
    /// How the daemon is started.
    pub daemon: daemon::Options,
    /// Whether rules of the firewall that XDP goes round may stay without effect.
    pub bypasses_firewall: bool,
    /// The port that the file says, if it is not left to the kernel.
    pub listen_port: Option<u16>,
    /// Addresses of the interface.
    pub addresses: Vec<IpNet>,
    /// Its MTU, if the file says one.
    pub mtu: Option<u32>,
    /// Name servers.
    pub dns_servers: Vec<String>,
    /// Search domains.
    pub dns_search: Vec<String>,
    /// Where routes go.
    pub routes_to: RoutesTo,
    /// Mark of the device's datagrams, if the file says one.
    pub mark: Option<u32>,
    /// What the peers own: the longest first, each once.
    pub allowed_ips: Vec<IpNet>,
    /// What the host needs so that it forwards what the file's lines are about.
    pub settings: Vec<Setting>,
    /// Number of peers.
    pub peer_count: usize,
    /// `PreUp`
    pub pre_up: Vec<Hook>,
    /// `PostUp`
    pub post_up: Vec<Hook>,
    /// `PreDown` and `PostDown`
    pub down_hooks: Vec<Hook>,
}

/// Where the routes of allowed IPs go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RoutesTo {
    /// The main table; default routes into one of their own.
    Auto,
    /// Nowhere.
    Nowhere,
    /// This table, default routes as well.
    Table(u32),
}

/// What the daemon is configured with, once names are resolved.
pub struct Configuration {
    /// The request, as `wg setconf` would make it.
    pub request: SetRequest,
    /// Where the peers are.
    pub endpoints: Vec<SocketAddr>,
}

impl Configuration {
    /// Asks `resolve` for the address of each host name with a port.
    ///
    /// # Errors
    /// Those of `resolve`.
    pub fn new(
        config: &Config,
        resolve: impl Fn(&str, u16) -> Result<SocketAddr, Failure>,
    ) -> Result<Self, Failure> {
        let mut resolved: HashMap<(&str, u16), SocketAddr> = HashMap::new();
        for peer in &config.peers {
            if let Some(Endpoint::Host { host, port }) = peer.endpoint.as_deref() {
                let address = resolve(host, *port)
                    .map_err(|failure| failure.within(format_args!("peer {}", Label(peer))))?;
                resolved.insert((host, *port), address);
            }
        }
        let address_of = |endpoint: &Endpoint| match endpoint {
            Endpoint::Address(address) => Some(*address),
            Endpoint::Host { host, port } => resolved.get(&(host.as_str(), *port)).copied(),
        };
        let request = SetRequest::replacing(config, address_of);
        let endpoints = request.peers.iter().filter_map(|peer| peer.endpoint).collect();
        Ok(Self { request, endpoints })
    }
}

impl Plan {
    /// Works out what `up` does. What the command line says goes before what the file says.
    ///
    /// # Errors
    /// If the file names a routing table that the host does not have.
    pub fn new(
        interface: &InterfaceName,
        config: &Config,
        arguments: &DataPathArgs,
    ) -> Result<Self, Failure> {
        let words = config.interface.dns.iter().map(|word| word.as_str());
        let (dns_servers, dns_search) = dns::servers_and_search(words);
        let routes_to = match &config.interface.table {
            None => RoutesTo::Auto,
            Some(table) => match &table.value {
                Table::Auto => RoutesTo::Auto,
                Table::Off => RoutesTo::Nowhere,
                Table::Of(name) => RoutesTo::Table(
                    tables::number_of(name)
                        .map_err(|failure| failure.within(config.place(table.span)))?,
                ),
            },
        };
        let of_peers = config.peers.iter().flat_map(|peer| &peer.allowed_ips);
        let mut allowed_ips: Vec<IpNet> = of_peers.map(|prefix| prefix.value.trunc()).collect();
        // By length first: then no route is added that covers one still to come.
        allowed_ips.sort_by(|a, b| b.prefix_len().cmp(&a.prefix_len()).then(a.cmp(b)));
        allowed_ips.dedup();
        let hooks = |event| hooks::of(config, interface, event);
        Ok(Self {
            daemon: daemon_options(interface, config, arguments),
            bypasses_firewall: config.interface.xdp.as_ref().is_some_and(|xdp| xdp.bypass_firewall),
            listen_port: config
                .interface
                .listen_port
                .as_ref()
                .map(|port| port.value)
                .filter(|&port| port != 0),
            addresses: config.interface.addresses.iter().map(|address| address.value).collect(),
            mtu: config.interface.mtu.as_ref().map(|mtu| u32::from(mtu.value)),
            dns_servers,
            dns_search,
            routes_to,
            mark: config.interface.fwmark.as_ref().map(|mark| mark.value).filter(|&mark| mark != 0),
            allowed_ips,
            settings: forwarding::settings(&config.interface, &[]),
            peer_count: config.peers.len(),
            pre_up: hooks(HookEvent::PreUp),
            post_up: hooks(HookEvent::PostUp),
            down_hooks: [hooks(HookEvent::PreDown), hooks(HookEvent::PostDown)].concat(),
        })
    }

    /// The plan for a host on which routers have told of routes by these interfaces.
    pub fn with_routers(mut self, config: &Config, routers: &[String]) -> Self {
        self.settings = forwarding::settings(&config.interface, routers);
        self
    }

    /// Whether a table has to be found for default routes. A mark of the file names it as well.
    pub fn needs_policy_table(&self) -> bool {
        self.routes_to == RoutesTo::Auto && self.mark.is_none() && self.has_default_route()
    }

    fn has_default_route(&self) -> bool {
        self.allowed_ips.iter().any(|prefix| prefix.prefix_len() == 0)
    }

    /// The steps, in their order. `policy_table` is where default routes go, if one
    /// [was needed](Plan::needs_policy_table).
    pub fn steps(&self, policy_table: Option<u32>) -> Vec<Step> {
        let hooks = |hooks: &[Hook]| hooks.iter().cloned().map(Step::Hook).collect::<Vec<_>>();
        let mut steps = hooks(&self.pre_up);
        steps.extend([Step::Daemon, Step::Configure]);
        steps.extend(self.addresses.iter().copied().map(Step::Address));
        steps.push(Step::Mtu(self.mtu));
        let of_nics = nic_settings::settings(&self.daemon);
        steps.extend(of_nics.iter().chain(&self.settings).map(|(key, value)| {
            let value = (*value).to_owned();
            Step::Sysctl { key: key.clone(), value, before: None }
        }));
        steps.push(Step::LinkUp);
        // Search domains alone change nothing, as for wg-quick.
        if !self.dns_servers.is_empty() {
            let (servers, search) = (self.dns_servers.clone(), self.dns_search.clone());
            steps.push(Step::Dns { tool: None, servers, search });
        }
        steps.extend(self.route_steps(policy_table));
        steps.extend(hooks(&self.post_up));
        steps
    }

    fn route_steps(&self, policy_table: Option<u32>) -> Vec<Step> {
        let mut steps = Vec::new();
        let into = |table| move |&prefix: &IpNet| Step::Route { prefix, table };
        match self.routes_to {
            RoutesTo::Nowhere => {}
            RoutesTo::Table(table) => steps.extend(self.allowed_ips.iter().map(into(table))),
            RoutesTo::Auto => {
                let (default, other): (Vec<IpNet>, Vec<IpNet>) =
                    self.allowed_ips.iter().partition(|prefix| prefix.prefix_len() == 0);
                steps.extend(other.iter().map(into(MAIN_TABLE)));
                if let (None, Some(table), false) = (self.mark, policy_table, default.is_empty()) {
                    steps.push(Step::Mark(table));
                }
                if let Some(table) = self.mark.or(policy_table) {
                    steps.extend(default.into_iter().flat_map(|net| default_route(net, table)));
                }
            }
        }
        steps
    }
}

/// What sends everything but the device's own datagrams through the interface, and leaves more
/// specific routes as they are. The mark and the table have one number.
fn default_route(prefix: IpNet, table: u32) -> Vec<Step> {
    let family = Family::of(prefix);
    let rule = |kind| Step::Rule { family, kind, priority: None };
    let mut steps = vec![Step::Route { prefix, table }];
    if family == Family::V4 {
        let (key, value) = (SRC_VALID_MARK.to_owned(), "1".to_owned());
        steps.push(Step::Sysctl { key, value, before: None });
    }
    steps.extend([
        rule(RuleKind::NotMarked { mark: table, table }),
        rule(RuleKind::MainWithoutDefault),
        Step::Firewall { tool: None, family, mark: table, addresses: Vec::new() },
    ]);
    steps
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
        config::Mode::ZeroCopy => daemon::Mode::ZeroCopy,
        config::Mode::Native => daemon::Mode::Native,
        config::Mode::Udp => daemon::Mode::Udp,
    });
    let file_workers = config.interface.workers.as_ref().map(|workers| workers.value);
    daemon::Options {
        interfaces: vec![interface.as_str().to_owned()],
        // Configured right afterwards.
        rules: Vec::new(),
        nat: vec![nat::Lines::of(&config.interface)],
        xdp: arguments.xdp().map_or_else(file_nics, <[String]>::to_vec),
        by_socket: Vec::new(),
        mode: arguments.mode.or(file_mode).unwrap_or(daemon::Mode::Auto),
        busy_poll: arguments.busy_poll || file.is_some_and(|xdp| xdp.busy_poll),
        aead: arguments.aead,
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

    fn plan_of(text: &str, arguments: &DataPathArgs) -> Plan {
        let config = config::parse("wg0.conf", text).unwrap();
        assert!(config.unsupported().is_empty());
        Plan::new(&"wg0".parse().unwrap(), &config, arguments)
            .unwrap_or_else(|_| panic!("it is good"))
    }

    fn configuration(
        resolve: impl Fn(&str, u16) -> Result<SocketAddr, Failure>,
    ) -> Result<Configuration, Failure> {
        Configuration::new(&config::parse("wg0.conf", FILE).unwrap(), resolve)
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
        let configuration = configuration(laptop).unwrap_or_else(|_| panic!("it is good"));
        let endpoints = ["10.0.0.7:7", "[fd00::1]:8"].map(|text| text.parse().unwrap());
        let request = configuration.request;
        assert_eq!(request.listen_port, Some(51820));
        assert_eq!(request.fwmark, Some(16));
        assert!(request.replace_peers);
        assert_eq!(request.peers.len(), 2);
        assert_eq!(request.peers[0].endpoint, Some(endpoints[0]));
        assert_eq!(request.peers[1].endpoint, Some(endpoints[1]));
        assert_eq!(configuration.endpoints, endpoints);

        let plan = plan_of(FILE, &DataPathArgs::default());
        assert_eq!(plan.addresses, ["10.9.0.1/24", "fd09::1/64"].map(|net| net.parse().unwrap()));
        assert_eq!((plan.mtu, plan.mark), (Some(1380), Some(16)));
        let allowed = ["fd09::2/128", "10.9.0.2/32", "192.168.7.0/24"];
        assert_eq!(plan.allowed_ips, allowed.map(|net| net.parse().unwrap()));
        assert_eq!(plan.peer_count, 2);
    }

    /// The steps of a file with these lines, as somebody would type them.
    fn steps(lines: &str, allowed_ips: &str) -> Vec<String> {
        let text = format!(
            "[Interface]\nPrivateKey = SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=\n{lines}\n\
             [Peer]\nPublicKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\
             AllowedIPs = {allowed_ips}\n"
        );
        let plan = plan_of(&text, &DataPathArgs::default());
        let table = plan.needs_policy_table().then_some(51821);
        let interface = "wg0".parse().unwrap();
        let steps = plan.steps(table);
        steps.iter().flat_map(|step| step.shown(&interface)).collect()
    }

    #[test]
    fn steps_are_in_the_order_of_wg_quick() {
        let lines = "Address = 10.9.0.2/24\nMTU = 1400\nDNS = 10.9.0.1, lan\nPostUp = echo %i\n\
            PreUp = first %i\nPreUp = second\nPostDown = last\n";
        let expected = "\
            first wg0\n\
            second\n\
            tidegate run wg0\n\
            wg setconf wg0 /dev/fd/63\n\
            ip -4 address add 10.9.0.2/24 dev wg0\n\
            ip link set mtu 1400 dev wg0\n\
            ip link set up dev wg0\n\
            resolvconf -a wg0 -m 0 -x\n\
            ip -4 route add 10.1.0.0/16 dev wg0\n\
            ip -4 route add 10.0.0.0/8 dev wg0\n\
            wg set wg0 fwmark 51821\n\
            ip -4 route add 0.0.0.0/0 dev wg0 table 51821\n\
            sysctl -q net.ipv4.conf.all.src_valid_mark=1\n\
            ip -4 rule add not fwmark 51821 table 51821\n\
            ip -4 rule add table main suppress_prefixlength 0\n\
            iptables-restore -n\n\
            ip -6 route add ::/0 dev wg0 table 51821\n\
            ip -6 rule add not fwmark 51821 table 51821\n\
            ip -6 rule add table main suppress_prefixlength 0\n\
            ip6tables-restore -n\n\
            echo wg0";
        let steps = steps(lines, "0.0.0.0/0, 10.0.0.0/8, ::/0, 10.1.0.0/16, 10.0.0.0/8");
        assert_eq!(steps.join("\n"), expected);
    }

    #[test]
    fn a_mark_of_the_file_names_the_table() {
        let steps = steps("FwMark = 0x10", "0.0.0.0/0").join("\n");
        assert!(!steps.contains("wg set wg0 fwmark"), "{steps}");
        assert!(steps.contains("rule add not fwmark 16 table 16\n"), "{steps}");
        let off = self::steps("FwMark = off", "0.0.0.0/0").join("\n");
        assert!(off.contains("wg set wg0 fwmark 51821\n"), "{off}");
    }

    #[test]
    fn a_table_gets_every_route_and_no_rules() {
        let routes = |table: &str| {
            let steps = steps(&format!("Table = {table}"), "0.0.0.0/0, 10.9.0.0/24");
            steps
                .into_iter()
                .filter(|step| step.contains("rule") || step.contains("route"))
                .collect::<Vec<_>>()
        };
        let expected = [
            "ip -4 route add 10.9.0.0/24 dev wg0 table 100",
            "ip -4 route add 0.0.0.0/0 dev wg0 table 100",
        ];
        assert_eq!(routes("100"), expected);
        assert_eq!(routes("off"), [""; 0]);
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let options = |line: &str| plan_of(FILE, &arguments(line)).daemon;
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
        let failure = configuration(|_, _| {
            Err(Failure::new(Code::Runtime, "endpoint `laptop.example:7`: not found"))
        });
        let line = failure.err().expect("it fails").into_line().1;
        let key = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
        let line = line.replacen(key, "KEY", 1);
        assert_eq!(line, "peer laptop (KEY): endpoint `laptop.example:7`: not found");
    }

    #[test]
    fn the_mtu_is_that_of_wg_quick() {
        assert_eq!(tunnel_mtu(&[], None), 1420);
        assert_eq!(tunnel_mtu(&[], Some(1492)), 1412);
        assert_eq!(tunnel_mtu(&[1500, 9000, 1492], Some(1300)), 8920);
        assert_eq!(tunnel_mtu(&[60], None), 0);
    }
}
