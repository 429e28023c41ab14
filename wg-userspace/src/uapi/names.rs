//! Which endpoints were given as names: the request `tidegate=names`, which is our own.
//!
//! The protocol of wg(8) has addresses only. After a `set` whose endpoints were names, this list says
//! which, so that they can be looked up again. It replaces the one before.

use std::fmt::Write as _;

use super::set::{self, RequestParser, SetProblem, UapiError};
use crate::key::PublicKey;

/// Longest name of a host, in bytes (RFC 1035, §2.3.4, without the dots' ends).
pub const HOST_LEN_MAX: usize = 253;

/// The first line of the request.
pub(super) const WORD: &str = "tidegate=names";

/// A peer whose endpoint was given as a name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndpointName {
    /// The peer.
    pub public_key: PublicKey,
    /// The name: see [`is_host`].
    pub host: String,
    /// The port, not 0.
    pub port: u16,
}

/// Whether text can be the name of a host, as far as it is not left to who looks it up.
pub fn is_host(text: &str) -> bool {
    let is_odd = |char: char| char.is_control() || char.is_whitespace();
    (1..=HOST_LEN_MAX).contains(&text.len()) && !text.contains(is_odd)
}

/// Reads a list of names line by line; there may be as many as the caller has memory for.
#[derive(Debug, Default)]
pub struct NamesParser {
    line_count: usize,
    memory_len: usize,
    /// The last one may lack its host (empty) or its port (0) yet.
    names: Vec<EndpointName>,
}

impl RequestParser for NamesParser {
    fn line(&mut self, line: &str) -> Result<(), UapiError> {
        self.line_count += 1;
        self.pair(line).map_err(|problem| UapiError { line: self.line_count, problem })
    }

    fn memory_len(&self) -> usize {
        self.memory_len
    }

    fn error(&self, problem: SetProblem) -> UapiError {
        UapiError { line: self.line_count + 1, problem }
    }
}

impl NamesParser {
    /// The list that the lines make.
    ///
    /// # Errors
    /// If the last peer lacks something.
    pub fn finish(self) -> Result<Vec<EndpointName>, UapiError> {
        self.whole().map_err(|problem| self.error(problem))?;
        Ok(self.names)
    }

    fn pair(&mut self, line: &str) -> Result<(), SetProblem> {
        let (key, value) = line.split_once('=').ok_or(SetProblem::NoPair)?;
        if key == "public_key" {
            self.whole()?;
            let error = |error| SetProblem::Key { key: "public_key", error };
            let public_key = PublicKey::from_hex(value).map_err(error)?;
            self.names.push(EndpointName { public_key, host: String::new(), port: 0 });
            self.memory_len += size_of::<EndpointName>();
            return Ok(());
        }
        let unknown = |in_peer| SetProblem::UnknownKey { key: key.to_owned(), in_peer };
        let Some(name) = self.names.last_mut() else { return Err(unknown(false)) };
        match key {
            "host" if name.host.is_empty() && is_host(value) => {
                value.clone_into(&mut name.host);
                self.memory_len += value.len();
            }
            "host" => return Err(set::bad_value("host", value)),
            "port" => match set::number("port", value)? {
                0 => return Err(set::bad_value("port", value)),
                port => name.port = port,
            },
            _ => return Err(unknown(true)),
        }
        Ok(())
    }

    /// An error if the last peer lacks something.
    fn whole(&self) -> Result<(), SetProblem> {
        let missing = match self.names.last() {
            Some(name) if name.host.is_empty() => "host",
            Some(name) if name.port == 0 => "port",
            _ => return Ok(()),
        };
        Err(set::bad_value(missing, ""))
    }
}

/// Reads the lines after `tidegate=names`, up to the first empty one or the end.
///
/// # Errors
/// [`UapiError`] for the first line that makes no sense.
pub fn parse_names(text: &str) -> Result<Vec<EndpointName>, UapiError> {
    let mut parser = NamesParser::default();
    for line in text.split('\n').take_while(|line| !line.is_empty()) {
        parser.line(line)?;
    }
    parser.finish()
}

/// The request as a client sends it, from `tidegate=names` to before the empty line at its end.
pub fn format_names<'a>(names: impl IntoIterator<Item = &'a EndpointName>) -> String {
    let mut text = format!("{WORD}\n");
    for EndpointName { public_key, host, port } in names {
        let key = public_key.to_hex();
        writeln!(text, "public_key={key}\nhost={host}\nport={port}")
            .expect("a string takes everything");
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::uapi::Errno;

    fn name(number: u8, host: &str, port: u16) -> EndpointName {
        let public_key = PublicKey::from_bytes([number; 32]);
        EndpointName { public_key, host: host.to_owned(), port }
    }

    #[test]
    fn what_is_written_is_read() {
        let names = [name(1, "server.test", 51820), name(2, "fe80::1%eth0", 1), name(3, "é=x", 2)];
        for count in 0..=names.len() {
            let text = format_names(&names[..count]);
            let lines = text.strip_prefix("tidegate=names\n").unwrap();
            assert_eq!(parse_names(lines).unwrap(), names[..count]);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_line() {
        let key = format!("public_key={}\n", PublicKey::from_bytes([1; 32]).to_hex());
        let long = format!("{key}host={}\n", "a".repeat(HOST_LEN_MAX + 1));
        for (text, line, errno) in [
            ("host=a\n".to_owned(), 1, Errno::EINVAL),
            ("nonsense\n".to_owned(), 1, Errno::EPROTO),
            (key.clone(), 2, Errno::EINVAL),
            (format!("{key}{key}"), 2, Errno::EINVAL),
            (format!("{key}host=a\n"), 3, Errno::EINVAL),
            (format!("{key}port=1\n"), 3, Errno::EINVAL),
            (format!("{key}host=a\nport=0\n"), 3, Errno::EINVAL),
            (format!("{key}host=a\nport=65536\n"), 3, Errno::EINVAL),
            (format!("{key}host=a b\n"), 2, Errno::EINVAL),
            (format!("{key}host=a\nhost=b\n"), 3, Errno::EINVAL),
            (format!("{key}endpoint=1.2.3.4:5\n"), 2, Errno::EINVAL),
            (long, 2, Errno::EINVAL),
        ] {
            let error = parse_names(&text).expect_err(&text);
            assert_eq!((error.line, error.errno()), (line, errno), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(?s).{0,100}") {
            let _ = parse_names(&text);
        }
    }
}
