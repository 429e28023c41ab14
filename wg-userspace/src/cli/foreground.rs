//! `up --foreground`: stays while the interface is up, for service managers.

use std::time::Duration;

use super::{
    Code, Failure,
    down::TakeDown,
    launch::Background,
    ledger::{Ledger, Process},
    name::InterfaceName,
    up::Interruption,
};
use crate::host::Host;

/// How often is looked whether the daemon has ended, and a `down` that works on the interface.
const POLL_EVERY: Duration = Duration::from_millis(50);

/// Calls `ready`, and stays until a signal comes, the daemon ends, or somebody else takes the
/// interface down. At the end everything is undone. `daemon` is the process that holds the device open.
///
/// # Errors
/// If the daemon ended while nobody wanted it to, or something could not be undone.
pub async fn stay(
    interface: &InterfaceName,
    host: &Host,
    background: Option<Background>,
    daemon: Option<Process>,
    mut interruption: Interruption,
    ready: impl FnOnce(),
) -> Result<(), Failure> {
    ready();
    let is_interrupted = tokio::select! {
        () = interruption.wait() => true,
        () = ended(daemon) => false,
    };
    // Whoever deleted the interface undoes the rest as well.
    let ledger = loop {
        match Ledger::open(interface) {
            Ok(ledger) => break ledger,
            Err(_) => tokio::time::sleep(POLL_EVERY).await,
        }
    };
    let Some(ledger) = ledger else {
        if let Some(background) = background {
            background.stop();
        }
        return Ok(());
    };
    let take_down = if is_interrupted {
        TakeDown::of_live(interface, host, ledger, background)
    } else {
        TakeDown::after_failure(interface, host, ledger, background)
    };
    take_down.run().await.map_err(|failure| failure.within(interface))?;
    if is_interrupted {
        return Ok(());
    }
    let line = "its daemon has ended and everything else was undone; what it printed or the journal says why";
    Err(Failure::new(Code::Runtime, line).within(interface))
}

async fn ended(daemon: Option<Process>) {
    let Some(daemon) = daemon else { return };
    while daemon.is_alive() {
        tokio::time::sleep(POLL_EVERY).await;
    }
}
