//! `save`, and `SaveConfig = true`: what changed while an interface was up is written into its file.

use std::{
    fs, io,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::Context as _;
use ipnet::IpNet;
use zeroize::Zeroizing;

use super::{
    Code, Failure,
    applied::{self, Applied},
    dns,
    down::runtime,
    files::unreadable,
    ledger::{Ledger, Record},
    name::{ConfigFile, InterfaceName},
    print,
    rewrite::{Lock, replace},
    running::{Running, RunningPeer},
    show,
    socket::Socket,
    steps::Step,
    up,
};
use crate::{
    config::{
        self, Config, Table,
        edit::{Wanted, WantedPeer, edit},
    },
    host::Host,
    key::PublicKey,
};

pub fn save(what: &str) -> Result<Code, Failure> {
    let file =
        ConfigFile::which(what, Path::exists).map_err(|error| Failure::new(Code::Usage, error))?;
    let interface = &file.interface;
    let mut ledger = Ledger::open(interface).map_err(|failure| failure.within(interface))?;
    let runtime = runtime()?;
    let host = runtime.block_on(async { Host::new() })?;
    let record = ledger.as_ref().map(Ledger::record);
    let saving = Saving { interface, host: &host, path: &file.path, record };
    let saved = runtime.block_on(saving.save()).map_err(|failure| failure.within(interface))?;
    if let (Some(ledger), Some(applied)) = (&mut ledger, saved.applied) {
        ledger.applies(applied).context("noting what the file says")?;
    }
    let path = file.path.display();
    print(&match saved.is_new {
        true => format!("{interface}: saved to {path}\n"),
        false => format!("{interface}: nothing to do, {path} says so already\n"),
    })?;
    Ok(Code::Ok)
}

/// Saves if the file wants it (`SaveConfig = true`). For `down`, while everything is still there.
///
/// # Errors
/// If it cannot be saved.
pub async fn on_down(
    interface: &InterfaceName,
    host: &Host,
    record: &Record,
) -> Result<(), Failure> {
    let path = &record.header.config;
    let text = match fs::read_to_string(path) {
        Ok(text) => Zeroizing::new(text),
        // There is nobody who could want it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(unreadable(path, &error)),
    };
    let Ok(config) = config::parse(&path.display().to_string(), &text) else {
        eprintln!(
            "tidegate: warning: {interface}: {path} has errors, so that nothing is saved into it; \
             `tidegate check {path}` shows them",
            path = path.display()
        );
        return Ok(());
    };
    if config.interface.save_config.as_deref() == Some(&true) {
        Saving { interface, host, path, record: Some(record) }.save().await?;
    }
    Ok(())
}

struct Saving<'a> {
    interface: &'a InterfaceName,
    host: &'a Host,
    path: &'a Path,
    record: Option<&'a Record>,
}

struct Saved {
    /// Whether the file was written.
    is_new: bool,
    /// What is to be noted of the file, if there is a ledger.
    applied: Option<Applied>,
}

impl Saving<'_> {
    async fn save(&self) -> Result<Saved, Failure> {
        let socket =
            Socket::find(self.interface)?.ok_or_else(|| show::not_found(self.interface))?;
        let running = Running::ask(self.interface, &socket)?;
        let doing = || format!("reading {}", self.path.display());
        let is_there = self.path.try_exists().with_context(doing)?;
        let mut lock = is_there.then(|| Lock::of(self.path)).transpose().with_context(doing)?;
        let text = match is_there {
            true => up::read(self.path)?,
            false => skeleton(self.interface, &running)?,
        };
        let name = self.path.display().to_string();
        let config = config::parse(&name, &text).map_err(Failure::config)?;
        let wanted = self.wanted(&config, &running).await?;
        let edited = edit(&name, &text, &wanted).map_err(Failure::config)?;
        // Nobody is left with a file that `up` refuses.
        let config = config::parse(&name, &edited)
            .map_err(|errors| Failure::config(errors).and("the file was left as it is"))?;
        let is_new = !self.path.exists() || edited != text;
        if is_new {
            let doing = || format!("writing {}", self.path.display());
            let written = match &mut lock {
                Some(lock) => lock.replace(edited.as_bytes()),
                None => replace(self.path, edited.as_bytes()),
            };
            written.with_context(doing)?;
        }
        let known = self.record.and_then(|record| record.applied.as_ref());
        let applied = known.map(|known| self.applied(&config, &running, known));
        Ok(Saved { is_new, applied })
    }

    fn applied(&self, config: &Config, running: &Running, known: &Applied) -> Applied {
        let now = |key: &PublicKey| {
            let peer = running.peers.iter().find(|peer| peer.public_key == *key);
            peer.and_then(|peer| peer.endpoint)
        };
        Applied {
            endpoints: applied::endpoints(config, now),
            fwmark: config.interface.fwmark.as_deref().copied(),
            mtu: config.interface.mtu.as_deref().map(|&mtu| u32::from(mtu)),
            ..known.clone()
        }
    }

    async fn wanted(&self, config: &Config, running: &Running) -> Result<Wanted, Failure> {
        let name = self.interface.as_str();
        let link = self.host.link(name).await?;
        let link = link.ok_or_else(|| show::not_found(self.interface))?;
        let all = self.host.addresses().await?;
        let ours = all.iter().filter(|address| address.link_index == link.index);
        let in_file: Vec<IpNet> = config.interface.addresses.iter().map(|net| net.value).collect();
        // The kernel gives every interface one of these by itself.
        let is_by_kernel = |net: &IpNet| match net {
            IpNet::V6(v6) => v6.addr().is_unicast_link_local() && !in_file.contains(net),
            IpNet::V4(_) => false,
        };
        let addresses = ours.map(|address| address.net).filter(|net| !is_by_kernel(net));
        Ok(Wanted {
            private_key: running.private_key.clone(),
            listen_port: Some(running.listen_port).filter(|&port| port != 0),
            fwmark: (!self.is_automatic(config, running)).then_some(running.fwmark),
            addresses: Some(addresses.collect()),
            dns: self.name_servers(config),
            mtu: u16::try_from(link.mtu).ok(),
            peers: running
                .peers
                .iter()
                .filter(|peer| !peer.is_pulled)
                .map(|peer| self.peer(config, peer))
                .collect(),
        })
    }

    fn peer(&self, config: &Config, peer: &RunningPeer) -> WantedPeer {
        // A name stays as long as the peer is where it led to.
        let is_file_right = || {
            let in_file = config.peers.iter().find(|known| *known.public_key == peer.public_key)?;
            let known = self.record?.applied.as_ref()?.endpoint(&peer.public_key)?;
            let written = applied::written(in_file.endpoint.as_deref()?);
            let is_where_it_led = peer.is_by_name || known.resolved == peer.endpoint;
            Some(written == known.written && is_where_it_led)
        };
        WantedPeer {
            public_key: peer.public_key,
            preshared_key: peer.preshared_key.clone(),
            allowed_ips: peer.allowed_ips.clone(),
            endpoint: peer.endpoint.filter(|_| is_file_right() != Some(true)),
            persistent_keepalive: peer.persistent_keepalive,
        }
    }

    /// Whether the device's mark was chosen for a default route.
    fn is_automatic(&self, config: &Config, running: &Running) -> bool {
        if let Some(record) = self.record {
            return record.steps().any(|noted| noted.step == Step::Mark(running.fwmark));
        }
        // wg-quick chooses one where the file has none.
        let interface = &config.interface;
        let is_auto = interface.table.as_ref().is_none_or(|table| table.value == Table::Auto);
        let mut nets = config.peers.iter().flat_map(|peer| &peer.allowed_ips);
        is_auto
            && interface.fwmark.as_ref().is_none_or(|mark| mark.value == 0)
            && nets.any(|net| net.prefix_len() == 0)
    }

    /// What resolvconf(8) knows of this interface; nothing if it cannot be asked, or was never told.
    fn name_servers(&self, config: &Config) -> Option<Vec<String>> {
        let mut noted = self.record.into_iter().flat_map(Record::steps);
        let was_told = !config.interface.dns.is_empty()
            || noted.any(|noted| matches!(noted.step, Step::Dns { .. }));
        if !was_told {
            return None;
        }
        let record = format!("{}{}", dns::record_prefix(), self.interface);
        let listed = Command::new("resolvconf")
            .args(["-l", &record])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output();
        let listed = listed.ok().filter(|output| output.status.success());
        let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let kept = || fs::read_to_string(format!("/etc/resolvconf/run/interface/{record}")).ok();
        let words = words_of_resolv_conf(&listed.or_else(kept)?);
        // It may be another one that cannot list: then it is not known.
        (!words.is_empty()).then_some(words)
    }
}

/// Servers and search domains of a `resolv.conf`.
fn words_of_resolv_conf(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    for line in text.lines() {
        let mut line = line.split_ascii_whitespace();
        match line.next() {
            Some("nameserver") => words.extend(line.next().map(str::to_owned)),
            Some("search" | "domain") => words.extend(line.map(str::to_owned)),
            _ => {}
        }
    }
    words
}

/// A file that says little more than whose it is.
fn skeleton(interface: &InterfaceName, running: &Running) -> Result<Zeroizing<String>, Failure> {
    let key = running.private_key.as_ref().ok_or_else(|| {
        let line = format_args!(
            "the device has no private key, so that there is nothing to save; `wg set {interface} \
             private-key FILE` gives it one"
        );
        Failure::new(Code::Runtime, line)
    })?;
    Ok(Zeroizing::new(["[Interface]\nPrivateKey = ", &key.to_base64(), "\n"].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_and_domains_are_words_of_one_list() {
        let text = "# x\nnameserver 10.0.0.53\nsearch a.example b\noptions edns0\n";
        assert_eq!(words_of_resolv_conf(text), ["10.0.0.53", "a.example", "b"]);
    }
}
