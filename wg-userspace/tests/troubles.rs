//! What `tidegate show` says when two ends do not fit together, and that it stops when they do.
//!
//! ```text
//!  client                         gateway
//!  outer 198.51.100.2 ─────────── outer 198.51.100.1
//!  Tidegate (udp) ═══════════════ Tidegate (udp)
//!  10.9.0.2                       10.9.0.1
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{path::PathBuf, time::Duration};

use common::{Daemon, UDP, public_key, tidegate, value};
use serde_json::Value;
use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER},
    lab::{self, Lab, Space},
};

/// An initiation is missed after five seconds.
const TOLD: Duration = Duration::from_secs(30);
const CLIENT_INNER: &str = "10.9.0.2";

fn lab(test: &str) -> Option<Lab> {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    Some(Lab::new().unwrap())
}

/// Both ends, by these files.
fn ends<'a>(lab: &'a Lab, client: &str, gateway: &str) -> [Daemon<'a>; 2] {
    let [c, g] =
        [(&lab.client, 'c', client), (&lab.gateway, 'g', gateway)].map(|(space, end, conf)| {
            let daemon = Daemon::start(space, &lab.interface(end), UDP);
            daemon.configure(lab, conf);
            daemon
        });
    [c, g]
}

fn show(daemon: &Daemon<'_>) -> String {
    daemon.space.run(tidegate(), &["show", &daemon.interface]).unwrap()
}

fn json(daemon: &Daemon<'_>) -> Value {
    let text = daemon.space.run(tidegate(), &["status", &daemon.interface, "--json"]).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["interfaces"][0].clone()
}

fn ping(space: &Space, to: &str) {
    // Whether it is answered is for `show` to say.
    let _ = space.run("ping", &["-n", "-c", "1", "-W", "1", to]);
}

/// Pings until `show` says these words in one line about troubles.
fn until_told(from: &Space, to: &str, daemon: &Daemon<'_>, words: &[&str]) -> String {
    let mut last = String::new();
    let found = lab::wait_for("a line about it", TOLD, || {
        ping(from, to);
        last = show(daemon);
        let mut lines = last.lines().filter(|line| line.starts_with("  trouble: "));
        Ok(lines.find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned))
    });
    found.unwrap_or_else(|error| panic!("{error:#}: {words:?} in\n{last}"))
}

fn until_mended(from: &Space, to: &str, daemons: &[Daemon<'_>]) {
    let answered = lab::wait_for("an answer", TOLD, || {
        let ping = from.run("ping", &["-n", "-c", "1", "-W", "1", to]);
        Ok(ping.is_ok().then_some(()))
    });
    answered.unwrap();
    for daemon in daemons {
        let of_peers = json(daemon)["peers"][0]["troubles"].clone();
        assert_eq!(of_peers.as_array().unwrap().len(), 0, "{of_peers} at {}", daemon.interface);
    }
}

#[test]
fn a_wrong_port_and_a_peer_that_is_nowhere_are_told() {
    let Some(lab) = lab("a_wrong_port_and_a_peer_that_is_nowhere_are_told") else { return };
    let wrong = CLIENT_CONF.replace(":51820", ":51899");
    let ends = ends(&lab, &wrong, GATEWAY_CONF);
    let [client, gateway] = &ends;
    until_told(&lab.gateway, CLIENT_INNER, gateway, &["dropped", "no endpoint"]);
    let words = ["initiations unanswered for", "endpoint is wrong", "port is closed"];
    until_told(&lab.client, GATEWAY_INNER[0], client, &words);
    let trouble = json(client)["peers"][0]["troubles"][0].clone();
    assert_eq!(trouble["kind"], "initiations_unanswered");
    assert!(
        trouble["since_s"].as_u64() >= Some(5) && trouble["count"].as_u64() >= Some(1),
        "{trouble}"
    );
    assert_eq!(trouble["address"], "198.51.100.1:51899");

    let peer = value(CLIENT_CONF, "PublicKey");
    client.wg(&["set", &client.interface, "peer", peer, "endpoint", "198.51.100.1:51820"]);
    until_mended(&lab.client, GATEWAY_INNER[0], &ends);
}

#[test]
fn preshared_keys_that_differ_are_told_at_both_ends() {
    let Some(lab) = lab("preshared_keys_that_differ_are_told_at_both_ends") else { return };
    let preshared = value(CLIENT_CONF, "PresharedKey");
    let other = CLIENT_CONF.replace(preshared, "SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=");
    let ends = ends(&lab, &other, GATEWAY_CONF);
    let [client, gateway] = &ends;
    let to = GATEWAY_INNER[0];
    until_told(
        &lab.client,
        to,
        client,
        &["cannot be opened", "preshared keys of the two ends differ"],
    );
    until_told(&lab.client, to, gateway, &["no answer confirmed", "preshared keys"]);
    assert!(
        !show(client).contains("SEhI") && !show(gateway).contains(preshared),
        "no key is shown"
    );

    let file = lab.write("psk", preshared).unwrap();
    let peer = value(CLIENT_CONF, "PublicKey");
    client.wg(&["set", &client.interface, "peer", peer, "preshared-key", file.to_str().unwrap()]);
    until_mended(&lab.client, to, &ends);
}

#[test]
fn a_source_that_is_not_allowed_is_told_and_a_destination_that_nobody_has() {
    let test = "a_source_that_is_not_allowed_is_told_and_a_destination_that_nobody_has";
    let Some(lab) = lab(test) else { return };
    let ends = ends(&lab, CLIENT_CONF, &GATEWAY_CONF.replace("10.9.0.2/32", "10.9.0.3/32"));
    let [client, gateway] = &ends;
    let words = ["it sends from 10.9.0.2", "which its AllowedIPs do not have"];
    until_told(&lab.client, GATEWAY_INNER[0], gateway, &words);
    assert!(!show(client).contains("trouble: "), "{}", show(client));
    let text = show(gateway);
    assert!(text.contains("    source_not_allowed: from inner addresses that"), "{text}");
    until_told(
        &lab.gateway,
        CLIENT_INNER,
        gateway,
        &["to 10.9.0.2", "no peer has it in its AllowedIPs"],
    );

    let peer = value(GATEWAY_CONF, "PublicKey");
    gateway.wg(&[
        "set",
        &gateway.interface,
        "peer",
        peer,
        "allowed-ips",
        "10.9.0.2/32,fd09::2/128",
    ]);
    until_mended(&lab.client, GATEWAY_INNER[0], &ends);
    assert!(!show(gateway).contains("trouble: "), "{}", show(gateway));
}

#[test]
fn keys_that_are_mistaken_are_told() {
    let Some(lab) = lab("keys_that_are_mistaken_are_told") else { return };
    let own = value(CLIENT_CONF, "PrivateKey");
    let other = "SEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISEg=";
    let ends = ends(&lab, &CLIENT_CONF.replace(own, other), GATEWAY_CONF);
    let [client, gateway] = &ends;
    let to = GATEWAY_INNER[0];
    let shown = public_key(&lab.client, &lab, other);
    let line = format!("it needs a [Peer] with PublicKey = {shown}");
    until_told(&lab.client, to, gateway, &["keys that are no peers", "from 198.51.100.2:", &line]);
    until_told(
        &lab.client,
        to,
        client,
        &["initiations unanswered", "our public key is unknown there"],
    );
    let told = json(gateway)["troubles"].clone();
    assert_eq!(
        (&told[0]["kind"], &told[0]["public_key"]),
        (&Value::from("unknown_keys"), &shown.into())
    );

    // The right key, and a mistake about the other end's.
    let peer = value(CLIENT_CONF, "PublicKey");
    let mistaken = CLIENT_CONF.replace(peer, &public_key(&lab.client, &lab, other));
    let keys: Vec<&str> = mistaken.lines().filter(|line| !line.starts_with("Address")).collect();
    let file = lab.write("mistaken", &keys.join("\n")).unwrap();
    client.wg(&["setconf", &client.interface, file.to_str().unwrap()]);
    until_told(&lab.client, to, gateway, &["meant for another public key", "from 198.51.100.2:"]);
}

/// An interface that `up` has brought up, and that goes down with this.
struct Up<'a> {
    space: &'a Space,
    file: PathBuf,
}

impl Up<'_> {
    fn tidegate(&self, arguments: &[&str]) -> String {
        let mut command = self.space.command(tidegate());
        let output = command.args(arguments).env("TIDEGATE_MODE", "udp").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Up<'_> {
    fn drop(&mut self) {
        let _ = self.space.command(tidegate()).arg("down").arg(&self.file).output();
    }
}

#[test]
fn peers_have_the_names_that_their_file_gives_them() {
    let Some(lab) = lab("peers_have_the_names_that_their_file_gives_them") else { return };
    let interface = lab.interface('g');
    let more = "\n[Peer]\n# friendly_name = the printer\n\
                PublicKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n";
    let file = lab.write(&format!("{interface}.conf"), &format!("{GATEWAY_CONF}{more}")).unwrap();
    let up = Up { space: &lab.gateway, file };
    up.tidegate(&["up", up.file.to_str().unwrap()]);
    let text = up.tidegate(&["show", &interface]);
    let key = value(GATEWAY_CONF, "PublicKey");
    assert!(text.contains(&format!("peer: {key}\n  name: client\n")), "{text}");
    assert!(text.contains("  name: the printer\n"), "{text}");
    let json: Value = serde_json::from_str(&up.tidegate(&["show", &interface, "--json"])).unwrap();
    let names: Vec<&str> = json["interfaces"][0]["peers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|peer| peer["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["client", "the printer"]);
}
