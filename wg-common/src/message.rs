//! The four messages of the protocol; [`classify`] says which one a datagram is.

use crate::id::ReceiverIndex;
use crate::outcome::DropReason;
use crate::protocol::{
    COOKIE_REPLY_LEN, INITIATION_LEN, RESPONSE_LEN, TRANSPORT_MIN_LEN, TYPE_COOKIE_REPLY,
    TYPE_INITIATION, TYPE_RESPONSE, TYPE_TRANSPORT,
};

/// Which message a datagram is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Message {
    /// Handshake initiation (§5.4.2).
    Initiation,
    /// Handshake response (§5.4.3), to the handshake with this index.
    Response(ReceiverIndex),
    /// Cookie reply (§5.4.7), to the handshake message that carried this index.
    CookieReply(ReceiverIndex),
    /// Transport data (§5.4.6), for the keypair with this index.
    Transport(ReceiverIndex),
}

/// Bytes that [`classify`] looks at.
pub const HEAD_LEN: usize = 8;

/// Says which message a datagram of `len` bytes is that begins with `head`.
///
/// For a response, the receiver index stands behind the sender index, which `head` does not hold:
/// `response_receiver` are bytes 8 to 12 then, and unused otherwise.
///
/// # Errors
/// The reason for which no datagram of this length and head can be a message: its length, its type
/// or its reserved bytes.
#[inline(always)]
pub fn classify_head(
    head: [u8; HEAD_LEN],
    response_receiver: [u8; 4],
    len: usize,
) -> Result<Message, DropReason> {
    let (kind, index) = (head[0], [head[4], head[5], head[6], head[7]]);
    let (message, fits) = match kind {
        TYPE_INITIATION => (Message::Initiation, len == INITIATION_LEN),
        TYPE_RESPONSE => {
            (Message::Response(ReceiverIndex::from_wire(response_receiver)), len == RESPONSE_LEN)
        }
        TYPE_COOKIE_REPLY => {
            (Message::CookieReply(ReceiverIndex::from_wire(index)), len == COOKIE_REPLY_LEN)
        }
        // No alignment rule: padding stops at the MTU, and some implementations do not pad.
        TYPE_TRANSPORT => {
            (Message::Transport(ReceiverIndex::from_wire(index)), len >= TRANSPORT_MIN_LEN)
        }
        _ => return Err(DropReason::BadType),
    };
    if head[1] | head[2] | head[3] != 0 {
        return Err(DropReason::BadReserved);
    }
    if fits { Ok(message) } else { Err(DropReason::BadLength) }
}

/// Says which message a whole datagram is.
///
/// # Errors
/// As [`classify_head`]; [`DropReason::BadLength`] for one shorter than any message.
pub fn classify(datagram: &[u8]) -> Result<Message, DropReason> {
    let Some(head) = datagram.first_chunk::<HEAD_LEN>() else {
        return Err(DropReason::BadLength);
    };
    let response_receiver =
        datagram.get(8..12).and_then(|b| b.first_chunk().copied()).unwrap_or_default();
    classify_head(*head, response_receiver, datagram.len())
}
