//! Answers wg(8) and carries each change of the device to the rooms that it concerns.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use hashbrown::HashSet;
use wg_common::id::{PeerId, WorkerId};
use wg_common::time::Now;
use zeroize::Zeroizing;

use super::effects::carry_out;
use super::mode::InUse;
use super::names::Names;
use super::pull::Pulling;
use super::quiesce;
use super::remember::Remembering;
use super::status::{PEER_TROUBLES_MAX, Quiesced, Status, Steering, TroubleStatus};
use super::tun_steering::TunSteering;
use super::watchdog::Watchdog;
use crate::counters::{Path, Totals};
use crate::datapath::shared::PEER_COUNT_MAX;
use crate::datapath::{Shared, SocketGroup};
use crate::device::{Device, Effect, PacketRules, PeerChange, SetRequest};
use crate::handshake::Handshakes;
use crate::keeper::Keeper;
use crate::keeper::protocol::Refusal;
use crate::key::PublicKey;
use crate::sandbox;
use crate::session::{Break, Continuity, HotPeer};
use crate::sys::clock;
use crate::sys::memory::give_back_free_memory;
use crate::uapi::{self, EndpointName, Errno, GetCursor, PeerStatus};

/// The watchdog looks at the workers this often, and what nobody tells is noticed.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A look that comes so long after the one before is told.
const LATE: Duration = LOOK_EVERY.saturating_mul(2);
/// Peers of a request that are applied between two looks at the timers, and effects of it that are
/// carried out.
const APPLIED_AT_ONCE: usize = 4096;
const CARRIED_OUT_AT_ONCE: usize = 64;
/// After so many effects of a request, the memory that it took, or those whom it removed, is given back to
/// the host.
const MANY_EFFECTS: usize = 10_000;

/// The control plane of one device.
pub struct Control {
    /// What it shares with the workers.
    pub shared: Arc<Shared>,
    pub(super) device: RefCell<Device>,
    pub(super) handshakes: Arc<Handshakes>,
    /// A source of peers that are not configured, if there is one.
    pub(super) pulling: Option<Pulling>,
    /// Who opens what this process may not; nothing in tests.
    pub(super) keeper: Option<Rc<Keeper>>,
    /// Whether the kernel chooses TUN queues as we say.
    pub(super) tun_steering: TunSteering,
    /// Whether the kernel chooses sockets as we say.
    socket_steering: Steering,
    /// Endpoints that were given as names.
    pub(super) names: RefCell<Names>,
    /// What this process may still do, if it was confined.
    privileges: Cell<Option<sandbox::Report>>,
    back_ends: InUse,
    aead: &'static str,
    pub(super) fwmark: Cell<u32>,
    /// Sockets before the present ones, with their port, while workers may use them.
    former_sockets: RefCell<Vec<(u16, Weak<SocketGroup>)>>,
    /// The memory for a successor, if there is somebody to keep it.
    pub(super) remembering: RefCell<Option<Remembering>>,
    /// Peers that had sessions with a predecessor of this process.
    pub(super) to_reach: RefCell<VecDeque<PeerId>>,
    watchdog: RefCell<Watchdog>,
    continuity: RefCell<Continuity>,
    /// When this thread last looked at timers and workers.
    ticked: Cell<Now>,
    /// When it last looked by which links peers are reached.
    pub(super) ways_looked: Cell<Now>,
    /// Peers to whom XSKs send, whose ways are to be looked at anew; and when there were some the last time.
    pub(super) ways_in_use: RefCell<Vec<Arc<HotPeer>>>,
    pub(super) ways_gathered: Cell<Now>,
    /// Sessions were cleared for everything that ended keypairs before.
    cleared: Cell<Now>,
    /// How often all sessions were cleared, and why.
    clearings: RefCell<BTreeMap<&'static str, u64>>,
}

impl Control {
    /// Control of a device that has no key and no peers yet.
    pub fn new(
        shared: Arc<Shared>,
        handshakes: Arc<Handshakes>,
        keeper: Option<Rc<Keeper>>,
        back_ends: InUse,
        aead: &'static str,
    ) -> Self {
        let watchdog = RefCell::new(Watchdog::new(shared.workers.len()));
        Self {
            watchdog,
            shared,
            device: RefCell::default(),
            handshakes,
            pulling: None,
            keeper,
            tun_steering: TunSteering::off("nobody asked for it"),
            socket_steering: Steering::off("nobody asked for it"),
            names: RefCell::default(),
            privileges: Cell::default(),
            back_ends,
            aead,
            fwmark: Cell::new(0),
            remembering: RefCell::default(),
            to_reach: RefCell::default(),
            continuity: RefCell::default(),
            ticked: Cell::default(),
            ways_looked: Cell::default(),
            ways_in_use: RefCell::default(),
            ways_gathered: Cell::default(),
            cleared: Cell::default(),
            clearings: RefCell::default(),
            former_sockets: RefCell::default(),
        }
    }

    /// Has peers that nobody configured pulled from a source when they knock.
    #[must_use]
    pub fn with_pulling(self, pulling: Option<Pulling>) -> Self {
        Self { pulling, ..self }
    }

    /// Does to packets what the process was started with. To be called before anybody says otherwise.
    pub(super) fn follow_rules(&self, PacketRules { mss_clamp, copy_dscp }: PacketRules) {
        let request = SetRequest {
            mss_clamp: Some(mss_clamp),
            copy_dscp: Some(copy_dscp),
            ..SetRequest::default()
        };
        let effects = self.device.borrow_mut().apply(request);
        effects.into_iter().for_each(|effect| self.carry_out(effect));
    }

    /// Takes note of how datagrams come to workers.
    #[must_use]
    pub fn with_socket_steering(self, socket_steering: Steering) -> Self {
        Self { socket_steering, ..self }
    }

    /// Takes note of how this process was confined.
    pub fn set_privileges(&self, privileges: sandbox::Report) {
        self.privileges.set(Some(privileges));
    }

    /// The best back end in use, as options name it.
    pub fn mode(&self) -> &'static str {
        self.back_ends.borrow().name()
    }

    /// Name of the AEAD's back end in use.
    pub fn aead(&self) -> &'static str {
        self.aead
    }

    /// Runs what is due. To be called when [`sleep_time`](Self::sleep_time) is over.
    pub fn tick(&self) {
        let now = self.tick_sessions();
        self.pull_tick(now);
        self.reach_tick(now);
        self.names_tick(now);
        self.ways_tick(now);
        self.remember_tick(now);
        self.owners_tick();
    }

    /// The part of a tick that neither looks at the device nor changes it, if it is time for one: a
    /// request of many peers takes long to carry out, and must not be seen half done.
    fn tick_if_due(&self) {
        if self.sessions_sleep_time().is_zero() {
            self.tick_sessions();
        }
    }

    fn tick_sessions(&self) -> Now {
        let now = self.now();
        let before = self.ticked.replace(now);
        let late = now.since(before);
        if before != Now::default() && late > LATE {
            tracing::debug!(?late, "the control thread was busy");
        }
        self.follow_break();
        if quiesce::is_over(&self.shared, now) {
            self.resume();
        }
        self.close_former_sockets();
        self.watchdog.borrow_mut().look(&self.shared, &self.handshakes, now);
        self.handshakes.tick(now);
        now
    }

    /// The present moment, for what may seal something or begin a handshake. Of a break of time that
    /// nobody has looked for yet, no keypair from before is used when this returns; what follows from
    /// that is left to [`tick`](Self::tick).
    pub(super) fn now(&self) -> Now {
        self.shared.now_of(&mut self.continuity.borrow_mut(), &clock::reading())
    }

    /// How long there is nothing to do for [`tick`](Self::tick), if nothing is heard from
    /// [`sooner`](Self::sooner).
    pub fn sleep_time(&self) -> Duration {
        let owners = self.owners_due(self.ticked.get());
        let owners = owners.map_or(Duration::MAX, |due| due.since(clock::boot_now()));
        self.sessions_sleep_time().min(owners)
    }

    fn sessions_sleep_time(&self) -> Duration {
        sleep_time(self.handshakes.next_timeout(), self.ticked.get(), clock::boot_now())
    }

    /// Waits until there is something to do sooner than was said.
    pub async fn sooner(&self) {
        self.handshakes.sooner().await;
    }

    /// This virtual machine is a copy, or went back: what it seals with now, another one may have used.
    pub fn cloned(&self) {
        self.shared.end_keypairs(clock::boot_now());
        self.shared.wake_all();
        self.clear_sessions("cloned");
    }

    /// If some thread has seen a break of time, ends all that was before it. No keypair of before is
    /// used any more already.
    fn follow_break(&self) {
        if self.shared.keys_not_before() <= self.cleared.get() {
            return;
        }
        let broken = self.shared.latest_break();
        let why = match broken.as_deref() {
            Some(Break::Slept { time, .. }) => {
                tracing::info!(?time, "the host slept");
                "slept"
            }
            Some(Break::Leapt { by_ns, .. }) => {
                let by_s = by_ns / 1_000_000_000;
                tracing::warn!(by_s, "the clock leapt: this may be a clone, or an older snapshot");
                "clock_leapt"
            }
            // The keypairs' end is told before its reason.
            None => return,
        };
        // The pool may have shaken hands since then.
        let (not_before, now) = self.begin_clearing(why);
        self.handshakes.clear_older_sessions(not_before, now);
    }

    /// Ends every keypair and handshake, and begins anew with peers that there is a reason to reach.
    fn clear_sessions(&self, why: &'static str) {
        let (_, now) = self.begin_clearing(why);
        self.handshakes.clear_sessions(now);
    }

    /// Takes note that sessions are cleared. Says before when keypairs have ended, and the present
    /// moment.
    fn begin_clearing(&self, why: &'static str) -> (Now, Now) {
        // New handshakes must not begin before the moment from which they count.
        let not_before = self.shared.keys_not_before();
        self.cleared.set(not_before);
        tracing::info!(why, "all sessions are cleared");
        *self.clearings.borrow_mut().entry(why).or_default() += 1;
        (not_before, clock::boot_now().max(not_before))
    }

    fn resume(&self) {
        tracing::info!("goes on: there may be handshakes again");
        self.shared.set_quiesced_until(Now::default());
        self.tell_pause();
        self.handshakes.resume(self.now());
    }

    /// A process that follows is to make the same pause.
    fn tell_pause(&self) {
        if let Some(keeper) = &self.keeper {
            keeper.pause_until(self.shared.device.0, self.shared.quiesced_until().boot_ns());
        }
    }

    /// Follows changes of the host's addresses.
    pub fn addresses_changed(&self, added: &[IpAddr], removed: &[IpAddr]) {
        let mut addresses = HashSet::clone(&self.shared.host_addresses.load());
        addresses.extend(added.iter().copied());
        for address in removed {
            addresses.remove(address);
        }
        self.shared.host_addresses.store(Arc::new(addresses));
    }

    /// Follows a change of the TUN device.
    pub fn link_changed(&self, mtu: Option<u32>, is_up: bool) {
        if let Some(mtu) = mtu {
            self.shared.mtu.store(mtu as usize, Ordering::Relaxed);
        }
        self.set_up(is_up);
    }

    /// Lets workers and control end with the TUN device, which was deleted.
    pub fn gone(&self) {
        self.shared.report_tun_gone();
        self.shared.wake_all();
    }

    /// Follows the TUN device up or down.
    pub fn set_up(&self, is_up: bool) {
        if self.shared.up.swap(is_up, Ordering::Relaxed) == is_up {
            return;
        }
        let now = self.now();
        if is_up {
            tracing::info!("the interface is up");
            self.handshakes.go_up(now);
        } else {
            tracing::info!("the interface is down");
            self.handshakes.go_down(now);
        }
    }

    /// Opens sockets on another port. Nothing is changed if that fails.
    fn open_port(&self, port: u16, fwmark: u32) -> Result<(), Errno> {
        let keeper = self.keeper.as_ref().ok_or(Errno::EIO)?;
        self.close_former_sockets();
        let device = self.shared.device.0;
        let (port, of_worker) = keeper.open_sockets(device, port, fwmark).map_err(refused)?;
        let group = Arc::new(SocketGroup { port, of_worker });
        let before = self.shared.sockets.swap(group);
        self.former_sockets.borrow_mut().push((before.port, Arc::downgrade(&before)));
        self.shared.wake_all();
        Ok(())
    }

    /// Has the sockets of a device that a predecessor served. They are open, on its port and with its
    /// mark, unless it died while it changed them.
    pub(super) fn recall_sockets(&self) {
        let Some(keeper) = &self.keeper else { return };
        let port = self.device.borrow().listen_port();
        let mark = self.fwmark.get();
        let outcome = if port != 0 && port != self.shared.sockets.load().port {
            self.open_port(port, mark)
        } else {
            keeper.set_mark(self.shared.device.0, mark).map_err(refused)
        };
        if let Err(error) = outcome {
            tracing::error!(port, mark, %error, "the sockets of the process before are not to be had");
        }
    }

    /// Lets the keeper close sockets of former ports that the last worker has let go of. As long as one
    /// has them, nobody could bind to the port anew: who goes back to it gets them again.
    fn close_former_sockets(&self) {
        let Some(keeper) = &self.keeper else { return };
        let mut former = self.former_sockets.borrow_mut();
        let gone = former.extract_if(.., |(_, sockets)| sockets.strong_count() == 0);
        let gone: Vec<u16> = gone.map(|(port, _)| port).collect();
        let present = self.shared.sockets.load().port;
        for port in gone {
            if port != present && !former.iter().any(|&(its, _)| its == port) {
                keeper.close_sockets(self.shared.device.0, port);
            }
        }
    }

    pub(super) fn carry_out(&self, effect: Effect) {
        let now = self.now();
        if let Effect::PeerRemoved { id, public_key } = &effect {
            self.peer_leaves(*id, public_key, now);
            self.names.borrow_mut().remove(public_key);
        }
        carry_out(effect, &self.device.borrow(), &self.handshakes, &self.shared, now);
    }

    pub(super) fn hot_peer(&self, id: PeerId, public_key: PublicKey) -> Arc<HotPeer> {
        Arc::new(HotPeer::new(id, self.shared.device, public_key))
    }
}

/// How long to sleep at `now` if the next timer runs out at `next` and workers were looked at when
/// `ticked`.
fn sleep_time(next: Option<Now>, ticked: Now, now: Now) -> Duration {
    let look = ticked + LOOK_EVERY;
    // A clock that went back makes nobody sleep for longer.
    next.map_or(look, |next| next.min(look)).since(now).min(LOOK_EVERY)
}

/// What a request is answered with if sockets cannot be had, or be marked.
fn refused(refusal: Refusal) -> Errno {
    tracing::warn!(error = %refusal, "a request is refused");
    Errno::from(&std::io::Error::from(refusal))
}

impl uapi::Handler for Control {
    fn get_part(&self, cursor: &mut GetCursor) -> Option<Zeroizing<String>> {
        let device = self.device.borrow();
        let port = self.shared.sockets.load().port;
        uapi::format_get_part(cursor, &device, port, &|peer| {
            let Some(cell) = self.handshakes.cell(peer) else { return PeerStatus::default() };
            let endpoint = cell.hot.endpoint.load().as_ref().map(|endpoint| endpoint.remote);
            let keypairs = cell.hot.keypairs.load();
            let has_led = |to| self.names.borrow().has_led(&cell.hot.public_key, to);
            PeerStatus {
                endpoint,
                is_by_name: endpoint.is_some_and(has_led),
                last_handshake: cell.last_handshake(),
                rx_bytes: cell.hot.transfer.rx_bytes(),
                tx_bytes: cell.hot.transfer.tx_bytes(),
                worker: keypairs.current.as_ref().map(|is| self.shared.worker_of(is.home())),
            }
        })
    }

    fn set(&self, request: SetRequest) -> Result<(), Errno> {
        // What can fail comes first: then nothing is changed.
        {
            let device = self.device.borrow();
            let kept = if request.replace_peers { 0 } else { device.peer_count() };
            let is_new = |peer: &&PeerChange| {
                !peer.remove && (kept == 0 || device.find(&peer.public_key).is_none())
            };
            // Most requests are so small that nobody has to look at each peer.
            if kept + request.peers.len() > PEER_COUNT_MAX
                && kept + request.peers.iter().filter(is_new).count() > PEER_COUNT_MAX
            {
                return Err(Errno::ENOSPC);
            }
        }
        let mark = request.fwmark.unwrap_or(self.fwmark.get());
        let sockets = self.shared.sockets.load_full();
        match request.listen_port {
            Some(port) if port == 0 || port != sockets.port => self.open_port(port, mark)?,
            _ if mark != self.fwmark.get() => {
                let keeper = self.keeper.as_ref().ok_or(Errno::EIO)?;
                keeper.set_mark(self.shared.device.0, mark).map_err(refused)?;
            }
            _ => {}
        }
        let port = self.shared.sockets.load().port;
        if mark != self.fwmark.replace(mark) || port != sockets.port {
            self.handshakes.forget_local_sources();
            self.handshakes.forget_ways();
        }
        let named = request.peers.iter().map(|peer| peer.public_key);
        let named: Vec<_> = named.filter(|_| self.pulling.is_some()).collect();
        let text = self.to_remember(&request);
        self.names.borrow_mut().follow(&request);
        let mut applying = self.device.borrow_mut().begin(request);
        while self.device.borrow_mut().go_on(&mut applying, APPLIED_AT_ONCE) {
            self.tick_if_due();
        }
        let effects = self.device.borrow_mut().finish(applying);
        let effect_count = effects.len();
        let is_new = |effect: &&Effect| matches!(effect, Effect::PeerAdded { .. });
        self.handshakes.reserve(effects.iter().filter(is_new).count());
        for (number, effect) in effects.into_iter().enumerate() {
            self.carry_out(effect);
            if number % CARRIED_OUT_AT_ONCE == 0 {
                self.tick_if_due();
            }
        }
        self.peers_configured(&named);
        if let Some(text) = text {
            self.remember_set(&text);
        }
        if effect_count >= MANY_EFFECTS {
            give_back_free_memory();
        }
        Ok(())
    }

    fn set_names(&self, names: Vec<EndpointName>) -> Result<(), Errno> {
        self.replace_names(names)?;
        self.remember_names();
        Ok(())
    }

    async fn quiesce(&self, time: Option<Duration>) -> Result<serde_json::Value, Errno> {
        let begun = quiesce::begin(&self.shared, time, clock::boot_now());
        self.tell_pause();
        tracing::info!(seconds = time.map(|time| time.as_secs()), "quiesces");
        self.clear_sessions("quiesced");
        let stuck = quiesce::settled(&self.shared, begun.turns).await.ok_or(Errno::ECANCELED)?;
        if stuck > 0 {
            tracing::warn!(stuck, "quiesced, but workers that stand still may hold keys");
        }
        Ok(serde_json::json!({ "stuck_workers": stuck }))
    }

    fn resume(&self) -> Result<(), Errno> {
        Control::resume(self);
        Ok(())
    }

    fn status(&self) -> serde_json::Value {
        let now = clock::boot_now();
        let workers = self.shared.workers.iter().map(|worker| &worker.counters);
        let of_nobody = self.shared.crew.all_counters();
        let totals = Totals::sum(workers.chain([self.handshakes.drops()]).chain(of_nobody));
        let counted = self.keeper.as_ref().and_then(|keeper| keeper.steer_counters());
        let count = self.shared.workers.len();
        let (of_peers, more_troubles, of_device) = self.handshakes.troubles(PEER_TROUBLES_MAX, now);
        let troubles = of_device.iter().chain(&of_peers);
        let back_ends = self.back_ends.borrow().clone();
        let PacketRules { mss_clamp, copy_dscp } = self.device.borrow().packet_rules();
        let status = Status {
            mode: back_ends.name().to_owned(),
            reason: back_ends.reason,
            nics: back_ends.nics,
            workers: count,
            tun_steering: self.tun_steering.status(),
            socket_steering: self.socket_steering.clone(),
            handed_on: totals.handed_on(),
            fanned_out: totals.fanned_out(),
            mss_clamp,
            copy_dscp,
            privileges: self.privileges.get(),
            stuck_workers: (0..count)
                .filter(|&w| !self.shared.moves(WorkerId(w as u16), now))
                .count(),
            under_load: self.handshakes.is_under_load(now),
            aead: self.aead.to_owned(),
            paths: Path::ALL.iter().map(|&path| (path.name(), totals.received(path))).collect(),
            sent: Path::ALL.iter().map(|&path| (path.name(), totals.sent(path))).collect(),
            drops: totals.drops().map(|(reason, count)| (reason.name(), count)).collect(),
            peer_source: self.pulling.as_ref().map(Pulling::status).unwrap_or_default(),
            quiesced: Quiesced::of(self.shared.quiesced_until(), now),
            troubles: troubles.map(|trouble| TroubleStatus::new(trouble, now)).collect(),
            more_troubles,
            sessions_cleared: self.clearings.borrow().clone(),
            steer: counted
                .map(|counted| {
                    let events = counted.events().map(|(event, count)| (event.name(), count));
                    let drops = counted.drops().map(|(reason, count)| (reason.name(), count));
                    events.chain(drops.filter(|&(_, count)| count > 0)).collect()
                })
                .unwrap_or_default(),
        };
        serde_json::to_value(status).expect("a status is plain data")
    }
}

#[cfg(test)]
mod tests {
    use wg_common::id::DeviceId;
    use wg_common::index::{IndexLayout, IndexPermutation};

    use super::*;
    use crate::aead::RingAead;
    use crate::handshake::Os;
    use crate::key::PrivateKey;
    use crate::uapi::Handler as _;

    fn control() -> Control {
        let sockets = SocketGroup { port: 1, of_worker: Vec::new() };
        let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
        let (shared, _) = Shared::new(DeviceId(0), 1, Vec::new(), sockets, None, indexes).unwrap();
        let outside = Os::new(Arc::clone(&shared));
        let handshakes = Arc::new(Handshakes::new(Arc::clone(&shared), outside, &RingAead, None));
        Control::new(shared, handshakes, None, InUse::default(), "ring")
    }

    #[test]
    fn who_acts_between_two_looks_at_the_clocks_looks_first() {
        let key = || SetRequest {
            private_key: Some(Some(PrivateKey::from_bytes([1; 32]))),
            ..SetRequest::default()
        };
        let acts: [fn(&Control, SetRequest); 3] = [
            |control, request| control.set(request).unwrap(),
            |control, _| control.set_up(false),
            |control, _| Control::resume(control),
        ];
        for act in acts {
            let control = control();
            // Since then, somebody has set the clock.
            let mut reading = clock::reading();
            reading.real_ns -= 10_000_000_000;
            control.continuity.borrow_mut().observe(&reading);
            act(&control, key());
            assert!(control.shared.keys_not_before() >= reading.after, "older keypairs would seal");
        }
    }

    #[test]
    fn it_sleeps_until_the_next_timer_and_never_past_a_look_at_the_workers() {
        const MS: Duration = Duration::from_millis(1);
        let ticked = Now::from_boot_ns(1_000_000_000_000);
        let now = ticked + MS * 40;
        for (next, time) in [
            (None, MS * 60),
            (Some(ticked + MS * 5000), MS * 60),
            (Some(ticked + MS * 90), MS * 50),
            (Some(now + Duration::from_nanos(1)), Duration::from_nanos(1)),
            (Some(now), Duration::ZERO),
            (Some(Now::default()), Duration::ZERO),
        ] {
            assert_eq!(sleep_time(next, ticked, now), time, "{next:?}");
        }
        assert_eq!(sleep_time(None, ticked, ticked), LOOK_EVERY, "an idle daemon does not spin");
        let back = Now::from_boot_ns(1);
        assert_eq!(sleep_time(None, ticked, back), LOOK_EVERY);
    }
}
