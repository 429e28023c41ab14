//! The benchmark itself: very short, with unoptimised programs, and a rival that does not come up.
//!
//! ```text
//!  client: tidegate, lab-tool ══ outer ══ gateway: whoever has the turn ── lan ── host: lab-tool
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xtask::lab::{self, find_program};

const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

/// Where programs are that are built with the tests: `tidegate`, `lab-tool`, and what loads WireGuard itself.
fn programs() -> PathBuf {
    Path::new(XTASK).parent().unwrap().to_owned()
}

fn unavailable(test: &str, needed: &[&str]) -> bool {
    let missing = needed.iter().find(|name| !programs().join(name).is_file());
    let reason = match (lab::unavailable(), missing) {
        (Some(reason), _) => reason,
        (None, Some(name)) => format!("needs {name} in {}", programs().display()),
        (None, None) if find_program("ethtool").is_none() => {
            "needs the program `ethtool`".to_owned()
        }
        (None, None) => return false,
    };
    eprintln!("SKIPPED {test}: {reason}");
    true
}

/// A folder that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("tidegate-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Folder(path)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `cargo xtask bench` with these words; `path` comes before PATH.
fn spawn(words: &str, out: &Path, path: &Path) -> Child {
    let mut all = vec![path.to_owned()];
    all.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut command = Command::new(XTASK);
    command.arg("bench").args(words.split_whitespace()).arg("--out").arg(out);
    command.arg("--programs").arg(programs());
    command.env("PATH", std::env::join_paths(all).unwrap());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The namespaces that a process has made, and not removed.
fn namespaces(pid: u32) -> Vec<String> {
    let Ok(entries) = fs::read_dir("/run/netns") else { return Vec::new() };
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(&format!("tg{pid}-"))).collect()
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

#[test]
fn a_run_has_figures_of_who_works_and_says_why_others_have_none() {
    let test = "a_run_has_figures_of_who_works_and_says_why_others_have_none";
    if unavailable(test, &["tidegate", "lab-tool"]) {
        return;
    }
    let folder = Folder::new("bench");
    let rival = folder.0.join("wireguard-go");
    fs::write(
        &rival,
        "#!/bin/sh\n[ \"$1\" != --version ] || exec echo wireguard-go v9.8.7\n\
         echo '<b>no|luck</b>' >&2\nexit 3\n",
    )
    .unwrap();
    fs::set_permissions(&rival, PermissionsExt::from_mode(0o755)).unwrap();
    let words = "--rounds 1 --only tidegate,tidegate-xdp,wireguard-go,none --rows tcp-up-1 \
                 --length-ms 250";
    let child = spawn(words, &folder.0, &folder.0);
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(namespaces(pid).is_empty());

    let raw: Value = serde_json::from_str(&folder.read("raw.json")).unwrap();
    assert_eq!(raw["command"], format!("cargo xtask bench {words}"));
    let turns = raw["rounds"][0]["turns"].as_array().unwrap();
    let sample = |column: &str, row: &str| {
        let turn = turns.iter().find(|turn| turn["column"] == column).unwrap();
        turn["samples"][row].clone()
    };
    for (column, row) in [
        ("tidegate", "tcp_up_1"),
        ("tidegate-xdp", "tcp_up_1"),
        ("none", "tcp_up_1"),
        ("tidegate", "tcp_up_1_process"),
    ] {
        let value = sample(column, row)["value"].as_f64();
        assert!(value.is_some_and(|value| value > 0.0), "{column}: {row}: {}", sample(column, row));
    }
    if raw["machine"]["core_count"].as_u64().unwrap() > 1 {
        let [process, core] = ["tcp_up_1_process", "tcp_up_1_core"]
            .map(|row| sample("tidegate", row)["value"].as_f64().unwrap());
        // All that the process did is among what its core did, but for ticks and the ends of the load.
        assert!(core > process / 2.0, "core {core}, process {process}");
    }
    assert!(sample("none", "tcp_up_1_process")["not_measured"].is_string());
    for row in ["tcp_up_1", "tcp_up_1_core", "tcp_up_1_process"] {
        let why = sample("wireguard-go", row)["failed"].as_str().unwrap().to_owned();
        assert!(why.contains("does not come up") && why.contains("<b>no|luck</b>"), "{why}");
    }

    let [markdown, html] = ["report.md", "report.html"].map(|name| folder.read(name));
    assert!(text(&output).contains(&markdown), "it is printed, too");
    assert!(markdown.contains("\n| TCP up, 1 stream | Gbit/s ↑ | "), "{markdown}");
    assert!(markdown.contains(" | failed [1] | "), "{markdown}");
    assert!(
        markdown.contains("wireguard-go 9.8.7 failed: ") && markdown.contains(r"no\|luck"),
        "{markdown}"
    );
    assert!(html.contains("&lt;b&gt;no|luck&lt;/b&gt;") && !html.contains("<b>no"), "{html}");

    // The same reports come of the file alone.
    fs::remove_file(folder.0.join("report.md")).unwrap();
    let mut again = Command::new(XTASK);
    again.arg("bench").arg("--from").arg(folder.0.join("raw.json"));
    assert!(again.output().unwrap().status.success());
    assert_eq!((folder.read("report.md"), folder.read("report.html")), (markdown, html));
}

#[test]
fn floods_echoes_and_handshakes_are_measured() {
    let test = "floods_echoes_and_handshakes_are_measured";
    if unavailable(test, &["tidegate", "lab-tool", "tidegate-load"]) {
        return;
    }
    let folder = Folder::new("bench-load");
    let words = "--rounds 1 --only tidegate,none --rows echo,flood-64,handshakes --length-ms 300";
    let output = spawn(words, &folder.0, &folder.0).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let raw: Value = serde_json::from_str(&folder.read("raw.json")).unwrap();
    let turns = raw["rounds"][0]["turns"].as_array().unwrap();
    let [ours, none] = ["tidegate", "none"].map(|column| {
        let turn = turns.iter().find(|turn| turn["column"] == column).unwrap();
        turn["samples"].as_object().unwrap().clone()
    });
    for id in ["echo_idle_p50", "echo_load_p99", "flood_64", "flood_64_process", "handshakes"] {
        assert!(ours[id]["value"].as_f64().is_some_and(|value| value > 0.0), "{}", ours[id]);
        let is_echo = id.starts_with("echo");
        assert_eq!(none[id]["value"].is_number(), is_echo, "{}", none[id]);
    }
    let value = |id: &str| ours[id]["value"].as_f64().unwrap();
    assert!(value("echo_idle_p50") <= value("echo_idle_p99"));
}

#[test]
fn an_interrupted_run_leaves_nothing_behind() {
    if unavailable("an_interrupted_run_leaves_nothing_behind", &["tidegate", "lab-tool"]) {
        return;
    }
    let folder = Folder::new("bench-interrupted");
    let words = "--rounds 1 --only tidegate --rows tcp-up-1 --length-ms 60000";
    let mut child = spawn(words, &folder.0, &folder.0);
    let end = Instant::now() + Duration::from_secs(20);
    while namespaces(child.id()).len() < 3 {
        assert!(Instant::now() < end, "no namespaces");
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(Duration::from_millis(700));
    let pid = child.id();
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output).contains("interrupted"), "{}", text(&output));
    assert!(namespaces(pid).is_empty());
    assert!(!std::env::temp_dir().join(format!("tg{pid}-0.lab")).exists());
    // No round is complete, so there is nothing to be told.
    assert_eq!(folder.read("raw.json"), "");
    assert!(!folder.0.join("report.md").exists());
}
