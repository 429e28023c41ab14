//! Packets as hosts send them, made for tests field by field.

use std::net::IpAddr;

use wg_common::headers::{Checksum, IPV4_LEN, IPV6_LEN, PROTOCOL_UDP, UDP_LEN};

const PROTOCOL_TCP: u8 = 6;

/// The fields of a packet of TCP or UDP. Lengths and checksums are what they must be.
#[derive(Clone, Debug)]
pub struct TestPacket {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub ports: (u16, u16),
    /// TOS or traffic class.
    pub tos: u8,
    pub ttl: u8,
    /// In IPv4; with the bits that stand behind it.
    pub id: u16,
    pub fragment: u16,
    /// In IPv6.
    pub label: u32,
    pub upper: TestUpper,
    pub payload: Vec<u8>,
}

#[derive(Clone, Debug)]
pub enum TestUpper {
    Udp,
    Tcp {
        sequence: u32,
        ack: u32,
        /// The low bits of the thirteenth byte, and the fourteenth.
        flags: u16,
        window: u16,
        urgent: u16,
        /// A multiple of four bytes.
        options: Vec<u8>,
    },
}

impl TestPacket {
    /// The packet with this number of a TCP stream in which each carries `payload_len` bytes.
    pub fn tcp(src: &str, dst: &str, number: usize, payload_len: usize) -> Self {
        let upper = TestUpper::Tcp {
            sequence: 0xffff_f000_u32.wrapping_add((number * payload_len) as u32),
            ack: 0x0102_0304,
            flags: 0x10,
            window: 501,
            urgent: 0,
            options: vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
        };
        Self { upper, ..Self::udp(src, dst, number, payload_len) }
    }

    /// The packet with this number of a UDP flow in which each carries `payload_len` bytes.
    pub fn udp(src: &str, dst: &str, number: usize, payload_len: usize) -> Self {
        Self {
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            ports: (5001, 5002),
            tos: 2,
            ttl: 63,
            id: 0xfff0_u16.wrapping_add(number as u16),
            fragment: 0x4000,
            label: 0x12345,
            upper: TestUpper::Udp,
            payload: (0..payload_len).map(|at| (number * 31 + at) as u8).collect(),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let (protocol, at_checksum) = match self.upper {
            TestUpper::Udp => (PROTOCOL_UDP, 6),
            TestUpper::Tcp { .. } => (PROTOCOL_TCP, 16),
        };
        let mut upper = self.upper_header();
        upper.extend(&self.payload);
        let pseudo = Checksum::pseudo(self.src, self.dst, protocol, upper.len() as u32);
        let sum = match pseudo.bytes(&upper).finish() {
            0 if protocol == PROTOCOL_UDP => 0xffff,
            sum => sum,
        };
        upper[at_checksum..at_checksum + 2].copy_from_slice(&sum.to_be_bytes());
        let mut packet = self.ip_header(protocol, upper.len());
        packet.extend(upper);
        packet
    }

    fn upper_header(&self) -> Vec<u8> {
        let mut header = [self.ports.0.to_be_bytes(), self.ports.1.to_be_bytes()].concat();
        match &self.upper {
            TestUpper::Udp => {
                header.extend(((UDP_LEN + self.payload.len()) as u16).to_be_bytes());
                header.extend([0, 0]);
            }
            TestUpper::Tcp { sequence, ack, flags, window, urgent, options } => {
                header.extend(sequence.to_be_bytes());
                header.extend(ack.to_be_bytes());
                let words = (20 + options.len()) as u16 / 4;
                header.extend((words << 12 | flags).to_be_bytes());
                header.extend(window.to_be_bytes());
                header.extend([0, 0]);
                header.extend(urgent.to_be_bytes());
                header.extend(options);
            }
        }
        header
    }

    fn ip_header(&self, protocol: u8, upper_len: usize) -> Vec<u8> {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut header = vec![0x45, self.tos];
                header.extend(((IPV4_LEN + upper_len) as u16).to_be_bytes());
                header.extend(self.id.to_be_bytes());
                header.extend(self.fragment.to_be_bytes());
                header.extend([self.ttl, protocol, 0, 0]);
                header.extend(src.octets());
                header.extend(dst.octets());
                let sum = Checksum::default().bytes(&header).finish();
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                header
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let first = 6 << 28 | u32::from(self.tos) << 20 | self.label;
                let mut header = first.to_be_bytes().to_vec();
                header.extend((upper_len as u16).to_be_bytes());
                header.extend([protocol, self.ttl]);
                header.extend(src.octets());
                header.extend(dst.octets());
                assert_eq!(header.len(), IPV6_LEN);
                header
            }
            _ => panic!("addresses of one version"),
        }
    }
}
