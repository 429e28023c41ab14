//! `init`: the files of all ends of a new tunnel.
//!
//! `shapes` says who the ends are and what each file has to say, `network` who gets which address,
//! [`end_file`](super::end_file) writes the text of one file, and `folder` puts them all on the disk,
//! or none.

mod args;
mod folder;
mod network;
mod shapes;
#[cfg(test)]
mod tests;

use std::{fmt::Write as _, path::Path};

pub use args::Shape;

use self::{args::Common, folder::NewFile, shapes::End};
use super::{Code, Failure, end_file::write_config, print};
use crate::{config, sys::random::Rng};

pub fn init(shape: &Shape) -> Result<Code, Failure> {
    let ends = shapes::ends(shape, &mut Rng).map_err(|error| Failure::new(Code::Usage, error))?;
    let common = common_of(shape);
    let name = format!("{}.conf", common.interface);
    let mut files = Vec::with_capacity(ends.len());
    for end in &ends {
        let text = write_config(&end.config);
        // A word of the command line that the file cannot hold is found before anything is written.
        config::parse(&format!("{}/{name}", end.name), &text).map_err(Failure::config)?;
        files.push(NewFile { folder: end.name.clone(), name: name.clone(), text });
    }
    folder::write(&common.dir, &files, &mut Rng)?;
    print(&report(&ends, common))?;
    Ok(Code::Ok)
}

fn common_of(shape: &Shape) -> &Common {
    match shape {
        Shape::Bridge(of) => &of.common,
        Shape::Gateway(of) => &of.common,
        Shape::Jumpbox(of) => &of.common,
        Shape::Mesh(of) => &of.common,
    }
}

/// What was written, and what to do next.
fn report(ends: &[End], common: &Common) -> String {
    let (dir, interface) = (&common.dir, &common.interface);
    let file = |end: &str| dir.join(end).join(format!("{interface}.conf")).display().to_string();
    let width = ends.iter().map(|end| file(&end.name).chars().count()).max().unwrap_or_default();
    let mut text = String::from("Written, for its owner alone to read:\n");
    for end in ends {
        let addresses: Vec<_> =
            end.config.addresses.iter().map(|address| address.addr().to_string()).collect();
        let _ = write!(text, "  {:width$}  {}", file(&end.name), addresses.join(", "));
        if let Some(endpoint) = end.config.found_at() {
            let _ = write!(text, ", found at {endpoint}");
        }
        text.push('\n');
    }
    text.push_str("\nNext:\n");
    let found: Vec<_> = ends.iter().filter_map(|end| Some((end, end.config.found_at()?))).collect();
    let all = quoted(&dir.join("*").join(format!("{interface}.conf")));
    let _ = writeln!(text, "  tidegate check {all}");
    let _ = writeln!(
        text,
        "Move each file to /etc/wireguard of its own host; it has that host's private key:"
    );
    for (end, endpoint) in found.iter().take(SHOWN_MAX) {
        let (from, host) = (quoted(Path::new(&file(&end.name))), host_text(endpoint));
        let _ = writeln!(text, "  scp -p {from} root@{host}:/etc/wireguard/");
    }
    if found.len() > SHOWN_MAX {
        let _ = writeln!(text, "  and so on, for {} more", found.len() - SHOWN_MAX);
    }
    let ports = match &found[..] {
        [(end, endpoint)] => format!("UDP port {} of {}", endpoint.port(), end.name),
        _ => "The UDP ports above".to_owned(),
    };
    let verb = if found.len() == 1 { "has" } else { "have" };
    let _ = writeln!(text, "{ports} {verb} to be open to the others. At each end:");
    let _ = writeln!(text, "  tidegate up {interface}");
    text
}

/// More ends than these need no line each.
const SHOWN_MAX: usize = 8;

/// The host of an endpoint, for scp(1).
fn host_text(endpoint: &config::Endpoint) -> String {
    match endpoint {
        config::Endpoint::Address(address) if address.is_ipv6() => format!("[{}]", address.ip()),
        config::Endpoint::Address(address) => address.ip().to_string(),
        config::Endpoint::Host { host, .. } => host.clone(),
    }
}

/// A path for a shell: in quotes if need be, but for a `*` that stands for a folder.
fn quoted(path: &Path) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=,:@%".contains(c);
    let word = |text: &str| match text {
        "*" => text.to_owned(),
        _ if text.chars().all(is_plain) => text.to_owned(),
        _ => format!("'{}'", text.replace('\'', r"'\''")),
    };
    let text = path.display().to_string();
    text.split('/').map(word).collect::<Vec<_>>().join("/")
}
