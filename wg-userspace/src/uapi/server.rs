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
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rustix::fs::{CWD, FlockOperation, Mode, RenameFlags, fchmod, flock, renameat_with};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::UnixListener;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::memory::Memory;
use super::places::{self, Places};
use super::{EndpointName, Errno, GetCursor, SOCKET_DIR, client};
use crate::device::SetRequest;

/// Who carries out what wg(8) asks for.
pub trait Handler {
    /// The next lines that answer `get=1`, without `errno`: see
    /// [`format_get_part`](super::format_get_part). Others may change the device between two parts.
    fn get_part(&self, cursor: &mut GetCursor) -> Option<Zeroizing<String>>;

    /// Changes the device. Nobody sees it half changed.
    ///
    /// # Errors
    /// What wg(8) is told. Nothing may have changed then.
    fn set(&self, request: SetRequest) -> Result<(), Errno>;

    /// Replaces the list of peers whose endpoints were given as names. Where they are does not change.
    ///
    /// # Errors
    /// What the client is told. Nothing has changed then.
    fn set_names(&self, names: Vec<EndpointName>) -> Result<(), Errno>;

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
    #[error("{} is in use by another process; `tidegate show` says what it serves", .0.display())]
    Busy(PathBuf),
    /// Something that is not a socket has its name.
    #[error("{} is in the way, for it is not a socket; remove it", .0.display())]
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
        // wg(8) removes a socket on which nobody listens: it gets its name when somebody does.
        let unnamed = dir.join(format!(".{interface}.new"));
        let fd = listen(&unnamed)
            .and_then(|fd| {
                renameat_with(CWD, &unnamed, CWD, &path, RenameFlags::NOREPLACE)?;
                Ok(fd)
            })
            .inspect_err(|_| drop(fs::remove_file(&unnamed)))
            .map_err(failed("listening on", &path))?;
        let file = SocketFile::of(path.clone()).map_err(failed("listening on", &path))?;
        Ok(Self { fd, file })
    }
}

impl Listener {
    /// The socket's file.
    pub fn path(&self) -> &Path {
        &self.file.path
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
        client::links_socket();
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
    /// The handler is called on this task. While it waits, others may call it. Between two parts of a
    /// long request or answer other tasks have their turn.
    pub async fn serve<H: Handler>(self, handler: Rc<H>) -> Infallible {
        let places = Places::default();
        let memory = Memory::default();
        let mut clients = FuturesUnordered::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if places.has_room() => {
                    match accepted {
                        Ok((stream, _)) => {
                            let place = places.take(Instant::now());
                            clients.push(client::serve(stream, &*handler, &memory, place));
                        }
                        Err(error) => {
                            // Such as no descriptor left: it would be so at once again.
                            tracing::warn!(%error, "cannot accept a client of the UAPI socket");
                            tokio::time::sleep(Duration::from_millis(100)).await;
                        }
                    }
                }
                Some(()) = clients.next() => {}
                () = tokio::time::sleep(places::STALLED), if !places.has_room() => {
                    places.make_room(Instant::now());
                }
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
    // One may be left of a process that was killed. The caller's lock keeps others away.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&fd, 128)?;
    Ok(fd)
}
