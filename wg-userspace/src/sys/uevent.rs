//! What the kernel tells of its devices (`NETLINK_KOBJECT_UEVENT`).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recvfrom, socket_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The group to which the kernel itself sends; udev has another one.
const KERNEL_GROUP: u32 = 1;
/// Bytes of events that may wait: some thousands of them, as come when many devices do.
const BUFFER_LEN: usize = 4 << 20;
/// No event of the kernel's is longer (`UEVENT_BUFFER_SIZE`, and a header).
const EVENT_LEN_MAX: usize = 8192;

/// A socket on which the kernel tells of its devices.
#[derive(Debug)]
pub struct UeventSocket(AsyncFd<OwnedFd>);

impl UeventSocket {
    /// Opens one.
    ///
    /// # Errors
    /// If the kernel gives none, as in some containers.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
        // Whoever may not have more makes do with what is usual.
        let _ = set_socket_recv_buffer_size_force(&socket, BUFFER_LEN);
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        // SAFETY: an `OwnedFd` is open for as long as it lives and always names the same file; the
        // `AsyncFd` owns it and gives it to nobody.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(Self(socket))
    }

    /// Waits for the next event: its parts, with a zero byte after each. What is not the kernel's counts
    /// as an empty one; `None` says that events were lost, since too many came at once. Dropping the
    /// future before it is ready loses nothing.
    ///
    /// # Errors
    /// If the kernel tells nothing any more.
    pub async fn next(&self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(event) = ready.try_io(|socket| receive(socket.get_ref())) {
                return event;
            }
        }
    }
}

fn receive(socket: impl AsFd) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = vec![0; EVENT_LEN_MAX];
    match recvfrom(socket, buffer.as_mut_slice(), RecvFlags::empty()) {
        Ok((len, _, sender)) => {
            let sender = sender.map(SocketAddrNetlink::try_from);
            // Processes have a number; the kernel has none.
            let is_kernel = matches!(sender, Some(Ok(sender)) if sender.pid() == 0);
            buffer.truncate(if is_kernel { len } else { 0 });
            Ok(Some(buffer))
        }
        Err(Errno::NOBUFS) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::sockopt::set_socket_recv_buffer_size;
    use rustix::net::{SendFlags, sendto};

    use super::*;
    use crate::require_root;
    use crate::sys::netns::NetNs;

    #[test]
    fn lost_events_are_told() {
        require_root!();
        let flood = || async {
            let watch = UeventSocket::open().unwrap();
            set_socket_recv_buffer_size(watch.0.get_ref(), 1).unwrap();
            let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
            let sender =
                socket_with(family, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT)).unwrap();
            let group = SocketAddrNetlink::new(0, KERNEL_GROUP);
            for _ in 0..100 {
                sendto(&sender, &[0; 1024], SendFlags::empty(), &group).unwrap();
            }
            let mut told = Vec::new();
            while !told.contains(&None) {
                told.push(watch.next().await.unwrap());
            }
            told
        };
        let told = NetNs::new().unwrap().run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let limit = std::time::Duration::from_secs(10);
                tokio::time::timeout(limit, flood()).await.expect("it is told")
            })
        });
        assert!(told.iter().flatten().all(Vec::is_empty), "what is not the kernel's is empty");
    }
}
