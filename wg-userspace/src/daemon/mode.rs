//! Which back end moves datagrams.

/// Which back end to use.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    PartialEq,
    clap::ValueEnum,
    serde::Deserialize,
    serde::Serialize,
)]
pub enum Mode {
    /// AF_XDP on the NICs that were named, sockets where it does not work.
    #[default]
    Auto,
    /// AF_XDP for receiving on the NICs that were named, sockets for sending.
    Native,
    /// Sockets only.
    Udp,
}

/// The back end in use, and why.
#[derive(Clone, Debug)]
pub struct ModeInUse {
    /// Whether XSKs receive.
    pub native: bool,
    /// Why it is so.
    pub reason: String,
}

impl ModeInUse {
    /// As options name it.
    pub fn name(&self) -> &'static str {
        if self.native { "native" } else { "udp" }
    }
}
