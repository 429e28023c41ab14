//! Tidegate's tasks, as a library: `main.rs` lists them, and the daemon's tests use the [`lab`].

pub mod bench;
pub mod bench_peers;
pub mod build_ebpf;
pub mod claims;
pub mod demonstration;
pub mod dist;
pub mod fuzz;
pub mod lab;
pub mod layers;
pub mod licences;

pub mod preflight;
pub mod run;
pub mod scenarios;

pub mod test;
pub mod vm;
pub mod workspace;
