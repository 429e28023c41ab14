//! The cookies that a peer under load told us (§5.4.7), and what it may tell one for.

use std::net::IpAddr;

use wg_common::id::ReceiverIndex;
use wg_common::outcome::DropReason;
use wg_common::protocol::{COOKIE_LIFETIME, COOKIE_REPLY_LEN, MAC_LEN};
use wg_common::time::Now;

use crate::noise::{Cookie, HandshakeError, RemoteStatic, mac1_of};

/// How many of a peer's addresses have a cookie each: one where we ask it, and another from where it
/// asks us.
const ADDRESS_COUNT: usize = 2;

/// One peer's cookies. Knows no timer: whoever was told one waits for Rekey-Timeout as before (§5.3).
///
/// A cookie is bound to the address of ours that the peer saw, which we cannot know behind a NAT, but
/// it goes with the one that we wrote to. The whitepaper (§5.4.4) and the kernel keep only the last
/// one: of a peer that is asked by IPv6 and answered by IPv4 the two would push each other out, and
/// under load no handshake would end.
#[derive(Debug, Default)]
pub struct PeerCookie {
    /// The last handshake message that we sent, as long as no reply to it has come.
    sent: Option<Sent>,
    /// Of different addresses. Of most peers there never is one.
    told: Option<Box<[Option<Told>; ADDRESS_COUNT]>>,
}

#[derive(Debug)]
struct Sent {
    index: ReceiverIndex,
    mac1: [u8; MAC_LEN],
    to: IpAddr,
}

#[derive(Debug)]
struct Told {
    cookie: Cookie,
    to: IpAddr,
    at: Now,
}

impl PeerCookie {
    /// What goes into mac2 of a message that is made at `now` and goes to `to`, if the peer has told
    /// us: for a message to there, else the newest, since a peer that moved sees us where we were. What
    /// is too old is wiped.
    pub fn get(&mut self, to: IpAddr, now: Now) -> Option<&Cookie> {
        let told = self.told.as_mut()?;
        for slot in told.iter_mut() {
            if slot.as_ref().is_some_and(|told| now.since(told.at) >= COOKIE_LIFETIME) {
                // In place: what is moved out leaves its bytes behind.
                *slot = None;
            }
        }
        if told.iter().all(Option::is_none) {
            self.told = None;
        }
        let told = self.told.as_ref()?.iter().flatten();
        told.max_by_key(|told| (told.to == to, told.at)).map(|told| &told.cookie)
    }

    /// We have sent this handshake initiation or response, which bears our `index`, to an address. Only
    /// a reply to the last one counts.
    pub fn message_sent(&mut self, index: ReceiverIndex, message: &[u8], to: IpAddr) {
        self.sent = mac1_of(message).map(|mac1| Sent { index, mac1, to });
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
        let to = sent.to;
        self.sent = None;
        // In place of what was told for that address, else of nothing, else of the oldest.
        let slots = self.told.get_or_insert_default().iter_mut();
        let slot = slots.min_by_key(|slot| match slot {
            Some(told) if told.to == to => (0, told.at),
            None => (1, now),
            Some(told) => (2, told.at),
        });
        *slot.expect("there are some") = Some(Told { cookie, to, at: now });
        Ok(())
    }
}
