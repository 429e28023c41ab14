//! The NICs that were named for XDP, as the data process has them: XSKs are bound as the keeper has chosen,
//! and handed to threads that run when it chooses again.
//!
//! Sessions, sockets and TUN queues know nothing of it: what is not steered while XSKs change comes by the
//! sockets.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use wg_common::id::WorkerId;
use wg_common::map::QUEUES_LEN;

use super::Error;
use super::mode::{BackEnds, InUse, Mode};
use super::status;
use crate::datapath::{Crew, PortChange, PortId, XskPort};
use crate::keeper::choice::{self, Bound, By, Plan};
use crate::keeper::protocol::{NamedNic, Setup};
use crate::keeper::{Keeper, NoXsk};

/// A thread that does not take or give an XSK for so long is stuck, and keeps what it has.
const THREAD_TIMEOUT: Duration = Duration::from_secs(2);
const BETWEEN_LOOKS: Duration = Duration::from_millis(2);

/// The NICs and their XSKs.
pub struct Nics {
    keeper: Rc<Keeper>,
    crew: Arc<Crew>,
    asked: Mode,
    /// What the keeper has chosen last, if that was not looked at yet.
    chosen: Cell<Option<Vec<NamedNic>>>,
    changed: Notify,
    /// What was chosen has been done.
    served_anew: Notify,
    held: RefCell<Held>,
    in_use: InUse,
}

/// What threads have, and the numbers that are free in the map of XSKs.
struct Held {
    nics: Vec<HeldNic>,
    slots: BTreeSet<u32>,
}

/// A NIC whose XSKs threads have.
struct HeldNic {
    named: NamedNic,
    ports: Vec<HeldPort>,
    status: status::Nic,
}

/// An XSK that a thread has.
#[derive(Clone, Copy)]
struct HeldPort {
    id: PortId,
    worker: WorkerId,
    slot: u32,
}

impl Nics {
    /// Binds XSKs as the keeper has chosen; gives those of each thread, too: queue *q* belongs to thread *q*
    /// modulo their number.
    ///
    /// # Errors
    /// [`Error::NoZeroCopy`] if that was asked for, and the driver refuses.
    pub fn begin(
        keeper: &Rc<Keeper>,
        setup: &Setup,
        crew: &Arc<Crew>,
    ) -> Result<(Self, Vec<Vec<XskPort>>), Error> {
        let nics = Self {
            keeper: Rc::clone(keeper),
            crew: Arc::clone(crew),
            asked: setup.mode,
            chosen: Cell::default(),
            changed: Notify::new(),
            served_anew: Notify::new(),
            held: RefCell::new(Held { nics: Vec::new(), slots: (0..QUEUES_LEN).collect() }),
            in_use: InUse::default(),
        };
        let mut of_thread: Vec<Vec<XskPort>> =
            (0..crew.thread_count()).map(|_| Vec::new()).collect();
        for named in &setup.nics {
            for (worker, port) in nics.bind(named)? {
                of_thread[usize::from(worker.0)].push(port);
            }
        }
        nics.publish();
        Ok((nics, of_thread))
    }

    /// The back ends in use.
    pub fn in_use(&self) -> InUse {
        Rc::clone(&self.in_use)
    }

    /// Takes note of what the keeper has chosen.
    pub fn chosen_again(&self, named: Vec<NamedNic>) {
        self.chosen.set(Some(named));
        self.changed.notify_one();
    }

    /// Does what the keeper chooses, whenever it does.
    pub async fn follow(&self) {
        loop {
            self.changed.notified().await;
            while let Some(named) = self.chosen.take() {
                self.change(named).await;
                self.served_anew.notify_one();
            }
        }
    }

    /// Waits until NICs are served in another way than before: other datagrams may leave by XSKs now.
    pub async fn served_anew(&self) {
        self.served_anew.notified().await;
    }

    async fn change(&self, named: Vec<NamedNic>) {
        let is_as_before =
            |held: &HeldNic| named.iter().any(|named| named.generation == held.named.generation);
        let (kept, over): (Vec<HeldNic>, Vec<HeldNic>) =
            std::mem::take(&mut self.held.borrow_mut().nics).into_iter().partition(is_as_before);
        self.held.borrow_mut().nics = kept;
        let ports: Vec<HeldPort> = over.into_iter().flat_map(|nic| nic.ports).collect();
        self.close(ports).await;
        for named in &named {
            let is_held = |held: &HeldNic| held.named.generation == named.generation;
            if self.held.borrow().nics.iter().any(is_held) {
                continue;
            }
            match self.bind(named) {
                Ok(ports) => {
                    for (worker, port) in ports {
                        self.give(worker, port).await;
                    }
                }
                // It ran before: sockets do what was asked for to begin with.
                Err(error) => tracing::error!(%error, "sockets instead"),
            }
        }
        self.publish();
    }

    /// Has an XSK bound to each queue of a NIC.
    fn bind(&self, named: &NamedNic) -> Result<Vec<(WorkerId, XskPort)>, Error> {
        let (mut ports, mut held, mut bound) = (Vec::new(), Vec::new(), Vec::new());
        let queue_count = if matches!(named.plan, Plan::Xsk(_)) { named.queue_count } else { 0 };
        for queue in 0..queue_count {
            let Some(slot) = self.held.borrow_mut().slots.pop_first() else {
                bound.push(Bound::Refused(format!("there are {QUEUES_LEN} XSKs already")));
                break;
            };
            let worker = WorkerId((queue as usize % self.crew.thread_count()) as u16);
            match self.keeper.bind_xsk(named, queue, slot, worker.0) {
                Ok((xsk, is_zero_copy)) => {
                    bound.push(if is_zero_copy { Bound::ZeroCopy } else { Bound::Copy });
                    let id = PortId { ifindex: named.ifindex, queue };
                    held.push(HeldPort { id, worker, slot });
                    let transmits = is_zero_copy || transmits_in_tests();
                    if transmits {
                        self.crew.note_transmits();
                    }
                    ports.push((worker, XskPort::new(xsk, named.ifindex, transmits)));
                }
                Err(error) => {
                    self.held.borrow_mut().slots.insert(slot);
                    // Drivers make room for more queues than they use.
                    if matches!(error, NoXsk::NoQueue) && queue > 0 {
                        break;
                    }
                    tracing::warn!(nic = named.name, queue, %error, "no XSK; sockets instead");
                    bound.push(Bound::Refused(error.to_string()));
                }
            }
        }
        let choice = choice::choice(&named.plan, &bound);
        let status = status::Nic {
            name: named.name.clone(),
            queues: held.len() as u32,
            zero_copy: choice.receive == By::ZeroCopy,
            receive: choice.receive,
            transmit: choice.transmit,
            reason: choice.reason,
        };
        let status::Nic { name, receive, transmit, reason, .. } = &status;
        let (receive, transmit) = (receive.name(), transmit.name());
        let refused = match &named.plan {
            Plan::Xsk(plan) => plan.must && !plan.zero_copy.is_empty() && !status.zero_copy,
            Plan::Impossible { .. } => true,
            _ => false,
        };
        tracing::info!(nic = name, receive, transmit, reason, "chosen");
        let outcome =
            if refused { Err(Error::NoZeroCopy(format!("{name}: {reason}"))) } else { Ok(ports) };
        let is_held = outcome.is_ok();
        if !is_held {
            self.held.borrow_mut().slots.extend(held.drain(..).map(|port| port.slot));
        }
        self.held.borrow_mut().nics.push(HeldNic { named: named.clone(), ports: held, status });
        outcome
    }

    fn publish(&self) {
        let nics = self.held.borrow().nics.iter().map(|nic| nic.status.clone()).collect();
        let back_ends = BackEnds::new(self.asked, nics);
        if back_ends.name() == "udp" && matches!(self.asked, Mode::Native | Mode::ZeroCopy) {
            tracing::warn!(reason = back_ends.reason, "XDP was asked for, sockets are in use");
        }
        *self.in_use.borrow_mut() = back_ends;
    }

    /// Hands an XSK to the thread that is to serve it.
    async fn give(&self, worker: WorkerId, port: XskPort) {
        if !self.tell(worker, PortChange::Open(port)).await {
            tracing::error!(
                worker = worker.0,
                "a thread takes no XSK: its packets pass to sockets"
            );
        }
    }

    async fn tell(&self, worker: WorkerId, change: PortChange) -> bool {
        let until = Instant::now() + THREAD_TIMEOUT;
        let mut change = change;
        while let Err(refused) = self.crew.change_port(worker, change) {
            if Instant::now() > until {
                return false;
            }
            change = refused;
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        true
    }

    /// Takes XSKs back from threads and closes them.
    async fn close(&self, ports: Vec<HeldPort>) {
        let mut waited_for = Vec::new();
        for port in ports {
            if self.tell(port.worker, PortChange::Close(port.id)).await {
                waited_for.push(port);
            }
        }
        let until = Instant::now() + THREAD_TIMEOUT;
        while !waited_for.is_empty() && Instant::now() < until {
            while let Some((id, port)) = self.crew.take_closed() {
                // Here, not in the thread: it takes the kernel some milliseconds.
                drop(port);
                if let Some(at) = waited_for.iter().position(|port| port.id == id) {
                    self.held.borrow_mut().slots.insert(waited_for.swap_remove(at).slot);
                }
            }
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        if !waited_for.is_empty() {
            tracing::error!(count = waited_for.len(), "threads do not let go of XSKs");
        }
    }
}

/// A hook for tests: `TIDEGATE_TEST_XSK_TRANSMIT=1` has XSKs send, too, where that is slower than a socket: in
/// copy mode.
fn transmits_in_tests() -> bool {
    cfg!(debug_assertions) && std::env::var("TIDEGATE_TEST_XSK_TRANSMIT").is_ok_and(|it| it == "1")
}
