//! `down`: undoes what the ledger says; without one, deletes the interface, whose daemon ends itself.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use rustix::process::{Pid, Signal};

use super::{
    Code, Failure, hooks,
    launch::{Background, wait_for_end},
    ledger::Ledger,
    name::{ConfigFile, InterfaceName},
    save, show,
    socket::{self, Socket},
    steps::{self, Context, Step},
};
use crate::{bpf::remove_left_overs, config::HookEvent, host::Host, keeper::nat, sys::clock};

/// How long a daemon may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// How often is looked whether something has ended of which nobody tells.
const POLL_EVERY: Duration = Duration::from_millis(10);

pub fn down(what: &str) -> Result<Code, Failure> {
    let interface = ConfigFile::which(what, Path::exists)
        .map_err(|error| Failure::new(Code::Usage, error))?
        .interface;
    let runtime = runtime()?;
    let host = runtime.block_on(async { Host::new() })?;
    let done = runtime.block_on(take_down(&interface, &host));
    runtime.block_on(undo_left_overs(&host, &interface));
    if let Err(error) = remove_left_overs(None) {
        eprintln!("tidegate: warning: filters of processes that were killed may stay: {error}");
    }
    done.map_err(|failure| failure.within(&interface))?;
    Ok(Code::Ok)
}

/// The runtime on which `up` and `down` talk to the kernel.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    Ok(builder.enable_all().build().context("starting the asynchronous runtime")?)
}

async fn take_down(interface: &InterfaceName, host: &Host) -> Result<(), Failure> {
    let Some(ledger) = Ledger::open(interface)? else { return delete(interface, host).await };
    if ledger.record().is_left_over() {
        eprintln!("tidegate: {interface}: undoing what a process that was killed has left");
        TakeDown::of_left_over(interface, host, ledger).run().await
    } else if ledger.record().header.is_of_this_netns() {
        TakeDown::of_live(interface, host, ledger, None).run().await
    } else {
        let line = "it was brought up in another network namespace; take it down there (`ip netns exec NAME \
                    tidegate down`)";
        Err(Failure::new(Code::Existence, line))
    }
}

/// Undoes what processes that were killed have left of other interfaces of this network namespace.
pub async fn undo_left_overs(host: &Host, except: &InterfaceName) {
    for record in Ledger::others(except) {
        if !record.is_left_over() || !record.header.is_of_this_netns() {
            continue;
        }
        let Ok(interface) = record.header.interface.parse::<InterfaceName>() else { continue };
        // One that is locked is of a process that works on it; what it said before is not true now.
        let Ok(Some(ledger)) = Ledger::open(&interface) else { continue };
        if !ledger.record().is_left_over() {
            continue;
        }
        eprintln!("tidegate: {interface}: undoing what a process that was killed has left");
        if let Err(failure) = TakeDown::of_left_over(&interface, host, ledger).run().await {
            failure.within(&interface).print();
        }
    }
}

/// The daemon of Tidegate's that answers for an interface, if one does. One that is about to end breaks
/// off, and is waited for.
fn daemon_that_answers(interface: &InterfaceName) -> Result<Option<Pid>, Failure> {
    let started = clock::boot_now();
    loop {
        let Some(socket) = Socket::find(interface)? else { return Ok(None) };
        match show::status(&socket) {
            Ok(Some(_)) => return socket.daemon(),
            Ok(None) => return Ok(None),
            Err(failure) if clock::boot_now().since(started) > END_TIMEOUT => return Err(failure),
            Err(_) => std::thread::sleep(POLL_EVERY),
        }
    }
}

/// The way back through the steps of a ledger.
pub struct TakeDown<'a> {
    interface: &'a InterfaceName,
    host: &'a Host,
    ledger: Ledger,
    /// The daemon, if it is a child of this process.
    background: Option<Background>,
    /// Whether there is nothing any more that works: then what fails is told, and not more.
    is_left_over: bool,
}

impl<'a> TakeDown<'a> {
    /// After an `up` that failed.
    pub fn after_failure(
        interface: &'a InterfaceName,
        host: &'a Host,
        ledger: Ledger,
        background: Option<Background>,
    ) -> Self {
        Self { interface, host, ledger, background, is_left_over: true }
    }

    /// Of an interface that works.
    pub fn of_live(
        interface: &'a InterfaceName,
        host: &'a Host,
        ledger: Ledger,
        background: Option<Background>,
    ) -> Self {
        Self { interface, host, ledger, background, is_left_over: false }
    }

    /// After a process that was killed.
    pub fn of_left_over(interface: &'a InterfaceName, host: &'a Host, ledger: Ledger) -> Self {
        Self { interface, host, ledger, background: None, is_left_over: true }
    }

    /// Undoes every step that is noted, the last one first, and then removes the ledger. Goes on
    /// after what fails; the ledger stays then, and says what is left.
    ///
    /// # Errors
    /// If something could not be undone, or a hook failed.
    pub async fn run(mut self) -> Result<(), Failure> {
        let record = self.ledger.record().clone();
        if !record.header.is_of_this_boot() {
            return Ok(self.ledger.remove().context("removing the state file")?);
        }
        if !record.header.is_of_this_netns() {
            let interface = self.interface;
            eprintln!(
                "tidegate: warning: {interface}: it was in another network namespace; if that still \
                 exists, its rules are left there"
            );
            return Ok(self.ledger.remove().context("removing the state file")?);
        }
        // What they undo was begun, perhaps.
        let has_hooks =
            record.is_up || record.steps().any(|noted| matches!(noted.step, Step::Hook(_)));
        let mut problems: Vec<Failure> = Vec::new();
        let hooks = |event| {
            let of_event = record.header.down_hooks.iter().filter(move |hook| hook.event == event);
            of_event.filter(|_| has_hooks)
        };
        for hook in hooks(HookEvent::PreDown) {
            if let Err(failure) = hooks::run(hook).await {
                // As for wg-quick: the interface stays.
                if !self.is_left_over {
                    return Err(failure.and("the interface was left as it is"));
                }
                failure.print();
            }
        }
        if !self.is_left_over
            && let Err(failure) = save::on_down(self.interface, self.host, &record).await
        {
            return Err(failure.and("the interface was left as it is"));
        }
        let context = Context { interface: self.interface, host: self.host, endpoints: &[] };
        for noted in record.steps().rev() {
            if noted.step.goes_with_the_device() {
                continue;
            }
            self.ledger.undoing(noted.id).context("noting what is undone")?;
            let undone = match &noted.step {
                Step::Daemon => self.end_device().await,
                step => steps::undo(step, &context).await,
            };
            match undone {
                Ok(()) => self.ledger.forget(noted.id).context("noting what is undone")?,
                Err(failure) => problems.push(failure),
            }
        }
        let mut hook_failed = None;
        for hook in hooks(HookEvent::PostDown) {
            if let Err(failure) = hooks::run(hook).await {
                if self.is_left_over {
                    failure.print();
                } else {
                    hook_failed.get_or_insert(failure);
                }
            }
        }
        let Some(first) = problems.into_iter().reduce(|first, next| {
            next.print();
            first
        }) else {
            self.ledger.remove().context("removing the state file")?;
            return hook_failed.map_or(Ok(()), Err);
        };
        Err(first.and("what is left is tried again by the next `tidegate down`"))
    }

    /// Deletes the device, if it is there and ours, and waits for the end of its daemon.
    async fn end_device(&mut self) -> Result<(), Failure> {
        let (interface, host) = (self.interface, self.host);
        let keeper = self.ledger.record().keeper.filter(|keeper| keeper.is_alive());
        let pid = match keeper {
            Some(keeper) => keeper.pid(),
            None => daemon_that_answers(interface)?,
        };
        if let Some(pid) = pid {
            match host.link(interface.as_str()).await? {
                Some(link) => host.delete_link(link.index).await?,
                // It was moved to another network namespace, or goes just now.
                None => {
                    let _ = rustix::process::kill_process(pid, Signal::TERM);
                }
            }
            if let Some(background) = self.background.take() {
                background.stop();
            }
            return ended(interface, Some(pid));
        }
        if let Some(background) = self.background.take() {
            background.stop();
        }
        // A daemon that was not ready when its `up` was killed ends by itself.
        let started = clock::boot_now();
        while host.link(interface.as_str()).await?.is_some() {
            if clock::boot_now().since(started) > END_TIMEOUT {
                let line = "there is an interface of this name that is not ours, and is left alone; \
                            `ip link del` removes it";
                eprintln!("tidegate: warning: {interface}: {line}");
                break;
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
        // Of a daemon that was killed, a thread may still be about to let go of the socket.
        let started = clock::boot_now();
        while Socket::find(interface)?.is_some()
            && host.link(interface.as_str()).await?.is_none()
            && clock::boot_now().since(started) < END_TIMEOUT
        {
            tokio::time::sleep(POLL_EVERY).await;
        }
        if Socket::find(interface)?.is_none() {
            remove_sockets(interface);
        }
        Ok(())
    }
}

/// A daemon that was killed leaves its sockets; mostly there are none.
fn remove_sockets(interface: &InterfaceName) {
    for path in [socket::path(interface), nat::socket_path(interface.as_str())] {
        let _ = std::fs::remove_file(path);
    }
}

/// Deletes a device that was made by `tidegate run`.
async fn delete(interface: &InterfaceName, host: &Host) -> Result<(), Failure> {
    let link = host.link(interface.as_str()).await?.ok_or_else(|| {
        let line = "there is no such interface; `tidegate show interfaces` lists those that are";
        Failure::new(Code::Existence, line)
    })?;
    // Whatever else has this name is not ours to delete.
    let Some(socket) = Socket::find(interface)? else {
        let line = "it is not an interface of Tidegate, for no daemon listens for it; `wg-quick down` or `ip \
                    link del` takes down others";
        return Err(Failure::new(Code::Existence, line));
    };
    if show::status(&socket)?.is_none() {
        let line = "it is run by another implementation; use `wg-quick down`";
        return Err(Failure::new(Code::Existence, line));
    }
    let daemon = socket.daemon()?;
    host.delete_link(link.index).await?;
    ended(interface, daemon)
}

/// Waits until the daemon of a device that was deleted has ended.
fn ended(interface: &InterfaceName, daemon: Option<Pid>) -> Result<(), Failure> {
    let started = clock::boot_now();
    if let Some(pid) = daemon
        && !wait_for_end(pid, END_TIMEOUT)
    {
        let line = format_args!(
            "the interface is deleted, but its daemon does not end; `kill {pid}` ends it"
        );
        return Err(Failure::new(Code::Runtime, line));
    }
    // A daemon of another process namespace can only be seen by its socket.
    while Socket::find(interface)?.is_some() {
        if clock::boot_now().since(started) > END_TIMEOUT {
            let line = "the interface is deleted, but its daemon still listens; look for a `tidegate` process in \
                        other namespaces";
            return Err(Failure::new(Code::Runtime, line));
        }
        std::thread::sleep(POLL_EVERY);
    }
    remove_sockets(interface);
    Ok(())
}
