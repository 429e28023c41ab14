//! What the kernel's WireGuard does with its interface, its endpoints and the network under it, ours
//! does: the checks of the kernel's `netns.sh` that whole tunnels are needed for, and what issues of
//! other implementations add to them.
//!
//! ```text
//!  client                         gateway                          host
//!  outer 198.51.100.2 ─────────── outer 198.51.100.1
//!                                 lan   192.168.20.1 ───────────── lan 192.168.20.2
//!
//!  mostly   daemon (udp) ════════ daemon (udp or native)           a host behind the gateway
//!  NAT      two daemons ───────── a router that masquerades ────── daemon
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use common::{Daemon, LIMIT, NATIVE, UDP, public_key, value, xdp_program};
use socket2::SockRef;
use wg_userspace::sys::netns::NetNs;
use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER},
    lab::{
        self, CLIENT_V4, CLIENT_V6, GATEWAY_V4, GATEWAY_V6, HOST_V4, LAN, Lab, OUTER, Space,
        find_program,
    },
};

const CLIENT_INNER: &str = "10.9.0.2";
/// An inner address that no peer owns.
const NOBODY: [&str; 2] = ["10.9.0.77", "fd09::77"];
const PORT: &str = "51820";

/// The namespaces, unless the test must be skipped.
fn lab(test: &str) -> Option<Lab> {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    Some(Lab::new().unwrap())
}

/// As [`lab`], for tests that filter or translate packets.
fn lab_with_iptables(test: &str) -> Option<Lab> {
    let lab = lab(test)?;
    let works = find_program("iptables").is_some()
        && lab.gateway.run("iptables", &["-t", "nat", "-S"]).is_ok();
    if !works {
        eprintln!("SKIPPED {test}: needs iptables with nat and conntrack");
        return None;
    }
    Some(lab)
}

/// The gateway of the first tunnel with this line more for its peer.
fn gateway_conf(line: &str) -> String {
    format!("{GATEWAY_CONF}{line}\n")
}

/// The client of the first tunnel with this line more for its peer.
fn client_conf(line: &str) -> String {
    format!("{CLIENT_CONF}{line}\n")
}

fn start<'a>(
    lab: &Lab,
    space: &'a Space,
    suffix: char,
    options: &[&str],
    conf: &str,
) -> Daemon<'a> {
    let daemon = Daemon::start(space, &lab.interface(suffix), options);
    daemon.configure(lab, conf);
    daemon
}

/// A gateway and a client that have talked.
fn tunnel<'a>(lab: &'a Lab, options: &[&str], gateway: &str, client: &str) -> [Daemon<'a>; 2] {
    let gateway = start(lab, &lab.gateway, 'g', options, gateway);
    let client = start(lab, &lab.client, 'c', UDP, client);
    answers(&lab.client, GATEWAY_INNER[0]);
    [gateway, client]
}

/// Whether one echo request is answered within a second.
fn pings(space: &Space, to: &str) -> bool {
    space.ping(to, 1, &["-W", "1"]).is_ok_and(|ping| ping.answered == 1)
}

/// Waits until echo requests are answered.
fn answers(space: &Space, to: &str) {
    answers_within(space, to, LIMIT);
}

fn answers_within(space: &Space, to: &str, limit: Duration) {
    lab::wait_for(&format!("an answer of {to}"), limit, || Ok(pings(space, to).then_some(())))
        .unwrap();
}

/// Runs a line of shell inside, whatever its exit code, and gives what it printed, errors too.
fn shell(space: &Space, line: &str) -> String {
    space.run("sh", &["-c", &format!("{{ {line}; }} 2>&1 || true")]).unwrap()
}

fn iptables(space: &Space, arguments: &str) {
    space.run("iptables", &arguments.split(' ').collect::<Vec<_>>()).unwrap();
}

impl Daemon<'_> {
    fn drops(&self, reason: &str) -> u64 {
        self.status().drops.get(reason).copied().unwrap_or(0)
    }

    /// `wg set` of the interface.
    fn set(&self, arguments: &str) {
        let arguments = arguments.split(' ');
        self.wg(&["set", &self.interface].into_iter().chain(arguments).collect::<Vec<_>>());
    }

    /// `ip link set dev` of the interface.
    fn link(&self, arguments: &str) {
        self.space.ip(&format!("link set dev {} {arguments}", self.interface)).unwrap();
    }

    /// Where its first peer is.
    fn endpoint(&self) -> String {
        self.dump()[1][2].clone()
    }

    /// Waits until its first peer is there.
    fn sees(&self, endpoint: &str) {
        let seen =
            lab::wait_for(endpoint, LIMIT, || Ok((self.endpoint() == endpoint).then_some(())));
        seen.unwrap_or_else(|error| panic!("{error:#}: it is {}", self.endpoint()));
    }

    /// Waits until it has counted drops for this reason.
    fn drops_soon(&self, reason: &str, more_than: u64) {
        let counted =
            lab::wait_for(reason, LIMIT, || Ok((self.drops(reason) > more_than).then_some(())));
        counted.unwrap_or_else(|error| panic!("{error:#}: {:?}", self.status().drops));
    }
}

/// Netns.sh 2: an initiation is 148 bytes, a response 92, an echo request of 84 bytes with its padding
/// 128.
#[test]
fn bytes_are_counted_as_in_the_kernel() {
    let Some(lab) = lab("bytes_are_counted_as_in_the_kernel") else { return };
    let gateway = start(&lab, &lab.gateway, 'g', NATIVE, GATEWAY_CONF);
    let client = start(&lab, &lab.client, 'c', UDP, CLIENT_CONF);
    assert_eq!(lab.client.ping(GATEWAY_INNER[0], 10, &[]).unwrap().answered, 10);
    let transfer = |daemon: &Daemon| {
        let peer = daemon.dump().remove(1);
        assert_ne!(peer[4], "0", "no handshake");
        (peer[5].clone(), peer[6].clone())
    };
    assert_eq!(transfer(&client), ("1372".to_owned(), "1428".to_owned()));
    assert_eq!(transfer(&gateway), ("1428".to_owned(), "1372".to_owned()));
}

/// Netns.sh 16, and the same for a sender on the same host, for IPv6, and for a peer that has no endpoint.
#[test]
fn senders_are_told_what_is_unreachable() {
    let Some(lab) = lab_with_iptables("senders_are_told_what_is_unreachable") else { return };
    let gateway = start(&lab, &lab.gateway, 'g', UDP, GATEWAY_CONF);
    let ping = |space, to: &str| shell(space, &format!("ping -n -W 1 -c 1 {to}"));
    let v4 = |to| format!("From {to} icmp_seq=1 Destination Host Unreachable");
    let v6 = |to| format!("From {to} icmp_seq=1 Destination unreachable: Address unreachable");
    // From this host, and from one behind it.
    for space in [&lab.gateway, &lab.host] {
        for (to, expected) in [(NOBODY[0], v4(NOBODY[0])), (NOBODY[1], v6(NOBODY[1]))] {
            let before = gateway.drops("no_peer");
            let said = ping(space, to);
            assert!(said.contains(&expected), "{expected}, not:\n{said}");
            gateway.drops_soon("no_peer", before);
        }
        for (to, expected) in [(CLIENT_INNER, v4(CLIENT_INNER)), ("fd09::2", v6("fd09::2"))] {
            let before = gateway.drops("no_endpoint");
            let said = ping(space, to);
            assert!(said.contains(&expected), "{expected}, not:\n{said}");
            gateway.drops_soon("no_endpoint", before);
        }
    }
    // Masqueraded on its way: the answer finds back to who sent it.
    lab.gateway.ip(&format!("route add 172.16.0.0/24 dev {}", gateway.interface)).unwrap();
    lab.host.ip("route add 172.16.0.0/24 via 192.168.20.1").unwrap();
    iptables(
        &lab.gateway,
        &format!("-t nat -A POSTROUTING -o {} -j MASQUERADE", gateway.interface),
    );
    let said = ping(&lab.host, "172.16.0.1");
    assert!(said.contains(&v4("172.16.0.1")), "{said}");
    // A TCP connection is refused at once, which is what it is for.
    let started = Instant::now();
    let said = shell(&lab.gateway, &format!("bash -c ': > /dev/tcp/{}/80'", NOBODY[0]));
    assert!(said.contains("No route to host"), "{said}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn an_interface_that_is_down_answers_nothing_and_comes_back_by_itself() {
    let Some(lab) = lab("an_interface_that_is_down_answers_nothing_and_comes_back_by_itself")
    else {
        return;
    };
    for options in [UDP, NATIVE] {
        let keepalive = "PersistentKeepalive = 25";
        let [gateway, client] = tunnel(&lab, options, &gateway_conf(keepalive), CLIENT_CONF);
        gateway.link("down");
        let before = gateway.drops("interface_down");
        let sent_before = client.dump()[1][5].clone();
        assert!(!pings(&lab.client, GATEWAY_INNER[0]));
        // Neither do handshakes get an answer: this client has to begin with one.
        client.link("down");
        client.link("up");
        lab.client.ip(&format!("route replace 10.9.0.1/32 dev {}", client.interface)).unwrap();
        assert!(!pings(&lab.client, GATEWAY_INNER[0]));
        gateway.drops_soon("interface_down", before);
        assert_eq!(client.dump()[1][5], sent_before, "it has received something");

        // What `ip link set down` took away comes back; the tunnel does so by itself.
        gateway.link("up");
        let now = Instant::now();
        lab.gateway.ip(&format!("route replace 10.9.0.2/32 dev {}", gateway.interface)).unwrap();
        answers_within(&lab.gateway, CLIENT_INNER, Duration::from_secs(6));
        println!("back after {:?}", now.elapsed());
    }
}

/// Netns.sh 11.
#[test]
fn a_tunnel_routed_into_itself_does_not_storm() {
    let Some(lab) = lab("a_tunnel_routed_into_itself_does_not_storm") else { return };
    let everything = |endpoint: &str| {
        CLIENT_CONF
            .replace("10.9.0.1/32, fd09::1/128, 192.168.20.0/24, fd20::/64", "0.0.0.0/0, ::/0")
            .replace(GATEWAY_V4, endpoint)
    };
    let gateway = start(&lab, &lab.gateway, 'g', UDP, GATEWAY_CONF);
    for (endpoint, route) in [
        (GATEWAY_V4.to_owned(), format!("{GATEWAY_V4}/32")),
        (format!("[{GATEWAY_V6}]"), format!("{GATEWAY_V6}/128")),
    ] {
        let client = Daemon::start(&lab.client, &lab.interface('c'), UDP);
        // No default routes: they would replace none in this namespace, but the prefixes are enough.
        let conf = everything(&endpoint);
        let without = conf.replace("AllowedIPs = 0.0.0.0/0, ::/0", "AllowedIPs = 10.9.0.1/32");
        client.configure(&lab, &without);
        client.set(&format!("peer {} allowed-ips 0.0.0.0/0,::/0", value(&conf, "PublicKey")));
        answers(&lab.client, GATEWAY_INNER[0]);

        let route = format!("{route} dev {}", client.interface);
        let bytes = || -> u64 {
            let links = lab.client.ip_json(&format!("-s link show dev {}", client.interface));
            links.unwrap().pointer("/0/stats64/tx/bytes").unwrap().as_u64().unwrap()
        };
        lab.client.ip(&format!("route add {route}")).unwrap();
        let before = bytes();
        // Some of them in two parts, once there are 60 bytes around them.
        for size in ["56", "1380"] {
            shell(
                &lab.client,
                &format!("ping -q -W 1 -c 10 -i 0.02 -s {size} {}", GATEWAY_INNER[0]),
            );
        }
        thread::sleep(Duration::from_millis(500));
        let grown = bytes() - before;
        assert!(grown < 70_000, "{grown} bytes");
        client.drops_soon("routing_loop", 9);
        lab.client.ip(&format!("route del {route}")).unwrap();
        answers(&lab.client, GATEWAY_INNER[0]);
    }
    drop(gateway);
}

#[test]
fn an_interface_that_moves_to_another_namespace_is_followed() {
    let test = "an_interface_that_moves_to_another_namespace_is_followed";
    let Some(lab) = lab_with_iptables(test) else { return };
    let [mut gateway, _client] = tunnel(&lab, NATIVE, GATEWAY_CONF, CLIENT_CONF);
    let interface = gateway.interface.clone();
    gateway.link(&format!("netns {}", lab.host.name()));
    gateway.space = &lab.host;
    // Keypairs are gone as well, so that XDP drops what the client sends under them.
    let refused = |gateway: &Daemon| {
        let steer = gateway.status().steer;
        gateway.drops("interface_down") + steer.get("unknown_index").copied().unwrap_or(0)
    };
    assert!(!pings(&lab.client, GATEWAY_INNER[0]), "it is down there");
    assert!(refused(&gateway) > 0, "{:?}", gateway.status());

    lab.host.ip(&format!("addr add 10.9.0.1/32 dev {interface}")).unwrap();
    gateway.link("up");
    lab.host.ip(&format!("route add {CLIENT_INNER}/32 dev {interface}")).unwrap();
    answers(&lab.host, CLIENT_INNER);
    answers(&lab.client, GATEWAY_INNER[0]);
    let addresses = lab.host.ip_json(&format!("-6 addr show dev {interface}")).unwrap();
    assert!(!addresses.to_string().contains("fe80"), "nobody owns a link-local one: {addresses}");

    // Its MTU is known: nothing is padded beyond it.
    gateway.link("mtu 1299");
    iptables(&lab.client, "-A INPUT -p udp -m length --length 1360:9000 -j DROP");
    let full = || lab.host.ping(CLIENT_INNER, 1, &["-s", "1269", "-W", "1"]);
    lab::wait_for("a full packet", LIMIT, || Ok((full()?.answered == 1).then_some(()))).unwrap();

    // Its state is: down there, nothing is answered.
    let before = refused(&gateway);
    gateway.link("down");
    assert!(!pings(&lab.client, GATEWAY_INNER[0]));
    assert!(refused(&gateway) > before, "{:?}", gateway.status());
    // And its end.
    lab.host.ip(&format!("link delete dev {interface}")).unwrap();
    gateway.ends_cleanly();
}

#[test]
fn changes_of_the_underlay_are_survived() {
    let Some(lab) = lab("changes_of_the_underlay_are_survived") else { return };
    for (mode, options) in [("udp", UDP), ("native", NATIVE)] {
        let keepalive = gateway_conf("PersistentKeepalive = 1");
        let [gateway, client] = tunnel(&lab, options, &keepalive, CLIENT_CONF);
        assert_eq!(gateway.status().mode, mode);
        let steered = || gateway.status().steer.get("steered").copied().unwrap_or(0);
        let program = xdp_program(&lab);

        lab.gateway.ip(&format!("link set dev {OUTER} down")).unwrap();
        assert!(!pings(&lab.client, GATEWAY_INNER[0]));
        lab.gateway.ip(&format!("link set dev {OUTER} up")).unwrap();
        let before = steered();
        answers(&lab.client, GATEWAY_INNER[0]);
        answers(&lab.gateway, CLIENT_INNER);
        assert_eq!(xdp_program(&lab), program);
        assert_eq!(steered() > before, mode == "native");

        // Another address: the client learns of it by the gateway's keepalive.
        lab.gateway.ip(&format!("addr add 198.51.100.9/24 dev {OUTER}")).unwrap();
        lab.gateway.ip(&format!("addr del {GATEWAY_V4}/24 dev {OUTER}")).unwrap();
        lab.gateway.ip(&format!("addr add 198.51.100.9/24 dev {OUTER}")).unwrap_or_default();
        client.sees(&format!("198.51.100.9:{PORT}"));
        let before = steered();
        answers(&lab.client, GATEWAY_INNER[0]);
        assert_eq!(steered() > before, mode == "native", "{:?}", gateway.status());
        lab.gateway.ip(&format!("addr add {GATEWAY_V4}/24 dev {OUTER}")).unwrap();
        lab.gateway.ip(&format!("addr del 198.51.100.9/24 dev {OUTER}")).unwrap();
        lab.gateway.ip(&format!("addr add {GATEWAY_V4}/24 dev {OUTER}")).unwrap_or_default();
        client.sees(&format!("{GATEWAY_V4}:{PORT}"));

        // Another cable: where XSKs were, sockets do their work.
        lab.gateway.ip(&format!("link del dev {OUTER}")).unwrap();
        let there = lab.client.name();
        lab.gateway
            .ip(&format!("link add {OUTER} type veth peer name {OUTER} netns {there}"))
            .unwrap();
        for (space, addresses) in
            [(&lab.gateway, [GATEWAY_V4, GATEWAY_V6]), (&lab.client, [CLIENT_V4, CLIENT_V6])]
        {
            space.ip(&format!("addr add {}/24 dev {OUTER}", addresses[0])).unwrap();
            space.ip(&format!("addr add {}/64 dev {OUTER} nodad", addresses[1])).unwrap();
            space.ip(&format!("link set {OUTER} up")).unwrap();
        }
        answers(&lab.client, GATEWAY_INNER[0]);
        answers(&lab.gateway, CLIENT_INNER);
    }
}

/// Netns.sh 9, 23, 24.
#[test]
fn keys_and_peers_change_as_in_the_kernel() {
    let Some(lab) = lab("keys_and_peers_change_as_in_the_kernel") else { return };
    let [gateway, client] = tunnel(&lab, UDP, GATEWAY_CONF, CLIENT_CONF);
    let key_file =
        |name: &str, key: &str| lab.write(name, key).unwrap().to_str().unwrap().to_owned();
    let public = |key: &str| public_key(&lab.gateway, &lab, key);

    // The client's key changes; it and the gateway handshake at once, then the gateway's does.
    let old = value(GATEWAY_CONF, "PublicKey");
    let new = client.wg(&["genkey"]).trim().to_owned();
    let preshared = key_file("psk", value(GATEWAY_CONF, "PresharedKey"));
    client.set(&format!("private-key {}", key_file("new", &new)));
    gateway.set(&format!("peer {old} remove"));
    let peer = public(&new);
    gateway.set(&format!("peer {peer} preshared-key {preshared} allowed-ips {CLIENT_INNER}/32"));
    assert!(pings(&lab.client, GATEWAY_INNER[0]), "no answer within a second");
    assert!(pings(&lab.gateway, CLIENT_INNER));
    let gateway_key = gateway.wg(&["genkey"]).trim().to_owned();
    gateway.set(&format!("private-key {}", key_file("gateway", &gateway_key)));
    client.set(&format!("peer {} remove", value(CLIENT_CONF, "PublicKey")));
    client.set(&format!(
        "peer {} preshared-key {preshared} allowed-ips 10.9.0.1/32",
        public(&gateway_key)
    ));
    assert!(pings(&lab.gateway, CLIENT_INNER), "no answer within a second");
    assert!(pings(&lab.client, GATEWAY_INNER[0]));

    // Without a key nothing is answered; with it again, sessions begin anew.
    gateway.set("private-key /dev/null");
    assert_eq!(gateway.dump()[0][0], "(none)");
    assert!(!pings(&lab.gateway, CLIENT_INNER));
    gateway.set(&format!("private-key {}", key_file("gateway", &gateway_key)));
    answers_within(&lab.gateway, CLIENT_INNER, Duration::from_secs(2));

    // Nobody is a peer of himself.
    gateway.set(&format!("private-key {}", key_file("new", &new)));
    assert_eq!(gateway.dump().len(), 1, "the peer of this key is gone");
    gateway.set(&format!("peer {peer} allowed-ips 10.0.0.0/8"));
    assert_eq!(gateway.dump().len(), 1);
    gateway.set(&format!("private-key {}", key_file("gateway", &gateway_key)));
    gateway.set(&format!("peer {peer} allowed-ips 10.0.0.0/8"));
    assert_eq!(gateway.dump().len(), 2);
    // A key is shown as it is used.
    let unclamped = format!("/{}", &value(GATEWAY_CONF, "PrivateKey")[1..]);
    gateway.set(&format!("private-key {}", key_file("unclamped", &unclamped)));
    assert_eq!(gateway.dump()[0][0], format!("+{}", &unclamped[1..]));

    // Prefixes may lie within each other.
    let overlapping =
        "0.0.0.0/0,10.0.0.0/8,100.0.0.0/10,172.16.0.0/12,192.168.0.0/16,::/0,2000::/3";
    gateway.set(&format!("peer {peer} allowed-ips {overlapping}"));
    let shown = gateway.dump()[1][3].clone();
    assert!(overlapping.split(',').all(|net| shown.split(',').any(|s| s == net)), "{shown}");
}

/// Netns.sh 25.
#[test]
fn peers_of_low_order_may_be_added_and_are_sent_nothing() {
    const LOW_ORDER: [&str; 7] = [
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA=",
        "X5yVvKNQjCSx0LFVnIPvWwREXMRYHI6G2CJO3dCfEVc=",
        "7P///////////////////////////////////////38=",
        "7f///////////////////////////////////////38=",
        "7v///////////////////////////////////////38=",
    ];
    let test = "peers_of_low_order_may_be_added_and_are_sent_nothing";
    let Some(lab) = lab(test) else { return };
    let gateway = start(&lab, &lab.gateway, 'g', UDP, GATEWAY_CONF);
    let listener = inside(&lab.client, || UdpSocket::bind("0.0.0.0:1111").unwrap());
    let add = |key: &str| {
        let rest =
            format!("persistent-keepalive 1 endpoint {CLIENT_V4}:1111 allowed-ips 10.9.9.9/32");
        gateway.set(&format!("peer {key} {rest}"));
    };
    LOW_ORDER.iter().for_each(|key| add(key));
    assert_eq!(gateway.dump().len(), 1 + 1 + LOW_ORDER.len());
    listener.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut datagram = [0; 200];
    assert!(listener.recv(&mut datagram).is_err(), "it was sent something");
    // An honest key is.
    let key = gateway.wg(&["genkey"]);
    add(&public_key(&lab.gateway, &lab, key.trim()));
    assert_eq!(listener.recv(&mut datagram).unwrap(), 148);
}

/// Netns.sh 7.
#[test]
fn a_peer_that_roams_is_followed() {
    let Some(lab) = lab("a_peer_that_roams_is_followed") else { return };
    for options in [UDP, NATIVE] {
        let [gateway, client] = tunnel(&lab, options, GATEWAY_CONF, CLIENT_CONF);
        let peer = value(CLIENT_CONF, "PublicKey");
        let moved_to = |endpoint: &str| {
            answers(&lab.client, GATEWAY_INNER[0]);
            gateway.sees(endpoint);
            answers(&lab.gateway, CLIENT_INNER);
        };
        client.set("listen-port 2000");
        moved_to(&format!("{CLIENT_V4}:2000"));
        lab.client.ip(&format!("addr add 198.51.100.22/24 dev {OUTER}")).unwrap();
        lab.client.ip(&format!("addr del {CLIENT_V4}/24 dev {OUTER}")).unwrap();
        // It was a secondary address of the one that went.
        let _ = lab.client.ip(&format!("addr add 198.51.100.22/24 dev {OUTER}"));
        moved_to("198.51.100.22:2000");
        client.set(&format!("peer {peer} endpoint [{GATEWAY_V6}]:{PORT}"));
        moved_to(&format!("[{CLIENT_V6}]:2000"));
        client.set("listen-port 3000");
        moved_to(&format!("[{CLIENT_V6}]:3000"));
        client.set(&format!("peer {peer} endpoint {GATEWAY_V4}:{PORT}"));
        moved_to("198.51.100.22:3000");
        // The gateway was where it is all the time.
        assert_eq!(client.endpoint(), format!("{GATEWAY_V4}:{PORT}"));
        lab.client.ip(&format!("addr add {CLIENT_V4}/24 dev {OUTER}")).unwrap();
        lab.client.ip(&format!("addr del 198.51.100.22/24 dev {OUTER}")).unwrap();
        let _ = lab.client.ip(&format!("addr add {CLIENT_V4}/24 dev {OUTER}"));
    }
}

/// Netns.sh 12, with two peers, and with a NAT that forgets.
#[test]
fn peers_behind_one_nat_are_told_apart_and_followed() {
    let test = "peers_behind_one_nat_are_told_apart_and_followed";
    let Some(lab) = lab_with_iptables(test) else { return };
    let router = &lab.gateway;
    for timeout in ["udp_timeout", "udp_timeout_stream"] {
        router.set_sysctl(&format!("net/netfilter/nf_conntrack_{timeout}"), "2").unwrap();
    }
    iptables(router, &format!("-t nat -A POSTROUTING -o {LAN} -j MASQUERADE"));
    lab.client.ip(&format!("route add 192.168.20.0/24 via {GATEWAY_V4}")).unwrap();

    let server = start(&lab, &lab.host, 's', UDP, &GATEWAY_CONF.replace(", fd09::1/64", ""));
    lab.host.ip(&format!("addr add 10.9.1.1/24 dev {}", server.interface)).unwrap();
    let keepalive = client_conf("PersistentKeepalive = 1")
        .replace(", fd09::2/64", "")
        .replace(", fd09::1/128, 192.168.20.0/24, fd20::/64", "")
        .replace(GATEWAY_V4, HOST_V4);
    let first = start(&lab, &lab.client, 'a', UDP, &keepalive);
    let second_key = first.wg(&["genkey"]).trim().to_owned();
    let second_conf = keepalive
        .replace("10.9.0.2/24", "10.9.1.3/24")
        .replace("10.9.0.1/32", "10.9.1.1/32")
        .replace(value(CLIENT_CONF, "PrivateKey"), &second_key)
        .replace("PresharedKey", "#PresharedKey");
    let second_peer = public_key(&lab.host, &lab, &second_key);
    server.set(&format!("peer {second_peer} allowed-ips 10.9.1.3/32"));
    let second = start(&lab, &lab.client, 'b', UDP, &second_conf);
    answers(&lab.client, GATEWAY_INNER[0]);
    answers(&lab.client, "10.9.1.1");

    let inner = [CLIENT_INNER, "10.9.1.3"];
    let endpoints =
        || -> Vec<String> { server.dump()[1..].iter().map(|peer| peer[2].clone()).collect() };
    let before = endpoints();
    assert!(before.iter().all(|endpoint| endpoint.starts_with("192.168.20.1:")), "{before:?}");
    assert_ne!(before[0], before[1]);
    // Keepalives hold the NAT's memory.
    thread::sleep(Duration::from_secs(3));
    assert!(inner.iter().all(|to| pings(&lab.host, to)));
    assert_eq!(endpoints(), before);

    // The NAT forgets, and maps them to other ports.
    router.ip(&format!("link set dev {OUTER} down")).unwrap();
    thread::sleep(Duration::from_secs(3));
    iptables(router, "-t nat -F POSTROUTING");
    let snat = "-j SNAT --to-source 192.168.20.1:40000-40099";
    iptables(router, &format!("-t nat -A POSTROUTING -o {LAN} -p udp {snat}"));
    router.ip(&format!("link set dev {OUTER} up")).unwrap();
    for to in inner {
        answers(&lab.host, to);
    }
    let after = endpoints();
    assert!(after.iter().all(|endpoint| endpoint.starts_with("192.168.20.1:400")), "{after:?}");
    assert_ne!(after[0], after[1]);
    drop((first, second));
}

/// Netns.sh 17 to 20.
#[test]
fn replies_leave_from_the_address_dialled_as_long_as_it_is_there() {
    let test = "replies_leave_from_the_address_dialled_as_long_as_it_is_there";
    let Some(lab) = lab(test) else { return };
    let [gateway, client] = tunnel(&lab, UDP, GATEWAY_CONF, CLIENT_CONF);
    let peer = value(CLIENT_CONF, "PublicKey");
    lab.gateway.ip(&format!("addr add 198.51.100.7/24 dev {OUTER}")).unwrap();
    // Preferred by the kernel over the one that it has already.
    lab.gateway.ip(&format!("addr add 2001:db8:51::7/64 dev {OUTER} nodad")).unwrap();
    lab.client.ip(&format!("route replace 192.168.20.0/24 via {GATEWAY_V4}")).unwrap();
    let dial = |endpoint: &str| {
        client.set(&format!("peer {peer} endpoint {endpoint}"));
        answers(&lab.client, GATEWAY_INNER[0]);
        answers(&lab.gateway, CLIENT_INNER);
        // Would the reply have come from elsewhere, the client would have moved there.
        assert_eq!(client.endpoint(), endpoint);
    };
    for address in ["192.168.20.1", GATEWAY_V4, "198.51.100.7"] {
        dial(&format!("{address}:{PORT}"));
    }
    lab.gateway.ip(&format!("addr del 198.51.100.7/24 dev {OUTER}")).unwrap();
    answers(&lab.gateway, CLIENT_INNER);
    client.sees(&format!("{GATEWAY_V4}:{PORT}"));
    for address in [GATEWAY_V6, "2001:db8:51::7"] {
        dial(&format!("[{address}]:{PORT}"));
    }
    lab.gateway.ip(&format!("addr del 2001:db8:51::7/64 dev {OUTER}")).unwrap();
    answers(&lab.gateway, CLIENT_INNER);
    client.sees(&format!("[{GATEWAY_V6}]:{PORT}"));

    // A better route by another link takes over, with its address.
    let there = lab.client.name();
    lab.gateway.ip(&format!("link add better type veth peer name better netns {there}")).unwrap();
    lab.client.ip("link set better up").unwrap();
    lab.gateway.ip("addr add 198.51.100.3/24 dev better noprefixroute").unwrap();
    lab.gateway.ip("link set better up").unwrap();
    for space in [&lab.gateway, &lab.client] {
        for link in ["all", "better", OUTER] {
            space.set_sysctl(&format!("net/ipv4/conf/{link}/rp_filter"), "0").unwrap();
        }
    }
    dial(&format!("{GATEWAY_V4}:{PORT}"));
    lab.gateway.ip(&format!("route add {CLIENT_V4}/32 dev better src 198.51.100.3")).unwrap();
    answers(&lab.gateway, CLIENT_INNER);
    client.sees(&format!("198.51.100.3:{PORT}"));
    drop(gateway);
}

/// Netns.sh 13.
#[test]
fn another_mark_and_another_port_count_at_once() {
    let Some(lab) = lab("another_mark_and_another_port_count_at_once") else { return };
    let [gateway, client] = tunnel(&lab, NATIVE, GATEWAY_CONF, CLIENT_CONF);
    let there = lab.gateway.name();
    lab.client.ip(&format!("link add marked type veth peer name marked netns {there}")).unwrap();
    lab.client.ip("addr add 198.51.100.99/32 dev marked").unwrap();
    lab.client.ip("link set marked up").unwrap();
    lab.gateway.ip("link set marked up").unwrap();
    lab.gateway.ip("route add 198.51.100.99/32 dev marked").unwrap();
    lab.client
        .ip(&format!("route add {GATEWAY_V4}/32 dev marked src 198.51.100.99 table 7"))
        .unwrap();
    lab.client.ip("rule add fwmark 7 table 7").unwrap();
    for space in [&lab.gateway, &lab.client] {
        for link in ["all", "marked", OUTER] {
            space.set_sysctl(&format!("net/ipv4/conf/{link}/rp_filter"), "0").unwrap();
        }
    }
    for (mark, address) in [("7", "198.51.100.99"), ("0", CLIENT_V4), ("7", "198.51.100.99")] {
        client.set(&format!("fwmark {mark}"));
        assert!(pings(&lab.client, GATEWAY_INNER[0]), "mark {mark}");
        let bound = ["-W", "1", "-I", &client.interface];
        assert_eq!(lab.client.ping(GATEWAY_INNER[0], 1, &bound).unwrap().answered, 1);
        assert!(gateway.endpoint().starts_with(&format!("{address}:")), "{}", gateway.endpoint());
    }
    // To another port and back, faster than any worker lets go of its sockets; marks stay.
    for port in ["2000", "2001", "2000", "2002", "2001", "2000", "2002", "2000", "2001", "2000"] {
        client.set(&format!("listen-port {port}"));
        assert_eq!(client.dump()[0][2], port);
    }
    assert!(pings(&lab.client, GATEWAY_INNER[0]));
    assert_eq!(gateway.endpoint(), "198.51.100.99:2000");
    assert!(pings(&lab.gateway, CLIENT_INNER));
    // The gateway's port: its next datagram takes the client along, and it is steered there.
    gateway.set("listen-port 4000");
    answers(&lab.gateway, CLIENT_INNER);
    client.sees(&format!("{GATEWAY_V4}:4000"));
    client.set("fwmark 0");
    let steered = || gateway.status().steer["steered"];
    let before = steered();
    answers(&lab.client, GATEWAY_INNER[0]);
    assert!(steered() > before);
    // Somebody else's port is refused, and changes nothing.
    let foreign = inside(&lab.client, || UdpSocket::bind("0.0.0.0:5000").unwrap());
    let refused = client.space.run("wg", &["set", &client.interface, "listen-port", "5000"]);
    assert!(refused.is_err());
    assert_eq!(client.dump()[0][2], "2000");
    drop(foreign);
    assert!(pings(&lab.client, GATEWAY_INNER[0]));
}

/// A worker that holds on to its sockets keeps nobody from going back to their port.
#[test]
fn a_port_is_free_for_who_comes_back_to_it() {
    let test = "a_port_is_free_for_who_comes_back_to_it";
    if !cfg!(debug_assertions) {
        eprintln!("SKIPPED {test}: the daemon can be told to stall in debug builds only");
        return;
    }
    let Some(lab) = lab(test) else { return };
    let options = [UDP, &["--workers", "2"]].concat();
    let stall = [("TIDEGATE_TEST_STALL_WORKER", "1:0")];
    let gateway = Daemon::start_with(&lab.gateway, &lab.interface('g'), &options, &stall);
    // The worker has these sockets in hand for ever.
    let first = gateway.dump()[0][2].clone();
    for port in ["2000", &first, "2001", &first, "2000"] {
        gateway.set(&format!("listen-port {port}"));
        assert_eq!(gateway.dump()[0][2], port);
    }
    gateway.configure(&lab, GATEWAY_CONF);
    let _client = start(&lab, &lab.client, 'c', UDP, CLIENT_CONF);
    answers(&lab.client, GATEWAY_INNER[0]);
}

#[test]
fn a_host_without_ipv6_has_a_tunnel_by_ipv4() {
    let Some(lab) = lab("a_host_without_ipv6_has_a_tunnel_by_ipv4") else { return };
    for space in [&lab.gateway, &lab.client] {
        space.set_sysctl("net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        space.set_sysctl("net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    }
    let only_v4 = |conf: &str| {
        let without: Vec<_> = conf
            .lines()
            .map(|line| line.split(',').filter(|part| !part.contains("fd")).collect::<Vec<_>>())
            .map(|parts| parts.join(","))
            .collect();
        without.join("\n")
    };
    for options in [UDP, NATIVE] {
        let [gateway, client] =
            tunnel(&lab, options, &only_v4(GATEWAY_CONF), &only_v4(CLIENT_CONF));
        answers(&lab.gateway, CLIENT_INNER);
        // An endpoint that cannot be reached harms nobody.
        let peer = value(CLIENT_CONF, "PublicKey");
        client.set(&format!("peer {peer} endpoint [{GATEWAY_V6}]:{PORT}"));
        assert!(!pings(&lab.client, GATEWAY_INNER[0]));
        assert!(client.drops("socket_send") > 0, "{:?}", client.status().drops);
        client.set(&format!("peer {peer} endpoint {GATEWAY_V4}:{PORT}"));
        answers(&lab.client, GATEWAY_INNER[0]);
        gateway.set("listen-port 51999");
        gateway.set(&format!("listen-port {PORT}"));
        answers(&lab.gateway, CLIENT_INNER);
    }
}

/// What a receiver with buffers for one MTU, or an unchecked length, does not live through.
#[test]
fn garbage_of_every_length_harms_nothing() {
    const LONGEST: usize = 65_507;
    let Some(lab) = lab("garbage_of_every_length_harms_nothing") else { return };
    for options in [UDP, NATIVE] {
        let [gateway, _client] = tunnel(&lab, options, GATEWAY_CONF, CLIENT_CONF);
        let sender = inside(&lab.client, || UdpSocket::bind("0.0.0.0:0").unwrap());
        sender.connect((GATEWAY_V4, PORT.parse::<u16>().unwrap())).unwrap();
        let mut state = 0x9e37_79b9_u32;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        };
        let mut sent = 0;
        for len in (0..300).chain([1399, 1400, 1452, 1472, 1473, 9000, LONGEST - 1, LONGEST]) {
            for kind in [0, 1, 2, 3, 4, 5, random() as u8] {
                let mut datagram: Vec<u8> = (0..len).map(|_| random() as u8).collect();
                if let Some(head) = datagram.first_chunk_mut::<4>() {
                    *head = [kind, 0, 0, 0];
                }
                sent += u64::from(sender.send(&datagram).is_ok());
                // The receive buffer has room for all that comes between two looks at it.
                if sent % 64 == 0 {
                    thread::sleep(Duration::from_millis(2));
                }
            }
        }
        let counted = || -> u64 {
            let status = gateway.status();
            let by_steer = status
                .steer
                .iter()
                .filter(|(name, _)| !name.starts_with("passed_") && *name != "steered");
            status.drops.values().sum::<u64>() + by_steer.map(|(_, count)| count).sum::<u64>()
        };
        // Reassembly may have lost some of the longest.
        let all = lab::wait_for("drops", LIMIT, || Ok((counted() >= sent * 9 / 10).then_some(())));
        all.unwrap_or_else(|error| panic!("{error:#}: {} of {sent}", counted()));
        assert!(pings(&lab.client, GATEWAY_INNER[0]));
        assert!(gateway.endpoint().starts_with(&format!("{CLIENT_V4}:")));
    }
}

/// Netns.sh 6 and 8.
#[test]
fn prefixes_decide_who_may_send_and_the_mtu_how_much_is_padded() {
    let test = "prefixes_decide_who_may_send_and_the_mtu_how_much_is_padded";
    let Some(lab) = lab_with_iptables(test) else { return };
    let [gateway, client] = tunnel(&lab, UDP, GATEWAY_CONF, CLIENT_CONF);
    let peer = value(GATEWAY_CONF, "PublicKey");
    gateway.set(&format!("peer {peer} allowed-ips 10.9.0.0/24"));
    assert!(pings(&lab.client, GATEWAY_INNER[0]));
    let key = gateway.wg(&["genkey"]);
    let other = public_key(&lab.gateway, &lab, key.trim());
    gateway.set(&format!("peer {other} allowed-ips {CLIENT_INNER}/32"));
    let before = gateway.drops("source_not_allowed");
    assert!(!pings(&lab.client, GATEWAY_INNER[0]), "another owns this address");
    gateway.drops_soon("source_not_allowed", before);
    gateway.set(&format!("peer {other} remove"));
    assert!(pings(&lab.client, GATEWAY_INNER[0]));

    // 1,297 bytes would be 1,312 with their padding, and 1,372 outside.
    for daemon in [&gateway, &client] {
        daemon.link("mtu 1299");
        iptables(daemon.space, "-A INPUT -p udp -m length --length 1360:9000 -j DROP");
    }
    let full = || lab.client.ping(GATEWAY_INNER[0], 1, &["-s", "1269", "-W", "1"]);
    lab::wait_for("a full packet", LIMIT, || Ok((full()?.answered == 1).then_some(()))).unwrap();
}

/// Sets the MTU of the link under the tunnel.
fn set_outer_mtu(lab: &Lab, mtu: u32) {
    for space in [&lab.client, &lab.gateway] {
        space.ip(&format!("link set dev {OUTER} mtu {mtu}")).unwrap();
    }
}

/// 1,400 bytes less 60 that stand around a packet.
#[test]
fn who_sends_more_than_the_link_under_the_tunnel_carries_is_told_how_much_it_does() {
    let test = "who_sends_more_than_the_link_under_the_tunnel_carries_is_told_how_much_it_does";
    let Some(lab) = lab(test) else { return };
    set_outer_mtu(&lab, 1400);
    let [_gateway, client] = tunnel(&lab, UDP, GATEWAY_CONF, CLIENT_CONF);
    let largest = lab.client.ping(GATEWAY_INNER[0], 2, &["-s", "1392", "-M", "dont"]).unwrap();
    assert_eq!(largest.answered, 2, "it goes in a datagram that is fragmented");
    assert_eq!(client.drops("too_large"), 0);

    for (to, headers_len) in [(GATEWAY_INNER[0], 28), (GATEWAY_INNER[1], 48)] {
        let too_large = 1341 - headers_len;
        let line = format!("ping -n -c 1 -W 1 -M do -s {too_large} {to}");
        let told = || Ok(shell(&lab.client, &line).contains("1340").then_some(()));
        lab::wait_for("what gets through", LIMIT, told).unwrap();
        let route = lab.client.ip_json(&format!("route get {to}")).unwrap();
        assert_eq!(route[0]["metrics"][0]["mtu"], 1340, "{route}");
        let full = (1340 - headers_len).to_string();
        let full = lab.client.ping(to, 2, &["-s", &full, "-M", "do"]).unwrap();
        assert_eq!(full.answered, 2, "{to}");
    }
    assert!(client.drops("too_large") >= 2);

    set_outer_mtu(&lab, 1500);
    for (to, full) in [(GATEWAY_INNER[0], "1392"), (GATEWAY_INNER[1], "1372")] {
        let goes = || {
            // The kernel remembers what it was told for ten minutes.
            shell(&lab.client, "ip -4 route flush cache; ip -6 route flush cache");
            let ping = lab.client.ping(to, 1, &["-s", full, "-M", "do", "-W", "1"]);
            Ok(ping.is_ok_and(|ping| ping.answered == 1).then_some(()))
        };
        lab::wait_for("the wider link to be noticed", LIMIT, goes).unwrap();
    }
}

#[test]
fn connections_through_the_gateway_have_segments_that_the_link_under_the_tunnel_carries() {
    let test =
        "connections_through_the_gateway_have_segments_that_the_link_under_the_tunnel_carries";
    let Some(lab) = lab(test) else { return };
    set_outer_mtu(&lab, 1400);
    let [gateway, client] = tunnel(&lab, UDP, GATEWAY_CONF, CLIENT_CONF);
    let listener = inside(&lab.client, || TcpListener::bind("[::]:7000").unwrap());
    // 1,340 bytes less IP header, TCP header and timestamps.
    for (to, segment_len) in [(CLIENT_INNER, 1288), ("fd09::2", 1268)] {
        let connected = || {
            let near = inside(&lab.host, || TcpStream::connect((to, 7000)))?;
            let (far, _) = listener.accept()?;
            let lens = [&near, &far].map(|end| SockRef::from(end).tcp_mss().unwrap());
            Ok((lens == [segment_len; 2]).then_some([near, far]))
        };
        let [near, far] = lab::wait_for("segments that fit", LIMIT, connected).unwrap();
        for (from, to) in [(&near, &far), (&far, &near)] {
            let sent: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251) as u8).collect();
            let mut received = vec![0; sent.len()];
            to.set_read_timeout(Some(LIMIT)).unwrap();
            thread::scope(|scope| {
                let mut to = to;
                scope.spawn(|| (&*from).write_all(&sent).unwrap());
                to.read_exact(&mut received).unwrap();
            });
            assert!(received == sent);
        }
    }
    assert_eq!([&gateway, &client].map(|daemon| daemon.drops("too_large")), [0, 0]);
}

/// Netns.sh 10 and 14.
#[test]
fn a_tunnel_goes_through_a_tunnel() {
    let Some(lab) = lab("a_tunnel_goes_through_a_tunnel") else { return };
    let [_gateway, _client] = tunnel(&lab, NATIVE, GATEWAY_CONF, CLIENT_CONF);
    let within = |conf: &str| {
        conf.replace(", 192.168.20.0/24, fd20::/64", "")
            .replace("Endpoint = 198.51.100.1:51820", "Endpoint = 10.9.0.1:51999")
            .replace("51820", "51999")
            .replace("10.9.0.1/", "10.19.0.1/")
            .replace("10.9.0.2/", "10.19.0.2/")
            .replace("fd09::", "fd19::")
    };
    let inner_gateway = start(&lab, &lab.gateway, 'h', UDP, &within(GATEWAY_CONF));
    let inner_client = start(&lab, &lab.client, 'd', UDP, &within(CLIENT_CONF));
    inner_gateway.link("mtu 1340");
    inner_client.link("mtu 1340");
    answers(&lab.client, "10.19.0.1");
    answers(&lab.client, "fd19::1");
    let full = lab.client.ping("10.19.0.1", 3, &["-s", "1312", "-M", "do"]).unwrap();
    assert_eq!(full.answered, 3);
    // And through itself: no answer, no storm, and no harm.
    inner_client.set(&format!("peer {} endpoint 10.19.0.1:51999", value(CLIENT_CONF, "PublicKey")));
    assert!(!pings(&lab.client, "10.19.0.1"));
    assert!(inner_client.drops("routing_loop") > 0);
    inner_client.set(&format!("peer {} endpoint 10.9.0.1:51999", value(CLIENT_CONF, "PublicKey")));
    answers(&lab.client, "10.19.0.1");
}

/// Runs `body` in a namespace: what it opens stays there.
fn inside<T: Send>(space: &Space, body: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(Path::new("/run/netns").join(space.name())).unwrap();
    NetNs::from(OwnedFd::from(namespace)).run(body)
}
