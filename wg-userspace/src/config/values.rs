//! Values, read one by one; a [`Mistake`] says what is wrong with one.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::IpNet;
use wg_common::map::{HEARTBEATS_LEN, QUEUES_LEN};
use zeroize::Zeroizing;

use super::instructions::BUSY_POLL;
use super::instructions::read::meant;
use super::keys::Key;
use super::lines::Text;
use super::problem::Mistake;
use super::{Endpoint, Mode, OwnEndpoint, Spanned, Table, Xdp};
use crate::key::{ParseKeyError, PrivateKey};

/// Without the white space inside it, which wg(8) ignores.
fn squeezed(text: Text<'_>) -> Cow<'_, str> {
    if text.raw.contains(char::is_whitespace) {
        text.raw.split_whitespace().collect::<String>().into()
    } else {
        text.raw.into()
    }
}

/// Decimal digits and nothing else, within `range`.
pub(super) fn number<T: FromStr + PartialOrd>(text: &str, range: RangeInclusive<T>) -> Option<T> {
    let is_decimal = text.bytes().all(|byte| byte.is_ascii_digit());
    is_decimal.then(|| text.parse().ok()).flatten().filter(|number| range.contains(number))
}

/// A key of any kind; `parse` is its `from_base64`.
pub(super) fn key<T>(
    key: Key,
    value: Text<'_>,
    parse: impl Fn(&str) -> Result<T, ParseKeyError>,
) -> Result<T, Mistake> {
    let text = Zeroizing::new(squeezed(value).into_owned());
    parse(&text).map_err(|error| {
        let is_hex = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let help = match key {
            _ if is_hex => "this is hexadecimal: `xxd -r -p | base64` makes base64 of it",
            _ if text.len() == 43 && parse(&Zeroizing::new(format!("{}=", *text))).is_ok() => {
                "the `=` at its end is missing"
            }
            Key::PrivateKey => "`tidegate genkey` or `wg genkey` makes a private key",
            Key::PresharedKey => "`tidegate genpsk` or `wg genpsk` makes a preshared key",
            _ => "`tidegate pubkey` or `wg pubkey` prints the public key of a private key",
        };
        Mistake::new(format!("the value of `{}` is not a key", key.name()))
            .at(value.span(), error.to_string())
            .help(help)
    })
}

/// Whether base64 of a private key has the bits that every private key has.
pub(super) fn is_clamped(value: Text<'_>) -> bool {
    let text = Zeroizing::new(squeezed(value).into_owned());
    PrivateKey::from_base64(&text).is_ok_and(|key| key.to_base64().as_str() == text.as_str())
}

/// What to write instead of a number with more behind it, such as a unit or a protocol.
fn number_alone(text: &str) -> Option<String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).filter(|&end| end > 0)?;
    Some(format!("write the number alone: `{}`", &text[..end]))
}

pub(super) fn listen_port(value: Text<'_>) -> Result<u16, Mistake> {
    const HELP: &str = "0, or no ListenPort at all, lets the kernel choose a free port";
    let text = squeezed(value);
    number(&text, 0..=u16::MAX).ok_or_else(|| {
        let mistake = Mistake::new(format!("`{}` is not a port", value.quoted()))
            .at(value.span(), "a port is a number from 0 to 65535");
        match text.contains('/').then(|| number_alone(&text)).flatten() {
            Some(help) => mistake.help(help),
            None => mistake.help(HELP),
        }
    })
}

/// 0 is off.
pub(super) fn fwmark(value: Text<'_>) -> Result<u32, Mistake> {
    let text = squeezed(value);
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let mark = match hex {
        _ if text.eq_ignore_ascii_case("off") => Some(0),
        // `from_str_radix` takes a sign, too.
        Some(digits) if digits.starts_with('+') => None,
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => number(&text, 0..=u32::MAX),
    };
    mark.ok_or_else(|| {
        Mistake::new(format!("`{}` is not a firewall mark", value.quoted()))
            .at(value.span(), "a mark is a number of 32 bits")
            .help("write it in decimal (51820) or hexadecimal (0xca6c), or `off` for none")
    })
}

/// Seconds; 0 is off.
pub(super) fn persistent_keepalive(value: Text<'_>) -> Result<u16, Mistake> {
    let text = squeezed(value);
    let seconds = match &*text {
        off if off.eq_ignore_ascii_case("off") => Some(0),
        text => number(text, 0..=u16::MAX),
    };
    seconds.ok_or_else(|| {
        let mistake = Mistake::new(format!("`{}` is not an interval", value.quoted()))
            .at(value.span(), "an interval is a number of seconds from 0 to 65535");
        let is_seconds = ["s", "sec", "seconds"].iter().any(|unit| text.ends_with(unit));
        match is_seconds.then(|| number_alone(&text)).flatten() {
            Some(help) => mistake.help(help),
            None => mistake
                .help("25 keeps a peer behind a NAT reachable; `off` or 0 sends nothing by itself"),
        }
    })
}

pub(super) fn mtu(value: Text<'_>) -> Result<u16, Mistake> {
    /// The least MTU of IPv4 (RFC 791) and so of an interface (the kernel's `ETH_MIN_MTU`).
    const MTU_MIN: u16 = 68;
    number(value.raw, MTU_MIN..=u16::MAX).ok_or_else(|| {
        let mistake = Mistake::new(format!("`{}` is not an MTU", value.quoted()))
            .at(value.span(), "an MTU is a number of bytes from 68 to 65535");
        let is_bytes = ["b", "B", "byte", "bytes"].iter().any(|unit| value.raw.ends_with(unit));
        match is_bytes.then(|| number_alone(value.raw)).flatten() {
            Some(help) => mistake.help(help),
            None => mistake
                .help("1420 fits paths of 1500 bytes; without the line the MTU is found by itself"),
        }
    })
}

/// An address with a prefix length, or a host without one. Host bits stay.
pub(super) fn network(value: Text<'_>) -> Result<IpNet, Mistake> {
    let wrong = || Mistake::new(format!("`{}` is not an address with a prefix", value.quoted()));
    let address_text = value.before('/').trim();
    let Ok(address) = squeezed(address_text).parse::<IpAddr>() else {
        let is_everything = ["any", "all", "*", "default", "everything"].contains(&value.raw);
        let is_range = value.raw.split_once('-').is_some_and(|(first, last)| {
            first.trim().parse::<IpAddr>().is_ok() && last.trim().parse::<IpAddr>().is_ok()
        });
        let help = if is_everything {
            "everything is `0.0.0.0/0, ::/0`"
        } else if is_range {
            "a range is written as prefixes, such as 10.9.0.4/30 for 10.9.0.4 to 10.9.0.7"
        } else if value.raw.contains(|c: char| c.is_whitespace() || c == ';') {
            "separate addresses with commas"
        } else if address_text
            .raw
            .contains(|c: char| c.is_ascii_alphabetic() && !c.is_ascii_hexdigit())
        {
            "write an address, not a name, such as 10.0.0.2/32 or fd00::2/128"
        } else {
            "write addresses like 10.0.0.2/32 or fd00::2/128, separated by commas"
        };
        return Err(wrong()
            .at(address_text.span(), "this is neither an IPv4 nor an IPv6 address")
            .help(help));
    };
    let Some((_, len_text)) = value.split_once('/') else { return Ok(address.into()) };
    let (family, len_max) = match address {
        IpAddr::V4(_) => ("IPv4", 32),
        IpAddr::V6(_) => ("IPv6", 128),
    };
    let len = squeezed(len_text);
    let len = if len.is_empty() { None } else { number(&len, 0..=len_max) };
    match len {
        Some(len) => Ok(IpNet::new_assert(address, len)),
        None => {
            let mistake = wrong().at(len_text.span(), "this prefix length is out of range");
            Err(match netmask_len(&squeezed(len_text)).filter(|_| address.is_ipv4()) {
                Some(len) => mistake.help(format!("as a length this is {address}/{len}")),
                None if len_text.raw.contains(';') => {
                    mistake.help("separate addresses with commas")
                }
                None => mistake.help(format!(
                    "an {family} prefix is 0 to {len_max} long; for one host write \
                     {address}/{len_max}"
                )),
            })
        }
    }
}

/// The prefix length that a netmask such as 255.255.255.0 stands for.
fn netmask_len(text: &str) -> Option<u32> {
    let mask = u32::from(text.parse::<Ipv4Addr>().ok()?);
    (mask.leading_ones() + mask.trailing_zeros() == u32::BITS).then_some(mask.leading_ones())
}

/// A list with commas; of nothing, if it is empty.
pub(super) fn networks(value: Text<'_>) -> Vec<Result<Spanned<IpNet>, Mistake>> {
    if value.is_empty() {
        return Vec::new();
    }
    let item = |item: Text<'_>| {
        if item.is_empty() {
            return Err(Mistake::new("the list of addresses has a gap")
                .at(item.span(), "an address should stand here")
                .help("remove the comma, or write the address"));
        }
        network(item).map(|network| Spanned::new(network, item.span()))
    };
    value.split(|c| c == ',').map(item).collect()
}

/// A list as wg-quick(8) splits it: at commas and white space.
pub(super) fn words(value: Text<'_>) -> impl Iterator<Item = Text<'_>> {
    value.split(|c| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty())
}

pub(super) fn endpoint(value: Text<'_>) -> Result<Endpoint, Mistake> {
    host_and_port(value, true).map(|(endpoint, _)| endpoint)
}

pub(super) fn own_endpoint(value: Text<'_>) -> Result<OwnEndpoint, Mistake> {
    let refused = |why: &'static str| {
        Mistake::new(format!("`{}` is not an endpoint", value.quoted()))
            .at(value.span(), why)
            .help("write the name or the address at which others reach this end")
    };
    // wg(8), which reads endpoints of peers, takes blanks out of them.
    if value.raw.contains(char::is_whitespace) {
        return Err(refused("there is a blank in it"));
    }
    let (host, has_port) = host_and_port(value, false)?;
    if let Endpoint::Address(address) = &host
        && (address.ip().is_unspecified() || address.ip().is_multicast())
    {
        return Err(refused("nobody is found at this address"));
    }
    Ok(OwnEndpoint { port: has_port.then_some(host.port()), host })
}

/// An endpoint, and whether it says its port, which is 0 if not.
fn host_and_port(value: Text<'_>, is_port_needed: bool) -> Result<(Endpoint, bool), Mistake> {
    const FORM: &str = "write `host:port` or `[IPv6 address]:port`, such as 198.51.100.1:51820";
    let wrong = || Mistake::new(format!("`{}` is not an endpoint", value.quoted()));
    let without_port = || {
        let mistake = wrong().at(value.span(), "the port is missing");
        match squeezed(value).parse() {
            Ok(IpAddr::V6(address)) => {
                mistake.help(format!("an IPv6 address needs brackets: `[{address}]:51820`"))
            }
            _ => mistake.help(FORM),
        }
    };

    if let Some(end) = value.raw.find("://") {
        let rest = value.from(end + 3).before('/');
        let mistake = wrong().at(value.slice(0..end + 3).span(), "this does not belong here");
        return Err(match host_and_port(rest, is_port_needed) {
            Ok(_) => mistake.help(format!("write `{}`", rest.quoted())),
            Err(_) => mistake.help(FORM),
        });
    }
    // An IPv6 address could be one group less and a port, too.
    let is_address = || scoped_v6(&squeezed(value)).is_some();
    let (host, port) = if value.raw.starts_with('[') {
        let Some(end) = value.raw.find(']') else {
            return Err(wrong().at(value.slice(0..1).span(), "`]` is missing").help(FORM));
        };
        let rest = value.from(end + 1).trim();
        let port = match rest.raw.strip_prefix(':') {
            Some(port) => Some(rest.from(rest.raw.len() - port.len()).trim()),
            None if rest.is_empty() && !is_port_needed => None,
            None => return Err(without_port()),
        };
        (value.slice(1..end).trim(), port)
    } else {
        match value.raw.rfind(':') {
            _ if !is_port_needed && is_address() => (value, None),
            Some(colon) => (value.slice(0..colon).trim(), Some(value.from(colon + 1).trim())),
            None if !is_port_needed => (value, None),
            None => return Err(without_port()),
        }
    };
    if host.is_empty() {
        return Err(wrong().at(value.span(), "the host is missing").help(FORM));
    }
    let is_bracketed = value.raw.starts_with('[');
    let host_text = squeezed(host);
    // As wg(8) does, take what stands before the last colon of an address without brackets.
    let is_address_in_parts = !is_bracketed && host_text.contains(':');
    if port.is_some_and(|port| port.is_empty())
        || is_address_in_parts && scoped_v6(&host_text).is_none()
    {
        return Err(without_port());
    }
    let has_port = port.is_some();
    let port = match port {
        None => 0,
        Some(port) => {
            let port_text = squeezed(port);
            let number = number(&port_text, 1..=u16::MAX);
            number.ok_or_else(|| {
                let mistake = wrong().at(port.span(), "a port is a number from 1 to 65535");
                match port_text.contains('/').then(|| number_alone(&port_text)).flatten() {
                    Some(help) => mistake.help(help),
                    None => mistake.help(FORM),
                }
            })?
        }
    };

    if let Ok(address) = host_text.parse::<IpAddr>()
        && (address.is_ipv6() || !is_bracketed)
    {
        return Ok((Endpoint::Address(SocketAddr::new(address, port)), has_port));
    }
    let is_name = |text: &str| {
        text.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_'))
            // Digits and dots only are a mistyped address; a resolver would take some of them.
            && !text.bytes().all(|c| c.is_ascii_digit() || c == b'.')
    };
    if scoped_v6(&host_text).is_some() || !is_bracketed && is_name(&host_text) {
        return Ok((Endpoint::Host { host: host_text.into_owned(), port }, has_port));
    }
    let what = if is_bracketed {
        "this is not an IPv6 address"
    } else {
        "this is neither an address nor a host name"
    };
    let mistake = wrong().at(host.span(), what);
    Err(match host_text.is_ascii() {
        true => mistake.help(FORM),
        false => mistake.help("write the name in ASCII, as the DNS has it (`xn--…`)"),
    })
}

/// The address of `fe80::1%eth0` and the like, or of an IPv6 address without a scope.
fn scoped_v6(text: &str) -> Option<Ipv6Addr> {
    match text.split_once('%') {
        None => text.parse().ok(),
        Some((address, scope)) => address.parse().ok().filter(|_| is_interface_name(scope)),
    }
}

pub(super) fn table(value: Text<'_>) -> Result<Table, Mistake> {
    let is_name = |text: &str| {
        text.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_'))
    };
    match value.raw {
        text if text.eq_ignore_ascii_case("auto") => Ok(Table::Auto),
        text if text.eq_ignore_ascii_case("off") => Ok(Table::Off),
        text if is_name(text) => Ok(Table::Of(text.to_owned())),
        _ => Err(Mistake::new(format!("`{}` is not a routing table", value.quoted()))
            .at(value.span(), "a table is `auto`, `off`, a number, or a name of rt_tables")
            .help("without the line it is `auto`")),
    }
}

pub(super) fn save_config(value: Text<'_>) -> Result<bool, Mistake> {
    match value.raw {
        text if text.eq_ignore_ascii_case("true") => Ok(true),
        text if text.eq_ignore_ascii_case("false") => Ok(false),
        _ => Err(Mistake::new(format!("`{}` is neither true nor false", value.quoted()))
            .at(value.span(), "write `true` or `false`")
            .help("without the line it is `false`")),
    }
}

pub(super) fn workers(value: Text<'_>) -> Result<usize, Mistake> {
    let worker_max = HEARTBEATS_LEN as usize;
    number(value.raw, 1..=worker_max).ok_or_else(|| {
        Mistake::new(format!("`{}` is not a number of workers", value.quoted()))
            .at(value.span(), format!("write a number from 1 to {worker_max}"))
            .help("without the line each CPU that the daemon may use has a worker")
    })
}

/// `eth0,eth1 mode=native queues=4`
pub(super) fn xdp(value: Text<'_>) -> Result<Xdp, Mistake> {
    const FORM: &str = "write `#! Xdp = eth0,eth1`, and `mode=auto`, `native` or `udp` after it";
    const MODES: [&str; 4] = ["auto", "zerocopy", "native", "udp"];
    let mut xdp = Xdp {
        interfaces: Vec::new(),
        mode: None,
        queues: None,
        busy_poll: false,
        bypass_firewall: false,
    };
    for word in words(value) {
        if word.raw.eq_ignore_ascii_case("bypass-firewall") {
            xdp.bypass_firewall = true;
        } else if word.raw.eq_ignore_ascii_case(BUSY_POLL) {
            xdp.busy_poll = true;
        } else if let Some((name, option)) = word.split_once('=') {
            match (&*name.raw.to_ascii_lowercase(), &*option.raw.to_ascii_lowercase()) {
                ("mode", _) if xdp.mode.is_some() => {
                    return Err(Mistake::new("`mode` is set twice")
                        .at(word.span(), "again here")
                        .help("keep one of the two"));
                }
                ("mode", "auto") => xdp.mode = Some(Spanned::new(Mode::Auto, word.span())),
                ("mode", "native") => xdp.mode = Some(Spanned::new(Mode::Native, word.span())),
                ("mode", "udp") => xdp.mode = Some(Spanned::new(Mode::Udp, word.span())),
                ("mode", "zerocopy") => xdp.mode = Some(Spanned::new(Mode::ZeroCopy, word.span())),
                ("mode", "skb" | "generic") => {
                    return Err(Mistake::new("generic XDP is never used")
                        .at(option.span(), "this mode loses every coalesced packet")
                        .help("`mode=udp` is faster where a NIC has no native XDP"));
                }
                ("mode", _) => {
                    let mistake = Mistake::new(format!("unknown mode `{}`", option.quoted()))
                        .at(option.span(), "not a mode");
                    return Err(meant(mistake, option, &MODES, FORM));
                }
                ("queues", _) if xdp.queues.is_some() => {
                    return Err(Mistake::new("`queues` is set twice")
                        .at(word.span(), "again here")
                        .help("keep one of the two"));
                }
                ("queues", _) => xdp.queues = Some(Spanned::new(queues(option)?, word.span())),
                _ => {
                    let mistake = Mistake::new(format!("unknown option `{}`", name.quoted()))
                        .at(name.span(), "not an option of `Xdp`");
                    return Err(meant(mistake, name, &["mode", "queues", BUSY_POLL], FORM));
                }
            }
        } else if !is_interface_name(word.raw) {
            return Err(Mistake::new(format!("`{}` is not an interface", word.quoted()))
                .at(word.span(), "a name is 1 to 15 bytes without `/` and `:`")
                .help("`ip link` lists the interfaces"));
        } else if xdp.interfaces.iter().any(|known| known.value == word.raw) {
            return Err(Mistake::new(format!("`{}` is named twice", word.quoted()))
                .at(word.span(), "again here")
                .help("keep one of the two"));
        } else {
            xdp.interfaces.push(Spanned::new(word.raw.to_owned(), word.span()));
        }
    }
    if xdp.interfaces.is_empty() {
        return Err(Mistake::new("`Xdp` names no interface")
            .at(value.span(), "an interface should stand here")
            .help(FORM));
    }
    Ok(xdp)
}

/// How many queues of a NIC.
fn queues(value: Text<'_>) -> Result<u32, Mistake> {
    number(value.raw, 1..=QUEUES_LEN).ok_or_else(|| {
        Mistake::new(format!("`{}` is not a number of queues", value.quoted()))
            .at(value.span(), format!("write a number from 1 to {QUEUES_LEN}"))
            .help("`ethtool -l` shows how many queues a NIC has")
    })
}

/// Whether the kernel would take it (`dev_valid_name`).
pub(super) fn is_interface_name(text: &str) -> bool {
    (1..16).contains(&text.len())
        && !matches!(text, "." | "..")
        && !text.contains(|c: char| matches!(c, '/' | ':') || c.is_whitespace())
}
