use miette::Diagnostic;
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::config::{Config, Problem, Span, parse};

const PRIVATE: &str = "mAeWHcze+XzBIN9EovEt3UB2KGbTSWHNbBkvWrJHsV8=";
const PEER: &str = "SZOBANQLyekclD9nuKybeOduZ+LIN37etjNWQkub1Ww=";

/// A file with these lines in its [Interface] and its [Peer].
fn file(interface: &str, peer: &str) -> String {
    format!(
        "[Interface]\nPrivateKey = {PRIVATE}\n{interface}\n[Peer]\nPublicKey = {PEER}\n{peer}\n"
    )
}

fn accept(interface: &str, peer: &str) -> Config {
    parse("wg0.conf", &file(interface, peer)).unwrap_or_else(|errors| panic!("{errors}"))
}

/// What is wrong with the only wrong line: message, the text of the first place and what it says, help.
fn complaint(interface: &str, peer: &str) -> String {
    let text = file(interface, peer);
    let errors = parse("wg0.conf", &text).expect_err(&text);
    let [problem] = errors.problems() else { panic!("{errors:?}") };
    let label = problem.labels().unwrap().next().unwrap();
    let shown = &text[label.offset()..label.offset() + label.len()];
    format!("{problem} | {shown}: {} | {}", label.label().unwrap(), problem.help().unwrap())
}

fn texts(lines: Vec<Spanned<String>>) -> Vec<String> {
    lines.into_iter().map(|line| line.value).collect()
}

#[test]
fn all_forms_are_read_whatever_their_case_and_blanks() {
    let interface = "#! metrics = [::1]:9586\n\
        #! Nat = Masquerade  OUT=eth0\n\
        #!nat=snat from=10.9.0.1/24 to=192.0.2.1,2001:db8::1 out=vlan.20 # jump\n\
        #! Forward = TCP eth0:8443->10.9.0.2:443\n\
        #! Forward = udp eth0:53  ->  [fd09::2]:5353\n\
        #! Allow = 10.9.0.0/24 -> 192.168.20.0/24 tcp 22, 3389 ,8000-8080\n\
        #! Allow = 10.9.0.2->0.0.0.0/0 udp\n\
        #! Allow = fd09::/64 -> fd20::/64\n\
        #! Allow = fd09::/64 -> fd20::/64 ICMP\n\
        #! Xdp = eth0 ,eth1 queues=4 Bypass-Firewall Busy-Poll mode=ZeroCopy\n\
        #! Workers = 4\n\
        #! mssclamp = Off # for a reason\n\
        #!CopyDscp=ON";
    let config = accept(interface, "#! Limit = 200 MBit\n#! Name =  my laptop  # old");
    let expected = [
        "#! Metrics = [::1]:9586",
        "#! Nat = masquerade out=eth0",
        "#! Nat = snat out=vlan.20 to=192.0.2.1,2001:db8::1 from=10.9.0.0/24",
        "#! Forward = tcp eth0:8443 -> 10.9.0.2:443",
        "#! Forward = udp eth0:53 -> [fd09::2]:5353",
        "#! Allow = 10.9.0.0/24 -> 192.168.20.0/24 tcp 22,3389,8000-8080",
        "#! Allow = 10.9.0.2/32 -> 0.0.0.0/0 udp",
        "#! Allow = fd09::/64 -> fd20::/64",
        "#! Allow = fd09::/64 -> fd20::/64 icmp",
        "#! Xdp = eth0,eth1 mode=zerocopy queues=4 busy-poll bypass-firewall",
        "#! Workers = 4",
        "#! MssClamp = off",
        "#! CopyDscp = on",
    ];
    assert_eq!(texts(config.interface.instructions()), expected);
    let of_peer = texts(config.peers[0].instructions());
    assert_eq!(of_peer, ["#! Limit = 200mbit", "#! Name = my laptop"]);
    let text = file(interface, "");
    let shown = |span: Span| &text[span.offset()..span.offset() + span.len()];
    let snat = &config.interface.nat[1].value;
    assert_eq!((shown(snat.out.span), snat.out.value.as_str()), ("vlan.20", "vlan.20"));
    assert_eq!(shown(snat.from.as_ref().unwrap().span), "10.9.0.1/24");
    let NatSource::Snat(to) = &snat.source else { panic!("{snat:?}") };
    assert_eq!(shown(to[1].span), "2001:db8::1");
    let forward = &config.interface.forward[0].value;
    assert_eq!((shown(forward.interface.span), shown(forward.port.span)), ("eth0", "8443"));
    assert_eq!(shown(forward.to.span), "10.9.0.2:443");
    let allow = &config.interface.allow[0].value;
    let Traffic::To(_, ports) = &allow.traffic else { panic!("{allow:?}") };
    assert_eq!(
        ports.iter().map(|port| shown(port.span)).collect::<Vec<_>>(),
        ["22", "3389", "8000-8080"]
    );
    assert_eq!(shown(allow.to.span), "192.168.20.0/24");
}

#[test]
fn what_is_not_built_yet_is_understood_and_said() {
    let interface = "#! Nat = masquerade out=eth0\n#! Forward = tcp eth0:1 -> 10.9.0.2:2\n\
        #! Allow = ::/0 -> ::/0\n#! Metrics = 127.0.0.1:9586\n#! Dashboard = 127.0.0.1:51821\n\
        #! Xdp = eth0 mode=zerocopy queues=2\n#! Workers = 1";
    let config = accept(interface, "#! Limit = 1gbit\n#! Name = laptop");
    let said: Vec<String> = config.unsupported().iter().map(Problem::to_string).collect();
    let expected = ["`#! Metrics`", "`#! Dashboard`", "`queues=` of `Xdp`", "`#! Limit`"];
    assert_eq!(said, expected.map(|what| format!("{what} is not supported yet")));
}

#[test]
fn a_switch_is_on_or_off_and_stands_once() {
    let switches = |lines: &str| {
        let interface = accept(lines, "").interface;
        (interface.mss_clamp.map(|is| is.value), interface.copy_dscp.map(|is| is.value))
    };
    assert_eq!(switches(""), (None, None));
    assert_eq!(switches("#! MssClamp = on\n#! CopyDscp = off"), (Some(true), Some(false)));
    assert!(accept("#! MssClamp = on\n#! CopyDscp = on", "").unsupported().is_empty());
    for (interface, expected) in [
        (
            "#! MssClamp = 1",
            "`MssClamp` is either on or off | 1: neither `on` nor `off` | write `#! MssClamp = on` or `#! MssClamp = off`",
        ),
        ("#! CopyDscp = on off", "`CopyDscp` is either on or off | on off: neither"),
        ("#! CopyDscp =", "`#! CopyDscp` has no value"),
        ("#! CopyDscp = on\n#! CopyDscp = on", "`CopyDscp` is set twice"),
        ("#! CopyDcsp = on", "did you mean `#! CopyDscp`?"),
    ] {
        let said = complaint(interface, "");
        assert!(said.contains(expected), "{said}");
    }
    assert!(complaint("", "#! MssClamp = on").starts_with("`MssClamp` does not belong here"));
}

#[test]
fn what_is_wrong_with_nat_is_said_where_it_stands() {
    for (value, expected) in [
        (
            "masquerad out=eth0",
            "unknown kind of NAT `masquerad` | masquerad: neither `masquerade` nor `snat` | did you mean `masquerade`?",
        ),
        (
            "eth0",
            "unknown kind of NAT `eth0` | eth0: neither `masquerade` nor `snat` | write `#! Nat",
        ),
        ("masquerade", "`Nat` has no `out=` | masquerade: `out=` is missing | write"),
        ("snat out=eth0", "`Nat` has no `to=`"),
        (
            "masquerade out=eth0 to=192.0.2.1",
            "`masquerade` takes no `to=` | to=192.0.2.1: the address",
        ),
        ("masquerade out=eth0 out=eth1", "`out` is set twice | out=eth1: again here"),
        (
            "masquerade ou=eth0",
            "unknown option `ou` | ou: not an option of `Nat` | did you mean `out`?",
        ),
        ("masquerade eth0", "unknown option `eth0`"),
        ("masquerade out = eth0", "`out` has no value | out: a value should follow | write `out=`"),
        (
            "masquerade out=192.0.2.1",
            "`192.0.2.1` is not an interface | 192.0.2.1: this is an address",
        ),
        ("masquerade out=eth/0", "`eth/0` is not an interface | eth/0: a name is 1 to 15 bytes"),
        (
            "masquerade out=eth0 from=10.9.0.0/33",
            "`10.9.0.0/33` is not an address with a prefix | 33:",
        ),
        ("snat out=eth0 to=192.0.2.1,", "the list of addresses has a gap"),
        (
            "snat out=eth0 to=192.0.2.300",
            "`192.0.2.300` is not an address | 192.0.2.300: this is neither",
        ),
        (
            "masquerade out=eth0 bypass-fierwall",
            "unknown option `bypass-fierwall` | bypass-fierwall: not an option of `Nat` | did you mean `bypass-firewall`?",
        ),
        ("masquerade out=eth0 bypass-firewall=yes", "`yes` is too much here"),
        (
            "snat out=eth0 to=0.0.0.0",
            "`0.0.0.0` is not an address | 0.0.0.0: no packet comes from there",
        ),
        ("snat out=eth0 to=::1,::1", "`::1` stands here twice | ::1: again here"),
        (
            "snat out=eth0 to=192.0.2.1 from=fd09::/64",
            "no packet of `from=` can get an address of `to=` | fd09::/64:",
        ),
    ] {
        let complaint = complaint(&format!("#! Nat = {value}"), "");
        assert!(complaint.starts_with(expected), "{complaint}");
    }
}

#[test]
fn what_is_wrong_with_forward_and_allow_is_said_where_it_stands() {
    for (line, expected) in [
        ("Forward = tcp eth0:1 10.9.0.2:1", "`Forward` has no `->`"),
        ("Forward = tcp eth0:1 ->", "nothing stands behind `->`"),
        ("Forward = -> 10.9.0.2:1", "nothing stands before `->`"),
        (
            "Forward = tpc eth0:1 -> 10.9.0.2:1",
            "unknown protocol `tpc` | tpc: neither `tcp` nor `udp` | did you mean `tcp`?",
        ),
        ("Forward = eth0:1 -> 10.9.0.2:1", "unknown protocol `eth0:1`"),
        ("Forward = tcp -> 10.9.0.2:1", "the port is missing"),
        ("Forward = tcp eth0 -> 10.9.0.2:1", "the port is missing | eth0: expected an interface"),
        ("Forward = tcp eth0:0 -> 10.9.0.2:1", "`0` is not a port | 0: a port is a number"),
        ("Forward = tcp eth0:1 x -> 10.9.0.2:1", "`x` is too much here"),
        (
            "Forward = tcp 192.0.2.1:1 -> 10.9.0.2:1",
            "`192.0.2.1` is not an interface | 192.0.2.1: this is an address",
        ),
        (
            "Forward = tcp [::1]:1 -> 10.9.0.2:1",
            "`[::1]` is not an interface | [::1]: this is an address",
        ),
        (
            "Forward = tcp eth0:1 -> 10.9.0.2",
            "`10.9.0.2` is not an address with a port | 10.9.0.2: the port is missing | write `10.9.0.2:` and the port",
        ),
        (
            "Forward = tcp eth0:1 -> fd09::2",
            "`fd09::2` is not an address with a port | fd09::2: the port is missing | write `[fd09::2]:`",
        ),
        (
            "Forward = tcp eth0:1 -> web:80",
            "`web:80` is not an address with a port | web: this is no address",
        ),
        ("Forward = tcp eth0:1 -> 10.9.0.2:65536", "`65536` is not a port"),
        ("Forward = tcp eth0:1 -> 10.9.0.2:1 x", "`x` is too much here"),
        ("Forward = tcp eth0:1 -> 10.9.0.2:1 bypass-firewall x", "`x` is too much here"),
        ("Forward = tcp eth0:1 -> bypass-firewall", "`bypass-firewall` is not an address with"),
        ("Forward = tcp eth0:1 -> 0.0.0.0:1", "`0.0.0.0:1` is nobody's address"),
        ("Forward = tcp eth0:1 -> [10.9.0.2]:1", "`[10.9.0.2]:1` is not an address with a port"),
        ("Allow = 10.9.0.0/24", "`Allow` has no `->`"),
        ("Allow = 10.9.0.0/24 -> laptop", "`laptop` is not an address with a prefix | laptop:"),
        (
            "Allow = 10.9.0.0/24 -> fd00::/8",
            "nothing goes from IPv4 to IPv6 or back | fd00::/8: of one",
        ),
        (
            "Allow = ::/0 -> ::/0 tpc",
            "unknown protocol `tpc` | tpc: not `tcp`, `udp` or `icmp` | did you mean `tcp`?",
        ),
        (
            "Allow = ::/0 -> ::/0 icmpv6",
            "unknown protocol `icmpv6` | icmpv6: not `tcp`, `udp` or `icmp` | write `icmp`:",
        ),
        ("Allow = ::/0 -> ::/0 icmp 8", "ICMP has no ports | 8:"),
        ("Allow = ::/0 -> ::/0 22", "unknown protocol `22`"),
        ("Allow = ::/0 -> ::/0 tcp ssh", "`ssh` is not a port | ssh: a port is a number from 1"),
        ("Allow = ::/0 -> ::/0 tcp 22 80", "`22 80` is not a port"),
        ("Allow = ::/0 -> ::/0 tcp 22,,80", "the list of ports has a gap"),
        (
            "Allow = ::/0 -> ::/0 tcp 80:90",
            "`80:90` is not a port | 80:90: a range is written with `-` | write `80-90`",
        ),
        (
            "Allow = ::/0 -> ::/0 tcp 90-80",
            "`90-80` is no range | 90-80: it ends before it begins | write `80-90`",
        ),
        ("Allow = ::/0 -> ::/0 tcp 0-80", "`0` is not a port"),
        (
            "Metrics = 9586",
            "`9586` is not an address with a port | 9586: expected an address, a colon",
        ),
        (
            "Metrics = localhost:9586",
            "`localhost:9586` is not an address with a port | localhost: this is no address",
        ),
        ("Metrics = 127.0.0.1:0", "`0` is not a port"),
        (
            "Metrics = ::1",
            "`::1` is not an address with a port | ::1: the port is missing | write `[::1]:`",
        ),
    ] {
        let complaint = complaint(&format!("#! {line}"), "");
        assert!(complaint.starts_with(expected), "{complaint}");
    }
}

#[test]
fn rates_have_units_of_bits() {
    let limit = |text: &str| accept("", &format!("#! Limit = {text}")).peers[0].limit.clone();
    for (text, bits_per_s, shown) in [
        ("200mbit", 200_000_000, "200mbit"),
        ("1.5gbit", 1_500_000_000, "1500mbit"),
        ("0.0015 Gbit", 1_500_000, "1500kbit"),
        ("1.234567mbit", 1_234_567, "1234.567kbit"),
        ("1000gbit", 1_000_000_000_000, "1000gbit"),
        ("1kbit", 1000, "1kbit"),
    ] {
        let limit = limit(text).unwrap();
        assert_eq!((limit.bits_per_s, &*limit.to_string()), (bits_per_s, shown), "{text}");
    }
    for (text, expected) in [
        ("200", "`200` is not a rate | 200: the unit is missing"),
        (
            "200mbps",
            "`200mbps` is not a rate | mbps: not a unit | write `200mbit` if bits are meant",
        ),
        ("200Mb/s", "`200Mb/s` is not a rate | Mb/s: not a unit | write `200mbit`"),
        ("200mbti", "`200mbti` is not a rate | mbti: not a unit | did you mean `mbit`?"),
        ("0.9kbit", "`0.9kbit` is not a rate | 0.9: a rate is whole bits per second"),
        ("1.2345kbit", "`1.2345kbit` is not a rate | 1.2345: a rate is whole bits"),
        ("1001gbit", "`1001gbit` is not a rate"),
        ("99999999999999999999mbit", "`99999999999999999999mbit` is not a rate"),
        ("1.2.3mbit", "`1.2.3mbit` is not a rate"),
        ("-1mbit", "`-1mbit` is not a rate"),
        ("mbit", "`mbit` is not a rate"),
    ] {
        let complaint = complaint("", &format!("#! Limit = {text}"));
        assert!(complaint.starts_with(expected), "{complaint}");
    }
}

#[test]
fn a_name_can_stand_in_a_line_and_is_no_key() {
    for good in ["a", "Bob's phone", "büro-1", "📱", &"ä".repeat(63), "x=y"] {
        assert_eq!(name_problem(good), None, "{good}");
        assert!(good.len() <= NAME_LEN_MAX);
        let config = accept("", &format!("#! Name = {good}"));
        assert_eq!(config.peers[0].name.as_ref().unwrap().value, good);
    }
    for bad in
        ["", " a", "a ", "a\tb", "a\nb", "a\u{1b}b", "a\u{202e}b", "a#b", &"ä".repeat(64), PEER]
    {
        assert!(name_problem(bad).is_some(), "{bad}");
    }
    let complaint = complaint("", &format!("#! Name = {}", "x".repeat(64)));
    assert!(complaint.contains("is not a name for a peer"), "{complaint}");
    assert!(complaint.contains("a name has 1 to 63 characters"), "{complaint}");
}

/// Values that stand nowhere.
fn nowhere<T>(value: T) -> Spanned<T> {
    Spanned::new(value, Span::new(0.into(), 0))
}

fn any_address() -> impl Strategy<Value = IpAddr> {
    let v4 = any::<[u8; 4]>().prop_map(IpAddr::from);
    let v6 = any::<[u8; 16]>().prop_map(IpAddr::from);
    let of_a_host = |ip: &IpAddr| {
        let is_broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
        !ip.is_unspecified() && !ip.is_multicast() && !is_broadcast
    };
    prop_oneof![v4, v6].prop_filter("of a host", of_a_host)
}

fn any_net() -> impl Strategy<Value = IpNet> {
    (any_address(), 0..=128_u8).prop_map(|(ip, len)| {
        IpNet::new(ip, len.min(if ip.is_ipv4() { 32 } else { 128 })).unwrap().trunc()
    })
}

fn any_place() -> impl Strategy<Value = SocketAddr> {
    (any_address(), 1_u16..).prop_map(SocketAddr::from)
}

fn any_interface() -> impl Strategy<Value = String> {
    "[a-z][a-zA-Z0-9.@_-]{0,14}"
}

fn any_transport() -> impl Strategy<Value = Transport> {
    prop_oneof![Just(Transport::Tcp), Just(Transport::Udp)]
}

fn any_nat() -> impl Strategy<Value = Nat> {
    let to = option::of(btree_set(any_address(), 1..4));
    (any_interface(), to, option::of(any_net()), any::<bool>()).prop_map(
        |(out, to, from, bypass_firewall)| {
            let is_alike = |net: &IpNet| {
                to.as_ref().is_none_or(|to| {
                    to.iter().any(|ip: &IpAddr| ip.is_ipv4() == net.addr().is_ipv4())
                })
            };
            let from = from.filter(is_alike).map(nowhere);
            let source = match to {
                None => NatSource::Masquerade,
                Some(to) => NatSource::Snat(to.into_iter().map(nowhere).collect()),
            };
            Nat { source, out: nowhere(out), from, bypass_firewall }
        },
    )
}

fn any_forward() -> impl Strategy<Value = Forward> {
    (any_transport(), any_interface(), 1_u16.., any_place(), any::<bool>()).prop_map(
        |(transport, interface, port, to, bypass_firewall)| Forward {
            bypass_firewall,
            transport: nowhere(transport),
            interface: nowhere(interface),
            port: nowhere(port),
            to: nowhere(to),
        },
    )
}

fn any_allow() -> impl Strategy<Value = Allow> {
    let range = (1_u16.., 1_u16..)
        .prop_map(|(a, b)| nowhere(PortRange { first: a.min(b), last: a.max(b) }));
    let one = (1_u16..).prop_map(|port| nowhere(PortRange { first: port, last: port }));
    let ports = vec(prop_oneof![range, one], 0..4);
    let traffic = prop_oneof![
        Just(Traffic::All),
        Just(Traffic::Icmp),
        (any_transport(), ports)
            .prop_map(|(transport, ports)| Traffic::To(nowhere(transport), ports)),
    ];
    let nets = (any_net(), any_net());
    let nets = nets.prop_map(|(from, to)| {
        let is_alike = from.addr().is_ipv4() == to.addr().is_ipv4();
        (from, if is_alike { to } else { from })
    });
    (nets, traffic).prop_map(|((from, to), traffic)| Allow {
        from: nowhere(from),
        to: nowhere(to),
        traffic,
    })
}

fn any_xdp() -> impl Strategy<Value = Xdp> {
    let modes = prop::sample::select(vec![Mode::Auto, Mode::ZeroCopy, Mode::Native, Mode::Udp]);
    let interfaces = btree_set(any_interface(), 1..4);
    (interfaces, option::of(modes), option::of(1..=512_u32), any::<bool>(), any::<bool>()).prop_map(
        |(interfaces, mode, queues, busy_poll, bypass_firewall)| Xdp {
            interfaces: interfaces.into_iter().map(nowhere).collect(),
            mode: mode.map(nowhere),
            queues: queues.map(nowhere),
            busy_poll,
            bypass_firewall,
        },
    )
}

/// As it would be if it stood nowhere.
trait Unplaced {
    fn unplaced(self) -> Self;
}

impl<T> Unplaced for Spanned<T> {
    fn unplaced(self) -> Self {
        nowhere(self.value)
    }
}

impl<T> Unplaced for Vec<Spanned<T>> {
    fn unplaced(self) -> Self {
        self.into_iter().map(Unplaced::unplaced).collect()
    }
}

impl<T> Unplaced for Option<Spanned<T>> {
    fn unplaced(self) -> Self {
        self.map(Unplaced::unplaced)
    }
}

proptest! {
    #[test]
    fn what_is_printed_is_read(
        nat in vec(any_nat(), 0..3),
        forward in vec(any_forward(), 0..3),
        allow in vec(any_allow(), 0..3),
        xdp in option::of(any_xdp()),
        metrics in option::of(any_place()),
        limit in option::of(1000..=1_000_000_000_000_u64),
    ) {
        let mut lines = String::new();
        nat.iter().for_each(|nat| lines += &format!("#! Nat = {nat}\n"));
        forward.iter().for_each(|forward| lines += &format!("#! Forward = {forward}\n"));
        allow.iter().for_each(|allow| lines += &format!("#! Allow = {allow}\n"));
        xdp.iter().for_each(|xdp| lines += &format!("#! Xdp = {xdp}\n"));
        metrics.iter().for_each(|metrics| lines += &format!("#! Metrics = {metrics}\n"));
        let limit = limit.map(|bits_per_s| Limit { bits_per_s });
        let of_peer = limit.map(|limit| format!("#! Limit = {limit}")).unwrap_or_default();
        let mut config = accept(&lines, &of_peer);
        prop_assert_eq!(config.peers[0].limit.as_deref().copied(), limit);
        let found = &mut config.interface;
        prop_assert_eq!(found.metrics.as_deref().copied(), metrics);
        let unplaced = found.nat.drain(..).map(|found| Nat {
            source: match found.value.source {
                NatSource::Masquerade => NatSource::Masquerade,
                NatSource::Snat(to) => NatSource::Snat(to.unplaced()),
            },
            out: found.value.out.unplaced(),
            from: found.value.from.unplaced(),
            bypass_firewall: found.value.bypass_firewall,
        });
        prop_assert_eq!(unplaced.collect::<Vec<_>>(), nat);
        let unplaced = found.forward.drain(..).map(|found| Forward {
            transport: found.value.transport.unplaced(),
            interface: found.value.interface.unplaced(),
            port: found.value.port.unplaced(),
            to: found.value.to.unplaced(),
            bypass_firewall: found.value.bypass_firewall,
        });
        prop_assert_eq!(unplaced.collect::<Vec<_>>(), forward);
        let unplaced = found.allow.drain(..).map(|found| Allow {
            from: found.value.from.unplaced(),
            to: found.value.to.unplaced(),
            traffic: match found.value.traffic {
                Traffic::To(transport, ports) => {
                    Traffic::To(transport.unplaced(), ports.unplaced())
                }
                other => other,
            },
        });
        prop_assert_eq!(unplaced.collect::<Vec<_>>(), allow);
        let unplaced = found.xdp.take().map(|found| Xdp {
            interfaces: found.value.interfaces.unplaced(),
            mode: found.value.mode.unplaced(),
            queues: found.value.queues.unplaced(),
            ..found.value
        });
        prop_assert_eq!(unplaced, xdp);
    }

    #[test]
    fn no_value_panics_and_every_complaint_has_its_place(
        name in prop::sample::select(vec!["Nat", "Forward", "Allow", "Metrics", "Xdp", "Limit", "Name"]),
        value in "(snat |masquerade |tcp |->|out=|to=|from=|eth0|10\\.0\\.0\\.1|fd00::1|\\[|\\]|:|,|-| |[0-9]{1,3}|mbit|(?s).){0,9}",
    ) {
        let line = format!("#! {name} = {value}");
        let is_of_peer = matches!(name, "Limit" | "Name");
        let text = if is_of_peer { file("", &line) } else { file(&line, "") };
        if let Err(errors) = parse("wg0.conf", &text) {
            for problem in errors.problems() {
                prop_assert!(problem.help().is_some());
                for span in problem.spans() {
                    prop_assert!(text.get(span.offset()..span.offset() + span.len()).is_some());
                }
            }
        }
    }
}
