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
#[inline]
pub fn classify(datagram: &[u8]) -> Result<Message, DropReason> {
    let Some(head) = datagram.first_chunk::<HEAD_LEN>() else {
        return Err(DropReason::BadLength);
    };
    let response_receiver =
        datagram.get(8..12).and_then(|b| b.first_chunk().copied()).unwrap_or_default();
    classify_head(*head, response_receiver, datagram.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A datagram of this type and length with zeroed reserved bytes and `0xa5` behind them.
    fn datagram(kind: u8, len: usize) -> Vec<u8> {
        let mut datagram = vec![0xa5; len];
        for (to, byte) in datagram.iter_mut().zip([kind, 0, 0, 0]) {
            *to = byte;
        }
        datagram
    }

    /// The rules once more, as §5.4 has them: one message after the other.
    fn plain(datagram: &[u8]) -> Result<Message, DropReason> {
        let index = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&datagram[at..at + 4]);
            ReceiverIndex::from_wire(bytes)
        };
        if datagram.len() < HEAD_LEN {
            return Err(DropReason::BadLength);
        }
        if !(1..=4).contains(&datagram[0]) {
            return Err(DropReason::BadType);
        }
        if datagram[1..4] != [0, 0, 0] {
            return Err(DropReason::BadReserved);
        }
        match (datagram[0], datagram.len()) {
            (1, 148) => Ok(Message::Initiation),
            (2, 92) => Ok(Message::Response(index(8))),
            (3, 64) => Ok(Message::CookieReply(index(4))),
            (4, 32..) => Ok(Message::Transport(index(4))),
            _ => Err(DropReason::BadLength),
        }
    }

    proptest! {
        #[test]
        fn every_datagram_is_classified(datagram in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(classify(&datagram), plain(&datagram));
        }

        #[test]
        fn every_type_and_length_is_classified(
            kind in 0u8..8,
            len in prop_oneof![0usize..200, Just(32), Just(64), Just(92), Just(148), Just(65_507)],
            reserved in prop_oneof![4 => Just([0; 3]), 1 => any::<[u8; 3]>()],
        ) {
            let mut datagram = datagram(kind, len);
            if let Some(bytes) = datagram.get_mut(1..4) {
                bytes.copy_from_slice(&reserved);
            }
            prop_assert_eq!(classify(&datagram), plain(&datagram));
        }

        #[test]
        fn the_index_is_the_receivers(sender in any::<u32>(), receiver in any::<u32>()) {
            let index = ReceiverIndex::from_wire(receiver.to_le_bytes());
            let mut response = datagram(TYPE_RESPONSE, RESPONSE_LEN);
            response[4..8].copy_from_slice(&sender.to_le_bytes());
            response[8..12].copy_from_slice(&index.to_wire());
            prop_assert_eq!(classify(&response), Ok(Message::Response(index)));
            for (kind, len) in [(TYPE_COOKIE_REPLY, COOKIE_REPLY_LEN), (TYPE_TRANSPORT, 96)] {
                let mut datagram = datagram(kind, len);
                datagram[4..8].copy_from_slice(&index.to_wire());
                let expected = match kind {
                    TYPE_TRANSPORT => Message::Transport(index),
                    _ => Message::CookieReply(index),
                };
                prop_assert_eq!(classify(&datagram), Ok(expected));
            }
        }
    }

    #[test]
    fn no_answer_is_longer_than_what_it_answers() {
        // To a forged source, the protocol amplifies nothing (§5.4.3, §5.4.7).
        const { assert!(RESPONSE_LEN < INITIATION_LEN) };
        const { assert!(COOKIE_REPLY_LEN < RESPONSE_LEN) };
    }

    #[test]
    fn transport_data_needs_no_alignment() {
        for len in [32, 33, 47, 48, 1452, 1500] {
            assert!(matches!(classify(&datagram(4, len)), Ok(Message::Transport(_))), "{len}");
        }
        for len in 0..32 {
            assert_eq!(classify(&datagram(4, len)), Err(DropReason::BadLength), "{len}");
        }
    }
}
