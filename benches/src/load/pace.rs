//! When packets are due.

/// Says how many packets should have left by now. What is late is made up for, but only so much of it: a sender
/// that stood still must not follow with a flood that nobody asked for.
#[derive(Clone, Debug)]
pub struct Pacer {
    per_ns: f64,
    begin_ns: u64,
    debt_max: u64,
    forgiven: u64,
}

impl Pacer {
    /// `rate` packets per second from `begin_ns` on; packets of `debt_ns` are made up for at most, and at least
    /// `debt_min` packets.
    pub fn new(rate: f64, begin_ns: u64, debt_ns: u64, debt_min: u64) -> Self {
        let per_ns = rate / 1e9;
        let debt_max = ((per_ns * debt_ns as f64) as u64).max(debt_min).max(1);
        Self { per_ns, begin_ns, debt_max, forgiven: 0 }
    }

    /// Packets that may leave now, if `sent` have left.
    pub fn due(&mut self, sent: u64, now_ns: u64) -> u64 {
        let elapsed = now_ns.saturating_sub(self.begin_ns);
        let target = (elapsed as f64 * self.per_ns) as u64;
        let behind = target.saturating_sub(self.forgiven + sent);
        self.forgiven += behind.saturating_sub(self.debt_max);
        behind.min(self.debt_max)
    }

    /// The moment at which `count` packets are due, if `sent` have left by then.
    pub fn when(&self, sent: u64, count: u64) -> u64 {
        let packets = (self.forgiven + sent + count) as f64;
        // Not before they are due: who waits until then does not wait twice.
        self.begin_ns + (packets / self.per_ns).ceil() as u64 + 1
    }

    /// Packets that were given up, since the sender was too late.
    pub fn forgiven(&self) -> u64 {
        self.forgiven
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn as_many_are_due_as_the_rate_says() {
        let mut pacer = Pacer::new(10_000.0, 5 * MS, 100 * MS, 1);
        assert_eq!(pacer.due(0, 0), 0, "before the beginning");
        assert_eq!(pacer.due(0, 5 * MS), 0);
        assert_eq!(pacer.due(0, 6 * MS), 10);
        assert_eq!(pacer.due(10, 6 * MS), 0);
        assert_eq!(pacer.due(10, 7 * MS), 10);
        assert_eq!(pacer.forgiven(), 0);
    }

    #[test]
    fn who_waits_until_packets_are_due_finds_them_due() {
        for rate in [1.0, 3.0, 999.9, 1e5, 1.234e6, 1e7] {
            let mut pacer = Pacer::new(rate, 77, 1000 * MS, 64);
            let mut sent = 0;
            for _ in 0..1000 {
                let at = pacer.when(sent, 7);
                assert!(pacer.due(sent, at) >= 7, "{rate} {sent}");
                assert!(pacer.due(sent, at.saturating_sub(2 + (1e9 / rate) as u64)) < 7);
                sent += 7;
            }
        }
    }

    #[test]
    fn a_pause_is_made_up_for_a_little() {
        let mut pacer = Pacer::new(1e6, 0, 5 * MS, 1);
        assert_eq!(pacer.due(0, 100 * MS), 5000);
        assert_eq!(pacer.forgiven(), 95_000);
        assert_eq!(pacer.due(5000, 100 * MS), 0);
        assert_eq!(pacer.due(5000, 101 * MS), 1000, "then it goes on at its rate");
        assert_eq!(pacer.when(6000, 1000), 102 * MS + 1);
    }

    #[test]
    fn a_run_can_always_become_due() {
        // 5 ms of this rate are less than a packet.
        let mut pacer = Pacer::new(100.0, 0, 5 * MS, 32);
        assert_eq!(pacer.due(0, 320 * MS), 32);
        assert_eq!(pacer.forgiven(), 0);
    }
}
