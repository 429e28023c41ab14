//! Follows the TUN device to wherever it is moved.

use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Handle;

use crate::host::{Host, LinkWatch};
use crate::sys::link;
use crate::tun::{TunQueue, is_gone};

/// A device that is on its way between two namespaces, or is being renamed, is looked for this often.
const TRIES: u32 = 50;
const BETWEEN_TRIES: Duration = Duration::from_millis(20);

/// Watches the device of `queue` in the network namespace where it is now; `None` if it was deleted.
///
/// The namespace belongs to a thread, and a netlink socket to the namespace where it was opened: a
/// thread goes there to open them. Sockets, NICs and XSKs stay where the daemon was started, as those
/// of the kernel's WireGuard stay where the device was made.
///
/// # Errors
/// If the device is somewhere that this process may not enter.
pub async fn moved_link(queue: &TunQueue) -> anyhow::Result<Option<LinkWatch>> {
    let runtime = Handle::current();
    let watch = || -> anyhow::Result<LinkWatch> {
        let (name, namespace) = (queue.device()?, queue.namespace()?);
        namespace.try_run(|| {
            let _runtime = runtime.enter();
            let index = link::index(&name)?;
            // The move has made the kernel forget that it was to give the device no addresses.
            link::disable_address_generation(index)?;
            Ok(LinkWatch::new(Host::new()?, index)?)
        })?
    };
    let mut tries = 0;
    loop {
        if queue.device().is_err_and(|error| is_gone(&error)) {
            return Ok(None);
        }
        tries += 1;
        match watch() {
            Ok(watch) => return Ok(Some(watch)),
            Err(error) if tries == TRIES => {
                return Err(error).context("following the interface to another network namespace");
            }
            Err(_) => tokio::time::sleep(BETWEEN_TRIES).await,
        }
    }
}
