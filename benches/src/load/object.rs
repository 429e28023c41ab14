//! The programs in the kernel, as `cargo xtask build-ebpf` made them.

use std::os::fd::AsFd as _;

use anyhow::{Context, Result, bail};
use aya::maps::Map;
use aya::{Ebpf, EbpfLoader};
use wg_userspace::sys::SharedWords;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("TIDEGATE_LOAD_OBJECT_PATH"));

/// Loads the maps and what `set` adds; the programs are loaded by who needs them.
pub fn load<'a>(set: impl FnOnce(&mut EbpfLoader<'a>)) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    set(&mut loader);
    loader
        .load(OBJECT)
        .context("loading the BPF maps; this needs root, or CAP_BPF and CAP_NET_ADMIN")
}

/// An array of this many words, mapped into our memory.
pub fn words(ebpf: &mut Ebpf, name: &str, count: usize) -> Result<SharedWords> {
    let Some(Map::Array(map)) = ebpf.take_map(name) else {
        bail!("the object has no array {name}; build it anew: `cargo xtask build-ebpf`");
    };
    SharedWords::map(map.fd().as_fd(), count)
        .with_context(|| format!("mapping the BPF array {name}"))
}
