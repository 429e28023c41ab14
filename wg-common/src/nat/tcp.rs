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

    /// Whether a flow may begin with it: it opens a connection, or is one from the midst of one, so that connections
    /// outlive what is known of them. With what ends one nothing begins.
    #[inline(always)]
    pub const fn may_begin(&self) -> bool {
        let told = self.flags & (flags::SYN | flags::ACK | flags::RST | flags::FIN);
        told == flags::SYN || told == flags::ACK
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
        return both || acks && answers_syn(inside, segment);
    }
    if state & SYN << 1 == 0 {
        let refuses = segment.has(flags::RST) && acks;
        return refuses && answers_syn(inside, segment);
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

/// Whether a segment acknowledges the SYN of inside, or what it has sent with it (RFC 7413).
#[inline(always)]
const fn answers_syn(inside: &TcpWindow, segment: &Segment) -> bool {
    let is_new = is_after(segment.ack, inside.acked) && !is_after(segment.ack, inside.end);
    is_new || segment.ack == inside.end
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::flags::{ACK, FIN, RST};
    use super::*;

    use super::From::{Inside, Outside};

    const SYN: u8 = flags::SYN;
    /// First sequence numbers of both sides: the second one's pass 0 soon.
    const ISN: [u32; 2] = [1000, u32::MAX - 100];

    /// A flow, as the programs keep it.
    #[derive(Clone, Debug, Default)]
    struct Flow {
        state: u8,
        windows: [TcpWindow; 2],
    }

    impl Flow {
        fn pass(&mut self, from: From, segment: Segment) -> State {
            self.state = step(self.state, &mut self.windows, &segment, from);
            State::of(self.state)
        }

        /// After three segments, with these windows and scales.
        fn open() -> Self {
            let mut flow = Self::default();
            let scaled =
                |segment, shift| Segment { scale: TcpWindow::HAS_SCALE | shift, ..segment };
            flow.pass(Inside, scaled(segment(SYN, ISN[0], 1, 0), 7));
            flow.pass(Outside, scaled(segment(SYN | ACK, ISN[1], 1, ISN[0] + 1), 2));
            assert_eq!(flow.pass(Inside, at(0, ACK, 0, 0)), State::Established);
            flow
        }
    }

    fn segment(flags: u8, seq: u32, len: u32, ack: u32) -> Segment {
        Segment { flags, scale: 0, seq, end: seq.wrapping_add(len), ack, window: 512 }
    }

    /// A segment of one side with `len` numbers, by offsets from the first number behind the SYNs: its own, and what
    /// it acknowledges.
    fn at(side: usize, flags: u8, own: u32, other: u32) -> Segment {
        let len = u32::from(flags & FIN != 0);
        let base = |side: usize| ISN[side].wrapping_add(1);
        let (seq, ack) = (base(side).wrapping_add(own), base(1 - side).wrapping_add(other));
        segment(flags, seq, len, if flags & ACK != 0 { ack } else { 0 })
    }

    fn data(side: usize, own: u32, len: u32, other: u32) -> Segment {
        let segment = at(side, ACK, own, other);
        Segment { end: segment.seq.wrapping_add(len), ..segment }
    }

    #[test]
    fn a_connection_opens_and_closes() {
        for [opener, other] in [[Inside, Outside], [Outside, Inside]] {
            let (a, b) = (opener as usize, other as usize);
            let mut flow = Flow::default();
            assert_eq!(State::of(flow.state), State::None);
            assert_eq!(flow.pass(opener, segment(SYN, ISN[a], 1, 0)), State::SynSent);
            let answer = segment(SYN | ACK, ISN[b], 1, ISN[a].wrapping_add(1));
            assert_eq!(flow.pass(other, answer), State::SynReceived);
            assert_eq!(flow.pass(opener, at(a, ACK, 0, 0)), State::Established);
            assert_eq!(flow.pass(other, data(b, 0, 400, 0)), State::Established);
            assert_eq!(flow.pass(opener, at(a, ACK | FIN, 0, 400)), State::FinWait);
            assert_eq!(flow.pass(other, data(b, 400, 100, 0)), State::FinWait);
            assert_eq!(flow.pass(other, data(b, 500, 0, 1)), State::CloseWait);
            assert_eq!(flow.pass(other, at(b, ACK | FIN, 500, 1)), State::LastAck);
            assert_eq!(flow.pass(opener, at(a, ACK, 1, 501)), State::TimeWait);
            // A new one with the same ports.
            let again = segment(SYN, ISN[a].wrapping_add(70_000), 1, 0);
            assert_eq!(flow.pass(opener, again), State::SynSent);
        }
    }

    #[test]
    fn both_may_open_at_once() {
        let mut flow = Flow::default();
        flow.pass(Inside, segment(SYN, ISN[0], 1, 0));
        assert_eq!(flow.pass(Outside, segment(SYN, ISN[1], 1, 0)), State::SynReceived);
        flow.pass(Inside, segment(SYN | ACK, ISN[0], 1, ISN[1].wrapping_add(1)));
        flow.pass(Outside, segment(SYN | ACK, ISN[1], 1, ISN[0] + 1));
        flow.pass(Inside, data(0, 0, 10, 0));
        assert_eq!(flow.pass(Outside, data(1, 0, 10, 10)), State::Established);
    }

    #[test]
    fn an_answer_to_a_syn_must_name_its_number() {
        let mut begun = Flow::default();
        begun.pass(Inside, segment(SYN, ISN[0], 1, 0));
        for wrong in [ISN[0], ISN[0] + 2, 0] {
            let mut flow = begun.clone();
            assert_eq!(flow.pass(Outside, segment(SYN | ACK, 7, 1, wrong)), State::SynSent);
            assert_eq!(flow.pass(Outside, segment(RST | ACK, 0, 0, wrong)), State::SynSent);
            assert_eq!(flow.pass(Outside, segment(RST, 0, 0, wrong)), State::SynSent);
            assert_eq!(flow.pass(Outside, segment(ACK | FIN, 0, 1, wrong)), State::SynSent);
        }
        assert_eq!(begun.pass(Outside, segment(RST | ACK, 0, 0, ISN[0] + 1)), State::Closed);
    }

    #[test]
    fn a_forged_syn_does_not_keep_the_right_answer_out() {
        for forged in [0, 1 << 30, 1 << 31, 3 << 30] {
            let mut flow = Flow::default();
            flow.pass(Inside, segment(SYN, ISN[0], 1, 0));
            flow.pass(Outside, segment(SYN, forged, 1, 0));
            flow.pass(Outside, segment(SYN | ACK, ISN[1], 1, ISN[0] + 1));
            assert_eq!(flow.pass(Inside, at(0, ACK, 0, 0)), State::Established);
            assert_eq!(flow.pass(Outside, at(1, RST, 0, 0)), State::Closed);

            let mut forwarded = Flow::default();
            forwarded.pass(Outside, segment(SYN, ISN[1], 1, 0));
            forwarded.pass(Outside, segment(SYN, forged, 1, 0));
            forwarded.pass(Inside, segment(SYN | ACK, ISN[0], 1, ISN[1].wrapping_add(1)));
            assert_eq!(forwarded.pass(Outside, at(1, ACK, 0, 0)), State::Established);
        }
    }

    #[test]
    fn a_reset_from_outside_must_name_the_next_byte() {
        let mut flow = Flow::open();
        flow.pass(Outside, data(1, 0, 1000, 0));
        flow.pass(Inside, data(0, 0, 0, 600));
        for (own, ends) in
            [(600, true), (1000, true), (599, false), (601, false), (999, false), (2000, false)]
        {
            let mut flow = flow.clone();
            let expected = if ends { State::Closed } else { State::Established };
            assert_eq!(flow.pass(Outside, at(1, RST, own, 0)), expected, "{own}");
        }
        let mut wrong = flow.clone();
        assert_eq!(wrong.pass(Outside, at(1, RST | ACK, 600, 90_000)), State::Established);
        assert_eq!(flow.pass(Inside, at(0, RST, 12_345, 0)), State::Closed, "inside is believed");
    }

    #[test]
    fn a_fin_from_outside_must_fit_the_window() {
        let mut flow = Flow::open();
        flow.pass(Inside, data(0, 0, 100, 0));
        // Inside allows 512 << 7 bytes.
        for (own, other, fits) in [
            (0, 100, true),
            (512 << 7, 0, true),
            ((512 << 7) + 1, 0, false),
            (1 << 30, 0, false),
            (0_u32.wrapping_sub(66_002), 0, false),
            (0, 101, false),
            (0, 1 << 31, false),
        ] {
            let mut flow = flow.clone();
            let before = (flow.state, flow.windows);
            let state = flow.pass(Outside, at(1, ACK | FIN, own, other));
            assert_eq!(state == State::FinWait, fits, "{own} {other}");
            assert!(fits || before == (flow.state, flow.windows), "{own} {other}");
        }
    }

    #[test]
    fn a_syn_within_a_connection_changes_nothing() {
        let mut flow = Flow::open();
        let before = (flow.state, flow.windows);
        for from in [Inside, Outside] {
            flow.pass(from, segment(SYN, 77, 1, 0));
            assert_eq!(before, (flow.state, flow.windows));
        }
        flow.pass(Outside, segment(SYN | ACK, 77, 1, ISN[0] + 1));
        assert_eq!(before, (flow.state, flow.windows));
    }

    #[test]
    fn a_flow_is_taken_up_in_its_midst() {
        let mut flow = Flow::default();
        let first = data(0, 5_000, 300, 9_000);
        assert!(first.may_begin() && !first.opens());
        (flow.state, flow.windows) = begin(&first, Inside);
        assert_eq!(State::of(flow.state), State::SynReceived);
        assert_eq!(flow.pass(Inside, first), State::SynReceived, "one side's word alone");
        assert_eq!(flow.pass(Outside, at(1, RST, 8_000, 0)), State::SynReceived);
        assert_eq!(flow.pass(Outside, data(1, 9_000, 100, 5_300)), State::Established);
        assert_eq!(flow.pass(Outside, at(1, RST, 9_100, 0)), State::Closed);
        assert!(
            !segment(RST | ACK, 1, 0, 1).may_begin() && !segment(SYN | ACK, 1, 1, 1).may_begin()
        );
        assert!(!segment(0, 1, 1, 0).may_begin() && segment(SYN, 1, 1, 0).may_begin());
        assert!(!segment(FIN, 1, 2, 0).may_begin() && !segment(FIN | ACK, 1, 2, 1).may_begin());
    }

    #[test]
    fn headers_are_read() {
        use crate::nat::model::{Content, Finish, Packet};

        let packet = |options: &[u8], flags: u8, data: &[u8]| {
            let header_len = 20 + options.len();
            let mut middle = [0, 0, 0, 9, 0, 0, 0, 8, 0, flags, 2, 1];
            middle[8] = (header_len as u8 / 4) << 4;
            Packet {
                addresses: [vec![10, 9, 0, 2], vec![192, 0, 2, 1]],
                tos: 0,
                ttl: 64,
                id: 1,
                fragment: None,
                dont_fragment: true,
                content: Content::Tcp { ports: [1, 2], middle, rest: [options, data].concat() },
            }
            .bytes(Finish::Full)
        };
        let read = |bytes: &[u8]| Segment::of(bytes, &Tuple::of(bytes).unwrap());
        let whole = Segment { flags: ACK, scale: 0, seq: 9, end: 12, ack: 8, window: 0x201 };
        assert_eq!(read(&packet(&[], ACK, &[1, 2, 3])), Some(whole));
        assert_eq!(read(&packet(&[1; 4], ACK | FIN, &[])).unwrap().end, 10);
        let mut padded = packet(&[], ACK, &[1, 2, 3]);
        padded.resize(60, 0);
        assert_eq!(read(&padded), Some(whole));

        let scale = |options: &[u8]| read(&packet(options, SYN, &[])).unwrap().scale;
        let has = TcpWindow::HAS_SCALE;
        assert_eq!(scale(&[2, 4, 5, 0xb4, 1, 3, 3, 7]), has | 7);
        assert_eq!(scale(&[3, 3, 200, 0]), has | 14);
        assert_eq!(scale(&[3, 3, 0, 0]), has);
        assert_eq!(scale(&[2, 4, 5, 0xb4]), 0);
        assert_eq!(scale(&[0, 3, 3, 7]), 0, "behind the end");
        assert_eq!(scale(&[9, 1, 3, 3, 7, 0, 0, 0]), 0, "a length that leads nowhere");
        assert_eq!(scale(&[8, 3, 3, 7, 0, 0, 0, 0]), 0);
        assert_eq!(scale(&[1, 1, 3, 3]), 0, "cut off");
        assert_eq!(scale(&[]), 0);
        let mut early = packet(&[], ACK, &[]);
        early[32] = 0xf0;
        assert_eq!(read(&early), None);
        early[32] = 0x40;
        assert_eq!(read(&early), None);
    }

    /// Two ends that speak properly over a network that loses and repeats; each knows what it has sent and got.
    #[derive(Clone, Copy, Debug)]
    struct End {
        sent: u32,
        got: u32,
        told: u32,
    }

    proptest! {
        /// Whatever honest segments come, in any order and often lost on the way to us, a forger who does not know
        /// their numbers changes nothing; and when one end resets, it is heeded.
        #[test]
        fn honest_flows_stay_open_and_forgers_change_nothing(
            steps in prop::collection::vec((0_usize..2, 0_u32..3000, any::<bool>(), any::<bool>()), 1..60),
            forged in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u8>(), 0_u32..1500), 1..60),
        ) {
            let mut flow = Flow::open();
            let mut ends = [End { sent: 0, got: 0, told: 0 }; 2];
            for (i, (side, len, is_delivered, is_seen)) in steps.into_iter().enumerate() {
                let from = if side == 0 { Inside } else { Outside };
                // No more than the other side has allowed when it last acknowledged.
                let allowed = 512 << if side == 0 { 2 } else { 7 };
                let len = len.min(ends[1 - side].told.wrapping_add(allowed) - ends[side].sent);
                let segment = data(side, ends[side].sent, len, ends[side].got);
                // What the other side gets, we have seen; it may be lost behind us.
                if is_delivered || is_seen {
                    prop_assert_eq!(flow.pass(from, segment), State::Established);
                    ends[side].told = ends[side].got;
                }
                if is_delivered {
                    ends[side].sent += len;
                    ends[1 - side].got = ends[side].sent;
                }
                let (seq, ack, flags, len) = forged[i % forged.len()];
                let (outside, inside) = (flow.windows[1], flow.windows[0]);
                let guess = Segment { flags: flags & (RST | FIN | ACK), ..segment_of(seq, len, ack) };
                let distance = |a: u32, b: u32| (a.wrapping_sub(b) as i32).unsigned_abs();
                // Who guesses as near as this is not kept out; it is one guess of a thousand.
                let is_near = distance(guess.seq, outside.end) < 1 << 20;
                if !is_near || guess.flags & ACK != 0 && distance(guess.ack, inside.end) > 1 << 20 {
                    let before = (flow.state, flow.windows);
                    flow.pass(Outside, guess);
                    prop_assert_eq!(before, (flow.state, flow.windows));
                }
            }
            let mut by_inside = flow.clone();
            prop_assert_eq!(by_inside.pass(Inside, at(0, RST, ends[0].sent, 0)), State::Closed);
        }

        #[test]
        fn any_segments_are_followed_without_harm(
            segments in prop::collection::vec((any::<bool>(), any::<u8>(), any::<[u32; 4]>(), any::<u16>()), 0..40),
            state in any::<u8>(), numbers in any::<[u32; 10]>(),
        ) {
            let window = |n: &[u32]| TcpWindow {
                end: n[0], end_max: n[1], window_max: n[2], scale: n[3], acked: n[4],
            };
            let mut flow = Flow { state, windows: [window(&numbers[..5]), window(&numbers[5..])] };
            for (inside, flags, [seq, end, ack, scale], window) in segments {
                let from = if inside { Inside } else { Outside };
                flow.pass(from, Segment { flags, scale, seq, end, ack, window });
            }
        }

        #[test]
        fn numbers_are_compared_around_zero(base in any::<u32>(), a in 0_u32..1 << 30, b in 0_u32..1 << 30) {
            let [x, y] = [a, b].map(|n| base.wrapping_add(n));
            prop_assert_eq!(is_after(x, y), a > b);
            prop_assert_eq!(is_within(x, base, y), a <= b);
        }
    }

    fn segment_of(seq: u32, len: u32, ack: u32) -> Segment {
        segment(0, seq, len, ack)
    }
}
