//! Whether XDP would go round rules of the host's firewall that concern the device's port, and NAT round those
//! for what is forwarded ([`Firewall`]).
//!
//! What XDP takes from a NIC never meets netfilter. So rules for input that could refuse or limit
//! datagrams to the port would silently lose their effect; and, where AF_XDP sends, rules for output that
//! could refuse, limit or change datagrams from the port. They are looked for in what
//! `iptables-save` and `ip6tables-save` print, of both kinds, for the kernel has two sets of such rules,
//! and `nft -j list ruleset`; all is brought into one form. A rule of which it is not known whether it
//! concerns the port does. Datagrams of each family, the first and the later ones of a flow, are
//! looked at by themselves: files often accept them by different rules.

mod forward;
mod iptables;
mod nft;

use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;

use self::forward::Forwarded;
pub use self::forward::{Firewall, Flow};
use super::programs::{self, Program};
use crate::host::Family;

/// A rule that XDP would go round.
#[derive(Debug, Eq, PartialEq)]
pub struct Obstacle {
    /// The program that shows the rule.
    pub program: &'static str,
    /// The rule, as that program shows it.
    pub rule: String,
}

/// Looks for a rule of this host that concerns datagrams from `nic` to the port, or from the port to `nic`.
/// The rules are those that the host had when this was first asked.
pub fn obstacle(way: Way, port: Option<u16>, nic: &str) -> Option<Obstacle> {
    static RULESETS: OnceLock<Rulesets> = OnceLock::new();
    let nics = names(Path::new("/sys/class/net"), nic);
    let rulesets = RULESETS.get_or_init(Rulesets::of_this_host);
    let Found { program, rule, place } = rulesets.obstacle(way, port, &nics)?;
    let shown = place.and_then(|place| place.shown());
    Some(Obstacle { program, rule: shown.unwrap_or(rule) })
}

/// Which datagrams.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// To the port.
    In,
    /// From the port, to wherever peers are.
    Out,
}

/// What the kernel may call the interface by which those datagrams come that XDP takes from a NIC, or leave
/// that AF_XDP sends: its master instead of the NIC itself, and what is above both, such as VLANs.
fn names(folder: &Path, nic: &str) -> Vec<String> {
    const UPPER: &str = "upper_";
    let mut names = Vec::new();
    let mut waiting = vec![nic.to_owned()];
    while let Some(name) = waiting.pop() {
        let link = folder.join(&name);
        let entries = std::fs::read_dir(&link).into_iter().flatten().flatten();
        let entries = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let uppers = entries.filter_map(|entry| entry.strip_prefix(UPPER).map(str::to_owned));
        waiting.extend(uppers.filter(|upper| !names.contains(upper)));
        if !link.join("master").exists() && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// What is looked for.
#[derive(Clone, Copy, Debug)]
struct Datagrams<'a> {
    way: Way,
    /// The port to which they go, or from which; `None` if it is not known yet.
    port: Option<u16>,
    /// The interface by which they come or leave is one of these.
    nics: &'a [String],
    family: Family,
    state: State,
    /// What else is known of them if they are not for the port, but are forwarded.
    forwarded: Option<&'a Forwarded<'a>>,
}

/// What connection tracking says of datagrams that are not broken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    New,
    Established,
}

/// The firewall, as programs show it.
#[derive(Debug, Default)]
struct Rulesets {
    iptables: Vec<Saved>,
    /// What nft prints, if it is there; `None` inside if it cannot be read.
    nft: Option<Option<Value>>,
}

/// The rules of one kind of iptables.
#[derive(Debug)]
struct Saved {
    program: &'static str,
    family: Family,
    /// Whether they are rules of nf_tables, which nft shows as well, in its words.
    is_nf_tables: bool,
    text: String,
}

const SAVE_PROGRAMS: [(Family, [&str; 3]); 2] = [
    (Family::V4, ["iptables-save", "iptables-nft-save", "iptables-legacy-save"]),
    (Family::V6, ["ip6tables-save", "ip6tables-nft-save", "ip6tables-legacy-save"]),
];

impl Rulesets {
    fn of_this_host() -> Self {
        let mut rulesets = Self::default();
        for (family, programs) in SAVE_PROGRAMS {
            for program in programs {
                rulesets.add(program, family, || shown(program, &[]));
            }
        }
        let text = shown("nft", &["-j", "list", "ruleset"]);
        rulesets.nft = text.map(|text| serde_json::from_str(&text).ok());
        rulesets
    }

    /// Adds what a program prints, unless it shows rules that are known already.
    fn add(
        &mut self,
        program: &'static str,
        family: Family,
        show: impl FnOnce() -> Option<String>,
    ) {
        let is_known = |saved: &Saved| {
            let is_same_kind = match program.contains("-nft-") {
                true => saved.is_nf_tables,
                false => program.contains("-legacy-") && !saved.is_nf_tables,
            };
            saved.family == family && is_same_kind
        };
        if self.iptables.iter().any(is_known) {
            return;
        }
        // It says nothing where there are no tables.
        if let Some(text) = show().filter(|text| !text.trim().is_empty()) {
            let is_nf_tables = text.lines().any(|line| line.contains("(nf_tables)"));
            self.iptables.push(Saved { program, family, is_nf_tables, text });
        }
    }

    fn obstacle(&self, way: Way, port: Option<u16>, nics: &[String]) -> Option<Found> {
        let families = [Family::V4, Family::V6].into_iter();
        let states = [State::New, State::Established];
        let mut kinds = families.flat_map(|family| states.map(|state| (family, state)));
        let forwarded = None;
        kinds.find_map(|(family, state)| {
            self.found(Datagrams { way, port, nics, family, state, forwarded })
        })
    }

    fn found(&self, datagrams: Datagrams<'_>) -> Option<Found> {
        let mut known = Vec::new();
        for saved in self.iptables.iter().filter(|saved| saved.family == datagrams.family) {
            let tables = iptables::tables(&saved.text, saved.program, datagrams);
            if saved.is_nf_tables && self.nft.is_some() {
                known = tables;
            } else if let Some(found) = tables.iter().find_map(Table::found) {
                return Some(found);
            }
        }
        let Some(ruleset) = self.nft.as_ref()? else {
            let rule = "its output cannot be read".to_owned();
            return Some(Found { program: nft::PROGRAM, rule, place: None });
        };
        nft::tables(ruleset, &known, datagrams).iter().find_map(Table::found)
    }
}

/// What a program prints about the firewall, if it is there.
fn shown(program: &'static str, arguments: &[&str]) -> Option<String> {
    if !programs::is_there(program) {
        return None;
    }
    match Program::new(program, arguments.iter().copied()).output() {
        Ok(text) => Some(text),
        Err(failure) => {
            failure.within("warning: the rules of the firewall are not known").print();
            None
        }
    }
}

/// A rule that may refuse the datagrams, or a policy that does.
#[derive(Clone, Debug)]
struct Found {
    program: &'static str,
    rule: String,
    place: Option<nft::Place>,
}

/// A table of the firewall, with what its rules mean for the datagrams.
#[derive(Debug, Default)]
struct Table {
    name: String,
    chains: Vec<Chain>,
}

#[derive(Debug)]
struct Chain {
    name: String,
    program: &'static str,
    /// Whether the kernel asks it about the datagrams, at first.
    is_asked: bool,
    /// What becomes of datagrams at its end.
    drops_at_end: bool,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    text: String,
    place: Option<nft::Place>,
    program: &'static str,
    matches: Match,
    action: Action,
}

/// Whether a rule is for the datagrams.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Match {
    Never,
    /// For some of them, or nobody knows.
    Maybe,
    Always,
}

impl Match {
    fn and(self, other: Match) -> Match {
        match (self, other) {
            (Match::Never, _) | (_, Match::Never) => Match::Never,
            (Match::Always, Match::Always) => Match::Always,
            _ => Match::Maybe,
        }
    }

    fn or(self, other: Match) -> Match {
        self.not().and(other.not()).not()
    }

    fn not(self) -> Match {
        match self {
            Match::Never => Match::Always,
            Match::Maybe => Match::Maybe,
            Match::Always => Match::Never,
        }
    }

    const fn when(is: bool) -> Match {
        if is { Match::Always } else { Match::Never }
    }
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Action {
    Accept,
    /// It refuses them, or may do so; or changes what leaves.
    Refuse,
    Return,
    /// Asks another chain, and comes back if it is a jump.
    Ask {
        chain: String,
        comes_back: bool,
    },
    /// Changes or counts something, and goes on.
    GoOn,
}

/// How a walk through a chain ends.
enum Outcome<'a> {
    /// This rule could refuse the datagrams.
    Refused(&'a Rule),
    /// All of them are let through by this table.
    Accepted,
    /// Some of them come out at the end.
    Ends,
}

impl Table {
    /// A rule of this table that could refuse the datagrams.
    fn found(&self) -> Option<Found> {
        let mut asked = self.chains.iter().filter(|chain| chain.is_asked);
        asked.find_map(|chain| match self.walk(chain, 0) {
            Outcome::Refused(Rule { program, text, place, .. }) => {
                Some(Found { program, rule: text.clone(), place: place.clone() })
            }
            Outcome::Accepted => None,
            Outcome::Ends => chain.drops_at_end.then(|| Found {
                program: chain.program,
                rule: format!("policy drop of chain {} in table {}", chain.name, self.name),
                place: None,
            }),
        })
    }

    fn walk<'a>(&'a self, chain: &'a Chain, depth: usize) -> Outcome<'a> {
        for rule in chain.rules.iter().filter(|rule| rule.matches != Match::Never) {
            let is_for_all = rule.matches == Match::Always;
            match &rule.action {
                Action::GoOn => {}
                Action::Refuse => return Outcome::Refused(rule),
                Action::Accept if is_for_all => return Outcome::Accepted,
                Action::Return if is_for_all => return Outcome::Ends,
                Action::Accept | Action::Return => {}
                Action::Ask { chain: asked, comes_back } => {
                    let asked = self.chains.iter().find(|chain| chain.name == *asked);
                    // The kernel has no loops; who shows one cannot be relied on.
                    let Some(asked) = asked.filter(|_| depth < self.chains.len()) else {
                        return Outcome::Refused(rule);
                    };
                    match self.walk(asked, depth + 1) {
                        Outcome::Refused(rule) => return Outcome::Refused(rule),
                        Outcome::Accepted if is_for_all => return Outcome::Accepted,
                        Outcome::Ends if is_for_all && !comes_back => return Outcome::Ends,
                        Outcome::Accepted | Outcome::Ends => {}
                    }
                }
            }
        }
        Outcome::Ends
    }
}

impl Datagrams<'_> {
    fn is_protocol(self, name: Option<&str>) -> Match {
        if let (Some(forwarded), Some(name)) = (self.forwarded, name) {
            return forwarded.is_protocol(name);
        }
        match name {
            Some("udp" | "17" | "all" | "0") => Match::Always,
            Some(_) => Match::Never,
            None => Match::Maybe,
        }
    }

    /// Whether they come by such an interface.
    fn is_from(self, pattern: Option<&str>) -> Match {
        match self.way {
            Way::In => self.is_by(pattern),
            // What this host sends has come by none.
            Way::Out => Match::Never,
        }
    }

    /// Whether they leave by such an interface.
    fn is_out_of(self, pattern: Option<&str>) -> Match {
        if let (Some(forwarded), Some(pattern)) = (self.forwarded, pattern) {
            return forwarded.is_to_nic(pattern);
        }
        match self.way {
            Way::In => Match::Maybe,
            Way::Out => self.is_by(pattern),
        }
    }

    fn is_by(self, pattern: Option<&str>) -> Match {
        let Some(pattern) = pattern else { return Match::Maybe };
        let is_meant = |name: &String| match pattern.strip_suffix(['+', '*']) {
            Some(start) => name.starts_with(start),
            None => name == pattern,
        };
        if self.nics.iter().all(is_meant) {
            Match::Always
        } else if self.nics.iter().any(is_meant) {
            Match::Maybe
        } else {
            Match::Never
        }
    }

    /// Whether connection tracking calls them so.
    fn is_state(self, name: &str) -> Match {
        match (name.to_ascii_lowercase().as_str(), self.state) {
            ("new", State::New) | ("established", State::Established) => Match::Always,
            // The first is of broken ones. The second is of what another flow has announced, as
            // nobody does for the port.
            ("new" | "established" | "invalid" | "related", _) => Match::Never,
            _ => Match::Maybe,
        }
    }

    /// Whether they go to such an address. XDP takes only what goes to one of this host's, and AF_XDP sends
    /// to neighbours.
    fn is_to_type(self, name: &str) -> Match {
        if self.forwarded.is_some() {
            return Forwarded::is_to_type(name);
        }
        Match::when(name.eq_ignore_ascii_case(match self.way {
            Way::In => "local",
            Way::Out => "unicast",
        }))
    }

    /// Whether they come from such an address.
    fn is_from_type(self, name: &str) -> Match {
        match self.way {
            Way::In => Match::Maybe,
            Way::Out => Match::when(name.eq_ignore_ascii_case("local")),
        }
    }

    /// Whether they are such packets of the link.
    fn is_packet_type(name: &str) -> Match {
        Match::when(matches!(name, "unicast" | "host"))
    }

    /// Whether the port to which they go is one of these.
    fn is_to_between(self, first: u16, last: u16) -> Match {
        match self.forwarded {
            Some(forwarded) => forwarded.is_to_port(first, last),
            None => is_between(self.port.filter(|_| self.way == Way::In), first, last),
        }
    }

    /// Whether the port from which they come is one of these.
    fn is_from_between(self, first: u16, last: u16) -> Match {
        match self.forwarded {
            Some(forwarded) => forwarded.is_from_port(first, last),
            None => is_between(self.port.filter(|_| self.way == Way::Out), first, last),
        }
    }
}

/// Whether a port, if it is known, is one of these.
fn is_between(port: Option<u16>, first: u16, last: u16) -> Match {
    match port {
        Some(port) => Match::when((first..=last).contains(&port)),
        None if (first, last) == (0, u16::MAX) => Match::Always,
        None => Match::Maybe,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_come_by_what_is_above_a_nic() {
        let folder = tempfile::tempdir().unwrap();
        let names = |nic: &str| names(folder.path(), nic);
        let make = |path: &str| std::fs::create_dir_all(folder.path().join(path)).unwrap();
        make("eth0/queues");
        assert_eq!(names("eth0"), ["eth0"]);
        assert_eq!(names("eth9"), ["eth9"]);
        make("eth0/upper_eth0.10");
        make("eth0.10");
        assert_eq!(names("eth0"), ["eth0", "eth0.10"]);
        make("eth1/upper_bond0");
        make("eth1/master");
        make("bond0/upper_bond0.7");
        make("bond0.7/upper_br0");
        make("bond0.7/master");
        make("br0");
        assert_eq!(names("eth1"), ["bond0", "br0"]);
    }

    #[test]
    fn patterns_of_interfaces_must_hold_for_all_to_hold_always() {
        let is_from = |nics: &[&str], pattern| {
            let nics: Vec<String> = nics.iter().map(|&nic| nic.to_owned()).collect();
            let (family, state) = (Family::V4, State::New);
            Datagrams { way: Way::In, port: None, nics: &nics, family, state, forwarded: None }
                .is_from(Some(pattern))
        };
        assert_eq!(is_from(&["eth0"], "eth0"), Match::Always);
        assert_eq!(is_from(&["eth0"], "eth+"), Match::Always);
        assert_eq!(is_from(&["eth0"], "eth1"), Match::Never);
        assert_eq!(is_from(&["eth0", "eth0.10"], "eth0"), Match::Maybe);
        assert_eq!(is_from(&["eth0", "eth0.10"], "eth0*"), Match::Always);
    }

    #[test]
    fn each_kind_of_rules_is_looked_at_once() {
        let mut rulesets = Rulesets::default();
        let by_nft = || Some("# by iptables-save v1.8.9 (nf_tables)\n*filter\nCOMMIT\n".to_owned());
        let by_legacy = || Some("# by iptables-save v1.8.9\n*filter\nCOMMIT\n".to_owned());
        rulesets.add("iptables-save", Family::V4, by_nft);
        rulesets.add("iptables-nft-save", Family::V4, || panic!("it is known"));
        rulesets.add("iptables-legacy-save", Family::V4, by_legacy);
        rulesets.add("ip6tables-save", Family::V6, by_legacy);
        rulesets.add("ip6tables-nft-save", Family::V6, || Some("\n".to_owned()));
        rulesets.add("ip6tables-legacy-save", Family::V6, || panic!("it is known"));
        let programs = rulesets.iptables.iter().map(|saved| saved.program);
        assert_eq!(
            programs.collect::<Vec<_>>(),
            ["iptables-save", "iptables-legacy-save", "ip6tables-save"]
        );
    }
}
