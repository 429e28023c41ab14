//! This process as a whole: its threads, its descriptors, and the numbers of its system calls.

use std::io;

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
    fn no_descriptor_is_left_to_another_program() {
        let file = tempfile::tempfile().unwrap();
        fcntl_setfd(&file, FdFlags::empty()).unwrap();
        close_all_on_exec().unwrap();
        assert!(fcntl_getfd(&file).unwrap().contains(FdFlags::CLOEXEC));
    }
}
