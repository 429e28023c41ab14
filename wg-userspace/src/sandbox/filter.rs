//! The system calls of a process whose threads all run.
//!
//! Calls of packets and wake-ups are allowed whatever their arguments are: the kernel remembers that,
//! and they cost no run of the filter.

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::sys::process::call;

/// `linux/prctl.h`.
const PR_GET_AUXV: i32 = 0x4155_5856;

type Result<T> = std::result::Result<T, BackendError>;

/// A system call, when it is allowed, and what becomes of it else.
struct Call {
    number: i64,
    when: When,
    otherwise: Otherwise,
}

/// For which arguments a call is allowed. Arguments count from 0.
#[derive(Clone)]
enum When {
    Always,
    Never,
    /// The lower 32 bits of an argument are one of these.
    OneOf(u8, Vec<u32>),
    /// An argument has none of these bits.
    Without(u8, u64),
    /// An argument has all of these bits.
    With(u8, u64),
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Otherwise {
    /// No code of ours asks for it.
    Kill,
    /// Libraries try, and go on without: it fails with `EPERM`.
    Refuse,
}

/// The filters, in the order in which they are to be set: one that refuses, one that kills. The kernel
/// asks both, and the stricter answer counts. Threads may send signals to `own_pid` only.
pub fn programs(own_pid: u32) -> Result<[BpfProgram; 2]> {
    let calls = calls(own_pid);
    let mut refused = Vec::new();
    let mut survived = Vec::new();
    for Call { number, when, otherwise } in calls {
        match otherwise {
            Otherwise::Kill => survived.push((number, when.rules()?)),
            Otherwise::Refuse => {
                survived.push((number, Vec::new()));
                refused.push((number, when.opposite()?));
            }
        }
    }
    let refuse = SeccompAction::Errno(call::EPERM as u32);
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let refusing =
        SeccompFilter::new(refused.into_iter().collect(), SeccompAction::Allow, refuse, arch)?;
    let killing = SeccompFilter::new(
        survived.into_iter().collect(),
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        arch,
    )?;
    Ok([refusing.try_into()?, killing.try_into()?])
}

impl When {
    /// Rules of which one holds when the call is allowed; none stand for all calls.
    fn rules(&self) -> Result<Vec<SeccompRule>> {
        let rule = |argument, len, op, value| {
            SeccompRule::new(vec![SeccompCondition::new(argument, len, op, value)?])
        };
        match *self {
            Self::Always => Ok(Vec::new()),
            Self::Never => unreachable!("a call that never is allowed is not in the list"),
            Self::OneOf(argument, ref values) => values
                .iter()
                .map(|&value| rule(argument, Len::Dword, Op::Eq, value.into()))
                .collect(),
            Self::Without(argument, bits) => {
                Ok(vec![rule(argument, Len::Qword, Op::MaskedEq(bits), 0)?])
            }
            Self::With(argument, bits) => {
                Ok(vec![rule(argument, Len::Qword, Op::MaskedEq(bits), bits)?])
            }
        }
    }

    /// Rules of which one holds when the call is not allowed; none stand for all calls.
    fn opposite(&self) -> Result<Vec<SeccompRule>> {
        let condition = SeccompCondition::new;
        let all = match *self {
            Self::Never => return Ok(Vec::new()),
            Self::Always => unreachable!("a call that always is allowed is not refused"),
            Self::OneOf(argument, ref values) => values
                .iter()
                .map(|&value| condition(argument, Len::Dword, Op::Ne, value.into()))
                .collect::<Result<_>>()?,
            Self::With(argument, bit) => {
                assert!(bit.is_power_of_two(), "of several, some could be there");
                vec![condition(argument, Len::Qword, Op::MaskedEq(bit), 0)?]
            }
            Self::Without(argument, bit) => {
                assert!(bit.is_power_of_two(), "of several, some could be there");
                vec![condition(argument, Len::Qword, Op::MaskedEq(bit), bit)?]
            }
        };
        Ok(vec![SeccompRule::new(all)?])
    }
}

/// What is not here kills.
fn calls(own_pid: u32) -> Vec<Call> {
    let always = [
        // Packets: sockets, XSKs, TUN queues.
        call::SYS_read,
        call::SYS_write,
        call::SYS_readv,
        call::SYS_writev,
        call::SYS_sendto,
        call::SYS_recvfrom,
        call::SYS_sendmsg,
        call::SYS_recvmsg,
        call::SYS_sendmmsg,
        call::SYS_recvmmsg,
        // Waiting and waking.
        call::SYS_ppoll,
        call::SYS_epoll_ctl,
        call::SYS_epoll_pwait,
        call::SYS_epoll_pwait2,
        call::SYS_futex,
        call::SYS_nanosleep,
        call::SYS_clock_nanosleep,
        call::SYS_sched_yield,
        call::SYS_restart_syscall,
        // Clocks that the kernel does not show in memory.
        call::SYS_clock_gettime,
        call::SYS_clock_getres,
        call::SYS_gettimeofday,
        // Chance.
        call::SYS_getrandom,
        // Memory, but for what is executable, which is below.
        call::SYS_munmap,
        call::SYS_mremap,
        call::SYS_brk,
        call::SYS_madvise,
        call::SYS_membarrier,
        // Clients of the UAPI socket, and the keeper.
        call::SYS_accept4,
        call::SYS_shutdown,
        call::SYS_getsockname,
        call::SYS_getpeername,
        call::SYS_getsockopt,
        // Files that are open: memory for a successor, and what is handed over with them.
        call::SYS_close,
        call::SYS_fstat,
        call::SYS_lseek,
        call::SYS_pread64,
        call::SYS_pwrite64,
        call::SYS_ftruncate,
        call::SYS_memfd_create,
        // Threads that have just started, and those that end.
        call::SYS_set_robust_list,
        call::SYS_rseq,
        call::SYS_sigaltstack,
        call::SYS_rt_sigprocmask,
        call::SYS_rt_sigaction,
        call::SYS_rt_sigreturn,
        call::SYS_sched_getaffinity,
        call::SYS_getcpu,
        call::SYS_exit,
        call::SYS_exit_group,
        // Who we are.
        call::SYS_getpid,
        call::SYS_gettid,
        call::SYS_getppid,
        call::SYS_getuid,
        call::SYS_geteuid,
        call::SYS_getgid,
        call::SYS_getegid,
        call::SYS_capget,
        call::SYS_uname,
    ];
    #[cfg(target_arch = "x86_64")]
    let always_here = [call::SYS_poll, call::SYS_epoll_wait, call::SYS_time];
    #[cfg(not(target_arch = "x86_64"))]
    let always_here = [];

    // What the standard library and the C library ask when they print a panic, look for a terminal,
    // an interface or a limit. None of it is needed.
    let never = [
        call::SYS_openat,
        call::SYS_openat2,
        call::SYS_readlinkat,
        call::SYS_faccessat,
        call::SYS_faccessat2,
        call::SYS_getcwd,
        call::SYS_getdents64,
        call::SYS_statfs,
        call::SYS_unlinkat,
        call::SYS_socket,
        call::SYS_connect,
        call::SYS_setsockopt,
        call::SYS_kill,
        call::SYS_sysinfo,
    ];
    #[cfg(target_arch = "x86_64")]
    let never_here = [
        call::SYS_open,
        call::SYS_stat,
        call::SYS_lstat,
        call::SYS_access,
        call::SYS_readlink,
        call::SYS_unlink,
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let never_here = [];

    let executable = call::PROT_EXEC as u64;
    let at_empty_path = call::AT_EMPTY_PATH as u64;
    let ioctls = [
        call::FIONBIO as u32,
        call::FIONREAD as u32,
        call::TUNGETIFF as u32,
        call::TUNGETVNETHDRSZ as u32,
        // By any socket: names of links in the scopes of addresses.
        call::SIOCGIFINDEX as u32,
        call::SIOCGIFNAME as u32,
    ];
    let fcntls = [
        call::F_GETFD,
        call::F_SETFD,
        call::F_GETFL,
        call::F_SETFL,
        call::F_DUPFD_CLOEXEC,
        call::F_ADD_SEALS,
        call::F_GET_SEALS,
    ];
    let prctls = [
        call::PR_SET_NAME,
        call::PR_GET_NAME,
        call::PR_GET_DUMPABLE,
        call::PR_GET_NO_NEW_PRIVS,
        call::PR_GET_SECCOMP,
        call::PR_CAPBSET_READ,
        call::PR_CAP_AMBIENT,
        call::PR_SET_VMA,
        // Where the kernel shows its clocks; `rustix` asks when it reads the first one.
        PR_GET_AUXV,
    ];
    let numbers = |values: &[i32]| values.iter().map(|&value| value as u32).collect::<Vec<_>>();
    let by_argument = [
        (call::SYS_mmap, When::Without(2, executable), Otherwise::Kill),
        (call::SYS_mprotect, When::Without(2, executable), Otherwise::Kill),
        (call::SYS_prctl, When::OneOf(0, numbers(&prctls)), Otherwise::Kill),
        (call::SYS_fcntl, When::OneOf(1, numbers(&fcntls)), Otherwise::Kill),
        (call::SYS_ioctl, When::OneOf(1, ioctls.to_vec()), Otherwise::Refuse),
        // `abort`.
        (call::SYS_tgkill, When::OneOf(0, vec![own_pid]), Otherwise::Kill),
        // Workers that have just started pin themselves.
        (call::SYS_sched_setaffinity, When::OneOf(0, vec![0]), Otherwise::Kill),
        // Limits of our own may be read.
        (call::SYS_prlimit64, When::OneOf(0, vec![0, own_pid]), Otherwise::Kill),
        // Of descriptors, not of paths.
        (call::SYS_newfstatat, When::With(3, at_empty_path), Otherwise::Refuse),
        (call::SYS_statx, When::With(2, at_empty_path), Otherwise::Refuse),
    ];

    let kill = Otherwise::Kill;
    let always = always.into_iter().chain(always_here);
    let always = always.map(|number| Call { number, when: When::Always, otherwise: kill });
    let never = never.into_iter().chain(never_here);
    let never =
        never.map(|number| Call { number, when: When::Never, otherwise: Otherwise::Refuse });
    let by_argument =
        by_argument.into_iter().map(|(number, when, otherwise)| Call { number, when, otherwise });
    always.chain(never).chain(by_argument).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_call_stands_in_two_lists() {
        let mut seen = HashSet::new();
        for call in calls(1) {
            assert!(seen.insert(call.number), "call {}", call.number);
        }
    }

    #[test]
    fn filters_are_small_enough_for_the_kernel() {
        for program in programs(1).unwrap() {
            assert!(!program.is_empty() && program.len() < 4096);
        }
    }

    #[test]
    fn what_gives_power_stands_nowhere() {
        let listed: HashSet<_> = calls(1).into_iter().map(|call| call.number).collect();
        for number in [
            call::SYS_execve,
            call::SYS_execveat,
            call::SYS_clone,
            call::SYS_clone3,
            call::SYS_ptrace,
            call::SYS_process_vm_readv,
            call::SYS_bpf,
            call::SYS_bind,
            call::SYS_listen,
            call::SYS_mount,
            call::SYS_setns,
            call::SYS_unshare,
            call::SYS_setuid,
            call::SYS_setresuid,
            call::SYS_capset,
            call::SYS_seccomp,
            call::SYS_io_uring_setup,
            call::SYS_pkey_mprotect,
            call::SYS_perf_event_open,
            call::SYS_keyctl,
            call::SYS_kexec_load,
            call::SYS_init_module,
            call::SYS_personality,
            call::SYS_shmat,
            call::SYS_pidfd_getfd,
            call::SYS_pidfd_send_signal,
        ] {
            assert!(!listed.contains(&number), "call {number}");
        }
    }
}
