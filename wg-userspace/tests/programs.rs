//! Does this kernel's verifier take every program? `cargo xtask vm` asks other kernels the same.

use std::collections::BTreeMap;

use aya::programs::loaded_programs;
use wg_common::index::{IndexLayout, IndexPermutation};
use wg_userspace::bpf::{Nat, NatOptions, SocketSteering, Steer, SteerOptions, TunSteering};

/// As many characters of a name as the kernel keeps.
const KEPT: usize = 15;
const PROGRAMS: [&str; 5] = [
    wg_common::map::STEER_PROGRAM,
    wg_common::map::QUEUE_PROGRAM,
    wg_common::map::SOCKET_PROGRAM,
    wg_common::nat::map::TUN_PROGRAM,
    wg_common::nat::map::NIC_PROGRAM,
];

#[test]
fn the_kernel_takes_every_program() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED the_kernel_takes_every_program: needs root to load programs");
        return;
    }
    let indexes = IndexPermutation::new([1, 2, 3, 4], IndexLayout::DEFAULT);
    let options = SteerOptions { live_indexes: Some(1), ..SteerOptions::new(indexes) };
    let _steer = Steer::load(options).unwrap();
    let _tun_steering = TunSteering::load().unwrap();
    let _socket_steering = SocketSteering::load(indexes, 0..1).unwrap();
    let few = NatOptions { flows: 1, mappings: 1, ..NatOptions::default() };
    let _nat = Nat::load(few).unwrap();

    // Those of others go meanwhile.
    let loaded = loaded_programs().flatten();
    let verified: BTreeMap<String, Option<u32>> = loaded
        .filter_map(|program| {
            Some((program.name_as_str()?.to_owned(), program.verified_instruction_count()))
        })
        .collect();
    for program in PROGRAMS {
        let count = &verified[&program[..program.len().min(KEPT)]];
        let count = count.map_or_else(|| "not told".to_owned(), |count| count.to_string());
        println!("{program}: taken, instructions verified: {count}");
    }
}
