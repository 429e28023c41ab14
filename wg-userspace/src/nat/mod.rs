//! NAT and forwarding, as far as it is a matter of thought: what the file's lines mean on this host, which
//! ports are free for it, and which flows are over.
//!
//! It knows no maps of the kernel, no clock and no host. The keeper's thread carries it to the programs.

pub mod ports;
pub mod rules;
pub mod sweep;

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use wg_common::map::AddressKey;

use crate::config::{Allow, Directives, Forward, Interface, Nat, Spanned};

/// The address that a key of the maps stands for.
pub fn address(key: AddressKey) -> IpAddr {
    let [a, b, c, d] = key.0.map(u32::to_ne_bytes);
    let mut octets = [0; 16];
    for (to, from) in octets.chunks_exact_mut(4).zip([a, b, c, d]) {
        to.copy_from_slice(&from);
    }
    if key.is_v4() { Ipv4Addr::from(d).into() } else { Ipv6Addr::from(octets).into() }
}

/// The lines of a file that are about forwarding, each kind in its order there.
#[derive(Clone, Debug, Default)]
pub struct Lines {
    /// `#! Nat`
    pub nat: Vec<Nat>,
    /// `#! Forward`
    pub forward: Vec<Forward>,
    /// `#! Allow`
    pub allow: Vec<Allow>,
}

impl Lines {
    /// Those of a file that was read as a whole.
    pub fn of(interface: &Interface) -> Self {
        Self::new(&interface.nat, &interface.forward, &interface.allow)
    }

    /// Those of a file of which nothing else was read.
    pub fn of_directives(directives: &Directives) -> Self {
        Self::new(&directives.nat, &directives.forward, &directives.allow)
    }

    fn new(nat: &[Spanned<Nat>], forward: &[Spanned<Forward>], allow: &[Spanned<Allow>]) -> Self {
        fn values<T: Clone>(lines: &[Spanned<T>]) -> Vec<T> {
            lines.iter().map(|line| line.value.clone()).collect()
        }
        Self { nat: values(nat), forward: values(forward), allow: values(allow) }
    }

    /// Whether there are none: nothing is to be loaded then.
    pub fn is_empty(&self) -> bool {
        self.nat.is_empty() && self.forward.is_empty() && self.allow.is_empty()
    }

    /// Text that says the same, a line each, wherever the lines stood: equal for lines that mean the same.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let nat = self.nat.iter().map(|line| format!("#! Nat = {line}"));
        let forward = self.forward.iter().map(|line| format!("#! Forward = {line}"));
        let allow = self.allow.iter().map(|line| format!("#! Allow = {line}"));
        for line in nat.chain(forward).chain(allow) {
            let _ = writeln!(text, "{line}");
        }
        text
    }
}
