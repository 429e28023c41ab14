//! `cargo xtask run`: from a fresh clone to a gateway that carries real traffic.
//!
//! Looks at the machine, builds as the user who asks, and runs only the [`demonstration`], or one of the
//! [`scenarios`], with privileges: as root, by sudo, or, where there is neither, in a user namespace with
//! sockets.

use std::{
    env,
    fs::File,
    io::{self, IsTerminal},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{
    build_ebpf,
    demonstration::{self, Mode},
    lab::{self, find_program},
    preflight,
    scenarios::{self, By, Nat, Scenario},
    workspace::{cargo, succeed, target_dir},
};

/// Arguments of `run`.
#[derive(Args, Debug)]
pub struct Options {
    /// Install missing Debian packages without asking
    #[arg(long)]
    yes: bool,
    /// How the gateway receives
    #[arg(long, value_enum, default_value_t = Mode::Native)]
    mode: Mode,
    /// Show one of the scenarios of `examples/` instead of the first tunnel
    #[arg(long, value_enum)]
    scenario: Option<Scenario>,
    /// How the last end of a scenario is brought up
    #[arg(long, value_enum, default_value_t = By::Tidegate, requires = "scenario")]
    peer: By,
    /// Who translates in a scenario with a gateway
    #[arg(long, value_enum, default_value_t = Nat::Iptables, requires = "scenario")]
    nat: Nat,
    /// Write what was seen into this file, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Leave the namespaces and the processes in them standing
    #[arg(long)]
    keep: bool,
}

/// Builds and shows it.
///
/// # Errors
/// If the machine cannot, a build fails, or the demonstration does not work at all.
pub fn run(options: &Options) -> Result<ExitCode> {
    let more: &[_] = match (options.scenario, options.peer) {
        (_, By::WireguardGo) => &[("iptables", "iptables"), ("wireguard-go", "wireguard-go")],
        (Some(_), _) => &[("iptables", "iptables")],
        (None, _) => &[],
    };
    preflight::check(options.yes, more)?;
    println!("build");
    build_ebpf::build(false)?;
    let programs = build_programs()?;
    if let Some(report) = &options.report {
        // Made here, so that it belongs to the user.
        File::create(report).with_context(|| format!("writing {}", report.display()))?;
    }
    let mut options = scenarios::Options {
        common: demonstration::Options {
            programs,
            mode: options.mode,
            report: options.report.clone(),
            keep: options.keep,
            rootless: false,
            lifeline: false,
        },
        scenario: options.scenario,
        peer: options.peer,
        nat: options.nat,
    };
    if rustix::process::geteuid().is_root() {
        println!("run, as root");
        return scenarios::demonstrate(&options);
    }
    options.common.lifeline = true;
    if sudo_works() {
        println!("run, by sudo: to load XDP and to make network namespaces");
        let mut sudo = Command::new("sudo");
        return elsewhere(sudo.arg("--"), &options);
    }
    println!("run, in a user namespace with sockets: XDP needs root, and there is no sudo");
    options.common.rootless = true;
    let mut unshare = Command::new("unshare");
    unshare.args(["--user", "--map-root-user", "--net", "--mount", "--"]);
    // Names of namespaces and sockets of wg(8) lie below /run, where this user may not write.
    unshare.args(["sh", "-c", "mount -t tmpfs tmpfs /run && exec \"$@\"", "sh"]);
    elsewhere(&mut unshare, &options)
}

/// Builds what takes part, as whoever we are, and gives its folder.
fn build_programs() -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--locked", "--release", "-p", "wg-userspace", "-p", "benches"]);
    for program in ["tidegate", "boringtun-peer", "lab-tool"] {
        build.args(["--bin", program]);
    }
    succeed(&mut build)?;
    Ok(target_dir().join("release"))
}

/// Whether sudo works without a question, or somebody is there to be asked.
pub fn sudo_works() -> bool {
    let quiet = |mut command: Command| {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let mut sudo = Command::new("sudo");
    sudo.args(["-n", "true"]);
    find_program("sudo").is_some() && (quiet(sudo) || io::stdin().is_terminal())
}

/// Runs the demonstration through another command. It ends when its standard input does, so
/// that it never outlives us, whatever ends us.
fn elsewhere(command: &mut Command, options: &scenarios::Options) -> Result<ExitCode> {
    let scenarios::Options { common: options, scenario, peer, nat } = options;
    command.arg(env::current_exe()?).arg("demonstrate");
    command.arg("--programs").arg(&options.programs).args(["--mode", options.mode.word()]);
    if let Some(scenario) = scenario {
        command.args(["--scenario", scenario.word(), "--peer", peer.word()]);
        command.args(["--nat", nat.word()]);
    }
    if let Some(report) = &options.report {
        command.arg("--report").arg(std::path::absolute(report)?);
    }
    for (wanted, flag) in [
        (options.keep, "--keep"),
        (options.rootless, "--rootless"),
        (options.lifeline, "--lifeline"),
    ] {
        if wanted {
            command.arg(flag);
        }
    }
    through(command)
}

/// Runs another process of ours to its end, whose standard input is its lifeline.
///
/// # Errors
/// If it cannot be started, or does not end when it is told to.
pub fn through(command: &mut Command) -> Result<ExitCode> {
    lab::catch_signals()?;
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child =
        command.stdin(Stdio::piped()).spawn().with_context(|| format!("starting {program}"))?;
    let mut lifeline = child.stdin.take();
    let mut interrupted_at = None;
    loop {
        if let Some(status) = child.try_wait()? {
            let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
            return Ok(ExitCode::from(code));
        }
        if lab::check_interrupted().is_err() {
            drop(lifeline.take());
            let since = *interrupted_at.get_or_insert_with(Instant::now);
            ensure!(since.elapsed() < Duration::from_secs(30), "{program} does not end");
        }
        thread::sleep(Duration::from_millis(50));
    }
}
