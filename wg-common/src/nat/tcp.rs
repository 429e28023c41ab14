//! What state a TCP flow is in, as the segments of both sides show it.
//!
//! For each side is known how far it has sent, how far it may, and what was acknowledged, after Guido van
//! Rooij, *Real Stateful TCP Packet Filtering in IP Filter* (2001). Who is inside is known by a key, and is
//! believed: it may end its own flows. A segment from outside may be anybody's. If it does not fit what inside
//! has acknowledged and allowed, it changes nothing, so that who cannot see a flow cannot shorten it; it passes
//! nevertheless, for the ends to judge. A reset must name exactly the next byte, as in RFC 5961 §3.2.
//!
//! Selective acknowledgements are not looked at: they are never beyond what was sent.

use crate::headers::Bytes;
use crate::mss::TCP_LEN;
use crate::nat::map::TcpWindow;
use crate::nat::tuple::Tuple;

/// The state of a flow.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum State {
    /// Nothing was seen, or nothing that tells a state.
    None,
    /// A SYN from one side.
    SynSent,
    /// A SYN from both; or a flow taken up in its midst, of which the other side has sent nothing yet.
    SynReceived,
    /// An acknowledgement behind that.
    Established,
    /// A FIN from one side.
    FinWait,
    /// That FIN is acknowledged.
    CloseWait,
    /// A FIN from both.
    LastAck,
    /// Both are acknowledged.
    TimeWait,
    /// A reset.
    Closed,
}

/// Bits of [`Flow::state`](crate::nat::map::Flow::state): for each of them that a side has, that of outside is the
/// next one.
const SYN: u8 = 1;
const FIN: u8 = 1 << 2;
const FIN_ACKED: u8 = 1 << 4;
const ESTABLISHED: u8 = 1 << 6;
const RESET: u8 = 1 << 7;
/// Of both sides.
const SYNS: u8 = SYN | SYN << 1;
const FINS: u8 = FIN | FIN << 1;
const FINS_ACKED: u8 = FIN_ACKED | FIN_ACKED << 1;

impl State {
    /// From [`Flow::state`](crate::nat::map::Flow::state) of a flow of TCP.
    #[inline(always)]
    pub const fn of(state: u8) -> Self {
        if state & RESET != 0 {
            Self::Closed
        } else if state & FINS == FINS {
            if state & FINS_ACKED == FINS_ACKED { Self::TimeWait } else { Self::LastAck }
        } else if state & FINS != 0 {
            if state & FINS_ACKED != 0 { Self::CloseWait } else { Self::FinWait }
        } else if state & ESTABLISHED != 0 {
            Self::Established
        } else if state & SYNS == SYNS {
            Self::SynReceived
        } else if state & SYNS != 0 {
            Self::SynSent
        } else {
            Self::None
        }
    }
}

/// Where a segment comes from: index in [`Flow::windows`](crate::nat::map::Flow::windows).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum From {
    /// From inside.
    Inside = 0,
    /// From outside.
    Outside = 1,
}

/// Bits of [`Segment::flags`].
pub mod flags {
    /// No more from the sender.
    pub const FIN: u8 = 0x01;
    /// The sender's first.
    pub const SYN: u8 = 0x02;
    /// Reset.
    pub const RST: u8 = 0x04;
    /// It acknowledges.
    pub const ACK: u8 = 0x10;
}

/// What a TCP header says. Numbers are in host byte order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Bits of [`flags`].
    pub flags: u8,
    /// Of a SYN that names one: by how much the sender's windows are shifted, with [`TcpWindow::HAS_SCALE`].
    pub scale: u32,
    /// Sequence number.
    pub seq: u32,
    /// Behind its last byte; SYN and FIN count as one.
    pub end: u32,
    /// What it acknowledges, if ACK is set.
    pub ack: u32,
    /// Window as it stands there, not shifted.
    pub window: u16,
}

impl Segment {
    /// Reads the TCP header of a packet of [`Kind::Tcp`](crate::nat::tuple::Kind::Tcp). A super-packet is one segment.
    /// `None` if the header does not fit into the packet.
    #[inline(always)]
    pub fn of<B: Bytes + ?Sized>(packet: &B, tuple: &Tuple) -> Option<Self> {
        let at = tuple.upper as usize;
        let header: [u8; 16] = packet.read(at)?;
        let header_len = (header[12] >> 4) as u32 * 4;
        let payload = tuple.len.wrapping_sub(tuple.upper as u32 + header_len);
        if header_len < TCP_LEN as u32 || tuple.len < tuple.upper as u32 + header_len {
            return None;
        }
        let flags = header[13];
        let seq = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        let is_syn = flags & flags::SYN != 0;
        let counted = is_syn as u32 + (flags & flags::FIN != 0) as u32;
        Some(Self {
            flags,
            scale: if is_syn { scale(packet, at + TCP_LEN, at + header_len as usize) } else { 0 },
            seq,
            end: seq.wrapping_add(payload).wrapping_add(counted),
            ack: u32::from_be_bytes([header[8], header[9], header[10], header[11]]),
            window: u16::from_be_bytes([header[14], header[15]]),
        })
    }

    /// Whether it opens a connection: SYN, and no ACK, RST or FIN.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.flags & (flags::SYN | flags::ACK | flags::RST | flags::FIN) == flags::SYN
    }

    /// Whether a flow may begin with it: it opens a connection, or is one from the midst of one.
    #[inline(always)]
    pub const fn may_begin(&self) -> bool {
        self.opens() || self.flags & (flags::SYN | flags::ACK | flags::RST) == flags::ACK
    }

    #[inline(always)]
    const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// The window scale option (RFC 7323 §2) among those from `at` to `end`.
#[inline(always)]
fn scale<B: Bytes + ?Sized>(packet: &B, at: usize, end: usize) -> u32 {
    /// Options that are looked at: no honest SYN has more, fillers included.
    const OPTIONS_MAX: usize = 20;
    const SCALE_MAX: u8 = 14;

    let mut at = at;
    for _ in 0..OPTIONS_MAX {
        if at + 2 > end {
            break;
        }
        let Some([kind, len]) = packet.read(at) else { break };
        match (kind, len) {
            (0, _) => break,
            (1, _) => at += 1,
            (_, 0 | 1) => break,
            (3, 3) if at + 3 <= end => {
                let Some([shift]) = packet.read(at + 2) else { break };
                return TcpWindow::HAS_SCALE
                    | (if shift > SCALE_MAX { SCALE_MAX } else { shift }) as u32;
            }
            _ => at += len as usize,
        }
    }
    0
}

/// Shift of windows whose scale was not seen. Too small a window only keeps what lies outside it from being heeded; one
/// of 1 MiB holds one number out of 4096.
const SCALE_UNKNOWN: u32 = 4;
/// How far behind what was acknowledged numbers fit, at least: repeated segments.
const BEHIND_MIN: u32 = 66_000;

/// [`Flow::state`](crate::nat::map::Flow::state) and what both sides may send, after the first segment of a flow.
/// Where that does not open a connection, the flow is taken up in its midst.
#[inline(always)]
pub fn begin(segment: &Segment, from: From) -> (u8, [TcpWindow; 2]) {
    let mut sender = TcpWindow {
        end: segment.end,
        end_max: segment.end,
        window_max: segment.window as u32,
        scale: segment.scale,
        acked: segment.seq,
    };
    let mut receiver = TcpWindow::default();
    let state = if segment.has(flags::RST) {
        RESET
    } else if segment.opens() {
        SYN << from as u8
    } else {
        sender.scale = SCALE_UNKNOWN;
        sender.window_max = (segment.window as u32) << SCALE_UNKNOWN;
        receiver.scale = SCALE_UNKNOWN;
        receiver.end = segment.ack;
        receiver.acked = segment.ack;
        receiver.end_max = segment.ack.wrapping_add(sender.window_max);
        SYNS | if segment.has(flags::FIN) { FIN << from as u8 } else { 0 }
    };
    match from {
        From::Inside => (state, [sender, receiver]),
        From::Outside => (state, [receiver, sender]),
    }
}

/// [`Flow::state`](crate::nat::map::Flow::state) after a segment; `windows` become those after it.
#[inline(always)]
pub fn step(state: u8, windows: &mut [TcpWindow; 2], segment: &Segment, from: From) -> u8 {
    if segment.opens() && begins_anew(state, from) {
        let (state, begun) = begin(segment, from);
        *windows = begun;
        return state;
    }
    let [inside, outside] = windows;
    match from {
        From::Inside => step_by(state, inside, outside, segment, from),
        From::Outside if fits(state, inside, outside, segment) => {
            step_by(state, outside, inside, segment, from)
        }
        From::Outside => state,
    }
}

/// Whether a SYN without ACK begins a flow anew: it is over, or the other side has not answered yet.
#[inline(always)]
const fn begins_anew(state: u8, from: From) -> bool {
    let is_over = state & RESET != 0 || state & FINS == FINS;
    is_over || state & SYNS == 0 || state == SYN << from as u8
}

/// Whether a segment from outside is of the other side, as far as can be told: it fits between what inside has
/// acknowledged and what it allows, and acknowledges what inside has sent.
#[inline(always)]
fn fits(state: u8, inside: &TcpWindow, outside: &TcpWindow, segment: &Segment) -> bool {
    if state & SYN == 0 {
        return false;
    }
    let acks = segment.has(flags::ACK);
    if state & ESTABLISHED == 0 && segment.has(flags::SYN) {
        // Two may open at once. Else its first number is not known, and what it acknowledges tells.
        let both = segment.opens() && state & SYN << 1 == 0;
        return both || acks && is_within(segment.ack, inside.acked, inside.end);
    }
    if state & SYN << 1 == 0 {
        let refuses = segment.has(flags::RST) && acks;
        return refuses && is_within(segment.ack, inside.acked.wrapping_add(1), inside.end);
    }
    let behind = inside.acked.wrapping_sub(greater(outside.window_max, BEHIND_MIN));
    if acks && !is_within(segment.ack, behind, inside.end) {
        return false;
    }
    if segment.has(flags::RST) {
        return segment.seq == outside.acked || segment.seq == outside.end;
    }
    let behind = outside.acked.wrapping_sub(greater(inside.window_max, BEHIND_MIN));
    !is_after(segment.seq, outside.end_max) && !is_after(behind, segment.end)
}

/// As [`step`], where the segment is believed.
#[inline(always)]
fn step_by(
    state: u8,
    sender: &mut TcpWindow,
    receiver: &mut TcpWindow,
    segment: &Segment,
    from: From,
) -> u8 {
    if segment.has(flags::RST) {
        return state | RESET;
    }
    let (own, other) = (from as u8, 1 - from as u8);
    let window = shifted(sender, receiver, segment);
    let mut state = state;
    if segment.has(flags::SYN) {
        if state & ESTABLISHED == 0 {
            synchronise(sender, receiver, segment);
            state |= SYN << own;
        }
        return state;
    }
    if segment.has(flags::ACK) {
        // A flow taken up in its midst is so by one side's word alone, until the other side acknowledges something.
        if state & SYNS == SYNS && is_after(segment.ack, receiver.acked) {
            state |= ESTABLISHED;
        }
        acknowledge(receiver, segment.ack, window, state & FIN << other != 0);
        if state & FIN << other != 0 && !is_after(receiver.end, segment.ack) {
            state |= FIN_ACKED << other;
        }
    }
    // Nothing comes behind a FIN.
    if state & FIN << own == 0 && is_after(segment.end, sender.end) {
        sender.end = segment.end;
    }
    if segment.has(flags::FIN) {
        state |= FIN << own;
    }
    sender.window_max = greater(sender.window_max, window);
    state
}

/// Takes over the numbers with which a side begins.
#[inline(always)]
fn synchronise(sender: &mut TcpWindow, receiver: &mut TcpWindow, segment: &Segment) {
    *sender = TcpWindow {
        end: segment.end,
        end_max: segment.end.wrapping_add(greater(receiver.window_max, 1)),
        window_max: segment.window as u32,
        scale: segment.scale,
        acked: segment.seq,
    };
    if !segment.has(flags::ACK) {
        return;
    }
    // What is acknowledged is what the other side has said, whatever else came in its name.
    if !is_within(segment.ack, receiver.acked, receiver.end) {
        receiver.end = segment.ack;
    }
    receiver.acked = segment.ack;
    receiver.end_max = segment.ack.wrapping_add(greater(segment.window as u32, 1));
}

/// What `window` now holds, after its bytes up to `ack` were acknowledged and so many more were allowed.
#[inline(always)]
fn acknowledge(window: &mut TcpWindow, ack: u32, allowed: u32, has_ended: bool) {
    if is_after(ack, window.acked) {
        window.acked = ack;
    }
    // One byte may always be sent: it asks whether a window of 0 has opened.
    let end_max = ack.wrapping_add(greater(allowed, 1));
    if is_after(end_max, window.end_max) {
        window.end_max = end_max;
    }
    if !has_ended && is_after(ack, window.end) {
        window.end = ack;
    }
}

/// A segment's window in bytes: shifted if both sides have agreed on that.
#[inline(always)]
const fn shifted(sender: &TcpWindow, receiver: &TcpWindow, segment: &Segment) -> u32 {
    let agreed = sender.scale & receiver.scale & TcpWindow::HAS_SCALE != 0;
    let shift = if agreed {
        sender.scale & 0xf
    } else if sender.scale & TcpWindow::HAS_SCALE == 0 {
        sender.scale
    } else {
        0
    };
    (segment.window as u32) << (shift & 0xf)
}

#[inline(always)]
const fn greater(a: u32, b: u32) -> u32 {
    if a > b { a } else { b }
}

/// Whether sequence number `a` comes after `b`.
#[inline(always)]
const fn is_after(a: u32, b: u32) -> bool {
    (b.wrapping_sub(a) as i32) < 0
}

/// Whether sequence number `at` is one of those from `first` to `last`.
#[inline(always)]
const fn is_within(at: u32, first: u32, last: u32) -> bool {
    at.wrapping_sub(first) <= last.wrapping_sub(first)
}
