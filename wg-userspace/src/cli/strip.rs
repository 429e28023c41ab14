//! `strip`: a config file without what wg(8) does not know, as `wg-quick strip` prints it.

use std::{io, io::Write as _, path::Path};

use anyhow::Context;
use zeroize::Zeroizing;

use super::{Code, Failure, files::unreadable, name::ConfigFile};

/// What wg-quick(8) takes for itself from an `[Interface]`.
const KEYS: [&[u8]; 9] = [
    b"Address",
    b"MTU",
    b"DNS",
    b"Table",
    b"PreUp",
    b"PreDown",
    b"PostUp",
    b"PostDown",
    b"SaveConfig",
];

pub fn strip(what: &str) -> Result<Code, Failure> {
    let file =
        ConfigFile::which(what, Path::exists).map_err(|error| Failure::new(Code::Usage, error))?;
    let text = match std::fs::read(&file.path) {
        Ok(text) => Zeroizing::new(text),
        Err(error) => return Err(unreadable(&file.path, &error)),
    };
    let stripped = stripped(&text);
    let mut out = io::stdout().lock();
    match out.write_all(&stripped).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("writing to standard output")?;
        }
        _ => {}
    }
    Ok(Code::Ok)
}

/// The lines without blanks around them, and one that is empty at the end.
///
/// Bytes, not text: the file is not read for its meaning, and wg(8) may know more than we do.
fn stripped(text: &[u8]) -> Zeroizing<Vec<u8>> {
    // A shell's variables hold no zero.
    let text: Zeroizing<Vec<u8>> =
        Zeroizing::new(text.iter().copied().filter(|&byte| byte != 0).collect());
    let mut stripped = Zeroizing::new(Vec::with_capacity(text.len() + 2));
    let mut is_interface = false;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = trimmed(line, |byte| matches!(byte, b' ' | b'\t'));
        let before = |text: &'_ [u8], mark: u8| {
            text.iter().position(|&byte| byte == mark).unwrap_or(text.len())
        };
        let meant = &line[..before(line, b'#')];
        let key = trimmed(&meant[..before(meant, b'=')], is_space);
        if key.starts_with(b"[") {
            is_interface = key.eq_ignore_ascii_case(b"[Interface]");
        }
        if is_interface && KEYS.iter().any(|known| key.eq_ignore_ascii_case(known)) {
            continue;
        }
        stripped.extend_from_slice(line);
        stripped.push(b'\n');
    }
    stripped.push(b'\n');
    stripped
}

/// `[[:space:]]` in the C locale.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | 0x0b | 0x0c | b'\r')
}

fn trimmed(mut text: &[u8], is_blank: impl Fn(u8) -> bool) -> &[u8] {
    while let [first, rest @ ..] = text
        && is_blank(*first)
    {
        text = rest;
    }
    while let [rest @ .., last] = text
        && is_blank(*last)
    {
        text = rest;
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    const FILES: [&str; 6] = [
        "[Interface]\nPrivateKey = a\nAddress = 10.0.0.1/24\n#! Xdp = eth0\n# Address = x\n\n\
         [Peer]\n# friend\nPublicKey = b\nAddress = stays\nMTU = 1\n",
        "\u{feff}[Interface]\nAddress = x\n[interface]\naddress=y\n  ListenPort =  1  # z \n\tDNS\n",
        "[Interface]\r\nAddress = x\r\nFwMark = 1\r\n[Peer]\r\nPostUp = y\r\n",
        "Address = x\n[ Interface]\nMTU = 1\n[Interface]# c\nMTU = 1\nPreUp = a = b # c\nMTUX = 1\n",
        "[Interface]\nPostUp = iptables -A FORWARD\\\nSaveConfig = true\nTable = off\nPreDown = x",
        "",
    ];

    #[test]
    fn it_prints_what_wg_quick_prints() {
        let theirs = Path::new("/usr/bin/wg-quick");
        if !theirs.exists() || !rustix::process::geteuid().is_root() {
            let test = "cli::strip::tests::it_prints_what_wg_quick_prints";
            crate::sys::netns::report_skipped(test, "needs wg-quick(8), and root for it");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wg0.conf");
        for file in FILES {
            fs::write(&path, file).unwrap();
            let output = Command::new(theirs).arg("strip").arg(&path).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            let (ours, theirs) = (stripped(file.as_bytes()), output.stdout);
            assert_eq!(String::from_utf8_lossy(&ours), String::from_utf8_lossy(&theirs), "{file}");
        }
    }

    #[test]
    fn what_belongs_to_wg_quick_is_left_out() {
        let expected = "[Interface]\nPrivateKey = a\n#! Xdp = eth0\n# Address = x\n\n[Peer]\n\
                        # friend\nPublicKey = b\nAddress = stays\nMTU = 1\n\n";
        assert_eq!(stripped(FILES[0].as_bytes()).as_slice(), expected.as_bytes());
    }
}
