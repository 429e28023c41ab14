//! What is to be done: who takes part, what is measured, and how often.
//!
//! A plan is made by the user who asks, and carried out with privileges, maybe by another process; so it
//! has all that depends on who asks, such as where programs are.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{
    implementations::Implementation,
    rows::{Lengths, Measurement},
};

/// The part of the time that estimates may take up, since they are some.
const ESTIMATE_MAX: f64 = 0.9;

/// Who is at the client's end.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Client {
    /// Tidegate with sockets, so that the gateway is all that differs
    Tidegate,
    /// The same as at the gateway
    Same,
}

/// How packets cross links.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Offloads {
    /// Each by itself, of the MTU's size, as on a NIC that neither cuts nor joins
    Off,
    /// As the kernel has it: super-packets of 64 KiB cross whole, which no wire does
    On,
}

/// What is to be done.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Plan {
    /// The command line that repeats it.
    pub command: String,
    /// The commit that was built.
    pub commit: Option<String>,
    /// Where `tidegate`, `lab-tool` and `tidegate-load` are.
    pub programs: PathBuf,
    /// Who takes part.
    pub implementations: Vec<Implementation>,
    /// Names of measurements.
    pub measurements: Vec<String>,
    /// How long they are made.
    pub lengths: Lengths,
    /// How often.
    pub rounds: u32,
    /// Another round is not begun if it would end later.
    pub limit_s: Option<f64>,
    /// Who is at the client's end.
    pub client: Client,
    /// How packets cross links.
    pub offloads: Offloads,
    /// What a reader should know.
    pub notes: Vec<String>,
}

impl Plan {
    /// What is measured.
    ///
    /// # Errors
    /// If a name is of another build.
    pub fn measurements(&self) -> Result<Vec<Measurement>> {
        let all = Measurement::named(&self.measurements)?;
        ensure!(!self.implementations.is_empty() && !all.is_empty(), "nothing is to be measured");
        Ok(all)
    }
}

/// The most rounds that fit; of more than two an odd number, so that a median is one of the samples. One, if
/// none does.
pub fn rounds_that_fit(round: Duration, limit: Duration, most: u32) -> u32 {
    let fitting = limit.as_secs_f64() * ESTIMATE_MAX / round.as_secs_f64().max(1e-3);
    let is_good = |rounds: u32| rounds == 2 || rounds % 2 == 1;
    let fits = |rounds: u32| f64::from(rounds) <= fitting;
    (1..=most).rev().find(|&rounds| is_good(rounds) && fits(rounds)).unwrap_or(1)
}

/// The order of a round: each begins with the next one, and every second goes backwards, so that nobody
/// always follows the same.
pub fn order(round: u32, count: usize) -> Vec<usize> {
    let mut order: Vec<_> = (0..count).collect();
    order.rotate_left(round as usize % count.max(1));
    if round % 2 == 1 && count > 0 {
        order[1..].reverse();
    }
    order
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::bench::implementations;

    #[test]
    fn as_many_rounds_as_fit_and_seldom_an_even_number() {
        let fit = |round, limit| {
            rounds_that_fit(Duration::from_secs(round), Duration::from_secs(limit), 5)
        };
        assert_eq!(fit(60, 900), 5);
        assert_eq!(fit(162, 900), 5);
        assert_eq!(fit(163, 900), 3);
        assert_eq!(fit(280, 900), 2, "three would take more than nine tenths");
        assert_eq!(fit(420, 900), 1);
        assert_eq!(fit(2000, 900), 1);
        assert_eq!(fit(0, 900), 5);
    }

    #[test]
    fn a_plan_reaches_another_process_whole() {
        let names = ["tidegate-xdp", "none"].map(str::to_owned);
        let tidegate = Path::new("/nowhere/tidegate");
        let (implementations, _) = implementations::find(tidegate, &names).unwrap();
        let plan = Plan {
            command: "cargo xtask bench".to_owned(),
            commit: None,
            programs: "/nowhere".into(),
            implementations,
            measurements: vec!["echo-idle".to_owned(), "tcp-up-4".to_owned()],
            lengths: Lengths::QUICK,
            rounds: 3,
            limit_s: Some(180.0),
            client: Client::Same,
            offloads: Offloads::On,
            notes: vec!["a note".to_owned()],
        };
        let text = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
        assert_eq!(plan.measurements().unwrap().len(), 2);
        // A name of another build's is refused, and so is a plan to do nothing.
        assert!(
            Plan { measurements: vec!["speed".to_owned()], ..plan.clone() }.measurements().is_err()
        );
        assert!(Plan { implementations: Vec::new(), ..plan }.measurements().is_err());
    }

    #[test]
    fn orders_have_everybody_and_change() {
        assert_eq!(order(0, 4), [0, 1, 2, 3]);
        assert_eq!(order(1, 4), [1, 0, 3, 2]);
        assert_eq!(order(2, 4), [2, 3, 0, 1]);
        for round in 0..20 {
            let mut all = order(round, 5);
            all.sort_unstable();
            assert_eq!(all, [0, 1, 2, 3, 4]);
        }
        assert!(order(3, 0).is_empty());
        let first: Vec<_> = (0..5).map(|round| order(round, 5)[0]).collect();
        assert_eq!(first, [0, 1, 2, 3, 4]);
    }
}
