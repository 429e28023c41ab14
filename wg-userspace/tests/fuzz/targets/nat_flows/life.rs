//! What befalls a gateway, as bytes tell it: rules, packets of hosts inside and outside, answers to what it sent and
//! errors about it, broken packets, slots that are taken back. Once the bytes have ended, they are zero.

use std::net::IpAddr;

use wg_common::headers::{PROTOCOL_TCP, PROTOCOL_UDP};
use wg_common::map::AddressKey;
use wg_common::nat::map::{
    ALLOW_RULES_LEN, AllowRule, EXTERNALS_LEN, External, FORWARD_RULES_LEN, ForwardRule,
    NAT_RULES_LEN, NatRule, Protocol, RuleSet, rule_flags,
};

use super::memory::{LISTENED, Place, key, prefix};
use super::packets::{ACK, Content, ICMP, ICMPV6, Packet, SYN, ends, right};

/// The first port of each ring, and how many there are.
pub const PORT_FIRST: u16 = 20_000;
pub const RING_LEN: u32 = 4;
/// The addresses that stand for others, and which of the NICs has them. The last one of IPv4 is the second NIC's.
pub const EXTERNALS: [(&str, usize); 4] =
    [("192.0.2.1", 0), ("192.0.2.9", 0), ("172.31.0.1", 1), ("2001:db8::1", 0)];

const V4: [&str; 12] = [
    "10.9.0.2",
    "10.9.0.3",
    "10.9.0.4",
    "203.0.113.9",
    "198.51.100.7",
    "172.31.5.5",
    "192.0.2.1",
    "192.0.2.9",
    "172.31.0.1",
    "10.8.0.2",
    "100.64.0.1",
    "224.0.0.9",
];
const V6: [&str; 12] = [
    "fd09::2",
    "fd09::3",
    "fd09::4",
    "2001:db8:9::9",
    "2001:db8:51::7",
    "2001:db8:31::5",
    "2001:db8::1",
    "fd09::1",
    "fe80::5",
    "fd08::2",
    "2001:db8:64::1",
    "ff02::9",
];
/// How many of each stand for whom, from the first on: hosts inside, then those outside.
const INSIDE: u8 = 3;
const OUTSIDE: u8 = 3;

/// What happens.
pub enum Step {
    Rules(Box<RuleSet>),
    /// A packet comes out of the tunnel, or by a NIC; `gso_size` as the kernel has it.
    Packet {
        nic: Option<usize>,
        bytes: Vec<u8>,
        gso_size: u32,
    },
    /// Control takes a slot back, and its port is free again.
    Ends {
        ring: u32,
        port: u32,
    },
}

/// A life.
pub struct Life<'a> {
    script: &'a [u8],
    place: Place,
    version: u32,
    /// What was sent, and whether it went out of a NIC.
    sent: Vec<(bool, Vec<u8>)>,
}

/// Rules that say nothing.
pub fn no_rules(place: Place, version: u32) -> Box<RuleSet> {
    let nowhere = prefix("::", 128);
    let none = AddressKey([0; 4]);
    Box::new(RuleSet {
        version,
        tun: place.tun,
        port_first: PORT_FIRST.into(),
        flags: 0,
        nat_count: 0,
        forward_count: 0,
        allow_count: 0,
        external_count: 0,
        nat: [NatRule { from: nowhere, out: 0, external_first: 0, external_count: 0 };
            NAT_RULES_LEN],
        forward: [ForwardRule {
            external: none,
            to: none,
            nic: 0,
            port: 0,
            to_port: 0,
            protocol: 0,
        }; FORWARD_RULES_LEN],
        allow: [AllowRule {
            from: nowhere,
            to: nowhere,
            protocol: 0,
            port_first: 0,
            port_last: 0,
            counter: 0,
        }; ALLOW_RULES_LEN],
        externals: [External { address: none, nic: 0, generation: 0 }; EXTERNALS_LEN],
    })
}

impl<'a> Life<'a> {
    pub fn new(script: &'a [u8], place: Place) -> Self {
        Self { script, place, version: 0, sent: Vec::new() }
    }

    /// The next step; none when the script has ended. The first ones are rules.
    pub fn next(&mut self) -> Option<Step> {
        if self.script.is_empty() {
            return None;
        }
        if self.version == 0 {
            return Some(Step::Rules(self.rules()));
        }
        Some(match self.byte() {
            0..8 => Step::Rules(self.rules()),
            8..20 => {
                let (ring, port) = (u32::from(self.byte()), u32::from(self.byte()));
                Step::Ends { ring: ring % (3 * EXTERNALS.len() as u32), port: port % RING_LEN }
            }
            20..90 if !self.sent.is_empty() => self.answer(),
            90..130 if !self.sent.is_empty() => self.error(),
            _ => self.packet(),
        })
    }

    /// Says that a packet was sent out of a NIC or into the tunnel.
    pub fn sent(&mut self, goes_out: bool, bytes: Vec<u8>) {
        self.sent.push((goes_out, bytes));
    }

    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.script.split_first() else { return 0 };
        self.script = rest;
        *first
    }

    fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::from(self.byte()) % from.len()]
    }

    /// A bit of the next byte is set: once in so many times.
    fn one_in(&mut self, count: u8) -> bool {
        self.byte() % count == 1
    }

    fn rules(&mut self) -> Box<RuleSet> {
        self.version += 1;
        let mut rules = no_rules(self.place, self.version);
        let flags = self.byte();
        if flags & 0b1001 == 1 {
            rules.flags = rule_flags::DENY;
        }
        rules.external_count = EXTERNALS.len() as u32;
        for (external, (address, nic)) in rules.externals.iter_mut().zip(EXTERNALS) {
            if !self.one_in(16) {
                let nic = self.place.nics[nic];
                *external = External { address: key(address), nic, generation: 0 };
            }
        }
        let nat_count = [0, 2, 3, 4][usize::from(flags >> 1 & 3)];
        rules.nat_count = nat_count as u32;
        for rule in &mut rules.nat[..nat_count] {
            // Whose, by which NIC, from which external address on, and how many of them.
            let choice = [
                ("0.0.0.0", 0, 0, 0, 2),
                ("::", 0, 0, 3, 1),
                ("10.9.0.0", 24, 0, 0, 1),
                ("0.0.0.0", 0, 0, 0, 2),
                ("fd09::", 64, 0, 3, 1),
                ("10.9.0.2", 32, 0, 1, 1),
                ("10.9.0.0", 24, 1, 2, 1),
                ("fd09::", 64, 0, 3, 1),
                ("10.9.0.2", 31, 0, 0, 0),
            ];
            let (from, len, nic, external_first, external_count) = self.choose(&choice);
            let out = self.place.nics[nic];
            *rule = NatRule { from: prefix(from, len), out, external_first, external_count };
        }
        rules.forward_count = u32::from(flags >> 3 & 3);
        for rule in &mut rules.forward[..usize::from(flags >> 3 & 3)] {
            let (external, nic, to) = self.choose(&[
                ("192.0.2.1", 0, "10.9.0.3"),
                ("2001:db8::1", 0, "fd09::3"),
                ("192.0.2.9", 0, "10.9.0.4"),
                ("172.31.0.1", 1, "10.9.0.3"),
            ]);
            let (port, to_port) = self.choose(&[(8080, 80), (53, 53), (PORT_FIRST + 2, 80)]);
            *rule = ForwardRule {
                external: key(external),
                to: key(to),
                nic: self.place.nics[nic],
                port: u16::to_be(port),
                to_port: u16::to_be(to_port),
                protocol: self.choose(&[Protocol::Tcp as u32, Protocol::Udp as u32]),
            };
        }
        rules.allow_count = u32::from(flags >> 5 & 3);
        for rule in &mut rules.allow[..usize::from(flags >> 5 & 3)] {
            let prefixes = [
                ["0.0.0.0", "0.0.0.0"],
                ["fd09::", "::"],
                ["10.9.0.2", "0.0.0.0"],
                ["fd09::2", "::"],
                ["203.0.113.9", "10.9.0.3"],
                ["10.9.0.2", "10.9.0.3"],
                ["fd09::2", "2001:db8:9::9"],
            ];
            let [from, to] = self.choose(&prefixes).map(|address| {
                let len = match address {
                    "0.0.0.0" => 0,
                    "::" => 0,
                    "fd09::" => 64,
                    _ if address.contains(':') => 128,
                    _ => 32,
                };
                prefix(address, len)
            });
            let (port_first, port_last) =
                self.choose(&[(0, u16::MAX), (53, 53), (0, 4000), (80, 8080)]);
            *rule = AllowRule {
                from,
                to,
                protocol: self.choose(&[0, 0, 6, 17, 1, 58, 47]),
                port_first,
                port_last,
                counter: self.byte() as u32 % 4,
            };
        }
        rules
    }

    fn address(&mut self, is_v4: bool, of: std::ops::Range<u8>) -> IpAddr {
        let pool = if is_v4 { V4 } else { V6 };
        let from = &pool[usize::from(of.start)..usize::from(of.end)];
        self.choose(from).parse().expect("an address")
    }

    fn port(&mut self) -> u16 {
        let first = PORT_FIRST;
        self.choose(&[
            4000,
            53,
            8080,
            80,
            first,
            first,
            LISTENED,
            first + 2,
            first + 3,
            4001,
            0,
            19_999,
            u16::MAX,
        ])
    }

    fn content(&mut self, is_v4: bool) -> Content {
        let (source, destination) = (self.port(), self.port());
        let ports = [source, destination];
        let data = vec![self.byte(); self.choose(&[0, 1, 33, 4, 1380, 1473])];
        match self.byte() % 12 {
            0..4 => {
                let flags = self.choose(&[SYN, ACK, SYN | ACK, ACK | 1, 4, 0, 0xff]);
                Content::Tcp { ports, flags, data }
            }
            4..8 => Content::Udp { ports, has_checksum: !self.one_in(4), data },
            8..10 => Content::Echo { is_request: !self.one_in(4), id: source, data },
            10 => Content::Other { protocol: self.choose(&[47, 50, ICMP, ICMPV6, 0, 60]), data },
            _ => {
                let [from, to] = [self.address(is_v4, 0..12), self.address(is_v4, 0..12)];
                let content = Content::Udp { ports, has_checksum: true, data };
                let quoted = Packet::new(from, to, content).bytes();
                Content::Error { kind: [3, 1], rest: [0; 4], quoted }
            }
        }
    }

    /// A packet that has nothing to do with others, or by chance.
    fn packet(&mut self) -> Step {
        let choice = self.byte();
        let is_v4 = choice & 1 == 0;
        let nic = (choice & 2 != 0).then_some(usize::from(choice & 12 == 12));
        let outside = INSIDE..INSIDE + OUTSIDE;
        let (from, to) = match (choice >> 4, nic) {
            (0, _) => (self.address(is_v4, 0..12), self.address(is_v4, 0..12)),
            (1, Some(_)) => (self.address(is_v4, outside), self.address(is_v4, 0..INSIDE)),
            (_, Some(_)) => (self.address(is_v4, outside), self.address(is_v4, 6..9)),
            (1, None) => (self.address(is_v4, 0..INSIDE), self.address(is_v4, 0..9)),
            (_, None) => (self.address(is_v4, 0..INSIDE), self.address(is_v4, outside)),
        };
        let mut packet = Packet::new(from, to, self.content(is_v4));
        let odd = self.byte();
        packet.dont_fragment = odd & 1 != 0;
        match odd >> 1 & 15 {
            0 => packet.ttl = self.choose(&[1, 2, 0, 255]),
            1 | 2 => packet.fragment = Some((0, true)),
            3 | 4 => packet.fragment = Some((8 * u16::from(self.byte()), odd & 128 != 0)),
            5 => packet.options = Some((0, vec![0, 1, 4, 0, 0, 0])),
            _ => {}
        }
        if let (true, Some((_, options))) = (is_v4, &mut packet.options) {
            options.truncate(4);
        }
        if packet.fragment.is_some() {
            packet.id = u16::from(self.byte() % 4);
        }
        self.mutated(nic, packet.bytes())
    }

    /// An answer to what was sent.
    fn answer(&mut self) -> Step {
        let (went_out, mut bytes) = self.former();
        let (addresses, len, upper) = if bytes[0] >> 4 == 4 { (12, 4, 20) } else { (8, 16, 40) };
        // Sums stay what they are.
        for at in addresses..addresses + len {
            bytes.swap(at, at + len);
        }
        let protocol = bytes[if len == 4 { 9 } else { 6 }];
        match protocol {
            PROTOCOL_TCP | PROTOCOL_UDP if bytes.len() >= upper + 8 => {
                bytes.swap(upper, upper + 2);
                bytes.swap(upper + 1, upper + 3);
                if protocol == PROTOCOL_UDP && self.one_in(8) {
                    // By another port of the same host.
                    bytes[upper] ^= 1;
                }
            }
            ICMP | ICMPV6 if bytes.len() >= upper + 8 => {
                let (from, to) = match bytes[upper] {
                    8 => (8, 0),
                    128 => (128, 129),
                    kind => (kind, kind),
                };
                bytes[upper] = to;
                let sum = u16::from_be_bytes([bytes[upper + 2], bytes[upper + 3]]);
                let words = [!sum, !(u16::from(from) << 8), u16::from(to) << 8];
                let sum = !super::packets::sum(&[&words.map(u16::to_be_bytes).concat()]);
                bytes[upper + 2..upper + 4].copy_from_slice(&sum.to_be_bytes());
            }
            _ => {}
        }
        let nic = went_out.then_some(0);
        self.mutated(nic, bytes)
    }

    /// An ICMP error about what was sent.
    fn error(&mut self) -> Step {
        let (went_out, mut quoted) = self.former();
        let [from, to] = ends(&quoted).expect("what is sent has addresses");
        let is_v4 = from.is_ipv4();
        let cut = if self.one_in(4) { usize::from(self.byte()) } else { 1200 };
        quoted.truncate(cut);
        let sender = if self.one_in(2) { to } else { self.address(is_v4, 0..6) };
        let kind = match is_v4 {
            true => self.choose(&[[3, 3], [11, 0], [3, 4], [12, 0], [5, 0]]),
            false => self.choose(&[[1, 4], [3, 0], [2, 0], [4, 0], [137, 0]]),
        };
        let content = Content::Error { kind, rest: [0, 0, 5, 0], quoted };
        let mut error = Packet::new(sender, from, content);
        if self.one_in(16) {
            error.ttl = 1;
        }
        let nic = went_out.then_some(0);
        self.mutated(nic, error.bytes())
    }

    fn former(&mut self) -> (bool, Vec<u8>) {
        let back = usize::from(self.byte()) % self.sent.len();
        self.sent[self.sent.len() - 1 - back].clone()
    }

    /// The packet, now and then with some bytes changed, cut off or added.
    fn mutated(&mut self, nic: Option<usize>, mut bytes: Vec<u8>) -> Step {
        let choice = self.byte();
        if choice & 7 == 7 {
            for _ in 0..=choice >> 6 {
                let at = usize::from(self.byte()) % bytes.len();
                bytes[at] ^= self.byte();
            }
        }
        match choice >> 3 & 7 {
            6 if choice >= 128 => bytes.truncate(1 + usize::from(self.byte())),
            7 => bytes.extend(vec![0xee; usize::from(self.byte() % 32)]),
            _ => {}
        }
        let is_super = choice & 0x3f == 8 && bytes.len() > 200;
        let gso_size = if is_super { 100 + u32::from(self.byte()) * 6 } else { 0 };
        Step::Packet { nic, bytes, gso_size }
    }
}

/// Panics if a checksum that was right is none after the packet was changed.
pub fn check_sums(before: &[u8], after: &[u8]) {
    let now = right(after);
    let broken: Vec<_> = right(before).into_iter().filter(|sum| !now.contains(sum)).collect();
    assert!(broken.is_empty(), "{broken:?} became wrong\n{before:02x?}\n{after:02x?}");
}
