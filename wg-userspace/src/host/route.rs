//! Which routes an interface needs for the prefixes that its peers own.

use ipnet::IpNet;

/// Prefixes of `allowed` that need a route of their own, as wg-quick chooses them: the longest
/// first, each once, without those that one of the interface's `present` routes covers.
///
/// Default routes (`/0`) are left out: they need a table and rules of their own.
pub fn missing_routes(
    allowed: impl IntoIterator<Item = IpNet>,
    present: impl IntoIterator<Item = IpNet>,
) -> Vec<IpNet> {
    let present: Vec<IpNet> = present.into_iter().map(|prefix| prefix.trunc()).collect();
    let mut missing: Vec<IpNet> = allowed
        .into_iter()
        .map(|prefix| prefix.trunc())
        .filter(|prefix| prefix.prefix_len() > 0)
        .filter(|prefix| !present.iter().any(|route| route.contains(prefix)))
        .collect();
    // By length first: then no route is added that covers one still to come.
    missing.sort_by(|a, b| b.prefix_len().cmp(&a.prefix_len()).then(a.cmp(b)));
    missing.dedup();
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(text: &str) -> Vec<IpNet> {
        text.split_whitespace().map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn longest_first_each_once() {
        let allowed =
            nets("10.0.0.0/8 192.168.7.0/24 10.1.0.0/16 192.168.7.0/24 fd00::/8 fd00::5/128");
        assert_eq!(
            missing_routes(allowed, []),
            nets("fd00::5/128 192.168.7.0/24 10.1.0.0/16 10.0.0.0/8 fd00::/8")
        );
    }

    #[test]
    fn not_what_a_connected_route_covers() {
        let allowed = nets("10.9.0.2/32 10.9.0.0/24 10.9.0.0/16 fd09::2/128");
        let present = nets("10.9.0.0/24 fd09::/64");
        assert_eq!(missing_routes(allowed, present), nets("10.9.0.0/16"));
    }

    #[test]
    fn another_family_covers_nothing() {
        assert_eq!(missing_routes(nets("fd00::/64"), nets("0.0.0.0/0")), nets("fd00::/64"));
    }

    #[test]
    fn host_bits_do_not_matter() {
        assert_eq!(missing_routes(nets("10.9.0.7/24"), nets("10.9.0.1/24")), []);
        assert_eq!(missing_routes(nets("10.8.0.7/24"), nets("10.9.0.1/24")), nets("10.8.0.0/24"));
    }

    #[test]
    fn default_routes_are_left_out() {
        assert_eq!(missing_routes(nets("0.0.0.0/0 ::/0 0.0.0.0/1"), []), nets("0.0.0.0/1"));
    }
}
