//! What a config file said when it was carried out last, as the ledger keeps it. No secrets.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{ledger::Hook, plan::Plan};
use crate::{
    config::{Config, Endpoint},
    device::SetRequest,
    key::PublicKey,
    uapi::EndpointName,
};

/// A file that was carried out, as far as the device and the host do not show it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Applied {
    /// The file, as an absolute path.
    pub config: PathBuf,
    /// Its hooks of `down`.
    pub down_hooks: Vec<Hook>,
    /// Its endpoints, by public key.
    pub endpoints: BTreeMap<String, AppliedEndpoint>,
    /// Its `FwMark`.
    pub fwmark: Option<u32>,
    /// Its `MTU`.
    pub mtu: Option<u32>,
    /// What only a new daemon takes up. A reload leaves it as it is.
    pub at_start: AtStart,
}

/// An endpoint of the file.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct AppliedEndpoint {
    /// As the file has it.
    pub written: String,
    /// What it meant then.
    pub resolved: Option<SocketAddr>,
}

/// Options of a daemon that it reads once.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct AtStart {
    /// `#! Xdp`
    pub xdp: Vec<String>,
    /// Its `mode=`.
    pub mode: Option<String>,
    /// `#! Workers`
    pub workers: Option<usize>,
}

impl Applied {
    /// What `config` says; `request` has the addresses of its endpoints.
    ///
    /// # Errors
    /// If there is no working directory for a relative path.
    pub fn new(
        path: &Path,
        config: &Config,
        plan: &Plan,
        request: &SetRequest,
    ) -> std::io::Result<Applied> {
        let addresses = request.peers.iter().map(|change| (&change.public_key, change.endpoint));
        let addresses: HashMap<_, _> = addresses.collect();
        let resolved = |key: &PublicKey| addresses.get(key).copied().flatten();
        Ok(Applied {
            config: std::path::absolute(path)?,
            down_hooks: plan.down_hooks.clone(),
            endpoints: endpoints(config, resolved),
            fwmark: config.interface.fwmark.as_deref().copied(),
            mtu: plan.mtu,
            at_start: AtStart::of(config),
        })
    }

    /// What was known of a peer's endpoint.
    pub fn endpoint(&self, key: &PublicKey) -> Option<&AppliedEndpoint> {
        self.endpoints.get(&key.to_string())
    }

    /// Those of its endpoints that are names.
    pub fn names(&self) -> Vec<EndpointName> {
        let name = |(key, endpoint): (&String, &AppliedEndpoint)| {
            let is_address = endpoint.written.parse::<SocketAddr>().is_ok();
            let (host, port) = endpoint.written.rsplit_once(':').filter(|_| !is_address)?;
            Some(EndpointName {
                public_key: PublicKey::from_base64(key).ok()?,
                host: host.to_owned(),
                port: port.parse().ok()?,
            })
        };
        self.endpoints.iter().filter_map(name).collect()
    }
}

/// The endpoints of a file with what they mean.
pub fn endpoints(
    config: &Config,
    resolved: impl Fn(&PublicKey) -> Option<SocketAddr>,
) -> BTreeMap<String, AppliedEndpoint> {
    let of_peers = config.peers.iter().filter_map(|peer| {
        let written = written(peer.endpoint.as_deref()?);
        let resolved = resolved(&peer.public_key);
        Some((peer.public_key.to_string(), AppliedEndpoint { written, resolved }))
    });
    of_peers.collect()
}

/// An endpoint as text; the same for all ways to write the same.
pub fn written(endpoint: &Endpoint) -> String {
    match endpoint {
        Endpoint::Address(address) => address.to_string(),
        Endpoint::Host { host, port } => format!("{host}:{port}"),
    }
}

impl AtStart {
    /// What a file says.
    pub fn of(config: &Config) -> AtStart {
        let xdp = config.interface.xdp.as_ref();
        let mode = xdp.and_then(|xdp| xdp.mode.as_ref()).map(|mode| mode.value.to_string());
        AtStart {
            xdp: xdp.iter().flat_map(|xdp| &xdp.interfaces).map(|nic| nic.value.clone()).collect(),
            mode,
            workers: config.interface.workers.as_deref().copied(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_addresses() {
        let endpoints = [
            Endpoint::Address("192.0.2.1:7".parse().unwrap()),
            Endpoint::Address("[fe80::1%3]:7".parse().unwrap()),
            Endpoint::Host { host: "fe80::1%eth0".to_owned(), port: 8 },
            Endpoint::Host { host: "server.test".to_owned(), port: 9 },
        ];
        let key = |number| PublicKey::from_bytes([number; 32]);
        let endpoints = (1..).zip(&endpoints).map(|(number, endpoint)| {
            let endpoint = AppliedEndpoint { written: written(endpoint), resolved: None };
            (key(number).to_string(), endpoint)
        });
        let applied = Applied {
            config: "wg0.conf".into(),
            down_hooks: Vec::new(),
            endpoints: endpoints.collect(),
            fwmark: None,
            mtu: None,
            at_start: AtStart::default(),
        };
        let name = |number, host: &str, port| EndpointName {
            public_key: key(number),
            host: host.to_owned(),
            port,
        };
        assert_eq!(applied.names(), [name(3, "fe80::1%eth0", 8), name(4, "server.test", 9)]);
    }
}
