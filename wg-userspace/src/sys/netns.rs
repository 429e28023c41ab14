//! Network namespaces: entering that of a device that was moved; for tests, making them, and the
//! question whether this process may.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::thread::{
    CapabilitySet, LinkNameSpaceType, UnshareFlags, capabilities, move_into_link_name_space,
    unshare_unsafe,
};

use super::link;

/// Runs `body` in a fresh thread in a fresh network namespace whose loopback is up.
///
/// The namespace ends, with every device in it, when the last thread, process and descriptor in it
/// does: also after a panic, which is passed on.
///
/// # Panics
/// If the kernel makes no namespace: ask [`may_make_netns`] first.
pub fn in_new_netns<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    NetNs::new().expect("a namespace can be made").run(body)
}

/// A network namespace that is held open by its descriptor, for topologies of several.
#[derive(Debug)]
pub struct NetNs(OwnedFd);

impl NetNs {
    /// Makes one, with its loopback up.
    ///
    /// # Errors
    /// `PermissionDenied` without `CAP_SYS_ADMIN`.
    pub fn new() -> io::Result<Self> {
        // A namespace belongs to a thread: one of its own, so that the caller stays where it is.
        std::thread::scope(|scope| scope.spawn(Self::unshare).join())
            .expect("making a namespace does not panic")
    }

    fn unshare() -> io::Result<Self> {
        // SAFETY: `NEWNET` leaves memory, descriptors and signal handlers shared, so no other
        // thread can tell; `rustix` marks the call for the flags that do not.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        link::set_up(link::index("lo")?)?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open("/proc/thread-self/ns/net", flags, Mode::empty())?))
    }

    /// Runs `body` in a fresh thread in this namespace. A panic is passed on.
    ///
    /// # Panics
    /// If the kernel does not let the thread in.
    pub fn run<R: Send>(&self, body: impl FnOnce() -> R + Send) -> R {
        self.try_run(body).expect("who made a namespace may enter it")
    }

    /// Runs `body` in a fresh thread in this namespace. A panic is passed on.
    ///
    /// # Errors
    /// If there is no thread, or the kernel does not let it in: `PermissionDenied` without
    /// `CAP_SYS_ADMIN` there.
    pub fn try_run<R: Send>(&self, body: impl FnOnce() -> R + Send) -> io::Result<R> {
        let inside = || {
            move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(body())
        };
        std::thread::scope(|scope| {
            match std::thread::Builder::new().spawn_scoped(scope, inside)?.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A path by which other programs find this namespace while we hold it
    /// (`ip link set dev IF netns PATH`).
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

impl From<OwnedFd> for NetNs {
    /// Of a descriptor of the namespace.
    fn from(namespace: OwnedFd) -> Self {
        Self(namespace)
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether this process may make network namespaces and configure them.
pub fn may_make_netns() -> bool {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN;
    capabilities(None).is_ok_and(|sets| sets.effective.contains(needed))
}

/// Says that `test` did not run, in the form in which skipped tests are counted.
pub fn report_skipped(test: &str, reason: &str) {
    // Straight to the stream, since what a passing test prints by macro is not shown; and in one
    // piece, since tests run side by side.
    let _ = io::stderr().write_all(format!("SKIPPED {test}: {reason}\n").as_bytes());
}

/// In a test: returns from it, and says so by name, unless it may make network namespaces.
#[macro_export]
macro_rules! require_root {
    () => {
        if !$crate::sys::netns::may_make_netns() {
            fn here() {}
            let test = std::any::type_name_of_val(&here).trim_end_matches("::here");
            $crate::sys::netns::report_skipped(test, "needs CAP_NET_ADMIN and CAP_SYS_ADMIN");
            return;
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_namespace_has_nothing_but_a_loopback_that_is_up() {
        require_root!();
        in_new_netns(|| {
            assert_eq!(link::index("lo").unwrap(), 1);
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.connect(socket.local_addr().unwrap()).unwrap();
            assert_eq!(socket.send(b"x").unwrap(), 1);
        });
    }

    #[test]
    fn the_caller_stays_in_its_namespace() {
        require_root!();
        let net = |path| std::fs::read_link(path).unwrap();
        let before = net("/proc/thread-self/ns/net");
        let inside = in_new_netns(|| net("/proc/thread-self/ns/net"));
        assert_ne!(before, inside);
        assert_eq!(before, net("/proc/thread-self/ns/net"));
    }

    #[test]
    fn a_panic_inside_is_passed_on() {
        require_root!();
        let panic = std::panic::catch_unwind(|| in_new_netns(|| panic!("inside"))).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"inside"));
    }
}
