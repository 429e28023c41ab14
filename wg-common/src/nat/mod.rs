//! Network address translation and forwarding: what the programs at a TUN device and at NICs decide, and what
//! control and they say to each other.
//!
//! Everything is seen from inside: a flow is named by the inner address (of a peer's host), and the remote one
//! (of whoever it speaks with), so that both directions are one entry of one table ([`map::FLOWS`]) and live and
//! die together. A translated flow has a mapping besides: the external address and port that stand for the
//! inner ones, whoever it speaks with (endpoint-independent mapping, RFC 4787 §4.1). Its slot in
//! [`map::SLOTS`] is the way back; the generation in both says whether they still belong together.

pub mod engine;
#[cfg(test)]
mod engine_tests;
pub mod error;
pub mod limit;
pub mod map;
#[cfg(test)]
mod model;
pub mod packet;
pub mod rewrite;
pub mod tcp;
pub mod timeout;
pub mod tuple;
