//! The half of a peer that control keeps: its handshakes, and the timers of its keypairs.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use arrayvec::ArrayVec;
use rand_core::CryptoRng;
use wg_common::endpoint::Endpoint;
use wg_common::id::{ReceiverIndex, ShardId};
use wg_common::outcome::DropReason;
use wg_common::protocol::{
    COOKIE_REPLY_LEN, INITIATION_INTERVAL_MIN, INITIATION_LEN, KEEPALIVE_TIMEOUT, KEY_LEN,
    REKEY_TIMEOUT, RESPONSE_LEN,
};
use wg_common::time::Now;

use super::cookie::PeerCookie;
use super::course::{LazyCourse, Pending};
use super::timers::Due;
use super::troubles::HandshakeNotes;
use super::{HotPeer, Keypair, Keypairs, Spell, TroubleKind};
use crate::key::PresharedKey;
use crate::noise::{
    AuthenticInitiation, Established, HandshakeError, Identity, Remote, RemoteStatic, Timestamp,
    initiate,
};

/// A peer's initiations are answered no more often than this in the long run. Each takes a receiver
/// index, which rests for minutes: at the fifty a second that the kernel answers, a few dozen peers of
/// bad will would let the indexes of all rest. A peer of good will makes one in five seconds at most.
const ANSWER_INTERVAL: Duration = Duration::from_secs(1);
/// So many may come at once: of a peer that starts again and again, or hands its key around.
const ANSWER_BURST: u32 = 100;

/// Where receiver indexes come from, and where workers look for what stands behind them.
pub trait Indexes {
    /// Lends an index that is live when this returns: a message that carries it may be sent.
    fn allocate(&mut self) -> Option<ReceiverIndex>;

    /// Takes back an index under which no keypair was ever published.
    fn release(&mut self, index: ReceiverIndex);

    /// Takes over an index that the predecessor had lent, or that we have lent ourselves, to the same
    /// session; it is live when this returns. `false` if it cannot be ours.
    fn adopt(&mut self, index: ReceiverIndex) -> bool;

    /// Lets workers find the keypair by its local index; they do when this returns.
    fn publish(&mut self, keypair: &Arc<Keypair>);

    /// Lets them find it no longer, and takes its index back.
    fn retire(&mut self, keypair: &Arc<Keypair>);
}

/// What a session needs for its part of a handshake.
#[derive(Debug)]
pub struct Context<'a, R, I> {
    /// Who we are; the one for which the session's [`RemoteStatic`] was made.
    pub identity: &'a Identity,
    /// Receiver indexes.
    pub indexes: &'a mut I,
    /// Randomness.
    pub rng: &'a mut R,
    /// The wall clock: goes into initiations, and is remembered as the time of the last handshake.
    pub timestamp: Timestamp,
    /// Where a keypair that is made now is at home.
    pub home: ShardId,
}

/// What a session wants done. To be done in order.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there are few at a time, and most are messages")]
pub enum Action {
    /// Send a handshake message.
    Send {
        /// The bytes.
        message: HandshakeMessage,
        /// Where to.
        to: Endpoint,
    },
    /// Seal an empty packet with the current keypair and send it to the peer's endpoint; then call
    /// [`keepalive_sent`](super::Activity::keepalive_sent).
    SendKeepalive,
    /// Tell the workers that there is a keypair: staged packets may go.
    Flush,
    /// Tell the workers that there will be none: staged packets are to be dropped.
    DropStaged,
    /// Count a message that could not be made.
    CountDrop(DropReason),
}

/// A handshake message; dereferences to its bytes.
#[derive(Clone, Eq, PartialEq)]
pub struct HandshakeMessage(ArrayVec<u8, INITIATION_LEN>);

impl HandshakeMessage {
    fn new(bytes: &[u8]) -> Self {
        Self(bytes.try_into().expect("no handshake message is longer than an initiation"))
    }
}

impl Deref for HandshakeMessage {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for HandshakeMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HandshakeMessage(type {}, {} bytes)", self[0], self.len())
    }
}

/// A peer as control sees it. Everything that happens to it is a call; what is to be done about it
/// comes back as [`Action`]s.
///
/// A peer that rests costs no time; one that never came, some fifty bytes of memory.
#[derive(Debug)]
pub struct Session {
    pub(super) peer: Arc<HotPeer>,
    /// Nothing if there is none, which is zero: most peers have none.
    preshared_key: Option<Box<PresharedKey>>,
    /// Nothing while we have no identity.
    remote: Option<Remote>,
    /// All that has happened.
    pub(super) course: LazyCourse,
}

impl Session {
    /// The session of `peer`: nothing is under way. Without `remote`, there are no handshakes.
    pub fn new(peer: Arc<HotPeer>, remote: Option<Remote>) -> Self {
        let preshared_key = remote.as_ref().and_then(Remote::preshared_key).and_then(boxed);
        Self { peer, preshared_key, remote, course: LazyCourse::default() }
    }

    /// The half that workers read.
    pub fn peer(&self) -> &Arc<HotPeer> {
        &self.peer
    }

    /// Who the peer is to our identity, if we have one.
    pub fn remote(&self) -> Option<&RemoteStatic> {
        remote_static(&self.remote, &self.peer, &self.preshared_key)
    }

    /// Whether nobody has asked who the peer is to us.
    #[cfg(test)]
    pub(super) fn has_no_remote_static(&mut self) -> bool {
        self.remote.as_mut().is_none_or(|remote| remote.made().is_none())
    }

    /// The key shared with the peer, zero if there is none.
    pub fn preshared_key(&self) -> &PresharedKey {
        or_none(&self.preshared_key)
    }

    /// The index by which a response finds this session, while one is awaited.
    pub fn pending_index(&self) -> Option<ReceiverIndex> {
        self.course.pending.as_ref().map(|pending| pending.initiator.local_index())
    }

    /// When the last handshake was completed, by the wall clock: when its response came, or the first
    /// packet after we responded.
    pub fn last_handshake(&self) -> Option<Timestamp> {
        self.course.last_handshake
    }

    /// The greatest timestamp of an initiation that was answered; initiations that are not newer are
    /// replays.
    pub fn greatest_timestamp(&self) -> Timestamp {
        self.course.greatest_timestamp
    }

    /// Takes note of a timestamp that the peer's initiations had before this session began. A lesser
    /// one than we know of changes nothing.
    pub fn raise_greatest_timestamp(&mut self, seen: Timestamp) {
        if seen > self.course.greatest_timestamp {
            self.course.greatest_timestamp = seen;
        }
    }

    /// When the last keypair that was made dies, or died; not before `now` while a timer runs. None if
    /// there never was anything.
    pub fn busy_until(&self, now: Now) -> Option<Now> {
        self.course.keypairs_until.max(self.is_awake().then_some(now))
    }

    /// How many initiations of ours were not answered in time and handshakes given up, since one was
    /// completed.
    pub fn unanswered_count(&self) -> u32 {
        self.course.timers.unanswered_count()
    }

    /// What goes wrong with the peer's handshakes, the most telling first.
    pub fn troubles(&self, now: Now) -> ArrayVec<(TroubleKind, Spell), 3> {
        let mut troubles = ArrayVec::new();
        let notes = &self.course.notes;
        if notes.unreadable.is_fresh(now) {
            // Who answers is there, and what is wrong with the answer is why none is good.
            troubles.push((TroubleKind::ResponsesUnreadable, notes.unreadable));
        } else if notes.unanswered.is_fresh(now) {
            let kind = if self.course.timers.is_trying() {
                TroubleKind::InitiationsUnanswered
            } else {
                TroubleKind::HandshakeGivenUp
            };
            troubles.push((kind, notes.unanswered));
        }
        // One that was just answered may be confirmed yet.
        let is_late = notes.unconfirmed.since_s_ago(now) >= REKEY_TIMEOUT.as_secs();
        if notes.unconfirmed.is_fresh(now) && is_late {
            troubles.push((TroubleKind::ResponsesUnconfirmed, notes.unconfirmed));
        }
        // While there is a keypair, it is rather the network that has sent something twice.
        let has_keypair = self.course.keypairs_until.is_some_and(|until| now < until);
        if notes.old.is_fresh(now) && !has_keypair {
            troubles.push((TroubleKind::TimestampsOld, notes.old));
        }
        troubles
    }

    /// Whether [`troubles`](Self::troubles) has something to say, or may have without anything more
    /// being noted.
    pub fn has_notes(&self, now: Now) -> bool {
        self.course.notes.is_fresh(now)
    }

    /// Whether there is a timer that runs. An idle peer has none, and needs no calls.
    pub fn is_awake(&self) -> bool {
        self.poll_timeout().is_some()
    }

    /// The moment at which [`handle_timeout`](Self::handle_timeout) wants to be called, if any; the
    /// beginning of time if at once.
    ///
    /// Workers arm timers without a word, but none that runs out in less than
    /// [`KEEPALIVE_TIMEOUT`](wg_common::protocol::KEEPALIVE_TIMEOUT): who asks again when that has
    /// passed misses nothing. When a worker has confirmed a keypair, it is worth asking at once.
    pub fn poll_timeout(&self) -> Option<Now> {
        if self.is_handed_over() {
            return None;
        }
        // Nothing can come of any timer.
        self.remote.as_ref()?;
        if self.is_unsettled(&self.peer.keypairs.load()) {
            return Some(Now::default());
        }
        let expiry = self.course.published.iter().map(|keypair| keypair.expires()).min();
        [self.course.timers.poll(&self.peer.activity), expiry].into_iter().flatten().min()
    }

    /// The moment at which [`handle_timeout`](Self::handle_timeout) must be called if nothing else is
    /// until then: when [`poll_timeout`](Self::poll_timeout) says, or when it is to be asked again.
    pub fn wake_at(&self, now: Now) -> Option<Now> {
        // Without a keypair there is no traffic that could arm a timer.
        let ask = self.course.published.first().map(|_| now + KEEPALIVE_TIMEOUT);
        [self.poll_timeout(), ask].into_iter().flatten().min()
    }

    /// Begins a handshake: there are packets and no keypair, or a keypair that wants to be replaced.
    ///
    /// Does nothing without an endpoint. While one is in flight, only lets it be tried for the whole
    /// Rekey-Attempt-Time from `now` on (§6.4); if Rekey-Timeout has not passed since the last
    /// handshake message, waits for that.
    pub fn initiate<R: CryptoRng, I: Indexes>(
        &mut self,
        ctx: &mut Context<'_, R, I>,
        now: Now,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        self.begin(ctx, &mut actions, now);
        actions
    }

    /// Answers an initiation, to where it came `from`. Neither endpoint nor current keypair change:
    /// they do when the first packet proves that this was no replay.
    ///
    /// # Errors
    /// [`DropReason::HandedOver`], [`DropReason::OldTimestamp`] for a replay, [`DropReason::InitiationFlood`] if the last one was
    /// answered just now, or too many were of late, [`DropReason::NoIndex`] if no index is free, and what [`HandshakeError`]s
    /// count as. Nothing has changed then but a note.
    pub fn handle_initiation<R: CryptoRng, I: Indexes>(
        &mut self,
        initiation: AuthenticInitiation,
        from: Endpoint,
        ctx: &mut Context<'_, R, I>,
        now: Now,
    ) -> Result<Vec<Action>, DropReason> {
        if self.is_handed_over() {
            return Err(DropReason::HandedOver);
        }
        let remote = remote_static(&self.remote, &self.peer, &self.preshared_key)
            .ok_or(DropReason::NoPrivateKey)?;
        let timestamp = initiation.timestamp();
        if timestamp <= self.course.greatest_timestamp {
            self.course.notes.old.note(now);
            self.peer.in_trouble.store(true, Relaxed);
            return Err(DropReason::OldTimestamp);
        }
        if now.since(self.course.answered) < INITIATION_INTERVAL_MIN {
            return Err(DropReason::InitiationFlood);
        }
        // A clock that went back has nobody wait for longer than for one answer.
        let spent = self.course.answers_spent.clamp(now, now + ANSWER_INTERVAL * ANSWER_BURST);
        if spent + ANSWER_INTERVAL > now + ANSWER_INTERVAL * ANSWER_BURST {
            return Err(DropReason::InitiationFlood);
        }
        let index = ctx.indexes.allocate().ok_or(DropReason::NoIndex)?;
        let cookie = self.course.cookie.get(from.remote.ip(), now);
        let (established, message) = match initiation.respond(remote, index, cookie, ctx.rng) {
            Ok(answer) => answer,
            Err(error) => {
                ctx.indexes.release(index);
                return Err(error.drop_reason());
            }
        };
        self.course.cookie.message_sent(index, &message, from.remote.ip());
        let course = &mut *self.course;
        (course.greatest_timestamp, course.answered) = (timestamp, now);
        course.answers_spent = spent + ANSWER_INTERVAL;
        course.notes.old = Spell::default();
        course.notes.unconfirmed.note(now);
        self.peer.in_trouble.store(true, Relaxed);
        self.course.timers.response_sent(ctx.rng, now);
        self.peer.activity.authenticated_received(now);
        self.peer.activity.authenticated_sent(now);

        let mut actions = Vec::new();
        let install = Keypairs::installed_by_responder;
        self.install(&established, now, install, ctx, &mut actions, now);
        self.course.awaited = Some(index);
        actions.push(Action::Send { message: HandshakeMessage::new(&message), to: from });
        self.retire(ctx.indexes);
        Ok(actions)
    }

    /// Finishes our handshake with its response.
    ///
    /// # Errors
    /// [`DropReason::UnknownIndex`] if it answers nothing that we wait for, and what
    /// [`HandshakeError`]s count as. Nothing has changed then but a note: the right one may still come.
    pub fn handle_response<R: CryptoRng, I: Indexes>(
        &mut self,
        message: &[u8; RESPONSE_LEN],
        ctx: &mut Context<'_, R, I>,
        now: Now,
    ) -> Result<Vec<Action>, DropReason> {
        let (pending, remote) =
            self.course.pending.as_ref().zip(self.remote()).ok_or(DropReason::UnknownIndex)?;
        let established = match pending.initiator.finish(ctx.identity, remote, message) {
            Ok(established) => established,
            Err(error) => {
                if error == HandshakeError::Decrypt {
                    self.course.notes.unreadable.note(now);
                    self.peer.in_trouble.store(true, Relaxed);
                }
                return Err(error.drop_reason());
            }
        };
        let begun = pending.begun;
        // Its index is the keypair's from now on.
        self.course.pending = None;
        self.peer.activity.authenticated_received(now);

        let mut actions = Vec::new();
        let install = Keypairs::installed_by_initiator;
        self.install(&established, begun, install, ctx, &mut actions, now);
        self.complete(ctx);
        actions.push(Action::Flush);
        // The responder must not send before it has received something.
        if self.peer.staged.load(Relaxed) == 0 {
            actions.push(Action::SendKeepalive);
        }
        self.retire(ctx.indexes);
        Ok(actions)
    }

    /// Takes the cookie that the peer, under load, wants to see in our next initiation or response.
    /// Nothing is sent: the handshake is repeated when it is time (§5.3).
    ///
    /// # Errors
    /// [`DropReason::UnknownIndex`] if it does not answer the handshake message that we sent last, or
    /// is not the first to do so, and what [`HandshakeError`]s count as. Nothing has changed then.
    pub fn handle_cookie_reply(
        &mut self,
        message: &[u8; COOKIE_REPLY_LEN],
        now: Now,
    ) -> Result<(), DropReason> {
        // Who has sent nothing awaits no reply.
        let course = self.course.begun().ok_or(DropReason::UnknownIndex)?;
        let remote = remote_static(&self.remote, &self.peer, &self.preshared_key)
            .ok_or(DropReason::UnknownIndex)?;
        course.cookie.handle_reply(message, remote, now)
    }

    /// Does what is due at `now`; calling it too early does nothing.
    pub fn handle_timeout<R: CryptoRng, I: Indexes>(
        &mut self,
        ctx: &mut Context<'_, R, I>,
        now: Now,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.is_handed_over() {
            return actions;
        }
        // Wiped as soon as they are dead, so that nothing is left of a peer that went silent when the
        // kernel, after three times Reject-After-Time, wipes everything.
        if self.course.published.iter().any(|keypair| keypair.is_expired(now)) {
            self.peer.keypairs.update(|keypairs| keypairs.without_expired(now));
        }
        let keypairs = self.peer.keypairs.load();
        if self.notice_confirmation(&keypairs, ctx) {
            actions.push(Action::Flush);
        }
        drop(keypairs);
        while let Some(due) = self.course.timers.take_due(&self.peer.activity, now) {
            match due {
                Due::Retransmit => {
                    self.note_unanswered(now);
                    self.peer.handshake_wanted.store(false, Relaxed);
                    self.peer.forget_local_source();
                    self.send_initiation(ctx, &mut actions, now);
                }
                Due::GiveUp => {
                    self.note_unanswered(now);
                    self.abandon(ctx.indexes);
                    actions.push(Action::DropStaged);
                }
                Due::Deferred => self.begin(ctx, &mut actions, now),
                Due::NewHandshake => {
                    self.peer.forget_local_source();
                    self.begin(ctx, &mut actions, now);
                }
                Due::Keepalive | Due::PersistentKeepalive => {
                    self.keepalive(ctx, &mut actions, now);
                }
            }
        }
        self.retire(ctx.indexes);
        actions
    }

    /// Sends a keepalive whenever there was no traffic for `interval` (`None` or zero: never); the
    /// first one at `first`, if that is new.
    pub fn set_persistent_keepalive(&mut self, interval: Option<Duration>, first: Now) {
        let interval = interval.filter(|interval| !interval.is_zero());
        if interval.is_some() || self.persistent_keepalive().is_some() {
            self.course.timers.set_persistent_keepalive(interval, first);
        }
    }

    /// Has the next persistent keepalive sent at `first`, whatever traffic there was.
    pub fn restart_persistent_keepalive(&mut self, first: Now) {
        if let Some(course) = self.course.begun() {
            course.timers.restart_persistent_keepalive(first);
        }
    }

    /// The interval of persistent keepalives, if there are any.
    pub fn persistent_keepalive(&self) -> Option<Duration> {
        self.course.timers.persistent_keepalive()
    }

    /// Replaces the preshared key. Keypairs stay; the next handshake message uses it.
    pub fn set_preshared_key(&mut self, preshared_key: PresharedKey) {
        if let Some(remote) = self.remote.as_mut().and_then(Remote::made) {
            remote.set_preshared_key(preshared_key.clone());
        }
        self.preshared_key = boxed(&preshared_key);
        // What follows is another story.
        if let Some(course) = self.course.begun() {
            (course.notes.unreadable, course.notes.unconfirmed) = Default::default();
        }
    }

    /// Replaces who the peer is to us, since our own identity has changed or gone. Ends what the old
    /// one has begun, as [`clear`](Self::clear) does.
    pub fn set_remote(&mut self, remote: Option<Remote>, indexes: &mut impl Indexes) {
        self.clear(indexes);
        if let Some(preshared_key) = remote.as_ref().and_then(Remote::preshared_key) {
            self.preshared_key = boxed(preshared_key);
        }
        self.remote = remote;
        if let Some(course) = self.course.begun() {
            course.cookie = PeerCookie::default();
        }
    }

    /// Ends every keypair and handshake, and what they have promised: no answer is owed or awaited any
    /// more. Who is to be reached again must be told, by [`initiate`](Self::initiate).
    ///
    /// The greatest timestamp stays: old initiations are replays as before. A session that is handed
    /// over has ended already, and its indexes are its successor's.
    pub fn clear(&mut self, indexes: &mut impl Indexes) {
        if self.is_handed_over() {
            return;
        }
        self.peer.keypairs.update(Keypairs::cleared);
        self.peer.activity.forget();
        self.abandon(indexes);
        if let Some(course) = self.course.begun() {
            course.awaited = None;
            course.timers.cleared();
            course.notes = HandshakeNotes::default();
        }
        self.retire(indexes);
    }

    /// As [`clear`](Self::clear), but what has begun since `not_before` stays: keypairs, and the handshake
    /// that waits for its response.
    pub fn clear_older(&mut self, not_before: Now, indexes: &mut impl Indexes) {
        if self.is_handed_over() {
            return;
        }
        let is_trying =
            self.course.pending.as_ref().is_some_and(|pending| pending.begun >= not_before);
        let keypairs = self.peer.keypairs.load();
        if !is_trying && keypairs.iter().all(|keypair| keypair.begun() < not_before) {
            return self.clear(indexes);
        }
        drop(keypairs);
        // What is owed or awaited from before ends with the newer handshake.
        self.peer.keypairs.update(|keypairs| keypairs.begun_since(not_before));
        if !is_trying {
            self.abandon(indexes);
            self.course.timers.completed();
        }
        self.retire(indexes);
    }

    /// An initiation was not answered within Rekey-Timeout.
    fn note_unanswered(&mut self, now: Now) {
        self.course.notes.unanswered.note_late(REKEY_TIMEOUT, now);
        self.peer.in_trouble.store(true, Relaxed);
    }

    /// Begins a handshake, if there is none and it is time.
    fn begin<R: CryptoRng, I: Indexes>(
        &mut self,
        ctx: &mut Context<'_, R, I>,
        actions: &mut Vec<Action>,
        now: Now,
    ) {
        if self.is_handed_over() {
            return;
        }
        if self.remote.is_none() || self.peer.endpoint.load().is_none() {
            self.peer.handshake_wanted.store(false, Relaxed);
        } else if self.course.timers.is_trying() {
            // Whoever wants it yet may say so once more after the next retransmission.
            self.course.timers.begin_or_renew(now);
        } else if self.course.timers.may_initiate(now) {
            self.course.timers.begin_or_renew(now);
            self.send_initiation(ctx, actions, now);
        } else {
            self.course.timers.defer();
        }
    }

    /// Sends an initiation. If that is not possible now, a retransmission will try again.
    fn send_initiation<R: CryptoRng, I: Indexes>(
        &mut self,
        ctx: &mut Context<'_, R, I>,
        actions: &mut Vec<Action>,
        now: Now,
    ) {
        self.course.timers.initiation_sent(ctx.rng, now);
        let remote = remote_static(&self.remote, &self.peer, &self.preshared_key);
        let Some(remote) = remote else { return };
        let Some(to) = self.peer.endpoint.load().as_deref().copied() else { return };
        // A repeated initiation keeps its index: a freed one rests for minutes, and peers that never
        // answer would let all of them rest.
        let index = match self.course.pending.take() {
            Some(pending) => pending.initiator.local_index(),
            None => match ctx.indexes.allocate() {
                Some(index) => index,
                None => return actions.push(Action::CountDrop(DropReason::NoIndex)),
            },
        };
        let cookie = self.course.cookie.get(to.remote.ip(), now);
        match initiate(ctx.identity, remote, index, ctx.timestamp, cookie, ctx.rng) {
            Ok((initiator, message)) => {
                self.course.cookie.message_sent(index, &message, to.remote.ip());
                self.course.pending = Some(Box::new(Pending { initiator, begun: now }));
                self.peer.activity.authenticated_sent(now);
                actions.push(Action::Send { message: HandshakeMessage::new(&message), to });
            }
            Err(_) => ctx.indexes.release(index),
        }
    }

    /// Has a keepalive sent; begins a handshake if there is nothing to seal it with, or nothing soon.
    fn keepalive<R: CryptoRng, I: Indexes>(
        &mut self,
        ctx: &mut Context<'_, R, I>,
        actions: &mut Vec<Action>,
        now: Now,
    ) {
        let (seals, wants_rekey) = match self.peer.keypairs.load().seals_with(now) {
            Some(keypair) => (true, keypair.wants_rekey_to_send(now)),
            None => (false, false),
        };
        if seals {
            actions.push(Action::SendKeepalive);
        }
        if !seals || wants_rekey {
            self.begin(ctx, actions, now);
        }
    }

    /// Makes a keypair, publishes it, and puts it among the peer's: whoever seals with it can be
    /// answered at once.
    fn install<R, I: Indexes>(
        &mut self,
        established: &Established,
        begun: Now,
        transition: impl Fn(&Keypairs, Arc<Keypair>) -> Keypairs,
        ctx: &mut Context<'_, R, I>,
        actions: &mut Vec<Action>,
        now: Now,
    ) {
        let peer = Arc::downgrade(&self.peer);
        let keypair = Arc::new(Keypair::new(established, peer, ctx.home, now).begun_at(begun));
        self.course.keypairs_until = Some(keypair.expires());
        self.course.published.push(Arc::clone(&keypair));
        ctx.indexes.publish(&keypair);
        let before = self.peer.keypairs.update(|k| transition(k, Arc::clone(&keypair)));
        // `before` is what the transition saw: a confirmation cannot slip in between.
        if self.notice_confirmation(&before, ctx) {
            actions.push(Action::Flush);
        }
    }

    /// Whether a worker has changed something that we have not taken note of.
    fn is_unsettled(&self, keypairs: &Keypairs) -> bool {
        let next = keypairs.next.as_ref().map(|next| next.local_index());
        self.course.awaited.is_some() && self.course.awaited != next
            || self.course.published.iter().any(|keypair| !keypairs.contains(keypair))
    }

    /// Takes note of it, and says so, if the keypair we wait for has had its first packet.
    fn notice_confirmation<R, I: Indexes>(
        &mut self,
        keypairs: &Keypairs,
        ctx: &mut Context<'_, R, I>,
    ) -> bool {
        let is_awaited =
            |keypair: &Arc<Keypair>| Some(keypair.local_index()) == self.course.awaited;
        if self.course.awaited.is_none() || keypairs.next.as_ref().is_some_and(is_awaited) {
            return false;
        }
        let confirmed = keypairs.iter().any(is_awaited);
        self.course.awaited = None;
        if confirmed {
            self.complete(ctx);
        }
        confirmed
    }

    /// A handshake is completed: one of ours that is still in flight is not needed.
    fn complete<R, I: Indexes>(&mut self, ctx: &mut Context<'_, R, I>) {
        self.course.last_handshake = Some(ctx.timestamp);
        self.course.timers.completed();
        self.course.notes = HandshakeNotes::default();
        self.abandon(ctx.indexes);
    }

    /// Forgets the handshake in flight, if there is one. Who still wants one must ask again.
    pub(super) fn abandon(&mut self, indexes: &mut impl Indexes) {
        let pending = self.course.begun().and_then(|course| course.pending.take());
        if let Some(pending) = pending {
            indexes.release(pending.initiator.local_index());
        }
        self.peer.handshake_wanted.store(false, Relaxed);
    }

    /// Retires keypairs that are no longer among the peer's, whoever took them out.
    pub(super) fn retire(&mut self, indexes: &mut impl Indexes) {
        let Some(course) = self.course.begun() else { return };
        let keypairs = self.peer.keypairs.load();
        for gone in course.published.extract_if(.., |keypair| !keypairs.contains(keypair)) {
            indexes.retire(&gone);
        }
        if course.published.is_empty() {
            course.published = Vec::new();
        }
    }
}

/// What the peer is to our identity, if we have one. Borrows no more of a session than it needs.
fn remote_static<'a>(
    remote: &'a Option<Remote>,
    peer: &HotPeer,
    preshared_key: &Option<Box<PresharedKey>>,
) -> Option<&'a RemoteStatic> {
    remote.as_ref().map(|remote| remote.get(&peer.public_key, or_none(preshared_key)))
}

fn or_none(key: &Option<Box<PresharedKey>>) -> &PresharedKey {
    static NONE: PresharedKey = PresharedKey::from_bytes([0; KEY_LEN]);
    key.as_deref().unwrap_or(&NONE)
}

fn boxed(key: &PresharedKey) -> Option<Box<PresharedKey>> {
    (!key.is_zero()).then(|| Box::new(key.clone()))
}
