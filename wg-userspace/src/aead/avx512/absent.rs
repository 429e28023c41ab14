//! The back end for CPUs with AVX-512, where there are none.

use super::{BatchAead, Job};

/// The back end for CPUs with AVX-512. On this architecture there is no value of it.
#[derive(Clone, Copy, Debug)]
pub struct Avx512Aead {
    never: Never,
}

#[derive(Clone, Copy, Debug)]
enum Never {}

impl Avx512Aead {
    /// None.
    pub fn detect() -> Option<Self> {
        None
    }
}

impl BatchAead for Avx512Aead {
    fn name(&self) -> &'static str {
        match self.never {}
    }

    fn seal(&self, _: &mut [Job<'_>]) {
        match self.never {}
    }

    fn open(&self, _: &mut [Job<'_>]) {
        match self.never {}
    }
}
