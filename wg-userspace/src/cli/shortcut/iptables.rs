//! What `iptables-save` and `ip6tables-save` print.

use super::forward::{Forwarded, bounds};
use super::{Action, Chain, Datagrams, Match, Rule, Table, Way};

/// The chains that the kernel asks.
fn asked(datagrams: Datagrams<'_>) -> &'static [&'static str] {
    match (datagrams.forwarded, datagrams.way) {
        (Some(forwarded), _) => forwarded.chains(),
        (None, Way::In) => &["INPUT"],
        (None, Way::Out) => &["OUTPUT", "POSTROUTING"],
    }
}

/// The tables in what such a program prints.
pub fn tables(text: &str, program: &'static str, datagrams: Datagrams<'_>) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Table { name: name.to_owned(), chains: Vec::new() });
        } else if let Some(table) = tables.last_mut() {
            if let Some(chain) = line.strip_prefix(':') {
                let mut words = chain.split_ascii_whitespace();
                let name = words.next().unwrap_or_default().to_owned();
                let drops_at_end = !matches!(words.next(), Some("ACCEPT" | "-"));
                let is_asked = asked(datagrams).contains(&name.as_str());
                let rules = Vec::new();
                table.chains.push(Chain { name, program, is_asked, drops_at_end, rules });
            } else if line.starts_with("-A ") {
                let words = words(line);
                let chain = words.get(1).map(String::as_str).unwrap_or_default();
                if let Some(chain) = table.chains.iter_mut().find(|known| known.name == chain) {
                    let (matches, action) = rule(&words[2..], datagrams);
                    let text = line.to_owned();
                    chain.rules.push(Rule { text, place: None, program, matches, action });
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

fn rule(words: &[String], datagrams: Datagrams<'_>) -> (Match, Action) {
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
            "-s" | "-d" if datagrams.forwarded.is_some() => {
                forwarded(word, words.next(), datagrams)
            }
            "-o" => datagrams.is_out_of(words.next()),
            // XDP leaves fragments to the kernel.
            "-f" if datagrams.forwarded.is_none() => Match::Never,
            "--dport" | "--dports" | "--destination-port" | "--destination-ports" => {
                is_one_of(words.next(), |first, last| datagrams.is_to_between(first, last))
            }
            "--sport" | "--sports" | "--source-port" | "--source-ports" => {
                is_one_of(words.next(), |first, last| datagrams.is_from_between(first, last))
            }
            "-m" => match words.next() {
                // Whether it is of the protocol is said by `-p`.
                Some("icmp" | "icmp6") if datagrams.forwarded.is_some() => Match::Always,
                Some("rt" | "frag" | "hbh" | "dst") if datagrams.forwarded.is_some() => {
                    Match::Maybe
                }
                // What they ask for is said by the options that follow.
                Some(
                    "udp" | "tcp" | "comment" | "multiport" | "conntrack" | "state" | "addrtype"
                    | "pkttype",
                ) => Match::Always,
                // Other protocols, and headers with which XDP leaves a packet to the kernel.
                Some(
                    "icmp" | "icmp6" | "sctp" | "dccp" | "ah" | "esp" | "mh" | "rt" | "frag"
                    | "hbh" | "dst",
                ) => Match::Never,
                _ => Match::Maybe,
            },
            "--comment" => {
                words.next();
                Match::Always
            }
            "--ctstate" | "--state" => any_of(words.next(), |name| datagrams.is_state(name)),
            "--dst-type" => any_of(words.next(), |name| datagrams.is_to_type(name)),
            "--src-type" => any_of(words.next(), |name| datagrams.is_from_type(name)),
            "--pkt-type" => any_of(words.next(), Datagrams::is_packet_type),
            "-j" | "-g" => {
                let target = words.next().unwrap_or_default();
                let options: Vec<&str> = words.by_ref().collect();
                let known = datagrams.forwarded.and_then(|_| Forwarded::target(target, &options));
                action = known.unwrap_or_else(|| to(target, word == "-j", datagrams.way));
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
    (matches, action)
}

/// What an option means for datagrams that are forwarded.
fn forwarded(option: &str, value: Option<&str>, datagrams: Datagrams<'_>) -> Match {
    let (Some(forwarded), Some(value)) = (datagrams.forwarded, value) else { return Match::Maybe };
    match option {
        "-s" => forwarded.is_from_there(bounds(value)),
        _ => forwarded.is_to_there(bounds(value)),
    }
}

fn to(target: &str, comes_back: bool, way: Way) -> Action {
    match (target, way) {
        ("ACCEPT", _) => Action::Accept,
        ("RETURN", _) => Action::Return,
        (
            "LOG" | "NFLOG" | "ULOG" | "CONNMARK" | "SECMARK" | "CONNSECMARK" | "AUDIT" | "TRACE"
            | "SET" | "NOTRACK" | "CT" | "CHECKSUM" | "IDLETIMER" | "LED" | "RATEEST",
            _,
        ) => Action::GoOn,
        // These change nothing that matters once a datagram has come, but much before it leaves.
        ("MARK" | "DSCP" | "TOS" | "TTL" | "HL" | "CLASSIFY" | "SNAT", Way::In) => Action::GoOn,
        // It gives an address of this host to what comes from elsewhere; ours have one.
        ("MASQUERADE", Way::Out) => Action::GoOn,
        // A chain, or a target that refuses, or one of which nothing is known: for both of these
        // there is no such chain.
        _ => Action::Ask { chain: target.to_owned(), comes_back },
    }
}

/// Whether one of the values between commas holds.
fn any_of(values: Option<&str>, holds: impl Fn(&str) -> Match) -> Match {
    values.map_or(Match::Maybe, |values| values.split(',').map(holds).fold(Match::Never, Match::or))
}

/// Whether the port is one of these: numbers and ranges with commas between them.
fn is_one_of(ports: Option<&str>, is_between: impl Fn(u16, u16) -> Match) -> Match {
    any_of(ports, |part| {
        let (first, last) = part.split_once(':').unwrap_or((part, part));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) => is_between(first, last),
            _ => Match::Maybe,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Found, Rulesets, Saved, Way};
    use crate::host::Family;

    /// The obstacle for datagrams from `eth0`.
    fn of(text: &str, port: Option<u16>) -> Option<String> {
        by(Way::In, text, port)
    }

    /// The obstacle for datagrams to or from `eth0`.
    fn by(way: Way, text: &str, port: Option<u16>) -> Option<String> {
        let text = text.to_owned();
        let program = "iptables-save";
        let saved = Saved { program, family: Family::V4, is_nf_tables: false, text };
        let rulesets = Rulesets { iptables: vec![saved], nft: None };
        let found = rulesets.obstacle(way, port, &["eth0".to_owned()]);
        found.map(|Found { program: shows, rule, .. }| {
            assert_eq!(shows, program);
            rule
        })
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
        of(&text, Some(51820))
    }

    #[test]
    fn rules_that_cannot_touch_the_port_are_none() {
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
            "INPUT -f -j DROP",
            "INPUT -m rt --rt-type 0 -j DROP",
            "INPUT -m addrtype --dst-type MULTICAST -j DROP",
            "INPUT -m pkttype --pkt-type broadcast -j DROP",
            "INPUT -p udp -m comment --comment \"a -j DROP \\\" b\" -m mark --mark 0x1 -j LOG",
            "INPUT -p icmp -m limit --limit 5/sec -j ACCEPT; INPUT -p icmp -j DROP",
            "INPUT -p udp -m udp --dport 51820 -j ACCEPT; INPUT -j DROP",
            "INPUT -j mine; mine -p udp -j ACCEPT; INPUT -j DROP",
            "INPUT -p tcp -j f2b-x; f2b-x -s 192.0.2.1/32 -j REJECT; f2b-x -j RETURN",
            "INPUT -p udp -j mine; mine -j RETURN; mine -j DROP",
        ] {
            assert_eq!(input("ACCEPT", rules), None, "{rules}");
        }
        let accepted = "INPUT -i lo -j ACCEPT; INPUT -p udp -m udp --dport 51820 -j ACCEPT";
        assert_eq!(input("DROP", accepted), None);
        assert_eq!(input("DROP", "INPUT -j mine; mine -i eth+ -j ACCEPT"), None);
        assert_eq!(input("DROP", "INPUT -g mine; mine -p udp -j ACCEPT"), None);
    }

    /// The obstacle among rules of OUTPUT with this policy, and of POSTROUTING and a chain of our own.
    fn output(policy: &str, rules: &str) -> Option<String> {
        let rules: String = rules
            .split(';')
            .map(str::trim)
            .filter(|rule| !rule.is_empty())
            .map(|rule| format!("-A {rule}\n"))
            .collect();
        let text = format!(
            "*mangle\n:PREROUTING DROP [0:0]\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n\
             :OUTPUT {policy} [0:0]\n:POSTROUTING ACCEPT [0:0]\n:mine - [0:0]\n{rules}COMMIT\n"
        );
        by(Way::Out, &text, Some(51820))
    }

    #[test]
    fn rules_that_cannot_touch_what_leaves_are_none() {
        for rules in [
            "",
            "INPUT -j DROP; FORWARD -j DROP; PREROUTING -j DROP",
            "OUTPUT -p tcp -j DROP",
            "OUTPUT -p udp -m udp --sport 53 -j DROP",
            "OUTPUT -p udp -m multiport --sports 53,67:69 -j DROP",
            "OUTPUT -o eth1 -j DROP",
            "OUTPUT ! -o eth+ -j DROP",
            "POSTROUTING -i wg0 -j DROP",
            "OUTPUT -m conntrack --ctstate INVALID -j DROP",
            "OUTPUT -m addrtype --dst-type LOCAL -j mine; mine -j DROP",
            "POSTROUTING -m addrtype ! --src-type LOCAL -j DROP",
            "POSTROUTING -o eth0 -j MASQUERADE",
            "POSTROUTING -s 10.9.0.0/24 -o eth0 -j MASQUERADE",
            "POSTROUTING -p udp -m mark --mark 0xca6c -j CONNMARK --save-mark",
            "OUTPUT -p udp -m udp --sport 51820 -j ACCEPT; OUTPUT -j DROP",
            "POSTROUTING -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
        ] {
            assert_eq!(output("ACCEPT", rules), None, "{rules}");
        }
        let accepted = "OUTPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; \
                        OUTPUT -o eth0 -p udp -m conntrack --ctstate NEW -j ACCEPT";
        assert_eq!(output("DROP", accepted), None);
    }

    #[test]
    fn rules_that_may_touch_what_leaves_are_told() {
        for (rules, expected) in [
            ("OUTPUT -j DROP", 0),
            ("OUTPUT -p udp -m udp --sport 51820 -j DROP", 0),
            // Peers have any port.
            ("OUTPUT -p udp -m udp --dport 53 -j DROP", 0),
            ("OUTPUT -p udp -m udp --dport 51820 -j ACCEPT; OUTPUT -o eth0 -j REJECT", 1),
            ("OUTPUT -d 192.0.2.0/24 -j DROP", 0),
            ("OUTPUT -m owner --uid-owner 1000 -j DROP", 0),
            ("OUTPUT -p udp -m limit --limit 10/sec -j ACCEPT; OUTPUT -p udp -j DROP", 1),
            ("POSTROUTING -o eth0 -j SNAT --to-source 192.0.2.7", 0),
            ("POSTROUTING -o eth+ -j DSCP --set-dscp 0x2e", 0),
            ("POSTROUTING -o eth0 -j CLASSIFY --set-class 1:10", 0),
            ("OUTPUT -p udp -j MARK --set-xmark 0x1/0xffffffff", 0),
            ("OUTPUT -j NFQUEUE --queue-num 0", 0),
            ("POSTROUTING ! -o lo -j mine; mine -p udp -j TTL --ttl-set 3", 1),
        ] {
            let rule = rules.split(';').nth(expected).unwrap().trim();
            assert_eq!(output("ACCEPT", rules), Some(format!("-A {rule}")), "{rules}");
        }
        let policy = Some("policy drop of chain OUTPUT in table mangle".to_owned());
        for rules in ["", "OUTPUT -o lo -j ACCEPT", "OUTPUT -p udp -m udp --dport 53 -j ACCEPT"] {
            assert_eq!(output("DROP", rules), policy, "{rules}");
        }
        let text =
            "*filter\n:OUTPUT DROP [0:0]\n-A OUTPUT -p udp --sport 51820 -j ACCEPT\nCOMMIT\n";
        assert_eq!(by(Way::Out, text, Some(51820)), None);
        assert!(by(Way::Out, text, None).is_some());
        assert_eq!(by(Way::In, text, Some(51820)), None);
    }

    #[test]
    fn rules_that_may_touch_the_port_are_told() {
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
            ("INPUT -m state --state ESTABLISHED -j DROP", 0),
            ("INPUT -m conntrack ! --ctstate INVALID -j DROP", 0),
            ("INPUT -m conntrack --ctstate UNTRACKED -j DROP", 0),
            ("INPUT -m addrtype --dst-type LOCAL -j DROP", 0),
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
    fn first_and_later_datagrams_may_be_accepted_by_different_rules() {
        let known = "INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT";
        let new = "INPUT -p udp -m udp --dport 51820 -m conntrack --ctstate NEW -j ACCEPT";
        assert_eq!(input("DROP", &format!("{known}; {new}")), None);
        assert!(input("DROP", known).is_some());
        assert!(input("DROP", new).is_some());
    }

    /// As some tools write them: what is not for this host is refused beside the accepted ports.
    #[test]
    fn what_is_not_for_this_host_is_no_matter_of_the_port() {
        let rules = |port| {
            format!(
                "INPUT -j mine; mine -m addrtype --dst-type LOCAL -j RETURN; \
                 mine -m addrtype --dst-type BROADCAST -j RETURN; \
                 mine -m limit --limit 3/min --limit-burst 10 -j LOG; mine -j DROP; \
                 INPUT -d 224.0.0.251/32 -p udp -m udp --dport 5353 -j ACCEPT; \
                 INPUT -p udp -m udp --dport {port} -j ACCEPT"
            )
        };
        assert_eq!(input("DROP", &rules(51820)), None);
        let policy = "policy drop of chain INPUT in table filter";
        assert_eq!(input("DROP", &rules(51821)).as_deref(), Some(policy));
    }

    #[test]
    fn of_a_port_that_is_not_known_every_rule_for_ports_is_told() {
        let text = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p udp --dport 53 -j DROP\nCOMMIT\n";
        assert_eq!(of(text, Some(51820)), None);
        assert!(of(text, None).is_some());
        let text = "*filter\n:INPUT DROP [0:0]\n-A INPUT -p udp --dport 51820 -j ACCEPT\nCOMMIT\n";
        assert_eq!(of(text, Some(51820)), None);
        assert!(of(text, None).is_some());
    }

    #[test]
    fn other_tables_with_input_count_and_a_default_route_of_ours_does_not() {
        let mangle = "*mangle\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n\
                      -A INPUT -p udp -j DROP\nCOMMIT\n";
        assert_eq!(of(mangle, Some(51820)).unwrap(), "-A INPUT -p udp -j DROP");
        let ours = "*raw\n:PREROUTING ACCEPT [0:0]\n\
            -A PREROUTING -d 10.9.0.2/32 ! -i wg0 -m addrtype ! --src-type LOCAL -j DROP\nCOMMIT\n";
        assert_eq!(of(ours, Some(51820)), None);
    }
}
