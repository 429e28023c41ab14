//! Hooks: commands that a shell runs. Looked at only as far as nothing but the text is needed:
//! words, quotation marks, and the changes of iptables(8) and of ip-rule(8).

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Page, Rule, Severity};
use crate::check::Finding;
use crate::config::{Hook, HookEvent, Nat, Span, Spanned};

pub fn find(page: &Page<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut done: Vec<(Change, Span)> = Vec::new();
    let mut undone: Vec<(Change, Span)> = Vec::new();
    let mut undoes_otherwise = false;
    let mut masquerade: Option<(Span, Option<String>)> = None;
    for hook in &page.config.interface.hooks {
        // Keys that stand in a command are starred out here.
        let text = page.text(hook.span);
        let shell = Shell::read(text);
        found.extend(cut(page, hook, &shell));
        found.extend(other_interface(page, hook, text, &shell));
        let is_up = matches!(hook.event, HookEvent::PreUp | HookEvent::PostUp);
        for command in &shell.commands {
            let span = Page::part(hook.span, command.start, command.len);
            if is_up {
                found.extend(translated_twice(page, hook, span, &command.words));
            }
            let Some((verb, change)) = Change::of(&command.words, page.name) else {
                undoes_otherwise |= !is_up && !command.is_harmless();
                continue;
            };
            match verb {
                Verb::Add => {
                    if is_up && change.is_masquerade() {
                        masquerade.get_or_insert_with(|| (span, change.nic.clone()));
                    }
                    if is_up { done.push((change, span)) } else { undoes_otherwise = true }
                }
                Verb::Delete if is_up => done.retain(|(known, _)| *known != change),
                Verb::Delete => undone.push((change, span)),
                Verb::Flush => undoes_otherwise |= !is_up,
            }
        }
    }
    // Else it is told that both do it.
    let is_twice = found.iter().any(|finding| finding.rule == Rule::NatTwice);
    if let Some((span, nic)) = masquerade.filter(|_| !is_twice) {
        let nic = nic.unwrap_or_else(|| "eth0".to_owned());
        found.push(
            page.found(
                (Severity::Note, Rule::NatByIptables),
                "these rules translate addresses on every packet's way through the kernel",
                span,
                "masquerades",
            )
            .help(format!(
                "`#! Nat = masquerade out={nic}` in their place translates within the tunnel's own way"
            )),
        );
    }
    found.extend(left_over(page, done, undone, undoes_otherwise));
    found
}

/// A command that has netfilter translate what a line with `Nat` translates.
fn translated_twice(
    page: &Page<'_>,
    hook: &Spanned<Hook>,
    span: Span,
    words: &[String],
) -> Option<Finding> {
    let translation = Translation::of(words, page.name)?;
    let nat = page.config.interface.nat.iter().find(|nat| translation.meets(nat))?;
    let kind = (Severity::Error, Rule::NatTwice);
    let event = hook.event.name();
    let message = format!("this {event} and `#! Nat` translate the same packets");
    let finding = page.found(kind, message, span, "by netfilter").at(page.file, nat.span, "by us");
    Some(finding.help(format!(
        "remove one of the two: with `#! Nat` neither this command nor the one that takes it back is \
         needed, without it `up` leaves all to the {event}"
    )))
}

/// A rule by which netfilter gives packets another source, as far as a command says which.
#[derive(Debug, Default)]
struct Translation {
    is_ipv4: Option<bool>,
    nic: Option<String>,
    from: Option<IpNet>,
}

impl Translation {
    fn of(words: &[String], name: &str) -> Option<Translation> {
        let start = usize::from(words.first().is_some_and(|word| program(word) == "sudo"));
        let (first, words) = words.get(start..)?.split_first()?;
        let has = |known: &[&str]| words.iter().any(|word| known.contains(&word.as_str()));
        let is_ipv4 = match program(first) {
            "iptables" | "iptables-nft" | "iptables-legacy" => Some(true),
            "ip6tables" | "ip6tables-nft" | "ip6tables-legacy" => Some(false),
            "nft" if has(&["ip"]) && !has(&["ip6"]) => Some(true),
            "nft" if has(&["ip6"]) => Some(false),
            "nft" => None,
            _ => return None,
        };
        let is_added = has(&["-A", "-I", "--append", "--insert", "add", "insert"]);
        let is_translation = has(&["MASQUERADE", "SNAT", "NETMAP", "masquerade", "snat"]);
        if !is_added || !is_translation {
            return None;
        }
        let mut translation = Translation { is_ipv4, ..Translation::default() };
        let mut before = "";
        for pair in words.windows(2) {
            let (option, value) = (pair[0].as_str(), pair[1].replace("%i", name));
            // Where it does not hold is not looked at.
            let is_negated = before == "!" || value.starts_with('!');
            before = option;
            match option {
                _ if is_negated => {}
                "-o" | "--out-interface" | "oifname" | "oif" => translation.nic = Some(value),
                "-s" | "--source" | "--src" | "saddr" => {
                    let address = || value.parse::<IpAddr>().ok().map(IpNet::from);
                    translation.from = value.parse().ok().or_else(address);
                }
                _ => {}
            }
        }
        Some(translation)
    }

    /// Whether it may be for packets that the line translates.
    fn meets(&self, nat: &Nat) -> bool {
        let is_of_family = self.is_ipv4.is_none_or(|is_ipv4| nat.is_for(is_ipv4));
        let is_there = self.nic.as_ref().is_none_or(|nic| match nic.strip_suffix(['+', '*']) {
            Some(start) => nat.out.starts_with(start),
            None => *nic == nat.out.value,
        });
        let overlaps = |from: IpNet| match nat.from.as_deref() {
            Some(ours) => ours.contains(&from) || from.contains(ours),
            None => nat.is_for(from.addr().is_ipv4()),
        };
        is_of_family && is_there && self.from.is_none_or(overlaps)
    }
}

/// What a command that ends too early looks like.
fn cut(page: &Page<'_>, hook: &Spanned<Hook>, shell: &Shell) -> Option<Finding> {
    let text = page.config.source().inner();
    let end = hook.span.offset() + hook.span.len();
    let rest = text[end..].split('\n').next().unwrap_or_default();
    let cut_at = rest.find('#').filter(|&at| rest[..at].trim().is_empty());
    let event = hook.event.name();
    let hash = cut_at.map(|at| Span::new((end + at).into(), 1));
    if let Some(quote) = shell.open_quote {
        let message = format!("the shell refuses this {event}: a quotation mark is not closed");
        let kind = (Severity::Error, Rule::HookUnterminated);
        let finding = page.found(kind, message, Page::part(hook.span, quote, 1), "opened here");
        return Some(match hash {
            Some(hash) => finding.at(page.file, hash, "the value ends here, within quotes, too").help(
                "`#` begins a comment wherever it stands: put the command into a script, and run \
                 that",
            ),
            None => finding.help("close it"),
        });
    }
    // As people write comments, there is a blank before.
    let hash = hash.filter(|_| cut_at == Some(0) && !shell.ends_with_separator)?;
    let message = format!("a `#` ends this {event} in the middle of a word");
    let kind = (Severity::Warning, Rule::HookCut);
    Some(page.found(kind, message, hash, "what follows is a comment").help(
        "if it is meant to be a comment, put a blank before it; else put the command into a script, \
         and run that",
    ))
}

/// A hook about `wg0` in the file of another interface.
fn other_interface(
    page: &Page<'_>,
    hook: &Spanned<Hook>,
    text: &str,
    shell: &Shell,
) -> Option<Finding> {
    const OPTIONS: [&str; 5] = ["-i", "-o", "dev", "--in-interface", "--out-interface"];
    let is_wg = |word: &str| {
        let number = word.strip_prefix("wg");
        number
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|c| c.is_ascii_digit()))
    };
    let words = || shell.commands.iter().flat_map(|command| &command.words);
    if words().any(|word| word.contains("%i") || word == page.name) {
        return None;
    }
    let mut pairs = words().zip(words().skip(1));
    let (_, other) =
        pairs.find(|(option, word)| OPTIONS.contains(&option.as_str()) && is_wg(word))?;
    let at = text.find(other.as_str())?;
    let message =
        format!("this {} is about {other}, and not about {}", hook.event.name(), page.name);
    let kind = (Severity::Note, Rule::HookOtherInterface);
    let span = Page::part(hook.span, at, other.len());
    Some(
        page.found(kind, message, span, "another interface")
            .help("write `%i`, which stands for the interface's name"),
    )
}

/// What hooks add and nobody takes back, and the other way round.
fn left_over(
    page: &Page<'_>,
    done: Vec<(Change, Span)>,
    mut undone: Vec<(Change, Span)>,
    undoes_otherwise: bool,
) -> Vec<Finding> {
    let mut left = Vec::new();
    for (change, span) in done {
        match undone.iter().position(|(known, _)| *known == change) {
            Some(at) => drop(undone.swap_remove(at)),
            None => left.push((change, span)),
        }
    }
    undone.sort_by_key(|(_, span)| span.offset());
    let mut found = Vec::new();
    for (change, span) in left {
        // A script may do it.
        if undoes_otherwise {
            break;
        }
        let kind = (Severity::Warning, Rule::HookNotUndone);
        let message = format!("this {} stays when the interface goes down", change.noun());
        let mut finding = page.found(kind, message, span, "no PostDown takes it back");
        if let Some(at) = undone.iter().position(|(known, _)| known.is_like(&change)) {
            let (_, near) = undone.remove(at);
            finding = finding.at(page.file, near, "this takes back another one");
        }
        found.push(finding.help(format!("write `PostDown = {}`", change.undoing(page.text(span)))));
    }
    for (change, span) in undone {
        let kind = (Severity::Warning, Rule::HookUndoesNothing);
        let message = format!("no PostUp has added the {} that this takes back", change.noun());
        found.push(
            page.found(kind, message, span, "fails, for there is no such thing")
                .help("make it the same as what PostUp adds, or remove it"),
        );
    }
    found
}

/// A line of a shell, in commands.
struct Shell {
    commands: Vec<Command>,
    /// Where a quotation mark stands that is not closed.
    open_quote: Option<usize>,
    ends_with_separator: bool,
}

struct Command {
    start: usize,
    len: usize,
    /// Without quotation marks.
    words: Vec<String>,
}

impl Shell {
    fn read(text: &str) -> Shell {
        let mut shell =
            Shell { commands: Vec::new(), open_quote: None, ends_with_separator: text.is_empty() };
        let mut words: Vec<String> = Vec::new();
        let mut word: Option<String> = None;
        let mut start = 0;
        let mut quote: Option<(char, usize)> = None;
        let mut escaped = false;
        let mut before = ' ';
        for (at, c) in text.char_indices().chain([(text.len(), ';')]) {
            let is_end = at == text.len();
            // `2>&1` and `&>file` are no ends of commands.
            let is_redirection = c == '&' && (before == '>' || text[at..].starts_with("&>"));
            before = c;
            if is_end {
                shell.open_quote = quote.take().map(|(_, at)| at);
                escaped = false;
            }
            match (quote, c) {
                _ if escaped => {
                    word.get_or_insert_default().push(c);
                    escaped = false;
                }
                (None | Some(('"', _)), '\\') => escaped = true,
                (None, '"' | '\'') => {
                    quote = Some((c, at));
                    word.get_or_insert_default();
                }
                (Some((mark, _)), _) if mark == c => quote = None,
                (Some(_), _) => word.get_or_insert_default().push(c),
                (None, ';' | '&' | '|' | '\n') if !is_redirection => {
                    words.extend(word.take());
                    let part = &text[start..at];
                    let blank = part.len() - part.trim_start().len();
                    if !words.is_empty() {
                        let words = std::mem::take(&mut words);
                        let (start, len) = (start + blank, part.trim().len());
                        shell.commands.push(Command { start, len, words });
                    }
                    shell.ends_with_separator |= is_end && part.trim().is_empty();
                    start = at + c.len_utf8();
                }
                (None, c) if c.is_whitespace() => words.extend(word.take()),
                (None, c) => word.get_or_insert_default().push(c),
            }
        }
        shell
    }
}

impl Command {
    /// Whether it surely takes nothing back that iptables(8) or ip-rule(8) has added.
    fn is_harmless(&self) -> bool {
        const HARMLESS: [&str; 12] = [
            "ip",
            "sysctl",
            "echo",
            "true",
            ":",
            "logger",
            "resolvconf",
            "resolvectl",
            "wg",
            "sleep",
            "date",
            "ping",
        ];
        self.words.first().is_some_and(|word| HARMLESS.contains(&program(word)))
    }
}

/// The name of a program without its folder.
fn program(word: &str) -> &str {
    word.rsplit('/').next().unwrap_or(word)
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verb {
    Add,
    Delete,
    /// Removes more than one.
    Flush,
}

/// A rule that is added or removed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Change {
    /// `iptables`, `ip6tables`, `ip rule`, `ip -6 rule`
    program: &'static str,
    table: String,
    chain: String,
    /// In alphabetical order, for it makes no difference to most of them.
    words: Vec<String>,
    /// The interface by which packets leave, of those of iptables.
    nic: Option<String>,
}

impl Change {
    /// The change that a command makes; `name` is that of the interface.
    fn of(words: &[String], name: &str) -> Option<(Verb, Change)> {
        let start = usize::from(words.first().is_some_and(|word| program(word) == "sudo"));
        let first = words.get(start)?;
        let mut rest = Vec::new();
        let mut words = words[start + 1..].iter();
        while let Some(word) = words.next() {
            let target = word.trim_start_matches(|c: char| c.is_ascii_digit() || c == '&');
            match target.strip_prefix(['>', '<']) {
                // The file stands behind it, or is the next word.
                Some(file) if file.trim_start_matches(['>', '&']).is_empty() => drop(words.next()),
                Some(_) => {}
                None => rest.push(word.replace("%i", name)),
            }
        }
        match program(first) {
            "iptables" | "iptables-nft" | "iptables-legacy" => Self::of_iptables("iptables", rest),
            "ip6tables" | "ip6tables-nft" | "ip6tables-legacy" => {
                Self::of_iptables("ip6tables", rest)
            }
            "ip" => Self::of_ip_rule(rest),
            _ => None,
        }
    }

    fn of_iptables(program: &'static str, words: Vec<String>) -> Option<(Verb, Change)> {
        let mut change = Change { program, ..Change::default() };
        change.table = "filter".to_owned();
        let mut verb = None;
        let is_number = |word: &String| word.bytes().all(|c| c.is_ascii_digit());
        let mut words = words.into_iter().peekable();
        while let Some(word) = words.next() {
            match word.as_str() {
                "-t" | "--table" => change.table = words.next()?,
                "-A" | "--append" => {
                    verb = Some(Verb::Add);
                    change.chain = words.next()?;
                }
                "-I" | "--insert" => {
                    verb = Some(Verb::Add);
                    change.chain = words.next()?;
                    words.next_if(is_number);
                }
                "-D" | "--delete" => {
                    verb = Some(Verb::Delete);
                    change.chain = words.next()?;
                    if words.next_if(is_number).is_some() {
                        verb = Some(Verb::Flush);
                    }
                }
                "-w" | "--wait" => drop(words.next_if(is_number)),
                "-F" | "--flush" | "-X" | "--delete-chain" => verb = Some(Verb::Flush),
                "--in-interface" => change.words.push("-i".to_owned()),
                "-o" | "--out-interface" => {
                    change.nic = words.peek().cloned();
                    change.words.push("-o".to_owned());
                }
                "--source" | "--src" => change.words.push("-s".to_owned()),
                "--destination" | "--dst" => change.words.push("-d".to_owned()),
                "--protocol" => change.words.push("-p".to_owned()),
                "--jump" => change.words.push("-j".to_owned()),
                "--match" => change.words.push("-m".to_owned()),
                _ => change.words.push(word),
            }
        }
        change.words.sort();
        Some((verb?, change))
    }

    fn of_ip_rule(words: Vec<String>) -> Option<(Verb, Change)> {
        let mut program = "ip rule";
        let mut words = words.into_iter().skip_while(|word| {
            program = if word == "-6" { "ip -6 rule" } else { program };
            word.starts_with('-')
        });
        let object = words.next()?;
        if object != "rule" && object != "ru" {
            return None;
        }
        let verb = match words.next()?.as_str() {
            "add" | "a" => Verb::Add,
            "del" | "delete" | "d" => Verb::Delete,
            "flush" => Verb::Flush,
            _ => return None,
        };
        let mut words: Vec<String> = words
            .map(|word| match word.as_str() {
                "table" => "lookup".to_owned(),
                "pref" | "preference" => "priority".to_owned(),
                _ => word,
            })
            .collect();
        words.sort();
        Some((verb, Change { program, words, ..Change::default() }))
    }

    fn is_masquerade(&self) -> bool {
        self.words.iter().any(|word| word == "MASQUERADE")
    }

    /// Whether they differ by little.
    fn is_like(&self, other: &Change) -> bool {
        let differing = self.words.iter().filter(|word| !other.words.contains(word)).count();
        self.program == other.program
            && differing <= 1
            && self.words.len().abs_diff(other.words.len()) <= 1
    }

    fn noun(&self) -> String {
        format!("rule of {}", self.program.replace(" rule", "-rule"))
    }

    /// The command that takes back what `text` does.
    fn undoing(&self, text: &str) -> String {
        let mut words: Vec<&str> = text.split_whitespace().collect();
        let mut is_insert = false;
        for word in &mut words {
            match *word {
                "-A" | "--append" => *word = "-D",
                "-I" | "--insert" => {
                    is_insert = true;
                    *word = "-D";
                }
                "add" if self.program.starts_with("ip ") => *word = "del",
                _ => {}
            }
        }
        // Its number is a place, which `-D` would take for the rule itself.
        let number = words.iter().position(|word| *word == "-D").map(|at| at + 2);
        if let Some(at) = number.filter(|_| is_insert)
            && words.get(at).is_some_and(|word| word.bytes().all(|c| c.is_ascii_digit()))
        {
            words.remove(at);
        }
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{file, findings, rules};
    use super::*;

    #[test]
    fn commands_are_split_as_a_shell_does() {
        let words = |text: &str| {
            let shell = Shell::read(text);
            shell.commands.into_iter().map(|command| command.words).collect::<Vec<_>>()
        };
        assert_eq!(
            words("a b; c 'd e' && \"f;g\"h | i\\;j"),
            [vec!["a", "b"], vec!["c", "d e"], vec!["f;gh"], vec!["i;j"]]
        );
        assert_eq!(words(" ; "), [[""; 0]; 0]);
        assert_eq!(Shell::read("echo \"a'b\"").open_quote, None);
        assert_eq!(Shell::read("echo 'a\"b").open_quote, Some(5));
        let shell = Shell::read("a;  bc d ");
        assert_eq!((shell.commands[1].start, shell.commands[1].len), (4, 4));
    }

    #[test]
    fn a_command_that_is_cut_is_found() {
        assert_eq!(rules("PostUp = echo \"up # now\"", ""), [Rule::HookUnterminated]);
        assert_eq!(rules("PostUp = echo 'up", ""), [Rule::HookUnterminated]);
        assert_eq!(rules("PostUp = curl http://x/#a", ""), [Rule::HookCut]);
        assert_eq!(rules("PostUp = echo up # now", ""), []);
        assert_eq!(rules("PostUp = echo \"it's up\"", ""), []);
    }

    #[test]
    fn what_is_added_is_taken_back() {
        let up =
            "PostUp = iptables -I FORWARD 1 -i %i -j ACCEPT; ip rule add from 10.0.0.0/8 table 7";
        let of = |down: &str| rules(&format!("{up}\n{down}"), "");
        assert_eq!(of(""), [Rule::HookNotUndone; 2]);
        let iptables = "PostDown = iptables -w -D FORWARD -j ACCEPT --in-interface wg0";
        assert_eq!(of(iptables), [Rule::HookNotUndone]);
        assert_eq!(of(&format!("{iptables}\nPostDown = ip ru del lookup 7 from 10.0.0.0/8")), []);
        assert_eq!(of("PostDown = /etc/wireguard/down.sh"), []);
        assert_eq!(of("PostDown = iptables -F"), []);
        let quiet =
            "PostDown = iptables -D FORWARD -i %i -j ACCEPT 2>/dev/null >&2 > /dev/null || true";
        assert_eq!(of(quiet), [Rule::HookNotUndone]);
        assert_eq!(rules("PostDown = iptables -D INPUT -j DROP", ""), [Rule::HookUndoesNothing]);

        let found = findings(&file(up, ""));
        let help: Vec<_> = found.iter().filter_map(|finding| finding.help.as_deref()).collect();
        assert_eq!(
            help,
            [
                "write `PostDown = iptables -D FORWARD -i %i -j ACCEPT`",
                "write `PostDown = ip rule del from 10.0.0.0/8 table 7`"
            ]
        );
        let typo = "PostUp = iptables -A FORWARD -o eth0 -j ACCEPT\n\
                    PostDown = iptables -D FORWARD -o eth1 -j ACCEPT";
        let found = findings(&file(typo, ""));
        assert_eq!((found.len(), found[0].places.len()), (1, 2), "one cause, one finding");
    }

    #[test]
    fn masquerading_is_noted_with_its_nic() {
        let up = "iptables -t nat -A POSTROUTING -o ens3 -j MASQUERADE";
        let found =
            findings(&file(&format!("PostUp = {up}\nPostDown = {}", up.replace("-A", "-D")), ""));
        assert_eq!(found.len(), 1);
        assert!(found[0].help.as_deref().unwrap().contains("out=ens3"), "{found:?}");
    }

    #[test]
    fn who_translates_by_us_does_not_by_netfilter_as_well() {
        let of = |nat: &str, hook: &str| {
            let found = rules(&format!("#! Nat = {nat}\nPostUp = {hook}\nPostDown = down"), "");
            found.contains(&Rule::NatTwice)
        };
        for (nat, hook) in [
            ("masquerade out=eth0", "iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE"),
            (
                "masquerade out=eth0",
                "iptables -t nat -I POSTROUTING 1 -o eth+ -j SNAT --to 192.0.2.1",
            ),
            ("masquerade out=eth0", "iptables -t nat -A POSTROUTING -j MASQUERADE"),
            ("masquerade out=eth0", "iptables -t nat -A POSTROUTING ! -o wg0 -j MASQUERADE"),
            (
                "masquerade out=eth0",
                "true; sudo iptables -t nat -A POSTROUTING -s 10.9.0.0/24 -j MASQUERADE",
            ),
            (
                "masquerade out=eth0 from=10.9.0.0/25",
                "iptables -t nat -A POSTROUTING -s 10.9.0.0/24 -j MASQUERADE",
            ),
            (
                "masquerade out=eth0 from=fd09::/64",
                "ip6tables -t nat -A POSTROUTING -o eth0 -j MASQUERADE",
            ),
            (
                "snat out=eth0 to=192.0.2.1",
                "nft add rule ip nat postrouting oifname eth0 masquerade",
            ),
            ("masquerade out=eth0", "nft add rule inet nat postrouting masquerade"),
        ] {
            assert!(of(nat, hook), "{nat}: {hook}");
        }
        for (nat, hook) in [
            ("masquerade out=eth0", "iptables -t nat -A POSTROUTING -o eth1 -j MASQUERADE"),
            ("masquerade out=eth0", "ip6tables -t nat -A POSTROUTING -o eth0 -j MASQUERADE"),
            ("masquerade out=eth0", "iptables -t nat -D POSTROUTING -o eth0 -j MASQUERADE"),
            ("masquerade out=eth0", "iptables -A FORWARD -o eth0 -j ACCEPT"),
            (
                "masquerade out=eth0 from=10.9.0.0/25",
                "iptables -t nat -A POSTROUTING -s 10.9.1.0/24 -j MASQUERADE",
            ),
            ("masquerade out=eth0", "nft add rule ip6 nat postrouting masquerade"),
        ] {
            assert!(!of(nat, hook), "{nat}: {hook}");
        }
        let found = findings(&file(
            "#! Nat = masquerade out=eth0\nPostUp = iptables -t nat -A POSTROUTING -j MASQUERADE\nPostDown = x",
            "",
        ));
        let twice = found.iter().find(|finding| finding.rule == Rule::NatTwice).unwrap();
        assert_eq!((twice.severity, twice.places.len()), (Severity::Error, 2));
    }

    #[test]
    fn a_hook_of_another_interface_is_noted() {
        let of = |hook: &str| rules(&format!("PostUp = ip route add 10.0.0.0/8 dev {hook}"), "");
        assert_eq!(of("wg1"), [Rule::HookOtherInterface]);
        assert_eq!(of("wg0"), []);
        assert_eq!(of("%i"), []);
        assert_eq!(of("eth0"), []);
    }
}
