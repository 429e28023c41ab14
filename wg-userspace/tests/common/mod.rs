//! What tests with whole daemons in the lab's namespaces have in common.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use xtask::{
    demonstration::DataPath,
    lab::{self, Lab, OUTER, Process, Space},
};

pub const LIMIT: Duration = Duration::from_secs(10);
pub const NATIVE: &[&str] = &["--xdp", OUTER, "--mode", "native"];
pub const UDP: &[&str] = &["--mode", "udp"];

pub fn tidegate() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_tidegate"))
}

/// `tidegate run -f` in a namespace.
pub struct Daemon<'a> {
    pub space: &'a Space,
    pub interface: String,
    pub process: Process,
}

impl<'a> Daemon<'a> {
    pub fn start(space: &'a Space, interface: &str, options: &[&str]) -> Daemon<'a> {
        Daemon::start_with(space, interface, options, &[])
    }

    pub fn start_with(
        space: &'a Space,
        interface: &str,
        options: &[&str],
        environment: &[(&str, &str)],
    ) -> Daemon<'a> {
        let mut command = space.command(tidegate());
        command.args(["run", "-f", interface]).args(options).envs(environment.iter().copied());
        let mut process = space.spawn("tidegate-run", &mut command).unwrap();
        let mut last = String::new();
        let ready = lab::wait_for("the daemon", LIMIT, || {
            let ended = process.ended()?;
            anyhow::ensure!(ended.is_none(), "it ended: {}", process.errors());
            match DataPath::of(space, tidegate(), interface) {
                Ok(_) => Ok(Some(())),
                Err(error) => {
                    last = format!("{error:#}");
                    Ok(None)
                }
            }
        });
        ready.unwrap_or_else(|error| panic!("{error:#}: {last}\n{}", process.errors()));
        Daemon { space, interface: interface.to_owned(), process }
    }

    /// Gives the daemon the keys and peers of a `wg0.conf`, and the interface its addresses.
    pub fn configure(&self, lab: &Lab, conf: &str) {
        let keys: Vec<&str> =
            conf.lines().filter(|line| !line.trim_start().starts_with("Address")).collect();
        let file = lab.write(&format!("{}.set", self.interface), &keys.join("\n")).unwrap();
        self.wg(&["setconf", &self.interface, file.to_str().unwrap()]);
        self.space.configure(&self.interface, conf).unwrap();
    }

    pub fn wg(&self, arguments: &[&str]) -> String {
        self.space.run("wg", arguments).unwrap()
    }

    /// The fields of `wg show IF dump`, a line each.
    pub fn dump(&self) -> Vec<Vec<String>> {
        let text = self.wg(&["show", &self.interface, "dump"]);
        text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
    }

    pub fn status(&self) -> DataPath {
        DataPath::of(self.space, tidegate(), &self.interface).unwrap()
    }

    /// Waits for a clean end: exit code 0, and neither interface nor socket left.
    pub fn ends_cleanly(mut self) {
        let status = self.process.wait(LIMIT).unwrap();
        assert!(status.success(), "{status}: {}", self.process.errors());
        assert!(!socket(&self.interface).exists(), "its socket is left");
        assert!(!self.space.has_interface(&self.interface), "its interface is left");
    }
}

pub fn socket(interface: &str) -> PathBuf {
    Path::new("/var/run/wireguard").join(format!("{interface}.sock"))
}

/// Kernel's id of the XDP program on the gateway's outer link.
pub fn xdp_program(lab: &Lab) -> Option<u64> {
    let links = lab.gateway.ip_json(&format!("-d link show dev {OUTER}")).unwrap();
    links.pointer("/0/xdp/prog/id").and_then(serde_json::Value::as_u64)
}

pub fn assert_answered(space: &Space, to: &[&str]) {
    for to in to {
        let ping = space.ping(to, 5, &[]).unwrap();
        assert!(ping.answered >= 4, "{to}: {ping:?}");
    }
}

/// An option's value in a `wg0.conf`.
pub fn value<'a>(conf: &'a str, key: &str) -> &'a str {
    lab::conf_values(conf, key)[0]
}

pub fn public_key(space: &Space, lab: &Lab, private_key: &str) -> String {
    let file = lab.write("private", private_key).unwrap();
    let script = format!("wg pubkey < {}", file.display());
    space.run("sh", &["-c", &script]).unwrap().trim().to_owned()
}
