//! Namespaces in which `up` and `down` have a host for themselves.
//!
//! ```text
//!  far  198.51.100.2 ──────── outer 198.51.100.1   (default route by 198.51.100.2)
//!       2001:db8:51::2              2001:db8:51::1
//! ```
//!
//! Both ends are in one network namespace, which has `/run` and its processes for itself: all of it
//! goes with its first process.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use xtask::lab;

pub const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");
pub const LIMIT: Duration = Duration::from_secs(20);

const KEYS: &str = "PrivateKey = IBwCMKG0IAvhlcZPDahVK2eDM/zI9yt7lBt7QJh8l1E=\n";
const PEER: &str = "[Peer]\nPublicKey = Dxb2eCff3wMzKu1p6E3nSAuuVwHtZ+tfrfHK1wXNl00=\n\
                    Endpoint = 198.51.100.2:51820\n";

/// The first process of the namespaces: reaps what has lost its parent.
const INIT: &str =
    "mount -t tmpfs tidegate-test /run; touch /run/ready; while :; do sleep 1000; done";

/// A network, mount and pid namespace.
pub struct Sandbox {
    holder: Child,
    init: Pid,
    folder: tempfile::TempDir,
}

impl Sandbox {
    /// Makes one, or says why not.
    pub fn new(test: &str) -> Option<Sandbox> {
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
        // What it does is looked at in `firewall`.
        sandbox.ok(lab::HIDE_NFT);
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
    pub fn command(&self, script: &str) -> Command {
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

    pub fn sh(&self, script: &str) -> Output {
        self.command(script).output().unwrap()
    }

    /// Runs a script that must succeed; gives what it prints.
    pub fn ok(&self, script: &str) -> String {
        let output = self.sh(&format!("set -e; {script}"));
        assert!(output.status.success(), "{script}: {}", errors(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a script that must end with this code; gives its errors.
    pub fn fails(&self, code: i32, script: &str) -> String {
        let output = self.sh(script);
        assert_eq!(output.status.code(), Some(code), "{script}: {}", errors(&output));
        errors(&output)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes `NAME.conf`: keys, `lines`, and a peer with these allowed IPs.
    pub fn conf(&self, name: &str, lines: &str, allowed_ips: &str) {
        let text = format!("[Interface]\n{KEYS}{lines}\n{PEER}AllowedIPs = {allowed_ips}\n");
        let path = self.path(&format!("{name}.conf"));
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// Puts a program on the PATH that writes down how it is called, and what it reads.
    pub fn fake(&self, name: &str) {
        fs::create_dir_all(self.path("bin")).unwrap();
        let path = self.path("bin").join(name);
        let log = self.path("called");
        let script = format!("#!/bin/sh\n{{ echo {name} \"$@\"; cat; }} >> {}\n", log.display());
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A file in the folder; nothing if there is none.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Everything that `up` may change. Mounts of namespaces are those of other tests.
    pub fn state(&self) -> String {
        self.ok("ip -o link | sed 's/qlen.*//'; ip -o addr; ip -4 rule; ip -6 rule
             ip -4 route show table all; ip -6 route show table all
             for save in iptables-save ip6tables-save; do
                 $save | sed 's/ \\[.*//' | grep -E '^-A|^:.* DROP' || true
             done
             cat /proc/sys/net/ipv4/conf/all/src_valid_mark; grep -v netns /proc/mounts
             find /run/tidegate /run/wireguard -type f -o -type s || true
             # Those of a port that it has left are closed a moment later.
             port=$(wg show tg0 listen-port 2>/dev/null) && port=$(printf :%04X \"$port\") || port=
             cat /proc/net/udp /proc/net/udp6 | grep -c \"$port \"; pgrep -l tidegate || true")
    }

    /// What decides where packets go: rules, routes, filters; the same whoever made it.
    pub fn routing(&self) -> String {
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

pub fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub const UP: &str = "\"$TIDEGATE\" up $F/tg0.conf";
pub const DOWN: &str = "\"$TIDEGATE\" down $F/tg0.conf";

/// Kills the daemon and waits until its device and both its processes are gone.
pub const KILL_DAEMON: &str = "pkill -KILL -x tidegate; while ip link show tg0 2>/dev/null || \
    ps -C tidegate,tidegate-data -o state= | grep -qv Z; do sleep 0.05; done";

pub fn wait_until(mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < end, "it does not come about");
        std::thread::sleep(Duration::from_millis(20));
    }
}
