//! Tidegate's daemon and command line. `ARCHITECTURE.md` has the map of the rooms.

pub mod aead;
pub mod config;
pub mod counters;
pub mod device;
pub mod key;
pub mod noise;
pub mod routing;
pub mod session;
