//! What becomes of a packet: the whole decision, over traits that the programs and the tests fill.
//!
//! [`from_tunnel`] judges what comes out of a TUN device, [`from_nic`] what comes in by a NIC. A packet of a flow
//! that is known needs a look at the flow, at its slot and at the way out; one that begins a flow is held against
//! the rules. What a rule covers is translated or dropped, in whatever form it comes.

use crate::headers::{PROTOCOL_TCP, PROTOCOL_UDP};
use crate::map::AddressKey;
use crate::nat::error::{self, Error, HEAD_LEN_MAX, HEAD_LEN_V4};
use crate::nat::limit;
use crate::nat::map::{
    ALLOW_RULES_LEN, AllowRule, EXTERNALS_LEN, External, FORWARD_RULES_LEN, Flow, FlowKey,
    FlowKind, ForwardRule, FragmentEntry, FragmentKey, Mapping, MappingKey, NAT_RULES_LEN, NO_RULE,
    NO_SLOT, NatRule, PORTS_LEN, Prefix, Protocol, RuleSet, SEEN_IN, SEEN_OUT, Slot, TcpWindow,
    fragment_verdict, ring, rule_flags, slot_index,
};
use crate::nat::packet::{Room, Skb};
use crate::nat::rewrite::{Change, End, decrement_ttl, translate, translate_error};
use crate::nat::tcp::{self, From, Segment};
use crate::nat::tuple::{Kind, Tuple};
use crate::outcome::{DropReason, NatEvent};
use crate::upper::{PROTOCOL_ICMP, PROTOCOL_ICMPV6};

/// Where a packet would go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Route {
    /// Out of the device with this index.
    Out(u32),
    /// It is too large for the device on its way; one of `len` 0 never is.
    TooBig,
    /// To this host, or to several (multicast).
    Local,
    /// Nowhere: the kernel does not forward it.
    Refused,
    /// By a way that a program cannot take.
    Unknown,
}

/// What the hook does with a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// The next program gets it, or the kernel, unchanged.
    Pass(NatEvent),
    /// Dropped.
    Drop(DropReason),
    /// Out of the NIC that [`Tables::route`] found last.
    Out,
    /// Into the tunnel.
    In,
    /// Its sender is to be told in the name of who it was sent to, by [`answer`]; it is unchanged.
    Answer(Error),
}

impl Verdict {
    /// The verdict that a number of [`Code`] stands for.
    #[inline(always)]
    fn of(code: Code) -> Self {
        let value = code.0 & Code::VALUE;
        match code.0 >> Code::SHIFT {
            Code::PASS => Self::Pass(event_of(value)),
            Code::DROP => Self::Drop(reason_of(value)),
            Code::OUT => Self::Out,
            Code::IN => Self::In,
            Code::TIME_EXCEEDED => Self::Answer(Error::TimeExceeded),
            Code::TOO_BIG => Self::Answer(Error::TooBig(value)),
            _ => Self::Drop(DropReason::NotChanged),
        }
    }
}

/// A verdict in one register, or that there is none yet: programs' functions return no more.
#[derive(Clone, Copy, Eq, PartialEq)]
#[repr(transparent)]
struct Code(u32);

impl Code {
    const SHIFT: u32 = 24;
    const VALUE: u32 = (1 << Self::SHIFT) - 1;
    const PASS: u32 = 1;
    const DROP: u32 = 2;
    const OUT: u32 = 3;
    const IN: u32 = 4;
    const TIME_EXCEEDED: u32 = 5;
    const TOO_BIG: u32 = 6;
    /// There is none yet.
    const NONE: Self = Self(0);

    #[inline(always)]
    const fn pass(event: NatEvent) -> Self {
        Self(Self::PASS << Self::SHIFT | event as u32)
    }

    #[inline(always)]
    const fn drop(reason: DropReason) -> Self {
        Self(Self::DROP << Self::SHIFT | reason as u32)
    }

    #[inline(always)]
    const fn too_big(mtu: u32) -> Self {
        Self(Self::TOO_BIG << Self::SHIFT | mtu & Self::VALUE)
    }

    #[inline(always)]
    const fn is_none(self) -> bool {
        self.0 == 0
    }
}

const FOREIGN: Code = Code::pass(NatEvent::PassedForeign);
const GO_OUT: Code = Code(Code::OUT << Code::SHIFT);
const GO_IN: Code = Code(Code::IN << Code::SHIFT);
const TIME_EXCEEDED: Code = Code(Code::TIME_EXCEEDED << Code::SHIFT);

/// The fragments of a packet are waited for no longer (RFC 8200 §4.5): another one has its identification then.
const FRAGMENTS_NS: u64 = 60_000_000_000;

/// What is known of a packet while it is judged: too much for a program's stack. Programs have one for each CPU.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    tuple: Tuple,
    /// Of the packet that an ICMP error is about.
    quoted: Tuple,
    key: FlowKey,
    other_key: FlowKey,
    mapping: MappingKey,
    flow: Flow,
    fragments: FragmentKey,
    entry: FragmentEntry,
    change: Change,
    /// Of an answer.
    head: [u8; HEAD_LEN_MAX],
    /// The rule that lets the packet begin a flow, or [`NO_RULE`].
    allowed: u32,
}

impl Work {
    /// Nothing is known.
    pub const EMPTY: Self = Self {
        tuple: NO_TUPLE,
        quoted: NO_TUPLE,
        key: NO_TUPLE.flow_from_inside(),
        other_key: NO_TUPLE.flow_from_inside(),
        mapping: NO_TUPLE.mapping(0),
        flow: new_flow(0, 0),
        fragments: NO_TUPLE.fragments(0),
        entry: FragmentEntry {
            created_ns: 0,
            source: AddressKey([0; 4]),
            destination: AddressKey([0; 4]),
            verdict: 0,
            padding: 0,
        },
        change: Change { end: End::Source, address: AddressKey([0; 4]), port: 0 },
        head: [0; HEAD_LEN_MAX],
        allowed: NO_RULE,
    };

    /// The packet's tuple, once it was judged.
    pub const fn tuple(&self) -> &Tuple {
        &self.tuple
    }
}

const NO_TUPLE: Tuple = Tuple {
    source: AddressKey([0; 4]),
    destination: AddressKey([0; 4]),
    source_port: 0,
    destination_port: 0,
    protocol: 0,
    kind: Kind::Broken,
    tos: 0,
    ttl: 0,
    is_v4: true,
    dont_fragment: false,
    is_fragment: false,
    has_checksum: false,
    upper: 0,
    fragment_id: 0,
    len: 0,
};

/// A packet's size, as far as its bytes do not tell.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segments {
    /// Bytes of each segment of a super-packet (`gso_size`); else 0.
    pub len: u32,
    /// How many there are; of another packet 0 or 1.
    pub count: u32,
}

/// The maps, and what the kernel can be asked.
pub trait Tables {
    /// Boot time in nanoseconds.
    fn now_ns(&self) -> u64;
    /// Looks a flow up. It is the found one from now on; says whether it is there.
    fn find_flow(&mut self, key: &FlowKey) -> bool;
    /// The found flow. Others may change it at the same time.
    fn found<R>(&mut self, change: impl FnOnce(&mut Flow) -> R) -> Option<R>;
    /// Makes a flow, in the place of one with its key. It is the found one then. `false` if there is no room.
    fn put_flow(&mut self, key: &FlowKey, flow: &Flow) -> bool;
    /// Removes a flow.
    fn remove_flow(&mut self, key: &FlowKey);
    /// The slot of an inner address and port.
    fn mapping(&mut self, key: &MappingKey) -> Option<Mapping>;
    /// Makes a mapping, in the place of one with its key. `false` if there is no room.
    fn put_mapping(&mut self, key: &MappingKey, mapping: &Mapping) -> bool;
    /// What a slot holds.
    fn slot(&mut self, index: u32) -> Option<Slot>;
    /// Takes a free slot, whose port was just taken from its ring: its generation.
    fn take_slot(&mut self, index: u32, inner: &AddressKey, inner_port: u16) -> Option<u32>;
    /// Says that a flow of this slot began now, or lives.
    fn touch_slot(&mut self, index: u32);
    /// Takes a port, counted from [`RuleSet::port_first`], from a ring.
    fn take_port(&mut self, ring: u32) -> Option<u32>;
    /// Whether some peer owns an address.
    fn is_owned(&mut self, address: &AddressKey) -> bool;
    /// Whether a socket of this host would get the answers to a packet to `tuple`'s destination from this address
    /// and port, in network byte order.
    fn has_socket(&mut self, tuple: &Tuple, address: &AddressKey, port: u16) -> bool;
    /// Where a packet goes whose largest segment has `len` bytes, IP header included; 0: whatever its size.
    fn route(&mut self, tuple: &Tuple, len: u32) -> Route;
    /// Has the kernel look after the link address of the next hop of a packet that goes out, as it does of its own
    /// packets: nobody else says of it that it is in use.
    fn refresh_next_hop(&mut self);
    /// Where the rule that was looked for stands: in memory of which the kernel's verifier does not keep the value. It
    /// would walk the rest of the program for each number by itself.
    fn rule(&mut self) -> &mut u32;
    /// Looks for the first of `count` entries that is met, and puts its number into [`Tables::rule`].
    fn search<Q: Search>(&mut self, rules: &RuleSet, count: u32, query: &Q) {
        if let Some(index) = (0..count).find(|index| query.is_met(rules, *index)) {
            *self.rule() = index;
        }
    }
    /// The MTU of the TUN device, if `len` is more.
    fn tunnel_mtu_below(&mut self, len: u32) -> Option<u32>;
    /// What becomes of the later fragments of a packet.
    fn fragments(&mut self, key: &FragmentKey) -> Option<FragmentEntry>;
    /// Says so.
    fn put_fragments(&mut self, key: &FragmentKey, entry: &FragmentEntry);
    /// Whether one more error of one of [`limit::KINDS`] may be sent to an address: a token is taken from the
    /// buckets of [`limit`] then.
    fn may_answer(&mut self, to: &AddressKey, kind: u32) -> bool;
    /// Index of the device by which the packet came.
    fn ifindex(&self) -> u32;
    /// Whether it is a super-packet.
    fn segments(&self) -> Segments;
    /// Counts an event that is not the verdict.
    fn count(&mut self, event: NatEvent);
    /// Counts a flow that began by an [`AllowRule`](crate::nat::map::AllowRule).
    fn count_allowed(&mut self, counter: u32);
}

/// Judges, and changes, what comes out of a TUN device.
#[inline(always)]
pub fn from_tunnel<S: Skb, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
) -> Verdict {
    if !read(packet, &mut work.tuple) {
        return Verdict::of(FOREIGN);
    }
    Verdict::of(match work.tuple.kind {
        Kind::Error => error_from_tunnel(packet, tables, rules, work),
        Kind::LaterFragment => fragment_from_tunnel(packet, tables, rules, work),
        _ if has_flow(&work.tuple) => flow_from_tunnel(packet, tables, rules, work),
        _ => other_from_tunnel(tables, rules, work, false),
    })
}

/// Judges, and changes, what comes in by a NIC.
#[inline(always)]
pub fn from_nic<S: Skb, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
) -> Verdict {
    if !read(packet, &mut work.tuple) {
        return Verdict::of(FOREIGN);
    }
    let code = match work.tuple.kind {
        Kind::Error => error_from_nic(packet, tables, rules, work),
        Kind::LaterFragment => fragment_from_nic(packet, tables, rules, work),
        _ if has_flow(&work.tuple) => flow_from_nic(packet, tables, rules, work),
        _ => Code::NONE,
    };
    Verdict::of(if !code.is_none() {
        code
    } else if rules.flags & rule_flags::DENY == 0 {
        FOREIGN
    } else {
        filter_from_nic(packet, tables, rules, work)
    })
}

/// Makes the packet of a [`Verdict::Answer`] the ICMP error that its sender is to get, in the name of who it was sent to:
/// so outside nobody learns of an address inside. It goes by the way that leads to the sender, as the kernel's errors
/// do, which need not be that by which the packet came.
#[inline(always)]
pub fn answer<S: Room, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
    error: Error,
) -> Verdict {
    let code = match error {
        Error::TimeExceeded => TIME_EXCEEDED,
        Error::TooBig(mtu) => Code::too_big(mtu),
    };
    Verdict::of(answer_by(packet, tables, rules, work, code))
}

/// As above, with the error as a code.
#[inline(never)]
fn answer_by<S: Room, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
    code: Code,
) -> Code {
    let (kind, reason) = match code.0 >> Code::SHIFT {
        Code::TOO_BIG => (limit::TOO_BIG, DropReason::TooLarge),
        _ => (limit::TIME_EXCEEDED, DropReason::HopLimit),
    };
    if !error::may_be_answered(&work.tuple) {
        return Code::drop(reason);
    }
    // Before the costly part.
    if !tables.may_answer(&work.tuple.source, kind) {
        return Code::drop(DropReason::AnswerLimited);
    }
    work.quoted = error::answer_tuple(&work.tuple);
    let Route::Out(to) = tables.route(&work.quoted, 0) else {
        return Code::drop(DropReason::NoRoute);
    };
    let len = write_head(packet, work, code);
    if len == 0 {
        return Code::drop(reason);
    }
    if put_head(packet, work, len) {
        if to == rules.tun { GO_IN } else { GO_OUT }
    } else {
        Code::drop(DropReason::NotChanged)
    }
}

/// Writes the head of the answer: how much of the packet it quotes, or 0 if there can be none.
#[inline(never)]
fn write_head<S: Skb>(packet: &S, work: &mut Work, code: Code) -> u32 {
    let error = match code.0 >> Code::SHIFT {
        Code::TOO_BIG => Error::TooBig(code.0 & Code::VALUE),
        _ => Error::TimeExceeded,
    };
    let (tuple, head) = (&work.tuple, &mut work.head);
    error::write_head(packet, tuple, error, &tuple.destination, head).unwrap_or(0)
}

/// Puts the head before what is quoted of the packet.
#[inline(never)]
fn put_head<S: Room>(packet: &mut S, work: &Work, len: u32) -> bool {
    let is_put = match work.head.first_chunk::<HEAD_LEN_V4>() {
        Some(head) if work.tuple.is_v4 => packet.put_before(head, len),
        _ => packet.put_before(&work.head, len),
    };
    is_put.is_some()
}

/// Reads what the packet is; `false` if it is none of IP.
#[inline(never)]
fn read<S: Skb>(packet: &S, tuple: &mut Tuple) -> bool {
    match Tuple::of(packet) {
        Some(read) => {
            *tuple = read;
            true
        }
        None => false,
    }
}

/// Reads the packet that an ICMP error is about, if the error goes to who sent that: else a flow of somebody's would let
/// it reach anybody.
#[inline(never)]
fn read_quoted<S: Skb>(packet: &S, tuple: &Tuple, quoted: &mut Tuple) -> bool {
    match tuple.quoted(packet) {
        Some(read) => {
            *quoted = read;
            difference(&quoted.source, &tuple.destination) == 0
        }
        None => false,
    }
}

/// Judges a packet with ports that comes out of the tunnel.
#[inline(always)]
fn flow_from_tunnel<S: Skb, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
) -> Code {
    let mut from = From::Inside;
    work.key = work.tuple.flow_from_inside();
    if !is_known(tables, rules, &work.key) {
        match judge_from_tunnel(tables, rules, work) {
            BEGUN => {}
            // Not by the judge: calls of calls share a stack.
            WANTS_SLOT => {
                if !may_begin(packet, &work.tuple) {
                    return Code::drop(DropReason::BeginsNothing);
                }
                count_allowed(tables, rules, work.allowed);
                let code = map_source(tables, rules, work);
                if !code.is_none() {
                    return code;
                }
                let code = begin_mapped(tables, work);
                if !code.is_none() {
                    return code;
                }
            }
            ANSWER => from = From::Outside,
            code if code.0 >> Code::SHIFT == HAIRPIN.0 >> Code::SHIFT => {
                let rule = code.0 & Code::VALUE;
                return match find_forwarded(tables, rules, work, rule) {
                    FOUND => accounted_into_tunnel(packet, tables, work),
                    code => code,
                };
            }
            code => return code,
        }
    }
    let Some(kind) = tables.found(|flow| flow.kind) else { return FOREIGN };
    let code = account(packet, tables, &work.tuple, from);
    if !code.is_none() {
        return code;
    }
    if is_plain(kind) {
        pass_fragments(tables, work);
        return Code::pass(NatEvent::PassedAllowed);
    }
    let code = out_of_tunnel(packet, tables, rules, work, kind == FlowKind::Source as u8);
    if code != TURNS_BACK {
        return code;
    }
    // In pieces: calls of calls share a stack.
    let external = turn(tables, rules, work);
    if external == NO_RULE {
        return FOREIGN;
    }
    let code = match find_mapped(tables, rules, work, external) {
        FOUND => account(packet, tables, &work.tuple, From::Outside),
        Code::NONE => FOREIGN,
        code => code,
    };
    if code.is_none() { turned(packet, tables, work) } else { code }
}

/// Makes the tuple of a packet of the found flow, which goes to an address of this host, what it would be had it gone out
/// and come back: from the flow's external address and port, which are in `work.change` then. Gives the external
/// address to which it goes, or [`NO_RULE`].
#[inline(never)]
fn turn<T: Tables>(tables: &mut T, rules: &RuleSet, work: &mut Work) -> u32 {
    let Some(nic) = tables.found(|flow| flow.nic) else { return NO_RULE };
    let external = external_at(tables, rules, &work.tuple.destination, nic);
    if external == NO_RULE || work.tuple.is_echo() {
        return NO_RULE;
    }
    work.change.end = End::Source;
    let change = &mut work.change;
    tables.found(|flow| (change.address, change.port) = (flow.external, flow.external_port));
    work.quoted = work.tuple;
    work.tuple.source = work.change.address;
    work.tuple.source_port = work.change.port;
    external
}

/// Sends a packet of which [`turn`] was asked to who is inside, by `work.key`: both ends get their external addresses
/// (RFC 4787 REQ-9), of which the second is translated back at once.
#[inline(never)]
fn turned<S: Skb, T: Tables>(packet: &mut S, tables: &mut T, work: &mut Work) -> Code {
    work.tuple = work.quoted;
    if work.tuple.ttl <= 1 {
        return TIME_EXCEEDED;
    }
    let len = packet_len(packet, tables, &work.tuple);
    if let Some(mtu) = tables.tunnel_mtu_below(len) {
        return Code::too_big(mtu);
    }
    let source = work.change.address;
    if translate(packet, &work.tuple, &work.change).is_none() {
        return Code::drop(DropReason::NotChanged);
    }
    work.change =
        Change { end: End::Destination, address: work.key.inner, port: work.key.inner_port };
    if translate(packet, &work.tuple, &work.change).is_none()
        || decrement_ttl(packet, &work.tuple).is_none()
    {
        return Code::drop(DropReason::NotChanged);
    }
    if work.tuple.is_fragment {
        work.entry.source = source;
        work.entry.destination = work.key.inner;
        note_fragments(tables, work, fragment_verdict::IN);
    }
    GO_IN
}

/// Sends a packet of the found flow, which is translated, to where it goes.
#[inline(never)]
fn out_of_tunnel<S: Skb, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
    keeps_nic: bool,
) -> Code {
    let len = packet_len(packet, tables, &work.tuple);
    let route = tables.route(&work.tuple, len);
    if keeps_nic && route == Route::Local {
        return TURNS_BACK;
    }
    if work.tuple.ttl <= 1 {
        return Code::pass(NatEvent::PassedToRefuse);
    }
    let to = match route {
        Route::Out(to) => to,
        // The kernel refuses what must not be fragmented, and tells its sender in the words in which he sent it.
        Route::TooBig if work.tuple.dont_fragment => return Code::pass(NatEvent::PassedToRefuse),
        Route::TooBig => return Code::drop(DropReason::TooLarge),
        Route::Local | Route::Refused => return FOREIGN,
        Route::Unknown => return Code::drop(DropReason::NoRoute),
    };
    let Some(nic) = tables.found(|flow| flow.nic) else { return FOREIGN };
    if keeps_nic && to != nic && to != rules.tun {
        // The way leads elsewhere now, where another address may stand for it: the next packet begins anew.
        tables.remove_flow(&work.key);
        return Code::drop(DropReason::NoRoute);
    }
    work.change.end = End::Source;
    let change = &mut work.change;
    tables.found(|flow| (change.address, change.port) = (flow.external, flow.external_port));
    if translate(packet, &work.tuple, &work.change).is_none()
        || decrement_ttl(packet, &work.tuple).is_none()
    {
        return Code::drop(DropReason::NotChanged);
    }
    let is_inward = to == rules.tun;
    if work.tuple.is_fragment {
        work.entry.source = work.change.address;
        work.entry.destination = work.tuple.destination;
        let verdict = if is_inward { fragment_verdict::IN } else { fragment_verdict::OUT };
        note_fragments(tables, work, verdict);
    }
    if is_inward { GO_IN } else { GO_OUT }
}

/// Judges a packet with ports that comes in by a NIC, as far as it is to be translated.
#[inline(always)]
fn flow_from_nic<S: Skb, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
) -> Code {
    let nic = tables.ifindex();
    let external = external_at(tables, rules, &work.tuple.destination, nic);
    if external != NO_RULE && work.tuple.kind as u8 != Kind::EchoRequest as u8 {
        match find_mapped(tables, rules, work, external) {
            FOUND => return accounted_into_tunnel(packet, tables, work),
            Code::NONE => {}
            code => return code,
        }
    }
    let rule = forward_rule(tables, rules, &work.tuple, nic);
    if rule == NO_RULE {
        return Code::NONE;
    }
    match find_forwarded(tables, rules, work, rule) {
        FOUND => accounted_into_tunnel(packet, tables, work),
        code => code,
    }
}

/// Whether a packet from inside can begin a flow: only then does it get a port.
#[inline(never)]
fn may_begin<S: Skb>(packet: &S, tuple: &Tuple) -> bool {
    match tuple.kind {
        Kind::Tcp => Segment::of(packet, tuple).is_some_and(|segment| segment.may_begin()),
        kind => kind as u8 != Kind::EchoReply as u8,
    }
}

/// Whether a packet has ports, or an identifier, by which its flow is known.
#[inline(always)]
const fn has_flow(tuple: &Tuple) -> bool {
    // No flow has port 0: it stands for all ports.
    tuple.slots().is_some()
        && (tuple.is_echo() || (tuple.source_port != 0 && tuple.destination_port != 0))
}

/// The event of this value.
#[inline(always)]
fn event_of(value: u32) -> NatEvent {
    NatEvent::ALL.get(value as usize).copied().unwrap_or(NatEvent::PassedForeign)
}

/// The reason of this value.
#[inline(always)]
fn reason_of(value: u32) -> DropReason {
    DropReason::ALL.get(value as usize).copied().unwrap_or(DropReason::NotChanged)
}

#[inline(always)]
const fn is_plain(kind: u8) -> bool {
    kind == FlowKind::Plain as u8 || kind == FlowKind::PlainInbound as u8
}

/// Bytes of the largest packet that goes out, IP header included.
#[inline(always)]
fn packet_len<S: Skb, T: Tables>(packet: &S, tables: &T, tuple: &Tuple) -> u32 {
    match tables.segments().len {
        0 => tuple.len,
        len => tuple.segment_len(packet, len).unwrap_or(tuple.len),
    }
}

/// How many packets it is.
#[inline(always)]
fn segment_count<S: Skb, T: Tables>(packet: &S, tables: &T, tuple: &Tuple) -> u64 {
    match tables.segments() {
        // Nobody has counted those of a super-packet from a TUN device yet.
        Segments { len, count: 0 } if len != 0 => {
            let whole = tuple.segment_len(packet, len).unwrap_or(len);
            let payload = (packet.len() as u32).saturating_sub(whole - len);
            payload.div_ceil(len).max(1).into()
        }
        Segments { count, .. } => count.max(1).into(),
    }
}

/// Looks a flow up that holds: its slot is still its own, and the rules still want it.
#[inline(never)]
fn is_known<T: Tables>(tables: &mut T, rules: &RuleSet, key: &FlowKey) -> bool {
    if !tables.find_flow(key) {
        return false;
    }
    let Some((slot, generation, version)) =
        tables.found(|flow| (flow.slot, flow.generation, flow.version))
    else {
        return false;
    };
    let holds = slot == NO_SLOT || tables.slot(slot).is_some_and(|s| s.generation == generation);
    if holds && (version == rules.version || is_still_wanted(tables, rules, key)) {
        return true;
    }
    tables.remove_flow(key);
    false
}

/// Judges the found flow by other rules than those by which it began.
#[inline(never)]
fn is_still_wanted<T: Tables>(tables: &mut T, rules: &RuleSet, key: &FlowKey) -> bool {
    let Some((kind, nic, slot)) = tables.found(|flow| (flow.kind, flow.nic, flow.slot)) else {
        return false;
    };
    let Some((external, external_port)) = tables.found(|flow| (flow.external, flow.external_port))
    else {
        return false;
    };
    let rule = if kind == FlowKind::Forward as u8 {
        let rule = forward_rule_at(tables, rules, &external, (external_port, key.protocol), nic);
        let found = forward_with(rules, rule);
        let is_same = difference(&found.to, &key.inner) == 0 && found.to_port == key.inner_port;
        if rule == NO_RULE || !is_same {
            return false;
        }
        rule
    } else {
        let (from, to, port) = if kind == FlowKind::PlainInbound as u8 {
            (&key.remote, &key.inner, key.inner_port)
        } else {
            (&key.inner, &key.remote, key.remote_port)
        };
        let allowed = allow_rule(tables, rules, from, to, (port, key.protocol));
        if rules.flags & rule_flags::DENY != 0 && allowed == NO_RULE {
            return false;
        }
        if kind == FlowKind::Source as u8 {
            let rule = nat_rule(tables, rules, &key.inner, nic);
            if !may_have(rules, rule, slot)
                || external_of(rules, slot).is_none_or(|now| difference(now, &external) != 0)
            {
                return false;
            }
            rule
        } else {
            // What must be translated now did not begin so.
            if kind == FlowKind::Plain as u8 && nat_rule(tables, rules, &key.inner, nic) != NO_RULE
            {
                return false;
            }
            allowed
        }
    };
    let version = rules.version;
    tables.found(|flow| {
        flow.version = version;
        flow.rule = rule;
    });
    true
}

/// Counts a packet of the found flow, and follows its state. A verdict if it does not hold together.
#[inline(never)]
fn account<S: Skb, T: Tables>(packet: &S, tables: &mut T, tuple: &Tuple, from: From) -> Code {
    let now_ns = tables.now_ns();
    let (count, len) = (segment_count(packet, tables, tuple), packet.len() as u64);
    let is_tcp = tuple.kind as u8 == Kind::Tcp as u8;
    let mut last_seen_ns = now_ns;
    tables.found(|flow| {
        last_seen_ns = flow.last_seen_ns;
        flow.last_seen_ns = now_ns;
        let seen = match from {
            From::Inside => {
                flow.packets[0] += count;
                flow.bytes[0] += len;
                SEEN_OUT
            }
            From::Outside => {
                flow.packets[1] += count;
                flow.bytes[1] += len;
                SEEN_IN
            }
        };
        if !is_tcp {
            flow.state |= seen;
        }
    });
    // Once in about a second.
    if last_seen_ns >> 30 != now_ns >> 30 {
        tables.refresh_next_hop();
        // Else control might take the slot of a flow that wakes up while it is judged.
        if let Some(slot) = tables.found(|flow| flow.slot)
            && slot != NO_SLOT
        {
            tables.touch_slot(slot);
        }
    }
    if is_tcp { follow_tcp(packet, tables, tuple, from) } else { Code::NONE }
}

/// Follows the state of the found flow, of TCP.
#[inline(never)]
fn follow_tcp<S: Skb, T: Tables>(packet: &S, tables: &mut T, tuple: &Tuple, from: From) -> Code {
    let Some(segment) = Segment::of(packet, tuple) else {
        return Code::drop(DropReason::BadInnerLength);
    };
    tables.found(|flow| {
        if flow.state == 0 {
            (flow.state, flow.windows) = tcp::begin(&segment, from);
        } else {
            flow.state = tcp::step(flow.state, &mut flow.windows, &segment, from);
        }
    });
    Code::NONE
}

/// It has begun a flow, which is the found one.
const BEGUN: Code = Code(0x10 << Code::SHIFT);
/// It is to begin the flow of `work`, which wants a slot.
const WANTS_SLOT: Code = Code(0x14 << Code::SHIFT);
/// It answers a peer, whose flow is the found one.
const ANSWER: Code = Code(0x11 << Code::SHIFT);
/// It goes to a port that is forwarded; the value is the rule.
const HAIRPIN: Code = Code(0x12 << Code::SHIFT);
/// It goes to an address of this host, which may stand for somebody inside.
const TURNS_BACK: Code = Code(0x15 << Code::SHIFT);
/// It is of the flow that is the found one.
const FOUND: Code = Code(0x13 << Code::SHIFT);

/// Judges the first packet of a flow from inside, of key `work.key`.
#[inline(never)]
fn judge_from_tunnel<T: Tables>(tables: &mut T, rules: &RuleSet, work: &mut Work) -> Code {
    if !tables.is_owned(&work.tuple.source) {
        return Code::drop(DropReason::SourceUnowned);
    }
    let hairpin = forward_rule(tables, rules, &work.tuple, 0);
    if hairpin != NO_RULE {
        return Code(HAIRPIN.0 | hairpin & Code::VALUE);
    }
    let denies = rules.flags & rule_flags::DENY != 0;
    let (nic, turns_back) = match tables.route(&work.tuple, 0) {
        Route::Out(nic) => (nic, false),
        Route::Unknown if rules.nat_count != 0 || denies => {
            return Code::drop(DropReason::NoRoute);
        }
        Route::Local => (mapped_at(tables, rules, work), true),
        _ => return FOREIGN,
    };
    if turns_back && (nic == 0 || nat_rule(tables, rules, &work.tuple.source, nic) == NO_RULE) {
        return FOREIGN;
    }
    if denies && nic == rules.tun && is_answer_of_peer(tables, rules, work) {
        return ANSWER;
    }
    let allowed = if denies { allow_rule_of(tables, rules, &work.tuple) } else { NO_RULE };
    if denies && allowed == NO_RULE {
        return Code::drop(DropReason::NotAllowed);
    }
    let rule =
        if nic == rules.tun { NO_RULE } else { nat_rule(tables, rules, &work.tuple.source, nic) };
    if rule == NO_RULE && !denies {
        return FOREIGN;
    }
    if work.tuple.ttl <= 1 {
        return if turns_back { TIME_EXCEEDED } else { Code::pass(NatEvent::PassedToRefuse) };
    }
    work.flow = new_flow(tables.now_ns(), rules.version);
    work.flow.nic = nic;
    work.flow.rule = allowed;
    work.allowed = allowed;
    if rule != NO_RULE {
        work.flow.rule = rule;
        work.flow.kind = FlowKind::Source as u8;
        return WANTS_SLOT;
    }
    count_allowed(tables, rules, allowed);
    if tables.put_flow(&work.key, &work.flow) { BEGUN } else { Code::drop(DropReason::FlowsFull) }
}

/// The NIC with the external address and port to which a packet from inside goes, if somebody inside has them; else 0.
#[inline(never)]
fn mapped_at<T: Tables>(tables: &mut T, rules: &RuleSet, work: &mut Work) -> u32 {
    let Some(protocol) = work.tuple.slots() else { return 0 };
    *tables.rule() = NO_RULE;
    let query = ExternalAnywhere { address: &work.tuple.destination };
    tables.search(rules, rules.external_count, &query);
    let external = *tables.rule();
    if external == NO_RULE || work.tuple.is_echo() {
        return 0;
    }
    work.other_key = work.tuple.flow_from_outside();
    if !name_inner(tables, rules, &mut work.other_key, external, protocol) {
        return 0;
    }
    external_with(rules, external).nic
}

/// Begins the flow of `work`, which has a slot.
#[inline(never)]
fn begin_mapped<T: Tables>(tables: &mut T, work: &mut Work) -> Code {
    // So that what comes from another port of the same address may pass.
    if !work.tuple.is_echo() {
        work.other_key = work.key;
        work.other_key.remote_port = 0;
        if !tables.put_flow(&work.other_key, &work.flow) {
            return Code::drop(DropReason::FlowsFull);
        }
    }
    if tables.put_flow(&work.key, &work.flow) {
        Code::NONE
    } else {
        Code::drop(DropReason::FlowsFull)
    }
}

/// Whether a packet from one peer to another answers a flow that the other began, which is the found one then.
#[inline(always)]
fn is_answer_of_peer<T: Tables>(tables: &mut T, rules: &RuleSet, work: &mut Work) -> bool {
    work.other_key = work.tuple.flow_from_outside();
    is_known(tables, rules, &work.other_key)
        && tables.found(|flow| is_plain(flow.kind)) == Some(true)
}

#[inline(always)]
fn count_allowed<T: Tables>(tables: &mut T, rules: &RuleSet, rule: u32) {
    if rule != NO_RULE {
        tables.count_allowed(allow_with(rules, rule).counter);
    }
}

#[inline(always)]
const fn new_flow(now_ns: u64, version: u32) -> Flow {
    Flow {
        last_seen_ns: now_ns,
        created_ns: now_ns,
        packets: [0; 2],
        bytes: [0; 2],
        external: AddressKey([0; 4]),
        slot: NO_SLOT,
        generation: 0,
        version,
        rule: NO_RULE,
        external_port: 0,
        kind: FlowKind::Plain as u8,
        state: 0,
        nic: 0,
        windows: [TcpWindow { end: 0, end_max: 0, window_max: 0, scale: 0, acked: 0 }; 2],
    }
}

/// Finds or takes the slot for the source of a packet that rule `work.flow.rule` covers; it stands in `work.flow` then.
#[inline(never)]
fn map_source<T: Tables>(tables: &mut T, rules: &RuleSet, work: &mut Work) -> Code {
    work.mapping = work.tuple.mapping(work.flow.nic);
    if let Some(mapping) = tables.mapping(&work.mapping) {
        let holds =
            tables.slot(mapping.slot).is_some_and(|slot| slot.generation == mapping.generation);
        if holds
            && may_have(rules, work.flow.rule, mapping.slot)
            && let Some(external) = external_of(rules, mapping.slot)
        {
            tables.touch_slot(mapping.slot);
            give_slot(&mut work.flow, rules, external, mapping);
            return Code::NONE;
        }
    }
    let code = take_slot(tables, rules, work);
    if !code.is_none() {
        return code;
    }
    let mapping = Mapping { slot: work.flow.slot, generation: work.flow.generation };
    if tables.put_mapping(&work.mapping, &mapping) {
        Code::NONE
    } else {
        Code::drop(DropReason::FlowsFull)
    }
}

#[inline(always)]
fn give_slot(flow: &mut Flow, rules: &RuleSet, external: &AddressKey, mapping: Mapping) {
    flow.slot = mapping.slot;
    flow.generation = mapping.generation;
    flow.external = *external;
    flow.external_port = ((rules.port_first + mapping.slot % PORTS_LEN) as u16).to_be();
}

/// Takes a free slot at an address of the rule: the same one for all ports of an inner address (RFC 4787 §4.1), while
/// that has any.
#[inline(never)]
fn take_slot<T: Tables>(tables: &mut T, rules: &RuleSet, work: &mut Work) -> Code {
    const TRIES: u32 = 4;

    let Some(protocol) = work.tuple.slots() else {
        return Code::drop(DropReason::Untranslatable);
    };
    let rule = nat_with(rules, work.flow.rule);
    let count = rule.external_count;
    if count == 0 {
        return Code::drop(DropReason::NoExternal);
    }
    let preferred = spread(&work.tuple.source);
    let mut reason = DropReason::NoExternal;
    for attempt in 0..TRIES {
        let external = rule.external_first + (preferred + attempt) % count;
        let at = external_with(rules, external);
        if is_none(&at.address) {
            continue;
        }
        reason = DropReason::NoPort;
        let ring = ring(external, protocol);
        let Some(port) = tables.take_port(ring) else { continue };
        let index = slot_index(ring, port % PORTS_LEN);
        let number = ((rules.port_first + port) as u16).to_be();
        if tables.has_socket(&work.tuple, &at.address, number) {
            // Control finds a slot that nobody uses, and looks whether the socket is gone, too.
            let _ = tables.take_slot(index, &AddressKey([0; 4]), 0);
            tables.count(NatEvent::PortInUse);
            continue;
        }
        let taken = tables.take_slot(index, &work.tuple.source, work.tuple.source_port);
        let Some(generation) = taken else { continue };
        give_slot(&mut work.flow, rules, &at.address, Mapping { slot: index, generation });
        return Code::NONE;
    }
    Code::drop(reason)
}

/// Whether there is no address.
#[inline(always)]
const fn is_none(address: &AddressKey) -> bool {
    address.0[0] | address.0[1] | address.0[2] | address.0[3] == 0
}

/// A number below 2^31 that tells addresses apart.
#[inline(always)]
const fn spread(address: &AddressKey) -> u32 {
    let mixed = address.0[0] ^ address.0[1].rotate_left(8) ^ address.0[2].rotate_left(16);
    // What a product's low bits tell is in its factor's low bits; the high ones know of all.
    (mixed ^ address.0[3]).wrapping_mul(0x9e37_79b1).swap_bytes() >> 1
}

/// Which external address a slot is of.
#[inline(always)]
const fn external_index(slot: u32) -> u32 {
    slot / PORTS_LEN / crate::nat::map::PROTOCOLS_LEN
}

/// The address of a slot, if there is one at present.
#[inline(always)]
fn external_of(rules: &RuleSet, slot: u32) -> Option<&AddressKey> {
    let address = &external_with(rules, external_index(slot)).address;
    (!is_none(address)).then_some(address)
}

/// Whether a NAT rule gives addresses of which this slot is.
#[inline(always)]
fn may_have(rules: &RuleSet, rule: u32, slot: u32) -> bool {
    let external = external_index(slot);
    let found = nat_with(rules, rule);
    rule != NO_RULE
        && external >= found.external_first
        && external - found.external_first < found.external_count
}

// Entries of the tables by numbers that are below their lengths. A mask says so to the kernel's verifier: where there
// is a comparison, the compiler computes the address before it. By functions of their own, so that the compiler does not
// know better.

#[inline(never)]
fn external_with(rules: &RuleSet, index: u32) -> &External {
    &rules.externals[index as usize & (EXTERNALS_LEN - 1)]
}

#[inline(never)]
fn nat_with(rules: &RuleSet, index: u32) -> &NatRule {
    &rules.nat[index as usize & (NAT_RULES_LEN - 1)]
}

#[inline(never)]
fn forward_with(rules: &RuleSet, index: u32) -> &ForwardRule {
    &rules.forward[index as usize & (FORWARD_RULES_LEN - 1)]
}

#[inline(never)]
fn allow_with(rules: &RuleSet, index: u32) -> &AllowRule {
    &rules.allow[index as usize & (ALLOW_RULES_LEN - 1)]
}

const _: () = assert!(
    EXTERNALS_LEN.is_power_of_two()
        && NAT_RULES_LEN.is_power_of_two()
        && FORWARD_RULES_LEN.is_power_of_two()
        && ALLOW_RULES_LEN.is_power_of_two()
);

/// Which external address of this NIC an address is, or [`NO_RULE`].
#[inline(always)]
fn external_at<T: Tables>(tables: &mut T, rules: &RuleSet, address: &AddressKey, nic: u32) -> u32 {
    *tables.rule() = NO_RULE;
    tables.search(rules, rules.external_count, &ExternalAt { address, nic });
    *tables.rule()
}

/// 0 if both are the same.
#[inline(always)]
const fn difference(a: &AddressKey, b: &AddressKey) -> u32 {
    (a.0[0] ^ b.0[0]) | (a.0[1] ^ b.0[1]) | (a.0[2] ^ b.0[2]) | (a.0[3] ^ b.0[3])
}

/// The NAT rule that covers what comes from an inner address and goes out of a NIC, or [`NO_RULE`].
#[inline(always)]
fn nat_rule<T: Tables>(tables: &mut T, rules: &RuleSet, inner: &AddressKey, nic: u32) -> u32 {
    *tables.rule() = NO_RULE;
    tables.search(rules, rules.nat_count, &Covers { inner, nic });
    *tables.rule()
}

/// The rule that forwards such a packet that comes by a NIC (0: by whichever), or [`NO_RULE`].
#[inline(always)]
fn forward_rule<T: Tables>(tables: &mut T, rules: &RuleSet, tuple: &Tuple, nic: u32) -> u32 {
    if rules.forward_count == 0 {
        return NO_RULE;
    }
    let (address, port) = (&tuple.destination, tuple.destination_port);
    forward_rule_at(tables, rules, address, (port, tuple.protocol), nic)
}

/// As above, by a port in network byte order and an IP protocol number.
#[inline(always)]
fn forward_rule_at<T: Tables>(
    tables: &mut T,
    rules: &RuleSet,
    address: &AddressKey,
    (port, protocol): (u16, u8),
    nic: u32,
) -> u32 {
    *tables.rule() = NO_RULE;
    let protocol = match protocol {
        PROTOCOL_TCP => Protocol::Tcp as u32,
        PROTOCOL_UDP => Protocol::Udp as u32,
        _ => return NO_RULE,
    };
    let any_nic = if nic == 0 { 0 } else { u32::MAX };
    let query = Forwards { address, protocol_and_port: protocol << 16 | port as u32, nic, any_nic };
    tables.search(rules, rules.forward_count, &query);
    *tables.rule()
}

/// The rule that allows a packet to begin a flow, or [`NO_RULE`].
#[inline(always)]
fn allow_rule_of<T: Tables>(tables: &mut T, rules: &RuleSet, tuple: &Tuple) -> u32 {
    let (from, to) = (&tuple.source, &tuple.destination);
    allow_rule(tables, rules, from, to, (tuple.destination_port, tuple.protocol))
}

/// The rule that allows a flow to begin, or [`NO_RULE`]. The port is in network byte order.
#[inline(always)]
fn allow_rule<T: Tables>(
    tables: &mut T,
    rules: &RuleSet,
    from: &AddressKey,
    to: &AddressKey,
    (port, protocol): (u16, u8),
) -> u32 {
    *tables.rule() = NO_RULE;
    let port = u16::from_be(port) as u32;
    let (family, protocol) = (Prefix::family(from), one_icmp(protocol as u32));
    let query = Allows { from, to, family, protocol, port };
    tables.search(rules, rules.allow_count, &query);
    *tables.rule()
}

/// What entry of a table is looked for.
pub trait Search {
    /// Whether it is this one; what lies beyond the table is another entry.
    fn is_met(&self, rules: &RuleSet, index: u32) -> bool;
}

struct ExternalAt<'a> {
    address: &'a AddressKey,
    nic: u32,
}

impl Search for ExternalAt<'_> {
    #[inline(always)]
    fn is_met(&self, rules: &RuleSet, index: u32) -> bool {
        let external = external_with(rules, index);
        difference(&external.address, self.address) | (external.nic ^ self.nic) == 0
    }
}

struct ExternalAnywhere<'a> {
    address: &'a AddressKey,
}

impl Search for ExternalAnywhere<'_> {
    #[inline(always)]
    fn is_met(&self, rules: &RuleSet, index: u32) -> bool {
        difference(&external_with(rules, index).address, self.address) == 0
    }
}

struct Covers<'a> {
    inner: &'a AddressKey,
    nic: u32,
}

impl Search for Covers<'_> {
    #[inline(always)]
    fn is_met(&self, rules: &RuleSet, index: u32) -> bool {
        let rule = nat_with(rules, index);
        rule.from.distance(self.inner) | (rule.out ^ self.nic) == 0
    }
}

struct Forwards<'a> {
    address: &'a AddressKey,
    protocol_and_port: u32,
    nic: u32,
    any_nic: u32,
}

impl Search for Forwards<'_> {
    #[inline(always)]
    fn is_met(&self, rules: &RuleSet, index: u32) -> bool {
        let rule = forward_with(rules, index);
        let miss = difference(&rule.external, self.address)
            | ((rule.protocol << 16 | rule.port as u32) ^ self.protocol_and_port)
            | ((rule.nic ^ self.nic) & self.any_nic);
        miss == 0
    }
}

struct Allows<'a> {
    from: &'a AddressKey,
    to: &'a AddressKey,
    /// As [`Prefix::family`] has it.
    family: u32,
    protocol: u32,
    port: u32,
}

impl Search for Allows<'_> {
    #[inline(always)]
    fn is_met(&self, rules: &RuleSet, index: u32) -> bool {
        let rule = allow_with(rules, index);
        // The sign bit of a difference that is below 0.
        let below = self.port.wrapping_sub(rule.port_first as u32) >> 31;
        let above = (rule.port_last as u32).wrapping_sub(self.port) >> 31;
        let miss = rule.from.distance_within(self.from)
            | rule.to.distance_within(self.to)
            | rule.from.distance_from(self.family)
            | below
            | above;
        miss == 0 && (rule.protocol == 0 || one_icmp(rule.protocol) == self.protocol)
    }
}

/// Both ICMPs are one.
#[inline(always)]
const fn one_icmp(protocol: u32) -> u32 {
    if protocol == PROTOCOL_ICMPV6 as u32 { PROTOCOL_ICMP as u32 } else { protocol }
}

/// Finds the flow of a packet that came to an external address: [`FOUND`], with its key in `work.key`; a verdict; or
/// [`Code::NONE`] if the port is no slot that somebody has.
#[inline(never)]
fn find_mapped<T: Tables>(tables: &mut T, rules: &RuleSet, work: &mut Work, external: u32) -> Code {
    let Some(protocol) = work.tuple.slots() else { return Code::NONE };
    work.key = work.tuple.flow_from_outside();
    if !name_inner(tables, rules, &mut work.key, external, protocol) {
        return Code::NONE;
    }
    if is_known(tables, rules, &work.key) {
        return FOUND;
    }
    if work.tuple.is_echo() {
        // It may be the host's own.
        return Code::NONE;
    }
    work.other_key = work.key;
    work.other_key.remote_port = 0;
    if !is_known(tables, rules, &work.other_key) {
        return Code::drop(DropReason::Unsolicited);
    }
    work.flow = new_flow(tables.now_ns(), rules.version);
    let flow = &mut work.flow;
    tables.found(|permit| {
        flow.slot = permit.slot;
        flow.generation = permit.generation;
        flow.external = permit.external;
        flow.external_port = permit.external_port;
        flow.rule = permit.rule;
        flow.nic = permit.nic;
    });
    flow.kind = FlowKind::Source as u8;
    tables.touch_slot(flow.slot);
    if tables.put_flow(&work.key, &work.flow) { FOUND } else { Code::drop(DropReason::FlowsFull) }
}

/// Puts who has the slot of a port at an external address, the key's inner one, in its place; `false` if nobody has.
#[inline(always)]
fn name_inner<T: Tables>(
    tables: &mut T,
    rules: &RuleSet,
    key: &mut FlowKey,
    external: u32,
    protocol: Protocol,
) -> bool {
    let port = (u16::from_be(key.inner_port) as u32).wrapping_sub(rules.port_first);
    if port >= PORTS_LEN {
        return false;
    }
    let Some(slot) = tables.slot(slot_index(ring(external, protocol), port)) else {
        return false;
    };
    if slot.generation % 2 == 0 || is_none(&slot.inner) {
        return false;
    }
    key.inner = slot.inner;
    key.inner_port = slot.inner_port;
    true
}

/// Counts a packet of the found flow, which came to an external address, and sends it to who is inside: by `work.key`.
#[inline(always)]
fn accounted_into_tunnel<S: Skb, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    work: &mut Work,
) -> Code {
    let code = account(packet, tables, &work.tuple, From::Outside);
    if code.is_none() { into_tunnel(packet, tables, work) } else { code }
}

/// Sends a packet to who is inside: by `work.key`.
#[inline(never)]
fn into_tunnel<S: Skb, T: Tables>(packet: &mut S, tables: &mut T, work: &mut Work) -> Code {
    if work.tuple.ttl <= 1 {
        return TIME_EXCEEDED;
    }
    let len = packet_len(packet, tables, &work.tuple);
    if let Some(mtu) = tables.tunnel_mtu_below(len) {
        return Code::too_big(mtu);
    }
    work.change =
        Change { end: End::Destination, address: work.key.inner, port: work.key.inner_port };
    if translate(packet, &work.tuple, &work.change).is_none()
        || decrement_ttl(packet, &work.tuple).is_none()
    {
        return Code::drop(DropReason::NotChanged);
    }
    if work.tuple.is_fragment {
        work.entry.source = work.tuple.source;
        work.entry.destination = work.key.inner;
        note_fragments(tables, work, fragment_verdict::IN);
    }
    GO_IN
}

/// Finds or begins the flow of a packet that came to a forwarded port: [`FOUND`], with its key in `work.key`; or a verdict.
#[inline(never)]
fn find_forwarded<T: Tables>(tables: &mut T, rules: &RuleSet, work: &mut Work, rule: u32) -> Code {
    let found = forward_with(rules, rule);
    work.key = work.tuple.flow_from_outside();
    work.key.inner = found.to;
    work.key.inner_port = found.to_port;
    let is_there = is_known(tables, rules, &work.key)
        && tables.found(|flow| flow.kind) == Some(FlowKind::Forward as u8);
    if !is_there {
        work.flow = new_flow(tables.now_ns(), rules.version);
        work.flow.kind = FlowKind::Forward as u8;
        work.flow.external = found.external;
        work.flow.external_port = found.port;
        work.flow.nic = found.nic;
        work.flow.rule = rule;
        if !tables.put_flow(&work.key, &work.flow) {
            return Code::drop(DropReason::FlowsFull);
        }
    }
    FOUND
}

/// Judges what comes out of the tunnel and has no flow of its own, by where it goes. `is_related`: it is an error about a
/// flow that passes untranslated.
#[inline(never)]
fn other_from_tunnel<T: Tables>(
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
    is_related: bool,
) -> Code {
    let kind = work.tuple.kind as u8;
    // Errors about what cannot be delivered come in the name of who it was sent to.
    if kind != Kind::Error as u8 && !tables.is_owned(&work.tuple.source) {
        return Code::drop(DropReason::SourceUnowned);
    }
    let denies = rules.flags & rule_flags::DENY != 0;
    let nic = match tables.route(&work.tuple, 0) {
        Route::Out(nic) => nic,
        Route::Unknown if denies || rules.nat_count != 0 => {
            return Code::drop(DropReason::NoRoute);
        }
        _ => return FOREIGN,
    };
    let reason = if kind == Kind::Error as u8 {
        DropReason::UnrelatedError
    } else if kind == Kind::LaterFragment as u8 {
        DropReason::FragmentUnknown
    } else {
        DropReason::Untranslatable
    };
    if nic != rules.tun && nat_rule(tables, rules, &work.tuple.source, nic) != NO_RULE {
        return Code::drop(reason);
    }
    if is_related {
        return Code::pass(NatEvent::PassedAllowed);
    }
    if !denies {
        return FOREIGN;
    }
    if kind != Kind::Other as u8 {
        return Code::drop(reason);
    }
    work.key = work.tuple.flow_from_inside();
    let is_there = is_known(tables, rules, &work.key) || is_answer_of_peer(tables, rules, work);
    if !is_there {
        let code = begin_plain(tables, rules, work, FlowKind::Plain);
        if !code.is_none() {
            return code;
        }
    }
    let (now_ns, len) = (tables.now_ns(), work.tuple.len as u64);
    tables.found(|flow| {
        flow.last_seen_ns = now_ns;
        flow.packets[0] += 1;
        flow.bytes[0] += len;
        flow.state |= SEEN_OUT;
    });
    Code::pass(NatEvent::PassedAllowed)
}

/// Begins a flow of key `work.key` that passes untranslated, which is the found one then. A verdict if it is not allowed.
#[inline(always)]
fn begin_plain<T: Tables>(
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
    kind: FlowKind,
) -> Code {
    let rule = allow_rule_of(tables, rules, &work.tuple);
    if rule == NO_RULE {
        return Code::drop(DropReason::NotAllowed);
    }
    work.flow = new_flow(tables.now_ns(), rules.version);
    work.flow.rule = rule;
    work.flow.kind = kind as u8;
    work.flow.nic = tables.ifindex();
    if !tables.put_flow(&work.key, &work.flow) {
        return Code::drop(DropReason::FlowsFull);
    }
    count_allowed(tables, rules, rule);
    Code::NONE
}

/// Judges what comes in by a NIC and is not to be translated, where what no rule names is denied.
#[inline(never)]
fn filter_from_nic<S: Skb, T: Tables>(
    packet: &S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
) -> Code {
    let kind = work.tuple.kind as u8;
    let may_begin = has_flow(&work.tuple) || kind == Kind::Other as u8;
    work.key = work.tuple.flow_from_outside();
    let is_there = may_begin
        && is_known(tables, rules, &work.key)
        && tables.found(|flow| is_plain(flow.kind)) == Some(true);
    if !is_there {
        match tables.route(&work.tuple, 0) {
            Route::Out(nic) if nic == rules.tun => {}
            _ => return FOREIGN,
        }
        if kind == Kind::LaterFragment as u8 {
            return Code::drop(DropReason::FragmentUnknown);
        }
        if kind == Kind::Error as u8 {
            return Code::drop(DropReason::UnrelatedError);
        }
        if !may_begin {
            return Code::drop(DropReason::Untranslatable);
        }
        let code = begin_plain(tables, rules, work, FlowKind::PlainInbound);
        if !code.is_none() {
            return code;
        }
    }
    let code = account(packet, tables, &work.tuple, From::Outside);
    if !code.is_none() {
        return code;
    }
    pass_fragments(tables, work);
    Code::pass(NatEvent::PassedAllowed)
}

/// Judges an ICMP error out of the tunnel, by the packet that it is about.
#[inline(always)]
fn error_from_tunnel<S: Skb, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
) -> Code {
    if !read_quoted(packet, &work.tuple, &mut work.quoted) {
        return other_from_tunnel(tables, rules, work, false);
    }
    // It was sent to who is inside.
    work.key = work.quoted.flow_from_outside();
    if !is_known(tables, rules, &work.key) {
        return other_from_tunnel(tables, rules, work, false);
    }
    if tables.found(|flow| is_plain(flow.kind)) != Some(false) {
        // Who has the flow may be seen as he is by who he has it with; another, on the way to him, if no rule wants to give
        // him another address.
        if difference(&work.tuple.source, &work.key.inner) == 0 {
            return Code::pass(NatEvent::PassedAllowed);
        }
        return other_from_tunnel(tables, rules, work, true);
    }
    if work.tuple.ttl <= 1 {
        return Code::drop(DropReason::HopLimit);
    }
    let to = match tables.route(&work.tuple, work.tuple.len) {
        Route::Out(to) => to,
        Route::Local | Route::Refused => return FOREIGN,
        Route::TooBig => return Code::drop(DropReason::TooLarge),
        Route::Unknown => return Code::drop(DropReason::NoRoute),
    };
    work.change.end = End::Source;
    let change = &mut work.change;
    tables.found(|flow| (change.address, change.port) = (flow.external, flow.external_port));
    if !change_error(packet, work) {
        return Code::drop(DropReason::NotChanged);
    }
    if to == rules.tun { GO_IN } else { GO_OUT }
}

/// Carries `work.change` out on an ICMP error and what it is about.
#[inline(never)]
fn change_error<S: Skb>(packet: &mut S, work: &Work) -> bool {
    translate_error(packet, &work.tuple, &work.quoted, &work.change).is_some()
        && decrement_ttl(packet, &work.tuple).is_some()
}

/// Judges an ICMP error that came in by a NIC, by the packet that it is about. No verdict if that is of no known flow.
#[inline(always)]
fn error_from_nic<S: Skb, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
) -> Code {
    if !read_quoted(packet, &work.tuple, &mut work.quoted) {
        return Code::NONE;
    }
    if !find_quoted(tables, rules, work) {
        work.key = work.quoted.flow_from_inside();
        let passes = is_known(tables, rules, &work.key)
            && tables.found(|flow| is_plain(flow.kind)) == Some(true);
        return if passes { Code::pass(NatEvent::PassedAllowed) } else { Code::NONE };
    }
    if work.tuple.ttl <= 1 {
        return Code::drop(DropReason::HopLimit);
    }
    if tables.tunnel_mtu_below(work.tuple.len).is_some() {
        return Code::drop(DropReason::TooLarge);
    }
    work.change =
        Change { end: End::Destination, address: work.key.inner, port: work.key.inner_port };
    if change_error(packet, work) { GO_IN } else { Code::drop(DropReason::NotChanged) }
}

/// Finds the translated flow of the packet that an error from outside is about: it is the found one then, of key
/// `work.key`.
#[inline(never)]
fn find_quoted<T: Tables>(tables: &mut T, rules: &RuleSet, work: &mut Work) -> bool {
    let Some(protocol) = work.quoted.slots() else { return false };
    let nic = tables.ifindex();
    let external = external_at(tables, rules, &work.quoted.source, nic);
    work.key = work.quoted.flow_from_inside();
    if external != NO_RULE
        && name_inner(tables, rules, &mut work.key, external, protocol)
        && is_known(tables, rules, &work.key)
    {
        return true;
    }
    if rules.forward_count == 0 {
        return false;
    }
    let (address, port) = (&work.quoted.source, work.quoted.source_port);
    let rule = forward_rule_at(tables, rules, address, (port, work.quoted.protocol), 0);
    if rule == NO_RULE {
        return false;
    }
    let rule = forward_with(rules, rule);
    work.key = work.quoted.flow_from_inside();
    work.key.inner = rule.to;
    work.key.inner_port = rule.to_port;
    is_known(tables, rules, &work.key)
        && tables.found(|flow| flow.kind) == Some(FlowKind::Forward as u8)
}

/// Sends a later fragment out of the tunnel after its first one.
#[inline(always)]
fn fragment_from_tunnel<S: Skb, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
) -> Code {
    match fragment_from_nic(packet, tables, rules, work) {
        Code::NONE => other_from_tunnel(tables, rules, work, false),
        code => code,
    }
}

/// Sends a later fragment after its first one; no verdict if that is not known.
#[inline(never)]
fn fragment_from_nic<S: Skb, T: Tables>(
    packet: &mut S,
    tables: &mut T,
    rules: &RuleSet,
    work: &mut Work,
) -> Code {
    work.fragments = work.tuple.fragments(tables.ifindex());
    let Some(entry) = tables.fragments(&work.fragments) else { return Code::NONE };
    if tables.now_ns().saturating_sub(entry.created_ns) > FRAGMENTS_NS {
        return Code::NONE;
    }
    work.entry = entry;
    if work.entry.verdict == fragment_verdict::PASS {
        return Code::pass(NatEvent::PassedAllowed);
    }
    if work.tuple.ttl <= 1 {
        return Code::drop(DropReason::HopLimit);
    }
    if work.entry.verdict == fragment_verdict::OUT {
        match tables.route(&work.tuple, work.tuple.len) {
            Route::Out(nic) if nic != rules.tun => {}
            Route::TooBig => return Code::drop(DropReason::TooLarge),
            _ => return Code::drop(DropReason::NoRoute),
        }
    } else if tables.tunnel_mtu_below(work.tuple.len).is_some() {
        return Code::drop(DropReason::TooLarge);
    }
    if !change_fragment(packet, work) {
        return Code::drop(DropReason::NotChanged);
    }
    if work.entry.verdict == fragment_verdict::OUT { GO_OUT } else { GO_IN }
}

/// Gives a later fragment the addresses of `work.entry`.
#[inline(always)]
fn change_fragment<S: Skb>(packet: &mut S, work: &mut Work) -> bool {
    let (tuple, entry, change) = (&work.tuple, &work.entry, &mut work.change);
    if difference(&tuple.source, &entry.source) != 0 {
        *change = Change { end: End::Source, address: entry.source, port: 0 };
        if translate(packet, tuple, change).is_none() {
            return false;
        }
    }
    if difference(&tuple.destination, &entry.destination) != 0 {
        *change = Change { end: End::Destination, address: entry.destination, port: 0 };
        if translate(packet, tuple, change).is_none() {
            return false;
        }
    }
    decrement_ttl(packet, tuple).is_some()
}

/// Says what becomes of the fragments behind a first one, with the addresses in `work.entry`.
#[inline(always)]
fn note_fragments<T: Tables>(tables: &mut T, work: &mut Work, verdict: u32) {
    work.entry.created_ns = tables.now_ns();
    work.entry.verdict = verdict;
    work.entry.padding = 0;
    work.fragments = work.tuple.fragments(tables.ifindex());
    tables.put_fragments(&work.fragments, &work.entry);
}

/// Says that fragments behind a first one that passes pass.
#[inline(always)]
fn pass_fragments<T: Tables>(tables: &mut T, work: &mut Work) {
    if work.tuple.is_fragment {
        work.entry.source = work.tuple.source;
        work.entry.destination = work.tuple.destination;
        note_fragments(tables, work, fragment_verdict::PASS);
    }
}
