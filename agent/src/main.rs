//! `pgconvoy-agent`: starts the agent.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
