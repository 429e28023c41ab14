//! NAT by filters of clsact qdiscs, as on kernels before 6.6, which have no links of TC programs: beside others, and
//! after a keeper that was killed.
//!
//! ```text
//!  client 172.31.0.2 ═══ wan ═══ gateway ─── lan ─── host
//!  10.9.0.2                      10.9.0.1   192.168.77.1   192.168.77.2
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    fs::{self, File},
    net::{TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    process::{Command, Output},
    thread::sleep,
    time::Duration,
};

use aya::programs::{SchedClassifier, TcAttachType};
use common::tidegate;
use rustix::process::{Pid, Signal, kill_process};
use wg_common::nat::map::{NIC_PROGRAM, OWNER_STALE_NS};
use wg_userspace::bpf::{Attachment, Nat, NatHook, NatOptions};
use wg_userspace::key::PrivateKey;
use wg_userspace::sys::netns::NetNs;
use xtask::lab::{self, End, Layout, Site, Space, find_program, wait_for};

const LAYOUT: Layout = Layout {
    hosts: &["client", "gateway", "host"],
    routers: &["gateway"],
    links: &[
        &[
            End { host: "client", nic: "wan", addresses: &["172.31.0.2/24"] },
            End { host: "gateway", nic: "wan", addresses: &["172.31.0.1/24"] },
        ],
        &[
            End { host: "gateway", nic: "lan", addresses: &["192.168.77.1/24"] },
            End { host: "host", nic: "eth0", addresses: &["192.168.77.2/24"] },
        ],
    ],
    routes: &[],
    private: false,
};
const GATEWAY: &str = "192.168.77.1";
const HOST: &str = "192.168.77.2";
const PORT: u16 = 8443;
const LINES: &str = "#! Nat = masquerade out=lan bypass-firewall\n\
                     #! Forward = tcp lan:8443 -> 10.9.0.2:443 bypass-firewall";
const LIMIT: Duration = Duration::from_secs(30);
const FILTERS: &[(&str, &str)] = &[("TIDEGATE_TEST_CLSACT", "1")];

/// Whether nothing can be shown here, which is told.
fn skips(test: &str) -> bool {
    let missing = lab::unavailable()
        .or_else(|| find_program("tc").is_none().then(|| "needs the program `tc`".to_owned()));
    if let Some(reason) = &missing {
        eprintln!("SKIPPED {test}: {reason}");
    }
    missing.is_some()
}

/// The site with both ends' files, and what is done there.
struct Ends {
    site: Site,
}

impl Ends {
    fn new() -> Self {
        Self { site: Site::new(&LAYOUT).unwrap() }
    }

    fn gateway(&self) -> &Space {
        self.site.space("gateway")
    }

    fn interface(&self, role: &str) -> String {
        self.site.interface(role.chars().next().unwrap())
    }

    /// Brings an end up; the gateway with these lines.
    fn up(&self, role: &str, lines: &str) -> Output {
        let key = |byte: u8| PrivateKey::from_bytes([byte; 32]);
        let (client, gateway) = (key(0x11), key(0x22));
        let text = match role {
            "gateway" => format!(
                "[Interface]\nPrivateKey = {}\nListenPort = 51820\nAddress = 10.9.0.1/24\n{lines}\n\
                 [Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.2/32\n",
                gateway.to_base64().as_str(),
                client.public_key(),
            ),
            _ => format!(
                "[Interface]\nPrivateKey = {}\nAddress = 10.9.0.2/24\n\
                 [Peer]\nPublicKey = {}\nEndpoint = 172.31.0.1:51820\n\
                 AllowedIPs = 10.9.0.0/24, 192.168.77.0/24\n",
                client.to_base64().as_str(),
                gateway.public_key(),
            ),
        };
        let file = format!("{}.conf", self.interface(role));
        self.site.write(&file, &text).unwrap();
        self.tidegate(role, &["up"], &["--mode", "udp", "--workers", "1"])
    }

    fn down(&self, role: &str) -> Output {
        self.tidegate(role, &["down"], &[])
    }

    /// Runs a command about an end's file.
    fn tidegate(&self, role: &str, before: &[&str], after: &[&str]) -> Output {
        let mut command = self.site.space(role).command(tidegate());
        command.args(before).arg(self.site.path(&format!("{}.conf", self.interface(role))));
        command.args(after).envs(FILTERS.iter().copied());
        command.env("TIDEGATE_TEST_NAT_PORTS", "256").output().unwrap()
    }

    fn both_up(&self) {
        succeeded(&self.up("gateway", LINES));
        succeeded(&self.up("client", ""));
        self.wait_until_translated();
    }

    fn wait_until_translated(&self) {
        let answered = || {
            let ping = self.site.space("client").ping(HOST, 1, &["-W", "1"])?;
            Ok((ping.answered > 0).then_some(()))
        };
        wait_for("an answer through NAT", LIMIT, answered).unwrap();
    }

    /// The keeper at the gateway.
    fn keeper(&self) -> Pid {
        let name = self.gateway().name();
        let output = Command::new("ip").args(["netns", "pids", name]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let is_keeper = |pid: &&str| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains("--background-child")
        };
        let pid = text.lines().find(is_keeper).unwrap().parse().unwrap();
        Pid::from_raw(pid).unwrap()
    }

    fn kill_keeper(&self) {
        kill_process(self.keeper(), Signal::KILL).unwrap();
        let interface = self.interface("gateway");
        let gone = || Ok((!self.gateway().has_interface(&interface)).then_some(()));
        wait_for("the end of the TUN device", LIMIT, gone).unwrap();
    }

    fn tc(&self, arguments: &str) -> String {
        let arguments: Vec<&str> = arguments.split_whitespace().collect();
        self.gateway().run("tc", &arguments).unwrap()
    }

    /// Filters of ours at a NIC of the gateway.
    fn filters(&self, nic: &str) -> usize {
        self.tc(&format!("filter show dev {nic} ingress")).matches(NIC_PROGRAM).count()
    }

    fn has_qdisc(&self, nic: &str) -> bool {
        self.tc(&format!("qdisc show dev {nic}")).contains("clsact")
    }

    /// How many packets a filter of somebody else's has got.
    fn counted(&self) -> u64 {
        let shown = self.tc("-s filter show dev lan ingress");
        let line = shown.lines().find(|line| line.trim_start().starts_with("Sent ")).unwrap();
        line.split_whitespace().nth(3).unwrap().parse().unwrap()
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        for role in ["client", "gateway"] {
            let _ = self.down(role);
        }
    }
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Runs something in a host's namespace.
fn inside<R: Send>(space: &Space, body: impl FnOnce() -> R + Send) -> R {
    let namespace = File::open(format!("/run/netns/{}", space.name())).unwrap();
    NetNs::from(OwnedFd::from(namespace)).run(body)
}

#[test]
fn filters_stand_beside_those_of_others_and_leave_them() {
    if skips("filters_stand_beside_those_of_others_and_leave_them") {
        return;
    }
    let ends = Ends::new();
    ends.gateway().ip("link add sink type veth peer name drain").unwrap();
    ends.gateway().ip("link set sink up").unwrap();
    ends.tc("qdisc add dev lan clsact");
    ends.tc(
        "filter add dev lan ingress prio 7 protocol ip u32 match u32 0 0 action mirred egress mirror dev sink",
    );
    // Another process's program at a link. It has no rules, and so all is none of its own.
    let foreign = inside(ends.gateway(), || {
        let few = NatOptions { flows: 1, mappings: 1, ..NatOptions::default() };
        let mut nat = Nat::load(few).unwrap();
        (nat.attach("lan", NatHook::Nic, 0).unwrap() == Attachment::Tcx).then_some(nat)
    });
    let links = || {
        inside(ends.gateway(), || {
            SchedClassifier::query_tcx("lan", TcAttachType::Ingress).map_or(0, |(_, all)| all.len())
        })
    };
    let before = links();
    assert_eq!(before, usize::from(foreign.is_some()));

    ends.both_up();
    assert_eq!((ends.filters("lan"), links()), (1, before));
    let shown = ends.tc("filter show dev lan ingress");
    assert!(shown.contains("pref 1 bpf") && shown.contains("pref 7 u32"), "{shown}");
    // Answers are ours; what is for the gateway itself is not.
    let counted = ends.counted();
    ends.wait_until_translated();
    assert_eq!(ends.counted(), counted, "ours came to another's filter");
    assert_eq!(ends.site.space("host").ping(GATEWAY, 3, &["-W", "2"]).unwrap().answered, 3);
    assert_eq!(ends.counted(), counted + 3);

    // Somebody removes all filters: they are back, and the qdisc is ours then.
    ends.tc("qdisc del dev lan clsact");
    wait_for("our filter", LIMIT, || Ok((ends.filters("lan") == 1).then_some(()))).unwrap();
    ends.wait_until_translated();
    succeeded(&ends.down("gateway"));
    assert!(!ends.has_qdisc("lan"), "{}", ends.tc("filter show dev lan ingress"));

    // Filters of another kind at our priority are not touched, and named.
    ends.tc("qdisc add dev lan clsact");
    let theirs = "dev lan ingress prio 1 protocol ip u32 match u32 0 0 classid 1:1";
    ends.tc(&format!("filter add {theirs}"));
    let refused = ends.up("gateway", LINES);
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("filters of kind u32 have priority 1 at the ingress of lan"), "{said}");
    assert!(ends.tc("filter show dev lan ingress").contains("pref 1 u32"));
    ends.tc("filter del dev lan ingress prio 1");

    // Of a qdisc that was there, only our filter goes.
    succeeded(&ends.up("gateway", LINES));
    assert_eq!(ends.filters("lan"), 1);
    succeeded(&ends.down("gateway"));
    assert!(ends.has_qdisc("lan"));
    assert_eq!((ends.filters("lan"), links()), (0, before));
}

#[test]
fn what_a_killed_keeper_leaves_lets_all_pass_and_is_removed() {
    if skips("what_a_killed_keeper_leaves_lets_all_pass_and_is_removed") {
        return;
    }
    let ends = Ends::new();
    ends.both_up();
    assert!(ends.has_qdisc("lan"));
    let listener = inside(ends.gateway(), || TcpListener::bind((GATEWAY, PORT)).unwrap());
    let to = listener.local_addr().unwrap();
    let connects = || {
        inside(ends.site.space("host"), || {
            TcpStream::connect_timeout(&to, Duration::from_millis(300)).is_ok()
        })
    };
    assert!(!connects(), "the port is the client's, who refuses");

    ends.kill_keeper();
    assert_eq!(ends.filters("lan"), 1);
    wait_for("the gateway's own port", LIMIT, || Ok(connects().then_some(()))).unwrap();

    // The same interface begins again, with a file that has no such lines. Another's filter stays.
    ends.tc("filter add dev lan ingress prio 9 protocol ip u32 match u32 0 0 flowid 1:1");
    succeeded(&ends.up("gateway", ""));
    assert_eq!(ends.filters("lan"), 0);
    let shown = ends.tc("filter show dev lan ingress");
    assert!(shown.contains("pref 9 u32"), "{shown}");
    succeeded(&ends.down("gateway"));
    ends.tc("qdisc del dev lan clsact");

    succeeded(&ends.up("gateway", LINES));
    ends.kill_keeper();
    assert_eq!(ends.filters("lan"), 1);
    succeeded(&ends.down("gateway"));
    assert_eq!(ends.filters("lan"), 0);
    assert!(!ends.has_qdisc("lan"));
}

#[test]
fn nothing_passes_while_a_keeper_stands_still() {
    if skips("nothing_passes_while_a_keeper_stands_still") {
        return;
    }
    let ends = Ends::new();
    ends.both_up();
    // What it has to do for a tunnel that is new is done then.
    sleep(Duration::from_secs(2));
    let keeper = ends.keeper();
    kill_process(keeper, Signal::STOP).unwrap();
    // Longer than an owner may be silent.
    sleep(Duration::from_nanos(OWNER_STALE_NS) + Duration::from_secs(2));
    let bind =
        |role: &str, at: &str| inside(ends.site.space(role), || UdpSocket::bind((at, 0)).unwrap());
    let (host, client) = (bind("host", HOST), bind("client", "10.9.0.2"));
    host.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut seen = Vec::new();
    for _ in 0..10 {
        client.send_to(b"hello", host.local_addr().unwrap()).unwrap();
        seen.extend(host.recv_from(&mut [0; 64]).map(|(_, from)| from.ip().to_string()));
    }
    kill_process(keeper, Signal::CONT).unwrap();
    assert!(seen.iter().all(|from| from == GATEWAY), "came untranslated: {seen:?}");
    ends.wait_until_translated();
}

#[test]
fn two_devices_share_a_qdisc_and_the_last_one_removes_it() {
    if skips("two_devices_share_a_qdisc_and_the_last_one_removes_it") {
        return;
    }
    let ends = Ends::new();
    ends.both_up();
    let second = ends.site.interface('s');
    let text = format!(
        "[Interface]\nPrivateKey = {}\nAddress = 10.8.0.1/24\n#! Nat = masquerade out=lan bypass-firewall\n",
        PrivateKey::from_bytes([0x33; 32]).to_base64().as_str(),
    );
    let file = ends.site.write(&format!("{second}.conf"), &text).unwrap();
    let file = file.to_str().unwrap();
    let tidegate = |arguments: &[&str]| {
        let mut command = ends.gateway().command(tidegate());
        command.args(arguments).envs(FILTERS.iter().copied());
        succeeded(&command.output().unwrap());
    };
    tidegate(&["up", file, "--mode", "udp", "--workers", "1"]);
    assert_eq!(ends.filters("lan"), 2);
    ends.wait_until_translated();
    // Who made it goes first.
    succeeded(&ends.down("gateway"));
    assert_eq!(ends.filters("lan"), 1);
    assert!(ends.has_qdisc("lan"));
    tidegate(&["down", file]);
    assert!(!ends.has_qdisc("lan"));
}

#[test]
fn links_without_an_ethernet_header_are_refused_before_anything_is_begun() {
    if skips("links_without_an_ethernet_header_are_refused_before_anything_is_begun") {
        return;
    }
    let ends = Ends::new();
    ends.gateway().ip("tuntap add mode tun name bare").unwrap();
    for (line, nic) in [
        ("#! Nat = masquerade out=bare bypass-firewall", "bare"),
        ("#! Forward = tcp lo:8443 -> 10.9.0.2:443 bypass-firewall", "lo"),
    ] {
        let output = ends.up("gateway", line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("{nic} is no Ethernet interface")), "{said}");
        assert!(!ends.gateway().has_interface(&ends.interface("gateway")));
        let output = ends.tidegate("gateway", &["check"], &[]);
        let said =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(&format!("{nic} is no Ethernet interface")), "{said}");
    }
}
