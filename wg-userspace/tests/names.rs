//! An endpoint that is a name: what becomes of a tunnel when the name leads elsewhere.
//!
//! ```text
//!  client                                      gateway
//!  tidegate up NAME.conf ═══ outer (veth) ═══ Tidegate, which moves from 198.51.100.1 to .9
//!  /etc/hosts of its own                       10.9.0.1
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{fs, path::PathBuf, process::Output, thread, time::Duration};

use common::{Daemon, UDP, tidegate, value};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER},
    lab::{self, Lab, OUTER},
};

/// A peer is missed after 25 s, and its name asked for at the second initiation that is not answered.
const COMES_BACK: Duration = Duration::from_secs(120);

/// A client whose hosts and name servers are its own.
struct Client<'a> {
    lab: &'a Lab,
    interface: String,
    file: PathBuf,
}

impl Drop for Client<'_> {
    fn drop(&mut self) {
        self.tidegate("down");
    }
}

impl<'a> Client<'a> {
    /// Brings the client up, whose endpoint is a name that leads to where the gateway is.
    fn up(lab: &'a Lab, more: &str) -> Client<'a> {
        let endpoint = value(CLIENT_CONF, "Endpoint");
        let conf = CLIENT_CONF.replace(endpoint, &Self::endpoint()) + more;
        let interface = lab.interface('c');
        let file = lab.write(&format!("{interface}.conf"), &conf).unwrap();
        let client = Client { lab, interface, file };
        client.hosts("198.51.100.1 server.test\n198.51.100.66 nowhere.test\n");
        // Nobody is there.
        lab.write("resolv.conf", "nameserver 198.51.100.77\n").unwrap();
        client.succeeds("up");
        client.until_answered(common::LIMIT);
        client
    }

    fn endpoint() -> String {
        format!("server.test:{}", value(GATEWAY_CONF, "ListenPort"))
    }

    /// Nothing is to be done, and nothing to be saved in the name's place.
    fn is_as_its_file_says(&self) {
        let is_at = || {
            let endpoints = self.endpoints();
            assert!(endpoints.contains("198.51.100.9:"), "{endpoints}");
        };
        is_at();
        self.succeeds("reload");
        self.succeeds("save");
        let saved = fs::read_to_string(&self.file).unwrap();
        assert!(saved.contains(&format!("Endpoint = {}", Self::endpoint())), "{saved}");
        is_at();
    }

    /// Kills the data process, and waits until the one that follows answers.
    fn replace_data_process(&self) {
        let ledger = fs::read_to_string(format!("/run/tidegate/{}.state", self.interface)).unwrap();
        let lines = ledger.lines().map(|line| serde_json::from_str(line).unwrap());
        let keeper =
            lines.into_iter().find_map(|line: Value| line.pointer("/keeper/pid")?.as_i64());
        let children = format!("/proc/{0}/task/{0}/children", keeper.unwrap());
        let child = || fs::read_to_string(&children).unwrap().trim().parse::<i32>().ok();
        let before = child().unwrap();
        kill_process(Pid::from_raw(before).unwrap(), Signal::KILL).unwrap();
        let follows = || Ok(child().filter(|&pid| pid != before));
        lab::wait_for("another data process", common::LIMIT, follows).unwrap();
        // It is asked until it is there.
        self.endpoints();
    }

    /// Each command has mounts of its own, as every `ip netns exec`: what it leaves behind keeps them.
    fn tidegate(&self, command: &str) -> Output {
        const SCRIPT: &str = "mount --bind $FOLDER/hosts /etc/hosts &&
            mount --bind $FOLDER/resolv.conf /etc/resolv.conf && exec \"$@\"";
        let mut shell = self.lab.client.command("sh");
        shell.args(["-c", SCRIPT, "sh"]).arg(tidegate()).arg(command).arg(&self.file);
        shell.env("FOLDER", self.file.parent().unwrap()).env("TIDEGATE_MODE", "udp");
        shell.output().unwrap()
    }

    fn succeeds(&self, command: &str) {
        let output = self.tidegate(command);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn hosts(&self, text: &str) {
        // The same file, as it is mounted.
        fs::write(self.file.with_file_name("hosts"), text).unwrap();
    }

    fn until_answered(&self, limit: Duration) {
        let answered = lab::wait_for("an answer", limit, || {
            let ping = self.lab.client.run("ping", &["-n", "-c", "1", "-W", "1", GATEWAY_INNER[0]]);
            Ok(ping.is_ok().then_some(()))
        });
        answered.unwrap();
    }

    fn endpoints(&self) -> String {
        self.lab.client.run("wg", &["show", &self.interface, "endpoints"]).unwrap()
    }
}

#[test]
fn a_peer_whose_name_leads_elsewhere_is_found_there() {
    const TEST: &str = "a_peer_whose_name_leads_elsewhere_is_found_there";
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {TEST}: {reason}");
        return;
    }
    let lab = Lab::new().unwrap();
    let gateway = gateway(&lab);
    // One that is nowhere, and whose name nobody will know: its lookup takes its time.
    let nowhere = "\n[Peer]\nPublicKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\
             Endpoint = nowhere.test:7\nAllowedIPs = 10.8.0.1/32\nPersistentKeepalive = 1\n";
    let client = Client::up(&lab, nowhere);
    let _gateway = moves(&client, gateway);

    client.is_as_its_file_says();
}

#[test]
fn a_process_that_follows_knows_the_names_and_where_they_have_led() {
    const TEST: &str = "a_process_that_follows_knows_the_names_and_where_they_have_led";
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {TEST}: {reason}");
        return;
    }
    let lab = Lab::new().unwrap();
    let gateway = gateway(&lab);
    let client = Client::up(&lab, "");
    client.replace_data_process();
    client.until_answered(common::LIMIT);
    let _gateway = moves(&client, gateway);

    // Where peers are is written down several times a second.
    thread::sleep(Duration::from_millis(500));
    client.replace_data_process();
    client.is_as_its_file_says();
    client.until_answered(common::LIMIT);
}

fn gateway(lab: &Lab) -> Daemon<'_> {
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    gateway.configure(lab, GATEWAY_CONF);
    gateway
}

/// The gateway moves to where the name leads from now on, and is found there.
fn moves<'a>(client: &Client<'a>, gateway: Daemon<'a>) -> Daemon<'a> {
    let lab = client.lab;
    // Not even the gateway, begun anew, knows where the client is.
    drop(gateway);
    client.hosts("198.51.100.9 server.test\n");
    lab.gateway.ip(&format!("addr del 198.51.100.1/24 dev {OUTER}")).unwrap();
    lab.gateway.ip(&format!("addr add 198.51.100.9/24 dev {OUTER}")).unwrap();
    let gateway = self::gateway(lab);
    client.until_answered(COMES_BACK);
    gateway
}
