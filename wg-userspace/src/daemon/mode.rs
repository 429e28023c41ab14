//! Which back end moves datagrams.

use std::cell::RefCell;
use std::rc::Rc;

use super::status;
use crate::keeper::choice::By;

/// Which back end to use.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    PartialEq,
    clap::ValueEnum,
    serde::Deserialize,
    serde::Serialize,
)]
pub enum Mode {
    /// What works best on each of the NICs that were named: zero-copy on queues that are for our port alone,
    /// else AF_XDP for receiving, else sockets; sockets on a veth.
    #[default]
    Auto,
    /// AF_XDP without copies on the NICs that were named, or none of it.
    #[value(name = "zerocopy")]
    ZeroCopy,
    /// AF_XDP for receiving on the NICs that were named, sockets for sending.
    Native,
    /// Sockets only.
    Udp,
}

/// The back ends in use, which every device shows. They change when NICs do.
pub type InUse = Rc<RefCell<BackEnds>>;

/// The back ends in use, and why.
#[derive(Clone, Debug, Default)]
pub struct BackEnds {
    /// Of each NIC that was named.
    pub nics: Vec<status::Nic>,
    /// Why it is so, all in all.
    pub reason: String,
}

impl BackEnds {
    /// The best back end that receives anywhere, as options name it.
    pub fn name(&self) -> &'static str {
        let receives = |by| self.nics.iter().any(|nic| nic.receive == by);
        if receives(By::ZeroCopy) {
            "zerocopy"
        } else if receives(By::Copy) {
            "native"
        } else {
            "udp"
        }
    }

    /// What these NICs come to.
    pub fn new(asked: Mode, nics: Vec<status::Nic>) -> Self {
        let (on, off): (Vec<_>, Vec<_>) = nics.iter().partition(|nic| nic.queues > 0);
        let on: Vec<String> =
            on.iter().map(|nic| format!("{} (queues: {})", nic.name, nic.queues)).collect();
        let off: Vec<String> =
            off.iter().map(|nic| format!("{}: {}", nic.name, nic.reason)).collect();
        let reason = if asked == Mode::Udp {
            "asked for".to_owned()
        } else if nics.is_empty() {
            "no NIC was named for XDP".to_owned()
        } else if on.is_empty() {
            off.join("; ")
        } else {
            let off = off.iter().map(|nic| format!("; not on {nic}"));
            std::iter::once(format!("XSKs on {}", on.join(", "))).chain(off).collect()
        };
        Self { nics, reason }
    }
}
