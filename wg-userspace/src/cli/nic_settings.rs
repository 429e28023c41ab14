//! What busy polling wants of NICs: that they put interrupts off while somebody asks them for packets.
//!
//! [`Plan`](super::plan::Plan) makes steps of these settings, so that `down` takes them back. They belong to the
//! daemon, which has its NICs for as long as it runs: `reload` leaves them as they are.

use std::path::Path;

use super::forwarding::Setting;
use crate::daemon::{Mode, Options};

/// Where the settings of NICs are.
const FOLDER: &str = "/sys/class/net";
/// Times that a NIC is looked at in vain before it interrupts again, and the nanoseconds between them, as the
/// kernel's documentation of busy polling has them.
const SETTINGS: [(&str, &str); 2] =
    [("napi_defer_hard_irqs", "2"), ("gro_flush_timeout", "200000")];

/// What has to be set for a daemon with these options. Those whose packets no driver brings (a veth's, for one) have
/// no interrupts to put off.
pub fn settings(options: &Options) -> Vec<Setting> {
    if options.busy_poll && options.mode != Mode::Udp {
        settings_in(Path::new(FOLDER), &options.xdp)
    } else {
        Vec::new()
    }
}

fn settings_in(folder: &Path, nics: &[String]) -> Vec<Setting> {
    let nics = nics.iter().filter(|nic| folder.join(nic).join("device").exists());
    let of = |nic: &String| {
        let path = folder.join(nic);
        SETTINGS.map(|(name, value)| (path.join(name).display().to_string(), value))
    };
    nics.flat_map(of).filter(|(path, _)| Path::new(path).exists()).collect()
}

/// Whether a [`Setting`] is of a NIC, by its path.
pub fn is_one(key: &str) -> bool {
    key.starts_with(FOLDER)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_has_a_driver_is_set() {
        let folder =
            std::env::temp_dir().join(format!("tidegate-nic-settings-{}", std::process::id()));
        for file in ["eth0/device", "eth0/napi_defer_hard_irqs", "eth0/gro_flush_timeout"] {
            fs::create_dir_all(folder.join(file)).unwrap();
        }
        fs::create_dir_all(folder.join("veth0/napi_defer_hard_irqs")).unwrap();
        let settings = settings_in(&folder, &["veth0", "eth0", "gone0"].map(str::to_owned));
        let short = |key: &str| key.rsplit('/').take(2).collect::<Vec<_>>().join(" of ");
        let set: Vec<String> =
            settings.iter().map(|(key, value)| format!("{} = {value}", short(key))).collect();
        assert_eq!(set, ["napi_defer_hard_irqs of eth0 = 2", "gro_flush_timeout of eth0 = 200000"]);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn they_are_known_by_their_paths() {
        assert!(is_one("/sys/class/net/eth0/napi_defer_hard_irqs"));
        assert!(!is_one("net/ipv4/ip_forward"));
    }
}
