use std::collections::HashSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme, NarratableReportHandler};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;

const PRIVATE: &str = "mAeWHcze+XzBIN9EovEt3UB2KGbTSWHNbBkvWrJHsV8=";
const PUBLIC: &str = "hqgq5MSzyXA05bLRGiOGN8alcIiPgBwk7KLvaKEMUVg=";
const PEER: &str = "SZOBANQLyekclD9nuKybeOduZ+LIN37etjNWQkub1Ww=";

/// A file with this much in its [Interface] and its [Peer].
fn file(interface: &str, peer: &str) -> String {
    format!(
        "[Interface]\nPrivateKey = {PRIVATE}\n{interface}\n[Peer]\nPublicKey = {PEER}\n{peer}\n"
    )
}

fn accept(text: &str) -> Config {
    parse("wg0.conf", text).unwrap_or_else(|errors| panic!("{}", render(&errors)))
}

fn peer(lines: &str) -> PeerConfig {
    accept(&file("", lines)).peers.remove(0)
}

fn interface(lines: &str) -> Interface {
    accept(&file(lines, "")).interface
}

/// The report without colours; asserts that it shows no secret.
fn render(diagnostic: &dyn Diagnostic) -> String {
    let mut report = String::new();
    GraphicalReportHandler::new_themed(GraphicalTheme::unicode_nocolor())
        .with_width(100)
        .render_report(&mut report, diagnostic)
        .unwrap();
    assert!(!report.contains(&PRIVATE[..16]), "{report}");
    assert!(!format!("{diagnostic:?}").contains(&PRIVATE[..16]));
    report
}

fn refuse(text: &str) -> ConfigErrors {
    parse("wg0.conf", text).expect_err(text)
}

/// Messages and helps of everything wrong with a file.
fn complaints(text: &str) -> Vec<String> {
    let errors = refuse(text);
    render(&errors);
    let complaint = |problem: &Problem| {
        let label = problem.labels().and_then(|mut labels| labels.next()).unwrap();
        format!("{problem} | {} | {}", label.label().unwrap(), problem.help().unwrap())
    };
    errors.problems().iter().map(complaint).collect()
}

/// The only message about a file.
fn complaint(text: &str) -> String {
    let mut all = complaints(text);
    assert_eq!(all.len(), 1, "{all:#?}");
    all.remove(0)
}

fn values<T: Clone>(spanned: &[Spanned<T>]) -> Vec<T> {
    spanned.iter().map(|spanned| spanned.value.clone()).collect()
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn an_ordinary_file_is_read_as_wg_reads_it() {
    let text = format!(
        "# Example\r\n[interface] # us\r\nADDRESS = 10.9.0.1/24, fd09::1/64\nAddress=10.9.1.1\n\
         privatekey={PRIVATE}\n  ListenPort =51820# port\nFwMark = 0xCA6C\nMTU=1400\nTable = auto\n\
         SaveConfig = FALSE\nDNS = 1.1.1.1, example.org\nPostUp = echo \"%i # up\"\n\
         PostUp = echo 2\n#! xdp = eth0, eth1 mode=native\n#!Workers=2\n\n\
         [PEER]\n#! Name = my laptop # old\nPublic Key = {PEER}\nPresharedKey = {PRIVATE}\n\
         AllowedIPs = 10.9.0.2 , fd09::2/128\nAllowedIPs=10.20.30.40/16\nallowedips =\n\
         Endpoint = [fd00::1]:51820\nPersistentKeepalive = 25\n\
         [Peer]\n# friendly_name=phone\nPublicKey = {PRIVATE}\n"
    )
    .replace(&format!("PublicKey = {PRIVATE}"), &format!("PublicKey = {}", public(7)));
    let config = accept(&text);
    let interface = &config.interface;
    assert_eq!(*interface.private_key, PrivateKey::from_base64(PRIVATE).unwrap());
    assert_eq!(values(&interface.addresses), nets(&["10.9.0.1/24", "fd09::1/64", "10.9.1.1/32"]));
    assert_eq!(interface.listen_port.as_deref(), Some(&51820));
    assert_eq!(interface.fwmark.as_deref(), Some(&51820));
    assert_eq!(interface.mtu.as_deref(), Some(&1400));
    assert_eq!(interface.table.as_deref(), Some(&Table::Auto));
    assert_eq!(interface.save_config.as_deref(), Some(&false));
    assert_eq!(values(&interface.dns), ["1.1.1.1", "example.org"]);
    let commands: Vec<_> = interface.hooks.iter().map(|hook| hook.command.as_str()).collect();
    assert_eq!(commands, ["echo \"%i", "echo 2"], "`#` cuts inside quotes, too");
    let xdp = interface.xdp.as_ref().unwrap();
    assert_eq!(values(&xdp.interfaces), ["eth0", "eth1"]);
    assert_eq!(xdp.mode.as_deref(), Some(&Mode::Native));
    assert_eq!(interface.workers.as_deref(), Some(&2));

    let [laptop, phone] = &config.peers[..] else { panic!("{:?}", config.peers) };
    assert_eq!(*laptop.public_key, PublicKey::from_base64(PEER).unwrap());
    assert_eq!(laptop.preshared_key.as_deref().unwrap().to_base64().as_str(), PRIVATE);
    let expected = nets(&["10.9.0.2/32", "fd09::2/128", "10.20.0.0/16"]);
    assert_eq!(values(&laptop.allowed_ips), expected);
    let endpoint = Endpoint::Address("[fd00::1]:51820".parse().unwrap());
    assert_eq!(laptop.endpoint.as_deref(), Some(&endpoint));
    assert_eq!(laptop.persistent_keepalive.as_deref(), Some(&25));
    assert_eq!(laptop.name.as_deref().unwrap(), "my laptop");
    assert_eq!(phone.name.as_deref().unwrap(), "phone");

    let span = laptop.allowed_ips[2].span;
    assert_eq!(&text[span.offset()..span.offset() + span.len()], "10.20.30.40/16");
}

fn public(seed: u8) -> PublicKey {
    PrivateKey::from_bytes([seed; 32]).public_key()
}

#[test]
fn an_interface_alone_and_one_in_two_parts_are_enough() {
    let config = accept(&format!("[Interface]\nPrivateKey={PRIVATE}"));
    assert!(config.peers.is_empty() && config.unsupported().is_empty());
    let text = format!("{}[Interface]\nListenPort = 1\n", file("MTU = 1500", ""));
    let config = accept(&text);
    assert_eq!(config.interface.listen_port.as_deref(), Some(&1));
    assert_eq!(config.peers.len(), 1);
    accept(&format!("\u{feff}{text}"));
}

#[test]
fn numbers_and_off() {
    assert_eq!(interface("FwMark = off").fwmark.as_deref(), Some(&0));
    assert_eq!(interface("FwMark = 4294967295").fwmark.as_deref(), Some(&u32::MAX));
    assert_eq!(interface("ListenPort = 0").listen_port.as_deref(), Some(&0));
    assert_eq!(peer("PersistentKeepalive = OFF").persistent_keepalive.as_deref(), Some(&0));
    for wrong in ["FwMark = 4294967296", "FwMark = 0x", "FwMark = 0x+1", "FwMark = -1"] {
        assert!(complaint(&file(wrong, "")).contains("is not a firewall mark"), "{wrong}");
    }
    for wrong in ["65536", "+1", "x", "1.5"] {
        let text = file(&format!("ListenPort = {wrong}"), "");
        assert!(complaint(&text).starts_with(&format!("`{wrong}` is not a port |")));
        let text = file("", &format!("PersistentKeepalive = {wrong}"));
        assert!(complaint(&text).starts_with(&format!("`{wrong}` is not an interval |")));
    }
    for wrong in ["MTU = 67", "MTU = 65536", "MTU = 14 20"] {
        assert!(complaint(&file(wrong, "")).contains("is not an MTU"), "{wrong}");
    }
}

#[test]
fn endpoints_are_addresses_or_names_with_a_port() {
    let endpoint = |text: &str| peer(&format!("Endpoint = {text}")).endpoint.unwrap().value;
    let address = |text: &str| Endpoint::Address(text.parse().unwrap());
    let host = |host: &str, port| Endpoint::Host { host: host.to_owned(), port };
    assert_eq!(endpoint("198.51.100.1:51820"), address("198.51.100.1:51820"));
    assert_eq!(endpoint("198.51.100.1 : 51820"), address("198.51.100.1:51820"));
    assert_eq!(endpoint("[fd00::1]:1"), address("[fd00::1]:1"));
    assert_eq!(endpoint("fd00::1:51820"), address("[fd00::1]:51820"));
    assert_eq!(endpoint("vpn-1.example.org:65535"), host("vpn-1.example.org", 65535));
    assert_eq!(endpoint("[fe80::1%eth0]:7"), host("fe80::1%eth0", 7));
    for (wrong, why) in [
        ("198.51.100.1", "the port is missing"),
        ("198.51.100.1:", "the port is missing"),
        ("fd00::1", "needs brackets: `[fd00::1]:51820`"),
        ("[fd00::1]", "the port is missing"),
        ("[fd00::1", "`]` is missing"),
        ("[]:1", "the host is missing"),
        (":51820", "the host is missing"),
        ("example.org:0", "from 1 to 65535"),
        ("example.org:+1", "from 1 to 65535"),
        ("[198.51.100.1]:1", "not an IPv6 address"),
        ("198.51.100.256:1", "neither an address nor a host name"),
        ("exa mple_!.org:1", "neither an address nor a host name"),
    ] {
        let complaint = complaint(&file("", &format!("Endpoint = {wrong}")));
        assert!(complaint.contains(why), "{complaint}");
        assert!(complaint.starts_with(&format!("`{wrong}` is not an endpoint")), "{complaint}");
    }
}

#[test]
fn an_endpoint_of_our_own_is_an_instruction() {
    let own =
        |text: &str| interface(&format!("#! Endpoint = {text} # since May")).endpoint.unwrap();
    for (text, at_51820) in [
        ("gw.example.org:7", "gw.example.org:7"),
        ("gw.example.org", "gw.example.org:51820"),
        ("198.51.100.1", "198.51.100.1:51820"),
        ("[2001:db8::1]:443", "[2001:db8::1]:443"),
        ("[2001:db8::1]", "[2001:db8::1]:51820"),
        ("[fe80::1%eth0]", "[fe80::1%eth0]:51820"),
    ] {
        let endpoint = own(text).value;
        assert_eq!(endpoint.endpoint(51820).to_string(), at_51820, "{text}");
        assert_eq!(endpoint.to_string(), text);
        assert_eq!(endpoint.port().is_some(), text == at_51820);
    }
    // Without brackets the last of its groups is no port.
    assert_eq!(own("2001:db8::5:1").value.to_string(), "[2001:db8::5:1]");
    assert!(interface("").endpoint.is_none());
    for (wrong, why) in [
        ("gw:", "the port is missing"),
        ("gw:0", "from 1 to 65535"),
        ("gw:+1", "from 1 to 65535"),
        ("gw:65536", "from 1 to 65535"),
        (":51820", "the host is missing"),
        ("[2001:db8::1", "`]` is missing"),
        ("[gw]", "not an IPv6 address"),
        ("[2001:db8::1]1", "the port is missing"),
        ("198.51.100.300", "neither an address nor a host name"),
        ("a b", "a blank"),
        ("0.0.0.0", "nobody is found"),
        ("[ff02::1]:7", "nobody is found"),
        ("https://gw", "write `gw`"),
    ] {
        let complaint = complaint(&file(&format!("#! Endpoint = {wrong}"), ""));
        assert!(complaint.contains(why), "{wrong}: {complaint}");
    }
}

#[test]
fn an_endpoint_is_written_as_it_can_be_read() {
    for text in ["198.51.100.1:7", "[2001:db8::1]:7", "gw.example.org:7", "[fe80::1%eth0]:7"] {
        let endpoint: Endpoint = text.parse().unwrap();
        assert_eq!((endpoint.to_string(), endpoint.port()), (text.to_owned(), 7));
    }
    let error = "gw.example.org".parse::<Endpoint>().unwrap_err().to_string();
    assert!(error.starts_with("`gw.example.org` is not an endpoint: the port is missing; write"));
}

#[test]
fn networks_have_a_prefix_or_are_hosts() {
    assert_eq!(values(&peer("AllowedIPs =").allowed_ips), []);
    assert_eq!(
        values(&interface("Address = 10.0.0.1/8 fd00::1").addresses),
        nets(&["10.0.0.1/8", "fd00::1/128"])
    );
    for (wrong, why) in [
        ("10.0.0.0/33", "an IPv4 prefix is 0 to 32 long; for one host write 10.0.0.0/32"),
        ("fd00::/129", "an IPv6 prefix is 0 to 128 long; for one host write fd00::/128"),
        ("10.0.0.0/", "this prefix length is out of range"),
        ("10.0.0.0/+8", "this prefix length is out of range"),
        ("10.0.0/8", "neither an IPv4 nor an IPv6 address"),
        ("example.org", "neither an IPv4 nor an IPv6 address"),
        ("10.0.0.1/32 10.0.0.2/32", "out of range"),
        ("10.0.0.1 10.0.0.2", "separate addresses with commas"),
        ("10.0.0.1/32,", "the list of addresses has a gap"),
        (", 10.0.0.1/32", "the list of addresses has a gap"),
    ] {
        let complaint = complaint(&file("", &format!("AllowedIPs = {wrong}")));
        assert!(complaint.contains(why), "{complaint}");
    }
}

#[test]
fn what_stands_in_the_wrong_place_is_told_where_it_belongs() {
    let complaints = complaints(
        "MTU = 1\n#! Xdp = eth0\n[Peer]\nAddress = 10.0.0.1\n[Interface]\nEndpoint = 1.2.3.4:5\n\
         Xdp = eth0\n#! Name = x\nAllowedIP = 1\nfoo = 1\n[Peers]\nwhatever = 1\n[Peer\nMTU\n",
    );
    let expected = [
        "`MTU` stands in no section | there is no section above this line | write [Interface] above it",
        "`#! Xdp` stands in no section | there is no section above this line | move the line below [Interface]",
        "a peer has no `PublicKey` | this peer | write `PublicKey = ` and the peer's public key below it",
        "`Address` does not belong here | `Address` belongs into [Interface] | move the line below the [Interface] header",
        "the interface has no `PrivateKey` | this interface | write `PrivateKey = ` and a key of `tidegate genkey` below [Interface]",
        "`Endpoint` does not belong here | `Endpoint` belongs into [Peer] | move the line below a [Peer] header",
        "unknown key `Xdp` | not a key of [Interface] | keys of Tidegate stand behind `#!`: write `#! Xdp = …`",
        "`Name` does not belong here | `Name` belongs into [Peer] | move the line below a [Peer] header",
        "unknown key `AllowedIP` | not a key of [Interface] | did you mean `AllowedIPs`, which belongs into [Peer]?",
        "unknown key `foo` | not a key of [Interface] | keys of [Interface]: PrivateKey, ListenPort, FwMark, Address, DNS, MTU, Table, PreUp, PostUp, PreDown, PostDown, SaveConfig",
        "unknown section [Peers] | not a section of wg(8) | did you mean [Peer]?",
        "`[Peer` is not a section | a section is a name in brackets, alone in its line | sections are [Interface] and [Peer]",
        "this line is neither a section nor `Key = value` | expected `Key = value` | write `MTU = ` and the value",
    ];
    assert_eq!(complaints, expected);
}

#[test]
fn common_slips_are_told_what_to_write() {
    let half = &PEER[..43];
    let hex = PublicKey::from_base64(PEER).unwrap().to_hex();
    for (wrong, help) in [
        ("PersistentKeepalive = 25s", "write the number alone: `25`"),
        ("Endpoint = https://vpn.example.org:51820/", "write `vpn.example.org:51820`"),
        ("Endpoint = vpn.example.org:51820/udp", "write the number alone: `51820`"),
        ("Endpoint = größe.example:1", "in ASCII"),
        ("Endpoint = \"198.51.100.1:1\"", "without quotation marks"),
        ("AllowedIPs = “10.9.0.2/32”", "without quotation marks"),
        ("AllowedIPs = any", "everything is `0.0.0.0/0, ::/0`"),
        ("AllowedIPs = 10.9.0.2-10.9.0.9", "a range is written as prefixes"),
        ("AllowedIPs = laptop.example.org", "write an address, not a name"),
        ("AllowedIPs = 10.9.0.2/32; 10.9.0.3/32", "separate addresses with commas"),
        ("AllowedIPs = 10.9.0.0/255.255.255.0", "as a length this is 10.9.0.0/24"),
        ("AllowedIPs = 10.9.0.0/255.0.255.0", "for one host write 10.9.0.0/32"),
        (&format!("PresharedKey = {half}"), "the `=` at its end is missing"),
        (&format!("PresharedKey = {hex}"), "this is hexadecimal"),
        ("Jc = 4", "AmneziaWG"),
    ] {
        let complaint = complaint(&file("", wrong));
        assert!(complaint.contains(help), "{wrong}: {complaint}");
    }
    for (wrong, help) in [
        ("MTU = 1420 bytes", "write the number alone: `1420`"),
        ("ListenPort = 51820/udp", "write the number alone: `51820`"),
        ("ListenPort = 51820x", "lets the kernel choose"),
        ("DNS = 1.1.1.1\0", "write the line anew"),
    ] {
        let complaint = complaint(&file(wrong, ""));
        assert!(complaint.contains(help), "{wrong}: {complaint}");
    }
    let networkd = format!("[WireGuard]\nPrivateKey = {PRIVATE}\n");
    let is_said = |complaint: &String| complaint.contains("files of systemd-networkd are not read");
    assert!(complaints(&networkd).iter().any(is_said));
}

#[test]
fn it_is_known_whether_a_private_key_is_clamped() {
    assert!(interface("").is_private_key_clamped);
    let pasted = file("", "").replace(PRIVATE, &public(7).to_string());
    assert!(!accept(&pasted).interface.is_private_key_clamped);
}

#[test]
fn a_file_without_an_interface_says_so() {
    for text in ["", "\n", "# nothing\n"] {
        assert!(complaint(text).starts_with("the file has no [Interface] |"));
    }
}

#[test]
fn what_may_stand_once_and_stands_twice_is_cited_twice() {
    let text = file("MTU = 1400\nmtu = 1500\n#! Workers = 1\n#! workers = 2", "");
    let errors = refuse(&text);
    let offsets: Vec<Vec<_>> =
        errors.problems().iter().map(|p| p.spans().map(|span| span.offset()).collect()).collect();
    let at = |what: &str| text.find(what).unwrap();
    assert_eq!(
        offsets,
        [[at("mtu = 1500"), at("MTU = 1400")], [at("workers = 2"), at("Workers = 1")]]
    );
    assert!(complaint(&file(&format!("PrivateKey = {PRIVATE}"), "")).contains("set twice"));
    let same = format!("[Peer]\nPublicKey={PEER}");
    assert!(complaint(&file("", &same)).starts_with("two peers have the same `PublicKey`"));
}

#[test]
fn the_own_key_is_no_peer() {
    let own = format!("[Peer]\nPublicKey={PUBLIC}");
    assert!(complaint(&file("", &own)).starts_with("a peer has the key of this interface"));
    let secret = format!("[Peer]\nPublicKey={PRIVATE}");
    assert!(complaint(&file("", &secret)).contains("is the private key of this interface"));
}

#[test]
fn instructions_are_told_from_comments() {
    accept(&format!(
        "#!/usr/bin/wg-quick\n#! by hand: a = b\n{}",
        file("#!!! hot\n#!\n#! = x", "")
    ));
    assert_eq!(
        complaint(&file("#! Nta = masquerade out=eth0", "")),
        "unknown instruction `#! Nta` | not an instruction to Tidegate | did you mean `#! Nat`?"
    );
    for (wrong, why) in [
        ("#! Workers", "`#! Workers` has no value | expected `#! Workers = value`"),
        ("#! Workers =", "`#! Workers` has no value"),
        ("#! Allow 10.0.0.0/8", "`#! Allow` has no value"),
        ("#! Nat out = eth0", "`#! Nat` has no value"),
        ("#! Workers = 0", "write a number from 1 to 256"),
        ("#! Xdp = mode=udp", "`Xdp` names no interface"),
        ("#! Xdp = eth0 eth0", "`eth0` is named twice"),
        ("#! Xdp = eth/0", "`eth/0` is not an interface"),
        ("#! Xdp = eth0 mode=skb", "generic XDP is never used"),
        ("#! Xdp = eth0 mode=fast", "unknown mode `fast`"),
        (
            "#! Xdp = eth0 modus=udp",
            "unknown option `modus` | not an option of `Xdp` | did you mean `mode`?",
        ),
        ("#! Xdp = eth0 mode=nativ", "did you mean `native`?"),
        ("#! Xdp = eth0 queues=0", "write a number from 1 to 512"),
        ("#! Xdp = eth0 queues=1 queues=1", "`queues` is set twice"),
        ("#! Metrics = [::1]:1\n#! Metrics = [::1]:1", "`Metrics` is set twice"),
        ("#! Xdp = eth0 mode=udp mode=udp", "`mode` is set twice"),
        ("#! Xdp = eth0\n#! Xdp = eth1", "`Xdp` is set twice"),
    ] {
        let complaint = complaint(&file(wrong, ""));
        assert!(complaint.contains(why), "{complaint}");
    }
}

#[test]
fn what_comes_later_is_found_in_the_order_of_the_file() {
    let config = accept(&file(
        "PostUp = iptables\nDNS = 1.1.1.1\nDNS = 1.0.0.1\nTable = off\nSaveConfig = true\n\
         PreDown =\n#! Nat = masquerade out=eth0\n#! Allow = ::/0 -> ::/0\n\
         #! Allow = 0.0.0.0/0 -> 10.0.0.0/8\n\
         #! Xdp = eth0 mode=zerocopy queues=4",
        "#! Limit = 200mbit\nAllowedIPs = ::/0, 10.0.0.0/8",
    ));
    let found: Vec<_> = config.unsupported().iter().map(ToString::to_string).collect();
    assert_eq!(
        found,
        ["`queues=` of `Xdp` is not supported yet", "`#! Limit` is not supported yet",]
    );
    let errors = ConfigErrors::new(config.unsupported()).unwrap();
    assert!(render(&errors).contains("wg0.conf:12:29"), "{}", render(&errors));
    assert_eq!(config.place(config.interface.hooks[0].span), "wg0.conf:3");
}

#[test]
fn one_problem_is_reported_with_place_caret_and_help() {
    let errors = refuse(&file("", "AllowedIPs = 10.0.0.2/32, 10.0.0.0/33"));
    assert_eq!(
        render(&errors),
        "  × `10.0.0.0/33` is not an address with a prefix
   ╭─[wg0.conf:6:36]
 5 │ PublicKey = SZOBANQLyekclD9nuKybeOduZ+LIN37etjNWQkub1Ww=
 6 │ AllowedIPs = 10.0.0.2/32, 10.0.0.0/33
   ·                                    ─┬
   ·                                     ╰── this prefix length is out of range
   ╰────
  help: an IPv4 prefix is 0 to 32 long; for one host write 10.0.0.0/32
"
    );
}

#[test]
fn several_problems_are_reported_together_and_show_no_key() {
    let text = file("Adress = 10.0.0.1/24", "PresharedKey = abc")
        .replace("PrivateKey = mAe", "PrivateKey = !Ae");
    let mut report = String::new();
    NarratableReportHandler::new().render_report(&mut report, &refuse(&text)).unwrap();
    assert_eq!(
        report,
        "3 errors in wg0.conf
    Diagnostic severity: error

Error: the value of `PrivateKey` is not a key
    Diagnostic severity: error

Begin snippet for wg0.conf starting at line 1, column 1

snippet line 1: [Interface]
snippet line 2: PrivateKey = ********************************************
    label at line 2, columns 14 to 57: character 1 is not base64
snippet line 3: Adress = 10.0.0.1/24
diagnostic help: `tidegate genkey` or `wg genkey` makes a private key
Error: unknown key `Adress`
    Diagnostic severity: error

Begin snippet for wg0.conf starting at line 2, column 1

snippet line 2: PrivateKey = ********************************************
snippet line 3: Adress = 10.0.0.1/24
    label at line 3, columns 1 to 6: not a key of [Interface]
snippet line 4: [Peer]
diagnostic help: did you mean `Address`?
Error: the value of `PresharedKey` is not a key
    Diagnostic severity: error

Begin snippet for wg0.conf starting at line 5, column 1

snippet line 5: PublicKey = SZOBANQLyekclD9nuKybeOduZ+LIN37etjNWQkub1Ww=
snippet line 6: PresharedKey = ***
    label at line 6, columns 16 to 18: a key is 44 characters of base64, this has 3
diagnostic help: `tidegate genpsk` or `wg genpsk` makes a preshared key
"
    );
}

#[test]
fn no_misplaced_key_is_shown() {
    for text in [
        format!("[Interface]\n{PRIVATE}\n"),
        format!("[Interface]\nPrivateKey: {PRIVATE}\n"),
        format!("[Interface]\nPrivateKey {PRIVATE}\n"),
        format!("[Interface]\nPrivatKey = {PRIVATE}\n"),
        format!("[Interface]\nListenPort = {PRIVATE}\n"),
        format!("[Interface]\n#! Xdp = {PRIVATE}\n"),
        format!("[Interface]\n#PrivateKey = {PRIVATE}\nMTU = x\n"),
        format!("[{PRIVATE}]\n"),
        format!("[Peer]\nEndpoint = {PRIVATE}\nPrivateKey = {PRIVATE}\n"),
        format!("PrivateKey = {PRIVATE}\n"),
        file("", &format!("[Peer]\nPublicKey = {PRIVATE}")),
        file("", &format!("Endpoint = {}", PRIVATE.replace('=', ":1"))),
    ] {
        render(&refuse(&text));
    }
}

/// What is written into a file and must be read from it.
#[derive(Clone, Debug)]
struct Written {
    listen_port: Option<u16>,
    fwmark: Option<u32>,
    mtu: Option<u16>,
    addresses: Vec<IpNet>,
    peers: Vec<WrittenPeer>,
}

#[derive(Clone, Debug)]
struct WrittenPeer {
    preshared_key: Option<[u8; 32]>,
    allowed_ips: Vec<IpNet>,
    endpoint: Option<Endpoint>,
    persistent_keepalive: Option<u16>,
    name: Option<String>,
}

fn any_net() -> impl Strategy<Value = IpNet> {
    let v4 = (any::<[u8; 4]>(), 0..=32_u8).prop_map(|(octets, len)| (IpAddr::from(octets), len));
    let v6 = (any::<[u8; 16]>(), 0..=128_u8).prop_map(|(octets, len)| (IpAddr::from(octets), len));
    prop_oneof![v4, v6].prop_map(|(address, len)| IpNet::new(address, len).unwrap())
}

fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    let v4 = (any::<[u8; 4]>(), 1_u16..).prop_map(|(ip, port)| SocketAddr::new(ip.into(), port));
    let v6 = (any::<[u8; 16]>(), 1_u16..).prop_map(|(ip, port)| SocketAddr::new(ip.into(), port));
    let address = prop_oneof![v4, v6].prop_map(Endpoint::Address);
    let host = ("[a-z][a-z0-9-]{0,9}(\\.[a-z]{2,4}){0,2}", 1_u16..)
        .prop_map(|(host, port)| Endpoint::Host { host, port });
    prop_oneof![address, host]
}

fn any_file() -> impl Strategy<Value = Written> {
    let peer = (
        option::of(any::<[u8; 32]>()),
        vec(any_net(), 0..5),
        option::of(any_endpoint()),
        option::of(any::<u16>()),
        option::of("[a-z](|[a-z äß-]{0,8}[a-z])"),
    );
    let peer =
        peer.prop_map(|(preshared_key, allowed_ips, endpoint, persistent_keepalive, name)| {
            WrittenPeer { preshared_key, allowed_ips, endpoint, persistent_keepalive, name }
        });
    let interface = (
        option::of(any::<u16>()),
        option::of(any::<u32>()),
        option::of(68_u16..),
        vec(any_net(), 0..4),
        vec(peer, 0..4),
    );
    interface.prop_map(|(listen_port, fwmark, mtu, addresses, mut peers)| {
        // No two peers of a file have the same name.
        let mut names = HashSet::new();
        for peer in &mut peers {
            peer.name = peer.name.take().filter(|name| names.insert(name.clone()));
        }
        Written { listen_port, fwmark, mtu, addresses, peers }
    })
}

/// Writes lines in one of the ways in which people do.
struct Writer {
    text: String,
    style: u8,
}

impl Writer {
    fn section(&mut self, name: &str) {
        writeln!(self.text, "{}", self.cased(&format!("[{name}]"))).unwrap();
    }

    fn entry(&mut self, key: &str, value: impl ToString) {
        let equals = ["=", " = ", "\t=", "=  "][usize::from(self.style / 2 % 4)];
        let end = ["", " # comment", "\r", "  "][usize::from(self.style / 8 % 4)];
        writeln!(self.text, "{}{equals}{}{end}", self.cased(key), value.to_string()).unwrap();
    }

    fn list(&mut self, key: &str, nets: &[IpNet]) {
        let comma = [",", ", ", " ,", " , "][usize::from(self.style / 32 % 4)];
        for nets in nets.chunks(2) {
            let texts: Vec<_> = nets.iter().map(ToString::to_string).collect();
            self.entry(key, texts.join(comma));
        }
    }

    fn cased(&self, text: &str) -> String {
        if self.style.is_multiple_of(2) { text.to_owned() } else { text.to_lowercase() }
    }
}

fn write(written: &Written, style: u8) -> String {
    let mut file = Writer { text: String::new(), style };
    file.section("Interface");
    file.entry("PrivateKey", PRIVATE);
    file.list("Address", &written.addresses);
    written.listen_port.inspect(|port| file.entry("ListenPort", port));
    written.mtu.inspect(|mtu| file.entry("MTU", mtu));
    written.fwmark.inspect(|mark| match style % 3 {
        0 => file.entry("FwMark", mark),
        1 => file.entry("FwMark", format!("{mark:#x}")),
        _ if *mark == 0 => file.entry("FwMark", "off"),
        _ => file.entry("FwMark", format!("{mark:#X}").replace('X', "x")),
    });
    for (peer, seed) in written.peers.iter().zip(1..) {
        file.section("Peer");
        file.entry("PublicKey", public(seed));
        if let Some(key) = peer.preshared_key {
            file.entry("PresharedKey", PresharedKey::from_bytes(key).to_base64().as_str());
        }
        file.list("AllowedIPs", &peer.allowed_ips);
        match &peer.endpoint {
            Some(Endpoint::Address(address)) => file.entry("Endpoint", address),
            Some(Endpoint::Host { host, port }) => {
                file.entry("Endpoint", format!("{host}:{port}"));
            }
            None => {}
        }
        peer.persistent_keepalive.inspect(|seconds| file.entry("PersistentKeepalive", seconds));
        if let Some(name) = &peer.name {
            file.entry("#! Name", name);
        }
    }
    file.text
}

/// Text that has much of what the parser looks for.
fn file_like() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        "(?s).{0,6}",
        "[ \\t\\r\\n=,#!\\[\\]/:.%*+-]{1,4}",
        "[0-9a-f.:/%]{1,12}",
        prop::sample::select(
            [
                "[Interface]\n",
                "[Peer]\n",
                "PrivateKey",
                "PublicKey = ",
                "PresharedKey",
                PRIVATE,
                PEER,
                "ListenPort = ",
                "FwMark=0x",
                "AllowedIPs = ",
                "Endpoint = [",
                "]:",
                "\nAddress=",
                "PersistentKeepalive=off\n",
                "#! ",
                "#! Xdp = ",
                "#! Workers=",
                "#! MssClamp = o",
                "#! CopyDscp = on\n",
                "#! Name = ",
                "\n#! Nat = snat out=eth0 ",
                "to=10.0.0.1,",
                "\n#! Forward = tcp eth0:1",
                " -> ",
                "\n#! Allow = ::/0 -> ::/0 tcp ",
                "\n#! Limit = 2",
                "mbit\n",
                "mode=",
                "PostUp = ",
                "Table=",
                "SaveConfig=",
                "MTU=",
                "DNS=",
                "\n",
                "\u{feff}",
                "ä",
                "\u{1b}[1m",
            ]
            .to_vec()
        )
        .prop_map(str::to_owned),
    ];
    vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn what_is_written_is_read(written in any_file(), style in any::<u8>()) {
        let text = write(&written, style);
        let config = accept(&text);
        let interface = &config.interface;
        prop_assert_eq!(interface.listen_port.as_deref().copied(), written.listen_port);
        prop_assert_eq!(interface.fwmark.as_deref().copied(), written.fwmark);
        prop_assert_eq!(interface.mtu.as_deref().copied(), written.mtu);
        prop_assert_eq!(values(&interface.addresses), written.addresses);
        prop_assert_eq!(config.peers.len(), written.peers.len());
        for (peer, written) in config.peers.iter().zip(&written.peers) {
            let preshared_key = peer.preshared_key.as_deref().map(|key| *key.expose());
            let truncated: Vec<_> = written.allowed_ips.iter().map(IpNet::trunc).collect();
            prop_assert_eq!(preshared_key, written.preshared_key);
            prop_assert_eq!(values(&peer.allowed_ips), truncated);
            prop_assert_eq!(peer.endpoint.as_deref(), written.endpoint.as_ref());
            prop_assert_eq!(peer.persistent_keepalive.as_deref(), written.persistent_keepalive.as_ref());
            prop_assert_eq!(peer.name.as_deref(), written.name.as_ref());
        }
    }

    #[test]
    fn no_text_panics_and_every_error_can_be_shown(text in file_like()) {
        // Nobody can tell a private key that calls itself public, and stands nowhere else, from one
        // that is: the report shows it.
        let calls_itself_public = text.lines().any(|line| {
            let name = line.split('=').next().unwrap_or_default().replace(' ', "");
            name.to_ascii_lowercase().ends_with("publickey") && line.contains(&PRIVATE[..16])
        });
        prop_assume!(!calls_itself_public);
        match parse("wg0.conf", &text) {
            Ok(config) => for problem in config.unsupported() {
                render(&problem);
            },
            Err(errors) => {
                render(&errors);
                for problem in errors.problems() {
                    prop_assert!(problem.help().is_some());
                    for span in problem.spans() {
                        prop_assert!(text.is_char_boundary(span.offset()));
                        prop_assert!(text.is_char_boundary(span.offset() + span.len()));
                    }
                }
            }
        }
    }

    #[test]
    fn redaction_moves_no_byte(text in file_like()) {
        let shown = lines::redact(&text);
        prop_assert_eq!(shown.len(), text.len());
        for (at, _) in text.char_indices() {
            prop_assert!(shown.is_char_boundary(at));
        }
    }
}

#[test]
fn xdp_may_be_told_to_go_round_the_firewall() {
    for (text, expected) in [
        ("#! Xdp = eth0 bypass-firewall", true),
        ("#! Xdp = eth0, eth1 mode=native Bypass-Firewall", true),
        ("#! Xdp = eth0", false),
    ] {
        let config = accept(&file(text, ""));
        let xdp = config.interface.xdp.as_ref().unwrap();
        assert_eq!(xdp.bypass_firewall, expected, "{text}");
        assert!(xdp.interfaces.iter().all(|nic| nic.value.starts_with("eth")), "{text}");
        assert!(config.unsupported().is_empty());
    }
}

#[test]
fn no_two_peers_have_one_name() {
    let two = |first: &str, second: &str| {
        file("", first) + &format!("[Peer]\nPublicKey = {}\n{second}\n", public(7))
    };
    let name = "#! Name = laptop";
    let errors = refuse(&two(name, name));
    let [problem] = errors.problems() else { panic!("{errors:?}") };
    assert_eq!(problem.to_string(), "two peers have the same name");
    assert_eq!(problem.spans().count(), 2, "both are shown");
    let names = |text: &str| {
        let peers = accept(text).peers;
        peers.into_iter().map(|peer| peer.name.map(|name| name.value)).collect::<Vec<_>>()
    };
    let laptop = || Some("laptop".to_owned());
    // The comment of another program makes no file wrong that was right.
    let friendly = "# friendly_name = laptop";
    assert_eq!(names(&two(friendly, friendly)), [laptop(), None]);
    assert_eq!(names(&two(friendly, name)), [None, laptop()], "ours goes before");
    assert_eq!(
        names(&two(&format!("{friendly} #1"), "#! Name = Laptop")),
        [None, Some("Laptop".to_owned())]
    );
    assert_eq!(
        names(&two(&format!("{friendly}\n#! Name = phone"), friendly)),
        [Some("phone".to_owned()), laptop()]
    );
}
