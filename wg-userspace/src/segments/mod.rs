//! Runs of packets that cross the kernel as one: super-packets before a TUN queue, and what the kernel
//! is told of them.
//!
//! Pure functions over bytes. Where super-packets are read and written is `tun`'s, what is in them
//! `datapath`'s.

pub mod vnet;

pub use vnet::VnetHeader;
