//! The file of one end of a tunnel: what it says, and its text with comments or without.
//!
//! `init` makes the files of all ends by it, and `peer add` that of a new one.

use ipnet::IpNet;
use zeroize::Zeroizing;

use crate::{
    config::{Allow, Endpoint, Nat, OwnEndpoint},
    key::{PresharedKey, PrivateKey, PublicKey},
};

/// What the file of one end says. Nothing in it has a line break.
#[derive(Debug)]
pub struct EndConfig {
    /// Comment at the top, line by line, without `#`.
    pub about: Vec<String>,
    /// `Address`, host bits included; at least one.
    pub addresses: Vec<IpNet>,
    /// `ListenPort`; without it, any.
    pub listen_port: Option<u16>,
    /// `#! Endpoint`: where others find it.
    pub endpoint: Option<OwnEndpoint>,
    /// `PrivateKey`
    pub key: OwnKey,
    /// `DNS`: servers and search domains.
    pub dns: Vec<String>,
    /// `MTU`, in bytes; without it, found by the host.
    pub mtu: Option<u16>,
    /// Comment above what follows, line by line, without `#`.
    pub about_forwarding: Vec<String>,
    /// `#! Nat`
    pub nat: Vec<Nat>,
    /// `#! Allow`
    pub allow: Vec<Allow>,
    /// Its peers, in this order.
    pub peers: Vec<EndPeer>,
}

impl EndConfig {
    /// Where others find it, if it can be found.
    pub fn found_at(&self) -> Option<Endpoint> {
        Some(self.endpoint.as_ref()?.endpoint(self.listen_port?))
    }
}

/// The key of the end whose file it is.
#[derive(Debug)]
pub enum OwnKey {
    /// It was made here.
    Private(PrivateKey),
    /// The private key is not known here, and is left for people to fill in.
    Public(PublicKey),
}

/// What the file of one end says of another one.
#[derive(Debug)]
pub struct EndPeer {
    /// `#! Name`
    pub name: Option<String>,
    /// Comment below its name, line by line, without `#`.
    pub about: Vec<String>,
    /// `PublicKey`
    pub public_key: PublicKey,
    /// `PresharedKey`
    pub preshared_key: Option<PresharedKey>,
    /// `AllowedIPs`
    pub allowed_ips: Vec<IpNet>,
    /// `Endpoint`
    pub place: Place,
    /// `PersistentKeepalive`, in seconds.
    pub persistent_keepalive: Option<u16>,
}

/// Where another end is found.
#[derive(Debug)]
pub enum Place {
    /// Here.
    At(Endpoint),
    /// Nowhere: it speaks first.
    None,
    /// Nobody has said, and it is left for people to fill in.
    Unknown,
}

/// The text of a file. A comment at the first line of each kind says what it has to match in the
/// file of the other end.
pub fn write_config(end: &EndConfig) -> Zeroizing<String> {
    text(end, true)
}

/// The text of a file in few characters: without comments, and so without `#!` lines.
pub fn write_plain(end: &EndConfig) -> Zeroizing<String> {
    text(end, false)
}

fn text(end: &EndConfig, has_comments: bool) -> Zeroizing<String> {
    let mut text = Text { has_comments, ..Text::default() };
    if has_comments && !end.about.is_empty() {
        text.comment(&end.about);
        text.line("");
    }
    text.line("[Interface]");
    text.explain("This end inside the tunnel. There: within AllowedIPs of this end.");
    text.entry("Address", &list(&end.addresses));
    if let Some(port) = end.listen_port {
        text.explain("UDP, open to the other ends. There: the port of Endpoint.");
        text.entry("ListenPort", &port.to_string());
    }
    if let Some(endpoint) = &end.endpoint {
        text.explain(
            "Where this end is found; `tidegate peer add` tells new ends. There: the host of Endpoint.",
        );
        text.instruction("Endpoint", &endpoint.to_string());
    }
    match &end.key {
        OwnKey::Private(key) => {
            let public_key = key.public_key();
            text.explain(&format!(
                "Secret, and of this end alone. There: PublicKey is {public_key}"
            ));
            text.entry("PrivateKey", &key.to_base64());
        }
        OwnKey::Public(key) => text.explain(&format!(
            "PrivateKey = (the private key that stays with this end; its public key is {key})"
        )),
    }
    if !end.dns.is_empty() {
        text.explain("Who is asked for names while the tunnel is up.");
        text.entry("DNS", &end.dns.join(", "));
    }
    if let Some(mtu) = end.mtu {
        text.explain("Bytes of the largest packet inside the tunnel. There: the same.");
        text.entry("MTU", &mtu.to_string());
    }
    text.comment(&end.about_forwarding);
    for nat in &end.nat {
        text.instruction("Nat", &nat.to_string());
    }
    for allow in &end.allow {
        text.instruction("Allow", &allow.to_string());
    }
    for peer in &end.peers {
        text.peer(peer);
    }
    text.finish()
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Text that leaves no copy of its keys in freed memory when it grows.
#[derive(Default)]
struct Text {
    text: Zeroizing<String>,
    has_comments: bool,
    /// Explanations that the file has already.
    explained: Vec<String>,
}

impl Text {
    fn peer(&mut self, peer: &EndPeer) {
        self.line("");
        self.line("[Peer]");
        if let Some(name) = &peer.name {
            self.instruction("Name", name);
        }
        self.comment(&peer.about);
        self.explain("There: what `tidegate pubkey` makes of its PrivateKey.");
        self.entry("PublicKey", &peer.public_key.to_string());
        if let Some(key) = &peer.preshared_key {
            self.explain("Secret. There: the same.");
            self.entry("PresharedKey", &key.to_base64());
        }
        self.explain("What is sent there, and all that is taken from there as a source.");
        self.explain("There: its Address, and networks behind it.");
        self.entry("AllowedIPs", &list(&peer.allowed_ips));
        match &peer.place {
            Place::At(endpoint) => {
                self.explain("Where that end is found.");
                self.explain("There: the port is its ListenPort, or is forwarded to it.");
                self.entry("Endpoint", &endpoint.to_string());
            }
            Place::None => self.explain(
                "No Endpoint: that end speaks first, and is answered where it spoke from.",
            ),
            Place::Unknown => self.explain("Endpoint = (where that end is found, as host:port)"),
        }
        if let Some(seconds) = peer.persistent_keepalive {
            self.explain(
                "Keeps the way through a NAT open, so that the other end can speak first.",
            );
            self.entry("PersistentKeepalive", &seconds.to_string());
        }
    }

    /// A comment, unless the file has it already.
    fn explain(&mut self, comment: &str) {
        if !self.explained.iter().any(|known| known == comment) {
            self.explained.push(comment.to_owned());
            self.comment(&[comment]);
        }
    }

    fn comment(&mut self, lines: &[impl AsRef<str>]) {
        if self.has_comments {
            for line in lines {
                self.push("# ");
                self.line(line.as_ref());
            }
        }
    }

    /// To other programs it is a comment.
    fn instruction(&mut self, key: &str, value: &str) {
        if self.has_comments {
            self.push("#! ");
            self.entry(key, value);
        }
    }

    fn entry(&mut self, key: &str, value: &str) {
        self.push(key);
        self.push(" = ");
        self.line(value);
    }

    fn line(&mut self, line: &str) {
        assert!(!line.contains(['\n', '\r']), "a line of a file");
        self.push(line);
        self.push("\n");
    }

    fn push(&mut self, part: &str) {
        /// Enough for a file with one peer.
        const CAPACITY_MIN: usize = 2048;
        let len = self.text.len() + part.len();
        if len > self.text.capacity() {
            // The old one is wiped, which it would not be if it grew by itself.
            let capacity = len.max(2 * self.text.capacity()).max(CAPACITY_MIN);
            let mut larger = Zeroizing::new(String::with_capacity(capacity));
            larger.push_str(&self.text);
            self.text = larger;
        }
        self.text.push_str(part);
    }

    fn finish(self) -> Zeroizing<String> {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;
    use crate::config::{self, NatSource, Spanned, Traffic};

    fn peer(rng: &mut StdRng, name: &str, place: Place) -> EndPeer {
        EndPeer {
            name: Some(name.to_owned()),
            about: vec!["About it.".to_owned()],
            public_key: PrivateKey::generate(rng).public_key(),
            preshared_key: Some(PresharedKey::generate(rng)),
            allowed_ips: vec!["10.9.0.1/32".parse().unwrap(), "fd09::1/128".parse().unwrap()],
            persistent_keepalive: matches!(place, Place::At(_)).then_some(25),
            place,
        }
    }

    fn end(rng: &mut StdRng, peers: Vec<EndPeer>) -> EndConfig {
        EndConfig {
            about: vec!["This end.".to_owned()],
            addresses: vec!["10.9.0.2/24".parse().unwrap(), "fd09::2/64".parse().unwrap()],
            listen_port: Some(51820),
            endpoint: Some("gw.example.org:443".parse().unwrap()),
            key: OwnKey::Private(PrivateKey::generate(rng)),
            dns: vec!["9.9.9.9".to_owned(), "example.org".to_owned()],
            mtu: None,
            about_forwarding: vec!["What is forwarded.".to_owned()],
            nat: vec![Nat {
                source: NatSource::Masquerade,
                out: Spanned::nowhere("eth0".to_owned()),
                from: Some(Spanned::nowhere("10.9.0.0/24".parse().unwrap())),
                bypass_firewall: true,
            }],
            allow: vec![Allow {
                from: Spanned::nowhere("fd09::/64".parse().unwrap()),
                to: Spanned::nowhere("::/0".parse().unwrap()),
                traffic: Traffic::All,
            }],
            peers,
        }
    }

    #[test]
    fn what_is_written_is_read_as_it_was_meant_with_comments_and_without() {
        let mut rng = StdRng::seed_from_u64(1);
        let host = |host: &str| Place::At(Endpoint::Host { host: host.to_owned(), port: 51820 });
        let places = [
            Place::None,
            Place::At(Endpoint::Address("198.51.100.1:1".parse().unwrap())),
            Place::At(Endpoint::Address("[2001:db8::1]:65535".parse().unwrap())),
            host("gw.example.org"),
            host("fe80::1%eth0"),
        ];
        let peers = (0..).zip(places);
        let peers = peers.map(|(i, at)| peer(&mut rng, &format!("p{i}"), at)).collect();
        let end = EndConfig { mtu: Some(1400), ..end(&mut rng, peers) };
        let (commented, plain) = (write_config(&end), write_plain(&end));
        assert!(!plain.contains('#') && commented.contains("\n# "), "{}", *plain);
        for (text, has_comments) in [(commented, true), (plain, false)] {
            let read = config::parse("wg0.conf", &text).unwrap();
            let interface = &read.interface;
            let OwnKey::Private(key) = &end.key else { unreachable!() };
            assert_eq!(interface.private_key.value, *key);
            assert_eq!(interface.listen_port.as_deref(), end.listen_port.as_ref());
            let endpoint = end.endpoint.as_ref().filter(|_| has_comments);
            assert_eq!(interface.endpoint.as_deref(), endpoint);
            assert!(interface.addresses.iter().map(|net| &net.value).eq(&end.addresses));
            assert!(interface.dns.iter().map(|word| &word.value).eq(&end.dns));
            assert_eq!(interface.mtu.as_deref(), end.mtu.as_ref());
            let shown = |lines: Vec<String>| if has_comments { lines } else { Vec::new() };
            let nat: Vec<_> = interface.nat.iter().map(|nat| nat.to_string()).collect();
            assert_eq!(nat, shown(end.nat.iter().map(ToString::to_string).collect()));
            let allow: Vec<_> = interface.allow.iter().map(|allow| allow.to_string()).collect();
            assert_eq!(allow, shown(end.allow.iter().map(ToString::to_string).collect()));
            assert_eq!(read.peers.len(), end.peers.len());
            for (read, written) in read.peers.iter().zip(&end.peers) {
                let name = written.name.as_ref().filter(|_| has_comments);
                assert_eq!(read.name.as_deref(), name);
                assert_eq!(read.public_key.value, written.public_key);
                assert_eq!(read.preshared_key.as_deref(), written.preshared_key.as_ref());
                assert!(read.allowed_ips.iter().map(|ip| &ip.value).eq(&written.allowed_ips));
                let endpoint = match &written.place {
                    Place::At(endpoint) => Some(endpoint),
                    Place::None | Place::Unknown => None,
                };
                assert_eq!(read.endpoint.as_deref(), endpoint);
                let keepalive = read.persistent_keepalive.as_deref();
                assert_eq!(keepalive, written.persistent_keepalive.as_ref());
            }
        }
    }

    #[test]
    fn each_kind_of_line_is_explained_once() {
        let mut rng = StdRng::seed_from_u64(2);
        let at = Place::At(Endpoint::Address("198.51.100.1:51820".parse().unwrap()));
        let peers = vec![peer(&mut rng, "a", Place::None), peer(&mut rng, "b", at)];
        let text = write_config(&end(&mut rng, peers));
        for once in ["tidegate pubkey", "There: the same", "No Endpoint", "Where that end"] {
            assert_eq!(text.matches(once).count(), 1, "{once} in {}", *text);
        }
    }

    #[test]
    fn what_is_not_known_is_left_for_people() {
        let mut rng = StdRng::seed_from_u64(3);
        let peers = vec![EndPeer { name: None, ..peer(&mut rng, "", Place::Unknown) }];
        let key = PrivateKey::generate(&mut rng).public_key();
        let end = EndConfig { key: OwnKey::Public(key), ..end(&mut rng, peers) };
        let text = write_config(&end);
        for line in ["\n# PrivateKey = (", &format!("{key})\n"), "\n# Endpoint = ("] {
            assert!(text.contains(line), "{line} in {}", *text);
        }
        for absent in ["\nPrivateKey", "\nEndpoint", "#! Name"] {
            assert!(!text.contains(absent), "{absent} in {}", *text);
        }
    }
}
