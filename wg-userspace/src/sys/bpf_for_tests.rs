//! As much of the `bpf` system call as tests of these rooms need: the kernel's half of a mapped array
//! and of an XSK, without the object that `bpf` loads.

use std::ffi::c_long;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const BPF_MAP_CREATE: c_long = 0;
const BPF_MAP_UPDATE_ELEM: c_long = 2;
const BPF_PROG_LOAD: c_long = 5;
const BPF_LINK_CREATE: c_long = 28;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_MAP_TYPE_XSKMAP: u32 = 17;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const XDP_PASS: i32 = 2;

/// Attached until dropped.
pub(crate) struct Redirect {
    map: OwnedFd,
    _link: OwnedFd,
}

impl Redirect {
    /// Loads a program of six instructions that gives each packet to its queue's XSK, and attaches it to `ifindex` in native mode.
    pub(crate) fn attach(ifindex: u32) -> io::Result<Self> {
        // map_type, key_size, value_size, max_entries
        let map = bpf(BPF_MAP_CREATE, words(&[BPF_MAP_TYPE_XSKMAP, 4, 4, 16]))?;
        let instruction = |op: u8, registers: u8, offset: i16, immediate: i32| {
            let mut bytes = [0; 8];
            bytes[0] = op;
            bytes[1] = registers;
            bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
            bytes[4..].copy_from_slice(&immediate.to_ne_bytes());
            bytes
        };
        let program = [
            instruction(0x61, 0x12, 16, 0), // r2 = ctx->rx_queue_index
            instruction(0x18, 0x11, 0, map.as_raw_fd()), // r1 = map
            instruction(0, 0, 0, 0),
            instruction(0xb7, 0x03, 0, XDP_PASS), // r3 = XDP_PASS
            instruction(0x85, 0, 0, 51),          // call bpf_redirect_map
            instruction(0x95, 0, 0, 0),           // exit
        ];
        let license = c"MIT";
        let mut load = words(&[BPF_PROG_TYPE_XDP, program.len() as u32]);
        load[1] = program.as_ptr().expose_provenance() as u64;
        load[2] = license.as_ptr().expose_provenance() as u64;
        let program = bpf(BPF_PROG_LOAD, load)?;
        let link = [program.as_raw_fd() as u32, ifindex, BPF_XDP, XDP_FLAGS_DRV_MODE];
        let link = bpf(BPF_LINK_CREATE, words(&link))?;
        Ok(Self { map, _link: link })
    }

    /// Gives the packets of `queue` to `xsk`.
    pub(crate) fn set(&self, queue: u32, xsk: impl AsFd) -> io::Result<()> {
        let value = xsk.as_fd().as_raw_fd();
        let mut update = words(&[self.map.as_raw_fd() as u32]);
        update[1] = (&raw const queue).expose_provenance() as u64;
        update[2] = (&raw const value).expose_provenance() as u64;
        // SAFETY: the attribute names a key and a value of four bytes each, as the map has
        // them, which outlive the call.
        let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_UPDATE_ELEM, &update, 128_u32) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// An array map of `count` values of 8 bytes, which may be mapped or not.
pub(crate) fn array(count: u32, mappable: bool) -> io::Result<OwnedFd> {
    let flags = if mappable { BPF_F_MMAPABLE } else { 0 };
    bpf(BPF_MAP_CREATE, words(&[BPF_MAP_TYPE_ARRAY, 4, 8, count, flags]))
}

/// An attribute of the system call that begins with these fields.
fn words(halves: &[u32]) -> [u64; 16] {
    let mut words = [0; 16];
    for (word, pair) in words.iter_mut().zip(halves.chunks(2)) {
        let mut bytes = [0; 8];
        for (to, from) in bytes.chunks_mut(4).zip(pair) {
            to.copy_from_slice(&from.to_ne_bytes());
        }
        *word = u64::from_ne_bytes(bytes);
    }
    words
}

fn bpf(command: c_long, attribute: [u64; 16]) -> io::Result<OwnedFd> {
    // SAFETY: the attribute is 128 bytes long; the pointers that `attach` puts into it outlive
    // the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, &attribute, 128_u32) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: these commands give a new descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
