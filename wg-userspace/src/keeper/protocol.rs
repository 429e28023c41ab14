//! What keeper and data process say to each other.
//!
//! Two `SOCK_SEQPACKET` socketpairs, a message a packet: JSON, and descriptors beside it. On one the data
//! process sends [`Request`]s and gets an [`Answer`] to each; on the other the keeper sends [`Event`]s.
//! Both ends are the same program, so that there are no versions.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::choice::Plan;
use crate::daemon::{AeadChoice, Mode, PacketRules};
use crate::host::Towards;

/// Longest message.
pub const MESSAGE_LEN_MAX: usize = 64 << 10;
/// Most descriptors beside a message. The kernel takes 253.
pub const FD_COUNT_MAX: usize = 250;
/// Most entries in a [`Request::LinksTowards`].
pub const LINKS_MAX: usize = 128;
/// Most neighbours in an [`Event::NeighboursMoved`].
pub const NEIGHBOURS_MAX: usize = 256;
/// Most addresses in an [`Event::Addresses`].
pub const ADDRESSES_MAX: usize = 512;
/// Most prefixes in a [`Request::SetOwners`].
pub const OWNERS_MAX: usize = 1024;
/// Most addresses in an [`Event::Resolved`].
pub const RESOLVED_MAX: usize = 64;
/// A name is looked up no more often than this.
pub const RESOLVE_EVERY: Duration = Duration::from_secs(30);

/// What the data process asks for. `device` counts from 0.
#[derive(Debug, Deserialize, Serialize)]
pub enum Request {
    /// What to begin with.
    Setup,
    /// The queues of a TUN device.
    TunQueues {
        /// Whose.
        device: u16,
    },
    /// Has a program choose the queue for a packet, by what [`Request::SetOwners`] says and by where peers
    /// are at home. It knows nothing yet, and follows one that a data process before this one had.
    SteerTun {
        /// Whose.
        device: u16,
    },
    /// Has a program choose the socket for a datagram by where keypairs are at home. It knows of none yet, and
    /// follows one that a data process before this one had.
    SteerSockets {
        /// Whose.
        device: u16,
    },
    /// Who owns prefixes from now on, for the program that chooses queues.
    SetOwners {
        /// Whose.
        device: u16,
        /// Address, length, and the owner's number if there is an owner.
        owners: Vec<(IpAddr, u8, Option<u32>)>,
    },
    /// The sockets that are open at present.
    Sockets {
        /// Whose.
        device: u16,
    },
    /// Sockets on a port from now on.
    OpenSockets {
        /// Whose.
        device: u16,
        /// 0: any that is free.
        port: u16,
        /// 0: none.
        fwmark: u32,
    },
    /// The sockets that were on this port before are of no use any more.
    CloseSockets {
        /// Whose.
        device: u16,
        /// The port.
        port: u16,
    },
    /// Another mark on the present sockets.
    SetMark {
        /// Whose.
        device: u16,
        /// 0: none.
        fwmark: u32,
    },
    /// An XSK that is not bound yet: the next request should be for that.
    OpenXsk {
        /// Index of the NIC.
        ifindex: u32,
        /// Of the plan by which this is done.
        generation: u64,
        /// Whether it is to share the UMEM of another.
        shares: bool,
    },
    /// Binds the XSK that was opened before, and has the steer program use it. One that shares a UMEM has
    /// beside it the descriptor of an XSK with that UMEM, which is bound.
    BindXsk {
        /// Index of the NIC.
        ifindex: u32,
        /// Its queue.
        queue: u32,
        /// The XSK's number in the map.
        slot: u32,
        /// The worker that will serve it.
        worker: u16,
        /// Of the plan by which this is done.
        generation: u64,
    },
    /// Keeps the memfd beside it, in place of the one before, for the process that follows.
    Remember {
        /// Whose.
        device: u16,
    },
    /// There are to be no keypairs until then, in nanoseconds of boot time; also for the process that
    /// follows. 0: there may be.
    PauseUntil {
        /// Whose.
        device: u16,
        /// Nanoseconds of boot time.
        boot_ns: u64,
    },
    /// Where the name of an endpoint leads. An [`Event::Resolved`] answers it, unless it was looked up just
    /// now, or too many are waiting.
    Resolve {
        /// Whose.
        device: u16,
        /// The name.
        host: String,
        /// The port, not 0.
        port: u16,
    },
    /// By which links datagrams leave, and how large they may be.
    LinksTowards {
        /// With this mark.
        mark: u32,
        /// Whether what is needed to send past the kernel is to be told, too.
        with_hops: bool,
        /// Where they go.
        towards: Vec<Towards>,
    },
    /// What the steer program counted.
    SteerCounters,
    /// A connection to the service that knows peers.
    ConnectPeerSource,
    /// wg(8) is answered from now on.
    Ready,
    /// The answer to an [`Event::Ping`].
    Alive,
}

impl Request {
    /// The device for which something is asked.
    pub fn device(&self) -> Option<u16> {
        match *self {
            Self::TunQueues { device }
            | Self::SteerTun { device }
            | Self::SteerSockets { device }
            | Self::SetOwners { device, .. }
            | Self::Sockets { device }
            | Self::OpenSockets { device, .. }
            | Self::CloseSockets { device, .. }
            | Self::SetMark { device, .. }
            | Self::Remember { device }
            | Self::Resolve { device, .. }
            | Self::PauseUntil { device, .. } => Some(device),
            _ => None,
        }
    }

    /// Whether it only tells the keeper something of a device, so that it means nothing once the device is
    /// gone.
    pub fn is_note(&self) -> bool {
        matches!(
            self,
            Self::CloseSockets { .. }
                | Self::SetOwners { .. }
                | Self::Remember { .. }
                | Self::PauseUntil { .. }
                | Self::Resolve { .. }
        )
    }
}

/// What the keeper answers.
#[derive(Debug, Deserialize, Serialize)]
pub enum Answer {
    /// Descriptors beside it: [`Setup`] says which.
    Setup(Setup),
    /// A descriptor of each queue is beside it.
    TunQueues,
    /// The map of where peers are at home is beside it.
    PeerWorkers,
    /// The map of where keypairs are at home is beside it.
    IndexWorkers,
    /// Beside it: a socket of each worker for IPv4, then one of each for IPv6.
    Sockets {
        /// Their port.
        port: u16,
        /// Whether there are any for IPv6.
        has_v6: bool,
    },
    /// The socket is beside it, then the memfd of its UMEM unless it is to share one. It has the usual options
    /// but for its chunks.
    Xsk {
        /// Bytes of a chunk.
        chunk_size: u32,
    },
    /// It is bound.
    Bound {
        /// Whether the driver uses its memory itself.
        zero_copy: bool,
    },
    /// There is no such queue.
    NoQueue,
    /// It cannot share that UMEM.
    CannotShare(String),
    /// One for each, where the kernel knows it.
    Links(Vec<Option<LinkTowards>>),
    /// In the order of the steer program; empty if there is none.
    Counters(Vec<u64>),
    /// A stream socket is beside it.
    Connected,
    /// It is so.
    Done,
    /// It is not so, and nothing has changed.
    Refused(Refusal),
}

/// By what datagrams leave.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct LinkTowards {
    /// Index of the interface.
    pub link: u32,
    /// Longest IP packet in bytes: what somebody has set for the route, and what the interface takes.
    pub mtu: u32,
    /// What is needed to send past the kernel, if that was asked for, and would do what the kernel does.
    pub hop: Option<HopTowards>,
}

/// How datagrams leave by a link of Ethernet.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct HopTowards {
    /// The neighbour to whom they are given.
    pub neighbour: IpAddr,
    /// The address of this host from which they leave.
    pub source: IpAddr,
    /// Their TTL or hop limit.
    pub hop_limit: u8,
    /// Longest IP packet in bytes that the kernel would send in one piece.
    pub mtu: u32,
    /// The MAC address of the link.
    pub src_mac: [u8; 6],
    /// That of the neighbour, if the kernel knows one.
    pub dst_mac: Option<[u8; 6]>,
}

/// Why something was refused.
#[derive(Clone, Debug, Deserialize, Serialize, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// For people.
    pub text: String,
    /// The host's error number, if it said one.
    pub errno: Option<i32>,
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        match refusal.errno {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::other(refusal.text),
        }
    }
}

/// What a data process begins with. Descriptors beside it, in this order: a UAPI socket of each device, the
/// heartbeats, the live indexes if there are any, the memories of the devices that have one.
#[derive(Debug, Deserialize, Serialize)]
pub struct Setup {
    /// How many devices there were in the beginning: as many share the slots of receiver indexes.
    pub device_count: usize,
    /// Those that are there.
    pub devices: Vec<DeviceSetup>,
    /// Number of workers.
    pub worker_count: usize,
    /// The key of the permutation of receiver indexes.
    pub index_key: [u32; 4],
    /// The mode that was asked for.
    pub mode: Mode,
    /// The NICs that were named for XDP.
    pub nics: Vec<NamedNic>,
    /// The AEAD's back end that was asked for.
    pub aead: AeadChoice,
    /// Whether there is a service that knows peers.
    pub has_peer_source: bool,
    /// Entries of the live indexes, if there is a steer program.
    pub live_index_count: Option<usize>,
}

/// What a data process begins with for one device.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct DeviceSetup {
    /// Its number.
    pub number: u16,
    /// Name of its interface, for people.
    pub interface: String,
    /// Whether a process before this one has left a memory.
    pub has_memory: bool,
    /// There are to be no keypairs until then, in nanoseconds of boot time; 0: there may be.
    pub quiesced_until: u64,
    /// What is done to packets, until somebody says otherwise.
    pub rules: PacketRules,
}

/// A NIC that was named for XDP.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NamedNic {
    /// Its name.
    pub name: String,
    /// Its index; 0 if it is not there.
    pub ifindex: u32,
    /// Its receive queues in use.
    pub queue_count: u32,
    /// Grows with each plan: XSKs of another one are of no use any more.
    pub generation: u64,
    /// What is to be done with it.
    pub plan: Plan,
}

/// What the keeper tells.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub enum Event {
    /// Addresses that this host has, or has no more.
    Addresses {
        /// It has these now.
        added: Vec<IpAddr>,
        /// It has these no more.
        removed: Vec<IpAddr>,
    },
    /// How the TUN device is.
    Link {
        /// Which.
        device: u16,
        /// Its MTU in bytes, if that is known.
        mtu: Option<u32>,
        /// Whether it was taken up.
        is_up: bool,
    },
    /// The interface was deleted; everything of this device is closed.
    Gone {
        /// Which.
        device: u16,
    },
    /// All prefixes that peers own are to be told, by [`Request::SetOwners`].
    TellOwners {
        /// Which.
        device: u16,
    },
    /// Where a name leads that was asked for.
    Resolved {
        /// Who asked.
        device: u16,
        /// The name.
        host: String,
        /// The port.
        port: u16,
        /// None if nobody knows the name, or the name service does not answer.
        addresses: Vec<SocketAddr>,
    },
    /// Datagrams may leave by other links.
    RoutesChanged,
    /// It was chosen again what is to be done with NICs: all that were named.
    Nics(Vec<NamedNic>),
    /// These neighbours, each with the index of its link, have this MAC address now, or none that is known.
    NeighboursMoved(Vec<(u32, IpAddr, Option<[u8; 6]>)>),
    /// This virtual machine is a copy, or went back.
    Cloned,
    /// To be answered with [`Request::Alive`].
    Ping,
    /// The end, in good order.
    Stop,
}

/// Why a message did not come or go. The channel is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other end is closed.
    #[error("the other process has ended")]
    Closed,
    /// It is longer than a message may be, or has more descriptors.
    #[error("a message is too long")]
    TooLong,
    /// It is no message.
    #[error("a message makes no sense: {0}")]
    Nonsense(#[from] serde_json::Error),
    /// What came is no answer to what was asked.
    #[error("an answer that nobody asked for")]
    Unexpected,
    /// The kernel refuses.
    #[error(transparent)]
    Io(io::Error),
}

impl From<rustix::io::Errno> for ChannelError {
    fn from(errno: rustix::io::Errno) -> Self {
        match errno {
            rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET => Self::Closed,
            errno => Self::Io(errno.into()),
        }
    }
}

impl ChannelError {
    /// Whether it would have to be waited for.
    pub fn would_block(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// Both ends of a channel.
///
/// # Errors
/// When descriptors are exhausted.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Sends a message with descriptors.
///
/// # Errors
/// [`ChannelError`]. Nothing was sent then.
pub fn send<M: Serialize>(
    socket: impl AsFd,
    message: &M,
    fds: &[BorrowedFd<'_>],
) -> Result<(), ChannelError> {
    let text = serde_json::to_vec(message)?;
    send_text(socket, &text, fds)
}

/// As [`send`], of a message that is text already.
///
/// # Errors
/// [`ChannelError`]. Nothing was sent then.
pub fn send_text(
    socket: impl AsFd,
    text: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), ChannelError> {
    if text.len() > MESSAGE_LEN_MAX || fds.len() > FD_COUNT_MAX {
        return Err(ChannelError::TooLong);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FD_COUNT_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(ChannelError::TooLong);
    }
    let flags = SendFlags::NOSIGNAL;
    rustix::io::retry_on_intr(|| {
        sendmsg(socket.as_fd(), &[IoSlice::new(text)], &mut control, flags)
    })?;
    Ok(())
}

/// Receives a message with its descriptors.
///
/// # Errors
/// [`ChannelError`].
pub fn receive<M: DeserializeOwned>(socket: impl AsFd) -> Result<(M, Vec<OwnedFd>), ChannelError> {
    let mut text = vec![0; MESSAGE_LEN_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FD_COUNT_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(&mut text)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(ChannelError::TooLong);
    }
    if received.bytes == 0 {
        return Err(ChannelError::Closed);
    }
    Ok((serde_json::from_slice(&text[..received.bytes])?, fds))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_message_comes_whole_with_its_descriptors() {
        let (here, there) = pair().unwrap();
        let files: Vec<OwnedFd> =
            (0..FD_COUNT_MAX).map(|_| tempfile::tempfile().unwrap().into()).collect();
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // As long as it can get.
                let remote = "abcd:ef01:2345:6789:abcd:ef01:2345:6789".parse().unwrap();
                let ports = Some((u16::MAX, u16::MAX));
                let longest = Towards { remote, source: Some(remote), link: u32::MAX, ports };
                let towards = vec![longest; LINKS_MAX];
                let request = Request::LinksTowards { mark: 7, with_hops: true, towards };
                send(&here, &request, &fds).unwrap();
                send(&here, &Request::Ready, &[]).unwrap();
            });
            let (message, received) = receive::<Request>(&there).unwrap();
            assert!(
                matches!(message, Request::LinksTowards { mark: 7, towards, .. } if towards.len() == LINKS_MAX)
            );
            assert_eq!(received.len(), FD_COUNT_MAX);
            let mut file = std::fs::File::from(received.into_iter().next().unwrap());
            assert_eq!(file.read(&mut [0]).unwrap(), 0);
            let (message, received) = receive::<Request>(&there).unwrap();
            assert!(matches!(message, Request::Ready) && received.is_empty());
        });
        drop(here);
        assert!(matches!(receive::<Request>(&there), Err(ChannelError::Closed)));
    }

    #[test]
    fn as_many_ways_as_may_be_asked_for_fit_into_an_answer() {
        let (here, there) = pair().unwrap();
        let longest: IpAddr = "abcd:ef01:2345:6789:abcd:ef01:2345:6789".parse().unwrap();
        let hop = HopTowards {
            neighbour: longest,
            source: longest,
            hop_limit: u8::MAX,
            mtu: u32::MAX,
            src_mac: [0xff; 6],
            dst_mac: Some([0xff; 6]),
        };
        let link = LinkTowards { link: u32::MAX, mtu: u32::MAX, hop: Some(hop) };
        send(&here, &Answer::Links(vec![Some(link); LINKS_MAX]), &[]).unwrap();
        let (answer, _) = receive::<Answer>(&there).unwrap();
        assert!(matches!(answer, Answer::Links(links) if links == vec![Some(link); LINKS_MAX]));
        let moved =
            Event::NeighboursMoved(vec![(u32::MAX, longest, Some([0xff; 6])); NEIGHBOURS_MAX]);
        send(&here, &moved, &[]).unwrap();
        assert!(receive::<Event>(&there).is_ok());
    }

    #[test]
    fn as_many_owners_as_may_be_told_fit_into_a_message() {
        let (here, there) = pair().unwrap();
        let longest = (IpAddr::from([0xff; 16]), 128, Some(u32::MAX));
        let request = Request::SetOwners { device: u16::MAX, owners: vec![longest; OWNERS_MAX] };
        send(&here, &request, &[]).unwrap();
        let (message, _) = receive::<Request>(&there).unwrap();
        assert!(matches!(message, Request::SetOwners { owners, .. } if owners.len() == OWNERS_MAX));
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let (here, there) = pair().unwrap();
        for text in ["", "{", "\"Nothing\"", "{\"OpenSockets\":{\"device\":0,\"port\":65536}}"] {
            rustix::net::send(&here, text.as_bytes(), SendFlags::empty()).unwrap();
            assert!(receive::<Request>(&there).is_err(), "{text:?}");
        }
        let long = vec![b' '; MESSAGE_LEN_MAX + 1];
        rustix::net::send(&here, &long, SendFlags::empty()).unwrap();
        assert!(matches!(receive::<Request>(&there), Err(ChannelError::TooLong)));
        assert!(matches!(send_text(&here, &long, &[]), Err(ChannelError::TooLong)));
    }

    #[test]
    fn who_sends_to_nobody_is_told() {
        let (here, there) = pair().unwrap();
        drop(there);
        assert!(matches!(send(&here, &Request::Ready, &[]), Err(ChannelError::Closed)));
    }
}
