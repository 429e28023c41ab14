//! What the kernel side and the user side of Tidegate must agree on.
//!
//! No standard library, no allocation, no IO: the very same code runs in the kernel's BPF
//! programs and in the daemon, and is tested on the host.
#![cfg_attr(not(test), no_std)]

pub mod ecn;
pub mod endpoint;
pub mod headers;
pub mod icmp;
pub mod id;
pub mod index;
pub mod load;
pub mod map;
pub mod message;
pub mod mss;
pub mod nat;
pub mod outcome;
pub mod protocol;
pub mod time;
pub mod upper;
