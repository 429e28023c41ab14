//! How far a run is: a line on standard error that is written over and over, or, where that is no terminal,
//! a line for each turn.

use std::{
    io::{self, IsTerminal, Write as _},
    time::{Duration, Instant},
};

/// Characters of the bar, and of a line in all.
const BAR_LEN: usize = 24;
const LINE_LEN: usize = 79;
/// Estimates are held against what passed only after a while.
const TRUST_AFTER: Duration = Duration::from_secs(5);

/// How far a run is.
pub struct Progress {
    is_terminal: bool,
    begun: Instant,
    /// What all of it was estimated to take, and what is done of it.
    planned: Duration,
    done: Duration,
    turn: String,
}

impl Progress {
    /// Of a run that is estimated to take so long.
    pub fn new(planned: Duration) -> Progress {
        let is_terminal = io::stderr().is_terminal();
        let begun = Instant::now();
        Progress { is_terminal, begun, planned, done: Duration::ZERO, turn: String::new() }
    }

    /// Somebody's turn begins.
    pub fn turn(&mut self, turn: String) {
        self.turn = turn;
        if !self.is_terminal {
            eprintln!("{}", self.line(""));
        }
    }

    /// Something begins that was estimated to take so long.
    pub fn step(&mut self, what: &str, planned: Duration) {
        self.draw(what);
        self.done += planned;
    }

    /// So much of the estimate will not be needed.
    pub fn skip(&mut self, planned: Duration) {
        self.planned = self.planned.saturating_sub(planned);
    }

    /// Another estimate of what is left.
    fn left(&self) -> Duration {
        left(self.planned, self.done, self.begun.elapsed())
    }

    fn line(&self, what: &str) -> String {
        let part = self.done.as_secs_f64() / self.planned.as_secs_f64().max(1e-3);
        line(part, self.left(), &self.turn, what)
    }

    fn draw(&self, what: &str) {
        if self.is_terminal {
            eprint!("\r\x1b[K{}", self.line(what));
            let _ = io::stderr().flush();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_terminal {
            eprint!("\r\x1b[K");
        }
    }
}

fn left(planned: Duration, done: Duration, passed: Duration) -> Duration {
    let left = planned.saturating_sub(done);
    if done < TRUST_AFTER || passed < TRUST_AFTER {
        return left;
    }
    left.mul_f64(passed.as_secs_f64() / done.as_secs_f64())
}

fn line(part: f64, left: Duration, turn: &str, what: &str) -> String {
    let filled = (part.clamp(0.0, 1.0) * BAR_LEN as f64) as usize;
    let bar = "#".repeat(filled) + &"-".repeat(BAR_LEN - filled);
    let seconds = left.as_secs();
    let left = format!("{}:{:02} left", seconds / 60, seconds % 60);
    let colon = if what.is_empty() { "" } else { ": " };
    format!("[{bar}] {left}, {turn}{colon}{what}").chars().take(LINE_LEN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_far_it_is_and_fits() {
        let text = line(0.5, Duration::from_secs(185), "round 2 of 3, gotatun", "tcp-up-1");
        let bar = "[############------------]";
        assert_eq!(text, format!("{bar} 3:05 left, round 2 of 3, gotatun: tcp-up-1"));
        assert_eq!(line(7.0, Duration::ZERO, &"é".repeat(200), "x").chars().count(), LINE_LEN);
        assert!(line(f64::NAN, Duration::ZERO, "a", "").ends_with("] 0:00 left, a"));
    }

    #[test]
    fn what_is_left_is_estimated_by_what_passed() {
        let seconds = Duration::from_secs;
        assert_eq!(left(seconds(100), seconds(0), seconds(4)), seconds(100));
        assert_eq!(left(seconds(100), seconds(20), seconds(30)), seconds(120));
        assert_eq!(left(seconds(100), seconds(120), seconds(130)), seconds(0));
    }
}
