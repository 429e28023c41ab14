//! What becomes of a handshake message that came.

use std::sync::Arc;

use wg_common::id::{ReceiverIndex, WorkerId};
use wg_common::message::{Message, classify};
use wg_common::outcome::DropReason;
use wg_common::time::Now;

use super::lanes::Verdict;
use super::{Cell, Handshakes, Outside, lock};
use crate::datapath::handoff::HandshakeDatagram;
use crate::noise::{check_mac1, open_initiation};
use crate::session::{Action, Session};

impl<O: Outside> Handshakes<O> {
    /// Looks at a handshake message as far as that is cheap, while `behind` others wait, and lets it
    /// wait for its turn if it is worth that. Nothing is known of its sender yet, so nothing is kept of
    /// it but the message.
    pub(super) fn admit(
        &self,
        datagram: HandshakeDatagram,
        behind: usize,
        now: Now,
    ) -> Result<(), DropReason> {
        if let Some(reason) = self.shared.pause(now) {
            return Err(reason);
        }
        let identity = self.identity().ok_or(DropReason::NoPrivateKey)?;
        let message = datagram.message();
        let kind = classify(message)?;
        if let Message::CookieReply(index) = kind {
            let bytes = message.first_chunk().ok_or(DropReason::BadLength)?;
            return self.owner(index)?.session().handle_cookie_reply(bytes, now);
        }
        if !check_mac1(&identity, message) {
            if kind == Message::Initiation {
                self.strangers.note_other_key(&datagram, now);
            }
            return Err(DropReason::BadMac1);
        }
        if let Message::Response(index) = kind {
            self.owner(index)?;
        }
        let rng = &mut self.outside.rng();
        let verdict = lock(&self.lanes).admit(datagram, behind, rng, now);
        match verdict {
            Verdict::Waits => Ok(()),
            Verdict::Displaces => Err(DropReason::Outdated),
            Verdict::Refused(reason) => Err(reason),
            Verdict::Demand(cookie) => {
                let reply = cookie.reply_to(&identity, message, rng);
                let reply = reply.ok_or(DropReason::BadHandshake)?;
                if self.outside.send(datagram.worker, &reply, &datagram.from, 0) {
                    Err(DropReason::CookieDemanded)
                } else {
                    Err(DropReason::SocketSend)
                }
            }
        }
    }

    fn owner(&self, index: ReceiverIndex) -> Result<Arc<Cell>, DropReason> {
        lock(&self.indexes).owner(index).cloned().ok_or(DropReason::UnknownIndex)
    }

    /// Handles a handshake message that was admitted.
    pub(super) fn receive(&self, datagram: &HandshakeDatagram, now: Now) -> Result<(), DropReason> {
        let identity = self.identity().ok_or(DropReason::NoPrivateKey)?;
        let message = datagram.message();
        // What a session asks for is done before anyone else can ask it for more: else a keypair
        // could be retired before it is published.
        // mac1 is looked at again below: the private key may be another one by now.
        match classify(message)? {
            Message::Initiation => {
                let bytes = message.first_chunk().ok_or(DropReason::BadLength)?;
                let opened = open_initiation(&identity, bytes).map_err(|e| e.drop_reason())?;
                let sender = opened.sender();
                let Some(cell) = self.cell_by_key(&sender) else {
                    let reason = self.unknown_sender(&identity, opened, datagram, now);
                    if reason == DropReason::UnknownPeer {
                        self.strangers.note_unknown(datagram, sender, now);
                    }
                    return Err(reason);
                };
                let mut session = self.session_for_handshake(&cell, now)?;
                let remote = session.remote().ok_or(DropReason::BadHandshake)?;
                let authentic = opened.authenticate(remote).map_err(|e| e.drop_reason())?;
                let worker = datagram.worker;
                let actions = self.with_context(&cell, &identity, worker, now, |context| {
                    session.handle_initiation(authentic, datagram.from, context, now)
                })?;
                self.received(&cell, &session, message, &actions, worker, now);
            }
            Message::Response(index) => {
                let cell = self.owner(index)?;
                let bytes = message.first_chunk().ok_or(DropReason::BadLength)?;
                let mut session = self.session_for_handshake(&cell, now)?;
                let worker = datagram.worker;
                let actions = self.with_context(&cell, &identity, worker, now, |context| {
                    session.handle_response(bytes, context, now)
                })?;
                self.received(&cell, &session, message, &actions, worker, now);
            }
            // Neither waits for a turn.
            Message::CookieReply(_) | Message::Transport(_) => {
                return Err(DropReason::BadHandshake);
            }
        }
        Ok(())
    }

    fn received(
        &self,
        cell: &Arc<Cell>,
        session: &Session,
        message: &[u8],
        actions: &[Action],
        worker: WorkerId,
        now: Now,
    ) {
        cell.hot.transfer.received(message.len() as u64);
        self.execute(cell, actions, worker, now);
        self.awaken(cell, session, now);
    }
}
