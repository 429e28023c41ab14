//! Has the kernel hand transport data on the listen port to the worker at which its keypair is at home.
//!
//! A program in the kernel takes the receiver index apart and looks the slot up in a table of homes, which
//! [`Shared::publish`] writes. What it does not find comes to any worker, which hands it on.

use super::status::Steering;
use crate::datapath::Shared;
use crate::keeper::Keeper;

/// Has the kernel do it, if there is anything to choose from. To be called before there are keypairs.
pub fn begin(keeper: &Keeper, shared: &Shared) -> Steering {
    if shared.workers.len() < 2 {
        return Steering::off("there is one worker");
    }
    match keeper.steer_sockets(shared.device.0, shared.slots.len()) {
        Ok(words) => {
            shared.write_index_homes_to(words);
            Steering { is_on: true, reason: None }
        }
        Err(refusal) => {
            tracing::info!(reason = %refusal, "the kernel spreads datagrams over workers by itself");
            Steering::off(refusal.text)
        }
    }
}
