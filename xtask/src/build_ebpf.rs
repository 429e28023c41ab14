//! Builds the programs in the kernel into `target/ebpf/tidegate.bpf.o`, which the daemon embeds, and those of the
//! load generator into `target/ebpf/tidegate-load.bpf.o`.
//!
//! Takes the first toolchain that is complete: a rustc with LLVM's BPF back end and a `core` for it
//! (prebuilt, as Debian packages it, or as source in a rustup nightly), and a `bpf-linker` that
//! was built against the same LLVM major. A linker that is missing is installed, once per user.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

/// Version of `bpf-linker` that is installed where none fits.
const BPF_LINKER_VERSION: &str = "0.13.0";
/// LLVM majors against which that version can be built.
const BPF_LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
/// Rust's name of the target.
const TARGET: &str =
    if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };

/// The objects: what cargo calls the program, and the file it becomes. The gateway's is the first.
const OBJECTS: [(&str, &str); 2] =
    [("wg-ebpf", "tidegate.bpf.o"), ("wg-ebpf-load", "tidegate-load.bpf.o")];

/// What to do when no toolchain is complete.
const ADVICE: &str = "install one of these:
  Debian:  apt-get install --no-install-recommends rustc-web libstd-rust-web-dev-bpf llvm-22-dev
           (the LLVM major must be that of `/usr/bin/rustc -vV`)
  rustup:  rustup toolchain install nightly --component rust-src
           and LLVM's development files of the major in `rustc +nightly -vV`";

/// Builds the objects and returns the path of the gateway's. With `check`, builds them a second time from nothing
/// and fails if the bytes differ.
///
/// # Errors
/// If no toolchain is complete, the build fails, or the bytes differ.
pub fn build(check: bool) -> Result<PathBuf> {
    let (toolchain, linker) = choose()?;
    let linker = linker.ready(&toolchain)?;
    eprintln!(
        "eBPF: {} with {}, {}",
        toolchain.version,
        linker.display(),
        if toolchain.build_std { "core from source" } else { "prebuilt core" }
    );
    let dir = target_dir()?.join("ebpf");
    let built = toolchain.build(&linker, &dir)?;
    for ((_, name), bytes) in OBJECTS.iter().zip(&built) {
        let object = dir.join(name);
        replace(&object, bytes).with_context(|| format!("writing {}", object.display()))?;
        eprintln!("eBPF: {} ({} bytes)", object.display(), bytes.len());
    }
    if check {
        let fresh = dir.join(format!("check-{}", std::process::id()));
        let again = toolchain.build(&linker, &fresh);
        fs::remove_dir_all(&fresh).with_context(|| format!("removing {}", fresh.display()))?;
        ensure!(again? == built, "a second build gave other bytes");
        eprintln!("eBPF: a second build from nothing gave the same bytes");
    }
    Ok(dir.join(OBJECTS[0].1))
}

/// Which toolchain [`build`] would take, by its version.
///
/// # Errors
/// If none is complete.
pub fn toolchain() -> Result<String> {
    choose().map(|(toolchain, _)| toolchain.version)
}

/// A rustc that can build for the BPF target.
struct Toolchain {
    rustc: PathBuf,
    /// Cargo that drives it: `-Zbuild-std` wants the one that belongs to it.
    cargo: PathBuf,
    sysroot: PathBuf,
    /// First line of `rustc -V`.
    version: String,
    /// The target triple on which it runs.
    host: String,
    /// Major version of its LLVM.
    llvm: u32,
    /// Whether `core` is there as source only.
    build_std: bool,
}

/// A linker that fits, or how to come by it.
enum Linker {
    Present(PathBuf),
    Installable { llvm_prefix: PathBuf },
}

/// The first complete toolchain; if there is none, says of each what it lacks.
fn choose() -> Result<(Toolchain, Linker)> {
    let mut refused = String::new();
    for rustc in rustc_candidates() {
        match Toolchain::probe(&rustc).and_then(|t| Ok((Linker::find(&t)?, t))) {
            Ok((linker, toolchain)) => return Ok((toolchain, linker)),
            Err(why) => refused += &format!("  {}: {why:#}\n", rustc.display()),
        }
    }
    bail!("no toolchain can build the eBPF programs:\n{refused}{ADVICE}")
}

/// `$TIDEGATE_EBPF_RUSTC` alone if it is set; else Debian's rustc, then rustup's nightlies.
fn rustc_candidates() -> Vec<PathBuf> {
    if let Some(rustc) = env::var_os("TIDEGATE_EBPF_RUSTC") {
        return vec![rustc.into()];
    }
    let mut candidates = vec![PathBuf::from("/usr/bin/rustc")];
    // Without rustup there is nothing to list, which is no error.
    let toolchains = output(Command::new("rustup").args(["toolchain", "list"])).unwrap_or_default();
    for nightly in toolchains.lines().filter_map(|line| line.split(' ').next()) {
        if nightly.starts_with("nightly") {
            let which = ["which", "rustc", "--toolchain", nightly];
            candidates.extend(output(Command::new("rustup").args(which)).map(PathBuf::from));
        }
    }
    candidates
}

impl Toolchain {
    fn probe(rustc: &Path) -> Result<Self> {
        let verbose = output(Command::new(rustc).arg("-vV"))?;
        let field = |name: &str| verbose.lines().find_map(|line| line.strip_prefix(name));
        let release = field("release: ").context("it does not tell its release")?;
        ensure!(
            version(release) >= version(env!("CARGO_PKG_RUST_VERSION")),
            "rustc {release} is older than {}",
            env!("CARGO_PKG_RUST_VERSION")
        );
        let llvm = field("LLVM version: ").context("it has no LLVM")?;
        let host = field("host: ").context("it does not tell its host")?;
        let sysroot = PathBuf::from(output(Command::new(rustc).args(["--print", "sysroot"]))?);
        let rustlib = sysroot.join("lib/rustlib");
        let prebuilt = has_core(&rustlib.join(TARGET).join("lib"));
        ensure!(
            prebuilt || rustlib.join("src/rust/library/core/Cargo.toml").is_file(),
            "neither a prebuilt core for {TARGET} nor rust-src in {}",
            rustlib.display()
        );
        let own_cargo = rustc.with_file_name("cargo");
        let cargo = if !prebuilt && own_cargo.is_file() { own_cargo } else { this_cargo() };
        Ok(Self {
            rustc: rustc.to_owned(),
            cargo,
            sysroot,
            version: verbose.lines().next().unwrap_or_default().to_owned(),
            host: host.to_owned(),
            llvm: version(llvm).0,
            build_std: !prebuilt,
        })
    }

    /// Builds in `target_dir` and gives the bytes of the [`OBJECTS`], without DWARF where that can be taken out.
    fn build(&self, linker: &Path, target_dir: &Path) -> Result<Vec<Vec<u8>>> {
        let root = workspace_root();
        let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
        let flags = [
            format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
            // The linker makes BTF from DWARF.
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
            format!("-Clinker={}", linker.display()),
            remap(&root, "/tidegate"),
            remap(&cargo_home()?, "/cargo"),
            remap(&self.sysroot, "/rust"),
        ];
        let mut cargo = Command::new(&self.cargo);
        cargo.current_dir(&root).args(["build", "--quiet", "--locked", "--release"]);
        cargo.args(["--package", "wg-ebpf", "--target", TARGET, "--target-dir"]).arg(target_dir);
        if self.build_std {
            cargo.arg("-Zbuild-std=core");
        }
        forget_build_settings(&mut cargo);
        cargo.env_remove("RUSTUP_TOOLCHAIN").env("RUSTC", &self.rustc);
        // A stable rustc serves as well: this admits the few unstable features of `aya-ebpf`.
        cargo.env("RUSTC_BOOTSTRAP", "1").env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        run(&mut cargo)?;
        let read = |(program, _): &(&str, &str)| {
            let built = target_dir.join(TARGET).join("release").join(program);
            self.stripped(&built).with_context(|| format!("reading {}", built.display()))
        };
        OBJECTS.iter().map(read).collect()
    }

    /// The object without DWARF, which only makes it larger; its BTF stays.
    fn stripped(&self, object: &Path) -> io::Result<Vec<u8>> {
        let stripped = object.with_extension("stripped");
        for objcopy in self.objcopy_candidates() {
            let mut strip = Command::new(objcopy);
            strip.arg("--strip-debug").arg(object).arg(&stripped);
            if output(&mut strip).is_ok() {
                return fs::read(&stripped);
            }
        }
        eprintln!("eBPF: no llvm-objcopy found, the object keeps its DWARF");
        fs::read(object)
    }

    /// Copies of `objcopy` that know BPF objects: those that come with a Rust toolchain, and LLVM's.
    fn objcopy_candidates(&self) -> Vec<PathBuf> {
        let this_sysroot = output(Command::new("rustc").args(["--print", "sysroot"]));
        let host = format!("lib/rustlib/{}/bin/rust-objcopy", self.host);
        let rust = [Ok(self.sysroot.clone()), this_sysroot.map(PathBuf::from)]
            .into_iter()
            .flatten()
            .map(|sysroot| sysroot.join(&host))
            .filter(|objcopy| objcopy.is_file());
        let llvm = llvm_prefix(self.llvm).map(|prefix| prefix.join("bin/llvm-objcopy"));
        rust.chain(llvm).chain(["llvm-objcopy".into()]).collect()
    }
}

impl Linker {
    /// Looks at `$TIDEGATE_BPF_LINKER` alone if it is set, else in `PATH` and the per-user cache.
    fn find(toolchain: &Toolchain) -> Result<Self> {
        let llvm = toolchain.llvm;
        if let Some(linker) = env::var_os("TIDEGATE_BPF_LINKER") {
            let linker = PathBuf::from(linker);
            fits(&linker, llvm).context("$TIDEGATE_BPF_LINKER does not fit")?;
            return Ok(Self::Present(linker));
        }
        let mut refused = String::new();
        for linker in [PathBuf::from("bpf-linker"), cached_linker(llvm)?] {
            match fits(&linker, llvm) {
                Ok(()) => return Ok(Self::Present(linker)),
                Err(why) => refused += &format!("; {}: {why:#}", linker.display()),
            }
        }
        ensure!(
            BPF_LINKER_LLVM.contains(&llvm),
            "no bpf-linker for LLVM {llvm}, and bpf-linker {BPF_LINKER_VERSION} knows LLVM {} to {} \
             only{refused}",
            BPF_LINKER_LLVM.start(),
            BPF_LINKER_LLVM.end(),
        );
        let llvm_prefix = llvm_prefix(llvm).with_context(|| {
            format!("no bpf-linker for LLVM {llvm}, and no llvm-{llvm}-dev to build one{refused}")
        })?;
        Ok(Self::Installable { llvm_prefix })
    }

    /// The linker's path, after it was installed if need be.
    fn ready(self, toolchain: &Toolchain) -> Result<PathBuf> {
        match self {
            Self::Present(linker) => Ok(linker),
            Self::Installable { llvm_prefix } => install_linker(toolchain.llvm, &llvm_prefix),
        }
    }
}

/// Builds `bpf-linker` into the per-user cache, unless another process did so meanwhile.
fn install_linker(llvm: u32, llvm_prefix: &Path) -> Result<PathBuf> {
    let cache = cache_dir()?;
    fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
    let lock = cache.join("bpf-linker.lock");
    let lock = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
    lock.lock().context("waiting for another installation of bpf-linker")?;
    let linker = cached_linker(llvm)?;
    if fits(&linker, llvm).is_ok() {
        return Ok(linker);
    }
    let root = linker.ancestors().nth(2).expect("it ends in bin/bpf-linker");
    eprintln!(
        "eBPF: installing bpf-linker {BPF_LINKER_VERSION} for LLVM {llvm} into {}: takes some \
         minutes, once per user",
        root.display()
    );
    let mut cargo = Command::new(this_cargo());
    cargo.args(["install", "bpf-linker", "--version", BPF_LINKER_VERSION, "--locked", "--force"]);
    cargo.args(["--no-default-features", "--features"]).arg(format!("llvm-{llvm}"));
    cargo.arg("--root").arg(root);
    forget_build_settings(&mut cargo);
    cargo.env("LLVM_PREFIX", llvm_prefix);
    // Its own release profile takes four times as long, for a linker that runs for seconds.
    for (setting, value) in
        [("LTO", "off"), ("OPT_LEVEL", "1"), ("DEBUG", "0"), ("CODEGEN_UNITS", "16")]
    {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{setting}"), value);
    }
    run(&mut cargo)?;
    fits(&linker, llvm).context("the bpf-linker just installed does not work")?;
    Ok(linker)
}

/// Whether this linker runs and has the LLVM major of the rustc whose bitcode it is to read.
fn fits(linker: &Path, llvm: u32) -> Result<()> {
    // LLVM answers this argument itself and ends the process before any file is read.
    let llvm_version = ["--llvm-args=--version", "--output", "/dev/null", "/dev/null"];
    let answer = output(Command::new(linker).args(llvm_version))?;
    let (_, found) = answer.split_once("LLVM version ").context("it does not tell its LLVM")?;
    ensure!(version(found).0 == llvm, "it has LLVM {}, not {llvm}", version(found).0);
    Ok(())
}

/// Where the linker for this LLVM major lies in the per-user cache.
fn cached_linker(llvm: u32) -> Result<PathBuf> {
    Ok(cache_dir()?.join(format!("bpf-linker-{BPF_LINKER_VERSION}-llvm-{llvm}/bin/bpf-linker")))
}

/// This project's folder in the user's cache.
fn cache_dir() -> Result<PathBuf> {
    // Relative paths are to be ignored (XDG Base Directory Specification).
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let cache = match cache {
        Some(dir) => dir,
        None => home()?.join(".cache"),
    };
    Ok(cache.join("tidegate"))
}

/// Where the development files of this LLVM major are.
fn llvm_prefix(llvm: u32) -> Option<PathBuf> {
    let debian = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    if debian.join("lib/libLLVM.so").exists() {
        return Some(debian);
    }
    [format!("llvm-config-{llvm}"), "llvm-config".to_owned()].iter().find_map(|config| {
        let found = output(Command::new(config).arg("--version")).ok()?;
        let prefix = output(Command::new(config).arg("--prefix")).ok()?;
        (version(&found).0 == llvm).then(|| prefix.into())
    })
}

/// Whether a library folder of rustc's has a `core`.
fn has_core(lib: &Path) -> bool {
    let Ok(entries) = fs::read_dir(lib) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
}

/// Takes from a cargo's environment what would make its output differ from one user to the next.
fn forget_build_settings(cargo: &mut Command) {
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let is_setting = ["RUSTFLAGS", "RUSTC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"]
            .contains(&&*text)
            || ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_ENCODED_", "CARGO_TARGET_"]
                .iter()
                .any(|prefix| text.starts_with(prefix));
        if is_setting {
            cargo.env_remove(&name);
        }
    }
}

/// Writes the file unless it has these bytes already, so that what embeds it is not built again;
/// whoever reads it meanwhile sees the old one or the new one, whole.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let new = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    fs::rename(&new, path)
}

fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_owned()
}

/// As cargo has it; a relative `$CARGO_TARGET_DIR` is taken to be relative to the workspace.
fn target_dir() -> Result<PathBuf> {
    let dir = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| OsString::from("target"));
    Ok(workspace_root().join(dir))
}

fn this_cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

fn cargo_home() -> Result<PathBuf> {
    match env::var_os("CARGO_HOME") {
        Some(dir) => Ok(dir.into()),
        None => Ok(home()?.join(".cargo")),
    }
}

fn home() -> Result<PathBuf> {
    env::home_dir().context("the user has no home directory")
}

/// Major and minor version at the beginning of `text`; 0 for what is missing.
fn version(text: &str) -> (u32, u32) {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// What the command prints, if it succeeds.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().context("not runnable")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", error.lines().next().unwrap_or("it fails"));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("running {name}"))?;
    ensure!(status.success(), "{name} failed ({status})");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(version("22.1.8"), (22, 1));
        assert_eq!(version("1.97.0-nightly"), (1, 97));
        assert_eq!(version("23"), (23, 0));
        assert_eq!(version(""), (0, 0));
        assert!(version("1.100.0") > version("1.95"));
    }

    #[test]
    fn an_unchanged_object_is_not_written_again() {
        let path = env::temp_dir().join(format!("tidegate-replace-{}", std::process::id()));
        replace(&path, b"one").unwrap();
        let first = fs::metadata(&path).unwrap().modified().unwrap();
        replace(&path, b"one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), first);
        replace(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        fs::remove_file(&path).unwrap();
    }
}
