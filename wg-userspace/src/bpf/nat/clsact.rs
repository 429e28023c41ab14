//! Programs of NAT as filters of clsact qdiscs, on kernels before 6.6. They outlive whoever attached them: so they can
//! be told from others', and whose they are.
//!
//! A filter of ours has the priority [`PRIORITY`], the name of one of the programs, and as its handle the index of
//! the TUN device. It goes when there is no such device any more. Its highest bit says that the qdisc is ours, too,
//! and goes with the last filter; whoever comes second to a qdisc that is so marked marks it as well.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use aya::programs::SchedClassifier;
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcAttachType, TcHandle};
use rustix::fs::{FlockOperation, flock};
use wg_common::nat::map::{NIC_PROGRAM, TUN_PROGRAM};

use super::super::error::NatAttachError;
use crate::sys::clsact::{self, Filter};
use crate::sys::link;

/// Before all others, unless somebody else has chosen it as well.
const PRIORITY: u16 = 1;
const KIND: &str = "bpf";
/// In a handle: who made the filter, or who made one beside it, made the qdisc.
const QDISC_IS_OURS: u32 = 1 << 31;
const DIR: &str = "/run/tidegate";

/// A filter of ours at a link's ingress. Dropping it removes it, and the qdisc if that is ours and of no use any more.
pub(super) struct Attached {
    ifindex: u32,
    handle: u32,
    link: Option<SchedClassifierLink>,
}

impl Attached {
    /// Attaches a program for the TUN device with this index.
    pub(super) fn new(
        program: &mut SchedClassifier,
        interface: &str,
        ifindex: u32,
        tun: u32,
    ) -> Result<Self, NatAttachError> {
        let refused = |error| NatAttachError::of_system(interface, &error);
        let _lock = lock().map_err(refused)?;
        let is_new = clsact::add(ifindex).map_err(refused)?;
        let there = clsact::filters(ifindex).map_err(refused)?;
        if let Some(other) = there.iter().find(|filter| stands_in_the_way(filter)) {
            let (interface, kind) = (interface.to_owned(), other.kind.clone());
            return Err(NatAttachError::PriorityTaken { interface, kind });
        }
        let is_ours = is_new || there.iter().any(is_marked);
        let handle = tun | if is_ours { QDISC_IS_OURS } else { 0 };
        let attached = attach(program, interface, handle);
        if attached.is_err() && is_new {
            tidy(ifindex);
        }
        Ok(Self { ifindex, handle, link: Some(attached?) })
    }

    /// Whether it is still there: others may remove it, or the qdisc with all of its filters.
    pub(super) fn is_there(&self) -> bool {
        // If that is not known, it is as it was.
        clsact::filters(self.ifindex).map_or(true, |there| {
            there.iter().any(|filter| is_ours(filter) && filter.handle == self.handle)
        })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _lock = lock();
        drop(self.link.take());
        if self.handle & QDISC_IS_OURS != 0 {
            tidy(self.ifindex);
        }
    }
}

fn attach(
    program: &mut SchedClassifier,
    interface: &str,
    handle: u32,
) -> Result<SchedClassifierLink, NatAttachError> {
    let failed = |error| NatAttachError::new(interface, error);
    let options =
        NlOptions { priority: PRIORITY, handle: TcHandle::from(handle), ..NlOptions::default() };
    let id = program
        .attach_with_options(interface, TcAttachType::Ingress, TcAttachOptions::Netlink(options))
        .map_err(failed)?;
    program.take_link(id).map_err(failed)
}

/// Whether no filter of BPF can stand beside it.
fn stands_in_the_way(filter: &Filter) -> bool {
    filter.priority == PRIORITY && filter.kind != KIND
}

fn is_ours(filter: &Filter) -> bool {
    let name = filter.program.as_deref();
    filter.priority == PRIORITY
        && filter.handle != 0
        && name.is_some_and(|name| [TUN_PROGRAM, NIC_PROGRAM].contains(&name))
}

fn is_marked(filter: &Filter) -> bool {
    is_ours(filter) && filter.handle & QDISC_IS_OURS != 0
}

/// Removes the filters of processes that were killed, of this network namespace: those whose TUN device is no more, or
/// has the index of `tun`, which is new. Says how many there were.
///
/// # Errors
/// If the kernel does not tell of filters, or keeps one.
pub fn remove_left_overs(tun: Option<u32>) -> io::Result<usize> {
    let links = clsact::links()?;
    if links.is_empty() {
        return Ok(0);
    }
    let _lock = lock()?;
    let mut count = 0;
    for ifindex in links {
        let is_left = |filter: &Filter| {
            let of = filter.handle & !QDISC_IS_OURS;
            is_ours(filter) && (Some(of) == tun || !link::is_there(of))
        };
        let left: Vec<Filter> = clsact::filters(ifindex)?.into_iter().filter(is_left).collect();
        for filter in &left {
            clsact::remove(filter)?;
        }
        if left.iter().any(is_marked) {
            tidy(ifindex);
        }
        count += left.len();
    }
    Ok(count)
}

/// Takes a qdisc of ours away, if it is of no use any more.
fn tidy(ifindex: u32) {
    // It may be gone, with its link.
    if let Err(error) = clsact::remove_unused(ifindex) {
        tracing::debug!(ifindex, %error, "a clsact qdisc stays");
    }
}

/// Keeps other processes of ours from adding filters to a qdisc that is being removed.
fn lock() -> io::Result<File> {
    DirBuilder::new().recursive(true).mode(0o700).create(DIR)?;
    let path = Path::new(DIR).join("clsact.lock");
    let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}
