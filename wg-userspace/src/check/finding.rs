//! One thing that is worth knowing about a file or several, and the places that show it.

use std::borrow::Cow;

use serde::Serialize;

use crate::config::Span;

/// How bad it is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing is wrong with it; it may not be what was meant.
    Note,
    /// It works, but not as most people would want it.
    Warning,
    /// Packets will be dropped, or the file cannot be used.
    Error,
}

/// Which rule found it: a word for scripts, and for tests. Its name in JSON is in kebab case.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Rule {
    /// The file cannot be read as a `wg0.conf`.
    Syntax,
    /// A line that this version cannot carry out, so that `up` refuses the file.
    Unsupported,

    /// A private key of zeros.
    PrivateKeyZero,
    /// A private key that no tool has made as one.
    PrivateKeyUnclamped,
    /// A public key with which no handshake succeeds.
    PublicKeyOfLowOrder,
    /// A preshared key of zeros, which is none.
    PresharedKeyZero,
    /// A preshared key that is another key of the file.
    PresharedKeyReused,

    /// The interface gets no address.
    AddressMissing,
    /// An address of the interface that no host can have.
    AddressUnusable,
    /// The address of a whole network, or its broadcast address.
    AddressOfNetwork,
    /// The same address twice in a file.
    AddressRepeated,
    /// A peer is given the interface's own address.
    AddressOfPeer,
    /// An MTU with which there is no IPv6.
    MtuBelowIpv6,
    /// An MTU that does not fit into the way to the other side.
    MtuTooLarge,
    /// A word of `DNS` that is neither a server nor a search domain.
    DnsWord,
    /// Search domains without a server.
    DnsWithoutServer,
    /// A name server that is not reached through the tunnel.
    DnsOutside,
    /// Others cannot find this interface.
    ListenPortMissing,
    /// `SaveConfig` and comments, which wg-quick's save would lose.
    SaveConfigComments,

    /// No peers.
    PeersMissing,
    /// A peer that is given nothing.
    AllowedIpsMissing,
    /// The same prefix at several peers.
    AllowedIpsSame,
    /// The same prefix twice at a peer.
    AllowedIpsRepeated,
    /// A prefix within one of another peer.
    AllowedIpsOverlap,
    /// A prefix with bits set behind it.
    AllowedIpsHostBits,
    /// Everything of one family goes through the tunnel, and nothing of the other.
    DefaultRouteOfOneFamily,
    /// A default route that catches the tunnel's own datagrams.
    DefaultRouteUnmarked,
    /// An endpoint to which nothing can be sent.
    EndpointUnusable,
    /// An endpoint that is only reached through the tunnel itself.
    EndpointInTunnel,
    /// Two peers at the same address and port.
    EndpointRepeated,

    /// A command with a quotation mark that is not closed.
    HookUnterminated,
    /// A `#` ends a command in the middle of a word.
    HookCut,
    /// A change of the host that no hook takes back.
    HookNotUndone,
    /// A hook takes back what none has done.
    HookUndoesNothing,
    /// A hook names another interface than its own.
    HookOtherInterface,
    /// Address translation by iptables, which `#! Nat` would replace.
    NatByIptables,
    /// Addresses that netfilter translates, and `#! Nat` as well.
    NatTwice,

    /// Other people can read or change the file.
    FileAccess,
    /// `up` cannot call the interface like the file.
    FileName,
    /// A byte order mark, which wg(8) does not read.
    FileFormat,
    /// A name of an endpoint that does not resolve here.
    NameNotFound,
    /// A port that another program has.
    PortInUse,
    /// XDP or NAT would go round a rule of the firewall, so that `up` refuses it.
    FirewallBypassed,
    /// A routing table that this host does not have.
    TableUnknown,
    /// A network of another interface of this host.
    NetworkHere,
    /// A NIC that this host does not have.
    NicMissing,
    /// This host does not forward packets.
    ForwardingOff,

    // Of files that are meant to meet.
    /// A peer's key is not that of the file that is meant.
    WrongKey,
    /// A peer's public key is the private key of a file.
    PrivateKeyAsPublicKey,
    /// One file has another as a peer, which does not have it.
    OneSided,
    /// A peer is in none of the files, while others are.
    UnknownPeer,
    /// A file neither knows another nor is known.
    Stranger,
    /// Two files have one private key.
    SamePrivateKey,
    /// The preshared keys of two ends differ, or one has none.
    PresharedKeys,
    /// Neither of two ends knows where the other is.
    NobodyStarts,
    /// Only one of two ends can start, and may sleep while the other has something to send.
    NoKeepalive,
    /// An end is looked for at another port than the one where it listens.
    EndpointPort,
    /// A peer is looked for elsewhere than where it says that it is found.
    EndpointHost,
    /// An end is looked for, but listens where nobody can know.
    NoListenPort,
    /// Two ends are looked for at the same place.
    SameEndpoint,
    /// An end drops what another sends from one of its addresses.
    DroppedSource,
    /// An end sends what it has no address for.
    NoAddress,
    /// An end has no route to another.
    NoRoute,
    /// Two files have one address.
    SameAddress,
    /// The MTUs of two ends differ.
    MtuDiffers,
    /// A network is reached by different ends.
    NetworkAtTwoEnds,
}

impl Rule {
    /// Its name in JSON.
    pub fn name(self) -> String {
        let variant = format!("{self:?}");
        let mut name = String::with_capacity(variant.len() + 4);
        for character in variant.chars() {
            if character.is_ascii_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.push(character.to_ascii_lowercase());
        }
        name
    }
}

/// Bytes of one of the files.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Place {
    /// Index of the file among those that are checked.
    pub file: usize,
    /// Where in it.
    pub span: Span,
    /// What is to be seen there.
    pub label: String,
}

/// One thing that is worth knowing. Never shows a secret key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What found it.
    pub rule: Rule,
    /// A sentence that stands alone: who drops what, and why.
    pub message: String,
    /// What shows it: the place to change first. At least one.
    pub places: Vec<Place>,
    /// What to do about it.
    pub help: Option<Cow<'static, str>>,
}

impl Finding {
    /// A finding without places yet.
    pub fn new(severity: Severity, rule: Rule, message: impl Into<String>) -> Self {
        Self { severity, rule, message: message.into(), places: Vec::new(), help: None }
    }

    /// Adds a place; the first one is the finding's own.
    #[must_use]
    pub fn at(mut self, file: usize, span: Span, label: impl Into<String>) -> Self {
        self.places.push(Place { file, span, label: label.into() });
        self
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<Cow<'static, str>>) -> Self {
        self.help = Some(help.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_has_one_name() {
        for rule in [Rule::Syntax, Rule::AllowedIpsSame, Rule::MtuBelowIpv6, Rule::FileName] {
            assert_eq!(serde_json::to_value(rule).unwrap(), rule.name());
        }
        assert_eq!(Rule::MtuBelowIpv6.name(), "mtu-below-ipv6");
    }
}
