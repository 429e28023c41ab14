//! How much memory requests may take while they are read.
//!
//! A request is whole before anything is done, so that it is held in memory however long it is. Each
//! may have [`REQUEST_MAX`], and all of them together no more than that: who comes last is refused. A
//! client always has [`SMALL_REQUEST_MAX`], so that those who send huge requests, or stop in the middle
//! of them, keep nobody from an ordinary one.

use std::cell::Cell;

use super::SetProblem;

/// Most bytes of one request beyond [`SMALL_REQUEST_MAX`], and of all together, as they are counted:
/// twice a million peers with three allowed IPs each. What is allocated may be twice as much, since
/// what grows doubles.
pub const REQUEST_MAX: usize = 512 << 20;
/// Bytes that need not be asked for: peers by the thousand.
pub const SMALL_REQUEST_MAX: usize = 1 << 20;
/// Bytes are asked for in such parts.
const STEP: usize = 1 << 20;

/// The memory of all requests.
#[derive(Debug)]
pub struct Memory {
    lent: Cell<usize>,
    len_max: usize,
}

impl Default for Memory {
    fn default() -> Self {
        Self::of(REQUEST_MAX)
    }
}

/// What one request has of it, until it is dropped.
#[derive(Debug)]
pub struct Loan<'a> {
    memory: &'a Memory,
    len: usize,
}

impl Memory {
    /// So many bytes for one request or for all together, beyond what each has anyway.
    pub const fn of(len_max: usize) -> Self {
        Self { lent: Cell::new(0), len_max }
    }

    /// Bytes that requests have now.
    #[cfg(test)]
    pub fn lent(&self) -> usize {
        self.lent.get()
    }

    /// The memory of a small request.
    pub const fn loan(&self) -> Loan<'_> {
        Loan { memory: self, len: 0 }
    }
}

impl Loan<'_> {
    /// Makes sure that there is room for a request of `len` bytes.
    ///
    /// # Errors
    /// If there is not, or will never be.
    pub fn grow_to(&mut self, len: usize) -> Result<(), SetProblem> {
        let len = len.saturating_sub(SMALL_REQUEST_MAX).next_multiple_of(STEP);
        if len <= self.len {
            return Ok(());
        }
        let lent = self.memory.lent.get() + (len - self.len);
        if len > self.memory.len_max {
            return Err(SetProblem::TooLarge);
        }
        if lent > self.memory.len_max {
            return Err(SetProblem::NoMemory);
        }
        self.memory.lent.set(lent);
        self.len = len;
        Ok(())
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        self.memory.lent.set(self.memory.lent.get() - self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_together_have_what_one_may_have_and_small_ones_always_fit() {
        let memory = Memory::default();
        let mut huge = memory.loan();
        assert_eq!(huge.grow_to(REQUEST_MAX + SMALL_REQUEST_MAX), Ok(()));
        assert_eq!(huge.grow_to(REQUEST_MAX + SMALL_REQUEST_MAX + 1), Err(SetProblem::TooLarge));
        let mut second = memory.loan();
        assert_eq!(second.grow_to(SMALL_REQUEST_MAX), Ok(()));
        assert_eq!(second.grow_to(SMALL_REQUEST_MAX + 1), Err(SetProblem::NoMemory));
        drop(huge);
        assert_eq!(second.grow_to(REQUEST_MAX), Ok(()));
        drop(second);
        assert_eq!(memory.lent(), 0);
    }
}
