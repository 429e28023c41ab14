//! Whether NAT would go round rules of the host's firewall for what is forwarded.
//!
//! Packets that are translated at TC go from one interface to the other without netfilter. So rules of
//! its hooks `forward` and `postrouting` would silently lose their effect on them: those that drop, that
//! mark or change, and that translate. What is known of the packets is said by [`Flow`]; a rule of which
//! it is not known whether it concerns some of them does.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::{Action, Datagrams, Found, Match, Obstacle, Rulesets, State, Way};
use crate::{config::Transport, host::Family};

/// What goes one way between two interfaces.
#[derive(Clone, Debug)]
pub struct Flow {
    /// Of which family it is.
    pub family: Family,
    /// The interface by which it comes.
    pub input: String,
    /// The interface by which it goes.
    pub output: String,
    /// From where it comes, as the kernel would see it; from anywhere if there are none.
    pub from: Vec<IpNet>,
    /// To where it goes.
    pub to: Vec<IpNet>,
    /// The port that is asked, if it is one only.
    pub service: Option<(Transport, u16)>,
    /// Whether it is what the port, or the far end, answers.
    pub is_answer: bool,
}

/// The firewall of this host.
#[derive(Debug)]
pub struct Firewall(Rulesets);

impl Firewall {
    /// Asks the programs that show it.
    pub fn of_this_host() -> Self {
        Self(Rulesets::of_this_host())
    }

    /// Looks for a rule that concerns the flow.
    pub fn obstacle(&self, flow: &Flow) -> Option<Obstacle> {
        let Found { program, rule, place } = found(&self.0, flow)?;
        let shown = place.and_then(|place| place.shown());
        Some(Obstacle { program, rule: shown.unwrap_or(rule) })
    }
}

fn found(rulesets: &Rulesets, flow: &Flow) -> Option<Found> {
    let nics = std::slice::from_ref(&flow.input);
    let states: &[State] = match flow.is_answer {
        true => &[State::Established],
        false => &[State::New, State::Established],
    };
    // Rules that translate are asked about the first packet of a flow alone.
    let hooks: &[Hook] = match flow.is_answer {
        true => &[Hook::Forward],
        false => &[Hook::Forward, Hook::Postrouting],
    };
    hooks.iter().find_map(|&hook| {
        let forwarded = Forwarded { flow, hook };
        states.iter().find_map(|&state| {
            let forwarded = Some(&forwarded);
            rulesets.found(Datagrams {
                way: Way::In,
                port: None,
                nics,
                family: flow.family,
                state,
                forwarded,
            })
        })
    })
}

/// Where netfilter is asked.
#[derive(Clone, Copy, Debug)]
enum Hook {
    Forward,
    Postrouting,
}

/// A flow at a hook.
#[derive(Clone, Copy, Debug)]
pub(super) struct Forwarded<'a> {
    flow: &'a Flow,
    hook: Hook,
}

impl Forwarded<'_> {
    /// What iptables calls chains of the hook.
    pub fn chains(&self) -> &'static [&'static str] {
        match self.hook {
            Hook::Forward => &["FORWARD"],
            Hook::Postrouting => &["POSTROUTING"],
        }
    }

    /// What nft calls the hook.
    pub fn hook(&self) -> &'static str {
        match self.hook {
            Hook::Forward => "forward",
            Hook::Postrouting => "postrouting",
        }
    }

    /// Whether it is of the protocol, by name or number. What is neither TCP, UDP nor ICMP is not translated
    /// and does not pass.
    pub fn is_protocol(&self, name: &str) -> Match {
        let transport = match name {
            "all" | "0" => return Match::Always,
            "tcp" | "6" => Some(Transport::Tcp),
            "udp" | "17" => Some(Transport::Udp),
            _ => None,
        };
        let icmp: &[&str] = match self.flow.family {
            Family::V4 => &["icmp", "1"],
            Family::V6 => &["icmpv6", "ipv6-icmp", "icmp6", "58"],
        };
        match (self.flow.service, transport) {
            (Some((service, _)), _) => Match::when(transport == Some(service)),
            (None, Some(_)) => Match::Maybe,
            (None, None) if icmp.contains(&name) => Match::Maybe,
            (None, None) => Match::Never,
        }
    }

    /// Whether it may have such a header.
    pub fn has_header(&self, protocol: &str) -> bool {
        match protocol {
            "ip" => self.flow.family == Family::V4,
            "ip6" => self.flow.family == Family::V6,
            // Of whatever protocol it is.
            "th" => true,
            _ => self.is_protocol(protocol) != Match::Never,
        }
    }

    /// Whether it goes to one of these ports.
    pub fn is_to_port(&self, first: u16, last: u16) -> Match {
        self.is_port(first, last, false)
    }

    /// Whether it comes from one of these ports.
    pub fn is_from_port(&self, first: u16, last: u16) -> Match {
        self.is_port(first, last, true)
    }

    fn is_port(&self, first: u16, last: u16, is_source: bool) -> Match {
        match self.flow.service {
            Some((_, port)) if is_source == self.flow.is_answer => {
                Match::when((first..=last).contains(&port))
            }
            _ => Match::Maybe,
        }
    }

    /// Whether it goes by such an interface.
    pub fn is_to_nic(&self, pattern: &str) -> Match {
        let output = &self.flow.output;
        Match::when(match pattern.strip_suffix(['+', '*']) {
            Some(start) => output.starts_with(start),
            None => output == pattern,
        })
    }

    /// Whether its source is there: a network, or the first and last address.
    pub fn is_from_there(&self, there: Option<(IpAddr, IpAddr)>) -> Match {
        is_within(&self.flow.from, there)
    }

    /// Whether its destination is there.
    pub fn is_to_there(&self, there: Option<(IpAddr, IpAddr)>) -> Match {
        is_within(&self.flow.to, there)
    }

    /// Whether it goes to such an address: only what is not for this host is forwarded.
    pub fn is_to_type(name: &str) -> Match {
        match name.to_ascii_lowercase().as_str() {
            "unicast" => Match::Always,
            "local" | "broadcast" | "multicast" | "anycast" | "blackhole" | "prohibit" => {
                Match::Never
            }
            _ => Match::Maybe,
        }
    }

    /// What a target of iptables does to it that is no chain and does not refuse it; nothing is said of others.
    pub fn target(name: &str, options: &[&str]) -> Option<Action> {
        match name {
            // As the device does by itself.
            "TCPMSS" if options.contains(&"--clamp-mss-to-pmtu") => Some(Action::GoOn),
            "TCPMSS" | "SNAT" | "MARK" | "CONNMARK" | "DSCP" | "TOS" | "TTL" | "HL"
            | "CLASSIFY" | "SECMARK" | "CONNSECMARK" => Some(Action::Refuse),
            _ => None,
        }
    }

    /// What a statement of nft does to it, other than a verdict; `None` if nothing of that kind.
    pub fn statement(kind: &str, value: &Value) -> Option<Action> {
        match kind {
            "mangle" => {
                // As the device does by itself.
                let is_size = value["key"]["tcp option"]["name"] == "maxseg";
                let is_clamped = value["value"]["rt"]["key"] == "mtu";
                Some(if is_size && is_clamped { Action::GoOn } else { Action::Refuse })
            }
            "masquerade" | "snat" | "dnat" | "redirect" | "tproxy" | "secmark" => {
                Some(Action::Refuse)
            }
            _ => None,
        }
    }
}

/// The first and last address of a network as iptables or nft writes it.
pub(super) fn bounds(text: &str) -> Option<(IpAddr, IpAddr)> {
    let net = match text.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address),
        Err(_) => text.parse().ok()?,
    };
    Some((net.network(), net.broadcast()))
}

/// The first and last address that a value of nft stands for.
pub(super) fn bounds_of(value: &Value) -> Option<(IpAddr, IpAddr)> {
    let prefix = &value["prefix"];
    if let (Some(address), Some(len)) = (prefix["addr"].as_str(), prefix["len"].as_u64()) {
        return bounds(&format!("{address}/{len}"));
    }
    let end = |number: usize| value["range"][number].as_str()?.parse::<IpAddr>().ok();
    match (end(0), end(1)) {
        (Some(first), Some(last)) => Some((first, last)),
        _ => bounds(value.as_str()?),
    }
}

/// Whether all, some or none of these are there. What is not known may be anywhere.
fn is_within(nets: &[IpNet], there: Option<(IpAddr, IpAddr)>) -> Match {
    let Some((first, last)) = there else { return Match::Maybe };
    let is_all = |bits: IpAddr, set: u8| match bits {
        IpAddr::V4(ip) => ip.octets().iter().all(|&byte| byte == set),
        IpAddr::V6(ip) => ip.octets().iter().all(|&byte| byte == set),
    };
    if is_all(first, 0) && is_all(last, 0xff) {
        return Match::Always;
    }
    if nets.is_empty() {
        return Match::Maybe;
    }
    let is_inside = |net: &IpNet| first <= net.network() && net.broadcast() <= last;
    let is_outside = |net: &IpNet| net.broadcast() < first || last < net.network();
    if nets.iter().all(is_inside) {
        Match::Always
    } else if nets.iter().all(is_outside) {
        Match::Never
    } else {
        Match::Maybe
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Saved;
    use super::*;

    fn nets(text: &str) -> Vec<IpNet> {
        text.split_whitespace().map(|net| net.parse().unwrap()).collect()
    }

    fn out() -> Flow {
        Flow {
            family: Family::V4,
            input: "wg0".to_owned(),
            output: "eth0".to_owned(),
            from: nets("10.9.0.2/32 10.9.0.3/32"),
            to: Vec::new(),
            service: None,
            is_answer: false,
        }
    }

    fn back() -> Flow {
        let Flow { input, output, from, to, .. } = out();
        Flow { input: output, output: input, from: to, to: from, is_answer: true, ..out() }
    }

    fn service() -> Flow {
        let service = Some((Transport::Tcp, 443));
        Flow { to: nets("10.9.0.2/32"), is_answer: false, service, ..back() }
    }

    /// The obstacle for a flow among rules of iptables, with the policy of FORWARD.
    fn among(flow: &Flow, policy: &str, rules: &str) -> Option<String> {
        let text = |table: &str| -> String {
            let of_table = |rule: &&str| rule.starts_with("POSTROUTING") == (table == "nat");
            let rules = rules.split(';').map(str::trim).filter(|rule| !rule.is_empty());
            rules.filter(of_table).map(|rule| format!("-A {rule}\n")).collect()
        };
        let text = format!(
            "*filter\n:INPUT DROP [0:0]\n:FORWARD {policy} [0:0]\n:DOCKER-USER - [0:0]\n\
             :mine - [0:0]\n{}COMMIT\n*nat\n:PREROUTING ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n\
             {}COMMIT\n",
            text("filter"),
            text("nat")
        );
        let program = "iptables-save";
        let saved = Saved { program, family: flow.family, is_nf_tables: false, text };
        let rulesets = Rulesets { iptables: vec![saved], nft: None };
        found(&rulesets, flow).map(|found| found.rule)
    }

    #[test]
    fn rules_that_cannot_touch_what_goes_out_are_none() {
        for rules in [
            "",
            "FORWARD -i eth1 -j DROP",
            "FORWARD -o eth1 -j DROP",
            "FORWARD ! -o eth0 -j DROP",
            "FORWARD -s 192.168.0.0/16 -j DROP",
            "FORWARD ! -s 10.9.0.0/24 -j DROP",
            "FORWARD -m conntrack --ctstate INVALID -j DROP",
            "FORWARD -p sctp -j DROP",
            "FORWARD -m addrtype --dst-type LOCAL -j DROP",
            "FORWARD -i wg0 -j ACCEPT; FORWARD -j DROP",
            "FORWARD -j DOCKER-USER; DOCKER-USER -j RETURN",
            "FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
            "POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
            "POSTROUTING -o eth1 -j MASQUERADE",
            "POSTROUTING ! -s 10.9.0.0/24 -o eth0 -j SNAT --to-source 192.0.2.1",
        ] {
            assert_eq!(among(&out(), "ACCEPT", rules), None, "{rules}");
        }
        assert_eq!(among(&out(), "DROP", "FORWARD -i wg+ -o eth0 -j ACCEPT"), None);
        assert_eq!(among(&out(), "DROP", "FORWARD -s 10.9.0.0/24 -j ACCEPT"), None);
    }

    #[test]
    fn rules_that_may_touch_what_goes_out_are_told() {
        for (rules, expected) in [
            ("FORWARD -j DROP", 0),
            ("FORWARD -i wg0 -d 192.0.2.0/24 -j REJECT", 0),
            ("FORWARD -s 10.9.0.3/32 -j DROP", 0),
            ("FORWARD -p tcp --dport 25 -j DROP", 0),
            ("FORWARD -p icmp -j DROP", 0),
            ("FORWARD ! -p tcp -j DROP", 0),
            ("FORWARD -j DOCKER-USER; DOCKER-USER -o eth0 -j DROP", 1),
            ("FORWARD -o eth0 -j MARK --set-xmark 0x1/0xffffffff", 0),
            ("FORWARD -p tcp -j TCPMSS --set-mss 1200", 0),
            ("FORWARD -m limit --limit 5/sec -j ACCEPT; FORWARD -j DROP", 1),
            ("FORWARD -p tcp -j ACCEPT; FORWARD -j DROP", 1),
            ("FORWARD -j NFQUEUE --queue-num 0", 0),
            ("FORWARD -f -j DROP", 0),
            ("POSTROUTING -o eth0 -j MASQUERADE", 0),
            ("POSTROUTING -s 10.0.0.0/8 -j SNAT --to-source 192.0.2.1", 0),
            ("POSTROUTING -s 10.9.0.2/32 -o eth0 -j NETMAP --to 192.0.2.0/24", 0),
        ] {
            let rule = rules.split(';').nth(expected).unwrap().trim();
            let told = among(&out(), "ACCEPT", rules);
            assert_eq!(told, Some(format!("-A {rule}")), "{rules}");
        }
        let policy = Some("policy drop of chain FORWARD in table filter".to_owned());
        for rules in ["", "FORWARD -i wg1 -j ACCEPT", "FORWARD -s 10.9.0.2/32 -j ACCEPT"] {
            assert_eq!(among(&out(), "DROP", rules), policy, "{rules}");
        }
    }

    #[test]
    fn answers_and_services_are_looked_at_as_what_they_are() {
        let policy = Some("policy drop of chain FORWARD in table filter".to_owned());
        let known = "FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT";
        assert_eq!(among(&back(), "DROP", known), None);
        let docker = "POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE";
        assert_eq!(among(&back(), "ACCEPT", docker), None);
        assert!(among(&service(), "ACCEPT", docker).is_some());
        assert_eq!(among(&back(), "DROP", "FORWARD -i wg0 -o eth0 -j ACCEPT"), policy);
        assert_eq!(among(&back(), "DROP", "FORWARD -i eth0 -d 10.9.0.0/24 -j ACCEPT"), None);
        assert_eq!(among(&service(), "DROP", known), policy);
        let new = "FORWARD -p tcp -m tcp --dport 443 -j ACCEPT";
        assert_eq!(among(&service(), "DROP", new), None);
        assert_eq!(among(&service(), "ACCEPT", "FORWARD -p tcp --dport 80 -j DROP"), None);
        assert_eq!(among(&service(), "ACCEPT", "FORWARD -p udp -j DROP"), None);
        assert!(among(&service(), "ACCEPT", "FORWARD -p tcp --sport 443 -j DROP").is_some());
        let answers = Flow { is_answer: true, service: Some((Transport::Tcp, 443)), ..out() };
        assert_eq!(among(&answers, "DROP", "FORWARD -p tcp --sport 443 -j ACCEPT"), None);
        assert_eq!(among(&answers, "ACCEPT", "FORWARD -p tcp --sport 80 -j DROP"), None);
    }

    /// The obstacle for what goes out among rules of nft, in a chain of this hook.
    fn by_nft(hook: &str, policy: &str, expressions: Vec<Value>) -> bool {
        let mut objects = vec![
            json!({"table": {"family": "inet", "name": "filter"}}),
            json!({"chain": {"family": "inet", "table": "filter", "name": "one", "type": "filter",
                "hook": hook, "prio": 0, "policy": policy}}),
        ];
        objects.extend(expressions.into_iter().map(|expr| {
            json!({"rule": {"family": "inet", "table": "filter", "chain": "one", "expr": expr}})
        }));
        let nft = Some(Some(json!({ "nftables": objects })));
        found(&Rulesets { iptables: Vec::new(), nft }, &out()).is_some()
    }

    #[test]
    fn rules_of_nft_are_read_as_well() {
        let is = |left: Value, right: Value| json!({"match": {"op": "==", "left": left, "right": right}});
        let meta = |key: &str, name: &str| is(json!({"meta": {"key": key}}), json!(name));
        let ip = |field: &str, right: Value| {
            is(json!({"payload": {"protocol": "ip", "field": field}}), right)
        };
        let net = |addr: &str, len: u8| json!({"prefix": {"addr": addr, "len": len}});
        let tcp = is(json!({"payload": {"protocol": "tcp", "field": "dport"}}), json!(25));
        let (drop, accept) = (json!({"drop": null}), json!({"accept": null}));
        let masquerade = json!({"masquerade": null});
        let mangle = |key: Value, value: Value| json!({"mangle": {"key": key, "value": value}});
        let size = json!({"tcp option": {"name": "maxseg", "field": "size"}});
        let clamp = mangle(size.clone(), json!({"rt": {"key": "mtu"}}));
        for (hook, policy, expr, expected) in [
            ("forward", "drop", json!([meta("oifname", "eth0"), accept]), false),
            ("forward", "drop", json!([meta("oifname", "eth1"), accept]), true),
            ("forward", "drop", json!([ip("saddr", net("10.9.0.0", 24)), accept]), false),
            ("forward", "drop", json!([ip("saddr", json!("10.9.0.2")), accept]), true),
            (
                "forward",
                "accept",
                json!([ip("saddr", json!({"range": ["10.9.0.4", "10.9.0.9"]})), drop]),
                false,
            ),
            ("forward", "accept", json!([ip("daddr", net("192.0.2.0", 24)), drop]), true),
            ("forward", "accept", json!([tcp.clone(), drop]), true),
            ("forward", "drop", json!([tcp, accept]), true),
            ("forward", "accept", json!([meta("l4proto", "icmp"), drop]), true),
            ("forward", "accept", json!([meta("l4proto", "sctp"), drop]), false),
            ("forward", "accept", json!([clamp]), false),
            ("forward", "accept", json!([mangle(size, json!(1200))]), true),
            (
                "forward",
                "accept",
                json!([mangle(json!({"meta": {"key": "mark"}}), json!(1))]),
                true,
            ),
            ("postrouting", "accept", json!([meta("oifname", "eth0"), masquerade]), true),
            ("postrouting", "accept", json!([meta("oifname", "eth1"), masquerade]), false),
            (
                "postrouting",
                "accept",
                json!([ip("saddr", net("172.17.0.0", 16)), masquerade]),
                false,
            ),
            ("input", "drop", json!([drop]), false),
        ] {
            assert_eq!(by_nft(hook, policy, vec![expr.clone()]), expected, "{hook} {expr}");
        }
    }

    #[test]
    fn networks_are_within_others_as_a_whole_in_part_or_not() {
        let within = |ours: &str, there: &str| is_within(&nets(ours), bounds(there));
        assert_eq!(within("10.9.0.0/24", "10.0.0.0/8"), Match::Always);
        assert_eq!(within("10.9.0.0/24 192.0.2.1/32", "10.0.0.0/8"), Match::Maybe);
        assert_eq!(within("10.9.0.0/24", "10.9.0.7"), Match::Maybe);
        assert_eq!(within("10.9.0.0/24", "10.9.1.0/24"), Match::Never);
        assert_eq!(within("", "10.9.1.0/24"), Match::Maybe);
        assert_eq!(within("", "0.0.0.0/0"), Match::Always);
        assert_eq!(within("fd09::/64", "::/0"), Match::Always);
        assert_eq!(within("10.9.0.0/24", "10.0.0.0/255.0.255.0"), Match::Maybe);
    }
}
