//! What is wrong with an interface and its peers, and why packets were dropped, in words: what happens,
//! and what to look at.

use serde::{Deserialize, Serialize};

use super::text::{Paint, duration, plural};

/// Something that is wrong, as the daemon tells it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Trouble {
    /// The name of its kind. Of peers: `datagrams_unsent`, `responses_unreadable`, `initiations_unanswered`,
    /// `responses_unconfirmed`, `no_endpoint`, `source_not_allowed`, `timestamps_old`, `handshake_given_up`; of
    /// the interface: `other_key`, `unknown_keys`, `no_peer`. Later versions may have more.
    pub kind: String,
    /// How often it has happened, without a pause of 15 minutes.
    pub count: u32,
    /// Seconds since the first time.
    pub since_s: u64,
    /// Seconds since the last time.
    pub last_s: u64,
    /// The address that it is about, by kind: an endpoint with its port, an inner source or destination.
    pub address: Option<String>,
    /// The public key that it is about, by kind: of who is unknown, or of the peer that owns the source.
    pub public_key: Option<String>,
    /// All of it in a sentence.
    #[serde(skip_deserializing)]
    pub text: String,
}

/// The part of a daemon's status that is about troubles.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Troubles {
    /// Those that it tells, the most urgent first.
    pub troubles: Vec<Told>,
    /// How many more there are with peers.
    pub more_troubles: usize,
}

/// A trouble, and with whom.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Told {
    /// The peer's public key in base64; none if it is the device's.
    pub peer: Option<String>,
    #[serde(flatten)]
    pub trouble: Trouble,
}

impl Trouble {
    /// The same, with its text. `name` gives the name of the peer with a public key.
    pub fn in_words(self, name: impl Fn(&str) -> Option<String>) -> Self {
        let text = words(&self, name);
        Self { text, ..self }
    }
}

const NOT_THERE: &str =
    "its endpoint is wrong, the port is closed there, or our public key is unknown there";

fn words(trouble: &Trouble, name: impl Fn(&str) -> Option<String>) -> String {
    let plain = Paint { is_on: false };
    let time = |seconds: u64| duration(seconds.max(1), plain);
    let count = u64::from(trouble.count);
    let last = match (count, trouble.last_s) {
        (_, 0) => "just now".to_owned(),
        (1, ago) => format!("{} ago", time(ago)),
        (_, ago) => format!("the last {} ago", time(ago)),
    };
    let at =
        |word: &str| trouble.address.as_ref().map_or(String::new(), |at| format!("{word}{at}"));
    let key = trouble.public_key.as_deref();
    match trouble.kind.as_str() {
        "datagrams_unsent" => format!(
            "{}{} could not be sent, {last}: there is no route, or a firewall of this host refuses it",
            plural(count, "datagram"),
            at(" to "),
        ),
        "responses_unreadable" => format!(
            "{} cannot be opened, {last}: the preshared keys of the two ends differ, or one end has none",
            plural(count, "response"),
        ),
        "initiations_unanswered" => {
            format!("initiations unanswered for {}: {NOT_THERE}", time(trouble.since_s))
        }
        "handshake_given_up" => format!(
            "a handshake was given up {} ago, after {}: {NOT_THERE}; packets to it begin another one",
            time(trouble.last_s),
            plural(count, "unanswered initiation"),
        ),
        "responses_unconfirmed" => format!(
            "initiations answered for {}, and no answer confirmed: answers do not get there, or the preshared \
             keys of the two ends differ",
            time(trouble.since_s),
        ),
        "no_endpoint" => format!(
            "{} dropped, {last}: it has no endpoint; it must begin a handshake, or get an Endpoint here",
            plural(count, "packet"),
        ),
        "source_not_allowed" => {
            let owner = match key {
                None => "which its AllowedIPs do not have".to_owned(),
                Some(key) => {
                    let owner = name(key).unwrap_or_else(|| key.to_owned());
                    format!("which AllowedIPs give to {owner}")
                }
            };
            format!(
                "{} dropped, {last}: it sends{}, {owner}",
                plural(count, "packet"),
                at(" from ")
            )
        }
        "timestamps_old" => format!(
            "{} refused as repeated, {last}: the clock there went back, or somebody repeats old ones",
            plural(count, "initiation"),
        ),
        "other_key" => format!(
            "{} meant for another public key, {last}{}: the PublicKey that the sender has for \
             this interface is not its public key",
            plural(count, "initiation"),
            at(" from "),
        ),
        "unknown_keys" => {
            let peer = key.map_or_else(String::new, |key| format!(" with PublicKey = {key}"));
            format!(
                "{} of keys that are no peers, {last}{}: if that is to be a peer, it needs a [Peer]{peer}",
                plural(count, "initiation"),
                at(" from "),
            )
        }
        "no_peer" => format!(
            "{} dropped, {last}{}: no peer has it in its AllowedIPs",
            plural(count, "packet"),
            at(" to "),
        ),
        other => format!("{}, {count} times, {last}{}", other.replace('_', " "), at(": ")),
    }
}

/// What it says that packets were dropped for this reason, if it says something to a user.
pub fn why_dropped(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "bad_mac1" => "handshake messages for another public key, or none of this protocol",
        "bad_tag" => "altered on their way, or sealed with a key of another session",
        "unknown_index" => {
            "for keys that are gone, as after a restart here; the sender notices within seconds"
        }
        "replay" => "came twice, or very late",
        "key_expired" => "sealed with a key older than three minutes",
        "source_not_allowed" => "from inner addresses that their sender's AllowedIPs do not have",
        "no_peer" => "to addresses that no peer's AllowedIPs have",
        "no_endpoint" => "to peers that nobody knows the place of yet",
        "staged_full" => "more than wait for a handshake with a peer",
        "handshake_failed" => "waited for a handshake that was given up",
        "queue_full" | "no_buffer" | "home_stuck" => "more than the workers can take",
        "xsk_ring_full" | "xsk_no_chunk" => "came faster than a worker takes them from the NIC",
        "xsk_send" => "more than the NIC sends",
        "socket_full" => "came faster than a worker takes them from the socket",
        "too_large" => "larger than the MTU or a buffer",
        "tun_write" => "not taken by the interface: it is down, or its queue full",
        "socket_send" => "not taken by the kernel: no route, or a firewall of this host",
        "bad_handshake" => "handshake messages that cannot be opened: wrong keys, or altered",
        "old_timestamp" => {
            "initiations no newer than one before: a clock went back, or they are repeated"
        }
        "initiation_flood" => "initiations of a peer that sends too many",
        "cookie_demanded" | "rate_limited" | "outdated" => {
            "handshakes came faster than they can be done"
        }
        "unknown_peer" => "initiations of keys that are no peers",
        "interface_down" => "the interface was down",
        "quiesced" => "came during a pause",
        "routing_loop" => "the route to an endpoint leads into the tunnel itself",
        "no_private_key" => "the interface has no private key",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use wg_common::outcome::DropReason;

    use super::*;
    use crate::session::TroubleKind;

    fn trouble(kind: &str, address: Option<&str>, public_key: Option<&str>) -> Trouble {
        let [address, public_key] = [address, public_key].map(|text| text.map(str::to_owned));
        let kind = kind.to_owned();
        Trouble { kind, count: 8, since_s: 40, last_s: 3, address, public_key, text: String::new() }
    }

    fn words_of(trouble: Trouble) -> String {
        trouble.in_words(|key| (key == "KEY=").then(|| "phone".to_owned())).text
    }

    #[test]
    fn every_kind_says_what_happens_and_what_to_look_at() {
        for kind in TroubleKind::ALL {
            let words = words_of(trouble(kind.name(), Some("192.0.2.1:1"), Some("K=")));
            assert!(!words.contains('_') && words.contains(": "), "{words}");
            assert!(words.contains("seconds"), "{words}");
        }
        assert_eq!(
            words_of(trouble("initiations_unanswered", None, None)),
            "initiations unanswered for 40 seconds: its endpoint is wrong, the port is closed there, or our \
             public key is unknown there"
        );
        assert_eq!(
            words_of(trouble("source_not_allowed", Some("10.9.0.7"), None)),
            "8 packets dropped, the last 3 seconds ago: it sends from 10.9.0.7, which its AllowedIPs do not have"
        );
        assert_eq!(
            words_of(trouble("source_not_allowed", Some("10.9.0.7"), Some("KEY="))),
            "8 packets dropped, the last 3 seconds ago: it sends from 10.9.0.7, which AllowedIPs give to phone"
        );
        let one = Trouble {
            count: 1,
            last_s: 0,
            ..trouble("unknown_keys", Some("[fd00::1]:7"), Some("K="))
        };
        assert_eq!(
            words_of(one),
            "1 initiation of keys that are no peers, just now from [fd00::1]:7: if that is to be a peer, it \
             needs a [Peer] with PublicKey = K="
        );
    }

    #[test]
    fn a_kind_of_a_later_daemon_is_shown_as_it_is() {
        assert_eq!(
            words_of(trouble("clouds_in_the_sky", Some("here"), None)),
            "clouds in the sky, 8 times, the last 3 seconds ago: here"
        );
    }

    #[test]
    fn only_reasons_that_there_are_are_explained() {
        let explained =
            DropReason::ALL.iter().filter(|reason| why_dropped(reason.name()).is_some());
        let source = include_str!("troubles.rs");
        let body =
            source.split("pub fn why_dropped").nth(1).unwrap().split("_ => return").next().unwrap();
        let names: usize = body
            .lines()
            .filter_map(|line| line.split_once("=>"))
            .map(|(names, _)| names.split('|').count())
            .sum();
        assert_eq!(explained.count(), names, "a name in `why_dropped` is no reason");
    }
}
