//! The hosts of a turn, which cores do their work, and WireGuard devices on them.
//!
//! ```text
//!  client                           gateway                         LAN host
//!  tidegate ═══════ outer ═════════ whoever has the turn ── lan ─── lab-tool
//!  tidegate-load                                                    tidegate-load
//!  └────── other cores ──────┘      └─ its own core ─┘      └── other cores ──┘
//! ```
//!
//! Receive work of a link is done at the core of the host that receives: by RPS, or, where XDP is attached to
//! a veth, whose packets are then polled, by a kernel thread that is pinned.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_setaffinity},
};

use super::{
    implementations,
    machine::{Cores, core_mask, kernel_threads},
    plan::Offloads,
};
use crate::lab::{self, CLIENT_V4, HOST_V4, LAN, Lab, OUTER, Process, Space};

/// The gateway's port.
pub const PORT: u16 = 51820;
/// Inner addresses of both ends, which the LAN host knows the way to.
const GATEWAY_INNER: &str = "10.9.0.1/24";
const CLIENT_INNER: &str = "10.9.0.2";
const TUNNEL: &str = "10.9.0.0/24";
/// Networks on both sides of the gateway.
const OUTER_NETWORK: &str = "198.51.100.0/24";
const LAN_NETWORK: &str = "192.168.20.0/24";
const GATEWAY_LAN: &str = "192.168.20.1";
/// Where the peers of `tidegate-load` have their inner addresses, and its initiations come from: RFC 2544's
/// addresses for benchmarks.
pub const LOAD_NETWORK: &str = "10.64.0.0/10";
pub const LOAD_SOURCES: &str = "198.18.0.0/16";
/// Of the tunnel: what wg-quick(8) takes for an outer link of 1,500 bytes.
const MTU: u32 = 1420;

/// How long a daemon may take to be there.
const START_LIMIT: Duration = Duration::from_secs(10);

/// A private key and its public one, as wg(8) writes them.
#[derive(Clone, Debug)]
pub struct Keys {
    /// The private one.
    pub private: String,
    /// The public one.
    pub public: String,
}

impl Keys {
    /// New ones.
    ///
    /// # Errors
    /// If `wg` does not make them.
    pub fn new() -> Result<Keys> {
        let private = wg(&["genkey"], "")?;
        let public = wg(&["pubkey"], &private)?;
        Ok(Keys { private, public })
    }
}

fn wg(arguments: &[&str], input: &str) -> Result<String> {
    let mut command = Command::new("wg");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().context("running `wg`")?;
    child.stdin.take().context("its standard input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "wg {} failed ({})", arguments.join(" "), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The hosts of a turn.
pub struct Hosts {
    /// Their namespaces.
    pub lab: Lab,
    /// Who runs where.
    pub cores: Cores,
}

impl Hosts {
    /// Makes them.
    ///
    /// # Errors
    /// If namespaces cannot be made, or links not be set up.
    pub fn new(cores: &Cores, offloads: Offloads) -> Result<Hosts> {
        let hosts = Hosts { lab: Lab::new()?, cores: cores.clone() };
        let Lab { client, gateway, host, .. } = &hosts.lab;
        for (space, nic, is_gateway) in [
            (client, OUTER, false),
            (gateway, OUTER, true),
            (gateway, LAN, true),
            (host, LAN, false),
        ] {
            if offloads == Offloads::Off {
                let off = ["tso", "gso", "gro", "tx-udp-segmentation"].map(|what| [what, "off"]);
                space.run("ethtool", &[&["-K", nic][..], off.as_flattened()].concat())?;
            }
            let receivers = if is_gateway { vec![cores.gateway] } else { cores.others.clone() };
            let file = format!("/sys/class/net/{nic}/queues/rx-0/rps_cpus");
            write(space, &file, &core_mask(&receivers))?;
        }
        // Where load comes from, and goes back to.
        host.ip(&format!("route add {LOAD_NETWORK} via {GATEWAY_LAN}"))?;
        gateway.ip(&format!("route add {LOAD_SOURCES} via {CLIENT_V4}"))?;
        client.ip(&format!("route add local {LOAD_SOURCES} dev lo"))?;
        Ok(hosts)
    }

    /// Lets the kernel forward between client and LAN host, without a tunnel.
    ///
    /// # Errors
    /// If there are such routes already.
    pub fn forward_plainly(&self) -> Result<()> {
        self.lab.client.ip(&format!("route add {LAN_NETWORK} via {}", lab::GATEWAY_V4))?;
        self.lab.host.ip(&format!("route add {OUTER_NETWORK} via {GATEWAY_LAN}"))
    }

    /// Starts the gateway, with these peers.
    ///
    /// # Errors
    /// If it does not come up, or not as it is meant to.
    pub fn start_gateway(
        &self,
        program: &implementations::Device,
        suffix: char,
        keys: &Keys,
        peers: &str,
    ) -> Result<Device> {
        let Keys { private, .. } = keys;
        let conf = format!("[Interface]\nPrivateKey = {private}\nListenPort = {PORT}\n{peers}");
        let space = &self.lab.gateway;
        let cores = [self.cores.gateway];
        let before = pollers();
        let device = Device::start(self, space, &cores, program, suffix, &conf)?;
        space.ip(&format!("addr add {GATEWAY_INNER} dev {}", device.interface))?;
        space.ip(&format!("link set {} mtu {MTU} up", device.interface))?;
        space.ip(&format!("route add {LOAD_NETWORK} dev {}", device.interface))?;
        if program.is_xdp {
            pin_polling(space, &cores, &before)?;
        }
        Ok(device)
    }

    /// What [`Hosts::start_gateway`] is told of the client.
    pub fn client_peer(client: &Keys) -> String {
        let Keys { public, .. } = client;
        format!("[Peer]\nPublicKey = {public}\nAllowedIPs = {CLIENT_INNER}/32\n")
    }

    /// Starts the client's end.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_client(
        &self,
        program: &implementations::Device,
        keys: &Keys,
        gateway: &Keys,
    ) -> Result<Device> {
        let (Keys { private, .. }, Keys { public, .. }) = (keys, gateway);
        let conf = format!(
            "[Interface]\nPrivateKey = {private}\n[Peer]\nPublicKey = {public}\n\
             Endpoint = {}:{PORT}\nAllowedIPs = {TUNNEL}, {LAN_NETWORK}\n",
            lab::GATEWAY_V4
        );
        let space = &self.lab.client;
        let before = pollers();
        let device = Device::start(self, space, &self.cores.others, program, 'c', &conf)?;
        space.ip(&format!("addr add {CLIENT_INNER}/24 dev {}", device.interface))?;
        space.ip(&format!("link set {} mtu {MTU} up", device.interface))?;
        space.ip(&format!("route add {LAN_NETWORK} dev {}", device.interface))?;
        if program.is_xdp {
            pin_polling(space, &self.cores.others, &before)?;
        }
        Ok(device)
    }

    /// Waits until the LAN host answers the client.
    ///
    /// # Errors
    /// If it does not.
    pub fn wait_for_answer(&self, limit: Duration) -> Result<()> {
        lab::wait_for("an answer of the LAN host", limit, || {
            let ping = self.lab.client.ping(HOST_V4, 1, &["-W", "1"])?;
            Ok((ping.answered > 0).then_some(()))
        })
    }
}

/// Kernel threads that poll for some outer link: others may have one of this name, too.
fn pollers() -> BTreeSet<i32> {
    kernel_threads(&format!("napi/{OUTER}-"))
}

/// Has the packets that come to XDP polled by a kernel thread on these cores, rather than by whoever sends
/// them; `before` are the pollers that there were before XDP was attached.
fn pin_polling(space: &Space, cores: &[usize], before: &BTreeSet<i32>) -> Result<()> {
    let file = format!("/sys/class/net/{OUTER}/threaded");
    let ours = lab::wait_for("a kernel thread that polls for XDP", START_LIMIT, || {
        write(space, &file, "1")?;
        let ours: Vec<_> = pollers().difference(before).copied().collect();
        Ok((!ours.is_empty()).then_some(ours))
    })?;
    let mut set = CpuSet::new();
    for &core in cores {
        set.set(core);
    }
    for pid in ours {
        sched_setaffinity(Pid::from_raw(pid), &set).with_context(|| format!("pinning {pid}"))?;
    }
    Ok(())
}

fn write(space: &Space, file: &str, value: &str) -> Result<()> {
    let script = format!("echo {value} > {file}");
    space.run("sh", &["-c", &script]).map(drop).with_context(|| format!("writing {file}"))
}

/// A WireGuard interface, and the process that made it.
pub struct Device {
    /// Its name.
    pub interface: String,
    /// Ended before its socket is removed.
    process: Option<Process>,
    socket: PathBuf,
}

impl Device {
    fn start(
        hosts: &Hosts,
        space: &Space,
        cores: &[usize],
        program: &implementations::Device,
        suffix: char,
        conf: &str,
    ) -> Result<Device> {
        let interface = hosts.lab.interface(suffix);
        let implementations::Device { program, arguments, .. } = program;
        let mut command = space.command(program);
        command.args(arguments).arg(&interface);
        // On Linux, where the kernel's own is preferred, some want to be told by this, too.
        command.env("WG_PROCESS_FOREGROUND", "1").env("LOG_LEVEL", "error");
        for name in ["XDP", "MODE", "BUSY_POLL", "AEAD", "WORKERS"] {
            command.env_remove(format!("TIDEGATE_{name}"));
        }
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let process = hosts.cores.starting_on(cores, || space.spawn(&name, &mut command))?;
        let socket = Path::new("/var/run/wireguard").join(format!("{interface}.sock"));
        let mut device = Device { interface, process: Some(process), socket };
        // Of a socket that is there and does not listen yet, wg(8) would believe that it was left behind, and
        // remove it.
        lab::wait_for(&format!("the interface of {name}"), START_LIMIT, || {
            device.check()?;
            let listens = UnixStream::connect(&device.socket).is_ok();
            Ok((listens && space.has_interface(&device.interface)).then_some(()))
        })?;
        let file = hosts.lab.write(&format!("{}.conf", device.interface), conf)?;
        let mut setconf = space.command("wg");
        setconf.args(["setconf", &device.interface]).arg(&file);
        space.spawn("wg", &mut setconf)?.finish(Duration::from_secs(60))?;
        Ok(device)
    }

    /// An error once the process has ended.
    ///
    /// # Errors
    /// See above; it has what the process said last.
    pub fn check(&mut self) -> Result<()> {
        let process = self.process.as_mut().context("it was ended")?;
        match process.ended()? {
            None => Ok(()),
            Some(status) => {
                let errors = process.errors();
                let last = errors.lines().rev().find(|line| !line.trim().is_empty());
                anyhow::bail!(
                    "its process ended with {status}: {}",
                    last.unwrap_or("it said nothing")
                )
            }
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        drop(self.process.take());
        // Not every daemon takes its socket along.
        let _ = fs::remove_file(&self.socket);
    }
}
