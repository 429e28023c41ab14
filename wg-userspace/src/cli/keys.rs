//! `genkey`, `genpsk`, `pubkey`: the same bytes as wg(8).

use std::{
    io::{Read, Write},
    os::fd::AsFd,
};

use anyhow::Context;
use zeroize::Zeroizing;

use super::{Code, Failure, print};
use crate::{
    key::{PresharedKey, PrivateKey},
    sys::random::Rng,
};

/// Most bytes of a key on standard input: 44 and some white space.
const INPUT_LEN_MAX: u64 = 1024;

pub fn genkey() -> Result<Code, Failure> {
    print_key(&PrivateKey::generate(&mut Rng).to_base64())
}

pub fn genpsk() -> Result<Code, Failure> {
    print_key(&PresharedKey::generate(&mut Rng).to_base64())
}

pub fn pubkey() -> Result<Code, Failure> {
    let mut text = Zeroizing::new(String::new());
    std::io::stdin()
        .take(INPUT_LEN_MAX)
        .read_to_string(&mut text)
        .context("reading a private key from standard input")?;
    let key = PrivateKey::from_base64(text.trim_end()).map_err(|error| {
        Failure::new(Code::Runtime, error)
            .within("standard input")
            .and("`tidegate genkey | tidegate pubkey` shows how it is used")
    })?;
    print(&format!("{}\n", key.public_key()))?;
    Ok(Code::Ok)
}

fn print_key(key: &str) -> Result<Code, Failure> {
    print_secret(&Zeroizing::new([key, "\n"].concat()))?;
    Ok(Code::Ok)
}

/// Writes a text with a key past the buffer of standard output, which nobody would wipe.
///
/// # Errors
/// If not all of it can be written.
pub fn print_secret(text: &str) -> Result<(), Failure> {
    let stdout = std::io::stdout();
    if is_world_readable_file(stdout.as_fd()) {
        eprintln!(
            "tidegate: warning: the key goes into a file that everybody may read; `umask 077` before the \
             next one"
        );
    }
    let mut out = std::fs::File::from(
        stdout.as_fd().try_clone_to_owned().context("writing to standard output")?,
    );
    Ok(out.write_all(text.as_bytes()).context("writing to standard output")?)
}

fn is_world_readable_file(fd: impl AsFd) -> bool {
    use rustix::fs::{FileType, Mode};
    rustix::fs::fstat(fd).is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode).is_file()
            && Mode::from_raw_mode(stat.st_mode).intersects(Mode::RWXO)
    })
}
