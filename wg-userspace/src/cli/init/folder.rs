//! Files with secrets, each in a new folder: all of them or none, and nothing of anybody else's is
//! touched.
//!
//! Everything is written into a folder with a name of its own first, and moved to its place when it
//! is whole. Whoever may write in the parent folder can be no reason for a key to be read: folders
//! are 0700 from the start, opened without following links, and have to be ours.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::fs::DirBuilderExt as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use rand_core::CryptoRng;
use rustix::{
    fs::{AtFlags, Mode, OFlags, RenameFlags},
    io::Errno,
};
use zeroize::Zeroizing;

use crate::cli::{Code, Failure};

/// A file of a folder of its own.
#[derive(Debug)]
pub struct NewFile {
    /// The folder's name.
    pub folder: String,
    /// The file's name.
    pub name: String,
    /// What is in it.
    pub text: Zeroizing<String>,
}

/// Writes the files, each into a new folder of `parent`, which is made if need be.
///
/// # Errors
/// If one of the folders is there already, or something cannot be written. Then nothing is.
pub fn write(
    parent: &Path,
    files: &[NewFile],
    rng: &mut (impl CryptoRng + ?Sized),
) -> Result<(), Failure> {
    let parent = Parent::open(parent)?;
    let written = Staged::write(&parent, files, rng).and_then(|staged| staged.publish());
    if written.is_err() {
        parent.forget();
    }
    written
}

/// The folder in which all others are made.
struct Parent {
    path: PathBuf,
    fd: OwnedFd,
    /// Folders that were made on the way to it, from below.
    made: Vec<PathBuf>,
}

impl Parent {
    fn open(path: &Path) -> Result<Parent, Failure> {
        let missing = path.ancestors().filter(|at| !at.as_os_str().is_empty() && !at.exists());
        let made: Vec<PathBuf> = missing.map(Path::to_owned).collect();
        let doing = || format!("making {}", path.display());
        DirBuilder::new().recursive(true).mode(0o700).create(path).with_context(doing)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .with_context(|| format!("opening {}", path.display()))?;
        Ok(Parent { path: path.to_owned(), fd, made })
    }

    /// Removes what was made, as far as it is empty.
    fn forget(&self) {
        for made in &self.made {
            if fs::remove_dir(made).is_err() {
                break;
            }
        }
    }

    fn path_of(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }
}

/// All files, whole, but not where they belong yet.
struct Staged<'a> {
    parent: &'a Parent,
    files: &'a [NewFile],
    /// The folder in which they are, and its name.
    fd: OwnedFd,
    name: String,
}

impl<'a> Staged<'a> {
    fn write(
        parent: &'a Parent,
        files: &'a [NewFile],
        rng: &mut (impl CryptoRng + ?Sized),
    ) -> Result<Self, Failure> {
        let is_there = |file: &&NewFile| {
            rustix::fs::statat(&parent.fd, &file.folder, AtFlags::SYMLINK_NOFOLLOW).is_ok()
        };
        let there: Vec<_> =
            files.iter().filter(is_there).map(|file| parent.path_of(&file.folder)).collect();
        if !there.is_empty() {
            return Err(taken(&there));
        }
        let name = format!(".tidegate-init-{:016x}", rng.next_u64());
        let fd = new_folder(&parent.fd, &name)
            .with_context(|| format!("making a folder in {}", parent.path.display()))?;
        // From here on, it is removed whatever happens.
        let staged = Staged { parent, files, fd, name };
        for file in files {
            staged.write_one(file).with_context(|| {
                format!("writing {}", parent.path.join(&file.folder).join(&file.name).display())
            })?;
        }
        Ok(staged)
    }

    fn write_one(&self, file: &NewFile) -> io::Result<()> {
        let folder = new_folder(&self.fd, &file.folder)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&folder, &file.name, flags, Mode::RUSR | Mode::WUSR)?;
        let mut out = File::from(fd);
        out.write_all(file.text.as_bytes())?;
        out.sync_all()?;
        Ok(rustix::fs::fsync(&folder)?)
    }

    /// Moves all folders to their places, or none.
    fn publish(self) -> Result<(), Failure> {
        let (ours, theirs) = (&self.fd, &self.parent.fd);
        for (at, file) in self.files.iter().enumerate() {
            let Err(error) = move_folder(ours, theirs, &file.folder) else { continue };
            for moved in &self.files[..at] {
                // What cannot be moved back stays, and is whole.
                let _ = move_folder(theirs, ours, &moved.folder);
            }
            let path = self.parent.path_of(&file.folder);
            return Err(match error {
                Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR => taken(&[path]),
                error => anyhow::Error::new(error).context(format!("making {path}")).into(),
            });
        }
        rustix::fs::fsync(theirs)
            .with_context(|| format!("writing {}", self.parent.path.display()))?;
        Ok(())
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        for file in self.files {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            if let Ok(folder) = rustix::fs::openat(&self.fd, &file.folder, flags, Mode::empty()) {
                let _ = rustix::fs::unlinkat(&folder, &file.name, AtFlags::empty());
                let _ = rustix::fs::unlinkat(&self.fd, &file.folder, AtFlags::REMOVEDIR);
            }
        }
        let _ = rustix::fs::unlinkat(&self.parent.fd, &self.name, AtFlags::REMOVEDIR);
    }
}

/// Makes a folder that only we may read, and opens it.
fn new_folder(parent: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
    rustix::fs::mkdirat(parent, name, Mode::RWXU)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    // Somebody who may write in the parent could have put another one in its place.
    let stat = rustix::fs::fstat(&fd)?;
    let is_ours = stat.st_uid == rustix::process::geteuid().as_raw()
        && !Mode::from_raw_mode(stat.st_mode).intersects(Mode::RWXG | Mode::RWXO);
    match is_ours {
        true => Ok(fd),
        false => Err(io::Error::other(format!("`{name}` was replaced by somebody"))),
    }
}

/// Moves a folder, if nothing has its name there.
fn move_folder(from: &OwnedFd, to: &OwnedFd, name: &str) -> rustix::io::Result<()> {
    match rustix::fs::renameat_with(from, name, to, name, RenameFlags::NOREPLACE) {
        // Not all file systems have it. Without it, a folder replaces an empty folder only.
        Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::renameat(from, name, to, name),
        result => result,
    }
}

fn taken(paths: &[String]) -> Failure {
    let (verb, what) = if paths.len() == 1 { ("is", "it") } else { ("are", "them") };
    Failure::new(
        Code::Existence,
        format_args!(
            "{} {verb} there already, and nothing was written; name another folder, or move {what} \
             away",
            paths.join(", ")
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::sys::random::Rng;

    fn files(folders: &[&str]) -> Vec<NewFile> {
        let file = |folder: &&str| NewFile {
            folder: (*folder).to_owned(),
            name: "wg0.conf".to_owned(),
            text: Zeroizing::new(format!("of {folder}")),
        };
        folders.iter().map(file).collect()
    }

    /// Everything below a folder, by its path there.
    fn all_of(folder: &Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(next) = folders.pop() {
            for entry in fs::read_dir(next).unwrap().map(Result::unwrap) {
                found.push(entry.path().strip_prefix(folder).unwrap().display().to_string());
                if entry.file_type().unwrap().is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        found.sort();
        found
    }

    #[test]
    fn files_are_for_their_owner_alone() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("new/deep");
        write(&dir, &files(&["a", "b"]), &mut Rng).unwrap_or_else(|_| panic!("written"));
        assert_eq!(all_of(&dir), ["a", "a/wg0.conf", "b", "b/wg0.conf"]);
        let mode = |path: &str| fs::metadata(dir.join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!([mode(""), mode("a"), mode("b/wg0.conf")], [0o700, 0o700, 0o600]);
        assert_eq!(fs::read_to_string(dir.join("b/wg0.conf")).unwrap(), "of b");
    }

    #[test]
    fn what_is_there_stays_and_nothing_is_put_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = root.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        type Make = fn(&Path, &Path);
        let obstacles: [Make; 4] = [
            |at, _| fs::create_dir(at).unwrap(),
            |at, _| fs::write(at, "mine").unwrap(),
            |at, elsewhere| symlink(elsewhere, at).unwrap(),
            |at, _| symlink("nowhere", at).unwrap(),
        ];
        for (number, make) in obstacles.into_iter().enumerate() {
            let dir = root.path().join(number.to_string());
            fs::create_dir(&dir).unwrap();
            make(&dir.join("b"), &elsewhere);
            let before = all_of(&dir);
            let failure = write(&dir, &files(&["a", "b", "c"]), &mut Rng).err().unwrap();
            let (code, line) = failure.into_line();
            assert_eq!(code, Code::Existence as u8, "{line}");
            assert!(line.contains("/b is there already, and nothing was written"), "{line}");
            assert_eq!(all_of(&dir), before);
        }
        assert_eq!(all_of(&elsewhere), [""; 0]);
    }

    /// Somebody makes a folder between the look and the last step.
    #[test]
    fn a_folder_that_appears_meanwhile_stays_and_all_else_goes() {
        let root = tempfile::tempdir().unwrap();
        let parent = Parent::open(root.path()).unwrap_or_else(|_| panic!("it is there"));
        let files = files(&["a", "b", "c"]);
        let Ok(staged) = Staged::write(&parent, &files, &mut Rng) else { panic!("staged") };
        fs::create_dir(root.path().join("c")).unwrap();
        assert!(staged.publish().is_err());
        assert_eq!(all_of(root.path()), ["c"]);
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("new/deep");
        let mut files = files(&["a", "b"]);
        // No name of a file may be so long.
        files[1].name = "x".repeat(300);
        assert!(write(&dir, &files, &mut Rng).is_err());
        assert_eq!(all_of(root.path()), [""; 0]);
    }
}
