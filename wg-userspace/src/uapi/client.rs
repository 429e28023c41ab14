//! One client of the socket: its requests are read, and answered one after the other.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::task::yield_now;
use zeroize::Zeroizing;

use super::memory::Memory;
use super::names::{self, NamesParser};
use super::places::{Doing, Place};
use super::set::{RequestParser, SetParser, SetProblem};
use super::{Errno, GetCursor, Handler, UapiError};

/// A client that neither reads nor writes for so long is let go.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Longest line that is taken, in bytes. The protocol's longest has 79.
const LINE_LEN_MAX: usize = 1024;
/// Bytes that are read, or written, at once. Other tasks have their turn after as many.
const CHUNK_LEN: usize = 16 * 1024;
const _: () = assert!(LINE_LEN_MAX < CHUNK_LEN);

/// Answers the requests of one client until it leaves, or its place is needed.
pub async fn serve(mut stream: UnixStream, handler: &impl Handler, memory: &Memory, place: Place) {
    let (read, write) = stream.split();
    let mut client = Client { lines: Lines::new(read, &place), write, memory, place: &place };
    tokio::select! {
        biased;
        () = place.let_go() => {
            tracing::debug!("a silent client of the UAPI socket is let go for a new one");
        }
        left = client.serve(handler) => {
            // wg(8) connects and leaves without a word to see who lives, and others leave as they like.
            if let Err(error) = left {
                tracing::debug!(%error, "a client of the UAPI socket left");
            }
        }
    }
}

struct Client<'a> {
    lines: Lines<'a>,
    write: WriteHalf<'a>,
    memory: &'a Memory,
    place: &'a Place,
}

impl Client<'_> {
    async fn serve(&mut self, handler: &impl Handler) -> io::Result<()> {
        loop {
            self.place.does(Doing::Nothing);
            let is_understood = match self.lines.next().await? {
                Line::End => return Ok(()),
                Line::Text("") => continue,
                Line::Text("get=1") => {
                    self.place.does(Doing::Talking);
                    let is_all = matches!(self.lines.next().await?, Line::Text("") | Line::End);
                    if is_all {
                        self.get(handler).await?;
                        self.outcome(Ok(())).await?;
                    }
                    is_all
                }
                Line::Text("set=1") => {
                    self.place.does(Doing::Talking);
                    let outcome = self.set(handler).await?;
                    self.outcome(outcome).await?;
                    true
                }
                Line::Text(names::WORD) => {
                    self.place.does(Doing::Talking);
                    let outcome = self.set_names(handler).await?;
                    self.outcome(outcome).await?;
                    true
                }
                Line::Text("tidegate=status") => {
                    self.write(&format!("{}\n", handler.status())).await?;
                    self.outcome(Ok(())).await?;
                    true
                }
                Line::Text("tidegate=quiesce") => {
                    self.place.does(Doing::Talking);
                    let answer = match self.quiesce_time().await? {
                        Ok(time) => {
                            self.place.does(Doing::Served);
                            handler.quiesce(time).await
                        }
                        Err(errno) => Err(errno),
                    };
                    if let Ok(answer) = &answer {
                        self.write(&format!("{answer}\n")).await?;
                    }
                    self.outcome(answer.map(|_| ())).await?;
                    true
                }
                Line::Text("tidegate=resume") => {
                    self.outcome(handler.resume()).await?;
                    true
                }
                Line::Text(_) | Line::NoText => false,
            };
            if !is_understood {
                return self.outcome(Err(Errno::EPROTO)).await;
            }
        }
    }

    /// Says what the device is, as fast as the client reads.
    async fn get(&mut self, handler: &impl Handler) -> io::Result<()> {
        let mut cursor = GetCursor::default();
        while let Some(part) = handler.get_part(&mut cursor) {
            self.write(&part).await?;
        }
        Ok(())
    }

    /// Reads what follows `tidegate=quiesce`: nothing, or how many seconds it is to last.
    async fn quiesce_time(&mut self) -> io::Result<Result<Option<Duration>, Errno>> {
        let mut time = Ok(None);
        loop {
            match self.lines.next().await? {
                Line::Text("") | Line::End => return Ok(time),
                Line::Text(line) => {
                    let seconds = line.strip_prefix("seconds=").and_then(|s| s.parse::<u32>().ok());
                    time = match (time, seconds) {
                        (Ok(_), Some(seconds)) if seconds > 0 => {
                            Ok(Some(Duration::from_secs(seconds.into())))
                        }
                        _ => Err(Errno::EINVAL),
                    };
                }
                Line::NoText => time = Err(Errno::EPROTO),
            }
        }
    }

    /// Reads a request to its end, then has it carried out if all of it makes sense.
    async fn set(&mut self, handler: &impl Handler) -> io::Result<Result<(), Errno>> {
        let mut loan = self.memory.loan();
        let read = self.read(SetParser::new(interface_index), |len| loan.grow_to(len)).await?;
        Ok(match read {
            Ok(parser) => {
                self.place.does(Doing::Served);
                handler.set(parser.finish())
            }
            Err(error) => Err(refused(&error)),
        })
    }

    /// As [`set`](Self::set), for a list of names.
    async fn set_names(&mut self, handler: &impl Handler) -> io::Result<Result<(), Errno>> {
        let mut loan = self.memory.loan();
        let read = self.read(NamesParser::default(), |len| loan.grow_to(len)).await?;
        Ok(match read.and_then(NamesParser::finish) {
            Ok(names) => {
                self.place.does(Doing::Served);
                handler.set_names(names)
            }
            Err(error) => Err(refused(&error)),
        })
    }

    /// Reads a request to its end. `has_room` is asked for the memory that it takes.
    async fn read<P: RequestParser>(
        &mut self,
        mut parser: P,
        mut has_room: impl FnMut(usize) -> Result<(), SetProblem>,
    ) -> io::Result<Result<P, UapiError>> {
        let error = loop {
            let outcome = match self.lines.next().await? {
                Line::Text("") => return Ok(Ok(parser)),
                Line::End => return Ok(Err(parser.error(SetProblem::CutOff))),
                Line::Text(line) => parser.line(line),
                Line::NoText => Err(parser.error(SetProblem::NoText)),
            };
            let room = has_room(parser.memory_len()).map_err(|problem| parser.error(problem));
            if let Err(error) = outcome.and(room) {
                break error;
            }
        };
        // The rest is read all the same: wg(8) sends everything before it listens. What was
        // understood is let go of.
        drop(parser);
        while !matches!(self.lines.next().await?, Line::Text("") | Line::End) {}
        Ok(Err(error))
    }

    /// Ends an answer: errors are negative, as wg(8) and other implementations have them.
    async fn outcome(&mut self, outcome: Result<(), Errno>) -> io::Result<()> {
        let errno = outcome.err().map_or(0, |errno| -errno.raw());
        self.write(&format!("errno={errno}\n\n")).await
    }

    async fn write(&mut self, text: &str) -> io::Result<()> {
        self.place.does(Doing::Talking);
        for chunk in text.as_bytes().chunks(CHUNK_LEN) {
            in_time(self.write.write_all(chunk)).await?;
            self.place.gets_on();
            if chunk.len() == CHUNK_LEN {
                yield_now().await;
            }
        }
        Ok(())
    }
}

fn refused(error: &UapiError) -> Errno {
    tracing::warn!(%error, "refused a request of a client of the UAPI socket");
    error.errno()
}

async fn in_time<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(IDLE_MAX, work).await?
}

/// Index of an interface that an address names as its scope.
fn interface_index(name: &str) -> Option<u32> {
    rustix::net::netdevice::name_to_index(links_socket()?, name).ok()
}

/// What interfaces are looked up by. It is opened with a server: later, this process may open none.
pub fn links_socket() -> Option<&'static OwnedFd> {
    static LINKS: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let open = || {
        let flags = SocketFlags::CLOEXEC;
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None).ok()
    };
    LINKS.get_or_init(open).as_ref()
}

/// The lines that a client sends. They may hold keys, so the only copy here is wiped.
struct Lines<'a> {
    read: ReadHalf<'a>,
    place: &'a Place,
    buffer: Zeroizing<Vec<u8>>,
    /// Bytes of the buffer that were read and not given out yet.
    start: usize,
    end: usize,
}

#[derive(Debug, Eq, PartialEq)]
enum Line<'a> {
    /// Without its line break.
    Text(&'a str),
    /// Too long, or not UTF-8.
    NoText,
    /// The client sends no more; what follows the last line break is dropped.
    End,
}

impl<'a> Lines<'a> {
    fn new(read: ReadHalf<'a>, place: &'a Place) -> Self {
        Self { read, place, buffer: Zeroizing::new(vec![0; CHUNK_LEN]), start: 0, end: 0 }
    }

    async fn next(&mut self) -> io::Result<Line<'_>> {
        let mut is_too_long = false;
        let mut searched = self.start;
        loop {
            let unsearched = &self.buffer[searched..self.end];
            if let Some(len) = unsearched.iter().position(|&byte| byte == b'\n') {
                let line = self.start..searched + len;
                self.start = line.end + 1;
                if is_too_long || line.len() > LINE_LEN_MAX {
                    return Ok(Line::NoText);
                }
                return Ok(std::str::from_utf8(&self.buffer[line]).map_or(Line::NoText, Line::Text));
            }
            if self.end - self.start > LINE_LEN_MAX {
                is_too_long = true;
                self.start = self.end;
            }
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            searched = self.end;
            match in_time(self.read.read(&mut self.buffer[self.end..])).await? {
                0 => return Ok(Line::End),
                len => self.end += len,
            }
            self.place.gets_on();
            if self.end > CHUNK_LEN / 2 {
                yield_now().await;
            }
        }
    }
}
