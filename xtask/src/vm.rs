//! `cargo xtask vm`: tunnels in a virtual machine, to see what a kernel and a NIC that are not this machine's
//! make of it: old kernels that lack what newer ones have, and zero-copy AF_XDP with virtio-net.
//!
//! ```text
//!  eth0 198.51.100.1 ── hub ── eth1 198.51.100.2 (namespace `far`)
//!  eth2 203.0.113.1 ─── hub ── eth3 203.0.113.2  (namespace `near`)
//!  lan 192.168.20.1 ── veth ── lan 192.168.20.2  (namespace `host`)
//!  tidegate, --xdp eth0,eth2   tidegate, --mode udp
//! ```
//!
//! In this order: every program is loaded; the first tunnel runs, and a second one by the other NIC, whose XSK
//! shares a UMEM with the first one's; the data process is killed, and its successor goes on; then the gateway
//! translates by `#! Nat`, is killed, and what it left is removed.
//!
//! Kernels are Debian's, fetched by apt into `target/vm` with a configuration of its own; there is no disk, but
//! busybox, `ip`, `tc` and the daemon in memory. It runs without KVM, which takes a minute.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
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
    /// The kernel that is run; without this, that of `--suite`
    #[arg(long, value_enum, conflicts_with = "suite")]
    kernel: Option<Release>,
    /// The release of Debian whose kernel is run: bookworm has 6.1, trixie 6.12; zero-copy with
    /// virtio-net needs 6.13
    #[arg(long, default_value = NEWEST)]
    suite: String,
    /// How the gateway receives and sends [default: zerocopy where the kernel has it for virtio-net, else auto]
    #[arg(long)]
    mode: Option<String>,
    /// A daemon that was built before
    #[arg(long, value_name = "FILE")]
    tidegate: Option<PathBuf>,
    /// When to give up, in seconds
    #[arg(long, default_value_t = 420)]
    seconds: u32,
}

/// A kernel of a stable release of Debian.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Release {
    /// That of bookworm: without TCX, netdev-genl, USO of TUN devices, and XSKs whose rings can be mapped again
    #[value(name = "6.1")]
    V6_1,
    /// That of trixie: without zero-copy of virtio-net
    #[value(name = "6.12")]
    V6_12,
}

impl Release {
    const fn suite(self) -> &'static str {
        match self {
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
        }
    }
}

/// Has the newest kernel.
const NEWEST: &str = "trixie-backports";
/// The package that depends on a release's newest kernel.
const KERNEL: &str = "linux-image-cloud-amd64";
/// In the order in which they are loaded.
const MODULES: [&str; 7] =
    ["failover", "net_failover", "virtio_net", "tun", "veth", "sch_ingress", "cls_bpf"];
/// What they need, which some kernels have built in.
const MAYBE_BUILT_IN: [&str; 5] =
    ["virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"];
const TOOLS: [&str; 9] =
    ["qemu-system-x86_64", "busybox", "ip", "tc", "apt-get", "dpkg-deb", "cpio", "xz", "timeout"];
/// The NICs of the machine, and the hub into which each is plugged.
const HUBS: [usize; 4] = [0, 0, 1, 1];

/// The second peer's keys: public knowledge.
const SECOND_KEYS: [&str; 2] = [
    "4O9JmBQxrDJG+McnyDakyHCOHCrCV6X0Q6saO94w5Vc=",
    "yQE1Y0zrXDYeB6tbil42/S7fY2xO+8UCSttjvoTrVnQ=",
];

/// What runs in the machine. Tools of busybox are found by their names, before files. What stands between
/// `<<<NAME` and `>>>` is a part of what it says.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs none /dev; mount -t proc none /proc; mount -t sysfs none /sys
mount -t tmpfs none /run; mount -t tmpfs none /tmp
mkdir -p /run/netns /dev/net
for module in MODULES; do insmod /modules/$module.ko; done
[ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200
dmesg -n 1
ip=/usr/bin/ip tc=/usr/bin/tc
part() { echo "<<<$1"; shift; "$@" 2>&1; echo ">>>"; }
address() { $ip $1 address add $3 dev $2; $ip $1 link set $2 up; }
for space in far near host; do $ip netns add $space; $ip -n $space link set lo up; done
$ip link set eth1 netns far
$ip link set eth3 netns near
$ip link add lan type veth peer name lan netns host
$ip link set lo up
address "" eth0 198.51.100.1/24
address "" eth2 203.0.113.1/24
address "" lan 192.168.20.1/24
address "-n far" eth1 198.51.100.2/24
address "-n near" eth3 203.0.113.2/24
address "-n host" lan 192.168.20.2/24
far="$ip netns exec far" near="$ip netns exec near" host="$ip netns exec host"
sleep 1
echo; part kernel uname -r
part programs /bin/programs --nocapture

gateway() { tidegate up $1/gateway.conf --xdp eth0,eth2 --mode MODE --workers 2; }
client() { $far tidegate up /etc/client.conf --mode udp --workers 1; }
gateway /etc
client
$near tidegate up /etc/second.conf --mode udp --workers 1
pings() { $1 ping -c 20 -W 5 10.9.0.1; $1 ping -c 5 -s 1300 -W 5 10.9.0.1; }
part far pings "$far"
part near pings "$near"
part umems sh -c 'cat /proc/[0-9]*/maps | grep -o "memfd:tidegate-umem.*" | sort | uniq -c'
part shown tidegate show gateway --json

# Those of this namespace whose command line is like this.
running() {
    for pid in $(pidof tidegate); do
        tr '\0' ' ' < /proc/$pid/cmdline | grep -q "$1" || continue
        [ "$(readlink /proc/$pid/ns/net)" = "$(readlink /proc/1/ns/net)" ] && echo $pid
    done
}
kill -9 $(running "^tidegate data")
sleep 3
part successor pings "$far"
part successors pings "$near"
part again tidegate show gateway --json

echo 1 > /proc/sys/net/ipv4/ip_forward
part untranslated $far ping -c 2 -W 2 192.168.20.2
tidegate down gateway
$far tidegate down client
mkdir -p /srv
dd if=/dev/urandom of=/srv/blob bs=64k count=32 2>/dev/null
$host httpd -h /srv
gateway /etc/nat
client
part translated $far ping -c 5 -W 5 192.168.20.2
part fetched sh -c "$far wget -q -O /tmp/blob http://192.168.20.2/blob; cmp /srv/blob /tmp/blob && echo same"
part nat tidegate show gateway nat --json
part filters $tc filter show dev lan ingress

kill -9 $(running "^tidegate run")
sleep 2
part left $tc filter show dev lan ingress
tidegate down gateway
part removed $tc qdisc show dev lan
gateway /etc/nat
part refilled $tc filter show dev lan ingress
$far tidegate down client
client
part restarted $far ping -c 5 -W 5 192.168.20.2
tidegate down gateway
part gone $tc qdisc show dev lan
poweroff -f
"#;

/// Runs the machine, and says what came of it: 6 if the gateway did not receive as it was to.
///
/// # Errors
/// If something is missing, a program is refused, or a tunnel carried nothing.
pub fn run(options: &Options) -> Result<ExitCode> {
    let missing: Vec<_> = TOOLS.into_iter().filter(|tool| find_program(tool).is_none()).collect();
    ensure!(missing.is_empty(), "install {}", missing.join(", "));
    let suite = options.kernel.map_or(options.suite.as_str(), |release| release.suite());
    let mode = options.mode.as_deref().unwrap_or(if suite == NEWEST { "zerocopy" } else { "auto" });
    let folder = target_dir().join("vm");
    let kernel = kernel(&folder, suite)?;
    if options.tidegate.is_none() {
        build_ebpf::build(false)?;
    }
    let daemon = match &options.tidegate {
        Some(built) => built.clone(),
        None => built(&["build", "--bin", "tidegate"])?,
    };
    let programs = built(&["test", "--no-run", "--test", "programs"])?;
    let disk = disk(&folder, &kernel, [&daemon, &programs], mode)?;
    let said = boot(&kernel.image, &disk, options.seconds)?;
    fs::write(folder.join("said"), &said).context("writing what the machine said")?;
    report(&said, mode)
}

/// Has cargo build a program of the daemon's package; gives its path.
fn built(arguments: &[&str]) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(arguments).args(["--locked", "-p", "wg-userspace"]);
    command.args(["--message-format", "json-render-diagnostics"]).stderr(Stdio::inherit());
    let output = command.output().context("running cargo")?;
    ensure!(output.status.success(), "cargo does not build it");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    // Beside a test cargo names the programs that it may start.
    let is_it = |told: &Value| told["profile"]["test"] == arguments.contains(&"test");
    let mut executables =
        messages.filter(is_it).filter_map(|told| told["executable"].as_str().map(PathBuf::from));
    executables.next_back().context("cargo names no program")
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
fn disk(folder: &Path, kernel: &Kernel, built: [&Path; 2], mode: &str) -> Result<PathBuf> {
    let root = folder.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for name in ["bin", "dev", "proc", "sys", "run", "tmp", "var", "etc/nat", "modules", "usr/bin"]
    {
        fs::create_dir_all(root.join(name))?;
    }
    symlink("/run", root.join("var/run"))?;
    let program = |name: &str| find_program(name).with_context(|| format!("there is no {name}"));
    copy(&program("busybox")?, &root.join("bin/busybox"))?;
    let [daemon, programs] = built;
    for (from, to) in [
        (daemon.to_owned(), "bin/tidegate"),
        (programs.to_owned(), "bin/programs"),
        (program("ip")?, "usr/bin/ip"),
        (program("tc")?, "usr/bin/tc"),
    ] {
        copy(&from, &root.join(to))?;
        copy_libraries(&from, &root)?;
        if to.starts_with("bin/") {
            let _ = Command::new("strip").arg(root.join(to)).status();
        }
    }
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
    for (name, conf) in confs() {
        let path = root.join(format!("etc/{name}.conf"));
        fs::write(&path, conf)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    }
    let init = INIT.replace("MODULES", &modules.join(" ")).replace("MODE", mode);
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let disk = folder.join("disk");
    let pack = "find . | cpio -o -H newc --quiet | gzip -1";
    let to = Stdio::from(fs::File::create(&disk)?);
    succeed(Command::new("sh").args(["-c", pack]).current_dir(&root).stdout(to))?;
    Ok(disk)
}

/// The config files: those of the first tunnel, and of a second one beside it.
fn confs() -> [(&'static str, String); 4] {
    let [private, public] = SECOND_KEYS;
    let gateway =
        format!("{GATEWAY_CONF}\n[Peer]\nPublicKey = {public}\nAllowedIPs = 10.9.0.3/32\n");
    let gateway_key = CLIENT_CONF.lines().find(|line| line.starts_with("PublicKey"));
    let second = format!(
        "[Interface]\nAddress = 10.9.0.3/24\nPrivateKey = {private}\n[Peer]\n{}\n\
         AllowedIPs = 10.9.0.1/32\nEndpoint = 203.0.113.1:51820\n",
        gateway_key.unwrap_or_default(),
    );
    let line = "[Interface]\n#! Nat = masquerade out=lan";
    let nat = gateway.replacen("[Interface]", line, 1);
    [("gateway", gateway), ("nat/gateway", nat), ("client", CLIENT_CONF.into()), ("second", second)]
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
    for (nic, hub) in HUBS.into_iter().enumerate() {
        machine.args(["-netdev", &format!("hubport,id=nic{nic},hubid={hub}"), "-device"]);
        // Zero-copy wants memory that is mapped by the kernel's rules.
        let kind = "virtio-net-pci,disable-legacy=on,iommu_platform=on,romfile=";
        machine.arg(format!("{kind},netdev=nic{nic},mac=52:54:00:00:00:0{nic}"));
    }
    let output = machine.stdin(Stdio::null()).output().context("running qemu")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Prints what the machine said, and judges it.
fn report(said: &str, mode: &str) -> Result<ExitCode> {
    let parts = parts(said);
    let whole = || format!("the machine said:\n{said}");
    let part = |name: &str| {
        let part = parts.get(name).with_context(|| format!("nothing of `{name}`; {}", whole()));
        part.map(String::as_str)
    };
    let json = |name: &str| -> Result<Value> {
        serde_json::from_str(part(name)?).with_context(|| format!("`{name}`; {}", whole()))
    };
    println!("kernel    {}", part("kernel")?);
    let programs = part("programs")?;
    for line in programs.lines().filter(|line| line.starts_with("tidegate_")) {
        println!("program   {line}");
    }
    ensure!(programs.contains("test result: ok. 1 passed"), "a program is refused:\n{programs}");

    let (shown, again, nat) = (json("shown")?, json("again")?, json("nat")?);
    let path = shown.pointer("/interfaces/0/data_path").context("no data path")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    println!("mode      {}: {}", text(&path["mode"]), text(&path["reason"]));
    for nic in path["nics"].as_array().into_iter().flatten() {
        let [name, receive, transmit, reason] =
            ["name", "receive", "transmit", "reason"].map(|field| text(&nic[field]));
        println!("{name}      receive {receive}, transmit {transmit}: {reason}");
    }
    println!("UMEMs     {}", part("umems")?.lines().map(str::trim).collect::<Vec<_>>().join("; "));
    for steering in ["tun_steering", "socket_steering"] {
        let (is_on, reason) = (&path[steering]["is_on"], &path[steering]["reason"]);
        println!("{steering} {}", if *is_on == true { "on".to_owned() } else { text(reason) });
    }
    println!(
        "came by   {}\nleft by   {}\nsteer     {}\ndrops     {}",
        path["paths"], path["sent"], path["steer"], path["drops"]
    );
    for pings in ["far", "near", "successor", "successors", "translated", "restarted"] {
        let lines = part(pings)?.lines().filter(|line| line.contains("packets transmitted"));
        let lines: Vec<&str> = lines.collect();
        println!("{pings:<9} {}", lines.join("; "));
        ensure!(!lines.is_empty(), "no answers ({pings}); {}", whole());
        for line in lines {
            ensure!(!line.contains(" 0 packets received"), "no answers ({pings}); {}", whole());
        }
    }
    let again = again.pointer("/interfaces/0/data_path").context("no data path")?;
    println!("after it  came by {}, left by {}", again["paths"], again["sent"]);
    println!("NAT       attached {}, events {}", nat["attached"], nat["events"]);
    ensure!(part("untranslated")?.contains(" 0 packets received"), "the host knows a way back");
    ensure!(part("fetched")? == "same", "a file was not fetched through NAT; {}", whole());
    let attached = nat["attached"].as_array().context("what is attached")?;
    ensure!(attached.len() == 2, "NAT is not attached at both ends: {attached:?}");
    let by_clsact = attached.iter().any(|at| at["by"] == "clsact");
    let filters = |name: &str| part(name).map(|text| text.matches("tidegate_nat_nic").count());
    let (there, left, refilled) = (filters("filters")?, filters("left")?, filters("refilled")?);
    println!(
        "filters   {there} while it ran, {left} when it was killed, {refilled} when it ran again"
    );
    let wanted = usize::from(by_clsact);
    ensure!(
        (there, left, refilled) == (wanted, wanted, wanted)
            && !part("removed")?.contains("clsact")
            && !part("gone")?.contains("clsact"),
        "filters are not there, or stay; {}",
        whole()
    );

    let by_xsk = |path: &Value, way: &str| path[way]["xsk"].as_u64().unwrap_or(0) > 0;
    let nics = path["nics"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_shared = mode != "zerocopy"
        || (nics.len() == 2
            && nics
                .iter()
                .all(|nic| nic["receive"] == "zero-copy" && nic["transmit"] == "zero-copy")
            && part("umems")?.lines().count() == 1);
    let is_as_asked = (mode == "auto" || path["mode"] == mode)
        && (path["mode"] == "udp" || (by_xsk(path, "paths") && by_xsk(again, "paths")))
        && (mode != "zerocopy" || (by_xsk(path, "sent") && by_xsk(again, "sent")))
        && is_shared;
    Ok(if is_as_asked { ExitCode::SUCCESS } else { ExitCode::from(6) })
}

/// The parts of what the machine said, by their names.
fn parts(said: &str) -> BTreeMap<&str, String> {
    let mut parts = BTreeMap::new();
    let mut open: Option<(&str, Vec<&str>)> = None;
    for line in said.lines().map(str::trim_end) {
        match (line.strip_prefix("<<<"), open.as_mut()) {
            (Some(name), _) => open = Some((name, Vec::new())),
            (None, Some((name, lines))) if line == ">>>" => {
                parts.insert(*name, lines.join("\n").trim().to_owned());
                open = None;
            }
            (None, Some((_, lines))) => lines.push(line),
            (None, None) => {}
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_machine_says_has_parts() {
        let said = "booting\r\n<<<kernel\r\n6.1\r\n>>>\r\nnoise\r\n<<<far\r\na\r\n\r\nb\r\n>>>\r\n<<<lost\r\nx";
        let parts = parts(said);
        assert_eq!(parts["kernel"], "6.1");
        assert_eq!(parts["far"], "a\n\nb");
        assert_eq!(parts.len(), 2, "one that does not end is none");
    }
}
