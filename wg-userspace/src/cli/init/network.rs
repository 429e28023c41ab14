//! Addresses inside the tunnel: which network, and who gets which of it.

use std::{
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rand_core::CryptoRng;

/// A network, or the decision to have none of that family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Choice<N>(pub Option<N>);

impl FromStr for Choice<Ipv4Net> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        choice(text, "10.9.0.0/24", |network| match network {
            IpNet::V4(network) => Some(network),
            IpNet::V6(_) => None,
        })
    }
}

impl FromStr for Choice<Ipv6Net> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        choice(text, "fd09::/64", |network| match network {
            IpNet::V6(network) => Some(network),
            IpNet::V4(_) => None,
        })
    }
}

fn choice<N>(
    text: &str,
    example: &str,
    of_family: impl Fn(IpNet) -> Option<N>,
) -> Result<Choice<N>, String> {
    if text.eq_ignore_ascii_case("none") {
        return Ok(Choice(None));
    }
    let network = network(text)?;
    of_family(network).map(|network| Choice(Some(network))).ok_or_else(|| {
        format!("`{text}` is of the other family; write one like {example}, or `none`")
    })
}

/// Reads a network that hosts can be in, without host bits.
///
/// # Errors
/// What is wrong with it, and what could be written instead.
pub fn network(text: &str) -> Result<IpNet, String> {
    let network: IpNet = text.trim().parse().map_err(|_| {
        format!("`{text}` is not a network: write an address, `/`, and the prefix's length")
    })?;
    let whole = network.trunc();
    if network != whole {
        return Err(format!("`{text}` is a host's address; its network is {whole}"));
    }
    let is_of_hosts = match network.addr() {
        // 0.0.0.0/8 is "this network", 240.0.0.0/4 is reserved.
        IpAddr::V4(first) => {
            first.octets()[0] != 0
                && !first.is_loopback()
                && !first.is_link_local()
                && first.octets()[0] < 224
        }
        // ::/8 has no hosts; fe80::/10 is the links' own, and ff00::/8 multicast.
        IpAddr::V6(first) => {
            let first = first.segments()[0];
            first >> 8 != 0 && first & 0xffc0 != 0xfe80 && first >> 8 != 0xff
        }
    };
    match is_of_hosts {
        true => Ok(network),
        false => Err(format!("{network} is not a network for hosts")),
    }
}

/// The networks of a tunnel; one of them at least.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Networks {
    /// Of IPv4.
    pub v4: Option<Ipv4Net>,
    /// Of IPv6.
    pub v6: Option<Ipv6Net>,
}

impl Networks {
    /// Each of them.
    pub fn each(&self) -> impl Iterator<Item = IpNet> {
        self.v4.map(IpNet::V4).into_iter().chain(self.v6.map(IpNet::V6))
    }

    /// Looks whether `count` ends have a place in them.
    ///
    /// # Errors
    /// The network that is too small.
    pub fn hold(&self, count: usize) -> Result<(), String> {
        let is_too_small = |network: &IpNet| host_count(network) < count as u128;
        match self.each().find(is_too_small) {
            None => Ok(()),
            Some(network) => Err(format!(
                "{network} has addresses for {} ends, and there are {count}",
                host_count(&network)
            )),
        }
    }

    /// The addresses of an end, with their networks' prefix lengths. Ends count from 0, and are no
    /// more than [`hold`](Networks::hold) allowed.
    pub fn addresses(&self, end: usize) -> Vec<IpNet> {
        let address = |network: IpNet| IpNet::new_assert(host(&network, end), network.prefix_len());
        self.each().map(address).collect()
    }

    /// The same as networks of one host: what others allow this end.
    pub fn hosts(&self, end: usize) -> Vec<IpNet> {
        self.each().map(|network| host(&network, end).into()).collect()
    }
}

/// A network of the site's own (RFC 4193): `fd`, 40 bits of chance, subnet 0.
pub fn unique_local(rng: &mut (impl CryptoRng + ?Sized)) -> Ipv6Net {
    let mut bytes = [0; 16];
    rng.fill_bytes(&mut bytes[1..6]);
    bytes[0] = 0xfd;
    Ipv6Net::new_assert(Ipv6Addr::from(bytes), 64)
}

/// How many first addresses are nobody's: the network's own, which IPv6 gives to routers
/// (RFC 4291, section 2.6.1). A network of two addresses has two hosts (RFC 3021, RFC 6164).
fn reserved(network: &IpNet) -> u128 {
    u128::from(network.max_prefix_len() - network.prefix_len() > 1)
}

fn host_count(network: &IpNet) -> u128 {
    let bits = network.max_prefix_len() - network.prefix_len();
    let all = 1_u128.checked_shl(bits.into()).unwrap_or(u128::MAX);
    // The last one of IPv4 is for broadcasts.
    let last = if network.addr().is_ipv4() { reserved(network) } else { 0 };
    all - reserved(network) - last
}

fn host(network: &IpNet, end: usize) -> IpAddr {
    let offset = reserved(network) + end as u128;
    match network {
        IpNet::V4(network) => {
            let offset = u32::try_from(offset).expect("`hold` was asked");
            IpAddr::V4((u32::from(network.network()) + offset).into())
        }
        IpNet::V6(network) => IpAddr::V6((u128::from(network.network()) + offset).into()),
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    fn networks(v4: &str, v6: &str) -> Networks {
        Networks { v4: v4.parse().ok(), v6: v6.parse().ok() }
    }

    fn texts(networks: Vec<IpNet>) -> Vec<String> {
        networks.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ends_get_addresses_in_order() {
        let networks = networks("10.9.0.0/24", "fd09::/64");
        assert_eq!(texts(networks.addresses(0)), ["10.9.0.1/24", "fd09::1/64"]);
        assert_eq!(texts(networks.hosts(1)), ["10.9.0.2/32", "fd09::2/128"]);
        assert_eq!(texts(networks.addresses(253)), ["10.9.0.254/24", "fd09::fe/64"]);
    }

    #[test]
    fn a_network_holds_no_more_than_its_hosts() {
        for (v4, v6, count) in [
            ("10.9.0.0/24", "", 254),
            ("10.9.0.0/30", "", 2),
            ("10.9.0.0/31", "", 2),
            ("10.9.0.0/32", "", 1),
            ("", "fd09::/126", 3),
            ("", "fd09::/127", 2),
            ("10.9.0.0/16", "fd09::/120", 255),
        ] {
            let networks = networks(v4, v6);
            networks.hold(count).unwrap();
            let error = networks.hold(count + 1).unwrap_err();
            assert!(error.contains(&format!("for {count} ends")), "{error}");
            for end in [0, count - 1] {
                for (address, network) in networks.addresses(end).iter().zip(networks.each()) {
                    assert!(network.contains(&address.addr()), "{address} of {network}");
                }
            }
        }
        networks("", "fd00::/8").hold(usize::MAX).unwrap();
    }

    #[test]
    fn a_network_without_hosts_is_refused() {
        for (text, why) in [
            ("10.9.0.1/24", "its network is 10.9.0.0/24"),
            ("10.9.0.0", "is not a network"),
            ("10.9.0.0/33", "is not a network"),
            ("127.0.0.0/8", "for hosts"),
            ("224.0.0.0/24", "for hosts"),
            ("0.0.0.0/0", "for hosts"),
            ("255.255.255.0/24", "for hosts"),
            ("169.254.0.0/16", "for hosts"),
            ("fe80::/64", "for hosts"),
            ("ff02::/16", "for hosts"),
            ("::/0", "for hosts"),
            ("::1/128", "for hosts"),
        ] {
            let error = network(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        for good in ["10.9.0.0/24", "192.0.2.0/24", "fd09::/64", "2001:db8::/32"] {
            assert_eq!(network(good).unwrap().to_string(), good);
        }
        assert_eq!("none".parse::<Choice<Ipv4Net>>(), Ok(Choice(None)));
        assert!("fd09::/64".parse::<Choice<Ipv4Net>>().is_err());
        assert!("10.9.0.0/24".parse::<Choice<Ipv6Net>>().is_err());
    }

    #[test]
    fn a_network_of_ones_own_is_like_no_other() {
        let mut rng = StdRng::seed_from_u64(1);
        let (one, other) = (unique_local(&mut rng), unique_local(&mut rng));
        assert_ne!(one, other);
        assert!(one.addr().is_unique_local() && network(&one.to_string()).is_ok());
    }
}
