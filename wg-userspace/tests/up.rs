//! `up` and `down` as their users meet them, compared with wg-quick(8), and killed on their way.
//!
//! The namespaces are those of `common/sandbox.rs`.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "common/sandbox.rs"]
mod sandbox;

use std::fs;

use sandbox::{DOWN, KILL_DAEMON, LIMIT, Sandbox, TIDEGATE, UP, errors, wait_until};
use xtask::lab;

#[test]
fn a_default_route_is_what_wg_quick_makes_of_it() {
    let Some(sandbox) = Sandbox::new("a_default_route_is_what_wg_quick_makes_of_it") else {
        return;
    };
    if lab::find_program("wg-quick").is_none() {
        println!("SKIPPED a_default_route_is_what_wg_quick_makes_of_it: needs wg-quick");
        return;
    }
    fs::create_dir_all(sandbox.path("bin")).unwrap();
    std::os::unix::fs::symlink(TIDEGATE, sandbox.path("bin/tidegated")).unwrap();
    let before = sandbox.state();
    for (lines, allowed_ips) in [
        ("Address = 10.9.0.2/24, fd09::2/64", "0.0.0.0/0, ::/0"),
        (
            "Address = 10.9.0.2/24\nAddress = 10.8.0.2/32, fd09::2/128\nFwMark = 0x77\nMTU = 1380",
            "0.0.0.0/0, ::/0, 10.1.0.0/16, 10.9.0.0/28, fd00::/8",
        ),
        ("Address = 10.9.0.2/24, fd09::2/64\nTable = 100", "0.0.0.0/0, ::/0, 10.9.0.0/24"),
        ("Address = 10.9.0.2/24, fd09::2/64\nTable = off", "0.0.0.0/0, ::/0, 10.1.0.0/24"),
        ("Address = 10.9.0.2/32", "10.9.0.0/24, 10.9.0.1/32, 192.168.20.0/24, 10.9.0.0/24"),
    ] {
        sandbox.conf("tg0", lines, allowed_ips);
        sandbox.ok("WG_QUICK_USERSPACE_IMPLEMENTATION=tidegated wg-quick up $F/tg0.conf");
        let theirs = sandbox.routing();
        sandbox
            .ok("wg-quick down $F/tg0.conf; echo 0 > /proc/sys/net/ipv4/conf/all/src_valid_mark");
        lab::wait_for("the daemon's end", LIMIT, || Ok((sandbox.state() == before).then_some(())))
            .unwrap();
        sandbox.ok(UP);
        assert_eq!(sandbox.routing(), theirs, "{lines}");
        sandbox.ok(DOWN);
        assert_eq!(sandbox.state(), before, "{lines}");
    }
}

#[test]
fn hooks_run_in_their_order() {
    let Some(sandbox) = Sandbox::new("hooks_run_in_their_order") else { return };
    let hook = |key: &str, word: &str| {
        format!(
            "{key} = echo {word} %i $(ip -o link show up dev %i 2>/dev/null | wc -l) >> $F/log\n"
        )
    };
    let lines = [
        hook("PostDown", "d"),
        hook("PostUp", "b1"),
        hook("PreUp", "a1"),
        hook("PreDown", "c1"),
        hook("PreUp", "a2"),
        hook("PostUp", "b2"),
        hook("PreDown", "c2"),
    ];
    sandbox.conf("tg0", &lines.concat(), "10.9.0.1/32");
    let told = errors(&sandbox.sh(&format!("{UP} && {DOWN}")));
    let log = "a1 tg0 0\na2 tg0 0\nb1 tg0 1\nb2 tg0 1\nc1 tg0 1\nc2 tg0 1\nd tg0 0\n";
    assert_eq!(sandbox.read("log"), log, "{told}");
    assert!(told.contains("[#] echo a1 tg0 "), "{told}");
    // Arrays and pipes are bash's.
    sandbox.conf("tg0", "PostUp = words=(a b); [[ ${words[1]} == b ]]", "10.9.0.1/32");
    sandbox.ok(&format!("{UP}; {DOWN}"));
}

/// Every kind of step.
const EVERYTHING: &str = "Address = 10.9.0.2/24, fd09::2/64\nDNS = 10.9.0.1, lan\n\
    PreUp = iptables -A FORWARD -o %i -j ACCEPT\nPostUp = iptables -A FORWARD -i %i -j ACCEPT\n\
    PostDown = iptables -D FORWARD -i %i -j ACCEPT || true; iptables -D FORWARD -o %i -j ACCEPT || true";

#[test]
fn a_hook_that_fails_leaves_nothing_behind() {
    let Some(sandbox) = Sandbox::new("a_hook_that_fails_leaves_nothing_behind") else { return };
    sandbox.fake("resolvconf");
    let before = sandbox.state();
    let hooks = "\nPostUp = touch $F/second\nPostUp = exit 7\nPostUp = touch $F/fourth\n\
                 PostUp = touch $F/fifth\nPreDown = touch $F/predown; false";
    sandbox.conf("tg0", &format!("{EVERYTHING}{hooks}"), "0.0.0.0/0, ::/0, 10.1.0.0/16");
    let told = sandbox.fails(1, UP);
    assert!(told.contains("tg0.conf:9: PostUp ended with exit code 7: exit 7"), "{told}");
    assert!(told.contains("everything was undone"), "{told}");
    assert_eq!(sandbox.state(), before);
    assert!(sandbox.path("second").exists() && sandbox.path("predown").exists());
    assert!(!sandbox.path("fourth").exists());
    let called = sandbox.read("called");
    assert_eq!(
        called,
        "resolvconf -a tg0 -m 0 -x\nnameserver 10.9.0.1\nsearch lan\nresolvconf -d tg0 -f\n"
    );
}

/// The point at which the daemon runs: there are three for each step, and a hook comes before it.
const DAEMON_RUNS: u32 = 6;

#[test]
fn a_kill_at_any_step_leaves_what_down_undoes() {
    let Some(sandbox) = Sandbox::new("a_kill_at_any_step_leaves_what_down_undoes") else { return };
    sandbox.fake("resolvconf");
    sandbox.conf("tg0", EVERYTHING, "0.0.0.0/0, ::/0, 10.1.0.0/16");
    let before = sandbox.state();
    let mut killed = 0;
    for at in 1.. {
        let output = sandbox.sh(&format!("export TIDEGATE_TEST_STOP_AT={at}; exec {UP}"));
        if output.status.success() {
            break;
        }
        killed = at;
        sandbox.ok(&format!("test -e /run/tidegate/tg0.state; {DOWN}"));
        assert_eq!(sandbox.state(), before, "killed at {at}: {}", errors(&output));
        // Every fourth time the next `up` finds what is left; the daemon was killed, too.
        if at % 4 == 0 {
            sandbox.sh(&format!("export TIDEGATE_TEST_STOP_AT={at}; exec {UP}"));
            if at >= DAEMON_RUNS {
                assert!(sandbox.fails(5, UP).contains("the interface exists already"));
                sandbox.ok(KILL_DAEMON);
            }
            let output = sandbox.sh(UP);
            let told = errors(&output);
            assert!(output.status.success(), "killed at {at}: {told}");
            assert!(told.contains("undoing what a process that was killed has left"), "{told}");
            sandbox.ok(DOWN);
            assert_eq!(sandbox.state(), before, "killed at {at}, up again");
        }
    }
    assert!(killed > 3 * 16, "{killed}");
    sandbox.ok(DOWN);
    assert_eq!(sandbox.state(), before);
    let called = sandbox.read("called");
    assert!(called.matches("-d tg0").count() >= called.matches("-a tg0").count(), "{called}");
}

#[test]
fn a_daemon_that_was_killed_leaves_what_down_or_another_up_undoes() {
    let name = "a_daemon_that_was_killed_leaves_what_down_or_another_up_undoes";
    let Some(sandbox) = Sandbox::new(name) else { return };
    sandbox.conf("tg0", EVERYTHING.replace("DNS", "#").as_str(), "0.0.0.0/0, ::/0");
    sandbox.conf("tg1", "Address = 10.7.0.1/24", "10.7.0.2/32");
    let before = sandbox.state();
    sandbox.ok(&format!("{UP}; {KILL_DAEMON}"));
    assert_ne!(sandbox.state(), before);
    let told = errors(&sandbox.sh(DOWN));
    assert!(told.contains("tg0: undoing what a process that was killed has left"), "{told}");
    assert_eq!(sandbox.state(), before);

    sandbox.ok(&format!("{UP}; {KILL_DAEMON}"));
    let told = errors(&sandbox.sh("\"$TIDEGATE\" up $F/tg1.conf"));
    assert!(told.contains("tg0: undoing what a process that was killed has left"), "{told}");
    sandbox.ok("\"$TIDEGATE\" down $F/tg1.conf");
    assert_eq!(sandbox.state(), before);
}

#[test]
fn a_signal_undoes_what_was_begun() {
    let Some(sandbox) = Sandbox::new("a_signal_undoes_what_was_begun") else { return };
    let lines =
        "Address = 10.9.0.2/24\nPostUp = touch $F/waits; exec sleep 1000\nPostUp = touch $F/waited";
    sandbox.conf("tg0", lines, "0.0.0.0/0");
    let before = sandbox.state();
    let up = sandbox.command(&format!("exec {UP}")).spawn().unwrap();
    wait_until(|| sandbox.path("waits").exists());
    assert!(sandbox.fails(5, DOWN).contains("another `tidegate`"));
    sandbox.ok("pkill -TERM -o -x tidegate");
    let output = up.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = errors(&output);
    assert!(told.contains("tg0: interrupted; everything was undone"), "{told}");
    assert_eq!(sandbox.state(), before);
    assert!(!sandbox.path("waited").exists());
}

#[test]
fn name_servers_are_told_to_what_the_host_has() {
    let Some(sandbox) = Sandbox::new("name_servers_are_told_to_what_the_host_has") else { return };
    if ["resolvconf", "resolvectl"].into_iter().any(|name| lab::find_program(name).is_some()) {
        println!("SKIPPED name_servers_are_told_to_what_the_host_has: the host has a resolver");
        return;
    }
    sandbox.conf("tg0", "DNS = 10.9.0.1,fd09::1 lan\nDNS = 10.9.0.3, corp.example", "10.9.0.1/32");
    let told = errors(&sandbox.sh(&format!("{UP} && {DOWN}")));
    assert!(told.contains("name servers are not set") && told.contains("resolvconf"), "{told}");
    sandbox.fake("resolvectl");
    sandbox.ok(&format!("{UP}; {DOWN}"));
    let expected = "resolvectl dns tg0 10.9.0.1 fd09::1 10.9.0.3\n\
                    resolvectl domain tg0 lan corp.example ~.\n\
                    resolvectl default-route tg0 true\nresolvectl revert tg0\n";
    assert_eq!(sandbox.read("called"), expected);
    sandbox.fake("resolvconf");
    fs::remove_file(sandbox.path("called")).unwrap();
    sandbox.ok(&format!(
        "mkdir -p $F/etc/resolvconf; cp -r /etc/iproute2 $F/etc/ 2>/dev/null || true
         echo 'tun*' > $F/etc/resolvconf/interface-order
         unshare -m sh -c 'mount --bind $F/etc /etc && {} && {}'",
        UP.replace('"', ""),
        DOWN.replace('"', "")
    ));
    let expected = "resolvconf -a tun.tg0 -m 0 -x\nnameserver 10.9.0.1\nnameserver fd09::1\n\
                    nameserver 10.9.0.3\nsearch lan corp.example\nresolvconf -d tun.tg0 -f\n";
    assert_eq!(sandbox.read("called"), expected);
}

#[test]
fn tunnels_leave_each_others_rules_alone() {
    let Some(sandbox) = Sandbox::new("tunnels_leave_each_others_rules_alone") else { return };
    sandbox.conf("tg0", "Address = 10.9.0.2/24", "0.0.0.0/0");
    sandbox.conf("tg1", "Address = 10.8.0.2/24", "0.0.0.0/0");
    let before = sandbox.state();
    let of = |interface: &str| {
        let script = format!(
            "ip rule; iptables-save | grep -e '^-A' ; ip route show table all \
                              | grep {interface}; cat /proc/sys/net/ipv4/conf/all/src_valid_mark"
        );
        sandbox.ok(&script)
    };
    for (first, second) in [("tg0", "tg1"), ("tg1", "tg0")] {
        sandbox.ok("\"$TIDEGATE\" up $F/tg0.conf");
        let rules = sandbox.ok("ip rule");
        assert!(rules.contains("lookup 51820"), "{rules}");
        sandbox.ok("\"$TIDEGATE\" up $F/tg1.conf");
        let rules = sandbox.ok("ip rule");
        assert!(rules.contains("lookup 51820") && rules.contains("lookup 51821"), "{rules}");
        assert_eq!(rules.matches("suppress_prefixlength 0").count(), 2);
        let filters = sandbox.ok(&format!("iptables-save | grep {second}"));
        sandbox.ok(&format!("\"$TIDEGATE\" down {first}"));
        let left = of(second);
        assert_eq!(left.matches("suppress_prefixlength 0").count(), 1, "{left}");
        assert!(left.contains(&filters) && !left.contains(first), "{left}");
        assert!(left.ends_with("\n1\n"), "src_valid_mark stays: {left}");
        sandbox.ok(&format!("\"$TIDEGATE\" down {second}"));
        assert_eq!(sandbox.state(), before);
    }
}

#[test]
fn xdp_does_not_go_round_the_firewall_unasked() {
    let Some(sandbox) = Sandbox::new("xdp_does_not_go_round_the_firewall_unasked") else { return };
    let xdp = |line: &str| format!("unset TIDEGATE_MODE; {line}");
    sandbox.conf("tg0", "ListenPort = 51820\n#! Xdp = outer", "10.9.0.1/32");
    sandbox.ok("iptables -A INPUT -p tcp --dport 22 -j DROP");
    sandbox.ok(&xdp(&format!("{UP}; {DOWN}")));
    let refused = |told: String, rule: &str| {
        assert!(told.contains("XDP on outer would go round a rule of the firewall"), "{told}");
        assert!(told.contains(rule) && told.contains("bypass-firewall"), "{told}");
    };
    sandbox.ok("iptables -A INPUT -p udp -m limit --limit 5/sec -j ACCEPT; iptables -P INPUT DROP");
    let before = sandbox.state();
    refused(sandbox.fails(1, &xdp(UP)), "iptables-save: `policy drop of chain INPUT");
    assert_eq!(sandbox.state(), before, "nothing was begun");
    // Sockets are not concerned.
    sandbox.ok(&format!("{UP}; {DOWN}"));
    sandbox.ok("iptables -I INPUT -p udp --dport 51820 -j ACCEPT");
    sandbox.ok(&xdp(&format!("{UP}; {DOWN}")));
    sandbox.ok("ip6tables -A INPUT -p udp --dport 51000:52000 -j REJECT");
    let rule = "ip6tables-save: `-A INPUT -p udp -m udp --dport 51000:52000 -j REJECT";
    refused(sandbox.fails(1, &xdp(UP)), rule);
    sandbox.ok(&xdp(&format!("{UP} --bypass-firewall; {DOWN}")));
    sandbox.conf("tg0", "ListenPort = 51820\n#! Xdp = outer bypass-firewall", "10.9.0.1/32");
    sandbox.ok(&xdp(&format!("{UP}; {DOWN}")));
}

#[test]
fn a_dry_run_shows_the_steps_and_does_none() {
    let Some(sandbox) = Sandbox::new("a_dry_run_shows_the_steps_and_does_none") else { return };
    sandbox.fake("resolvconf");
    sandbox.conf("tg0", EVERYTHING, "0.0.0.0/0, 10.9.0.0/28, 10.1.0.0/16");
    let before = sandbox.state();
    let shown = sandbox.ok(&format!("{UP} --dry-run"));
    let expected = "\
        [#] iptables -A FORWARD -o tg0 -j ACCEPT\n\
        [#] tidegate run tg0\n\
        [#] wg setconf tg0 /dev/fd/63\n\
        [#] ip -4 address add 10.9.0.2/24 dev tg0\n\
        [#] ip -6 address add fd09::2/64 dev tg0\n\
        [#] ip link set mtu 1420 dev tg0\n\
        [#] ip link set up dev tg0\n\
        [#] resolvconf -a tg0 -m 0 -x\n\
        [#] ip -4 route add 10.1.0.0/16 dev tg0\n\
        [#] wg set tg0 fwmark 51820\n\
        [#] ip -4 route add 0.0.0.0/0 dev tg0 table 51820\n\
        [#] sysctl -q net.ipv4.conf.all.src_valid_mark=1\n\
        [#] ip -4 rule add not fwmark 51820 table 51820\n\
        [#] ip -4 rule add table main suppress_prefixlength 0\n\
        [#] iptables-restore -n\n\
        [#] iptables -A FORWARD -i tg0 -j ACCEPT\n";
    assert_eq!(shown, expected);
    assert_eq!(sandbox.state(), before);
    assert_eq!(sandbox.read("called"), "");
    // What `#!` lines were understood to say comes first.
    sandbox.conf("tg0", "#!workers=1 # one", "10.1.0.0/16\n#! name =  a laptop");
    let shown = sandbox.ok(&format!("{UP} --dry-run"));
    let mut lines = shown.lines();
    assert_eq!(lines.next(), Some("#! Workers = 1"));
    let of_peer = lines.next().unwrap();
    assert!(of_peer.starts_with("#! Name = a laptop, of peer "), "{shown}");
    assert_eq!(lines.next(), Some("[#] tidegate run tg0"));
}

#[test]
fn the_interface_stays_when_a_predown_fails() {
    let Some(sandbox) = Sandbox::new("the_interface_stays_when_a_predown_fails") else { return };
    let lines = "Address = 10.9.0.2/24\nPreDown = test -e $F/may\nPostDown = false\nPostDown = touch $F/last";
    sandbox.conf("tg0", lines, "10.9.0.1/32");
    let before = sandbox.state();
    sandbox.ok(UP);
    let up = sandbox.state();
    let told = sandbox.fails(1, DOWN);
    assert!(told.contains("tg0.conf:4: PreDown ended with exit code 1"), "{told}");
    assert_eq!(sandbox.state(), up);
    assert!(sandbox.fails(5, UP).contains("the interface exists already"));
    sandbox.ok("touch $F/may");
    let told = sandbox.fails(1, DOWN);
    assert!(told.contains("tg0.conf:5: PostDown ended with exit code 1"), "{told}");
    assert_eq!(sandbox.state(), before);
    assert!(sandbox.path("last").exists());
}

#[test]
fn in_the_foreground_it_stays_and_undoes_everything_at_its_end() {
    let name = "in_the_foreground_it_stays_and_undoes_everything_at_its_end";
    let Some(sandbox) = Sandbox::new(name) else { return };
    sandbox.conf(
        "tg0",
        "Address = 10.9.0.2/24\nPostUp = touch $F/up\nPostDown = rm $F/up",
        "0.0.0.0/0",
    );
    let before = sandbox.state();
    for (end, code) in [
        ("pkill -TERM -o -x tidegate", 0),
        ("\"$TIDEGATE\" down tg0", 0),
        ("pkill -KILL -n -x tidegate; true", 1),
    ] {
        let up = sandbox.command(&format!("exec {UP} -f")).spawn().unwrap();
        wait_until(|| sandbox.path("up").exists());
        wait_until(|| sandbox.ok("grep -c '\"up\"' /run/tidegate/tg0.state || true").trim() == "1");
        sandbox.ok(end);
        let output = up.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{end}: {}", errors(&output));
        assert_eq!(sandbox.state(), before, "{end}");
        assert!(!sandbox.path("up").exists());
    }
}
