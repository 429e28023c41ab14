//! An interface that is up follows its file, and a file its interface.
//!
//! ```text
//!  client                             gateway
//!  Tidegate ═════ outer (veth) ═════ tidegate up NAME.conf, reload, save
//!  10.9.0.2, fd09::2                  10.9.0.1, fd09::1, and 99 peers that are nowhere
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::Read as _,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Output,
    time::Duration,
};

use common::{Daemon, LIMIT, UDP, tidegate};
use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Protocol, Socket, Type};
use wg_userspace::key::PublicKey;
use wg_userspace::sys::netns::NetNs;
use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER},
    lab::{self, Lab, Space, find_program},
};

/// A gateway that was brought up by its file.
struct Gateway<'a> {
    space: &'a Space,
    interface: String,
    file: PathBuf,
}

impl Drop for Gateway<'_> {
    fn drop(&mut self) {
        let _ = self.tidegate(&["down", self.file.to_str().unwrap()]);
    }
}

impl<'a> Gateway<'a> {
    fn up(lab: &'a Lab, text: &str) -> Gateway<'a> {
        let interface = lab.interface('g');
        let file = lab.write(&format!("{interface}.conf"), text).unwrap();
        let gateway = Gateway { space: &lab.gateway, interface, file };
        gateway.succeeds(&["up", gateway.path(), "--mode", "udp"]);
        gateway
    }

    fn path(&self) -> &str {
        self.file.to_str().unwrap()
    }

    fn tidegate(&self, arguments: &[&str]) -> Output {
        let path = std::env::var("PATH").unwrap();
        let programs = self.file.with_file_name("programs");
        let path = format!("{}:{path}", programs.display());
        self.space.command(tidegate()).args(arguments).env("PATH", path).output().unwrap()
    }

    /// Runs a command that works, and gives what it printed.
    fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.tidegate(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", errors(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn reload(&self) -> String {
        self.succeeds(&["reload", self.path()])
    }

    fn save(&self) -> String {
        self.succeeds(&["save", self.path()])
    }

    fn write(&self, text: &str) {
        fs::write(&self.file, text).unwrap();
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.file).unwrap()
    }

    fn wg(&self, arguments: &str) -> String {
        self.space.run("wg", &arguments.split(' ').collect::<Vec<_>>()).unwrap()
    }

    fn dump(&self) -> Vec<Vec<String>> {
        let text = self.wg(&format!("show {} dump", self.interface));
        text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
    }

    /// The device and what the host has for it.
    fn state(&self) -> String {
        let interface = &self.interface;
        let mut state = self.wg(&format!("showconf {interface}"));
        for line in [
            format!("ip -br address show dev {interface}"),
            format!("ip link show dev {interface} | grep -o 'mtu [0-9]*'"),
            format!("ip -4 route show table all dev {interface} | sort"),
            format!("ip -6 route show table all dev {interface} | sort"),
            "ip -4 rule; ip -6 rule".to_owned(),
            "nft list ruleset 2>&1; iptables-save | grep ^-A; ip6tables-save | grep ^-A; true"
                .to_owned(),
            "cat /proc/sys/net/ipv4/conf/all/src_valid_mark".to_owned(),
        ] {
            state += &self.space.run("sh", &["-c", &line]).unwrap();
        }
        state
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn lab(test: &str) -> Option<Lab> {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    Some(Lab::new().unwrap())
}

fn client(lab: &Lab) -> Daemon<'_> {
    let client = Daemon::start(&lab.client, &lab.interface('c'), UDP);
    client.configure(lab, CLIENT_CONF);
    let answer = lab::wait_for("an answer", LIMIT, || {
        let ping = lab.client.ping(GATEWAY_INNER[0], 1, &["-W", "1"]);
        Ok(ping.is_ok_and(|ping| ping.answered == 1).then_some(()))
    });
    answer.unwrap();
    client
}

fn key(number: u8) -> PublicKey {
    PublicKey::from_bytes([number; 32])
}

/// The gateway of the first tunnel with 99 peers more.
fn of_100_peers() -> String {
    let mut text = GATEWAY_CONF.to_owned();
    for number in 1..100 {
        write!(text, "\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.8.0.{number}/32\n", key(number))
            .unwrap();
    }
    text
}

#[test]
fn one_of_100_peers_changes_and_the_others_lose_nothing() {
    let Some(lab) = lab("one_of_100_peers_changes_and_the_others_lose_nothing") else { return };
    let gateway = Gateway::up(&lab, &of_100_peers());
    let _client = client(&lab);
    let before = gateway.dump();
    let client_key =
        common::public_key(&lab.client, &lab, common::value(CLIENT_CONF, "PrivateKey"));
    let of_client =
        |dump: &[Vec<String>]| dump.iter().find(|fields| fields[0] == client_key).unwrap().clone();
    assert_ne!(of_client(&before)[4], "0", "no handshake");

    let mut ping = lab.client.command("ping");
    ping.args(["-n", "-q", "-i", "0.002", "-c", "2000", "-W", "2", GATEWAY_INNER[0]]);
    let ping = lab.client.spawn("ping", &mut ping).unwrap();
    let text = of_100_peers();
    for round in 0..5 {
        let other = format!("10.8.1.{round}/32");
        gateway.write(&text.replace("10.8.0.50/32", &other));
        let said = gateway.reload();
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines.len(), 3, "{said}");
        assert!(lines[0].starts_with(&format!("~ peer {}: +{other}, -", key(50))), "{said}");
        assert_eq!(lines[1], format!("+ route {other}"));
    }
    let said = ping.finish(Duration::from_secs(30)).unwrap();
    assert!(said.contains("2000 packets transmitted, 2000 received"), "{said}");

    let after = gateway.dump();
    let (was, is) = (of_client(&before), of_client(&after));
    assert_eq!(was[..5], is[..5], "its endpoint and its handshake are the same");
    let number = |fields: &[String]| fields[5].parse::<u64>().unwrap();
    assert!(number(&is) > number(&was), "its counters go on");
    let others = |dump: &[Vec<String>]| {
        dump.iter().skip(1).filter(|fields| fields[0] != client_key).cloned().collect::<Vec<_>>()
    };
    for (was, is) in others(&before).iter().zip(&others(&after)) {
        assert_eq!(was == is, was[0] != key(50).to_string(), "{was:?} {is:?}");
    }
    assert!(gateway.reload().ends_with(": nothing to do\n"));
}

/// The TOS bytes of the transport data that comes to the client's port while echo requests with this DSCP,
/// shifted by two bits, are answered.
fn outer_tos(lab: &Lab, tos: u8) -> Vec<u8> {
    let namespace = File::open(Path::new("/run/netns").join(lab.client.name())).unwrap();
    let raw = NetNs::from(OwnedFd::from(namespace)).run(|| {
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::UDP)).unwrap();
        raw.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        raw
    });
    lab.gateway.ping("10.9.0.2", 3, &["-Q", &tos.to_string(), "-i", "0.2"]).unwrap();
    let mut seen = Vec::new();
    let mut packet = [0; 2048];
    while let Ok(len) = (&raw).read(&mut packet) {
        // Header, UDP header, type; an echo request of 84 bytes with its padding.
        if len == 20 + 8 + 128 && packet[28] == 4 {
            seen.push(packet[1]);
        }
    }
    seen
}

/// The child of the daemon of an interface, which `up` has started.
fn data_process(interface: &str) -> Pid {
    let words = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let is_keeper = |pid: &String| {
        let line = words(pid);
        line.contains("--background-child\0") && line.ends_with(&format!("\0{interface}\0"))
    };
    let processes = fs::read_dir("/proc").unwrap();
    let mut pids =
        processes.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(is_keeper);
    let keeper = pids.next().expect("the daemon runs");
    let child = lab::wait_for("the data process", LIMIT, || {
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children"))?;
        Ok(children.split_whitespace().next().map(|pid| pid.parse::<i32>().unwrap()))
    });
    Pid::from_raw(child.unwrap()).unwrap()
}

#[test]
fn what_is_done_to_packets_follows_the_file_and_outlives_the_data_process() {
    let test = "what_is_done_to_packets_follows_the_file_and_outlives_the_data_process";
    let Some(lab) = lab(test) else { return };
    let with =
        |lines: &str| GATEWAY_CONF.replacen("[Interface]\n", &format!("[Interface]\n{lines}"), 1);
    let gateway = Gateway::up(&lab, &with("#! CopyDscp = on\n"));
    let _client = client(&lab);
    let shown = || gateway.succeeds(&["show", &gateway.interface]);
    assert!(shown().contains("  copy dscp: on\n") && !shown().contains("mss clamp"), "{}", shown());
    // ECN is as ever: it goes outside, but for CE.
    for (inner, outer) in [(0xb8, 0xb8), (0xba, 0xba), (0xbb, 0xba), (0, 0)] {
        assert_eq!(outer_tos(&lab, inner), [outer; 3]);
    }
    gateway.write(&with("#! MssClamp = off\n"));
    let said = gateway.reload();
    assert!(said.starts_with("~ MssClamp: on → off\n~ CopyDscp: on → off\n"), "{said}");
    assert_eq!(outer_tos(&lab, 0xb9), [1; 3]);
    assert!(shown().contains("  mss clamp: off\n") && !shown().contains("dscp"), "{}", shown());
    assert!(gateway.reload().ends_with(": nothing to do\n"));
    gateway.write(&with("#! CopyDscp = on\n#! MssClamp = off\n"));
    gateway.reload();

    // The data process that follows knows of it.
    let status = || gateway.succeeds(&["show", "--json", &gateway.interface]);
    let before = data_process(&gateway.interface);
    kill_process(before, Signal::KILL).unwrap();
    let is_back = || {
        let is_new = data_process(&gateway.interface) != before;
        Ok((is_new && status().contains("\"copy_dscp\": true")).then_some(()))
    };
    lab::wait_for("another data process", LIMIT, is_back).unwrap();
    assert!(shown().contains("  mss clamp: off\n"), "{}", status());
    let is_marked = || Ok((outer_tos(&lab, 0xb8) == [0xb8; 3]).then_some(()));
    lab::wait_for("marked datagrams", LIMIT, is_marked).unwrap();
}

#[test]
fn another_name_is_a_difference_and_disturbs_nobody() {
    let Some(lab) = lab("another_name_is_a_difference_and_disturbs_nobody") else { return };
    let text = of_100_peers();
    let gateway = Gateway::up(&lab, &text);
    let _client = client(&lab);
    let client_key = common::value(GATEWAY_CONF, "PublicKey");
    let was = gateway.state();
    let handshake = |gateway: &Gateway<'_>| gateway.dump()[1][..5].to_vec();
    let before = handshake(&gateway);
    assert_eq!(before[0], client_key);
    let mut ping = lab.client.command("ping");
    ping.args(["-n", "-q", "-i", "0.002", "-c", "500", "-W", "2", GATEWAY_INNER[0]]);
    let ping = lab.client.spawn("ping", &mut ping).unwrap();
    assert!(text.contains("#! Name = client\n"), "{text}");
    let laptop = text.replace("#! Name = client\n", "#! Name = laptop\n");
    gateway.write(&laptop);
    let said = gateway.succeeds(&["reload", gateway.path(), "--dry-run"]);
    assert_eq!(said, format!("~ peer laptop ({client_key}): renamed from client\n"));
    assert_eq!(gateway.reload(), said);
    assert!(gateway.reload().ends_with(": nothing to do\n"));
    let seventh = format!("PublicKey = {}\n", key(7));
    gateway.write(
        &laptop
            .replace("#! Name = laptop\n", "")
            .replace(&seventh, &format!("{seventh}#! Name = laptop\n")),
    );
    let expected =
        format!("~ peer {client_key}: no more named laptop\n~ peer laptop ({}): named\n", key(7));
    assert_eq!(gateway.reload(), expected);
    gateway.write(GATEWAY_CONF);
    let said = gateway.reload();
    assert!(said.contains(&format!("\n- peer laptop ({})\n", key(7))), "{said}");
    let said = ping.finish(Duration::from_secs(30)).unwrap();
    assert!(said.contains("500 packets transmitted, 500 received"), "{said}");
    assert_eq!(handshake(&gateway), before);
    gateway.write(&text);
    gateway.reload();
    assert_eq!(gateway.state(), was);
}

/// The gateway's file after somebody has changed nearly all of it.
fn rewritten() -> String {
    let replace = |text: String, from: &str, to: &str| {
        assert!(text.contains(from), "`{from}` in {text}");
        text.replace(from, to)
    };
    let private = common::value(GATEWAY_CONF, "PrivateKey");
    let port = common::value(GATEWAY_CONF, "ListenPort");
    let mut text =
        replace(GATEWAY_CONF.to_owned(), private, "SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=");
    text = replace(text, &format!("ListenPort = {port}"), "ListenPort = 7788\nMTU = 1300");
    text = replace(text, "10.9.0.1/24", "10.9.0.5/24, 10.7.0.1/32");
    text = replace(text, "fd09::1/64", "fd09::1/60");
    write!(text, "\n[Peer]\nPublicKey = {}\nAllowedIPs = 0.0.0.0/0, ::/0\n", key(7)).unwrap();
    write!(text, "\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.6.0.0/16\n", key(8)).unwrap();
    text
}

#[test]
fn a_dry_run_tells_all_and_changes_nothing_and_the_way_back_leads_back() {
    let test = "a_dry_run_tells_all_and_changes_nothing_and_the_way_back_leads_back";
    let Some(lab) = lab(test) else { return };
    // With both of them, nft is taken, as wg-quick(8) does.
    let filters = match (find_program("nft"), find_program("iptables")) {
        (Some(_), _) => ["daddr fd09::1 ", "daddr 10.9.0.5 ", "daddr 10.9.0.1 "],
        (None, Some(_)) => ["-d fd09::1/128 ", "-d 10.9.0.5/32 ", "-d 10.9.0.1/32 "],
        (None, None) => {
            eprintln!("SKIPPED {test}: needs nft or iptables");
            return;
        }
    };
    let gateway = Gateway::up(&lab, GATEWAY_CONF);
    let before = gateway.state();
    assert!(gateway.reload().ends_with(": nothing to do\n"));

    gateway.write(&rewritten());
    let told = gateway.succeeds(&["reload", gateway.path(), "--dry-run"]);
    assert_eq!(gateway.state(), before, "a dry run");
    let port = common::value(GATEWAY_CONF, "ListenPort");
    for line in [
        &format!("~ listen port: {port} → 7788"),
        "~ fwmark: 0x0 → 0xca6c",
        &format!("+ peer {}: 0.0.0.0/0, ::/0", key(7)),
        "+ address 10.9.0.5/24",
        "- address 10.9.0.1/24",
        "+ route 10.6.0.0/16",
        "+ route 0.0.0.0/0 in table 51820",
        "+ IPv6 rule: without mark 0xca6c by table 51820",
    ] {
        assert!(told.lines().any(|told| told == line), "`{line}` in\n{told}");
    }
    assert!(told.contains("~ private key: its public key ") && told.contains("~ MTU: "), "{told}");
    assert!(!told.contains("SEhISEhI"), "no key is shown");

    assert_eq!(gateway.reload(), told, "what is done is what was told");
    let changed = gateway.state();
    for part in [
        "ListenPort = 7788",
        "FwMark = 0xca6c",
        "10.9.0.5/24",
        "10.7.0.1/32",
        "fd09::1/60",
        filters[0],
        filters[1],
        "mtu 1300",
        "10.6.0.0/16",
        "default table 51820",
        "not from all fwmark 0xca6c lookup 51820",
        "suppress_prefixlength 0",
    ] {
        assert!(changed.contains(part), "`{part}` in\n{changed}");
    }
    assert!(!changed.contains("10.9.0.1/24") && !changed.contains(filters[2]), "{changed}");
    assert!(gateway.reload().ends_with(": nothing to do\n"));
    // The automatic mark is not taken away, as `wg syncconf` would.
    assert_eq!(gateway.state(), changed);

    gateway.write(GATEWAY_CONF);
    gateway.reload();
    assert_eq!(gateway.state(), before);
    let interface = gateway.interface.clone();
    gateway.succeeds(&["down", gateway.path()]);
    assert!(!lab.gateway.has_interface(&interface));
}

#[test]
fn a_reload_that_fails_leaves_everything_as_it_was() {
    let Some(lab) = lab("a_reload_that_fails_leaves_everything_as_it_was") else { return };
    let gateway = Gateway::up(&lab, GATEWAY_CONF);
    let other = Daemon::start(&lab.gateway, &lab.interface('x'), UDP);
    other.wg(&["set", &other.interface, "listen-port", "7788"]);
    let _client = client(&lab);
    let before = gateway.state();
    let handshake = gateway.dump()[1][4].clone();
    // The port is in use; an address of many hosts is nobody's.
    let no_address = rewritten().replace("7788", "7789").replace("10.7.0.1/32", "ff02::7/64");
    for (text, problem) in [
        (rewritten(), "UDP port 7788 is in use by another program; "),
        (no_address, "adding address ff02::7/64"),
        (GATEWAY_CONF.replace("[Peer]", "[Pear]"), "unknown section"),
    ] {
        gateway.write(&text);
        let output = gateway.tidegate(&["reload", gateway.path()]);
        assert!(!output.status.success() && output.stdout.is_empty());
        let said = errors(&output);
        assert!(said.contains(problem), "{said}");
        assert!(!said.contains("not everything"), "{said}");
        assert_eq!(gateway.state(), before, "{problem}");
    }
    assert_eq!(gateway.dump()[1][4], handshake);
    assert_eq!(lab.client.ping(GATEWAY_INNER[0], 3, &[]).unwrap().answered, 3);
    gateway.write(GATEWAY_CONF);
    assert!(gateway.reload().ends_with(": nothing to do\n"));
}

/// Has the program of the filter fail once, when there is a file `fail`.
fn failing_filter(lab: &Lab) {
    fs::create_dir(lab.path("programs")).unwrap();
    let name = if find_program("nft").is_some() { "nft" } else { "iptables-restore" };
    let real = find_program(name).unwrap();
    let script = format!(
        "#!/bin/sh\nif rm {} 2>/dev/null; then exit 9; fi\nexec {} \"$@\"\n",
        lab.path("fail").display(),
        real.display()
    );
    let program = lab.write(&format!("programs/{name}"), &script).unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
}

#[test]
fn a_reload_that_fails_after_its_request_ends_no_session() {
    let test = "a_reload_that_fails_after_its_request_ends_no_session";
    let Some(lab) = lab(test) else { return };
    if find_program("iptables").is_none() {
        eprintln!("SKIPPED {test}: needs iptables");
        return;
    }
    failing_filter(&lab);
    let other = format!("\n[Peer]\nPublicKey = {}\nAllowedIPs = 0.0.0.0/0\n", key(7));
    let gateway = Gateway::up(&lab, &format!("{GATEWAY_CONF}{other}"));
    let _client = client(&lab);
    let (before, was) = (gateway.state(), gateway.dump());
    assert_ne!(was[1][4], "0", "no handshake");

    // The client leaves, and the filter has another address to name.
    let (interface, _) = GATEWAY_CONF.split_once("[Peer]").unwrap();
    let without = format!("{}{other}", interface.replace("10.9.0.1/24", "10.9.0.5/24"));
    gateway.write(&without);
    lab.write("fail", "").unwrap();
    let output = gateway.tidegate(&["reload", gateway.path()]);
    let said = errors(&output);
    assert!(said.contains("everything is as it was before"), "{said}");
    assert!(!lab.path("fail").exists() && said.contains("ended with exit code 9"), "{said}");
    assert_eq!(gateway.state(), before, "{said}");
    let is = gateway.dump();
    assert_eq!(is[1][..5], was[1][..5], "it has lost its session");
    let received = |dump: &[Vec<String>]| dump[1][5].parse::<u64>().unwrap();
    assert!(received(&is) >= received(&was));
    assert_eq!(lab.client.ping(GATEWAY_INNER[0], 3, &[]).unwrap().answered, 3);
    assert_eq!(gateway.dump()[1][4], was[1][4], "no other handshake was needed");

    assert!(gateway.reload().contains("- peer "));
    assert_eq!(gateway.dump().len(), 2);
}

#[test]
fn what_only_a_start_can_do_is_said() {
    let Some(lab) = lab("what_only_a_start_can_do_is_said") else { return };
    let gateway = Gateway::up(&lab, GATEWAY_CONF);
    let workers = "[Interface]\n#! Workers = 1\nPostUp = touch /nobody/does/this\n";
    gateway.write(&GATEWAY_CONF.replacen("[Interface]\n", workers, 1));
    let output = gateway.tidegate(&["reload", gateway.path()]);
    assert_eq!(output.status.code(), Some(6), "{}", errors(&output));
    assert!(errors(&output).contains("Workers changed"), "{}", errors(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("PostUp: not run now"));
}

#[test]
fn a_peer_that_roams_stays_where_it_is() {
    let Some(lab) = lab("a_peer_that_roams_stays_where_it_is") else { return };
    // Where nobody is; the client says by itself where it is.
    let endpoint = |port: u16| format!("{GATEWAY_CONF}Endpoint = 198.51.100.77:{port}\n");
    let gateway = Gateway::up(&lab, &endpoint(7));
    let _client = client(&lab);
    let roamed = gateway.dump()[1][2].clone();
    assert_ne!(roamed, "198.51.100.77:7");
    gateway.write(&format!("{}PersistentKeepalive = 25\n", endpoint(7)));
    gateway.reload();
    assert_eq!(gateway.dump()[1][2], roamed);
    assert_eq!(gateway.dump()[1][7], "25");
    gateway.write(&endpoint(8));
    assert!(gateway.reload().contains(&format!("endpoint {roamed} → 198.51.100.77:8")));
}

#[test]
fn save_keeps_what_people_wrote_and_reload_finds_nothing_to_do() {
    let Some(lab) = lab("save_keeps_what_people_wrote_and_reload_finds_nothing_to_do") else {
        return;
    };
    let text = format!(
        "# Ours\n{}\n# Gone soon\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.9/32 # printer\n",
        GATEWAY_CONF.replacen("[Interface]\n", "[Interface]\n#! Workers = 1\n", 1),
        key(9)
    );
    let gateway = Gateway::up(&lab, &text);
    let unchanged = gateway.save();
    assert!(unchanged.contains("nothing to do"), "{unchanged}");
    assert_eq!(gateway.text(), text);

    let _client = client(&lab);
    let interface = &gateway.interface;
    gateway.wg(&format!("set {interface} listen-port 7799 peer {} remove", key(9)));
    gateway.wg(&format!(
        "set {interface} peer {} allowed-ips 10.9.0.7/32 persistent-keepalive 9",
        key(7)
    ));
    lab.gateway.ip(&format!("address add 10.9.0.8/24 dev {interface}")).unwrap();
    assert!(gateway.save().contains("saved to"));
    let saved = gateway.text();
    for line in text.lines().filter(|line| line.starts_with('#') && !line.contains("Gone")) {
        assert!(saved.lines().any(|saved| saved == line), "`{line}` in\n{saved}");
    }
    assert!(!saved.contains("Gone soon") && !saved.contains("printer"), "{saved}");
    for line in ["ListenPort = 7799", "PersistentKeepalive = 9", "Endpoint = 198.51.100.2:"] {
        assert!(saved.contains(line), "`{line}` in\n{saved}");
    }
    assert!(saved.contains("10.9.0.8/24") && !saved.contains("fe80"), "{saved}");
    assert!(gateway.save().contains("nothing to do"));
    assert_eq!(gateway.text(), saved, "twice is once");
    assert!(gateway.reload().ends_with(": nothing to do\n"));
    // What this version does not follow, and was written since it came up, stays as it is.
    let later =
        "[Interface]\n#!  nat = MASQUERADE out=eth0 # later\n#! Allow = ::/0->::/0 TCP 1, 2\n";
    gateway.write(&saved.replacen("[Interface]\n", later, 1));
    gateway.wg(&format!("set {interface} listen-port 7798"));
    gateway.save();
    assert_eq!(gateway.text(), saved.replacen("[Interface]\n", later, 1).replace("7799", "7798"));
    gateway.write(&saved);
    gateway.reload();

    if find_program("wg-quick").is_some() {
        // In meaning it is what wg-quick saves.
        let folder = lab.path("theirs");
        fs::create_dir(&folder).unwrap();
        let theirs = folder.join(gateway.file.file_name().unwrap());
        fs::write(&theirs, &text).unwrap();
        lab.gateway.run("wg-quick", &["save", theirs.to_str().unwrap()]).unwrap();
        let other = Daemon::start(&lab.host, &lab.interface('x'), UDP);
        let meaning = |file: &Path| {
            let file = file.to_str().unwrap();
            let stripped = lab.host.run("wg-quick", &["strip", file]).unwrap();
            assert_eq!(stripped, gateway.succeeds(&["strip", file]), "strip is wg-quick's");
            let stripped = lab.write("stripped", &stripped).unwrap();
            other.wg(&["setconf", &other.interface, stripped.to_str().unwrap()]);
            other.wg(&["showconf", &other.interface])
        };
        assert_eq!(meaning(&gateway.file), meaning(&theirs));
    }
}

#[test]
fn what_wants_to_be_saved_is_saved_at_the_end() {
    let Some(lab) = lab("what_wants_to_be_saved_is_saved_at_the_end") else { return };
    let text = GATEWAY_CONF.replacen("[Interface]\n", "[Interface]\nSaveConfig = true # yes\n", 1);
    let gateway = Gateway::up(&lab, &text);
    gateway.wg(&format!("set {} peer {} allowed-ips 10.9.0.7/32", gateway.interface, key(7)));
    gateway.succeeds(&["down", gateway.path()]);
    let expected = format!("[Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.7/32\n", key(7));
    assert!(gateway.text().ends_with(&expected), "{}", gateway.text());
    assert!(gateway.text().contains("SaveConfig = true # yes"));
    gateway.succeeds(&["up", gateway.path(), "--mode", "udp"]);
    assert_eq!(gateway.dump().len(), 3);
}

/// A resolvconf(8) with one record, which is a file.
const RESOLVCONF: &str = r#"#!/bin/sh
record="$(dirname "$0")/../record"
case "$1" in
-a) cat > "$record" ;;
-d) rm -f "$record" ;;
-l) cat "$record" ;;
esac
"#;

#[test]
fn name_servers_follow_the_file_and_come_back_after_a_failure() {
    let Some(lab) = lab("name_servers_follow_the_file_and_come_back_after_a_failure") else {
        return;
    };
    fs::create_dir(lab.path("programs")).unwrap();
    let program = lab.write("programs/resolvconf", RESOLVCONF).unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let record = || fs::read_to_string(lab.path("record")).unwrap_or_default();
    let with =
        |dns: &str| GATEWAY_CONF.replacen("[Interface]\n", &format!("[Interface]\n{dns}"), 1);
    let gateway = Gateway::up(&lab, &with("DNS = 10.9.0.53 # ours\n"));
    assert_eq!(record(), "nameserver 10.9.0.53\n");
    assert!(gateway.reload().ends_with(": nothing to do\n"));

    let other = Daemon::start(&lab.gateway, &lab.interface('x'), UDP);
    other.wg(&["set", &other.interface, "listen-port", "7788"]);
    let new = with("DNS = 10.9.0.54, lan\n");
    gateway.write(&new.replace("51820", "7788"));
    let output = gateway.tidegate(&["reload", gateway.path()]);
    assert!(errors(&output).contains("everything is as it was before"), "{}", errors(&output));
    assert_eq!(record(), "nameserver 10.9.0.53\n");

    gateway.write(&new);
    assert_eq!(gateway.reload(), "+ DNS 10.9.0.54, lan\n- DNS 10.9.0.53\n");
    assert_eq!(record(), "nameserver 10.9.0.54\nsearch lan\n");
    fs::write(lab.path("record"), "nameserver 10.9.0.55\nsearch lan\n").unwrap();
    gateway.save();
    assert!(gateway.text().contains("DNS = lan, 10.9.0.55\n"), "{}", gateway.text());

    gateway.write(GATEWAY_CONF);
    gateway.reload();
    assert_eq!(record(), "");
}

#[test]
fn the_last_address_under_a_default_route_stays() {
    let test = "the_last_address_under_a_default_route_stays";
    let Some(lab) = lab(test) else { return };
    if find_program("iptables").is_none() {
        eprintln!("SKIPPED {test}: needs iptables");
        return;
    }
    let with_default = GATEWAY_CONF.replace("10.9.0.2/32", "0.0.0.0/0");
    let gateway = Gateway::up(&lab, &with_default);
    let before = gateway.state();
    gateway.write(&with_default.replace("10.9.0.1/24, ", ""));
    let output = gateway.tidegate(&["reload", gateway.path()]);
    assert_eq!(output.status.code(), Some(6), "{}", errors(&output));
    assert!(errors(&output).contains("address 10.9.0.1/24 stays"), "{}", errors(&output));
    assert_eq!(gateway.state(), before);
    // Without the default route it goes, and no route with it.
    let without = GATEWAY_CONF.replace("10.9.0.1/24, ", "");
    gateway.write(&without.replace("10.9.0.2/32", "10.9.0.2/32, 10.6.0.0/16"));
    gateway.reload();
    let after = gateway.state();
    assert!(after.contains("\n10.6.0.0/16 ") && after.contains("\n10.9.0.2 "), "{after}");
    assert!(!after.contains("10.9.0.1") && !after.contains("suppress"), "{after}");
}

#[test]
fn a_mark_goes_only_with_the_line_that_set_it() {
    let Some(lab) = lab("a_mark_goes_only_with_the_line_that_set_it") else { return };
    let gateway = Gateway::up(&lab, GATEWAY_CONF);
    let mark = || gateway.wg(&format!("show {} fwmark", gateway.interface));
    gateway.wg(&format!("set {} fwmark 9", gateway.interface));
    assert!(gateway.reload().ends_with(": nothing to do\n"));
    assert_eq!(mark(), "0x9\n", "somebody else has set it");
    gateway.write(&GATEWAY_CONF.replace("ListenPort", "FwMark = 5\nListenPort"));
    assert_eq!(gateway.reload(), "~ fwmark: 0x9 → 0x5\n");
    gateway.write(GATEWAY_CONF);
    assert_eq!(gateway.reload(), "~ fwmark: 0x5 → 0x0\n");
    assert_eq!(mark(), "off\n");
}
