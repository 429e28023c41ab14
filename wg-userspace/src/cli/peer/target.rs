//! Which file is meant, and whether an interface runs by it.

use std::path::Path;

use crate::cli::{
    Code, Failure,
    ledger::Ledger,
    name::{ConfigFile, InterfaceName},
    socket::Socket,
};

/// A file with what is known of its interface.
#[derive(Debug)]
pub struct Target {
    /// The file.
    pub file: ConfigFile,
    /// Whether the interface is up, by this file.
    pub is_up: bool,
}

impl Target {
    /// Finds out what a word of the command line means: a bare name stands for the file with which that
    /// interface was brought up, or else for its file of `/etc/wireguard`.
    ///
    /// # Errors
    /// If it means no file.
    pub fn of(word: &str) -> Result<Target, Failure> {
        let mut file = ConfigFile::which(word, Path::exists)
            .map_err(|error| Failure::new(Code::Usage, error))?;
        let interface = &file.interface;
        let usual = ConfigFile::of(interface).path;
        let record = Ledger::peek(interface)
            .filter(|record| !record.is_left_over() && record.header.is_of_this_netns());
        let of_record = record.map(|record| record.header.config);
        // Not if it was named as a file.
        if let Some(path) = &of_record
            && word.parse::<InterfaceName>().is_ok()
            && file.path == usual
        {
            file.path.clone_from(path);
        }
        let is_served = match Socket::find(&file.interface) {
            Ok(socket) => socket.is_some(),
            // Who may not use the socket may edit files of his own nevertheless.
            Err(_) if !rustix::process::geteuid().is_root() => false,
            Err(failure) => return Err(failure),
        };
        let by = of_record.unwrap_or(usual);
        let is_up = is_served && is_same_file(&by, &file.path);
        if is_served && !is_up {
            let (interface, by, path) = (&file.interface, by.display(), file.path.display());
            eprintln!(
                "tidegate: warning: {interface} is up by {by}, not by {path}, and is left as it is; name \
                 {by} to change it as well"
            );
        }
        Ok(Target { file, is_up })
    }

    /// What people call the file.
    pub fn name(&self) -> String {
        self.file.path.display().to_string()
    }
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}
