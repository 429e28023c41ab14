//! Findings about one file: what it asks for that cannot work, or works otherwise than it reads.
//!
//! Each file here has the rules about one kind of lines; a rule is a function from the [`Page`] to
//! findings.

mod addresses;
mod allowed_ips;
mod endpoints;
mod hooks;
mod keys;

use super::{Finding, Rule, Severity, Subject};
use crate::config::{Config, PeerConfig, Span};

/// What is worth knowing about `subject` alone, in the order of the file; `file` is its index among
/// those that are checked.
pub fn alone(subject: &Subject<'_>, file: usize) -> Vec<Finding> {
    let page = Page { name: subject.name, config: subject.config, file };
    let rules = [
        keys::find,
        addresses::find,
        addresses::find_mtu,
        addresses::find_dns,
        addresses::find_of_interface,
        allowed_ips::find,
        endpoints::find,
        hooks::find,
    ];
    let mut found: Vec<Finding> = rules.iter().flat_map(|rule| rule(&page)).collect();
    found.sort_by_key(|finding| finding.places.first().map_or(0, |place| place.span.offset()));
    found
}

/// A file, as rules look at it.
#[derive(Clone, Copy)]
struct Page<'a> {
    /// The name of the interface, as far as the file's name tells.
    name: &'a str,
    config: &'a Config,
    file: usize,
}

impl<'a> Page<'a> {
    /// What stands at `span`, without secrets.
    fn text(&self, span: Span) -> &'a str {
        let text = self.config.source().inner();
        text.get(span.offset()..span.offset() + span.len()).unwrap_or_default()
    }

    /// What people call a peer.
    fn label(&self, peer: &PeerConfig) -> String {
        match &peer.name {
            // Not its value: somebody may have pasted a key there.
            Some(name) => self.text(name.span).to_owned(),
            None => format!("the peer {:.8}…", peer.public_key.to_string()),
        }
    }

    /// A finding with its first place.
    fn found(
        &self,
        (severity, rule): (Severity, Rule),
        message: impl Into<String>,
        span: Span,
        label: impl Into<String>,
    ) -> Finding {
        Finding::new(severity, rule, message).at(self.file, span, label)
    }

    /// The span of some bytes of what stands at `span`.
    fn part(span: Span, start: usize, len: usize) -> Span {
        Span::new((span.offset() + start).into(), len)
    }
}

/// `a`, `a and b`, `a, b and c`, `a, b and 3 more`.
fn listed(mut words: Vec<String>) -> String {
    const SHOWN_MAX: usize = 4;
    if words.len() > SHOWN_MAX {
        let rest = words.len() - (SHOWN_MAX - 1);
        words.truncate(SHOWN_MAX - 1);
        words.push(format!("{rest} more"));
    }
    match words.pop() {
        None => String::new(),
        Some(last) if words.is_empty() => last,
        Some(last) => format!("{} and {last}", words.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    pub const PRIVATE: &str = "mAeWHcze+XzBIN9EovEt3UB2KGbTSWHNbBkvWrJHsV8=";
    pub const PEERS: [&str; 3] = [
        "SZOBANQLyekclD9nuKybeOduZ+LIN37etjNWQkub1Ww=",
        "HgkKTLOi6hnyGGlo573/Hewubk3cvOCiOUog61R7VD8=",
        "Dxb2eCff3wMzKu1p6E3nSAuuVwHtZ+tfrfHK1wXNl00=",
    ];

    /// What is found in a file called `wg0.conf`.
    pub fn findings(text: &str) -> Vec<Finding> {
        let config = config::parse("wg0.conf", text).unwrap_or_else(|errors| panic!("{errors}"));
        let found = alone(&Subject { name: "wg0", config: &config }, 0);
        for finding in &found {
            let place = finding.places.first().expect("each has a place");
            assert!(place.span.offset() + place.span.len() <= text.len());
            assert!(!finding.message.contains(&PRIVATE[..12]), "{}", finding.message);
        }
        found
    }

    /// A good file but for these lines in its [Interface] and in the first of its peers.
    pub fn file(interface: &str, peer: &str) -> String {
        let interface = match interface.contains("Address") {
            true => interface.to_owned(),
            false => format!("Address = 10.9.0.1/24\n{interface}"),
        };
        let peer = match peer.contains("AllowedIPs") {
            true => peer.to_owned(),
            false => format!("AllowedIPs = 10.9.0.2/32\n{peer}"),
        };
        format!(
            "[Interface]\nPrivateKey = {PRIVATE}\nListenPort = 51820\n{interface}\n\
             [Peer]\n#! Name = laptop\nPublicKey = {}\n{peer}\n",
            PEERS[0]
        )
    }

    /// Rules that find something in [`file`].
    pub fn rules(interface: &str, peer: &str) -> Vec<Rule> {
        findings(&file(interface, peer)).iter().map(|finding| finding.rule).collect()
    }

    #[test]
    fn a_plain_good_file_has_no_findings() {
        assert_eq!(rules("", ""), []);
        assert_eq!(rules("", "Endpoint = 198.51.100.1:51820\nPersistentKeepalive = 25"), []);
    }

    #[test]
    fn findings_are_in_the_order_of_the_file() {
        let found = findings(&file(
            "Address = 10.9.0.1/24, 10.9.0.1/24\nMTU = 9000",
            "AllowedIPs = 10.9.0.1/32\nEndpoint = 0.0.0.0:1",
        ));
        let rules: Vec<_> = found.iter().map(|finding| finding.rule).collect();
        let expected =
            [Rule::AddressRepeated, Rule::MtuTooLarge, Rule::AddressOfPeer, Rule::EndpointUnusable];
        assert_eq!(rules, expected);
    }

    #[test]
    fn a_peer_whose_name_is_a_key_is_called_without_it() {
        let name = format!("# friendly_name = {PRIVATE}");
        let text = file("", "AllowedIPs =").replace("#! Name = laptop", &name);
        assert_eq!(findings(&text).len(), 1);
    }

    #[test]
    fn lists_are_short() {
        let words = |count: usize| listed((0..count).map(|number| number.to_string()).collect());
        assert_eq!(words(1), "0");
        assert_eq!(words(2), "0 and 1");
        assert_eq!(words(4), "0, 1, 2 and 3");
        assert_eq!(words(9), "0, 1, 2 and 6 more");
    }
}
