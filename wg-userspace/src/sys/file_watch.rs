//! Whether a file is still there.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

/// Tells when a file is gone from where it was.
#[derive(Debug)]
pub struct FileWatch {
    inotify: AsyncFd<OwnedFd>,
    path: PathBuf,
    /// Its file system and its number there.
    file: (u64, u64),
}

impl FileWatch {
    /// Watches the file at `path`. Needs a tokio runtime around it.
    ///
    /// # Errors
    /// If it is not there, or the host watches no files.
    pub fn new(path: &Path) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // A file in use is not deleted when its last name is, but its count of names changes.
        let events = WatchFlags::ATTRIB | WatchFlags::MOVE_SELF | WatchFlags::DELETE_SELF;
        inotify::add_watch(&inotify, path, events)?;
        let file = file_at(path)?;
        // SAFETY: an owned descriptor is the same one for as long as it is owned, and the `AsyncFd`
        // owns it until it is dropped.
        let inotify = unsafe { AsyncFd::register(inotify) }?;
        Ok(Self { inotify, path: path.to_owned(), file })
    }

    /// Waits until the file is gone.
    ///
    /// # Errors
    /// If the host does not tell any more.
    pub async fn gone(&self) -> io::Result<()> {
        let mut events = [0; 4096];
        while file_at(&self.path).is_ok_and(|file| file == self.file) {
            let mut ready = self.inotify.readable().await?;
            if let Ok(read) = ready.try_io(|fd| Ok(rustix::io::read(fd, &mut events)?)) {
                read?;
            }
        }
        Ok(())
    }
}

fn file_at(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_removes_a_socket_in_use_is_noticed_and_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for moves in [false, true] {
                let path = dir.path().join(format!("{moves}.sock"));
                let _listener = UnixListener::bind(&path).unwrap();
                let watch = FileWatch::new(&path).unwrap();
                let mut gone = std::pin::pin!(watch.gone());
                fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
                drop(UnixStream::connect(&path).unwrap());
                let early = tokio::time::timeout(Duration::from_millis(20), &mut gone).await;
                assert!(early.is_err(), "it is still there");
                if moves {
                    fs::rename(&path, dir.path().join("elsewhere")).unwrap();
                } else {
                    fs::remove_file(&path).unwrap();
                }
                let told = tokio::time::timeout(Duration::from_secs(60), gone).await;
                told.expect("it is gone").unwrap();
            }
            FileWatch::new(&dir.path().join("nothing")).unwrap_err();
        });
    }
}
