//! Keys and their text forms.
//!
//! Text is base64 as wg(8) reads and writes it (44 characters, the last one `=`), and hex in the
//! socket protocol of wg(8). Both are converted without a branch or a table look-up that depends on
//! a key's bits; only the place of a character that belongs to no key shows in the time taken.
//!
//! Knows nothing of files, peers or handshakes.

use std::fmt;

use rand_core::CryptoRng;
use subtle::ConstantTimeEq;
use wg_common::protocol::KEY_LEN;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Characters of a key in base64.
const BASE64_LEN: usize = KEY_LEN.div_ceil(3) * 4;
/// Characters of a key in hex.
const HEX_LEN: usize = KEY_LEN * 2;
const _: () = assert!(BASE64_LEN == 44 && HEX_LEN == 64);

/// A public key: a point of Curve25519, as its 32 bytes.
///
/// `Display` and `Debug` write base64.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PublicKey([u8; KEY_LEN]);

/// A private key: a clamped scalar of Curve25519. Wiped on drop; `Debug` does not show it.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey([u8; KEY_LEN]);

/// A preshared key (§5.2), mixed into handshakes with one peer. Wiped on drop; `Debug` does not
/// show it. All zero means that there is none.
#[derive(Clone, Default, Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey([u8; KEY_LEN]);

/// Why a text is not a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ParseKeyError {
    /// Not as many characters as a key has in base64.
    #[error("a key is {BASE64_LEN} characters of base64, this has {0}")]
    Length(usize),
    /// A character that is not base64; `position` counts from 0.
    #[error("character {} is not base64", .position + 1)]
    Character {
        /// Counts from 0 (the message counts from 1).
        position: usize,
    },
    /// Base64 of more bits than a key has.
    #[error("the base64 of a key ends in one of AEIMQUYcgkosw048 and `=`")]
    Ending,
    /// Not as many characters as a key has in hex.
    #[error("a key is {HEX_LEN} characters of hex, this has {0}")]
    HexLength(usize),
    /// A character that is not hex; `position` counts from 0.
    #[error("character {} is not hex", .position + 1)]
    HexCharacter {
        /// Counts from 0 (the message counts from 1).
        position: usize,
    },
}

impl PublicKey {
    /// The key of these bytes. Every 32 bytes are a public key; handshakes refuse those of low order.
    pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    /// Reads base64 as strictly as wg(8).
    ///
    /// # Errors
    /// [`ParseKeyError`] says what is wrong with the text.
    pub fn from_base64(text: &str) -> Result<Self, ParseKeyError> {
        decode_base64(text).map(|bytes| Self(*bytes))
    }

    /// Reads hex of either case.
    ///
    /// # Errors
    /// [`ParseKeyError`] says what is wrong with the text.
    pub fn from_hex(text: &str) -> Result<Self, ParseKeyError> {
        decode_hex(text).map(|bytes| Self(*bytes))
    }

    /// The bytes, as they stand in messages.
    pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// Lower-case hex.
    pub fn to_hex(&self) -> String {
        encode_hex(&self.0).as_str().to_owned()
    }

    /// The beginning of its base64, for logs: enough to find it by, with an ellipsis.
    pub fn short(&self) -> String {
        const CHARS: usize = 8;
        format!("{:.CHARS$}…", self)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&encode_base64(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl PrivateKey {
    /// A new key.
    pub fn generate(rng: &mut (impl CryptoRng + ?Sized)) -> Self {
        let mut key = Self([0; KEY_LEN]);
        rng.fill_bytes(&mut key.0);
        key.clamp();
        key
    }

    /// The key of these bytes, clamped as the kernel clamps the keys it is given.
    pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        let mut key = Self(bytes);
        key.clamp();
        key
    }

    /// Reads base64 as strictly as wg(8), and clamps.
    ///
    /// # Errors
    /// [`ParseKeyError`] says what is wrong with the text.
    pub fn from_base64(text: &str) -> Result<Self, ParseKeyError> {
        decode_base64(text).map(|bytes| Self::from_bytes(*bytes))
    }

    /// Reads hex of either case, and clamps.
    ///
    /// # Errors
    /// [`ParseKeyError`] says what is wrong with the text.
    pub fn from_hex(text: &str) -> Result<Self, ParseKeyError> {
        decode_hex(text).map(|bytes| Self::from_bytes(*bytes))
    }

    /// The public key that belongs to it.
    pub fn public_key(&self) -> PublicKey {
        let secret = x25519_dalek::StaticSecret::from(self.0);
        PublicKey(x25519_dalek::PublicKey::from(&secret).to_bytes())
    }

    /// The secret bytes.
    pub const fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// The secret in base64.
    pub fn to_base64(&self) -> Zeroizing<String> {
        encode_base64(&self.0)
    }

    /// The secret in lower-case hex.
    pub fn to_hex(&self) -> Zeroizing<String> {
        encode_hex(&self.0)
    }

    /// Makes the scalar a multiple of 8 with its bit 254 set (RFC 7748, section 5).
    const fn clamp(&mut self) {
        self.0[0] &= 0b1111_1000;
        self.0[KEY_LEN - 1] &= 0b0111_1111;
        self.0[KEY_LEN - 1] |= 0b0100_0000;
    }
}

impl PresharedKey {
    /// A new key.
    pub fn generate(rng: &mut (impl CryptoRng + ?Sized)) -> Self {
        let mut key = Self::default();
        rng.fill_bytes(&mut key.0);
        key
    }

    /// The key of these bytes.
    pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    /// Reads base64 as strictly as wg(8).
    ///
    /// # Errors
    /// [`ParseKeyError`] says what is wrong with the text.
    pub fn from_base64(text: &str) -> Result<Self, ParseKeyError> {
        decode_base64(text).map(|bytes| Self(*bytes))
    }

    /// Reads hex of either case.
    ///
    /// # Errors
    /// [`ParseKeyError`] says what is wrong with the text.
    pub fn from_hex(text: &str) -> Result<Self, ParseKeyError> {
        decode_hex(text).map(|bytes| Self(*bytes))
    }

    /// Whether there is no preshared key: all bytes are zero.
    pub fn is_zero(&self) -> bool {
        self.0.ct_eq(&[0; KEY_LEN]).into()
    }

    /// The secret bytes.
    pub const fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// The secret in base64.
    pub fn to_base64(&self) -> Zeroizing<String> {
        encode_base64(&self.0)
    }

    /// The secret in lower-case hex.
    pub fn to_hex(&self) -> Zeroizing<String> {
        encode_hex(&self.0)
    }
}

/// What the two secret keys share: compared in constant time, never printed.
macro_rules! secret {
    ($key:ident) => {
        impl PartialEq for $key {
            fn eq(&self, other: &Self) -> bool {
                self.0.ct_eq(&other.0).into()
            }
        }

        impl Eq for $key {}

        impl fmt::Debug for $key {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($key), "(…)"))
            }
        }
    };
}

secret!(PrivateKey);
secret!(PresharedKey);

/// A run of consecutive characters that stand for consecutive digits.
struct Run {
    first: u8,
    last: u8,
    digit: u8,
}

const BASE64: [Run; 5] = [
    Run { first: b'A', last: b'Z', digit: 0 },
    Run { first: b'a', last: b'z', digit: 26 },
    Run { first: b'0', last: b'9', digit: 52 },
    Run { first: b'+', last: b'+', digit: 62 },
    Run { first: b'/', last: b'/', digit: 63 },
];

/// The third run is only read: digits are written in the characters of the first run that has them.
const HEX: [Run; 3] = [
    Run { first: b'0', last: b'9', digit: 0 },
    Run { first: b'a', last: b'f', digit: 10 },
    Run { first: b'A', last: b'F', digit: 10 },
];

/// All ones if `first <= value <= last`, else 0.
const fn within(value: u8, first: u8, last: u8) -> i32 {
    let (value, first, last) = (value as i32, first as i32, last as i32);
    !((value - first) | (last - value)) >> 31
}

/// The digit for which `character` stands.
fn digit(runs: &[Run], character: u8) -> Option<u8> {
    let mut found = -1;
    for run in runs {
        let digit = i32::from(character) - i32::from(run.first) + i32::from(run.digit);
        found += within(character, run.first, run.last) & (digit + 1);
    }
    u8::try_from(found).ok()
}

/// The character of `digit` in those of `runs` that begin at different digits.
fn character(runs: &[Run], digit: u8) -> char {
    let mut found = 0;
    for run in runs {
        let character = i32::from(digit) - i32::from(run.digit) + i32::from(run.first);
        found |= within(digit, run.digit, run.digit + (run.last - run.first)) & character;
    }
    char::from(found as u8)
}

fn decode_base64(text: &str) -> Result<Zeroizing<[u8; KEY_LEN]>, ParseKeyError> {
    let len = text.chars().count();
    if len != BASE64_LEN {
        return Err(ParseKeyError::Length(len));
    }
    let (digits, padding) = text.as_bytes().split_at(BASE64_LEN - 1);
    let mut key = Zeroizing::new([0; KEY_LEN]);
    let mut bytes = key.iter_mut();
    let (mut bits, mut bit_count) = (0_u32, 0);
    for (position, &character) in digits.iter().enumerate() {
        let digit = digit(&BASE64, character).ok_or(ParseKeyError::Character { position })?;
        bits = bits << 6 | u32::from(digit);
        bit_count += 6;
        if bit_count >= 8 {
            bit_count -= 8;
            *bytes.next().expect("43 digits hold 32 bytes and 2 bits") = (bits >> bit_count) as u8;
        }
    }
    // The two bits beyond the key are zero: each key has one text.
    let spare = bits & ((1 << bit_count) - 1);
    if spare == 0 && padding == b"=" { Ok(key) } else { Err(ParseKeyError::Ending) }
}

fn encode_base64(key: &[u8; KEY_LEN]) -> Zeroizing<String> {
    // Of its full size from the start, so that no half of a key stays behind in freed memory.
    let mut text = Zeroizing::new(String::with_capacity(BASE64_LEN));
    for group in key.chunks(3) {
        let mut bytes = Zeroizing::new([0; 4]);
        bytes[1..=group.len()].copy_from_slice(group);
        let bits = u32::from_be_bytes(*bytes);
        // n bytes need n + 1 digits.
        for digit in 0..=group.len() {
            text.push(character(&BASE64, (bits >> (18 - 6 * digit)) as u8 & 63));
        }
    }
    text.push('=');
    text
}

fn decode_hex(text: &str) -> Result<Zeroizing<[u8; KEY_LEN]>, ParseKeyError> {
    let len = text.chars().count();
    if len != HEX_LEN {
        return Err(ParseKeyError::HexLength(len));
    }
    let digit = |position: usize| {
        digit(&HEX, text.as_bytes()[position]).ok_or(ParseKeyError::HexCharacter { position })
    };
    let mut key = Zeroizing::new([0; KEY_LEN]);
    for (i, byte) in key.iter_mut().enumerate() {
        *byte = digit(2 * i)? << 4 | digit(2 * i + 1)?;
    }
    Ok(key)
}

fn encode_hex(key: &[u8; KEY_LEN]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(HEX_LEN));
    for byte in key {
        text.push(character(&HEX[..2], byte >> 4));
        text.push(character(&HEX[..2], byte & 15));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    /// Private and public keys as `wg pubkey` pairs them.
    const PAIRS: [(&str, &str); 4] = [
        (
            "YAnL2WnWLCVeuRvpVqAEJ2Wi+qJ9LIXPzsO2wGv1t0M=",
            "OpGjIY1rrKdJa5BjAgbmTw2usdFBKYx8ulxw76ssk14=",
        ),
        (
            "mMxmUn218Id+qe1Hv5w7Fl0RrICGYIxmENGvfC57zlQ=",
            "OxZHN1hlvwl/bewMlgHo/C6PvxNEiM4VB5AW2CgMTws=",
        ),
        // These two are not clamped.
        (
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
            "L+V9o0fNYkMVKNqsX7spBzD/9oSvxM/C7ZCZX1jLO3Q=",
        ),
        (
            "//////////////////////////////////////////8=",
            "hHwNLDdSNPNl5mCVUYejc1oPdhPRYJ06ak2MU66qWiI=",
        ),
    ];

    #[test]
    fn public_keys_are_those_of_wg() {
        for (private, public) in PAIRS {
            let private = PrivateKey::from_base64(private).unwrap();
            assert_eq!(private.public_key().to_string(), public);
            assert_eq!(private.public_key(), PublicKey::from_base64(public).unwrap());
        }
    }

    #[test]
    fn private_keys_are_clamped_and_others_are_not() {
        let private = PrivateKey::from_bytes([0xff; KEY_LEN]);
        assert_eq!((private.expose()[0], private.expose()[31]), (0xf8, 0x7f));
        let private = PrivateKey::from_hex(&"00".repeat(KEY_LEN)).unwrap();
        assert_eq!((private.expose()[0], private.expose()[31]), (0, 0x40));
        let generated = PrivateKey::generate(&mut StdRng::seed_from_u64(1));
        assert_eq!(generated, PrivateKey::from_bytes(*generated.expose()));

        assert_eq!(*PublicKey::from_bytes([0xff; KEY_LEN]).as_bytes(), [0xff; KEY_LEN]);
        assert_eq!(*PresharedKey::from_bytes([0xff; KEY_LEN]).expose(), [0xff; KEY_LEN]);
    }

    #[test]
    fn preshared_key_is_none_by_default() {
        assert!(PresharedKey::default().is_zero());
        assert!(!PresharedKey::generate(&mut StdRng::seed_from_u64(1)).is_zero());
        for i in 0..KEY_LEN {
            let mut bytes = [0; KEY_LEN];
            bytes[i] = 1;
            assert!(!PresharedKey::from_bytes(bytes).is_zero());
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let (private, preshared) =
            (PrivateKey::from_bytes([7; KEY_LEN]), PresharedKey::from_bytes([7; KEY_LEN]));
        assert_eq!(format!("{private:?} {preshared:?}"), "PrivateKey(…) PresharedKey(…)");
    }

    #[test]
    fn text_of_another_length_is_refused() {
        let text = PAIRS[0].1;
        for len in (0..text.len()).chain([45, 64]) {
            let text: String = text.chars().cycle().take(len).collect();
            assert_eq!(PublicKey::from_base64(&text), Err(ParseKeyError::Length(len)));
        }
        assert_eq!(PublicKey::from_hex(&"0".repeat(63)), Err(ParseKeyError::HexLength(63)));
        assert_eq!(PublicKey::from_hex(text), Err(ParseKeyError::HexLength(44)));
        assert_eq!(
            ParseKeyError::Length(5).to_string(),
            "a key is 44 characters of base64, this has 5"
        );
    }

    #[test]
    fn text_with_a_foreign_character_is_refused_at_its_place() {
        let foreign = ['-', '_', '=', ' ', '.', ',', '@', '[', '`', '{', ':', '\0', 'é', '🔑'];
        let chars: Vec<char> = PAIRS[0].1.chars().collect();
        for position in 0..43 {
            for wrong in foreign {
                let mut chars = chars.clone();
                chars[position] = wrong;
                let text: String = chars.into_iter().collect();
                assert_eq!(
                    PublicKey::from_base64(&text),
                    Err(ParseKeyError::Character { position })
                );
            }
        }
        let hex: Vec<char> = "0123456789abcdefABCDEF0000000000".repeat(2).chars().collect();
        for position in 0..64 {
            for wrong in foreign.into_iter().chain(['g', 'G', '/']) {
                let mut chars = hex.clone();
                chars[position] = wrong;
                let text: String = chars.into_iter().collect();
                assert_eq!(
                    PublicKey::from_hex(&text),
                    Err(ParseKeyError::HexCharacter { position })
                );
            }
        }
        assert_eq!(
            ParseKeyError::Character { position: 0 }.to_string(),
            "character 1 is not base64"
        );
    }

    #[test]
    fn each_key_has_one_base64() {
        let (start, end) = PAIRS[0].1.split_at(42);
        assert_eq!(end, "4=");
        for last in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".chars() {
            let read = PublicKey::from_base64(&format!("{start}{last}="));
            match "AEIMQUYcgkosw048".contains(last) {
                true => assert_eq!(read.unwrap().to_string(), format!("{start}{last}=")),
                false => assert_eq!(read, Err(ParseKeyError::Ending)),
            }
        }
        for padding in ["A", " ", "é"] {
            let text = format!("{start}4{padding}");
            assert_eq!(PublicKey::from_base64(&text), Err(ParseKeyError::Ending));
        }
    }

    /// Runs wg(8); None if it is not installed.
    fn wg(command: &str, input: &str) -> Option<String> {
        let mut wg = match Command::new("wg")
            .arg(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
        {
            Ok(wg) => wg,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => panic!("wg {command}: {error}"),
        };
        wg.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = wg.wait_with_output().unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().into())
    }

    #[test]
    fn wg_reads_our_keys_and_we_read_its() {
        if wg("--version", "").is_none() {
            eprintln!("SKIPPED wg_reads_our_keys_and_we_read_its: wg is not installed");
            return;
        }
        let mut rng = StdRng::seed_from_u64(2);
        for _ in 0..8 {
            let theirs = wg("genkey", "").unwrap();
            let read = PrivateKey::from_base64(&theirs).unwrap();
            assert_eq!(*read.to_base64(), theirs);
            assert_eq!(read.public_key().to_string(), wg("pubkey", &theirs).unwrap());

            let ours = PrivateKey::generate(&mut rng);
            assert_eq!(wg("pubkey", &ours.to_base64()).unwrap(), ours.public_key().to_string());

            let theirs = wg("genpsk", "").unwrap();
            assert_eq!(*PresharedKey::from_base64(&theirs).unwrap().to_base64(), theirs);
        }
        // What wg refuses, we refuse.
        for wrong in ["", "A", &PAIRS[0].0[..43], &PAIRS[0].0.replace("M=", "N=")] {
            assert_eq!(wg("pubkey", wrong), None);
            assert!(PrivateKey::from_base64(wrong).is_err());
        }
    }

    proptest! {
        #[test]
        fn text_forms_agree_with_a_plain_codec(bytes: [u8; KEY_LEN]) {
            use base64::Engine;
            let key = PublicKey::from_bytes(bytes);
            let base64 = base64::engine::general_purpose::STANDARD.encode(bytes);
            prop_assert_eq!(key.to_string(), base64.as_str());
            prop_assert_eq!(format!("{key:?}"), base64.as_str());
            prop_assert_eq!(PublicKey::from_base64(&base64), Ok(key));

            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            prop_assert_eq!(key.to_hex(), hex.as_str());
            prop_assert_eq!(PublicKey::from_hex(&hex), Ok(key));
            prop_assert_eq!(PublicKey::from_hex(&hex.to_uppercase()), Ok(key));

            let preshared = PresharedKey::from_bytes(bytes);
            prop_assert_eq!(&*preshared.to_base64(), &base64);
            prop_assert_eq!(&*preshared.to_hex(), &hex);
            prop_assert_eq!(PresharedKey::from_base64(&base64), Ok(preshared.clone()));
            prop_assert_eq!(PresharedKey::from_hex(&hex), Ok(preshared));
        }

        #[test]
        fn any_text_is_read_as_a_plain_codec_reads_it(text in "[A-Za-z0-9+/=]{43}=|\\PC{0,48}") {
            use base64::Engine;
            let plain = base64::engine::general_purpose::STANDARD.decode(&text);
            let plain = plain.ok().and_then(|bytes| <[u8; KEY_LEN]>::try_from(bytes).ok());
            let ours = PublicKey::from_base64(&text).ok().map(|key| *key.as_bytes());
            prop_assert_eq!(ours, plain);
            let _ = PublicKey::from_hex(&text);
        }
    }
}
