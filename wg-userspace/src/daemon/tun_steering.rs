//! Has the kernel hand packets out of the TUN device to the worker at which their peer is at home.
//!
//! A program in the kernel looks the destination up among the allowed IPs of its own, and the owner in
//! [`Shared`]'s table of homes. Workers and handshakes write that table; the allowed IPs go to the keeper
//! from here, some at a time: until it has them all, packets come to whichever worker, which seals them as
//! well.

use std::cell::RefCell;
use std::time::Duration;

use ipnet::IpNet;
use wg_common::id::PeerId;
use wg_common::time::Now;

use super::control::Control;
use super::status;
use crate::datapath::Shared;
use crate::keeper::Keeper;
use crate::keeper::protocol::OWNERS_MAX;

/// How often owners are told while there are more than can be told at once: between, there is time for
/// everything else.
const TELL_EVERY: Duration = Duration::from_millis(2);

/// Whether the kernel chooses TUN queues by what is told here.
pub struct TunSteering {
    is_on: bool,
    /// Why not, or what it does not know.
    reason: RefCell<Option<String>>,
}

impl TunSteering {
    /// Has the kernel do it, if there is anything to choose from.
    pub fn begin(keeper: &Keeper, shared: &Shared) -> Self {
        if shared.workers.len() < 2 {
            return Self::off("there is one worker");
        }
        match keeper.steer_tun(shared.device.0) {
            Ok(words) => {
                shared.write_homes_to(words);
                Self { is_on: true, reason: RefCell::default() }
            }
            Err(refusal) => {
                tracing::info!(reason = %refusal, "the kernel chooses TUN queues by itself");
                Self::off(refusal.text)
            }
        }
    }

    /// The kernel does it in its own way.
    pub fn off(reason: impl Into<String>) -> Self {
        Self { is_on: false, reason: RefCell::new(Some(reason.into())) }
    }

    /// Whether it is so.
    pub const fn is_on(&self) -> bool {
        self.is_on
    }

    /// As `show` tells it.
    pub fn status(&self) -> status::Steering {
        status::Steering { is_on: self.is_on, reason: self.reason.borrow().clone() }
    }

    fn refused(&self, refusal: &dyn std::fmt::Display) {
        let text = format!("some prefixes are not known to it: {refusal}");
        let before = self.reason.replace(Some(text));
        // Once, not for each of a million.
        if before.is_none() {
            tracing::warn!(error = %refusal, "packets to some prefixes come to any worker");
        }
    }
}

/// A prefix and its owner, as the keeper is told.
type Owner = (std::net::IpAddr, u8, Option<u32>);

fn owner((net, peer): (IpNet, Option<PeerId>)) -> Owner {
    (net.addr(), net.prefix_len(), peer.map(|peer| peer.0))
}

impl Control {
    /// Has the kernel choose TUN queues as `steering` says. To be called before there are peers.
    #[must_use]
    pub fn with_tun_steering(mut self, steering: TunSteering) -> Self {
        if steering.is_on() {
            self.device.borrow_mut().note_owner_changes();
        }
        self.tun_steering = steering;
        self
    }

    /// Tells the keeper of some prefixes that have changed hands.
    pub(super) fn owners_tick(&self) {
        let Some(keeper) = &self.keeper else { return };
        let changes = self.device.borrow_mut().take_owner_changes(OWNERS_MAX);
        if changes.is_empty() {
            return;
        }
        let owners = changes.into_iter().map(owner).collect();
        if let Err(refusal) = keeper.set_owners(self.shared.device.0, owners) {
            self.tun_steering.refused(&refusal);
        }
    }

    /// Tells the keeper who owns what, from the beginning, and from now on what changes.
    pub(super) fn tell_owners(&self) {
        self.device.borrow_mut().note_all_owners();
        while self.device.borrow().allowed_ips().has_changes() {
            self.owners_tick();
        }
    }

    /// When [`owners_tick`](Self::owners_tick) has something to do, if the last tick was at `ticked`.
    pub(super) fn owners_due(&self, ticked: Now) -> Option<Now> {
        let has_changes = self.device.borrow().allowed_ips().has_changes();
        has_changes.then(|| ticked + TELL_EVERY)
    }
}
