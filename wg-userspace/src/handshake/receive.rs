//! What becomes of a handshake message that came.

use std::sync::Arc;

use wg_common::id::WorkerId;
use wg_common::message::{Message, classify};
use wg_common::outcome::DropReason;
use wg_common::time::Now;

use super::{Cell, Handshakes, Outside, lock};
use crate::datapath::handoff::HandshakeDatagram;
use crate::noise::{check_mac1, open_initiation};
use crate::session::Action;

impl<O: Outside> Handshakes<O> {
    /// Receives a handshake message.
    pub(super) fn receive(&self, datagram: &HandshakeDatagram, now: Now) -> Result<(), DropReason> {
        let identity = self.identity().ok_or(DropReason::NoPrivateKey)?;
        let message = datagram.message();
        let kind = classify(message)?;
        if !matches!(kind, Message::CookieReply(_)) && !check_mac1(&identity, message) {
            return Err(DropReason::BadMac1);
        }
        // What a session asks for is done before anyone else can ask it for more: else a keypair
        // could be retired before it is published.
        match kind {
            Message::Initiation => {
                let bytes = message.first_chunk().ok_or(DropReason::BadLength)?;
                let opened = open_initiation(&identity, bytes).map_err(|e| e.drop_reason())?;
                let cell = self.cell_by_key(&opened.sender()).ok_or(DropReason::BadHandshake)?;
                let mut session = cell.session();
                let remote = session.remote().ok_or(DropReason::BadHandshake)?;
                let authentic = opened.authenticate(remote).map_err(|e| e.drop_reason())?;
                let worker = datagram.worker;
                let actions = self.with_context(&cell, &identity, worker, now, |context| {
                    session.handle_initiation(authentic, datagram.from, context, now)
                })?;
                self.received(&cell, message, &actions, worker, now);
            }
            Message::Response(index) => {
                let cell = lock(&self.indexes).owner(index).cloned();
                let cell = cell.ok_or(DropReason::UnknownIndex)?;
                let bytes = message.first_chunk().ok_or(DropReason::BadLength)?;
                let mut session = cell.session();
                let worker = datagram.worker;
                let actions = self.with_context(&cell, &identity, worker, now, |context| {
                    session.handle_response(bytes, context, now)
                })?;
                self.received(&cell, message, &actions, worker, now);
            }
            // Nothing asks for cookies, and no transport data is a handshake message.
            Message::CookieReply(_) | Message::Transport(_) => {
                return Err(DropReason::BadHandshake);
            }
        }
        Ok(())
    }

    fn received(
        &self,
        cell: &Arc<Cell>,
        message: &[u8],
        actions: &[Action],
        worker: WorkerId,
        now: Now,
    ) {
        cell.hot.transfer.received(message.len() as u64);
        self.execute(cell, actions, worker, now);
        self.awaken(cell);
    }
}
