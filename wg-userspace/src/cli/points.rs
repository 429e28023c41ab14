//! Points on the way of a command at which tests end it, or let it fail.
//!
//! They are counted from 1. Where this program was built for use, they are not there.

use super::Failure;

/// The points that were passed.
#[derive(Debug, Default)]
pub struct Points {
    #[cfg(debug_assertions)]
    passed: u32,
}

impl Points {
    /// Passes another one: at the one that `TIDEGATE_TEST_STOP_AT` names this process is killed, at that
    /// of `TIDEGATE_TEST_SIGNAL_AT` it is told to end.
    ///
    /// # Errors
    /// At the one that `TIDEGATE_TEST_FAIL_AT` names.
    #[cfg(debug_assertions)]
    pub fn pass(&mut self) -> Result<(), Failure> {
        use rustix::process::{Signal, getpid, kill_process};
        self.passed += 1;
        let is_at = |name: &str| {
            let wanted = std::env::var(name).ok();
            wanted.and_then(|number| number.parse().ok()) == Some(self.passed)
        };
        for (name, signal) in
            [("TIDEGATE_TEST_STOP_AT", Signal::KILL), ("TIDEGATE_TEST_SIGNAL_AT", Signal::TERM)]
        {
            if is_at(name) {
                let _ = kill_process(getpid(), signal);
            }
        }
        if is_at("TIDEGATE_TEST_FAIL_AT") {
            let line = format_args!("a test lets it fail at point {}", self.passed);
            return Err(Failure::new(super::Code::Runtime, line));
        }
        Ok(())
    }

    /// Passes another one.
    ///
    /// # Errors
    /// None.
    #[cfg(not(debug_assertions))]
    #[expect(clippy::unnecessary_wraps, reason = "the one for tests may fail")]
    pub fn pass(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}
