//! The search for the highest rate that passes: steps of four up to one that fails, then halves between the two.

/// Each step up is so many times the last one.
const GROWTH: f64 = 4.0;

/// A search under way. It is told of each rate whether it passed, and says which to try next.
#[derive(Clone, Debug)]
pub struct Search {
    lowest: f64,
    highest: f64,
    resolution: f64,
    /// In ascending order.
    passed: Vec<f64>,
    failed: Option<f64>,
}

impl Search {
    /// Between `lowest` and `highest`, until rates that pass and fail differ by a part of `resolution` or less.
    ///
    /// # Panics
    /// If those are no such numbers.
    pub fn new(lowest: f64, highest: f64, resolution: f64) -> Self {
        assert!(lowest > 0.0 && lowest <= highest && highest.is_finite() && resolution > 0.0);
        Self { lowest, highest, resolution, passed: Vec::new(), failed: None }
    }

    /// The rate to try next; nothing if the search is over.
    pub fn next(&self) -> Option<f64> {
        match (self.found(), self.failed) {
            (None, None) => Some(self.lowest),
            (Some(passed), None) => {
                (passed < self.highest).then(|| (passed * GROWTH).min(self.highest))
            }
            // Below a failure, nothing passed: what is left is the lowest, if it was not that.
            (None, Some(failed)) => (failed > self.lowest).then_some(self.lowest),
            (Some(passed), Some(failed)) => {
                (failed / passed > 1.0 + self.resolution).then(|| (passed * failed).sqrt())
            }
        }
    }

    /// Notes what became of a rate. What passed at a higher one than has failed now, did so by chance.
    pub fn tried(&mut self, rate: f64, passed: bool) {
        if passed {
            self.passed.push(rate);
            self.passed.sort_by(f64::total_cmp);
        } else {
            self.failed = Some(self.failed.map_or(rate, |failed| failed.min(rate)));
            self.passed.retain(|&passed| passed < rate);
        }
    }

    /// The highest rate that has passed.
    pub fn found(&self) -> Option<f64> {
        self.passed.last().copied()
    }

    /// The lowest rate that has failed.
    pub fn failed(&self) -> Option<f64> {
        self.failed
    }
}

/// Trials of one rate: it passes if more than half of them are clean. `clean` is asked until that is decided.
///
/// # Errors
/// Those of `clean`.
pub fn majority<E>(trials: u32, mut clean: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
    let needed = trials / 2 + 1;
    let (mut clean_count, mut count) = (0, 0);
    while clean_count < needed && clean_count + (trials - count) >= needed {
        clean_count += u32::from(clean()?);
        count += 1;
    }
    Ok(clean_count >= needed)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use rand::RngExt;

    use super::*;

    /// Searches with `clean` saying of a rate whether a trial of it is; gives what was found and how many rates were
    /// tried.
    fn search(search: &mut Search, trials: u32, mut clean: impl FnMut(f64) -> bool) -> usize {
        let mut count = 0;
        while let Some(rate) = search.next() {
            count += 1;
            assert!(count < 100, "it does not end: {search:?}");
            let passed = majority(trials, || Ok::<_, Infallible>(clean(rate))).unwrap();
            search.tried(rate, passed);
        }
        count
    }

    #[test]
    fn the_capacity_of_a_gateway_is_found_to_the_resolution() {
        for capacity in [1000.0, 1001.0, 54_321.0, 1e6, 3.21e6, 9.99e6] {
            let mut found = Search::new(1000.0, 1e7, 0.03);
            let count = search(&mut found, 1, |rate| rate <= capacity);
            let passed = found.found().unwrap();
            assert!(passed <= capacity && passed * 1.03 >= capacity, "{capacity}: {passed}");
            assert!(found.failed().unwrap() > capacity);
            assert!(count <= 15, "{count} rates");
        }
    }

    #[test]
    fn a_gateway_beyond_the_search_is_found_at_its_end() {
        let mut all = Search::new(1000.0, 50_000.0, 0.03);
        search(&mut all, 1, |_| true);
        assert_eq!((all.found(), all.failed()), (Some(50_000.0), None));
        let mut none = Search::new(1000.0, 50_000.0, 0.03);
        assert_eq!(search(&mut none, 1, |_| false), 1);
        assert_eq!((none.found(), none.failed()), (None, Some(1000.0)));
    }

    #[test]
    fn disturbances_do_not_move_it_far() {
        // One trial of twelve loses something by the machine's doing, whatever the rate.
        let mut rng = crate::rng();
        let capacity = 400_000.0;
        let mut far = 0;
        for _ in 0..200 {
            let mut noisy = Search::new(1000.0, 1e7, 0.03);
            search(&mut noisy, 3, |rate| rate <= capacity && !rng.random_ratio(1, 12));
            let found = noisy.found().unwrap_or(0.0);
            assert!(found <= capacity);
            far += u32::from(found < capacity * 0.9);
        }
        // Of some ten rates below, each fails by chance with two of three: 2 %.
        assert!(far < 60, "{far} of 200 were far off");
    }

    #[test]
    fn where_loss_sets_in_slowly_the_rate_is_one_that_mostly_passes() {
        // From 100,000 on, a trial is disturbed more and more often; at 300,000 always.
        let mut rng = crate::rng();
        for _ in 0..50 {
            let mut soft = Search::new(1000.0, 1e7, 0.03);
            search(&mut soft, 5, |rate| rng.random::<f64>() >= (rate - 100_000.0) / 200_000.0);
            let found = soft.found().unwrap();
            assert!((100_000.0 * 0.9..300_000.0).contains(&found), "{found}");
        }
    }

    #[test]
    fn what_fails_later_takes_back_what_passed_above() {
        let mut taken_back = Search::new(1000.0, 64_000.0, 0.1);
        for rate in [1000.0, 4000.0, 16_000.0, 64_000.0] {
            assert_eq!(taken_back.next(), Some(rate));
            taken_back.tried(rate, true);
        }
        taken_back.tried(16_000.0, false);
        assert_eq!((taken_back.found(), taken_back.failed()), (Some(4000.0), Some(16_000.0)));
        assert_eq!(taken_back.next(), Some(8000.0));
    }

    #[test]
    fn trials_end_when_they_are_decided() {
        let count = |answers: &[bool]| {
            let mut answers = answers.iter();
            let passed = majority(3, || Ok::<_, ()>(*answers.next().unwrap())).unwrap();
            (passed, answers.len())
        };
        assert_eq!(count(&[true, true, false]), (true, 1));
        assert_eq!(count(&[false, false, true]), (false, 1));
        assert_eq!(count(&[true, false, true]), (true, 0));
        assert_eq!(count(&[false, true, false]), (false, 0));
        assert_eq!(majority(1, || Err("no")), Err("no"));
    }
}
