//! Turns rows into lanes, and lanes into rows.

use std::arch::x86_64::*;
use std::array;

use super::scratch::Line;

/// 16 × 16 words: from row `w` = word `w` of sixteen blocks to vector `b` = block `b`, all of its
/// words in order.
///
/// First 4 × 4 words inside each quarter of the vectors, then 4 × 4 quarters.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
pub(super) fn blocks_of(rows: &[Line; 16]) -> [__m512i; 16] {
    // Quarter `c` of `words[g][k]`: words 4g..4g+4 of block 4c + k.
    let words: [[__m512i; 4]; 4] = array::from_fn(|g| {
        let [a, b, c, d] = array::from_fn(|k| rows[4 * g + k].load());
        four_by_four([a, b, c, d])
    });
    let mut blocks = [_mm512_setzero_si512(); 16];
    for k in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x44>(words[0][k], words[1][k]);
        let high = _mm512_shuffle_i32x4::<0xee>(words[0][k], words[1][k]);
        let low_end = _mm512_shuffle_i32x4::<0x44>(words[2][k], words[3][k]);
        let high_end = _mm512_shuffle_i32x4::<0xee>(words[2][k], words[3][k]);
        blocks[k] = _mm512_shuffle_i32x4::<0x88>(low, low_end);
        blocks[4 + k] = _mm512_shuffle_i32x4::<0xdd>(low, low_end);
        blocks[8 + k] = _mm512_shuffle_i32x4::<0x88>(high, high_end);
        blocks[12 + k] = _mm512_shuffle_i32x4::<0xdd>(high, high_end);
    }
    blocks
}

/// 16 keys of eight words to eight rows: row `w` has word `w` of each key.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
pub(super) fn key_rows_of(key: impl Fn(usize) -> __m256i) -> [__m512i; 8] {
    // Keys l and l + 8 share a vector.
    let two = |l| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(key(l)), key(l + 8));
    let first = four_by_four([two(0), two(1), two(2), two(3)]);
    let second = four_by_four([two(4), two(5), two(6), two(7)]);
    // Quarters of `first[k]`: word k of keys 0–3, word 4 + k of these, word k of keys 8–11, …
    let front = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0);
    let back = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
    let mut rows = [_mm512_setzero_si512(); 8];
    for k in 0..4 {
        rows[k] = _mm512_permutex2var_epi64(first[k], front, second[k]);
        rows[4 + k] = _mm512_permutex2var_epi64(first[k], back, second[k]);
    }
    rows
}

/// Eight rows of 64 bytes to four pairs: vector `lo` has the low half of block `b` of each row, `hi`
/// the high half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
pub(super) fn halves_of(row: impl Fn(usize) -> __m512i) -> [[__m512i; 2]; 4] {
    let mut low = [_mm512_setzero_si512(); 4];
    let mut high = [_mm512_setzero_si512(); 4];
    for i in 0..4 {
        let (a, b) = (row(2 * i), row(2 * i + 1));
        low[i] = _mm512_unpacklo_epi64(a, b);
        high[i] = _mm512_unpackhi_epi64(a, b);
    }
    let (low, high) = (quarters_of(low), quarters_of(high));
    [[low[0], high[0]], [low[1], high[1]], [low[2], high[2]], [low[3], high[3]]]
}

/// In each quarter on its own, 4 × 4 words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn four_by_four([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (ab, ab_end) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (cd, cd_end) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(ab, cd),
        _mm512_unpackhi_epi64(ab, cd),
        _mm512_unpacklo_epi64(ab_end, cd_end),
        _mm512_unpackhi_epi64(ab_end, cd_end),
    ]
}

/// 4 × 4 quarters.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn quarters_of([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (even, even_end) = (_mm512_shuffle_i64x2::<0x88>(a, b), _mm512_shuffle_i64x2::<0x88>(c, d));
    let (odd, odd_end) = (_mm512_shuffle_i64x2::<0xdd>(a, b), _mm512_shuffle_i64x2::<0xdd>(c, d));
    [
        _mm512_shuffle_i64x2::<0x88>(even, even_end),
        _mm512_shuffle_i64x2::<0x88>(odd, odd_end),
        _mm512_shuffle_i64x2::<0xdd>(even, even_end),
        _mm512_shuffle_i64x2::<0xdd>(odd, odd_end),
    ]
}
