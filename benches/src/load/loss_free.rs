//! The highest rate at which a gateway loses nothing: floods at rates that a search chooses, each beside its count.

use anyhow::{Context, Result, ensure};

use super::arguments::{LossFree, Rate};
use super::flood::flood;
use super::report::{LossFreeReport, Step, Trial};
use super::sealed::Plan;
use super::search::{Search, majority};

/// A trial at which the sender did not keep its rate says nothing: it is made again so many times at most.
const REPEATS_MAX: u32 = 2;
/// How often the search goes on after what it found has failed in the end.
const ROUNDS_MAX: u32 = 3;

/// Searches, and tries what it found some more times.
///
/// # Errors
/// If a flood cannot be made at all.
pub fn loss_free(arguments: &LossFree) -> Result<LossFreeReport> {
    arguments.flood.counter.as_ref().context("without --counter nobody knows what is lost")?;
    ensure!(arguments.trials > 0 && arguments.confirm > 0, "without trials nothing is known");
    ensure!((0.0..1.0).contains(&arguments.loss), "a loss of {} is no part", arguments.loss);
    ensure!(
        arguments.resolution > 0.0,
        "a resolution of {} is never reached",
        arguments.resolution
    );
    ensure!(arguments.lowest >= 1.0, "the lowest rate is 1 packet per second");
    let asked = arguments.flood.pps.number().unwrap_or(f64::INFINITY);
    let highest = asked.min(Plan::rate_max(&arguments.flood));
    ensure!(
        arguments.lowest <= highest,
        "{highest:.0} packets per second, the most that is tried or that --memory has room for, are less than the \
         lowest rate, {}",
        arguments.lowest
    );
    search(arguments, highest, |rate| trial(arguments, rate))
}

fn trial(arguments: &LossFree, rate: f64) -> Result<Trial> {
    let mut one = arguments.flood.clone();
    one.pps = Rate::PerSecond(rate);
    let report = flood(&one)?;
    let delivered = report.delivered.context("a counter was given")?;
    Ok(Trial {
        sent: report.packets,
        delivered: delivered.packets,
        pps: report.pps,
        kept_rate: !report.limited_by_sender,
    })
}

fn search(
    arguments: &LossFree,
    highest: f64,
    mut trial: impl FnMut(f64) -> Result<Trial>,
) -> Result<LossFreeReport> {
    let mut search = Search::new(arguments.lowest, highest, arguments.resolution);
    let mut steps = Vec::new();
    for _ in 0..ROUNDS_MAX {
        while let Some(rate) = search.next() {
            let step = step(arguments, rate, arguments.trials, false, &mut trial)?;
            search.tried(rate, step.passed);
            steps.push(step);
        }
        let Some(found) = search.found() else { break };
        let step = step(arguments, found, arguments.confirm, true, &mut trial)?;
        let passed = step.passed;
        steps.push(step);
        if passed {
            break;
        }
        search.tried(found, false);
    }
    Ok(report(arguments, &search, highest, steps))
}

/// Tries a rate: until it is decided, or `all` of the times.
fn step(
    arguments: &LossFree,
    rate: f64,
    count: u32,
    all: bool,
    trial: &mut impl FnMut(f64) -> Result<Trial>,
) -> Result<Step> {
    let mut trials = Vec::new();
    let mut one = || -> Result<bool> {
        let mut made = trial(rate)?;
        for _ in 0..REPEATS_MAX {
            // What was lost nevertheless was lost at a lower rate still.
            if made.kept_rate || !is_clean(arguments, &made) {
                break;
            }
            made = trial(rate)?;
        }
        trials.push(made);
        Ok(made.kept_rate && is_clean(arguments, &made))
    };
    let passed = if all {
        let mut clean_count = 0;
        for _ in 0..count {
            clean_count += u32::from(one()?);
        }
        clean_count > count / 2
    } else {
        majority(count, one)?
    };
    Ok(Step { pps: rate, passed, trials })
}

fn is_clean(arguments: &LossFree, trial: &Trial) -> bool {
    let lost = trial.sent.saturating_sub(trial.delivered);
    lost as f64 <= arguments.loss * trial.sent as f64
}

fn report(arguments: &LossFree, search: &Search, highest: f64, steps: Vec<Step>) -> LossFreeReport {
    let found = search.found();
    let of_found =
        || steps.iter().filter(|step| Some(step.pps) == found).flat_map(|step| &step.trials);
    let trials = of_found().count() as u32;
    let clean_trials =
        of_found().filter(|trial| trial.kept_rate && is_clean(arguments, trial)).count() as u32;
    // The failure next to what was found: the sender's, if nothing was lost in it.
    let of_failed = |step: &&Step| Some(step.pps) == search.failed() && !step.passed;
    let sender_failed = steps.iter().rev().find(of_failed).is_some_and(|step| {
        let late = step
            .trials
            .iter()
            .filter(|trial| !trial.kept_rate && is_clean(arguments, trial))
            .count();
        late * 2 >= step.trials.len()
    });
    let limited_by_sender = sender_failed || found == Some(highest);
    let mut warnings = Vec::new();
    if found == Some(highest) {
        warnings.push(format!(
            "{highest:.0} packets per second, the most that was tried, lost nothing: the gateway may do more (--pps, \
             --memory)"
        ));
    } else if sender_failed {
        warnings.push("this machine could send no faster: the gateway may do more".to_owned());
    }
    if found.is_none() && !sender_failed {
        warnings.push("packets were lost at every rate that was tried".to_owned());
    }
    LossFreeReport {
        pps: found,
        lowest_failed_pps: search.failed(),
        clean_trials,
        trials,
        confidence: f64::from(clean_trials) / f64::from(trials.max(1)),
        loss_allowed: arguments.loss,
        limited_by_sender,
        steps,
        warnings,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::arguments::{Arguments, Command};
    use super::*;

    fn arguments(options: &str) -> LossFree {
        let line = format!(
            "load loss-free --to 198.51.100.1:51820 --server-key IBwCMKG0IAvhlcZPDahVK2eDM/zI9yt7lBt7QJh8l1E= \
             --dst 192.168.20.2 --peers 1 --size 64 --pps max --seconds 1 {options}"
        );
        match Arguments::try_parse_from(line.split_whitespace()).unwrap().command {
            Command::LossFree(arguments) => arguments,
            other => panic!("{other:?}"),
        }
    }

    /// A gateway of some capacity behind a sender that has one, too.
    fn model(rate: f64, sender: f64, gateway: f64) -> Trial {
        let pps = rate.min(sender);
        let (sent, delivered) = (pps as u64, pps.min(gateway) as u64);
        Trial { sent, delivered, pps, kept_rate: rate <= sender }
    }

    #[test]
    fn a_gateway_that_is_slower_than_the_sender_is_measured() {
        let arguments = arguments("");
        let report = search(&arguments, 1e7, |rate| Ok(model(rate, 1e6, 250_000.0))).unwrap();
        let found = report.pps.unwrap();
        assert!((242_000.0..=250_000.0).contains(&found), "{found}");
        assert!(!report.limited_by_sender && report.warnings.is_empty(), "{report:?}");
        assert_eq!((report.clean_trials, report.trials, report.confidence), (7, 7, 1.0));
    }

    #[test]
    fn a_sender_that_is_slower_than_the_gateway_is_told() {
        let arguments = arguments("");
        let report = search(&arguments, 1e7, |rate| Ok(model(rate, 300_000.0, 1e6))).unwrap();
        assert!(report.limited_by_sender);
        assert!((290_000.0..=300_000.0).contains(&report.pps.unwrap()));
        assert_eq!(report.warnings.len(), 1);
        let report = search(&arguments, 20_000.0, |rate| Ok(model(rate, 1e6, 1e6))).unwrap();
        assert_eq!((report.pps, report.limited_by_sender), (Some(20_000.0), true));
    }

    #[test]
    fn some_loss_may_be_allowed() {
        let lossy = |rate: f64| {
            let sent = rate as u64;
            Ok(Trial { sent, delivered: sent - sent / 1000, pps: rate, kept_rate: true })
        };
        let strict = search(&arguments(""), 1e5, lossy).unwrap();
        assert_eq!((strict.pps, strict.confidence), (None, 0.0));
        let report = search(&arguments("--loss 0.002"), 1e5, lossy).unwrap();
        assert_eq!(report.pps, Some(1e5));
    }

    #[test]
    fn what_fails_in_the_end_is_searched_below() {
        let mut trials_at_first = 0;
        let report = search(&arguments("--lowest 10000"), 10_000_000.0, |rate| {
            // The first rate above 100,000 passes in the search, and never again.
            let by_luck = rate > 100_000.0 && trials_at_first < 2;
            trials_at_first += u32::from(rate > 100_000.0);
            Ok(model(rate, 1e9, if by_luck { 1e9 } else { 100_000.0 }))
        })
        .unwrap();
        assert!((97_000.0..=100_000.0).contains(&report.pps.unwrap()), "{report:?}");
    }

    #[test]
    fn a_sender_that_fails_in_the_end_is_told_too() {
        let mut count = 0;
        let report = search(&arguments("--trials 1 --confirm 1 --lowest 1500"), 3000.0, |rate| {
            count += 1;
            // Twice in time, then never above 2,000.
            Ok(model(rate, if count <= 2 { 1e9 } else { 2000.0 }, 1e9))
        })
        .unwrap();
        assert!(report.limited_by_sender && report.pps.unwrap() < 2000.1, "{report:?}");
    }

    #[test]
    fn a_counter_is_needed() {
        assert!(loss_free(&arguments("")).unwrap_err().to_string().contains("--counter"));
    }
}
