//! What `nft -j list ruleset` prints.

use std::collections::HashMap;

use serde_json::Value;

use super::forward::{Forwarded, bounds_of};
use super::{Action, Chain, Datagrams, Match, Rule, Table, Way};
use crate::{
    cli::programs::{self, Program},
    host::Family,
};

pub const PROGRAM: &str = "nft";

/// Where a rule is found again.
#[derive(Clone, Debug)]
pub struct Place {
    family: &'static str,
    table: String,
    chain: String,
    handle: u64,
}

impl Place {
    /// The rule in nft's own words, if it is still there.
    pub fn shown(&self) -> Option<String> {
        let Self { family, table, chain, handle } = self;
        let list = ["-a", "list", "chain", family, table, chain];
        let text = programs::is_there(PROGRAM).then(|| Program::new(PROGRAM, list).output())?;
        let end = format!(" # handle {handle}");
        let text = text.ok()?;
        let rule = text.lines().find_map(|line| line.strip_suffix(&end))?;
        Some(format!("{family} {table} {chain}: {}", rule.trim()))
    }
}

/// The tables that concern the datagrams. Of rules that iptables made, some parts are hidden here: such
/// a rule is what `known` says of it, which are the tables that iptables shows.
pub fn tables(ruleset: &Value, known: &[Table], datagrams: Datagrams<'_>) -> Vec<Table> {
    let mut tables: Vec<(Reader<'_>, Table)> = Vec::new();
    for object in ruleset["nftables"].as_array().into_iter().flatten() {
        let Some((kind, object)) = object.as_object().and_then(|object| object.iter().next())
        else {
            continue;
        };
        let Some(family) = family(object, datagrams) else { continue };
        let name = if kind == "table" { "name" } else { "table" };
        let name = object[name].as_str().unwrap_or_default();
        let is_this =
            |(reader, table): &(Reader<'_>, Table)| reader.family == family && table.name == name;
        let at = tables.iter().position(is_this).unwrap_or_else(|| {
            let table = Table { name: name.to_owned(), chains: Vec::new() };
            tables.push((Reader { family, datagrams, sets: HashMap::new() }, table));
            tables.len() - 1
        });
        let (reader, table) = &mut tables[at];
        match kind.as_str() {
            "set" | "map" => reader.learn(object),
            "chain" => table.chains.push(chain(object, datagrams)),
            "rule" => {
                let chain = table.chains.iter_mut().find(|chain| object["chain"] == *chain.name);
                if let Some(chain) = chain {
                    chain.rules.extend(reader.rules(object));
                }
            }
            _ => {}
        }
    }
    for (reader, table) in &mut tables {
        if reader.family != "inet"
            && let Some(known) = known.iter().find(|known| known.name == table.name)
        {
            table.chains.iter_mut().for_each(|chain| complete(chain, known));
        }
    }
    tables.into_iter().map(|(_, table)| table).collect()
}

/// The family of a table, chain, rule or set whose datagrams may be among ours: other families never see
/// UDP that is for this host or from it, or see it before it comes here.
fn family(object: &Value, datagrams: Datagrams<'_>) -> Option<&'static str> {
    match (object["family"].as_str()?, datagrams.family) {
        ("inet", _) => Some("inet"),
        ("ip", Family::V4) => Some("ip"),
        ("ip6", Family::V6) => Some("ip6"),
        ("netdev", _) if datagrams.way == Way::Out => Some("netdev"),
        _ => None,
    }
}

fn chain(object: &Value, datagrams: Datagrams<'_>) -> Chain {
    let hook = object["hook"].as_str();
    let is_asked = match (datagrams.forwarded, datagrams.way, hook) {
        (Some(forwarded), _, hook) => hook == Some(forwarded.hook()),
        (None, Way::In, Some("input")) | (None, Way::Out, Some("output" | "postrouting")) => true,
        (None, Way::Out, Some("egress")) => {
            // One device, or several.
            let names = object["dev"]
                .as_array()
                .map_or(std::slice::from_ref(&object["dev"]), Vec::as_slice);
            names.iter().any(|name| datagrams.is_out_of(name.as_str()) != Match::Never)
        }
        _ => false,
    };
    Chain {
        name: object["name"].as_str().unwrap_or_default().to_owned(),
        program: PROGRAM,
        is_asked,
        drops_at_end: object["policy"] == "drop",
        rules: Vec::new(),
    }
}

/// Puts what iptables says of a chain where this says nothing. Who adds rules to such a chain by nft gets
/// a line of iptables for each of them as well, which leaves out what iptables does not know.
fn complete(chain: &mut Chain, known: &Table) {
    let Some(known) = known.chains.iter().find(|known| known.name == chain.name) else { return };
    chain.program = known.program;
    let handle = |rule: &Rule| rule.place.as_ref().map(|place| place.handle);
    let handles = chain.rules.chunk_by(|one, next| handle(one) == handle(next)).count();
    if handles != known.rules.len() {
        return;
    }
    let mut rules = Vec::new();
    let ours = chain.rules.chunk_by(|one, next| handle(one) == handle(next));
    for (ours, theirs) in ours.zip(&known.rules) {
        if ours.iter().any(|rule| rule.text.contains(HIDDEN)) {
            rules.push(theirs.clone());
        } else {
            rules.extend(ours.iter().cloned().map(|rule| Rule {
                text: theirs.text.clone(),
                program: theirs.program,
                place: None,
                ..rule
            }));
        }
    }
    chain.rules = rules;
}

/// How an expression begins of which only iptables can say what it is.
const HIDDEN: &str = "{\"xt\":";

/// Reads the rules of a table.
struct Reader<'a> {
    family: &'static str,
    datagrams: Datagrams<'a>,
    /// Elements of sets and maps with names. Those that change by themselves are not here.
    sets: HashMap<String, Vec<Value>>,
}

impl Reader<'_> {
    fn learn(&mut self, set: &Value) {
        let flags = set["flags"].as_array().into_iter().flatten();
        let changes = flags.into_iter().any(|flag| flag == "dynamic" || flag == "timeout");
        // Not every nft shows the flag of sets to which rules add, but these have a size.
        if changes || set.get("timeout").is_some() || set.get("size").is_some() {
            return;
        }
        if let Some(name) = set["name"].as_str() {
            let elements = set["elem"].as_array().cloned().unwrap_or_default();
            self.sets.insert(name.to_owned(), elements);
        }
    }

    /// A rule may have several verdicts, by its maps; each is one here. There is one at least.
    fn rules(&self, rule: &Value) -> Vec<Rule> {
        let part = |name: &str| rule[name].as_str().unwrap_or_default().to_owned();
        let (table, chain) = (part("table"), part("chain"));
        let text = format!("{} {table} {chain}: {}", self.family, rule["expr"]);
        let mut matches = Match::Always;
        let mut ends = Vec::new();
        for expression in rule["expr"].as_array().into_iter().flatten() {
            let Some((kind, value)) =
                expression.as_object().and_then(|object| object.iter().next())
            else {
                continue;
            };
            let done = self.datagrams.forwarded.and_then(|_| Forwarded::statement(kind, value));
            if let Some(action) = done {
                ends.push((matches, action));
                continue;
            }
            match kind.as_str() {
                "match" => matches = matches.and(self.condition(value)),
                "counter" | "log" | "comment" | "ct helper" | "notrack" => {}
                // What is kept of the flow changes nothing of what leaves.
                "mangle" if self.datagrams.way == Way::In || value["key"].get("ct").is_some() => {}
                "mangle" | "snat" | "dnat" | "redirect" | "fwd" | "dup"
                    if self.datagrams.way == Way::Out =>
                {
                    ends.push((matches, Action::Refuse));
                }
                // It gives an address of this host to what comes from elsewhere; ours have one.
                "masquerade" => {}
                "vmap" => ends.extend(
                    self.verdicts(value).into_iter().map(|(is, end)| (matches.and(is), end)),
                ),
                _ => match verdict(expression) {
                    Some(action) => ends.push((matches, action)),
                    // A limit, a lookup, what is put into a set that may be full, or something new.
                    None => matches = matches.and(Match::Maybe),
                },
            }
        }
        if ends.is_empty() {
            // A target that is hidden may be one that refuses.
            let may_refuse = text.contains(HIDDEN);
            ends.push((matches, if may_refuse { Action::Refuse } else { Action::GoOn }));
        }
        let handle = rule["handle"].as_u64().unwrap_or_default();
        let place = Place { family: self.family, table, chain, handle };
        let rule = |(matches, action)| Rule {
            text: text.clone(),
            place: Some(place.clone()),
            program: PROGRAM,
            matches,
            action,
        };
        ends.into_iter().map(rule).collect()
    }

    /// What a map of verdicts may say, and to what.
    fn verdicts(&self, map: &Value) -> Vec<(Match, Action)> {
        let Some(pairs) = self.elements(&map["data"]) else {
            // It may say anything.
            return vec![(Match::Maybe, Action::Refuse)];
        };
        let end = |pair: &Value| Some((self.holds(&map["key"], &pair[0]), verdict(&pair[1])?));
        pairs.iter().filter_map(end).collect()
    }

    /// The elements of a set or map, with a name or without; `None` if they are not known.
    fn elements<'v>(&'v self, set: &'v Value) -> Option<&'v [Value]> {
        match set {
            Value::String(name) => self.sets.get(name.strip_prefix('@')?).map(Vec::as_slice),
            set => set["set"].as_array().map(Vec::as_slice),
        }
    }

    fn condition(&self, condition: &Value) -> Match {
        let (left, right) = (&condition["left"], &condition["right"]);
        // Whatever it asks of another protocol: there must be such a header.
        if self.is_of_others(left) {
            return Match::Never;
        }
        let names_set = right.as_str().is_some_and(|name| name.starts_with('@'));
        let is_one_of = || {
            if names_set || right.get("set").is_some() {
                self.elements(right).map_or(Match::Maybe, |values| {
                    let values = values.iter().map(|value| self.holds(left, value));
                    values.fold(Match::Never, Match::or)
                })
            } else if let Some(flags) = right.as_array() {
                flags.iter().map(|flag| self.holds(left, flag)).fold(Match::Never, Match::or)
            } else {
                self.holds(left, right)
            }
        };
        let limit = || right.as_u64().and_then(|value| u16::try_from(value).ok());
        let is_up_to = |last: Option<u16>| match last {
            Some(last) if is_port(left, "dport") => self.datagrams.is_to_between(0, last),
            Some(last) if is_port(left, "sport") => self.datagrams.is_from_between(0, last),
            _ => Match::Maybe,
        };
        match condition["op"].as_str() {
            Some("==" | "in") => is_one_of(),
            Some("!=") => is_one_of().not(),
            Some("<=") => is_up_to(limit()),
            Some(">") => is_up_to(limit()).not(),
            Some("<") => is_up_to(limit().and_then(|limit| limit.checked_sub(1))),
            Some(">=") => is_up_to(limit().and_then(|limit| limit.checked_sub(1))).not(),
            _ => Match::Maybe,
        }
    }

    /// Whether datagrams of ours have no such header.
    fn is_of_others(&self, left: &Value) -> bool {
        if let Some(parts) = left["concat"].as_array() {
            return parts.iter().any(|part| self.is_of_others(part));
        }
        if let Some(masked) = left["&"].as_array() {
            return masked.iter().any(|part| self.is_of_others(part));
        }
        let protocol = left["payload"]["protocol"].as_str();
        if let Some(forwarded) = self.datagrams.forwarded {
            return protocol.is_some_and(|protocol| !forwarded.has_header(protocol));
        }
        match (protocol, self.datagrams.family) {
            (Some("tcp" | "icmp" | "icmpv6" | "igmp" | "sctp" | "dccp" | "ah" | "esp"), _)
            | (Some("comp" | "arp" | "udplite"), _)
            | (Some("ip6"), Family::V4)
            | (Some("ip"), Family::V6) => true,
            // XDP leaves packets with such headers to the kernel.
            _ => left.get("exthdr").is_some(),
        }
    }

    /// Whether what is on the left has this value.
    fn holds(&self, left: &Value, value: &Value) -> Match {
        let value = value.pointer("/elem/val").unwrap_or(value);
        if let Some(parts) = left["concat"].as_array() {
            return match value["concat"].as_array() {
                Some(values) if values.len() == parts.len() => {
                    let pairs = parts.iter().zip(values);
                    let parts = pairs.map(|(part, value)| self.holds(part, value));
                    parts.fold(Match::Always, Match::and)
                }
                _ => Match::Maybe,
            };
        }
        if self.is_of_others(left) {
            return Match::Never;
        }
        let name = value.as_str();
        let named = |holds: &dyn Fn(&str) -> Match| name.map_or(Match::Maybe, holds);
        let payload = left["payload"]["protocol"].as_str().zip(left["payload"]["field"].as_str());
        match (payload, left["meta"]["key"].as_str()) {
            (Some(("udp" | "th" | "tcp", "dport")), _) => {
                is_one_of(value, |first, last| self.datagrams.is_to_between(first, last))
            }
            (Some(("udp" | "th" | "tcp", "sport")), _) => {
                is_one_of(value, |first, last| self.datagrams.is_from_between(first, last))
            }
            (Some(("ip", "protocol") | ("ip6", "nexthdr")), _) | (_, Some("l4proto")) => {
                match value.as_u64() {
                    // For iptables that number stands for all.
                    Some(0) => Match::Never,
                    Some(number) => self.datagrams.is_protocol(Some(&number.to_string())),
                    None => named(&|name| self.datagrams.is_protocol(Some(name))),
                }
            }
            (_, Some("iifname" | "iif")) => self.datagrams.is_from(name),
            (_, Some("oifname" | "oif")) => self.datagrams.is_out_of(name),
            (_, Some("nfproto" | "protocol")) => named(&|name| match self.datagrams.family {
                Family::V4 => Match::when(matches!(name, "ipv4" | "ip")),
                Family::V6 => Match::when(matches!(name, "ipv6" | "ip6")),
            }),
            (_, Some("pkttype")) => named(&Datagrams::is_packet_type),
            _ if left["ct"]["key"] == "state" => named(&|name| self.datagrams.is_state(name)),
            _ if self.datagrams.forwarded.is_some()
                && let Some(is) = self.holds_forwarded(left, value) =>
            {
                is
            }
            _ if left["fib"]["result"] == "type"
                && left["fib"]["flags"].as_array().is_some_and(|flags| flags == &["daddr"]) =>
            {
                named(&|name| self.datagrams.is_to_type(name))
            }
            _ if left["fib"]["result"] == "type"
                && left["fib"]["flags"].as_array().is_some_and(|flags| flags == &["saddr"]) =>
            {
                named(&|name| self.datagrams.is_from_type(name))
            }
            _ => Match::Maybe,
        }
    }

    /// As [`holds`](Self::holds), for what is only known of datagrams that are forwarded.
    fn holds_forwarded(&self, left: &Value, value: &Value) -> Option<Match> {
        let forwarded = self.datagrams.forwarded?;
        let field = left["payload"]["protocol"].as_str().zip(left["payload"]["field"].as_str());
        match field {
            Some(("ip" | "ip6", "saddr")) => Some(forwarded.is_from_there(bounds_of(value))),
            Some(("ip" | "ip6", "daddr")) => Some(forwarded.is_to_there(bounds_of(value))),
            _ => None,
        }
    }
}

/// Whether the port is this, or in this range.
fn is_one_of(value: &Value, is_between: impl Fn(u16, u16) -> Match) -> Match {
    let port = |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok());
    if let (Some(first), Some(last)) = (port(&value["range"][0]), port(&value["range"][1])) {
        return is_between(first, last);
    }
    // Else the name of a service.
    port(value).map_or(Match::Maybe, |port| is_between(port, port))
}

fn is_port(left: &Value, field: &str) -> bool {
    let payload = &left["payload"];
    (payload["protocol"] == "udp" || payload["protocol"] == "th") && payload["field"] == field
}

fn verdict(expression: &Value) -> Option<Action> {
    let (kind, value) = expression.as_object()?.iter().next()?;
    let target = || value["target"].as_str().unwrap_or_default().to_owned();
    Some(match kind.as_str() {
        "accept" => Action::Accept,
        "drop" | "reject" | "queue" | "synproxy" => Action::Refuse,
        "return" => Action::Return,
        "continue" => Action::GoOn,
        "jump" => Action::Ask { chain: target(), comes_back: true },
        "goto" => Action::Ask { chain: target(), comes_back: false },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{Found, Rulesets, Saved};
    use super::*;

    fn chain(name: &str, hook: Option<&str>, policy: &str) -> Value {
        match hook {
            Some(hook) => json!({"chain": {"family": "inet", "table": "filter", "name": name,
                "type": "filter", "hook": hook, "prio": 0, "policy": policy}}),
            None => json!({"chain": {"family": "inet", "table": "filter", "name": name}}),
        }
    }

    fn rule(chain: &str, expr: Value) -> Value {
        json!({"rule": {"family": "inet", "table": "filter", "chain": chain, "expr": expr}})
    }

    fn found(iptables: Vec<Saved>, objects: Vec<Value>) -> Option<Found> {
        found_by(Way::In, iptables, objects)
    }

    fn found_by(way: Way, iptables: Vec<Saved>, objects: Vec<Value>) -> Option<Found> {
        let rulesets = Rulesets { iptables, nft: Some(Some(json!({ "nftables": objects }))) };
        rulesets.obstacle(way, Some(51820), &["eth0".to_owned()])
    }

    fn of(policy: &str, rules: Vec<Value>) -> Option<String> {
        let mut objects = vec![
            json!({"metainfo": {"version": "1.0.6"}}),
            json!({"table": {"family": "inet", "name": "filter"}}),
            json!({"set": {"family": "inet", "table": "filter", "name": "ours",
                "type": "inet_service", "elem": [53, {"range": [51000, 52000]}]}}),
            json!({"set": {"family": "inet", "table": "filter", "name": "others",
                "type": "inet_service", "elem": [{"elem": {"val": 53, "comment": "DNS"}}]}}),
            json!({"set": {"family": "inet", "table": "filter", "name": "moving", "size": 9,
                "type": "inet_service", "elem": [53]}}),
            json!({"map": {"family": "inet", "table": "filter", "name": "verdicts",
                "type": "inet_service", "map": "verdict",
                "elem": [[53, {"drop": null}], [51820, {"accept": null}]]}}),
            chain("input", Some("input"), policy),
            chain("forward", Some("forward"), "drop"),
            chain("mine", None, ""),
        ];
        objects.extend(rules);
        found(Vec::new(), objects).map(|found| found.rule)
    }

    fn udp(field: &str, op: &str, right: Value) -> Value {
        json!({"match": {"op": op, "left": {"payload": {"protocol": "udp", "field": field}},
            "right": right}})
    }

    fn dport(right: Value) -> Value {
        udp("dport", "==", right)
    }

    fn meta(key: &str, right: Value) -> Value {
        json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": right}})
    }

    fn state(op: &str, right: Value) -> Value {
        json!({"match": {"op": op, "left": {"ct": {"key": "state"}}, "right": right}})
    }

    fn ip(protocol: &str, field: &str, right: Value) -> Value {
        json!({"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": field}},
            "right": right}})
    }

    fn vmap(key: Value, data: Value) -> Value {
        json!({"vmap": {"key": key, "data": data}})
    }

    #[test]
    fn rules_that_cannot_touch_the_port_are_none() {
        let accept = json!({"accept": null});
        let drop = json!({"drop": null});
        let dport_key = json!({"payload": {"protocol": "udp", "field": "dport"}});
        let both = json!({"concat": [{"meta": {"key": "iifname"}}, dport_key]});
        let others = json!({"set": [{"concat": ["eth1", 51820]}, {"concat": ["eth0", 53]}]});
        let fib = json!({"match": {"op": "==", "left": {"fib": {"result": "type",
            "flags": ["daddr"]}}, "right": {"set": ["broadcast", "multicast"]}}});
        for (policy, expr) in [
            ("accept", json!([])),
            ("accept", json!([dport(json!(53)), drop])),
            ("accept", json!([dport(json!({"range": [53, 54]})), drop])),
            ("accept", json!([dport(json!("@others")), drop])),
            ("accept", json!([udp("dport", "!=", json!({"set": [53, 51820]})), drop])),
            ("accept", json!([udp("dport", "<", json!(1024)), drop])),
            ("accept", json!([udp("dport", ">=", json!(51821)), drop])),
            ("accept", json!([meta("iifname", json!("lo")), drop])),
            ("accept", json!([meta("l4proto", json!("tcp")), {"counter": {}}, drop])),
            ("accept", json!([state("in", json!("invalid")), drop])),
            ("accept", json!([fib, drop])),
            ("accept", json!([meta("pkttype", json!("broadcast")), drop])),
            ("accept", json!([vmap(dport_key.clone(), json!({"set": [[53, drop]]}))])),
            ("accept", json!([vmap(dport_key, json!("@verdicts"))])),
            ("accept", json!([{"match": {"op": "==", "left": both, "right": others}}, drop])),
            ("drop", json!([state("!=", json!("invalid")), accept])),
            ("drop", json!([dport(json!(51820)), {"counter": null}, accept])),
            ("drop", json!([dport(json!("@ours")), accept])),
            ("drop", json!([udp("dport", ">", json!(1024)), accept])),
            ("drop", json!([dport(json!({"set": [53, {"range": [51000, 52000]}]})), accept])),
            ("drop", json!([meta("l4proto", json!({"set": ["udp", "icmp"]})), accept])),
        ] {
            assert_eq!(of(policy, vec![rule("input", expr.clone())]), None, "{policy} {expr}");
        }
        let jump = json!([{"jump": {"target": "mine"}}]);
        let mine = rule("mine", json!([dport(json!(51820)), accept]));
        assert_eq!(of("drop", vec![rule("input", jump), mine.clone()]), None);
        let by_protocol = json!({"set": [["tcp", {"drop": null}],
            ["udp", {"jump": {"target": "mine"}}]]});
        let by_protocol = json!([vmap(json!({"meta": {"key": "l4proto"}}), by_protocol)]);
        assert_eq!(of("drop", vec![rule("input", by_protocol.clone()), mine]), None);
        assert!(of("drop", vec![rule("input", by_protocol)]).is_some());
    }

    #[test]
    fn rules_that_may_touch_the_port_are_told() {
        let accept = json!({"accept": null});
        let drop = json!({"drop": null});
        let jump = json!([{"jump": {"target": "mine"}}]);
        let saddr = ip("ip", "saddr", json!("192.0.2.1"));
        let dport_key = json!({"payload": {"protocol": "udp", "field": "dport"}});
        for rules in [
            vec![rule("input", json!([drop]))],
            vec![rule("input", json!([dport(json!("@ours")), drop]))],
            vec![rule("input", json!([dport(json!("@moving")), drop]))],
            vec![rule("input", json!([dport(json!("@unheard-of")), drop]))],
            vec![rule("input", json!([udp("dport", "!=", json!(53)), drop]))],
            vec![rule("input", json!([udp("dport", ">", json!(1024)), drop]))],
            vec![rule("input", json!([udp("sport", "==", json!(53)), drop]))],
            vec![rule("input", json!([state("!=", json!("invalid")), drop]))],
            vec![rule("input", json!([state("in", json!(["new", "related"])), drop]))],
            vec![rule("input", json!([saddr, {"reject": {"type": "icmp"}}]))],
            vec![rule(
                "input",
                json!([{"limit": {"rate": 5, "per": "second", "inv": true}}, drop]),
            )],
            vec![rule("input", json!([{"xt": null}, drop]))],
            vec![rule("input", json!([{"xt": {"type": "target", "name": "REJECT"}}]))],
            vec![rule("input", json!([{"vmap": {"key": "x", "data": "@map"}}]))],
            vec![rule(
                "input",
                json!([vmap(
                    dport_key.clone(),
                    json!({"set": [[{"range": [51000, 52000]}, drop]]})
                )]),
            )],
            vec![rule("input", jump.clone()), rule("mine", json!([drop]))],
            // What accepts some does not save the others.
            vec![
                rule("input", json!([{"set": {"op": "add", "stmt": [{"limit": {}}]}}, accept])),
                rule("input", json!([drop])),
            ],
        ] {
            assert!(of("accept", rules.clone()).is_some(), "{rules:?}");
        }
    }

    /// The obstacle for what leaves, with a chain at this hook.
    fn leaving(hook: &str, policy: &str, expr: Value) -> Option<String> {
        let objects = vec![
            json!({"table": {"family": "inet", "name": "filter"}}),
            chain("input", Some("input"), "drop"),
            chain("forward", Some("forward"), "drop"),
            chain("out", Some(hook), policy),
            chain("mine", None, ""),
            rule("mine", json!([{"drop": null}])),
            rule("out", expr),
        ];
        found_by(Way::Out, Vec::new(), objects).map(|found| found.rule)
    }

    #[test]
    fn what_leaves_is_looked_at_where_it_leaves() {
        let drop = json!({"drop": null});
        let accept = json!({"accept": null});
        let mark = |key: Value| json!({"mangle": {"key": key, "value": 1}});
        for hook in ["output", "postrouting"] {
            for (policy, expr) in [
                ("accept", json!([])),
                ("accept", json!([meta("oifname", json!("eth1")), drop])),
                ("accept", json!([meta("iifname", json!("wg0")), drop])),
                ("accept", json!([udp("sport", "==", json!(53)), drop])),
                ("accept", json!([udp("sport", "<", json!(1024)), drop])),
                ("accept", json!([meta("l4proto", json!("tcp")), drop])),
                ("accept", json!([meta("oifname", json!("eth0")), {"masquerade": null}])),
                ("accept", json!([mark(json!({"ct": {"key": "mark"}}))])),
                (
                    "accept",
                    json!([meta("l4proto", json!("tcp")), mark(json!({"meta": {"key": "mark"}}))]),
                ),
                ("drop", json!([udp("sport", "==", json!(51820)), accept])),
                ("drop", json!([meta("oifname", json!("eth0")), accept])),
            ] {
                assert_eq!(leaving(hook, policy, expr.clone()), None, "{hook} {policy} {expr}");
            }
            for (policy, expr) in [
                ("accept", json!([drop])),
                ("drop", json!([])),
                ("drop", json!([dport(json!(51820)), accept])),
                ("accept", json!([dport(json!(53)), drop])),
                ("accept", json!([udp("sport", "==", json!(51820)), {"limit": {}}, drop])),
                ("accept", json!([meta("oifname", json!("eth0")), {"jump": {"target": "mine"}}])),
                (
                    "accept",
                    json!([meta("oifname", json!("eth0")), {"snat": {"addr": "192.0.2.7"}}]),
                ),
                ("accept", json!([mark(json!({"meta": {"key": "mark"}}))])),
                ("accept", json!([mark(json!({"payload": {"protocol": "ip", "field": "dscp"}}))])),
                ("accept", json!([ip("ip", "daddr", json!("192.0.2.1")), drop])),
            ] {
                assert!(leaving(hook, policy, expr.clone()).is_some(), "{hook} {policy} {expr}");
            }
        }
        assert_eq!(leaving("prerouting", "drop", json!([drop])), None);
    }

    #[test]
    fn chains_at_the_way_out_of_a_nic_are_looked_at() {
        let objects = |family: &str, hook: &str, dev: Value| {
            vec![json!({"chain": {"family": family, "table": "x", "name": "out", "type": "filter",
                "hook": hook, "prio": 0, "policy": "drop", "dev": dev}})]
        };
        let found = |objects: Vec<Value>| found_by(Way::Out, Vec::new(), objects).is_some();
        assert!(found(objects("netdev", "egress", json!("eth0"))));
        assert!(found(objects("netdev", "egress", json!(["eth1", "eth0"]))));
        assert!(!found(objects("netdev", "egress", json!("eth1"))));
        assert!(!found(objects("netdev", "ingress", json!("eth0"))));
        assert!(!found(objects("bridge", "output", json!("eth0"))));
    }

    #[test]
    fn each_family_and_each_state_must_be_accepted() {
        let accept = json!({"accept": null});
        let policy = Some("policy drop of chain input in table filter".to_owned());
        let of = |rules: &[Value]| {
            let rules = rules.iter().map(|rule| json!([rule, accept]));
            of("drop", rules.map(|expr| rule("input", expr)).collect())
        };
        let (v4, v6) = (ip("ip", "protocol", json!("udp")), ip("ip6", "nexthdr", json!("udp")));
        assert_eq!(of(std::slice::from_ref(&v4)), policy);
        assert_eq!(of(std::slice::from_ref(&v6)), policy);
        assert_eq!(of(&[v4, v6]), None);
        let known = state("in", json!(["established", "related"]));
        assert_eq!(of(std::slice::from_ref(&known)), policy);
        assert_eq!(of(&[known, state("==", json!({"set": ["new", "untracked"]}))]), None);
    }

    /// A table that iptables made, and what iptables says of it.
    #[test]
    fn what_is_hidden_is_said_by_iptables() {
        let saved = |lines: &str| {
            let text = format!("*filter\n:INPUT ACCEPT [0:0]\n{lines}COMMIT\n");
            let program = "iptables-save";
            vec![Saved { program, family: Family::V4, is_nf_tables: true, text }]
        };
        let rule = |handle: u32, expr: Value| {
            json!({"rule": {"family": "ip", "table": "filter", "chain": "INPUT",
                "handle": handle, "expr": expr}})
        };
        let with = |rules: Vec<Value>| {
            let base = json!({"chain": {"family": "ip", "table": "filter", "name": "INPUT",
                "type": "filter", "hook": "input", "prio": 0, "policy": "accept"}});
            std::iter::once(base).chain(rules).collect::<Vec<_>>()
        };
        let hidden =
            rule(4, json!([{"xt": {"type": "match", "name": "multiport"}}, {"drop": null}]));
        let others = "-A INPUT -p udp -m multiport --dports 53,54 -j DROP\n";
        assert!(found(saved(others), with(vec![hidden.clone()])).is_none());
        let ours = "-A INPUT -p udp -m multiport --dports 53,51820 -j DROP\n";
        let told = found(saved(ours), with(vec![hidden.clone()])).unwrap();
        assert_eq!((told.program, told.rule.as_str()), ("iptables-save", ours.trim()));

        // Where they do not agree on the rules, what is hidden may be anything.
        assert!(found(saved(""), with(vec![hidden.clone()])).is_some());
        // Sets are nft's: iptables leaves them out.
        let by_nft = |port: u16| {
            let ports = json!({"set": [53, port]});
            with(vec![hidden.clone(), rule(5, json!([dport(ports), {"drop": null}]))])
        };
        let lines = format!("{others}-A INPUT -p udp -j DROP\n");
        assert!(found(saved(&lines), by_nft(54)).is_none());
        assert!(found(saved(&lines), by_nft(51820)).is_some());
        // A chain of nft's in a table that iptables has, too.
        let mut objects = with(Vec::new());
        objects.push(json!({"chain": {"family": "ip", "table": "filter", "name": "input",
            "type": "filter", "hook": "input", "prio": 0, "policy": "drop"}}));
        let told = found(saved(""), objects).unwrap();
        assert_eq!(told.rule, "policy drop of chain input in table filter");
    }
}
