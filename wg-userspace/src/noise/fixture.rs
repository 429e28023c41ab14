//! Two parties that know each other, for tests.

use rand::SeedableRng;
use rand::rngs::StdRng;
use wg_common::id::ReceiverIndex;
use wg_common::protocol::{INITIATION_LEN, RESPONSE_LEN};

use super::*;

pub(super) const ALICE_INDEX: ReceiverIndex = ReceiverIndex::from_wire([0xce, 0x11, 0xaa, 0x00]);
pub(super) const BOB_INDEX: ReceiverIndex = ReceiverIndex::from_wire([0x0b, 0x0b, 0xb0, 0x00]);

pub(super) struct Party {
    pub identity: Identity,
    /// The other one.
    pub remote: RemoteStatic,
}

pub(super) fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

pub(super) fn preshared(byte: u8) -> PresharedKey {
    PresharedKey::from_bytes([byte; KEY_LEN])
}

/// A timestamp greater than those of all `n` before.
pub(super) fn timestamp(n: u64) -> Timestamp {
    Timestamp::from_unix(1_800_000_000 + n, 0)
}

/// Alice and Bob.
pub(super) fn parties(seed: u64, preshared_key: &PresharedKey) -> [Party; 2] {
    let mut rng = rng(seed);
    let [alice, bob] = std::array::from_fn(|_| Identity::new(PrivateKey::generate(&mut rng)));
    let remote_of = |identity: &Identity, other: &Identity| {
        RemoteStatic::new(identity, *other.public_key(), preshared_key.clone())
    };
    let (of_alice, of_bob) = (remote_of(&alice, &bob), remote_of(&bob, &alice));
    [Party { identity: alice, remote: of_alice }, Party { identity: bob, remote: of_bob }]
}

impl Party {
    pub(super) fn initiate(
        &self,
        local: ReceiverIndex,
        seed: u64,
    ) -> (Initiator, [u8; INITIATION_LEN]) {
        initiate(&self.identity, &self.remote, local, timestamp(seed), None, &mut rng(seed))
            .unwrap()
    }

    pub(super) fn authenticate(
        &self,
        initiation: &[u8; INITIATION_LEN],
    ) -> Result<AuthenticInitiation, HandshakeError> {
        open_initiation(&self.identity, initiation)?.authenticate(&self.remote)
    }

    pub(super) fn respond(
        &self,
        initiation: &[u8; INITIATION_LEN],
        local: ReceiverIndex,
        seed: u64,
    ) -> Result<(Established, [u8; RESPONSE_LEN]), HandshakeError> {
        self.authenticate(initiation)?.respond(&self.remote, local, None, &mut rng(!seed))
    }

    pub(super) fn finish(
        &self,
        initiator: &Initiator,
        response: &[u8; RESPONSE_LEN],
    ) -> Result<Established, HandshakeError> {
        initiator.finish(&self.identity, &self.remote, response)
    }

    /// Writes a right mac1 to an altered message for the other party.
    pub(super) fn mend(&self, message: &mut [u8]) {
        mac::write_macs(message, &self.remote, None);
    }
}
