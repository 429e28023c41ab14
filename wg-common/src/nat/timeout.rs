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
