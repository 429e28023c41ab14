//! Which packet is meant, and its bytes.

use std::net::{IpAddr, SocketAddr};

use wg_common::headers::{Checksum, IPV4_LEN, IPV6_LEN, PROTOCOL_TCP, PROTOCOL_UDP};
use wg_common::nat::tuple::Tuple;
use wg_common::upper::{PROTOCOL_ICMP, PROTOCOL_ICMPV6};

use crate::nat::address;

/// TTL or hop limit of the packet: that with which most systems send.
const TTL: u8 = 64;

/// `SRC[:PORT]`
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Source {
    /// From whom.
    pub ip: IpAddr,
    /// From which port, or with which identifier of an echo; nothing: whichever.
    pub port: Option<u16>,
}

/// `DST[:PORT/PROTO]`
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Destination {
    /// To whom.
    pub ip: IpAddr,
    /// What is sent; nothing: the latest flow that there is, or else an echo request.
    pub wanted: Option<Wanted>,
}

/// What is sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// By which protocol.
    pub protocol: Protocol,
    /// To which port; nothing: that of the latest flow. Echoes have none.
    pub port: Option<u16>,
}

/// A protocol that is translated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// Echoes of ICMP, and of ICMPv6.
    Icmp,
}

impl Protocol {
    /// Its word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }

    /// Its number in a packet from or to this address.
    pub const fn number(self, of: IpAddr) -> u8 {
        match (self, of) {
            (Self::Tcp, _) => PROTOCOL_TCP,
            (Self::Udp, _) => PROTOCOL_UDP,
            (Self::Icmp, IpAddr::V4(_)) => PROTOCOL_ICMP,
            (Self::Icmp, IpAddr::V6(_)) => PROTOCOL_ICMPV6,
        }
    }

    /// The protocol of this number, if it is one of them.
    pub const fn of_number(number: u8) -> Option<Self> {
        match number {
            PROTOCOL_TCP => Some(Self::Tcp),
            PROTOCOL_UDP => Some(Self::Udp),
            PROTOCOL_ICMP | PROTOCOL_ICMPV6 => Some(Self::Icmp),
            _ => None,
        }
    }
}

/// Reads `SRC[:PORT]`.
///
/// # Errors
/// What is wrong with it, and how it is written.
pub fn source(text: &str) -> Result<Source, String> {
    if text.contains('/') {
        return Err(format!(
            "`{text}` has a `/`; write one address, such as 10.9.0.2 or 10.9.0.2:40000"
        ));
    }
    let (ip, port) = end(text)?;
    Ok(Source { ip, port })
}

/// Reads `DST[:PORT/PROTO]`.
///
/// # Errors
/// As [`source`].
pub fn destination(text: &str) -> Result<Destination, String> {
    let Some((at, word)) = text.rsplit_once('/') else {
        let (ip, port) = end(text)?;
        return match port {
            None => Ok(Destination { ip, wanted: None }),
            Some(_) => Err(format!(
                "`{text}` does not say of which protocol the port is; write `{text}/tcp`"
            )),
        };
    };
    let protocol = match word.to_ascii_lowercase().as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "icmp" | "icmpv6" => Protocol::Icmp,
        _ => {
            return Err(format!(
                "`{word}` is none of tcp, udp and icmp; write one address, and of what is sent to it the port and \
                 the protocol, such as 192.0.2.1:443/tcp"
            ));
        }
    };
    let (ip, port) = end(at)?;
    if protocol == Protocol::Icmp && port.is_some() {
        return Err(format!("echoes of ICMP go to no port; write `{ip}/icmp`"));
    }
    Ok(Destination { ip, wanted: Some(Wanted { protocol, port }) })
}

/// Reads an address, with or without a port.
fn end(text: &str) -> Result<(IpAddr, Option<u16>), String> {
    let how = || {
        format!(
            "`{text}` is no address; write one like 192.0.2.1, 192.0.2.1:443, 2001:db8::1 or [2001:db8::1]:443"
        )
    };
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok((ip.to_canonical(), None));
    }
    let at: SocketAddr = text.parse().map_err(|_| how())?;
    match at {
        SocketAddr::V6(at) if at.scope_id() != 0 => Err(how()),
        at if at.port() == 0 => {
            Err(format!("nothing is sent from or to port 0; write `{}`", at.ip()))
        }
        at => Ok((at.ip().to_canonical(), Some(at.port()))),
    }
}

/// A packet that is to be traced.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Sent {
    /// By which protocol.
    pub protocol: Protocol,
    /// From whom. The port of an echo is its identifier.
    pub source: SocketAddr,
    /// To whom. That of an echo is its identifier as well.
    pub destination: SocketAddr,
    /// What it is beside that.
    pub form: Form,
    /// Bytes of it, from its IP header on.
    pub len: usize,
}

/// What stands in a packet's header beside its ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    /// It may begin a flow: a SYN, an echo request.
    First,
    /// An echo reply.
    Reply,
    /// An acknowledgement in the midst of a flow of TCP, with its numbers.
    Acknowledges {
        /// The next byte that is sent.
        next: u32,
        /// The next byte that is wanted.
        wanted: u32,
    },
}

impl Sent {
    /// Bytes of the least packet of a protocol to this address.
    pub const fn len_min(protocol: Protocol, to: IpAddr) -> usize {
        let header = match to {
            IpAddr::V4(_) => IPV4_LEN,
            IpAddr::V6(_) => IPV6_LEN,
        };
        header
            + match protocol {
                Protocol::Tcp => 20,
                Protocol::Udp | Protocol::Icmp => 8,
            }
    }

    /// Its bytes, with checksums; IPv4 is not to be fragmented, as most send today.
    ///
    /// # Panics
    /// If source and destination are of different versions, or `len` is below [`Sent::len_min`] or beyond what an IP
    /// header can say.
    pub fn bytes(&self) -> Vec<u8> {
        let Self { protocol, source, destination, .. } = *self;
        let header_len = if destination.is_ipv4() { IPV4_LEN } else { IPV6_LEN };
        let mut upper = self.upper(self.len - header_len);
        let number = protocol.number(destination.ip());
        let sum = if number == PROTOCOL_ICMP {
            Checksum::default()
        } else {
            Checksum::pseudo(source.ip(), destination.ip(), number, upper.len() as u32)
        };
        let at = match protocol {
            Protocol::Tcp => 16,
            Protocol::Udp => 6,
            Protocol::Icmp => 2,
        };
        let sum = match sum.bytes(&upper).finish() {
            0 if protocol == Protocol::Udp => 0xffff,
            sum => sum,
        };
        upper[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        let mut packet = match (source.ip(), destination.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let len = u16::try_from(self.len).expect("a length that fits its field");
                let mut header = vec![0x45, 0];
                header.extend(len.to_be_bytes());
                header.extend([0, 0, 0x40, 0, TTL, number, 0, 0]);
                header.extend(from.octets());
                header.extend(to.octets());
                let sum = Checksum::default().bytes(&header).finish();
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                header
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let len = u16::try_from(upper.len()).expect("a length that fits its field");
                let mut header = vec![0x60, 0, 0, 0];
                header.extend(len.to_be_bytes());
                header.extend([number, TTL]);
                header.extend(from.octets());
                header.extend(to.octets());
                header
            }
            _ => panic!("source and destination are of one version"),
        };
        packet.extend(upper);
        packet
    }

    /// What stands behind the IP header, without its checksum.
    fn upper(&self, len: usize) -> Vec<u8> {
        let ports =
            [self.source.port().to_be_bytes(), self.destination.port().to_be_bytes()].concat();
        let mut upper = Vec::with_capacity(len);
        match self.protocol {
            Protocol::Tcp => {
                const SYN: u8 = 2;
                const ACK: u8 = 16;
                let (next, wanted, flags) = match self.form {
                    Form::Acknowledges { next, wanted } => (next, wanted, ACK),
                    _ => (0, 0, SYN),
                };
                upper.extend(ports);
                upper.extend(next.to_be_bytes());
                upper.extend(wanted.to_be_bytes());
                upper.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
            }
            Protocol::Udp => {
                upper.extend(ports);
                upper.extend((len as u16).to_be_bytes());
                upper.extend([0, 0]);
            }
            Protocol::Icmp => {
                let kind = match (self.destination.is_ipv4(), self.form) {
                    (true, Form::Reply) => 0,
                    (true, _) => 8,
                    (false, Form::Reply) => 129,
                    (false, _) => 128,
                };
                let [high, low] = self.source.port().to_be_bytes();
                upper.extend([kind, 0, 0, 0, high, low, 0, 1]);
            }
        }
        upper.resize(len, 0);
        upper
    }
}

/// The ends of a packet, as it is now: from whom, to whom.
pub fn ends(packet: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let tuple = Tuple::of(packet)?;
    let end = |key, port: u16| SocketAddr::new(address(key), u16::from_be(port));
    Some((end(tuple.source, tuple.source_port), end(tuple.destination, tuple.destination_port)))
}

#[cfg(test)]
mod tests {
    use wg_common::nat::map::Protocol as Slots;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn ends_are_read() {
        let of = |text: &str, port| {
            assert_eq!(source(text).unwrap(), Source { ip: ip("10.9.0.2"), port })
        };
        of("10.9.0.2", None);
        of("10.9.0.2:7", Some(7));
        of("[::ffff:10.9.0.2]:7", Some(7));
        let v6 = Source { ip: ip("fd09::2"), port: None };
        for text in ["fd09::2", "[fd09::2]"] {
            assert_eq!(source(text).unwrap(), v6);
        }
        assert_eq!(source("[fd09::2]:7").unwrap(), Source { port: Some(7), ..v6 });
        let to = |text: &str, wanted| {
            assert_eq!(
                destination(text).unwrap(),
                Destination { ip: ip("192.0.2.1"), wanted },
                "{text}"
            );
        };
        let wanted = |protocol, port| Some(Wanted { protocol, port });
        to("192.0.2.1", None);
        to("192.0.2.1/icmp", wanted(Protocol::Icmp, None));
        to("192.0.2.1/TCP", wanted(Protocol::Tcp, None));
        to("192.0.2.1:443/tcp", wanted(Protocol::Tcp, Some(443)));
        to("192.0.2.1:53/udp", wanted(Protocol::Udp, Some(53)));
        let to = destination("[2001:db8::1]:53/udp").unwrap();
        assert_eq!((to.ip, to.wanted.unwrap().port), (ip("2001:db8::1"), Some(53)));
    }

    #[test]
    fn what_is_wrong_is_said_with_a_hint() {
        for (text, part) in [
            ("10.9.0", "is no address"),
            ("10.9.0.2:70000", "is no address"),
            ("10.9.0.2:0", "port 0; write `10.9.0.2`"),
            ("10.9.0.0/24", "has a `/`; write one address"),
            ("fe80::1%3", "is no address"),
            ("[fe80::1%3]:4", "is no address"),
        ] {
            let error = source(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        for (text, part) in [
            ("192.0.2.1:443", "write `192.0.2.1:443/tcp`"),
            ("192.0.2.0/24", "`24` is none of tcp, udp and icmp"),
            ("192.0.2.1:1/icmp", "write `192.0.2.1/icmp`"),
            ("example.org:1/tcp", "is no address"),
            ("", "is no address"),
        ] {
            let error = destination(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    /// Sums of all words: of what is finished it is all ones.
    fn sum(parts: &[&[u8]]) -> u16 {
        let mut sum = Checksum::default();
        for part in parts {
            sum = sum.bytes(part);
        }
        sum.finish()
    }

    #[test]
    fn packets_are_what_translation_takes_them_for() {
        let forms = [Form::First, Form::Reply, Form::Acknowledges { next: 7, wanted: 9 }];
        for (from, to) in
            [("10.9.0.2:40000", "192.0.2.1:443"), ("[fd09::2]:40000", "[2001:db8::1]:443")]
        {
            for (protocol, slots) in [
                (Protocol::Tcp, Slots::Tcp),
                (Protocol::Udp, Slots::Udp),
                (Protocol::Icmp, Slots::Echo),
            ] {
                for form in forms {
                    for more in [0, 1, 300] {
                        let (source, destination) = (from.parse().unwrap(), to.parse().unwrap());
                        let len = Sent::len_min(protocol, SocketAddr::ip(&destination)) + more;
                        let sent = Sent { protocol, source, destination, form, len };
                        let bytes = sent.bytes();
                        let tuple = Tuple::of(&bytes[..]).unwrap();
                        assert_eq!(tuple.slots(), Some(slots), "{sent:?}: {tuple:?}");
                        assert!(
                            bytes.len() == len && tuple.len as usize == len && tuple.has_checksum
                        );
                        let ends = ends(&bytes).unwrap();
                        assert_eq!((ends.0, ends.1.ip()), (source, destination.ip()));
                        let header = if source.is_ipv4() { IPV4_LEN } else { IPV6_LEN };
                        let (header, upper) = bytes.split_at(header);
                        if source.is_ipv4() {
                            assert_eq!(sum(&[header]), 0);
                        }
                        let number = protocol.number(source.ip());
                        let pseudo = if number == PROTOCOL_ICMP {
                            Checksum::default()
                        } else {
                            Checksum::pseudo(
                                source.ip(),
                                destination.ip(),
                                number,
                                upper.len() as u32,
                            )
                        };
                        assert_eq!(pseudo.bytes(upper).finish(), 0, "{sent:?}");
                    }
                }
            }
        }
    }
}
