//! The data process's end: what it asks the keeper for.

use std::io;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use wg_common::map::PEER_WORKERS_LEN;

use super::protocol::{
    Answer, ChannelError, Event, LINKS_MAX, LinkTowards, NamedNic, OWNERS_MAX, Refusal, Request,
    Setup, receive, send,
};
use crate::bpf::SteerCounters;
use crate::host::Towards;
use crate::sys::SharedWords;
use crate::tun::TunQueue;
use crate::udp::{UdpSocket, UdpSockets};
use crate::xsk::{Place, Pool, Unbound, Xsk, XskOptions};

/// A keeper that does not answer for so long is not there any more.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The keeper, as the data process sees it.
///
/// Every method but [`Keeper::setup`] ends this process if the keeper does not answer, or not to what was
/// asked: there is nothing that could be done without it, and a process that follows begins anew.
#[derive(Debug)]
pub struct Keeper {
    requests: OwnedFd,
}

/// What a data process begins with.
pub struct Begin {
    /// All that is no descriptor.
    pub setup: Setup,
    /// The sockets on which wg(8) is answered, in the order of the devices; they listen.
    pub listeners: Vec<OwnedFd>,
    /// Heartbeats, by worker.
    pub heartbeats: SharedWords,
    /// The live-index map, if there is a steer program.
    pub live_indexes: Option<SharedWords>,
    /// What the process before this one has left, in the order of the devices.
    pub memories: Vec<Option<OwnedFd>>,
}

/// The pool of a UMEM, the first XSK of it, and the places for others.
pub type XskWithPlaces = (Pool, Xsk, Vec<Place>);

/// Why there is no XSK for a queue.
#[derive(Debug, thiserror::Error)]
pub enum NoXsk {
    /// There is no such queue.
    #[error("there is no such queue")]
    NoQueue,
    /// It cannot share that UMEM.
    #[error("{0}")]
    CannotShare(String),
    /// For another reason.
    #[error("{0}")]
    Refused(String),
}

/// Where an XSK belongs.
#[derive(Clone, Copy, Debug)]
pub struct XskAt {
    /// The NIC's queue.
    pub queue: u32,
    /// The number in the steer program's map.
    pub slot: u32,
    /// The worker that will serve it.
    pub worker: u16,
}

impl Keeper {
    /// The keeper at the other end of `requests`.
    ///
    /// # Errors
    /// If it is no socket.
    pub fn new(requests: OwnedFd) -> io::Result<Self> {
        for which in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&requests, which, Some(ANSWER_TIMEOUT))?;
        }
        Ok(Self { requests })
    }

    fn try_ask(
        &self,
        request: &Request,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(Answer, Vec<OwnedFd>), ChannelError> {
        send(&self.requests, request, fd.as_slice())?;
        receive(&self.requests)
    }

    fn ask(&self, request: &Request) -> (Answer, Vec<OwnedFd>) {
        self.try_ask(request, None).unwrap_or_else(|error| lost(&error))
    }

    /// What to begin with.
    ///
    /// # Errors
    /// If the keeper does not say, or not what it should.
    pub fn setup(&self) -> Result<Begin, ChannelError> {
        let (answer, fds) = self.try_ask(&Request::Setup, None)?;
        let Answer::Setup(setup) = answer else { return Err(ChannelError::Unexpected) };
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or(ChannelError::Unexpected);
        let listeners = setup.devices.iter().map(|_| next()).collect::<Result<_, _>>()?;
        let heartbeats = SharedWords::map(next()?, setup.worker_count).map_err(ChannelError::Io)?;
        let live_indexes = setup
            .live_index_count
            .map(|count| SharedWords::map(next()?, count).map_err(ChannelError::Io))
            .transpose()?;
        let memories = setup.devices.iter();
        let memories = memories.map(|device| device.has_memory.then(&mut next).transpose());
        let memories = memories.collect::<Result<_, _>>()?;
        Ok(Begin { setup, listeners, heartbeats, live_indexes, memories })
    }

    /// The queues of a TUN device.
    pub fn tun_queues(&self, device: u16) -> Vec<TunQueue> {
        let (Answer::TunQueues, fds) = self.ask(&Request::TunQueues { device }) else {
            lost(&ChannelError::Unexpected)
        };
        let queues = fds.into_iter().map(TunQueue::from_fd).collect::<Result<_, _>>();
        // It was deleted meanwhile, and the keeper will see it.
        queues.unwrap_or_else(|error| lost(&error))
    }

    /// Has a program choose the queues of a TUN device, by what [`Keeper::set_owners`] says and what is
    /// written to the memory that this gives ([`wg_common::map::PEER_WORKERS`]).
    ///
    /// # Errors
    /// If the kernel has no such programs. It chooses by itself then.
    pub fn steer_tun(&self, device: u16) -> Result<SharedWords, Refusal> {
        let fd = match self.ask(&Request::SteerTun { device }) {
            (Answer::PeerWorkers, fds) => match <[OwnedFd; 1]>::try_from(fds) {
                Ok([fd]) => fd,
                Err(_) => lost(&ChannelError::Unexpected),
            },
            (Answer::Refused(refusal), _) => return Err(refusal),
            _ => lost(&ChannelError::Unexpected),
        };
        SharedWords::map(fd, PEER_WORKERS_LEN as usize).map_err(|error| Refusal {
            text: format!("mapping where peers are at home: {error}"),
            errno: error.raw_os_error(),
        })
    }

    /// Has a program choose the sockets of a device by what is written to the memory that this gives, a word for
    /// each of its `slot_count` slots ([`wg_common::map::INDEX_WORKERS`]).
    ///
    /// # Errors
    /// If the kernel has no such programs. It spreads datagrams by itself then.
    pub fn steer_sockets(&self, device: u16, slot_count: usize) -> Result<SharedWords, Refusal> {
        let fd = match self.ask(&Request::SteerSockets { device }) {
            (Answer::IndexWorkers, fds) => match <[OwnedFd; 1]>::try_from(fds) {
                Ok([fd]) => fd,
                Err(_) => lost(&ChannelError::Unexpected),
            },
            (Answer::Refused(refusal), _) => return Err(refusal),
            _ => lost(&ChannelError::Unexpected),
        };
        SharedWords::map(fd, slot_count).map_err(|error| Refusal {
            text: format!("mapping where keypairs are at home: {error}"),
            errno: error.raw_os_error(),
        })
    }

    /// Says who owns prefixes from now on: address, length, owner.
    ///
    /// # Errors
    /// What of it the kernel did not take first; it was told everything.
    ///
    /// # Panics
    /// If there are more than [`OWNERS_MAX`].
    pub fn set_owners(
        &self,
        device: u16,
        owners: Vec<(IpAddr, u8, Option<u32>)>,
    ) -> Result<(), Refusal> {
        assert!(owners.len() <= OWNERS_MAX, "they fit into a message");
        done(self.ask(&Request::SetOwners { device, owners }).0)
    }

    /// The present sockets on the listen port, with the port.
    pub fn sockets(&self, device: u16) -> (u16, Vec<UdpSockets>) {
        group(self.ask(&Request::Sockets { device })).unwrap_or_else(|refusal| lost(&refusal))
    }

    /// Opens sockets on `port`, or any if that is 0, with a mark.
    ///
    /// # Errors
    /// If the host refuses the port or the mark. The former sockets are the present ones then.
    pub fn open_sockets(
        &self,
        device: u16,
        port: u16,
        fwmark: u32,
    ) -> Result<(u16, Vec<UdpSockets>), Refusal> {
        group(self.ask(&Request::OpenSockets { device, port, fwmark }))
    }

    /// Says that nobody here uses the former sockets on this port any more.
    pub fn close_sockets(&self, device: u16, port: u16) {
        let (answer, _) = self.ask(&Request::CloseSockets { device, port });
        done(answer).unwrap_or_else(|refusal| lost(&refusal));
    }

    /// Marks what the present sockets send.
    ///
    /// # Errors
    /// If the host refuses.
    pub fn set_mark(&self, device: u16, fwmark: u32) -> Result<(), Refusal> {
        done(self.ask(&Request::SetMark { device, fwmark }).0)
    }

    /// An XSK on a queue of a NIC, in the steer program's map, with a UMEM of its own that so many can share, of
    /// which so many chunks are to be sent; and whether it is zero-copy.
    ///
    /// # Errors
    /// Why there is none.
    pub fn bind_xsk(
        &self,
        nic: &NamedNic,
        at: XskAt,
        places: (usize, u32),
    ) -> Result<(XskWithPlaces, bool), NoXsk> {
        let unbound = self.open_xsk(nic, false)?;
        // Before it is bound: later, older kernels map no rings.
        let made = Xsk::from_unbound(unbound, places, nic.ifindex, at.queue)
            .map_err(|error| NoXsk::Refused(error.to_string()))?;
        Ok((made, self.bind(nic, at, None)?))
    }

    /// As [`Keeper::bind_xsk`], with the UMEM of `other`, where there is this place.
    ///
    /// # Errors
    /// Why there is none. The place is free again, unless it was left by one that nobody can tell about.
    pub fn bind_sharing_xsk(
        &self,
        nic: &NamedNic,
        at: XskAt,
        place: Place,
        other: BorrowedFd<'_>,
    ) -> Result<(Xsk, bool), (NoXsk, Option<Place>)> {
        let unbound = match self.open_xsk(nic, true) {
            Ok(unbound) => unbound,
            Err(error) => return Err((error, Some(place))),
        };
        let xsk = Xsk::sharing(unbound, place, nic.ifindex, at.queue)
            .map_err(|(error, place)| (NoXsk::Refused(error.to_string()), Some(place)))?;
        match self.bind(nic, at, Some(other)) {
            Ok(is_zero_copy) => Ok((xsk, is_zero_copy)),
            Err(error) => Err((error, xsk.close())),
        }
    }

    fn open_xsk(&self, nic: &NamedNic, shares: bool) -> Result<Unbound, NoXsk> {
        let NamedNic { ifindex, generation, .. } = *nic;
        let (answer, fds) = self.ask(&Request::OpenXsk { ifindex, generation, shares });
        let chunk_size = match answer {
            Answer::Xsk { chunk_size } => chunk_size,
            Answer::Refused(refusal) => return Err(NoXsk::Refused(refusal.text)),
            _ => lost(&ChannelError::Unexpected),
        };
        let mut fds = fds.into_iter();
        let (Some(socket), umem) = (fds.next(), fds.next()) else {
            lost(&ChannelError::Unexpected)
        };
        if umem.is_some() == shares {
            lost(&ChannelError::Unexpected)
        }
        let options = XskOptions { chunk_size, ..XskOptions::default() };
        Ok(Unbound { socket, umem, options })
    }

    fn bind(
        &self,
        nic: &NamedNic,
        at: XskAt,
        other: Option<BorrowedFd<'_>>,
    ) -> Result<bool, NoXsk> {
        let NamedNic { ifindex, generation, .. } = *nic;
        let XskAt { queue, slot, worker } = at;
        let request = Request::BindXsk { ifindex, queue, slot, worker, generation };
        match self.try_ask(&request, other).unwrap_or_else(|error| lost(&error)).0 {
            Answer::Bound { zero_copy } => Ok(zero_copy),
            Answer::NoQueue => Err(NoXsk::NoQueue),
            Answer::CannotShare(why) => Err(NoXsk::CannotShare(why)),
            Answer::Refused(refusal) => Err(NoXsk::Refused(refusal.text)),
            _ => lost(&ChannelError::Unexpected),
        }
    }

    /// Has the keeper keep this memory for the process that follows, in place of any before.
    pub fn remember(&self, device: u16, memory: BorrowedFd<'_>) {
        let answer = self.try_ask(&Request::Remember { device }, Some(memory));
        let (answer, _) = answer.unwrap_or_else(|error| lost(&error));
        done(answer).unwrap_or_else(|refusal| lost(&refusal));
    }

    /// Says until when there are to be no keypairs, in nanoseconds of boot time; 0: there may be.
    pub fn pause_until(&self, device: u16, boot_ns: u64) {
        let (answer, _) = self.ask(&Request::PauseUntil { device, boot_ns });
        done(answer).unwrap_or_else(|refusal| lost(&refusal));
    }

    /// Asks where the name of an endpoint leads, which [`Event::Resolved`] may tell later.
    pub fn resolve(&self, device: u16, host: &str, port: u16) {
        let (answer, _) = self.ask(&Request::Resolve { device, host: host.to_owned(), port });
        done(answer).unwrap_or_else(|refusal| lost(&refusal));
    }

    /// The links by which datagrams leave, and how large they may be; `with_hops` also what is needed to send
    /// past the kernel.
    ///
    /// # Errors
    /// If the kernel does not tell the routes.
    ///
    /// # Panics
    /// If there are more than [`LINKS_MAX`].
    pub fn links_towards(
        &self,
        mark: u32,
        with_hops: bool,
        towards: Vec<Towards>,
    ) -> Result<Vec<Option<LinkTowards>>, Refusal> {
        let count = towards.len();
        assert!(count <= LINKS_MAX, "they fit into a message");
        match self.ask(&Request::LinksTowards { mark, with_hops, towards }).0 {
            Answer::Links(links) if links.len() == count => Ok(links),
            Answer::Refused(refusal) => Err(refusal),
            _ => lost(&ChannelError::Unexpected),
        }
    }

    /// What the steer program counted; nothing if there is none, or the kernel does not tell.
    pub fn steer_counters(&self) -> Option<SteerCounters> {
        match self.ask(&Request::SteerCounters).0 {
            Answer::Counters(counts) => SteerCounters::from_counts(&counts),
            Answer::Refused(refusal) => {
                tracing::warn!(error = %refusal, "no counters of the kernel side");
                None
            }
            _ => lost(&ChannelError::Unexpected),
        }
    }

    /// A connection to the service that knows peers.
    ///
    /// # Errors
    /// If there is none to be had.
    pub fn connect_peer_source(&self) -> io::Result<OwnedFd> {
        match self.ask(&Request::ConnectPeerSource) {
            (Answer::Connected, fds) => {
                fds.into_iter().next().ok_or_else(|| io::ErrorKind::InvalidData.into())
            }
            (Answer::Refused(refusal), _) => Err(io::Error::other(refusal.text)),
            _ => lost(&ChannelError::Unexpected),
        }
    }

    /// Says that wg(8) is answered.
    pub fn ready(&self) {
        done(self.ask(&Request::Ready).0).unwrap_or_else(|refusal| lost(&refusal));
    }

    /// Answers a ping.
    pub fn alive(&self) {
        done(self.ask(&Request::Alive).0).unwrap_or_else(|refusal| lost(&refusal));
    }
}

/// The keeper is gone, or makes no sense.
fn lost(error: &dyn std::fmt::Display) -> ! {
    tracing::error!(%error, "no answer from the keeper: this process ends");
    std::process::exit(1)
}

fn done(answer: Answer) -> Result<(), Refusal> {
    match answer {
        Answer::Done => Ok(()),
        Answer::Refused(refusal) => Err(refusal),
        _ => lost(&ChannelError::Unexpected),
    }
}

fn group((answer, fds): (Answer, Vec<OwnedFd>)) -> Result<(u16, Vec<UdpSockets>), Refusal> {
    let (port, has_v6) = match answer {
        Answer::Sockets { port, has_v6 } => (port, has_v6),
        Answer::Refused(refusal) => return Err(refusal),
        _ => lost(&ChannelError::Unexpected),
    };
    let sockets = fds.into_iter().map(UdpSocket::from_fd).collect::<Result<Vec<_>, _>>();
    let mut v4 = sockets.unwrap_or_else(|error| lost(&error));
    let count = if has_v6 { v4.len() / 2 } else { v4.len() };
    let mut v6 = v4.split_off(count).into_iter();
    let group = v4.into_iter().map(|v4| UdpSockets { v4, v6: v6.next() }).collect();
    Ok((port, group))
}

/// What the keeper tells.
#[derive(Debug)]
pub struct Events {
    socket: UnixDatagram,
}

impl Events {
    /// The keeper's events, which come from `socket`.
    ///
    /// # Errors
    /// If it cannot be waited for.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        waitable(socket).map(|socket| Self { socket })
    }

    /// Waits for the next event. Dropping the future before it is ready loses nothing.
    ///
    /// # Errors
    /// If the keeper is gone.
    pub async fn next(&self) -> Result<Event, ChannelError> {
        receive_async(&self.socket).await.map(|(event, _)| event)
    }
}

/// A socket of packets that can be waited for. (tokio has no name for this kind; it looks at the
/// readiness alone.)
pub(super) fn waitable(socket: OwnedFd) -> io::Result<UnixDatagram> {
    let socket = std::os::unix::net::UnixDatagram::from(socket);
    socket.set_nonblocking(true)?;
    UnixDatagram::from_std(socket)
}

/// Waits for a message.
pub(super) async fn receive_async<M: serde::de::DeserializeOwned>(
    socket: &UnixDatagram,
) -> Result<(M, Vec<OwnedFd>), ChannelError> {
    let received = socket
        .async_io(Interest::READABLE, || match receive(socket) {
            Err(ChannelError::Io(error)) => Err(error),
            other => Ok(other),
        })
        .await;
    received.map_err(ChannelError::Io)?
}
