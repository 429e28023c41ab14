//! What a process may still do, by what the kernel says.

use rustix::io;
use rustix::process::{DumpableBehavior, dumpable_behavior, getegid, geteuid};
use rustix::thread::{
    CapabilitySet, SecureComputingMode, capabilities, capability_is_in_ambient_set,
    capability_is_in_bounding_set, no_new_privs, secure_computing_mode,
};
use serde::{Deserialize, Serialize};

/// How this process is confined.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Report {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Capabilities of this thread.
    pub capabilities: Capabilities,
    /// Whether executing a program cannot give more rights.
    pub no_new_privs: bool,
    /// Whether there are core dumps, and other processes of the user may look into this one.
    pub dumpable: bool,
    /// Whether system calls are filtered.
    pub seccomp: Seccomp,
    /// Whether files are out of reach, by what the kernel answered when it was asked.
    pub landlock: Landlock,
}

/// Sets of capabilities, as bits.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Capabilities {
    /// Those in force.
    pub effective: u64,
    /// Those that may be put in force.
    pub permitted: u64,
    /// Those that executed programs may inherit.
    pub inheritable: u64,
    /// Those that executed programs do inherit.
    pub ambient: u64,
    /// Those that executed programs may get.
    pub bounding: u64,
}

/// Whether system calls are filtered.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Seccomp {
    /// They are not.
    Off,
    /// By a list.
    Filter,
}

/// How much of what was asked for Landlock does.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Landlock {
    /// The kernel has none.
    None,
    /// As much as this kernel knows.
    Partial,
    /// All of it.
    Full,
}

impl Report {
    /// Asks the kernel. It does not tell of Landlock, so that is what it said before.
    pub(super) fn read(landlock: Landlock) -> io::Result<Self> {
        let sets = capabilities(None)?;
        let seccomp = match secure_computing_mode()? {
            SecureComputingMode::Disabled => Seccomp::Off,
            _ => Seccomp::Filter,
        };
        Ok(Self {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            capabilities: Capabilities {
                effective: sets.effective.bits(),
                permitted: sets.permitted.bits(),
                inheritable: sets.inheritable.bits(),
                ambient: those(capability_is_in_ambient_set),
                bounding: those(capability_is_in_bounding_set),
            },
            no_new_privs: no_new_privs()?,
            dumpable: dumpable_behavior()? == DumpableBehavior::Dumpable,
            seccomp,
            landlock,
        })
    }

    /// Says what is left though it was given up before there were threads.
    pub(super) fn check_early(&self) -> Result<(), &'static str> {
        let Capabilities { effective, permitted, inheritable, ambient, .. } = self.capabilities;
        match self {
            _ if effective | permitted | inheritable | ambient != 0 => Err("a capability"),
            Self { no_new_privs: false, .. } => Err("the right to gain privileges"),
            Self { dumpable: true, .. } => Err("the right to dump core"),
            _ => Ok(()),
        }
    }

    /// As [`check_early`](Self::check_early), with the filter of system calls.
    pub(super) fn check_sealed(&self) -> Result<(), &'static str> {
        self.check_early()?;
        if self.seccomp == Seccomp::Filter { Ok(()) } else { Err("every system call") }
    }
}

/// The capabilities that are in a set; those that this kernel does not know are in none.
fn those(is_in: impl Fn(CapabilitySet) -> io::Result<bool>) -> u64 {
    let all = (0..u64::BITS).map(|number| 1 << number);
    all.filter(|&bit| is_in(CapabilitySet::from_bits_retain(bit)).unwrap_or(false)).sum()
}
