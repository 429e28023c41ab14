//! Forwarded ports, several external addresses, lines that change under traffic, and links that take less than is sent.
//! The hosts are drawn in `nat_site`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod nat_site;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use nat_site::{
    GATEWAY, HOST, LAYOUT, LIMIT, MASQUERADE, accept, blob, echo_between, echo_by_tcp,
    echo_tcp_between, inside, ip, is_answered, second_peer, seen_as, shorten_fragments, skips,
    tunnel, udp,
};
use xtask::lab::{Site, Space};

const MASQUERADE_V6: &str = "#! Nat = masquerade out=lan from=fd09::/64 bypass-firewall";

#[test]
fn ports_are_forwarded_from_outside_and_from_inside() {
    if skips("ports_are_forwarded_from_outside_and_from_inside", &["ping"]) {
        return;
    }
    let site = Site::new(&LAYOUT).unwrap();
    let forwards = "#! Forward = tcp lan:8443 -> 10.9.0.2:443 bypass-firewall\n\
                    #! Forward = udp lan:5353 -> 10.9.0.2:53 bypass-firewall\n\
                    #! Forward = tcp lan:8443 -> [fd09::2]:443 bypass-firewall\n\
                    #! Forward = udp lan:5353 -> [fd09::2]:53 bypass-firewall\n\
                    #! Forward = tcp lan:9443 -> 10.9.0.3:443 bypass-firewall\n\
                    #! Forward = udp lan:9053 -> 10.9.0.3:53 bypass-firewall\n\
                    #! Forward = udp lan:9053 -> [fd09::3]:53 bypass-firewall";
    let [gateway, client] =
        tunnel(&site, &format!("{MASQUERADE}\n{MASQUERADE_V6}\n{forwards}"), &[]);
    let second = second_peer(&site);
    shorten_fragments(&site);
    for tunnel in [&client, &second] {
        assert!(tunnel.space.ping("10.9.0.1", 3, &[]).unwrap().answered > 0, "the handshake");
    }
    let sent = blob(1 << 20);
    let at = |text: &str, port: u16| SocketAddr::new(ip(text), port);

    // From outside: its source stays as it is.
    for (external, inner, outside) in
        [(GATEWAY, "10.9.0.2", HOST), ("fd20::1", "fd09::2", "fd20::2")]
    {
        let host = site.space("host");
        let (received, seen) =
            echo_tcp_between(host, at(external, 8443), (client.space, at(inner, 443)), &sent);
        assert!(received == sent, "all bytes come back as they were");
        assert_eq!(seen, ip(outside));
        let (asker, answerer) =
            (udp(&site, "host", at(outside, 0)), udp(&site, "client", at(inner, 53)));
        for len in [10, 4000] {
            let seen = echo_between(&asker, at(external, 5353), &answerer, &sent[..len]);
            assert_eq!(seen, asker.local_addr().ok(), "{len} bytes: {}", gateway.nat());
        }
    }
    // Nobody forwards these.
    let stranger = udp(&site, "host", at(HOST, 0));
    stranger.connect(at(GATEWAY, 8443)).unwrap();
    stranger.send(b"by UDP").unwrap();
    assert!(stranger.recv(&mut [0; 64]).is_err());

    // From one peer to the other, by the outer address, and with it in the answer.
    let (received, seen) = echo_tcp_between(
        client.space,
        at(GATEWAY, 9443),
        (second.space, at("10.9.0.3", 443)),
        &sent,
    );
    assert!(received == sent, "all bytes come back as they were");
    assert_eq!(seen, ip("10.9.0.2"));
    for (external, from, to) in
        [(GATEWAY, "10.9.0.2", "10.9.0.3"), ("fd20::1", "fd09::2", "fd09::3")]
    {
        let (asker, answerer) =
            (udp(&site, "client", at(from, 0)), udp(&site, "router", at(to, 53)));
        let seen = echo_between(&asker, at(external, 9053), &answerer, b"hello");
        assert_eq!(seen, asker.local_addr().ok(), "{}", gateway.nat());
    }

    // The line is gone: so is what began by it.
    let (asker, answerer) =
        (udp(&site, "host", at(HOST, 0)), udp(&site, "client", at("10.9.0.2", 53)));
    assert!(echo_between(&asker, at(GATEWAY, 5353), &answerer, b"hello").is_some());
    gateway.reload(&format!("{MASQUERADE}\n{MASQUERADE_V6}"));
    assert_eq!(echo_between(&asker, at(GATEWAY, 5353), &answerer, b"hello"), None);
    assert!(is_answered(&site));
}

#[test]
fn each_inner_address_has_one_of_several_outer_ones() {
    if skips("each_inner_address_has_one_of_several_outer_ones", &["ping"]) {
        return;
    }
    const ASKERS: u8 = 16;
    let outer = ["192.168.77.11", "192.168.77.12"];
    let site = Site::new(&LAYOUT).unwrap();
    for address in outer {
        site.space("gateway").ip(&format!("addr add {address}/24 dev lan")).unwrap();
    }
    let lines = format!("#! Nat = snat out=lan to={} bypass-firewall", outer.join(","));
    let [gateway, client] = tunnel(&site, &lines, &[]);
    assert!(is_answered(&site), "{}", gateway.nat());
    let host = udp(&site, "host", (HOST, 0));
    let to = host.local_addr().unwrap();
    let mut seen: BTreeMap<u8, BTreeSet<IpAddr>> = BTreeMap::new();
    for number in 1..=ASKERS {
        client.space.ip(&format!("addr add 10.9.1.{number}/32 dev {}", client.interface)).unwrap();
    }
    for _ in 0..3 {
        for number in 1..=ASKERS {
            let asker = udp(&site, "client", (format!("10.9.1.{number}"), 0));
            let found = echo_between(&asker, to, &host, b"hello");
            seen.entry(number).or_default().insert(found.unwrap().ip());
        }
    }
    assert!(seen.values().all(|found| found.len() == 1), "each keeps its own: {seen:?}");
    let all: BTreeSet<IpAddr> = seen.into_values().flatten().collect();
    assert_eq!(all, BTreeSet::from(outer.map(ip)), "both are in use, and no other");
    let sent = blob(1 << 20);
    let (received, from) = echo_by_tcp(&site, "host", ip(HOST), &sent);
    assert!(received == sent && all.contains(&from));

    // Only one of them is left.
    gateway.reload(&format!("#! Nat = snat out=lan to={} bypass-firewall", outer[1]));
    for number in 1..=ASKERS {
        let asker = udp(&site, "client", (format!("10.9.1.{number}"), 0));
        let found = echo_between(&asker, to, &host, b"hello");
        assert_eq!(found.map(|found| found.ip()), Some(ip(outer[1])));
    }
}

/// Sends the same bytes again and again until told to end; says how many.
fn pour(stream: &mut TcpStream, bytes: &[u8], is_over: &AtomicBool) -> usize {
    let mut len = 0;
    while !is_over.load(Ordering::Relaxed) {
        stream.write_all(bytes).unwrap();
        len += bytes.len();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    len
}

/// Takes what [`pour`] sends, and holds it against that; says how many bytes there were.
fn take(stream: &mut TcpStream, bytes: &[u8]) -> usize {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let (mut len, mut buffer) = (0, vec![0; 1 << 16]);
    loop {
        let count = stream.read(&mut buffer).unwrap();
        if count == 0 {
            return len;
        }
        for byte in &buffer[..count] {
            assert_eq!(*byte, bytes[len % bytes.len()], "byte {len}");
            len += 1;
        }
    }
}

#[test]
fn connections_go_on_while_other_lines_change() {
    if skips("connections_go_on_while_other_lines_change", &["ping"]) {
        return;
    }
    let site = Site::new(&LAYOUT).unwrap();
    let [gateway, _client] = tunnel(&site, MASQUERADE, &[]);
    assert!(is_answered(&site), "{}", gateway.nat());
    let bytes = blob((1 << 18) + 13);
    let connect = || {
        let listener = inside(site.space("host"), || TcpListener::bind((HOST, 0)).unwrap());
        let to = listener.local_addr().unwrap();
        let near = inside(site.space("client"), || TcpStream::connect_timeout(&to, LIMIT).unwrap());
        near.set_write_timeout(Some(LIMIT)).unwrap();
        let far = accept(&listener).0;
        far.set_write_timeout(Some(LIMIT)).unwrap();
        (near, far)
    };
    let ((mut near, mut far), (mut other_near, mut other_far)) = (connect(), connect());
    let is_over = AtomicBool::new(false);
    let (up, down) = std::thread::scope(|scope| {
        let (bytes, is_over) = (&bytes[..], &is_over);
        let up = scope.spawn(move || pour(&mut near, bytes, is_over));
        let taken = scope.spawn(move || take(&mut far, bytes));
        let down = scope.spawn(move || pour(&mut other_far, bytes, is_over));
        let other_taken = scope.spawn(move || take(&mut other_near, bytes));
        let mut outcomes = Vec::new();
        for lines in [
            "#! Forward = tcp lan:8443 -> 10.9.0.2:443 bypass-firewall",
            "#! Allow = 10.9.0.0/24 -> 192.168.77.0/24\n#! Allow = 10.9.0.0/24 -> 10.9.0.0/24",
            "#! Allow = 10.9.0.0/24 -> 192.168.77.2/32 tcp",
            "#! Nat = masquerade out=lan from=fd09::/64 bypass-firewall",
            "",
            "#! Forward = udp lan:53 -> 10.9.0.2:53 bypass-firewall\n#! Allow = 0.0.0.0/0 -> 0.0.0.0/0",
        ] {
            std::thread::sleep(Duration::from_millis(200));
            outcomes.push(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                gateway.reload(&format!("{MASQUERADE}\n{lines}"))
            })));
        }
        std::thread::sleep(Duration::from_millis(200));
        is_over.store(true, Ordering::Relaxed);
        outcomes.into_iter().for_each(|outcome| drop(outcome.unwrap()));
        let sums = |poured: std::thread::ScopedJoinHandle<'_, usize>,
                    taken: std::thread::ScopedJoinHandle<'_, usize>| {
            (poured.join().unwrap(), taken.join().unwrap())
        };
        (sums(up, taken), sums(down, other_taken))
    });
    assert_eq!(up.0, up.1, "all that was sent came");
    assert_eq!(down.0, down.1, "all that was sent came");
    assert!(up.0 > 1 << 20 && down.0 > 1 << 20, "they went on: {up:?} {down:?}");
    // What no line allows any more ends.
    let (mut near, mut far) = connect();
    near.write_all(b"before").unwrap();
    far.read_exact(&mut [0; 6]).unwrap();
    gateway.reload(&format!("{MASQUERADE}\n#! Allow = 10.9.0.0/24 -> 192.168.77.0/24 udp"));
    near.write_all(b"after").unwrap();
    far.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    assert!(far.read(&mut [0; 6]).is_err(), "{}", gateway.nat());
}

/// Counts what comes to a host by its LAN from the tunnel's own addresses: nothing is to.
struct Untranslated<'a>(&'a Space);

impl<'a> Untranslated<'a> {
    fn begin(space: &'a Space) -> Self {
        for (program, from) in [("iptables", "10.9.0.0/16"), ("ip6tables", "fd09::/64")] {
            space.run(program, &["-t", "raw", "-A", "PREROUTING", "-s", from]).unwrap();
        }
        Self(space)
    }

    fn count(&self) -> u64 {
        let count = |program| {
            let text = self.0.run(program, &["-t", "raw", "-nvxL", "PREROUTING"]).unwrap();
            let rule = text.lines().nth(2).unwrap();
            rule.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        };
        count("iptables") + count("ip6tables")
    }
}

#[test]
fn what_a_link_does_not_take_is_never_sent_untranslated() {
    if skips("what_a_link_does_not_take_is_never_sent_untranslated", &["iptables", "ip6tables"]) {
        return;
    }
    let site = Site::new(&LAYOUT).unwrap();
    let space = site.space("gateway");
    let [gateway, client] = tunnel(&site, &format!("{MASQUERADE}\n{MASQUERADE_V6}"), &[]);
    assert!(is_answered(&site), "{}", gateway.nat());
    let untranslated = ["host", "router"].map(|role| Untranslated::begin(site.space(role)));
    let sent = blob(1 << 20);
    let (far_v4, far_v6) = ("192.168.88.2", "fd88::2");

    // The gateway itself learns that the way to `far` is narrow.
    for (role, nic) in [("router", "far"), ("far", "eth0")] {
        site.space(role).ip(&format!("link set {nic} mtu 1300")).unwrap();
    }
    for far in [far_v4, far_v6] {
        let _ = space.ping(far, 2, &["-M", "do", "-s", "1380"]).unwrap();
        let route = format!("{:?}", space.ip_json(&format!("route get {far}")).unwrap());
        assert!(route.contains("1300"), "it has learnt it: {route}");
    }
    let is_too_long = |to: &str| {
        // Until it is told, by whomever.
        let ended = Instant::now() + LIMIT;
        loop {
            let output = client
                .space
                .command("ping")
                .args(["-n", "-c", "1", "-W", "1", "-M", "do", "-s", "1340", to])
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            if text.contains("mtu = 1300")
                || text.contains("mtu=1300")
                || text.contains("mtu: 1300")
            {
                break;
            }
            assert!(Instant::now() < ended, "{to}: {text} {}", gateway.nat());
        }
    };
    for far in [far_v4, far_v6] {
        is_too_long(far);
        let (received, _) = echo_by_tcp(&site, "far", ip(far), &sent);
        assert!(received == sent, "{far}: all bytes come back as they were");
    }

    // The gateway's own link is narrow.
    for (role, nic) in [("gateway", "lan"), ("host", "eth0")] {
        site.space(role).ip(&format!("link set {nic} mtu 1300")).unwrap();
    }
    client.space.ip("route flush cache").unwrap();
    client.space.ip("-6 route flush cache").unwrap();
    for host in [HOST, "fd20::2"] {
        is_too_long(host);
        let (received, _) = echo_by_tcp(&site, "host", ip(host), &sent);
        assert!(received == sent, "{host}: all bytes come back as they were");
    }
    assert_eq!(seen_as(&site), Some(ip(GATEWAY)));
    // In fragments, each of which fits, and one that does not.
    let host = udp(&site, "host", (HOST, 0));
    let asker = udp(&site, "client", ("10.9.0.2", 0));
    let _ = echo_between(&asker, host.local_addr().unwrap(), &host, &sent[..4000]);
    for untranslated in &untranslated {
        assert_eq!(untranslated.count(), 0, "{}", gateway.nat());
    }
}
