//! The config file of a peer's own end, which fits what our file says of it.

use std::fmt::Display;

use ipnet::IpNet;
use zeroize::Zeroizing;

use crate::{
    config::Endpoint,
    key::{PresharedKey, PrivateKey, PublicKey},
};

/// What a peer's file is to say. What is not known is left for people to fill in.
#[derive(Debug)]
pub struct ClientFile<'a> {
    /// The peer's key, if it was made here.
    pub private_key: Option<&'a PrivateKey>,
    /// Its public key.
    pub public_key: PublicKey,
    /// Its addresses, each in its network.
    pub addresses: &'a [IpNet],
    /// Name servers and search domains.
    pub dns: &'a [String],
    /// The tunnel's MTU, if our file has one.
    pub mtu: Option<u16>,
    /// Our interface, for people.
    pub interface: &'a str,
    /// Our public key.
    pub our_key: PublicKey,
    /// The preshared key, if there is one.
    pub preshared_key: Option<&'a PresharedKey>,
    /// What goes to us.
    pub routes: &'a [IpNet],
    /// Where we are.
    pub endpoint: Option<&'a Endpoint>,
    /// In seconds; 0: none.
    pub keepalive: u16,
}

impl ClientFile<'_> {
    /// The file, for people.
    pub fn commented(&self) -> Zeroizing<String> {
        self.text(true)
    }

    /// The file without comments, for a QR code.
    pub fn plain(&self) -> Zeroizing<String> {
        self.text(false)
    }

    fn text(&self, has_comments: bool) -> Zeroizing<String> {
        let mut text = Text { has_comments, parts: Vec::new() };
        text.plain("[Interface]");
        match self.private_key {
            Some(key) => text.secret("PrivateKey", key.to_base64()),
            None => {
                let line = "the private key that stays with the peer; its public key is";
                text.comment(format!("PrivateKey = ({line} {})", self.public_key));
            }
        }
        text.comment(format!(
            "{} has the same addresses in AllowedIPs for this key.",
            self.interface
        ));
        text.line("Address", listed(self.addresses));
        if !self.dns.is_empty() {
            text.line("DNS", listed(self.dns));
        }
        if let Some(mtu) = self.mtu {
            text.line("MTU", mtu);
        }
        text.plain("");
        text.plain("[Peer]");
        text.comment(format!("The public key of {}.", self.interface));
        text.line("PublicKey", self.our_key);
        if let Some(key) = self.preshared_key {
            text.secret("PresharedKey", key.to_base64());
        }
        text.comment("What goes through the tunnel, and may come from it.".to_owned());
        text.line("AllowedIPs", listed(self.routes));
        match self.endpoint {
            Some(endpoint) => {
                let line = "Its port is the ListenPort there, or is forwarded to it.";
                text.comment(line.to_owned());
                text.line("Endpoint", endpoint);
            }
            None => text.comment(format!("Endpoint = (where {} is)", self.interface)),
        }
        if self.keepalive != 0 {
            text.comment("Keeps a NAT before this end open.".to_owned());
            text.line("PersistentKeepalive", self.keepalive);
        }
        text.whole()
    }
}

fn listed(items: &[impl Display]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

struct Text {
    has_comments: bool,
    /// Put together in the end, for a text that grows leaves copies of keys behind.
    parts: Vec<Zeroizing<String>>,
}

impl Text {
    fn plain(&mut self, line: &str) {
        self.parts.push(Zeroizing::new(format!("{line}\n")));
    }

    fn comment(&mut self, line: String) {
        if self.has_comments {
            self.plain(&format!("# {line}"));
        }
    }

    fn line(&mut self, key: &str, value: impl Display) {
        self.plain(&format!("{key} = {value}"));
    }

    fn secret(&mut self, key: &str, value: Zeroizing<String>) {
        self.plain(&format!("{key} = "));
        // The break of the line comes behind the value.
        if let Some(part) = self.parts.last_mut() {
            part.pop();
        }
        self.parts.push(value);
        self.plain("");
    }

    fn whole(&self) -> Zeroizing<String> {
        let parts: Vec<&str> = self.parts.iter().map(|part| part.as_str()).collect();
        Zeroizing::new(parts.concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    #[test]
    fn a_file_says_what_it_was_made_of_with_comments_and_without() {
        let private_key = PrivateKey::from_bytes([0x48; 32]);
        let preshared_key = PresharedKey::from_bytes([4; 32]);
        let addresses = ["10.9.0.2/24", "fd09::2/64"].map(|net| net.parse().unwrap());
        let routes = ["10.9.0.0/24", "fd09::/64"].map(|net| net.parse().unwrap());
        let dns = ["10.9.0.1".to_owned(), "corp.example".to_owned()];
        let endpoint: Endpoint = "gw.example.org:51820".parse().unwrap();
        let file = ClientFile {
            private_key: Some(&private_key),
            public_key: private_key.public_key(),
            addresses: &addresses,
            dns: &dns,
            mtu: Some(1400),
            interface: "wg0",
            our_key: PublicKey::from_bytes([7; 32]),
            preshared_key: Some(&preshared_key),
            routes: &routes,
            endpoint: Some(&endpoint),
            keepalive: 25,
        };
        assert!(!file.plain().contains('#') && file.commented().contains("\n# "));
        for text in [file.plain(), file.commented()] {
            let config = config::parse("laptop.conf", &text).unwrap();
            let interface = &config.interface;
            assert_eq!(interface.private_key.value, private_key);
            let values: Vec<IpNet> = interface.addresses.iter().map(|net| net.value).collect();
            assert_eq!(values, addresses);
            assert_eq!(
                interface.dns.iter().map(|word| &word.value).collect::<Vec<_>>(),
                [&dns[0], &dns[1]]
            );
            assert_eq!(interface.mtu.as_deref(), Some(&1400));
            let [peer] = config.peers.as_slice() else { panic!("{config:?}") };
            assert_eq!(*peer.public_key, file.our_key);
            assert_eq!(peer.preshared_key.as_deref(), Some(&preshared_key));
            let values: Vec<IpNet> = peer.allowed_ips.iter().map(|net| net.value).collect();
            assert_eq!(values, routes);
            assert_eq!(peer.endpoint.as_deref(), Some(&endpoint));
            assert_eq!(peer.persistent_keepalive.as_deref(), Some(&25));
        }
        let little = ClientFile { private_key: None, endpoint: None, keepalive: 0, ..file };
        let text = little.commented();
        assert!(
            text.contains("\n# PrivateKey = (") && text.contains("\n# Endpoint = ("),
            "{}",
            *text
        );
    }
}
