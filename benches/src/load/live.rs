//! Floods by live frames: a BPF program that the kernel runs on frames of its own, of which each becomes the next
//! packet and leaves by the interface that was named. Nothing is allocated and no system call made for a packet.
//!
//! The interface's driver must be able to send what is redirected to it. A veth passes such frames only to an end
//! that polls: one that has an XDP program, or GRO switched on (`ethtool -K IF gro on`).

use std::fs;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use aya::Ebpf;
use aya::programs::{ProgramError, TestRun as _, TestRunAttrs, TestRunOptions, Xdp};
use rustix::time::{ClockId, clock_gettime};
use wg_common::headers::OuterHeaders;
use wg_common::load::{
    CHUNK_LEN, CHUNKS, DEBT_NS, FRAME_LEN_MAX, FRAMES, INTERVAL_PARTS_LOG2, LIVE_PROGRAM, LOOKS,
    NIC_GLOBAL, STATE, STATE_BEGIN_NS, STATE_END, STATE_FAILED, STATE_FIRST_NS, STATE_INTERVAL,
    STATE_LAST_NS, STATE_LEN, STATE_LIMIT_NS, STATE_NEXT, frame_entry,
};
use wg_userspace::sys::SharedWords;

use super::arguments::Rate;
use super::object;
use super::sealed::{Place, Places};
use super::sockets::Flooded;
use super::target::Way;

/// Frames that the kernel has the program make before it sends them.
const BATCH: u32 = 64;
/// The least time in which a call looks [`LOOKS`] times whether a frame is due. Where it takes less, there is another
/// call of the kernel.
const IDLE_NS_MIN: u64 = LOOKS as u64 * 20;
/// Calls of the kernel for one flood at most: each takes up where the last was interrupted.
const CALLS_MAX: u32 = 1000;

/// Frames that wait in the kernel's memory.
pub struct Live {
    /// Has the programs; maps that are mapped live on without it.
    ebpf: Ebpf,
    chunks: SharedWords,
    state: SharedWords,
    nic: String,
    longest: usize,
}

impl Live {
    /// Makes room for all frames of a plan, which leave by the interface of `way`.
    ///
    /// # Errors
    /// If a frame is too long, or the kernel refuses.
    pub fn new(way: &Way, places: &Places, frame_count: u64) -> Result<Self> {
        let frame_count = u32::try_from(frame_count).context("too many frames")?;
        let chunk_count = places.bytes().div_ceil(CHUNK_LEN).max(1);
        let mut ebpf = object::load(|loader| {
            loader
                .override_global(NIC_GLOBAL, &way.link, true)
                .map_max_entries(CHUNKS, chunk_count as u32)
                .map_max_entries(FRAMES, frame_count.max(1));
        })?;
        let program: &mut Xdp = ebpf
            .program_mut(LIVE_PROGRAM)
            .context("the object has no program for live frames")?
            .try_into()?;
        program.load().context("loading the program for live frames")?;
        let chunks = object::words(&mut ebpf, CHUNKS, chunk_count * CHUNK_LEN / 8)?;
        let frames = object::words(&mut ebpf, FRAMES, frame_count as usize)?;
        let state = object::words(&mut ebpf, STATE, STATE_LEN)?;
        let mut longest = 0;
        for (at, frame) in frames.iter().enumerate() {
            let place = places.at(at as u64);
            longest = longest.max(place.len());
            frame.store(frame_entry(place.offset(), place.len()), Relaxed);
        }
        ensure!(
            longest <= FRAME_LEN_MAX,
            "a frame of {longest} bytes is more than {FRAME_LEN_MAX}"
        );
        Ok(Self { ebpf, chunks, state, nic: way.nic.clone(), longest })
    }

    /// Writes a frame to its place: `headers`, and `message` behind them.
    ///
    /// # Panics
    /// If the place is not as long as both, or not of this plan.
    pub fn put(&self, place: Place, headers: &OuterHeaders, message: &[u8]) {
        let mut frame = [0; FRAME_LEN_MAX];
        let frame = &mut frame[..place.len()];
        headers.write_with(message, frame).expect("the place is made for this frame");
        let first = place.offset() / 8;
        for (at, bytes) in frame.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            self.chunks[first + at].store(u64::from_ne_bytes(word), Relaxed);
        }
    }

    /// Sends the frames, in order and each of them once, for `limit` at most.
    ///
    /// # Errors
    /// If the kernel refuses, or the interface has sent nothing.
    pub fn flood(&self, frame_count: u64, rate: Rate, limit: Duration) -> Result<Flooded> {
        let program: &Xdp = self.ebpf.program(LIVE_PROGRAM).context("it was loaded")?.try_into()?;
        let limit_ns = limit.as_nanos() as u64;
        let interval = rate.number().map_or(0, interval);
        // A call sends a frame, or finds none due; the last ones find that all is over.
        let idle_count = if interval == 0 { 0 } else { limit_ns / IDLE_NS_MIN };
        let repeat = (frame_count + idle_count + u64::from(BATCH)).min(i32::MAX as u64) as u32;
        let template = vec![0; self.longest];
        let before = Link::read(&self.nic)?;
        for (at, value) in
            [(STATE_END, frame_count), (STATE_INTERVAL, interval), (STATE_LIMIT_NS, limit_ns)]
        {
            self.state[at].store(value, Relaxed);
        }
        let mut calls = 0;
        while self.next() < frame_count && !self.is_over(limit_ns) {
            ensure!(calls < CALLS_MAX, "the kernel was interrupted {calls} times");
            calls += 1;
            let mut options = TestRunOptions::new();
            options.data_in = Some(&template);
            options.repeat = repeat;
            options.attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
            match program.test_run(options) {
                Ok(_) => {}
                // A signal: it goes on where it was.
                Err(ProgramError::SyscallError(error))
                    if error.io_error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(error).context("running live frames (Linux 5.18 or later)");
                }
            }
            let failed = self.state[STATE_FAILED].load(Relaxed);
            ensure!(failed == 0, "{failed} frames could not be written");
        }
        let word = |at: usize| self.state[at].load(Relaxed);
        let time = word(STATE_LAST_NS).saturating_sub(word(STATE_FIRST_NS));
        let attempted = self.next();
        let link = Link::read(&self.nic)?.since(&before);
        if attempted > 0 && link.sent == 0 {
            bail!(
                "{} has sent none of {attempted} live frames; if it is a veth, its other end must poll: give that an XDP \
                 program, or `ethtool -K IF gro on` there",
                self.nic
            );
        }
        let late = word(STATE_BEGIN_NS).saturating_sub(word(STATE_FIRST_NS));
        let parts_late = late << INTERVAL_PARTS_LOG2;
        let forgiven = parts_late.checked_div(interval).unwrap_or(0);
        Ok(Flooded {
            packets: attempted,
            attempted,
            refused: 0,
            nic_dropped: link.dropped,
            time: Duration::from_nanos(time),
            forgiven,
            joined: false,
        })
    }

    fn next(&self) -> u64 {
        self.state[STATE_NEXT].load(Relaxed)
    }

    fn is_over(&self, limit_ns: u64) -> bool {
        let first = self.state[STATE_FIRST_NS].load(Relaxed);
        first != 0 && monotonic_ns() >= first + limit_ns
    }
}

/// Time between two frames, in the program's parts.
fn interval(rate: f64) -> u64 {
    ((1e9 * f64::from(1 << INTERVAL_PARTS_LOG2) / rate).round() as u64).max(1)
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// What an interface has sent.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Link {
    sent: u64,
    dropped: u64,
}

impl Link {
    fn read(nic: &str) -> Result<Self> {
        // Of this thread's namespace, whatever is mounted on /sys.
        let text = fs::read_to_string("/proc/thread-self/net/dev")
            .context("reading counters of interfaces")?;
        Self::parse(&text, nic).with_context(|| format!("there are no counters of {nic}"))
    }

    fn parse(text: &str, nic: &str) -> Option<Self> {
        let line =
            text.lines().find_map(|line| line.trim_start().strip_prefix(nic)?.strip_prefix(':'))?;
        // Eight columns of what was received; then bytes, packets, errors, drops.
        let mut columns = line.split_whitespace().skip(9).map(str::parse);
        let sent = columns.next()?.ok()?;
        Some(Self { sent, dropped: columns.nth(1)?.ok()? })
    }

    fn since(self, before: &Self) -> Self {
        Self {
            sent: self.sent.saturating_sub(before.sent),
            dropped: self.dropped.saturating_sub(before.dropped),
        }
    }
}

const _: () = assert!(DEBT_NS > 0 && CHUNK_LEN.is_multiple_of(8));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_exact_enough_for_any_rate() {
        for rate in [1.0, 1e3, 123_456.7, 1e6, 5e6, 2e7] {
            let reached = 1e9 * 1024.0 / interval(rate) as f64;
            assert!((reached / rate - 1.0).abs() < 0.001, "{rate}: {reached}");
        }
    }

    #[test]
    fn counters_are_those_of_the_interface() {
        let text = "Inter-|   Receive                        |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed\n    \
            lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n  \
            outer: 100 2 0 0 0 0 0 0 300 4 0 5 0 0 0 0\nouter2:1 1 1 1 1 1 1 1 1 77 1 1 1 1 1 1\n";
        assert_eq!(Link::parse(text, "outer"), Some(Link { sent: 4, dropped: 5 }));
        assert_eq!(Link::parse(text, "outer2"), Some(Link { sent: 77, dropped: 1 }));
        assert_eq!(Link::parse(text, "oute"), None);
        assert!(Link::read("lo").is_ok());
    }
}
