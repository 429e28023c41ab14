//! The NICs that were named for XDP: the steer program is attached to those that are there, as [`choice`] says,
//! and everything is chosen again when something about them changes.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use wg_common::index::IndexPermutation;
use wg_common::map::{QueueEntry, QueueKey};

use super::choice::{self, Facts, NotApart, Plan, XskPlan};
use super::protocol::NamedNic;
use crate::bpf::{Steer, SteerOptions};
use crate::daemon::{Error, Mode, Options};
use crate::host::{Host, Link, xdp_features};
use crate::sys::{ethtool, xdp};
use crate::xsk::{self, BindMode, XskError, XskOptions};

/// The NICs that were named, and the kernel side.
pub struct Nics {
    mode: Mode,
    /// Whether threads are to ask NICs for packets, and why this kernel cannot, if it cannot.
    busy_poll: Option<Result<(), String>>,
    /// The kernel side, if it was wanted and loads.
    pub steer: Option<Steer>,
    /// Why it does not load.
    not_loaded: Option<String>,
    named: Vec<Nic>,
    /// Of the latest plan.
    generation: u64,
}

/// A NIC that was named.
struct Nic {
    name: String,
    /// Index, if there is an interface of this name.
    ifindex: u32,
    /// What the plan was made of; nothing where there is no such interface.
    facts: Option<Facts>,
    /// The number of the program on it that is not ours.
    foreign: Option<u32>,
    plan: Plan,
    generation: u64,
    /// Why sockets are to send in any case, if they are.
    by_socket: Option<String>,
    /// Its queues with an XSK.
    bound: BTreeSet<u32>,
}

impl Nic {
    /// Queues that it receives by.
    fn queue_count(&self) -> u32 {
        self.facts.as_ref().map_or(0, |facts| facts.queue_count)
    }
}

/// Why there is no XSK for a queue.
pub enum NotBound {
    /// There is no such queue.
    NoQueue,
    /// It cannot share that UMEM.
    CannotShare(String),
    /// For another reason.
    Refused(String),
}

impl Nics {
    /// Loads the kernel side if NICs were named and may be used. Nothing is attached yet.
    pub fn new(options: &Options, indexes: IndexPermutation) -> Self {
        let nic = |name: &String| Nic {
            name: name.clone(),
            ifindex: 0,
            facts: None,
            foreign: None,
            plan: Plan::Attach,
            generation: 0,
            by_socket: options
                .by_socket
                .iter()
                .find(|(nic, _)| nic == name)
                .map(|(_, why)| why.clone()),
            bound: BTreeSet::new(),
        };
        let named = options.xdp.iter().map(nic).collect();
        let busy_poll = options.busy_poll.then(|| {
            xdp::can_busy_poll().map_err(|error| format!("the kernel refuses it: {error}"))
        });
        let mut nics = Self {
            mode: options.mode,
            busy_poll,
            steer: None,
            not_loaded: None,
            named,
            generation: 0,
        };
        if options.mode != Mode::Udp && !options.xdp.is_empty() {
            let log = tracing::enabled!(target: "wg_ebpf", tracing::Level::DEBUG);
            match Steer::load(SteerOptions { log, ..SteerOptions::new(indexes) }) {
                Ok(steer) => nics.steer = Some(steer),
                Err(error) => {
                    tracing::warn!(%error, "no kernel side; sockets instead");
                    nics.not_loaded = Some(error.to_string());
                }
            }
        }
        nics
    }

    /// Whether any were named.
    pub fn is_any_named(&self) -> bool {
        !self.named.is_empty()
    }

    /// All that were named, and what is to be done with them.
    pub fn named(&self) -> Vec<NamedNic> {
        let named = self.named.iter().map(|nic| NamedNic {
            name: nic.name.clone(),
            ifindex: nic.ifindex,
            queue_count: nic.queue_count(),
            generation: nic.generation,
            plan: nic.plan.clone(),
        });
        named.collect()
    }

    /// An error if there is a NIC with which what was asked for cannot be done.
    ///
    /// # Errors
    /// [`Error::NoZeroCopy`].
    pub fn check(&self) -> Result<(), Error> {
        for Nic { name, plan, .. } in &self.named {
            if let Plan::Impossible { reason } = plan {
                return Err(Error::NoZeroCopy(format!("{name}: {reason}")));
            }
        }
        Ok(())
    }

    /// Looks at the NICs, and chooses again for those of which something has changed; says whether there were
    /// any. `ports` are those that somebody has chosen.
    pub async fn follow(&mut self, host: &Host, ports: &[u16]) -> bool {
        let mut changed = false;
        for at in 0..self.named.len() {
            let link = match host.link(&self.named[at].name).await {
                Ok(link) => link,
                Err(error) => {
                    tracing::warn!(%error, "looking at a NIC");
                    continue;
                }
            };
            changed |= self.follow_one(at, link.as_ref(), ports);
        }
        changed
    }

    /// Chooses again for a NIC, if it is not as it was; says whether another plan came of it.
    fn follow_one(&mut self, at: usize, link: Option<&Link>, ports: &[u16]) -> bool {
        let nic = &mut self.named[at];
        let ifindex = link.map_or(0, |link| link.index);
        let ours = self.steer.as_ref().and_then(Steer::program_id);
        let foreign = link.and_then(|link| link.xdp_program).filter(|&id| Some(id) != ours);
        let by_socket = &nic.by_socket;
        let facts = link.map(|link| Facts {
            by_socket: by_socket.clone(),
            busy_poll: self.busy_poll.clone().map(|can| {
                let of_veth = "nothing interrupts for a veth: who sends brings its packets in";
                if link.is_veth { Err(of_veth.to_owned()) } else { can }
            }),
            ..facts(link, ports)
        });
        let same_place = (nic.ifindex, nic.foreign) == (ifindex, foreign);
        let same_facts = match (&nic.facts, &facts) {
            (Some(before), Some(now)) => {
                *before == Facts { attached: before.attached.clone(), ..now.clone() }
            }
            (before, now) => before.is_none() && now.is_none(),
        };
        if same_place && same_facts && nic.plan != Plan::Attach {
            return false;
        }
        if nic.ifindex != ifindex
            && let Some(steer) = &mut self.steer
        {
            // Which an interface that was deleted has taken with it, but for what we keep of it.
            steer.detach_index(nic.ifindex);
        }
        let before = (nic.ifindex, nic.queue_count(), nic.plan.clone());
        (nic.ifindex, nic.foreign, nic.facts) = (ifindex, foreign, facts);
        nic.plan = match (&self.not_loaded, &mut nic.facts) {
            (Some(reason), _) if self.mode == Mode::ZeroCopy => {
                Plan::Impossible { reason: reason.clone() }
            }
            (Some(reason), _) => Plan::Sockets { reason: reason.clone() },
            (None, None) if self.mode == Mode::Udp => {
                Plan::Sockets { reason: "asked for".to_owned() }
            }
            (None, None) => Plan::Sockets { reason: "it is not there yet".to_owned() },
            (None, Some(facts)) => plan(self.mode, self.steer.as_mut(), ifindex, facts),
        };
        if before == (ifindex, nic.queue_count(), nic.plan.clone()) && nic.generation != 0 {
            return false;
        }
        self.generation += 1;
        nic.generation = self.generation;
        // What its queues get passes until there are XSKs again.
        self.unset_queues(at, before.0);
        true
    }

    /// Has the kernel side forget the XSKs of a NIC, which has or had this index.
    fn unset_queues(&mut self, at: usize, ifindex: u32) {
        let nic = &mut self.named[at];
        let queues = std::mem::take(&mut nic.bound);
        let Some(steer) = &mut self.steer else { return };
        for queue in queues {
            if let Err(error) = steer.unset_queue(QueueKey { ifindex, queue }) {
                tracing::warn!(nic = nic.name, queue, %error, "giving a queue back");
            }
        }
    }

    /// Lets the kernel side forget the XSKs of a data process that is gone.
    pub fn forget_process(&mut self) {
        for at in 0..self.named.len() {
            self.unset_queues(at, self.named[at].ifindex);
        }
    }

    /// How XSKs on the NIC with this index are to be made, if it still is as that generation says.
    pub fn xsk_options(&self, ifindex: u32, generation: u64) -> Option<XskOptions> {
        self.xsk_plan(ifindex, generation).map(|(_, plan)| options(plan))
    }

    fn xsk_plan(&self, ifindex: u32, generation: u64) -> Option<(usize, &XskPlan)> {
        let is_it = |nic: &Nic| nic.ifindex == ifindex && nic.generation == generation;
        let at = self.named.iter().position(is_it)?;
        match &self.named[at].plan {
            Plan::Xsk(plan) => Some((at, plan)),
            _ => None,
        }
    }

    /// Binds an XSK to a queue as was chosen, with the UMEM of `other` if there is one, and has the steer
    /// program use it under the number of `entry`; says whether it is zero-copy.
    ///
    /// # Errors
    /// [`NotBound`].
    pub fn bind(
        &mut self,
        (socket, other): (&OwnedFd, Option<&OwnedFd>),
        QueueKey { ifindex, queue }: QueueKey,
        generation: u64,
        entry: impl FnOnce(u32) -> QueueEntry,
    ) -> Result<bool, NotBound> {
        let refused = |error: &dyn std::fmt::Display| NotBound::Refused(error.to_string());
        let Some((at, plan)) = self.xsk_plan(ifindex, generation) else {
            return Err(refused(&"it is chosen anew how this NIC receives"));
        };
        let mode = match (plan.zero_copy.contains(&queue), plan.must) {
            (false, _) => BindMode::Copy,
            (true, false) => BindMode::Auto,
            (true, true) => BindMode::ZeroCopy,
        };
        let entry = entry(options(plan).packet_len_max() as u32);
        match other {
            None => xsk::bind(socket, ifindex, queue, mode).map_err(|error| match error {
                XskError::NoQueue { .. } => NotBound::NoQueue,
                error => refused(&error),
            }),
            // It gets what the other is; no queue is zero-copy that was not to be.
            Some(other) if is_zero_copy(other) != Some(mode != BindMode::Copy) => {
                Err(NotBound::CannotShare("one of them is zero-copy".to_owned()))
            }
            Some(other) => {
                let bound = xsk::bind_sharing(socket, ifindex, queue, other);
                bound.map_err(|error| match error {
                    XskError::Busy { .. } => refused(&error),
                    error => NotBound::CannotShare(error.to_string()),
                })
            }
        }?;
        // What it is, not what it was asked to be.
        let is_zero_copy = xdp::is_zero_copy(socket).map_err(|error| refused(&error))?;
        if plan.busy_poll == Some(Ok(()))
            && let Err(error) = xdp::prefer_busy_poll(socket)
        {
            tracing::warn!(nic = self.named[at].name, queue, %error, "no busy polling");
        }
        let Some(steer) = &mut self.steer else {
            return Err(refused(&"there is no steer program"));
        };
        let key = QueueKey { ifindex, queue };
        steer
            .set_queue(key, entry, std::os::fd::AsFd::as_fd(socket))
            .map_err(|error| refused(&error))?;
        self.named[at].bound.insert(queue);
        Ok(is_zero_copy)
    }
}

/// Whether an XSK is; nothing if it is none.
fn is_zero_copy(socket: &OwnedFd) -> Option<bool> {
    xdp::is_zero_copy(socket).ok()
}

fn options(plan: &XskPlan) -> XskOptions {
    XskOptions { chunk_size: plan.chunk_size, ..XskOptions::default() }
}

/// What the host says of a NIC. Whether the steer program can be attached is not known yet.
fn facts(link: &Link, ports: &[u16]) -> Facts {
    let name = &link.name;
    // Drivers make room for more queues than they use.
    let in_use = ethtool::rx_queue_count(name).ok().filter(|&count| count > 0);
    let queue_count = in_use.unwrap_or(link.rx_queue_count).min(link.rx_queue_count);
    Facts {
        name: name.clone(),
        is_veth: link.is_veth,
        features: xdp_features(link.index),
        mtu: link.mtu,
        queue_count,
        apart: set_apart(name, queue_count, ports),
        attached: None,
        by_socket: None,
        busy_poll: None,
    }
}

fn set_apart(name: &str, queue_count: u32, ports: &[u16]) -> Result<BTreeSet<u32>, NotApart> {
    let (spread, rules) = (ethtool::spread(name, 0).ok(), ethtool::rules(name).ok());
    let context = |number| ethtool::spread(name, number).ok();
    choice::set_apart(ports, queue_count, spread.as_deref(), rules.as_deref(), context)
}

/// The plan for a NIC; attaches the steer program where there is to be one, and takes it off where there is
/// not.
fn plan(mode: Mode, steer: Option<&mut Steer>, ifindex: u32, facts: &mut Facts) -> Plan {
    let Some(steer) = steer else { return choice::plan(mode, facts) };
    if steer.is_attached(ifindex) {
        facts.attached = Some(Ok(()));
    }
    let mut plan = choice::plan(mode, facts);
    if plan == Plan::Attach {
        let attached = steer.attach(&facts.name);
        facts.attached = Some(attached.map_err(|error| error.to_string()));
        plan = choice::plan(mode, facts);
    }
    if !matches!(plan, Plan::Xsk(_)) {
        steer.detach_index(ifindex);
    }
    plan
}
