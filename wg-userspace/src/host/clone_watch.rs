//! Whether this virtual machine was cloned, or went back to a snapshot.

use std::io;

use crate::sys::uevent::UeventSocket;

/// What the driver of the generation id (`vmgenid`) says when the id has changed: the hypervisor changes it
/// for whoever runs on after a clone, a restore or a failover.
const NEW_GENERATION: &[u8] = b"NEW_VMGENID=1";

/// Tells of new generations of this virtual machine.
pub struct CloneWatch(UeventSocket);

impl CloneWatch {
    /// Starts to watch. A host without the device has nothing to tell.
    ///
    /// # Errors
    /// If the kernel gives no socket.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new() -> io::Result<CloneWatch> {
        UeventSocket::open().map(CloneWatch)
    }

    /// Waits for the next new generation, or the loss of events that may have told of one. Dropping the
    /// future before it is ready loses nothing.
    ///
    /// # Errors
    /// If the kernel tells nothing any more.
    pub async fn next(&self) -> io::Result<()> {
        loop {
            match self.0.next().await? {
                Some(event) if !is_new_generation(&event) => {}
                Some(_) => return Ok(()),
                None => {
                    tracing::warn!("events of devices were lost: this may be a clone");
                    return Ok(());
                }
            }
        }
    }
}

/// Whether an event (parts with a zero byte after each) tells of a new generation.
fn is_new_generation(event: &[u8]) -> bool {
    let mut parts = event.split(|&byte| byte == 0);
    parts.next().is_some_and(|first| first.starts_with(b"change@"))
        && parts.any(|part| part == NEW_GENERATION)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_drivers_word_is_a_new_generation() {
        let event = |parts: &[&str]| -> Vec<u8> {
            parts.iter().flat_map(|part| part.bytes().chain([0])).collect()
        };
        let head = "change@/devices/LNXSYSTM:00/LNXSYBUS:00/VMGENCTR:00";
        let device = ["ACTION=change", "DEVPATH=/devices/LNXSYSTM:00", "SUBSYSTEM=acpi"];
        let [action, path, subsystem] = device;
        let told = [head, action, path, subsystem, "NEW_VMGENID=1", "SEQNUM=4711"];
        assert!(is_new_generation(&event(&told)));
        for other in [
            &[head, action, path, subsystem, "SEQNUM=4711"][..],
            &[head, "NEW_VMGENID=10"],
            &["add@/devices/virtual/net/veth0", "NEW_VMGENID=1"],
            &["NEW_VMGENID=1"],
            &[],
        ] {
            assert!(!is_new_generation(&event(other)), "{other:?}");
        }
        assert!(!is_new_generation(&[0; 64]));
    }

    #[test]
    fn a_watch_with_nothing_to_tell_waits() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let watch = match CloneWatch::new() {
                Ok(watch) => watch,
                Err(error) => {
                    return eprintln!("SKIPPED a_watch_with_nothing_to_tell_waits: {error}");
                }
            };
            let waited = std::time::Duration::from_millis(20);
            assert!(tokio::time::timeout(waited, watch.next()).await.is_err());
        });
    }
}
