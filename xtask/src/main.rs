//! The list of tasks.

use std::process::ExitCode;

use clap::Parser;
use xtask::{
    bench, bench_peers, build_ebpf, dist, fuzz, layers, licences, run, scenarios, test, vm,
};

/// Tidegate's tasks.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
enum Task {
    /// Build everything and show a gateway that carries real traffic.
    Run(run::Options),
    /// Measure tidegate beside others, and draw a report.
    Bench(bench::Options),
    /// Prove it: formatting, lints, layers, licences and all tests.
    Test(test::Options),
    /// Build the programs in the kernel, which the daemon embeds.
    BuildEbpf {
        /// Build them twice and compare.
        #[arg(long)]
        check: bool,
    },
    /// Check the rules between rooms that ARCHITECTURE.md states.
    Layers,
    /// Check the licences of all dependencies.
    Licences,
    /// Look for inputs that break a rule: see `fuzz/`.
    Fuzz(fuzz::Options),
    /// Build and pack what an installation needs.
    Dist(dist::Options),
    /// Measure what many peers cost: time, memory, CPU.
    BenchPeers(bench_peers::Options),
    /// Run the first tunnel in a virtual machine, with another kernel and zero-copy.
    Vm(vm::Options),
    /// The part of `run` that needs privileges.
    #[command(hide = true)]
    Demonstrate(scenarios::Options),
    /// The part of `bench` that needs privileges.
    #[command(hide = true)]
    Measure(bench::MeasureOptions),
}

fn main() -> ExitCode {
    let ended = match Task::parse() {
        Task::Run(options) => run::run(&options),
        Task::Bench(options) => bench::bench(&options),
        Task::Test(options) => test::test(&options),
        Task::BuildEbpf { check } => build_ebpf::build(check).map(|_| ExitCode::SUCCESS),
        Task::Layers => layers::check().map(|()| ExitCode::SUCCESS),
        Task::Licences => licences::check().map(|()| ExitCode::SUCCESS),
        Task::Fuzz(options) => fuzz::fuzz(&options).map(|()| ExitCode::SUCCESS),
        Task::Dist(options) => dist::dist(&options).map(|()| ExitCode::SUCCESS),
        Task::BenchPeers(options) => bench_peers::bench(&options),
        Task::Vm(options) => vm::run(&options),
        Task::Demonstrate(options) => scenarios::demonstrate(&options),
        Task::Measure(options) => bench::measure_planned(&options),
    };
    ended.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_do_not_contradict_each_other() {
        <Task as clap::CommandFactory>::command().debug_assert();
        for line in [
            "run",
            "run --scenario mesh --mode udp",
            "run --scenario bridge --peer wireguard-go",
            "demonstrate --programs . --mode native",
            "bench --quick --only tidegate,none --rows tcp-up-1",
            "measure --plan plan.json --date 2026-11-24T00:00:00Z --raw raw.json",
            "dist --out target/dist",
            "bench-peers --peers 1000,20000 --wg-only --programs target/release",
            "demonstrate --programs . --mode native --scenario gateway --peer tidegate --lifeline",
        ] {
            assert!(Task::try_parse_from(format!("xtask {line}").split(' ')).is_ok(), "{line}");
        }
        assert!(Task::try_parse_from(["xtask", "run", "--peer", "wireguard-go"]).is_err());
    }
}
