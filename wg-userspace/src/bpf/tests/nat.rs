//! The programs of NAT: whether the kernel takes them. What they decide is tested in `wg_common::nat::engine`.

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
