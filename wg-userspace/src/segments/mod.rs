//! Runs of packets that cross the kernel as one: super-packets before a TUN queue, and what the kernel
//! is told of them.
//!
//! Pure functions over bytes. Where super-packets are read and written is `tun`'s, what is in them
//! `datapath`'s.

pub mod cut;
#[cfg(test)]
mod cut_tests;
pub mod join;
#[cfg(test)]
pub(crate) mod packets_for_tests;
pub mod vnet;

pub use cut::{Cut, finish_checksum};
pub use join::Run;
pub use vnet::{SegmentKind, VnetHeader};
