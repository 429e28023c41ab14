//! Against the kernel, in a network namespace that lives as long as the test's thread.

use std::{process::Command, time::Duration};

use super::*;
use crate::{require_root, sys::netns};

/// Runs `test` on a runtime of its own in a network namespace of its own.
fn in_new_netns<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    netns::in_new_netns(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.unwrap().block_on(test());
    });
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

#[test]
fn a_link_gets_mtu_addresses_and_routes_and_goes() {
    require_root!();
    in_new_netns(|| async {
        ip("link add dev link0 type veth peer name link1");
        let host = Host::new().unwrap();
        let index = host.link_index("link0").await.unwrap();

        host.set_mtu(index, 1412).await.unwrap();
        host.add_address(index, net("10.9.0.1/24")).await.unwrap();
        host.add_address(index, net("fd09::1/64")).await.unwrap();
        host.set_up(index).await.unwrap();
        let again = host.add_address(index, net("10.9.0.1/24")).await.unwrap_err();
        assert!(matches!(again, HostError::Exists { .. }), "{again:?}");
        assert_eq!(again.to_string(), "adding address 10.9.0.1/24: it exists already");

        let link = host.link("link0").await.unwrap().unwrap();
        assert_eq!((link.index, link.name.as_str(), link.mtu), (index, "link0", 1412));
        let addresses = host.addresses().await.unwrap();
        for wanted in ["10.9.0.1/24", "fd09::1/64"] {
            assert!(addresses.contains(&HostAddress { link_index: index, net: net(wanted) }));
        }
        assert!(!ip("-4 address show dev link0").contains("brd 10.9.0.255"));

        let present = host.routes(index).await.unwrap();
        assert!(present.contains(&net("10.9.0.0/24")), "{present:?}");
        assert!(present.contains(&net("fd09::/64")), "{present:?}");
        let allowed = ["10.9.0.2/32", "192.168.7.0/24", "fd09::2/128", "fd07::/48"].map(net);
        for route in missing_routes(allowed, present) {
            host.add_route(index, route, MAIN_TABLE).await.unwrap();
        }
        assert!(ip("-4 route show dev link0").contains("192.168.7.0/24 scope link"));
        assert!(ip("-6 route show dev link0").contains("fd07::/48"));
        assert!(!ip("-4 route show dev link0").contains("10.9.0.2"));
        let again = host.add_route(index, net("192.168.7.0/24"), MAIN_TABLE).await.unwrap_err();
        assert!(matches!(again, HostError::Exists { .. }), "{again:?}");

        host.delete_link(index).await.unwrap();
        assert_eq!(host.link("link0").await.unwrap(), None);
        let missing = host.link_index("link0").await.unwrap_err();
        assert_eq!(
            missing.to_string(),
            "there is no network interface link0; `ip link` lists them"
        );
    });
}

#[test]
fn the_way_to_an_endpoint_has_an_mtu() {
    require_root!();
    in_new_netns(|| async {
        ip("link add dev link0 mtu 1492 type veth peer name link1");
        ip("link set dev link1 up");
        ip("link set dev link0 up");
        ip("address add 10.0.0.1/24 dev link0");
        ip("-6 address add fd00::1/64 dev link0 nodad");
        ip("route add 10.7.0.0/16 via 10.0.0.2 mtu 1300");
        let host = Host::new().unwrap();
        let mtu = async |ip: &str| host.path_mtu(ip.parse().unwrap()).await.unwrap();
        assert_eq!(mtu("10.0.0.9").await, Some(1492));
        assert_eq!(mtu("fd00::9").await, Some(1492));
        assert_eq!(mtu("10.7.1.1").await, Some(1300));
        assert_eq!(mtu("192.0.2.1").await, None);
        assert_eq!(mtu("2001:db8::1").await, None);
        assert_eq!(host.default_route_mtu().await.unwrap(), None);
        ip("route add default via 10.0.0.2");
        assert_eq!(host.default_route_mtu().await.unwrap(), Some(1492));
        assert_eq!(mtu("192.0.2.1").await, Some(1492));
    });
}

#[test]
fn the_watch_tells_what_is_and_what_changes() {
    require_root!();
    in_new_netns(|| async {
        ip("link add dev link0 type veth peer name link1");
        ip("address add 10.0.0.1/24 dev link0");
        let mut watch = AddressWatch::new(Host::new().unwrap()).unwrap();
        // The loopback's addresses are told as well, in any order.
        let mut wait_for = async |wanted: AddressChange| {
            let found = async { while watch.next().await.unwrap() != wanted {} };
            let found = tokio::time::timeout(Duration::from_secs(10), found).await;
            found.unwrap_or_else(|_| panic!("{wanted:?} is told in time"));
        };
        let first: IpAddr = "10.0.0.1".parse().unwrap();
        let second: IpAddr = "10.0.0.2".parse().unwrap();
        wait_for(AddressChange::Added(first)).await;
        ip("address add 10.0.0.2/24 dev link0");
        wait_for(AddressChange::Added(second)).await;
        ip("address del 10.0.0.2/24 dev link0");
        wait_for(AddressChange::Removed(second)).await;
        ip("link del dev link0");
        wait_for(AddressChange::Removed(first)).await;
    });
}

#[test]
fn a_link_is_told_as_it_is_and_every_time_that_it_goes_down() {
    require_root!();
    in_new_netns(|| async {
        ip("link add dev link0 mtu 1400 type veth peer name link1");
        let host = Host::new().unwrap();
        let index = host.link_index("link0").await.unwrap();
        let mut watch = LinkWatch::new(host, index).unwrap();
        let mut next = async || {
            let next = tokio::time::timeout(Duration::from_secs(10), watch.next()).await;
            next.expect("a change is told in time").unwrap()
        };
        assert_eq!(next().await, LinkChange::Is { mtu: 1400, is_up: false });
        ip("link set link0 up");
        assert_eq!(next().await, LinkChange::Is { mtu: 1400, is_up: true });
        // All of it before anyone looks.
        ip("link set link0 down");
        ip("link set link0 up");
        assert_eq!(next().await, LinkChange::Is { mtu: 1400, is_up: false });
        assert_eq!(next().await, LinkChange::Is { mtu: 1400, is_up: true });
        ip("link set link0 mtu 1300");
        assert_eq!(next().await, LinkChange::Is { mtu: 1300, is_up: true });
        ip("link del dev link1");
        while next().await != LinkChange::Gone {}
    });
}

#[test]
fn the_link_towards_a_host_follows_routes_sources_and_marks() {
    require_root!();
    in_new_netns(|| async {
        for (link, address) in [("a", "10.0.0.1/24"), ("b", "10.0.1.1/24")] {
            ip(&format!("link add dev {link}0 type veth peer name {link}1"));
            ip(&format!("link set {link}1 up"));
            ip(&format!("link set {link}0 up"));
            ip(&format!("address add {address} dev {link}0"));
        }
        let host = Host::new().unwrap();
        let (a, b) = (host.link_index("a0").await.unwrap(), host.link_index("b0").await.unwrap());
        let [there, ours, foreign] =
            ["10.0.0.2", "10.0.0.1", "10.9.9.9"].map(|ip| ip.parse().unwrap());
        let towards = async |source, mark| {
            let towards = Towards { remote: there, source: Some(source), link: 0, ports: None };
            host.way_towards(&towards, mark, false).await.unwrap().map(|way| way.link)
        };
        assert_eq!(towards(ours, 0).await, Some(a));
        assert_eq!(towards(foreign, 0).await, None, "no address of this host");
        let mut watch = RouteWatch::new().unwrap();
        ip("rule add fwmark 7 table 7");
        ip("route add 10.0.0.0/24 dev b0 table 7");
        tokio::time::timeout(Duration::from_secs(10), watch.next()).await.unwrap().unwrap();
        assert_eq!((towards(ours, 0).await, towards(ours, 7).await), (Some(a), Some(b)));
        ip("route add 10.0.0.2/32 dev b0");
        assert_eq!(towards(ours, 0).await, Some(b));
    });
}

#[test]
fn the_mtu_of_a_way_is_what_somebody_has_set_and_never_what_a_message_said() {
    require_root!();
    in_new_netns(|| async {
        ip("link add dev link0 mtu 1400 type veth peer name link1");
        ip("link set lo up");
        ip("link set link1 up");
        ip("link set link0 up");
        ip("address add 10.0.0.1/24 dev link0");
        ip("-6 address add fd00::1/64 dev link0 nodad");
        ip("route add 10.7.0.0/16 via 10.0.0.2 mtu 1300");
        ip("route add 10.8.0.0/16 via 10.0.0.2 mtu lock 1290");
        ip("-6 route add fd07::/16 via fd00::2 mtu 1310");
        let host = Host::new().unwrap();
        let link = host.link_index("link0").await.unwrap();
        let way = async |remote: &str| {
            let towards =
                Towards { remote: remote.parse().unwrap(), source: None, link: 0, ports: None };
            host.way_towards(&towards, 0, false).await.unwrap()
        };
        for (remote, mtu) in [
            ("10.0.0.9", None),
            ("fd00::9", None),
            ("10.7.0.1", Some(1300)),
            ("10.8.0.1", Some(1290)),
            ("fd07::1", Some(1310)),
        ] {
            assert_eq!(way(remote).await, Some(Way { link, mtu, next_hop: None }), "{remote}");
        }
        assert_eq!(way("192.0.2.1").await, None);
        // Of one link, an address may be on several.
        let towards =
            Towards { remote: "fe80::1".parse().unwrap(), source: None, link, ports: None };
        assert_eq!(
            host.way_towards(&towards, 0, false).await.unwrap(),
            Some(Way { link, mtu: None, next_hop: None })
        );

        // A router, which is the test, says that the way behind it is narrower; the kernel believes it,
        // for a socket that asked for such messages.
        let socket = std::net::UdpSocket::bind("10.0.0.1:0").unwrap();
        learn_mtu(&socket, "10.7.0.1:9".parse().unwrap(), 1000);
        assert_eq!(host.path_mtu("10.7.0.1".parse().unwrap()).await.unwrap(), Some(1000));
        assert_eq!(way("10.7.0.1").await, Some(Way { link, mtu: Some(1300), next_hop: None }));
        learn_mtu(&socket, "10.0.0.9:9".parse().unwrap(), 1000);
        assert_eq!(host.path_mtu("10.0.0.9".parse().unwrap()).await.unwrap(), Some(1000));
        assert_eq!(way("10.0.0.9").await, Some(Way { link, mtu: None, next_hop: None }));
    });
}

#[test]
fn a_next_hop_is_told_where_there_is_one_and_no_more_to_it() {
    require_root!();
    in_new_netns(|| async {
        for (link, address) in [("a", "10.0.0.1/24"), ("b", "10.0.1.1/24")] {
            ip(&format!("link add dev {link}0 type veth peer name {link}1"));
            ip(&format!("link set {link}1 up"));
            ip(&format!("link set {link}0 up"));
            ip(&format!("address add {address} dev {link}0"));
        }
        ip("address add 10.0.0.7/24 dev a0");
        ip("-6 address add fd00::1/64 dev a0 nodad");
        ip("route add 10.1.0.0/16 via 10.0.0.254 hoplimit 9");
        ip("route add 10.2.0.0/16 nexthop via 10.0.0.254 nexthop via 10.0.1.254");
        ip("nexthop add id 3 via 10.0.0.254 dev a0");
        ip("route add 10.3.0.0/16 nhid 3");
        ip("route add blackhole 10.4.0.0/16");
        ip("-6 route add fd01::/16 via fe80::9 dev a0");
        ip("-6 route add fd02::/16 nexthop via fd00::8 nexthop via fd00::9");
        let host = Host::new().unwrap();
        let a = host.link_index("a0").await.unwrap();
        let mac = host.link_by_index(a).await.unwrap().unwrap().ethernet;
        assert!(ip("link show a0").contains("link/ether") && mac.is_some());
        let hop = async |remote: &str, source: Option<&str>| {
            let source = source.map(|ip| ip.parse().unwrap());
            let (remote, ports) = (remote.parse().unwrap(), Some((51820, 7)));
            let towards = Towards { remote, source, link: 0, ports };
            let way = host.way_towards(&towards, 0, true).await.unwrap();
            let hop = way.and_then(|way| way.next_hop)?;
            Some((hop.neighbour.to_string(), hop.source.to_string(), hop.hop_limit))
        };
        let told = |neighbour: &str, source: &str, limit| {
            Some((neighbour.to_owned(), source.to_owned(), limit))
        };
        assert_eq!(hop("10.0.0.2", None).await, told("10.0.0.2", "10.0.0.1", 64));
        assert_eq!(hop("10.0.0.2", Some("10.0.0.7")).await, told("10.0.0.2", "10.0.0.7", 64));
        assert_eq!(hop("10.1.0.1", None).await, told("10.0.0.254", "10.0.0.1", 9));
        // As long as the link is not ready, nothing may leave from its addresses.
        for _ in 0..500 {
            if hop("fd00::2", None).await.is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(hop("fd00::2", None).await, told("fd00::2", "fd00::1", 64));
        assert_eq!(hop("fd00::2", Some("fd00::1")).await, told("fd00::2", "fd00::1", 64));
        assert_eq!(hop("fd01::2", None).await, told("fe80::9", "fd00::1", 64));
        for doubtful in ["10.2.0.1", "10.3.0.1", "10.4.0.1", "10.0.0.1", "10.0.0.255", "fd02::1"] {
            assert_eq!(hop(doubtful, None).await, None, "{doubtful}");
        }
        ip("rule add ipproto udp dport 7 table 7");
        ip("route add default via 10.0.0.253 table 7");
        assert_eq!(hop("10.0.0.2", None).await, told("10.0.0.253", "10.0.0.1", 64));
    });
}

#[test]
fn neighbours_are_told_and_found_out_about() {
    require_root!();
    in_new_netns(|| async {
        ip("link add dev link0 type veth peer name link1");
        ip("link set link1 up");
        ip("link set link0 up");
        ip("address add 10.0.0.1/24 dev link0");
        let set = |what: &str| ip(&format!("neigh {what} dev link0"));
        set("add 10.0.0.2 lladdr 02:00:00:00:00:02 nud stale");
        set("add 10.0.0.3 lladdr 02:00:00:00:00:03 nud failed");
        let host = Host::new().unwrap();
        let link = host.link_index("link0").await.unwrap();
        let [second, third]: [IpAddr; 2] = ["10.0.0.2", "10.0.0.3"].map(|ip| ip.parse().unwrap());
        let mut watch = NeighbourWatch::new(host.clone()).unwrap();
        let mut known = std::collections::HashMap::new();
        let mut until = async |of: IpAddr, wanted: Option<u8>| {
            let found = async {
                while known.get(&(link, of)).copied().flatten() != wanted {
                    let changes = watch.next().await.unwrap();
                    known.extend(
                        changes.into_iter().map(|(of, now)| (of, now.map(|now| now.mac[5]))),
                    );
                }
            };
            tokio::time::timeout(Duration::from_secs(10), found).await.expect("a change");
        };
        until(second, Some(2)).await;
        until(third, None).await;
        assert!(ip("neigh show 10.0.0.2").contains("STALE"));
        host.use_neighbour(link, second).await.unwrap();
        let state = ip("neigh show 10.0.0.2");
        assert!(state.contains("DELAY") || state.contains("PROBE"), "{state}");
        host.use_neighbour(link, "10.0.0.99".parse().unwrap()).await.unwrap();
        assert_eq!(ip("neigh show 10.0.0.99"), "", "none is made");
        set("replace 10.0.0.3 lladdr 02:00:00:00:00:04 nud reachable");
        until(third, Some(4)).await;
        set("replace 10.0.0.3 lladdr 02:00:00:00:00:05 nud permanent");
        until(third, Some(5)).await;
        set("del 10.0.0.3");
        until(third, None).await;
        // Nobody answers.
        until(second, None).await;
    });
}

/// Has the kernel believe that only packets of `mtu` bytes get through to `remote`.
fn learn_mtu(socket: &std::net::UdpSocket, remote: std::net::SocketAddrV4, mtu: u16) {
    use wg_common::headers::Checksum;
    let ours = socket.local_addr().unwrap();
    let std::net::SocketAddr::V4(ours) = ours else { unreachable!("it is bound to IPv4") };
    // The packet that is said to be too big, as far as it is quoted.
    let mut quote = vec![0x45, 0, 5, 0, 0, 0, 0x40, 0, 64, 17, 0, 0];
    quote.extend(ours.ip().octets());
    quote.extend(remote.ip().octets());
    quote.extend(ours.port().to_be_bytes());
    quote.extend(remote.port().to_be_bytes());
    quote.extend([4, 236, 0, 0]);
    let mut message = vec![3, 4, 0, 0, 0, 0];
    message.extend(mtu.to_be_bytes());
    message.extend(quote);
    let sum = Checksum::default().bytes(&message).finish();
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    // To this host itself, as it would come from a router.
    let raw = socket2::Socket::new(
        socket2::Domain::IPV4,
        socket2::Type::RAW,
        Some(socket2::Protocol::ICMPV4),
    )
    .unwrap();
    let to: std::net::SocketAddr = (*ours.ip(), 0).into();
    raw.send_to(&message, &to.into()).unwrap();
}

#[test]
fn rules_and_routes_of_tables_come_and_go() {
    require_root!();
    in_new_netns(|| async {
        ip("link add dev link0 type veth peer name link1");
        ip("link set link0 up");
        let host = Host::new().unwrap();
        let index = host.link_index("link0").await.unwrap();
        let before = [ip("-4 rule show"), ip("-6 rule show")];
        assert!(!host.has_routes(51820).await.unwrap());
        let mut added = Vec::new();
        for (family, default) in [(Family::V4, "0.0.0.0/0"), (Family::V6, "::/0")] {
            host.add_route(index, net(default), 51820).await.unwrap();
            let of = |priority, table| Rule {
                family,
                priority,
                table,
                unless_marked: None,
                suppress_prefix_len: None,
            };
            let priority = host.next_rule_priority(family).await.unwrap();
            let rule = Rule { unless_marked: Some(51820), ..of(priority, 51820) };
            host.add_rule(rule).await.unwrap();
            let again = host.add_rule(rule).await.unwrap_err();
            assert!(matches!(again, HostError::Exists { .. }), "{again:?}");
            let priority = host.next_rule_priority(family).await.unwrap();
            let main = Rule { suppress_prefix_len: Some(0), ..of(priority, MAIN_TABLE) };
            host.add_rule(main).await.unwrap();
            added.extend([rule, main]);
        }
        let by_us = [ip("-d -4 rule show"), ip("-d -6 rule show")];
        assert!(host.has_routes(51820).await.unwrap());
        // A rule that differs in its mark only is not ours.
        let other = Rule { unless_marked: Some(51821), ..added[0] };
        host.delete_rule(other).await.unwrap();
        assert_eq!(ip("-d -4 rule show"), by_us[0]);
        for _ in 0..2 {
            for &rule in &added {
                host.delete_rule(rule).await.unwrap();
            }
            for default in ["0.0.0.0/0", "::/0"] {
                host.delete_route(index, net(default), 51820).await.unwrap();
            }
        }
        assert_eq!([ip("-4 rule show"), ip("-6 rule show")], before);
        assert!(!host.has_routes(51820).await.unwrap());

        for family in ["-4", "-6"] {
            ip(&format!("{family} rule add not fwmark 51820 table 51820"));
            ip(&format!("{family} rule add table main suppress_prefixlength 0"));
        }
        assert_eq!([ip("-d -4 rule show"), ip("-d -6 rule show")], by_us, "as `ip` adds them");
        host.add_address(index, net("10.9.0.1/24")).await.unwrap();
        host.delete_address(index, net("10.9.0.1/24")).await.unwrap();
        host.delete_address(index, net("10.9.0.1/24")).await.unwrap();
        assert!(!ip("address show").contains("10.9.0.1"));
    });
}
