//! What becomes of a packet: why it is dropped, and where the kernel side counted it.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why a packet was dropped. A reason's value is its index in every table of counters.
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        #[repr(u8)]
        pub enum DropReason { $($(#[$doc])* $name,)* }

        impl DropReason {
            /// All reasons, in the order of their values.
            pub const ALL: &[DropReason] = &[$(DropReason::$name,)*];
            /// Number of reasons.
            pub const COUNT: usize = Self::ALL.len();

            /// The reason's name in `tidegate show`, reports and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(DropReason::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// The datagram has no length that a message of its type can have.
    BadLength = "bad_length",
    /// The first byte names no message.
    BadType = "bad_type",
    /// The three reserved bytes are not zero.
    BadReserved = "bad_reserved",
    /// No handshake or keypair has this receiver index.
    UnknownIndex = "unknown_index",
    /// mac1 does not fit our public key.
    BadMac1 = "bad_mac1",
    /// The tag does not verify.
    BadTag = "bad_tag",
    /// The counter was seen before, or is older than the replay window.
    Replay = "replay",
    /// The keypair is older than Reject-After-Time, or its counter passed Reject-After-Messages.
    KeyExpired = "key_expired",
    /// The opened packet is neither IPv4 nor IPv6.
    BadInnerVersion = "bad_inner_version",
    /// The opened packet's header or length does not hold together.
    BadInnerLength = "bad_inner_length",
    /// The sender does not own the inner source address.
    SourceNotAllowed = "source_not_allowed",
    /// No peer owns the inner destination address.
    NoPeer = "no_peer",
    /// The peer has no endpoint yet.
    NoEndpoint = "no_endpoint",
    /// Too many packets wait for the peer's keypair already.
    StagedFull = "staged_full",
    /// The handshake that a staged packet waited for was given up.
    HandshakeFailed = "handshake_failed",
    /// A bounded queue between threads was full.
    QueueFull = "queue_full",
    /// The worker at which the peer is at home does not move.
    HomeStuck = "home_stuck",
    /// No buffer was free.
    NoBuffer = "no_buffer",
    /// The packet is larger than a buffer or the MTU.
    TooLarge = "too_large",
    /// The TUN device did not take the packet.
    TunWrite = "tun_write",
    /// The socket did not take the datagram.
    SocketSend = "socket_send",
    /// A handshake message did not decrypt, or came from nobody we know.
    BadHandshake = "bad_handshake",
    /// A handshake initiation repeated an old timestamp.
    OldTimestamp = "old_timestamp",
    /// A peer sent initiations faster than it may.
    InitiationFlood = "initiation_flood",
    /// Under load, a handshake message came without a right mac2: it earned a cookie reply.
    CookieDemanded = "cookie_demanded",
    /// Under load, a handshake message was more than its source, or all sources, may send.
    RateLimited = "rate_limited",
    /// Under load, newer handshake messages went first.
    Outdated = "outdated",
    /// The sender of an initiation is being looked up; it will be answered when that is done.
    LookupPending = "lookup_pending",
    /// Nobody knows the sender of an initiation.
    UnknownPeer = "unknown_peer",
    /// Too many look-ups are under way.
    LookupLimit = "lookup_limit",
    /// The device has no private key.
    NoPrivateKey = "no_private_key",
    /// All receiver indexes are in use or at rest.
    NoIndex = "no_index",
    /// The interface is down.
    InterfaceDown = "interface_down",
    /// The device is quiesced: it makes no keypairs.
    Quiesced = "quiesced",
    /// The packet is one of our own datagrams: the tunnel is routed into itself.
    RoutingLoop = "routing_loop",
    /// The keypair has been handed over to another process.
    HandedOver = "handed_over",
    /// An XSK's rx ring was full: the worker did not keep up.
    XskRingFull = "xsk_ring_full",
    /// An XSK had no chunk to receive into, or the packet did not fit into one.
    XskNoChunk = "xsk_no_chunk",
    /// No device of this process listens on the port that a frame was sent to.
    NoDevice = "no_device",
    /// What the kernel left to be done on a packet (segments, a checksum) does not fit its headers.
    BadOffload = "bad_offload",
    /// The kernel dropped the datagram before a UDP socket that had no room: the worker did not keep up.
    /// (Or its UDP checksum was wrong: the kernel counts both as one.)
    SocketFull = "socket_full",
    /// The NIC did not keep up with what an XSK sends.
    XskSend = "xsk_send",
    /// It came out of the tunnel, but no peer owns its source.
    SourceUnowned = "source_unowned",
    /// No `Allow` line names it, and it answers nothing that one does.
    NotAllowed = "not_allowed",
    /// It is to be translated, but is of a protocol or form (options, extension headers, an unknown ICMP message)
    /// that cannot be.
    Untranslatable = "untranslatable",
    /// It is a fragment to be translated, and the first one has not come.
    FragmentUnknown = "fragment_unknown",
    /// It is to be translated, but the NIC has no address of its family at present.
    NoExternal = "no_external",
    /// All ports of its protocol at the external address are in use.
    NoPort = "no_port",
    /// The table of flows or of mappings is full.
    FlowsFull = "flows_full",
    /// It came to a port that stands for an inner one, from somebody to whom nothing was sent from there.
    Unsolicited = "unsolicited",
    /// An ICMP error about no flow that is known.
    UnrelatedError = "unrelated_error",
    /// It is to be translated, and no route leads to where it goes.
    NoRoute = "no_route",
    /// Its TTL or hop limit is used up.
    HopLimit = "hop_limit",
    /// The kernel did not let the packet be changed.
    NotChanged = "not_changed",
    /// Too large, or its TTL or hop limit is used up, and as many such packets were answered as may be.
    AnswerLimited = "answer_limited",
    /// It is to be translated, is of no known flow, and cannot begin one: an echo reply, or TCP that is neither a SYN
    /// nor from the midst of a connection.
    BeginsNothing = "begins_nothing",
    /// The thread that was given the packet to seal or open did not give it back in time.
    HelperStuck = "helper_stuck",
}

macro_rules! events {
    ($(#[$events:meta])* $enum:ident { $($(#[$doc:meta])* $name:ident = $text:literal,)* }) => {
        $(#[$events])*
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        #[repr(u8)]
        pub enum $enum { $($(#[$doc])* $name,)* }

        impl $enum {
            /// All events, in the order of their values.
            pub const ALL: &[$enum] = &[$($enum::$name,)*];
            /// Number of events.
            pub const COUNT: usize = Self::ALL.len();

            /// The event's name in `tidegate show`, reports and metrics.
            pub const fn name(self) -> &'static str {
                match self { $($enum::$name => $text,)* }
            }
        }
    };
}

events! {
    /// What the steer program counts beside drops. A value is an index in its counter map,
    /// after the drop reasons.
    SteerEvent {
        /// Went to this queue's XSK.
        Steered = "steered",
        /// Not for us: another protocol, port or address, or a form we leave to the kernel.
        PassedForeign = "passed_foreign",
        /// For us, but this queue has no XSK.
        PassedNoXsk = "passed_no_xsk",
        /// For us, but this queue's worker has not moved for a while.
        PassedStale = "passed_stale",
        /// For us, but longer than what this queue's XSK takes.
        PassedTooLong = "passed_too_long",
    }
}

events! {
    /// What the programs of NAT count beside drops. A value is an index in their counter map, after the drop
    /// reasons.
    NatEvent {
        /// Translated, and sent out of a NIC.
        TranslatedOut = "translated_out",
        /// Translated, and sent into the tunnel.
        TranslatedIn = "translated_in",
        /// Allowed, and left to the kernel to forward.
        PassedAllowed = "passed_allowed",
        /// No line is about it: left to the kernel.
        PassedForeign = "passed_foreign",
        /// Left to the kernel, which does not forward it but tells its sender why: it is too large, or its TTL or
        /// hop limit is used up.
        PassedToRefuse = "passed_to_refuse",
        /// Answered with an ICMP error that the program wrote: too large, or TTL or hop limit used up.
        Answered = "answered",
        /// The next hop's link address was not known, or not fresh: the kernel asked for it.
        Resolved = "resolved",
        /// A port could not be used: a socket of this host listens on it.
        PortInUse = "port_in_use",
    }
}

/// Entries of the steer program's counter map: drop reasons, then steer events.
pub const STEER_COUNTER_COUNT: usize = DropReason::COUNT + SteerEvent::COUNT;
/// Entries of NAT's counter map: drop reasons, then its events.
pub const NAT_COUNTER_COUNT: usize = DropReason::COUNT + NatEvent::COUNT;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_count_from_zero_and_names_differ() {
        let reasons = DropReason::ALL.iter().map(|reason| (*reason as usize, reason.name()));
        let events =
            SteerEvent::ALL.iter().map(|event| (DropReason::COUNT + *event as usize, event.name()));
        let mut names = std::collections::BTreeSet::new();
        for (expected, (value, name)) in reasons.chain(events).enumerate() {
            assert_eq!(value, expected, "{name}");
            assert!(names.insert(name), "{name} twice");
        }
        assert_eq!(names.len(), STEER_COUNTER_COUNT);
    }
}
