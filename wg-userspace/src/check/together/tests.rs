use super::*;
use crate::check::{Rule, Severity};
use crate::config::{Config, parse};
use crate::key::PrivateKey;

/// Ends that have keys in the texts below: `{laptop}` is the private one, `{laptop.pub}` the other.
const NAMES: [&str; 8] = ["server", "laptop", "phone", "tablet", "hub", "east", "west", "nobody"];

const SERVER: &str = "\
    [Interface]\n\
    PrivateKey = {server}\n\
    Address = 10.9.0.1/24, fd09::1/64\n\
    ListenPort = 51820\n\
    [Peer]\n\
    PublicKey = {laptop.pub}\n\
    AllowedIPs = 10.9.0.2/32, fd09::2/128\n";

const LAPTOP: &str = "\
    [Interface]\n\
    PrivateKey = {laptop}\n\
    Address = 10.9.0.2/24, fd09::2/64\n\
    [Peer]\n\
    PublicKey = {server.pub}\n\
    AllowedIPs = 10.9.0.1/32, fd09::1/128\n\
    Endpoint = gw.example.org:51820\n";

const PHONE: &str = "\
    [Interface]\n\
    PrivateKey = {phone}\n\
    Address = 10.9.0.3/24, fd09::3/64\n\
    [Peer]\n\
    PublicKey = {server.pub}\n\
    AllowedIPs = 10.9.0.1/32, fd09::1/128\n\
    Endpoint = gw.example.org:51820\n";

/// The peer of [`PHONE`] at [`SERVER`].
const PHONE_PEER: &str = "\
    [Peer]\n\
    PublicKey = {phone.pub}\n\
    AllowedIPs = 10.9.0.3/32, fd09::3/128\n";

fn key(name: &str) -> PrivateKey {
    let index = NAMES.iter().position(|known| *known == name).unwrap();
    PrivateKey::from_bytes([8 + u8::try_from(index).unwrap(); 32])
}

fn filled(text: &str) -> String {
    let mut text = text.to_owned();
    for name in NAMES {
        text = text.replace(&format!("{{{name}}}"), &key(name).to_base64());
        text = text.replace(&format!("{{{name}.pub}}"), &key(name).public_key().to_string());
    }
    text.replace("{psk}", "IiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiI=")
        .replace("{psk2}", "QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=")
}

fn read(files: &[(&str, &str)]) -> Vec<Config> {
    let read = |(name, text): &(&str, &str)| {
        let config = parse(&format!("{name}.conf"), &filled(text));
        config.unwrap_or_else(|errors| panic!("{name}: {:?}", errors.problems()))
    };
    files.iter().map(read).collect()
}

fn check(files: &[(&str, &str)], configs: &[Config]) -> Vec<Finding> {
    let subject = |((name, _), config): (&(&'static str, &str), _)| Subject { name, config };
    let files: Vec<(&'static str, &str)> =
        files.iter().map(|(name, text)| (known(name), *text)).collect();
    together(&files.iter().zip(configs).map(subject).collect::<Vec<_>>())
}

fn known(name: &str) -> &'static str {
    NAMES.into_iter().find(|known| *known == name).unwrap()
}

fn findings(files: &[(&str, &str)]) -> Vec<Finding> {
    check(files, &read(files))
}

/// Asserts that nothing is found.
#[track_caller]
fn good(files: &[(&str, &str)]) {
    assert_eq!(findings(files), []);
}

/// Asserts that one thing is found: its rule, its message, and what stands at its first place.
#[track_caller]
fn one(files: &[(&str, &str)], severity: Severity, rule: Rule, message: &str, first: (&str, &str)) {
    let configs = read(files);
    let found = check(files, &configs);
    let [finding] = &found[..] else { panic!("not one finding: {found:#?}") };
    assert_eq!((finding.severity, finding.rule), (severity, rule), "{finding:#?}");
    assert_eq!(finding.message, message);
    let place = &finding.places[0];
    let (start, len) = (place.span.offset(), place.span.len());
    let text = &filled(files[place.file].1)[start..start + len];
    assert_eq!((files[place.file].0, text), (first.0, &*filled(first.1)));
    assert!(finding.help.is_some());
    for place in &finding.places {
        assert!(place.span.offset() + place.span.len() <= filled(files[place.file].1).len());
    }
}

#[track_caller]
fn error(files: &[(&str, &str)], rule: Rule, message: &str, first: (&str, &str)) {
    one(files, Severity::Error, rule, message, first);
}

/// A text with a part of it replaced, which must be there.
#[track_caller]
fn with(text: &str, old: &str, new: &str) -> String {
    assert!(text.contains(old), "`{old}` is not in the text");
    text.replace(old, new)
}

#[test]
fn files_that_match_have_no_findings() {
    good(&[("server", SERVER), ("laptop", LAPTOP)]);
    let server = SERVER.to_owned() + PHONE_PEER;
    good(&[("server", &server), ("laptop", LAPTOP), ("phone", PHONE)]);
    good(&[("laptop", LAPTOP)]);
    good(&[]);
}

#[test]
fn a_gateway_and_who_sends_everything_through_it_match() {
    let laptop = with(LAPTOP, "10.9.0.1/32, fd09::1/128", "0.0.0.0/0, ::/0");
    good(&[("server", SERVER), ("laptop", &laptop)]);
}

#[test]
fn an_address_that_the_other_side_does_not_expect_is_dropped_there() {
    let server = with(SERVER, "10.9.0.2/32", "10.9.0.3/32");
    error(
        &[("server", &server), ("laptop", LAPTOP)],
        Rule::DroppedSource,
        "server drops what laptop sends from 10.9.0.2: its AllowedIPs for laptop are 10.9.0.3/32 and \
         fd09::2/128",
        ("server", "10.9.0.3/32"),
    );
    let laptop = with(LAPTOP, "fd09::1/128", "fd09::7/128");
    error(
        &[("server", SERVER), ("laptop", &laptop)],
        Rule::DroppedSource,
        "laptop drops what server sends from fd09::1: its AllowedIPs for server are 10.9.0.1/32 and \
         fd09::7/128",
        ("laptop", "fd09::7/128"),
    );
    let server = with(SERVER, "AllowedIPs = 10.9.0.2/32, fd09::2/128\n", "");
    error(
        &[("server", &server), ("laptop", LAPTOP)],
        Rule::DroppedSource,
        "server drops what laptop sends from 10.9.0.2 and fd09::2: it has no AllowedIPs for laptop",
        ("server", "{laptop.pub}"),
    );
}

#[test]
fn help_is_the_line_to_write() {
    let server = with(SERVER, "10.9.0.2/32", "10.9.0.3/32");
    let found = findings(&[("server", &server), ("laptop", LAPTOP)]);
    let help = found[0].help.as_deref();
    assert_eq!(help, Some("write `AllowedIPs = 10.9.0.2/32, fd09::2/128` for laptop in server"));
}

#[test]
fn an_address_that_belongs_to_another_peer_there_is_dropped() {
    let server = with(SERVER, "10.9.0.2/32, fd09::2/128", "10.9.0.0/30, fd09::2/128")
        + &with(PHONE_PEER, "10.9.0.3/32", "10.9.0.3/32, 10.9.0.2/32");
    error(
        &[("server", &server), ("laptop", LAPTOP), ("phone", PHONE)],
        Rule::DroppedSource,
        "server drops what laptop sends from 10.9.0.2: it belongs to phone there, whose 10.9.0.2/32 is \
         longer than laptop's 10.9.0.0/30",
        ("server", "10.9.0.2/32"),
    );
    let server = SERVER.to_owned() + &with(PHONE_PEER, "10.9.0.3/32", "10.9.0.3/32, 10.9.0.2/32");
    error(
        &[("server", &server), ("laptop", LAPTOP), ("phone", PHONE)],
        Rule::DroppedSource,
        "server drops what laptop sends from 10.9.0.2: 10.9.0.2/32 stands at phone as well, and the \
         last one wins",
        ("server", "10.9.0.2/32"),
    );
    let server = with(SERVER, "10.9.0.2/32", "10.9.0.9/32")
        + &with(PHONE_PEER, "10.9.0.3/32", "10.9.0.0/29");
    error(
        &[("server", &server), ("laptop", LAPTOP), ("phone", PHONE)],
        Rule::DroppedSource,
        "server drops what laptop sends from 10.9.0.2: there it belongs to phone by 10.9.0.0/29, and \
         its AllowedIPs for laptop are 10.9.0.9/32 and fd09::2/128",
        ("server", "10.9.0.9/32"),
    );
}

#[test]
fn two_peers_the_wrong_way_round_are_one_finding() {
    let server = with(SERVER, "{laptop.pub}", "{phone.pub}")
        + &with(PHONE_PEER, "{phone.pub}", "{laptop.pub}");
    error(
        &[("server", &server), ("laptop", LAPTOP), ("phone", PHONE)],
        Rule::DroppedSource,
        "server has the AllowedIPs of laptop and phone the wrong way round: it sends to each what is \
         for the other, and drops what they send",
        ("server", "10.9.0.2/32"),
    );
}

#[test]
fn an_end_that_is_wrong_towards_all_others_is_wrong_once() {
    let mesh = mesh();
    let east = with(&mesh[0].1, "Address = 10.9.0.1/24", "Address = 10.9.0.9/24");
    error(
        &[("east", &east), ("west", &mesh[1].1), ("hub", &mesh[2].1)],
        Rule::DroppedSource,
        "west and hub drop what east sends from 10.9.0.9: none of them has that in its AllowedIPs for \
         east",
        ("east", "10.9.0.9/24"),
    );
    let east = with(&mesh[0].1, "ListenPort = 51820", "ListenPort = 51821");
    error(
        &[("east", &east), ("west", &mesh[1].1), ("hub", &mesh[2].1)],
        Rule::EndpointPort,
        "west and hub look for east at port 51820, but east listens on port 51821",
        ("east", "51821"),
    );
    let east = with(&mesh[0].1, "PrivateKey = {east}", "PrivateKey = {nobody}");
    error(
        &[("east", &east), ("west", &mesh[1].1), ("hub", &mesh[2].1)],
        Rule::WrongKey,
        "west and hub have another PublicKey for east than that of east's PrivateKey: none of them \
         answers its handshakes, and it none of theirs",
        ("east", "{nobody}"),
    );
}

/// Three ends that all know each other.
fn mesh() -> Vec<(&'static str, String)> {
    mesh_of(&["east", "west", "hub"])
}

fn mesh_of(names: &[&'static str]) -> Vec<(&'static str, String)> {
    let end = |(own, &name): (usize, &&'static str)| {
        let mut text = format!(
            "[Interface]\nPrivateKey = {{{name}}}\nAddress = 10.9.0.{}/24\nListenPort = 51820\n",
            own + 1
        );
        for (index, other) in names.iter().enumerate().filter(|&(index, _)| index != own) {
            let at = index + 1;
            text += &format!(
                "[Peer]\nPublicKey = {{{other}.pub}}\nAllowedIPs = 10.9.0.{at}/32\n\
                 Endpoint = 198.51.100.{at}:51820\n"
            );
        }
        (name, text)
    };
    names.iter().enumerate().map(end).collect()
}

#[test]
fn a_mesh_that_matches_has_no_findings() {
    let mesh = mesh();
    let files: Vec<(&str, &str)> = mesh.iter().map(|(name, text)| (*name, &**text)).collect();
    good(&files);
}

#[test]
fn who_is_not_known_is_ignored() {
    error(
        &[("server", SERVER), ("laptop", LAPTOP), ("phone", PHONE)],
        Rule::OneSided,
        "server ignores phone's handshakes: it has no peer with phone's key",
        ("server", "[Interface]"),
    );
}

#[test]
fn a_key_that_leads_nowhere_is_meant_for_the_end_that_fits() {
    let message = "the PublicKey that laptop has for server does not belong to server's PrivateKey: \
                   neither of them answers the other's handshakes";
    let laptop = with(LAPTOP, "{server.pub}", "{nobody.pub}");
    let first = ("laptop", "{nobody.pub}");
    error(&[("server", SERVER), ("laptop", &laptop)], Rule::WrongKey, message, first);
    let laptop = with(&laptop, "10.9.0.1/32, fd09::1/128", "0.0.0.0/0, ::/0");
    error(&[("server", SERVER), ("laptop", &laptop)], Rule::WrongKey, message, first);
    // Not even the addresses say who it is, but nobody else is left.
    let laptop = with(LAPTOP, "{server.pub}", "{phone.pub}");
    let server = SERVER.to_owned() + PHONE_PEER;
    error(
        &[("server", &server), ("laptop", &laptop), ("phone", PHONE)],
        Rule::WrongKey,
        message,
        ("laptop", "{phone.pub}"),
    );
    let server = with(SERVER, "{laptop.pub}", "{nobody.pub}");
    error(
        &[("server", &server), ("laptop", LAPTOP)],
        Rule::WrongKey,
        "the PublicKey that server has for laptop does not belong to laptop's PrivateKey: neither of \
         them answers the other's handshakes",
        ("server", "{nobody.pub}"),
    );
}

#[test]
fn a_private_key_in_place_of_a_public_one_is_told_and_not_shown() {
    let laptop = with(LAPTOP, "{server.pub}", "{server}");
    let files = [("server", SERVER), ("laptop", &*laptop)];
    error(
        &files,
        Rule::PrivateKeyAsPublicKey,
        "the PublicKey that laptop has for server is server's PrivateKey: server is not found by it, \
         and its secret is in two files",
        ("server", "{server}"),
    );
    // A place in laptop's file would show the key.
    let found = findings(&files);
    assert!(found[0].places.iter().all(|place| place.file == 0));
    assert!(!format!("{found:?}").contains(&filled("{server}")));
}

#[test]
fn a_peer_without_a_file_is_a_note_where_others_match() {
    let server = SERVER.to_owned() + PHONE_PEER;
    one(
        &[("server", &server), ("laptop", LAPTOP)],
        Severity::Note,
        Rule::UnknownPeer,
        &format!(
            "peer {}… of server is in none of the files: whether they match is not known",
            &key("phone").public_key().to_string()[..8]
        ),
        ("server", "{phone.pub}"),
    );
    let server =
        with(&server, "[Peer]\nPublicKey = {phone", "[Peer]\n#! Name = mobile\nPublicKey = {phone");
    let found = findings(&[("server", &server), ("laptop", LAPTOP)]);
    assert!(found[0].message.starts_with("mobile of server is"));
}

#[test]
fn files_that_do_not_know_each_other_are_a_warning_only_in_one_network() {
    let other = "[Interface]\nPrivateKey = {hub}\nAddress = 10.9.0.7/24\n";
    one(
        &[("server", SERVER), ("laptop", LAPTOP), ("hub", other)],
        Severity::Warning,
        Rule::Stranger,
        "hub and the other files do not know each other",
        ("hub", "[Interface]"),
    );
    let other = with(other, "10.9", "10.8");
    one(
        &[("server", SERVER), ("laptop", LAPTOP), ("hub", &other)],
        Severity::Note,
        Rule::Stranger,
        "hub and the other files do not know each other",
        ("hub", "[Interface]"),
    );
    one(
        &[("east", "[Interface]\nPrivateKey = {east}"), ("hub", &other)],
        Severity::Note,
        Rule::Stranger,
        "neither east nor hub has the other as a peer",
        ("east", "[Interface]"),
    );
}

#[test]
fn one_private_key_in_two_files_is_one_error() {
    let phone = with(PHONE, "{phone}", "{laptop}");
    let server = SERVER.to_owned() + PHONE_PEER;
    error(
        &[("server", &server), ("laptop", LAPTOP), ("phone", &phone)],
        Rule::SamePrivateKey,
        "laptop and phone have the same PrivateKey: others cannot tell them apart, and answer whoever \
         spoke last",
        ("phone", "{laptop}"),
    );
}

#[test]
fn preshared_keys_are_the_same_or_none() {
    let server = SERVER.to_owned() + "PresharedKey = {psk}\n";
    let laptop = LAPTOP.to_owned() + "PresharedKey = {psk}\n";
    good(&[("server", &server), ("laptop", &laptop)]);
    let zero = SERVER.to_owned() + "PresharedKey = AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n";
    good(&[("server", &zero), ("laptop", LAPTOP)]);
    error(
        &[("server", &server), ("laptop", LAPTOP)],
        Rule::PresharedKeys,
        "server has a preshared key for laptop, but laptop has none for server: none of their \
         handshakes succeeds",
        ("laptop", "{server.pub}"),
    );
    error(
        &[("server", SERVER), ("laptop", &laptop)],
        Rule::PresharedKeys,
        "laptop has a preshared key for server, but server has none for laptop: none of their \
         handshakes succeeds",
        ("server", "{laptop.pub}"),
    );
    let laptop = LAPTOP.to_owned() + "PresharedKey = {psk2}\n";
    let files = [("server", &*server), ("laptop", &*laptop)];
    error(
        &files,
        Rule::PresharedKeys,
        "server and laptop have different preshared keys for each other: none of their handshakes \
         succeeds",
        ("laptop", "{psk2}"),
    );
    assert!(!format!("{:?}", findings(&files)).contains(&filled("{psk2}")));
}

#[test]
fn somebody_has_to_know_where_the_other_is() {
    let laptop = with(LAPTOP, "Endpoint = gw.example.org:51820\n", "");
    error(
        &[("server", SERVER), ("laptop", &laptop)],
        Rule::NobodyStarts,
        "neither laptop nor server has an Endpoint for the other: no handshake can begin",
        ("laptop", "{server.pub}"),
    );
}

#[test]
fn an_endpoint_has_the_port_that_is_listened_on() {
    let laptop = with(LAPTOP, ":51820", ":51821");
    error(
        &[("server", SERVER), ("laptop", &laptop)],
        Rule::EndpointPort,
        "laptop looks for server at port 51821, but server listens on port 51820",
        ("laptop", "gw.example.org:51821"),
    );
    let found = findings(&[("server", SERVER), ("laptop", &laptop)]);
    assert_eq!(
        found[0].help.as_deref(),
        Some(
            "write `Endpoint = gw.example.org:51820` in laptop, unless a router on the way turns port \
             51821 into 51820"
        )
    );
    let message = "server has no ListenPort, so its port is another at each start: the Endpoint that \
                   laptop has for server leads nowhere";
    let server = with(SERVER, "ListenPort = 51820\n", "");
    error(
        &[("server", &server), ("laptop", LAPTOP)],
        Rule::NoListenPort,
        message,
        ("server", "[Interface]"),
    );
    let server = with(SERVER, "ListenPort = 51820\n", "ListenPort = 0\n");
    error(&[("server", &server), ("laptop", LAPTOP)], Rule::NoListenPort, message, ("server", "0"));
}

#[test]
fn a_port_that_is_forwarded_is_right_too() {
    let server = with(SERVER, "[Peer]", "#! Endpoint = gw.example.org:443\n[Peer]");
    let outside = with(LAPTOP, ":51820", ":443");
    for laptop in [LAPTOP, &outside] {
        assert_eq!(findings(&[("server", &server), ("laptop", laptop)]), []);
    }
    let files = [("server", SERVER), ("laptop", &*outside)];
    assert_eq!(findings(&files)[0].rule, Rule::EndpointPort, "it is not forwarded");
    let wrong = with(LAPTOP, ":51820", ":51821");
    error(
        &[("server", &server), ("laptop", &wrong)],
        Rule::EndpointPort,
        "laptop looks for server at port 51821, but server listens on port 51820",
        ("laptop", "gw.example.org:51821"),
    );
    let help = |files: &[(&str, &str)]| findings(files)[0].help.clone().unwrap();
    let said = help(&[("server", &server), ("laptop", &wrong)]);
    assert!(said.starts_with("write `Endpoint = gw.example.org:443` in laptop, unless"), "{said}");
    // Nothing can be forwarded to a port that nobody knows.
    let random = with(&server, "ListenPort = 51820\n", "");
    let files = [("server", &*random), ("laptop", &*outside)];
    assert_eq!(findings(&files)[0].rule, Rule::NoListenPort);
    let lost = with(LAPTOP, "Endpoint = gw.example.org:51820\n", "");
    assert_eq!(
        help(&[("server", &server), ("laptop", &lost)]),
        "write `Endpoint = gw.example.org:443` for server in laptop, as `#! Endpoint` of server says"
    );
    // Without a port in it there is the ListenPort alone.
    let plain = with(SERVER, "[Peer]", "#! Endpoint = gw.example.org\n[Peer]");
    assert_eq!(findings(&[("server", &plain), ("laptop", LAPTOP)]), []);
    let moved = with(&plain, "ListenPort = 51820", "ListenPort = 51821");
    let files = [("server", &*moved), ("laptop", LAPTOP)];
    assert_eq!(findings(&files)[0].rule, Rule::EndpointPort);
    assert_eq!(
        help(&[("server", &plain), ("laptop", &lost)]),
        "write `Endpoint = gw.example.org:51820` for server in laptop, as `#! Endpoint` of server says"
    );
}

#[test]
fn an_end_is_looked_for_where_it_says_that_it_is() {
    let server = |place: &str| with(SERVER, "[Peer]", &format!("#! Endpoint = {place}\n[Peer]"));
    let laptop = |place: &str| with(LAPTOP, "gw.example.org:51820", place);
    one(
        &[("server", &server("gw.example.org")), ("laptop", &laptop("wg.example.org:51820"))],
        Severity::Warning,
        Rule::EndpointHost,
        "laptop looks for server at wg.example.org, but server says that it is found at gw.example.org",
        ("laptop", "wg.example.org:51820"),
    );
    for (said, sought, is_found) in [
        ("198.51.100.1:443", "198.51.100.2:443", true),
        ("192.168.1.1", "192.168.1.2:51820", true),
        ("2001:db8::1", "[2001:db8::2]:51820", true),
        ("gw.example.org", "GW.example.ORG:51820", false),
        // Another family, an address of the site, a name for an address: it may be the same host.
        ("2001:db8::1", "198.51.100.1:51820", false),
        ("198.51.100.1", "192.168.1.1:51820", false),
        ("198.51.100.1", "gw.example.org:51820", false),
        ("[fe80::1%eth0]", "[fe80::1%eth1]:51820", false),
    ] {
        let found = findings(&[("server", &server(said)), ("laptop", &laptop(sought))]);
        let rules: Vec<_> = found.iter().map(|finding| finding.rule).collect();
        assert_eq!(rules, [Rule::EndpointHost].repeat(is_found.into()), "{said} {sought}");
    }
}

#[test]
fn two_ends_are_not_at_one_place() {
    let mesh = mesh();
    let west = with(&mesh[1].1, "198.51.100.3:51820", "198.51.100.1:51820");
    one(
        &[("east", &mesh[0].1), ("west", &west), ("hub", &mesh[2].1)],
        Severity::Warning,
        Rule::SameEndpoint,
        "east and hub are both looked for at 198.51.100.1:51820: one of them is not found there",
        ("west", "198.51.100.1:51820"),
    );
}

#[test]
fn one_address_in_two_files_is_one_error() {
    let server = SERVER.to_owned() + PHONE_PEER;
    let phone = with(PHONE, "10.9.0.3/24", "10.9.0.2/24");
    let files = [("server", &*server), ("laptop", LAPTOP), ("phone", &*phone)];
    error(
        &files,
        Rule::SameAddress,
        "laptop and phone have the same Address 10.9.0.2: packets to it get to one of them at most",
        ("phone", "10.9.0.2/24"),
    );
    assert_eq!(
        findings(&files)[0].help.as_deref(),
        Some("write `Address = 10.9.0.3/24, fd09::3/64`, which is what server expects of phone")
    );
    // Tunnels that have nothing to do with each other may number their ends alike.
    let east = "[Interface]\nPrivateKey = {east}\nAddress = 10.9.0.1/24\nListenPort = 1\n\
                [Peer]\nPublicKey = {west.pub}\nAllowedIPs = 10.9.0.2/32\n";
    let west = "[Interface]\nPrivateKey = {west}\nAddress = 10.9.0.2/24\n\
                [Peer]\nPublicKey = {east.pub}\nAllowedIPs = 10.9.0.1/32\nEndpoint = east.example:1\n";
    good(&[("server", SERVER), ("laptop", LAPTOP), ("east", east), ("west", west)]);
}

/// The address from which the host sends is that of the destination's network, or else the first.
#[test]
fn a_second_address_counts_where_packets_go_out_from_it() {
    // The server has another network for others: laptop never sees that address.
    let server = with(SERVER, "10.9.0.1/24", "10.9.0.1/24, 10.8.0.1/24");
    good(&[("server", &server), ("laptop", LAPTOP)]);
    // What goes to 192.168.20.0/24 goes out from laptop's first address.
    let laptop = with(LAPTOP, "Address = 10.9.0.2/24", "Address = 10.8.0.2/24, 10.9.0.2/24");
    good(&[("server", SERVER), ("laptop", &laptop)]);
    let laptop = with(&laptop, "10.9.0.1/32", "10.9.0.1/32, 192.168.20.0/24");
    error(
        &[("server", SERVER), ("laptop", &laptop)],
        Rule::DroppedSource,
        "server drops what laptop sends to 192.168.20.0/24, since that goes out from 10.8.0.2: its \
         AllowedIPs for laptop are 10.9.0.2/32 and fd09::2/128",
        ("server", "10.9.0.2/32"),
    );
    let laptop = with(&laptop, "10.8.0.2/24, 10.9.0.2/24", "10.9.0.2/24, 10.8.0.2/24");
    good(&[("server", SERVER), ("laptop", &laptop)]);
}

#[test]
fn a_family_without_an_address_is_a_warning_if_the_other_side_takes_none_of_it() {
    let laptop = with(LAPTOP, ", fd09::2/64", "");
    let laptop = with(&laptop, "fd09::1/128", "::/0");
    let server = with(SERVER, ", fd09::2/128", "");
    one(
        &[("server", &server), ("laptop", &laptop)],
        Severity::Warning,
        Rule::NoAddress,
        "laptop sends ::/0 to server, but has no IPv6 Address, and server takes no IPv6 from laptop: \
         all of it is lost",
        ("laptop", "::/0"),
    );
}

#[test]
fn no_route_is_a_warning_where_the_file_makes_none() {
    let laptop =
        with(LAPTOP, "Address = 10.9.0.2/24, fd09::2/64", "Address = 10.9.0.2/32\nTable = off");
    let server = with(SERVER, ", fd09::1/64", "");
    let files = [("server", &*server), ("laptop", &*laptop)];
    one(
        &files,
        Severity::Warning,
        Rule::NoRoute,
        "laptop has no route to server at 10.9.0.1: `Table = off` makes none, and 10.9.0.1 lies in no \
         network of laptop's Address",
        ("laptop", "off"),
    );
    let hook = "Table = off\nPostUp = ip route add 10.9.0.1 dev %i";
    good(&[("server", &server), ("laptop", &with(&laptop, "Table = off", hook))]);
    good(&[("server", &server), ("laptop", &with(&laptop, "Table = off\n", ""))]);
}

#[test]
fn mtus_are_the_same_where_both_are_given() {
    let server = with(SERVER, "ListenPort", "MTU = 1420\nListenPort");
    good(&[("server", &server), ("laptop", LAPTOP)]);
    let laptop = with(LAPTOP, "[Peer]", "MTU = 1380\n[Peer]");
    one(
        &[("server", &server), ("laptop", &laptop)],
        Severity::Warning,
        Rule::MtuDiffers,
        "laptop has an MTU of 1380, server one of 1420: packets that fit through one end may not fit \
         through the other",
        ("laptop", "1380"),
    );
}

#[test]
fn a_network_behind_who_may_sleep_is_a_note() {
    let server = with(SERVER, "10.9.0.2/32", "10.9.0.2/32, 192.168.7.0/24");
    one(
        &[("server", &server), ("laptop", LAPTOP)],
        Severity::Note,
        Rule::NoKeepalive,
        "server cannot send to 192.168.7.0/24 behind laptop until laptop has sent something: only \
         laptop has an Endpoint for the other, and it has no PersistentKeepalive",
        ("laptop", "gw.example.org:51820"),
    );
    let laptop = LAPTOP.to_owned() + "PersistentKeepalive = 25\n";
    good(&[("server", &server), ("laptop", &laptop)]);
}

#[test]
fn a_network_at_two_ends_is_a_note() {
    let mesh = mesh();
    let east = with(&mesh[0].1, "10.9.0.2/32", "10.9.0.2/32, 192.168.7.0/24");
    let west = with(&mesh[1].1, "10.9.0.3/32", "10.9.0.3/32, 192.168.7.0/24");
    // East sends it to west, and west on to hub, which has it.
    good(&[("east", &east), ("west", &west), ("hub", &mesh[2].1)]);
    let mesh = mesh_of(&["east", "west", "hub", "tablet"]);
    let east = with(&mesh[0].1, "10.9.0.2/32", "10.9.0.2/32, 192.168.8.0/24");
    let hub = with(&mesh[2].1, "10.9.0.4/32", "10.9.0.4/32, 192.168.8.0/24");
    one(
        &[("east", &east), ("west", &mesh[1].1), ("hub", &hub), ("tablet", &mesh[3].1)],
        Severity::Note,
        Rule::NetworkAtTwoEnds,
        "192.168.8.0/24 is reached at two ends: east by west and hub by tablet",
        ("east", "192.168.8.0/24"),
    );
}

#[test]
fn names_of_the_other_side_go_before_names_of_files() {
    let server = with(SERVER, "[Peer]", "[Peer]\n#! Name = ann's laptop");
    let server = with(&server, "10.9.0.2/32", "10.9.0.3/32");
    let found = findings(&[("server", &server), ("laptop", LAPTOP)]);
    assert!(found[0].message.starts_with("server drops what ann's laptop sends"));
    // One name for two ends does not say which.
    let server = with(&server, "ann's laptop", "server");
    let found = findings(&[("server", &server), ("laptop", LAPTOP)]);
    assert!(found[0].message.starts_with("server drops what laptop sends"));
    // A key in place of a name is not shown.
    let server = with(&server, "#! Name = server", "# friendly_name = {psk}");
    let found = findings(&[("server", &server), ("laptop", LAPTOP)]);
    assert!(found[0].message.starts_with("server drops what laptop sends"));
}

#[test]
fn a_file_with_ten_thousand_peers_is_not_compared_peer_by_peer() {
    let mut server = SERVER.to_owned();
    for index in 0..10_000u32 {
        let mut bytes = [7; 32];
        bytes[..4].copy_from_slice(&index.to_be_bytes());
        let key = crate::key::PublicKey::from_bytes(bytes);
        let net = std::net::Ipv4Addr::from(0x0a0a_0000 + index);
        server += &format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {net}/32\n");
    }
    server += PHONE_PEER;
    let found = findings(&[("server", &server), ("laptop", LAPTOP), ("phone", PHONE)]);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].message.starts_with("10000 of 10002 peers of server are in none"));
}
