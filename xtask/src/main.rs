//! Tidegate's tasks.

use clap::Parser;

/// Tidegate's tasks.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
enum Task {
    /// Build the programs in the kernel, which the daemon embeds.
    BuildEbpf {
        /// Build them twice and compare.
        #[arg(long)]
        check: bool,
    },
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::BuildEbpf { check } => xtask::build_ebpf::build(check).map(drop),
    }
}
