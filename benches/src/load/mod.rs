//! The load generator `tidegate-load`: puts load on any gateway that speaks the WireGuard protocol.
//!
//! ```text
//! peers ─ keys ─▶ the gateway's configuration
//! flood: handshake (boringtun) ─ sealed: every packet in advance ─┬ sockets ─┐
//!                                                                 ├ live ────┼▶ gateway ─▶ count
//!                                                                 └ xsk ─────┘
//! loss-free: search ─ floods, each beside its count              handshakes: storm
//! ```
//!
//! It sends only to addresses that it was given, by the interface that it was given (`target`); what it sends was
//! sealed before, in memory that is bounded (`sealed`), and is sent once.
//!
//! The programs in the kernel are an object of their own (`wg-ebpf/src/load.rs`), and no part of the gateway.

mod arguments;
mod count;
mod cpu;
mod flood;
mod handshake;
mod latency;
mod live;
mod loss_free;
mod object;
mod pace;
mod packet;
mod peers;
mod percentiles;
mod report;
mod sealed;
mod search;
mod sockets;
mod storm;
mod target;
mod xsk;

use std::io::{self, Write as _};

use anyhow::Result;
use serde::Serialize;

pub use arguments::{Arguments, Command};
pub use percentiles::Percentiles;
pub use report::{
    CountReport, CpuTime, Delivered, EchoReport, FloodReport, HandshakesDone, LatencyReport,
    LossFreeReport, Sealed, Step, StormReport, Trial,
};

/// Does what the command line says, and prints what came of it.
///
/// # Errors
/// Why it could not be done.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Peers(arguments) => peers::print(&arguments, &mut io::stdout().lock()),
        Command::Handshakes(arguments) => print(&storm::storm(&arguments)?),
        Command::Flood(arguments) => print(&flood::flood(&arguments)?),
        Command::Count(arguments) => print(&count::count(&arguments)?),
        Command::LossFree(arguments) => print(&loss_free::loss_free(&arguments)?),
        Command::Latency(arguments) => print(&latency::latency(&arguments)?),
        Command::Echo(arguments) => print(&latency::echo(&arguments)?),
    }
}

fn print(report: &impl Serialize) -> Result<()> {
    let line = serde_json::to_string(report)? + "\n";
    io::stdout().lock().write_all(line.as_bytes())?;
    Ok(())
}
