//! What a look-up's answer says.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::device::{KnownPeer, Tai64N};
use crate::key::{ParseKeyError, PresharedKey, PublicKey};

/// Why an answer describes no peer, or not the one that was asked for. Says nothing of its keys.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AnswerError {
    /// It is no JSON, or not of the right form. (What the parser would quote may be a secret.)
    #[error("line {line}, column {column}: not JSON, or a member is missing or of a wrong type")]
    Json {
        /// Counts from 1.
        line: usize,
        /// Counts from 1.
        column: usize,
    },
    /// A key is none.
    #[error("`{member}`: {error}")]
    Key {
        /// Which.
        member: &'static str,
        /// Why.
        error: ParseKeyError,
    },
    /// It is about somebody else.
    #[error("`public_key` is not the one that was asked for")]
    OtherPeer,
    /// A text is no prefix.
    #[error("`allowed_ips`: {0:?} is no prefix")]
    AllowedIp(String),
    /// A text is no address with a port.
    #[error("`endpoint`: {0:?} is no address with a port")]
    Endpoint(String),
    /// A text is no timestamp.
    #[error("`greatest_timestamp`: not 24 digits of hex")]
    Timestamp,
}

#[derive(Deserialize)]
struct Answer {
    public_key: String,
    preshared_key: Option<Zeroizing<String>>,
    allowed_ips: Vec<String>,
    endpoint: Option<String>,
    persistent_keepalive: Option<u16>,
    greatest_timestamp: Option<String>,
}

/// Reads the answer about the peer with this key.
pub(super) fn parse(asked: &PublicKey, body: &[u8]) -> Result<KnownPeer, AnswerError> {
    let answer: Answer = serde_json::from_slice(body)
        .map_err(|error| AnswerError::Json { line: error.line(), column: error.column() })?;
    let key_error = |member| move |error| AnswerError::Key { member, error };
    let public_key = PublicKey::from_base64(&answer.public_key).map_err(key_error("public_key"))?;
    if public_key != *asked {
        return Err(AnswerError::OtherPeer);
    }
    let preshared_key = match &answer.preshared_key {
        Some(text) => PresharedKey::from_base64(text).map_err(key_error("preshared_key"))?,
        None => PresharedKey::default(),
    };
    let endpoint = answer
        .endpoint
        .map(|text| text.parse::<SocketAddr>().map_err(|_| AnswerError::Endpoint(text)))
        .transpose()?;
    Ok(KnownPeer {
        public_key,
        preshared_key,
        endpoint,
        persistent_keepalive: answer.persistent_keepalive.unwrap_or(0),
        allowed_ips: answer.allowed_ips.into_iter().map(prefix).collect::<Result<_, _>>()?,
        greatest_timestamp: match answer.greatest_timestamp {
            Some(text) => from_hex(&text).ok_or(AnswerError::Timestamp)?,
            None => Tai64N::default(),
        },
    })
}

/// A prefix, or an address that is one.
fn prefix(text: String) -> Result<IpNet, AnswerError> {
    let host = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse::<IpNet>().or_else(|_| host()).map_err(|_| AnswerError::AllowedIp(text))
}

/// Digits of a timestamp.
const HEX_LEN: usize = size_of::<Tai64N>() * 2;

/// A timestamp in lower-case hex.
pub(super) fn to_hex(timestamp: Tai64N) -> String {
    timestamp.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Tai64N> {
    // `from_str_radix` takes a sign.
    if text.len() != HEX_LEN || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let number = u128::from_str_radix(text, 16).ok()?;
    number.to_be_bytes().last_chunk().copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const KEY: PublicKey = PublicKey::from_bytes([1; 32]);

    fn whole() -> Value {
        json!({
            "public_key": KEY.to_string(),
            "preshared_key": PresharedKey::from_bytes([7; 32]).to_base64().as_str(),
            "allowed_ips": ["10.9.0.2/32", "10.9.1.7/24", "10.9.0.3", "fd09::2"],
            "endpoint": "[fd00::1]:51820",
            "persistent_keepalive": 25,
            "greatest_timestamp": "400000006553F1ab0000000b",
        })
    }

    fn parse_value(value: &Value) -> Result<KnownPeer, AnswerError> {
        parse(&KEY, value.to_string().as_bytes())
    }

    #[test]
    fn a_whole_answer_is_read() {
        let known = parse_value(&whole()).unwrap();
        assert_eq!((known.public_key, known.persistent_keepalive), (KEY, 25));
        assert_eq!(known.preshared_key, PresharedKey::from_bytes([7; 32]));
        let nets = ["10.9.0.2/32", "10.9.1.7/24", "10.9.0.3/32", "fd09::2/128"];
        assert_eq!(known.allowed_ips, nets.map(|net| net.parse().unwrap()));
        assert_eq!(known.endpoint, Some("[fd00::1]:51820".parse().unwrap()));
        let timestamp = [0x40, 0, 0, 0, 0x65, 0x53, 0xf1, 0xab, 0, 0, 0, 0x0b];
        assert_eq!(known.greatest_timestamp, timestamp);
        assert_eq!(to_hex(timestamp), "400000006553f1ab0000000b");
    }

    #[test]
    fn what_is_optional_may_be_missing_or_null_and_more_is_ignored() {
        let key = KEY.to_string();
        for answer in [
            json!({"public_key": key, "allowed_ips": [], "name": "laptop"}),
            json!({"public_key": key, "allowed_ips": [], "preshared_key": null, "endpoint": null,
                   "persistent_keepalive": null, "greatest_timestamp": null}),
        ] {
            let known = parse_value(&answer).unwrap();
            assert!(known.preshared_key.is_zero() && known.endpoint.is_none());
            assert_eq!((known.persistent_keepalive, known.greatest_timestamp), (0, [0; 12]));
        }
        // As some writers of JSON have it.
        let slash = PublicKey::from_bytes([0xff; 32]);
        let text = format!("{{\"public_key\":\"{slash}\",\"allowed_ips\":[]}}").replace('/', "\\/");
        assert!(parse(&slash, text.as_bytes()).is_ok());
    }

    #[test]
    fn an_answer_about_another_peer_is_refused() {
        let mut answer = whole();
        answer["public_key"] = json!(PublicKey::from_bytes([2; 32]).to_string());
        assert_eq!(parse_value(&answer), Err(AnswerError::OtherPeer));
    }

    #[test]
    fn what_is_wrong_is_refused_and_no_secret_is_quoted() {
        for (member, value) in [
            ("public_key", json!("x")),
            ("public_key", Value::Null),
            ("preshared_key", json!("secretsecret")),
            ("preshared_key", json!(["secretsecret"])),
            ("preshared_key", json!({"secretsecret": 1})),
            ("allowed_ips", Value::Null),
            ("allowed_ips", json!("10.0.0.0/8")),
            ("allowed_ips", json!(["10.0.0.0/33"])),
            ("allowed_ips", json!(["example.com"])),
            ("endpoint", json!("10.0.0.1")),
            ("endpoint", json!("example.com:1")),
            ("persistent_keepalive", json!(65536)),
            ("persistent_keepalive", json!(-1)),
            ("persistent_keepalive", json!("25")),
            ("greatest_timestamp", json!("+00000000000000000000000")),
            ("greatest_timestamp", json!("40")),
            ("greatest_timestamp", json!(1)),
        ] {
            let mut answer = whole();
            answer[member] = value.clone();
            let error = parse_value(&answer).expect_err(&format!("{member}: {value}"));
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        let mut answer = whole();
        answer.as_object_mut().unwrap().remove("allowed_ips");
        assert!(parse_value(&answer).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_harm_nothing(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(parse(&KEY, &bytes).is_err());
        }

        #[test]
        fn timestamps_keep_their_order_as_text(one in any::<Tai64N>(), other in any::<Tai64N>()) {
            prop_assert_eq!(one.cmp(&other), to_hex(one).cmp(&to_hex(other)));
            prop_assert_eq!(from_hex(&to_hex(one)), Some(one));
        }
    }
}
