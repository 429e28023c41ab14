//! `tidegate check`, by a corpus of files with mistakes: what it says of each is kept beside it.
//!
//! ```text
//! check/broken/NAME.conf     one file, wrong in one way     ─ NAME.snap
//! check/pairs/CASE/*.conf    files that are meant to meet   ─ CASE.snap
//! ```
//!
//! The first line of each file says what is wrong. `--offline` keeps this host out of it.
//! `INSTA_UPDATE=always` writes what is said now.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::{
    fmt::Write as _,
    fs,
    net::UdpSocket,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use wg_userspace::sys::netns::{may_make_netns, report_skipped};

const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");

/// `tidegate check` in a folder; no setting of whoever runs this has an effect.
fn check(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(TIDEGATE);
    command.arg("check").args(arguments).current_dir(folder).stdin(Stdio::null());
    command.env_remove("WG_COLOR_MODE").output().unwrap()
}

fn offline(folder: &Path, files: &[String], more: &[&str]) -> Output {
    let mut arguments = vec!["--offline"];
    arguments.extend(more);
    arguments.extend(files.iter().map(String::as_str));
    check(folder, &arguments)
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("it was not killed")
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn corpus(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/check").join(part)
}

/// Names in a folder, sorted, of those that end like this.
fn names(folder: &Path, end: &str) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> =
        names.map(|name| name.into_string().unwrap()).filter(|name| name.ends_with(end)).collect();
    names.sort();
    names
}

/// Folders in a folder, sorted.
fn folders(folder: &Path) -> Vec<String> {
    let mut names = names(folder, "");
    names.retain(|name| folder.join(name).is_dir());
    names
}

/// Values of secret keys in files.
fn secrets(folder: &Path, files: &[String]) -> Vec<String> {
    let mut secrets = Vec::new();
    for file in files {
        let bytes = fs::read(folder.join(file)).unwrap();
        for line in String::from_utf8_lossy(&bytes).lines() {
            let Some((key, value)) = line.split_once('=') else { continue };
            let key = key.trim().to_ascii_lowercase();
            if key == "privatekey" || key == "presharedkey" {
                secrets.extend(value.split('#').next().map(|value| value.trim().to_owned()));
            }
        }
    }
    secrets.retain(|secret| secret.len() >= 20);
    secrets
}

/// What a call says, as it is kept; asserts what holds for each.
fn transcript(folder: &Path, files: &[String]) -> String {
    let output = offline(folder, files, &[]);
    let mut text = format!("$ tidegate check {}\n{}", files.join(" "), stdout(&output));
    if !output.stderr.is_empty() {
        write!(text, "--- standard error\n{}", stderr(&output)).unwrap();
    }
    writeln!(text, "--- exit code {}", code(&output)).unwrap();
    let json = offline(folder, files, &["--json"]);
    assert_eq!(code(&json), code(&output), "{files:?}");
    for secret in secrets(folder, files) {
        assert!(!text.contains(&secret[..20]), "{files:?} shows a secret:\n{text}");
        assert!(!stdout(&json).contains(&secret[..20]), "{files:?}: JSON shows a secret");
    }
    assert!(!text.contains(env!("CARGO_MANIFEST_DIR")), "{text}");
    agrees(&text, stdout(&json));
    text
}

/// Whether JSON says what the text says.
fn agrees(text: &str, json: &str) {
    let report: Value = serde_json::from_str(json).unwrap();
    let findings = report["findings"].as_array().unwrap();
    // Lines of text are broken and framed.
    let letters = |text: &str| text.replace(['│', '×', '⚠', '☞'], "").split_whitespace().collect();
    let flat: String = letters(text);
    let mut counts = [0; 3];
    for finding in findings {
        let severity = finding["severity"].as_str().unwrap();
        let kinds = ["error", "warning", "note"];
        counts[kinds.iter().position(|kind| *kind == severity).unwrap()] += 1;
        let is_shown = severity != "note" || counts[0] + counts[1] > 0;
        let message: String = letters(finding["message"].as_str().unwrap());
        assert!(!is_shown || flat.contains(&message), "`{}`\n{text}", finding["message"]);
        let places = finding["places"].as_array().unwrap();
        assert!(!places.is_empty() && !finding["rule"].as_str().unwrap().is_empty());
        for place in places {
            assert!(place["line"].as_u64().unwrap() > 0 && place["column"].as_u64().unwrap() > 0);
        }
        let at = &places[0];
        let at = format!("[{}:{}:", at["file"].as_str().unwrap(), at["line"]);
        assert!(!is_shown || text.contains(&at), "`{at}`\n{text}");
    }
    for (kind, count) in ["errors", "warnings", "notes"].into_iter().zip(counts) {
        assert_eq!(report["counts"][kind], count, "{kind}\n{text}");
    }
}

/// Compares with what was kept beside the corpus.
fn keep(folder: &Path, name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(folder);
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn each_broken_file_is_explained() {
    let folder = corpus("broken");
    let files = names(&folder, ".conf");
    assert!(files.len() >= 40, "only {}", files.len());
    for file in &files {
        let text = transcript(&folder, std::slice::from_ref(file));
        keep(&folder, file.strip_suffix(".conf").unwrap(), &text);
    }
    let snapshots = names(&folder, ".snap");
    let expected: Vec<_> = files.iter().map(|file| file.replace(".conf", ".snap")).collect();
    assert_eq!(snapshots, expected, "each file has one, and no other is left");
}

#[test]
fn each_set_of_files_is_explained() {
    let folder = corpus("pairs");
    let cases = folders(&folder);
    for case in &cases {
        let inside = folder.join(case);
        let files = names(&inside, ".conf");
        assert!(files.len() > 1, "{case} has files to compare");
        keep(&folder, case, &transcript(&inside, &files));
    }
    let expected: Vec<_> = cases.iter().map(|case| format!("{case}.snap")).collect();
    assert_eq!(names(&folder, ".snap"), expected, "each case has one, and no other is left");
}

#[test]
fn each_broken_file_says_what_is_wrong_with_it() {
    let broken = corpus("broken");
    let mut files: Vec<PathBuf> =
        names(&broken, ".conf").iter().map(|name| broken.join(name)).collect();
    for case in folders(&corpus("pairs")) {
        let folder = corpus("pairs").join(case);
        files.extend(names(&folder, ".conf").iter().map(|name| folder.join(name)));
    }
    for file in files {
        let bytes: Vec<u8> = fs::read(&file).unwrap().into_iter().filter(|b| *b != 0).collect();
        let text = String::from_utf8_lossy(&bytes);
        let first = text.trim_start_matches(['\u{feff}', '\u{fffd}']).lines().next().unwrap();
        assert!(first.starts_with("# "), "{}: {first}", file.display());
    }
}

#[test]
fn examples_are_good_together() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let sets = folders(&examples);
    assert!(sets.len() >= 4, "{sets:?}");
    for set in sets {
        let folder = examples.join(&set);
        let output = offline(&folder, &names(&folder, ".conf"), &["--strict"]);
        assert_eq!(code(&output), 0, "{set}: {}", stdout(&output));
        assert!(stdout(&output).contains("nothing wrong"), "{set}: {}", stdout(&output));
    }
}

const KEY: &str = "mAeWHcze+XzBIN9EovEt3UB2KGbTSWHNbBkvWrJHsV8=";
const PEER: &str = "SZOBANQLyekclD9nuKybeOduZ+LIN37etjNWQkub1Ww=";

/// A good file with these lines behind the others.
fn file(more: &str) -> String {
    format!(
        "[Interface]\nPrivateKey = {KEY}\nAddress = 10.9.0.1/24\nListenPort = 51820\n\
         [Peer]\nPublicKey = {PEER}\nAllowedIPs = 10.9.0.2/32\n{more}\n"
    )
}

#[test]
fn exit_codes_tell_errors_from_warnings() {
    let folder = tempfile::tempdir().unwrap();
    let of = |text: &str, options: &[&str]| {
        fs::write(folder.path().join("wg0.conf"), text).unwrap();
        code(&offline(folder.path(), &["./wg0.conf".to_owned()], options))
    };
    let warning = file("Endpoint = 10.9.0.2:1");
    let note = file("").replace("10.9.0.2/32", "0.0.0.0/0");
    assert_eq!(of(&file(""), &["--strict"]), 0);
    assert_eq!(of(&note, &["--strict"]), 0);
    assert_eq!(of(&warning, &[]), 0);
    assert_eq!(of(&warning, &["--strict"]), 6);
    assert_eq!(of(&file("Endpoint = 0.0.0.0:1"), &[]), 3);
    assert_eq!(of(&file("Endpoint"), &["--strict"]), 3);

    let missing = check(folder.path(), &["./wg1.conf", "./wg2.conf"]);
    assert_eq!((code(&missing), stdout(&missing)), (5, ""));
    assert!(stderr(&missing).contains("wg1.conf; there is no ./wg2.conf"), "{}", stderr(&missing));
}

#[test]
fn a_good_file_shows_what_up_would_do_and_notes_only_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("wg0.conf"), file("").replace("10.9.0.2/32", "0.0.0.0/0"))
        .unwrap();
    let files = ["./wg0.conf".to_owned()];
    let plain = offline(folder.path(), &files, &[]);
    let text = stdout(&plain);
    assert!(text.starts_with("`tidegate up ./wg0.conf` would do this:\n[#] tidegate run wg0\n"));
    assert!(text.contains("[#] ip -4 rule add not fwmark 51820 table 51820\n"), "{text}");
    assert!(text.ends_with("nothing wrong, 1 note (shown with -v) in 1 file\n"), "{text}");
    let verbose = offline(folder.path(), &files, &["-v"]);
    assert!(stdout(&verbose).contains("IPv6 does not go through the tunnel"));
}

#[test]
fn a_file_that_cannot_be_read_is_left_out_of_pairs_and_that_is_said() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.conf"), file("")).unwrap();
    fs::write(folder.path().join("b.conf"), file("MTU = x")).unwrap();
    let output = offline(folder.path(), &["./a.conf".to_owned(), "./b.conf".to_owned()], &[]);
    assert_eq!(code(&output), 3);
    let expected = "./b.conf was not compared with the others, for it cannot be read\n";
    assert!(stdout(&output).contains(expected), "{}", stdout(&output));
    assert!(stdout(&output).contains("./a.conf: a with 10.9.0.1/24 · port 51820 · 1 peer"));
}

#[test]
fn colour_is_for_terminals_and_for_who_wants_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("wg0.conf"), file("MTU = x")).unwrap();
    let of = |mode: &str| {
        let mut command = Command::new(TIDEGATE);
        command.args(["check", "--offline", "./wg0.conf"]).current_dir(folder.path());
        stdout(&command.env("WG_COLOR_MODE", mode).output().unwrap()).contains('\u{1b}')
    };
    assert!(of("always") && !of("never") && !of("auto"));
}

/// Messages by rule of what is found in a file, with all that this host says.
fn on_this_host(folder: &Path, prefix: &[&str]) -> Vec<(String, String)> {
    let arguments = ["check", "--json", "./tg-test9.conf"];
    let words: Vec<&str> = prefix.iter().copied().chain([TIDEGATE]).chain(arguments).collect();
    let output = Command::new(words[0]).args(&words[1..]).current_dir(folder).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let findings = report["findings"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    findings.map(|finding| (text(&finding["rule"]), text(&finding["message"]))).collect()
}

/// Writes a file of an interface that is not here, which its owner may read.
fn write(folder: &Path, text: &str) {
    let path = folder.join("tg-test9.conf");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn this_host_is_asked_about_names_ports_tables_and_nics() {
    let folder = tempfile::tempdir().unwrap();
    let taken = UdpSocket::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let rules = |text: &str| {
        write(folder.path(), text);
        let found = on_this_host(folder.path(), &[]);
        found.into_iter().map(|(rule, _)| rule).collect::<Vec<_>>()
    };
    let text = file("Endpoint = no-such-host.invalid:1")
        .replace("51820", &port.to_string())
        .replace("[Peer]", "Table = no-such-table\n#! Xdp = nosuchnic0 mode=udp\n[Peer]");
    assert_eq!(rules(&text), ["port-in-use", "table-unknown", "nic-missing", "name-not-found"]);
    drop(taken);
}

#[test]
fn each_interface_that_is_named_and_missing_is_said_once() {
    let folder = tempfile::tempdir().unwrap();
    let lines = "#! Xdp = lo,nosuchnic0 mode=udp\n\
                 #! Nat = masquerade out=nosuchnic1\n\
                 #! Nat = masquerade out=lo from=10.9.0.2/32\n\
                 #! Forward = tcp nosuchnic1:80 -> 10.9.0.2:80\n\
                 #! Forward = udp nosuchnic2:80 -> 10.9.0.2:80\n\
                 #! Forward = udp tg-test9:80 -> 10.9.0.2:80\n\
                 [Peer]";
    write(folder.path(), &file("").replace("51820", "0").replace("[Peer]", lines));
    let mut found = on_this_host(folder.path(), &[]);
    found.retain(|(rule, _)| rule == "nic-missing");
    let messages: Vec<_> = found.iter().map(|(_, message)| message.as_str()).collect();
    let expected =
        [0, 1, 2].map(|nic| format!("this host has no network interface nosuchnic{nic}"));
    assert_eq!(messages, expected);
}

#[test]
fn the_way_to_an_endpoint_says_which_mtu_fits() {
    let folder = tempfile::tempdir().unwrap();
    let text = file("Endpoint = 127.0.0.1:1").replace("[Peer]", "MTU = 9000\n[Peer]");
    write(folder.path(), &text.replace("51820", "0"));
    // The loopback takes more, and nobody knows without asking.
    assert_eq!(on_this_host(folder.path(), &[]), []);
    let files = ["./tg-test9.conf".to_owned()];
    assert!(stdout(&offline(folder.path(), &files, &[])).contains("do not fit into datagrams"));
    write(folder.path(), &text.replace("51820", "0").replace("9000", "65500"));
    let found = on_this_host(folder.path(), &[]);
    assert!(found[0].1.contains("which is what the way to 127.0.0.1 takes"), "{found:?}");
}

#[test]
fn who_else_may_read_or_change_a_file_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    write(
        folder,
        &file("")
            .replace("51820", "0")
            .replace("10.9.0.2/32", "10.9.0.2/32\nEndpoint = 127.0.0.1:1"),
    );
    for (mode, expected) in [
        (0o600, None),
        (0o640, None),
        (0o644, Some("everybody may read ./tg-test9.conf and the keys in it")),
        (0o660, Some("others than its owner may change ./tg-test9.conf, whose hooks run as root")),
    ] {
        fs::set_permissions(folder.join("tg-test9.conf"), fs::Permissions::from_mode(mode))
            .unwrap();
        let found = on_this_host(folder, &[]);
        let found: Vec<_> = found.iter().map(|(_, message)| message.as_str()).collect();
        assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "{mode:o}");
    }
}

#[test]
fn a_name_that_up_does_not_take_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let name = "a-name-that-is-too-long.conf";
    fs::write(folder.path().join(name), file("")).unwrap();
    let output = check(folder.path(), &[&format!("./{name}")]);
    assert!(stdout(&output).contains("`up` does not take"), "{}", stdout(&output));
    assert!(!stdout(&output).contains("would do this"));
}

#[test]
fn forwarding_firewall_and_networks_of_this_host_are_looked_at() {
    if !may_make_netns() {
        let test = "forwarding_firewall_and_networks_of_this_host_are_looked_at";
        report_skipped(test, "needs root to make namespaces");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let forward = "iptables -t nat -A POSTROUTING -o eth9 -j MASQUERADE";
    let text = file("").replace(
        "[Peer]",
        &format!(
            "PostUp = {forward}\nPostDown = {}\n#! Xdp = eth9\n[Peer]",
            forward.replace("-A", "-D")
        ),
    );
    write(folder.path(), &text);
    // The namespace is gone with the process.
    let within = |script: &str| {
        let script =
            format!("ip link add eth9 type veth peer name eth8 && {script} && exec \"$@\"");
        let found = on_this_host(folder.path(), &["unshare", "-n", "sh", "-c", &script, "sh"]);
        let rules = found.into_iter().map(|(rule, _)| rule);
        rules.filter(|rule| rule != "nat-by-iptables").collect::<Vec<_>>()
    };
    let forwards = |value| format!("echo {value} > /proc/sys/net/ipv4/ip_forward");
    assert_eq!(within(&forwards(1)), [""; 0]);
    assert_eq!(within(&forwards(0)), ["forwarding-off"]);
    let drop = "iptables -A INPUT -p udp --dport 51820 -j DROP";
    assert_eq!(within(&format!("{} && {drop}", forwards(1))), ["firewall-bypassed"]);
    let other = "iptables -A INPUT -p udp --dport 53 -j DROP";
    assert_eq!(within(&format!("{} && {other}", forwards(1))), [""; 0]);
    let lan = "ip address add 10.9.0.77/16 dev eth9";
    assert_eq!(within(&format!("{} && {lan}", forwards(1))), ["network-here"]);
}

/// A file with this many peers.
fn large(peer_count: usize) -> String {
    let mut text =
        format!("[Interface]\nPrivateKey = {KEY}\nAddress = 10.0.0.1/8\nListenPort = 1\n");
    for number in 2..peer_count + 2 {
        let [_, a, b, c] = u32::try_from(number).unwrap().to_be_bytes();
        // The first 40 characters of a key count as they are; 4 of them are this peer's number.
        let key = format!("{number:05}{}", &PEER[5..]);
        writeln!(
            text,
            "[Peer]\n#! Name = peer {number}\nPublicKey = {key}\nAllowedIPs = 10.{a}.{b}.{c}/32, \
             fd09::{number:x}/128\nEndpoint = 192.0.2.1:{number}"
        )
        .unwrap();
    }
    text
}

#[test]
fn ten_thousand_peers_are_no_trouble() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("wg0.conf"), large(10_000)).unwrap();
    let files = ["./wg0.conf".to_owned()];
    let output = offline(folder.path(), &files, &[]);
    assert_eq!(code(&output), 0, "{}", stdout(&output));
    assert!(stdout(&output).contains("nothing wrong"), "{}", stdout(&output));

    // As many findings as peers: some are shown, and all are counted.
    let wrong = large(10_000).replace("Endpoint = 192.0.2.1:", "Endpoint = 10.0.0.1:");
    fs::write(folder.path().join("wg0.conf"), wrong).unwrap();
    let output = offline(folder.path(), &files, &[]);
    let text = stdout(&output);
    assert!(text.contains("… and 9950 more of endpoint-in-tunnel (`--json` has all)"), "{text}");
    assert!(text.ends_with("10000 warnings in 1 file\n"));
}
