//! Synthetic peers: keys and inner addresses that follow from a seed and a number.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};
use ipnet::IpNet;
use sha2::{Digest, Sha256};
use wg_userspace::key::{PrivateKey, PublicKey};

use super::arguments::{Format, Peers, Seed};

/// Most peers of one seed: boringtun has 24 bits for the number of a peer in its receiver indexes.
pub const PEERS_MAX: u32 = 1 << 24;
/// Peers whose keys one thread derives at a time.
const PORTION: u32 = 4096;

/// One synthetic peer. Anybody can derive its private key.
#[derive(Clone)]
pub struct Peer {
    /// Counts from 0.
    pub number: u32,
    /// 32 bytes of a hash, as they come: who uses them clamps them.
    pub private_key: [u8; 32],
    /// Its only allowed IP.
    pub address: IpAddr,
}

impl Peer {
    /// Its public key (one multiplication).
    pub fn public_key(&self) -> PublicKey {
        PrivateKey::from_bytes(self.private_key).public_key()
    }
}

impl Seed {
    /// Whether there are so many peers.
    ///
    /// # Errors
    /// If not: the network has not so many addresses.
    pub fn check(&self, count: u32) -> Result<()> {
        ensure!(count > 0, "no peers are asked for");
        ensure!(count <= PEERS_MAX, "{count} peers are more than {PEERS_MAX}");
        let room = address_count(&self.network);
        ensure!(
            u128::from(count) <= room,
            "{} has room for {room} peers, not for {count}; give a larger --network",
            self.network
        );
        Ok(())
    }

    /// The first `count` peers.
    ///
    /// # Errors
    /// As [`Seed::check`].
    pub fn peers(&self, count: u32) -> Result<impl Iterator<Item = Peer> + Clone + '_> {
        self.check(count)?;
        Ok((0..count).map(|number| self.peer(number)))
    }

    fn peer(&self, number: u32) -> Peer {
        let mut hash = Sha256::new();
        hash.update(b"tidegate-load: a key for benchmarks only");
        hash.update(self.seed.to_le_bytes());
        hash.update(number.to_le_bytes());
        Peer {
            number,
            private_key: hash.finalize().into(),
            address: address(&self.network, number),
        }
    }
}

/// Addresses without the first and the last, which a network may have for itself and for broadcasts.
fn address_count(network: &IpNet) -> u128 {
    let host_bits = u32::from(network.max_prefix_len() - network.prefix_len());
    1_u128.checked_shl(host_bits).unwrap_or(u128::MAX).saturating_sub(2)
}

fn address(network: &IpNet, number: u32) -> IpAddr {
    match network.network() {
        IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits() + 1 + number).into(),
        IpAddr::V6(first) => Ipv6Addr::from_bits(first.to_bits() + 1 + u128::from(number)).into(),
    }
}

/// Prints the peers, in order; all cores derive their public keys.
///
/// # Errors
/// If the network has not so many addresses, or nobody reads them.
pub fn print(arguments: &Peers, out: &mut impl Write) -> Result<()> {
    arguments.seed.check(arguments.count)?;
    let thread_count = std::thread::available_parallelism().map_or(1, usize::from) as u32;
    let mut first = 0;
    while first < arguments.count {
        let texts: Vec<io::Result<String>> = std::thread::scope(|scope| {
            let portions: Vec<_> = (0..thread_count)
                .map(|thread| {
                    let from = (first + thread * PORTION).min(arguments.count);
                    let to = (from + PORTION).min(arguments.count);
                    scope.spawn(move || text(arguments, from..to))
                })
                .collect();
            let panicked = |_| io::Error::other("deriving keys panicked");
            portions.into_iter().map(|thread| thread.join().map_err(panicked)).collect()
        });
        for text in texts {
            out.write_all(text?.as_bytes())?;
        }
        first = first.saturating_add(thread_count * PORTION);
    }
    out.flush()?;
    Ok(())
}

fn text(arguments: &Peers, numbers: std::ops::Range<u32>) -> String {
    let mut text = String::new();
    for number in numbers {
        let peer = arguments.seed.peer(number);
        let (address, public_key) = (peer.address, peer.public_key());
        let written = match arguments.format {
            Format::Wg => {
                let prefix_len = if address.is_ipv4() { 32 } else { 128 };
                let allowed = format_args!("{address}/{prefix_len}");
                writeln!(text, "[Peer]\nPublicKey = {public_key}\nAllowedIPs = {allowed}")
            }
            Format::Keys => {
                let private_key = PrivateKey::from_bytes(peer.private_key).to_base64();
                writeln!(text, "{number}\t{}\t{public_key}\t{address}", *private_key)
            }
        };
        written.expect("a string takes everything");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn seed(seed: u64, network: &str) -> Seed {
        Seed { seed, network: network.parse().unwrap() }
    }

    #[test]
    fn keys_are_the_same_in_every_run_and_differ_between_peers_and_seeds() {
        let keys = |of| -> Vec<PublicKey> {
            let seed = seed(of, "10.64.0.0/10");
            seed.peers(20).unwrap().map(|peer| peer.public_key()).collect()
        };
        assert_eq!(keys(1), keys(1));
        let all: HashSet<_> = keys(1).into_iter().chain(keys(2)).collect();
        assert_eq!(all.len(), 40);
        // Who configured a gateway with an older version need not do so again.
        assert_eq!(keys(1)[0].to_string(), FIRST_KEY);
    }

    /// Of seed 1, by another implementation of SHA-256 and `wg pubkey`.
    const FIRST_KEY: &str = "ZXvsqCYBzBlbsbHEjtHHeTBaTXeqHURen/2vCFG4Pws=";

    #[test]
    fn addresses_are_in_order_and_inside_of_the_network() {
        let at = |network: &str, count| -> Vec<String> {
            let seed = seed(1, network);
            seed.peers(count).unwrap().map(|peer| peer.address.to_string()).collect()
        };
        assert_eq!(at("10.64.0.0/10", 3), ["10.64.0.1", "10.64.0.2", "10.64.0.3"]);
        assert_eq!(at("192.0.2.16/29", 6)[5], "192.0.2.22");
        assert_eq!(at("fd64::/64", 2), ["fd64::1", "fd64::2"]);
        assert!(seed(1, "192.0.2.16/29").peers(7).is_err(), "the last one is for broadcasts");
        assert!(seed(1, "192.0.2.1/32").peers(1).is_err());
        assert!(seed(1, "::/0").peers(PEERS_MAX).is_ok());
        assert!(seed(1, "::/0").peers(PEERS_MAX + 1).is_err());
        assert!(seed(1, "::/0").peers(0).is_err());
    }

    #[test]
    fn all_peers_are_printed_in_order_however_many_threads_there_are() {
        let count = 2 * PORTION + 3;
        let arguments = Peers { count, seed: seed(3, "10.64.0.0/10"), format: Format::Keys };
        let mut out = Vec::new();
        print(&arguments, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let numbers: Vec<u32> =
            text.lines().map(|line| line.split('\t').next().unwrap().parse().unwrap()).collect();
        assert_eq!(numbers, (0..count).collect::<Vec<_>>());
    }

    #[test]
    fn sections_are_as_wg_reads_them() {
        let arguments = Peers { count: 1, seed: seed(1, "10.64.0.0/10"), format: Format::Wg };
        let mut out = Vec::new();
        print(&arguments, &mut out).unwrap();
        let expected = format!("[Peer]\nPublicKey = {FIRST_KEY}\nAllowedIPs = 10.64.0.1/32\n");
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
