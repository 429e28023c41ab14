//! The fuzz targets as ordinary tests: what was found before, and random inputs that are the same in
//! every run. `cargo xtask fuzz` looks for more.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use targets::{TARGETS, Target};

/// Longest input, as `cargo xtask fuzz` has it.
const LEN_MAX: usize = 2048;

fn corpus(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target.name)
}

/// The committed inputs and the seeds.
fn inputs(target: &Target) -> Vec<Vec<u8>> {
    let folder = corpus(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let committed = files.iter().map(|file| fs::read(file).unwrap());
    (target.seeds)().into_iter().chain(committed).collect()
}

/// Runs an input, and says which one it was if it breaks a rule.
fn run(target: &Target, input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(input))) {
        eprintln!("{}: {input:?}", target.name);
        resume_unwind(panic);
    }
}

/// One or a few changes, of the kinds that a fuzzer makes.
fn mutate(input: &mut Vec<u8>, others: &[Vec<u8>], rng: &mut StdRng) {
    for _ in 0..rng.random_range(1..=4) {
        let at = rng.random_range(0..=input.len());
        let end = (at + rng.random_range(0..16)).min(input.len());
        match rng.random_range(0..6) {
            0 if at < input.len() => input[at] ^= 1 << rng.random_range(0..8),
            1 if at < input.len() => input[at] = rng.random(),
            2 => drop(input.drain(at..end)),
            3 => input.insert(at, [0, 1, 0x7f, 0xff, b'\n', b'='][rng.random_range(0..6)]),
            4 => {
                let copy = input[at..end].to_vec();
                input.splice(at..at, copy);
            }
            _ => {
                let other = &others[rng.random_range(0..others.len())];
                let from = rng.random_range(0..=other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
    input.truncate(LEN_MAX);
}

/// The corpus, then `count` inputs made of it.
fn repeat(name: &str, count: usize) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("one of the targets");
    let inputs = inputs(target);
    inputs.iter().for_each(|input| run(target, input));
    let mut rng = StdRng::seed_from_u64(7);
    for _ in 0..count {
        let mut input = inputs[rng.random_range(0..inputs.len())].clone();
        mutate(&mut input, &inputs, &mut rng);
        run(target, &input);
    }
}

#[test]
fn aead() {
    repeat("aead", 500);
}

#[test]
fn frames() {
    repeat("frames", 50_000);
}

#[test]
fn handshake() {
    repeat("handshake", 1_000);
}

#[test]
fn handover() {
    repeat("handover", 1_000);
}

#[test]
fn packets() {
    repeat("packets", 500);
}

#[test]
fn uapi() {
    repeat("uapi", 1_000);
}

#[test]
fn config() {
    repeat("config", 500);
}

#[test]
fn sessions() {
    repeat("sessions", 200);
}

#[test]
fn window() {
    repeat("window", 1_000);
}

#[test]
fn routing() {
    repeat("routing", 500);
}

#[test]
fn join() {
    repeat("join", 2_000);
}

#[test]
fn cut() {
    repeat("cut", 20_000);
}

#[test]
fn nat() {
    repeat("nat", 50_000);
}

#[test]
fn nat_flows() {
    repeat("nat_flows", 5_000);
}

#[test]
fn every_target_is_run_here_and_by_the_fuzzer() {
    let source = include_str!("main.rs");
    for Target { name, .. } in TARGETS {
        assert!(source.contains(&format!("    repeat(\"{name}\"")), "{name} is not run here");
        let driver = format!("../fuzz/fuzz_targets/{name}.rs");
        assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(driver).is_file(), "{name}");
    }
}
