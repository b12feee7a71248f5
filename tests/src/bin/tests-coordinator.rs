//! `pgconvoy-coordinator` built with crash points.

fn main() -> std::process::ExitCode {
    coordinator::cli::main()
}
