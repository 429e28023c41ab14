//! `cargo xtask vm`: the first tunnel in a virtual machine, to see what a kernel and a NIC that are not this
//! machine's make of it: zero-copy AF_XDP with virtio-net, for one.
//!
//! ```text
//!  eth0 198.51.100.1 ── hub ── eth1 198.51.100.2 (namespace `far`)
//!  tidegate, --xdp eth0        tidegate, --mode udp
//! ```
//!
//! Kernels are Debian's, fetched by apt into `target/vm` with a configuration of its own; there is no disk, but
//! busybox, `ip` and the daemon in memory. It runs without KVM, which takes half a minute.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;

use crate::{
    build_ebpf,
    demonstration::{CLIENT_CONF, GATEWAY_CONF},
    lab::find_program,
    workspace::{cargo, succeed, target_dir},
};

/// Arguments of `vm`.
#[derive(Args, Debug)]
pub struct Options {
    /// The release of Debian whose kernel is run: bookworm has 6.1, trixie 6.12; zero-copy with
    /// virtio-net needs 6.13
    #[arg(long, default_value = "trixie-backports")]
    suite: String,
    /// How the gateway receives and sends
    #[arg(long, default_value = "zerocopy")]
    mode: String,
    /// A daemon that was built before
    #[arg(long, value_name = "FILE")]
    tidegate: Option<PathBuf>,
    /// When to give up, in seconds
    #[arg(long, default_value_t = 300)]
    seconds: u32,
}

/// The package that depends on a release's newest kernel.
const KERNEL: &str = "linux-image-cloud-amd64";
/// In the order in which they are loaded.
const MODULES: [&str; 4] = ["failover", "net_failover", "virtio_net", "tun"];
/// What they need, which some kernels have built in.
const MAYBE_BUILT_IN: [&str; 5] =
    ["virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"];
const TOOLS: [&str; 8] =
    ["qemu-system-x86_64", "busybox", "ip", "apt-get", "dpkg-deb", "cpio", "xz", "timeout"];
/// Before and after what the gateway says of itself.
const SHOWN: [&str; 2] = ["<<<shown", "shown>>>"];

/// What runs in the machine. Tools of busybox are found by their names, before files.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs none /dev; mount -t proc none /proc; mount -t sysfs none /sys
mount -t tmpfs none /run; mount -t tmpfs none /tmp
mkdir -p /run/netns /dev/net
for module in MODULES; do insmod /modules/$module.ko; done
[ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200
dmesg -n 1
iproute=/usr/bin/ip
$iproute netns add far
$iproute link set eth1 netns far
$iproute link set lo up
$iproute address add 198.51.100.1/24 dev eth0
$iproute link set eth0 up
$iproute -n far link set lo up
$iproute -n far address add 198.51.100.2/24 dev eth1
$iproute -n far link set eth1 up
sleep 1
echo "kernel $(uname -r)"
tidegate up /etc/gateway.conf --xdp eth0 --mode MODE --workers 1
$iproute netns exec far tidegate up /etc/client.conf --mode udp --workers 1
$iproute netns exec far ping -c 20 -W 5 10.9.0.1 | tail -n 2
$iproute netns exec far ping -c 5 -s 1300 -W 5 10.9.0.1 | tail -n 2
echo "BEGIN"; tidegate show gateway --json; echo "END"
poweroff -f
"#;

/// Runs the machine, and says what came of it: 6 if the gateway did not receive as it was to.
///
/// # Errors
/// If something is missing, or the tunnel carried nothing.
pub fn run(options: &Options) -> Result<ExitCode> {
    let missing: Vec<_> = TOOLS.into_iter().filter(|tool| find_program(tool).is_none()).collect();
    ensure!(missing.is_empty(), "install {}", missing.join(", "));
    let folder = target_dir().join("vm");
    let kernel = kernel(&folder, &options.suite)?;
    let daemon = match &options.tidegate {
        Some(built) => built.clone(),
        None => {
            build_ebpf::build(false)?;
            succeed(cargo().args([
                "build",
                "--locked",
                "-p",
                "wg-userspace",
                "--bin",
                "tidegate",
            ]))?;
            target_dir().join("debug/tidegate")
        }
    };
    let disk = disk(&folder, &kernel, &daemon, &options.mode)?;
    let said = boot(&kernel.image, &disk, options.seconds)?;
    report(&said, &options.mode)
}

/// A kernel that was unpacked.
struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

/// Has apt fetch the newest kernel of a release, unless it is there.
fn kernel(folder: &Path, suite: &str) -> Result<Kernel> {
    let at = folder.join(suite);
    let unpacked = at.join("kernel");
    if !unpacked.exists() {
        for part in ["state/lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(at.join(part))?;
        }
        let sources = at.join("sources.list");
        fs::write(&sources, format!("deb http://deb.debian.org/debian {suite} main\n"))?;
        let apt = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            for (name, path) in [
                ("Dir::State", at.join("state")),
                ("Dir::Cache", at.join("cache")),
                ("Dir::Etc::sourcelist", sources.clone()),
                ("Dir::Etc::sourceparts", "/dev/null".into()),
                ("Dir::State::status", "/var/lib/dpkg/status".into()),
            ] {
                command.args(["-o", &format!("{name}={}", path.display())]);
            }
            command.args(arguments).current_dir(at.join("packages"));
            command
        };
        succeed(&mut apt("apt-get", &["update", "--quiet"]))?;
        let newest = depends(apt("apt-cache", &["show", KERNEL]), "linux-image-")?;
        let newest = newest.first().context("the release has no kernel")?.clone();
        let mut packages = vec![newest.clone()];
        // Newer releases have them apart.
        for part in ["linux-binary-", "linux-modules-"] {
            packages.extend(depends(apt("apt-cache", &["show", &newest]), part)?);
        }
        let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
        succeed(&mut apt("apt-get", &[&["download"], &packages[..]].concat()))?;
        let fetched = at.join("fetched");
        for package in fs::read_dir(at.join("packages"))? {
            succeed(Command::new("dpkg-deb").arg("-x").arg(package?.path()).arg(&fetched))?;
        }
        fs::rename(fetched, &unpacked)?;
    }
    let image = find(&unpacked, &|name| name.starts_with("vmlinuz")).context("no kernel in it")?;
    let modules = find(&unpacked, &|name| name.starts_with("virtio_net.ko"));
    let modules = modules.context("no modules in it")?;
    // Above `kernel/drivers/net`.
    let modules = modules.ancestors().nth(4).context("modules lie deep in folders")?.to_owned();
    Ok(Kernel { image, modules })
}

/// The packages that one depends on whose names begin so.
fn depends(mut show: Command, prefix: &str) -> Result<Vec<String>> {
    let output = show.output().context("running apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    let names = line.split(", ").filter_map(|name| name.split(' ').next());
    Ok(names.filter(|name| name.starts_with(prefix)).map(str::to_owned).collect())
}

/// A file below `folder` whose name is right.
fn find(folder: &Path, is_right: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let entries: Vec<PathBuf> =
        fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    entries
        .iter()
        .find(|path| path.is_file() && name(path).is_some_and(|name| is_right(&name)))
        .cloned()
        .or_else(|| {
            entries
                .iter()
                .filter(|path| path.is_dir() && !path.is_symlink())
                .find_map(|path| find(path, is_right))
        })
}

/// Makes what the machine has in memory.
fn disk(folder: &Path, kernel: &Kernel, daemon: &Path, mode: &str) -> Result<PathBuf> {
    let root = folder.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for name in ["bin", "dev", "proc", "sys", "run", "tmp", "var", "etc", "modules", "usr/bin"] {
        fs::create_dir_all(root.join(name))?;
    }
    symlink("/run", root.join("var/run"))?;
    let program = |name: &str| find_program(name).with_context(|| format!("there is no {name}"));
    copy(&program("busybox")?, &root.join("bin/busybox"))?;
    for (from, to) in [(daemon.to_owned(), "bin/tidegate"), (program("ip")?, "usr/bin/ip")] {
        copy(&from, &root.join(to))?;
        copy_libraries(&from, &root)?;
    }
    let _ = Command::new("strip").arg(root.join("bin/tidegate")).status();
    let mut modules = Vec::new();
    for module in MAYBE_BUILT_IN.into_iter().chain(MODULES) {
        let is_it =
            |name: &str| name.strip_prefix(module).is_some_and(|end| end.starts_with(".ko"));
        let Some(from) = find(&kernel.modules, &is_it) else {
            ensure!(!MODULES.contains(&module), "the kernel has no module {module}");
            continue;
        };
        modules.push(module);
        let to = fs::File::create(root.join(format!("modules/{module}.ko")))?;
        let how = if from.extension().is_some_and(|end| end == "xz") { "xz -dc" } else { "cat" };
        let line = format!("{how} \"$0\"");
        succeed(Command::new("sh").args(["-c", &line]).arg(&from).stdout(Stdio::from(to)))?;
    }
    for (name, conf) in [("gateway", GATEWAY_CONF), ("client", CLIENT_CONF)] {
        let path = root.join(format!("etc/{name}.conf"));
        fs::write(&path, conf)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    }
    let init = INIT.replace("MODULES", &modules.join(" ")).replace("MODE", mode);
    let init = init.replace("BEGIN", SHOWN[0]).replace("END", SHOWN[1]);
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let disk = folder.join("disk");
    let pack = "find . | cpio -o -H newc --quiet | gzip -1";
    let to = Stdio::from(fs::File::create(&disk)?);
    succeed(Command::new("sh").args(["-c", pack]).current_dir(&root).stdout(to))?;
    Ok(disk)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    Ok(())
}

/// Copies the libraries that a program is linked with to where it looks for them.
fn copy_libraries(program: &Path, root: &Path) -> Result<()> {
    let output = Command::new("ldd").arg(program).output().context("running ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("a library lies in a folder")?)?;
        copy(Path::new(library), &to)?;
    }
    Ok(())
}

/// Runs the machine to its end, and gives what it printed.
fn boot(image: &Path, disk: &Path, seconds: u32) -> Result<String> {
    let mut machine = Command::new("timeout");
    machine.arg(seconds.to_string()).arg("qemu-system-x86_64");
    machine.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "768", "-smp", "2"]);
    machine.args(["-nographic", "-no-reboot", "-append", "console=ttyS0 loglevel=1 panic=-1"]);
    machine.arg("-kernel").arg(image).arg("-initrd").arg(disk);
    for nic in ["0", "1"] {
        machine.args(["-netdev", &format!("hubport,id=nic{nic},hubid=0"), "-device"]);
        // Zero-copy wants memory that is mapped by the kernel's rules.
        let kind = "virtio-net-pci,disable-legacy=on,iommu_platform=on,romfile=";
        machine.arg(format!("{kind},netdev=nic{nic},mac=52:54:00:00:00:0{nic}"));
    }
    let output = machine.stdin(Stdio::null()).output().context("running qemu")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Prints what the gateway said.
fn report(said: &str, mode: &str) -> Result<ExitCode> {
    let shown = said.split_once(SHOWN[0]).and_then(|(_, rest)| rest.split_once(SHOWN[1]));
    let shown = shown.and_then(|(shown, _)| serde_json::from_str::<Value>(shown).ok());
    let told = said.lines().filter(|line| {
        ["kernel ", "tidegate: ", "gateway ", "client "].iter().any(|begin| line.starts_with(begin))
            || line.contains("packets transmitted")
    });
    told.for_each(|line| println!("{}", line.trim_end()));
    let shown =
        shown.with_context(|| format!("the gateway says nothing; the machine said:\n{said}"))?;
    let path = shown.pointer("/interfaces/0/data_path").context("no data path")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    println!("mode      {}: {}", text(&path["mode"]), text(&path["reason"]));
    for nic in path["nics"].as_array().into_iter().flatten() {
        let [name, receive, transmit, reason] =
            ["name", "receive", "transmit", "reason"].map(|field| text(&nic[field]));
        println!("{name}      receive {receive}, transmit {transmit}: {reason}");
    }
    println!(
        "came by   {}\nleft by   {}\nsteer     {}\ndrops     {}",
        path["paths"], path["sent"], path["steer"], path["drops"]
    );
    let by_xsk = |way: &str| path[way]["xsk"].as_u64().unwrap_or(0) > 0;
    let is_as_asked = (mode == "auto" || path["mode"] == mode)
        && (path["mode"] == "udp" || by_xsk("paths"))
        && (mode != "zerocopy" || by_xsk("sent"));
    Ok(if is_as_asked { ExitCode::SUCCESS } else { ExitCode::from(6) })
}
