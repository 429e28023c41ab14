//! Packets that are sealed before a flood begins, so that sending costs no cryptography.
//!
//! Every peer's counters go up in the order in which its packets stand here, and each packet is sent once: a
//! repeated one would be a replay. They are ordered in rounds; in a round each peer has a burst, whose packets are
//! of one size.

use anyhow::{Result, bail, ensure};
use boringtun::noise::{Tunn, TunnResult};
use wg_common::headers::OUTER_LEN_MAX;
use wg_common::load::{CHUNK_LEN, FRAME_LEN_MAX};

use super::arguments::Flood;
use super::packet::{Size, inner_packet, message_len};
use super::peers::Peer;
use super::report::Sealed;

/// No machine sends as many in a second: more need not be sealed for `max`.
const PPS_MAX: f64 = 20e6;
/// Bytes that a packet takes beside its own: where it stands.
const PLACE_LEN: usize = size_of::<Place>();

/// How many packets there are, of which peers and sizes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Plan {
    size: Size,
    peer_count: u32,
    burst: u32,
    round_count: u64,
    packet_count: u64,
}

impl Plan {
    /// The plan of a flood, of which each packet takes `extra_len` bytes beside its message, each peer sending
    /// `burst` packets in a row, or fewer if there are not so many for each.
    ///
    /// # Errors
    /// If they need more memory than they may have.
    pub fn new(flood: &Flood, burst: u32, extra_len: usize) -> Result<Self> {
        ensure!(flood.peers > 0, "a flood needs a peer");
        let seconds = flood.seconds;
        let mean_len = mean_len(flood, extra_len);
        let room = ((flood.memory as u64) << 20) / mean_len;
        let packet_count = match flood.pps.number() {
            Some(rate) => {
                let wanted = ((rate * seconds).round() as u64).max(1);
                if wanted > room {
                    bail!(
                        "{wanted} packets of {mean_len} bytes do not fit into {} MiB; give --memory {}, or a \
                         lower rate, or less time",
                        flood.memory,
                        (wanted * mean_len).div_ceil(1 << 20)
                    );
                }
                wanted
            }
            None => room.min((PPS_MAX * seconds) as u64),
        };
        ensure!(packet_count > 0, "{} MiB have no room for a packet", flood.memory);
        let share = u32::try_from(packet_count / u64::from(flood.peers)).unwrap_or(u32::MAX);
        let burst = burst.clamp(1, share.max(1));
        let round_len = u64::from(flood.peers) * u64::from(burst);
        Ok(Self {
            size: flood.size,
            peer_count: flood.peers,
            burst,
            round_count: packet_count.div_ceil(round_len),
            packet_count,
        })
    }

    /// The highest rate of which all packets fit into the memory that they may have, with as many bytes beside each
    /// as a live frame has.
    pub fn rate_max(flood: &Flood) -> f64 {
        let room =
            ((flood.memory as u64) << 20) / mean_len(flood, frame_extra_len(flood, OUTER_LEN_MAX));
        (room as f64 / flood.seconds).min(PPS_MAX)
    }

    /// Packets to send.
    pub fn packet_count(&self) -> u64 {
        self.packet_count
    }

    /// Packets that a peer sends in a row.
    pub fn burst(&self) -> u32 {
        self.burst
    }

    /// The peer that packet `at` is from.
    pub fn peer(&self, at: u64) -> u32 {
        (at / u64::from(self.burst) % u64::from(self.peer_count)) as u32
    }

    /// Bytes of the inner packet `at`.
    pub fn inner_len(&self, at: u64) -> usize {
        let burst = at / u64::from(self.burst);
        let (round, peer) =
            (burst / u64::from(self.peer_count), burst % u64::from(self.peer_count));
        // Shifted in each round, so that no peer has one size only.
        let pattern = self.size.pattern();
        pattern[((round + peer) % pattern.len() as u64) as usize]
    }

    /// Bytes of the first `count` inner packets.
    pub fn inner_bytes(&self, count: u64) -> u64 {
        match self.size {
            Size::Fixed(len) => count * len as u64,
            Size::Imix => (0..count).map(|at| self.inner_len(at) as u64).sum(),
        }
    }

    /// The packets of one peer, in the order in which it sends them.
    fn of_peer(&self, peer: u32) -> impl Iterator<Item = u64> + '_ {
        (0..self.round_count)
            .flat_map(move |round| {
                let first =
                    (round * u64::from(self.peer_count) + u64::from(peer)) * u64::from(self.burst);
                first..first + u64::from(self.burst)
            })
            .take_while(|&at| at < self.packet_count)
    }
}

/// Bytes that a packet takes beside its message as a frame in the kernel's memory, with `headers_len` before the
/// message: the word that says where it stands, the way to the next word, and its share of what is left free at the
/// end of each chunk.
pub fn frame_extra_len(flood: &Flood, headers_len: usize) -> usize {
    let longest = headers_len + message_len(flood.size.longest());
    let shares = (CHUNK_LEN - FRAME_LEN_MAX) / FRAME_LEN_MAX;
    headers_len + 8 + 7 + longest.div_ceil(shares)
}

/// Bytes that a packet takes, on average.
fn mean_len(flood: &Flood, extra_len: usize) -> u64 {
    let pattern = flood.size.pattern();
    let lens = pattern.iter().map(|&len| (message_len(len) + extra_len + PLACE_LEN) as u64);
    lens.sum::<u64>().div_ceil(pattern.len() as u64)
}

/// Where a packet stands, and how long it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place(u64);

impl Place {
    /// Bits for the length.
    const LEN_BITS: u32 = 16;

    fn new(offset: usize, len: usize) -> Self {
        assert!(len < 1 << Self::LEN_BITS);
        Self((offset as u64) << Self::LEN_BITS | len as u64)
    }

    /// Offset of its first byte.
    pub const fn offset(self) -> usize {
        (self.0 >> Self::LEN_BITS) as usize
    }

    /// Its bytes.
    pub const fn len(self) -> usize {
        (self.0 & ((1 << Self::LEN_BITS) - 1)) as usize
    }
}

/// Where each packet of a plan stands, one behind the other.
#[derive(Debug)]
pub struct Places {
    places: Vec<Place>,
    bytes: usize,
}

impl Places {
    /// Of packets that have `extra_len` bytes before their message. `fit` moves an offset, where need be, so that a
    /// packet of this length may begin there.
    pub fn new(plan: &Plan, extra_len: usize, fit: impl Fn(usize, usize) -> usize) -> Self {
        let mut bytes = 0;
        let places = (0..plan.packet_count)
            .map(|at| {
                let len = extra_len + message_len(plan.inner_len(at));
                let offset = fit(bytes, len);
                bytes = offset + len;
                Place::new(offset, len)
            })
            .collect();
        Self { places, bytes }
    }

    /// Where packet `at` stands.
    pub fn at(&self, at: u64) -> Place {
        self.places[at as usize]
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// For the report.
    pub fn report(&self) -> Sealed {
        let places_len = self.places.len() * PLACE_LEN;
        Sealed { packets: self.places.len() as u64, bytes: (self.bytes + places_len) as u64 }
    }
}

/// Seals all packets of one peer; `put` gets each of them.
///
/// # Errors
/// If `tunn` has no session, or `put` fails.
pub fn seal(
    plan: &Plan,
    flood: &Flood,
    peer: &Peer,
    tunn: &mut Tunn,
    mut put: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut packets: Vec<(usize, Vec<u8>)> = Vec::new();
    for &len in flood.size.pattern() {
        if !packets.iter().any(|(known, _)| *known == len) {
            packets.push((len, inner_packet(peer.address, flood.dst, flood.inner_port, len)));
        }
    }
    let mut room = vec![0; message_len(flood.size.longest())];
    for at in plan.of_peer(peer.number) {
        let len = plan.inner_len(at);
        let (_, packet) = packets.iter().find(|(known, _)| *known == len).expect("all were made");
        let room = &mut room[..message_len(len)];
        match tunn.encapsulate(packet, room) {
            TunnResult::WriteToNetwork(message) if message.len() == message_len(len) => {
                put(at, message)?
            }
            other => bail!("peer {} has no session: {other:?}", peer.number),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use wg_common::load::frame_offset;

    use super::super::arguments::{Arguments, Command};
    use super::*;
    use crate::{connected_tunns, to_network};

    fn flood(options: &str) -> Flood {
        let line = format!(
            "load flood --to 198.51.100.1:51820 --server-key IBwCMKG0IAvhlcZPDahVK2eDM/zI9yt7lBt7QJh8l1E= \
             --dst 192.168.20.2 {options}"
        );
        match Arguments::try_parse_from(line.split_whitespace()).unwrap().command {
            Command::Flood(flood) => flood,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_packet_is_of_one_peer_and_each_peer_has_its_own_in_order() {
        let flood = flood("--peers 5 --size imix --pps 1000 --seconds 0.997");
        let plan = Plan::new(&flood, 4, 0).unwrap();
        assert_eq!((plan.packet_count(), plan.burst()), (997, 4));
        let mut owners = vec![None; 997];
        for peer in 0..5 {
            let mut last = None;
            for at in plan.of_peer(peer) {
                assert!(last.is_none_or(|last| last < at));
                assert_eq!(owners[at as usize].replace(peer), None);
                assert_eq!(plan.peer(at), peer);
                last = Some(at);
            }
        }
        assert!(owners.iter().all(Option::is_some));
        for burst in 0..997 / 4 {
            let lens: Vec<_> = (0..4).map(|at| plan.inner_len(burst * 4 + at)).collect();
            assert!(lens.iter().all(|len| *len == lens[0]), "{lens:?}");
        }
    }

    #[test]
    fn imix_keeps_its_parts_also_where_peers_come_in_dozens() {
        for peers in [1, 12, 24] {
            let flood = flood(&format!("--peers {peers} --size imix --pps 2880 --seconds 1"));
            let plan = Plan::new(&flood, 1, 0).unwrap();
            let of_first: Vec<_> = plan.of_peer(0).map(|at| plan.inner_len(at)).collect();
            for (len, part) in [(64, 7), (576, 4), (1372, 1)] {
                let all = (0..2880).filter(|&at| plan.inner_len(at) == len).count();
                assert_eq!(all, 2880 / 12 * part);
                let own = of_first.iter().filter(|&&own| own == len).count();
                assert_eq!(own, of_first.len() / 12 * part, "{peers} peers");
            }
            assert_eq!(plan.inner_bytes(12), 7 * 64 + 4 * 576 + 1372);
        }
    }

    #[test]
    fn memory_is_bounded_and_the_bound_is_said() {
        let many = flood("--peers 1 --size 64 --pps 1e6 --seconds 100 --memory 64");
        let error = Plan::new(&many, 1, 0).unwrap_err().to_string();
        assert!(error.contains("64 MiB") && error.contains("--memory 9919"), "{error}");
        let all = flood("--peers 1 --size 64 --pps max --seconds 100 --memory 1");
        let plan = Plan::new(&all, 32, 0).unwrap();
        let places = Places::new(&plan, 0, |offset, _| offset);
        assert_eq!(plan.packet_count(), (1 << 20) / 104);
        assert!(places.report().bytes <= 1 << 20);
        for size in ["48", "64", "512", "1372", "imix", "1800"] {
            let live =
                flood(&format!("--peers 3 --size {size} --pps max --seconds 100 --memory 4"));
            let headers_len = 42;
            let plan = Plan::new(&live, 1, frame_extra_len(&live, headers_len)).unwrap();
            let places = Places::new(&plan, headers_len, |offset, _| frame_offset(offset));
            let bytes = places.report().bytes + 8 * plan.packet_count();
            assert!((3 << 20..=4 << 20).contains(&bytes), "{size}: {bytes}");
        }
        let none = flood("--peers 1 --size 64 --pps max --seconds 100 --memory 0");
        assert!(Plan::new(&none, 32, 0).is_err());
    }

    #[test]
    fn bursts_shrink_where_each_peer_has_few_packets() {
        let few = flood("--peers 100 --size 64 --pps 250 --seconds 1");
        assert_eq!(Plan::new(&few, 32, 0).unwrap().burst(), 2);
        let fewer = flood("--peers 100 --size 64 --pps 20 --seconds 1");
        let plan = Plan::new(&fewer, 32, 0).unwrap();
        assert_eq!((plan.burst(), plan.packet_count()), (1, 20));
        assert_eq!(plan.of_peer(20).next(), None);
    }

    #[test]
    fn sealed_packets_are_opened_once_each() {
        let flood = flood("--peers 1 --size imix --pps 240 --seconds 1");
        let plan = Plan::new(&flood, 3, 0).unwrap();
        let peer = flood.gateway.seed.peers(1).unwrap().next().unwrap();
        let (mut tunn, mut opposite) = connected_tunns();
        let places = Places::new(&plan, 0, |offset, _| offset.next_multiple_of(8));
        let mut bytes = vec![0; places.bytes()];
        seal(&plan, &flood, &peer, &mut tunn, |at, message| {
            let place = places.at(at);
            bytes[place.offset()..][..place.len()].copy_from_slice(message);
            Ok(())
        })
        .unwrap();
        let mut opened = vec![0; 2048];
        for at in 0..plan.packet_count() {
            let place = places.at(at);
            assert!(place.offset().is_multiple_of(8));
            let message = &bytes[place.offset()..][..place.len()];
            match opposite.decapsulate(None, message, &mut opened) {
                TunnResult::WriteToTunnelV4(packet, from) => {
                    assert_eq!(
                        (packet.len(), from),
                        (plan.inner_len(at), "10.64.0.1".parse().unwrap())
                    );
                }
                other => panic!("{at}: {other:?}"),
            }
            let again = opposite.decapsulate(None, message, &mut opened);
            assert!(matches!(again, TunnResult::Err(_)), "a replay");
        }
        let keepalive = to_network(tunn.encapsulate(&[], &mut opened)).to_vec();
        // The first was the keepalive of the handshake.
        assert_eq!(keepalive[8..16], 241_u64.to_le_bytes(), "no counter was left out");
    }
}
