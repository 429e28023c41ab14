//! An endpoint that is a name: what becomes of a tunnel when the name leads elsewhere.
//!
//! ```text
//!  client                                      gateway
//!  tidegate up NAME.conf ═══ outer (veth) ═══ Tidegate, which moves from 198.51.100.1 to .9
//!  /etc/hosts of its own                       10.9.0.1
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{fs, path::PathBuf, process::Output, time::Duration};

use common::{Daemon, UDP, tidegate, value};
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

impl Client<'_> {
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
    let start = || {
        let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
        gateway.configure(&lab, GATEWAY_CONF);
        gateway
    };
    let gateway = start();

    let port = value(GATEWAY_CONF, "ListenPort");
    let endpoint = value(CLIENT_CONF, "Endpoint");
    let mut conf = CLIENT_CONF.replace(endpoint, &format!("server.test:{port}"));
    // One that is nowhere, and whose name nobody will know: its lookup takes its time.
    conf += "\n[Peer]\nPublicKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\
             Endpoint = nowhere.test:7\nAllowedIPs = 10.8.0.1/32\nPersistentKeepalive = 1\n";
    let interface = lab.interface('c');
    let file = lab.write(&format!("{interface}.conf"), &conf).unwrap();
    let client = Client { lab: &lab, interface, file };
    client.hosts("198.51.100.1 server.test\n198.51.100.66 nowhere.test\n");
    // Nobody is there.
    lab.write("resolv.conf", "nameserver 198.51.100.77\n").unwrap();
    client.succeeds("up");
    client.until_answered(common::LIMIT);

    // Not even the gateway, begun anew, knows where the client is.
    drop(gateway);
    client.hosts("198.51.100.9 server.test\n");
    lab.gateway.ip(&format!("addr del 198.51.100.1/24 dev {OUTER}")).unwrap();
    lab.gateway.ip(&format!("addr add 198.51.100.9/24 dev {OUTER}")).unwrap();
    let _gateway = start();
    client.until_answered(COMES_BACK);
    assert!(client.endpoints().contains(&format!("198.51.100.9:{port}")), "{}", client.endpoints());

    // The file says what is so: nothing is to be done, and nothing to be saved in the name's place.
    client.succeeds("reload");
    client.succeeds("save");
    let saved = fs::read_to_string(&client.file).unwrap();
    assert!(saved.contains(&format!("Endpoint = server.test:{port}")), "{saved}");
    assert!(client.endpoints().contains("198.51.100.9"), "{}", client.endpoints());
}
