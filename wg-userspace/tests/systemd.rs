//! The unit, under a systemd of its own: `systemctl` starts, reloads, stops, and restarts what died.
//!
//! ```text
//! a namespace of processes, mounts, links and control groups
//!   1  systemd ─┬─ systemd-journald
//!               ├─ tidegate@wg0  127.0.0.1:51820 ──┐
//!               └─ tidegate@far  knocks there ─────┘
//! ```
//!
//! Of the machine's files systemd sees all, read-only, and none of its units; it has `/run`, `/dev`,
//! `/sys` and `/etc/wireguard` for itself. All of it goes with its first process, but for its control
//! group, which is removed then.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xtask::lab;

const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");
const LIMIT: Duration = Duration::from_secs(30);

/// Becomes systemd. `$F` is the test's folder, and `$CONTROL_GROUP` where its processes are.
const BOOT: &str = r#"set -e
    echo $$ > "$CONTROL_GROUP/cgroup.procs"
    exec unshare --pid --mount --net --uts --ipc --cgroup --fork --kill-child --mount-proc sh -c '
        set -e
        mount --make-rprivate /
        mount --bind "$F" "$F"
        mount -t tmpfs -o mode=755 tidegate-test /run
        mkdir -p /run/dev /run/systemd/journald.conf.d
        mount -t tmpfs -o mode=755 tidegate-test /run/dev
        mkdir -p /run/dev/net /run/dev/shm /run/dev/pts /run/dev/mqueue
        for device in null zero full random urandom tty net/tun; do
            touch /run/dev/$device
            mount --bind /dev/$device /run/dev/$device
        done
        touch "$F/console" /run/dev/console
        mount --bind "$F/console" /run/dev/console
        ln -s /proc/self/fd /run/dev/fd
        mount --rbind /run/dev /dev
        mount -t sysfs -o ro sysfs /sys
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
        mount --bind /proc/sys /proc/sys
        mount --bind /proc/sys/net /proc/sys/net
        mount -o remount,bind,ro /proc/sys
        mount --bind "$F/wireguard" /etc/wireguard
        mount -o remount,bind,ro /
        printf "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=\n" > /run/systemd/journald.conf.d/test.conf
        ip link set lo up
        exec env -i container=tidegate-test PATH="$PATH" SYSTEMD_UNIT_PATH="$F/units" \
            "$SYSTEMD" --system --show-status=no --log-target=journal
    '"#;

const TARGETS: [&str; 7] =
    ["sysinit", "basic", "multi-user", "shutdown", "network-online", "nss-lookup", "default"];

const JOURNAL_SOCKET: &str = "[Unit]\nDefaultDependencies=no\n[Socket]\n\
    ListenStream=/run/systemd/journal/stdout\nListenDatagram=/run/systemd/journal/socket\n\
    SocketMode=0666\nPassCredentials=yes\n";

/// What keeps the machine from running this.
fn missing() -> Option<String> {
    let programs = ["systemctl", "journalctl", "unshare", "nsenter", "wg", "wg-quick"];
    let missing_program = || {
        let name = programs.into_iter().find(|name| lab::find_program(name).is_none())?;
        Some(format!("needs the program `{name}`"))
    };
    let missing_systemd = || {
        let missing = ["systemd", "systemd-journald"].into_iter().find(|name| part(name).is_none());
        missing.map(|name| format!("needs {name}"))
    };
    let machine = || {
        let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
        let journal = id.trim().is_empty();
        let folder = !Path::new("/etc/wireguard").is_dir();
        journal
            .then(|| "needs /etc/machine-id for the journal".to_owned())
            .or_else(|| folder.then(|| "needs the folder /etc/wireguard".to_owned()))
    };
    let groups = || control_groups().is_none().then(|| "needs control groups 2".to_owned());
    lab::unavailable()
        .or_else(missing_program)
        .or_else(missing_systemd)
        .or_else(machine)
        .or_else(groups)
}

/// One of systemd's own programs.
fn part(name: &str) -> Option<PathBuf> {
    ["/usr/lib/systemd", "/lib/systemd"]
        .into_iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
}

/// Where the machine has its control groups, if they may be made there.
fn control_groups() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = mounts.find(|words| words.get(2) == Some(&"cgroup2"))?;
    let path = PathBuf::from(mount[1]);
    let is_writable = mount.get(3)?.split(',').any(|option| option == "rw");
    is_writable.then_some(path)
}

/// A systemd, and the folder of its files.
struct Systemd {
    holder: Child,
    init: Option<Pid>,
    folder: tempfile::TempDir,
    control_group: PathBuf,
}

impl Systemd {
    /// Boots one, or says why not.
    fn boot(test: &str) -> Option<Systemd> {
        static BOOTED: AtomicU32 = AtomicU32::new(0);
        if let Some(missing) = missing() {
            eprintln!("SKIPPED {test}: {missing}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        write_units(folder.path());
        let number = BOOTED.fetch_add(1, Ordering::Relaxed);
        let name = format!("tidegate-test.{}-{number}", std::process::id());
        let control_group = control_groups().unwrap().join(name);
        fs::create_dir(&control_group).unwrap();
        let mut holder = Command::new("sh");
        holder.args(["-c", BOOT]).env("F", folder.path()).env("CONTROL_GROUP", &control_group);
        holder.env("SYSTEMD", part("systemd").unwrap()).stdin(Stdio::null()).process_group(0);
        let log = fs::File::create(folder.path().join("boot.log")).unwrap();
        holder.stdout(log.try_clone().unwrap()).stderr(log);
        let holder = holder.spawn().unwrap();
        let mut systemd = Systemd { holder, init: None, folder, control_group };
        systemd.wait_until_booted();
        Some(systemd)
    }

    fn wait_until_booted(&mut self) {
        let children = format!("/proc/{0}/task/{0}/children", self.holder.id());
        let booted = lab::wait_for("systemd", LIMIT, || {
            if let Some(status) = self.holder.try_wait()? {
                anyhow::bail!("it ended: {status}");
            }
            let text = fs::read_to_string(&children).unwrap_or_default();
            self.init = text.trim().parse().ok().and_then(Pid::from_raw);
            let is_running = self.init.is_some() && {
                let output = self.sh("test -e /run/systemd/private && systemctl is-system-running");
                output.stdout == b"running\n"
            };
            Ok(is_running.then_some(()))
        });
        booted.unwrap_or_else(|error| {
            let log = fs::read_to_string(self.folder.path().join("boot.log"));
            panic!("{error:#}: {}", log.unwrap_or_default())
        });
    }

    /// Runs a script inside.
    fn sh(&self, script: &str) -> Output {
        let init = self.init.unwrap().as_raw_nonzero().to_string();
        let mut command = Command::new("nsenter");
        command.args(["-t", &init, "-p", "-m", "-n", "-C", "-u", "-i", "--", "bash", "-c", script]);
        command.env("F", self.folder.path()).env("TIDEGATE", TIDEGATE).env("SYSTEMD_COLORS", "0");
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// Runs a script that must succeed; gives what it prints.
    fn ok(&self, script: &str) -> String {
        let output = self.sh(&format!("set -e; {script}"));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {errors}\n{}", self.journal());
        String::from_utf8(output.stdout).unwrap()
    }

    fn journal(&self) -> String {
        let output = self.sh("journalctl --no-pager -o short-precise");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A property of the unit for `wg0`.
    fn property(&self, name: &str) -> String {
        self.ok(&format!("systemctl show --value -p {name} tidegate@wg0")).trim().to_owned()
    }

    /// The data process of `wg0`.
    fn data_process(&self) -> String {
        self.ok("pgrep -x tidegate-data -P $(systemctl show --value -p MainPID tidegate@wg0)")
            .trim()
            .to_owned()
    }

    /// Waits until a property of the unit for `wg0` is this.
    fn wait_for(&self, name: &str, value: &str) {
        let waited =
            lab::wait_for(name, LIMIT, || Ok((self.property(name) == value).then_some(())));
        waited.unwrap_or_else(|error| panic!("not {value}: {error:#}\n{}", self.journal()));
    }

    /// Writes `wg0.conf` and `far.conf`, whose ends know each other; the former has more lines about
    /// itself and, at its end, its peers.
    fn configure(&self, interface: &str, peers: &str) {
        self.ok("cd $F; for end in wg0 far other; do
                     [ -e $end.key ] || wg genkey > $end.key; wg pubkey < $end.key > $end.pub
                 done");
        let read = |name: &str| fs::read_to_string(self.folder.path().join(name)).unwrap();
        let far = format!(
            "[Interface]\nPrivateKey = {}Address = 10.9.1.2/32\nListenPort = 51821\n\
             Table = off\n[Peer]\nPublicKey = {}\
             Endpoint = 127.0.0.1:51820\nAllowedIPs = 10.9.0.1/32\nPersistentKeepalive = 1\n",
            read("far.key"),
            read("wg0.pub"),
        );
        let wg0 = format!(
            "[Interface]\nPrivateKey = {}Address = 10.9.0.1/24\nListenPort = 51820\n{interface}\n\
             [Peer]\nPublicKey = {}AllowedIPs = 10.9.1.2/32\n{peers}",
            read("wg0.key"),
            read("far.pub"),
        );
        for (name, text) in [("wg0", wg0), ("far", far)] {
            let path = self.folder.path().join(format!("wireguard/{name}.conf"));
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        }
    }

    /// When the other end had its last handshake with `wg0`, and the bytes that came from there since.
    fn session(&self) -> Option<(u64, u64)> {
        let key = fs::read_to_string(self.folder.path().join("far.pub")).unwrap();
        let dump = self.ok("wg show wg0 dump");
        let mut peers = dump.lines().skip(1).map(|line| line.split('\t').collect::<Vec<_>>());
        let far = peers.find(|fields| fields[0] == key.trim())?;
        let (at, rx) = (far[4].parse().unwrap(), far[5].parse().unwrap());
        (at > 0).then_some((at, rx))
    }

    /// Waits until more comes from the other end than `bytes`; gives the handshake's time.
    fn hears_more_than(&self, bytes: u64) -> (u64, u64) {
        let heard = lab::wait_for("more from the other end", LIMIT, || {
            Ok(self.session().filter(|&(_, rx)| rx > bytes))
        });
        heard.unwrap_or_else(|error| panic!("{error:#}\n{}", self.journal()))
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // The first process of the namespace takes all others with it.
        if let Some(init) = self.init {
            let _ = kill_process(init, Signal::KILL);
        }
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        let _ = lab::wait_for("the control group's end", LIMIT, || {
            Ok(remove_groups(&self.control_group).is_ok().then_some(()))
        });
    }
}

/// Removes a control group with those below it, which have no processes.
fn remove_groups(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_groups(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}

/// The units, and programs by the names that they have there.
fn write_units(folder: &Path) {
    for part in ["units", "wireguard", "bin"] {
        fs::create_dir(folder.join(part)).unwrap();
    }
    for name in ["tidegate", "tidegated"] {
        std::os::unix::fs::symlink(TIDEGATE, folder.join("bin").join(name)).unwrap();
    }
    let write = |name: &str, text: &str| fs::write(folder.join("units").join(name), text).unwrap();
    for target in TARGETS {
        let wants = match target {
            "default" => "Requires=basic.target systemd-journald.service\n",
            _ => "",
        };
        write(&format!("{target}.target"), &format!("[Unit]\nDefaultDependencies=no\n{wants}"));
    }
    write("systemd-journald.socket", JOURNAL_SOCKET);
    let journal = format!(
        "[Unit]\nDefaultDependencies=no\n[Service]\nType=notify\nExecStart={}\n\
         Sockets=systemd-journald.socket\nStandardOutput=null\nFileDescriptorStoreMax=100\n",
        part("systemd-journald").unwrap().display()
    );
    write("systemd-journald.service", &journal);
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../dist/systemd/tidegate@.service");
    let unit = fs::read_to_string(unit).unwrap();
    assert!(unit.contains("WatchdogSec=30\n"));
    // What stands still is noticed sooner here, and a file may give it a hook.
    let unit = unit
        .replace("/usr/bin/tidegate", folder.join("bin/tidegate").to_str().unwrap())
        .replace("WatchdogSec=30\n", "WatchdogSec=2\nEnvironmentFile=-$F/environment\n")
        .replace("$F", folder.to_str().unwrap());
    write("tidegate@.service", &unit);
    // As wireguard-tools have it, with us in the kernel's place.
    let wg_quick = "[Unit]\nAfter=network-online.target nss-lookup.target\n\
        Wants=network-online.target nss-lookup.target\n\
        [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=wg-quick up %i\n\
        ExecStop=wg-quick down %i\nEnvironment=WG_QUICK_USERSPACE_IMPLEMENTATION=$F/bin/tidegated\n";
    write("wg-quick@.service", &wg_quick.replace("$F", folder.to_str().unwrap()));
}

#[test]
fn systemctl_starts_reloads_and_stops_an_interface() {
    let Some(systemd) = Systemd::boot("systemctl_starts_reloads_and_stops_an_interface") else {
        return;
    };
    systemd.configure("PostUp = sleep 0.5; ip -o addr show dev %i > /run/last", "");
    systemd.ok("systemctl start tidegate@wg0");
    // Not before the last step.
    assert!(systemd.ok("cat /run/last").contains("10.9.0.1/24"));
    assert_eq!(systemd.property("ActiveState"), "active");
    let (keeper, data) = (systemd.property("MainPID"), systemd.data_process());
    assert_eq!(systemd.ok(&format!("cat /proc/{keeper}/comm")), "tidegate\n");
    systemd.ok("systemctl start tidegate@far");
    let (handshake, bytes) = systemd.hears_more_than(0);

    let other = fs::read_to_string(systemd.folder.path().join("other.pub")).unwrap();
    systemd.configure("", &format!("[Peer]\nPublicKey = {other}AllowedIPs = 10.9.0.3/32\n"));
    systemd.ok("systemctl reload tidegate@wg0");
    let allowed = systemd.ok("wg show wg0 allowed-ips");
    assert!(allowed.contains(&format!("{}\t10.9.0.3/32", other.trim())), "{allowed}");
    // The other peer goes on in the session that it had.
    let (_, bytes) = systemd.hears_more_than(bytes);
    assert_eq!(systemd.hears_more_than(bytes).0, handshake);

    // A file that is wrong changes nothing, and says so.
    systemd.configure("Bad = 1", "");
    let output = systemd.sh("systemctl reload tidegate@wg0");
    assert!(!output.status.success());
    assert!(systemd.journal().contains("unknown key `Bad`"), "{}", systemd.journal());
    assert_eq!(systemd.ok("wg show wg0 allowed-ips"), allowed);
    assert_eq!(systemd.property("ActiveState"), "active");
    assert_eq!((systemd.property("MainPID"), systemd.data_process()), (keeper, data));

    systemd.ok("systemctl stop tidegate@wg0");
    assert_eq!(systemd.property("Result"), "success");
    assert_eq!(systemd.property("ActiveState"), "inactive");
    let left = systemd.ok("ip -o link show dev wg0 2>&1 || true; ls /run/tidegate /run/wireguard");
    assert!(left.contains("does not exist") && !left.contains("wg0."), "{left}");
}

#[test]
fn what_died_or_stands_still_is_started_again() {
    let Some(systemd) = Systemd::boot("what_died_or_stands_still_is_started_again") else { return };
    // One that has lost its sessions knocks by itself.
    systemd.configure("", "Endpoint = 127.0.0.1:51821\nPersistentKeepalive = 1\n");
    systemd.ok("systemctl start tidegate@wg0 tidegate@far");
    systemd.hears_more_than(0);
    let keeper = systemd.property("MainPID");

    // Of the data process, the keeper makes another one, and says so with fields.
    let data = systemd.data_process();
    systemd.ok(&format!("kill -KILL {data}"));
    lab::wait_for("another data process", LIMIT, || {
        let now = systemd.sh(&format!("pgrep -x tidegate-data -P {keeper}")).stdout;
        let now = String::from_utf8(now)?;
        Ok((!now.trim().is_empty() && now.trim() != data).then_some(()))
    })
    .unwrap();
    systemd.hears_more_than(0);
    assert_eq!(systemd.property("NRestarts"), "0");
    systemd.ok("journalctl --sync 2>/dev/null || true");
    let entries = systemd.ok(&format!("journalctl --no-pager -o json _PID={keeper}"));
    let entry = entries
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .find(|entry| entry["MESSAGE"] == "the data process has ended");
    let entry = entry.unwrap_or_else(|| panic!("{entries}"));
    assert_eq!(entry["PRIORITY"], "3");
    assert_eq!(entry["_SYSTEMD_UNIT"], "tidegate@wg0.service");
    assert!(entry["F_STATUS"].as_str().unwrap().contains("signal: 9"), "{entry}");

    // Of the keeper, systemd.
    systemd.ok(&format!("kill -KILL {keeper}"));
    systemd.wait_for("NRestarts", "1");
    systemd.wait_for("SubState", "running");
    assert_ne!(systemd.property("MainPID"), keeper);
    systemd.hears_more_than(0);

    // One whose worker stands still is not fed any more.
    let hook = "TIDEGATE_TEST_STALL_WORKER=1:0\nTIDEGATE_WORKERS=2\n";
    fs::write(systemd.folder.path().join("environment"), hook).unwrap();
    systemd.ok("systemctl restart tidegate@wg0");
    fs::remove_file(systemd.folder.path().join("environment")).unwrap();
    systemd.wait_for("NRestarts", "1");
    systemd.wait_for("SubState", "running");
    assert!(systemd.journal().contains("Watchdog timeout"), "{}", systemd.journal());
    systemd.hears_more_than(0);
    systemd.ok("systemctl stop tidegate@wg0");
    assert!(!systemd.ok("ip -o link").contains("wg0"));
}

#[test]
fn it_and_wg_quick_make_room_for_each_other() {
    let Some(systemd) = Systemd::boot("it_and_wg_quick_make_room_for_each_other") else { return };
    systemd.configure("PreDown = sleep 0.5\nPostUp = echo %i >> /run/up", "");
    let is_active = |unit: &str| systemd.sh(&format!("systemctl is-active {unit}@wg0")).stdout;
    for round in 1..=2 {
        systemd.ok("systemctl start tidegate@wg0");
        assert_eq!(is_active("tidegate"), b"active\n");
        assert_eq!(is_active("wg-quick"), b"inactive\n", "{}", systemd.journal());
        systemd.ok("systemctl start wg-quick@wg0");
        assert_eq!(is_active("tidegate"), b"inactive\n");
        assert_eq!(is_active("wg-quick"), b"active\n", "{}", systemd.journal());
        assert_eq!(systemd.ok("cat /run/up").lines().count(), 2 * round);
        assert!(systemd.ok("wg show wg0").contains("listening port: 51820"));
    }
}
