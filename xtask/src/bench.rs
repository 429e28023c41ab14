//! `cargo xtask bench`: tidegate beside others, on this machine, in one run.
//!
//! Builds as the user who asks, finds the rivals that are in PATH, and measures all of them in turn in
//! network namespaces ([`measure`]), as root or by sudo. What is left is `raw.json` ([`raw`]), and the reports
//! that are drawn from it ([`markdown`], [`html`]), now or at any later time (`--from`).

mod hosts;
mod html;
mod implementations;
mod machine;
mod markdown;
mod measure;
mod noise;
mod plan;
mod progress;
mod raw;
mod report;
mod rows;
mod statistics;
mod svg;

#[cfg(test)]
mod golden;

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::process::geteuid;

use self::{
    plan::{Client, Offloads, Plan, rounds_that_fit},
    raw::Raw,
    report::Report,
    rows::{Lengths, Measurement},
};
use crate::{
    build_ebpf, demonstration, lab, preflight, run,
    workspace::{cargo, root, succeed, target_dir},
};

/// What is needed on top of what everything needs.
const PROGRAMS: &[(&str, &str)] = &[("ethtool", "ethtool")];
/// How long a run may take after the build, and the most rounds of it: without and with `--quick`.
const LIMIT: Duration = Duration::from_secs(15 * 60);
const LIMIT_QUICK: Duration = Duration::from_secs(3 * 60);
const ROUNDS_MAX: u32 = 5;
const ROUNDS_MAX_QUICK: u32 = 3;

/// Arguments of `bench`.
#[derive(Args, Debug)]
pub struct Options {
    /// Install missing Debian packages without asking
    #[arg(long)]
    yes: bool,
    /// Shorter measurements: done within 3 minutes after the build, in place of 15
    #[arg(long)]
    quick: bool,
    /// How many turns everybody has; without, as many as fit the time, 5 at most (3 with --quick)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Who takes part: tidegate, tidegate-xdp, gotatun, wireguard-go, boringtun-cli, none (no tunnel)
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    only: Vec<String>,
    /// What is measured: tcp, echo, flood, handshakes, or one of them alone, such as tcp-up-4
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    rows: Vec<String>,
    /// Who is at the client's end
    #[arg(long, value_enum, default_value_t = Client::Tidegate)]
    client: Client,
    /// Segmentation and receive offloads of the links
    #[arg(long, value_enum, default_value_t = Offloads::Off)]
    offloads: Offloads,
    /// Where the reports go [default: a new folder in target/bench]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Measure nothing: draw the reports of a run anew
    #[arg(long, value_name = "raw.json", conflicts_with_all = ["yes", "quick", "rounds", "only", "rows", "client", "offloads"])]
    from: Option<PathBuf>,
    /// Folder with programs that were built before
    #[arg(long, hide = true)]
    programs: Option<PathBuf>,
    /// How long each measurement is made
    #[arg(long, hide = true, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=60_000))]
    length_ms: Option<u64>,
}

/// Arguments of the part that needs privileges.
#[derive(Args, Debug)]
pub struct MeasureOptions {
    /// A file with the plan, as JSON
    #[arg(long)]
    plan: PathBuf,
    /// When it was made
    #[arg(long)]
    date: String,
    /// Where to write what was measured
    #[arg(long)]
    raw: PathBuf,
}

/// Measures, or reads what was measured, and draws the reports.
///
/// # Errors
/// If the machine cannot, a build fails, or not a single round was made.
pub fn bench(options: &Options) -> Result<ExitCode> {
    if let Some(from) = &options.from {
        let folder = match &options.out {
            Some(folder) => folder.clone(),
            None => from.parent().unwrap_or(Path::new(".")).to_owned(),
        };
        print(&draw(&Raw::read(from)?, &folder)?);
        return Ok(ExitCode::SUCCESS);
    }
    // What is asked for wrongly is said before anything is built.
    Measurement::named(&options.rows)?;
    implementations::find(Path::new("tidegate"), &options.only)?;
    let programs = match &options.programs {
        Some(programs) => std::path::absolute(programs)?,
        None => build(options)?,
    };
    let plan = plan(options, programs)?;
    let date = date("%Y-%m-%dT%H:%M:%SZ")?;
    let folder = match &options.out {
        Some(folder) => std::path::absolute(folder)?,
        None => target_dir().join("bench").join(date.replace(':', "")),
    };
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let file = folder.join("raw.json");
    // Made here, so that it belongs to the user; it says whether anything was measured.
    fs::write(&file, "").with_context(|| format!("writing {}", file.display()))?;
    announce(&plan)?;
    let ended = match geteuid().is_root() {
        true => take(&plan, date, &file).map(|()| ExitCode::SUCCESS),
        false => take_by_sudo(&plan, &date, &file),
    };
    // A round that is complete is worth a report, whatever came after it.
    if fs::metadata(&file).is_ok_and(|file| file.len() > 0) {
        print(&draw(&Raw::read(&file)?, &folder)?);
    }
    ended.map(|code| if lab::check_interrupted().is_err() { ExitCode::FAILURE } else { code })
}

/// The part of `bench` that needs privileges.
///
/// # Errors
/// If not a single round was made.
pub fn measure_planned(options: &MeasureOptions) -> Result<ExitCode> {
    demonstration::end_with_standard_input();
    let text = fs::read_to_string(&options.plan).context("reading the plan")?;
    let plan = serde_json::from_str(&text).context("reading the plan")?;
    take(&plan, options.date.clone(), &options.raw).map(|()| ExitCode::SUCCESS)
}

fn build(options: &Options) -> Result<PathBuf> {
    preflight::check(options.yes, PROGRAMS)?;
    println!("build");
    build_ebpf::build(false)?;
    let mut build = cargo();
    build.args(["build", "--locked", "--release", "-p", "wg-userspace", "-p", "benches", "--bins"]);
    succeed(&mut build)?;
    Ok(target_dir().join("release"))
}

fn plan(options: &Options, programs: PathBuf) -> Result<Plan> {
    let (implementations, mut notes) =
        implementations::find(&programs.join("tidegate"), &options.only)?;
    if let Some(why) = lab::unavailable().filter(|_| geteuid().is_root()) {
        bail!("namespaces cannot be made here: {why}");
    }
    let lengths = match (options.length_ms, options.quick) {
        (Some(ms), _) => Lengths { tcp_ms: ms, echo_ms: ms, flood_ms: ms, handshakes_ms: ms },
        (None, false) => Lengths::FULL,
        (None, true) => Lengths::QUICK,
    };
    let (limit, rounds_max) = match options.quick {
        false => (LIMIT, ROUNDS_MAX),
        true => (LIMIT_QUICK, ROUNDS_MAX_QUICK),
    };
    let mut words = vec!["cargo xtask bench".to_owned()];
    words.extend(options.words());
    if options.programs.is_some() {
        notes.push("The programs were built before, and may be of another commit.".to_owned());
    }
    let mut plan = Plan {
        command: words.join(" "),
        commit: commit(),
        programs,
        implementations,
        measurements: Measurement::named(&options.rows)?
            .into_iter()
            .map(Measurement::name)
            .collect(),
        lengths,
        rounds: options.rounds.unwrap_or(1),
        limit_s: options.rounds.is_none().then_some(limit.as_secs_f64()),
        client: options.client,
        offloads: options.offloads,
        notes,
    };
    if options.rounds.is_none() {
        plan.rounds = rounds_that_fit(measure::estimate_round(&plan)?, limit, rounds_max);
    }
    Ok(plan)
}

impl Options {
    /// Those that change what is measured, as they were given.
    fn words(&self) -> Vec<String> {
        use clap::ValueEnum as _;
        let mut words = Vec::new();
        if self.quick {
            words.push("--quick".to_owned());
        }
        if let Some(rounds) = self.rounds {
            words.push(format!("--rounds {rounds}"));
        }
        for (name, values) in [("only", &self.only), ("rows", &self.rows)] {
            if !values.is_empty() {
                words.push(format!("--{name} {}", values.join(",")));
            }
        }
        let word = |value: Option<clap::builder::PossibleValue>| {
            value.map_or_else(String::new, |value| value.get_name().to_owned())
        };
        if self.client != Client::Tidegate {
            words.push(format!("--client {}", word(self.client.to_possible_value())));
        }
        if self.offloads != Offloads::Off {
            words.push(format!("--offloads {}", word(self.offloads.to_possible_value())));
        }
        if let Some(ms) = self.length_ms {
            words.push(format!("--length-ms {ms}"));
        }
        words
    }
}

fn announce(plan: &Plan) -> Result<()> {
    let takes = measure::estimate_round(plan)? * plan.rounds;
    let names: Vec<_> = plan.implementations.iter().map(|one| one.column.heading()).collect();
    println!("measure {}", names.join(", "));
    for note in &plan.notes {
        println!("  {note}");
    }
    let minutes = takes.as_secs_f64() / 60.0;
    let rounds = if plan.rounds == 1 { "round" } else { "rounds" };
    println!("  {} {rounds}, about {minutes:.1} minutes", plan.rounds);
    Ok(())
}

/// Measures, and keeps what there is after each round.
fn take(plan: &Plan, date: String, file: &Path) -> Result<()> {
    let mut keep = |raw: &Raw| {
        fs::write(file, raw.text()?).with_context(|| format!("writing {}", file.display()))
    };
    measure::measure(plan, date, &mut keep).map(drop)
}

/// The same in a process of root's, which ends when we do.
fn take_by_sudo(plan: &Plan, date: &str, file: &Path) -> Result<ExitCode> {
    ensure!(
        run::sudo_works(),
        "network namespaces and XDP need root, and there is no sudo; run it as root"
    );
    let plan_file = file.with_file_name("plan.json");
    fs::write(&plan_file, serde_json::to_string_pretty(plan)?)?;
    let mut sudo = Command::new("sudo");
    sudo.arg("--").arg(std::env::current_exe()?).arg("measure").arg("--plan").arg(&plan_file);
    sudo.args(["--date", date, "--raw"]).arg(file);
    run::through(&mut sudo)
}

/// Writes the reports beside each other, and gives the one that can be read here, with the place of the other.
fn draw(raw: &Raw, folder: &Path) -> Result<String> {
    let report = Report::of(raw);
    let markdown = markdown::draw(&report);
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    for (name, text) in [("report.md", &markdown), ("report.html", &html::draw(&report))] {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(format!("{markdown}\n{}\n", folder.join("report.html").display()))
}

/// Prints a report; who reads no further (`| head`) still has the files.
fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

fn date(format: &str) -> Result<String> {
    let output = Command::new("date").arg("-u").arg(format!("+{format}")).output()?;
    ensure!(output.status.success(), "`date` failed ({})", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Which commit is built, if there is a repository to ask.
fn commit() -> Option<String> {
    let mut git = Command::new("git");
    git.current_dir(root()).args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]);
    let output = git.stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(line: &str) -> Result<Options, clap::Error> {
        let words = ["bench"].into_iter().chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.options)
    }

    #[test]
    fn the_command_is_told_as_it_was_given() {
        for line in [
            "",
            "--quick --rounds 2 --only tidegate,none --rows tcp,echo-idle",
            "--client same --offloads on",
            "--length-ms 20",
        ] {
            assert_eq!(options(line).unwrap().words().join(" "), line);
        }
        // What does not change what is measured is not told.
        let other = options("--yes --out /nowhere --programs /nowhere --client tidegate").unwrap();
        assert!(other.words().is_empty());
    }

    #[test]
    fn arguments_that_make_no_sense_are_refused() {
        for line in [
            "--rounds 0",
            "--from raw.json --quick",
            "--client other",
            "--nic eth1",
            "--length-ms 0",
        ] {
            assert!(options(line).is_err(), "{line}");
        }
        assert!(options("--from raw.json --out there").is_ok());
    }

    #[test]
    fn what_nobody_knows_is_refused_before_the_build() {
        let error = bench(&options("--rows speed").unwrap()).unwrap_err().to_string();
        assert!(error.starts_with("no row is called `speed`"), "{error}");
        let error = bench(&options("--only tide").unwrap()).unwrap_err().to_string();
        assert!(error.starts_with("nobody is called `tide`"), "{error}");
    }

    #[test]
    fn a_run_is_drawn_again_from_its_file() {
        let folder = std::env::temp_dir().join(format!("tidegate-bench-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("raw.json");
        fs::write(&file, golden::RAW).unwrap();
        let drawn = Raw::read(&file).and_then(|raw| draw(&raw, &folder));
        let (markdown, html) = (folder.join("report.md"), folder.join("report.html"));
        let written = [markdown, html].map(|file| fs::read_to_string(file).unwrap_or_default());
        fs::remove_dir_all(&folder).unwrap();
        let printed = drawn.unwrap();
        assert!(printed.starts_with(&written[0]) && printed.ends_with("report.html\n"));
        assert!(written[0].starts_with("# Tidegate") && written[1].starts_with("<!doctype html>"));
    }

    #[test]
    fn dates_can_be_names_of_folders() {
        let date = date("%Y-%m-%dT%H:%M:%SZ").unwrap().replace(':', "");
        assert!(date.len() == 18 && date.ends_with('Z'), "{date}");
    }
}
