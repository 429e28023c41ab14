//! ChaCha20-Poly1305 as RFC 8439 describes it, with any nonce and associated data: slow, and plain
//! enough to be compared with the RFC line by line.

use wg_common::protocol::{KEY_LEN, TAG_LEN};

pub const NONCE_LEN: usize = 12;
pub type Nonce = [u8; NONCE_LEN];

/// Section 2.1.
fn quarter_round(state: &mut [u32; 16], [a, b, c, d]: [usize; 4]) {
    for (to, from, mixed, by) in [(a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)] {
        state[to] = state[to].wrapping_add(state[from]);
        state[mixed] = (state[mixed] ^ state[to]).rotate_left(by);
    }
}

/// Section 2.3.
pub fn block(key: &[u8; KEY_LEN], counter: u32, nonce: &Nonce) -> [u8; 64] {
    let mut input = Vec::from(b"expand 32-byte k");
    input.extend_from_slice(key);
    input.extend_from_slice(&counter.to_le_bytes());
    input.extend_from_slice(nonce);
    let words: Vec<u32> =
        input.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let start: [u32; 16] = words.try_into().unwrap();
    let mut state = start;
    for _ in 0..10 {
        for i in 0..4 {
            quarter_round(&mut state, [i, i + 4, i + 8, i + 12]);
        }
        for i in 0..4 {
            quarter_round(&mut state, [i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4]);
        }
    }
    let sums = state.iter().zip(start).flat_map(|(a, b)| a.wrapping_add(b).to_le_bytes());
    sums.collect::<Vec<u8>>().try_into().unwrap()
}

/// Section 2.4.
pub fn chacha20(key: &[u8; KEY_LEN], counter: u32, nonce: &Nonce, bytes: &[u8]) -> Vec<u8> {
    let blocks = bytes.chunks(64).zip(counter..);
    let xored = blocks.flat_map(|(chunk, counter)| {
        let stream = block(key, counter, nonce);
        chunk.iter().zip(stream).map(|(a, b)| a ^ b).collect::<Vec<u8>>()
    });
    xored.collect()
}

/// A number below 2^136: what stands above 2^128, and what below.
type Number = (u8, u128);

/// 2^130 − 5.
const P: Number = (3, u128::MAX - 4);

/// The sum of two numbers below 2^131, modulo P.
fn add(a: Number, b: Number) -> Number {
    let (low, carry) = a.1.overflowing_add(b.1);
    let mut sum = (a.0 + b.0 + u8::from(carry), low);
    while sum >= P {
        let (low, borrow) = sum.1.overflowing_sub(P.1);
        sum = (sum.0 - P.0 - u8::from(borrow), low);
    }
    sum
}

/// A product modulo P, by doubling and adding.
fn multiply(a: Number, r: u128) -> Number {
    (0..128).rev().fold((0, 0), |product, bit| {
        let doubled = add(product, product);
        if r >> bit & 1 == 1 { add(doubled, a) } else { doubled }
    })
}

/// Section 2.5.
pub fn poly1305(key: &[u8; KEY_LEN], message: &[u8]) -> [u8; TAG_LEN] {
    let half = |at: usize| u128::from_le_bytes(key[at..at + 16].try_into().unwrap());
    let r = half(0) & 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff;
    let mut sum = (0, 0);
    for chunk in message.chunks(16) {
        // The bytes, then a one.
        let mut bytes = [0; 17];
        bytes[..chunk.len()].copy_from_slice(chunk);
        bytes[chunk.len()] = 1;
        let number = (bytes[16], u128::from_le_bytes(bytes[..16].try_into().unwrap()));
        sum = multiply(add(sum, number), r);
    }
    sum.1.wrapping_add(half(16)).to_le_bytes()
}

/// Section 2.8: ciphertext, then the tag.
pub fn seal(key: &[u8; KEY_LEN], nonce: &Nonce, aad: &[u8], packet: &[u8]) -> Vec<u8> {
    let mut sealed = chacha20(key, 1, nonce, packet);
    let tag = tag(key, nonce, aad, &sealed);
    sealed.extend_from_slice(&tag);
    sealed
}

/// The packet, if the tag fits.
pub fn open(key: &[u8; KEY_LEN], nonce: &Nonce, aad: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
    let (ciphertext, its_tag) = sealed.split_last_chunk::<TAG_LEN>()?;
    (*its_tag == tag(key, nonce, aad, ciphertext)).then(|| chacha20(key, 1, nonce, ciphertext))
}

fn tag(key: &[u8; KEY_LEN], nonce: &Nonce, aad: &[u8], ciphertext: &[u8]) -> [u8; TAG_LEN] {
    // Section 2.6.
    let one_time_key = *block(key, 0, nonce).first_chunk().unwrap();
    let mut message = Vec::new();
    for part in [aad, ciphertext] {
        message.extend_from_slice(part);
        message.resize(message.len().next_multiple_of(16), 0);
    }
    message.extend_from_slice(&(aad.len() as u64).to_le_bytes());
    message.extend_from_slice(&(ciphertext.len() as u64).to_le_bytes());
    poly1305(&one_time_key, &message)
}

/// The nonce of a transport message (whitepaper §5.4.6).
pub fn nonce_of(counter: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    nonce
}
