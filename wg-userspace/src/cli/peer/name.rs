//! What a peer may be called in a file.

use std::{fmt, str::FromStr};

use crate::config::name_problem;

/// A name that a `#! Name` line takes as it is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerName(String);

/// Why a text is no name for a peer.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct PeerNameError(&'static str);

impl PeerName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PeerName {
    type Err = PeerNameError;

    fn from_str(text: &str) -> Result<Self, PeerNameError> {
        match name_problem(text) {
            None => Ok(Self(text.to_owned())),
            Some(problem) => Err(PeerNameError(problem)),
        }
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_a_line_can_say() {
        for good in ["laptop", "Anna's phone", "Büro 3", "携帯", "a = b", "[x]", "=", "! x"] {
            assert_eq!(good.parse::<PeerName>().unwrap().as_str(), good);
        }
        assert!("ä".repeat(63).parse::<PeerName>().is_ok());
        for bad in [
            "",
            &"x".repeat(64),
            " x",
            "x\u{a0}",
            "a\nb",
            "no #1",
            "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
        ] {
            assert!(bad.parse::<PeerName>().is_err(), "{bad:?}");
        }
    }
}
