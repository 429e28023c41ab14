//! What `ethtool` asks of a NIC: how many queues it uses, and which of them get what.

use std::io;
use std::os::fd::AsRawFd as _;

use libc::{IFNAMSIZ, ifreq};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

// `linux/ethtool.h`.
const GET_CHANNELS: u32 = 0x3c;
const GET_RULE_COUNT: u32 = 0x2e;
const GET_RULE: u32 = 0x2f;
const GET_RULES: u32 = 0x30;
const GET_SPREAD: u32 = 0x46;

/// `struct ethtool_channels`: the command, then eight counts.
const CHANNELS_LEN: usize = 9 * 4;
/// `struct ethtool_rxnfc` without the places of rules at its end, and where things are in it.
const RULES_LEN: usize = 192;
const RULE_AT: usize = 16;
const RULE_LEN: usize = 168;
const COUNT_AT: usize = 184;
const PLACES_AT: usize = 188;
/// Place in the `struct ethtool_rx_flow_spec` at [`RULE_AT`].
const RULE_PLACE_AT: usize = RULE_AT + 160;
/// `struct ethtool_rxfh` without the tables at its end.
const SPREAD_LEN: usize = 24;

/// More rules than any NIC has.
const RULES_MAX: usize = 16 << 10;
/// More entries than any NIC's table has.
const SPREAD_MAX: usize = 64 << 10;

/// IP version and UDP port.
pub type PortOf = (IpKind, u16);

/// Which IP a rule is about.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum IpKind {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Where a rule sends packets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RuleTarget {
    /// Nowhere.
    Drop,
    /// To this queue.
    Queue(u32),
    /// To the queues of this RSS context.
    Context(u32),
    /// To a function of the NIC that is not this interface.
    Elsewhere,
}

/// A rule by which a NIC chooses the queue for some packets (`ethtool -n`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rule {
    /// Of what it is about, if that is all UDP datagrams to one port and nothing else.
    pub port: Option<PortOf>,
    /// Where those go.
    pub target: RuleTarget,
}

/// The number of receive queues in use.
///
/// # Errors
/// `EOPNOTSUPP` if the driver does not tell; `ENODEV`.
pub fn rx_queue_count(interface: &str) -> io::Result<u32> {
    let mut channels = [0; CHANNELS_LEN];
    ask(interface, GET_CHANNELS, &mut channels)?;
    // After the command and four greatest counts: rx, tx, other, combined.
    Ok(word(&channels, 20).saturating_add(word(&channels, 32)))
}

/// The rules of the NIC.
///
/// # Errors
/// `EOPNOTSUPP` if its driver has none.
pub fn rules(interface: &str) -> io::Result<Vec<Rule>> {
    let mut request = vec![0; RULES_LEN];
    ask(interface, GET_RULE_COUNT, &mut request)?;
    let count = word(&request, COUNT_AT) as usize;
    if count == 0 {
        return Ok(Vec::new());
    }
    if count > RULES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut request = vec![0; RULES_LEN + 4 * count];
    set_word(&mut request, COUNT_AT, count as u32);
    ask(interface, GET_RULES, &mut request)?;
    let found = (word(&request, COUNT_AT) as usize).min(count);
    let places = (0..found).map(|i| word(&request, PLACES_AT + 4 * i));
    places.map(|place| rule(interface, place)).collect()
}

fn rule(interface: &str, place: u32) -> io::Result<Rule> {
    let mut request = vec![0; RULES_LEN];
    set_word(&mut request, RULE_PLACE_AT, place);
    ask(interface, GET_RULE, &mut request)?;
    let context = word(&request, COUNT_AT);
    let spec = request[RULE_AT..].first_chunk().expect("a request has room for a rule");
    Ok(Rule::parse(spec, context))
}

impl Rule {
    /// Reads a `struct ethtool_rx_flow_spec`, and the context beside it.
    fn parse(spec: &[u8; RULE_LEN], context: u32) -> Self {
        const UDP_V4: u32 = 2;
        const UDP_V6: u32 = 6;
        const TO_CONTEXT: u32 = 0x2000_0000;
        const EXTENDED: u32 = 0xc000_0000;
        const MASK_AT: usize = 76;
        const MASK_LEN: usize = 52 + 20;
        const NOWHERE: u64 = u64::MAX;

        let kind = word(spec, 0);
        let cookie = u64::from_ne_bytes(*spec[152..].first_chunk().expect("it is longer"));
        let target = if cookie == NOWHERE {
            RuleTarget::Drop
        } else if kind & TO_CONTEXT != 0 {
            RuleTarget::Context(context)
        } else if cookie >> 32 != 0 {
            RuleTarget::Elsewhere
        } else {
            RuleTarget::Queue(cookie as u32)
        };
        // Addresses, then source port, then destination port.
        let (ip, port_at) = match kind & !TO_CONTEXT & !EXTENDED {
            UDP_V4 => (Some(IpKind::V4), 10),
            UDP_V6 => (Some(IpKind::V6), 34),
            _ => (None, 10),
        };
        let mut mask = [0; MASK_LEN];
        mask[port_at..port_at + 2].fill(0xff);
        let is_port_alone = spec[MASK_AT..MASK_AT + MASK_LEN] == mask;
        let port = u16::from_be_bytes([spec[4 + port_at], spec[4 + port_at + 1]]);
        Self { port: ip.filter(|_| is_port_alone).map(|ip| (ip, port)), target }
    }
}

/// The queues over which the NIC spreads what no rule is about, or what a rule gives to an RSS `context`;
/// 0 is the one that is always there. An entry of its table each.
///
/// # Errors
/// `EOPNOTSUPP` if the driver does not tell; the kernel's, if there is no such context.
pub fn spread(interface: &str, context: u32) -> io::Result<Vec<u32>> {
    let mut request = vec![0; SPREAD_LEN];
    set_word(&mut request, 4, context);
    ask(interface, GET_SPREAD, &mut request)?;
    let (entries, key) = (word(&request, 8) as usize, word(&request, 12) as usize);
    if entries > SPREAD_MAX || key > SPREAD_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut request = vec![0; SPREAD_LEN + 4 * entries + key];
    set_word(&mut request, 4, context);
    set_word(&mut request, 8, entries as u32);
    set_word(&mut request, 12, key as u32);
    ask(interface, GET_SPREAD, &mut request)?;
    Ok((0..entries).map(|i| word(&request, SPREAD_LEN + 4 * i)).collect())
}

/// Sends `request` with its command, whose first word that is, and has it overwritten by the answer.
fn ask(interface: &str, command: u32, request: &mut [u8]) -> io::Result<()> {
    if interface.len() >= IFNAMSIZ {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    set_word(request, 0, command);
    let any = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: all zeroes are an `ifreq`: numbers, and a pointer that is null.
    let mut ifreq: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in ifreq.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    ifreq.ifr_ifru.ifru_data = request.as_mut_ptr().cast();
    // SAFETY: SIOCETHTOOL reads and writes the structure of the command at `ifru_data`. Every caller in this
    // file gives a buffer of that structure's length, with room for as many places or entries as it says to
    // have; the kernel writes no more than those. It has no pointers in it and needs no alignment: the kernel
    // copies it.
    let result = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut ifreq) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(*bytes[at..].first_chunk().expect("places in a request are constants"))
}

fn set_word(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(kind: u32, cookie: u64, value: &[(usize, u8)], mask: &[(usize, u8)]) -> [u8; RULE_LEN] {
        let mut spec = [0; RULE_LEN];
        set_word(&mut spec, 0, kind);
        spec[152..160].copy_from_slice(&cookie.to_ne_bytes());
        value.iter().for_each(|&(at, byte)| spec[4 + at] = byte);
        mask.iter().for_each(|&(at, byte)| spec[76 + at] = byte);
        spec
    }

    #[test]
    fn a_rule_is_of_a_port_only_if_it_is_about_nothing_else() {
        let (v4, v6) = (Some((IpKind::V4, 51820)), Some((IpKind::V6, 51820)));
        let to = |at| [(at, 0xca), (at + 1, 0x6c)];
        let all = |at| [(at, 0xff), (at + 1, 0xff)];
        for (name, kind, value, mask, port) in [
            ("UDP over IPv4", 2, to(10), all(10).to_vec(), v4),
            ("UDP over IPv6", 6, to(34), all(34).to_vec(), v6),
            ("the same in a context", 2 | 0x2000_0000, to(10), all(10).to_vec(), v4),
            ("TCP", 1, to(10), all(10).to_vec(), None),
            ("a range of ports", 2, to(10), vec![(10, 0xff)], None),
            ("a source port", 2, to(8), all(8).to_vec(), None),
            ("also an address", 2, to(10), [all(10), all(0)].concat(), None),
            ("also a VLAN", 2 | 0x8000_0000, to(10), [all(10), all(62)].concat(), None),
            ("everything", 2, to(10), vec![], None),
        ] {
            let rule = Rule::parse(&spec(kind, 3, &value, &mask), 7);
            assert_eq!(rule.port, port, "{name}");
            let target =
                if kind & 0x2000_0000 == 0 { RuleTarget::Queue(3) } else { RuleTarget::Context(7) };
            assert_eq!(rule.target, target, "{name}");
        }
        let target = |cookie| Rule::parse(&spec(2, cookie, &[], &[]), 0).target;
        assert_eq!(target(u64::MAX), RuleTarget::Drop);
        assert_eq!(target(1 << 32 | 3), RuleTarget::Elsewhere);
    }

    #[test]
    fn what_has_no_queues_says_so() {
        assert!(rx_queue_count("no-such-link").is_err());
        assert!(rx_queue_count("a-name-that-is-too-long").is_err());
        assert!(rules("lo").is_err() && spread("lo", 0).is_err());
    }
}
