//! Name servers of the host: by resolvconf(8), as wg-quick(8) does, or by systemd-resolved.

use std::fs;

use serde::{Deserialize, Serialize};

use super::{
    name::InterfaceName,
    programs::{self, Program},
};

/// What tells the host's resolver of name servers.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DnsTool {
    /// resolvconf(8)
    Resolvconf,
    /// resolvectl(1)
    Resolvectl,
}

impl DnsTool {
    /// The one that this host has.
    pub fn find() -> Option<DnsTool> {
        [DnsTool::Resolvconf, DnsTool::Resolvectl]
            .into_iter()
            .find(|tool| programs::is_there(tool.name()))
    }

    const fn name(self) -> &'static str {
        match self {
            DnsTool::Resolvconf => "resolvconf",
            DnsTool::Resolvectl => "resolvectl",
        }
    }
}

/// What tells the resolver of `servers`, for this interface.
pub fn set(
    tool: DnsTool,
    interface: &InterfaceName,
    servers: &[String],
    search: &[String],
) -> Vec<Program> {
    match tool {
        DnsTool::Resolvconf => {
            let record = format!("{}{interface}", record_prefix());
            let program = Program::new("resolvconf", ["-a", &record, "-m", "0", "-x"]);
            vec![program.with_input(resolv_conf(servers, search))]
        }
        DnsTool::Resolvectl => {
            let interface = interface.as_str();
            let with = |first: [&str; 2], rest: &[String]| {
                Program::new("resolvectl", first.into_iter().chain(rest.iter().map(String::as_str)))
            };
            // `~.`: all names are asked here, as `resolvconf -x` has it.
            let domains: Vec<String> = search.iter().cloned().chain(["~.".to_owned()]).collect();
            vec![
                with(["dns", interface], servers),
                with(["domain", interface], &domains),
                with(["default-route", interface], &["true".to_owned()]),
            ]
        }
    }
}

/// What makes the resolver forget them. For systemd-resolved the interface must still be there; it
/// forgets them with it by itself.
pub fn unset(tool: DnsTool, interface: &InterfaceName) -> Program {
    match tool {
        DnsTool::Resolvconf => {
            let record = format!("{}{interface}", record_prefix());
            Program::new("resolvconf", ["-d", &record, "-f"])
        }
        DnsTool::Resolvectl => Program::new("resolvectl", ["revert", interface.as_str()]),
    }
}

/// Servers and search domains among the words of `DNS`, told apart as wg-quick(8) does.
pub fn servers_and_search<'a>(
    words: impl IntoIterator<Item = &'a str>,
) -> (Vec<String>, Vec<String>) {
    let is_server = |word: &str| {
        word.contains(':') || word.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
    };
    words.into_iter().map(str::to_owned).partition(|word| is_server(word))
}

fn resolv_conf(servers: &[String], search: &[String]) -> String {
    let mut text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    if !search.is_empty() {
        text += &format!("search {}\n", search.join(" "));
    }
    text
}

/// What wg-quick(8) puts before the interface in the name of resolvconf's record.
pub fn record_prefix() -> String {
    let order = fs::read_to_string("/etc/resolvconf/interface-order").unwrap_or_default();
    prefix_in(&order).map_or_else(String::new, |prefix| format!("{prefix}."))
}

/// The first pattern of `interface-order` that is a plain word and `*`.
fn prefix_in(order: &str) -> Option<&str> {
    order.lines().map(str::trim).find_map(|line| {
        let word = line.strip_suffix('*')?;
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        (!word.is_empty() && word.bytes().all(is_plain)).then_some(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn servers_and_domains_are_told_apart_as_by_wg_quick() {
        let (servers, search) =
            servers_and_search(["10.0.0.53", "corp.example", "fd00::53", "lan", "1.1.1.1"]);
        assert_eq!(servers, ["10.0.0.53", "fd00::53", "1.1.1.1"]);
        assert_eq!(search, ["corp.example", "lan"]);
    }

    #[test]
    fn resolvconf_gets_lines_of_resolv_conf() {
        let text = resolv_conf(&owned(&["10.0.0.53", "fd00::53"]), &owned(&["a.example", "b"]));
        assert_eq!(text, "nameserver 10.0.0.53\nnameserver fd00::53\nsearch a.example b\n");
        assert_eq!(resolv_conf(&owned(&["10.0.0.53"]), &[]), "nameserver 10.0.0.53\n");
    }

    #[test]
    fn the_prefix_is_the_first_plain_pattern() {
        assert_eq!(
            prefix_in("# order\nlo.inet6\nlo.inet\n@(dev)*([0-9])\ntun*\neth*\n"),
            Some("tun")
        );
        assert_eq!(prefix_in("lo.*\n*\n"), None);
        assert_eq!(prefix_in(""), None);
    }

    #[test]
    fn systemd_resolved_is_told_that_all_names_are_asked_here() {
        let interface = "wg0".parse().unwrap();
        let shown: Vec<String> =
            set(DnsTool::Resolvectl, &interface, &owned(&["10.0.0.53"]), &owned(&["lan"]))
                .iter()
                .map(Program::to_string)
                .collect();
        let expected = [
            "resolvectl dns wg0 10.0.0.53",
            "resolvectl domain wg0 lan ~.",
            "resolvectl default-route wg0 true",
        ];
        assert_eq!(shown, expected);
    }
}
