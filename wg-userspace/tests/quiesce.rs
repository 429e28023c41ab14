//! A pause for a snapshot, and a host that slept, between real processes.
//!
//! ```text
//!  client                     gateway
//!  Tidegate ══ outer (veth) ══ Tidegate
//!  10.9.0.2                    10.9.0.1
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use xtask::{
    demonstration::{CLIENT_CONF, DataPath, GATEWAY_CONF},
    lab::{self, Lab, Process, Space},
};

const LIMIT: Duration = Duration::from_secs(10);
const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");
const GATEWAY: &str = "10.9.0.1";

/// `tidegate run -f` in a namespace, with sockets only.
struct Daemon<'a> {
    space: &'a Space,
    interface: String,
    _process: Process,
}

impl<'a> Daemon<'a> {
    fn start(lab: &Lab, space: &'a Space, interface: String, conf: &str) -> Daemon<'a> {
        let slept = slept_file(lab, &interface);
        let mut command = space.command(Path::new(TIDEGATE));
        command.args(["run", "-f", "--mode", "udp", &interface]).env("TIDEGATE_TEST_SLEPT", slept);
        let mut process = space.spawn("tidegate-run", &mut command).unwrap();
        lab::wait_for("the daemon", LIMIT, || {
            anyhow::ensure!(process.ended()?.is_none(), "it ended: {}", process.errors());
            Ok(DataPath::of(space, Path::new(TIDEGATE), &interface).ok())
        })
        .unwrap();
        let keys: Vec<&str> =
            conf.lines().filter(|line| !line.trim_start().starts_with("Address")).collect();
        let file = lab.write(&format!("{interface}.set"), &keys.join("\n")).unwrap();
        space.run("wg", &["setconf", &interface, file.to_str().unwrap()]).unwrap();
        space.configure(&interface, conf).unwrap();
        Daemon { space, interface, _process: process }
    }

    /// Runs `tidegate WORDS`, which succeeds.
    fn tidegate(&self, words: &[&str]) -> String {
        self.space.run(TIDEGATE, words).unwrap()
    }

    fn quiesce(&self, options: &[&str]) {
        self.tidegate(&[&["quiesce", self.interface.as_str()], options].concat());
    }

    fn show(&self) -> String {
        self.tidegate(&["show", &self.interface])
    }

    fn dropped(&self, reason: &str) -> u64 {
        let status = DataPath::of(self.space, Path::new(TIDEGATE), &self.interface).unwrap();
        status.drops.get(reason).copied().unwrap_or(0)
    }

    /// When the peer's latest handshake was completed, in seconds since 1970.
    fn latest_handshake(&self) -> u64 {
        let dump = self.space.run("wg", &["show", &self.interface, "latest-handshakes"]).unwrap();
        dump.split_whitespace().last().unwrap().parse().unwrap()
    }
}

/// Once there is something in it, the host of this interface's daemon has slept.
fn slept_file(lab: &Lab, interface: &str) -> PathBuf {
    lab.write(&format!("{interface}.slept"), "").unwrap()
}

fn pings(space: &Space, count: u32) -> bool {
    space.ping(GATEWAY, count, &[]).unwrap().answered > 0
}

#[test]
fn a_pause_ends_all_keys_and_the_tunnel_comes_back_after_it() {
    let test = "a_pause_ends_all_keys_and_the_tunnel_comes_back_after_it";
    if let Some(reason) = lab::unavailable() {
        return eprintln!("SKIPPED {test}: {reason}");
    }
    let lab = Lab::new().unwrap();
    let gateway = Daemon::start(&lab, &lab.gateway, lab.interface('g'), GATEWAY_CONF);
    let client = Daemon::start(&lab, &lab.client, lab.interface('c'), CLIENT_CONF);
    assert!(pings(&lab.client, 3));
    let before = gateway.latest_handshake();
    assert!(before > 0);

    gateway.quiesce(&[]);
    assert!(gateway.show().contains("quiesced: until it is resumed"), "{}", gateway.show());
    assert!(gateway.show().contains("sessions cleared: quiesced 1"), "{}", gateway.show());
    let dropped = gateway.dropped("quiesced");
    assert!(!pings(&lab.client, 3), "it has no key to answer with");
    assert!(gateway.dropped("quiesced") >= dropped + 3);
    assert_eq!(gateway.latest_handshake(), before);

    gateway.quiesce(&["--resume"]);
    assert!(!gateway.show().contains("\n  quiesced: "), "{}", gateway.show());
    // The client does not know that its keypair is dead: silence tells it, after 15 s. A ping from
    // the gateway begins a handshake at once.
    lab::wait_for("an answer", LIMIT, || {
        Ok(lab.gateway.ping("10.9.0.2", 1, &[])?.answered.eq(&1).then_some(()))
    })
    .unwrap();
    assert!(gateway.latest_handshake() > before, "by a new handshake");
    assert!(pings(&lab.client, 3));

    // And a pause that ends by itself, at the other end.
    client.quiesce(&["--for", "2"]);
    assert!(client.show().contains("quiesced: for "), "{}", client.show());
    assert!(!pings(&lab.client, 1));
    assert!(client.dropped("quiesced") > 0);
    lab::wait_for("an answer", LIMIT, || Ok(pings(&lab.client, 1).then_some(()))).unwrap();
    assert!(!client.show().contains("\n  quiesced: "), "{}", client.show());
}

#[test]
fn after_a_sleep_the_tunnel_comes_back_with_other_keys() {
    let test = "after_a_sleep_the_tunnel_comes_back_with_other_keys";
    if let Some(reason) = lab::unavailable() {
        return eprintln!("SKIPPED {test}: {reason}");
    }
    let lab = Lab::new().unwrap();
    let gateway = Daemon::start(&lab, &lab.gateway, lab.interface('g'), GATEWAY_CONF);
    let _client = Daemon::start(&lab, &lab.client, lab.interface('c'), CLIENT_CONF);
    assert!(pings(&lab.client, 3));
    let before = gateway.latest_handshake();

    std::fs::write(slept_file(&lab, &gateway.interface), "slept").unwrap();
    lab::wait_for("the sleep", LIMIT, || {
        Ok(gateway.show().contains("sessions cleared: slept").then_some(()))
    })
    .unwrap();
    assert!(!pings(&lab.client, 3), "the client's keypair is known no more");
    lab::wait_for("an answer", LIMIT, || {
        Ok(lab.gateway.ping("10.9.0.2", 1, &[])?.answered.eq(&1).then_some(()))
    })
    .unwrap();
    assert!(gateway.latest_handshake() > before, "by a new handshake");
    assert!(pings(&lab.client, 3));
    let show = gateway.show();
    assert!(
        show.contains("sessions cleared: slept 1\n"),
        "each thread sees it, one clears: {show}"
    );
}
