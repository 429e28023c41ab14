//! What the file's lines mean on this host: the [`RuleSet`] that its programs follow.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use wg_common::headers::{PROTOCOL_TCP, PROTOCOL_UDP};
use wg_common::map::AddressKey;
use wg_common::nat::map::{
    ALLOW_RULES_LEN, AllowRule, EXTERNALS_LEN, External, FORWARD_RULES_LEN, ForwardRule,
    NAT_RULES_LEN, NICS_LEN, NatRule, Prefix, Protocol, RuleSet, rule_flags,
};

use super::Lines;
use crate::config::{Allow, Forward, Nat, NatSource, Traffic, Transport};

/// The IP protocol number by which an [`AllowRule`] names ICMP, and ICMPv6 as well.
const ICMP: u32 = 1;
/// Bits that are in the key of an IPv4 prefix beside its own.
const V4_BITS_BEFORE: u32 = 96;

/// A NIC that a line names, as it is at present.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Nic {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its addresses from which packets may leave, what the kernel would choose first. None of a link only.
    pub addresses: Vec<IpAddr>,
}

/// What is known of the host.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Facts {
    /// Index of the TUN device.
    pub tun: u32,
    /// The NICs that lines name, as far as they are there.
    pub nics: Vec<Nic>,
    /// The first port of each protocol's slots.
    pub port_first: u32,
}

impl Facts {
    fn nic(&self, name: &str) -> Option<&Nic> {
        self.nics.iter().find(|nic| nic.name == name)
    }
}

/// Why lines cannot be followed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RuleError {
    /// There are too many of a kind.
    #[error("{kind} take {count} rules, and there is room for {max}; write fewer")]
    TooMany {
        /// What they are.
        kind: &'static str,
        /// How many they make.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// Two lines share some of their addresses on a NIC, not all: a port there would have two owners.
    #[error(
        "two `#! Nat` lines for {nic} both name {address}, and differ in other addresses; write the same `to=` \
         in both, or none of the addresses twice"
    )]
    SharedAddress {
        /// The NIC.
        nic: String,
        /// The first address that is in both.
        address: IpAddr,
    },
}

impl RuleError {
    fn unless(count: usize, max: usize, kind: &'static str) -> Result<(), Self> {
        if count <= max { Ok(()) } else { Err(Self::TooMany { kind, count, max }) }
    }
}

impl Lines {
    /// The NICs that are named, each once, in the order of their names.
    pub fn nics(&self) -> BTreeSet<&str> {
        let nat = self.nat.iter().map(|line| line.out.value.as_str());
        nat.chain(self.forward.iter().map(|line| line.interface.value.as_str())).collect()
    }

    /// Looks whether the lines can be followed on a host whose NICs have an address of each family.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), RuleError> {
        RuleError::unless(self.nics().len(), NICS_LEN, "the NICs of `#! Nat` and `#! Forward`")?;
        let mut facts = Facts { tun: 1, nics: Vec::new(), port_first: 0 };
        for (number, name) in self.nics().into_iter().enumerate() {
            let number = number as u32;
            // Of a network that is for documents, so that no line names them.
            let v4 = IpAddr::V4(Ipv4Addr::from_bits(0xcb00_7100 + number));
            let v6 = IpAddr::V6(Ipv6Addr::from_bits((0x2001_0db8 << 96) + u128::from(number)));
            facts.nics.push(Nic {
                name: name.to_owned(),
                index: number + 2,
                addresses: vec![v4, v6],
            });
        }
        RuleBook::default().rule_set(self, &facts).map(drop)
    }
}

/// Addresses that a rule may give, all of one family and NIC.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Pool {
    nic: u32,
    is_v4: bool,
    /// The file's addresses; none: the NIC's own.
    fixed: Vec<IpAddr>,
}

impl Pool {
    fn len(&self) -> usize {
        self.fixed.len().max(1)
    }
}

/// Makes rule sets, one after the other: each external address keeps its place, and the ports of that place, as
/// long as lines ask for it.
#[derive(Clone, Debug, Default)]
pub struct RuleBook {
    version: u32,
    places: [Place; EXTERNALS_LEN],
}

/// A place in [`RuleSet::externals`].
#[derive(Clone, Debug, Default)]
struct Place {
    /// For whom it is, and the how manieth of its addresses stands there.
    of: Option<(Pool, usize)>,
    address: Option<IpAddr>,
    /// Counts the addresses that stood here. One that goes and comes back was one, unless another one came in
    /// between.
    generation: u32,
    /// The latest one that stood here.
    latest: Option<(u32, IpAddr)>,
}

impl Place {
    fn take(&mut self, of: Option<(Pool, usize)>, address: Option<IpAddr>) {
        let now = of.as_ref().map(|(pool, _)| pool.nic).zip(address);
        if now.is_some() && now != self.latest {
            self.generation = self.generation.wrapping_add(1);
            self.latest = now;
        }
        (self.of, self.address) = (of, address);
    }
}

impl RuleBook {
    /// The rule set that follows the one before. Nothing is changed by an error.
    ///
    /// A rule whose NIC has no address at present stays, with no external address: its packets are dropped. One
    /// whose NIC is not there is left out: no packet leaves by that.
    ///
    /// # Errors
    /// Why the lines cannot be followed.
    pub fn rule_set(&mut self, lines: &Lines, facts: &Facts) -> Result<Box<RuleSet>, RuleError> {
        let mut rules = empty();
        let mut next = self.clone();
        next.version = next.version.wrapping_add(1);
        next.make_places(&pools(lines, facts)?, facts)?;
        (rules.version, rules.tun, rules.port_first) = (next.version, facts.tun, facts.port_first);
        let nat = next.nat_rules(lines, facts);
        fill(&mut rules.nat, &mut rules.nat_count, nat, "`#! Nat` lines")?;
        let forward = lines.forward.iter().flat_map(|line| forward_rules(line, facts)).collect();
        fill(&mut rules.forward, &mut rules.forward_count, forward, "`#! Forward` lines")?;
        let allow = lines.allow.iter().enumerate();
        let allow = allow.flat_map(|(number, line)| allow_rules(line, number as u32)).collect();
        fill(&mut rules.allow, &mut rules.allow_count, allow, "`#! Allow` lines")?;
        if !lines.allow.is_empty() {
            rules.flags |= rule_flags::DENY;
        }
        for (external, place) in rules.externals.iter_mut().zip(&next.places) {
            *external = External {
                address: place.address.map_or(AddressKey([0; 4]), AddressKey::from),
                nic: place.of.as_ref().map_or(0, |(pool, _)| pool.nic),
                generation: place.generation,
            };
        }
        let used = next.places.iter().rposition(|place| place.of.is_some());
        rules.external_count = used.map_or(0, |last| last as u32 + 1);
        *self = next;
        Ok(rules)
    }

    /// Gives each pool its places: those it had, or else the first that are free.
    fn make_places(&mut self, pools: &[Pool], facts: &Facts) -> Result<(), RuleError> {
        let count = pools.iter().map(Pool::len).sum();
        RuleError::unless(count, EXTERNALS_LEN, "the external addresses of `#! Nat` lines")?;
        let is_kept =
            |place: &Place| place.of.as_ref().is_some_and(|(pool, _)| pools.contains(pool));
        let mut taken: Vec<bool> = self.places.iter().map(is_kept).collect();
        let mut firsts = Vec::new();
        for pool in pools {
            let had = self.first_of(pool);
            let first = had.or_else(|| {
                (0..=taken.len() - pool.len())
                    .find(|&at| !taken[at..at + pool.len()].contains(&true))
            });
            let Some(first) = first else {
                // What is free is in pieces: everybody moves, and flows end.
                firsts.clear();
                for pool in pools.iter().rev() {
                    firsts
                        .push(pools.iter().take_while(|other| *other != pool).map(Pool::len).sum());
                }
                firsts.reverse();
                break;
            };
            taken[first..first + pool.len()].fill(true);
            firsts.push(first);
        }
        let mut of: [Option<(Pool, usize)>; EXTERNALS_LEN] = Default::default();
        for (pool, first) in pools.iter().zip(firsts) {
            for number in 0..pool.len() {
                of[first + number] = Some((pool.clone(), number));
            }
        }
        for (place, of) in self.places.iter_mut().zip(of) {
            let address = of.as_ref().and_then(|(pool, number)| match pool.fixed.get(*number) {
                Some(&address) => Some(address),
                // The ports of an address that another line names have one owner.
                None => own_address(facts, pool.nic, pool.is_v4)
                    .filter(|own| !is_fixed(pools, pool.nic, *own)),
            });
            place.take(of, address);
        }
        Ok(())
    }

    fn first_of(&self, pool: &Pool) -> Option<usize> {
        self.places.iter().position(|place| {
            place.of.as_ref().is_some_and(|(of, number)| of == pool && *number == 0)
        })
    }

    fn nat_rules(&self, lines: &Lines, facts: &Facts) -> Vec<NatRule> {
        let mut rules = Vec::new();
        for line in &lines.nat {
            let Some(nic) = facts.nic(&line.out) else { continue };
            for is_v4 in [true, false] {
                let Some(pool) = pool(line, nic.index, is_v4) else { continue };
                let (first, count) = self.externals_of(&pool, facts);
                rules.push(NatRule {
                    from: prefix(from(line, is_v4)),
                    out: nic.index,
                    external_first: first,
                    external_count: count,
                });
            }
        }
        rules
    }

    /// Where a pool's addresses are, and how many it has.
    fn externals_of(&self, pool: &Pool, facts: &Facts) -> (u32, u32) {
        if pool.fixed.is_empty()
            && let Some(own) = own_address(facts, pool.nic, pool.is_v4)
            && let Some(place) = self.places.iter().position(|place| place.is_fixed(pool.nic, own))
        {
            // Another line names the NIC's own address: its ports have one owner.
            return (place as u32, 1);
        }
        let Some(first) = self.first_of(pool) else { return (0, 0) };
        let is_there = self.places[first].address.is_some();
        (first as u32, if is_there { pool.len() as u32 } else { 0 })
    }
}

impl Place {
    /// Whether an address stands here because a line names it.
    fn is_fixed(&self, nic: u32, address: IpAddr) -> bool {
        self.address == Some(address)
            && self.of.as_ref().is_some_and(|(pool, _)| pool.nic == nic && !pool.fixed.is_empty())
    }
}

/// An empty rule set.
pub fn empty() -> Box<RuleSet> {
    let address = AddressKey([0; 4]);
    let none = Prefix::new(address, 0);
    let (nat, forward, allow, external) = (
        NatRule { from: none, out: 0, external_first: 0, external_count: 0 },
        ForwardRule { external: address, to: address, nic: 0, port: 0, to_port: 0, protocol: 0 },
        AllowRule { from: none, to: none, protocol: 0, port_first: 0, port_last: 0, counter: 0 },
        External { address, nic: 0, generation: 0 },
    );
    Box::new(RuleSet {
        version: 0,
        tun: 0,
        port_first: 0,
        flags: 0,
        nat_count: 0,
        forward_count: 0,
        allow_count: 0,
        external_count: 0,
        nat: [nat; NAT_RULES_LEN],
        forward: [forward; FORWARD_RULES_LEN],
        allow: [allow; ALLOW_RULES_LEN],
        externals: [external; EXTERNALS_LEN],
    })
}

/// The addresses that lines ask for, each pool once.
fn pools(lines: &Lines, facts: &Facts) -> Result<Vec<Pool>, RuleError> {
    let mut pools: Vec<Pool> = Vec::new();
    for line in &lines.nat {
        let Some(nic) = facts.nic(&line.out) else { continue };
        for pool in [true, false].into_iter().filter_map(|is_v4| pool(line, nic.index, is_v4)) {
            if pools.contains(&pool) {
                continue;
            }
            let others = pools.iter().filter(|other| other.nic == pool.nic);
            let shared = others.flat_map(|other| &other.fixed).find(|at| pool.fixed.contains(at));
            if let Some(&address) = shared {
                return Err(RuleError::SharedAddress { nic: nic.name.clone(), address });
            }
            pools.push(pool);
        }
    }
    Ok(pools)
}

/// The addresses that a line has for packets of a family, if it has any: `masquerade` without `from=` is of
/// IPv4 only.
fn pool(line: &Nat, nic: u32, is_v4: bool) -> Option<Pool> {
    if line.from.as_ref().is_some_and(|from| from.addr().is_ipv4() != is_v4) {
        return None;
    }
    match &line.source {
        NatSource::Masquerade if is_v4 || line.from.is_some() => {
            Some(Pool { nic, is_v4, fixed: Vec::new() })
        }
        NatSource::Masquerade => None,
        NatSource::Snat(to) => {
            let fixed: Vec<IpAddr> =
                to.iter().map(|to| to.value).filter(|to| to.is_ipv4() == is_v4).collect();
            (!fixed.is_empty()).then_some(Pool { nic, is_v4, fixed })
        }
    }
}

/// Whether a line names an address for a NIC.
fn is_fixed(pools: &[Pool], nic: u32, address: IpAddr) -> bool {
    pools.iter().any(|pool| pool.nic == nic && pool.fixed.contains(&address))
}

/// Whose packets a line is about, of a family.
fn from(line: &Nat, is_v4: bool) -> IpNet {
    match &line.from {
        Some(from) => from.value,
        None if is_v4 => Ipv4Net::default().into(),
        None => Ipv6Net::default().into(),
    }
}

fn own_address(facts: &Facts, nic: u32, is_v4: bool) -> Option<IpAddr> {
    let nic = facts.nics.iter().find(|of| of.index == nic)?;
    nic.addresses.iter().copied().find(|address| address.is_ipv4() == is_v4)
}

fn forward_rules(line: &Forward, facts: &Facts) -> Vec<ForwardRule> {
    let Some(nic) = facts.nic(&line.interface) else { return Vec::new() };
    let to: SocketAddr = line.to.value;
    let of_family = nic.addresses.iter().filter(|address| address.is_ipv4() == to.is_ipv4());
    let rule = |&external: &IpAddr| ForwardRule {
        external: external.into(),
        to: to.ip().into(),
        nic: nic.index,
        port: line.port.value.to_be(),
        to_port: to.port().to_be(),
        protocol: match line.transport.value {
            Transport::Tcp => Protocol::Tcp as u32,
            Transport::Udp => Protocol::Udp as u32,
        },
    };
    of_family.map(rule).collect()
}

/// One rule of a line for each range of ports.
fn allow_rules(line: &Allow, counter: u32) -> Vec<AllowRule> {
    let rule = |protocol, port_first, port_last| AllowRule {
        from: prefix(line.from.value),
        to: prefix(line.to.value),
        protocol,
        port_first,
        port_last,
        counter,
    };
    let number = |transport| match transport {
        Transport::Tcp => u32::from(PROTOCOL_TCP),
        Transport::Udp => u32::from(PROTOCOL_UDP),
    };
    match &line.traffic {
        Traffic::All => vec![rule(0, 0, u16::MAX)],
        Traffic::Icmp => vec![rule(ICMP, 0, u16::MAX)],
        Traffic::To(transport, ports) if ports.is_empty() => {
            vec![rule(number(transport.value), 0, u16::MAX)]
        }
        Traffic::To(transport, ports) => {
            let rule = |range: &crate::config::PortRange| {
                rule(number(transport.value), range.first, range.last)
            };
            ports.iter().map(|ports| rule(&ports.value)).collect()
        }
    }
}

fn prefix(net: IpNet) -> Prefix {
    let before = if net.addr().is_ipv4() { V4_BITS_BEFORE } else { 0 };
    Prefix::new(net.network().into(), before + u32::from(net.prefix_len()))
}

fn fill<T: Copy, const N: usize>(
    table: &mut [T; N],
    count: &mut u32,
    rules: Vec<T>,
    kind: &'static str,
) -> Result<(), RuleError> {
    RuleError::unless(rules.len(), N, kind)?;
    *count = rules.len() as u32;
    table[..rules.len()].copy_from_slice(&rules);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn lines(text: &str) -> Lines {
        let (directives, _) = config::directives("wg0.conf", &format!("[Interface]\n{text}"));
        Lines::of_directives(&directives)
    }

    fn len(prefix: &Prefix) -> u32 {
        prefix.mask.0.iter().map(|word| word.count_ones()).sum()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn facts(nics: &[(&str, u32, &[&str])]) -> Facts {
        let nics = nics.iter().map(|&(name, index, addresses)| Nic {
            name: name.to_owned(),
            index,
            addresses: addresses.iter().map(|address| ip(address)).collect(),
        });
        Facts { tun: 9, nics: nics.collect(), port_first: 4096 }
    }

    fn externals(rules: &RuleSet) -> Vec<(AddressKey, u32)> {
        let used = &rules.externals[..rules.external_count as usize];
        used.iter().map(|external| (external.address, external.generation)).collect()
    }

    fn nat(rules: &RuleSet) -> Vec<(u32, u32, u32, u32)> {
        let used = rules.nat[..rules.nat_count as usize].iter();
        used.map(|rule| (len(&rule.from), rule.out, rule.external_first, rule.external_count))
            .collect()
    }

    #[test]
    fn masquerade_takes_the_first_address_of_the_family_and_ipv6_only_when_asked() {
        let host = facts(&[("eth0", 3, &["192.0.2.1", "192.0.2.2", "2001:db8::1"])]);
        let mut book = RuleBook::default();
        let rules = book.rule_set(&lines("#! Nat = masquerade out=eth0"), &host).unwrap();
        assert_eq!((rules.version, rules.tun, rules.port_first, rules.flags), (1, 9, 4096, 0));
        assert_eq!(nat(&rules), [(96, 3, 0, 1)]);
        assert_eq!(rules.nat[0].from.address, ip("0.0.0.0").into());
        assert_eq!(externals(&rules), [(ip("192.0.2.1").into(), 1)]);

        let text = "#! Nat = masquerade out=eth0\n#! Nat = masquerade out=eth0 from=fd00:9::/64";
        let rules = book.rule_set(&lines(text), &host).unwrap();
        assert_eq!((rules.version, nat(&rules)), (2, vec![(96, 3, 0, 1), (64, 3, 1, 1)]));
        assert_eq!(externals(&rules), [(ip("192.0.2.1").into(), 1), (ip("2001:db8::1").into(), 1)]);
    }

    #[test]
    fn snat_has_a_rule_for_each_family_of_its_addresses() {
        let host = facts(&[("eth0", 3, &["192.0.2.1"])]);
        let text = "#! Nat = snat out=eth0 to=198.51.100.1,2001:db8::5,198.51.100.2";
        let rules = RuleBook::default().rule_set(&lines(text), &host).unwrap();
        assert_eq!(nat(&rules), [(96, 3, 0, 2), (0, 3, 2, 1)]);
        let addresses: Vec<_> = externals(&rules).into_iter().map(|(address, _)| address).collect();
        assert_eq!(
            addresses,
            ["198.51.100.1", "198.51.100.2", "2001:db8::5"].map(|text| ip(text).into())
        );
    }

    #[test]
    fn external_addresses_keep_their_places() {
        let host =
            |wan: &'static [&'static str]| facts(&[("eth0", 3, &["192.0.2.1"]), ("wan", 4, wan)]);
        let both = lines("#! Nat = masquerade out=eth0\n#! Nat = masquerade out=wan");
        let wan = lines("#! Nat = masquerade out=wan");
        let mut book = RuleBook::default();
        let rules = book.rule_set(&both, &host(&["203.0.113.1"])).unwrap();
        let (eth0_is, wan_is) = (ip("192.0.2.1").into(), AddressKey::from(ip("203.0.113.1")));
        assert_eq!(externals(&rules), [(eth0_is, 1), (wan_is, 1)]);
        // The line before it is gone: it stays where it is.
        let rules = book.rule_set(&wan, &host(&["203.0.113.1"])).unwrap();
        assert_eq!(externals(&rules), [(AddressKey([0; 4]), 1), (wan_is, 1)]);
        assert_eq!(nat(&rules), [(96, 4, 1, 1)]);
        // It loses its address: packets are dropped, not passed.
        let rules = book.rule_set(&wan, &host(&[])).unwrap();
        assert_eq!((nat(&rules), externals(&rules)[1].1), (vec![(96, 4, 1, 0)], 1));
        // The same one comes back: it was one and the same all the time.
        let rules = book.rule_set(&wan, &host(&["203.0.113.1"])).unwrap();
        assert_eq!(externals(&rules)[1], (wan_is, 1));
        // Another one comes.
        let rules = book.rule_set(&wan, &host(&["203.0.113.9", "203.0.113.1"])).unwrap();
        assert_eq!(externals(&rules)[1], (ip("203.0.113.9").into(), 2));
        // Whose line comes back gets a place that is free, as what it was.
        let rules = book.rule_set(&both, &host(&["203.0.113.9"])).unwrap();
        assert_eq!(externals(&rules)[0], (eth0_is, 1));
        // The NIC is gone, and with it the way there.
        let rules = book.rule_set(&wan, &facts(&[])).unwrap();
        assert_eq!((rules.nat_count, rules.external_count), (0, 0));
    }

    #[test]
    fn places_in_pieces_are_put_together() {
        let host = facts(&[("eth0", 3, &[])]);
        let to = |first: u32, count: u32| {
            let addresses: Vec<String> =
                (first..first + count).map(|n| format!("198.51.100.{n}")).collect();
            format!("#! Nat = snat out=eth0 to={}\n", addresses.join(","))
        };
        let mut book = RuleBook::default();
        let four: String = [0, 10, 20, 30].iter().map(|&first| to(first, 4)).collect();
        book.rule_set(&lines(&four), &host).unwrap();
        let rules = book.rule_set(&lines(&(to(0, 4) + &to(20, 4) + &to(100, 8))), &host).unwrap();
        let firsts: Vec<u32> = nat(&rules).iter().map(|rule| rule.2).collect();
        assert_eq!(firsts, [0, 4, 8]);
        assert_eq!(rules.externals[4].generation, 2, "another address stands there");
        assert_eq!(rules.externals[0].generation, 1);
    }

    #[test]
    fn a_port_has_one_owner() {
        let host = facts(&[("eth0", 3, &["192.0.2.1"])]);
        // The NIC's own address is named, too.
        let text = "#! Nat = masquerade out=eth0 from=10.1.0.0/16\n\
                    #! Nat = snat out=eth0 to=192.0.2.9,192.0.2.1";
        let rules = RuleBook::default().rule_set(&lines(text), &host).unwrap();
        let own: AddressKey = ip("192.0.2.1").into();
        let places: Vec<_> =
            rules.externals.iter().filter(|external| external.address == own).collect();
        assert_eq!(places.len(), 1);
        let (_, _, first, count) = nat(&rules)[0];
        assert_eq!((rules.externals[first as usize].address, count), (own, 1));
        let shared = lines(
            "#! Nat = snat out=eth0 to=192.0.2.9,192.0.2.1 from=10.1.0.0/16\n\
             #! Nat = snat out=eth0 to=192.0.2.9",
        );
        let error = shared.check().unwrap_err();
        assert_eq!(
            error,
            RuleError::SharedAddress { nic: "eth0".into(), address: ip("192.0.2.9") }
        );
    }

    #[test]
    fn forwards_are_for_each_address_and_allows_for_each_range() {
        let host = facts(&[("eth0", 3, &["192.0.2.1", "2001:db8::1", "192.0.2.2"])]);
        let text = "#! Forward = udp eth0:8443 -> 10.9.0.2:443\n\
                    #! Allow = 10.9.0.0/24 -> 192.168.20.0/24 tcp 22,8000-8080\n\
                    #! Allow = fd00::/64 -> ::/0 icmp\n#! Allow = 0.0.0.0/0 -> 0.0.0.0/0";
        let rules = RuleBook::default().rule_set(&lines(text), &host).unwrap();
        let forward = &rules.forward[..rules.forward_count as usize];
        let to: Vec<AddressKey> = forward.iter().map(|rule| rule.external).collect();
        assert_eq!(to, ["192.0.2.1", "192.0.2.2"].map(|text| ip(text).into()));
        let ForwardRule { nic, port, to_port, protocol, .. } = forward[0];
        assert_eq!((nic, port, to_port, protocol), (3, 8443u16.to_be(), 443u16.to_be(), 1));
        let allow = rules.allow[..rules.allow_count as usize].iter();
        let allow: Vec<_> = allow
            .map(|rule| {
                (
                    len(&rule.from),
                    len(&rule.to),
                    rule.protocol,
                    rule.port_first,
                    rule.port_last,
                    rule.counter,
                )
            })
            .collect();
        assert_eq!(
            allow,
            [
                (120, 120, 6, 22, 22, 0),
                (120, 120, 6, 8000, 8080, 0),
                (64, 0, ICMP, 0, u16::MAX, 1),
                (96, 96, 0, 0, u16::MAX, 2),
            ]
        );
        assert_eq!(rules.flags, rule_flags::DENY);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        let many = |line: &str, count: usize| lines(&format!("{line}\n").repeat(count));
        let masquerade = "#! Nat = masquerade out=eth0";
        assert_eq!(many(masquerade, NAT_RULES_LEN).check(), Ok(()));
        let error = many(masquerade, NAT_RULES_LEN + 1).check().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`#! Nat` lines take 65 rules, and there is room for 64; write fewer"
        );
        let forward = "#! Forward = tcp eth0:80 -> 10.9.0.2:80";
        assert!(many(forward, FORWARD_RULES_LEN).check().is_ok());
        assert!(many(forward, FORWARD_RULES_LEN + 1).check().is_err());
        let allow = "#! Allow = 10.9.0.0/24 -> 192.168.20.0/24 tcp 22,24,26,28";
        assert!(many(allow, ALLOW_RULES_LEN / 4).check().is_ok());
        assert!(many(allow, ALLOW_RULES_LEN / 4 + 1).check().is_err());
        let nics: String = (0..17).map(|n| format!("#! Nat = masquerade out=e{n}\n")).collect();
        assert!(lines(&nics).check().is_err(), "more addresses than places");

        let host = facts(&[("eth0", 3, &["192.0.2.1"])]);
        let mut book = RuleBook::default();
        let before = book.rule_set(&lines(masquerade), &host).unwrap();
        book.rule_set(&many(allow, ALLOW_RULES_LEN), &host).unwrap_err();
        let after = book.rule_set(&lines(masquerade), &host).unwrap();
        assert_eq!(RuleSet { version: 2, ..*before }, *after);
    }
}
