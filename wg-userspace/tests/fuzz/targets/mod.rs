//! The bodies of the fuzz targets: each takes bytes that anybody may have sent or written, and panics
//! when a rule is broken. Where the answer can be had in a slow and obvious way, it is compared.
//!
//! Two programs run them: `fuzz/` under libFuzzer, which looks for new paths through the code, and
//! `tests/fuzz`, which repeats what was found and some random inputs in every test run. They use the
//! public interface only, so that both can.

pub mod aead;
pub mod config;
pub mod cut;
pub mod frames;
pub mod handover;
pub mod handshake;
mod host;
pub mod join;
pub mod nat;
pub mod nat_flows;
pub mod packets;
pub mod routing;
pub mod sessions;
pub mod uapi;
pub mod window;

/// A target: its name, its body, and inputs to begin with.
pub struct Target {
    /// As `cargo xtask fuzz` and the folders of corpora have it.
    pub name: &'static str,
    /// Panics if the input breaks a rule.
    pub run: fn(&[u8]),
    /// Inputs that go deep, made by our own code.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "aead", run: aead::run, seeds: aead::seeds },
    Target { name: "frames", run: frames::run, seeds: frames::seeds },
    Target { name: "handshake", run: handshake::run, seeds: handshake::seeds },
    Target { name: "handover", run: handover::run, seeds: handover::seeds },
    Target { name: "packets", run: packets::run, seeds: packets::seeds },
    Target { name: "uapi", run: uapi::run, seeds: uapi::seeds },
    Target { name: "config", run: config::run, seeds: config::seeds },
    Target { name: "sessions", run: sessions::run, seeds: sessions::seeds },
    Target { name: "window", run: window::run, seeds: window::seeds },
    Target { name: "join", run: join::run, seeds: join::seeds },
    Target { name: "routing", run: routing::run, seeds: routing::seeds },
    Target { name: "cut", run: cut::run, seeds: cut::seeds },
    Target { name: "nat", run: nat::run, seeds: nat::seeds },
    Target { name: "nat_flows", run: nat_flows::run, seeds: nat_flows::seeds },
];

/// Takes values off an input; once it has ended, they are zero.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }

    fn number(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Up to `len` bytes: fewer only at the end.
    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }
}
