//! The host's firewall, by each program that changes it: the filter beside a default route, and rules
//! round which XDP would go.
//!
//! ```text
//!  outsider  198.51.100.2 ──────── outer 198.51.100.1  gateway (default route by the outsider)
//!            2001:db8:51::2              2001:db8:51::1
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    os::unix::fs::symlink,
    process::{Command, Output},
    time::Duration,
};

use common::tidegate;
use rustix::process::{Pid, Signal, kill_process};
use xtask::lab::{self, End, Layout, Site, Space, find_program};

const LIMIT: Duration = Duration::from_secs(20);

const LAYOUT: Layout = Layout {
    hosts: &["outsider", "gateway"],
    routers: &[],
    links: &[&[
        End {
            host: "outsider",
            nic: "outer",
            addresses: &["198.51.100.2/24", "2001:db8:51::2/64"],
        },
        End { host: "gateway", nic: "outer", addresses: &["198.51.100.1/24", "2001:db8:51::1/64"] },
    ]],
    routes: &[
        ("gateway", "default via 198.51.100.2"),
        ("gateway", "default via 2001:db8:51::2"),
        ("outsider", "10.9.0.0/24 via 198.51.100.1"),
        ("outsider", "fd09::/64 via 2001:db8:51::1"),
    ],
    private: true,
};

const KEYS: &str = "PrivateKey = IBwCMKG0IAvhlcZPDahVK2eDM/zI9yt7lBt7QJh8l1E=\n";
const PEER: &str = "[Peer]\nPublicKey = Dxb2eCff3wMzKu1p6E3nSAuuVwHtZ+tfrfHK1wXNl00=\n\
                    Endpoint = 198.51.100.2:51820\n";
const ADDRESSES: &str = "Address = 10.9.0.2/24, fd09::2/64";
const DEFAULT: &str = "0.0.0.0/0, ::/0";

/// What changes the firewall.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Tool {
    Nft,
    /// iptables over nf_tables, or over what there was before.
    Iptables(&'static str),
}

const TOOLS: [Tool; 3] = [Tool::Nft, Tool::Iptables("nft"), Tool::Iptables("legacy")];

impl Tool {
    fn missing(self) -> Option<String> {
        let programs = match self {
            Tool::Nft => vec!["nft".to_owned()],
            Tool::Iptables(kind) => {
                let of = |name| [format!("{name}-{kind}"), format!("{name}-{kind}-restore")];
                ["iptables", "ip6tables"].into_iter().flat_map(of).collect()
            }
        };
        let missing = programs.into_iter().find(|name| find_program(name).is_none())?;
        Some(format!("needs the program `{missing}`"))
    }
}

/// An outsider and a gateway whose programs are those of one tool.
struct Sandbox {
    site: Site,
    tool: Tool,
    /// Where the gateway looks for programs first.
    path: String,
}

impl Sandbox {
    /// Makes one, or says why not.
    fn new(test: &str, tool: Tool) -> Option<Sandbox> {
        let programs = || {
            let missing =
                ["wg", "nsenter"].into_iter().find(|name| find_program(name).is_none())?;
            Some(format!("needs the program `{missing}`"))
        };
        let missing = lab::unavailable().or_else(programs).or_else(|| tool.missing());
        if let Some(missing) = missing {
            eprintln!("SKIPPED {test} by {tool:?}: {missing}");
            return None;
        }
        let site = Site::new(&LAYOUT).unwrap();
        let folder = site.path("bin");
        std::fs::create_dir(&folder).unwrap();
        if let Tool::Iptables(kind) = tool {
            for family in ["iptables", "ip6tables"] {
                for end in ["", "-save", "-restore"] {
                    let program = find_program(&format!("{family}-{kind}{end}")).unwrap();
                    symlink(program, folder.join(format!("{family}{end}"))).unwrap();
                }
            }
        }
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}:/usr/sbin:/sbin", folder.display());
        let sandbox = Sandbox { site, tool, path };
        if let Tool::Iptables(_) = tool {
            sandbox.ok(lab::HIDE_NFT);
            // Tables are there before anything is compared.
            sandbox.ok("for table in raw mangle filter; do
                            iptables -t $table -S; ip6tables -t $table -S
                        done");
        }
        Some(sandbox)
    }

    fn gateway(&self) -> &Space {
        self.site.space("gateway")
    }

    /// Writes `tg0.conf`: keys, `lines`, and a peer with these allowed IPs.
    fn conf(&self, lines: &str, allowed_ips: &str) {
        let text = format!("[Interface]\n{KEYS}{lines}\n{PEER}AllowedIPs = {allowed_ips}\n");
        self.site.write("tg0.conf", &text).unwrap();
    }

    /// A shell on the gateway. `$TIDEGATE` is the program, without XDP.
    fn command(&self, script: &str) -> Command {
        let mut command = self.gateway().command("bash");
        command.args(["-c", script]).env("PATH", &self.path).env("F", self.site.path(""));
        command.env("TIDEGATE", tidegate()).env("TIDEGATE_MODE", "udp");
        command.env("TIDEGATE_WORKERS", "1");
        command
    }

    fn sh(&self, script: &str) -> Output {
        self.command(script).output().unwrap()
    }

    /// Runs a script that must succeed; gives what it prints.
    fn ok(&self, script: &str) -> String {
        let output = self.sh(&format!("set -e; {script}"));
        assert!(output.status.success(), "{:?}: {script}: {}", self.tool, errors(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// All rules of the firewall, whoever shows them.
    fn rules(&self) -> String {
        match self.tool {
            Tool::Nft => {
                self.ok("nft list tables | sort | while read -r table; do nft -s list $table; done")
            }
            Tool::Iptables(_) => self
                .ok("{ iptables-save; ip6tables-save; } | sed 's/ \\[.*//' | grep -E '^-A|^:.* DROP' || true"),
        }
    }

    /// Everything that `up` may change.
    fn state(&self) -> String {
        self.rules()
            // Link-local addresses come when they like, and so does a carrier.
            + &self.ok("ip -o link | sed 's/<[^>]*>//; s/ state .*//'
                { ip -o addr; ip -4 rule; ip -6 rule; ip -4 route show table all
                  ip -6 route show table all; } | grep -v -e fe80: -e ff00:
                cat /proc/sys/net/ipv4/conf/all/src_valid_mark
                find /run/tidegate /run/wireguard -type f -o -type s || true")
            + &self.gateway().processes().join(" ")
    }

    /// Kills the daemon, both processes at once, and waits until its device is gone.
    fn kill_daemon(&self) {
        let list = Command::new("ip").args(["netns", "pids", self.gateway().name()]).output();
        let pids = String::from_utf8(list.unwrap().stdout).unwrap();
        for pid in pids.lines().map(str::trim) {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if name.starts_with("tidegate") {
                let _ = kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), Signal::KILL);
            }
        }
        let is_gone = || {
            let names = self.gateway().processes();
            let ended = !names.iter().any(|name| name.starts_with("tidegate"));
            Ok((ended && !self.gateway().has_interface("tg0")).then_some(()))
        };
        lab::wait_for("the daemon's end", LIMIT, is_gone).unwrap();
    }

    /// How many of three echo requests of the outsider's to each address of the tunnel are answered.
    fn answered(&self) -> u32 {
        let outsider = self.site.space("outsider");
        let addresses = ["10.9.0.2", "fd09::2"].into_iter();
        addresses.map(|to| outsider.ping(to, 3, &["-W", "1"]).unwrap().answered).sum()
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const UP: &str = "\"$TIDEGATE\" up $F/tg0.conf";
const DOWN: &str = "\"$TIDEGATE\" down $F/tg0.conf";

#[test]
fn outsiders_do_not_reach_the_tunnel_while_it_is_the_default_route() {
    let test = "outsiders_do_not_reach_the_tunnel_while_it_is_the_default_route";
    for tool in TOOLS {
        let Some(sandbox) = Sandbox::new(test, tool) else { continue };
        let before = sandbox.state();
        sandbox.conf(ADDRESSES, "10.9.0.0/24, fd09::/64");
        sandbox.ok(UP);
        assert_eq!(sandbox.answered(), 6, "{tool:?}: nothing is filtered without a default route");
        sandbox.ok(DOWN);
        assert_eq!(sandbox.state(), before, "{tool:?}");

        sandbox.conf(ADDRESSES, DEFAULT);
        sandbox.ok(UP);
        assert_eq!(sandbox.answered(), 0, "{tool:?}: {}", sandbox.rules());
        // The host itself reaches them.
        sandbox.ok("ping -n -q -c 1 10.9.0.2; ping -n -q -c 1 fd09::2");
        sandbox.ok(DOWN);
        assert_eq!(sandbox.state(), before, "{tool:?}");
    }
}

#[test]
fn a_kill_at_any_step_leaves_no_rule_that_down_does_not_remove() {
    let test = "a_kill_at_any_step_leaves_no_rule_that_down_does_not_remove";
    for tool in [Tool::Nft, Tool::Iptables("legacy")] {
        let Some(sandbox) = Sandbox::new(test, tool) else { continue };
        sandbox.conf(ADDRESSES, DEFAULT);
        let before = sandbox.state();
        let (mut killed, mut with_rules) = (0, 0);
        for at in 1.. {
            let output = sandbox.sh(&format!("export TIDEGATE_TEST_STOP_AT={at}; exec {UP}"));
            if output.status.success() {
                break;
            }
            killed = at;
            with_rules += u32::from(sandbox.rules().contains("10.9.0.2"));
            if at % 3 == 0 {
                sandbox.kill_daemon();
            }
            sandbox.ok(&format!("test -e /run/tidegate/tg0.state; {DOWN}"));
            assert_eq!(sandbox.state(), before, "{tool:?}, at {at}: {}", errors(&output));
        }
        assert!(killed > 3 * 12 && with_rules > 3, "{killed} {with_rules}");
        // It is up now.
        sandbox.kill_daemon();
        assert_ne!(sandbox.state(), before);
        sandbox.ok(DOWN);
        assert_eq!(sandbox.state(), before, "{tool:?}");
        // The next `up` finds what is left and makes it anew, once.
        sandbox.ok(UP);
        let rules = sandbox.rules();
        sandbox.kill_daemon();
        sandbox.ok(UP);
        assert_eq!(sandbox.rules(), rules, "{tool:?}");
        sandbox.ok(DOWN);
        assert_eq!(sandbox.state(), before, "{tool:?}");
    }
}

#[test]
fn a_reload_takes_the_filter_to_the_addresses_that_are_there_then() {
    let test = "a_reload_takes_the_filter_to_the_addresses_that_are_there_then";
    for tool in TOOLS {
        let Some(sandbox) = Sandbox::new(test, tool) else { continue };
        let before = sandbox.state();
        let (addresses, others) = ("10.9.0.2/24, fd09::2/64", "10.9.0.7/24, fd09::7/64");
        let up = |addresses: &str| {
            sandbox.conf(&format!("Address = {addresses}"), DEFAULT);
            sandbox.ok(UP);
            sandbox.rules()
        };
        let rules = up(others);
        sandbox.ok(DOWN);
        up(addresses);
        sandbox.conf(&format!("Address = {others}"), DEFAULT);
        sandbox.ok("\"$TIDEGATE\" reload $F/tg0.conf");
        assert_eq!(sandbox.rules(), rules, "{tool:?}");
        sandbox.ok(DOWN);
        assert_eq!(sandbox.state(), before, "{tool:?}");
    }
}

#[test]
fn the_table_of_nft_is_what_wg_quick_makes_of_it() {
    let test = "the_table_of_nft_is_what_wg_quick_makes_of_it";
    let Some(sandbox) = Sandbox::new(test, Tool::Nft) else { return };
    if find_program("wg-quick").is_none() {
        return eprintln!("SKIPPED {test}: needs wg-quick");
    }
    symlink(tidegate(), sandbox.site.path("bin/tidegated")).unwrap();
    let before = sandbox.rules();
    for (lines, allowed_ips) in [
        (ADDRESSES, DEFAULT),
        ("Address = 10.9.0.2/24\nAddress = 10.8.0.2/32, fd09::2/128\nFwMark = 0x77", DEFAULT),
        (ADDRESSES, "::/0, 10.1.0.0/16"),
        ("Address = 10.9.0.2/24, fd09::2/64\nTable = 100", DEFAULT),
    ] {
        sandbox.conf(lines, allowed_ips);
        sandbox.ok("WG_QUICK_USERSPACE_IMPLEMENTATION=tidegated wg-quick up $F/tg0.conf");
        let theirs = sandbox.rules().replace("wg-quick-tg0", "tidegate-tg0");
        sandbox.ok("wg-quick down $F/tg0.conf");
        lab::wait_for("the daemon's end", LIMIT, || {
            Ok(sandbox.gateway().processes().is_empty().then_some(()))
        })
        .unwrap();
        sandbox.ok(UP);
        assert_eq!(sandbox.rules(), theirs, "{lines}");
        sandbox.ok(DOWN);
        assert_eq!(sandbox.rules(), before, "{lines}");
    }
}

/// What `up` would say of XDP on the gateway's link.
fn refusal(sandbox: &Sandbox, rules: &str) -> Option<String> {
    let output = sandbox.sh(&format!("unset TIDEGATE_MODE; {UP} --dry-run"));
    let told = errors(&output);
    if output.status.success() {
        return None;
    }
    assert_eq!(output.status.code(), Some(1), "{rules}: {told}");
    assert!(told.contains("XDP on outer would go round a rule of the firewall"), "{told}");
    Some(told)
}

#[test]
fn rules_of_nft_that_concern_the_port_keep_xdp_away() {
    let test = "rules_of_nft_that_concern_the_port_keep_xdp_away";
    let Some(sandbox) = Sandbox::new(test, Tool::Nft) else { return };
    sandbox.conf("ListenPort = 51820\n#! Xdp = outer", "10.9.0.1/32");
    assert_eq!(refusal(&sandbox, ""), None);
    // The rules of input, what they need beside it, and what is told of them.
    let concerned = [
        ("policy drop;", "", "policy drop of chain input in table filter"),
        ("udp dport 51820 drop", "", "inet filter input: udp dport 51820 drop"),
        ("udp dport { 53, 51820 } counter drop", "", "udp dport { 53, 51820 } counter"),
        ("udp dport 51000-52000 reject", "", "udp dport 51000-52000 reject"),
        ("udp dport { 1-9, 51000-52000 } drop", "", "51000-52000 } drop"),
        ("udp dport >= 1024 drop", "", "udp dport >= 1024 drop"),
        ("udp dport != 53 drop", "", "udp dport != 53 drop"),
        ("th dport 51820 drop", "", "th dport 51820 drop"),
        (
            "udp dport @ports drop",
            "set ports { type inet_service; elements = { 51820 }; }",
            "@ports",
        ),
        ("udp dport vmap { 53 : accept, 51820 : drop }", "", "vmap"),
        (
            "udp dport vmap @verdicts",
            "map verdicts { type inet_service : verdict; elements = { 51820 : drop }; }",
            "vmap @verdicts",
        ),
        (
            "meta l4proto vmap { udp : jump mine }",
            "chain mine {\n drop\n}",
            "inet filter mine: drop",
        ),
        ("iifname vmap { \"outer\" : goto mine }", "chain mine {\n drop\n}", "filter mine: drop"),
        ("jump mine", "chain mine {\n udp dport 51820 reject\n}", "inet filter mine: udp dport"),
        ("iifname . udp dport { \"outer\" . 51820 } drop", "", "iifname . udp dport"),
        ("ip saddr 192.0.2.0/24 drop", "", "ip saddr 192.0.2.0/24 drop"),
        ("udp dport 51820 limit rate over 10/second drop", "", "limit rate over"),
        ("policy drop; ct state established,related accept", "", "policy drop"),
        ("policy drop; ip protocol udp accept", "", "policy drop"),
        ("policy drop; udp dport 51820 limit rate 10/second accept", "", "policy drop"),
        ("ct state new drop", "", "ct state new drop"),
    ];
    let not_concerned = [
        ("", ""),
        ("tcp dport 22 drop", ""),
        ("udp dport 53 drop", ""),
        ("udp dport { 53, 67-69 } reject", ""),
        ("udp dport < 1024 drop", ""),
        ("udp dport != 51820 drop", ""),
        ("udp dport @ports drop", "set ports { type inet_service; elements = { 53 }; }"),
        ("udp dport vmap { 53 : drop, 51820 : accept }", ""),
        ("iifname \"lan\" drop", ""),
        ("iifname . udp dport { \"outer\" . 53, \"lan\" . 51820 } drop", ""),
        ("ct state invalid drop", ""),
        ("fib daddr type { broadcast, anycast, multicast } drop", ""),
        ("icmp type echo-request drop", ""),
        ("jump mine\n drop", "chain mine {\n udp dport 51820 accept\n}"),
        ("policy drop; udp dport 51820 accept", ""),
        (
            "policy drop; udp dport @ports accept",
            "set ports { type inet_service; flags interval; elements = { 51000-52000 }; }",
        ),
        ("policy drop; meta l4proto { icmp, udp } accept", ""),
        (
            "policy drop; ct state vmap { established : accept, related : accept, invalid : drop }
             iif lo accept\n udp dport 51820 ct state { new, untracked } accept",
            "",
        ),
        (
            "policy drop; ct state established,related accept
             meta l4proto vmap { tcp : jump mine, udp : jump ours }\n reject",
            "chain mine {\n tcp dport 22 accept\n}\n chain ours {\n udp dport 51820 accept\n}",
        ),
    ];
    let with = |rules: &str, beside: &str| {
        let text = format!(
            "flush ruleset\ntable inet filter {{\n{beside}\nchain input {{\n\
             type filter hook input priority 0; {rules}\n}}\nchain forward {{\n\
             type filter hook forward priority 0; policy drop;\n}}\n}}\n"
        );
        sandbox.site.write("rules", &text).unwrap();
        sandbox.ok("nft -f $F/rules");
        refusal(&sandbox, rules)
    };
    for (rules, beside, expected) in concerned {
        let told = with(rules, beside).unwrap_or_else(|| panic!("XDP goes round `{rules}`"));
        assert!(told.contains("nft: `") && told.contains(expected), "{rules}: {told}");
        assert!(told.contains("bypass-firewall"), "{told}");
        sandbox.ok(&format!("unset TIDEGATE_MODE; {UP} --dry-run --bypass-firewall"));
    }
    for (rules, beside) in not_concerned {
        assert_eq!(with(rules, beside), None, "{rules}");
    }

    // Not only a dry run: nothing is begun, sockets may be used, and who says so goes round it.
    with("udp dport 51820 drop", "");
    let before = sandbox.state();
    let output = sandbox.sh(&format!("unset TIDEGATE_MODE; {UP}"));
    assert_eq!(output.status.code(), Some(1), "{}", errors(&output));
    assert_eq!(sandbox.state(), before);
    sandbox.ok(&format!("{UP}; {DOWN}"));
    sandbox.conf("ListenPort = 51820\n#! Xdp = outer mode=native bypass-firewall", "10.9.0.1/32");
    let shown = sandbox.ok(&format!("unset TIDEGATE_MODE; {UP}; \"$TIDEGATE\" show tg0; {DOWN}"));
    assert!(shown.contains("native"), "{shown}");
    assert_eq!(sandbox.state(), before);

    // Where AF_XDP would send past a rule, the daemon is told to send by sockets, and why.
    let told = |rules: &str, options: &str, line: &str| {
        let text = format!(
            "flush ruleset\ntable inet filter {{\nchain out {{\n\
             type filter hook output priority 0; {rules}\n}}\n}}\n"
        );
        sandbox.site.write("rules", &text).unwrap();
        sandbox.conf(&format!("ListenPort = 51820\n#! Xdp = outer{options}"), "10.9.0.1/32");
        sandbox.ok(&format!(
            "nft -f $F/rules; unset TIDEGATE_MODE; {UP} {line}; \
             cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -a ^--by-''socket= || true; {DOWN}"
        ))
    };
    let expected = "--by-socket=outer=AF_XDP would go round a rule of the firewall that may concern what \
                    leaves: nft: `inet filter out: udp sport 51820 drop`";
    let limited = "udp sport 51820 drop";
    assert!(told(limited, "", "").contains(expected), "{}", told(limited, "", ""));
    for (rules, options, line) in [
        ("udp sport 53 drop", "", ""),
        ("oifname \"lan\" drop", "", ""),
        (limited, " mode=native", ""),
        (limited, " bypass-firewall", ""),
        (limited, "", "--bypass-firewall"),
    ] {
        let told = told(rules, options, line);
        assert!(!told.contains("by-socket"), "{rules} {options} {line}: {told}");
    }
}

#[test]
fn rules_of_both_kinds_of_iptables_are_seen() {
    let test = "rules_of_both_kinds_of_iptables_are_seen";
    // Whichever of them `iptables-save` is.
    for default in ["nft", "legacy"] {
        let tool = Tool::Iptables(default);
        let missing = ["nft", "legacy"].into_iter().find_map(|kind| Tool::Iptables(kind).missing());
        if let Some(missing) = missing {
            return eprintln!("SKIPPED {test}: {missing}");
        }
        let Some(sandbox) = Sandbox::new(test, tool) else { return };
        sandbox.conf("ListenPort = 51820\n#! Xdp = outer", "10.9.0.1/32");
        for kind in ["nft", "legacy"] {
            for program in [format!("iptables-{kind}"), format!("ip6tables-{kind}")] {
                let case = format!("{program} where {default} is the default");
                let change = |how: &str| sandbox.ok(&format!("{program} {how}"));
                change("-A INPUT -p udp --dport 53 -j DROP");
                assert_eq!(refusal(&sandbox, &case), None, "{case}");
                change("-A INPUT -p udp -m multiport --dports 53,51820 -j DROP");
                let told = refusal(&sandbox, &case);
                let told = told.unwrap_or_else(|| panic!("XDP goes round a rule of {case}"));
                let rule = "-save: `-A INPUT -p udp -m multiport --dports 53,51820 -j DROP`";
                assert!(told.contains(rule), "{case}: {told}");
                change("-F INPUT");
                assert_eq!(refusal(&sandbox, &case), None, "{case}");
            }
        }
    }
}

#[test]
fn what_nft_and_iptables_both_show_is_read_from_who_shows_it_whole() {
    let test = "what_nft_and_iptables_both_show_is_read_from_who_shows_it_whole";
    let Some(sandbox) = Sandbox::new(test, Tool::Nft) else { return };
    if let Some(missing) = Tool::Iptables("nft").missing() {
        return eprintln!("SKIPPED {test}: {missing}");
    }
    sandbox.conf("ListenPort = 51820\n#! Xdp = outer", "10.9.0.1/32");
    for (script, expected) in [
        // What nft hides.
        ("iptables-nft -A INPUT -p udp -m multiport --dports 53,54 -j DROP", None),
        ("iptables-nft -A INPUT -p udp -m multiport --dports 53,51820 -j DROP", Some("-save: `-A")),
        ("iptables-nft -A INPUT -j REJECT", Some("-save: `-A INPUT -j REJECT")),
        // What iptables leaves out.
        (
            "iptables-nft -P INPUT DROP; iptables-nft -A INPUT -p tcp -j ACCEPT
             nft add rule ip filter INPUT udp dport { 53, 54 } accept",
            Some("-save: `policy drop of chain INPUT in table filter"),
        ),
        (
            "iptables-nft -A INPUT -p tcp -j ACCEPT
             nft add rule ip filter INPUT udp dport { 53, 54 } drop",
            None,
        ),
        (
            "nft add table ip filter
             nft add chain ip filter input '{ type filter hook input priority 0; policy drop; }'",
            Some("nft: `policy drop of chain input in table filter"),
        ),
        // Another kind's table of the same name.
        (
            "nft add table ip filter
             nft add chain ip filter input '{ type filter hook input priority 0; policy drop; }'
             iptables-legacy -A INPUT -p tcp -j ACCEPT",
            Some("nft: `policy drop of chain input in table filter"),
        ),
    ] {
        sandbox.ok(&format!("nft flush ruleset; {script}"));
        let told = refusal(&sandbox, script);
        match expected {
            None => assert_eq!(told, None, "{script}"),
            Some(expected) => {
                let told = told.unwrap_or_else(|| panic!("XDP goes round {script}"));
                assert!(told.contains(expected), "{script}: {told}");
            }
        }
    }
}

/// What `up` would say of NAT from the gateway's tunnel to its link.
fn nat_refusal(sandbox: &Sandbox, rules: &str) -> Option<String> {
    let output = sandbox.sh(&format!("{UP} --dry-run"));
    let told = errors(&output);
    if output.status.success() {
        return None;
    }
    assert_eq!(output.status.code(), Some(1), "{rules}: {told}");
    assert!(told.contains("tg0.conf:5:1") && told.contains("bypass-firewall"), "{rules}: {told}");
    // As it stands in a terminal, without what it is wrapped by.
    let words: Vec<_> = told.split_whitespace().filter(|word| *word != "│").collect();
    Some(words.join(" "))
}

/// A gateway's file with a line.
fn nat_conf(sandbox: &Sandbox, line: &str) {
    sandbox.conf(&format!("Address = 10.9.0.1/24\nListenPort = 51820\n{line}"), "10.9.0.2/32");
}

#[test]
fn rules_of_nft_for_what_is_forwarded_keep_nat_away() {
    let test = "rules_of_nft_for_what_is_forwarded_keep_nat_away";
    let Some(sandbox) = Sandbox::new(test, Tool::Nft) else { return };
    let nat = "#! Nat = masquerade out=outer";
    nat_conf(&sandbox, nat);
    assert_eq!(nat_refusal(&sandbox, ""), None);
    let with = |hook: &str, rules: &str| {
        let text = format!(
            "flush ruleset\ntable inet filter {{\nchain {hook} {{\n\
             type filter hook {hook} priority 0; {rules}\n}}\nchain input {{\n\
             type filter hook input priority 0; policy drop;\n}}\n}}\n"
        );
        let text = text.replace("type filter hook postrouting", "type nat hook postrouting");
        sandbox.site.write("rules", &text).unwrap();
        sandbox.ok("nft -f $F/rules");
        nat_refusal(&sandbox, rules)
    };
    for (hook, rules, expected) in [
        ("forward", "policy drop;", "policy drop of chain forward"),
        ("forward", "iifname \"tg0\" ip daddr 192.0.2.0/24 drop", "ip daddr 192.0.2.0/24 drop"),
        ("forward", "tcp dport 25 reject", "tcp dport 25 reject"),
        ("forward", "ct state new limit rate over 10/second drop", "limit rate over"),
        ("forward", "policy drop; oifname \"outer\" accept", "policy drop"),
        ("forward", "meta mark set 7", "meta mark set"),
        ("forward", "tcp option maxseg size set 1200", "maxseg size set 1200"),
        ("postrouting", "oifname \"outer\" masquerade", "masquerade"),
        ("postrouting", "ip saddr 10.0.0.0/8 snat ip to 198.51.100.1", "snat"),
    ] {
        let told = with(hook, rules).unwrap_or_else(|| panic!("NAT goes round `{rules}`"));
        assert!(told.contains("nft: `") && told.contains(expected), "{rules}: {told}");
        assert!(told.contains("#! Nat"), "{rules}: {told}");
        sandbox.ok(&format!("{UP} --dry-run --bypass-firewall"));
    }
    for (hook, rules) in [
        ("forward", "iifname \"lan\" drop"),
        ("forward", "oifname \"lan\" drop"),
        ("forward", "iifname \"tg0\" ip saddr 10.8.0.0/16 drop"),
        ("forward", "ct state invalid drop"),
        ("forward", "tcp flags syn tcp option maxseg size set rt mtu"),
        ("forward", "policy drop; iifname \"tg0\" accept\n ct state established,related accept"),
        ("forward", "policy drop; iifname { \"tg0\", \"outer\" } accept"),
        ("postrouting", "ip saddr 172.17.0.0/16 masquerade"),
        ("postrouting", "oifname \"lan\" masquerade"),
    ] {
        assert_eq!(with(hook, rules), None, "{rules}");
    }

    // Not only a dry run, and the line may say that it need not hold.
    with("forward", "policy drop;");
    let before = sandbox.state();
    let output = sandbox.sh(UP);
    assert_eq!(output.status.code(), Some(1), "{}", errors(&output));
    assert_eq!(sandbox.state(), before);
    let checked = sandbox.sh("\"$TIDEGATE\" check $F/tg0.conf");
    assert_eq!(checked.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&checked.stdout).contains("round a rule of the firewall"));
    nat_conf(&sandbox, &format!("{nat} bypass-firewall"));
    assert_eq!(nat_refusal(&sandbox, ""), None);
}

/// As Docker leaves them on a host.
#[test]
fn rules_of_docker_keep_nat_away_until_they_let_it_pass() {
    let test = "rules_of_docker_keep_nat_away_until_they_let_it_pass";
    for tool in [Tool::Iptables("nft"), Tool::Iptables("legacy")] {
        let Some(sandbox) = Sandbox::new(test, tool) else { continue };
        sandbox.ok("iptables -P FORWARD DROP
                    for chain in DOCKER DOCKER-USER DOCKER-FORWARD; do iptables -N $chain; done
                    iptables -A FORWARD -j DOCKER-USER
                    iptables -A FORWARD -j DOCKER-FORWARD
                    iptables -A DOCKER-USER -j RETURN
                    iptables -A DOCKER-FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
                    iptables -A DOCKER-FORWARD -o docker0 -j DOCKER
                    iptables -A DOCKER-FORWARD -i docker0 -j ACCEPT
                    iptables -A DOCKER ! -i docker0 -o docker0 -j DROP
                    iptables -t nat -N DOCKER
                    iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
                    iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE");
        nat_conf(&sandbox, "#! Nat = masquerade out=outer");
        let told = nat_refusal(&sandbox, "").expect("the policy would be gone round");
        assert!(told.contains("policy drop of chain FORWARD"), "{tool:?}: {told}");
        sandbox.ok("iptables -I DOCKER-USER -i tg0 -o outer -j ACCEPT");
        assert!(nat_refusal(&sandbox, "one way").is_some());
        sandbox.ok("iptables -I DOCKER-USER -i outer -o tg0 -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT");
        assert_eq!(nat_refusal(&sandbox, "both ways"), None, "{tool:?}");
        sandbox.ok("iptables -I DOCKER-USER -s 10.9.0.2 -p tcp --dport 25 -j DROP");
        let told = nat_refusal(&sandbox, "a rule of the administrator's").unwrap();
        assert!(told.contains("DOCKER-USER") && told.contains("--dport 25"), "{told}");

        // What comes to a port from outside is asked about by itself. It may come from anywhere, Docker's own
        // addresses among them.
        sandbox.ok("iptables -D DOCKER-USER -s 10.9.0.2 -p tcp --dport 25 -j DROP; iptables -t nat -F POSTROUTING");
        nat_conf(&sandbox, "#! Forward = tcp outer:8443 -> 10.9.0.2:443");
        let told = nat_refusal(&sandbox, "from outside").unwrap();
        assert!(told.contains("#! Forward") && told.contains("from outer to tg0"), "{told}");
        sandbox.ok("iptables -I DOCKER-USER -i outer -o tg0 -p tcp --dport 443 -j ACCEPT");
        assert_eq!(nat_refusal(&sandbox, "the port is open"), None, "{tool:?}");
    }
}

#[test]
fn a_hook_that_translates_as_well_is_refused_with_both_places() {
    let test = "a_hook_that_translates_as_well_is_refused_with_both_places";
    let Some(sandbox) = Sandbox::new(test, Tool::Nft) else { return };
    let nat = "#! Nat = masquerade out=outer bypass-firewall";
    let hook =
        |nic: &str| format!("PostUp = iptables -t nat -A POSTROUTING -o {nic} -j MASQUERADE");
    nat_conf(&sandbox, &format!("{nat}\n{}", hook("outer")));
    let before = sandbox.state();
    for way in ["", " --dry-run", " --bypass-firewall"] {
        let output = sandbox.sh(&format!("{UP}{way}"));
        let told = errors(&output);
        assert_eq!(output.status.code(), Some(3), "{told}");
        for part in [
            "tg0.conf:6:10",
            "translate the same packets",
            "by netfilter",
            "by us",
            "help: remove one",
        ] {
            assert!(told.contains(part), "{part}: {told}");
        }
    }
    assert_eq!(sandbox.state(), before);
    nat_conf(&sandbox, &format!("{nat}\n{}", hook("lan")));
    sandbox.ok(&format!("{UP} --dry-run"));
}

/// The host's switches for forwarding.
const SWITCHES: &str = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding";

#[test]
fn forwarding_is_let_on_by_up_and_set_back_by_down_even_after_a_kill() {
    let test = "forwarding_is_let_on_by_up_and_set_back_by_down_even_after_a_kill";
    let Some(sandbox) = Sandbox::new(test, Tool::Nft) else { return };
    let switches = || sandbox.ok(SWITCHES).split_whitespace().collect::<String>();
    let set = |v4: u8, v6: u8| {
        sandbox.ok(&format!(
            "echo {v4} > /proc/sys/net/ipv4/ip_forward; echo {v6} > /proc/sys/net/ipv6/conf/all/forwarding"
        ));
    };
    set(0, 0);
    nat_conf(&sandbox, "#! Allow = 10.9.0.0/24 -> 192.0.2.0/24");
    let shown = sandbox.ok(&format!("{UP} --dry-run"));
    assert!(shown.contains("sysctl -q net.ipv4.ip_forward=1"), "{shown}");
    assert_eq!(switches(), "00");
    let told = errors(&sandbox.sh(UP));
    let word = "net.ipv4.ip_forward is 1, and was 0";
    assert!(told.contains(word) && told.contains("`down` sets it back"), "{told}");
    assert_eq!(switches(), "10");
    sandbox.ok(DOWN);
    assert_eq!(switches(), "00");

    nat_conf(&sandbox, "#! Allow = 10.9.0.0/24 -> 192.0.2.0/24\n#! Allow = fd09::/64 -> fd20::/64");
    sandbox.ok(UP);
    assert_eq!(switches(), "11");
    // Who has changed it meanwhile has the last word.
    set(1, 0);
    sandbox.ok(DOWN);
    assert_eq!(switches(), "00");
    // What was so before stays, and nothing is said of it.
    set(1, 1);
    let told = errors(&sandbox.sh(UP));
    assert!(!told.contains("forward"), "{told}");
    sandbox.ok(DOWN);
    assert_eq!(switches(), "11");

    set(0, 0);
    let (mut killed, mut while_on) = (0, 0);
    for at in 1.. {
        let output = sandbox.sh(&format!("export TIDEGATE_TEST_STOP_AT={at}; exec {UP}"));
        if output.status.success() {
            break;
        }
        killed = at;
        while_on += u32::from(switches() != "00");
        sandbox.ok(DOWN);
        assert_eq!(switches(), "00", "at {at}: {}", errors(&output));
    }
    assert!(killed > 12 && while_on > 2, "{killed} {while_on}");
    sandbox.kill_daemon();
    sandbox.ok(DOWN);
    assert_eq!(switches(), "00");
}

#[test]
fn a_reload_lets_forwarding_on_and_off() {
    let Some(sandbox) = Sandbox::new("a_reload_lets_forwarding_on_and_off", Tool::Nft) else {
        return;
    };
    let switches = || sandbox.ok(SWITCHES).split_whitespace().collect::<String>();
    sandbox.ok("echo 0 > /proc/sys/net/ipv4/ip_forward");
    nat_conf(&sandbox, "");
    sandbox.ok(UP);
    assert_eq!(switches(), "00");
    nat_conf(&sandbox, "#! Allow = 10.9.0.0/24 -> 192.0.2.0/24");
    sandbox.ok("\"$TIDEGATE\" reload $F/tg0.conf");
    assert_eq!(switches(), "10");
    nat_conf(&sandbox, "");
    sandbox.ok("\"$TIDEGATE\" reload $F/tg0.conf");
    assert_eq!(switches(), "00");
    sandbox.ok(DOWN);
}
