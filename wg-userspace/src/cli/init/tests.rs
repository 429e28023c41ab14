//! Whatever is asked for: the files fit each other.

use proptest::prelude::*;
use rand::{SeedableRng, rngs::StdRng};

use super::*;
use crate::{
    check::{self, Severity, Subject},
    cli::args::{self, Command},
    config::Config,
};

/// The shape of a command line, as clap reads it.
fn shape(line: &str) -> Shape {
    let words = ["tidegate", "init"].into_iter().chain(line.split_whitespace());
    match args::parse(words.map(Into::into).collect()) {
        Ok(Command::Init(shape)) => shape,
        other => panic!("{line}: {other:?}"),
    }
}

/// The files of all ends, read.
fn files(line: &str, seed: u64) -> Vec<(String, Config)> {
    let ends = shapes::ends(&shape(line), &mut StdRng::seed_from_u64(seed));
    let ends = ends.unwrap_or_else(|error| panic!("{line}: {error}"));
    let read = |end: End| {
        let text = write_config(&end.config);
        let config = config::parse(&end.name, &text);
        (end.name, config.unwrap_or_else(|errors| panic!("{line}: {errors:?}\n{}", *text)))
    };
    ends.into_iter().map(read).collect()
}

/// A host, not of any network that is chosen below, with or without a port.
fn place() -> impl Strategy<Value = String> {
    let host = prop_oneof![
        "[a-z]{1,8}\\.example\\.org",
        (1..255_u8).prop_map(|last| format!("198.51.100.{last}")),
        (1..0xffff_u16).prop_map(|last| format!("[2001:db8::{last:x}]")),
    ];
    (host, proptest::option::of(1..=u16::MAX)).prop_map(|(host, port)| match port {
        Some(port) => format!("{host}:{port}"),
        None => host,
    })
}

/// Options of all shapes; the networks have room for 8 ends.
fn common() -> impl Strategy<Value = String> {
    let v4 = prop_oneof![Just(""), Just("--network 10.0.0.0/28"), Just("--network 172.16.0.0/12")];
    let v6 =
        prop_oneof![Just(""), Just("--network6 fd09::/64"), Just("--network6 2001:db8:9::/124")];
    let families = prop_oneof![
        (v4, v6).prop_map(|(v4, v6)| format!("{v4} {v6}")),
        Just("--network none".to_owned()),
        Just("--network6 none".to_owned()),
    ];
    let psk = prop_oneof![Just(""), Just("--psk")];
    let port = proptest::option::of(1..=u16::MAX);
    (families, psk, port).prop_map(|(families, psk, port)| {
        let port = port.map(|port| format!("--port {port}")).unwrap_or_default();
        format!("{families} {psk} {port}")
    })
}

fn star() -> impl Strategy<Value = String> {
    let shape = prop_oneof![
        Just("bridge"),
        Just("gateway"),
        Just("gateway --out enp1s0 --dns 9.9.9.9,2620:fe::fe"),
    ];
    (shape, place(), 1..8_usize, common()).prop_map(|(shape, place, count, common)| {
        let clients: Vec<_> = (0..count).map(|client| format!("c{client}")).collect();
        format!("{shape} --endpoint {place} --clients {} {common}", clients.join(","))
    })
}

fn jumpbox() -> impl Strategy<Value = String> {
    // Of each family that `common` may leave out, none.
    let behind = prop_oneof![
        Just("192.168.20.0/24 --network6 none"),
        Just("192.168.0.0/17,192.168.128.0/17 --psk"),
        Just("192.168.20.0/24,fd20::/64 --network 10.0.0.0/24"),
        Just("fd20::/64 --network none --out vlan20"),
    ];
    (place(), behind)
        .prop_map(|(place, behind)| format!("jumpbox --endpoint {place} --vlan {behind}"))
}

fn mesh() -> impl Strategy<Value = String> {
    let nodes = proptest::collection::btree_set(place(), 1..7);
    (nodes, any::<bool>(), common()).prop_filter_map("distinct", |(places, is_hidden, common)| {
        let nodes = places.iter().enumerate().map(|(node, place)| format!("n{node}={place}"));
        let hidden = (is_hidden || places.len() == 1).then(|| "hidden".to_owned());
        let nodes: Vec<_> = nodes.chain(hidden).collect();
        // A place with the default port and without one are the same.
        let line = format!("mesh --nodes {} {common}", nodes.join(","));
        shapes::ends(&shape(&line), &mut StdRng::seed_from_u64(0)).is_ok().then_some(line)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_shape_has_anything_to_complain_of(
        line in prop_oneof![star(), jumpbox(), mesh()],
        seed: u64,
    ) {
        let files = files(&line, seed);
        let subjects: Vec<Subject<'_>> =
            files.iter().map(|(name, config)| Subject { name, config }).collect();
        let alone = subjects.iter().enumerate().flat_map(|(at, file)| check::alone(file, at));
        let mut findings: Vec<_> = alone.chain(check::together(&subjects)).collect();
        findings.retain(|finding| finding.severity > Severity::Note);
        prop_assert!(findings.is_empty(), "{}: {:#?}", line, findings);
    }
}

/// What an end says of forwarding.
fn forwarding(line: &str) -> Vec<String> {
    let (_, middle) = &files(line, 1)[0];
    assert!(middle.interface.hooks.is_empty());
    let lines = middle.interface.instructions().into_iter().map(|line| line.value);
    lines.filter(|line| !line.starts_with("#! Endpoint")).collect()
}

#[test]
fn a_gateway_translates_and_lets_pass_what_its_clients_send_and_nothing_else() {
    assert_eq!(
        forwarding("gateway --endpoint gw.example.org --network6 fd09::/64 --out wan"),
        [
            "#! Nat = masquerade out=wan from=10.9.0.0/24",
            "#! Nat = masquerade out=wan from=fd09::/64",
            "#! Allow = 10.9.0.0/24 -> 0.0.0.0/0",
            "#! Allow = fd09::/64 -> ::/0",
        ]
    );
    assert_eq!(
        forwarding(
            "jumpbox --endpoint gw.example.org --network6 fd09::/64 --out eth1 \
             --vlan 192.168.20.0/24,192.168.30.0/24"
        ),
        [
            "#! Nat = masquerade out=eth1 from=10.9.0.0/24",
            "#! Allow = 10.9.0.0/24 -> 192.168.20.0/24",
            "#! Allow = 10.9.0.0/24 -> 192.168.30.0/24",
        ]
    );
    assert_eq!(forwarding("bridge --endpoint gw.example.org"), [""; 0]);
}

#[test]
fn what_is_printed_says_where_each_file_goes() {
    let line = "gateway --endpoint [2001:db8::1]:443 --network6 fd09::/64 --clients laptop";
    let shape = shape(&format!("{line} /srv/new"));
    let ends = shapes::ends(&shape, &mut StdRng::seed_from_u64(1)).unwrap();
    assert_eq!(
        report(&ends, common_of(&shape)),
        "Written, for its owner alone to read:\n  \
           /srv/new/gateway/wg0.conf  10.9.0.1, fd09::1, found at [2001:db8::1]:443\n  \
           /srv/new/laptop/wg0.conf   10.9.0.2, fd09::2\n\
         \n\
         Next:\n  \
           tidegate check /srv/new/*/wg0.conf\n\
         Move each file to /etc/wireguard of its own host; it has that host's private key:\n  \
           scp -p /srv/new/gateway/wg0.conf root@[2001:db8::1]:/etc/wireguard/\n\
         UDP port 443 of gateway has to be open to the others. At each end:\n  \
           tidegate up wg0\n"
    );
}

#[test]
fn paths_are_fit_for_a_shell() {
    for (path, shown) in [
        ("./laptop/wg0.conf", "./laptop/wg0.conf"),
        ("/a b/*/wg0.conf", "/'a b'/*/wg0.conf"),
        ("it's/$x", r"'it'\''s'/'$x'"),
    ] {
        assert_eq!(quoted(Path::new(path)), shown);
    }
}
