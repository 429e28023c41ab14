//! Published vectors: RFC 8439 and Wycheproof. The model takes them all, but for nonces of other
//! lengths. A transport message has no associated data, and its nonce begins with four zero bytes:
//! back ends take what of the vectors has this shape, and for the rest they agree with the model on
//! the vectors' keys and messages.

use serde::Deserialize;
use wg_common::protocol::{KEY_LEN, TAG_LEN};

use super::model::{self, NONCE_LEN, Nonce};
use super::{back_ends, noise};
use crate::aead::{AeadKey, BatchAead, Job};

/// Bytes that a vector writes in hexadecimal.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "String")]
struct Hex(Vec<u8>);

impl TryFrom<String> for Hex {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let pairs = (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16));
        pairs.collect::<Result<_, _>>().map(Self)
    }
}

impl Hex {
    fn array<const N: usize>(&self) -> [u8; N] {
        self.0[..].try_into().unwrap()
    }
}

#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Rfc {
    ChaCha20 { name: String, key: Hex, nonce: Hex, counter: u32, plain: Hex, sealed: Hex },
    Poly1305 { name: String, key: Hex, plain: Hex, tag: Hex },
    Aead { name: String, key: Hex, nonce: Hex, aad: Hex, plain: Hex, sealed: Hex, tag: Hex },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wycheproof {
    tc_id: u32,
    key: Hex,
    iv: Hex,
    aad: Hex,
    msg: Hex,
    ct: Hex,
    tag: Hex,
    result: String,
}

fn rfc() -> Vec<Rfc> {
    let lines = include_str!("../../../vectors/rfc8439.jsonl").lines();
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn wycheproof() -> Vec<Wycheproof> {
    let lines = include_str!("../../../vectors/chacha20_poly1305.jsonl").lines();
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The counter of a transport message with this nonce, if one has it.
fn counter_of(nonce: &Nonce) -> Option<u64> {
    let (zeros, counter) = nonce.split_first_chunk::<4>().unwrap();
    (*zeros == [0; 4]).then(|| u64::from_le_bytes(counter.try_into().unwrap()))
}

/// What a back end makes of a packet, in a batch with others, each place in its turn.
fn sealed_in_every_place(
    aead: &dyn BatchAead,
    key: &[u8; KEY_LEN],
    counter: u64,
    packet: &[u8],
) -> Vec<Vec<u8>> {
    let (key, other) = (AeadKey::new(key), AeadKey::new(&[0x33; KEY_LEN]));
    let seal = |place: usize| {
        let mut buffers: Vec<Vec<u8>> = (0..33).map(|i| noise(i * 7 + TAG_LEN, i as u64)).collect();
        buffers[place] = [packet, &[0; TAG_LEN]].concat();
        let jobs = buffers.iter_mut().enumerate().map(|(i, buffer)| {
            let (key, counter) = if i == place { (&key, counter) } else { (&other, i as u64) };
            Job::new(key, counter, buffer)
        });
        aead.seal(&mut jobs.collect::<Vec<_>>());
        buffers.swap_remove(place)
    };
    [0, 7, 8, 15, 16, 31, 32].map(seal).to_vec()
}

#[test]
fn the_model_agrees_with_every_vector_of_the_rfc() {
    let vectors = rfc();
    assert_eq!(vectors.len(), 26);
    for vector in &vectors {
        match vector {
            Rfc::ChaCha20 { name, key, nonce, counter, plain, sealed } => {
                let made = model::chacha20(&key.array(), *counter, &nonce.array(), &plain.0);
                assert_eq!(made, sealed.0, "{name}");
            }
            Rfc::Poly1305 { name, key, plain, tag } => {
                assert_eq!(model::poly1305(&key.array(), &plain.0), tag.0[..], "{name}");
            }
            Rfc::Aead { name, key, nonce, aad, plain, sealed, tag } => {
                let made = model::seal(&key.array(), &nonce.array(), &aad.0, &plain.0);
                assert_eq!(made, [&sealed.0[..], &tag.0].concat(), "{name}");
                let opened = model::open(&key.array(), &nonce.array(), &aad.0, &made);
                assert_eq!(opened.unwrap(), plain.0, "{name}");
            }
        }
    }
}

#[test]
fn back_ends_agree_with_the_rfc_where_it_has_our_shape() {
    for aead in back_ends() {
        let mut count = 0;
        for vector in rfc() {
            let (name, key, nonce, counter, plain, sealed) = match vector {
                Rfc::ChaCha20 { name, key, nonce, counter, plain, sealed } => {
                    (name, key, nonce, counter, plain, sealed)
                }
                // Associated data changes the tag alone.
                Rfc::Aead { name, key, nonce, plain, sealed, .. } => {
                    (name, key, nonce, 1, plain, sealed)
                }
                Rfc::Poly1305 { .. } => continue,
            };
            // Block 0 makes the key of the tag, and is seen nowhere.
            let (Some(message), 1..) = (counter_of(&nonce.array()), counter) else { continue };
            let before = 64 * (counter as usize - 1);
            let packet = [&vec![0; before], &plain.0[..]].concat();
            for made in sealed_in_every_place(aead, &key.array(), message, &packet) {
                let name = format!("{} {name}", aead.name());
                assert_eq!(made[before..made.len() - TAG_LEN], sealed.0, "{name}");
                let expected = model::seal(&key.array(), &nonce.array(), &[], &packet);
                assert_eq!(made, expected, "{name}");
            }
            count += 1;
        }
        assert_eq!(count, 7);
    }
}

#[test]
fn the_model_agrees_with_wycheproof() {
    let (mut valid, mut invalid, mut other_nonces) = (0, 0, 0);
    for Wycheproof { tc_id, key, iv, aad, msg, ct, tag, result } in wycheproof() {
        let Ok(nonce) = <Nonce>::try_from(&iv.0[..]) else {
            assert_eq!(result, "invalid", "{tc_id}");
            other_nonces += 1;
            continue;
        };
        let sealed = [&ct.0[..], &tag.0].concat();
        let opened = model::open(&key.array(), &nonce, &aad.0, &sealed);
        if result == "valid" {
            assert_eq!(model::seal(&key.array(), &nonce, &aad.0, &msg.0), sealed, "{tc_id}");
            assert_eq!(opened.unwrap(), msg.0, "{tc_id}");
            valid += 1;
        } else {
            assert_eq!(opened, None, "{tc_id}");
            invalid += 1;
        }
    }
    assert_eq!((valid, invalid, other_nonces), (256, 60, 9));
}

/// No vector of Wycheproof has a transport message's shape as a whole: where the nonce begins with four
/// zero bytes, there is associated data. There the ciphertext is compared.
#[test]
fn back_ends_agree_with_wycheproof_where_it_has_our_shape() {
    for aead in back_ends() {
        let mut count = 0;
        for Wycheproof { tc_id, key, iv, aad, msg, ct, result, .. } in wycheproof() {
            let Ok(nonce) = <Nonce>::try_from(&iv.0[..]) else { continue };
            let (Some(counter), "valid") = (counter_of(&nonce), &result[..]) else { continue };
            assert!(!aad.0.is_empty(), "{tc_id}");
            for made in sealed_in_every_place(aead, &key.array(), counter, &msg.0) {
                assert_eq!(made[..ct.0.len()], ct.0, "{} {tc_id}", aead.name());
            }
            count += 1;
        }
        assert_eq!(count, 10);
    }
}

/// The vectors' keys, messages and what of their nonces fits, all in batches, against the model.
#[test]
fn back_ends_agree_with_the_model_on_what_wycheproof_seals() {
    let vectors: Vec<_> = wycheproof().into_iter().filter(|v| v.iv.0.len() == NONCE_LEN).collect();
    let keys: Vec<_> = vectors.iter().map(|vector| AeadKey::new(&vector.key.array())).collect();
    let counter = |vector: &Wycheproof| u64::from_le_bytes(vector.iv.0[4..].try_into().unwrap());
    let expected = vectors.iter().map(|vector| {
        let nonce = model::nonce_of(counter(vector));
        model::seal(&vector.key.array(), &nonce, &[], &vector.msg.0)
    });
    let expected: Vec<_> = expected.collect();
    for aead in back_ends() {
        let mut buffers: Vec<Vec<u8>> =
            vectors.iter().map(|vector| [&vector.msg.0[..], &[0; TAG_LEN]].concat()).collect();
        let jobs = vectors.iter().zip(&keys).zip(&mut buffers);
        let jobs = jobs.map(|((vector, key), buffer)| Job::new(key, counter(vector), buffer));
        let mut jobs: Vec<_> = jobs.collect();
        aead.seal(&mut jobs);
        for ((job, expected), vector) in jobs.iter().zip(&expected).zip(&vectors) {
            assert_eq!(job.buffer, expected, "{} {}", aead.name(), vector.tc_id);
        }
        aead.open(&mut jobs);
        for (job, vector) in jobs.iter().zip(&vectors) {
            assert!(job.ok, "{} {}", aead.name(), vector.tc_id);
            assert_eq!(job.buffer[..vector.msg.0.len()], vector.msg.0);
        }
    }
}
