//! Super-packets from a TUN queue: what is cut from any bytes is packets that hold together, and no byte of
//! the payload is lost or moved.

use wg_common::headers::{Checksum, inner_packet};
use wg_common::upper::upper;
use wg_userspace::segments::{Cut, VnetHeader, finish_checksum};

/// A virtio header, then the packet.
pub fn run(data: &[u8]) {
    let Some((header, packet)) = data.split_first_chunk::<{ VnetHeader::LEN }>() else { return };
    let Some(header) = VnetHeader::from_bytes(header) else { return };
    let Some(segments) = header.segments else {
        if let Some(checksum) = header.checksum {
            let at = usize::from(checksum.start) + usize::from(checksum.offset);
            let finished = finish_checksum(checksum, &mut packet.to_vec());
            assert_eq!(finished.is_ok(), at + 2 <= packet.len());
        }
        return;
    };
    let Ok(cut) = Cut::new(segments, header.checksum, packet) else { return };
    let mut payload = Vec::new();
    let mut headers_len = None;
    for index in 0..cut.count() {
        let mut segment = vec![0; cut.segment_len(index)];
        assert_eq!(cut.write(packet, index, &mut segment), segment.len());
        let inner = inner_packet(&segment).expect("it has a whole IP header");
        assert_eq!(inner.len, segment.len());
        let behind = upper(&segment).expect("it carries what the whole did");
        let rest = &segment[behind.offset..];
        if behind.offset == if inner.src.is_ipv4() { 20 } else { 40 } {
            let len = rest.len() as u32;
            let sum = Checksum::pseudo(inner.src, inner.dst, behind.protocol, len);
            assert_eq!(sum.bytes(rest).finish(), 0);
        }
        let header_len = if behind.protocol == 6 { usize::from(rest[12] >> 4) * 4 } else { 8 };
        assert!(rest.len() - header_len <= segments.payload_len.into());
        let headers_len = *headers_len.get_or_insert(behind.offset + header_len);
        assert_eq!(headers_len, behind.offset + header_len);
        payload.extend_from_slice(&segment[headers_len..]);
    }
    assert_eq!(payload, packet[headers_len.expect("there is one segment at least")..]);
}

/// Of each kind one that can be cut, and a packet whose checksum is unfinished.
pub fn seeds() -> Vec<Vec<u8>> {
    let header = |flags: u8, gso: u8, start: u16, offset: u16| {
        let words = [0, 100, start, offset].map(u16::to_ne_bytes).concat();
        [&[flags, gso][..], &words].concat()
    };
    let v4 = |protocol: u8, rest: &[u8]| {
        let len = 20 + rest.len() as u16;
        let mut packet = vec![0x45, 1, (len >> 8) as u8, len as u8, 0, 9, 0x40, 0, 64, protocol];
        packet.extend([0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        [&packet[..], rest].concat()
    };
    let v6 = |protocol: u8, rest: &[u8]| {
        let mut packet = vec![0x60, 0, 0, 0, (rest.len() >> 8) as u8, rest.len() as u8];
        packet.extend([protocol, 64]);
        packet.extend([0xfd; 32]);
        [&packet[..], rest].concat()
    };
    let mut tcp = vec![0, 1, 0, 2, 9, 9, 9, 9, 8, 8, 8, 8, 0x50, 0x99, 1, 1, 3, 4, 0, 0];
    tcp.extend(0..=255);
    let mut udp = vec![0, 1, 0, 2, 1, 8, 5, 6];
    udp.extend(0..=255);
    let seeds = [
        (header(1, 0x81, 20, 16), v4(6, &tcp)),
        (header(1, 4, 40, 16), v6(6, &tcp)),
        (header(0, 5, 0, 0), v4(17, &udp)),
        (header(1, 5, 40, 6), v6(17, &udp)),
        (header(1, 0, 20, 6), v4(17, &udp)),
    ];
    seeds.into_iter().map(|(header, packet)| [header, packet].concat()).collect()
}
