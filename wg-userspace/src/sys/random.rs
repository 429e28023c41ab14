//! Randomness from the kernel.

use core::convert::Infallible;

use rand_core::{TryCryptoRng, TryRng};

/// The kernel's generator (`getrandom`). Has no state: every value is one call.
///
/// # Panics
/// Its methods panic if the kernel has no randomness to give, which it always has from early boot on.
/// There is nothing sensible to do without: keys would be guessable.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rng;

impl TryRng for Rng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_ne_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, dst: &mut [u8]) -> Result<(), Infallible> {
        getrandom::fill(dst).expect("the kernel has randomness after boot");
        Ok(())
    }
}

impl TryCryptoRng for Rng {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rng_is_fit_for_keys_and_does_not_repeat() {
        fn draw(rng: &mut impl rand_core::CryptoRng) -> [u8; 32] {
            let mut bytes = [0; 32];
            rng.fill_bytes(&mut bytes);
            bytes
        }
        assert_ne!(draw(&mut Rng), draw(&mut Rng));
    }
}
