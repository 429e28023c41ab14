//! The cookie that a peer under load told us (§5.4.7), and what it may tell one for.

use wg_common::id::ReceiverIndex;
use wg_common::outcome::DropReason;
use wg_common::protocol::{COOKIE_LIFETIME, COOKIE_REPLY_LEN, MAC_LEN};
use wg_common::time::Now;

use crate::noise::{Cookie, HandshakeError, RemoteStatic, mac1_of};

/// One peer's cookie. Knows no timer: whoever was told one waits for Rekey-Timeout as before (§5.3).
#[derive(Debug, Default)]
pub struct PeerCookie {
    /// The last handshake message that we sent, as long as no reply to it has come.
    sent: Option<Sent>,
    told: Option<Told>,
}

#[derive(Debug)]
struct Sent {
    index: ReceiverIndex,
    mac1: [u8; MAC_LEN],
}

#[derive(Debug)]
struct Told {
    cookie: Cookie,
    at: Now,
}

impl PeerCookie {
    /// What goes into mac2 of a message that is made at `now`, if the peer has told us. One that is
    /// too old is wiped.
    pub fn get(&mut self, now: Now) -> Option<&Cookie> {
        self.told.take_if(|told| now.since(told.at) >= COOKIE_LIFETIME);
        self.told.as_ref().map(|told| &told.cookie)
    }

    /// We have sent this handshake initiation or response, which bears our `index`. Only a reply to
    /// the last one counts.
    pub fn message_sent(&mut self, index: ReceiverIndex, message: &[u8]) {
        self.sent = mac1_of(message).map(|mac1| Sent { index, mac1 });
    }

    /// Takes the cookie out of a reply of `remote`'s. Each message that we sent earns one reply:
    /// whoever records it cannot replay it.
    ///
    /// # Errors
    /// [`DropReason::UnknownIndex`] if it answers nothing that we sent last, and what
    /// [`HandshakeError`]s count as. Nothing has changed then: the right one may still come.
    pub fn handle_reply(
        &mut self,
        reply: &[u8; COOKIE_REPLY_LEN],
        remote: &RemoteStatic,
        now: Now,
    ) -> Result<(), DropReason> {
        let sent = self.sent.as_ref().ok_or(DropReason::UnknownIndex)?;
        let cookie = Cookie::open_reply(reply, remote, sent.index, &sent.mac1)
            .map_err(HandshakeError::drop_reason)?;
        (self.told, self.sent) = (Some(Told { cookie, at: now }), None);
        Ok(())
    }
}
