//! The socket on which wg(8) is answered.

use std::convert::Infallible;
use std::fs::{self, DirBuilder, File};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::net::{UnixListener, UnixStream};
use zeroize::Zeroizing;

use super::set::{SetParser, SetProblem};
use super::{Errno, SOCKET_DIR};
use crate::device::SetRequest;

/// Clients served at a time; more wait until one leaves.
const CLIENTS_MAX: usize = 64;
/// A client that neither reads nor writes for so long is let go.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Longest line that is taken, in bytes. The protocol's longest has 79.
const LINE_LEN_MAX: usize = 1024;
/// Bytes that are read, or written, at once.
const CHUNK_LEN: usize = 16 * 1024;
const _: () = assert!(LINE_LEN_MAX < CHUNK_LEN);

/// Who carries out what wg(8) asks for.
pub trait Handler {
    /// The lines that answer `get=1`, without `errno`: see [`format_get`](super::format_get).
    fn get(&self) -> Zeroizing<String>;

    /// Changes the device.
    ///
    /// # Errors
    /// What wg(8) is told. Nothing may have changed then.
    fn set(&self, request: SetRequest) -> Result<(), Errno>;

    /// What answers `tidegate=status`.
    fn status(&self) -> serde_json::Value;

    /// Ends every keypair and makes none for `time`, or until [`resume`](Self::resume). Answers when
    /// nothing seals any more, with what answers `tidegate=quiesce`.
    ///
    /// # Errors
    /// What the client is told.
    fn quiesce(
        &self,
        time: Option<Duration>,
    ) -> impl Future<Output = Result<serde_json::Value, Errno>>;

    /// Lets there be keypairs again.
    ///
    /// # Errors
    /// What the client is told.
    fn resume(&self) -> Result<(), Errno>;
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The name of the interface cannot be the name of a file.
    #[error("`{0}` is not the name of an interface")]
    Name(String),
    /// A process answers on the socket.
    #[error("{} is in use: another process serves this interface", .0.display())]
    Busy(PathBuf),
    /// Something that is not a socket has its name.
    #[error("{} is in the way: it is not a socket", .0.display())]
    InTheWay(PathBuf),
    /// The host refuses.
    #[error("{doing} {}", .path.display())]
    Io {
        /// What was being done with `path`.
        doing: &'static str,
        /// The socket, or its directory.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
}

/// A socket for wg(8) on which nobody answers yet.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    file: SocketFile,
}

/// Answers on a socket for wg(8).
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    /// Nothing if it is another process that removes it.
    file: Option<SocketFile>,
}

/// The file of a socket. It is removed on drop, if it is still its own.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    id: FileId,
}

/// What tells a file from another one of the same name.
type FileId = (u64, u64);

fn file_id(path: &Path) -> io::Result<FileId> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Listener {
    /// Opens the socket of an interface, where wg(8) looks for it.
    ///
    /// A socket that a dead process left is replaced.
    ///
    /// # Errors
    /// [`BindError`] says why not.
    pub fn bind(interface: &str) -> Result<Self, BindError> {
        Self::bind_in(Path::new(SOCKET_DIR), interface)
    }

    /// As [`Listener::bind`], in another directory, which is made if it is missing.
    ///
    /// # Errors
    /// [`BindError`] says why not.
    pub fn bind_in(dir: &Path, interface: &str) -> Result<Self, BindError> {
        if matches!(interface, "" | "." | "..") || interface.contains(['/', '\0']) {
            return Err(BindError::Name(interface.to_owned()));
        }
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| BindError::Io { doing, path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed("making the directory", dir))?;
        let path = dir.join(format!("{interface}.sock"));

        // Whoever finds a dead socket removes it and binds: not two at a time.
        let lock = File::open(dir).map_err(failed("opening the directory", dir))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .map_err(failed("locking the directory", dir))?;
        remove_if_dead(&path)?;
        let fd = listen(&path).map_err(failed("listening on", &path))?;
        let file = SocketFile::of(path.clone()).map_err(failed("listening on", &path))?;
        Ok(Self { fd, file })
    }
}

/// For who hands it to another process, to answer there: the file stays here.
impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Server {
    /// Opens the socket of an interface, as [`Listener::bind`]. Needs a tokio runtime around it.
    ///
    /// # Errors
    /// [`BindError`] says why not.
    pub fn bind(interface: &str) -> Result<Self, BindError> {
        Self::bind_in(Path::new(SOCKET_DIR), interface)
    }

    /// As [`Server::bind`], in another directory, which is made if it is missing.
    ///
    /// # Errors
    /// [`BindError`] says why not.
    pub fn bind_in(dir: &Path, interface: &str) -> Result<Self, BindError> {
        let Listener { fd, file } = Listener::bind_in(dir, interface)?;
        let path = file.path.clone();
        let server = Self::from_fd(fd).map_err(|source| {
            let doing = "listening on";
            BindError::Io { doing, path, source }
        })?;
        Ok(Self { file: Some(file), ..server })
    }

    /// Takes over a socket that listens already. Its file is another's to remove.
    ///
    /// Needs a tokio runtime around it.
    ///
    /// # Errors
    /// If the socket cannot be waited for.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        LINKS.get_or_init(links_socket);
        let listener = StdListener::from(fd);
        listener.set_nonblocking(true)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, file: None })
    }

    /// The socket's file, if it is this server's.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }

    /// Answers clients until it is dropped, several at a time.
    ///
    /// The handler is called on this task. While it waits, others may call it.
    pub async fn serve<H: Handler>(self, handler: Rc<H>) -> Infallible {
        let mut clients = FuturesUnordered::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if clients.len() < CLIENTS_MAX => {
                    match accepted {
                        Ok((stream, _)) => clients.push(serve_client(stream, &*handler)),
                        Err(error) => {
                            // Such as no descriptor left: it would be so at once again.
                            tracing::warn!(%error, "cannot accept a client of the UAPI socket");
                            tokio::time::sleep(Duration::from_millis(100)).await;
                        }
                    }
                }
                Some(()) = clients.next() => {}
            }
        }
    }
}

impl SocketFile {
    fn of(path: PathBuf) -> io::Result<Self> {
        let id = file_id(&path)?;
        Ok(Self { path, id })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if file_id(&self.path).is_ok_and(|id| id == self.id)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the UAPI socket");
        }
    }
}

/// Removes a socket on which nobody listens.
fn remove_if_dead(path: &Path) -> Result<(), BindError> {
    let failed = |doing| move |source| BindError::Io { doing, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("looking at")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::InTheWay(path.to_owned()));
        }
        Ok(_) => {}
    }
    match StdStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("removing the dead socket"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // It connects, or it is too busy to.
        _ => Err(BindError::Busy(path.to_owned())),
    }
}

/// A socket that listens at `path` and belongs to its owner only, from the first moment on.
fn listen(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The file gets the mode of the socket: Linux, unix_bind_bsd.
    fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&fd, 128)?;
    Ok(fd)
}

/// Answers the requests of one client until it leaves.
async fn serve_client(mut stream: UnixStream, handler: &impl Handler) {
    let (read, write) = stream.split();
    let mut client = Client { lines: Lines::new(read), write };
    // wg(8) connects and leaves without a word to see who lives, and others leave as they like.
    if let Err(error) = client.serve(handler).await {
        tracing::debug!(%error, "a client of the UAPI socket left");
    }
}

struct Client<'a> {
    lines: Lines<'a>,
    write: WriteHalf<'a>,
}

impl Client<'_> {
    async fn serve(&mut self, handler: &impl Handler) -> io::Result<()> {
        loop {
            let is_understood = match self.lines.next().await? {
                Line::End => return Ok(()),
                Line::Text("") => continue,
                Line::Text("get=1") => {
                    let is_all = matches!(self.lines.next().await?, Line::Text("") | Line::End);
                    if is_all {
                        self.write(&handler.get()).await?;
                        self.outcome(Ok(())).await?;
                    }
                    is_all
                }
                Line::Text("set=1") => {
                    let outcome = self.set(handler).await?;
                    self.outcome(outcome).await?;
                    true
                }
                Line::Text("tidegate=status") => {
                    self.write(&format!("{}\n", handler.status())).await?;
                    self.outcome(Ok(())).await?;
                    true
                }
                Line::Text("tidegate=quiesce") => {
                    let answer = match self.quiesce_time().await? {
                        Ok(time) => handler.quiesce(time).await,
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
        let mut parser = SetParser::new(interface_index);
        let mut refused = None;
        loop {
            let outcome = match self.lines.next().await? {
                Line::Text("") => break,
                Line::End => {
                    refused.get_or_insert_with(|| parser.error(SetProblem::CutOff));
                    break;
                }
                // The rest is read all the same: wg(8) sends everything before it listens.
                _ if refused.is_some() => continue,
                Line::Text(line) => parser.line(line),
                Line::NoText => Err(parser.error(SetProblem::NoText)),
            };
            refused = outcome.err();
        }
        Ok(match refused {
            Some(error) => {
                tracing::warn!(%error, "refused a request of a client of the UAPI socket");
                Err(error.errno())
            }
            None => handler.set(parser.finish()),
        })
    }

    /// Ends an answer: errors are negative, as wg(8) and other implementations have them.
    async fn outcome(&mut self, outcome: Result<(), Errno>) -> io::Result<()> {
        let errno = outcome.err().map_or(0, |errno| -errno.raw());
        self.write(&format!("errno={errno}\n\n")).await
    }

    async fn write(&mut self, text: &str) -> io::Result<()> {
        for chunk in text.as_bytes().chunks(CHUNK_LEN) {
            in_time(self.write.write_all(chunk)).await?;
        }
        Ok(())
    }
}

async fn in_time<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(IDLE_MAX, work).await?
}

/// Index of an interface that an address names as its scope.
fn interface_index(name: &str) -> Option<u32> {
    let socket = LINKS.get_or_init(links_socket).as_ref()?;
    rustix::net::netdevice::name_to_index(socket, name).ok()
}

/// What interfaces are looked up by. It is opened with a server: later, this process may open none.
static LINKS: OnceLock<Option<OwnedFd>> = OnceLock::new();

fn links_socket() -> Option<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None).ok()
}

/// The lines that a client sends. They may hold keys, so the only copy here is wiped.
struct Lines<'a> {
    read: ReadHalf<'a>,
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
    fn new(read: ReadHalf<'a>) -> Self {
        Self { read, buffer: Zeroizing::new(vec![0; CHUNK_LEN]), start: 0, end: 0 }
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
        }
    }
}
