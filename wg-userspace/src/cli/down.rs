//! `down`: deletes the interface; its daemon ends itself.

use std::{path::Path, time::Duration};

use anyhow::Context;

use super::{
    Code, Failure,
    launch::wait_for_end,
    name::{ConfigFile, InterfaceName},
    show,
    socket::Socket,
};
use crate::{host::Host, sys::clock};

/// How long a daemon may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(5);

pub fn down(what: &str) -> Result<Code, Failure> {
    let interface = ConfigFile::which(what, Path::exists)
        .map_err(|error| Failure::new(Code::Usage, error))?
        .interface;
    let runtime = runtime()?;
    let deleted = runtime.block_on(delete(&interface));
    deleted.map_err(|failure| failure.within(&interface))?;
    Ok(Code::Ok)
}

/// The runtime on which `up` and `down` talk to the kernel.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    Ok(builder.enable_all().build().context("starting the asynchronous runtime")?)
}

async fn delete(interface: &InterfaceName) -> Result<(), Failure> {
    let host = Host::new()?;
    let link = host
        .link(interface.as_str())
        .await?
        .ok_or_else(|| Failure::new(Code::Existence, "there is no such interface"))?;
    // Whatever else has this name is not ours to delete.
    let Some(socket) = Socket::find(interface)? else {
        let line = "no daemon listens for it: it is not an interface of Tidegate";
        return Err(Failure::new(Code::Existence, line));
    };
    if show::status(&socket)?.is_none() {
        let line = "it is run by another implementation: use `wg-quick down`";
        return Err(Failure::new(Code::Existence, line));
    }
    let daemon = socket.daemon()?;
    host.delete_link(link.index).await?;

    let started = clock::boot_now();
    if let Some(pid) = daemon
        && !wait_for_end(pid, END_TIMEOUT)
    {
        let line =
            format_args!("the interface is deleted, but its daemon (process {pid}) does not end");
        return Err(Failure::new(Code::Runtime, line));
    }
    // A daemon of another process namespace can only be seen by its socket.
    while Socket::find(interface)?.is_some() {
        if clock::boot_now().since(started) > END_TIMEOUT {
            let line = "the interface is deleted, but its daemon still listens";
            return Err(Failure::new(Code::Runtime, line));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
