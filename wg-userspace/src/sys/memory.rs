//! Memory that comes in whole pages: our own, or shared with the kernel or another process.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// A mapping of zeroed or shared pages, given back when dropped.
///
/// It hands out a pointer, not a slice: whether references may be made is for the owner to know,
/// since the kernel or another process may write to a shared mapping.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a `Memory` is an address range that stays mapped until it is dropped, from whatever
// thread that happens; it has no other state. All access goes through raw pointers, and whoever
// follows them answers for races.
unsafe impl Send for Memory {}
// SAFETY: as above; its methods only copy the two fields out.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `len` zero bytes of our own. Pages cost memory only from the first write on.
    ///
    /// # Errors
    /// `InvalidInput` if `len` is 0; otherwise when memory or address space is exhausted.
    pub fn private(len: usize) -> io::Result<Self> {
        // SAFETY: the address is null, so the kernel chooses a range that nothing else uses.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        Ok(Self::new(base, len))
    }

    /// Maps `len` bytes of `fd` from `offset` on, shared and writable.
    ///
    /// # Errors
    /// Whatever the owner of `fd` refuses with.
    pub fn shared(fd: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        // SAFETY: as in `private`. What is mapped may change at any time, which is why no
        // reference to it is made here.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                // Rings and maps are touched at once and from then on: take the page faults now.
                MapFlags::SHARED | MapFlags::POPULATE,
                fd,
                offset,
            )
        }?;
        Ok(Self::new(base, len))
    }

    fn new(base: *mut std::ffi::c_void, len: usize) -> Self {
        Self { base: NonNull::new(base.cast()).expect("a mapping is never at address 0"), len }
    }

    /// The first byte, at the start of a page.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes, as asked for: the mapping itself ends with a whole page.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by one of the constructors and is unmapped only here;
        // owners keep the `Memory` for as long as they use pointers into it.
        let result = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "the range is a whole mapping");
    }
}

/// Makes a file that lives in memory, of exactly `len` bytes for ever (its size is sealed), so that
/// who maps it can rely on every page being there. `name` shows in `/proc/PID/fd`.
///
/// # Errors
/// When memory or descriptors are exhausted.
pub fn memfd(name: &str, len: usize) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, len as u64)?;
    fcntl_add_seals(&fd, SIZE_SEALS | SealFlags::SEAL)?;
    Ok(fd)
}

/// The length of a file made by [`memfd`], here or in the process that gave it to us.
///
/// # Errors
/// `InvalidInput` if its size is not sealed: a page that vanishes under a mapping kills the process.
pub fn memfd_len(fd: impl AsFd) -> io::Result<usize> {
    let sealed = fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SIZE_SEALS));
    if !sealed {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a memfd of sealed size"));
    }
    usize::try_from(rustix::fs::fstat(&fd)?.st_size).map_err(io::Error::other)
}

/// Gives back to the host what this process has freed and its allocator keeps for later. It takes the time
/// to look at all that is free.
pub fn give_back_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` may be called at any time by any thread: it takes the allocator's own locks, and
    // touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// An array of `u64` that several threads, processes or BPF programs read and write at once: a BPF
/// array map (`BPF_F_MMAPABLE`, values of 8 bytes), or a stand-in of our own.
#[derive(Debug)]
pub struct SharedWords {
    memory: Memory,
    count: usize,
}

impl SharedWords {
    /// Maps the first `count` values of the array map `fd`.
    ///
    /// # Errors
    /// `InvalidInput` if `count` is 0; otherwise the kernel's: if the map was made without
    /// `BPF_F_MMAPABLE`, or has fewer pages of values than `count`.
    pub fn map(fd: impl AsFd, count: usize) -> io::Result<Self> {
        Ok(Self { memory: Memory::shared(fd, 0, Self::bytes(count)?)?, count })
    }

    /// `count` zeros that are shared with nobody outside this process.
    ///
    /// # Errors
    /// `InvalidInput` if `count` is 0; otherwise when memory is exhausted.
    pub fn private(count: usize) -> io::Result<Self> {
        Ok(Self { memory: Memory::private(Self::bytes(count)?)?, count })
    }

    fn bytes(count: usize) -> io::Result<usize> {
        count.checked_mul(size_of::<u64>()).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is `count * 8` bytes long, page-aligned and initialised by the
        // kernel, and lives as long as `self`. Everyone else writes it too, which atomics allow.
        // Every page is there: `private` is our own memory; a BPF array cannot shrink, and the
        // kernel refuses to map beyond its end.
        unsafe { std::slice::from_raw_parts(self.memory.base().cast().as_ptr(), self.count) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::sys::bpf_for_tests as bpf;

    #[test]
    fn words_are_seen_through_every_mapping_of_the_file() {
        let fd = memfd("tidegate-test", 4096).unwrap();
        let (a, b) = (SharedWords::map(&fd, 512).unwrap(), SharedWords::map(&fd, 512).unwrap());
        a[511].store(7, Relaxed);
        assert_eq!(b[511].load(Relaxed), 7);
        assert_eq!(b.len(), 512);
    }

    #[test]
    fn words_of_a_bpf_array_are_mapped_if_it_allows_it() {
        crate::require_root!();
        let map = bpf::array(512, true).unwrap();
        let (a, b) = (SharedWords::map(&map, 512).unwrap(), SharedWords::map(&map, 512).unwrap());
        a[511].store(7, Relaxed);
        assert_eq!(b[511].load(Relaxed), 7);
        assert!(SharedWords::map(&map, 513).is_err());
        assert!(SharedWords::map(bpf::array(512, false).unwrap(), 512).is_err());
    }

    #[test]
    fn private_words_begin_at_zero() {
        let words = SharedWords::private(3).unwrap();
        assert!(words.iter().all(|word| word.load(Relaxed) == 0));
        assert!(SharedWords::private(0).is_err());
        assert!(SharedWords::private(usize::MAX).is_err());
    }

    #[test]
    fn size_of_a_memfd_is_sealed() {
        let fd = memfd("tidegate-test", 8192).unwrap();
        assert_eq!(memfd_len(&fd).unwrap(), 8192);
        assert!(rustix::fs::ftruncate(&fd, 4096).is_err());
        assert!(rustix::fs::ftruncate(&fd, 16384).is_err());
    }

    #[test]
    fn a_file_that_may_shrink_is_refused() {
        let fd = memfd_create("tidegate-test", MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(memfd_len(&fd).is_err());
        assert!(memfd_len(tempfile::tempfile().unwrap()).is_err());
    }
}
