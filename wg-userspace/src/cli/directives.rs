//! The `#!` lines of an interface's file, for a daemon that wg-quick(8) starts with a name alone.
//!
//! Everything else in the file is the business of wg-quick(8) and wg(8). Nothing here keeps a daemon
//! from starting: what cannot be read or followed is a warning.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use zeroize::Zeroizing;

use super::name::{ConfigFile, InterfaceName};
use crate::{
    config::{self, Directives, Problem},
    daemon,
    device::PacketRules,
    nat,
};

/// Who may write the file, besides its group and others, who must not.
pub const ROOT: u32 = 0;
/// As much of a file is looked at. The device's lines come before those of its peers.
const LEN_MAX: u64 = 4 << 20;

/// What the `#!` lines of `/etc/wireguard/<interface>.conf` say. Prints warnings.
pub fn of(interface: &InterfaceName) -> Directives {
    let path = ConfigFile::of(interface).path;
    let (directives, warnings) = read(&path, ROOT);
    for warning in warnings {
        eprintln!("tidegate: warning: {warning}");
    }
    directives
}

/// What `/etc/wireguard/<interface>.conf` says is to be done to packets. [`of`] prints what is wrong with it.
pub fn rules_of(interface: &InterfaceName) -> PacketRules {
    read(&ConfigFile::of(interface).path, ROOT).0.rules()
}

/// What `/etc/wireguard/<interface>.conf` says is to be translated, forwarded and allowed.
pub fn nat_of(interface: &InterfaceName) -> nat::Lines {
    nat::Lines::of_directives(&read(&ConfigFile::of(interface).path, ROOT).0)
}

impl Directives {
    /// What is done to packets.
    fn rules(&self) -> PacketRules {
        PacketRules::of(self.mss_clamp.as_deref(), self.copy_dscp.as_deref())
    }

    /// Names of NICs for XDP, if there is a line about them.
    pub fn nics(&self) -> Option<Vec<String>> {
        let xdp = self.xdp.as_ref()?;
        Some(xdp.interfaces.iter().map(|nic| nic.value.clone()).collect())
    }

    /// Whether threads are to ask those NICs for packets themselves.
    pub fn busy_poll(&self) -> bool {
        self.xdp.as_ref().is_some_and(|xdp| xdp.busy_poll)
    }

    /// How datagrams are to come in.
    pub fn mode(&self) -> Option<daemon::Mode> {
        Some(match self.xdp.as_ref()?.mode.as_ref()?.value {
            config::Mode::Auto => daemon::Mode::Auto,
            config::Mode::ZeroCopy => daemon::Mode::ZeroCopy,
            config::Mode::Native => daemon::Mode::Native,
            config::Mode::Udp => daemon::Mode::Udp,
        })
    }
}

/// The text of a file that is looked at for names only, if nobody but its owner may write it.
pub fn text_for_names(path: &Path, owner: Option<u32>) -> Option<Zeroizing<String>> {
    trusted(open(path).ok()?, owner).ok()?
}

fn read(path: &Path, owner: u32) -> (Directives, Vec<String>) {
    let name = path.display();
    let text = match open(path).and_then(|file| trusted(file, Some(owner))) {
        Ok(Some(text)) => text,
        Ok(None) => {
            let why = "its `#!` lines are ignored: it must be a file of root's that nobody else \
                may write (chown root, chmod go-w)";
            return (Directives::default(), vec![format!("{name}: {why}")]);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Default::default(),
        Err(error) => {
            let warning = format!("{name}: its `#!` lines are ignored: {error}");
            return (Directives::default(), vec![warning]);
        }
    };
    let (directives, problems) = config::directives(&name.to_string(), &text);
    let warnings = problems.iter().map(|problem| {
        let (line, column) = position(&text, problem);
        format!("{name}:{line}:{column}: {problem}; this line is ignored")
    });
    (directives, warnings.collect())
}

fn open(path: &Path) -> io::Result<File> {
    // Something else than a file must not keep us waiting.
    let flags = rustix::fs::OFlags::NONBLOCK.bits();
    OpenOptions::new().read(true).custom_flags(flags.cast_signed()).open(path)
}

/// The text of a file if nobody but its owner may write it: it says on which NICs XDP gets a program. Any
/// owner will do if none is named.
fn trusted(file: File, owner: Option<u32>) -> io::Result<Option<Zeroizing<String>>> {
    const WRITE_OF_OTHERS: u32 = 0o022;
    let metadata = file.metadata()?;
    let is_owned = owner.is_none_or(|owner| metadata.uid() == owner);
    if !metadata.is_file() || !is_owned || metadata.mode() & WRITE_OF_OTHERS != 0 {
        return Ok(None);
    }
    let len = metadata.len().min(LEN_MAX);
    let capacity = usize::try_from(len).expect("some megabytes fit") + 1;
    // It holds keys: made at once as large as it gets, so that it does not move.
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    file.take(len).read_to_end(&mut bytes)?;
    if metadata.len() > LEN_MAX {
        let whole_lines = bytes.iter().rposition(|&byte| byte == b'\n').unwrap_or(0);
        bytes.truncate(whole_lines);
    }
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count() + 1;
        io::Error::new(io::ErrorKind::InvalidData, format!("line {line} is not UTF-8"))
    })?;
    Ok(Some(Zeroizing::new(text.to_owned())))
}

/// Where a problem shows, both counted from 1.
fn position(text: &str, problem: &Problem) -> (usize, usize) {
    let offset = problem.spans().map(|span| span.offset()).next().unwrap_or(0);
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, text: impl AsRef<[u8]>, mode: u32) -> PathBuf {
            let path = self.0.path().join("wg0.conf");
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    fn read_own(path: &Path) -> (Directives, Vec<String>) {
        read(path, rustix::process::geteuid().as_raw())
    }

    #[test]
    fn only_lines_to_us_matter() {
        let folder = Folder::new();
        let path = folder.write(
            "#!/bin/false\nnonsense\n[Interface]\nPrivateKey = short\nAdress = x\n\
             #! Xdp = eth0,eth1 mode=native\n#! Workers = 2\n#! MssClamp = off\n#! CopyDscp = on\n[Pear]\n#! Xdp = no\n[Peer]\n\
             #! Name = laptop\n",
            0o600,
        );
        let (directives, warnings) = read_own(&path);
        assert_eq!(warnings, [] as [&str; 0]);
        assert_eq!(directives.nics().unwrap(), ["eth0", "eth1"]);
        assert_eq!(directives.mode(), Some(daemon::Mode::Native));
        assert_eq!(directives.rules(), PacketRules { mss_clamp: false, copy_dscp: true });
        assert_eq!(Directives::default().rules(), PacketRules::default());
        assert_eq!(directives.workers.unwrap().value, 2);
    }

    #[test]
    fn what_is_wrong_is_a_warning_with_its_position_and_the_rest_counts() {
        let folder = Folder::new();
        let path = folder.write(
            "[Interface]\n#! Workers = lots\n#! Xdp = eth0\n#! Wrokers = 1\n\
             #! Metrics = [::1]:1\n[Peer]\n#! Workers = 3\n",
            0o644,
        );
        let (directives, warnings) = read_own(&path);
        assert_eq!(directives.nics().unwrap(), ["eth0"]);
        assert!(directives.workers.is_none() && directives.mode().is_none());
        let at = |warning: &String| {
            warning.strip_prefix(&format!("{}:", path.display())).unwrap()[..4].to_owned()
        };
        assert_eq!(warnings.iter().map(at).collect::<Vec<_>>(), ["2:14", "4:4:", "5:4:", "7:4:"]);
    }

    #[test]
    fn a_file_that_others_may_write_is_ignored_with_a_warning() {
        let folder = Folder::new();
        for mode in [0o606, 0o622, 0o620, 0o666] {
            let path = folder.write("[Interface]\n#! Workers = 2\n", mode);
            let (directives, warnings) = read_own(&path);
            assert!(directives.workers.is_none(), "{mode:o}");
            assert!(warnings[0].contains("chmod go-w") && warnings.len() == 1, "{warnings:?}");
        }
        let path = folder.write("[Interface]\n#! Workers = 2\n", 0o644);
        assert!(read(&path, rustix::process::geteuid().as_raw() + 1).0.workers.is_none());
        assert_eq!(read(folder.0.path(), rustix::process::geteuid().as_raw()).1.len(), 1);
    }

    #[test]
    fn what_is_not_there_is_no_warning_and_what_is_no_text_is_one() {
        let folder = Folder::new();
        assert_eq!(read_own(&folder.0.path().join("no.conf")).1.len(), 0);
        let path = folder.write(b"[Interface]\n#! Workers = \xff\n", 0o600);
        let (directives, warnings) = read_own(&path);
        assert!(directives.workers.is_none());
        assert!(warnings[0].contains("line 2 is not UTF-8"), "{warnings:?}");
    }
}
