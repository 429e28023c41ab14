//! `show`: what daemons answer, as text like `wg show` or as JSON.

use std::{collections::HashMap, io::IsTerminal};

use anyhow::Context;
use serde::Deserialize;

use super::{
    Code, Failure,
    args::Show,
    name::InterfaceName,
    nat, peer_names, print,
    report::{DataPath, Interface, Report},
    socket::{self, Socket},
    text::{self, Paint},
    troubles::{Told, Troubles},
};
use crate::sys::clock;

pub fn show(arguments: &Show) -> Result<Code, Failure> {
    match arguments.interfaces.as_slice() {
        [word] if word == "interfaces" => print_names(arguments.json),
        [] => show_each(&live_sockets()?, arguments.json),
        [word] if word == "all" => show_each(&live_sockets()?, arguments.json),
        [name, word] if word == "nat" => {
            let name: InterfaceName =
                name.parse().map_err(|error| Failure::new(Code::Usage, error))?;
            nat::show(&name, arguments.json)
        }
        names => {
            let mut sockets = Vec::new();
            for name in names {
                let name: InterfaceName =
                    name.parse().map_err(|error| Failure::new(Code::Usage, error))?;
                let socket = Socket::find(&name)?.ok_or_else(|| not_found(&name))?;
                sockets.push((name, socket));
            }
            show_each(&sockets, arguments.json)
        }
    }
}

/// Nobody serves this interface.
pub fn not_found(name: &InterfaceName) -> Failure {
    let path = socket::path(name);
    let line = format_args!(
        "{name}: no daemon listens at {}; `tidegate up {name}` starts one, `tidegate \
         show interfaces` lists those that run",
        path.display()
    );
    Failure::new(Code::Existence, line)
}

/// Every interface with a daemon that listens.
fn live_sockets() -> Result<Vec<(InterfaceName, Socket)>, Failure> {
    let mut sockets = Vec::new();
    for name in socket::interfaces()? {
        if let Some(socket) = Socket::find(&name)? {
            sockets.push((name, socket));
        }
    }
    Ok(sockets)
}

fn print_names(as_json: bool) -> Result<Code, Failure> {
    let sockets = live_sockets()?;
    let names: Vec<&str> = sockets.iter().map(|(name, _)| name.as_str()).collect();
    if as_json {
        print(&format!("{}\n", serde_json::json!({ "interfaces": names })))?;
    } else if !names.is_empty() {
        print(&format!("{}\n", names.join(" ")))?;
    }
    Ok(Code::Ok)
}

fn show_each(sockets: &[(InterfaceName, Socket)], as_json: bool) -> Result<Code, Failure> {
    let show_keys = std::env::var_os("WG_HIDE_KEYS").is_some_and(|value| value == "never");
    let mut report = Report { interfaces: Vec::new() };
    for (name, socket) in sockets {
        report.interfaces.push(ask(name, socket, show_keys)?);
    }
    if as_json {
        let json = serde_json::to_string_pretty(&report).context("writing JSON")?;
        print(&format!("{json}\n"))?;
    } else {
        let paint = Paint { is_on: wants_colour() };
        let (now_unix_s, _) = clock::wall();
        let texts: Vec<String> = report
            .interfaces
            .iter()
            .map(|interface| text::interface(interface, paint, now_unix_s))
            .collect();
        print(&texts.join("\n"))?;
    }
    Ok(Code::Ok)
}

/// Asks one daemon for everything.
pub fn ask(name: &InterfaceName, socket: &Socket, show_keys: bool) -> Result<Interface, Failure> {
    let answer = socket.request("get=1\n")?;
    if let Some(error) = answer.error() {
        let doing = format!("asking the daemon of {name}");
        return Err(anyhow::Error::new(error).context(doing).into());
    }
    let mut interface = Interface::parse(name.as_str(), answer.lines(), show_keys)
        .map_err(|error| Failure::new(Code::Runtime, error).within(name))?;
    peer_names::fill(&mut interface, name);
    let answered = status(socket)?.and_then(|json| {
        let parsed = serde_json::from_str(&json);
        // A daemon of another version; everything else is still worth showing.
        let warn = |error: &serde_json::Error| {
            eprintln!(
                "tidegate: warning: {name}: its daemon is of another version, so that its data path \
                 is not shown: {error}"
            );
        };
        parsed.inspect_err(warn).ok()
    });
    if let Some(Status { data_path, troubles }) = answered {
        interface.data_path = Some(data_path);
        tell(&mut interface, troubles);
    }
    Ok(interface)
}

/// The answer of a daemon of ours to `tidegate=status`.
#[derive(Deserialize)]
struct Status {
    #[serde(flatten)]
    data_path: DataPath,
    #[serde(flatten)]
    troubles: Troubles,
}

/// Puts each trouble where it belongs.
fn tell(interface: &mut Interface, Troubles { troubles, more_troubles }: Troubles) {
    let keys = interface.peers.iter().enumerate();
    let places: HashMap<String, usize> =
        keys.map(|(place, peer)| (peer.public_key.0.to_string(), place)).collect();
    interface.more_troubles = more_troubles;
    for Told { peer, trouble } in troubles {
        let name = |key: &str| interface.peers[*places.get(key)?].name.clone();
        let trouble = trouble.in_words(name);
        match peer {
            None => interface.troubles.push(trouble),
            // Who is gone by now is in no trouble.
            Some(key) => {
                if let Some(&place) = places.get(&key) {
                    interface.peers[place].troubles.push(trouble);
                }
            }
        }
    }
}

/// What a daemon of ours says of its data path, as JSON; nothing if it is another
/// implementation's.
///
/// # Errors
/// When it does not answer.
pub fn status(socket: &Socket) -> Result<Option<String>, Failure> {
    let answer = socket.request("tidegate=status\n")?;
    // Others answer what they do not know with an error.
    Ok(answer.error().is_none().then(|| answer.lines().collect()))
}

/// As wg(8): `always`, `never`, or only for people.
pub fn wants_colour() -> bool {
    match std::env::var("WG_COLOR_MODE").as_deref() {
        Ok("always") => true,
        Ok("never") => false,
        _ => std::io::stdout().is_terminal(),
    }
}
