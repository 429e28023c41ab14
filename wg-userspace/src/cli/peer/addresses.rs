//! Which addresses of the interface's networks are free.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// A network that has no address left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Full(pub IpNet);

/// Networks out of which peers get addresses: of the interface's own addresses, each once. A network of
/// one address, or of link-local ones, has none to give.
pub fn networks(own: &[IpNet]) -> Vec<IpNet> {
    let mut networks: Vec<IpNet> = Vec::new();
    for net in own {
        let is_link_local = match net {
            IpNet::V4(net) => net.addr().is_link_local(),
            IpNet::V6(net) => net.addr().is_unicast_link_local(),
        };
        let is_covered = |known: &IpNet| known.contains(&net.trunc());
        if net.prefix_len() != net.max_prefix_len()
            && !is_link_local
            && !networks.iter().any(is_covered)
        {
            networks.retain(|known| !net.contains(known));
            networks.push(net.trunc());
        }
    }
    networks
}

/// The first address that is free in each of `networks`: not one of `own`, and in none of the networks
/// that are `taken`. Those that hold everything (/0) take nothing.
///
/// # Errors
/// The first network without one.
pub fn free(networks: &[IpNet], own: &[IpNet], taken: &[IpNet]) -> Result<Vec<IpAddr>, Full> {
    let hosts = own.iter().map(|net| IpNet::from(net.addr()));
    let taken = taken.iter().copied().filter(|net| net.prefix_len() != 0);
    let mut ranges: Vec<(bool, u128, u128)> = hosts.chain(taken).map(range).collect();
    ranges.sort_unstable();
    networks.iter().map(|network| first_free(*network, &ranges).ok_or(Full(*network))).collect()
}

/// Whether it is of IPv4, and its first and last address.
fn range(net: IpNet) -> (bool, u128, u128) {
    (matches!(net, IpNet::V4(_)), number(net.network()), number(net.broadcast()))
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// `ranges` are sorted.
fn first_free(network: IpNet, ranges: &[(bool, u128, u128)]) -> Option<IpAddr> {
    let (is_v4, mut next, mut last) = range(network);
    // A network of two has neither an address of its own nor one for all (RFC 3021, RFC 6164). The first
    // one of an IPv6 network means any of its routers (RFC 4291, 2.6.1); none means all.
    if network.max_prefix_len() - network.prefix_len() > 1 {
        next += 1;
        last -= u128::from(is_v4);
    }
    for &(_, from, to) in ranges.iter().filter(|range| range.0 == is_v4) {
        if from > next {
            break;
        }
        if to >= next {
            next = to.checked_add(1)?;
        }
    }
    let address = || match u32::try_from(next) {
        Ok(bits) if is_v4 => Ipv4Addr::from_bits(bits).into(),
        _ => IpAddr::V6(Ipv6Addr::from_bits(next)),
    };
    (next <= last).then(address)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn free_of(own: &[&str], taken: &[&str]) -> Result<Vec<String>, String> {
        let own = nets(own);
        let found = free(&networks(&own), &own, &nets(taken));
        let texts = |found: Vec<IpAddr>| found.iter().map(IpAddr::to_string).collect();
        found.map(texts).map_err(|full| full.0.to_string())
    }

    #[test]
    fn each_network_gives_the_first_that_is_free() {
        for (own, taken, expected) in [
            (&["10.9.0.1/24", "fd09::1/64"][..], &[][..], &["10.9.0.2", "fd09::2"][..]),
            (&["10.9.0.7/24"], &["10.9.0.1/32", "10.9.0.3/32"], &["10.9.0.2"]),
            (&["10.9.0.1/24"], &["10.9.0.0/28", "10.9.0.16/32", "10.9.0.3/32"], &["10.9.0.17"]),
            (&["10.9.0.1/24"], &["0.0.0.0/0", "::/0", "10.9.0.2/32"], &["10.9.0.3"]),
            (&["10.9.0.1/24", "10.9.0.2/24"], &[], &["10.9.0.3"]),
            (&["10.9.0.130/25", "10.9.0.1/24"], &[], &["10.9.0.2"]),
            (&["10.9.0.0/31"], &[], &["10.9.0.1"]),
            (&["10.9.0.1/32", "fd09::1/64"], &[], &["fd09::2"]),
            (&["fe80::1/64", "169.254.0.1/16"], &[], &[]),
            (&["255.255.255.253/29"], &["255.255.255.249/32"], &["255.255.255.250"]),
        ] {
            let expected: Vec<String> = expected.iter().map(|text| (*text).to_owned()).collect();
            assert_eq!(free_of(own, taken), Ok(expected), "{own:?} {taken:?}");
        }
    }

    #[test]
    fn a_network_without_room_is_named() {
        for (own, taken, full) in [
            (&["10.9.0.1/30"][..], &["10.9.0.2/32"][..], "10.9.0.0/30"),
            (&["fd09::1/64", "10.9.0.1/24"], &["10.9.0.0/24"], "10.9.0.0/24"),
            (&["10.9.0.1/24"], &["10.0.0.0/8"], "10.9.0.0/24"),
            (&["ffff::1/16"], &["ffff::/16"], "ffff::/16"),
            (&["255.255.255.253/30"], &["255.255.255.254/31"], "255.255.255.252/30"),
        ] {
            assert_eq!(free_of(own, taken), Err(full.to_owned()), "{own:?} {taken:?}");
        }
    }

    /// Slow and obvious.
    fn model(network: IpNet, own: &[IpNet], taken: &[IpNet]) -> Option<IpAddr> {
        let is_special = |address: &IpAddr| match network {
            IpNet::V4(net) if net.prefix_len() < 31 => {
                *address == net.network() || *address == net.broadcast()
            }
            IpNet::V6(net) if net.prefix_len() < 127 => *address == net.network(),
            _ => false,
        };
        let all: Vec<IpAddr> = match network {
            IpNet::V4(net) => {
                let (first, last) = (net.network().to_bits(), net.broadcast().to_bits());
                (first..=last).map(|bits| Ipv4Addr::from_bits(bits).into()).collect()
            }
            IpNet::V6(net) => {
                let (first, last) = (net.network().to_bits(), net.broadcast().to_bits());
                (first..=last).map(|bits| Ipv6Addr::from_bits(bits).into()).collect()
            }
        };
        let is_free = |address: &IpAddr| {
            !is_special(address)
                && own.iter().all(|net| net.addr() != *address)
                && !taken.iter().any(|net| net.prefix_len() != 0 && net.contains(address))
        };
        all.into_iter().find(is_free)
    }

    prop_compose! {
        /// Near each other, so that they meet.
        fn net()(is_v4 in any::<bool>(), low in any::<u8>(), len in 22u8..=32) -> IpNet {
            match is_v4 {
                true => IpNet::new(Ipv4Addr::new(10, 9, low / 100, low).into(), len).unwrap(),
                false => {
                    let address = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, (u16::from(low) / 100) << 8 | u16::from(low));
                    IpNet::new(address.into(), len + 96).unwrap()
                }
            }
        }
    }

    proptest! {
        #[test]
        fn it_is_the_first_that_nobody_has(
            own in vec(net(), 1..4),
            mut taken in vec(net(), 0..40),
            is_default in any::<bool>(),
        ) {
            taken.retain(|net| net.prefix_len() > 24 && net.prefix_len() != 120);
            if is_default {
                taken.extend(nets(&["0.0.0.0/0", "::/0"]));
            }
            let networks = networks(&own);
            // No two of them give the same.
            for (index, network) in networks.iter().enumerate() {
                let mut others = networks[..index].iter();
                prop_assert!(!others.any(|other| other.contains(network) || network.contains(other)));
            }
            let expected: Option<Vec<IpAddr>> =
                networks.iter().map(|network| model(*network, &own, &taken)).collect();
            let found = free(&networks, &own, &taken);
            if let Err(Full(network)) = found {
                prop_assert_eq!(model(network, &own, &taken), None);
            }
            prop_assert_eq!(found.ok(), expected);
        }
    }
}
