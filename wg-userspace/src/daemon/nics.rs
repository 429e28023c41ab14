//! The NICs that were named for XDP, as the data process has them: XSKs are bound as the keeper has chosen,
//! and handed to threads that run when it chooses again.
//!
//! Sessions, sockets and TUN queues know nothing of it: what is not steered while XSKs change comes by the
//! sockets.
//!
//! The XSKs of a thread that are alike share a UMEM, whatever their NICs and queues ([`SharedUmem`]). Where
//! the kernel refuses that, an XSK has its own.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use wg_common::id::WorkerId;
use wg_common::map::QUEUES_LEN;

use super::Error;
use super::mode::{BackEnds, InUse, Mode};
use super::status;
use crate::datapath::{Crew, PortChange, PortId, Ports, TX_CHUNKS, XskPort};
use crate::keeper::choice::{self, Bound, By, Plan, XskPlan};
use crate::keeper::protocol::{NamedNic, Setup};
use crate::keeper::{Keeper, NoXsk, XskAt};
use crate::xsk::{PLACES_MAX, Place, Pool, UmemId, Xsk};

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
    umems: Vec<SharedUmem>,
    /// All that were named, as the keeper has chosen last.
    named: Vec<NamedNic>,
}

/// XSKs that can share a UMEM: those of one thread, so that nobody waits for anybody, and all zero-copy or
/// none, as the kernel wants it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Kind {
    worker: WorkerId,
    chunk_size: u32,
    zero_copy: bool,
}

/// A UMEM, as those see it who open and close the XSKs that share it. Its pool is the thread's.
struct SharedUmem {
    id: UmemId,
    kind: Kind,
    /// What its XSKs are, with a descriptor of each: the kernel knows the UMEM by any of them.
    members: Vec<(PortId, OwnedFd)>,
    /// Where there may be others.
    places: Vec<Place>,
}

impl Held {
    /// How many XSKs of this kind are to be made that share no UMEM yet; one at least.
    fn expected(&self, kind: Kind, thread_count: usize) -> usize {
        let named: usize = self.named.iter().map(|nic| kind.count_of(nic, thread_count)).sum();
        let of_kind = self.umems.iter().filter(|umem| umem.kind == kind);
        let there: usize = of_kind.map(|umem| umem.members.len()).sum();
        named.saturating_sub(there).clamp(1, PLACES_MAX)
    }

    /// A place for an XSK of this kind, with another one on the same UMEM.
    fn place(&mut self, kind: Kind, id: PortId) -> Option<(Place, OwnedFd)> {
        for umem in self.umems.iter_mut().filter(|umem| umem.kind == kind) {
            let suits = |place: &Place| place.suits(id.ifindex, id.queue);
            let other = umem.members.first().and_then(|(_, socket)| socket.try_clone().ok());
            if let (Some(at), Some(other)) = (umem.places.iter().position(suits), other) {
                return Some((umem.places.swap_remove(at), other));
            }
        }
        None
    }

    /// Lets go of the descriptors of these XSKs: the threads' are the last.
    fn forget(&mut self, is_over: impl Fn(PortId) -> bool) {
        self.umems.retain_mut(|umem| {
            umem.members.retain(|(id, _)| !is_over(*id));
            !umem.members.is_empty()
        });
    }

    fn give_back(&mut self, place: Place) {
        // If there is nobody else with that UMEM, it is over.
        if let Some(umem) = self.umems.iter_mut().find(|umem| umem.id == place.umem()) {
            umem.places.push(place);
        }
    }
}

impl Kind {
    /// Of a queue's XSK, if there is to be one.
    fn of(nic: &NamedNic, queue: u32, thread_count: usize) -> Option<Self> {
        let Plan::Xsk(plan) = &nic.plan else { return None };
        Some(Self {
            worker: WorkerId((queue as usize % thread_count) as u16),
            chunk_size: plan.chunk_size,
            zero_copy: plan.zero_copy.contains(&queue),
        })
    }

    fn count_of(self, nic: &NamedNic, thread_count: usize) -> usize {
        let is_it = |&queue: &u32| Self::of(nic, queue, thread_count) == Some(self);
        (0..nic.queue_count).filter(is_it).count()
    }
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
    ) -> Result<(Self, Vec<Ports>), Error> {
        let held = Held {
            nics: Vec::new(),
            slots: (0..QUEUES_LEN).collect(),
            umems: Vec::new(),
            named: setup.nics.clone(),
        };
        let nics = Self {
            keeper: Rc::clone(keeper),
            crew: Arc::clone(crew),
            asked: setup.mode,
            chosen: Cell::default(),
            changed: Notify::new(),
            served_anew: Notify::new(),
            held: RefCell::new(held),
            in_use: InUse::default(),
        };
        let mut of_thread: Vec<Ports> =
            (0..crew.thread_count()).map(|_| Ports::default()).collect();
        for named in &setup.nics {
            for (worker, port, pool) in nics.bind(named)? {
                of_thread[usize::from(worker.0)].open(port, pool);
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
        self.held.borrow_mut().named.clone_from(&named);
        let ports: Vec<HeldPort> = over.into_iter().flat_map(|nic| nic.ports).collect();
        self.close(ports).await;
        for named in &named {
            let is_held = |held: &HeldNic| held.named.generation == named.generation;
            if self.held.borrow().nics.iter().any(is_held) {
                continue;
            }
            match self.bind(named) {
                Ok(ports) => {
                    for (worker, port, pool) in ports {
                        self.give(worker, port, pool).await;
                    }
                }
                // It ran before: sockets do what was asked for to begin with.
                Err(error) => tracing::error!(%error, "sockets instead"),
            }
        }
        self.publish();
    }

    /// Has an XSK bound to each queue of a NIC. Some bring the pool of a UMEM that those after them share.
    fn bind(&self, named: &NamedNic) -> Result<Vec<(WorkerId, XskPort, Option<Pool>)>, Error> {
        let (mut ports, mut held, mut bound) = (Vec::new(), Vec::new(), Vec::new());
        let busy_polls = matches!(&named.plan, Plan::Xsk(XskPlan { busy_poll: Some(Ok(())), .. }));
        let may_send = matches!(&named.plan, Plan::Xsk(XskPlan { by_socket: None, .. }));
        for queue in 0..named.queue_count {
            let Some(kind) = Kind::of(named, queue, self.crew.thread_count()) else { break };
            let Some(slot) = self.held.borrow_mut().slots.pop_first() else {
                bound.push(Bound::Refused(format!("there are {QUEUES_LEN} XSKs already")));
                break;
            };
            match self.bind_one(named, XskAt { queue, slot, worker: kind.worker.0 }, kind) {
                Ok((xsk, is_zero_copy, pool)) => {
                    bound.push(if is_zero_copy { Bound::ZeroCopy } else { Bound::Copy });
                    let id = PortId { ifindex: named.ifindex, queue };
                    held.push(HeldPort { id, worker: kind.worker, slot });
                    let transmits = may_send && (is_zero_copy || transmits_in_tests());
                    if transmits {
                        self.crew.note_transmits();
                    }
                    let mut port = XskPort::new(xsk, named.ifindex, transmits);
                    port.busy_polls = busy_polls;
                    ports.push((kind.worker, port, pool));
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
        let outcome = if refused {
            let mut all = self.held.borrow_mut();
            all.forget(|id| held.iter().any(|port: &HeldPort| port.id == id));
            all.slots.extend(held.drain(..).map(|port| port.slot));
            let left = ports.into_iter().filter_map(|(_, port, _)| port.xsk.close());
            left.for_each(|place| all.give_back(place));
            Err(Error::NoZeroCopy(format!("{name}: {reason}")))
        } else {
            Ok(ports)
        };
        self.held.borrow_mut().nics.push(HeldNic { named: named.clone(), ports: held, status });
        outcome
    }

    /// Has an XSK bound, with the UMEM of others that are alike, or else with one that others can share.
    fn bind_one(
        &self,
        named: &NamedNic,
        at: XskAt,
        kind: Kind,
    ) -> Result<(Xsk, bool, Option<Pool>), NoXsk> {
        let id = PortId { ifindex: named.ifindex, queue: at.queue };
        let place = self.held.borrow_mut().place(kind, id);
        if let Some((place, other)) = place {
            match self.keeper.bind_sharing_xsk(named, at, place, other.as_fd()) {
                Ok((xsk, is_zero_copy)) => {
                    self.note_member(&xsk, id, kind, Vec::new());
                    return Ok((xsk, is_zero_copy, None));
                }
                Err((error, place)) => {
                    place.into_iter().for_each(|place| self.held.borrow_mut().give_back(place));
                    let NoXsk::CannotShare(reason) = error else { return Err(error) };
                    let (nic, queue) = (&named.name, at.queue);
                    tracing::debug!(nic, queue, reason, "a UMEM of its own");
                }
            }
        }
        let count = self.held.borrow().expected(kind, self.crew.thread_count());
        let to_send = if kind.zero_copy || transmits_in_tests() { TX_CHUNKS } else { 0 };
        let ((pool, xsk, places), is_zero_copy) =
            self.keeper.bind_xsk(named, at, (count, to_send))?;
        self.note_member(&xsk, id, Kind { zero_copy: is_zero_copy, ..kind }, places);
        Ok((xsk, is_zero_copy, Some(pool)))
    }

    /// Takes note of who shares a UMEM.
    fn note_member(&self, xsk: &Xsk, id: PortId, kind: Kind, places: Vec<Place>) {
        // Without another descriptor it is alone.
        let Ok(socket) = xsk.as_fd().try_clone_to_owned() else { return };
        let umems = &mut self.held.borrow_mut().umems;
        match umems.iter_mut().find(|umem| umem.id == xsk.umem()) {
            Some(umem) => umem.members.push((id, socket)),
            None => {
                let members = vec![(id, socket)];
                umems.push(SharedUmem { id: xsk.umem(), kind, members, places });
            }
        }
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
    async fn give(&self, worker: WorkerId, port: XskPort, pool: Option<Pool>) {
        if !self.tell(worker, PortChange::Open(port, pool)).await {
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
        let is_over = |id: PortId| ports.iter().any(|port| port.id == id);
        self.held.borrow_mut().forget(is_over);
        let mut waited_for = Vec::new();
        for port in ports {
            if self.tell(port.worker, PortChange::Close(port.id)).await {
                waited_for.push(port);
            }
        }
        let until = Instant::now() + THREAD_TIMEOUT;
        while !waited_for.is_empty() && Instant::now() < until {
            while let Some((id, closed)) = self.crew.take_closed() {
                // Here, not in the thread: it takes the kernel some milliseconds.
                let place = closed.and_then(|(port, _pool)| port.xsk.close());
                place.into_iter().for_each(|place| self.held.borrow_mut().give_back(place));
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
