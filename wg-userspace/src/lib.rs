//! Tidegate's daemon and command line. `ARCHITECTURE.md` has the map of the rooms.

pub mod aead;
pub mod bpf;
pub mod check;
pub mod cli;
pub mod config;
pub mod counters;
pub mod daemon;
pub mod datapath;
pub mod device;
pub mod handshake;
pub mod host;
pub mod keeper;
pub mod key;
pub mod lookup;
pub mod nat;
pub mod noise;
pub mod rate;
pub mod routing;
pub mod sandbox;
pub mod segments;
pub mod session;
#[expect(unsafe_code, reason = "system calls, and memory shared with the kernel")]
pub mod sys;
pub mod tun;
pub mod uapi;
pub mod udp;
#[expect(unsafe_code, reason = "the UMEM and its rings are shared with the kernel")]
pub mod xsk;
