//! `pgconvoy-agent` built with crash points.

fn main() -> std::process::ExitCode {
    agent::main()
}
