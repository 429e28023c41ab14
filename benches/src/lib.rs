//! Benchmarks of Tidegate; each file of `benches/` answers the question in its first line. This
//! file has what they share.

pub mod load;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use wg_common::headers::OuterHeaders;
use wg_common::id::ReceiverIndex;
use wg_common::protocol::{DEFAULT_MTU, TRANSPORT_OVERHEAD};

/// Packets that a worker handles by one call, at most.
pub const BATCH_MAX: usize = 64;

/// Room of one packet: a packet of any length we measure, with its overhead.
pub const BUFFER_LEN: usize = 2048;

/// The transport message that carries an inner packet as long as the default MTU.
pub const FULL_MESSAGE_LEN: usize = DEFAULT_MTU + TRANSPORT_OVERHEAD;

/// Randomness that is the same in every run.
pub fn rng() -> StdRng {
    StdRng::seed_from_u64(0x7469_6465)
}

/// An IPv4 packet of `len` bytes that says so in its header; its payload is noise.
///
/// # Panics
/// If `len` is less than an IPv4 header, or more than one can say.
pub fn ipv4_packet(len: usize) -> Vec<u8> {
    const HEADER_LEN: usize = 20;
    let total_len = u16::try_from(len).expect("an IPv4 packet has at most 65,535 bytes");
    let mut packet = vec![0; len];
    rng().fill(&mut packet[HEADER_LEN..]);
    packet[0] = 0x45; // version 4, header of five words
    packet[2..4].copy_from_slice(&total_len.to_be_bytes());
    packet[8] = 64; // TTL
    packet[9] = 17; // UDP
    packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
    packet[16..20].copy_from_slice(&[10, 0, 0, 2]);
    packet
}

/// A message of this type and length, to the keypair with this index, with noise in it.
///
/// # Panics
/// If `len` is less than that of any message.
pub fn message(kind: u8, index: ReceiverIndex, len: usize) -> Vec<u8> {
    let mut message = vec![0; len];
    message[0] = kind;
    message[4..8].copy_from_slice(&index.to_wire());
    rng().fill(&mut message[8..]);
    message
}

/// The Ethernet frame that brings `message` from some address to `dst`.
///
/// # Panics
/// If the message is longer than IP can say.
pub fn frame(dst: SocketAddr, message: &[u8]) -> Vec<u8> {
    let src: IpAddr = match dst {
        SocketAddr::V4(_) => Ipv4Addr::new(198, 51, 100, 1).into(),
        SocketAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 1).into(),
    };
    let headers = OuterHeaders {
        dst_mac: [2, 0, 0, 0, 0, 2],
        src_mac: [2, 0, 0, 0, 0, 1],
        tags: [None, None],
        src: SocketAddr::new(src, 4444),
        dst,
        tos: 0,
        ttl: 64,
        id: 0,
    };
    let mut frame = vec![0; headers.len()];
    frame.extend_from_slice(message);
    headers.write(&mut frame).expect("the frame is as long as its headers say");
    frame
}

/// Two ends of a boringtun tunnel after their handshake; both may send. The static keys are always
/// the same, those of the session never.
pub fn connected_tunns() -> (Tunn, Tunn) {
    let mut rng = rng();
    let [a, b] = [(); 2].map(|()| StaticSecret::from(rng.random::<[u8; 32]>()));
    let (a_public, b_public) = (PublicKey::from(&a), PublicKey::from(&b));
    let mut initiator = Tunn::new(a, b_public, None, None, 1, None);
    let mut responder = Tunn::new(b, a_public, None, None, 2, None);

    let mut buffers = [[0; BUFFER_LEN]; 4];
    let [initiation, response, keepalive, nothing] = &mut buffers;
    let initiation = to_network(initiator.format_handshake_initiation(initiation, false));
    let response = to_network(responder.decapsulate(None, initiation, response));
    let keepalive = to_network(initiator.decapsulate(None, response, keepalive));
    let end = responder.decapsulate(None, keepalive, nothing);
    assert!(matches!(end, TunnResult::Done), "a keepalive carries nothing");
    (initiator, responder)
}

/// What boringtun wants to send.
///
/// # Panics
/// If it wants anything else.
pub fn to_network(result: TunnResult<'_>) -> &mut [u8] {
    match result {
        TunnResult::WriteToNetwork(datagram) => datagram,
        other => panic!("boringtun sends nothing: {other:?}"),
    }
}

/// Times `iterations` calls of `run` on something that they use up: before every `run_count` calls
/// (which are given 0, 1, 2, … below that), `refill` makes it new, and that is not timed.
pub fn time_with_refills<T>(
    iterations: u64,
    run_count: usize,
    used_up: &mut T,
    mut refill: impl FnMut(&mut T),
    mut run: impl FnMut(&mut T, usize),
) -> Duration {
    let mut elapsed = Duration::ZERO;
    let mut left = iterations;
    while left > 0 {
        let now_count = left.min(run_count as u64);
        refill(used_up);
        let start = Instant::now();
        for i in 0..now_count as usize {
            run(used_up, i);
        }
        elapsed += start.elapsed();
        left -= now_count;
    }
    elapsed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connected_tunns_carry_a_packet_each_way() {
        let (mut a, mut b) = connected_tunns();
        let packet = ipv4_packet(1440);
        for _ in 0..2 {
            let (mut sealed, mut opened) = ([0; BUFFER_LEN], [0; BUFFER_LEN]);
            let datagram = to_network(a.encapsulate(&packet, &mut sealed));
            match b.decapsulate(None, datagram, &mut opened) {
                TunnResult::WriteToTunnelV4(inner, _) => assert_eq!(inner, packet),
                other => panic!("{other:?}"),
            }
            std::mem::swap(&mut a, &mut b);
        }
    }

    #[test]
    fn refills_come_before_they_are_needed_and_calls_are_counted() {
        let (mut refill_count, mut runs) = (0, Vec::new());
        time_with_refills(
            7,
            3,
            &mut 0,
            |left| {
                *left = 3;
                refill_count += 1;
            },
            |left, i| {
                assert_eq!(*left, 3 - i);
                *left -= 1;
                runs.push(i);
            },
        );
        assert_eq!((refill_count, runs), (3, vec![0, 1, 2, 0, 1, 2, 0]));
    }
}
