//! `pgconvoy-agent`.

fn main() -> std::process::ExitCode {
    agent::main()
}
