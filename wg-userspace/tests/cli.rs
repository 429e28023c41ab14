//! The program as its users meet it: arguments and files in; exit code, text and errors out.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::{
    io::{Read, Seek, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    process::{Command, Output, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

use wg_userspace::{
    key::PublicKey,
    sys::netns::{may_make_netns, report_skipped},
};

const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");

fn tidegate(arguments: &[&str]) -> Output {
    Command::new(TIDEGATE).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn with_input(program: &str, argument: &str, input: &str) -> Output {
    let mut child = Command::new(program)
        .arg(argument)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("it was not killed")
}

/// Says by name why a test is left out; true if it is.
fn skips(test: &str, missing: Option<&str>) -> bool {
    if let Some(missing) = missing {
        report_skipped(test, missing);
    }
    missing.is_some()
}

fn without_root() -> Option<&'static str> {
    (!may_make_netns()).then_some("needs root to make namespaces")
}

fn without_wg() -> Option<&'static str> {
    Command::new("wg").arg("--version").output().is_err().then_some("needs wg(8)")
}

#[test]
fn keys_are_those_of_wg() {
    if skips("keys_are_those_of_wg", without_wg()) {
        return;
    }
    let private = tidegate(&["genkey"]);
    assert_eq!(code(&private), 0);
    let ours = with_input(TIDEGATE, "pubkey", stdout(&private));
    let theirs = with_input("wg", "pubkey", stdout(&private));
    assert_eq!(code(&ours), 0, "{}", stderr(&ours));
    assert_eq!(stdout(&ours), stdout(&theirs));

    let preshared = tidegate(&["genpsk"]);
    assert_eq!(stdout(&preshared).len(), stdout(&private).len());
    assert_ne!(stdout(&preshared), stdout(&private));
    assert_ne!(stdout(&tidegate(&["genkey"])), stdout(&private));
}

#[test]
fn a_bad_key_on_standard_input_is_refused_but_not_shown() {
    for input in ["", "SHORTSECRET", "not/base64/!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!="] {
        let output = with_input(TIDEGATE, "pubkey", input);
        assert_eq!(code(&output), 1);
        assert!(stdout(&output).is_empty());
        assert!(stderr(&output).starts_with("tidegate: standard input: "), "{}", stderr(&output));
        assert!(!stderr(&output).contains("SECRET") && !stderr(&output).contains("base64/"));
    }
}

#[test]
fn a_secret_in_a_file_for_everybody_is_warned_of() {
    for (mode, is_warned) in [(0o644, true), (0o600, false)] {
        let mut file = tempfile::tempfile().unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
        let output = Command::new(TIDEGATE)
            .arg("genkey")
            .stdout(file.try_clone().unwrap())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
            .wait_with_output()
            .unwrap();
        assert_eq!(code(&output), 0);
        assert_eq!(stderr(&output).contains("everybody may read"), is_warned, "{mode:o}");
        let mut key = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut key).unwrap();
        assert_eq!(key.len(), 45);
    }
}

#[test]
fn wrong_usage_has_a_code_of_its_own() {
    for arguments in [&["run"][..], &["up"], &["fly"], &["run", "wg0", "--mode", "generic"]] {
        let output = tidegate(arguments);
        assert_eq!(code(&output), 2, "{arguments:?}");
        assert!(stdout(&output).is_empty() && !stderr(&output).is_empty());
    }
    assert_eq!(code(&tidegate(&["--help"])), 0);
    assert_eq!(code(&tidegate(&["--version"])), 0);
}

/// Runs `up` on a file `test.conf` with this text.
fn up(text: &str) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("test.conf");
    std::fs::write(&path, text).unwrap();
    tidegate(&["up", path.to_str().unwrap()])
}

const INTERFACE: &str = "[Interface]\nPrivateKey = SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=\n";

#[test]
fn every_error_of_a_config_is_shown_with_its_position() {
    let peer = "[Peer]\nPublicKey = short\nAllowedIPs = 10.0.0.2/32, 10.0.0.0/33\n";
    let output = up(&format!("{INTERFACE}Adress = 10.0.0.1/24\n\n{peer}"));
    let errors = stderr(&output);
    assert_eq!(code(&output), 3, "{errors}");
    for position in ["test.conf:3:", "test.conf:6:13", "test.conf:7:"] {
        assert!(errors.contains(position), "{position} in {errors}");
    }
    assert!(!errors.contains("SEhISEhI"), "no key is shown: {errors}");
    assert!(stdout(&output).is_empty());
}

#[test]
fn what_comes_later_is_refused_with_its_position() {
    for line in ["#! Metrics = [::1]:9586", "#! Xdp = eth0 queues=2"] {
        let output = up(&format!("{INTERFACE}{line}\n"));
        let errors = stderr(&output);
        assert_eq!(code(&output), 3, "{line}: {errors}");
        assert!(errors.contains("test.conf:3:"), "{line}: {errors}");
        assert!(errors.contains("not supported yet"), "{line}: {errors}");
    }
}

#[test]
fn what_does_not_exist_has_a_code_of_its_own() {
    let missing = format!("tg{}", std::process::id());
    for command in ["up", "down", "show", "quiesce"] {
        let output = tidegate(&[command, &missing]);
        assert_eq!(code(&output), 5, "{command}: {}", stderr(&output));
        assert!(stderr(&output).contains(&missing), "{}", stderr(&output));
    }
}

#[test]
fn a_file_must_be_named_like_an_interface() {
    for word in ["./x.txt", "/tmp/this-name-is-too-long.conf"] {
        for command in ["up", "down"] {
            let output = tidegate(&[command, word]);
            assert_eq!(code(&output), 2, "{command} {word}");
            assert!(stderr(&output).contains("name"), "{}", stderr(&output));
        }
    }
}

/// Answers `get=1` on a socket as a daemon would, and one that gives its status says of a pause that
/// two workers stand still; says to anything else that it is invalid.
struct MockDaemon {
    dir: tempfile::TempDir,
}

impl MockDaemon {
    fn start(answer: String, status: Option<&'static str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("wg0.sock")).unwrap();
        // Ends with the test's process; nobody waits for it.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = Vec::new();
                let mut byte = [0];
                while !request.ends_with(b"\n\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
                    request.push(byte[0]);
                }
                let answer = match (request.as_slice(), status) {
                    (b"get=1\n\n", _) => format!("{answer}errno=0\n\n"),
                    (b"tidegate=status\n\n", Some(json)) => format!("{json}\nerrno=0\n\n"),
                    (b"tidegate=resume\n\n", Some(_)) => "errno=0\n\n".to_owned(),
                    (b"tidegate=quiesce\n\n", Some(_)) => {
                        "{\"stuck_workers\":2}\nerrno=0\n\n".to_owned()
                    }
                    // A probe connects and hangs up.
                    (b"", _) => String::new(),
                    _ => "errno=-22\n\n".to_owned(),
                };
                // Whoever does not read it has gone.
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        Self { dir }
    }

    /// Runs a shell command where this is the only daemon of the host.
    fn shell(&self, command: &str) -> Output {
        let dir = self.dir.path().display();
        let script = format!(
            "exec 3<{dir}; mount -t tmpfs tidegate-test /run && mkdir /run/wireguard && \
             mount --bind /proc/self/fd/3 /run/wireguard && {command}"
        );
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--net", "sh", "-c", &script]).env("TIDEGATE", TIDEGATE);
        let output = unshare.output().unwrap();
        assert_eq!(code(&output), 0, "{command}: {}", stderr(&output));
        output
    }
}

/// A device with peers of every kind, as a daemon describes it.
fn device() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let key = |byte: u8| format!("{byte:02x}").repeat(32);
    let peers = [
        format!("preshared_key={}\nlast_handshake_time_sec=0\nrx_bytes=0\ntx_bytes=0\n", key(0)),
        format!(
            "preshared_key={}\nendpoint=[fd00::1]:51820\nlast_handshake_time_sec={}\n\
             last_handshake_time_nsec=5\ntx_bytes=1023\nrx_bytes=1024\n\
             persistent_keepalive_interval=25\nallowed_ip=10.0.0.0/24\nallowed_ip=fd00::/64\n",
            key(0x22),
            now - 3_700
        ),
        format!(
            "endpoint=10.0.0.1:1\nlast_handshake_time_sec={}\ntx_bytes=1048576\nrx_bytes=0\n\
             persistent_keepalive_interval=3661\nallowed_ip=0.0.0.0/0\n",
            now - 90_061
        ),
        // A handshake of the future: the clock was set back.
        format!(
            "last_handshake_time_sec={}\ntx_bytes=1099511627776\nrx_bytes=5368709120\n",
            now + 1_000
        ),
        format!("last_handshake_time_sec={}\nrx_bytes=53\n", now - 800 * 86_400),
        "allowed_ip=10.1.0.0/24\n".to_owned(),
    ];
    let mut text = format!("private_key={}\nlisten_port=51820\nfwmark=51820\n", key(0x48));
    for (number, lines) in (1..).zip(peers) {
        text += &format!("public_key={}\n{lines}protocol_version=1\n", key(number));
    }
    text
}

#[test]
fn show_prints_what_wg_show_prints() {
    if skips("show_prints_what_wg_show_prints", without_root().or(without_wg())) {
        return;
    }
    let daemon = MockDaemon::start(device(), None);
    for environment in [
        "",
        "WG_COLOR_MODE=always",
        "WG_COLOR_MODE=never",
        "WG_COLOR_MODE=auto",
        "WG_COLOR_MODE=Always",
        "WG_HIDE_KEYS=never",
        "WG_HIDE_KEYS=always",
        "WG_HIDE_KEYS=Never",
        "WG_COLOR_MODE=always WG_HIDE_KEYS=never",
    ] {
        for what in ["show", "show wg0", "show interfaces"] {
            let print = |program: &str| {
                let output = daemon.shell(&format!("{environment} {program} {what}"));
                stdout(&output).to_owned()
            };
            let (mut ours, mut theirs) = (print("\"$TIDEGATE\""), print("wg"));
            // A second may end between the two: ask again.
            for _ in 0..5 {
                if ours != theirs {
                    (ours, theirs) = (print("\"$TIDEGATE\""), print("wg"));
                }
            }
            assert!(theirs.contains("wg0"), "{theirs}");
            assert_eq!(ours, theirs, "{environment} {what}");
        }
    }
}

#[test]
fn show_has_the_data_path_and_json() {
    if skips("show_has_the_data_path_and_json", without_root()) {
        return;
    }
    let status = r#"{"mode":"native","reason":"asked for","workers":2,
        "quiesced":{"seconds_left":90},"sessions_cleared":{"slept":1},
        "nics":[{"name":"eth0","queues":2,"zero_copy":false}],
        "drops":{"replay":3},"steer":{"steered":9},"paths":{"xsk":7,"socket":1}}"#;
    let daemon = MockDaemon::start(device(), Some(status));
    let text = daemon.shell("\"$TIDEGATE\" show wg0");
    for line in [
        "\n  data path: native, eth0 (2 queues, copy), 2 workers: asked for\n",
        "\n  received by: socket 1, xsk 7\n",
        "\n  steer: steered 9\n",
        "\n  drops: replay 3\n",
        "\n  quiesced: for 1 minute, 30 seconds\n",
        "\n  sessions cleared: slept 1\n",
    ] {
        assert!(stdout(&text).contains(line), "{line} in {}", stdout(&text));
    }
    let json = daemon.shell("\"$TIDEGATE\" show --json");
    let json: serde_json::Value = serde_json::from_str(stdout(&json)).unwrap();
    let interface = &json["interfaces"][0];
    assert_eq!(interface["name"], "wg0");
    assert_eq!(interface["listen_port"], 51820);
    assert_eq!(interface["data_path"]["drops"]["replay"], 3);
    assert_eq!(interface["data_path"]["nics"][0]["queues"], 2);
    assert_eq!(interface["peers"].as_array().unwrap().len(), 6);
    let peer = &interface["peers"][1];
    assert_eq!(peer["endpoint"], "[fd00::1]:51820");
    assert_eq!(peer["rx_bytes"], 1024);
    assert_eq!(peer["has_preshared_key"], true);
    assert!(!json.to_string().contains("private_key"), "no secret key is shown: {json}");
}

#[test]
fn show_has_names_and_what_is_wrong() {
    if skips("show_has_names_and_what_is_wrong", without_root()) {
        return;
    }
    let key = |byte: u8| PublicKey::from_bytes([byte; 32]).to_string();
    let status = serde_json::json!({
        "mode": "udp", "workers": 1, "drops": { "no_peer": 2, "later_reason": 1 }, "more_troubles": 3,
        "troubles": [
            { "kind": "no_peer", "count": 2, "since_s": 9, "last_s": 1, "address": "10.8.0.1" },
            { "peer": key(2), "kind": "initiations_unanswered", "count": 8, "since_s": 40, "last_s": 2 },
            { "peer": key(4), "kind": "source_not_allowed", "count": 1, "since_s": 0, "last_s": 0,
              "address": "10.9.0.7", "public_key": key(2) },
            { "peer": key(9), "kind": "no_endpoint", "count": 1, "since_s": 0, "last_s": 0 },
        ],
    });
    let named = device().replace(
        &format!("public_key={}\n", "02".repeat(32)),
        &format!("public_key={}\ntidegate_name=laptop\n", "02".repeat(32)),
    );
    let daemon = MockDaemon::start(named, Some(status.to_string().leak()));
    let text = daemon.shell("\"$TIDEGATE\" status wg0");
    let text = stdout(&text);
    for part in [
        "\n  drops: later_reason 1, no_peer 2\n    no_peer: to addresses that no peer's AllowedIPs have\n",
        "\n  trouble: 2 packets dropped, the last 1 second ago to 10.8.0.1: no peer has it in its AllowedIPs\n",
        "\n  not listed: 3 more troubles with peers\n",
        &format!("\npeer: {}\n  name: laptop\n", key(2)),
        "\n  trouble: initiations unanswered for 40 seconds: its endpoint is wrong, the port is closed there, \
         or our public key is unknown there\n",
        "\n  trouble: 1 packet dropped, just now: it sends from 10.9.0.7, which AllowedIPs give to laptop\n",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("no endpoint"), "who is no peer is in no trouble: {text}");
    let json = daemon.shell("\"$TIDEGATE\" show --json");
    let json: serde_json::Value = serde_json::from_str(stdout(&json)).unwrap();
    let interface = &json["interfaces"][0];
    assert_eq!(interface["more_troubles"], 3);
    assert_eq!(interface["troubles"][0]["kind"], "no_peer");
    let laptop =
        interface["peers"].as_array().unwrap().iter().find(|peer| peer["name"] == "laptop");
    let trouble = &laptop.unwrap()["troubles"][0];
    assert_eq!((&trouble["count"], &trouble["since_s"]), (&8.into(), &40.into()));
    assert!(
        trouble["text"].as_str().unwrap().starts_with("initiations unanswered for 40 seconds: ")
    );
}

#[test]
fn quiesce_says_what_it_could_not_do() {
    if skips("quiesce_says_what_it_could_not_do", without_root()) {
        return;
    }
    let daemon = MockDaemon::start(device(), Some("{}"));
    let stuck = daemon.shell("{ \"$TIDEGATE\" quiesce wg0; test $? = 6; }");
    assert!(
        stderr(&stuck).contains("wg0: quiesced, but 2 workers do not move"),
        "{}",
        stderr(&stuck)
    );
    daemon.shell("\"$TIDEGATE\" quiesce wg0 --resume");
    let other = MockDaemon::start(device(), None);
    let refused = other.shell("{ \"$TIDEGATE\" quiesce wg0; test $? = 1; }");
    assert!(stderr(&refused).contains("does not do that"), "{}", stderr(&refused));
}

#[test]
fn nothing_to_show_is_no_error() {
    if skips("nothing_to_show_is_no_error", without_root()) {
        return;
    }
    let daemon = MockDaemon { dir: tempfile::tempdir().unwrap() };
    // Left behind by a daemon that was killed.
    drop(UnixListener::bind(daemon.dir.path().join("wg0.sock")).unwrap());
    let shown = daemon.shell("\"$TIDEGATE\" show && \"$TIDEGATE\" show interfaces");
    assert!(shown.stdout.is_empty() && shown.stderr.is_empty());
    let one = daemon.shell("{ \"$TIDEGATE\" show wg0; test $? = 5; }");
    assert!(stderr(&one).contains("wg0.sock"), "{}", stderr(&one));
}
