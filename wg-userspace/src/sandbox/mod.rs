//! Gives up what this process may do, so that whoever takes it over has little of the host.
//!
//! Two steps, since threads and mappings are made between them: [`enter_early`] gives up user,
//! capabilities and the file system while there is one thread, whose children inherit that; [`seal`]
//! gives up all system calls that running workers have no use for, in every thread. Neither can be
//! taken back. Descriptors that are open stay open: what the process needs, it has by then.
//!
//! Nothing is known here of what the process is for, but for the list in [`filter`].

mod filter;
mod report;

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Gid, Pid, Signal, Uid, geteuid, getppid, set_dumpable_behavior,
    set_parent_process_death_signal,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::sys::process;

pub use report::{Capabilities, Landlock, Report, Seccomp};

/// The user and the group `nobody`, which own nothing.
pub const NOBODY: u32 = 65534;

/// The most of Landlock whose meaning for the data path was looked at. Of the network it is TCP: later
/// versions know UDP, which workers send by.
const LANDLOCK_FILES: ABI = ABI::V9;
const LANDLOCK_NET: ABI = ABI::V9;
const LANDLOCK_SCOPE: ABI = ABI::V6;

/// How a process is confined.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// User and group that root becomes.
    pub user: u32,
    /// The parent, with which this process ends. It must have been started by the parent's main thread:
    /// the kernel looks at the end of the thread.
    pub parent: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self { user: NOBODY, parent: None }
    }
}

/// Why a process could not be confined. It must not go on then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Privileges belong to threads, and others would keep theirs.
    #[error("privileges are given up by one thread for all, but there are {0}")]
    Threads(usize),
    /// The parent has ended already.
    #[error("the parent process {0} has ended")]
    Orphaned(u32),
    /// The kernel refused.
    #[error("{doing}: {source}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Landlock is there but does not do as it should.
    #[error("giving up the file system: {0}")]
    Landlock(#[from] RulesetError),
    /// The filter of system calls was not taken.
    #[error("giving up system calls: {0}")]
    Seccomp(#[from] seccompiler::Error),
    /// Something is left that was given up.
    #[error("the kernel says that {0} is left")]
    Left(&'static str),
}

fn refused<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Refused { doing, source: source.into() }
}

/// Gives up user, groups, capabilities, core dumps and the file system. For the start of a process,
/// before it has other threads.
///
/// Who is not root stays who he is. So does root in a user namespace without such a user: without
/// capabilities, and without files where the kernel has Landlock.
///
/// # Errors
/// [`Error`] if something is left that the kernel could have taken away.
pub fn enter_early(options: &Options) -> Result<Report, Error> {
    if let Some(count) = process::thread_count().filter(|&count| count != 1) {
        return Err(Error::Threads(count));
    }
    match process::close_all_on_exec() {
        // Linux before 5.11. No program is executed once `seal` was called.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
        outcome => outcome.map_err(refused("closing descriptors to other programs"))?,
    }
    set_no_new_privs(true).map_err(refused("giving up set-user-id programs"))?;
    drop_bounding_set()?;
    if geteuid().is_root() {
        become_user(options.user)?;
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(refused("giving up capabilities"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(refused("giving up core dumps"))?;
    if let Some(parent) = options.parent {
        end_with(parent)?;
    }
    let landlock = restrict_files()?;
    let report = Report::read(landlock).map_err(refused("reading what is left"))?;
    report.check_early().map_err(Error::Left)?;
    Ok(report)
}

/// Gives up every system call that running threads do not need, in all threads. To be called when
/// the last thread was started; `entered` is what [`enter_early`] gave.
///
/// What only a bug or an intruder asks for from then on kills the process; what libraries try and can
/// do without fails with `EPERM`.
///
/// # Errors
/// [`Error`] if the kernel does not filter system calls.
pub fn seal(entered: &Report) -> Result<Report, Error> {
    let own_pid = rustix::process::getpid().as_raw_nonzero().get() as u32;
    for program in filter::programs(own_pid).map_err(seccompiler::Error::from)? {
        seccompiler::apply_filter_all_threads(&program)?;
    }
    let report = Report::read(entered.landlock).map_err(refused("reading what is left"))?;
    report.check_sealed().map_err(Error::Left)?;
    Ok(report)
}

/// Without this, capabilities could come back with a program that has them.
fn drop_bounding_set() -> Result<(), Error> {
    // Only while there is CAP_SETPCAP, which is to go as well.
    let locked = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    match set_capabilities_secure_bits(locked) {
        // Who may not give them up has no capability to speak of.
        Ok(()) | Err(Errno::PERM) => {}
        Err(error) => return Err(refused("locking capabilities")(error)),
    }
    for number in 0..CapabilitySet::all().bits().count_ones() {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // This kernel has no more of them, or they are not ours to give up.
            Err(Errno::INVAL | Errno::PERM) => break,
            Err(error) => return Err(refused("giving up future capabilities")(error)),
        }
    }
    clear_ambient_capability_set().map_err(refused("giving up ambient capabilities"))
}

/// Groups first: the right to give them up goes with the user.
fn become_user(id: u32) -> Result<(), Error> {
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    let doing = "giving up root's groups";
    match set_thread_groups(&[]) {
        Ok(()) => {}
        // A user namespace that may not.
        Err(Errno::PERM) => return Ok(()),
        Err(error) => return Err(refused(doing)(error)),
    }
    match set_thread_res_gid(group, group, group) {
        Ok(()) => {}
        // A user namespace without this group.
        Err(Errno::INVAL) => return Ok(()),
        Err(error) => return Err(refused(doing)(error)),
    }
    match set_thread_res_uid(user, user, user) {
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(error) => Err(refused("giving up root")(error)),
    }
}

/// The kernel forgets the signal when the user changes, and tells nobody of a parent that is gone.
fn end_with(parent: u32) -> Result<(), Error> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(refused("ending with the parent process"))?;
    let is_there = getppid().is_some_and(|pid| Pid::as_raw(Some(pid)) as u32 == parent);
    if is_there { Ok(()) } else { Err(Error::Orphaned(parent)) }
}

/// Takes away whatever of files, TCP, foreign sockets and signals this kernel's Landlock knows.
fn restrict_files() -> Result<Landlock, Error> {
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK_FILES))?
        .handle_access(AccessNet::from_all(LANDLOCK_NET))?
        .scope(Scope::from_all(LANDLOCK_SCOPE))?
        .create()?
        .restrict_self()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Landlock::Full,
        RulesetStatus::PartiallyEnforced => Landlock::Partial,
        RulesetStatus::NotEnforced => Landlock::None,
    })
}
