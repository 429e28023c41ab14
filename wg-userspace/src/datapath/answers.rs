//! What a worker tells the senders of packets that it cannot send, and how often.

use std::time::Duration;

use wg_common::icmp::{UNREACHABLE_LEN_MAX, unreachable};
use wg_common::time::Now;

/// Answers that one worker gives at once, after it gave none for a while.
const BURST: u32 = 50;
/// Time that earns one answer more: a thousand a second. Whoever scans a prefix that nobody owns must
/// not have the worker write a packet for each that it reads.
const INTERVAL: Duration = Duration::from_millis(1);

/// One worker's answers.
pub struct Answers {
    /// Answers that it may give yet.
    left: u32,
    /// When one was last earned.
    earned: Now,
    message: [u8; UNREACHABLE_LEN_MAX],
}

impl Default for Answers {
    fn default() -> Self {
        Self { left: BURST, earned: Now::default(), message: [0; _] }
    }
}

impl Answers {
    /// The ICMP message that tells the sender of `packet` that it cannot be delivered. `None` if it must
    /// not be told, or if there were too many answers of late.
    pub fn unreachable(&mut self, packet: &[u8], now: Now) -> Option<&[u8]> {
        self.earn(now);
        if self.left == 0 {
            return None;
        }
        let len = unreachable(packet, &mut self.message)?;
        self.left -= 1;
        Some(&self.message[..len])
    }

    fn earn(&mut self, now: Now) {
        let earned = now.since(self.earned).as_nanos() / INTERVAL.as_nanos();
        if earned >= u128::from(BURST - self.left) {
            (self.left, self.earned) = (BURST, now);
        } else {
            // Smaller than the burst.
            self.left += earned as u32;
            self.earned = self.earned + INTERVAL * earned as u32;
        }
    }
}

#[cfg(test)]
mod tests {
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
