//! The handshake (whitepaper §5.4): Noise_IKpsk2 in both roles, mac1 and mac2, cookie replies.
//!
//! Bytes of messages go in, bytes of messages and transport keys come out. Knows nothing of time
//! but the [`Timestamp`] it is given, nothing of sockets, and keeps no table: who finds the peer of
//! an initiation, refuses repeated timestamps and decides when to send is `session` and
//! `handshake`. What comes out, [`Established`], goes to `session`, which makes a keypair of it.
//!
//! ```text
//! initiator                                                     responder
//! initiate ─ Initiator ──── 148 bytes ───▶ check_mac1, open_initiation ─ OpenedInitiation
//!                                          sender() → peer, authenticate ─ AuthenticInitiation
//!                                          timestamp() is new, respond ─ Established
//! Initiator::finish ◀─────── 92 bytes ──── and the response
//! Established
//! ```
//!
//! Whatever holds a secret wipes it on drop.

mod cookie;
mod dh;
mod handshake;
mod mac;
mod symmetric;
mod timestamp;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod oracles;
#[cfg(test)]
mod wiping;

#[cfg(test)]
pub(crate) use dh::agreement_count;

use std::sync::{Arc, OnceLock};

use wg_common::outcome::DropReason;
use wg_common::protocol::KEY_LEN;
use zeroize::Zeroizing;

pub use cookie::{Cookie, CookieSecret};
#[cfg(feature = "aws-lc")]
pub use dh::AwsLc;
pub use dh::{Dalek, SharedSecret, X25519};
pub use handshake::{
    AuthenticInitiation, Established, Initiator, OpenedInitiation, Role, TransportKeys, initiate,
    open_initiation,
};
pub use mac::{check_mac1, check_mac2, mac1_of};
pub use symmetric::mac;
pub use timestamp::Timestamp;

use crate::key::{PresharedKey, PrivateKey, PublicKey};

/// Why a handshake message is refused, or cannot be made.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HandshakeError {
    /// It is no handshake message, or was not made for our public key.
    #[error("mac1 does not fit our public key")]
    BadMac1,
    /// A tag does not verify: altered on its way, other keys, another preshared key.
    #[error("a tag does not verify")]
    Decrypt,
    /// A public key in it, or the peer's own, makes every shared secret zero.
    #[error("a public key has low order")]
    LowOrderPoint,
    /// It came from another peer than the one it was checked against.
    #[error("the sender is another peer")]
    UnknownSender,
    /// It answers another handshake.
    #[error("the receiver index is that of another handshake")]
    WrongIndex,
}

impl HandshakeError {
    /// The reason under which the dropped message is counted.
    pub const fn drop_reason(self) -> DropReason {
        match self {
            Self::BadMac1 => DropReason::BadMac1,
            Self::WrongIndex => DropReason::UnknownIndex,
            Self::Decrypt | Self::LowOrderPoint | Self::UnknownSender => DropReason::BadHandshake,
        }
    }
}

/// Who we are: a device's private key, with what every handshake needs of it.
pub struct Identity {
    private_key: PrivateKey,
    /// Shared with each [`RemoteStatic`] that was made for it; wiped when the last of them goes.
    prepared: Arc<dh::Prepared>,
    public_key: PublicKey,
    mac1_key: [u8; KEY_LEN],
    cookie_key: [u8; KEY_LEN],
}

impl Identity {
    /// Derives the public key and the keys of mac1 and of cookie replies (one multiplication).
    pub fn new(private_key: PrivateKey) -> Self {
        let prepared = Curve::prepare(&private_key);
        let public_key = Curve::public_key(&prepared);
        Self {
            mac1_key: mac::mac1_key(&public_key),
            cookie_key: cookie::cookie_key(&public_key),
            private_key,
            prepared: Arc::new(prepared),
            public_key,
        }
    }

    /// One that shows a public key which is not its own, as a liar does.
    #[cfg(test)]
    pub(crate) fn claiming(private_key: PrivateKey, public_key: PublicKey) -> Self {
        Self { public_key, ..Self::new(private_key) }
    }

    /// The public key by which others know us.
    pub const fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// The private key.
    pub fn private_key(&self) -> &PrivateKey {
        &self.private_key
    }
}

/// Who a peer is to one [`Identity`]: its public key, with what every handshake needs of it.
///
/// Must be made anew when the identity changes.
pub struct RemoteStatic {
    public_key: PublicKey,
    mac1_key: [u8; KEY_LEN],
    preshared_key: PresharedKey,
    /// The private key of the identity for which it was made.
    own: Arc<dh::Prepared>,
    /// Made by the first handshake that needs it, and apart, so that a peer who never comes has no room
    /// for it either. None if the public key has low order: no handshake with it succeeds.
    static_static: OnceLock<Option<Box<SharedSecret>>>,
}

/// Who a peer is to one [`Identity`], as long as nobody has asked: of many peers most never come.
///
/// Must be made anew when the identity changes.
pub struct Remote {
    /// The private key of the identity.
    own: Arc<dh::Prepared>,
    made: OnceLock<Box<RemoteStatic>>,
}

impl Remote {
    /// Of any peer of `identity`; costs nothing.
    pub fn new(identity: &Identity) -> Self {
        Self { own: Arc::clone(&identity.prepared), made: OnceLock::new() }
    }

    /// All that handshakes need, of the peer that has these keys; made by the first call.
    pub fn get(&self, public_key: &PublicKey, preshared_key: &PresharedKey) -> &RemoteStatic {
        self.made.get_or_init(|| {
            Box::new(RemoteStatic::of(&self.own, *public_key, preshared_key.clone()))
        })
    }

    /// The same, if it was made.
    pub fn made(&mut self) -> Option<&mut RemoteStatic> {
        self.made.get_mut().map(|made| &mut **made)
    }

    /// The key shared with the peer, if that is known here.
    pub fn preshared_key(&self) -> Option<&PresharedKey> {
        self.made.get().map(|made| made.preshared_key())
    }
}

impl From<RemoteStatic> for Remote {
    fn from(remote: RemoteStatic) -> Self {
        Self { own: Arc::clone(&remote.own), made: Box::new(remote).into() }
    }
}

impl RemoteStatic {
    /// Derives the peer's mac1 key. The static-static secret is left to the first handshake (one
    /// multiplication), so that peers who never come cost none.
    ///
    /// A public key of low order is taken, as the kernel does, but every handshake with it is
    /// refused.
    pub fn new(identity: &Identity, public_key: PublicKey, preshared_key: PresharedKey) -> Self {
        Self::of(&identity.prepared, public_key, preshared_key)
    }

    fn of(own: &Arc<dh::Prepared>, public_key: PublicKey, preshared_key: PresharedKey) -> Self {
        Self {
            mac1_key: mac::mac1_key(&public_key),
            own: Arc::clone(own),
            static_static: OnceLock::new(),
            public_key,
            preshared_key,
        }
    }

    /// One with whom no handshake succeeds, for tests of many: none costs a multiplication.
    #[cfg(test)]
    pub(crate) fn unreachable(public_key: PublicKey) -> Self {
        use std::sync::LazyLock;
        static NOBODY: LazyLock<Arc<dh::Prepared>> =
            LazyLock::new(|| Arc::new(Curve::prepare(&PrivateKey::from_bytes([0; KEY_LEN]))));
        let mac1_key = mac::mac1_key(&public_key);
        let (own, preshared_key) = (Arc::clone(&NOBODY), PresharedKey::default());
        Self { mac1_key, own, static_static: None.into(), public_key, preshared_key }
    }

    /// The peer's public key.
    pub const fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// The key shared with the peer, zero if there is none.
    pub const fn preshared_key(&self) -> &PresharedKey {
        &self.preshared_key
    }

    /// Replaces the preshared key; it counts from the next message on that is made or opened.
    pub fn set_preshared_key(&mut self, preshared_key: PresharedKey) {
        self.preshared_key = preshared_key;
    }

    fn static_static(&self) -> Result<&SharedSecret, HandshakeError> {
        let agree = || dh::agree(&self.own, &self.public_key).ok().map(Box::new);
        self.static_static.get_or_init(agree).as_deref().ok_or(HandshakeError::LowOrderPoint)
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("public_key", &self.public_key).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Whether it was made is no part of what it is.
        f.debug_struct("Remote").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for RemoteStatic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteStatic").field("public_key", &self.public_key).finish_non_exhaustive()
    }
}

/// The curve in use.
#[cfg(not(test))]
type Curve = dh::Chosen;
#[cfg(test)]
type Curve = dh::Counted<dh::Chosen>;

/// 32 secret bytes, wiped on drop.
type Secret = Zeroizing<[u8; KEY_LEN]>;
