//! The numbers by which wg(8) is told what went wrong.

use std::fmt;
use std::io;

use rustix::io::Errno as Os;

/// An error number of the host, positive.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct Errno(i32);

impl Errno {
    /// A key or a value that makes no sense.
    pub const EINVAL: Self = Self(Os::INVAL.raw_os_error());
    /// Lines that are not the protocol, or end too early.
    pub const EPROTO: Self = Self(Os::PROTO.raw_os_error());
    /// A port that is in use.
    pub const EADDRINUSE: Self = Self(Os::ADDRINUSE.raw_os_error());
    /// Something the daemon may not do.
    pub const EACCES: Self = Self(Os::ACCESS.raw_os_error());
    /// More than there is room for.
    pub const ENOSPC: Self = Self(Os::NOSPC.raw_os_error());
    /// A request that is larger than any may be.
    pub const E2BIG: Self = Self(Os::TOOBIG.raw_os_error());
    /// A request for which there is no room now, beside others.
    pub const ENOMEM: Self = Self(Os::NOMEM.raw_os_error());
    /// Somebody else has undone it meanwhile.
    pub const ECANCELED: Self = Self(Os::CANCELED.raw_os_error());
    /// A failure that has no number of its own.
    pub const EIO: Self = Self(Os::IO.raw_os_error());

    /// The number, above 0.
    pub const fn raw(self) -> i32 {
        self.0
    }
}

/// The error's own number, [`Errno::EIO`] if it has none.
impl From<&io::Error> for Errno {
    fn from(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) if number > 0 => Self(number),
            _ => Self::from(error.kind()),
        }
    }
}

impl From<io::ErrorKind> for Errno {
    fn from(kind: io::ErrorKind) -> Self {
        match kind {
            io::ErrorKind::AddrInUse => Self::EADDRINUSE,
            io::ErrorKind::PermissionDenied => Self::EACCES,
            io::ErrorKind::InvalidInput => Self::EINVAL,
            _ => Self::EIO,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl std::error::Error for Errno {}
