//! Whether XDP would go round rules of the host's firewall that concern the device's port.
//!
//! What XDP takes from a NIC never meets netfilter. So rules for input that could refuse or limit
//! datagrams to the port would silently lose their effect. They are looked for in what
//! `iptables-save`, `ip6tables-save` and `nft -j list ruleset` print; both are brought into one form,
//! and a rule of which it is not known whether it concerns the port does.

use serde_json::Value;

use super::programs::{self, Program};

/// A rule that XDP would go round.
#[derive(Debug, Eq, PartialEq)]
pub struct Obstacle {
    /// The program that shows the rule.
    pub program: &'static str,
    /// The rule, as that program shows it.
    pub rule: String,
}

/// What is looked for.
#[derive(Clone, Copy, Debug)]
struct Datagrams<'a> {
    /// Their destination port; `None` if it is not known yet.
    port: Option<u16>,
    /// The NIC by which they come.
    nic: &'a str,
}

/// Looks for a rule of this host that concerns datagrams from `nic` to the port.
pub fn obstacle(port: Option<u16>, nic: &str) -> Option<Obstacle> {
    let datagrams = Datagrams { port, nic };
    let mut known_to_iptables = Vec::new();
    for (program, family) in [("iptables-save", "ip"), ("ip6tables-save", "ip6")] {
        if let Some(text) = shown(program, &[]) {
            let tables = iptables(&text, datagrams);
            if let Some(rule) = tables.iter().find_map(|table| table.obstacle()) {
                return Some(Obstacle { program, rule });
            }
            known_to_iptables.extend(tables.into_iter().map(|table| (family, table.name)));
        }
    }
    let text = shown("nft", &["-j", "list", "ruleset"])?;
    let Ok(ruleset) = serde_json::from_str(&text) else {
        let rule = "its output cannot be read".to_owned();
        return Some(Obstacle { program: "nft", rule });
    };
    let tables = nft(&ruleset, datagrams);
    // What iptables made was looked at in its own words, which say more.
    let mut others = tables.iter().filter(|(family, table)| {
        !known_to_iptables.iter().any(|(known, name)| known == family && *name == table.name)
    });
    let rule = others.find_map(|(_, table)| table.obstacle())?;
    Some(Obstacle { program: "nft", rule })
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

/// A table of the firewall, with what its rules mean for the datagrams.
#[derive(Debug, Default)]
struct Table {
    name: String,
    chains: Vec<Chain>,
}

#[derive(Debug, Default)]
struct Chain {
    name: String,
    /// Whether the kernel asks it about input.
    is_input: bool,
    /// What becomes of datagrams at its end.
    drops_at_end: bool,
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    text: String,
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
    /// It refuses them, or may do so.
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
enum Outcome {
    /// This rule could refuse the datagrams.
    Refused(String),
    /// All of them are let through by this table.
    Accepted,
    /// Some of them come out at the end.
    Ends,
}

impl Table {
    /// A rule of this table that could refuse the datagrams.
    fn obstacle(&self) -> Option<String> {
        let inputs = self.chains.iter().filter(|chain| chain.is_input);
        inputs.into_iter().find_map(|chain| match self.walk(chain, 0) {
            Outcome::Refused(rule) => Some(rule),
            Outcome::Accepted => None,
            Outcome::Ends => chain
                .drops_at_end
                .then(|| format!("policy drop of chain {} in table {}", chain.name, self.name)),
        })
    }

    fn walk(&self, chain: &Chain, depth: usize) -> Outcome {
        for rule in chain.rules.iter().filter(|rule| rule.matches != Match::Never) {
            let is_for_all = rule.matches == Match::Always;
            match &rule.action {
                Action::GoOn => {}
                Action::Refuse => return Outcome::Refused(rule.text.clone()),
                Action::Accept if is_for_all => return Outcome::Accepted,
                Action::Return if is_for_all => return Outcome::Ends,
                Action::Accept | Action::Return => {}
                Action::Ask { chain: asked, comes_back } => {
                    let asked = self.chains.iter().find(|chain| chain.name == *asked);
                    // The kernel has no loops; who shows one cannot be relied on.
                    let Some(asked) = asked.filter(|_| depth < self.chains.len()) else {
                        return Outcome::Refused(rule.text.clone());
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

/// Reads what `iptables-save` prints.
fn iptables(text: &str, datagrams: Datagrams<'_>) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Table { name: name.to_owned(), chains: Vec::new() });
        } else if let Some(table) = tables.last_mut() {
            if let Some(chain) = line.strip_prefix(':') {
                let mut words = chain.split_ascii_whitespace();
                let name = words.next().unwrap_or_default().to_owned();
                let drops_at_end = !matches!(words.next(), Some("ACCEPT" | "-"));
                let is_input = name == "INPUT";
                table.chains.push(Chain { name, is_input, drops_at_end, rules: Vec::new() });
            } else if line.starts_with("-A ") {
                let words = words(line);
                let chain = words.get(1).map(String::as_str).unwrap_or_default();
                if let Some(chain) = table.chains.iter_mut().find(|known| known.name == chain) {
                    chain.rules.push(iptables_rule(line, &words[2..], datagrams));
                }
            }
        }
    }
    tables
}

/// Splits at blanks, but for those in quotation marks.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let (mut quoted, mut escaped) = (false, false);
    for character in line.chars() {
        let word = words.last_mut().expect("there is one from the start");
        match character {
            _ if escaped => {
                word.push(character);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            _ => word.push(character),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

fn iptables_rule(line: &str, words: &[String], datagrams: Datagrams<'_>) -> Rule {
    let mut matches = Match::Always;
    let mut action = Action::GoOn;
    let mut words = words.iter().map(String::as_str).peekable();
    let mut negated = false;
    while let Some(word) = words.next() {
        if word == "!" {
            negated = true;
            continue;
        }
        let found = match word {
            "-p" => datagrams.is_protocol(words.next()),
            "-i" => datagrams.is_from(words.next()),
            "--dport" | "--dports" | "--destination-port" | "--destination-ports" => {
                datagrams.is_to(words.next(), ':')
            }
            "-m" => match words.next() {
                // What they ask for is said by the options that follow.
                Some("udp" | "tcp" | "comment" | "multiport" | "conntrack" | "state") => {
                    Match::Always
                }
                _ => Match::Maybe,
            },
            "--comment" => {
                words.next();
                Match::Always
            }
            "--ctstate" | "--state" => match words.next() {
                // Of datagrams only those that are broken.
                Some("INVALID") => Match::Never,
                _ => Match::Maybe,
            },
            "-j" | "-g" => {
                action = iptables_action(words.next().unwrap_or_default(), word == "-j");
                // The rest is of the target.
                break;
            }
            "-c" => {
                words.next();
                words.next();
                Match::Always
            }
            _ => {
                // An option of which nothing is known, with its values.
                while words.peek().is_some_and(|next| !next.starts_with('-') && *next != "!") {
                    words.next();
                }
                Match::Maybe
            }
        };
        matches = matches.and(if negated { found.not() } else { found });
        negated = false;
    }
    Rule { text: line.to_owned(), matches, action }
}

fn iptables_action(target: &str, comes_back: bool) -> Action {
    match target {
        "ACCEPT" => Action::Accept,
        "RETURN" => Action::Return,
        "LOG" | "NFLOG" | "ULOG" | "MARK" | "CONNMARK" | "SECMARK" | "CONNSECMARK" | "DSCP"
        | "TOS" | "TTL" | "HL" | "CLASSIFY" | "AUDIT" | "TRACE" | "SET" | "NOTRACK" | "CT"
        | "CHECKSUM" | "IDLETIMER" | "LED" | "RATEEST" | "SNAT" => Action::GoOn,
        // A chain, or a target that refuses, or one of which nothing is known: for both of these
        // there is no such chain.
        _ => Action::Ask { chain: target.to_owned(), comes_back },
    }
}

impl Datagrams<'_> {
    fn is_protocol(self, name: Option<&str>) -> Match {
        match name {
            Some("udp" | "17" | "all" | "0" | "udplite") => Match::Always,
            Some(_) => Match::Never,
            None => Match::Maybe,
        }
    }

    fn is_from(self, pattern: Option<&str>) -> Match {
        match pattern {
            Some(pattern) => match pattern.strip_suffix(['+', '*']) {
                Some(start) => Match::when(self.nic.starts_with(start)),
                None => Match::when(self.nic == pattern),
            },
            None => Match::Maybe,
        }
    }

    /// Whether they go to one of these ports: numbers and ranges with commas between them.
    fn is_to(self, ports: Option<&str>, range: char) -> Match {
        let Some(ports) = ports else { return Match::Maybe };
        let mut found = Match::Never;
        for part in ports.split(',') {
            let (first, last) = part.split_once(range).unwrap_or((part, part));
            match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) => match self.is_between(first, last) {
                    Match::Never => {}
                    other => return other,
                },
                _ => found = Match::Maybe,
            }
        }
        found
    }

    fn is_between(self, first: u16, last: u16) -> Match {
        match self.port {
            Some(port) => Match::when((first..=last).contains(&port)),
            None if (first, last) == (0, u16::MAX) => Match::Always,
            None => Match::Maybe,
        }
    }
}

/// Reads what `nft -j list ruleset` prints: tables with their families.
fn nft(ruleset: &Value, datagrams: Datagrams<'_>) -> Vec<(String, Table)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut tables: Vec<(String, Table)> = Vec::new();
    for object in ruleset["nftables"].as_array().into_iter().flatten() {
        if let Some(chain) = object.get("chain") {
            let (family, name) = (text(&chain["family"]), text(&chain["table"]));
            // Others never see UDP that is for this host, or see it before it comes here.
            if !matches!(family.as_str(), "ip" | "ip6" | "inet") {
                continue;
            }
            let chain = Chain {
                name: text(&chain["name"]),
                is_input: chain["hook"] == "input",
                drops_at_end: chain["policy"] == "drop",
                rules: Vec::new(),
            };
            let table = tables.iter_mut().find(|(of, table)| *of == family && table.name == name);
            match table {
                Some((_, table)) => table.chains.push(chain),
                None => tables.push((family, Table { name, chains: vec![chain] })),
            }
        } else if let Some(rule) = object.get("rule") {
            let chain = tables
                .iter_mut()
                .find(|(of, table)| rule["family"] == **of && rule["table"] == *table.name)
                .and_then(|(_, table)| {
                    table.chains.iter_mut().find(|chain| rule["chain"] == *chain.name)
                });
            if let Some(chain) = chain {
                chain.rules.extend(nft_rules(rule, datagrams));
            }
        }
    }
    tables
}

/// A rule of nft may have several verdicts, by its maps.
fn nft_rules(rule: &Value, datagrams: Datagrams<'_>) -> Vec<Rule> {
    let text = format!(
        "{} {} {}: {}",
        rule["family"].as_str().unwrap_or_default(),
        rule["table"].as_str().unwrap_or_default(),
        rule["chain"].as_str().unwrap_or_default(),
        rule["expr"]
    );
    let mut matches = Match::Always;
    let mut rules = Vec::new();
    for expression in rule["expr"].as_array().into_iter().flatten() {
        let Some((kind, value)) = expression.as_object().and_then(|object| object.iter().next())
        else {
            continue;
        };
        match kind.as_str() {
            "match" => matches = matches.and(nft_match(value, datagrams)),
            "counter" | "log" | "comment" | "mangle" | "ct helper" | "notrack" | "set" => {}
            "vmap" => {
                let verdicts = value["data"]["set"].as_array();
                let Some(verdicts) = verdicts else {
                    // A named map: it may say anything.
                    rules.push((Match::Maybe, Action::Refuse));
                    continue;
                };
                for pair in verdicts {
                    // Of datagrams only those that are broken.
                    if pair[0] == "invalid" {
                        continue;
                    }
                    if let Some(action) = nft_verdict(&pair[1]) {
                        rules.push((matches.and(Match::Maybe), action));
                    }
                }
            }
            _ => match nft_verdict(expression) {
                Some(action) => rules.push((matches, action)),
                // A limit, a lookup, or something new.
                None => matches = matches.and(Match::Maybe),
            },
        }
    }
    rules
        .into_iter()
        .map(|(matches, action)| Rule { text: text.clone(), matches, action })
        .collect()
}

fn nft_verdict(expression: &Value) -> Option<Action> {
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

fn nft_match(condition: &Value, datagrams: Datagrams<'_>) -> Match {
    let (left, right) = (&condition["left"], &condition["right"]);
    let field = |protocol: &str| {
        (left["payload"]["protocol"] == protocol).then(|| left["payload"]["field"].as_str())?
    };
    let found = if matches!(field("udp").or(field("th")), Some("dport")) {
        any_of(right, &|value| nft_port(value, datagrams))
    } else if field("udp").is_some() || field("th").is_some() {
        Match::Maybe
    } else if field("tcp").or(field("icmp")).or(field("icmpv6")).or(field("sctp")).is_some() {
        return Match::Never;
    } else if left["meta"]["key"] == "l4proto"
        || matches!(field("ip"), Some("protocol"))
        || matches!(field("ip6"), Some("nexthdr"))
    {
        any_of(right, &|value| match value {
            Value::String(name) => datagrams.is_protocol(Some(name)),
            Value::Number(number) => Match::when(number.as_u64() == Some(17)),
            _ => Match::Maybe,
        })
    } else if matches!(left["meta"]["key"].as_str(), Some("iifname" | "iif")) {
        any_of(right, &|value| datagrams.is_from(value.as_str()))
    } else if left["ct"]["key"] == "state" {
        match right {
            // Of datagrams only those that are broken.
            Value::String(state) if state == "invalid" => return Match::Never,
            _ => Match::Maybe,
        }
    } else {
        Match::Maybe
    };
    match condition["op"].as_str() {
        Some("==" | "in") => found,
        Some("!=") => found.not(),
        _ => Match::Maybe,
    }
}

/// A value, or a set of them.
fn any_of(right: &Value, matches: &dyn Fn(&Value) -> Match) -> Match {
    let Some(values) = right["set"].as_array() else {
        // A name of a set that is elsewhere.
        return match right {
            Value::String(name) if name.starts_with('@') => Match::Maybe,
            value => matches(value),
        };
    };
    let mut found = Match::Never;
    for value in values.iter().map(matches) {
        match value {
            Match::Always => return Match::Always,
            Match::Maybe => found = Match::Maybe,
            Match::Never => {}
        }
    }
    found
}

fn nft_port(value: &Value, datagrams: Datagrams<'_>) -> Match {
    let port = |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok());
    if let (Some(first), Some(last)) = (port(&value["range"][0]), port(&value["range"][1])) {
        return datagrams.is_between(first, last);
    }
    match port(value) {
        Some(port) => datagrams.is_between(port, port),
        // The name of a service.
        None => Match::Maybe,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const DATAGRAMS: Datagrams<'_> = Datagrams { port: Some(51820), nic: "eth0" };

    fn of_iptables(text: &str, datagrams: Datagrams<'_>) -> Option<String> {
        iptables(text, datagrams).iter().find_map(Table::obstacle)
    }

    /// The obstacle among rules of INPUT with this policy.
    fn input(policy: &str, rules: &str) -> Option<String> {
        let rules: String = rules
            .split(';')
            .map(str::trim)
            .filter(|rule| !rule.is_empty())
            .map(|rule| format!("-A {rule}\n"))
            .collect();
        let text = format!(
            "# Generated by iptables-save\n*filter\n:INPUT {policy} [0:0]\n:FORWARD DROP [0:0]\n\
             :OUTPUT ACCEPT [0:0]\n:mine - [0:0]\n:f2b-x - [0:0]\n{rules}COMMIT\n"
        );
        of_iptables(&text, DATAGRAMS)
    }

    #[test]
    fn rules_of_iptables_that_cannot_touch_the_port_are_none() {
        for rules in [
            "",
            "INPUT -p tcp -m tcp --dport 22 -j DROP",
            "INPUT -p udp -m udp --dport 53 -j REJECT --reject-with icmp-port-unreachable",
            "INPUT -p udp -m multiport --dports 53,67:69 -j DROP",
            "INPUT -i eth1 -j DROP",
            "INPUT ! -i eth0 -j DROP",
            "INPUT ! -p udp -j DROP",
            "INPUT -p udp -m udp ! --dport 51820 -j DROP",
            "INPUT -m conntrack --ctstate INVALID -j DROP",
            "INPUT -p tcp -j f2b-x; f2b-x -s 10.0.0.1/32 -j REJECT",
            "INPUT -j mine; mine -j RETURN; mine -j DROP",
            "INPUT -j LOG --log-prefix \"DROP -j DROP \"",
            "INPUT -m comment --comment \"-j DROP\" -p udp -j ACCEPT; INPUT -j DROP",
            "FORWARD -j DROP",
            "INPUT -p udp -j ACCEPT; INPUT -p udp --dport 51820 -j DROP",
            "INPUT -s 10.0.0.0/8 -j ACCEPT",
        ] {
            assert_eq!(input("ACCEPT", rules), None, "{rules}");
        }
        let accepted = "INPUT -i lo -j ACCEPT; INPUT -p udp -m udp --dport 51820 -j ACCEPT";
        assert_eq!(input("DROP", accepted), None);
        assert_eq!(input("DROP", "INPUT -j mine; mine -i eth+ -j ACCEPT"), None);
        assert_eq!(input("DROP", "INPUT -g mine; mine -p udp -j ACCEPT"), None);
    }

    #[test]
    fn rules_of_iptables_that_may_touch_the_port_are_told() {
        for (rules, expected) in [
            ("INPUT -j DROP", 0),
            ("INPUT -p udp -m udp --dport 51820 -j DROP", 0),
            ("INPUT -p udp -m udp --dport 51000:52000 -j REJECT", 0),
            ("INPUT -p udp -m multiport --dports 53,51820 -j DROP", 0),
            ("INPUT -s 192.0.2.0/24 -j DROP", 0),
            ("INPUT -m set --match-set bad src -j DROP", 0),
            ("INPUT -p udp -m limit --limit 10/sec -j ACCEPT; INPUT -p udp -j DROP", 1),
            ("INPUT -m hashlimit --hashlimit-above 9/sec --hashlimit-name x -j DROP", 0),
            ("INPUT -i eth+ -j DROP", 0),
            ("INPUT -j NFQUEUE --queue-num 0", 0),
            ("INPUT -j SOMETHINGNEW", 0),
            ("INPUT -m state --state NEW -j DROP", 0),
            ("INPUT -j mine; mine -s 192.0.2.1/32 -j DROP", 1),
            ("INPUT -p udp -j mine; mine -p tcp -j DROP; mine ! -s 192.0.2.1/32 -j REJECT", 2),
            ("INPUT -s 10.0.0.0/8 -j ACCEPT; INPUT -j REJECT", 1),
        ] {
            let rule = rules.split(';').nth(expected).unwrap().trim();
            assert_eq!(input("ACCEPT", rules), Some(format!("-A {rule}")), "{rules}");
        }
        let policy = Some("policy drop of chain INPUT in table filter".to_owned());
        for rules in ["", "INPUT -i lo -j ACCEPT", "INPUT -p tcp -j ACCEPT", "INPUT -g mine"] {
            assert_eq!(input("DROP", rules), policy, "{rules}");
        }
    }

    #[test]
    fn of_a_port_that_is_not_known_every_rule_for_ports_is_told() {
        let unknown = Datagrams { port: None, ..DATAGRAMS };
        let text = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p udp --dport 53 -j DROP\nCOMMIT\n";
        assert_eq!(of_iptables(text, DATAGRAMS), None);
        assert!(of_iptables(text, unknown).is_some());
        let text = "*filter\n:INPUT DROP [0:0]\n-A INPUT -p udp --dport 51820 -j ACCEPT\nCOMMIT\n";
        assert_eq!(of_iptables(text, DATAGRAMS), None);
        assert!(of_iptables(text, unknown).is_some());
    }

    #[test]
    fn other_tables_with_input_count_and_a_default_route_of_ours_does_not() {
        let mangle = "*mangle\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n\
                      -A INPUT -p udp -j DROP\nCOMMIT\n";
        assert_eq!(of_iptables(mangle, DATAGRAMS).unwrap(), "-A INPUT -p udp -j DROP");
        let ours = "*raw\n:PREROUTING ACCEPT [0:0]\n\
            -A PREROUTING -d 10.9.0.2/32 ! -i wg0 -m addrtype ! --src-type LOCAL -j DROP\nCOMMIT\n";
        assert_eq!(of_iptables(ours, DATAGRAMS), None);
    }

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

    fn of_nft(policy: &str, rules: Vec<Value>) -> Option<String> {
        let mut objects = vec![
            json!({"metainfo": {"version": "1.0.6"}}),
            json!({"table": {"family": "inet", "name": "filter"}}),
            chain("input", Some("input"), policy),
            chain("forward", Some("forward"), "drop"),
            chain("mine", None, ""),
        ];
        objects.extend(rules);
        let ruleset = json!({ "nftables": objects });
        nft(&ruleset, DATAGRAMS).iter().find_map(|(_, table)| table.obstacle())
    }

    fn dport(right: Value) -> Value {
        json!({"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}},
            "right": right}})
    }

    fn meta(key: &str, right: Value) -> Value {
        json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": right}})
    }

    #[test]
    fn rules_of_nft_that_cannot_touch_the_port_are_none() {
        let accept = json!({"accept": null});
        let drop = json!({"drop": null});
        for (policy, expr) in [
            ("accept", json!([])),
            ("accept", json!([dport(json!(53)), drop])),
            ("accept", json!([meta("iifname", json!("lo")), drop])),
            ("accept", json!([meta("l4proto", json!("tcp")), {"counter": {}}, drop])),
            (
                "accept",
                json!([{"match": {"op": "in", "left": {"ct": {"key": "state"}},
                "right": "invalid"}}, drop]),
            ),
            ("drop", json!([dport(json!(51820)), {"counter": null}, accept])),
            ("drop", json!([dport(json!({"set": [53, {"range": [51000, 52000]}]})), accept])),
            ("drop", json!([meta("l4proto", json!({"set": ["udp", "icmp"]})), accept])),
        ] {
            assert_eq!(of_nft(policy, vec![rule("input", expr.clone())]), None, "{expr}");
        }
        let jump = json!([{"jump": {"target": "mine"}}]);
        let rules = vec![rule("input", jump), rule("mine", json!([dport(json!(51820)), accept]))];
        assert_eq!(of_nft("drop", rules), None);
    }

    #[test]
    fn rules_of_nft_that_may_touch_the_port_are_told() {
        let drop = json!({"drop": null});
        let jump = json!([{"jump": {"target": "mine"}}]);
        let saddr = json!({"match": {"op": "==", "left": {"payload": {"protocol": "ip",
            "field": "saddr"}}, "right": "192.0.2.1"}});
        let states = json!({"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [
            ["established", {"accept": null}], ["invalid", {"drop": null}]]}}});
        for rules in [
            vec![rule("input", json!([drop]))],
            vec![rule("input", json!([dport(json!("@ports")), drop]))],
            vec![rule("input", json!([saddr, {"reject": {"type": "icmp"}}]))],
            vec![rule(
                "input",
                json!([{"limit": {"rate": 5, "per": "second", "inv": true}}, drop]),
            )],
            vec![rule("input", json!([{"xt": null}, drop]))],
            vec![rule("input", json!([{"vmap": {"key": "x", "data": "@map"}}]))],
            vec![rule("input", jump.clone()), rule("mine", json!([drop]))],
        ] {
            assert!(of_nft("accept", rules.clone()).is_some(), "{rules:?}");
        }
        assert_eq!(of_nft("accept", vec![rule("input", json!([states]))]), None);
        assert_eq!(
            of_nft("drop", vec![rule("input", json!([states]))]).unwrap(),
            "policy drop of chain input in table filter"
        );
    }
}
