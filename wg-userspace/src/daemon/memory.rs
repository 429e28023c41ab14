//! What a data process keeps for its successor: a journal in memory that has no name.
//!
//! A process that dies takes sessions with it, but not the device: who comes after it reads the keys,
//! the peers, where they were last, and the greatest timestamps of their initiations, so that no old
//! one is taken for new. The journal lies in a memfd whose size is sealed. It is written by calls and
//! never mapped, so the keys in it are in no core dump and no page of it can vanish under a pointer.
//!
//! ```text
//! magic · version · length ┃ kind · len · checksum · bytes ┃ … ┃ (what is beyond `length` does not count)
//! ```
//!
//! Records are only ever added, and `length` is written last. When the journal is full, what it says
//! is written to another one, with room to grow to twice its size.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ring::digest::{Context, SHA256};
use wg_common::protocol::{KEY_LEN, TIMESTAMP_LEN};
use zeroize::Zeroizing;

use super::names::Names;
use crate::device::{AllowedIpChange, Device, Effect, PeerChange, SetRequest};
use crate::key::PublicKey;
use crate::noise::Timestamp;
use crate::sys::memory::{memfd, memfd_len};
use crate::uapi::{self, EndpointName};

/// What every journal begins with.
const MAGIC: [u8; 8] = *b"tidegate";
const VERSION: u32 = 3;
/// Magic, version, four bytes of nothing, length.
const HEADER_LEN: u64 = 24;
const LENGTH_AT: u64 = 16;
/// Kind, three bytes of nothing, length of the bytes, checksum.
const HEAD_LEN: u64 = 16;
/// Peers of one record, where there are many.
const PEERS_PER_RECORD: usize = 512;
/// A journal that is compacted sooner than this would be compacted all the time.
const CAPACITY_MIN: u64 = 1 << 20;
/// No peer of a request is longer in the text, but for its allowed IPs; nor is what is said of the
/// device.
const TEXT_PER_PEER: u64 = 640;
/// Nor is one shorter: its public key.
const TEXT_PER_PEER_MIN: u64 = ("public_key=\n".len() + 2 * KEY_LEN) as u64;
const TEXT_PER_ALLOWED_IP: u64 = 64;

/// What a record holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    /// A request, in the words of the UAPI.
    Set = 1,
    /// What is known of peers beside their configuration.
    Peers = 2,
    /// Which endpoints were given as names, in the words of the UAPI: in place of those before.
    Names = 3,
}

/// What is known of a peer beside its configuration.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Known {
    /// Where it was last, if that is known.
    pub endpoint: Option<SocketAddr>,
    /// Whether its name has led there.
    pub is_by_name: bool,
    /// The greatest timestamp of its initiations.
    pub greatest_timestamp: Timestamp,
    /// Whether there were keypairs.
    pub had_session: bool,
}

/// A journal that is being written.
#[derive(Debug)]
pub struct Memory {
    fd: OwnedFd,
    len: u64,
    /// It counts as full from here on.
    capacity: u64,
}

/// What a journal says.
#[derive(Debug, Default)]
pub struct Remembered {
    /// The device as it was configured.
    pub device: Device,
    /// Which endpoints were given as names.
    pub names: Names,
    /// Of its peers, those of which more is known.
    pub peers: HashMap<PublicKey, Known>,
    /// Whether something behind that made no sense.
    pub is_damaged: bool,
}

/// Why a journal cannot be read, or be written to.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It has to be compacted.
    #[error("the memory is full")]
    Full,
    /// It is something else.
    #[error("this is not the memory of a data process")]
    Foreign,
    /// Another version of this program wrote it.
    #[error("the memory has version {0}, and this program reads version {VERSION}")]
    Version(u32),
    /// The host refuses.
    #[error("accessing the memory: {0}")]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for MemoryError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Io(error.into())
    }
}

impl Memory {
    /// An empty journal with room for `capacity` bytes. They cost memory when they are written.
    ///
    /// # Errors
    /// When descriptors or memory are exhausted.
    pub fn new(capacity: u64) -> Result<Self, MemoryError> {
        let capacity = capacity.max(HEADER_LEN);
        let fd = memfd("tidegate-memory", usize::try_from(capacity).map_err(io::Error::other)?)?;
        write_all_at(&fd, &MAGIC, 0)?;
        write_all_at(&fd, &VERSION.to_le_bytes(), MAGIC.len() as u64)?;
        let memory = Self { fd, len: HEADER_LEN, capacity };
        memory.commit()?;
        Ok(memory)
    }

    /// A journal that says what `device` is, which of its endpoints have names, and what is known of its peers, and nothing of before.
    /// Pulled peers are left to their source.
    ///
    /// # Errors
    /// When descriptors or memory are exhausted.
    pub fn compacted(
        device: &Device,
        names: &[EndpointName],
        peers: impl Iterator<Item = (PublicKey, Known)>,
    ) -> Result<Self, MemoryError> {
        let peer_count = device.peer_count() as u64 + 1;
        let nets = device.allowed_ips().len();
        let heads = HEADER_LEN + (3 + peer_count / PEERS_PER_RECORD as u64) * 4 * HEAD_LEN;
        let text = peer_count * (TEXT_PER_PEER + ENTRY_LEN as u64);
        let names_len = uapi::format_names(names).len() as u64;
        let most = heads + text + names_len + nets as u64 * TEXT_PER_ALLOWED_IP;
        let mut memory = Self::new((2 * most).max(CAPACITY_MIN))?;
        for request in snapshot(device) {
            memory.append_set(&request)?;
        }
        if !names.is_empty() {
            memory.append_names(names)?;
        }
        memory.append_peers(peers)?;
        memory.capacity = memory.capacity.min((2 * memory.len).max(CAPACITY_MIN));
        Ok(memory)
    }

    /// Whether a request may fit. It is worth no look at its text if not.
    pub fn has_room_for(&self, request: &SetRequest) -> bool {
        let least = request.peers.len() as u64 * TEXT_PER_PEER_MIN;
        self.len + HEAD_LEN + least <= self.capacity
    }

    /// Adds a request that was carried out.
    ///
    /// # Errors
    /// [`MemoryError::Full`]; nothing is added then.
    pub fn append_set(&mut self, request: &SetRequest) -> Result<(), MemoryError> {
        self.append_set_text(&uapi::format_set(request))
    }

    /// As [`append_set`](Self::append_set), of a request that [`uapi::format_set`] made text of.
    ///
    /// # Errors
    /// [`MemoryError::Full`]; nothing is added then.
    pub fn append_set_text(&mut self, text: &str) -> Result<(), MemoryError> {
        self.append(Kind::Set, text.as_bytes())
    }

    /// Adds which endpoints were given as names.
    ///
    /// # Errors
    /// [`MemoryError::Full`]; nothing is added then.
    pub fn append_names(&mut self, names: &[EndpointName]) -> Result<(), MemoryError> {
        self.append(Kind::Names, uapi::format_names(names).as_bytes())
    }

    /// Adds what is known of some peers by now.
    ///
    /// # Errors
    /// [`MemoryError::Full`]; some of them may have been added then.
    pub fn append_peers(
        &mut self,
        peers: impl Iterator<Item = (PublicKey, Known)>,
    ) -> Result<(), MemoryError> {
        let mut bytes = Vec::with_capacity(PEERS_PER_RECORD * ENTRY_LEN);
        for (key, known) in peers {
            bytes.extend(to_entry(&key, &known));
            if bytes.len() == PEERS_PER_RECORD * ENTRY_LEN {
                self.append(Kind::Peers, &bytes)?;
                bytes.clear();
            }
        }
        if bytes.is_empty() { Ok(()) } else { self.append(Kind::Peers, &bytes) }
    }

    fn append(&mut self, kind: Kind, bytes: &[u8]) -> Result<(), MemoryError> {
        let end = self.len + HEAD_LEN + bytes.len() as u64;
        let len = u32::try_from(bytes.len()).map_err(|_| MemoryError::Full)?;
        if end > self.capacity {
            return Err(MemoryError::Full);
        }
        let mut head = [0; HEAD_LEN as usize];
        head[0] = kind as u8;
        head[4..8].copy_from_slice(&len.to_le_bytes());
        let checksum = checksum(&head[..8], bytes);
        head[8..].copy_from_slice(&checksum);
        write_all_at(&self.fd, &head, self.len)?;
        write_all_at(&self.fd, bytes, self.len + HEAD_LEN)?;
        self.len = end;
        self.commit()
    }

    /// What was written before counts from now on. Whoever dies before this has added nothing.
    fn commit(&self) -> Result<(), MemoryError> {
        write_all_at(&self.fd, &self.len.to_le_bytes(), LENGTH_AT)
    }

    /// Overwrites all of it. It is not done on drop: a thread that panics is a reason to remember.
    ///
    /// # Errors
    /// The kernel's; there are none for memory that was written before.
    pub fn wipe(self) -> Result<(), MemoryError> {
        wipe(&self.fd)
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Overwrites a journal, from its end to its beginning.
///
/// # Errors
/// [`MemoryError::Foreign`] if its size is not sealed.
pub fn wipe(fd: impl AsFd) -> Result<(), MemoryError> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let fd = fd.as_fd();
    let size = memfd_len(fd).map_err(|_| MemoryError::Foreign)? as u64;
    let mut at = 0;
    while at < size {
        // What was never written is no memory yet, and is not to become some.
        at = match rustix::fs::seek(fd, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let len = (size - at).min(ZEROS.len() as u64);
        write_all_at(fd, &ZEROS[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

/// Reads a journal, up to its end or to what makes no sense.
///
/// # Errors
/// If it is none, or of another version.
pub fn read(fd: impl AsFd) -> Result<Remembered, MemoryError> {
    let fd = fd.as_fd();
    let size = memfd_len(fd).map_err(|_| MemoryError::Foreign)? as u64;
    let mut header = [0; HEADER_LEN as usize];
    if !read_all_at(fd, &mut header, 0)? || header[..8] != MAGIC {
        return Err(MemoryError::Foreign);
    }
    match u32_at(&header, 8) {
        VERSION => {}
        version => return Err(MemoryError::Version(version)),
    }
    let claimed = u64_at(&header, LENGTH_AT as usize);
    let mut remembered = Remembered::default();
    let mut at = HEADER_LEN;
    let end = claimed.min(size);
    while let Some((kind, bytes)) = read_record(fd, at, end)? {
        let len = bytes.len() as u64;
        if !remembered.apply(kind, &bytes) {
            break;
        }
        at += HEAD_LEN + len;
    }
    remembered.is_damaged = at != claimed;
    Ok(remembered)
}

type Record = (Kind, Zeroizing<Vec<u8>>);

/// The record at `at`, if there is a whole one before `end`.
fn read_record(fd: BorrowedFd<'_>, at: u64, end: u64) -> Result<Option<Record>, MemoryError> {
    let room = end.checked_sub(at).and_then(|room| room.checked_sub(HEAD_LEN));
    let mut head = [0; HEAD_LEN as usize];
    let Some(room) = room else { return Ok(None) };
    if !read_all_at(fd, &mut head, at)? {
        return Ok(None);
    }
    let kind = match head[0] {
        1 => Kind::Set,
        2 => Kind::Peers,
        3 => Kind::Names,
        _ => return Ok(None),
    };
    let len = u32_at(&head, 4);
    if u64::from(len) > room {
        return Ok(None);
    }
    let mut bytes = Zeroizing::new(vec![0; len as usize]);
    let is_whole = read_all_at(fd, &mut bytes, at + HEAD_LEN)?
        && checksum(&head[..8], &bytes)[..] == head[8..];
    Ok(is_whole.then_some((kind, bytes)))
}

impl Remembered {
    /// Follows one record; false if it makes no sense, and then nothing of it counts.
    fn apply(&mut self, kind: Kind, bytes: &[u8]) -> bool {
        match kind {
            Kind::Set => {
                let text = std::str::from_utf8(bytes).ok();
                let lines = text.and_then(|text| text.strip_prefix("set=1\n"));
                let Some(Ok(request)) = lines.map(uapi::parse_set) else { return false };
                self.set(request);
            }
            Kind::Names => {
                let text = std::str::from_utf8(bytes).ok();
                let lines = text.and_then(|text| text.split_once('\n')).map(|(_, lines)| lines);
                let Some(Ok(names)) = lines.map(uapi::parse_names) else { return false };
                self.names = Names::new(names);
            }
            Kind::Peers => {
                if !bytes.len().is_multiple_of(ENTRY_LEN) {
                    return false;
                }
                let entries = bytes.chunks_exact(ENTRY_LEN).map(from_entry);
                let Some(entries) = entries.collect::<Option<Vec<_>>>() else { return false };
                // Of peers that have left since, nothing is to be known.
                let present =
                    entries.into_iter().filter(|(key, _)| self.device.find(key).is_some());
                self.peers.extend(present);
            }
        }
        true
    }

    fn set(&mut self, request: SetRequest) {
        self.names.follow(&request);
        for effect in self.device.apply(request) {
            match effect {
                Effect::PeerRemoved { public_key, .. } => {
                    self.peers.remove(&public_key);
                    self.names.remove(&public_key);
                }
                // Who was configured to be elsewhere since is there.
                Effect::Endpoint { id, .. } => {
                    let key = self.device.peer(id).map(|peer| peer.public_key);
                    if let Some(known) = key.and_then(|key| self.peers.get_mut(&key)) {
                        known.endpoint = None;
                    }
                }
                _ => {}
            }
        }
    }

    /// What is known of a peer.
    pub fn known(&self, key: &PublicKey) -> Known {
        self.peers.get(key).copied().unwrap_or_default()
    }
}

/// Requests that make a new device what `device` is, but for peers that a source named. The first one
/// replaces everything; none has many peers, or says what a new peer is anyway.
pub fn snapshot(device: &Device) -> impl Iterator<Item = SetRequest> {
    let rules = device.packet_rules();
    let first = SetRequest {
        private_key: Some(device.private_key().cloned()),
        listen_port: Some(device.listen_port()),
        fwmark: Some(device.fwmark()),
        mss_clamp: Some(rules.mss_clamp),
        copy_dscp: Some(rules.copy_dscp),
        replace_peers: true,
        peers: Vec::new(),
    };
    let mut peers = device.peers().filter(|(_, peer)| !peer.pulled).map(|(id, peer)| {
        let nets = device.allowed_ips().of_peer(id);
        PeerChange {
            preshared_key: Some(peer.preshared_key.clone()).filter(|key| !key.is_zero()),
            endpoint: peer.endpoint,
            persistent_keepalive: Some(peer.persistent_keepalive).filter(|&seconds| seconds > 0),
            name: Some(peer.name.clone()).filter(|name| !name.is_empty()),
            allowed_ips: nets.map(AllowedIpChange::Add).collect(),
            ..PeerChange::new(peer.public_key)
        }
    });
    let rest = std::iter::from_fn(move || {
        let peers: Vec<_> = peers.by_ref().take(PEERS_PER_RECORD).collect();
        (!peers.is_empty()).then(|| SetRequest { peers, ..SetRequest::default() })
    });
    std::iter::once(first).chain(rest)
}

/// Key, timestamp, flags, a byte of nothing, port, address, scope.
const ENTRY_LEN: usize = KEY_LEN + TIMESTAMP_LEN + 1 + 1 + 2 + 16 + 4;
const HAD_SESSION: u8 = 1;
const IS_V4: u8 = 2;
const IS_V6: u8 = 4;
const IS_BY_NAME: u8 = 8;

fn to_entry(key: &PublicKey, known: &Known) -> [u8; ENTRY_LEN] {
    let (mut flags, mut port, mut address, mut scope) = (0, 0, [0; 16], 0);
    if known.had_session {
        flags |= HAD_SESSION;
    }
    if known.is_by_name {
        flags |= IS_BY_NAME;
    }
    match known.endpoint {
        Some(SocketAddr::V4(v4)) => {
            flags |= IS_V4;
            port = v4.port();
            address[..4].copy_from_slice(&v4.ip().octets());
        }
        Some(SocketAddr::V6(v6)) => {
            flags |= IS_V6;
            port = v6.port();
            address = v6.ip().octets();
            scope = v6.scope_id();
        }
        None => {}
    }
    let mut entry = [0; ENTRY_LEN];
    let parts: [&[u8]; 7] = [
        key.as_bytes(),
        known.greatest_timestamp.as_bytes(),
        &[flags],
        &[0],
        &port.to_le_bytes(),
        &address,
        &scope.to_le_bytes(),
    ];
    let mut rest = &mut entry[..];
    for part in parts {
        let (to, behind) = rest.split_at_mut(part.len());
        to.copy_from_slice(part);
        rest = behind;
    }
    entry
}

/// `None` if it makes no sense. `entry` has its length.
fn from_entry(entry: &[u8]) -> Option<(PublicKey, Known)> {
    let (key, rest) = entry.split_first_chunk::<KEY_LEN>()?;
    let (timestamp, rest) = rest.split_first_chunk::<TIMESTAMP_LEN>()?;
    let (&[flags, _], rest) = rest.split_first_chunk::<2>()?;
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let (address, rest) = rest.split_first_chunk::<16>()?;
    let scope = u32::from_le_bytes(*rest.first_chunk::<4>()?);
    let port = u16::from_le_bytes(*port);
    let endpoint = match flags & (IS_V4 | IS_V6) {
        0 => None,
        IS_V4 => {
            let [a, b, c, d, ..] = *address;
            Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), port))
        }
        IS_V6 => Some(SocketAddrV6::new(Ipv6Addr::from(*address), port, 0, scope).into()),
        _ => return None,
    };
    let known = Known {
        endpoint: endpoint.filter(|addr| addr.port() != 0),
        is_by_name: flags & IS_BY_NAME != 0,
        greatest_timestamp: Timestamp::from_bytes(*timestamp),
        had_session: flags & HAD_SESSION != 0,
    };
    Some((PublicKey::from_bytes(*key), known))
}

fn checksum(head: &[u8], bytes: &[u8]) -> [u8; 8] {
    let mut context = Context::new(&SHA256);
    context.update(head);
    context.update(bytes);
    let digest = context.finish();
    *digest.as_ref().first_chunk().expect("a digest is longer")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("within a header"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("within a header"))
}

fn write_all_at(fd: impl AsFd, mut bytes: &[u8], mut at: u64) -> Result<(), MemoryError> {
    while !bytes.is_empty() {
        match rustix::io::retry_on_intr(|| rustix::io::pwrite(&fd, bytes, at))? {
            0 => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
            len => {
                bytes = &bytes[len..];
                at += len as u64;
            }
        }
    }
    Ok(())
}

/// False if the file ends before.
fn read_all_at(fd: impl AsFd, mut bytes: &mut [u8], mut at: u64) -> Result<bool, MemoryError> {
    while !bytes.is_empty() {
        match rustix::io::retry_on_intr(|| rustix::io::pread(&fd, &mut *bytes, at))? {
            0 => return Ok(false),
            len => {
                bytes = &mut bytes[len..];
                at += len as u64;
            }
        }
    }
    Ok(true)
}
