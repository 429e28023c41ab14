//! A config file that gets another text: by one process at a time, and at once for whoever reads it.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::{Errno, retry_on_intr},
};

/// Keeps others who lock a config file from changing it, until it is dropped.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    /// The file, and what has stood there before it: others may wait for that one.
    files: Vec<File>,
}

impl Lock {
    /// Waits for who changes the file now.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn of(path: &Path) -> io::Result<Lock> {
        loop {
            let file = File::open(path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {
                    let path = path.display();
                    eprintln!("tidegate: waiting for another process that changes {path}");
                    retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))?;
                }
                outcome => outcome?,
            }
            let (locked, now) = (file.metadata()?, path.metadata()?);
            // Another file stands there if somebody has replaced it meanwhile.
            if (locked.dev(), locked.ino()) == (now.dev(), now.ino()) {
                return Ok(Lock { path: path.to_owned(), files: vec![file] });
            }
        }
    }

    /// Puts another text in the file's place at once, as [`replace`]; it is locked as well.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn replace(&mut self, text: &[u8]) -> io::Result<()> {
        self.files.push(put(&self.path, text)?);
        Ok(())
    }
}

/// Puts another text in a file's place at once: whoever reads it finds all of the one or of the other.
///
/// # Errors
/// If it cannot be written.
pub fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    put(path, text).map(drop)
}

/// Gives the new file, which nobody sees before it is locked.
fn put(path: &Path, text: &[u8]) -> io::Result<File> {
    // The file itself, not a link to it.
    let path = match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::path::absolute(path)?,
        path => path?,
    };
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_string_lossy();
    let folder = path.parent().ok_or(io::ErrorKind::InvalidFilename)?;
    let beside = folder.join(format!(".{name}.{}.tmp", std::process::id()));
    let written = write_beside(&path, &beside, text);
    let file = written.inspect_err(|_| drop(fs::remove_file(&beside)))?;
    File::open(folder)?.sync_all()?;
    Ok(file)
}

fn write_beside(path: &PathBuf, beside: &Path, text: &[u8]) -> io::Result<File> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(beside)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    match path.metadata() {
        Ok(before) => {
            fchown(&file, Some(before.uid()), Some(before.gid()))?;
            file.set_permissions(fs::Permissions::from_mode(before.mode() & 0o7777))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(beside, path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_behind_its_link_with_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("wg0.conf"), folder.path().join("link.conf"));
        replace(&file, b"one").unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600, "a new one is its owner's");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("wg0.conf", &link).unwrap();
        replace(&link, b"two").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"two");
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left beside it");
    }

    #[test]
    fn of_those_who_change_a_file_none_loses_what_it_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wg0.conf");
        fs::write(&path, "").unwrap();
        let append = |mark: char| {
            for _ in 0..20 {
                let mut lock = Lock::of(&path).unwrap();
                let text = fs::read_to_string(&path).unwrap();
                std::thread::yield_now();
                lock.replace(format!("{text}{mark}").as_bytes()).unwrap();
            }
        };
        let append = &append;
        std::thread::scope(|scope| {
            for mark in ['a', 'b', 'c'] {
                scope.spawn(move || append(mark));
            }
        });
        let text = fs::read_to_string(&path).unwrap();
        for mark in ['a', 'b', 'c'] {
            assert_eq!(text.matches(mark).count(), 20, "{text}");
        }
    }

    #[test]
    fn what_stands_in_the_files_place_is_locked_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wg0.conf");
        fs::write(&path, "one").unwrap();
        let is_free = || {
            let file = File::open(&path).unwrap();
            flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        };
        let mut lock = Lock::of(&path).unwrap();
        assert!(!is_free());
        for text in ["two", "three"] {
            lock.replace(text.as_bytes()).unwrap();
            assert!(!is_free(), "{text}");
        }
        drop(lock);
        assert!(is_free());
    }
}
