//! What a worker tells the senders of packets that it cannot send, and how often.

use wg_common::icmp::{ERROR_LEN_MAX, too_big, unreachable};
use wg_common::time::Now;

use crate::rate::{Bucket, Rate};

/// Answers that one worker gives: whoever scans a prefix that nobody owns must not have the worker
/// write a packet for each that it reads.
const RATE: Rate = Rate::new(1000, 50);

/// One worker's answers.
pub struct Answers {
    unreachable: Bucket,
    /// A bucket of its own: a connection waits for this answer, and who scans must not take it away.
    too_big: Bucket,
    message: [u8; ERROR_LEN_MAX],
}

impl Default for Answers {
    fn default() -> Self {
        Self { unreachable: Bucket::default(), too_big: Bucket::default(), message: [0; _] }
    }
}

impl Answers {
    /// The ICMP message that tells the sender of `packet` that it cannot be delivered. `None` if it must
    /// not be told, or if there were too many answers of late.
    pub fn unreachable(&mut self, packet: &[u8], now: Now) -> Option<&[u8]> {
        let Self { unreachable: bucket, message, .. } = self;
        limited(bucket, message, now, |message| unreachable(packet, message))
    }

    /// The ICMP message that tells the sender of `packet` that no more than `mtu` bytes get through.
    /// `None` as with [`unreachable`](Self::unreachable).
    pub fn too_big(&mut self, packet: &[u8], mtu: usize, now: Now) -> Option<&[u8]> {
        let Self { too_big: bucket, message, .. } = self;
        limited(bucket, message, now, |message| too_big(packet, mtu, message))
    }
}

/// What `write` writes, if there is a token for it.
fn limited<'a>(
    bucket: &mut Bucket,
    message: &'a mut [u8; ERROR_LEN_MAX],
    now: Now,
    write: impl FnOnce(&mut [u8; ERROR_LEN_MAX]) -> Option<usize>,
) -> Option<&'a [u8]> {
    if !bucket.has_token(RATE, now) {
        return None;
    }
    let len = write(message)?;
    bucket.take(RATE, now);
    Some(&message[..len])
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const START: Now = Now::from_boot_ns(10_000_000_000);
    const PACKET: [u8; 20] = [0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 1, 10, 9, 0, 77];

    fn given(answers: &mut Answers, tries: usize, now: Now) -> usize {
        (0..tries).filter(|_| answers.unreachable(&PACKET, now).is_some()).count()
    }

    #[test]
    fn answers_are_a_burst_and_then_a_thousand_a_second() {
        let mut answers = Answers::default();
        assert_eq!(given(&mut answers, 1000, START), 50);
        let mut in_a_second = 0;
        for step in 1..=10_000 {
            in_a_second += given(&mut answers, 1, START + Duration::from_micros(100) * step);
        }
        assert_eq!(in_a_second, 1000);
        assert_eq!(given(&mut answers, 1000, START + Duration::from_secs(60)), 50);
    }

    #[test]
    fn who_scans_leaves_answers_to_those_who_send_too_much() {
        let mut answers = Answers::default();
        assert_eq!(given(&mut answers, 100, START), 50);
        let told = (0..100).filter(|_| answers.too_big(&PACKET, 1280, START).is_some()).count();
        assert_eq!(told, 50);
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_earns_nothing() {
        let mut answers = Answers::default();
        given(&mut answers, 50, START);
        assert_eq!(given(&mut answers, 10, START), 0);
        assert_eq!(given(&mut answers, 10, Now::from_boot_ns(5)), 0);
    }

    #[test]
    fn what_must_not_be_answered_costs_no_answer() {
        let mut answers = Answers::default();
        let mut to_all = PACKET;
        to_all[16..].fill(255);
        assert!((0..1000).all(|_| answers.unreachable(&to_all, START).is_none()));
        assert_eq!(given(&mut answers, 1000, START), 50);
    }
}
