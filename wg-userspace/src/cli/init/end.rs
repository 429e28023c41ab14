//! The file of one end of a tunnel: what it says, and its text with comments.

use ipnet::IpNet;
use zeroize::Zeroizing;

use crate::{
    config::{Endpoint, Hook},
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
    /// `PrivateKey`
    pub private_key: PrivateKey,
    /// `DNS`: servers and search domains.
    pub dns: Vec<String>,
    /// Comment above the hooks, line by line, without `#`.
    pub about_hooks: Vec<String>,
    /// `PostUp` and the like, in this order.
    pub hooks: Vec<Hook>,
    /// Its peers, in this order.
    pub peers: Vec<EndPeer>,
}

/// What the file of one end says of another one.
#[derive(Debug)]
pub struct EndPeer {
    /// `#! Name`
    pub name: String,
    /// Comment below its name, line by line, without `#`.
    pub about: Vec<String>,
    /// `PublicKey`
    pub public_key: PublicKey,
    /// `PresharedKey`
    pub preshared_key: Option<PresharedKey>,
    /// `AllowedIPs`
    pub allowed_ips: Vec<IpNet>,
    /// `Endpoint`
    pub endpoint: Option<Endpoint>,
    /// `PersistentKeepalive`, in seconds.
    pub persistent_keepalive: Option<u16>,
}

/// The text of a file. A comment at the first line of each kind says what it has to match in the
/// file of the other end.
pub fn write_config(end: &EndConfig) -> Zeroizing<String> {
    let mut text = Text::default();
    text.comment(&end.about);
    text.line("");
    text.line("[Interface]");
    text.explain("This end inside the tunnel. There: within AllowedIPs of this end.");
    text.entry("Address", &list(&end.addresses));
    if let Some(port) = end.listen_port {
        text.explain("UDP, open to the other ends. There: the port of Endpoint.");
        text.entry("ListenPort", &port.to_string());
    }
    let public_key = end.private_key.public_key();
    text.explain(&format!("Secret, and of this end alone. There: PublicKey is {public_key}"));
    text.entry("PrivateKey", &end.private_key.to_base64());
    if !end.dns.is_empty() {
        text.explain("Who is asked for names while the tunnel is up.");
        text.entry("DNS", &end.dns.join(", "));
    }
    text.comment(&end.about_hooks);
    for hook in &end.hooks {
        text.entry(hook.event.name(), &hook.command);
    }
    for peer in &end.peers {
        text.peer(peer);
    }
    text.finish()
}

/// An endpoint as a file has it.
pub fn endpoint_text(endpoint: &Endpoint) -> String {
    match endpoint {
        Endpoint::Address(address) => address.to_string(),
        Endpoint::Host { host, port } if host.contains(':') => format!("[{host}]:{port}"),
        Endpoint::Host { host, port } => format!("{host}:{port}"),
    }
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Text that leaves no copy of its keys in freed memory when it grows.
#[derive(Default)]
struct Text {
    text: Zeroizing<String>,
    /// Explanations that the file has already.
    explained: Vec<String>,
}

impl Text {
    fn peer(&mut self, peer: &EndPeer) {
        self.line("");
        self.line("[Peer]");
        self.entry("#! Name", &peer.name);
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
        match &peer.endpoint {
            Some(endpoint) => {
                self.explain("Where that end is found. There: the port is its ListenPort.");
                self.entry("Endpoint", &endpoint_text(endpoint));
            }
            None => self.explain(
                "No Endpoint: that end speaks first, and is answered where it spoke from.",
            ),
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
        for line in lines {
            self.push("# ");
            self.line(line.as_ref());
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
    use crate::config::{self, HookEvent};

    fn peer(rng: &mut StdRng, name: &str, endpoint: Option<Endpoint>) -> EndPeer {
        EndPeer {
            name: name.to_owned(),
            about: vec!["About it.".to_owned()],
            public_key: PrivateKey::generate(rng).public_key(),
            preshared_key: Some(PresharedKey::generate(rng)),
            allowed_ips: vec!["10.9.0.1/32".parse().unwrap(), "fd09::1/128".parse().unwrap()],
            persistent_keepalive: endpoint.is_some().then_some(25),
            endpoint,
        }
    }

    #[test]
    fn what_is_written_is_read_as_it_was_meant() {
        let mut rng = StdRng::seed_from_u64(1);
        let host = |host: &str| Endpoint::Host { host: host.to_owned(), port: 51820 };
        let endpoints = [
            None,
            Some(Endpoint::Address("198.51.100.1:1".parse().unwrap())),
            Some(Endpoint::Address("[2001:db8::1]:65535".parse().unwrap())),
            Some(host("gw.example.org")),
            Some(host("fe80::1%eth0")),
        ];
        let end = EndConfig {
            about: vec!["This end.".to_owned()],
            addresses: vec!["10.9.0.2/24".parse().unwrap(), "fd09::2/64".parse().unwrap()],
            listen_port: Some(51820),
            private_key: PrivateKey::generate(&mut rng),
            dns: vec!["9.9.9.9".to_owned(), "example.org".to_owned()],
            about_hooks: vec!["What the host is told.".to_owned()],
            hooks: vec![Hook { event: HookEvent::PostUp, command: "echo %i".to_owned() }],
            peers: (0..)
                .zip(endpoints)
                .map(|(i, at)| peer(&mut rng, &format!("p{i}"), at))
                .collect(),
        };
        let text = write_config(&end);
        let read = config::parse("wg0.conf", &text).unwrap();
        let interface = &read.interface;
        assert_eq!(interface.private_key.value, end.private_key);
        assert_eq!(interface.listen_port.as_deref(), end.listen_port.as_ref());
        assert!(interface.addresses.iter().map(|address| address.value).eq(end.addresses));
        assert!(interface.dns.iter().map(|word| &word.value).eq(&end.dns));
        assert!(interface.hooks.iter().map(|hook| &hook.value).eq(&end.hooks));
        assert_eq!(read.peers.len(), end.peers.len());
        for (read, written) in read.peers.iter().zip(&end.peers) {
            assert_eq!(read.name.as_deref(), Some(&written.name));
            assert_eq!(read.public_key.value, written.public_key);
            assert_eq!(read.preshared_key.as_deref(), written.preshared_key.as_ref());
            assert!(read.allowed_ips.iter().map(|ip| &ip.value).eq(&written.allowed_ips));
            assert_eq!(read.endpoint.as_deref(), written.endpoint.as_ref());
            assert_eq!(read.persistent_keepalive.as_deref(), written.persistent_keepalive.as_ref());
        }
    }

    #[test]
    fn each_kind_of_line_is_explained_once() {
        let mut rng = StdRng::seed_from_u64(2);
        let at = Endpoint::Address("198.51.100.1:51820".parse().unwrap());
        let end = EndConfig {
            about: Vec::new(),
            addresses: vec!["10.9.0.2/24".parse().unwrap()],
            listen_port: None,
            private_key: PrivateKey::generate(&mut rng),
            dns: Vec::new(),
            about_hooks: Vec::new(),
            hooks: Vec::new(),
            peers: vec![peer(&mut rng, "a", None), peer(&mut rng, "b", Some(at))],
        };
        let text = write_config(&end);
        for once in ["tidegate pubkey", "There: the same", "No Endpoint", "Where that end"] {
            assert_eq!(text.matches(once).count(), 1, "{once} in {}", *text);
        }
    }
}
