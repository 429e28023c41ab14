//! Tidegate's daemon and command line. `ARCHITECTURE.md` has the map of the rooms.

pub mod aead;
pub mod bpf;
pub mod cli;
pub mod config;
pub mod counters;
pub mod daemon;
pub mod datapath;
pub mod device;
pub mod handshake;
pub mod host;
pub mod key;
pub mod noise;
pub mod routing;
pub mod session;
pub mod sys;
pub mod tun;
pub mod uapi;
pub mod udp;
pub mod xsk;
