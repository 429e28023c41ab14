//! This process as a whole: its threads, its descriptors, and the numbers of its system calls.

use std::io;

use rustix::process::{getpriority_process, setpriority_process};

/// The nice value of threads that move packets.
const NICE: i32 = -10;

/// Numbers and arguments of system calls, for a filter of them.
pub mod call {
    pub use libc::*;
}

/// How many threads this process has; `None` if `/proc` does not tell.
pub fn thread_count() -> Option<usize> {
    std::fs::read_dir("/proc/self/task").ok().map(Iterator::count)
}

/// Closes every descriptor but standard input, output and error when another program is executed.
///
/// # Errors
/// `ENOSYS` before Linux 5.11.
pub fn close_all_on_exec() -> io::Result<()> {
    let (first, last) = (3_u32, u32::MAX);
    // SAFETY: the call takes numbers only, and with this flag it closes nothing now.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_CLOEXEC as libc::c_uint)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has the calling thread, and those that it will start, run before what else the host does, so that a flood is
/// dropped where it comes in, and not after the kernel's receive work has had the time that it takes to open it. Whoever
/// started this process with a nice value of its own has chosen: it stays. Says whether it is changed.
///
/// # Errors
/// If this process may not (CAP_SYS_NICE).
pub fn take_precedence() -> io::Result<bool> {
    let is_free = getpriority_process(None)? == 0;
    if is_free {
        setpriority_process(None, NICE)?;
    }
    Ok(is_free)
}

#[cfg(test)]
mod tests {
    use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

    use super::*;

    #[test]
    fn threads_are_counted() {
        let before = thread_count().expect("/proc is there");
        assert!(before >= 1);
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(thread_count().is_some_and(|count| count >= 2)));
        });
    }

    #[test]
    fn a_nice_value_is_taken_once_inherited_and_never_over_anothers() {
        // A thread has its own.
        let taken = |before: i32| {
            std::thread::spawn(move || {
                setpriority_process(None, before).unwrap();
                let outcome = take_precedence();
                let own = getpriority_process(None).unwrap();
                let inherited = || getpriority_process(None).unwrap();
                (outcome.ok(), own, std::thread::spawn(inherited).join().unwrap())
            })
            .join()
            .unwrap()
        };
        assert_eq!(taken(5), (Some(false), 5, 5));
        let may = rustix::process::geteuid().is_root() && getpriority_process(None).unwrap() == 0;
        if may {
            assert!(matches!(taken(0), (Some(true), NICE, NICE) | (None, 0, 0)));
        }
    }

    #[test]
    fn no_descriptor_is_left_to_another_program() {
        let file = tempfile::tempfile().unwrap();
        fcntl_setfd(&file, FdFlags::empty()).unwrap();
        close_all_on_exec().unwrap();
        assert!(fcntl_getfd(&file).unwrap().contains(FdFlags::CLOEXEC));
    }
}
