//! Arguments in, exit code and readable errors out.
//!
//! [`main`] reads the arguments and the environment, hands them to one function per command, and
//! turns what comes back into an exit code ([`Code`]) and text on standard error. Commands reach
//! a running daemon through its socket only, as wg(8) does; the data path is not known here.

mod applied;
mod args;
mod check;
mod completions;
mod difference;
mod directives;
mod dns;
mod down;
mod end_file;
mod failure;
mod files;
mod firewall;
mod foreground;
mod forwarding;
mod hooks;
mod init;
mod keys;
mod launch;
mod ledger;
mod man;
mod name;
mod nat;
mod nic_settings;
mod peer;
mod peer_names;
mod plan;
mod points;
mod programs;
mod quiesce;
mod reload;
mod report;
mod resolve;
mod rewrite;
mod run;
mod running;
mod save;
#[cfg(test)]
mod schema_tests;
mod shortcut;
mod show;
mod socket;
mod steps;
mod strip;
mod tables;
mod text;
mod trace;
mod troubles;
mod up;

use std::{ffi::OsString, io::Write as _, process::ExitCode};

use args::Command;
pub use failure::Code;
use failure::Failure;
pub use report::{DataPath, Interface, Nic, Peer, Quiesced, Report, Steering};
pub use troubles::Trouble;

/// The whole program: reads the arguments of this process, does what they say, prints errors.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let command = match args::parse(arguments) {
        Ok(command) => command,
        // clap prints help and version on standard output, errors on standard error. What
        // cannot be printed cannot be reported either.
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { Code::Usage.into() } else { Code::Ok.into() };
        }
    };
    let result = match command {
        Command::Run(arguments) => run::run(arguments),
        Command::Data(arguments) => run::data(&arguments),
        Command::Up(arguments) => up::up(arguments),
        Command::Down { what } => down::down(&what),
        Command::Reload(arguments) => reload::reload(&arguments),
        Command::Save { what } => save::save(&what),
        Command::Peer(what) => peer::peer(what),
        Command::Strip { what } => strip::strip(&what),
        Command::Check(arguments) => check::check(&arguments),
        Command::Show(arguments) => show::show(&arguments),
        Command::Trace(arguments) => trace::trace(&arguments),
        Command::Quiesce(arguments) => quiesce::quiesce(&arguments),
        Command::Init(shape) => init::init(&shape),
        Command::Genkey => keys::genkey(),
        Command::Genpsk => keys::genpsk(),
        Command::Pubkey => keys::pubkey(),
        Command::Completions { shell } => completions::completions(shell),
        Command::Man { dir } => man::man(&dir),
    };
    match result {
        Ok(code) => code.into(),
        Err(failure) => {
            failure.print();
            failure.code()
        }
    }
}

/// Writes a command's result. A reader that went away (`tidegate show | head`) is no error.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("writing to standard output").into())
        }
        _ => Ok(()),
    }
}
