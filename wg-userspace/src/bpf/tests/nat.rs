//! The programs of NAT in the kernel: tables of packets in and packets out, and lives of a gateway in which the kernel
//! must do what the engine does over tables in memory. What the engine decides is tested in `wg_common::nat::engine`,
//! too, and by the fuzz target `nat_flows`, whose packets and tables these are.

mod devices;
mod lab;
mod lives;
mod tables;

#[path = "../../../tests/fuzz/targets/nat_flows/life.rs"]
mod life;
#[path = "../../../tests/fuzz/targets/nat_flows/memory.rs"]
mod memory;
#[path = "../../../tests/fuzz/targets/nat_flows/packets.rs"]
mod packets;

use crate::bpf::{BpfError, Nat, NatOptions};
use crate::require_root;
use crate::sys::netns::report_skipped;

#[test]
fn the_kernel_takes_the_programs() {
    require_root!();
    match Nat::load(NatOptions::default()) {
        Ok(nat) => {
            assert_eq!(nat.attached().count(), 0);
            assert_eq!(nat.flows().count(), 0);
            assert!(nat.free_port(0, 7) && nat.free_port_count(0) == 1);
        }
        Err(error @ BpfError::NotPermitted) => {
            report_skipped("the_kernel_takes_the_programs", &error.to_string());
        }
        Err(error) => panic!("{error}"),
    }
}
