//! The few keys of `wg0.conf` that a peer of one other peer needs.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};

/// What was read.
pub struct Conf {
    pub private_key: [u8; 32],
    pub listen_port: u16,
    pub public_key: [u8; 32],
    pub preshared_key: Option<[u8; 32]>,
    pub endpoint: Option<SocketAddr>,
    pub persistent_keepalive: Option<u16>,
}

/// Reads `key = value` lines; keys that are the caller's business are passed over.
pub fn parse(text: &str) -> Result<Conf> {
    let mut section = String::new();
    let mut peers = 0;
    let (mut private_key, mut public_key, mut preshared_key) = (None, None, None);
    let (mut listen_port, mut endpoint, mut persistent_keepalive) = (0, None, None);
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let at = || format!("line {}: {line}", number + 1);
        if line.starts_with('[') {
            section = line.to_ascii_lowercase();
            peers += usize::from(section == "[peer]");
            continue;
        }
        let (key, value) = line.split_once('=').with_context(at)?;
        let (key, value) = (key.trim().to_ascii_lowercase(), value.trim());
        match (section.as_str(), key.as_str()) {
            ("[interface]", "privatekey") => private_key = Some(read_key(value).with_context(at)?),
            ("[interface]", "listenport") => listen_port = value.parse().with_context(at)?,
            ("[peer]", "publickey") => public_key = Some(read_key(value).with_context(at)?),
            ("[peer]", "presharedkey") => preshared_key = Some(read_key(value).with_context(at)?),
            ("[peer]", "endpoint") => endpoint = Some(value.parse().with_context(at)?),
            ("[peer]", "persistentkeepalive") => {
                let seconds = if value == "off" { 0 } else { value.parse().with_context(at)? };
                persistent_keepalive = (seconds > 0).then_some(seconds);
            }
            ("[interface]", "address" | "mtu") | ("[peer]", "allowedips") => {}
            _ => bail!("{}: this peer does not know the key", at()),
        }
    }
    ensure!(peers == 1, "this peer takes exactly one [Peer], not {peers}");
    Ok(Conf {
        private_key: private_key.context("PrivateKey is missing")?,
        listen_port,
        public_key: public_key.context("PublicKey is missing")?,
        preshared_key,
        endpoint,
        persistent_keepalive,
    })
}

fn read_key(text: &str) -> Result<[u8; 32]> {
    let bytes = STANDARD.decode(text).context("a key is base64")?;
    bytes.try_into().ok().context("a key is 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "IBwCMKG0IAvhlcZPDahVK2eDM/zI9yt7lBt7QJh8l1E=";

    #[test]
    fn keys_and_endpoint_are_read() {
        let conf = parse(&format!(
            "# note\n[Interface]\nprivatekey={KEY} # x\nAddress = 10.9.0.2/24\nListenPort = 7\n\
             [PEER]\nPublicKey = {KEY}\nAllowedIPs = ::/0\nEndpoint = [fd00::1]:9\n\
             PersistentKeepalive = 25\n"
        ))
        .unwrap();
        assert_eq!(conf.listen_port, 7);
        assert_eq!(conf.endpoint, Some("[fd00::1]:9".parse().unwrap()));
        assert_eq!(conf.persistent_keepalive, Some(25));
        assert_eq!(conf.private_key, conf.public_key);
        assert_eq!(conf.preshared_key, None);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let error = parse("[Interface]\nPrivateKey = short\n").err().unwrap();
        assert!(format!("{error:#}").contains("line 2"), "{error:#}");
        assert!(parse(&format!("[Interface]\nPrivateKey = {KEY}\n")).is_err());
    }
}
