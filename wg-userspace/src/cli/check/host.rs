//! What only this host can say of a file: who may read it, which names and ports there are, and
//! what `up` would do here.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket},
    os::unix::fs::MetadataExt,
    time::Duration,
};

use ipnet::IpNet;

use super::{
    super::{
        Failure,
        args::DataPathArgs,
        forwarding,
        name::InterfaceName,
        plan::{POLICY_TABLE, Plan},
        tables, up,
    },
    files::File,
};
use crate::{
    check::{Finding, Rule, Severity},
    config::{Config, Endpoint, HookEvent, Span, Spanned, Table},
    host::Host,
};

/// How long names of endpoints are waited for, all together.
const NAMES_MAX: Duration = Duration::from_secs(5);
/// Endpoints to which the way is asked for.
const WAYS_MAX: usize = 64;
/// Bytes that a tunnel adds to a packet, by the family of the endpoint.
const OVERHEAD_V4: u32 = 60;
const OVERHEAD_V6: u32 = 80;

/// The addresses of names, with their ports; none if a name is not found.
type Names = HashMap<(String, u16), Result<Vec<SocketAddr>, String>>;

/// What `up` would do, as far as the file alone tells.
pub fn plan_offline(file: &mut File, findings: &[Finding]) -> Result<(), Failure> {
    let Ok(interface) = file.interface.parse::<InterfaceName>() else { return Ok(()) };
    let Some(config) = file.config.as_ref().filter(|_| file.is_good(findings)) else {
        return Ok(());
    };
    // Names of tables are this host's.
    let is_named = |name: &str| !name.starts_with(|c: char| c.is_ascii_digit());
    if matches!(config.interface.table.as_deref(), Some(Table::Of(name)) if is_named(name)) {
        return Ok(());
    }
    let plan = Plan::new(&interface, config, &DataPathArgs::default())?;
    let table = plan.needs_policy_table().then_some(POLICY_TABLE);
    let steps = up::planned_steps(&plan, table);
    file.plan = shown(steps.iter().flat_map(|step| step.shown(&interface)));
    Ok(())
}

/// Lines of a plan, without keys that may stand in hooks.
fn shown(lines: impl Iterator<Item = String>) -> Vec<String> {
    lines.map(|line| crate::config::shown(&line)).collect()
}

/// Adds what this host says to the findings of each file, and the plans.
pub async fn look(files: &mut [File], findings: &mut [Vec<Finding>]) -> Result<(), Failure> {
    let host = Host::new().map_err(|error| {
        Failure::from(error).within("asking this host, which `--offline` does not")
    })?;
    let names = resolved(files).await;
    for (index, (file, findings)) in files.iter_mut().zip(findings).enumerate() {
        findings.extend(access(file, index));
        findings.extend(file_name(file, index));
        let Some(config) = &file.config else { continue };
        let at = At { index, config };
        findings.extend(at.names(&names));
        findings.extend(at.table());
        findings.extend(at.forwarding());
        findings.extend(at.nics(&host, &file.interface).await?);
        findings.extend(at.networks(&host, &file.interface).await?);
        let interface = file.interface.parse::<InterfaceName>().ok();
        let is_up = match &interface {
            Some(interface) => host.link(interface.as_str()).await?.is_some(),
            None => false,
        };
        // If it is up, the port may be its own.
        if !is_up {
            findings.extend(at.port());
        }
        if let Some(fact) = at.mtu(&host, &names).await? {
            findings.retain(|finding| finding.rule != Rule::MtuTooLarge);
            findings.extend(fact);
        }
        let Some(interface) = interface else { continue };
        if !file.is_good(findings) {
            continue;
        }
        let plan = Plan::new(&interface, config, &DataPathArgs::default())?;
        let plan = plan.with_routers(config, &forwarding::with_routers());
        findings.extend(at.firewall(&plan));
        let refusals = forwarding::refusals(interface.as_str(), config);
        let refusals = refusals.into_iter().chain(forwarding::beyond(config));
        findings.extend(refusals.map(|refusal| refusal.finding(index)));
        if file.is_good(findings) {
            match up::dry_run(&interface, &host, config, &plan).await {
                Ok(lines) => file.plan = shown(lines.into_iter()),
                // All else is worth showing.
                Err(failure) => failure.within("what `up` would do is not known").print(),
            }
        }
    }
    Ok(())
}

/// Looks up all names of endpoints at once.
async fn resolved(files: &[File]) -> Names {
    let peers = files.iter().filter_map(|file| file.config.as_ref()).flat_map(|c| &c.peers);
    let mut tasks = HashMap::new();
    for peer in peers {
        if let Some(Endpoint::Host { host, port }) = peer.endpoint.as_deref() {
            tasks.entry((host.clone(), *port)).or_insert_with(|| {
                let (host, port) = (host.clone(), *port);
                tokio::task::spawn_blocking(move || (host.as_str(), port).to_socket_addrs())
            });
        }
    }
    let end = tokio::time::Instant::now() + NAMES_MAX;
    let mut names = Names::new();
    for (name, task) in tasks {
        let answer = match tokio::time::timeout_at(end, task).await {
            Ok(Ok(Ok(addresses))) => Ok(addresses.collect()),
            Ok(Ok(Err(error))) => Err(error.to_string()),
            Ok(Err(_)) => continue,
            Err(_) => Err(format!("no answer within {} s", NAMES_MAX.as_secs())),
        };
        names.insert(name, answer);
    }
    names
}

/// Who may read and change the file.
fn access(file: &File, index: usize) -> Option<Finding> {
    const WRITE_OF_OTHERS: u32 = 0o022;
    let found = |message: String, label: &str, help: String| {
        let span = file
            .config
            .as_ref()
            .map_or(Span::new(0.into(), 0), |config| config.interface.private_key.span);
        let finding = Finding::new(Severity::Warning, Rule::FileAccess, message);
        Some(finding.at(index, span, label).help(help))
    };
    let metadata = file.path.metadata().ok().filter(fs::Metadata::is_file)?;
    let path = file.path.display();
    if metadata.mode() & WRITE_OF_OTHERS != 0 {
        let message = format!("others than its owner may change {path}, whose hooks run as root");
        return found(message, "and read this key", format!("`chmod 600 {path}`"));
    }
    if up::is_world_accessible(&file.path).unwrap_or(false) {
        let message = format!("everybody may read {path} and the keys in it");
        return found(message, "this key", format!("`chmod 600 {path}`"));
    }
    let own = rustix::process::geteuid().as_raw();
    if ![0, own].contains(&metadata.uid()) {
        let message = format!(
            "{path} belongs to user {}, who may have root run any hook by it",
            metadata.uid()
        );
        return found(message, "this key is known there", format!("`chown root {path}`"));
    }
    None
}

fn file_name(file: &File, index: usize) -> Option<Finding> {
    let is_conf = file.path.extension().is_some_and(|extension| extension == "conf");
    let error = match file.interface.parse::<InterfaceName>() {
        Ok(_) if is_conf => return None,
        Ok(_) => "it is not called NAME.conf".to_owned(),
        Err(error) => error.to_string(),
    };
    let message = format!("`up` does not take {}: {error}", file.path.display());
    let finding = Finding::new(Severity::Warning, Rule::FileName, message);
    let finding = finding.at(index, Span::new(0.into(), 0), "in this file");
    Some(finding.help("the interface is called like the file: rename it, such as wg0.conf"))
}

/// A file that can be read, and its index.
#[derive(Clone, Copy)]
struct At<'a> {
    index: usize,
    config: &'a Config,
}

impl At<'_> {
    fn found(
        &self,
        (severity, rule): (Severity, Rule),
        message: impl Into<String>,
        span: Span,
        label: impl Into<String>,
    ) -> Finding {
        Finding::new(severity, rule, message).at(self.index, span, label)
    }

    fn names(&self, names: &Names) -> Vec<Finding> {
        let mut found = Vec::new();
        let mut seen = BTreeSet::new();
        for endpoint in self.config.peers.iter().filter_map(|peer| peer.endpoint.as_ref()) {
            let Endpoint::Host { host, port } = &endpoint.value else { continue };
            let Some(Err(error)) = names.get(&(host.clone(), *port)) else { continue };
            if seen.insert(host) {
                let kind = (Severity::Warning, Rule::NameNotFound);
                let message = format!("`{host}` is not found from here: {error}");
                let help = "correct the name, or try again where the file will be used; `up` fails \
                            as long as a name is not found";
                found.push(self.found(kind, message, endpoint.span, "this name").help(help));
            }
        }
        found
    }

    fn table(&self) -> Option<Finding> {
        let table = self.config.interface.table.as_ref()?;
        let Table::Of(name) = &table.value else { return None };
        let line = tables::number_of(name).err()?.line();
        Some(self.found((Severity::Error, Rule::TableUnknown), line, table.span, "this name"))
    }

    /// Each interface that is named and not there, where it is named first. The tunnel's own is
    /// there once it is up.
    async fn nics(&self, host: &Host, interface: &str) -> Result<Vec<Finding>, Failure> {
        let config = &self.config.interface;
        let xdp = config.xdp.iter().flat_map(|xdp| &xdp.interfaces);
        let xdp = xdp.map(|nic| (nic, "named for XDP"));
        let nat = config.nat.iter().map(|nat| (&nat.out, "named for NAT"));
        let forward = config.forward.iter();
        let forward = forward.map(|forward| (&forward.interface, "named for forwarding"));
        let is_other = |nic: &Spanned<String>| nic.value != interface;
        let mut seen = BTreeSet::new();
        let mut found = Vec::new();
        for (nic, label) in xdp.chain(nat.chain(forward).filter(|(nic, _)| is_other(nic))) {
            if seen.insert(&nic.value) && host.link(nic).await?.is_none() {
                let kind = (Severity::Warning, Rule::NicMissing);
                let message = format!("this host has no network interface {}", nic.value);
                let finding = self.found(kind, message, nic.span, label);
                found.push(finding.help("`ip link` lists the interfaces"));
            }
        }
        Ok(found)
    }

    /// Networks of peers that are networks of other interfaces as well.
    async fn networks(&self, host: &Host, interface: &str) -> Result<Vec<Finding>, Failure> {
        let interface_config = &self.config.interface;
        let is_auto =
            interface_config.table.as_ref().is_none_or(|table| table.value == Table::Auto);
        let of_peers = self.config.peers.iter().flat_map(|peer| &peer.allowed_ips);
        let mut found = Vec::new();
        for address in host.addresses().await? {
            let here = address.net.trunc();
            let is_link_local = |ip| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
            if here.addr().is_loopback() || is_link_local(here.addr()) {
                continue;
            }
            let is_of_another = |net: &&Spanned<IpNet>| here.contains(&net.trunc());
            let routed = of_peers.clone().filter(|net| is_auto && net.prefix_len() > 0);
            let mut all = interface_config.addresses.iter().chain(routed);
            let Some(net) = all.find(is_of_another) else { continue };
            let link = host.link_by_index(address.link_index).await?;
            let Some(link) = link.filter(|link| link.name != interface) else { continue };
            let kind = (Severity::Warning, Rule::NetworkHere);
            let message = format!(
                "{} lies in {here}, which is the network of {} here: its hosts would be looked for \
                 in the tunnel",
                net.value, link.name
            );
            found.push(self.found(kind, message, net.span, "sent into the tunnel").help(
                "give one of the two networks other addresses; or check the file on the host where \
                 it will be used",
            ));
        }
        Ok(found)
    }

    fn port(&self) -> Option<Finding> {
        let port = self.config.interface.listen_port.as_ref().filter(|port| port.value != 0)?;
        let is_in_use = |address: IpAddr| match UdpSocket::bind((address, port.value)) {
            Ok(_) => Some(false),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Some(true),
            Err(_) => None,
        };
        let [v4, v6] = [[0; 4].into(), [0; 16].into()];
        // A socket for IPv6 takes the port of IPv4 as well.
        if !is_in_use(v6).or_else(|| is_in_use(v4))? {
            return None;
        }
        let kind = (Severity::Warning, Rule::PortInUse);
        let message = format!("UDP port {} of this host is in use by another program", port.value);
        let finding = self.found(kind, message, port.span, "`up` fails while it is");
        Some(finding.help(format!(
            "`ss -ulnp sport = {}` says which; choose another ListenPort, and write it into the \
             Endpoint at the other side",
            port.value
        )))
    }

    /// None if the host says nothing about it.
    async fn mtu(&self, host: &Host, names: &Names) -> Result<Option<Vec<Finding>>, Failure> {
        let Some(mtu) = &self.config.interface.mtu else { return Ok(None) };
        let mut ways = 0;
        for endpoint in self.config.peers.iter().filter_map(|peer| peer.endpoint.as_ref()) {
            let ip = match &endpoint.value {
                Endpoint::Address(address) => address.ip(),
                Endpoint::Host { host, port } => match names.get(&(host.clone(), *port)) {
                    Some(Ok(addresses)) if !addresses.is_empty() => addresses[0].ip(),
                    _ => continue,
                },
            };
            if ways == WAYS_MAX {
                break;
            }
            let Some(path) = host.path_mtu(ip).await? else { continue };
            ways += 1;
            if let Some(finding) = self.mtu_of_way(mtu, endpoint, ip, path) {
                return Ok(Some(vec![finding]));
            }
        }
        Ok((ways > 0).then(Vec::new))
    }

    fn mtu_of_way(
        &self,
        mtu: &Spanned<u16>,
        endpoint: &Spanned<Endpoint>,
        ip: IpAddr,
        path: u32,
    ) -> Option<Finding> {
        let overhead = if ip.is_ipv4() { OVERHEAD_V4 } else { OVERHEAD_V6 };
        if u32::from(mtu.value) + overhead <= path {
            return None;
        }
        let kind = (Severity::Warning, Rule::MtuTooLarge);
        let message = format!(
            "packets of {} bytes do not fit into datagrams of {path}, which is what the way to \
             {ip} takes: large ones are cut into fragments, or lost",
            mtu.value
        );
        let label = format!("the tunnel adds {overhead} bytes");
        let finding = self.found(kind, message, mtu.span, label);
        Some(finding.at(self.index, endpoint.span, "by this way").help(format!(
            "write at most {}, or nothing: then the MTU is found by itself",
            path.saturating_sub(overhead)
        )))
    }

    fn firewall(&self, plan: &Plan) -> Option<Finding> {
        let xdp = self.config.interface.xdp.as_ref()?;
        let refusal = up::shortcut_refusal(plan, false)?;
        let kind = (Severity::Error, Rule::FirewallBypassed);
        Some(self.found(kind, refusal, xdp.span, "`up` refuses this"))
    }

    /// Hooks that forward, on a host that does not.
    fn forwarding(&self) -> Option<Finding> {
        let hooks = || self.config.interface.hooks.iter();
        if hooks()
            .any(|hook| hook.command.contains("ip_forward") || hook.command.contains("forwarding"))
        {
            return None;
        }
        for (program, key, path) in [
            ("iptables", "net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
            ("ip6tables", "net.ipv6.conf.all.forwarding", "/proc/sys/net/ipv6/conf/all/forwarding"),
        ] {
            let forwards = |hook: &&Spanned<crate::config::Hook>| {
                let is_up = matches!(hook.event, HookEvent::PreUp | HookEvent::PostUp);
                let words = || hook.command.split_whitespace();
                is_up
                    && words().any(|word| word == program)
                    && words().any(|word| matches!(word, "FORWARD" | "MASQUERADE" | "SNAT"))
            };
            let Some(hook) = hooks().find(forwards) else { continue };
            if fs::read_to_string(path).is_ok_and(|value| value.trim() == "0") {
                let kind = (Severity::Warning, Rule::ForwardingOff);
                let message = format!("this host forwards no packets: {key} is 0");
                let finding =
                    self.found(kind, message, hook.span, "these rules see no packet then");
                return Some(finding.help(format!(
                    "`sysctl -w {key}=1`; for good, write `{key} = 1` into a file of /etc/sysctl.d"
                )));
            }
        }
        None
    }
}
