//! `up` and `down` as their users meet them, compared with wg-quick(8), and killed on their way.
//!
//! ```text
//!  far  198.51.100.2 ──────── outer 198.51.100.1   (default route by 198.51.100.2)
//!       2001:db8:51::2              2001:db8:51::1
//! ```
//!
//! Both ends are in one network namespace, which has `/run` and its processes for itself: all of it
//! goes with its first process.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use xtask::lab;

const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");
const LIMIT: Duration = Duration::from_secs(20);

const KEYS: &str = "PrivateKey = IBwCMKG0IAvhlcZPDahVK2eDM/zI9yt7lBt7QJh8l1E=\n";
const PEER: &str = "[Peer]\nPublicKey = Dxb2eCff3wMzKu1p6E3nSAuuVwHtZ+tfrfHK1wXNl00=\n\
                    Endpoint = 198.51.100.2:51820\n";

/// The first process of the namespaces: reaps what has lost its parent.
const INIT: &str =
    "mount -t tmpfs tidegate-test /run; touch /run/ready; while :; do sleep 1000; done";

/// A network, mount and pid namespace.
struct Sandbox {
    holder: Child,
    init: Pid,
    folder: tempfile::TempDir,
}

impl Sandbox {
    /// Makes one, or says why not.
    fn new(test: &str) -> Option<Sandbox> {
        let missing = lab::unavailable().or_else(|| {
            let programs = ["wg", "iptables", "ip6tables", "unshare", "nsenter"];
            let missing = programs.into_iter().find(|name| lab::find_program(name).is_none())?;
            Some(format!("needs the program `{missing}`"))
        });
        if let Some(missing) = missing {
            println!("SKIPPED {test}: {missing}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        unshare.args(["sh", "-c", INIT]);
        let holder = unshare.stdin(Stdio::null()).process_group(0).spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", holder.id());
        let is_ready = |pid: i32| Path::new(&format!("/proc/{pid}/root/run/ready")).exists();
        let init = lab::wait_for("the namespaces", LIMIT, || {
            let pid = fs::read_to_string(&children)?.trim().parse().ok();
            Ok(pid.filter(|&pid| is_ready(pid)).and_then(Pid::from_raw))
        });
        let sandbox = Sandbox { holder, init: init.unwrap(), folder };
        sandbox.ok("ip link set lo up
             ip link add outer type veth peer name far
             for link in outer far; do ip link set $link addrgenmode none up; done
             ip addr add 198.51.100.1/24 dev outer
             ip addr add 2001:db8:51::1/64 dev outer nodad
             ip route add default via 198.51.100.2
             ip -6 route add default via 2001:db8:51::2
             for table in raw mangle filter; do
                 iptables -t $table -S; ip6tables -t $table -S
             done");
        Some(sandbox)
    }

    /// A shell that will run a script inside. `$TIDEGATE` is the program, without XDP.
    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init.as_raw_nonzero().to_string(), "-n", "-m", "-p", "--"]);
        command.args(["bash", "-c", script]);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}:/usr/sbin:/sbin", self.path("bin").display()));
        command.env("TIDEGATE", TIDEGATE).env("TIDEGATE_MODE", "udp");
        command.env("TIDEGATE_WORKERS", "1").env("F", self.folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn sh(&self, script: &str) -> Output {
        self.command(script).output().unwrap()
    }

    /// Runs a script that must succeed; gives what it prints.
    fn ok(&self, script: &str) -> String {
        let output = self.sh(&format!("set -e; {script}"));
        assert!(output.status.success(), "{script}: {}", errors(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a script that must end with this code; gives its errors.
    fn fails(&self, code: i32, script: &str) -> String {
        let output = self.sh(script);
        assert_eq!(output.status.code(), Some(code), "{script}: {}", errors(&output));
        errors(&output)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes `NAME.conf`: keys, `lines`, and a peer with these allowed IPs.
    fn conf(&self, name: &str, lines: &str, allowed_ips: &str) {
        let text = format!("[Interface]\n{KEYS}{lines}\n{PEER}AllowedIPs = {allowed_ips}\n");
        let path = self.path(&format!("{name}.conf"));
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// Puts a program on the PATH that writes down how it is called, and what it reads.
    fn fake(&self, name: &str) {
        fs::create_dir_all(self.path("bin")).unwrap();
        let path = self.path("bin").join(name);
        let log = self.path("called");
        let script = format!("#!/bin/sh\n{{ echo {name} \"$@\"; cat; }} >> {}\n", log.display());
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A file in the folder; nothing if there is none.
    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Everything that `up` may change.
    fn state(&self) -> String {
        self.ok("ip -o link | sed 's/qlen.*//'; ip -o addr; ip -4 rule; ip -6 rule
             ip -4 route show table all; ip -6 route show table all
             for save in iptables-save ip6tables-save; do
                 $save | sed 's/ \\[.*//' | grep -E '^-A|^:.* DROP' || true
             done
             cat /proc/sys/net/ipv4/conf/all/src_valid_mark /proc/mounts
             find /run/tidegate /run/wireguard -type f -o -type s || true
             cat /proc/net/udp /proc/net/udp6 | wc -l; pgrep -l tidegate || true")
    }

    /// What decides where packets go: rules, routes, filters; the same whoever made it.
    fn routing(&self) -> String {
        let text = self.ok(
            "ip -d -4 rule; ip -d -6 rule
             { ip -4 route show table all; ip -6 route show table all; } | sort
             { iptables-save; ip6tables-save; } | grep '^-A' || true
             ip -o link show dev tg0 | sed 's/.*mtu \\([0-9]*\\).*/mtu \\1/'
             ip -o addr show dev tg0 scope global | sed 's/valid_lft.*//; s/tentative//; s/^[0-9]*//'
             wg show tg0 fwmark; wg show tg0 allowed-ips
             cat /proc/sys/net/ipv4/conf/all/src_valid_mark",
        );
        let without_own_names =
            text.replace("wg-quick(8) rule", "rule").replace("tidegate rule", "rule");
        // The kernel's own address of a TUN device is another one each time.
        without_own_names
            .split_inclusive([' ', '/', '\n'])
            .map(
                |word| if word.starts_with("fe80::") && word.len() > 7 { "fe80::x " } else { word },
            )
            .collect()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // The first process of the namespace takes all others with it.
        let _ = kill_process(self.init, Signal::KILL);
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const UP: &str = "\"$TIDEGATE\" up $F/tg0.conf";
const DOWN: &str = "\"$TIDEGATE\" down $F/tg0.conf";

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

/// Kills the daemon and waits until its device and both its processes are gone.
const KILL_DAEMON: &str = "pkill -KILL -x tidegate; while ip link show tg0 2>/dev/null || \
    ps -C tidegate,tidegate-data -o state= | grep -qv Z; do sleep 0.05; done";

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
    assert!(sandbox.fails(1, DOWN).contains("another `tidegate`"));
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

fn wait_until(mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < end, "it does not come about");
        std::thread::sleep(Duration::from_millis(20));
    }
}
