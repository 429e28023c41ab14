//! Reads hashes of the kernel's BPF many entries at a time: a walk by buckets, which what is removed meanwhile
//! does not send back to the beginning.

use std::ffi::c_long;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

const BPF_MAP_LOOKUP_BATCH: c_long = 24;
/// Longest token by which the kernel knows where a walk is.
const TOKEN_LEN: usize = 64;
/// Fewer entries than this may not hold a bucket.
const LEAST: usize = 64;

/// `union bpf_attr`, as far as this call reads it.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// A walk through a hash.
#[derive(Debug)]
pub struct HashPages {
    map: OwnedFd,
    key_len: usize,
    value_len: usize,
    entry_count_max: usize,
    token: [u8; TOKEN_LEN],
    has_begun: bool,
    keys: Vec<u8>,
    values: Vec<u8>,
}

impl HashPages {
    /// A walk through `map`, whose keys and values have these lengths in bytes.
    ///
    /// # Errors
    /// `InvalidInput` if they have others, or it is no map; or when descriptors are exhausted.
    pub fn new(map: BorrowedFd<'_>, key_len: usize, value_len: usize) -> io::Result<Self> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd()))?;
        let field = |name: &str| -> Option<usize> {
            let line = info.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim_start_matches(':').trim().parse().ok()
        };
        let entry_count_max = field("max_entries");
        let (Some(entry_count_max), Some(key), Some(value)) =
            (entry_count_max, field("key_size"), field("value_size"))
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // The kernel pads values of per-CPU maps; these are none.
        if (key, value) != (key_len, value_len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self {
            map: map.try_clone_to_owned()?,
            key_len,
            value_len,
            entry_count_max,
            token: [0; TOKEN_LEN],
            has_begun: false,
            keys: Vec::new(),
            values: Vec::new(),
        })
    }

    /// Most entries that the map has.
    pub fn entry_count_max(&self) -> usize {
        self.entry_count_max
    }

    /// Begins with the first bucket again.
    pub fn rewind(&mut self) {
        self.has_begun = false;
    }

    /// Gives up to `count` further entries to `each`, key and value; false if these were the last. (A bucket is
    /// never parted, so that more than 64 are always asked for.)
    ///
    /// # Errors
    /// If the kernel refuses: before 5.6 it has no such call.
    pub fn next(&mut self, count: usize, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<bool> {
        let count = count.max(LEAST);
        self.keys.resize(count * self.key_len, 0);
        self.values.resize(count * self.value_len, 0);
        let mut out = [0u8; TOKEN_LEN];
        let pointer = |bytes: *const u8| bytes.expose_provenance() as u64;
        let mut batch = Batch {
            in_batch: if self.has_begun { pointer(self.token.as_ptr()) } else { 0 },
            out_batch: pointer(out.as_mut_ptr()),
            keys: pointer(self.keys.as_mut_ptr()),
            values: pointer(self.values.as_mut_ptr()),
            count: count as u32,
            map_fd: self.map.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the attributes are a `repr(C)` struct of the length that is given. The pointers in it lead to
        // buffers of our own that outlive the call: tokens of `TOKEN_LEN` bytes, of which the kernel uses four for a
        // hash, and room for `count` keys and values of the lengths that the kernel itself said this map has.
        let outcome = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_LOOKUP_BATCH,
                std::ptr::from_mut(&mut batch),
                size_of::<Batch>(),
            )
        };
        let more = match outcome {
            0 => true,
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENOENT) => false,
                error => return Err(error),
            },
        };
        (self.token, self.has_begun) = (out, more);
        let found = (batch.count as usize).min(count);
        let keys = self.keys.chunks_exact(self.key_len);
        for (key, value) in keys.zip(self.values.chunks_exact(self.value_len)).take(found) {
            each(key, value);
        }
        Ok(more)
    }
}
