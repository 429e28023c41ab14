//! ChaCha20 (RFC 8439 §2.3), thirty-two blocks in a pass.
//!
//! A lane is one block of one packet. The initial state of a set of sixteen lanes lies in memory
//! as sixteen rows, row `w` with word `w` of each lane. Lanes are filled packet after packet: first
//! a chunk's one-time keys (block 0 of each), then its data. When all are full, or there is no more
//! to do, the rounds run.

use std::arch::x86_64::*;
use std::{array, ptr};

use wg_common::protocol::KEY_LEN;

use super::jobs::Packet;
use super::poly1305::{GROUP, OneTimeKeys};
use super::scratch::Line;
use super::{rounds, transpose};

pub(super) const BLOCK_LEN: usize = 64;

/// Lanes of a pass.
pub(super) const LANES: usize = 2 * SET;

/// Lanes of a set: the words of a vector.
const SET: usize = 16;

/// Runs of lanes with one key each up to which blending is cheaper than transposing.
const FEW_RUNS: u32 = 4;

/// Words of the state (RFC 8439 §2.3), and so rows of a set.
const KEY_ROW: usize = 4;
const COUNTER_ROW: usize = 12;
/// Of a nonce's three words the first is always zero here.
const NONCE_ROW: usize = 13;

/// "expand 32-byte k"
const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

/// The id of no key.
const NO_KEY: u8 = u8::MAX;

/// What the passes have in memory; secret, all of it.
pub(super) struct Memory {
    /// The initial state of each set.
    state: [[Line; SET]; 2],
    /// What the rounds made of it: the key stream.
    keystream: [[Line; SET]; 2],
    /// One-time keys of the chunk, by groups.
    one_time: [OneTimeKeys; LANES / GROUP],
}

impl Memory {
    pub const ZERO: Self = Self {
        state: [[Line::ZERO; SET]; 2],
        keystream: [[Line::ZERO; SET]; 2],
        one_time: [OneTimeKeys::ZERO; LANES / GROUP],
    };
}

#[cfg(test)]
impl Memory {
    /// All that is there.
    pub fn lines(&self) -> impl Iterator<Item = Line> {
        let one_time = self.one_time.iter().flat_map(|keys| keys.0);
        self.state.into_iter().chain(self.keystream).flatten().chain(one_time)
    }
}

/// The block that gets the next lane: which packet's, and, from 0 on, which of its data.
#[derive(Clone, Copy)]
struct Cursor {
    packet: usize,
    block: usize,
}

/// One pass after another over the blocks of a chunk of packets.
pub(super) struct Passes<'a> {
    packets: &'a [Packet<'a>],
    memory: &'a mut Memory,
    cursor: Cursor,
    /// Lanes that are filled, from the first on.
    used: usize,
    /// How many of these make one-time keys, from the first on.
    key_lanes: usize,
    /// Where the lane's block lies. Points into some packet also where no byte is wanted.
    data: [*mut u8; LANES + GROUP],
    /// Bit `i`: byte `i` of the lane's block belongs to the packet.
    bytes: [u64; LANES],
    /// Lanes with other `bytes` than all.
    uneven: u32,
    /// For each packet the id of its key: the place of a packet that has the same.
    key_ids: [u8; LANES],
    /// What differs from lane to lane in the initial state.
    inputs: Inputs,
    /// The keys, by `key_ids`, that the rows of each set have.
    held: [__m128i; 2],
}

impl<'a> Passes<'a> {
    /// Begins with the one-time keys: lane `i` makes packet `i`'s.
    ///
    /// # Panics
    /// If there are no packets, or more than lanes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    pub fn new(packets: &'a [Packet<'a>], memory: &'a mut Memory) -> Self {
        assert!(packets.len() <= LANES, "a chunk's one-time keys fit into one pass");
        for rows in &mut memory.state {
            for (row, constant) in rows.iter_mut().zip(CONSTANTS) {
                row.store(_mm512_set1_epi32(constant.cast_signed()));
            }
            rows[NONCE_ROW].store(_mm512_setzero_si512());
        }
        let mut passes = Self {
            packets,
            memory,
            cursor: Cursor { packet: 0, block: 0 },
            used: packets.len(),
            key_lanes: packets.len(),
            data: [packets[0].data(); LANES + GROUP],
            bytes: [u64::MAX; LANES],
            uneven: 0,
            key_ids: [0; LANES],
            inputs: Inputs::none(),
            held: [_mm_set1_epi8(NO_KEY.cast_signed()); 2],
        };
        passes.fill_key_lanes();
        passes
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn fill_key_lanes(&mut self) {
        let mut nonces = [0; LANES];
        let mut before: Option<(&[u8; KEY_LEN], u8)> = None;
        for (lane, packet) in self.packets.iter().enumerate() {
            let id = match before {
                // An address is enough: keys neither move nor change while they are borrowed.
                Some((key, id)) if ptr::eq(key, packet.key) => id,
                _ => lane as u8,
            };
            before = Some((packet.key, id));
            self.key_ids[lane] = id;
            nonces[lane] = packet.counter;
        }
        self.inputs = Inputs::of_first_blocks(&nonces, &self.key_ids);
        self.empty(0, self.key_lanes);
    }

    /// Gives free lanes to the blocks of data of the packets before `end`, in order, as many as there
    /// are of both; of packet `i` only if bit `i` of `wanted` is set. Returns how many lanes are used.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    pub fn fill(&mut self, end: usize, wanted: u32) -> usize {
        let packets = &self.packets[..end];
        // Copies: in registers, whatever else is written.
        let (mut inputs, mut cursor, mut used) = (self.inputs, self.cursor, self.used);
        while used < LANES && cursor.packet < packets.len() {
            let packet = &packets[cursor.packet];
            let is_wanted = (wanted >> cursor.packet) & 1 == 1;
            let left = if is_wanted { packet.block_count() - cursor.block } else { 0 };
            let count = left.min(LANES - used);
            if count > 0 {
                let id = self.key_ids[cursor.packet];
                // Block 0 of the key stream is the one-time key's.
                inputs.set(used, count, id, cursor.block as u32 + 1, packet.counter);
                self.lend_blocks(used, count, packet, cursor.block);
                used += count;
            }
            cursor = if count == left {
                Cursor { packet: cursor.packet + 1, block: 0 }
            } else {
                Cursor { block: cursor.block + count, ..cursor }
            };
        }
        (self.inputs, self.cursor, self.used) = (inputs, cursor, used);
        used
    }

    /// How many packets, from the first on, have had a lane for each block, or were not wanted.
    pub fn done(&self) -> usize {
        self.cursor.packet
    }

    /// How many packets, from the first on, may have a lane for data.
    pub fn begun(&self) -> usize {
        self.cursor.packet + usize::from(self.cursor.block > 0)
    }

    /// Notes where `count` lanes from `lane` on find the blocks of `packet` from `block` on.
    #[inline]
    fn lend_blocks(&mut self, lane: usize, count: usize, packet: &Packet<'_>, block: usize) {
        let data = packet.data().wrapping_add(BLOCK_LEN * block);
        // Eight at a time, be they too many: the lanes behind get theirs later.
        for k in (0..count).step_by(GROUP) {
            let eight = self.data[lane + k..].first_chunk_mut::<GROUP>();
            let eight = eight.expect("there is room for eight behind the last lane");
            *eight = array::from_fn(|i| data.wrapping_add(BLOCK_LEN * (k + i)));
        }
        let left = packet.len() - BLOCK_LEN * block;
        if left < BLOCK_LEN * count {
            let last = lane + count - 1;
            self.bytes[last] = (1 << (left % BLOCK_LEN)) - 1;
            self.uneven |= 1 << last;
        }
    }

    /// Makes lanes that touch no packet of `count` lanes.
    #[inline]
    fn empty(&mut self, lane: usize, count: usize) {
        self.bytes[lane..lane + count].fill(0);
        self.uneven |= lanes_from(lane, count);
    }

    /// Computes the key stream of the lanes; in the first pass, also the one-time keys.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    pub fn run(&mut self) {
        if self.used < LANES {
            self.empty(self.used, LANES - self.used);
            self.inputs.repeat_first_key(self.used);
        }
        self.load_set(0);
        if self.used > SET {
            self.load_set(1);
            rounds::two_sets(&self.memory.state, &mut self.memory.keystream);
        } else {
            let [rows, _] = &self.memory.state;
            rounds::one_set(rows, &mut self.memory.keystream[0]);
        }
        for set in 0..self.key_lanes.div_ceil(SET) {
            self.take_one_time_keys(set);
        }
    }

    /// Brings what the lanes of `set` need into its rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn load_set(&mut self, set: usize) {
        let rows = &mut self.memory.state[set];
        rows[COUNTER_ROW].store(self.inputs.blocks[set]);
        rows[NONCE_ROW + 1].store(self.inputs.nonces[set][0]);
        rows[NONCE_ROW + 2].store(self.inputs.nonces[set][1]);
        let ids = self.inputs.keys_of(set);
        if _mm_cmpneq_epi8_mask(ids, self.held[set]) == 0 {
            return;
        }
        self.held[set] = ids;
        let ends = _mm_cmpneq_epi8_mask(ids, _mm_bsrli_si128::<1>(ids));
        let keys = if ends.count_ones() <= FEW_RUNS {
            self.blended_keys(ids)
        } else {
            let ids = bytes_of(ids);
            transpose::key_rows_of(|lane| {
                let key = self.packets[usize::from(ids[lane])].key;
                // SAFETY: a key has 32 bytes.
                unsafe { _mm256_loadu_si256(key.as_ptr().cast()) }
            })
        };
        for (row, words) in self.memory.state[set][KEY_ROW..].iter_mut().zip(keys) {
            row.store(words);
        }
    }

    /// The key rows of a set with few keys: one key after another goes into all of its lanes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn blended_keys(&self, ids: __m128i) -> [__m512i; KEY_LEN / 4] {
        let mut rows = [_mm512_setzero_si512(); KEY_LEN / 4];
        let bytes = bytes_of(ids);
        let mut left = u16::MAX;
        while left != 0 {
            let id = bytes[left.trailing_zeros() as usize];
            let lanes = _mm_cmpeq_epi8_mask(ids, _mm_set1_epi8(id.cast_signed()));
            let key = self.packets[usize::from(id)].key;
            for (row, word) in rows.iter_mut().zip(key.as_chunks().0) {
                *row = _mm512_mask_set1_epi32(*row, lanes, i32::from_le_bytes(*word));
            }
            left &= !lanes;
        }
        rows
    }

    /// Keeps the first halves of the blocks of `set`, in the form that `poly1305` wants: its lanes
    /// have 64 bits, so a word of a row joins the word of the next.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn take_one_time_keys(&mut self, set: usize) {
        let low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for half in 0..4 {
            let words = self.memory.keystream[set][2 * half].load();
            let next = self.memory.keystream[set][2 * half + 1].load();
            for (group, lanes) in [low, high].into_iter().enumerate() {
                let keys = &mut self.memory.one_time[SET / GROUP * set + group];
                keys.0[half].store(_mm512_permutex2var_epi32(words, lanes, next));
            }
        }
    }

    /// The one-time keys of the packets from `GROUP * group` on. There are any after the first pass.
    pub fn one_time_keys(&self, group: usize) -> &OneTimeKeys {
        &self.memory.one_time[group]
    }

    /// Takes the lanes of packets away whose bit in `wanted` is not set. For the first pass.
    pub fn keep(&mut self, wanted: u32) {
        let mut lane = self.key_lanes;
        for (i, packet) in self.packets.iter().enumerate() {
            let end = self.used.min(lane + packet.block_count());
            if (wanted >> i) & 1 == 0 {
                self.empty(lane, end - lane);
            }
            lane = end;
        }
    }

    /// XORs the key stream into the packets, and frees the lanes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    pub fn apply(&mut self) {
        for set in 0..self.used.div_ceil(SET) {
            if self.key_lanes < SET * (set + 1) {
                self.apply_set(set);
            }
        }
        if self.uneven != 0 {
            self.bytes = [u64::MAX; LANES];
            self.uneven = 0;
        }
        self.used = 0;
        self.key_lanes = 0;
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn apply_set(&mut self, set: usize) {
        let blocks = transpose::blocks_of(&self.memory.keystream[set]);
        let data: &[*mut u8; SET] = self.data[SET * set..].first_chunk().expect("a set's lanes");
        if (self.uneven >> (SET * set)) as u16 == 0 {
            // All reads before the writes: packets often lie a multiple of 2 KiB apart, and a read
            // waits for a write that is at the same place in its page.
            let mut mixed = blocks;
            for lane in 0..SET {
                // SAFETY: `fill` gave the lane a block of a packet, and all 64 bytes are the packet's,
                // or it were `uneven`. The packet lends them.
                let text = unsafe { _mm512_loadu_si512(data[lane].cast()) };
                mixed[lane] = _mm512_xor_si512(blocks[lane], text);
            }
            for lane in 0..SET {
                // SAFETY: the same bytes.
                unsafe { _mm512_storeu_si512(data[lane].cast(), mixed[lane]) };
            }
        } else {
            let bytes: &[u64; SET] = self.bytes[SET * set..].first_chunk().expect("a set's lanes");
            for lane in 0..SET {
                // SAFETY: only bytes in the mask are read and written, and these are the packet's.
                unsafe {
                    let text = _mm512_maskz_loadu_epi8(bytes[lane], data[lane].cast());
                    let text = _mm512_xor_si512(text, blocks[lane]);
                    _mm512_mask_storeu_epi8(data[lane].cast(), bytes[lane], text);
                }
            }
        }
    }
}

/// What differs from lane to lane, for both sets. As vectors, which are only ever stored and loaded
/// whole: a load of a vector that was stored in parts waits for everything stored before.
#[derive(Clone, Copy)]
struct Inputs {
    /// Block counters.
    blocks: [__m512i; 2],
    /// Low and high half of the nonces.
    nonces: [[__m512i; 2]; 2],
    /// The keys, by their ids.
    keys: __m256i,
}

impl Inputs {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn none() -> Self {
        let zero = _mm512_setzero_si512();
        Self { blocks: [zero; 2], nonces: [[zero; 2]; 2], keys: _mm256_setzero_si256() }
    }

    /// Lane `i` makes block 0 of `nonces[i]` with key `keys[i]`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn of_first_blocks(nonces: &[u64; LANES], keys: &[u8; LANES]) -> Self {
        let mut inputs = Self::none();
        for (set, nonces) in nonces.as_chunks::<SET>().0.iter().enumerate() {
            // SAFETY: sixteen nonces are 128 bytes.
            let (first, second) = unsafe {
                let nonces = nonces.as_ptr();
                (_mm512_loadu_si512(nonces.cast()), _mm512_loadu_si512(nonces.add(8).cast()))
            };
            let low = |nonces| _mm512_cvtepi64_epi32(nonces);
            let high = |nonces| _mm512_cvtepi64_epi32(_mm512_srli_epi64::<32>(nonces));
            inputs.nonces[set] = [
                _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low(first)), low(second)),
                _mm512_inserti64x4::<1>(_mm512_castsi256_si512(high(first)), high(second)),
            ];
        }
        // SAFETY: as many bytes as lanes, 32.
        inputs.keys = unsafe { _mm256_loadu_si256(keys.as_ptr().cast()) };
        inputs
    }

    /// Gives `count` lanes from `lane` on to the blocks from `block` on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn set(&mut self, lane: usize, count: usize, key: u8, block: u32, nonce: u64) {
        let order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        let which = lanes_from(lane, count);
        self.keys = _mm256_mask_set1_epi8(self.keys, which, key.cast_signed());
        for set in 0..2 {
            let which = (which >> (SET * set)) as u16;
            if which != 0 {
                let [low, high] = self.nonces[set];
                let first = block.wrapping_add((SET * set) as u32).wrapping_sub(lane as u32);
                let first = _mm512_set1_epi32(first.cast_signed());
                self.blocks[set] = _mm512_mask_add_epi32(self.blocks[set], which, order, first);
                self.nonces[set] = [
                    _mm512_mask_set1_epi32(low, which, nonce as i32),
                    _mm512_mask_set1_epi32(high, which, (nonce >> 32) as i32),
                ];
            }
        }
    }

    /// Makes the lanes from `lane` on use the key of the first lane of their set, if that is in use, so
    /// that no key is fetched for nothing.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn repeat_first_key(&mut self, lane: usize) {
        // In each half of sixteen bytes, its first.
        let first = _mm256_shuffle_epi8(self.keys, _mm256_setzero_si256());
        self.keys = _mm256_mask_mov_epi8(self.keys, u32::MAX << lane, first);
    }

    /// The sixteen keys of `set`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn keys_of(&self, set: usize) -> __m128i {
        if set == 0 {
            _mm256_castsi256_si128(self.keys)
        } else {
            _mm256_extracti128_si256::<1>(self.keys)
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
fn bytes_of(vector: __m128i) -> [u8; SET] {
    let mut bytes = [0; SET];
    // SAFETY: sixteen bytes.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) };
    bytes
}

/// The bits of `count` lanes from `lane` on.
fn lanes_from(lane: usize, count: usize) -> u32 {
    (((1_u64 << count) - 1) << lane) as u32
}

#[cfg(test)]
mod tests {
    use super::super::model;
    use super::super::tests::require_avx512;
    use super::*;

    /// What RFC 8439 §2.3 takes: key, block counter, nonce.
    type Input = ([u8; KEY_LEN], u32, [u8; 12]);

    /// Sixteen or thirty-two blocks with whatever nonces.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
    fn blocks(inputs: &[Input]) -> Vec<[u8; BLOCK_LEN]> {
        let mut memory = Memory::ZERO;
        for (lane, (key, block, nonce)) in inputs.iter().enumerate() {
            let words = |bytes: &[u8]| -> Vec<u32> {
                bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
            };
            let state = [&CONSTANTS[..], &words(key), &[*block], &words(nonce)].concat();
            for (row, word) in memory.state[lane / SET].iter_mut().zip(state) {
                row.0[lane % SET] = word;
            }
        }
        if inputs.len() > SET {
            rounds::two_sets(&memory.state, &mut memory.keystream);
        } else {
            rounds::one_set(&memory.state[0], &mut memory.keystream[0]);
        }
        let block = |vector| {
            let mut line = Line::ZERO;
            line.store(vector);
            array::from_fn(|i| line.0[i / 4].to_le_bytes()[i % 4])
        };
        let sets = memory.keystream.iter().flat_map(|rows| transpose::blocks_of(rows));
        sets.map(block).take(inputs.len()).collect()
    }

    #[test]
    fn rfc_8439_2_3_2_in_every_lane() {
        require_avx512!();
        let key = array::from_fn(|i| i as u8);
        let nonce = [0, 0, 0, 9, 0, 0, 0, 0x4a, 0, 0, 0, 0];
        let expected = [
            0x10, 0xf1, 0xe7, 0xe4, 0xd1, 0x3b, 0x59, 0x15, 0x50, 0x0f, 0xdd, 0x1f, 0xa3, 0x20,
            0x71, 0xc4, 0xc7, 0xd1, 0xf4, 0xc7, 0x33, 0xc0, 0x68, 0x03, 0x04, 0x22, 0xaa, 0x9a,
            0xc3, 0xd4, 0x6c, 0x4e, 0xd2, 0x82, 0x64, 0x46, 0x07, 0x9f, 0xaa, 0x09, 0x14, 0xc2,
            0xd7, 0x05, 0xd9, 0x8b, 0x02, 0xa2, 0xb5, 0x12, 0x9c, 0xd1, 0xde, 0x16, 0x4e, 0xb9,
            0xcb, 0xd0, 0x83, 0xe8, 0xa2, 0x50, 0x3c, 0x4e,
        ];
        for count in [SET, LANES] {
            for lane in 0..count {
                let mut inputs = vec![([0xee; KEY_LEN], 7, [0xdd; 12]); count];
                inputs[lane] = (key, 1, nonce);
                // SAFETY: the CPU has been asked.
                assert_eq!(unsafe { blocks(&inputs) }[lane], expected);
            }
        }
    }

    /// RFC 8439 §2.8.2 has associated data and a nonce as `seal` makes none, so it goes through the parts.
    #[test]
    fn rfc_8439_2_8_2() {
        require_avx512!();
        let key = array::from_fn(|i| 0x80 + i as u8);
        let nonce = [7, 0, 0, 0, 0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47];
        let associated = [0x50, 0x51, 0x52, 0x53, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7];
        let inputs: Vec<_> = (0..16).map(|block| (key, block, nonce)).collect();
        // SAFETY: the CPU has been asked.
        let stream = unsafe { blocks(&inputs) };
        let text = *b"Ladies and Gentlemen of the class of '99: If I could offer you only one \
            tip for the future, sunscreen would be it.";
        let sealed: Vec<_> =
            stream[1..].as_flattened().iter().zip(text).map(|(a, b)| a ^ b).collect();
        assert_eq!(sealed[..8], [0xd3, 0x1a, 0x8d, 0x34, 0x64, 0x8e, 0x60, 0xdb]);
        assert_eq!(sealed[sealed.len() - 4..], [0xc6, 0x4b, 0x61, 0x16]);

        let half = |i: usize| u128::from_le_bytes(array::from_fn(|k| stream[0][16 * i + k]));
        let mut blocks = model::padded_blocks(&associated);
        blocks.extend(model::padded_blocks(&sealed));
        blocks.push((associated.len() as u128 | (sealed.len() as u128) << 64, 1));
        let tag = super::super::poly1305::tests::tag(half(0), half(1), &blocks);
        assert_eq!(
            tag.to_le_bytes(),
            [
                0x1a, 0xe1, 0x0b, 0x59, 0x4f, 0x09, 0xe2, 0x6a, 0x7e, 0x90, 0x2e, 0xcb, 0xd0, 0x60,
                0x06, 0x91,
            ]
        );
    }
}
