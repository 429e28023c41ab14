//! The real wg-quick(8) with `tidegated` as its userspace implementation, in a network namespace with
//! an /etc/wireguard and a /run of its own.
//!
//! ```text
//!  client                         gateway                          host
//!  outer 198.51.100.2 ─────────── outer 198.51.100.1
//!                                 lan   192.168.20.1 ───────────── lan 192.168.20.2
//!  wg-quick, tidegated ══════════ daemon (udp)                      or the other way round
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use common::{Daemon, LIMIT, UDP, assert_answered, tidegate};
use wg_userspace::sys::netns::report_skipped;
use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER},
    lab::{self, HOST_V4, HOST_V6, Lab, OUTER, Process, Space, find_program},
};

/// The namespaces, unless the test must be skipped.
fn lab(test: &str, programs: &[&str]) -> Option<Lab> {
    let missing = programs.iter().find(|program| find_program(program).is_none());
    let kernel = Path::new("/sys/module/wireguard").exists();
    let reason = lab::unavailable()
        .or_else(|| missing.map(|program| format!("needs the program `{program}`")))
        .or_else(|| kernel.then(|| "the kernel has WireGuard, and wg-quick prefers it".to_owned()));
    if let Some(reason) = reason {
        report_skipped(test, &reason);
        return None;
    }
    Some(Lab::new().unwrap())
}

const TOOLS: &[&str] = &["wg", "wg-quick", "bash", "unshare", "nsenter"];

/// A host as wg-quick sees it: a namespace, and mounts that nobody else has.
struct Host<'a> {
    space: &'a Space,
    /// Keeps the mounts; whoever is to see them joins it.
    holder: Process,
    etc: PathBuf,
    path: String,
    name: String,
}

impl<'a> Host<'a> {
    fn new(lab: &'a Lab, space: &'a Space, name: String) -> Self {
        let etc = lab.path("etc-wireguard");
        let bin = lab.path("bin");
        for folder in [&etc, &bin] {
            fs::create_dir(folder).unwrap();
        }
        symlink(tidegate(), bin.join("tidegated")).unwrap();
        let script = format!(
            "exec 3<'{}' && mount -t tmpfs none /run && mkdir -m 755 /run/wireguard && \
             mount --bind /proc/self/fd/3 /etc/wireguard && echo ready && exec sleep 600",
            etc.display()
        );
        let mut command = space.command("unshare");
        command.args(["--mount", "sh", "-c", &script]);
        let holder = space.spawn("mounts", &mut command).unwrap();
        lab::wait_for("the mounts", LIMIT, || Ok((holder.output() == "ready\n").then_some(())))
            .unwrap_or_else(|error| panic!("{error:#}: {}", holder.errors()));
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
        Self { space, holder, etc, path, name }
    }

    /// Writes the interface's file.
    fn write(&self, conf: &str, mode: u32) {
        let file = self.file();
        fs::write(&file, conf).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn file(&self) -> PathBuf {
        self.etc.join(format!("{}.conf", self.name))
    }

    /// Runs a line of bash there, with `$IF` as the interface; what it prints, and its errors.
    fn try_bash(&self, line: &str) -> Result<(String, String), String> {
        let mut command = self.space.command("nsenter");
        let holder = self.holder.pid().to_string();
        command.args(["--mount", "--target", &holder, "bash", "-o", "pipefail", "-c", line]);
        command.env("PATH", &self.path).env("IF", &self.name);
        command.env("WG_QUICK_USERSPACE_IMPLEMENTATION", "tidegated");
        let mut process = self.space.spawn("bash", &mut command).unwrap();
        let status = process.wait(LIMIT * 3).unwrap();
        let (output, errors) = (process.output(), process.errors());
        if status.success() { Ok((output, errors)) } else { Err(format!("{output}{errors}")) }
    }

    fn bash(&self, line: &str) -> String {
        self.try_bash(line).unwrap_or_else(|text| panic!("{line}: {text}")).0
    }

    /// The processes of the daemon, by the name of its program and its interface.
    fn daemons(&self) -> Vec<String> {
        let pids = self.space.run("ip", &["netns", "pids", self.space.name()]).unwrap();
        let of_daemon = |pid: &&str| {
            let read = |what| fs::read_to_string(format!("/proc/{pid}/{what}")).unwrap_or_default();
            read("comm").starts_with("tidegate") && !read("cmdline").is_empty()
        };
        pids.lines().filter(of_daemon).map(str::to_owned).collect()
    }

    /// Waits until nothing of the daemon is left.
    fn is_clean(&self) {
        lab::wait_for("the daemon's end", LIMIT, || Ok(self.daemons().is_empty().then_some(())))
            .unwrap();
        assert!(!self.space.has_interface(&self.name), "its interface is left");
        assert_eq!(self.bash("ls /run/wireguard"), "", "its socket is left");
    }
}

/// `conf` with these lines at the end of its `[Interface]`.
fn with_lines(conf: &str, lines: &str) -> String {
    let (interface, peers) = conf.split_once("[Peer]").unwrap();
    format!("{interface}{lines}\n[Peer]{peers}")
}

#[test]
fn wg_quick_brings_a_gateway_up_and_down() {
    let Some(lab) = lab("wg_quick_brings_a_gateway_up_and_down", TOOLS) else { return };
    let host = Host::new(&lab, &lab.gateway, lab.interface('q'));
    host.write(
        &with_lines(GATEWAY_CONF, "MTU = 1400\nPostUp = ip link show %i >/dev/null\n"),
        0o600,
    );
    // TUN and socket are there as soon as the daemon's first process has ended, with no wait.
    let (_, said) = host
        .try_bash(
            "tidegated $IF && ip link show $IF >/dev/null && test -S /run/wireguard/$IF.sock && \
             test $(stat -c %a:%u /run/wireguard/$IF.sock) = 600:0 && wg show $IF >/dev/null && \
             ip link delete $IF",
        )
        .unwrap();
    assert_eq!(said, "", "it is started and stopped in silence");
    host.is_clean();

    host.bash("wg-quick up $IF");
    assert!(!host.daemons().is_empty());
    let client = Daemon::start(&lab.client, &lab.interface('c'), UDP);
    client.configure(&lab, CLIENT_CONF);
    assert_answered(&lab.client, &[GATEWAY_INNER[0], GATEWAY_INNER[1], HOST_V4, HOST_V6]);
    assert!(host.bash("ip link show $IF").contains("mtu 1400"));
    assert!(host.try_bash("wg-quick up $IF").unwrap_err().contains("already exists"));
    assert!(host.try_bash("tidegated $IF").is_err(), "the interface is there");

    let handshake = "wg show $IF latest-handshakes";
    let before = host.bash(handshake);
    assert!(!before.ends_with("\t0\n"), "{before}");
    host.bash("wg syncconf $IF <(wg-quick strip $IF)");
    let stripped = host.bash("wg-quick strip $IF");
    assert!(stripped.contains("#! Name = client") && !stripped.contains("MTU"), "{stripped}");
    assert_eq!(host.bash(handshake), before);
    assert_answered(&lab.client, &[GATEWAY_INNER[0]]);

    host.bash("wg-quick save $IF");
    let saved = fs::read_to_string(host.file()).unwrap();
    for line in ["MTU = 1400", "ListenPort = 51820", "PostUp = ip link", "AllowedIPs = 10.9.0.2/32"]
    {
        assert!(saved.contains(line), "{line} in {saved}");
    }
    assert!(!saved.contains("fe80"), "our TUN has no address that nobody gave it: {saved}");

    host.bash("wg-quick down $IF");
    host.is_clean();
    // What it saved brings it up again, and it knows where the client was.
    host.bash("wg-quick up $IF");
    assert_answered(&lab.gateway, &["10.9.0.2"]);
    assert_answered(&lab.client, &[GATEWAY_INNER[0]]);
    host.bash("wg-quick down $IF");
    host.is_clean();
}

#[test]
fn a_hook_that_fails_leaves_nothing() {
    let Some(lab) = lab("a_hook_that_fails_leaves_nothing", TOOLS) else { return };
    let host = Host::new(&lab, &lab.gateway, lab.interface('q'));
    host.write(&with_lines(GATEWAY_CONF, "PostUp = false\n"), 0o600);
    host.try_bash("wg-quick up $IF").unwrap_err();
    host.is_clean();
}

#[test]
fn a_default_route_goes_through_the_tunnel_and_not_round_in_it() {
    const TEST: &str = "a_default_route_goes_through_the_tunnel_and_not_round_in_it";
    let tools = [TOOLS, &["iptables-restore", "ip6tables-restore", "sysctl"]].concat();
    let Some(lab) = lab(TEST, &tools) else { return };
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    gateway.configure(&lab, GATEWAY_CONF);
    let host = Host::new(&lab, &lab.client, lab.interface('q'));
    if find_program("nft").is_none()
        && let Err(why) = host.try_bash(
            "echo $'*raw\\n-A PREROUTING -m addrtype ! --src-type LOCAL -j ACCEPT\\nCOMMIT\\n*mangle\\n\
             -A PREROUTING -p udp -j CONNMARK --restore-mark\\nCOMMIT' | \
             tee >(ip6tables-restore -t) | iptables-restore -t",
        )
    {
        return report_skipped(TEST, &format!("iptables cannot do what wg-quick asks for: {why}"));
    }
    // Link-local addresses of the other links come when they like.
    let state = "{ ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; } | \
                 grep -v -e fe80:: -e ff00::; \
                 iptables-save | grep wg-quick; ip6tables-save | grep wg-quick; \
                 command -v nft > /dev/null && nft list tables | grep wg-quick; true";
    let before = host.bash(state);
    let conf: String = CLIENT_CONF
        .lines()
        .map(
            |line| {
                if line.starts_with("AllowedIPs") { "AllowedIPs = 0.0.0.0/0, ::/0" } else { line }
            },
        )
        .map(|line| format!("{line}\n"))
        .collect();
    host.write(&conf, 0o600);
    host.bash("wg-quick up $IF");
    assert_eq!(host.bash("wg show $IF fwmark"), "0xca6c\n");
    assert!(host.bash("ip rule").contains("not from all fwmark 0xca6c lookup 51820"));
    // What has no other route goes through the tunnel, and what carries it does not.
    assert_answered(&lab.client, &[HOST_V4, HOST_V6, GATEWAY_INNER[0], GATEWAY_INNER[1]]);
    let (_, inner) = lab.client.packets(&host.name).unwrap();
    assert!(inner < 200, "{inner} packets: they go round");

    // A changed port opens new sockets; they have the mark as well.
    host.bash("wg set $IF listen-port 51899");
    assert_answered(&lab.client, &[HOST_V4]);

    // wg(8) says of a file without FwMark that there is none, and is obeyed.
    host.bash("wg syncconf $IF <(wg-quick strip $IF)");
    assert_eq!(host.bash("wg show $IF fwmark"), "off\n");
    host.bash("wg set $IF fwmark 51820");
    assert_answered(&lab.client, &[HOST_V4]);

    host.bash("wg-quick down $IF");
    host.is_clean();
    assert_eq!(host.bash(state), before, "nothing is left");
}

#[test]
fn directives_of_the_file_are_followed_unless_somebody_says_otherwise() {
    const TEST: &str = "directives_of_the_file_are_followed_unless_somebody_says_otherwise";
    let Some(lab) = lab(TEST, TOOLS) else { return };
    let host = Host::new(&lab, &lab.gateway, lab.interface('q'));
    let up = |line: &str| -> (serde_json::Value, String) {
        let line =
            format!("{line} && {} show $IF --json && ip link delete $IF", tidegate().display());
        let (json, said) = host.try_bash(&line).unwrap();
        host.is_clean();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        (json["interfaces"][0]["data_path"].clone(), said)
    };
    let directives = format!("#! Xdp = {OUTER} mode=udp\n#! Workers = 2\n");
    host.write(&with_lines(GATEWAY_CONF, &directives), 0o600);
    for (line, worker_count) in [
        ("tidegated $IF", 2),
        ("TIDEGATE_WORKERS=3 tidegated $IF", 3),
        ("TIDEGATE_WORKERS=3 tidegated --workers 1 $IF", 1),
    ] {
        let (data_path, said) = up(line);
        assert_eq!(data_path["workers"], worker_count, "{line}");
        assert_eq!(
            (data_path["reason"].as_str(), said.as_str()),
            (Some("asked for"), ""),
            "{line}"
        );
    }
    let (data_path, _) = up("TIDEGATE_MODE=auto TIDEGATE_XDP= tidegated $IF");
    assert_eq!(data_path["reason"], "no NIC was named for XDP");

    // Nothing in the file keeps the daemon from starting.
    host.write("#! Workers = 2\n[Interface]\n#! Workers = many\nnonsense\n", 0o600);
    let (_, said) = up("tidegated --mode udp $IF");
    let at = |position: &str| format!("/etc/wireguard/{}.conf:{position}: ", host.name);
    assert!(said.contains(&at("1:4")) && said.contains(&at("3:14")), "{said}");
    host.write(&with_lines(GATEWAY_CONF, &directives), 0o602);
    let (data_path, said) = up("TIDEGATE_WORKERS=1 tidegated $IF");
    assert!(said.contains("chmod go-w"), "{said}");
    assert_eq!(data_path["reason"], "no NIC was named for XDP");
    fs::remove_file(host.file()).unwrap();
    assert_eq!(up("tidegated --mode udp $IF").1, "");
}
