//! Who translates addresses in a scenario with a gateway, what can be seen of that on it, and what it costs.
//!
//! The files of `examples/` translate by iptables. For [`Nat::Bpf`] their hooks are replaced by the lines that
//! `tidegate init` writes. In both cases connection tracking is awake on the gateway, by a rule that asks for
//! it: by iptables it knows the flows that go through, by BPF it knows none of them.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::{
    demonstration::{EachWay, Tools, step},
    lab::{Site, Space, find_program},
};

/// Who translates.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Nat {
    /// Netfilter, by the hooks of the example
    Iptables,
    /// Programs in the kernel, by `#! Nat` in place of the hooks
    Bpf,
}

impl Nat {
    /// The word on the command line and in reports.
    pub fn word(self) -> &'static str {
        match self {
            Nat::Iptables => "iptables",
            Nat::Bpf => "bpf",
        }
    }
}

/// What a scenario says of its gateway.
#[derive(Clone, Copy, Debug)]
pub struct Translator {
    /// The host that translates.
    pub host: &'static str,
    /// The lines in place of its hooks.
    pub lines: &'static [&'static str],
    /// Who is reached through it: by one address for each family that is translated. The load goes to the
    /// first one.
    pub far: (&'static str, &'static [&'static str]),
    /// Who reaches them.
    pub near: &'static str,
}

impl Translator {
    /// The file of a host of the scenario.
    pub fn conf(&self, host: &str, conf: &str, by: Nat) -> String {
        if host != self.host || by == Nat::Iptables {
            return conf.to_owned();
        }
        let mut text = String::new();
        for line in conf.lines().filter(|line| !line.starts_with("Post")) {
            text += line;
            text.push('\n');
            if line == "[Interface]" {
                self.lines.iter().for_each(|line| text += &format!("{line}\n"));
            }
        }
        text
    }

    /// Wakes connection tracking on the gateway.
    ///
    /// # Errors
    /// If iptables cannot.
    pub fn track(&self, site: &Site) -> Result<()> {
        let rule = ["-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID"];
        for name in ["iptables", "ip6tables"] {
            let program = find_program(name).with_context(|| format!("no program `{name}`"))?;
            site.space(self.host).run(program, &rule)?;
        }
        Ok(())
    }

    /// Looks at the gateway, after what went through it; and sends a load each way for so long, if at all.
    ///
    /// # Errors
    /// If something of it cannot be seen, or the load breaks off.
    pub fn look(
        &self,
        site: &Site,
        tool: &Path,
        by: Nat,
        load: Option<Duration>,
    ) -> Result<Translated> {
        let gateway = site.space(self.host);
        let (far, addresses) = self.far;
        let (mut mbit_s, mut cpu) = (EachWay::default(), EachWay::default());
        if let Some(duration) = load {
            let tools = Tools::between(site, tool, site.space(self.near), site.space(far))?;
            let measure = |direction: &str| -> Result<(f64, f64)> {
                let (before, started) = (gateway.cpu_time(), Instant::now());
                let mbit_s = tools.load_to(addresses[0], direction, duration)?;
                let (after, taken) = (gateway.cpu_time(), started.elapsed());
                let busy = after.saturating_sub(before).as_secs_f64();
                Ok((mbit_s, busy / taken.as_secs_f64() * 100.0))
            };
            (mbit_s.up, cpu.up) = measure("up")?;
            (mbit_s.down, cpu.down) = measure("down")?;
        }
        step(&format!("what netfilter of the {} knows", self.host));
        let rules = netfilter_rules(gateway)?;
        let tracked = tracked(gateway, addresses)?;
        Ok(Translated { by, host: self.host.to_owned(), rules, tracked, mbit_s, cpu })
    }
}

/// What was seen of a gateway.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Translated {
    /// Who translated.
    pub by: Nat,
    /// The gateway.
    pub host: String,
    /// Rules of netfilter that translate.
    pub rules: Vec<String>,
    /// Flows through the tunnel that connection tracking knows.
    pub tracked: u64,
    /// TCP payload under load, by its receiver; 0 if there was none.
    pub mbit_s: EachWay,
    /// Percent of one CPU that the gateway's processes took under load. What the kernel forwards runs mostly
    /// as a part of their writing to the TUN device.
    pub cpu: EachWay,
}

impl Translated {
    /// Whether it was translated by whom it should be, and by nobody else.
    pub fn is_good(&self) -> bool {
        match self.by {
            Nat::Iptables => !self.rules.is_empty() && self.tracked > 0,
            Nat::Bpf => self.rules.is_empty() && self.tracked == 0,
        }
    }

    /// Rows of the table.
    pub fn rows(&self) -> Vec<(String, String)> {
        let Self { by, host, rules, tracked, mbit_s, cpu } = self;
        let ends = |count: u64| if count == 1 { "" } else { "s" };
        let wrong = if self.is_good() { "" } else { "NOT as it should be: " };
        let rule_count = rules.len() as u64;
        let mut rows = vec![(
            format!("NAT of {host}"),
            format!(
                "{wrong}by {}; netfilter has {rule_count} rule{} of NAT and tracks {tracked} flow{} of \
                 the tunnel",
                by.word(),
                ends(rule_count),
                ends(*tracked),
            ),
        )];
        for (name, mbit_s, cpu) in
            [("load up", mbit_s.up, cpu.up), ("load down", mbit_s.down, cpu.down)]
        {
            if mbit_s > 0.0 {
                let each = cpu / mbit_s * 1000.0;
                let text = format!(
                    "{mbit_s:.0} Mbit/s, {host} at {cpu:.0} % of a CPU: {each:.0} % per Gbit/s"
                );
                rows.push((name.to_owned(), text));
            }
        }
        rows
    }
}

/// Rules that translate, whoever shows them.
fn netfilter_rules(space: &Space) -> Result<Vec<String>> {
    let mut rules = BTreeSet::new();
    for (name, arguments) in [
        ("iptables-save", &[][..]),
        ("ip6tables-save", &[]),
        ("iptables-legacy-save", &[]),
        ("ip6tables-legacy-save", &[]),
        ("nft", &["list", "ruleset"]),
    ] {
        let Some(program) = find_program(name) else { continue };
        let text = space.run(program, arguments)?;
        let translates = |line: &&str| {
            let words = ["MASQUERADE", "SNAT", "DNAT", "masquerade", "snat to", "dnat to"];
            words.iter().any(|word| line.contains(word))
        };
        rules.extend(
            text.lines().map(str::trim).filter(translates).map(|line| format!("{name}: {line}")),
        );
    }
    Ok(rules.into_iter().collect())
}

/// How many flows to or from these addresses connection tracking knows.
fn tracked(space: &Space, addresses: &[&str]) -> Result<u64> {
    const TABLE: &str = "/proc/net/nf_conntrack";
    ensure!(Path::new(TABLE).exists(), "this kernel does not show connection tracking in {TABLE}");
    let addresses: Vec<IpAddr> =
        addresses.iter().map(|address| address.parse()).collect::<Result<_, _>>()?;
    let text = space.run("cat", &[TABLE])?;
    Ok(text.lines().filter(|line| is_about(line, &addresses)).count() as u64)
}

fn is_about(line: &str, addresses: &[IpAddr]) -> bool {
    let of_word =
        |word: &str| word.strip_prefix("src=").or_else(|| word.strip_prefix("dst="))?.parse().ok();
    line.split_ascii_whitespace().filter_map(of_word).any(|ip: IpAddr| addresses.contains(&ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_of_the_gateway_alone_are_replaced() {
        let translator = Translator {
            host: "gateway",
            lines: &["#! Nat = masquerade out=eth0"],
            far: ("web", &["203.0.113.10"]),
            near: "laptop",
        };
        let conf = "[Interface]\nPostUp = iptables\nListenPort = 1\nPostDown = x\n[Peer]\n";
        assert_eq!(translator.conf("gateway", conf, Nat::Iptables), conf);
        assert_eq!(translator.conf("laptop", conf, Nat::Bpf), conf);
        assert_eq!(
            translator.conf("gateway", conf, Nat::Bpf),
            "[Interface]\n#! Nat = masquerade out=eth0\nListenPort = 1\n[Peer]\n"
        );
    }

    #[test]
    fn flows_are_known_by_their_addresses_however_these_are_written() {
        let web = ["203.0.113.10", "2001:db8:113::10"].map(|text| text.parse().unwrap());
        let tcp = "ipv4 2 tcp 6 117 TIME_WAIT src=10.9.0.2 dst=203.0.113.10 sport=1 dport=2";
        let v6 = "ipv6 10 tcp 6 9 src=fd09:0000:0000:0000:0000:0000:0000:0002 \
                  dst=2001:0db8:0113:0000:0000:0000:0000:0010 sport=1";
        let own = "ipv4 2 icmp 1 29 src=10.9.0.2 dst=10.9.0.1 type=8 code=0 id=1";
        assert!(is_about(tcp, &web) && is_about(v6, &web) && !is_about(own, &web));
    }

    #[test]
    fn who_should_translate_does_and_nobody_else() {
        let seen = |by, rules: &[&str], tracked| Translated {
            by,
            host: "gateway".to_owned(),
            rules: rules.iter().map(|&rule| rule.to_owned()).collect(),
            tracked,
            mbit_s: EachWay::default(),
            cpu: EachWay::default(),
        };
        assert!(seen(Nat::Bpf, &[], 0).is_good());
        assert!(!seen(Nat::Bpf, &[], 1).is_good());
        assert!(!seen(Nat::Bpf, &["-j MASQUERADE"], 0).is_good());
        assert!(seen(Nat::Iptables, &["-j MASQUERADE"], 3).is_good());
        assert!(!seen(Nat::Iptables, &["-j MASQUERADE"], 0).is_good());
        assert!(seen(Nat::Bpf, &[], 1).rows()[0].1.starts_with("NOT as it should be"));
    }
}
