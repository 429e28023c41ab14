//! Carries out what a reload has found, and takes it back if that fails.
//!
//! The ledger says before each step that it is begun or about to be undone, and before the device is
//! changed, to what. A reload that is killed leaves so much in doubt and not more: the next one does or
//! undoes that anew, whichever file it follows.

use std::{fs, net::IpAddr, path::PathBuf};

use anyhow::Context as _;
use ipnet::IpNet;

use super::{Difference, Reload, State, address_of};
use crate::{
    cli::{
        Failure,
        applied::Applied,
        ledger::{Ledger, Noted, StepId},
        name::InterfaceName,
        nat,
        points::Points,
        steps::{self, Step},
        up,
    },
    device::SetRequest,
};

/// What was done, to be taken back.
enum Done {
    Confirmed(StepId),
    Adopted(StepId),
    Added(Noted),
    Removed(Noted),
    Requested(SetRequest),
    Mtu(u32),
    Nat(String),
}

/// The way through what differs.
pub(super) struct Work<'a> {
    reload: &'a Reload<'a>,
    ledger: &'a mut Ledger,
    /// Addresses that the interface loses.
    leaving: Vec<IpAddr>,
    /// What the ledger is to say again if nothing comes of it.
    before: Option<Applied>,
    /// What else was in doubt, and is again then.
    begun: Option<Applied>,
    done: Vec<Done>,
    points: Points,
}

impl<'a> Work<'a> {
    pub(super) fn new(reload: &'a Reload<'a>, state: &'a mut State, found: &Difference) -> Self {
        let leaving = found.host.remove.iter().filter_map(|noted| address_of(&noted.step));
        let new: Vec<IpAddr> =
            found.host.add.iter().filter_map(address_of).map(|net| net.addr()).collect();
        let leaving = leaving.map(|net| net.addr()).filter(|ip| !new.contains(ip)).collect();
        let mut before = state.known.applied.clone();
        // A request that gives such a peer its endpoint back makes the daemon forget that its name has
        // led there.
        for peer in state.running.peers.iter().filter(|peer| peer.is_by_name) {
            let key = peer.public_key.to_string();
            if let Some(known) = before.as_mut().and_then(|known| known.endpoints.get_mut(&key)) {
                known.resolved = peer.endpoint;
            }
        }
        let begun = state.known.begun.clone();
        let (done, points) = (Vec::new(), Points::default());
        Self { reload, ledger: &mut state.ledger, leaving, before, begun, done, points }
    }

    /// Does all of it.
    ///
    /// # Errors
    /// If something fails; then [`take_back`](Self::take_back) is to be called, and when this is given up.
    pub(super) async fn run(&mut self, found: &Difference) -> Result<(), Failure> {
        // What a process that was killed has begun.
        let (begun, vanished): (Vec<&Noted>, Vec<&Noted>) =
            found.host.remove.iter().partition(|noted| !noted.done);
        for noted in begun {
            self.remove(noted).await?;
        }
        for noted in &found.host.forget {
            self.ledger.forget(noted.id).context("noting a step")?;
        }
        for noted in &found.host.confirm {
            self.done.push(Done::Confirmed(noted.id));
            self.ledger.done(noted.id).context("noting a step")?;
        }
        for step in &found.host.adopt {
            let id = self.ledger.note(step.clone()).context("noting a step")?;
            self.done.push(Done::Adopted(id));
            self.ledger.done(id).context("noting a step")?;
        }
        // A rule leads to the table only when the device's own datagrams have their mark.
        let is_rule = |step: &&Step| matches!(step, Step::Rule { .. });
        let mut vanished = vanished;
        for step in found.host.add.iter().filter(|step| !is_rule(step)) {
            // An interface has an IPv6 address once, however long its prefix.
            let is_other = |noted: &&Noted| match (address_of(&noted.step), address_of(step)) {
                (Some(IpNet::V6(before)), Some(IpNet::V6(after))) => before.addr() == after.addr(),
                _ => false,
            };
            if let Some(at) = vanished.iter().position(is_other) {
                self.remove(vanished.remove(at)).await?;
            }
            self.add(step).await?;
        }
        if self.is_news(&found.applied) {
            self.ledger.is_to_apply(found.applied.clone()).context("noting what is done")?;
            self.points.pass()?;
        }
        if let Some((step, before)) = &found.mtu {
            self.done.push(Done::Mtu(*before));
            self.carry_out(step).await?;
            self.points.pass()?;
        }
        if let Some(lines) = &found.nat {
            // Before peers come who may send only what these allow.
            let before = nat::follow(self.reload.interface, lines)?;
            self.done.push(Done::Nat(before));
            self.points.pass()?;
        }
        if !found.device.is_none() {
            self.configure(&found.device.request)?;
            self.done.push(Done::Requested(found.device.back.clone()));
            self.points.pass()?;
        }
        for step in found.host.add.iter().filter(is_rule) {
            self.add(step).await?;
        }
        // Addresses go last: one that comes back is not the first one any more.
        let (addresses, others): (Vec<&Noted>, Vec<&Noted>) =
            vanished.into_iter().partition(|noted| address_of(&noted.step).is_some());
        for noted in others {
            self.remove(noted).await?;
        }
        for noted in &found.filters {
            self.remove(noted).await?;
            let Step::Firewall { family, mark, .. } = noted.step else { continue };
            let addresses = Vec::new();
            self.add(&Step::Firewall { tool: None, family, mark, addresses }).await?;
        }
        if !addresses.is_empty() {
            let _promotion = Promotion::of(self.reload.interface);
            for noted in addresses {
                self.remove(noted).await?;
            }
            let noted: Vec<Noted> = self.ledger.record().steps().cloned().collect();
            self.reload.mend(&noted).await?;
            self.points.pass()?;
        }
        self.configure(&found.device.removal)?;
        self.points.pass()?;
        if self.is_news(&found.applied) {
            self.ledger.applies(found.applied.clone()).context("noting what was done")?;
        }
        Ok(())
    }

    /// Whether the ledger is not known to say so already.
    fn is_news(&self, applied: &Applied) -> bool {
        let record = self.ledger.record();
        record.applied.as_ref() != Some(applied) || record.applying.is_some()
    }

    fn configure(&self, request: &SetRequest) -> Result<(), Failure> {
        match *request == SetRequest::default() {
            true => Ok(()),
            false => up::configure(self.reload.interface, request),
        }
    }

    async fn add(&mut self, step: &Step) -> Result<(), Failure> {
        // Priorities are not given to two interfaces at once.
        let choosing = matches!(step, Step::Rule { .. })
            .then(Ledger::choose)
            .transpose()
            .context("waiting for another `tidegate`")?;
        let context = self.reload.context(&[]);
        let Some(mut step) = steps::settle(step.clone(), &context).await? else { return Ok(()) };
        if let Step::Firewall { addresses, .. } = &mut step {
            addresses.retain(|address| !self.leaving.contains(address));
        }
        let id = self.ledger.note(step.clone()).context("noting a step")?;
        self.done.push(Done::Added(Noted { id, step: step.clone(), done: true }));
        self.points.pass()?;
        // The request of the whole device sets it.
        if !matches!(step, Step::Mark(_)) {
            self.carry_out(&step).await?;
        }
        self.points.pass()?;
        self.ledger.done(id).context("noting a step")?;
        drop(choosing);
        self.points.pass()?;
        tokio::task::yield_now().await;
        Ok(())
    }

    async fn remove(&mut self, noted: &Noted) -> Result<(), Failure> {
        self.done.push(Done::Removed(noted.clone()));
        self.undo(noted).await
    }

    async fn undo(&mut self, noted: &Noted) -> Result<(), Failure> {
        self.ledger.undoing(noted.id).context("noting a step")?;
        self.points.pass()?;
        match self.other_name_servers(noted) {
            // There is but one record of them, and it is that of the other step.
            Some(other) if other.id > noted.id => {}
            Some(other) => self.carry_out(&other.step).await?,
            None => steps::undo(&noted.step, &self.reload.context(&[])).await?,
        }
        self.points.pass()?;
        self.ledger.forget(noted.id).context("noting a step")?;
        self.points.pass()?;
        tokio::task::yield_now().await;
        Ok(())
    }

    /// For a step that sets name servers: another one, the latest, that does so too.
    fn other_name_servers(&self, noted: &Noted) -> Option<Noted> {
        let is_dns = |noted: &Noted| matches!(noted.step, Step::Dns { .. });
        let mut steps = self.ledger.record().steps();
        let other = steps.rfind(|other| other.id != noted.id && other.done && is_dns(other));
        other.filter(|_| is_dns(noted)).cloned()
    }

    async fn carry_out(&self, step: &Step) -> Result<(), Failure> {
        steps::carry_out(step, &self.reload.context(&[])).await
    }

    /// Takes back what was done, the last first; false if not all of it could be. What fails is told.
    pub(super) async fn take_back(&mut self) -> bool {
        let mut is_back = true;
        let mut loses_address = false;
        let mut has_requested = false;
        while let Some(done) = self.done.pop() {
            has_requested |= matches!(done, Done::Requested(_));
            if let Done::Added(noted) | Done::Removed(noted) = &done {
                loses_address |= address_of(&noted.step).is_some();
            }
            if let Err(failure) = self.take_back_one(done).await {
                failure.within(self.reload.interface).print();
                is_back = false;
            }
        }
        let restored = match loses_address {
            true => {
                let noted: Vec<Noted> = self.ledger.record().steps().cloned().collect();
                self.reload.mend(&noted).await
            }
            false => Ok(()),
        };
        if has_requested && let Some(before) = &self.before {
            up::tell_these_names(self.reload.interface, &before.names());
        }
        let restored = restored.and_then(|()| match self.before.take() {
            // As long as not all is back, what was begun is in doubt.
            Some(before) if is_back && (has_requested || self.is_news(&before)) => {
                let noted = self.ledger.applies(before);
                let noted = noted.and_then(|()| match self.begun.take() {
                    Some(begun) => self.ledger.is_to_apply(begun),
                    None => Ok(()),
                });
                Ok(noted.context("noting what was taken back")?)
            }
            _ => Ok(()),
        });
        if let Err(failure) = restored {
            failure.within(self.reload.interface).print();
            is_back = false;
        }
        is_back
    }

    async fn take_back_one(&mut self, done: Done) -> Result<(), Failure> {
        match done {
            Done::Confirmed(id) => self.ledger.undoing(id).context("noting a step")?,
            Done::Adopted(id) => self.ledger.forget(id).context("noting a step")?,
            Done::Added(noted) => {
                // One that the kernel refused it refuses to remove, too.
                let is_refused = match address_of(&noted.step) {
                    Some(net) => {
                        !self.reload.addresses(&self.reload.link().await?).await?.contains(&net)
                    }
                    None => false,
                };
                if is_refused {
                    return Ok(self.ledger.forget(noted.id).context("noting a step")?);
                }
                self.undo(&noted).await?;
            }
            Done::Removed(Noted { step, done, .. }) => {
                let noted = self.ledger.record().steps().find(|noted| noted.step == step);
                let id = match noted.map(|noted| noted.id) {
                    Some(id) => id,
                    None => self.ledger.note(step.clone()).context("noting a step")?,
                };
                // Whether it was there is not known, and so it stays.
                if !done {
                    return Ok(());
                }
                self.points.pass()?;
                let link = self.reload.link().await?;
                if !self.reload.add_unless_there(link.index, &step).await? {
                    // Perhaps it was not removed yet. Name servers are replaced by what is set.
                    if !matches!(step, Step::Dns { .. }) {
                        let _ = steps::undo(&step, &self.reload.context(&[])).await;
                    }
                    self.carry_out(&step).await?;
                }
                self.points.pass()?;
                self.ledger.done(id).context("noting a step")?;
            }
            Done::Requested(back) => self.configure(&back)?,
            Done::Nat(before) => drop(nat::follow(self.reload.interface, &before)?),
            Done::Mtu(before) => self.carry_out(&Step::Mtu(Some(before))).await?,
        }
        self.points.pass()
    }
}

/// While it lives, an address of a network stays when the first one of that network goes.
struct Promotion {
    path: PathBuf,
    before: Option<String>,
}

impl Promotion {
    fn of(interface: &InterfaceName) -> Promotion {
        let path =
            PathBuf::from(format!("/proc/sys/net/ipv4/conf/{interface}/promote_secondaries"));
        let before = fs::read_to_string(&path).ok();
        // Without it they go and are put back.
        let _ = fs::write(&path, "1");
        Promotion { path, before }
    }
}

impl Drop for Promotion {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(&self.path, before.trim());
        }
    }
}
