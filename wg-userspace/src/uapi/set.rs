//! What is to change on a device, in the words of the protocol.

use std::fmt::{self, Write as _};
use std::net::{SocketAddr, SocketAddrV6};
use std::str::FromStr;

use ipnet::IpNet;
use wg_common::protocol::KEY_LEN;
use zeroize::Zeroizing;

use super::Errno;
use crate::config::{NAME_LEN_MAX, name_problem};
use crate::device::{AllowedIpChange, PeerChange, SetRequest};
use crate::key::{ParseKeyError, PresharedKey, PrivateKey, PublicKey};

/// Why a request is refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("line {line} of the request: {problem}")]
pub struct UapiError {
    /// Counts from 1, after `set=1`.
    pub line: usize,
    /// What is wrong with it.
    pub problem: SetProblem,
}

/// What is wrong with a line of a request. The text holds no key.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SetProblem {
    /// The line is not `key=value`.
    #[error("not `key=value`")]
    NoPair,
    /// The line is longer than any that makes sense, or not UTF-8.
    #[error("not a line of text")]
    NoText,
    /// The request ends without an empty line.
    #[error("the request is cut off")]
    CutOff,
    /// It is longer than any may be.
    #[error("the request is too large")]
    TooLarge,
    /// It may be as long as it is, but not while there are others.
    #[error("other requests take the memory for one as large as this")]
    NoMemory,
    /// The protocol has no such key, or not here.
    #[error("unknown key{}{}", if *.in_peer { " of a peer" } else { " of a device" }, quoted(.key))]
    UnknownKey {
        /// The key.
        key: String,
        /// Whether a `public_key` came before.
        in_peer: bool,
    },
    /// The value of a key that takes a cryptographic key.
    #[error("`{key}`: {error}")]
    Key {
        /// The key.
        key: &'static str,
        /// What is wrong with the value.
        error: ParseKeyError,
    },
    /// The value of any other key.
    #[error("bad value of `{key}`{}", quoted(.value))]
    Value {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
    },
}

/// The text behind a colon if it can be shown: not if it may be a key, or steer a terminal.
fn quoted(text: &str) -> String {
    /// From this length on text may be a key, in base64.
    const KEY_LIKE: usize = 43;
    let is_plain = text.len() < KEY_LIKE && !text.chars().any(char::is_control);
    if is_plain { format!(": `{text}`") } else { String::new() }
}

impl UapiError {
    /// What wg(8) is told.
    pub fn errno(&self) -> Errno {
        match self.problem {
            SetProblem::NoPair | SetProblem::NoText | SetProblem::CutOff => Errno::EPROTO,
            SetProblem::TooLarge => Errno::E2BIG,
            SetProblem::NoMemory => Errno::ENOMEM,
            SetProblem::UnknownKey { .. } | SetProblem::Key { .. } | SetProblem::Value { .. } => {
                Errno::EINVAL
            }
        }
    }
}

/// What reads a request line by line.
pub(super) trait RequestParser {
    /// Takes the next line, which is not empty and has no line break.
    ///
    /// # Errors
    /// [`UapiError`] if it makes no sense. The whole request is void then.
    fn line(&mut self, line: &str) -> Result<(), UapiError>;

    /// Bytes that the request takes so far, with what was replaced later.
    fn memory_len(&self) -> usize;

    /// An error about the line after the last one.
    fn error(&self, problem: SetProblem) -> UapiError;
}

impl<F: Fn(&str) -> Option<u32>> RequestParser for SetParser<F> {
    fn line(&mut self, line: &str) -> Result<(), UapiError> {
        SetParser::line(self, line)
    }

    fn memory_len(&self) -> usize {
        SetParser::memory_len(self)
    }

    fn error(&self, problem: SetProblem) -> UapiError {
        SetParser::error(self, problem)
    }
}

/// Reads a request line by line; there may be as many lines as the caller has memory for.
///
/// `interface_index` gives the index of an interface by its name, for an endpoint whose IPv6 address
/// has a scope (`[fe80::1%eth0]:51820`).
pub struct SetParser<F> {
    interface_index: F,
    line_count: usize,
    memory_len: usize,
    request: SetRequest,
}

/// Reads the lines after `set=1`, up to the first empty one or the end.
///
/// # Errors
/// [`UapiError`] for the first line that makes no sense. Scopes that are names make none here.
pub fn parse_set(text: &str) -> Result<SetRequest, UapiError> {
    let mut parser = SetParser::new(|_: &str| None);
    for line in text.split('\n').take_while(|line| !line.is_empty()) {
        parser.line(line)?;
    }
    Ok(parser.finish())
}

impl<F: Fn(&str) -> Option<u32>> SetParser<F> {
    /// A request without lines.
    pub fn new(interface_index: F) -> Self {
        Self { interface_index, line_count: 0, memory_len: 0, request: SetRequest::default() }
    }

    /// Takes the next line, which is not empty and has no line break.
    ///
    /// # Errors
    /// [`UapiError`] if it makes no sense. The whole request is void then.
    pub fn line(&mut self, line: &str) -> Result<(), UapiError> {
        self.line_count += 1;
        self.pair(line).map_err(|problem| UapiError { line: self.line_count, problem })
    }

    /// Bytes that the request takes so far, with what was replaced later.
    pub const fn memory_len(&self) -> usize {
        self.memory_len
    }

    /// An error about the line after the last one.
    pub const fn error(&self, problem: SetProblem) -> UapiError {
        UapiError { line: self.line_count + 1, problem }
    }

    /// The request that the lines make.
    pub fn finish(self) -> SetRequest {
        self.request
    }

    fn pair(&mut self, line: &str) -> Result<(), SetProblem> {
        let (key, value) = line.split_once('=').ok_or(SetProblem::NoPair)?;
        let request = &mut self.request;
        if key == "public_key" {
            let parsed = PublicKey::from_hex(value);
            let public_key =
                parsed.map_err(|error| SetProblem::Key { key: "public_key", error })?;
            request.peers.push(PeerChange::new(public_key));
            self.memory_len += size_of::<PeerChange>();
            return Ok(());
        }
        let Some(peer) = request.peers.last_mut() else {
            match key {
                "private_key" => request.private_key = Some(private_key(value)?),
                "listen_port" => request.listen_port = Some(number("listen_port", value)?),
                "fwmark" => request.fwmark = Some(number("fwmark", value)?),
                // Ours alone, as below.
                "tidegate_mss_clamp" => {
                    request.mss_clamp = Some(switch("tidegate_mss_clamp", value)?);
                }
                "tidegate_copy_dscp" => {
                    request.copy_dscp = Some(switch("tidegate_copy_dscp", value)?);
                }
                "replace_peers" => request.replace_peers = flag("replace_peers", value)?,
                _ => return Err(SetProblem::UnknownKey { key: key.to_owned(), in_peer: false }),
            }
            return Ok(());
        };
        match key {
            "remove" => peer.remove = flag("remove", value)?,
            "update_only" => peer.update_only = flag("update_only", value)?,
            "preshared_key" => {
                let parsed = PresharedKey::from_hex(value);
                let error = |error| SetProblem::Key { key: "preshared_key", error };
                peer.preshared_key = Some(parsed.map_err(error)?);
            }
            "endpoint" => peer.endpoint = Some(endpoint(value, &self.interface_index)?),
            "persistent_keepalive_interval" => {
                let seconds = number("persistent_keepalive_interval", value)?;
                peer.persistent_keepalive = Some(seconds);
            }
            // Ours alone. wg(8) never sends it.
            "tidegate_name" => {
                if !value.is_empty() && name_problem(value).is_some() {
                    return Err(bad_value("tidegate_name", value));
                }
                peer.name = Some(value.to_owned());
                self.memory_len += value.len();
            }
            "replace_allowed_ips" => {
                peer.replace_allowed_ips = flag("replace_allowed_ips", value)?;
                // What was added before would not survive being replaced.
                peer.allowed_ips.clear();
            }
            "allowed_ip" => {
                let change = match value.strip_prefix('-') {
                    Some(value) => AllowedIpChange::Remove(network(value)?),
                    None => AllowedIpChange::Add(network(value)?),
                };
                peer.allowed_ips.push(change);
                self.memory_len += size_of::<AllowedIpChange>();
            }
            "protocol_version" if value == "1" => {}
            "protocol_version" => return Err(bad_value("protocol_version", value)),
            _ => return Err(SetProblem::UnknownKey { key: key.to_owned(), in_peer: true }),
        }
        Ok(())
    }
}

pub(super) fn bad_value(key: &'static str, value: &str) -> SetProblem {
    SetProblem::Value { key, value: value.to_owned() }
}

/// A private key; none if it is all zero.
fn private_key(value: &str) -> Result<Option<PrivateKey>, SetProblem> {
    // A private key is clamped when it is read, so its zero is looked for before.
    let parsed = PresharedKey::from_hex(value);
    let bytes = parsed.map_err(|error| SetProblem::Key { key: "private_key", error })?;
    Ok((!bytes.is_zero()).then(|| PrivateKey::from_bytes(*bytes.expose())))
}

/// Decimal digits and nothing else.
pub(super) fn number<T: FromStr>(key: &'static str, value: &str) -> Result<T, SetProblem> {
    let is_decimal = value.bytes().all(|byte| byte.is_ascii_digit());
    is_decimal.then(|| value.parse().ok()).flatten().ok_or_else(|| bad_value(key, value))
}

/// The only value of a flag is `true`; who does not mean it leaves the line out.
fn flag(key: &'static str, value: &str) -> Result<bool, SetProblem> {
    if value == "true" { Ok(true) } else { Err(bad_value(key, value)) }
}

/// `true` or `false`.
fn switch(key: &'static str, value: &str) -> Result<bool, SetProblem> {
    value.parse().map_err(|_| bad_value(key, value))
}

fn network(value: &str) -> Result<IpNet, SetProblem> {
    value.parse().map_err(|_| bad_value("allowed_ip", value))
}

fn endpoint(
    value: &str,
    interface_index: &impl Fn(&str) -> Option<u32>,
) -> Result<SocketAddr, SetProblem> {
    let parsed: Option<SocketAddr> = value.parse().ok().or_else(|| {
        // The standard library reads scopes that are numbers only.
        let (address, rest) = value.strip_prefix('[')?.split_once('%')?;
        let (scope, port) = rest.split_once("]:")?;
        let port: u16 = number("endpoint", port).ok()?;
        let scope_id = interface_index(scope)?;
        Some(SocketAddrV6::new(address.parse().ok()?, port, 0, scope_id).into())
    });
    parsed.filter(|addr| addr.port() != 0).ok_or_else(|| bad_value("endpoint", value))
}

/// The request as a client sends it, from `set=1` to before the empty line at its end.
///
/// It holds keys: it is wiped on drop.
pub fn format_set(request: &SetRequest) -> Zeroizing<String> {
    let len_max = len_max(request);
    let mut text = Zeroizing::new(String::with_capacity(len_max));
    write_all(&mut text, request).expect("a string takes everything");
    debug_assert!(text.len() <= len_max, "what it grew out of would not be wiped");
    text
}

/// Bytes that [`format_set`] needs at most. All of them are wiped, so that they are not much more than
/// it does need.
fn len_max(request: &SetRequest) -> usize {
    const DEVICE: usize = 256;
    const PUBLIC_KEY: usize = "public_key=\n".len() + 2 * KEY_LEN;
    const PRESHARED_KEY: usize = "preshared_key=\n".len() + 2 * KEY_LEN;
    const FLAG: usize = "replace_allowed_ips=true\n".len();
    const KEEPALIVE: usize = "persistent_keepalive_interval=65535\n".len();
    const ENDPOINT: usize = 80;
    const NAME: usize = "tidegate_name=\n".len() + NAME_LEN_MAX;
    const ALLOWED_IP: usize = 64;
    let peers = request.peers.iter().map(|peer| {
        let flags = [peer.remove, peer.update_only, peer.replace_allowed_ips];
        PUBLIC_KEY
            + flags.iter().filter(|&&is_set| is_set).count() * FLAG
            + usize::from(peer.preshared_key.is_some()) * PRESHARED_KEY
            + usize::from(peer.endpoint.is_some()) * ENDPOINT
            + usize::from(peer.persistent_keepalive.is_some()) * KEEPALIVE
            + usize::from(peer.name.is_some()) * NAME
            + peer.allowed_ips.len() * ALLOWED_IP
    });
    DEVICE + peers.sum::<usize>()
}

fn write_all(text: &mut String, request: &SetRequest) -> fmt::Result {
    writeln!(text, "set=1")?;
    match &request.private_key {
        None => {}
        Some(None) => writeln!(text, "private_key={}", PresharedKey::default().to_hex().as_str())?,
        Some(Some(key)) => writeln!(text, "private_key={}", key.to_hex().as_str())?,
    }
    if let Some(port) = request.listen_port {
        writeln!(text, "listen_port={port}")?;
    }
    if let Some(mark) = request.fwmark {
        writeln!(text, "fwmark={mark}")?;
    }
    if let Some(is_on) = request.mss_clamp {
        writeln!(text, "tidegate_mss_clamp={is_on}")?;
    }
    if let Some(is_on) = request.copy_dscp {
        writeln!(text, "tidegate_copy_dscp={is_on}")?;
    }
    if request.replace_peers {
        writeln!(text, "replace_peers=true")?;
    }
    for peer in &request.peers {
        writeln!(text, "public_key={}", peer.public_key.to_hex())?;
        if peer.remove {
            writeln!(text, "remove=true")?;
        }
        if peer.update_only {
            writeln!(text, "update_only=true")?;
        }
        if let Some(key) = &peer.preshared_key {
            writeln!(text, "preshared_key={}", key.to_hex().as_str())?;
        }
        if let Some(endpoint) = peer.endpoint {
            writeln!(text, "endpoint={endpoint}")?;
        }
        if let Some(seconds) = peer.persistent_keepalive {
            writeln!(text, "persistent_keepalive_interval={seconds}")?;
        }
        if let Some(name) = &peer.name {
            writeln!(text, "tidegate_name={name}")?;
        }
        if peer.replace_allowed_ips {
            writeln!(text, "replace_allowed_ips=true")?;
        }
        for change in &peer.allowed_ips {
            match change {
                AllowedIpChange::Add(net) => writeln!(text, "allowed_ip={net}")?,
                AllowedIpChange::Remove(net) => writeln!(text, "allowed_ip=-{net}")?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "48a1f6cb3d1c0e6a8f5b7d92c4e3a1b0f9e8d7c6b5a49382716f5e4d3c2b1a60";

    fn problem(text: &str) -> (usize, SetProblem, Errno) {
        let error = parse_set(text).expect_err(text);
        assert!(!error.to_string().contains(&KEY[..20]), "{error}");
        let errno = error.errno();
        (error.line, error.problem, errno)
    }

    #[test]
    fn all_keys_are_read() {
        let text = format!(
            "private_key={KEY}\nlisten_port=51820\nfwmark=0\nreplace_peers=true\n\
             tidegate_mss_clamp=false\ntidegate_copy_dscp=true\n\
             public_key={KEY}\nremove=true\n\
             public_key={KEY}\nupdate_only=true\nprotocol_version=1\npreshared_key={KEY}\n\
             endpoint=[fd00::1]:5\npersistent_keepalive_interval=0\nallowed_ip=10.0.0.0/8\n\
             tidegate_name=a laptop=x\n\
             replace_allowed_ips=true\nallowed_ip=fd00::/8\nallowed_ip=-10.0.0.1/32\n\nrest"
        );
        let key = PublicKey::from_hex(KEY).unwrap();
        assert_eq!(
            parse_set(&text).unwrap(),
            SetRequest {
                private_key: Some(Some(PrivateKey::from_hex(KEY).unwrap())),
                listen_port: Some(51820),
                fwmark: Some(0),
                mss_clamp: Some(false),
                copy_dscp: Some(true),
                replace_peers: true,
                peers: vec![
                    PeerChange { remove: true, ..PeerChange::new(key) },
                    PeerChange {
                        update_only: true,
                        preshared_key: Some(PresharedKey::from_hex(KEY).unwrap()),
                        endpoint: Some("[fd00::1]:5".parse().unwrap()),
                        persistent_keepalive: Some(0),
                        name: Some("a laptop=x".to_owned()),
                        replace_allowed_ips: true,
                        allowed_ips: vec![
                            AllowedIpChange::Add("fd00::/8".parse().unwrap()),
                            AllowedIpChange::Remove("10.0.0.1/32".parse().unwrap()),
                        ],
                        ..PeerChange::new(key)
                    },
                ],
            }
        );
        assert_eq!(parse_set("").unwrap(), SetRequest::default());
    }

    #[test]
    fn an_all_zero_private_key_removes_it() {
        let request = parse_set(&format!("private_key={}", "0".repeat(64))).unwrap();
        assert_eq!(request.private_key, Some(None));
    }

    #[test]
    fn a_scope_may_be_the_name_of_an_interface() {
        let mut parser = SetParser::new(|name: &str| (name == "eth0").then_some(3));
        parser.line(&format!("public_key={KEY}")).unwrap();
        parser.line("endpoint=[fe80::1%eth0]:7").unwrap();
        for wrong in ["[fe80::1%eth1]:7", "[fe80::1%eth0]", "[%eth0]:7", "[fe80::1%eth0]:0"] {
            parser.line(&format!("endpoint={wrong}")).unwrap_err();
        }
        let endpoint = parser.finish().peers[0].endpoint.unwrap();
        assert_eq!(endpoint, "[fe80::1%3]:7".parse().unwrap());
    }

    #[test]
    fn what_makes_no_sense_has_its_line_and_its_errno() {
        let peer = format!("public_key={KEY}");
        for (line, expected) in [
            ("nonsense", (2, SetProblem::NoPair, Errno::EPROTO)),
            (
                "listen_port=1",
                (
                    2,
                    SetProblem::UnknownKey { key: "listen_port".to_owned(), in_peer: true },
                    Errno::EINVAL,
                ),
            ),
            (
                "preshared_key=ab",
                (
                    2,
                    SetProblem::Key { key: "preshared_key", error: ParseKeyError::HexLength(2) },
                    Errno::EINVAL,
                ),
            ),
        ] {
            assert_eq!(problem(&format!("{peer}\n{line}")), expected);
        }
        for line in [
            "endpoint=192.0.2.1",
            "endpoint=example.org:1",
            "endpoint=192.0.2.1:0",
            "allowed_ip=10.0.0.0",
            "allowed_ip=10.0.0.0/33",
            "allowed_ip=",
            "allowed_ip=--10.0.0.0/8",
            "persistent_keepalive_interval=65536",
            "persistent_keepalive_interval=off",
            "remove=false",
            "update_only=1",
            "replace_allowed_ips=",
            "protocol_version=2",
            "tidegate_name= laptop",
            "tidegate_name=lap\ttop",
            "tidegate_name=lap#top",
            &format!("tidegate_name={}", "ä".repeat(64)),
            "public_key=",
            "=",
            &format!("endpoint={KEY}"),
            &format!("{KEY}={KEY}"),
        ] {
            let (number, _, errno) = problem(&format!("{peer}\n{line}"));
            assert_eq!((number, errno), (2, Errno::EINVAL), "{line}");
        }
        for line in ["fwmark=0x1", "fwmark=+1", "listen_port=65536", "remove=true", "private_key=1"]
        {
            assert_eq!(problem(line).2, Errno::EINVAL, "{line}");
        }
    }

    fn any_net() -> impl Strategy<Value = IpNet> {
        let v4 = (any::<[u8; 4]>(), 0..=32_u8).prop_map(|(ip, len)| IpNet::new(ip.into(), len));
        let v6 = (any::<[u8; 16]>(), 0..=128_u8).prop_map(|(ip, len)| IpNet::new(ip.into(), len));
        prop_oneof![v4, v6].prop_map(Result::unwrap)
    }

    fn any_peer() -> impl Strategy<Value = PeerChange> {
        let endpoint = (any_net(), 1_u16..).prop_map(|(net, port)| (net.addr(), port).into());
        let change = (any::<bool>(), any_net()).prop_map(|(adds, net)| {
            if adds { AllowedIpChange::Add(net) } else { AllowedIpChange::Remove(net) }
        });
        (
            any::<[u8; 32]>(),
            any::<[bool; 3]>(),
            option::of(any::<[u8; 32]>()),
            option::of(endpoint),
            option::of(any::<u16>()),
            option::of("|[a-zäß]([ -~&&[^#]]{0,8}[a-z])?"),
            vec(change, 0..4),
        )
            .prop_map(
                |(key, flags, preshared_key, endpoint, persistent_keepalive, name, allowed_ips)| {
                    let [remove, update_only, replace_allowed_ips] = flags;
                    PeerChange {
                        public_key: PublicKey::from_bytes(key),
                        remove,
                        update_only,
                        preshared_key: preshared_key.map(PresharedKey::from_bytes),
                        endpoint,
                        persistent_keepalive,
                        name,
                        replace_allowed_ips,
                        allowed_ips,
                        pulled: false,
                    }
                },
            )
    }

    fn any_request() -> impl Strategy<Value = SetRequest> {
        let private_key =
            option::of(option::of(any::<[u8; 32]>().prop_map(PrivateKey::from_bytes)));
        let rules = (option::of(any::<bool>()), option::of(any::<bool>()));
        let device =
            (private_key, option::of(any::<u16>()), option::of(any::<u32>()), rules, any::<bool>());
        (device, vec(any_peer(), 0..4)).prop_map(
            |((private_key, listen_port, fwmark, (mss_clamp, copy_dscp), replace_peers), peers)| {
                SetRequest {
                    private_key,
                    listen_port,
                    fwmark,
                    mss_clamp,
                    copy_dscp,
                    replace_peers,
                    peers,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(request in any_request()) {
            let text = format_set(&request);
            let lines = text.strip_prefix("set=1\n").unwrap();
            prop_assert_eq!(parse_set(lines), Ok(request));
        }

        #[test]
        fn no_text_panics(text in "(?s).{0,200}") {
            let _ = parse_set(&text);
        }

        #[test]
        fn no_broken_request_panics(
            request in any_request(),
            at in any::<prop::sample::Index>(),
            with in "(?s).{0,3}",
        ) {
            let mut text = format_set(&request).to_string();
            let (at, old) = *at.get(&text.char_indices().collect::<Vec<_>>());
            text.replace_range(at..at + old.len_utf8(), &with);
            if let Err(error) = parse_set(&text) {
                prop_assert!(error.line <= text.lines().count());
                let _ = error.to_string();
            }
        }
    }
}
