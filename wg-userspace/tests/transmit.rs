//! A gateway whose XSKs send, too: which path packets take, by what is counted, and what becomes of them when
//! routes, neighbours and links change.
//!
//! ```text
//!  client                            gateway                         host
//!  outer  198.51.100.2 ───────────── outer  198.51.100.1
//!  second 198.51.101.2 ───────────── second 198.51.101.1
//!                                    lan    192.168.20.1 ─────────── lan 192.168.20.2
//!
//!  daemon (udp) ════════════════════ daemon (native; XSKs on outer)
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    fs::{self, File},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use common::{Daemon, LIMIT, NATIVE, UDP, tidegate, value};
use rustix::{
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recvfrom, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
    process::{Pid, Signal, kill_process},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use wg_common::headers::{Checksum, ETHERNET_LEN, IPV4_LEN, IPV6_LEN, OuterDatagram, parse_frame};
use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER, Programs, Tools},
    lab::{self, CLIENT_V4, GATEWAY_V4, GATEWAY_V6, Lab, Space},
};

const CLIENT_INNER: &str = "10.9.0.2";
/// By which XSKs send in copy mode, too.
const TRANSMIT: &[(&str, &str)] = &[("TIDEGATE_TEST_XSK_TRANSMIT", "1")];

fn lab(test: &str) -> Option<Lab> {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    Some(Lab::new().unwrap())
}

fn tunnel<'a>(lab: &'a Lab, endpoint: &str, options: &[&str]) -> [Daemon<'a>; 2] {
    let options = [NATIVE, options].concat();
    let gateway = Daemon::start_with(&lab.gateway, &lab.interface('g'), &options, TRANSMIT);
    gateway.configure(lab, GATEWAY_CONF);
    let client = Daemon::start(&lab.client, &lab.interface('c'), UDP);
    client.configure(lab, &CLIENT_CONF.replace(GATEWAY_V4, endpoint));
    let answered =
        lab::wait_for(
            "an answer",
            LIMIT,
            || Ok(pings(&lab.client, GATEWAY_INNER[0]).then_some(())),
        );
    answered.unwrap();
    [gateway, client]
}

fn pings(space: &Space, to: &str) -> bool {
    space.ping(to, 1, &["-W", "1"]).is_ok_and(|ping| ping.answered == 1)
}

fn sent(daemon: &Daemon, path: &str) -> u64 {
    daemon.status().sent[path]
}

/// Pings the client until answers come by what `path` says the gateway sends by, and by nothing else.
fn sends_by(gateway: &Daemon, path: &str, limit: Duration) {
    let other = if path == "xsk" { "socket" } else { "xsk" };
    let ok = lab::wait_for(&format!("packets by {path}"), limit, || {
        let before = [path, other].map(|path| sent(gateway, path));
        let answered = gateway.space.ping(CLIENT_INNER, 3, &["-W", "1"])?.answered;
        let after = [path, other].map(|path| sent(gateway, path));
        let is_so = answered == 3 && after[0] >= before[0] + 3 && after[1] == before[1];
        Ok(is_so.then_some(()))
    });
    ok.unwrap_or_else(|error| {
        panic!("{error:#}: {:?}\n{}", gateway.status(), gateway.process.errors())
    });
}

/// Links client and gateway a second time.
fn second_link(lab: &Lab) {
    let client = lab.client.name();
    lab.gateway.ip(&format!("link add second type veth peer name second netns {client}")).unwrap();
    for (space, number) in [(&lab.gateway, 1), (&lab.client, 2)] {
        space.ip(&format!("addr add 198.51.101.{number}/24 dev second")).unwrap();
        space.ip("link set second up").unwrap();
    }
}

fn files(test: &str, endpoint: &str, options: &[&str]) {
    let Some(lab) = lab(test) else { return };
    let programs = Programs::in_folder(tidegate().parent().unwrap()).unwrap();
    let [gateway, _client] = tunnel(&lab, endpoint, options);
    sends_by(&gateway, "xsk", LIMIT);
    let before = ["xsk", "socket"].map(|path| sent(&gateway, path));
    let transfers = Tools::start(&lab, &programs).unwrap().files(16 << 20).unwrap();
    assert!(transfers.iter().all(|transfer| transfer.equal), "{transfers:?}");
    let after = ["xsk", "socket"].map(|path| sent(&gateway, path));
    let (by_xsk, by_socket) = (after[0] - before[0], after[1] - before[1]);
    println!("{test}: {by_xsk} by XSK, {by_socket} by socket, drops {:?}", gateway.status().drops);
    // Two files of at least 11,000 packets each came from behind the gateway.
    assert!(by_xsk > 20_000, "{by_xsk} by XSK, {by_socket} by socket");
    if options.is_empty() {
        assert_eq!(by_socket, 0);
    }
}

#[test]
fn files_over_ipv4() {
    files("files_over_ipv4", GATEWAY_V4, &["--workers", "1"]);
}

#[test]
fn files_over_ipv6() {
    files("files_over_ipv6", &format!("[{GATEWAY_V6}]"), &["--workers", "1"]);
}

/// As `up` asks for it where rules of the firewall concern what leaves.
#[test]
fn xsks_that_are_not_to_send_only_receive() {
    let Some(lab) = lab("xsks_that_are_not_to_send_only_receive") else { return };
    let [gateway, _client] = tunnel(&lab, GATEWAY_V4, &["--by-socket", "outer=a rule"]);
    sends_by(&gateway, "socket", LIMIT);
    assert!(gateway.status().paths["xsk"] > 0, "{:?}", gateway.status());
}

#[test]
fn a_router_is_the_next_hop() {
    let Some(lab) = lab("a_router_is_the_next_hop") else { return };
    // The client is at an address behind itself.
    lab.client.ip("addr add 203.0.113.2/32 dev lo").unwrap();
    lab.gateway.ip(&format!("route add 203.0.113.2 via {CLIENT_V4}")).unwrap();
    lab.client.ip(&format!("route replace {GATEWAY_V4}/32 dev outer src 203.0.113.2")).unwrap();
    let [gateway, _client] = tunnel(&lab, GATEWAY_V4, &["--workers", "1"]);
    assert!(gateway.dump()[1][2].starts_with("203.0.113.2:"), "{:?}", gateway.dump());
    sends_by(&gateway, "xsk", LIMIT);
    // Two ways: which one, the kernel knows.
    second_link(&lab);
    let hops = format!("nexthop via {CLIENT_V4} nexthop via 198.51.101.2");
    lab.gateway.ip(&format!("route replace 203.0.113.2 {hops}")).unwrap();
    sends_by(&gateway, "socket", LIMIT);
    lab.gateway.ip(&format!("route replace 203.0.113.2 via {CLIENT_V4}")).unwrap();
    sends_by(&gateway, "xsk", LIMIT);
}

#[test]
fn a_neighbour_gets_another_mac() {
    let Some(lab) = lab("a_neighbour_gets_another_mac") else { return };
    for key in ["base_reachable_time_ms", "retrans_time_ms"] {
        lab.gateway.set_sysctl(&format!("net/ipv4/neigh/outer/{key}"), "500").unwrap();
    }
    lab.gateway.set_sysctl("net/ipv4/neigh/outer/delay_first_probe_time", "1").unwrap();
    let [gateway, _client] = tunnel(&lab, GATEWAY_V4, &["--workers", "1"]);
    sends_by(&gateway, "xsk", LIMIT);
    // It tells.
    lab.client.set_sysctl("net/ipv4/conf/outer/arp_notify", "1").unwrap();
    lab.client.ip("link set outer address 02:00:00:00:51:01").unwrap();
    sends_by(&gateway, "xsk", LIMIT);
    // It does not: the gateway's kernel has to ask, though it sees none of what is sent there.
    lab.client.set_sysctl("net/ipv4/conf/outer/arp_notify", "0").unwrap();
    lab.client.ip("link set outer address 02:00:00:00:51:02").unwrap();
    let changed = Instant::now();
    sends_by(&gateway, "xsk", Duration::from_secs(40));
    println!("a neighbour that moved in silence was found after {:?}", changed.elapsed());
}

#[test]
fn a_neighbour_that_is_not_resolved_is_left_to_the_kernel() {
    let Some(lab) = lab("a_neighbour_that_is_not_resolved_is_left_to_the_kernel") else { return };
    let [gateway, _client] = tunnel(&lab, GATEWAY_V4, &["--workers", "1"]);
    sends_by(&gateway, "xsk", LIMIT);
    lab.client.ip("link set outer arp off").unwrap();
    lab.gateway.ip(&format!("neigh del {CLIENT_V4} dev outer")).unwrap();
    thread::sleep(Duration::from_millis(500));
    let before = ["xsk", "socket"].map(|path| sent(&gateway, path));
    assert!(!pings(&lab.gateway, CLIENT_INNER));
    let after = ["xsk", "socket"].map(|path| sent(&gateway, path));
    assert_eq!(after[0], before[0], "nobody knows where to");
    assert!(after[1] > before[1]);
    lab.client.ip("link set outer arp on").unwrap();
    sends_by(&gateway, "xsk", LIMIT);
}

#[test]
fn what_leaves_by_another_link_leaves_by_the_socket() {
    let Some(lab) = lab("what_leaves_by_another_link_leaves_by_the_socket") else { return };
    second_link(&lab);
    let [gateway, _client] = tunnel(&lab, GATEWAY_V4, &["--workers", "1"]);
    sends_by(&gateway, "xsk", LIMIT);
    let changes = [
        // A route, a rule for a mark, a rule for a port.
        ("route add 198.51.100.2/32 via 198.51.101.2", "route del 198.51.100.2/32"),
        ("rule add fwmark 0x51 table 7", "rule del fwmark 0x51 table 7"),
        ("rule add ipproto udp sport 51820 table 7", "rule del ipproto udp sport 51820 table 7"),
    ];
    lab.gateway.ip("route add 198.51.100.2/32 via 198.51.101.2 table 7").unwrap();
    for (there, back) in changes {
        println!("{there}");
        lab.gateway.ip(there).unwrap();
        if there.contains("fwmark") {
            sends_by(&gateway, "xsk", LIMIT);
            gateway.wg(&["set", &gateway.interface, "fwmark", "0x51"]);
        }
        sends_by(&gateway, "socket", LIMIT);
        lab.gateway.ip(back).unwrap();
        sends_by(&gateway, "xsk", LIMIT);
        gateway.wg(&["set", &gateway.interface, "fwmark", "0"]);
    }
}

#[test]
fn a_link_that_was_down_is_used_again() {
    let Some(lab) = lab("a_link_that_was_down_is_used_again") else { return };
    let [gateway, _client] = tunnel(&lab, GATEWAY_V4, &["--workers", "1"]);
    sends_by(&gateway, "xsk", LIMIT);
    for end in [&lab.gateway, &lab.client] {
        end.ip("link set outer down").unwrap();
        assert!(!pings(&lab.gateway, CLIENT_INNER));
        end.ip("link set outer up").unwrap();
        sends_by(&gateway, "xsk", LIMIT);
    }
}

#[test]
fn a_process_that_follows_another_sends_by_its_xsks() {
    let Some(lab) = lab("a_process_that_follows_another_sends_by_its_xsks") else { return };
    let [gateway, _client] = tunnel(&lab, GATEWAY_V4, &["--workers", "1"]);
    sends_by(&gateway, "xsk", LIMIT);
    let keeper = gateway.process.pid();
    let child = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap();
    let child: i32 = child.trim().parse().unwrap();
    kill_process(Pid::from_raw(child).unwrap(), Signal::KILL).unwrap();
    sends_by(&gateway, "xsk", LIMIT);
}

/// The frames on the links of a namespace.
struct Wire(OwnedFd);

impl Wire {
    fn of(space: &Space) -> Wire {
        let namespace = File::open(Path::new("/run/netns").join(space.name())).unwrap();
        // A namespace belongs to a thread, a socket stays in the one where it was made.
        let open = || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), kind).unwrap();
            let (family, flags) = (AddressFamily::PACKET, SocketFlags::CLOEXEC);
            socket_with(family, SocketType::RAW, flags, Some(eth::ALL)).unwrap()
        };
        let socket = thread::scope(|scope| scope.spawn(open).join().unwrap());
        set_socket_timeout(&socket, Timeout::Recv, Some(LIMIT)).unwrap();
        Wire(socket)
    }

    /// The next frame with a UDP datagram that `wanted` accepts.
    fn capture(&self, wanted: impl Fn(&OuterDatagram) -> bool) -> Vec<u8> {
        let mut buffer = [0; 2048];
        loop {
            let (_, len, _) = recvfrom(&self.0, &mut buffer, RecvFlags::empty()).unwrap();
            if parse_frame(&buffer[..len]).is_some_and(|datagram| wanted(&datagram)) {
                return buffer[..len].to_vec();
            }
        }
    }
}

/// What the XSK puts before a message is what the kernel puts before one as long, but for what differs
/// between any two: identification, checksums.
#[test]
fn headers_are_those_of_the_kernel() {
    for endpoint in [GATEWAY_V4.to_owned(), format!("[{GATEWAY_V6}]")] {
        let Some(lab) = lab("headers_are_those_of_the_kernel") else { return };
        // As the kernel's WireGuard.
        lab.gateway.set_sysctl("net/ipv6/auto_flowlabels", "0").unwrap();
        let [gateway, _client] = tunnel(&lab, &endpoint, &["--workers", "1"]);
        let port: u16 = value(GATEWAY_CONF, "ListenPort").parse().unwrap();
        let mut captured = Vec::new();
        for (path, rule) in [("xsk", "del"), ("socket", "add")] {
            if rule == "add" {
                // A route by a number is more than is looked into.
                let (family, to) = match endpoint.as_str() {
                    GATEWAY_V4 => ("-4", "198.51.100.2/32"),
                    _ => ("-6", "2001:db8:51::2/128"),
                };
                lab.gateway.ip("nexthop add id 51 dev outer").unwrap_or_else(|_| {
                    lab.gateway.ip(&format!("{family} nexthop add id 51 dev outer")).unwrap();
                });
                lab.gateway.ip(&format!("{family} route add {to} nhid 51")).unwrap_or_else(|_| {
                    lab.gateway.ip("nexthop del id 51").unwrap();
                    lab.gateway.ip(&format!("{family} nexthop add id 51 dev outer")).unwrap();
                    lab.gateway.ip(&format!("{family} route add {to} nhid 51")).unwrap();
                });
            }
            sends_by(&gateway, path, LIMIT);
            let wire = Wire::of(&lab.client);
            // ECT(0) inside is ECT(0) outside.
            let ping = lab.gateway.ping(CLIENT_INNER, 2, &["-s", "500", "-Q", "2"]).unwrap();
            assert_eq!(ping.answered, 2);
            captured.push(
                wire.capture(|datagram| {
                    datagram.src.port() == port && datagram.payload.len() > 500
                }),
            );
        }
        let [ours, theirs] = captured.try_into().unwrap();
        check_sums(&ours);
        let masked = |frame: &[u8]| {
            let mut frame = frame.to_vec();
            let v4 = frame[12] == 8;
            let udp = ETHERNET_LEN + if v4 { IPV4_LEN } else { IPV6_LEN };
            if v4 {
                assert_ne!(frame[ETHERNET_LEN + 4..][..2], [0, 0], "every datagram has a number");
                frame[ETHERNET_LEN + 4..][..2].fill(0);
                frame[ETHERNET_LEN + 10..][..2].fill(0);
            }
            frame[udp + 6..][..2].fill(0);
            frame.truncate(udp + 8);
            frame
        };
        assert_eq!(ours.len(), theirs.len());
        assert_eq!(masked(&ours), masked(&theirs));
        assert_eq!(parse_frame(&ours).unwrap().tos, 2);
    }
}

fn check_sums(frame: &[u8]) {
    let datagram = parse_frame(frame).unwrap();
    let v4 = datagram.src.is_ipv4();
    let udp = ETHERNET_LEN + if v4 { IPV4_LEN } else { IPV6_LEN };
    if v4 {
        assert_eq!(Checksum::default().bytes(&frame[ETHERNET_LEN..udp]).finish(), 0);
    }
    let udp = &frame[udp..datagram.payload.end];
    let sum = Checksum::pseudo(datagram.src.ip(), datagram.dst.ip(), 17, udp.len() as u32);
    assert_eq!(sum.bytes(udp).finish(), 0);
    assert_ne!(udp[6..8], [0, 0]);
}
