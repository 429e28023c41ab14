//! Peers come and go by their names: in files, and in an interface that is up.
//!
//! ```text
//!  client                      gateway                            host
//!  Tidegate ═ outer (veth) ═ tidegate up NAME.conf, peer add ═ lan (veth) ═ tidegate up, by what
//!  10.9.0.2, fd09::2           10.9.0.1, fd09::1                            `peer add` has printed
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    collections::BTreeSet,
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use common::{Daemon, LIMIT, UDP, tidegate};
use ipnet::IpNet;
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;
use wg_userspace::{
    check::{self, Severity, Subject},
    config::{self, Config},
};
use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER},
    lab::{self, Lab, Space},
};

const FILE: &str = "\
    # The office.\n\
    [Interface]\n\
    PrivateKey = IBwCMKG0IAvhlcZPDahVK2eDM/zI9yt7lBt7QJh8l1E= # ours\n\
    Address = 10.9.0.1/24, fd09::1/64\n\
    ListenPort = 51820\n\
    MTU = 1400\n\
    #! Endpoint = gw.example.org:51820\n\
    \n\
    # Anna, since May\n\
    [Peer]\n\
    #! Name = laptop\n\
    PublicKey = Dxb2eCff3wMzKu1p6E3nSAuuVwHtZ+tfrfHK1wXNl00=\n\
    allowedips=10.9.0.2/32 ,fd09::2/128\n";

/// A file of an interface that is not up.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new(text: &str) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        fs::write(folder.file(), text).unwrap();
        fs::set_permissions(folder.file(), Permissions::from_mode(0o640)).unwrap();
        folder
    }

    fn file(&self) -> PathBuf {
        // Sockets of interfaces are in one place for all.
        self.0.path().join(format!("p{}.conf", std::process::id()))
    }

    fn text(&self) -> String {
        fs::read_to_string(self.file()).unwrap()
    }

    fn command(&self, verb: &str, rest: &[&str]) -> Command {
        let mut command = Command::new(tidegate());
        command.args(["peer", verb]).arg(self.file()).args(rest).current_dir(&self.0);
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, verb: &str, rest: &[&str]) -> Output {
        self.command(verb, rest).output().unwrap()
    }

    fn succeeds(&self, verb: &str, rest: &[&str]) -> String {
        printed(&self.run(verb, rest))
    }

    fn fails(&self, code: i32, verb: &str, rest: &[&str]) -> String {
        let output = self.run(verb, rest);
        assert_eq!(output.status.code(), Some(code), "{rest:?}: {}", errors(&output));
        assert!(output.stdout.is_empty());
        errors(&output)
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What a command printed that worked.
fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{}", errors(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn read(text: &str) -> Config {
    config::parse("file.conf", text).unwrap_or_else(|errors| panic!("{errors}:\n{text}"))
}

fn addresses(config: &Config) -> Vec<IpNet> {
    config.interface.addresses.iter().map(|net| net.value).collect()
}

#[test]
fn a_peer_gets_a_file_that_fits_and_leaves_no_trace() {
    let folder = Folder::new(FILE);
    let output = folder.run("add", &["Büro 3", "--psk", "--dns", "10.9.0.1,corp.example"]);
    let text = printed(&output);
    let (ours, theirs) = (read(&folder.text()), read(&text));
    assert!(folder.text().starts_with(FILE), "all else stays");
    assert_eq!(folder.file().metadata().unwrap().permissions().mode() & 0o777, 0o640);
    let peer = &ours.peers[1];
    assert_eq!(peer.name.as_ref().unwrap().value, "Büro 3");
    assert_eq!(*peer.public_key, theirs.interface.private_key.public_key());
    let allowed: Vec<String> = peer.allowed_ips.iter().map(|net| net.value.to_string()).collect();
    assert_eq!(allowed, ["10.9.0.3/32", "fd09::3/128"]);
    assert_eq!(addresses(&theirs), ["10.9.0.3/24", "fd09::3/64"].map(|net| net.parse().unwrap()));
    assert_eq!(theirs.interface.mtu.as_deref(), Some(&1400));
    assert_eq!(theirs.interface.dns.len(), 2);
    assert_eq!(*theirs.peers[0].public_key, ours.interface.private_key.public_key());
    assert_eq!(theirs.peers[0].preshared_key.as_deref(), peer.preshared_key.as_deref());
    assert!(peer.preshared_key.is_some());
    let endpoint = theirs.peers[0].endpoint.as_deref().unwrap();
    assert_eq!(endpoint.to_string(), "gw.example.org:51820");
    assert_eq!(theirs.peers[0].persistent_keepalive.as_deref(), Some(&25));

    let subjects = [("office", &ours), ("buero", &theirs)];
    let subjects = subjects.map(|(name, config)| Subject { name, config });
    let mut findings = check::together(&subjects);
    for (index, subject) in subjects.iter().enumerate() {
        findings.extend(check::alone(subject, index));
    }
    findings.retain(|finding| finding.severity == Severity::Error);
    assert!(findings.is_empty(), "{findings:?}");

    let private = theirs.interface.private_key.to_base64();
    assert!(!folder.text().contains(&*private) && !errors(&output).contains(&*private));
    assert!(errors(&output).contains("added Büro 3: 10.9.0.3, fd09::3"), "{}", errors(&output));

    let removed = folder.run("remove", &["Büro 3"]);
    assert_eq!(printed(&removed), "");
    assert_eq!(folder.text(), FILE);
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn what_cannot_be_done_changes_nothing() {
    let folder = Folder::new(FILE);
    fs::write(folder.0.path().join("there"), "before").unwrap();
    let key = "Dxb2eCff3wMzKu1p6E3nSAuuVwHtZ+tfrfHK1wXNl00=";
    for (code, verb, rest, word) in [
        (5, "add", &["laptop"][..], ":11: there is a peer called `laptop` already"),
        (5, "add", &["phone", "--public-key", key], ":12: `laptop` has this key already"),
        (5, "add", &["phone", "--allowed-ips", "10.9.0.2"], "`laptop` has 10.9.0.2/32 already"),
        (5, "add", &["phone", "--out", "there"], "there exists already"),
        (2, "add", &["no #1"], "no `#`"),
        (2, "add", &["phone", "--allowed-ips", "10.8.0.0/16"], "no address of the peer's own"),
        (5, "remove", &["phone"], "there is no peer `phone`"),
    ] {
        let said = folder.fails(code, verb, rest);
        assert!(said.contains(word), "{rest:?}: {said}");
        assert_eq!(folder.text(), FILE);
    }
    assert_eq!(fs::read_to_string(folder.0.path().join("there")).unwrap(), "before");

    fs::write(folder.file(), FILE.replace("#! Endpoint", "# Endpoint")).unwrap();
    assert!(folder.fails(2, "add", &["phone"]).contains("--endpoint HOST`"));
    fs::write(folder.file(), FILE.replace("10.9.0.1/24", "10.9.0.1/30")).unwrap();
    assert!(folder.fails(5, "add", &["phone"]).contains("10.9.0.0/30 is full"));
    fs::write(folder.file(), FILE.replace("Address", "Adress")).unwrap();
    assert!(folder.fails(3, "add", &["phone"]).contains("did you mean `Address`?"));
    fs::remove_file(folder.file()).unwrap();
    for verb in ["add", "remove"] {
        assert!(folder.fails(5, verb, &["phone"]).contains("there is no /"));
    }
}

#[test]
fn a_peer_whose_key_cannot_be_printed_is_not_added() {
    let folder = Folder::new(FILE);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = folder.command("add", &["phone"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("the peer was removed again"), "{}", errors(&output));
    assert_eq!(folder.text(), FILE);
}

#[test]
fn a_dry_run_shows_the_lines_and_makes_nothing() {
    let folder = Folder::new(FILE);
    let said = folder.succeeds("add", &["phone", "--psk", "--dry-run"]);
    assert_eq!(
        said,
        "[Peer]\n#! Name = phone\nPublicKey = (that of a new private key)\n\
         PresharedKey = (a new one)\nAllowedIPs = 10.9.0.3/32, fd09::3/128\n"
    );
    let said = folder.succeeds("remove", &["laptop", "--dry-run"]);
    assert!(said.starts_with("- peer laptop (Dxb2eCff"), "{said}");
    assert_eq!(folder.text(), FILE);
}

#[test]
fn a_file_for_the_peer_is_its_owners() {
    let folder = Folder::new(FILE);
    assert_eq!(folder.succeeds("add", &["phone", "--route-all", "--out", "phone.conf"]), "");
    let path = folder.0.path().join("phone.conf");
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let theirs = read(&fs::read_to_string(path).unwrap());
    let routes: Vec<_> =
        theirs.peers[0].allowed_ips.iter().map(|net| net.value.to_string()).collect();
    assert_eq!(routes, ["0.0.0.0/0", "::/0"]);
    // Who brings a key gets no other.
    let key = "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=";
    let said = folder.succeeds("add", &["tablet", "--public-key", key]);
    assert!(said.contains(&format!("; its public key is {key})")), "{said}");
    assert!(!said.contains("\nPrivateKey"), "{said}");
    folder.succeeds("remove", &[key]);
    let listed = folder.succeeds("list", &[]);
    assert_eq!(listed.lines().count(), 2);
    assert!(listed.contains("phone   10.9.0.3/32, fd09::3/128"), "{listed}");
    let json: Value = serde_json::from_str(&folder.succeeds("list", &["--json"])).unwrap();
    assert_eq!(json["peers"][0]["name"], "laptop");
    assert_eq!(json["peers"][1]["allowed_ips"][0], "10.9.0.3/32");
    assert_eq!(json["is_up"], false);
}

#[test]
fn a_qr_code_holds_the_peers_file() {
    let folder = Folder::new(FILE);
    let shown = folder.succeeds("add", &["phone", "--qr", "--psk"]);
    let rows: Vec<Vec<char>> = shown.lines().map(|line| line.chars().collect()).collect();
    const SCALE: usize = 3;
    let (width, height) = (rows[0].len(), 2 * rows.len());
    let mut image =
        rqrr::PreparedImage::prepare_from_greyscale(SCALE * width, SCALE * height, |x, y| {
            let (x, y) = (x / SCALE, y / SCALE);
            let is_light = match rows[y / 2][x] {
                '█' => true,
                '▀' => y % 2 == 0,
                '▄' => y % 2 == 1,
                _ => false,
            };
            if is_light { 255 } else { 0 }
        });
    let grids = image.detect_grids();
    let (_, text) = grids[0].decode().unwrap();
    let (ours, theirs) = (read(&folder.text()), read(&text));
    assert_eq!(*ours.peers[1].public_key, theirs.interface.private_key.public_key());
    assert_eq!(addresses(&theirs)[0].to_string(), "10.9.0.3/24");
}

#[test]
fn peers_that_are_added_at_the_same_moment_get_addresses_of_their_own() {
    let folder = Folder::new(FILE);
    let names: Vec<String> = (0..8).map(|number| format!("phone {number}")).collect();
    let running: Vec<_> = names
        .iter()
        .map(|name| {
            let mut command = folder.command("add", &[name]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let mut seen = BTreeSet::new();
    for child in running {
        let text = printed(&child.wait_with_output().unwrap());
        assert!(seen.insert(addresses(&read(&text))[0].to_string()));
    }
    let expected = (3..11).map(|number| format!("10.9.0.{number}/24"));
    assert_eq!(seen, expected.collect());
    let ours = read(&folder.text());
    assert_eq!(ours.peers.len(), 9);
    for name in &names {
        folder.succeeds("remove", &[name]);
    }
    assert_eq!(folder.text(), FILE);
}

/// An interface that was brought up by its file.
struct End<'a> {
    space: &'a Space,
    interface: String,
    file: PathBuf,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        let _ = self.tidegate(&["down", self.path()]);
    }
}

impl<'a> End<'a> {
    fn up(lab: &'a Lab, space: &'a Space, suffix: char, text: &str) -> End<'a> {
        let interface = lab.interface(suffix);
        let file = lab.write(&format!("{interface}.conf"), text).unwrap();
        let end = End { space, interface, file };
        end.succeeds(&["up", end.path(), "--mode", "udp"]);
        end
    }

    fn path(&self) -> &str {
        self.file.to_str().unwrap()
    }

    fn tidegate(&self, arguments: &[&str]) -> Output {
        self.space.command(tidegate()).args(arguments).output().unwrap()
    }

    fn succeeds(&self, arguments: &[&str]) -> String {
        printed(&self.tidegate(arguments))
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.file).unwrap()
    }

    /// The peers of `wg show IF dump`: key, preshared key, endpoint, allowed IPs, handshake, …
    fn peers(&self) -> Vec<Vec<String>> {
        let text = self.space.run("wg", &["show", &self.interface, "dump"]).unwrap();
        let lines = text.lines().skip(1);
        lines.map(|line| line.split('\t').map(str::to_owned).collect()).collect()
    }
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
    answers(&lab.client);
    client
}

fn answers(space: &Space) {
    let answer = lab::wait_for("an answer", LIMIT, || {
        let ping = space.ping(GATEWAY_INNER[0], 1, &["-W", "1"]);
        Ok(ping.is_ok_and(|ping| ping.answered == 1).then_some(()))
    });
    answer.unwrap();
}

#[test]
fn a_peer_comes_and_goes_and_the_others_lose_nothing() {
    let Some(lab) = lab("a_peer_comes_and_goes_and_the_others_lose_nothing") else { return };
    let gateway = End::up(&lab, &lab.gateway, 'g', GATEWAY_CONF);
    let _client = client(&lab);
    let before = gateway.peers();
    let mut ping = lab.client.command("ping");
    ping.args(["-n", "-q", "-i", "0.005", "-c", "600", "-W", "2", GATEWAY_INNER[0]]);
    let ping = lab.client.spawn("ping", &mut ping).unwrap();

    let endpoint = ["--endpoint", "192.168.20.1", "--psk"];
    let arguments = [&["peer", "add", gateway.path(), "Büro 3"], &endpoint[..]].concat();
    let added = gateway.tidegate(&arguments);
    let text = printed(&added);
    assert!(errors(&added).contains("+ peer Büro 3 ("), "{}", errors(&added));
    assert_eq!(gateway.peers().len(), 2);

    // The host knows another way to the tunnel's addresses.
    lab.host.ip("route del 10.9.0.0/24").unwrap();
    lab.host.ip("-6 route del fd09::/64").unwrap();
    let host = End::up(&lab, &lab.host, 'h', &text);
    answers(&lab.host);
    common::assert_answered(&lab.host, &GATEWAY_INNER);
    let key = read(&text).interface.private_key.public_key().to_string();
    assert!(gateway.peers().iter().any(|peer| peer[0] == key && peer[4] != "0"), "no handshake");
    let listed = gateway.succeeds(&["peer", "list", &gateway.interface]);
    let line = listed.lines().find(|line| line.starts_with("Büro 3  10.9.0.3/32, fd09::3/128"));
    assert!(line.is_some_and(|line| line.contains("  handshake ")), "{listed}");

    // By the interface's name, too: it is up by that file.
    let removed = gateway.tidegate(&["peer", "remove", &gateway.interface, "Büro 3"]);
    printed(&removed);
    assert_eq!(gateway.text(), GATEWAY_CONF);
    assert_eq!(gateway.peers().len(), 1);
    assert_eq!(lab.host.ping(GATEWAY_INNER[0], 2, &["-W", "1"]).unwrap().answered, 0);
    drop(host);

    let said = ping.finish(Duration::from_secs(30)).unwrap();
    assert!(said.contains("600 packets transmitted, 600 received"), "{said}");
    assert_eq!(before[0][..5], gateway.peers()[0][..5], "its endpoint and handshake are the same");
    let reloaded = gateway.succeeds(&["reload", gateway.path()]);
    assert!(reloaded.ends_with(": nothing to do\n"), "{reloaded}");
}

#[test]
fn an_interface_that_cannot_follow_keeps_its_file() {
    let Some(lab) = lab("an_interface_that_cannot_follow_keeps_its_file") else { return };
    let gateway = End::up(&lab, &lab.gateway, 'g', GATEWAY_CONF);
    let before = gateway.peers();
    let add = |path: &str| {
        gateway.tidegate(&["peer", "add", path, "phone", "--endpoint", "198.51.100.1"])
    };
    let refused = |code: i32, word: &str| {
        let output = add(gateway.path());
        assert_eq!(output.status.code(), Some(code), "{}", errors(&output));
        assert!(errors(&output).contains(word), "{}", errors(&output));
        assert!(output.stdout.is_empty(), "its key is of no use");
        assert_eq!(gateway.text(), GATEWAY_CONF);
    };
    // Somebody else changes the interface.
    let state = format!("/run/tidegate/{}.state", gateway.interface);
    let held = File::open(state).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    refused(5, "the file was put back");
    drop(held);
    assert_eq!(gateway.peers(), before);

    // Another file of the same name is not the one by which it is up.
    fs::create_dir(lab.path("copy")).unwrap();
    let copy = lab.path("copy").join(Path::new(gateway.path()).file_name().unwrap());
    fs::copy(gateway.path(), &copy).unwrap();
    let output = add(copy.to_str().unwrap());
    printed(&output);
    assert!(errors(&output).contains("is left as it is"), "{}", errors(&output));
    assert_eq!((gateway.text(), gateway.peers()), (GATEWAY_CONF.to_owned(), before));

    // What somebody has set by wg(8) would be lost.
    let other = "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=";
    lab.gateway.run("wg", &["set", &gateway.interface, "peer", other]).unwrap();
    refused(1, "tidegate save");
    assert_eq!(gateway.peers().len(), 2);
}

#[test]
fn peers_of_an_interface_that_is_up_come_one_after_the_other() {
    let Some(lab) = lab("peers_of_an_interface_that_is_up_come_one_after_the_other") else {
        return;
    };
    let gateway = End::up(&lab, &lab.gateway, 'g', GATEWAY_CONF);
    let running: Vec<_> = ["a", "b", "c", "d"]
        .map(|name| {
            let mut command = lab.gateway.command(tidegate());
            command.args(["peer", "add", gateway.path(), name, "--endpoint", "198.51.100.1"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .into_iter()
        .collect();
    let mut seen = BTreeSet::new();
    for child in running {
        let text = printed(&child.wait_with_output().unwrap());
        seen.extend(addresses(&read(&text)).iter().map(|net| net.addr().to_string()));
    }
    assert_eq!(seen.len(), 8, "{seen:?}");
    assert_eq!(gateway.peers().len(), 5);
    let reloaded = gateway.succeeds(&["reload", gateway.path()]);
    assert!(reloaded.ends_with(": nothing to do\n"), "{reloaded}");
}
