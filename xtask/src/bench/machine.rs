//! The machine of a run: what is said of it in reports, its cores, and what they were busy with.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};

/// Ticks of proc(5) per second: what every Linux of today tells programs.
const TICKS_PER_S: u64 = 100;

/// What reports say of the machine.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Machine {
    /// The CPU's model.
    pub cpu: String,
    /// Cores that this process may use.
    pub core_count: usize,
    /// Whether it is a virtual machine.
    pub is_virtual: bool,
    /// The kernel's release.
    pub kernel: String,
    /// The distribution.
    pub system: String,
    /// The governor of the first core's frequency, if it has one.
    pub governor: Option<String>,
}

impl Machine {
    /// This one.
    ///
    /// # Errors
    /// If the kernel does not say which cores there are.
    pub fn look() -> Result<Machine> {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
        let release = read("/etc/os-release");
        let system = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
        Ok(Machine {
            cpu: cpu_model(&cpuinfo).unwrap_or("unknown").to_owned(),
            core_count: usable_cores()?.len(),
            is_virtual: is_virtual(&cpuinfo),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            system: system.unwrap_or("Linux").trim_matches('"').to_owned(),
            governor: Some(governor.trim().to_owned()).filter(|governor| !governor.is_empty()),
        })
    }
}

fn cpu_model(cpuinfo: &str) -> Option<&str> {
    let value = |key: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim()).filter(|value| !value.is_empty())
    };
    // ARM has numbers only, and the board's name at times.
    value("model name").or_else(|| value("Model")).or_else(|| value("CPU part"))
}

fn is_virtual(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "hypervisor")
}

/// The cores on which the calling thread may run, in ascending order.
///
/// # Errors
/// If the kernel does not say.
pub fn usable_cores() -> Result<Vec<usize>> {
    let set = sched_getaffinity(None).context("asking for the cores of this process")?;
    Ok((0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect())
}

/// How many cores the machine has, whoever may use them.
///
/// # Errors
/// If the kernel does not say.
pub fn online_core_count() -> Result<usize> {
    let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    Ok(core_lines(&text))
}

fn core_lines(stat: &str) -> usize {
    let numbers = stat.lines().filter_map(|line| line.strip_prefix("cpu"));
    numbers.filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit())).count()
}

/// Has the calling thread, and what it starts, run on these cores only.
///
/// # Errors
/// If there are no such cores.
pub fn stay_on(cores: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for &core in cores {
        ensure!(core < CpuSet::MAX_CPU, "there is no core {core}");
        set.set(core);
    }
    sched_setaffinity(None, &set).with_context(|| format!("staying on cores {cores:?}"))
}

/// Which cores do what.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cores {
    /// The gateway's processes, and the receive work of its links.
    pub gateway: usize,
    /// Everything else.
    pub others: Vec<usize>,
}

impl Cores {
    /// The last core is the gateway's; threads that share it with another of the same core in hardware do
    /// nothing, if there are others.
    ///
    /// # Errors
    /// If the kernel does not say which there are.
    pub fn choose() -> Result<Cores> {
        let usable = usable_cores()?;
        let gateway = *usable.last().context("there is a core")?;
        let path = format!("/sys/devices/system/cpu/cpu{gateway}/topology/thread_siblings_list");
        let siblings = fs::read_to_string(path).unwrap_or_default();
        Ok(Cores::divide(&usable, gateway, &core_list(&siblings)))
    }

    fn divide(usable: &[usize], gateway: usize, siblings: &BTreeSet<usize>) -> Cores {
        let without = |left_out: &dyn Fn(usize) -> bool| -> Vec<usize> {
            usable.iter().copied().filter(|&core| core != gateway && !left_out(core)).collect()
        };
        let mut others = without(&|core| siblings.contains(&core));
        if others.is_empty() {
            others = without(&|_| false);
        }
        if others.is_empty() {
            others.push(gateway);
        }
        Cores { gateway, others }
    }

    /// Whether the gateway has its core for itself.
    pub fn are_apart(&self) -> bool {
        !self.others.contains(&self.gateway)
    }

    /// All of them.
    pub fn all(&self) -> Vec<usize> {
        let mut all: BTreeSet<_> = self.others.iter().copied().collect();
        all.insert(self.gateway);
        all.into_iter().collect()
    }

    /// Runs something that starts processes, which begin on these cores.
    ///
    /// # Errors
    /// Those of `start`, or if there are no such cores.
    pub fn starting_on<T>(&self, cores: &[usize], start: impl FnOnce() -> Result<T>) -> Result<T> {
        stay_on(cores)?;
        let started = start();
        stay_on(&self.others)?;
        started
    }
}

/// Cores as sysfs lists them: `0-3,8`.
fn core_list(text: &str) -> BTreeSet<usize> {
    let mut cores = BTreeSet::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        if let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse()) {
            cores.extend(first..=last);
        }
    }
    cores
}

/// Cores as masks are written to sysfs: words of 32 bits, the highest first.
pub fn core_mask(cores: &[usize]) -> String {
    let word_count = cores.iter().max().map_or(1, |&last| last / 32 + 1);
    let mut words = vec![0u32; word_count];
    for &core in cores {
        words[core / 32] |= 1 << (core % 32);
    }
    let words: Vec<_> = words.iter().rev().map(|word| format!("{word:08x}")).collect();
    words.join(",")
}

/// What a core, or all together, did not do, since the machine was started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Away {
    /// Nobody had work for it.
    pub idle: Duration,
    /// Somebody wanted to run, and the host ran something else.
    pub stolen: Duration,
}

impl Away {
    /// Of a core, or of all.
    ///
    /// # Errors
    /// If there is no such core.
    pub fn of(core: Option<usize>) -> Result<Away> {
        let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        Away::parse(&text, core).with_context(|| format!("/proc/stat does not know {core:?}"))
    }

    fn parse(stat: &str, core: Option<usize>) -> Option<Away> {
        let name = core.map_or_else(|| "cpu".to_owned(), |core| format!("cpu{core}"));
        let mut lines = stat.lines().map(str::split_ascii_whitespace);
        let mut fields = lines.find_map(|mut line| (line.next()? == name).then_some(line))?;
        let mut ticks = |skipped| fields.nth(skipped)?.parse::<u64>().ok();
        // user nice system [idle iowait] irq softirq [steal]
        let (idle, waiting, stolen) = (ticks(3)?, ticks(0)?, ticks(2)?);
        let time = |ticks: u64| Duration::from_millis(ticks * 1000 / TICKS_PER_S);
        Some(Away { idle: time(idle + waiting), stolen: time(stolen) })
    }

    /// From `before` until now; the kernel's counts go back at times.
    pub fn since(self, before: Away) -> Away {
        Away {
            idle: self.idle.saturating_sub(before.idle),
            stolen: self.stolen.saturating_sub(before.stolen),
        }
    }
}

/// A stopwatch for what a core does.
///
/// Busy is what is neither idle nor stolen. Times of idleness are exact; those that the kernel counts as
/// user, system and softirq are made of ticks, of which a core without a tick while it is idle misses the
/// work that an interrupt brings it.
#[derive(Clone, Copy, Debug)]
pub struct CoreWatch {
    core: usize,
    since: Instant,
    away: Away,
}

impl CoreWatch {
    /// Begins.
    ///
    /// # Errors
    /// If there is no such core.
    pub fn start(core: usize) -> Result<CoreWatch> {
        Ok(CoreWatch { core, since: Instant::now(), away: Away::of(Some(core))? })
    }

    /// How long it was busy, of how long.
    ///
    /// # Errors
    /// If the core is gone.
    pub fn busy(&self) -> Result<(Duration, Duration)> {
        let away = Away::of(Some(self.core))?.since(self.away);
        let elapsed = self.since.elapsed();
        Ok((elapsed.saturating_sub(away.idle).saturating_sub(away.stolen), elapsed))
    }
}

/// Finds kernel threads whose name begins so.
pub fn kernel_threads(name: &str) -> BTreeSet<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return BTreeSet::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let folder = format!("/proc/{pid}");
        let is_kernels =
            || fs::read(Path::new(&folder).join("cmdline")).is_ok_and(|c| c.is_empty());
        let comm = fs::read_to_string(Path::new(&folder).join("comm")).unwrap_or_default();
        comm.starts_with(name) && is_kernels()
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_read_as_the_kernel_shows_them() {
        let amd = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu hypervisor sse\n";
        assert_eq!((cpu_model(amd), is_virtual(amd)), (Some("AMD EPYC"), true));
        let arm = "processor\t: 0\nCPU part\t: 0xd0c\n";
        assert_eq!((cpu_model(arm), is_virtual(arm)), (Some("0xd0c"), false));
        assert_eq!(cpu_model(""), None);
        assert!(!is_virtual("flags : nohypervisors\n"));
    }

    #[test]
    fn lists_and_masks_of_cores_are_those_of_sysfs() {
        assert_eq!(core_list("0-2,5\n").into_iter().collect::<Vec<_>>(), [0, 1, 2, 5]);
        assert!(core_list("").is_empty());
        assert_eq!(core_mask(&[0]), "00000001");
        assert_eq!(core_mask(&[1, 3, 33]), "00000002,0000000a");
    }

    #[test]
    fn the_gateway_has_a_core_for_itself_where_there_are_two() {
        let divide = |usable: &[usize], gateway, siblings: &[usize]| {
            Cores::divide(usable, gateway, &siblings.iter().copied().collect())
        };
        assert_eq!(divide(&[0, 1], 1, &[1]), Cores { gateway: 1, others: vec![0] });
        // The other thread of its core does nothing, unless there is no other.
        assert_eq!(divide(&[0, 1, 2, 3], 3, &[1, 3]), Cores { gateway: 3, others: vec![0, 2] });
        assert_eq!(divide(&[0, 1], 1, &[0, 1]), Cores { gateway: 1, others: vec![0] });
        let alone = divide(&[4], 4, &[4]);
        assert_eq!((alone.all(), alone.are_apart()), (vec![4], false));
    }

    #[test]
    fn what_a_core_did_not_do_is_read_from_its_own_line() {
        let stat = "cpu  100 1 50 900 50 0 9 7 0 0\ncpu1 60 1 20 400 25 0 5 3 0 0\n\
                    cpu10 1 1 1 10 0 0 1 1 0 0\nintr 1 2 3\n";
        let away = |idle, stolen| {
            let time = Duration::from_millis;
            Some(Away { idle: time(idle), stolen: time(stolen) })
        };
        assert_eq!(Away::parse(stat, None), away(9500, 70));
        assert_eq!(Away::parse(stat, Some(1)), away(4250, 30));
        assert_eq!(Away::parse(stat, Some(10)), away(100, 10));
        assert_eq!(Away::parse(stat, Some(2)), None);
        assert_eq!(core_lines(stat), 2);
        assert_eq!(Away::parse("cpu1 1 2\n", Some(1)), None);
    }

    #[test]
    fn a_thread_that_spins_is_seen_and_one_that_sleeps_is_not() {
        let core = *usable_cores().unwrap().last().unwrap();
        let busy = std::thread::spawn(move || {
            stay_on(&[core]).unwrap();
            let watch = CoreWatch::start(core).unwrap();
            let end = Instant::now() + Duration::from_millis(300);
            while Instant::now() < end {}
            let (busy, elapsed) = watch.busy().unwrap();
            // What others run there is busy, too; what is stolen is not.
            assert!(busy <= elapsed);
            let stolen = Away::of(Some(core)).unwrap().since(watch.away).stolen;
            busy + stolen
        });
        assert!(busy.join().unwrap() > Duration::from_millis(200));
    }
}
