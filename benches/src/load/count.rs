//! Counts what comes out of a gateway: a program at an interface's ingress counts UDP packets to one port and drops
//! them, at some tens of nanoseconds for a buffer, however many packets are in it.
//!
//! It may run in another network namespace than who sends: it tells its count to whoever connects to its Unix socket,
//! as one line of JSON.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::Ebpf;
use aya::maps::{MapData, PerCpuArray};
use aya::programs::{SchedClassifier, TcAttachType, tc};
use aya::util::KernelVersion;
use wg_common::headers::ETHERNET_LEN;
use wg_common::load::{
    COUNT_PROGRAM, COUNTS, COUNTS_BUFFERS, COUNTS_BYTES, COUNTS_FIRST_NS, COUNTS_LAST_NS,
    COUNTS_LEN, COUNTS_PACKETS, COUNTS_PASSED, LINK_LEN_GLOBAL, PORT_GLOBAL, SIZES, SIZES_LEN,
};
use wg_userspace::sys::link;
use wg_userspace::sys::wait::{PollFd, PollFlags, poll};

use super::arguments::Count;
use super::object;
use super::report::CountReport;

/// How long who connects may take to read its answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of an answer at most.
const ANSWER_LEN_MAX: u64 = 1 << 20;
/// A count that has not changed for so long is settled.
const SETTLED_AFTER: Duration = Duration::from_millis(150);
/// But nobody waits longer for that.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// A program that counts, for as long as this lives.
pub struct Counter {
    /// Holds the program where it is attached.
    _ebpf: Ebpf,
    counts: PerCpuArray<MapData, [u64; COUNTS_LEN]>,
    sizes: PerCpuArray<MapData, u64>,
}

impl Counter {
    /// Begins to count and drop UDP packets to `port` that come by `nic`.
    ///
    /// # Errors
    /// If there is no such interface, or the kernel refuses.
    pub fn attach(nic: &str, port: u16) -> Result<Self> {
        link::index(nic).with_context(|| format!("there is no interface {nic}"))?;
        let link_len = if link::has_ethernet_header(nic)? { ETHERNET_LEN as u32 } else { 0 };
        let mut ebpf = object::load(|loader| {
            loader.override_global(LINK_LEN_GLOBAL, &link_len, true);
            loader.override_global(PORT_GLOBAL, &port, true);
        })?;
        let map = |ebpf: &mut Ebpf, name| {
            ebpf.take_map(name).with_context(|| format!("the object has no {name}"))
        };
        let counts = PerCpuArray::try_from(map(&mut ebpf, COUNTS)?)?;
        let sizes = PerCpuArray::try_from(map(&mut ebpf, SIZES)?)?;
        let program: &mut SchedClassifier = ebpf
            .program_mut(COUNT_PROGRAM)
            .context("the object has no program that counts")?
            .try_into()?;
        program.load().context("loading the program that counts")?;
        if KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(6, 6, 0)) {
            // It may be there already; if not, attaching fails.
            let _ = tc::qdisc_add_clsact(nic);
        }
        program
            .attach(nic, TcAttachType::Ingress)
            .with_context(|| format!("attaching the program that counts to {nic}"))?;
        Ok(Self { _ebpf: ebpf, counts, sizes })
    }

    /// What was counted so far.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn read(&self) -> Result<CountReport> {
        let per_cpu = self.counts.get(&0, 0)?;
        let mut by_size = BTreeMap::new();
        for len in 0..SIZES_LEN {
            let count: u64 = self.sizes.get(&len, 0)?.iter().sum();
            if count > 0 {
                by_size.insert(len, count);
            }
        }
        Ok(report(&per_cpu, by_size))
    }
}

/// Sums up what each CPU counted.
fn report(per_cpu: &[[u64; COUNTS_LEN]], by_size: BTreeMap<u32, u64>) -> CountReport {
    let sum = |at: usize| per_cpu.iter().map(|counts| counts[at]).sum();
    let times = |at: usize| per_cpu.iter().map(move |counts| counts[at]).filter(|&time| time != 0);
    let first = times(COUNTS_FIRST_NS).min().unwrap_or(0);
    let last = times(COUNTS_LAST_NS).max().unwrap_or(0);
    let seconds = last.saturating_sub(first) as f64 / 1e9;
    let packets: u64 = sum(COUNTS_PACKETS);
    CountReport {
        packets,
        bytes: sum(COUNTS_BYTES),
        buffers: sum(COUNTS_BUFFERS),
        seconds,
        pps: if seconds > 0.0 { packets as f64 / seconds } else { 0.0 },
        by_size,
        passed: sum(COUNTS_PASSED),
    }
}

/// Counts for as long as the arguments say, and gives the count.
///
/// # Errors
/// If it cannot count, or make its socket.
pub fn count(arguments: &Count) -> Result<CountReport> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let counter = Counter::attach(&arguments.nic, arguments.inner_port)?;
    let socket = arguments.socket.as_deref().map(Socket::make).transpose()?;
    let end =
        arguments.seconds.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds.max(0.0)));
    while !stop.load(Ordering::Relaxed) {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            break;
        }
        let pause = left.unwrap_or(Duration::MAX).min(Duration::from_millis(50));
        match &socket {
            Some(socket) => socket.answer(&counter, pause)?,
            None => std::thread::sleep(pause),
        }
    }
    counter.read()
}

/// A Unix socket that is removed when this goes.
struct Socket<'a> {
    listener: UnixListener,
    path: &'a Path,
}

impl<'a> Socket<'a> {
    fn make(path: &'a Path) -> Result<Self> {
        let listener = UnixListener::bind(path)
            .with_context(|| format!("making the socket {}", path.display()))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// Waits for `pause`, and tells the count to who connects meanwhile.
    fn answer(&self, counter: &Counter, pause: Duration) -> Result<()> {
        if poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], pause)? == 0 {
            return Ok(());
        }
        match self.listener.accept() {
            Ok((mut stream, _)) => {
                let line = serde_json::to_string(&counter.read()?)? + "\n";
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(PATIENCE))?;
                // Who has gone does not want it.
                let _ = stream.write_all(line.as_bytes());
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error).context("accepting who asks for the count"),
        }
    }
}

impl Drop for Socket<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.path);
    }
}

/// Asks a counter by its socket.
///
/// # Errors
/// If nobody is there, or what is there is no counter.
pub fn ask(path: &Path) -> Result<CountReport> {
    let ask = || -> Result<CountReport> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut text = String::new();
        stream.take(ANSWER_LEN_MAX).read_to_string(&mut text)?;
        Ok(serde_json::from_str(&text)?)
    };
    ask().with_context(|| format!("asking the counter at {}", path.display()))
}

/// Asks a counter once nothing comes any more: what is on its way has arrived then.
///
/// # Errors
/// As [`ask`], or if packets of others keep coming.
pub fn ask_settled(path: &Path) -> Result<CountReport> {
    let begin = Instant::now();
    let mut last = ask(path)?;
    let mut since = Instant::now();
    while since.elapsed() < SETTLED_AFTER {
        ensure!(
            begin.elapsed() < SETTLE_LIMIT,
            "packets keep coming to the counter at {}",
            path.display()
        );
        std::thread::sleep(SETTLED_AFTER / 6);
        let now = ask(path)?;
        if now.packets != last.packets {
            since = Instant::now();
        }
        last = now;
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_runs_from_the_first_of_all_cpus_to_the_last() {
        let mut per_cpu = [[0; COUNTS_LEN]; 3];
        for (cpu, packets, first, last) in
            [(0, 5, 2_000_000_000, 3_000_000_000), (2, 7, 1_500_000_000, 2_500_000_000)]
        {
            per_cpu[cpu][COUNTS_PACKETS] = packets;
            per_cpu[cpu][COUNTS_BUFFERS] = 1;
            per_cpu[cpu][COUNTS_FIRST_NS] = first;
            per_cpu[cpu][COUNTS_LAST_NS] = last;
        }
        let report = report(&per_cpu, BTreeMap::new());
        assert_eq!((report.packets, report.buffers, report.seconds, report.pps), (12, 2, 1.5, 8.0));
    }

    #[test]
    fn nothing_counted_is_no_rate() {
        let report = report(&[[0; COUNTS_LEN]; 2], BTreeMap::new());
        assert_eq!((report.packets, report.seconds, report.pps), (0, 0.0, 0.0));
    }

    #[test]
    fn who_is_no_counter_is_an_error() {
        let path = std::env::temp_dir().join(format!("tidegate-load-none-{}", std::process::id()));
        assert!(ask(&path).unwrap_err().to_string().contains("asking the counter"));
    }
}
