//! The filter that goes with a default route through the tunnel, as wg-quick(8) adds it: nobody but
//! the peers reaches the interface's addresses, and answers to the device's datagrams have its mark,
//! so that their sources are looked up as they should.

use std::{fmt::Write, net::IpAddr};

use serde::{Deserialize, Serialize};

use super::{
    Failure,
    name::InterfaceName,
    programs::{self, Program},
};
use crate::host::Family;

/// What changes the host's filter.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FirewallTool {
    /// nft(8)
    Nft,
    /// iptables-restore(8) and ip6tables-restore(8)
    Iptables,
}

impl FirewallTool {
    /// The one that this host has.
    pub fn find() -> Option<FirewallTool> {
        if programs::is_there("nft") {
            Some(FirewallTool::Nft)
        } else {
            programs::is_there("iptables").then_some(FirewallTool::Iptables)
        }
    }
}

/// What adds the rules of a family.
pub fn add(
    tool: FirewallTool,
    family: Family,
    interface: &InterfaceName,
    mark: u32,
    addresses: &[IpAddr],
) -> Program {
    let ours = addresses.iter().copied().filter(|ip| ip.is_ipv4() == (family == Family::V4));
    match tool {
        FirewallTool::Nft => {
            Program::new("nft", ["-f", "-"]).with_input(nft_table(family, interface, mark, ours))
        }
        FirewallTool::Iptables => {
            Program::new(restore(family), ["-n"]).with_input(iptables_rules(interface, mark, ours))
        }
    }
}

/// Removes the rules of a family, as many as there are.
///
/// # Errors
/// If the program says no.
pub fn remove(
    tool: FirewallTool,
    family: Family,
    interface: &InterfaceName,
) -> Result<(), Failure> {
    match tool {
        FirewallTool::Nft => {
            let table = format!("{} {}", nft_family(family), nft_name(interface));
            let tables = Program::new("nft", ["list", "tables"]).output()?;
            if tables.lines().any(|line| line.trim() == format!("table {table}")) {
                let delete = Program::new("nft", ["-f", "-"]);
                delete.with_input(format!("delete table {table}\n")).run()?;
            }
        }
        FirewallTool::Iptables => {
            let rules = Program::new(save(family), []).output()?;
            if let Some(deletions) = deletions(&rules, interface) {
                Program::new(restore(family), ["-n"]).with_input(deletions).run()?;
            }
        }
    }
    Ok(())
}

const fn restore(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-restore",
        Family::V6 => "ip6tables-restore",
    }
}

const fn save(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-save",
        Family::V6 => "ip6tables-save",
    }
}

/// The comment by which the rules are found again.
fn marker(interface: &InterfaceName) -> String {
    format!("-m comment --comment \"tidegate rule for {interface}\"")
}

fn iptables_rules(
    interface: &InterfaceName,
    mark: u32,
    addresses: impl Iterator<Item = IpAddr>,
) -> String {
    let marker = marker(interface);
    let mut text = "*raw\n".to_owned();
    for address in addresses {
        let _ = writeln!(
            text,
            "-I PREROUTING ! -i {interface} -d {address} -m addrtype ! --src-type LOCAL -j DROP \
             {marker}"
        );
    }
    let _ = write!(
        text,
        "COMMIT\n*mangle\n\
         -I POSTROUTING -m mark --mark {mark} -p udp -j CONNMARK --save-mark {marker}\n\
         -I PREROUTING -p udp -j CONNMARK --restore-mark {marker}\n\
         COMMIT\n"
    );
    text
}

/// What deletes our rules among those that `iptables-save` prints; nothing if there are none.
fn deletions(saved: &str, interface: &InterfaceName) -> Option<String> {
    let marker = marker(interface);
    let mut text = String::new();
    let mut found = false;
    for line in saved.lines() {
        if line.starts_with('*') || line == "COMMIT" {
            text += line;
        } else if let Some(rule) = line.strip_prefix("-A ").filter(|rule| rule.contains(&marker)) {
            found = true;
            text += "-D ";
            text += rule;
        } else {
            continue;
        }
        text.push('\n');
    }
    found.then_some(text)
}

const fn nft_family(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn nft_name(interface: &InterfaceName) -> String {
    format!("tidegate-{interface}")
}

fn nft_table(
    family: Family,
    interface: &InterfaceName,
    mark: u32,
    addresses: impl Iterator<Item = IpAddr>,
) -> String {
    let family = nft_family(family);
    let table = format!("{family} {}", nft_name(interface));
    let chain = |name: &str, hook: &str, priority: i32| {
        format!("add chain {table} {name} {{ type filter hook {hook} priority {priority}; }}\n")
    };
    let mut text = format!("add table {table}\n");
    text += &chain("preraw", "prerouting", -300);
    text += &chain("premangle", "prerouting", -150);
    text += &chain("postmangle", "postrouting", -150);
    for address in addresses {
        let _ = writeln!(
            text,
            "add rule {table} preraw iifname != \"{interface}\" {family} daddr {address} \
             fib saddr type != local drop"
        );
    }
    let _ = write!(
        text,
        "add rule {table} postmangle meta l4proto udp mark {mark} ct mark set mark\n\
         add rule {table} premangle meta l4proto udp meta mark set ct mark\n"
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses() -> Vec<IpAddr> {
        ["10.9.0.2", "fd09::2"].map(|ip| ip.parse().unwrap()).to_vec()
    }

    #[test]
    fn rules_are_those_of_wg_quick() {
        let interface = "wg0".parse().unwrap();
        let program = add(FirewallTool::Iptables, Family::V6, &interface, 51820, &addresses());
        assert_eq!(program.to_string(), "ip6tables-restore -n");
        let comment = "-m comment --comment \"tidegate rule for wg0\"";
        let expected = format!(
            "*raw\n\
             -I PREROUTING ! -i wg0 -d fd09::2 -m addrtype ! --src-type LOCAL -j DROP {comment}\n\
             COMMIT\n\
             *mangle\n\
             -I POSTROUTING -m mark --mark 51820 -p udp -j CONNMARK --save-mark {comment}\n\
             -I PREROUTING -p udp -j CONNMARK --restore-mark {comment}\n\
             COMMIT\n"
        );
        assert_eq!(program.input(), expected);
        let nft = add(FirewallTool::Nft, Family::V4, &interface, 51820, &addresses());
        assert!(nft.input().starts_with("add table ip tidegate-wg0\n"));
        assert!(nft.input().contains(
            "add rule ip tidegate-wg0 preraw iifname != \"wg0\" ip daddr 10.9.0.2 fib saddr type \
             != local drop\n"
        ));
    }

    #[test]
    fn exactly_our_rules_are_deleted() {
        let saved = "\
            # Generated by iptables-save\n\
            *raw\n\
            :PREROUTING ACCEPT [0:0]\n\
            -A PREROUTING -d 10.9.0.2/32 ! -i wg0 -m comment --comment \"tidegate rule for wg0\" -j DROP\n\
            -A PREROUTING -d 10.8.0.2/32 ! -i wg01 -m comment --comment \"tidegate rule for wg01\" -j DROP\n\
            COMMIT\n\
            *filter\n\
            -A INPUT -p tcp -j ACCEPT\n\
            COMMIT\n";
        let expected = "\
            *raw\n\
            -D PREROUTING -d 10.9.0.2/32 ! -i wg0 -m comment --comment \"tidegate rule for wg0\" -j DROP\n\
            COMMIT\n*filter\nCOMMIT\n";
        assert_eq!(deletions(saved, &"wg0".parse().unwrap()).as_deref(), Some(expected));
        assert_eq!(deletions(saved, &"wg2".parse().unwrap()), None);
    }
}
