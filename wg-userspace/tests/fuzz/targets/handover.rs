//! Bytes in the transfer memory of a hand-over: they make sessions that keep every rule, or nothing.

use std::time::Duration;

use wg_common::time::Now;
use wg_userspace::session::handover::{DeviceExport, with_digest};
use zeroize::Zeroizing;

use super::Input;
use super::host::{Host, START};

/// When it is imported.
const NOW: Now = Now::from_boot_ns(START.boot_ns() + 131_000_000_000);
/// Bytes of the digest behind what is exported.
const DIGEST_LEN: usize = 32;

/// Whether a right digest is put behind the bytes, without which none come far; then the bytes.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut memory = match input.byte() % 4 {
        0 => Zeroizing::new(input.0.to_vec()),
        _ => with_digest(input.0),
    };
    let written = memory.clone();
    let taken = DeviceExport::take_from(&mut memory);
    assert!(memory.iter().all(|byte| *byte == 0), "nobody takes it a second time");
    let Ok(export) = taken else { return };
    let again = export.into_bytes();
    assert_eq!(again[..], written[..], "there is one way to write it");
    let export = DeviceExport::take_from(&mut again.clone()).expect("it was taken before");

    let [_, mut successor] = Host::pair();
    if export.check(successor.public_key(), NOW).is_err() {
        return;
    }
    for peer in export.peers {
        let keypair_count = peer.keypair_count();
        let (taken, refused) = successor.import(peer, NOW);
        assert_eq!(taken + refused, keypair_count, "each is taken or refused");
        successor.check();
    }
    successor.send(b"a packet", NOW);
    // What was given to it lives no longer than anything else.
    successor.rest(NOW);
}

/// What a host with a session, and one without, hands over.
pub fn seeds() -> Vec<Vec<u8>> {
    let [_, mut lonely] = Host::pair();
    let mut hosts = Host::pair();
    Host::connect(&mut hosts, START);
    let mut rekeyed = Host::pair();
    for at in [0, 125] {
        Host::connect(&mut rekeyed, START + Duration::from_secs(at));
    }
    let later = START + Duration::from_secs(130);
    let [_, responder] = &mut hosts;
    let [_, twice] = &mut rekeyed;
    let exports = [lonely.export(START), responder.export(START), twice.export(later)];
    let with_choice = |bytes: &Vec<u8>| {
        let body = &bytes[..bytes.len() - DIGEST_LEN];
        [[&[0], &bytes[..]].concat(), [&[1], body].concat()]
    };
    exports.iter().flat_map(with_choice).collect()
}
