//! The bytes of a hand-over. All numbers are little-endian.
//!
//! ```text
//! device    magic 8, version 4, exported 8, public key 32, index key: length 1 and bytes,
//!           number of peers 4, peers, digest 32 (BLAKE2s of all before)
//! peer      public key 32, endpoint: family 1, address 16, port 2, scope 4, and ours: family 1,
//!           address 16, interface 4; greatest timestamp 12, last handshake: 0 or 1, timestamp 12;
//!           bytes rx 8, tx 8; moments 4 × 8 (0: none), number of keypairs 1, keypairs
//! keypair   slot 1, role 1, generation 4, counter 8, local index 4, remote index 4, begun 8,
//!           created 8, key to seal 32, to open 32, window: end 8, words 128 × 8
//! ```
//!
//! A value has one form: what is absent is zero, lists are in order, nothing follows. Moments are boot
//! time in nanoseconds, none of them later than the export. The digest tells what was written whole
//! from what was not; it proves nothing about who wrote it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use blake2::{Blake2s256, Digest};
use hashbrown::HashSet;
use wg_common::endpoint::{Endpoint, LocalSource};
use wg_common::id::ReceiverIndex;
use wg_common::protocol::{KEY_LEN, REJECT_AFTER_TIME, TIMESTAMP_LEN};
use wg_common::time::Now;
use zeroize::{Zeroize, Zeroizing};

use super::super::activity::Moments;
use super::super::replay::WORD_COUNT;
use super::{DeviceExport, KeypairExport, PeerExport, Slot};
use crate::key::PublicKey;
use crate::noise::{Role, Timestamp};
use crate::session::{Generation, ReplayWindow};

const MAGIC: [u8; 8] = *b"tidegate";
const VERSION: u32 = 1;
const DIGEST_LEN: usize = 32;
/// Most bytes of an index key.
pub const INDEX_KEY_LEN_MAX: usize = 64;

/// Bytes of a device without index key and peers.
const DEVICE_LEN: usize = 8 + 4 + 8 + KEY_LEN + 1 + 4 + DIGEST_LEN;
/// Bytes of a peer without keypairs.
const PEER_LEN: usize = KEY_LEN + 23 + 21 + TIMESTAMP_LEN + 1 + TIMESTAMP_LEN + 16 + 4 * 8 + 1;
const KEYPAIR_LEN: usize = 1 + 1 + 4 + 8 + 4 + 4 + 8 + 8 + 2 * KEY_LEN + 8 + 8 * WORD_COUNT;

/// Why bytes are not the hand-over of a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ImportError {
    /// They do not begin as one: nothing was written, or it was imported before.
    #[error("these bytes are no hand-over")]
    Magic,
    /// Another version of this program wrote them.
    #[error("version {0} of the hand-over is not known here")]
    Version(u32),
    /// They are not as they were written, or not all of them.
    #[error("the hand-over was not written whole")]
    Digest,
    /// They end too early.
    #[error("the hand-over ends within {0}")]
    Truncated(&'static str),
    /// There are more than there should be.
    #[error("{0} bytes follow the hand-over")]
    Trailing(usize),
    /// A value that no exporter writes.
    #[error("a hand-over cannot have this {0}")]
    Value(&'static str),
    /// A peer or a receiver index stands there twice.
    #[error("the hand-over has a {0} twice")]
    Twice(&'static str),
    /// The keypairs belong to another private key.
    #[error("the hand-over is that of {0}")]
    OtherIdentity(PublicKey),
    /// It was made later than now: on another host, or before a restart of this one.
    #[error("the hand-over is not of this host's time")]
    OtherTime,
}

impl DeviceExport {
    /// The bytes for the transfer memory. They have one reader; who writes them there wipes its copy,
    /// which this one does when it is dropped.
    ///
    /// # Panics
    /// If the index key is longer than [`INDEX_KEY_LEN_MAX`], or there are 2^32 peers.
    pub fn into_bytes(self) -> Zeroizing<Vec<u8>> {
        assert!(self.index_key.len() <= INDEX_KEY_LEN_MAX);
        let keypair_count: usize = self.peers.iter().map(PeerExport::keypair_count).sum();
        let len = DEVICE_LEN
            + self.index_key.len()
            + self.peers.len() * PEER_LEN
            + keypair_count * KEYPAIR_LEN;
        // Of its full size from the start, so that no half of it stays behind in freed memory.
        let mut to = Zeroizing::new(Vec::with_capacity(len));
        to.extend_from_slice(&MAGIC);
        to.extend_from_slice(&VERSION.to_le_bytes());
        to.extend_from_slice(&self.exported.boot_ns().to_le_bytes());
        to.extend_from_slice(self.public_key.as_bytes());
        to.push(self.index_key.len() as u8);
        to.extend_from_slice(&self.index_key);
        let peer_count =
            u32::try_from(self.peers.len()).expect("fewer peers than receiver indexes");
        to.extend_from_slice(&peer_count.to_le_bytes());
        for peer in &self.peers {
            write_peer(&mut to, peer);
        }
        let digest = Blake2s256::digest(to.as_slice());
        to.extend_from_slice(&digest);
        assert_eq!(to.len(), len, "the lengths are those of what is written");
        to
    }

    /// Takes an export out of the transfer memory. The memory is wiped when this returns, also if
    /// there was an error: what was in it is here or nowhere.
    ///
    /// Its length is not trusted: memory is taken for what is there, not for what numbers say.
    ///
    /// # Errors
    /// [`ImportError`], if these are not exactly the bytes of an export.
    pub fn take_from(memory: &mut [u8]) -> Result<Self, ImportError> {
        let memory = Wiped(memory);
        read_device(memory.0)
    }

    /// Checks that the export is for this identity and this time.
    ///
    /// # Errors
    /// [`ImportError::OtherIdentity`], [`ImportError::OtherTime`].
    pub fn check(&self, identity: &PublicKey, now: Now) -> Result<(), ImportError> {
        if self.public_key != *identity {
            return Err(ImportError::OtherIdentity(self.public_key));
        }
        // An old one has nothing but dead keypairs; they are refused one by one.
        if self.exported > now { Err(ImportError::OtherTime) } else { Ok(()) }
    }
}

/// The bytes followed by their digest, as [`DeviceExport::take_from`] wants them. For tests that make
/// bytes up.
pub fn with_digest(body: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(body.len() + DIGEST_LEN));
    bytes.extend_from_slice(body);
    bytes.extend_from_slice(&Blake2s256::digest(body));
    bytes
}

/// Memory that is wiped when this is dropped.
struct Wiped<'a>(&'a mut [u8]);

impl Drop for Wiped<'_> {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

fn write_peer(to: &mut Vec<u8>, peer: &PeerExport) {
    to.extend_from_slice(peer.public_key.as_bytes());
    let local = peer.endpoint.and_then(|endpoint| endpoint.local);
    let remote = peer.endpoint.map(|endpoint| endpoint.remote);
    write_ip(to, remote.map(|remote| remote.ip()));
    to.extend_from_slice(&remote.map_or(0, |remote| remote.port()).to_le_bytes());
    let scope = match remote {
        Some(SocketAddr::V6(remote)) => remote.scope_id(),
        Some(SocketAddr::V4(_)) | None => 0,
    };
    to.extend_from_slice(&scope.to_le_bytes());
    write_ip(to, local.map(|local| local.addr));
    to.extend_from_slice(&local.map_or(0, |local| local.ifindex).to_le_bytes());
    to.extend_from_slice(peer.greatest_timestamp.as_bytes());
    to.push(peer.last_handshake.is_some().into());
    to.extend_from_slice(peer.last_handshake.unwrap_or_default().as_bytes());
    to.extend_from_slice(&peer.rx_bytes.to_le_bytes());
    to.extend_from_slice(&peer.tx_bytes.to_le_bytes());
    for moment in peer.moments {
        to.extend_from_slice(&moment.to_le_bytes());
    }
    to.push(peer.keypairs.len() as u8);
    for keypair in &peer.keypairs {
        write_keypair(to, keypair);
    }
}

fn write_ip(to: &mut Vec<u8>, ip: Option<IpAddr>) {
    let (family, address) = match ip {
        None => (0, [0; 16]),
        Some(IpAddr::V4(ip)) => {
            let mut address = [0; 16];
            address[..4].copy_from_slice(&ip.octets());
            (4, address)
        }
        Some(IpAddr::V6(ip)) => (6, ip.octets()),
    };
    to.push(family);
    to.extend_from_slice(&address);
}

fn write_keypair(to: &mut Vec<u8>, keypair: &KeypairExport) {
    to.push(match keypair.slot {
        Slot::Current => 0,
        Slot::Previous => 1,
        Slot::Next => 2,
    });
    to.push(match keypair.role {
        Role::Initiator => 0,
        Role::Responder => 1,
    });
    to.extend_from_slice(&keypair.generation.number().to_le_bytes());
    to.extend_from_slice(&keypair.next.to_le_bytes());
    to.extend_from_slice(&keypair.local_index.value().to_le_bytes());
    to.extend_from_slice(&keypair.remote_index.value().to_le_bytes());
    to.extend_from_slice(&keypair.begun.boot_ns().to_le_bytes());
    to.extend_from_slice(&keypair.created.boot_ns().to_le_bytes());
    to.extend_from_slice(keypair.seal_key.as_slice());
    to.extend_from_slice(keypair.open_key.as_slice());
    let (end, words) = keypair.window.parts();
    to.extend_from_slice(&end.to_le_bytes());
    words.for_each(|word| to.extend_from_slice(&word.to_le_bytes()));
}

/// What is left to read, and what is being read.
struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], ImportError> {
        let (bytes, rest) =
            self.rest.split_at_checked(len).ok_or(ImportError::Truncated(self.what))?;
        self.rest = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], ImportError> {
        Ok(self.bytes(N)?.first_chunk().expect("so many were taken"))
    }

    fn u8(&mut self) -> Result<u8, ImportError> {
        Ok(u8::from_le_bytes(*self.array()?))
    }

    fn u16(&mut self) -> Result<u16, ImportError> {
        Ok(u16::from_le_bytes(*self.array()?))
    }

    fn u32(&mut self) -> Result<u32, ImportError> {
        Ok(u32::from_le_bytes(*self.array()?))
    }

    fn u64(&mut self) -> Result<u64, ImportError> {
        Ok(u64::from_le_bytes(*self.array()?))
    }

    fn public_key(&mut self) -> Result<PublicKey, ImportError> {
        Ok(PublicKey::from_bytes(*self.array()?))
    }

    fn index(&mut self) -> Result<ReceiverIndex, ImportError> {
        Ok(ReceiverIndex::from_wire(*self.array()?))
    }

    fn secret(&mut self) -> Result<Zeroizing<[u8; KEY_LEN]>, ImportError> {
        let mut key = Zeroizing::new([0; KEY_LEN]);
        key.copy_from_slice(self.array::<KEY_LEN>()?);
        Ok(key)
    }
}

/// The error of a field unless it `holds`.
fn check(holds: bool, field: &'static str) -> Result<(), ImportError> {
    if holds { Ok(()) } else { Err(ImportError::Value(field)) }
}

fn read_device(bytes: &[u8]) -> Result<DeviceExport, ImportError> {
    let mut from = Reader { rest: bytes, what: "its head" };
    if !bytes.starts_with(&MAGIC) {
        return Err(ImportError::Magic);
    }
    from.bytes(MAGIC.len())?;
    let version = from.u32()?;
    if version != VERSION {
        return Err(ImportError::Version(version));
    }
    let (body, digest) =
        bytes.split_last_chunk::<DIGEST_LEN>().ok_or(ImportError::Truncated("its head"))?;
    if Blake2s256::digest(body).as_slice() != digest {
        return Err(ImportError::Digest);
    }
    from.rest = from.rest.strip_suffix(digest).ok_or(ImportError::Truncated("its head"))?;
    let exported = Now::from_boot_ns(from.u64()?);
    let public_key = from.public_key()?;
    let index_key_len = usize::from(from.u8()?);
    check(index_key_len <= INDEX_KEY_LEN_MAX, "length of an index key")?;
    let index_key = Zeroizing::new(from.bytes(index_key_len)?.to_vec());
    let peer_count = from.u32()? as usize;
    from.what = "a peer";
    // Before memory is taken for them.
    if peer_count > from.rest.len() / PEER_LEN {
        return Err(ImportError::Truncated("a peer"));
    }
    let mut peers = Vec::with_capacity(peer_count);
    let (mut keys, mut indexes) = (HashSet::with_capacity(peer_count), HashSet::new());
    for _ in 0..peer_count {
        let peer = read_peer(&mut from, exported)?;
        if !keys.insert(peer.public_key) {
            return Err(ImportError::Twice("peer"));
        }
        if !peer.keypairs.iter().all(|keypair| indexes.insert(keypair.local_index)) {
            return Err(ImportError::Twice("receiver index"));
        }
        peers.push(peer);
    }
    match from.rest.len() {
        0 => Ok(DeviceExport { public_key, index_key, exported, peers }),
        more => Err(ImportError::Trailing(more)),
    }
}

fn read_peer(from: &mut Reader<'_>, exported: Now) -> Result<PeerExport, ImportError> {
    from.what = "a peer";
    let public_key = from.public_key()?;
    let endpoint = read_endpoint(from)?;
    let greatest_timestamp = Timestamp::from_bytes(*from.array()?);
    let completed = from.u8()?;
    let last_handshake = Timestamp::from_bytes(*from.array()?);
    let is_absent = completed == 0 && last_handshake == Timestamp::default();
    check(completed == 1 || is_absent, "time of a handshake")?;
    let (rx_bytes, tx_bytes) = (from.u64()?, from.u64()?);
    let mut moments = Moments::default();
    for moment in &mut moments {
        *moment = from.u64()?;
        check(*moment <= exported.boot_ns(), "moment of a peer")?;
    }
    let keypair_count = from.u8()?;
    check(keypair_count <= 3, "number of keypairs")?;
    let mut keypairs: Vec<KeypairExport> = Vec::with_capacity(keypair_count.into());
    for _ in 0..keypair_count {
        let keypair = read_keypair(from, exported)?;
        let in_order = keypairs.last().is_none_or(|before| before.slot < keypair.slot);
        check(in_order, "order of keypairs")?;
        keypairs.push(keypair);
    }
    Ok(PeerExport {
        public_key,
        endpoint,
        greatest_timestamp,
        last_handshake: (completed == 1).then_some(last_handshake),
        rx_bytes,
        tx_bytes,
        moments,
        keypairs,
    })
}

fn read_endpoint(from: &mut Reader<'_>) -> Result<Option<Endpoint>, ImportError> {
    let remote = read_ip(from)?;
    let (port, scope) = (from.u16()?, from.u32()?);
    let local = read_ip(from)?;
    let ifindex = from.u32()?;
    let is_v6 = matches!(remote, Some(IpAddr::V6(_)));
    check(scope == 0 || is_v6, "scope of an endpoint")?;
    check(ifindex == 0 || local.is_some(), "interface of an endpoint")?;
    check(
        local.is_none_or(|local| remote.is_some_and(|r| r.is_ipv6() == local.is_ipv6())),
        "source",
    )?;
    let remote = match remote {
        None => {
            check(port == 0, "port without an address")?;
            return Ok(None);
        }
        Some(IpAddr::V4(ip)) => SocketAddr::from((ip, port)),
        Some(IpAddr::V6(ip)) => SocketAddr::from(SocketAddrV6::new(ip, port, 0, scope)),
    };
    let local = local.map(|addr| LocalSource { addr, ifindex });
    Ok(Some(Endpoint { remote, local }))
}

fn read_ip(from: &mut Reader<'_>) -> Result<Option<IpAddr>, ImportError> {
    let family = from.u8()?;
    let address: &[u8; 16] = from.array()?;
    let is_clear = |rest: &[u8]| rest.iter().all(|&byte| byte == 0);
    match family {
        0 if is_clear(address) => Ok(None),
        4 if is_clear(&address[4..]) => {
            let [a, b, c, d, ..] = *address;
            Ok(Some(Ipv4Addr::new(a, b, c, d).into()))
        }
        6 => Ok(Some(Ipv6Addr::from(*address).into())),
        _ => Err(ImportError::Value("address")),
    }
}

fn read_keypair(from: &mut Reader<'_>, exported: Now) -> Result<KeypairExport, ImportError> {
    from.what = "a keypair";
    let slot = match from.u8()? {
        0 => Slot::Current,
        1 => Slot::Previous,
        2 => Slot::Next,
        _ => return Err(ImportError::Value("slot of a keypair")),
    };
    let role = match from.u8()? {
        0 => Role::Initiator,
        1 => Role::Responder,
        _ => return Err(ImportError::Value("role")),
    };
    let generation = Generation::new(from.u32()?).ok_or(ImportError::Value("generation"))?;
    let next = from.u64()?;
    let counters = generation.counters();
    check(counters.start <= next && next <= counters.end, "sending counter")?;
    let (local_index, remote_index) = (from.index()?, from.index()?);
    let (begun, created) = (Now::from_boot_ns(from.u64()?), Now::from_boot_ns(from.u64()?));
    check(begun <= created && created <= exported, "age of a keypair")?;
    // Dead ones are not exported: an exporter that lives longer than its clock says is not ours.
    check(exported.since(created) < REJECT_AFTER_TIME, "age of a keypair")?;
    let (seal_key, open_key) = (from.secret()?, from.secret()?);
    let end = from.u64()?;
    let mut words = [0; WORD_COUNT];
    for word in &mut words {
        *word = from.u64()?;
    }
    let window = ReplayWindow::from_parts(end, words).ok_or(ImportError::Value("replay window"))?;
    Ok(KeypairExport {
        slot,
        role,
        generation,
        next,
        local_index,
        remote_index,
        begun,
        created,
        seal_key,
        open_key,
        window,
    })
}
