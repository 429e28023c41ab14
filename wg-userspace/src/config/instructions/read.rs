//! Makes values of the text of `#!` lines. All words but names of interfaces may be of either case.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::{
    Allow, BYPASS_FIREWALL, Forward, Limit, Nat, NatSource, OFF, ON, PortRange, Traffic, Transport,
    UNITS,
};
use crate::config::Spanned;
use crate::config::keys::{Directive, nearest_word};
use crate::config::lines::Text;
use crate::config::problem::Mistake;
use crate::config::values::{is_interface_name, network, number};

/// `masquerade out=eth0 [from=10.9.0.0/24]`, or `snat out=eth0 to=192.0.2.1,192.0.2.2 [from=…]`, and perhaps
/// `bypass-firewall`
pub fn nat(value: Text<'_>) -> Result<Nat, Mistake> {
    const FORM: &str = "write `#! Nat = masquerade out=eth0` or `#! Nat = snat out=eth0 \
        to=192.0.2.1`, and `from=10.9.0.0/24` after it if it is not for all";
    let mut words = words(value);
    let way = words.next().unwrap_or(value);
    let is_snat = match &*lower(way) {
        "masquerade" => false,
        "snat" => true,
        _ => {
            let mistake = Mistake::new(format!("unknown kind of NAT `{}`", way.quoted()))
                .at(way.span(), "neither `masquerade` nor `snat`");
            return Err(meant(mistake, way, &["masquerade", "snat"], FORM));
        }
    };
    let (mut out, mut to, mut from) = (None, None, None);
    let mut bypass_firewall = false;
    for word in words {
        if is_bypass(word) {
            bypass_firewall = true;
            continue;
        }
        let known = ["out", "to", "from", BYPASS_FIREWALL];
        let (name, argument) = option(word, Directive::Nat, &known, FORM)?;
        match name {
            "out" => once(&mut out, name, word, interface(argument)?)?,
            "to" if is_snat => once(&mut to, name, word, addresses(argument)?)?,
            "to" => {
                return Err(Mistake::new("`masquerade` takes no `to=`")
                    .at(word.span(), "the address is that of the NIC")
                    .help("remove `to=`, or write `snat` in place of `masquerade`"));
            }
            BYPASS_FIREWALL => return Err(too_much(argument, FORM)),
            _ => {
                let net = network(argument)?.trunc();
                once(&mut from, name, word, Spanned::new(net, argument.span()))?;
            }
        }
    }
    let missing = |name: &str| {
        Mistake::new(format!("`Nat` has no `{name}=`"))
            .at(value.span(), format!("`{name}=` is missing"))
            .help(FORM)
    };
    let out = out.ok_or_else(|| missing("out"))?.value;
    let source = match (is_snat, to) {
        (false, _) => NatSource::Masquerade,
        (true, Some(to)) => NatSource::Snat(to.value),
        (true, None) => return Err(missing("to")),
    };
    let from: Option<Spanned<IpNet>> = from.map(|from: Spanned<_>| from.value);
    if let (NatSource::Snat(to), Some(from)) = (&source, &from)
        && !to.iter().any(|address| address.is_ipv4() == from.addr().is_ipv4())
    {
        return Err(Mistake::new("no packet of `from=` can get an address of `to=`")
            .at(from.span, "packets of one family")
            .at(to[0].span, "addresses of the other")
            .help("write addresses of the same family"));
    }
    Ok(Nat { source, out, from, bypass_firewall })
}

/// `tcp eth0:8443 -> 10.9.0.2:443`, and perhaps `bypass-firewall`
pub fn forward(value: Text<'_>) -> Result<Forward, Mistake> {
    const FORM: &str = "write `#! Forward = tcp eth0:8443 -> 10.9.0.2:443`";
    let (from, to) = sides(value, Directive::Forward, FORM)?;
    let mut words = words(from);
    let word = words.next().unwrap_or(from);
    let Some(transport) = transport(word) else {
        let mistake = Mistake::new(format!("unknown protocol `{}`", word.quoted()))
            .at(word.span(), "neither `tcp` nor `udp`");
        return Err(meant(mistake, word, &["tcp", "udp"], FORM));
    };
    let place = words.next().unwrap_or(from.at_end());
    if let Some(more) = words.next() {
        return Err(too_much(more, FORM));
    }
    let Some(colon) = place.raw.rfind(':') else {
        return Err(Mistake::new("the port is missing")
            .at(place.span(), "expected an interface and a port")
            .help(FORM));
    };
    let interface = interface(place.slice(0..colon))?;
    let port_text = place.from(colon + 1);
    let port = Spanned::new(port(port_text, FORM)?, port_text.span());
    let mut behind = self::words(to);
    let place = behind.next().unwrap_or(to);
    let bypass_firewall = match behind.next() {
        None => false,
        Some(word) if is_bypass(word) => true,
        Some(more) => return Err(too_much(more, FORM)),
    };
    if let Some(more) = behind.next() {
        return Err(too_much(more, FORM));
    }
    let to = Spanned::new(host_and_port(place, FORM)?, place.span());
    Ok(Forward { transport, interface, port, to, bypass_firewall })
}

/// `10.9.0.0/24 -> 192.168.20.0/24 [tcp|udp|icmp [22,8000-8080]]`
pub fn allow(value: Text<'_>) -> Result<Allow, Mistake> {
    const FORM: &str = "write `#! Allow = 10.9.0.0/24 -> 192.168.20.0/24`, and after it, if not \
        everything may pass, `tcp 22,8000-8080`, `udp 53` or `icmp`";
    let (from, rest) = sides(value, Directive::Allow, FORM)?;
    let mut words = words(rest);
    let to = words.next().unwrap_or(rest);
    let net = |text: Text<'_>| Ok(Spanned::new(network(text)?.trunc(), text.span()));
    let (from, to) = (net(from)?, net(to)?);
    if from.addr().is_ipv4() != to.addr().is_ipv4() {
        return Err(Mistake::new("nothing goes from IPv4 to IPv6 or back")
            .at(to.span, "of one family")
            .at(from.span, "of the other")
            .help("write networks of the same family, and a line for each family"));
    }
    let Some(word) = words.next() else { return Ok(Allow { from, to, traffic: Traffic::All }) };
    let is_icmp = word.raw.eq_ignore_ascii_case("icmp");
    let (next, end) = (words.next(), rest.at_end());
    let ports = next.map_or(end, |next| rest.since(next));
    let traffic = match transport(word) {
        Some(transport) => Traffic::To(transport, port_ranges(ports, FORM)?),
        None if is_icmp && ports.is_empty() => Traffic::Icmp,
        None if is_icmp => {
            return Err(Mistake::new("ICMP has no ports")
                .at(ports.span(), "nothing may follow `icmp`")
                .help(FORM));
        }
        None => {
            let mistake = Mistake::new(format!("unknown protocol `{}`", word.quoted()))
                .at(word.span(), "not `tcp`, `udp` or `icmp`");
            return Err(match &*lower(word) {
                "icmpv6" | "icmp6" | "ipv6-icmp" => {
                    mistake.help("write `icmp`: between IPv6 networks it is ICMPv6")
                }
                _ => meant(mistake, word, &["tcp", "udp", "icmp"], FORM),
            });
        }
    };
    Ok(Allow { from, to, traffic })
}

/// `200mbit`
pub fn limit(value: Text<'_>) -> Result<Limit, Mistake> {
    const FORM: &str = "write a number and `kbit`, `mbit` or `gbit` (thousands, millions and \
        billions of bits per second), such as 200mbit";
    const RANGE: std::ops::RangeInclusive<u128> = 1_000..=1_000_000_000_000;
    let wrong = || Mistake::new(format!("`{}` is not a rate", value.quoted()));
    let unit_at = value.raw.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = match unit_at {
        None => return Err(wrong().at(value.span(), "the unit is missing").help(FORM)),
        Some(at) => (value.slice(0..at), value.from(at).trim()),
    };
    let word = lower(unit);
    let Some(&(_, factor)) = UNITS.iter().find(|(name, _)| *name == word) else {
        let mistake = wrong().at(unit.span(), "not a unit");
        // What other programs write, with bits and with bytes.
        let letter = word.chars().next().filter(|letter| "kmg".contains(*letter));
        let is_other = matches!(
            word.get(1..),
            Some("" | "b" | "bps" | "b/s" | "bits" | "bit/s" | "bits/s" | "ib" | "ibit")
        );
        return Err(match letter {
            Some(letter) if is_other => {
                mistake.help(format!("write `{}{letter}bit` if bits are meant", number.raw))
            }
            _ => meant(mistake, unit, &["kbit", "mbit", "gbit"], FORM),
        });
    };
    let bits = decimal(number.raw, factor).filter(|bits| RANGE.contains(bits));
    match bits.and_then(|bits| u64::try_from(bits).ok()) {
        Some(bits_per_s) => Ok(Limit { bits_per_s }),
        None => Err(wrong()
            .at(number.span(), "a rate is whole bits per second, from 1kbit to 1000gbit")
            .help(FORM)),
    }
}

/// `127.0.0.1:9586`
pub fn metrics(value: Text<'_>) -> Result<SocketAddr, Mistake> {
    const FORM: &str = "write an address of this host and a port, such as 127.0.0.1:9586 or \
        [::1]:9586";
    address_and_port(value, FORM)
}

/// `on` or `off`
pub fn switch(value: Text<'_>, of: Directive) -> Result<bool, Mistake> {
    match &*lower(value) {
        ON => Ok(true),
        OFF => Ok(false),
        _ => Err(Mistake::new(format!("`{}` is either on or off", of.name()))
            .at(value.span(), "neither `on` nor `off`")
            .help(format!("write `#! {0} = on` or `#! {0} = off`", of.name()))),
    }
}

/// What a peer is called.
pub fn name(value: Text<'_>) -> Result<String, Mistake> {
    match super::name_problem(value.raw) {
        None => Ok(value.raw.to_owned()),
        Some(why) => Err(Mistake::new(format!("`{}` is not a name for a peer", value.quoted()))
            .at(value.span(), why)
            .help("a name is a word or some that tell people who it is, such as `laptop`")),
    }
}

/// The words between blanks.
fn words(value: Text<'_>) -> impl Iterator<Item = Text<'_>> {
    value.split(char::is_whitespace).filter(|word| !word.is_empty())
}

fn is_bypass(word: Text<'_>) -> bool {
    word.raw.eq_ignore_ascii_case(BYPASS_FIREWALL)
}

fn lower(text: Text<'_>) -> String {
    text.raw.to_ascii_lowercase()
}

/// With what may have been meant, or the form of the line, as help.
pub fn meant(
    mistake: Mistake,
    text: Text<'_>,
    known: &[&'static str],
    form: &'static str,
) -> Mistake {
    match nearest_word(text.raw, known) {
        Some(word) => mistake.help(format!("did you mean `{word}`?")),
        None => mistake.help(form),
    }
}

/// What stands on either side of `->`.
fn sides<'a>(
    value: Text<'a>,
    of: Directive,
    form: &'static str,
) -> Result<(Text<'a>, Text<'a>), Mistake> {
    const ARROW: &str = "->";
    let wrong = |span, what: &str| Err(Mistake::new(what).at(span, "in this value").help(form));
    let Some(at) = value.raw.find(ARROW) else {
        return wrong(value.span(), &format!("`{}` has no `->`", of.name()));
    };
    let (from, to) = (value.slice(0..at).trim(), value.from(at + ARROW.len()).trim());
    if from.is_empty() || to.is_empty() {
        let side = if from.is_empty() { "before" } else { "behind" };
        return wrong(value.span(), &format!("nothing stands {side} `->`"));
    }
    Ok((from, to))
}

/// `name=value`, with a known name.
fn option<'a>(
    word: Text<'a>,
    of: Directive,
    known: &[&'static str],
    form: &'static str,
) -> Result<(&'static str, Text<'a>), Mistake> {
    let (name, value) = word.split_once('=').unwrap_or((word, word.at_end()));
    let Some(found) = known.iter().find(|known| name.raw.eq_ignore_ascii_case(known)) else {
        let mistake = Mistake::new(format!("unknown option `{}`", name.quoted()))
            .at(name.span(), format!("not an option of `{}`", of.name()));
        return Err(meant(mistake, name, known, form));
    };
    if value.is_empty() {
        return Err(Mistake::new(format!("`{found}` has no value"))
            .at(word.span(), "a value should follow")
            .help(format!("write `{found}=` and the value, without blanks between them")));
    }
    Ok((found, value))
}

/// Puts an option's value in its place.
fn once<T>(
    place: &mut Option<Spanned<T>>,
    name: &str,
    word: Text<'_>,
    value: T,
) -> Result<(), Mistake> {
    if let Some(first) = place {
        return Err(Mistake::new(format!("`{name}` is set twice"))
            .at(word.span(), "again here")
            .at(first.span, "first here")
            .help("keep one of the two"));
    }
    *place = Some(Spanned::new(value, word.span()));
    Ok(())
}

fn too_much(text: Text<'_>, form: &'static str) -> Mistake {
    Mistake::new(format!("`{}` is too much here", text.quoted()))
        .at(text.span(), "nothing more should follow")
        .help(form)
}

/// An item that is missing in a list of `what`.
fn gap(what: &str, text: Text<'_>) -> Mistake {
    Mistake::new(format!("the list of {what} has a gap"))
        .at(text.span(), "something should stand here")
        .help("remove the comma, or write what is missing")
}

fn interface(text: Text<'_>) -> Result<Spanned<String>, Mistake> {
    let wrong = || Mistake::new(format!("`{}` is not an interface", text.quoted()));
    if text.raw.parse::<IpAddr>().is_ok() || text.raw.starts_with('[') {
        return Err(wrong()
            .at(text.span(), "this is an address")
            .help("write the name of the NIC that has it; `ip address` shows which"));
    }
    if !is_interface_name(text.raw) {
        return Err(wrong()
            .at(text.span(), "a name is 1 to 15 bytes without `/` and `:`")
            .help("`ip link` lists the interfaces"));
    }
    Ok(Spanned::new(text.raw.to_owned(), text.span()))
}

fn addresses(list: Text<'_>) -> Result<Vec<Spanned<IpAddr>>, Mistake> {
    let mut addresses: Vec<Spanned<IpAddr>> = Vec::new();
    for text in list.split(|c| c == ',') {
        if text.is_empty() {
            return Err(gap("addresses", text));
        }
        let wrong = || Mistake::new(format!("`{}` is not an address", text.quoted()));
        let address = text.raw.parse::<IpAddr>().map_err(|_| {
            wrong()
                .at(text.span(), "this is neither an IPv4 nor an IPv6 address")
                .help("write addresses of this host, separated by commas without blanks")
        })?;
        if !is_of_a_host(address) {
            return Err(wrong()
                .at(text.span(), "no packet comes from there")
                .help("write an address of this host"));
        }
        if let Some(first) = addresses.iter().find(|known| known.value == address) {
            return Err(Mistake::new(format!("`{}` stands here twice", text.quoted()))
                .at(text.span(), "again here")
                .at(first.span, "first here")
                .help("keep one of the two"));
        }
        addresses.push(Spanned::new(address, text.span()));
    }
    Ok(addresses)
}

fn is_of_a_host(address: IpAddr) -> bool {
    let is_broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    !address.is_unspecified() && !address.is_multicast() && !is_broadcast
}

fn transport(word: Text<'_>) -> Option<Spanned<Transport>> {
    let transport = match &*lower(word) {
        "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        _ => return None,
    };
    Some(Spanned::new(transport, word.span()))
}

fn port(text: Text<'_>, form: &'static str) -> Result<u16, Mistake> {
    number(text.raw, 1..=u16::MAX).ok_or_else(|| {
        Mistake::new(format!("`{}` is not a port", text.quoted()))
            .at(text.span(), "a port is a number from 1 to 65535")
            .help(form)
    })
}

/// `22,8000-8080`; none if there is nothing.
fn port_ranges(list: Text<'_>, form: &'static str) -> Result<Vec<Spanned<PortRange>>, Mistake> {
    if list.is_empty() {
        return Ok(Vec::new());
    }
    let range = |text: Text<'_>| {
        if text.is_empty() {
            return Err(gap("ports", text));
        }
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (port(first, form)?, port(last, form)?),
            None if text.raw.contains(':') => {
                return Err(Mistake::new(format!("`{}` is not a port", text.quoted()))
                    .at(text.span(), "a range is written with `-`")
                    .help(format!("write `{}`", text.quoted().replace(':', "-"))));
            }
            None => {
                let only = port(text, form)?;
                (only, only)
            }
        };
        if first > last {
            return Err(Mistake::new(format!("`{}` is no range", text.quoted()))
                .at(text.span(), "it ends before it begins")
                .help(format!("write `{last}-{first}`")));
        }
        Ok(Spanned::new(PortRange { first, last }, text.span()))
    };
    list.split(|c| c == ',').map(range).collect()
}

fn host_and_port(text: Text<'_>, form: &'static str) -> Result<SocketAddr, Mistake> {
    let address = address_and_port(text, form)?;
    if !is_of_a_host(address.ip()) {
        return Err(Mistake::new(format!("`{}` is nobody's address", text.quoted()))
            .at(text.span(), "nobody is there")
            .help(form));
    }
    Ok(address)
}

/// An address and a port that is not 0; IPv6 in brackets.
fn address_and_port(text: Text<'_>, form: &'static str) -> Result<SocketAddr, Mistake> {
    if let Ok(address) = text.raw.parse::<SocketAddr>()
        && address.port() != 0
    {
        return Ok(address);
    }
    if let Some(more) = words(text).nth(1) {
        return Err(too_much(more, form));
    }
    let wrong = || Mistake::new(format!("`{}` is not an address with a port", text.quoted()));
    if let Ok(address) = text.raw.parse::<IpAddr>() {
        let address = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        return Err(wrong()
            .at(text.span(), "the port is missing")
            .help(format!("write `{address}:` and the port")));
    }
    let Some(colon) = text.raw.rfind(':') else {
        return Err(wrong().at(text.span(), "expected an address, a colon and a port").help(form));
    };
    let (host, port_text) = (text.slice(0..colon), text.from(colon + 1));
    let bare = host.raw.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if bare.unwrap_or(host.raw).parse::<IpAddr>().is_err() {
        return Err(wrong()
            .at(host.span(), "this is no address, and names are not looked up here")
            .help(form));
    }
    port(port_text, form)?;
    Err(wrong().at(host.span(), "brackets are for IPv6, which needs them").help(form))
}

/// Such a number with a point or without, times `factor`; `None` if that is not whole.
fn decimal(text: &str, factor: u64) -> Option<u128> {
    /// More have no meaning in any unit.
    const DECIMALS_MAX: usize = 12;
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
    if decimals.len() > DECIMALS_MAX {
        return None;
    }
    let whole: u64 = number(whole, 0..=u64::MAX)?;
    let tenths = 10_u128.pow(u32::try_from(decimals.len()).ok()?);
    let decimals: u64 = number(decimals, 0..=u64::MAX)?;
    let scaled = u128::from(decimals) * u128::from(factor);
    let is_whole = scaled.is_multiple_of(tenths);
    is_whole.then(|| u128::from(whole) * u128::from(factor) + scaled / tenths)
}
