//! `cargo xtask dist`: a folder and an archive with all that an installation needs.
//!
//! Both have the layout of `/usr`. The archive of the same program has the same bytes, wherever and
//! whenever it is made: names are sorted, owners are 0, and times are those of the last commit, or of
//! `SOURCE_DATE_EPOCH`.

use std::{
    env, fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{
    build_ebpf,
    lab::find_program,
    licences,
    workspace::{cargo, root, succeed, target_dir},
};

/// Arguments of `dist`.
#[derive(Args, Debug)]
pub struct Options {
    /// Where the folder and the archive go [default: target/dist]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Where a shell looks for completions.
const COMPLETIONS: [(&str, &str); 5] = [
    ("bash", "share/bash-completion/completions/tidegate"),
    ("zsh", "share/zsh/site-functions/_tidegate"),
    ("fish", "share/fish/vendor_completions.d/tidegate.fish"),
    ("elvish", "share/elvish/lib/tidegate.elv"),
    ("powershell", "share/doc/tidegate/tidegate.ps1"),
];

/// Where the manual's pages go.
const MAN: &str = "share/man/man8";
const DOC: &str = "share/doc/tidegate";

/// Builds the program and packs it.
///
/// # Errors
/// If something cannot be built or written.
pub fn dist(options: &Options) -> Result<()> {
    build_ebpf::build(false)?;
    let mut build = cargo();
    build.args(["build", "--locked", "--release", "-p", "wg-userspace", "--bin", "tidegate"]);
    succeed(&mut build)?;
    let program = target_dir().join("release/tidegate");
    let out = options.out.clone().unwrap_or_else(|| target_dir().join("dist"));
    let licences = licences::texts()?;
    let made = pack(&Contents { program: &program, licences: &licences, epoch: epoch()? }, &out)?;
    println!("{}\n{}", made.folder.display(), made.archive.display());
    println!("install it: tar -C /usr --strip-components=1 -xf {}", made.archive.display());
    Ok(())
}

/// What is packed beside the files of the workspace.
#[derive(Debug)]
pub struct Contents<'a> {
    /// The daemon, for this machine's architecture.
    pub program: &'a Path,
    /// The licences of what is linked into it.
    pub licences: &'a str,
    /// When everything in the archive was made, in seconds since 1970.
    pub epoch: u64,
}

/// What came out.
#[derive(Debug)]
pub struct Made {
    /// Everything, as it would lie in `/usr`.
    pub folder: PathBuf,
    /// The same in one file.
    pub archive: PathBuf,
}

/// Packs a program that is built. What an earlier call has left in `out` is replaced.
///
/// # Errors
/// If the program does not run here, or something cannot be written.
pub fn pack(contents: &Contents<'_>, out: &Path) -> Result<Made> {
    let name = format!("tidegate-{}-{}-linux", env!("CARGO_PKG_VERSION"), env::consts::ARCH);
    let folder = out.join(&name);
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    fill(contents, &folder).with_context(|| format!("filling {}", folder.display()))?;
    let archive = archive(out, &name, contents.epoch)?;
    Ok(Made { folder, archive })
}

fn fill(contents: &Contents<'_>, folder: &Path) -> Result<()> {
    let program = folder.join("bin/tidegate");
    let bytes = fs::read(contents.program)
        .with_context(|| format!("reading {}", contents.program.display()))?;
    write(&program, &bytes)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    symlink("tidegate", folder.join("bin/tidegated"))?;

    for (shell, path) in COMPLETIONS {
        write(&folder.join(path), &output(&program, &["completions", shell])?)?;
    }
    let man = folder.join(MAN);
    output(&program, &["man", man.to_str().context("a path that is not text")?])?;

    copy("dist/systemd/tidegate@.service", &folder.join("lib/systemd/system"))?;
    let doc = folder.join(DOC);
    for file in ["README.md", "SECURITY.md", "LICENSE-APACHE", "LICENSE-MIT"] {
        copy(file, &doc)?;
    }
    write(&doc.join("LICENSES-OF-OTHERS"), contents.licences.as_bytes())?;
    copy("examples", &doc)
}

/// Runs the program that is packed. What its environment says shall not be in its manual.
fn output(program: &Path, arguments: &[&str]) -> Result<Vec<u8>> {
    let doing = || format!("running {} {}", program.display(), arguments.join(" "));
    let output = Command::new(program).args(arguments).env_clear().output().with_context(doing)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}: {said}", doing(), output.status);
    Ok(output.stdout)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::create_dir_all(path.parent().context("a path without a folder")?)?;
    fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}

/// Copies a file or a folder of the workspace into `folder`.
fn copy(from: &str, folder: &Path) -> Result<()> {
    let path = root().join(from);
    if path.is_dir() {
        let entries = fs::read_dir(&path).with_context(|| format!("reading {}", path.display()))?;
        for entry in entries {
            let name = entry?.file_name();
            let name = name.to_str().context("a name that is not text")?;
            copy(&format!("{from}/{name}"), &folder.join(path.file_name().unwrap_or_default()))?;
        }
        return Ok(());
    }
    let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    write(&folder.join(path.file_name().context("a file without a name")?), &bytes)
}

fn archive(out: &Path, name: &str, epoch: u64) -> Result<PathBuf> {
    // With one thread, since the bytes depend on how many there are.
    let (extension, program) = match find_program("zstd") {
        Some(_) => ("zst", "zstd -19 -T1"),
        None => ("gz", "gzip -9 -n"),
    };
    let archive = out.join(format!("{name}.tar.{extension}"));
    let mut tar = Command::new("tar");
    // Locales sort differently.
    tar.env("LC_ALL", "C").args(["--create", "--format=gnu", "--sort=name"]);
    tar.args(["--owner=0", "--group=0", "--numeric-owner", "--mode=u=rwX,go=rX"]);
    tar.arg(format!("--mtime=@{epoch}")).arg(format!("--use-compress-program={program}"));
    tar.arg("--file").arg(&archive).arg("--directory").arg(out).arg(name);
    succeed(&mut tar)?;
    Ok(archive)
}

/// The time that all files get.
fn epoch() -> Result<u64> {
    if let Ok(epoch) = env::var("SOURCE_DATE_EPOCH") {
        return epoch.parse().with_context(|| format!("SOURCE_DATE_EPOCH is `{epoch}`"));
    }
    let mut git = Command::new("git");
    let output = git.current_dir(root()).args(["log", "-1", "--format=%ct"]).output();
    let seconds = output.ok().filter(|output| output.status.success());
    let seconds =
        seconds.and_then(|output| String::from_utf8(output.stdout).ok()?.trim().parse().ok());
    seconds
        .context("this is no clone of git: set SOURCE_DATE_EPOCH to a time in seconds since 1970")
}
