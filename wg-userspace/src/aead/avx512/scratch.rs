//! The memory of a call: one per thread, so that a call allocates nothing and pays for no
//! initialisation. What is secret in it is wiped when the call ends.

use std::arch::asm;
use std::arch::x86_64::*;
use std::array;
use std::cell::RefCell;

use super::chacha;
use super::poly1305;

thread_local! {
    /// Between calls zeros, but for lengths.
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::ZERO) };
}

/// 64 bytes, as the vector registers take them.
#[derive(Clone, Copy)]
#[cfg_attr(test, derive(Debug, PartialEq))]
#[repr(C, align(64))]
pub(super) struct Line(pub [u32; 16]);

impl Line {
    pub const ZERO: Self = Self([0; 16]);

    /// The line as a vector.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    pub fn load(&self) -> __m512i {
        // SAFETY: 64 bytes that may be read, aligned by the type.
        unsafe { _mm512_load_si512(self.0.as_ptr().cast()) }
    }

    /// Writes the whole line.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    pub fn store(&mut self, vector: __m512i) {
        // SAFETY: 64 bytes that may be written, aligned by the type.
        unsafe { _mm512_store_si512(self.0.as_mut_ptr().cast(), vector) }
    }

    /// Makes words `2i` and `2i + 1` one number.
    pub fn set_quad(&mut self, i: usize, number: u64) {
        self.0[2 * i] = number as u32;
        self.0[2 * i + 1] = (number >> 32) as u32;
    }

    /// Makes words `2i` and `2i + 1` one number, for each `i`.
    pub fn set_quads(&mut self, numbers: [u64; 8]) {
        for (i, number) in numbers.into_iter().enumerate() {
            self.set_quad(i, number);
        }
    }

    /// Words `2i` and `2i + 1` as one number, for each `i`.
    pub fn quads(&self) -> [u64; 8] {
        array::from_fn(|i| u64::from(self.0[2 * i]) | u64::from(self.0[2 * i + 1]) << 32)
    }
}

/// What both halves of the algorithm keep in memory.
pub(super) struct Scratch {
    pub chacha: chacha::Memory,
    pub poly1305: poly1305::Memory,
}

impl Scratch {
    const ZERO: Self = Self { chacha: chacha::Memory::ZERO, poly1305: poly1305::Memory::ZERO };

    /// Lends the thread's scratch to `work`, and wipes it afterwards, also if `work` panics.
    ///
    /// # Panics
    /// If `work` calls it again.
    pub fn lend(work: impl FnOnce(&mut Self)) {
        SCRATCH.with_borrow_mut(|scratch| {
            let scratch = Wiped(scratch);
            work(&mut *scratch.0);
        });
    }
}

#[cfg(test)]
impl Scratch {
    /// Whether everything that may be secret is zero.
    pub fn has_no_secrets(&self) -> bool {
        self.chacha.lines().chain(self.poly1305.secret_lines()).all(|line| line == Line::ZERO)
    }
}

/// Wipes the scratch when dropped.
struct Wiped<'a>(&'a mut Scratch);

impl Drop for Wiped<'_> {
    fn drop(&mut self) {
        self.0.chacha = chacha::Memory::ZERO;
        self.0.poly1305.wipe();
        let wiped: *const Scratch = self.0;
        // SAFETY: does nothing. But as far as the compiler knows it reads what `wiped` points at, so
        // that the writes above must have been done.
        unsafe { asm!("/* {0} */", in(reg) wiped, options(nostack, preserves_flags, readonly)) };
    }
}
