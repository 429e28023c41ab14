//! How long do the steps between AEAD and the TUN device take for a packet?
//!
//! `join`: a batch of opened packets of 1,440 bytes, whose checksums are looked at, becomes runs with all
//! that is written for them; nothing is written. Of `1` flow of TCP, as it fills one run (47) or a batch
//! (64); of `8` flows, one packet of each after the other; of `64`, where nothing can be joined.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use benches::{BATCH_MAX, ipv4_packet};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use wg_common::headers::{Checksum, IPV4_LEN};
use wg_userspace::segments::join::{Batch, Plan};

const PACKET_LEN: usize = 1440;
const TCP: u8 = 6;
const TCP_LEN: usize = 32;
/// Packets of [`PACKET_LEN`] of which a super-packet has room.
const RUN_LEN: usize = 47;

/// A packet of a TCP stream to port `flow`, the one with this number.
fn tcp_packet(flow: usize, number: usize) -> Vec<u8> {
    let mut packet = ipv4_packet(PACKET_LEN);
    packet[4..6].copy_from_slice(&(number as u16).to_be_bytes());
    packet[9] = TCP;
    packet[10..12].fill(0);
    let sum = Checksum::default().bytes(&packet[..IPV4_LEN]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());

    let address = |at: usize| {
        let octets: [u8; 4] = *packet[at..].first_chunk().expect("an IPv4 header");
        IpAddr::from(Ipv4Addr::from(octets))
    };
    let upper_len = PACKET_LEN - IPV4_LEN;
    let pseudo = Checksum::pseudo(address(12), address(16), TCP, upper_len as u32);
    let tcp = &mut packet[IPV4_LEN..];
    let sequence = number * (upper_len - TCP_LEN);
    tcp[..2].copy_from_slice(&5001_u16.to_be_bytes());
    tcp[2..4].copy_from_slice(&(flow as u16).to_be_bytes());
    tcp[4..8].copy_from_slice(&(sequence as u32).to_be_bytes());
    // Acknowledgement; header length, ACK, window; checksum, urgent pointer; options.
    tcp[8..12].fill(7);
    tcp[12..16].copy_from_slice(&[(TCP_LEN / 4 * 16) as u8, 0x10, 1, 0]);
    tcp[16..20].fill(0);
    tcp[20..TCP_LEN].fill(1);
    let sum = pseudo.bytes(tcp).finish();
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    packet
}

fn join(c: &mut Criterion) {
    let mut group = c.benchmark_group("join");
    for (flow_count, packet_count) in
        [(1, RUN_LEN), (1, BATCH_MAX), (8, BATCH_MAX), (64, BATCH_MAX)]
    {
        let packets: Vec<_> = (0..packet_count)
            .map(|number| tcp_packet(number % flow_count, number / flow_count))
            .collect();
        let all = Batch::from_iter(packets.iter().map(Vec::as_slice));
        let expected = flow_count.max(packet_count.div_ceil(RUN_LEN));
        assert_eq!(Plan::of(&all, true).runs().count(), expected, "they are joined");

        group.throughput(Throughput::Elements(packet_count as u64));
        group.bench_function(BenchmarkId::new(flow_count.to_string(), packet_count), |b| {
            b.iter(|| {
                let batch = Batch::from_iter(black_box(&packets).iter().map(Vec::as_slice));
                for run in Plan::of(&batch, true).runs() {
                    let head = run.head();
                    black_box(run.parts(&head));
                }
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = join
}
criterion_main!(benches);
