//! Names of peers for `show`, where the daemon knows none: from the interface's config file.

use std::collections::HashMap;

use super::{directives, ledger::Ledger, name::ConfigFile, name::InterfaceName, report::Interface};
use crate::{config, key::PublicKey};

/// A name that may be printed.
pub fn printable(name: &str) -> Option<String> {
    config::name_problem(name).is_none().then(|| name.to_owned())
}

/// Names the peers as the file does from which the interface was brought up, or else the file in
/// `/etc/wireguard`, unless the daemon has named one: then it knows all names that there are.
pub fn fill(interface: &mut Interface, name: &InterfaceName) {
    if interface.peers.is_empty() || interface.peers.iter().any(|peer| peer.name.is_some()) {
        return;
    }
    let names = of_file(name);
    for peer in &mut interface.peers {
        peer.name = names.get(&peer.public_key.0).cloned();
    }
}

fn of_file(interface: &InterfaceName) -> HashMap<PublicKey, String> {
    // A file that `up` was given has run commands as root: whoever owns it was trusted with more.
    let of_up = Ledger::peek(interface).and_then(|record| {
        let path = record.header.config;
        Some((path.clone(), directives::text_for_names(&path, None)?))
    });
    let found = of_up.or_else(|| {
        let path = ConfigFile::of(interface).path;
        Some((path.clone(), directives::text_for_names(&path, Some(directives::ROOT))?))
    });
    // What is wrong with a file is the business of who reads it to do as it says.
    let config =
        found.and_then(|(path, text)| config::parse(&path.display().to_string(), &text).ok());
    let named = config
        .into_iter()
        .flat_map(|config| config.peers)
        .filter_map(|peer| Some((peer.public_key.value, printable(&peer.name?.value)?)));
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_move_a_cursor_is_no_name() {
        assert_eq!(printable("laptop of Zoë"), Some("laptop of Zoë".to_owned()));
        for bad in ["", "a\nb", "\u{1b}[2J", "\u{9b}2J", &"x".repeat(64)] {
            assert_eq!(printable(bad), None, "{bad:?}");
        }
    }
}
