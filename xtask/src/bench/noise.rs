//! Whether the machine is quiet enough: what a loop that only reads the clock notices, and what the kernel
//! says was stolen.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

use super::{machine, raw::Raw};

/// A loop that hears nothing for so long has lost its core: an interrupt takes less.
const GAP_MIN: Duration = Duration::from_micros(100);
/// The part of the time that may be lost before a machine counts as noisy.
const LOST_MAX: f64 = 0.01;
/// How often in a second a core may be lost: of a thousand echoes in that second, ten are the hundredth that
/// the 99th percentile is about.
const GAPS_PER_S_MAX: f64 = 10.0;
/// The part of the time that may be stolen.
const STOLEN_MAX: f64 = 0.01;

/// What loops noticed that ran on all cores at once and did nothing but read the clock.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Spin {
    /// For how long they ran, in seconds, all of them together.
    pub seconds: f64,
    /// How often one lost its core for more than 0.1 ms.
    pub gap_count: u64,
    /// For how long in all, in seconds.
    pub lost_s: f64,
    /// The longest time, in milliseconds.
    pub longest_ms: f64,
}

impl Spin {
    /// Spins on these cores, on all at once.
    ///
    /// # Errors
    /// If there are no such cores.
    pub fn on(cores: &[usize], length: Duration) -> Result<Spin> {
        thread::scope(|scope| {
            let threads: Vec<_> =
                cores.iter().map(|&core| scope.spawn(move || spin(core, length))).collect();
            let mut all = Spin::default();
            for thread in threads {
                let one =
                    thread.join().map_err(|_| anyhow!("a loop that spins has panicked"))??;
                all.add(one);
            }
            Ok(all)
        })
    }

    /// Another loop's, on top.
    fn add(&mut self, other: Spin) {
        self.seconds += other.seconds;
        self.gap_count += other.gap_count;
        self.lost_s += other.lost_s;
        self.longest_ms = self.longest_ms.max(other.longest_ms);
    }

    /// Two readings of the clock, one right after the other.
    fn note(&mut self, between: Duration) {
        self.seconds += between.as_secs_f64();
        if between > GAP_MIN {
            self.gap_count += 1;
            self.lost_s += between.as_secs_f64();
            self.longest_ms = self.longest_ms.max(between.as_secs_f64() * 1e3);
        }
    }
}

fn spin(core: usize, length: Duration) -> Result<Spin> {
    machine::stay_on(&[core])?;
    let mut seen = Spin::default();
    let begun = Instant::now();
    let mut last = begun;
    while last - begun < length {
        let now = Instant::now();
        seen.note(now - last);
        last = now;
    }
    Ok(seen)
}

/// What the host took from a virtual machine.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Steal {
    /// For how long there were cores, in seconds, all of them together.
    pub seconds: f64,
    /// For how long one was taken, in seconds.
    pub stolen_s: f64,
}

/// All of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Noise {
    /// Before and between the measurements.
    pub spin: Spin,
    /// While they were made.
    pub steal: Steal,
}

impl Noise {
    /// Of a run.
    pub fn of(raw: &Raw) -> Noise {
        let mut noise = Noise { spin: raw.before, steal: Steal::default() };
        for turn in raw.rounds.iter().flat_map(|round| &round.turns) {
            noise.spin.add(turn.before);
            noise.steal.seconds += turn.steal.seconds;
            noise.steal.stolen_s += turn.steal.stolen_s;
        }
        noise
    }

    /// How often a core was lost in a second.
    fn gaps_per_s(&self) -> f64 {
        ratio(self.spin.gap_count as f64, self.spin.seconds)
    }

    fn lost(&self) -> f64 {
        ratio(self.spin.lost_s, self.spin.seconds)
    }

    fn stolen(&self) -> f64 {
        ratio(self.steal.stolen_s, self.steal.seconds)
    }

    /// Whether figures are to be read with care.
    pub fn is_noisy(&self) -> bool {
        self.lost() > LOST_MAX || self.gaps_per_s() > GAPS_PER_S_MAX || self.stolen() > STOLEN_MAX
    }

    /// What was noticed.
    pub fn sentence(&self) -> String {
        format!(
            "Between measurements a loop that only reads the clock lost its core {:.1} times a second for \
             more than 0.1 ms ({:.1} ms at most, {:.2} % of the time in all); while measurements were made, \
             the host took {:.2} % of the time from this machine (steal).",
            self.gaps_per_s(),
            self.spin.longest_ms,
            self.lost() * 100.0,
            self.stolen() * 100.0,
        )
    }
}

fn ratio(part: f64, all: f64) -> f64 {
    if all > 0.0 { part / all } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_long_gaps_count() {
        let mut spin = Spin::default();
        for us in [1, 100, 101, 5000] {
            spin.note(Duration::from_micros(us));
        }
        assert_eq!(spin.gap_count, 2);
        assert!((spin.lost_s - 0.005_101).abs() < 1e-9, "{spin:?}");
        assert!((spin.longest_ms - 5.0).abs() < 1e-9, "{spin:?}");
        assert!((spin.seconds - 0.005_202).abs() < 1e-9, "{spin:?}");
    }

    #[test]
    fn a_machine_is_noisy_by_any_of_three_signs() {
        let quiet = Noise {
            spin: Spin { seconds: 10.0, gap_count: 100, lost_s: 0.1, longest_ms: 4.0 },
            steal: Steal { seconds: 100.0, stolen_s: 1.0 },
        };
        assert!(!quiet.is_noisy());
        let often = Spin { gap_count: 101, ..quiet.spin };
        let long = Spin { lost_s: 0.11, ..quiet.spin };
        for spin in [often, long] {
            assert!(Noise { spin, ..quiet }.is_noisy(), "{spin:?}");
        }
        assert!(Noise { steal: Steal { stolen_s: 1.1, ..quiet.steal }, ..quiet }.is_noisy());
        assert!(!Noise::default().is_noisy());
    }

    #[test]
    fn the_sentence_has_the_figures() {
        let noise = Noise {
            spin: Spin { seconds: 2.0, gap_count: 126, lost_s: 0.1, longest_ms: 17.04 },
            steal: Steal { seconds: 50.0, stolen_s: 2.5 },
        };
        let sentence = noise.sentence();
        for figure in
            ["63.0 times a second", "17.0 ms at most", "5.00 % of the time", "took 5.00 %"]
        {
            assert!(sentence.contains(figure), "{sentence}");
        }
    }

    #[test]
    fn loops_spin_on_all_cores_for_as_long_as_they_are_told() {
        let cores = machine::usable_cores().unwrap();
        let spin = Spin::on(&cores, Duration::from_millis(20)).unwrap();
        assert!(spin.seconds >= 0.02 * cores.len() as f64, "{spin:?}");
        assert!(spin.lost_s <= spin.seconds && spin.longest_ms <= spin.seconds * 1e3, "{spin:?}");
        assert!(Spin::on(&[1 << 20], Duration::ZERO).is_err());
    }
}
