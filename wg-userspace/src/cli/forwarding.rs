//! What `#! Nat`, `Forward` and `Allow` need of the host, and what of its firewall they go round.
//!
//! A host forwards if it is told to; [`settings`] says by which values, which [`Plan`](super::plan::Plan) makes
//! steps, so that `down` takes them back. What TC sends from one interface to the other never comes to
//! netfilter: [`refusals`] looks for rules there that would have no effect.

use std::{collections::BTreeSet, fs};

use ipnet::IpNet;

use super::{
    Failure,
    name::InterfaceName,
    nic_settings,
    shortcut::{Firewall, Flow, Obstacle},
};
use crate::{
    check::{self, Finding, Rule, Severity, Subject},
    config::{Config, ConfigErrors, Forward, Interface, Nat, Problem, Span, Spanned},
    host::Family,
    nat::Lines,
    sys::link,
};

/// Lets the host forward packets of IPv4.
const FORWARD_V4: &str = "net/ipv4/ip_forward";
/// Lets the host forward packets of IPv6.
const FORWARD_V6: &str = "net/ipv6/conf/all/forwarding";

/// A value below `/proc/sys` that is to be set: its path there, and the value.
pub type Setting = (String, &'static str);

/// What has to be set so that the host forwards what the file's lines are about, in this order. `routers` are
/// [interfaces that routers tell of](with_routers).
pub fn settings(interface: &Interface, routers: &[String]) -> Vec<Setting> {
    let is_for = |is_ipv4: bool| {
        interface.nat.iter().any(|nat| nat.is_for(is_ipv4))
            || interface.forward.iter().any(|forward| forward.to.is_ipv4() == is_ipv4)
            || interface.allow.iter().any(|allow| allow.from.addr().is_ipv4() == is_ipv4)
    };
    let mut settings = Vec::new();
    if is_for(true) {
        settings.push((FORWARD_V4.to_owned(), "1"));
    }
    if is_for(false) {
        // Who forwards forgets what routers have told, unless it is to listen nevertheless.
        settings.extend(routers.iter().map(|nic| (format!("net/ipv6/conf/{nic}/accept_ra"), "2")));
        settings.push((FORWARD_V6.to_owned(), "1"));
    }
    settings
}

/// What is said when a value is changed; nothing of those about which people need not know.
pub fn word(key: &str, value: &str, before: &str) -> Option<String> {
    let why = match key {
        FORWARD_V4 | FORWARD_V6 => {
            "this host forwards packets from now on, between all of its \
            interfaces, as far as its firewall lets them"
        }
        key if key.ends_with("/accept_ra") => {
            "else a host that forwards would forget the default \
            route of which routers have told it there"
        }
        key if nic_settings::is_one(key) => {
            let why = "it interrupts less often while it is polled";
            return Some(format!("{key} is {value}, and was {before}: {why}; `down` sets it back"));
        }
        _ => return None,
    };
    let name = sysctl_name(key);
    Some(format!("{name} is {value}, and was {before}: {why}; `down` sets it back"))
}

/// The name that sysctl(8) has for a path below `/proc/sys`.
pub fn sysctl_name(key: &str) -> String {
    let swapped = |c: char| match c {
        '/' => '.',
        '.' => '/',
        c => c,
    };
    key.chars().map(swapped).collect()
}

/// The interfaces of this host with routes of which routers have told by advertisements.
pub fn with_routers() -> Vec<String> {
    with_routers_in(&fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default())
}

/// As [`with_routers`]; `text` is the routing table as `/proc/net/ipv6_route` shows it.
fn with_routers_in(text: &str) -> Vec<String> {
    /// `RTF_DEFAULT` and `RTF_ADDRCONF` of linux/ipv6_route.h.
    const TOLD: u32 = 0x0001_0000 | 0x0004_0000;
    /// `RTF_GATEWAY` of linux/route.h.
    const GATEWAY: u32 = 2;
    let nics = text.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (&flags, &nic) = words.get(8).zip(words.get(9))?;
        let flags = u32::from_str_radix(flags, 16).ok()?;
        (flags & TOLD != 0 && flags & GATEWAY != 0).then(|| nic.to_owned())
    });
    nics.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Something for which `up` refuses a file on this host.
#[derive(Debug)]
pub struct Refusal {
    /// Which rule found it.
    pub rule: Rule,
    message: String,
    span: Span,
    label: &'static str,
    help: String,
}

impl Refusal {
    /// As a finding about a file with this index.
    pub fn finding(&self, file: usize) -> Finding {
        let finding = Finding::new(Severity::Error, self.rule, self.message.clone());
        finding.at(file, self.span, self.label).help(self.help.clone())
    }

    fn problem(&self, config: &Config) -> Problem {
        let place = (self.span, self.label.to_owned());
        config.problem(self.message.clone(), [place], self.help.clone())
    }
}

/// Refuses a file whose lines about forwarding do not go together with its hooks, or with this host's firewall.
///
/// # Errors
/// What is in the way, with its place in the file.
pub fn check(
    interface: &InterfaceName,
    config: &Config,
    bypasses_firewall: bool,
) -> Result<(), Failure> {
    let subject = Subject { name: interface.as_str(), config };
    let mut alone = check::alone(&subject, 0);
    alone.retain(|finding| finding.rule == Rule::NatTwice);
    let problem = |finding: Finding| {
        let places = finding.places.into_iter().map(|place| (place.span, place.label));
        config.problem(finding.message, places, finding.help.unwrap_or_default().into_owned())
    };
    if let Some(errors) = ConfigErrors::new(alone.into_iter().map(problem).collect()) {
        return Err(Failure::config(errors));
    }
    if let Some(refusal) = beyond(config) {
        let errors = ConfigErrors::new(vec![refusal.problem(config)]);
        return errors.map_or(Ok(()), |errors| Err(Failure::config(errors)));
    }
    let refusals =
        if bypasses_firewall { unfit(config) } else { refusals(interface.as_str(), config) };
    match ConfigErrors::new(refusals.iter().map(|refusal| refusal.problem(config)).collect()) {
        Some(errors) => Err(Failure::of_host(errors)),
        None => Ok(()),
    }
}

/// Why the lines cannot be followed together on any host, if they cannot.
pub fn beyond(config: &Config) -> Option<Refusal> {
    let text = Lines::of(&config.interface).check().err()?.to_string();
    let (message, help) = text.split_once("; ").unwrap_or((&text, "write fewer lines"));
    let Interface { nat, forward, allow, .. } = &config.interface;
    let nat = nat.first().map(|nat| nat.span);
    let forward = forward.first().map(|forward| forward.span);
    let allow = allow.first().map(|allow| allow.span);
    Some(Refusal {
        rule: Rule::Unsupported,
        message: message.to_owned(),
        span: nat.or(forward).or(allow)?,
        label: "the first of these lines",
        help: help.to_owned(),
    })
}

/// Links of this host that lines of the file name and NAT cannot use.
fn unfit(config: &Config) -> Vec<Refusal> {
    let nat = config.interface.nat.iter().map(|nat| ("Nat", &nat.out));
    let forward = config.interface.forward.iter().map(|forward| ("Forward", &forward.interface));
    // One that is not there yet may be anything.
    let named = nat.chain(forward);
    let unfit =
        named.filter(|(_, nic)| link::has_ethernet_header(&nic.value).is_ok_and(|has| !has));
    let refusal = |(line, nic): (&str, &Spanned<String>)| Refusal {
        rule: Rule::Unsupported,
        message: format!("{} is no Ethernet interface, which `#! {line}` needs", nic.value),
        span: nic.span,
        label: "`up` refuses this",
        help: "name another NIC, or translate there by a rule of nft in `PostUp`".to_owned(),
    };
    unfit.map(refusal).collect()
}

/// Links that NAT cannot use, and rules of this host's firewall round which lines of the file would send packets; one
/// for each line.
pub fn refusals(interface: &str, config: &Config) -> Vec<Refusal> {
    let unfit = unfit(config);
    let lines = lines(interface, config);
    if lines.is_empty() || !unfit.is_empty() {
        return unfit;
    }
    let firewall = Firewall::of_this_host();
    let refusal = |line: &Line| {
        let found = |flow: &Flow| Some((flow.clone(), firewall.obstacle(flow)?));
        let (flow, obstacle) = line.flows.iter().find_map(found)?;
        Some(line.refusal(&flow, &obstacle))
    };
    lines.iter().filter_map(refusal).collect()
}

/// A line that sends packets round the firewall, and which.
#[derive(Debug)]
struct Line {
    name: &'static str,
    span: Span,
    flows: Vec<Flow>,
}

impl Line {
    fn refusal(&self, flow: &Flow, obstacle: &Obstacle) -> Refusal {
        let Obstacle { program, rule } = obstacle;
        let (name, input, output) = (self.name, &flow.input, &flow.output);
        let translates = ["MASQUERADE", "SNAT", "NETMAP", "masquerade", "snat"];
        let (rule_kind, message, help) = match translates.iter().any(|word| rule.contains(word)) {
            true => (
                Rule::NatTwice,
                format!("netfilter translates what `#! {name}` does: {program}: `{rule}`"),
                "remove one of the two, or let the rule be for others only",
            ),
            false => (
                Rule::FirewallBypassed,
                format!(
                    "`#! {name}` would send packets from {input} to {output} round a rule of the \
                     firewall: {program}: `{rule}`"
                ),
                "accept both ways before that rule, if it is a filter's",
            ),
        };
        let help = format!(
            "{help}; or write `bypass-firewall` at the end of the line, if it need not hold for \
             these packets"
        );
        let (span, label) = (self.span, "`up` refuses this");
        Refusal { rule: rule_kind, message, span, label, help }
    }
}

/// The lines of a file that send packets round the firewall without saying that they may.
fn lines(interface: &str, config: &Config) -> Vec<Line> {
    let nat = config.interface.nat.iter().filter(|nat| !nat.bypass_firewall);
    let nat = nat.map(|nat| {
        let families = [Family::V4, Family::V6].into_iter();
        let families = families.filter(|&family| nat.is_for(family == Family::V4));
        let flows = families.flat_map(|family| nat_flows(interface, config, nat, family));
        Line { name: "Nat", span: nat.span, flows: flows.collect() }
    });
    let forward = config.interface.forward.iter().filter(|forward| !forward.bypass_firewall);
    let forward = forward.map(|forward| {
        let flows = forward_flows(interface, forward).into();
        Line { name: "Forward", span: forward.span, flows }
    });
    nat.chain(forward).collect()
}

fn nat_flows(interface: &str, config: &Config, nat: &Nat, family: Family) -> [Flow; 2] {
    let of_peers = config.peers.iter().flat_map(|peer| &peer.allowed_ips);
    let of_peers = of_peers.map(|net| net.trunc()).filter(|net| Family::of(*net) == family);
    let from: Vec<IpNet> = match nat.from.as_deref() {
        Some(from) => vec![*from],
        None => of_peers.collect(),
    };
    let out = Flow {
        family,
        input: interface.to_owned(),
        output: nat.out.value.clone(),
        from: from.clone(),
        to: Vec::new(),
        service: None,
        is_answer: false,
    };
    let back = Flow {
        input: out.output.clone(),
        output: out.input.clone(),
        from: Vec::new(),
        to: from,
        is_answer: true,
        ..out.clone()
    };
    [out, back]
}

fn forward_flows(interface: &str, forward: &Forward) -> [Flow; 2] {
    let to = IpNet::from(forward.to.ip());
    let come = Flow {
        family: Family::of(to),
        input: forward.interface.value.clone(),
        output: interface.to_owned(),
        from: Vec::new(),
        to: vec![to],
        service: Some((forward.transport.value, forward.to.port())),
        is_answer: false,
    };
    let back = Flow {
        input: come.output.clone(),
        output: come.input.clone(),
        from: vec![to],
        to: Vec::new(),
        is_answer: true,
        ..come.clone()
    };
    [come, back]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn config(lines: &str) -> Config {
        let text = format!(
            "[Interface]\nPrivateKey = SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=\n{lines}\n\
             [Peer]\nPublicKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\
             AllowedIPs = 10.9.0.2/32, fd09::2/128, 10.20.0.0/16\n"
        );
        config::parse("wg0.conf", &text).unwrap()
    }

    #[test]
    fn each_family_is_forwarded_if_a_line_is_about_it() {
        let of = |lines: &str| {
            let settings = settings(&config(lines).interface, &["eth0".to_owned()]);
            settings.into_iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>()
        };
        let (v4, v6) = ("net/ipv4/ip_forward=1", "net/ipv6/conf/all/forwarding=1");
        let told = "net/ipv6/conf/eth0/accept_ra=2";
        assert_eq!(of(""), [""; 0]);
        assert_eq!(of("#! Nat = masquerade out=eth0"), [v4]);
        assert_eq!(of("#! Nat = masquerade out=eth0 from=fd09::/64"), [told, v6]);
        assert_eq!(of("#! Nat = snat out=eth0 to=192.0.2.1,2001:db8::1"), [v4, told, v6]);
        assert_eq!(of("#! Forward = tcp eth0:1 -> [fd09::2]:1"), [told, v6]);
        assert_eq!(of("#! Allow = 10.9.0.0/24 -> 10.0.0.0/8"), [v4]);
    }

    #[test]
    fn names_for_sysctl_keep_the_dots_of_interfaces() {
        assert_eq!(sysctl_name("net/ipv4/ip_forward"), "net.ipv4.ip_forward");
        assert_eq!(sysctl_name("net/ipv6/conf/eth0.7/accept_ra"), "net.ipv6.conf.eth0/7.accept_ra");
    }

    #[test]
    fn routes_of_which_routers_tell_are_told_from_others() {
        let zeros = "0".repeat(32);
        let gateway = format!("fe80{}", "0".repeat(28));
        let line = |flags: &str, nic: &str| {
            format!("{zeros} 00 {zeros} 00 {gateway} 00000400 00000001 00000000 {flags} {nic}\n")
        };
        let text = line("00450003", "eth1")
            + &line("00450003", "eth0")
            + &line("00450003", "eth0")
            + &line("00000003", "eth2")
            + &line("00040001", "eth3")
            + "nonsense\n";
        assert_eq!(with_routers_in(&text), ["eth0", "eth1"]);
    }

    #[test]
    fn what_goes_round_the_firewall_is_what_lines_send_without_saying_so() {
        let lines = |text: &str| lines("wg0", &config(text));
        assert!(lines("#! Allow = ::/0 -> ::/0").is_empty());
        assert!(lines("#! Nat = masquerade out=eth0 bypass-firewall").is_empty());
        let nat = &lines("#! Nat = masquerade out=eth0")[0];
        let [out, back] = &nat.flows[..] else { panic!("{nat:?}") };
        let ours: Vec<IpNet> =
            ["10.9.0.2/32", "10.20.0.0/16"].map(|net| net.parse().unwrap()).into();
        assert_eq!((&*out.input, &*out.output, &out.from), ("wg0", "eth0", &ours));
        assert_eq!((&*back.input, &*back.output, &back.to), ("eth0", "wg0", &ours));
        assert!(back.is_answer && !out.is_answer && back.from.is_empty());
        let both = &lines("#! Nat = snat out=eth0 to=192.0.2.1,2001:db8::1")[0];
        assert_eq!(both.flows.len(), 4);
        let forward = &lines("#! Forward = udp eth1:5000 -> [fd09::2]:53")[0];
        let [come, back] = &forward.flows[..] else { panic!("{forward:?}") };
        assert_eq!((&*come.input, &*come.output), ("eth1", "wg0"));
        assert_eq!(come.to, ["fd09::2/128".parse().unwrap()]);
        assert_eq!(come.service, back.service);
        assert_eq!(come.service.unwrap().1, 53);
    }
}
