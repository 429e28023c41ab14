//! The socket of a running daemon, from the side of wg(8).

use std::{
    io::{self, Read, Write},
    os::unix::{fs::FileTypeExt, net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use rustix::{io::Errno, process::Pid};
use zeroize::Zeroizing;

use super::{Code, Failure, name::InterfaceName};
use crate::uapi::SOCKET_DIR;

/// A daemon that lives answers at once; this is for one that does not.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The path of an interface's socket.
pub fn path(interface: &InterfaceName) -> PathBuf {
    Path::new(SOCKET_DIR).join(format!("{interface}.sock"))
}

/// Names of the interfaces that have a socket, sorted; nobody may listen to it any more.
pub fn interfaces() -> Result<Vec<InterfaceName>, Failure> {
    let entries = match std::fs::read_dir(SOCKET_DIR) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(anyhow::Error::new(error).context(SOCKET_DIR).into()),
    };
    let mut names: Vec<InterfaceName> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()))
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".sock")?.parse().ok())
        .collect();
    names.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    Ok(names)
}

/// A connection to the daemon of an interface.
pub struct Socket {
    interface: InterfaceName,
}

impl Socket {
    /// Connects, or gives nothing if no daemon listens.
    pub fn find(interface: &InterfaceName) -> Result<Option<Self>, Failure> {
        let socket = Self { interface: interface.clone() };
        Ok(socket.connect()?.map(|_| socket))
    }

    fn connect(&self) -> Result<Option<UnixStream>, Failure> {
        let path = path(&self.interface);
        let stream = match UnixStream::connect(&path) {
            Ok(stream) => stream,
            // A socket that refuses was left behind by a daemon that was killed.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(Failure::new(
                    Code::Privilege,
                    format_args!(
                        "{} may be used by root only, since it gives out keys; run it as root",
                        path.display()
                    ),
                ));
            }
            Err(error) => {
                let doing = format!("connecting to {}", path.display());
                return Err(anyhow::Error::new(error).context(doing).into());
            }
        };
        let set = stream.set_read_timeout(Some(ANSWER_TIMEOUT));
        set.and(stream.set_write_timeout(Some(ANSWER_TIMEOUT)))
            .context("setting the time to wait for an answer")?;
        Ok(Some(stream))
    }

    /// The process that listens, if it is in a pid namespace that we see.
    pub fn daemon(&self) -> Result<Option<Pid>, Failure> {
        let Some(stream) = self.connect()? else { return Ok(None) };
        let credentials = rustix::net::sockopt::socket_peercred(&stream)
            .context("asking which process listens")?;
        // The kernel says 0 for a process that our namespace does not have.
        Ok((credentials.pid.as_raw_nonzero().get() > 0).then_some(credentials.pid))
    }

    /// Sends a request (its last line ends with `\n`) and reads the answer without its `errno`.
    ///
    /// Who hangs up without a word refuses the request. The text may hold keys; no error shows
    /// any of it.
    pub fn request(&self, request: &str) -> Result<Answer, Failure> {
        let doing = || format!("asking the daemon of {}", self.interface);
        let Some(mut stream) = self.connect()? else {
            return Err(Failure::new(
                Code::Existence,
                format_args!("its daemon has ended; `tidegate up {}` starts one", self.interface),
            ));
        };
        stream
            .write_all(request.as_bytes())
            .and_then(|()| stream.write_all(b"\n"))
            .with_context(doing)?;
        let mut text = Zeroizing::new(Vec::with_capacity(64 * 1024));
        let mut part = Zeroizing::new([0; 16 * 1024]);
        while !text.ends_with(b"\n\n") {
            match stream.read(part.as_mut_slice()) {
                Ok(0) => break,
                Ok(len) => text.extend_from_slice(&part[..len]),
                // `up` has handlers for signals.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(anyhow::Error::new(error).context(doing()).into()),
            }
        }
        if text.is_empty() {
            // wireguard-go hangs up when it does not know a request.
            return Ok(Answer { text: Zeroizing::default(), errno: Errno::PROTO.raw_os_error() });
        }
        Answer::parse(&text).ok_or_else(|| {
            Failure::new(Code::Runtime, format_args!("{}: its answer is cut off", doing()))
        })
    }
}

/// What a daemon answered.
pub struct Answer {
    text: Zeroizing<String>,
    /// 0 if it did what was asked for.
    pub errno: i32,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let errno_line = text.lines().rev().find(|line| !line.is_empty())?;
        let errno: i32 = errno_line.strip_prefix("errno=")?.parse().ok()?;
        let body = &text[..text.trim_end_matches('\n').len() - errno_line.len()];
        Some(Self { text: Zeroizing::new(body.to_owned()), errno: errno.abs() })
    }

    /// The lines before `errno`.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.text.lines()
    }

    /// The error, if there was one.
    pub fn error(&self) -> Option<io::Error> {
        (self.errno != 0).then(|| io::Error::from_raw_os_error(self.errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_with_its_errno() {
        let answer = Answer::parse(b"listen_port=1\nfwmark=2\nerrno=0\n\n").unwrap();
        assert_eq!(answer.lines().collect::<Vec<_>>(), ["listen_port=1", "fwmark=2"]);
        assert!(answer.error().is_none());
        let refused = Answer::parse(b"errno=-22\n\n").unwrap();
        assert_eq!(refused.lines().count(), 0);
        assert_eq!(refused.error().unwrap().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_cut_answer_is_none() {
        for cut in ["", "\n\n", "listen_port=1\n\n", "listen_port=1\nerrno=\n\n", "errno=x"] {
            assert!(Answer::parse(cut.as_bytes()).is_none(), "{cut:?}");
        }
    }
}
