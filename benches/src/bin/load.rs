//! `tidegate-load`: puts load on any gateway that speaks the WireGuard protocol. The work is in `benches::load`.

use std::process::ExitCode;

use benches::load::{Arguments, run};
use clap::Parser;

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tidegate-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}
