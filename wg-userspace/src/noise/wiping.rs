//! §5.4.5, §7.4: what holds a secret wipes it when it goes.

use zeroize::ZeroizeOnDrop;

use super::symmetric::Transcript;
use super::{Cookie, Dalek, TransportKeys, X25519};
use crate::key::{PresharedKey, PrivateKey};

fn wiped<T: ZeroizeOnDrop>() -> &'static str {
    std::any::type_name::<T>()
}

/// Compiles only if it holds.
#[test]
fn secrets_are_wiped_when_they_are_dropped() {
    let secrets = [
        wiped::<PrivateKey>(),
        wiped::<PresharedKey>(),
        wiped::<<Dalek as X25519>::Prepared>(),
        wiped::<Transcript>(),
        wiped::<TransportKeys>(),
        wiped::<Cookie>(),
    ];
    assert_eq!(secrets.len(), 6);
}
