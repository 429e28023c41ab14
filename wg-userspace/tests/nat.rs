//! A gateway that translates by `#! Nat`, with the whole daemon and no rule of netfilter. The hosts are drawn in `nat_site`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod nat_site;

use std::{
    collections::HashSet,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use nat_site::{
    HOST, LAYOUT, LIMIT, MASQUERADE, accept, blob, echo_by_tcp, inside, ip, is_answered, seen_as,
    skips, tunnel,
};
use xtask::lab::Site;

/// So few ports that they are soon used up.
const FEW_PORTS: &[(&str, &str)] = &[("TIDEGATE_TEST_NAT_PORTS", "256")];

#[test]
fn a_gateway_translates_and_follows_addresses_and_its_file() {
    if skips("a_gateway_translates_and_follows_addresses_and_its_file", &["ping"]) {
        return;
    }
    let site = Site::new(&LAYOUT).unwrap();
    let [gateway, _client] = tunnel(&site, MASQUERADE, FEW_PORTS);
    assert!(is_answered(&site), "{}", gateway.nat());
    assert_eq!(seen_as(&site), Some(ip("192.168.77.1")));
    let sent = blob(8 << 20);
    let (received, from) = echo_by_tcp(&site, "host", ip(HOST), &sent);
    assert_eq!(from, ip("192.168.77.1"));
    assert!(received == sent, "all bytes come back as they were");

    let shown = gateway.nat();
    assert!(shown["flow_count"].as_u64().unwrap() >= 3, "{shown}");
    assert_eq!(shown["externals"][0]["address"], "192.168.77.1", "{shown}");
    assert_eq!(shown["talkers"][0]["inner"], "10.9.0.2", "{shown}");
    assert!(shown["talkers"][0]["bytes_out"].as_u64().unwrap() > 8 << 20, "{shown}");
    assert!(shown["events"]["translated_out"].as_u64().unwrap() > 0, "{shown}");

    // Another address: new flows have it at once, or nearly.
    let space = site.space("gateway");
    space.ip("addr del 192.168.77.1/24 dev lan").unwrap();
    space.ip("addr add 192.168.77.9/24 dev lan").unwrap();
    let ended = Instant::now() + LIMIT;
    while seen_as(&site) != Some(ip("192.168.77.9")) {
        assert!(Instant::now() < ended, "{}", gateway.nat());
    }
    // None: nothing passes untranslated.
    space.ip("addr del 192.168.77.9/24 dev lan").unwrap();
    space.ip("route add 192.168.77.0/24 dev lan").unwrap();
    let ended = Instant::now() + LIMIT;
    while gateway.nat()["drops"]["no_external"].is_null() {
        assert_eq!(seen_as(&site), None);
        assert!(Instant::now() < ended, "{}", gateway.nat());
    }
    space.ip("addr add 192.168.77.1/24 dev lan").unwrap();
    let ended = Instant::now() + LIMIT;
    while seen_as(&site) != Some(ip("192.168.77.1")) {
        assert!(Instant::now() < ended, "{}", gateway.nat());
    }

    // Other lines, and none.
    let allow = format!("{MASQUERADE}\n#! Allow = 10.9.0.0/24 -> 192.168.77.0/24 udp");
    let told = gateway.reload(&allow);
    assert!(told.contains("+ #! Allow = 10.9.0.0/24 -> 192.168.77.0/24 udp"), "{told}");
    assert_eq!(seen_as(&site), Some(ip("192.168.77.1")));
    assert!(!is_answered(&site), "only UDP is allowed");
    let shown = gateway.nat();
    assert!(shown["drops"]["not_allowed"].as_u64().unwrap() > 0, "{shown}");
    assert!(shown["allows"][0]["flows"].as_u64().unwrap() > 0, "{shown}");
    gateway.reload("");
    assert_eq!(seen_as(&site), None, "the host knows no way back to what is not translated");
    let text = gateway.succeeds(&["show", &gateway.interface, "nat"]);
    assert!(text.contains("no `#! Nat`"), "{text}");
    gateway.reload(MASQUERADE);
    assert!(is_answered(&site), "{}", gateway.nat());
}

#[test]
fn many_short_flows_use_few_ports_again_and_again() {
    const THREADS: usize = 3;
    const EACH: usize = 800;

    if skips("many_short_flows_use_few_ports_again_and_again", &["ping"]) {
        return;
    }
    let site = Site::new(&LAYOUT).unwrap();
    let [gateway, _client] = tunnel(&site, MASQUERADE, FEW_PORTS);
    assert!(is_answered(&site), "{}", gateway.nat());
    let listeners: Vec<TcpListener> = inside(site.space("host"), || {
        (0..THREADS).map(|_| TcpListener::bind((HOST, 0)).unwrap()).collect()
    });
    let ports: HashSet<u16> = std::thread::scope(|scope| {
        let serving: Vec<_> = listeners
            .iter()
            .map(|listener| {
                scope.spawn(move || {
                    let mut ports = HashSet::new();
                    for _ in 0..EACH {
                        let (mut stream, from) = accept(listener);
                        let mut bytes = [0; 8];
                        stream.read_exact(&mut bytes).unwrap();
                        stream.write_all(&bytes).unwrap();
                        ports.insert(from.port());
                    }
                    ports
                })
            })
            .collect();
        for listener in &listeners {
            let to = listener.local_addr().unwrap();
            let connect = move || {
                for number in 0..EACH {
                    let mut stream = TcpStream::connect_timeout(&to, LIMIT).unwrap();
                    stream.set_read_timeout(Some(LIMIT)).unwrap();
                    stream.write_all(&number.to_be_bytes()).unwrap();
                    let mut bytes = [0; 8];
                    stream.read_exact(&mut bytes).unwrap();
                    assert_eq!(bytes, number.to_be_bytes());
                }
            };
            let client = site.space("client");
            scope.spawn(move || inside(client, connect));
        }
        serving.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(ports.len() <= 256, "{} ports", ports.len());
    let shown = gateway.nat();
    assert!(shown["externals"][0]["ports"]["tcp"] == 256, "{shown}");
    // Ports come back before they are all in use: few have to ask twice.
    let refused = shown["drops"]["no_port"].as_u64().unwrap_or(0);
    eprintln!("{refused} of {} had to ask again", THREADS * EACH);
    assert!(refused < (THREADS * EACH / 20) as u64, "{shown}");
}
