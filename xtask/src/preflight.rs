//! Looks at the machine before anything is built, and installs what Debian has and is missing.

use std::{
    env, fs,
    io::{self, BufRead, IsTerminal, Write},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{build_ebpf, lab::find_program, workspace::succeed};

/// The oldest kernel on which the daemon's BPF programs and AF_XDP sockets are meant to work.
const KERNEL_MIN: (u32, u32) = (6, 1);

/// Programs and the Debian packages they come from.
const PROGRAMS: &[(&str, &str)] = &[
    ("cc", "build-essential"),
    ("ip", "iproute2"),
    ("ping", "iputils-ping"),
    ("unshare", "util-linux"),
    ("wg", "wireguard-tools"),
];

/// What tests need on top.
pub const FOR_TESTS: &[(&str, &str)] = &[
    ("wireguard-go", "wireguard-go"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("ethtool", "ethtool"),
];

/// Debian's Rust with a `core` for the BPF target; LLVM's development files come on top.
const EBPF_PACKAGES: &[&str] = &["rustc-web", "libstd-rust-web-dev-bpf"];

/// LLVM major of `rustc-web` while it is not installed and cannot be asked.
const EBPF_LLVM: u32 = 22;

/// One line of the table.
struct Finding<'a> {
    what: &'a str,
    found: String,
    verdict: Verdict,
}

enum Verdict {
    Fine,
    /// Worse, not impossible; why.
    Lacking(String),
    /// Impossible; why.
    Fatal(String),
}

/// Prints the table, installs missing packages after asking once, and gives up on what no package can
/// mend. `yes` answers the question; `more` are programs, with their packages, that are needed beside
/// those which everything needs.
///
/// # Errors
/// If the machine cannot do it.
pub fn check(yes: bool, more: &[(&str, &str)]) -> Result<()> {
    let programs = [PROGRAMS, more].concat();
    let findings = look(&programs);
    println!("preflight");
    for Finding { what, found, verdict } in &findings {
        let end = match verdict {
            Verdict::Fine => "ok".to_owned(),
            Verdict::Lacking(why) => format!("lacking: {why}"),
            Verdict::Fatal(why) => format!("MISSING: {why}"),
        };
        println!("  {what:<14} {found:<46} {end}");
    }
    if let Some(why) = findings.iter().find_map(|finding| match &finding.verdict {
        Verdict::Fatal(why) => Some(format!("{}: {why}", finding.what)),
        _ => None,
    }) {
        bail!("this machine cannot do it: {why}");
    }
    install(yes, &programs)
}

fn look<'a>(programs: &[(&'a str, &str)]) -> Vec<Finding<'a>> {
    let (kernel, system) = system();
    let mut findings = vec![
        Finding {
            what: "system",
            found: format!("{system}, {}", env::consts::ARCH),
            verdict: match env::consts::ARCH {
                "x86_64" | "aarch64" => Verdict::Fine,
                _ => Verdict::Lacking("never tried on this architecture".to_owned()),
            },
        },
        Finding {
            what: "kernel",
            found: kernel.clone(),
            verdict: if kernel_version(&kernel) >= KERNEL_MIN {
                Verdict::Fine
            } else {
                Verdict::Fatal(format!("Linux {}.{} or later", KERNEL_MIN.0, KERNEL_MIN.1))
            },
        },
        rust(),
        privilege(),
        device("TUN", "/dev/net/tun", true),
        device("namespaces", "/proc/self/ns/net", true),
        device("BTF", "/sys/kernel/btf/vmlinux", false),
    ];
    let (found, verdict) = match build_ebpf::toolchain() {
        Ok(toolchain) => (toolchain, Verdict::Fine),
        Err(_) => ("none".to_owned(), Verdict::Lacking("no complete eBPF toolchain".to_owned())),
    };
    findings.push(Finding { what: "eBPF", found, verdict });
    for &(program, package) in programs {
        let (found, verdict) = match find_program(program) {
            Some(path) => (path.display().to_string(), Verdict::Fine),
            None => ("none".to_owned(), Verdict::Lacking(format!("package {package}"))),
        };
        findings.push(Finding { what: program, found, verdict });
    }
    findings
}

fn system() -> (String, String) {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = os_release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .map_or("Linux", |name| name.trim_matches('"'));
    (kernel.trim().to_owned(), name.to_owned())
}

fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn rust() -> Finding<'static> {
    let version = Command::new("rustc").arg("--version").output().ok();
    let found = version.map(|version| String::from_utf8_lossy(&version.stdout).trim().to_owned());
    let needed = env!("CARGO_PKG_RUST_VERSION");
    let number = found.as_deref().and_then(|found| found.split(' ').nth(1)).unwrap_or_default();
    let verdict = if kernel_version(number) >= kernel_version(needed) {
        Verdict::Fine
    } else {
        Verdict::Fatal(format!("Rust {needed} or later, from https://rustup.rs"))
    };
    Finding { what: "rust", found: found.unwrap_or_else(|| "none".to_owned()), verdict }
}

fn privilege() -> Finding<'static> {
    let (found, verdict) = if rustix::process::geteuid().is_root() {
        ("root", Verdict::Fine)
    } else if find_program("sudo").is_some() {
        ("sudo, for the part that makes namespaces and loads XDP", Verdict::Fine)
    } else {
        let why = "without root only sockets in a user namespace can be shown".to_owned();
        ("none", Verdict::Lacking(why))
    };
    Finding { what: "privilege", found: found.to_owned(), verdict }
}

fn device(what: &'static str, path: &str, needed: bool) -> Finding<'static> {
    let verdict = match (Path::new(path).exists(), needed) {
        (true, _) => Verdict::Fine,
        (false, true) => Verdict::Fatal(format!("the kernel offers no {path}")),
        (false, false) => Verdict::Lacking(format!("the kernel offers no {path}")),
    };
    Finding { what, found: path.to_owned(), verdict }
}

/// Installs what is missing; a second round when only the first could tell which LLVM is needed.
fn install(yes: bool, programs: &[(&str, &str)]) -> Result<()> {
    let mut asked = false;
    for _ in 0..2 {
        let packages = missing_packages(programs);
        if packages.is_empty() {
            return Ok(());
        }
        let text = packages.join(" ");
        ensure!(
            find_program("apt-get").is_some(),
            "missing, by their Debian names: {text}; install them by your system's means"
        );
        if !asked && !yes && env::var("CI").as_deref() != Ok("true") {
            ask(&text)?;
        }
        asked = true;
        apt(&["update"])?;
        let mut install = vec!["install", "-y", "--no-install-recommends"];
        install.extend(packages.iter().map(String::as_str));
        apt(&install)?;
    }
    let packages = missing_packages(programs);
    ensure!(packages.is_empty(), "still missing after the installation: {}", packages.join(" "));
    build_ebpf::toolchain().map(drop)
}

fn missing_packages(programs: &[(&str, &str)]) -> Vec<String> {
    let mut packages: Vec<String> = programs
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| (*package).to_owned())
        .collect();
    if build_ebpf::toolchain().is_err() {
        packages.extend(EBPF_PACKAGES.iter().map(|&package| package.to_owned()));
        packages.push(format!("llvm-{}-dev", debian_llvm().unwrap_or(EBPF_LLVM)));
    }
    packages
}

fn debian_llvm() -> Option<u32> {
    let output = Command::new("/usr/bin/rustc").arg("-vV").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    Some(kernel_version(version).0)
}

fn ask(packages: &str) -> Result<()> {
    println!("missing packages: {packages}");
    ensure!(
        io::stdin().is_terminal(),
        "nobody is there to be asked: `--yes` installs them, or install them yourself"
    );
    print!("install them with apt-get? [y/N] ");
    io::stdout().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    ensure!(matches!(answer.trim(), "y" | "Y" | "yes"), "not without these packages");
    Ok(())
}

fn apt(arguments: &[&str]) -> Result<()> {
    let is_root = rustix::process::geteuid().is_root();
    let mut command = Command::new(if is_root { "apt-get" } else { "sudo" });
    if !is_root {
        ensure!(find_program("sudo").is_some(), "neither root nor sudo: packages stay missing");
        command.arg("apt-get");
    }
    // Another apt-get may be at work.
    command.args(["-q", "-o", "DPkg::Lock::Timeout=300"]).args(arguments);
    succeed(command.env("DEBIAN_FRONTEND", "noninteractive")).context("installing packages")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_as_numbers() {
        assert!(kernel_version("6.10.0-rc1") > KERNEL_MIN);
        assert!(kernel_version("6.1.0-40-amd64") >= KERNEL_MIN);
        assert!(kernel_version("5.15.0") < KERNEL_MIN);
    }
}
