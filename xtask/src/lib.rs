//! Tidegate's tasks.

pub mod build_ebpf;
pub mod workspace;
