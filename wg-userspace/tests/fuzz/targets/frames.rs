//! What a datagram is, where it stands in its frame, and what an opened packet says of itself.

use std::net::{IpAddr, SocketAddr};

use wg_common::headers::{
    InnerPacket, OuterDatagram, OuterHeaders, VlanTag, inner_destination, inner_packet, locate,
    parse_frame,
};
use wg_common::id::ReceiverIndex;
use wg_common::message::{Message, classify};
use wg_common::outcome::DropReason;

/// Reads the same bytes as a message, as a frame and as an inner packet.
pub fn run(data: &[u8]) {
    assert_eq!(classify(data), classify_slowly(data));
    assert_eq!(inner_packet(data), inner_slowly(data));
    // A destination is asked for with less: the header must be whole, lengths are the kernel's.
    match (inner_packet(data), inner_destination(data)) {
        (Ok(packet), destination) => assert_eq!(destination, Ok(packet.dst)),
        (Err(DropReason::BadInnerVersion), destination) => {
            assert_eq!(destination, Err(DropReason::BadInnerVersion));
        }
        (Err(_), _) => {}
    }
    let parsed = parse_frame(data);
    assert_eq!(parsed, frame_slowly(data));
    assert_eq!(parsed.is_some(), locate(data).is_some());
    if let Some(datagram) = parsed {
        rewrite(data, &datagram);
    }
}

/// A frame with the same headers and payload, written by us, is read as the same datagram.
fn rewrite(frame: &[u8], read: &OuterDatagram) {
    let tag = |at: usize| {
        let field = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        let tag = VlanTag { ethertype: field(at), control: field(at + 2) };
        matches!(tag.ethertype, 0x8100 | 0x88a8).then_some(tag)
    };
    let outer = tag(12);
    let headers = OuterHeaders {
        dst_mac: [1; 6],
        src_mac: [2; 6],
        tags: [outer, outer.and_then(|_| tag(16))],
        src: read.src,
        dst: read.dst,
        tos: read.tos,
        ttl: 64,
        id: 0,
    };
    let mut written = vec![0; headers.len()];
    written.extend_from_slice(&frame[read.payload.clone()]);
    headers.write(&mut written).expect("what was read can be written");
    let again = parse_frame(&written).expect("what was written can be read");
    assert_eq!((again.src, again.dst, again.tos), (read.src, read.dst, read.tos));
    assert_eq!(written[again.payload], frame[read.payload.clone()]);
}

fn classify_slowly(data: &[u8]) -> Result<Message, DropReason> {
    let index = |at: usize| ReceiverIndex::from_wire(data[at..at + 4].try_into().unwrap());
    match (data.len(), data) {
        (..8, _) => Err(DropReason::BadLength),
        (_, [0 | 5.., ..]) => Err(DropReason::BadType),
        (_, [_, a, b, c, ..]) if [a, b, c] != [&0; 3] => Err(DropReason::BadReserved),
        (148, [1, ..]) => Ok(Message::Initiation),
        (92, [2, ..]) => Ok(Message::Response(index(8))),
        (64, [3, ..]) => Ok(Message::CookieReply(index(4))),
        (32.., [4, ..]) => Ok(Message::Transport(index(4))),
        _ => Err(DropReason::BadLength),
    }
}

fn big(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

fn address(bytes: &[u8]) -> IpAddr {
    match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).unwrap()),
        _ => IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap()),
    }
}

fn inner_slowly(data: &[u8]) -> Result<InnerPacket, DropReason> {
    let Some(first) = data.first() else { return Err(DropReason::BadInnerLength) };
    let (fixed_len, header_len, total_len, addresses) = match first >> 4 {
        4 => (20, usize::from(first % 16) * 4, data.get(2..4).map(big), [12..16, 16..20]),
        6 => (40, 40, data.get(4..6).map(|len| big(len) + 40), [8..24, 24..40]),
        _ => return Err(DropReason::BadInnerVersion),
    };
    let len = total_len.unwrap_or(0);
    if data.len() < fixed_len || header_len < fixed_len || len < header_len || len > data.len() {
        return Err(DropReason::BadInnerLength);
    }
    let [src, dst] = addresses.map(|range| address(&data[range]));
    Ok(InnerPacket { src, dst, len })
}

fn frame_slowly(frame: &[u8]) -> Option<OuterDatagram> {
    let mut rest = frame.get(12..)?;
    for _ in 0..2 {
        if matches!(rest, [0x81, 0, ..] | [0x88, 0xa8, ..]) {
            rest = rest.get(4..)?;
        }
    }
    let (kind, ip) = rest.split_at_checked(2)?;
    let (addresses, tos, payload) = match kind {
        [0x08, 0x00] => {
            let header = ip.first_chunk::<20>()?;
            let is_fragment = header[6] & 0x3f != 0 || header[7] != 0;
            if header[0] != 0x45 || is_fragment || header[9] != 17 {
                return None;
            }
            ([&header[12..16], &header[16..20]], header[1], ip.get(20..big(&header[2..4]))?)
        }
        [0x86, 0xdd] => {
            let header = ip.first_chunk::<40>()?;
            if header[0] >> 4 != 6 || header[6] != 17 {
                return None;
            }
            let class = header[0] << 4 | header[1] >> 4;
            let payload = ip.get(40..40 + big(&header[4..6]))?;
            ([&ip[8..24], &ip[24..40]], class, payload)
        }
        _ => return None,
    };
    let udp = payload.get(..8)?;
    let message = payload.get(8..big(&udp[4..6]))?;
    let start = message.as_ptr() as usize - frame.as_ptr() as usize;
    let [src, dst] = addresses.map(address);
    Some(OuterDatagram {
        src: SocketAddr::new(src, big(&udp[..2]) as u16),
        dst: SocketAddr::new(dst, big(&udp[2..4]) as u16),
        tos,
        payload: start..start + message.len(),
    })
}

/// Frames with and without tags, messages of each type, inner packets of both versions.
pub fn seeds() -> Vec<Vec<u8>> {
    let tag = |ethertype| Some(VlanTag { ethertype, control: 0x2005 });
    let mut seeds = Vec::new();
    for (src, dst) in [("192.0.2.1:7", "192.0.2.2:51820"), ("[fd00::1]:7", "[fd00::2]:51820")] {
        for tags in [[None, None], [tag(0x8100), None], [tag(0x88a8), tag(0x8100)]] {
            let headers = OuterHeaders {
                dst_mac: [1; 6],
                src_mac: [2; 6],
                tags,
                src: src.parse().unwrap(),
                dst: dst.parse().unwrap(),
                tos: 0x88,
                ttl: 64,
                id: 0,
            };
            let mut frame = vec![4; headers.len() + 40];
            headers.write(&mut frame).unwrap();
            seeds.push(frame.clone());
            // What the frame carries is an IP packet, too.
            seeds.push(frame.split_off(headers.len() - if src.starts_with('[') { 48 } else { 28 }));
        }
    }
    for (kind, len) in [(1, 148), (2, 92), (3, 64), (4, 32), (4, 48)] {
        let mut message = vec![0; len];
        message[0] = kind;
        message[8] = 7;
        seeds.push(message);
    }
    seeds
}
