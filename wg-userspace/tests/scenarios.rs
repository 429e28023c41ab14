//! What people use such tunnels for, from the files of `examples/` as they are: by `tidegate up`, and by
//! the real wg-quick(8) with `tidegated`. What is shown is what `cargo xtask run --scenario …` shows, and
//! the topologies are drawn in `xtask/src/scenarios.rs`:
//!
//! ```text
//!  bridge    laptop ══ server1              jumpbox   laptop ══ jumpbox ── vlan
//!  gateway   laptop ══ internet ══ gateway  mesh      server1, server2, server3 at a switch
//!                       └── web
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{fmt::Write as _, path::Path, process::Command};

use common::{assert_answered, tidegate};
use xtask::{
    demonstration::{Mode, Options, Programs, Tools},
    lab::{self, Site, find_program},
    scenarios::{Amount, By, Nat, Scenario, Tunnel, show, state},
};

/// Whether a test must be skipped; says so and why.
fn skips(test: &str, by: &[By]) -> bool {
    let program =
        |name: &str| find_program(name).is_none().then(|| format!("needs the program `{name}`"));
    let folder = || {
        let exists = Path::new("/etc/wireguard").is_dir();
        (!exists).then(|| "needs the folder /etc/wireguard, which wireguard-tools have".to_owned())
    };
    let reason = lab::unavailable()
        .or_else(folder)
        .or_else(|| program("nsenter"))
        .or_else(|| program("iptables"))
        .or_else(|| by.contains(&By::WireguardGo).then(|| program("wireguard-go")).flatten())
        .or_else(|| by.iter().any(|&by| by != By::Tidegate).then(|| program("wg-quick")).flatten());
    if let Some(reason) = &reason {
        eprintln!("SKIPPED {test}: {reason}");
    }
    reason.is_some()
}

fn programs() -> Programs {
    Programs::in_folder(tidegate().parent().unwrap()).unwrap()
}

/// The whole of it: what must be reached, by which source, what must not, and that nothing is left.
fn as_run(test: &str, scenario: Scenario, by: By, mode: Mode, nat: Nat) {
    if skips(test, &[by]) {
        return;
    }
    let ends = vec![by; scenario.files().len()];
    as_run_by(scenario, &ends, mode, nat);
}

fn as_run_by(scenario: Scenario, ends: &[By], mode: Mode, nat: Nat) {
    let programs = programs();
    let options = Options {
        programs: tidegate().parent().unwrap().to_owned(),
        mode,
        report: None,
        keep: false,
        rootless: false,
        lifeline: false,
    };
    let amount = Amount { file_len: 1 << 20, load: None };
    let report = show(scenario, &programs, ends, &options, nat, amount).unwrap();
    println!("{}", report.table());
    assert_eq!(report.exit_code, 0, "{report:#?}");
    for seen in &report.ways {
        assert_eq!(seen.answered, seen.sent, "{seen:?}");
        assert_eq!(seen.transfers.len(), 2, "{seen:?}");
        assert_eq!(seen.seen_as, Some(seen.expected), "{seen:?}");
    }
    for version in [4, 6] {
        let of_version = |address: &std::net::IpAddr| address.is_ipv4() == (version == 4);
        assert!(report.ways.iter().any(|seen| of_version(&seen.address)), "no IPv{version}");
    }
}

/// The tests of a scenario: by `tidegate up` with XDP and without, and by wg-quick.
macro_rules! tests {
    ($scenario:ident: $native:ident, $udp:ident, $wg_quick:ident) => {
        tests!($scenario by Iptables: $native, $udp, $wg_quick);
    };
    ($scenario:ident by $nat:ident: $native:ident, $udp:ident, $wg_quick:ident) => {
        tests!($native, $scenario, By::Tidegate, Mode::Native, Nat::$nat);
        tests!($udp, $scenario, By::Tidegate, Mode::Udp, Nat::$nat);
        tests!($wg_quick, $scenario, By::WgQuick, Mode::Auto, Nat::$nat);
    };
    ($name:ident, $scenario:ident, $by:expr, $mode:expr, $nat:expr) => {
        #[test]
        fn $name() {
            as_run(stringify!($name), Scenario::$scenario, $by, $mode, $nat);
        }
    };
}

tests!(Bridge: bridge_by_tidegate_up, bridge_by_tidegate_up_with_sockets, bridge_by_wg_quick);
tests!(Gateway: gateway_by_tidegate_up, gateway_by_tidegate_up_with_sockets, gateway_by_wg_quick);
tests!(Jumpbox: jumpbox_by_tidegate_up, jumpbox_by_tidegate_up_with_sockets, jumpbox_by_wg_quick);
tests!(Gateway by Bpf: gateway_that_translates_by_bpf, gateway_that_translates_by_bpf_with_sockets, gateway_that_translates_by_bpf_by_wg_quick);
tests!(Jumpbox by Bpf: jumpbox_that_translates_by_bpf, jumpbox_that_translates_by_bpf_with_sockets, jumpbox_that_translates_by_bpf_by_wg_quick);
tests!(Mesh: mesh_by_tidegate_up, mesh_by_tidegate_up_with_sockets, mesh_by_wg_quick);

#[test]
fn bridge_to_a_laptop_with_wireguard_go() {
    if skips("bridge_to_a_laptop_with_wireguard_go", &[By::WireguardGo]) {
        return;
    }
    as_run_by(Scenario::Bridge, &[By::Tidegate, By::WireguardGo], Mode::Native, Nat::Iptables);
}

/// The ends of a scenario, with a change to their files.
fn ends<'a>(
    site: &'a Site,
    programs: &'a Programs,
    scenario: Scenario,
    by: By,
    change: impl Fn(&str) -> String,
) -> Vec<Tunnel<'a>> {
    let end = |(host, conf): &(&'static str, &str)| {
        Tunnel::new(site, programs, host, &change(conf), by).unwrap()
    };
    scenario.files().iter().map(end).collect()
}

/// What the gateway is there for: the same tunnels, but without its hooks.
fn without_its_hooks(test: &str, by: By) {
    if skips(test, &[by]) {
        return;
    }
    let (site, programs) = (Site::new(Scenario::Gateway.layout()).unwrap(), programs());
    let without_hooks = |conf: &str| {
        let lines = conf.lines().filter(|line| !line.starts_with("Post"));
        lines.map(|line| format!("{line}\n")).collect()
    };
    let laptop = site.space("laptop");
    let web = ["203.0.113.10", "2001:db8:113::10"];
    assert_answered(laptop, &web);
    for end in ends(&site, &programs, Scenario::Gateway, by, without_hooks) {
        end.up(Mode::Udp, &mut Vec::new()).unwrap();
    }
    assert_answered(laptop, &["10.9.0.1", "fd09::1"]);
    for address in web {
        assert_eq!(laptop.ping(address, 3, &[]).unwrap().answered, 0, "{address}");
    }
}

#[test]
fn nobody_answers_what_is_not_masqueraded_by_tidegate_up() {
    without_its_hooks("nobody_answers_what_is_not_masqueraded_by_tidegate_up", By::Tidegate);
}

#[test]
fn nobody_answers_what_is_not_masqueraded_by_wg_quick() {
    without_its_hooks("nobody_answers_what_is_not_masqueraded_by_wg_quick", By::WgQuick);
}

/// Else the rest of this file would prove nothing by finding nothing.
#[test]
fn what_is_left_behind_is_seen() {
    if skips("what_is_left_behind_is_seen", &[]) {
        return;
    }
    let site = Site::new(Scenario::Bridge.layout()).unwrap();
    let laptop = site.space("laptop");
    let before = state(laptop).unwrap();
    let mut sleep = laptop.spawn("sleep", laptop.command("sleep").arg("600")).unwrap();
    for (left, line) in [
        ("ip link add left type veth", "link left"),
        ("ip address add 10.9.0.2/24 dev eth0", "address eth0"),
        (
            "ip -6 route add fd09::/64 dev eth0 table 51820",
            "route -6 fd09::/64 dev eth0 table 51820",
        ),
        ("ip -4 rule add not fwmark 51820 table 51820", "rule -4 "),
        ("ip6tables -t nat -A POSTROUTING -o eth0 -j MASQUERADE", "ip6tables-save -A POSTROUTING"),
        ("mount -t tmpfs left /mnt", "mount left /mnt"),
        ("mkdir /run/tidegate; touch /run/tidegate/laptop.state", "/run/tidegate/laptop.state"),
        ("echo 1 > /proc/sys/net/ipv4/conf/all/src_valid_mark", "src_valid_mark 1"),
        ("true", "process sleep"),
    ] {
        laptop.run("sh", &["-c", &format!("PATH=$PATH:/usr/sbin:/sbin; {left}")]).unwrap();
        let after = state(laptop).unwrap();
        let new: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
        assert!(new.iter().any(|new| new.starts_with(line)), "{line} in {new:#?}");
    }
    assert!(sleep.ended().unwrap().is_none());
}

/// Whatever ends a scenario, and be it Ctrl-C: its site goes out of scope.
#[test]
fn a_site_that_ends_early_takes_everything_along() {
    if skips("a_site_that_ends_early_takes_everything_along", &[By::WgQuick]) {
        return;
    }
    let (site, programs) = (Site::new(Scenario::Bridge.layout()).unwrap(), programs());
    for end in ends(&site, &programs, Scenario::Bridge, By::WgQuick, str::to_owned) {
        end.up(Mode::Auto, &mut Vec::new()).unwrap();
        assert!(!common::socket(end.host).exists(), "the machine's own /run is as it was");
    }
    let spaces: Vec<_> =
        site.spaces().iter().map(|space| Path::new("/run/netns").join(space.name())).collect();
    let folder = site.path("");
    let names: Vec<_> = site.spaces().iter().flat_map(|space| space.processes()).collect();
    assert_eq!(names.len(), 4, "a keeper and its data process at each end: {names:?}");
    let pids = pids_of(&site);
    assert!(pids.len() >= 6, "daemons, and what keeps the file systems: {pids:?}");
    drop(site);
    assert!(!folder.exists());
    for path in spaces {
        assert!(!path.exists(), "{}", path.display());
    }
    // They are told to end; the kernel takes its time for what they hold.
    let ended = || Ok(pids.iter().all(|pid| !is_ours(pid)).then_some(()));
    lab::wait_for("the end of all processes", common::LIMIT, ended).unwrap();
}

/// Whether a process is one of those that a site has, and not one that only waits to be reaped.
fn is_ours(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let ours = ["tidegate", "tidegate-data", "tidegated", "sleep"];
    ours.iter().any(|name| {
        stat.split_once(&format!("({name}) ")).is_some_and(|(_, rest)| !rest.starts_with('Z'))
    })
}

fn pids_of(site: &Site) -> Vec<String> {
    let pids = |space: &lab::Space| {
        let mut ip = Command::new("ip");
        let output = ip.args(["netns", "pids", space.name()]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    site.spaces().into_iter().flat_map(pids).collect()
}

/// A peer that nobody is, with one address of either version.
fn peer(conf: &mut String, number: u32) {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    // Any 32 bytes are a public key; these are base64 of a number and zeros.
    let digits = [24, 18, 12, 6, 0].map(|shift| DIGITS[(number >> shift & 63) as usize] as char);
    let digits: String = digits.iter().collect();
    let [_, a, b, c] = number.to_be_bytes();
    let zeros = "A".repeat(37);
    writeln!(conf, "[Peer]\nPublicKey = A{digits}{zeros}=").unwrap();
    writeln!(conf, "AllowedIPs = 10.{}.{b}.{c}/32, fd10::{number:x}/128", 100 + a).unwrap();
}

#[test]
fn ten_thousand_peers_come_up() {
    const TEST: &str = "ten_thousand_peers_come_up";
    const PEER_COUNT: u32 = 10_000;
    if skips(TEST, &[By::Tidegate]) {
        return;
    }
    let (site, programs) = (Site::new(Scenario::Bridge.layout()).unwrap(), programs());
    let (server, laptop) = (site.space("server1"), site.space("laptop"));
    let [(_, server_conf), (_, laptop_conf)] = Scenario::Bridge.files() else {
        panic!("a bridge has two ends")
    };
    // The laptop is the peer in the middle.
    let (interface, laptop_peer) = server_conf.split_once("[Peer]").unwrap();
    let mut conf = interface.to_owned();
    for number in 0..PEER_COUNT {
        match number == PEER_COUNT / 2 {
            true => write!(conf, "[Peer]{laptop_peer}").unwrap(),
            false => peer(&mut conf, number),
        }
    }
    let conf = conf.as_str();
    let before = state(server).unwrap();
    let many = Tunnel::new(&site, &programs, "server1", conf, By::Tidegate).unwrap();
    let one = Tunnel::new(&site, &programs, "laptop", laptop_conf, By::Tidegate).unwrap();

    println!("{PEER_COUNT} peers: {}", many.up(Mode::Native, &mut Vec::new()).unwrap().trim_end());
    one.up(Mode::Udp, &mut Vec::new()).unwrap();
    let peers = server.run("wg", &["show", "server1", "peers"]).unwrap();
    assert_eq!(peers.lines().count(), PEER_COUNT as usize);
    for (family, route) in [("-4", "10.100.39.15"), ("-6", "fd10::270f")] {
        let routes = server.run("ip", &[family, "route", "show", "dev", "server1"]).unwrap();
        let routed = routes.lines().filter(|line| line.starts_with(['1', 'f'])).count();
        assert!(routed >= PEER_COUNT as usize, "{routed} routes of {family}");
        assert!(routes.lines().any(|line| line.split(' ').next() == Some(route)), "{route}");
    }

    assert_answered(laptop, &["10.9.0.1", "fd09::1"]);
    let tools = Tools::between(&site, &programs.tool, laptop, server).unwrap();
    for address in ["10.9.0.1", "fd09::1"] {
        let transfers = tools.files_with(address, 1 << 20).unwrap();
        assert!(transfers.iter().all(|transfer| transfer.equal), "{transfers:?}");
    }
    drop(tools);
    let handshakes = server.run("wg", &["show", "server1", "latest-handshakes"]).unwrap();
    let shaken = handshakes.lines().filter(|line| !line.ends_with("\t0")).count();
    assert_eq!(shaken, 1, "one of them is somebody");

    let before: Vec<_> =
        before.into_iter().chain(["/etc/wireguard/server1.conf".to_owned()]).collect();
    many.down().unwrap();
    assert_eq!(many.left(&before).unwrap(), [""; 0]);
}
