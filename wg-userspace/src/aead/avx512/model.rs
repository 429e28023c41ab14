//! Poly1305 and ChaCha20 as RFC 8439 writes them down, slowly; and the vectors' arithmetic with every
//! bound checked.

use std::array;

const LOW_52: u128 = (1 << 52) - 1;

/// A number below 2^256, as two halves: enough for what is less than 2p, doubled or added.
type Wide = (u128, u128);

/// p = 2^130 − 5.
const P: Wide = (3, u128::MAX - 4);

fn add(a: Wide, b: Wide) -> Wide {
    let (low, carry) = a.1.overflowing_add(b.1);
    (a.0 + b.0 + u128::from(carry), low)
}

/// `a` less p, as often as that goes.
fn modulo_p(mut a: Wide) -> Wide {
    while a >= P {
        let (low, borrow) = a.1.overflowing_sub(P.1);
        a = (a.0 - P.0 - u128::from(borrow), low);
    }
    a
}

/// `a · b` modulo p, by doubling and adding.
fn times(a: Wide, b: Wide) -> Wide {
    let mut product = (0, 0);
    for bit in (0..131).rev() {
        product = modulo_p(add(product, product));
        let half = if bit < 128 { b.1 >> bit } else { b.0 >> (bit - 128) };
        if half & 1 == 1 {
            product = modulo_p(add(product, a));
        }
    }
    product
}

/// Poly1305 over blocks, each with what stands behind its 128 bits: 1, or 0 if that is in them
/// already.
pub(super) fn poly1305(r: u128, s: u128, blocks: &[(u128, u128)]) -> u128 {
    let r = r & 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff;
    let mut h = (0, 0);
    for &(block, behind) in blocks {
        h = times(modulo_p(add(h, (behind, block))), (0, r));
    }
    h.1.wrapping_add(s)
}

/// A message's blocks, as Poly1305 alone takes it: a last short block has its 1 right behind it.
pub(super) fn blocks_of_message(message: &[u8]) -> Vec<(u128, u128)> {
    let block = |chunk: &[u8]| {
        let mut bytes = [0; 32];
        bytes[..chunk.len()].copy_from_slice(chunk);
        bytes[chunk.len()] = 1;
        let half = |i: usize| u128::from_le_bytes(array::from_fn(|k| bytes[16 * i + k]));
        (half(0), half(1))
    };
    message.chunks(16).map(block).collect()
}

/// A message's blocks, padded with zeros to whole ones (RFC 8439 §2.8.1).
pub(super) fn padded_blocks(message: &[u8]) -> Vec<(u128, u128)> {
    let whole = message.len().next_multiple_of(16);
    let mut padded = message.to_vec();
    padded.resize(whole, 0);
    blocks_of_message(&padded)
}

/// One lane of the vectors' arithmetic. All numbers are wider than theirs, and wherever theirs would
/// lose a bit, this panics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Lane(pub [u64; 3]);

impl Lane {
    /// Limbs that are just within the bounds that hold before and after every step.
    pub const GREATEST: Self = Self([(1 << 44) - 1, (1 << 44) + (1 << 9) - 1, (1 << 42) - 1]);

    /// The sum of up to four products, reduced as the vectors do it.
    pub fn sum_of_products(products: &[(Self, Self)]) -> Self {
        assert!(products.len() <= 4);
        let (mut low, mut high) = ([0_u128; 3], [0_u128; 3]);
        for (x, y) in products {
            let [x0, x1, x2] = x.0.map(fits_52);
            let [y0, y1, y2] = y.0.map(fits_52);
            let [y1_around, y2_around] = [20 * y1, 20 * y2];
            assert!(y1_around <= LOW_52 && y2_around <= LOW_52);
            let terms = [
                [(x1, y2_around), (x2, y1_around), (x0, y0)],
                [(x1, y0), (x2, y2_around), (x0, y1)],
                [(x1, y1), (x2, y0), (x0, y2)],
            ];
            for (limb, terms) in terms.into_iter().enumerate() {
                for (x, y) in terms {
                    low[limb] += (x * y) & LOW_52;
                    high[limb] += (x * y) >> 52;
                }
            }
        }
        assert!(low.iter().all(|sum| *sum < 1 << 56));
        assert!(high[0] < 1 << 43 && high[1] < 1 << 41 && high[2] < 1 << 40);
        let h1 = low[1] + (high[0] << 8) + (low[0] >> 44);
        let h2 = low[2] + (high[1] << 8) + (h1 >> 44);
        assert!(h1 < 1 << 56 && h2 < 1 << 56);
        let over = (high[2] << 10) + (h2 >> 42);
        assert!(over < (1 << 50) + (1 << 14));
        let h0 = (low[0] % (1 << 44)) + 5 * over;
        assert!(h0 < 1 << 53);
        let limbs = [h0 % (1 << 44), (h1 % (1 << 44)) + (h0 >> 44), h2 % (1 << 42)];
        let limbs = Self(limbs.map(|limb| u64::try_from(limb).unwrap()));
        for (limb, greatest) in limbs.0.iter().zip(Self::GREATEST.0) {
            assert!(*limb <= greatest);
        }
        limbs
    }

    /// With a block's limbs added.
    pub fn plus(self, block: Self) -> Self {
        Self(array::from_fn(|i| self.0[i] + block.0[i]))
    }

    /// The number modulo p.
    pub fn value(self) -> Wide {
        let [l0, l1, l2] = self.0.map(u128::from);
        let value = add((l1 >> 84, l1 << 44), (l2 >> 40, l2 << 88));
        modulo_p(add((0, l0), value))
    }

    /// The product's value, by the slow way.
    pub fn product(x: Self, y: Self) -> Wide {
        times(x.value(), y.value())
    }
}

/// The sum of values modulo p.
pub(super) fn sum(values: impl IntoIterator<Item = Wide>) -> Wide {
    values.into_iter().fold((0, 0), |sum, value| modulo_p(add(sum, value)))
}

fn fits_52(limb: u64) -> u128 {
    assert!(limb < 1 << 52, "a multiplication would lose bits");
    u128::from(limb)
}
