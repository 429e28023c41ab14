//! How large packets to a peer may be, by the way to its endpoint.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use wg_common::headers::{IPV4_LEN, IPV6_LEN, UDP_LEN};
use wg_common::protocol::TRANSPORT_OVERHEAD;

/// Packets of this length are never too big (RFC 791 §3.2: every host takes as much; RFC 8200 §5: every
/// link does). If the way is narrower still, the datagrams that carry them are fragmented.
const V4_MIN: usize = 576;
const V6_MIN: usize = 1280;

/// The largest inner packet whose datagram leaves this host in one piece.
///
/// It follows what this host knows of the way, which is the link by which datagrams leave, and the MTU of
/// the route if an administrator has set one. What ICMP says of the way behind is not heeded: anybody can
/// send that.
#[derive(Debug, Default)]
pub struct InnerMtu {
    /// Bytes; 0 while nobody has looked.
    len: AtomicU32,
    /// Control has been asked to look, and has not begun to.
    is_due: AtomicBool,
}

impl InnerMtu {
    /// What stands for a way that bounds nothing.
    const NO_BOUND: u32 = u32::MAX;

    /// Takes note that datagrams to an endpoint of this version leave by a link or route that carries
    /// `outer_mtu` bytes, IP header included; or that nothing is known of the way.
    pub fn set(&self, outer_mtu: Option<u32>, is_outer_v6: bool) {
        let ip_len = if is_outer_v6 { IPV6_LEN } else { IPV4_LEN };
        let around = (ip_len + UDP_LEN + TRANSPORT_OVERHEAD) as u32;
        let len = outer_mtu.map_or(Self::NO_BOUND, |mtu| mtu.saturating_sub(around).max(1));
        self.len.store(len, Relaxed);
    }

    /// The endpoint is another one: somebody has to look.
    pub fn forget(&self) {
        self.len.store(0, Relaxed);
    }

    /// Whether somebody has to look.
    pub fn is_unknown(&self) -> bool {
        self.len.load(Relaxed) == 0
    }

    /// Notes that control is to be asked; `false` if it has been already.
    pub fn becomes_due(&self) -> bool {
        !self.is_due.swap(true, Relaxed)
    }

    /// Control is about to look. To be called before it reads the endpoint: if that moves afterwards, it
    /// is asked anew.
    pub fn begin_look(&self) {
        self.is_due.store(false, Relaxed);
    }

    /// Length to which packets may be padded on a device with this MTU.
    #[inline]
    pub fn padding_bound(&self, device_mtu: usize) -> usize {
        match self.len.load(Relaxed) {
            0 => device_mtu,
            len => device_mtu.min(len as usize),
        }
    }

    /// MTU for packets of a version to the peer, on a device with this MTU.
    #[inline]
    pub fn mtu(&self, is_v6: bool, device_mtu: usize) -> usize {
        device_mtu.min(self.bound(is_v6))
    }

    /// The MTU that the sender of `packet` is to be told, if `len` bytes are too much for the way and it
    /// has to be told: IPv4 without "don't fragment" goes, in a datagram that is fragmented.
    ///
    /// `len` is what goes over the wire at once: of a packet that stands for several, the length of one.
    /// That the device's MTU is kept to is its kernel's matter, which knows sooner when it changes.
    pub fn exceeded_by(&self, packet: &[u8], len: usize, device_mtu: usize) -> Option<usize> {
        const DONT_FRAGMENT: u8 = 0x40;

        let is_v6 = is_v6(packet);
        let bound = self.bound(is_v6);
        let must_be_whole = is_v6 || packet.get(6).is_some_and(|flags| flags & DONT_FRAGMENT != 0);
        (len > bound && must_be_whole).then_some(bound.min(device_mtu))
    }

    #[inline]
    fn bound(&self, is_v6: bool) -> usize {
        match self.len.load(Relaxed) {
            0 => Self::NO_BOUND as usize,
            len => (len as usize).max(if is_v6 { V6_MIN } else { V4_MIN }),
        }
    }
}

/// Whether an IP packet is of version 6.
#[inline]
pub fn is_v6(packet: &[u8]) -> bool {
    packet.first().is_some_and(|first| first >> 4 == 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(outer_mtu: u32, is_outer_v6: bool) -> InnerMtu {
        let mtu = InnerMtu::default();
        mtu.set(Some(outer_mtu), is_outer_v6);
        mtu
    }

    fn packet(first: u8, flags: u8) -> [u8; 20] {
        let mut packet = [0; 20];
        (packet[0], packet[6]) = (first, flags);
        packet
    }

    #[test]
    fn all_that_stands_around_a_packet_fits_into_the_link() {
        for (outer, is_outer_v6, inner) in
            [(1500, false, 1440), (1500, true, 1420), (1400, false, 1340), (1492, true, 1412)]
        {
            let mtu = of(outer, is_outer_v6);
            for is_v6 in [false, true] {
                assert_eq!(mtu.mtu(is_v6, 9000), inner);
                assert_eq!(mtu.mtu(is_v6, 1300), 1300, "the device's is smaller");
            }
            assert_eq!(mtu.padding_bound(9000), inner);
        }
    }

    #[test]
    fn what_every_link_carries_is_never_too_big() {
        for outer in [0, 1, 60, 100, 635, 636, 1000, 1339] {
            let mtu = of(outer, false);
            assert!(!mtu.is_unknown());
            assert_eq!(mtu.mtu(true, 1420), 1280, "{outer}");
            let v4 = (outer as usize).saturating_sub(60).max(576);
            assert_eq!(mtu.mtu(false, 1420), v4, "{outer}");
            assert_eq!(mtu.exceeded_by(&packet(0x60, 0), 1280, 1420), None);
            assert_eq!(mtu.exceeded_by(&packet(0x60, 0), 1281, 1420), Some(1280));
            assert_eq!(mtu.exceeded_by(&packet(0x45, 0x40), v4, 1420), None);
            assert_eq!(mtu.exceeded_by(&packet(0x45, 0x40), v4 + 1, 1420), Some(v4));
        }
    }

    #[test]
    fn who_allows_it_is_fragmented() {
        let mtu = of(1400, false);
        for (packet, told) in [
            (packet(0x45, 0), None),
            (packet(0x45, 0x20), None),
            (packet(0x45, 0x40), Some(1340)),
            (packet(0x60, 0), Some(1340)),
        ] {
            assert_eq!(mtu.exceeded_by(&packet, 1341, 1420), told);
            assert_eq!(mtu.exceeded_by(&packet, 1340, 1420), None);
        }
        assert_eq!(mtu.exceeded_by(&[], 2000, 1420), None);
    }

    #[test]
    fn who_knows_nothing_bounds_nothing() {
        let mtu = InnerMtu::default();
        for known in [false, true] {
            assert_eq!((mtu.mtu(true, 1420), mtu.padding_bound(1420)), (1420, 1420));
            assert_eq!(mtu.exceeded_by(&packet(0x60, 0), 60_000, 1420), None);
            assert_eq!(mtu.is_unknown(), !known);
            mtu.set(None, false);
        }
        mtu.forget();
        assert!(mtu.is_unknown());
    }

    #[test]
    fn control_is_asked_once_until_it_looks() {
        let mtu = InnerMtu::default();
        assert!(mtu.becomes_due() && !mtu.becomes_due());
        mtu.begin_look();
        assert!(mtu.becomes_due());
    }
}
