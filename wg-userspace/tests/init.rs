//! `init`: what it writes is read by us and by the real tools, carries packets, and is nobody
//! else's to read.
//!
//! The last test brings a gateway and its client up from the files as they are:
//!
//! ```text
//! client ── 198.51.100.0/24 ── gateway ── 192.168.20.0/24 ── host
//! ```

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;
use wg_userspace::{
    check::{self, Severity, Subject},
    config::{self, Config},
    sys::netns::report_skipped,
};
use xtask::lab::{self, GATEWAY_V4, HOST_V4, LAN, Lab, Space};

/// Every shape, plain and with all of its options.
const SHAPES: [&str; 13] = [
    "bridge --endpoint vpn.example.org",
    "bridge --endpoint [2001:db8::1]:443 --clients a,b,c --psk --network none --interface office",
    "bridge --endpoint 198.51.100.1 --network6 none --dns 10.9.0.1 --name Büro --clients läptop",
    "gateway --endpoint gw.example.org",
    "gateway --endpoint gw.example.org:443 --network6 none --clients laptop,phone --dns 9.9.9.9",
    "gateway --endpoint 198.51.100.1:1 --network none --dns 2620:fe::fe",
    "gateway --endpoint gw.example.org --out enp3s0.20 --psk --network 172.16.0.0/30 --port 1194",
    "jumpbox --endpoint jump.example.org --vlan 192.168.20.0/24",
    "jumpbox --endpoint jump.example.org --vlan 192.168.20.0/24,fd20::/64,10.0.0.0/24 --out vlan20",
    "mesh --nodes a=198.51.100.1,b=198.51.100.2:443",
    "mesh --nodes a=a.example.org,b=b.example.org,c=[2001:db8::3]:51820,d --psk",
    "mesh --nodes a=nat.example.org:1,b=nat.example.org:2,c --network6 none",
    "mesh --nodes a,b=b.example.org --network 10.0.0.0/31 --network6 fd00::/127",
];

fn init(line: &str, dir: &Path) -> Output {
    let mut command = Command::new(common::tidegate());
    command.arg("init").args(line.split_whitespace()).arg(dir).output().unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// What `init` wrote: the folders' names and their files, in order.
fn written(dir: &Path) -> Vec<(String, PathBuf)> {
    let mut ends: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|end| {
            let end = end.unwrap();
            let files: Vec<_> = fs::read_dir(end.path()).unwrap().map(Result::unwrap).collect();
            assert_eq!(files.len(), 1, "{files:?}");
            (end.file_name().into_string().unwrap(), files[0].path())
        })
        .collect();
    ends.sort();
    ends
}

fn make(line: &str) -> (TempDir, Vec<(String, PathBuf)>) {
    let dir = tempfile::tempdir().unwrap();
    let output = init(line, dir.path());
    assert_eq!(output.status.code(), Some(0), "{line}: {}", stderr(&output));
    let ends = written(dir.path());
    (dir, ends)
}

fn read(path: &Path) -> Config {
    let text = fs::read_to_string(path).unwrap();
    config::parse(&path.display().to_string(), &text).unwrap_or_else(|errors| panic!("{errors:?}"))
}

#[test]
fn every_shape_passes_check() {
    for line in SHAPES {
        let (_dir, ends) = make(line);
        assert!(ends.len() > 1, "{line}");
        let files: Vec<(&str, Config)> =
            ends.iter().map(|(name, path)| (name.as_str(), read(path))).collect();
        let subjects: Vec<Subject<'_>> =
            files.iter().map(|(name, config)| Subject { name, config }).collect();
        let alone = subjects.iter().enumerate().flat_map(|(at, file)| check::alone(file, at));
        let mut findings: Vec<_> = alone.chain(check::together(&subjects)).collect();
        findings.retain(|finding| finding.severity > Severity::Note);
        assert!(findings.is_empty(), "{line}: {findings:#?}");
        for (_, config) in &files {
            assert!(config.unsupported().is_empty(), "{line}");
            assert!(config.peers.iter().all(|peer| peer.name.is_some()), "{line}");
        }
    }
}

/// The findings about files that are more than notes. A text that cannot be read is one.
fn findings(files: &[(String, String)]) -> Vec<String> {
    let read = files.iter().map(|(name, text)| Ok((name.as_str(), config::parse(name, text)?)));
    let read: Vec<(&str, Config)> = match read.collect::<Result<_, config::ConfigErrors>>() {
        Ok(read) => read,
        Err(errors) => return vec![errors.to_string()],
    };
    let subjects: Vec<Subject<'_>> =
        read.iter().map(|(name, config)| Subject { name, config }).collect();
    let alone = subjects.iter().enumerate().flat_map(|(at, file)| check::alone(file, at));
    let all = alone.chain(check::together(&subjects));
    let worse = all.filter(|finding| finding.severity > Severity::Note);
    worse.map(|finding| finding.message).collect()
}

/// A line with another value, once for each of its values; and no line, where it could be missing.
fn changes(line: &str, foreign: &[String; 2]) -> Vec<String> {
    let Some((key, value)) = line.split_once(" = ") else { return Vec::new() };
    let with = |value: &str| format!("{key} = {value}");
    // The same address but for its last digit, which is of no end here.
    let moved = |item: &str| {
        let (address, len) = item.split_once('/').unwrap();
        format!("{}9/{len}", &address[..address.len() - 1])
    };
    match key {
        "PrivateKey" => vec![with(&foreign[0])],
        "PublicKey" => vec![with(&foreign[1])],
        "PresharedKey" => vec![with(&foreign[0]), String::new()],
        "ListenPort" => vec![with("7"), String::new()],
        "Endpoint" => {
            let (host, port) = value.rsplit_once(':').unwrap();
            vec![with(&format!("{host}:7")), with(&format!("{}:{port}", elsewhere(host)))]
        }
        "#! Endpoint" => vec![with(&elsewhere(value))],
        "Address" | "AllowedIPs" => {
            let items: Vec<&str> = value.split(", ").collect();
            let is_host =
                |item: &&str| key == "Address" || item.ends_with("/32") || item.ends_with("/128");
            let changed = items.iter().copied().filter(is_host);
            changed.map(|item| line.replace(item, &moved(item))).collect()
        }
        _ => Vec::new(),
    }
}

/// Another host of the same kind.
fn elsewhere(host: &str) -> String {
    match host.strip_suffix("1]") {
        Some(start) => format!("{start}9]"),
        None => format!("{}9", host.strip_suffix('1').unwrap_or(host)),
    }
}

#[test]
fn any_value_that_is_changed_at_one_end_is_found() {
    let foreign = {
        let private = Command::new(common::tidegate()).arg("genkey").output().unwrap().stdout;
        let private = String::from_utf8(private).unwrap().trim().to_owned();
        let key = wg_userspace::key::PrivateKey::from_base64(&private).unwrap();
        [private, key.public_key().to_string()]
    };
    for line in [
        "bridge --psk --endpoint 198.51.100.1 --clients laptop,phone",
        "gateway --psk --endpoint gw.example.org",
        "jumpbox --psk --endpoint [2001:db8::1]:443 --vlan 192.168.20.0/24 --clients a,b",
        "mesh --psk --nodes a=198.51.100.1,b=b.example.org:443,c",
    ] {
        let (_dir, ends) = make(line);
        let files: Vec<(String, String)> = ends
            .into_iter()
            .map(|(name, path)| (name, fs::read_to_string(path).unwrap()))
            .collect();
        assert_eq!(findings(&files), [""; 0], "{line}");
        let mut count = 0;
        for (at, (name, text)) in files.iter().enumerate() {
            for (number, old) in text.lines().enumerate() {
                // To clients that send everything to it, a gateway may have any address.
                if name == "gateway" && old.starts_with("Address") {
                    continue;
                }
                for new in changes(old, &foreign) {
                    let lines = text.lines().enumerate();
                    let lines = lines.map(|(at, line)| if at == number { &new } else { line });
                    let mut files = files.clone();
                    files[at].1 = lines.collect::<Vec<_>>().join("\n");
                    let found = findings(&files);
                    assert!(!found.is_empty(), "{line}: {name}: `{old}` became `{new}`");
                    count += 1;
                }
            }
        }
        assert!(count >= 10, "{line}: {count}");
    }
}

/// Told apart from `check`, which is what the others go by: each end is a peer of each end that it
/// reaches, with its key, its addresses, its port and the same preshared key.
#[test]
fn what_one_file_says_of_itself_the_others_say_of_it() {
    for line in SHAPES {
        let (_dir, ends) = make(line);
        let files: Vec<(&str, Config)> =
            ends.iter().map(|(name, path)| (name.as_str(), read(path))).collect();
        for (name, own) in &files {
            let interface = &own.interface;
            for peer in &own.peers {
                let called = peer.name.as_ref().unwrap();
                let (other_name, other) = files
                    .iter()
                    .find(|(_, other)| {
                        other.interface.private_key.public_key() == peer.public_key.value
                    })
                    .unwrap();
                assert_eq!(called.value, *other_name, "{line}");
                let back = other
                    .peers
                    .iter()
                    .find(|back| back.public_key.value == interface.private_key.public_key());
                let back = back.unwrap();
                assert_eq!(back.name.as_ref().unwrap().value, *name, "{line}");
                let keys =
                    [peer, back].map(|peer| peer.preshared_key.as_ref().map(|key| &key.value));
                assert_eq!(keys[0], keys[1], "{line}");
                assert_eq!(keys[0].is_some(), line.contains("--psk"), "{line}");
                let allows = |address: &ipnet::IpNet| {
                    peer.allowed_ips.iter().any(|network| network.contains(&address.addr()))
                };
                assert!(other.interface.addresses.iter().all(|address| allows(address)), "{line}");
                match &peer.endpoint {
                    Some(endpoint) => {
                        let port = endpoint.port();
                        assert_eq!(other.interface.listen_port.as_deref(), Some(&port), "{line}");
                        let known = other.interface.endpoint.as_deref().unwrap();
                        assert_eq!(known.endpoint(port), endpoint.value, "{line}");
                        assert_eq!(known.port(), None, "{line}");
                    }
                    None => {
                        assert!(other.interface.listen_port.is_none(), "{line}");
                        assert!(other.interface.endpoint.is_none(), "{line}");
                    }
                }
                assert!(peer.endpoint.is_some() || back.endpoint.is_some(), "{line}");
                // Whoever is not found keeps the way open.
                let keeps = peer.persistent_keepalive.is_some();
                assert_eq!(keeps, interface.listen_port.is_none(), "{line}");
            }
        }
    }
}

#[test]
fn a_gateway_takes_further_peers_without_being_told_where_it_is() {
    // Sockets of interfaces are in one place for all.
    let interface = format!("t{}", std::process::id());
    let line = format!("gateway --endpoint gw.example.org:443 --interface {interface}");
    let (dir, ends) = make(&line);
    let gateway = ends[0].1.to_str().unwrap();
    let tidegate = |arguments: &[&str]| {
        let mut command = Command::new(common::tidegate());
        let output = command.args(arguments).current_dir(&dir).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    tidegate(&["peer", "add", gateway, "phone", "--route-all", "--out", "phone.conf"]);
    let phone = read(&dir.path().join("phone.conf"));
    let endpoint = phone.peers[0].endpoint.as_deref().unwrap();
    assert_eq!(endpoint.to_string(), "gw.example.org:443");
    let laptop = ends[1].1.to_str().unwrap();
    let said = tidegate(&["check", "--offline", "--strict", gateway, laptop, "phone.conf"]);
    assert!(said.contains("nothing wrong"), "{said}");
}

#[test]
fn the_real_tools_read_every_shape() {
    let has_tools = Path::new("/usr/bin/wg-quick").exists() && rustix::process::geteuid().is_root();
    if !has_tools {
        let needs = "needs wg-quick(8), and root for it";
        return report_skipped("the_real_tools_read_every_shape", needs);
    }
    for line in SHAPES {
        let (_dir, ends) = make(line);
        for (_, path) in &ends {
            let output = Command::new("wg-quick").arg("strip").arg(path).output().unwrap();
            // It warns of files that others can read.
            assert!(output.status.success() && output.stderr.is_empty(), "{line}: {output:?}");
            let stripped = String::from_utf8(output.stdout).unwrap();
            assert!(
                stripped.contains("PublicKey = ") && !stripped.contains("PostUp"),
                "{stripped}"
            );
        }
    }
}

#[test]
fn files_are_for_their_owner_alone_and_say_what_they_are() {
    let (dir, ends) = make("gateway --endpoint gw.example.org --clients laptop,phone");
    let names: Vec<_> = ends.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["gateway", "laptop", "phone"]);
    for (name, path) in &ends {
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(path.file_name().unwrap(), "wg0.conf");
        let text = fs::read_to_string(path).unwrap();
        let first = text.lines().next().unwrap();
        assert!(first.starts_with(&format!("# {name}, made by `tidegate init gateway`")), "{text}");
        // One key that is secret, and it is this end's.
        assert_eq!(text.matches("PrivateKey = ").count(), 1, "{text}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing else is left");
}

#[test]
fn keys_are_new_each_time_and_never_printed() {
    let dir = tempfile::tempdir().unwrap();
    let mut keys = Vec::new();
    for folder in ["one", "two"] {
        let folder = dir.path().join(folder);
        let output = init("mesh --psk --nodes a=198.51.100.1,b=198.51.100.2,c", &folder);
        let printed = format!("{}{}", String::from_utf8_lossy(&output.stdout), stderr(&output));
        for (_, path) in written(&folder) {
            let text = fs::read_to_string(path).unwrap();
            let secret =
                |line: &&str| line.starts_with("PrivateKey") || line.starts_with("Preshared");
            for line in text.lines().filter(secret) {
                let key = line.split_once(" = ").unwrap().1.to_owned();
                assert!(!printed.contains(&key));
                keys.push(key);
            }
        }
    }
    // Three ends and three pairs, each pair in two files.
    assert_eq!(keys.len(), 2 * (3 + 2 * 3));
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 2 * (3 + 3));
}

#[test]
fn nothing_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let line = "bridge --endpoint 198.51.100.1 --clients laptop,phone";
    fs::create_dir(dir.path().join("phone")).unwrap();
    let output = init(line, dir.path());
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert!(stderr(&output).contains("phone is there already, and nothing was written"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    fs::remove_dir(dir.path().join("phone")).unwrap();
    assert_eq!(init(line, dir.path()).status.code(), Some(0));
    let before: Vec<_> =
        written(dir.path()).into_iter().map(|(_, path)| fs::read(path).unwrap()).collect();
    let again = init(line, dir.path());
    assert_eq!(again.status.code(), Some(5));
    let all = ["laptop", "phone", "server"];
    assert!(all.iter().all(|end| stderr(&again).contains(end)), "{}", stderr(&again));
    let after: Vec<_> =
        written(dir.path()).into_iter().map(|(_, path)| fs::read(path).unwrap()).collect();
    assert_eq!(before, after);
}

#[test]
fn what_cannot_work_is_refused_before_anything_is_written() {
    for (line, why) in [
        ("gateway", "--endpoint"),
        ("jumpbox --endpoint a.example.org", "--vlan"),
        ("mesh", "--nodes"),
        ("mesh --nodes a=198.51.100.1", "2 to 250 nodes, this has 1"),
        ("mesh --nodes a=198.51.100.1,b,c", "neither `b` nor `c` says where it is found"),
        ("mesh --nodes a=198.51.100.1,b=198.51.100.1:51820", "both be found at 198.51.100.1:51820"),
        ("mesh --nodes a=198.51.100.1,A=198.51.100.2", "both be called `A`"),
        ("mesh --nodes a=198.51.100.1,b=198.51.100.2,c --network 10.9.0.0/30", "--network"),
        ("bridge --endpoint 198.51.100.1 --clients a,b --network6 fd09::/127", "by --network6"),
        ("bridge --endpoint 198.51.100.1 --clients server", "both be called `server`"),
        ("bridge --endpoint 198.51.100.1 --network none --network6 none", "carries nothing"),
        ("bridge --endpoint 10.9.0.7", "10.9.0.7 lies in 10.9.0.0/24"),
        ("bridge --endpoint 198.51.100.1 --network 10.9.0.1/24", "its network is 10.9.0.0/24"),
        ("bridge --endpoint https://example.org", "write `example.org`"),
        ("bridge --endpoint 198.51.100.1:0", "from 1 to 65535"),
        ("bridge --endpoint 198.51.100.1 --clients ../up", "no name for an end"),
        ("gateway --endpoint 198.51.100.1 --out eth0;reboot", "cannot be the name"),
        ("jumpbox --endpoint 198.51.100.1 --vlan 10.0.0.0/8", "by --network"),
        ("jumpbox --endpoint 198.51.100.1 --vlan 198.51.100.0/24", "lies in 198.51.100.0/24"),
        ("jumpbox --endpoint 198.51.100.1 --vlan 10.0.0.0/24,10.0.0.0/25", "overlap"),
        ("jumpbox --endpoint 198.51.100.1 --vlan fd20::/64 --network6 none", "by --network6"),
        ("jumpbox --endpoint 198.51.100.1 --vlan 0.0.0.0/0", "not a network for hosts"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let output = init(line, dir.path());
        assert_eq!(output.status.code(), Some(2), "{line}: {}", stderr(&output));
        assert!(stderr(&output).contains(why), "{line}: {}", stderr(&output));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{line}");
    }
}

#[test]
fn a_jumpbox_carries_packets_from_the_files_as_they_are() {
    if let Some(reason) = lab::unavailable() {
        return report_skipped("a_jumpbox_carries_packets_from_the_files_as_they_are", &reason);
    }
    let lab = Lab::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    // Sockets of all namespaces lie in one folder: one of the two needs another name.
    let (jumpbox, laptop) = (lab.interface('i'), lab.interface('j'));
    let line = format!(
        "jumpbox --endpoint {GATEWAY_V4} --vlan 192.168.20.0/24 --out {LAN} --psk \
         --interface {jumpbox}"
    );
    let output = init(&line, dir.path());
    assert!(output.status.success(), "{}", stderr(&output));
    let file = |end: &str, interface: &str| dir.path().join(end).join(format!("{interface}.conf"));
    fs::rename(file("laptop", &jumpbox), file("laptop", &laptop)).unwrap();
    let of_jumpbox = file("jumpbox", &jumpbox);
    let of_laptop = file("laptop", &laptop);
    let tidegate = |space: &Space, command: &str, file: &Path| {
        space.run(common::tidegate(), &[command, file.to_str().unwrap()]).unwrap()
    };
    // The host behind knows nobody inside the tunnel, and the jumpbox forwards only if it is told to.
    lab.host.ip("route del 10.9.0.0/24").unwrap();
    lab.gateway.set_sysctl("net/ipv4/ip_forward", "0").unwrap();
    let forwards = || lab.gateway.run("cat", &["/proc/sys/net/ipv4/ip_forward"]).unwrap();
    tidegate(&lab.gateway, "up", &of_jumpbox);
    assert_eq!(forwards().trim(), "1");
    tidegate(&lab.client, "up", &of_laptop);
    common::assert_answered(&lab.client, &["10.9.0.1", HOST_V4]);
    tidegate(&lab.client, "down", &of_laptop);
    tidegate(&lab.gateway, "down", &of_jumpbox);
    assert_eq!(forwards().trim(), "0", "as it was");
}
