//! What the kernel says that a NIC's driver can do with XDP: the generic netlink family `netdev`, which
//! there is from Linux 6.3 on.

use std::io;

use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NlasIterator};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

/// `struct nlmsghdr` and `struct genlmsghdr`.
const HEADER_LEN: usize = 16;
const GENERIC_LEN: usize = 4;
const ERROR: u16 = 2;

/// What a driver can do (`enum netdev_xdp_act`, `NETDEV_A_DEV_XDP_ZC_MAX_SEGS`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct XdpFeatures {
    /// Programs in native mode, and what they need to hand packets to XSKs.
    pub native: bool,
    /// XSKs in zero-copy mode.
    pub zero_copy: bool,
    /// Packets of several buffers.
    pub multi_buffer: bool,
    /// Buffers of a packet in zero-copy mode; 1 if it takes no packets of several.
    pub zero_copy_segments: u32,
}

/// What the driver of an interface can do; nothing if the kernel does not tell: it is too old, or the
/// interface is gone.
pub fn xdp_features(ifindex: u32) -> Option<XdpFeatures> {
    const CONTROLLER: u16 = 0x10;
    const GET_FAMILY: u8 = 3;
    const FAMILY_ID: u16 = 1;
    const FAMILY_NAME: u16 = 2;
    const GET_DEVICE: u8 = 1;
    const INTERFACE: u16 = 1;

    let mut socket = Socket::new(NETLINK_GENERIC).ok()?;
    socket.bind_auto().ok()?;
    socket.connect(&SocketAddr::new(0, 0)).ok()?;
    let family = ask(&socket, CONTROLLER, GET_FAMILY, FAMILY_NAME, b"netdev\0").ok()?;
    let family = number(&family, FAMILY_ID)? as u16;
    let device = ask(&socket, family, GET_DEVICE, INTERFACE, &ifindex.to_ne_bytes()).ok()?;
    XdpFeatures::parse(&device)
}

impl XdpFeatures {
    /// Reads the attributes of a device.
    fn parse(attributes: &[u8]) -> Option<Self> {
        const FEATURES: u16 = 3;
        const ZERO_COPY_SEGMENTS: u16 = 4;
        const BASIC: u64 = 1;
        const REDIRECT: u64 = 2;
        const ZERO_COPY: u64 = 8;
        const MULTI_BUFFER: u64 = 32;

        let features = number(attributes, FEATURES)?;
        let has = |all| features & all == all;
        Some(Self {
            native: has(BASIC | REDIRECT),
            zero_copy: has(BASIC | REDIRECT | ZERO_COPY),
            multi_buffer: has(MULTI_BUFFER),
            zero_copy_segments: number(attributes, ZERO_COPY_SEGMENTS).unwrap_or(1) as u32,
        })
    }
}

/// Asks a family with one attribute, and gives the attributes of the answer.
fn ask(
    socket: &Socket,
    family: u16,
    command: u8,
    attribute: u16,
    value: &[u8],
) -> io::Result<Vec<u8>> {
    let attribute_len = 4 + value.len();
    let len = HEADER_LEN + GENERIC_LEN + attribute_len.next_multiple_of(4);
    let mut message = Vec::with_capacity(len);
    message.extend((len as u32).to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend((NLM_F_REQUEST & !NLM_F_ACK).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend((attribute_len as u16).to_ne_bytes());
    message.extend(attribute.to_ne_bytes());
    message.extend(value);
    message.resize(len, 0);
    socket.send(&message, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let refused = || io::Error::from(io::ErrorKind::Unsupported);
    let kind = answer.get(4..6).ok_or_else(refused)?;
    if kind == ERROR.to_ne_bytes() {
        return Err(refused());
    }
    answer.get(HEADER_LEN + GENERIC_LEN..).map(<[u8]>::to_vec).ok_or_else(refused)
}

/// The number that an attribute is, of 16, 32 or 64 bits.
fn number(attributes: &[u8], kind: u16) -> Option<u64> {
    let found = NlasIterator::new(attributes).flatten().find(|nla| nla.kind() == kind)?;
    match *found.value() {
        [a, b] => Some(u16::from_ne_bytes([a, b]).into()),
        [a, b, c, d] => Some(u32::from_ne_bytes([a, b, c, d]).into()),
        ref eight => Some(u64::from_ne_bytes(eight.try_into().ok()?)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn features_are_read_from_their_bits() {
        let device = |bits: u64| {
            let mut bytes = attribute(1, &7_u32.to_ne_bytes());
            bytes.extend(attribute(3, &bits.to_ne_bytes()));
            bytes.extend(attribute(4, &17_u32.to_ne_bytes()));
            XdpFeatures::parse(&bytes).unwrap()
        };
        let none = XdpFeatures { zero_copy_segments: 17, ..XdpFeatures::default() };
        assert_eq!(device(0), none);
        // Without native mode and redirection there is nothing to hand packets over with.
        assert_eq!(device(1 | 8), none);
        assert_eq!(device(1 | 2 | 4), XdpFeatures { native: true, ..none });
        let all = XdpFeatures { native: true, zero_copy: true, multi_buffer: true, ..none };
        assert_eq!(device(0x7f), all);
        assert_eq!(XdpFeatures::parse(&attribute(1, &[0; 4])), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = XdpFeatures::parse(&bytes);
        }
    }
}
