//! What can go wrong with the kernel side.

use std::error::Error;
use std::fmt;
use std::io;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use rustix::io::Errno;

/// Why a program or map is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The process lacks the capabilities.
    #[error(
        "loading eBPF programs: CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are needed; run it as root"
    )]
    NotPermitted,
    /// The kernel's verifier does not accept the program: a bug here, or a kernel that is too old.
    #[error("the kernel's verifier refuses {program}: {error}; it says:\n{log}")]
    Verifier {
        /// Name of the program.
        program: &'static str,
        /// What the system call returned.
        error: io::Error,
        /// The verifier's log.
        log: String,
    },
    /// The object has no program or map of this name: it was built from other sources.
    #[error("the eBPF object has no {0}; `cargo xtask build-ebpf` builds it anew")]
    Missing(&'static str),
    /// A map has another size than this side expects: the object was built from other sources.
    #[error("eBPF map {0} has another size here; `cargo xtask build-ebpf` builds the object anew")]
    Stale(&'static str),
    /// The map takes no further entry.
    #[error("eBPF map {0} is full")]
    Full(&'static str),
    /// Another failure of a map.
    #[error("eBPF map {name}: {cause}")]
    Map {
        /// Name of the map.
        name: &'static str,
        /// What was wrong.
        cause: String,
    },
    /// Another failure of a program.
    #[error("eBPF program {name}: {cause}")]
    Program {
        /// Name of the program.
        name: &'static str,
        /// What was wrong.
        cause: String,
    },
    /// The object does not load.
    #[error("the eBPF object does not load: {0}")]
    Object(String),
}

impl BpfError {
    pub(super) fn object(error: EbpfError) -> Self {
        match system_error(&error) {
            Some(libc_error) if not_permitted(libc_error) => Self::NotPermitted,
            _ => Self::Object(chain(&error)),
        }
    }

    pub(super) fn program(name: &'static str, error: ProgramError) -> Self {
        match error {
            ProgramError::LoadError { io_error, .. } if not_permitted(&io_error) => {
                Self::NotPermitted
            }
            ProgramError::LoadError { io_error, verifier_log } => {
                Self::Verifier { program: name, error: io_error, log: verifier_log.to_string() }
            }
            error => Self::Program { name, cause: chain(&error) },
        }
    }

    pub(super) fn map(name: &'static str, error: MapError) -> Self {
        match system_error(&error) {
            Some(error) if is_full(error) => Self::Full(name),
            _ => Self::Map { name, cause: chain(&error) },
        }
    }
}

/// Why the steer program is not attached to an interface.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is no such interface in this network namespace.
    #[error("there is no network interface {0}; `ip link` lists them")]
    UnknownInterface(String),
    /// Another XDP program is attached there. It stays.
    #[error(
        "{interface} already has an XDP program, {foreign}, which is not replaced; `bpftool net` shows it, `ip \
         link set dev {interface} xdp off` removes it"
    )]
    ForeignProgram {
        /// Name of the interface.
        interface: String,
        /// What is attached there.
        foreign: ForeignProgram,
    },
    /// The interface's driver has no native XDP.
    #[error("the driver of {0} has no native XDP; `--mode udp` does without")]
    NoNativeXdp(String),
    /// The process lacks the capabilities.
    #[error("attaching an XDP program: CAP_NET_ADMIN and CAP_BPF are needed; run it as root")]
    NotPermitted,
    /// The kernel refuses for another reason; often the MTU is too large for the driver.
    #[error("the kernel does not attach the XDP program to {interface}: {cause}")]
    Refused {
        /// Name of the interface.
        interface: String,
        /// What it said.
        cause: String,
    },
    /// The program is not there.
    #[error(transparent)]
    Bpf(BpfError),
}

impl AttachError {
    pub(super) fn new(interface: &str, error: ProgramError) -> Self {
        let interface = interface.to_owned();
        match system_error(&error) {
            Some(cause) if not_permitted(cause) => Self::NotPermitted,
            Some(cause) if cause.kind() == io::ErrorKind::Unsupported => {
                Self::NoNativeXdp(interface)
            }
            // EBUSY: a program in the same mode. EEXIST: one in another mode.
            Some(cause)
                if matches!(
                    cause.kind(),
                    io::ErrorKind::ResourceBusy | io::ErrorKind::AlreadyExists
                ) =>
            {
                Self::ForeignProgram { interface, foreign: ForeignProgram::default() }
            }
            _ => Self::Refused { interface, cause: chain(&error) },
        }
    }

    pub(super) fn refused(interface: &str, cause: &str) -> Self {
        Self::Refused { interface: interface.to_owned(), cause: cause.to_owned() }
    }
}

/// Why a program of NAT is not attached to an interface.
#[derive(Debug, thiserror::Error)]
pub enum NatAttachError {
    /// There is no such interface in this network namespace.
    #[error("there is no network interface {0}; `ip link` lists them")]
    UnknownInterface(String),
    /// What comes by the interface has no Ethernet header, or is this host's own.
    #[error(
        "{0} is no Ethernet interface, which NAT needs; name another NIC, or translate there by a rule of nft in \
         `PostUp`"
    )]
    NoEthernetHeader(String),
    /// The process lacks the capabilities.
    #[error("attaching a TC program: CAP_NET_ADMIN and CAP_BPF are needed; run it as root")]
    NotPermitted,
    /// Filters of another kind stand where ours has to: the kernel does not mix kinds at one priority.
    #[error(
        "filters of kind {kind} have priority 1 at the ingress of {interface}, which NAT needs on this kernel; give them \
         another one (`tc filter show dev {interface} ingress`)"
    )]
    PriorityTaken {
        /// Name of the interface.
        interface: String,
        /// Their kind, as `tc` calls it.
        kind: String,
    },
    /// The kernel refuses for another reason.
    #[error("the kernel does not attach the TC program to {interface}: {cause}")]
    Refused {
        /// Name of the interface.
        interface: String,
        /// What it said.
        cause: String,
    },
    /// The program is not there.
    #[error(transparent)]
    Bpf(#[from] BpfError),
}

impl NatAttachError {
    pub(super) fn new(interface: &str, error: ProgramError) -> Self {
        match system_error(&error) {
            Some(cause) if not_permitted(cause) => Self::NotPermitted,
            _ => Self::Refused { interface: interface.to_owned(), cause: chain(&error) },
        }
    }

    pub(super) fn of_system(interface: &str, error: &io::Error) -> Self {
        if not_permitted(error) {
            return Self::NotPermitted;
        }
        Self::Refused { interface: interface.to_owned(), cause: error.to_string() }
    }

    /// Whether the kernel does not know links of TC programs.
    pub(super) fn is_unknown_link(error: &ProgramError) -> bool {
        system_error(error).is_some_and(|error| {
            matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
        })
    }
}

/// An XDP program of someone else's.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ForeignProgram {
    /// The kernel's number of it, if it tells.
    pub id: Option<u32>,
    /// Its name, if it has one.
    pub name: Option<String>,
}

impl fmt::Display for ForeignProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.name, self.id) {
            (Some(name), Some(id)) => write!(f, "{name} (id {id})"),
            (None, Some(id)) => write!(f, "id {id}"),
            _ => f.write_str("of someone else's"),
        }
    }
}

/// E2BIG, as most maps say it, and ENOSPC, as tries do.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ArgumentListTooLong | io::ErrorKind::StorageFull)
}

/// EPERM only: the verifier's own refusals are EACCES, which Rust calls by the same name.
fn not_permitted(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::PERM.raw_os_error())
}

/// What the kernel returned, if that is at the bottom of the error.
fn system_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a io::Error> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(found) = error.downcast_ref::<io::Error>() {
            return Some(found);
        }
        at = error.source();
    }
    None
}

/// The error with all its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        let cause_text = cause.to_string();
        // Transparent errors say what their cause says.
        if !text.ends_with(&cause_text) {
            text += ": ";
            text += &cause_text;
        }
        at = cause.source();
    }
    text
}
