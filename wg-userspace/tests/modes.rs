//! How NICs receive and send is chosen by itself, and again when something about them changes: NICs that come
//! late, go, are made again, and have other queues or another MTU. Tunnels keep their sessions through all of it.
//!
//! ```text
//!  client                         gateway
//!  outer 198.51.100.2 ─────────── outer 198.51.100.1      a veth, which tests delete and make again
//!  daemon (udp) ═════════════════ daemon (native, auto, zerocopy)
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::time::Duration;

use common::{Daemon, LIMIT, NATIVE, UDP, tidegate, xdp_program};
use serde_json::Value;
use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER},
    lab::{self, Lab, OUTER},
};

fn lab(test: &str) -> Option<Lab> {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    Some(Lab::new().unwrap())
}

/// A gateway and a client that are configured.
fn tunnel<'a>(lab: &'a Lab, options: &[&str]) -> [Daemon<'a>; 2] {
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), options);
    gateway.configure(lab, GATEWAY_CONF);
    let client = Daemon::start(&lab.client, &lab.interface('c'), UDP);
    client.configure(lab, CLIENT_CONF);
    [gateway, client]
}

fn unplug(lab: &Lab) {
    lab.gateway.ip(&format!("link del {OUTER}")).unwrap();
}

/// Makes the link between the two, with so many queues and this MTU.
fn plug(lab: &Lab, queue_count: u32, mtu: u32) {
    let queues = format!("numrxqueues {queue_count} numtxqueues {queue_count}");
    let peer = lab.client.name();
    let link =
        format!("link add {OUTER} {queues} type veth peer name {OUTER} {queues} netns {peer}");
    lab.gateway.ip(&link).unwrap();
    for (space, last) in [(&lab.gateway, 1), (&lab.client, 2)] {
        space.ip(&format!("address add 198.51.100.{last}/24 dev {OUTER}")).unwrap();
        space.ip(&format!("link set {OUTER} mtu {mtu} up")).unwrap();
    }
}

fn pings(lab: &Lab, options: &[&str]) -> u32 {
    lab.client
        .ping(GATEWAY_INNER[0], 5, &[&["-i", "0.05", "-W", "1"], options].concat())
        .unwrap()
        .answered
}

fn talk(lab: &Lab) {
    lab::wait_for("an answer", LIMIT, || Ok((pings(lab, &[]) == 5).then_some(()))).unwrap();
}

impl Daemon<'_> {
    /// What it says of its NIC.
    fn nic(&self) -> Value {
        self.status().nics.remove(0)
    }

    fn becomes(&self, what: &str, is_so: impl Fn(&Value) -> bool) {
        let so = lab::wait_for(what, LIMIT, || Ok(is_so(&self.nic()).then_some(())));
        so.unwrap_or_else(|error| panic!("{error:#}: {}\n{}", self.nic(), self.process.errors()));
    }

    fn has_queues(&self, count: u64) {
        self.becomes(&format!("{count} queues"), |nic| nic["queues"] == count);
    }

    fn came_by(&self, path: &str) -> u64 {
        self.status().paths[path]
    }

    /// Answers five echo requests that come by its XSKs.
    fn answers_by_xsk(&self, lab: &Lab, options: &[&str]) {
        let before = self.came_by("xsk");
        assert_eq!(pings(lab, options), 5, "{}", self.process.errors());
        let now = self.came_by("xsk");
        assert!(now >= before + 5, "{before}, {now}: {:?}", self.status());
    }

    fn handshake(&self) -> String {
        self.dump()[1][4].clone()
    }
}

#[test]
fn a_nic_that_is_made_again_is_steered_again_and_sessions_survive() {
    let test = "a_nic_that_is_made_again_is_steered_again_and_sessions_survive";
    let Some(lab) = lab(test) else { return };
    let [gateway, client] = tunnel(&lab, NATIVE);
    talk(&lab);
    gateway.answers_by_xsk(&lab, &[]);
    let before = xdp_program(&lab).unwrap();
    let handshakes = (gateway.handshake(), client.handshake());
    for queue_count in [1, 2, 1] {
        unplug(&lab);
        gateway.becomes("the NIC's end", |nic| {
            nic["queues"] == 0
                && nic["reason"] == "it is not there yet"
                && nic["receive"] == "socket"
        });
        assert_eq!(gateway.status().mode, "udp");
        plug(&lab, queue_count, 1500);
        gateway.has_queues(queue_count.into());
        assert_eq!(xdp_program(&lab), Some(before), "the same program, with its maps");
        talk(&lab);
        gateway.answers_by_xsk(&lab, &[]);
    }
    assert_eq!((gateway.handshake(), client.handshake()), handshakes, "sessions were lost");
    // What is behind the gateway was not unplugged, and neither were its workers.
    assert_eq!(gateway.status().mode, "native");
}

#[test]
fn a_nic_that_comes_late_is_waited_for() {
    let Some(lab) = lab("a_nic_that_comes_late_is_waited_for") else { return };
    unplug(&lab);
    let [gateway, _client] = tunnel(&lab, NATIVE);
    let status = gateway.status();
    assert_eq!(status.mode, "udp");
    assert_eq!(status.reason.as_deref(), Some("outer: it is not there yet"));
    plug(&lab, 1, 1500);
    gateway.has_queues(1);
    talk(&lab);
    gateway.answers_by_xsk(&lab, &[]);
    let status = gateway.status();
    assert_eq!(status.reason.as_deref(), Some("XSKs on outer (queues: 1)"));
}

/// The kernel lets nobody take a queue away that has an XSK.
#[test]
fn queues_that_come_are_served() {
    let Some(lab) = lab("queues_that_come_are_served") else { return };
    if lab::find_program("ethtool").is_none() {
        return eprintln!("SKIPPED queues_that_come_are_served: needs ethtool");
    }
    unplug(&lab);
    plug(&lab, 4, 1500);
    let set_rx =
        |count: u32| lab.gateway.run("ethtool", &["-L", OUTER, "rx", &count.to_string()]).map(drop);
    // The far end may send by no more queues than there are to receive.
    lab.client.run("ethtool", &["-L", OUTER, "tx", "1"]).unwrap();
    set_rx(1).unwrap();
    let [gateway, client] = tunnel(&lab, NATIVE);
    gateway.has_queues(1);
    talk(&lab);
    let handshakes = (gateway.handshake(), client.handshake());
    for count in [2, 4] {
        set_rx(count).unwrap();
        gateway.has_queues(count.into());
        talk(&lab);
        gateway.answers_by_xsk(&lab, &[]);
    }
    assert!(set_rx(1).is_err());
    gateway.answers_by_xsk(&lab, &[]);
    assert_eq!((gateway.handshake(), client.handshake()), handshakes, "sessions were lost");
}

#[test]
fn chunks_follow_the_mtu() {
    let Some(lab) = lab("chunks_follow_the_mtu") else { return };
    let [gateway, client] = tunnel(&lab, NATIVE);
    talk(&lab);
    // Both know how large packets of this tunnel may be when the links say so.
    for space in [&lab.client, &lab.gateway] {
        space.ip(&format!("link set {OUTER} mtu 3400")).unwrap();
    }
    for daemon in [&gateway, &client] {
        daemon.space.ip(&format!("link set {} mtu 3300", daemon.interface)).unwrap();
    }
    let large = ["-M", "do", "-s", "3000"];
    lab::wait_for("an answer of 3,000 bytes", LIMIT, || {
        // A ping that comes too early is told the size of before, and the kernel believes that for long.
        for space in [&lab.client, &lab.gateway] {
            space.ip("route flush cache")?;
        }
        Ok((pings(&lab, &large) == 5).then_some(()))
    })
    .unwrap_or_else(|error| {
        panic!("{error:#}: {:?}\n{}", gateway.status(), gateway.process.errors())
    });
    gateway.answers_by_xsk(&lab, &large);
    let status = gateway.status();
    assert_eq!(status.drops.get("xsk_no_chunk"), None, "{status:?}");
}

#[test]
fn on_a_veth_sockets_are_chosen_unless_somebody_asks() {
    let Some(lab) = lab("on_a_veth_sockets_are_chosen_unless_somebody_asks") else { return };
    let [gateway, _client] = tunnel(&lab, &["--xdp", OUTER, "--mode", "auto"]);
    talk(&lab);
    assert_eq!(xdp_program(&lab), None);
    let nic = gateway.nic();
    assert_eq!((&nic["receive"], &nic["transmit"]), (&"socket".into(), &"socket".into()), "{nic}");
    let reason = nic["reason"].as_str().unwrap();
    assert!(reason.contains("veth") && reason.contains("--mode native"), "{reason}");
    assert_eq!(gateway.came_by("xsk"), 0);
    assert!(gateway.process.errors().contains("veth"), "{}", gateway.process.errors());
}

#[test]
fn zero_copy_that_cannot_be_is_an_error_that_names_the_nic() {
    let Some(lab) = lab("zero_copy_that_cannot_be_is_an_error_that_names_the_nic") else { return };
    let interface = lab.interface('g');
    let mut command = lab.gateway.command(tidegate());
    command.args(["run", "-f", &interface, "--xdp", OUTER, "--mode", "zerocopy"]);
    let mut process = lab.gateway.spawn("tidegate-run", &mut command).unwrap();
    let status = process.wait(Duration::from_secs(20)).unwrap();
    let said = process.errors();
    assert_eq!(status.code(), Some(1), "{said}");
    let expected = format!("zero-copy was asked for, and cannot be: {OUTER}: its driver");
    assert!(said.contains(&expected), "{said}");
    assert_eq!(xdp_program(&lab), None);
    assert!(!lab.gateway.has_interface(&interface));
}
