//! Round trips of UDP datagrams through a tunnel that is there.
//!
//! Datagrams have times at which they are to be sent, whatever became of those before: what a stall holds up is counted
//! for every datagram of that time, and not left out because the sender stood still, too.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::RngExt;
use wg_userspace::sys::random::Rng;

use super::arguments::{Echo, Latency};
use super::percentiles::Percentiles;
use super::report::{EchoReport, LatencyReport};
use super::target;

/// What a datagram begins with: which run it is of, its number, and when it was sent.
const RUN: std::ops::Range<usize> = 0..8;
const NUMBER: std::ops::Range<usize> = 8..16;
const SENT: std::ops::Range<usize> = 16..24;
const HEAD_LEN: usize = SENT.end;
/// Longest datagram.
const LEN_MAX: usize = 65_000;
/// How long the last answers are waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// Datagrams of one run at most: 160 MB.
const DATAGRAMS_MAX: u64 = 10_000_000;
/// The rest of a wait is spent awake: sleeping takes longer than asked for now and then.
const AWAKE: Duration = Duration::from_micros(60);

/// Sends datagrams to `echo` and times their way there and back.
///
/// # Errors
/// If the destination is none that may have load, the arguments make no sense, or nothing comes back.
pub fn latency(arguments: &Latency) -> Result<LatencyReport> {
    let way = target::way(arguments.to, arguments.nic.as_deref())?;
    let Latency { seconds, rate, len, .. } = *arguments;
    ensure!((HEAD_LEN..=LEN_MAX).contains(&len), "{HEAD_LEN} to {LEN_MAX} bytes, not {len}");
    ensure!(rate.is_finite() && rate > 0.0, "a rate of {rate} is none");
    let count = ((seconds * rate).round() as u64).max(1);
    ensure!(count <= DATAGRAMS_MAX, "{count} datagrams are more than {DATAGRAMS_MAX}");

    let socket = UdpSocket::bind(SocketAddr::new(way.source, 0)).context("binding a UDP socket")?;
    socket.connect(arguments.to)?;
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    let run = Rng.random::<u64>().to_le_bytes();
    let begin = Instant::now();
    let sending = AtomicBool::new(true);
    let (sent, seen) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&socket, run, count, rate, begin, &sending));
        let sent = send(&socket, run, count, rate, len, begin);
        let taken = begin.elapsed();
        sending.store(false, Ordering::Release);
        let seen = receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (sent.map(|(sent, late)| (sent, late, taken)), seen)
    });
    let ((sent, late_count, taken), mut seen) = (sent?, seen?);
    let received = seen.from_due_ns.len() as u64;
    if received == 0 {
        bail!(
            "nothing came back of {sent} datagrams; does `tidegate-load echo` listen at {}?",
            arguments.to
        );
    }
    let mut warnings = Vec::new();
    if late_count * 100 > sent {
        warnings.push(format!(
            "this machine sent {late_count} of {sent} datagrams more than 0.1 ms late"
        ));
    }
    let seconds = taken.as_secs_f64();
    Ok(LatencyReport {
        sent,
        received,
        lost: sent.saturating_sub(received),
        seconds,
        rate: sent as f64 / seconds,
        latency_us: Percentiles::of(&mut seen.from_due_ns),
        from_send_us: Percentiles::of(&mut seen.from_sent_ns),
        warnings,
    })
}

/// When datagram `number` is to be sent.
fn due(number: u64, rate: f64) -> Duration {
    Duration::from_secs_f64(number as f64 / rate)
}

/// Sends all datagrams, each at its time or, if that has passed, at once. Gives how many went, and how many of them
/// were late.
fn send(
    socket: &UdpSocket,
    run: [u8; 8],
    count: u64,
    rate: f64,
    len: usize,
    begin: Instant,
) -> Result<(u64, u64)> {
    const LATE: Duration = Duration::from_micros(100);
    let mut datagram = vec![0; len];
    datagram[RUN].copy_from_slice(&run);
    let (mut sent, mut late_count) = (0, 0);
    for number in 0..count {
        let due = due(number, rate);
        let mut now = begin.elapsed();
        while now < due {
            match (due - now).checked_sub(AWAKE) {
                Some(pause) if !pause.is_zero() => std::thread::sleep(pause),
                _ => std::hint::spin_loop(),
            }
            now = begin.elapsed();
        }
        late_count += u64::from(now - due > LATE);
        datagram[NUMBER].copy_from_slice(&number.to_le_bytes());
        datagram[SENT].copy_from_slice(&(now.as_nanos() as u64).to_le_bytes());
        match socket.send(&datagram) {
            Ok(_) => sent += 1,
            // What an ICMP message said of an earlier datagram, or no room for this one: it is lost.
            Err(error) if is_passing(&error) => sent += 1,
            Err(error) => return Err(error).context("sending"),
        }
    }
    Ok((sent, late_count))
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, Interrupted, TimedOut, WouldBlock};
    matches!(
        error.kind(),
        ConnectionRefused | HostUnreachable | Interrupted | TimedOut | WouldBlock
    )
}

#[derive(Default)]
struct Seen {
    from_due_ns: Vec<u64>,
    from_sent_ns: Vec<u64>,
}

/// Receives what comes back, until all has, or nothing comes any more after the last was sent.
fn receive(
    socket: &UdpSocket,
    run: [u8; 8],
    count: u64,
    rate: f64,
    begin: Instant,
    sending: &AtomicBool,
) -> Result<Seen> {
    let mut times = Seen::default();
    let mut seen = vec![false; count as usize];
    let mut datagram = vec![0; LEN_MAX];
    let mut last = Instant::now();
    while (times.from_due_ns.len() as u64) < count {
        match socket.recv(&mut datagram) {
            Ok(len) => {
                let now = begin.elapsed();
                last = Instant::now();
                let Some((number, sent_ns)) = read(&datagram[..len], run) else { continue };
                // Of two copies, the first counts.
                let Some(seen) = seen.get_mut(number as usize).filter(|seen| !**seen) else {
                    continue;
                };
                *seen = true;
                times.from_due_ns.push(now.saturating_sub(due(number, rate)).as_nanos() as u64);
                times.from_sent_ns.push((now.as_nanos() as u64).saturating_sub(sent_ns));
            }
            Err(error) if is_passing(&error) => {
                if !sending.load(Ordering::Acquire) && last.elapsed() > PATIENCE {
                    break;
                }
                if sending.load(Ordering::Acquire) {
                    last = Instant::now();
                }
            }
            Err(error) => return Err(error).context("receiving"),
        }
    }
    Ok(times)
}

/// The number of a datagram of this run, and when it was sent.
fn read(datagram: &[u8], run: [u8; 8]) -> Option<(u64, u64)> {
    let word =
        |at: std::ops::Range<usize>| Some(u64::from_le_bytes(*datagram.get(at)?.first_chunk()?));
    (datagram.get(RUN)? == run).then_some(())?;
    Some((word(NUMBER)?, word(SENT)?))
}

/// Sends datagrams back until the time is over or a signal comes.
///
/// # Errors
/// If it cannot listen.
pub fn echo(arguments: &Echo) -> Result<EchoReport> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let socket = UdpSocket::bind(arguments.listen)
        .with_context(|| format!("listening at {}", arguments.listen))?;
    echo_on(&socket, arguments.seconds.map(Duration::from_secs_f64), &stop)
}

fn echo_on(socket: &UdpSocket, limit: Option<Duration>, stop: &AtomicBool) -> Result<EchoReport> {
    let begin = Instant::now();
    let own_port = socket.local_addr()?.port();
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut report = EchoReport::default();
    let mut datagram = vec![0; LEN_MAX];
    while !stop.load(Ordering::Relaxed) && limit.is_none_or(|limit| begin.elapsed() < limit) {
        match socket.recv_from(&mut datagram) {
            // Else two that echo would never end, if somebody forged a datagram from one to the other.
            Ok((_, from)) if from.port() == own_port => report.failed += 1,
            Ok((len, from)) => match socket.send_to(&datagram[..len], from) {
                Ok(_) => report.echoed += 1,
                Err(_) => report.failed += 1,
            },
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error).context("receiving"),
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(to: SocketAddr, rate: f64, seconds: f64) -> Latency {
        Latency { to, seconds, rate, len: 64, nic: Some("lo".to_owned()) }
    }

    #[test]
    fn what_comes_back_is_timed_once_each() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = socket.local_addr().unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let echo = scope.spawn(|| echo_on(&socket, None, &stop).unwrap());
            let report = latency(&arguments(to, 500.0, 0.4)).unwrap();
            stop.store(true, Ordering::Relaxed);
            assert_eq!((report.sent, report.received, report.lost), (200, 200, 0));
            assert_eq!(echo.join().unwrap(), EchoReport { echoed: 200, failed: 0 });
            let (due, sent) = (report.latency_us.unwrap(), report.from_send_us.unwrap());
            assert!(due.max >= sent.p50 && due.p50 > 0.0, "{report:?}");
        });
    }

    #[test]
    fn an_echo_does_not_answer_another_one() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = socket.local_addr().unwrap();
        let other = UdpSocket::bind(("127.0.0.2", to.port())).unwrap();
        other.send_to(b"echo this", to).unwrap();
        let limit = Some(Duration::from_millis(200));
        let report = echo_on(&socket, limit, &AtomicBool::new(false)).unwrap();
        assert_eq!(report, EchoReport { echoed: 0, failed: 1 });
    }

    #[test]
    fn a_stall_counts_for_all_that_it_held_up() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = socket.local_addr().unwrap();
        std::thread::scope(|scope| {
            // Stands still once, for a quarter of the time.
            scope.spawn(|| {
                let mut datagram = [0; 2000];
                for number in 0..400 {
                    let (len, from) = socket.recv_from(&mut datagram).unwrap();
                    if number == 100 {
                        std::thread::sleep(Duration::from_millis(200));
                    }
                    socket.send_to(&datagram[..len], from).unwrap();
                }
            });
            let report = latency(&arguments(to, 500.0, 0.8)).unwrap();
            assert_eq!(report.lost, 0);
            let times = report.latency_us.unwrap();
            // 100 of 400 waited, 200 ms to none: a tenth of all waited 120 ms or more.
            assert!(times.p90 > 80_000.0 && times.max >= 195_000.0, "{times:?}");
        });
    }

    #[test]
    fn only_datagrams_of_this_run_count() {
        let mut datagram = [0; HEAD_LEN];
        datagram[RUN].copy_from_slice(b"this run");
        datagram[NUMBER].copy_from_slice(&7_u64.to_le_bytes());
        datagram[SENT].copy_from_slice(&9_u64.to_le_bytes());
        assert_eq!(read(&datagram, *b"this run"), Some((7, 9)));
        assert_eq!(read(&datagram, *b"another_"), None);
        assert_eq!(read(&datagram[..HEAD_LEN - 1], *b"this run"), None);
        assert_eq!(read(&[], *b"this run"), None);
    }

    #[test]
    fn silence_is_an_error() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let error = latency(&arguments(socket.local_addr().unwrap(), 100.0, 0.1)).unwrap_err();
        assert!(error.to_string().contains("nothing came back of 10"), "{error}");
    }
}
