//! How long what is idle is kept: the times of the kernel's connection tracking, or more where an RFC asks for it.

use core::time::Duration;

use crate::headers::{PROTOCOL_TCP, PROTOCOL_UDP};
use crate::nat::map::{Flow, FlowKey, SEEN_IN, SEEN_OUT};
use crate::nat::tcp::State;
use crate::upper::{PROTOCOL_ICMP, PROTOCOL_ICMPV6};

/// A flow of TCP in which something is not acknowledged.
const TCP_UNACKNOWLEDGED: Duration = Duration::from_secs(300);
/// A mapping of UDP, and what may come to it (RFC 4787 REQ-5).
const UDP: Duration = Duration::from_secs(120);
/// Question and answer of a service with a well-known port (RFC 4787 REQ-5 a).
const UDP_SHORT: Duration = Duration::from_secs(30);
/// Age from which a flow of UDP is more than question and answer.
const UDP_STREAM_NS: u64 = 2_000_000_000;
/// Well-known ports are below this one.
const WELL_KNOWN_PORTS: u16 = 1024;
/// Echoes (RFC 5508 REQ-2); connection tracking has 30 s.
const ECHO: Duration = Duration::from_secs(60);
/// Other protocols.
const OTHER: Duration = Duration::from_secs(600);

/// How long a flow may be idle: it ends that long after [`Flow::last_seen_ns`].
pub const fn of(key: &FlowKey, flow: &Flow) -> Duration {
    match key.protocol {
        PROTOCOL_TCP => of_tcp(flow),
        PROTOCOL_UDP => of_udp(key, flow),
        PROTOCOL_ICMP | PROTOCOL_ICMPV6 => ECHO,
        _ => OTHER,
    }
}

/// How long a mapping is kept without a flow, from [`Slot::last_seen_ns`](crate::nat::map::Slot::last_seen_ns), or the
/// end of its last flow, on. That of UDP is kept so long in any case, since others may send to it.
pub const fn of_mapping(protocol: u8) -> Duration {
    match protocol {
        PROTOCOL_UDP => UDP,
        _ => Duration::ZERO,
    }
}

const fn of_tcp(flow: &Flow) -> Duration {
    let seconds = match State::of(flow.state) {
        State::None | State::SynSent | State::FinWait | State::TimeWait => 120,
        State::SynReceived | State::CloseWait => 60,
        State::LastAck => 30,
        State::Closed => 10,
        State::Established => {
            let [inside, outside] = &flow.windows;
            if inside.end != inside.acked || outside.end != outside.acked {
                return TCP_UNACKNOWLEDGED;
            }
            432_000
        }
    };
    Duration::from_secs(seconds)
}

const fn of_udp(key: &FlowKey, flow: &Flow) -> Duration {
    let is_answered = flow.state & (SEEN_OUT | SEEN_IN) == SEEN_OUT | SEEN_IN;
    let is_stream = flow.last_seen_ns.saturating_sub(flow.created_ns) > UDP_STREAM_NS;
    let remote_port = u16::from_be(key.remote_port);
    let is_well_known = remote_port != 0 && remote_port < WELL_KNOWN_PORTS;
    if is_well_known && !(is_answered && is_stream) { UDP_SHORT } else { UDP }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::AddressKey;
    use crate::nat::map::{FlowKind, NO_RULE, NO_SLOT, TcpWindow};
    use crate::nat::tcp::{self, From, Segment, flags};

    fn key(protocol: u8, remote_port: u16) -> FlowKey {
        FlowKey {
            inner: AddressKey::v4([10, 9, 0, 2]),
            remote: AddressKey::v4([192, 0, 2, 1]),
            inner_port: 40_000_u16.to_be(),
            remote_port: remote_port.to_be(),
            protocol,
            padding: [0; 3],
        }
    }

    fn flow(state: u8, age_ns: u64) -> Flow {
        Flow {
            last_seen_ns: 1_000 + age_ns,
            created_ns: 1_000,
            packets: [0; 2],
            bytes: [0; 2],
            external: AddressKey([0; 4]),
            slot: NO_SLOT,
            generation: 0,
            version: 0,
            rule: NO_RULE,
            external_port: 0,
            kind: FlowKind::Source as u8,
            state,
            nic: 1,
            windows: [TcpWindow::default(); 2],
        }
    }

    fn seconds(key: &FlowKey, flow: &Flow) -> u64 {
        of(key, flow).as_secs()
    }

    #[test]
    fn only_questions_to_well_known_ports_end_early() {
        let both = SEEN_OUT | SEEN_IN;
        for (port, state, age_ns, expected) in [
            (53, SEEN_OUT, 0, 30),
            (53, both, 1_000_000_000, 30),
            (53, both, 3_000_000_000, 120),
            (53, SEEN_OUT, 3_000_000_000, 30),
            (1024, SEEN_OUT, 0, 120),
            (3478, both, 0, 120),
            // What a mapping is reached by.
            (0, SEEN_OUT, 0, 120),
        ] {
            assert_eq!(
                seconds(&key(17, port), &flow(state, age_ns)),
                expected,
                "{port} {state} {age_ns}"
            );
        }
        assert!(of_mapping(17) >= Duration::from_secs(120), "RFC 4787 REQ-5");
    }

    #[test]
    fn other_protocols_have_their_times() {
        assert_eq!(seconds(&key(1, 0), &flow(SEEN_OUT, 0)), 60);
        assert_eq!(seconds(&key(58, 0), &flow(SEEN_OUT, 0)), 60);
        assert_eq!(seconds(&key(47, 0), &flow(SEEN_OUT, 0)), 600);
    }

    #[test]
    fn tcp_goes_by_state() {
        let segment = |flags: u8, seq: u32, len: u32, ack: u32| Segment {
            flags,
            scale: 0,
            seq,
            end: seq + len,
            ack,
            window: 1000,
        };
        let (syn, fin, ack) = (flags::SYN, flags::FIN, flags::ACK);
        let (inside, outside) = (From::Inside, From::Outside);
        let mut flow = flow(0, 0);
        let mut at = Vec::new();
        for (from, segment) in [
            (inside, segment(syn, 100, 1, 0)),
            (outside, segment(syn | ack, 500, 1, 101)),
            (inside, segment(ack, 101, 0, 501)),
            (inside, segment(ack, 101, 50, 501)),
            (outside, segment(ack, 501, 0, 151)),
            (inside, segment(ack | fin, 151, 1, 501)),
            (outside, segment(ack, 501, 0, 152)),
            (outside, segment(ack | fin, 501, 1, 152)),
            (inside, segment(ack, 152, 0, 502)),
        ] {
            flow.state = tcp::step(flow.state, &mut flow.windows, &segment, from);
            at.push(seconds(&key(6, 443), &flow));
        }
        assert_eq!(at, [120, 60, 432_000, 300, 432_000, 120, 60, 30, 120]);
        flow.state =
            tcp::step(flow.state, &mut flow.windows, &segment(flags::RST, 152, 0, 0), inside);
        assert_eq!(seconds(&key(6, 443), &flow), 10);
    }
}
