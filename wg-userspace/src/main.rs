//! Arguments in, exit code out.

fn main() -> std::process::ExitCode {
    wg_userspace::cli::main()
}
