//! `cargo xtask fuzz`: runs the targets of `fuzz/` under libFuzzer, with the stable toolchain.
//!
//! What is found beside the committed corpus stays in `target/fuzz/corpus` for the next time. An input
//! that breaks a rule is written to `target/fuzz/broken`, and its path printed. The same targets run
//! briefly in every `cargo xtask test`, without a fuzzer: `wg-userspace/tests/fuzz`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{
    build_ebpf,
    workspace::{cargo, root, succeed, target_dir},
};

/// Longest input; `wg-userspace/tests/fuzz` has it, too.
const LEN_MAX: usize = 2048;

/// Arguments of `fuzz`.
#[derive(Args, Debug)]
pub struct Options {
    /// One target; without it all, one after the other
    target: Option<String>,
    /// Time for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Run this input only
    #[arg(long, requires = "target")]
    input: Option<PathBuf>,
    /// Afterwards, commit as little of what was found as covers the same: replaces `fuzz/corpus/TARGET`
    #[arg(long)]
    keep: bool,
}

/// Builds the targets and runs them.
///
/// # Errors
/// If they do not build, or an input breaks a rule.
pub fn fuzz(options: &Options) -> Result<()> {
    let all = targets()?;
    let targets = match &options.target {
        None => all,
        Some(target) => {
            ensure!(all.contains(target), "targets are {}", all.join(", "));
            vec![target.clone()]
        }
    };
    let programs = build(&targets)?;
    for target in &targets {
        let program = programs.join(target);
        match &options.input {
            Some(input) => succeed(Command::new(&program).arg(input))?,
            None => run(target, &program, options)?,
        }
    }
    Ok(())
}

/// The names of the files with the targets' programs.
fn targets() -> Result<Vec<String>> {
    let folder = root().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("in {}", folder.display()))? {
        let path = entry?.path();
        names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

/// Builds the programs, and gives the folder where they are.
fn build(targets: &[String]) -> Result<PathBuf> {
    let object = build_ebpf::build(false)?;
    let folder = target_dir().join("fuzz");
    let mut build = cargo();
    build.args(["build", "--release", "--locked", "--manifest-path", "fuzz/Cargo.toml"]);
    build.args(targets.iter().flat_map(|target| ["--bin", target]));
    build.env("CARGO_TARGET_DIR", &folder).env("TIDEGATE_BPF_OBJECT", object);
    succeed(build.env("RUSTC_WRAPPER", root().join("fuzz/rustc.sh")))?;
    Ok(folder.join("release"))
}

fn run(target: &str, program: &Path, options: &Options) -> Result<()> {
    let folder = |name: &str| -> Result<PathBuf> {
        let folder = target_dir().join("fuzz").join(name).join(target);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(folder)
    };
    let (found, broken) = (folder("corpus")?, folder("broken")?);
    let committed = root().join("fuzz/corpus").join(target);
    let libfuzzer = |arguments: &[String]| {
        let mut command = Command::new(program);
        command.arg(format!("-max_len={LEN_MAX}")).args(arguments);
        command.arg(format!("-artifact_prefix={}/", broken.display()));
        // What is large is asked of the kernel anew each time: zeroed and not touched.
        command.env("MALLOC_MMAP_THRESHOLD_", "131072");
        command
    };
    println!("== {target}");
    let time = [format!("-max_total_time={}", options.seconds), "-print_final_stats=1".to_owned()];
    let mut command = libfuzzer(&time);
    command.env("TIDEGATE_FUZZ_SEEDS", &found).arg(&found).arg(&committed);
    succeed(&mut command).with_context(|| {
        format!("{target}: again with `cargo xtask fuzz {target} --input {}/…`", broken.display())
    })?;
    if options.keep {
        let kept = folder("kept")?;
        fs::remove_dir_all(&kept)?;
        fs::create_dir(&kept)?;
        succeed(libfuzzer(&["-merge=1".to_owned()]).arg(&kept).arg(&committed).arg(&found))?;
        fs::remove_dir_all(&committed)?;
        fs::create_dir(&committed)?;
        for entry in fs::read_dir(&kept)? {
            let path = entry?.path();
            fs::copy(&path, committed.join(path.file_name().expect("an entry has a name")))?;
        }
    }
    Ok(())
}
