//! `cargo xtask test`: every proof there is, and one line at the end that says how it went.
//!
//! Tests that need root skip themselves and say so in a line `SKIPPED name: reason`; where sudo is
//! at hand, the programs with such tests run once more by it.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    build_ebpf, lab, layers, licences, preflight,
    workspace::{cargo, succeed, target_dir},
};

/// One program with tests may take this long; then something in it hangs.
const SUITE_LIMIT: Duration = Duration::from_secs(600);
/// So many programs that drive whole processes run at once: most of their time they wait for packets.
const SUITES_AT_ONCE: usize = 2;
/// How long it may take to clean up when it is told to end.
const GRACE: Duration = Duration::from_secs(15);

/// Arguments of `test`.
#[derive(Args, Debug)]
pub struct Options {
    /// Install missing Debian packages without asking
    #[arg(long)]
    yes: bool,
    /// Do not use sudo: tests that need root are skipped
    #[arg(long)]
    no_root: bool,
}

/// What came out.
#[derive(Debug, Default)]
struct Tally {
    passed: usize,
    failed: Vec<String>,
    /// Name and reason.
    skipped: Vec<String>,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
    }

    /// Counts a check as one test.
    fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) -> bool {
        println!("== {name}");
        let started = Instant::now();
        let ended = check();
        let taken = started.elapsed().as_secs_f64();
        match &ended {
            Ok(()) => {
                self.passed += 1;
                println!("   ok ({taken:.1} s)");
            }
            Err(error) => {
                println!("   FAILED ({taken:.1} s): {error:#}");
                self.failed.push(name.to_owned());
            }
        }
        ended.is_ok()
    }
}

/// Runs everything; fails if anything did.
///
/// # Errors
/// If the machine cannot do it at all, or on a signal.
pub fn test(options: &Options) -> Result<ExitCode> {
    preflight::check(options.yes, preflight::FOR_TESTS)?;
    lab::catch_signals()?;
    let mut tally = Tally::default();
    tally.check("format", || succeed(cargo().args(["fmt", "--all", "--", "--check"])));
    tally.check("layers", layers::check);
    tally.check("licences", licences::check);
    let built = tally.check("eBPF programs", || build_ebpf::build(false).map(drop));
    // The daemon embeds the object: without it nothing else builds.
    if built {
        tally.check("lints", || {
            let mut clippy = cargo();
            clippy.args(["clippy", "--quiet", "--locked", "--workspace", "--exclude", "wg-ebpf"]);
            succeed(clippy.args(["--all-targets", "--", "-D", "warnings"]))
        });
        let mut suites = Vec::new();
        let built = tally.check("build of the tests", || {
            // Tests find these beside the daemon.
            succeed(cargo().args(["build", "--quiet", "--locked", "-p", "benches", "--bins"]))?;
            suites = build_suites()?;
            Ok(())
        });
        if built {
            let (driving, computing): (Vec<_>, Vec<_>) =
                suites.iter().partition(|suite| suite.drives_processes);
            for suite in computing {
                tally.add(suite.run(options.no_root)?);
            }
            tally.add(run_at_once(&driving, options.no_root)?);
            tally.add(doc_tests()?);
        }
    }
    println!();
    for skipped in &tally.skipped {
        println!("skipped {skipped}");
    }
    for failed in &tally.failed {
        println!("failed {failed}");
    }
    let Tally { passed, failed, skipped } = &tally;
    println!("{passed} passed, {} failed, {} skipped", failed.len(), skipped.len());
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A program with tests.
struct Suite {
    name: String,
    program: PathBuf,
    /// The folder of its package, where cargo would start it.
    folder: PathBuf,
    /// Whether it is one of those in `tests/`, which start programs and wait for them.
    drives_processes: bool,
}

fn build_suites() -> Result<Vec<Suite>> {
    let mut build = cargo();
    build.args(["test", "--locked", "--workspace", "--exclude", "wg-ebpf", "--no-run"]);
    build.args(["--quiet", "--message-format=json-render-diagnostics"]);
    let output = build.stderr(Stdio::inherit()).output().context("building the tests")?;
    ensure!(output.status.success(), "the tests do not build");
    let mut suites = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else { continue };
        let Some(program) = message["executable"].as_str() else { continue };
        if message["profile"]["test"] != true {
            continue;
        }
        let manifest = message["manifest_path"].as_str().context("a manifest")?;
        let folder = Path::new(manifest).parent().context("its folder")?.to_owned();
        let package = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let target = message["target"]["name"].as_str().unwrap_or_default();
        let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
        let name = format!("{package} {kind} {target}");
        let drives_processes = kind == "test";
        suites.push(Suite { name, program: program.into(), folder, drives_processes });
    }
    suites.sort_by(|a, b| a.name.cmp(&b.name));
    ensure!(!suites.is_empty(), "cargo built no tests");
    Ok(suites)
}

/// Runs suites that do not keep the machine busy, several at once.
fn run_at_once(suites: &[&Suite], no_root: bool) -> Result<Tally> {
    let next = AtomicUsize::new(0);
    let run_some = || {
        let mut tally = Tally::default();
        while let Some(suite) = suites.get(next.fetch_add(1, Ordering::Relaxed)) {
            tally.add(suite.run(no_root)?);
        }
        anyhow::Ok(tally)
    };
    let tallies: Vec<Result<Tally>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..SUITES_AT_ONCE).map(|_| scope.spawn(run_some)).collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended.map(|tally| tally.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut all = Tally::default();
    for tally in tallies {
        all.add(tally?);
    }
    all.failed.sort();
    all.skipped.sort();
    Ok(all)
}

impl Suite {
    fn run(&self, no_root: bool) -> Result<Tally> {
        let mut tally = self.run_by(None)?;
        let wants_root = tally.skipped.iter().any(|skipped| skipped.contains("root"));
        if wants_root && !no_root && !rustix::process::geteuid().is_root() && sudo_is_quiet() {
            tally = self.run_by(Some("sudo"))?;
        }
        Ok(tally)
    }

    fn run_by(&self, helper: Option<&str>) -> Result<Tally> {
        let started = Instant::now();
        let mut command = match helper {
            Some(helper) => {
                let mut command = Command::new(helper);
                command.arg("-E").arg("--").arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        // Shows what passing tests print: their lines about skipping are among it.
        command.arg("--show-output").current_dir(&self.folder);
        command.env("CARGO_MANIFEST_DIR", &self.folder);
        // What failed says so in its message; backtraces of each would bury it.
        command.env("RUST_BACKTRACE", "0");
        let (success, output) = run_to_end(&mut command, &self.name)?;
        let tally = read(&self.name, &output, success);
        // In one piece: another suite may print meanwhile.
        let mut shown = format!(
            "== {}{}: {} passed, {} failed, {} skipped ({:.1} s)\n",
            self.name,
            helper.map_or_else(String::new, |helper| format!(" by {helper}")),
            tally.passed,
            tally.failed.len(),
            tally.skipped.len(),
            started.elapsed().as_secs_f64()
        );
        if !tally.failed.is_empty() {
            shown += &output;
        }
        print!("{shown}");
        Ok(tally)
    }
}

/// Whether sudo asks no question.
fn sudo_is_quiet() -> bool {
    let mut sudo = Command::new("sudo");
    sudo.args(["-n", "true"]).stdout(Stdio::null()).stderr(Stdio::null());
    sudo.status().is_ok_and(|status| status.success())
}

fn doc_tests() -> Result<Tally> {
    let name = "documentation";
    let mut command = cargo();
    command.args(["test", "--locked", "--workspace", "--exclude", "wg-ebpf", "--doc"]);
    let (success, output) = run_to_end(&mut command, name)?;
    let tally = read(name, &output, success);
    println!("== {name}: {} passed, {} failed", tally.passed, tally.failed.len());
    if !tally.failed.is_empty() {
        println!("{output}");
    }
    Ok(tally)
}

/// Runs a command and gives whether it succeeded, and all that it printed. On a signal and after
/// [`SUITE_LIMIT`] it is told to end, so that it cleans up, and killed only if it does not.
fn run_to_end(command: &mut Command, name: &str) -> Result<(bool, String)> {
    let file_name = format!("test-{}-{}.log", std::process::id(), name.replace([' ', '/'], "-"));
    let log = target_dir().join(file_name);
    let file = File::create(&log).with_context(|| format!("writing {}", log.display()))?;
    let both = file.try_clone()?;
    let mut child = command.stdin(Stdio::null()).stdout(file).stderr(both).spawn()?;
    let started = Instant::now();
    let mut told_at = None;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let must_end = lab::check_interrupted().is_err() || started.elapsed() > SUITE_LIMIT;
        if must_end && told_at.is_none() {
            // It fails only if the child has ended, which the next round sees.
            let _ = kill_process(Pid::from_child(&child), Signal::TERM);
            told_at = Some(Instant::now());
        }
        if told_at.is_some_and(|at| at.elapsed() > GRACE) {
            child.kill()?;
        }
        thread::sleep(Duration::from_millis(20));
    };
    let mut output = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    fs::remove_file(&log)?;
    if let Err(interrupted) = lab::check_interrupted() {
        let _ = std::io::stdout().write_all(output.as_bytes());
        return Err(interrupted);
    }
    if told_at.is_some() {
        output += &format!("\n{name} took more than {SUITE_LIMIT:?} and was ended\n");
    }
    Ok((status.success(), output))
}

/// Reads what a program with tests printed.
fn read(suite: &str, output: &str, success: bool) -> Tally {
    let mut tally = Tally::default();
    for line in output.lines() {
        if let Some(skipped) = line.trim().strip_prefix("SKIPPED ") {
            let skipped = format!("{suite}: {skipped}");
            if !tally.skipped.contains(&skipped) {
                tally.skipped.push(skipped);
            }
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            tally.passed += count(counts, "passed");
        } else if let Some((name, ended)) =
            line.strip_prefix("test ").and_then(|line| line.rsplit_once(" ... "))
        {
            match ended.split(',').next() {
                Some("FAILED") => tally.failed.push(format!("{suite}: {name}")),
                Some("ignored") => tally.skipped.push(format!("{suite}: {name}: {ended}")),
                _ => {}
            }
        }
    }
    // To the test harness a test that skipped itself has passed.
    let by_themselves = output.lines().filter(|line| line.trim().starts_with("SKIPPED ")).count();
    tally.passed = tally.passed.saturating_sub(by_themselves.min(tally.skipped.len()));
    if !success && tally.failed.is_empty() {
        tally.failed.push(format!("{suite}: it ended with an error"));
    }
    tally
}

/// The number before a word, as in `3 passed; 1 failed;`.
fn count(text: &str, what: &str) -> usize {
    let words: Vec<_> = text.split([' ', ';']).filter(|word| !word.is_empty()).collect();
    let found = words.windows(2).find(|pair| pair[1] == what);
    found.and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 5 tests
test a::one ... ok
test a::two - should panic ... ok
test a::three ... FAILED
test a::four ... ignored, needs a NIC
test a::five ... ok

successes:
---- a::five stdout ----
SKIPPED five: needs root to make network namespaces

test result: FAILED. 3 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s
";

    #[test]
    fn passed_failed_and_skipped_are_told_apart() {
        let tally = read("x", OUTPUT, false);
        assert_eq!(tally.passed, 2);
        assert_eq!(tally.failed, ["x: a::three"]);
        assert_eq!(
            tally.skipped,
            ["x: a::four: ignored, needs a NIC", "x: five: needs root to make network namespaces"]
        );
    }

    #[test]
    fn a_program_that_dies_has_failed() {
        let tally = read("x", "running 5 tests\ntest a::one ... ok\n", false);
        assert_eq!(tally.failed, ["x: it ended with an error"]);
    }
}
