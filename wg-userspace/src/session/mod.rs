//! A peer's keypairs with their counters, replay windows and timers (whitepaper §5.4.6, §6).
//!
//! Two halves. [`HotPeer`] and [`Keypair`] are what workers read, and move by atomics: counters, the
//! replay window, the moments at which something was sent or came. [`Session`] is what control keeps
//! of a peer: the handshake in flight, the timers. Messages and moments go into it, [`Action`]s come
//! out, and the caller does them. Neither half reads a clock, makes randomness, or sends.
//!
//! ```text
//! noise ─ Established ─▶ Session ─ Publish ─▶ SlotTable<Keypair> ─▶ workers: open, replay window
//!                           │                                                  │ confirm
//!                           └─ installs in ─▶ HotPeer: Keypairs ◀──────────────┘
//!                                                  └─▶ workers: reserve counters, seal
//! ```
//!
//! [`Keypairs`] is an immutable value. Control installs and removes keypairs, the home worker of one
//! confirms it, both by a swap that is tried again if the other was faster. `Session` remembers what
//! it has published and retires what is no longer in the value, whoever took it out.
//!
//! [`handover`] moves sessions to another process of the host: what may seal and open stops here before
//! it begins there.

mod activity;
mod continuity;
mod control;
mod cookie;
mod course;
mod gates;
mod generation;
pub mod handover;
#[cfg(test)]
mod handover_tests;
mod inner_mtu;
mod keypair;
mod keypairs;
mod link_way;
mod peer;
mod replay;
mod slot_table;
#[cfg(test)]
mod tests;
mod timers;
mod troubles;
mod wheel;

/// The atomics that [`gates`] uses.
mod atomic {
    pub use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
}

pub use activity::Activity;
pub use continuity::{Break, Continuity};
pub use control::{Action, Context, HandshakeMessage, Indexes, Session};
pub use generation::Generation;
pub use inner_mtu::{InnerMtu, is_v6};
pub use keypair::{Frozen, Keypair, Receiving, Reserved};
pub use keypairs::Keypairs;
pub use link_way::{Hop, LinkWay};
pub use peer::{HotPeer, SharedKeypairs, Transfer};
pub use replay::ReplayWindow;
pub use slot_table::SlotTable;
pub use troubles::{Noted, PeerNotes, Spell, TROUBLE_FADES_AFTER, TroubleKind};
pub use wheel::{TICK, Token, Wheel};
