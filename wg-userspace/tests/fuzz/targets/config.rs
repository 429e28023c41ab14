//! The text of a `wg0.conf`: read, reported, checked, and carried out on a device. Nothing that is printed
//! about it shows a secret.

use std::net::SocketAddr;

use miette::{GraphicalReportHandler, GraphicalTheme, JSONReportHandler};
use wg_userspace::check::{self, Subject};
use wg_userspace::config::{self, Config, Endpoint, PeerConfig, Spanned};
use wg_userspace::device::{Device, SetRequest};
use wg_userspace::key::{PresharedKey, PrivateKey, PublicKey};
use wg_userspace::uapi::{PeerStatus, format_get};

/// One file.
pub fn run(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let mut printed = String::new();
    let parsed = config::parse("wg0.conf", text);
    match &parsed {
        Ok(config) => {
            printed += &format!("{config:?}");
            for problem in config.unsupported() {
                print(&problem, &mut printed);
                problem.spans().for_each(|span| assert_inside(text, span));
            }
            let subject = Subject { name: "wg0", config };
            let mut findings = check::alone(&subject, 0);
            findings.extend(check::together(&[subject, subject]));
            for finding in findings {
                printed += &format!("{finding:?}");
                assert!(!finding.places.is_empty(), "{finding:?}");
                finding.places.iter().for_each(|place| assert_inside(text, place.span));
            }
        }
        Err(errors) => {
            print(errors, &mut printed);
            assert!(!errors.problems().is_empty());
            for problem in errors.problems() {
                print(problem, &mut printed);
                problem.spans().for_each(|span| assert_inside(text, span));
            }
        }
    }
    for secret in secrets(text) {
        assert!(!printed.contains(secret), "`{secret}` in\n{printed}");
    }
    if let Ok(config) = &parsed {
        let shown = show(config);
        assert_instructions_are_read_again(config);
        // A file says the same in other words: blanks, letters' case, line ends.
        let again = config::parse("wg0.conf", &reworded(text)).expect("the same in other words");
        assert_eq!(show(&again), shown);
    }
}

/// What `#!` lines were understood to say can be written in their place.
fn assert_instructions_are_read_again(config: &Config) {
    let lines = |all: Vec<Spanned<String>>| -> Vec<String> {
        all.into_iter().map(|line| line.value).collect()
    };
    let of_interface = lines(config.interface.instructions());
    let private = PrivateKey::from_bytes([0x48; 32]).to_base64();
    let mut text = format!("[Interface]\nPrivateKey = {}\n", private.as_str());
    text += &of_interface.join("\n");
    let mut of_peers: Vec<Vec<String>> = Vec::new();
    for (peer, number) in config.peers.iter().zip(0_u32..) {
        let mut key = [9; 32];
        key[..4].copy_from_slice(&number.to_be_bytes());
        of_peers.push(lines(peer.instructions()));
        let lines = of_peers[of_peers.len() - 1].join("\n");
        text += &format!("\n[Peer]\nPublicKey = {}\n{lines}", PublicKey::from_bytes(key));
    }
    let again = config::parse("again.conf", &text).expect("it was understood before");
    assert_eq!(lines(again.interface.instructions()), of_interface);
    for (peer, expected) in again.peers.iter().zip(of_peers) {
        assert_eq!(lines(peer.instructions()), expected);
    }
    let workers = |config: &Config| config.interface.workers.as_deref().copied();
    assert_eq!(workers(&again), workers(config));
    let bits = |peer: &PeerConfig| peer.limit.as_deref().map(|limit| limit.bits_per_s);
    assert!(again.peers.iter().map(bits).eq(config.peers.iter().map(bits)));
}

fn assert_inside(text: &str, span: config::Span) {
    let end = span.offset() + span.len();
    assert!(text.is_char_boundary(span.offset()) && text.is_char_boundary(end), "{span:?}");
}

fn print(problem: &dyn miette::Diagnostic, out: &mut String) {
    let handler = GraphicalReportHandler::new_themed(GraphicalTheme::none());
    handler.render_report(out, problem).expect("a string takes everything");
    JSONReportHandler::new().render_report(out, problem).expect("a string takes everything");
    *out += &format!("{problem} {problem:?}");
}

/// Secret keys in the text that are whole: nobody must ever see them.
fn secrets(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().filter_map(|line| line.split('#').next()?.split_once('='));
    lines
        .filter(|(key, _)| {
            let key = key.trim();
            key.eq_ignore_ascii_case("PrivateKey") || key.eq_ignore_ascii_case("PresharedKey")
        })
        .map(|(_, value)| value.trim())
        .filter(|value| PresharedKey::from_base64(value).is_ok())
}

/// All that the file makes of a device.
fn show(config: &Config) -> String {
    let resolved = |endpoint: &Endpoint| match endpoint {
        Endpoint::Address(addr) => Some(*addr),
        Endpoint::Host { host, port } => {
            Some(SocketAddr::from(([192, 0, 2, host.len() as u8], *port)))
        }
    };
    let mut device = Device::default();
    device.apply(SetRequest::replacing(config, resolved));
    format_get(&device, device.listen_port(), &|_| PeerStatus::default()).to_string()
}

/// The same file as another hand would write it.
fn reworded(text: &str) -> String {
    let mut reworded = String::new();
    for line in text.trim_start_matches('\u{feff}').split('\n').map(str::trim) {
        let is_plain = !line.starts_with('#');
        match line.split_once('=') {
            Some((key, value)) if is_plain && !key.contains('#') => {
                reworded += &format!("\t{}={value} \r\n", key.trim().to_ascii_uppercase());
            }
            _ => reworded += &format!("{line}\n"),
        }
    }
    reworded
}

/// Files with every key, and files with mistakes of every kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let private = PrivateKey::from_bytes([0x48; 32]).to_base64();
    let [a, b] = [2, 3].map(|byte| PrivateKey::from_bytes([byte; 32]).public_key());
    let preshared = PresharedKey::from_bytes([7; 32]).to_base64();
    let (private, preshared) = (private.as_str(), preshared.as_str());
    let whole = format!(
        "\u{feff}[Interface] # ours\nPrivateKey = {private}\nListenPort = 51820\nFwMark = 0xca6c\n\
         Address = 10.9.0.1/24, fd09::1/64\nDNS = 9.9.9.9, example.org\nMTU = 1420\nTable = off\n\
         PreUp = a\nPostUp = echo \"%i\"\nPreDown = b\nPostDown = c\nSaveConfig = false\n\
         #! Xdp = eth0,eth1 mode=native queues=4\n#! Workers = 4\n#! MssClamp = off\n#! CopyDscp = on\n#! Nat = masquerade out=eth0\n\
         #! Nat = snat out=eth1 to=192.0.2.1,fd00::1 from=10.9.0.0/24\n\
         #! Forward = tcp eth0:8443 -> 10.9.0.2:443\n\
         #! Allow = 10.9.0.0/24 -> 192.168.20.0/24 tcp 22,8000-8080\n#! Metrics = [::1]:9586\n\
         [Peer]\n#! Name = laptop\nPublicKey = {a}\nPresharedKey = {preshared}\n\
         AllowedIPs = 10.9.0.2/32, fd09::2/128\nEndpoint = [fd00::1]:51820\n\
         PersistentKeepalive = 25\n#! Limit = 200mbit\n\
         [Peer]\n# friendly_name = phone\nPublicKey = {b}\nAllowedIPs = 0.0.0.0/0\n\
         Endpoint = gateway.example.org:51820\nPersistentKeepalive = off\n"
    );
    let small = format!("[interface]\nprivatekey={private}\n[PEER]\npublickey={a}\n");
    let a_text = a.to_string();
    let mistakes = [
        ("PrivateKey", "PrivatKey"),
        ("PublicKey = ", "PublicKey = x"),
        ("10.9.0.2/32", "10.9.0.2/33"),
        ("[Peer]", "[Pear"),
        ("ListenPort = 51820", "ListenPort = 65536"),
        ("MTU", "Endpoint"),
        ("8000-8080", "8080-8000"),
        ("out=eth1", "on=eth1"),
        ("-> 10.9.0.2:443", "=> 10.9.0.2"),
        ("200mbit", "200mbps"),
        ("friendly_name =", "friendly_name = laptop"),
        ("queues=4", "queues=0 mode=x"),
        ("AllowedIPs", "PublicKey"),
        (&a_text, private),
    ];
    let mut seeds: Vec<_> =
        mistakes.iter().map(|(right, wrong)| whole.replacen(right, wrong, 1)).collect();
    seeds.extend([whole, small]);
    seeds.into_iter().map(String::into_bytes).collect()
}
