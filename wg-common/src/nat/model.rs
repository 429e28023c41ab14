//! Packets as the RFCs draw them, with checksums from scratch: what the tests of this room compare with.

use proptest::prelude::*;

use crate::map::AddressKey;

/// How a packet's own checksum stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Finish {
    /// It covers all.
    Full,
    /// The pseudo-header's sum alone.
    Partial,
}

/// What is in an IP packet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Content {
    Tcp { ports: [u16; 2], middle: [u8; 12], rest: Vec<u8> },
    Udp { ports: [u16; 2], has_checksum: bool, data: Vec<u8> },
    Echo { is_request: bool, id: u16, data: Vec<u8> },
    Error { kind: u8, code: u8, rest: [u8; 4], quoted: Box<Packet>, quoted_len: usize },
    Later { protocol: u8, data: Vec<u8> },
}

/// A packet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Packet {
    /// From and to whom: of four or sixteen bytes.
    pub addresses: [Vec<u8>; 2],
    pub tos: u8,
    pub ttl: u8,
    pub id: u32,
    /// Offset in units of eight bytes, and whether more follow.
    pub fragment: Option<(u16, bool)>,
    pub dont_fragment: bool,
    pub content: Content,
}

/// One word after the other, with end-around carry.
pub fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for pair in parts.concat().chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

impl Packet {
    pub fn is_v4(&self) -> bool {
        self.addresses[0].len() == 4
    }

    pub fn key(&self, end: usize) -> AddressKey {
        key(&self.addresses[end])
    }

    pub fn protocol(&self) -> u8 {
        match &self.content {
            Content::Tcp { .. } => 6,
            Content::Udp { .. } => 17,
            Content::Echo { .. } | Content::Error { .. } if self.is_v4() => 1,
            Content::Echo { .. } | Content::Error { .. } => 58,
            Content::Later { protocol, .. } => *protocol,
        }
    }

    /// Source and destination port, or an echo's identifier twice.
    pub fn ports(&self) -> [u16; 2] {
        match &self.content {
            Content::Tcp { ports, .. } | Content::Udp { ports, .. } => *ports,
            Content::Echo { id, .. } => [*id; 2],
            _ => [0; 2],
        }
    }

    /// The same with another end.
    pub fn with(mut self, end: usize, address: &[u8], port: u16) -> Self {
        self.addresses[end] = address.to_vec();
        match &mut self.content {
            Content::Tcp { ports, .. } | Content::Udp { ports, .. } => ports[end] = port,
            Content::Echo { id, .. } => *id = port,
            Content::Error { .. } | Content::Later { .. } => {}
        }
        self
    }

    fn pseudo(&self, len: usize) -> Vec<u8> {
        let addresses = self.addresses.concat();
        [&addresses[..], &(len as u32).to_be_bytes(), &[0, 0, 0, self.protocol()]].concat()
    }

    fn upper(&self, finish: Finish) -> Vec<u8> {
        let (mut upper, field) = match &self.content {
            Content::Later { data, .. } => return data.clone(),
            Content::Tcp { ports, middle, rest } => {
                let ports = ports.map(u16::to_be_bytes).concat();
                ([&ports[..], &middle[..], &[0; 4], rest].concat(), 16)
            }
            Content::Udp { ports, data, .. } => {
                let head = [ports[0], ports[1], 8 + data.len() as u16, 0];
                ([&head.map(u16::to_be_bytes).concat()[..], data].concat(), 6)
            }
            Content::Echo { is_request, id, data } => {
                let kind = match (self.is_v4(), is_request) {
                    (true, true) => 8,
                    (true, false) => 0,
                    (false, true) => 128,
                    (false, false) => 129,
                };
                let [high, low] = id.to_be_bytes();
                ([&[kind, 0, 0, 0, high, low, 0, 1], &data[..]].concat(), 2)
            }
            Content::Error { kind, code, rest, quoted, quoted_len } => {
                let mut quotation = quoted.bytes(Finish::Full);
                quotation.truncate(*quoted_len);
                ([&[*kind, *code, 0, 0], &rest[..], &quotation].concat(), 2)
            }
        };
        if let Content::Udp { has_checksum: false, .. } = self.content {
            return upper;
        }
        let pseudo = if self.protocol() == 1 { Vec::new() } else { self.pseudo(upper.len()) };
        let mut checksum = match finish {
            Finish::Full => !sum(&[&pseudo, &upper]),
            Finish::Partial => sum(&[&pseudo]),
        };
        if checksum == 0 && self.protocol() == 17 {
            checksum = 0xffff;
        }
        upper[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
        upper
    }

    pub fn bytes(&self, finish: Finish) -> Vec<u8> {
        let upper = self.upper(finish);
        let [source, destination] = &self.addresses;
        let (offset, more) = self.fragment.unwrap_or_default();
        if self.is_v4() {
            let word = u16::from(self.dont_fragment) << 14 | u16::from(more) << 13 | offset;
            let total = (20 + upper.len() as u16).to_be_bytes();
            let id = (self.id as u16).to_be_bytes();
            let start = [&[0x45, self.tos], &total[..], &id, &word.to_be_bytes()].concat();
            let mut header =
                [&start, &[self.ttl, self.protocol(), 0, 0][..], source, destination].concat();
            let checksum = !sum(&[&header]);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            return [header, upper].concat();
        }
        let word = offset << 3 | u16::from(more);
        let fragment = [&[self.protocol(), 0][..], &word.to_be_bytes(), &self.id.to_be_bytes()];
        let fragment = if self.fragment.is_some() { fragment.concat() } else { Vec::new() };
        let next = if self.fragment.is_some() { 44 } else { self.protocol() };
        let len = ((fragment.len() + upper.len()) as u16).to_be_bytes();
        let class = (0x6000 | u16::from(self.tos) << 4).to_be_bytes();
        let start = [&class[..], &[0, 0], &len, &[next, self.ttl]].concat();
        [&start[..], source, destination, &fragment, &upper].concat()
    }
}

pub fn key(address: &[u8]) -> AddressKey {
    match address.len() {
        4 => AddressKey::v4(address.try_into().unwrap()),
        _ => AddressKey::v6(address.try_into().unwrap()),
    }
}

/// An address; one of IPv6 that is not a mapped one.
pub fn address(is_v4: bool) -> BoxedStrategy<Vec<u8>> {
    let ordinary = prop::collection::vec(any::<u8>(), if is_v4 { 4 } else { 16 });
    // Sums of many ones and zeros come to their ends.
    let extreme = prop_oneof![Just(0_u8), Just(0xff)];
    let len = if is_v4 { 4 } else { 16 };
    let extreme = prop::collection::vec(extreme, len);
    prop_oneof![4 => ordinary, 1 => extreme]
        .prop_filter("no mapped address", move |octets| is_v4 || octets[..10] != [0; 10])
        .boxed()
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..60),
        prop::collection::vec(prop_oneof![Just(0_u8), Just(0xff)], 0..60),
    ]
}

fn single() -> impl Strategy<Value = Content> {
    prop_oneof![
        (any::<[u16; 2]>(), any::<[u8; 12]>(), data())
            .prop_map(|(ports, middle, rest)| Content::Tcp { ports, middle, rest }),
        (any::<[u16; 2]>(), any::<bool>(), data())
            .prop_map(|(ports, has_checksum, data)| Content::Udp { ports, has_checksum, data }),
        (any::<bool>(), any::<u16>(), data()).prop_map(|(is_request, id, data)| Content::Echo {
            is_request,
            id,
            data
        }),
    ]
}

fn around(is_v4: bool, content: impl Strategy<Value = Content>) -> impl Strategy<Value = Packet> {
    let numbers = (any::<u8>(), any::<u8>(), any::<u32>(), any::<bool>());
    ([address(is_v4), address(is_v4)], numbers, content).prop_map(
        move |(addresses, (tos, ttl, id, dont_fragment), content)| Packet {
            addresses,
            tos,
            ttl,
            // IPv4 has sixteen bits for it.
            id: if is_v4 { id & 0xffff } else { id },
            fragment: None,
            dont_fragment,
            content,
        },
    )
}

/// A whole packet or a first fragment of TCP, UDP or an echo.
pub fn packet(is_v4: bool) -> BoxedStrategy<Packet> {
    let fragment = prop_oneof![3 => Just(None), 1 => Just(Some((0, true)))];
    (around(is_v4, single()), fragment)
        .prop_map(|(packet, fragment)| Packet { fragment, ..packet })
        .boxed()
}

/// A fragment other than the first.
pub fn later(is_v4: bool) -> BoxedStrategy<Packet> {
    let protocol = prop_oneof![Just(6_u8), Just(17), Just(1), Just(58)];
    let content = (protocol, data()).prop_map(|(protocol, data)| Content::Later { protocol, data });
    (around(is_v4, content), 2_u16..0x2000, any::<bool>())
        .prop_map(|(packet, offset, more)| Packet { fragment: Some((offset, more)), ..packet })
        .boxed()
}

/// An ICMP error about such a packet, of which it quotes at least eight bytes behind the headers.
pub fn error(is_v4: bool) -> BoxedStrategy<Packet> {
    let kind = prop::sample::select(if is_v4 { &[3_u8, 11, 12][..] } else { &[1, 2, 3, 4] });
    let content = (kind, any::<u8>(), any::<[u8; 4]>(), packet(is_v4), any::<u16>());
    let content = content.prop_map(move |(kind, code, rest, quoted, cut)| {
        let header = match (is_v4, quoted.fragment) {
            (true, _) => 20,
            (false, None) => 40,
            (false, Some(_)) => 48,
        };
        let least = header + 8;
        let most = quoted.bytes(Finish::Full).len();
        let mut quoted_len = least + usize::from(cut) % (most - least + 1);
        // Half a checksum is left as it is: who quotes that much cannot mean it to be compared.
        if matches!(quoted.content, Content::Tcp { .. }) && quoted_len == header + 17 {
            quoted_len += 1;
        }
        Content::Error { kind, code, rest, quoted: Box::new(quoted), quoted_len }
    });
    around(is_v4, content).boxed()
}
