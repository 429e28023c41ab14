//! The steps of `up`: what each does to the host, and how it is undone.
//!
//! A step is known when it is planned, but for what only the host can say just before it is done;
//! [`settle`] fills that in. Then the step is noted in the [`Ledger`](super::ledger::Ledger), then
//! [`carry_out`] does it. [`undo`] needs only what was noted, and takes what is gone already as done.

use std::{
    collections::HashSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use anyhow::Context as _;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    Code, Failure,
    dns::{self, DnsTool},
    firewall::{self, FirewallTool},
    forwarding, hooks,
    ledger::{self, Ledger},
    name::InterfaceName,
    nic_settings,
    plan::{SRC_VALID_MARK, tunnel_mtu},
    programs::Program,
    socket::Socket,
    up,
};
use crate::host::{Family, Host, HostError, MAIN_TABLE, Rule};

/// One change of the host, in the order in which `up` makes them.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Runs a `PreUp` or `PostUp`. Not undone.
    Hook(ledger::Hook),
    /// Starts the daemon, which makes the device. Undone by deleting the device.
    Daemon,
    /// Gives the daemon keys and peers. Goes with the device.
    Configure,
    /// Marks the datagrams that the device sends. Goes with the device.
    Mark(u32),
    /// Gives the interface an address.
    Address(#[serde(with = "text")] IpNet),
    /// Sets the MTU; that of the ways to the endpoints if none is given. Goes with the device.
    Mtu(Option<u32>),
    /// Takes the interface up.
    LinkUp,
    /// Tells the host's resolver of name servers.
    Dns {
        /// What tells it; `None` until [`settle`] has looked.
        tool: Option<DnsTool>,
        /// Addresses of name servers.
        servers: Vec<String>,
        /// Search domains.
        search: Vec<String>,
    },
    /// Routes a prefix to the interface.
    Route {
        /// What is routed.
        #[serde(with = "text")]
        prefix: IpNet,
        /// The routing table.
        table: u32,
    },
    /// Sets a value below `/proc/sys`, or of a NIC.
    Sysctl {
        /// Path below `/proc/sys`; of a NIC a whole one.
        key: String,
        /// What it is set to.
        value: String,
        /// What it was before; `None` until [`settle`] has looked.
        before: Option<String>,
    },
    /// Adds a rule for which table is asked.
    Rule {
        /// For which packets.
        family: Family,
        /// Which rule.
        kind: RuleKind,
        /// Its place among the rules; `None` until [`settle`] has looked.
        priority: Option<u32>,
    },
    /// Adds the filter that goes with a default route.
    Firewall {
        /// What adds it; `None` until [`settle`] has looked.
        tool: Option<FirewallTool>,
        /// For which packets.
        family: Family,
        /// Mark of the device's datagrams.
        mark: u32,
        /// Addresses of the interface; nobody but its peers may reach them.
        addresses: Vec<IpAddr>,
    },
}

/// A rule for which table is asked.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RuleKind {
    /// What does not have the mark goes by the table.
    NotMarked {
        /// Mark of the device's own datagrams.
        mark: u32,
        /// The table with the default route.
        table: u32,
    },
    /// The main table is asked before that, but not for its default route.
    MainWithoutDefault,
}

/// Where steps are done.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The interface.
    pub interface: &'a InterfaceName,
    /// Its host.
    pub host: &'a Host,
    /// Where the peers are; for the MTU.
    pub endpoints: &'a [SocketAddr],
}

/// Fills in what only the host can say just before the step is done; nothing if it cannot be done
/// here and is left out, which was said then.
///
/// # Errors
/// If the host does not say.
pub async fn settle(step: Step, context: &Context<'_>) -> Result<Option<Step>, Failure> {
    let Context { interface, host, endpoints } = *context;
    Ok(Some(match step {
        Step::Mtu(None) => {
            // While a reload that was killed has left a part of the rules, a way may be the tunnel's own.
            let tunnel = host.link(interface.as_str()).await?.map_or(0, |link| link.index);
            let mut paths = Vec::new();
            // Many peers may be behind one address.
            let remotes: HashSet<IpAddr> = endpoints.iter().map(SocketAddr::ip).collect();
            for remote in remotes {
                paths.extend(host.path_mtu_but_by(tunnel, remote).await?);
            }
            Step::Mtu(Some(tunnel_mtu(&paths, host.default_route_mtu().await?)))
        }
        Step::Dns { tool: None, servers, search } => match DnsTool::find() {
            Some(tool) => Step::Dns { tool: Some(tool), servers, search },
            None => {
                eprintln!(
                    "tidegate: warning: {interface}: name servers are not set, for there is \
                     neither resolvconf nor resolvectl; install one of them (package `openresolv` \
                     or `systemd-resolved`), or set the host's resolver yourself"
                );
                return Ok(None);
            }
        },
        Step::Sysctl { key, value, before: None } => {
            // Another interface of ours may have set it: then what counts is what it was before that.
            let before = match before_of_others(interface, &key) {
                Some(before) => before,
                None => read_sysctl(&key)?,
            };
            Step::Sysctl { key, value, before: Some(before) }
        }
        Step::Rule { family, kind, priority: None } => {
            let priority = Some(host.next_rule_priority(family).await?);
            Step::Rule { family, kind, priority }
        }
        Step::Firewall { tool: None, family, mark, .. } => {
            let index = host.link_index(interface.as_str()).await?;
            let all = host.addresses().await?;
            let ours = all.iter().filter(|address| address.link_index == index);
            let addresses: Vec<IpAddr> = ours
                .map(|address| address.net.addr())
                .filter(|ip| ip.is_ipv4() == (family == Family::V4))
                .collect();
            let Some(tool) = FirewallTool::find() else {
                let line = "a default route needs a filter beside it, and there is neither nft nor \
                            iptables; install one of them";
                return Err(Failure::new(Code::Runtime, line));
            };
            Step::Firewall { tool: Some(tool), family, mark, addresses }
        }
        step => step,
    }))
}

/// Does a step that was settled and noted. [`Step::Daemon`] and [`Step::Configure`] are matters of
/// `up` itself.
///
/// # Errors
/// If the host refuses, or a program or hook fails.
pub async fn carry_out(step: &Step, context: &Context<'_>) -> Result<(), Failure> {
    let Context { interface, host, .. } = *context;
    let index = async || host.link_index(interface.as_str()).await;
    match step {
        Step::Daemon | Step::Configure => {}
        Step::Hook(hook) => hooks::run(hook).await?,
        Step::Mark(mark) => set_mark(interface, *mark)?,
        Step::Address(address) => host.add_address(index().await?, *address).await?,
        Step::Mtu(mtu) => {
            host.set_mtu(index().await?, mtu.context("the MTU is settled")?).await?;
        }
        Step::LinkUp => host.set_up(index().await?).await?,
        Step::Dns { tool, servers, search } => {
            for program in
                dns::set(tool.context("the tool is settled")?, interface, servers, search)
            {
                program.run()?;
            }
        }
        Step::Route { prefix, table } => {
            host.add_route(index().await?, *prefix, *table).await?;
        }
        // Where it is set already it may be read-only, as in containers.
        Step::Sysctl { key, value, .. } if read_sysctl(key)? == *value => {}
        Step::Sysctl { key, value, before } => {
            write_sysctl(key, value)?;
            let before = before.as_deref().unwrap_or_default();
            if let Some(word) = forwarding::word(key, value, before) {
                eprintln!("tidegate: {interface}: {word}");
            }
        }
        Step::Rule { family, kind, priority } => {
            let priority = priority.context("the priority is settled")?;
            match host.add_rule(rule(*family, *kind, priority)).await {
                // Somebody has just added the same: it is what is wanted, at its place.
                Err(HostError::Exists { .. }) => {}
                result => result?,
            }
        }
        Step::Firewall { tool, family, mark, addresses } => {
            let tool = tool.context("the tool is settled")?;
            firewall::add(tool, *family, interface, *mark, addresses).run()?;
        }
    }
    Ok(())
}

/// Undoes a step, of which all, a part or nothing may be there. [`Step::Daemon`] is a matter of
/// `down` itself, and what goes with the device is left to it.
///
/// # Errors
/// If the host refuses, or a program fails.
pub async fn undo(step: &Step, context: &Context<'_>) -> Result<(), Failure> {
    let Context { interface, host, .. } = *context;
    let link = async || host.link(interface.as_str()).await;
    match step {
        Step::Hook(_)
        | Step::Daemon
        | Step::Configure
        | Step::Mark(_)
        | Step::Mtu(_)
        | Step::LinkUp => {}
        Step::Address(address) => {
            if let Some(link) = link().await? {
                host.delete_address(link.index, *address).await?;
            }
        }
        Step::Dns { tool: Some(DnsTool::Resolvectl), .. } => {
            if link().await?.is_some() {
                dns::unset(DnsTool::Resolvectl, interface).run()?;
            }
        }
        Step::Dns { tool: Some(tool), .. } => dns::unset(*tool, interface).run()?,
        Step::Route { prefix, table } => {
            if let Some(link) = link().await? {
                host.delete_route(link.index, *prefix, *table).await?;
            }
        }
        Step::Sysctl { key, value, before: Some(before) } => {
            // A tunnel of wg-quick needs it as well, and never takes it back.
            let is_of_wg_quick = key == SRC_VALID_MARK
                && host.rules(Family::V4).await?.iter().any(|rule| rule.unless_marked.is_some());
            let is_needed = is_of_wg_quick || before_of_others(interface, key).is_some();
            // Somebody who has set it to something else meanwhile has the last word; of an interface that is
            // gone there is nothing to be set.
            let is_there = sysctl_path(key).exists();
            if !is_needed && before != value && is_there && read_sysctl(key)? == *value {
                write_sysctl(key, before)?;
            }
        }
        Step::Rule { family, kind, priority: Some(priority) } => {
            host.delete_rule(rule(*family, *kind, *priority)).await?;
        }
        Step::Firewall { tool: Some(tool), family, .. } => {
            firewall::remove(*tool, *family, interface)?;
        }
        // They are never noted like this.
        Step::Dns { .. } | Step::Sysctl { .. } | Step::Rule { .. } | Step::Firewall { .. } => {}
    }
    Ok(())
}

impl Step {
    /// Whether it is undone by deleting the device.
    pub const fn goes_with_the_device(&self) -> bool {
        matches!(
            self,
            Step::Configure
                | Step::Mark(_)
                | Step::Address(_)
                | Step::Mtu(_)
                | Step::LinkUp
                | Step::Route { .. }
        )
    }

    /// What somebody would type to do it, as wg-quick(8) shows it.
    pub fn shown(&self, interface: &InterfaceName) -> Vec<String> {
        let one = |line: String| vec![line];
        match self {
            Step::Hook(hook) => one(hook.command.clone()),
            Step::Daemon => one(format!("tidegate run {interface}")),
            Step::Configure => one(format!("wg setconf {interface} /dev/fd/63")),
            Step::Mark(mark) => one(format!("wg set {interface} fwmark {mark}")),
            Step::Address(address) => {
                let option = option(Family::of(*address));
                one(format!("ip {option} address add {address} dev {interface}"))
            }
            Step::Mtu(Some(mtu)) => one(format!("ip link set mtu {mtu} dev {interface}")),
            Step::Mtu(None) => Vec::new(),
            Step::LinkUp => one(format!("ip link set up dev {interface}")),
            Step::Dns { tool, servers, search } => {
                let tool = tool.unwrap_or(DnsTool::Resolvconf);
                let programs = dns::set(tool, interface, servers, search);
                programs.iter().map(Program::to_string).collect()
            }
            Step::Route { prefix, table } => {
                let option = option(Family::of(*prefix));
                let table = match *table {
                    MAIN_TABLE => String::new(),
                    table => format!(" table {table}"),
                };
                one(format!("ip {option} route add {prefix} dev {interface}{table}"))
            }
            Step::Sysctl { key, value, .. } if nic_settings::is_one(key) => {
                one(format!("echo {value} > {key}"))
            }
            Step::Sysctl { key, value, .. } => {
                one(format!("sysctl -q {}={value}", forwarding::sysctl_name(key)))
            }
            Step::Rule { family, kind: RuleKind::NotMarked { mark, table }, .. } => {
                let option = option(*family);
                one(format!("ip {option} rule add not fwmark {mark} table {table}"))
            }
            Step::Rule { family, kind: RuleKind::MainWithoutDefault, .. } => {
                let option = option(*family);
                one(format!("ip {option} rule add table main suppress_prefixlength 0"))
            }
            Step::Firewall { tool, family, mark, addresses } => {
                let tool = tool.unwrap_or(FirewallTool::Iptables);
                one(firewall::add(tool, *family, interface, *mark, addresses).to_string())
            }
        }
    }
}

/// The option of `ip` for a family.
const fn option(family: Family) -> &'static str {
    match family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    }
}

const fn rule(family: Family, kind: RuleKind, priority: u32) -> Rule {
    let (table, unless_marked, suppress_prefix_len) = match kind {
        RuleKind::NotMarked { mark, table } => (table, Some(mark), None),
        RuleKind::MainWithoutDefault => (MAIN_TABLE, None, Some(0)),
    };
    Rule { family, priority, table, unless_marked, suppress_prefix_len }
}

fn set_mark(interface: &InterfaceName, mark: u32) -> Result<(), Failure> {
    let socket =
        Socket::find(interface)?.ok_or_else(|| Failure::new(Code::Runtime, up::DAEMON_IS_GONE))?;
    match socket.request(&format!("set=1\nfwmark={mark}\n"))?.error() {
        None => Ok(()),
        Some(error) => Err(anyhow::Error::new(error).context("setting the mark").into()),
    }
}

/// What a value was before the first of our other interfaces here set it.
fn before_of_others(interface: &InterfaceName, key: &str) -> Option<String> {
    let others = Ledger::others(interface);
    let here = others
        .iter()
        .filter(|record| record.header.is_of_this_boot() && record.header.is_of_this_netns());
    here.flat_map(ledger::Record::steps).find_map(|noted| match &noted.step {
        Step::Sysctl { key: known, before, .. } if known == key => before.clone(),
        _ => None,
    })
}

fn sysctl_path(key: &str) -> PathBuf {
    // Of a whole path nothing stands before it.
    PathBuf::from("/proc/sys").join(key)
}

fn read_sysctl(key: &str) -> Result<String, Failure> {
    let path = sysctl_path(key);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text.trim().to_owned())
}

fn write_sysctl(key: &str, value: &str) -> Result<(), Failure> {
    let path = sysctl_path(key);
    fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))?;
    Ok(())
}

/// A value by its text form.
mod text {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}
