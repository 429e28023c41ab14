//! Poly1305 (RFC 8439 §2.5) of eight packets at once: one packet in each 64-bit lane.
//!
//! Numbers modulo p = 2^130 − 5 are three limbs, of 44, 44 and 42 bits, in three vectors. A product
//! uses `vpmadd52`: it takes the low 52 bits of two factors, and adds the low, or the high, 52 bits
//! of the product to a sum.
//!
//! What is authenticated is the padded ciphertext and a block with its length (§2.8). All packets
//! *end* together, in the last of the group's rows of four blocks: shorter ones begin later, and until
//! then their lanes take in zeros, which leaves zero what was zero.
//!
//! ```text
//!  lane        0           1           2     …    blocks of a lane in row t: 4t, 4t+1, 4t+2, 4t+3
//!  row 0    [· d d d]   [· · · ·]   [d d d d]     · nothing yet
//!  row 1    [d d d d]   [· · d d]   [d d d d]     d data
//!  row 2    [d d d d]   [d d d d]   [d d d d]
//!  row 3    [d d e n]   [d d e n]   [d d e n]     e the end of the data, zeros behind it; n its length
//! ```
//!
//! # Bounds
//! Before and after every step h0 < 2^44, h1 < 2^44 + 2^9, h2 < 2^42. What these bounds rest on stands
//! at each line, and the tests go through the same steps with numbers that check them.

use std::arch::x86_64::*;
use std::array;

use wg_common::protocol::TAG_LEN;

use super::jobs::Packet;
use super::scratch::Line;
use super::transpose;

/// Packets of a group: 64-bit lanes of a vector.
pub(super) const GROUP: usize = 8;

/// Bytes of a block.
const BLOCK_LEN: usize = 16;

/// Blocks of a row.
const ROW: usize = 4;

/// Rows from which on it pays to compute powers of `r`.
const ROWS_FOR_POWERS: usize = 4;

const LOW_44: i64 = (1 << 44) - 1;
const LOW_42: i64 = (1 << 42) - 1;

/// 2^128 in the third limb: the bit behind a block.
const BEHIND: i64 = 1 << (128 - 88);

/// What `r` may have in its low and high half (RFC 8439 §2.5.1).
const CLAMP: [i64; 2] = [0x0fff_fffc_0fff_ffff, 0x0fff_fffc_0fff_fffc];

/// The keys of a group: low and high half of `r`, not yet clamped, then of `s`.
#[derive(Clone, Copy)]
pub(super) struct OneTimeKeys(pub [Line; 4]);

impl OneTimeKeys {
    pub const ZERO: Self = Self([Line::ZERO; 4]);
}

/// What is kept in memory.
pub(super) struct Memory {
    /// `r`, `r²`, `r³`, `r⁴`. Secret.
    powers: [Multiplier; ROW],
    /// For each lane, how many blocks of the group's rows pass before its packet's first one, and
    /// how long the packet is.
    delays: Line,
    lens: Line,
}

impl Memory {
    pub const ZERO: Self =
        Self { powers: [Multiplier::ZERO; ROW], delays: Line::ZERO, lens: Line::ZERO };

    /// Overwrites what is secret.
    pub fn wipe(&mut self) {
        self.powers = [Multiplier::ZERO; ROW];
    }
}

#[cfg(test)]
impl Memory {
    /// All that is secret.
    pub fn secret_lines(&self) -> impl Iterator<Item = Line> {
        self.powers.iter().flat_map(|power| power.limbs.into_iter().chain(power.around))
    }
}

/// Four blocks of eight packets: low and high half of the blocks at each place.
type Row = [[__m512i; 2]; ROW];

/// Limbs of eight numbers.
type Limbs = [__m512i; 3];

/// Eight factors: their limbs, and those that come round as 20 times the second and third.
#[derive(Clone, Copy)]
struct Multiplier {
    limbs: [Line; 3],
    around: [Line; 2],
}

impl Multiplier {
    const ZERO: Self = Self { limbs: [Line::ZERO; 3], around: [Line::ZERO; 2] };

    /// `limbs` within the bounds of a step. Then `around` < 20 · 2^45 < 2^50.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn set(&mut self, limbs: Limbs) {
        for (line, limb) in self.limbs.iter_mut().zip(limbs) {
            line.store(limb);
        }
        for (line, limb) in self.around.iter_mut().zip([limbs[1], limbs[2]]) {
            // 4 · (limb + 4 · limb)
            let five = _mm512_add_epi64(limb, _mm512_slli_epi64::<2>(limb));
            line.store(_mm512_slli_epi64::<2>(five));
        }
    }
}

/// A sum of products that is not reduced: for each limb, parts at its own weight (`low`), and parts at
/// 2^52 times that (`high`).
#[derive(Clone, Copy)]
struct Sum {
    low: Limbs,
    high: Limbs,
}

impl Sum {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn zero() -> Self {
        let zero = [_mm512_setzero_si512(); 3];
        Self { low: zero, high: zero }
    }

    /// Adds `x · y`. Limbs of both must be below 2^52, or bits would be lost.
    ///
    /// A product at 2^132, one limb above the third, comes round as 2^132 = 4 · 2^130 ≡ 20.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn add(self, x: Limbs, y: &Multiplier) -> Self {
        let [y0, y1, y2] = [y.limbs[0].load(), y.limbs[1].load(), y.limbs[2].load()];
        let [y1_around, y2_around] = [y.around[0].load(), y.around[1].load()];
        // The first limb of a running sum is ready last, so it is needed last.
        self.add_to(0, x[1], y2_around)
            .add_to(1, x[1], y0)
            .add_to(2, x[1], y1)
            .add_to(0, x[2], y1_around)
            .add_to(1, x[2], y2_around)
            .add_to(2, x[2], y0)
            .add_to(0, x[0], y0)
            .add_to(1, x[0], y1)
            .add_to(2, x[0], y2)
    }

    /// Adds another sum.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn plus(self, other: Self) -> Self {
        Self { low: plus(self.low, other.low), high: plus(self.high, other.high) }
    }

    /// Adds a product of two limbs to limb `i`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn add_to(mut self, i: usize, x: __m512i, y: __m512i) -> Self {
        self.low[i] = _mm512_madd52lo_epu64(self.low[i], x, y);
        self.high[i] = _mm512_madd52hi_epu64(self.high[i], x, y);
        self
    }

    /// The sum modulo p, of at most four products `x · y` with x0 < 2^45, x1 < 2^45 + 2^9 and
    /// x2 < 2^43, and with a `y` within the bounds of a step.
    ///
    /// Twelve low parts are below 12 · 2^52 < 2^56. The 20-fold limbs are below 2^48.4 (of y1) and
    /// 2^46.4 (of y2), so twelve high parts are below 4 · (2^39.4 + 2^39.4 + 2^37) < 2^43 in the first
    /// limb, 4 · (2^37.1 + 2^37.4 + 2^37.1) < 2^41 in the second, 4 · (2^37.1 + 2^35 + 2^35) < 2^40 in
    /// the third.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn reduced(self) -> Limbs {
        let Self { low, high } = self;
        let (low_44, low_42) = (_mm512_set1_epi64(LOW_44), _mm512_set1_epi64(LOW_42));
        // 2^52 is 2^8 at the next limb. Both sums stay below 2^56.
        let h1 = _mm512_add_epi64(
            _mm512_add_epi64(low[1], _mm512_slli_epi64::<8>(high[0])),
            _mm512_srli_epi64::<44>(low[0]),
        );
        let h2 = _mm512_add_epi64(
            _mm512_add_epi64(low[2], _mm512_slli_epi64::<8>(high[1])),
            _mm512_srli_epi64::<44>(h1),
        );
        // Above the third limb: 2^88 · 2^52 = 2^130 · 2^10 ≡ 5 · 2^10, and 2^88 · 2^42 = 2^130 ≡ 5.
        // Below 2^50 + 2^14.
        let over = _mm512_add_epi64(_mm512_slli_epi64::<10>(high[2]), _mm512_srli_epi64::<42>(h2));
        // Below 2^44 + 5 · (2^50 + 2^14) < 2^53: what goes to the next limb is below 2^9.
        let h0 = _mm512_add_epi64(
            _mm512_add_epi64(_mm512_and_si512(low[0], low_44), over),
            _mm512_slli_epi64::<2>(over),
        );
        [
            _mm512_and_si512(h0, low_44),
            _mm512_add_epi64(_mm512_and_si512(h1, low_44), _mm512_srli_epi64::<44>(h0)),
            _mm512_and_si512(h2, low_42),
        ]
    }
}

/// The rows of a group.
struct Rows {
    count: usize,
    /// Blocks before the first of the longest packet, and of the shortest.
    delay_min: usize,
    delay_max: usize,
    /// Whether all packets are of one length.
    is_even: bool,
    /// For each lane, its packet's first byte, its length, and the blocks before it.
    data: [*const u8; GROUP],
    lens: [usize; GROUP],
    delays: [usize; GROUP],
}

/// The tags of up to eight packets under `keys`; those of lanes without packets mean nothing.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
pub(super) fn tags(
    packets: &[Packet<'_>],
    keys: &OneTimeKeys,
    memory: &mut Memory,
) -> [[u8; TAG_LEN]; GROUP] {
    let rows = lay_out(packets, memory);
    let sum = authenticated(&rows, keys, memory);
    let [mut low, mut high] = [Line::ZERO; 2];
    let tags = plus_s(canonical(sum), keys);
    low.store(tags[0]);
    high.store(tags[1]);
    let (low, high) = (low.quads(), high.quads());
    array::from_fn(|lane| {
        let mut tag = [0; TAG_LEN];
        tag[..8].copy_from_slice(&low[lane].to_le_bytes());
        tag[8..].copy_from_slice(&high[lane].to_le_bytes());
        tag
    })
}

/// The polynomial's value in each lane, before `s` is added.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn authenticated(rows: &Rows, keys: &OneTimeKeys, memory: &mut Memory) -> Limbs {
    memory.powers[0].set(clamped(keys));
    if rows.count < ROWS_FOR_POWERS { one_by_one(rows, memory) } else { by_rows(rows, memory) }
}

/// Block by block: h := (h + block) · r.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn one_by_one(rows: &Rows, memory: &Memory) -> Limbs {
    let mut h = [_mm512_setzero_si512(); 3];
    for t in 0..rows.count {
        let row = if t + 1 < rows.count { row(rows, t) } else { last_row(rows, memory) };
        for (b, halves) in row.into_iter().enumerate() {
            if ROW * t + b >= rows.delay_min {
                let block = limbs_of(halves, behind(rows, ROW * t + b, memory));
                h = Sum::zero().add(plus(h, block), &memory.powers[0]).reduced();
            }
        }
    }
    h
}

/// Row by row: h := (h + block 0) · r⁴ + block 1 · r³ + block 2 · r² + block 3 · r.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn by_rows(rows: &Rows, memory: &mut Memory) -> Limbs {
    set_powers(memory);
    let mut h = [_mm512_setzero_si512(); 3];
    let behind = |t| array::from_fn(|b| behind(rows, ROW * t + b, memory));
    let last = rows.count - 1;
    let even = rows.delay_max.div_ceil(ROW).min(last);
    for t in 0..even {
        h = absorbed(h, row(rows, t), behind(t), memory);
    }
    for t in even..last {
        h = absorbed(h, even_row(rows, t), [_mm512_set1_epi64(BEHIND); ROW], memory);
    }
    absorbed(h, last_row(rows, memory), behind(last), memory)
}

/// From `powers[0]` the others.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn set_powers(memory: &mut Memory) {
    let r: Limbs = array::from_fn(|i| memory.powers[0].limbs[i].load());
    let square = Sum::zero().add(r, &memory.powers[0]).reduced();
    memory.powers[1].set(square);
    let cube = Sum::zero().add(square, &memory.powers[0]).reduced();
    memory.powers[2].set(cube);
    let fourth = Sum::zero().add(square, &memory.powers[1]).reduced();
    memory.powers[3].set(fourth);
}

/// A row more. Those blocks come first whose products do not wait for `h`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn absorbed(h: Limbs, row: Row, behind: [__m512i; ROW], memory: &Memory) -> Limbs {
    let [r, square, cube, fourth] = &memory.powers;
    let block = |b: usize| limbs_of(row[b], behind[b]);
    // Two sums, so that half as many products wait for each other.
    let first = Sum::zero().add(block(1), cube).add(block(2), square);
    let second = Sum::zero().add(block(3), r).add(plus(h, block(0)), fourth);
    first.plus(second).reduced()
}

/// Lays the blocks of a group's packets out in rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn lay_out(packets: &[Packet<'_>], memory: &mut Memory) -> Rows {
    // Lanes without a packet do again what the first does: so no row waits for them.
    let packet = |lane| packets.get(lane).unwrap_or(&packets[0]);
    let data = array::from_fn(|lane| packet(lane).data().cast_const());
    let lens: [usize; GROUP] = array::from_fn(|lane| packet(lane).len());
    // One block for the length.
    let block_count = |len: usize| len.div_ceil(BLOCK_LEN) + 1;
    let (shortest, longest) =
        lens.iter().fold((usize::MAX, 0), |(min, max), len| (min.min(*len), max.max(*len)));
    let count = block_count(longest).div_ceil(ROW);
    let delay = |len| ROW * count - block_count(len);
    let is_even = shortest == longest;
    let delays = if is_even { [delay(longest); GROUP] } else { lens.map(delay) };
    memory.delays.set_quads(delays.map(|delay| delay as u64));
    memory.lens.set_quads(lens.map(|len| len as u64));
    let (delay_min, delay_max) = (delay(longest), delay(shortest));
    Rows { count, delay_min, delay_max, is_even, data, lens, delays }
}

/// How many bytes behind a packet's first one block `block` of the rows begins; before it, as a
/// negative number would.
fn offset(block: usize, delay: usize) -> usize {
    BLOCK_LEN.wrapping_mul(block.wrapping_sub(delay))
}

/// Row `t`, if it is not the last.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn row(rows: &Rows, t: usize) -> Row {
    debug_assert!(t + 1 < rows.count);
    // Which halves there are, and where.
    let place = |lane: usize| {
        // Of a packet's first row, and of all before it, blocks are missing. Where there is nothing to
        // be read, it does not matter where.
        let missing = rows.delays[lane].saturating_sub(ROW * t).min(ROW);
        let start = if missing < ROW { offset(ROW * t, rows.delays[lane]) } else { 0 };
        ((0xff_u32 << (2 * missing)) as u8, start)
    };
    let first = place(0);
    transpose::halves_of(|lane| {
        let (halves, start) = if rows.is_even { first } else { place(lane) };
        let data = rows.data[lane].wrapping_add(start);
        // SAFETY: only halves in the mask are read. They are of blocks of data: from the packet's
        // first on, and not of its last four, which make the last row.
        unsafe { _mm512_maskz_loadu_epi64(halves, data.cast()) }
    })
}

/// Row `t`, if it is not the last, and every packet has begun before.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn even_row(rows: &Rows, t: usize) -> Row {
    debug_assert!(rows.delay_max <= ROW * t && t + 1 < rows.count);
    transpose::halves_of(|lane| {
        let start = offset(ROW * t, rows.delays[lane]);
        // SAFETY: four blocks of the packet's data: no lane's last row, nor before its first block.
        unsafe { _mm512_loadu_si512(rows.data[lane].wrapping_add(start).cast()) }
    })
}

/// The last row: what is left of the data, less than four blocks, and then the length.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn last_row(rows: &Rows, memory: &Memory) -> Row {
    let before = ROW * (rows.count - 1);
    // Which bytes there are, and where.
    let place = |lane: usize| {
        // As above; such a packet has this row alone.
        let missing = BLOCK_LEN * rows.delays[lane].saturating_sub(before);
        let start = offset(before, rows.delays[lane]);
        let end = rows.lens[lane].wrapping_sub(start);
        (_bzhi_u64(u64::MAX, end as u32) & (u64::MAX << missing), start)
    };
    let first = place(0);
    let mut row = transpose::halves_of(|lane| {
        let (bytes, start) = if rows.is_even { first } else { place(lane) };
        // SAFETY: only bytes in the mask are read. They are the packet's: from its first byte, which
        // is byte `missing` of the row, to its last, which is before `end`.
        unsafe { _mm512_maskz_loadu_epi8(bytes, rows.data[lane].wrapping_add(start).cast()) }
    });
    // No associated data.
    row[ROW - 1] = [_mm512_setzero_si512(), memory.lens.load()];
    row
}

/// The bit behind block `block` of a group's rows, in lanes in which there is one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn behind(rows: &Rows, block: usize, memory: &Memory) -> __m512i {
    if rows.delay_max <= block {
        return _mm512_set1_epi64(BEHIND);
    }
    let begun = _mm512_cmple_epu64_mask(memory.delays.load(), _mm512_set1_epi64(block as i64));
    _mm512_maskz_set1_epi64(begun, BEHIND)
}

/// A block's limbs. They are below 2^44, 2^44 and 2^41.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn limbs_of([low, high]: [__m512i; 2], behind: __m512i) -> Limbs {
    let low_44 = _mm512_set1_epi64(LOW_44);
    [
        _mm512_and_si512(low, low_44),
        _mm512_and_si512(_mm512_shrdi_epi64::<44>(low, high), low_44),
        _mm512_or_si512(_mm512_srli_epi64::<24>(high), behind),
    ]
}

/// Adds limb by limb. A number within the bounds of a step and a block make limbs below 2^45,
/// 2^45 + 2^9 and 2^43.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn plus(h: Limbs, block: Limbs) -> Limbs {
    array::from_fn(|i| _mm512_add_epi64(h[i], block[i]))
}

/// The limbs of `r`, with the bits cleared that must be (RFC 8439 §2.5.1).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn clamped(keys: &OneTimeKeys) -> Limbs {
    let r: [__m512i; 2] =
        array::from_fn(|i| _mm512_and_si512(keys.0[i].load(), _mm512_set1_epi64(CLAMP[i])));
    limbs_of(r, _mm512_setzero_si512())
}

/// The one number below p that is congruent: low 64 bits, and the 64 above (two more are cut off:
/// only what is below 2^128 is asked for).
///
/// Within the bounds of a step the number is below 2^130 + 2^54, so one carry from limb to limb and
/// round once leaves less than 2^130; then p is subtracted at most once.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn canonical([h0, h1, h2]: Limbs) -> [__m512i; 2] {
    let (low_44, low_42) = (_mm512_set1_epi64(LOW_44), _mm512_set1_epi64(LOW_42));
    let h2 = _mm512_add_epi64(h2, _mm512_srli_epi64::<44>(h1));
    let h1 = _mm512_and_si512(h1, low_44);
    // 0 or 1. If it is 1, h2 becomes 0 and h1 is below 2^9: what h0 passes on goes no further.
    let over = _mm512_srli_epi64::<42>(h2);
    let h2 = _mm512_and_si512(h2, low_42);
    let h0 = _mm512_add_epi64(h0, _mm512_add_epi64(over, _mm512_slli_epi64::<2>(over)));
    let h1 = _mm512_add_epi64(h1, _mm512_srli_epi64::<44>(h0));
    let h0 = _mm512_and_si512(h0, low_44);

    // h + 5 reaches 2^130 if h is not below p; without that bit it is then h − p.
    let g0 = _mm512_add_epi64(h0, _mm512_set1_epi64(5));
    let g1 = _mm512_add_epi64(h1, _mm512_srli_epi64::<44>(g0));
    let g2 = _mm512_add_epi64(h2, _mm512_srli_epi64::<44>(g1));
    let reached = _mm512_cmpgt_epu64_mask(g2, low_42);
    let h0 = _mm512_mask_mov_epi64(h0, reached, _mm512_and_si512(g0, low_44));
    let h1 = _mm512_mask_mov_epi64(h1, reached, _mm512_and_si512(g1, low_44));
    let h2 = _mm512_mask_mov_epi64(h2, reached, g2);
    [
        _mm512_or_si512(h0, _mm512_slli_epi64::<44>(h1)),
        _mm512_or_si512(_mm512_srli_epi64::<20>(h1), _mm512_slli_epi64::<24>(h2)),
    ]
}

/// Adds `s` modulo 2^128.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn plus_s([low, high]: [__m512i; 2], keys: &OneTimeKeys) -> [__m512i; 2] {
    let (s_low, s_high) = (keys.0[2].load(), keys.0[3].load());
    let low = _mm512_add_epi64(low, s_low);
    let high = _mm512_add_epi64(high, s_high);
    let carry = _mm512_cmplt_epu64_mask(low, s_low);
    [low, _mm512_mask_add_epi64(high, carry, high, _mm512_set1_epi64(1))]
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::super::Avx512Aead;
    use super::super::model::{self, Lane};
    use super::super::tests::require_avx512;
    use super::*;

    /// The low half of eight numbers, and the high half.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn vectors(numbers: [u128; GROUP]) -> [__m512i; 2] {
        let (mut low, mut high) = (Line::ZERO, Line::ZERO);
        for (lane, number) in numbers.into_iter().enumerate() {
            low.set_quad(lane, number as u64);
            high.set_quad(lane, (number >> 64) as u64);
        }
        [low.load(), high.load()]
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn numbers([low, high]: [__m512i; 2]) -> [u128; GROUP] {
        let (mut lows, mut highs) = (Line::ZERO, Line::ZERO);
        lows.store(low);
        highs.store(high);
        let (lows, highs) = (lows.quads(), highs.quads());
        array::from_fn(|lane| u128::from(lows[lane]) | u128::from(highs[lane]) << 64)
    }

    /// Keys, and messages of equally many blocks: for each block its 128 bits, and what is behind.
    #[derive(Clone, Debug)]
    struct Case {
        r: [u128; GROUP],
        s: [u128; GROUP],
        blocks: Vec<([u128; GROUP], [u128; GROUP])>,
    }

    impl Case {
        /// The same in all lanes.
        fn uniform(r: u128, s: u128, blocks: &[(u128, u128)]) -> Self {
            let blocks = blocks.iter().map(|&(b, behind)| ([b; GROUP], [behind; GROUP])).collect();
            Self { r: [r; GROUP], s: [s; GROUP], blocks }
        }

        fn by_model(&self) -> [u128; GROUP] {
            array::from_fn(|lane| {
                let blocks: Vec<_> =
                    self.blocks.iter().map(|(b, behind)| (b[lane], behind[lane])).collect();
                model::poly1305(self.r[lane], self.s[lane], &blocks)
            })
        }

        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
        fn keys(&self) -> OneTimeKeys {
            let mut keys = OneTimeKeys::ZERO;
            let ([r, r_high], [s, s_high]) = (vectors(self.r), vectors(self.s));
            for (line, vector) in keys.0.iter_mut().zip([r, r_high, s, s_high]) {
                line.store(vector);
            }
            keys
        }

        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
        fn behind(&self, block: usize) -> __m512i {
            let [ones, _] = vectors(self.blocks[block].1);
            _mm512_slli_epi64::<40>(ones)
        }

        /// By single blocks.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
        fn by_blocks(&self) -> [u128; GROUP] {
            let keys = self.keys();
            let mut r = Multiplier::ZERO;
            r.set(clamped(&keys));
            let mut h = [_mm512_setzero_si512(); 3];
            for (i, (block, _)) in self.blocks.iter().enumerate() {
                let block = limbs_of(vectors(*block), self.behind(i));
                h = Sum::zero().add(plus(h, block), &r).reduced();
            }
            numbers(plus_s(canonical(h), &keys))
        }

        /// By rows; nothing, as often as needed, before the blocks.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
        fn by_rows(mut self) -> [u128; GROUP] {
            while !self.blocks.len().is_multiple_of(ROW) {
                self.blocks.insert(0, ([0; GROUP], [0; GROUP]));
            }
            let (keys, mut memory) = (self.keys(), Memory::ZERO);
            memory.powers[0].set(clamped(&keys));
            set_powers(&mut memory);
            let mut h = [_mm512_setzero_si512(); 3];
            for t in 0..self.blocks.len() / ROW {
                let row = array::from_fn(|b| vectors(self.blocks[ROW * t + b].0));
                let behind = array::from_fn(|b| self.behind(ROW * t + b));
                h = absorbed(h, row, behind, &memory);
            }
            numbers(plus_s(canonical(h), &keys))
        }

        /// Whether both ways yield what the model does.
        fn check(&self) {
            // SAFETY: whoever calls has asked for the features.
            let (by_blocks, by_rows) = unsafe { (self.by_blocks(), self.clone().by_rows()) };
            assert_eq!(by_blocks, self.by_model(), "by blocks: {self:x?}");
            assert_eq!(by_rows, self.by_model(), "by rows: {self:x?}");
        }
    }

    /// The tag of blocks, by the vectors; no other than the model's.
    pub fn tag(r: u128, s: u128, blocks: &[(u128, u128)]) -> u128 {
        let case = Case::uniform(r, s, blocks);
        case.check();
        case.by_model()[0]
    }

    #[test]
    fn rfc_8439_2_5_2() {
        require_avx512!();
        // The RFC's bytes, read little-endian.
        let r = 0xa806_d542_fe52_447f_336d_5557_78be_d685_u128;
        let s = 0x1bf5_4941_aff6_bf4a_fdb2_0dfb_8a80_0301_u128;
        let blocks = model::blocks_of_message(b"Cryptographic Forum Research Group");
        assert_eq!(tag(r, s, &blocks), 0xa927_010c_af8b_2bc2_c636_5130_c11d_06a8);
    }

    /// Sums around p, 2p, 2^128 and 2^130, which a reduction may leave too large, or too small.
    #[test]
    fn sums_around_the_modulus_are_reduced_once_and_for_all() {
        require_avx512!();
        // r = 1, so the polynomial is the sum of the blocks. With two blocks of 2^128 each behind them
        // it is 2^129 + what is in them, with four 2^130, and so on.
        for count in 1..=9 {
            for near in [0, 5_u128.wrapping_neg(), 1 << 64, 1 << 44, 1 << 88, 1 << 127] {
                for off in -9_i128..=9 {
                    let last = near.wrapping_add_signed(off);
                    for other in [0, u128::MAX] {
                        let mut blocks = vec![(other, 1); count];
                        blocks.push((last, 1));
                        Case::uniform(1, 0, &blocks).check();
                        Case::uniform(1, u128::MAX, &blocks).check();
                    }
                }
            }
        }
    }

    #[test]
    fn extremes_of_keys_and_blocks() {
        require_avx512!();
        let extremes = [0, 1, 4, u128::MAX, u128::MAX - 4, 1 << 124, (1 << 88) - 4, (1 << 44) - 1];
        for r in extremes {
            for block in extremes {
                for count in [1, 2, 3, 4, 5, 8, 40] {
                    Case::uniform(r, block, &vec![(block, 1); count]).check();
                }
            }
        }
    }

    fn number() -> impl Strategy<Value = u128> {
        prop_oneof![
            any::<u128>(),
            Just(0),
            Just(u128::MAX),
            (0_u32..128).prop_map(|bit| 1 << bit),
            (0_u32..128).prop_map(|bit| u128::MAX << bit),
            (0_u32..128).prop_map(|bit| u128::MAX >> bit),
        ]
    }

    /// Limbs below a bound each, often just below.
    fn limbs(bounds: [u64; 3]) -> impl Strategy<Value = Lane> {
        bounds.map(|bound| prop_oneof![0..bound, Just(bound - 1), Just(0)]).prop_map(Lane)
    }

    proptest! {
        #[test]
        fn keys_and_blocks_differ_between_lanes(
            r in prop::array::uniform8(number()),
            s in prop::array::uniform8(number()),
            blocks in prop::collection::vec(
                (prop::array::uniform8(number()), prop::array::uniform8(0_u128..2)),
                0..14,
            ),
        ) {
            if Avx512Aead::detect().is_some() {
                Case { r, s, blocks }.check();
            }
        }

        /// Every bound that the comments claim, at any factors within those of a step; and the vectors
        /// do the same.
        #[test]
        fn four_products_stay_within_the_bounds(
            sums in prop::array::uniform4(limbs([1 << 44, (1 << 44) + (1 << 9), 1 << 42])),
            blocks in prop::array::uniform4(limbs([1 << 44, 1 << 44, 1 << 41])),
            factors in prop::array::uniform4(limbs([1 << 44, (1 << 44) + (1 << 9), 1 << 42])),
        ) {
            let products: Vec<_> =
                (0..4).map(|i| (sums[i].plus(blocks[i]), factors[i])).collect();
            let reduced = Lane::sum_of_products(&products);
            let expected = model::sum(products.iter().map(|&(x, y)| Lane::product(x, y)));
            prop_assert_eq!(reduced.value(), expected);
            if Avx512Aead::detect().is_some() {
                // SAFETY: the CPU has the features.
                let (limbs, canonical) = unsafe { in_vectors(&products) };
                prop_assert_eq!(limbs, reduced);
                prop_assert_eq!(canonical, expected.1);
            }
        }
    }

    /// The sum of the products in all lanes, and the low 128 bits of its canonical form.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn in_vectors(products: &[(Lane, Lane)]) -> (Lane, u128) {
        let vectors = |lane: Lane| lane.0.map(|limb| _mm512_set1_epi64(limb as i64));
        let mut sum = Sum::zero();
        for (x, y) in products {
            let mut factor = Multiplier::ZERO;
            factor.set(vectors(*y));
            sum = sum.add(vectors(*x), &factor);
        }
        let reduced = sum.reduced();
        let limbs = reduced.map(|limb| {
            let mut line = Line::ZERO;
            line.store(limb);
            line.quads()[3]
        });
        (Lane(limbs), numbers(canonical(reduced))[5])
    }

    #[test]
    fn the_greatest_factors_stay_within_the_bounds() {
        let block = Lane([(1 << 44) - 1, (1 << 44) - 1, (1 << 41) - 1]);
        let products = [(Lane::GREATEST.plus(block), Lane::GREATEST); 4];
        let reduced = Lane::sum_of_products(&products);
        assert_eq!(reduced.value(), model::sum(products.map(|(x, y)| Lane::product(x, y))));
    }
}
