//! CPU time of other processes, by proc(5).

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::report::CpuTime;

/// Ticks per second in what proc(5) tells programs, on every Linux of today.
const TICKS_PER_S: u64 = 100;

/// What processes had used when it was looked.
pub struct CpuTimes(Vec<Used>);

#[derive(Clone, Debug, Eq, PartialEq)]
struct Used {
    pid: u32,
    name: String,
    user: u64,
    system: u64,
}

impl CpuTimes {
    /// Looks at these processes now, with all of their threads.
    ///
    /// # Errors
    /// If one is not there.
    pub fn read(pids: &[u32]) -> Result<Self> {
        let used = |&pid: &u32| {
            let path = format!("/proc/{pid}/stat");
            let stat =
                fs::read_to_string(&path).with_context(|| format!("there is no process {pid}"))?;
            Used::parse(pid, &stat).with_context(|| format!("{path} is not as expected"))
        };
        pids.iter().map(used).collect::<Result<_>>().map(Self)
    }

    /// What they have used since `before`, in all and for each of `packets`.
    pub fn since(&self, before: &Self, packets: u64) -> Vec<CpuTime> {
        let used = |(now, before): (&Used, &Used)| {
            let seconds =
                |ticks: u64| Duration::from_millis(ticks * 1000 / TICKS_PER_S).as_secs_f64();
            let (user, system) =
                (now.user.saturating_sub(before.user), now.system.saturating_sub(before.system));
            CpuTime {
                pid: now.pid,
                name: now.name.clone(),
                user_seconds: seconds(user),
                system_seconds: seconds(system),
                ns_per_packet: seconds(user + system) * 1e9 / packets.max(1) as f64,
            }
        };
        self.0.iter().zip(&before.0).map(used).collect()
    }
}

impl Used {
    fn parse(pid: u32, stat: &str) -> Option<Self> {
        // The name may hold anything, also `)`.
        let (head, rest) = stat.rsplit_once(')')?;
        let name = head.split_once('(')?.1.to_owned();
        let mut fields = rest.split_ascii_whitespace().skip(11).map(str::parse);
        Some(Self { pid, name, user: fields.next()?.ok()?, system: fields.next()?.ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(user: u64, system: u64) -> CpuTimes {
        let text = format!("7 (a) (b)) S 1 7 7 0 -1 4194304 1 2 3 4 {user} {system} 0 0 20 0 9 0");
        CpuTimes(vec![Used::parse(7, &text).unwrap()])
    }

    #[test]
    fn times_are_what_was_used_meanwhile() {
        let used = stat(150, 60).since(&stat(50, 10), 1_000_000);
        assert_eq!(used[0].name, "a) (b)");
        assert_eq!((used[0].user_seconds, used[0].system_seconds), (1.0, 0.5));
        assert_eq!(used[0].ns_per_packet, 1500.0);
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(CpuTimes::read(&[std::process::id()]).is_ok());
        assert!(CpuTimes::read(&[u32::MAX]).is_err());
    }
}
