//! The system: clock, randomness, affinity, memory mappings, waiting, and the calls that the edges
//! are built on. The only room that calls libc; where `rustix` has the call, it is used.
//!
//! It knows nothing of the protocol. Each file hides its `unsafe` behind functions that are safe to
//! call with any arguments; `xsk`, `udp` and `tun` make their devices of them.

pub mod affinity;
#[cfg(test)]
pub(crate) mod bpf_for_tests;
pub mod bpf_pages;
pub mod clock;
pub mod clsact;
pub mod ethtool;
pub mod file_watch;
pub mod link;
pub mod memory;
pub mod mmsg;
pub mod netns;
pub mod process;
pub mod random;
pub mod socket;
pub mod tuntap;
pub mod uevent;
pub mod wait;
pub mod xdp;
pub mod xfrm;

pub use file_watch::FileWatch;
pub use memory::SharedWords;
pub use wait::{EventFd, poll};

/// Error numbers that the edges tell apart and [`std::io::ErrorKind`] does not.
pub mod errno {
    pub use libc::{
        E2BIG, EACCES, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EBADFD, EBUSY, EEXIST, EFAULT,
        EINVAL, EIO, EMSGSIZE, ENETDOWN, ENETUNREACH, ENOBUFS, ENODEV, ENOPROTOOPT, EOPNOTSUPP,
        EPERM,
    };
}
